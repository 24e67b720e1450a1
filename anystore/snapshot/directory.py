"""The directory of a snapshot: whose files are there, who may write, and the one step that makes a version the newest.

No file that a complete version names is ever written to again. Until the manifest is replaced, the old version is what
there is; from then on the new one is. Whatever no manifest names is a leftover, and goes at the end of a save or at the
beginning of the next.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from anystore.snapshot import files
from anystore.snapshot.files import LOCK, SnapshotError
from anystore.snapshot.manifest import MANIFEST, Manifest, kept_name, kept_versions, parse, read_manifest, render

_OWN = re.compile(r"([0-9]{6,15})\..*\.npy|manifest-([0-9]{6,15})\.json|manifest(?:-[0-9]{6,15})?\.json\.new")
"""The names that files of a snapshot have, besides the manifest and the lock."""


@contextlib.contextmanager
def prepared(path: Path, kind: str, wait: bool = False) -> Iterator[Manifest | None]:
    """The directory made, locked against other writers and rid of leftovers; and its manifest, if it has one.

    Raises
    ------
    SnapshotError
        If another is writing there, or it holds something else than a snapshot of this kind.
    """
    _make(path)
    _refuse_strangers(path)
    with files.locked(path, wait):
        old = read_manifest(path / MANIFEST) if os.path.lexists(path / MANIFEST) else None
        if old is not None and old.kind != kind:
            raise SnapshotError(
                f"{path}: expected a snapshot of kind {kind}, found one of {old.kind}; choose another directory"
            )
        sweep(path)
        yield old


def _make(path: Path) -> None:
    """Make a directory, and those above it, where there is none."""
    if not path.is_dir():
        _make(path.parent)
        with contextlib.suppress(FileExistsError):
            files.mkdir(path)
        files.sync_directory(path.parent)


def _refuse_strangers(path: Path) -> None:
    names = set(files.list_names(path))
    if names and not names & {MANIFEST, LOCK}:
        raise SnapshotError(f"{path}: expected an empty directory or a snapshot, found {', '.join(sorted(names))[:80]}")


@contextlib.contextmanager
def undone_on_error(path: Path) -> Iterator[None]:
    """Within which an error removes what was written, so that a full disk is no fuller than before."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError, SnapshotError):
            sweep(path)
        raise


def stage(path: Path, name: str, manifest: Manifest) -> None:
    """Write a manifest, and wait until it and the files that it names are on the disk; nobody looks at it yet.

    Raises
    ------
    ValueError
        If it is one that could not be read again.
    """
    data = render(manifest)
    parse(data)
    fd = files.create(path / f"{name}.new")
    try:
        files.write(fd, data)
        files.fsync(fd)
    finally:
        files.close(fd)
    files.sync_directory(path)


def commit(path: Path, name: str) -> None:
    """Let a staged manifest take its place."""
    files.replace(path / f"{name}.new", path / name)
    files.sync_directory(path)


def keep_old(path: Path, old: Manifest | None) -> None:
    """Give the manifest that is about to be replaced a name of its own."""
    if old is not None:
        stage(path, kept_name(old.version), old)
        commit(path, kept_name(old.version))


def forget_old(path: Path, keep: int) -> None:
    """Remove the manifests of older versions but the newest `keep`, now that there is a new version."""
    for version in kept_versions(path)[keep:]:
        with contextlib.suppress(OSError):  # the next save tries again
            files.unlink(path / kept_name(version))


def sweep(path: Path) -> None:
    """Remove what no manifest names.

    A file that cannot be removed does no harm but take room, and the next save tries again.
    """
    manifests = [MANIFEST, *map(kept_name, kept_versions(path))]
    named = {name for each in manifests if os.path.lexists(path / each) for name in _names(path / each)}
    for name in files.list_names(path):
        if _OWN.fullmatch(name) and name not in named and name not in manifests:
            with contextlib.suppress(OSError):
                files.unlink(path / name)


def _names(path: Path) -> set[str]:
    try:
        return read_manifest(path).names()
    except SnapshotError as error:
        if path.name == MANIFEST:
            raise
        raise SnapshotError(f"{error}; remove this file to give up the older version that it is of") from None


def next_version(path: Path) -> int:
    """A version whose files have names that nothing in the directory has."""
    newest = [read_manifest(path / MANIFEST).version] if os.path.lexists(path / MANIFEST) else []
    matches = [match for match in map(_OWN.fullmatch, files.list_names(path)) if match]
    return max([0, *newest, *(int(match[1] or match[2] or 0) for match in matches)]) + 1


def file_name(version: int, parts: Sequence[str], taken: dict[str, int]) -> str:
    """A name for a file, after the path of a leaf, that is safe on any file system and not among those `taken`.

    These are in lower case, each with the last number that was put behind it.
    """
    readable = re.sub(r"[^A-Za-z0-9_-]+", ".", "/".join(parts)).strip(".")[:100] or "leaf"
    name, number = readable, taken.get(readable.lower(), 1)
    while name.lower() in taken:
        number += 1
        name = f"{readable}.{number}"
    taken[readable.lower()] = number
    taken.setdefault(name.lower(), 1)
    return f"{version:06}.{name}.npy"
