"""tools/plan.py from its command line, on the layouts that it was made for."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.planner.command import main

ROOT = Path(__file__).resolve().parents[2]
SECONDS, MEGABYTES = 60.0, 2000.0
CASES = {
    "LLaMA-2 70B on 32 Gaudi 2": (
        "--preset llama2-70b --world-size 32 --machine gaudi2 --bf16 --tensor-model-parallel-size 8 "
        "--pipeline-model-parallel-size 4 --sequence-parallel --use-distributed-optimizer"
    ),
    "BLOOM 176B on 384 A100": (
        "--preset bloom-176b --world-size 384 --machine a100 --bf16 --tensor-model-parallel-size 4 "
        "--pipeline-model-parallel-size 12 --account-for-embedding-in-pipeline-split "
        "--account-for-loss-in-pipeline-split --use-distributed-optimizer --micro-batch-size 2 "
        "--global-batch-size 2048 --use-flash-attn --recompute-granularity full"
    ),
    "LLaMA 65B on 32 Ascend 910B": (
        "--preset llama1-65b --world-size 32 --machine ascend910b --bf16 --tensor-model-parallel-size 8 "
        "--pipeline-model-parallel-size 4 --sequence-parallel --use-distributed-optimizer --micro-batch-size 2 "
        "--recompute-granularity full"
    ),
    "LLaMA-3.1 70B on 32 trn1 nodes": (
        "--preset llama3.1-70b --world-size 1024 --machine trn1 --bf16 --tensor-model-parallel-size 32 "
        "--pipeline-model-parallel-size 8 --sequence-parallel --use-distributed-optimizer --global-batch-size 1024 "
        "--recompute-granularity selective"
    ),
    "LLaMA-3.1 405B on 1024 H100": (
        "--preset llama3.1-405b --world-size 1024 --machine h100 --bf16 --tensor-model-parallel-size 8 "
        "--pipeline-model-parallel-size 16 --account-for-embedding-in-pipeline-split "
        "--account-for-loss-in-pipeline-split --sequence-parallel --use-distributed-optimizer "
        "--recompute-granularity full --recompute-method block --recompute-num-layers 2"
    ),
    "Mixtral 8x7B on 64 H100": (
        "--preset mixtral-8x7b --world-size 64 --machine h100 --bf16 --seq-length 4096 --use-flash-attn "
        "--pipeline-model-parallel-size 2 --expert-model-parallel-size 8 --use-distributed-optimizer"
    ),
}


def _run(flags):
    lines: list[str] = []
    code = main(flags.split(), lines.append)
    return code, "\n".join(lines)


@pytest.mark.parametrize("name", CASES)
def test_planned_layouts_fit(name):
    code, text = _run(CASES[name])
    assert code == 0, text
    assert "fits: " in text
    assert "tokens/s per rank" in text


def test_copies_of_key_value_heads_are_planned():
    _, text = _run(CASES["LLaMA-3.1 70B on 32 trn1 nodes"] + " --kv_replicator 4")
    assert "training refuses" not in text
    assert re.search(r"heads +all-reduce +gradients of key and value weights +4 ", text), text


def test_a_large_world_in_time_and_memory():
    flags = (
        "--preset llama3.1-405b --world-size 16384 --bf16 --tensor-model-parallel-size 8 --sequence-parallel "
        "--pipeline-model-parallel-size 16 --use-distributed-optimizer --rank 16383 "
        "--account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split --global-batch-size 2048"
    )
    command = [sys.executable, "tools/plan.py", *flags.split()]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False, timeout=SECONDS * 4
    )
    assert done.returncode in (0, 1), done.stderr
    seconds, megabytes = re.search(r"planned in ([\d.]+) s with (\d+) MB", done.stdout).groups()
    assert float(seconds) < SECONDS
    assert float(megabytes) < MEGABYTES
    assert "rank 16383 (tp 7, cp 0, dp 127, pp 15)" in done.stdout


def test_a_layout_that_cannot_be():
    code, text = _run("--preset llama2-7b --world-size 8 --bf16 --tensor-model-parallel-size 3")
    assert code == 1
    assert "this layout cannot be:" in text
    assert "--num-attention-heads 32: must be a multiple of --tensor-model-parallel-size 3" in text
    assert "flags of 1: " in text


def test_search_and_json():
    code, text = _run("--preset llama2-7b --world-size 8 --bf16 --micro-batch-size 1 --search --json")
    assert code == 0
    layouts = json.loads(text)["layouts"]
    assert layouts[0]["tokens_per_second_per_rank"] >= layouts[-1]["tokens_per_second_per_rank"]


def test_search_as_text():
    code, text = _run("--preset llama2-7b --world-size 8 --bf16 --tensor-model-parallel-size 2 --search")
    assert code == 0
    assert "layouts fit on 8 ranks" in text


def test_json_of_a_plan_and_a_chart(tmp_path):
    image = tmp_path / "memory.png"
    code, text = _run(f"{CASES['LLaMA-2 70B on 32 Gaudi 2']} --json --chart {image}")
    assert code == 0
    assert json.loads(text)["fits"]
    assert image.stat().st_size > 10_000


def test_compare_published():
    code, text = _run("--compare-published")
    assert code == 0
    assert re.search(r"median size of an error \d+%", text)
    assert len(json.loads(_run("--compare-published --json")[1])) >= 45


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--preset llama2-7b", "--world-size"),
        ("--preset llama2-7b --world-size 8 --rank 8", "--rank 8: must be from 0 to 7"),
        ("--preset llama2-7b --world-size 8 --machine h1000", "no such machine; the nearest is h100"),
        ("--preset llama2-7b --world-size 8 --serach", "--serach: no such flag"),
    ],
)
def test_wrong_usage(flags, words):
    with pytest.raises(ValueError, match=words):
        main(flags.split())
