"""Variables that Intel's Gaudi scripts share, whatever they train.

Where an original script dropped a setting in silence, this table obeys it or refuses it with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from megatron.launch.env import Values, Variable, choice, plain, value

PREFIX = "HL_"
DEVICES_PER_NODE = 8
DATA_FLAGS = ("--data-path", "--train-data-path", "--valid-data-path", "--test-data-path", "--mock-data")
LAUNCH = plain("DEVICE", "ENGINE", "PRECISION", "PRESET", "SEED", "LAUNCHER", "SCRIPT", "NODE_RANK")
LAUNCH += plain("MASTER_ADDR", "MASTER_PORT")
"""Plain names that every Gaudi script takes as well."""
_LAZY = "PT_HPU_LAZY_MODE"
_TRUTH = {"0": False, "false": False, "1": True, "true": True}


def whole(values: Values, name: str, least: int = 1) -> int:
    """The number a variable holds. Raises ValueError, as a whole sentence, if it is none or too small."""
    text = values[name]
    if not text.isdecimal() or int(text) < least:
        raise ValueError(f"{name}={text} must be a whole number of at least {least}")
    return int(text)


def row(
    name: str,
    flags: Callable[[str, Values], tuple[str, ...]],
    decides: Sequence[str],
    help: str,
    *,
    note: str = "",
    gives_way: bool = False,
    replaced_by: Sequence[str] = (),
) -> Variable:
    """A variable that stands for more than a flag with its value."""
    return Variable(name, flags, frozenset(decides), help, gives_way, note, frozenset(replaced_by))


def silent(name: str, help: str, note: str) -> Variable:
    """A variable that other rows read, or that has no effect; `note` says which."""
    return row(name, lambda text, values: (), (), help, note=note)


def is_true(text: str) -> bool:
    """What a variable that is 1 or true, 0 or false says. Raises ValueError for anything else."""
    if text.lower() not in _TRUTH:
        raise ValueError(f"is none of {', '.join(_TRUTH)}")
    return _TRUTH[text.lower()]


def truth(name: str, yes: tuple[str, ...], no: tuple[str, ...], help: str, *, note: str = "") -> Variable:
    """A variable that is 1 or true, 0 or false."""

    def flags(text: str, values: Values) -> tuple[str, ...]:
        return yes if is_true(text) else no

    return row(name, flags, [word for word in (*yes, *no) if word.startswith("--")], help, note=note)


def absent(name: str, off: str, reason: str) -> Variable:
    """A variable of something this distribution does not have: only `off`, or leaving it out, is possible."""

    def flags(text: str, values: Values) -> tuple[str, ...]:
        if text != off:
            raise ValueError(f"is not possible: {reason}")
        return ()

    return row(name, flags, (), f"only `{off}`: {reason}" if off else f"refused: {reason}", note="it is off")


def _launch_hosts(text: str, values: Values) -> tuple[str, ...]:
    return ("--hostfile", text) if whole(values, "HL_NUM_NODES") > 1 else ()


def _reach_nodes(text: str, values: Values) -> tuple[str, ...]:
    """DeepSpeed's launcher, which starts all nodes from the first one as Intel's scripts do."""
    return ("--launcher", "deepspeed") if whole(values, "HL_NUM_NODES") > 1 else ()


def _copies(text: str, values: Values) -> tuple[str, ...]:
    wanted, parts = whole(values, "HL_DP"), whole(values, "HL_TP") * whole(values, "HL_PP")
    nodes, devices = whole(values, "HL_NUM_NODES"), whole(values, "HL_DEVICES_PER_NODE")
    if wanted * parts > nodes * devices:
        raise ValueError(
            f"needs {wanted * parts} devices (HL_DP x HL_TP x HL_PP), but there are {nodes * devices} "
            "(HL_NUM_NODES x HL_DEVICES_PER_NODE)"
        )
    return ("--data-parallel-size", text)


LAYOUT: tuple[Variable, ...] = (
    value("HL_NUM_NODES", "--num-nodes", "machines"),
    row("HL_NUM_NODES", _reach_nodes, ("--launcher",), "", gives_way=True, note="one node needs no such launcher"),
    row(
        *("HL_DEVICES_PER_NODE", lambda text, values: ("--nproc-per-node", text), ("--nproc-per-node",)),
        "Gaudi cards per machine; 8 where HL_DP does not say otherwise",
        replaced_by=("--data-parallel-size",),
    ),
    row("HL_DP", _copies, ("--data-parallel-size",), "copies of the model; as many as fill all cards unless given"),
    value("HL_TP", "--tensor-model-parallel-size", "ranks that share each layer"),
    value("HL_PP", "--pipeline-model-parallel-size", "pipeline stages"),
    row("HL_HOSTSFILE", _launch_hosts, ("--hostfile",), "file of `host slots=8` lines", note="one node needs no list"),
)


def layout(tp: str, pp: str) -> dict[str, str]:
    """Defaults of the layout."""
    return {"HL_NUM_NODES": "1", "HL_DEVICES_PER_NODE": str(DEVICES_PER_NODE), "HL_TP": tp, "HL_PP": pp}


def copies(values: Values) -> int:
    """Copies of the model: HL_DP, or as many as fill all cards. Raises ValueError if whole ones cannot."""
    if "HL_DP" in values:
        return whole(values, "HL_DP")
    total = whole(values, "HL_NUM_NODES") * whole(values, "HL_DEVICES_PER_NODE")
    parts = whole(values, "HL_TP") * whole(values, "HL_PP")
    if total % parts:
        raise ValueError(
            f"HL_TP={values['HL_TP']} x HL_PP={values['HL_PP']} = {parts} devices for a copy of the model do not "
            f"divide {total} (HL_NUM_NODES x HL_DEVICES_PER_NODE): change them, or give HL_DP"
        )
    return total // parts


def lazily(text: str, values: Values) -> tuple[str, ...]:
    """The execution mode as the variable that the vendor's software reads."""
    if text not in ("0", "1"):
        raise ValueError("is none of 0, 1")
    compiled = values.get("HL_USE_TORCH_COMPILE", "0").lower()
    if text == "1" and _TRUTH.get(compiled):
        raise ValueError(f"and HL_USE_TORCH_COMPILE={compiled} exclude each other: torch.compile needs eager mode")
    return ("--export", f"{_LAZY}={text}")


def compiled(text: str, values: Values) -> tuple[str, ...]:
    """Compilation, and eager mode with it."""
    if text.lower() not in _TRUTH:
        raise ValueError(f"is none of {', '.join(_TRUTH)}")
    if not _TRUTH[text.lower()]:
        return ("--use-torch-compile", "false")
    eager = () if "HL_USE_LAZY_MODE" in values else ("--export", f"{_LAZY}=0")
    return ("--use-torch-compile", "true", *eager)


def profiled(text: str, values: Values) -> tuple[str, ...]:
    """Synapse's profiler must be announced before the card is opened."""
    return ("--export", "HABANA_PROFILE=profile_api_with_nics") if text == "hltv" else ()


def checkpoints(text: str, values: Values) -> tuple[str, ...]:
    """Where checkpoints go, if they do."""
    if text not in ("0", "1"):
        raise ValueError("is none of 0, 1")
    return ("--save", values["HL_CHECKPOINTS_DIR"]) if text == "1" else ()


def nonzero(name: str, flag: str, help: str) -> Variable:
    """A number that is given to `flag`, with 0 for none."""
    return row(name, lambda text, values: () if text == "0" else (flag, text), (flag,), help, note="0 is never")


OUTPUT: tuple[Variable, ...] = (
    row(
        *("HL_RESULTS_DIR", lambda text, values: ("--log-json", f"{text}/metrics.jsonl"), ("--log-json",)),
        "folder for all that a run writes",
    ),
    silent("HL_RESULTS_DIR_PREFIX", "folder that HL_RESULTS_DIR is made in", "see HL_RESULTS_DIR"),
    silent("EXP_NAME", "part of the name of HL_RESULTS_DIR", "see HL_RESULTS_DIR"),
    row("HL_SAVE", checkpoints, ("--save",), "1 saves checkpoints", note="nothing is saved"),
    value("HL_SAVE_INTERVAL", "--save-interval", "steps between checkpoints"),
    value("HL_CHECKPOINTS_DIR", "--load", "folder to resume from and, with HL_SAVE=1, to save in"),
    value("HL_TENSORBOARD_DIR", "--tensorboard-dir", "folder for TensorBoard files"),
    value("HL_KILL_SWITCH", "--kill-switch-file", "a file that stops the run when it appears"),
    value("HL_LOG_INTERVAL", "--log-interval", "steps between log lines"),
    nonzero("HL_EXIT_INTERVAL", "--exit-interval", "stop at a multiple of so many steps; 0 is never"),
    truth("HL_UNIV_CP", ("--universal-checkpoint",), (), "without effect: every checkpoint loads in every layout"),
)


def output(values: Mapping[str, str], folder: str) -> dict[str, str]:
    """Defaults of where a run writes: `folder` is named after its settings, so that starting again resumes."""
    results = values.get("HL_RESULTS_DIR", f"{values.get('HL_RESULTS_DIR_PREFIX', '.').rstrip('/')}/out/{folder}")
    return {
        "HL_RESULTS_DIR": results,
        "HL_SAVE": "1",
        "HL_SAVE_INTERVAL": "2000",
        "HL_CHECKPOINTS_DIR": f"{results}/checkpoints",
        "HL_TENSORBOARD_DIR": f"{results}/tensorboard",
        "HL_LOG_INTERVAL": "10",
    }


RECOMPUTE: Mapping[str, tuple[str, ...]] = {
    "0": (),
    "1": ("--recompute-granularity", "full", "--recompute-method", "uniform"),
    "2": ("--recompute-granularity", "selective"),
    "3": ("--recompute-granularity", "mlp"),
    "4": ("--recompute-granularity", "full", "--recompute-method", "uniform"),
}
CKP_ACT = choice(
    *("HL_CKP_ACT", RECOMPUTE, "recompute in the backward pass: 0 nothing, 1 and 4 layers, 2 attention, 3 the MLP")
)
