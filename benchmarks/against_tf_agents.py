"""NumpyStorage against TF-Agents' class of this name, in one process: the rate of ours over the rate of theirs.

Both are measured in turn, a round at a time, on storages whose memory was touched in full before; the medians are
compared. Needs tf-agents 0.19.0 (Python 3.11 or older, TensorFlow 2.15, NumPy 1.26).

With --memory it prints instead what saving a checkpoint adds to the resident memory of a process, at the peak: of
either class, and of TensorFlow alone, which is handed bytes that were there before. Needs Linux.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
from tf_agents.specs import array_spec
from tf_agents.utils import numpy_storage

from anystore import ArraySpec as Spec
from anystore import NumpyStorage

SMALL = {
    "obs": Spec((4,), "float32"),
    "next_obs": Spec((4,), "float32"),
    "action": Spec((), "int64"),
    "reward": Spec((), "float32"),
    "done": Spec((), "bool"),
}
Item = namedtuple("Item", SMALL)
WIDE = {**SMALL, "obs": Spec((84, 84, 4), "uint8"), "next_obs": Spec((84, 84, 4), "uint8")}
GOALS = {  # the rate of ours over theirs
    "small: get(int)": 30.0,
    "small: get(256 rows)": 8.0,
    "small: set(int)": 1.0,
    "wide: get(256 rows)": 1.0,
}


def median_seconds(functions: list[Callable[[], Any]], rounds: int) -> list[float]:
    """Of a call of each function; they take turns, for about 20 ms each."""
    calls, times = [], [list[float]() for _ in functions]
    for function in functions:
        start = time.perf_counter()
        for _ in range(5):
            function()
        calls.append(max(int(0.02 * 5 / (time.perf_counter() - start)), 1))
    for _ in range(rounds):
        for function, count, taken in zip(functions, calls, times):
            start = time.perf_counter()
            for _ in range(count):
                function()
            taken.append((time.perf_counter() - start) / count)
    return [statistics.median(taken) for taken in times]


def their_spec(data_spec: Any) -> Any:
    return tf.nest.map_structure(lambda spec: array_spec.ArraySpec(spec.shape, spec.dtype), data_spec)


def random_items(data_spec: Any, lead: tuple[int, ...], rng: np.random.Generator) -> Any:
    return tf.nest.map_structure(
        lambda spec: rng.integers(0, 2, (*lead, *spec.shape), np.uint8).astype(spec.dtype)[()], data_spec
    )


def touched(storage: Any, data_spec: Any, capacity: int) -> Any:
    """The storage, with something in every row."""
    rng = np.random.default_rng(0)
    for start in range(0, capacity, 1000):
        rows = slice(start, min(start + 1000, capacity))
        storage.set(rows, random_items(data_spec, (rows.stop - rows.start,), rng))
    return storage


def changed(item: Any, **leaves: Any) -> Any:
    return item._replace(**leaves) if hasattr(item, "_fields") else {**item, **leaves}


def cases(data_spec: Any, capacity: int) -> dict[str, list[Callable[[], Any]]]:
    """What is measured: a function for theirs and one for ours."""
    rng = np.random.default_rng(1)
    storages = [
        touched(numpy_storage.NumpyStorage(their_spec(data_spec), capacity), data_spec, capacity),
        touched(NumpyStorage(data_spec, capacity), data_spec, capacity),
    ]
    item, batch = random_items(data_spec, (), rng), random_items(data_spec, (256,), rng)
    numbers = changed(item, action=1, reward=0.5, done=True)
    doubles = changed(item, action=np.int32(1), reward=np.float64(0.5))
    rows = [rng.integers(0, capacity, 256) for _ in range(64)]
    turns = {id(storage): 0 for storage in storages}

    def some_rows(storage: Any) -> Any:
        turns[id(storage)] = turn = (turns[id(storage)] + 1) % len(rows)
        return rows[turn]

    calls: dict[str, Callable[[Any], Any]] = {
        "get(int)": lambda storage: storage.get(7),
        "get(256 rows)": lambda storage: storage.get(some_rows(storage)),
        "get(slice of 256)": lambda storage: storage.get(slice(128, 384)),
        "set(int)": lambda storage: storage.set(7, item),
        "set(int), Python's numbers": lambda storage: storage.set(7, numbers),
        "set(int), two leaves cast": lambda storage: storage.set(7, doubles),
        "set(256 rows)": lambda storage: storage.set(some_rows(storage), batch),
    }

    def bound(call: Callable[[Any], Any], storage: Any) -> Callable[[], Any]:
        return lambda: call(storage)

    return {name: [bound(call, storage) for storage in storages] for name, call in calls.items()}


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_of(function: Callable[[], Any]) -> int:
    """By how many bytes the resident memory of this process grows, at the peak."""
    Path("/proc/self/clear_refs").write_text("5")
    before = resident()
    function()
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return peak - before


class Bytes(tf.train.experimental.PythonState):
    """What TensorFlow saves without any work of ours."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> bytes:
        return self.content

    def deserialize(self, string_value: bytes) -> None:
        self.content = string_value


def saving(which: str, leaves: int, mebibytes: int) -> int:
    """The bytes that saving so many leaves adds, in a process that has saved something before."""
    data_spec = [Spec((2**20,), "uint8") for _ in range(leaves)]
    if which == "TensorFlow alone":
        saved = tf.Module()
        for number in range(leaves):
            setattr(saved, f"leaf{number}", Bytes(bytes([number]) * (mebibytes * 2**20)))
    else:
        saved = NumpyStorage(data_spec, mebibytes)
        if which == "theirs":
            saved = numpy_storage.NumpyStorage(their_spec(data_spec), mebibytes)
        for row in range(mebibytes):
            saved.set(row, [np.full(2**20, row, np.uint8)] * leaves)
    with tempfile.TemporaryDirectory() as folder:
        tf.train.Checkpoint(warm=Bytes(b"")).write(f"{folder}/warm")
        checkpoint = tf.train.Checkpoint(saved=saved)
        return peak_of(lambda: checkpoint.write(f"{folder}/checkpoint"))


def print_memory() -> None:
    processes = multiprocessing.get_context("spawn")
    for leaves, mebibytes in (4, 128), (1, 512), (16, 32):
        print(f"{leaves} leaves of {mebibytes} MiB; saving adds at the peak", flush=True)
        for which in "TensorFlow alone", "theirs", "ours":
            with processes.Pool(1) as pool:
                peak = pool.apply(saving, (which, leaves, mebibytes))
            print(f"    {which:20}{peak / 2**20:8.0f} MiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--small-capacity", type=int, default=100_000)
    parser.add_argument("--wide-capacity", type=int, default=10_000, help="a row takes 56 KB")
    parser.add_argument("--memory", action="store_true")
    arguments = parser.parse_args()
    if arguments.memory:
        print_memory()
        return

    print(f"Python {platform.python_version()}, NumPy {np.__version__}, TensorFlow {tf.__version__}")
    print(f"{'':52}{'theirs':>12}{'ours':>12}{'ratio':>9}  goal")
    for kind, data_spec, capacity in (
        ("small", SMALL, arguments.small_capacity),
        ("small, in a namedtuple", Item(**SMALL), arguments.small_capacity),
        ("wide", WIDE, arguments.wide_capacity),
    ):
        for name, functions in cases(data_spec, capacity).items():
            theirs, ours = median_seconds(functions, arguments.rounds)
            goal = GOALS.get(f"{kind}: {name}")
            state = "" if goal is None else f"{goal:g} {'reached' if theirs / ours >= goal else 'MISSED'}"
            head = f"{kind}: {name}"
            print(f"{head:52}{theirs * 1e6:9.1f} us{ours * 1e6:9.1f} us{theirs / ours:8.2f}x  {state}", flush=True)


if __name__ == "__main__":
    main()
