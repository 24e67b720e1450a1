"""The array libraries, one file each, and the selector."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

from anystore.backends.base import Backend, is_disk, parse_device
from anystore.backends.generic import GenericBackend
from anystore.convert import is_array, library_of

__all__ = ["Backend", "BackendInfo", "available_backends", "select_backend"]


class _Known(NamedTuple):
    """Where the backend for a library is, and how to get the library."""

    module: str
    backend: str
    install: str


_KNOWN = {
    "numpy": _Known("anystore.backends.numpy", "NumpyBackend", "pip install numpy"),
    "cupy": _Known("anystore.backends.cupy", "CupyBackend", "pip install 'anystore[cupy-cuda12x]' (or cupy-cuda13x)"),
    "torch": _Known("anystore.backends.torch", "TorchBackend", "pip install 'anystore[torch]'"),
    "jax": _Known("anystore.backends.jax", "JaxBackend", "pip install 'anystore[jax]'"),
    "array_api_strict": _Known("anystore.backends.generic", "StrictBackend", "pip install array-api-strict"),
}


@dataclass(frozen=True)
class BackendInfo:
    """What `available_backends` tells of a backend.

    Attributes
    ----------
    name : str
        The name that selects it.
    usable : bool
        Whether a storage can be built on it here.
    reason : str
        Why it is not usable, and what to do; empty if it is.
    version : str or None
        The version of its library, None if that is not installed.
    devices : tuple of str
        The devices that can be named.
    """

    name: str
    usable: bool
    reason: str
    version: str | None
    devices: tuple[str, ...]


def select_backend(backend: Any = "numpy", device: Any = None) -> Backend:
    """The backend that `backend` and `device` name.

    Parameters
    ----------
    backend : str, module, array or Backend
        "numpy", "cupy", "torch", "jax" or "array_api_strict"; "auto" for CuPy where a CUDA device can be used and
        else NumPy; a namespace of the array API standard; an array, whose library and device are taken; or a
        Backend, which is returned as it is.
    device : str or device object, optional
        "cpu", "cuda", "cuda:1" ("gpu" says the same as "cuda"), or an object of the library's own. None stands for
        the library's default device, or that of the array. For NumPy also "disk:" and a directory, such as
        "disk:/scratch": buffers of 4 MiB or more are in files there, which have no names and are gone with the storage.
        A process that is forked off shares these files and nothing else: only one of the two may go on to use it.

    Returns
    -------
    Backend
        The same one for the same library and device.

    Raises
    ------
    ValueError
        If the name is unknown or the device does not exist; the message lists those that do.
    ImportError
        If the library is not installed; the message says how to get it.
    TypeError
        If `backend` is none of these.
    """
    if isinstance(backend, Backend):
        if device is not None and _open(backend.name, device).device != backend.device:
            raise ValueError(f"expected the device of the backend, {backend.device!r}, or none, found {device!r}")
        return backend
    if isinstance(backend, str):
        return _open(_automatic(device) if backend == "auto" else backend, device)
    if isinstance(backend, ModuleType):
        return _open(_name_of(backend), device)
    if is_array(backend):
        namespace = getattr(backend, "__array_namespace__", None)
        name = library_of(backend)
        if name not in _KNOWN and namespace is not None:
            name = namespace().__name__
        return _open(name, _device_of(backend, name) if device is None else device)
    raise TypeError(
        f"expected the name of a backend, an array-API namespace, an array or a Backend, found {backend!r:.80}"
    )


def available_backends() -> list[BackendInfo]:
    """Every backend: usable or not and why not, with the version of its library and its devices.

    Notes
    -----
    The libraries that are installed are imported to ask for their devices.
    """
    return [_info(name) for name in _KNOWN]


def _info(name: str) -> BackendInfo:
    if importlib.util.find_spec(name) is None:
        return BackendInfo(name, False, f"not installed: {_KNOWN[name].install}", None, ())
    version = None
    try:
        version = importlib.import_module(name).__version__
        devices = tuple(_class_of(name).devices())
    except Exception as error:
        what = "cannot be imported" if version is None else "its devices cannot be listed"
        return BackendInfo(name, False, f"{what}: {error}", version, ())
    reason = "" if devices else "no CUDA device can be used here"
    return BackendInfo(name, bool(devices), reason, version, devices)


def _automatic(device: Any) -> str:
    """The name that "auto" stands for."""
    if isinstance(device, str) and (is_disk(device) or parse_device(device)[0] == "cpu"):
        return "numpy"
    return "cupy" if _info("cupy").usable else "numpy"


def _name_of(namespace: ModuleType) -> str:
    """The name of a backend for a module such as numpy, jax.numpy, array_api_compat.torch or array_api_strict."""
    parts = namespace.__name__.split(".")
    name = parts[1] if parts[0] == "array_api_compat" and len(parts) > 1 else parts[0]
    return name if name in _KNOWN else namespace.__name__


def _device_of(array: Any, name: str) -> Any:
    if name == "numpy":
        return None
    if name != "jax":
        return array.device
    devices = array.devices()
    if len(devices) > 1:
        raise ValueError(f"expected an array on one device as the backend, found one on {len(devices)}; give device=")
    return next(iter(devices))


_shared: dict[tuple[str, str], Backend] = {}


def _open(name: str, device: Any) -> Backend:
    """One backend for each library and device, however the device was spelled."""
    backend = _make(name, device)
    return _shared.setdefault((backend.name, backend.device), backend)


def _make(name: str, device: Any) -> Backend:
    if name in _KNOWN:
        backend: Backend = _class_of(name).open(device)
        return backend
    if _is_namespace(name):
        return GenericBackend(_import(name), device)
    raise ValueError(f"unknown backend {name!r}; there are: auto, {', '.join(_KNOWN)}")


def _is_namespace(name: str) -> bool:
    """Whether `name` is that of a module that follows the array API standard."""
    try:
        return hasattr(importlib.import_module(name), "__array_namespace_info__")
    except (ImportError, ValueError):
        return False


def _class_of(name: str) -> Any:
    _import(name)
    known = _KNOWN[name]
    return getattr(importlib.import_module(known.module), known.backend)


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        advice = f"; {_KNOWN[name].install}" if name in _KNOWN else ""
        raise ImportError(f"the backend {name!r} needs a package that cannot be imported ({error}){advice}") from error
