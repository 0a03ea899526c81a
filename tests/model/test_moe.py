"""Mixtures of experts: equal to Hugging Face's Mixtral, and to themselves however experts and tokens are spread."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from megatron.checkpoint.formats import ReadOptions, WriteOptions, convert, open_model
from megatron.config.architecture import Architecture
from megatron.config.experts import Experts
from megatron.model import hf
from megatron.model.gpt import GPT, ModelInputs, RecomputePlan
from megatron.model.hf_config import architecture_from_hf_config, hf_config
from megatron.model.inputs import Auxiliary
from megatron.model.routing import RoutingPlan
from megatron.model.weights import fill_parameters
from megatron.mpu.expert_parallel import with_experts
from megatron.mpu.groups import ProcessGroups, build_groups, single_process
from megatron.mpu.sharding import is_expert
from megatron.mpu.topology import Topology
from megatron.ops import reference_ops
from tests.model.helpers import FAMILIES, build, gradient_errors, loss_of, relative_error, tokens_of
from tests.model.test_hf import _LLAMA, GRADIENT_TOLERANCE, LOGITS_TOLERANCE, _random_model
from tests.support import run_ranks

MIXTRAL: dict[str, Any] = {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
# Sums in another order, in float64.
TOLERANCE = 1e-10
WORLD = 4
_EXPERTS = Experts(count=4, topk=2, ffn_hidden_size=40, layers=(0, 1))
ARCHITECTURES: dict[str, Architecture] = {
    "mixtral": replace(FAMILIES["llama"], experts=_EXPERTS),
    "gpt, shared block": replace(
        FAMILIES["gpt"], experts=replace(_EXPERTS, layers=(1,), shared_ffn_hidden_size=24, pre_softmax=True)
    ),
}
PLANS: dict[str, RoutingPlan] = {
    "dropless": RoutingPlan(balance_coeff=0.3, z_coeff=0.05),
    "sequences": RoutingPlan(balance_coeff=0.3, balancing="seq_aux_loss", sampled_second=True),
    "dropped": RoutingPlan(balance_coeff=0.3, train_capacity_factor=0.7),
    "padded": RoutingPlan(train_capacity_factor=0.7, drop_policy="position", pad=True),
    "bins": RoutingPlan(balance_coeff=0.3, bins=(16, 32, 48)),
}
LAYOUTS = ((1, 2, False), (2, 1, False), (2, 2, False), (2, 2, True), (4, 1, False))
"""Expert-parallel and tensor-parallel ranks of 4, and whether sequences are split."""


def _inputs(parts: int) -> ModelInputs:
    return ModelInputs(
        dropout_seed=5, auxiliary=Auxiliary(weight=1 / parts, totals=torch.zeros(4, dtype=torch.float64))
    )


def _totals(inputs: ModelInputs) -> Tensor:
    assert inputs.auxiliary is not None
    return inputs.auxiliary.totals


@pytest.mark.parametrize("layers", [1, 2])
def test_logits_gradients_and_losses_equal_hugging_face(layers: int) -> None:
    coefficient = 0.7
    theirs = _random_model("Mixtral", {**MIXTRAL, "num_hidden_layers": layers})
    arch = architecture_from_hf_config(theirs.config.to_dict(), padded_vocab_size=96)
    # Their loss counts every choice of a token as a share of 1, ours as one of 1 / topk.
    plan = RoutingPlan(balance_coeff=coefficient * 2)
    ours = GPT(arch, ops=reference_ops(), groups=single_process(), routing=plan).train()
    ours.load_state_dict(hf.from_hf(theirs.state_dict(), arch))
    tokens, _ = tokens_of(arch, length=40)
    output = theirs(input_ids=tokens, output_router_logits=True)
    inputs = ModelInputs(auxiliary=Auxiliary(weight=1.0, totals=torch.zeros(4)))
    logits = ours(tokens, inputs)[..., : arch.vocab_size].transpose(0, 1)
    balance = sum(load_balancing_loss_func((one,), 4, 2) for one in output.router_logits)
    if layers == 1:
        assert torch.equal(balance, output.aux_loss)
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(7))
    ((output.logits * weight).sum() + coefficient * balance).backward()
    (logits * weight).sum().backward()

    expected = hf.from_hf({name: p.grad for name, p in theirs.named_parameters()}, arch)
    errors = gradient_errors({name: p.grad for name, p in ours.named_parameters()}, expected)
    assert relative_error(logits, output.logits) < LOGITS_TOLERANCE
    assert max(errors.values()) < GRADIENT_TOLERANCE, errors
    assert 2 * _totals(inputs)[0].item() == pytest.approx(balance.item(), rel=LOGITS_TOLERANCE)


def test_configuration_and_weights_go_to_hugging_face_and_back() -> None:
    theirs = _random_model("Mixtral", MIXTRAL)
    arch = architecture_from_hf_config(theirs.config.to_dict())
    assert arch.experts == Experts(count=4, topk=2, ffn_hidden_size=48, layers=(0, 1))
    assert architecture_from_hf_config(hf_config(arch)) == arch
    logical = hf.from_hf(theirs.state_dict(), arch)  # experts together, as in memory
    files = hf.to_hf(logical, arch)  # one by one, as in files
    again = hf.from_hf(files, arch)
    assert files["model.layers.1.block_sparse_moe.experts.3.w2.weight"].shape == (32, 48)
    assert again.keys() == logical.keys()
    assert all(torch.equal(again[name], logical[name]) for name in logical)
    assert sum(tensor.numel() for tensor in logical.values()) == arch.num_parameters()


def test_files_of_transformers_over_native_to_transformers(tmp_path: Path) -> None:
    theirs = _random_model("Mixtral", MIXTRAL).eval()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    convert(open_model(tmp_path / "theirs", "hf", ReadOptions()), "native", tmp_path / "native", WriteOptions())
    native = open_model(tmp_path / "native", "native", ReadOptions())
    assert native.weights.records["layers.0.mlp.experts.gate.weight"].shape == (4, 48, 32)
    convert(native, "hf", tmp_path / "back", WriteOptions())
    back = type(theirs).from_pretrained(tmp_path / "back").state_dict()
    assert back.keys() == theirs.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in theirs.state_dict().items())


def test_what_mixtral_does_not_compute_is_refused() -> None:
    with pytest.raises(ValueError, match="MixtralForCausalLM cannot express experts="):
        hf_config(replace(ARCHITECTURES["mixtral"], experts=replace(_EXPERTS, shared_ffn_hidden_size=8)))
    with pytest.raises(ValueError, match="router_jitter_noise is"):
        architecture_from_hf_config(
            {**MIXTRAL, "model_type": "mixtral", "rms_norm_eps": 1e-5, "router_jitter_noise": 0.1}
        )


def _gradients(model: GPT, arch: Architecture, groups: ProcessGroups, seeds: range, parts: int) -> tuple[Any, Tensor]:
    """Loss of the batches with these seeds, as parts of a mean, and what the routers noted down."""
    inputs = _inputs(parts)
    losses = [loss_of(model, arch, groups, inputs, seed=seed) / parts for seed in seeds]
    for loss in losses:
        loss.backward()
    return sum(loss.item() for loss in losses), _totals(inputs)


def _summed(model: GPT, groups: ProcessGroups) -> dict[str, Tensor]:
    """Gradients of all data: of experts summed over the ranks that hold them, of the rest over all with one place."""
    same = groups.dp.handle
    if groups.experts is not None:
        assert groups.experts.mesh is not None
        same = groups.experts.mesh.get_group("edp_replicate")
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        group = same if is_expert(name) else groups.dp.handle
        if group is not None:
            dist.all_reduce(parameter.grad, group=group)
        found[name] = parameter.grad
    return found


def _compare(architecture: str, plan: str, ep: int, tp: int, split: bool) -> tuple[float, float, dict[str, float]]:
    """Differences from one process: of the loss, of the routers' figures, of each gradient."""
    topology = Topology(WORLD, tp=tp, ep=ep)
    groups = with_experts(build_groups(topology, "cpu"), "cpu", copies=None)
    arch, options = ARCHITECTURES[architecture], {"dtype": torch.float64, "routing": PLANS[plan]}
    model = build(arch, groups, sequence_parallel=split, **options).train()
    loss, totals = _gradients(model, arch, groups, range(groups.dp.rank, groups.dp.rank + 1), topology.dp)
    gradients = _summed(model, groups)
    figures = groups.sum_over_data(torch.cat((torch.tensor([loss], dtype=torch.float64), totals)))

    alone = build(arch, **options).train()
    true_loss, true_totals = _gradients(alone, arch, single_process(), range(topology.dp), topology.dp)
    truth = torch.cat((torch.tensor([true_loss], dtype=torch.float64), true_totals))
    expected: dict[str, Tensor] = {}

    def cut(name: str, _: tuple[int, ...], index: tuple[slice, ...]) -> Tensor:
        gradient = alone.get_parameter(name).grad
        assert gradient is not None
        expected[name] = gradient[index]
        return gradient[index]

    fill_parameters(model, groups, cut)
    errors = gradient_errors(gradients, expected)
    different = (figures - truth).abs() / truth.abs().clamp_min(1e-30)
    return different[0].item(), different[1:].max().item(), errors


def _compare_all(cases: list[tuple[Any, ...]]) -> list[tuple[float, float, dict[str, float]]]:
    return [_compare(*case) for case in cases]


@pytest.mark.slow
def test_every_layout_equals_one_process() -> None:
    """Capacities are those of a micro-batch of one data-parallel rank, which the one process has as well."""
    cases = [
        (architecture, plan, *layout)
        for architecture in ARCHITECTURES
        for plan in PLANS
        for layout in LAYOUTS
        if architecture == "mixtral" or plan == "dropless"
    ]
    for case, *ranks in zip(cases, *run_ranks(WORLD, _compare_all, cases, timeout=600.0), strict=True):
        for loss, figures, errors in ranks:
            assert max(loss, figures, *errors.values()) < TOLERANCE, (case, loss, figures, errors)


def test_recomputed_layers_note_their_losses_once() -> None:
    arch, results = ARCHITECTURES["mixtral"], []
    for recompute in (RecomputePlan(), RecomputePlan(granularity="full")):
        model = build(arch, routing=PLANS["dropless"], recompute=recompute).train()
        _, totals = _gradients(model, arch, single_process(), range(1), 1)
        results.append((totals, {name: p.grad for name, p in model.named_parameters()}))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(results[1][1][name], gradient) for name, gradient in results[0][1].items())


def test_bins_and_no_limit_are_the_same_numbers() -> None:
    arch = ARCHITECTURES["mixtral"]
    losses = []
    for plan in ("dropless", "bins"):
        model = build(arch, routing=PLANS[plan], dtype=torch.float64).train()
        losses.append(_gradients(model, arch, single_process(), range(1), 1)[0])
    assert losses[0] == pytest.approx(losses[1], rel=TOLERANCE)


def test_evaluation_has_its_own_capacity_and_no_losses() -> None:
    arch = ARCHITECTURES["mixtral"]
    plan = RoutingPlan(train_capacity_factor=0.5, eval_capacity_factor=None, balance_coeff=1.0)
    model, free = build(arch, routing=plan).eval(), build(arch).eval()
    inputs = _inputs(1)
    assert torch.equal(model(tokens_of(arch)[0], inputs), free(tokens_of(arch)[0], ModelInputs()))
    assert not _totals(inputs).any()
    assert not torch.equal(model.train()(tokens_of(arch)[0], inputs), free.train()(tokens_of(arch)[0], ModelInputs()))
