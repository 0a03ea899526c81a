from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest
import torch

from megatron import accelerators
from megatron.ops import (
    OPERATIONS,
    Ops,
    UnavailableOpError,
    build_table,
    implementations,
    implements,
    reference,
    reference_ops,
)
from megatron.ops.document import document
from megatron.ops.registry import ON_REQUEST, Implementation, _best

CPU = accelerators.select("cpu")


def test_default_table_takes_the_first_of_each():
    _, lines = build_table(CPU, {})
    assert len(lines) == len(OPERATIONS)
    chosen = {line.split()[1]: line.split()[2] for line in lines}
    assert chosen == {op: "none" if op in ON_REQUEST else implementations(CPU, op)[0].name for op in OPERATIONS}
    assert "op attention        blocked" in lines


def test_operations_in_place_of_others_are_there_on_request():
    assert set(ON_REQUEST) == {field.name for field in fields(Ops) if field.default is None}
    ops, lines = build_table(CPU, {})
    assert ops.linear_cross_entropy is None
    assert "op linear_cross_entropy none (cross_entropy of all logits instead)" in lines
    ops, lines = build_table(CPU, {"linear_cross_entropy": "chunked"})
    assert ops.linear_cross_entropy is implementations(CPU, "linear_cross_entropy")[0].function
    assert "op linear_cross_entropy chunked (asked for)" in lines


def test_the_page_of_kernels_is_up_to_date():
    page = Path(__file__).parents[2] / "docs" / "kernels.md"
    assert page.read_text() == document(), "run: python -m megatron.ops.document > docs/kernels.md"


def test_asked_is_obeyed():
    ops, lines = build_table(CPU, {"attention": "sdpa", "rms_norm": "reference"})
    assert "op attention        sdpa (asked for)" in lines
    assert "op rms_norm         reference (asked for)" in lines
    assert ops.rms_norm is reference.rms_norm


def test_reference_is_always_there():
    for op in OPERATIONS:
        ops, _ = build_table(CPU, {op: "reference"})
        assert getattr(ops, op) is getattr(reference, op)
    assert all(getattr(reference_ops(), op) is getattr(reference, op) for op in OPERATIONS if op not in ON_REQUEST)


def test_unknown_implementation_is_refused_with_the_known_ones():
    with pytest.raises(UnavailableOpError) as refusal:
        build_table(CPU, {"attention": "fusion_attention"})
    message = str(refusal.value)
    assert "--op attention=fusion_attention" in message
    assert "Implementations of attention on cpu: blocked, sdpa, reference" in message


def test_implementation_of_another_device_is_refused_by_name_of_that_device():
    with pytest.raises(UnavailableOpError, match="flash_attn exists for cuda, not for cpu"):
        build_table(CPU, {"attention": "flash_attn"})


def test_unknown_operation_is_refused():
    with pytest.raises(UnavailableOpError, match=r"unknown operation\. Operations: embedding, rms_norm, "):
        build_table(CPU, {"softmax": "reference"})


def test_unavailable_implementation_is_refused_with_the_reason():
    from importlib.util import find_spec

    if find_spec("flash_attn") is not None:
        pytest.skip("flash-attn is installed here")
    with pytest.raises(UnavailableOpError, match="python package flash-attn is not installed"):
        build_table(accelerators.load("cuda"), {"attention": "flash_attn"})


def test_fallback_of_a_default_says_why():
    broken = Implementation(op="relu", name="fast", function=reference.relu, why_unavailable=lambda: "no such chip")
    plain = Implementation(op="relu", name="reference", function=reference.relu)
    assert _best([broken, plain]) == (plain, "fast unavailable: no such chip")


def test_tables_and_implementations_are_frozen():
    ops, _ = build_table(CPU, {})
    with pytest.raises(FrozenInstanceError):
        ops.relu = reference.relu  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        implementations(CPU, "attention")[0].name = "other"  # type: ignore[misc]
    assert tuple(entry.name for entry in fields(Ops)) == OPERATIONS


def test_implements_puts_the_checks_in_front():
    @implements(reference.relu, name="wrong on purpose")
    def never_called(x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the check must come first")

    assert never_called.op == "relu"
    with pytest.raises(ValueError, match="floating"):
        never_called.function(torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("device", accelerators.DEVICES)
def test_names_are_unique_and_tolerances_positive(device: str):
    for op in OPERATIONS:
        known = implementations(accelerators.load(device), op)
        names = [candidate.name for candidate in known]
        assert len(set(names)) == len(names)
        assert names[-1] == "reference"
        assert all(tolerance > 0 for candidate in known for tolerance in candidate.tolerance.values())
