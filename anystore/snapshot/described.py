"""A nest of specs in the words of JSON, and the nest that such words describe.

What a file names is never imported: the classes that a spec came with are noted for people, and a nest that is read
has generic ones in their place.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import keyword
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from anystore.nests import children
from anystore.specs import ArraySpec, as_dtype, is_extension

_DEEPEST = 64
MOST = 2**48
"""No dimension, no number of rows, no item and no storage in bytes is larger."""


def describe(node: Any) -> dict[str, Any]:
    """The words for a nest of ArraySpec.

    Raises
    ------
    ValueError
        If a dtype or the key of a dict cannot be put into words.
    """
    if isinstance(node, ArraySpec):
        leaf = {"kind": "leaf", "shape": list(node.shape), "dtype": describe_dtype(node.dtype)}
        return leaf if node.name is None else {**leaf, "name": str(node.name)}
    found = dict(node) if isinstance(node, dict) else children(node)  # a dict in the order in which it was made
    described = {"kind": _kind(node), "keys": [_describe_key(key) for key in found]}
    if described["kind"] in ("namedtuple", "dataclass", "attrs"):
        described["class"] = f"{type(node).__module__}.{type(node).__qualname__}"
    return {**described, "children": [describe(child) for child in found.values()]}


def _kind(node: Any) -> str:
    """What the containers are called; whatever is none of these is read as a dict."""
    if isinstance(node, tuple):
        return "namedtuple" if hasattr(node, "_fields") else "tuple"
    if isinstance(node, list):
        return "list"
    if isinstance(node, collections.OrderedDict):
        return "OrderedDict"
    if dataclasses.is_dataclass(node):
        return "dataclass"
    return "attrs" if hasattr(type(node), "__attrs_attrs__") else "dict"


def _describe_key(key: Any) -> Any:
    if key is None or type(key) in (str, int, bool) or (type(key) is float and math.isfinite(key)):
        return key
    if type(key) is tuple:
        return [_describe_key(part) for part in key]
    raise ValueError(f"expected the keys of a dict to be strings, finite numbers or tuples of them, found {key!r:.80}")


def describe_dtype(dtype: np.dtype[Any]) -> Any:
    """The words for a dtype: its name, NumPy's string, or a list of fields.

    Raises
    ------
    ValueError
        If it has parts that have none.
    """
    described = dtype.name if is_extension(dtype) else np.lib.format.dtype_to_descr(dtype)
    if not isinstance(described, str):
        described = _as_lists(described)
    try:
        same = read_dtype(described) == dtype
    except ValueError:
        same = False
    if not same:
        raise ValueError(f"{dtype} cannot be saved: a .npy file would not hold all of it")
    return described


def _as_lists(descr: Any) -> Any:
    return [_as_lists(part) for part in descr] if isinstance(descr, (list, tuple)) else descr


_STRING = re.compile(r"[<>|][biufcSUVmM][0-9]{1,9}(\[[0-9]*[a-zA-Z]{1,2}(/[0-9]+)?\])?|[a-z]{3}[a-z0-9_]{1,20}")


def read_dtype(described: Any) -> np.dtype[Any]:
    """The dtype that these words stand for.

    Raises
    ------
    ValueError
        If they stand for none.
    """
    try:
        if isinstance(described, str) and _STRING.fullmatch(described):
            dtype = as_dtype(described)
            known = described == (dtype.name if is_extension(dtype) else dtype.str)
        else:
            dtype = np.lib.format.descr_to_dtype([_field(field) for field in described])
            known = _as_lists(np.lib.format.dtype_to_descr(dtype)) == described
    except (TypeError, ValueError, KeyError, SyntaxError, Warning, OverflowError) as error:
        raise ValueError(f"expected a dtype, found {described!r:.80} ({error})") from None
    if not known or dtype.hasobject or dtype.itemsize == 0:
        raise ValueError(f"expected a dtype of values with a fixed size, found {described!r:.80}")
    return dtype


def _field(field: Any) -> tuple[Any, ...]:
    """A field as NumPy takes it; what is in it is checked before NumPy reads it."""
    name, dtype, *shape = field
    names = name if isinstance(name, list) else [name]
    if len(names) > 2 or not all(isinstance(part, str) for part in names) or len(shape) > 1:
        raise ValueError("a field is a name, a dtype and perhaps a shape")
    if isinstance(dtype, list):
        dtype = [_field(inner) for inner in dtype]
    elif not (isinstance(dtype, str) and _STRING.fullmatch(dtype)):
        raise ValueError(f"{dtype!r:.80} is not a dtype")
    lengths = [tuple(_length(length) for length in part) for part in shape]
    return (tuple(name) if isinstance(name, list) else name, dtype, *lengths)


def rebuild(described: Any, depth: int = 0) -> Any:
    """The nest of ArraySpec that the words describe: of namedtuples where it had classes of the user's own.

    Raises
    ------
    ValueError
        If they describe none.
    """
    if not isinstance(described, dict) or depth > _DEEPEST:
        raise ValueError(f"expected the description of a nest, found {described!r:.80}")
    if described.get("kind") == "leaf":
        return _leaf(described)
    if not {"kind", "keys", "children"} <= described.keys() <= {"kind", "keys", "children", "class"}:
        raise ValueError(f"expected the kind, keys and children of a node, found {list(described)!r:.80}")
    keys, nodes = described["keys"], described["children"]
    if not (isinstance(keys, list) and isinstance(nodes, list) and len(keys) == len(nodes)):
        raise ValueError("expected as many keys as children")
    return _container(described, [_key(key) for key in keys], [rebuild(node, depth + 1) for node in nodes])


def _leaf(described: Mapping[str, Any]) -> ArraySpec:
    if not {"kind", "shape", "dtype"} <= described.keys() <= {"kind", "shape", "dtype", "name"}:
        raise ValueError(f"expected the shape and dtype of a leaf, found {list(described)!r:.80}")
    shape, name = described["shape"], described.get("name")
    if not isinstance(shape, list) or len(shape) > 60 or not (name is None or isinstance(name, str)):
        raise ValueError(f"expected a shape and a name, found {shape!r:.80} and {name!r:.80}")
    spec = ArraySpec(tuple(_length(length) for length in shape), read_dtype(described["dtype"]), name)
    if spec.nbytes > MOST:
        raise ValueError(f"expected an item of less than {MOST:,} bytes, found {spec}")
    return spec


def _length(number: Any) -> int:
    if type(number) is not int or not 0 <= number <= MOST:
        raise ValueError(f"expected a length, found {number!r:.80}")
    return number


def _key(key: Any) -> Any:
    if isinstance(key, list):
        return tuple(_key(part) for part in key)
    if isinstance(key, dict):
        raise ValueError(f"expected a key, found {key!r:.80}")
    return key


def _container(described: Mapping[str, Any], keys: list[Any], nodes: list[Any]) -> Any:
    kind = described["kind"]
    if kind in ("list", "tuple"):
        return nodes if kind == "list" else tuple(nodes)
    if len(set(keys)) < len(keys):
        raise ValueError(f"expected a key of its own for each child, found {keys!r:.80}")
    if kind in ("namedtuple", "dataclass", "attrs"):
        name = str(described.get("class", "")).rpartition(".")[2]
        return _record(name if _is_name(name) else "Record", keys, nodes)
    if kind not in ("dict", "OrderedDict"):
        raise ValueError(f"expected the kind of a node, found {kind!r:.80}")
    ordered = zip(keys, nodes)
    return collections.OrderedDict(ordered) if kind == "OrderedDict" else dict(ordered)


def _record(name: str, fields: list[Any], nodes: list[Any]) -> Any:
    """A namedtuple; a dict for fields that one cannot have, such as those that begin with an underscore."""
    if not all(_is_name(field) for field in fields):
        return dict(zip(fields, nodes))
    return _class(name, tuple(fields))(*nodes)


def _is_name(text: Any) -> bool:
    good = isinstance(text, str) and len(text) < 256 and text.isidentifier()
    return good and not text.startswith("_") and not keyword.iskeyword(text)


@functools.lru_cache(maxsize=256)
def _class(name: str, fields: tuple[str, ...]) -> Any:
    """One class for each name and fields, so that what is read twice is of the same types."""
    return collections.namedtuple(name, fields)
