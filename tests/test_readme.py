"""What the README and the docstrings show, works."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

import anystore

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_every_block_of_the_readme_runs(capsys):
    """One after the other in one namespace, as a reader would type them."""
    assert len(BLOCKS) >= 4
    namespace: dict[str, object] = {"__name__": "readme"}
    for block in BLOCKS:
        exec(compile(block, str(README), "exec"), namespace)
    assert "total" in capsys.readouterr().out


PACKAGE = Path(anystore.__file__).parent
NEEDS_MORE = {"tf", "replay.gymnasium"}
"""What the examples of these need is not always there; they run with the other tests of what they show."""
WITH_EXAMPLES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if ">>>" in path.read_text(encoding="utf-8")
}


@pytest.mark.parametrize("name", sorted(WITH_EXAMPLES - NEEDS_MORE))
def test_the_examples_of_the_docstrings_run(name):
    outcome = doctest.testmod(importlib.import_module(f"anystore.{name}"))
    assert outcome.attempted
    assert not outcome.failed
