"""Text from a trained model."""

from megatron.generation.beams import BeamSearch, BeamSettings
from megatron.generation.generate import generate
from megatron.generation.reading import Reader
from megatron.generation.sampling import Sampling, SamplingError
from megatron.generation.search import Continuation, Ending, Sampled

__all__ = [
    "BeamSearch",
    "BeamSettings",
    "Continuation",
    "Ending",
    "Reader",
    "Sampled",
    "Sampling",
    "SamplingError",
    "generate",
]
