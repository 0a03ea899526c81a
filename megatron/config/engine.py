"""Settings of the training engine."""

from __future__ import annotations

from dataclasses import dataclass

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
