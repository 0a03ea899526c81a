"""Text from a trained model."""

from megatron.generation.generate import generate
from megatron.generation.sampling import Sampling, choose

__all__ = ["Sampling", "choose", "generate"]
