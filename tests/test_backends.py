from __future__ import annotations

import copy
import errno
import importlib.util
import json
import os
import pickle
import subprocess
import sys
import textwrap
import types

import numpy as np
import pytest

import anystore.backends
from anystore import ArraySpec, Storage, available_backends, select_backend
from anystore.backends.base import parse_device, resolve_device
from anystore.backends.numpy import NumpyBackend
from anystore.convert import to_numpy
from anystore.replay import Prioritized, ReplayBuffer
from tests import stand_in


class TestSelectBackend:
    def test_default(self):
        backend = select_backend()
        assert (backend.name, backend.device) == ("numpy", "cpu")
        assert backend.xp.__name__ == "array_api_compat.numpy"
        assert repr(backend) == "<anystore backend numpy on cpu>"

    def test_one_for_each_library_and_device(self):
        assert select_backend("numpy") is select_backend("numpy", "cpu") is select_backend(np, "CPU")
        assert select_backend(select_backend("numpy")) is select_backend("numpy")
        assert select_backend(select_backend("numpy"), "cpu") is select_backend("numpy")

    @pytest.mark.parametrize(
        ("name", "module"),
        [("torch", "array_api_compat.torch"), ("jax", "jax.numpy"), ("array_api_strict", "array_api_strict")],
    )
    def test_by_name_module_array_and_backend(self, name, module):
        library = pytest.importorskip(name)
        backend = select_backend(name, "cpu")
        assert backend.name == name
        assert backend.xp.__name__ == module
        assert select_backend(library, "cpu") is backend
        assert select_backend(backend.xp, "cpu") is backend
        assert select_backend(backend.from_numpy(np.zeros(3, np.float32))) is backend
        assert pickle.loads(pickle.dumps(backend)) is backend
        assert copy.deepcopy(backend) is backend

    def test_numpy_by_module_and_array(self):
        import array_api_compat.numpy

        for what in (np, array_api_compat.numpy, np.zeros(3), np.float32(1)):
            assert select_backend(what) is select_backend("numpy")

    def test_devices_of_the_library(self):
        torch = pytest.importorskip("torch")
        jax = pytest.importorskip("jax")
        strict = pytest.importorskip("array_api_strict")
        assert select_backend("torch", torch.device("cpu")) is select_backend("torch", "cpu")
        assert select_backend("jax", jax.devices("cpu")[0]) is select_backend("jax", "cpu")
        assert select_backend(strict, strict.Device("device1")) is select_backend("array_api_strict", "device1")
        on_device = strict.asarray([1], device=strict.Device("device2"))
        assert select_backend(on_device) is select_backend("array_api_strict", "device2")

    def test_any_namespace_of_the_standard(self, monkeypatch):
        strict = pytest.importorskip("array_api_strict")
        own = types.ModuleType("own_arrays")
        own.__dict__.update({name: getattr(strict, name) for name in strict.__all__})
        own.__array_namespace_info__ = strict.__array_namespace_info__
        monkeypatch.setitem(__import__("sys").modules, "own_arrays", own)
        store = Storage(ArraySpec((2,), "float32"), 3, backend=own)
        store.set([0, 2], [[1, 2], [3, 4]])
        assert store.backend.name == "own_arrays"
        assert np.from_dlpack(store.get(2)).tolist() == [3, 4]

    def test_unknown_name(self):
        with pytest.raises(
            ValueError, match="unknown backend 'nunpy'; there are: auto, numpy, cupy, torch, jax, array_api"
        ):
            select_backend("nunpy")

    @pytest.mark.parametrize("what", [3, None, object(), [1]], ids=["int", "none", "object", "list"])
    def test_no_backend_at_all(self, what):
        with pytest.raises(
            TypeError, match="expected the name of a backend, an array-API namespace, an array or a Backend"
        ):
            select_backend(what)

    def test_missing_library(self, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "torch", None)
        with pytest.raises(ImportError, match=r"'torch' needs a package .*; pip install 'anystore\[torch\]'"):
            select_backend("torch")

    @pytest.mark.parametrize("device", ["cuda", "cuda:7", "gpu:0", "cpu:3", "tpu"])
    def test_device_that_is_not_there(self, device):
        with pytest.raises(ValueError, match=f"NumPy has no device '{device}' here; there are: cpu"):
            select_backend("numpy", device)

    def test_device_spelled_wrong(self):
        with pytest.raises(ValueError, match="such as 'cpu', 'cuda' or 'cuda:1', found 'cuda-1'; NumPy has: cpu"):
            select_backend("numpy", "cuda-1")

    def test_another_device_than_the_backend_has(self, monkeypatch):
        with stand_in.installed(monkeypatch):
            backend = select_backend("cupy", "cuda:1")
            assert select_backend(backend, "gpu:1") is backend
            with pytest.raises(
                ValueError, match="expected the device of the backend, 'cuda:1', or none, found 'cuda:0'"
            ):
                select_backend(backend, "cuda:0")

    def test_the_device_of_a_backend_of_ones_own(self):
        backend = NumpyBackend()
        assert select_backend(backend, "cpu") is backend


class TestCupyOnAStandIn:
    @pytest.fixture(autouse=True)
    def _installed(self, monkeypatch):
        with stand_in.installed(monkeypatch) as self.cupy:
            yield

    def test_auto_takes_it(self):
        assert select_backend("auto").name == "cupy"
        assert select_backend("auto", "cuda:1").device == "cuda:1"
        assert select_backend("auto", "cpu").name == "numpy"

    def test_devices(self):
        assert select_backend("cupy").device == "cuda:0"
        with self.cupy.cuda.Device(1):
            assert select_backend("cupy").device == "cuda:1"
        assert select_backend("cupy", self.cupy.cuda.Device(1)) is select_backend("cupy", "gpu:1")
        assert select_backend(self.cupy.asarray([1])).device == "cuda:0"
        with pytest.raises(ValueError, match="CuPy has no device 'cuda:2' here; there are: cuda:0, cuda:1"):
            select_backend("cupy", "cuda:2")
        with pytest.raises(ValueError, match="CuPy has no device 'cpu' here"):
            select_backend("cupy", "cpu")

    def test_no_device(self, monkeypatch):
        monkeypatch.setattr(self.cupy.cuda, "is_available", lambda: False)
        assert select_backend("auto").name == "numpy"
        with pytest.raises(ValueError, match="no CUDA device can be used here"):
            select_backend("cupy")
        (info,) = (info for info in available_backends() if info.name == "cupy")
        assert not info.usable
        assert info.reason == "no CUDA device can be used here"

    def test_values_from_the_other_device(self):
        store = Storage(ArraySpec((), "int32"), 3, backend="cupy", device="cuda:1")
        store.set([0, 1, 2], self.cupy.asarray([1, 2, 3], np.int32))
        assert store.get(...).get().tolist() == [1, 2, 3]


class TestAvailableBackends:
    def test_tells_of_each(self):
        infos = {info.name: info for info in available_backends()}
        assert list(infos) == ["numpy", "cupy", "torch", "jax", "array_api_strict"]
        assert infos["numpy"].usable
        assert infos["numpy"].version == np.__version__
        assert infos["numpy"].devices == ("cpu",)
        for info in infos.values():
            assert info.usable == (info.reason == "")
            assert info.usable == bool(info.devices)
            for device in info.devices:
                assert select_backend(info.name, device).device == device

    def test_tells_how_to_get_what_is_missing(self, monkeypatch):
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "jax" else find(name))
        (info,) = (info for info in available_backends() if info.name == "jax")
        assert info == anystore.BackendInfo("jax", False, "not installed: pip install 'anystore[jax]'", None, ())

    def test_tells_what_is_broken(self, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "array_api_strict", None)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
        (info,) = (info for info in available_backends() if info.name == "array_api_strict")
        assert not info.usable
        assert info.reason.startswith("cannot be imported: ")
        assert info.version is None

    def test_tells_that_devices_cannot_be_listed(self, monkeypatch):
        monkeypatch.setattr(NumpyBackend, "devices", lambda: [][0])
        (info,) = (info for info in available_backends() if info.name == "numpy")
        assert info == anystore.BackendInfo(
            "numpy", False, "its devices cannot be listed: list index out of range", np.__version__, ()
        )


class TestDevices:
    def test_parse(self):
        assert parse_device("cuda:1") == ("cuda", 1)
        assert parse_device("GPU") == ("cuda", None)
        assert parse_device(" cpu ") == ("cpu", None)

    def test_resolve(self):
        devices = ["cpu", "cuda:0", "cuda:1"]
        for spelled, meant in {"gpu": "cuda:0", "gpu:1": "cuda:1", "cpu:0": "cpu", "cpu": "cpu"}.items():
            assert resolve_device(spelled, devices, "x") == meant
        with pytest.raises(ValueError, match="x has no device 'cuda' here; there are: none"):
            resolve_device("cuda", [], "x")


class TestDisk:
    ROWS = 1100
    SPEC = ArraySpec((4096,), "uint8")  # of 4 MiB and more

    @pytest.fixture
    def options(self, tmp_path):
        return {"device": f"disk:{tmp_path}"}

    def test_large_buffers_are_in_files_that_leave_nothing_behind(self, tmp_path, options):
        store = Storage({"large": self.SPEC, "small": ArraySpec((), "int8")}, self.ROWS, **options)
        store.set(..., {"large": np.ones(4096, np.uint8), "small": 1})
        with open("/proc/self/maps", encoding="ascii") as lines:
            mapped = [line for line in lines if str(tmp_path) in line]
        assert len(mapped) == 1
        assert mapped[0].rstrip().endswith("(deleted)")
        assert os.listdir(tmp_path) == []
        assert store.get(1099)["large"].sum() == 4096

    def test_a_full_disk_is_found_before_anything_is_written(self, tmp_path, options, monkeypatch):
        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(MemoryError, match=r"^the item: 4,505,600 bytes cannot be allocated on disk:.*No space"):
            Storage(self.SPEC, self.ROWS, **options)
        assert os.listdir(tmp_path) == []

    def test_warns_of_what_the_disk_has_not(self, options, monkeypatch):
        monkeypatch.setattr(os, "statvfs", lambda _: types.SimpleNamespace(f_bavail=10, f_frsize=100))
        with pytest.warns(RuntimeWarning, match=r"4,505,600 bytes when it is full; 1,000 bytes are free on disk:"):
            Storage(self.SPEC, self.ROWS, **options)

    def test_a_directory_that_is_gone(self, tmp_path):
        directory = tmp_path / "gone"
        directory.mkdir()
        backend = select_backend("numpy", f"disk:{directory}")
        directory.rmdir()
        with pytest.raises(MemoryError, match=r"^the item: 4,505,600 bytes cannot be allocated on disk:.*No such file"):
            Storage(self.SPEC, self.ROWS, backend=backend)

    def test_is_one_backend_for_each_directory(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        backend = select_backend("numpy", f"disk:{tmp_path}")
        assert backend is select_backend("numpy", "disk:.") is select_backend(backend)
        assert backend is select_backend("auto", f" Disk:{tmp_path}")
        assert backend is not select_backend("numpy")
        assert pickle.loads(pickle.dumps(backend)) is backend

    @pytest.mark.parametrize("device", ["disk:", "disk:/nowhere"])
    def test_refuses_what_is_no_directory(self, device):
        with pytest.raises(ValueError, match="expected 'disk:' and a directory that is there, found 'disk:"):
            select_backend("numpy", device)

    def test_a_snapshot_goes_there_and_back(self, tmp_path, options):
        buffer = ReplayBuffer(self.SPEC, self.ROWS, sampler=Prioritized(), seed=0, **options)
        buffer.extend(np.arange(2000 * 4096).reshape(2000, 4096).astype(np.uint8))
        buffer.save(tmp_path / "snapshot")
        buffer.extend(np.ones((3, 4096), np.uint8))
        buffer.save(tmp_path / "snapshot")
        manifest = json.loads((tmp_path / "snapshot" / "manifest.json").read_text())
        assert [layer["count"] for layer in manifest["storages"]["items"]["layers"]] == [1100, 3]
        expected = buffer.sample(64)
        for device in ("cpu", options["device"]):
            found = anystore.load(tmp_path / "snapshot", device=device)
            assert found.device == device
            sample = found.sample(64)
            assert (sample.rows == expected.rows).all()
            assert (sample.items == expected.items).all()


class TestJax:
    @pytest.fixture
    def store(self):
        pytest.importorskip("jax")
        store = Storage({"a": ArraySpec((2,), "float32"), "b": ArraySpec((), "int32")}, 4, backend="jax", device="cpu")
        store.set(..., {"a": np.ones((4, 2), np.float32), "b": np.arange(4, dtype=np.int32)})
        return store

    @pytest.mark.parametrize("write", ["rows", "slice", "rows on the device", "lent", "resize"])
    def test_64_bits_stay_64_bits_in_threads_that_do_not_ask_for_them(self, write):
        """As that of `ReplayBuffer.batches`: `jax.enable_x64`, as a context, is the business of one thread."""
        jax = pytest.importorskip("jax", minversion="0.8")
        numbers = np.arange(4) + 2**40
        with jax.enable_x64(True):
            store = Storage(
                {"i": ArraySpec((), "int64"), "f": ArraySpec((), "float64")}, 4, backend="jax", device="cpu"
            )
            store.set(..., {"i": numbers, "f": numbers / 3})
            own = {"i": jax.numpy.asarray(numbers[:2]), "f": jax.numpy.asarray(numbers[:2] / 3)}
        if write == "lent":
            store.buffers  # noqa: B018  # which XLA copies then
        if write == "resize":
            store.resize(5)
            store.resize(4)
        elif write == "rows on the device":
            store.set([0, 1], own)
        else:
            index = slice(0, 2) if write == "slice" else [0, 1]
            store.set(index, {"i": numbers[:2], "f": numbers[:2] / 3})
        for index in (..., [0, 1, 2, 3], np.arange(4)):
            found = store.get(index)
            assert to_numpy(found["i"]).tolist() == numbers.tolist()
            assert to_numpy(found["f"]).tolist() == (numbers / 3).tolist()
        assert int(store.get(3)["i"]) == numbers[3]

    @pytest.mark.parametrize("shared", [None, {"next_obs": "obs"}], ids=str)
    @pytest.mark.parametrize("how", [{}, {"n_step": 2}, {"num_steps": 2}], ids=str)
    def test_64_bits_stay_64_bits_in_batches(self, shared, how):
        """The thread that draws them has a setting of its own."""
        jax = pytest.importorskip("jax", minversion="0.8")
        number, numbers = ArraySpec((), "int64"), np.arange(50) + 2**40
        spec = {
            "obs": number,
            "next_obs": number,
            "reward": ArraySpec((), "float32"),
            "terminated": ArraySpec((), "bool"),
        }
        with jax.enable_x64(True):
            buffer = ReplayBuffer(spec, 50, shared=shared, backend="jax", seed=0)
            zeros = {"reward": np.zeros(50, np.float32), "terminated": np.zeros(50, bool)}
            buffer.extend({"obs": numbers, "next_obs": numbers + 1, **zeros})
            for to in (None, "jax"):
                for sample in buffer.batches(8, to=to, count=2, **how):
                    first = to_numpy(sample.items["obs"]).reshape(8, -1)[:, 0]
                    assert first.tolist() == numbers[to_numpy(sample.rows)].tolist()
                    assert (to_numpy(sample.items["next_obs"]) > 2**40).all()

    @pytest.mark.parametrize("index", [2, slice(1, 3), [3, 1, 3]], ids=str)
    def test_what_was_taken_stays_as_it_was_on_other_devices(self, store, index, monkeypatch):
        """Where XLA takes no array that somebody has a view of, the first write makes new ones."""
        monkeypatch.setattr(store.backend, "_is_host", False)
        lent, number = store.buffers, np.arange(4, dtype=np.int32)
        values = {"a": np.full((4, 2), 7, np.float32)[index], "b": (number + 10)[index]}
        store.set(index, values)
        assert lent["b"].tolist() == [0, 1, 2, 3]
        expected = number.copy()
        expected[index] += 0 if isinstance(index, list) else 10
        if isinstance(index, list):
            expected[[1, 3]] = [11, 13]
        assert store.get(...)["b"].tolist() == expected.tolist()
        own = store.get(...)
        store.set(
            index, {key: leaf[index if not isinstance(index, list) else np.array(index)] for key, leaf in own.items()}
        )
        assert store.get(...)["b"].tolist() == expected.tolist()

    def test_a_write_within_jit_is_refused(self, store):
        import jax

        @jax.jit
        def write(x):
            store.set(0, {"a": x, "b": 3})
            return x

        with pytest.raises(TypeError, match="cannot be written to within jax.jit"):
            write(jax.numpy.ones(2))
        assert store.get(...)["b"].tolist() == [0, 1, 2, 3]

    @pytest.mark.parametrize("library", ["numpy", "jax.numpy"])
    @pytest.mark.parametrize("index", [0, slice(0, 1), [0]], ids=str)
    def test_a_write_of_nothing_traced_is_refused_within_jit_alone(self, store, library, index):
        """It would be done once, when the function is traced; nothing of it is done."""
        import jax

        xp = importlib.import_module(library)
        value = {"a": xp.full(2, 7, dtype="float32"), "b": xp.asarray(7, dtype="int32")}

        def write(x):
            store.set(index, value)
            return x

        with pytest.raises(TypeError, match="cannot be written to within jax.jit"):
            jax.jit(write)(1.0)
        assert store.get(...)["b"].tolist() == [0, 1, 2, 3]
        jax.vmap(write)(jax.numpy.ones(3))
        assert store.get(...)["b"].tolist() == [7, 1, 2, 3]

    @pytest.mark.parametrize("index", [1, slice(0, 2), [2, 1, 1]], ids=str)
    def test_is_written_in_place_where_nobody_can_tell(self, store, index):
        def arrays():
            return [cell.array for cell in store._buffers]

        def is_new(write):
            before = arrays()
            write()
            return [array is not old for array, old in zip(arrays(), before)]

        jax_value, value = store.get(index), {"a": np.full((2,), 7, np.float32), "b": 7}
        store.set(0, store.get(0))  # the reads may be going on before it
        assert not any(is_new(lambda: store.set(index, jax_value)))
        assert not any(is_new(lambda: store.set(index, value)))
        store.get(slice(0, 3))
        assert all(is_new(lambda: store.set(index, value)))
        old = store.buffers
        assert all(is_new(lambda: store.set(index, jax_value)))
        assert all(array.is_deleted() for array in old.values())
        assert not any(is_new(lambda: store.set(index, value)))
        store.select("a").get(0)
        assert all(is_new(lambda: store.set(index, value)))
        store.select("b").buffers  # noqa: B018  # which hands it out
        assert is_new(lambda: store.select("a").set(index, value["a"])) == [True, False]

    @pytest.mark.parametrize("dtype", ["bool", "complex64", "float16", "bfloat16", "float8_e5m2", "int4"])
    def test_is_written_in_place_in_dtypes_of_whole_bytes(self, dtype):
        """Of the others XLA has several numbers in a byte."""
        pytest.importorskip("jax")
        store = Storage(ArraySpec((3,), dtype), 4, backend="jax", device="cpu")
        array = store._buffers[0].array
        value = np.array([[1, 0, 1], [0, 1, 1]], store.data_spec.dtype)
        store.set([1, 3], value)
        assert (store._buffers[0].array is array) == (dtype != "int4")
        assert (np.asarray(store.get([3, 1, 0])) == [value[1], value[0], np.zeros(3, value.dtype)]).all()
        store.set(0, store.get(3))
        assert (np.asarray(store.get(slice(0, 2))) == value[::-1]).all()

    @pytest.mark.parametrize("index", [1, slice(0, 2), [2, 1, 1]], ids=str)
    def test_a_write_waits_for_nothing(self, store, index, monkeypatch):
        """What is still computed, the value or the arrays, is written by XLA in its turn."""
        import anystore.backends.jax

        value, before = store.get(2), [cell.array for cell in store._buffers]
        store.set(3, store.get(3))
        monkeypatch.setattr(anystore.backends.jax, "_is_ready", lambda array: False)
        for _ in range(3):
            store.set(index, value)
            assert all(cell.array is not array for cell, array in zip(store._buffers, before))
            before = [cell.array for cell in store._buffers]
        assert set(store.get(index)["b"].reshape(-1).tolist()) == {2}

    @pytest.mark.parametrize("index", [1, slice(0, 2), [2, 1, 1]], ids=str)
    def test_a_value_can_be_given_away_once_it_is_written(self, store, index):
        import jax

        value = store.get(index)["a"]
        address = value.unsafe_buffer_pointer()
        store.set(0, store.get(0))
        store.set(index, {"a": value, "b": 3})
        doubled = jax.jit(lambda array: array * 2, donate_argnums=0)(value)
        assert doubled.unsafe_buffer_pointer() == address
        assert store.get(index)["a"].tolist() == np.ones(doubled.shape).tolist()

    @pytest.mark.parametrize("index", [1, slice(0, 2), [2, 1, 1]], ids=str)
    def test_what_was_deleted_is_refused(self, store, index):
        value = store.get(2)
        value["b"].delete()
        with pytest.raises(TypeError, match="^b: the array was deleted, as one that was given away"):
            store.set(index, value)
        assert store.get([0, 1, 2, 3])["b"].tolist() == [0, 1, 2, 3]

    def test_a_batch_that_was_deleted_costs_a_replay_buffer_nothing(self):
        jax = pytest.importorskip("jax")
        buffer = ReplayBuffer({"x": ArraySpec((), "int32")}, 8, backend="jax")
        buffer.extend({"x": np.arange(8, dtype=np.int32)})
        gone = jax.numpy.arange(8, dtype="int32")
        gone.delete()
        with pytest.raises(TypeError, match="^x: the array was deleted"):
            buffer.extend({"x": gone})
        assert buffer.size == 8

    @pytest.mark.parametrize("taken", [lambda store: store.buffers, lambda store: store.get(slice(0, 3))])
    def test_a_value_may_be_changed_before_xla_reads_it(self, taken):
        """It writes all leaves when the last of them is computed."""
        jax = pytest.importorskip("jax")

        @jax.jit
        def later(number, matrix):
            return number + 0 * jax.lax.fori_loop(0, 20, lambda _, power: power @ matrix * 1e-3, matrix)[0, 0]

        spec = {"a": ArraySpec((3,), "float32"), "b": ArraySpec((), "float32")}
        store = Storage(spec, 4, backend="jax", device="cpu")
        numbers, matrix = jax.numpy.arange(20, dtype="float32"), jax.numpy.ones((600, 600))
        for number in range(20):
            _ = taken(store)
            value = np.full(3, number, np.float32)
            store.set(number % 4, {"a": value, "b": later(numbers[number], matrix)})
            value[...] = -1
            assert store.get(number % 4)["a"].tolist() == [number] * 3

    @pytest.mark.parametrize("index", [0, [], slice(0, 0)], ids=str)
    def test_what_was_handed_out_stays_without_jit(self, store, index):
        """Also where nothing is written, and JAX gives back the arrays that it was given."""
        import jax

        old = store.buffers
        with jax.disable_jit():
            store.set(index, store.get(index))
        store.set(1, {"a": np.zeros(2, np.float32), "b": 7})
        assert old["b"].is_deleted() or old["b"].tolist() == [0, 1, 2, 3]
        assert store.get(...)["b"].tolist() == [0, 7, 2, 3]

    def test_large_reads_are_of_the_time_of_the_call(self):
        """Though XLA reads when it likes, and what is written after the call is written in place."""
        jax = pytest.importorskip("jax")
        store = Storage(ArraySpec((64, 64), "int32"), 64, backend="jax", device="cpu")
        for number in range(50):
            store.set(..., np.full((64, 64, 64), number, np.int32))
            found = [store.get(index) for index in (slice(0, 64), list(range(64)), 5)]
            for row in range(64):
                store.set(row, np.full((64, 64), -1, np.int32))
            assert all((jax.device_get(array) == number).all() for array in found)

    @pytest.mark.parametrize("transformation", ["grad", "vmap", "jit", "jvp"])
    @pytest.mark.parametrize("index", [0, [0, 1], slice(0, 2)], ids=str)
    @pytest.mark.parametrize("traced", ["a", "b"])
    def test_a_tracer_is_refused_by_its_leaf(self, transformation, index, traced):
        """Also where every leaf is of the shape and dtype of one that was written before."""
        jax = pytest.importorskip("jax")
        spec = {"a": ArraySpec((2,), "float32"), "b": ArraySpec((), "float32")}
        store = Storage(spec, 4, backend="jax", device="cpu")
        item = {"a": jax.numpy.ones(2), "b": jax.numpy.asarray(3.0)}
        store.set(index, item)
        before = store.get(...)

        def write(x):
            there = {"a": x * jax.numpy.ones(2), "b": x}
            store.set(index, {**item, traced: there[traced]})
            return x * x

        call = {
            "grad": lambda: jax.grad(write)(2.0),
            "vmap": lambda: jax.vmap(write)(jax.numpy.ones(3)),
            "jit": lambda: jax.jit(write)(2.0),
            "jvp": lambda: jax.jvp(write, (2.0,), (1.0,)),
        }[transformation]
        with pytest.raises(TypeError, match=f"^{traced}: a storage cannot be written to within jax.jit"):
            call()
        assert all((store.get(...)[key] == before[key]).all() for key in "ab")
        store.set(index, item)

    def test_takes_an_array_that_looks_like_one_of_jax(self, store):
        class Alike:
            shape, dtype = (2,), np.dtype("float32")
            aval = store.get(0)["a"].aval

            def __array__(self, dtype=None, copy=None):
                return np.array([7, 8], np.float32)

        for value in (store.get(1)["a"], Alike()):
            store.set(0, {"a": value, "b": store.get(0)["b"]})
        assert store.get(0)["a"].tolist() == [7, 8]

    @pytest.mark.parametrize("paths", [("a",), ("b", "a"), ("a", "b")])
    def test_what_was_handed_out_is_copied_once(self, store, paths, monkeypatch):
        """As long as it can come back as a value that must not be given away while it is read."""
        import jax

        selection, copies = store.select(*paths), []
        value = selection.get(0)
        buffers = store.buffers
        copy = jax.numpy.copy
        monkeypatch.setattr(jax.numpy, "copy", lambda array: copies.append(1) or copy(array))
        selection.set(..., {path: buffers[path] for path in paths} if len(paths) > 1 else buffers[paths[0]])
        assert len(copies) == len(paths)
        selection.set(0, value)
        store.set(0, store.get(1)) if len(paths) == 2 else None
        assert len(copies) == len(paths)

    @pytest.mark.parametrize("index", [1, slice(0, 2), [2, 1, 1]], ids=str)
    def test_a_read_leaves_the_memory_to_the_next_write(self, store, index):
        def addresses():
            return [cell.array.unsafe_buffer_pointer() for cell in store._buffers]

        before, found = addresses(), store.get(index)
        store.set(..., {"a": np.zeros((4, 2), np.float32), "b": np.zeros(4, np.int32)})
        assert addresses() == before
        assert found["a"].tolist() == np.ones(found["a"].shape).tolist()

    def test_rows_are_those_of_the_arrays_that_are_there(self, store):
        """Also where the memory is another one: after a write that had to copy it, and in another size."""
        for number in range(3):
            array = np.asarray(store.buffers["a"])
            store.set([number], {"a": [[7.0, number]], "b": [number + 7]})
            assert store.get([number, 3])["a"].tolist() == [[7, number], [1, 1]]
            assert array[number].tolist() == [1, 1]
            store.resize(4 + number)
            assert store.get([number, 3])["b"].tolist() == [number + 7, 3]

    @pytest.mark.parametrize("index", [0, slice(0, 2), [0, 1]], ids=str)
    def test_a_read_within_jit_is_refused(self, store, index):
        """It would be that of the time of the trace for ever."""
        import jax

        @jax.jit
        def read(x):
            return x * store.get(index)["a"].sum()

        with pytest.raises(
            TypeError, match="cannot be read within jax.jit.*; keep it outside, and hand over what is read"
        ):
            read(1.0)

    @pytest.mark.parametrize("paths", ["'a', 'b'", "'b'"])
    @pytest.mark.parametrize("index", ["3", "slice(3, 4)", "[3]"])
    def test_an_interrupt_loses_nothing(self, index, paths):
        pytest.importorskip("jax")
        program = textwrap.dedent(
            f"""
            import contextlib, signal
            from anystore import ArraySpec, Storage
            spec = ArraySpec((), "int32")
            whole = Storage(dict(a=spec, b=spec), 4, backend="jax", device="cpu")
            whole.set(..., dict(a=[0, 1, 2, 7], b=[0, 1, 2, 3]))
            store = whole.select({paths})
            value = dict(a=7, b=7) if "," in "{paths}" else 7
            store.set({index}, value)
            signal.signal(signal.SIGALRM, signal.default_int_handler)
            for microseconds in range(200, 1000, 4):  # about half of them come while JAX is at it
                with contextlib.suppress(KeyboardInterrupt):
                    signal.setitimer(signal.ITIMER_REAL, microseconds / 1e6)
                    for _ in range(10_000):
                        store.set({index}, value)
            print([whole.get(...)[key].tolist() for key in "ab"])
            """
        )
        printed = subprocess.check_output([sys.executable, "-c", program], text=True)
        assert printed == "[[0, 1, 2, 7], [0, 1, 2, 7]]\n"

    @pytest.mark.parametrize("is_host", [True, False], ids=["in main memory", "as on another device"])
    def test_what_stats_and_saves_read_is_of_few_lengths(self, is_host, monkeypatch):
        """JAX compiles for each of them, and the head of a ring moves."""
        pytest.importorskip("jax")
        buffer = ReplayBuffer(ArraySpec((), "float32"), 64, reward="", backend="jax", device="cpu")
        gather, lengths = type(buffer.backend).gather, set()

        def counted(self, cells, rows, copy):
            lengths.add(len(rows))
            return gather(self, cells, rows, copy)

        monkeypatch.setattr(buffer.backend, "_is_host", is_host)
        monkeypatch.setattr(type(buffer.backend), "gather", counted)
        rewards = np.arange(200, dtype=np.float32)
        for stop in range(1, 201):
            buffer.extend(rewards[stop - 1 : stop])
            assert buffer._counts().rewards.tolist() == rewards[max(stop - 64, 0) : stop].tolist()
        assert lengths == (set() if is_host else {1, 2, 4, 8, 16, 32, 64})

    @pytest.mark.parametrize("rows", [[3, 0, 2], [[0, 1], [2, 3], [1, 1]], [1] * 9, []], ids=str)
    def test_rows_come_to_main_memory_from_another_device(self, store, rows, monkeypatch):
        monkeypatch.setattr(store.backend, "_is_host", False)
        index = np.array(rows, np.intp)
        found = store.backend.to_host(store.select("b")._buffers[0], index)
        assert found.tolist() == np.arange(4)[index].tolist()

    def test_takes_another_array_on_the_memory_of_a_buffer(self, store):
        """JAX, which is told that a write may reuse this memory, fails if the write reads it as well."""
        import jax

        twins = jax.tree.map(lambda array: array.addressable_data(0), store.buffers)
        assert all(twins[key] is not array for key, array in store.buffers.items())
        store.set([3, 2, 1, 0], twins)
        assert store.get(...)["b"].tolist() == [3, 2, 1, 0]
        assert all(array.is_deleted() for array in twins.values())

    def test_takes_arrays_of_another_device(self):
        pytest.importorskip("jax")
        program = textwrap.dedent(
            """
            import jax
            from anystore import ArraySpec, Storage
            store = Storage(ArraySpec((2,), "float32"), 4, backend="jax", device="cpu:1")
            for index, device in enumerate(jax.devices()):
                store.set(index, jax.device_put(jax.numpy.full(2, index, "float32"), device))
                store.set(slice(2, 4), jax.device_put(jax.numpy.full((2, 2), index, "float32"), device))
            print(store.get(...).tolist(), store.buffers.devices() == {jax.devices()[1]})
            """
        )
        environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
        printed = subprocess.check_output([sys.executable, "-c", program], text=True, env=environment)
        assert printed == "[[0.0, 0.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]] True\n"

    def test_not_a_number_is_stored_whatever_jax_looks_for(self, store):
        import jax

        with jax.debug_nans(True), jax.debug_infs(True):
            store.set(0, {"a": [np.nan, np.inf], "b": 7})
            for index in (0, slice(0, 2), [0, 1], np.zeros(70_000, int)):
                found = np.asarray(store.get(index)["a"]).reshape(-1, 2)[0]
                assert np.isnan(found[0])
                assert np.isinf(found[1])
        assert store.get(...)["b"].tolist() == [7, 1, 2, 3]

    def test_takes_the_device_that_jax_is_told_to_take(self):
        jax = pytest.importorskip("jax")
        with jax.default_device(jax.devices("cpu")[0]):
            assert select_backend("jax").device == "cpu"

    def test_is_there_where_jax_is_told_to_leave_the_cpu_out(self, monkeypatch):
        jax = pytest.importorskip("jax")
        (cpu,), module = jax.devices("cpu")[:1], importlib.import_module("anystore.backends.jax")

        class Accelerator:
            platform, id = "tpu", 0

        def devices(platform=None):
            if platform is None:
                return [Accelerator()]
            raise RuntimeError(f"Unknown backend {platform}")

        monkeypatch.setattr(jax, "devices", devices)
        assert module.JaxBackend.devices() == ["tpu:0"]
        assert cpu.platform == "cpu"

    def test_an_array_on_several_devices_names_none(self):
        pytest.importorskip("jax")
        several = types.SimpleNamespace(devices=lambda: {"one", "two"})
        with pytest.raises(ValueError, match="expected an array on one device as the backend, found one on 2; give"):
            anystore.backends._device_of(several, "jax")

    @pytest.mark.parametrize("dtype", ["U3", "V4", "longdouble", "M8[s]", "S3"])
    def test_what_jax_cannot_hold_is_refused(self, store, dtype):
        with pytest.raises(ValueError, match="^x: JAX has no .*; choose another dtype"):
            Storage({"x": ArraySpec((), dtype)}, 3, backend="jax", device="cpu")


class TestTorch:
    @pytest.mark.parametrize("dtype", ["bfloat16", "float8_e5m2", "float32", "complex64"])
    def test_fills_tensors_of_any_layout(self, dtype):
        torch = pytest.importorskip("torch")
        store = Storage(ArraySpec((3,), dtype), 4, backend="torch", device="cpu")
        store.set(..., torch.ones(4, 3).to(getattr(torch, dtype)))
        layouts = [torch.zeros(2, 6, dtype=store.get(0).dtype)[:, ::2], torch.zeros(3, 2, dtype=store.get(0).dtype).t()]
        if dtype == "complex64":
            layouts += [torch.zeros(2, 3, dtype=torch.complex64).conj()]
        for out in layouts:
            store.get([1, 2], out=out)
            assert out.to(torch.complex64).real.tolist() == [[1.0] * 3] * 2
        if dtype == "float32":
            with pytest.raises(
                ValueError,
                match="expected an array of torch on cpu that can be written to in out=, found a Tensor on cpu",
            ):
                store.get([1, 2], out=torch.zeros(2, 3).to_sparse())

    @pytest.mark.parametrize("backend", ["torch", "numpy"])
    def test_refuses_sparse_tensors(self, backend):
        torch = pytest.importorskip("torch")
        store = Storage({"x": ArraySpec((3,), "float32")}, 4, backend=backend, device="cpu")
        with pytest.raises(TypeError, match=r"^x: .*to_dense\(\)"):
            store.set(0, {"x": torch.ones(3).to_sparse()})

    def test_out_that_cannot_be_filled_is_refused_before_anything_is(self):
        torch = pytest.importorskip("torch")
        spec = {"a": ArraySpec((), "int32"), "b": ArraySpec((3,), "float32")}
        store = Storage(spec, 4, backend="torch", device="cpu")
        store.set(..., {"a": 7, "b": [7, 7, 7]})
        with torch.inference_mode():
            inference = torch.zeros(2, 6)[:, ::2]
        for wrong in (torch.zeros(1, 3).expand(2, 3), inference):
            out = {"a": torch.zeros(2, dtype=torch.int32), "b": wrong}
            with pytest.raises(
                ValueError, match="^b: expected an array of torch on cpu that can be written to in out="
            ):
                store.get([1, 2], out=out)
            assert out["a"].tolist() == [0, 0]

    def test_autograd_sees_that_out_was_filled(self):
        torch = pytest.importorskip("torch")
        store = Storage(ArraySpec((3,), "float32"), 4, backend="torch", device="cpu")
        out, weights = store.get([0, 1]), torch.ones(3, requires_grad=True)
        loss = (weights * out).sum()
        store.get([0, 1], out=out)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_axes_of_one_with_negative_strides(self):
        pytest.importorskip("torch")
        store = Storage({"p": ArraySpec((2,), "int8"), "q": ArraySpec((), "float32")}, 4, backend="torch")
        store.set([1], {"p": np.ones((1, 2), np.int8)[::-1], "q": np.ones(1)})  # of which q is to be converted
        assert store.get(1)["p"].tolist() == [1, 1]

    def test_what_was_made_in_inference_mode_is_written_outside_of_it(self):
        torch = pytest.importorskip("torch")
        as_elsewhere = importlib.import_module("anystore.backends.torch").TorchBackend("cpu")
        for backend in (as_elsewhere, "torch"):
            with torch.inference_mode():
                store = Storage(ArraySpec((), "float32"), 4, backend=backend)
                store.resize(5)
            store.set(2, 1.5)
            store.get(slice(0, 3), copy=False)[0] = 2.5
            assert store.get(...).tolist() == [2.5, 0, 1.5, 0, 0]

    @pytest.mark.parametrize("dtype", ["uint16", "uint32", "uint64", "float8_e5m2", "bool", "complex128"])
    def test_every_dtype_where_torch_itself_moves_the_rows(self, dtype):
        torch = pytest.importorskip("torch")
        backend = importlib.import_module("anystore.backends.torch").TorchBackend("cpu")
        store = Storage(ArraySpec((2,), dtype), 4, backend=backend)
        value = torch.tensor([[1, 0], [0, 1], [1, 1]]).to(getattr(torch, dtype))
        store.set([3, 1, 3], value)
        out = store.get([1, 3])
        assert out.dtype == value.dtype
        assert out.view(torch.uint8).tolist() == value[1:].contiguous().view(torch.uint8).tolist()
        assert store.get([3, 1], out=out).view(torch.uint8).tolist() == value.flip(0)[:2].view(torch.uint8).tolist()

    def test_takes_tensors_of_any_layout(self):
        torch = pytest.importorskip("torch")
        store = Storage({"x": ArraySpec((2,), "complex64"), "y": ArraySpec((2,), "bfloat16")}, 4, backend="torch")
        x = torch.tensor([[1 + 2j, 3 - 1j]]).conj()
        y = torch.nn.Parameter(torch.arange(8, dtype=torch.bfloat16).reshape(2, 4))[:1, ::2]
        store.set([3], {"x": x, "y": y})
        assert store.get(3)["x"].tolist() == [1 - 2j, 3 + 1j]
        assert store.get(3)["y"].tolist() == [0, 2]
        assert not store.buffers["y"].requires_grad

    @pytest.mark.parametrize("index", [slice(0, 2), [0, 1]], ids=str)
    def test_tensors_that_are_not_what_is_in_memory_without_the_compiled_moves(self, index):
        """On a device where torch itself moves the rows."""
        torch = pytest.importorskip("torch")
        backend = importlib.import_module("anystore.backends.torch").TorchBackend("cpu")
        store = Storage({"a": ArraySpec((), "float32"), "z": ArraySpec((), "complex64")}, 3, backend=backend)
        z = torch.tensor([1 + 2j, 3 - 1j])
        for lazy in (z.conj(), torch._neg_view(z)):
            store.set(index, {"a": torch.tensor([7.0, 8.0]), "z": lazy})
            assert store.get([0, 1])["z"].tolist() == lazy.resolve_conj().resolve_neg().tolist()
        assert store.get([0, 1])["a"].tolist() == [7, 8]

    def test_takes_a_field_of_records(self):
        pytest.importorskip("torch")
        records = np.array([(1.5, 1), (2.5, 2)], [("x", "f4"), ("flag", "i1")])
        store = Storage({"x": ArraySpec((), "float32"), "y": ArraySpec((), "float32")}, 2, backend="torch")
        for y in (records["x"], [1, 2]):  # with the one it is taken as it is, with the other it is brought there
            store.set(..., {"x": records["x"], "y": y})
            assert store.get(...)["x"].tolist() == [1.5, 2.5]

    def test_memory_that_torch_moves_is_that_of_the_storage(self):
        """As it does when a view is sent to another process."""
        torch = pytest.importorskip("torch")
        store = Storage({"x": ArraySpec((1000,), "float32")}, 5000, backend="torch")
        store.set(..., {"x": torch.ones(5000, 1000)})
        store.get(slice(0, 3), copy=False)["x"].share_memory_()
        store.set(1, {"x": torch.full((1000,), 7.0)})
        assert [float(store.get(1, copy=copy)["x"].sum()) for copy in (True, False)] == [7000.0, 7000.0]
        assert float(store.get(np.arange(5000))["x"].sum()) == 5006000.0

    def test_what_is_done_to_a_buffer_is_not_done_to_the_storage(self):
        torch = pytest.importorskip("torch")
        store = Storage({"x": ArraySpec((2,), "float32")}, 4, backend="torch")
        store.buffers["x"].requires_grad_(True)
        store.set(3, {"x": torch.ones(2)})
        store.resize(5)
        assert store.get(3)["x"].tolist() == [1, 1]

    def test_a_tensor_of_a_class_of_the_users_own(self):
        torch = pytest.importorskip("torch")

        class Tensor(torch.Tensor):
            pass

        store = Storage({"x": ArraySpec((2,), "bfloat16")}, 4, backend="torch")
        store.set(3, {"x": torch.ones(2, dtype=torch.bfloat16).as_subclass(Tensor)})
        assert store.get(3)["x"].tolist() == [1, 1]


def test_jax_with_64_bits():
    """In a process of its own, since the setting is global."""
    import subprocess
    import sys

    pytest.importorskip("jax")
    program = """
import jax; jax.config.update("jax_enable_x64", True)
import numpy as np
from anystore import ArraySpec, Storage
store = Storage({"i": ArraySpec((), "int64"), "f": ArraySpec((2,), "float64")}, 4, backend="jax", device="cpu")
store.set([1, -1], {"i": np.array([2**40, 5]), "f": np.full((2, 2), 1e300)})
assert store.get(1)["i"] == 2**40 and store.get(3)["f"].tolist() == [1e300, 1e300]
"""
    subprocess.run([sys.executable, "-c", program], check=True)
