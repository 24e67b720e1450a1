"""A fixed-capacity, spec-driven store of nested items, in any array library, on any device."""

import importlib
from typing import TYPE_CHECKING, Any

from anystore.backends import Backend, BackendInfo, available_backends, select_backend
from anystore.handover import to_library
from anystore.plan import Plan, plan
from anystore.snapshot import SnapshotError, load
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
    from anystore.tf import NumpyState as NumpyState
    from anystore.tf import NumpyStorage as NumpyStorage


def __getattr__(name: str) -> Any:
    """The two names that need TensorFlow, which is imported when one of them is asked for."""
    if name not in ("NumpyState", "NumpyStorage"):
        raise AttributeError(f"module 'anystore' has no attribute {name!r}")
    try:
        tf = importlib.import_module("anystore.tf")
    except ImportError as error:
        raise ImportError(
            f"anystore.{name} needs TensorFlow, which cannot be imported ({error}); pip install 'anystore[tensorflow]'"
        ) from error
    return getattr(tf, name)
