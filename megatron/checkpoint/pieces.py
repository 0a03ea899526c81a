"""The blocks of logical tensors that this rank holds, whatever kind of tensor they are part of, and copies of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from megatron.checkpoint.parts import Parts, Stored

Offsets = tuple[int, ...]


def pieces(value: Stored) -> list[tuple[Offsets, Tensor]]:
    """Each block of this rank with the place of its first element in the logical tensor; they share its memory."""
    if isinstance(value, Parts):
        return [(tuple(offsets), block) for offsets, block in value.held.items()]
    if isinstance(value, DTensor):
        chunks = value.__create_chunk_list__()  # type: ignore[attr-defined]
        return [(tuple(chunk.offsets), value.to_local().detach()) for chunk in chunks]
    return [((0,) * value.dim(), value.detach())]


def copy_to_host(tensors: Mapping[str, Stored], previous: Mapping[str, Stored]) -> dict[str, Stored]:
    """Copies in the memory of the host, which training does not change.

    Args:
        tensors: by name; on any device.
        previous: copies that nobody needs any more; their memory is used again where it fits, because fresh memory
            costs as much time as the copy.
    """
    copies: dict[str, Stored] = {}
    with torch.no_grad():
        for name, value in tensors.items():
            old = previous.get(name)
            if old is not None and _layout(old) == _layout(value):
                for (_, target), (_, source) in zip(pieces(old), pieces(value), strict=True):
                    target.copy_(source)
                copies[name] = old
            else:
                copies[name] = _copied(value)
    return copies


def _layout(value: Stored) -> list[tuple[Offsets, torch.Size, torch.dtype]]:
    return [(offsets, block.shape, block.dtype) for offsets, block in pieces(value)]


def _copied(value: Stored) -> Stored:
    if isinstance(value, Parts):
        return value.map(_host_copy)
    return _host_copy(value)


def _host_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
