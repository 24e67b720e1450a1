"""NVRTC, NVIDIA's compiler at run time, which needs no GPU: ``pip install nvidia-cuda-nvrtc-cu12``."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path


def library() -> Path | None:
    """Where NVRTC is, as the package of PyPI installs it; None where it is not."""
    if importlib.util.find_spec("nvidia") is None:
        return None
    places = importlib.util.find_spec("nvidia").submodule_search_locations or []  # type: ignore[union-attr]
    found = [path for place in places for path in Path(place).glob("*/lib/libnvrtc.so.*")]
    return next((path for path in sorted(found) if "alt" not in path.name), None)


def compile_for(architecture: str, source: str, options: tuple[str, ...]) -> tuple[bytes, str]:
    """The machine code, and all that the compiler has to say.

    Raises
    ------
    ValueError
        If it does not compile; with what the compiler says.
    """
    nvrtc, program = ctypes.CDLL(str(library())), ctypes.c_void_p()
    given = [option.encode() for option in (f"--gpu-architecture={architecture}", *options)]
    assert not nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None)
    failed = nvrtc.nvrtcCompileProgram(program, len(given), (ctypes.c_char_p * len(given))(*given))
    log = _read(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).rstrip(b"\0").decode()
    code = b"" if failed else _read(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    if failed:
        raise ValueError(log)
    return code, log


def _read(size_of: object, read: object, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    assert not size_of(program, ctypes.byref(size))  # type: ignore[operator]
    text = ctypes.create_string_buffer(size.value)
    assert not read(program, text)  # type: ignore[operator]
    return text.raw
