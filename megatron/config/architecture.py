"""The shape of a decoder-only transformer, and how many parameters it has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron.config.experts import Experts

Position = Literal["rope", "learned", "alibi", "none"]
Norm = Literal["layernorm", "rmsnorm"]
Activation = Literal["gelu", "gelu_tanh", "swiglu", "geglu", "squared_relu", "relu"]


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """LLaMA 3.1's rescaling of the rotary frequencies ("The Llama 3 Herd of Models", 2024).

    Wavelengths above `original_max_positions / low_freq_factor` are divided by `factor`, those below
    `original_max_positions / high_freq_factor` stay, and those between are interpolated.
    """

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder-only transformer, complete: every number is known."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_hidden_size: int
    vocab_size: int  # tokens the tokenizer can produce
    padded_vocab_size: int  # rows of the embedding
    max_positions: int
    position: Position = "rope"
    rope_theta: float = 10000.0
    rope_percent: float = 1.0
    rope_interleaved: bool = False
    rope_interpolation: float = 1.0  # positions are divided by it
    rope_scaling: RopeScaling | None = None
    norm: Norm = "rmsnorm"
    norm_epsilon: float = 1e-5
    norm_1p: bool = False
    activation: Activation = "swiglu"
    linear_bias: bool = False
    qkv_bias: bool = False  # adds a bias to query, key and value only
    embedding_norm: bool = False  # BLOOM
    tied_embeddings: bool = False
    qk_norm: bool = False
    residual_post_norm: bool = False
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    qk_layer_scaling: bool = False  # numerically equal, safer in float16
    softmax_in_fp32: bool = True
    sliding_window: int | None = None  # keys a query can see, itself included; None = all
    fp32_residual: bool = False
    init_method: Literal["normal", "xavier_uniform"] = "normal"
    init_std: float = 0.02
    embedding_init_std: float | None = None  # None = init_std
    experts: Experts | None = None  # in place of the feed-forward block of some layers

    def has_experts(self, layer: int) -> bool:
        """Whether a layer (numbers begin at 0) has experts in place of the feed-forward block."""
        return self.experts is not None and layer in self.experts.layers

    @property
    def expert_layers(self) -> int:
        """Number of layers with experts."""
        return 0 if self.experts is None else len(self.experts.layers)

    @property
    def gated(self) -> bool:
        """Whether the feed-forward block has a gate beside its up-projection."""
        return self.activation in ("swiglu", "geglu")

    def num_parameters(self, *, padded: bool = False, active: bool = False) -> int:
        """Number of parameters.

        Args:
            padded: with `padded_vocab_size` embedding rows, not `vocab_size`.
            active: without the experts that a token does not visit.
        """
        embedding = (self.padded_vocab_size if padded else self.vocab_size) * self.hidden_size
        total = embedding if self.tied_embeddings else 2 * embedding
        if self.position == "learned":
            total += self.max_positions * self.hidden_size
        if self.embedding_norm:
            total += self._norm_parameters()
        layer = self._attention_parameters() + 2 * self._norm_parameters()
        dense = (self.num_layers - self.expert_layers) * self._mlp_parameters(self.ffn_hidden_size)
        experts = self.expert_layers * self._expert_parameters(active=active)
        return total + self.num_layers * layer + dense + experts + self._norm_parameters()

    def _expert_parameters(self, *, active: bool) -> int:
        """Router, experts and shared block of a layer."""
        experts = self.experts
        if experts is None:
            return 0
        shared = self._mlp_parameters(experts.shared_ffn_hidden_size) if experts.shared_ffn_hidden_size else 0
        one = self._mlp_parameters(experts.ffn_hidden_size)
        return experts.count * self.hidden_size + (experts.topk if active else experts.count) * one + shared

    def _norm_parameters(self) -> int:
        return self.hidden_size * (2 if self.norm == "layernorm" else 1)

    def _attention_parameters(self) -> int:
        query = self.num_heads * self.head_dim
        qkv = query + 2 * self.num_kv_heads * self.head_dim
        total = qkv * self.hidden_size + query * self.hidden_size
        if self.linear_bias or self.qkv_bias:
            total += qkv
        if self.linear_bias:
            total += self.hidden_size
        if self.qk_norm:
            total += 2 * self.head_dim
        return total

    def _mlp_parameters(self, ffn_hidden_size: int) -> int:
        inner = ffn_hidden_size * (2 if self.gated else 1)
        total = inner * self.hidden_size + self.hidden_size * ffn_hidden_size
        if self.linear_bias:
            total += inner + self.hidden_size
        return total
