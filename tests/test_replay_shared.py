"""Shared observations and stacks: every item comes back just as it was added, and takes the room that it should."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anystore import ArraySpec
from anystore.convert import to_numpy
from anystore.replay import Prioritized, ReplayBuffer, Uniform
from tests.contract import LIBRARIES, foreign_arrays
from tests.items import assert_same, host
from tests.on_backends import (
    OnACupyStandIn,
    OnCupy,
    OnDisk,
    OnJax,
    OnJaxAsOnADevice,
    OnNumpy,
    OnPlainNumpy,
    OnStrict,
    OnTorch,
    OnTorchAsOnADevice,
    OnTorchCuda,
)
from tests.transitions import DEPTH, LAYOUTS, SPEC, STACKS, Walk, part, spec_of, together

FLAG, NUMBER = ArraySpec((), "bool"), ArraySpec((), "float32")
SHARED = LAYOUTS["shared"]
BOTH = LAYOUTS["shared stacks"]


class Transition(NamedTuple):
    """A spec whose parts have positions and names."""

    seen: Any
    done: Any
    then: Any


def stacked(first: int, last: int, depth: int = 3) -> dict[str, Any]:
    """Steps of one episode, of stacks of frames that are numbers, the first one repeated before it."""
    numbers = np.maximum(np.arange(first, last)[:, None] + np.arange(1 - depth, 1), 0).astype(np.float32)
    after = np.concatenate([numbers[:, 1:], np.arange(first + 1, last + 1, dtype=np.float32)[:, None]], axis=1)
    return {"obs": numbers, "next_obs": after, "terminated": np.zeros(last - first, bool)}


STACKED = {"obs": ArraySpec((3,), "float32"), "next_obs": ArraySpec((3,), "float32"), "terminated": FLAG}
STACKED_LAYOUT: dict[str, Any] = {"shared": {"next_obs": "obs"}, "stacks": {"obs": 0}}


class TestWarnings:
    """Of observations that do not go on from one another, where most do not."""

    SPEC: ClassVar[dict[str, Any]] = {"obs": NUMBER, "next_obs": NUMBER, "terminated": FLAG}

    @staticmethod
    def steps(lanes: int, count: int, length: int = 1000) -> dict[str, Any]:
        """Steps before lanes; episodes of so many steps."""
        step = np.arange(count)[:, None] + 1000 * np.arange(lanes)
        obs = (step + np.arange(count)[:, None] // length * 10).astype(np.float32)
        ends = np.broadcast_to(np.arange(count)[:, None] % length == length - 1, obs.shape)
        return {"obs": obs.ravel(), "next_obs": obs.ravel() + 1, "terminated": ends.ravel().copy()}

    def buffer(self, lanes: int = 1) -> ReplayBuffer:
        return ReplayBuffer(self.SPEC, 1000, lanes=lanes, shared={"next_obs": "obs"})

    def test_several_environments_in_one_lane(self):
        batch = self.steps(4, 200)
        buffer = self.buffer()

        def step_by_step() -> None:
            for start in range(0, 800, 4):
                buffer.extend({path: leaf[start : start + 4] for path, leaf in batch.items()})

        with pytest.warns(RuntimeWarning, match="most items do not begin with what followed.*lanes=") as found:
            step_by_step()
        assert len(found) == 1
        with pytest.warns(RuntimeWarning, match="lanes=") as found:
            self.buffer().extend(batch)
        assert found[0].filename == __file__

    def test_nothing_is_lost_where_warnings_are_errors(self):
        batch, buffer = self.steps(4, 200), self.buffer()
        with pytest.raises(RuntimeWarning, match="lanes="):
            buffer.extend(batch)
        assert len(buffer) == 800
        buffer.clear()
        with pytest.raises(RuntimeWarning, match="lanes="):  # once more, for what comes then
            buffer.extend(batch)

    def test_an_item_at_a_time(self):
        batch, buffer = self.steps(4, 50), self.buffer()

        def one_by_one() -> None:
            for row in range(200):
                buffer.add({path: leaf[row] for path, leaf in batch.items()})

        with pytest.warns(RuntimeWarning, match="lanes=") as found:
            one_by_one()
        assert [each.filename for each in found] == [__file__]

    def test_many_lanes_that_begin_anew(self):
        buffer, ends = self.buffer(lanes=256), np.zeros(256, bool)
        for obs in np.arange(3 * 256, dtype=np.float32).reshape(3, 256):
            buffer.extend({"obs": obs, "next_obs": obs + 0.5, "terminated": ends})

    def test_lanes_before_steps(self):
        batch = {path: leaf.reshape(200, 4).T.ravel() for path, leaf in self.steps(4, 200).items()}
        with pytest.warns(RuntimeWarning, match="steps before lanes"):
            self.buffer(lanes=4).extend(batch)

    def test_nothing_where_episodes_end_or_most_go_on(self):
        self.buffer(lanes=4).extend(self.steps(4, 200))
        self.buffer().extend(self.steps(1, 900, length=1))  # each the end of an episode
        few = self.steps(1, 900, length=3)
        self.buffer().extend({**few, "terminated": np.zeros(900, bool)})  # a third of them begin another, unsaid
        buffer = self.buffer()
        for start in range(0, 900, 3):
            buffer.extend({path: leaf[start : start + 3] for path, leaf in few.items()})
            buffer.end_episode()


class SharedContract:
    """Subclassed per backend."""

    options: dict[str, Any]

    def make(self, capacity: int, spec: Any = SPEC, **options: Any) -> ReplayBuffer:
        return ReplayBuffer(spec, capacity, **{"seed": 0, **self.options, **options})

    def numbers_of(self, buffer: ReplayBuffer, items: list[Any]) -> list[int]:
        """The numbers of the items that a pass has, each of which is the one of `items`, all that were ever added."""
        found: list[int] = []
        for sample in buffer.one_pass(1 if buffer.backend.name == "jax" else 8):
            rows = to_numpy(sample.rows).tolist()
            assert_same(sample.items, together([items[row] for row in rows]))
            found += rows
        assert len(found) == len(set(found))
        return sorted(found)

    # The room that it takes -----------------------------------------------------------------------------------------

    def test_next_observations_take_no_room(self) -> None:
        observation, rest = 4 * 2 * 4 + 2 * 3 * 4 + 4, 4 + 4 + 1 + 1
        plain, shared = self.make(1000), self.make(1000, **SHARED)
        assert plain.nbytes == 1000 * (2 * observation + rest)
        marks = 1 + 1 + 4
        assert shared.nbytes == 1000 * (observation + rest + marks) + 2 * observation
        assert set(shared.storage.data_spec) == {"obs/camera", "obs/sensors/radar", "obs/sensors/speed"} | set(SPEC) - {
            "obs",
            "next_obs",
        }

    def test_stacks_take_the_room_of_a_frame(self) -> None:
        frame, rest = 2 * 4 + 2 * 4 + 4, 4 + 4 + 1 + 1 + 1 + 1 + 4
        buffer = self.make(1000, **BOTH)
        assert buffer.nbytes == 1000 * (frame + rest) + 2 * DEPTH * frame
        assert buffer.storage.data_spec["obs/camera"] == ArraySpec((2,), "int32")
        assert buffer.storage.data_spec["obs/sensors/radar"] == ArraySpec((2,), "float32")

    def test_room_does_not_grow_with_time(self) -> None:
        """Records of episodes that are gone are used again, however short the episodes, and however they end."""
        buffer, walk = self.make(12, **BOTH), Walk()
        items: list[Any] = []
        taken = []
        for turn in range(12):
            batch = [
                item for end in ("terminated", None, "truncated", None) for item in walk.episode(turn % 3 + 1, end)
            ]
            buffer.extend(together(batch))
            items += batch
            self.numbers_of(buffer, items)
            taken.append(buffer.nbytes)
        assert taken[-1] == taken[3]

    # As they were added ---------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("shape", [(4, 3, 2), (3, 4, 2), (3, 2, 4), (4,), (1, 3), (2,)], ids=str)
    @pytest.mark.parametrize("negative", [False, True])
    def test_stacks_along_any_axis(self, shape: tuple[int, ...], negative: bool) -> None:
        axis = shape.index(4) if 4 in shape else 0
        depth, random = shape[axis], np.random.default_rng(0)
        frames = random.integers(0, 255, (20 + depth, *shape[:axis], *shape[axis + 1 :])).astype(np.uint8)
        stacks = [np.stack(list(frames[start : start + depth]), axis=axis) for start in range(18)]
        items = [{"obs": stacks[n], "next_obs": stacks[n + 1], "done": np.bool_(n in (4, 11))} for n in range(17)]
        spec = {"obs": ArraySpec(shape, "uint8"), "next_obs": ArraySpec(shape, "uint8"), "done": FLAG}
        for shared in ({}, {"shared": {"next_obs": "obs"}}):
            names = [name for name in spec if shared or name != "next_obs"]
            kept = [{name: item[name] for name in names} for item in items]
            buffer = self.make(
                11,
                {name: spec[name] for name in names},
                stacks={"obs": axis - len(shape) if negative else axis},
                terminated="done",
                **shared,
            )
            buffer.extend(together(kept[:9]))
            for item in kept[9:]:
                buffer.add(item)
            found = self.numbers_of(buffer, kept)
            assert set(range(6 + depth - 1, 17)) <= set(found) <= set(range(6, 17))

    @pytest.mark.parametrize("shape", [(4, 3, 2), (3, 4, 2), (3, 2, 4), (4,)], ids=str)
    def test_stacks_that_do_not_move_on_are_refused_wherever_they_differ(self, shape: tuple[int, ...]) -> None:
        axis = shape.index(4)
        spec = {"obs": ArraySpec(shape, "uint8"), "next_obs": ArraySpec(shape, "uint8")}
        buffer = self.make(5, spec, stacks={"obs": axis}, shared={"next_obs": "obs"})
        obs = np.random.default_rng(0).integers(0, 255, shape).astype(np.uint8)
        for place in np.ndindex(*shape):
            after = np.roll(obs, -1, axis)
            after[place] += 1
            if place[axis] == 3:
                buffer.add({"obs": obs, "next_obs": after})
            else:
                with pytest.raises(ValueError, match="^next_obs: expected the frames of obs moved on by one"):
                    buffer.add({"obs": obs, "next_obs": after})

    @pytest.mark.parametrize("dtype", ["bool", "complex64", "bfloat16", "float8_e5m2"])
    def test_frames_of_any_dtype(self, dtype: str) -> None:
        spec = {"obs": ArraySpec((2, 3), dtype), "next_obs": ArraySpec((2, 3), dtype), "done": FLAG}
        try:
            buffer = self.make(11, spec, stacks={"obs": 1}, shared={"next_obs": "obs"}, terminated="done")
        except ValueError as error:
            assert f" has no {dtype};" in str(error)  # noqa: PT017
            assert self.backend in ("cupy", "array_api_strict")
            assert dtype != "bool"
            return
        frames = np.random.default_rng(0).integers(0, 2, (20, 2)).astype(spec["obs"].dtype)
        stacks = [np.stack(list(frames[start : start + 3]), axis=1) for start in range(18)]
        items = [{"obs": stacks[n], "next_obs": stacks[n + 1], "done": np.bool_(n in (4, 11))} for n in range(17)]
        for item in items:
            buffer.add(item)
        assert set(self.numbers_of(buffer, items)) >= set(range(6 + 2, 17))

    @pytest.mark.parametrize("layout", ["shared", "stacks", "shared stacks"])
    def test_one_by_one_as_in_batches(self, layout: str) -> None:
        buffers = [self.make(14, spec_of(layout), **LAYOUTS[layout]) for _ in range(2)]
        walk = Walk()
        items = [
            item
            for length, end in ((3, "terminated"), (4, None), (2, "truncated"), (9, None))
            for item in walk.episode(length, end)
        ]
        items = [part(item, layout) for item in items]
        buffers[0].extend(together(items))
        for item in items:
            buffers[1].add(item)
        found = [self.numbers_of(buffer, items) for buffer in buffers]
        assert found[0] == found[1] == list(range(4 + (3 if "stacks" in layout else 0), 18))
        for how in ({"num_steps": 3, "at_end": "whole"}, {"n_step": 3}):
            one, other = (sorted_by_rows(next(buffer.one_pass(64, **how))) for buffer in buffers)
            if layout != "stacks" or "n_step" not in how:
                assert_same(one, other)

    def test_a_running_episode_longer_than_the_ring(self) -> None:
        """Of its oldest items frames are missing, and just these are left out; all others are whole."""
        buffer = self.make(8, STACKED, **STACKED_LAYOUT)
        values = stacked(0, 30)
        items = [{name: leaf[n] for name, leaf in values.items()} for n in range(30)]
        for number, item in enumerate(items):
            buffer.add(item)
            total = number + 1
            oldest = 0 if total <= 8 else total - 8 + 2
            assert self.numbers_of(buffer, items) == list(range(oldest, total))

    def test_episodes_that_begin_at_the_ring_s_old_end(self) -> None:
        walk = Walk()
        items = [item for length in (4, 9, 5, 6) for item in walk.episode(length, "terminated")]
        buffer = self.make(10, **BOTH)
        for number, item in enumerate(items):
            buffer.add(item)
            total = number + 1
            certain = range(0 if total <= 10 else total - 10 + DEPTH - 1, total)
            assert set(certain) <= set(self.numbers_of(buffer, items))

    def test_after_clear_nothing_is_missing(self) -> None:
        buffer = self.make(8, STACKED, **STACKED_LAYOUT)
        values = stacked(0, 40)
        items = [{name: leaf[n] for name, leaf in values.items()} for n in range(40)]
        buffer.extend(together(items[:19]))
        buffer.clear()
        for number in range(19, 30):
            buffer.add(items[number])
            oldest = 19 if number < 27 else number - 7 + 2
            assert self.numbers_of(buffer, items) == list(range(oldest, number + 1))

    @pytest.mark.parametrize("layout", ["shared", "shared stacks"])
    def test_an_episode_that_is_cut_and_goes_on(self, layout: str) -> None:
        """By end_episode, which says so of an environment that is the same afterwards."""
        buffer, walk = self.make(12, **LAYOUTS[layout]), Walk()
        items = [walk.step() for _ in range(8)]
        buffer.extend(together(items[:4]))
        buffer.end_episode()
        items[3] = {**items[3], "truncated": np.bool_(True)}
        buffer.extend(together(items[4:]))
        assert self.numbers_of(buffer, items) == list(range(8))
        found = [
            row for sample in buffer.one_pass(1, num_steps=2, at_end="whole") for row in to_numpy(sample.rows).tolist()
        ]
        assert sorted(found) == [0, 1, 2, 4, 5, 6]

    def test_what_is_the_same_by_accident(self) -> None:
        """Observations that are all the same tell no episodes apart, and need not."""
        spec = {"obs": ArraySpec((3,), "uint8"), "next_obs": ArraySpec((3,), "uint8"), "terminated": FLAG}
        item = {"obs": np.zeros(3, np.uint8), "next_obs": np.zeros(3, np.uint8), "terminated": np.bool_(False)}
        last = {**item, "terminated": np.bool_(True)}
        items = [item, item, last, item, last, last, item, item, item, item]
        buffer = self.make(7, spec, **STACKED_LAYOUT)
        for each in items:
            buffer.add(each)
        self.numbers_of(buffer, items)
        found = [
            row for sample in buffer.one_pass(1, num_steps=2, at_end="whole") for row in to_numpy(sample.rows).tolist()
        ]
        assert sorted(found) == [6, 7, 8]

    def test_what_is_no_number(self) -> None:
        """NaN goes on from NaN, and 0.0 not from -0.0."""
        spec = {"obs": NUMBER, "next_obs": NUMBER, "terminated": FLAG}
        values = np.float32([[1, np.nan], [np.nan, 0.0], [-0.0, 2], [2, np.inf], [np.inf, np.nan]])
        items = [{"obs": one, "next_obs": other, "terminated": np.bool_(False)} for one, other in values]
        buffer = self.make(8, spec, **SHARED)
        buffer.extend(together(items))
        found = {}
        for sample in buffer.one_pass(1):
            found[int(to_numpy(sample.rows)[0])] = to_numpy(sample.items["next_obs"]).view(np.uint32)[0]
        assert [found[n] for n in range(5)] == values[:, 1].view(np.uint32).tolist()
        whole = [
            row for sample in buffer.one_pass(1, num_steps=2, at_end="whole") for row in to_numpy(sample.rows).tolist()
        ]
        assert sorted(whole) == [0, 2, 3]

    @pytest.mark.parametrize("lanes", [2, 3])
    def test_lanes_out_of_step(self, lanes: int) -> None:
        random = np.random.default_rng(lanes)
        buffer = self.make(12 + 3 * lanes, **BOTH, lanes=lanes)
        walks, items = [Walk(1000 * lane) for lane in range(lanes)], []
        for _ in range(30):
            chosen = np.flatnonzero(random.random(lanes) < 0.7)
            batch = [walks[lane].step(random.choice([None, None, None, "terminated", "truncated"])) for lane in chosen]
            if batch:
                buffer.extend(together(batch), lanes=chosen)
                items += batch
        found = self.numbers_of(buffer, items)
        assert len(found) >= 9

    def test_a_pass_during_which_frames_are_overwritten(self) -> None:
        """Lanes out of step, so that what loses its frames is anywhere: it is left out then, and not made up."""
        buffer = self.make(12, STACKED, **STACKED_LAYOUT, lanes=2)
        counts, items = [0, 100], []

        def add(lane: int) -> None:
            value = stacked(counts[lane], counts[lane] + 1)
            counts[lane] += 1
            buffer.extend(value, lanes=[lane])
            items.append({name: leaf[0] for name, leaf in value.items()})

        for lane in (0, 0, 1, 1, 0, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1):
            add(lane)
        found = []
        for sample in buffer.one_pass(1):
            (row,) = to_numpy(sample.rows).tolist()
            assert_same(sample.items, together([items[row]]))
            found.append(row)
            if len(found) == 2:
                for _ in range(3):
                    add(1)
        assert set(found) >= {13, 14}

    # Nests and parts ------------------------------------------------------------------------------------------------

    def test_a_part_of_what_follows(self) -> None:
        """Only some of the leaves of the next observation are shared; the others are kept as they are."""
        buffer, walk = self.make(9, shared={"next_obs/camera": "obs/camera"}, stacks={"obs/camera": 0}), Walk()
        items = [item for length in (5, 3, 4) for item in walk.episode(length, None)]
        for number, item in enumerate(items):
            item["next_obs"] = {
                **item["next_obs"],
                "sensors": {"radar": np.full((2, 3), number, np.float32), "speed": np.int32(number)},
            }
        buffer.extend(together(items))
        assert set(range(6, 12)) <= set(self.numbers_of(buffer, items))

    @pytest.mark.parametrize("names", [("0", "2"), ("seen", "then")])
    def test_parts_of_tuples(self, names: tuple[str, str]) -> None:
        state = np.arange(14, dtype=np.float32).reshape(7, 2)
        leaves = {"image": state[:-1]}, np.arange(6) == 3, {"image": state[1:]}
        specs = {"image": ArraySpec((2,), "float32")}, FLAG, {"image": ArraySpec((2,), "float32")}
        kind: Any = Transition if names[0] == "seen" else lambda *parts: parts
        buffer = self.make(
            6, kind(*specs), shared={names[1]: names[0]}, terminated="done" if names[0] == "seen" else "1"
        )
        buffer.extend(kind(*leaves))
        (sample,) = buffer.one_pass(6)
        order = np.argsort(to_numpy(sample.rows))
        expected = kind(
            {"image": state[:-1][np.argsort(order)]},
            (np.arange(6) == 3)[np.argsort(order)],
            {"image": state[1:][np.argsort(order)]},
        )
        assert_same(sample.items, expected)

    def test_an_item_that_is_a_single_stack(self) -> None:
        buffer = self.make(6, ArraySpec((3,), "float32"), stacks={"": 0})
        items = [np.float32([n - 2, n - 1, n]) for n in range(9)]
        buffer.extend(np.stack(items[:4]))
        for item in items[4:]:
            buffer.add(item)
        assert self.numbers_of(buffer, items) == [5, 6, 7, 8]

    # Values ---------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("library", LIBRARIES)
    def test_takes_values_of_any_library(self, library: str) -> None:
        buffer = self.make(8, STACKED, **STACKED_LAYOUT)
        for value in (stacked(0, 4), stacked(4, 7)):
            buffer.extend({name: foreign_arrays(library, leaf) for name, leaf in value.items()})
        buffer.add({name: foreign_arrays(library, leaf[0]) for name, leaf in stacked(7, 8).items()})
        values = stacked(0, 8)
        items = [{name: leaf[n] for name, leaf in values.items()} for n in range(8)]
        assert self.numbers_of(buffer, items) == list(range(8))
        whole = [
            row for sample in buffer.one_pass(1, num_steps=8, at_end="whole") for row in to_numpy(sample.rows).tolist()
        ]
        assert whole == [0]

    def test_takes_values_of_its_own_library(self) -> None:
        buffer, walk = self.make(12, **BOTH), Walk()
        items = walk.episode(5, "terminated")
        buffer.extend(together(items))
        sample = sorted_by_rows(next(buffer.one_pass(8)))
        move = buffer.backend.from_numpy
        buffer.extend({name: map_leaves(move, leaf) for name, leaf in sample.items()})
        assert self.numbers_of(buffer, items + items) == list(range(10))

    def test_values_that_are_converted_first(self) -> None:
        """What items go on from is compared as it is stored."""
        spec = {
            "obs": ArraySpec((), "float16" if self.has_float16 else "float32"),
            "next_obs": ArraySpec((), "float16" if self.has_float16 else "float32"),
            "terminated": FLAG,
        }
        buffer = self.make(8, spec, **SHARED)
        value = np.array([1 / 3, 2 / 3, 1.1, 4 / 3])
        nearly = np.array([2 / 3, 1.1, 4 / 3, 5 / 3]) + 1e-9
        buffer.extend({"obs": value, "next_obs": nearly, "terminated": np.zeros(4, bool)})
        whole = [
            row for sample in buffer.one_pass(1, num_steps=4, at_end="whole") for row in to_numpy(sample.rows).tolist()
        ]
        assert whole == [0]

    has_float16 = True

    def test_keeps_no_hold_of_what_is_added(self) -> None:
        buffer = self.make(8, STACKED, **STACKED_LAYOUT)
        values = stacked(0, 12)
        items = [{name: leaf[n] for name, leaf in values.items()} for n in range(12)]
        for start in (0, 3, 6, 9):
            value = stacked(start, start + 3)
            buffer.extend(value)
            for leaf in value.values():
                leaf[...] = 99
        assert self.numbers_of(buffer, items) == [6, 7, 8, 9, 10, 11]

    def test_one_observation_for_all_items(self) -> None:
        spec = {"obs": ArraySpec((2,), "float32"), "next_obs": ArraySpec((2,), "float32"), "terminated": FLAG}
        buffer = self.make(4, spec, **SHARED)
        for _ in range(2):
            buffer.extend({"obs": np.float32([1, 2]), "next_obs": np.float32([1, 2]), "terminated": np.zeros(3, bool)})
        items = [{"obs": np.float32([1, 2]), "next_obs": np.float32([1, 2]), "terminated": np.bool_(False)}] * 6
        assert self.numbers_of(buffer, items) == [2, 3, 4, 5]

    # What is refused ------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("position", [0, 1, 5])
    def test_frames_that_do_not_follow(self, position: int) -> None:
        """In a batch that closes the ring; nothing has changed then, whichever item it is."""
        buffer, twin = (self.make(8, STACKED, **STACKED_LAYOUT, sampler=Prioritized()) for _ in range(2))
        for each in (buffer, twin):
            each.extend(stacked(0, 6))
        wrong = stacked(6, 12)
        wrong["next_obs"][position, 0] += 1
        with pytest.raises(
            ValueError,
            match="^next_obs: expected the frames of obs moved on by one and a new frame behind them along axis 0",
        ):
            buffer.extend(wrong)
        with pytest.raises(ValueError, match="^next_obs: expected the frames of obs moved on by one"):
            buffer.add({name: leaf[position] for name, leaf in wrong.items()})
        self.assert_twins(buffer, twin)

    @pytest.mark.parametrize("name", ["obs", "next_obs", "terminated"])
    def test_other_leaves_that_do_not_fit(self, name: str) -> None:
        buffer, twin = (self.make(8, STACKED, **STACKED_LAYOUT, lanes=2) for _ in range(2))
        for each in (buffer, twin):
            each.extend(
                together(
                    [
                        {k: leaf[n] for k, leaf in stacked(first, first + 3).items()}
                        for n in range(3)
                        for first in (0, 500)
                    ]
                )
            )
        for lanes, count in ((None, 6), ([1], 1), ([1, 0], 2)):
            wrong = stacked(3, 3 + count)
            wrong[name] = wrong[name][..., None]
            with pytest.raises(ValueError, match=f"^{name}: expected shape|^expected a batch"):
                buffer.extend(wrong, lanes=lanes)
            wrong[name] = wrong[name][..., 0] * 1j
            with pytest.raises(TypeError, match=f"^{name}: expected .*, found complex"):
                buffer.extend(wrong, lanes=lanes)
        self.assert_twins(buffer, twin)

    def assert_twins(self, buffer: ReplayBuffer, twin: ReplayBuffer) -> None:
        """Both hold the same, and go on in the same way."""
        assert (len(buffer), buffer.total_added, buffer.nbytes) == (len(twin), twin.total_added, twin.nbytes)
        for _ in range(2):
            for name, storage in buffer._storages().items():
                assert_same(storage.get(...), host(twin._storages()[name].get(...)))
            one, other = buffer.sample(4), twin.sample(4)
            assert to_numpy(one.rows).tolist() == to_numpy(other.rows).tolist()
            assert_same(one.items, host(other.items))
            for each in (buffer, twin):
                each.extend(stacked(6, 12))

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"shared": {"next_obs": "obz"}}, "^'obz' is not in the spec; there are "),
            (
                {"shared": {"next_ob": "obs"}},
                "^next_ob/camera: expected ArraySpec.*, that of obs/camera, .* found no such leaf$",
            ),
            (
                {"shared": {"next_obs": "action"}},
                "^next_obs: expected ArraySpec.*, that of action, .* found no such leaf$",
            ),
            ({"shared": {"next_obs/sensors": "obs"}}, "^next_obs/sensors/camera: expected ArraySpec"),
            ({"shared": {"next_obs": "obs/sensors"}}, "^next_obs/radar: expected ArraySpec"),
            (
                {"shared": {"reward": "action"}},
                r"^reward: expected ArraySpec\(\(\), 'int32'\), that of action, which it is",
            ),
            (
                {"shared": {"next_obs": "obs", "obs": "next_obs"}},
                "^expected each part to be shared with one other, found ",
            ),
            (
                {"shared": {"next_obs": "obs"}, "stacks": {"next_obs/camera": 0}},
                "^stacks: expected the path of a leaf that is stored",
            ),
            ({"stacks": {"obs": 0}}, "^stacks: expected the path of a leaf that is stored, found 'obs', no such leaf$"),
            ({"stacks": {"obs/camera": 2}}, r"^obs/camera: expected an axis of a stack of shape \(4, 2\), found 2$"),
            ({"stacks": {"obs/camera": -3}}, r"^obs/camera: expected an axis of a stack of shape \(4, 2\), found -3$"),
            ({"stacks": {"action": 0}}, r"^action: expected an axis of a stack of shape \(\), found 0$"),
            ({**BOTH, "lanes": 4}, "^expected a capacity of more than 12, found 12: of stacks of 4 frames in 4 lane"),
        ],
        ids=str,
    )
    def test_options_that_are_none(self, options: dict[str, Any], text: str) -> None:
        with pytest.raises(ValueError, match=text):
            self.make(12, **options)

    def test_stacks_of_no_frames(self) -> None:
        with pytest.raises(ValueError, match="^obs: expected "):
            self.make(12, {"obs": ArraySpec((0, 3), "uint8")}, stacks={"obs": 0})


def sorted_by_rows(sample: Any) -> Any:
    """The items of a sample, oldest first, on the host."""
    order = np.argsort(to_numpy(sample.rows))
    return map_leaves(lambda leaf: to_numpy(leaf)[order], sample.items)


def map_leaves(function: Any, nest: Any) -> Any:
    return (
        {name: map_leaves(function, leaf) for name, leaf in nest.items()} if isinstance(nest, dict) else function(nest)
    )


class TestNumpy(OnNumpy, SharedContract):
    pass


class TestPlainNumpy(OnPlainNumpy, SharedContract):
    pass


class TestDisk(OnDisk, SharedContract):
    pass


class TestTorch(OnTorch, SharedContract):
    pass


class TestTorchAsOnADevice(OnTorchAsOnADevice, SharedContract):
    pass


class TestStrict(OnStrict, SharedContract):
    has_float16 = False


class TestCupyOnAStandIn(OnACupyStandIn, SharedContract):
    pass


@pytest.mark.gpu
class TestCupy(OnCupy, SharedContract):
    pass


@pytest.mark.gpu
class TestTorchCuda(OnTorchCuda, SharedContract):
    pass


class TestJax(OnJax, SharedContract):
    def test_frames_whose_memory_numpy_cannot_read(self) -> None:
        self.test_frames_of_any_dtype("int4")

    def test_no_sample_while_jax_traces(self) -> None:
        """It would be a constant of the compiled function, also where every leaf is put together from frames."""
        jax = pytest.importorskip("jax")
        spec = {name: ArraySpec((2, 2), "float32") for name in ("obs", "next_obs")}
        buffer = self.make(16, spec, shared={"next_obs": "obs"}, stacks={"obs": 0})
        frames = np.arange(28, dtype=np.float32).reshape(14, 2)
        for number in range(12):
            stacks = [frames[first : first + 2] for first in (number, number + 1)]
            buffer.add(dict(zip(spec, stacks)))
        samples = buffer.one_pass(4)
        with pytest.raises(TypeError, match="cannot be read within"):
            jax.jit(lambda x: next(samples).items["obs"] + x)(0.0)
        assert len(buffer.sample(4).rows) == 4


class TestJaxAsOnADevice(OnJaxAsOnADevice):
    """The state machine and the contract of ReplayBuffer cover it; here what is left of the ends of the ring."""

    make, numbers_of = SharedContract.make, SharedContract.numbers_of
    test_a_running_episode_longer_than_the_ring = SharedContract.test_a_running_episode_longer_than_the_ring
    test_next_observations_take_no_room = SharedContract.test_next_observations_take_no_room
    test_takes_values_of_any_library = SharedContract.test_takes_values_of_any_library


BITS = st.integers(0, 1)


class TestWhateverIsObserved:
    """Frames of single bits, which go on from one another by accident as often as not."""

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(
        first=st.lists(st.tuples(BITS, BITS, BITS), min_size=1, max_size=30),
        news=st.lists(BITS, min_size=30, max_size=30),
        ends=st.lists(st.sampled_from([False, False, True]), min_size=30, max_size=30),
        goes_on=st.lists(st.booleans(), min_size=30, max_size=30),
        capacity=st.integers(5, 12),
        lanes=st.integers(1, 2),
        layout=st.sampled_from(["shared", "stacks", "both"]),
        batches=st.integers(1, 9),
    )
    def test_it_comes_back(
        self, first: Any, news: Any, ends: Any, goes_on: Any, capacity: int, lanes: int, layout: str, batches: int
    ) -> None:
        items: list[Any] = []
        after: list[Any] = [None] * lanes
        for number, frames in enumerate(first[: len(first) // lanes * lanes]):
            lane = number % lanes
            frames = after[lane] if goes_on[number] and after[lane] is not None else frames
            after[lane] = (*frames[1:], news[number])
            item = {"obs": np.uint8(frames), "next_obs": np.uint8(after[lane]), "terminated": np.bool_(ends[number])}
            items.append(item if layout != "stacks" else {k: v for k, v in item.items() if k != "next_obs"})
        spec = {name: ArraySpec((3,), "uint8") for name in ("obs", "next_obs")} | {"terminated": FLAG}
        if layout == "stacks":
            del spec["next_obs"]
        parts: dict[str, Any] = {"shared": {"next_obs": "obs"}} if layout != "stacks" else {}
        parts |= {"stacks": {"obs": 0}} if layout != "shared" else {}
        buffer = ReplayBuffer(spec, capacity, lanes=lanes, sampler=Uniform(replacement=False), **parts)
        size = batches * lanes
        for start in range(0, len(items), size):
            buffer.extend(together(items[start : start + size]))
            found = []
            try:
                for sample in buffer.one_pass(64):
                    rows = sample.rows.tolist()
                    assert_same(sample.items, together([items[row] for row in rows]))
                    found += rows
            except ValueError as error:
                assert "can be drawn" in str(error)  # noqa: PT017  # it need not be refused
            total = buffer.total_added
            oldest = max(0, total - capacity)
            left_out = 2 * lanes if total > capacity and layout != "shared" else 0
            assert set(range(oldest + left_out, total)) <= set(found)


def test_paths_of_stacks_are_in_the_list_s_layouts() -> None:
    """What the state machine says it tries is what the spec has."""
    assert {SPEC["obs"]["camera"].shape[STACKS["obs/camera"]], SPEC["obs"]["sensors"]["radar"].shape[-1]} == {4, 3}
