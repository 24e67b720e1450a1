"""Learn to balance a pole: the episodes of Gymnasium's CartPole-v1 go into a storage, and what is drawn trains a policy.

    pip install "anystore[examples]"
    python examples/cartpole.py --backend torch --seed 1

The learner is fitted Q iteration with a small network of scikit-learn, so it runs in seconds wherever Python does. The
storage is the memory between the two: each step of the environment sets one row of it, round and round, and each
round of learning gets some thousands of its rows, drawn at random. Change the backend and nothing else changes.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import gymnasium
import matplotlib
import numpy as np
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from sklearn.neural_network import MLPRegressor
from threadpoolctl import threadpool_limits

from anystore import ArraySpec, Storage, select_backend
from anystore.convert import to_numpy

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

ENVIRONMENT = "CartPole-v1"
GOAL = 195.0  # the mean return that counts as success
SOLVED = 475.0  # the one at which Gymnasium calls CartPole-v1 solved, and at which training ends early
EVALUATION_EPISODES = 100

CAPACITY = 10_000
WARM_UP = 1_000
LEARN_EVERY = 32
DRAW = 2_048
EVALUATE_EVERY = 1_000
EXPLORE = 6_000
DISCOUNT = 0.99
SCALE = np.array([2.4, 2.0, 0.21, 2.0], np.float32)  # where the cart leaves the track and the pole falls; usual speeds


class Transition(NamedTuple):
    """One step of the environment, or a batch of them; with specs in its fields, the spec of either."""

    obs: Any
    action: Any
    reward: Any
    next_obs: Any
    terminated: Any


class QLearner:
    """The value of each action, from a network that is fitted again and again to rewards plus its own predictions."""

    def __init__(self, n_actions: int, seed: int) -> None:
        self._network = MLPRegressor(
            hidden_layer_sizes=(64, 64), batch_size=64, learning_rate_init=2e-3, random_state=seed
        )
        # Only a network that was fitted predicts, and the first targets need a prediction.
        self._network.partial_fit(np.zeros((64, SCALE.size), np.float32), np.zeros((64, n_actions), np.float32))

    def values(self, obs: NDArray[Any]) -> NDArray[Any]:
        """The value of each action (columns) for each observation (rows)."""
        values: NDArray[Any] = self._network.predict(obs / SCALE)
        return values

    def act(self, obs: NDArray[Any]) -> NDArray[Any]:
        """The best action for each observation."""
        return self.values(obs).argmax(axis=1)

    def learn(self, batch: Transition) -> None:
        """Fit the network once to the one-step targets of a batch."""
        # A truncated episode would have gone on; only after a terminated one is there nothing more to come.
        future = np.where(batch.terminated, 0.0, self.values(batch.next_obs).max(axis=1))
        targets = self.values(batch.obs)
        targets[np.arange(len(targets)), batch.action] = batch.reward + DISCOUNT * future
        self._network.partial_fit(batch.obs / SCALE, targets)


@dataclass
class Curve:
    """How training went: (step, return) of each episode, and (step, mean return) of each evaluation."""

    episodes: list[tuple[int, float]] = field(default_factory=list)
    evaluations: list[tuple[int, float]] = field(default_factory=list)


def make_memory(env: gymnasium.Env[Any, Any], backend: Any) -> Storage:
    """An empty storage for the transitions of `env`."""
    spec = Transition(
        obs=env.observation_space,
        action=ArraySpec((), "int32"),  # that of the action space is int64, which not every library has
        reward=ArraySpec((), "float32"),
        next_obs=env.observation_space,
        terminated=ArraySpec((), "bool"),
    )
    return Storage(spec, CAPACITY, backend=backend)


def draw(memory: Storage, filled: int, rng: np.random.Generator) -> Transition:
    """Transitions from rows drawn at random, as NumPy arrays whatever the backend."""
    batch = memory.get(rng.integers(filled, size=DRAW))
    return Transition(*map(to_numpy, batch))


def evaluate(learner: QLearner, seed: int) -> float:
    """The mean return of the greedy policy, over episodes that are played side by side."""
    envs = gymnasium.make_vec(ENVIRONMENT, num_envs=EVALUATION_EPISODES)
    obs, _ = envs.reset(seed=seed)
    returns, running = np.zeros(EVALUATION_EPISODES), np.ones(EVALUATION_EPISODES, bool)
    while running.any():
        obs, rewards, terminated, truncated, _ = envs.step(learner.act(obs))
        returns += rewards * running
        running &= ~(terminated | truncated)
    envs.close()
    return float(returns.mean())


def train(
    env: gymnasium.Env[Any, Any], memory: Storage, steps: int, seed: int, bar: Progress
) -> tuple[QLearner, Curve]:
    """Play, remember and learn until an evaluation finds the task solved, or for so many steps.

    Returns
    -------
    QLearner
        As it was at its best evaluation.
    Curve
        How it went.
    """
    rng = np.random.default_rng(seed)
    learner = best = QLearner(n_actions=2, seed=seed)
    curve, best_mean, episode_return = Curve(), -np.inf, 0.0
    task = bar.add_task("evaluation:   -", total=steps)
    obs, _ = env.reset(seed=seed)
    for step in range(1, steps + 1):
        explores = rng.random() < max(0.05, 1 - step / EXPLORE)
        action = int(rng.integers(2) if explores else learner.act(obs[None])[0])
        next_obs, reward, terminated, truncated, _ = env.step(action)
        memory.set((step - 1) % memory.capacity, Transition(obs, action, reward, next_obs, terminated))
        obs, episode_return = next_obs, episode_return + float(reward)
        if terminated or truncated:
            curve.episodes.append((step, episode_return))
            obs, episode_return = env.reset()[0], 0.0
        if step >= WARM_UP and step % LEARN_EVERY == 0:
            learner.learn(draw(memory, min(step, memory.capacity), rng))
        if step >= WARM_UP and step % EVALUATE_EVERY == 0:
            mean = evaluate(learner, int(rng.integers(2**31)))
            curve.evaluations.append((step, mean))
            if mean > best_mean:
                best, best_mean = copy.deepcopy(learner), mean
            bar.update(task, description=f"evaluation: {mean:3.0f}")
            if mean >= SOLVED:
                break
        bar.update(task, completed=step)
    return best, curve
