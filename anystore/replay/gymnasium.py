"""What Gymnasium's environments return, as transitions in a replay buffer: each true, none across a reset.

Gymnasium itself is imported only where an environment does not say itself how it is reset.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from array_api_compat import array_namespace, device
from numpy.typing import DTypeLike, NDArray

from anystore.backends.base import Array
from anystore.convert import as_array, is_array, to_numpy
from anystore.nests import Nest, children, label, map_leaves
from anystore.replay.batch import shape_of
from anystore.replay.buffer import ReplayBuffer
from anystore.specs import ArraySpec, as_dtype, kind_of, understand
from anystore.values import Casting, can_cast

Autoreset = Literal["next_step", "same_step", "disabled"]

_AUTORESETS: tuple[Autoreset, ...] = ("next_step", "same_step", "disabled")
_PARTS = ("obs", "action", "reward", "next_obs", "terminated", "truncated")
_FLAG = ArraySpec((), "bool")


def transition_spec(env: Any, *, reward: DTypeLike = "float32", floats: DTypeLike | None = None) -> dict[str, Any]:
    """The spec of the transitions of an environment, or of those of a vector environment.

    Parameters
    ----------
    env : gymnasium.Env or gymnasium.vector.VectorEnv
        Its spaces may be Box, Discrete, MultiDiscrete and MultiBinary, and Dict and Tuple of these in any depth.
    reward : dtype-like, default "float32"
        The dtype of rewards, of which an environment says nothing.
    floats : dtype-like, optional
        The float dtype of all floats in observations and actions; None keeps those of the spaces. For environments with
        observations of float64 that should take half the memory, or go to a library that has no float64.

    Returns
    -------
    dict
        Of the parts "obs", "action", "reward", "next_obs", "terminated" and "truncated", with an `ArraySpec` at each
        leaf, to be changed as you like. The dtypes are those of the spaces, but that integers of 64 bits whose range
        the space tells (Discrete, MultiDiscrete) have 32 if these are enough: every library has those. That takes a
        buffer with ``casting="same_kind"``, the default, or "unsafe".

    Raises
    ------
    ValueError
        If a space has elements of no fixed shape (with its path).
    """
    spaces = _spaces(env)
    Nest({"obs": spaces["obs"], "action": spaces["action"]})  # which refuses what cannot be stored, with its path
    specs = {part: _narrowed(space, None if floats is None else as_dtype(floats)) for part, space in spaces.items()}
    specs |= {"reward": ArraySpec((), reward), "terminated": _FLAG, "truncated": _FLAG}
    return {part: specs[part] for part in _PARTS}


def _spaces(env: Any) -> dict[str, Any]:
    """The spaces of a single environment."""
    prefix = "" if _num_envs(env) is None else "single_"
    spaces = [getattr(env, f"{prefix}{kind}_space", None) for kind in ("observation", "action")]
    if None in spaces:
        raise ValueError(
            f"expected an environment with {prefix}observation_space and {prefix}action_space, as Gymnasium's have "
            f"them, found a {type(env).__name__} without"
        )
    return {"obs": spaces[0], "action": spaces[1], "next_obs": spaces[0]}


def _num_envs(env: Any) -> int | None:
    """How many environments a vector environment has; None for a single environment."""
    count = getattr(env, "num_envs", None)
    return None if count is None else int(count)


def _narrowed(space: Any, floats: np.dtype[Any] | None) -> Any:
    """The nest of specs of a space, in the dtypes that `transition_spec` promises."""
    spec = understand(space)
    if not isinstance(spec, ArraySpec):
        return map_leaves(lambda child: _narrowed(child, floats), spec)
    if kind_of(spec.dtype) == 2 and floats is not None:
        return spec.replace(dtype=floats)
    least = np.asarray(getattr(space, "start", 0))
    most = least + getattr(space, "n", getattr(space, "nvec", np.inf)) - 1
    limits = np.iinfo(np.int32)
    fits = bool(np.all((least >= limits.min) & (most <= limits.max)))
    return spec.replace(dtype="int32") if spec.dtype == np.int64 and fits else spec


class Recorder:
    """Adds what an environment returns to a buffer: `reset` takes what ``env.reset`` returns, `step` what ``env.step``.

    Parameters
    ----------
    buffer : ReplayBuffer
        Of a spec as `transition_spec` makes it, in a dict, a namedtuple or a dataclass. Of its parts "action",
        "reward" and "next_obs" may be missing; parts of other names are yours, and go to `step` by name. It has a lane
        for each environment.
    env : gymnasium.Env or gymnasium.vector.VectorEnv
        The environment; its spaces are looked at, it is never called.
    autoreset : {"next_step", "same_step", "disabled"} or gymnasium.vector.AutoresetMode, optional
        When the environments are reset after the end of an episode: by the next step, whose action is ignored; within
        the same step, with the final observation in ``infos["final_obs"]``; or by the caller only. None asks the
        environment.

    Attributes
    ----------
    autoreset : str
        When the environments are reset.
    episodes : int
        How many episodes were recorded to their end.
    returns, lengths : deque of float, deque of int
        The sums of rewards, and numbers of steps, of the latest 100 of them, the latest last.

    Raises
    ------
    ValueError
        If the buffer has not a lane for each environment; if its spec does not fit the spaces, or has no flags
        "terminated" and "truncated"; if a vector environment does not say how it is reset.

    Notes
    -----
    What follows an item is always what the environment observed next in the same episode: the final observation at
    its end, be that a termination or a truncation, and never the first one of the next episode. A step that only resets
    an environment is not added. An episode that is broken off by a reset is marked as truncated.

    A step that is refused changes nothing, in the buffer or the recorder; one that is interrupted is to be followed by
    a reset. Observations are copied, so that an environment may write the next one over the last; but one that is reset
    within the step, and writes its first observation over the final one, has lost that before anybody sees it. One
    thread at a time may use a recorder; others may use its buffer meanwhile.

    The modes are those of Gymnasium 1.1 and later, https://farama.org/Vector-Autoreset-Mode; Gymnasium 1.0 has only
    "next_step".

    Examples
    --------
    >>> import gymnasium
    >>> from anystore.replay import ReplayBuffer
    >>> from anystore.replay.gymnasium import Recorder, transition_spec
    >>> env = gymnasium.make_vec("CartPole-v1", num_envs=8)
    >>> buffer = ReplayBuffer(transition_spec(env), 10_000, lanes=8, shared={"next_obs": "obs"})
    >>> recorder = Recorder(buffer, env)
    >>> recorder.reset(*env.reset(seed=0))
    >>> for _ in range(100):
    ...     action = env.action_space.sample()
    ...     recorder.step(action, *env.step(action))
    >>> len(buffer) + recorder.episodes in range(800, 809)  # a step after each end only resets
    True
    """

    def __init__(self, buffer: ReplayBuffer, env: Any, *, autoreset: Any = None) -> None:
        count, spaces = _num_envs(env), _spaces(env)
        self.buffer = buffer
        self.autoreset = _autoreset_of(env) if autoreset is None else _as_autoreset(autoreset)
        if count is None and self.autoreset == "same_step":
            raise ValueError(
                'a single environment is never reset within the same step; pass autoreset="next_step" or "disabled"'
            )
        self._lead = () if count is None else (count,)
        if buffer.lanes != (count or 1):
            raise ValueError(
                f"expected a buffer of {count or 1} lane(s), one for each environment, found {buffer.lanes}; "
                f"make it with ReplayBuffer(..., lanes={count or 1})"
            )
        self._casting = buffer.storage.casting
        spec = buffer.data_spec
        self._nest = Nest(spec)
        self._make: Any = dict if isinstance(spec, Mapping) else type(spec)
        self._parts = children(spec)
        self._others = set(self._parts) - set(_PARTS)
        self._check_spec(spaces)
        self._nest_of_obs = Nest(self._parts["obs"])
        self._obs: Any = None
        self._all = np.arange(buffer.lanes)
        self._running = np.zeros(buffer.lanes, bool)
        self._return = np.zeros((buffer.lanes, *getattr(self._parts.get("reward"), "shape", ())))
        self._length = np.zeros(buffer.lanes, int)
        self.episodes = 0
        self.returns: deque[float] = deque(maxlen=100)
        self.lengths: deque[int] = deque(maxlen=100)

    def _check_spec(self, spaces: dict[str, Any]) -> None:
        advice = "transition_spec(env) is a spec that fits, with casting='same_kind'"
        if "info" in self._parts:
            raise ValueError("info: expected another name for this part, since step takes the infos by that one")
        for part in ("obs", "terminated", "truncated"):
            if part not in self._parts:
                there = ", ".join(map(str, self._parts)) or "a single leaf"
                raise ValueError(f"expected a part {part!r} in the spec, found {there}; {advice}")
        for part in ("terminated", "truncated"):
            if self._parts[part] != _FLAG:
                raise ValueError(f"{part}: expected {_FLAG}, found {self._parts[part]}; {advice}")
        of_spaces = Nest({part: spaces[part] for part in spaces if part in self._parts})
        found = self._nest.leaves
        for path, spec in zip(of_spaces.paths, of_spaces.specs):
            other = found.pop(path, None)
            if other is None or other.shape != spec.shape or not can_cast(spec.dtype, other.dtype, self._casting):
                raise ValueError(
                    f"{label(path)}: expected {spec}, as the space of the environment has it, or a dtype that "
                    f"casting={self._casting!r} makes of it, found {other or 'no such leaf'}; {advice}"
                )
        for path in found:
            if path.partition("/")[0] in spaces:
                raise ValueError(f"{label(path)}: the space of the environment has no such leaf; {advice}")

    @property
    def is_first(self) -> NDArray[np.bool_]:
        """Whether the next item of each environment will be the first of an episode; of the shape of its flags.

        For a part of the spec that says so, or to begin with a new state of a network:
        ``recorder.step(action, *env.step(action), is_first=recorder.is_first)``.
        """
        first: NDArray[np.bool_] = self._length == 0
        return first.reshape(self._lead)

    # What the environment returned ----------------------------------------------------------------------------------

    def reset(self, obs: Any, info: Any = None, *, lanes: Any = None) -> None:
        """Episodes begin: take what ``env.reset()`` returned, as in ``recorder.reset(*env.reset())``.

        Parameters
        ----------
        obs : nest
            The first observation; of a vector environment, with an axis of environments in front.
        info : dict, optional
            Not looked at.
        lanes : sequence of int, or mask over the environments, optional
            Those that were reset, if not all were, as by ``env.reset(options={"reset_mask": mask})``. What `obs` has
            for the others is not looked at.

        Raises
        ------
        ValueError
            If the observation does not fit the spec, or the lanes are not among the environments.
        TypeError
            If the observation is all that ``env.reset`` returned, an info with it.
        """
        if isinstance(obs, tuple) and len(obs) == 2 and not isinstance(self._parts["obs"], tuple):
            raise TypeError("expected an observation and an info, found both in one; call reset(*env.reset())")
        leaves = self._checked(obs, "obs", self._lead)
        chosen = self.buffer._lanes.named(lanes)
        if not chosen.size:
            return
        if len(chosen) < len(self._running):
            if self._obs is None:
                raise ValueError("it is not known where the environments are; reset all of them first, without lanes=")
            leaves = [
                _with_rows(old, chosen, [new[lane, ...] for lane in chosen.tolist()])
                for old, new in zip(self._obs, map(as_array, leaves))
            ]
        # At first all: what is in the buffer already, of an earlier program or another environment, is over.
        broken = self._all if self._obs is None else chosen[self._length[chosen] > 0]
        if broken.size:
            self.buffer.end_episode(broken)
        self._obs = [_copy(leaf) for leaf in leaves]
        self._running[chosen] = True
        self._return[chosen] = 0.0
        self._length[chosen] = 0

    def step(
        self, action: Any, obs: Any, reward: Any, terminated: Any, truncated: Any, info: Any = None, **others: Any
    ) -> None:
        """Add a transition of each environment: ``recorder.step(action, *env.step(action))``.

        Parameters
        ----------
        action : nest
            What ``env.step`` was called with.
        obs, reward, terminated, truncated, info
            What it returned; of arrays of any library, on any device.
        **others : nest
            The parts of the spec that are not Gymnasium's, as for `action`. What they have for an environment that this
            step only resets is left out with all the rest; which items are the first of an episode, `is_first` tells.

        Raises
        ------
        ValueError
            Before the first `reset`; after the end of an episode without one, if there is no autoreset; if something
            does not fit the number of environments or the spec; if `info` lacks a final observation, or has one where
            there should be none.
        TypeError, OverflowError
            As `ReplayBuffer.extend`.
        """
        ended = self._flags("terminated", terminated) | self._flags("truncated", truncated)
        rewards = self._on_host("reward", reward, self._return.shape[1:])
        live = self._live()
        if others.keys() != self._others:
            raise ValueError(
                f"expected the parts {sorted(self._others)} of the spec by name, found {sorted(others)} in others"
            )
        leaves = self._checked(obs, "obs", self._lead)
        following = self._following(leaves, ended, info)
        parts = {"action": action, "reward": reward, "terminated": terminated, "truncated": truncated, **others}
        parts |= {"obs": self._nest_of_obs.pack(self._obs), "next_obs": self._nest_of_obs.pack(following)}
        previous, self._obs = self._obs, None  # an interrupt from here on leaves it to a reset where they are
        try:
            self._add(self._make(**{name: parts[name] for name in self._parts}), live)
        except (ValueError, TypeError, OverflowError):
            self._obs = previous
            raise
        copies = [_copy(leaf) for leaf in leaves]
        self._count(rewards, ended, live)
        self._obs = copies

    # Its parts ------------------------------------------------------------------------------------------------------

    def _checked(self, obs: Any, part: str, lead: tuple[int, ...], source: str = "") -> list[Any]:
        """The leaves of an observation, if they have their shapes, with `lead` in front."""
        leaves = self._nest_of_obs.flatten(obs)
        _check_shapes(self._nest_of_obs, leaves, lead, part, source)
        return leaves

    def _flags(self, name: str, flags: Any) -> NDArray[np.bool_]:
        return self._on_host(name, flags, ()).astype(bool)

    def _on_host(self, name: str, value: Any, shape: tuple[int, ...]) -> NDArray[Any]:
        """What each environment returned, as a NumPy array with an axis of environments in front."""
        found = _host(value)
        if found.shape != self._lead + shape:
            raise ValueError(f"{name}: expected shape {self._lead + shape}, found {found.shape}")
        return found.reshape(len(self._running), *shape)

    def _live(self) -> NDArray[np.intp]:
        """The environments that this step was one of an episode for, and not a reset."""
        if self._obs is None:
            raise ValueError("there is nothing to step from; call reset with what env.reset() returned first")
        if self.autoreset == "disabled" and not self._running.all():
            over = f"environment(s) {np.flatnonzero(~self._running).tolist()}" if self._lead else "the environment"
            raise ValueError(
                f"an episode of {over} is over, and nothing resets it; call env.reset, and this recorder's reset with "
                f"what that returned{', and lanes=' if self._lead else ''}"
            )
        return self._all if self._running.all() else np.flatnonzero(self._running)

    def _following(self, leaves: list[Any], ended: NDArray[np.bool_], info: Any) -> list[Any]:
        """What was observed after the step, with final observations in the place of those that begin an episode."""
        lanes = np.flatnonzero(ended)
        if not lanes.size or not self._lead:
            return leaves
        final = info.get("final_obs") if isinstance(info, Mapping) else None
        if final is not None and self.autoreset != "same_step":
            raise ValueError(
                f"autoreset is {self.autoreset!r}, yet the infos hold final_obs, as where an environment is reset "
                'within the same step; if so, pass autoreset="same_step"'
            )
        if self.autoreset != "same_step" or "next_obs" not in self._parts:
            return leaves
        rows = [
            self._checked(self._final(final, info, lane), "next_obs", (), f" in final_obs of environment {lane}")
            for lane in lanes.tolist()
        ]
        return [_with_rows(leaf, lanes, finals) for leaf, finals in zip(leaves, zip(*rows))]

    def _final(self, final: Any, info: Any, lane: int) -> Any:
        """The final observation of one environment, out of the infos."""
        missing = ValueError(
            f"the episode of environment {lane} is over, and the infos hold no final_obs of it, as they do where it is "
            f'reset within the same step; pass what env.step returned, or autoreset="next_step" if that is how it is'
        )
        if final is None or not _host(info.get("_final_obs", np.ones(lane + 1, bool)))[lane]:
            raise missing
        if isinstance(final, np.ndarray) and final.dtype == object:
            if final[lane] is None:
                raise missing
            return final[lane]
        # Some vector environments (ale-py's) have those of all environments in one nest.
        return self._nest_of_obs.pack([leaf[lane, ...] for leaf in self._nest_of_obs.flatten(final)])

    def _add(self, item: Any, live: NDArray[np.intp]) -> None:
        """Write a step of those environments that live, all or none of them."""
        leaves = [
            _cast(leaf, spec.dtype, self._casting) for leaf, spec in zip(self._nest.flatten(item), self._nest.specs)
        ]
        if not self._lead:
            if live.size:
                self.buffer.add(self._nest.pack(leaves))
            return
        _check_shapes(self._nest, leaves, self._lead, what=f", {self._lead[0]} environments in front")
        if live is self._all:
            self.buffer.extend(self._nest.pack(leaves))
        elif live.size:
            self.buffer.extend(self._nest.pack([_rows(leaf, live) for leaf in leaves]), lanes=live)

    def _count(self, reward: NDArray[Any], ended: NDArray[np.bool_], live: NDArray[np.intp]) -> None:
        """Go on to where the environments are now."""
        if live is self._all:
            self._return += reward
            self._length += 1
        else:
            self._return[live] += reward[live]
            self._length[live] += 1
            self._running[:] = True
        for lane in live[ended[live]].tolist() if ended.any() else ():
            self.episodes += 1
            self.returns.append(self._return[lane].tolist())
            self.lengths.append(int(self._length[lane]))
            self._return[lane], self._length[lane] = 0.0, 0
            self._running[lane] = self.autoreset == "same_step"


def _check_shapes(nest: Nest, leaves: list[Any], lead: tuple[int, ...], part: str = "", what: str = "") -> None:
    """Refuse a leaf that has not its shape, with `lead` in front; `part` is where the nest is in the spec."""
    for path, leaf, spec in zip(nest.paths, leaves, nest.specs):
        if shape_of(leaf) != lead + spec.shape:
            where = label("/".join(filter(None, (part, path))))
            raise ValueError(f"{where}: expected shape {lead + spec.shape}{what}, found {shape_of(leaf)}")


# How environments are reset ------------------------------------------------------------------------------------------


def _as_autoreset(mode: Any) -> Autoreset:
    """The mode as Gymnasium or the user names it: "NextStep", "next_step", AutoresetMode.NEXT_STEP."""
    name = str(getattr(mode, "value", mode)).replace("_", "").lower()
    for known in _AUTORESETS:
        if name == known.replace("_", ""):
            return known
    raise ValueError(f"expected autoreset to be one of {', '.join(_AUTORESETS)}, found {mode!r}")


def _autoreset_of(env: Any) -> Autoreset:
    """The mode of an environment, as far as it tells."""
    if _num_envs(env) is None:
        return "next_step" if _is_wrapped_in_autoreset(env) else "disabled"
    # First the attribute: up to Gymnasium 1.3, vector environments of one class write into one dict of metadata.
    mode = getattr(getattr(env, "unwrapped", env), "autoreset_mode", None)
    mode = (getattr(env, "metadata", None) or {}).get("autoreset_mode") if mode is None else mode
    if mode is not None:
        return _as_autoreset(mode)
    if _gymnasium_knows_no_other():
        return "next_step"
    raise ValueError(
        "the vector environment has no metadata['autoreset_mode']; say when it resets its environments: "
        f"autoreset= one of {', '.join(_AUTORESETS)}"
    )


def _is_wrapped_in_autoreset(env: Any) -> bool:
    """Whether one of the wrappers of a single environment is gymnasium.wrappers.Autoreset."""
    while env is not None:
        if any(cls.__name__ == "Autoreset" for cls in type(env).__mro__):
            return True
        env = getattr(env, "env", None)
    return False


def _gymnasium_knows_no_other() -> bool:
    """Whether this is Gymnasium 1.0, all of whose vector environments are reset by the next step, and say nothing."""
    try:
        import gymnasium.vector
    except ImportError:
        return False
    return not hasattr(gymnasium.vector, "AutoresetMode")


# Arrays of any library -----------------------------------------------------------------------------------------------


def _host(value: Any) -> NDArray[Any]:
    return to_numpy(as_array(value))


def _copy(leaf: Any) -> Any:
    """A copy that no environment writes to."""
    if isinstance(leaf, np.ndarray) or not is_array(leaf):
        return np.array(leaf)
    return leaf if isinstance(leaf, np.generic) else array_namespace(leaf).asarray(leaf, copy=True)


def _cast(leaf: Any, dtype: np.dtype[Any], casting: Casting) -> Any:
    """What a storage makes of a NumPy leaf, where that is allowed: it takes leaves of its own dtypes at once."""
    if not isinstance(leaf, (np.ndarray, np.generic)) or leaf.dtype == dtype:
        return leaf
    return leaf.astype(dtype) if can_cast(leaf.dtype, dtype, casting) else leaf


def _rows(leaf: Any, lanes: NDArray[np.intp]) -> Array:
    """The rows of a batch at these lanes."""
    if isinstance(leaf, np.ndarray) or not is_array(leaf):
        return np.asarray(leaf)[lanes]
    xp = array_namespace(leaf)
    return xp.take(leaf, xp.asarray(lanes, device=device(leaf)), axis=0)


def _with_rows(leaf: Any, lanes: NDArray[np.intp], rows: Any) -> Array:
    """A copy of a batch with other rows at these lanes, cast to its dtype as vector environments cast observations."""
    if isinstance(leaf, np.ndarray) or not is_array(leaf):
        replaced = np.array(leaf)
        replaced[lanes] = [_host(row) for row in rows]
        return replaced
    xp = array_namespace(leaf)
    new = dict(zip(lanes.tolist(), rows))
    here = {"dtype": leaf.dtype, "device": device(leaf)}
    count = leaf.shape[0]
    return xp.stack([xp.asarray(new[lane], **here) if lane in new else leaf[lane, ...] for lane in range(count)])
