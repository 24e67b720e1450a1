"""What is drawn, and how often: chi-square with fixed seeds, the same contract on every backend."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from anystore import ArraySpec, select_backend
from anystore.convert import library_of, to_numpy
from anystore.replay import Prioritized, Recent, ReplayBuffer, Sampler, Uniform
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
from tests.transitions import assert_distributed

SPEC = {"x": ArraySpec((), "int32"), "terminated": ArraySpec((), "bool")}
MANY = 4000
"""Draws of one call, of one shape for a library that compiles."""


def items(first: int, last: int, ends: Any = ()) -> dict[str, Any]:
    """Those of these numbers; some end episodes."""
    numbers = np.arange(first, last)
    return {"x": numbers.astype(np.int32), "terminated": np.isin(numbers, ends)}


class Wild(Sampler):
    """Draws places that are there and others that are not, on both sides."""

    def draw(self, count: int, items: range) -> Any:
        return self.random.integers(3 * len(items), count) - len(items)


class Chosen(Sampler):
    """Draws as it is told to, by chances of its own."""

    def __init__(self, chances: Any, *, distinct: bool = False) -> None:
        self.table = np.asarray(chances, np.float64)
        self.distinct = distinct

    def draw(self, count: int, items: range) -> Any:
        sums = np.cumsum(self.table[: len(items)])
        places = np.searchsorted(sums, to_numpy(self.random.uniform(count)) * sums[-1], side="right")
        return self.backend.from_numpy(places.astype(np.int32))

    def chances(self, places: Any, items: range) -> Any:
        return self.backend.from_numpy(self.table[to_numpy(places)].astype(np.float32))


class Wrong(Wild):
    """Says what it is told to of the chances of its draws, which need not be any."""

    distinct = True

    def __init__(self, found: Any) -> None:
        self.found = found

    def chances(self, places: Any, items: range) -> Any:
        return np.array(self.found)


NO_CHANCES = {
    "too few": [1.0] * 3,
    "two axes": [[1.0] * 10],
    "infinite": [1.0, np.inf] * 5,
    "not a number": [1.0, np.nan] * 5,
    "negative": [1.0, -1.0] * 5,
}


class SamplersContract:
    """Subclassed per backend."""

    options: dict[str, Any]
    floating: str
    repeats = 250
    """How many samples are drawn where one tells little."""

    def make(self, capacity: int = 10, count: int = 17, **options: Any) -> ReplayBuffer:
        """A buffer with so many items added."""
        ends = options.pop("ends", ())
        buffer = ReplayBuffer(SPEC, capacity, **{"seed": 7, **self.options, **options})
        buffer.extend(items(0, count, ends))
        return buffer

    @pytest.mark.parametrize("found", NO_CHANCES.values(), ids=NO_CHANCES)
    def test_chances_that_are_none(self, found: Any) -> None:
        buffer = self.make(sampler=Wrong(found))
        with pytest.raises(
            ValueError, match="^expected 10 finite chances of 0 or more from Wrong.chances, found array"
        ):
            buffer.sample(6)

    def counts(self, buffer: ReplayBuffer, draws: int = MANY, **how: Any) -> Any:
        """How often each item that is there was drawn, or began a window, oldest first."""
        sample = buffer.sample(draws, **how)
        numbers = to_numpy(sample.items["x"]).reshape(draws, -1)[:, 0]
        assert numbers.tolist() == to_numpy(sample.rows).tolist()
        oldest = buffer.total_added - len(buffer)
        return np.bincount(numbers - oldest, minlength=len(buffer))

    # Uniform --------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize(
        ("capacity", "count"), [(10, 17), (10, 6), (1, 3)], ids=["wrapped", "not full", "a single row"]
    )
    def test_uniform(self, capacity: int, count: int) -> None:
        found = self.counts(self.make(capacity, count))
        assert len(found) == min(capacity, count)
        assert_distributed(found)

    def test_uniform_in_small_samples(self) -> None:
        buffer = self.make()
        found = np.concatenate([to_numpy(buffer.sample(4).rows) for _ in range(self.repeats)]) - 7
        assert_distributed(np.bincount(found, minlength=10))
        assert_distributed(np.bincount(found[1:] % 5 * 5 + found[:-1] % 5, minlength=25))

    @pytest.mark.parametrize("count", [2, 3, 4, 5], ids=lambda count: f"{count} of 6")
    def test_uniform_without_replacement(self, count: int) -> None:
        buffer = self.make(6, 11, sampler=Uniform(replacement=False))
        combinations = dict.fromkeys(itertools.combinations(range(6), count), 0)
        first = np.zeros(6, np.int64)
        for _ in range(self.repeats):
            drawn = (to_numpy(buffer.sample(count).rows) - 5).tolist()
            combinations[tuple(sorted(drawn))] += 1
            first[drawn[0]] += 1
        assert_distributed(list(combinations.values()))
        assert_distributed(first)

    def test_uniform_without_replacement_of_all(self) -> None:
        buffer = self.make(4, 6, sampler=Uniform(replacement=False))
        orders = dict.fromkeys(itertools.permutations(range(4)), 0)
        for _ in range(self.repeats):
            orders[tuple((to_numpy(buffer.sample(4).rows) - 2).tolist())] += 1
        assert_distributed(list(orders.values()))

    def test_one_pass_in_random_order(self) -> None:
        buffer = self.make(4, 6, sampler=Prioritized())
        buffer.update_priorities([2], [1e6])
        orders = dict.fromkeys(itertools.permutations(range(4)), 0)
        for _ in range(self.repeats):
            (sample,) = buffer.one_pass(4)
            orders[tuple((to_numpy(sample.rows) - 2).tolist())] += 1
        assert_distributed(list(orders.values()))

    # Recent ---------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize(("newest", "count"), [(4, 17), (4, 3), (100, 17), (1, 17)])
    def test_recent(self, newest: int, count: int) -> None:
        found = self.counts(self.make(10, count, sampler=Recent(newest)))
        chances = np.zeros(len(found))
        chances[-newest:] = 1
        assert_distributed(found, chances)

    def test_recent_without_replacement(self) -> None:
        buffer = self.make(10, 17, sampler=Recent(4, replacement=False))
        pairs = dict.fromkeys(itertools.combinations(range(13, 17), 2), 0)
        for _ in range(self.repeats):
            pairs[tuple(sorted(to_numpy(buffer.sample(2).rows).tolist()))] += 1
        assert_distributed(list(pairs.values()))

    # Windows --------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("lanes", [1, 2])
    def test_whole_windows_are_uniform_over_those_there_are(self, lanes: int) -> None:
        ends = [9, 10, 15, 20, 21]
        buffer = self.make(20, 28, ends=ends, lanes=lanes)
        found = self.counts(buffer, num_steps=3, at_end="whole")
        fine = [start + 2 * lanes < 28 and not {start, start + lanes} & set(ends) for start in range(8, 28)]
        assert 0 < sum(fine) < 18
        assert_distributed(found, np.array(fine, float))

    def test_whole_windows_out_of_step(self) -> None:
        buffer = self.make(20, 10, lanes=2, ends=[4])
        for number in range(10, 24):
            buffer.extend(items(number, number + 1, ends=[19]), lanes=[int(number % 3 == 0)])
        lane_of = {number: number % 2 if number < 10 else number % 3 == 0 for number in range(24)}
        fine = []
        for start in range(4, 24):
            lane = [number for number in range(start, 24) if lane_of[number] == lane_of[start]][:3]
            fine.append(len(lane) == 3 and not {4, 19} & set(lane[:2]))
        assert 0 < sum(fine) < 18
        assert_distributed(self.counts(buffer, num_steps=3, at_end="whole"), np.array(fine, float))

    @pytest.mark.parametrize("at_end", ["cross", "pad"])
    def test_other_windows_are_uniform(self, at_end: str) -> None:
        found = self.counts(self.make(10, 17, ends=[9, 12]), num_steps=3, at_end=at_end)
        chances = np.ones(10)
        if at_end == "cross":
            chances[-2:] = 0
        assert_distributed(found, chances)

    def test_windows_of_the_recent(self) -> None:
        """The newest that a window can begin with."""
        found = self.counts(self.make(10, 17, sampler=Recent(3)), num_steps=3)
        assert_distributed(found, [0, 0, 0, 0, 0, 1, 1, 1, 0, 0])

    def test_windows_where_there_are_next_to_none(self) -> None:
        """So that every item has to be looked at."""
        there = [300, 301, 900, 1777]
        ends = np.setdiff1d(np.arange(2000), there)
        how: dict[str, Any] = {"num_steps": 2, "at_end": "whole"}
        buffer = self.make(2000, 2000, ends=ends)
        found = np.concatenate([to_numpy(buffer.sample(8, **how).rows) for _ in range(self.repeats // 8)])
        assert set(found.tolist()) == set(there)
        assert_distributed([(found == number).sum() for number in there])
        buffer = self.make(2000, 2000, ends=ends, sampler=Prioritized(alpha=1, epsilon=0))
        buffer.update_priorities([300, 1777, 5], [3.0, 0.5, 100.0])
        found = np.concatenate([to_numpy(buffer.sample(8, **how).rows) for _ in range(self.repeats // 8)])
        assert set(found.tolist()) == set(there)
        assert_distributed([(found == number).sum() for number in there], [3, 1, 1, 0.5])
        buffer = self.make(2000, 2000, ends=ends, sampler=Uniform(replacement=False))
        assert sorted(to_numpy(buffer.sample(4, **how).rows).tolist()) == there
        assert len(set(to_numpy(buffer.sample(2, **how).rows).tolist())) == 2
        with pytest.raises(ValueError, match="^expected at most 4 draws without replacement, found 8$"):
            buffer.sample(8, **how)

    # Prioritized ----------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize(("capacity", "count"), [(21, 50), (21, 9), (16, 16), (300, 420)])
    def test_prioritized_by_the_exact_chances(self, capacity: int, count: int) -> None:
        buffer = self.make(capacity, count, sampler=Prioritized(alpha=0.7, beta=0.5, epsilon=0.01))
        random, size = np.random.default_rng(3), min(capacity, count)
        priorities = random.choice([0.25, 1, 2, 5], size)
        buffer.update_priorities(np.arange(count - size, count), priorities)
        chances = (priorities + 0.01) ** 0.7
        draws = max(MANY, 40 * size)
        assert_distributed(self.counts(buffer, draws), chances)
        changed = random.choice(size, size // 2, replace=False)
        priorities[changed] = 3
        buffer.update_priorities(count - size + changed, np.full(size // 2, 3.0))
        chances = (priorities + 0.01) ** 0.7
        assert_distributed(self.counts(buffer, draws), chances)
        buffer.extend(items(count, count + 5))
        highest = max(5, size > 0)
        chances = np.append(chances, np.full(5, (highest + 0.01) ** 0.7))[-min(capacity, size + 5) :]
        assert_distributed(self.counts(buffer, draws), chances)

    def test_weights(self) -> None:
        """``(1 / (n * P(i))) ** beta``, divided by the largest of the sample."""
        sampler = Prioritized(alpha=0.7, beta=0.5, epsilon=0.01)
        buffer = self.make(10, 17, sampler=sampler)
        priorities = np.array([0, 0.1, 0.2, 0.5, 1, 1, 2, 3, 5, 8])
        buffer.update_priorities(np.arange(7, 17), priorities)
        for beta in (0.5, 1.0, 0.0, 0.25):
            sampler.beta = beta
            sample = buffer.sample(32)
            chances = (priorities + 0.01) ** 0.7
            shares = (chances / chances.sum())[to_numpy(sample.rows) - 7]
            expected = (1 / (10 * shares)) ** beta
            np.testing.assert_allclose(to_numpy(sample.weights), expected / expected.max(), rtol=1e-5)
            assert to_numpy(sample.weights).max() == 1

    def test_alpha_0_is_uniform(self) -> None:
        buffer = self.make(10, 17, sampler=Prioritized(alpha=0, epsilon=0))
        buffer.update_priorities(np.arange(7, 12), np.array([0, 1e-9, 1, 50, 1e6]))
        assert_distributed(self.counts(buffer))
        assert to_numpy(buffer.sample(8).weights).tolist() == [1] * 8

    def test_priority_0(self) -> None:
        buffer = self.make(10, 17, sampler=Prioritized(alpha=1, epsilon=0))
        buffer.update_priorities([7, 11, 16], np.zeros(3))
        chances = np.ones(10)
        chances[[0, 4, 9]] = 0
        assert_distributed(self.counts(buffer), chances)
        buffer = self.make(10, 17, sampler=Prioritized(alpha=1, epsilon=0.5))
        buffer.update_priorities([7, 11, 16], np.zeros(3))
        assert_distributed(self.counts(buffer), np.where(chances == 0, 0.5, 1.5))

    @pytest.mark.parametrize("seed", range(5))
    def test_candidates_of_hardly_any_priority(self, seed: int) -> None:
        """Next to all of it is that of the newest items, which begin no window."""
        buffer = self.make(107, 100, sampler=Prioritized(alpha=1.0), seed=seed)
        buffer.update_priorities(np.arange(100), np.zeros(100))
        buffer.extend(items(100, 107))
        assert to_numpy(buffer.sample(32, num_steps=8).rows).max() < 100

    def test_settings_that_the_priorities_depend_on_cannot_be_changed(self) -> None:
        sampler = Prioritized(alpha=0.7, epsilon=0.1)
        for name in ("alpha", "epsilon"):
            with pytest.raises(AttributeError):
                setattr(sampler, name, 0.5)
        assert (sampler.alpha, sampler.epsilon) == (0.7, 0.1)

    def test_nothing_but_priority_0(self) -> None:
        buffer = self.make(4, 6, sampler=Prioritized(epsilon=0))
        buffer.update_priorities(np.arange(2, 6), np.zeros(4))
        for _ in range(2):
            with pytest.raises(ValueError, match="^no item has a priority above 0; update priorities, or give Priorit"):
                buffer.sample(2)
        assert sorted(row for sample in buffer.one_pass(4) for row in to_numpy(sample.rows).tolist()) == [2, 3, 4, 5]
        buffer.update_priorities([3], [2.0])
        assert set(to_numpy(buffer.sample(8).rows).tolist()) == {3}
        buffer.extend(items(6, 7))
        assert_distributed(self.counts(buffer, 400), [2**0.6, 0, 0, 2**0.6])

    def test_a_sample_in_place_of_its_rows(self) -> None:
        buffer = self.make(8, 8, sampler=Prioritized())
        with pytest.raises(TypeError, match=r"^expected rows as in Sample.rows, found the sample itself$"):
            buffer.update_priorities(buffer.sample(4), np.ones(4))

    def test_nothing_but_priority_0_among_windows(self) -> None:
        buffer = self.make(8, 8, ends=[0, 1, 4, 5, 6, 7], sampler=Prioritized(epsilon=0))
        buffer.update_priorities([2, 3], [0.0, 0.0])
        with pytest.raises(ValueError, match="fewer steps, or add more, or have Prioritized draw from more$"):
            buffer.sample(2, num_steps=2, at_end="whole")

    @pytest.mark.parametrize("scale", ["huge", "tiny"])
    def test_huge_and_tiny_priorities(self, scale: str) -> None:
        largest = float(np.finfo(self.floating).max)
        unit = largest / 1000 if scale == "huge" else 100 / largest
        buffer = self.make(10, 17, sampler=Prioritized(alpha=1, epsilon=0))
        buffer.update_priorities(np.arange(7, 17), unit * np.arange(10))
        assert_distributed(self.counts(buffer), np.arange(10))
        weights = buffer.sample(64)
        expected = (to_numpy(weights.rows) - 7) ** -0.4
        np.testing.assert_allclose(to_numpy(weights.weights), expected / expected.max(), rtol=1e-4)

    def test_one_that_outweighs_all(self) -> None:
        buffer = self.make(300, 300, sampler=Prioritized(alpha=1, epsilon=0))
        buffer.update_priorities([123], [1e6])
        assert self.counts(buffer)[123] > MANY - 20

    def test_prioritized_windows(self) -> None:
        buffer = self.make(10, 17, ends=[9, 12], sampler=Prioritized(alpha=1, epsilon=0))
        priorities = np.array([1, 2, 3, 4, 5, 1, 2, 3, 4, 5.0])
        buffer.update_priorities(np.arange(7, 17), priorities)
        fine = [start + 1 < 17 and start not in (9, 12) for start in range(7, 17)]
        found = self.counts(buffer, num_steps=2, at_end="whole")
        assert_distributed(found, priorities * fine)
        weights = buffer.sample(32, num_steps=2, at_end="whole")
        chosen = priorities[to_numpy(weights.rows) - 7]
        np.testing.assert_allclose(to_numpy(weights.weights), (chosen / chosen.min()) ** -0.4, rtol=1e-5)

    def test_prioritized_after_clear(self) -> None:
        buffer = self.make(10, 17, sampler=Prioritized(alpha=1, epsilon=0))
        buffer.update_priorities(np.arange(7, 17), np.full(10, 50.0))
        buffer.clear()
        buffer.extend(items(17, 20))
        buffer.update_priorities([17, 18], [1.0, 4.0])
        assert_distributed(self.counts(buffer), [1, 4, 50])

    # Samplers of one's own ------------------------------------------------------------------------------------------

    def test_places_that_are_not_there_are_drawn_anew(self) -> None:
        assert_distributed(self.counts(self.make(sampler=Wild())))
        found = self.counts(self.make(10, 17, ends=[9, 12], sampler=Wild()), num_steps=2, at_end="whole")
        assert_distributed(found, [1, 1, 0, 1, 1, 0, 1, 1, 1, 0])

    @pytest.mark.parametrize("place", [-1, 10, 2**31 - 1, -(2**31)])
    def test_nothing_but_places_that_are_not_there(self, place: int) -> None:
        class Lost(Sampler):
            def draw(self, count: int, items: range) -> Any:
                return self.backend.from_numpy(np.full(count, place, np.int32))

        buffer = self.make(sampler=Lost())
        for _ in range(3):
            with pytest.raises(ValueError, match=f"^expected places below 10 from Lost.draw, found none .*{place}, "):
                buffer.sample(4)

    def test_a_draw_of_ones_own_is_not_trusted_for_that_of_the_class_above(self) -> None:
        class Beyond(Uniform):
            def draw(self, count: int, items: range) -> Any:
                return super().draw(count, items) * 2

        assert_distributed(self.counts(self.make(sampler=Beyond())), [1, 0] * 5)

    def test_no_more_is_drawn_than_there_are_items(self) -> None:
        """But for a few; beyond that a look at every item is less."""
        drawn = []

        class Counting(Uniform):
            def draw(self, count: int, items: range) -> Any:
                drawn.append(count)
                return super().draw(count, items)

        buffer = self.make(10, 10, ends=[*range(7), 8, 9], sampler=Counting())  # one window of ten
        for _ in range(2):
            found = buffer.sample(40_000, num_steps=2, at_end="whole").rows
            assert set(to_numpy(found).tolist()) == {7}
        assert max(drawn) <= 1 << 16

    def test_chances_of_one_s_own(self) -> None:
        chances = np.array([1, 2, 3, 4, 0, 1, 2, 3, 4, 0])
        assert_distributed(self.counts(self.make(sampler=Chosen(chances))), chances)
        ends = np.setdiff1d(np.arange(17), [8, 10])
        found = self.counts(self.make(ends=ends, sampler=Chosen(chances)), num_steps=2, at_end="whole")
        assert_distributed(found, [0, 2, 0, 4, 0, 0, 0, 0, 0, 0])

    @pytest.mark.parametrize(("size", "count"), [(6, 2), (4, 3)], ids=["few of many", "most of them"])
    def test_chances_of_one_s_own_without_replacement(self, size: int, count: int) -> None:
        """As if each was drawn in turn from those that are left, in proportion to their chances."""
        chances = np.array([20.0, *range(1, size)])
        buffer = self.make(size, size + 3, sampler=Chosen(chances, distinct=True))
        expected = dict.fromkeys(itertools.combinations(range(size), count), 0.0)
        for order in itertools.permutations(range(size), count):
            left, chance = chances.sum(), 1.0
            for place in order:
                chance *= chances[place] / left
                left -= chances[place]
            expected[tuple(sorted(order))] += chance
        found = dict.fromkeys(expected, 0)
        for _ in range(4 * self.repeats):
            found[tuple(sorted((to_numpy(buffer.sample(count).rows) - 3).tolist()))] += 1
        with_it = [chosen for chosen in expected if 0 in chosen]
        assert_distributed([found[chosen] for chosen in with_it], [expected[chosen] for chosen in with_it])
        shares = [sum(table[chosen] for chosen in with_it) / sum(table.values()) for table in (found, expected)]
        assert abs(shares[0] - shares[1]) < 5 * (shares[1] * (1 - shares[1]) / (4 * self.repeats)) ** 0.5

    @pytest.mark.parametrize(
        "places",
        [
            lambda count, xp: np.zeros(count - 1, np.int64),
            lambda count, xp: np.zeros(count + 1, np.int64),
            lambda count, xp: np.zeros((count, 1), np.int64),
            lambda count, xp: np.zeros(count, np.float32),
            lambda count, xp: np.zeros(count, bool),
            lambda count, xp: [0] * count,
            lambda count, xp: None,
        ],
        ids=["too few", "too many", "two axes", "floats", "flags", "a list", "nothing"],
    )
    def test_a_sampler_that_draws_no_places(self, places: Any) -> None:
        class Odd(Sampler):
            def draw(self, count: int, items: range) -> Any:
                return places(count, None)

        buffer = self.make(sampler=Odd())
        with pytest.raises(TypeError, match="^expected 4 places from Odd.draw, a flat array of integers, found "):
            buffer.sample(4)

    @pytest.mark.parametrize("how", [{}, {"num_steps": 3, "at_end": "whole"}], ids=str)
    def test_a_sampler_that_draws_in_order(self, how: Any) -> None:
        """Where more is drawn than is needed, since some draws are of no use, the order favours none."""

        class Stratified(Sampler):
            def draw(self, count: int, items: range) -> Any:
                return self.backend.as_index((np.arange(count) + 0.5) * len(items) // count)

        buffer = self.make(1000, 1000, ends=range(4, 1000, 5), sampler=Stratified())
        rows = np.concatenate([to_numpy(buffer.sample(100, **how).rows) for _ in range(20)])
        old, new = np.count_nonzero(rows < 500), np.count_nonzero(rows >= 500)
        assert abs(old - new) < 200

    def test_a_sampler_that_draws_arrays_of_another_library(self) -> None:
        other = pytest.importorskip("torch" if self.make().backend.name != "torch" else "array_api_strict")

        class Odd(Sampler):
            def draw(self, count: int, items: range) -> Any:
                return other.full((count,), 3, dtype=other.int64)

        buffer = self.make(10, 10, sampler=Odd())
        assert to_numpy(buffer.sample(4).rows).tolist() == [3, 3, 3, 3]
        assert library_of(buffer.sample(4).rows) == buffer.backend.library

    @pytest.mark.parametrize("is_inside", [False, True])
    @pytest.mark.parametrize("num_steps", [None, 2])
    def test_a_sampler_of_the_buffer_s_own_library(self, is_inside: bool, num_steps: int | None) -> None:
        """Whatever library places and chances are computed with."""

        class Odd(Sampler):
            inside = is_inside

            def draw(self, count: int, items: range) -> Any:
                return buffer.backend.as_index(np.full(count, 3))

            def weights(self, places: Any, items: range) -> Any:
                return buffer.backend.from_numpy(np.full(places.shape[0], 0.5, np.float32))

        buffer = self.make(10, 10, sampler=Odd())
        sample = buffer.sample(4, num_steps=num_steps, at_end="cross" if num_steps is None else "whole")
        for found, expected in ((sample.rows, [3] * 4), (sample.weights, [0.5] * 4)):
            assert to_numpy(found).tolist() == expected
            assert library_of(found) == buffer.backend.library

    @pytest.mark.parametrize("given", ["of NumPy", "of the buffer", "of bookkeeping", "integers", "of another library"])
    def test_weights_of_one_s_own(self, given: str) -> None:
        """Whatever arrays they are, the sample has its own in the library of the buffer, on its device."""
        weighted = self.make().backend
        if given == "of another library":
            other = pytest.importorskip("torch" if weighted.name != "torch" else "array_api_strict")
            table = other.asarray([1.0, 0.5, 0.25, 0.0])
        else:
            makes: dict[str, Any] = {"of the buffer": weighted, "of bookkeeping": weighted.bookkeeping}
            table = np.asarray([1, 0.5, 0.25, 0], np.int32 if given == "integers" else np.float32)
            table = makes[given].from_numpy(table) if given in makes else table

        class Weighted(Uniform):
            def weights(self, places: Any, items: range) -> Any:
                return table

        buffer = self.make(sampler=Weighted())
        expected = to_numpy(table).tolist()
        for how in ({}, {"num_steps": 2, "at_end": "pad"}):
            found = buffer.sample(4, **how).weights
            assert select_backend(found) is buffer.backend
            assert to_numpy(found).dtype == np.float32
            assert to_numpy(found).tolist() == expected
            assert to_numpy(table).tolist() == expected
            if buffer.backend.has_views:
                with buffer.backend.stream():
                    found[...] = buffer.backend.xp.zeros_like(found)

    @pytest.mark.parametrize("weights", [np.ones(3, np.float32), np.ones((4, 1)), [1.0] * 4, 1.0], ids=repr)
    def test_weights_that_are_none(self, weights: Any) -> None:
        class Odd(Uniform):
            def weights(self, places: Any, items: range) -> Any:
                return weights

        buffer = self.make(sampler=Odd())
        with pytest.raises(TypeError, match="^expected 4 weights from Odd.weights, a flat array, found "):
            buffer.sample(4)

    def test_a_sample_is_no_view_of_what_a_sampler_drew(self) -> None:
        class Own(Sampler):
            def draw(self, count: int, items: range) -> Any:
                if not hasattr(self, "places"):
                    self.places = self.random.integers(len(items), count)
                return self.places

        buffer = self.make(10, 10, sampler=Own())
        first = to_numpy(buffer.sample(4).rows).tolist()
        if buffer.backend.has_views:
            rows = buffer.sample(4).rows
            with buffer.backend.stream():
                rows[...] = buffer.backend.xp.zeros_like(rows)
        assert to_numpy(buffer.sample(4).rows).tolist() == first

    def test_what_a_sampler_is_told(self) -> None:
        class Told(Sampler):
            def __init__(self) -> None:
                self.log: list[Any] = []

            def draw(self, count: int, items: range) -> Any:
                self.log.append(("draw", count, items))
                return self.random.integers(len(items), count)

            def weights(self, places: Any, items: range) -> Any:
                self.log.append(("weights", items))
                return places

            def added(self, items: range) -> None:
                self.log.append(("added", items))

            def update(self, rows: Any, priorities: Any) -> None:
                self.log.append(("update", to_numpy(rows).tolist(), to_numpy(priorities).tolist()))

            def clear(self) -> None:
                self.log.append("clear")

        sampler = Told()
        buffer = self.make(4, 3, sampler=sampler)
        assert (sampler.capacity, sampler.backend) == (4, buffer.backend.bookkeeping)
        buffer.add({"x": 3, "terminated": False})
        buffer.extend(items(4, 6))
        buffer.extend(items(6, 6))
        sample = buffer.sample(3)
        assert (to_numpy(sample.weights) + 2).tolist() == to_numpy(sample.rows).tolist()
        buffer.update_priorities([1, 2, 5, 4], [1.0, 2.0, 3.0, 4.0])
        buffer.extend(items(6, 17))
        buffer.clear()
        assert sampler.log == [
            ("added", range(3)),
            ("added", range(3, 4)),
            ("added", range(4, 6)),
            ("draw", 3, range(2, 6)),
            ("weights", range(2, 6)),
            ("update", [2, 1, 0], [2.0, 3.0, 4.0]),
            ("added", range(13, 17)),
            "clear",
        ]


class TestNumpy(OnNumpy, SamplersContract):
    repeats = 1000


class TestPlainNumpy(OnPlainNumpy, SamplersContract):
    pass


class TestTorch(OnTorch, SamplersContract):
    pass


class TestTorchAsOnADevice(OnTorchAsOnADevice, SamplersContract):
    pass


class TestJax(OnJax, SamplersContract):
    pass


class TestJaxAsOnADevice(OnJaxAsOnADevice, SamplersContract):
    test_windows_where_there_are_next_to_none = None  # every size that is tried is compiled
    test_nothing_but_priority_0_among_windows = None

    @pytest.mark.parametrize(("capacity", "count"), [(21, 50)])
    def test_prioritized_by_the_exact_chances(self, capacity: int, count: int) -> None:
        super().test_prioritized_by_the_exact_chances(capacity, count)


class TestStrict(OnStrict, SamplersContract):
    pass


class TestStrictWithout64Bits(OnStrictWithout64Bits, SamplersContract):
    pass


class TestCupyOnAStandIn(OnACupyStandIn, SamplersContract):
    pass


@pytest.mark.gpu
class TestCupy(OnCupy, SamplersContract):
    pass


@pytest.mark.gpu
class TestTorchCuda(OnTorchCuda, SamplersContract):
    pass


class TestSettings:
    """What is refused before there is a buffer."""

    @pytest.mark.parametrize("newest", [0, -1, 2.5, True, "3", None])
    def test_recent_of_none(self, newest: Any) -> None:
        with pytest.raises(ValueError, match=f"^expected newest to be an int of 1 or more, found {newest!r}$"):
            Recent(newest)

    def test_settings_that_may_be_changed_are_checked_then_too(self) -> None:
        """Or a buffer could be saved that no load makes again."""
        recent, prioritized = Recent(3), Prioritized()
        with pytest.raises(ValueError, match="^expected newest to be an int of 1 or more, found 2.5$"):
            recent.newest = 2.5
        with pytest.raises(ValueError, match="^expected a finite beta of 0 or more, found -1$"):
            prioritized.beta = -1
        assert (recent.newest, prioritized.beta) == (3, 0.4)
        assert repr(recent) == "Recent(newest=3, replacement=True)"
        assert repr(prioritized) == "Prioritized(alpha=0.6, beta=0.4, epsilon=1e-06)"

    @pytest.mark.parametrize("name", ["alpha", "beta", "epsilon"])
    @pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
    def test_settings_that_are_none(self, name: str, value: float) -> None:
        with pytest.raises(ValueError, match=f"^expected a finite {name} of 0 or more, found {value}$"):
            Prioritized(**{name: value})

    def test_a_sampler_has_to_draw(self) -> None:
        with pytest.raises(TypeError, match="draw"):
            Sampler()  # type: ignore[abstract]
