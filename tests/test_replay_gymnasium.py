"""What environments return, as transitions: every one that is stored is true, whichever way episodes end and begin."""

from __future__ import annotations

import dataclasses
import doctest
import functools
import importlib
import itertools
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import optree
import pytest

from anystore import ArraySpec
from anystore.replay import ReplayBuffer
from tests.items import assert_same, host

gymnasium = pytest.importorskip("gymnasium")

from gymnasium import spaces  # noqa: E402  # after it is known to be there
from gymnasium.wrappers import FrameStackObservation  # noqa: E402

from anystore.replay.gymnasium import Recorder, transition_spec  # noqa: E402

needs_modes = pytest.mark.skipif(
    not hasattr(gymnasium.vector, "AutoresetMode"), reason="Gymnasium 1.0 has only next-step autoreset"
)
MODES = ["next_step", *(pytest.param(mode, marks=needs_modes) for mode in ("same_step", "disabled"))]
LANES = 3
STEPS = 40
DEPTH = 4
ENDS = [
    [(5, "terminated"), (3, "truncated"), (1, "terminated"), (1, "truncated"), (7, "both")],
    [(4, "truncated"), (5, "terminated")],
    [(11, "terminated"), (2, "truncated")],
]
"""For each lane, how many steps its episodes take, over and over, and how they end."""
FORMS = ["box", "dict", "stack"]
SHARED: dict[str, dict[str, Any]] = {"plain": {}, "shared": {"shared": {"next_obs": "obs"}}}
LAYOUTS = [
    *itertools.product(FORMS, SHARED.values()),
    ("stack", {"stacks": {"obs": 0}, "shared": {"next_obs": "obs"}}),
]


# Environments that tell by their observations where they are ---------------------------------------------------------


def end_of(lane: int, episode: int) -> tuple[int, str]:
    return ENDS[lane][episode % len(ENDS[lane])]


def observation(form: str, lane: int, episode: int, t: int) -> Any:
    """What is observed after `t` steps of an episode."""
    here = np.array([lane, episode, t], np.float32)
    if form == "box":
        return here
    if form == "dict":
        return {"inner": {"t": np.int64(t)}, "pair": (here, np.array([episode, lane]))}
    if form == "stack":
        return np.stack([observation("frame", lane, episode, max(0, t - age)) for age in range(DEPTH)[::-1]])
    return np.array([[lane, episode], [t, 255 - t]], np.uint8)


SPACES = {
    "box": spaces.Box(-1, 1000, (3,), np.float32),
    "frame": spaces.Box(0, 255, (2, 2), np.uint8),
    "dict": spaces.Dict(
        inner=spaces.Dict(t=spaces.Discrete(1000)),
        pair=spaces.Tuple((spaces.Box(-1, 1000, (3,), np.float32), spaces.MultiDiscrete([1000, 10]))),
    ),
}


class Scripted(gymnasium.Env):
    """Its episodes end when `ENDS` says, and each reward tells the time and the action."""

    action_space = spaces.Discrete(5)

    def __init__(self, lane: int = 0, form: str = "box", metadata: dict[str, Any] | None = None) -> None:
        self.observation_space = SPACES[form]
        self.metadata = {} if metadata is None else metadata
        self.form, self.lane = form, lane
        self.episode, self.t = -1, 0

    def reset(self, *, seed=None, options=None):
        self.episode, self.t = self.episode + 1, 0
        return observation(self.form, self.lane, self.episode, 0), {}

    def step(self, action):
        length, how = end_of(self.lane, self.episode)
        assert self.t < length, "a step after the end of the episode"
        reward = 10.0 * self.t + float(action)
        self.t += 1
        over = self.t == length
        flags = over and how != "truncated", over and how != "terminated"
        return observation(self.form, self.lane, self.episode, self.t), reward, *flags, {"t": self.t}


def make_env(form: str = "box", lane: int = 0) -> gymnasium.Env:
    return FrameStackObservation(Scripted(lane, "frame"), DEPTH) if form == "stack" else Scripted(lane, form)


def vectorized(mode: str, form: str = "box", lanes: int = LANES, **options: Any) -> gymnasium.vector.VectorEnv:
    if hasattr(gymnasium.vector, "AutoresetMode"):
        options["autoreset_mode"] = getattr(gymnasium.vector.AutoresetMode, mode.upper())
    return gymnasium.vector.SyncVectorEnv([lambda lane=lane: make_env(form, lane) for lane in range(lanes)], **options)


def play(env: Any, recorder: Recorder, steps: int, seed: int = 0, begin: bool = True) -> Iterator[np.ndarray]:
    """Random actions, and resets where nothing else does them; yields which episodes ended with each step."""
    rng = np.random.default_rng(seed)
    if begin:
        recorder.reset(*env.reset(seed=seed))
    for _ in range(steps):
        action = rng.integers(5, size=recorder.buffer.lanes)
        _, _, terminated, truncated, _ = returned = env.step(action)
        recorder.step(action, *returned)
        over = terminated | truncated
        if recorder.autoreset == "disabled" and over.any():
            recorder.reset(*env.reset(options={"reset_mask": over.copy()}), lanes=over)
        yield over


def run(*args: Any, **options: Any) -> None:
    for _ in play(*args, **options):
        pass


# What should be there ------------------------------------------------------------------------------------------------


class Where(NamedTuple):
    """A step: which one of which episode of which environment."""

    lane: int
    episode: int
    t: int

    @property
    def last(self) -> bool:
        return self.t + 1 == end_of(self.lane, self.episode)[0]


def model(mode: str, steps: int = STEPS, lanes: int = LANES) -> list[Where]:
    """The steps that should be stored, in order."""
    stored = []
    now = [Where(lane, 0, 0) for lane in range(lanes)]
    resets = [False] * lanes
    for _, lane in itertools.product(range(steps), range(lanes)):
        if resets[lane]:
            resets[lane] = False
            continue
        where = now[lane]
        stored.append(where)
        resets[lane] = mode == "next_step" and where.last
        now[lane] = Where(lane, where.episode + 1, 0) if where.last else where._replace(t=where.t + 1)
    return stored


def check_items(form: str, items: Any, expected: list[Where]) -> None:
    """Every item is the very step it should be."""
    items = host(items)
    action = items["action"]
    flags = [(where.last, end_of(where.lane, where.episode)[1]) for where in expected]
    truth = {
        "obs": stacked([observation(form, *where) for where in expected]),
        "action": action,  # told by the reward
        "reward": np.array([10 * where.t for where in expected], np.float32) + action.astype(np.float32),
        "next_obs": stacked([observation(form, lane, episode, t + 1) for lane, episode, t in expected]),
        "terminated": np.array([last and how != "truncated" for last, how in flags], bool),
        "truncated": np.array([last and how != "terminated" for last, how in flags], bool),
    }
    assert_same(items, optree.tree_map(lambda leaf, like: leaf.astype(like.dtype), truth, items))


def stacked(nests: list[Any]) -> Any:
    return optree.tree_map(lambda *leaves: np.stack(leaves), *nests)


def check_all(buffer: ReplayBuffer, form: str, expected: list[Where]) -> None:
    """All that is in the buffer, and that nothing is missing."""
    samples = list(buffer.one_pass(64))
    rows = np.concatenate([host(sample.rows) for sample in samples])
    assert buffer.total_added == len(expected)
    hidden = (DEPTH - 1) * buffer.lanes if buffer.total_added > buffer.capacity and form == "stack" else 0
    assert set(range(max(0, len(expected) - buffer.capacity) + hidden, len(expected))) <= set(rows.tolist())
    for sample in samples:
        check_items(form, sample.items, [expected[row] for row in host(sample.rows).tolist()])


def make_buffer(env: Any, capacity: int = 1000, **options: Any) -> ReplayBuffer:
    return ReplayBuffer(transition_spec(env), capacity, lanes=getattr(env, "num_envs", 1), seed=0, **options)


def recorded(mode: str, form: str = "box", steps: int = STEPS, **options: Any) -> ReplayBuffer:
    """A buffer that so many steps of a vector environment went to."""
    env = vectorized(mode, form)
    buffer = make_buffer(env, **options)
    recorder = Recorder(buffer, env)
    assert recorder.autoreset == mode
    run(env, recorder, steps)
    return buffer


# Every mode, form and layout -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "layout"), LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
class TestTruth:
    @pytest.mark.parametrize("capacity", [1000, 50])
    def test_every_transition_is_true_and_none_is_missing(self, mode, form, layout, capacity):
        check_all(recorded(mode, form, capacity=capacity, **layout), form, model(mode))

    @pytest.mark.parametrize("at_end", ["pad", "whole"])
    def test_windows_stay_in_an_episode_of_an_environment(self, mode, form, layout, at_end):
        buffer, expected = recorded(mode, form, capacity=70, **layout), model(mode)
        sample = buffer.sample(300, num_steps=4, at_end=at_end)
        items, rows = host(sample.items), host(sample.rows).tolist()
        mask = np.ones((300, 4), bool) if sample.mask is None else host(sample.mask)
        for number, row in enumerate(rows):
            real = int(mask[number].sum())
            window = optree.tree_map(lambda leaf, at=number, stop=real: leaf[at, :stop], items)
            start = expected[row]
            check_items(form, window, [start._replace(t=start.t + age) for age in range(real)])
            assert real == (4 if at_end == "whole" else min(4, len(rest_of_episode(expected, row))))

    def test_n_step_returns_end_with_the_episode(self, mode, form, layout):
        buffer, expected = recorded(mode, form, capacity=70, **layout), model(mode)
        items = [step.items for step in in_order(buffer)]
        sample = buffer.sample(300, n_step=3, discount=0.5)
        merged, discounts = host(sample.items), host(sample.discounts)
        assert merged["terminated"].any()
        assert merged["truncated"].any()
        for number, row in enumerate(host(sample.rows).tolist()):
            steps = rest_of_episode(expected, row)[:3]
            first, last = (items[step - len(expected)] for step in (steps[0], steps[-1]))
            reward = sum(0.5**age * items[step - len(expected)]["reward"] for age, step in enumerate(steps))
            truth = {
                **first,
                "reward": np.float32(reward),  # of NumPy before 2, Python floats make a float64
                **{part: last[part] for part in ("next_obs", "terminated", "truncated")},
            }
            assert_same(optree.tree_map(lambda leaf, at=number: leaf[at], merged), truth)
            assert discounts[number] == (0 if last["terminated"] else 0.5 ** len(steps))


class Step(NamedTuple):
    row: int
    items: Any


def in_order(buffer: ReplayBuffer) -> list[Step]:
    """The items of a buffer one by one, oldest first."""
    found = [
        Step(int(row), optree.tree_map(lambda leaf, at=at: leaf[at], host(sample.items)))
        for sample in buffer.one_pass(64)
        for at, row in enumerate(host(sample.rows))
    ]
    return sorted(found, key=lambda step: step.row)


def rest_of_episode(expected: list[Where], row: int) -> list[int]:
    """The numbers of a step and those after it in its episode."""
    same = [number for number in range(row, len(expected)) if expected[number][:2] == expected[row][:2]]
    assert [expected[number].t - expected[row].t for number in same] == list(range(len(same)))
    return same


class BackendContract:
    """The same on every backend, with values of NumPy."""

    backend: str
    device = "cpu"

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize(("form", "layout"), [("dict", {}), *LAYOUTS[-2:]])
    def test_every_transition_is_true(self, mode, form, layout):
        check_all(recorded(mode, form, capacity=70, backend=self.backend, **layout), form, model(mode))


class TestOnStrict(BackendContract):
    backend = "array_api_strict"


class TestOnTorch(BackendContract):
    backend = "torch"


class TestOnJax(BackendContract):
    backend = "jax"


class TestOnCupy(BackendContract):
    backend = "cupy"
    device = "cuda"
    pytestmark = pytest.mark.gpu


# Other environments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", ["box", "dict"])
def test_an_environment_that_writes_over_its_last_observation(mode, form):
    env = vectorized(mode, form, copy=False)
    recorder = Recorder(make_buffer(env), env)
    run(env, recorder, STEPS)
    check_all(recorder.buffer, form, model(mode))


@pytest.mark.parametrize("mode", MODES)
def test_one_environment_in_a_vector_environment(mode):
    env = vectorized(mode, lanes=1)
    recorder = Recorder(make_buffer(env), env)
    run(env, recorder, STEPS)
    check_all(recorder.buffer, "box", model(mode, lanes=1))


@needs_modes
def test_environments_in_processes():
    # A fork of a process that JAX has threads in may hang.
    options = {"context": "spawn", "autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}
    env = gymnasium.vector.AsyncVectorEnv([functools.partial(make_env, "dict", lane) for lane in range(2)], **options)
    try:
        recorder = Recorder(make_buffer(env, shared={"next_obs": "obs"}), env)
        run(env, recorder, STEPS)
    finally:
        env.close()
    check_all(recorder.buffer, "dict", model("same_step", lanes=2))


@pytest.mark.parametrize(("form", "layout"), LAYOUTS)
def test_a_single_environment(form, layout):
    env = make_env(form)
    recorder = Recorder(make_buffer(env, **layout), env)
    recorder.reset(*env.reset())
    for number in range(STEPS):
        action = number % 5
        _, _, terminated, truncated, _ = returned = env.step(action)
        recorder.step(action, *returned)
        if terminated or truncated:
            recorder.reset(*env.reset())
    check_all(recorder.buffer, form, model("disabled", lanes=1))


def test_a_single_environment_that_resets_itself():
    env = gymnasium.wrappers.TransformReward(gymnasium.wrappers.Autoreset(make_env()), lambda reward: reward)
    recorder = Recorder(make_buffer(env), env)
    assert recorder.autoreset == "next_step"
    recorder.reset(*env.reset())
    for _ in range(STEPS):
        recorder.step(1, *env.step(1))
    check_all(recorder.buffer, "box", model("next_step", lanes=1))


@pytest.mark.parametrize("library", ["torch", "jax.numpy", "array_api_strict"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", ["box", "dict"])
def test_arrays_of_another_library(library, mode, form):
    """As environments on a device, or under the conversions of gymnasium.wrappers, return."""
    xp = pytest.importorskip(library)
    env = vectorized(mode, form)
    recorder = Recorder(make_buffer(env), env)
    run(Converted(env, xp), recorder, STEPS)
    check_all(recorder.buffer, form, model(mode))


class Converted:
    """A vector environment whose arrays are of another library, final observations in one nest of all environments."""

    def __init__(self, env: Any, xp: Any) -> None:
        self.env, self.xp = env, xp

    def convert(self, nest: Any) -> Any:
        return optree.tree_map(lambda leaf: self.xp.asarray(np.asarray(leaf)), nest)

    def reset(self, **options: Any) -> Any:
        obs, _ = self.env.reset(**options)
        return self.convert(obs), {}

    def step(self, action: Any) -> Any:
        obs, *others, infos = self.env.step(action)
        if "final_obs" in infos:
            rows = [row if there else first_row(obs) for row, there in zip(infos["final_obs"], infos["_final_obs"])]
            infos["final_obs"] = self.convert(stacked(rows))
        return self.convert(obs), *others, infos


def first_row(batch: Any) -> Any:
    return optree.tree_map(lambda leaf: leaf[0], batch)


# Resets that the caller makes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("anew", [False, True], ids=["the same recorder", "a new one"])
@pytest.mark.parametrize("layout", SHARED.values(), ids=SHARED)
@pytest.mark.parametrize("mode", MODES)
def test_an_episode_that_is_broken_off_is_marked_and_no_window_crosses_it(mode, layout, anew):
    env = vectorized(mode)
    recorder = Recorder(make_buffer(env, **layout), env)
    run(env, recorder, 3)  # all episodes go on then
    if anew:
        recorder = Recorder(recorder.buffer, env)
    recorder.reset(*env.reset())
    run(env, recorder, 20, begin=False)
    expected = model(mode, 3)
    windows = recorder.buffer.sample(500, num_steps=4, at_end="pad")
    obs, next_obs, mask = (host(each) for each in (windows.items["obs"], windows.items["next_obs"], windows.mask))
    assert recorder.buffer.total_added > len(expected)
    check_windows(obs, next_obs, mask)
    broken = set(range(len(expected) - LANES, len(expected)))
    lengths = {int(row): int(real) for row, real in zip(host(windows.rows), mask.sum(axis=1))}
    assert all(lengths.get(row, 1) == 1 for row in broken)
    assert broken & lengths.keys()


def check_windows(obs: Any, next_obs: Any, mask: Any) -> None:
    """Each real step goes on from the one before, in its environment and its episode."""
    for before, after in itertools.pairwise(range(mask.shape[1])):
        both = mask[:, before] & mask[:, after]
        np.testing.assert_array_equal(next_obs[both, before], obs[both, after])
    np.testing.assert_array_equal(next_obs[..., :2], obs[..., :2])
    np.testing.assert_array_equal(next_obs[..., 2], obs[..., 2] + 1)


@needs_modes
@pytest.mark.parametrize("named", [np.array([False, True, False]), [1], np.array([1])], ids=["mask", "list", "array"])
@pytest.mark.parametrize("layout", SHARED.values(), ids=SHARED)
def test_some_environments_are_reset_in_the_middle_of_an_episode(layout, named):
    env = vectorized("disabled")
    recorder = Recorder(make_buffer(env, **layout), env)
    run(env, recorder, 2)
    obs, infos = env.reset(options={"reset_mask": np.array([False, True, False])})
    obs[0] = obs[2] = -1  # of no meaning, as in environments that return nothing for the others
    recorder.reset(obs.tolist() if isinstance(named, list) else obs, infos, lanes=named)
    run(env, recorder, 1, begin=False)
    steps = [Where(lane, 0, t) for t in range(2) for lane in range(3)] + [
        Where(0, 0, 2),
        Where(1, 1, 0),
        Where(2, 0, 2),
    ]
    items = [step.items for step in in_order(recorder.buffer)]
    found = [tuple(item["obs"].astype(int)) for item in items]
    assert found == steps
    assert [tuple(item["next_obs"].astype(int)) for item in items] == [step._replace(t=step.t + 1) for step in steps]
    windows = recorder.buffer.sample(100, num_steps=3, at_end="whole")
    assert {row % 3 for row in host(windows.rows).tolist()} == {0, 2}


@pytest.mark.parametrize("named", [np.zeros(3, bool), []], ids=["mask", "list"])
def test_no_environment_is_reset(named):
    env = vectorized("disabled")
    recorder = Recorder(make_buffer(env), env)
    run(env, recorder, 2)
    recorder.reset(np.full((3, 3), -1, np.float32), {}, lanes=named)
    run(env, recorder, 1, begin=False)
    assert (host(recorder.buffer.storage.get(range(9))["obs"]) >= 0).all()
    assert not host(recorder.buffer.storage.get(range(9))["truncated"]).any()


def test_a_reset_between_episodes_marks_nothing():
    env = make_env()
    recorder = Recorder(make_buffer(env), env)
    recorder.reset(*env.reset())
    for _ in range(5):
        recorder.step(0, *env.step(0))
    recorder.reset(*env.reset())
    recorder.reset(*env.reset())
    assert not host(recorder.buffer.storage.get(range(5))["truncated"]).any()


def test_recording_goes_on_after_the_buffer_is_cleared():
    env = vectorized("next_step")
    recorder = Recorder(make_buffer(env), env)
    run(env, recorder, 7)
    recorder.buffer.clear()
    recorder.reset(*env.reset())
    run(env, recorder, 4, begin=False)
    items = recorder.buffer.sample(100).items
    np.testing.assert_array_equal(items["next_obs"][:, 2], items["obs"][:, 2] + 1)


# Episodes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_returns_and_lengths_of_episodes(mode):
    env = vectorized(mode)
    recorder = Recorder(make_buffer(env), env)
    over = np.sum(list(play(env, recorder, STEPS)))
    expected, rewards = model(mode), host(recorder.buffer.storage.get(slice(0, recorder.buffer.size))["reward"])
    sums = {
        where: sum(rewards[n] for n, other in enumerate(expected) if other[:2] == where[:2])
        for where in expected
        if where.last
    }
    assert recorder.episodes == over == len(sums)
    assert list(recorder.returns) == pytest.approx(list(sums.values()))
    assert list(recorder.lengths) == [where.t + 1 for where in sums]


def test_episodes_that_are_broken_off_are_not_counted():
    env = make_env()
    recorder = Recorder(make_buffer(env), env)
    for _ in range(2):
        recorder.reset(*env.reset())
        recorder.step(0, *env.step(0))
    recorder.step(1, *env.step(1))
    recorder.step(2, *env.step(2))
    assert (recorder.episodes, list(recorder.returns), list(recorder.lengths)) == (1, [33.0], [3])


def test_rewards_of_several_objectives():
    env = make_env()
    spec = transition_spec(env) | {"reward": ArraySpec((2,), "float32")}
    recorder = Recorder(ReplayBuffer(spec, 10), env)
    recorder.reset(*env.reset())
    for _ in range(5):
        obs, reward, *others = env.step(1)
        recorder.step(1, obs, np.array([reward, 1.0]), *others)
    assert list(recorder.returns) == [[105.0, 5.0]]


# What the spec may be ------------------------------------------------------------------------------------------------


class Transition(NamedTuple):
    obs: Any
    action: Any
    reward: Any
    next_obs: Any
    terminated: Any
    truncated: Any


@dataclasses.dataclass
class Transitions:
    obs: Any
    action: Any
    reward: Any
    next_obs: Any
    terminated: Any
    truncated: Any


@pytest.mark.parametrize("kind", [Transition, Transitions])
@pytest.mark.parametrize("mode", MODES)
def test_transitions_of_a_class(kind, mode):
    env = vectorized(mode)
    recorder = Recorder(ReplayBuffer(kind(**transition_spec(env)), 1000, lanes=LANES), env)
    run(env, recorder, STEPS)
    expected = model(mode)
    for sample in recorder.buffer.one_pass(64):
        assert type(sample.items) is kind
        parts = {name: getattr(sample.items, name) for name in transition_spec(env)}
        check_items("box", parts, [expected[row] for row in sample.rows.tolist()])


@needs_modes
def test_a_spec_without_next_observations_needs_no_final_ones():
    env = vectorized("same_step")
    spec = transition_spec(env)
    del spec["next_obs"], spec["reward"]
    recorder = Recorder(ReplayBuffer(spec, 1000, lanes=LANES), env)
    recorder.reset(*env.reset())
    for _ in range(STEPS):
        recorder.step(np.zeros(LANES, int), *env.step(np.zeros(LANES, int))[:-1])
    found = host(recorder.buffer.storage.get(slice(0, recorder.buffer.size))["obs"]).astype(int)
    assert list(map(tuple, found)) == model("same_step")


@pytest.mark.parametrize("mode", MODES)
def test_parts_of_ones_own(mode):
    env = vectorized(mode)
    spec = transition_spec(env) | {"agent": {"number": ArraySpec((), "int32")}}
    recorder = Recorder(ReplayBuffer(spec, 1000, lanes=LANES), env)
    recorder.reset(*env.reset())
    for number in range(3):
        action = np.zeros(LANES, int)
        recorder.step(action, *env.step(action), agent={"number": number * 10 + np.arange(LANES)})
    stored = host(recorder.buffer.storage.get(slice(0, recorder.buffer.size)))
    assert stored["agent"]["number"].tolist() == [number * 10 + lane for number in range(3) for lane in range(LANES)]
    with pytest.raises(ValueError, match=r"expected the parts \['agent'\] of the spec by name, found \[\] in others"):
        recorder.step(action, *env.step(action))


def test_the_spec_of_transitions():
    env = make_env("dict")
    env.action_space = spaces.Dict(
        move=spaces.Box(-1, 1, (2,), np.float64),
        wide=spaces.Discrete(3, start=2**31 - 2),
        keys=spaces.MultiBinary(3),
        small=spaces.MultiDiscrete([3, 4], np.int16),
    )
    obs = {
        "inner": {"t": ArraySpec((), "int32")},
        "pair": (ArraySpec((3,), "float32"), ArraySpec((2,), "int32")),
    }
    action = {
        "move": ArraySpec((2,), "float64"),
        "wide": ArraySpec((), "int64"),
        "keys": ArraySpec((3,), "int8"),
        "small": ArraySpec((2,), "int16"),
    }
    flag = ArraySpec((), "bool")
    assert transition_spec(env) == {
        "obs": obs,
        "action": action,
        "reward": ArraySpec((), "float32"),
        "next_obs": obs,
        "terminated": flag,
        "truncated": flag,
    }
    changed = transition_spec(env, reward="float64", floats="float32")
    assert changed["action"]["move"] == ArraySpec((2,), "float32")
    assert changed["obs"]["pair"][0] == ArraySpec((3,), "float32")
    assert changed["reward"] == ArraySpec((), "float64")


def test_the_spec_is_that_of_a_single_environment():
    assert transition_spec(vectorized("next_step", "dict")) == transition_spec(make_env("dict"))


def test_a_space_that_cannot_be_stored_is_named():
    env = make_env()
    env.observation_space = spaces.Dict(text=spaces.Text(5))
    with pytest.raises(ValueError, match="obs/text: expected an ArraySpec, found Text"):
        transition_spec(env)


def test_without_gymnasium_the_buffer_can_be_imported():
    program = "import sys; sys.modules['gymnasium'] = None; import anystore.replay, anystore.replay.gymnasium"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_example_of_the_docstring_runs():
    outcome = doctest.testmod(importlib.import_module("anystore.replay.gymnasium"))
    assert outcome.attempted
    assert not outcome.failed


# How an environment is reset -----------------------------------------------------------------------------------------


def test_the_mode_may_be_given_in_every_spelling():
    env = vectorized("next_step")
    spellings = ["same_step", "SameStep", "SAME_STEP", getattr(gymnasium.vector, "AutoresetMode", None)]
    for spelling in spellings[:3] + [mode.SAME_STEP for mode in spellings[3:] if mode]:
        assert Recorder(make_buffer(env), env, autoreset=spelling).autoreset == "same_step"
    with pytest.raises(
        ValueError, match="expected autoreset to be one of next_step, same_step, disabled, found 'soon'"
    ):
        Recorder(make_buffer(env), env, autoreset="soon")


@needs_modes
def test_environments_of_one_class_in_different_modes():
    """Up to Gymnasium 1.3 they share their metadata, which tell the mode of the last one that was made."""
    metadata: dict[str, Any] = {}
    modes = gymnasium.vector.AutoresetMode
    first, second = (
        gymnasium.vector.SyncVectorEnv([lambda: Scripted(0, "box", metadata)], autoreset_mode=mode)
        for mode in (modes.SAME_STEP, modes.NEXT_STEP)
    )
    metadata["autoreset_mode"] = modes.NEXT_STEP
    first.metadata = metadata
    assert Recorder(make_buffer(first), first).autoreset == "same_step"
    assert Recorder(make_buffer(second), second).autoreset == "next_step"
    alone = Scripted(0, "box", metadata)
    assert Recorder(make_buffer(alone), alone).autoreset == "disabled"


@pytest.mark.parametrize("mode", MODES)
def test_the_mode_is_seen_through_wrappers(mode):
    env = gymnasium.wrappers.vector.RecordEpisodeStatistics(vectorized(mode))
    assert Recorder(make_buffer(env), env).autoreset == mode


def test_episodes_are_counted_as_gymnasium_does():
    env = gymnasium.wrappers.vector.RecordEpisodeStatistics(vectorized("next_step"))
    recorder = Recorder(make_buffer(env), env)
    run(env, recorder, STEPS)
    assert list(recorder.returns) == list(env.return_queue)
    assert list(recorder.lengths) == list(env.length_queue)


class Silent(gymnasium.vector.VectorEnv):
    """A vector environment that does not say how it is reset."""

    def __init__(self) -> None:
        self.num_envs = 2
        self.single_observation_space, self.single_action_space = SPACES["box"], Scripted.action_space


@needs_modes
def test_a_vector_environment_that_says_nothing():
    env = Silent()
    with pytest.raises(ValueError, match=r"no metadata\['autoreset_mode'\]; say when it resets .* autoreset="):
        Recorder(make_buffer(env), env)
    assert Recorder(make_buffer(env), env, autoreset="disabled").autoreset == "disabled"


@needs_modes
def test_metadata_tell_where_there_is_nothing_else():
    env = Silent()
    env.metadata = {"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}
    assert Recorder(make_buffer(env), env).autoreset == "same_step"


def test_gymnasium_1_0_knows_only_the_next_step(monkeypatch):
    monkeypatch.delattr(gymnasium.vector, "AutoresetMode", raising=False)
    env = Silent()
    assert Recorder(make_buffer(env), env).autoreset == "next_step"


# What is refused -----------------------------------------------------------------------------------------------------


def refused(recorder: Recorder, text: str, *step: Any, **others: Any) -> None:
    """A step is refused, and the buffer and the recorder are as they were."""
    before = (recorder.buffer.total_added, recorder.episodes, list(recorder.returns))
    with pytest.raises((ValueError, TypeError), match=text):
        recorder.step(*step, **others)
    assert (recorder.buffer.total_added, recorder.episodes, list(recorder.returns)) == before


def test_a_step_before_the_first_reset():
    env = vectorized("next_step")
    recorder = Recorder(make_buffer(env), env)
    env.reset()
    refused(recorder, "nothing to step from; call reset", np.zeros(3, int), *env.step(np.zeros(3, int)))
    with pytest.raises(ValueError, match="it is not known where the environments are; reset all of them first"):
        recorder.reset(env.reset()[0], lanes=[0])


def test_a_step_after_the_end_of_an_episode():
    env = make_env()
    recorder = Recorder(make_buffer(env), env)
    recorder.reset(*env.reset())
    for _ in range(5):
        recorder.step(0, *(returned := env.step(0)))
    refused(recorder, r"the environment is over, and nothing resets it; call env.reset", 0, *returned)


@needs_modes
def test_a_step_after_the_end_of_one_of_several_episodes():
    env = vectorized("disabled")
    recorder = Recorder(make_buffer(env), env)
    action = np.zeros(LANES, int)
    recorder.reset(*env.reset())
    for _ in range(4):
        recorder.step(action, *(returned := env.step(action)))
    refused(recorder, r"an episode of environment\(s\) \[1\] is over, and .*lanes=", action, *returned)


def test_a_buffer_of_other_lanes():
    env = vectorized("next_step")
    with pytest.raises(
        ValueError, match=r"a buffer of 3 lane\(s\), .* found 1; make it with ReplayBuffer\(..., lanes=3"
    ):
        Recorder(ReplayBuffer(transition_spec(env), 100), env)
    env = make_env()
    with pytest.raises(ValueError, match=r"expected a buffer of 1 lane\(s\), one for each environment, found 2"):
        Recorder(ReplayBuffer(transition_spec(env), 100, lanes=2), env)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"obs": ArraySpec((4,), "float32")},
            r"obs: expected ArraySpec\(\(3,\), 'float32'\), .* found ArraySpec\(\(4,",
        ),
        ({"obs": {"inner": ArraySpec((3,), "float32")}}, r"obs: expected ArraySpec\(\(3,\), .* found no such leaf"),
        ({"next_obs": ArraySpec((3,), "uint8")}, "next_obs: expected .* found ArraySpec.*'uint8'.*transition_spec"),
        ({"action": ArraySpec((), "bool")}, "action: expected .* casting='same_kind' makes of it, found ArraySpec"),
        ({"action": {"a": ArraySpec((), "int64")}}, "action: expected .* found no such leaf"),
        ({"truncated": ArraySpec((), "float32")}, r"truncated: expected ArraySpec\(\(\), 'bool'\), found"),
        ({"truncated": None}, "expected a part 'truncated' in the spec, found .*; transition_spec"),
        ({"obs": None}, "expected a part 'obs' in the spec"),
    ],
)
def test_a_spec_that_does_not_fit(changes, text):
    env = make_env()
    spec = {part: leaf for part, leaf in (transition_spec(env) | changes).items() if leaf is not None}
    with pytest.raises(ValueError, match=text):
        Recorder(ReplayBuffer(spec, 100), env)


def test_a_leaf_that_the_space_does_not_have():
    env = make_env("dict")
    spec = transition_spec(env)
    spec["obs"]["more"] = ArraySpec((), "float32")
    with pytest.raises(ValueError, match="obs/more: the space of the environment has no such leaf"):
        Recorder(ReplayBuffer(spec, 100), env)


def test_a_spec_that_is_a_single_leaf():
    with pytest.raises(ValueError, match="expected a part 'obs' in the spec, found a single leaf"):
        Recorder(ReplayBuffer(ArraySpec((3,), "float32"), 100), make_env())


@pytest.mark.parametrize("mode", MODES[:2])
def test_values_of_another_number_of_environments(mode):
    """At a step of all environments and at one that only resets some."""
    env = vectorized(mode)
    recorder = Recorder(make_buffer(env), env)
    recorder.reset(*env.reset())
    action = np.zeros(LANES, int)
    for _ in range(8):
        obs, reward, terminated, truncated, _ = returned = env.step(action)
        refused(recorder, r"obs: expected shape \(3, 3\), found \(2, 3\)", action, obs[:2], *returned[1:])
        refused(recorder, r"reward: expected shape \(3,\), found \(4,\)", action, obs, np.zeros(4), *returned[2:])
        refused(recorder, r"terminated: expected shape \(3,\), found \(\)", action, obs, reward, True, *returned[3:])
        refused(
            recorder, r"truncated: expected shape \(3,\), found \(3, 1\)", *returned[:3], terminated, truncated[:, None]
        )
        refused(
            recorder, r"action: expected shape \(3,\), 3 environments in front, found \(2,\)", action[:2], *returned
        )
        refused(recorder, r"action: expected shape \(3,\), 3 environments in front, found \(\)", 0, *returned)
        recorder.step(action, *returned)
    check_all(recorder.buffer, "box", model(mode, 8))
    with pytest.raises(ValueError, match=r"obs: expected shape \(3, 3\), found \(3,\)"):
        recorder.reset(np.zeros(3, np.float32))


def test_what_the_buffer_refuses_may_be_passed_again():
    env = vectorized("next_step")
    recorder = Recorder(make_buffer(env), env)
    action = np.zeros(LANES, int)
    recorder.reset(*env.reset())
    for _ in range(12):
        obs, reward, *others = env.step(action)
        refused(recorder, "reward: expected float32, found complex128", action, obs, reward + 0j, *others)
        recorder.step(action, obs, reward, *others)
    check_all(recorder.buffer, "box", model("next_step", 12))


def test_an_observation_and_an_info_in_one():
    env = gymnasium.make("CartPole-v1")
    recorder = Recorder(ReplayBuffer(transition_spec(env), 10), env)
    with pytest.raises(TypeError, match=r"^expected an observation and an info, found both in one; call reset\(\*env"):
        recorder.reset(env.reset())


def test_a_single_environment_is_not_reset_within_a_step():
    env = gymnasium.make("CartPole-v1")
    buffer = ReplayBuffer(transition_spec(env), 10)
    with pytest.raises(ValueError, match='^a single environment is never reset within the same step; pass autoreset="'):
        Recorder(buffer, env, autoreset="same_step")


def test_lanes_that_are_not_there():
    env = vectorized("next_step")
    recorder = Recorder(make_buffer(env), env)
    obs, _ = env.reset()
    recorder.reset(obs)
    for lanes in ([3], [-1], [[0]], [0.5], [True, False]):
        with pytest.raises(ValueError, match=r"^expected lanes"):
            recorder.reset(obs, lanes=lanes)


def test_one_value_is_not_taken_for_all_environments():
    env = vectorized("next_step")
    spec = {**transition_spec(env), "hidden": ArraySpec((LANES,), "float32")}
    recorder = Recorder(ReplayBuffer(spec, 100, lanes=LANES, seed=0), env)
    recorder.reset(*env.reset())
    action, hidden = np.zeros(LANES, int), np.zeros((LANES, LANES), np.float32)
    returned = env.step(action)
    expected = rf"^hidden: expected shape \({LANES}, {LANES}\), {LANES} environments in front, found \({LANES},\)$"
    refused(recorder, expected, action, *returned, hidden=hidden[0])
    refused(
        recorder,
        r"^action: expected shape \(3,\), 3 environments in front, found \(\)$",
        action[0],
        *returned,
        hidden=hidden,
    )
    recorder.step(action, *returned, hidden=hidden)


def test_a_part_called_info():
    env = vectorized("next_step")
    spec = {**transition_spec(env), "info": ArraySpec((), "float32")}
    with pytest.raises(ValueError, match="^info: expected another name for this part, since step takes the infos by"):
        Recorder(ReplayBuffer(spec, 100, lanes=LANES), env)


def test_what_is_no_environment_of_gymnasium_s():
    class VecEnv:
        num_envs, observation_space, action_space = 3, None, None

    with pytest.raises(
        ValueError, match="^expected an environment with single_observation_space .* found a VecEnv with"
    ):
        transition_spec(VecEnv())
    with pytest.raises(ValueError, match="^expected an environment with single_observation_space .* found a VecEnv"):
        Recorder(ReplayBuffer(ArraySpec((), "float32"), 9, lanes=3), VecEnv())


def test_a_space_without_a_fixed_shape_is_refused_by_the_path_of_the_user_s():
    gymnasium = pytest.importorskip("gymnasium")

    class Talking:
        observation_space = gymnasium.spaces.Dict({"said": gymnasium.spaces.Text(4)})
        action_space = gymnasium.spaces.Discrete(2)

    with pytest.raises(
        ValueError, match="^obs/said: expected an ArraySpec, found Text: .*; a space .* is to be encoded"
    ):
        transition_spec(Talking())


def test_tells_whether_the_item_of_a_single_environment_is_the_first():
    env = pytest.importorskip("gymnasium").make("CartPole-v1")
    recorder = Recorder(ReplayBuffer(transition_spec(env), 300), env)
    recorder.reset(*env.reset(seed=0))
    seen = []
    for _ in range(30):
        seen.append(recorder.is_first.tolist())
        stepped = env.step(1)
        recorder.step(1, *stepped)
        if stepped[2]:
            recorder.reset(*env.reset())
    assert recorder.is_first.shape == ()
    assert np.flatnonzero(seen).tolist() == np.cumsum([0, *recorder.lengths])[: sum(seen)].tolist()
    assert sum(seen) == 1 + recorder.episodes > 2


@needs_modes
@pytest.mark.parametrize("mode", ["next_step", "same_step", "disabled"])
def test_tells_which_items_are_the_first_of_their_episodes(mode):
    env = vectorized(mode)
    buffer = ReplayBuffer({**transition_spec(env), "is_first": ArraySpec((), "bool")}, 300, lanes=LANES)
    recorder = Recorder(buffer, env)
    recorder.reset(*env.reset(seed=0))
    over = np.zeros(LANES, bool)
    for _ in range(60):
        if mode == "disabled" and over.any():
            obs, info = env.reset(options={"reset_mask": over})
            recorder.reset(obs, info, lanes=over)
        assert recorder.is_first.shape == (LANES,)
        action = env.action_space.sample()
        stepped = env.step(action)
        recorder.step(action, *stepped, is_first=recorder.is_first)
        over = stepped[2] | stepped[3]
    # In every lane an episode begins with the first item, and behind every end.
    assert recorder.episodes > LANES
    (windows,) = buffer.one_pass(1000, num_steps=2)
    ended, first = windows.items["terminated"] | windows.items["truncated"], windows.items["is_first"]
    assert (first[:, 1] == ended[:, 0]).all()
    assert first.sum() > LANES
    assert buffer.storage.get(slice(LANES))["is_first"].all()


@needs_modes
@pytest.mark.parametrize("lose", ["all", "one", "mask", "infos"])
def test_a_final_observation_that_is_missing(lose):
    env = vectorized("same_step")
    recorder = Recorder(make_buffer(env), env)
    recorder.reset(*env.reset())
    action = np.zeros(LANES, int)
    for _ in range(4):
        returned = env.step(action)
        if returned[-1].get("final_obs") is None:
            recorder.step(action, *returned)
    obs, *flags, infos = returned
    assert infos["_final_obs"].tolist() == [False, True, False]
    broken = {
        "all": {},
        "one": {**infos, "final_obs": np.full(3, None)},
        "mask": {**infos, "_final_obs": np.zeros(3, bool)},
        "infos": None,
    }[lose]
    refused(recorder, "of environment 1 is over, and the infos hold no final_obs of it", action, obs, *flags, broken)
    final = infos["final_obs"].copy()
    final[1] = np.float32(7)
    expected = r"^next_obs: expected shape \(\d,\) in final_obs of environment 1, found \(\)$"
    refused(recorder, expected, action, obs, *flags, {**infos, "final_obs": final})
    recorder.step(action, obs, *flags, infos)
    check_all(recorder.buffer, "box", model("same_step", 4))


@needs_modes
@pytest.mark.parametrize("mode", ["next_step", "disabled"])
def test_a_final_observation_where_there_should_be_none(mode):
    env = vectorized("same_step")
    recorder = Recorder(make_buffer(env), env, autoreset=mode)
    recorder.reset(*env.reset())
    action = np.zeros(LANES, int)
    for _ in range(3):
        recorder.step(action, *env.step(action))
    refused(recorder, f"autoreset is '{mode}', yet the infos hold final_obs", action, *env.step(action))
