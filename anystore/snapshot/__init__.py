"""A storage on disk: saved all or nothing, only what changed, and loaded on any backend.

A snapshot is a directory of ``.npy`` files and one ``manifest.json``, which NumPy and a JSON reader alone can read:
``buffer[rows] = leaf`` for each layer in turn gives the buffer of a leaf back.
"""

from anystore.snapshot.files import SnapshotError
from anystore.snapshot.reader import Snapshot, load
from anystore.snapshot.writer import save_snapshot

__all__ = ["Snapshot", "SnapshotError", "load", "save_snapshot"]
