"""Transitions whose every frame is a number of its own, and what a plain list of them holds: slow, and easy to see."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import optree
from numpy.typing import ArrayLike, NDArray

from anystore import ArraySpec
from tests.items import leaves

_OBSERVATION = {
    "camera": ArraySpec((4, 2), "int32"),
    "sensors": {"radar": ArraySpec((2, 3), "float32"), "speed": ArraySpec((), "int32")},
}
SPEC = {
    "obs": _OBSERVATION,
    "next_obs": _OBSERVATION,
    "action": ArraySpec((), "int32"),
    "reward": ArraySpec((), "float32"),
    "terminated": ArraySpec((), "bool"),
    "truncated": ArraySpec((), "bool"),
}
STACKS = {"obs/camera": 0, "obs/sensors/radar": -1}
"""Of four frames and of three."""
DEPTH = 4
LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "shared": {"shared": {"next_obs": "obs"}},
    "stacks": {"stacks": STACKS},
    "shared stacks": {"shared": {"next_obs": "obs"}, "stacks": STACKS},
}


def spec_of(layout: str) -> dict[str, Any]:
    """The spec of the items of a layout: what is no more than stacks has no next observation to tell stacks from."""
    return {name: spec for name, spec in SPEC.items() if layout != "stacks" or name != "next_obs"}


class Walk:
    """An environment; the numbers of its frames go up by one with each."""

    def __init__(self, first: int = 0) -> None:
        self.number = first
        self.reset()

    def reset(self, *, repeat: bool = False) -> None:
        """Begin an episode, with frames of its own before the first or the first one repeated."""
        self.number += 10
        self.frames = [self.number + (3 if repeat else age) for age in range(DEPTH)]
        self.number += 3

    def observation(self) -> dict[str, Any]:
        frames = np.array(self.frames)
        radar = np.stack([frames[1:] / 2, -frames[1:]])
        return {
            "camera": np.stack([frames, 3 * frames], axis=1).astype(np.int32),
            "sensors": {"radar": radar.astype(np.float32), "speed": np.int32(self.frames[-1])},
        }

    def step(self, end: str | None = None) -> dict[str, Any]:
        """The next item; with an end, the next one after it begins an episode."""
        before = self.observation()
        self.number += 1
        self.frames = [*self.frames[1:], self.number]
        item = {
            "obs": before,
            "next_obs": self.observation(),
            "action": np.int32(self.number),
            "reward": np.float32((7 * self.number % 11 - 5) / 2),
            "terminated": np.bool_(end in ("terminated", "both")),
            "truncated": np.bool_(end in ("truncated", "both")),
        }
        if end is not None:
            self.reset(repeat=self.number % 2 == 0)
        return item

    def episode(self, length: int, end: str | None) -> list[dict[str, Any]]:
        """The items of an episode; without an end, no flag tells of it."""
        items = [self.step() for _ in range(length - 1)]
        items.append(self.step(end))
        if end is None:
            self.reset()
        return items


def together(items: list[Any]) -> Any:
    """A batch of these items."""
    return optree.tree_map(lambda *parts: np.stack(parts), *items)


def part(items: Any, layout: str) -> Any:
    """What the spec of a layout has of an item or a batch."""
    return {name: items[name] for name in spec_of(layout)}


# The list ---------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Entry:
    """An item of the list."""

    number: int
    item: dict[str, Any]
    begins: bool
    previous: Entry | None = None
    following: Entry | None = None
    ends: bool = False
    priority: float = 1.0


@dataclass
class ListOfItems:
    """What a buffer holds; that of some layouts sees cuts that no flag tells of."""

    capacity: int
    layout: str = "plain"
    total: int = 0
    entries: list[Entry] = field(default_factory=list)
    """All since the last time that it was cleared, also those that are overwritten."""
    newest: dict[int, Entry] = field(default_factory=dict)
    """Of each lane."""
    highest: float = 1.0

    def add(self, item: dict[str, Any], lane: int = 0) -> None:
        previous = self.newest.get(lane)
        begins = previous is None or previous.ends or not self.goes_on(previous.item, item)
        if previous is not None and begins:
            previous.ends = True
        ends = bool(item["terminated"] or item["truncated"])
        entry = Entry(self.total, item, begins, previous, ends=ends, priority=self.highest)
        if previous is not None:
            previous.following = entry
        self.newest[lane] = entry
        self.entries.append(entry)
        self.total += 1

    def goes_on(self, item: dict[str, Any], following: dict[str, Any]) -> bool:
        """As far as the layout can tell."""
        if self.layout == "plain":
            return True
        if self.layout == "stacks":
            one, other = item["obs"], following["obs"]
            cameras = one["camera"][1:], other["camera"][:-1]
            radars = one["sensors"]["radar"][:, 1:], other["sensors"]["radar"][:, :-1]
            return np.array_equal(*cameras) and np.array_equal(*radars)
        return all(map(np.array_equal, leaves(item["next_obs"]), leaves(following["obs"])))

    def end(self, lanes: list[int]) -> None:
        """Let the episodes end that have not; the flag of their last items tells."""
        for lane in lanes:
            if lane in self.newest and not self.newest[lane].ends:
                entry = self.newest[lane]
                entry.ends = True
                entry.item = {**entry.item, "truncated": np.bool_(True)}

    def clear(self) -> None:
        self.entries, self.newest = [], {}

    @property
    def there(self) -> list[Entry]:
        return self.entries[-self.capacity :]

    @property
    def overwrote(self) -> bool:
        return len(self.entries) > self.capacity

    @property
    def depth(self) -> int:
        return DEPTH if "stacks" in self.layout else 1

    def readable(self, entry: Entry) -> bool:
        """Whether all frames of its stacks are there, or were kept since the episode began."""
        there = set(self.there)
        for _ in range(self.depth - 1):
            if entry.begins:
                return True
            assert entry.previous is not None
            entry = entry.previous
            if entry not in there:
                return False
        return True

    def window(self, entry: Entry, count: int, *, within_episode: bool) -> list[Entry]:
        """It and what follows it in its lane, up to so many."""
        steps = [entry]
        while len(steps) < count and steps[-1].following is not None and not (within_episode and steps[-1].ends):
            steps.append(steps[-1].following)
        return steps

    def windows(self, count: int, at_end: str) -> dict[int, list[Entry]]:
        """By its first number each window that can be drawn, the last step repeated where there are fewer."""
        found = {}
        for entry in self.there:
            steps = self.window(entry, count, within_episode=at_end != "cross")
            if self.readable(entry) and (at_end == "pad" or len(steps) == count):
                found[entry.number] = steps
        return found

    def returns(self, entry: Entry, count: int, discount: float) -> tuple[dict[str, Any], float]:
        """The item that stands for so many steps, and what the value after it counts."""
        steps = self.window(entry, count, within_episode=True)
        last = steps[-1].item
        reward = sum(float(step.item["reward"]) * discount**age for age, step in enumerate(steps))
        merged = {**entry.item, "reward": np.float32(reward)}
        merged.update({name: last[name] for name in ("next_obs", "terminated", "truncated") if name in last})
        return merged, 0.0 if last["terminated"] else discount ** len(steps)


# Chances ----------------------------------------------------------------------------------------------------------


def assert_distributed(counts: ArrayLike, chances: ArrayLike | None = None) -> None:
    """Pearson's chi-square, by the cube-root law of Wilson and Hilferty no rarer than one in a million.

    Without chances all are the same. What has none was never drawn.
    """
    found = np.asarray(counts, np.float64)
    expected: NDArray[np.float64] = np.ones_like(found) if chances is None else np.asarray(chances, np.float64)
    assert found.shape == expected.shape
    assert not found[expected == 0].any()
    found, expected = found[expected > 0], expected[expected > 0]
    expected = expected * (found.sum() / expected.sum())
    assert expected.min() >= 5, "too few draws to tell"
    freedom = found.size - 1
    if freedom == 0:
        return
    statistic = float(((found - expected) ** 2 / expected).sum())
    deviation = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    # Too good a fit is as wrong as too bad a one; with a single degree of freedom there is no such thing.
    assert deviation < 4.9
    assert deviation > -4.9 or freedom < 5
