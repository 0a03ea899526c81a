"""States with known values in any layout, for the tests of checkpoints."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from megatron.checkpoint import Loaded, TrainingState, load, optimizer_tensors, save
from megatron.mpu.sharding import local_slice, shard_dim

WORDS = 100
# Sizes that no number of ranks divides evenly once tensor parallelism has taken its part.
SHAPES = {
    "embedding.word.weight": (WORDS, 6),
    "layers.0.attention_norm.weight": (6,),
    "layers.0.attention.query.weight": (12, 6),
    "layers.0.attention.key.weight": (4, 6),
    "layers.0.attention.output.weight": (6, 12),
    "layers.1.attention_norm.weight": (6,),
    "layers.1.mlp.up.weight": (20, 6),
    "layers.1.mlp.up.bias": (20,),
    "layers.1.mlp.down.weight": (6, 20),
    "layers.1.scale.weight": (1,),
    "head.weight": (WORDS, 6),
}
PROGRESS = {"iteration": 7, "consumed_train_samples": 123456789012, "lr": 1.2345678901234567e-5, "nested": {"a": [1]}}
RUN = {"settings": {"lr": 0.1}, "versions": {"torch": "any"}}


def silent(_: str) -> None:
    pass


def truth(name: str, shape: tuple[int, ...]) -> Tensor:
    """float32 values that depend on the name of the tensor alone."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def small_state(value: float = 1.0, *, elements: int = 1000) -> TrainingState:
    """Plain tensors, for one process."""
    matrix = torch.arange(12.0).view(3, 4) * value
    tensors = {"model.a.weight": torch.full((elements,), value), "model.b.weight": matrix}
    return TrainingState(tensors=tensors, progress={"value": value}, run=RUN)


def assert_holds(root: str | Path, values: set[float], *, elements: int = 1000) -> Loaded:
    """The checkpoint that a run would resume from is whole and is that of one of the values; returns it."""
    into = {name: torch.zeros_like(t) for name, t in small_state(elements=elements).tensors.items()}
    loaded = load(root, into=into, verify=True, log=silent)
    assert loaded is not None
    assert loaded.progress["value"] in values
    for name, tensor in small_state(loaded.progress["value"], elements=elements).tensors.items():
        assert torch.equal(into[name], tensor)
    return loaded


@dataclass(frozen=True, kw_only=True)
class Layout:
    tp: int = 1
    dp: int = 1
    pp: int = 1
    kv_shards: int | None = None  # fewer key heads than ranks: the key weight is replicated over groups of ranks
    fsdp: bool = False

    @property
    def size(self) -> int:
        return self.tp * self.dp * self.pp

    @property
    def rows(self) -> int:
        """Padded vocabulary, by Megatron's rule with a multiple of 8."""
        return -(-WORDS // (8 * self.tp)) * 8 * self.tp


def logical_shape(name: str, layout: Layout) -> tuple[int, ...]:
    shape = SHAPES[name]
    return (layout.rows, *shape[1:]) if shape[0] == WORDS else shape


def build(layout: Layout) -> nn.Module:
    """A tree of modules that holds this rank's part of every parameter, zero."""
    if layout.size == 1:
        return tree({name: nn.Parameter(torch.zeros(logical_shape(name, layout))) for name in SHAPES})
    mesh = init_device_mesh("cpu", (layout.pp, layout.dp, layout.tp), mesh_dim_names=("pp", "dp", "tp"))
    stage = mesh.get_local_rank("pp")
    kv_mesh = None
    if layout.kv_shards:
        kv_mesh = init_device_mesh(
            "cpu", (layout.kv_shards, layout.tp // layout.kv_shards), mesh_dim_names=("kv", "copies")
        )
    names = [n for i, n in enumerate(SHAPES) if layout.pp == 1 or (i < len(SHAPES) // 2) == (stage == 0)]
    model = tree({name: nn.Parameter(distribute(name, layout, mesh, kv_mesh)) for name in names})
    if layout.fsdp:
        for child in model.children():
            fully_shard(child, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
    return model


def distribute(name: str, layout: Layout, mesh: DeviceMesh, kv_mesh: DeviceMesh | None) -> DTensor:
    shape = logical_shape(name, layout)
    if kv_mesh is not None and "attention.key" in name:
        part = local_slice(name, shape, kv_mesh.get_local_rank("kv"), kv_mesh.size(0))
        return DTensor.from_local(torch.zeros(shape)[part], kv_mesh, [Shard(0), Replicate()])
    part = local_slice(name, shape, mesh.get_local_rank("tp"), layout.tp)
    dim = shard_dim(name)
    placement = Replicate() if dim is None else Shard(dim)
    return DTensor.from_local(torch.zeros(shape)[part].contiguous(), mesh["tp"], [placement], run_check=False)


def tree(parameters: dict[str, nn.Parameter]) -> nn.Module:
    root = nn.Module()
    for name, parameter in parameters.items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(leaf, parameter)
    return root


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and AdamW's state under the names of a checkpoint."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    named = dict(model.named_parameters())
    return {f"model.{name}": p for name, p in named.items()} | optimizer_tensors(optimizer, named.items())


def expected(name: str, shape: torch.Size) -> Tensor:
    """What a tensor must hold: known values, and zero in rows that only pad the vocabulary."""
    whole = torch.zeros(shape)
    if name.startswith("optimizer.step."):
        return whole + 7
    real = (WORDS, *shape[1:]) if name.endswith(("embedding.word.weight", "head.weight")) else tuple(shape)
    whole[: real[0]] = truth(name, real)
    return whole


def fill(tensors: dict[str, Tensor]) -> None:
    """Write the known values; rows that only pad the vocabulary get something that must never be seen again."""
    with torch.no_grad():
        for name, tensor in tensors.items():
            whole = expected(name, tensor.shape)
            if tensor.dim() > 1 and tensor.shape[0] > WORDS:
                whole[WORDS:] = 1e9
            for local, part in pieces(tensor):
                local.copy_(whole[part])


def pieces(tensor: Tensor) -> Iterator[tuple[Tensor, Any]]:
    """This rank's part of a tensor and where it is in the whole."""
    if not isinstance(tensor, DTensor):
        yield tensor, ...
        return
    for chunk in tensor.__create_chunk_list__():
        yield (
            tensor.to_local(),
            tuple(slice(at, at + length) for at, length in zip(chunk.offsets, chunk.sizes, strict=True)),
        )


def assert_exact(tensors: dict[str, Tensor]) -> None:
    """Gather every tensor and compare all bits."""
    for name, tensor in tensors.items():
        whole = tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor
        assert torch.equal(whole, expected(name, tensor.shape)), name


def write_known(root: str, layout: Layout) -> None:
    tensors = tensors_of(build(layout))
    fill(tensors)
    save(root, 7, TrainingState(tensors=tensors, progress=PROGRESS, run=RUN, vocab_size=WORDS), log=silent)


def read_and_write_again(source: str, target: str, layout: Layout) -> None:
    """Load in this layout, compare, and save from it."""
    tensors = tensors_of(build(layout))
    loaded = load(source, into=tensors, vocab_size=WORDS, verify=True, log=silent)
    assert loaded is not None
    assert (loaded.progress, loaded.run, loaded.iteration) == (PROGRESS, RUN, 7)
    assert_exact(tensors)
    save(target, 7, TrainingState(tensors=tensors, progress=loaded.progress, run=RUN, vocab_size=WORDS), log=silent)
