"""Runs the launch scripts, scaled down, from the shell to the loss, on a simulated device or on the CPU.

The scripts find a simulated device as they would find a real one: the vendor's package is on the path.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from megatron.data.indexed_writer import IndexedDatasetWriter
from megatron.training.metrics import read_metrics
from tests.sim.build import ROOT, Device
from tests.sim.run import Counts, environment
from tests.sim.runtime import REPORT
from tests.support import free_port

STEPS = 3
SMALL = (
    *("--num-layers", "4", "--hidden-size", "64", "--num-attention-heads", "8", "--num-key-value-heads", "4"),
    *("--ffn-hidden-size", "96", "--max-position-embeddings", "32", "--make-vocab-size-divisible-by", "8"),
    *("--eval-iters", "0", "--split", "100,0,0"),
    *("--init-method-std", "0.1", "--lr", "1e-3", "--min-lr", "0", "--lr-decay-iters", "20", "--log-interval", "1"),
)


@dataclass(frozen=True, kw_only=True)
class Script:
    """A launch script and what makes its run small; {} stands for a folder of the run, beside the data."""

    path: str
    variables: Mapping[str, str]
    layouts: Mapping[str, Mapping[str, str]]
    """Its names for the layouts; "one" is one process."""
    flags: tuple[str, ...]


GAUDI_LLAMA = Script(
    path="examples/hpu/run_llama.sh",
    variables={
        **{"HL_SEQ_LEN": "32", "HL_GBS": "8", "HL_MICRO_BATCH": "2", "HL_TRAIN_ITERS": "3", "HL_SAVE": "0"},
        **{"HL_RESULTS_DIR": "{}", "HL_DATA_DIR_ROOT": "{}/..", "HL_DATA_FILE_PREFIX": "corpus"},
        **{"HL_TOKENIZER_TYPE": "HFTokenizer", "HL_TOKENIZER_MODEL": "{}/../words"},
    },
    layouts={
        "one": {"HL_DEVICES_PER_NODE": "1", "HL_DP": "1", "HL_TP": "1", "HL_PP": "1"},
        "TP2 PP2": {"HL_DEVICES_PER_NODE": "4", "HL_DP": "1", "HL_TP": "2", "HL_PP": "2", "HL_USE_FUSED_SDPA": "1"},
        "DP2 ZeRO": {"HL_DEVICES_PER_NODE": "2", "HL_DP": "2", "HL_TP": "1", "HL_PP": "1", "HL_ZERO_STAGE": "2"},
    },
    flags=(*SMALL, "--lr-warmup-iters", "1"),
)
ASCEND_VARIABLES = {
    **{"SEQ_LENGTH": "32", "GBS": "8", "MBS": "2", "TRAIN_ITERS": "3", "SAVE_INTERVAL": "100"},
    **{"SAVE": "{}/saved", "DATA_PATH": "{}/../corpus", "TOKENIZER_PATH": "{}/../words"},
}
ASCEND_ONE = {"NPUS_PER_NODE": "1", "TP": "1", "PP": "1", "ENGINE": "native"}
ASCEND_PTD = Script(
    path="examples/npu/pretrain_llama_13B_ptd_8p.sh",
    variables=ASCEND_VARIABLES,
    layouts={"one": ASCEND_ONE, "TP2 PP2": {"NPUS_PER_NODE": "4", "TP": "2", "PP": "2"}},
    flags=(*SMALL, "--recompute-num-layers", "1"),
)
ASCEND_ZERO = Script(
    path="examples/npu/pretrain_llama_7B_zero_8p.sh",
    variables=ASCEND_VARIABLES,
    layouts={"one": {**ASCEND_ONE, "ZERO_STAGE": "0"}, "DP2 ZeRO": {"NPUS_PER_NODE": "2"}},
    flags=SMALL,
)
TRAINIUM_LLAMA = Script(
    path="examples/neuron/run_llama2_13B_tp_pp.sh",
    variables={
        **{"SEQ_LENGTH": "32", "GBS": "8", "MICRO_BATCH": "2", "TRAIN_ITERS": "3", "SAVE_INTERVAL": "100"},
        **{"CHECKPOINT_DIR": "{}/saved", "DATA_PATH": "{}/../corpus"},
        **{"TOKENIZER_TYPE": "HuggingFaceTokenizer", "TOKENIZER_MODEL": "{}/../words"},
    },
    layouts={
        "one": {"NPROC": "1", "TP_DEGREE": "1", "PP_DEGREE": "1"},
        "TP2 PP2": {"NPROC": "4", "TP_DEGREE": "2", "PP_DEGREE": "2"},
        "DP2 ZeRO": {"NPROC": "2", "TP_DEGREE": "1", "PP_DEGREE": "1"},
    },
    flags=(*SMALL, "--lr-warmup-iters", "1"),
)
# BLOOM's corpus and tokenizer have fixed names in one folder; made-up data does without.
GAUDI_BLOOM = Script(
    path="examples/hpu/run_bloom13b.sh",
    variables={
        **{"HL_NUM_LAYERS": "4", "HL_MICRO_BATCH": "2", "HL_SAVE": "0", "HL_RAMPUP_BS": "0", "HL_LOG_INTERVAL": "1"},
        **{"HL_RESULTS_DIR": "{}", "HL_DATA_DIR_ROOT": "{}"},
    },
    layouts={
        "one": {"HL_DEVICES_PER_NODE": "1", "HL_DP": "1", "HL_TP": "1", "HL_PP": "1"},
        "TP2 PP2": {"HL_NUM_NODES": "1", "HL_PP": "2", "HL_TP": "2", "HL_DP": "1"},
    },
    flags=(
        *("--hidden-size", "64", "--ffn-hidden-size", "256", "--num-attention-heads", "8", "--seq-length", "32"),
        *("--num-key-value-heads", "8"),
        *("--max-position-embeddings", "32", "--global-batch-size", "8", "--train-samples", "24"),
        *("--lr-warmup-samples", "8", "--lr-decay-samples", "80", "--lr", "1e-3", "--min-lr", "0"),
        *("--init-method-std", "0.1", "--eval-iters", "0", "--make-vocab-size-divisible-by", "8"),
        *("--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "99"),
    ),
)


def write_data(folder: Path) -> None:
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


def _errors(text: str) -> str:
    """What the processes said, without what torchrun says about it."""
    return text.partition('\nTraceback (most recent call last):\n  File "<frozen runpy>"')[0][-6000:]


@dataclass(frozen=True)
class Run:
    """What a run of a script left behind."""

    output: str
    records: Sequence[Mapping[str, Any]]
    """Of its training steps."""
    metrics: Path
    counts: Sequence[Counts]
    """What happened on the simulated devices, in rank order; empty on the CPU."""


def launch(
    script: Script,
    folder: Path,
    layout: str,
    *,
    device: Device | None,
    root: Path = ROOT,
    before: Sequence[str] = (),
    **variables: str,
) -> Run:
    """Run a script.

    Args:
        script: which.
        folder: for all that the run writes; must not exist.
        layout: one of the script's.
        device: simulated device to find; None = run on the CPU.
        root: the repository, or a copy of it.
        before: words of another program that starts the script.
        variables: further ones.

    Raises:
        AssertionError: the run failed; with the end of its output.
    """
    folder.mkdir()
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "XDG_CACHE_HOME") if name in os.environ}
    found = {"DEVICE": "cpu"} if device is None else environment(device)
    environ = {
        **kept,
        **{"MEGATRON_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "PRECISION": "fp32", REPORT: str(folder)},
        **{name: value.format(folder) for name, value in script.variables.items()},
        **{"MASTER_PORT": str(free_port()), **script.layouts[layout], **found, **variables},
    }
    metrics = folder / "metrics.jsonl"
    done = subprocess.run(
        [*before, "bash", script.path, *script.flags, "--log-json", str(metrics)],
        cwd=root,
        env=environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{_errors(done.stderr)}"
    records = [record for record in read_metrics(metrics) if record["kind"] == "train"]
    counters = [json.loads(path.read_text()) for path in sorted(folder.glob("rank_*.json"))]
    return Run(done.stdout, records, metrics, [Counts.of(counter) for counter in counters])
