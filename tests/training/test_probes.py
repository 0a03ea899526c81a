"""Looking into the model: what the tensor logger writes, where replicas part, and the tool that compares two runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from megatron.mpu.groups import build_groups, single_process
from megatron.mpu.topology import Topology
from megatron.training.probes import ReplicaCheck, ReplicasDifferError, TensorLog
from tests.parity import MODEL, TRAINING, curve, layout_of, train
from tests.support import run_ranks
from tools.compare_tensors import main

STEPS = 3
ALL = ("--log-model-inputs", "--log-fwd-activations", "--log-bwd-grads")


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2.0 * self.inner(x)


def test_tensor_log_writes_what_passes_in_the_wanted_iterations(tmp_path):
    model, x = _Model(), torch.ones(4, 3)
    log = TensorLog(frozenset({"model_inputs", "fwd_act", "bwd_grad"}), range(2, 3), tmp_path, rank=5)
    log.attach(model)
    for iteration in (1, 2, 3):
        log.begin(iteration)
        for _ in range(2):  # micro-batches
            model(x.clone().requires_grad_()).sum().backward()
        model.eval()(x)
        model.train()
    log.begin(4)
    assert [path.name for path in tmp_path.iterdir()] == ["tensor_logger_rank_5_iter_2.pt"]
    (kinds,) = torch.load(tmp_path / "tensor_logger_rank_5_iter_2.pt", weights_only=True).values()
    assert set(kinds) == {"model_inputs", "fwd_act", "bwd_grad_in", "bwd_grad_out"}
    inner = model.inner(x).detach()
    assert [len(kinds["fwd_act"][name]) for name in ("inner", "model")] == [2, 2]
    assert torch.equal(kinds["fwd_act"]["inner"][1], inner) and torch.equal(kinds["fwd_act"]["model"][0], 2 * inner)
    assert torch.equal(kinds["model_inputs"]["model"][0], x)
    assert torch.equal(kinds["bwd_grad_out"]["inner"][0], torch.full((4, 2), 2.0))
    assert torch.equal(kinds["bwd_grad_in"]["inner"][0], 2.0 * model.inner.weight.detach().sum(0).expand(4, 3))


def test_compare_tensors(tmp_path, capsys):
    tensors = {"fwd_act": {"a": [torch.ones(2)], "b": [torch.tensor([1.0, 4.0])]}}
    other = {"fwd_act": {"a": [torch.ones(2)], "b": [torch.tensor([1.0, 4.1])]}}
    for name, kinds in (("one", tensors), ("same", tensors), ("other", other)):
        (tmp_path / name).mkdir()
        torch.save({7: kinds}, tmp_path / name / "tensor_logger_rank_0_iter_7.pt")
    one, same, different = (str(tmp_path / name) for name in ("one", "same", "other"))
    assert main([one, same]) == 0
    assert main([one, different, "--threshold", "0.03"]) == 0
    assert main([one, different]) == 1
    assert "first: iteration 7 rank 0 fwd_act b[0]: absolute 1.000e-01 relative 2.500e-02" in capsys.readouterr().out
    assert main([one, str(tmp_path)]) == 2
    assert "has no files of the tensor logger" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_writes_tensors_and_two_engines_have_the_same(tmp_path, capsys):
    folders = []
    for engine in ((), ("--deepspeed", "--zero-stage", "1")):
        folder = tmp_path / str(len(folders))
        where = ("--tensor-logger-path", str(folder), "--tensor-logger-end-iter", "2")
        curve(layout_of("TP2"), (*engine, *ALL, *where), STEPS)
        folders.append(str(folder))
    names = sorted(path.name for path in Path(folders[0]).iterdir())
    assert names == [f"tensor_logger_rank_{rank}_iter_{n}.pt" for rank in (0, 1) for n in (1, 2)]
    kinds = torch.load(Path(folders[0]) / names[0], weights_only=True)[1]
    assert {"layers.0", "layers.1.attention", "layers.0.mlp_norm", "model"} <= set(kinds["fwd_act"])
    # The engines add up the same numbers in another order, and DeepSpeed's first backward is scaled otherwise.
    assert main([*folders, "--threshold", "1e30"]) == 0
    assert " of " in capsys.readouterr().out


def _drift(kinds: str) -> str:
    groups = build_groups(Topology(2, tp=2), "cpu")
    norm = nn.LayerNorm(4)
    with torch.no_grad():
        norm.weight[1] += 1e-6 * groups.tp.rank
    check = ReplicaCheck(frozenset({kinds}), range(1, 3), groups.tp)
    check.begin(1)
    hook = check._hook("layers.3.mlp_norm")
    x = torch.arange(8.0).view(2, 4)
    try:
        hook(norm, (x,), norm(x))
    except ReplicasDifferError as error:
        return str(error)
    return ""


def test_replicas_that_part_are_named_on_all_ranks():
    for kinds, what in (("wb", "layers.3.mlp_norm.weight"), ("io", "output of layers.3.mlp_norm")):
        first, second = run_ranks(2, _drift, kinds)
        assert first == second
        assert f"iteration 1: {what} differs between tensor-parallel ranks 0 and 1 by up to" in first


def test_one_rank_never_parts_from_itself():
    check = ReplicaCheck(frozenset({"io", "wb"}), range(1, 2), single_process().tp)
    check.begin(1)
    norm, x = nn.LayerNorm(4), torch.ones(2, 4)
    check._hook("n")(norm, (x,), norm(x))


@pytest.mark.slow
def test_replicas_of_a_run_agree_and_the_window_counts(tmp_path):
    expected = curve(layout_of("TP2"), (), STEPS)
    assert curve(layout_of("TP2"), ("--check-tp-norm",), STEPS) == expected
    assert curve(layout_of("TP2 SP"), ("--check-tp-norm", "--check-tp-norm-type", "wb"), STEPS).losses


def test_profiler_of_another_vendor_is_refused():
    argv = [*MODEL, *TRAINING, "--mock-data", "--train-iters", "1", "--profile", "hltv"]
    with pytest.raises(AssertionError, match="--profile hltv: cpu has no such profiler; use pt or pt-full"):
        run_ranks(1, train, argv, init=False)
