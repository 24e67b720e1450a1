"""Random draws, the same contract on every backend."""

from __future__ import annotations

import importlib
import json
import math

import numpy as np
import pytest

from anystore import backends, select_backend
from anystore.backends.random import Random
from anystore.convert import library_of, to_numpy
from tests import stand_in

MANY = 30_000


def draws(random: Random) -> list[list[float]]:
    """Some of each kind."""
    return [
        to_numpy(array).tolist()
        for array in (random.integers(1000, 9), random.uniform(5), random.permutation(20), random.integers(7, 300))
    ]


def through_json(random: Random) -> dict:
    return json.loads(json.dumps(random.state()))


def assert_uniform(counts: np.ndarray) -> None:
    """Pearson's chi-square, by the cube-root law of Wilson and Hilferty no rarer than one in a million."""
    expected = counts.sum() / counts.size
    freedom = counts.size - 1
    statistic = float(((counts - expected) ** 2).sum() / expected)
    deviation = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert abs(deviation) < 4.9


class RandomContract:
    backend: str
    device: str
    integer, floating = "int64", "float64"

    def make(self, seed=0):
        return select_backend(self.backend, self.device).random(seed)

    def check(self, array, dtype, shape):
        backend = select_backend(self.backend, self.device)
        assert library_of(array) == backend.library
        assert select_backend(array) is backend
        assert tuple(array.shape) == shape
        assert to_numpy(array).dtype == dtype

    @pytest.mark.parametrize(("high", "count"), [(1, 3), (2, 0), (10, 256), (2**30, 7)])
    def test_integers(self, high, count):
        drawn = self.make().integers(high, count)
        self.check(drawn, self.integer, (count,))
        assert ((to_numpy(drawn) >= 0) & (to_numpy(drawn) < high)).all()

    @pytest.mark.parametrize("count", [0, 1, 256])
    def test_uniform(self, count):
        drawn = self.make().uniform(count)
        self.check(drawn, self.floating, (count,))
        assert ((to_numpy(drawn) >= 0) & (to_numpy(drawn) < 1)).all()

    @pytest.mark.parametrize("high", [1, 2, 300])
    def test_permutation(self, high):
        drawn = self.make().permutation(high)
        self.check(drawn, self.integer, (high,))
        assert sorted(to_numpy(drawn).tolist()) == list(range(high))

    def test_the_same_seed_gives_the_same_draws(self):
        assert draws(self.make(5)) == draws(self.make(np.int64(5)))
        assert draws(self.make(2**100)) == draws(self.make(2**100))

    def test_draws_differ(self):
        seeds = [0, 1, 2**32, 2**64, 2**100, None, None]
        first = [to_numpy(self.make(seed).integers(2**30, 8)).tolist() for seed in seeds]
        random = self.make()
        first += [to_numpy(random.integers(2**30, 8)).tolist() for _ in range(300)][1:]
        assert len({tuple(drawn) for drawn in first}) == len(first)

    def test_state_through_json(self):
        random = self.make()
        draws(random)
        state = through_json(random)
        expected = [draws(random) for _ in range(3)]
        for other in (random, self.make(1), self.make(None)):
            other.restore(state)
            assert [draws(other) for _ in range(3)] == expected

    def test_a_state_at_any_time(self):
        random, read = self.make(), self.make()
        for _ in range(100):
            before = through_json(read)
            expected = draws(random)
            assert draws(read) == expected
        read.restore(before)
        assert draws(read) == expected

    def test_a_state_is_of_its_time(self):
        random = self.make()
        state = random.state()
        expected = draws(random)
        random.restore(state)
        assert draws(random) == expected

    @pytest.mark.parametrize("state", [{}, {"kind": "dice"}, None, "numpy"])
    def test_a_foreign_state(self, state):
        random = self.make()
        kind = random.state()["kind"]
        with pytest.raises(ValueError, match=f"^expected the state of a generator of {kind}, found "):
            random.restore(state)
        assert draws(random) == draws(self.make())

    @pytest.mark.parametrize("rest", [{}, {"state": "4", "key": [1], "entropy": 3}, {"state": {"inc": 3}}])
    def test_a_malformed_state(self, rest):
        random = self.make()
        kind = random.state()["kind"]
        with pytest.raises(ValueError, match=f"^this is no state of a generator of {kind}: "):
            random.restore({"kind": kind, **rest})
        assert draws(random) == draws(self.make())

    def test_global_generators_are_neither_read_nor_moved(self):
        libraries = [importlib.import_module(name) for name in ("numpy", self.backend) if name in ("numpy", "torch")]
        for library in libraries:
            seed = library.random.seed if library is np else library.manual_seed
            read = library.random.rand if library is np else library.rand
            seed(3)
            expected = read(4).tolist()
            seed(3)
            first = draws(self.make())
            assert read(4).tolist() == expected
            assert draws(self.make()) == first

    def test_refused(self):
        random = self.make()
        for call in (lambda: random.integers(0, 3), lambda: random.permutation(0)):
            with pytest.raises(ValueError, match="^there is no integer below 0 to draw; expected 1 or more"):
                call()
        with pytest.raises(ValueError, match="^there is no integer below -2 to draw"):
            random.integers(-2, 0)
        for call in (lambda: random.integers(3, -1), lambda: random.uniform(-1)):
            with pytest.raises(ValueError, match="^expected 0 draws or more, found -1$"):
                call()
        assert draws(random) == draws(self.make())

    @pytest.mark.parametrize("seed", [1.0, "1", [1]])
    def test_no_seed(self, seed):
        with pytest.raises(TypeError, match="^expected an integer or None as the seed, found "):
            self.make(seed)

    def test_negative_seed(self):
        with pytest.raises(ValueError, match="^expected a seed of 0 or more, found -1$"):
            self.make(-1)

    @pytest.mark.parametrize("high", [2, 7, 100])
    def test_integers_are_uniform(self, high):
        assert_uniform(np.bincount(to_numpy(self.make(1).integers(high, MANY)), minlength=high))

    def test_integers_of_many_draws_are_uniform(self):
        random = self.make(2)
        drawn = np.concatenate([to_numpy(random.integers(10, 32)) for _ in range(600)])
        assert_uniform(np.bincount(drawn, minlength=10))
        assert_uniform(np.bincount(drawn[1:] * 10 + drawn[:-1], minlength=100))

    def test_uniform_is_uniform(self):
        drawn = to_numpy(self.make(3).uniform(MANY))
        assert_uniform(np.bincount((drawn * 100).astype(int), minlength=100))
        assert_uniform(np.bincount((drawn * 10_000).astype(int) % 100, minlength=100))

    def test_permutations_are_uniform(self):
        random = self.make(4)
        orders = np.stack([to_numpy(random.permutation(4)) for _ in range(1200)])
        assert_uniform(np.bincount(orders @ [64, 16, 4, 1], minlength=256)[PERMUTATIONS])


PERMUTATIONS = [
    64 * a + 16 * b + 4 * c + d
    for a in range(4)
    for b in range(4)
    for c in range(4)
    for d in range(4)
    if len({a, b, c, d}) == 4
]


class TestNumpy(RandomContract):
    backend, device = "numpy", "cpu"


class TestTorch(RandomContract):
    backend, device = "torch", "cpu"

    def test_torch_s_defaults_do_not_matter(self):
        import torch

        expected = draws(self.make())
        with torch.device("meta"), torch.inference_mode():
            assert draws(self.make()) == expected


@pytest.mark.gpu
class TestTorchCuda(TestTorch):
    backend, device = "torch", "cuda:0"


class TestJax(RandomContract):
    backend, device = "jax", "cpu"
    integer, floating = "int32", "float32"

    def test_jax_s_own_choice_of_a_generator_does_not_matter(self):
        import jax

        expected = draws(self.make())
        with jax.default_prng_impl("rbg"):
            assert draws(self.make()) == expected

    def test_draws_where_jax_promotes_nothing(self):
        import jax

        expected = draws(self.make())
        jax.clear_caches()
        with jax.numpy_dtype_promotion("strict"):
            assert draws(self.make()) == expected

    @pytest.mark.parametrize("high", [1, 2, 1000, 65_537, 2**31 - 1, 2**31])
    def test_integers_are_scaled_from_64_bits(self, high):
        import jax

        random = self.make(5)
        _, own = jax.random.split(jax.random.wrap_key_data(random._key, impl="threefry2x32"))
        upper, lower = np.asarray(jax.random.bits(own, (2, 500), np.uint32)).tolist()
        expected = [(((one << 32) + other) * high) >> 64 for one, other in zip(upper, lower)]
        assert to_numpy(random.integers(high, 500)).tolist() == expected

    def test_more_integers_than_32_bits_count(self):
        with pytest.raises(
            ValueError, match=f"^expected at most {2**31} integers to draw from, found {2**31 + 1}; jax"
        ):
            self.make().integers(2**31 + 1, 3)

    def test_with_64_bits(self):
        jax = importlib.import_module("jax")
        narrow = draws(self.make())
        jax.config.update("jax_enable_x64", True)
        try:
            random = self.make()
            self.check(random.integers(3, 4), "int64", (4,))
            self.check(random.uniform(3), "float64", (3,))
            self.check(random.permutation(3), "int64", (3,))
            assert to_numpy(random.integers(2**40, 100)).max() >= 2**32
        finally:
            jax.config.update("jax_enable_x64", False)
        assert draws(self.make()) == narrow


@pytest.mark.gpu
class TestJaxCuda(TestJax):
    backend, device = "jax", "cuda:0"


class InBlocks(RandomContract):
    """What a buffer in main memory draws with, in NumPy."""

    def make(self, seed=0):
        return select_backend(self.backend, self.device).bookkeeping_random(seed)

    def check(self, array, dtype, shape):
        assert type(array) is np.ndarray
        assert array.flags.writeable
        assert (array.shape, array.dtype) == (shape, dtype)

    @pytest.mark.parametrize("used", [-1, 1 << 20, 1.0, "3", True, None])
    def test_a_number_of_draws_that_is_none(self, used):
        random = self.make()
        with pytest.raises(ValueError, match="^this is no state of a generator of "):
            random.restore({**random.state(), "used": used})
        assert draws(random) == draws(self.make())

    def test_more_than_a_block(self):
        random, other = self.make(), self.make()
        state = other.state()
        drawn = np.concatenate([other.uniform(count) for count in (1, 20_000, 16_383, 3)])
        assert random.uniform(36_387).tolist() == drawn.tolist()
        other.restore(state)
        assert other.integers(2**40, 40_000).max() >= 2**39

    def test_draws_with_all_bits_of_a_float(self):
        assert len(np.unique(self.make().uniform(40_000))) == 40_000


class TestTorchInBlocks(InBlocks):
    backend, device = "torch", "cpu"


class TestJaxInBlocks(InBlocks):
    backend, device = "jax", "cpu"


class TestDisk(TestNumpy):
    """Which draws as in memory, in NumPy at once."""

    @pytest.fixture(autouse=True)
    def _on_a_disk(self, tmp_path):
        self.device = f"disk:{tmp_path}"

    def make(self, seed=0):
        return select_backend(self.backend, self.device).bookkeeping_random(seed)

    def check(self, array, dtype, shape):
        assert type(array) is np.ndarray
        assert (array.shape, array.dtype) == (shape, dtype)

    def test_draws_as_in_memory(self):
        assert draws(self.make()) == draws(select_backend("numpy").random(0))


class TestStrict(RandomContract):
    backend, device = "array_api_strict", "cpu"

    def test_as_numpy_draws(self):
        assert draws(self.make()) == draws(select_backend("numpy").random(0))


class TestStrictDevice2(TestStrict):
    device = "device2"


class TestStrictWithout64Bits(RandomContract):
    backend, device = "array_api_strict", "no_x64"
    integer, floating = "int32", "float32"


@pytest.mark.gpu
class TestCupy(RandomContract):
    backend, device = "cupy", "cuda:0"

    def test_global_generators_are_neither_read_nor_moved(self):
        import cupy

        cupy.random.seed(3)
        expected = cupy.random.rand(4).tolist()
        cupy.random.seed(3)
        first = draws(self.make())
        assert cupy.random.rand(4).tolist() == expected
        assert draws(self.make()) == first


class TestCupyOnAStandIn(RandomContract):
    """On the second device, while the first is the current one."""

    backend, device = "cupy", "cuda:1"
    on_a_stand_in = True

    @pytest.fixture(autouse=True)
    def _installed(self, monkeypatch):
        with stand_in.installed(monkeypatch):
            yield

    def test_a_state_stays_small(self):
        random = self.make()
        for _ in range(1000):
            random.integers(1_000_000, 1)
        assert len(random.state()["drawn"]) <= 256


class TestABackendThatDrawsNothing:
    def test_numpy_draws_for_it(self, monkeypatch):
        backend = select_backend("numpy")
        monkeypatch.setattr(type(backend), "random", backends.Backend.random)
        assert draws(backend.random(0)) == draws(backends.base.HostRandom(backend, 0))
