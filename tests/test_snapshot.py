from __future__ import annotations

import collections
import copy
import dataclasses
import errno
import itertools
import json
import re
import subprocess
import sys
import textwrap
import threading
import tracemalloc
import types
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from anystore import ArraySpec, SnapshotError, Storage, load, select_backend
from anystore.convert import to_numpy
from anystore.snapshot import Snapshot, files, manifest, npy, progress, save_snapshot, writer
from anystore.snapshot.manifest import read_manifest
from anystore.snapshot.report import report
from tests import stand_in
from tests.items import SPEC, Pose, assert_same, batch, host, leaves

CAPACITY = 10
BACKENDS = ["numpy", "torch", "jax", "array_api_strict"]


@pytest.fixture(autouse=True)
def _unsynced(monkeypatch):
    """Without waiting for the disk; test_snapshot_faults.py has what that is for."""
    monkeypatch.setattr(files, "fsync", lambda fd: None)
    monkeypatch.setattr(files, "sync_directory", lambda path: None)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "snapshot"


def filled(backend: str = "numpy", spec: Any = SPEC, rows: int = CAPACITY) -> Storage:
    if backend != "numpy":
        pytest.importorskip(backend)
    store = Storage(spec, CAPACITY, backend=backend, device="cpu")
    store.set(range(rows), batch(np.arange(rows)))
    return store


def layers(path: Path) -> list[int]:
    """The rows in each layer of the newest version."""
    return [layer.count for layer in read_manifest(path / "manifest.json").storages["items"].layers]


class TestRoundTrip:
    @pytest.mark.parametrize(("writes", "reads"), list(itertools.product(BACKENDS, BACKENDS)))
    def test_any_backend_writes_and_any_reads(self, path, writes, reads):
        store = filled(writes)
        store.save(path)
        store.set([3, 1], batch([53, 51]))
        store.save(path)
        if reads != "numpy":
            pytest.importorskip(reads)
        found = load(path, backend=reads, device="cpu", like=SPEC)
        assert found.backend is select_backend(reads, "cpu")
        assert_same(found.get(...), batch([0, 51, 2, 53, 4, 5, 6, 7, 8, 9]))
        found.set(2, batch(52))
        found.save(path)
        assert layers(path) == [10, 2, 1]
        assert_same(load(path, like=store).get(...), batch([0, 51, 52, 53, 4, 5, 6, 7, 8, 9]))

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_rows_that_are_not_zero_bytes_are_written(self, path, backend):
        store = filled(backend, rows=4)
        store.save(path)
        assert layers(path) == [4]
        assert_same(load(path, like=store).get(...), store.get(...))

    def test_negative_zero_is_no_zero(self, path):
        store = Storage(ArraySpec((2,), "float32"), 5)
        store.set(3, [-0.0, 0.0])
        store.save(path)
        assert np.signbit(load(path).get(3)).tolist() == [True, False]

    def test_what_was_never_written_is_saved_too(self, path):
        Storage(SPEC, CAPACITY).save(path)
        assert layers(path) == [0]
        assert not any(leaf.any() for leaf in leaves(load(path).get(...)))

    @pytest.mark.parametrize(
        "dtype",
        [
            *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
            *("float16", "float32", "float64", "longdouble", "complex64", "complex128", "clongdouble"),
            *("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz", "int4", "uint4"),
            *(">i4", ">f8", "S3", "U4", ">U2", "V5", "M8[ns]", "m8[25s]", "M8", "M8[D]"),
            *([("a", "i4"), ("b", ">f8", (2, 3))], [("é", "u1"), ("in", [("x", "f4"), ("y", "U3")])]),
            {"names": ["a", "b"], "formats": ["u1", "f8"], "offsets": [0, 8], "itemsize": 24},
        ],
        ids=str,
    )
    def test_each_dtype_bit_by_bit(self, path, dtype):
        spec = ArraySpec((3,), dtype)
        store = Storage({"x": spec, "y": ArraySpec((), dtype)}, 7)
        random = np.random.default_rng(0)
        for leaf in leaves(store.buffers):
            high = 2 if spec.dtype.kind == "b" else 16
            raw = random.integers(0, high, leaf.nbytes, np.uint8)
            leaf.reshape(-1).view(np.uint8)[...] = raw
        store.save(path)
        found = load(path, like=store)
        assert found.data_spec == load(path).data_spec == store.data_spec
        for one, other in zip(leaves(found.get(...)), leaves(store.get(...)), strict=True):
            assert one.dtype == other.dtype
            assert one.tobytes() == other.tobytes()

    @pytest.mark.parametrize("backend", ["torch", "jax"])
    @pytest.mark.parametrize("dtype", ["bfloat16", "float8_e5m2", "bool"])
    def test_extension_dtypes_move_between_backends(self, path, backend, dtype):
        pytest.importorskip(backend)
        pytest.importorskip("ml_dtypes")
        store = Storage(ArraySpec((3,), dtype), 7, backend=backend, device="cpu")
        store.set(..., np.arange(21).reshape(7, 3).astype(store.data_spec.dtype))
        store.save(path)
        assert to_numpy(load(path).get(...)).tobytes() == to_numpy(store.get(...)).tobytes()
        again = load(path, backend=backend, device="cpu")
        assert to_numpy(again.get(...)).tobytes() == to_numpy(store.get(...)).tobytes()

    def test_numpy_and_json_alone_can_read_it(self, path):
        store = filled()
        store.save(path)
        store.set([7, 1, 3], batch([57, 51, 53]))
        store.save(path)
        store.set(slice(4, 6), batch([64, 65]))
        store.save(path)
        entry = json.loads((path / "manifest.json").read_text())["storages"]["items"]
        image = np.zeros((entry["capacity"], 3, 2), np.uint8)
        for layer in entry["layers"]:
            values = np.load(path / layer["leaves"]["obs/image"]["file"], allow_pickle=False)
            rows = range(layer["start"], layer["start"] + layer["count"]) if layer["index"] is None else None
            image[np.load(path / layer["index"]["file"]) if rows is None else rows] = values
        assert (image == store.get(...)["obs"]["image"]).all()

    def test_options_come_back(self, path):
        Storage({"x": ArraySpec((2,), "int8", name="a remark")}, 3, casting="unsafe").save(path)
        found = load(path)
        assert found.casting == "unsafe"
        assert found.data_spec["x"].name == "a remark"

    def test_several_storages_with_arrays_and_a_state(self, path):
        one, two = filled(), Storage(ArraySpec((2,), "float64"), 4)
        two.set(1, [1.5, 2.5])
        state = {"cursor": 2**100, "nothing": None, "nested": [1.5, {"x": "é"}]}
        arrays = {"tree": np.arange(6.0).reshape(2, 3), "scalar": np.array(7), "none": np.zeros((0, 3))}
        arrays["bfloat16"] = np.arange(3).astype(ArraySpec((), "bfloat16").dtype)
        for _ in range(2):
            save_snapshot(path, {"items": one, "marks/two": two}, state=state, arrays=arrays)
        snapshot = Snapshot(path)
        assert snapshot.state == state
        for name, array in snapshot.arrays().items():
            assert array.dtype == arrays[name].dtype
            assert array.shape == arrays[name].shape
            assert array.tobytes() == arrays[name].tobytes()
        assert_same(snapshot.storage("items", like=one).get(...), one.get(...))
        assert_same(snapshot.storage("marks/two").get(...), two.get(...))
        with pytest.raises(SnapshotError, match="expected a storage 'other', found items, marks/two"):
            snapshot.storage("other")
        two.set(3, [7, 8])
        save_snapshot(path, {"items": one, "marks/two": two})
        found = Snapshot(path).manifest.storages
        counts = {name: [each.count for each in entry.layers] for name, entry in found.items()}
        assert counts == {"items": [10], "marks/two": [2, 1]}
        assert_same(Snapshot(path).storage("marks/two").get(...), two.get(...))


@dataclasses.dataclass
class Plain:
    first: Any
    second: Any


class Other(NamedTuple):
    first: Any
    second: Any


LEAF = ArraySpec((2,), "int16")
ONE, TWO = LEAF, ArraySpec((), "uint8")


class TestNests:
    @pytest.mark.parametrize(
        "spec",
        [
            ONE,
            {"b": ONE, "a": TWO},
            collections.OrderedDict([("b", ONE), ("a", TWO)]),
            [ONE, TWO],
            (ONE,),
            Pose(ONE, TWO),
            [{"x": (ONE, Pose([TWO], {"deep": ONE}))}],
            {1: ONE, 2: TWO},
            {(1, "a"): ONE, (2, "b"): TWO},
            {"a/b": ONE, "a.b": TWO, "A/B": ONE},
            {"..": ONE, ".": TWO, "": ONE, "x" * 300: TWO, "/etc/passwd": ONE, "ünï": TWO, "nul\0": ONE, "é": TWO},
            {"a": ONE, "none": {}, "empty": [], "tuple": ()},
            {True: ONE, "a": TWO, None: ONE},
        ],
        ids=lambda spec: repr(spec)[:40],
    )
    def test_each_kind_comes_back(self, path, spec):
        store = Storage(spec, 4)
        for position, leaf in enumerate(leaves(store.buffers)):
            leaf[...] = np.arange(leaf.size).reshape(leaf.shape) + position
        store.save(path)
        assert all(name.isascii() and "/" not in name for name in (each.name for each in path.iterdir()))
        assert_same(load(path, like=store).get(...), store.get(...))
        found = load(path)
        # A class of the user's own is made anew; all the rest is the very same.
        text = str(found.data_spec)
        assert text == str(store.data_spec)
        assert [to_numpy(leaf).tobytes() for leaf in leaves(found.get(...))] == [
            leaf.tobytes() for leaf in leaves(store.get(...))
        ]

    def test_classes_of_the_users_own(self, path):
        attrs = pytest.importorskip("attr")
        attr_class = attrs.make_class("Attr", ["first", "_second"])
        for cls in (Plain, Other, attr_class):
            store = Storage({"x": cls(first=ONE, second=TWO)}, 3)
            store.set(1, {"x": cls(first=np.array([1, 2], np.int16), second=np.uint8(3))})
            store.save(path)
            found = load(path, like=store).get(1)["x"]
            assert type(found) is cls
            generic = load(path).get(1)["x"]
            if cls is attr_class:  # a field that begins with an underscore is none of a namedtuple
                assert generic == {"first": pytest.approx([1, 2]), "_second": 3}
            else:
                assert type(generic).__name__ == cls.__name__
                assert generic.first.tolist() == [1, 2]
                assert type(generic) is type(load(path).get(1)["x"])

    def test_a_loaded_generic_store_takes_items_of_the_class(self, path):
        filled().save(path)
        found = load(path)
        found.set(3, batch(77))
        assert found.get(3)["obs"]["pose"].position.tolist() == batch(77)["obs"]["pose"].position.tolist()

    @pytest.mark.parametrize("key", [b"x", float("inf"), ("x", float("nan"))])
    def test_a_key_that_cannot_be_written_down(self, path, key):
        found = re.escape(repr(key[1] if isinstance(key, tuple) else key))
        with pytest.raises(ValueError, match=f"expected the keys of a dict to be strings, finite .*, found {found}"):
            Storage({key: ONE}, 3).save(path)
        assert not path.exists()

    def test_a_dtype_that_a_file_would_not_hold(self, path):
        bfloat16 = ArraySpec((), "bfloat16").dtype
        with pytest.raises(ValueError, match="cannot be saved: a .npy file would not hold all of it"):
            Storage({"x": ArraySpec((), [("a", bfloat16)])}, 3).save(path)

    def test_like_takes_any_nest_of_the_same_paths(self, path):
        Storage({"a": [ONE, TWO]}, 3).save(path)
        assert load(path, like=collections.OrderedDict(a=(ONE, TWO))).data_spec == {"a": (ONE, TWO)}

    def test_like_refuses_what_does_not_fit_by_path(self, path):
        Storage({"a": ONE, "b": TWO, "c": LEAF}, 3).save(path)
        with pytest.raises(SnapshotError) as refused:
            load(path, like={"a": ArraySpec((3,), "int16"), "b": ArraySpec((), "int8"), "d": ONE})
        assert str(refused.value).splitlines() == [
            f"{path}: the snapshot is not like what is expected",
            "d: expected, but not in the snapshot",
            "c: in the snapshot, but not expected",
            "a: expected ArraySpec((3,), 'int16'), found ArraySpec((2,), 'int16')",
            "b: expected ArraySpec((), 'int8'), found ArraySpec((), 'uint8')",
        ]

    def test_like_a_storage_gives_its_backend(self, path):
        pytest.importorskip("torch")
        filled().save(path)
        assert load(path, like=filled("torch")).backend.name == "torch"
        assert load(path, like=filled("torch"), backend="numpy").backend.name == "numpy"

    def test_like_a_nest_whose_fields_are_called_as_those_of_a_storage(self, path):
        class Item(NamedTuple):
            data_spec: Any
            backend: Any

        store = Storage(Item(ONE, TWO), 3)
        store.save(path)
        found = load(path, like=Item(ONE, TWO))
        assert found.backend.name == "numpy"
        assert isinstance(found.get(0), Item)


class TestIncremental:
    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize(
        ("index", "count"),
        [
            (3, 1),
            (-1, 1),
            (slice(2, 5), 3),
            (slice(None, None, -3), 4),
            ([1, 5, 5, -1], 3),
            (np.array([[0, 1], [1, 9]]), 3),
            (np.arange(CAPACITY) % 4 == 0, 3),
            ([], 0),
            (..., 10),
        ],
        ids=str,
    )
    def test_writes_the_rows_that_were_written(self, path, backend, index, count):
        store = filled(backend)
        store.save(path)
        rows = np.arange(CAPACITY)[index]
        store.set(index, batch(rows + 100))
        store.save(path)
        assert layers(path) == [10, count] if count else [10]
        model = np.arange(CAPACITY)
        model[rows] = rows + 100
        assert_same(load(path, like=SPEC).get(...), batch(model))
        store.save(path)
        assert layers(path) == [10, count] if count else [10]

    def test_rows_of_a_device(self, path):
        store = filled("torch")
        store.save(path)
        import torch

        store._changes.note(torch.tensor([2, 4]))
        assert np.flatnonzero(store._changes.mask).tolist() == [2, 4]

    def test_any_sequence_of_writes_and_saves(self, path):
        random = np.random.default_rng(1)
        store, model = filled(), np.arange(CAPACITY)
        for turn in range(150):
            rows = random.integers(0, CAPACITY, random.integers(0, 4))
            stamps = random.integers(0, 1000, len(rows))
            store.set(rows, batch(stamps))
            model[rows] = stamps
            if random.random() < 0.7:
                store.save(path, keep=int(random.integers(3)))
                if random.random() < 0.2:
                    store = load(path, like=SPEC)
                assert_same(load(path, like=SPEC).get(...), batch(model))
                Snapshot(path).verify()
            assert turn == 0 or len(layers(path)) <= writer._LAYERS

    def test_layers_become_a_base_when_they_outgrow_it(self, path):
        store = filled()
        store.save(path)
        for turn in range(5):
            store.set(range(2 * turn, 2 * turn + 2), batch([70, 71]))
            store.save(path)
        assert layers(path) == [10, 2, 2, 2, 2, 2]
        store.set(0, batch(5))
        store.save(path)
        assert layers(path) == [10]
        assert len(list(path.iterdir())) == 5 + 2

    def test_many_layers_become_a_base(self, path, monkeypatch):
        monkeypatch.setattr(writer, "_LAYERS", 4)
        store = filled()
        for _ in range(5):
            store.set(0, batch(7))
            store.save(path)
        assert layers(path) == [10]

    @pytest.mark.parametrize(
        "hand_out",
        [
            lambda store: store.buffers,
            lambda store: store.get(3, copy=None),
            lambda store: store.get(slice(3, 4), copy=False),
            lambda store: store.select("obs").get(3, copy=None),
        ],
    )
    @pytest.mark.parametrize("first", [True, False], ids=["before the save", "after it"])
    def test_nothing_is_lost_that_is_written_through_a_view(self, path, hand_out, first):
        store = filled()
        view = hand_out(store) if first else None
        store.save(path)
        view = hand_out(store) if view is None else view
        for leaf in leaves(view):
            leaf[...] = 0
        store.save(path)
        assert layers(path) in ([10], [0])
        assert_same(load(path, like=store).get(...), store.get(...))
        assert not load(path).get(3)["obs"]["image"].any()

    def test_a_copy_hands_nothing_out(self, path):
        store = filled()
        store.save(path)
        for index in (3, slice(3), [1, 2]):
            store.get(index)
        store.get([1, 2], copy=None)
        store.set(0, batch(3))
        store.save(path)
        assert layers(path) == [10, 1]

    def test_a_copy_where_torch_has_no_view_hands_nothing_out(self, path):
        pytest.importorskip("torch")
        store = filled("torch")
        store.save(path)
        store.get(slice(None, None, -1), copy=None)
        store.set(0, batch(3))
        store.save(path)
        assert layers(path) == [10, 1]

    @pytest.mark.parametrize("first", [True, False], ids=["before the save", "after it"])
    def test_sees_what_is_written_through_a_selection(self, path, first):
        store = filled()
        part = store.select("obs") if first else None
        store.save(path)
        part = store.select("obs") if part is None else part
        part.select("image").set([4, 6], np.zeros((2, 3, 2), np.uint8))
        store.save(path)
        assert layers(path) == [10, 2]
        assert_same(load(path, like=store).get(...), store.get(...))

    def test_a_selection_is_saved_by_itself(self, path, tmp_path):
        store = filled()
        store.save(path)
        part = store.select("obs")
        part.set(2, batch(70)["obs"])
        part.save(tmp_path / "part")
        part.save(tmp_path / "part")
        assert_same(load(tmp_path / "part", like=part).get(...), part.get(...))
        store.save(path)
        assert layers(path) == [10, 1]
        assert_same(load(path, like=store).get(...), store.get(...))

    def test_a_resized_storage_is_saved_whole(self, path):
        store = filled()
        store.save(path)
        store.get(3, copy=False)
        store.resize(6)
        store.save(path)
        assert layers(path) == [6]
        store.set(0, batch(3))
        store.save(path)
        assert layers(path) == [6, 1]
        assert_same(load(path, like=store).get(...), store.get(...))

    @pytest.mark.parametrize("again", [copy.deepcopy, lambda store: load_twin(store)], ids=["copy", "twin"])
    def test_two_that_come_from_one_snapshot(self, path, again):
        store = filled()
        store.save(path)
        twin = again(store)
        store.set(2, batch(72))
        store.save(path)
        twin.set(3, batch(73))
        twin.save(path)  # which is not against what is there by now
        assert layers(path) == [10]
        assert_same(load(path, like=twin).get(...), batch([0, 1, 2, 73, 4, 5, 6, 7, 8, 9]))

    def test_another_path_is_another_snapshot(self, path, tmp_path):
        store = filled()
        store.save(path)
        store.set(2, batch(72))
        store.save(tmp_path / "other")
        store.save(path)
        for each in (path, tmp_path / "other"):
            assert layers(each) == [10]
            assert_same(load(each, like=store).get(...), store.get(...))

    def test_many_leaves_in_many_layers_are_written_whole(self, path, monkeypatch):
        """Before there is no room for them in the manifest, where a name may take several times its letters."""
        monkeypatch.setattr(manifest, "MANIFEST_BYTES", 120_000)
        monkeypatch.setattr(writer, "_LAYERS_BYTES", 60_000)
        store = Storage({f"葉 {number}": ONE for number in range(30)}, 200)
        layers = []
        for row in range(40):
            store.set(row, {f"葉 {number}": np.full(2, row, np.int16) for number in range(30)})
            store.save(path)
            layers.append(len(manifest.read_manifest(path / manifest.MANIFEST).storages["items"].layers))
        assert 5 < max(layers) < 40
        assert layers.count(1) > 2
        assert load(path).get(39)["葉 7"].tolist() == [39, 39]

    def test_a_process_that_is_forked_during_a_save_does_not_go_on_with_the_lock(self, path):
        program = textwrap.dedent(
            """
            import os, sys
            from anystore import ArraySpec, Storage
            ends, children = os.pipe(), []

            def progress(*_):
                if not children:
                    children.append(os.fork())
                    if children[0] == 0:
                        os.read(ends[0], 1)
                        os._exit(0)

            store = Storage(ArraySpec((), "int32"), 4)
            store.set(0, 1)
            store.save(sys.argv[1], progress=progress)
            try:
                store.save(sys.argv[1])
            finally:
                os.write(ends[1], b".")
                os.waitpid(children[0], 0)
            """
        )
        subprocess.check_call([sys.executable, "-c", program, str(path)])

    def test_a_failed_save_forgets_no_row(self, path):
        store = filled()
        store.save(path)
        store.set(2, batch(72))
        with files.locked(path), pytest.raises(SnapshotError, match="another process or thread is writing"):
            store.save(path)
        store.save(path)
        assert layers(path) == [10, 1]
        assert_same(load(path, like=store).get(...), store.get(...))


def load_twin(store: Storage) -> Storage:
    """What is loaded from where a storage was saved last."""
    twin = copy.deepcopy(store)
    twin._track(copy.deepcopy(store._changes))
    return twin


class TestPieces:
    """With pieces so small that there are many of each leaf."""

    @pytest.fixture(autouse=True)
    def _small(self, monkeypatch):
        monkeypatch.setattr(npy, "PIECE", 48)
        monkeypatch.setattr(npy, "ROWS", 7)
        monkeypatch.setattr(writer, "ROWS", 7)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_rows_in_a_run_and_here_and_there(self, path, backend):
        if backend != "numpy":
            pytest.importorskip(backend)
        store, model = Storage(SPEC, 300, backend=backend, device="cpu"), np.arange(300)
        store.set(..., batch(model))
        store.save(path)
        rows = np.random.default_rng(0).permutation(300)[:120]
        model[rows] = rows + 1000
        store.set(rows, batch(rows + 1000))
        store.save(path)
        assert layers(path) == [300, 120]
        Snapshot(path).verify()
        assert_same(load(path, backend=backend, device="cpu", like=SPEC).get(...), batch(model))
        assert_same(load(path, backend=backend, device="cpu", like=SPEC, capacity=77).get(...), batch(model[:77]))
        store.resize(299)
        store.set(298, batch(0))
        store.save(path)
        assert_same(load(path, like=SPEC).get(range(298)), batch(model[:298]))

    def test_damage_in_any_piece(self, path):
        store = Storage(ArraySpec((3,), "uint8"), 300)
        store.set(..., np.arange(900).reshape(300, 3).astype(np.uint8))
        store.save(path)
        (file,) = path.glob("*.npy")
        good = file.read_bytes()
        for position in range(128, len(good), 7):
            file.write_bytes(good[:position] + bytes([good[position] ^ 4]) + good[position + 1 :])
            with pytest.raises(SnapshotError, match="the file is damaged"):
                load(path)

    def test_rows_in_use(self):
        store = Storage({"a": ArraySpec((2,), "int16"), "b": ArraySpec((0,), "int8")}, 100)
        for row in (0, 3, 6, 7, 50, 97, 99):
            store.set(row, {"a": [0, 1], "b": []})
            assert writer.used_rows(store) == row + 1


@pytest.mark.parametrize("lengths", [(0, 0), (1, 0), (0, 1), (3, 5), (1000, 12345), (7, 1 << 22)])
def test_checksums_of_parts_make_that_of_the_whole(lengths):
    random = np.random.default_rng(0)
    first, second = (random.bytes(length) for length in lengths)
    assert npy.combined(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)


class TestCupyOnAStandIn:
    on_a_stand_in = True

    def test_from_a_gpu_and_back(self, path, monkeypatch):
        with stand_in.installed(monkeypatch):
            store = Storage(SPEC, CAPACITY, backend="cupy", device="cuda:1")
            store.set(..., batch(np.arange(CAPACITY)))
            store.save(path)
            rows = store.backend.from_numpy(np.array([2, 7]))
            store.set(rows, batch([52, 57]))
            store.save(path)
            assert layers(path) == [10, 2]
            expected = batch([0, 1, 52, 3, 4, 5, 6, 57, 8, 9])
            found = load(path, backend="cupy", device="cuda:1", like=SPEC)
            assert found.device == "cuda:1"
            assert_same(found.get(...), expected)
            assert_same(load(path, like=SPEC).get(...), expected)

    def test_goes_through_pinned_pieces(self, path, monkeypatch):
        with stand_in.installed(monkeypatch):
            store = Storage({"x": ArraySpec((1 << 20,), "uint8")}, 10, backend="cupy", device="cuda:0")
            store.set(..., {"x": np.ones((10, 1 << 20), np.uint8)})
            cuda, sizes = sys.modules["cupy"].cuda, []
            allocate = cuda.alloc_pinned_memory
            monkeypatch.setattr(cuda, "alloc_pinned_memory", lambda nbytes: sizes.append(nbytes) or allocate(nbytes))
            store.save(path)
            assert sum(sizes) >= store.nbytes
            assert max(sizes) <= 4 << 20


class TestVersions:
    def test_keeps_as_many_as_it_is_told(self, path):
        store = filled()
        for stamp in range(60, 66):
            store.set(0, batch(stamp))
            store.save(path, keep=2)
        for version, stamp in ((6, 65), (5, 64), (4, 63)):
            assert load(path, version=version).get(0)["action"][0] == stamp
        with pytest.raises(SnapshotError, match="expected one of the versions 6, 5, 4, found 3"):
            load(path, version=3)
        store.save(path)
        with pytest.raises(SnapshotError, match="expected one of the versions 7, found 6"):
            load(path, version=6)
        assert len({each.name[:6] for each in path.glob("*.npy")}) == 6  # the base and five layers of one row

    def test_a_save_that_fails_forgets_none(self, path, monkeypatch):
        store = filled()
        for _ in range(3):
            store.save(path, keep=2)
        there, create = report(path)["older_versions"], files.create

        def full(file):
            if file.name == "manifest.json.new":
                raise OSError(errno.ENOSPC, "no space")
            return create(file)

        with monkeypatch.context() as patch:
            patch.setattr(files, "create", full)
            with pytest.raises(OSError, match="no space"):
                store.save(path, keep=2)
        assert report(path)["older_versions"] == there == [2, 1]
        for version in (3, 2, 1):
            assert_same(load(path, version=version, like=SPEC).get(...), store.get(...))
        with pytest.raises(SnapshotError, match="expected one of the versions 3, 2, 1, found 9"):
            load(path, version=9)
        store.save(path, keep=2)
        assert report(path)["older_versions"] == [3, 2]

    def test_an_older_version_can_be_gone_on_from(self, path):
        store = filled()
        store.save(path)
        store.set(..., batch(9))
        store.save(path, keep=1)
        old = load(path, version=1, like=SPEC)
        old.set(0, batch(77))
        old.save(path)
        assert_same(load(path, like=SPEC).get(...), batch([77, 1, 2, 3, 4, 5, 6, 7, 8, 9]))

    def test_an_older_version_that_is_damaged_may_be_given_up(self, path):
        store = filled()
        store.save(path)
        store.save(path, keep=1)
        older = path / "manifest-000001.json"
        older.write_bytes(b"{}")
        with pytest.raises(SnapshotError, match=r"manifest-000001.json: .*; remove this file to give up the older"):
            store.save(path, keep=1)
        older.unlink()
        store.save(path, keep=1)
        assert_same(load(path, version=2, like=SPEC).get(...), store.get(...))

    @pytest.mark.parametrize("keep", [1.5, None, True])
    def test_refuses_to_keep_what_is_no_number(self, path, keep):
        with pytest.raises(ValueError, match="expected keep to be an int of 0 or more, found"):
            filled().save(path, keep=keep)
        assert not path.exists()

    def test_refuses_to_keep_less_than_none(self, path):
        with pytest.raises(ValueError, match="expected keep to be an int of 0 or more, found -1"):
            filled().save(path, keep=-1)


class TestCapacity:
    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("capacity", [1, 4, 10, 25])
    def test_rows_below_the_new_one_stay(self, path, backend, capacity):
        store = filled(backend)
        store.save(path)
        store.set([1, 9], batch([51, 59]))
        store.save(path)
        found = load(path, backend=backend, device="cpu", capacity=capacity, like=SPEC)
        assert len(found) == capacity
        model = [0, 51, 2, 3, 4, 5, 6, 7, 8, 59][:capacity]
        assert_same(found.get(range(len(model))), batch(model))
        found.save(path)
        assert_same(load(path, like=SPEC).get(...), found.get(...))

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_rows_can_be_moved(self, path, backend):
        store = filled(backend)
        store.save(path)
        store.set([1, 9], batch([51, 59]))
        store.save(path)
        found = Storage(SPEC, 3, backend=backend, device="cpu")
        with progress.Progress("loading", 0, None) as bar:
            Snapshot(path).fill(found, "items", bar=bar, moved=lambda rows: rows - 7)
        assert_same(found.get(...), batch([7, 8, 59]))


class TestProgress:
    def test_a_callback_is_told_of_all_bytes(self, path):
        told: list[tuple[int, int]] = []
        store = filled()
        store.save(path, progress=lambda *numbers: told.append(numbers))
        assert told[-1] == (store.nbytes, store.nbytes)
        assert told == sorted(told)
        told.clear()
        load(path, progress=lambda *numbers: told.append(numbers))
        assert told[-1] == (store.nbytes, store.nbytes)

    @pytest.mark.parametrize("installed", [True, False])
    def test_a_bar_where_rich_is_installed(self, path, monkeypatch, capsys, installed):
        if installed:
            pytest.importorskip("rich")
        else:
            monkeypatch.setitem(sys.modules, "rich.console", None)
        monkeypatch.setattr(progress, "_PATIENCE", -1.0)
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
        monkeypatch.setenv("TERM", "xterm")
        store = filled()
        store.save(path)
        assert ("saving" in capsys.readouterr().err) == installed
        assert_same(load(path, like=store).get(...), store.get(...))
        assert ("loading" in capsys.readouterr().err) == installed

    @pytest.mark.parametrize("stderr", [None, types.SimpleNamespace(write=print, flush=print)], ids=["none", "other"])
    def test_a_program_without_a_terminal(self, path, monkeypatch, stderr):
        monkeypatch.setattr(sys, "stderr", stderr)
        store = filled()
        store.save(path)
        assert_same(load(path, like=store).get(...), store.get(...))


class TestSaving:
    def test_refuses_a_directory_that_holds_something_else(self, path):
        path.mkdir()
        (path / "000001.thesis.npy").write_text("years of work")
        with pytest.raises(SnapshotError, match="expected an empty directory or a snapshot, found 000001.thesis.npy"):
            filled().save(path)
        assert (path / "000001.thesis.npy").read_text() == "years of work"

    def test_takes_an_empty_directory_and_a_text(self, path):
        path.mkdir()
        filled().save(str(path))
        assert_same(load(str(path), like=SPEC).get(...), batch(np.arange(CAPACITY)))

    def test_leaves_alone_what_is_none_of_its_own(self, path):
        filled().save(path)
        (path / "notes.txt").write_text("mine")
        filled().save(path)
        assert (path / "notes.txt").read_text() == "mine"

    def test_refuses_to_write_over_a_damaged_snapshot(self, path):
        filled().save(path)
        (path / "manifest.json").write_text("{}")
        with pytest.raises(SnapshotError, match="manifest.json: this is no manifest of a snapshot"):
            filled().save(path)
        assert len(list(path.glob("*.npy"))) == 5

    def test_makes_the_directories_above(self, path, monkeypatch):
        synced = []
        monkeypatch.setattr(files, "sync_directory", lambda directory: synced.append(directory))
        filled().save(path / "far" / "below")
        assert synced[:3] == [path.parent, path, path / "far"]
        assert_same(load(path / "far" / "below", like=SPEC).get(...), batch(np.arange(CAPACITY)))

    def test_refuses_a_path_below_a_file(self, path):
        path.write_text("mine")
        with pytest.raises(NotADirectoryError):
            filled().save(path / "below")
        assert path.read_text() == "mine"

    def test_refuses_a_state_that_is_no_json(self, path):
        for state in ({"x": np.zeros(3)}, {"x": float("nan")}):
            with pytest.raises(ValueError, match="^expected a state that JSON can hold, found another: .* JSON"):
                save_snapshot(path, {"items": filled()}, state=state)
        assert not path.exists()

    def test_takes_a_name_that_no_file_can_have(self, path):
        save_snapshot(path, {"é": filled()})
        assert_same(Snapshot(path).storage("é", like=SPEC).get(...), batch(np.arange(CAPACITY)))

    @pytest.mark.parametrize("before", [False, True], ids=["the first one", "one more"])
    def test_at_the_end_of_the_program(self, tmp_path, before):
        """When Python starts no threads any more."""
        program = """
        import atexit, sys
        import numpy as np
        from anystore import ArraySpec, Storage, load

        path, before = sys.argv[1], sys.argv[2] == "True"
        store = Storage(ArraySpec((1 << 20,), "uint8"), 10)
        store.set(..., np.ones(1 << 20, np.uint8))
        if before:
            store.save(path)

        def save():
            store.set([3, 4], np.full(1 << 20, 2, np.uint8))
            store.save(path)
            found = load(path).get(...)
            assert found[:, 0].tolist() == found[:, -1].tolist() == [1, 1, 1, 2, 2, 1, 1, 1, 1, 1]
            print("saved")

        atexit.register(save)
        """
        command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "snapshot"), str(before)]
        root = Path(__file__).parents[1]
        done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=root)
        assert (done.stdout, done.stderr) == ("saved\n", "")

    def test_a_load_while_others_save(self, path):
        """Each load sees one version, whole, whatever goes on meanwhile."""
        store, done = filled(), threading.Event()
        store.save(path)

        def save_on() -> None:
            for stamp in range(100):
                store.set(..., batch(np.full(CAPACITY, stamp)))
                store.save(path)
            done.set()

        thread = threading.Thread(target=save_on)
        thread.start()
        stamps = []
        while not done.is_set() or not stamps:
            found = load(path, like=SPEC)
            stamps.append(int(found.get(5)["action"][0]))
            if stamps[-1] != 5 or found.get(4)["action"][0] != 4:
                assert_same(found.get(...), batch(np.full(CAPACITY, stamps[-1])))
        thread.join()
        assert_same(load(path, like=SPEC).get(...), store.get(...))

    @pytest.mark.parametrize("backend", ["numpy", "torch"])
    def test_memory_does_not_follow_the_size_of_the_store(self, path, backend):
        if backend == "torch":
            pytest.importorskip("torch")
        rows = 100_000
        spec = {"big": ArraySpec((1000,), "uint8"), "small": ArraySpec((), "float32")}
        store = Storage(spec, rows, backend=backend, device="cpu")
        for start in range(0, rows, 10_000):
            big = np.full((10_000, 1000), start % 251, np.uint8)
            store.set(range(start, start + 10_000), {"big": big, "small": np.ones(10_000, np.float32)})
        part = {"big": np.ones((rows // 3, 1000), np.uint8), "small": np.ones(rows // 3, np.float32)}
        tracemalloc.start()
        try:
            store.save(path)
            assert tracemalloc.get_traced_memory()[1] < 32 << 20
            tracemalloc.stop()
            store.set(np.arange(rows // 3) * 3, part)
            tracemalloc.start()
            store.save(path)
            assert tracemalloc.get_traced_memory()[1] < 32 << 20
            tracemalloc.reset_peak()
            found = load(path, backend=backend)  # whose own memory is mapped, and not counted
            assert tracemalloc.get_traced_memory()[1] < 32 << 20
        finally:
            tracemalloc.stop()
        assert (to_numpy(found.get([1, 3])["big"]) == to_numpy(store.get([1, 3])["big"])).all()
        assert host(found.get(rows - 1)["small"]) == 1
