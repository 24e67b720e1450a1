"""The compiled moves do what the plain ones do."""

from __future__ import annotations

import collections
import gc
import importlib.util
import math
import subprocess
import sys
import threading
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from anystore import moves

CAPACITY = 6
BYTES_PER_CHUNK = 1 << 18
"""What a thread takes at a time."""


def plain_moves() -> ModuleType:
    """The functions of moves.py without the compiled ones in their place."""
    spec = importlib.util.spec_from_file_location("plain_moves", moves.__file__)
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, {"anystore._moves": None}):
        spec.loader.exec_module(module)
    return module


PLAIN = plain_moves()

DTYPES = st.sampled_from(
    [
        "bool",
        "int8",
        "uint16",
        "int32",
        "float32",
        "float64",
        "complex128",
        "S3",
        "U5",
        "M8[s]",
        ">i4",
        "i4,f8",
    ]
)
ROWS = st.one_of(
    st.integers(0, CAPACITY - 1),
    st.slices(CAPACITY).map(lambda index: range(*index.indices(CAPACITY)) or range(0)),
    hnp.arrays(
        np.intp, hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=4), elements=st.integers(0, CAPACITY - 1)
    ),
)


@st.composite
def buffers(draw: st.DrawFn) -> list[Any]:
    """Buffers with bits of all kinds in them."""
    made = []
    for seed in range(draw(st.integers(1, 3))):
        shape = (CAPACITY, *draw(hnp.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=5)))
        array = np.zeros(shape, draw(DTYPES))
        array.view(np.uint8).reshape(-1)[...] = np.random.default_rng(seed).integers(0, 2, array.nbytes)
        made.append(array)
    return made


def layout(array: Any, kind: str) -> Any:
    """The same values, laid out otherwise."""
    if kind == "reversed":
        return array[..., ::-1].copy()[..., ::-1] if array.ndim else array
    if kind == "fortran":
        return np.asfortranarray(array) if array.ndim else array
    return array


def same(one: Any, other: Any) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


class TestCompiled:
    compiled = True

    @given(buffers(), ROWS)
    def test_gather(self, stored, rows):
        for found, expected in zip(moves.gather(stored, rows), PLAIN.gather(stored, rows), strict=True):
            assert same(found, expected)
            assert found.flags.c_contiguous
            assert found.flags.writeable
            assert not any(np.may_share_memory(found, buffer) for buffer in stored)

    @given(buffers(), st.integers(0, CAPACITY - 1))
    def test_view_one(self, stored, row):
        for found, buffer in zip(moves.view_one(stored, row), stored, strict=True):
            assert same(found, buffer[row, ...])
            assert found.base is not None
            assert np.shares_memory(found, buffer) or found.size == 0

    @given(buffers(), ROWS, st.sampled_from(["as it is", "reversed", "fortran"]))
    def test_gather_into(self, stored, rows, kind):
        expected = PLAIN.gather(stored, rows)
        out = [layout(np.zeros_like(array), kind) for array in expected]
        assert moves.gather_into(stored, rows, out) is None
        assert all(map(same, out, expected))

    @given(buffers(), ROWS, st.sampled_from(["as it is", "reversed", "fortran"]), st.booleans(), st.randoms())
    def test_scatter(self, stored, rows, kind, single, random):
        lead = () if single else PLAIN.leading_shape(rows)
        leaves = []
        for buffer in stored:
            shape = lead + buffer.shape[1:]
            bits = bytes(random.randrange(2) for _ in range(buffer.itemsize * math.prod(shape)))
            leaves.append(layout(np.frombuffer(bits, buffer.dtype).reshape(shape), kind))
        twins = [buffer.copy() for buffer in stored]
        assert moves.scatter(stored, rows, leaves) is PLAIN.scatter(twins, rows, leaves) is True
        assert all(map(same, stored, twins))

    @given(
        st.sampled_from(["bool", "int8", "uint8", "int64", "uint64", "float16", "float32", ">f4", "M8[s]"]) | DTYPES,
        st.booleans()
        | st.integers()
        | st.integers(-300, 300)
        | st.floats(width=32)
        | st.sampled_from(["a", None, 1j, np.int8(3), np.int64(3), np.float32(1.5), np.float64(0), np.True_])
        | st.just(np.datetime64(3, "ms")),
        ROWS,
    )
    @pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
    def test_scatter_of_a_number(self, dtype, number, rows):
        stored, twin = np.zeros((2, CAPACITY), dtype)
        written = moves.scatter([stored], rows, [number])
        assert written == PLAIN.scatter([twin], rows, [number])
        assert same(stored, twin)
        assert written or not stored.view(np.uint8).any()

    @given(buffers(), ROWS, st.data())
    def test_scatter_writes_nothing_if_one_leaf_does_not_fit(self, stored, rows, data):
        lead = PLAIN.leading_shape(rows)
        leaves = [np.ones(lead + buffer.shape[1:], buffer.dtype) for buffer in stored]
        which = data.draw(st.integers(0, len(stored) - 1))
        shape, dtype = stored[which].shape[1:], stored[which].dtype
        leaves[which] = data.draw(
            st.sampled_from(
                [
                    np.ones((*lead, *shape, 2), dtype),
                    np.ones((7, *lead, *shape), dtype),
                    np.ones(lead + shape, "O"),
                    None,
                ]
            )
        )
        before = [buffer.copy() for buffer in stored]
        assert moves.scatter(stored, rows, leaves) is PLAIN.scatter(stored, rows, leaves) is False
        assert all(map(same, stored, before))

    @pytest.mark.parametrize("into", [slice(0, 4), slice(2, 6), slice(4, 0, -1)])
    def test_scatter_of_a_view_of_its_buffers(self, into):
        rows = range(*into.indices(CAPACITY))
        stored = [np.arange(CAPACITY), np.arange(CAPACITY) + 10]
        twins = [buffer.copy() for buffer in stored]
        for module, arrays in ((moves, stored), (PLAIN, twins)):
            assert module.scatter(arrays, rows, [arrays[1][1:5], arrays[0][1:5]])
        assert all(map(same, stored, twins))
        assert stored[0][rows[0]] == 11

    def test_gather_into_a_view_of_its_buffer(self):
        stored = np.arange(CAPACITY)
        moves.gather_into([stored], np.array([5, 4, 3, 0]), [stored[:4]])
        assert stored.tolist() == [5, 4, 3, 0, 4, 5]

    def test_all_inside(self):
        for index in ([], [0, 5], [0, 6], [-1], [[1, 2], [3, 4]], [2**62], [-(2**63)]):
            for array in (np.array(index, np.intp), np.array(index, np.intp).T, np.array(index, np.int64)[::-1]):
                assert moves.all_inside(array, 6) is PLAIN.all_inside(array, 6)
        for other in (np.array([1], np.int32), np.array([True]), np.array([1.0]), np.array(3)):
            assert moves.all_inside(other, 6) is PLAIN.all_inside(other, 6) is False

    @given(st.lists(st.sampled_from([0, 1, 2, 3, 4, 2**40, 2**62]), max_size=20))
    def test_last_writes(self, rows):
        last = {row: position for position, row in enumerate(rows)}
        expected = None if len(last) == len(rows) else [last[row] for row in rows]
        for function in (moves.last_writes, PLAIN.last_writes):
            found = function(np.array(rows, np.intp))
            assert (None if found is None else found.tolist()) == expected
            if len(rows) % 2 == 0:
                paired = function(np.array(rows, np.intp).reshape(-1, 2))
                assert (None if paired is None else paired.tolist()) == expected

    def test_last_writes_at_strides_that_a_simple_hash_takes_ill(self):
        for stride in (6765, 10946, 17711, 2**20, 2**40):
            rows = np.arange(0, 5000 * stride, stride)
            assert moves.last_writes(rows) is None
            assert moves.last_writes(np.append(rows, rows))[0] == 5000

    @pytest.mark.parametrize("count", [511, 512, 513, 100_000])
    def test_last_writes_of_many_rows(self, count):
        rows = np.random.default_rng(count).integers(0, count, count)
        assert np.array_equal(moves.last_writes(rows), PLAIN.last_writes(rows))
        assert moves.last_writes(np.unique(rows)) is None

    @pytest.mark.parametrize(
        ("function", "arguments"),
        [
            ("gather", ([np.zeros(3)], 1.5)),
            ("gather", ([np.zeros(3)], np.array([1], np.int32))),
            ("gather", ([np.zeros(3)], slice(0, 1))),
            ("gather", ([np.zeros((3, 4)).T], 1)),
            ("gather", (np.zeros(3), 1)),
            ("gather", ([np.zeros(3)],)),
            ("gather_into", ([np.zeros(3)], 1, [np.zeros(2)])),
            ("gather_into", ([np.zeros(3)], 1, [])),
            ("gather_into", ([np.zeros(3)], 1, [[0]])),
            ("scatter", ([np.zeros(3)], 1, (1.0,))),
            ("scatter", ([1], 1, [1.0])),
            ("view_one", ([np.zeros(3)], "a")),
            ("all_inside", ([1], 3)),
            ("last_writes", ([1, 2],)),
            ("last_writes", (np.array([1, 2], np.int32),)),
            ("last_writes", (np.array([1, 2, 3, 4], np.intp)[::2],)),
        ],
    )
    def test_refuses_what_it_was_not_made_for(self, function, arguments):
        with pytest.raises(TypeError):
            getattr(moves, function)(*arguments)

    @pytest.mark.parametrize("step", [2**60, -(2**60)])
    def test_a_range_that_goes_round_all_integers(self, step):
        with pytest.raises(IndexError, match="a row is out of range"):
            moves.gather([np.arange(4)], range(0, 16 * step + 1, step))

    def test_rows_that_changed_after_they_were_checked(self):
        stored = np.zeros((4, 3))
        for rows in (np.array([0, 4]), np.array([-1]), np.array([2**40]), 4, range(2, 5), range(3, -2, -1)):
            for call in (
                lambda rows=rows: moves.gather([stored], rows),
                lambda rows=rows: moves.scatter([stored], rows, [stored[0]]),
            ):
                with pytest.raises(IndexError, match="changed after it was checked"):
                    call()

    def test_a_read_only_buffer(self):
        stored = np.zeros(3)
        stored.flags.writeable = False
        assert moves.scatter([stored], 1, [1.0]) is PLAIN.scatter([stored], 1, [1.0]) is False
        assert not moves.view_one([stored], 1)[0].flags.writeable

    def test_the_references_that_it_takes_it_gives_back(self):
        stored, leaf, rows = np.zeros((8, 4)), np.ones((3, 4)), np.array([1, 2, 3])
        large = np.zeros((8, 1 << 18))

        def use() -> None:
            for _ in range(50):
                moves.gather([stored, large], rows)
                moves.view_one([stored], 2)
                moves.scatter([stored], rows, [leaf])
                moves.scatter([stored], rows, [leaf[:, ::-1]])
                moves.scatter([stored], rows, ["no"])
                moves.gather_into([stored], rows, [leaf])

        counted = (stored, large, leaf, rows, stored.dtype)
        use()
        gc.collect()
        before = [sys.getrefcount(thing) for thing in counted]
        use()
        gc.collect()
        assert [sys.getrefcount(thing) for thing in counted] == before


class TestLargeBatches:
    """Several threads, blocks of memory that are used again."""

    @pytest.mark.parametrize("width", [1, 3, 1000, 28224])
    def test_are_right(self, width):
        rng = np.random.default_rng(width)
        stored = [rng.integers(0, 256, (1000, width), np.uint8), np.arange(1000)]
        rows = rng.integers(0, 1000, 4096)
        for found, buffer in zip(moves.gather(stored, rows), stored, strict=True):
            np.testing.assert_array_equal(found, buffer[rows])
        written = [np.zeros_like(buffer) for buffer in stored]
        assert moves.scatter(written, rows, [buffer[rows] for buffer in stored])
        for one, buffer in zip(written, stored, strict=True):
            np.testing.assert_array_equal(one[rows], buffer[rows])
        assert moves.scatter(written, range(1000), stored)
        for one, buffer in zip(written, stored, strict=True):
            np.testing.assert_array_equal(one, buffer)

    def test_the_last_value_wins_among_many(self):
        stored, rows = np.zeros((3, 4096), np.float32), np.arange(3000) % 3
        values = np.repeat(np.arange(3000, dtype=np.float32)[:, None], 4096, axis=1)
        assert moves.scatter([stored], rows, [values])
        assert stored[:, 0].tolist() == stored[:, -1].tolist() == [2997, 2998, 2999]

    def test_batches_that_live_are_left_alone(self):
        stored = np.arange(256 * 4096, dtype=np.int64).reshape(256, 4096)
        alive = []
        for start in range(40):
            (found,) = moves.gather([stored], np.arange(start, start + 64))
            alive.append((start, found))
            if len(alive) > 5:
                alive.pop(start % 5)
            for first, batch in alive:
                np.testing.assert_array_equal(batch, stored[first : first + 64])

    @pytest.mark.parametrize("width", [1024, 4096, 4099, 28224])
    def test_memory_that_is_used_again_after_a_long_time(self, width):
        """Which is written to past the caches."""
        stored = np.random.default_rng(width).integers(0, 256, (1000, width + 1), np.uint8)
        rows = np.random.default_rng(0).integers(0, 1000, (40, (2 << 20) // width))
        alive = collections.deque(maxlen=30)
        for some in rows:
            alive.append((some, moves.gather([stored[:, 1:].copy()], some)[0]))
        for some, found in alive:
            np.testing.assert_array_equal(found, stored[some, 1:])

    @pytest.mark.parametrize("width", [100, 1024, 4099, 28224])
    def test_large_writes_to_more_than_a_cache_holds(self, width):
        """Which go past the caches."""
        rng, capacity = np.random.default_rng(width), (34 << 20) // width
        memory = np.zeros(capacity * width + 1, np.uint8)
        stored = memory[1:].reshape(capacity, width)  # at an odd address
        expected, count = stored.copy(), (1 << 19) // width
        some = rng.integers(0, capacity, count)
        for rows in (range(7, 7 + count), range(2 * count, 0, -2), some, some // (capacity // 5), range(3, 3 + count)):
            values = rng.integers(0, 256, (count, width), np.uint8)
            for value in (values, values[0]):
                assert moves.scatter([stored], rows, [value])
                expected[np.asarray(rows)] = value
                np.testing.assert_array_equal(stored, expected)
        assert memory[0] == 0

    @pytest.mark.parametrize("rest", [1, 2, 15, 16, 17, 63, 64, 65])
    def test_what_is_left_for_the_last_thread_may_be_a_byte(self, rest):
        """What it takes past the caches is that byte, wherever it is."""
        stored, count = np.zeros(40 << 20, np.uint8), 3 * BYTES_PER_CHUNK + rest
        value = np.random.default_rng(rest).integers(1, 256, count, np.uint8)
        for start in range(2, 18):
            assert moves.scatter([stored], range(start, start + count), [value])
            np.testing.assert_array_equal(stored[start : start + count], value)
            assert not stored[:start].any()
            assert not stored[start + count : start + count + 4096].any()
            stored[: count + 64] = 0

    def test_what_is_read_last_may_be_a_byte(self):
        """Of a leaf beside a wider one, into memory that was last used long ago."""
        record = [np.arange(6 << 20, dtype=np.float32).reshape(-1, 3), np.arange(2 << 20).astype(np.uint8)]
        in_a_chunk = BYTES_PER_CHUNK // 13
        alive = collections.deque(maxlen=4)
        for rest in range(1, 33):
            count = 65 * in_a_chunk + rest  # of which the last does not begin where a line does
            alive.append(moves.gather(record, range(count)))
            for leaf, found in zip(record, alive[-1], strict=True):
                np.testing.assert_array_equal(found, leaf[:count])

    def test_two_readers_wait_for_nobody_else_s_helpers(self):
        stored = np.zeros((64, 1_500_000), np.uint8)
        barrier = threading.Barrier(2)

        def read() -> None:
            for _ in range(300):
                barrier.wait()
                moves.gather([stored], np.array([1, 2, 3]))

        threads = [threading.Thread(target=read, daemon=True) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        assert not any(thread.is_alive() for thread in threads)

    def test_in_the_child_of_a_fork(self):
        program = """
import os
import numpy as np
from anystore import moves
stored = np.arange(256 * 16384, dtype=np.int64).reshape(256, 16384)
moves.gather([stored], np.arange(256))
child = os.fork()
(found,) = moves.gather([stored], np.arange(256))
good = (found == stored).all()
if child == 0:
    os._exit(int(not good))
assert good and os.waitpid(child, 0)[1] == 0
"""
        subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, timeout=60)

    def test_from_several_threads_at_once(self):
        stored = np.arange(512 * 2048, dtype=np.int64).reshape(512, 2048)
        wrong: list[int] = []

        def read(seed: int) -> None:
            rng = np.random.default_rng(seed)
            for _ in range(50):
                rows = rng.integers(0, 512, 128)
                (found,) = moves.gather([stored], rows)
                if (found != stored[rows]).any():
                    wrong.append(seed)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong


settings.register_profile("anystore", deadline=None, derandomize=True)
settings.load_profile("anystore")
