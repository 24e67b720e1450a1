"""Writers, samplers and a learner on one buffer: no item is ever torn, and each row number stands for one item."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from anystore.convert import to_numpy
from anystore.replay import Prioritized, Recent, ReplayBuffer, Uniform
from tests import on_backends as on
from tests.items import SPEC, assert_same, batch, host

CAPACITY = 48
WRITERS = 2
WAIT = 120
"""Seconds after which what should have happened long ago has failed."""


def stamps_of(items):
    """The stamps that one of the leaves tells."""
    return to_numpy(items["action"][0])


class Watch:
    """What was seen of a buffer, by however many threads."""

    def __init__(self, buffer: ReplayBuffer) -> None:
        self.buffer = buffer
        self._stamps: dict[int, int] = {}

    def check(self, sample) -> None:
        """Every item is whole, and the one that its row number has always stood for."""
        stamps = stamps_of(sample.items)
        assert_same(host(sample.items), batch(stamps))
        firsts = stamps if stamps.ndim == 1 else stamps[:, 0]
        for row, stamp in zip(to_numpy(sample.rows).tolist(), firsts.tolist(), strict=True):
            assert self._stamps.setdefault(row, stamp) == stamp

    def check_all(self, rounds: int) -> None:
        """All items at the end: the newest of each writer, in the order in which it wrote them."""
        stamps: dict[int, int] = {}
        for sample in self.buffer.one_pass(16):
            self.check(sample)
            stamps.update(zip(to_numpy(sample.rows).tolist(), stamps_of(sample.items).tolist(), strict=True))
        total = WRITERS * rounds * (1 + 8)
        assert self.buffer.total_added == total
        assert sorted(stamps) == list(range(total - CAPACITY, total))
        newest = [stamps[row] for row in sorted(stamps)]
        for writer in range(WRITERS):
            own = [stamp for stamp in newest if stamp % WRITERS == writer]
            count = rounds * (1 + 8)
            assert own == list(range((count - len(own)) * WRITERS + writer, count * WRITERS, WRITERS))


def write(buffer: ReplayBuffer, writer: int, rounds: range) -> None:
    """Singly and in batches, items whose stamps are this writer's own and go up."""
    for turn in rounds:
        first = turn * (1 + 8) * WRITERS + writer
        buffer.add(batch(first))
        buffer.extend(batch(first + WRITERS * np.arange(1, 9)))


def sample(watch: Watch, done: threading.Event) -> None:
    finished = False
    while not finished:
        finished = done.is_set()
        watch.check(watch.buffer.sample(16))
        drawn = watch.buffer.sample(8, num_steps=3)
        watch.check(drawn)
        if isinstance(watch.buffer.sampler, Prioritized):
            # Whatever is overwritten meanwhile is left out.
            assert 0 <= watch.buffer.update_priorities(drawn.rows, np.arange(8, dtype=np.float32)) <= 8


def learn(watch: Watch, done: threading.Event) -> None:
    with watch.buffer.batches(16, prefetch=2, to="numpy") as batches:
        finished = False
        while not finished:
            finished = done.is_set()
            watch.check(next(batches))


class ThreadsContract:
    rounds = 60

    @pytest.fixture(autouse=True)
    def _many_switches(self):
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        yield
        sys.setswitchinterval(interval)

    @pytest.mark.parametrize(
        "sampler", [Uniform, Prioritized, lambda: Recent(20)], ids=["uniform", "priority", "recent"]
    )
    def test_no_item_is_torn(self, sampler):
        buffer = ReplayBuffer(SPEC, CAPACITY, sampler=sampler(), seed=0, **self.options)
        watch, done = Watch(buffer), threading.Event()
        for writer in range(WRITERS):
            write(buffer, writer, range(1))  # something to sample from
        with ThreadPoolExecutor(8) as pool:
            writers = [pool.submit(write, buffer, writer, range(1, self.rounds)) for writer in range(WRITERS)]
            others = [pool.submit(work, watch, done) for work in (sample, sample, learn)]
            try:
                for writer in writers:
                    writer.result(WAIT)
            finally:
                done.set()
            for other in others:
                other.result(WAIT)
        watch.check_all(self.rounds)


class TestNumpy(on.OnNumpy, ThreadsContract):
    rounds = 2000


class TestPlainNumpy(on.OnPlainNumpy, ThreadsContract):
    rounds = 300


class TestTorch(on.OnTorch, ThreadsContract):
    rounds = 1000


class TestTorchAsOnADevice(on.OnTorchAsOnADevice, ThreadsContract):
    pass


@pytest.mark.gpu
class TestTorchCuda(on.OnTorchCuda, ThreadsContract):
    pass


class TestJax(on.OnJax, ThreadsContract):
    rounds = 5  # it compiles for each length of what is written


class TestJaxAsOnADevice(on.OnJaxAsOnADevice, TestJax):
    pass


@pytest.mark.gpu
class TestJaxCuda(on.OnJaxCuda, ThreadsContract):
    pass


class TestStrict(on.OnStrict, ThreadsContract):
    pass


@pytest.mark.gpu
class TestCupy(on.OnCupy, ThreadsContract):
    pass


class TestCupyOnAStandIn(on.OnACupyStandIn, ThreadsContract):
    rounds = 60


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a system without forks")
def test_a_forked_process_does_not_wait_for_a_thread_of_the_other():
    program = """
import os
import threading
import numpy as np
from anystore import ArraySpec
from anystore.replay import ReplayBuffer

buffer = ReplayBuffer(ArraySpec((), "float32"), 4, seed=0)
buffer.extend(np.ones(4, np.float32))
held, release = threading.Event(), threading.Event()

def hold():
    with buffer.lock:
        held.set()
        release.wait()

thread = threading.Thread(target=hold)
thread.start()
held.wait()
if os.fork() == 0:
    print(buffer.sample(2).items, flush=True)
    os._exit(0)
os.wait()
release.set()
thread.join()
"""
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=60)
    assert (run.stdout, run.stderr) == ("[1. 1.]\n", "")
