"""Whatever is done to a replay buffer, it holds, and draws, what a plain list of items would."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from anystore.convert import to_numpy
from anystore.replay import Prioritized, Recent, ReplayBuffer, Sample, Sampler, Uniform
from tests.items import assert_same, host
from tests.on_backends import (
    OnACupyStandIn,
    OnCupy,
    OnJax,
    OnJaxAsOnADevice,
    OnNumpy,
    OnPlainNumpy,
    OnStrict,
    OnStrictWithout64Bits,
    OnTorch,
    OnTorchAsOnADevice,
    OnTorchCuda,
)
from tests.transitions import DEPTH, LAYOUTS, Entry, ListOfItems, Walk, part, spec_of, together

ENDS = [None, None, None, None, "terminated", "truncated", "both"]
DISCOUNT = 0.875
ALPHA = 0.5
LARGEST_TOTALS = [0, 0, 2**31 - 7, 2**33 + 5]
"""What the ring may have counted before: running numbers outgrow what a library counts in."""


class Wild(Sampler):
    """Draws places that are there and others that are not."""

    def draw(self, count: int, items: range) -> Any:
        return self.random.integers(3 * len(items), count) - len(items)


SAMPLERS = {
    "uniform": Uniform,
    "without replacement": lambda: Uniform(replacement=False),
    "recent": lambda: Recent(3),
    "prioritized": lambda: Prioritized(alpha=ALPHA, beta=0.5),
    "wild": Wild,
}


class ReplayModel(RuleBasedStateMachine):
    """A replay buffer beside a list."""

    options: dict[str, Any]
    precision = 1e-6
    compiles = False
    """Whether the library compiles for each size anew, so that there should be few."""

    @initialize(
        capacity=st.integers(1, 10),
        lanes=st.integers(1, 3),
        layout=st.sampled_from(list(LAYOUTS)),
        sampler=st.sampled_from(list(SAMPLERS)),
        total=st.sampled_from(LARGEST_TOTALS),
        periods=st.sampled_from([None, 2, 5]),
    )
    def build(self, capacity: int, lanes: int, layout: str, sampler: str, total: int, periods: int | None) -> None:
        self.batch_size = 1 if self.compiles else 64
        capacity, lanes = (4, 2) if self.compiles else (capacity, min(lanes, capacity))
        total -= total % lanes
        if "stacks" in layout:  # as many of the oldest may have lost frames
            capacity += (DEPTH - 1) * lanes
        self.buffer = ReplayBuffer(
            spec_of(layout),
            capacity,
            lanes=lanes,
            sampler=SAMPLERS[sampler](),
            seed=1,
            **LAYOUTS[layout],
            **self.options,
        )
        self.buffer._ring.total = self.buffer._ring._cleared = total
        if periods is not None:
            self.buffer._ring.period = periods * capacity
        self.model = ListOfItems(capacity, layout, total)
        self.walks = [Walk(1000 * lane) for lane in range(lanes)]
        self.layout, self.lanes, self.sampler = layout, lanes, sampler
        self.drawn: list[tuple[int, Any, list[Entry]]] = []
        """Samples as they were drawn: when, the rows, the items."""

    # Writing --------------------------------------------------------------------------------------------------------

    def steps(self, lanes: list[int], ends: list[str | None]) -> list[tuple[int, dict[str, Any]]]:
        """A step of these lanes, with a lane for each item."""
        return [(lane, self.walks[lane].step(end)) for lane, end in zip(lanes, ends, strict=True)]

    def note(self, added: list[tuple[int, dict[str, Any]]]) -> None:
        for lane, item in added:
            self.model.add(part(item, self.layout), lane)

    def ends(self, data: st.DataObject, count: int) -> list[str | None]:
        return data.draw(st.lists(st.sampled_from(ENDS), min_size=count, max_size=count))

    @rule(data=st.data(), steps=st.one_of(st.integers(0, 4), st.integers(0, 25)))
    def extend(self, data: st.DataObject, steps: int) -> None:
        steps = min(steps, 4) // 2 * 2 if self.compiles else steps
        ends = self.ends(data, steps * self.lanes)
        added = []
        for start in range(0, len(ends), self.lanes):
            added += self.steps(list(range(self.lanes)), ends[start : start + self.lanes])
        items = [item for _, item in added] or [Walk().step()]
        self.buffer.extend(head(part(together(items), self.layout), len(added)))
        self.note(added)

    @rule(data=st.data())
    def add(self, data: st.DataObject) -> None:
        added = self.steps(list(range(self.lanes)), self.ends(data, self.lanes))
        items = [part(item, self.layout) for _, item in added]
        self.buffer.add(together(items) if self.lanes > 1 else items[0])
        self.note(added)

    @rule(
        data=st.data(),
        steps=st.one_of(st.just(1), st.integers(1, 25)),
        named_by=st.sampled_from(["list", "array", "mask", "int"]),
    )
    def extend_some_lanes(self, data: st.DataObject, steps: int, named_by: str) -> None:
        lanes = data.draw(st.lists(st.sampled_from(range(self.lanes)), min_size=1, unique=True))
        lanes = sorted(lanes) if named_by == "mask" else lanes[:1] if named_by == "int" else lanes
        added = []
        for _ in range(1 if self.compiles else steps):
            added += self.steps(lanes, self.ends(data, len(lanes)))
        named: Any = lanes if named_by == "list" else np.array(lanes, np.int32)
        if named_by == "mask":
            named = np.isin(np.arange(self.lanes), lanes)
        elif named_by == "int":
            (named,) = lanes
        self.buffer.extend(part(together([item for _, item in added]), self.layout), lanes=named)
        self.note(added)

    @rule(data=st.data(), repeat=st.booleans())
    def reset_without_a_flag(self, data: st.DataObject, repeat: bool) -> None:
        self.walks[data.draw(st.sampled_from(range(self.lanes)))].reset(repeat=repeat)

    @rule(data=st.data(), goes_on=st.booleans())
    def end_episode(self, data: st.DataObject, goes_on: bool) -> None:
        lanes = data.draw(st.lists(st.sampled_from(range(self.lanes)), unique=True) | st.none())
        self.buffer.end_episode(lanes)
        lanes = list(range(self.lanes)) if lanes is None else lanes
        self.model.end(lanes)
        for lane in lanes:
            if not goes_on:
                self.walks[lane].reset()

    @precondition(lambda self: self.model.there)
    @rule()
    def clear(self) -> None:
        self.buffer.clear()
        self.model.clear()

    @rule(data=st.data(), steps=st.integers(1, 12), wrong=st.sampled_from(["shape", "dtype", "lanes", "missing"]))
    def a_write_that_is_refused(self, data: st.DataObject, steps: int, wrong: str) -> None:
        batch = part(together([Walk().step() for _ in range(steps * self.lanes)]), self.layout)
        lanes = None
        if wrong == "shape":
            batch["truncated"] = np.zeros((steps * self.lanes, 2), bool)
        elif wrong == "dtype":
            batch["reward"] = batch["reward"] * 1j
        elif wrong == "lanes":
            lanes = [self.lanes] * steps * self.lanes
        else:
            del batch["action"]
        with pytest.raises((ValueError, TypeError)):
            self.buffer.extend(batch, lanes=lanes)

    # Sampling -------------------------------------------------------------------------------------------------------

    @property
    def certain(self) -> list[Entry]:
        """Those that are drawn for sure: of the oldest some may be left out where stacks have lost frames."""
        left_out = (self.model.depth - 1) * self.lanes if self.model.overwrote else 0
        return self.model.there[left_out:]

    @contextlib.contextmanager
    def refused_only_where_nothing_is_certain(self, of_use: Collection[int] | None = None) -> Iterator[None]:
        """Drawing may be refused only where no item is certain, or none of those that are of use."""
        certain = {entry.number for entry in self.certain}
        certain &= certain if of_use is None else set(of_use)
        try:
            yield
        except ValueError as error:
            assert "can be drawn" in str(error)  # noqa: PT017  # it need not be refused
            assert not certain

    def entries_of(self, rows: Any) -> list[Entry]:
        """The items with these running numbers."""
        period = self.buffer._ring.period
        by_row = {entry.number % period: entry for entry in self.model.there}
        return [by_row[row] for row in to_numpy(rows).tolist()]

    def check_items(self, sample: Sample, windows: list[list[Entry]]) -> None:
        expected = [together([step.item for step in steps]) for steps in windows]
        assert_same(sample.items, together(expected))

    def check_singles(self, sample: Sample) -> list[Entry]:
        entries = self.entries_of(sample.rows)
        assert all(map(self.model.readable, entries))
        assert_same(sample.items, together([entry.item for entry in entries]))
        return entries

    @precondition(lambda self: hasattr(self, "buffer"))
    @invariant()
    def counts(self) -> None:
        assert (self.buffer.size, len(self.buffer)) == (len(self.model.there),) * 2
        assert self.buffer.total_added == self.model.total

    @precondition(lambda self: self.model.there)
    @rule()
    def one_pass(self) -> None:
        found = []
        with self.refused_only_where_nothing_is_certain():
            for sample in self.buffer.one_pass(self.batch_size):
                assert sample.weights is None
                found += self.check_singles(sample)
        assert len(found) == len(set(found))
        assert {entry for entry in self.certain if self.model.readable(entry)} <= set(found)

    @precondition(lambda self: self.model.there)
    @rule(count=st.integers(1, 4), at_end=st.sampled_from(["cross", "pad", "whole"]))
    def one_pass_of_windows(self, count: int, at_end: str) -> None:
        windows = self.model.windows(count, at_end)
        certain = {entry.number for entry in self.certain} & windows.keys()
        found: list[int] = []
        with self.refused_only_where_nothing_is_certain(windows):
            for sample in self.buffer.one_pass(self.batch_size, num_steps=count, at_end=at_end):
                found += self.check_windows(sample, windows, count, at_end)
        assert len(found) == len(set(found))
        assert certain <= set(found) <= windows.keys()

    def check_windows(self, sample: Sample, windows: dict[int, list[Entry]], count: int, at_end: str) -> list[int]:
        entries = self.entries_of(sample.rows)
        chosen = [windows[entry.number] for entry in entries]
        self.check_items(sample, [steps + steps[-1:] * (count - len(steps)) for steps in chosen])
        if at_end == "pad":
            mask = [[step < len(steps) for step in range(count)] for steps in chosen]
            assert to_numpy(sample.mask).tolist() == mask
        else:
            assert sample.mask is None
        return [entry.number for entry in entries]

    @precondition(lambda self: self.model.there and self.sampler != "without replacement")
    @rule(count=st.integers(1, 4), at_end=st.sampled_from(["cross", "pad", "whole"]))
    def sample_windows(self, count: int, at_end: str) -> None:
        windows = self.model.windows(count, at_end)
        # Which are the newest three of those that are looked at is not known here.
        of_use = [] if self.sampler == "recent" else windows
        with self.refused_only_where_nothing_is_certain(of_use):
            self.check_windows(self.buffer.sample(3, num_steps=count, at_end=at_end), windows, count, at_end)

    @precondition(lambda self: self.model.there and self.layout != "stacks")
    @rule(count=st.integers(1, 5))
    def one_pass_of_returns(self, count: int) -> None:
        with self.refused_only_where_nothing_is_certain():
            for sample in self.buffer.one_pass(self.batch_size, n_step=count, discount=DISCOUNT):
                entries = self.entries_of(sample.rows)
                expected = [self.model.returns(entry, count, DISCOUNT) for entry in entries]
                items, discounts = zip(*expected, strict=True)
                assert_same(sample.items, together(list(items)))
                assert to_numpy(sample.discounts).tolist() == list(discounts)

    @precondition(lambda self: self.model.there)
    @rule(count=st.integers(1, 12))
    def sample(self, count: int) -> None:
        count = min(count, 2) if self.compiles else count
        certain = [entry for entry in self.certain if self.model.readable(entry)]
        distinct = self.sampler == "without replacement"
        try:
            sample = self.buffer.sample(count)
        except ValueError as error:
            text = str(error)
            assert "can be drawn" in text or "without replacement" in text  # it need not be refused
            assert len(certain) < (count if distinct else 1)
            return
        entries = self.check_singles(sample)
        assert len(entries) == count
        assert not distinct or len(set(entries)) == count
        if self.sampler == "recent" and "stacks" not in self.layout:
            assert set(entries) <= set(self.model.there[-3:])
        if self.sampler == "prioritized":
            chances = np.array([(entry.priority + 1e-6) ** ALPHA for entry in entries])
            expected = (chances / chances.min()) ** -0.5
            np.testing.assert_allclose(to_numpy(sample.weights), expected, rtol=100 * self.precision)
        else:
            assert sample.weights is None
        self.drawn.append((self.model.total, sample.rows, entries))

    # Priorities -----------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.drawn and self.sampler == "prioritized")
    @rule(data=st.data())
    def update_priorities(self, data: st.DataObject) -> None:
        when, rows, entries = data.draw(st.sampled_from(self.drawn))
        if self.model.total - when > self.buffer._ring.period - self.buffer.capacity:
            return  # numbers have come round
        choices = st.sampled_from([0.0, 0.25, 1.0, 2.0, 9.0, 1000.0])
        priorities = data.draw(st.lists(choices, min_size=len(entries), max_size=len(entries)))
        there = set(self.model.there)
        assert self.buffer.update_priorities(rows, priorities) == sum(entry in there for entry in entries)
        for entry, priority in zip(entries, priorities, strict=True):
            if entry in there:
                entry.priority = priority
                self.model.highest = max(self.model.highest, priority)

    @precondition(lambda self: hasattr(self, "buffer") and self.sampler == "prioritized" and self.model.there)
    @invariant()
    def priorities(self) -> None:
        expected = [entry.priority for entry in self.model.there]
        found = to_numpy(self.buffer.priorities)
        np.testing.assert_allclose(found, expected, rtol=100 * self.precision, atol=2e-6)


def head(batch: Any, count: int) -> Any:
    """The first items of a batch."""
    return {name: head(leaf, count) if isinstance(leaf, dict) else leaf[:count] for name, leaf in host(batch).items()}


class ModelContract:
    """Subclassed per backend."""

    options: dict[str, Any]
    floating: str
    max_examples = 40
    steps = 25
    compiles = False

    def test_holds_what_a_list_would_hold(self) -> None:
        class Machine(ReplayModel):
            options = self.options
            compiles = self.compiles
            precision = 1e-6 if self.floating == "float64" else 1e-5

        run_state_machine_as_test(
            Machine,
            settings=settings(
                max_examples=self.max_examples,
                stateful_step_count=self.steps,
                deadline=None,
                derandomize=True,
                suppress_health_check=list(HealthCheck),
            ),
        )


class TestNumpy(OnNumpy, ModelContract):
    max_examples = 150


class TestPlainNumpy(OnPlainNumpy, ModelContract):
    pass


class TestTorch(OnTorch, ModelContract):
    pass


class TestTorchAsOnADevice(OnTorchAsOnADevice, ModelContract):
    pass


class TestJax(OnJax, ModelContract):
    max_examples, steps = 15, 20
    compiles = True


class TestJaxAsOnADevice(OnJaxAsOnADevice, ModelContract):
    max_examples, steps = 5, 15
    compiles = True


class TestStrict(OnStrict, ModelContract):
    max_examples = 30


class TestStrictWithout64Bits(OnStrictWithout64Bits, ModelContract):
    max_examples = 20


class TestCupyOnAStandIn(OnACupyStandIn, ModelContract):
    max_examples = 20


@pytest.mark.gpu
class TestCupy(OnCupy, ModelContract):
    pass


@pytest.mark.gpu
class TestTorchCuda(OnTorchCuda, ModelContract):
    pass


def test_the_list_itself() -> None:
    """What the reference says of a case that is worked out by hand."""
    model = ListOfItems(6, "shared stacks")
    walk = Walk()
    for item in [*walk.episode(3, "terminated"), *walk.episode(2, None), *walk.episode(4, "truncated")]:
        model.add(item)
    assert [entry.number for entry in model.there] == [3, 4, 5, 6, 7, 8]
    assert [entry.begins for entry in model.there] == [True, False, True, False, False, False]
    assert [entry.ends for entry in model.there] == [False, True, False, False, False, True]
    assert sorted(model.windows(2, "cross")) == [3, 4, 5, 6, 7]
    assert sorted(model.windows(2, "whole")) == [3, 5, 6, 7]
    assert [entry.number for entry in model.windows(3, "pad")[7]] == [7, 8]
    merged, discount = model.returns(model.there[2], 3, 0.5)
    rewards = [float(entry.item["reward"]) for entry in model.there[2:5]]
    assert merged["reward"] == rewards[0] + rewards[1] / 2 + rewards[2] / 4
    assert discount == 0.125
    model.add(walk.step())
    assert [model.readable(entry) for entry in model.there] == [False, True, True, True, True, True]
    assert model.depth == DEPTH
