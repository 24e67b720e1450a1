from __future__ import annotations

import array
import collections

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anystore.moves import basic_index, leading_shape
from anystore.rows import find_rows


class TestFindRows:
    def test_kinds(self):
        assert find_rows(-1, 10) == 9
        assert type(find_rows(np.int8(3), 10)) is int
        assert find_rows(slice(2, None), 10) == range(2, 10)
        assert find_rows(..., 10) == range(10)
        assert find_rows(slice(3, None, 10**30), 10) == range(3, 4)
        assert find_rows(np.array([True, False]), 2).tolist() == [0]
        assert leading_shape(3) == ()
        assert leading_shape(range(4)) == (4,)
        assert leading_shape(np.zeros((2, 3), np.intp)) == (2, 3)

    @pytest.mark.parametrize("index", [[0, -1], np.array([0, 255], np.uint8), np.arange(6).reshape(2, 3).T], ids=str)
    def test_arrays_come_out_as_the_backends_take_them(self, index):
        rows = find_rows(index, 256)
        assert rows.dtype == np.intp
        assert rows.flags.c_contiguous
        assert rows.min() >= 0

    @pytest.mark.parametrize(
        "index",
        [range(3, 9, 2), range(-2, 2), range(9, -1, -3), range(-1, -11, -1), range(3, 10**40, 10**40), range(0)],
        ids=str,
    )
    def test_ranges(self, index):
        rows = find_rows(index, 10)
        assert rows.dtype == np.intp
        assert rows.tolist() == [row % 10 for row in index]

    def test_leaves_the_index_as_it_was(self):
        index = np.array([-1, 2])
        find_rows(index, 5)
        assert index.tolist() == [-1, 2]

    def test_other_sequences(self):
        assert find_rows(collections.deque([1, -1]), 5).tolist() == [1, 4]
        assert find_rows(collections.UserList([1, 2]), 5).tolist() == [1, 2]
        assert find_rows(array.array("i", [1, 2]), 5).tolist() == [1, 2]

    def test_a_capacity_beyond_32_bits(self):
        assert find_rows(2**40 - 1, 2**40) == 2**40 - 1
        assert find_rows(np.array([2**39]), 2**40).tolist() == [2**39]


@given(st.integers(1, 8), st.slices(8))
def test_a_basic_index_means_the_rows(capacity, index):
    buffer = np.arange(capacity)
    rows = find_rows(index, capacity)
    assert buffer[basic_index(rows)].tolist() == list(rows) == buffer[index].tolist()
