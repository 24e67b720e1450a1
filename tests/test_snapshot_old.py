"""Snapshots as older versions wrote them still load: those in tests/data, in a directory for each format version.

``python -m tests.test_snapshot_old`` writes those of the present format, when it is new.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anystore import ArraySpec, Storage, load
from anystore.replay import Prioritized, ReplayBuffer
from anystore.snapshot import Snapshot
from anystore.snapshot.manifest import VERSION
from tests.items import SPEC, assert_same, batch

DATA = Path(__file__).parent / "data"
FORMATS = sorted(DATA.glob("snapshot-*"))
DTYPES = ("bool", "uint8", "int64", "float16", "float32", ">f8", "complex64", "U3", "S2", "M8[ms]")
REPLAY = {
    "obs": ArraySpec((2,), "float32"),
    "reward": ArraySpec((), "float32"),
    "next_obs": ArraySpec((2,), "float32"),
    "terminated": ArraySpec((), "bool"),
}


def values(dtype: str) -> Any:
    return np.arange(6).reshape(3, 2).astype(ArraySpec((), dtype).dtype)


def walk(steps: int) -> dict[str, Any]:
    obs = np.arange(2 * steps, dtype=np.float32).reshape(steps, 2)
    return {
        "obs": obs,
        "reward": obs[:, 0] / 2,
        "next_obs": obs + 2,
        "terminated": np.arange(steps) % 5 == 4,
    }


def write(directory: Path) -> None:
    """Those of the present format."""
    store = Storage(SPEC, 20)
    store.set(range(8), batch(np.arange(8)))
    store.save(directory / "layers")
    store.set([1, 9], batch([51, 59]))
    store.save(directory / "layers", keep=1)
    dtypes = Storage({name: ArraySpec((2,), name) for name in DTYPES}, 3, casting="unsafe")
    dtypes.set(..., {name: values(name) for name in DTYPES})
    dtypes.save(directory / "dtypes")
    extension = Storage(ArraySpec((2,), "bfloat16"), 3)
    extension.set(..., values("bfloat16"))
    extension.save(directory / "bfloat16")
    Storage(SPEC, 4, directory=directory / "mapped").set([1, 2], batch([1, 2]))
    buffer = ReplayBuffer(REPLAY, 12, shared={"next_obs": "obs"}, sampler=Prioritized(), seed=0)
    buffer.extend(walk(17))
    buffer.update_priorities(np.arange(8, 12), np.arange(4.0))
    buffer.save(directory / "replay")


def test_those_of_the_present_format_are_there():
    assert DATA / f"snapshot-{VERSION}" in FORMATS


@pytest.mark.parametrize("old", FORMATS, ids=lambda path: path.name)
class TestOld:
    def test_layers_and_versions(self, old, tmp_path):
        found = load(old / "layers", like=SPEC)
        assert_same(found.get([*range(8), 9]), batch([0, 51, 2, 3, 4, 5, 6, 7, 59]))
        assert not found.get([8, *range(10, 20)])["obs"]["image"].any()
        assert_same(load(old / "layers", version=1, like=SPEC).get(range(8)), batch(np.arange(8)))
        assert len(found) == 20
        copy = shutil.copytree(old / "layers", tmp_path / "copy")
        found.set(3, batch(33))
        found.save(copy)
        assert_same(load(copy, like=SPEC).get([3, 9]), batch([33, 59]))

    def test_dtypes(self, old):
        found = load(old / "dtypes")
        assert found.casting == "unsafe"
        for name in DTYPES:
            assert found.data_spec[name] == ArraySpec((2,), name)
            assert found.get(...)[name].tobytes() == values(name).tobytes()

    def test_bfloat16(self, old):
        pytest.importorskip("ml_dtypes")
        assert load(old / "bfloat16").get(...).tobytes() == values("bfloat16").tobytes()

    def test_mapped(self, old, tmp_path):
        copy = shutil.copytree(old / "mapped", tmp_path / "copy")
        store = Storage(SPEC, 4, directory=copy)
        assert_same(store.get([1, 2]), batch([1, 2]))
        assert_same(load(old / "mapped", like=SPEC).get([1, 2]), batch([1, 2]))

    def test_replay(self, old):
        found = load(old / "replay")
        assert (len(found), found.capacity, found.total_added) == (12, 12, 17)
        sample = found.sample(64)
        expected = walk(17)
        for name, leaf in expected.items():
            assert (sample.items[name] == leaf[sample.rows]).all()
        assert found.priorities[3:7].round(5).tolist() == [0, 1, 2, 3]

    def test_every_checksum(self, old):
        for each in old.iterdir():
            Snapshot(each).verify()


if __name__ == "__main__":
    place = DATA / f"snapshot-{VERSION}"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    write(place)
    for lock in place.glob("*/anystore.lock"):
        lock.unlink()
