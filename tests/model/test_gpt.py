"""One-process properties of the model: recomputation, dropout, vocabulary padding, stages, refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron.accelerators import load
from megatron.config.architecture import Architecture
from megatron.model.gpt import GPT, ModelInputs, RecomputePlan
from megatron.model.weights import distribution
from megatron.mpu.groups import single_process
from megatron.ops import build_table, reference_ops
from tests.model.helpers import FAMILIES, build, loss_of, relative_error, tokens_of

GROUPS = single_process()
ROUNDING = 1e-6  # float32 sums in another order
PLANS = {
    "selective": RecomputePlan(granularity="selective"),
    "mlp": RecomputePlan(granularity="mlp"),
    "uniform-1": RecomputePlan(granularity="full"),
    "uniform-2": RecomputePlan(granularity="full", num_layers=2),
    "block-1": RecomputePlan(granularity="full", method="block"),
    "block-9": RecomputePlan(granularity="full", method="block", num_layers=9),
    "inputs-on-host": RecomputePlan(granularity="full", host_inputs=True),
    "two-on-host": RecomputePlan(host_layers=2),
}


def _dropout(family: str, attention: float = 0.2) -> Architecture:
    return replace(FAMILIES[family], num_layers=3, attention_dropout=attention, hidden_dropout=0.3)


def _step(model: GPT, arch: Architecture, seed: int = 5) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = loss_of(model, arch, GROUPS, ModelInputs(dropout_seed=seed))
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("family", "attention_dropout"), [("llama", 0.2), ("bloom", 0.0)])
def test_recomputation_changes_no_bit_with_dropout(family: str, attention_dropout: float, plan: str) -> None:
    arch = _dropout(family, attention_dropout)
    loss, gradients = _step(build(arch).train(), arch)
    torch.manual_seed(99)  # whatever state the generator is left in
    again, recomputed = _step(build(arch, recompute=PLANS[plan]).train(), arch)
    assert torch.equal(again, loss)
    for name, gradient in gradients.items():
        assert torch.equal(recomputed[name], gradient), name


@pytest.mark.parametrize("family", ["llama", "gpt"])
def test_losses_without_logits_equal_those_of_logits(family: str) -> None:
    """A head of its own, and the embedding as head; both have rows that only pad the vocabulary."""
    arch, found = FAMILIES[family], []
    tokens, labels = tokens_of(arch)
    chunked, _ = build_table(load("cpu"), {"linear_cross_entropy": "chunked"})
    for ops in (reference_ops(), replace(reference_ops(), linear_cross_entropy=chunked.linear_cross_entropy)):
        model = build(arch, ops=ops, dtype=torch.float64)
        losses = model(tokens, ModelInputs(labels=labels))
        if losses.dim() == 3:
            losses = ops.cross_entropy(losses[..., : arch.vocab_size], labels.t())
        (losses * torch.linspace(0, 1, losses.numel()).view_as(losses)).sum().backward()
        found.append({"losses": losses.detach()} | {name: p.grad for name, p in model.named_parameters()})
        assert model(tokens, ModelInputs()).shape[-1] == arch.padded_vocab_size, "without labels logits are wanted"
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize(("plan", "runs"), [("uniform-1", 6), ("uniform-2", 6), ("block-1", 4), ("block-9", 6)])
def test_the_planned_layers_run_twice(plan: str, runs: int) -> None:
    """Three layers: each runs once forward, the recomputed ones once more in backward."""
    arch = replace(FAMILIES["llama"], num_layers=3)
    model = build(arch, recompute=PLANS[plan]).train()
    count = []
    for block in model.layers.values():
        block.attention.register_forward_pre_hook(lambda *_: count.append(1))
    _step(model, arch)
    assert len(count) == runs


def test_selective_recomputation_repeats_only_the_attention_core() -> None:
    arch, calls = FAMILIES["llama"], []

    def attention(*args: object, **options: object) -> Tensor:
        calls.append(1)
        return reference_ops().attention(*args, **options)

    ops = replace(reference_ops(), attention=attention)
    model = GPT(arch, ops=ops, groups=GROUPS, recompute=PLANS["selective"]).train()
    model.load_state_dict(build(arch).state_dict())
    _step(model, arch)
    assert len(calls) == 2 * arch.num_layers


def test_dropout_depends_on_the_seed_alone() -> None:
    arch = _dropout("gpt")
    model = build(arch).train()
    first, again, other = (_step(model, arch, seed)[0] for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    model.eval()
    assert torch.equal(_step(model, arch, 5)[0], _step(model, arch, 6)[0])


def test_layers_and_sites_drop_different_elements() -> None:
    arch, seeds = _dropout("llama"), []
    ops = reference_ops()

    def bias_dropout_add(x: Tensor, bias: Tensor | None, residual: Tensor, p: float, training: bool) -> Tensor:
        kept = ops.bias_dropout_add(torch.ones_like(x), None, torch.zeros_like(x), p, training) != 0
        seeds.append(kept)
        return ops.bias_dropout_add(x, bias, residual, p, training)

    model = GPT(arch, ops=replace(ops, bias_dropout_add=bias_dropout_add), groups=GROUPS).train()
    model.load_state_dict(build(arch).state_dict())
    _step(model, arch)
    masks = torch.stack(seeds).flatten(1)
    assert len(masks.unique(dim=0)) == 2 * arch.num_layers
    assert masks.float().mean().item() == pytest.approx(0.7, abs=0.02)


def test_without_dropout_the_generator_is_left_alone() -> None:
    arch = FAMILIES["llama"]
    model = build(arch).train()
    before = torch.get_rng_state()
    _step(model, arch)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_the_vocabulary_changes_nothing(family: str) -> None:
    narrow, wide = replace(FAMILIES[family], padded_vocab_size=83), replace(FAMILIES[family], padded_vocab_size=128)
    loss, gradients = _step(build(narrow).train(), narrow)
    padded_loss, padded_gradients = _step(build(wide).train(), wide)
    assert padded_loss.item() == pytest.approx(loss.item(), rel=ROUNDING)
    for name, gradient in padded_gradients.items():
        rows = gradients[name].shape[0]
        assert relative_error(gradient[:rows], gradients[name]) < 10 * ROUNDING, name
        assert not gradient[rows:].any(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_stages_compute_what_the_whole_model_computes(family: str) -> None:
    arch = FAMILIES[family]
    tokens, _ = tokens_of(arch)
    whole = build(arch)
    stages = [build(arch, layers=range(1), last=False), build(arch, layers=range(1, 2), first=False)]
    assert {name for stage in stages for name, _ in stage.named_parameters()} == dict(whole.named_parameters()).keys()
    hidden = tokens
    for stage in stages:
        hidden = stage(hidden, ModelInputs())
    assert torch.equal(hidden, whole(tokens, ModelInputs()))


def test_qk_layer_scaling_is_numerically_neutral() -> None:
    arch = replace(FAMILIES["llama"], num_layers=3)
    tokens, _ = tokens_of(arch)
    plain, scaled = (build(replace(arch, qk_layer_scaling=on))(tokens, ModelInputs()) for on in (False, True))
    assert relative_error(scaled, plain) < 10 * ROUNDING


def test_float32_residuals_stay_float32_between_bfloat16_layers() -> None:
    arch = replace(FAMILIES["llama"], fp32_residual=True)
    model = build(arch, dtype=torch.bfloat16)
    seen = []
    for block in model.layers.values():
        block.register_forward_hook(lambda module, args, output: seen.append((output.dtype, args[0].dtype)))
        block.mlp.register_forward_hook(lambda module, args, output: seen.append((args[0].dtype, output[0].dtype)))
    logits = model(tokens_of(arch)[0], ModelInputs())
    assert logits.dtype == torch.bfloat16
    assert set(seen[1::2]) == {(torch.float32, torch.float32)}
    assert set(seen[0::2]) == {(torch.bfloat16, torch.bfloat16)}


def test_positions_beyond_the_learned_table_are_refused() -> None:
    arch = replace(FAMILIES["gpt"], max_positions=8)
    with pytest.raises(ValueError, match=r"sequence of 16 tokens.*--max-position-embeddings"):
        build(arch)(tokens_of(arch)[0], ModelInputs())


@pytest.mark.parametrize("family", FAMILIES)
def test_parameter_count_is_the_architectures(family: str) -> None:
    arch = FAMILIES[family]
    model = GPT(arch, ops=reference_ops(), groups=GROUPS, device=torch.device("meta"))
    assert sum(p.numel() for p in model.parameters()) == arch.num_parameters(padded=True)


def test_initial_distributions_follow_megatron() -> None:
    arch = replace(FAMILIES["gpt"], num_layers=8, init_std=0.01, embedding_init_std=0.05)
    scales = {
        "embedding.word.weight": 0.05,
        "layers.0.attention.query.weight": 0.01,
        "layers.0.attention.output.weight": 0.01 / 4,
        "layers.0.mlp.down.weight": 0.01 / 4,
        "layers.0.attention_norm.weight": 1.0,
        "layers.0.attention.query.bias": 0.0,
    }
    for name, scale in scales.items():
        assert distribution(name, (32, 32), arch).scale == pytest.approx(scale), name
    assert distribution("final_norm.weight", (32,), replace(arch, norm_1p=True)).scale == 0.0
    xavier = replace(arch, init_method="xavier_uniform", embedding_init_std=None)
    assert distribution("layers.0.mlp.down.weight", (20, 10), xavier).scale == pytest.approx((6 / 30) ** 0.5)
    # The real vocabulary counts, not its padding.
    assert distribution("head.weight", (96, 32), xavier).scale == pytest.approx((6 / (83 + 32)) ** 0.5)
