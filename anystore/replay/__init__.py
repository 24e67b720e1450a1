"""Experience replay on a storage: what a training loop adds to and samples from, on any device."""

from anystore.replay.buffer import ReplayBuffer, Sample
from anystore.replay.feed import Batches, tf_dataset, torch_dataset
from anystore.replay.gymnasium import Recorder, transition_spec
from anystore.replay.samplers import Prioritized, Recent, Sampler, Uniform
from anystore.replay.stats import Stats, live_stats

__all__ = [
    "Batches",
    "Prioritized",
    "Recent",
    "Recorder",
    "ReplayBuffer",
    "Sample",
    "Sampler",
    "Stats",
    "Uniform",
    "live_stats",
    "tf_dataset",
    "torch_dataset",
    "transition_spec",
]
