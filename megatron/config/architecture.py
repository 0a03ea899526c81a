"""The shape of a decoder-only transformer, and how many parameters it has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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

    @property
    def gated(self) -> bool:
        """Whether the feed-forward block has a gate beside its up-projection."""
        return self.activation in ("swiglu", "geglu")

    def num_parameters(self, *, padded: bool = False) -> int:
        """Number of parameters with `vocab_size` embedding rows, or `padded_vocab_size` of them when `padded`."""
        embedding = (self.padded_vocab_size if padded else self.vocab_size) * self.hidden_size
        total = embedding if self.tied_embeddings else 2 * embedding
        if self.position == "learned":
            total += self.max_positions * self.hidden_size
        if self.embedding_norm:
            total += self._norm_parameters()
        return total + self.num_layers * self._layer_parameters() + self._norm_parameters()

    def _layer_parameters(self) -> int:
        return self._attention_parameters() + self._mlp_parameters() + 2 * self._norm_parameters()

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

    def _mlp_parameters(self) -> int:
        inner = self.ffn_hidden_size * (2 if self.gated else 1)
        total = inner * self.hidden_size + self.hidden_size * self.ffn_hidden_size
        if self.linear_bias:
            total += inner + self.hidden_size
        return total
