"""Learn to balance a pole by DQN, from a prioritised replay buffer: Gymnasium's CartPole-v1, solved in about a minute.

    pip install "anystore[examples,torch]"
    python examples/dqn.py --backend torch --learner torch --seed 1

Sixteen environments step at once. A `Recorder` makes transitions of what they return, the `ReplayBuffer` keeps them,
draws batches by their priorities with n-step returns and importance weights, and takes the errors of the learner as new
priorities. The learner is double DQN with a small network, in torch or in JAX: whichever is installed. The buffer may
be in either, or in another library; batches are handed over without a copy where that can be.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from anystore import Backend, select_backend
from anystore.replay import Prioritized, Recorder, ReplayBuffer, Sample, live_stats, transition_spec

ENVIRONMENT = "CartPole-v1"
OBSERVED, ACTIONS = 4, 2
SCALE = np.array([2.4, 2.0, 0.21, 2.0], np.float32)  # where an episode ends, for cart and pole; a high speed of each
GOAL = 475  # the mean return to reach, as its authors say
EVALUATED = 100  # episodes, each time

ENVIRONMENTS = 16
CAPACITY = 50_000
WARM_UP = 1_000  # transitions before the first learning
EXPLORATION = 10_000  # transitions until almost every action is the learner's
EVALUATE_EVERY = 2_000  # transitions

BATCH = 128
UPDATES = 4  # for each step of all environments
N_STEP = 3
DISCOUNT = 0.99
HIDDEN = 128
LEARNING_RATE = 1e-3
FOLLOW = 0.01  # how far the target network goes towards the other in an update


class Learner(NamedTuple):
    """A network that learns what each action is worth.

    Attributes
    ----------
    values
        Takes observations of shape (n, 4); returns the value of each action, of shape (n, 2).
    learn
        Takes a sample, in arrays of `library`; returns the error of each item, of shape (n,), as an array of it.
    library
        "torch" or "jax".
    """

    values: Callable[[NDArray[np.float32]], NDArray[np.float32]]
    learn: Callable[[Sample], Any]
    library: str


def torch_learner(seed: int, device: str) -> Learner:
    """Double DQN in torch, where the samples are."""
    import torch
    from torch import nn

    torch.set_num_threads(1)  # matrices this small gain nothing from several
    torch.manual_seed(seed)

    def network() -> nn.Module:
        hidden = nn.Linear(OBSERVED, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU()
        return nn.Sequential(*hidden, nn.Linear(HIDDEN, ACTIONS)).to(device)

    online, target = network(), network()
    target.load_state_dict(online.state_dict())
    optimizer = torch.optim.Adam(online.parameters(), LEARNING_RATE)
    scale = torch.tensor(SCALE, device=device)

    def learn(sample: Sample) -> Any:
        items = sample.items
        obs, next_obs = items["obs"] / scale, items["next_obs"] / scale
        with torch.no_grad():
            best = online(next_obs).argmax(dim=1, keepdim=True)
            goal = items["reward"] + sample.discounts * target(next_obs).gather(1, best)[:, 0]
        values = online(obs).gather(1, items["action"].long()[:, None])[:, 0]
        loss = (sample.weights * nn.functional.smooth_l1_loss(values, goal, reduction="none")).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(target.parameters(), online.parameters()):
                slow.lerp_(fast, FOLLOW)
            return (values - goal).abs()

    @torch.no_grad()
    def values(obs: NDArray[np.float32]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = online(torch.tensor(obs, device=device) / scale).cpu().numpy()
        return found

    return Learner(values, learn, "torch")


def jax_learner(seed: int, device: str) -> Learner:
    """Double DQN in plain JAX, with Adam by hand; it follows its arguments to where the samples are."""
    import jax
    import jax.numpy as jnp

    def layer(key: Any, fan_in: int, fan_out: int) -> tuple[Any, Any]:
        return jax.random.uniform(key, (fan_in, fan_out), minval=-1, maxval=1) / fan_in**0.5, jnp.zeros(fan_out)

    def network(layers: Any, obs: Any) -> Any:
        *hidden, (weights, bias) = layers
        found = obs / SCALE
        for each in hidden:
            found = jax.nn.relu(found @ each[0] + each[1])
        return found @ weights + bias

    def loss(online: Any, target: Any, items: Any, weights: Any, discounts: Any) -> Any:
        each = jnp.arange(len(weights))
        best = network(online, items["next_obs"]).argmax(axis=1)
        goal = jax.lax.stop_gradient(items["reward"] + discounts * network(target, items["next_obs"])[each, best])
        errors = network(online, items["obs"])[each, items["action"]] - goal
        size = jnp.abs(errors)
        huber = jnp.where(size < 1, errors**2 / 2, size - 0.5)
        return jnp.mean(weights * huber), size

    def adam(step: Any, layers: Any, gradients: Any, means: Any, squares: Any) -> tuple[Any, Any, Any]:
        means = jax.tree.map(lambda mean, new: 0.9 * mean + 0.1 * new, means, gradients)
        squares = jax.tree.map(lambda square, new: 0.999 * square + 0.001 * new**2, squares, gradients)
        rate = LEARNING_RATE * jnp.sqrt(1 - 0.999**step) / (1 - 0.9**step)
        layers = jax.tree.map(
            lambda old, mean, square: old - rate * mean / (jnp.sqrt(square) + 1e-8), layers, means, squares
        )
        return layers, means, squares

    @jax.jit
    def update(state: Any, items: Any, weights: Any, discounts: Any) -> tuple[Any, Any]:
        step, online, target, means, squares = state
        gradients, errors = jax.grad(loss, has_aux=True)(online, target, items, weights, discounts)
        online, means, squares = adam(step, online, gradients, means, squares)
        target = jax.tree.map(lambda slow, fast: slow + FOLLOW * (fast - slow), target, online)
        return (step + 1, online, target, means, squares), errors

    sizes = [OBSERVED, HIDDEN, HIDDEN, ACTIONS]
    keys = jax.random.split(jax.random.key(seed), len(sizes) - 1)
    online = [layer(key, fan_in, fan_out) for key, fan_in, fan_out in zip(keys, sizes, sizes[1:])]
    zeros = jax.tree.map(jnp.zeros_like, online)
    state = (jnp.float32(1), online, online, zeros, zeros)
    forward = jax.jit(network)

    def learn(sample: Sample) -> Any:
        nonlocal state
        state, errors = update(state, sample.items, sample.weights, sample.discounts)
        return errors

    return Learner(lambda obs: np.asarray(forward(state[1], obs)), learn, "jax")


LEARNERS = {"torch": torch_learner, "jax": jax_learner}


def make_buffer(env: Any, backend: Backend, seed: int) -> ReplayBuffer:
    """An empty buffer for the transitions of these environments."""
    return ReplayBuffer(
        transition_spec(env),
        CAPACITY,
        sampler=Prioritized(alpha=0.6, beta=0.4),
        lanes=ENVIRONMENTS,
        shared={"next_obs": "obs"},
        backend=backend,
        seed=seed,
    )


def evaluate(learner: Learner, seed: int) -> float:
    """The mean return of the learner's own actions, over episodes that are played side by side."""
    envs = gymnasium.make_vec(ENVIRONMENT, num_envs=EVALUATED)
    obs, _ = envs.reset(seed=seed)
    returns, running = np.zeros(EVALUATED), np.ones(EVALUATED, bool)
    while running.any():
        obs, rewards, terminated, truncated, _ = envs.step(learner.values(obs).argmax(axis=1))
        returns += rewards * running
        running &= ~(terminated | truncated)
    envs.close()
    return float(returns.mean())


def train(buffer: ReplayBuffer, env: Any, learner: Learner, steps: int, seed: int, say: Callable[[str], None]) -> float:
    """Play, remember and learn until the pole stays up, or so many transitions are made; returns the final evaluation.

    A learner that reaches the goal once is evaluated again, on other episodes; that is what counts.
    """
    rng = np.random.default_rng(seed)
    sampler = buffer.sampler
    assert isinstance(sampler, Prioritized)
    recorder = Recorder(buffer, env)
    # Drawn when they are asked for, not ahead, so that a seed gives the same run whatever the machine does.
    batches = buffer.batches(BATCH, prefetch=0, to=learner.library, n_step=N_STEP, discount=DISCOUNT)
    obs, infos = env.reset(seed=seed)
    recorder.reset(obs, infos)
    evaluation, final = EVALUATE_EVERY, 0.0
    while buffer.total_added < steps:
        progress = buffer.total_added / steps
        explore = rng.random(ENVIRONMENTS) < max(0.02, 1 - buffer.total_added / EXPLORATION)
        action = np.where(explore, rng.integers(ACTIONS, size=ENVIRONMENTS), learner.values(obs).argmax(axis=1))
        obs, *returned = env.step(action)
        recorder.step(action, obs, *returned)
        if buffer.total_added < WARM_UP:
            continue
        sampler.beta = 0.4 + 0.6 * progress
        for _, sample in zip(range(UPDATES), batches):
            buffer.update_priorities(sample.rows, learner.learn(sample))
        if buffer.total_added >= evaluation:
            evaluation += EVALUATE_EVERY
            mean = evaluate(learner, seed=int(rng.integers(2**31)))
            say(f"{buffer.total_added:7,} transitions, {recorder.episodes:5,} episodes, mean return {mean:5.1f}")
            if mean >= GOAL and (final := evaluate(learner, seed=int(rng.integers(2**31)))) >= GOAL:
                return final
    return evaluate(learner, seed=int(rng.integers(2**31)))


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Backend]:
    """The options, and the backend that they name."""
    parser = argparse.ArgumentParser(description=f"Solve {ENVIRONMENT} by DQN from an anystore.replay.ReplayBuffer.")
    parser.add_argument("--backend", default="numpy", help="array library of the buffer (default: %(default)s)")
    parser.add_argument("--device", help="where it keeps its items, such as cuda:0 (default: the library's own)")
    parser.add_argument("--learner", choices=LEARNERS, help="library of the learner (default: the first installed)")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is random (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100_000, help="transitions at most (default: %(default)s)")
    options = parser.parse_args(argv)
    installed = [name for name in LEARNERS if importlib.util.find_spec(name)]
    if not installed:
        parser.error("the learner needs torch or jax; pip install 'anystore[torch]' or 'anystore[jax]'")
    options.learner = options.learner or installed[0]
    try:
        return options, select_backend(options.backend, options.device)
    except (ImportError, ValueError) as error:
        parser.error(str(error))


def main(argv: Sequence[str] | None = None) -> int:
    """Train until the goal is reached; the exit status is 0 if it is, else 1."""
    options, backend = parse(argv)
    console, start = Console(highlight=False, soft_wrap=True), time.perf_counter()
    env = gymnasium.make_vec(ENVIRONMENT, num_envs=ENVIRONMENTS)
    buffer = make_buffer(env, backend, options.seed)
    learner = LEARNERS[options.learner](options.seed, buffer.device if buffer.device.startswith("cuda") else "cpu")
    with live_stats(buffer, console=console):
        final = train(buffer, env, learner, options.steps, options.seed, console.print)
    env.close()
    seconds = time.perf_counter() - start
    console.print(str(buffer.stats()))
    outcome = "solved" if final >= GOAL else "NOT SOLVED"
    console.print(
        f"{outcome}: mean return {final:.1f} over {EVALUATED} episodes, of {GOAL} to reach, after "
        f"{buffer.total_added:,} transitions and {seconds:.0f} s; buffer on {backend.name} "
        f"({backend.device}), learner in {learner.library}, seed {options.seed}"
    )
    return 0 if final >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
