"""Experience replay on a storage: what a training loop adds to and samples from, on any device."""

from anystore.replay.buffer import ReplayBuffer, Sample
from anystore.replay.samplers import Prioritized, Recent, Sampler, Uniform

__all__ = ["Prioritized", "Recent", "ReplayBuffer", "Sample", "Sampler", "Uniform"]
