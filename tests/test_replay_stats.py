"""What a buffer tells of itself, and the line in the terminal."""

from __future__ import annotations

import dataclasses
import io
import sys

import numpy as np
import pytest

from anystore import ArraySpec, Storage, load
from anystore.convert import to_numpy
from anystore.replay import Prioritized, ReplayBuffer
from anystore.replay.ring import Ring
from anystore.replay.stats import Counts, Meter, Spread, Stats, live_stats
from tests import on_backends as on


class Clock:
    """Stands still until it is told otherwise."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def counts(**changes) -> Counts:
    plain = Counts(size=40, capacity=100, total_added=240, total_sampled=3200, nbytes=12_345_678)
    return dataclasses.replace(plain, **changes)


def episodes(ends, rewards=None, *, lanes=1, first=0) -> tuple:
    """The episodes of items, oldest first, of which these are the ends of some."""
    flags = np.asarray(ends, bool)
    behind = None if lanes is None else np.full(len(flags), lanes)
    of_buffer = counts(
        size=len(flags), lanes=lanes or 1, overwrote=first > 0, behind=behind, ends=flags, rewards=rewards
    )
    stats = Meter().read(of_buffer)
    return stats.episodes, stats.mean_length, stats.mean_return


def by_a_loop(ends, rewards, lanes, first):
    """The same by going through the items one by one."""
    so_far: dict[int, tuple[int, float] | None] = dict.fromkeys(range(lanes), (0, 0.0) if first == 0 else None)
    ended, whole = 0, []
    for position, (end, reward) in enumerate(zip(ends, rewards)):
        lane = (first + position) % lanes
        if so_far[lane] is not None:
            so_far[lane] = so_far[lane][0] + 1, so_far[lane][1] + float(reward)
        if end:
            ended += 1
            if so_far[lane] is not None:
                whole.append((position // lanes, *so_far[lane]))
            so_far[lane] = 0, 0.0
    return ended, whole


class TestEpisodes:
    def test_none_that_is_known(self):
        stats = Meter().read(counts())
        assert (stats.episodes, stats.mean_length, stats.mean_return) == (None, None, None)

    def test_none_that_has_ended(self):
        assert episodes([0, 0, 0], np.ones(3)) == (0, None, None)
        assert episodes([], np.ones(0)) == (0, None, None)

    def test_one_lane(self):
        assert episodes([0, 0, 1, 0, 1, 0], np.arange(6)) == (2, 2.5, 5.0)

    def test_the_oldest_one_may_have_lost_its_beginning(self):
        assert episodes([0, 0, 1, 0, 1, 0], np.arange(6), first=7) == (2, 2.0, 7.0)
        assert episodes([0, 0, 1, 0], np.arange(4), first=7) == (1, None, None)

    def test_lanes_are_not_mixed(self):
        ends = [[0, 1], [0, 0], [1, 0], [0, 1]]
        rewards = [[1, 10], [2, 20], [3, 30], [4, 40]]
        # Lane 0: 1 + 2 + 3. Lane 1: 10, and 20 + 30 + 40.
        assert episodes(np.ravel(ends), np.ravel(rewards), lanes=2) == (3, 7 / 3, 106 / 3)

    def test_without_rewards(self):
        assert episodes([0, 1, 1]) == (2, 1.5, None)

    def test_rewards_of_several_numbers(self):
        assert episodes([0, 1, 1], np.ones((3, 2))) == (2, 1.5, None)

    def test_lanes_that_are_not_known(self):
        assert episodes([0, 1, 1], np.ones(3), lanes=None) == (2, None, None)

    def test_the_newest_hundred(self):
        lengths = [50] * 30 + [7] * 100
        ends = np.concatenate([np.arange(length) == length - 1 for length in lengths])
        assert episodes(ends, np.ones(len(ends))) == (130, 7.0, 7.0)

    def test_long_episodes_beside_short_ones(self):
        ends = np.zeros((300_000, 3), bool)
        ends[-1, 0] = ends[-2, 1] = ends[9::10, 2] = True
        ends, mean = ends.ravel(), (300_000 + 299_999 + 98 * 10) / 100
        assert episodes(ends, np.ones(len(ends)), lanes=3) == (30_002, mean, mean)
        # Without the very first item, any of the lanes may have lost the beginning of its first episode.
        assert episodes(ends[1:], np.ones(len(ends) - 1), lanes=3, first=1) == (30_002, 10.0, 10.0)

    def test_small_rewards_do_not_get_lost(self):
        rewards = np.full(30_000, 0.1, np.float16)
        assert episodes([*[0] * 29_999, 1], rewards)[2] == pytest.approx(30_000 * float(rewards[0]))

    @pytest.mark.parametrize("seed", range(30))
    def test_as_counted_one_by_one(self, seed):
        random = np.random.default_rng(seed)
        lanes, first = int(random.integers(1, 6)), int(random.choice([0, 3, 10, 12]))
        size = int(random.integers(0, 60)) * lanes + -first % lanes
        ends, rewards = random.random(size) < 0.2, random.random(size)
        ended, whole = by_a_loop(ends, rewards, lanes, first)
        found = episodes(ends, rewards, lanes=lanes, first=first)
        assert found[0] == ended
        if whole and len(whole) <= 100:
            _, lengths, returns = zip(*whole)
            assert found[1:] == (pytest.approx(np.mean(lengths)), pytest.approx(np.mean(returns)))
        else:
            assert found[1:] == (None, None)


class TestRates:
    def test_since_the_beginning_and_since_the_last_time(self):
        clock = Clock()
        meter = Meter(40, 200, clock=clock)
        clock.now += 10
        stats = meter.read(counts(total_added=240, total_sampled=3200))
        assert (stats.added_per_second, stats.sampled_per_second) == (20, 300)
        clock.now += 2
        stats = meter.read(counts(total_added=250, total_sampled=3200))
        assert (stats.added_per_second, stats.sampled_per_second) == (5, 0)

    def test_when_no_time_has_passed(self):
        clock = Clock()
        meter = Meter(clock=clock)
        assert meter.read(counts()).added_per_second == 0
        clock.now += 10
        assert meter.read(counts()).added_per_second == 24  # what was added before is not forgotten
        assert meter.read(counts(total_added=300)).added_per_second == 24
        clock.now += 10
        assert meter.read(counts(total_added=340)).added_per_second == 10

    def test_each_meter_has_rates_of_its_own(self):
        clock = Clock()
        one, other = Meter(clock=clock), Meter(clock=clock)
        clock.now += 10
        one.read(counts(total_added=100))
        clock.now += 10
        assert one.read(counts(total_added=200)).added_per_second == 10
        assert other.read(counts(total_added=200)).added_per_second == 10

    def test_of_a_real_clock(self):
        meter = Meter()
        stats = meter.read(counts())
        assert stats.added_per_second >= 0
        assert stats.sampled_per_second >= stats.added_per_second


class TestSpread:
    def test_of_numbers(self):
        stats = Meter().read(counts(priorities=np.array([1, 2, 9, 0], np.float32)))
        assert stats.priorities == Spread(low=0, median=1.5, mean=3, high=9)

    def test_of_none(self):
        assert Meter().read(counts(priorities=np.zeros(0))).priorities is None


class TestText:
    def test_all_that_is_known(self):
        stats = Stats(1234, 4936, 1234, 59232, 12_345_678, 20.4, 1300, 7, 210.04, 187.3, Spread(1e-3, 0.25, 0.5, 12))
        assert str(stats).splitlines() == [
            "items       1,234 of 4,936 (25%), 12.3 MB",
            "added       1,234 (20 a second)",
            "sampled     59,232 (1,300 a second), each item 48 times",
            "episodes    7, mean length 210.0, mean return 187.3",
            "priorities  0.001 to 12, median 0.25, mean 0.5",
        ]
        assert stats.line == (
            "1,234/4,936 items, 12.3 MB, 20 added/s, 1,300 sampled/s, 7 episodes, mean length 210.0, mean return 187.3"
        )

    def test_what_is_not_known_is_left_out(self):
        stats = Stats(0, 10, 0, 0, 0, 0, 0)
        assert str(stats).splitlines() == [
            "items       0 of 10 (0%), 0 B",
            "added       0 (0 a second)",
            "sampled     0 (0 a second), each item 0 times",
        ]
        assert stats.line == "0/10 items, 0 B, 0 added/s, 0 sampled/s"
        assert dataclasses.replace(stats, episodes=0).line.endswith("sampled/s, 0 episodes")

    @pytest.mark.parametrize(
        ("count", "text"), [(999, "999 B"), (1000, "1 KB"), (28_224_000_000, "28.2 GB"), (5 * 10**15, "5,000 TB")]
    )
    def test_bytes(self, count, text):
        assert Stats(0, 10, 0, 0, count, 0, 0).line.split(", ", 1)[1].startswith(f"{text}, ")

    def test_it_can_be_logged(self):
        stats = Meter().read(counts(priorities=np.ones(3)))
        assert dataclasses.asdict(stats)["priorities"] == {"low": 1.0, "median": 1.0, "mean": 1.0, "high": 1.0}


class TestInOrder:
    @pytest.mark.parametrize("backend", ["numpy", "torch", "jax", "array_api_strict"])
    @pytest.mark.parametrize("items", [range(0), range(3), range(5), range(3, 8), range(13, 15), range(9, 14)], ids=str)
    def test_oldest_first(self, backend, items):
        pytest.importorskip(backend)
        column = np.arange(5, dtype=np.int32) * 10
        leaf = Storage(ArraySpec((), "int32"), 5, backend=backend)
        leaf.set(slice(None), column)
        ring = Ring(5, leaf.backend)
        ring.restore({"oldest": items.start, "total": items.stop, "overwrote": False})
        found = ring.in_order(leaf)
        assert found.tolist() == [10 * (item % 5) for item in items]
        found[...] = 7
        assert to_numpy(leaf.get(range(5))).tolist() == column.tolist()


class Buffer:
    """What of a buffer the line in the terminal needs."""

    def __init__(self, *taken: Counts) -> None:
        self.taken = list(taken)

    def _counts(self) -> Counts:
        return self.taken.pop(0) if len(self.taken) > 1 else self.taken[0]


class TestLiveStats:
    def test_the_last_line(self):
        console = pytest.importorskip("rich.console")
        file, clock = io.StringIO(), Clock()
        buffer = Buffer(counts())
        with live_stats(buffer, console=console.Console(file=file, width=120), refresh_per_second=1e-3, clock=clock):
            assert file.getvalue() == ""  # no terminal
            clock.now += 10
            buffer.taken = [counts(size=50, total_added=440, total_sampled=4200)]
        assert file.getvalue().rstrip().endswith(" 50/100 items, 12.3 MB, 20 added/s, 100 sampled/s")

    def test_in_a_terminal(self):
        console = pytest.importorskip("rich.console")
        file = io.StringIO()
        terminal = console.Console(file=file, width=120, force_terminal=True)
        with live_stats(
            Buffer(counts(ends=np.ones(40, bool), behind=np.ones(40, int))), console=terminal, refresh_per_second=1e-3
        ):
            assert "40/100 items" in file.getvalue()
            assert "━" in file.getvalue()
            assert "40 episodes, mean length 1.0" in file.getvalue()

    def test_an_exception_comes_through(self):
        console = pytest.importorskip("rich.console")
        file = io.StringIO()
        with pytest.raises(KeyError), live_stats(Buffer(counts()), console=console.Console(file=file, width=120)):
            raise KeyError

    def test_without_rich(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "rich.live", None)
        with (
            pytest.raises(ImportError, match=r"the line in the terminal needs rich, .*; pip install rich"),
            live_stats(Buffer(counts())),
        ):
            pass


SPEC = {
    "obs": ArraySpec((2,), "float32"),
    "next_obs": ArraySpec((2,), "float32"),
    "reward": ArraySpec((), "float32"),
    "terminated": ArraySpec((), "bool"),
    "truncated": ArraySpec((), "bool"),
}


def transitions(count, seed=0):
    """Items of random episodes, observations all the same."""
    random = np.random.default_rng(seed)
    nothing = np.zeros((count, 2), np.float32)
    return {
        "obs": nothing,
        "next_obs": nothing,
        "reward": random.integers(0, 5, count).astype(np.float32),
        "terminated": random.random(count) < 0.1,
        "truncated": random.random(count) < 0.05,
    }


class ReplayBufferContract:
    def make(self, **options):
        return ReplayBuffer(SPEC, 20, seed=0, **self.options, **options)

    @pytest.mark.parametrize("shared", [None, {"next_obs": "obs"}], ids=["plain", "shared"])
    @pytest.mark.parametrize("lanes", [1, 3])
    def test_episodes(self, lanes, shared):
        buffer = self.make(lanes=lanes, shared=shared)
        items = transitions(36)
        for stop in (0, 12, 18, 36):
            if stop:
                buffer.extend({name: leaf[buffer.total_added : stop] for name, leaf in items.items()})
            first = max(0, stop - 20)
            ends = (items["terminated"] | items["truncated"])[first:stop]
            ended, whole = by_a_loop(ends, items["reward"][first:stop], lanes, first)
            stats = buffer.stats()
            assert (stats.size, stats.capacity, stats.total_added) == (stop - first, 20, stop)
            assert stats.episodes == ended
            expected = [np.mean(column) for column in list(zip(*whole))[1:]] if whole else [None, None]
            assert [stats.mean_length, stats.mean_return] == expected

    def test_lanes_that_are_not_in_step(self):
        buffer, random = self.make(lanes=3), np.random.default_rng(1)
        items, lane_of = transitions(60), []
        while len(lane_of) < 60:
            lanes = random.permutation(3)[: random.integers(1, 4)][: 60 - len(lane_of)]
            rows = slice(len(lane_of), len(lane_of) + len(lanes))
            buffer.extend({name: leaf[rows] for name, leaf in items.items()}, lanes=lanes)
            lane_of += lanes.tolist()
            ends, first = items["terminated"] | items["truncated"], max(0, len(lane_of) - 20)
            whole = []
            for lane in range(3):
                so_far = (0, 0.0) if first == 0 else None
                for place in range(first, len(lane_of)):
                    if lane_of[place] == lane:
                        so_far = so_far and (so_far[0] + 1, so_far[1] + items["reward"][place])
                        whole += [so_far] if ends[place] and so_far else []
                        so_far = (0, 0.0) if ends[place] else so_far
            stats = buffer.stats()
            assert stats.episodes == np.count_nonzero(ends[first : len(lane_of)])
            expected = np.mean(whole, axis=0).tolist() if whole else [None, None]
            assert [stats.mean_length, stats.mean_return] == pytest.approx(expected)

    @pytest.mark.parametrize("lanes", [1, 2])
    def test_episodes_since_the_buffer_was_cleared(self, lanes):
        buffer = self.make(lanes=lanes)
        buffer.extend({name: leaf[:1] for name, leaf in transitions(1).items()}, lanes=[lanes - 1])
        buffer.clear()
        items = transitions(16)
        buffer.extend(items)
        ended, whole = by_a_loop(items["terminated"] | items["truncated"], items["reward"], lanes, 0)
        stats = buffer.stats()
        assert (stats.size, stats.episodes) == (16, ended)
        assert [stats.mean_length, stats.mean_return] == [np.mean(column) for column in list(zip(*whole))[1:]]

    def test_nothing_that_tells_of_episodes(self):
        buffer = ReplayBuffer(ArraySpec((), "float32"), 10, **self.options)
        buffer.extend(np.zeros(4, np.float32))
        stats = buffer.stats()
        assert (stats.episodes, stats.mean_length, stats.mean_return, stats.priorities) == (None, None, None, None)
        assert stats.nbytes == buffer.nbytes == 40

    def test_sampled(self):
        buffer = self.make()
        buffer.extend(transitions(10))
        buffer.sample(4)
        buffer.sample(3, num_steps=2)
        assert buffer.stats().total_sampled == 7
        assert sum(len(to_numpy(sample.rows)) for sample in buffer.one_pass(4)) == 10
        assert buffer.stats().total_sampled == 17
        assert buffer.stats().replay_ratio == 1.7

    def test_priorities(self):
        buffer = self.make(sampler=Prioritized())
        assert buffer.stats().priorities is None
        buffer.extend(transitions(10))
        rows = to_numpy(buffer.sample(64).rows)
        buffer.update_priorities(rows[:1], np.array([3.0], np.float32))
        spread = buffer.stats().priorities
        found = [spread.low, spread.median, spread.mean, spread.high]
        np.testing.assert_allclose(found, [1, 1, 1.2, 3], rtol=1e-4)

    def test_a_line_in_the_terminal(self):
        console = pytest.importorskip("rich.console")
        file = io.StringIO()
        buffer = self.make()
        with live_stats(buffer, console=console.Console(file=file, width=120), refresh_per_second=1e-3):
            buffer.extend(transitions(10))
        assert "10/20 items" in file.getvalue()


class TestNumpy(on.OnNumpy, ReplayBufferContract):
    def test_what_was_done_before_it_was_loaded_is_in_no_rate(self, tmp_path):
        buffer = self.make()
        buffer.extend(transitions(10))
        buffer.sample(5)
        buffer.save(tmp_path / "buffer")
        stats = load(tmp_path / "buffer").stats()
        assert (stats.total_added, stats.total_sampled) == (10, 5)
        assert (stats.added_per_second, stats.sampled_per_second) == (0, 0)

    def test_priorities_of_more_than_are_looked_at(self):
        buffer = ReplayBuffer(ArraySpec((), "float32"), 200_000, sampler=Prioritized())
        buffer.extend(np.zeros(150_000, np.float32))
        buffer.update_priorities(np.arange(75_000), np.full(75_000, 3.0))
        spread = buffer.stats().priorities
        assert spread.mean == pytest.approx(2, rel=1e-3)
        assert (spread.low, spread.high) == (pytest.approx(1), pytest.approx(3))


class TestTorch(on.OnTorch, ReplayBufferContract):
    pass


@pytest.mark.gpu
class TestTorchCuda(on.OnTorchCuda, ReplayBufferContract):
    pass


class TestJax(on.OnJax, ReplayBufferContract):
    pass


class TestJaxAsOnADevice(on.OnJaxAsOnADevice, ReplayBufferContract):
    pass


@pytest.mark.gpu
class TestJaxCuda(on.OnJaxCuda, ReplayBufferContract):
    pass


class TestStrict(on.OnStrict, ReplayBufferContract):
    pass


class TestStrictWithout64Bits(on.OnStrictWithout64Bits, ReplayBufferContract):
    pass


@pytest.mark.gpu
class TestCupy(on.OnCupy, ReplayBufferContract):
    pass


class TestCupyOnAStandIn(on.OnACupyStandIn, ReplayBufferContract):
    pass
