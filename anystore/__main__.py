"""The command line: what is there, what a storage would take, and what a snapshot holds."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import anystore
from anystore import ArraySpec, BackendInfo, Storage, available_backends, plan
from anystore.convert import to_numpy
from anystore.nests import label
from anystore.snapshot.report import as_text, report
from anystore.specs import as_count


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    arguments : sequence of str, optional
        What stands behind ``python -m anystore``; by default what the process was started with.

    Returns
    -------
    int
        The exit status: 0, or 1 if a usable backend failed its round trip or a snapshot is damaged or none, or 2 for
        a spec that is none.
    """
    parser = argparse.ArgumentParser(prog="python -m anystore", description="Show the backends that are there.")
    commands = parser.add_subparsers(dest="command")
    planner = commands.add_parser("plan", help="print the bytes that a storage takes, per leaf and in total")
    planner.add_argument(
        "spec",
        help="a JSON file, JSON itself or - for standard input, with {'shape': [4], 'dtype': 'float32'} at each leaf; "
        "or the id of a Gymnasium environment, for its transitions",
    )
    planner.add_argument("capacity", type=_rows, help="the number of rows, such as 1_000_000")
    inspector = commands.add_parser("inspect", help="print what a snapshot or a memory-mapped storage holds")
    inspector.add_argument("path", help="the directory")
    inspector.add_argument("--verify", action="store_true", help="read all files and compare their checksums")
    inspector.add_argument("--json", action="store_true", help="for programs")
    options = parser.parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # where the terminal has not all letters of a path
    try:
        status = _run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def _run(options: argparse.Namespace) -> int:
    if options.command == "inspect":
        return _inspect(options.path, options.verify, options.json)
    if options.command == "plan":
        return _show_plan(options.spec, options.capacity)
    return _show_backends()


def _show_backends() -> int:
    print(f"anystore {anystore.__version__}, Python {sys.version.split()[0]}")
    failed = False
    for info in available_backends():
        print(f"  {info.name:<17} {info.version or '-':<14} {info.reason or ', '.join(info.devices)}")
        if info.usable:
            outcome, good = _round_trip(info)
            failed = failed or not good
            print(f"  {'':<17} {'':<14} {outcome}")
    return int(failed)


def _round_trip(info: BackendInfo) -> tuple[str, bool]:
    """Write rows, read them back and compare; what came of it, and whether it went well."""
    try:
        store = Storage({"obs": ArraySpec((8,), "float32"), "action": ArraySpec((), "int32")}, 1024, backend=info.name)
        rows = np.random.default_rng(0).permutation(1024)[:256]
        item = {"obs": np.arange(2048, dtype=np.float32).reshape(256, 8), "action": np.arange(256, dtype=np.int32)}
        count, start = 0, time.perf_counter()
        while count < 2 or time.perf_counter() - start < 0.1:
            if count == 1:  # the first one compiles and warms up
                start = time.perf_counter()
            store.set(rows, item)
            found = store.get(rows)
            if any((to_numpy(found[key]) != item[key]).any() for key in item):
                return f"ROUND TRIP FAILED on {store.device}: what was read is not what was written", False
            count += 1
        rate = (count - 1) * len(rows) / (time.perf_counter() - start)
    except Exception as error:
        return f"ROUND TRIP FAILED: {type(error).__name__}: {error}", False
    return f"round trip good on {store.device}: {rate:,.0f} rows of 36 bytes a second, written, read and compared", True


def _show_plan(text: str, capacity: int) -> int:
    try:
        planned = plan(_read_spec(text), capacity)
    except (OSError, ValueError, TypeError, ImportError) as error:
        print(f"anystore plan: {error}", file=sys.stderr)
        return 2
    print(f"{capacity:,} rows\n{planned}")
    return 0


def _inspect(path: str, verify: bool, as_json: bool) -> int:
    try:
        found = report(path, verify)
    except (OSError, ValueError) as error:
        if as_json:
            print(json.dumps({"path": path, "error": str(error)}))
        print(f"anystore inspect: {error}", file=sys.stderr)
        return 1
    print(json.dumps(found) if as_json else as_text(found))
    return 0


def _read_spec(text: str) -> Any:
    if text == "-":
        return _from_json(sys.stdin.read())
    if text.lstrip()[:1] in ("{", "["):
        return _from_json(text)
    if text.endswith(".json") or Path(text).is_file():
        return _from_json(Path(text).read_text(encoding="utf-8"))
    return _of_environment(text)


def _from_json(text: str) -> Any:
    try:
        return _specs(json.loads(text))
    except json.JSONDecodeError as error:
        raise ValueError(f"expected JSON: {error}") from None
    except RecursionError:
        raise ValueError("expected JSON of a spec, found one that is nested too deeply") from None


def _specs(node: Any, path: str = "") -> Any:
    """The nest of specs that parsed JSON stands for: an object with a shape and a dtype is a leaf."""
    children = enumerate(node) if isinstance(node, list) else node.items() if isinstance(node, dict) else None
    if children is None:
        raise ValueError(f"{label(path)}: expected {{'shape': [...], 'dtype': '...'}} at each leaf, found {node!r:.80}")
    if isinstance(node, dict) and {"shape", "dtype"} <= node.keys():
        return _leaf(node, path)
    found = {key: _specs(child, f"{path}/{key}" if path else str(key)) for key, child in children}
    return list(found.values()) if isinstance(node, list) else found


def _leaf(node: dict[str, Any], path: str) -> ArraySpec:
    if unexpected := sorted(node.keys() - {"shape", "dtype", "name"}):
        raise ValueError(f"{label(path)}: expected a shape, a dtype and perhaps a name, found {unexpected} as well")
    try:
        return ArraySpec(**node)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{label(path)}: {error}") from None


def _of_environment(name: str) -> Any:
    """The transitions of a Gymnasium environment."""
    try:
        import gymnasium
    except ImportError:
        raise ImportError(f"{name!r} is no file; for the id of an environment: pip install gymnasium") from None
    from anystore.replay.gymnasium import transition_spec

    try:
        env = gymnasium.make(name)
    except gymnasium.error.Error as error:
        raise ValueError(f"{name!r} is neither a file nor the id of a Gymnasium environment: {error}") from None
    try:
        return transition_spec(env)
    finally:
        env.close()


def _rows(text: str) -> int:
    try:
        return as_count("capacity", int(text.replace(",", "")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number of rows, such as 1_000_000, found {text!r:.80}") from None


if __name__ == "__main__":
    sys.exit(main())
