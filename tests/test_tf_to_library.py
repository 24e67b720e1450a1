from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from anystore import Storage, to_library
from tests.items import SPEC, assert_same, batch
from tests.test_to_library import aligned

tf = pytest.importorskip("tensorflow")


class TestTensorflow:
    @pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64"])
    def test_memory_is_shared(self, dtype):
        array = aligned([[1, 2], [3, 4]], dtype)
        tensor = to_library({"x": array}, "tensorflow")["x"]
        assert tensor.dtype == dtype
        array[0, 1] = 7
        assert tensor.numpy()[0, 1] == 7

    def test_a_device_is_left_to_tensorflow(self):
        with pytest.raises(ValueError, match="expected no device= for tensorflow"):
            to_library({"x": np.arange(3)}, "tensorflow", device="cpu")

    def test_the_library_s_own(self):
        tensor = tf.constant([1, 2])
        assert to_library(tensor, "tensorflow") is tensor
        assert to_library(tensor, "tensorflow", copy=True) is not tensor

    @pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
    def test_what_has_no_memory_of_its_numbers(self, library):
        for tensor in (tf.sparse.from_dense([1, 0]), tf.ragged.constant([[1], [2, 3]])):
            for copy in (False, None, True):
                with pytest.raises(ValueError, match="^x: .*(Python objects|cannot be read into NumPy)"):
                    to_library({"x": tensor}, library, copy=copy)

    def test_jax_shares_its_memory(self):
        tensor = tf.constant(np.arange(64, dtype=np.float32))
        found = to_library({"x": tensor}, "jax")["x"]
        assert found.tolist() == tensor.numpy().tolist()

    @pytest.mark.parametrize(
        ("array", "text"),
        [
            (aligned([1, 0], "bool"), "TypeError: TensorFlow takes no bool by DLPack"),
            (aligned(range(6), offset=4), "its address is not a multiple of 64"),
            (aligned(range(6))[::-1], "it has negative strides"),
            (aligned(range(6)).reshape(3, 2).T, "it is not C-contiguous"),
        ],
        ids=["bool", "unaligned", "negative", "transposed"],
    )
    def test_what_cannot_be_shared(self, array, text):
        with pytest.raises(
            ValueError, match=f"^x: tensorflow cannot share the memory of this array: {text}; pass copy="
        ):
            to_library({"x": array}, "tensorflow")
        for copy in (None, True):
            assert to_library(array, "tensorflow", copy=copy).numpy().tolist() == array.tolist()

    def test_batches(self):
        store = Storage(SPEC, 100)
        store.set(..., batch(np.arange(100)))
        for index in (np.arange(64), 3, slice(5, 9)):
            assert_same(to_library(store.get(index), "tensorflow", copy=None), batch(np.arange(100)[index]))

    def test_no_array_ends_the_process(self):
        program = """
import numpy as np
from anystore import to_library
memory = np.zeros(4096, np.uint8)
for offset in range(0, 128, 4):
    array = memory[offset : offset + 48].view(np.float32)
    assert to_library(array, "tensorflow", copy=None).numpy().tolist() == array.tolist()
"""
        subprocess.run([sys.executable, "-c", program], check=True)
