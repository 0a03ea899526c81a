"""Settings of the training engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron.config.schema import option


@dataclass(frozen=True, kw_only=True)
class DeepSpeedConfig:
    """Whether DeepSpeed drives the run, and the file that configures it."""

    deepspeed: bool = option(False, "Train with DeepSpeed's engine instead of the native one.")
    deepspeed_config: str | None = option(
        None,
        "DeepSpeed's JSON file. Without it the JSON is made from the flags.",
        "--deepspeed_config",
        aliases=("--deepspeed-config",),
    )
    remote_device: Literal["none", "cpu", "nvme"] = option(
        "none", "With stage 3: where parameters lie while they are not used; nvme needs a folder in the JSON file."
    )
