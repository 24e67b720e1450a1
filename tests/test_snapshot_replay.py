"""A replay buffer that is saved and loaded goes on as it would have gone on without."""

from __future__ import annotations

import copy
import itertools
import json
import re
from typing import Any

import numpy as np
import pytest

from anystore import ArraySpec, SnapshotError, Storage, load
from anystore.convert import to_numpy
from anystore.replay import Prioritized, Recent, ReplayBuffer, Sampler, Uniform
from anystore.snapshot import Snapshot, files
from anystore.snapshot.manifest import read_manifest
from tests.items import assert_same, leaves
from tests.test_snapshot_damage import forge, places

BACKENDS = ["numpy", "torch", "jax", "array_api_strict"]
CAPACITY = 24
SPEC = {
    "obs": ArraySpec((3, 2), "uint8"),
    "action": ArraySpec((), "int32"),
    "reward": ArraySpec((), "float32"),
    "next_obs": ArraySpec((3, 2), "uint8"),
    "terminated": ArraySpec((), "bool"),
    "truncated": ArraySpec((), "bool"),
}
SAMPLERS = {
    "uniform": Uniform,
    "without replacement": lambda: Uniform(replacement=False),
    "recent": lambda: Recent(7),
    "prioritized": lambda: Prioritized(alpha=0.7, beta=0.5),
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "lanes": {"lanes": 2},
    "shared": {"shared": {"next_obs": "obs"}, "lanes": 2},
    "stacks": {"shared": {"next_obs": "obs"}, "stacks": {"obs": 0}},
}


@pytest.fixture(autouse=True)
def _unsynced(monkeypatch):
    monkeypatch.setattr(files, "fsync", lambda fd: None)
    monkeypatch.setattr(files, "sync_directory", lambda path: None)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "snapshot"


class Walk:
    """Episodes of each lane, whose observations are stacks of three frames."""

    def __init__(self, lanes: int) -> None:
        self.random = np.random.default_rng(3)
        self.obs = self.random.integers(0, 255, (lanes, 3, 2), np.uint8)

    def step(self) -> dict[str, Any]:
        lanes = len(self.obs)
        frame = self.random.integers(0, 255, (lanes, 1, 2), np.uint8)
        following = np.concatenate([self.obs[:, 1:], frame], axis=1)
        ends = self.random.random((2, lanes)) < 0.15
        item = {
            "obs": self.obs.copy(),
            "action": self.random.integers(0, 9, lanes, np.int32),
            "reward": self.random.random(lanes, np.float32),
            "next_obs": following,
            "terminated": ends[0],
            "truncated": ends[1],
        }
        fresh = self.random.integers(0, 255, (lanes, 3, 2), np.uint8)
        self.obs = np.where((ends[0] | ends[1])[:, None, None], fresh, following)
        return item


def started(backend: str, sampler: Any, layout: dict[str, Any], steps: int = 31) -> tuple[ReplayBuffer, Walk]:
    if backend != "numpy":
        pytest.importorskip(backend)
    buffer = ReplayBuffer(SPEC, CAPACITY, sampler=sampler(), backend=backend, device="cpu", seed=5, **layout)
    walk = Walk(buffer.lanes)
    go_on(buffer, walk, steps)
    return buffer, walk


def go_on(buffer: ReplayBuffer, walk: Walk, steps: int) -> list[Any]:
    """What is sampled while items are added and priorities change."""
    seen = []
    for step in range(steps):
        buffer.extend(walk.step())
        if len(buffer) >= 12 and step % 3 == 0:
            for options in ({}, {"num_steps": 3, "at_end": "pad"}, {"n_step": 2, "discount": 0.9}):
                sample = buffer.sample(4, **options)
                seen.append(
                    [sample.items, *(getattr(sample, name) for name in ("rows", "weights", "mask", "discounts"))]
                )
            if isinstance(buffer.sampler, Prioritized):
                buffer.update_priorities(sample.rows, np.arange(4) / 3)
    return seen


def as_bytes(seen: Any) -> list[bytes]:
    return [to_numpy(leaf).tobytes() for leaf in leaves(seen) if leaf is not None]


CASES = [
    *itertools.product(["numpy", "torch"], SAMPLERS, LAYOUTS),
    *itertools.product(["jax", "array_api_strict"], ["prioritized"], ["plain", "stacks"]),
]


@pytest.mark.parametrize(("backend", "sampler", "layout"), CASES)
def test_goes_on_as_it_would_have(path, backend, sampler, layout):
    buffer, walk = started(backend, SAMPLERS[sampler], LAYOUTS[layout])
    for _ in range(2):  # the second time with what changed since
        buffer.save(path)
        found = load(path, backend=backend, device="cpu")
        assert type(found.sampler) is type(buffer.sampler)
        twin_walk = Walk(buffer.lanes)
        twin_walk.random.bit_generator.state = walk.random.bit_generator.state
        twin_walk.obs = walk.obs.copy()
        expected, seen = go_on(buffer, walk, 7), go_on(found, twin_walk, 7)
        assert len(expected) > 3
        assert as_bytes(seen) == as_bytes(expected)
    assert found.total_added == buffer.total_added
    found.save(path)
    again = load(path, backend=backend, device="cpu")
    assert as_bytes(go_on(again, twin_walk, 4)) == as_bytes(go_on(buffer, walk, 4))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("capacity", [4, 10, 23, 24, 25, 60])
@pytest.mark.parametrize("steps", [3, 31])
def test_another_capacity_keeps_the_newest_items(path, capacity, layout, steps):
    buffer, walk = started("numpy", Prioritized, layout, steps)
    if steps > 12:
        sample = buffer.sample(4)
        buffer.update_priorities(sample.rows, np.arange(4) / 3)
    buffer.save(path)
    found = load(path, capacity=capacity)
    kept = min(capacity, len(buffer))
    assert (found.capacity, len(found), found.total_added) == (capacity, kept, buffer.total_added)
    margin = 0 if "stacks" not in layout else 2  # items whose older frames went with older items
    places = np.arange(kept - margin) + margin if kept > margin else np.arange(0)
    old = buffer._layout.read(places + len(buffer) - kept)
    assert_same(found._layout.read(places), old)
    assert found.priorities.tolist() == buffer.priorities[-kept:].tolist()
    for _ in range(30):
        found.extend(walk.step())
    assert len(found) == min(capacity, kept + 30 * buffer.lanes)
    found.sample(3)


def test_some_lanes_at_a_time(path):
    buffer = ReplayBuffer(SPEC, CAPACITY, lanes=3, seed=1)
    walk = Walk(3)
    for step in range(20):
        lanes = [0, 1, 2] if step % 3 else [step % 2, 2]
        buffer.extend({key: leaf[lanes] for key, leaf in walk.step().items()}, lanes=lanes)
    buffer.save(path)
    for capacity in (CAPACITY, 15, 40):
        found = load(path, capacity=capacity)
        kept = min(capacity, len(buffer))
        places = np.arange(kept)
        ahead, there = found._lanes.ahead(places)
        old, was = buffer._lanes.ahead(places + len(buffer) - kept)
        assert there.tolist() == was.tolist()
        assert ahead.tolist() == (old - (len(buffer) - kept)).tolist()
        if capacity == CAPACITY:
            assert as_bytes(found.sample(8, num_steps=3).items) == as_bytes(buffer.sample(8, num_steps=3).items)


@pytest.mark.parametrize("reads", BACKENDS)
def test_any_backend_reads(path, reads):
    buffer, _ = started("numpy", Prioritized, LAYOUTS["stacks"])
    buffer.save(path)
    if reads != "numpy":
        pytest.importorskip(reads)
    found = load(path, backend=reads, device="cpu")
    places = np.arange(3, CAPACITY)
    old = buffer._layout.read(places)
    new = found._layout.read(found.backend.bookkeeping.as_index(places))
    assert as_bytes(new) == as_bytes(old)
    numbers = [each.sampler.state(each._ring.items)["numbers"] for each in (found, buffer)]
    np.testing.assert_array_equal(numbers[0], numbers[1].astype(numbers[0].dtype))
    first, second = (load(path, backend=reads, device="cpu").sample(5).rows for _ in range(2))
    assert to_numpy(first).tolist() == to_numpy(second).tolist()


def test_writes_what_was_added_since(path):
    buffer, walk = started("numpy", Uniform, LAYOUTS["shared"])
    buffer.save(path)
    buffer.extend(walk.step())
    buffer.save(path)
    entries = read_manifest(path / "manifest.json").storages
    assert [layer.count for layer in entries["items"].layers] == [CAPACITY, 2]
    assert set(entries) == {"items", "marks", "records"}


def test_looking_at_stats_does_not_make_it_write_more(path):
    buffer, walk = started("numpy", Uniform, LAYOUTS["stacks"])
    buffer.save(path)
    buffer.stats()
    buffer.extend(walk.step())
    buffer.save(path)
    for name in ("items", "marks"):
        layers = read_manifest(path / "manifest.json").storages[name].layers
        assert [layer.count for layer in layers] == [CAPACITY, 1]


def test_stats_where_what_came_before_did_not_fit_in(path):
    buffer, walk = started("numpy", Uniform, LAYOUTS["lanes"])
    buffer.extend({name: leaf[:1] for name, leaf in walk.step().items()}, lanes=[0])
    for _ in range(20):  # so that lane 0 has no item for long
        buffer.extend({name: leaf[1:] for name, leaf in walk.step().items()}, lanes=[1])
    buffer.extend({**walk.step(), "terminated": np.ones(2, bool)})
    buffer.save(path)
    stats = load(path, capacity=3).stats()
    assert (stats.size, stats.mean_length) == (3, None)


def test_a_leaf_of_any_name(path):
    """The state holds arrays by the paths of leaves."""
    spec = {name: ArraySpec((), "float32") for name in ("array", "next_array", "a/b")}
    buffer = ReplayBuffer(spec, 4, shared={"next_array": "array"}, seed=0)
    numbers = np.arange(6, dtype=np.float32)
    buffer.extend({"array": numbers, "next_array": numbers + 1, "a/b": numbers})
    buffer.save(path)
    found = load(path)
    assert_same(found.sample(8).items, buffer.sample(8).items)


def test_as_many_episodes_as_there_are_items(path):
    """What is kept of each is an array, and not text in a manifest whose size is limited."""
    count = 60_000
    spec = {name: ArraySpec((), "int32") for name in ("obs", "next_obs")} | {"terminated": ArraySpec((), "bool")}
    buffer = ReplayBuffer(spec, count, shared={"next_obs": "obs"}, seed=0)
    numbers = np.arange(count, dtype=np.int32)
    buffer.extend({"obs": 2 * numbers, "next_obs": 2 * numbers + 1, "terminated": np.ones(count, bool)})
    buffer.save(path)
    assert (path / "manifest.json").stat().st_size < count
    found = load(path)
    assert_same(found.sample(100).items, buffer.sample(100).items)


def test_settings_that_are_numbers_of_numpy(path):
    buffer, _ = started("numpy", Prioritized, {})
    buffer.sampler.beta = np.float32(0.5)
    buffer.save(path)
    assert load(path).sampler.beta == 0.5


def test_a_state_that_cannot_be_written(path):
    buffer, walk = started("numpy", Oldest, {})
    buffer.save(path)
    names = sorted(each.name for each in path.iterdir())
    buffer.sampler.offset = {1, 2}
    buffer.extend(walk.step())
    with pytest.raises(ValueError, match="^sampler/offset: expected numbers, strings, and NumPy arrays by name"):
        buffer.save(path)
    assert sorted(each.name for each in path.iterdir()) == names
    assert load(path, sampler=Oldest()).total_added == buffer.total_added - 1


def test_an_empty_and_a_cleared_buffer(path):
    buffer = ReplayBuffer(SPEC, CAPACITY, seed=0, sampler=Prioritized())
    buffer.save(path)
    assert len(load(path)) == 0
    buffer, _ = started("numpy", Prioritized, LAYOUTS["stacks"])
    buffer.clear()
    buffer.save(path)
    found = load(path)
    assert (len(found), found.total_added) == (0, buffer.total_added)
    found.extend(Walk(1).step())
    assert len(found.sample(3).rows) == 3


class Oldest(Uniform):
    def draw(self, count: int, items: range) -> Any:
        return np.full(count, self.offset)

    offset = 0

    def state(self, items: range) -> dict[str, Any]:
        return {"offset": self.offset, "table": np.arange(3), "kinds": [np.float32(1.5), (1, 2)]}

    def restore(self, state: dict[str, Any], items: range) -> None:
        self.offset = state["offset"]
        assert state["table"].tolist() == [0, 1, 2]
        assert state["kinds"] == [1.5, [1, 2]]


def test_a_sampler_of_the_users_own(path):
    buffer, _ = started("numpy", Oldest, {})
    buffer.sampler.offset = 4
    buffer.save(path)
    with pytest.raises(SnapshotError, match="manifest.json: its sampler is a 'Oldest'; pass a new one as sampler="):
        load(path)
    with pytest.raises(SnapshotError, match="its sampler is a 'Oldest'; pass a new one as sampler=, found a Recent"):
        load(path, sampler=Recent(3))
    found = load(path, sampler=Oldest())
    assert found.sample(2).rows.tolist() == buffer.sample(2).rows.tolist()
    assert found.sampler.offset == 4


def test_a_sampler_of_the_users_own_while_another_saves(path):
    """The files of the version that is being loaded are gone, and it is begun with the next one anew."""
    buffer, _ = started("numpy", Oldest, {})
    buffer.sampler.offset = 4
    buffer.save(path)
    times = []

    def save(done, total):
        if not times:
            times.append(done)
            buffer.storage.buffers  # noqa: B018  # from then on it is saved whole
            buffer.save(path)

    found = load(path, sampler=Oldest(), progress=save)
    assert found.sampler.offset == 4
    assert found.total_added == buffer.total_added


def test_a_sampler_whose_priorities_are_not_saved_is_told_so(path):
    class Forgetful(Sampler):
        def draw(self, count, items):
            return self.random.integers(len(items), count)

        def update(self, rows, priorities):
            pass

    buffer = ReplayBuffer(ArraySpec((), "int32"), 10, sampler=Forgetful())
    with pytest.warns(
        RuntimeWarning, match=r"^a Forgetful sampler has priorities to update and no state\(\): they are"
    ):
        buffer.save(path)


@pytest.mark.parametrize("error", [KeyError, TypeError, ValueError, IndexError, AttributeError])
@pytest.mark.parametrize("method", ["open", "restore"])
def test_a_mistake_in_a_sampler_of_the_users_own_is_none_of_the_snapshot(path, monkeypatch, method, error):
    buffer, _ = started("numpy", Oldest, {})
    buffer.save(path)

    def mistaken(self: Any, *args: Any) -> None:
        raise error("of the sampler's own")

    monkeypatch.setattr(Oldest, method, mistaken)
    with pytest.raises(error, match="of the sampler's own") as found:
        load(path, sampler=Oldest())
    assert type(found.value) is error
    assert found.traceback[-1].name == "mistaken"


@pytest.mark.parametrize(
    ("saved", "alike", "other"),
    [
        (Prioritized(alpha=0.7), Prioritized(alpha=0.7, beta=1.0), Prioritized(alpha=0.1)),
        (Recent(5), Recent(10), Recent(5, replacement=False)),
        (Uniform(), Uniform(), Uniform(replacement=False)),
    ],
    ids=["prioritized", "recent", "uniform"],
)
def test_samplers_that_come_with_anystore_come_back_as_they_were(path, saved, alike, other):
    buffer, _ = started("numpy", lambda: copy.copy(saved), {})
    buffer.save(path)

    class Namesake(type(saved)):
        """One of the user's own."""

    Namesake.__name__ = type(saved).__name__
    for given in (other, Namesake(*([5] if isinstance(saved, Recent) else []))):
        with pytest.raises(SnapshotError, match="its sampler is anystore's .*, found .* of .*; leave sampler= out$"):
            load(path, sampler=given)
    rows = buffer.sample(5).rows.tolist()
    for found in (load(path), load(path, sampler=alike)):
        assert repr(found.sampler) == repr(buffer.sampler)
        assert found.sample(5).rows.tolist() == rows


def test_options_come_back(path):
    spec = {"a": {"r": ArraySpec((), "float32"), "done": ArraySpec((), "bool")}, "b": ArraySpec((2,), "int8", name="x")}
    buffer = ReplayBuffer(spec, 10, lanes=2, reward="a/r", terminated="a/done", casting="unsafe", sampler=Recent(3))
    buffer.save(path)
    found = load(path)
    assert found.data_spec == spec
    assert found.data_spec["b"].name == "x"
    assert (found.lanes, found.sampler.newest, found.storage.casting) == (2, 3, "unsafe")
    assert found._state()["options"] == buffer._state()["options"]


def test_like(path):
    buffer, _ = started("numpy", Uniform, LAYOUTS["stacks"])
    buffer.save(path)
    assert load(path, like=buffer).data_spec == SPEC
    with pytest.raises(SnapshotError, match="reward: expected ArraySpec"):
        load(path, like={**SPEC, "reward": ArraySpec((), "float64")})


def test_kinds_are_not_mixed(path, tmp_path):
    buffer, _ = started("numpy", Uniform, {})
    buffer.save(path)
    with pytest.raises(SnapshotError, match="expected a snapshot of kind storage, found one of replay"):
        Storage(SPEC, 3).save(path)
    assert len(load(path)) == CAPACITY
    Storage(SPEC, 3).save(tmp_path / "other")
    with pytest.raises(SnapshotError, match="expected a snapshot of kind replay, found one of storage"):
        buffer.save(tmp_path / "other")
    with pytest.raises(ValueError, match="sampler= is for a replay buffer, and this is none"):
        load(tmp_path / "other", sampler=Uniform())


def test_a_forged_state_is_refused(path):
    """Wherever the state says something else, that is an error or harmless: no row outside of a buffer is read."""
    buffer, _ = started("numpy", Prioritized, LAYOUTS["stacks"])
    buffer.save(path)
    good = (path / "manifest.json").read_bytes()
    state = json.loads(good)["state"]
    count = len(places(state))
    assert count > 60
    outcomes = []
    for number in range(count):
        for value in (
            None,
            -1,
            2**31,
            2**70,
            1.5,
            "x",
            [],
            {},
            [7, 7],
            {"array": "none"},
            {"array": "sampler/numbers"},
        ):

            def change(node: Any, number: int = number, value: Any = value) -> None:
                container, key = places(node["state"])[number]
                container[key] = value

            (path / "manifest.json").write_bytes(good)
            forge(path, change)
            try:
                found = load(path)
                found.sample(3)
                found.sample(3, n_step=2)
                outcomes.append("loaded")
            except SnapshotError as error:
                outcomes.append("refused" if str(path) in str(error) else str(error))
            except (ValueError, TypeError, MemoryError) as error:  # such as options that a buffer refuses in its words
                outcomes.append("refused by the buffer" if str(error) else repr(error))
    assert set(outcomes) <= {"loaded", "refused", "refused by the buffer"}
    assert outcomes.count("refused") > 300


@pytest.mark.parametrize("record", [-1, 2, 2**30])
def test_a_forged_record_of_an_item_is_refused(path, record):
    buffer, _ = started("numpy", Uniform, {"shared": {"next_obs": "obs"}})
    buffer._layout.storages["marks"].select("record").set(
        3, np.int32(record if record != 2 else buffer._layout._records)
    )
    buffer.save(path)
    Snapshot(path).verify()
    with pytest.raises(SnapshotError, match=re.escape("manifest.json: expected the state of a replay buffer")):
        load(path)
