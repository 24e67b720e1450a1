"""All that takes a GPU: the tests that are marked so, and then the figures, beside what else keeps records on one.

    python -m benchmarks.gpu

Without a network, in at most eight minutes. Writes gpu.json (the device, the driver, the versions, every figure),
gpu.md (tables) and pictures to benchmarks/results. Subjects whose library is not installed are left out and named.

A figure is the median of several rounds, in which all subjects take their turns: microseconds a call by the wall clock,
from the first of many calls until the device has done the last, and microseconds between two events on the device
around them. Rows differ from call to call. The limits of the device are measured in the same run.

``--dry-run`` goes through all of it on the CPU, with little of everything, to see that the program runs; what it
writes says so, and is no measurement.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib
import importlib.util
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from anystore import ArraySpec, Storage, moves
from anystore.rows import KnownRows
from benchmarks.measure import machine, summary, versions
from benchmarks.workloads import ATARI, CARTPOLE, ROBOT, Batch, Workload

RESULTS = Path(__file__).parent / "results"
BATCHES = (1, 32, 256, 4096)
LEAVES = (1, 2, 4, 8, 16, 32, 64)
ROUNDS = 7
SECONDS = 0.01
"""How long a subject is timed in a round."""
TURNS = 13
"""So many sets of rows are prepared; calls go round them."""
OURS, OURS_ON_TORCH = "anystore", "anystore on torch"

Figures = dict[str, Any]


def few_leaves(count: int, capacity: int = 1_000_000) -> Workload:
    """So many leaves of 4 to 16 bytes."""
    kinds = [ArraySpec((4,), "float32"), ArraySpec((), "float32"), ArraySpec((), "int64"), ArraySpec((2,), "float32")]
    return Workload(f"{count} leaves", {f"leaf{i}": kinds[i % len(kinds)] for i in range(count)}, capacity)


WORKLOADS = [CARTPOLE, ATARI, ROBOT, few_leaves(20)]


# The device ---------------------------------------------------------------------------------------------------------


class Rig:
    """What is measured on: a GPU, by CuPy; in a dry run main memory, by NumPy."""

    def __init__(self, dry: bool) -> None:
        self.dry = dry
        self.cupy: Any = np if dry else importlib.import_module("cupy")
        self.torch: Any = importlib.import_module("torch") if importlib.util.find_spec("torch") else None
        if not dry and self.torch is not None and not self.torch.cuda.is_available():
            self.torch = None
        self.backend, self.device = ("numpy", "cpu") if dry else ("cupy", "cuda:0")
        self.torch_device = "cpu" if dry else "cuda:0"

    def wait(self) -> None:
        """Wait until the device has done everything."""
        if not self.dry:
            self.cupy.cuda.Device().synchronize()

    def timed(self, call: Callable[[int], object], count: int, first: int) -> tuple[float, float]:
        """Seconds a call, by the wall clock and by events on the device."""
        self.wait()
        if self.dry:
            start = time.perf_counter()
            for i in range(first, first + count):
                call(i)
            took = (time.perf_counter() - start) / count
            return took, took
        before, after = self.cupy.cuda.Event(), self.cupy.cuda.Event()
        start = time.perf_counter()
        before.record()
        for i in range(first, first + count):
            call(i)
        after.record()
        self.wait()
        took = (time.perf_counter() - start) / count
        return took, self.cupy.cuda.get_elapsed_time(before, after) / 1e3 / count

    def calls_in(self, seconds: float, call: Callable[[int], object]) -> int:
        """How many calls take about so long; the first of them compile and warm up."""
        for i in range(3):
            call(i)
        took, _ = self.timed(call, 3, 0)
        return max(2, min(1000, round(seconds / max(took, 1e-7))))

    def describe(self) -> Figures:
        if self.dry:
            return {"name": "none: a dry run, whose figures are no measurements"}
        runtime = self.cupy.cuda.runtime
        found = runtime.getDeviceProperties(0)
        return {
            "name": found["name"].decode(),
            "compute capability": f"{found['major']}.{found['minor']}",
            "multiprocessors": found.get("multiProcessorCount"),
            "memory": found.get("totalGlobalMem"),
            "L2": found.get("l2CacheSize"),
            "driver": _driver(),
            "CUDA of the driver": runtime.driverGetVersion(),
            "CUDA of CuPy": runtime.runtimeGetVersion(),
        }


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.check_output(command, text=True).splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def limits(rig: Rig) -> Figures:
    """What the device can do at best: bytes a second and microseconds."""
    nbytes = 1 << (20 if rig.dry else 28)
    calls = _limits_of_main_memory(nbytes) if rig.dry else _limits_of_device(rig.cupy, nbytes)
    found: Figures = {}
    for name in ("copy", "pinned"):
        call = calls[name]
        took = statistics.median(rig.timed(call, 5, 0)[1] for _ in range(ROUNDS))
        found[f"{name}, bytes a second"] = nbytes * (2 if name == "copy" else 1) / took
    for name in ("empty launch", "allocation"):
        call = calls[name]
        found[f"{name}, us"] = statistics.median(rig.timed(call, 200, 0)[0] for _ in range(ROUNDS)) * 1e6
    return found


def _limits_of_device(cupy: Any, nbytes: int) -> dict[str, Callable[[int], object]]:
    source, target = cupy.zeros(nbytes, np.uint8), cupy.zeros(nbytes, np.uint8)
    pinned, stream = cupy.cuda.alloc_pinned_memory(nbytes), cupy.cuda.get_current_stream()
    kernel = cupy.RawKernel('extern "C" __global__ void nothing() {}', "nothing")
    kernel((1,), (256,), ())
    return {
        "copy": lambda i: target.data.copy_from_device_async(source.data, nbytes),
        "pinned": lambda i: target.data.copy_from_host_async(pinned.ptr, nbytes, stream),
        "empty launch": lambda i: kernel((1,), (256,), ()),
        "allocation": lambda i: cupy.cuda.alloc(1 << 14),
    }


def _limits_of_main_memory(nbytes: int) -> dict[str, Callable[[int], object]]:
    source, target = np.zeros(nbytes, np.uint8), np.zeros(nbytes, np.uint8)
    copy = {name: lambda i: np.copyto(target, source) for name in ("copy", "pinned")}
    return {**copy, "empty launch": lambda i: None, "allocation": lambda i: np.empty(1 << 14, np.uint8)}


# The subjects -------------------------------------------------------------------------------------------------------


class Subject:
    """A store on the device; what it lacks is not measured.

    ``get(rows)`` takes rows of the host, ``get_there(rows)`` rows of the device, ``set(rows, batch)`` values of the
    host, ``set_there(rows, batch)`` rows and values of the device.
    """

    name: str

    def __init__(self, rig: Rig, workload: Workload) -> None:
        raise NotImplementedError

    def there(self, array: Any) -> Any:
        """An array of the host, on the device."""
        raise NotImplementedError


class Anystore(Subject):
    name = OURS

    def __init__(self, rig: Rig, workload: Workload) -> None:
        self.rig, self.capacity = rig, workload.capacity
        self.store = Storage(workload.spec, workload.capacity, backend=rig.backend, device=rig.device)
        self.get = self.get_there = self.store.get
        self.set = self.set_there = self.store.set

    def there(self, array: Any) -> Any:
        return self.rig.cupy.asarray(array)

    def get_known(self, rows: Any) -> Any:
        """Rows of the device that need no check."""
        return self.store.get(KnownRows(rows, self.capacity))


class AnystoreOnTorch(Anystore):
    name = OURS_ON_TORCH

    def __init__(self, rig: Rig, workload: Workload) -> None:
        super().__init__(rig, Workload(workload.name, workload.spec, 1))
        self.capacity = workload.capacity
        self.store = Storage(workload.spec, workload.capacity, backend="torch", device=rig.torch_device)
        self.get = self.get_there = self.store.get
        self.set = self.set_there = self.store.set
        if rig.dry:
            self.get_known = None  # type: ignore[assignment]  # on the CPU rows are NumPy arrays

    def there(self, array: Any) -> Any:
        return self.rig.torch.from_numpy(np.array(array)).to(self.rig.torch_device)


class CupyPerLeaf(Subject):
    name = "CuPy, leaf by leaf"

    def __init__(self, rig: Rig, workload: Workload) -> None:
        self.xp = rig.cupy
        self.arrays = {
            key: self.xp.zeros((workload.capacity, *spec.shape), spec.dtype) for key, spec in workload.spec.items()
        }

    def there(self, array: Any) -> Any:
        return self.xp.asarray(array)

    def get(self, rows: Any) -> Any:
        return self.get_there(self.xp.asarray(rows))

    def get_there(self, rows: Any) -> Any:
        return {key: array[rows] for key, array in self.arrays.items()}

    def set(self, rows: Any, batch: Batch) -> None:
        self.set_there(self.xp.asarray(rows), {key: self.xp.asarray(leaf) for key, leaf in batch.items()})

    def set_there(self, rows: Any, batch: Any) -> None:
        for key, array in self.arrays.items():
            array[rows] = batch[key]


class TorchPerLeaf(Subject):
    name = "torch, leaf by leaf"

    def __init__(self, rig: Rig, workload: Workload) -> None:
        self.torch, self.device = rig.torch, rig.torch_device
        self.arrays = {
            key: self.there(np.zeros((1, *spec.shape), spec.dtype)).repeat(workload.capacity, *[1] * len(spec.shape))
            for key, spec in workload.spec.items()
        }

    def there(self, array: Any) -> Any:
        return self.torch.from_numpy(np.array(array)).to(self.device)

    def get(self, rows: Any) -> Any:
        return self.get_there(self.torch.from_numpy(rows).to(self.device, non_blocking=True))

    def get_there(self, rows: Any) -> Any:
        return {key: array.index_select(0, rows) for key, array in self.arrays.items()}

    def set(self, rows: Any, batch: Batch) -> None:
        sent = {key: self.torch.from_numpy(leaf).to(self.device, non_blocking=True) for key, leaf in batch.items()}
        self.set_there(self.torch.from_numpy(rows).to(self.device, non_blocking=True), sent)

    def set_there(self, rows: Any, batch: Any) -> None:
        for key, array in self.arrays.items():
            array.index_copy_(0, rows, batch[key])


class TorchRL(TorchPerLeaf):
    name = "TorchRL, LazyTensorStorage"

    def __init__(self, rig: Rig, workload: Workload) -> None:
        tensordict = importlib.import_module("tensordict").TensorDict
        storage = importlib.import_module("torchrl.data").LazyTensorStorage
        self.torch, self.device, self.tensordict = rig.torch, rig.torch_device, tensordict
        self.storage = storage(workload.capacity, device=self.device)
        first = {key: np.zeros((64, *spec.shape), spec.dtype) for key, spec in workload.spec.items()}
        self.set(np.arange(64), first)
        # It gives rows below its length only; those that were never written hold zeros.
        self.storage._len = workload.capacity

    def set(self, rows: Any, batch: Batch) -> None:
        self.set_there(rows, {key: self.torch.from_numpy(leaf) for key, leaf in batch.items()})

    def set_there(self, rows: Any, batch: Any) -> None:
        rows = self.torch.as_tensor(rows, device=self.device)
        self.storage.set(rows, self.tensordict(batch, batch_size=[len(rows)]), set_cursor=False)

    def get_there(self, rows: Any) -> Any:
        return self.storage.get(rows)


class Flashbax(Subject):
    """Samples rows of its own choice, in the same number, in a jitted call."""

    name = "flashbax, jitted (rows of its own)"

    def __init__(self, rig: Rig, workload: Workload) -> None:
        flashbax, self.jax = importlib.import_module("flashbax"), importlib.import_module("jax")
        if not rig.dry and self.jax.default_backend() != "gpu":
            raise ImportError("JAX has no GPU here")
        self.make = lambda size: flashbax.make_item_buffer(
            max_length=workload.capacity, min_length=1, sample_batch_size=size, add_batches=True
        )
        item = {key: self.jax.numpy.zeros(spec.shape, _narrow(spec.dtype)) for key, spec in workload.spec.items()}
        some = {key: self.jax.numpy.zeros((64, *leaf.shape), leaf.dtype) for key, leaf in item.items()}
        buffer = self.make(1)
        self.state = self.jax.jit(buffer.add)(buffer.init(item), some)
        self.key = self.jax.random.PRNGKey(0)
        self.samplers: dict[int, Any] = {}

    def there(self, array: Any) -> Any:
        return self.jax.numpy.asarray(array, _narrow(array.dtype))

    def get_there(self, rows: Any) -> Any:
        size = len(rows)
        if size not in self.samplers:
            self.samplers[size] = self.jax.jit(self.make(size).sample)
        self.key, key = self.jax.random.split(self.key)
        return self.jax.block_until_ready(self.samplers[size](self.state, key).experience)


def _narrow(dtype: Any) -> Any:
    """JAX's dtype for one of 64 bits."""
    return {"int64": np.dtype("int32"), "float64": np.dtype("float32")}.get(np.dtype(dtype).name, dtype)


KINDS: list[type[Subject]] = [Anystore, AnystoreOnTorch, CupyPerLeaf, TorchPerLeaf, TorchRL, Flashbax]


def open_all(rig: Rig, workload: Workload, kinds: list[type[Subject]], absent: dict[str, str]) -> list[Subject]:
    """The subjects that can be had; for the others it is noted why not."""
    subjects = []
    for kind in kinds:
        try:
            if rig.torch is None and kind in (AnystoreOnTorch, TorchPerLeaf, TorchRL):
                raise ImportError("torch has no GPU here, or is not installed")
            subjects.append(kind(rig, workload))
        except Exception as error:
            absent[kind.name] = _said(error)
    return subjects


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]


# What is measured ---------------------------------------------------------------------------------------------------


def operations(rig: Rig, subject: Any, workload: Workload, size: int) -> dict[str, Callable[[int], object]]:
    """What to time, by name; the number makes the rows of one call differ from the last's."""
    rng = np.random.default_rng(1)
    rows = [rng.choice(workload.capacity, size, replace=False) for _ in range(TURNS)]
    batch = workload.batch(size)
    rows_there = [subject.there(each) for each in rows]
    batch_there = {key: subject.there(leaf) for key, leaf in batch.items()}
    found = {
        "get, rows of the host": ("get", lambda i: subject.get(rows[i % TURNS])),
        "get, rows of the device": ("get_there", lambda i: subject.get_there(rows_there[i % TURNS])),
        "get, rows known to be good": ("get_known", lambda i: subject.get_known(rows_there[i % TURNS])),
        "get, drawn on the host": ("get", lambda i: subject.get(rng.integers(0, workload.capacity, size))),
        "set, from the host": ("set", lambda i: subject.set(rows[i % TURNS], batch)),
        "set, from the device": ("set_there", lambda i: subject.set_there(rows_there[i % TURNS], batch_there)),
    }
    if isinstance(subject, Anystore):
        found["set, from the device, rows of the host"] = (
            "set",
            lambda i: subject.set(rows[i % TURNS], batch_there),
        )
        start = workload.capacity - size
        found["append, from the host"] = ("set", lambda i: subject.set(slice(start, start + size), batch))
        found["append, from the device"] = ("set", lambda i: subject.set(slice(start, start + size), batch_there))
    if subject.name == OURS and not rig.dry:
        draw = rig.cupy.random.default_rng(0)
        found["get, drawn on the device"] = (
            "get_known",
            lambda i: subject.get_known(draw.integers(0, workload.capacity, size)),
        )
    return {name: call for name, (method, call) in found.items() if getattr(subject, method, None)}


def prepared(rig: Rig, subject: Any, workload: Workload, size: int) -> dict[str, Callable[[int], object]]:
    """The same, or nothing where what a subject is to be given cannot be had."""
    try:
        return operations(rig, subject, workload, size)
    except Exception as error:
        print(f"  {subject.name}: {_said(error)}", file=sys.stderr)
        return {}


def in_turn(rig: Rig, calls: dict[str, Callable[[int], object]]) -> Figures:
    """Microseconds a call of each subject, by the wall clock and on the device."""
    counts, took = {}, {}
    for name, call in calls.items():
        try:
            counts[name] = rig.calls_in(SECONDS, call)
            took[name] = ([], [])
        except Exception as error:
            print(f"  {name}: {_said(error)}", file=sys.stderr)
    for each in range(ROUNDS):
        for name, (wall, device) in list(took.items()):
            try:
                one, other = rig.timed(calls[name], counts[name], each * 7)
            except Exception as error:
                print(f"  {name}: {_said(error)}", file=sys.stderr)
                del took[name]
                continue
            wall.append(one * 1e6)
            device.append(other * 1e6)
    return {name: {"wall": summary(wall), "device": summary(device)} for name, (wall, device) in took.items()}


def measure_workload(rig: Rig, workload: Workload, absent: dict[str, str], over: Callable[[], bool]) -> Figures:
    """Every operation of every subject at every size of a batch."""
    subjects = open_all(rig, workload, KINDS, absent)
    figures: Figures = {}
    for size in BATCHES:
        if size > workload.capacity or over():
            continue
        by_name: dict[str, dict[str, Callable[[int], object]]] = {}
        for subject in subjects:
            for operation, call in prepared(rig, subject, workload, size).items():
                by_name.setdefault(operation, {})[subject.name] = call
        figures[str(size)] = {operation: in_turn(rig, calls) for operation, calls in by_name.items() if not over()}
    return figures


def measure_leaves(rig: Rig, absent: dict[str, str], over: Callable[[], bool]) -> Figures:
    """A call on 256 rows against the number of small leaves."""
    figures: Figures = {"get": {}, "set": {}}
    for count in LEAVES:
        if over():
            break
        workload = few_leaves(count, 1000 if rig.dry else 200_000)
        subjects = open_all(rig, workload, [Anystore, AnystoreOnTorch, CupyPerLeaf, TorchPerLeaf], absent)
        calls = {subject.name: prepared(rig, subject, workload, 256) for subject in subjects}
        for figure, operation in (("get", "get, rows of the host"), ("set", "set, from the host")):
            there = {name: each[operation] for name, each in calls.items() if operation in each}
            figures[figure][str(count)] = in_turn(rig, there)
    return figures


def measure_ways_to_append(rig: Rig, over: Callable[[], bool]) -> Figures:
    """A contiguous write by a plain copy of each leaf, and by one launch: where one overtakes the other."""
    if rig.dry:
        return {}
    backend = importlib.import_module("anystore.backends.cupy")
    kept, figures = backend._COPIES, {}
    for count in LEAVES:
        if over():
            break
        workload = few_leaves(count, 200_000)
        subject = Anystore(rig, workload)
        call = operations(rig, subject, workload, 256)["append, from the host"]
        try:
            for way, most in (("copies", 10**6), ("launch", -1)):
                backend._COPIES = most
                figures.setdefault(way, {})[str(count)] = in_turn(rig, {OURS: call})[OURS]
        finally:
            backend._COPIES = kept
    return figures


# What was to be reached ---------------------------------------------------------------------------------------------


def wall(figures: Figures, workload: str, size: int, operation: str, subject: str) -> float | None:
    """Microseconds, if it was measured."""
    found = figures["workloads"].get(workload, {}).get(str(size), {}).get(operation, {}).get(subject)
    return None if found is None else float(found["wall"]["median"])


def goals(figures: Figures) -> list[Figures]:
    """What was to be reached, and what was found."""
    found: list[Figures] = []

    def add(what: str, goal: float, value: float | None, least: bool = True) -> None:
        value = None if figures["dry run"] else value
        reached = None if value is None else value >= goal if least else value <= goal
        found.append({"what": what, "goal": goal, "found": value, "reached": reached, "at least": least})

    get, limit = "get, rows of the host", figures["limits"]
    for name in (CARTPOLE.name, "20 leaves"):
        ours = wall(figures, name, 256, get, OURS)
        for peer, factor in ((CupyPerLeaf.name, 4), (TorchPerLeaf.name, 4), (TorchRL.name, 8)):
            theirs = wall(figures, name, 256, get, peer)
            add(f"{name}, {get}, 256: times {peer}", factor, theirs / ours if ours and theirs else None)
        least = limit.get("empty launch, us", 0) + limit.get("allocation, us", 0)
        share = ours / least if ours and least else None
        add(f"{name}, {get}, 256: empty launches and allocations", 3, share, least=False)
    atari = figures["workloads"].get(ATARI.name, {})
    nbytes = sum(spec.nbytes for spec in ATARI.spec.values())
    for size, operation, of, clock, ways in (
        (4096, "get, rows known to be good", "copy", "device", 2),
        (256, "set, from the host", "pinned", "wall", 1),
    ):
        took = atari.get(str(size), {}).get(operation, {}).get(OURS)
        most = limit.get(f"{of}, bytes a second")
        share = ways * size * nbytes / took[clock]["median"] * 1e6 / most if took and most else None
        add(f"{ATARI.name}, {operation}, {size}: share of the {of} bandwidth", 0.85, share)
    return found


# The tests ----------------------------------------------------------------------------------------------------------


def run_tests(seconds: float, dry: bool) -> Figures:
    """Every test marked gpu; CuPy must run. JAX, which compiles for every shape, comes last.

    Those that say when the device is busy and when it is not run by themselves, the others side by side if they can.
    """
    if dry:
        return {"a few": _run_tests(seconds, ["tests/test_to_library.py"])}
    many = ["-n", "14", "--dist", "worksteal"] if importlib.util.find_spec("xdist") else []
    contracts = ["-m", "gpu", "--ignore=tests/test_gpu.py", *many, "-k"]
    chosen = {
        "what only a GPU can show": (0.4, ["-m", "gpu", "tests/test_gpu.py"]),
        "contracts, but for JAX": (0.8, [*contracts, "not Jax"]),
        "contracts, JAX": (1.0, [*contracts, "Jax"]),
    }
    start, figures = time.monotonic(), {}
    for name, (until, each) in chosen.items():
        figures[name] = _run_tests(max(start + until * seconds - time.monotonic(), 10), each)
    return figures


def _run_tests(seconds: float, chosen: list[str]) -> Figures:
    # Each by its name, so that failures are known even if the time is over before all have run.
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", *chosen]
    env = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    env.update({"ANYSTORE_REQUIRE": "cupy"} if "-m" in chosen else {})
    start, done = time.perf_counter(), False
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as file:
        # A session of its own, since those that it starts are to end with it.
        tests = subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            tests.wait(seconds)
            done = True
        except subprocess.TimeoutExpired:
            os.killpg(tests.pid, signal.SIGKILL)
            tests.wait()
        file.seek(0)
        output = file.read()
    print(output[-6000:], file=sys.stderr)
    counts = {name: int(number) for number, name in re.findall(r"(\d+) (passed|failed|errors?|skipped)", output)}
    if not done:  # there is no last line that counts them
        counts = {name.lower(): len(re.findall(f"::.* {name}\\b", output)) for name in ("PASSED", "FAILED", "SKIPPED")}
    status = tests.returncode if done else "not done in time"
    return {
        "status": "none could run here" if status == 5 else status,
        "seconds": round(time.perf_counter() - start),
        **counts,
        "failures": _failures(output)[:50],
    }


def _failures(output: str) -> list[str]:
    """The names of the tests that failed, with what is said of each at the end, if the end was reached."""
    names = re.findall(r"^(\S+::.*?) (?:FAILED|ERROR)\b|\b(?:FAILED|ERROR) (tests/.*)$", output, re.MULTILINE)
    said = dict[str, str]()
    for before, behind in names:
        name, _, why = (before or behind).strip().partition(" - ")
        said[name] = why or said.get(name, "")
    return [f"{name} - {why}" if why else name for name, why in said.items()]


# What is written ----------------------------------------------------------------------------------------------------


def markdown(figures: Figures) -> str:
    device = ", ".join(f"{key} {value}" if key != "name" else str(value) for key, value in figures["device"].items())
    lines = [
        "# On a GPU",
        f"{figures['date']}; {device}.",
        ", ".join(f"{k} {v}" for k, v in figures["versions"].items()),
    ]
    lines.append("")
    for name, tests in figures["tests"].items():
        lines.append(f"- tests, {name}: {', '.join(f'{k} {v}' for k, v in tests.items() if k != 'failures')}")
        lines += [f"- FAILED {failure}" for failure in tests["failures"]]
    lines += [f"- not measured: {name} ({why})" for name, why in figures["absent"].items()]
    lines += [f"- FAILED {name}: {why}" for name, why in figures["errors"].items()]
    lines += ["", "| limit of the device | |", "|---|---:|"]
    lines += [f"| {name} | {value:,.3g} |" for name, value in figures["limits"].items()]
    lines += ["", "| to reach | goal | found | |", "|---|---:|---:|---|"]
    for goal in figures["goals"]:
        found = "not measured" if goal["found"] is None else f"{goal['found']:.3g}"
        state = {True: "reached", False: "MISSED", None: ""}[goal["reached"]]
        bound = "at least" if goal["at least"] else "at most"
        lines.append(f"| {goal['what']} | {bound} {goal['goal']} | {found} | {state} |")
    for workload, sizes in figures["workloads"].items():
        for size, measured in sizes.items():
            lines += ["", *table(f"{workload}, {size} rows", measured)]
    return "\n".join(lines) + "\n"


def table(title: str, measured: Figures) -> list[str]:
    """A row for each operation, a column for each subject: microseconds by the wall clock, and on the device."""
    subjects = list(dict.fromkeys(name for each in measured.values() for name in each))
    lines = [f"| {title}: us, wall / device | {' | '.join(subjects)} |", f"|---|{'---:|' * len(subjects)}"]
    for operation, each in measured.items():
        cells = [
            f"{each[name]['wall']['median']:,.1f} / {each[name]['device']['median']:,.1f}" if name in each else ""
            for name in subjects
        ]
        lines.append(f"| {operation} | {' | '.join(cells)} |")
    return lines


def draw(figures: Figures, folder: Path) -> None:
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ImportError:
        print("no pictures: matplotlib is not installed", file=sys.stderr)
        return
    matplotlib.use("Agg")
    plt = importlib.import_module("matplotlib.pyplot")
    note = " (A DRY RUN: NO MEASUREMENT)" if figures["dry run"] else f" on {figures['device']['name']}"
    draw_leaves(figures, folder / "gpu_leaves.png", plt, note)
    draw_workloads(figures, folder / "gpu.png", plt, note)


def draw_leaves(figures: Figures, path: Path, plt: Any, note: str) -> None:
    """What a call costs against the number of leaves."""
    curves = {"get of 256 rows": figures["leaves"]["get"], "set of 256 rows, from the host": figures["leaves"]["set"]}
    if figures["ways to append"].get("copies"):
        ways = figures["ways to append"]
        curves["append of 256 rows"] = {
            count: {way: ways[way][count] for way in ways}
            for count in ways["copies"]
            if count in ways.get("launch", {})
        }
    figure, axes = plt.subplots(1, len(curves), figsize=(6 * len(curves), 4.5), layout="constrained", squeeze=False)
    for axis, (title, by_count) in zip(axes[0], curves.items()):
        for name in dict.fromkeys(name for each in by_count.values() for name in each):
            points = [(int(count), each[name]["wall"]["median"]) for count, each in by_count.items() if name in each]
            axis.plot(*zip(*points), marker="o", label=name, color="#d1495b" if name == OURS else None)
        axis.set(title=title, xlabel="small leaves", ylabel="microseconds a call", xscale="log", yscale="log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(f"Cost against the number of leaves{note}")
    figure.savefig(path, dpi=80)
    plt.close(figure)


def draw_workloads(figures: Figures, path: Path, plt: Any, note: str) -> None:
    """Microseconds of a call at 256 rows."""
    shown = ("get, rows of the host", "get, rows of the device", "set, from the host", "set, from the device")
    workloads = {name: sizes["256"] for name, sizes in figures["workloads"].items() if "256" in sizes}
    if not workloads:
        return
    shape = {"figsize": (20, 2.6 * len(workloads)), "layout": "constrained", "squeeze": False}
    figure, axes = plt.subplots(len(workloads), len(shown), **shape)
    for row, (workload, measured) in zip(axes, workloads.items()):
        for axis, operation in zip(row, shown):
            each = dict(reversed(measured.get(operation, {}).items()))
            values = [found["wall"]["median"] for found in each.values()]
            colors = ["#d1495b" if name.startswith("anystore") else "#8d99ae" for name in each]
            bars = axis.barh(list(each), values, color=colors)
            axis.bar_label(bars, [f"{value:,.0f}" for value in values], padding=2, fontsize=8)
            axis.set_title(f"{workload}: {operation}", fontsize=10)
            axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Microseconds a call on 256 rows, by the wall clock{note}")
    figure.savefig(path, dpi=80)
    plt.close(figure)


def write(figures: Figures, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    (folder / "gpu.md").write_text(markdown(figures), encoding="utf-8")


def measure(rig: Rig, minutes: float, folder: Path, with_tests: bool) -> Figures:
    """Everything, the goals first; what there is no time for, or what fails, is left out. Written after every step."""
    start = time.monotonic()

    def over(share: float = 0.93) -> bool:
        return time.monotonic() - start > share * 60 * minutes

    figures: Figures = {
        "dry run": rig.dry,
        "date": datetime.date.today().isoformat(),
        "device": rig.describe(),
        "machine": machine(),
        "versions": {**versions(), **({} if rig.dry else {"cupy": rig.cupy.__version__})},
        "compiled": moves.gather.__module__ == "anystore._moves",
        "tests": {},
        "absent": {},
        "errors": {},
        "limits": {},
        "leaves": {"get": {}, "set": {}},
        "ways to append": {},
        "workloads": {},
        "goals": [],
    }

    def note(into: Figures, name: str, make: Callable[[], Any]) -> None:
        """What one step finds, or what went wrong in it, on the disk."""
        print(name, file=sys.stderr)
        try:
            into[name] = make()
        except Exception as error:
            figures["errors"][name] = _said(error)
        figures["goals"] = goals(figures)
        write(figures, folder)

    if with_tests:
        note(figures, "tests", lambda: run_tests(0.4 * 60 * minutes, rig.dry))
    note(figures, "limits", lambda: limits(rig))
    note(figures, "leaves", lambda: measure_leaves(rig, figures["absent"], over))
    note(figures, "ways to append", lambda: measure_ways_to_append(rig, over))
    for workload in WORKLOADS if not rig.dry else [Workload(each.name, each.spec, 300) for each in WORKLOADS]:
        measured = functools.partial(measure_workload, rig, workload, figures["absent"], over)
        note(figures["workloads"], workload.name, measured)
        if not rig.dry:
            rig.cupy.get_default_memory_pool().free_all_blocks()
    note(figures, "seconds", lambda: round(time.monotonic() - start))
    note(figures, "pictures", lambda: draw(figures, folder))
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, help="when to be done")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where to write to")
    parser.add_argument("--no-tests", action="store_true", help="measure only")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, to see that the program runs")
    options = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if options.dry_run and options.output == RESULTS:
        parser.error("a dry run measures nothing: name another folder by --output")
    if not options.dry_run and not _has_device():
        print("no CUDA device can be used here, so nothing was measured", file=sys.stderr)
        return 2
    figures = measure(Rig(options.dry_run), options.minutes, options.output, not options.no_tests)
    print(markdown(figures))
    failed = any(tests["status"] not in (0, "none could run here") for tests in figures["tests"].values())
    return int(failed or bool(figures["errors"]))


def _has_device() -> bool:
    if importlib.util.find_spec("cupy") is None:
        return False
    return bool(importlib.import_module("cupy").cuda.is_available())


if __name__ == "__main__":
    sys.exit(main())
