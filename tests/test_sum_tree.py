"""The sum tree: its sums, what it finds, and the compiled form beside that of the array API."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anystore import select_backend
from anystore.convert import to_numpy
from anystore.replay import sum_tree
from anystore.replay.sum_tree import WIDTH, SumTree
from tests.on_backends import (
    OnACupyStandIn,
    OnCupy,
    OnJax,
    OnNumpy,
    OnPlainNumpy,
    OnStrict,
    OnStrictWithout64Bits,
    OnStrictWithoutFloat64,
    OnTorch,
    OnTorchAsOnADevice,
    OnTorchCuda,
)
from tests.transitions import assert_distributed

CAPACITIES = [1, 15, 16, 17, 256, 257, 300]
JUST_BELOW_1 = {"float32": np.float32(1 - 2**-24), "float64": np.float64(1 - 2**-53)}


def levels_of(tree: SumTree) -> list[Any]:
    return [to_numpy(tree._backend.array(level)) for level in tree._levels]


def assert_adds_up(tree: SumTree) -> None:
    """Every value is the sum of the `WIDTH` below it, which are integers here, and zeros where nothing is below."""
    levels = levels_of(tree)
    for below, level in itertools.pairwise(levels):
        sums = below.reshape(-1, WIDTH).sum(axis=1)
        assert level[: len(sums)].tolist() == sums.tolist()
        assert not level[len(sums) :].any()
    assert len(levels[-1]) == WIDTH


def found_slowly(values: Any, draws: Any) -> int:
    """The row for a draw of each level, top first, by the exact sums of the integers in `values`."""
    dtype, blocks = draws.dtype.type, [[int(value) for value in values]]
    for _ in draws[1:]:
        blocks.append([sum(blocks[-1][start : start + WIDTH]) for start in range(0, len(blocks[-1]), WIDTH)])
    node = 0
    for level, draw in zip(reversed(blocks), draws):
        block = level[node * WIDTH : (node + 1) * WIDTH]
        target = dtype(draw) * dtype(sum(block))
        target = target if target < sum(block) else 0
        sums = np.cumsum(block)
        node = node * WIDTH + int((sums <= target).sum())
    return node


class SumTreeContract:
    """Subclassed per backend."""

    options: dict[str, Any]
    floating: str
    integer: str

    def make(self, capacity: int) -> SumTree:
        return SumTree(capacity, select_backend(**self.options))

    def rows(self, rows: Any) -> Any:
        return select_backend(**self.options).from_numpy(np.asarray(rows, self.integer))

    def floats(self, values: Any) -> Any:
        return select_backend(**self.options).from_numpy(np.asarray(values, self.floating))

    def filled(self, values: Any) -> SumTree:
        tree = self.make(len(values))
        self.set(tree, np.arange(len(values)), values)
        return tree

    def set(self, tree: SumTree, rows: Any, values: Any) -> None:
        with tree._backend.stream():
            tree.set(self.rows(rows), self.floats(values))

    def find(self, tree: SumTree, draws: Any) -> Any:
        with tree._backend.stream():
            return to_numpy(tree.find(self.floats(draws)))

    def draws(self, tree: SumTree, count: int, seed: int = 0) -> Any:
        draws = np.random.default_rng(seed).random((tree.depth, count)).astype(self.floating)
        return np.minimum(draws, JUST_BELOW_1[self.floating])

    @pytest.mark.parametrize("capacity", CAPACITIES)
    def test_all_zeros_at_first(self, capacity: int) -> None:
        tree = self.make(capacity)
        assert tree.depth == max(1, math.ceil(math.log(capacity, WIDTH) - 1e-9))
        assert levels_of(tree)[0].dtype == self.floating
        assert len(levels_of(tree)[0]) == -(-capacity // WIDTH) * WIDTH
        assert not any(level.any() for level in levels_of(tree))
        with tree._backend.stream():
            assert tree.total() == 0

    @pytest.mark.parametrize("capacity", CAPACITIES)
    def test_sums_after_writes(self, capacity: int) -> None:
        random, model = np.random.default_rng(capacity), np.zeros(capacity)
        tree = self.make(capacity)
        for count in (1, 8, 8, 8):
            rows, values = random.integers(0, capacity, count), random.integers(0, 100, count)
            self.set(tree, rows, values)
            for row, value in zip(rows, values, strict=True):
                model[row] = value
            assert levels_of(tree)[0][:capacity].tolist() == model.tolist()
            assert_adds_up(tree)
        with tree._backend.stream():
            assert tree.total() == model.sum()
            assert to_numpy(tree.get(self.rows(rows))).tolist() == model[rows].tolist()

    def test_of_several_values_for_a_row_the_last_stays(self) -> None:
        tree = self.make(40)
        self.set(tree, [3, 20, 3, 20, 3, 39], [1, 2, 3, 4, 5, 6])
        assert levels_of(tree)[0][[3, 20, 39]].tolist() == [5, 4, 6]
        assert_adds_up(tree)

    @pytest.mark.parametrize("capacity", [1, 16, 300])
    def test_runs(self, capacity: int) -> None:
        tree = self.filled(np.full(capacity, 7))
        model = np.full(capacity, 7.0)
        for run, value in (
            (range(capacity), 2.0),
            (range(capacity - 1, capacity), 3.0),
            (range(capacity // 2 + 1), 0.0),
        ):
            with tree._backend.stream():
                tree.set_run(run, value)
            model[run.start : run.stop] = value
            assert levels_of(tree)[0][:capacity].tolist() == model.tolist()
            assert_adds_up(tree)

    def test_no_rounding_error_stays(self) -> None:
        """As it would if sums were corrected by differences."""
        tree = self.make(300)
        for value in (1e30, 3e-3, 0.1):
            self.set(tree, [0, 299], [value, value])
        self.set(tree, [0, 299], [0, 1])
        with tree._backend.stream():
            assert tree.total() == 1
        assert_adds_up(tree)

    @pytest.mark.parametrize("capacity", [1, 5, 16, 17, 300])
    def test_finds_what_the_exact_sums_say(self, capacity: int) -> None:
        values = np.random.default_rng(capacity).integers(0, 9, capacity)
        values[-1] += 1
        tree = self.filled(values)
        draws = self.draws(tree, 64)
        draws[:, 0], draws[:, 1] = 0, JUST_BELOW_1[self.floating]
        draws[0, 2], draws[-1, 3] = JUST_BELOW_1[self.floating], JUST_BELOW_1[self.floating]
        assert self.find(tree, draws).tolist() == [found_slowly(values, draw) for draw in draws.T]

    @pytest.mark.parametrize("capacity", [1, 300])
    def test_finds_no_row_without_a_value(self, capacity: int) -> None:
        draws = self.draws(self.make(capacity), 64)
        draws[:, :8] = JUST_BELOW_1[self.floating]
        draws[:, 8:16] = 0
        for row in {0, capacity // 2, capacity - 1}:
            for value in (1e-30, 1, 1e30):
                values = np.zeros(capacity)
                values[row] = value
                assert set(self.find(self.filled(values), draws).tolist()) == {row}

    def test_finds_rows_by_their_share(self) -> None:
        values = np.random.default_rng(0).integers(0, 5, 300).astype(float)
        values[7] = 300
        tree = self.filled(values)
        counts = np.bincount(self.find(tree, self.draws(tree, 20_000)), minlength=300)
        assert_distributed(counts, values)

    def test_an_empty_tree_has_no_row_beyond_it(self) -> None:
        tree = self.make(17)
        assert self.find(tree, self.draws(tree, 9)).tolist() == [0] * 9


class TestNumpy(OnNumpy, SumTreeContract):
    pass


class TestPlainNumpy(OnPlainNumpy, SumTreeContract):
    pass


class TestTorch(OnTorch, SumTreeContract):
    pass


class TestTorchAsOnADevice(OnTorchAsOnADevice, SumTreeContract):
    pass


class TestJax(OnJax, SumTreeContract):
    pass


class TestStrict(OnStrict, SumTreeContract):
    pass


class TestStrictWithoutFloat64(OnStrictWithoutFloat64, SumTreeContract):
    pass


class TestStrictWithout64Bits(OnStrictWithout64Bits, SumTreeContract):
    pass


class TestCupyOnAStandIn(OnACupyStandIn, SumTreeContract):
    pass


@pytest.mark.gpu
class TestCupy(OnCupy, SumTreeContract):
    pass


@pytest.mark.gpu
class TestTorchCuda(OnTorchCuda, SumTreeContract):
    pass


def tree_of_host(capacity: int) -> list[Any]:
    """The levels of an empty tree, as the compiled functions take them."""
    lengths = [-(-capacity // WIDTH) * WIDTH]
    while lengths[-1] > WIDTH:
        lengths.append(-(-lengths[-1] // WIDTH // WIDTH) * WIDTH)
    return [np.zeros(length) for length in lengths]


class TestCompiled:
    """The functions of _sum_tree.c."""

    obstacle = None if sum_tree.compiled else "the compiled sum tree was not built"

    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(
        capacity=st.sampled_from([*CAPACITIES, 4097]),
        seed=st.integers(0, 2**32 - 1),
        kind=st.sampled_from(["integers", "floats", "few", "huge and tiny"]),
        writes=st.integers(1, 4),
    )
    def test_finds_the_very_rows_that_the_array_api_finds(
        self, capacity: int, seed: int, kind: str, writes: int
    ) -> None:
        random, backend = np.random.default_rng(seed), select_backend("numpy")
        one, other = SumTree(capacity, backend), SumTree(capacity, backend)
        assert one._compiled is not None
        other._compiled = None
        for _ in range(writes):
            rows = random.integers(0, capacity, random.integers(1, 50))
            values = {
                "integers": random.integers(0, 9, rows.size).astype(float),
                "floats": random.random(rows.size),
                "few": random.random(rows.size) * (random.random(rows.size) < 0.1),
                "huge and tiny": 10.0 ** random.integers(-300, 300, rows.size),
            }[kind]
            for tree in (one, other):
                tree.set(rows, values)
            start, stop = sorted(random.integers(0, capacity + 1, 2).tolist())
            if start < stop:
                for tree in (one, other):
                    tree.set_run(range(start, stop), float(values[0]))
        for level, expected in zip(levels_of(one), levels_of(other), strict=True):
            np.testing.assert_allclose(level, expected, rtol=1e-14)
        draws = random.random((one.depth, 257))
        if kind == "integers":
            draws[:, :2] = 0, 1 - 2**-53
        assert one.find(draws).tolist() == other.find(draws).tolist()

    def find(self, levels: Any, draws: Any) -> Any:
        return sum_tree.compiled.find(levels, draws)

    @pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 1000])
    def test_any_number_of_draws(self, count: int) -> None:
        levels = tree_of_host(300)
        levels[0][[5, 299]] = 1
        sum_tree.compiled.add_up(levels, np.array([5, 299]))
        found = self.find(levels, np.random.default_rng(0).random((3, count)))
        assert (found.dtype, found.shape) == (np.intp, (count,))
        assert set(found.tolist()) <= {5, 299}

    @pytest.mark.parametrize("rows", [[], [3], [[3, 299], [16, 0]], [0] * 100])
    def test_adds_up_the_sums_above_any_rows(self, rows: Any) -> None:
        levels, rows = tree_of_host(300), np.array(rows, np.intp)
        levels[0][rows] = 1
        assert sum_tree.compiled.add_up(levels, rows) is None
        assert levels[-1].sum() == len(set(rows.ravel().tolist()))

    levels: ClassVar = {
        "no list": (tuple(tree_of_host(300)), TypeError, "expected a list of levels"),
        "none at all": ([], TypeError, "expected a list of levels"),
        "too many": ([np.zeros(16)] * 17, TypeError, "expected a list of levels"),
        "no arrays": ([[0.0] * 16], TypeError, "expected levels that are contiguous arrays of float64"),
        "none": ([None], TypeError, "contiguous arrays of float64"),
        "float32": ([np.zeros(16, np.float32)], TypeError, "contiguous arrays of float64"),
        "integers": ([np.zeros(16, np.int64)], TypeError, "contiguous arrays of float64"),
        "objects": ([np.zeros(16, object)], TypeError, "contiguous arrays of float64"),
        "of the other byte order": ([np.zeros(16, ">f8")], TypeError, "contiguous arrays of float64"),
        "two axes": ([np.zeros((1, 16))], TypeError, "contiguous arrays of float64"),
        "with gaps": ([np.zeros(32)[::2]], TypeError, "contiguous arrays of float64"),
        "backwards": ([np.zeros(16)[::-1]], TypeError, "contiguous arrays of float64"),
        "unaligned": ([np.zeros(136, np.uint8)[1:129].view(float)], TypeError, "contiguous arrays of float64"),
        "read only": ([np.broadcast_to(0.0, 16)], TypeError, "contiguous arrays of float64"),
        "no whole blocks": ([np.zeros(17)], ValueError, "as long as the blocks of the one below"),
        "an empty one": ([np.zeros(0)], ValueError, "a last level of a single block"),
        "none for the rows": ([np.zeros(0), np.zeros(16)], ValueError, "a last level of a single block"),
        "too short above": ([np.zeros(512), np.zeros(16)], ValueError, "as long as the blocks of the one below"),
        "no top": ([np.zeros(512), np.zeros(32)], ValueError, "a last level of a single block"),
    }

    @pytest.mark.parametrize("name", levels)
    def test_levels_that_are_none(self, name: str) -> None:
        levels, error, text = self.levels[name]
        depth = max(len(levels), 1)
        with pytest.raises(error, match=text):
            self.find(levels, np.zeros((depth, 3)))
        with pytest.raises(error, match=text):
            sum_tree.compiled.add_up(levels, np.zeros(3, np.intp))

    @pytest.mark.parametrize(
        "draws",
        [
            np.zeros(3),
            np.zeros((2, 3)),
            np.zeros((4, 3)),
            np.zeros((3, 3), np.float32),
            np.zeros((3, 3), ">f8"),
            np.zeros((3, 6))[:, ::2],
            np.zeros((6, 3)).T[:3],
            [[0.0]] * 3,
            None,
        ],
        ids=repr,
    )
    def test_draws_that_are_none(self, draws: Any) -> None:
        with pytest.raises(TypeError, match="expected (levels and an array of draws|draws of float64, contiguous)"):
            self.find(tree_of_host(300), draws)

    @pytest.mark.parametrize(
        ("rows", "error", "text"),
        [
            (np.array([304]), IndexError, "a row is out of range"),
            (np.array([0, -1]), IndexError, "a row is out of range"),
            (np.array([0, np.iinfo(np.intp).max]), IndexError, "a row is out of range"),
            (np.array([0, np.iinfo(np.intp).min]), IndexError, "a row is out of range"),
            (np.array([1.0]), TypeError, "expected rows of intp, contiguous"),
            (np.array([1], np.int32), TypeError, "expected rows of intp, contiguous"),
            (np.array([1], np.uint64), TypeError, "expected rows of intp, contiguous"),
            (np.array([1], ">i8"), TypeError, "expected rows of intp, contiguous"),
            (np.arange(8)[::2], TypeError, "expected rows of intp, contiguous"),
            ([1], TypeError, "expected levels and an array of rows"),
            (1, TypeError, "expected levels and an array of rows"),
        ],
        ids=repr,
    )
    def test_rows_that_are_none(self, rows: Any, error: type[Exception], text: str) -> None:
        levels = tree_of_host(300)
        levels[0][...] = 1
        with pytest.raises(error, match=text):
            sum_tree.compiled.add_up(levels, rows)
        assert not levels[1].any(), "nothing was written"

    @pytest.mark.parametrize("count", [0, 1, 3])
    def test_a_wrong_number_of_arguments(self, count: int) -> None:
        for function in (sum_tree.compiled.find, sum_tree.compiled.add_up):
            with pytest.raises(TypeError, match="expected levels and an array"):
                function(*[tree_of_host(16)] * count)

    def test_whatever_the_draws_the_rows_are_inside(self) -> None:
        levels = tree_of_host(300)
        levels[0][:300] = np.arange(300)
        sum_tree.compiled.add_up(levels, np.arange(300))
        odd = [-1.0, -np.inf, 1.0, 1.5, 1e300, np.inf, np.nan, -0.0, 5e-324]
        draws = np.array(np.meshgrid(odd, odd, odd)).reshape(3, -1)
        found = self.find(levels, draws)
        assert ((found >= 0) & (found < 304)).all()

    @pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf, -1.0, 1e308, -1e308])
    def test_whatever_the_values_the_rows_are_inside(self, odd: float) -> None:
        random = np.random.default_rng(0)
        for _ in range(50):
            levels = tree_of_host(300)
            levels[0][:300] = np.where(random.random(300) < 0.1, odd, random.random(300))
            sum_tree.compiled.add_up(levels, np.arange(300))
            found = self.find(levels, random.random((3, 64)))
            assert ((found >= 0) & (found < 304)).all()

    def test_values_above_nothing_lead_nowhere(self) -> None:
        """In a process of its own, since rows past the end would be read."""
        program = """
import numpy as np
from anystore.replay import _sum_tree
found = _sum_tree.find([np.zeros(16), np.ones(16)], np.random.default_rng(0).random((2, 1000)))
assert ((found >= 0) & (found < 16)).all(), found.max()
"""
        subprocess.run([sys.executable, "-c", program], check=True)
