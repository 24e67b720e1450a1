"""Learn to balance a pole: steps of Gymnasium's CartPole-v1 go into a storage, and batches of them train a learner.

    pip install "anystore[examples]"
    python examples/cartpole.py --backend torch --seed 1

The learner is fitted Q iteration with a small network of scikit-learn, so that it takes seconds on a plain machine.
The storage stands between the environment and the learner: every step sets one of its rows, round and round, and
every so often the learner gets two thousand of them, drawn at random. On another backend nothing else changes.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from sklearn.neural_network import MLPRegressor
from threadpoolctl import threadpool_limits

from anystore import ArraySpec, Backend, Storage, select_backend
from anystore.convert import to_numpy

ENVIRONMENT = "CartPole-v1"
ACTIONS = 2
SCALE = np.array([2.4, 2.0, 0.21, 2.0], np.float32)  # where an episode ends, for cart and pole; a high speed of each
GOAL = 195  # the mean return to reach
EVALUATED = 100  # episodes, each time

CAPACITY = 10_000
WARM_UP = 1_000  # steps before the first learning
LEARN_EVERY = 32
DRAWN = 2_048  # transitions, each time
EVALUATE_EVERY = 1_000
EXPLORATION = 6_000  # steps until almost every action is the learner's
DISCOUNT = 0.99


class Transition(NamedTuple):
    """One step in the environment, or a batch of them, or the specs of either."""

    obs: Any
    action: Any
    reward: Any
    next_obs: Any
    terminated: Any


class Training(NamedTuple):
    """The learner at its best evaluation, and pairs of a step and the (mean) return of what ended there."""

    best: QLearner
    episodes: list[tuple[int, float]]
    evaluations: list[tuple[int, float]]


class QLearner:
    """What each action is worth, by a network that is fitted, again and again, to what it says of the next step."""

    def __init__(self, seed: int) -> None:
        self._network = MLPRegressor(hidden_layer_sizes=(64, 64), batch_size=64, random_state=seed)
        # The first targets take a prediction, and scikit-learn predicts only after a fit.
        self._network.partial_fit(np.zeros((64, SCALE.size), np.float32), np.zeros((64, ACTIONS), np.float32))

    def values(self, obs: NDArray[Any]) -> NDArray[Any]:
        """The value of each action (a column) for each observation (a row)."""
        values: NDArray[Any] = self._network.predict(obs / SCALE)
        return values

    def act(self, obs: NDArray[Any]) -> NDArray[np.intp]:
        """The best action for each observation."""
        best: NDArray[np.intp] = self.values(obs).argmax(axis=1)
        return best

    def learn(self, batch: Transition) -> None:
        """Fit the network, for one pass over a batch, to the rewards and its own values of what came next."""
        # Nothing comes after a terminated episode, whereas a truncated one would have gone on.
        future = np.where(batch.terminated, 0.0, self.values(batch.next_obs).max(axis=1))
        targets = self.values(batch.obs)
        targets[np.arange(len(targets)), batch.action] = batch.reward + DISCOUNT * future
        self._network.partial_fit(batch.obs / SCALE, targets)


def make_memory(env: gymnasium.Env[Any, Any], backend: Backend) -> Storage:
    """An empty storage for the transitions of `env`."""
    spec = Transition(
        obs=env.observation_space,
        action=ArraySpec((), "int32"),  # the action space says int64, which JAX has only when told so
        reward=ArraySpec((), "float32"),
        next_obs=env.observation_space,
        terminated=ArraySpec((), "bool"),
    )
    return Storage(spec, CAPACITY, backend=backend)


def draw(memory: Storage, filled: int, rng: np.random.Generator) -> Transition:
    """Random transitions among the first `filled` rows, as NumPy arrays whatever the backend."""
    batch = memory.get(rng.integers(filled, size=DRAWN))
    return Transition(*map(to_numpy, batch))


def play(
    env: gymnasium.Env[Any, Any], learner: QLearner, seed: int, rng: np.random.Generator
) -> Iterator[tuple[Transition, bool]]:
    """Episode after episode without end: each transition, and whether its episode is over.

    Actions are random at first, and more and more the learner's.
    """
    obs, _ = env.reset(seed=seed)
    chance = 1.0
    while True:
        action = int(rng.integers(ACTIONS) if rng.random() < chance else learner.act(obs[None])[0])
        next_obs, reward, terminated, truncated, _ = env.step(action)
        yield Transition(obs, action, reward, next_obs, terminated), terminated or truncated
        obs = env.reset()[0] if terminated or truncated else next_obs
        chance = max(chance - 1 / EXPLORATION, 0.05)


def evaluate(learner: QLearner, seed: int) -> float:
    """The mean return of the learner's own actions, over episodes that are played side by side."""
    envs = gymnasium.make_vec(ENVIRONMENT, num_envs=EVALUATED)
    obs, _ = envs.reset(seed=seed)
    returns, running = np.zeros(EVALUATED), np.ones(EVALUATED, bool)
    while running.any():
        obs, rewards, terminated, truncated, _ = envs.step(learner.act(obs))
        returns += rewards * running
        running &= ~(terminated | truncated)
    envs.close()
    return float(returns.mean())


def train(memory: Storage, env: gymnasium.Env[Any, Any], steps: int, seed: int, bar: Progress) -> Training:
    """Play, remember and learn, for so many steps; the best that the learner was is kept."""
    rng = np.random.default_rng(seed)
    learner = best = QLearner(seed)
    episodes, evaluations, highest, episode_return = [], [], -np.inf, 0.0
    task = bar.add_task("", total=steps)
    for step, (transition, over) in enumerate(islice(play(env, learner, seed, rng), steps), start=1):
        memory.set((step - 1) % memory.capacity, transition)
        episode_return += transition.reward
        if over:
            episodes.append((step, episode_return))
            episode_return = 0.0
        if step >= WARM_UP and step % LEARN_EVERY == 0:
            learner.learn(draw(memory, min(step, memory.capacity), rng))
        if step % EVALUATE_EVERY == 0 or step == steps:
            mean = evaluate(learner, seed=int(rng.integers(2**31)))
            evaluations.append((step, mean))
            bar.update(task, description=f"mean return {mean:.0f}")
            if mean > highest:
                best, highest = copy.deepcopy(learner), mean
        bar.update(task, completed=step)
    return Training(best, episodes, evaluations)


def draw_curve(training: Training, final: float, title: str, path: Path) -> None:
    """Write the learning curve as a picture."""
    steps, returns = zip(*training.episodes)
    smooth = [np.mean(returns[max(0, end - 10) : end]) for end in range(1, len(returns) + 1)]
    evaluated, means = zip(*training.evaluations)
    best = evaluated[np.argmax(means)]

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel="steps in the environment", ylabel="return", ylim=(0, 525))
    axes.spines[["top", "right"]].set_visible(False)
    axes.axhline(GOAL, color="tab:green", linestyle="--", label=f"goal: {GOAL}")
    axes.plot(steps, returns, ".", color="tab:blue", alpha=0.3, label="episode, while exploring")
    axes.plot(steps, smooth, color="tab:blue", label="mean of the last 10 episodes")
    axes.plot(evaluated, means, "D-", color="tab:orange", markersize=4, label=f"mean of {EVALUATED} greedy episodes")
    axes.plot(best, final, "*", color="tab:red", markersize=14, clip_on=False, label=f"final evaluation: {final:.1f}")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Backend]:
    """The options, and the backend that they name."""
    parser = argparse.ArgumentParser(description=f"Learn {ENVIRONMENT} from transitions in an anystore.Storage.")
    parser.add_argument("--backend", default="numpy", help="array library of the storage (default: %(default)s)")
    parser.add_argument("--device", help="where it keeps its buffers, such as cuda:0 (default: the library's own)")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is random (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=15_000, help="how many to train for (default: %(default)s)")
    parser.add_argument("--output", type=Path, default="cartpole.png", help="picture to write (default: %(default)s)")
    options = parser.parse_args(argv)
    if options.steps < WARM_UP:
        parser.error(f"--steps: expected at least {WARM_UP}, found {options.steps}")
    try:
        return options, select_backend(options.backend, options.device)
    except (ImportError, ValueError) as error:
        parser.error(str(error))


def main(argv: Sequence[str] | None = None) -> int:
    """Train, evaluate and draw; the exit status is 0 if the goal is reached, else 1."""
    options, backend = parse(argv)
    env = gymnasium.make(ENVIRONMENT)
    memory = make_memory(env, backend)
    print(memory)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    # Matrices this small gain nothing from several threads, which on a busy machine wait for one another.
    with threadpool_limits(1), Progress(*columns) as bar:
        training = train(memory, env, options.steps, options.seed, bar)
        final = evaluate(training.best, seed=options.seed)
    env.close()

    title = f"{ENVIRONMENT}, transitions on {backend.name} ({backend.device}), seed {options.seed}"
    draw_curve(training, final, title, options.output)
    print(f"learning curve: {options.output}")
    print(f"mean return over {EVALUATED} episodes: {final:.1f}")
    if final < GOAL:
        print(f"the goal of {GOAL} was not reached in {options.steps:,} steps", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
