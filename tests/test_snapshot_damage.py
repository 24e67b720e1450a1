"""Files that are not what they were, or never were what they say: a clear error that names the file."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anystore import ArraySpec, SnapshotError, Storage, load, storage
from anystore.snapshot import Snapshot, files, npy, save_snapshot
from anystore.snapshot.manifest import MANIFEST_BYTES

CAPACITY = 6


@pytest.fixture(autouse=True)
def _unsynced(monkeypatch):
    monkeypatch.setattr(files, "fsync", lambda fd: None)
    monkeypatch.setattr(files, "sync_directory", lambda path: None)


def make(path: Path) -> Storage:
    """A snapshot with a base, a layer of listed rows, an array, and an older version."""
    store = Storage({"a": ArraySpec((2,), "uint8"), "b": ArraySpec((), "float32")}, CAPACITY)
    store.set(..., {"a": np.arange(12, dtype=np.uint8).reshape(6, 2), "b": np.arange(6, dtype=np.float32)})
    arrays = {"tree": np.arange(3.0)}
    save_snapshot(path, {"items": store}, arrays=arrays, state={"x": [1, "é"]})
    store.set([0, 4], {"a": np.full((2, 2), 77, np.uint8), "b": np.full(2, 7, np.float32)})
    save_snapshot(path, {"items": store}, arrays=arrays, state={"x": [2, "é"]}, keep=1)
    return store


def content(path: Path, **options: Any) -> list[Any]:
    """All that can be had of a snapshot."""
    snapshot = Snapshot(path)
    found = [leaf.tolist() for leaf in load(path, **options).get(...).values()]
    return [*found, snapshot.arrays()["tree"].tolist(), snapshot.state]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("damage") / "snapshot"
    make(path)
    return path


@pytest.fixture
def path(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "snapshot")


def named(original: Path) -> list[str]:
    """The files of the newest version."""
    return [*sorted(Snapshot(original).manifest.names()), "manifest.json"]


class TestDamage:
    def test_every_byte_flipped(self, original, path):
        expected, count = content(original), 0
        for name in named(original):
            good = (original / name).read_bytes()
            for position in range(len(good)):
                for change in (0xFF, 1 << position % 8):
                    flipped = bytearray(good)
                    flipped[position] ^= change
                    (path / name).write_bytes(flipped)
                    with pytest.raises(SnapshotError, match=re.escape(name)):
                        content(path)
                    count += 1
            (path / name).write_bytes(good)
        assert content(path) == expected
        assert count > 4000

    def test_every_length_truncated_and_more(self, original, path):
        for name in named(original):
            good = (original / name).read_bytes()
            for length in range(len(good)):
                (path / name).write_bytes(good[:length])
                with pytest.raises(SnapshotError, match=re.escape(name)):
                    content(path)
            (path / name).write_bytes(good + b"\0")
            with pytest.raises(SnapshotError, match=re.escape(name)):
                content(path)
            (path / name).write_bytes(good)

    def test_what_is_wrong_with_a_file_is_found_before_memory_is_taken(self, original, path, monkeypatch):
        monkeypatch.setattr(storage.Storage, "_allocate", lambda *arguments: pytest.fail("memory was taken"))
        for name in named(original):
            good = (original / name).read_bytes()
            for bad in (good[:-1], good + b"\0", good[:70] + b"9" + good[71:]):
                (path / name).write_bytes(bad)
                with pytest.raises(SnapshotError, match=re.escape(name)):
                    load(path)
            (path / name).write_bytes(good)

    def test_a_missing_file(self, original, path):
        for name in named(original):
            (path / name).rename(path / "gone")
            with pytest.raises(SnapshotError, match=f"{re.escape(name)}: there is no such file"):
                load(path)
            with pytest.raises((SnapshotError, FileNotFoundError), match=re.escape(name)):
                Snapshot(path).verify()
            (path / "gone").rename(path / name)

    @pytest.mark.parametrize("kind", ["link", "directory", "pipe", "device"])
    def test_what_is_no_regular_file(self, original, path, kind):
        for name in named(original):
            (path / name).unlink()
            if kind == "link":
                (path / name).symlink_to(original / name)
            elif kind == "directory":
                (path / name).mkdir()
            elif kind == "pipe":
                os.mkfifo(path / name)
            else:
                (path / name).symlink_to("/dev/zero")
            with pytest.raises(SnapshotError, match=f"{re.escape(name)}: expected a regular file"):
                content(path)
            (path / name).rmdir() if kind == "directory" else (path / name).unlink()
            shutil.copy(original / name, path / name)

    def test_a_damaged_older_version_does_no_harm_to_the_newest(self, original, path):
        (path / "manifest-000001.json").write_text("{}")
        assert content(path) == content(original)
        with pytest.raises(SnapshotError, match="manifest-000001.json: this is no manifest"):
            load(path, version=1)

    def test_verify_reads_every_file(self, original, path):
        Snapshot(path).verify()
        for name in named(original)[:-1]:
            good = (original / name).read_bytes()
            (path / name).write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
            with pytest.raises(SnapshotError, match=f"{re.escape(name)}: expected the checksum"):
                Snapshot(path).verify()
            (path / name).write_bytes(good)

    def test_no_snapshot_at_all(self, tmp_path):
        (tmp_path / "file").write_text("x")
        for where in (tmp_path / "nowhere", tmp_path, tmp_path / "file"):
            with pytest.raises(SnapshotError, match="manifest.json: there is no such file, so no snapshot"):
                load(where)

    def test_it_is_a_value_error(self):
        assert issubclass(SnapshotError, ValueError)

    def test_a_file_cut_while_it_is_read(self, path, monkeypatch):
        check = npy.NpyFile._check

        def check_and_cut(self: npy.NpyFile, fd: int) -> None:
            check(self, fd)
            os.truncate(self.path, self.offset)

        monkeypatch.setattr(npy.NpyFile, "_check", check_and_cut)
        with pytest.raises(SnapshotError, match=r"\.npy: (ended while it was read|expected \d+ bytes, found)"):
            load(path)


def forge(path: Path, change: Any) -> None:
    """Change the manifest, and give it the checksum that it then has."""
    node = json.loads((path / "manifest.json").read_text())
    node = change(node) or node
    del node["crc32"]
    text = json.dumps(node, indent=1).encode()
    head, rest = b'{\n"crc32": "', b'",\n' + text.removeprefix(b"{\n") + b"\n"
    (path / "manifest.json").write_bytes(head + f"{zlib.crc32(head + rest):08x}".encode() + rest)


def item(node: Any) -> Any:
    return node["storages"]["items"]


def leaf_file(node: Any) -> Any:
    return item(node)["layers"][0]["leaves"]["a"]


class TestForged:
    """Manifests whose checksum is right."""

    def test_an_unchanged_one_is_good(self, original, path):
        forge(path, lambda node: None)
        assert content(path) == content(original)

    @pytest.mark.parametrize(
        "name",
        [
            "../secret.npy",
            "/etc/passwd",
            "000001.x/../../y.npy",
            "..",
            "",
            "manifest.json",
            "000001.a\0.npy",
            "000001.items.a.npy/",
            "anystore.lock",
            "000001." + "x" * 300 + ".npy",
            ".npy",
            7,
            None,
            ["000001.items.a.npy"],
        ],
        ids=repr,
    )
    def test_names_lead_nowhere_else(self, path, name):
        forge(path, lambda node: leaf_file(node).update(file=name))
        with pytest.raises(SnapshotError, match="manifest.json: expected (the name of a file|file to be of)"):
            load(path)

    @pytest.mark.parametrize("version", [2, 99, 0, -1, "1", None, 1.5, True])
    def test_another_format_version(self, path, version):
        forge(path, lambda node: node.update(format_version=version))
        with pytest.raises(SnapshotError, match="manifest.json: it is of format version .*a newer one is needed"):
            load(path)

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            (lambda node: node.update(format="another"), "this is no manifest"),
            (lambda node: node.update(extra=1), "expected an object with id"),
            (lambda node: node.pop("state"), "expected an object with id"),
            (lambda node: node.update(id="../../x"), "expected an id"),
            (lambda node: node.update(kind="pickle"), "expected an id, a version and a kind"),
            (lambda node: node.update(kind="mapped"), None),
            (lambda node: item(node).update(capacity=2**62), "expected a capacity"),
            (lambda node: item(node).update(capacity=2**47), "expected a capacity"),
            (lambda node: item(node).update(capacity=0), "expected a capacity"),
            (lambda node: item(node).update(capacity=True), "expected capacity to be of type int, found True"),
            (lambda node: item(node).update(casting="eval"), "expected a capacity and a casting"),
            (lambda node: item(node).update(rows=7), "expected at most 6 rows"),
            (lambda node: item(node).update(rows=3), "expected some of 3 rows"),
            (lambda node: item(node)["layers"][0].update(count=5), "expected 138 bytes, found 140"),
            (lambda node: item(node)["layers"][0].update(count=-1), "expected some of 6 rows"),
            (lambda node: item(node)["layers"][0].update(start=1), "expected some of 6 rows"),
            (lambda node: item(node)["layers"][0].update(start=None), "expected some of 6 rows"),
            (lambda node: item(node)["layers"][0]["leaves"].pop("a"), "expected a file for each of"),
            (lambda node: item(node)["layers"][1].update(index=leaf_file(node)), "expected 144 bytes, found 140"),
            (lambda node: item(node)["spec"]["children"][0].update(shape=[2**40]), "expected 6,597,069,766,784 bytes"),
            (lambda node: item(node)["spec"]["children"][0].update(shape=[2**90]), "expected a length"),
            (lambda node: item(node)["spec"]["children"][0].update(shape=[-2]), "expected a length"),
            (lambda node: item(node)["spec"]["children"][0].update(shape=[2] * 61), "expected a shape"),
            (lambda node: item(node)["spec"]["children"][0].update(shape=[2, 1]), "expected the header of an array"),
            (lambda node: item(node)["spec"]["children"][0].update(dtype="|O"), "expected a dtype"),
            (lambda node: item(node)["spec"]["children"][0].update(dtype="object"), "expected a dtype"),
            (lambda node: item(node)["spec"]["children"][0].update(dtype="|i1"), "expected the header of an array"),
            (lambda node: item(node)["spec"]["children"][0].update(dtype="f4,f4"), "expected a dtype"),
            (lambda node: item(node)["spec"]["children"][0].update(dtype=[["a", "|O"]]), "expected a dtype"),
            (lambda node: item(node)["spec"]["children"][0].update(dtype=[["a", "u1", [2**60]]]), "expected a dtype"),
            (lambda node: item(node)["spec"]["children"][0].update(dtype="finfo"), "expected a dtype"),
            (lambda node: item(node)["spec"].update(kind="eval"), "expected the kind of a node"),
            (lambda node: item(node)["spec"].update(keys=["a", "a"]), "expected a key of its own"),
            (lambda node: item(node)["spec"].update(keys=["a"]), "expected as many keys as children"),
            (lambda node: item(node)["spec"].update(keys=["a", {}]), "expected a key"),
            (lambda node: item(node)["spec"].update(**{"class": "os.system"}), None),
            (lambda node: node["arrays"]["tree"].update(shape=[2**45]), "expected 281,474,976,710,784 bytes"),
            (lambda node: node["arrays"]["tree"].update(shape=["3"]), "expected a shape"),
            (lambda node: node["arrays"]["tree"].update(dtype="|O"), "expected a dtype"),
            (lambda node: leaf_file(node).update(crc32="zz"), "expected a checksum"),
            (lambda node: leaf_file(node).update(crc32="00000000"), "expected the checksum 00000000, found"),
        ],
    )
    def test_each_word_is_checked(self, original, path, change, text):
        forge(path, lambda node: change(node) and None)
        if text is None:
            assert content(path) == content(original)
            return
        with pytest.raises(SnapshotError, match=text):
            load(path)

    def test_rows_that_are_out_of_order_or_of_range(self, path):
        (name,) = (each.name for each in path.glob("*.rows.npy"))
        good = (path / name).read_bytes()
        for rows in ([4, 0], [0, 0], [-1, 4], [0, 6], [0, 2**62], [-(2**63), 4]):
            data = good[:128] + np.array(rows, np.int64).tobytes()
            (path / name).write_bytes(data)
            crc32 = f"{zlib.crc32(data):08x}"
            forge(path, lambda node, crc32=crc32: item(node)["layers"][1]["index"].update(crc32=crc32))
            for action in (load, lambda where: Snapshot(where).verify()):
                with pytest.raises(SnapshotError, match=f"{name}: expected rows in ascending order below 6"):
                    action(path)

    def test_text_that_is_no_manifest(self, path):
        head = b'{\n"crc32": "'
        for text in (b"", b"{}", b"[]", b"null", b"\xff\xfe", head, b"[" * 100_000, b'{"a":' * 50_000, b"1" * 5000):
            rest = b'",\n "format": ' + text + b"\n}"
            for data in (text, head + f"{zlib.crc32(head + rest):08x}".encode() + rest):
                (path / "manifest.json").write_bytes(data)
                with pytest.raises(SnapshotError, match="manifest.json: "):
                    load(path)

    def test_deep_nests(self, path):
        def deepen(node: Any) -> None:
            for _ in range(400):
                item(node)["spec"] = {"kind": "list", "keys": [0], "children": [item(node)["spec"]]}

        forge(path, deepen)
        with pytest.raises(SnapshotError, match="expected the description of a nest"):
            load(path)

    def test_a_huge_manifest(self, path):
        os.truncate(path / "manifest.json", MANIFEST_BYTES + 1)
        with pytest.raises(SnapshotError, match="expected a manifest of less than"):
            load(path)

    def test_a_file_that_holds_a_pickle(self, path, monkeypatch):
        monkeypatch.setattr(pickle, "loads", lambda *_: pytest.fail("unpickled"))
        monkeypatch.setattr(pickle, "load", lambda *_, **__: pytest.fail("unpickled"))
        name = json.loads((path / "manifest.json").read_text())["arrays"]["tree"]["file"]["file"]
        np.save(path / name, np.array([{}, 1, "x"], dtype=object), allow_pickle=True)
        with pytest.raises(SnapshotError, match=name):
            load(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from([2**31, 2**63]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def places(node: Any) -> list[tuple[Any, Any]]:
    """Every place in parsed JSON: a container and a key."""
    keys = node.keys() if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    return [(node, key) for key in keys] + [place for key in keys for place in places(node[key])]


@settings(max_examples=600, deadline=None)
@given(data=st.data())
@pytest.mark.filterwarnings("ignore:this storage takes")
def test_any_manifest_is_refused_or_read(original: Path, tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    path = original.parent / "fuzzed"
    if not path.exists():
        shutil.copytree(original, path)

    def change(node: Any) -> None:
        node.pop("written_by")
        for _ in range(data.draw(st.integers(1, 3))):
            found = [place for place in places(node) if place[1] != "crc32" or place[0] is not node]
            container, key = data.draw(st.sampled_from(found), label="place")
            other, other_key = data.draw(st.sampled_from(found), label="other")
            action = data.draw(st.sampled_from(["replace", "delete", "copy", "nudge"]))
            if action == "delete":
                del container[key]
            elif action == "copy":
                container[key] = copy.deepcopy(other[other_key])
            elif action == "nudge" and isinstance(container[key], int):
                container[key] += data.draw(st.sampled_from([-1, 1, 2, 1000]))
            else:
                container[key] = data.draw(JSON)
        node["written_by"] = ""

    shutil.copy(original / "manifest.json", path / "manifest.json")
    forge(path, change)
    try:
        Snapshot(path).arrays()
        load(path)
    except SnapshotError as error:
        named_file = str(path) in str(error)
    except MemoryError:  # for a capacity that is large, but not absurd
        named_file = True
    else:
        named_file = True
    assert named_file
