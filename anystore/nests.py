"""A nest of leaves: taken apart, put together, and the path of each leaf ("obs/image").

optree does the work. It is imported with the first nest, since it takes as long as the rest of the package.
Dataclasses, attrs classes and classes derived from dict, list or tuple are made known to it, in a namespace of our own,
the first time that one is met in a spec.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from anystore.specs import ArraySpec, understand

_NAMESPACE = "anystore"
_CONTAINERS = {dict, list, tuple, OrderedDict, defaultdict}
_registered: set[type] = set()
_registering = threading.Lock()


class Nest:
    """A nest of specs: what takes items apart into leaves, and leaves together into items.

    Parameters
    ----------
    data_spec : nest of specs
        dict, list, tuple, classes derived from these (OrderedDict, namedtuple, ...), dataclass and attrs class in any
        depth, with ArraySpec or a foreign spec at the leaves.

    Attributes
    ----------
    data_spec : nest of ArraySpec
        The same nest with an ArraySpec at every leaf.
    specs : tuple of ArraySpec
        The leaves, in the order in which they are stored.
    paths : tuple of str
        Where each leaf stands in the nest; "" for a nest that is a single leaf.
    pack : callable
        Puts a list of leaves together into a nest of the very types of the spec.

    Raises
    ------
    ValueError
        If a leaf is not a spec (with its path), if there is no leaf, or two have the same path.
    """

    __slots__ = ("_flatten_up_to", "_values_of", "data_spec", "pack", "paths", "specs")

    def __init__(self, data_spec: Any) -> None:
        self.data_spec = _understand(data_spec, "")
        leaves, treespec = _flatten(self.data_spec)
        if not leaves:
            raise ValueError(f"expected a nest with at least one ArraySpec, found {data_spec!r:.80}")
        self.specs: tuple[ArraySpec, ...] = tuple(leaves)
        self.paths: tuple[str, ...] = _paths(treespec)
        if len(set(self.paths)) < len(self.paths):
            raise ValueError(f"expected a path of its own for each leaf, found {_listed(sorted(self.paths))}")
        self.pack: Callable[[Iterable[Any]], Any] = treespec.unflatten
        self._flatten_up_to = treespec.flatten_up_to
        # Most items are dicts without further nests, whose leaves can be had in two thirds of the time.
        self._values_of = _values_of(self.data_spec)

    @property
    def leaves(self) -> dict[str, ArraySpec]:
        """The specs by their paths."""
        return dict(zip(self.paths, self.specs))

    def flatten(self, value: Any) -> list[Any]:
        """The leaves of `value`, in the order of `specs`.

        A mapping of any kind is taken where the spec has one, and a namedtuple with the same fields.

        Raises
        ------
        ValueError
            If `value` is not a nest like the spec; the message names every difference by its path.
        """
        try:
            if self._values_of is not None and type(value) is dict and len(value) == len(self.specs):
                return [*self._values_of(value)]
            leaves: list[Any] = self._flatten_up_to(value)
            return leaves
        except (KeyError, ValueError):
            differences: list[str] = []
            leaves = _match(self.data_spec, value, "", differences)
        if differences:
            raise ValueError("\n".join(differences))
        return leaves

    def select(self, paths: tuple[str, ...]) -> tuple[Any, list[int]]:
        """The part of the nest at `paths`, and the positions of its leaves.

        Returns
        -------
        data_spec : nest of ArraySpec
            The leaf or subtree itself for one path; for several a dict with the paths as keys.
        positions : list of int
            For each leaf of that nest its position in `specs`.

        Raises
        ------
        ValueError
            If a path is not there, or a leaf is selected twice.
        """
        parts = {path: self._subtree(path) for path in paths}
        whole: Any = next(iter(parts.values())) if len(paths) == 1 else parts
        above = paths if len(paths) == 1 else ()
        _, treespec = _flatten(whole)
        positions = [self.paths.index("/".join([*above, *names])) for names in _names(treespec)]
        if not positions:
            raise ValueError(f"expected the path of a leaf or a subtree; there are {_listed(self.paths)}")
        if len(parts) < len(paths) or len(set(positions)) < len(positions):
            raise ValueError(f"expected paths that do not overlap, found {', '.join(paths)}")
        return whole, positions

    def _subtree(self, path: str) -> Any:
        if path in self.paths:
            return self.leaves[path]
        found = list(_nodes_at(path, self.data_spec))
        if len(found) != 1:
            what = "is not in the spec" if not found else "is there more than once"
            raise ValueError(f"{path!r} {what}; there are {_listed(self.paths)}")
        return found[0]


def example_spec(item: Any) -> Any:
    """The nest of specs that `item`, a nest of arrays and numbers, is an instance of.

    Raises
    ------
    ValueError
        If a leaf is neither an array nor a number; with its path.
    """
    return map_leaves(ArraySpec.from_array, item)


def map_leaves(function: Callable[[Any], Any], nest: Any) -> Any:
    """The nest with what `function` makes of each leaf; what it refuses is refused with the path of the leaf.

    Raises
    ------
    ValueError
        If `function` raises one, or a TypeError.
    """
    leaves, treespec = _flatten(nest)
    made = []
    for number, leaf in enumerate(leaves):
        try:
            made.append(function(leaf))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{label(_paths(treespec)[number])}: {error}") from error
    return treespec.unflatten(made)


def label(path: str) -> str:
    """How a message names the leaf at `path`."""
    return path or "the item"


def _flatten(nest: Any) -> tuple[list[Any], Any]:
    import optree

    leaves, treespec = optree.tree_flatten(nest, none_is_leaf=True, namespace=_NAMESPACE)
    # What optree takes for a leaf may be a container of a class that it has yet to learn.
    if any(_learn(cls) for cls in set(map(type, leaves))):
        return _flatten(nest)
    return leaves, treespec


def _understand(data_spec: Any, prefix: str) -> Any:
    """`data_spec` with every leaf replaced by an ArraySpec; `prefix` is the path that leads to it."""
    leaves, treespec = _flatten(data_spec)
    specs = []
    for path, leaf in zip(_paths(treespec), leaves):
        here = _join(prefix, path)
        try:
            spec = understand(leaf)
        except ValueError as error:
            raise ValueError(f"{label(here)}: {error}") from None
        specs.append(spec if isinstance(spec, ArraySpec) else _understand(spec, here))
    return treespec.unflatten(specs)


def _fields(cls: type) -> dict[str, str] | None:
    """The fields of a dataclass or attrs class and what its constructor calls each; None for any other class."""
    if dataclasses.is_dataclass(cls):
        return {field.name: field.name for field in dataclasses.fields(cls) if field.init}
    if "__attrs_attrs__" in vars(cls):
        return {field.name: field.alias for field in vars(cls)["__attrs_attrs__"] if field.init}
    return None


@functools.lru_cache(maxsize=256)
def _learn(cls: type) -> bool:
    """Make a class known to optree, once, if it is one of containers; whether it is."""
    import optree

    # A spec is a dataclass too, but never a nest.
    found = None if issubclass(cls, ArraySpec) else _as_fields(cls) or _as_subclass(cls)
    if found is None:
        return False
    flatten, unflatten, entry = found
    with _registering:
        if cls not in _registered:
            optree.register_pytree_node(cls, flatten, unflatten, path_entry_type=entry, namespace=_NAMESPACE)
            _registered.add(cls)
    return True


def _as_fields(cls: type) -> tuple[Any, Any, Any] | None:
    """How optree takes a dataclass or attrs class apart and puts it together; None for any other class."""
    import optree

    fields = _fields(cls)
    if fields is None:
        return None
    names, keywords = tuple(fields), tuple(fields.values())

    def flatten(node: Any) -> tuple[list[Any], None, tuple[str, ...]]:
        return [getattr(node, name) for name in names], None, names

    def unflatten(_: Any, leaves: Iterable[Any]) -> Any:
        try:
            return cls(**dict(zip(keywords, leaves)))
        except TypeError as error:
            raise ValueError(
                f"expected containers that are made of their fields, found a {cls.__name__}: {error}"
            ) from None

    return flatten, unflatten, optree.GetAttrEntry


def _as_subclass(cls: Any) -> tuple[Any, Any, Any] | None:
    """The same for a class derived from dict, list or tuple, made as these are; None for any other class."""
    import optree

    if not issubclass(cls, (dict, list, tuple)) or cls in _CONTAINERS:
        return None
    if optree.is_namedtuple_class(cls) or optree.is_structseq_class(cls):
        return None

    def make(content: Any) -> Any:
        try:
            return cls(content)
        except TypeError as error:
            raise ValueError(
                f"expected containers that are made of a {type(content).__name__}, as those that they derive from are, "
                f"found a {cls.__name__}: {error}"
            ) from None

    def flatten_mapping(node: Any) -> tuple[list[Any], tuple[Any, ...], tuple[Any, ...]]:
        return list(node.values()), tuple(node), tuple(node)

    def unflatten_mapping(keys: Any, leaves: Iterable[Any]) -> Any:
        return make(dict(zip(keys, leaves)))

    def flatten_sequence(node: Any) -> tuple[list[Any], None]:
        return list(node), None

    def unflatten_sequence(_: Any, leaves: Iterable[Any]) -> Any:
        return make(list(leaves))

    if issubclass(cls, dict):
        return flatten_mapping, unflatten_mapping, optree.MappingEntry
    return flatten_sequence, unflatten_sequence, optree.SequenceEntry


def _paths(treespec: Any) -> tuple[str, ...]:
    return tuple(map("/".join, _names(treespec)))


def _names(treespec: Any) -> list[list[str]]:
    """The keys, fields and positions that lead to each leaf."""
    import optree

    return [
        [str(entry.field if isinstance(entry, optree.NamedTupleEntry) else entry.entry) for entry in accessor]
        for accessor in treespec.accessors()
    ]


def _join(*parts: str) -> str:
    return "/".join(part for part in parts if part)


def _listed(paths: Iterable[str]) -> str:
    return ", ".join(label(path) for path in paths)


def children(node: Any) -> dict[Any, Any]:
    """The children of a node by key, field or position, in the order of their leaves; none for a leaf."""
    import optree

    try:
        children, _, keys, _ = optree.tree_flatten_one_level(node, none_is_leaf=True, namespace=_NAMESPACE)
    except ValueError:  # no node for optree, such as a mapping or a list of a class that it does not know
        if isinstance(node, Mapping):
            return dict(node.items())
        return dict(enumerate(node)) if isinstance(node, (list, tuple)) else {}
    return dict(zip(getattr(node, "_fields", keys), children))


def _values_of(node: Any) -> Callable[[Any], tuple[Any, ...]] | None:
    """What takes the leaves out of a dict of several leaves and no nests, in their order; None for any other nest."""
    if not isinstance(node, dict) or len(node) < 2 or not all(isinstance(value, ArraySpec) for value in node.values()):
        return None
    return operator.itemgetter(*children(node))


def _nodes_at(path: str, node: Any) -> Iterator[Any]:
    """What stands at `path` below `node`; more than one thing only where keys hold slashes of their own."""
    for key, child in children(node).items():
        name = str(key)
        if path == name:
            yield child
        elif path.startswith(f"{name}/"):
            yield from _nodes_at(path[len(name) + 1 :], child)


def _alike(spec: Any, value: Any) -> bool:
    """Whether a value may stand where the spec has this node, whatever its children."""
    if isinstance(spec, Mapping):
        return isinstance(value, Mapping)
    if hasattr(spec, "_fields"):
        return isinstance(value, tuple) and getattr(value, "_fields", None) == spec._fields
    if isinstance(spec, (list, tuple)):
        return isinstance(value, list if isinstance(spec, list) else tuple) and not hasattr(value, "_fields")
    return type(value) is type(spec)


def _match(spec: Any, value: Any, path: str, differences: list[str]) -> list[Any]:
    """The leaves of `value` where `spec` has them; what differs is added to `differences`, a line each."""
    if isinstance(spec, ArraySpec):
        return [value]
    if not _alike(spec, value):
        differences.append(f"{label(path)}: expected a {type(spec).__name__}, found a {type(value).__name__}")
        return []
    expected, found = children(spec), children(value)
    missing = [key for key in expected if key not in found]
    unexpected = [key for key in found if key not in expected]
    if missing or unexpected:
        parts = [f"missing {missing}"] * bool(missing) + [f"unexpected {unexpected}"] * bool(unexpected)
        differences.append(f"{label(path)}: {', '.join(parts)}; expected {list(expected)}")
    return [
        leaf
        for key in expected
        if key in found
        for leaf in _match(expected[key], found[key], _join(path, str(key)), differences)
    ]
