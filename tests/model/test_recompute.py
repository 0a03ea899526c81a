"""How much is kept for the backward pass, counted tensor by tensor."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron.model.gpt import ModelInputs
from megatron.model.recompute import RecomputePlan, Span, kept_on_host
from megatron.mpu.groups import single_process
from tests.model.helpers import FAMILIES, build, loss_of, tokens_of

ARCH = FAMILIES["llama"]
TOKENS = tokens_of(ARCH)[0].numel()
HIDDEN = TOKENS * ARCH.hidden_size * 4
INNER = TOKENS * ARCH.ffn_hidden_size * 4
SCORES = 3 * ARCH.num_heads * 16 * 16 * 4
PLANS = {
    "none": RecomputePlan(),
    "selective": RecomputePlan(granularity="selective"),
    "mlp": RecomputePlan(granularity="mlp"),
    "full": RecomputePlan(granularity="full"),
    "full, two by two": RecomputePlan(granularity="full", num_layers=2),
    "full, the first": RecomputePlan(granularity="full", method="block"),
    "full, inputs on the host": RecomputePlan(granularity="full", host_inputs=True),
    "on the host": RecomputePlan(host_layers=9),
}


def _kept(plan: RecomputePlan, layers: int) -> int:
    """Bytes on the device that a forward pass keeps, parameters aside."""
    arch = replace(ARCH, num_layers=layers)
    model = build(arch, recompute=plan).train()
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    # What goes to the host is packed by the hooks of the model, which these do not see.
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model, arch, single_process(), ModelInputs())
    found = sum(storage.nbytes() for storage in kept.values())
    loss.backward()
    return found


@pytest.fixture(scope="module")
def of_two_layers() -> dict[str, int]:
    """Bytes that the third and fourth of four layers keep."""
    return {name: _kept(plan, 4) - _kept(plan, 2) for name, plan in PLANS.items()}


def test_whole_layers_keep_their_inputs(of_two_layers: dict[str, int]) -> None:
    assert of_two_layers["full"] == 2 * HIDDEN
    assert of_two_layers["full, two by two"] == HIDDEN
    assert of_two_layers["full, the first"] == of_two_layers["none"]


def test_parts_of_layers_are_not_kept(of_two_layers: dict[str, int]) -> None:
    """Gate, up and their product at least; scores and weights of attention at least."""
    none = of_two_layers["none"]
    assert none - of_two_layers["mlp"] >= 2 * 3 * INNER
    assert of_two_layers["mlp"] > 2 * (2 * HIDDEN + SCORES)
    assert none - of_two_layers["selective"] >= 2 * SCORES
    assert of_two_layers["selective"] > 2 * 3 * INNER


def test_what_is_on_the_host_is_not_on_the_device(of_two_layers: dict[str, int]) -> None:
    assert of_two_layers["full, inputs on the host"] == of_two_layers["on the host"] == 0


def test_weights_and_tables_stay_on_the_device() -> None:
    weight, table, activation = torch.nn.Parameter(torch.ones(4, 4)), torch.ones(4), torch.ones(2, 4)
    hooks = kept_on_host([weight], [table, None], pinned=False)
    for staying in (weight, weight.detach().t(), table[1:]):
        assert hooks.pack_hook(staying) is staying
    device, host = hooks.pack_hook(activation)
    assert (device, host.device.type) == (activation.device, "cpu")
    assert torch.equal(hooks.unpack_hook((device, host)), activation)


def test_spans_of_a_stage() -> None:
    listed = RecomputePlan(granularity="full", method="block", num_layers=(2, 0), host_inputs=True)
    assert listed.of_stage(0).spans(3) == [
        Span(range(1), True, True),
        Span(range(1, 2), True, True),
        Span(range(2, 3), False, False),
    ]
    assert [span.again for span in listed.of_stage(1).spans(2)] == [False, False]
    assert listed.layers_again((3, 2)) == 2
    uniform = RecomputePlan(granularity="full", num_layers=2)
    assert [list(span.layers) for span in uniform.spans(3)] == [[0, 1], [2]]
    assert uniform.layers_again((3, 2)) == 5
