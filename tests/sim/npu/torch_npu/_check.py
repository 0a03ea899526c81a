"""Argument rules of the operators, from torch_npu's documentation. The real kernels do not check all of them."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
COMPRESSED = 2048


class WrongCallError(ValueError):
    """A call that the vendor's documentation does not allow."""


def require(truth: bool, message: str) -> None:
    """Raise WrongCallError unless `truth`."""
    if not truth:
        raise WrongCallError(message)


def floats(**tensors: Tensor | None) -> None:
    """All given tensors have one and the same of the supported dtypes."""
    given = {name: tensor.dtype for name, tensor in tensors.items() if tensor is not None}
    require(len(set(given.values())) == 1, f"dtypes must agree: {given}")
    require(next(iter(given.values())) in FLOATS, f"unsupported dtype: {given}")


def rms_norm(x: Tensor, gamma: Tensor, epsilon: float) -> None:
    """2 to 8 dimensions; gamma has x's dtype and the shape of x's last dimensions."""
    floats(input=x, gamma=gamma)
    require(2 <= x.dim() <= 8, f"input must have 2 to 8 dimensions, not {x.dim()}")
    require(gamma.shape == x.shape[-gamma.dim() :], f"gamma {tuple(gamma.shape)} does not end input {tuple(x.shape)}")
    require(epsilon > 0, f"epsilon {epsilon}")


def rotary(x: Tensor, r1: Tensor, r2: Tensor, mode: str) -> None:
    """Layouts BNSD, BSND and SBND; what r1 and r2 may look like depends on layout and mode."""
    floats(input=x, r1=r1, r2=r2)
    require(mode in ("half", "interleave"), f"rotary_mode {mode!r}")
    require(x.dim() == 4 and r1.dim() == 4 and r1.shape == r2.shape, "input, r1 and r2 must have 4 dimensions")
    d = x.shape[3]
    require(r1.shape[3] == d and d % 2 == 0 and d < 896, f"D must be even, below 896 and that of r1, not {d}")
    fitting = [layout for layout in ("BNSD", "BSND", "SBND") if _layout_fits(layout, x, r1, mode)]
    require(bool(fitting), f"r1 {tuple(r1.shape)} fits no layout of input {tuple(x.shape)} in mode {mode}")


def _layout_fits(layout: str, x: Tensor, r1: Tensor, mode: str) -> bool:
    length = dict(zip(layout, x.shape, strict=True))
    b, n = length["B"], length["N"]
    allowed = ("SD", "BSD", "BNSD") if mode == "half" else ("SD",)
    if (mode == "half" and max(b, n) >= 1000) or (mode == "interleave" and b * n >= 1000):
        return False
    return any(tuple(r1.shape) == tuple(length[axis] if axis in axes else 1 for axis in layout) for axes in allowed)


def swiglu(x: Tensor, dim: int) -> None:
    """1 to 8 dimensions, an even number of channels along `dim`."""
    floats(input=x)
    require(1 <= x.dim() <= 8, f"input must have 1 to 8 dimensions, not {x.dim()}")
    require(x.shape[dim] % 2 == 0, f"dimension {dim} must be even, not {x.shape[dim]}")


def matmul_all_reduce(x1: Tensor, x2: Tensor, ranks: int) -> None:
    """x1 [m, k] or [b, s, k] as it lies in memory, x2 [k, n] or a transposed view, of 16 bits; 1, 2, 4 or 8 ranks."""
    floats(x1=x1, x2=x2)
    require(x1.dtype != torch.float32, "x1 must be float16 or bfloat16")
    require(x1.dim() in (2, 3) and x2.dim() == 2, f"x1 {tuple(x1.shape)} has 2 or 3 dimensions, x2 {tuple(x2.shape)} 2")
    require(x1.shape[-1] == x2.shape[0], f"x1 {tuple(x1.shape)} and x2 {tuple(x2.shape)} do not multiply")
    require(x1.is_contiguous(), "x1 must not be transposed")
    require(x2.is_contiguous() or x2.t().is_contiguous(), "x2 must be contiguous or transposed")
    require(x1.numel() > 0 and x2.numel() > 0, "neither may be empty")
    require(ranks in (1, 2, 4, 8), f"{ranks} ranks (1, 2, 4 or 8)")


def scaled_masked_softmax(x: Tensor, mask: Tensor, fixed_triu_mask: bool) -> None:
    """[N, C, H, W] with H and W from 32 to 4096 in steps of 32; a boolean mask that broadcasts."""
    floats(x=x)
    require(x.dim() == 4, f"x must have 4 dimensions, not {x.dim()}")
    for size in x.shape[2:]:
        require(
            32 <= size <= 4096 and size % 32 == 0, f"H and W must be 32..4096 and multiples of 32: {tuple(x.shape)}"
        )
    require(mask.dtype == torch.bool, f"mask must be bool, not {mask.dtype}")
    require(mask.dim() == 4, f"mask must have 4 dimensions, not {mask.dim()}")
    require(all(m in (1, n) for m, n in zip(mask.shape, x.shape, strict=True)), f"mask {tuple(mask.shape)}")
    require(not fixed_triu_mask, "the simulation has no fixed_triu_mask")


def attention_arguments(
    q: Tensor, k: Tensor, v: Tensor, n: int, layout: str, *, pse: Tensor | None, mask: Tensor | None, keep_prob: float
) -> None:
    """Dtypes, layout, head counts and probabilities of a fused attention."""
    floats(query=q, key=k, value=v, pse=pse)
    require(layout in ("BSH", "SBH", "BSND", "BNSD"), f"input_layout {layout!r} (the simulation has no TND)")
    require(q.dim() == k.dim() == v.dim() == len(layout), f"layout {layout} needs {len(layout)} dimensions")
    require(k.shape == v.shape, f"key {tuple(k.shape)} and value {tuple(v.shape)} must have one shape")
    require(0 < keep_prob <= 1, f"keep_prob {keep_prob}")
    require(1 <= n <= 256, f"head_num {n} must be 1..256")
    if layout in ("BSH", "SBH"):
        require(q.shape[2] % n == 0, f"head_num {n} must divide H {q.shape[2]}")
        d = q.shape[2] // n
        require(k.shape[2] % d == 0, f"head dim {d} must divide H {k.shape[2]} of key")
        kv = k.shape[2] // d
    else:
        require(q.shape[layout.index("N")] == n, f"head_num {n} is not N of query {tuple(q.shape)}")
        d, kv = q.shape[3], k.shape[layout.index("N")]
    require(n % kv == 0, f"{kv} kv heads must divide {n}")
    require(d <= 768, f"head dim {d} is above 768")
    require(mask is None or mask.dtype in (torch.bool, torch.uint8), "atten_mask must be bool or uint8")


def attention_mask(mask: Tensor | None, sparse_mode: int, shape: tuple[int, int, int, int]) -> None:
    """The mask that a sparse_mode needs: full (0, 1), or the compressed triangle (2, 3, 4).

    Args:
        mask: atten_mask.
        sparse_mode: see torch_npu.
        shape: (batch, heads, query length, key length).
    """
    require(sparse_mode in (0, 1, 2, 3, 4), f"sparse_mode {sparse_mode} (the simulation has 0 to 4)")
    if sparse_mode == 0 and mask is None:
        return
    require(mask is not None, f"sparse_mode {sparse_mode} needs atten_mask")
    assert mask is not None
    if sparse_mode >= 2:
        require(
            mask.shape == (COMPRESSED, COMPRESSED), f"sparse_mode {sparse_mode} needs 2048 x 2048, not {mask.shape}"
        )
        triangle = torch.ones(COMPRESSED, COMPRESSED, dtype=torch.bool).triu(1)
        require(torch.equal(mask.bool(), triangle), "the compressed mask must be the strict upper triangle")
        return
    b, n, s, t = shape
    fits = [(b, n, s, t), (b, 1, s, t), (1, 1, s, t), (s, t)]
    require(tuple(mask.shape) in fits, f"atten_mask {tuple(mask.shape)} must be one of {fits}")
