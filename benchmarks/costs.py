"""What the cost of a call grows with: the batch, the width of a row, the number of leaves, the capacity.

python -m benchmarks.costs --output benchmarks/results/raw/costs.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from anystore import ArraySpec
from benchmarks.measure import machine, time_in_turn, versions
from benchmarks.subjects import Anystore, NumpyByHand, NumpyTake
from benchmarks.workloads import CARTPOLE, Workload

KINDS: tuple[Callable[[Workload], Any], ...] = (Anystore, NumpyByHand, NumpyTake)


def read_times(workload: Workload, rows: int, *, one: bool = False) -> dict[str, float]:
    """The microseconds of reading so many random rows, or a single one, of each kind of store."""
    rng = np.random.default_rng(0)
    indices: list[Any] = list(rng.integers(0, workload.capacity, (61, rows)))
    if one:
        indices = [int(each[0]) for each in indices]
    calls = {}
    for kind in KINDS:
        subject = kind(workload)
        subject.fill(workload)
        read = subject.get_one if one else subject.get_rows
        calls[subject.name] = lambda i, read=read: read(indices[i % 61])
    return {name: figures["median"] for name, figures in time_in_turn(calls).items()}


def curve(label: str, points: Iterable[tuple[int, dict[str, float]]]) -> dict[str, Any]:
    found = list(points)
    names = found[0][1]
    return {
        "label": label,
        "x": [x for x, _ in found],
        "micros": {name: [times[name] for _, times in found] for name in names},
    }


def of_width(width: int) -> Workload:
    return Workload("width", {"x": ArraySpec((width,), "uint8")}, 2**29 // max(width, 4096))


def of_leaves(count: int) -> Workload:
    return Workload("leaves", {f"leaf{i}": ArraySpec((4,), "float32") for i in range(count)}, 100_000)


def of_capacity(capacity: int) -> Workload:
    return Workload("capacity", CARTPOLE.spec, capacity)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    curves = {
        "reading cartpole": curve("rows", ((n, read_times(CARTPOLE, n)) for n in (1, 4, 16, 64, 256, 1024, 4096))),
        "reading 256 rows": curve(
            "bytes of a row", ((n, read_times(of_width(n), 256)) for n in (4, 64, 1024, 8192, 65536))
        ),
        "reading 256 rows of 16-byte leaves": curve(
            "leaves", ((n, read_times(of_leaves(n), 256)) for n in (1, 2, 5, 10, 20, 50))
        ),
        "reading one item": curve(
            "capacity", ((n, read_times(of_capacity(n), 1, one=True)) for n in (10**3, 10**4, 10**5, 10**6, 10**7))
        ),
    }
    figures = {"machine": machine(), "versions": versions(), "curves": curves}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
