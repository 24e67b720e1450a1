"""What is stored in the benchmarks: three kinds of experience, and batches of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anystore import ArraySpec, plan

Batch = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Workload:
    """A spec of named leaves, and how many rows of it."""

    name: str
    spec: dict[str, ArraySpec]
    capacity: int

    @property
    def nbytes(self) -> int:
        return plan(self.spec, self.capacity).nbytes

    def batch(self, rows: int, seed: int = 0) -> Batch:
        """So many items of random content."""
        rng = np.random.default_rng(seed)
        return {
            key: rng.integers(0, 2 if spec.dtype == bool else 100, (rows, *spec.shape)).astype(spec.dtype)
            for key, spec in self.spec.items()
        }


DONE = ArraySpec((), "bool")
REWARD = ArraySpec((), "float32")
STATE = ArraySpec((4,), "float32")
STEP = {"reward": REWARD, "done": DONE}

CARTPOLE = Workload("cartpole", {"obs": STATE, "next_obs": STATE, "action": ArraySpec((), "int64"), **STEP}, 1_000_000)
ROBOT = Workload(
    "robot",
    {
        "image": ArraySpec((64, 64, 3), "uint8"),
        "proprio": ArraySpec((32,), "float32"),
        "action": ArraySpec((7,), "float32"),
        **STEP,
        "step": ArraySpec((), "int32"),
    },
    20_000,
)
ATARI = Workload("atari", {"obs": ArraySpec((84, 84, 4), "uint8"), "action": ArraySpec((), "int64"), **STEP}, 20_000)

WORKLOADS = {workload.name: workload for workload in (CARTPOLE, ROBOT, ATARI)}
