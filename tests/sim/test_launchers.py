"""The LLaMA launch scripts, scaled down, from the shell to the loss: TP2 x PP2 on a simulated device, one CPU process.

The scripts find the simulated device as they would find a real one: the vendor's package is on the path.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from megatron.data.indexed_writer import IndexedDatasetWriter
from megatron.training.metrics import read_metrics
from tests.parity import FLOAT32_TOLERANCE, difference
from tests.sim.build import ROOT, Device
from tests.sim.run import environment, need
from tests.support import free_port

pytestmark = pytest.mark.slow

STEPS = 3
SMALL = (
    *("--num-layers", "4", "--hidden-size", "64", "--num-attention-heads", "8", "--num-key-value-heads", "4"),
    *("--ffn-hidden-size", "96", "--max-position-embeddings", "32", "--make-vocab-size-divisible-by", "8"),
    *("--eval-iters", "0", "--split", "100,0,0"),
    *("--init-method-std", "0.1", "--lr", "1e-3", "--min-lr", "0", "--lr-decay-iters", "20", "--log-interval", "1"),
)


@dataclass(frozen=True)
class Launcher:
    """A script, what makes its run small, and its names for the layout; {} stands for a folder of the run."""

    script: str
    small: Mapping[str, str]
    parallel: Mapping[str, str]
    single: Mapping[str, str]
    flags: tuple[str, ...] = ("--lr-warmup-iters", "1")


LAUNCHERS: dict[Device, Launcher] = {
    "hpu": Launcher(
        "examples/hpu/run_llama.sh",
        {
            **{"HL_SEQ_LEN": "32", "HL_GBS": "8", "HL_MICRO_BATCH": "2", "HL_TRAIN_ITERS": "3", "HL_SAVE": "0"},
            **{"HL_RESULTS_DIR": "{}", "HL_DATA_DIR_ROOT": "{}/..", "HL_DATA_FILE_PREFIX": "corpus"},
            **{"HL_TOKENIZER_TYPE": "HFTokenizer", "HL_TOKENIZER_MODEL": "{}/../words"},
        },
        {"HL_DEVICES_PER_NODE": "4", "HL_DP": "1", "HL_TP": "2", "HL_PP": "2", "HL_USE_FUSED_SDPA": "1"},
        {"HL_DEVICES_PER_NODE": "1", "HL_DP": "1", "HL_TP": "1", "HL_PP": "1"},
    ),
    "npu": Launcher(
        "examples/npu/pretrain_llama_13B_ptd_8p.sh",
        {
            **{"SEQ_LENGTH": "32", "GBS": "8", "MBS": "2", "TRAIN_ITERS": "3", "SAVE_INTERVAL": "100"},
            **{"SAVE": "{}/saved", "DATA_PATH": "{}/../corpus", "TOKENIZER_PATH": "{}/../words"},
        },
        {"NPUS_PER_NODE": "4", "TP": "2", "PP": "2"},
        {"NPUS_PER_NODE": "1", "TP": "1", "PP": "1"},
        ("--recompute-num-layers", "1"),
    ),
    "neuron": Launcher(
        "examples/neuron/run_llama2_13B_tp_pp.sh",
        {
            **{"SEQ_LENGTH": "32", "GBS": "8", "MICRO_BATCH": "2", "TRAIN_ITERS": "3", "SAVE_INTERVAL": "100"},
            **{"CHECKPOINT_DIR": "{}/saved", "DATA_PATH": "{}/../corpus"},
            **{"TOKENIZER_TYPE": "HuggingFaceTokenizer", "TOKENIZER_MODEL": "{}/../words"},
        },
        {"NPROC": "4", "TP_DEGREE": "2", "PP_DEGREE": "2"},
        {"NPROC": "1", "TP_DEGREE": "1", "PP_DEGREE": "1"},
    ),
}


def _write_data(folder: Path) -> None:
    """A tokenizer that knows bytes, in Hugging Face's form, and a corpus."""
    (folder / "words").mkdir()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    engine = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    engine.add_special_tokens(["<eod>"])
    engine.save(str(folder / "words" / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eod>"}
    (folder / "words" / "tokenizer_config.json").write_text(json.dumps(settings))
    generator = np.random.default_rng(0)
    with IndexedDatasetWriter(folder / "corpus", np.uint16) as writer:
        for _ in range(60):
            writer.add_document(generator.integers(0, 100, generator.integers(5, 60), dtype=np.uint16))


def _launch(launcher: Launcher, folder: Path, layout: Mapping[str, str], found: Mapping[str, str]) -> tuple[str, list]:
    """Output and training records of a run of the script in a layout, in an environment that has `found`."""
    folder.mkdir()
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "XDG_CACHE_HOME") if name in os.environ}
    variables = {
        **kept,
        **{"MEGATRON_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "PRECISION": "fp32"},
        **{name: value.format(folder) for name, value in launcher.small.items()},
        **{"MASTER_PORT": str(free_port()), **layout, **found},
    }
    flags = [*SMALL, *launcher.flags, "--log-json", str(folder / "metrics.jsonl")]
    done = subprocess.run(
        ["bash", launcher.script, *flags],
        cwd=ROOT,
        env=variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout, [record for record in read_metrics(folder / "metrics.jsonl") if record["kind"] == "train"]


@pytest.mark.parametrize("device", LAUNCHERS)
def test_launcher_on_the_simulated_device_equals_the_cpus(device, tmp_path):
    need(device)
    launcher = LAUNCHERS[device]
    _write_data(tmp_path)
    output, found = _launch(launcher, tmp_path / "device", launcher.parallel, environment(device))
    _, expected = _launch(launcher, tmp_path / "cpu", launcher.single, {"DEVICE": "cpu"})
    assert f"device: {device}, " in output and "(simulated)" in output
    assert len(found) == len(expected) == STEPS
    for name in ("lm_loss", "grad_norm"):
        assert difference([r[name] for r in found], [r[name] for r in expected]) <= FLOAT32_TOLERANCE
