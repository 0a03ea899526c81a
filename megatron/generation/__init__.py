"""Text from a trained model."""

from megatron.generation.sampling import Sampling, choose
from megatron.generation.generate import generate

__all__ = ["Sampling", "choose", "generate"]
