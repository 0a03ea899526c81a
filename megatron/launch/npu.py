"""The variables of AscendSpeed's launch scripts for LLaMA, beside the plain names."""

from __future__ import annotations

from megatron.launch.env import PLAIN, Family, Values, Variable, value


def _loss_scale(text: str, values: Values) -> tuple[str, ...]:
    """Only float16 has a loss scale, so that another PRECISION can do without the script's."""
    return ("--initial-loss-scale", text) if values.get("PRECISION") == "fp16" else ()


def _weights(text: str, values: Values) -> tuple[str, ...]:
    """A run that was to start from weights does not start without them."""
    return ("--load", text, "--exit-on-missing-checkpoint")


def _misspelt(text: str, values: Values) -> tuple[str, ...]:
    raise ValueError("is a slip of the pen in an old README: the variable is HCCL_CONNECT_TIMEOUT")


_DATA = ("--data-path", "--train-data-path", "--valid-data-path", "--test-data-path")
ASCEND = Family(
    prefix="",
    variables=(
        *PLAIN.variables,
        Variable("DATA", lambda text, _: ("--data-path", text), frozenset(_DATA), "prefix of .bin/.idx; as DATA_PATH"),
        value("TOKENIZER_PATH", "--tokenizer-model", "folder of the tokenizer; as TOKENIZER_MODEL"),
        Variable(
            "CHECKPOINT", _weights, frozenset({"--load"}), "folder of the checkpoint to start from, which must be there"
        ),
        Variable("SAVE", lambda text, _: ("--load", text), frozenset({"--load"}), "", gives_way=True),
        value("NNODES", "--num-nodes", "machines; as NUM_NODES"),
        value("NPUS_PER_NODE", "--nproc-per-node", "NPUs per machine; as NPROC"),
        value("MBS", "--micro-batch-size", "samples per NPU at once; as MICRO_BATCH"),
        value("GBS", "--global-batch-size", "samples per step over all NPUs; as GLOBAL_BATCH"),
        Variable(
            *("INITIAL_LOSS_SCALE", _loss_scale, frozenset({"--initial-loss-scale"})),
            "first value of the loss scale of fp16",
            note="only fp16 has a loss scale",
        ),
        Variable("HEEL_CONNECT_TIMEOUT", _misspelt, frozenset(), "refused: it is HCCL_CONNECT_TIMEOUT"),
    ),
)
