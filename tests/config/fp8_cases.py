"""Settings that the rules about 8-bit numbers refuse; rows of the table in test_rules.py."""

from __future__ import annotations

from megatron.config import fp8_rules

F = fp8_rules
TABLE = (
    (F.eight_bits_have_a_format, "--fp8-margin 1", "", "--fp8-margin: only with --fp8-format"),
    (
        F.eight_bits_have_a_format,
        "--transformer-impl transformer_engine",
        "",
        "--transformer-impl transformer_engine: only with --fp8-format",
    ),
    (
        F.history_is_for_delayed_scaling,
        "--fp8-format e5m2 --fp8-recipe tensorwise --fp8-interval 2",
        "",
        "--fp8-interval: only with --fp8-recipe delayed, tensorwise",
    ),
    (
        F.eight_bit_products_are_plain,
        "--fp8-format hybrid --use-torch-compile true",
        "",
        "--fp8-format hybrid: not with --use-torch-compile true;",
    ),
    (
        F.eight_bit_products_have_whole_blocks,
        "--fp8-format hybrid --hidden-size 72",
        "",
        "--fp8-format hybrid: --hidden-size 72 multiple of 16",
    ),
    (
        F.eight_bit_products_have_whole_blocks,
        "--fp8-format hybrid --num-attention-heads 8 --num-key-value-heads 1",
        "",
        "--fp8-format hybrid: --num-key-value-heads 1 x --kv-channels 8 multiple of 16",
    ),
    (
        F.eight_bit_products_have_whole_blocks_of_tokens,
        "--fp8-format hybrid --micro-batch-size 1 --global-batch-size 8 --scheduler-batch-size 8 8 8 "
        "--batch-sched-samples 0 8 16 --scheduler-seq-length 4 8 32",
        "",
        "--fp8-format hybrid: --micro-batch-size 1 x --scheduler-seq-length 4, 8 must be a multiple of 16",
    ),
    (
        F.eight_bit_products_have_whole_blocks_of_tokens,
        "--fp8-format hybrid --micro-batch-size 1 --seq-length 24",
        "",
        "--fp8-format hybrid: --micro-batch-size 1 x --seq-length 24 multiple of 16",
    ),
)
