"""What a snapshot holds, for people and for programs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anystore.nests import label
from anystore.snapshot.described import describe_dtype
from anystore.snapshot.files import gone
from anystore.snapshot.manifest import StorageEntry, kept_versions
from anystore.snapshot.reader import Snapshot


def report(path: str | os.PathLike[str], verify: bool = False) -> dict[str, Any]:
    """What the snapshot at `path` holds, in words that JSON has.

    Parameters
    ----------
    verify : bool, default False
        Whether to read all files and compare their checksums, instead of their sizes and headers alone.

    Raises
    ------
    SnapshotError, FileNotFoundError
        If it is damaged, with the name of the file.
    """
    snapshot = _checked(path, verify)
    manifest = snapshot.manifest
    arrays = {
        name: {"shape": list(entry.shape), "dtype": describe_dtype(entry.dtype)}
        for name, entry in manifest.arrays.items()
    }
    return {
        "path": str(Path(path)),
        "kind": manifest.kind,
        "format_version": manifest.format_version,
        "written_by": manifest.written_by,
        "version": manifest.version,
        "older_versions": kept_versions(Path(path), manifest),
        "storages": {name: _storage(entry) for name, entry in manifest.storages.items()},
        "arrays": arrays,
        "state": manifest.state,
        "files": len(manifest.names()),
        "nbytes": snapshot.nbytes,
        "checked": "checksums" if verify and manifest.kind != "mapped" else "sizes and headers",
    }


def _checked(path: str | os.PathLike[str], verify: bool) -> Snapshot:
    """The newest version, found to be good: another one where that is replaced and removed meanwhile."""
    while True:
        snapshot = Snapshot(path)
        try:
            snapshot.verify() if verify else snapshot.check()
        except FileNotFoundError as error:
            if Snapshot(path).id == snapshot.id:
                raise gone(error.filename) from None
        else:
            return snapshot


def _storage(entry: StorageEntry) -> dict[str, Any]:
    leaves = {
        path: {"shape": list(spec.shape), "dtype": describe_dtype(spec.dtype), "nbytes": entry.rows * spec.nbytes}
        for path, spec in entry.leaves.items()
    }
    layers = [layer.count for layer in entry.layers]
    return {
        "capacity": entry.capacity,
        "rows": entry.rows,
        "layers": layers,
        "casting": entry.casting,
        "leaves": leaves,
    }


def as_text(found: dict[str, Any]) -> str:
    """A report for people."""
    by = f", by {found['written_by']}" if found["written_by"] else ""
    lines = [f"{found['path']}: {found['kind']}, version {found['version']}{by}"]
    if found["older_versions"]:
        lines.append(f"  older versions: {', '.join(map(str, found['older_versions']))}")
    for name, storage in found["storages"].items():
        lines.append(f"  {name}: {storage['rows']:,} of {storage['capacity']:,} rows{_layers(storage['layers'])}")
        cells = [
            (label(path), _shape(leaf), str(leaf["dtype"]), f"{leaf['nbytes']:,} bytes")
            for path, leaf in storage["leaves"].items()
        ]
        lines += _table(cells)
    if found["arrays"]:
        lines.append("  arrays")
        lines += _table([(name, _shape(array), str(array["dtype"]), "") for name, array in found["arrays"].items()])
    if found["state"]:
        lines.append(f"  state: {', '.join(found['state'])}")
    lines.append(f"  {found['files']} files with {found['nbytes']:,} bytes; {found['checked']} are good")
    return "\n".join(lines)


def _layers(counts: list[int]) -> str:
    return (
        f", saved in {len(counts)} layers of {', '.join(f'{count:,}' for count in counts)}" if len(counts) > 1 else ""
    )


def _shape(described: dict[str, Any]) -> str:
    return str(tuple(described["shape"]))


def _table(cells: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*cells)]
    rows = [[cell.ljust(width) for cell, width in zip(row[:-1], widths)] for row in cells]
    return [f"    {'  '.join(row)}  {line[-1]:>{widths[-1]}}".rstrip() for row, line in zip(rows, cells)]
