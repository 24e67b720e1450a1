from __future__ import annotations

import collections
import dataclasses
import types
from typing import Any, NamedTuple

import numpy as np
import pytest

from anystore import ArraySpec, Storage

X, Y = ArraySpec((), "int32"), ArraySpec((2,), "float32")


class Point(NamedTuple):
    x: Any
    y: Any


@dataclasses.dataclass(frozen=True)
class Step:
    y: Any
    x: Any
    total: Any = dataclasses.field(init=False, default=None)


@dataclasses.dataclass
class Outer:
    first: Any
    rest: Any


def filled(nest_of: Any) -> Any:
    """Storage of a nest, and an item of it."""
    return Storage(nest_of(X, Y), 4), nest_of(np.int32(3), np.array([1, 2], np.float32))


class OwnDict(dict):
    def __repr__(self) -> str:
        return f"OwnDict({dict(sorted(self.items()))})"


class OwnList(list):
    """Of a class of the user's own."""


class OwnTuple(tuple):
    __slots__ = ()


NESTS = {
    "dict": lambda x, y: {"x": x, "y": y},
    "dict of mixed keys": lambda x, y: {1: x, "y": y},
    "OrderedDict": lambda x, y: collections.OrderedDict(y=y, x=x),
    "list": lambda x, y: [x, y],
    "tuple": lambda x, y: (x, y),
    "namedtuple": lambda x, y: Point(x, y),
    "dataclass": lambda x, y: Step(y=y, x=x),
    "dict of a class of its own": lambda x, y: OwnDict(y=y, x=x),
    "list and tuple of classes of their own": lambda x, y: OwnList([OwnTuple([x]), y]),
    "deep": lambda x, y: {"a": [Outer(Point(x, [y]), {"z": (x, Step(y, x))}), ()], "b": {}},
}


@pytest.mark.parametrize("nest_of", NESTS.values(), ids=NESTS)
class TestEachKind:
    def test_comes_back_as_it_was(self, nest_of):
        store, item = filled(nest_of)
        store.set(2, item)
        found = store.get(2)
        assert type(found) is type(item)
        assert repr(found) == repr(nest_of(np.array(3, np.int32), np.array([1, 2], np.float32)))
        assert repr(store.get([2])) == repr(nest_of(np.array([3], np.int32), np.array([[1, 2]], np.float32)))
        assert repr(store.data_spec) == repr(nest_of(X, Y))

    def test_selects_what_it_calls_its_paths(self, nest_of):
        store, item = filled(nest_of)
        store.set(2, item)
        for line in repr(store).splitlines()[1:-1]:
            leaf = store.select(line.split()[0])
            assert leaf.get(2).tolist() in (3, [1, 2])


class TestAttrs:
    def test_comes_back_as_it_was(self):
        attrs = pytest.importorskip("attrs")

        @attrs.frozen
        class Transition:
            _secret: Any
            reward: Any

        store = Storage(Transition(X, {"r": Y}), 4)
        store.set(1, Transition(5, {"r": [1.0, 2.0]}))
        found = store.get(1)
        assert type(found) is Transition
        assert found._secret == 5
        assert found.reward["r"].tolist() == [1, 2]
        assert "_secret" in repr(store)
        assert "reward/r" in repr(store)


class TestClassesThatAreMadeInTheirOwnWay:
    """There is no way to know how: they are refused, when the storage is made."""

    def test_are_refused(self):
        class Pair(tuple):
            def __new__(cls, a, b):
                return super().__new__(cls, (a, b))

        class Named(dict):
            def __init__(self, **items):
                super().__init__(items)

        class Counted(collections.defaultdict):
            pass

        for spec in (Pair(X, Y), Named(x=X, y=Y), Counted(list, x=X)):
            with pytest.raises(ValueError, match=f"^expected containers .* found a {type(spec).__name__}: "):
                Storage(spec, 4)


class TestWhatIsTakenForANest:
    def test_any_mapping_for_a_mapping(self):
        for make in (dict, collections.OrderedDict, types.MappingProxyType, lambda d: collections.defaultdict(int, d)):
            for spec in ({"x": X, "y": Y}, collections.OrderedDict(y=Y, x=X)):
                store = Storage(spec, 4)
                store.set(0, make({"y": np.ones(2, np.float32), "x": 7}))
                assert store.get(0)["x"] == 7
                assert store.get(0)["y"].tolist() == [1, 1]

    def test_a_namedtuple_of_the_same_fields(self):
        twin = collections.namedtuple("Twin", "x y")
        store = Storage(Point(X, Y), 4)
        store.set(0, twin(7, [1, 1]))
        assert type(store.get(0)) is Point
        with pytest.raises(ValueError, match="^the item: expected a Point, found a Other$"):
            store.set(0, collections.namedtuple("Other", "y x")(7, [1, 1]))

    def test_a_list_of_a_class_of_its_own(self):
        class Own(list):
            pass

        store = Storage([X, Y], 4)
        store.set(0, Own([7, [1, 1]]))
        assert store.get(0)[0] == 7
        store = Storage(Own([X, Y]), 4)
        store.set(0, [7, [1, 1]])
        assert type(store.get(0)) is Own
        assert store.get(0)[0] == 7

    @pytest.mark.parametrize(
        ("spec", "value", "text"),
        [
            ([X, Y], (1, [1, 1]), "^the item: expected a list, found a tuple$"),
            ((X, Y), Point(1, [1, 1]), "^the item: expected a tuple, found a Point$"),
            ({"x": X}, Point(1, 2), "^the item: expected a dict, found a Point$"),
            (Step(Y, X), Outer(1, 2), "^the item: expected a Step, found a Outer$"),
            (Step(Y, X), {"x": 1, "y": [1, 1]}, "^the item: expected a Step, found a dict$"),
            ({"a": (X, ())}, {"a": (1, (2,))}, r"^a/1: unexpected \[0\]; expected \[\]$"),
            (
                {"a": {"b": {"c": X}}},
                {"a": {"b": {"d": 1}}},
                r"^a/b: missing \['c'\], unexpected \['d'\]; expected \['c'\]$",
            ),
        ],
    )
    def test_nothing_else(self, spec, value, text):
        with pytest.raises(ValueError, match=text):
            Storage(spec, 4).set(0, value)


class TestPaths:
    def test_keys_may_hold_slashes(self):
        store = Storage({"a/b": X, "a": {"b": {"c": Y}}}, 4)
        assert store.select("a/b/c").data_spec == Y
        assert store.select("a").data_spec == {"b": {"c": Y}}
        with pytest.raises(ValueError, match="not in the spec"):
            store.select("a/")
        with pytest.raises(ValueError, match="expected a path of its own for each leaf, found a/b, a/b"):
            Storage({"a/b": X, "a": {"b": Y}}, 4)

    def test_are_text(self):
        with pytest.raises(ValueError, match="expected paths such as 'obs/image', found 1"):
            Storage([X, Y], 4).select(1)

    def test_the_spec_that_is_given_out_is_a_copy(self):
        store = Storage({"a": X, "b": Y}, 4)
        store.data_spec.pop("a")
        assert store.data_spec == {"a": X, "b": Y}

    def test_that_stand_for_two_parts_are_refused(self):
        store = Storage({"a/b": {"x": X}, "a": {"b": {"c": Y}}}, 4)
        with pytest.raises(ValueError, match="^'a/b' is there more than once; there are a/b/c, a/b/x$"):
            store.select("a/b")
        assert store.select("a").data_spec == {"b": {"c": Y}}
        assert store.select("a/b/x").data_spec == X

    def test_of_classes_that_look_at_their_specs(self):
        @dataclasses.dataclass
        class Observed:
            obs: Any

            def __post_init__(self) -> None:
                assert self.obs.shape[-1:] == (2,)

        store = Storage({"now": Observed(Y), "reward": X}, 4)
        part = store.select("now")
        part.set(1, Observed(np.ones(2, np.float32)))
        assert store.select("now/obs").get(1).tolist() == [1, 1]

    def test_classes_that_are_not_made_of_their_fields(self):
        @dataclasses.dataclass
        class Scaled:
            obs: Any
            scale: dataclasses.InitVar[float]

        with pytest.raises(ValueError, match="containers that are made of their fields, found a Scaled: .*'scale'"):
            Storage(Scaled(Y, 2.0), 4)

    def test_of_several_with_their_keys(self):
        store = Storage({"a": {"b": X, "c": Y}, "d": X}, 4)
        assert store.select("a/c", "d").data_spec == {"a/c": Y, "d": X}
        assert store.select("d").data_spec == X


class TestLike:
    def test_takes_arrays_and_numbers(self):
        store = Storage.like(Step(y=np.zeros(2, np.float32), x={"n": 1, "f": 1.0, "b": True}), 3)
        assert store.data_spec == Step(
            y=Y, x={"n": ArraySpec((), "int64"), "f": ArraySpec((), "float64"), "b": ArraySpec((), "bool")}
        )

    @pytest.mark.parametrize(("leaf", "found"), [(None, "NoneType"), ("a", "str"), (object, "type")])
    def test_refuses_anything_else_by_its_path(self, leaf, found):
        with pytest.raises(ValueError, match=f"^a/0: expected an array or a number, found {found}"):
            Storage.like({"a": [leaf]}, 3)
