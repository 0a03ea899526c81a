"""Against DeepSpeed: what it writes is read, and it loads what is written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron.checkpoint.formats import ReadOptions, StoredModel, WriteOptions, convert, open_model
from megatron.checkpoint.formats.lazy import LazyTensors
from megatron.checkpoint.formats.merge import to_dialect
from megatron.checkpoint.formats.universal import universal_info
from megatron.training.deepspeed import import_deepspeed
from tests.checkpoint.formats.samples import FAMILIES, random_model
from tests.support import run_ranks

pytestmark = pytest.mark.slow

TOOLS = Path(__file__).resolve().parents[3] / "tools"
OPTIONS = WriteOptions(divisible_by=8)
ENTRIES = ("fp32", "exp_avg", "exp_avg_sq")
Truth = dict[str, dict[str, Tensor]]


class Node(nn.Module):
    """Parameters under any names; the loss gives every one of them a gradient."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        inner: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            first, _, rest = name.partition(".")
            if rest:
                inner.setdefault(first, {})[rest] = tensor
            else:
                self.register_parameter(name, nn.Parameter(tensor.float().clone()))
        for name, part in inner.items():
            self.add_module(name, Node(part))

    def forward(self, x: Tensor) -> Tensor:
        own = [((p.float() * x.float().mean()) ** 2).mean() for p in self.parameters(recurse=False)]
        return x + 0.01 * sum(own) + sum(child(x) - x for child in self.children())


def _whole(model: StoredModel, dialect: str) -> dict[str, Tensor]:
    tensors = to_dialect(model, dialect, OPTIONS).tensors
    return {name: tensors.read(name) for name in tensors.records}


def _config(stage: int, **checkpoint: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": True},
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "checkpoint": checkpoint,
    }


def _initialize(module: nn.Module, config: dict[str, Any]) -> Any:
    deepspeed = import_deepspeed()
    parameters = list(module.parameters())
    groups = [{"params": parameters[::2]}, {"params": parameters[1::2]}]
    return deepspeed.initialize(model=module, config=config, model_parameters=groups)[0]


def _state(engine: Any) -> Truth:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        # The accessors know the moments that were there when they were linked: none, before the first step.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    named = dict(engine.module.named_parameters())
    truth = {"fp32": {name: safe_get_full_fp32_param(p).detach().clone() for name, p in named.items()}}
    for entry in ENTRIES[1:]:
        truth[entry] = {name: safe_get_full_optimizer_state(p, entry).detach().clone() for name, p in named.items()}
    return truth


def _train(stage: int, folder: Path) -> None:
    """Two steps; what the parameters and moments are then goes to a file, as the checkpoint does."""
    model = random_model(FAMILIES["llama"])
    engine = _initialize(Node(_whole(model, "megatron")), _config(stage))
    for _ in range(2):
        engine.backward(engine(torch.tensor(1.0)))
        engine.step()
    info = universal_info(model, to_dialect(model, "megatron", OPTIONS), OPTIONS)
    state = {"iteration": 2, "universal_checkpoint_info": info}
    engine.save_checkpoint(str(folder), tag="global_step2", client_state=state)
    torch.save(_state(engine), folder / f"truth_{torch.distributed.get_rank()}.pt")


def _assert_holds(found: StoredModel, truth: Truth) -> None:
    assert found.steps == 2
    sources: dict[str, LazyTensors] = {"fp32": found.weights, **found.moments}
    assert sources.keys() == truth.keys()
    for entry, weights in sources.items():
        tensors = to_dialect(found, "megatron", OPTIONS, weights).tensors
        assert tensors.records.keys() == truth[entry].keys()
        for name, expected in truth[entry].items():
            assert torch.equal(tensors.read(name)[:83], expected[:83]), (entry, name)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_files_of_two_ranks(stage: int, tmp_path: Path) -> None:
    convert(random_model(FAMILIES["llama"]), "hf", tmp_path / "hf", WriteOptions())
    options = ReadOptions(config=tmp_path / "hf")
    run_ranks(2, _train, stage, tmp_path / "out")
    truth = torch.load(tmp_path / "out" / "truth_0.pt")
    assert truth["exp_avg"]["language_model.output_layer.weight"].any()
    _assert_holds(open_model(tmp_path / "out", "deepspeed", options), truth)
    if stage == 3:
        return
    weights = open_model(tmp_path / "out", "deepspeed", ReadOptions(config=tmp_path / "hf", optimizer=False)).weights
    name = "layers.3.mlp.up.weight"
    rows = truth["fp32"]["language_model.encoder.layers.3.mlp.dense_h_to_4h.weight"][48:]
    assert torch.equal(weights.read(name), rows.bfloat16())
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    folders = ["--input_folder", tmp_path / "out" / "global_step2", "--output_folder", tmp_path / "universal"]
    workers = ["--num_extract_workers", "1", "--num_merge_workers", "1", "--no_strict"]
    subprocess.run([*command, *folders, *workers], check=True, capture_output=True, env={**os.environ})
    _assert_holds(open_model(tmp_path / "universal", "universal", options), truth)
    if stage == 1:
        variables = {"HL_LATEST_CHECKPOINT": str(tmp_path / "out" / "global_step2"), "HL_UNIV_CP_EXTRACT_WORKERS": "2"}
        script = ["bash", TOOLS / "ckpt_convert" / "convert_ds_to_universal.sh", "--hf-config", tmp_path / "hf"]
        subprocess.run(script, check=True, env={**os.environ, **variables, "PYTHON": sys.executable})
        assert (tmp_path / "out" / "latest_universal").read_text() == "global_step2_universal"
        _assert_holds(open_model(tmp_path / "out", "universal", options), truth)


def _resume(folder: Path) -> int:
    model = random_model(FAMILIES["llama"])
    empty = {name: torch.zeros_like(tensor) for name, tensor in _whole(model, "megatron").items()}
    engine = _initialize(Node(empty), _config(1, load_universal=True))
    engine.load_checkpoint(str(folder), load_lr_scheduler_states=False)
    torch.save(_state(engine), folder / f"truth_{torch.distributed.get_rank()}.pt")
    return int(engine.global_steps)


def test_deepspeed_resumes_from_a_universal_checkpoint(tmp_path: Path) -> None:
    model = random_model(FAMILIES["llama"], torch.float32, moments=True)
    convert(model, "universal", tmp_path / "out", WriteOptions(dialect="megatron", divisible_by=8))
    assert run_ranks(2, _resume, tmp_path / "out") == [7, 7]
    truth = torch.load(tmp_path / "out" / "truth_0.pt")
    for entry, weights in {"fp32": model.weights, **model.moments}.items():
        tensors = to_dialect(model, "megatron", OPTIONS, weights).tensors
        for name in tensors.records:
            assert torch.equal(truth[entry][name], tensors.read(name)), (entry, name)


def _pipeline(source: Path, target: Path) -> None:
    """Two stages: load, compare, train a step, save."""
    deepspeed = import_deepspeed()
    from deepspeed.pipe import LayerSpec, PipelineModule

    deepspeed.init_distributed("gloo", dist_init_required=False)
    modules: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _whole(random_model(FAMILIES["llama"]), "pipeline").items():
        number, _, inner = name.partition(".")
        modules.setdefault(int(number), {})[inner] = torch.zeros_like(tensor)
    specs = [lambda x: x, *(LayerSpec(Node, tensors) for _, tensors in sorted(modules.items()))]
    module = PipelineModule(specs, num_stages=2, loss_fn=lambda outputs, _: outputs.sum(), partition_method="uniform")
    engine = _initialize(module, _config(1))
    engine.load_checkpoint(str(source), load_module_only=True, load_lr_scheduler_states=False)
    loaded = {name: p.detach().float().clone() for name, p in engine.module.named_parameters()}
    torch.save(loaded, source / f"truth_{torch.distributed.get_rank()}.pt")
    engine.train_batch(iter([(torch.ones(1), torch.ones(1))]))
    engine.save_checkpoint(str(target), tag="global_step1", client_state={"iteration": 1})


def test_a_pipeline_of_deepspeed_loads_and_saves(tmp_path: Path) -> None:
    model = random_model(FAMILIES["llama"])
    convert(model, "hf", tmp_path / "hf", WriteOptions())
    convert(model, "deepspeed", tmp_path / "out", WriteOptions(pp=2, divisible_by=8))
    run_ranks(2, _pipeline, tmp_path / "out", tmp_path / "saved")
    stages = [torch.load(tmp_path / "out" / f"truth_{stage}.pt") for stage in range(2)]
    expected = _whole(model, "pipeline")
    loaded = {name: tensor for stage in stages for name, tensor in stage.items()}
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor.float()), name
    found = open_model(tmp_path / "saved", None, ReadOptions(config=tmp_path / "hf"))
    assert (found.steps, found.iteration) == (1, 1)
    half = open_model(tmp_path / "saved", None, ReadOptions(config=tmp_path / "hf", optimizer=False))
    for name in found.weights.records:
        assert torch.equal(found.weights.read(name).bfloat16(), half.weights.read(name)), name
    assert not torch.equal(half.weights.read("head.weight"), model.weights.read("head.weight"))
