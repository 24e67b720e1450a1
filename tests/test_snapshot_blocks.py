"""Blocks: what was written is what was given, past the system's cache or through it, whatever fails."""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from anystore.snapshot import blocks, files
from anystore.snapshot.blocks import Blocks

BLOCK = 8192
LENGTHS = [1, 511, 512, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 7 * BLOCK, 7 * BLOCK + 4096, 8 * BLOCK - 3]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", BLOCK)
    monkeypatch.setattr(blocks, "zeros", in_pages)


def in_pages(shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """Memory that begins with a page, as that of large arrays does."""
    memory = np.zeros(int(np.prod(shape)) + 4096, np.uint8)
    start = -memory.ctypes.data % 4096
    return memory[start : start + int(np.prod(shape))].view(dtype).reshape(shape)


@contextlib.contextmanager
def created(path: Path) -> Iterator[int]:
    fd = files.create(path)
    try:
        yield fd
    finally:
        files.close(fd)


def random_bytes(length: int) -> NDArray[np.uint8]:
    return np.random.default_rng(length).integers(0, 256, length, np.uint8)


def refuses_direct(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let no bytes pass by the cache, as a file system may, though it let the flag be set; the list is of refusals."""
    refused, write = [], os.write

    def write_through(fd: int, data: Any) -> int:
        if files.passes_by_cache(fd):
            refused.append(len(data))
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return write(fd, data)

    monkeypatch.setattr(os, "write", write_through)
    return refused


@pytest.mark.parametrize("way", ["past the cache", "through it", "refused"])
@pytest.mark.parametrize("step", [100, BLOCK, 3 * BLOCK + 1])
@pytest.mark.parametrize("length", LENGTHS)
def test_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int, step: int, way: str) -> None:
    if way == "through it":
        monkeypatch.setattr(files, "pass_by_cache", lambda fd, wanted: None)
    elif way == "refused":
        refuses_direct(monkeypatch)
    data = random_bytes(length)
    with created(tmp_path / "file") as fd:
        checksum = Blocks().write(fd, (data[start : start + step] for start in range(0, length, step)))
    assert (tmp_path / "file").read_bytes() == data.tobytes()
    assert checksum == zlib.crc32(data.data)


def test_a_piece_may_be_filled_anew(tmp_path: Path) -> None:
    def pieces() -> Iterator[NDArray[np.uint8]]:
        piece = np.zeros(1000, np.uint8)
        for number in range(100):
            piece[:] = number
            yield piece

    with created(tmp_path / "file") as fd:
        Blocks().write(fd, pieces())
    assert (tmp_path / "file").read_bytes() == np.repeat(np.arange(100, dtype=np.uint8), 1000).tobytes()


def test_several_files(tmp_path: Path) -> None:
    several = Blocks()
    for length in LENGTHS:
        with created(tmp_path / str(length)) as fd:
            several.write(fd, [random_bytes(length)])
    for length in LENGTHS:
        assert (tmp_path / str(length)).read_bytes() == random_bytes(length).tobytes()


def test_whole_blocks_pass_by_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with created(tmp_path / "probe") as fd:
        files.pass_by_cache(fd, True)
        allowed = files.passes_by_cache(fd)
    written, write = [], os.write

    def noted(fd: int, data: Any) -> int:
        count = write(fd, data)
        written.append((count, files.passes_by_cache(fd)))
        return count

    monkeypatch.setattr(os, "write", noted)
    with created(tmp_path / "file") as fd:
        Blocks().write(fd, [random_bytes(2 * BLOCK + 1)])
    assert written == [(BLOCK, allowed), (BLOCK, allowed), (1, False)]


def test_every_block_is_refused_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with created(tmp_path / "probe") as fd:
        files.pass_by_cache(fd, True)
        allowed = files.passes_by_cache(fd)
    refused = refuses_direct(monkeypatch)
    with created(tmp_path / "file") as fd:
        Blocks().write(fd, [random_bytes(2 * BLOCK + 1)])
    assert refused == ([BLOCK, BLOCK] if allowed else [])


@pytest.mark.parametrize("number", range(8))
def test_an_error_comes_when_no_write_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """And there are no more writes."""
    count, write = 0, files.write

    def failing(fd: int, data: Any) -> None:
        nonlocal count
        count += 1
        if count > number:
            raise OSError(errno.ENOSPC, f"{count}")
        write(fd, data)

    monkeypatch.setattr(files, "write", failing)
    with created(tmp_path / "file") as fd, pytest.raises(OSError, match=f"{number + 1}"):
        Blocks().write(fd, [random_bytes(8 * BLOCK)])
    assert count == number + 1
    assert (tmp_path / "file").read_bytes() == random_bytes(8 * BLOCK)[: number * BLOCK].tobytes()


def test_an_interrupt_leaves_other_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though nobody waits for the thread: when it writes, the file is closed, and its number is another's."""
    write, go_on, written = files.write, threading.Event(), threading.Event()

    def late(fd: int, data: Any) -> None:
        assert go_on.wait(60)
        write(fd, data)
        written.set()

    def pieces() -> Iterator[NDArray[np.uint8]]:
        yield random_bytes(BLOCK)
        raise KeyboardInterrupt

    class Interrupted(queue.SimpleQueue):
        def get(self) -> Any:
            # `current_thread` would enter the other thread into `threading.enumerate` for good.
            if threading.get_ident() == threading.main_thread().ident:
                raise KeyboardInterrupt
            return super().get()

    monkeypatch.setattr(files, "write", late)
    monkeypatch.setattr(blocks.queue, "SimpleQueue", Interrupted)
    with created(tmp_path / "file") as fd, pytest.raises(KeyboardInterrupt):
        Blocks().write(fd, pieces())
    with created(tmp_path / "another") as other:
        assert other == fd
        go_on.set()
        assert written.wait(60)
    assert (tmp_path / "another").read_bytes() == b""
    assert (tmp_path / "file").read_bytes() == random_bytes(BLOCK).tobytes()


def test_where_no_thread_can_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(blocks, "start_new_thread", fail)
    before = set(os.listdir("/proc/self/fd"))
    with created(tmp_path / "file") as fd:
        Blocks().write(fd, [random_bytes(3 * BLOCK + 1)])
    assert (tmp_path / "file").read_bytes() == random_bytes(3 * BLOCK + 1).tobytes()
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_an_error_of_whoever_gives_the_pieces(tmp_path: Path) -> None:
    def pieces() -> Iterator[NDArray[np.uint8]]:
        yield random_bytes(3 * BLOCK)
        raise KeyboardInterrupt

    with created(tmp_path / "file") as fd:
        with pytest.raises(KeyboardInterrupt):
            Blocks().write(fd, pieces())
        assert (tmp_path / "file").read_bytes() == random_bytes(3 * BLOCK).tobytes()
