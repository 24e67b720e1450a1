"""Measure `anystore.replay` beside the replay buffer of a peer, in one process, and write what all runs found.

    python -m benchmarks.replay cpprb

adds the figures of this environment to results/replay.json and writes the tables of results/replay.md anew. The
environment "anystore" holds no peer: what the cost of a call grows with, and windows.

Times are medians of rounds in which all subjects take their turn, on buffers that are full.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import measure as measuring
from benchmarks.measure import Figures, machine, versions
from benchmarks.replay_memory import CAPACITY, ENVIRONMENTS, EPISODE, KINDS, WRITTEN
from benchmarks.replay_subjects import BATCH, BESIDE, IN_LANES, PRIORITISED, Anystore, Replay
from benchmarks.subjects import first
from benchmarks.workloads import CARTPOLE, WORKLOADS, Workload

RESULTS = Path(__file__).parent / "results"
LANES, STEPS = 64, 8
THREE = f"add 1, sample and update {BATCH}"
ROWS = (10_000, 100_000, 1_000_000, 10_000_000)
WARM_UP = 4000
"""Updates of 256 before anything prioritised is timed, so that the priorities of most rows differ."""
WINDOWS = {"cross": "go on past an episode's end", "pad": "padded at an episode's end", "whole": "within an episode"}
OURS = {"anystore", "anystore on torch", "anystore on JAX"}
ABOUT = """\
Time of a call as a multiple of that of `anystore.replay` on NumPy in the same process, taken in turn; above 1 it takes
longer. Medians; in brackets the time itself."""
NOTES = """\
Each library is used as it is meant to be, so not all do the same work. Stable-Baselines3 returns torch tensors, keeps a
second copy of the observations of cartpole and robot, and of atari one copy by `optimize_memory_usage`; its step of 64
environments is an `add` with `n_envs=64`. Tianshou keeps more flags, and finds what follows an observation of robot and
atari by `ignore_obs_next`; its step is an `add` to a `VectorReplayBuffer`. cpprb, TorchRL and flashbax hold the same
leaves as anystore. flashbax is an item buffer, for the step a trajectory buffer with `add_batch_size=64`, each of its
functions compiled and its state given away; here JAX finishes a call before the next. Only anystore checks what it is
given, and changes nothing if it refuses it. anystore and torch gather samples of megabytes on several threads, the
others on one."""
SIZES = """\
One call of anystore on cartpole, all buffers in memory at once. Rows drawn at random from a larger buffer are found in
the processor's caches less often, whoever draws them: the last line is the same by hand."""
WINDOW_NOTES = "The time as a multiple of that of as many rows drawn singly; episodes of 500 steps."
MEMORY = f"""\
Stacks of four frames of 84 x 84 bytes with the stack that follows; {WRITTEN:,} steps into a buffer for {CAPACITY:,},
in episodes of {EPISODE} that end by turns in truncation and in termination. What the full buffer added to the resident
memory of a process of its own, divided by the transitions that can be drawn; of those drawn, how many had a wrong stack
in `obs`, or in `next_obs` where the episode had not terminated. TF-Agents keeps every frame once, but as a view, which
keeps the stack in memory that it is a view of. Times: each in that process, alone."""
ROUNDS, SECONDS = 61, 0.004
"""Many short rounds, so that those in which another program had the processor are far from the median."""

Calls = dict[str, Callable[[int], object]]


def time_in_turn(calls: Calls) -> Figures:
    return measuring.time_in_turn(calls, ROUNDS, SECONDS)


def measure_workload(workload: Workload, kinds: list[type[Replay]]) -> Figures:
    """Adding and uniform sampling, with the buffers of all subjects in memory at once."""
    by_name: dict[str, Calls] = {}
    for kind in kinds:
        subject = kind(workload)
        subject.fill(workload)
        batch = workload.batch(LANES)
        item, items = subject.prepare(first(batch)), subject.prepare(batch)
        by_name.setdefault("add 1", {})[kind.name] = bind(subject.add, item)
        by_name.setdefault(f"sample {BATCH}", {})[kind.name] = bind(subject.sample, BATCH)
        if subject.extend is not None:
            by_name.setdefault(f"extend {LANES}", {})[kind.name] = bind(subject.extend, items)
    return {name: time_in_turn(calls) for name, calls in by_name.items() if set(calls) - OURS}


def measure_lanes(workload: Workload, kinds: list[type[Replay]]) -> Figures:
    """Adding a step of 64 environments."""
    calls: Calls = {}
    workload = replace(workload, capacity=workload.capacity // LANES * LANES)
    for kind in kinds:
        subject = kind(workload, lanes=LANES)
        subject.fill(workload)
        calls[kind.name] = bind(subject.extend, subject.prepare(workload.batch(LANES)))
    return time_in_turn(calls)


def measure_prioritised(workload: Workload, kinds: list[type[Replay]]) -> Figures:
    """Adding, sampling and updating by priorities."""
    by_name: dict[str, Calls] = {}
    for kind in kinds:
        try:
            subject = kind(workload, prioritised=True)
        except RuntimeError as error:  # TorchRL, where its extension was built for another torch
            print(f"{kind.name} is left out: {error}", file=sys.stderr)
            continue
        subject.fill(workload)
        for name, call in prioritised_calls(subject, first(workload.batch(1))).items():
            by_name.setdefault(name, {})[kind.name] = call
    return {name: time_in_turn(calls) for name, calls in by_name.items()}


def prioritised_calls(subject: Replay, item: Any) -> Calls:
    rng = np.random.default_rng(0)
    priorities = [subject.prepare_priorities(rng.exponential(size=BATCH).astype(np.float32)) for _ in range(61)]

    def both(i: int) -> None:
        subject.update(subject.sample(BATCH), priorities[i % 61])

    for i in range(WARM_UP):
        both(i)

    def all_three(i: int) -> None:
        subject.add(prepared)
        both(i)

    prepared, kept = subject.prepare(item), [subject.sample(BATCH) for _ in range(61)]
    return {
        f"sample {BATCH}": bind(subject.sample, BATCH),
        f"update {BATCH}": lambda i: subject.update(kept[i % 61], priorities[i % 61]),
        f"sample and update {BATCH}": both,
        "add 1": bind(subject.add, prepared),
        THREE: all_three,
    }


def bind(method: Callable[[Any], object], argument: Any) -> Callable[[int], object]:
    return lambda i: method(argument)


def measure_sizes() -> Figures:
    """What calls cost from 10,000 to 10,000,000 rows, and what NumPy needs to take as many rows at random."""
    by_name: dict[str, Calls] = {}
    for rows in ROWS:
        workload, size = replace(CARTPOLE, capacity=rows), f"{rows:,}"
        uniform, prioritised = Anystore(workload), Anystore(workload, prioritised=True)
        uniform.fill(workload)
        prioritised.fill(workload)
        item = first(workload.batch(1))
        by_name.setdefault("add 1", {})[size] = bind(uniform.add, item)
        by_name.setdefault(f"sample {BATCH}", {})[size] = bind(uniform.sample, BATCH)
        for name, call in prioritised_calls(prioritised, item).items():
            by_name.setdefault(f"prioritised: {name}", {})[size] = call
        by_name.setdefault(f"NumPy by hand: draw and take {BATCH}", {})[size] = by_hand(uniform)
    return {name: time_in_turn(calls) for name, calls in by_name.items()}


def by_hand(subject: Anystore) -> Callable[[int], object]:
    rng, rows = np.random.default_rng(0), len(subject.buffer)
    buffers = list(subject.buffer.storage.get(slice(None), copy=False).values())

    def call(i: int) -> object:
        drawn = rng.integers(0, rows, BATCH)
        return [buffer.take(drawn, 0) for buffer in buffers]

    return call


def measure_windows(workload: Workload) -> Figures:
    """Windows of 8 steps against as many rows drawn singly."""
    from anystore import ArraySpec
    from anystore.replay import ReplayBuffer

    spec = {**workload.spec, "truncated": ArraySpec((), "bool")}
    batch = {**workload.batch(1000), "truncated": np.arange(1000) % EPISODE == EPISODE - 1}
    buffer = ReplayBuffer(spec, workload.capacity, seed=0)
    for _ in range(-(-workload.capacity // 1000)):
        buffer.extend(batch)
    calls: Calls = {f"{BATCH * STEPS} rows": lambda i: buffer.sample(BATCH * STEPS)}
    for at_end in WINDOWS:
        calls[at_end] = lambda i, at_end=at_end: buffer.sample(BATCH, num_steps=STEPS, at_end=at_end)  # type: ignore[misc]
    return time_in_turn(calls)


def measure_memory(name: str) -> Figures:
    program = [sys.executable, "-W", "ignore", "-m", "benchmarks.replay_memory", name]
    found: Figures = json.loads(subprocess.check_output(program, text=True).splitlines()[-1])
    return found


def measure(environment: str) -> Figures:
    """All that can be measured here."""
    figures: Figures = {"date": datetime.date.today().isoformat(), "machine": machine(), "versions": versions()}
    figures["load"] = os.getloadavg()[0]
    kinds = BESIDE.get(environment, [])
    for workload in WORKLOADS.values() if kinds else []:
        print(f"{environment}: {workload.name}", file=sys.stderr)
        figures[workload.name] = measure_workload(workload, kinds)
        if in_lanes := with_a_peer(kinds, IN_LANES):
            figures[workload.name][f"a step of {LANES} environments"] = measure_lanes(workload, in_lanes)
    if prioritised := with_a_peer(kinds, PRIORITISED):
        print(f"{environment}: prioritised", file=sys.stderr)
        figures["prioritised"] = measure_prioritised(CARTPOLE, prioritised)
    if environment == "anystore":
        print(f"{environment}: windows, sizes", file=sys.stderr)
        figures["windows"] = {workload.name: measure_windows(workload) for workload in WORKLOADS.values()}
        figures["sizes"] = measure_sizes()
    print(f"{environment}: memory", file=sys.stderr)
    figures["memory"] = {name: measure_memory(name) for name in ENVIRONMENTS.get(environment, [])}
    return figures


def with_a_peer(kinds: list[type[Replay]], among: tuple[type[Replay], ...]) -> list[type[Replay]]:
    """Those of the kinds that are among these; none where that leaves no peer."""
    chosen = [kind for kind in kinds if kind in among]
    return chosen if {kind.name for kind in chosen} - OURS else []


# What was found ------------------------------------------------------------------------------------------------------


def table(environments: dict[str, Figures], part: str, operations: tuple[str, ...]) -> str:
    """A row for each subject: its time as a multiple of anystore's in the same process, and the time itself."""
    lines = [f"| {part} | {' | '.join(operations)} |", f"|---|{'---:|' * len(operations)}"]
    for environment, kind in [(name, kind) for name, kinds in BESIDE.items() for kind in kinds]:
        measured = environments.get(environment, {}).get(part, {})
        cells = [cell(measured.get(operation, {}), kind.name) for operation in operations]
        if any(cells):
            where = f"{kind.name}, beside {environment}" if kind.name in OURS else kind.name
            lines.append(f"| {where} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(measured: Figures, subject: str) -> str:
    if subject not in measured:
        return ""
    micros = measured[subject]["median"]
    return f"**{micros / measured['anystore']['median']:.2f}** ({micros:,.1f} us)"


def slower(environments: dict[str, Figures]) -> str:
    """Where a peer took less time than anystore beside it, on NumPy or on torch."""
    found = []
    for figures in environments.values():
        for part in (*WORKLOADS, "prioritised"):
            for operation, measured in figures.get(part, {}).items():
                for ours, peer in itertools.product(OURS & set(measured), set(measured) - OURS):
                    if (share := measured[peer]["median"] / measured[ours]["median"]) < 1:
                        found.append(f"- {part}, {operation}: {peer} takes {share:.2f} of the time of {ours}")
    return "\n".join(sorted(found)) or "Nowhere, of what is in the tables above."


def sizes_table(sizes: Figures) -> str:
    """Microseconds a call by the number of rows, and the last of them as a multiple of the first."""
    counts = list(next(iter(sizes.values())))
    lines = [f"| rows | {' | '.join(counts)} | last / first |", f"|---|{'---:|' * (len(counts) + 1)}"]
    for operation, measured in sizes.items():
        micros = [measured[count]["median"] for count in counts]
        cells = [f"{each:,.1f} us" for each in micros]
        lines.append(f"| {operation} | {' | '.join(cells)} | {micros[-1] / micros[0]:.2f} |")
    return "\n".join(lines)


def windows_table(windows: Figures) -> str:
    """The time of windows as a multiple of that of as many rows."""
    single = f"{BATCH * STEPS} rows"
    lines = [f"| {BATCH} windows of {STEPS} | {' | '.join(WINDOWS.values())} | {single} |", "|---|---:|---:|---:|---:|"]
    for name, measured in windows.items():
        base = measured[single]["median"]
        cells = [f"**{measured[at]['median'] / base:.2f}** ({measured[at]['median']:,.0f} us)" for at in WINDOWS]
        lines.append(f"| {name} | {' | '.join(cells)} | {base:,.0f} us |")
    return "\n".join(lines)


def memory_table(environments: dict[str, Figures]) -> str:
    """Bytes of a transition, and whether what was kept is right."""
    heads = ("resident bytes", "of its arrays", "wrong of drawn", "add 1", f"sample {BATCH}")
    lines = [f"| frames | {' | '.join(heads)} |", f"|---|{'---:|' * len(heads)}"]
    found = {name: each for figures in environments.values() for name, each in figures["memory"].items()}
    for name, each in sorted(found.items(), key=lambda pair: list(KINDS).index(pair[0])):
        arrays = "" if each["arrays"] is None else f"{each['arrays']:,.0f}"
        wrong, times = f"{each['wrong']:,} of {each['drawn']:,}", f"{each['add']:,.0f} us | {each['sample']:,.0f} us"
        lines.append(f"| {name} | {each['resident']:,.0f} | {arrays} | {wrong} | {times} |")
    return "\n".join(lines)


def heading(figures: Figures) -> str:
    load = f"load before {figures['load']:.1f}; "
    return f"{measuring.heading(figures, load)} {figures['note']}".rstrip()


def report(environments: dict[str, Figures]) -> str:
    """All tables, as Markdown."""
    adding = ("add 1", f"extend {LANES}", f"a step of {LANES} environments", f"sample {BATCH}")
    by_priority = (f"sample {BATCH}", f"update {BATCH}", f"sample and update {BATCH}", "add 1", THREE)
    text = [
        "# Replay side by side",
        ABOUT,
        "## Adding and uniform sampling",
        NOTES,
        *(table(environments, name, adding) for name in WORKLOADS),
        f"## By priority, {CARTPOLE.capacity:,} rows of {CARTPOLE.name}",
        table(environments, "prioritised", by_priority),
        "## Where a peer is faster",
        slower(environments),
    ]
    if "anystore" in environments:
        text += ["## What the cost grows with", SIZES, sizes_table(environments["anystore"]["sizes"])]
        text += ["## Windows", WINDOW_NOTES, windows_table(environments["anystore"]["windows"])]
    text += ["## Memory of a transition", MEMORY, memory_table(environments), "## Environments"]
    text.append("\n".join(f"- {name}: {heading(figures)}" for name, figures in environments.items()))
    return "\n\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environment", choices=sorted({*BESIDE, *ENVIRONMENTS}), nargs="?")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of replay.json and replay.md")
    parser.add_argument("--note", default="", help="what a reader should know of this environment")
    options = parser.parse_args()
    path = options.results / "replay.json"
    environments: dict[str, Figures] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if options.environment:
        environments[options.environment] = {**measure(options.environment), "note": options.note}
    environments = dict(sorted(environments.items()))
    options.results.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(environments, indent=1) + "\n", encoding="utf-8")
    (options.results / "replay.md").write_text(report(environments), encoding="utf-8")


if __name__ == "__main__":
    main()
