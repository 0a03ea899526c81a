"""What looks at a run while it trains: profilers, the tensor logger, the comparison of replicas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from megatron.config.run import RunConfig
from megatron.training.probes import Probe, ReplicaCheck, TensorLog
from megatron.training.profiler import ProfileError, Recorder, parse_steps, profile, torch_recorder
from megatron.training.setup import Session


def build_probes(config: RunConfig, session: Session) -> tuple[Probe, ...]:
    """What looks into the model."""
    settings, found = config.logging, list[Probe]()
    names = {"log_model_inputs": "model_inputs", "log_fwd_activations": "fwd_act", "log_bwd_grads": "bwd_grad"}
    kinds = frozenset(kind for name, kind in names.items() if getattr(settings, name))
    if kinds and settings.tensor_logger_path is not None:
        iterations = range(settings.tensor_logger_start_iter, settings.tensor_logger_end_iter + 1)
        found.append(TensorLog(kinds, iterations, Path(settings.tensor_logger_path), session.groups.world.rank))
    if settings.check_tp_norm:
        kinds = frozenset({"io", "wb"} if settings.check_tp_norm_type == "all" else {settings.check_tp_norm_type})
        last = settings.end_check_tp_norm_iter
        iterations = range(settings.start_check_tp_norm_iter, 1 + (last if last >= 0 else config.training.train_iters))
        found.append(ReplicaCheck(kinds, iterations, session.groups.tp))
    return tuple(found)


def build_observer(
    config: RunConfig, session: Session, probes: Sequence[Probe], iteration: int
) -> Callable[[int], None]:
    """A function to be called after every iteration with its number.

    Args:
        config, session: of the run.
        probes: made by `build_probes`.
        iteration: after which training begins.
    """
    callbacks = [_profile(config, session)] if _is_profiled(config, session) else []

    def begin_next(done: int) -> None:
        for probe in probes:
            probe.begin(done + 1)

    begin_next(iteration)

    def after(done: int) -> None:
        for callback in callbacks:
            callback(done)
        begin_next(done)

    return after


def _is_profiled(config: RunConfig, session: Session) -> bool:
    ranks = config.logging.profile_ranks
    return config.logging.profile is not None and (ranks is None or session.groups.world.rank in ranks)


def _profile(config: RunConfig, session: Session) -> Callable[[int], None]:
    settings, rank = config.logging, session.groups.world.rank
    return profile(_recorder(config, session, rank), parse_steps(settings.profile_steps), rank, session.printers.every)


def _recorder(config: RunConfig, session: Session, rank: int) -> Recorder:
    """What `--profile` asks for.

    Raises:
        ProfileError: the device has no profiler of its own.
    """
    settings = config.logging
    if settings.profile == "hltv":
        vendors = session.accelerator.capabilities.vendor_profiler
        if vendors is None:
            raise ProfileError(f"--profile hltv: {session.accelerator.name} has no such profiler; use pt or pt-full")
        return vendors
    assert settings.profile is not None
    folder = Path(settings.tensorboard_dir or config.checkpoint.save or ".") / "profile"
    return torch_recorder(settings.profile, folder / f"rank{rank}.trace.json")
