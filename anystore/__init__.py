"""A fixed-capacity, spec-driven store of nested items, in any array library, on any device."""

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
    "Storage",
    "available_backends",
    "plan",
    "select_backend",
]
