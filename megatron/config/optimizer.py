"""Settings of the optimizer and of the learning rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron.config.schema import option, resolved


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How weights change. Lengths of the schedule have the unit of the run: iterations or samples."""

    optimizer: Literal["adam", "sgd", "adamw", "fusedadamw"] = option(
        "adam",
        "adam and adamw are both Adam with decoupled weight decay; fusedadamw asks for the device's fused kernel.",
    )
    lr: float = resolved("Highest learning rate, per step.", minimum=0)
    min_lr: float = option(0.0, "Lowest learning rate after the decay, per step.", minimum=0)
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = option(
        "linear", "Shape of the decay."
    )
    lr_decay_iters: int | None = option(
        None, "Length of warm-up and decay, in iterations. Default: the whole run.", minimum=1
    )
    lr_decay_samples: int | None = option(
        None, "Length of warm-up and decay, in samples. Default: the whole run.", minimum=1
    )
    lr_decay_tokens: int | None = option(None, "Length of warm-up and decay, in tokens; wins over samples.", minimum=1)
    lr_warmup_fraction: float | None = option(
        None, "Fraction of the decay length that is warm-up, 0 to 1.", minimum=0, maximum=1
    )
    lr_warmup_iters: int = option(0, "Length of the linear warm-up, in iterations.", minimum=0)
    lr_warmup_samples: int = option(0, "Length of the linear warm-up, in samples.", minimum=0)
    lr_warmup_tokens: int | None = option(None, "Length of the linear warm-up, in tokens.", minimum=0)
    lr_warmup_init: float = option(0.0, "Learning rate at the start of the warm-up, per step.", minimum=0)
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = option(
        "exponential", "Shape of the last phase of --lr-decay-style WSD."
    )
    lr_wsd_decay_iters: int | None = option(None, "Length of the last phase of WSD, in iterations.", minimum=1)
    lr_wsd_decay_samples: int | None = option(None, "Length of the last phase of WSD, in samples.", minimum=1)
    override_opt_param_scheduler: bool = option(
        False,
        "Continue a loaded run with the schedule given here instead of the saved one.",
        "--override-opt_param-scheduler",
        aliases=("--override-opt-param-scheduler", "--override-lr-scheduler"),
    )
    use_checkpoint_opt_param_scheduler: bool = option(
        False,
        "Continue a loaded run with the saved schedule instead of the one given here.",
        "--use-checkpoint-opt_param-scheduler",
        aliases=("--use-checkpoint-opt-param-scheduler", "--use-checkpoint-lr-scheduler"),
    )
    weight_decay: float = option(0.01, "Weight decay, per step and unit of learning rate.", minimum=0)
    start_weight_decay: float = resolved(
        "Weight decay at the start of the run, per step. Default: --weight-decay.", minimum=0
    )
    end_weight_decay: float = resolved(
        "Weight decay at the end of the run, per step. Default: --weight-decay.", minimum=0
    )
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = option(
        "constant", "How weight decay goes from its start to its end value."
    )
    clip_grad: float = option(1.0, "Largest norm of the gradient, in its own unit; 0 does not clip.", minimum=0)
    adam_beta1: float = option(0.9, "Decay factor of Adam's first moment, per step.", minimum=0, maximum=1)
    adam_beta2: float = option(0.999, "Decay factor of Adam's second moment, per step.", minimum=0, maximum=1)
    adam_eps: float = option(1e-8, "Number added to the root of Adam's second moment.", minimum=0)
    sgd_momentum: float = option(0.9, "Momentum factor of SGD, per step.", minimum=0, maximum=1)
    cpu_optimizer: bool = option(False, "DeepSpeed: optimizer state and step on the host.")
    cpu_torch_adam: bool = option(
        False, "With --cpu-optimizer: PyTorch's Adam instead of DeepSpeed's.", "--cpu_torch_adam"
    )
