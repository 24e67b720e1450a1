"""Items whose every leaf follows from one number, the stamp: a row is whole if all its leaves tell the same stamp."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import optree
from numpy.typing import ArrayLike

from anystore import ArraySpec, select_backend
from anystore.backends.base import Backend, is_disk
from anystore.convert import to_numpy


class Pose(NamedTuple):
    position: Any
    valid: Any


SPEC = {
    "obs": {
        "image": ArraySpec((3, 2), "uint8"),
        "pose": Pose(position=ArraySpec((4,), "float32"), valid=ArraySpec((), "bool")),
    },
    "action": [ArraySpec((), "int32"), (ArraySpec((0, 2), "float32"),)],
}


def batch(stamps: ArrayLike) -> dict[str, Any]:
    """The items of these stamps: leaves with the shape of `stamps` in front."""
    stamps = np.asarray(stamps, np.int64)
    image = stamps[..., None, None] + np.arange(6).reshape(3, 2)
    return {
        "obs": {
            "image": (image % 251).astype(np.uint8),
            "pose": Pose((stamps[..., None] + np.arange(4) / 4).astype(np.float32), np.asarray(stamps % 3 == 1)),
        },
        "action": [np.asarray(stamps, np.int32), (np.zeros((*stamps.shape, 0, 2), np.float32),)],
    }


def leaves(nest: Any) -> list[Any]:
    return optree.tree_leaves(nest, none_is_leaf=True)


def host(nest: Any) -> Any:
    """The same nest in NumPy arrays."""
    return optree.tree_map(to_numpy, nest, none_is_leaf=True)


def assert_same(found: Any, expected: Any) -> None:
    """Both are the same nest, down to container types, shapes, dtypes and values."""
    assert optree.tree_structure(found, none_is_leaf=True) == optree.tree_structure(expected, none_is_leaf=True)
    for one, other in zip(leaves(host(found)), leaves(host(expected)), strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        np.testing.assert_array_equal(one, other)


def given_out_by(backend: Backend) -> Backend:
    """The backend that arrays are of which one gives out: what is read from a disk is in main memory."""
    return select_backend(backend.name) if is_disk(backend.device) else backend
