from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import pytest

import anystore
from anystore import ArraySpec, BackendInfo, Storage, available_backends
from anystore.__main__ import main

SPEC = {"obs": {"image": {"shape": [84, 84, 4], "dtype": "uint8"}}, "rewards": [{"shape": [], "dtype": "float32"}]}
TABLE = """\
1,000 rows
  obs/image  (84, 84, 4)  uint8    28,224,000 bytes
  rewards/0  ()           float32       4,000 bytes
  total                            28,228,000 bytes
"""


class TestBackends:
    def test_shows_each_with_a_round_trip(self, capsys):
        assert main([]) == 0
        out = capsys.readouterr().out
        assert out.startswith(f"anystore {anystore.__version__}, Python {sys.version.split()[0]}\n")
        for info in available_backends():
            assert info.name in out
            if not info.usable:
                assert info.reason in out
        assert out.count("round trip good on") == sum(info.usable for info in available_backends())

    @pytest.mark.parametrize("what", ["wrong", "broken"])
    def test_says_what_fails(self, capsys, monkeypatch, what):
        def get(self, idx):
            if what == "broken":
                raise RuntimeError("no such thing")
            return {"obs": self.buffers["obs"][:256] + 1, "action": self.buffers["action"][:256]}

        monkeypatch.setattr(anystore.Storage, "get", get)
        monkeypatch.setattr(
            "anystore.__main__.available_backends", lambda: [BackendInfo("numpy", True, "", "2", ("cpu",))]
        )
        assert main([]) == 1
        expected = {"wrong": "FAILED on cpu: what was read", "broken": "FAILED: RuntimeError: no such thing"}
        assert expected[what] in capsys.readouterr().out


class TestPlan:
    def test_reads_json_from_anywhere(self, capsys, monkeypatch, tmp_path):
        path = tmp_path / "spec.json"
        path.write_text(json.dumps(SPEC))
        monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(SPEC)))
        for spec in (str(path), json.dumps(SPEC), "-"):
            assert main(["plan", spec, "1_000"]) == 0
            assert capsys.readouterr().out == TABLE

    def test_reads_a_gymnasium_environment(self, capsys):
        pytest.importorskip("gymnasium")
        assert main(["plan", "CartPole-v1", "1,000"]) == 0
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert ["obs", "(4,)", "float32", "16,000", "bytes"] in lines
        assert ["action", "()", "int32", "4,000", "bytes"] in lines
        assert lines[-1] == ["total", "42,000", "bytes"]

    @pytest.mark.parametrize(
        ("spec", "text"),
        [
            ("{", "expected JSON"),
            ('{"a": [1, 3]}', "a/0: expected {'shape': [...], 'dtype': '...'} at each leaf, found 1"),
            ('{"a": {"shape": [-1], "dtype": "int8"}}', "a: expected a shape without negative lengths"),
            ('[{"b": {"shape": [1], "dtype": "real"}}]', "0/b: 'real' is not a dtype"),
            ('{"shape": [1], "dtype": ","}', "the item: ',' is not a dtype"),
            ("[" * 5000 + "]" * 5000, "expected JSON of a spec, found one that is nested too deeply"),
            ('{"shape": [1], "dtype": "int8", "unit": "m"}', "the item: expected a shape, a dtype and perhaps a name"),
            ("[]", "expected a nest with at least one ArraySpec"),
            ("nowhere.json", "No such file"),
        ],
    )
    def test_says_what_is_wrong(self, capsys, spec, text):
        assert main(["plan", spec, "10"]) == 2
        said = capsys.readouterr()
        assert text in said.err
        assert said.out == ""

    def test_says_that_an_environment_is_none(self, capsys):
        pytest.importorskip("gymnasium")
        assert main(["plan", "NoSuchEnv-v0", "10"]) == 2
        assert "'NoSuchEnv-v0' is neither a file nor the id of a Gymnasium environment" in capsys.readouterr().err

    @pytest.mark.parametrize("capacity", ["0", "-3", "many"])
    def test_refuses_what_is_no_capacity(self, capsys, capacity):
        with pytest.raises(SystemExit) as stop:
            main(["plan", "{}", capacity] if capacity[0] != "-" else ["plan", "{}", "--", capacity])
        assert stop.value.code == 2
        assert "capacity" in capsys.readouterr().err


def run(*arguments, **options):
    return subprocess.run([sys.executable, "-m", "anystore", *arguments], capture_output=True, text=True, **options)


def test_a_terminal_that_has_not_all_letters(tmp_path):
    Storage({"h\u00f6he": ArraySpec((), "float32")}, 4).save(tmp_path / "store")
    found = run("inspect", str(tmp_path / "store"), env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert found.returncode == 0
    assert r"h\xf6he" in found.stdout


def test_who_reads_has_seen_enough():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "anystore", "plan", '{"shape": [4], "dtype": "float32"}', "10"]
    with os.fdopen(write) as gone:
        ended = subprocess.run(command, stdout=gone, stderr=subprocess.PIPE, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (1, "")
