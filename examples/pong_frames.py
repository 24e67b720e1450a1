"""Real frames in a replay buffer: Atari's Pong, stacks of four, each frame stored once.

    pip install "anystore[examples]"
    python examples/pong_frames.py --backend torch --steps 50000

Four games are played at random, through Gymnasium's own wrappers. What is observed is a stack of the newest four
frames, and so is what follows: eight frames a transition, of which one is new. The buffer stores that one, and puts the
stacks together when they are sampled. A plain buffer, which stores all eight, is filled along with it for a while, to
see that both return the same. At the end there are figures, and a picture of some transitions as they were sampled.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ale_py
import gymnasium
import numpy as np
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console

from anystore import Backend, plan, select_backend
from anystore.convert import to_numpy
from anystore.replay import Recorder, ReplayBuffer, Sample, live_stats, transition_spec

GAMES = 4
STACK = 4
COMPARED = 4_000  # transitions that the plain buffer is filled with, so that some episodes end among them
BATCH = 32
BATCHES = 200  # to measure how fast sampling is
DRAWN = 4  # transitions in the picture


def make_game() -> gymnasium.Env[Any, Any]:
    """Pong as agents get to see it: every fourth frame, gray, 84 by 84, the newest four of them at once."""
    game = gymnasium.make("ALE/Pong-v5", frameskip=1)
    return FrameStackObservation(AtariPreprocessing(game), STACK)


def play(games: Any, recorders: Sequence[Recorder], steps: int) -> NDArray[np.float64]:
    """Play on at random until there are so many transitions; the seconds that playing, and the first recorder, took."""
    seconds = np.zeros(2)
    while recorders[0].buffer.total_added < steps:
        start = time.perf_counter()
        action = games.action_space.sample()
        returned = games.step(action)
        played = time.perf_counter()
        recorders[0].step(action, *returned)
        seconds += played - start, time.perf_counter() - played
        for recorder in recorders[1:]:
            recorder.step(action, *returned)
    return seconds


def check_same(buffer: ReplayBuffer, plain: ReplayBuffer) -> int:
    """See that each transition in one is that in the other, to the last pixel; returns how many were compared."""
    compared = 0
    for one, other in zip(buffer.one_pass(BATCH), plain.one_pass(BATCH), strict=True):  # of one seed, so of one order
        pairs = [(one.rows, other.rows), *((one.items[part], other.items[part]) for part in one.items)]
        if not all(np.array_equal(to_numpy(mine), to_numpy(its)) for mine, its in pairs):
            raise AssertionError("a transition that was put together is not what was recorded")
        compared += one.rows.shape[0]
    return compared


def sampling_rate(buffer: ReplayBuffer) -> float:
    """Transitions that are sampled in a second."""
    start = time.perf_counter()
    for _ in range(BATCHES):
        sample = buffer.sample(BATCH)
    to_numpy(sample.rows)  # which waits until a GPU is done
    return BATCHES * BATCH / (time.perf_counter() - start)


def draw(sample: Sample, actions: Sequence[str], path: Path) -> None:
    """Write a picture of transitions: the stack that was observed, and the frame that followed."""
    items = {part: to_numpy(leaf) for part, leaf in sample.items.items()}
    frames = np.concatenate([items["obs"], items["next_obs"][:, -1:]], axis=1)
    names = [*(f"{age} before" for age in range(STACK - 1, 0, -1)), "newest", "what followed"]
    figure = Figure(figsize=(2 * (STACK + 1), 2.2 * DRAWN), layout="constrained")
    axes = figure.subplots(DRAWN, STACK + 1)
    for row in range(DRAWN):
        for column, name in enumerate(names):
            axes[row, column].imshow(frames[row, column], cmap="gray", vmin=0, vmax=255)
            axes[row, column].set(xticks=[], yticks=[], title=name if row == 0 else "")
        number, action = to_numpy(sample.rows)[row], actions[items["action"][row]]
        end = " terminated" * bool(items["terminated"][row]) + " truncated" * bool(items["truncated"][row])
        axes[row, 0].set_ylabel(f"transition {number:,}\n{action}, reward {items['reward'][row]:+.0f}{end}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Backend]:
    """The options, and the backend that they name."""
    parser = argparse.ArgumentParser(
        description="Store Atari's Pong in an anystore.replay.ReplayBuffer, frame by frame."
    )
    parser.add_argument("--backend", default="numpy", help="array library of the buffer (default: %(default)s)")
    parser.add_argument("--device", help="where it keeps its items, such as cuda:0 (default: the library's own)")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is random (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20_000, help="transitions to record (default: %(default)s)")
    parser.add_argument("--output", type=Path, default="pong.png", help="picture to write (default: %(default)s)")
    options = parser.parse_args(argv)
    if options.steps < BATCH:
        parser.error(f"--steps: expected at least {BATCH}, found {options.steps}")
    try:
        return options, select_backend(options.backend, options.device)
    except (ImportError, ValueError) as error:
        parser.error(str(error))


def main(argv: Sequence[str] | None = None) -> int:
    """Record, compare, measure and draw."""
    options, backend = parse(argv)
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    gymnasium.register_envs(ale_py)
    console = Console(highlight=False, soft_wrap=True)

    games = gymnasium.vector.SyncVectorEnv([make_game] * GAMES)
    spec, few = transition_spec(games), min(options.steps, COMPARED)
    of_both: dict[str, Any] = {"lanes": GAMES, "backend": backend, "seed": options.seed}
    buffer = ReplayBuffer(spec, options.steps + GAMES, shared={"next_obs": "obs"}, stacks={"obs": 0}, **of_both)
    plain = ReplayBuffer(spec, few + GAMES, **of_both)
    recorders = [Recorder(buffer, games), Recorder(plain, games)]
    games.action_space.seed(options.seed)
    returned = games.reset(seed=options.seed)
    for recorder in recorders:
        recorder.reset(*returned)

    with live_stats(buffer, console=console):
        seconds = play(games, recorders, few)
        compared = check_same(buffer, plain)
        seconds += play(games, recorders[:1], options.steps)
    rates = buffer.total_added / seconds
    pong: Any = games.envs[0].unwrapped
    draw(buffer.sample(DRAWN), pong.get_action_meanings(), options.output)
    games.close()

    each, plainly = buffer.nbytes / buffer.capacity, plan(spec, 1_000).nbytes / 1_000
    console.print(f"{buffer.total_added:,} transitions of {recorders[0].episodes} whole episodes on {backend.name}")
    console.print(f"{compared:,} of them compared with those of a plain buffer: the same")
    console.print(f"played    {rates[0]:9,.0f} transitions a second")
    console.print(f"recorded  {rates[1]:9,.0f} transitions a second")
    console.print(f"sampled   {sampling_rate(buffer):9,.0f} transitions a second, in batches of {BATCH}")
    console.print(
        f"{each:,.0f} bytes a transition; {plainly:,.0f} in the plain form: {plainly / each:.2f} times as many"
    )
    console.print(f"picture: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
