"""What only a GPU can show; that the kernels do on it what they do on a CPU comes first."""

from __future__ import annotations

import importlib.util
import sys
import threading
import time
import types
from typing import Any

import numpy as np
import optree
import pytest

from anystore import ArraySpec, Storage, available_backends, load, to_library
from anystore.convert import to_numpy
from anystore.leaf_table import Record, RowsOfLaunch, launches
from anystore.rows import KnownRows
from tests import reference
from tests.items import assert_same
from tests.test_kernels import WIDTHS, aligned, of_small, small

pytestmark = pytest.mark.gpu
DEVICES = next((info.devices for info in available_backends() if info.name == "cupy"), ())


def usable(library: str) -> Any:
    """The library, if it has a GPU here."""
    found = pytest.importorskip(library)
    if library == "torch" and not found.cuda.is_available():
        pytest.skip("torch has no GPU here")
    if library == "jax" and found.default_backend() != "gpu":
        pytest.skip("JAX has no GPU here")
    return found


class TestKernels:
    """Bit for bit what the reference does, on tables of the same layout."""

    backend, device = "cupy", "cuda:0"

    def on_device(self, array: Any, offset: int = 0) -> Any:
        import cupy

        memory = cupy.empty(array.nbytes + 1024, np.uint8)
        start = -memory.data.ptr % 512 + offset
        place = memory[start : start + array.nbytes]
        place.set(array.reshape(-1).view(np.uint8))
        return place

    @pytest.mark.parametrize("seed", range(40))
    def test_gather_and_scatter(self, seed):
        from anystore import kernels

        rng = np.random.default_rng(seed)
        capacity, count = int(rng.integers(1, 50)), int(rng.integers(0, 700))
        leaves = int(rng.choice([1, 3, 8, 40, 130]))
        widths = [int(width) for width in rng.choice(WIDTHS, leaves)]
        offsets = [int(offset) for offset in rng.choice([0, 0, 0, 1, 2, 4, 8], leaves)]
        here = [aligned(capacity * width, offset) for width, offset in zip(widths, offsets)]
        there = [self.on_device(buffer, offset) for buffer, offset in zip(here, offsets)]
        rows = rng.integers(0, capacity, count)
        last = {row: i for i, row in enumerate(rows.tolist())}
        order = np.array([last[row] for row in rows.tolist()], np.intp)
        rows_there, order_there = self.on_device(rows), self.on_device(order)
        ours = Record([buffer.ctypes.data for buffer in here], widths)
        theirs = Record([buffer.data.ptr for buffer in there], widths)
        inside = ours.carries(2 * count) and seed % 2 == 0

        packed = ours.packed(count)
        batch = aligned(packed.nbytes, 0)
        batch_there = self.on_device(batch)
        for launch in launches(packed.table, batch.ctypes.data, RowsOfLaunch(count, rows.ctypes.data)):
            reference.gather(launch.blocks, launch.memory)
        chosen = RowsOfLaunch.of(rows) if inside else RowsOfLaunch(count, rows_there.data.ptr)
        kernels.gather(theirs.packed(count).table, batch_there.data.ptr, chosen)
        assert batch_there.get().tobytes() == batch.tobytes()

        steps = tuple(width if rng.integers(3) else 0 for width in widths)
        values = [aligned(max(count, 1) * width, offset) for width, offset in zip(widths, reversed(offsets))]
        values_there = [self.on_device(value, offset) for value, offset in zip(values, reversed(offsets))]
        table = ours.table([value.ctypes.data for value in values], steps, count)
        for launch in launches(table, 0, RowsOfLaunch(count, rows.ctypes.data, order.ctypes.data)):
            reference.scatter(launch.blocks, launch.memory)
        chosen = RowsOfLaunch(count, rows_there.data.ptr, order_there.data.ptr)
        chosen = RowsOfLaunch.of(rows, order) if inside else chosen
        kernels.scatter(theirs.table([value.data.ptr for value in values_there], steps, count), 0, chosen)
        for buffer, buffer_there in zip(here, there):
            assert buffer_there.get().tobytes() == buffer.tobytes()

    @pytest.mark.parametrize("count", [1, 255, 4096, 100_000])
    def test_last_writes(self, count):
        import cupy

        from anystore import kernels

        rows = cupy.asarray(np.random.default_rng(0).integers(0, max(count // 3, 1), count))
        slots, order = cupy.empty(kernels.slots_nbytes(count), np.uint8), cupy.empty(count, np.int64)
        kernels.note_last_writes(rows.data.ptr, count, slots.data.ptr, order.data.ptr)
        last = {row: i for i, row in enumerate(rows.get().tolist())}
        assert order.get().tolist() == [last[row] for row in rows.get().tolist()]


class TestCupyOnAGpu:
    backend, device = "cupy", "cuda:0"

    def make(self, spec: Any, capacity: int = 100) -> Storage:
        return Storage(spec, capacity, backend=self.backend, device=self.device)

    def busy(self, seconds: float = 0.5) -> Any:
        """Keep the current stream busy; the event tells when it is done."""
        import cupy

        spin = cupy.RawKernel(
            'extern "C" __global__ void spin(long long ticks)'
            "{ const long long start = clock64(); while (clock64() - start < ticks) {} }",
            "spin",
        )
        ticks = int(seconds * 1e3 * cupy.cuda.Device().attributes.get("ClockRate", 2_000_000))
        spin((1,), (1,), (ticks,))
        return cupy.cuda.get_current_stream().record()

    def test_nothing_waits_but_the_check(self):
        import cupy

        store, rows = self.make(small(20)), np.arange(10)
        values = of_small(20, 10)
        held = {key: cupy.asarray(leaf) for key, leaf in values.items()}
        rows_there, out = cupy.asarray(rows), store.get(rows)
        for _ in range(3):  # the first compiles and allocates, the second allocates the other block of pinned memory
            event = self.busy()
            store.get(rows)
            store.get(slice(3, 9))
            store.get(KnownRows(rows_there, 100))
            store.get(rows, out=out)
            store.set(rows, values)
            store.set(rows, held)
            store.set(slice(3, 13), held)
            waited = event.done
            store.get(rows_there)
            assert event.done
        assert not waited

    def test_a_batch_is_one_allocation(self):
        store = self.make(small(20))
        leaves = [leaf for leaf in store.get([1, 2, 3]).values() if leaf.size]
        assert len({leaf.data.mem.ptr for leaf in leaves}) == 1
        assert all(leaf.data.ptr % 256 == 0 and leaf.flags.c_contiguous for leaf in leaves)

    def test_batches_are_given_out_again_when_nobody_holds_them(self):
        store = self.make({"x": ArraySpec((), "int64"), "y": ArraySpec((2,), "int64")})
        store.set(..., {"x": np.arange(100), "y": np.stack([np.arange(100)] * 2, 1)})
        kept, addresses = [], set()
        for i in range(90):
            batch = store.get(np.arange(i, i + 10))
            addresses.add(batch["x"].data.ptr)
            if i % 10 == 0:
                kept.append((i, batch["x"][2:], batch["y"].reshape(-1)))
        assert len(addresses) == len(kept) + 4
        for i, x, y in kept:
            assert x.tolist() == list(range(i + 2, i + 10))
            assert y.tolist() == np.repeat(np.arange(i, i + 10), 2).tolist()

    def test_pinned_memory_is_not_used_again_before_it_was_sent(self):
        store = self.make(ArraySpec((100_000,), "float32"), 64)
        scratch = np.empty((1, 100_000), np.float32)
        self.busy(0.2)
        for i in range(64):
            scratch[...] = i
            store.set([i], scratch)
            store.set([i], scratch)
        assert store.get(...).get()[:, ::9999].tolist() == [[float(i)] * 11 for i in range(64)]

    def test_addresses_beyond_32_bits(self):
        import cupy

        rows = 5 << 20
        if cupy.cuda.Device().mem_info[0] < 16 << 30:
            pytest.skip("less than 16 GiB are free")
        store = self.make({"wide": ArraySpec((1024,), "uint8"), "byte": ArraySpec((), "uint8")}, rows)
        index = np.array([rows - 1, 0, 1 << 22, (1 << 22) - 1, 12345])
        rng = np.random.default_rng(0)
        value = {"wide": rng.integers(0, 256, (5, 1024)).astype(np.uint8), "byte": np.arange(5, dtype=np.uint8)}
        for rows_of in (index, cupy.asarray(index)):
            store.set(rows_of, value)
            assert_same(store.get(rows_of), value)
            value["byte"] = value["byte"] + np.uint8(10)

    def test_streams_ordered_by_events(self):
        import cupy

        store, values = self.make(small(5), 10_000), of_small(5, 5000)
        first, second = cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream(non_blocking=True)
        rows = np.random.default_rng(0).permutation(10_000)[:5000]
        with first:
            self.busy(0.1)
            store.set(rows, values)
            written = first.record()
        with second:
            second.wait_event(written)
            found = store.get(rows)
            second.synchronize()
        assert_same(found, values)

    def test_threads_with_storages_and_streams_of_their_own(self):
        import cupy

        errors: list[BaseException] = []

        def work(seed: int) -> None:
            try:
                store, rng = self.make(small(8), 2000), np.random.default_rng(seed)
                with cupy.cuda.Stream(non_blocking=True) as stream:
                    for turn in range(50):
                        rows = rng.permutation(2000)[:700]
                        values = of_small(8, 700, 1000 * seed + turn)
                        store.set(rows, values)
                        found = store.get(rows)
                        stream.synchronize()
                        assert_same(found, values)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []

    def test_a_refused_row_leaves_the_process_and_the_storage_as_they_were(self):
        import cupy

        store, before = self.make(small(5)), of_small(5, 100)
        store.set(..., before)
        for bad in (100, -101, 2**62):
            with pytest.raises(IndexError, match=f"^row {bad} is out of range"):
                store.set(cupy.asarray([1, bad, 2]), of_small(5, 3, 1))
        assert_same(store.get(...), before)

    def test_compiled_once(self):
        from anystore import kernels

        store = self.make(small(3))
        store.get([1])
        kernel = kernels._kernel("gather")
        start = time.perf_counter()
        other = self.make(small(4))
        other.get([1])
        assert kernels._kernel("gather") is kernel
        assert time.perf_counter() - start < 0.1

    @pytest.mark.parametrize("library", ["torch", "jax"])
    @pytest.mark.parametrize("dtype", ["float32", "uint8", "bool", "bfloat16", "int32"])
    def test_values_and_rows_of_other_libraries_are_read_in_place(self, library, dtype):
        usable(library)
        store = self.make(ArraySpec((3,), dtype))
        values = np.arange(12).reshape(4, 3).astype(store.data_spec.dtype)
        other = Storage(ArraySpec((3,), dtype), 4, backend=library, device="cuda:0")
        other.set(..., values)
        store.set([5, 1, 2, 7], other.get(...))
        assert store.get([5, 1, 2, 7]).get().tobytes() == values.tobytes()
        rows = Storage(ArraySpec((), "int32"), 2, backend=library, device="cuda:0")
        rows.set(..., np.array([-99, 7], np.int32))
        assert store.get(rows.get(...)).get().tobytes() == values[[1, 3]].tobytes()

    @pytest.mark.parametrize("library", ["torch", "jax", "cupy"])
    def test_batches_are_handed_over_in_place(self, library):
        if library != "cupy":
            usable(library)
        store = self.make(
            {"x": ArraySpec((3,), "float32"), "flag": ArraySpec((), "bool"), "n": ArraySpec((2,), "int32")}
        )
        store.set([4, 5], {"x": np.ones((2, 3), np.float32), "flag": [True, False], "n": [[1, 2], [3, 4]]})
        found = store.get([5, 4])
        for copy in (False, True):
            taken = to_library(found, library, copy=copy)
            for key in found:
                np.testing.assert_array_equal(to_numpy(taken[key]), found[key].get())
                place = to_library(taken[key], "cupy").data.ptr
                assert (place == found[key].data.ptr) == (not copy)
        with pytest.raises(ValueError, match="it is in the memory of a GPU"):
            to_library(found, "numpy")
        assert to_library(found, "numpy", copy=True)["n"].tolist() == [[3, 4], [1, 2]]

    def test_batches_are_handed_over_to_tensorflow(self):
        tf = pytest.importorskip("tensorflow")
        if not tf.config.list_physical_devices("GPU"):
            pytest.skip("TensorFlow has no GPU here")
        store = self.make(ArraySpec((3,), "float32"))
        store.set(..., np.arange(300, dtype=np.float32).reshape(100, 3))
        assert to_library(store.get([5, 4]), "tensorflow").numpy().tolist() == [[15, 16, 17], [12, 13, 14]]


class TestTwoDevices:
    backend, device = "cupy", "cuda:1"
    obstacle = None if len(DEVICES) > 1 else "there is one CUDA device, or none"

    def test_a_value_of_one_in_a_storage_on_the_other(self):
        import cupy

        store = Storage(ArraySpec((1000,), "float32"), 100, backend="cupy", device="cuda:1")
        with cupy.cuda.Device(0), cupy.cuda.Stream(non_blocking=True):
            for turn in range(20):
                value = cupy.full((50, 2000), turn, np.float32)[:, ::2]
                store.set(np.arange(50), value)
                value[...] = -1
                assert (store.get(np.arange(50)).get() == turn).all()
        assert cupy.cuda.Device().id == 0


class TestTorchOnAGpu:
    backend, device = "torch", "cuda:0"

    def test_the_kernels_run_on_torch_s_stream(self):
        import torch

        from anystore.backends.torch_cuda import TorchCudaBackend

        store = Storage(small(5), 10_000, backend="torch", device=self.device)
        assert isinstance(store.backend, TorchCudaBackend)
        values, rows = of_small(5, 5000), np.random.default_rng(0).permutation(10_000)[:5000]
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10**8)
            store.set(rows, values)
            found = store.get(torch.from_numpy(rows).to(self.device))
        stream.synchronize()
        assert_same(found, values)
        with pytest.raises(IndexError, match="^row 10000 is out of range"):
            store.get(torch.tensor([1, 10_000], device=self.device))


class TestSnapshotsOfAGpu:
    """Rows go through pinned memory, in pieces; what is read again is what was there, on any backend."""

    backend, device = "cupy", "cuda:0"

    @pytest.mark.parametrize("library", ["cupy", "torch", "jax"])
    def test_from_a_gpu_and_back(self, tmp_path, library):
        if library != "cupy":
            usable(library)
        spec = {
            "big": ArraySpec((1000,), "float32"),
            "half": ArraySpec((3,), "bfloat16"),
            "flag": ArraySpec((), "bool"),
        }
        rng = np.random.default_rng(0)
        values = {
            "big": rng.random((20_000, 1000), np.float32),
            "half": rng.random((20_000, 3)).astype(ArraySpec((), "bfloat16").dtype),
            "flag": rng.random(20_000) < 0.5,
        }
        store = Storage(spec, 20_000, backend=library, device="cuda:0")
        store.set(..., values)
        store.save(tmp_path / "store")
        rows, newer = rng.permutation(20_000)[:777], {key: leaf[:777] for key, leaf in values.items()}
        store.set(rows, newer)
        store.save(tmp_path / "store")
        for key, leaf in values.items():
            leaf[rows] = newer[key].copy()
        for backend, device in (("numpy", "cpu"), (library, "cuda:0")):
            found = load(tmp_path / "store", backend=backend, device=device)
            for key, leaf in found.get(..., copy=None).items():
                assert to_numpy(leaf).tobytes() == values[key].tobytes()


class TestCheckpointsOfAGpu:
    """What a checkpoint of TensorFlow has under each key is what it has from NumPy; no more of TensorFlow is needed."""

    backend, device = "cupy", "cuda:0"

    @pytest.fixture
    def drop_in(self, monkeypatch):
        """The class of `NumpyStorage`, on as much of TensorFlow as it calls when its buffers are saved and restored."""
        if importlib.util.find_spec("tensorflow"):
            yield importlib.import_module("anystore.tf").NumpyStorage
            return
        names = types.SimpleNamespace
        tensorflow: Any = types.ModuleType("tensorflow")
        tensorflow.Module = type("Module", (), {"__init__": lambda self, name: None})
        tensorflow.__internal__ = names(tracking=names(AutoTrackable=type("AutoTrackable", (), {})))
        tensorflow.train = names(experimental=names(PythonState=type("PythonState", (), {})))
        tensorflow.nest = names(
            flatten=optree.tree_leaves, is_nested=lambda node: isinstance(node, (dict, list, tuple))
        )
        monkeypatch.setitem(sys.modules, "tensorflow", tensorflow)
        yield importlib.import_module("anystore.tf").NumpyStorage
        del sys.modules["anystore.tf"]

    @pytest.mark.parametrize("library", ["cupy", "torch", "jax"])
    def test_the_same_bytes_as_from_numpy(self, drop_in, library):
        if library != "cupy":
            usable(library)
        spec = {"image": ArraySpec((84, 84), "uint8"), "half": ArraySpec((), "bfloat16"), "n": ArraySpec((2,), "int32")}
        values = {
            "image": np.random.default_rng(0).integers(0, 255, (500, 84, 84), np.uint8),
            "half": np.arange(500).astype(ArraySpec((), "bfloat16").dtype),
            "n": np.arange(1000, dtype=np.int32).reshape(500, 2),
        }
        there, here, again = (drop_in(spec, 1000, backend=name) for name in (library, "numpy", library))
        for store in (there, here):
            store.set(slice(100, 600), values)
        for key in ("buffer0", "buffer1", "buffer2"):
            content = getattr(there._np_state, key).serialize()
            assert content == getattr(here._np_state, key).serialize()
            getattr(again._np_state, key).deserialize(content)
        for key, leaf in again.get(slice(100, 600)).items():
            assert to_numpy(leaf).tobytes() == values[key].tobytes()
