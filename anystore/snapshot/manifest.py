"""The manifest of a snapshot: what is in its JSON file, written down and read with every word checked."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anystore.nests import Nest
from anystore.snapshot import files
from anystore.snapshot.described import MOST, describe_dtype, read_dtype, rebuild
from anystore.snapshot.files import SnapshotError
from anystore.specs import ArraySpec
from anystore.values import CASTINGS, Casting

MANIFEST = "manifest.json"
FORMAT = "anystore snapshot"
VERSION = 1
"""Of the format. It rises with any change that an older reader would misread."""
KINDS = ("storage", "replay", "mapped")
MANIFEST_BYTES = 1 << 24
"""So many a manifest may have."""
_HEAD = b'{\n"crc32": "'
_FILE = re.compile(r"[0-9]{6,15}\.[A-Za-z0-9._-]{1,200}\.npy")
_KEPT = re.compile(r"manifest-([0-9]{6,15})\.json")


@dataclass(frozen=True)
class File:
    """A file of a snapshot, by its name in the directory, and its checksum (None for one that is still written to)."""

    name: str
    crc32: int | None

    @staticmethod
    def read(node: Any) -> File:
        """The file that parsed JSON names."""
        name, text = _fields(node, file=str, crc32=(str, type(None)))
        if not _FILE.fullmatch(name):
            raise ValueError(f"expected the name of a file in the directory itself, found {name!r:.80}")
        if text is not None and not re.fullmatch("[0-9a-f]{8}", text):
            raise ValueError(f"expected a checksum, found {text!r:.80}")
        return File(name, None if text is None else int(text, 16))

    def json(self) -> dict[str, Any]:
        """The words for it."""
        return {"file": self.name, "crc32": None if self.crc32 is None else f"{self.crc32:08x}"}


@dataclass(frozen=True)
class Layer:
    """The rows that one save wrote: `count` from `start` on, or those that the file `index` lists, ascending."""

    count: int
    start: int | None
    index: File | None
    leaves: dict[str, File]

    @staticmethod
    def read(node: Any, entry: StorageEntry) -> Layer:
        """The layer that parsed JSON describes."""
        count, start, index, leaves = _fields(
            node, count=int, start=(int, type(None)), index=(dict, type(None)), leaves=dict
        )
        if (start is None) == (index is None) or not 0 <= (start or 0) <= (start or 0) + count <= entry.rows:
            raise ValueError(f"expected some of {entry.rows} rows, found {count!r:.80} from {start!r:.80}")
        if leaves.keys() != entry.leaves.keys():
            raise ValueError(
                f"expected a file for each of {sorted(entry.leaves)!r:.200}, found {sorted(leaves)!r:.200}"
            )
        files_of = {path: File.read(leaf) for path, leaf in leaves.items()}
        return Layer(count, start, None if index is None else File.read(index), files_of)

    def json(self) -> dict[str, Any]:
        """The words for it."""
        index = None if self.index is None else self.index.json()
        leaves = {path: leaf.json() for path, leaf in self.leaves.items()}
        return {"count": self.count, "start": self.start, "index": index, "leaves": leaves}


@dataclass(frozen=True)
class StorageEntry:
    """A storage in a snapshot: its spec in words, and the layers to read one after the other.

    Rows that are in no layer hold zeros; none from `rows` on is in any.
    """

    capacity: int
    casting: Casting
    spec: Any
    rows: int = 0
    layers: tuple[Layer, ...] = ()

    @functools.cached_property
    def nest(self) -> Nest:
        """What the spec says in words."""
        return Nest(rebuild(self.spec))

    @functools.cached_property
    def leaves(self) -> dict[str, ArraySpec]:
        """The leaves by their paths."""
        return self.nest.leaves

    @property
    def row_nbytes(self) -> int:
        """The bytes of an item."""
        return sum(spec.nbytes for spec in self.leaves.values())

    @staticmethod
    def read(node: Any) -> StorageEntry:
        """The storage that parsed JSON describes."""
        capacity, casting, spec, rows, layers = _fields(
            node, capacity=int, casting=str, spec=dict, rows=int, layers=list
        )
        entry = StorageEntry(capacity, casting, spec, rows)
        if not 0 < capacity <= MOST or capacity * max(entry.row_nbytes, 1) > MOST or casting not in CASTINGS:
            raise ValueError(f"expected a capacity and a casting, found {capacity!r:.80} and {casting!r:.80}")
        if not 0 <= rows <= capacity:
            raise ValueError(f"expected at most {capacity} rows, found {rows!r:.80}")
        return dataclasses.replace(entry, layers=tuple(Layer.read(layer, entry) for layer in layers))

    def json(self) -> dict[str, Any]:
        """The words for it."""
        layers = [layer.json() for layer in self.layers]
        return {
            "capacity": self.capacity,
            "casting": self.casting,
            "spec": self.spec,
            "rows": self.rows,
            "layers": layers,
        }


@dataclass(frozen=True)
class ArrayEntry:
    """An array in a snapshot that belongs to no storage."""

    file: File
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @staticmethod
    def read(node: Any) -> ArrayEntry:
        """The array that parsed JSON describes."""
        file, shape, dtype = _fields(node, file=dict, shape=list, dtype=(str, list))
        if len(shape) > 60 or not all(type(length) is int and 0 <= length <= MOST for length in shape):
            raise ValueError(f"expected a shape, found {shape!r:.80}")
        return ArrayEntry(File.read(file), tuple(shape), read_dtype(dtype))

    def json(self) -> dict[str, Any]:
        """The words for it."""
        return {"file": self.file.json(), "shape": list(self.shape), "dtype": describe_dtype(self.dtype)}


def _version_of_anystore() -> str:
    import anystore

    return f"anystore {anystore.__version__}"


@dataclass(frozen=True)
class Manifest:
    """All that a version of a snapshot is.

    Attributes
    ----------
    id : str
        No two versions share one, of whatever snapshots.
    version : int
        Rises with each save to a directory; the names of a save's files begin with it.
    kind : str
        "storage", "replay" or "mapped".
    state : dict
        What the one who saved wanted kept, in JSON.
    written_by : str
        The version of anystore that did.
    format_version : int
        That of the words of the manifest.
    """

    id: str
    version: int
    kind: str
    storages: dict[str, StorageEntry]
    arrays: dict[str, ArrayEntry]
    state: dict[str, Any]
    written_by: str = dataclasses.field(default_factory=_version_of_anystore)
    format_version: int = VERSION

    def names(self) -> set[str]:
        """The files that belong to this version, itself not counted."""
        layers = [layer for entry in self.storages.values() for layer in entry.layers]
        found = [file for layer in layers for file in layer.leaves.values()]
        found += [layer.index for layer in layers if layer.index is not None]
        found += [array.file for array in self.arrays.values()]
        return {file.name for file in found}

    @staticmethod
    def read(node: Any) -> Manifest:
        """The manifest that parsed JSON describes."""
        identity, version, kind, storages, arrays, state, written_by = _fields(
            node, id=str, version=int, kind=str, storages=dict, arrays=dict, state=dict, written_by=str
        )
        if not re.fullmatch("[0-9a-f]{32}", identity) or not 0 < version < 10**15 or kind not in KINDS:
            raise ValueError(f"expected an id, a version and a kind, found {identity!r:.80}, {version!r}, {kind!r:.80}")
        return Manifest(
            identity,
            version,
            kind,
            {name: StorageEntry.read(entry) for name, entry in storages.items()},
            {name: ArrayEntry.read(entry) for name, entry in arrays.items()},
            state,
            written_by,
        )

    def json(self) -> dict[str, Any]:
        """The words for it."""
        return {
            "id": self.id,
            "version": self.version,
            "written_by": self.written_by,
            "kind": self.kind,
            "storages": {name: entry.json() for name, entry in self.storages.items()},
            "arrays": {name: entry.json() for name, entry in self.arrays.items()},
            "state": self.state,
        }


def _fields(node: Any, **kinds: Any) -> list[Any]:
    """The values of a JSON object that has these very keys, each of its type."""
    if not isinstance(node, dict) or node.keys() != kinds.keys():
        found = sorted(node) if isinstance(node, dict) else node
        raise ValueError(f"expected an object with {', '.join(kinds)}, found {found!r:.80}")
    for key, kind in kinds.items():
        if not isinstance(node[key], kind) or isinstance(node[key], bool):
            raise ValueError(f"expected {key} to be of type {_name_of(kind)}, found {node[key]!r:.80}")
    return [node[key] for key in kinds]


def _name_of(kind: Any) -> str:
    return " or ".join(map(_name_of, kind)) if isinstance(kind, tuple) else str(kind.__name__)


def render(manifest: Manifest) -> bytes:
    """The manifest as it stands in its file: JSON that begins with the checksum of all the rest.

    Raises
    ------
    ValueError
        If it would be too long, or the state cannot be put into JSON as it is.
    """
    content = {"format": FORMAT, "format_version": VERSION, **manifest.json()}
    text = json.dumps(content, indent=1, allow_nan=False).encode()
    rest = b'",\n' + text.removeprefix(b"{\n") + b"\n"
    if len(rest) > MANIFEST_BYTES - 100:
        raise ValueError(f"expected a manifest of less than {MANIFEST_BYTES:,} bytes, found {len(rest):,}")
    return _HEAD + f"{zlib.crc32(_HEAD + rest):08x}".encode() + rest


def parse(data: bytes) -> Manifest:
    """The manifest that these bytes are.

    Raises
    ------
    ValueError
        If they are not a manifest, to the last word.
    """
    place = len(_HEAD)
    if not data.startswith(_HEAD):
        raise ValueError("this is no manifest of a snapshot")
    found, expected = f"{zlib.crc32(data[:place] + data[place + 8 :]):08x}".encode(), data[place : place + 8]
    if found != expected:
        raise ValueError(f"expected the checksum {expected!r}, found {found!r}: the file is damaged")
    try:
        content = json.loads(data.decode())
        return _read(content)
    except RecursionError:
        raise ValueError("the file is nested too deeply") from None


def _read(content: dict[str, Any]) -> Manifest:
    del content["crc32"]
    if content.pop("format", None) != FORMAT:
        raise ValueError("this is no manifest of a snapshot")
    version = content.pop("format_version", None)
    if type(version) is not int or not 0 < version <= VERSION:
        raise ValueError(
            f"it is of format version {version!r:.80}, and this anystore reads up to {VERSION}; a newer one is needed"
        )
    return dataclasses.replace(Manifest.read(content), format_version=version)


def read_manifest(path: Path) -> Manifest:
    """The manifest in a file.

    Raises
    ------
    SnapshotError
        If there is none, or it is damaged, or not well-formed.
    """
    try:
        fd = files.open_regular(path)
    except (FileNotFoundError, NotADirectoryError):
        raise SnapshotError(f"{path}: there is no such file, so no snapshot") from None
    with open(fd, "rb") as file:
        nbytes = os.fstat(fd).st_size
        if nbytes > MANIFEST_BYTES:
            raise SnapshotError(f"{path}: expected a manifest of less than {MANIFEST_BYTES:,} bytes, found {nbytes:,}")
        data = file.read(nbytes)
    try:
        return parse(data)
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are of this kind
        raise SnapshotError(f"{path}: {error}") from None


def kept_name(version: int) -> str:
    """The name that the manifest of an older version has."""
    return f"manifest-{version:06}.json"


def kept_versions(directory: Path, newest: Manifest | None = None) -> list[int]:
    """The older versions that there are, newest first; without `newest`, of which a failed save may leave a second."""
    matches = map(_KEPT.fullmatch, files.list_names(directory))
    versions = {int(match[1]) for match in matches if match}
    return sorted(versions - ({newest.version} if newest is not None else set()), reverse=True)
