"""Operation counts against arithmetic by hand, published figures and torch's own counter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from megatron.config.architecture import Architecture
from megatron.training.flops import (
    ForwardFlops,
    TrainingFlops,
    attention_pairs,
    forward_flops,
    throughput,
    training_flops,
)

TINY = Architecture(
    num_layers=2,
    hidden_size=8,
    num_heads=4,
    num_kv_heads=2,
    head_dim=3,
    ffn_hidden_size=10,
    vocab_size=19,
    padded_vocab_size=20,
    max_positions=16,
)
SEQ = 5


def test_a_tiny_gated_model_with_grouped_queries_by_hand() -> None:
    # Query 8 x 12, key and value 8 x 6 each, output 12 x 8, gate, up and down 8 x 10 each.
    weights = 8 * 12 + 2 * 8 * 6 + 12 * 8 + 3 * 8 * 10
    assert weights == 528
    assert forward_flops(TINY, SEQ) == ForwardFlops(
        projections=2 * 5 * 2 * 528,
        attention=2 * 2 * 15 * 4 * 3 * 2,  # 2 layers, 2 products, 15 pairs, 4 heads of 3, multiply and add
        head=2 * 5 * 8 * 20,  # padded vocabulary
    )
    assert training_flops(TINY, SEQ).model == 3 * (10560 + 1440 + 1600)


def test_without_a_gate_the_feed_forward_has_two_weights() -> None:
    saved = forward_flops(TINY, SEQ).projections - forward_flops(replace(TINY, activation="gelu"), SEQ).projections
    assert saved == 2 * SEQ * 2 * 8 * 10


@pytest.mark.parametrize("window", [None, 1, 3, 5, 9])
def test_pairs_are_those_of_the_mask(window: int | None) -> None:
    position = torch.arange(SEQ)
    back = position[:, None] - position[None, :]
    visible = (back >= 0) & (back < (window or SEQ))
    assert attention_pairs(SEQ, window) == int(visible.sum())
    assert forward_flops(replace(TINY, sliding_window=window), SEQ).attention == 4 * int(visible.sum()) * 12 * 2


def llama(layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, vocab: int) -> Architecture:
    return Architecture(
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads,
        ffn_hidden_size=ffn,
        vocab_size=vocab,
        padded_vocab_size=vocab,
        max_positions=8192,
    )


@pytest.mark.parametrize(
    ("arch", "seq_length", "gflops_per_token"),
    [
        # 6 * (6,738,415,616 parameters - 131,072,000 embedding - 266,240 norm) + 6 * 32 * 4096 * 4096 (causal)
        (llama(32, 4096, 32, 32, 11008, 32000), 4096, 42.86),
        (llama(32, 4096, 32, 8, 14336, 128256), 4096, 48.25),
        (llama(32, 4096, 32, 8, 14336, 128256), 8192, 51.47),
        (llama(22, 2048, 32, 4, 5632, 32000), 2048, 6.76),
        (replace(llama(48, 1600, 25, 25, 6400, 50257), activation="gelu"), 1024, 9.80),
    ],
    ids=["llama-2-7b", "llama-3-8b", "llama-3-8b-8k", "tinyllama", "gpt2-xl"],
)
def test_published_models(arch: Architecture, seq_length: int, gflops_per_token: float) -> None:
    assert training_flops(arch, seq_length).model / seq_length / 1e9 == pytest.approx(gflops_per_token, abs=0.006)


class Layer(nn.Module):
    """A plain transformer layer without norms: only its products are counted."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.arch = arch
        h, d, f = arch.hidden_size, arch.head_dim, arch.ffn_hidden_size
        self.query = nn.Linear(h, arch.num_heads * d, bias=False)
        self.key = nn.Linear(h, arch.num_kv_heads * d, bias=False)
        self.value = nn.Linear(h, arch.num_kv_heads * d, bias=False)
        self.output = nn.Linear(arch.num_heads * d, h, bias=False)
        self.gate, self.up = nn.Linear(h, f, bias=False), nn.Linear(h, f, bias=False)
        self.down = nn.Linear(f, h, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.arch
        q = self.query(x).unflatten(-1, (a.num_heads, a.head_dim)).transpose(0, 1)
        k, v = (
            projection(x)
            .unflatten(-1, (a.num_kv_heads, a.head_dim))
            .repeat_interleave(a.num_heads // a.num_kv_heads, dim=1)
            .transpose(0, 1)
            for projection in (self.key, self.value)
        )
        attended = (q @ k.transpose(1, 2)).softmax(-1) @ v
        x = x + self.output(attended.transpose(0, 1).flatten(1))
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


@pytest.mark.parametrize(("recompute", "layers"), [("none", None), ("full", None), ("full", 1)])
def test_torch_counts_the_same(recompute: str, layers: int | None) -> None:
    """The plain model computes all s * s pairs; ours are the causal ones."""
    embedding, head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
    model = nn.ModuleList([Layer(TINY), Layer(TINY)])
    tokens = torch.arange(SEQ)
    # Without early stop: it leaves out the last product of a layer, for nothing needs its result.
    with FlopCounterMode(display=False) as counter, set_checkpoint_early_stop(False):
        x = embedding(tokens)
        for number, layer in enumerate(model):
            again = recompute == "full" and number < (2 if layers is None else layers)
            x = checkpoint(layer, x, use_reentrant=False) if again else layer(x)
        head(x).sum().backward()
    ours = training_flops(TINY, SEQ, recompute=recompute, recomputed_layers=layers)  # type: ignore[arg-type]
    causal = forward_flops(TINY, SEQ).attention
    full = causal * SEQ * SEQ // attention_pairs(SEQ)
    passes = 3 + ({None: 1.0, 1: 0.5}[layers] if recompute == "full" else 0)
    assert counter.get_total_flops() == ours.hardware + passes * (full - causal)


def test_recompute_is_counted_apart() -> None:
    forward = forward_flops(TINY, SEQ)
    model = 3 * forward.total
    assert training_flops(TINY, SEQ) == TrainingFlops(model, 0)
    assert training_flops(TINY, SEQ, recompute="selective") == TrainingFlops(model, forward.attention)
    full = training_flops(TINY, SEQ, recompute="full")
    assert full == TrainingFlops(model, forward.projections + forward.attention)  # not the head
    assert full.hardware == model + full.recompute
    one = training_flops(TINY, SEQ, recompute="full", recomputed_layers=1)
    assert one.recompute == full.recompute // 2
    with pytest.raises(ValueError, match="3 recomputed layers asked of a model with 2"):
        training_flops(TINY, SEQ, recompute="full", recomputed_layers=3)


def test_throughput_and_utilisation() -> None:
    """40 samples of 6 TFLOP (and 2 recomputed) in 10 s on 4 devices: 6 TFLOP/s each, of a peak of 24."""
    speed = throughput(TrainingFlops(6 * 10**12, 2 * 10**12), samples=40, seconds=10, devices=4, peak_flops=24e12)
    assert (speed.tflops, speed.mfu, speed.hfu) == pytest.approx((6.0, 0.25, 1 / 3))
    unknown = throughput(TrainingFlops(6, 0), samples=1, seconds=1, devices=1, peak_flops=None)
    assert (unknown.mfu, unknown.hfu) == (None, None)
