"""What a launch will need and how fast it may be, in a few lines of `--dry-run`; `tools/plan.py` says more."""

from __future__ import annotations

from collections.abc import Mapping

from megatron.launch.plan import Plan

_MACHINES: Mapping[str, str] = {
    "cuda": "h100",
    "hpu": "gaudi2",
    "npu": "ascend910b",
    "neuron": "trn2",
    "neuron_xla": "trn1",
}
"""What the ranks are taken to be where `--machine` does not say."""


def forecast(plan: Plan) -> str:
    """Memory of the fullest rank and time of a step; empty for devices of which no figures are known."""
    name = plan.machine or _MACHINES.get(plan.device)
    if name is None:
        return ""
    # What a launch itself does not need is imported when it is.
    from megatron.planner.machines import machine
    from megatron.planner.plan import Refused, possible_case
    from megatron.planner.report import outline
    from megatron.planner.request import read_request

    kind = machine(name)
    try:
        found = possible_case(read_request(plan.flags, plan.world_size), kind)
    except ValueError as problem:
        return f"no plan: {str(problem).splitlines()[0]}"
    if isinstance(found, Refused):
        return f"no plan: {found.reasons[0]}"
    more = "" if plan.machine else "; --machine plans for another one"
    return "\n".join([f"{plan.world_size} ranks: {kind.description}{more}", *outline(found[0])])
