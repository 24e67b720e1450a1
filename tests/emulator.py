"""kernels.cu itself on a CPU: compiled by a C++ compiler, with a few lines in the place of CUDA, a thread at a time."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from anystore.leaf_table import THREADS

CUDA = """
#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(threads)
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct Index { unsigned x; };
static thread_local Index blockIdx, threadIdx;
static inline unsigned long long atomicCAS(unsigned long long *at, unsigned long long old, unsigned long long now)
{
    const unsigned long long found = *at;
    if (found == old)
        *at = now;
    return found;
}
template <typename T> static inline T atomicMax(T *at, T value)
{
    const T found = *at;
    if (value > found)
        *at = value;
    return found;
}
#include "kernels.cu"
#define EACH_THREAD for (unsigned block = 0; block < blocks; block++) for (unsigned thread = 0; thread < THREADS; \\
    thread++) if ((blockIdx.x = block, threadIdx.x = thread, true))
extern "C" void run_gather(unsigned blocks, const Launch *launch) { EACH_THREAD gather(*launch); }
extern "C" void run_scatter(unsigned blocks, const Launch *launch) { EACH_THREAD scatter(*launch); }
extern "C" void run_check(unsigned blocks, const void *index, i64 bytes, i64 is_signed, i64 count, i64 capacity,
                          i64 *rows, u64 *outside)
{
    EACH_THREAD check(index, bytes, is_signed, count, capacity, rows, outside);
}
extern "C" void run_note_rows(unsigned blocks, const i64 *rows, i64 count, Slot *slots, i64 bits)
{
    EACH_THREAD note_rows(rows, count, slots, bits);
}
extern "C" void run_last_writes(unsigned blocks, const i64 *rows, i64 count, const Slot *slots, i64 bits, i64 *order)
{
    EACH_THREAD last_writes(rows, count, slots, bits, order);
}
"""
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
CHECKED = ["-fsanitize=undefined", "-fno-sanitize-recover=all", "-static-libubsan"]


@functools.cache
def library() -> ctypes.CDLL:
    """The kernels as functions of a library; undefined behaviour, a misaligned lane among it, ends the process."""
    assert COMPILER is not None
    with tempfile.TemporaryDirectory() as folder, resources.as_file(resources.files("anystore")) as package:
        source, built = Path(folder, "emulator.cpp"), Path(folder, "emulator.so")
        source.write_text(CUDA)
        command = [COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", "-w", f"-I{package}", str(source)]
        checked = subprocess.run([*command, *CHECKED, "-o", built], capture_output=True, check=False)
        if checked.returncode:
            subprocess.run([*command, "-o", built], check=True)
        return ctypes.CDLL(str(built))


def run(name: str, blocks: int, *arguments: Any) -> None:
    """Run a kernel of so many blocks of THREADS threads."""
    assert THREADS == 256
    function = getattr(library(), f"run_{name}")
    function.restype = None
    function(
        ctypes.c_uint(blocks),
        *(
            ctypes.c_void_p(argument.ctypes.data) if isinstance(argument, np.ndarray) else ctypes.c_longlong(argument)
            for argument in arguments
        ),
    )
