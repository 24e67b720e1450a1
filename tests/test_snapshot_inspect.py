from __future__ import annotations

import json

import pytest

import anystore
from anystore import ArraySpec, Storage
from anystore.__main__ import main
from anystore.snapshot.reader import Snapshot
from anystore.snapshot.report import report
from tests.test_snapshot_damage import make

TEXT = """{path}: storage, version 2, by anystore {version}
  older versions: 1
  items: 6 of 6 rows, saved in 2 layers of 6, 2
    a  (2,)  |u1  12 bytes
    b  ()    <f4  24 bytes
  arrays
    tree  (3,)  <f8
  state: x
  6 files with 88 bytes; sizes and headers are good
"""


@pytest.fixture
def path(tmp_path):
    make(tmp_path / "snapshot")
    return tmp_path / "snapshot"


def test_for_people(path, capsys):
    assert main(["inspect", str(path)]) == 0
    text = TEXT.format(path=path, version=anystore.__version__)
    assert capsys.readouterr().out == text
    assert main(["inspect", str(path), "--verify"]) == 0
    assert capsys.readouterr().out == text.replace("sizes and headers", "checksums")


def test_for_programs(path, capsys):
    assert main(["inspect", str(path), "--json", "--verify"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["storages"]["items"]["leaves"]["a"] == {"shape": [2], "dtype": "|u1", "nbytes": 12}
    assert (found["kind"], found["version"], found["older_versions"]) == ("storage", 2, [1])
    assert (found["state"], found["checked"]) == ({"x": [2, "é"]}, "checksums")


def test_what_is_damaged(path, capsys):
    (name,) = (each.name for each in path.glob("*.rows.npy"))
    data = (path / name).read_bytes()
    (path / name).write_bytes(data[:-1] + b"\1")
    assert main(["inspect", str(path)]) == 0
    capsys.readouterr()
    assert main(["inspect", str(path), "--verify", "--json"]) == 1
    printed = capsys.readouterr()
    assert f"{name}: expected the checksum" in json.loads(printed.out)["error"]
    assert f"anystore inspect: {path / name}: expected the checksum" in printed.err
    (path / name).write_bytes(data[:-1])
    assert main(["inspect", str(path)]) == 1
    assert f"{name}: expected 144 bytes, found 143" in capsys.readouterr().err


def test_what_is_none(tmp_path, capsys):
    assert main(["inspect", str(tmp_path)]) == 1
    assert "there is no such file, so no snapshot" in capsys.readouterr().err


def test_a_memory_mapped_storage(tmp_path, capsys):
    Storage(ArraySpec((3,), "bfloat16"), 5, directory=tmp_path / "store")
    assert main(["inspect", str(tmp_path / "store"), "--verify"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path / 'store'}: mapped, version 1, by anystore {anystore.__version__}"
    assert lines[1:3] == ["  items: 5 of 5 rows", "    the item  (3,)  bfloat16  30 bytes"]
    assert lines[-1].endswith("1 files with 30 bytes; sizes and headers are good")


def test_one_that_is_saved_again_meanwhile(path, monkeypatch):
    store, check = anystore.load(path), Snapshot.check

    def late(snapshot):
        monkeypatch.undo()
        store.save(path)
        check(snapshot)

    before = report(path)
    monkeypatch.setattr(Snapshot, "check", late)
    assert report(path)["version"] > before["version"]
