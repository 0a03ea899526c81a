"""The shape of a mixture of experts, and which layers have one."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The experts of a model: feed-forward blocks of which every token visits a few."""

    count: int  # experts of a layer
    topk: int  # experts that a token visits
    ffn_hidden_size: int  # inner features of an expert
    layers: tuple[int, ...]  # numbers of the layers with experts, from 0
    shared_ffn_hidden_size: int = 0  # inner features of the block that every token visits besides; 0 = there is none
    pre_softmax: bool = False  # weights are shares among all experts, not among the chosen ones


def expert_layers(num_layers: int, interval: int, pattern: str | None) -> tuple[int, ...]:
    """Numbers of the layers with experts, from 0.

    Args:
        num_layers: of the model.
        interval: of Megatron-DeepSpeed: layers number interval, 2 interval, ... counted from 1.
        pattern: of Megatron-LM, which wins over the interval: a number n for layers 0, n, 2 n, ..., or a list with 1
            for layers with experts and 0 for the others, such as "[1]*3+[0,1]*2".

    Raises:
        ValueError: a pattern that cannot be read or is not of `num_layers` layers.
    """
    if pattern is None:
        return tuple(range(interval - 1, num_layers, interval))
    if pattern.strip().isdigit() and int(pattern) > 0:
        return tuple(range(0, num_layers, int(pattern)))
    try:
        flags = _list(ast.parse(pattern.strip(), mode="eval").body)
    except (SyntaxError, ValueError):
        raise ValueError(
            f"--moe-layer-freq {pattern}: must be a number, or a list of 0 and 1 such as [1]*3+[0,1]*2"
        ) from None
    if len(flags) != num_layers:
        raise ValueError(f"--moe-layer-freq {pattern}: describes {len(flags)} layers, --num-layers is {num_layers}")
    return tuple(number for number, flag in enumerate(flags) if flag)


def pattern_of(layers: tuple[int, ...], num_layers: int) -> str:
    """The list that `expert_layers` reads these layers from."""
    return "[" + ",".join("1" if number in layers else "0" for number in range(num_layers)) + "]"


def _list(node: ast.expr) -> list[int]:
    """The list of 0 and 1 that an expression of lists, + and * stands for."""
    if isinstance(node, ast.List):
        return [_number(item, largest=1) for item in node.elts]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _list(node.left) + _list(node.right)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        many, times = (node.left, node.right) if isinstance(node.right, ast.Constant) else (node.right, node.left)
        return _list(many) * _number(times, largest=_MOST_LAYERS)
    raise ValueError("no list")


_MOST_LAYERS = 10_000


def _number(node: ast.expr, *, largest: int) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int and 0 <= node.value <= largest:
        return node.value
    raise ValueError("no such number")


def experts_of(s: Mapping[str, Any]) -> Experts | None:
    """The experts that complete settings describe; None for a model without.

    Raises:
        ValueError: see `expert_layers`.
    """
    (count,) = set(s["num_experts"])
    if count == 1:
        return None
    return Experts(
        count=count,
        topk=s["topk"],
        ffn_hidden_size=s["moe_ffn_hidden_size"] or s["ffn_hidden_size"],
        layers=expert_layers(s["num_layers"], s["expert_interval"], s["moe_layer_freq"]),
        shared_ffn_hidden_size=s["moe_shared_expert_intermediate_size"] or 0,
        # One chosen expert would always have the whole weight, and the router would learn nothing.
        pre_softmax=s["moe_router_pre_softmax"] or s["topk"] == 1,
    )


def expert_settings(experts: Experts | None, num_layers: int) -> dict[str, Any]:
    """The values of the options that describe experts; the inverse of `experts_of`.

    Experts of a given model take any number of tokens and are chosen by their scores, as in the published models.
    """
    if experts is None:
        return {}
    return {
        "num_experts": (experts.count,),
        "topk": experts.topk,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_layer_freq": pattern_of(experts.layers, num_layers),
        "moe_shared_expert_intermediate_size": experts.shared_ffn_hidden_size or None,
        "moe_router_pre_softmax": experts.pre_softmax,
        "moe_token_dropping": False,
        "moe_top2_2nd_expert_sampling": False,
    }
