"""The kernels and all that feeds them: on a CPU wherever that can be, on a GPU where there is one."""

from __future__ import annotations

import contextlib
import importlib.util
import threading
import weakref
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anystore import ArraySpec, Storage, leaf_table
from anystore.leaf_table import ENTRY, HEADER, LANES, THREADS, Record, RowsOfLaunch, launches
from anystore.rows import KnownRows, find_rows
from tests import emulator, nvrtc, reference, stand_in
from tests.contract import StorageContract
from tests.items import assert_same, batch

WIDTHS = [0, 1, 2, 3, 4, 6, 8, 12, 16, 17, 24, 48, 255, 256, 1000, 4080, 4096, 4112, 16384, 28224]


def by_reference(name: str, blocks: int, *arguments: Any) -> None:
    reference.KERNELS[name](blocks, *arguments)


RUNS = {"reference": by_reference}
if emulator.COMPILER is not None:
    RUNS["kernels.cu"] = emulator.run


class TestLeafTable:
    @pytest.mark.parametrize(
        ("numbers", "lane"),
        [
            ((4096, 512, 28224), 16),
            ((4096, 512, 24), 8),
            ((4096, 516, 16), 4),
            ((6, 4096, 2), 2),
            ((1, 2, 4), 1),
            ((0,), 16),
        ],
    )
    def test_the_widest_lane_divides_widths_and_addresses(self, numbers, lane):
        assert leaf_table.widest_lane(int(np.bitwise_or.reduce(numbers))) == lane

    @pytest.mark.parametrize("lanes", [1, 2, 3, 100, 128, 129, 255, 256, 257, 1023, 1024, 1025, 1764, 5000])
    @pytest.mark.parametrize("count", [1, 2, 255, 256, 257, 4096])
    def test_blocks_have_a_thread_for_every_lane(self, lanes, count):
        of_a_block = THREADS * LANES if lanes >= THREADS else THREADS // lanes * LANES
        of_a_row = -(-lanes // of_a_block) if lanes >= THREADS else 1 / of_a_block
        blocks = leaf_table.blocks_of(lanes, count)
        assert blocks - 1 < count * of_a_row <= blocks

    def test_numbers_beyond_32_bits(self):
        record = Record([2**46], [2**40])
        (launch,) = launches(
            record.table([2**45], (2**40,), 2**20), 2**44, RowsOfLaunch(2**20, start=2**50, step=-(2**33))
        )
        assert launch.blocks == 2**20 * 2**40 // 16 // (THREADS * LANES)
        assert HEADER.unpack_from(launch.memory.tobytes())[:6] == (2**20, 2**44, 0, 0, 2**50, -(2**33))
        assert reference.leaves_of(launch.memory).tolist() == [(2**46, 2**45, 2**40, 2**40, 0, 16)]

    def test_leaves_of_a_batch_are_aligned_and_apart(self):
        nbytes, offsets = leaf_table.pack([1, 0, 256, 257, 4])
        assert (nbytes, offsets) == (256 + 256 + 512 + 256, (0, 256, 256, 512, 1024))
        assert leaf_table.pack([]) == (0, ())

    def test_the_layout_of_a_batch_is_kept(self):
        record = Record([4096, 8192], [4, 16])
        packed = record.packed(256)
        assert record.packed(256) is packed
        for count in range(100):
            record.packed(count)
        assert record.packed(256) is not packed

    def test_a_launch_is_used_again_unless_somebody_is_at_it(self):
        record = Record([4096, 8192, 512], [4, 0, 16])
        rows, batches = RowsOfLaunch.of(np.array([3, 5])), (1 << 20, 1 << 21, 1 << 22)
        for table, places in ((record.packed(2).table, [0, 256]), (record.table(batches, (4, 0, 16), 2), batches[::2])):
            first = launches(table, 0, rows)
            launch = next(first)
            (other,) = launches(table, 512, RowsOfLaunch(2, 1 << 30))
            assert other is not launch
            assert reference.leaves_of(launch.memory)["batch"].tolist() == list(places)
            assert HEADER.unpack_from(launch.memory.tobytes()) == (2, 0, 0, 0, 0, 0, 2, 1)
            assert HEADER.unpack_from(other.memory.tobytes()) == (2, 512, 1 << 30, 0, 0, 0, 2, 0)
            assert list(first) == []
            assert list(launches(table, 0, rows)) == [launch]
        assert record.packed(2).table.take() is not record.packed(2).elsewhere.take()

    def test_nothing_to_move_takes_no_launch(self):
        for record, count in ((Record([512, 512], [0, 0]), 5), (Record([512], [4]), 0), (Record([], []), 3)):
            packed = record.packed(count)
            assert list(launches(packed.table, 0, RowsOfLaunch(count))) == []
            assert packed.nbytes == 0

    @pytest.mark.parametrize("leaves", [1, 64, 100, 101, 102, 202, 203, 1000])
    def test_long_tables_take_several_launches_of_four_kilobytes(self, leaves):
        record = Record([4096 * (i + 1) for i in range(leaves)], [i % 30 for i in range(leaves)])
        moved = [i for i in range(leaves) if i % 30]
        found = list(launches(record.packed(7).table, 0, RowsOfLaunch(7)))
        assert len(found) == -(-len(moved) // 101)
        assert all(launch.memory.nbytes == 4096 and launch.memory.size == 1 for launch in found)
        tables = [reference.leaves_of(launch.memory) for launch in found]
        assert [int(buffer) // 4096 - 1 for table in tables for buffer in table["buffer"]] == moved
        for launch, table in zip(found, tables, strict=True):
            shares = np.diff(np.append(table["first_block"], launch.blocks))
            assert table["first_block"][0] == 0
            assert (shares > 0).all()

    def test_rows_travel_in_the_launch_while_there_is_room(self):
        most = (4096 - HEADER.size - 8 * ENTRY.size) // 8
        record = Record([512] * 9, [4] * 8 + [0])
        assert record.carries(most)
        assert not record.carries(most + 1)
        assert not Record([512] * 200, [4] * 200).carries(1)
        rows = np.arange(most)
        (launch,) = launches(record.packed(most).table, 0, RowsOfLaunch.of(rows))
        assert launch.memory.nbytes == 4096
        assert launch.memory.tobytes()[-8:] == rows[-1].tobytes()

    def test_slots_are_twice_as_many_as_rows(self):
        for count in (1, 2, 3, 4, 5, 1000, 2**20):
            assert 2 * count <= 2 ** leaf_table.slot_bits(count) <= 4 * count


def aligned(nbytes: int, offset: int) -> Any:
    """So many bytes of main memory that start `offset` bytes past a multiple of 512."""
    memory = np.random.default_rng(nbytes).integers(0, 256, nbytes + 1024).astype(np.uint8)
    start = -memory.ctypes.data % 512 + offset
    return memory[start : start + nbytes]


@st.composite
def records(draw: st.DrawFn) -> Any:
    capacity = draw(st.integers(1, 12))
    widths = draw(st.lists(st.sampled_from(WIDTHS), min_size=1, max_size=6))
    if draw(st.booleans()):
        widths = widths * 40
    offsets = [draw(st.sampled_from([0, 0, 0, 1, 2, 4, 8])) for _ in widths]
    buffers = [aligned(capacity * width, offset) for width, offset in zip(widths, offsets)]
    return capacity, widths, buffers


@st.composite
def chosen_rows(draw: st.DrawFn, capacity: int) -> Any:
    """Rows as a slice means them, or any."""
    if draw(st.booleans()):
        return find_rows(slice(None, None, draw(st.sampled_from([1, 2, -1, -3]))), capacity)
    return np.array(draw(st.lists(st.integers(0, capacity - 1), max_size=600)), np.intp)


def of_launch(rows: Any, order: Any, carried: bool) -> RowsOfLaunch:
    if isinstance(rows, range) or carried:
        return RowsOfLaunch.of(rows, order)
    return RowsOfLaunch(rows.size, rows.ctypes.data, 0 if order is None else order.ctypes.data)


def last_writes(run: Any, rows: Any) -> tuple[Any, Any]:
    """The slots in which the kernels note the rows, each with its last position, and the order that they make."""
    bits, blocks = leaf_table.slot_bits(len(rows)), leaf_table.blocks_for(len(rows))
    slots, order = np.full(2 << bits, -1, np.int64), np.empty(len(rows), np.int64)
    run("note_rows", blocks, rows.ctypes.data, len(rows), slots.ctypes.data, bits)
    run("last_writes", blocks, rows.ctypes.data, len(rows), slots.ctypes.data, bits, order.ctypes.data)
    return slots, order


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
class TestKernelsOnACpu:
    """The reference and kernels.cu itself move the very bytes that NumPy's indexing does."""

    @settings(deadline=None, max_examples=60)
    @given(st.data())
    def test_gather(self, run, data):
        capacity, widths, buffers = data.draw(records())
        rows = data.draw(chosen_rows(capacity))
        record = Record([buffer.ctypes.data for buffer in buffers], widths)
        packed = record.packed(len(rows))
        block = aligned(packed.nbytes, 0)
        before = block.copy()
        carried = record.carries(len(rows)) and data.draw(st.booleans())
        for launch in launches(packed.table, block.ctypes.data, of_launch(rows, None, carried)):
            run("gather", launch.blocks, launch.memory)
        for width, buffer, offset in zip(widths, buffers, packed.offsets):
            size = len(rows) * width
            expected = buffer.reshape(capacity, width)[np.asarray(rows, np.intp)]
            assert block[offset : offset + size].tobytes() == expected.tobytes()
            block[offset : offset + size] = before[offset : offset + size]
        assert block.tobytes() == before.tobytes(), "nothing between the leaves is written to"

    @settings(deadline=None, max_examples=60)
    @given(st.data())
    def test_scatter(self, run, data):
        capacity, widths, buffers = data.draw(records())
        rows = data.draw(chosen_rows(capacity))
        index = np.asarray(rows, np.intp)
        count = len(rows)
        whole = [data.draw(st.sampled_from([True, True, False])) for _ in widths]
        values = [
            aligned((count if each else 1) * width, data.draw(st.sampled_from([0, 0, 1, 4, 8])))
            for width, each in zip(widths, whole)
        ]
        expected = [buffer.reshape(capacity, width).copy() for width, buffer in zip(widths, buffers)]
        for model, value, width in zip(expected, values, widths):
            for i, row in enumerate(index):
                model[row] = value.reshape(-1, width)[i % len(value.reshape(-1, width))] if width else 0
        last = {row: i for i, row in enumerate(index.tolist())}
        order = None if len(last) == count else np.array([last[row] for row in index.tolist()], np.intp)
        record = Record([buffer.ctypes.data for buffer in buffers], widths)
        steps = tuple(width if each else 0 for width, each in zip(widths, whole))
        table = record.table([value.ctypes.data for value in values], steps, count)
        carried = record.carries(2 * count) and data.draw(st.booleans())
        for launch in launches(table, 0, of_launch(rows, order, carried)):
            run("scatter", launch.blocks, launch.memory)
        for buffer, model in zip(buffers, expected):
            assert buffer.tobytes() == model.tobytes()

    @pytest.mark.parametrize("dtype", ["i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"])
    def test_check(self, run, dtype):
        limits = np.iinfo(dtype)
        for capacity in (1, 100, 127, 128, 2**40):
            ends = [capacity - 1, -capacity, 0, -1]
            good = np.array([row for row in ends if limits.min <= row <= limits.max] * 100, dtype)
            for bad in ([], [capacity], [-capacity - 1], [limits.max, limits.min], [limits.min, capacity, 3]):
                wrong = np.array([row for row in bad if limits.min <= row <= limits.max], dtype)
                index = np.concatenate([good, wrong, good])
                rows, outside = np.empty(len(index), np.int64), np.zeros(2, np.uint64)
                places = (index.ctypes.data, index.itemsize, int(index.dtype.kind == "i"), len(index), capacity)
                run("check", leaf_table.blocks_for(len(index)), *places, rows.ctypes.data, outside.ctypes.data)
                past = [row for row in wrong.tolist() if row >= capacity]
                before = [-row for row in wrong.tolist() if row < -capacity]
                assert outside.tolist() == [max(past, default=0), max(before, default=0)]
                if not past and not before:
                    assert rows.tolist() == [row % capacity for row in index.tolist()]

    @pytest.mark.parametrize("count", [1, 2, 255, 256, 1000])
    @pytest.mark.parametrize("capacity", [1, 7, 10**6, 2**62])
    def test_last_writes(self, run, count, capacity):
        rows = np.random.default_rng(count).integers(0, capacity, count)
        _, order = last_writes(run, rows)
        last = {row: i for i, row in enumerate(rows.tolist())}
        assert order.tolist() == [last[row] for row in rows.tolist()]


class TestKernelsOnACpuHashRows:
    obstacle = None if emulator.COMPILER else "no C++ compiler"

    @pytest.mark.parametrize("stride", [1, 2**12, 2**40, 4181, 6765, 10946, 17711, 832040, 39088169])
    def test_at_no_stride_are_the_slots_of_all_rows_neighbours(self, stride):
        slots, order = last_writes(emulator.run, np.arange(0, 1024 * stride, stride))
        assert order.tolist() == list(range(1024))
        free = np.flatnonzero(slots[::2] == -1)
        # Nobody looks further than to the next free slot.
        assert np.diff(free, append=free[0] + len(slots) // 2).max() <= 32


class TestCompiles:
    obstacle = None if nvrtc.library() else "no NVRTC: pip install nvidia-cuda-nvrtc-cu12"

    @pytest.mark.parametrize("architecture", ["sm_75", "sm_80", "sm_90"])
    def test_without_a_warning(self, architecture):
        from importlib import resources

        source = resources.files("anystore").joinpath("kernels.cu").read_text(encoding="utf-8")
        of_the_assembler = ("--ptxas-options=-warn-spills", "--ptxas-options=-warn-lmem-usage")
        code, log = nvrtc.compile_for(architecture, source, ("--std=c++17", *of_the_assembler))
        assert log == ""
        for name in reference.KERNELS:
            assert name.encode() in code


class TestCupyOnAStandInWithKernels(StorageContract):
    """The contract once more, with kernels.cu itself at work."""

    obstacle = None if emulator.COMPILER else "no C++ compiler"
    backend, device = "cupy", "cuda:1"
    dtypes = (*StorageContract.dtypes, "float16", "complex128", "bfloat16")
    on_a_stand_in = True

    @pytest.fixture(autouse=True)
    def _installed(self, monkeypatch):
        with stand_in.installed(monkeypatch, emulator.run):
            yield

    def wipe(self, store, nest):
        with stand_in.Device(1):
            super().wipe(store, nest)


class TestTorchCudaOnAStandIn(StorageContract):
    """The Python of torch's CUDA backend, on tensors in main memory."""

    backend, device = "torch", "cpu"
    backward_views = False
    dtypes = (*StorageContract.dtypes, "uint16", "uint32", "uint64", "float16", "complex128", "bfloat16", "float8_e5m2")
    no_dtypes = (">i4", "M8[ns]")
    on_a_stand_in = True

    @pytest.fixture(autouse=True)
    def _installed(self, monkeypatch):
        pytest.importorskip("torch")
        monkeypatch.setattr(stand_in.RawKernel, "on_host_memory", True)
        with stand_in.installed(monkeypatch):
            from anystore.backends.torch import TorchBackend
            from anystore.backends.torch_cuda import TorchCudaBackend
            from anystore.kernels import Stream

            class OnTheHost(TorchCudaBackend):
                def here(self):
                    return contextlib.nullcontext()

                def _stream(self):
                    return Stream(stand_in.get_current_stream().ptr)

            monkeypatch.setattr(TorchBackend, "open", classmethod(lambda cls, device=None: OnTheHost("cpu")))
            yield

    def test_it_is_what_runs(self, store):
        stand_in.Log.entries.clear()
        store.get(np.arange(3))
        store.set([3, 3], batch([1, 2]))
        index = store.backend.from_numpy(np.array([3, 3, 1]))
        store.set(index, batch([1, 2, 3]))
        assert stand_in.Log.entries == ["gather", "scatter", "check", "note_rows", "last_writes", "scatter"]
        with pytest.raises(IndexError, match=r"^row -11 is out of range"):
            store.get(store.backend.from_numpy(np.array([3, -11])))

    def test_tensors_are_read_before_the_buffers_that_they_are_views_of(self, monkeypatch):
        import torch

        # As tensors on a GPU are taken.
        monkeypatch.setattr("anystore.backends.torch_cuda.on_gpu", lambda value: isinstance(value, torch.Tensor))
        store = Storage({"a": ArraySpec((), "int32"), "b": ArraySpec((), "int32")}, 10, backend="torch", device="cpu")
        strided = torch.arange(40, dtype=torch.int32)[::2]
        store.set(..., {"a": strided[:10], "b": strided[10:]})
        live = store.buffers
        stand_in.Log.entries.clear()
        store.set(np.arange(10)[::-1], {"a": live["b"], "b": live["a"]})
        assert stand_in.Log.entries == ["scatter"]
        assert store.get(...)["a"].tolist() == list(range(38, 18, -2))
        assert store.get(...)["b"].tolist() == list(range(18, -2, -2))

    def test_out_that_torch_conjugates_when_it_reads(self):
        import torch

        store = Storage(ArraySpec((), "complex64"), 4, backend="torch", device="cpu")
        store.set([0, 1], torch.tensor([1 + 2j, 3 - 4j]))
        out = torch.zeros(2, dtype=torch.complex64).conj()
        assert store.get([1, 0], out=out).tolist() == [3 - 4j, 1 + 2j]


class Handed:
    """An array of another library, on a GPU, that DLPack hands over."""

    def __init__(self, array: Any) -> None:
        self.array, self.streams = array, []

    shape = property(lambda self: self.array.shape)
    dtype = property(lambda self: self.array.dtype)
    ndim = property(lambda self: self.array.ndim)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.array.device.id

    def __dlpack__(self, stream: int) -> Any:
        self.streams.append(stream)
        return self.array


def small(leaves: int) -> dict[str, ArraySpec]:
    return {f"leaf{i:03}": ArraySpec((i % 5,), ["float32", "uint8", "int64"][i % 3]) for i in range(leaves)}


def of_small(leaves: int, rows: int, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {key: rng.integers(0, 100, (rows, *spec.shape)).astype(spec.dtype) for key, spec in small(leaves).items()}


class TestCupyBackend:
    """What the backend puts on its stream, on a stand-in; its second device is used, and the first is current."""

    on_a_stand_in = True

    @pytest.fixture(autouse=True)
    def _installed(self, monkeypatch):
        with stand_in.installed(monkeypatch) as self.cupy:
            yield

    def make(self, spec: Any, capacity: int = 100) -> Storage:
        return Storage(spec, capacity, backend="cupy", device="cuda:1")

    def on_device(self, array: Any, device: int = 1) -> Any:
        with self.cupy.cuda.Device(device):
            return self.cupy.asarray(array)

    def does(self, call: Any) -> list[str]:
        """What a call puts on streams."""
        stand_in.Log.entries.clear()
        call()
        return stand_in.Log.entries[:]

    @pytest.mark.parametrize("leaves", [2, 5, 20, 100])
    def test_reading_is_one_launch_whatever_the_number_of_leaves(self, leaves):
        store = self.make(small(leaves))
        for index in (np.arange(4), np.array([[1, 2], [3, 3]]), slice(0, 9, 2), 5, np.arange(100) % 2 == 0):
            assert self.does(lambda index=index: store.get(index)) == ["gather"]

    def test_many_rows_are_sent_once(self):
        store = self.make(small(20), 10_000)
        rows = np.random.default_rng(0).permutation(10_000)[:4096]
        assert self.does(lambda: store.get(rows)) == ["copy", "gather"]
        values = of_small(20, 4096)
        assert self.does(lambda: store.set(rows, values)) == ["copy", "scatter"]
        assert_same(store.get(rows), values)

    def test_more_leaves_than_a_launch_takes(self):
        store = self.make(small(300))
        values = of_small(300, 50)
        rows = np.random.default_rng(0).permutation(100)[:50]
        store.set(rows, values)
        assert self.does(lambda: assert_same(store.get(rows), values)) == ["copy", *["gather"] * 3]

    def test_writing_from_the_host_is_one_copy_and_one_launch(self):
        store, rows = self.make(small(20)), np.array([3, 7, 3, 9])
        assert self.does(lambda: store.set(rows, of_small(20, 4))) == ["copy", "scatter"]
        assert_same(store.get([7, 3, 9]), {key: leaf[[1, 2, 3]] for key, leaf in of_small(20, 4).items()})

    def test_values_that_are_cast_go_in_the_same_copy(self):
        store, rows = self.make(small(20)), np.array([3, 7])
        values = {
            key: leaf.astype(np.float64 if leaf.dtype.kind == "f" else leaf.dtype)
            for key, leaf in of_small(20, 2).items()
        }
        assert self.does(lambda: store.set(rows, values)) == ["copy", "scatter"]
        assert_same(store.get(rows), of_small(20, 2))

    def test_contiguous_writes_are_plain_copies(self):
        store, values = self.make(small(4)), of_small(4, 10)
        assert self.does(lambda: store.set(slice(20, 30), values)) == ["copy"] * 3  # one of the leaves has no bytes
        assert_same(store.get(slice(20, 30)), values)
        held = {key: self.on_device(leaf) for key, leaf in values.items()}
        assert self.does(lambda: store.set(slice(40, 50), held)) == ["copy"] * 3
        assert_same(store.get(slice(40, 50)), values)
        one = {key: leaf[3] for key, leaf in values.items()}
        assert self.does(lambda: store.set(60, one)) == ["copy"] * 3
        assert_same(store.get(60), one)

    def test_contiguous_writes_of_many_leaves_are_one_launch(self):
        store, values = self.make(small(20)), of_small(20, 10)
        assert self.does(lambda: store.set(slice(20, 30), values)) == ["copy", "scatter"]
        assert_same(store.get(slice(20, 30)), values)

    def test_values_on_the_device_are_read_in_place(self):
        store, values = self.make(small(5)), of_small(5, 3)
        held = {key: self.on_device(leaf) for key, leaf in values.items()}
        assert self.does(lambda: store.set([5, 1, 8], held)) == ["scatter"]
        assert_same(store.get([5, 1, 8]), values)

    def test_values_here_and_there(self):
        store, values = self.make(small(5)), of_small(5, 3)
        held = {key: self.on_device(leaf) if i % 2 else leaf for i, (key, leaf) in enumerate(values.items())}
        assert self.does(lambda: store.set([5, 1, 5], held)) == ["copy", "scatter"]
        assert_same(store.get([1, 5]), {key: leaf[1:] for key, leaf in values.items()})

    def test_values_of_another_device_wait_for_its_stream(self):
        store, first = self.make(ArraySpec((2,), "float32")), self.cupy.cuda.Device(0)
        with first, self.cupy.cuda.Stream():
            value = self.on_device(np.zeros((3, 2), np.float32), 0)
            ready = np.arange(6, dtype=np.float32).reshape(3, 2)

            def fill() -> None:
                value._array[...] = ready

            self.cupy.cuda.get_current_stream().put(fill)
            store.set([4, 2, 6], value)
        assert_same(store.get([4, 2, 6]), ready)

    def test_strided_values_of_another_device(self):
        store = self.make(ArraySpec((2,), "float32"))
        values = np.arange(12, dtype=np.float32).reshape(6, 2)
        store.set([4, 2, 6], self.on_device(values, 0)[::2, ...])
        assert_same(store.get([4, 2, 6]), values[::2])

    def test_values_that_another_library_hands_over(self):
        store, value = self.make(ArraySpec((), "int32")), Handed(self.on_device(np.array([7, 8, 9], np.int32)))
        assert self.does(lambda: store.set([4, 2, 6], value)) == ["scatter"]
        assert store.get([4, 2, 6]).get().tolist() == [7, 8, 9]
        store.set([4, 2], Handed(self.on_device(np.array([1, 0], np.int64))))
        assert store.get([4, 2]).get().tolist() == [1, 0]

    def test_what_another_library_hands_over_is_kept_until_it_was_read(self):
        store = self.make(ArraySpec((), "int32"))

        def put() -> Any:
            value = Handed(self.on_device(np.array([7, 8, 9], np.int32)))
            store.set([4, 2, 6], value)
            return weakref.ref(value)

        first = put()
        assert first() is not None
        with self.cupy.cuda.Device(1):
            self.cupy.cuda.get_current_stream().synchronize()
        second = put()
        assert first() is None
        assert second() is not None

    def test_what_another_library_hands_over_is_not_kept_longer(self):
        store = self.make(ArraySpec((), "int32"))
        index = Handed(self.on_device(np.array([7, 8])))
        gone = [weakref.ref(index)]
        store.get(index)  # which waits for the check
        value = Handed(self.on_device(np.zeros((5, 5), np.int32)))
        gone.append(weakref.ref(value))
        with pytest.raises(ValueError, match="expected shape"):
            store.set([1, 2], value)
        del index, value
        store.set([1, 2], np.zeros(2, np.int32))
        assert [ref() for ref in gone] == [None, None]

    def test_a_bool_handed_over_as_bytes(self):
        store = self.make(ArraySpec((), "bool"))
        value = Handed(self.on_device(np.array([1, 0, 1], np.uint8)))
        value.__class__ = type("Tensor", (Handed,), {"dtype": np.dtype(bool)})
        store.set([4, 2, 6], value)
        assert store.get([4, 2, 6]).get().tolist() == [True, False, True]

    # Rows on the device -----------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("dtype", ["i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"])
    def test_rows_on_the_device_are_checked_there(self, dtype):
        store = self.make(small(5))
        store.set(..., of_small(5, 100))
        rows = np.array([[3, 5], [99, 0]], dtype)
        for index in (self.on_device(rows), self.on_device(rows, 0), Handed(self.on_device(rows))):
            assert self.does(lambda index=index: store.get(index)) == ["check", "gather"]
            assert_same(store.get(index), {key: leaf[rows.astype(int)] for key, leaf in of_small(5, 100).items()})

    def test_strided_rows_on_the_device(self):
        store, rows = self.make(small(5)), self.on_device(np.arange(8))[::3, ...]
        store.set(rows, of_small(5, 3))
        assert_same(store.get([0, 3, 6]), of_small(5, 3))
        assert_same(store.get(rows), of_small(5, 3))

    def test_negative_rows_on_the_device(self):
        store = self.make(small(5))
        store.set(self.on_device(np.array([-1, -100])), of_small(5, 2))
        assert_same(store.get([99, 0]), of_small(5, 2))

    @pytest.mark.parametrize("rows", [[3, 100], [-101, 3], [3, 2**63 - 1], [-(2**63), 0]], ids=str)
    def test_a_row_out_of_range_is_refused_and_nothing_written(self, rows):
        store, before = self.make(small(5)), of_small(5, 100)
        store.set(..., before)
        bad = next(row for row in rows if not -100 <= row < 100)
        index = self.on_device(np.array(rows, np.int64))
        with pytest.raises(IndexError, match=f"^row {bad} is out of range for a capacity of 100$"):
            store.set(index, of_small(5, 2, 1))
        with pytest.raises(IndexError, match="out of range"):
            store.get(index)
        assert_same(store.get(...), before)

    def test_of_several_values_for_a_row_on_the_device_the_last_stays(self):
        store, values = self.make(small(5)), of_small(5, 1000)
        rows = np.random.default_rng(0).integers(0, 100, 1000)
        held = {key: self.on_device(leaf) for key, leaf in values.items()}
        for value in (values, held):
            found = self.does(lambda value=value: store.set(self.on_device(rows), value))
            assert [name for name in found if name != "copy"] == ["check", "note_rows", "last_writes", "scatter"]
            last = {row: i for i, row in enumerate(rows.tolist())}
            kept = np.array(list(last.values()))
            assert_same(store.get(rows[kept]), {key: leaf[kept] for key, leaf in values.items()})

    def test_one_item_for_all_rows_on_the_device(self):
        store, item = self.make(small(5)), {key: leaf[0] for key, leaf in of_small(5, 1).items()}
        store.set(self.on_device(np.array([5, 5, 7])), item)
        assert_same(store.get(7), item)

    def test_a_mask_on_the_device(self):
        store, mask = self.make(small(5)), np.arange(100) % 7 == 0
        store.set(self.on_device(mask), of_small(5, 15))
        assert_same(store.get(mask), of_small(5, 15))
        store.set(self.on_device(np.zeros(100, bool)), of_small(5, 0))
        with pytest.raises(IndexError, match=r"expected a mask of shape \(100,\)"):
            store.get(self.on_device(np.ones(99, bool)))

    def test_what_is_no_index_on_the_device(self):
        store = self.make(small(5))
        with pytest.raises(IndexError, match="found an array of float32"):
            store.get(self.on_device(np.zeros(3, np.float32)))
        assert store.get(self.on_device(np.array(3)))["leaf001"].shape == (1,)
        assert store.get(self.on_device(np.zeros((2, 0), int)))["leaf001"].shape == (2, 0, 1)

    def test_rows_that_anystore_drew_are_not_checked(self):
        store = self.make(small(5))
        store.set(..., of_small(5, 100))
        for rows in (np.array([5, 6]), self.on_device(np.array([5, 6]))):
            known = KnownRows(rows, 100)
            assert self.does(lambda known=known: store.get(known)) == ["gather"]
            assert_same(store.get(known), {key: leaf[[5, 6]] for key, leaf in of_small(5, 100).items()})
        store.resize(50)
        with pytest.raises(IndexError, match="drawn for a capacity of 100, and this one is 50"):
            store.get(known)

    # Memory and streams -----------------------------------------------------------------------------------------------

    def test_a_batch_is_one_allocation(self):
        store = self.make(small(5))
        leaves = list(store.get([1, 2]).values())
        assert len({id(leaf.data.memory) for leaf in leaves}) == 1
        assert all(leaf.data.ptr % 256 == 0 and leaf.flags.c_contiguous for leaf in leaves)

    def test_pinned_memory_is_not_used_again_before_it_was_sent(self):
        store = self.make(ArraySpec((1000,), "float32"), 10)
        values = np.arange(10, dtype=np.float32)[:, None] + np.zeros(1000, np.float32)
        scratch = np.empty((1, 1000), np.float32)
        for i in range(10):  # nobody waits for the stream in between
            scratch[...] = values[i]
            store.set([i], scratch)
        assert_same(store.get(...), values)

    def test_what_runs_late_uses_memory_that_is_still_there(self):
        store = self.make(small(5), 1000)
        for seed in range(20):
            rows = np.random.default_rng(seed).permutation(1000)[:500]
            store.set(rows, of_small(5, 500, seed))
            store.get(rows)
        assert_same(store.get(rows), of_small(5, 500, 19))

    def test_everything_is_on_the_current_stream(self):
        store = self.make(small(5))
        with self.cupy.cuda.Device(1), self.cupy.cuda.Stream() as stream:
            store.set([1, 2], of_small(5, 2))
            store.set(self.on_device(np.array([3, 4])), of_small(5, 2))
            work = len(stream.work)
            store.get([1, 2])
            assert len(stream.work) > work >= 6
            assert_same(store.get([1, 2]), of_small(5, 2))

    def test_the_current_device_stays_as_it_was(self):
        store = self.make(small(5))
        store.set([1], of_small(5, 1))
        store.get([1])
        with pytest.raises(IndexError):
            store.get(self.on_device(np.array([100])))
        assert self.cupy.cuda.Device().id == 0

    def test_a_value_is_read_before_the_buffers_that_it_is_a_view_of(self):
        store = self.make({"a": ArraySpec((), "int32"), "b": ArraySpec((), "int32")}, 10)
        store.set(..., {"a": np.arange(10, dtype=np.int32), "b": np.arange(10, dtype=np.int32) + 10})
        live = store.buffers
        store.set(np.arange(10)[::-1], {"a": live["b"], "b": live["a"]})
        assert store.get(...)["a"].get().tolist() == list(range(19, 9, -1))
        assert store.get(...)["b"].get().tolist() == list(range(9, -1, -1))

    def test_what_overlaps_a_buffer(self):
        from anystore.backends.cuda import Buffers

        arrays = [self.on_device(np.zeros(count, np.uint8)) for count in (3, 0, 7, 1)]
        starts = dict(zip(map(id, arrays), (40, 33, 20, 30), strict=True))
        buffers = Buffers(arrays, lambda array: starts[id(array)])
        taken = {*range(40, 43), *range(20, 27), 30}
        for start in range(10, 50):
            for nbytes in range(1, 30):
                assert buffers.overlap(start, nbytes) == bool(taken.intersection(range(start, start + nbytes)))

    def test_out_need_not_be_contiguous(self):
        store, values = self.make(ArraySpec((2,), "float32")), np.arange(200, dtype=np.float32).reshape(100, 2)
        store.set(..., values)
        whole = self.on_device(np.zeros((6, 2), np.float32))
        assert self.does(lambda: store.get([5, 1, 9], out=whole[::2, ...])) == ["gather"]
        assert whole.get()[::2].tolist() == values[[5, 1, 9]].tolist()
        assert not whole.get()[1::2].any()

    def test_values_too_large_for_pinned_memory(self, monkeypatch):
        monkeypatch.setattr("anystore.backends.cupy._STAGED", 1000)
        store, values = self.make(small(5)), of_small(5, 100)
        store.set(..., values)
        assert_same(store.get(...), values)

    def test_selections_and_resized_storages(self):
        store, values = self.make(small(12)), of_small(12, 100)
        store.set(..., values)
        part = store.select("leaf003", "leaf007")
        assert self.does(lambda: part.get([1, 2])) == ["gather"]
        store.resize(120)
        store.set([110], {key: leaf[:1] for key, leaf in values.items()})
        assert_same(part.get(110), {key: values[key][0] for key in ("leaf003", "leaf007")})


class TestBatchesGivenOutAgain:
    """A small batch that nobody holds may be given out again, and no other, on a stand-in."""

    on_a_stand_in = True

    @pytest.fixture(autouse=True)
    def _installed(self, monkeypatch):
        with stand_in.installed(monkeypatch) as self.cupy:
            yield

    def make(self, spec: Any = None, capacity: int = 100) -> Storage:
        spec = {"x": ArraySpec((3,), "float32"), "y": ArraySpec((), "uint8")} if spec is None else spec
        return Storage(spec, capacity, backend="cupy")

    def test_when_its_turn_comes(self):
        store = self.make()
        seen = []
        for _ in range(12):
            batch = store.get([1, 2])
            seen.append([id(leaf) for leaf in batch.values()])
        assert seen[4:] == seen[:8]
        assert len({tuple(ids) for ids in seen}) == 4

    def test_with_new_values_in_a_nest_of_its_own(self):
        store = Storage({"x": ArraySpec((), "int64")}, 100, backend="cupy")
        store.set(..., {"x": np.arange(100)})
        kept = store.get([0, 1])
        for i in range(1, 50):
            batch = store.get([i, i - 1])
            assert batch["x"].tolist() == [i, i - 1]
            batch.clear()
        assert kept["x"].tolist() == [0, 1]

    @pytest.mark.parametrize(
        "part",
        [
            lambda batch: batch["x"],
            lambda batch: batch["y"],
            lambda batch: batch["y"][1:],
            lambda batch: batch["x"][1],
            lambda batch: batch["x"].reshape(-1),
            lambda batch: batch["x"].data,
            lambda batch: batch["y"].data,
            lambda batch: batch["x"].data + 4,
            lambda batch: batch["y"].data.mem,
        ],
    )
    def test_not_while_somebody_holds_a_part_of_it(self, part):
        store = self.make()
        held = []
        for _ in range(10):
            batch = store.get([1, 2])
            address = batch["x"].data.ptr
            held.append(part(batch))
            del batch
            addresses = set()
            for _ in range(10):
                addresses.add(store.get([3, 4])["x"].data.ptr)
            assert address not in addresses
            assert len(addresses) <= 5
        assert len(held) == 10

    def test_not_in_another_shape(self):
        store = self.make({"x": ArraySpec((6,), "float32")})
        for _ in range(10):
            batch = store.get([1, 2])
            assert batch["x"].shape == (2, 6)
            assert [store.get(index)["x"].shape for index in (5, [5], [[1], [2]])] == [(6,), (1, 6), (2, 1, 6)]

    @pytest.mark.parametrize("change", ["shape", "pointer", "memory"])
    def test_not_if_it_was_changed(self, change):
        store = self.make()
        for _ in range(8):
            batch = store.get([1, 2])
            before = batch["x"].data.ptr
            if change == "shape":
                batch["x"]._array.shape = (6,)  # as CuPy's arrays can be given one in place
            elif change == "pointer":
                batch["x"].data.ptr += 4  # as by `+=`
            else:
                batch["x"].data.mem.ptr = 0  # as by `free`
            del batch
            assert before not in {store.get([1, 2])["x"].data.ptr for _ in range(8)}

    def test_not_while_there_is_a_weak_reference(self):
        store = self.make()
        for name in "xy":
            for _ in range(8):
                batch = store.get([1, 2])
                address, weak = batch[name].data.ptr, weakref.ref(batch[name])
                del batch
                assert address not in {store.get([1, 2])[name].data.ptr for _ in range(8)}
                assert weak() is None

    def test_not_with_another_allocator(self, monkeypatch):
        store = self.make()
        first = {store.get([1, 2])["x"].data.ptr for _ in range(10)}
        monkeypatch.setattr(self.cupy.cuda, "get_allocator", lambda: None)
        assert first.isdisjoint({store.get([1, 2])["x"].data.ptr for _ in range(10)})

    def test_not_on_another_stream(self):
        store = self.make()
        read = lambda: {store.get([1, 2])["x"].data.ptr for _ in range(10)}  # noqa: E731
        first = read()
        with self.cupy.cuda.Stream() as stream:
            second = read()
            stream.synchronize()
        assert len(first) == len(second) == 4
        assert first.isdisjoint(second)

    def test_of_each_thread_where_each_has_a_stream_of_its_own(self, monkeypatch):
        store = self.make()
        read = lambda: {store.get([1, 2])["x"].data.ptr for _ in range(10)}  # noqa: E731
        own = self.cupy.cuda.get_current_stream().ptr
        for address, together in ((own, 8), (own + 1000, 4)):
            monkeypatch.setattr(self.cupy.cuda.runtime, "streamPerThread", address)
            found = read()
            thread = threading.Thread(target=lambda: found.update(read()))  # noqa: B023
            thread.start()
            thread.join()
            assert len(found) == together

    def test_not_a_large_one(self):
        store = self.make({"x": ArraySpec((1 << 18,), "float32")}, 8)
        first = weakref.ref(store.get([1, 2])["x"]._array)
        for _ in range(2):
            self.cupy.cuda.get_current_stream().run()
        assert first() is None

    def test_threads_that_keep_some(self):
        store = Storage({"x": ArraySpec((), "int64"), "y": ArraySpec((2,), "int64")}, 1000, backend="cupy")
        store.set(..., {"x": np.arange(1000), "y": np.stack([np.arange(1000)] * 2, 1)})
        errors: list[BaseException] = []

        def work(seed: int) -> None:
            rng, kept = np.random.default_rng(seed), []
            try:
                for _ in range(60):
                    rows = rng.integers(0, 1000, 3)
                    kept.append((rows.tolist(), store.get(rows)))
                    if len(kept) > 4:
                        del kept[rng.integers(len(kept))]
                    for rows_then, batch in kept:
                        assert batch["x"].tolist() == rows_then
                        assert batch["y"].tolist() == [[row, row] for row in rows_then]
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []


class TestStandIn:
    obstacle = None if importlib.util.find_spec("cupy") else "no CuPy to compare with"

    def test_has_nothing_that_cupy_lacks(self):
        import cupy

        for ours, theirs in (
            (stand_in.module(), cupy),
            (stand_in.module().cuda, cupy.cuda),
            (stand_in.module().cuda.runtime, cupy.cuda.runtime),
            (stand_in.MemoryPointer, cupy.cuda.MemoryPointer),
            (stand_in.Stream, cupy.cuda.Stream),
            (stand_in.Event, cupy.cuda.Event),
            (stand_in.ndarray, cupy.ndarray),
        ):
            own = {"put", "run", "streams", "held", "known"}
            for name in vars(ours):
                assert name.startswith("_") or name in own or hasattr(theirs, name), name
        assert cupy.cuda.runtime.memcpyDefault == stand_in.module().cuda.runtime.memcpyDefault
