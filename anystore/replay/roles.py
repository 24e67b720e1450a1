"""Which parts of an item mean something to a replay buffer: the reward, the flags, what is observed next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from anystore.nests import Nest, label


class Roles(NamedTuple):
    """The paths of the parts that mean something, as the user named them or by their usual names.

    Attributes
    ----------
    reward, terminated, truncated : str or None
        Leaves; None where the spec has none.
    following : tuple of str
        The leaves of what comes after an item.
    mistaken : tuple of str
        Leaves named like flags whose dtype is not bool.
    overlooked : tuple of str
        Leaves with "next" in their paths that nobody has said anything of.
    """

    reward: str | None
    terminated: str | None
    truncated: str | None
    following: tuple[str, ...]
    mistaken: tuple[str, ...]
    overlooked: tuple[str, ...]

    @classmethod
    def of(
        cls,
        nest: Nest,
        reward: str | None,
        terminated: str | None,
        truncated: str | None,
        following: str | Sequence[str] | None,
        shared: Mapping[str, str],
    ) -> Roles:
        """Find them in a spec.

        Raises
        ------
        ValueError
            If a part that the user named is not there, or is not what it should be.
        """
        after = _paths_after(nest, following, shared)
        found = cls(
            _find(nest, reward, "reward", None),
            _find(nest, terminated, "terminated", "bool"),
            _find(nest, truncated, "truncated", "bool"),
            after,
            (*_mistaken(nest, terminated, "terminated"), *_mistaken(nest, truncated, "truncated")),
            tuple(path for path in nest.paths if following is None and "next" in path.lower() and path not in after),
        )
        if found.terminated is not None and found.terminated == found.truncated:
            raise ValueError(
                f"{label(found.terminated)}: expected a leaf for terminated and another for truncated, found one"
            )
        return found

    def check_flags(self, nest: Nest, what: str) -> None:
        """Refuse what goes by the ends of episodes where a leaf says of them what cannot be read.

        Raises
        ------
        ValueError
            With the path of the leaf; it says for what by `what`.
        """
        if self.mistaken:
            path = self.mistaken[0]
            raise ValueError(
                f"{path}: {what} need a leaf of bools, found one of {nest.leaves[path].dtype}; make it one, name the "
                f'leaf that is: ReplayBuffer(..., {path}="path"), or give what is no flag another name'
            )

    def check_n_step(self, nest: Nest) -> None:
        """Refuse n-step returns where the spec lacks what they are made of.

        Raises
        ------
        ValueError
            With what is missing.
        """
        self.check_flags(nest, "n-step returns")
        if self.reward is None:
            raise ValueError('n-step returns need a reward; name its leaf: ReplayBuffer(..., reward="path")')
        if self.terminated is None:
            raise ValueError(
                'n-step returns need a bool leaf "terminated"; name it: ReplayBuffer(..., terminated="path")'
            )
        if self.overlooked:
            path = self.overlooked[0]
            raise ValueError(
                f"{path}: n-step returns need to know whether this is what comes after an item; name all parts that "
                f"are: ReplayBuffer(..., following=[{path!r}]), or following=[] if there are none"
            )

    @property
    def flags(self) -> tuple[str, ...]:
        """The leaves that say that an episode is over."""
        return tuple(path for path in (self.terminated, self.truncated) if path is not None)


def below(path: str, part: str) -> bool:
    """Whether the leaf at `path` is, or is in, the part of the nest at `part`."""
    return path == part or path.startswith(f"{part}/") or part == ""


def _find(nest: Nest, path: str | None, default: str, dtype: str | None) -> str | None:
    """The path of a leaf as the user gave it, or the default where there is such a leaf."""
    leaves = nest.leaves
    if path is None:
        path = default
        if path not in leaves or (dtype is not None and leaves[path].dtype != dtype):
            return None
    if path not in leaves:
        raise ValueError(f"{path!r} is not a leaf of the spec; there are {', '.join(map(label, leaves))}")
    spec = leaves[path]
    if dtype is not None and (spec.dtype != dtype or spec.shape != ()):
        raise ValueError(
            f"{label(path)}: expected a flag, ArraySpec((), {dtype!r}), found {spec}; give what is no flag of the "
            "whole item another name"
        )
    return path


def _mistaken(nest: Nest, path: str | None, default: str) -> tuple[str, ...]:
    """The leaf that is named like a flag and is not of bools, where the user named no other."""
    spec = nest.leaves.get(default)
    return (default,) if path is None and spec is not None and spec.dtype != "bool" else ()


def _paths_after(nest: Nest, following: str | Sequence[str] | None, shared: Mapping[str, str]) -> tuple[str, ...]:
    """The paths of the leaves of what follows an item."""
    named = [following] if isinstance(following, str) else list(following or [])
    for part in named:
        if not any(below(path, part) for path in nest.paths):
            raise ValueError(f"{part!r} is not in the spec; there are {', '.join(map(label, nest.paths))}")
    parts = [*shared, *(["next_obs"] if following is None else named)]
    return tuple(path for path in nest.paths if any(below(path, part) for part in parts))
