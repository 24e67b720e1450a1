from __future__ import annotations

import os
import subprocess
import sys

import pytest

from anystore import ArraySpec, Storage, plan
from anystore.backends.base import Backend, host_memory

SPEC = {"obs": ArraySpec((84, 84, 4), "uint8"), "reward": ArraySpec((), "float32")}


def test_gives_what_the_buffers_take():
    planned = plan(SPEC, 50)
    store = Storage(SPEC, 50)
    assert planned.nbytes == store.nbytes == sum(buffer.nbytes for buffer in store.buffers.values())
    assert planned.leaf_nbytes == {"obs": 50 * 84 * 84 * 4, "reward": 200}
    assert planned.leaves == SPEC


def test_prints_a_table():
    assert str(plan(SPEC, 100_000)).splitlines() == [
        "  obs     (84, 84, 4)  uint8    2,822,400,000 bytes",
        "  reward  ()           float32        400,000 bytes",
        "  total                         2,822,800,000 bytes",
    ]
    assert str(plan(ArraySpec((), "int8"), 2)).splitlines()[0] == "  the item  ()  int8  2 bytes"


def test_refuses_what_is_no_spec_or_capacity():
    with pytest.raises(ValueError, match="^obs: expected an ArraySpec"):
        plan({"obs": 3}, 5)
    with pytest.raises(ValueError, match="expected capacity to be an int of 1 or more"):
        plan(SPEC, 0)


@pytest.mark.parametrize("capacity", [0, -1, 1.0, True, None, "10"])
def test_a_storage_refuses_what_is_no_capacity(capacity):
    with pytest.raises(ValueError, match="expected capacity to be an int of 1 or more, found"):
        Storage(SPEC, capacity)


def test_refuses_what_is_no_casting():
    with pytest.raises(ValueError, match="expected a casting among no, equiv, safe, same_kind, unsafe, found 'same'"):
        Storage(SPEC, 3, casting="same")


def test_warns_before_it_takes_more_than_is_free(monkeypatch):
    free = 1000
    monkeypatch.setattr(Backend, "free_memory", lambda self: free)
    with pytest.warns(
        RuntimeWarning, match=r"takes 2,822,800 bytes when it is full; 1,000 bytes are free on cpu"
    ) as caught:
        Storage(SPEC, 100)
    assert caught[0].filename == __file__
    with pytest.warns(RuntimeWarning, match="1,000 bytes are free"):
        store = Storage({"x": ArraySpec((), "int8")}, 1001)
    with pytest.warns(RuntimeWarning, match="1,000 bytes are free") as caught:
        store.resize(2000)
    assert caught[0].filename == __file__


def test_free_memory_is_some_of_what_there_is():
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert there / 1000 < host_memory() <= there


def test_what_cannot_be_allocated_is_named(monkeypatch):
    monkeypatch.setattr(Backend, "free_memory", lambda self: None)
    with pytest.raises(MemoryError, match=r"^x/y: .* bytes"):
        Storage({"x": {"y": ArraySpec((2**40,), "float64")}}, 2**20)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("backend", ["numpy", "torch", "array_api_strict"])
def test_memory_of_rows_never_written_is_not_committed(backend):
    pytest.importorskip(backend)
    program = f"""
from anystore import ArraySpec, Storage
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
Storage(ArraySpec((), "uint8"), 10, backend={backend!r}).set(3, 1)
before = resident()
store = Storage({{"x": ArraySpec((2**20,), "uint8"), "y": ArraySpec((2**18,), "float32")}}, 512, backend={backend!r})
store.set(0, store.get(1))
used = resident() - before
assert used < 64 * 2**20, used
"""
    subprocess.run([sys.executable, "-c", program], check=True)
