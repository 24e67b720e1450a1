"""Threads for a load, also when the program is about to end."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Any, TypeVar

Result = TypeVar("Result")


class Threads:
    """So many threads that do what they are given in turn; a context manager, after which they have ended.

    At the end of the program, from an `atexit` handler, Python starts none any more: whoever gives the work does it.
    """

    def __init__(self, count: int) -> None:
        self._pool: Any = None
        try:
            from concurrent.futures import ThreadPoolExecutor
        except RuntimeError:  # it is too late for the first import of it, too
            return
        self._pool = ThreadPoolExecutor(count)

    def __enter__(self) -> Threads:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def submit(self, work: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """Have it done."""
        if self._pool is not None:
            try:
                given: Future[Result] = self._pool.submit(work, *arguments)
            except RuntimeError:
                pool, self._pool = self._pool, None
                pool.shutdown()  # what it was given before is done first
            else:
                return given
        done = Future[Result]()
        try:
            done.set_result(work(*arguments))
        except BaseException as error:
            done.set_exception(error)
        return done
