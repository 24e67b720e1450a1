from __future__ import annotations

import dataclasses
import pickle
import sys

import numpy as np
import pytest

from anystore import ArraySpec, Storage
from anystore.specs import as_dtype, kind_of, limits


class TestArraySpec:
    def test_keeps_what_it_is_given(self):
        spec = ArraySpec([2, np.int64(3)], "float32", name="x")
        assert spec.shape == (2, 3)
        assert spec.dtype == np.dtype("float32")
        assert spec.name == "x"
        assert spec.nbytes == 24
        assert ArraySpec(3, bool).shape == (3,)

    def test_is_equal_on_shape_and_dtype(self):
        assert ArraySpec((2,), "int32", "a") == ArraySpec([2], np.int32, "b")
        assert hash(ArraySpec((2,), "int32", "a")) == hash(ArraySpec((2,), "int32"))
        assert ArraySpec((2,), "int32") != ArraySpec((2, 1), "int32")
        assert ArraySpec((2,), "int32") != ArraySpec((2,), "int64")
        assert ArraySpec((2,), "int32") != "ArraySpec((2,), 'int32')"

    def test_cannot_be_changed(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            ArraySpec((2,), "int32").shape = (3,)

    @pytest.mark.parametrize(
        "spec",
        [
            ArraySpec((2, 3), "uint8"),
            ArraySpec((), "bfloat16", "loss"),
            ArraySpec((4,), ">i4"),
            ArraySpec((), "S3"),
            ArraySpec((2,), [("x", "f4"), ("y", ">i2", (3,))]),
        ],
        ids=str,
    )
    def test_survives_pickle_and_repr(self, spec):
        for again in (pickle.loads(pickle.dumps(spec)), eval(repr(spec))):
            assert again == spec
            assert again.name == spec.name

    def test_repr(self):
        assert repr(ArraySpec((84, 84, 4), np.uint8)) == "ArraySpec((84, 84, 4), 'uint8')"
        assert repr(ArraySpec((), "bfloat16", name="loss")) == "ArraySpec((), 'bfloat16', name='loss')"

    def test_from_array(self):
        assert ArraySpec.from_array(np.zeros((2, 3), "float16"), "x") == ArraySpec((2, 3), "float16")
        assert ArraySpec.from_array(np.float32(1)) == ArraySpec((), "float32")
        assert ArraySpec.from_array(1.0) == ArraySpec((), "float64")
        assert ArraySpec.from_array(True) == ArraySpec((), "bool")
        with pytest.raises(ValueError, match="expected an array or a number, found str: 'a'"):
            ArraySpec.from_array("a")

    def test_replace(self):
        spec = ArraySpec((2,), "int32", "a")
        assert spec.replace(shape=(3,)) == ArraySpec((3,), "int32")
        assert spec.replace(shape=()).shape == ()
        assert spec.replace(dtype="int64") == ArraySpec((2,), "int64")
        assert spec.replace(name="b").name == "b"
        assert spec.replace().name == "a"

    def test_check_array(self):
        spec = ArraySpec((2,), "int32")
        assert spec.check_array(np.zeros(2, "int32"))
        assert not spec.check_array(np.zeros(2, "int64"))
        assert not spec.check_array(np.zeros(3, "int32"))
        assert not spec.check_array([0, 0])
        assert not spec.check_array("ab")
        assert ArraySpec((), "float64").check_array(1.0)

    @pytest.mark.parametrize(
        ("shape", "dtype", "error", "text"),
        [
            ((2, None), "int32", ValueError, r"without unknown dimensions, found \(2, None\)"),
            ((-1,), "int32", ValueError, r"without negative lengths, found \(-1,\)"),
            ((2.0,), "int32", TypeError, r"a sequence of integers, found \(2.0,\)"),
            (None, "int32", TypeError, "a sequence of integers, found None"),
            ((2,), None, TypeError, "expected a dtype, found None"),
            ((2,), "real", TypeError, "'real' is not a dtype that NumPy or ml_dtypes knows"),
        ],
    )
    def test_refuses_what_is_none(self, shape, dtype, error, text):
        with pytest.raises(error, match=text):
            ArraySpec(shape, dtype)


class TestDtypes:
    @pytest.mark.parametrize("name", ["bool", "uint8", "int64", "float16", "float32", "complex64", "bfloat16"])
    def test_of_other_libraries(self, name):
        for library in ("torch", "jax.numpy", "array_api_strict"):
            dtype = getattr(pytest.importorskip(library), name, None)
            if dtype is not None:
                assert as_dtype(dtype) == as_dtype(name)

    def test_without_ml_dtypes(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "ml_dtypes", None)
        with pytest.raises(
            TypeError, match="'float8_e0m8' is not a dtype that NumPy knows; for .*: pip install ml_dtypes"
        ):
            as_dtype("float8_e0m8")

    def test_kinds(self):
        kinds = {
            "bool": 0,
            "uint8": 1,
            "int4": 1,
            "float64": 2,
            "bfloat16": 2,
            "float8_e4m3fn": 2,
            "complex64": 3,
            "S3": None,
        }
        assert {name: kind_of(as_dtype(name)) for name in kinds} == kinds

    def test_limits(self):
        assert limits(np.dtype("uint8")) == (0, 255)
        assert limits(np.dtype("int64")) == (-(2**63), 2**63 - 1)
        assert limits(as_dtype("int4")) == (-8, 7)
        assert limits(np.dtype("float16")) == (-65504, 65504)
        assert limits(as_dtype("float8_e4m3fn")) == (-448, 448)
        assert limits(np.dtype("S3")) == (-np.inf, np.inf)


class TestForeignSpecs:
    def spec_of(self, foreign):
        return Storage(foreign, 2).data_spec

    def test_dm_env(self):
        specs = pytest.importorskip("dm_env.specs")
        assert self.spec_of({"a": specs.Array((2,), "int8", "a")}) == {"a": ArraySpec((2,), "int8")}
        assert self.spec_of(specs.BoundedArray((2,), "float32", 0, 1, "b")).name == "b"
        assert self.spec_of(specs.DiscreteArray(5)) == ArraySpec((), "int32")
        with pytest.raises(ValueError, match="^text: .* holds Python objects"):
            self.spec_of({"text": specs.StringArray(())})

    def test_gymnasium(self):
        spaces = pytest.importorskip("gymnasium.spaces")
        space = spaces.Dict(
            image=spaces.Box(0, 255, (4, 4), np.uint8),
            both=spaces.Tuple([spaces.Discrete(3), spaces.MultiBinary(5)]),
            many=spaces.MultiDiscrete([2, 3]),
            deep=spaces.Dict(x=spaces.Box(-1, 1, (2,), np.float32)),
        )
        assert self.spec_of({"obs": space, "reward": ArraySpec((), "float32")}) == {
            "obs": {
                "image": ArraySpec((4, 4), "uint8"),
                "both": (ArraySpec((), "int64"), ArraySpec((5,), "int8")),
                "many": ArraySpec((2,), "int64"),
                "deep": {"x": ArraySpec((2,), "float32")},
            },
            "reward": ArraySpec((), "float32"),
        }
        store = Storage(space, 3)
        sample = space.sample()
        store.set(1, sample)
        np.testing.assert_array_equal(store.get(1)["both"][1], sample["both"][1])
        with pytest.raises(ValueError, match="^obs/deep/words: expected an ArraySpec, found Text"):
            self.spec_of({"obs": spaces.Dict(deep=spaces.Dict(words=spaces.Text(5)))})

    def test_jax(self):
        jax = pytest.importorskip("jax")
        assert self.spec_of([jax.ShapeDtypeStruct((2,), jax.numpy.bfloat16)]) == [ArraySpec((2,), "bfloat16")]

    @pytest.mark.parametrize(
        ("leaf", "text"),
        [
            (
                np.zeros(3),
                r"^a/b: expected an ArraySpec, found ndarray: .*; for the spec of an array: ArraySpec.from_array",
            ),
            (None, "^a/b: expected an ArraySpec, found NoneType: None"),
            ("float32", "^a/b: expected an ArraySpec, found str: 'float32'"),
            (np.float32, "^a/b: expected an ArraySpec, found type"),
            (ArraySpec((), object), "^a/b: .* holds Python objects"),
            (ArraySpec((), "U"), "^a/b: .* dtype of no size"),
            (
                ArraySpec((3,), np.dtype(("f4", (2,)))),
                r"^a/b: .* dtype with axes; expected ArraySpec\(\(3, 2\), 'float32'",
            ),
        ],
    )
    def test_anything_else_is_refused_by_its_path(self, leaf, text):
        with pytest.raises(ValueError, match=text):
            self.spec_of({"a": {"b": leaf}, "c": ArraySpec((), "int8")})

    @pytest.mark.parametrize("empty", [{}, (), [], {"a": {}}])
    def test_a_nest_without_leaves_is_refused(self, empty):
        with pytest.raises(ValueError, match="expected a nest with at least one ArraySpec"):
            self.spec_of(empty)
