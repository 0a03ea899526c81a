"""The simulated operators `torch.ops.hpu.*` under the real schemas, one of which differs between lazy and eager mode.

See operators.json for where they come from.
"""

from __future__ import annotations

from habana_frameworks.torch import _maths
from habana_frameworks.torch.utils.internal import is_lazy
from tests.sim import snapshot
from tests.sim.vendor import Operators

_SCHEMAS = snapshot.read("hpu")["schemas"]
_LAZY_ADAMW = _SCHEMAS.pop("optimizer_adamw.lazy")
OPERATORS = Operators("hpu", "hpu", _SCHEMAS | ({"optimizer_adamw": _LAZY_ADAMW} if is_lazy() else {}))


def register() -> None:
    """Define all operators; once per process."""
    for name in _SCHEMAS:
        OPERATORS.define(name, getattr(_maths, name), random=name in ("sdpa_fwd", "sdpa_recomp_fwd"))
