from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from anystore import ArraySpec, Storage, handover, to_library
from anystore.convert import on_gpu, to_numpy
from anystore.handover import hand_over_batch
from anystore.replay import ReplayBuffer
from tests.items import SPEC, assert_same, batch
from tests.stand_in import installed


def memory(nbytes: int, offset: int) -> np.ndarray:
    """Memory that starts so many bytes past a multiple of 64."""
    whole = np.zeros(nbytes + 128, np.uint8)
    start = -whole.ctypes.data % 64 + offset
    return whole[start : start + nbytes]


def aligned(values: object, dtype: str = "float32", offset: int = 0) -> np.ndarray:
    values = np.asarray(values, ArraySpec((), dtype).dtype)
    array = memory(values.nbytes, offset).view(values.dtype).reshape(values.shape)
    array[...] = values
    return array


LIBRARIES = ["torch", "jax"]


def on_two_devices_of_jax(program: str) -> str:
    """What a program prints that has another device of JAX."""
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    return subprocess.check_output([sys.executable, "-c", program], text=True, env=environment)


class TestToLibrary:
    def test_unknown(self):
        with pytest.raises(
            ValueError, match="expected a library among numpy, torch, jax, tensorflow, cupy, found 'nunpy'"
        ):
            to_library({}, "nunpy")

    def test_not_installed(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "torch", None)
        with pytest.raises(ImportError, match="handing arrays over to torch needs it, and it cannot be imported"):
            to_library({}, "torch")

    def test_what_is_left_out_of_a_sample(self):
        buffer = ReplayBuffer(ArraySpec((), "float32"), 4, seed=0)
        buffer.extend(np.arange(4, dtype=np.float32))
        sample = buffer.sample(3)
        found = to_library(sample, "numpy")
        assert (found.weights, found.mask) == (None, None)
        assert found.items is sample.items

    def test_what_is_no_array(self):
        with pytest.raises(ValueError, match=r"^a/b: expected an array, found a float: 1.5$"):
            to_library({"a": {"b": 1.5}}, "numpy")

    @pytest.mark.parametrize("copy", [False, None])
    def test_the_library_s_own_are_returned_as_they_are(self, copy):
        array = np.zeros(3)
        assert to_library([array], "numpy", copy=copy)[0] is array
        torch = pytest.importorskip("torch")
        tensor = torch.zeros(3)
        assert to_library([tensor], "torch", copy=copy)[0] is tensor

    @pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
    def test_the_library_s_own_are_copied_on_demand(self, library):
        pytest.importorskip(library)
        array = to_library(aligned([1, 2, 3]), library, copy=True)
        again = to_library(array, library, copy=True)
        assert again is not array
        assert to_numpy(again).tolist() == [1, 2, 3]
        assert not np.shares_memory(to_numpy(array), to_numpy(again))

    @pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
    @pytest.mark.parametrize("backend", ["numpy", "torch", "jax", "array_api_strict"])
    def test_batches_of_every_backend(self, backend, library):
        pytest.importorskip(library)
        pytest.importorskip(backend)
        store = Storage(SPEC, 100, backend=backend, device="cpu")
        store.set(..., batch(np.arange(100)))
        for index in (np.arange(64), 3, slice(5, 9)):
            assert_same(to_library(store.get(index), library, copy=None), batch(np.arange(100)[index]))
            assert_same(to_library(store.get(index), library, copy=True), batch(np.arange(100)[index]))

    def test_the_nest_stays_what_it_was(self):
        found = to_library(batch([1, 2]), "numpy", copy=True)
        assert_same(found, batch([1, 2]))

    @pytest.mark.parametrize("library", LIBRARIES)
    @pytest.mark.parametrize("dtype", ["bool", "uint8", "int8", "int16", "int32", "float16", "float32", "complex64"])
    def test_memory_is_shared(self, library, dtype):
        pytest.importorskip(library)
        array = aligned([[1, 0], [1, 1]], dtype)
        taken = to_library({"x": array}, library)["x"]
        assert to_numpy(taken).dtype == array.dtype
        array[0, 1] = 1
        assert to_numpy(taken)[0, 1] == 1
        back = to_library(taken, "numpy")
        assert np.shares_memory(back, array)

    @pytest.mark.parametrize("library", LIBRARIES)
    @pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2)])
    def test_small_shapes(self, library, shape):
        pytest.importorskip(library)
        array = aligned(np.ones(shape))
        assert to_library(array, library).shape == shape
        assert to_library(array, library, copy=True).shape == shape

    @pytest.mark.parametrize("dtype", ["bfloat16", "float8_e5m2"])
    def test_extension_types(self, dtype):
        torch = pytest.importorskip("torch")
        array = aligned([1.5, -2.0], dtype)
        tensor = to_library(array, "torch")
        assert tensor.dtype == getattr(torch, dtype)
        tensor[0] = 3
        assert array.tolist() == [3, -2]
        assert np.shares_memory(to_library(tensor, "numpy"), array)
        assert to_library(array, "torch", copy=True).tolist() == [3, -2]
        assert array.dtype == to_library(tensor, "numpy").dtype

    @pytest.mark.parametrize("copy", [False, None, True])
    def test_extension_types_that_torch_lacks(self, copy):
        pytest.importorskip("torch")
        with pytest.raises(ValueError, match="^a: torch has no float8_e3m4; choose another dtype or another library"):
            to_library({"a": aligned([1.5], "float8_e3m4")}, "torch", copy=copy)

    def test_single_numbers_are_copied_on_demand_only(self):
        torch = pytest.importorskip("torch")
        with pytest.raises(ValueError, match="it is a single number of NumPy's, which has no memory to share; pass"):
            to_library(np.float32(1.5), "torch")
        assert to_library(np.float32(1.5), "torch", copy=None).equal(torch.tensor(1.5))

    def refuse(self, leaf: object, library: str, text: str) -> None:
        with pytest.raises(
            ValueError, match=f"^a/b: {library} cannot share the memory of this array: {text}; pass copy="
        ):
            to_library({"a": {"b": leaf}}, library)
        for copy in (None, True):
            found = to_library({"a": {"b": leaf}}, library, copy=copy)["a"]["b"]
            np.testing.assert_array_equal(to_numpy(found), to_numpy(leaf))

    @pytest.mark.parametrize("library", LIBRARIES)
    def test_negative_strides_are_refused(self, library):
        pytest.importorskip(library)
        self.refuse(aligned(range(6))[::-1], library, "it has negative strides")
        self.refuse(aligned(range(6)).reshape(3, 2)[:, ::-1], library, "it has negative strides")

    def test_torch_takes_other_strides(self):
        torch = pytest.importorskip("torch")
        array = np.arange(12).reshape(3, 4)
        tensor = to_library(array.T[::2], "torch")
        assert isinstance(tensor, torch.Tensor)
        tensor[0, 0] = 50
        assert array[0, 0] == 50

    def test_jax_takes_no_strides(self):
        pytest.importorskip("jax")
        self.refuse(aligned(range(6)).reshape(3, 2).T, "jax", "it is not C-contiguous")
        self.refuse(aligned(range(6))[::2], "jax", "it is not C-contiguous")

    @pytest.mark.parametrize("offset", [4, 16, 32])
    def test_jax_takes_no_unaligned_memory(self, offset):
        pytest.importorskip("jax")
        self.refuse(aligned(range(6), offset=offset), "jax", "its address is not a multiple of 64")

    def test_jax_takes_read_only_memory_and_leaves_it_so(self):
        jax = pytest.importorskip("jax")
        array = aligned(range(6))
        array.flags.writeable = False
        taken = to_library(array, "jax")
        assert np.shares_memory(to_library(taken, "numpy"), array)
        given_away = jax.jit(lambda values: values + 1, donate_argnums=0)(taken)
        assert given_away.tolist() == [1, 2, 3, 4, 5, 6]
        assert array.tolist() == [0, 1, 2, 3, 4, 5]

    @pytest.mark.parametrize("dtype", ["bfloat16", "float8_e5m2", "float8_e4m3fn"])
    def test_jax_takes_extension_types(self, dtype):
        pytest.importorskip("jax")
        array = aligned([1.5, -2.0], dtype)
        taken = to_library(array, "jax")
        assert taken.dtype == array.dtype
        array[0] = 3
        assert to_numpy(taken).tolist() == [3, -2]

    def test_jax_shares_within_a_transformation(self):
        jax = pytest.importorskip("jax")
        array = aligned(range(3))
        shared = jax.jit(lambda: np.shares_memory(to_numpy(to_library(array, "jax")), array))()
        assert bool(shared)

    def test_torch_takes_no_read_only_memory(self):
        torch = pytest.importorskip("torch")
        array = aligned(range(6))
        array.flags.writeable = False
        self.refuse(array, "torch", "it is read-only, and a tensor is not")
        assert to_library(array, "torch", copy=None).add_(torch.ones(6)).tolist() == [1, 2, 3, 4, 5, 6]

    @pytest.mark.parametrize("copy", [False, None, True])
    @pytest.mark.parametrize("library", ["numpy", *LIBRARIES])
    def test_a_spec_is_no_array(self, library, copy):
        pytest.importorskip(library)
        with pytest.raises(ValueError, match="^x: .*ArraySpec is read by NumPy as an array of Python objects"):
            to_library({"x": ArraySpec((64,), "float32")}, library, copy=copy)

    @pytest.mark.parametrize("copy", [False, None, True])
    @pytest.mark.parametrize("dtype", ["int64", "float64", "complex128", ">i8", ">f8"])
    def test_jax_narrows_nothing(self, dtype, copy):
        pytest.importorskip("jax")
        with pytest.raises(ValueError, match=f"^x: JAX narrows {dtype}; call jax.config.update"):
            to_library({"x": aligned([1, 2], dtype)}, "jax", copy=copy)

    def test_torch_tensors_that_are_not_what_is_in_memory(self):
        torch = pytest.importorskip("torch")
        tensor = torch.tensor([1 + 2j, 3 - 1j], dtype=torch.complex64).conj()
        self.refuse(tensor, "numpy", "BufferError: .*")
        negative = tensor.imag
        assert negative.is_neg()
        self.refuse(negative, "numpy", "it is the negative of what is in its memory")
        assert to_library(negative, "numpy", copy=None).tolist() == [-2, 1]
        for dtype in (torch.float32, torch.bfloat16):
            self.refuse(torch.ones(3, dtype=dtype, requires_grad=True), "numpy", "it requires gradients")

    def test_jax_takes_no_tensors_that_are_not_what_is_in_memory(self):
        torch = pytest.importorskip("torch")
        pytest.importorskip("jax")
        self.refuse(torch.ones(16, dtype=torch.complex64).conj(), "jax", "BufferError: .*")
        self.refuse(torch.ones(16, requires_grad=True), "jax", "it requires gradients")

    def test_what_no_library_has(self):
        pytest.importorskip("torch")
        for array in (np.zeros(3, "S3"), np.zeros(3, "M8[ns]")):
            with pytest.raises(ValueError, match="^the item: torch cannot share the memory of this array: BufferError"):
                to_library(array, "torch")
            with pytest.raises(ValueError, match="^x: torch cannot hold .*"):
                to_library({"x": array}, "torch", copy=True)

    def test_a_device(self):
        torch = pytest.importorskip("torch")
        found = to_library({"x": np.arange(3)[::-1]}, "torch", device="cpu")
        assert found["x"].device == torch.device("cpu")
        assert found["x"].tolist() == [2, 1, 0]
        with pytest.raises(ValueError, match="torch has no device 'cuda:77' here; there are: cpu"):
            to_library({"x": np.arange(3)}, "torch", device="cuda:77")

    def test_a_device_of_jax(self):
        pytest.importorskip("jax")
        program = textwrap.dedent(
            """
            import numpy as np
            from anystore import ArraySpec, to_library
            from anystore.replay import ReplayBuffer
            found = to_library({"x": np.arange(3, dtype=np.int32)}, "jax", device="cpu:1")
            buffer = ReplayBuffer({"x": ArraySpec((2,), "float32")}, 10, seed=0)
            buffer.extend({"x": np.ones((10, 2), np.float32)})
            (sample,) = buffer.batches(4, to="jax", device="cpu:1", count=1)
            for array in (found["x"], sample.items["x"]):
                (device,) = array.devices()
                print(device.id, array.shape, type(sample.rows).__name__)
            """
        )
        assert on_two_devices_of_jax(program) == "1 (3,) ndarray\n1 (4, 2) ndarray\n"

    def test_what_goes_to_another_device_of_jax_is_copied_at_once(self):
        pytest.importorskip("jax")
        program = """
            import numpy as np
            from anystore import to_library
            array = np.ones(30_000_000, np.float32)
            taken = to_library(array, "jax", device="cpu:1")
            array[...] = 0
            print(taken.min())
            """
        assert on_two_devices_of_jax(textwrap.dedent(program)) == "1.0\n"

    def test_the_byte_order_of_what_goes_to_another_device_of_jax(self):
        pytest.importorskip("jax")
        program = """
            import numpy as np
            from anystore import to_library
            print(to_library(np.arange(3, dtype=">i4"), "jax", device="cpu:1"))
            """
        assert on_two_devices_of_jax(textwrap.dedent(program)) == "[0 1 2]\n"

    def test_a_copy_in_jax_is_not_searched_for_nan(self):
        jax = pytest.importorskip("jax")
        array = aligned([np.nan, 1.5])
        with jax.debug_nans(True):
            assert_same(to_library(array, "jax", copy=True), array)

    @pytest.mark.parametrize("owner", ["numpy", "torch"])
    def test_python_may_end_while_jax_works_on_shared_memory(self, owner):
        pytest.importorskip("jax")
        pytest.importorskip(owner)
        program = f"""
            import jax
            import numpy as np
            from anystore import to_library
            memory = np.zeros(4_000_064, np.uint8)
            start = -memory.ctypes.data % 64
            array = to_library(memory[start:][:4_000_000].view(np.float32), "{owner}")
            taken = to_library(array, "jax")
            summed = jax.jit(lambda values: jax.numpy.sin(values) @ jax.numpy.ones(1_000_000)).lower(taken).compile()
            summed(taken)
            del memory, array, taken
            """
        assert on_two_devices_of_jax(textwrap.dedent(program)) == ""

    def test_big_endian(self):
        pytest.importorskip("torch")
        self.refuse(np.arange(3, dtype=">i4"), "torch", "BufferError: .*byte order.*")

    def test_big_endian_in_jax(self):
        pytest.importorskip("jax")
        self.refuse(aligned(range(3), ">i4"), "jax", "TypeError: .*")


class TestBatchesForJax:
    """Of which the small arrays are copied, all in one call, and the others are shared."""

    @pytest.fixture(autouse=True)
    def _jax(self):
        self.jax = pytest.importorskip("jax")

    def test_small_arrays_are_copied_and_large_ones_shared(self):
        small, large = aligned([1.5, 2.5]), aligned(np.arange(300_000))
        own = self.jax.numpy.ones(2)
        found = hand_over_batch({"a": small, "b": large, "c": None, "d": [own, small]}, "jax")
        assert found["c"] is None
        assert found["d"][0] is own
        assert isinstance(found["a"], self.jax.Array)
        assert not np.shares_memory(to_numpy(found["a"]), small)
        assert np.shares_memory(to_numpy(found["b"]), large)
        assert_same(found["a"], small)
        assert_same(found["b"], large)
        assert_same(found["d"][1], small)

    @pytest.mark.parametrize("copy", [False, True])
    def test_memory_is_shared_or_not_on_demand(self, copy):
        for array in (aligned([1.5, 2.5]), aligned(np.arange(300_000))):
            found = hand_over_batch([array], "jax", copy=copy)[0]
            assert np.shares_memory(to_numpy(found), array) is not copy

    @pytest.mark.parametrize("dtype", ["bool", "uint8", "int32", ">i4", "float16", "complex64", "bfloat16", "int4"])
    def test_dtypes(self, dtype):
        array = aligned([[1, 0], [1, 1]], dtype)
        found = hand_over_batch({"x": array, "y": array[0], "z": array[0, 0]}, "jax")
        native = array.astype(array.dtype.newbyteorder("="))
        assert_same(found, {"x": native, "y": native[0], "z": native[0, 0]})

    def test_what_jax_would_narrow_is_refused(self):
        with pytest.raises(ValueError, match="^b: JAX narrows int64; call jax.config.update"):
            hand_over_batch({"a": aligned([1.5]), "b": np.arange(3)}, "jax")
        with self.jax.enable_x64(True):
            assert hand_over_batch({"b": np.arange(3)}, "jax")["b"].dtype == np.int64

    def test_tensors_are_handed_over_as_they_read(self):
        torch = pytest.importorskip("torch")
        tensors = {
            "gradients": torch.ones(3, requires_grad=True),
            "negative": torch.tensor([1 + 2j, 3 - 1j], dtype=torch.complex64).conj().imag,
            "strided": torch.arange(6, dtype=torch.float32)[::2],
            "extension": torch.arange(6).to(torch.bfloat16),
        }
        found = hand_over_batch(tensors, "jax")
        assert_same(found, {name: to_numpy(tensor) for name, tensor in tensors.items()})

    def test_within_a_transformation(self):
        sums = self.jax.jit(lambda: sum(self.jax.numpy.sum(leaf) for leaf in hand_over_batch([np.ones(3, "f")], "jax")))
        assert sums() == 3

    def test_not_a_number_is_handed_over_whatever_jax_looks_for(self):
        with self.jax.debug_nans(True):
            assert np.isnan(hand_over_batch([np.full(3, np.nan, "f")], "jax")[0]).all()

    def test_a_device(self):
        program = """
            import numpy as np
            from anystore.handover import hand_over_batch
            found = hand_over_batch([np.arange(3, dtype="i"), np.zeros(300_000, "f")], "jax", device="cpu:1")
            print(found[0], [device.id for leaf in found for device in leaf.devices()])
            """
        assert on_two_devices_of_jax(textwrap.dedent(program)) == "[0 1 2] [1, 1]\n"


class TestCupyOnAStandIn:
    @pytest.fixture(autouse=True)
    def _installed(self, monkeypatch):
        with installed(monkeypatch) as self.cupy:
            yield

    def test_main_memory_is_copied_on_demand_only(self):
        with pytest.raises(
            ValueError, match="^x: cupy cannot share the memory of this array: it is in main memory; pass"
        ):
            to_library({"x": np.arange(3)}, "cupy")
        assert to_library({"x": np.arange(3)}, "cupy", copy=None)["x"].get().tolist() == [0, 1, 2]

    def test_a_gpu_is_not_main_memory(self):
        array = self.cupy.asarray(np.arange(3))
        with pytest.raises(
            ValueError, match="^x: numpy cannot share the memory of this array: it is in the memory of a GPU"
        ):
            to_library({"x": array}, "numpy")
        for copy in (None, True):
            found = to_library({"x": array}, "numpy", copy=copy)["x"]
            assert type(found) is np.ndarray
            assert found.tolist() == [0, 1, 2]
        assert to_library(array, "cupy") is array
        assert to_library(array, "cupy", copy=True) is not array

    def test_a_device_is_where_all_of_it_is_then(self):
        with self.cupy.cuda.Device(1):
            there = self.cupy.asarray(np.arange(2))
        nest = {"host": np.arange(3), "here": self.cupy.asarray(np.arange(4)), "there": there, "none": None}
        for copy in (False, None):
            found = to_library(nest, "cupy", device="cuda:1", copy=copy)
            assert [found[key].device.id for key in ("host", "here", "there")] == [1, 1, 1]
            assert [found[key].get().tolist() for key in ("host", "here")] == [[0, 1, 2], [0, 1, 2, 3]]
            assert found["there"] is there
            assert found["none"] is None
        assert to_library(nest, "cupy", device="cuda:1", copy=True)["there"] is not there


def test_no_array_ends_the_process():
    """What aborts where it is handed over as it is."""
    pytest.importorskip("torch")
    program = """
import numpy as np
from anystore import to_library
array = np.arange(12.0, dtype=np.float32).reshape(3, 4)
for leaf in (array[::-1], array[:, ::-1], array[::-1, ::2], array[:0, ::-1], array[:1, ::-1]):
    assert to_library(leaf, "torch", copy=None).tolist() == leaf.tolist()
"""
    subprocess.run([sys.executable, "-c", program], check=True)


class TestWhereAnArrayOnAGpuLies:
    """By what the libraries say of it, which is not always what CUDA's interface says."""

    @pytest.mark.parametrize("dtype", ["float8_e4m3fn", "bfloat16", "float32"])
    @pytest.mark.parametrize("library", LIBRARIES)
    def test_without_that_interface(self, library, dtype, monkeypatch):
        pytest.importorskip("ml_dtypes")
        pytest.importorskip(library)
        array = to_library(aligned(np.arange(6).reshape(2, 3), dtype), library, copy=None)
        expected = handover._layout(array)
        monkeypatch.setattr(handover, "on_gpu", lambda _: True)
        found = handover._layout(array)
        assert (found.address, found.contiguous) == (expected.address, True)
        assert library == "jax" or found.strides == expected.strides

    def test_an_interface_that_raises_whatever_it_likes(self):
        class Sharded:
            @property
            def __cuda_array_interface__(self):
                raise KeyError("float8_e4m3fn")

        assert not on_gpu(Sharded())
