"""Layouts that cannot be: one message each, that says the value, what is allowed and the flag to change."""

from __future__ import annotations

import pytest

from megatron.config.parser import ConfigError
from tests.config.commands import config

RANKS = 4
_PIPELINE = "--deepspeed --pipeline-model-parallel-size 2"
TABLE = {
    "tensor parallelism does not divide the heads": (
        "--tensor-model-parallel-size 4 --num-attention-heads 6 --hidden-size 96",
        "--num-attention-heads 6: must be a multiple of --tensor-model-parallel-size 4",
    ),
    "nor the key-value heads, nor they it": (
        "--tensor-model-parallel-size 4 --num-attention-heads 12 --hidden-size 96 --num-query-groups 6",
        "--num-key-value-heads 6: must be a multiple of --tensor-model-parallel-size 4, or divide it (then ranks hold "
        "copies of heads)",
    ),
    "tensor parallelism does not divide the feed-forward block": (
        "--tensor-model-parallel-size 2 --ffn-hidden-size 101",
        "--ffn-hidden-size 101: must be a multiple of --tensor-model-parallel-size 2",
    ),
    "another number of copies of key-value heads": (
        "--tensor-model-parallel-size 4 --num-query-groups 2 --kv_replicator 4",
        "--kv-replicator 4: must be 2, for --num-key-value-heads 2 and --tensor-model-parallel-size 4; it can be left "
        "out",
    ),
    "micro-batches that do not fill the pipeline's step": (
        "--pipeline-model-parallel-size 2 --global-batch-size 6",
        "--global-batch-size 6: must be a multiple of 4 = --micro-batch-size 2 x data-parallel size 2",
    ),
    "layers that do not fill the stages": (
        "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 3",
        "--num-layers 4: must be a multiple of the 6 pipeline stages; change one of the numbers, or give "
        "--decoder-first-pipeline-num-layers, --decoder-last-pipeline-num-layers or --pipeline-model-parallel-layout",
    ),
    "ZeRO-2 with DeepSpeed's pipeline": (
        f"{_PIPELINE} --zero-stage 2",
        "--zero-stage 2: must be 1 with --deepspeed and --pipeline-model-parallel-size 2; the native engine has "
        "pipelines with stages 0 to 3",
    ),
    "ZeRO-3 with DeepSpeed's pipeline": (
        f"{_PIPELINE} --zero-stage 3",
        "--zero-stage 3: must be 1 with --deepspeed and --pipeline-model-parallel-size 2; the native engine has "
        "pipelines with stages 0 to 3",
    ),
    "an offloaded optimizer without DeepSpeed": (
        "--cpu-optimizer",
        "--cpu-optimizer: only with --deepspeed; the native engine keeps its state on the devices",
    ),
    "offloaded parameters without DeepSpeed": (
        "--remote-device cpu --zero-stage 3",
        "--remote-device cpu: only with --deepspeed and --zero-stage 3",
    ),
    "a list of recomputed layers for other stages": (
        "--pipeline-model-parallel-size 2 --recomputation-layer-num 2 1 1",
        "--recomputation-layer-num 2 1 1: must be 2 numbers, one for each pipeline stage",
    ),
}


@pytest.mark.parametrize("case", TABLE)
def test_one_message(case):
    flags, message = TABLE[case]
    with pytest.raises(ConfigError) as caught:
        config(*flags.split(), world_size=RANKS)
    assert caught.value.problems == (message,)
