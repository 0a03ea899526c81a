"""`python -m megatron.launch`: decide the launch, print it, and become the command."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from megatron.accelerators import load
from megatron.config.run import RunConfig, parse
from megatron.launch import describe
from megatron.launch.hostfile import is_own_address
from megatron.launch.plan import Plan, make_plan


def main(argv: Sequence[str], env: Mapping[str, str]) -> int:
    """Start what the command line and the environment ask for.

    Returns only for `--dry-run` (0) and for what cannot be started (2); otherwise this process becomes the command.
    """
    host = platform.node()
    try:
        plan = make_plan(argv, env, (host, host.partition(".")[0]), is_own_address)
        # Parsing here says once, before any process starts, what every process would say.
        run = None if plan.check else resolve(plan, env)
        if plan.dry_run:
            print(describe.everything(plan, run))
            return 0
    except ValueError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    print(*describe.variables(plan), f"$ {describe.command(plan)}", sep="\n", flush=True)
    exports = {variable.name: variable.value for variable in plan.exports}
    try:
        os.execvpe(plan.command[0], plan.command, {**env, **exports})
    except OSError as problem:
        print(f"error: {plan.command[0]} cannot be started: {problem.strerror}", file=sys.stderr)
        return 2


def resolve(plan: Plan, env: Mapping[str, str]) -> RunConfig:
    """The trainer's settings as the first process will see them. Raises ValueError for what it would refuse."""
    first = {**env, "WORLD_SIZE": str(plan.world_size), "RANK": "0", "LOCAL_RANK": "0"}
    run, accelerator = parse(plan.flags, first, read_record=_read_record), load(plan.device)
    if accelerator.capabilities.communicator is not None:
        from megatron.training.setup import run_topology  # needs more of torch than other launches

        run_topology(run, accelerator)
    return run


def _read_record(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings saved in a checkpoint; reading one needs more of torch than a launch, so only when asked for."""
    from megatron.training.checkpoint_args import read_settings

    return read_settings(settings)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
