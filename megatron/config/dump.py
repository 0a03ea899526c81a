"""The settings of a run as lines of text, in the form that Megatron prints at its start."""

from __future__ import annotations

from megatron.config.run import RunConfig

_COLUMN = 48


def lines(run: RunConfig) -> list[str]:
    """All settings, sorted by name without regard to case, between Megatron's rules; then the notes."""
    settings = run.values()
    body = [
        f"  {name} {'.' * (_COLUMN - len(name))} {_text(settings[name])}" for name in sorted(settings, key=str.lower)
    ]
    return [
        "------------------------ arguments ------------------------",
        *body,
        "-------------------- end of arguments ---------------------",
        *run.notes,
    ]


def _text(value: object) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)
