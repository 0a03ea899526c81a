"""Experts against DeepSpeed: its ZeRO files of them are read, and it loads them from the universal form."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron.checkpoint.formats import ReadOptions, StoredModel, WriteOptions, convert, open_model
from megatron.checkpoint.formats.merge import to_dialect
from megatron.training.deepspeed import import_deepspeed
from tests.checkpoint.formats.samples import FAMILIES, random_model
from tests.checkpoint.formats.test_deepspeed_itself import OPTIONS, Node, Truth, _config, _state, _whole
from tests.support import run_ranks

pytestmark = pytest.mark.slow

EXPERTS, RANKS = 4, 2
_NUMBER = re.compile(r"(?<=deepspeed_experts\.)\d+")


class _Expert(nn.Module):
    """The linear layers of one, without computing anything."""

    def __init__(self) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(32, 96, bias=False)
        self.dense_4h_to_h = nn.Linear(48, 32, bias=False)


class _Model(nn.Module):
    """Megatron-DeepSpeed's parameters with DeepSpeed's MoE; the loss gives every one of them a gradient."""

    def __init__(self, tensors: dict[str, Tensor], expert_parallel: int) -> None:
        from deepspeed.moe.layer import MoE

        super().__init__()
        dense = {name: tensor for name, tensor in tensors.items() if "deepspeed_moe" not in name}
        self.language_model = Node({name.removeprefix("language_model."): tensor for name, tensor in dense.items()})
        for layer in self.language_model.encoder.layers.children():
            layer.add_module("mlp", MoE(32, _Expert(), num_experts=EXPERTS, ep_size=expert_parallel, k=2))

    def forward(self, x: Tensor) -> Tensor:
        return sum(((parameter.float() * x) ** 2).mean() for parameter in self.parameters())


class _Module(Node):
    """One module of a pipeline, with DeepSpeed's MoE if `tensors` are of a layer."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        from deepspeed.moe.layer import MoE

        super().__init__({name: tensor for name, tensor in tensors.items() if "deepspeed_moe" not in name})
        if "input_layernorm.weight" in tensors:
            self.add_module("mlp", MoE(32, _Expert(), num_experts=EXPERTS, k=2))


def _load_in_stages(folder: Path) -> None:
    """What a pipeline of two stages loads."""
    deepspeed = import_deepspeed()
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
    from deepspeed.pipe import LayerSpec, PipelineModule

    deepspeed.init_distributed("gloo", dist_init_required=False)
    modules: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _whole(random_model(FAMILIES["mixtral"]), "pipeline").items():
        number, _, inner = name.partition(".")
        modules.setdefault(int(number), {})[inner] = torch.zeros_like(tensor)
    specs = [lambda x: x, *(LayerSpec(_Module, tensors) for _, tensors in sorted(modules.items()))]
    module = PipelineModule(specs, num_stages=2, loss_fn=lambda outputs, _: outputs.sum(), partition_method="uniform")
    groups = split_params_into_different_moe_groups_for_optimizer(
        [{"params": list(module.parameters()), "name": "all"}]
    )
    engine = deepspeed.initialize(model=module, config=_config(1), model_parameters=groups)[0]
    engine.load_checkpoint(str(folder), load_module_only=True, load_lr_scheduler_states=False)
    loaded = {name: parameter.detach().clone() for name, parameter in engine.module.named_parameters()}
    torch.save(loaded, folder / f"loaded_{torch.distributed.get_rank()}.pt")


def _engine(stage: int, expert_parallel: int, **checkpoint: Any) -> Any:
    deepspeed = import_deepspeed()
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    deepspeed.init_distributed("gloo", dist_init_required=False)
    tensors = _whole(random_model(FAMILIES["mixtral"]), "megatron")
    model = _Model(tensors, expert_parallel)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[_global_name(name, torch.distributed.get_rank(), expert_parallel)])
    groups = split_params_into_different_moe_groups_for_optimizer([{"params": list(model.parameters()), "name": "all"}])
    return deepspeed.initialize(model=model, config=_config(stage, **checkpoint), model_parameters=groups)[0]


def _global_name(name: str, rank: int, expert_parallel: int) -> str:
    first = rank % expert_parallel * (EXPERTS // expert_parallel)
    return _NUMBER.sub(lambda match: str(int(match[0]) + first), name)


def _resume(folder: Path) -> None:
    engine = _engine(1, 1, load_universal=True)
    engine.load_checkpoint(str(folder), load_lr_scheduler_states=False)
    torch.save(_state(engine), folder / f"truth_{torch.distributed.get_rank()}.pt")


def _train(folder: Path) -> None:
    """Two steps with experts on different ranks, and a checkpoint."""
    engine = _engine(1, RANKS)
    rank = torch.distributed.get_rank()
    for _ in range(2):
        engine.backward(engine(torch.tensor(1.0 + rank)))
        engine.step()
    engine.save_checkpoint(str(folder), tag="global_step2", client_state={"iteration": 2})
    torch.save(_state(engine), folder / f"truth_{rank}.pt")


def _assert_holds(found: StoredModel, folder: Path, expert_parallel: int) -> None:
    for rank in range(RANKS):
        truth: Truth = torch.load(folder / f"truth_{rank}.pt")
        for entry, weights in {"fp32": found.weights, **found.moments}.items():
            tensors = to_dialect(found, "megatron", OPTIONS, weights).tensors
            for name, expected in truth[entry].items():
                tensor = tensors.read(_global_name(name, rank, expert_parallel))
                assert torch.equal(tensor[:83], expected[:83]), (rank, entry, name)  # tokens that exist; others have 96


def test_experts_in_zero_files(tmp_path: Path) -> None:
    run_ranks(RANKS, _train, tmp_path)
    found = open_model(tmp_path, "deepspeed", ReadOptions(arch=FAMILIES["mixtral"]))
    assert found.steps == 2 and found.moments.keys() == {"exp_avg", "exp_avg_sq"}
    _assert_holds(found, tmp_path, RANKS)


def test_deepspeed_resumes_experts_from_a_universal_checkpoint(tmp_path: Path) -> None:
    model = random_model(FAMILIES["mixtral"], torch.float32, moments=True)
    said: list[str] = []
    convert(model, "universal", tmp_path, WriteOptions(divisible_by=8, log=said.append))
    assert "expert-parallel size 1 only" in said[0]
    run_ranks(RANKS, _resume, tmp_path)
    _assert_holds(model, tmp_path, 1)


def test_a_pipeline_of_deepspeed_loads_experts(tmp_path: Path) -> None:
    model = random_model(FAMILIES["mixtral"])
    convert(model, "deepspeed", tmp_path, WriteOptions(pp=2, divisible_by=8))
    run_ranks(2, _load_in_stages, tmp_path)
    loaded = {n: t for stage in range(2) for n, t in torch.load(tmp_path / f"loaded_{stage}.pt").items()}
    expected = _whole(model, "pipeline")
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
