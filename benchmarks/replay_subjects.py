"""Replay buffers behind one face: anystore's, and those of the peers.

Each is used as its own documentation says, and is handed items in the form that it likes best, prepared before the
clock starts. What a peer cannot leave out (a second copy of the observation, more flags, a conversion to torch) is part
of its figure.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.subjects import call_by_call, narrowed, without_64_bits
from benchmarks.workloads import Batch, Workload

ALPHA, BETA = 0.6, 0.4
BATCH = 256
TIANSHOU_PART = 1000


class Replay:
    """A replay buffer of one workload, for `lanes` environments in step.

    What may be defined: ``add(item)`` and ``extend(items)`` for what `prepare` made; ``sample(count)``, which returns
    what the library returns; ``update(sample, priorities)`` for the priorities of such a sample.
    """

    name: str
    add: Any = None
    extend: Any = None
    sample: Any = None
    update: Any = None

    def __init__(self, workload: Workload, prioritised: bool = False, lanes: int = 1) -> None:
        raise NotImplementedError

    def prepare(self, batch: Batch) -> Any:
        """An item or a batch in the library's own form."""
        return batch

    def prepare_priorities(self, priorities: Any) -> Any:
        return priorities

    def fill(self, workload: Workload) -> None:
        """Write to every row."""
        items = self.prepare(workload.batch(64))
        for _ in range(-(-workload.capacity // 64)):
            self.extend(items)


class Anystore(Replay):
    name, backend = "anystore", "numpy"

    def __init__(self, workload: Workload, prioritised: bool = False, lanes: int = 1) -> None:
        from anystore.replay import Prioritized, ReplayBuffer, Uniform

        self.buffer = ReplayBuffer(
            workload.spec,
            workload.capacity,
            sampler=Prioritized(alpha=ALPHA, beta=BETA) if prioritised else Uniform(),
            lanes=lanes,
            backend=self.backend,
            device="cpu",
            seed=0,
        )
        self.add, self.extend, self.sample = self.buffer.add, self.buffer.extend, self.buffer.sample
        if prioritised:
            self.update = self._update

    def _update(self, sample: Any, priorities: Any) -> None:
        self.buffer.update_priorities(sample.rows, priorities)


class AnystoreTorch(Anystore):
    name, backend = "anystore on torch", "torch"

    def prepare(self, batch: Batch) -> Any:
        import torch

        return {key: torch.from_numpy(np.array(leaf)) for key, leaf in batch.items()}

    def prepare_priorities(self, priorities: Any) -> Any:
        import torch

        return torch.from_numpy(priorities)


class AnystoreJax(Anystore):
    name, backend = "anystore on JAX", "jax"

    def __init__(self, workload: Workload, prioritised: bool = False, lanes: int = 1) -> None:
        call_by_call()
        super().__init__(without_64_bits(workload), prioritised, lanes)

    def prepare(self, batch: Batch) -> Any:
        import jax.numpy as jnp

        return {key: jnp.asarray(leaf) for key, leaf in narrowed(batch).items()}

    def prepare_priorities(self, priorities: Any) -> Any:
        import jax.numpy as jnp

        return jnp.asarray(priorities)


class StableBaselines3(Replay):
    name = "Stable-Baselines3"

    def __init__(self, workload: Workload, prioritised: bool = False, lanes: int = 1) -> None:
        from gymnasium import spaces
        from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer

        def box(spec: Any) -> Any:
            if spec.dtype == np.uint8:
                return spaces.Box(0, 255, spec.shape, np.uint8)
            return spaces.Box(-np.inf, np.inf, spec.shape, spec.dtype)

        spec, self.lanes = workload.spec, lanes
        action = spaces.Discrete(100) if spec["action"].shape == () else box(spec["action"])
        if "obs" in spec:
            alone = "next_obs" not in spec
            options = {"optimize_memory_usage": alone, "handle_timeout_termination": not alone}
            self.buffer: Any = ReplayBuffer(workload.capacity, box(spec["obs"]), action, "cpu", lanes, **options)
        else:
            observation = spaces.Dict({"image": box(spec["image"]), "proprio": box(spec["proprio"])})
            self.buffer = DictReplayBuffer(workload.capacity, observation, action, "cpu", lanes)
        self.sample = self.buffer.sample
        if lanes > 1:
            self.extend = self.add

    def prepare(self, batch: Batch) -> Any:
        obs, following = observations(batch)
        infos: list[dict[str, Any]] = [{} for _ in range(self.lanes)]
        return obs, following, np.asarray(batch["action"]), batch["reward"], batch["done"], infos

    def add(self, item: Any) -> None:
        self.buffer.add(*item)

    def fill(self, workload: Workload) -> None:
        batch = workload.batch(self.lanes)
        item = self.prepare(batch if self.lanes > 1 else {key: leaf[0] for key, leaf in batch.items()})
        for _ in range(self.buffer.buffer_size):
            self.buffer.add(*item)


class Tianshou(Replay):
    name = "Tianshou"

    def __init__(self, workload: Workload, prioritised: bool = False, lanes: int = 1) -> None:
        from tianshou.data import PrioritizedReplayBuffer, ReplayBuffer, VectorReplayBuffer

        self.options = {"ignore_obs_next": "next_obs" not in workload.spec}
        self.lanes = np.arange(lanes)
        if lanes > 1:
            self.buffer: Any = VectorReplayBuffer(workload.capacity, lanes, **self.options)
            self.extend = self._extend
        elif prioritised:
            self.buffer = PrioritizedReplayBuffer(workload.capacity, ALPHA, BETA, **self.options)
            self.update = self._update
        else:
            self.buffer = ReplayBuffer(workload.capacity, **self.options)
        self.add, self.sample = self.buffer.add, self.buffer.sample

    def prepare(self, batch: Batch) -> Any:
        from tianshou.data import Batch as Items

        obs, following = observations(batch)
        truncated = np.zeros_like(batch["done"])
        named = {"obs": obs, "act": batch["action"], "rew": batch["reward"], "obs_next": following, "info": {}}
        return Items(terminated=batch["done"], truncated=truncated, **named)

    def _extend(self, items: Any) -> None:
        self.buffer.add(items, self.lanes)

    def fill(self, workload: Workload) -> None:
        if len(self.lanes) > 1:
            super().fill(workload)
            return
        from tianshou.data import ReplayBuffer

        part, items = ReplayBuffer(TIANSHOU_PART, **self.options), workload.batch(TIANSHOU_PART)
        for row in range(TIANSHOU_PART):
            part.add(self.prepare({key: leaf[row] for key, leaf in items.items()}))
        for _ in range(workload.capacity // TIANSHOU_PART):
            self.buffer.update(part)

    def _update(self, sample: Any, priorities: Any) -> None:
        self.buffer.update_weight(sample[1], priorities)


class Cpprb(Replay):
    name = "cpprb"

    def __init__(self, workload: Workload, prioritised: bool = False, lanes: int = 1) -> None:
        from cpprb import PrioritizedReplayBuffer, ReplayBuffer

        fields = {key: {"shape": leaf.shape or 1, "dtype": leaf.dtype} for key, leaf in workload.spec.items()}
        if prioritised:
            self.buffer: Any = PrioritizedReplayBuffer(workload.capacity, fields, alpha=ALPHA)
            self.update = self._update
        else:
            self.buffer = ReplayBuffer(workload.capacity, fields)
        self.sample, self.extend = self.buffer.sample, self.add

    def add(self, item: Any) -> None:
        self.buffer.add(**item)

    def _update(self, sample: Any, priorities: Any) -> None:
        self.buffer.update_priorities(sample["indexes"], priorities)


class TorchRL(Replay):
    name = "TorchRL ReplayBuffer"

    def __init__(self, workload: Workload, prioritised: bool = False, lanes: int = 1) -> None:
        from torchrl.data import LazyTensorStorage, PrioritizedReplayBuffer, ReplayBuffer

        storage = LazyTensorStorage(workload.capacity)
        if prioritised:
            self.buffer: Any = PrioritizedReplayBuffer(alpha=ALPHA, beta=BETA, storage=storage)
            self.update = self._update
        else:
            self.buffer = ReplayBuffer(storage=storage)
        self.add, self.extend = self.buffer.add, self.buffer.extend

    def prepare(self, batch: Batch) -> Any:
        import torch
        from tensordict import TensorDict

        size = () if np.ndim(batch["reward"]) == 0 else (len(batch["reward"]),)
        return TensorDict({key: torch.from_numpy(np.array(leaf)) for key, leaf in batch.items()}, size)

    prepare_priorities = AnystoreTorch.prepare_priorities

    def sample(self, count: int) -> Any:
        return self.buffer.sample(count, return_info=True)

    def _update(self, sample: Any, priorities: Any) -> None:
        self.buffer.update_priority(sample[1]["index"], priorities)


class TorchRLTensorDict(TorchRL):
    name = "TorchRL TensorDictReplayBuffer"

    def __init__(self, workload: Workload, prioritised: bool = False, lanes: int = 1) -> None:
        from torchrl.data import LazyTensorStorage, TensorDictPrioritizedReplayBuffer, TensorDictReplayBuffer

        storage = LazyTensorStorage(workload.capacity)
        if prioritised:
            self.buffer = TensorDictPrioritizedReplayBuffer(alpha=ALPHA, beta=BETA, storage=storage)
            self.update = self._update
        else:
            self.buffer = TensorDictReplayBuffer(storage=storage)
        self.add, self.extend = self.buffer.add, self.buffer.extend

    def sample(self, count: int) -> Any:
        return self.buffer.sample(count)

    def _update(self, sample: Any, priorities: Any) -> None:
        self.buffer.update_priority(sample["index"], priorities)


class Flashbax(Replay):
    """Each function compiled, with the state given away to those that change it."""

    name = "flashbax"

    def __init__(self, workload: Workload, prioritised: bool = False, lanes: int = 1) -> None:
        import flashbax

        jax = call_by_call()
        workload, sizes = without_64_bits(workload), (workload.capacity, BATCH, BATCH)
        if prioritised:
            buffer: Any = flashbax.make_prioritised_item_buffer(*sizes, add_batches=True, priority_exponent=ALPHA)
            self._set_priorities = jax.jit(buffer.set_priorities, donate_argnums=0)
            self.update = self._update
        elif lanes > 1:
            rows = workload.capacity // lanes
            options = {"sample_sequence_length": 1, "period": 1, "min_length_time_axis": 1}
            buffer = flashbax.make_trajectory_buffer(lanes, BATCH, max_length_time_axis=rows, **options)
        else:
            buffer = flashbax.make_item_buffer(*sizes, add_batches=True)
        self.state = buffer.init({key: np.zeros(leaf.shape, leaf.dtype) for key, leaf in workload.spec.items()})
        self.in_lanes = lanes > 1
        self._add, self._draw = jax.jit(buffer.add, donate_argnums=0), jax.jit(buffer.sample)
        self._split = jax.jit(jax.random.split)
        self._key = jax.random.key(0)
        self.extend = self.add

    def prepare(self, batch: Batch) -> Any:
        import jax.numpy as jnp

        single = np.ndim(batch["reward"]) == 0
        batch = {key: jnp.asarray(leaf[None] if single else leaf) for key, leaf in narrowed(batch).items()}
        return {key: leaf[:, None] for key, leaf in batch.items()} if self.in_lanes else batch

    prepare_priorities = AnystoreJax.prepare_priorities

    def add(self, items: Any) -> None:
        self.state = self._add(self.state, items)

    def sample(self, count: int) -> Any:
        self._key, own = self._split(self._key)
        return self._draw(self.state, own)

    def _update(self, sample: Any, priorities: Any) -> None:
        self.state = self._set_priorities(self.state, sample.indices, priorities)


def observations(batch: Batch) -> tuple[Any, Any]:
    """The observation and what follows it, for peers that know these two only."""
    obs = batch["obs"] if "obs" in batch else {"image": batch["image"], "proprio": batch["proprio"]}
    return obs, batch.get("next_obs", obs)


BESIDE: dict[str, list[type[Replay]]] = {
    "stable_baselines3": [Anystore, AnystoreTorch, StableBaselines3],
    "tianshou": [Anystore, Tianshou],
    "cpprb": [Anystore, Cpprb],
    "torchrl": [Anystore, AnystoreTorch, TorchRL, TorchRLTensorDict],
    "flashbax": [Anystore, AnystoreJax, Flashbax],
}
"""What is measured in the environment of each peer."""
PRIORITISED = (Anystore, AnystoreTorch, AnystoreJax, Tianshou, Cpprb, TorchRL, TorchRLTensorDict, Flashbax)
IN_LANES = (Anystore, AnystoreTorch, AnystoreJax, StableBaselines3, Tianshou, Flashbax)
"""Those that know which environment an item is of."""
