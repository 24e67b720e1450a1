"""A fixed-capacity, spec-driven store of nested items, in any array library, on any device."""

import importlib
from typing import TYPE_CHECKING, Any

from anystore.backends import Backend, BackendInfo, available_backends, select_backend
from anystore.plan import Plan, plan
from anystore.specs import ArraySpec
from anystore.storage import Storage

__version__ = "0.1.0"

__all__ = [
    "ArraySpec",
    "Backend",
    "BackendInfo",
    "Plan",
    "SnapshotError",
    "Storage",
    "available_backends",
    "load",
    "plan",
    "select_backend",
    "to_library",
]

if TYPE_CHECKING:
    from anystore.handover import to_library as to_library
    from anystore.snapshot import SnapshotError as SnapshotError
    from anystore.snapshot import load as load
    from anystore.tf import NumpyState as NumpyState
    from anystore.tf import NumpyStorage as NumpyStorage

_LATER = {
    "NumpyState": "anystore.tf",
    "NumpyStorage": "anystore.tf",
    "SnapshotError": "anystore.snapshot",
    "load": "anystore.snapshot",
    "to_library": "anystore.handover",
}
"""What is imported when it is asked for: for the sake of TensorFlow, and of time."""


def __dir__() -> list[str]:
    """What is there, imported or not; but for `NumpyStorage` and `NumpyState`, which need TensorFlow."""
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """The names of `_LATER`."""
    if name not in _LATER:
        raise AttributeError(f"module 'anystore' has no attribute {name!r}")
    try:
        module = importlib.import_module(_LATER[name])
    except ImportError as error:
        if _LATER[name] != "anystore.tf":
            raise
        raise ImportError(
            f"anystore.{name} needs TensorFlow, which cannot be imported ({error}); pip install 'anystore[tensorflow]'"
        ) from error
    found = globals()[name] = getattr(module, name)
    return found
