"""The system calls of a save, counted, failed, and stopped; and what a machine that loses its power keeps of them."""

from __future__ import annotations

import contextlib
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from anystore.snapshot import blocks, files

CALLS = (
    "create",
    "duplicate",
    "write",
    "truncate",
    "allocate",
    "fsync",
    "close",
    "sync_directory",
    "replace",
    "unlink",
    "mkdir",
)


@contextlib.contextmanager
def calls_go_through(handle: Callable[[str, Callable[..., Any], tuple[Any, ...]], Any]) -> Iterator[None]:
    """Within which `handle` gets each call's name, function and arguments, in the call's place."""
    originals = {name: getattr(files, name) for name in CALLS}

    def stand_in(name: str) -> Callable[..., Any]:
        return lambda *arguments: handle(name, originals[name], arguments)

    for name in CALLS:
        setattr(files, name, stand_in(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(files, name, original)


def do_not_wait(set_attribute: Callable[[Any, str, Any], object]) -> None:
    """Have nothing fsynced: what a killed process wrote is there all the same, and it takes the time of these tests."""
    set_attribute(files, "fsync", lambda fd: None)
    set_attribute(files, "sync_directory", lambda path: None)


def write_in_small_blocks(set_attribute: Callable[[Any, str, Any], object]) -> None:
    """Have the few bytes of these tests written in many calls, by the thread of `Blocks`."""
    set_attribute(blocks, "BLOCK", 64)


def count_calls(action: Callable[[], object]) -> int:
    """How many calls an action makes."""
    count = 0

    def handle(name: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        nonlocal count
        count += 1
        return call(*arguments)

    with calls_go_through(handle):
        action()
    return count


class FailingCalls:
    """Fails call number `first`, or all that need room on the disk from there on; a write gets half of it done."""

    def __init__(self, first: int, error: int, for_good: bool) -> None:
        self.left = first
        self.error = error
        self.for_good = for_good
        self.failed: list[str] = []

    def __call__(self, name: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        self.left -= 1
        is_due = self.left < 0 if self.for_good else self.left == -1
        if is_due and not (self.for_good and name in ("close", "unlink")):
            self.failed.append(name)
            if name == "write":
                half = memoryview(arguments[1])
                call(arguments[0], half[: half.nbytes // 2])
            if name == "close":
                call(*arguments)
            raise OSError(self.error, os.strerror(self.error))
        return call(*arguments)


class Killed:
    """Kills the process at call number `last`: before it, or half way through a write."""

    def __init__(self, last: int, half_way: bool) -> None:
        self.left = last
        self.half_way = half_way

    def __call__(self, name: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        if self.left == 0:
            if self.half_way and name == "write":
                half = memoryview(arguments[1])
                call(arguments[0], half[: half.nbytes // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1
        return call(*arguments)


class Machine:
    """Runs the calls, and tells what of a directory may be left if the power goes after any number of them.

    What was fsynced is there. Of the content of other files any part may be, and of the names made, changed and
    removed since the directory was fsynced, any.
    """

    def __init__(self, directory: Path) -> None:
        self._start = {path.name: path.read_bytes() for path in directory.iterdir()}
        self._calls: list[tuple[str, Any, Any]] = []
        self._open: dict[int, int] = {}
        self._count = 0

    def __call__(self, name: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        result = call(*arguments)
        if name == "create":
            self._count += 1
            self._open[result] = self._count
            self._calls.append(("create", arguments[0].name, self._count))
        elif name == "duplicate":
            self._open[result] = self._open[arguments[0]]
        elif name == "write":
            self._calls.append(("write", self._open[arguments[0]], bytes(arguments[1])))
        elif name == "fsync":
            self._calls.append(("fsync", self._open[arguments[0]], None))
        elif name == "replace":
            self._calls.append(("replace", arguments[0].name, arguments[1].name))
        elif name == "unlink":
            self._calls.append(("unlink", arguments[0].name, None))
        elif name == "sync_directory":
            self._calls.append(("sync_directory", None, None))
        return result

    def __len__(self) -> int:
        return len(self._calls)

    def left(self, count: int, chance: Callable[[], float]) -> dict[str, bytes]:
        """Names and contents after so many calls; `chance` decides what was not fsynced is there."""
        written: dict[Any, bytes] = dict(self._start)  # the files that were there are known by their names
        safe = dict(written)
        names: dict[str, Any] = {name: name for name in self._start}
        seen = dict(names)  # by the process itself
        pending: list[tuple[str | None, str | None, Any]] = []  # a name that goes, a name that comes, its file
        for kind, first, second in self._calls[:count]:
            if kind == "create":
                written[second], safe[second], seen[first] = b"", b"", second
                pending.append((None, first, second))
            elif kind == "write":
                written[first] += second
            elif kind == "fsync":
                safe[first] = written[first]
            elif kind == "replace":
                seen[second] = seen.pop(first)
                pending.append((first, second, seen[second]))
            elif kind == "unlink":
                seen.pop(first)
                pending.append((first, None, None))
            else:
                _apply(names, pending)
                pending = []
        _apply(names, [change for change in pending if chance() < 0.5])
        return {name: _torn(safe[file], written[file], chance) for name, file in names.items()}


def _apply(names: dict[str, Any], changes: list[tuple[str | None, str | None, Any]]) -> None:
    for gone, new, file in changes:
        if gone is not None:
            names.pop(gone, None)
        if new is not None:
            names[new] = file


def _torn(safe: bytes, written: bytes, chance: Callable[[], float]) -> bytes:
    rest = written[len(safe) :]
    return safe + rest[: round(len(rest) * chance())]


def chances(seed: int) -> Callable[[], float]:
    """Of what is not certain nothing happens (0), all (1), or some."""
    if seed < 2:
        return lambda: (0.9999, 0.0)[seed]
    return random.Random(seed).random
