"""The cost of a call on five small leaves, against a loop over a dict of NumPy arrays that checks nothing.

Prints the microseconds of both and their ratio, which is what counts: both are measured in turn, in one process.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

from anystore import ArraySpec, Storage

SPEC = {
    "obs": ArraySpec((4,), "float32"),
    "next_obs": ArraySpec((4,), "float32"),
    "action": ArraySpec((), "int64"),
    "reward": ArraySpec((), "float32"),
    "done": ArraySpec((), "bool"),
}
CAPACITY = 100_000
IMPORT = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"


def measure(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> tuple[float, float]:
    """The median microseconds of a call of each, measured in turn."""
    calls = 2000
    times: dict[Callable[[], object], list[float]] = {ours: [], theirs: []}
    for _ in range(rounds):
        for function, took in times.items():
            start = time.perf_counter()
            for _ in range(calls):
                function()
            took.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(times[ours]), statistics.median(times[theirs])


def import_seconds(module: str, rounds: int) -> float:
    """The median time of the import in a process of its own."""
    program = [sys.executable, "-c", IMPORT.format(module)]
    return statistics.median(float(subprocess.check_output(program)) for _ in range(rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds

    rng = np.random.default_rng(0)
    items = {key: rng.random((CAPACITY, *spec.shape)).astype(spec.dtype) for key, spec in SPEC.items()}
    store = Storage(SPEC, CAPACITY)
    store.set(..., items)
    arrays = {key: array.copy() for key, array in items.items()}
    item = {key: array[3] for key, array in items.items()}
    numbers = {**item, "action": 1, "reward": 0.5, "done": False}
    some = {key: array[:64] for key, array in items.items()}
    rows, place = rng.integers(0, CAPACITY, 256), slice(128, 192)

    def hand_set(value: dict[str, object], where: object) -> None:
        for key, array in arrays.items():
            array[where] = value[key]

    pairs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "get(int), a copy": (lambda: store.get(7), lambda: {key: array[7] for key, array in arrays.items()}),
        "get(int), views": (lambda: store.get(7, copy=None), lambda: {key: array[7] for key, array in arrays.items()}),
        "set(int, item)": (lambda: store.set(7, item), lambda: hand_set(item, 7)),
        "set(int, item of Python numbers)": (lambda: store.set(7, numbers), lambda: hand_set(numbers, 7)),
        "set(slice of 64, batch)": (lambda: store.set(place, some), lambda: hand_set(some, place)),
        "get(256 rows)": (lambda: store.get(rows), lambda: {key: array[rows] for key, array in arrays.items()}),
        "get(256 rows), against take": (
            lambda: store.get(rows),
            lambda: {key: array.take(rows, 0) for key, array in arrays.items()},
        ),
    }
    print(platform.machine(), f"Python {platform.python_version()}", f"NumPy {np.__version__}", sep=", ")
    print(f"{'':<34} {'anystore':>10} {'by hand':>10} {'ratio':>7}")
    for name, (ours, theirs) in pairs.items():
        a, b = measure(ours, theirs, rounds)
        print(f"{name:<34} {a:>7.2f} us {b:>7.2f} us {a / b:>7.2f}")
    a, b = import_seconds("anystore", rounds), import_seconds("numpy", rounds)
    print(f"{'import, against import numpy':<34} {a * 1e3:>7.0f} ms {b * 1e3:>7.0f} ms {a / b:>7.2f}")


if __name__ == "__main__":
    main()
