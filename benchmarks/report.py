"""What the measurements of all environments say together: one JSON, a Markdown table, pictures.

python -m benchmarks.report
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.measure import heading

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- begin figures -->\n", "<!-- end figures -->\n"
BASE = "NumPy by hand"
OPERATIONS = ("set 1", "get 1", "set 64, a slice", "set 64, rows", "get 256", "get 256, kept", "get 256, out", "fill")
IN_README = ("set 1", "get 1", "set 64, a slice", "get 256")
DRAWN = (*IN_README, "get 256, kept", "fill")
WORKLOADS = ("cartpole", "robot", "atari")

Figures = dict[str, Any]


def load(folder: Path) -> dict[str, Figures]:
    """The figures of each environment."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def ratio(figures: Figures, workload: str, operation: str, subject: str) -> float | None:
    """The time of a subject against that of NumPy by hand in the same process; None if it was not measured."""
    measured = figures.get(workload, {}).get(operation, {})
    if subject not in measured or BASE not in measured:
        return None
    return float(measured[subject]["median"] / measured[BASE]["median"])


def shown(value: float | None) -> str:
    """A ratio in two or three digits."""
    return "" if value is None else f"{value:.2f}" if value < 10 else f"{value:.0f}"


def subjects_of(environments: dict[str, Figures]) -> dict[str, str]:
    """The environment that each subject's figures are taken from; anystore and NumPy by hand run in every one."""
    found = {"anystore": "numpy", "NumPy by hand, take": "numpy", "NumPy by hand, small pages": "numpy"}
    for environment, figures in environments.items():
        for workload in WORKLOADS:
            for measured in figures.get(workload, {}).get("set 1", {}), figures.get(workload, {}).get("get 256", {}):
                found.update({subject: environment for subject in measured if subject not in (*found, BASE)})
    return found


def table(environments: dict[str, Figures], workload: str, operations: tuple[str, ...]) -> str:
    """A row for each subject, with its time as a multiple of that of NumPy by hand."""
    lines = [f"| {workload} | {' | '.join(operations)} |", f"|---|{'---:|' * len(operations)}"]
    for subject, environment in subjects_of(environments).items():
        cells = [ratio(environments[environment], workload, operation, subject) for operation in operations]
        if any(cell is not None for cell in cells):
            lines.append(f"| {subject} | {' | '.join(map(shown, cells))} |")
    base = environments["numpy"][workload]
    micros = [f"{base[operation][BASE]['median']:,.1f} us" if operation in base else "" for operation in operations]
    lines.append(f"| *{BASE}, the measure* | {' | '.join(micros)} |")
    return "\n".join(lines)


def short_table(environments: dict[str, Figures], workloads: list[str]) -> str:
    """The same of all workloads at once, of the operations that matter most."""
    lines = [f"| {' / '.join(IN_README)} | {' | '.join(workloads)} |", f"|---|{'---|' * len(workloads)}"]
    for subject, environment in subjects_of(environments).items():
        rows = [
            [ratio(environments[environment], workload, operation, subject) for operation in IN_README]
            for workload in workloads
        ]
        if any(cell is not None for row in rows for cell in row):
            cells = [" / ".join(shown(cell) or "-" for cell in row) for row in rows]
            lines.append(f"| {subject} | {' | '.join(cells)} |")
    return "\n".join(lines)


def memory_table(environments: dict[str, Figures]) -> str:
    """Resident memory of a full store against its payload, and the time of the import."""
    lines = [f"| resident memory against payload | {' | '.join(WORKLOADS)} | import |", "|---|---:|---:|---:|---:|"]
    for subject, environment in {**subjects_of(environments), BASE: "numpy"}.items():
        figures, cells = environments[environment], []
        for workload in WORKLOADS:
            memory = figures.get(workload, {}).get("memory", {}).get(subject)
            cells.append(f"{memory['resident'] / memory['payload']:.2f}" if memory else "")
        took = figures["import"].get(subject)
        cells.append(f"{took['median'] / 1e3:,.0f} ms" if took else "")
        if any(cells):
            lines.append(f"| {subject} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(environments: dict[str, Figures], path: Path) -> None:
    """Bars on a logarithmic scale: each operation on each workload, each subject against NumPy by hand."""
    subjects = subjects_of(environments)
    figure, axes = plt.subplots(len(WORKLOADS), len(DRAWN), figsize=(20, 13), sharey=True, layout="constrained")
    names = list(reversed(subjects))
    colors = ["#d1495b" if name.startswith("anystore") else "#8d99ae" for name in names]
    for row, workload in zip(axes, WORKLOADS, strict=True):
        for axis, operation in zip(row, DRAWN, strict=True):
            values = [ratio(environments[subjects[name]], workload, operation, name) for name in names]
            if all(value is None for value in values):
                axis.set_axis_off()
                continue
            bars = axis.barh(names, [math.nan if value is None else value for value in values], color=colors, log=True)
            axis.bar_label(bars, [shown(value) for value in values], padding=2, fontsize=8)
            axis.axvline(1, color="black", linewidth=0.8)
            axis.set_xlim(0.1, 5000)
            axis.set_title(f"{workload}: {operation}", fontsize=11)
            axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Time of a call against a loop over NumPy arrays by hand, in the same process (less is better)")
    figure.savefig(path, dpi=80)
    plt.close(figure)


def draw_costs(costs: Figures, path: Path) -> None:
    """What the cost of a call grows with."""
    figure, axes = plt.subplots(1, len(costs["curves"]), figsize=(5 * len(costs["curves"]), 4.2), layout="constrained")
    for axis, (title, curve) in zip(axes, costs["curves"].items(), strict=True):
        for subject, micros in curve["micros"].items():
            color = "#d1495b" if subject == "anystore" else None
            axis.plot(curve["x"], micros, marker="o", label=subject, color=color)
        axis.set(title=title, xlabel=curve["label"], ylabel="microseconds a call", xscale="log", yscale="log")
        least, most = axis.get_ylim()
        middle = math.sqrt(least * most)
        axis.set_ylim(min(least, middle / 10), max(most, middle * 10))  # or noise would fill the whole picture
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def update_readme(text: str) -> None:
    """Put the figures between their two marks."""
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{BEGIN}{text}{END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path, default=RESULTS / "raw", help="where the measurements are")
    options = parser.parse_args()
    environments = load(options.raw)
    costs = environments.pop("costs", None)
    RESULTS.mkdir(exist_ok=True)
    everything = {**environments, **({"costs": costs} if costs else {})}
    (RESULTS / "results.json").write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    workloads = [workload for workload in WORKLOADS if workload in environments["numpy"]]
    tables = [table(environments, workload, OPERATIONS) for workload in workloads] + [memory_table(environments)]
    notes = [f"- {name}: {heading(figures)}" for name, figures in environments.items()]
    about = "Time of a call as a multiple of that of a loop over NumPy arrays by hand, measured in turn in one process."
    text = "\n\n".join(["# Side by side", about, *tables, "## Environments", "\n".join(notes)])
    (RESULTS / "results.md").write_text(text + "\n", encoding="utf-8")
    draw(environments, RESULTS / "side_by_side.png")
    if costs:
        draw_costs(costs, RESULTS / "costs.png")
    machine = environments["numpy"]["machine"]
    where = f"{machine['processor']}, {machine['cores']} cores, {environments['numpy']['date']}"
    intro = f"{about} Less is better; {where}. All figures: [benchmarks/results](benchmarks/results/results.md)."
    picture = "![Bars for each operation and workload](benchmarks/results/side_by_side.png)"
    update_readme("\n\n".join([intro, short_table(environments, workloads), picture]) + "\n")


if __name__ == "__main__":
    main()
