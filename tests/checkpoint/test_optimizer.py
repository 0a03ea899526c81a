"""Training that is saved and loaded continues exactly as if it had not been."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from megatron.checkpoint import TrainingState, load, optimizer_tensors, save
from tests.checkpoint.helpers import silent

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "adam-amsgrad": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
}


def model() -> nn.Module:
    torch.manual_seed(1)
    made = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2), nn.Linear(2, 2))
    made[3].requires_grad_(False)
    return made


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        loss = net(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def state_of(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    named = dict(net.named_parameters())
    return {f"model.{n}": p for n, p in named.items()} | optimizer_tensors(optimizer, named.items())


@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_continues_bit_for_bit(tmp_path: Path, kind: str, before: int) -> None:
    net = model()
    optimizer = OPTIMIZERS[kind](net.parameters())
    train(net, optimizer, range(before))
    save(tmp_path, 3, TrainingState(tensors=state_of(net, optimizer), progress={}, run={}), log=silent)
    losses = train(net, optimizer, range(before, 8))

    plain = model()
    assert train(plain, OPTIMIZERS[kind](plain.parameters()), range(8))[before:] == losses

    again = model()
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.fill_(7.0)
    optimizer = OPTIMIZERS[kind](again.parameters())
    load(tmp_path, into=state_of(again, optimizer), log=silent)
    assert train(again, optimizer, range(before, 8)) == losses


def test_names() -> None:
    net = model()
    optimizer = torch.optim.AdamW(net.parameters())
    names = set(optimizer_tensors(optimizer, net.named_parameters()))
    assert names == {
        f"optimizer.{entry}.{name}"
        for entry in ("exp_avg", "exp_avg_sq", "step")
        for name in ("0.weight", "0.bias", "2.weight", "2.bias")
    }


def test_looking_at_the_state_changes_nothing() -> None:
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.3, weight_decay=0.5)
    net(torch.ones(1, 4)).sum().backward()
    before = [(p.detach().clone(), None if p.grad is None else p.grad.clone()) for p in net.parameters()]
    tensors = optimizer_tensors(optimizer, net.named_parameters())
    assert all(not tensor.any() for tensor in tensors.values())
    assert optimizer.param_groups[0]["lr"] == 0.3
    for parameter, (value, gradient) in zip(net.parameters(), before, strict=True):
        assert torch.equal(parameter, value)
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(parameter.grad, gradient)


def test_a_parameter_without_a_name() -> None:
    net = model()
    optimizer = torch.optim.AdamW(net.parameters())
    with pytest.raises(ValueError, match=r"shape \(8,\), has no name"):
        optimizer_tensors(optimizer, [(n, p) for n, p in net.named_parameters() if n != "0.bias"])


def test_state_that_is_not_a_tensor() -> None:
    net = model()
    optimizer = torch.optim.LBFGS([p for p in net.parameters() if p.requires_grad])
    optimizer.state[net[0].weight]["history"] = [1, 2]
    for parameter in net.parameters():
        optimizer.state[parameter].setdefault("n", torch.zeros(()))
    with pytest.raises(ValueError, match=r"LBFGS keeps history of 0.weight as a list"):
        optimizer_tensors(optimizer, net.named_parameters())
