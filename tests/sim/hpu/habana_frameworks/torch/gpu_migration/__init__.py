"""SIMULATION of Gaudi's GPU Migration Toolkit: importing it sends `torch.cuda` calls to the simulated device "hpu".

With GPU_MIGRATION_LOG_LEVEL set it writes `$HABANA_LOGS/gpu_migration_logs/gpu_migration_<pid>.log` as the real one
does: three lines for every place in the code that calls something that was redirected. The summary beside it, a JSON
file of the same name, is an addition: how many places of each kind, what they call, and what is never called.
"""

from __future__ import annotations

import torch.nn.functional as F

import habana_frameworks.torch  # noqa: F401 - makes the device
from habana_frameworks.torch.gpu_migration._attention import scaled_dot_product_attention
from habana_frameworks.torch.gpu_migration._log import Log
from tests.sim.redirect import Redirect

log = Log.from_environment()
# A process has one card and calls it "hpu".
redirect = Redirect("hpu", lambda number: "hpu", "hccl", log.seen)
redirect.everything()
F.scaled_dot_product_attention = scaled_dot_product_attention(log.seen)
log.watch((*redirect.names, "torch.nn.functional.scaled_dot_product_attention"))
