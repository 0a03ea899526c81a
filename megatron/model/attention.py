"""Self-attention, heads split over the tensor-parallel ranks, tokens over the context-parallel ranks.

Legend: s=sequence, b=micro-batch, h=hidden, n=query heads, g=kv heads, d=head dim, t=tensor-parallel ranks.
"""

from __future__ import annotations

from typing import TypedDict

from torch import Tensor, nn

from megatron.model.cache import KeyValueCache
from megatron.model.inputs import LayerInputs
from megatron.model.norm import Norm
from megatron.model.recompute import recomputed
from megatron.model.setting import Setting
from megatron.mpu.collectives import own_part
from megatron.mpu.layers import ColumnParallelLinear, RowParallelLinear, column_linears
from megatron.mpu.random import dropout_seed, seed_device
from megatron.mpu.ring_attention import ring_attention
from megatron.mpu.ulysses import gather_heads, scatter_heads


class _Rules(TypedDict):
    """Who sees whom, as `Ops.attention` takes it."""

    scale: float
    alibi_slopes: Tensor | None
    document_ids: Tensor | None
    window: int | None


class Attention(nn.Module):
    """Causal self-attention with grouped kv heads (n = g: multi-head, g = 1: multi-query).

    Args:
        layer: global layer number, from 0.
        setting: of the model.
    """

    def __init__(self, layer: int, setting: Setting) -> None:
        super().__init__()
        arch = setting.arch
        self._layer, self._setting = layer, setting
        query, key = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
        bias = arch.linear_bias or arch.qkv_bias
        self.query = ColumnParallelLinear(arch.hidden_size, query, bias=bias, **setting.linear())
        shared = setting.linear() | {"copies": setting.groups.kv_copies}
        self.key = ColumnParallelLinear(arch.hidden_size, key, bias=bias, **shared)
        self.value = ColumnParallelLinear(arch.hidden_size, key, bias=bias, **shared)
        # Each rank normalises its own heads only.
        self.query_norm = Norm(arch.head_dim, setting, bias=False, partial_grad=True) if arch.qk_norm else None
        self.key_norm = Norm(arch.head_dim, setting, bias=False, partial_grad=True) if arch.qk_norm else None
        self.output = RowParallelLinear(
            query, arch.hidden_size, bias=arch.linear_bias, ops=setting.ops, **setting.linear()
        )

    def forward(self, x: Tensor, inputs: LayerInputs) -> tuple[Tensor, Tensor | None]:
        """[s, b, h] (or [s/t, b, h]) -> the same, and the output bias [h] (or None), not yet added."""
        setting = self._setting
        projected = column_linears(x, (self.query, self.key, self.value))
        q, k, v = (y.unflatten(-1, (-1, setting.arch.head_dim)) for y in projected)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if inputs.cos is not None and inputs.sin is not None:
            interleaved = setting.arch.rope_interleaved
            q = setting.ops.rotary(q, inputs.cos, inputs.sin, interleaved)
            k = setting.ops.rotary(k, inputs.cos, inputs.sin, interleaved)
        if inputs.cache is not None:
            mixed = self._with_cache(q, k, v, inputs, inputs.cache)
        elif setting.recompute.granularity == "selective" and self.training:
            mixed = recomputed(self._core, q, k, v, inputs)
        else:
            mixed = self._core(q, k, v, inputs)
        return self.output(mixed.flatten(2))

    def _with_cache(self, q: Tensor, k: Tensor, v: Tensor, inputs: LayerInputs, cache: KeyValueCache) -> Tensor:
        """As `_core`, for texts that are written token by token."""
        if inputs.positions is None:
            cache.begin(self._layer, k, v)
            return self._core(q, k, v, inputs)
        arch = self._setting.arch
        keys, values = cache.extend(self._layer, k, v, inputs.positions)
        return self._setting.ops.cached_attention(
            q,
            keys,
            values,
            inputs.positions,
            scale=arch.head_dim**-0.5,
            alibi_slopes=inputs.alibi_slopes,
            window=arch.sliding_window,
        )

    def _core(self, q: Tensor, k: Tensor, v: Tensor, inputs: LayerInputs) -> Tensor:
        """Q [s, b, n/t, d], k and v [s, b, g/t, d] -> [s, b, n/t, d], where s are the tokens of this rank."""
        arch, groups = self._setting.arch, self._setting.groups
        scale = arch.head_dim**-0.5
        if arch.qk_layer_scaling:
            # Smaller products for float16, made up for inside the kernel, which computes scores in float32.
            q, scale = q / (self._layer + 1), scale * (self._layer + 1)
        slopes = inputs.alibi_slopes
        rules = _Rules(
            scale=scale,
            alibi_slopes=None if slopes is None else own_part(slopes, groups.ulysses),
            document_ids=inputs.document_ids,
            window=arch.sliding_window,
        )
        q, k, v = scatter_heads(q, k, v, groups.ulysses)
        if groups.ring.size > 1:
            mixed = ring_attention(q, k, v, group=groups.ring, ops=self._setting.ops, **rules)
        else:
            mixed = self._whole(q, k, v, inputs.dropout_seed, rules)
        return gather_heads(mixed, groups.ulysses)

    def _whole(self, q: Tensor, k: Tensor, v: Tensor, seed: int, rules: _Rules) -> Tensor:
        """Attention of all tokens, for some heads: q [s, b, n, d], k and v [s, b, g, d] -> [s, b, n, d]."""
        arch, groups = self._setting.arch, self._setting.groups
        dropout = arch.attention_dropout if self.training else 0.0
        if dropout > 0.0:
            seed_device(q.device, dropout_seed(seed, self._layer, "attention", groups, split=True))
        return self._setting.ops.attention(q, k, v, **rules, dropout_p=dropout)
