"""SIMULATION of Gaudi's transformer engine: linear layers whose matrix products are of 8-bit numbers.

After the public interface and the vendor's public tests of it; the package behind it is not published. Scaling is
delayed: a forward pass casts with scales from the largest values that earlier ones have measured.
"""

from __future__ import annotations

from habana_frameworks.torch.hpex.experimental.transformer_engine import distributed, fp8, recipe
from habana_frameworks.torch.hpex.experimental.transformer_engine.fp8 import fp8_autocast
from habana_frameworks.torch.hpex.experimental.transformer_engine.linear import Linear

__all__ = ["Linear", "distributed", "fp8", "fp8_autocast", "recipe"]
