"""Whatever fails while a snapshot is written: the old one loads or the new one, exactly, and the next save is good."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anystore import SnapshotError, Storage, load
from anystore.snapshot import files
from anystore.snapshot.manifest import MANIFEST, read_manifest
from tests.faults import (
    FailingCalls,
    Machine,
    calls_go_through,
    chances,
    count_calls,
    do_not_wait,
    write_in_small_blocks,
)
from tests.items import SPEC as ITEMS
from tests.items import assert_same, leaves
from tests.items import batch as items

SPEC = ITEMS["obs"]["pose"]
CAPACITY = 12
KEPT = [0, 2]
"""With and without old versions."""


@pytest.fixture(autouse=True)
def _without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    do_not_wait(monkeypatch.setattr)
    write_in_small_blocks(monkeypatch.setattr)


def batch(stamps: Any) -> Any:
    """Small items, since each call of a save counts."""
    return items(stamps)["obs"]["pose"]


def saved(path: Path, rebase: bool = False) -> Storage:
    """A storage that was saved to `path` in a base and a layer, and has rows that were written since."""
    store = Storage(SPEC, CAPACITY)
    store.set(range(8), batch(np.arange(8)))
    store.save(path)
    store.set([1, 7], batch([11, 17]))
    store.save(path, keep=2)
    change(store, rebase)
    return store


def change(store: Storage, rebase: bool) -> None:
    store.set([0, 9] if not rebase else slice(0, 10), batch([50, 59] if not rebase else np.arange(10) + 50))


def content(store: Storage) -> tuple[bytes, ...]:
    return tuple(np.asarray(leaf).tobytes() for leaf in leaves(store.get(...)))


def expected_names(path: Path) -> set[str]:
    """All that a directory holds if nothing is left over."""
    manifests = [MANIFEST, *(each.name for each in path.glob("manifest-*.json"))]
    return {files.LOCK, *manifests}.union(*(read_manifest(path / name).names() for name in manifests))


def names(path: Path) -> set[str]:
    return {each.name for each in path.iterdir()}


@pytest.mark.parametrize("rebase", [False, True], ids=["layer", "base"])
@pytest.mark.parametrize("keep", KEPT)
@pytest.mark.parametrize(
    ("error", "for_good"),
    [(errno.ENOSPC, False), (errno.ENOSPC, True), (errno.EIO, False)],
    ids=["no space", "no space from there on", "EIO"],
)
def test_each_call_fails(tmp_path: Path, error: int, keep: int, rebase: bool, for_good: bool) -> None:
    store = saved(tmp_path / "count", rebase)
    total = count_calls(lambda: store.save(tmp_path / "count", keep=keep))
    assert total > 12
    for number in range(total):
        path = tmp_path / str(number)
        store = saved(path, rebase)
        old, new, faults = content(load(path)), content(store), FailingCalls(number, error, for_good)
        assert old != new
        with calls_go_through(faults):
            try:
                store.save(path, keep=keep)
            except OSError:
                found = content(load(path))
                # Past the moment at which the manifest takes its place there is the last fsync alone.
                assert found == (new if faults.failed[0] == "sync_directory" and found == new else old)
            else:
                assert set(faults.failed) <= {"unlink"}
                assert content(load(path)) == new
        store.set(3, batch(33))
        store.save(path, keep=keep)
        assert_same(load(path, like=store).get(...), store.get(...))
        assert names(path) == expected_names(path)
        shutil.rmtree(path)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
def test_a_failed_save_leaves_nothing_behind(tmp_path: Path, error: int) -> None:
    for number in range(count_calls(lambda: saved(tmp_path / "count").save(tmp_path / "count", keep=2))):
        path = tmp_path / str(number)
        store = saved(path)
        before, faults = names(path), FailingCalls(number, error, for_good=False)
        with calls_go_through(faults):
            try:
                store.save(path, keep=2)
            except OSError:
                # A name that was to change may have changed nevertheless, so that nothing is removed then.
                if faults.failed == ["replace"] or content(load(path)) == content(store):
                    continue
                assert names(path) - before <= {"manifest-000002.json"}


def test_each_call_of_a_first_save_fails(tmp_path: Path) -> None:
    store = Storage(SPEC, CAPACITY)
    store.set(range(8), batch(np.arange(8)))
    for number in range(count_calls(lambda: store.save(tmp_path / "count"))):
        path = tmp_path / str(number)
        faults = FailingCalls(number, errno.ENOSPC, for_good=True)
        with calls_go_through(faults), pytest.raises(OSError, match="No space left"):
            store.save(path)
        if (path / MANIFEST).exists():
            assert_same(load(path, like=SPEC).get(...), store.get(...))
        else:
            with pytest.raises(SnapshotError, match="manifest.json: there is no such file, so no snapshot"):
                load(path)
        store.save(path)
        assert_same(load(path, like=SPEC).get(...), store.get(...))
        assert names(path) == expected_names(path)


@pytest.mark.parametrize("rebase", [False, True], ids=["layer", "base"])
@pytest.mark.parametrize("keep", KEPT)
def test_the_power_goes(tmp_path: Path, keep: int, rebase: bool) -> None:
    path = tmp_path / "snapshot"
    store = saved(path, rebase)
    old, new, machine = content(load(path)), content(store), Machine(path)
    with calls_go_through(machine):
        store.save(path, keep=keep)
    assert len(machine) > 12
    seen = set()
    for count in range(len(machine) + 1):
        for seed in range(12):
            left = tmp_path / "left"
            left.mkdir()
            for name, data in machine.left(count, chances(seed)).items():
                (left / name).write_bytes(data)
            found = content(load(left))
            assert found in (old, new), (count, seed)
            assert found == new or count < len(machine)
            seen.add(found)
            shutil.rmtree(left)
    assert seen == {old, new}


def run(program: str, *arguments: Any) -> list[str]:
    """The lines that a program prints in a process of its own, which forks others and kills them."""
    command = [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_killed_at_each_call(tmp_path: Path) -> None:
    program = """
    import os, shutil, signal, sys
    from pathlib import Path
    from anystore import load
    from tests.faults import Killed, calls_go_through, count_calls, do_not_wait, write_in_small_blocks
    from tests.test_snapshot_faults import content, expected_names, names, saved

    do_not_wait(setattr)
    write_in_small_blocks(setattr)
    root = Path(sys.argv[1])
    for keep in (0, 2):
        for rebase in (False, True):
            probe = saved(root / "count", rebase)
            total = count_calls(lambda: probe.save(root / "count", keep=keep))
            shutil.rmtree(root / "count")
            for number in range(total):
                for half_way in (False, True):
                    path = root / "snapshot"
                    store = saved(path, rebase)
                    old, new = content(load(path)), content(store)
                    child = os.fork()
                    if child == 0:
                        with calls_go_through(Killed(number, half_way)):
                            store.save(path, keep=keep)
                        os._exit(0)
                    _, status = os.waitpid(child, 0)
                    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (number, status)
                    found = content(load(path))
                    assert found in (old, new), number
                    print("old" if found == old else "new")
                    store.save(path, keep=keep)
                    assert content(load(path)) == new
                    assert names(path) == expected_names(path), number
                    shutil.rmtree(path)
    """
    outcomes = run(program, tmp_path)
    assert len(outcomes) > 120
    assert outcomes.count("new") >= 8


def test_killed_at_any_instant(tmp_path: Path) -> None:
    """A child saves one version after the other until a timer ends it; what it acknowledged is never lost."""
    program = """
    import os, random, signal, sys
    from pathlib import Path
    import numpy as np
    from anystore import Storage, load
    from tests.faults import do_not_wait
    from tests.items import SPEC, assert_same, batch

    do_not_wait(setattr)
    path, rows = Path(sys.argv[1]) / "snapshot", np.arange(2000)
    store = Storage(SPEC, len(rows))
    store.set(..., batch(0))
    store.save(path)
    stamp = kills = acknowledged = 0
    while kills < 200 or acknowledged < 50:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            rng, store = random.Random(kills), load(path, like=SPEC)
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.0005, 0.02))
            while True:
                stamp += 1
                store.set(..., batch(stamp))
                store.set(rows[: rng.randrange(2000)], batch(stamp))
                store.save(path, keep=rng.randrange(3))
                os.write(write, stamp.to_bytes(8, "little"))
        os.waitpid(child, 0)
        os.close(write)
        with open(read, "rb") as pipe:
            told = pipe.read()
        least = int.from_bytes(told[-8:], "little") if told else stamp
        found = load(path, like=SPEC)
        stamp = int(found.get(0)["action"][0])
        assert stamp >= least, (stamp, least)
        assert_same(found.get(...), batch(np.full(len(rows), stamp)))
        kills, acknowledged = kills + 1, acknowledged + len(told) // 8
    print(kills, acknowledged)
    """
    assert run(program, tmp_path)


def _tmpfs_obstacle() -> str | None:
    """Why no file system can be mounted here in a namespace of its own."""
    if shutil.which("unshare") is None or shutil.which("mount") is None:
        return "there is no unshare"
    probe = "mount -t tmpfs -o size=1m none /tmp"
    done = subprocess.run(["unshare", "-rm", "sh", "-c", probe], check=False, capture_output=True, text=True)
    return None if done.returncode == 0 else f"no tmpfs can be mounted: {done.stderr.strip()}"


class TestFullDisk:
    """A file system of 256 KiB, filled up for real."""

    obstacle = _tmpfs_obstacle()

    def test_fills_up(self, tmp_path: Path) -> None:
        program = """
        import errno, sys
        from pathlib import Path
        import numpy as np
        from anystore import ArraySpec, Storage, load

        path = Path(sys.argv[1]) / "snapshot"
        store = Storage(ArraySpec((64,), "int64"), 600)  # 300 KiB in all
        for rows in range(10, 600, 10):
            store.set(slice(0, rows), np.full((rows, 64), rows))
            try:
                store.save(path)
                good = content = store.get(...)
            except OSError as error:
                assert error.errno == errno.ENOSPC, error
                print("full", rows)
            assert (load(path).get(...) == content).all()
        store.set(slice(20, None), np.zeros((580, 64), np.int64))
        store.resize(20)
        store.save(path)
        assert (load(path).get(...) == store.get(...)).all()
        print("good")
        """
        script = tmp_path / "fill.py"
        script.write_text(textwrap.dedent(program))
        disk = tmp_path / "disk"
        disk.mkdir()
        command = f"mount -t tmpfs -o size=256k none {disk} && exec {sys.executable} {script} {disk}"
        root = Path(__file__).parents[1]
        env = {"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin"}
        done = subprocess.run(
            ["unshare", "-rm", "sh", "-c", command], check=False, capture_output=True, text=True, cwd=root, env=env
        )
        assert done.returncode == 0, done.stderr
        lines = done.stdout.split("\n")
        assert lines[0].startswith("full")
        assert lines[-2] == "good"
