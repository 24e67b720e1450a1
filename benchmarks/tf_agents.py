"""NumpyStorage against TF-Agents' class of this name, in one process: the rate of ours over the rate of theirs.

Both are measured in turn, a round at a time, on storages whose memory was touched in full before; the medians are
compared. Needs tf-agents 0.19.0 (Python 3.11 or older, TensorFlow 2.15, NumPy 1.26).
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
from tf_agents.utils import numpy_storage

from anystore import ArraySpec as Spec
from anystore.tf import NumpyStorage

SMALL = {
    "obs": Spec((4,), "float32"),
    "next_obs": Spec((4,), "float32"),
    "action": Spec((), "int64"),
    "reward": Spec((), "float32"),
    "done": Spec((), "bool"),
}
WIDE = {**SMALL, "obs": Spec((84, 84, 4), "uint8"), "next_obs": Spec((84, 84, 4), "uint8")}
GOALS = {"small: get(int)": 30.0, "small: get(256 rows)": 8.0, "small: set(int)": 1.0, "wide: get(256 rows)": 1.0}


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


def their_spec(data_spec: dict[str, Spec]) -> dict[str, Any]:
    from tf_agents.specs import array_spec

    return {key: array_spec.ArraySpec(spec.shape, spec.dtype) for key, spec in data_spec.items()}


def touched(storage: Any, data_spec: dict[str, Spec], capacity: int) -> Any:
    """The storage, with something in every row."""
    rng = np.random.default_rng(0)
    for start in range(0, capacity, 1000):
        rows = slice(start, min(start + 1000, capacity))
        count = rows.stop - rows.start
        values = {key: rng.integers(0, 2, (count, *spec.shape), np.uint8) for key, spec in data_spec.items()}
        storage.set(rows, {key: value.astype(data_spec[key].dtype) for key, value in values.items()})
    return storage


def cases(data_spec: dict[str, Spec], capacity: int) -> dict[str, list[Callable[[], Any]]]:
    """What is measured: a function for theirs and one for ours."""
    rng = np.random.default_rng(1)
    storages = [
        touched(numpy_storage.NumpyStorage(their_spec(data_spec), capacity), data_spec, capacity),
        touched(NumpyStorage(data_spec, capacity), data_spec, capacity),
    ]
    item = {key: rng.integers(0, 2, spec.shape).astype(spec.dtype) for key, spec in data_spec.items()}
    item = {key: leaf if leaf.ndim else leaf[()] for key, leaf in item.items()}
    numbers = {**item, "action": 1, "reward": 0.5, "done": True}
    doubles = {**item, "reward": np.float64(0.5), "action": np.int32(1)}
    batch = {key: np.stack([value] * 256) for key, value in item.items()}
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--small-capacity", type=int, default=100_000)
    parser.add_argument("--wide-capacity", type=int, default=10_000, help="a row takes 56 KB")
    arguments = parser.parse_args()

    print(f"Python {platform.python_version()}, NumPy {np.__version__}, TensorFlow {tf.__version__}")
    print(f"{'':34}{'theirs':>12}{'ours':>12}{'ratio':>9}  goal")
    for kind, data_spec, capacity in (
        ("small", SMALL, arguments.small_capacity),
        ("wide", WIDE, arguments.wide_capacity),
    ):
        for name, functions in cases(data_spec, capacity).items():
            theirs, ours = median_seconds(functions, arguments.rounds)
            goal = GOALS.get(f"{kind}: {name}")
            state = "" if goal is None else f"{goal:g} {'reached' if theirs / ours >= goal else 'MISSED'}"
            head = f"{kind}: {name}"
            print(f"{head:34}{theirs * 1e6:9.1f} us{ours * 1e6:9.1f} us{theirs / ours:8.2f}x  {state}", flush=True)


if __name__ == "__main__":
    main()
