"""Threads for a load, also when the program is about to end."""

from __future__ import annotations

import queue
from _thread import start_new_thread
from collections.abc import Callable
from types import TracebackType
from typing import Any, Generic, TypeVar

Result = TypeVar("Result")


class Task(Generic[Result]):
    """Something to be done, and what came of it."""

    def __init__(self, work: Callable[[], Result]) -> None:
        self._work = work
        self._outcome: tuple[Any, BaseException | None] | None = None
        self._done: queue.SimpleQueue[None] = queue.SimpleQueue()

    def run(self) -> None:
        """Do it."""
        work = self._work
        del self._work  # and with it the memory that it works on, once it is done
        try:
            self._outcome = work(), None
        except BaseException as error:
            self._outcome = None, error
        self._done.put(None)

    def wait(self) -> tuple[Any, BaseException | None]:
        """Wait until it is done: what it returned, and what it raised."""
        while self._outcome is None:
            self._done.get()
        return self._outcome

    def result(self) -> Result:
        """Wait until it is done; what it returned, or raises what it raised."""
        result, error = self.wait()
        if error is not None:
            raise error
        return result  # type: ignore[no-any-return]


class Threads:
    """So many threads that do what they are given in turn; a context manager, after which they have ended.

    An interrupt may come anywhere: what is waited at are queues alone, since it may leave the locks of `threading` and
    `concurrent.futures` held. At the end of the program, when Python starts no thread any more, whoever gives the work
    does it.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._started = 0
        self._tasks: queue.SimpleQueue[Task[Any] | None] = queue.SimpleQueue()
        self._ended: queue.SimpleQueue[None] = queue.SimpleQueue()

    def __enter__(self) -> Threads:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._end()
        except BaseException:
            self._end()
            raise
        for _ in range(self._started):
            self._ended.get()

    def _end(self) -> None:
        for _ in range(self._count):  # one for each that may run, whether it was counted or not
            self._tasks.put(None)

    def submit(self, work: Callable[[], Result]) -> Task[Result]:
        """Have `work` done."""
        task = Task(work)
        if self._started < self._count:
            self._start()
        self._tasks.put(task) if self._started else task.run()
        return task

    def _start(self) -> None:
        try:
            start_new_thread(_work_on, (self._tasks, self._ended))
        except RuntimeError:
            return
        self._started += 1


def _work_on(tasks: queue.SimpleQueue[Task[Any] | None], ended: queue.SimpleQueue[None]) -> None:
    try:
        while (task := tasks.get()) is not None:
            task.run()
    finally:
        ended.put(None)
