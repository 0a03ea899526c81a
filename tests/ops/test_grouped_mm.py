"""What torch's grouped product asks for beyond the common tests of implementations: shapes, refusals, no host reads."""

import pytest
import torch
from torch import Tensor

from megatron import accelerators
from megatron.ops import Implementation, UnavailableOpError, build_table, implementations

pytestmark = pytest.mark.skipif(not hasattr(torch.nn.functional, "grouped_mm"), reason="this torch has no grouped_mm")


def _candidate(device: str = "cpu") -> Implementation:
    known = implementations(accelerators.load(device), "grouped_matmul")
    return next(candidate for candidate in known if candidate.name == "grouped_mm")


def _arguments(rows: int, device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    x = torch.ones(rows, 16, device=device, dtype=dtype, requires_grad=True)
    return x, torch.ones(3, 24, 16, device=device, dtype=dtype, requires_grad=True)


def test_no_number_of_rows_comes_to_the_host():
    """Tensors without values have the shapes, forwards and backwards: nothing was read."""
    x, weight = _arguments(10, "meta")
    result = _candidate("cuda").function(x, weight, torch.ones(3, dtype=torch.int64, device="meta"))
    assert (result.shape, result.dtype) == ((10, 24), torch.bfloat16)
    grad_x, grad_weight = torch.autograd.grad(result.sum(), (x, weight))
    assert (grad_x.shape, grad_weight.shape) == (x.shape, weight.shape)
    assert grad_x.dtype == grad_weight.dtype == torch.bfloat16


@pytest.mark.parametrize("counts", [(4, 0, 6), (0, 0, 0)])
def test_groups_without_rows_have_gradients_of_zero(counts):
    x, weight = _arguments(sum(counts))
    result = _candidate().function(x, weight, torch.tensor(counts))
    grad_x, grad_weight = torch.autograd.grad(result.sum(), (x, weight))
    assert torch.equal(grad_x, torch.full_like(x, 24.0))
    assert [part.unique().tolist() for part in grad_weight] == [[float(count)] for count in counts]


def test_other_dtypes_and_widths_are_refused():
    counts = torch.tensor([1, 1, 1])
    with pytest.raises(ValueError, match=r"computes in bfloat16, not torch.float32: use --bf16"):
        _candidate().function(*_arguments(3, dtype=torch.float32), counts)
    x, weight = _arguments(3)
    with pytest.raises(ValueError, match=r"multiples of 8, not \[24, 12\]"):
        _candidate().function(x[:, :12], weight[..., :12], counts)


def test_it_is_chosen_on_request():
    device = accelerators.load("cpu")
    assert "op grouped_matmul   loop" in build_table(device, {})[1]
    assert "op grouped_matmul   grouped_mm (asked for)" in build_table(device, {"grouped_matmul": "grouped_mm"})[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpus_that_are_not_there_have_none():
    with pytest.raises(UnavailableOpError, match=r"from compute capability 8.0 on"):
        build_table(accelerators.load("cuda"), {"grouped_matmul": "grouped_mm"})
