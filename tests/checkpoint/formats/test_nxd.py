"""NeuronX Distributed: every layout comes back, and a rank's queries belong to its key-value head."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from megatron.checkpoint import CheckpointError, CorruptCheckpoint
from megatron.checkpoint.formats import ReadOptions, WriteOptions, convert, open_model
from megatron.checkpoint.formats.nxd_attention import layout_for, share_kv, share_queries
from megatron.checkpoint.formats.options import Style
from tests.checkpoint.formats.samples import FAMILIES, assert_equal, random_model

SIZES = {**FAMILIES, "mha": replace(FAMILIES["llama"], num_kv_heads=8)}


def _through(size: str, folder: Path, options: WriteOptions) -> None:
    model = random_model(SIZES[size])
    convert(model, "hf", folder / "hf", WriteOptions())
    convert(model, "nxd", folder / "out", options)
    assert_equal(open_model(folder / "out", None, ReadOptions(config=folder / "hf")), model)


@pytest.mark.parametrize("fuse", [False, True], ids=["unfused", "fused"])
@pytest.mark.parametrize("tiled", [False, True], ids=["adjacent", "tiled"])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 2), (8, 1), (8, 3), (2, 4)])
@pytest.mark.parametrize("size", ["llama", "mistral"])
def test_every_layout(size: str, tp: int, pp: int, tiled: bool, fuse: bool, tmp_path: Path) -> None:
    _through(
        size,
        tmp_path,
        WriteOptions(tp=tp, pp=pp, attention="fused" if fuse else None, kv_tiled=tiled, log=lambda _: None),
    )


@pytest.mark.parametrize(
    ("attention", "name"),
    [
        (None, "qkv_proj.weight"),
        ("coalesced", "qkv_proj.weight"),
        ("separate", "k_proj.weight"),
        ("grouped", "qkv_proj.weight_k"),
        ("fused", "qkv_proj.weight_qkv"),
    ],
)
def test_as_many_key_value_heads_as_queries(attention: Style | None, name: str, tmp_path: Path) -> None:
    _through("mha", tmp_path, WriteOptions(tp=2, attention=attention, log=lambda _: None))
    assert f"model.layers.0.self_attn.{name}" in torch.load(next((tmp_path / "out" / "model").iterdir()))


@pytest.mark.parametrize(("tp", "pp"), [(2, 2), (8, 3)])
@pytest.mark.parametrize("size", ["mixtral", "bloom", "gpt2"])
def test_further_families(size: str, tp: int, pp: int, tmp_path: Path) -> None:
    _through(size, tmp_path, WriteOptions(tp=tp, pp=pp, log=lambda _: None))


def _rank(folder: Path, rank: int) -> dict[str, Tensor]:
    return torch.load(folder / "model" / f"dp_rank_00_tp_rank_{rank:02d}_pp_rank_00.pt")


def test_experts_compute_what_they_should(tmp_path: Path) -> None:
    """As NxD computes them: rows times [h, gate and up of the rank], times [f, h], summed over the ranks."""
    model = random_model(FAMILIES["mixtral"], torch.float64)
    convert(model, "nxd", tmp_path / "out", WriteOptions(tp=2, log=lambda _: None))
    x, total = torch.ones(3, 32).double(), torch.zeros(3, 32).double()
    for rank in range(2):
        tensors = _rank(tmp_path / "out", rank)
        inner = "model.layers.3.mlp.expert_mlps.mlp_op."
        gate, up = (x @ tensors[f"{inner}gate_up_proj.weight"][2]).chunk(2, -1)
        total += (silu(gate) * up) @ tensors[f"{inner}down_proj.weight"][2]
        router = tensors["model.layers.3.mlp.router.linear_router.weight"]
        assert torch.equal(router, model.weights.read("layers.3.mlp.router.weight"))
    gate, up, down = (model.weights.read(f"layers.3.mlp.experts.{part}.weight")[2] for part in ("gate", "up", "down"))
    torch.testing.assert_close(total, (silu(x @ gate.t()) * (x @ up.t())) @ down.t())


def test_files_of_expert_parallel_ranks(tmp_path: Path) -> None:
    model = random_model(FAMILIES["mixtral"])
    convert(model, "hf", tmp_path / "hf", WriteOptions())
    convert(model, "nxd", tmp_path / "out", WriteOptions(tp=2, log=lambda _: None))
    for path in list((tmp_path / "out" / "model").iterdir()):
        state = torch.load(path)
        path.unlink()
        for rank in range(2):
            own = {n: t[2 * rank :][:2].clone() if "expert_mlps" in n else t for n, t in state.items()}
            kept = {name: tensor for name, tensor in own.items() if rank == 0 or "expert_mlps" in name}
            torch.save(kept, path.with_name(path.name.replace("tp_rank", f"ep_rank_{rank:02d}_tp_rank")))
    assert_equal(open_model(tmp_path / "out", None, ReadOptions(config=tmp_path / "hf")), model)
    path.with_name(path.name.replace("tp_rank", "ep_rank_01_tp_rank")).unlink()
    with pytest.raises(CorruptCheckpoint, match=r"the file of ep_rank_01_tp_rank_0\d_pp_rank_00 is missing"):
        open_model(tmp_path / "out", None, ReadOptions(config=tmp_path / "hf"))


def test_tensors_of_hugging_face_are_cut_where_a_linear_layer_is(tmp_path: Path) -> None:
    """The second of two ranks; GPT-2 stores [in, out], and its query, key and value one after the other."""
    for family in ("bloom", "gpt2"):
        model = random_model(FAMILIES[family])
        convert(model, "nxd", tmp_path / family, WriteOptions(tp=2, log=lambda _: None))
    q, k, v, up, down = (
        model.weights.read(f"layers.3.{n}.weight")
        for n in ("attention.query", "attention.key", "attention.value", "mlp.up", "mlp.down")
    )
    gpt2, bloom = _rank(tmp_path / "gpt2", 1), _rank(tmp_path / "bloom", 1)
    assert torch.equal(gpt2["transformer.h.3.attn.c_attn.weight"], torch.cat((q[16:], k[16:], v[16:])).t())
    assert torch.equal(gpt2["transformer.h.3.mlp.c_fc.weight"], up[24:].t())
    assert torch.equal(gpt2["transformer.h.3.mlp.c_proj.weight"], down[:, 24:].t())
    assert gpt2["transformer.h.3.mlp.c_proj.bias"].shape == (32,)
    assert gpt2["transformer.h.3.attn.c_attn.bias"].shape == (48,)
    layer = "transformer.h.3.self_attention."
    assert bloom[f"{layer}query_key_value.weight"].shape == (48, 32)
    assert [bloom[f"{layer}dense.{kind}"].shape for kind in ("weight", "bias")] == [(32, 16), (32,)]
    assert bloom["transformer.word_embeddings.weight"].shape == (42, 32)


@pytest.mark.parametrize("size", ["qwen3", "mixtral", "bloom", "gpt2"])
def test_full_state_of_every_family(size: str, tmp_path: Path) -> None:
    _through(size, tmp_path, WriteOptions(dialect="full"))


def test_full_state(tmp_path: Path) -> None:
    _through("llama", tmp_path, WriteOptions(dialect="full"))
    state = torch.load(tmp_path / "out" / "checkpoint.pt")
    assert "model.layers.3.self_attn.k_proj.weight" in state
    model = open_model(tmp_path / "out" / "checkpoint.pt", "nxd", ReadOptions(config=tmp_path / "hf"))
    assert_equal(model, random_model(SIZES["llama"]))


@pytest.mark.parametrize(
    ("heads", "groups", "tp", "copies"), [(64, 8, 32, 4), (64, 8, 16, 2), (64, 8, 8, 1), (8, 2, 4, 2), (64, 8, 8, 2)]
)
@pytest.mark.parametrize("tiled", [False, True], ids=["adjacent", "tiled"])
def test_queries_are_with_their_key_value_head(heads: int, groups: int, tp: int, copies: int, tiled: bool) -> None:
    arch = replace(FAMILIES["llama"], num_heads=heads, num_kv_heads=groups, head_dim=1)
    layout = layout_for(arch, tp, copies, tiled=tiled)
    queries = share_queries(torch.arange(heads)[:, None], layout, tp)
    keys = share_kv(torch.arange(groups)[:, None], layout, tp)
    for query, key in zip(queries, keys, strict=True):
        wanted = (query.flatten() // (heads // groups)).tolist()
        assert wanted == key.flatten().repeat_interleave(len(wanted) // key.numel()).tolist()
    if tiled and (heads, tp) == (64, 32):
        assert [queries[8 * 3 + 5].flatten().tolist(), keys[8 * 3 + 5].item()] == [
            [8 * 5 + 2 * 3, 8 * 5 + 2 * 3 + 1],
            5,
        ]


def test_what_the_converter_of_nxd_makes_for_trn2(tmp_path: Path) -> None:
    """Keys in the tiled order, queries in the adjacent one: --hw-backend tells how they were meant."""
    model = random_model(SIZES["mistral"])
    convert(model, "hf", tmp_path / "hf", WriteOptions())
    quiet = WriteOptions(tp=4, log=lambda _: None)
    convert(model, "nxd", tmp_path / "tiled", quiet)
    convert(model, "nxd", tmp_path / "out", replace(quiet, kv_tiled=False))
    for path in (tmp_path / "out" / "model").iterdir():
        other = torch.load(tmp_path / "tiled" / "model" / path.name)
        mixed = {name: other[name] if name.endswith(("_k", "_v")) else t for name, t in torch.load(path).items()}
        torch.save(mixed, path)
    assert_equal(open_model(tmp_path / "out", None, ReadOptions(config=tmp_path / "hf", query_tiled=False)), model)


class TensorReference:
    """As in torch_xla: stands for a tensor in a file of its own."""

    def __init__(self, tid: int) -> None:
        self.tid = tid


def test_one_file_per_tensor(tmp_path: Path) -> None:
    model = random_model(SIZES["llama"])
    convert(model, "hf", tmp_path / "hf", WriteOptions())
    convert(model, "nxd", tmp_path / "out", WriteOptions(tp=2, log=lambda _: None))
    for path in list((tmp_path / "out" / "model").iterdir()):
        state = torch.load(path)
        folder = path.with_name(f"{path.name}.tensors")
        folder.mkdir()
        for number, tensor in enumerate(state.values()):
            torch.save(tensor, folder / f"tensor_{number}.pt")
        torch.save({name: TensorReference(number) for number, name in enumerate(state)}, path)
    assert_equal(open_model(tmp_path / "out", None, ReadOptions(config=tmp_path / "hf")), model)


def test_copies_that_differ(tmp_path: Path) -> None:
    model = random_model(SIZES["mistral"])
    convert(model, "hf", tmp_path / "hf", WriteOptions())
    convert(model, "nxd", tmp_path / "out", WriteOptions(tp=8, log=lambda _: None))
    path = tmp_path / "out" / "model" / "dp_rank_00_tp_rank_03_pp_rank_00.pt"
    state = torch.load(path)
    state["model.layers.2.self_attn.qkv_proj.weight_v"][0, 0] += 1
    torch.save(state, path)
    found = open_model(tmp_path / "out", None, ReadOptions(config=tmp_path / "hf"))
    with pytest.raises(CorruptCheckpoint, match=r"layers\.2\.self_attn\.qkv_proj\.weight_v: the 4 copies"):
        found.weights.read("layers.2.attention.value.weight")


def test_a_missing_rank_is_named(tmp_path: Path) -> None:
    model = random_model(SIZES["llama"])
    convert(model, "hf", tmp_path / "hf", WriteOptions())
    convert(model, "nxd", tmp_path / "out", WriteOptions(tp=2, pp=2, log=lambda _: None))
    (tmp_path / "out" / "model" / "dp_rank_00_tp_rank_01_pp_rank_00.pt").unlink()
    with pytest.raises(CorruptCheckpoint, match="tp_rank_01_pp_rank_00 is missing"):
        open_model(tmp_path / "out", None, ReadOptions(config=tmp_path / "hf"))


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("qwen3", WriteOptions(), "do not compute this model .family qwen3"),
        ("bloom", WriteOptions(attention="fused"), "--attention fused: query, key and value of this model are one"),
        ("llama", WriteOptions(tp=8, kv_size_multiplier=3), r"4 key-value heads times 3 .--kv-size-multiplier"),
        ("llama", WriteOptions(tp=8, attention="separate"), "grouped or fused"),
        ("llama", WriteOptions(attention="coalesced"), "different sizes"),
        ("llama", WriteOptions(pp=5), "4 layers are too few for 5 stages"),
        ("llama", WriteOptions(tp=16), "8 query heads cannot be divided over 16 ranks"),
    ],
)
def test_refusals(family: str, options: WriteOptions, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        convert(random_model(FAMILIES[family]), "nxd", tmp_path / "out", replace(options, log=lambda _: None))
