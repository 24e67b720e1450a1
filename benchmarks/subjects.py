"""What is measured: anystore, stores written by hand, and what else a user could pick, behind one face.

A subject has only the operations that its library has. Peers are handed items in the form that they like best, prepared
before the clock starts; those that only sample rows of their own choice are asked for as many.
"""

from __future__ import annotations

import math
import mmap
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np

from anystore import ArraySpec, Storage
from benchmarks.workloads import Batch, Workload


class Subject:
    """A store of one workload.

    The operations that may be defined: ``set_one(row, item)``, ``get_one(row)``, ``set_slice(start, batch)`` (64 rows
    one after the other), ``set_rows(rows, batch)``, ``get_rows(rows)``, ``get_into(rows)``.
    """

    name: str
    module: str
    """What is imported for it."""

    def prepare(self, batch: Batch) -> Any:
        """An item or a batch in the library's own form."""
        return batch

    def fill(self, workload: Workload) -> None:
        """Write to every row, by 64 where that can be done."""
        if hasattr(self, "set_slice"):
            batch = self.prepare(workload.batch(64))
            for start in range(0, workload.capacity - 63, 64):
                self.set_slice(start, batch)
            return
        item = self.prepare(first(workload.batch(1)))
        for row in range(workload.capacity):
            self.set_one(row, item)  # type: ignore[attr-defined]


class Anystore(Subject):
    name, module, backend = "anystore", "anystore", "numpy"

    def __init__(self, workload: Workload) -> None:
        self.store = Storage(workload.spec, workload.capacity, backend=self.backend, device="cpu")
        self.set_one = self.set_rows = self.store.set
        self.get_rows = self.store.get
        self.out: Any = None

    def get_one(self, row: int) -> Any:
        return self.store.get(row, copy=None)

    def set_slice(self, start: int, batch: Batch) -> None:
        self.store.set(slice(start, start + 64), batch)

    def get_into(self, rows: Any) -> Any:
        self.out = self.out or self.store.get(rows)
        return self.store.get(rows, out=self.out)


class AnystoreTorch(Anystore):
    name, module, backend = "anystore on torch", "torch", "torch"

    def prepare(self, batch: Batch) -> Any:
        import torch

        return {key: torch.from_numpy(np.array(leaf)) for key, leaf in batch.items()}


class AnystoreJax(Anystore):
    name, module, backend = "anystore on JAX", "jax", "jax"
    get_into = None  # type: ignore[assignment]  # JAX arrays cannot be filled

    def __init__(self, workload: Workload) -> None:
        call_by_call()
        super().__init__(without_64_bits(workload))

    def prepare(self, batch: Batch) -> Any:
        import jax.numpy as jnp

        return {key: jnp.asarray(leaf) for key, leaf in narrowed(batch).items()}


class NumpyByHand(Subject):
    name, module = "NumPy by hand", "numpy"

    def __init__(self, workload: Workload) -> None:
        self.arrays = {
            key: np.zeros((workload.capacity, *spec.shape), spec.dtype) for key, spec in workload.spec.items()
        }
        self.out: Any = None

    def set_one(self, row: Any, item: Batch) -> None:
        for key, array in self.arrays.items():
            array[row] = item[key]

    set_rows = set_one

    def get_one(self, row: Any) -> Batch:
        return {key: array[row] for key, array in self.arrays.items()}

    get_rows = get_one

    def set_slice(self, start: int, batch: Batch) -> None:
        for key, array in self.arrays.items():
            array[start : start + 64] = batch[key]

    def get_into(self, rows: Any) -> Batch:
        self.out = self.out or self.get_rows(rows)
        return {key: np.take(array, rows, 0, self.out[key], "clip") for key, array in self.arrays.items()}


class NumpyTake(NumpyByHand):
    name = "NumPy by hand, take"

    def get_rows(self, rows: Any) -> Batch:
        return {key: array.take(rows, 0) for key, array in self.arrays.items()}


class NumpyInSmallPages(NumpyByHand):
    """As where the system has no huge pages to give, or NumPy does not ask it for them."""

    name = "NumPy by hand, small pages"

    def __init__(self, workload: Workload) -> None:
        self.arrays = {key: self._zeros(workload.capacity, spec) for key, spec in workload.spec.items()}

    def _zeros(self, capacity: int, spec: ArraySpec) -> Any:
        pages = mmap.mmap(-1, max(1, capacity * spec.nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.madvise(mmap.MADV_NOHUGEPAGE)
        return np.frombuffer(pages, np.uint8)[: capacity * spec.nbytes].view(spec.dtype).reshape(capacity, *spec.shape)


class TorchByHand(Subject):
    name, module = "torch by hand", "torch"

    def __init__(self, workload: Workload) -> None:
        import torch

        self.torch = torch
        self.arrays = {
            key: torch.from_numpy(np.zeros((workload.capacity, *spec.shape), spec.dtype))
            for key, spec in workload.spec.items()
        }
        self.out: Any = None

    prepare = AnystoreTorch.prepare

    def set_one(self, row: Any, item: Any) -> None:
        for key, array in self.arrays.items():
            array[row] = item[key]

    def get_one(self, row: int) -> Any:
        return {key: array[row] for key, array in self.arrays.items()}

    def set_slice(self, start: int, batch: Any) -> None:
        for key, array in self.arrays.items():
            array[start : start + 64] = batch[key]

    def set_rows(self, rows: Any, batch: Any) -> None:
        index = self.torch.from_numpy(rows)
        for key, array in self.arrays.items():
            array.index_copy_(0, index, batch[key])

    def get_rows(self, rows: Any) -> Any:
        index = self.torch.from_numpy(rows)
        return {key: array.index_select(0, index) for key, array in self.arrays.items()}

    def get_into(self, rows: Any) -> Any:
        self.out = self.out or self.get_rows(rows)
        index = self.torch.from_numpy(rows)
        return {key: self.torch.index_select(array, 0, index, out=self.out[key]) for key, array in self.arrays.items()}


class JaxByHand(Subject):
    name, module = "JAX by hand", "jax"

    def __init__(self, workload: Workload) -> None:
        import jax.numpy as jnp
        from jax import lax

        jax = call_by_call()
        spec = without_64_bits(workload).spec
        self.arrays = {key: jnp.zeros((workload.capacity, *leaf.shape), leaf.dtype) for key, leaf in spec.items()}

        def write(arrays: Any, rows: Any, batch: Any) -> Any:
            return {key: array.at[rows].set(batch[key], mode="promise_in_bounds") for key, array in arrays.items()}

        def write_slice(arrays: Any, start: Any, batch: Any) -> Any:
            return {key: lax.dynamic_update_slice_in_dim(array, batch[key], start, 0) for key, array in arrays.items()}

        def read(arrays: Any, rows: Any) -> Any:
            return {key: array.at[rows].get(mode="promise_in_bounds") for key, array in arrays.items()}

        self._write = jax.jit(write, donate_argnums=0)
        self._write_slice = jax.jit(write_slice, donate_argnums=0)
        self._read = jax.jit(read)

    prepare = AnystoreJax.prepare

    def set_one(self, row: Any, item: Any) -> None:
        self.arrays = self._write(self.arrays, row, item)

    set_rows = set_one

    def set_slice(self, start: int, batch: Any) -> None:
        self.arrays = self._write_slice(self.arrays, start, batch)

    def get_rows(self, rows: Any) -> Any:
        return self._read(self.arrays, rows)

    get_one = get_rows


class TfAgents(Subject):
    name, module = "TF-Agents NumpyStorage", "tf_agents.utils.numpy_storage"

    def __init__(self, workload: Workload) -> None:
        from tf_agents.specs import ArraySpec
        from tf_agents.utils.numpy_storage import NumpyStorage

        spec = {key: ArraySpec(leaf.shape, leaf.dtype) for key, leaf in workload.spec.items()}
        store = NumpyStorage(spec, workload.capacity)
        self.set_one = self.set_rows = store.set
        self.get_one = self.get_rows = store.get

    def set_slice(self, start: int, batch: Batch) -> None:
        self.set_rows(slice(start, start + 64), batch)


class TorchRL(Subject):
    name, module = "TorchRL LazyTensorStorage", "torchrl.data"

    def __init__(self, workload: Workload) -> None:
        self.store = self.storage(workload.capacity)
        self.set_one = self.store.set
        self.get_one = self.get_rows = self.store.get

    def storage(self, capacity: int) -> Any:
        from torchrl.data import LazyTensorStorage

        return LazyTensorStorage(capacity)

    def prepare(self, batch: Batch) -> Any:
        import torch
        from tensordict import TensorDict

        size = () if np.ndim(batch["reward"]) == 0 else (len(batch["reward"]),)
        return TensorDict({key: torch.from_numpy(np.array(leaf)) for key, leaf in batch.items()}, size)

    def set_slice(self, start: int, batch: Any) -> None:
        self.store.set(range(start, start + 64), batch)

    def set_rows(self, rows: Any, batch: Any) -> None:
        import torch

        self.store.set(torch.from_numpy(rows), batch)


class TorchRLMemmap(TorchRL):
    name = "TorchRL LazyMemmapStorage"

    def storage(self, capacity: int) -> Any:
        from torchrl.data import LazyMemmapStorage

        self.folder = tempfile.TemporaryDirectory()
        return LazyMemmapStorage(capacity, scratch_dir=self.folder.name)


class Cpprb(Subject):
    name, module = "cpprb", "cpprb"

    def __init__(self, workload: Workload) -> None:
        from cpprb import ReplayBuffer

        fields = {key: {"shape": leaf.shape or 1, "dtype": leaf.dtype} for key, leaf in workload.spec.items()}
        self.buffer = ReplayBuffer(workload.capacity, fields)
        self.get_rows = self.buffer._encode_sample

    def set_one(self, row: int, item: Batch) -> None:
        self.buffer.add(**item)

    set_slice = set_one


class Flashbax(Subject):
    name, module = "flashbax", "flashbax"

    def __init__(self, workload: Workload) -> None:
        import flashbax

        jax = call_by_call()
        workload = without_64_bits(workload)
        buffer = flashbax.make_item_buffer(workload.capacity, 256, 256, add_batches=True)
        self.state = buffer.init({key: np.zeros(leaf.shape, leaf.dtype) for key, leaf in workload.spec.items()})
        self._add = jax.jit(buffer.add, donate_argnums=0)
        self._sample = jax.jit(buffer.sample)
        self._keys = list(jax.random.split(jax.random.PRNGKey(0), 64))

    def prepare(self, batch: Batch) -> Any:
        import jax.numpy as jnp

        single = np.ndim(batch["reward"]) == 0
        return {key: jnp.asarray(leaf[None] if single else leaf) for key, leaf in narrowed(batch).items()}

    def set_one(self, row: int, item: Any) -> None:
        self.state = self._add(self.state, item)

    set_slice = set_one

    def get_rows(self, rows: Any) -> Any:
        return self._sample(self.state, self._keys[int(rows[0]) % 64]).experience


class StableBaselines3(Subject):
    name, module = "Stable-Baselines3", "stable_baselines3"

    def __init__(self, workload: Workload) -> None:
        from gymnasium import spaces
        from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer

        def box(spec: Any) -> Any:
            if spec.dtype == np.uint8:
                return spaces.Box(0, 255, spec.shape, np.uint8)
            return spaces.Box(-np.inf, np.inf, spec.shape, spec.dtype)

        spec = workload.spec
        action = spaces.Discrete(100) if spec["action"].shape == () else box(spec["action"])
        if workload.name == "robot":
            obs = spaces.Dict({"image": box(spec["image"]), "proprio": box(spec["proprio"])})
            self.buffer: Any = DictReplayBuffer(workload.capacity, obs, action, "cpu")
        else:
            frames = workload.name == "atari"
            options = {"optimize_memory_usage": frames, "handle_timeout_termination": not frames}
            self.buffer = ReplayBuffer(workload.capacity, box(spec["obs"]), action, "cpu", **options)
        self.get_rows = self.buffer._get_samples

    def prepare(self, batch: Batch) -> Any:
        obs = batch["obs"] if "obs" in batch else {"image": batch["image"], "proprio": batch["proprio"]}
        return obs, batch.get("next_obs", obs), np.asarray(batch["action"]), batch["reward"], batch["done"], [{}]

    def set_one(self, row: int, item: Any) -> None:
        self.buffer.add(*item)


class Tianshou(Subject):
    name, module = "Tianshou", "tianshou.data"

    def __init__(self, workload: Workload) -> None:
        from tianshou.data import ReplayBuffer

        self.buffer = ReplayBuffer(workload.capacity, ignore_obs_next="next_obs" not in workload.spec)
        self.get_rows = self.buffer.__getitem__
        self.get_one = self.buffer.__getitem__

    def prepare(self, batch: Batch) -> Any:
        from tianshou.data import Batch as Items

        obs = batch["obs"] if "obs" in batch else {"image": batch["image"], "proprio": batch["proprio"]}
        flags = {"terminated": batch["done"], "truncated": batch["done"], "done": batch["done"]}
        return Items(
            obs=obs, act=batch["action"], rew=batch["reward"], obs_next=batch.get("next_obs", obs), info={}, **flags
        )

    def set_one(self, row: int, item: Any) -> None:
        self.buffer.add(item)


class Rlox(Subject):
    name, module = "rlox", "rlox"

    def __init__(self, workload: Workload) -> None:
        from rlox import ReplayBuffer

        self.observed = "obs" if "obs" in workload.spec else "image"
        size = math.prod(workload.spec[self.observed].shape)
        self.buffer = ReplayBuffer(workload.capacity, size, math.prod(workload.spec["action"].shape))

    def prepare(self, batch: Batch) -> Any:
        obs = np.ascontiguousarray(batch[self.observed], np.float32)
        obs = obs.reshape(-1) if np.ndim(batch["reward"]) == 0 else obs.reshape(len(obs), -1)
        action = np.asarray(batch["action"], np.float32).reshape(-1)
        return obs, action, batch["reward"], batch["done"]

    def set_one(self, row: int, item: Any) -> None:
        obs, action, reward, done = item
        self.buffer.push(obs, action, float(reward), bool(done), False, obs)

    def get_rows(self, rows: Any) -> Any:
        return self.buffer.sample(len(rows), int(rows[0]))


class Pyribs(Subject):
    name, module = "pyribs ArrayStore", "ribs.archives"

    def __init__(self, workload: Workload) -> None:
        from ribs.archives import ArrayStore

        fields = {key: (leaf.shape, leaf.dtype) for key, leaf in workload.spec.items()}
        self.store = ArrayStore(fields, workload.capacity)
        self.set_rows = self.store.add

    def set_one(self, row: int, item: Batch) -> None:
        self.store.add([row], {key: leaf[None] for key, leaf in item.items()})

    def set_slice(self, start: int, batch: Batch) -> None:
        self.store.add(np.arange(start, start + 64), batch)

    def get_one(self, row: int) -> Any:
        return self.store.retrieve([row])

    def get_rows(self, rows: Any) -> Any:
        return self.store.retrieve(rows)


def first(batch: Batch) -> Batch:
    """The first item of a batch."""
    return {key: leaf[0] for key, leaf in batch.items()}


def narrowed(batch: Batch) -> Batch:
    """With 32 bits in the place of 64, which JAX has not by default."""
    return {key: leaf.astype(np.int32) if leaf.dtype == np.int64 else leaf for key, leaf in batch.items()}


def without_64_bits(workload: Workload) -> Workload:
    spec = {key: leaf.replace(dtype="int32") if leaf.dtype == "int64" else leaf for key, leaf in workload.spec.items()}
    return Workload(workload.name, spec, workload.capacity)


def call_by_call() -> Any:
    """JAX, told to end a call only when its work is done, which would fall into the turn of another otherwise."""
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)
    return jax


BY_HAND: list[Callable[[Workload], Subject]] = [NumpyByHand, NumpyTake]
ENVIRONMENTS: dict[str, list[Callable[[Workload], Subject]]] = {
    "numpy": [],
    "torch": [TorchByHand, AnystoreTorch],
    "jax": [JaxByHand, AnystoreJax],
    "tf_agents": [TfAgents],
    "torchrl": [TorchRL, TorchRLMemmap],
    "cpprb": [Cpprb],
    "flashbax": [Flashbax],
    "stable_baselines3": [StableBaselines3],
    "tianshou": [Tianshou],
    "rlox": [Rlox],
    "pyribs": [Pyribs],
}
"""The peers of each environment; anystore and NumPy by hand run in every one."""
