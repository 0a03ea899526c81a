"""Launches whose dry runs are kept in tests/golden/launch, by the name of the file.

`python -m tests.launch.cases` writes the files anew; look at the difference before you commit it.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.launch.recorded import ROOT, Launch, launch_of, written

FOLDER = ROOT / "tests" / "golden" / "launch"
_HOSTS = "examples/hpu/hostsfile"
_SLURM = {"SLURM_NTASKS": "32", "SLURM_NODEID": "5", "SLURM_JOB_NODELIST": "trn[01-32]"}
_MPI = {"OMPI_COMM_WORLD_SIZE": "32", "OMPI_COMM_WORLD_RANK": "2", "MASTER_ADDR": "trn01"}
_FIRST_OF_FOUR = {"MASTER_ADDR": "n1", "NODE_RANK": "0"}
_OWN = {"DATA_PATH": "mine_text_document", "TOKENIZER_MODEL": "my_tokenizer", "NUM_GPUS": "8"}


@dataclass(frozen=True)
class Case:
    """One launch: a script of examples/ and the variables in front of it."""

    script: str
    world_size: int
    variables: Mapping[str, str] = field(default_factory=dict)

    def launch(self, folder: Path) -> Launch:
        """What the script asks of the launcher."""
        return launch_of(self.script, folder, **self.variables)


# The commands of Intel's README, with this repository's paths.
_GAUDI_13B = {"HL_NUM_NODES": "1", "HL_PP": "2", "HL_TP": "2", "HL_DP": "2"}
_GAUDI_64 = {"HL_HOSTSFILE": _HOSTS, "HL_NUM_NODES": "8", "HL_PP": "2", "HL_TP": "2", "HL_DP": "16"}
_GAUDI_70B = {
    "HL_HOSTSFILE": _HOSTS,
    "HL_LLAMA_VER": "2",
    "HL_LLAMA_MODEL_SIZE": "70",
    "HL_MICRO_BATCH": "1",
    "HL_NUM_NODES": "4",
    "HL_PP": "4",
    "HL_TP": "8",
    "HL_DP": "1",
}
_GAUDI_BLOOM = {"HL_HOSTSFILE": "scripts/hostsfile", "HL_NUM_NODES": "1", "HL_PP": "2", "HL_TP": "4", "HL_DP": "1"}
CASES: Mapping[str, Case] = {
    "hpu_llama1_13b_8": Case("hpu/run_llama.sh", 8, _GAUDI_13B),
    "hpu_llama1_13b_64": Case("hpu/run_llama.sh", 64, _GAUDI_64),
    "hpu_llama2_70b_32": Case("hpu/run_llama.sh", 32, _GAUDI_70B),
    "hpu_llama31_8b": Case("hpu/run_llama.sh", 8, {"HL_LLAMA_VER": "3.1"}),
    "hpu_llama31_8b_schedule": Case("hpu/run_llama_seq_sched.sh", 8),
    "hpu_bloom_13b": Case("hpu/run_bloom13b.sh", 8, _GAUDI_BLOOM),
    "hpu_mixtral": Case("hpu/run_mixtral.sh", 8),
    "gpu_mixtral": Case("gpu/run_mixtral.sh", 8, _OWN),
    "npu_pretrain_7b_zero_8p": Case("npu/pretrain_llama_7B_zero_8p.sh", 8),
    "npu_pretrain_13b_ptd_8p": Case("npu/pretrain_llama_13B_ptd_8p.sh", 8, {"CHECKPOINT": "model_weights"}),
    "npu_pretrain_33b_ptd_32p": Case("npu/pretrain_llama_33B_ptd_32p.sh", 32, _FIRST_OF_FOUR),
    "npu_pretrain_33b_zero_32p": Case("npu/pretrain_llama_33B_zero_32p.sh", 32, _FIRST_OF_FOUR),
    "npu_pretrain_65b_ptd_32p": Case("npu/pretrain_llama_65B_ptd_32p.sh", 32, _FIRST_OF_FOUR),
    "npu_tune_deepspeed_13b": Case("npu/tune_llama_deepspeed_13B.sh", 8, {"CHECKPOINT": "model_weights"}),
    "npu_tune_ptd_13b": Case("npu/tune_llama_ptd_13B.sh", 8, {"CHECKPOINT": "model_weights"}),
    "neuron_llama2_13b_one_node": Case("neuron/run_llama2_13B_tp_pp.sh", 32),
    "neuron_llama2_70b_slurm": Case("neuron/run_llama2_70B_tp_pp.sh", 1024, _SLURM),
    "neuron_llama3_70b_slurm": Case("neuron/run_llama3_70B_tp_pp.sh", 1024, _SLURM),
    "neuron_llama3_70b_mpi": Case("neuron/run_llama3_70B_tp_pp.sh", 1024, _MPI),
    "neuron_llama3_70b_compile_only": Case("neuron/run_llama3_70B_tp_pp.sh", 1024, {**_SLURM, "COMPILE_ONLY": "1"}),
    "gpu_bloom": Case("gpu/run_bloom.sh", 8, _OWN),
    "gpu_benchmark_7b": Case("gpu/benchmark_7B.sh", 8),
    "gpu_benchmark_70b": Case("gpu/benchmark_70B.sh", 32, {"NUM_NODES": "4", **_FIRST_OF_FOUR}),
}


def main() -> int:
    """Write all files anew."""
    FOLDER.mkdir(exist_ok=True)
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            (FOLDER / f"{name}.txt").write_text(written(case.launch(Path(folder))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
