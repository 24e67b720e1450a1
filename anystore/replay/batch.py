"""How many items a batch has, and what to say of one that has none or too many."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np

from anystore.convert import is_array
from anystore.nests import Nest, label


def shape_of(leaf: Any) -> tuple[int, ...]:
    """The shape of an array of any library, or of numbers in lists; () for lists that have none."""
    try:
        return tuple(leaf.shape) if is_array(leaf) else np.shape(leaf)
    except ValueError:
        return ()


def count_items(nest: Nest, batch: Any, lanes: int) -> int:
    """How many items a batch has, as the first of its leaves has it that tells.

    Raises
    ------
    ValueError
        If none does; for a buffer of so many lanes it says what to do instead.
    """
    try:
        leaves = nest.flatten(batch)
    except (ValueError, TypeError) as error:
        if isinstance(batch, (list, tuple)) and batch and _is_item(nest, batch[0]):
            raise type(error)(f"{error}; this looks like a list of items: add them one by one, or stack them") from None
        raise
    for leaf, spec in zip(leaves, nest.specs):
        shape = shape_of(leaf)
        if len(shape) == len(spec.shape) + 1:
            return int(shape[0])
    shapes = {label(path): shape_of(leaf) for path, leaf in zip(nest.paths, leaves)}
    others = {path: shape for (path, shape), spec in zip(shapes.items(), nest.specs) if shape != spec.shape}
    if others:
        found = ", ".join(f"{path} of shape {shape}" for path, shape in others.items())
    elif lanes > 1:
        found = "what looks like a single item; give it that axis, and name its lane: extend(..., lanes=[...])"
    else:
        found = (
            "what looks like a single item, which add takes; for a batch, ReplayBuffer.like was given one in place of "
            "an item"
        )
    raise ValueError(
        f"expected a batch, one axis of items in front of each leaf (for steps and lanes together), found {found}"
    )


def _is_item(nest: Nest, value: Any) -> bool:
    """Whether this is a nest like that of an item."""
    try:
        nest.flatten(value)
    except (ValueError, TypeError):
        return False
    return True


def looks_like_a_batch(nest: Nest, value: Any) -> bool:
    """Whether every leaf is as in a batch of as many items."""
    try:
        shapes = [shape_of(leaf) for leaf in nest.flatten(value)]
    except (ValueError, TypeError):
        return False
    lead = shapes[0][:1]
    return len(lead) == 1 and all(shape == lead + spec.shape for shape, spec in zip(shapes, nest.specs))


def check_counts(nest: Nest, batch: Any) -> None:
    """Refuse a batch whose leaves do not have the same number of items.

    Raises
    ------
    ValueError
        If a leaf has another number than most of them.
    """
    shapes = {path: shape_of(leaf) for path, leaf in zip(nest.paths, nest.flatten(batch))}
    specs = nest.leaves
    counts = {path: shape[0] for path, shape in shapes.items() if len(shape) == len(specs[path].shape) + 1}
    most = statistics.mode(counts.values())
    known = next(path for path, count in counts.items() if count == most)
    for path, count in counts.items():
        if count != most:
            raise ValueError(f"{label(path)}: expected {most} items, as {label(known)} has, found {count}") from None
