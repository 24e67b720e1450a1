"""An interrupt at any line of a write: it is there as a whole or not at all, and what else is there is right."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import numpy as np
import pytest

from anystore import ArraySpec
from anystore.convert import to_numpy
from anystore.replay import Prioritized, Recorder, ReplayBuffer, transition_spec

CAPACITY = 24
WRITERS = "/anystore/replay/", "/anystore/storage.py"
FEED = ("/anystore/replay/feed.py",)
FLAG = ArraySpec((), "bool")
FRAMES = 3


class Program:
    """Items of one lane or more, in order, each of which knows its number and what it follows."""

    def __init__(self, lanes: int, stacks: bool) -> None:
        self.lanes = lanes
        self.stacks = stacks
        self.items: list[dict[str, Any]] = []
        self.lane_of: list[int] = []
        self.going_on: dict[int, Any] = {}
        self.seen = 0

    def observation(self, before: Any = None) -> Any:
        """A new one, and with stacks the frames before it."""
        self.seen += 1
        if not self.stacks:
            return np.int64(self.seen)
        return np.append(before[1:], self.seen) if before is not None else np.full(FRAMES, self.seen)

    def batch(self, lanes: list[int], steps: int, end_at: int | None = None, anew: bool = False) -> dict[str, Any]:
        """Some steps of these lanes; with `end_at` all of their episodes end there, with `anew` they begin anew."""
        items = []
        for step in range(steps):
            for lane in lanes:
                fresh = lane not in self.going_on or (anew and step == 0)
                obs = self.observation() if fresh else self.going_on[lane]
                following, ends = self.observation(obs), step == end_at
                items.append({"obs": obs, "next_obs": following, "terminated": ends})
                self.going_on[lane] = following
                if ends:
                    del self.going_on[lane]
        return {name: np.stack([item[name] for item in items]) for name in items[0]}

    def note(self, batch: dict[str, Any], lanes: list[int]) -> None:
        for number in range(len(batch["terminated"])):
            self.items.append({name: leaf[number] for name, leaf in batch.items()})
            self.lane_of.append(lanes[number % len(lanes)])


def interrupt(action: Callable[[], object], at: int | None, where: tuple[str, ...] = WRITERS) -> int:
    """Run an action as far as line number `at` of those in some files, where Ctrl-C comes; how many it went through."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        if not any(path in frame.f_code.co_filename for path in where):
            return None
        if event == "line":
            count += 1
            if count - 1 == at:
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        action()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    return count


def spec_of(stacks: bool) -> dict[str, Any]:
    obs = ArraySpec((FRAMES,) if stacks else (), "int64")
    return {"obs": obs, "next_obs": obs, "terminated": FLAG}


KINDS = {
    "plain": {},
    "shared": {"shared": {"next_obs": "obs"}},
    "stacks": {"shared": {"next_obs": "obs"}, "stacks": {"obs": 0}},
}


def filled(kind: str, lanes: int, in_step: bool) -> tuple[ReplayBuffer, Program]:
    """A buffer that has overwritten items, and what was added to it."""
    stacks = kind == "stacks"
    program = Program(lanes, stacks)
    buffer = ReplayBuffer(spec_of(stacks), CAPACITY, lanes=lanes, sampler=Prioritized(), seed=0, **KINDS[kind])
    everyone = list(range(lanes))
    for end_at in (None, 2, None, 1, None):
        add(buffer, program, everyone, program.batch(everyone, 8 // lanes, end_at))
    if not in_step:
        add(buffer, program, [1], program.batch([1], 3))
        add(buffer, program, everyone, program.batch(everyone, 2))
    return buffer, program


def add(buffer: ReplayBuffer, program: Program, lanes: list[int], batch: dict[str, Any]) -> None:
    buffer.extend(batch, lanes=None if len(lanes) == program.lanes else lanes)
    program.note(batch, lanes)


def assert_right(buffer: ReplayBuffer, program: Program) -> None:
    """Every item is as it was added, and every window one of the lane's successive items."""
    assert buffer.total_added == len(program.items)
    for sample in passes(buffer):
        for number, *leaves in zip(*map(to_numpy, (sample.rows, *sample.items.values())), strict=True):
            for name, leaf in zip(sample.items, leaves, strict=True):
                np.testing.assert_array_equal(leaf, program.items[number][name], err_msg=f"{name} of item {number}")
    for sample in passes(buffer, num_steps=2):
        for first, terminated in zip(to_numpy(sample.rows).tolist(), to_numpy(sample.items["terminated"]).tolist()):
            later = range(first + 1, len(program.items))
            second = next(number for number in later if program.lane_of[number] == program.lane_of[first])
            assert terminated[1] == program.items[second]["terminated"]
            found = to_numpy(sample.items["obs"])[to_numpy(sample.rows).tolist().index(first), 1]
            np.testing.assert_array_equal(found, program.items[second]["obs"])


def passes(buffer: ReplayBuffer, **how: Any) -> Iterator[Any]:
    if len(buffer) > 2 * buffer.lanes + (FRAMES - 1) * buffer.lanes:
        yield from buffer.one_pass(CAPACITY, **how)


def interrupted(make: Callable[[], Any], act: Callable[..., Any]) -> Iterator[Any]:
    """What `make` gives, once for each line of what `act` does with it, which was interrupted there."""
    first = make()
    lines = interrupt(lambda: act(*first), None)
    assert lines > 10
    for at in range(lines):
        made = make()
        interrupt(lambda made=made: act(*made), at)
        yield made


@pytest.mark.parametrize("write", ["a step", "some steps", "an end among them", "episodes anew", "one lane"])
@pytest.mark.parametrize(("lanes", "in_step"), [(1, True), (2, True), (2, False)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_write(kind: str, lanes: int, in_step: bool, write: str) -> None:
    of_lanes = [1] if write == "one lane" and lanes == 2 else list(range(lanes))
    how = {
        "a step": {"steps": 1},
        "some steps": {"steps": 3},
        "an end among them": {"steps": 3, "end_at": 1},
        "episodes anew": {"steps": 3, "anew": True},
        "one lane": {"steps": 2},
    }[write]

    def make() -> Any:
        buffer, program = filled(kind, lanes, in_step)
        return buffer, program, program.batch(of_lanes, **how)

    def act(buffer: ReplayBuffer, _: Program, batch: dict[str, Any]) -> None:
        if lanes == 1 and how["steps"] == 1:
            buffer.add({name: leaf[0] for name, leaf in batch.items()})
        else:
            buffer.extend(batch, lanes=None if len(of_lanes) == lanes else of_lanes)

    outcomes = set()
    for line, (buffer, program, batch) in enumerate(interrupted(make, act)):
        count, before = len(batch["terminated"]), len(program.items)
        outcomes.add(buffer.total_added - before)
        assert CAPACITY - count <= len(buffer) <= CAPACITY
        if buffer.total_added > before:
            program.note(batch, of_lanes)
        assert_right(buffer, program)
        if buffer.total_added == before and line % 2:
            act(buffer, program, batch)
            program.note(batch, of_lanes)
        else:  # what comes next is of another lane
            add(buffer, program, [0], program.batch([0], 2))
        assert_right(buffer, program)
        for end_at in (None, 1, None):
            add(buffer, program, list(range(lanes)), program.batch(list(range(lanes)), 3, end_at))
            assert_right(buffer, program)
    assert outcomes == {0, count}


@pytest.mark.parametrize(("lanes", "in_step"), [(1, True), (2, False)])
@pytest.mark.parametrize("kind", ["shared", "stacks"])
def test_the_end_of_an_episode(kind: str, lanes: int, in_step: bool) -> None:
    for buffer, program in interrupted(lambda: filled(kind, lanes, in_step), lambda buffer, _: buffer.end_episode()):
        assert_right(buffer, program)
        for end_at in (None, 1, None):
            add(buffer, program, list(range(lanes)), program.batch(list(range(lanes)), 3, end_at))
            assert_right(buffer, program)


def test_the_growth_of_what_is_kept_of_episodes() -> None:
    """Episodes of one item, each of which takes a record of its own; more than there are."""

    def make() -> Any:
        buffer, program = filled("shared", 1, in_step=True)
        records = buffer._layout._records
        return buffer, program, [program.batch([0], 1, 0) for _ in range(records + 1)]

    def act(buffer: ReplayBuffer, _: Program, batches: list[dict[str, Any]]) -> None:
        buffer.extend({name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]})

    for buffer, program, batches in interrupted(make, act):
        for batch in batches if buffer.total_added > len(program.items) else []:
            program.note(batch, [0])
        for _ in range(2):
            for batch in [program.batch([0], 1, 0) for _ in range(buffer._layout._records // 2)]:
                add(buffer, program, [0], batch)
            assert_right(buffer, program)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [2, CAPACITY, CAPACITY + 4])
def test_nothing_is_left(kind: str, count: int) -> None:
    """Of a buffer that was empty, or whose rows were all to be overwritten; errors are those of the write."""

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    buffer, program = filled(kind, 2, in_step=False)
    batch = program.batch([0, 1], count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(buffer._lanes), "added", fail)
        with pytest.raises(MemoryError):
            buffer.extend(batch)
    assert_right(buffer, program)
    for _ in range(10):
        add(buffer, program, [0, 1], program.batch([0, 1], 2))
        assert_right(buffer, program)


@pytest.mark.parametrize("kind", KINDS)
def test_no_memory(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For what is kept of lanes that are out of step."""

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    buffer, program = filled(kind, 2, in_step=True)
    batch = program.batch([1], 2)
    with monkeypatch.context() as patch:
        patch.setattr("anystore.replay.lanes.Storage", fail)
        with pytest.raises(MemoryError):
            buffer.extend(batch, lanes=1)
    assert_right(buffer, program)
    add(buffer, program, [1], batch)
    assert_right(buffer, program)


@pytest.mark.parametrize("prefetch", [1, 2])
def test_batches_go_on_after_any_number_of_interrupts(prefetch: int) -> None:
    """Each of them costs no more than the batch that was asked for, and leaves no thread behind."""
    buffer = ReplayBuffer(ArraySpec((), "int64"), 10, seed=0)
    buffer.extend(np.arange(10))
    before = set(threading.enumerate())
    with buffer.batches(2, prefetch=prefetch) as batches:
        lines = interrupt(lambda: next(batches), None, FEED)
        for at in range(lines):
            for _ in range(3):
                interrupt(lambda: next(batches), at, FEED)
        assert next(batches).items.shape == (2,)
        assert len(set(threading.enumerate()) - before) == 1
    for at in range(interrupt(lambda: next(buffer.batches(2, prefetch=prefetch)), None, FEED)):
        with buffer.batches(2, prefetch=prefetch) as batches:
            interrupt(lambda batches=batches: next(batches), at, FEED)
            assert next(batches).items.shape == (2,)
        assert set(threading.enumerate()) == before


def test_a_step_of_a_recorder() -> None:
    """It is added as a whole or not at all, and what comes next is to be a reset."""
    spaces = pytest.importorskip("gymnasium.spaces")

    class Env:
        observation_space, action_space = spaces.Box(0, 100, (), np.float32), spaces.Discrete(2)

    def begun() -> Recorder:
        recorder = Recorder(ReplayBuffer(transition_spec(Env()), 10, seed=0), Env(), autoreset="disabled")
        recorder.reset(np.float32(0), {})
        return recorder

    def step(recorder: Recorder, to: int) -> None:
        recorder.step(1, np.float32(to), 1.0, False, False, {})

    refused = 0
    for at in range(interrupt(lambda: step(begun(), 1), None)):
        recorder = begun()
        interrupt(lambda recorder=recorder: step(recorder, 1), at)
        try:
            step(recorder, 2)
        except ValueError:  # there is nothing to step from
            refused += 1
            recorder.reset(np.float32(1), {})
            step(recorder, 2)
        (items,) = (sample.items for sample in recorder.buffer.one_pass(10))
        found = sorted(zip(items["obs"].tolist(), items["next_obs"].tolist()))
        assert found in ([(0, 1), (1, 2)], [(1, 2)], [(0, 2)])
        if (0, 2) in found:  # the first step was given up before it was begun
            assert len(found) == 1
    assert refused > 10
