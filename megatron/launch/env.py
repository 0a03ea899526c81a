"""Environment variables of launch scripts as data: each row says which flags a variable stands for.

A family of variables is one table. The plain family has names without a prefix (``TP=2 LR=3e-4``); a family that
shares a prefix can also be policed: a variable that has the prefix but no row is an error naming the nearest one.
The families of vendors' scripts also have defaults, which depend on the variables that are set.
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Values = Mapping[str, str]
"""Name -> value of the variables of a family: those that are set, and the defaults of the others."""


def no_defaults(values: Values) -> Values:
    """The defaults of a family in which unset variables mean nothing."""
    return {}


@dataclass(frozen=True)
class Variable:
    """One environment variable."""

    name: str
    flags: Callable[[str, Values], tuple[str, ...]]
    """Its value, and those of the whole family -> flags of the trainer or the launcher.

    Raises ValueError with what is allowed.
    """
    decides: frozenset[str]
    """Flags that this variable decides: given on the command line, any of them overrides the whole variable."""
    help: str
    """Empty for further rows of a name."""
    gives_way: bool = False
    """Other variables that decide the same flag override this one; otherwise two that differ are an error."""
    note: str = ""
    """What to say where no flag follows from a value."""
    replaced_by: frozenset[str] = frozenset()
    """Flags beside which a default of this variable makes no sense, besides those it decides."""


@dataclass(frozen=True)
class Family:
    """The variables that one kind of launch script is driven by."""

    prefix: str
    """What names start with that no other program uses; empty for the plain family."""
    variables: tuple[Variable, ...]
    defaults: Callable[[Values], Values] = no_defaults
    """Values of unset variables, given the set ones; raises ValueError with whole sentences."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One variable that was set, and what became of it."""

    name: str
    value: str
    flags: tuple[str, ...]
    """Empty when overridden."""
    overridden: bool
    """By the command line, or by a variable that it gives way to."""
    decides: frozenset[str]
    is_default: bool = False
    """Not set, but a default of the family."""
    note: str = ""
    """Why no flag follows, where the table says it."""


def value(name: str, flag: str, help: str) -> Variable:
    """A variable whose value follows `flag`."""
    return Variable(name, lambda text, _: (flag, text), frozenset({flag}), help)


def words(name: str, flag: str, help: str, *, also_decides: Sequence[str] = ()) -> Variable:
    """A variable whose value is split like a shell does, for flags that take several values."""
    return Variable(name, lambda text, _: (flag, *shlex.split(text)), frozenset({flag, *also_decides}), help)


def choice(name: str, options: Mapping[str, tuple[str, ...]], help: str) -> Variable:
    """A variable with a closed set of values, each standing for some flags."""

    def flags(text: str, _: Values) -> tuple[str, ...]:
        if text not in options:
            raise ValueError(f"is none of {', '.join(options)}")
        return options[text]

    decides = frozenset(flag for option in options.values() for flag in option if flag.startswith("--"))
    return Variable(name, flags, decides, help)


def switch(name: str, flag: str, help: str) -> Variable:
    """A variable that turns `flag` on with 1 and leaves it out with 0."""
    return choice(name, {"1": (flag,), "0": ()}, help)


def inside(name: str, flag: str, subfolder: str, help: str = "") -> Variable:
    """A variable that names a folder, in which `flag` gets its place unless another variable gives it one."""
    return Variable(name, lambda text, _: (flag, f"{text.rstrip('/')}/{subfolder}"), frozenset({flag}), help, True)


PLAIN = Family(
    prefix="",
    variables=(
        value("PRESET", "--preset", "published model, for instance llama3.1-8b"),
        value("DEVICE", "--device", "device to run on: auto, cuda, cpu, ..."),
        choice("ENGINE", {"native": (), "deepspeed": ("--deepspeed",)}, "training engine: native or deepspeed"),
        choice("PRECISION", {"fp32": (), "bf16": ("--bf16",), "fp16": ("--fp16",)}, "fp32, bf16 or fp16"),
        value("ZERO_STAGE", "--zero-stage", "what is sharded over the data-parallel ranks: 0 to 3"),
        value("TP", "--tensor-model-parallel-size", "ranks that share each layer"),
        value("PP", "--pipeline-model-parallel-size", "pipeline stages"),
        value("CP", "--context-parallel-size", "ranks that share each sequence"),
        value("DP", "--data-parallel-size", "copies of the model; sets the number of processes"),
        value("EP", "--moe-expert-parallel-size", "ranks among the copies that share the experts"),
        switch("SEQUENCE_PARALLEL", "--sequence-parallel", "1 shards activations between layers over the TP ranks"),
        words(
            *("DATA_PATH", "--data-path", "prefix of .bin/.idx, or weight and prefix by turns"),
            also_decides=("--train-data-path", "--valid-data-path", "--test-data-path"),
        ),
        value("DATA_CACHE", "--data-cache-path", "folder for the sample indices"),
        value("SPLIT", "--split", "shares of training, validation and test: 969,30,1"),
        value("TOKENIZER_TYPE", "--tokenizer-type", "Megatron's name of the tokenizer"),
        value("TOKENIZER_MODEL", "--tokenizer-model", "file or folder of the tokenizer"),
        value("MICRO_BATCH", "--micro-batch-size", "samples per device at once"),
        value("GLOBAL_BATCH", "--global-batch-size", "samples per step over all devices"),
        value("SEQ_LENGTH", "--seq-length", "tokens per sample"),
        value("TRAIN_ITERS", "--train-iters", "steps"),
        value("LR", "--lr", "peak learning rate"),
        value("MIN_LR", "--min-lr", "learning rate at the end of the decay"),
        value("LR_WARMUP_ITERS", "--lr-warmup-iters", "steps over which the learning rate rises"),
        value("EVAL_INTERVAL", "--eval-interval", "steps between evaluations"),
        value("EVAL_ITERS", "--eval-iters", "batches per evaluation"),
        value("LOG_INTERVAL", "--log-interval", "steps between log lines"),
        value("SAVE_INTERVAL", "--save-interval", "steps between checkpoints"),
        inside("OUTPUT_DIR", "--save", "checkpoints", "folder for checkpoints, TensorBoard files and sample indices"),
        inside("OUTPUT_DIR", "--load", "checkpoints"),
        inside("OUTPUT_DIR", "--tensorboard-dir", "tensorboard"),
        inside("OUTPUT_DIR", "--data-cache-path", "cache"),
        value("SAVE", "--save", "folder to save checkpoints in"),
        value("LOAD", "--load", "folder to resume from"),
        value("TENSORBOARD_DIR", "--tensorboard-dir", "folder for TensorBoard files"),
        value("SEED", "--seed", "seed of the initial weights, the sample order and the dropout"),
        choice(
            "LAUNCHER",
            {name: ("--launcher", name) for name in ("torchrun", "deepspeed", "srun", "mpirun")},
            "torchrun, deepspeed, srun or mpirun",
        ),
        value("SCRIPT", "--script", "program to start; pretrain_gpt.py unless given"),
        value("NPROC", "--nproc-per-node", "processes on each node"),
        value("NUM_GPUS", "--nproc-per-node", "the same, said for accelerators"),
        value("NUM_NODES", "--num-nodes", "machines"),
        value("NODE_RANK", "--node-rank", "number of this machine, from 0"),
        value("HOSTFILE", "--hostfile", "file of `host slots=8` lines"),
        value("MASTER_ADDR", "--master-addr", "address of the first machine"),
        value("MASTER_PORT", "--master-port", "free port of the first machine"),
    ),
)


def plain(*names: str) -> tuple[Variable, ...]:
    """The rows of the plain family with these names, for families that share them."""
    return tuple(variable for variable in PLAIN.variables if variable.name in names)


def flags_of(argv: Sequence[str]) -> frozenset[str]:
    """The flags that occur in `argv`, without values given as `--flag=value`."""
    return frozenset(word.partition("=")[0] for word in argv if word.startswith("--"))


def read(family: Family, env: Mapping[str, str], argv: Sequence[str]) -> tuple[Reading, ...]:
    """The variables of `family` that are set in `env` or have a default, in table order.

    An empty value counts as not set.

    Args:
        family: the table.
        env: the environment.
        argv: the command line, whose flags override variables.

    Raises:
        ValueError: a name of a prefixed family is unknown, a value is not allowed, or two variables set one flag to
            different values; all of them in one message.
    """
    problems = list(_unknown_names(family, env))
    chosen = {variable.name: env[variable.name] for variable in family.variables if env.get(variable.name)}
    try:
        values = {**family.defaults(chosen), **chosen}
    except ValueError as problem:
        raise ValueError("\n".join([*problems, str(problem)])) from None
    given = flags_of(argv)
    present = [variable for variable in family.variables if variable.name in values]
    firm = given.union(*(one.decides for one in present if one.name in chosen and not one.gives_way))
    readings = []
    for variable in present:
        text, is_default = values[variable.name], variable.name not in chosen
        decided = variable.decides | variable.replaced_by if is_default else variable.decides
        overridden = bool(decided & (firm if is_default or variable.gives_way else given))
        try:
            flags = () if overridden else variable.flags(text, values)
        except ValueError as problem:
            problems.append(f"{variable.name}={text} {problem}")
            continue
        readings.append(
            Reading(
                name=variable.name,
                value=text,
                flags=flags,
                overridden=overridden,
                decides=variable.decides,
                is_default=is_default,
                note=variable.note,
            )
        )
    problems += _contradictions(readings)
    if problems:
        raise ValueError("\n".join(problems))
    return tuple(readings)


def _contradictions(readings: Sequence[Reading]) -> list[str]:
    """One sentence for each two variables that decide the same flag differently."""
    in_force = [reading for reading in readings if not reading.overridden and not reading.is_default]
    return [
        f"{one.name}={one.value} and {other.name}={other.value} both decide {min(shared)}: unset one of them"
        for number, one in enumerate(in_force)
        for other in in_force[number + 1 :]
        if one.name != other.name and (shared := one.decides & other.decides) and one.flags != other.flags
    ]


def _unknown_names(family: Family, env: Mapping[str, str]) -> list[str]:
    """One sentence for each set variable that has the prefix of `family` but no row in it."""
    if not family.prefix:
        return []
    known = {variable.name for variable in family.variables}
    sentences = []
    for name in sorted(env):
        if name.startswith(family.prefix) and name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            sentences.append(f"{name}: no such setting" + (f"; the nearest is {near[0]}" if near else ""))
    return sentences
