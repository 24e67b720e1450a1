"""Which backends the tests run on: every one that is usable here, and those of ANYSTORE_REQUIRE or none at all."""

from __future__ import annotations

import os
from typing import Any

import pytest

from anystore import available_backends, moves
from anystore.backends.base import is_disk
from anystore.replay import sum_tree

REQUIRED = {name.strip() for name in os.environ.get("ANYSTORE_REQUIRE", "").split(",") if name.strip()}
COMPILED = moves.gather.__module__ != "anystore.moves" and sum_tree.compiled is not None
LEFT_OUT = pytest.StashKey[dict[str, str]]()
BACKENDS = {info.name: info for info in available_backends()}


def pytest_configure(config: pytest.Config) -> None:
    """Fail at once if a required backend cannot run, so that no skip hides it."""
    known = {*BACKENDS, "compiled"}
    if REQUIRED - known:
        raise pytest.UsageError(f"ANYSTORE_REQUIRE names {sorted(REQUIRED - known)}; there are {sorted(known)}")
    if "compiled" in REQUIRED and not COMPILED:
        raise pytest.UsageError("ANYSTORE_REQUIRE names the compiled code, which was not built")
    missing = [
        f"{name} ({BACKENDS[name].reason})" for name in sorted(REQUIRED & BACKENDS.keys()) if not BACKENDS[name].usable
    ]
    if missing:
        raise pytest.UsageError(f"ANYSTORE_REQUIRE names backends that cannot run here: {', '.join(missing)}")


def pytest_report_header(config: pytest.Config) -> list[str]:
    lines = [f"compiled code: {'built' if COMPILED else 'NOT BUILT (or not all of it); plain NumPy runs in its place'}"]
    for info in BACKENDS.values():
        state = f"runs on {', '.join(info.devices)}" if info.usable else f"DOES NOT RUN: {info.reason}"
        lines.append(f"backend {info.name} {info.version or ''}: {state}")
    return lines


def _obstacle(item: pytest.Item) -> str | None:
    """Why the backend that a test class is about cannot run here; None if it can, or the test is about none."""
    cls = getattr(item, "cls", None)
    name = getattr(cls, "backend", None)
    if getattr(cls, "compiled", False) and not COMPILED:
        return "the compiled moves were not built"
    if getattr(cls, "obstacle", None):
        return str(cls.obstacle)
    if name is None or getattr(cls, "on_a_stand_in", False):
        return None
    info = BACKENDS[name]
    if not info.usable:
        return f"{name}: {info.reason}"
    return None if cls.device in info.devices or is_disk(cls.device) else f"{name} has no {cls.device} here"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the classes whose backend cannot run here, and keep in mind which, for the summary."""
    obstacles = {item: _obstacle(item) for item in items}
    left_out = {item.cls.__name__: reason for item, reason in obstacles.items() if reason}  # type: ignore[attr-defined]
    config.stash[LEFT_OUT] = left_out
    config.hook.pytest_deselected(items=[item for item, reason in obstacles.items() if reason])
    items[:] = [item for item, reason in obstacles.items() if not reason]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Where no test may be skipped, a skipped one fails the run."""
    if hasattr(session.config, "workeroutput"):  # one of the processes of pytest-xdist, which writes no summary
        session.config.workeroutput["left_out"] = session.config.stash.get(LEFT_OUT, {})
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("ANYSTORE_NO_SKIPS") and reporter is not None and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over what a process of pytest-xdist has left out."""
    node.config.stash.setdefault(LEFT_OUT, {}).update(getattr(node, "workeroutput", {}).get("left_out", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for name, reason in config.stash.get(LEFT_OUT, {}).items():
        terminalreporter.write_line(f"NOT RUN HERE: {name} ({reason})", yellow=True)
    if not BACKENDS["cupy"].usable:
        terminalreporter.write_line(
            "NO CUDA DEVICE WAS FOUND: the CuPy backend ran on a stand-in only, nothing ran on a GPU.",
            red=True,
            bold=True,
        )
