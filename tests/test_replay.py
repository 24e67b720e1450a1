"""The contract of ReplayBuffer: ring, lanes, stamps, bad input and the peers' known faults, on every backend."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from anystore import ArraySpec, Storage, select_backend
from anystore.convert import to_numpy
from anystore.replay import Prioritized, Recent, ReplayBuffer, Sample, Uniform
from tests.contract import LIBRARIES, foreign_arrays
from tests.items import SPEC, assert_same, batch, given_out_by, host, leaves
from tests.on_backends import (
    OnACupyStandIn,
    OnCupy,
    OnDisk,
    OnJax,
    OnJaxAsOnADevice,
    OnJaxCuda,
    OnNumpy,
    OnPlainNumpy,
    OnStrict,
    OnStrictWithout64Bits,
    OnTorch,
    OnTorchAsOnADevice,
    OnTorchCuda,
)
from tests.transitions import LAYOUTS, ListOfItems, Walk, part, spec_of, together

CAPACITY = 10
FLAG, NUMBER = ArraySpec((), "bool"), ArraySpec((), "float32")
STEPS = {"x": ArraySpec((), "int32"), "reward": NUMBER, "terminated": FLAG, "truncated": FLAG}
"""Of small transitions, whose `x` is their number."""


def steps(first: int, last: int, *, terminated: Any = (), truncated: Any = ()) -> dict[str, Any]:
    """The small transitions of these numbers; some of them are the last of their episode."""
    numbers = np.arange(first, last)
    return {
        "x": numbers.astype(np.int32),
        "reward": (numbers % 7).astype(np.float32),
        "terminated": np.isin(numbers, terminated),
        "truncated": np.isin(numbers, truncated),
    }


def stamps_of(items: Any) -> list[Any]:
    """The stamps of items of SPEC, which are whole."""
    stamps = to_numpy(items["action"][0])
    assert_same(items, batch(stamps))
    return stamps.tolist()  # type: ignore[no-any-return]


def one_pass(buffer: ReplayBuffer, **how: Any) -> Iterator[Sample]:
    """In small batches, all of one size for a library that compiles for each."""
    return buffer.one_pass(1 if buffer.backend.name == "jax" else 4, **how)


def all_of(buffer: ReplayBuffer) -> list[int]:
    """The stamps of all items, oldest first."""
    if not len(buffer):
        return []
    found = {}
    for sample in one_pass(buffer):
        found.update(zip(to_numpy(sample.rows).tolist(), stamps_of(sample.items), strict=True))
    return [found[row] for row in sorted(found)]


WRONG_BATCHES: dict[str, tuple[Any, type[Exception], str]] = {
    "a leaf of another shape": (
        lambda value: value["obs"].update(image=np.zeros((7, 2, 3), np.uint8)),
        ValueError,
        "obs/image: expected shape",
    ),
    "a leaf that is shorter": (
        lambda value: value["obs"].update(image=np.zeros((6, 3, 2), np.uint8)),
        ValueError,
        "obs/image: expected (shape|7 items, as .* has, found 6)",
    ),
    "a leaf of another dtype": (
        lambda value: value["action"].__setitem__(0, np.zeros(7)),
        TypeError,
        "action/0: expected int32, found float64",
    ),
    "a number that is too large in the second half": (
        lambda value: value["action"].__setitem__(0, [1, 2, 3, 4, 5, 6, 2**40]),
        OverflowError,
        "action/0: expected integers that fit int32",
    ),
    "numbers that are none in the second half": (
        lambda value: value["action"].__setitem__(0, [1, 2, 3, 4, 5, 6, "7"]),
        TypeError,
        "action/0: expected",
    ),
    "a missing leaf": (lambda value: value["obs"].pop("pose"), ValueError, r"obs: missing \['pose'\]"),
    "a leaf too much": (lambda value: value.update(more=np.zeros(7)), ValueError, r"unexpected \['more'\]"),
    "something else": (lambda value: value["obs"].update(pose=3), ValueError, "obs/pose: expected a Pose, found a int"),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test of layouts, or of numbers of lanes, runs for each that its class is about."""
    for name in ("layout", "count_of_lanes"):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, getattr(metafunc.cls, f"every_{name}"))


class ReplayContract:
    """Subclassed per backend."""

    options: dict[str, Any]
    backend: str
    floating: str
    integer: str
    every_layout: tuple[str, ...] = tuple(LAYOUTS)
    every_count_of_lanes: tuple[int, ...] = (1, 2)

    def make(self, capacity: int = CAPACITY, spec: Any = SPEC, **options: Any) -> ReplayBuffer:
        return ReplayBuffer(spec, capacity, **{"seed": 0, **self.options, **options})

    def filled(self, count: int, capacity: int = CAPACITY, **options: Any) -> ReplayBuffer:
        """With the items of the stamps up to `count`."""
        buffer = self.make(capacity, **options)
        buffer.extend(batch(np.arange(count)))
        return buffer

    def stepped(self, count: int, capacity: int = CAPACITY, **options: Any) -> ReplayBuffer:
        """With so many small transitions; `terminated` and `truncated` tell which end episodes."""
        ends = {name: options.pop(name, ()) for name in ("terminated", "truncated")}
        buffer = self.make(capacity, STEPS, **options)
        buffer.extend(steps(0, count, **ends))
        return buffer

    # The ring -------------------------------------------------------------------------------------------------------

    def test_is_empty_at_first(self) -> None:
        buffer = self.make()
        assert (len(buffer), buffer.size, buffer.total_added, buffer.capacity, buffer.lanes) == (0, 0, 0, 10, 1)
        assert buffer.backend is select_backend(**self.options)
        assert buffer.device == self.options["device"]
        assert repr(buffer).startswith(f"ReplayBuffer(0 of 10 items, 0 added, on {buffer.device}, Uniform)\nStorage(")
        assert buffer.nbytes == buffer.storage.nbytes
        assert buffer.data_spec == SPEC

    def test_like_takes_the_spec_of_an_item(self) -> None:
        buffer = ReplayBuffer.like(batch(3), CAPACITY, sampler=Recent(4), lanes=2, **self.options)
        assert (buffer.data_spec, buffer.capacity, buffer.lanes, buffer.size) == (SPEC, CAPACITY, 2, 0)
        assert buffer.backend is select_backend(**self.options)
        buffer.extend(batch(np.arange(4)))
        assert stamps_of(buffer.storage.get([0, 1, 2, 3])) == [0, 1, 2, 3]

    @pytest.mark.parametrize("counts", [(3, 4), (10,), (7, 7, 7), (3, 24), (0, 4, 0), (10, 10)], ids=str)
    def test_holds_the_newest(self, counts: tuple[int, ...]) -> None:
        buffer, total = self.make(), 0
        for count in counts:
            buffer.extend(batch(np.arange(total, total + count)))
            total += count
            assert (len(buffer), buffer.total_added) == (min(total, CAPACITY), total)
            there = range(max(0, total - CAPACITY), total)
            assert all_of(buffer) == list(there)
            rows = to_numpy(buffer.storage.get(...)["action"][0]).tolist()
            assert [rows[stamp % CAPACITY] for stamp in there] == list(there)

    def test_one_by_one(self) -> None:
        buffer = self.make(4)
        for stamp in range(10):
            buffer.add(batch(stamp))
            assert all_of(buffer) == list(range(max(0, stamp - 3), stamp + 1))

    def test_a_capacity_of_one(self) -> None:
        buffer = self.make(1, sampler=Prioritized())
        for stamp in range(3):
            buffer.add(batch(stamp))
            sample = buffer.sample(4)
            assert stamps_of(sample.items) == [stamp] * 4
            assert buffer.update_priorities(sample.rows, [1.0, 2.0, 3.0, 4.0]) == 4
            assert to_numpy(buffer.priorities).tolist() == pytest.approx([4.0], rel=1e-5)
        buffer.extend(batch(np.arange(3, 9)))
        assert all_of(buffer) == [8]

    @pytest.mark.parametrize(("before", "count"), [(0, 4), (7, 3), (7, 4), (7, 10), (0, 10), (3, 24)])
    def test_a_contiguous_write_is_two_slices_at_most(
        self, monkeypatch: pytest.MonkeyPatch, before: int, count: int
    ) -> None:
        buffer = self.filled(before)
        written: list[Any] = []
        backend = type(buffer.backend)
        original, as_is = backend.scatter, backend.scatter_as_is

        def scatter(self: Any, buffers: Any, rows: Any, leaves: Any) -> None:
            written.append(rows)
            original(self, buffers, rows, leaves)

        def scatter_as_is(self: Any, buffers: Any, rows: Any, leaves: Any) -> bool:
            done = as_is(self, buffers, rows, leaves)
            if done:
                written.append(rows)
            return done

        monkeypatch.setattr(backend, "scatter", scatter)
        monkeypatch.setattr(backend, "scatter_as_is", scatter_as_is)
        buffer.extend(batch(np.arange(before, before + count)))
        assert all(isinstance(rows, range) and rows.step == 1 for rows in written)
        unique = list(dict.fromkeys(written))  # a backend's scatter_as_is may call its own scatter
        assert len(unique) <= 2
        assert sum(map(len, unique)) == min(count, CAPACITY)
        monkeypatch.undo()
        total = before + count
        assert [row for rows in unique for row in rows] == [
            n % CAPACITY for n in range(max(before, total - CAPACITY), total)
        ]

    def test_clear(self) -> None:
        buffer = self.filled(13, sampler=Prioritized())
        rows = buffer.sample(4).rows
        buffer.clear()
        assert (len(buffer), buffer.total_added) == (0, 13)
        with pytest.raises(ValueError, match="^the buffer is empty; add items before sampling$"):
            buffer.sample(1)
        assert buffer.update_priorities(rows, np.ones(4)) == 0
        buffer.extend(batch(np.arange(20, 24)))
        assert all_of(buffer) == [20, 21, 22, 23]
        assert set(stamps_of(buffer.sample(64).items)) == {20, 21, 22, 23}
        assert buffer.update_priorities(rows, np.ones(4)) == 0
        buffer.clear()
        buffer.clear()
        assert len(buffer) == 0

    def test_an_item_for_all_rows_of_a_batch(self) -> None:
        """A leaf of the shape of one item is taken as `Storage.set` takes it, also where the ring closes."""
        for before, count in ((0, 4), (7, 4), (3, 24)):
            buffer = self.filled(before)
            value = batch(np.full(count, 77))
            value["obs"]["image"] = value["obs"]["image"][0]
            value["action"][0] = 77
            buffer.extend(value)
            assert all_of(buffer)[-min(count, CAPACITY) :] == [77] * min(count, CAPACITY)

    @pytest.mark.parametrize("library", LIBRARIES)
    def test_takes_values_of_any_library(self, library: str) -> None:
        buffer = self.make(4, STEPS)
        for first, last in ((0, 3), (3, 6)):
            value = steps(first, last)
            buffer.extend({name: foreign_arrays(library, leaf) for name, leaf in value.items()})
        assert to_numpy(buffer.storage.get(...)["x"]).tolist() == [4, 5, 2, 3]

    def test_takes_values_of_its_own_library(self) -> None:
        buffer = self.filled(6)
        sample = next(buffer.one_pass(6))
        buffer.extend(sample.items)
        assert sorted(all_of(buffer)) == sorted([2, 3, 4, 5, *range(6)])
        assert all_of(buffer)[4:] == stamps_of(sample.items)

    def test_keeps_no_hold_of_what_is_added(self) -> None:
        buffer = self.make(4)
        for value in (batch(np.arange(3)), batch(np.arange(3, 6))):
            buffer.extend(value)
            for leaf in leaves(value):
                leaf[...] = 0
        assert all_of(buffer) == [2, 3, 4, 5]

    def test_an_item_that_is_a_single_leaf(self) -> None:
        buffer = self.make(4, ArraySpec((2,), "float32"), sampler=Prioritized())
        buffer.extend([[1, 2], [3, 4]])
        buffer.add([5, 6])
        found = {tuple(row) for sample in one_pass(buffer) for row in to_numpy(sample.items).tolist()}
        assert found == {(1, 2), (3, 4), (5, 6)}

    # What is refused changes nothing --------------------------------------------------------------------------------

    @pytest.mark.parametrize("name", WRONG_BATCHES)
    @pytest.mark.parametrize("before", [0, 6, 17], ids=["from row 0", "across the head", "full, across the head"])
    def test_a_refused_write_changes_nothing(self, name: str, before: int) -> None:
        spoil, error, text = WRONG_BATCHES[name]
        buffer, twin = (self.filled(before, sampler=Prioritized()) for _ in range(2))
        if before:
            for each in (buffer, twin):
                each.update_priorities([before - 1, before - 2], [5.0, 0.5])
        value = batch(np.arange(100, 107))
        spoil(value)
        with pytest.raises(error, match=text):
            buffer.extend(value)
        self.assert_twins(buffer, twin)

    def assert_twins(self, buffer: ReplayBuffer, twin: ReplayBuffer) -> None:
        """Both hold the same, and go on in the same way."""
        assert_same(buffer.storage.get(...), host(twin.storage.get(...)))
        for each in (buffer, twin):
            each.extend(batch(np.arange(200, 200 + 2 * buffer.lanes)))
        assert (len(buffer), buffer.total_added) == (len(twin), twin.total_added)
        if isinstance(buffer.sampler, Prioritized):
            assert to_numpy(buffer.priorities).tolist() == to_numpy(twin.priorities).tolist()
        one, other = buffer.sample(4), twin.sample(4)
        assert to_numpy(one.rows).tolist() == to_numpy(other.rows).tolist()
        assert_same(one.items, host(other.items))

    @pytest.mark.parametrize("before", [0, 12])
    def test_a_refused_item_changes_nothing(self, before: int) -> None:
        buffer, twin = self.filled(before), self.filled(before)
        for name, (spoil, error, text) in WRONG_BATCHES.items():
            value = batch(100)
            spoil(value)
            if "half" not in name and "dtype" not in name:
                with pytest.raises(error, match=text):
                    buffer.add(value)
        value = batch(100)
        value["action"][0] = np.float64(3)
        with pytest.raises(TypeError, match="action/0: expected int32, found float64"):
            buffer.add(value)
        with pytest.raises(ValueError, match="expected shape"):
            buffer.add(batch([100]))
        self.assert_twins(buffer, twin)

    @pytest.mark.parametrize("lanes", [2, 3])
    def test_a_write_to_wrong_lanes_changes_nothing(self, lanes: int) -> None:
        buffer, twin = (self.filled(12, lanes=lanes, sampler=Prioritized()) for _ in range(2))
        refused = {
            r"expected items of \d lanes in turn, a multiple of \d items, found 7": (7, None),
            r"expected lanes from 0 to \d, each of them once, found \[0, 0\]": (2, [0, 0]),
            r"expected lanes from 0 to \d, each of them once, found \[-1\]": (1, [-1]),
            rf"expected lanes from 0 to \d, each of them once, found \[{lanes}\]": (1, lanes),
            "expected items of these 2 lanes in turn, a multiple of 2, found 1": (1, np.arange(lanes) < 2),
            "expected items of these 2 lanes in turn, a multiple of 2, found 3": (3, [1, 0]),
            "expected the lanes of 1 items, found none named": (1, []),
            "expected lanes, a flat sequence of integers or a mask of .*, found float64": (1, [1.0]),
            "expected lanes, a flat sequence of integers or a mask of .*, found bool": (1, [True] * (lanes + 1)),
            r"expected lanes, a flat sequence of .*, found int64 of shape \(1, 1\)": (1, np.array([[1]])),
            "expected lanes, a flat sequence of integers or a mask of .*, found <U1": (1, ["1"]),
        }
        for text, (count, named) in refused.items():
            with pytest.raises(ValueError, match=text):
                buffer.extend(batch(np.arange(100, 100 + count)), lanes=named)
        with pytest.raises(ValueError, match=rf"expected an item of each of {lanes} lanes, found 1 items"):
            buffer.add(batch([100]))
        with pytest.raises(ValueError, match="expected a batch, .* a single item; .* name its lane: extend"):
            buffer.extend(batch(100))
        self.assert_twins(buffer, twin)

    def test_a_batch_of_nothing_is_checked_too(self) -> None:
        buffer, twin = self.filled(5), self.filled(5)
        value = batch(np.arange(0))
        value["obs"]["image"] = np.zeros((3, 3, 2), np.uint8)
        with pytest.raises(ValueError, match="obs/image: expected 0 items, as action/0 has, found 3"):
            buffer.extend(value)
        value["obs"]["image"] = np.zeros((0, 3, 2), complex)
        with pytest.raises(TypeError, match="obs/image: expected uint8, found complex128"):
            buffer.extend(value)
        buffer.extend(batch(np.arange(0)))
        self.assert_twins(buffer, twin)

    # Lanes ----------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("count", [3, 12, 30], ids=["not full", "full", "longer than the capacity"])
    def test_windows_never_mix_lanes_in_step(self, count: int) -> None:
        buffer = self.filled(0, 11, lanes=3)
        buffer.extend(batch(np.arange(count)))
        buffer.add(batch(np.arange(count, count + 3)))
        found = []
        for sample in one_pass(buffer, num_steps=2):
            for first, second in stamps_of(sample.items):
                assert second == first + 3
                found.append(first)
        oldest = max(0, count + 3 - 11)
        assert sorted(found) == list(range(oldest, count))

    @pytest.mark.parametrize("named_by", ["list", "array", "mask"])
    def test_windows_never_mix_lanes_out_of_step(self, named_by: str) -> None:
        """Stamps are of their lane: 1000 of the first, 2000 and on of the second, ..."""
        buffer, counts = self.make(10, lanes=3), [1000, 2000, 3000]
        for lanes in ([0, 1, 2], [0, 1, 2], [1], [0, 2], [2], [2], [0, 1, 2], [1], [1], [0], [0, 1, 2]):
            stamps = []
            for lane in lanes:
                stamps.append(counts[lane])
                counts[lane] += 1
            named: Any = {"list": lanes, "array": np.array(lanes, np.uint8), "mask": np.isin(np.arange(3), lanes)}[
                named_by
            ]
            buffer.extend(batch(stamps), lanes=None if len(lanes) == 3 else named)
        there = all_of(buffer)
        assert len(there) == 10
        windows = {}
        for sample in one_pass(buffer, num_steps=3):
            for window in stamps_of(sample.items):
                assert window == [window[0], window[0] + 1, window[0] + 2]
                windows[window[0]] = window
        assert set(windows) == {stamp for stamp in there if stamp + 2 in there}

    def test_lanes_in_any_order(self) -> None:
        buffer = self.make(10, lanes=2)
        buffer.extend(batch([10, 20]), lanes=[0, 1])
        buffer.extend(batch([21, 11]), lanes=[1, 0])
        buffer.extend(batch([12, 22]))
        buffer.extend(batch([]), lanes=[])
        buffer.extend(batch([]), lanes=[False, False])
        found = sorted(window for sample in one_pass(buffer, num_steps=3) for window in stamps_of(sample.items))
        assert found == [[10, 11, 12], [20, 21, 22]]

    def test_a_step_that_overwrites_what_it_goes_on_from(self) -> None:
        """Item 4 takes the row of item 1, which item 3 of the same step follows; nobody else follows anybody then."""
        buffer = self.make(3, lanes=2)
        for stamps, lanes in (([0], [0]), ([1], [1]), ([2], [0]), ([3, 4], [1, 0]), ([5], [1]), ([6], [1])):
            buffer.extend(batch(stamps), lanes=lanes)
        found = [window for sample in one_pass(buffer, num_steps=2) for window in stamps_of(sample.items)]
        assert found == [[5, 6]]

    def test_a_single_lane_by_name(self) -> None:
        buffer = self.make(4)
        for stamp in range(6):
            buffer.extend(batch([stamp]), lanes=[0])
        assert all_of(buffer) == [2, 3, 4, 5]
        found = sorted(window for sample in one_pass(buffer, num_steps=2) for window in stamps_of(sample.items))
        assert found == [[2, 3], [3, 4], [4, 5]]

    def test_what_is_kept_out_of_step_is_gone_once_cleared(self) -> None:
        buffer = self.make(12, lanes=2)
        buffer.extend(batch([0]), lanes=[1])
        assert buffer.nbytes == buffer.storage.nbytes + 12 * 8
        held = [weakref.ref(each) for each in vars(buffer._lanes).values() if isinstance(each, Storage)]
        assert held
        buffer.clear()
        gc.collect()
        assert not any(each() for each in held)
        assert buffer.nbytes == buffer.storage.nbytes

    def test_back_in_step_once_cleared(self) -> None:
        buffer = self.make(10, lanes=2)
        buffer.extend(batch([10]), lanes=[0])
        buffer.extend(batch([11]), lanes=[0])
        buffer.clear()
        buffer.extend(batch([20, 30, 21, 31]))
        found = sorted(window for sample in one_pass(buffer, num_steps=2) for window in stamps_of(sample.items))
        assert found == [[20, 21], [30, 31]]
        buffer.extend(batch([32]), lanes=[1])
        found = sorted(window for sample in one_pass(buffer, num_steps=2) for window in stamps_of(sample.items))
        assert found == [[20, 21], [30, 31], [31, 32]]

    # Stamps ---------------------------------------------------------------------------------------------------------

    def test_rows_are_running_numbers(self) -> None:
        buffer = self.filled(27)
        sample = buffer.sample(4)
        assert to_numpy(sample.rows).dtype == self.integer
        assert to_numpy(sample.rows).tolist() == stamps_of(sample.items)

    def test_of_several_priorities_for_an_item_the_last_stays(self) -> None:
        buffer = self.filled(14, sampler=Prioritized())
        assert buffer.update_priorities([5, 9, 5, 9, 5], [1.0, 2.0, 3.0, 4.0, 0.5]) == 5
        found = dict(zip(range(4, 14), to_numpy(buffer.priorities).tolist(), strict=True))
        expected = {**dict.fromkeys(range(4, 14), 1.0), 5: 0.5, 9: 4.0}
        assert found == pytest.approx(expected, rel=1e-4)

    def test_new_items_have_the_highest_priority_that_there_was(self) -> None:
        buffer = self.filled(4, sampler=Prioritized())
        buffer.update_priorities([0, 1], [0.25, 7.0])
        buffer.extend(batch(np.arange(4, 6)))
        buffer.update_priorities([1], [0.5])
        buffer.add(batch(6))
        assert to_numpy(buffer.priorities).tolist() == pytest.approx([0.25, 0.5, 1, 1, 7, 7, 7], rel=1e-4)
        assert buffer.sampler.highest == 7

    @pytest.mark.parametrize("library", LIBRARIES)
    def test_rows_and_priorities_of_any_library(self, library: str) -> None:
        buffer = self.filled(4, sampler=Prioritized())
        rows = foreign_arrays(library, np.array([2, 0]))
        assert buffer.update_priorities(rows, foreign_arrays(library, np.array([3, 5], np.float32))) == 2
        assert to_numpy(buffer.priorities).tolist() == pytest.approx([5, 1, 3, 1], rel=1e-4)

    def test_an_update_of_nothing(self) -> None:
        buffer = self.filled(4, sampler=Prioritized())
        assert buffer.update_priorities(np.zeros(0, np.int64), []) == 0
        assert to_numpy(buffer.priorities).tolist() == pytest.approx([1] * 4, rel=1e-4)

    @pytest.mark.parametrize("total", [2**31 - 6, 2**31 + 4, 2**32 - 3, 2**45 + 1])
    def test_numbers_that_outgrow_what_the_library_counts_in(self, total: int) -> None:
        buffer = self.make(sampler=Prioritized(), lanes=2)
        buffer._ring.total = buffer._ring._cleared = total
        for first in (0, 6, 12):
            buffer.extend(batch(np.arange(first, first + 6)))
            old = buffer.sample(6)
            assert buffer.update_priorities(old.rows, 2 + to_numpy(old.items["action"][0])) == 6
            assert (to_numpy(old.rows) >= 0).all()
        assert all_of_any_order(buffer) == list(range(8, 18))
        newest = dict(zip(range(8, 18), to_numpy(buffer.priorities).tolist(), strict=True))
        for stamp in stamps_of(old.items):
            assert newest[stamp] == pytest.approx(2 + stamp, rel=1e-4)
        buffer.extend(batch(np.arange(18, 24)))
        sampled = set(stamps_of(old.items))
        there = sum(stamp >= 14 for stamp in stamps_of(old.items))
        assert buffer.update_priorities(old.rows, np.full(6, 0.5)) == there
        newest = dict(zip(range(14, 24), to_numpy(buffer.priorities).tolist(), strict=True))
        for stamp, priority in newest.items():
            assert (priority == pytest.approx(0.5, rel=1e-4)) == (stamp in sampled)
        windows = [window for sample in one_pass(buffer, num_steps=2) for window in stamps_of(sample.items)]
        assert sorted(windows) == [[stamp, stamp + 2] for stamp in range(14, 22)]

    @pytest.mark.parametrize(
        "how", [{}, {"shared": {"next_obs": "obs"}, "stacks": {"obs": 0}}], ids=["plain", "shared"]
    )
    def test_its_memory_is_given_back_at_once(self, how: dict[str, Any]) -> None:
        spec = {key: ArraySpec((4, 2), "uint8") for key in ("obs", "next_obs")}
        buffer = ReplayBuffer(spec, 10, **how, **self.options)
        buffer.extend({key: np.zeros((5, 4, 2), np.uint8) for key in spec})
        buffer.sample(3)
        storage = weakref.ref(buffer.storage)
        gc.disable()
        try:
            del buffer
            assert storage() is None
        finally:
            gc.enable()

    def test_a_mistake_in_the_options_of_batches_is_found_at_once(self) -> None:
        buffer = self.make(4)
        with pytest.raises(TypeError, match="unexpected keyword argument 'nstep'"):
            buffer.batches(2, nstep=3)
        with pytest.raises(ValueError, match="expected batch_size to be an int of 1 or more, found -1"):
            buffer.batches(-1)

    def test_priorities_without_any_are_refused_whatever_is_there(self) -> None:
        buffer = self.make(4)
        for rows in ([], [0]):
            with pytest.raises(TypeError, match="a Uniform sampler has no priorities to update; use Prioritized"):
                buffer.update_priorities(np.asarray(rows, np.int64), np.ones(len(rows)))

    def test_numbers_that_come_round(self) -> None:
        """With a period as short as it can be: rows of twice as many items."""
        buffer = self.make(4, sampler=Prioritized())
        buffer._ring.period = 8
        for stamp in range(27):
            buffer.add(batch(stamp))
            rows = np.arange(max(0, stamp - 3), stamp + 1) % 8
            found = sorted(row for sample in one_pass(buffer) for row in to_numpy(sample.rows).tolist())
            assert found == sorted(rows.tolist())
            gone = np.arange(stamp - 7, stamp - 3) % 8  # or those that are still to come
            assert buffer.update_priorities(gone, np.full(4, 9.0)) == 0
            if stamp >= 3:
                assert buffer.update_priorities(rows, rows + 1.0) == 4
                assert to_numpy(buffer.priorities).tolist() == pytest.approx((rows + 1.0).tolist(), rel=1e-4)

    # Samples --------------------------------------------------------------------------------------------------------

    def test_samples_are_of_the_library_on_the_device(self) -> None:
        buffer = self.stepped(10, sampler=Prioritized())
        for how in ({}, {"num_steps": 2, "at_end": "pad"}, {"n_step": 2}):
            sample = buffer.sample(4, **how)
            arrays = [sample.weights, sample.mask, sample.discounts, sample.rows, *leaves(sample.items)]
            for array in arrays:
                assert array is None or select_backend(array) is given_out_by(buffer.backend)
        assert to_numpy(buffer.sample(4).weights).dtype == np.float32
        assert to_numpy(buffer.sample(4, n_step=2).discounts).dtype == np.float32
        assert to_numpy(buffer.sample(4, num_steps=2, at_end="pad").mask).dtype == bool
        assert select_backend(buffer.priorities) is given_out_by(buffer.backend)

    def test_samples_share_no_memory_with_the_buffer(self, layout: str) -> None:
        buffers = []
        for _ in range(2):
            buffer = self.make(10, spec_of(layout), sampler=Prioritized(), **LAYOUTS[layout])
            walk = Walk()
            buffer.extend(part(together([*walk.episode(5, "terminated"), *walk.episode(9, None)]), layout))
            buffers.append(buffer)
        buffer, twin = buffers
        hows = ({}, {"num_steps": 2}, {"num_steps": 3, "at_end": "pad"}, {"n_step": 2})
        for how in hows:
            sample, _ = buffer.sample(4, **how), twin.sample(4, **how)
            arrays = [*leaves(sample.items), sample.rows, sample.weights, sample.mask, sample.discounts]
            for array in arrays:
                if array is not None:
                    with buffer.backend.stream():
                        array[...] = buffer.backend.xp.zeros_like(array)
        for how in hows:
            one, other = buffer.sample(4, **how), twin.sample(4, **how)
            assert_same(one.items, host(other.items))
            assert to_numpy(one.rows).tolist() == to_numpy(other.rows).tolist()

    def test_a_sample_stays_as_it_was_drawn(self) -> None:
        buffer = self.filled(10)
        sample = buffer.sample(4)
        before = host(sample.items)
        before = copy.deepcopy(before)
        buffer.extend(batch(np.arange(100, 110)))
        buffer.clear()
        assert_same(sample.items, before)

    @pytest.mark.parametrize(
        "sampler", [Uniform, Prioritized, lambda: Recent(5), lambda: Uniform(replacement=False)], ids=range(4)
    )
    def test_the_same_seed_gives_the_same_draws(self, sampler: Any) -> None:
        def draws(seed: int) -> list[Any]:
            buffer = self.stepped(14, sampler=sampler(), seed=seed, terminated=[8])
            hows: list[Any] = [{}, {"num_steps": 2}, {"num_steps": 2, "at_end": "whole"}, {"n_step": 2}]
            found = [to_numpy(buffer.sample(4, **how).rows).tolist() for how in hows * 2]
            return [*found, *(to_numpy(sample.rows).tolist() for sample in one_pass(buffer))]

        first = draws(3)
        assert draws(3) == first
        assert draws(4) != first
        assert first[:4] != first[4:8]

    # One pass -------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("batch_size", [1, 4, 10, 64])
    def test_one_pass_has_every_item_once(self, batch_size: int) -> None:
        buffer = self.filled(17, sampler=Prioritized())
        samples = list(buffer.one_pass(batch_size))
        sizes = [len(to_numpy(sample.rows)) for sample in samples]
        assert sizes[:-1] == [batch_size] * (len(sizes) - 1)
        assert 0 < sizes[-1] <= batch_size
        found = [stamp for sample in samples for stamp in stamps_of(sample.items)]
        assert sorted(found) == list(range(7, 17))
        assert all(sample.weights is None for sample in samples)

    def test_one_pass_leaves_out_what_is_gone_meanwhile(self) -> None:
        buffer = self.filled(10)
        found = []
        for sample in buffer.one_pass(2):
            found += stamps_of(sample.items)
            if len(found) == 4:
                buffer.extend(batch(np.arange(100, 105)))
        assert len(found) == len(set(found))
        assert set(range(5, 10)) <= set(found) <= set(range(10))
        passing = buffer.one_pass(2)
        next(passing)
        buffer.clear()
        assert list(passing) == []
        buffer.extend(batch(np.arange(3)))
        assert list(passing) == []

    # Bad input ------------------------------------------------------------------------------------------------------

    def test_sampling_an_empty_buffer(self) -> None:
        for sampler in (Uniform(), Uniform(replacement=False), Recent(3), Prioritized()):
            buffer = self.make(sampler=sampler)
            for draw in (buffer.sample, buffer.one_pass):
                with pytest.raises(ValueError, match="^the buffer is empty; add items before sampling$"):
                    draw(1)
            buffer.extend(batch(np.arange(0)))
            with pytest.raises(ValueError, match="^the buffer is empty"):
                buffer.sample(1)

    def test_a_batch_larger_than_what_is_there(self) -> None:
        buffer = self.filled(3, sampler=Uniform(replacement=False))
        with pytest.raises(ValueError, match="^expected at most 3 draws without replacement, found 4$"):
            buffer.sample(4)
        assert sorted(stamps_of(buffer.sample(3).items)) == [0, 1, 2]
        buffer = self.stepped(6, terminated=[3], sampler=Uniform(replacement=False))
        with pytest.raises(ValueError, match="^expected at most 4 draws without replacement, found 5$"):
            buffer.sample(5, num_steps=2, at_end="whole")
        assert sorted(to_numpy(buffer.sample(4, num_steps=2, at_end="whole").rows).tolist()) == [0, 1, 2, 4]
        buffer = self.filled(6, sampler=Recent(3, replacement=False))
        with pytest.raises(ValueError, match="^expected at most 3 draws without replacement, found 4$"):
            buffer.sample(4)
        assert sorted(stamps_of(buffer.sample(3).items)) == [3, 4, 5]

    def test_a_window_larger_than_what_is_there(self) -> None:
        buffer = self.stepped(6, lanes=2, terminated=[2, 3], sampler=Uniform(replacement=False))
        for draw in (buffer.sample, buffer.one_pass):
            with pytest.raises(
                ValueError,
                match=r"^6 items of 2 lane\(s\) hold no window of 4 steps that can be drawn; ask for fewer steps, or",
            ):
                draw(4, num_steps=4)
        with pytest.raises(ValueError, match="^of 2 candidates none can be drawn, for want of a chance or of such a w"):
            buffer.sample(4, num_steps=3, at_end="whole")
        with pytest.raises(ValueError, match="^of 2 candidates none can be drawn, for want of such a window; ask"):
            one_pass(buffer, num_steps=3, at_end="whole")
        assert to_numpy(buffer.sample(5, num_steps=9, at_end="pad").mask).shape == (5, 9)

    @pytest.mark.parametrize("count", [0, -1, 1.5, True, None, "3"])
    def test_no_count(self, count: Any) -> None:
        buffer = self.stepped(6)
        with pytest.raises(ValueError, match="^expected batch_size to be an int of 1 or more, found "):
            buffer.sample(count)
        with pytest.raises(ValueError, match="^expected batch_size to be an int of 1 or more, found "):
            buffer.one_pass(count)
        if count is not None:
            with pytest.raises(ValueError, match="^expected num_steps to be an int of 1 or more, found "):
                buffer.sample(2, num_steps=count)
            with pytest.raises(ValueError, match="^expected n_step to be an int of 1 or more, found "):
                buffer.sample(2, n_step=count)
        assert to_numpy(buffer.sample(np.int64(3), num_steps=np.uint8(2)).rows).shape == (3,)

    def test_options_that_do_not_go_together(self) -> None:
        buffer = self.stepped(6)
        with pytest.raises(
            ValueError, match="^expected num_steps for windows or n_step for n-step returns, found both$"
        ):
            buffer.sample(2, num_steps=2, n_step=2)
        with pytest.raises(ValueError, match='^expected at_end to be "cross", "pad" or "whole", found \'wrap\'$'):
            buffer.sample(2, num_steps=2, at_end="wrap")  # type: ignore[arg-type]
        for draw in (buffer.sample, buffer.one_pass, buffer.batches(2, discount=0.9).__next__):
            with pytest.raises(ValueError, match="^discount=0.9 is for n-step returns; give n_step= as well$"):
                draw(**({} if draw.__name__ == "__next__" else {"batch_size": 2, "discount": 0.9}))  # type: ignore[operator]

    @pytest.mark.parametrize("discount", [float("nan"), float("inf"), -0.5, "0.9", [0.5]], ids=str)
    def test_a_discount_that_is_none(self, discount: Any) -> None:
        buffer = self.stepped(6)
        with pytest.raises(ValueError, match="^expected a finite discount of 0 or more, found "):
            buffer.sample(4, n_step=2, discount=discount)

    def test_what_the_spec_has_no_leaf_for(self) -> None:
        buffer = self.filled(6)
        for at_end in ("pad", "whole"):
            with pytest.raises(
                ValueError, match=f'^at_end="{at_end}" needs to know where episodes end; give the spec bool'
            ):
                buffer.sample(2, num_steps=2, at_end=at_end)
        with pytest.raises(ValueError, match="^n-step returns need a reward; name its leaf: ReplayBuffer"):
            buffer.sample(2, n_step=2)
        with pytest.raises(
            ValueError, match='^no leaf says that an episode was broken off; give the spec a bool leaf "tru'
        ):
            buffer.end_episode()
        buffer = self.make(spec={"reward": NUMBER, "truncated": FLAG})
        buffer.extend({"reward": np.ones(3, np.float32), "truncated": np.zeros(3, bool)})
        with pytest.raises(ValueError, match='^n-step returns need a bool leaf "terminated"; name it: ReplayBuffer'):
            buffer.sample(2, n_step=2)
        buffer = self.make(spec={"reward": NUMBER, "terminated": NUMBER})
        buffer.extend({"reward": np.ones(3, np.float32), "terminated": np.zeros(3, np.float32)})
        with pytest.raises(
            ValueError, match="^terminated: n-step returns need a leaf of bools, found one of float32; "
        ):
            buffer.sample(2, n_step=2)

    def test_a_flag_that_is_not_of_bools_is_not_passed_over(self) -> None:
        for name, other in (("terminated", "truncated"), ("truncated", "terminated")):
            spec = {"reward": NUMBER, other: FLAG, name: ArraySpec((), "uint8")}
            buffer = self.make(spec=spec)
            buffer.extend({"reward": np.ones(3, np.float32), other: np.zeros(3, bool), name: np.zeros(3, np.uint8)})
            for how in ({"n_step": 2}, {"num_steps": 2, "at_end": "pad"}, {"num_steps": 2, "at_end": "whole"}):
                with pytest.raises(ValueError, match=f"^{name}: .* need a leaf of bools, found one of uint8; make it"):
                    buffer.sample(2, **how)
            assert buffer.sample(2, num_steps=2).items["reward"].shape == (2, 2)

    @pytest.mark.parametrize("name", ["next_observations", "obs_next", "Next/obs"])
    def test_what_comes_after_by_another_name_is_not_passed_over(self, name: str) -> None:
        spec = {"obs": NUMBER, name: NUMBER, "reward": NUMBER, "terminated": FLAG}
        items = {key: np.zeros(4, bool if key == "terminated" else np.float32) for key in spec}
        items[name] = np.arange(4, dtype=np.float32)
        buffer = self.make(spec=spec)
        buffer.extend(items)
        with pytest.raises(ValueError, match=rf"^{name}: n-step returns need .* following=\['{name}'\]\), or followi"):
            buffer.sample(2, n_step=2)
        for following, steps in (([name], 1), ([], 0)):
            buffer = self.make(spec=spec, following=following)
            buffer.extend(items)
            (sample,) = buffer.one_pass(4, n_step=2)
            expected = np.minimum(to_numpy(sample.rows) + steps, 3)
            np.testing.assert_array_equal(to_numpy(sample.items[name]), expected)

    @pytest.mark.parametrize(
        ("wrong", "text"),
        [
            ([1.0, -0.5], r"^expected finite priorities of 0 or more, .* found -0.5 \(1 of 2\)$"),
            ([np.nan, 1.0], r"^expected finite priorities of 0 or more, .* found nan \(1 of 2\)$"),
            ([np.inf, np.nan], r"^expected finite priorities of 0 or more, .* found inf \(2 of 2\)$"),
            ([-np.inf, 1.0], r"^expected finite priorities of 0 or more, .* found -inf \(1 of 2\)$"),
            ([1.0], r"^expected 2 priorities, one for each row, found an array of shape \(1,\)$"),
            ([[1.0, 2.0]], r"^expected 2 priorities, one for each row, found an array of shape \(1, 2\)$"),
            (1.0, r"^expected 2 priorities, one for each row, found an array of shape \(\)$"),
        ],
        ids=str,
    )
    def test_priorities_that_are_none(self, wrong: Any, text: str) -> None:
        buffer, twin = (self.filled(12, sampler=Prioritized()) for _ in range(2))
        for rows in ([3, 4], [0, 1]):
            for priorities in (wrong, np.array(wrong), buffer.backend.from_numpy(np.array(wrong, np.float32))):
                with pytest.raises(ValueError, match=text):
                    buffer.update_priorities(rows, priorities)
        assert buffer.sampler.highest == 1
        self.assert_twins(buffer, twin)

    def test_no_rows_at_all(self) -> None:
        buffer, twin = (self.filled(12, sampler=Prioritized()) for _ in range(2))
        for rows in ([], (), np.empty(0, np.int64)):
            assert buffer.update_priorities(rows, []) == 0
        self.assert_twins(buffer, twin)

    @pytest.mark.parametrize("at_end", ["pad", "whole"])
    def test_the_ends_of_what_is_no_window(self, at_end: Any) -> None:
        buffer = self.stepped(6)
        remedies = {None: "give num_steps= as well", 2: "n-step returns end with the episode without it"}
        for n_step, remedy in remedies.items():
            for draw in (buffer.sample, buffer.one_pass):
                with pytest.raises(ValueError, match=f'^at_end="{at_end}" is for windows; {remedy}$'):
                    draw(2, at_end=at_end, n_step=n_step)

    def test_a_refused_sample_changes_nothing(self) -> None:
        buffer, twin = self.filled(12), self.filled(12)
        for draw in (buffer.sample, buffer.one_pass):
            with pytest.raises(ValueError, match="^n-step returns need a reward; name its leaf"):
                draw(4, n_step=2)
        assert buffer._counts().total_sampled == 0
        self.assert_twins(buffer, twin)

    def test_a_list_that_is_no_array(self) -> None:
        buffer = self.stepped(6)
        value = {**steps(6, 8), "x": [[1, 2], [3]]}
        with pytest.raises(TypeError, match="^x: expected an array or numbers for ArraySpec"):
            buffer.extend(value)
        assert len(buffer) == 6

    def test_priorities_can_be_given_back(self) -> None:
        buffer = self.filled(8, sampler=Prioritized())
        buffer.update_priorities(np.arange(8), np.zeros(8))
        found = to_numpy(buffer.priorities)
        assert (found >= 0).all()
        assert buffer.update_priorities(np.arange(8), found) == 8

    def test_leaves_of_several_lengths(self) -> None:
        buffer = self.make(10, STEPS)
        batch = steps(0, 4)
        batch["reward"] = batch["reward"][:3]
        with pytest.raises(ValueError, match="^reward: expected 4 items, as terminated has, found 3$"):
            buffer.extend(batch)
        assert len(buffer) == 0

    def test_leaves_of_two_lengths(self) -> None:
        buffer = ReplayBuffer({"a": ArraySpec((), "int32"), "b": ArraySpec((2,), "int32")}, 9, **self.options)
        with pytest.raises(ValueError, match="^b: expected 4 items, as a has, found 5$"):
            buffer.extend({"a": np.zeros(4, np.int32), "b": np.zeros((5, 2), np.int32)})
        assert len(buffer) == 0

    def test_a_batch_for_add_and_an_item_for_extend(self) -> None:
        spec = {"a": ArraySpec((), "int32"), "b": ArraySpec((2,), "int32")}
        buffer = ReplayBuffer(spec, 9, **self.options)
        several, one = ({"a": np.zeros(n, np.int32), "b": np.zeros((*n, 2), np.int32)} for n in [(4,), ()])
        hint = "this looks like a batch, which extend takes$"
        for value in (several, {"a": [0] * 4, "b": [[0, 0]] * 4}):
            with pytest.raises(ValueError, match=rf"^a: expected shape \(\), found \(4,\); {hint}"):
                buffer.add(value)
        for value in ({**several, "b": one["b"]}, {**several, "a": np.zeros(3, np.int32)}, {"a": several["a"]}):
            with pytest.raises(
                ValueError, match=r"^(a: expected shape \(\), found \([34],\)|the item: missing .*)$"
            ) as found:
                buffer.add(value)
            assert "extend" not in str(found.value)
        for value in (one, {"a": 0, "b": [0, 0]}):
            with pytest.raises(
                ValueError, match=r"found what looks like a single item, which add takes; for a batch, Rep"
            ):
                buffer.extend(value)
        with pytest.raises(ValueError, match=r"for steps and lanes together\), found a of shape \(1, 4\)$"):
            buffer.extend({"a": np.zeros((1, 4), np.int32), "b": np.zeros(2, np.int32)})
        for items_in_a_list in ([one, one], (one,)):
            with pytest.raises(
                ValueError, match="found a (list|tuple).*; this looks like a list of items: add them one"
            ):
                buffer.extend(items_in_a_list)
        with pytest.raises(ValueError, match=r"found a list[^;]*$"):
            buffer.extend([0, 1])
        single = ReplayBuffer(ArraySpec((), "int32"), 9, **self.options)
        with pytest.raises(ValueError, match=r"^[^;]*expected shape \(\), found \(1, 1\)$"):
            single.add(np.zeros((1, 1), np.int32))
        assert (len(buffer), len(single)) == (0, 0)

    @pytest.mark.parametrize("sampler", [Prioritized, "uniform", 3], ids=str)
    def test_what_is_no_sampler(self, sampler: Any) -> None:
        with pytest.raises(TypeError, match=r"^expected a sampler, such as Prioritized\(\), found "):
            self.make(sampler=sampler)

    def test_the_sampler_stays(self) -> None:
        buffer = self.make()
        with pytest.raises(AttributeError):
            buffer.sampler = Prioritized()  # type: ignore[misc]

    def test_what_follows_an_item_beside_what_is_shared(self) -> None:
        numbers = np.arange(20, dtype=np.int32)
        spec = {**STEPS, **dict.fromkeys(("next_obs", "mask", "next_mask", "next_hint"), ArraySpec((), "int32"))}
        batch = {**steps(0, 20, terminated=[9]), **dict.fromkeys(("next_obs", "next_mask", "next_hint"), numbers + 1)}
        for following, hints in (("next_obs", 1), (["next_obs", "next_hint"], 3)):
            buffer = self.make(20, spec, shared={"next_mask": "mask"}, following=following)
            buffer.extend({**batch, "mask": numbers})
            for sample in one_pass(buffer, n_step=3):
                row, after = to_numpy(sample.rows), to_numpy(sample.items["next_mask"])
                assert after.tolist() == [min(each + 3, 20 if each > 9 else 10) for each in row.tolist()]
                assert to_numpy(sample.items["next_obs"]).tolist() == after.tolist()
                expected = after if hints == 3 else row + 1
                assert to_numpy(sample.items["next_hint"]).tolist() == expected.tolist()
        with pytest.raises(ValueError, match="^'next_x' is not in the spec; there are "):
            self.make(20, spec, following=["next_obs", "next_x"])

    @pytest.mark.parametrize("rows", [[0.0, 1.0], [[0, 1]], 0, ["a", "b"], [True, False]], ids=str)
    def test_rows_that_are_none(self, rows: Any) -> None:
        buffer, twin = (self.filled(12, sampler=Prioritized()) for _ in range(2))
        with pytest.raises(TypeError, match="^expected rows as in Sample.rows, a flat array of integers, found "):
            buffer.update_priorities(rows, [1.0, 2.0])
        self.assert_twins(buffer, twin)

    def test_rows_that_never_were(self) -> None:
        buffer, twin = (self.filled(12, sampler=Prioritized()) for _ in range(2))
        assert buffer.update_priorities([12, 13, -1, -12, 2**31 - 1, -(2**31)], np.full(6, 7.0)) == 0
        self.assert_twins(buffer, twin)

    @pytest.mark.parametrize("alpha", [1.0, 2.0])
    def test_priorities_without_a_finite_sum(self, alpha: float) -> None:
        """Each finite to the power of alpha or not, but not all of them together."""
        buffer, twin = (self.filled(10, sampler=Prioritized(alpha=alpha)) for _ in range(2))
        largest = float(np.finfo(buffer.sampler.backend.float_dtype).max)
        for priority in (largest / 2, largest / 9):
            with pytest.raises(
                ValueError, match=f"^expected priorities whose sum, each to the power of alpha={alpha}, is finite"
            ):
                buffer.update_priorities([0, 1], [priority, 1.0])
        self.assert_twins(buffer, twin)

    def test_priorities_beyond_the_floats_of_the_library(self) -> None:
        buffer, twin = (self.filled(10, sampler=Prioritized(alpha=0.5)) for _ in range(2))
        largest = float(np.finfo(self.floating).max)
        with pytest.raises(ValueError, match="^expected finite priorities of 0 or more"):
            buffer.update_priorities([0, 1], [largest * 10, 1.0])
        self.assert_twins(buffer, twin)
        buffer.update_priorities([0, 1], [largest / 2, 1.0])
        assert np.isfinite(to_numpy(buffer.priorities)).all()

    def test_huge_priorities(self) -> None:
        largest = float(np.finfo(self.floating).max)
        buffer = self.filled(10, sampler=Prioritized(alpha=0.5))
        assert buffer.update_priorities([0, 1], [largest / 2, 0.0]) == 2
        sample = buffer.sample(64)
        assert set(to_numpy(sample.rows).tolist()) == {0}
        assert to_numpy(sample.weights).tolist() == [1] * 64
        assert buffer.update_priorities(np.arange(10), np.full(10, largest / 2)) == 10
        assert len(set(to_numpy(buffer.sample(64).rows).tolist())) == 10

    def test_a_sampler_without_priorities(self) -> None:
        buffer = self.filled(4)
        with pytest.raises(TypeError, match="^a Uniform sampler has no priorities to update; use Prioritized$"):
            buffer.update_priorities([0, 1], [1.0, 2.0])
        with pytest.raises(TypeError, match="^a Uniform sampler has no priorities; use Prioritized$"):
            _ = buffer.priorities

    def test_a_sampler_for_two_buffers(self) -> None:
        for sampler in (Uniform(), Recent(3), Prioritized()):
            first = self.filled(4, sampler=sampler)
            name = type(sampler).__name__
            with pytest.raises(
                ValueError, match=f"^this {name} has a buffer already; give each buffer and each load one of its own$"
            ):
                self.make(20, sampler=sampler)
            assert sorted(set(stamps_of(first.sample(64).items))) in ([0, 1, 2, 3], [1, 2, 3])

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"shared": {"x": "x"}}, "^x: expected another part to share it with, found itself$"),
            ({"lanes": 0}, "^expected lanes to be an int of 1 or more, found 0$"),
            ({"lanes": 11}, "^expected a capacity of 11 or more, a row for each lane, found 10$"),
            ({"lanes": 2.0}, "^expected lanes to be an int of 1 or more, found 2.0$"),
            ({"lanes": True}, "^expected lanes to be an int of 1 or more, found True$"),
            ({"reward": "rewards"}, "^'rewards' is not a leaf of the spec; there are reward, terminated, truncated, "),
            ({"terminated": "done"}, "^'done' is not a leaf of the spec; there are reward, terminated, truncated, x$"),
            (
                {"truncated": "x"},
                r"^x: expected a flag, ArraySpec\(\(\), 'bool'\), found ArraySpec\(\(\), 'int32'\); give ",
            ),
            (
                {"truncated": "terminated"},
                "^terminated: expected a leaf for terminated and another for truncated, found one$",
            ),
            ({"following": "next"}, "^'next' is not in the spec; there are reward, terminated, truncated, x$"),
            ({"shared": {"next_obs": "obs"}}, "^'obs' is not in the spec; there are reward, terminated, truncated, x$"),
            ({"shared": {"next_obs": "x"}}, "^next_obs: expected ArraySpec.*, that of x, .* found no such leaf"),
            ({"shared": {"reward": "x"}}, "^reward: expected ArraySpec.*, that of x, which it is shared with, found "),
            ({"stacks": {"y": 0}}, "^stacks: expected the path of a leaf that is stored, found 'y', no such leaf$"),
            ({"stacks": {"x": 0}}, r"^x: expected an axis of a stack of shape \(\), found 0$"),
            ({"seed": -1}, "^expected a seed of 0 or more, found -1$"),
            ({"casting": "any"}, "^expected a casting among"),
        ],
        ids=str,
    )
    def test_options_that_are_none(self, options: dict[str, Any], text: str) -> None:
        with pytest.raises(ValueError, match=text):
            self.make(spec=STEPS, **options)

    @pytest.mark.parametrize("capacity", [0, -3, 2.5, True, "7"])
    def test_a_capacity_that_is_none(self, capacity: Any) -> None:
        with pytest.raises((ValueError, TypeError), match="capacity"):
            self.make(capacity)

    def test_a_flag_of_the_wrong_shape(self) -> None:
        with pytest.raises(
            ValueError, match=r"^terminated: expected a flag, ArraySpec\(\(\), 'bool'\), found ArraySpec\(\(1,\)"
        ):
            self.make(spec={**STEPS, "terminated": ArraySpec((1,), "bool")})
        buffer, value = self.stepped(3), steps(3, 6)
        value["terminated"] = np.zeros((3, 1), bool)
        with pytest.raises(ValueError, match=r"^terminated: expected shape \(3,\), found \(3, 1\)$"):
            buffer.extend(value)
        value["terminated"] = np.zeros(3)
        with pytest.raises(TypeError, match="^terminated: expected bool, found float64"):
            buffer.extend(value)
        assert buffer.total_added == 3

    @pytest.mark.parametrize(
        ("lanes", "text"),
        [
            ([0, 0], r"^expected lanes from 0 to 2, each of them once, found \[0, 0\]$"),
            ([3], r"^expected lanes from 0 to 2, each of them once, found \[3\]$"),
            ([-1], r"^expected lanes from 0 to 2, each of them once, found \[-1\]$"),
            ([0.5], "^expected lanes, a flat sequence of integers or a mask of 3, found float64"),
            ([True, False], "^expected lanes, a flat sequence of integers or a mask of 3, found bool"),
        ],
    )
    def test_episodes_of_lanes_that_are_none(self, layout: str, lanes: Any, text: str) -> None:
        buffer = self.make(10, spec_of(layout), lanes=3, **LAYOUTS[layout])
        walks = [Walk(1000 * lane) for lane in range(3)]
        buffer.extend(part(together([walk.step() for walk in walks]), layout))
        with pytest.raises(ValueError, match=text):
            buffer.end_episode(lanes)
        assert not to_numpy(buffer.storage.get(...)["truncated"]).any()

    # Episodes -------------------------------------------------------------------------------------------------------

    def test_end_episode(self) -> None:
        buffer = self.make(10, STEPS, lanes=3)
        buffer.end_episode()
        buffer.extend(steps(0, 6))
        buffer.end_episode([1])
        buffer.end_episode(np.array([False, False, True]))
        buffer.end_episode([])
        buffer.extend(steps(6, 9))
        whole = [
            row for sample in one_pass(buffer, num_steps=2, at_end="whole") for row in to_numpy(sample.rows).tolist()
        ]
        assert sorted(whole) == [0, 1, 2, 3]
        assert to_numpy(buffer.storage.get(slice(0, 9))["truncated"]).tolist() == [False] * 4 + [True] * 2 + [False] * 3
        buffer.end_episode()
        assert to_numpy(buffer.storage.get(slice(6, 9))["truncated"]).tolist() == [True] * 3

    def test_an_episode_that_is_over_ends_no_further(self, layout: str) -> None:
        buffer, walk = self.make(10, spec_of(layout), **LAYOUTS[layout]), Walk()
        items = [part(item, layout) for item in walk.episode(4, "terminated")]
        buffer.extend(together(items))
        buffer.end_episode()
        buffer.end_episode()
        stored = buffer.storage.get(slice(0, 4))
        assert to_numpy(stored["truncated"]).tolist() == [False] * 4
        assert to_numpy(stored["terminated"]).tolist() == [False, False, False, True]

    def test_episodes_of_items_that_are_gone(self) -> None:
        """The newest item of a lane may be overwritten by those of others; nobody else's episode ends then."""
        buffer = self.make(4, STEPS, lanes=2)
        buffer.extend(steps(0, 2))
        for number in range(2, 8):
            buffer.extend(steps(number, number + 1), lanes=[1])
        buffer.end_episode([0])
        assert not to_numpy(buffer.storage.get(...)["truncated"]).any()

    # Windows and returns, beside the list ---------------------------------------------------------------------------

    def test_windows_and_returns_of_random_episodes(self, layout: str, count_of_lanes: int) -> None:
        """What the state machine does at length, once on every backend."""
        lanes = count_of_lanes
        random, capacity = np.random.default_rng(lanes), 20
        buffer = self.make(capacity, spec_of(layout), lanes=lanes, **LAYOUTS[layout])
        model = ListOfItems(capacity, layout)
        walks = [Walk(1000 * lane) for lane in range(lanes)]
        for _ in range(3):
            items = [
                part(walks[lane].step(random.choice([None, None, None, "terminated", "truncated"])), layout)
                for _ in range(10 // lanes)
                for lane in range(lanes)
            ]
            buffer.extend(together(items))
            for number, item in enumerate(items):
                model.add(item, number % lanes)
        left_out = (model.depth - 1) * lanes
        certain = {entry.number for entry in model.there[left_out:]}
        for at_end in ("cross", "pad", "whole"):
            expected = model.windows(3, at_end)
            found = []
            for sample in one_pass(buffer, num_steps=3, at_end=at_end):
                rows = to_numpy(sample.rows).tolist()
                windows = [expected[row] for row in rows]
                items = [[step.item for step in [*window, *window[-1:] * (3 - len(window))]] for window in windows]
                assert_same(sample.items, together([together(window) for window in items]))
                found += rows
            assert len(set(found)) == len(found)
            assert certain & expected.keys() <= set(found)
        by_number = {entry.number: entry for entry in model.there}
        for sample in one_pass(buffer, n_step=3, discount=0.5):
            merged = [model.returns(by_number[row], 3, 0.5) for row in to_numpy(sample.rows).tolist()]
            if layout != "stacks":  # which has nothing that follows
                assert_same(sample.items, together([item for item, _ in merged]))
            assert to_numpy(sample.discounts).tolist() == [discount for _, discount in merged]

    def test_returns_worked_out_by_hand(self) -> None:
        """Rewards are 0 to 6; one episode is terminated, the next truncated, the last goes on."""
        buffer = self.stepped(9, terminated=[2], truncated=[5])
        (sample,) = buffer.one_pass(9, n_step=3, discount=0.5)
        order = np.argsort(to_numpy(sample.rows))
        assert to_numpy(sample.items["reward"])[order].tolist() == [1, 2, 2, 6.25, 6.5, 5, 6.25, 0.5, 1]
        assert to_numpy(sample.discounts)[order].tolist() == [0, 0, 0, 0.125, 0.25, 0.5, 0.125, 0.25, 0.5]
        assert to_numpy(sample.items["terminated"])[order].tolist() == [True] * 3 + [False] * 6
        assert to_numpy(sample.items["truncated"])[order].tolist() == [False] * 3 + [True] * 3 + [False] * 3
        assert to_numpy(sample.items["x"])[order].tolist() == list(range(9)), (
            "what is not of the last step is of the first"
        )

    @pytest.mark.parametrize("shared", [None, {"next/obs": "obs"}], ids=str)
    def test_all_that_an_action_leads_to_in_one_part(self, shared: Any) -> None:
        """As TorchRL has it: the flags and the reward are among what follows."""
        number = ArraySpec((), "float32")
        spec = {"obs": number, "next": {"obs": number, "reward": number, "done": FLAG}}
        names = {"reward": "next/reward", "terminated": "next/done", "following": "next"}
        buffer = self.make(5, spec, shared=shared, **names)
        step = np.arange(5, dtype=np.float32)
        buffer.extend({"obs": step, "next": {"obs": step + 1, "reward": step, "done": step == 3}})
        (sample,) = buffer.one_pass(5, n_step=3, discount=0.5)
        order = np.argsort(to_numpy(sample.rows))
        assert to_numpy(sample.items["obs"])[order].tolist() == [0, 1, 2, 3, 4]
        assert to_numpy(sample.items["next"]["obs"])[order].tolist() == [3, 4, 4, 4, 5]
        assert to_numpy(sample.items["next"]["reward"])[order].tolist() == [1, 2.75, 3.5, 3, 4]
        assert to_numpy(sample.discounts)[order].tolist() == [0.125, 0, 0, 0, 0.5]

    @pytest.mark.parametrize("discount", [0, 1, 0.99, 1.0])
    def test_discounts(self, discount: float) -> None:
        buffer = self.stepped(4)
        (sample,) = buffer.one_pass(4, n_step=4, discount=discount)
        order = np.argsort(to_numpy(sample.rows))
        expected = np.float32([float(discount) ** count for count in (4, 3, 2, 1)])
        assert to_numpy(sample.discounts)[order].tolist() == expected.tolist()

    def test_rewards_of_other_kinds(self) -> None:
        spec = {"gains": ArraySpec((2,), "float32"), "done": FLAG, "points": ArraySpec((), "int32")}
        value = {"gains": np.float32([[1, 2], [3, 4], [5, 6]]), "done": [False, True, False], "points": [1, 2, 3]}
        buffer = self.make(4, spec, reward="gains", terminated="done")
        buffer.extend(value)
        (sample,) = buffer.one_pass(4, n_step=2, discount=0.5)
        order = np.argsort(to_numpy(sample.rows))
        assert to_numpy(sample.items["gains"])[order].tolist() == [[2.5, 4], [3, 4], [5, 6]]
        buffer = self.make(4, spec, reward="points", terminated="done")
        buffer.extend(value)
        (sample,) = buffer.one_pass(4, n_step=2, discount=0.5)
        order = np.argsort(to_numpy(sample.rows))
        assert to_numpy(sample.items["points"])[order].tolist() == [2, 2, 3]
        assert to_numpy(sample.items["points"]).dtype == np.float32

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "int8"])
    def test_rewards_of_other_dtypes(self, dtype: str) -> None:
        spec = {"reward": ArraySpec((), dtype), "terminated": FLAG}
        try:
            buffer = self.make(4, spec)
        except ValueError:
            return  # the library has no such numbers
        buffer.extend({"reward": np.array([1, 2, 4, 8]).astype(spec["reward"].dtype), "terminated": [False] * 4})
        (sample,) = buffer.one_pass(4, n_step=2, discount=0.5)
        order = np.argsort(to_numpy(sample.rows))
        assert to_numpy(sample.items["reward"])[order].astype(float).tolist() == [2, 4, 8, 8]
        assert to_numpy(sample.discounts)[order].astype(float).tolist() == [0.25, 0.25, 0.25, 0.5]

    def test_parts_by_their_paths(self) -> None:
        """Nested, and under names of one's own."""
        spec = {
            "now": {"state": ArraySpec((2,), "float32")},
            "then": {"state": ArraySpec((2,), "float32")},
            "outcome": {"gain": NUMBER, "dead": FLAG, "late": FLAG},
        }
        names = {"reward": "outcome/gain", "terminated": "outcome/dead", "truncated": "outcome/late"}
        state = np.arange(12, dtype=np.float32).reshape(6, 2)
        value = {
            "now": {"state": state},
            "then": {"state": state + 2},
            "outcome": {
                "gain": np.ones(6, np.float32),
                "dead": np.arange(6) == 5,
                "late": np.arange(6) == 2,
            },
        }
        for layout in ({"following": "then"}, {"shared": {"then": "now"}}):
            buffer = self.make(6, spec, **names, **layout)
            buffer.extend(value)
            (sample,) = buffer.one_pass(6, n_step=2, discount=0.5)
            order = np.argsort(to_numpy(sample.rows))
            assert to_numpy(sample.items["then"]["state"])[order, 0].tolist() == [4, 6, 6, 10, 12, 12]
            assert to_numpy(sample.items["outcome"]["gain"])[order].tolist() == [1.5, 1.5, 1, 1.5, 1.5, 1]
            assert to_numpy(sample.discounts)[order].tolist() == [0.25, 0.25, 0.5, 0.25, 0, 0]

    # The peers' known faults ----------------------------------------------------------------------------------------

    def test_peers_fault_next_observation_wrong_at_the_ring_head(self, layout: str) -> None:
        """The newest item's successor is not there yet, and the next row holds the oldest item."""
        for count in (10, 11, 13, 16):
            buffer, model = self.make(10, spec_of(layout), **LAYOUTS[layout]), ListOfItems(10, layout)
            walk = Walk()
            items = [item for length in (5, 3, 7, 4) for item in walk.episode(length, "terminated")][:count]
            items = [part(item, layout) for item in items]
            buffer.extend(together(items[:5]))
            for item in items[5:]:
                buffer.add(item)
            for item in items:
                model.add(item)
            self.assert_all_as_added(buffer, model)

    def assert_all_as_added(self, buffer: ReplayBuffer, model: ListOfItems) -> None:
        by_number, found = {entry.number: entry for entry in model.there}, 0
        for sample in one_pass(buffer):
            entries = [by_number[row] for row in to_numpy(sample.rows).tolist()]
            assert_same(sample.items, together([entry.item for entry in entries]))
            found += len(entries)
        assert found >= len(model.there) - (model.depth - 1 if model.overwrote else 0)

    @pytest.mark.parametrize("told", ["truncated", None], ids=["by a flag", "by nothing"])
    def test_peers_fault_next_observation_wrong_at_timeouts(self, layout: str, told: str | None) -> None:
        """It is the final observation, not the first one of the next episode; two of them in one batch, too."""
        buffer, model = self.make(20, spec_of(layout), **LAYOUTS[layout]), ListOfItems(20, layout)
        walk = Walk()
        items = [part(item, layout) for length in (5, 3, 8) for item in walk.episode(length, told)]
        buffer.extend(together(items))
        for item in items:
            model.add(item)
        self.assert_all_as_added(buffer, model)
        if layout == "stacks":
            return
        # To a plain layout nothing tells that the next item is of another episode.
        last, count = (4, 1) if told or layout != "plain" else (6, 3)
        for sample in one_pass(buffer, n_step=3):
            for row, camera, discount in zip(
                to_numpy(sample.rows), to_numpy(sample.items["next_obs"]["camera"]), to_numpy(sample.discounts)
            ):
                if row == 4:
                    assert camera.tolist() == items[last]["next_obs"]["camera"].tolist()
                    assert discount == np.float32(0.99**count)

    def test_peers_fault_sampling_across_the_head(self) -> None:
        for count in range(3, 26):
            buffer = self.stepped(count, 8)
            windows = [
                window for sample in one_pass(buffer, num_steps=3) for window in to_numpy(sample.items["x"]).tolist()
            ]
            assert sorted(windows) == [[n, n + 1, n + 2] for n in range(max(0, count - 8), count - 2)]
            drawn = to_numpy(buffer.sample(64, num_steps=3).items["x"])
            assert (np.diff(drawn, axis=1) == 1).all()

    def test_peers_fault_a_cursor_moved_by_a_failed_write(self) -> None:
        """And no row torn, and no row drawn that was never written."""
        buffer = self.filled(3, 4)
        wrong = batch(9)
        wrong["action"] = [np.zeros(3, np.int32), wrong["action"][1]]
        for _ in range(3):
            with pytest.raises(ValueError, match="action/0: expected shape"):
                buffer.add(wrong)
        assert (len(buffer), buffer.total_added) == (3, 3)
        assert set(stamps_of(buffer.sample(64).items)) == {0, 1, 2}
        buffer.add(batch(3))
        with pytest.raises(ValueError, match="action/0: expected shape"):
            buffer.add(wrong)
        assert all_of(buffer) == [0, 1, 2, 3]
        buffer.add(batch(4))
        assert all_of(buffer) == [1, 2, 3, 4]

    def test_peers_fault_priorities_of_overwritten_rows(self) -> None:
        """Also where another sample was drawn in between, as a learner that samples ahead does."""
        buffer = self.filled(4, 4, sampler=Prioritized(alpha=1.0, epsilon=0.0))
        rows = np.arange(4)
        buffer.sample(2)
        buffer.extend(batch(np.arange(4, 6)))
        ahead = buffer.sample(4)
        assert buffer.update_priorities(rows, np.array([100.0, 200.0, 2.0, 3.0])) == 2
        assert to_numpy(buffer.priorities).tolist() == pytest.approx([2, 3, 1, 1])
        assert buffer.update_priorities(ahead.rows, np.full(4, 5.0)) == 4
        assert buffer.sampler.highest == 5, "that of a row that is gone does not count"

    def test_peers_fault_an_update_outside_of_the_buffer(self) -> None:
        buffer = self.filled(4, 4, sampler=Prioritized())
        assert buffer.update_priorities([4, 7, 100_000, -1], np.full(4, 9.0)) == 0
        assert to_numpy(buffer.priorities).tolist() == pytest.approx([1] * 4, rel=1e-4)

    def test_peers_fault_one_lane_given_for_all(self) -> None:
        """Whose values others broadcast to all lanes."""
        buffer = self.make(8, STEPS, lanes=4)
        with pytest.raises(ValueError, match="^expected an item of each of 4 lanes, found 1 items$"):
            buffer.add(steps(0, 1))
        with pytest.raises(ValueError, match="^expected items of 4 lanes in turn, a multiple of 4 items, found 1;"):
            buffer.extend(steps(0, 1))
        assert buffer.total_added == 0


def all_of_any_order(buffer: ReplayBuffer) -> list[int]:
    """The stamps of all items, sorted, whatever their rows."""
    return sorted(stamp for sample in one_pass(buffer) for stamp in stamps_of(sample.items))


class TestNumpy(OnNumpy, ReplayContract):
    pass


class TestPlainNumpy(OnPlainNumpy, ReplayContract):
    pass


class TestDisk(OnDisk, ReplayContract):
    pass


class TestTorch(OnTorch, ReplayContract):
    pass


class TestTorchAsOnADevice(OnTorchAsOnADevice, ReplayContract):
    pass


class TestJax(OnJax, ReplayContract):
    test_samples_share_no_memory_with_the_buffer = None  # none can be written to
    test_priorities_without_a_finite_sum = None  # any that JAX has is finite in the float64 of NumPy


class TestJaxAsOnADevice(OnJaxAsOnADevice, TestJax):
    test_priorities_without_a_finite_sum = ReplayContract.test_priorities_without_a_finite_sum
    every_layout, every_count_of_lanes = ("shared stacks",), (2,)  # each takes long to compile


class TestStrict(OnStrict, ReplayContract):
    pass


class TestStrictWithout64Bits(OnStrictWithout64Bits, ReplayContract):
    pass


class TestCupyOnAStandIn(OnACupyStandIn, ReplayContract):
    pass


@pytest.mark.gpu
class TestCupy(OnCupy, ReplayContract):
    pass


@pytest.mark.gpu
class TestTorchCuda(OnTorchCuda, ReplayContract):
    pass


@pytest.mark.gpu
class TestJaxCuda(OnJaxCuda, ReplayContract):
    pass
