"""What AWS Trainium runs, in order of preference per operation: torch's own operators, which the vendor compiles.

The native package offers no fused operators of its own under a published contract; its compiler fuses. Shapes are
static and nothing reads a value on the host, so that every step runs what the first one has compiled.
"""

from __future__ import annotations

from torch import Tensor

from megatron.ops import portable, reference
from megatron.ops.registry import Implementation, implements

_CHUNK_LOGITS = 2**26
"""A quarter GiB of float32 logits at a time: large enough to fill the core, small beside the logits themselves."""


@implements(reference.cross_entropy, name="chunked")
def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """See `portable.chunked_cross_entropy`."""
    return portable.chunked_cross_entropy(logits, labels, _CHUNK_LOGITS)


IMPLEMENTATIONS: tuple[Implementation, ...] = (
    portable.sdpa_attention,
    portable.embedding_float32_sums,
    portable.rms_norm,
    portable.layer_norm,
    portable.rotary,
    portable.swiglu,
    portable.geglu,
    portable.bias_gelu,
    cross_entropy,
    portable.adamw,
)
