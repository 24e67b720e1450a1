"""Whatever is done to a storage, it holds what a plain list of items would hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import optree
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

from anystore import Storage
from tests.items import SPEC, assert_same, batch


def rows_in(capacity: int) -> st.SearchStrategy[int]:
    return st.integers(-capacity, capacity - 1)


@st.composite
def indices(draw: st.DrawFn, capacity: int) -> Any:
    """Any index that is one, in any of its forms."""
    rows = st.lists(rows_in(capacity), max_size=2 * capacity)
    kind = draw(st.sampled_from(["int", "slice", "list", "array", "2-d", "mask", "range", "all"]))
    if kind == "int":
        return draw(st.one_of(rows_in(capacity), rows_in(capacity).map(np.int32)))
    if kind == "slice":
        ends = st.none() | st.integers(-2 * capacity, 2 * capacity)
        return slice(draw(ends), draw(ends), draw(st.sampled_from([None, 1, 2, 3, -1, -2])))
    if kind == "list":
        return draw(rows)
    if kind == "array":
        return np.array(draw(rows), draw(st.sampled_from([np.int8, np.int32, np.int64])))
    if kind == "2-d":
        count = draw(st.integers(0, 3))
        return np.array(
            [draw(st.lists(rows_in(capacity), min_size=3, max_size=3)) for _ in range(count)], np.int64
        ).reshape(-1, 3)
    if kind == "mask":
        return np.array(draw(st.lists(st.booleans(), min_size=capacity, max_size=capacity)))
    if kind == "range":
        return range(draw(st.integers(-capacity, 0)), draw(st.integers(0, capacity)), draw(st.integers(1, 3)))
    return ...


class ListModel(RuleBasedStateMachine):
    """A storage beside a list with the stamp of each row."""

    backend: str
    device: str

    @initialize(capacity=st.integers(1, 7))
    def build(self, capacity: int) -> None:
        self.store = Storage(SPEC, capacity, backend=self.backend, device=self.device)
        self.stamps: list[int | None] = [None] * capacity
        self.next_stamp = 1

    def meant(self, index: Any) -> Any:
        """The rows that an index means, by NumPy."""
        return np.arange(len(self.stamps))[np.asarray(index, np.int64) if isinstance(index, (list, range)) else index]

    @rule(data=st.data(), whole=st.booleans())
    def write(self, data: st.DataObject, whole: bool) -> None:
        index = data.draw(indices(len(self.stamps)))
        rows = self.meant(index)
        stamps = self.next_stamp + (0 if whole else np.arange(rows.size).reshape(rows.shape))
        self.next_stamp += rows.size + 1
        self.store.set(index, batch(stamps))
        for row, stamp in zip(rows.reshape(-1), np.broadcast_to(stamps, rows.shape).reshape(-1), strict=True):
            self.stamps[row] = int(stamp)

    @rule(data=st.data(), row=st.sampled_from([7, 100, -8, -100]))
    def write_out_of_range(self, data: st.DataObject, row: int) -> None:
        rows = data.draw(st.lists(rows_in(len(self.stamps)), max_size=4))
        with pytest.raises(IndexError, match="out of range"):
            self.store.set([*rows, row], batch(self.next_stamp))

    @rule(data=st.data(), leaf=st.sampled_from(["image", "position"]))
    def write_what_does_not_fit(self, data: st.DataObject, leaf: str) -> None:
        index = data.draw(indices(len(self.stamps)))
        value = batch(np.zeros(self.meant(index).shape))
        if leaf == "image":
            value["obs"]["image"] = np.zeros(5, np.uint8)
        else:
            value["obs"]["pose"] = value["obs"]["pose"]._replace(position=np.zeros(4, complex))
        with pytest.raises((ValueError, TypeError), match=f"obs/.*{leaf}: expected"):
            self.store.set(index, value)

    @rule(data=st.data(), copy=st.sampled_from([True, None]))
    def read(self, data: st.DataObject, copy: bool | None) -> None:
        index = data.draw(indices(len(self.stamps)))
        assert_same(self.store.get(index, copy=copy), self.expected(self.meant(index)))

    @rule(capacity=st.integers(1, 7))
    def resize(self, capacity: int) -> None:
        self.store.resize(capacity)
        self.stamps = (self.stamps + [None] * capacity)[:capacity]

    @precondition(lambda self: hasattr(self, "store"))
    @invariant()
    def holds_what_the_list_holds(self) -> None:
        assert_same(self.store.get(...), self.expected(np.arange(len(self.stamps))))

    def expected(self, rows: Any) -> Any:
        """The items of the model at `rows`; zeros where nothing was written."""
        written = np.array([stamp is not None for stamp in self.stamps])[rows]
        stamps = np.array([stamp or 0 for stamp in self.stamps])[rows]

        def blank(leaf: Any) -> Any:
            mask = written.reshape(written.shape + (1,) * (leaf.ndim - written.ndim))
            return np.where(mask, leaf, np.zeros_like(leaf))

        return optree.tree_map(blank, batch(stamps))


class ModelContract:
    """Subclassed per backend."""

    backend: str
    device = "cpu"
    max_examples = 60

    def test_holds_what_a_list_would_hold(self) -> None:
        class Machine(ListModel):
            backend, device = self.backend, self.device

        run_state_machine_as_test(
            Machine,
            settings=settings(
                max_examples=self.max_examples,
                stateful_step_count=20,
                deadline=None,
                derandomize=True,
                suppress_health_check=list(HealthCheck),
            ),
        )


class TestNumpyModel(ModelContract):
    backend = "numpy"
    max_examples = 200


class TestTorchModel(ModelContract):
    backend = "torch"


class TestJaxModel(ModelContract):
    backend = "jax"
    max_examples = 10  # every shape of rows is compiled


class TestStrictModel(ModelContract):
    backend, device = "array_api_strict", "device1"


@pytest.mark.gpu
class TestCupyModel(ModelContract):
    backend, device = "cupy", "cuda:0"


@pytest.mark.gpu
class TestTorchCudaModel(ModelContract):
    backend, device = "torch", "cuda:0"
