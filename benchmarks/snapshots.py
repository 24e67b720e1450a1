"""Measure snapshots: saving, loading and going on, as multiples of writing and reading the same bytes plainly.

    python -m benchmarks.snapshots numpy --directory /var/tmp
    python -m benchmarks.snapshots torchrl --directory /var/tmp
    python -m benchmarks.snapshots tensorflow --directory /var/tmp

Each in an environment that has the library. In every round all subjects take their turn, in one process and on one
disk; whatever is written counts as written when it has been fsynced. A section of benchmarks/results/snapshots.json is
replaced, and benchmarks/results/snapshots.md is made anew from all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import json
import os
import pickle
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from anystore import ArraySpec, Storage, load
from benchmarks.measure import heading, machine, versions

ROUNDS = 5
PIECE = 1 << 22
PAUSE = 2.0
"""Seconds between one write and the next, in which the disk forgets what was removed."""
RESULTS = Path(__file__).parent / "results"
SPEC = {
    "obs": ArraySpec((84, 84, 4), "uint8"),
    "action": ArraySpec((), "int32"),
    "reward": ArraySpec((), "float32"),
    "done": ArraySpec((), "bool"),
}
ROW_NBYTES = sum(spec.nbytes for spec in SPEC.values())

Figures = dict[str, float]
Action = Callable[[], object]


def filled(rows: int) -> Storage:
    """A store whose every row is written, with bytes that no compression makes less of."""
    store, rng = Storage(SPEC, rows), np.random.default_rng(0)
    step = 2000
    for start in range(0, rows, step):
        count = min(step, rows - start)
        store.set(slice(start, start + count), batch(rng, count))
    return store


def batch(rng: np.random.Generator, count: int) -> dict[str, Any]:
    return {
        "obs": rng.integers(0, 256, (count, 84, 84, 4), np.uint8),
        "action": rng.integers(0, 18, count, np.int32),
        "reward": rng.random(count, np.float32),
        "done": rng.random(count) < 0.01,
    }


def arrays_of(store: Storage) -> dict[str, Any]:
    """The rows as arrays, without the storage's taking note that they are handed out."""
    return dict(zip(store._nest.paths, store._buffers))


def fsync_all(directory: Path) -> None:
    """Wait until every file below a directory is on the disk."""
    for path in [*directory.rglob("*"), directory]:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def forget(directory: Path) -> None:
    """Have the system drop what it keeps of the files in memory."""
    for path in directory.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def write_plainly(arrays: dict[str, Any], directory: Path) -> None:
    """The measure: the same bytes, by write and fsync."""
    for name, array in arrays.items():
        data = memoryview(array.reshape(-1).view(np.uint8))
        with open(directory / name, "wb", buffering=0) as file:
            for start in range(0, len(data), PIECE):
                file.write(data[start : start + PIECE])
            os.fsync(file.fileno())


def read_plainly(arrays: dict[str, Any], directory: Path) -> None:
    """The measure: the same bytes into memory of their own, of the kind that a storage has."""
    from anystore.backends.numpy import zeros

    for name, like in arrays.items():
        data = memoryview(zeros(like.shape, like.dtype).reshape(-1).view(np.uint8))
        with open(directory / name, "rb", buffering=0) as file:
            for start in range(0, len(data), PIECE):
                file.readinto(data[start : start + PIECE])


def settle() -> None:
    """Let the disk be done with what was written and removed before."""
    os.sync()
    time.sleep(PAUSE)


def timed(action: Action) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


@contextlib.contextmanager
def fresh(root: Path) -> Iterator[Path]:
    """A directory that is gone afterwards."""
    directory = Path(tempfile.mkdtemp(dir=root))
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


def time_writes(subjects: dict[str, Callable[[Path], object]], root: Path, rounds: int) -> dict[str, list[float]]:
    """The seconds of each in every round, until all is on the disk."""
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    for number in range(rounds):
        order = list(subjects) if number % 2 == 0 else list(subjects)[::-1]
        for name in order:
            with fresh(root) as directory:
                settle()

                def action(name: str = name, directory: Path = directory) -> None:
                    subjects[name](directory)
                    fsync_all(directory)

                seconds[name].append(timed(action))
        print(number, {name: round(values[-1], 2) for name, values in seconds.items()}, flush=True)
    return seconds


def ratios(seconds: dict[str, list[float]], measure: str) -> dict[str, Any]:
    """Medians, and the median of what each took in a round as a multiple of what the measure took in it."""
    return {
        name: {
            "seconds": statistics.median(values),
            "ratio": statistics.median(mine / base for mine, base in zip(values, seconds[measure])),
            "rounds": values,
        }
        for name, values in seconds.items()
    }


# What is measured ---------------------------------------------------------------------------------------------------


def saves(store: Storage, root: Path, rounds: int) -> dict[str, Any]:
    arrays = arrays_of(store)
    subjects = {
        "write and fsync": functools.partial(write_plainly, arrays),
        "anystore": lambda directory: store.save(directory / "snapshot"),
        "np.savez": lambda directory: np.savez(directory / "arrays.npz", **arrays),
        "pickle": lambda directory: (directory / "arrays").write_bytes(pickle.dumps(arrays, protocol=5)),
        "pickle to a file": functools.partial(pickle_to_file, arrays),
    }
    return ratios(time_writes(subjects, root, rounds), "write and fsync")


def pickle_to_file(arrays: dict[str, Any], directory: Path) -> None:
    with open(directory / "arrays", "wb") as file:
        pickle.dump(arrays, file, protocol=5)


def increments(store: Storage, root: Path, rounds: int) -> dict[str, Any]:
    """A save after 1% new rows beside a full one: rows that follow each other, and rows here and there."""
    rng, rows = np.random.default_rng(1), len(store)
    count, items = rows // 100, batch(np.random.default_rng(2), rows // 100)
    seconds: dict[str, list[float]] = {"in full": [], "1% in a run": [], "1% here and there": []}
    for number in range(rounds):
        with fresh(root) as directory:
            path = directory / "snapshot"
            settle()
            seconds["in full"].append(timed(lambda path=path: store.save(path)))
            start = number * count
            store.set(slice(start, start + count), items)
            seconds["1% in a run"].append(timed(lambda path=path: store.save(path)))
            store.set(rng.choice(rows, count, replace=False), items)
            seconds["1% here and there"].append(timed(lambda path=path: store.save(path)))
        print(number, {name: round(values[-1], 3) for name, values in seconds.items()}, flush=True)
    return ratios(seconds, "in full")


def loads(store: Storage, root: Path, rounds: int, cold: bool) -> dict[str, Any]:
    """Loading, from the disk or from what the system keeps of it in memory."""
    arrays = arrays_of(store)
    with fresh(root) as directory:
        store.save(directory / "snapshot")
        plain = directory / "plain"
        plain.mkdir()
        write_plainly(arrays, plain)
        np.savez(directory / "arrays.npz", **arrays)
        os.sync()
        subjects: dict[str, Action] = {
            "read": lambda: read_plainly(arrays, plain),
            "anystore": lambda: load(directory / "snapshot"),
            "np.load of npz": lambda: dict(np.load(directory / "arrays.npz")),
        }
        seconds: dict[str, list[float]] = {name: [] for name in subjects}
        for number in range(rounds):
            for name in list(subjects)[:: 1 if number % 2 == 0 else -1]:
                if cold:
                    forget(directory)
                seconds[name].append(timed(subjects[name]))
            print(
                number, "cold" if cold else "warm", {name: round(v[-1], 2) for name, v in seconds.items()}, flush=True
            )
    return ratios(seconds, "read")


def mapped_reads(store: Storage, root: Path, rounds: int) -> dict[str, Any]:
    """256 rows at random from memory-mapped files that the system has in memory, beside the same from memory."""
    rng = np.random.default_rng(3)
    batches = [rng.integers(0, len(store), 256) for _ in range(100)]
    found: dict[str, Any] = {}
    places = {"on the disk": root, "on /dev/shm": Path("/dev/shm")}
    for place, where in places.items():
        with fresh(where) as directory:
            mapped = Storage(SPEC, len(store), directory=directory / "mapped")
            for start in range(0, len(store), 4000):
                rows = slice(start, min(start + 4000, len(store)))
                mapped.set(rows, store.get(rows))
            mapped.flush()
            reader = Storage(SPEC, len(store), directory=directory / "mapped", mode="r")
            subjects = {"in memory": store, "mapped": mapped, "mapped, read-only": reader}
            outs = {name: subject.get(batches[0]) for name, subject in subjects.items()}
            seconds: dict[str, list[float]] = {f"{name}{kind}": [] for kind in ("", ", out") for name in subjects}
            for _ in range(rounds * 4):
                for name, subject in subjects.items():
                    new, into = (
                        functools.partial(read_all, subject, batches),
                        functools.partial(read_all, subject, batches, outs[name]),
                    )
                    seconds[name].append(timed(new) / len(batches))
                    seconds[f"{name}, out"].append(timed(into) / len(batches))
            plain = {name: values for name, values in seconds.items() if not name.endswith(", out")}
            given = {name: values for name, values in seconds.items() if name.endswith(", out")}
            found[place] = {**ratios(plain, "in memory"), **ratios(given, "in memory, out")}
            print(place, {name: (round(each["ratio"], 3)) for name, each in found[place].items()}, flush=True)
    return found


def read_all(store: Storage, batches: list[Any], out: Any = None) -> None:
    for rows in batches:
        store.get(rows, out=out)


def of_numpy(rows: int, root: Path, rounds: int) -> dict[str, Any]:
    store = filled(rows)
    return {
        "save": saves(store, root, rounds),
        "save again": increments(store, root, rounds),
        "load": loads(store, root, rounds, cold=True),
        "load, cached": loads(store, root, rounds, cold=False),
        "get 256 rows": mapped_reads(store, root, rounds),
    }


def of_torchrl(rows: int, root: Path, rounds: int) -> dict[str, Any]:
    """TorchRL's own way to save a replay buffer: `dumps`."""
    import torch
    from tensordict import TensorDict
    from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

    store = filled(rows)
    arrays = arrays_of(store)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(rows), batch_size=256)
    step = 4000
    for start in range(0, rows, step):
        part = {name: torch.from_numpy(array[start : start + step]) for name, array in arrays.items()}
        buffer.extend(TensorDict(part, batch_size=[len(part["done"])]))
    subjects = {
        "write and fsync": functools.partial(write_plainly, arrays),
        "anystore": lambda directory: store.save(directory / "snapshot"),
        "TorchRL dumps": lambda directory: buffer.dumps(directory / "torchrl"),
    }
    return {"save": ratios(time_writes(subjects, root, rounds), "write and fsync")}


def of_tensorflow(rows: int, root: Path, rounds: int) -> dict[str, Any]:
    """A checkpoint of TensorFlow, as TF-Agents saves a replay buffer of NumPy arrays."""
    import tensorflow as tf

    from anystore import NumpyStorage

    store, checkpointed = filled(rows), NumpyStorage(SPEC, rows)
    step = 4000
    for start in range(0, rows, step):
        checkpointed.set(range(start, min(start + step, rows)), store.get(slice(start, start + step)))
    checkpoint = tf.train.Checkpoint(store=checkpointed)
    subjects = {
        "write and fsync": functools.partial(write_plainly, arrays_of(store)),
        "anystore": lambda directory: store.save(directory / "snapshot"),
        "TensorFlow checkpoint": lambda directory: checkpoint.write(str(directory / "checkpoint")),
    }
    return {"save": ratios(time_writes(subjects, root, rounds), "write and fsync")}


SECTIONS = {"numpy": of_numpy, "torchrl": of_torchrl, "tensorflow": of_tensorflow}


# What came of it ----------------------------------------------------------------------------------------------------


def table(title: str, figures: dict[str, Any]) -> list[str]:
    rows = [f"| {name} | {each['seconds']:.3g} s | {each['ratio']:.3g} |" for name, each in figures.items()]
    return [f"### {title}", "", "| | median | multiple |", "|---|---:|---:|", *rows, ""]


def as_markdown(results: dict[str, Any]) -> str:
    lines = [
        "# Snapshots",
        "",
        "Medians over the rounds, and the median of what each took as a multiple of what the first line of its table",
        "took in the same round. All of it in turn in one process, on one disk; saved means fsynced. Single rounds",
        "vary by a factor of two and more where others work on the machine; all of them are in snapshots.json. Made by",
        "`python -m benchmarks.snapshots`.",
        "",
    ]
    for name, section in results.items():
        size = f"{section['rows']:,} rows of {section['row_nbytes']:,} bytes, {section['nbytes'] / 1e9:.2f} GB"
        lines += [f"## {name}", "", f"{size}; {heading(section)}", ""]
        for title, figures in section["figures"].items():
            if title == "get 256 rows":
                for place, inner in figures.items():
                    lines += table(f"{title}, {place}", inner)
            else:
                lines += table(title, figures)
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure")
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    rows = int(options.gigabytes * 1e9) // ROW_NBYTES
    with fresh(options.directory) as root:
        figures = SECTIONS[options.section](rows, root, options.rounds)
    path = RESULTS / "snapshots.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    today = datetime.date.today().isoformat()
    about = {
        "date": today,
        "machine": machine(),
        "versions": versions(),
        "rows": rows,
        "row_nbytes": ROW_NBYTES,
        "nbytes": rows * ROW_NBYTES,
    }
    results[options.section] = {**about, "figures": figures}
    path.write_text(json.dumps(results, indent=1) + "\n")
    (RESULTS / "snapshots.md").write_text(as_markdown(results))


if __name__ == "__main__":
    main()
