"""The bytes that a storage takes, before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from anystore.nests import Nest, label
from anystore.specs import ArraySpec, as_count


@dataclass(frozen=True)
class Plan:
    """The leaves of a storage and the bytes of their buffers; printed, a table.

    Attributes
    ----------
    capacity : int
        The number of rows.
    leaves : dict of str to ArraySpec
        Each leaf by its path.
    """

    capacity: int
    leaves: dict[str, ArraySpec]

    @property
    def nbytes(self) -> int:
        """The bytes of all buffers."""
        return sum(self.leaf_nbytes.values())

    @property
    def leaf_nbytes(self) -> dict[str, int]:
        """The bytes of each buffer, by the path of its leaf."""
        return {path: self.capacity * spec.nbytes for path, spec in self.leaves.items()}

    def __str__(self) -> str:
        nbytes = self.leaf_nbytes
        cells = [
            (label(path), str(spec.shape), str(spec.dtype), f"{nbytes[path]:,}") for path, spec in self.leaves.items()
        ]
        cells.append(("total", "", "", f"{self.nbytes:,}"))
        path, shape, dtype, size = (max(map(len, column)) for column in zip(*cells))
        return "\n".join(
            f"  {a:<{path}}  {b:<{shape}}  {c:<{dtype}}  {d:>{size}} bytes".rstrip() for a, b, c, d in cells
        )


def plan(data_spec: Any, capacity: int) -> Plan:
    """The bytes per leaf and in total of a storage with this spec and capacity; nothing is allocated.

    Raises
    ------
    ValueError
        If a leaf of `data_spec` is not a spec (with its path), or the capacity is not positive.

    Examples
    --------
    >>> from anystore import ArraySpec, plan
    >>> print(plan({"obs": ArraySpec((84, 84, 4), "uint8"), "reward": ArraySpec((), "float32")}, 100_000))
      obs     (84, 84, 4)  uint8    2,822,400,000 bytes
      reward  ()           float32        400,000 bytes
      total                         2,822,800,000 bytes
    """
    return Plan(as_count("capacity", capacity), Nest(data_spec).leaves)
