"""The variables of the LLaMA scripts of AWS's neuronx-distributed, beside the plain names, under Slurm and MPI as well.

Slurm and MPI start such a script once per node; what they say about the nodes takes the place of a list of machines.
"""

from __future__ import annotations

from megatron.config.presets import PRESETS
from megatron.launch.env import PLAIN, Family, Values, Variable, choice, value
from megatron.launch.hostfile import expand_nodelist

_COMPILING_STEPS = "10"  # neuron_parallel_compile needs 10 to 15 to see every graph
_MEASURING_STEPS = "100"


def _polite(name: str, flag: str, help: str) -> Variable:
    """A variable of the cluster, which the user's own override."""
    return Variable(name, lambda text, _: (flag, text), frozenset({flag}), help, gives_way=True)


def _first_host(text: str, values: Values) -> tuple[str, ...]:
    return ("--master-addr", expand_nodelist(text)[0])


def _chunks(text: str, values: Values) -> tuple[str, ...]:
    """Interleaved stages: Megatron counts the layers of a chunk, neuronx-distributed the chunks of a stage."""
    stages, preset = values.get("PP_DEGREE", "1"), values.get("PRESET", "")
    if not (text.isdecimal() and stages.isdecimal() and int(text) and int(stages)) or preset not in PRESETS:
        raise ValueError("and PP_DEGREE must be whole numbers of at least 1, and PRESET a published model")
    if text == "1":
        return ()
    layers, chunks = PRESETS[preset].settings["num_layers"], int(text) * int(stages)
    if layers % chunks:
        raise ValueError(f"x PP_DEGREE={stages} = {chunks}: must divide the {layers} layers of {preset}")
    return ("--num-layers-per-virtual-pipeline-stage", str(layers // chunks))


def _stop_after(steps: str) -> tuple[str, ...]:
    return ("--exit-interval", steps)


def _until(steps: str) -> dict[str, tuple[str, ...]]:
    """A few steps of the real run, where 1 asks for them: with other settings the graphs would be others."""
    return {"0": (), "1": _stop_after(steps)}


def _saving(text: str, values: Values) -> tuple[str, ...]:
    """Weights are made up while graphs are collected, so they are not kept."""
    if any(values.get(name, "0") != "0" for name in ("COMPILE_ONLY", "NEURON_EXTRACT_GRAPHS_ONLY")):
        return ()
    return ("--save", text, "--load", text)


def _precision(text: str, values: Values) -> tuple[str, ...]:
    if text != "1":
        raise ValueError("is not possible: the optimizer always has float32 weights and sums float32 gradients")
    return ()


def _early(text: str, values: Values) -> tuple[str, ...]:
    return () if text == "0" else _stop_after(text)


NEURON = Family(
    prefix="",
    variables=(
        *PLAIN.variables,
        value("TP_DEGREE", "--tensor-model-parallel-size", "ranks that share each layer; as TP"),
        value("PP_DEGREE", "--pipeline-model-parallel-size", "pipeline stages; as PP"),
        Variable(
            *("VPP_DEGREE", _chunks, frozenset({"--num-layers-per-virtual-pipeline-stage"})),
            "chunks of layers in a stage",
            note="a stage is one chunk",
        ),
        value("GBS", "--global-batch-size", "samples per step over all cores; as GLOBAL_BATCH"),
        Variable(
            *("GPU_COMPATIBLE_PRECISION", _precision, frozenset()),
            "only 1: float32 weights in the optimizer",
            note="the optimizer always has float32 weights",
        ),
        Variable(
            *("CHECKPOINT_DIR", _saving, frozenset({"--save", "--load"})),
            "folder to save checkpoints in and to resume from",
            note="nothing is saved while graphs are compiled",
        ),
        choice("PERF_TEST", _until(_MEASURING_STEPS), f"1 stops after {_MEASURING_STEPS} steps"),
        Variable(
            "EARLY_EXIT_STEPS", _early, frozenset({"--exit-interval"}), "stop after so many steps", note="0 is off"
        ),
        choice(
            *("COMPILE_ONLY", _until(_COMPILING_STEPS)),
            f"1 stops after {_COMPILING_STEPS} steps, without checkpoints: all graphs are compiled and cached",
        ),
        choice("NEURON_EXTRACT_GRAPHS_ONLY", _until(_COMPILING_STEPS), "the same; neuron_parallel_compile sets it"),
        _polite("SLURM_NTASKS", "--num-nodes", "machines, one task on each"),
        _polite("SLURM_NODEID", "--node-rank", "number of this machine"),
        Variable(
            *("SLURM_JOB_NODELIST", _first_host, frozenset({"--master-addr"})),
            "the first of its machines is where all processes meet",
            gives_way=True,
        ),
        _polite("OMPI_COMM_WORLD_SIZE", "--num-nodes", "machines, one process of MPI on each"),
        _polite("OMPI_COMM_WORLD_RANK", "--node-rank", "number of this machine"),
    ),
)
