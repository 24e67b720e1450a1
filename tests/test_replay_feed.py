"""Batches for a learner: what is drawn ahead, in what order, in whose arrays, and how it ends."""

from __future__ import annotations

import gc
import itertools
import os
import subprocess
import sys
import threading
import traceback
import weakref
from typing import Any, NamedTuple

import numpy as np
import pytest

from anystore import select_backend
from anystore.convert import library_of, to_numpy
from anystore.replay import Prioritized, ReplayBuffer
from anystore.replay.feed import Batches, torch_dataset
from tests import stand_in
from tests.items import SPEC, assert_same, batch, host, leaves

WAIT = 60
"""Seconds after which what should have happened long ago has failed."""
AHEAD = [0, 1, 2, 5]


class Drawn(NamedTuple):
    items: Any
    rows: Any
    weights: Any = None


class Numbers:
    """A buffer whose samples are numbered, and which fails at some of them."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.fail_at = fail_at
        self.drawn = 0
        self.options: dict[str, Any] = {}
        self.threads: set[threading.Thread] = set()
        self.permits: threading.Semaphore | None = None
        """What each sample waits for, if anything."""
        self.waiting = threading.Semaphore(0)
        """Released by each sample before it waits."""

    def sample(self, batch_size, **options):
        self.threads.add(threading.current_thread())
        self.options = options
        self.waiting.release()
        if self.permits is not None:
            assert self.permits.acquire(timeout=WAIT)
        number, self.drawn = self.drawn, self.drawn + 1
        if number == self.fail_at:
            raise ZeroDivisionError(f"sample {number}")
        return Drawn({"x": np.full(batch_size, number)}, np.arange(batch_size))

    def one_pass(self, batch_size, **options):
        """Three samples."""
        for _ in range(3):
            yield self.sample(batch_size, **options)

    def assert_no_thread_is_left(self):
        for thread in self.threads - {threading.current_thread()}:
            thread.join(WAIT)
            assert not thread.is_alive()


def numbers_of(batches):
    return [int(sample.items["x"][0]) for sample in batches]


@pytest.mark.parametrize("prefetch", AHEAD)
class TestBatches:
    def test_in_order(self, prefetch):
        with Batches(Numbers(), 3, prefetch=prefetch) as batches:
            assert [numbers_of([next(batches)]) for _ in range(20)] == [[n] for n in range(20)]

    def test_what_sample_is_asked_for(self, prefetch):
        buffer = Numbers()
        with Batches(buffer, 3, prefetch=prefetch, num_steps=8, n_step=None) as batches:
            assert next(batches).rows.shape == (3,)
        assert buffer.options == {"num_steps": 8, "n_step": None}

    @pytest.mark.parametrize("count", [0, 1, 7])
    def test_as_many_as_were_asked_for(self, prefetch, count):
        buffer = Numbers()
        batches = Batches(buffer, 3, prefetch=prefetch, count=count)
        assert numbers_of(batches) == list(range(count))
        assert list(batches) == []
        assert buffer.drawn == count
        buffer.assert_no_thread_is_left()

    def test_where_they_are_drawn(self, prefetch):
        buffer = Numbers()
        list(Batches(buffer, 3, prefetch=prefetch, count=5))
        assert len(buffer.threads) == 1
        assert (threading.current_thread() in buffer.threads) == (prefetch == 0)

    def test_nothing_before_the_first_is_asked_for(self, prefetch):
        buffer, threads = Numbers(), threading.active_count()
        batches = Batches(buffer, 3, prefetch=prefetch)
        assert threading.active_count() == threads
        batches.close()
        assert list(batches) == []
        assert buffer.drawn == 0

    @pytest.mark.parametrize("fail_at", [0, 1, 4])
    def test_an_exception_comes_after_what_was_drawn_before(self, prefetch, fail_at):
        buffer, found = Numbers(fail_at), []
        batches = Batches(buffer, 3, prefetch=prefetch)
        with pytest.raises(ZeroDivisionError, match=f"^sample {fail_at}$") as error:
            found.extend(iter(lambda: numbers_of([next(batches)]), None))
        assert found == [[number] for number in range(fail_at)]
        assert "raise ZeroDivisionError" in "".join(traceback.format_tb(error.value.__traceback__))
        assert list(batches) == []
        assert buffer.drawn == fail_at + 1
        buffer.assert_no_thread_is_left()

    def test_nothing_holds_an_exception(self, prefetch):
        class FailureError(Exception):
            pass

        buffer = Numbers()

        def fail(batch_size):
            buffer.threads.add(threading.current_thread())
            raise FailureError

        buffer.sample = fail
        gc.disable()
        try:
            try:
                next(Batches(buffer, 3, prefetch=prefetch))
            except FailureError as error:
                raised = weakref.ref(error)
            buffer.assert_no_thread_is_left()
            assert raised() is None
        finally:
            gc.enable()

    def test_close(self, prefetch):
        buffer = Numbers()
        batches = Batches(buffer, 3, prefetch=prefetch)
        next(batches)
        batches.close()
        assert not any(thread.is_alive() for thread in buffer.threads - {threading.current_thread()})
        assert list(batches) == []
        batches.close()

    def test_with(self, prefetch):
        buffer = Numbers()
        batches = Batches(buffer, 3, prefetch=prefetch)

        def learn():
            with batches:
                for _ in batches:
                    raise KeyError

        with pytest.raises(KeyError):
            learn()
        assert not any(thread.is_alive() for thread in buffer.threads - {threading.current_thread()})
        assert list(batches) == []

    def test_break_leaves_no_thread(self, prefetch):
        buffer = Numbers()
        for _ in Batches(buffer, 3, prefetch=prefetch):
            break
        buffer.assert_no_thread_is_left()

    def test_collected_in_a_cycle(self, prefetch):
        buffer = Numbers()
        cycle = {"batches": Batches(buffer, 3, prefetch=prefetch)}
        cycle["self"] = cycle
        next(cycle["batches"])
        del cycle
        gc.collect()
        buffer.assert_no_thread_is_left()

    @pytest.mark.parametrize(("passes", "count", "expected"), [(0, None, 0), (1, None, 3), (2, None, 6), (2, 4, 4)])
    def test_passes(self, prefetch, passes, count, expected):
        buffer = Numbers()
        batches = Batches(buffer, 3, prefetch=prefetch, passes=passes, count=count, num_steps=8)
        assert buffer.drawn == 0
        assert numbers_of(batches) == list(range(expected))
        assert list(batches) == []
        assert buffer.options == ({"num_steps": 8} if expected else {})
        buffer.assert_no_thread_is_left()

    @pytest.mark.parametrize("fail_at", [0, 4])
    def test_an_exception_ends_all_passes(self, prefetch, fail_at):
        buffer, found = Numbers(fail_at), []
        batches = Batches(buffer, 3, prefetch=prefetch, passes=3)
        with pytest.raises(ZeroDivisionError, match=f"^sample {fail_at}$"):
            found.extend(iter(lambda: numbers_of([next(batches)]), None))
        assert found == [[number] for number in range(fail_at)]
        assert list(batches) == []

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"count": -1}, "expected count to be an int of 0 or more, found -1"),
            ({"passes": -1}, "expected passes to be an int of 0 or more, found -1"),
            ({"to": "nunpy"}, "expected a library among numpy, torch, jax, tensorflow, cupy, found 'nunpy'"),
        ],
    )
    def test_refused(self, prefetch, options, text):
        with pytest.raises(ValueError, match=text):
            Batches(Numbers(), 3, prefetch=prefetch, **options)


class TestAhead:
    @pytest.mark.parametrize("prefetch", [1, 2, 5])
    def test_so_many_and_no_more(self, prefetch):
        buffer = Numbers()
        with Batches(buffer, 3, prefetch=prefetch) as batches:
            for taken in range(1, 5):
                next(batches)
                for _ in range(prefetch + (taken == 1)):  # the one that was taken is drawn anew
                    assert buffer.waiting.acquire(timeout=WAIT)
                    if taken > 1:
                        break
                assert not buffer.waiting.acquire(blocking=False)
        assert buffer.drawn <= 4 + prefetch

    def test_the_learner_works_meanwhile(self):
        buffer = Numbers()
        buffer.permits = threading.Semaphore(1)
        with Batches(buffer, 3, prefetch=1) as batches:
            assert numbers_of([next(batches)]) == [0]
            for _ in range(2):  # the second is being drawn while the first is in use
                assert buffer.waiting.acquire(timeout=WAIT)
            buffer.permits.release(10)

    def test_closed_while_a_learner_waits(self):
        buffer = Numbers()
        buffer.permits = threading.Semaphore(0)
        batches, found = Batches(buffer, 3), []
        learner = threading.Thread(target=lambda: found.append(list(batches)))
        learner.start()
        assert buffer.waiting.acquire(timeout=WAIT)
        closer = threading.Thread(target=batches.close)
        closer.start()
        buffer.permits.release(10)
        for thread in (closer, learner):
            thread.join(WAIT)
            assert not thread.is_alive()
        assert len(found[0]) <= 1
        assert list(batches) == []

    def test_dropped_by_whoever_holds_the_lock_that_a_sample_waits_for(self):
        buffer, lock = Numbers(), threading.Lock()
        inner = buffer.sample

        def sample(batch_size):
            with lock:
                return inner(batch_size)

        buffer.sample = sample
        batches = Batches(buffer, 3)
        next(batches)
        with lock:
            del batches
        buffer.assert_no_thread_is_left()

    def test_closed_by_its_own_thread(self):
        buffer = Numbers()
        inner = buffer.sample

        def sample(batch_size):
            if buffer.drawn == 2:
                batches.close()
            return inner(batch_size)

        buffer.sample = sample
        batches = Batches(buffer, 3)
        assert numbers_of(batches)[:2] in ([], [0], [0, 1])
        buffer.assert_no_thread_is_left()

    def test_several_learners(self):
        found: list[list[int]] = [[] for _ in range(3)]
        batches = Batches(Numbers(), 3, count=300)
        learners = [
            threading.Thread(target=lambda into: into.extend(numbers_of(batches)), args=[into]) for into in found
        ]
        for learner in learners:
            learner.start()
        for learner in learners:
            learner.join(WAIT)
            assert not learner.is_alive()
        assert sorted(itertools.chain(*found)) == list(range(300))
        assert all(into == sorted(into) for into in found)

    def test_negative(self):
        with pytest.raises(ValueError, match="^expected prefetch to be an int of 0 or more, found -2$"):
            Batches(Numbers(), 3, prefetch=-2)

    @pytest.mark.parametrize("ending", ["", "raise SystemExit(3)", "del batches"])
    def test_the_program_may_end_at_any_time(self, ending):
        program = f"""
import atexit
import threading
from anystore.replay.feed import Batches

inside, release = threading.Event(), threading.Event()

class Slow:
    drawn = 0

    def sample(self, batch_size):
        self.drawn += 1
        if self.drawn == 2:
            inside.set()
            release.wait()
            print("drawn to the end")

batches = Batches(Slow(), 3)
next(batches)
inside.wait()
atexit.register(release.set)  # called before what was registered before
{ending}
"""
        run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=WAIT)
        assert run.stderr == ""
        assert run.stdout == "drawn to the end\n"
        assert run.returncode == (3 if "Exit" in ending else 0)

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="a system without forks")
    def test_a_forked_process_is_told_that_the_thread_is_not_there(self):
        program = """
import os
from anystore.replay.feed import Batches
from tests.test_replay_feed import Numbers

started, fresh = Batches(Numbers(), 3), Batches(Numbers(), 3)
next(started)
if os.fork() == 0:
    try:
        next(started)
    except RuntimeError as error:
        print(error)
    print(next(fresh).items["x"])
    started.close()
    fresh.close()
    print("closed", flush=True)
    os._exit(0)
os.wait()
print(next(started).items["x"])
"""
        run = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=WAIT
        )
        assert run.stderr == ""
        assert run.stdout.splitlines() == [
            "the batches are drawn by a thread of the parent process; make new ones in this process",
            "[0 0 0]",
            "closed",
            "[1 1 1]",
        ]


LIBRARIES = ["numpy", "torch", "jax"]


class TestHandOver:
    @pytest.mark.parametrize("prefetch", [0, 2])
    @pytest.mark.parametrize("library", LIBRARIES)
    def test_whose_arrays(self, library, prefetch):
        pytest.importorskip(library)
        buffer = Numbers()
        buffer.sample = lambda size: Drawn(batch(np.arange(size)), np.arange(size))
        with Batches(buffer, 4, to=library, prefetch=prefetch) as batches:
            for sample in (next(batches), next(batches)):
                assert type(sample) is Drawn
                assert sample.weights is None
                assert type(sample.rows) is np.ndarray
                assert library_of(sample.items["obs"]["image"]) == library
                assert_same(host(sample.items), batch(np.arange(4)))

    def test_memory_is_shared_where_it_can_be(self):
        pytest.importorskip("torch")
        array = np.zeros(4)
        buffer = Numbers()
        buffer.sample = lambda size: Drawn(array, array)
        (shared,) = Batches(buffer, 4, to="torch", count=1)
        (copied,) = Batches(buffer, 4, to="torch", copy=True, count=1)
        array[1] = 5
        assert shared.items.tolist() == [0, 5, 0, 0]
        assert copied.items.tolist() == [0, 0, 0, 0]

    def test_refused_with_the_path(self):
        pytest.importorskip("torch")
        buffer = Numbers()
        buffer.sample = lambda size: Drawn({"x": np.arange(size)[::-1]}, np.arange(size))
        with pytest.raises(ValueError, match="^items/x: torch cannot share the memory of this array: it has negative"):
            next(Batches(buffer, 4, to="torch", copy=False))

    @pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
    def test_of_a_single_sample(self, library):
        pytest.importorskip(library)
        buffer = filled("numpy")
        sample = buffer.sample(4, num_steps=2, to=library)
        assert library_of(sample.items["obs"]["image"]) == library
        assert type(sample.rows) is np.ndarray

    def test_of_a_single_sample_refused_before_it_is_drawn(self):
        buffer = filled("numpy")
        for how, error in (({"to": "pandas"}, "pandas"), ({"device": "cpu"}, "expected to= with device='cpu'")):
            with pytest.raises(ValueError, match=error):
                buffer.sample(4, **how)
        assert buffer.stats().total_sampled == 0

    def test_samples_of_other_kinds(self):
        buffer = Numbers()
        buffer.sample = lambda size: {"x": np.arange(size)}
        (sample,) = Batches(buffer, 4, to="numpy", count=1)
        assert sample["x"].tolist() == [0, 1, 2, 3]


class TestStreams:
    """CuPy's current stream is that of a thread: the one that draws has the learner's."""

    @pytest.mark.parametrize("prefetch", [0, 2])
    def test_draws_are_made_on_the_learner_s_stream(self, monkeypatch, prefetch):
        with stand_in.installed(monkeypatch) as cupy:
            found = []

            class Buffer:
                backend = select_backend("cupy", "cuda:1")

                def sample(self, batch_size):
                    with cupy.cuda.Device(1):
                        found.append(cupy.cuda.get_current_stream())
                    return Drawn(cupy.asarray([1]), cupy.asarray([2]))

            batches = Batches(Buffer(), 3, prefetch=prefetch, count=2)
            with cupy.cuda.Device(1), cupy.cuda.Stream() as stream:
                list(batches)
            assert found == [stream, stream]

    @pytest.mark.parametrize("prefetch", [0, 2])
    def test_another_library_takes_them_over_on_the_learner_s_thread(self, monkeypatch, prefetch):
        feed = sys.modules["anystore.replay.feed"]
        with stand_in.installed(monkeypatch) as cupy:
            threads = []

            def hand_over(nest, library, **_):
                threads.append(threading.current_thread())
                return nest

            class Buffer:
                backend = select_backend("cupy", "cuda:1")

                def sample(self, batch_size):
                    return Drawn(cupy.asarray([1]), cupy.asarray([2]))

            monkeypatch.setattr(feed, "hand_over_batch", hand_over)
            batches = Batches(Buffer(), 3, prefetch=prefetch, to="numpy", count=2)
            assert len(list(batches)) == 2
            assert threads == [threading.current_thread()] * 2


def filled(backend: str, **options: Any) -> ReplayBuffer:
    """A buffer whose items are those of the stamps 100 to 199."""
    buffer = ReplayBuffer(SPEC, 100, backend=backend, seed=7, **options)
    buffer.extend(batch(np.arange(200)))
    return buffer


class TestReplayBuffer:
    @pytest.mark.parametrize("prefetch", AHEAD)
    @pytest.mark.parametrize("backend", ["numpy", "torch", "jax", "array_api_strict"])
    def test_what_sample_would_have_drawn(self, backend, prefetch):
        pytest.importorskip(backend)
        expected = filled(backend)
        with Batches(filled(backend), 8, prefetch=prefetch, num_steps=3) as batches:
            for _ in range(4):
                sample, other = next(batches), expected.sample(8, num_steps=3)
                assert_same(sample.items, other.items)
                assert_same(sample.rows, other.rows)

    @pytest.mark.parametrize("prefetch", [0, 2])
    @pytest.mark.parametrize("library", LIBRARIES)
    @pytest.mark.parametrize("backend", ["numpy", "torch", "jax", "array_api_strict"])
    def test_handed_over(self, backend, library, prefetch):
        pytest.importorskip(backend)
        pytest.importorskip(library)
        buffer = filled(backend, sampler=Prioritized())
        for sample in Batches(buffer, 8, to=library, prefetch=prefetch, count=3):
            arrays = [*leaves(sample.items), sample.weights]
            assert {library_of(array) for array in arrays} == {library}
            assert library_of(sample.rows) == backend
            stamps = to_numpy(sample.rows)
            assert ((stamps >= 100) & (stamps < 200)).all()
            assert_same(host(sample.items), batch(stamps))
            assert sample.mask is sample.discounts is None
            assert buffer.update_priorities(sample.rows, sample.weights) == 8

    @pytest.mark.parametrize("prefetch", [0, 2])
    @pytest.mark.parametrize("backend", ["numpy", "torch", "jax", "array_api_strict"])
    def test_passes(self, backend, prefetch):
        pytest.importorskip(backend)
        batches = filled(backend).batches(40, passes=2, prefetch=prefetch, to="numpy")
        samples = [sorted(to_numpy(sample.rows).tolist()) for sample in batches]
        assert [len(rows) for rows in samples] == [40, 40, 20] * 2
        first, second = (sorted(itertools.chain(*samples[start : start + 3])) for start in (0, 3))
        assert first == second == list(range(100, 200))
        assert samples[:3] != samples[3:]

    @pytest.mark.parametrize("prefetch", [0, 2])
    def test_several_learners_share_passes(self, prefetch):
        batches, found = filled("numpy").batches(1, passes=5, prefetch=prefetch), []

        def learn():
            found.extend(int(sample.rows[0]) for sample in batches)

        learners = [threading.Thread(target=learn) for _ in range(4)]
        for learner in learners:
            learner.start()
        for learner in learners:
            learner.join(WAIT)
        assert sorted(found) == sorted(list(range(100, 200)) * 5)

    def test_empty(self):
        batches = Batches(ReplayBuffer(SPEC, 100), 8)
        with pytest.raises(ValueError, match="^the buffer is empty; add items before sampling$"):
            next(batches)
        assert list(batches) == []


class TestTorchDataset:
    @pytest.fixture(autouse=True)
    def _torch(self):
        pytest.importorskip("torch")

    def loader(self, dataset, **options):
        import torch

        return torch.utils.data.DataLoader(dataset, batch_size=None, **options)

    def test_in_a_loader(self):
        import torch

        buffer = Numbers()
        dataset = torch_dataset(buffer, 3, count=4, num_steps=2)
        assert isinstance(dataset, torch.utils.data.IterableDataset)
        for _ in range(2):  # each loop has batches of its own
            samples = list(self.loader(dataset))
            assert all(isinstance(sample.items["x"], torch.Tensor) for sample in samples)
            assert len(samples) == 4
        assert buffer.drawn == 8
        assert buffer.options == {"num_steps": 2}
        buffer.assert_no_thread_is_left()

    def test_each_loop_is_a_pass(self):
        buffer = ReplayBuffer(SPEC, 100)
        buffer.extend(batch(np.arange(100)))
        loader = self.loader(torch_dataset(buffer, 32, passes=1))
        for _ in range(2):
            rows = [row for sample in loader for row in to_numpy(sample.rows).tolist()]
            assert sorted(rows) == list(range(100))

    def test_without_a_loader_and_in_numpy(self):
        samples = iter(torch_dataset(Numbers(), 3, to="numpy"))
        assert numbers_of([next(samples), next(samples)]) == [0, 1]
        assert type(next(samples).rows) is np.ndarray

    def test_break_leaves_no_thread(self):
        buffer = Numbers()
        for _ in self.loader(torch_dataset(buffer, 3)):
            break
        buffer.assert_no_thread_is_left()

    @pytest.mark.parametrize("start", ["fork", "spawn"])
    def test_no_worker_processes(self, start):
        program = f"""
import torch
from anystore.replay.feed import torch_dataset
from tests.test_replay_feed import Numbers

if __name__ == "__main__":
    loader = torch.utils.data.DataLoader(
        torch_dataset(Numbers(), 3), batch_size=None, num_workers=1, multiprocessing_context="{start}"
    )
    try:
        next(iter(loader))
    except RuntimeError as error:
        print(error)
"""
        run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=WAIT)
        assert "a worker process would sample from a copy of the buffer, which no new item reaches" in run.stdout

    def test_missing(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "torch.utils.data", None)
        from anystore.replay import feed

        feed._torch_dataset_class.cache_clear()
        with pytest.raises(ImportError, match=r"this data set needs torch, .*; pip install 'anystore\[torch\]'"):
            torch_dataset(Numbers(), 3)


def test_a_sample_is_a_nest_to_other_libraries():
    jax = pytest.importorskip("jax")
    torch = pytest.importorskip("torch")
    buffer = filled("numpy", sampler=Prioritized())
    sample = buffer.sample(8)
    total = jax.jit(lambda sample: sample.weights.sum() + jax.tree.leaves(sample.items)[0].shape[0])(sample)
    assert float(total) == pytest.approx(float(sample.weights.sum()) + 8)
    shapes = jax.tree.map(np.shape, sample)
    assert shapes.rows == (8,)
    assert shapes.mask is None
    doubled = torch.utils._pytree.tree_map(lambda leaf: leaf if leaf is None else leaf * 2, sample)
    assert (doubled.weights == 2 * sample.weights).all()
    assert type(shapes) is type(doubled) is type(sample)
