"""The rows that were written since a storage was saved."""

from __future__ import annotations

from typing import Any

import numpy as np

from anystore.convert import to_numpy
from anystore.moves import basic_index


class Changes:
    """Which rows of a storage were written since the version of a snapshot that it was saved to or loaded from.

    Attributes
    ----------
    snapshot : str
        The identity of that version: a snapshot that has another one by now is not what these changes are against.
    name : str
        The storage's name in it.
    mask : array of bool
        One for each row; its memory is committed as rows are written.
    """

    __slots__ = ("mask", "name", "snapshot")

    def __init__(self, snapshot: str, name: str, capacity: int) -> None:
        self.snapshot = snapshot
        self.name = name
        self.mask = np.zeros(capacity, np.bool_)

    def note(self, rows: Any) -> None:
        """Note that these rows, as `find_rows` gives them, are about to be written."""
        if type(rows) is range:
            self.mask[basic_index(rows)] = True
        else:
            self.mask[rows if isinstance(rows, (int, np.ndarray)) else to_numpy(rows)] = True
