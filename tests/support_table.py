"""Which test shows which feature on which device: docs/devices.md is made from this table.

    python -m tests.support_table

How strong the evidence is follows from where the test lies, not from what anybody says about it.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "devices.md"
DEVICES = ("cpu", "cuda", "hpu", "npu", "neuron", "neuron_xla")
SIMULATED = ("hpu", "npu", "neuron")
SEEN = ("cpu",)
"""Devices whose hardware the tests have run on."""

EVIDENCE = {
    "hardware": "the real device computes",
    "not run yet": "the test needs a GPU and is skipped, saying so, where none is; there has been none so far",
    "vendor software": "the vendor's own package without its chip: schemas, shapes and gradients; numbers from "
    "PyTorch/XLA only, on its CPU",
    "simulated": "torch takes it for real, the vendor's package is faked: [what that shows](simulated-devices.md)",
    "contract": "calls are compared with published names and signatures; nothing is computed on the device",
    "refused": "cannot be had on the device, and the message says so",
}


@dataclass(frozen=True)
class Feature:
    """A row: what works, and device -> `file::function` of the test that shows it; "!" in front: shows its refusal."""

    name: str
    tests: Mapping[str, str]


def _on(devices: tuple[str, ...], test: str) -> dict[str, str]:
    return dict.fromkeys(devices, test)


_RUNS = "tests/sim/test_training.py::"
_GPU = "tests/training/test_run_gpu.py::"
_LAUNCHERS = "tests/sim/test_launchers.py::test_launcher_on_the_simulated_device_equals_the_cpus"
FEATURES = (
    Feature(
        "every kernel against its definition in float64",
        {
            **_on(("cpu", "cuda"), "tests/ops/test_implementations.py::test_error_is_within_the_registered_tolerance"),
            **_on(SIMULATED, "tests/ops/test_simulated.py::test_kernel_is_right_and_stays_on_the_device"),
        },
    ),
    Feature(
        "calls of the vendor's kernels fit the vendor's software",
        {
            "cuda": "tests/ops/test_cuda_adapters.py::test_arguments_reach_the_right_place",
            "hpu": "tests/sim/test_vendor_packages.py::test_wrong_calls_of_habana_frameworks_are_refused",
            "npu": "tests/ops/test_npu_contract.py::test_our_calls_fit_the_real_schemas_and_shapes",
            "neuron_xla": "tests/accelerators/test_neuron_xla.py::"
            "test_the_graph_is_cut_after_every_micro_step_and_waited_for_when_asked",
        },
    ),
    Feature(
        "a LLaMA forward and backward",
        {
            "cpu": "tests/training/test_parity.py::test_layout_equals_one_process",
            "cuda": "tests/model/test_gpt_gpu.py::test_loss_and_gradients_are_those_of_the_cpu",
            **_on(SIMULATED, "tests/sim/test_llama.py::test_model_equals_the_cpus_without_a_detour_by_the_host"),
        },
    ),
    Feature(
        "the same through the vendor's software",
        {"npu": "tests/ops/test_npu_contract.py::test_a_llama_runs_forward_and_backward_through_the_real_package"},
    ),
    Feature(
        "training, alone, sharded (ZeRO 3) and TP2 x PP2",
        {
            "cpu": "tests/training/test_parity.py::test_every_layout_and_engine_equals_one_process",
            **_on(SIMULATED, f"{_RUNS}test_run_equals_the_cpus"),
            "neuron_xla": "!tests/training/test_without_meshes.py::"
            "test_what_needs_more_than_sums_is_refused_by_every_flag_that_asks_for_it",
        },
    ),
    Feature(
        "training on one core, and going on from a checkpoint of the CPU",
        {
            "neuron_xla": "tests/accelerators/test_xla_compilation.py::"
            "test_the_trainer_gives_the_losses_of_the_cpu_and_goes_on_from_its_checkpoints",
        },
    ),
    Feature(
        "TP2 x DP2 with sequence parallelism and all state on every rank, and such checkpoints",
        {
            "cpu": "tests/training/test_without_meshes.py::"
            "test_training_and_checkpoints_are_those_of_a_device_with_meshes",
            "neuron_xla": "tests/accelerators/test_xla_compilation.py::"
            "test_four_cores_have_the_losses_of_the_cpu_and_go_on_from_its_checkpoints",
        },
    ),
    Feature(
        "nothing computed by the host, nothing compiled again",
        _on(SIMULATED, f"{_RUNS}test_a_step_stays_on_the_device_and_compiles_nothing"),
    ),
    Feature(
        "bfloat16",
        {
            "cpu": "tests/training/test_parity.py::test_bfloat16_follows_float32",
            "cuda": f"{_GPU}test_bfloat16_stays_close",
            **_on(SIMULATED, f"{_RUNS}test_bfloat16_run_stays_close"),
        },
    ),
    Feature(
        "training with 8-bit layers",
        {
            "cpu": "tests/training/test_eight_bit.py::test_loss_is_close_to_16_bits",
            "cuda": f"{_GPU}test_eight_bits_stay_close",
            "hpu": "tests/sim/test_eight_bit.py::test_training_equals_the_cpus_also_in_a_pipeline_with_recomputation",
            "npu": "!tests/sim/test_eight_bit.py::test_devices_without_8_bit_numbers_refuse_them",
        },
    ),
    Feature(
        "8-bit layers through the vendor's transformer engine",
        {
            "cuda": "tests/ops/test_engine_linear.py::test_products_are_those_of_the_rounded_numbers",
            "hpu": "tests/sim/test_eight_bit.py::test_the_engine_computes_what_the_definition_says",
        },
    ),
    Feature(
        "DeepSpeed's engine",
        {
            "cpu": "tests/training/test_parity.py::test_every_layout_and_engine_equals_one_process",
            "cuda": f"{_GPU}test_every_engine_equals_the_cpus",
            **_on(("hpu", "npu"), f"{_RUNS}test_deepspeed_with_its_own_accelerator_equals_the_cpus"),
            "neuron": f"!{_RUNS}test_deepspeed_is_refused_where_it_has_no_accelerator",
            "neuron_xla": "!tests/accelerators/test_vendor_devices.py::test_deepspeed_knows_some_of_them",
        },
    ),
    Feature(
        "a checkpoint of the device continues on a CPU, and back",
        {
            "cuda": f"{_GPU}test_a_checkpoint_goes_on_where_it_came_from_and_on_the_other_device",
            **_on(SIMULATED, f"{_RUNS}test_a_checkpoint_of_the_device_continues_on_the_cpu_and_back"),
        },
    ),
    Feature(
        "text written token by token",
        {
            "cpu": "tests/generation/test_generate.py::test_greedy_equals_hugging_face",
            **_on(SIMULATED, "tests/sim/test_generation.py::test_text_equals_the_cpus"),
        },
    ),
    Feature(
        "LLaMA's launch script, TP2 x PP2 and ZeRO",
        {
            "cpu": "tests/examples/test_examples.py::test_cpu_example_from_text_to_picture_and_again",
            **_on(SIMULATED, _LAUNCHERS),
        },
    ),
    Feature(
        "torch.compile",
        {
            "cpu": "tests/training/test_run.py::test_compiled_layers_give_the_same_losses",
            "cuda": f"{_GPU}test_compiled_layers_equal_the_cpus",
            "hpu": f"!{_RUNS}test_lazy_gaudi_cannot_compile",
            "neuron": f"{_RUNS}test_compiled_layers_equal_the_cpus",
        },
    ),
    Feature(
        "lazy mode: graphs cut once per micro-step",
        {
            "hpu": f"{_RUNS}test_lazy_gaudi_cuts_its_graph_once_per_micro_step_and_update",
            "neuron_xla": "tests/accelerators/test_xla_compilation.py::"
            "test_steps_are_compiled_once_and_give_the_losses_of_plain_torch",
        },
    ),
    Feature(
        "CUDA code through the vendor's migration layer",
        {
            "hpu": "tests/patches/test_patches.py::test_bloom_through_gaudis_migration_toolkit",
            "npu": "tests/patches/test_patches.py::test_llama_with_deepspeed_through_ascends_transfer_to_npu",
            "neuron_xla": "tests/patches/test_patches.py::test_llama_through_pytorch_xla",
        },
    ),
    Feature(
        "several machines, and a check of them",
        {"cpu": "tests/launch/test_nodes.py::test_two_nodes_train_as_one_process_does"},
    ),
    Feature(
        "two nodes through Slurm, MPI, and ssh with DeepSpeed's launcher (`bash tests/cluster/run.sh`)",
        {
            "cpu": "tests/cluster/test_cluster.py::test_training_on_two_nodes_has_the_losses_of_one_process",
            "neuron": "tests/cluster/test_cluster.py::test_trainiums_script_is_started_once_per_node",
        },
    ),
)


def evidence(device: str, test: str) -> str:
    """The word for how strong a test is."""
    if test.startswith("!"):
        return "refused"
    if "test_npu_contract" in test or "test_xla_compilation" in test:
        return "vendor software"
    if device in SIMULATED or test.startswith(("tests/sim/", "tests/patches/")):
        return "simulated"
    if device in SEEN:
        return "hardware"
    return "not run yet" if any(word in test for word in ("test_implementations", "_gpu")) else "contract"


def page() -> str:
    """docs/devices.md."""
    lines = [
        "# Devices",
        "",
        "What is shown to work where, and by what; `python -m tests.support_table` makes this page from those tests.",
        "No test has ever run on a GPU or on Gaudi, Ascend or Trainium hardware.",
        "",
        f"| | {' | '.join(f'`{device}`' for device in DEVICES)} |",
        "|---|" + "---|" * len(DEVICES),
    ]
    lines += [
        f"| {feature.name} | {' | '.join(_cell(feature, device) for device in DEVICES)} |" for feature in FEATURES
    ]
    lines += ["", "| evidence | what it means |", "|---|---|"]
    lines += [f"| {word} | {meaning} |" for word, meaning in EVIDENCE.items()]
    return "\n".join(lines) + "\n"


def _cell(feature: Feature, device: str) -> str:
    test = feature.tests.get(device)
    if test is None:
        return "-"
    return f"[{evidence(device, test)}](../{test.lstrip('!').partition('::')[0]})"


def missing() -> list[str]:
    """Tests of the table that do not exist."""
    named = {test.lstrip("!") for feature in FEATURES for test in feature.tests.values()}
    return sorted(name for name in named if not _exists(*name.split("::")))


def _exists(file: str, function: str) -> bool:
    path = ROOT / file
    tree = ast.parse(path.read_text()) if path.is_file() else ast.Module([], [])
    return function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


if __name__ == "__main__":
    PAGE.write_text(page())
    sys.exit(0)
