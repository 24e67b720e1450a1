"""The bytes that a transition of Atari frames takes: stacks of four with the stack that follows, in each peer's way.

    python -m benchmarks.replay_memory "anystore, frames shared"

fills one buffer in a process that does nothing else and prints what it found as JSON. The frames are noise, so that no
two are alike by chance, and carry their number, so that a sample tells whether its stacks are the right ones.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar, NamedTuple

import numpy as np

from benchmarks.measure import resident_bytes

STACK, SIDE, EPISODE = 4, 84, 500
CAPACITY, WRITTEN, WARM_UP = 10_000, 15_000, 600
"""Items: the ring wraps; every episode of 500 steps ends, by turns in truncation and in termination."""
BATCH, CHECKED = 256, 40


class Step(NamedTuple):
    """One step: stacks with the frames along the first axis, newest last."""

    obs: Any
    following: Any
    action: int
    reward: float
    terminated: bool
    truncated: bool


class Sampled(NamedTuple):
    """What a learner uses of a sample, frames along the axis after the batch."""

    obs: Any
    following: Any
    terminated: Any


def frame(episode: int, step: int, noise: Any) -> Any:
    """A frame of noise whose first bytes say which one it is; the steps before the first repeat frame 0."""
    made = np.roll(noise, 97 * (episode * 1009 + step))
    made.reshape(-1)[:8] = np.frombuffer(np.array([episode, step], np.int32).tobytes(), np.uint8)
    return made


def steps(count: int) -> Iterator[Step]:
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE), np.uint8)
    for number in range(count):
        episode, step = divmod(number, EPISODE)
        if step == 0:
            stack = np.stack([frame(episode, 0, noise)] * STACK)
        following = np.concatenate([stack[1:], frame(episode, step + 1, noise)[None]])
        ends = step == EPISODE - 1
        yield Step(stack, following, number % 6, 1.0, ends and episode % 2 == 1, ends and episode % 2 == 0)
        stack = following


def numbers(stacks: Any) -> Any:
    """The episode and the step of each frame of a batch of stacks."""
    flat = np.ascontiguousarray(stacks).reshape(len(stacks), STACK, -1)[..., :8]
    return np.ascontiguousarray(flat).view(np.int32)


def count_wrong(sampled: Sampled) -> int:
    """How many transitions have a stack that was not theirs; what follows a termination is of no use to a learner."""
    obs, following = numbers(sampled.obs), numbers(sampled.following)
    episode, step = obs[:, -1, 0], obs[:, -1, 1]
    back = np.arange(STACK - 1, -1, -1)
    right = [
        np.stack([np.tile(episode[:, None], STACK), np.maximum(at[:, None] - back, 0)], -1) for at in (step, step + 1)
    ]
    obs_right = (obs == right[0]).all((1, 2))
    following_right = (following == right[1]).all((1, 2)) | np.asarray(sampled.terminated, bool).reshape(-1)
    return int((~(obs_right & following_right)).sum())


class Kept:
    """A replay buffer of stacked frames."""

    arrays: int | None = None
    """The bytes of the arrays that it holds, where it tells."""
    sample: Any
    """Draws so many, in the library's own form."""

    def __init__(self, capacity: int) -> None:
        raise NotImplementedError

    def add(self, step: Step) -> None:
        raise NotImplementedError

    def transitions(self) -> int:
        """How many can be drawn."""
        raise NotImplementedError

    def read(self, sample: Any) -> Sampled:
        raise NotImplementedError


class AnystorePlain(Kept):
    options: ClassVar[dict[str, Any]] = {}

    def __init__(self, capacity: int) -> None:
        from anystore import ArraySpec
        from anystore.replay import ReplayBuffer

        stack, flag = ArraySpec((STACK, SIDE, SIDE), "uint8"), ArraySpec((), "bool")
        spec = {
            "obs": stack,
            "next_obs": stack,
            "action": ArraySpec((), "int64"),
            "reward": ArraySpec((), "float32"),
            "terminated": flag,
            "truncated": flag,
        }
        self.buffer = ReplayBuffer(spec, capacity, seed=0, **self.options)
        self.sample = self.buffer.sample

    def add(self, step: Step) -> None:
        obs, following, action, reward, terminated, truncated = step
        flags = {"terminated": terminated, "truncated": truncated}
        self.buffer.add({"obs": obs, "next_obs": following, "action": action, "reward": reward, **flags})

    @property
    def arrays(self) -> int:  # type: ignore[override]
        return self.buffer.nbytes

    def transitions(self) -> int:
        return len(self.buffer)

    def read(self, sample: Any) -> Sampled:
        return Sampled(sample.items["obs"], sample.items["next_obs"], sample.items["terminated"])


class AnystoreNext(AnystorePlain):
    options: ClassVar[dict[str, Any]] = {"shared": {"next_obs": "obs"}}


class AnystoreFrames(AnystorePlain):
    options: ClassVar[dict[str, Any]] = {"shared": {"next_obs": "obs"}, "stacks": {"obs": 0}}


class Cpprb(Kept):
    options: ClassVar[dict[str, Any]] = {}

    def __init__(self, capacity: int) -> None:
        from cpprb import ReplayBuffer

        stack = {"shape": (SIDE, SIDE, STACK), "dtype": np.uint8}
        fields = {
            "obs": stack,
            "next_obs": stack,
            "action": {"dtype": np.int64},
            "reward": {},
            "terminated": {"dtype": bool},
        }
        if "next_of" in self.options:
            del fields["next_obs"]
        self.buffer = ReplayBuffer(capacity, fields, **self.options)
        self.sample = self.buffer.sample

    def add(self, step: Step) -> None:
        obs, following = np.moveaxis(step.obs, 0, -1), np.moveaxis(step.following, 0, -1)
        flags = {"action": step.action, "reward": step.reward, "terminated": step.terminated}
        self.buffer.add(obs=obs, next_obs=following, **flags)
        if step.terminated or step.truncated:
            self.buffer.on_episode_end()

    def transitions(self) -> int:
        return int(self.buffer.get_stored_size())

    def read(self, sample: Any) -> Sampled:
        obs, following = (np.moveaxis(sample[key], -1, 1) for key in ("obs", "next_obs"))
        return Sampled(obs, following, sample["terminated"])


class CpprbNext(Cpprb):
    options: ClassVar[dict[str, Any]] = {"next_of": "obs"}


class CpprbFrames(Cpprb):
    options: ClassVar[dict[str, Any]] = {"next_of": "obs", "stack_compress": "obs"}


class StableBaselines3(Kept):
    alone = False

    def __init__(self, capacity: int) -> None:
        from gymnasium import spaces
        from stable_baselines3.common.buffers import ReplayBuffer

        box, action = spaces.Box(0, 255, (STACK, SIDE, SIDE), np.uint8), spaces.Discrete(6)
        options = {"optimize_memory_usage": self.alone, "handle_timeout_termination": not self.alone}
        self.buffer = ReplayBuffer(capacity, box, action, "cpu", **options)
        self.sample = self.buffer.sample

    def add(self, step: Step) -> None:
        ends, infos = step.terminated or step.truncated, [{"TimeLimit.truncated": step.truncated}]
        flags = np.array([step.reward]), np.array([step.terminated if self.alone else ends])
        self.buffer.add(step.obs, step.following, np.array([step.action]), *flags, infos)

    @property
    def arrays(self) -> int:  # type: ignore[override]
        return sum(array.nbytes for array in vars(self.buffer).values() if isinstance(array, np.ndarray))

    def transitions(self) -> int:
        return int(self.buffer.size()) - self.alone  # the oldest row is not drawn then

    def read(self, sample: Any) -> Sampled:
        return Sampled(sample.observations.numpy(), sample.next_observations.numpy(), sample.dones.numpy())


class StableBaselines3Alone(StableBaselines3):
    alone = True


class Tianshou(Kept):
    def __init__(self, capacity: int) -> None:
        from tianshou.data import ReplayBuffer

        options = {"stack_num": STACK, "ignore_obs_next": True, "save_only_last_obs": True, "sample_avail": True}
        self.buffer = ReplayBuffer(capacity, **options)

    def add(self, step: Step) -> None:
        from tianshou.data import Batch

        obs, following, act, rew, terminated, truncated = step
        flags = {"terminated": np.array(terminated), "truncated": np.array(truncated), "info": {}}
        self.buffer.add(Batch(obs=obs, obs_next=following, act=np.array(act), rew=np.array(rew), **flags))

    def sample(self, count: int) -> Any:
        return self.buffer.sample(count)[0]

    def transitions(self) -> int:
        return len(self.buffer.sample_indices(0))

    def read(self, sample: Any) -> Sampled:
        return Sampled(sample.obs, sample.obs_next, sample.terminated)


class TfAgents(Kept):
    """Trajectories: what follows an item is the next one's observation, and episodes end with an item of their own."""

    def __init__(self, capacity: int) -> None:
        from tf_agents.replay_buffers.py_hashed_replay_buffer import PyHashedReplayBuffer
        from tf_agents.specs import ArraySpec
        from tf_agents.trajectories import StepType, trajectory

        self.trajectory, self.kinds = trajectory.Trajectory, StepType
        number = ArraySpec((), np.int32)
        stack = ArraySpec((SIDE, SIDE, STACK), np.uint8)
        action, real = ArraySpec((), np.int64), ArraySpec((), np.float32)
        self.buffer = PyHashedReplayBuffer(self.trajectory(number, stack, action, (), number, real, real), capacity)
        self.last = self.kinds.FIRST

    def add(self, step: Step) -> None:
        ends = step.terminated or step.truncated
        after = self.kinds.LAST if ends else self.kinds.MID
        self._put(self.last, step.obs, step.action, after, step.reward, float(not step.terminated))
        self.last = after
        if ends:
            self._put(self.kinds.LAST, step.following, 0, self.kinds.FIRST, 0.0, 1.0)
            self.last = self.kinds.FIRST

    def _put(self, kind: Any, obs: Any, action: int, after: Any, reward: float, discount: float) -> None:
        stack = np.moveaxis(obs, 0, -1)
        leaves: Any = (
            np.int32(kind),
            stack,
            np.int64(action),
            (),
            np.int32(after),
            np.float32(reward),
            np.float32(discount),
        )
        self.buffer.add_batch(self.trajectory(*(leaf if isinstance(leaf, tuple) else leaf[None] for leaf in leaves)))

    def sample(self, count: int) -> Any:
        return self.buffer.get_next(sample_batch_size=count, num_steps=2)

    def transitions(self) -> int:
        kinds = self.buffer._storage.get(np.arange(int(self.buffer.size))).step_type
        return int((kinds != self.kinds.LAST).sum())

    def read(self, sample: Any) -> Sampled:
        inside = sample.step_type[:, 0] != self.kinds.LAST
        stacks = np.moveaxis(sample.observation[inside], -1, 2)
        return Sampled(stacks[:, 0], stacks[:, 1], sample.discount[inside, 0] == 0)


KINDS: dict[str, Callable[[int], Kept]] = {
    "anystore, plain": AnystorePlain,
    "anystore, next_obs shared": AnystoreNext,
    "anystore, frames shared": AnystoreFrames,
    "cpprb, plain": Cpprb,
    "cpprb, next_of": CpprbNext,
    "cpprb, next_of and stack_compress": CpprbFrames,
    "Stable-Baselines3, plain": StableBaselines3,
    "Stable-Baselines3, optimize_memory_usage": StableBaselines3Alone,
    "Tianshou, save_only_last_obs and ignore_obs_next": Tianshou,
    "TF-Agents PyHashedReplayBuffer": TfAgents,
}
ENVIRONMENTS = {
    "anystore": [name for name in KINDS if name.startswith("anystore")],
    "cpprb": [name for name in KINDS if name.startswith("cpprb")],
    "stable_baselines3": [name for name in KINDS if name.startswith("Stable")],
    "tianshou": [name for name in KINDS if name.startswith("Tianshou")],
    "tf_agents": [name for name in KINDS if name.startswith("TF")],
}
"""Which of them run in the environment of each peer."""


def fill(buffer: Kept, count: int) -> None:
    for step in steps(count):
        buffer.add(step)


def microseconds(calls: Iterator[Callable[[], object]]) -> float:
    """The median of what they take."""
    took = []
    for call in calls:
        start = time.perf_counter()
        call()
        took.append(time.perf_counter() - start)
    return float(np.median(took) * 1e6)


def measure(kind: Callable[[int], Kept]) -> dict[str, Any]:
    """What a full buffer adds to the resident memory of this process, and whether its samples are right."""
    warm = kind(WARM_UP // 2)
    fill(warm, WARM_UP)
    warm.sample(8)
    del warm
    before = resident_bytes()
    buffer = kind(CAPACITY)
    fill(buffer, WRITTEN)
    resident, there = resident_bytes() - before, buffer.transitions()
    batches = [buffer.read(buffer.sample(BATCH)) for _ in range(CHECKED)]
    some = list(steps(200))
    return {
        "transitions": there,
        "resident": resident / there,
        "arrays": None if buffer.arrays is None else buffer.arrays / there,
        "drawn": sum(len(batch.obs) for batch in batches),
        "wrong": sum(map(count_wrong, batches)),
        "sample": microseconds(partial(buffer.sample, BATCH) for _ in range(CHECKED)),
        "add": microseconds(partial(buffer.add, step) for step in some),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    print(json.dumps(measure(KINDS[parser.parse_args().kind])))


if __name__ == "__main__":
    main()
