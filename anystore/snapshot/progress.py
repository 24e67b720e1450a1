"""How far a save or a load has come: a callback of the user's, or a bar in the terminal where rich is installed."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

Callback = Callable[[int, int], None]
"""Called with the bytes that are done and the bytes in total."""
_PATIENCE = 1.0
"""The seconds after which there is a bar."""


class Progress:
    """Counts bytes; a context manager, at whose end the bar goes.

    Parameters
    ----------
    total : int
        The bytes in total.
    callback : callable, optional
        Called after each piece with the bytes done and the bytes in total; in its place there is a bar on the standard
        error past a second, if that is a terminal and rich is installed.
    """

    def __init__(self, what: str, total: int, callback: Callback | None) -> None:
        self._what = what
        self._total = total
        self._callback = callback
        self._done = 0
        self._bar: Any = None
        self._due = time.monotonic() + _PATIENCE if callback is None and _on_a_terminal() else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, count: int) -> None:
        """Count so many more bytes."""
        self._done += count
        if self._callback is not None:
            self._callback(self._done, self._total)
        elif self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._done)
        elif self._due is not None and time.monotonic() > self._due:
            self._due = None
            self._bar = _bar(self._what, self._done, self._total)


def _on_a_terminal() -> bool:
    """Whether the standard error is a terminal; a program may have nothing there, or something of its own."""
    isatty = getattr(sys.stderr, "isatty", None)
    return isatty is not None and bool(isatty())


def _bar(what: str, done: int, total: int) -> Any:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
    except ImportError:
        return None
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    bar.add_task(what, total=total, completed=done)
    bar.start()
    return bar
