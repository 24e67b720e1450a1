"""Storages in memory-mapped files: the same contract, and what files and other processes add to it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anystore import ArraySpec, SnapshotError, Storage, load, mapped
from anystore.snapshot import files
from tests import test_storage
from tests.contract import CAPACITY
from tests.faults import FailingCalls, calls_go_through, count_calls
from tests.items import SPEC, assert_same, batch

ROOT = Path(__file__).parents[1]


class TestMapped(test_storage.TestNumpy):
    @pytest.fixture(autouse=True)
    def _somewhere(self, tmp_path, monkeypatch):
        monkeypatch.setattr(files, "fsync", lambda fd: None)
        monkeypatch.setattr(files, "sync_directory", lambda path: None)
        self.place, self.count = tmp_path, 0

    def make(self, spec: Any = SPEC, capacity: int = CAPACITY, **options: Any) -> Storage:
        self.count += 1
        return super().make(spec, capacity, directory=self.place / str(self.count), **options)


class TestSharedMemory:
    """On a file system in memory."""

    obstacle = None if os.access("/dev/shm", os.W_OK) else "there is no /dev/shm to write to"

    def test_items_are_stored(self):
        import tempfile

        with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
            store = Storage(SPEC, CAPACITY, directory=f"{directory}/store")
            store.set([1, 4], batch([1, 4]))
            assert_same(Storage.open(f"{directory}/store", mode="r").get([1, 4]), load_like(store, [1, 4]))


def load_like(store: Storage, rows: Any) -> Any:
    """The items in the containers of what a file describes, which has classes of its own."""
    return load(store.directory).get(rows)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store"


class TestFiles:
    def test_a_later_process_finds_all_of_it(self, path):
        program = """
        import sys
        import numpy as np
        from anystore import Storage
        from tests.items import SPEC, batch
        Storage(SPEC, 10, directory=sys.argv[1]).set(range(10), batch(np.arange(10)))
        """
        subprocess.run([sys.executable, "-c", textwrap.dedent(program), path], check=True, cwd=ROOT)
        for mode in ("r", "r+"):
            assert_same(Storage(SPEC, 10, directory=path, mode=mode).get(...), batch(np.arange(10)))
            assert Storage.open(path, mode=mode).get(...)["action"][0].tolist() == list(range(10))

    def test_files_are_those_of_numpy_and_take_no_room_at_first(self, path):
        store = Storage(ArraySpec((1024,), "float32"), 100_000, directory=path)
        (file,) = path.glob("*.npy")
        assert file.stat().st_size > 400_000_000
        assert file.stat().st_blocks * 512 < 1_000_000
        store.set(99_999, np.arange(1024, dtype=np.float32))
        store.flush()
        array = np.load(file, mmap_mode="r", allow_pickle=False)
        assert array.shape == (100_000, 1024)
        assert (array[99_999] == np.arange(1024)).all()
        assert file.stat().st_blocks * 512 < 5_000_000

    def test_readers_see_what_the_writer_writes(self, path):
        store = Storage(SPEC, 10, directory=path)
        with pytest.raises(ValueError, match="^mode= is for memory-mapped files, found 'r' without directory="):
            Storage(SPEC, 10, mode="r")
        reader = Storage(SPEC, 10, directory=path, mode="r")
        view = reader.get(slice(2, 4), copy=False)
        store.set([2, 3], batch([72, 73]))
        assert_same(reader.get([2, 3]), batch([72, 73]))
        assert_same(view, batch([72, 73]))
        assert store.directory == reader.directory == path
        assert Storage(SPEC, 10).directory is None

    def test_what_is_read_only_is_not_written(self, path):
        Storage(SPEC, 10, directory=path).set(3, batch(3))
        reader = Storage(SPEC, 10, directory=path, mode="r")
        for rows, value in ((3, batch(5)), ([1, 2], batch([1, 2])), (..., batch(1))):
            with pytest.raises(
                ValueError, match="nothing was written: the storage is open for reading only; open it w"
            ):
                reader.set(rows, value)
        assert f", device='cpu', directory='{path}', mode='r')" in repr(reader)
        with pytest.raises(
            ValueError, match=f"^{path}: opened with mode='r', so it cannot be resized; open it with mode="
        ):
            reader.resize(5)
        with pytest.raises(ValueError, match="read-only"):
            reader.get(3, copy=False)["action"][0][...] = 5
        reader.flush()
        assert_same(reader.get(3), batch(3))
        assert reader.capacity == 10

    def test_its_directory_stays_where_it_is(self, path, tmp_path, monkeypatch):
        monkeypatch.chdir(path.parent)
        store = Storage(SPEC, 10, directory=path.name)
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        store.set(3, batch(3))
        store.flush()
        store.resize(12)
        assert store.directory == path
        assert list(Path().iterdir()) == []

    def test_is_opened_while_another_resizes_it(self, path, monkeypatch):
        store = Storage(SPEC, 10, directory=path)
        read = mapped.mapped_manifest

        def resized(directory: Path) -> Any:
            manifest = read(directory)
            monkeypatch.setattr(mapped, "mapped_manifest", read)
            store.resize(12)
            return manifest

        monkeypatch.setattr(mapped, "mapped_manifest", resized)
        assert Storage.open(path).capacity == 12

    @pytest.mark.parametrize("how", ["made anew", "a copy", "a file is gone"])
    def test_what_is_written_after_another_replaced_it_is_known_to_be_lost(self, path, tmp_path, how):
        store = Storage(SPEC, 10, directory=path)
        if how == "a copy":
            shutil.copytree(path, tmp_path / "copy")
        if how == "a file is gone":
            next(path.glob("*.npy")).unlink()
        else:
            shutil.rmtree(path)
            with pytest.raises(SnapshotError, match="there is no such file"):
                store.flush()
            with pytest.raises(SnapshotError, match="there is no such file"):
                store.resize(20)
            assert not path.exists()
            if how == "a copy":
                shutil.move(tmp_path / "copy", path)
            else:
                Storage(SPEC, 10, directory=path).set(3, batch(7))
        store.set([3], batch([5]))
        for write in (store.flush, lambda: store.resize(30)):
            with pytest.raises(SnapshotError, match="another has resized or replaced this storage since it"):
                write()
        if how == "made anew":
            assert_same(Storage(SPEC, 10, directory=path).get(3), batch(7))

    def test_rows_that_were_never_written_take_no_room_after_a_resize(self, path):
        store = Storage(ArraySpec((1000,), "uint8"), 100_000, directory=path)
        store.set(7, np.ones(1000, np.uint8))
        store.resize(200_000)
        assert sum(file.stat().st_blocks * 512 for file in path.glob("*.npy")) < 1_000_000
        assert store.get(7).sum() == 1000

    def test_what_could_not_be_read_again_is_not_made(self, path):
        with pytest.raises(ValueError, match="expected"):
            Storage(ArraySpec((0,), "float32"), 2**49, directory=path)
        assert Storage(ArraySpec((), "int8"), 4, directory=path).capacity == 4

    def test_what_there_is_no_room_for_is_warned_of(self, path, monkeypatch):
        with pytest.warns(
            RuntimeWarning, match=r"takes .* bytes when it is full; .* bytes are free at .*/store, and"
        ) as w:
            Storage(ArraySpec((2**20,), "uint8"), 2**23, directory=path)
        assert w[0].filename == __file__

    def test_is_resized_for_those_who_open_it_later(self, path):
        store = Storage(SPEC, 10, directory=path)
        store.set(..., batch(np.arange(10)))
        reader = Storage(SPEC, 10, directory=path, mode="r")
        store.resize(15)
        store.set(12, batch(12))
        assert_same(reader.get(...), batch(np.arange(10)))
        assert_same(Storage(SPEC, 15, directory=path, mode="r").get([9, 12]), batch([9, 12]))
        assert len(list(path.glob("*.npy"))) == 5

    def test_what_is_written_after_another_resized_it_is_known_to_be_lost(self, path):
        store = Storage(SPEC, 10, directory=path)
        other = Storage.open(path)
        store.resize(20)
        store.set(range(10), batch(np.arange(10)))
        other.set([3], batch([7]))
        for write in (other.flush, lambda: other.resize(30)):
            with pytest.raises(SnapshotError, match="another has resized or replaced this storage since it"):
                write()
        store.flush()
        assert_same(Storage(SPEC, 20, directory=path).get(range(10)), batch(np.arange(10)))
        store.resize(15)
        store.flush()

    def test_every_call_of_a_resize_fails(self, tmp_path):
        def begun(path: Path) -> Storage:
            store = Storage(SPEC, 10, directory=path)
            store.set(..., batch(np.arange(10)))
            return store

        probe = begun(tmp_path / "count")
        for number in range(count_calls(lambda: probe.resize(15))):
            store, path = begun(tmp_path / str(number)), tmp_path / str(number)
            faults = FailingCalls(number, errno.ENOSPC, for_good=False)
            with calls_go_through(faults):
                try:
                    store.resize(15)
                except OSError:
                    # Whichever files are there are those of this storage, though nobody may count on new ones yet.
                    assert store.capacity == Storage.open(path).capacity
                    assert store.capacity == 10 or faults.failed == ["sync_directory"]
                else:
                    assert faults.failed == ["unlink"]
                    assert store.capacity == 15
            store.set(3, batch(33))
            store.resize(12)
            assert_same(Storage(SPEC, 12, directory=path).get(range(10)), batch([0, 1, 2, 33, 4, 5, 6, 7, 8, 9]))

    def test_any_moment_of_a_resize_is_interrupted(self, tmp_path):
        """By a signal, whose handler raises: the storage is that of the files that are there."""

        def interrupted(name: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
            nonlocal left
            left -= 1
            done = call(*arguments)
            if left == -1:
                signal.raise_signal(signal.SIGINT)
            return done

        path = tmp_path / "store"
        store = Storage(SPEC, 10, directory=path)
        for number in range(count_calls(lambda: store.resize(11)) + 1):
            left = number
            with calls_go_through(interrupted), contextlib.suppress(KeyboardInterrupt):
                store.resize(20 + number)
            store.set(..., batch(np.arange(len(store))))
            store.flush()
            assert_same(Storage(SPEC, len(store), directory=path).get(...), batch(np.arange(len(store))))

    def test_every_call_of_its_making_fails(self, tmp_path):
        for number in range(count_calls(lambda: Storage(SPEC, 10, directory=tmp_path / "count"))):
            path = tmp_path / str(number)
            with (
                calls_go_through(FailingCalls(number, errno.ENOSPC, for_good=True)),
                pytest.raises(OSError, match="No sp"),
            ):
                Storage(SPEC, 10, directory=path)
            if not (path / "manifest.json").exists():
                with pytest.raises(SnapshotError, match="no such file"):
                    Storage(SPEC, 10, directory=path, mode="r")
            store = Storage(SPEC, 10, directory=path)
            store.set(3, batch(3))
            assert_same(Storage(SPEC, 10, directory=path, mode="r").get(3), batch(3))
            assert len(list(path.iterdir())) == 5 + 2

    def test_two_may_make_it_at_once(self, path):
        path.mkdir()
        program = """
        import sys
        from anystore import Storage
        from tests.items import SPEC, batch
        number = int(sys.argv[2])
        Storage(SPEC, 10, directory=sys.argv[1]).set(number, batch(number))
        """
        with files.locked(path):
            command = [sys.executable, "-c", textwrap.dedent(program), str(path)]
            children = [subprocess.Popen([*command, str(number)], cwd=ROOT) for number in range(3)]
        assert [child.wait() for child in children] == [0, 0, 0]
        assert_same(Storage(SPEC, 10, directory=path).get(range(3)), batch([0, 1, 2]))

    def test_refuses_what_does_not_fit(self, path, tmp_path):
        Storage(SPEC, 10, directory=path)
        with pytest.raises(SnapshotError, match="expected a capacity of 11, found 10"):
            Storage(SPEC, 11, directory=path)
        with pytest.raises(SnapshotError, match=r"obs: expected, but not in the snapshot"):
            Storage({"obs": ArraySpec((), "int8")}, 10, directory=path)
        with pytest.raises(ValueError, match="expected a mode among r\\+, r, found 'w'"):
            Storage(SPEC, 10, directory=path, mode="w")
        with pytest.raises(SnapshotError, match="there is no such file, so no snapshot"):
            Storage(SPEC, 10, directory=tmp_path / "nowhere", mode="r")
        Storage(SPEC, 10).save(tmp_path / "snapshot")
        for make in (lambda where: Storage(SPEC, 10, directory=where), Storage.open):
            with pytest.raises(
                SnapshotError, match="expected a memory-mapped storage, found a snapshot of kind storage"
            ):
                make(tmp_path / "snapshot")
        with pytest.raises(SnapshotError, match="expected a snapshot of kind storage, found one of mapped"):
            Storage(SPEC, 10).save(path)
        (tmp_path / "thesis").mkdir()
        (tmp_path / "thesis" / "text").write_text("years of work")
        with pytest.raises(SnapshotError, match="expected an empty directory or a snapshot, found text"):
            Storage(SPEC, 10, directory=tmp_path / "thesis")

    def test_refuses_another_backend(self, path):
        pytest.importorskip("torch")
        with pytest.raises(ValueError, match="a storage with a directory is of 'numpy' on 'cpu', not of 'torch'"):
            Storage(SPEC, 10, backend="torch", directory=path)
        with pytest.raises(ValueError, match="a storage with a directory is of 'numpy' on 'cpu', not of 'numpy' on 'd"):
            Storage(SPEC, 10, device=f"disk:{path.parent}", directory=path)
        assert not path.exists()

    def test_refuses_damaged_files(self, path):
        Storage(SPEC, 10, directory=path)
        for file in path.glob("*.npy"):
            good = file.read_bytes()
            for bad in (good[:-1], good + b"0", good[:70] + b"9" + good[71:]):
                file.write_bytes(bad)
                with pytest.raises(SnapshotError, match=file.name):
                    Storage(SPEC, 10, directory=path)
            file.unlink()
            with pytest.raises((SnapshotError, FileNotFoundError), match=file.name):
                Storage(SPEC, 10, directory=path)
            file.write_bytes(good)

    def test_a_snapshot_of_it_and_a_copy_in_memory(self, path, tmp_path):
        store = Storage(SPEC, 10, directory=path)
        store.set([1, 9], batch([1, 9]))
        store.save(tmp_path / "snapshot")
        Storage(SPEC, 10, directory=path).set(2, batch(2))  # which the first cannot know of
        store.save(tmp_path / "snapshot")
        for where in (tmp_path / "snapshot", path):
            found = load(where, like=SPEC)
            assert found.directory is None
            assert_same(found.get(...), store.get(...))


LARGE = {"first": ArraySpec((1 << 15,), "int64"), "last": ArraySpec((1 << 15,), "int64")}
"""Items that take so long to write that whoever looks without a lock finds half of one."""


def test_two_processes_never_see_half_an_item(path):
    """One writes stamped rows, the other reads them, each under a lock of theirs."""
    program = """
    import fcntl, sys
    import numpy as np
    from anystore import Storage
    from tests.test_mapped import LARGE
    store = Storage(LARGE, 3, directory=sys.argv[1])
    with open(sys.argv[2], "w") as lock:
        for stamp in range(1, 2000):
            items = np.full((2, 1 << 15), stamp)
            fcntl.flock(lock, fcntl.LOCK_EX)
            store.set([stamp % 3, (stamp + 1) % 3], {"first": items, "last": items})
            fcntl.flock(lock, fcntl.LOCK_UN)
    """
    Storage(LARGE, 3, directory=path)
    reader = Storage(LARGE, 3, directory=path, mode="r")
    command = [sys.executable, "-c", textwrap.dedent(program), path, path.parent / "lock"]
    seen = set()
    with open(path.parent / "lock", "w") as lock, subprocess.Popen(command, cwd=ROOT) as writer:
        running = True
        while running:
            running = writer.poll() is None
            fcntl.flock(lock, fcntl.LOCK_SH)
            items = reader.get(...)
            fcntl.flock(lock, fcntl.LOCK_UN)
            stamps = items["first"][:, 0]
            for leaf in items.values():
                assert (leaf == stamps[:, None]).all()
            seen.update(stamps.tolist())
    assert writer.returncode == 0
    assert max(seen) == 1999
