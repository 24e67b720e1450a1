"""What a buffer holds and how fast it is used, for people to look at while an agent trains.

A buffer has two methods for it. ``_counts()`` takes a `Counts` under the buffer's lock: plain numbers, and the columns
that the rest is worked out from, as copies in main memory, oldest item first. ``stats()`` has a `Meter` of the buffer's
own make `Stats` of them: ``return self._meter.read(self._counts())``. Nothing is counted while items are added and
sampled but how many they are.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_NEWEST = 100
"""The means are of so many episodes, the newest."""


@dataclass(frozen=True)
class Counts:
    """What a buffer tells of itself at one moment.

    Attributes
    ----------
    size, capacity : int
        The items that are there, and those that there is room for.
    total_added, total_sampled : int
        The items that were ever added, and ever drawn; a window is one.
    nbytes : int
        The bytes of all that items are stored in.
    overwrote : bool
        Whether items had to go for newer ones.
    lanes : int
        How many lanes there are.
    behind : array of int, shape (size,), or None
        How far behind each item the previous one of its lane is; where there is none, 0 or more than there are items
        before it; None if that is not known.
    ends : array of bool, shape (size,), or None
        Whether an episode ends with each item; None if that is not known.
    rewards : array, shape (size, ...), or None
        The reward of each item; None if there is none.
    priorities : array, shape (n,), or None
        The priorities of all items or of some; None if they have none.
    """

    size: int
    capacity: int
    total_added: int
    total_sampled: int
    nbytes: int
    overwrote: bool = False
    lanes: int = 1
    behind: NDArray[Any] | None = None
    ends: NDArray[np.bool_] | None = None
    rewards: NDArray[Any] | None = None
    priorities: NDArray[Any] | None = None


@dataclass(frozen=True)
class Spread:
    """How far numbers are spread: the least, the middle one, the mean, the greatest."""

    low: float
    median: float
    mean: float
    high: float

    @classmethod
    def of(cls, numbers: NDArray[Any]) -> Spread | None:
        """That of an array; None if it is empty."""
        if numbers.size == 0:
            return None
        return cls(*(float(each) for each in (numbers.min(), np.median(numbers), numbers.mean(), numbers.max())))


@dataclass(frozen=True)
class Stats:
    """What a buffer holds and how fast it is used; printed, a few lines of text.

    Attributes
    ----------
    size, capacity : int
        The items that are there, and those that there is room for.
    total_added, total_sampled : int
        The items that were ever added, and ever drawn; a window is one.
    nbytes : int
        The bytes of all that items are stored in.
    added_per_second, sampled_per_second : float
        Since these were asked for the last time, or since the beginning.
    episodes : int or None
        How many ended with an item that is there; None if the items do not tell.
    mean_length, mean_return : float or None
        The mean number of items, and the mean sum of rewards, of the newest of these episodes, 100 at most. None if
        there is none that is there from its first item on.
    priorities : Spread or None
        Where items have some.
    """

    size: int
    capacity: int
    total_added: int
    total_sampled: int
    nbytes: int
    added_per_second: float
    sampled_per_second: float
    episodes: int | None = None
    mean_length: float | None = None
    mean_return: float | None = None
    priorities: Spread | None = None

    @property
    def replay_ratio(self) -> float:
        """How often an item that was added has been drawn, on average; 0 if none was added."""
        return self.total_sampled / self.total_added if self.total_added else 0.0

    def __str__(self) -> str:
        lines = {
            "items": f"{self.size:,} of {self.capacity:,} ({self.size / self.capacity:.0%}), {_as_bytes(self.nbytes)}",
            "added": f"{self.total_added:,} ({self.added_per_second:,.0f} a second)",
            "sampled": f"{self.total_sampled:,} ({self.sampled_per_second:,.0f} a second), each item "
            f"{self.replay_ratio:.3g} times",
        }
        if self.episodes is not None:
            lines["episodes"] = ", ".join([f"{self.episodes:,}", *self._means()])
        if self.priorities is not None:
            spread = self.priorities
            lines["priorities"] = (
                f"{spread.low:.3g} to {spread.high:.3g}, median {spread.median:.3g}, mean {spread.mean:.3g}"
            )
        return "\n".join(f"{name:<10}  {text}" for name, text in lines.items())

    @property
    def line(self) -> str:
        """What a training loop shows of it, in one line."""
        parts = [
            f"{self.size:,}/{self.capacity:,} items",
            _as_bytes(self.nbytes),
            f"{self.added_per_second:,.0f} added/s",
            f"{self.sampled_per_second:,.0f} sampled/s",
        ]
        if self.episodes is not None:
            parts += [f"{self.episodes:,} episodes", *self._means()]
        return ", ".join(parts)

    def _means(self) -> list[str]:
        means = {"mean length": self.mean_length, "mean return": self.mean_return}
        return [f"{name} {mean:,.1f}" for name, mean in means.items() if mean is not None]


class Meter:
    """Makes stats of counts, with the rates since the last time.

    Parameters
    ----------
    total_added, total_sampled : int, default 0
        Those of the buffer when the meter is made.
    clock : callable
        What time it is, in seconds, from whatever beginning.

    Notes
    -----
    Everyone who wants rates of their own has a meter of their own.
    """

    def __init__(
        self, total_added: int = 0, total_sampled: int = 0, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._last = clock(), total_added, total_sampled
        self._rates = 0.0, 0.0

    def read(self, counts: Counts) -> Stats:
        """The stats of a buffer that has these counts now."""
        now = self._clock(), counts.total_added, counts.total_sampled
        seconds, *counted = (new - old for new, old in zip(now, self._last))
        if seconds > 0:  # or the rates of the last time are the best there are
            self._rates = counted[0] / seconds, counted[1] / seconds
            self._last = now
        added, sampled = self._rates
        episodes, mean_length, mean_return = _episodes(counts)
        return Stats(
            size=counts.size,
            capacity=counts.capacity,
            total_added=counts.total_added,
            total_sampled=counts.total_sampled,
            nbytes=counts.nbytes,
            added_per_second=added,
            sampled_per_second=sampled,
            episodes=episodes,
            mean_length=mean_length,
            mean_return=mean_return,
            priorities=None if counts.priorities is None else Spread.of(counts.priorities),
        )


def _episodes(counts: Counts) -> tuple[int | None, float | None, float | None]:
    """How many episodes ended with an item that is there, and the mean length and return of the newest of them."""
    if counts.ends is None:
        return None, None, None
    last = np.flatnonzero(counts.ends)
    if counts.behind is None or last.size == 0:
        return len(last), None, None
    # In each lane the oldest may not be there from its first item on.
    wanted = last[-(_NEWEST + counts.lanes) :]
    length, sums, whole = _measured(counts, counts.behind, counts.ends, wanted)
    newest = np.flatnonzero(whole)[-_NEWEST:]
    if newest.size == 0:
        return len(last), None, None
    return len(last), float(length[newest].mean()), None if sums is None else float(sums[newest].mean())


def _measured(
    counts: Counts, behind: NDArray[Any], ends: NDArray[np.bool_], last: NDArray[np.intp]
) -> tuple[NDArray[np.intp], NDArray[np.float64] | None, NDArray[np.bool_]]:
    """Of the episodes that end with these items: how many items and what sum of rewards each has.

    And whether it is there from its first item on.
    """
    start, further_back = int(last[0]), True
    while further_back:
        start = max(0, start - (len(ends) - start))  # twice as many items, until all beginnings are among them
        first = _first_items(behind, ends, start)
        opening = start + first[last - start]
        before = opening - behind[opening]
        further_back = bool(((before >= 0) & (before < start)).any())
    whole = ((before >= 0) & (before < opening)) | np.bool_(not counts.overwrote)
    length = np.bincount(first)[opening - start]
    if counts.rewards is None or counts.rewards.ndim != 1:
        return length, None, whole
    sums: NDArray[Any] = np.bincount(first, counts.rewards[start:].astype(np.float64))
    return length, sums[opening - start], whole


def _first_items(behind: NDArray[Any], ends: NDArray[np.bool_], start: int) -> NDArray[np.intp]:
    """Where the episode of each item from `start` on begins, as far as it is among them; counted from `start`.

    Every item looks at the one before it, then at what that one looks at, and so on: the steps double (pointer jumping,
    Wyllie 1979), so that an episode of a million items takes twenty.
    """
    items = np.arange(start, len(ends))
    before = items - behind[start:]
    goes_on = (before >= start) & (before < items)
    goes_on[goes_on] = ~ends[before[goes_on]]
    first = np.where(goes_on, before, items) - start
    while not np.array_equal(first, further := first[first]):
        first = further
    return first


def _as_bytes(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.0f} TB"


@contextmanager
def live_stats(
    buffer: Any,
    *,
    refresh_per_second: float = 2.0,
    console: Any = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[None]:
    """A line in the terminal on how full a buffer is and how fast it is used, for as long as the ``with`` lasts.

    What stays there at the end has the rates of all that time.

    Parameters
    ----------
    buffer : ReplayBuffer
        What to show; it is asked from a thread.
    refresh_per_second : float, default 2
        How often.
    console : rich.console.Console, optional
        Where to; rich's own by default. Where that is no terminal, only the last line is written.
    clock : callable
        What the rates go by, in seconds.

    Raises
    ------
    ImportError
        If rich is not installed.
    """
    live, progress_bar, table = _import_rich("live", "progress_bar", "table")
    start = buffer._counts()
    recent, overall = (Meter(start.total_added, start.total_sampled, clock=clock) for _ in range(2))
    last: Stats | None = None

    def line() -> Any:
        stats = last or recent.read(buffer._counts())
        grid = table.Table.grid(padding=(0, 1))
        grid.add_row(progress_bar.ProgressBar(stats.capacity, stats.size, width=20), stats.line)
        return grid

    with live.Live(get_renderable=line, refresh_per_second=refresh_per_second, console=console) as shown:
        shown.refresh()
        try:
            yield
        finally:
            last = overall.read(buffer._counts())
    if not shown.console.is_terminal:
        shown.console.line()


def _import_rich(*modules: str) -> list[Any]:
    try:
        return [importlib.import_module(f"rich.{module}") for module in modules]
    except ImportError as error:
        raise ImportError(
            f"the line in the terminal needs rich, which cannot be imported ({error}); pip install rich"
        ) from error
