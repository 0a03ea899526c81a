"""What devices with a vendor's own package have in common."""

from __future__ import annotations

import importlib
from importlib.util import find_spec

from megatron.accelerators.base import EnvVar

NO_AUTOLOAD = EnvVar(
    "TORCH_DEVICE_BACKEND_AUTOLOAD",
    "0",
    "an installed vendor package without its driver breaks `import torch`; the one in use is imported by name",
)


def import_problem(module: str) -> str:
    """Import a vendor's package, which gives torch its device; why it failed, or the empty string.

    Args:
        module: dotted name. Packages without their driver raise errors of many kinds while they are imported.
    """
    package = module.partition(".")[0]
    if find_spec(package) is None:
        return f"python package {package} is not installed"
    try:
        importlib.import_module(module)
    except Exception as error:
        return f"python package {package} does not load here: {type(error).__name__}: {error}"
    return ""


def check_local_rank(local_rank: int, count: int, what: str, restrict: str) -> None:
    """Raise ValueError unless the node has a device of this number.

    Args:
        local_rank: of this process.
        count: devices that this process can see.
        what: one device in words.
        restrict: the variable that decides which devices are seen.
    """
    if not 0 <= local_rank < count:
        raise ValueError(
            f"local rank {local_rank} has no {what}: {count} visible. Start at most {count} processes per node "
            f"(--nproc-per-node) or show more of them ({restrict})."
        )
