"""A DQN agent of TF-Agents that learns CartPole from a NumpyStorage.

A driver of TF-Agents steps the environment; an observer writes each step to the storage, in a circle. For training,
one call reads all the pairs of consecutive steps of a batch. At the end policy and storage are saved in one
checkpoint, and restored from it.

    pip install anystore tf-agents==0.19.0 tensorflow==2.15.1 numpy==1.26.4   # Python 3.11 or older
    python examples/tf_agents_dqn.py
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tf_agents.agents.dqn import dqn_agent
from tf_agents.drivers import py_driver
from tf_agents.environments import suite_gym
from tf_agents.networks import q_network
from tf_agents.policies import py_tf_eager_policy
from tf_agents.specs import tensor_spec
from tf_agents.utils import common

from anystore import NumpyState, NumpyStorage  # instead of: from tf_agents.utils.numpy_storage import ...


class Replay(tf.Module):  # type: ignore[misc]  # TensorFlow has no type hints
    """The last steps of the collection, and the observer that adds to them."""

    def __init__(self, data_spec: Any, capacity: int, seed: int) -> None:
        super().__init__()
        self._storage = NumpyStorage(data_spec, capacity)
        self._state = NumpyState()
        self._state.added = np.int64(0)
        self._capacity = capacity
        self._rng = np.random.default_rng(seed)

    def add(self, step: Any) -> None:
        self._storage.set(int(self._state.added) % self._capacity, step)
        self._state.added += 1

    def sample(self, count: int) -> Any:
        """Pairs of consecutive steps, with the axes [count, 2] in front."""
        added = int(self._state.added)
        oldest = max(added - self._capacity, 0)
        first = self._rng.integers(oldest, added - 1, count)
        return self._storage.get((first[:, None] + [0, 1]) % self._capacity)

    def all_steps(self) -> Any:
        return self._storage.get(...)


def make_agent(env: Any, epsilon: Any) -> dqn_agent.DdqnAgent:
    observation, action = tensor_spec.from_spec((env.observation_spec(), env.action_spec()))
    agent = dqn_agent.DdqnAgent(
        tensor_spec.from_spec(env.time_step_spec()),
        action,
        q_network=q_network.QNetwork(observation, action, fc_layer_params=(128, 128)),
        optimizer=tf.keras.optimizers.legacy.Adam(5e-4),
        epsilon_greedy=lambda: epsilon,
        target_update_tau=0.01,
        target_update_period=1,
        td_errors_loss_fn=common.element_wise_huber_loss,
        gamma=0.99,
    )
    agent.initialize()
    agent.train = common.function(agent.train)
    return agent


def average_return(env: Any, policy: Any, episodes: int) -> float:
    total = 0.0
    for _ in range(episodes):
        step = env.reset()
        while not step.is_last():
            step = env.step(policy.action(step).action)
            total += float(step.reward)
    return total / episodes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=10_000, help="steps of the environment, at most")
    parser.add_argument("--capacity", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--reach", type=float, default=100.0, help="stop here; fail without it (chance gets 20)")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()

    tf.random.set_seed(arguments.seed)
    env, test_env = suite_gym.load("CartPole-v1"), suite_gym.load("CartPole-v1")
    env.seed(arguments.seed)
    test_env.seed(arguments.seed + 1)
    epsilon = tf.Variable(1.0)
    agent = make_agent(env, epsilon)
    data_spec = tensor_spec.to_nest_array_spec(agent.collect_data_spec)
    replay = Replay(data_spec, arguments.capacity, arguments.seed)
    collect, greedy = (
        py_tf_eager_policy.PyTFEagerPolicy(policy, use_tf_function=True)
        for policy in (agent.collect_policy, agent.policy)
    )
    driver = py_driver.PyDriver(env, collect, [replay.add], max_steps=1)

    found, start = 0.0, time.perf_counter()
    step, policy_state = env.reset(), collect.get_initial_state()
    for count in range(1, arguments.steps + 1):
        epsilon.assign(max(1 - count / 3000, 0.05))
        step, policy_state = driver.run(step, policy_state)
        if count > 500:
            agent.train(tf.nest.map_structure(tf.convert_to_tensor, replay.sample(arguments.batch)))
        if count % 1000 == 0 or count == arguments.steps:
            found = average_return(test_env, greedy, 10)
            print(f"{count:6} steps, {time.perf_counter() - start:4.0f} s: average return {found:5.1f}", flush=True)
        if found >= arguments.reach:
            break

    other, other_replay = make_agent(env, epsilon), Replay(data_spec, arguments.capacity, arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        saved = tf.train.Checkpoint(policy=agent.policy, replay=replay).save(str(Path(folder) / "checkpoint"))
        restored = tf.train.Checkpoint(policy=other.policy, replay=other_replay).restore(saved)
        restored.assert_consumed()
    pairs = zip(tf.nest.flatten(other_replay.all_steps()), tf.nest.flatten(replay.all_steps()))
    assert all(np.array_equal(one, another) for one, another in pairs)
    print(f"saved and restored: the policy and {arguments.capacity:,} rows of steps")
    if found < arguments.reach:
        raise SystemExit(f"the average return stayed below {arguments.reach:g}")


if __name__ == "__main__":
    main()
