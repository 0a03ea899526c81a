"""Settings that the rules about parts of a run refuse; rows of the table in test_rules.py."""

from __future__ import annotations

from megatron.config import phase_rules

TABLE = (
    (
        phase_rules.parts_are_complete,
        "--scheduler-batch-size 8 8",
        "",
        "--scheduler-batch-size --batch-sched-samples: give both",
    ),
    (
        phase_rules.parts_are_complete,
        "--scheduler-batch-size 8 16 --batch-sched-samples 0 1 2",
        "",
        "--scheduler-batch-size 8 16: --batch-sched-samples must have 2 numbers",
    ),
    (
        phase_rules.parts_are_complete,
        "--scheduler-batch-size 8 16 --batch-sched-samples 0 0",
        "",
        "--batch-sched-samples 0 0: must begin with 0 and rise",
    ),
    (
        phase_rules.parts_end_at_the_settings,
        "--scheduler-batch-size 8 16 --batch-sched-samples 0 9 --global-batch-size 32",
        "",
        "--scheduler-batch-size 8 16: must end with --global-batch-size 32",
    ),
    (
        phase_rules.parts_can_be_cut,
        "--scheduler-batch-size 8 16 --batch-sched-samples 0 9 --scheduler-seq-length 5 32",
        "",
        "--scheduler-seq-length 5 32: 5 must divide --seq-length",
    ),
    (
        phase_rules.parts_can_be_cut,
        "--scheduler-batch-size 4 16 --batch-sched-samples 0 9",
        "",
        "--scheduler-batch-size 4 16: 4 must be a multiple of 8",
    ),
    (
        phase_rules.parts_of_a_sequence_can_be_shared,
        "--tensor-model-parallel-size 2 --sequence-parallel --scheduler-batch-size 8 16 --batch-sched-samples 0 9 "
        "--scheduler-seq-length 1 32",
        "",
        "--scheduler-seq-length 1: must be a multiple of 2",
    ),
    (
        phase_rules.parts_of_a_sequence_can_be_shared,
        "--context-parallel-size 2 --scheduler-batch-size 8 16 --batch-sched-samples 0 9 --scheduler-seq-length 16 32",
        "",
        "--scheduler-seq-length 16 32: not with 2 ranks that share every sequence",
    ),
    (
        phase_rules.parts_count_samples,
        "--scheduler-batch-size 8 16 --batch-sched-samples 0 9",
        "",
        "--train-iters: with --scheduler-batch-size give --train-samples",
    ),
    (
        phase_rules.parts_count_samples,
        "--scheduler-batch-size 8 16 --batch-sched-samples 0 9 --rampup-batch-size 8 8 9",
        "",
        "--scheduler-batch-size and --rampup-batch-size: give one",
    ),
    (
        phase_rules.parts_are_of_text,
        "--scheduler-seq-length 16 --is-instruction-dataset",
        "",
        "--scheduler-seq-length: not with --is-instruction-dataset",
    ),
    (
        phase_rules.parts_are_of_text,
        "--scheduler-seq-length 16 --deepspeed --pipeline-model-parallel-size 2",
        "",
        "--scheduler-seq-length: not with DeepSpeed's pipelines",
    ),
)
