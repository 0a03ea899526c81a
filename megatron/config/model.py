"""Settings of the model: its sizes, and the maths of its parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron.config.schema import option, resolved


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network. Every number is known; `RunConfig.architecture` adds the vocabulary."""

    preset: str | None = option(None, "Published model whose architecture is the default of the settings below.")

    num_layers: int = resolved("Number of transformer layers.", minimum=1)
    hidden_size: int = resolved("Width of the hidden states, in elements.", minimum=1)
    ffn_hidden_size: int = resolved(
        "Inner width of the feed-forward block, in elements. Default: 4 times the hidden size; with a gate 2/3 of that "
        "rounded down to a multiple of 64.",
        minimum=1,
    )
    num_attention_heads: int = resolved("Number of query heads.", minimum=1)
    num_key_value_heads: int = resolved(
        "Number of key and value heads (grouped-query attention). Default: the number of query heads.",
        aliases=("--num-query-groups",),
        minimum=1,
    )
    kv_channels: int = resolved(
        "Width of one attention head, in elements. Default: hidden size / query heads.", minimum=1
    )
    max_position_embeddings: int = resolved(
        "Longest sequence the model is made for, in tokens. Default: the sequence length.", minimum=1
    )
    make_vocab_size_divisible_by: int = option(
        128,
        "The embedding gets unused rows until their number is a multiple of this number of rows times the "
        "tensor-parallel size.",
        minimum=1,
    )

    position_embedding_type: Literal["learned_absolute", "rope", "alibi", "none"] = resolved(
        "How positions enter the model. Default: learned_absolute.",
        synonyms={"absolute": "learned_absolute", "learned": "learned_absolute", "rotary": "rope"},
    )
    rope_theta: int = option(
        10000,
        "Base of the rotary wavelengths, in positions.",
        "--rotary-position-embeddings-theta",
        aliases=("--rotary-base", "--rope-theta"),
        minimum=1,
    )
    rotary_percent: float = option(1.0, "Fraction of each head that is rotated, 0 to 1.", minimum=0, maximum=1)
    rotary_interleaved: bool = option(False, "Rotate neighbouring pairs instead of the two halves of a head.")
    rotary_seq_len_interpolation_factor: int | None = option(
        None, "Positions are divided by this factor (position interpolation).", minimum=1
    )
    use_rope_scaling: bool = option(False, "Rescale the rotary frequencies as LLaMA 3.1 does.")
    rope_scaling_factor: float = option(8.0, "Factor of --use-rope-scaling.", minimum=1)

    normalization: Literal["layernorm", "rmsnorm"] = option("layernorm", "Kind of normalization, any case.")
    layernorm_epsilon: float = option(
        1e-5, "Number added to the variance in every normalization.", aliases=("--norm-epsilon",), minimum=0
    )
    apply_layernorm_1p: bool = option(False, "Store normalization weights as their difference from 1.")
    apply_residual_connection_post_layernorm: bool = option(
        False, "Take the residual after the normalization instead of before it."
    )
    qk_layernorm: bool = option(False, "Normalize queries and keys, per head.")
    embed_layernorm: bool = option(False, "Normalize the output of the embedding (BLOOM).")

    activation: Literal["gelu", "gelu_tanh", "swiglu", "geglu", "squared_relu", "relu"] = resolved(
        "Activation of the feed-forward block. Default: gelu_tanh where bias and GELU are fused as in Megatron, "
        "otherwise gelu."
    )

    add_bias_linear: bool = option(True, "No bias in the linear layers.", "--disable-bias-linear")
    add_qkv_bias: bool = option(False, "A bias for query, key and value even without biases elsewhere.")
    untie_embeddings_and_output_weights: bool = option(False, "An output layer of its own instead of the embedding.")

    window_size: int | None = option(
        None, "Sliding-window attention: number of keys, in tokens, that a query sees, itself included.", minimum=1
    )
    attention_dropout: float = option(0.1, "Dropout probability of attention weights, 0 to 1.", minimum=0, maximum=1)
    hidden_dropout: float = option(0.1, "Dropout probability of hidden states, 0 to 1.", minimum=0, maximum=1)
    apply_query_key_layer_scaling: bool = option(
        True,
        "Do not divide attention scores by the layer number before the softmax. Only float16 runs do that: it changes "
        "the range of the scores, not the result.",
        "--no-query-key-layer-scaling",
        opposites=("--apply-query-key-layer-scaling",),
    )
    fp32_residual_connection: bool = option(False, "Keep the residual stream in float32.")
    init_method_std: float = option(
        0.02, "Standard deviation of the initial weights, in units of the weights.", minimum=0
    )
    embedding_init_method_std: float | None = option(
        None,
        "Standard deviation of the initial embedding, in units of the weights. Default: --init-method-std.",
        minimum=0,
    )
    init_method_xavier_uniform: bool = option(False, "Draw initial weights from Xavier's uniform distribution.")
