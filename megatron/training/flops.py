"""How many floating-point operations training needs, and what share of the device's peak that is.

Counted are the matrix products, as the model needs them mathematically: projections, feed-forward, output head over the
padded vocabulary, and the two products inside attention over the (query, key) pairs that the causal mask and the
sliding window leave: exactly `s (s + 1) / 2` of them without a window. A multiply-add is 2 operations; the backward
pass is twice the forward pass. Not counted: embedding look-ups, norms, activations, rotary embedding, softmax, the
optimizer. Masks between documents are not counted as savings, for they depend on the data.

What is computed again in the backward pass (`--recompute-granularity`) is counted apart: it costs time but trains
nothing. So MFU (model FLOPs utilisation, arXiv:2204.02311) compares runs, and HFU (hardware FLOPs) shows how busy the
device was.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.architecture import Architecture
from megatron.model.recompute import Granularity


@dataclass(frozen=True, kw_only=True)
class ForwardFlops:
    """Forward pass of one sample (one sequence).

    Attributes:
        projections: products with the weights of all layers.
        attention: query times key and weights times value, of all layers.
        head: hidden states times the output embedding.
    """

    projections: int
    attention: int
    head: int

    @property
    def total(self) -> int:
        """Everything."""
        return self.projections + self.attention + self.head


@dataclass(frozen=True)
class TrainingFlops:
    """Forward and backward of one sample.

    Attributes:
        model: what the mathematics needs: three times the forward pass.
        recompute: what is computed a second time to save memory.
    """

    model: int
    recompute: int

    def times(self, samples: int) -> TrainingFlops:
        """Of so many samples."""
        return TrainingFlops(self.model * samples, self.recompute * samples)

    def __add__(self, other: TrainingFlops) -> TrainingFlops:
        return TrainingFlops(self.model + other.model, self.recompute + other.recompute)

    @property
    def hardware(self) -> int:
        """What the device computes."""
        return self.model + self.recompute


def attention_pairs(seq_length: int, window: int | None = None) -> int:
    """Number of (query, key) pairs of a causal sequence; a query sees the last `window` keys, itself included."""
    if window is None or window >= seq_length:
        return seq_length * (seq_length + 1) // 2
    return window * (window + 1) // 2 + (seq_length - window) * window


def forward_flops(arch: Architecture, seq_length: int) -> ForwardFlops:
    """Operations of the forward pass of one sequence of `seq_length` tokens.

    Keys and values have `num_kv_heads` heads, so grouped-query attention saves in the projections but not in the
    products inside attention, where every query head works. Of experts those are counted that a token visits.
    """
    query = arch.num_heads * arch.head_dim
    key_and_value = 2 * arch.num_kv_heads * arch.head_dim
    qkv = arch.hidden_size * (query + key_and_value)
    output = query * arch.hidden_size
    weights = arch.num_layers * (qkv + output) + _feed_forward_weights(arch)
    return ForwardFlops(
        projections=2 * seq_length * weights,
        attention=2 * 2 * query * attention_pairs(seq_length, arch.sliding_window) * arch.num_layers,
        head=2 * seq_length * arch.hidden_size * arch.padded_vocab_size,
    )


def _feed_forward_weights(arch: Architecture, *, again: bool = False) -> int:
    """Weights that a token is multiplied with in the feed-forward blocks of all layers, routers included.

    Args:
        arch: the model.
        again: when the blocks are computed again, which leaves out the last product, but for experts.
    """
    per_feature = (3 if arch.gated else 2) * arch.hidden_size
    per_dense = per_feature - (arch.hidden_size if again else 0)
    dense = (arch.num_layers - arch.expert_layers) * per_dense * arch.ffn_hidden_size
    if arch.experts is None:
        return dense
    experts = arch.experts
    visited = per_feature * experts.topk * experts.ffn_hidden_size + per_dense * experts.shared_ffn_hidden_size
    return dense + arch.expert_layers * (arch.hidden_size * experts.count + visited)


def training_flops(
    arch: Architecture, seq_length: int, *, recompute: Granularity = "none", recomputed_layers: int | None = None
) -> TrainingFlops:
    """Operations of forward and backward of one sequence of `seq_length` tokens.

    Args:
        arch: the model.
        seq_length: tokens of a sample.
        recompute: `selective` computes the inside of attention again; `mlp` the products before the activation, of
            experts all that a token visits;
            `full` whole layers (counted whole, though an implementation may stop before a layer's last product).
        recomputed_layers: how many layers that concerns, summed over pipeline stages; None is all of them.

    Raises:
        ValueError: more layers than the model has.
    """
    layers = arch.num_layers if recomputed_layers is None else recomputed_layers
    if not 0 <= layers <= arch.num_layers:
        raise ValueError(f"{layers} recomputed layers asked of a model with {arch.num_layers}")
    forward = forward_flops(arch, seq_length)
    per_layer = {
        "none": 0,
        "selective": forward.attention // arch.num_layers,
        "mlp": 2 * seq_length * _feed_forward_weights(arch, again=True) // arch.num_layers,
        "full": (forward.projections + forward.attention) // arch.num_layers,
    }
    return TrainingFlops(model=3 * forward.total, recompute=per_layer[recompute] * layers)


@dataclass(frozen=True)
class Throughput:
    """Speed of one device.

    Attributes:
        tflops: 10^12 model operations per second and device.
        mfu: share of the device's peak that the model's operations are; None where the peak is unknown.
        hfu: the same with recomputed operations.
    """

    tflops: float
    mfu: float | None
    hfu: float | None


def throughput(
    flops: TrainingFlops, *, samples: float, seconds: float, devices: int, peak_flops: float | None
) -> Throughput:
    """Speed of `devices` devices that together trained on `samples` samples in `seconds` seconds.

    Args:
        flops: operations per sample.
        samples: samples in that time, all data-parallel ranks together.
        seconds: the time.
        devices: all devices, model-parallel ones included.
        peak_flops: dense peak of one device in FLOP/s for the dtype in use; None if unknown.
    """
    device_samples_per_second = samples / seconds / devices
    return Throughput(
        tflops=flops.model * device_samples_per_second / 1e12,
        mfu=None if peak_flops is None else flops.model * device_samples_per_second / peak_flops,
        hfu=None if peak_flops is None else flops.hardware * device_samples_per_second / peak_flops,
    )
