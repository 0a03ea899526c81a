"""The command line of `tools/plan.py`: read the flags, plan, print."""

from __future__ import annotations

import argparse
import json
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron.accelerators.cpu import accelerator as host
from megatron.config.parser import all_options, groups
from megatron.planner import report
from megatron.planner.machines import MACHINES, Machine, machine
from megatron.planner.plan import Plan, Refused, make_plan
from megatron.planner.published import PUBLISHED, compare
from megatron.planner.request import Request, read_request
from megatron.planner.search import Candidate, nearest, search

_SECTIONS = ("model", "parallel", "moe", "precision", "equivalents")
_OTHERS = (
    *("seq_length", "vocab_size", "padded_vocab_size", "make_vocab_size_divisible_by", "reset_attention_mask"),
    *("micro_batch_size", "global_batch_size", "recompute_granularity", "recompute_method", "recompute_num_layers"),
    *("recomputation_layer_num", "checkpoint_in_cpu", "cpu_offloading_num_layers"),
    *("optimizer", "sgd_momentum", "cpu_optimizer", "deepspeed", "deepspeed_config"),
    *("attention_backend", "op", "use_torch_compile"),
)
_PLACE = ("--local-rank", "--distributed-backend", "--distributed-timeout-minutes")
SHOWN = 10
"""Layouts that --search prints."""


def parser() -> argparse.ArgumentParser:
    """The planner's own flags; every other flag is the trainer's."""
    machines = "\n".join(f"  {name:<12} {found.description}" for name, found in MACHINES.items())
    flags = textwrap.fill(
        " ".join(_trainer_flags()), 100, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False
    )
    result = argparse.ArgumentParser(
        prog="tools/plan.py",
        description="Plan a training run: memory of every rank, traffic, time of a step. Nothing is started. Flags not "
        "listed here are the trainer's (python pretrain_gpt.py --help), such as --preset and the sizes of the layout.",
        epilog=f"machines:\n{machines}\n\nflags of the trainer that a plan looks at:\n{flags}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    result.add_argument("--world-size", type=int, metavar="N", help="ranks")
    result.add_argument("--machine", default="h100", metavar="NAME", help="what the ranks are (h100)")
    result.add_argument("--rank", type=int, default=0, metavar="N", help="rank whose part is shown (0)")
    result.add_argument("--search", action="store_true", help="rank the layouts that fit by estimated speed")
    result.add_argument("--chart", type=Path, metavar="FILE", help="draw the memory (png, svg, pdf)")
    result.add_argument("--json", action="store_true", help="print JSON instead of text")
    result.add_argument("--compare-published", action="store_true", help="published speeds beside their estimates")
    return result


def _trainer_flags() -> list[str]:
    """Flags of the model, the layout and the formats, and what else makes a difference."""
    found = [option for name in _SECTIONS for option in groups()[name]]
    found += [all_options()[name] for name in _OTHERS]
    return sorted({option.main for option in found} - set(_PLACE))


def main(argv: Sequence[str], say: Callable[[str], None] = print) -> int:
    """Plan what `argv` asks for; 0 if it fits, 1 if it does not or cannot be.

    Raises:
        ValueError: flags that cannot be understood.
    """
    started = time.monotonic()
    own, flags = parser().parse_known_args(list(argv))
    if own.compare_published:
        return _compare(own.json, say)
    if own.world_size is None or own.world_size < 1:
        raise ValueError("--world-size: give the number of ranks")
    if not 0 <= own.rank < own.world_size:
        raise ValueError(f"--rank {own.rank}: must be from 0 to {own.world_size - 1}")
    planned_for = machine(own.machine)
    request = read_request(flags, own.world_size)
    result, document = _search(request, planned_for, own, say) if own.search else _plan(request, planned_for, own, say)
    if own.json:
        say(json.dumps(document, indent=1))
    else:
        megabytes = host().memory_stats().max_allocated / 1e6
        say(f"\nplanned in {time.monotonic() - started:.1f} s with {megabytes:.0f} MB")
    return result


def _plan(
    request: Request, planned_for: Machine, own: argparse.Namespace, say: Callable[[str], None]
) -> tuple[int, dict[str, Any]]:
    found = make_plan(request, planned_for)
    if isinstance(found, Plan) and own.chart is not None:
        from megatron.planner.chart import draw

        draw(found, request, own.chart)
    document: dict[str, Any] = {}
    if isinstance(found, Refused):
        document["impossible"] = list(found.reasons)
        lines = ["this layout cannot be:", *(f"  {reason}" for reason in found.reasons)]
    else:
        document |= report.as_json(found, own.rank)
        lines = report.plan_lines(found, request, own.rank)
    good = isinstance(found, Plan) and found.fits
    if not good:
        offers = nearest(request, planned_for)
        document["nearest"] = [report.candidate_json(one) for one in offers]
        lines += ["", *_offers(offers)]
    if not own.json:
        for line in lines:
            say(line)
    return (0 if good else 1), document


def _offers(offers: Sequence[Candidate]) -> list[str]:
    if not offers:
        return ["no layout of this model and batch fits on so few ranks"]
    return ["nearest layouts that fit:", *report.search_lines(offers, len(offers)), *report.flag_lines(offers)]


def _search(
    request: Request, planned_for: Machine, own: argparse.Namespace, say: Callable[[str], None]
) -> tuple[int, dict[str, Any]]:
    found = search(request, planned_for)
    if not own.json:
        say(f"{len(found)} layouts fit on {own.world_size} ranks: {planned_for.description}")
        if request.assumed:
            say(f"assumed: {' '.join(request.assumed)}")
        lines = [*report.search_lines(found, SHOWN), *report.flag_lines(found[:1])] if found else _offers(())
        for line in lines:
            say(line)
    return (0 if found else 1), {"layouts": [report.candidate_json(one) for one in found]}


def _compare(as_json: bool, say: Callable[[str], None]) -> int:
    found = compare(PUBLISHED)
    if as_json:
        say(json.dumps(report.comparison_json(found), indent=1))
    else:
        for line in report.comparison_lines(found):
            say(line)
    return 0
