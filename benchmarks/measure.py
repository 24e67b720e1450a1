"""Measure what can be measured in this environment: anystore, NumPy by hand and one peer, in one process.

    python -m benchmarks.measure torchrl --output benchmarks/results/raw/torchrl.json

Each figure is the median of several rounds, with its quartiles. In every round all subjects take their turn, so that
what else the machine does falls on all of them alike. Every store is written in full before it is timed.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.subjects import BY_HAND, ENVIRONMENTS, Anystore, NumpyByHand, NumpyInSmallPages, Subject, first
from benchmarks.workloads import WORKLOADS, Workload

ROUNDS = 9
SECONDS = 0.02
"""How long a subject is timed in a round."""
KEPT = 16
FILL_ROUNDS = 5
MOST_TO_FILL = 100_000
"""Rows; the filling of larger stores is not timed, since some take half a minute for it."""

Figures = dict[str, Any]


def operations(subject: Any, workload: Workload) -> dict[str, Callable[[int], object]]:
    """What to time, by name; the number that each is called with makes the rows of one call differ from the last's."""
    rng = np.random.default_rng(1)
    batches = list(rng.integers(0, workload.capacity, (61, 256)))
    some = [rng.choice(workload.capacity, 64, replace=False) for _ in range(61)]
    singles = [int(row) for row in rng.integers(0, workload.capacity, 997)]
    starts = [int(row) for row in rng.integers(0, workload.capacity - 64, 997)]
    batch = workload.batch(64)
    item, items = subject.prepare(first(batch)), subject.prepare(batch)
    kept: collections.deque[Any] = collections.deque(maxlen=KEPT)
    every: dict[str, tuple[str, Callable[[int], object]]] = {
        "set 1": ("set_one", lambda i: subject.set_one(singles[i % 997], item)),
        "get 1": ("get_one", lambda i: subject.get_one(singles[i % 997])),
        "set 64, a slice": ("set_slice", lambda i: subject.set_slice(starts[i % 997], items)),
        "set 64, rows": ("set_rows", lambda i: subject.set_rows(some[i % 61], items)),
        "get 256": ("get_rows", lambda i: subject.get_rows(batches[i % 61])),
        "get 256, kept": ("get_rows", lambda i: kept.append(subject.get_rows(batches[i % 61]))),
        "get 256, out": ("get_into", lambda i: subject.get_into(batches[i % 61])),
    }
    return {name: call for name, (method, call) in every.items() if getattr(subject, method, None)}


def calls_in(seconds: float, call: Callable[[int], object]) -> int:
    """How many calls take about so long."""
    count = 1
    while True:
        start = time.perf_counter()
        for i in range(count):
            call(i)
        took = time.perf_counter() - start
        if took > seconds / 4:
            return max(1, round(count * seconds / took))
        count *= 4


def time_in_turn(
    calls: dict[str, Callable[[int], object]], rounds: int = ROUNDS, seconds: float = SECONDS
) -> dict[str, Figures]:
    """Microseconds a call of each subject: median, and quartiles."""
    # Until as many batches are alive as will be, and libraries have imported and allocated what they put off.
    for call in calls.values():
        for i in range(2 * KEPT):
            call(i)
    counts = {name: calls_in(seconds, call) for name, call in calls.items()}
    took: dict[str, list[float]] = {name: [] for name in calls}
    for each in range(rounds):
        for name, call in calls.items():
            count, offset = counts[name], each * 131
            start = time.perf_counter()
            for i in range(offset, offset + count):
                call(i)
            took[name].append((time.perf_counter() - start) / count * 1e6)
    return {name: summary(times) for name, times in took.items()}


def summary(times: list[float]) -> Figures:
    low, middle, high = statistics.quantiles(times, n=4)
    return {"median": middle, "low": low, "high": high}


def measure_workload(workload: Workload, kinds: list[Any]) -> Figures:
    """Every operation of every subject, with all their stores in memory at once."""
    subjects: dict[str, Subject] = {}
    for kind in kinds:
        subject = kind(workload)
        subject.fill(workload)
        subjects[subject.name] = subject
    by_name: dict[str, dict[str, Callable[[int], object]]] = {}
    for name, subject in subjects.items():
        for operation, call in operations(subject, workload).items():
            by_name.setdefault(operation, {})[name] = call
    return {operation: time_in_turn(calls) for operation, calls in by_name.items()}


def measure_filling(workload: Workload, kinds: list[Any]) -> Figures:
    """Seconds from nothing to a full store, and of the construction alone."""
    took: dict[str, list[tuple[float, float]]] = {}
    for _ in range(FILL_ROUNDS):
        for kind in kinds:
            gc.collect()
            start = time.perf_counter()
            subject = kind(workload)
            constructed = time.perf_counter()
            subject.fill(workload)
            took.setdefault(kind.name, []).append((constructed - start, time.perf_counter() - constructed))
            del subject
    return {
        "construct": {
            name: {"median": statistics.median(each[0] for each in times) * 1e6} for name, times in took.items()
        },
        "fill": {name: {"median": statistics.median(each[1] for each in times) * 1e6} for name, times in took.items()},
    }


def resident_bytes() -> int:
    """What is in memory, without what `free` has kept for later, such as that of the items to fill a store with."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/smaps_rollup", encoding="ascii") as lines:
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss:"))


def measure_memory(kind: Any, workload: Workload) -> Figures:
    """The bytes that a full store adds to this process, which must have done nothing else."""
    small = Workload(workload.name, workload.spec, 256)
    kind(small).fill(small)
    before = resident_bytes()
    subject = kind(workload)
    subject.fill(workload)
    return {"resident": resident_bytes() - before, "payload": workload.nbytes}


def in_own_process(*arguments: str) -> Any:
    program = [sys.executable, "-W", "ignore", "-m", "benchmarks.measure", *arguments]
    return json.loads(subprocess.check_output(program, text=True).splitlines()[-1])


def measure_import(module: str) -> Figures:
    program = f"import time; start = time.perf_counter(); import {module}; print(time.perf_counter() - start)"
    command = [sys.executable, "-W", "ignore", "-c", program]
    return summary(
        [float(subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL)) * 1e6 for _ in range(7)]
    )


def machine() -> Figures:
    model = platform.processor()
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    return {"processor": model, "cores": len(os.sched_getaffinity(0)), "system": platform.platform(terse=True)}


def versions() -> dict[str, str]:
    names = ("anystore", "numpy", "torch", "jax", "tf-agents", "tensorflow", "torchrl", "cpprb", "flashbax")
    found = {"python": platform.python_version()}
    for name in (*names, "stable-baselines3", "tianshou", "rlox", "ribs"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def heading(figures: Figures, more: str = "") -> str:
    """When and where figures were measured, and with what."""
    found = ", ".join(f"{name} {version}" for name, version in figures["versions"].items())
    computer = figures["machine"]
    where = f"{computer['processor']}, {computer['cores']} cores, {computer['system']}"
    return f"{figures['date']}; {where}; {more}{found}."


def measure(environment: str, names: list[str]) -> Figures:
    peers = ENVIRONMENTS[environment]
    kinds = [Anystore, *BY_HAND, *peers]
    figures: Figures = {"date": datetime.date.today().isoformat(), "machine": machine(), "versions": versions()}
    for name in names:
        workload = WORKLOADS[name]
        print(f"{environment}: {name}", file=sys.stderr)
        filled = [Anystore, NumpyByHand, NumpyInSmallPages, *peers] if workload.capacity <= MOST_TO_FILL else []
        figures[name] = {
            **measure_workload(workload, kinds),
            **(measure_filling(workload, filled) if filled else {}),
            "memory": {
                kind.name: in_own_process(environment, "--workloads", name, "--memory-of", kind.name)
                for kind in (Anystore, NumpyByHand, *peers)
            },
        }
    figures["import"] = {kind.name: measure_import(kind.module) for kind in (Anystore, NumpyByHand, *peers)}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environment", choices=ENVIRONMENTS)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        kinds = {kind.name: kind for kind in (Anystore, NumpyByHand, *ENVIRONMENTS[options.environment])}
        print(json.dumps(measure_memory(kinds[options.memory_of], WORKLOADS[options.workloads[0]])))
        return
    figures = json.dumps(measure(options.environment, options.workloads), indent=1)
    if options.output is None:
        print(figures)
        return
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(figures + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
