"""What cannot run here is named at the end of a run, however many processes it is of."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parent.parent / "conftest.py"


@pytest.mark.parametrize("processes", [[], ["-n", "2"]], ids=["one process", "several"])
def test_what_was_left_out_is_named(tmp_path, processes):
    shutil.copy(CONFTEST, tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")  # so that this is the root, wherever it is
    (tmp_path / "test_it.py").write_text(
        "class TestLeftOut:\n    obstacle = 'the tide'\n\n    def test(self): ...\n\n\ndef test(): ...\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *processes]
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert "1 passed" in out
    assert "NOT RUN HERE: TestLeftOut (the tide)" in out
