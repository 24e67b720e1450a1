"""Where a contract runs: each backend as a class to derive a test class from, before the contract."""

from __future__ import annotations

import importlib
import tempfile
from typing import Any

import pytest

from anystore import backends, moves, rows
from anystore.replay import sum_tree
from tests import stand_in
from tests.test_moves import plain_moves


class OnABackend:
    """What every contract needs to know of where it runs."""

    backend: str
    device: str
    floating, integer = "float64", "int64"
    """What the library counts and draws in."""

    @property
    def options(self) -> dict[str, Any]:
        """Those of a storage or a buffer."""
        return {"backend": self.backend, "device": self.device}


class OnNumpy(OnABackend):
    backend, device = "numpy", "cpu"


class OnPlainNumpy(OnNumpy):
    """Without compiled code."""

    @pytest.fixture(autouse=True)
    def _uncompiled(self, monkeypatch: pytest.MonkeyPatch) -> None:
        plain = plain_moves()
        for name in plain.__all__:
            monkeypatch.setattr(moves, name, getattr(plain, name))
        monkeypatch.setattr(rows, "all_inside", plain.all_inside)
        monkeypatch.setattr(sum_tree, "compiled", None)


class OnDisk(OnNumpy):
    """With every buffer in a file, of however few bytes."""

    device = f"disk:{tempfile.gettempdir()}"

    @pytest.fixture(autouse=True)
    def _large(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(importlib.import_module("anystore.backends.numpy"), "_LARGE", 1)


class OnTorch(OnABackend):
    backend, device = "torch", "cpu"


class OnTorchAsOnADevice(OnTorch):
    """With torch's own operations, as on a GPU, but on the CPU."""

    @pytest.fixture(autouse=True)
    def _opened(self, monkeypatch: pytest.MonkeyPatch) -> None:
        backend = importlib.import_module("anystore.backends.torch")
        monkeypatch.setattr(backend, "TorchHostBackend", backend.TorchBackend)
        monkeypatch.setattr(backends, "_shared", {})


class OnTorchCuda(OnTorch):
    device = "cuda:0"


class OnJax(OnABackend):
    backend, device = "jax", "cpu"
    floating, integer = "float32", "int32"


class OnJaxAsOnADevice(OnJax):
    """With JAX's own operations for places and chances too, as on a GPU, but on the CPU."""

    @pytest.fixture(autouse=True)
    def _opened(self, monkeypatch: pytest.MonkeyPatch) -> None:
        backend = importlib.import_module("anystore.backends.jax")
        monkeypatch.setattr(backend.JaxBackend, "books_elsewhere", False)


class OnJaxCuda(OnJax):
    device = "cuda:0"


class OnStrict(OnABackend):
    backend, device = "array_api_strict", "device1"


class OnStrictWithoutFloat64(OnStrict):
    device = "no_float64"
    floating = "float32"


class OnStrictWithout64Bits(OnStrict):
    device = "no_x64"
    floating, integer = "float32", "int32"


class OnCupy(OnABackend):
    backend, device = "cupy", "cuda:0"


class OnACupyStandIn(OnABackend):
    """The CuPy backend where there is no GPU; on the second device, while the first is the current one."""

    backend, device = "cupy", "cuda:1"
    on_a_stand_in = True

    @pytest.fixture(autouse=True)
    def _installed(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        with stand_in.installed(monkeypatch):
            yield
