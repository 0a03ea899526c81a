"""Settings that the rules about experts refuse; rows of the table in test_rules.py."""

from __future__ import annotations

from megatron.config import moe_rules

E = moe_rules
TABLE = (
    (E.layers_have_equally_many_experts, "--num-experts 4 8", "", "--num-experts 4 8: one number"),
    (E.ranks_share_experts, "--moe-expert-parallel-size 2", "", "--moe-expert-parallel-size 2: no experts"),
    (E.ranks_share_experts, "--num-experts 3 --moe-expert-parallel-size 2", "", "2: must divide --num-experts 3"),
    (
        E.ranks_share_experts,
        "--num-experts 4 --expert-model-parallel-size 4 --tensor-model-parallel-size 2",
        "",
        "--moe-expert-parallel-size 4: divide 2, data-parallel",
    ),
    (
        E.copies_of_experts_divide,
        "--num-experts 4 --moe-expert-parallel-size 4 --zero-stage 1 --num-distributed-optimizer-instances 2",
        "",
        "--num-distributed-optimizer-instances 2: divide 1, --moe-expert-parallel-size 4",
    ),
    (
        E.experts_split,
        "--num-experts 4 --tensor-model-parallel-size 2 --moe-ffn-hidden-size 33",
        "",
        "--moe-ffn-hidden-size 33: multiple of --tensor-model-parallel-size 2",
    ),
    (E.experts_split, "--num-experts 4 --expert-tensor-parallel-size 2", "", "--expert-tensor-parallel-size 2: only 1"),
    (E.tokens_have_enough_experts, "--num-experts 4 --topk 5", "", "--topk 5: at most --num-experts 4"),
    (E.layers_with_experts_are_known, "--num-experts 4 --moe-layer-freq [1,2]", "", "--moe-layer-freq [1,2]: list"),
    (E.layers_with_experts_are_known, "--num-experts 4 --expert-interval 99", "", "--expert-interval 99: no layer"),
    (
        E.capacity_is_given_once,
        "--num-experts 4 --moe-expert-capacity-factor 1 --disable-moe-token-dropping",
        "",
        "--moe-expert-capacity-factor and --disable-moe-token-dropping: the one or the others",
    ),
    (
        E.capacity_has_a_limit,
        "--num-experts 4 --moe-num-capacity-bins 3",
        "",
        "--moe-num-capacity-bins 3: --disable-moe-token-dropping",
    ),
    (
        E.capacity_has_a_limit,
        "--num-experts 4 --disable-moe-token-dropping --moe-pad-expert-input-to-capacity",
        "",
        "--moe-pad-expert-input-to-capacity: --moe-num-capacity-bins",
    ),
    (
        E.deepspeed_knows_its_experts,
        "--num-experts 4 --moe-expert-parallel-size 2 --deepspeed --zero-stage 3",
        "",
        "--moe-expert-parallel-size 2: --zero-stage 1 or 2",
    ),
    (
        E.deepspeed_knows_its_experts,
        "--num-experts 4 --moe-expert-parallel-size 2 --deepspeed --pipeline-model-parallel-size 2",
        "",
        "--moe-expert-parallel-size 2: --pipeline-model-parallel-size 1",
    ),
    (E.experts_have_changing_shapes, "--num-experts 4 --use-torch-compile true", "", "--use-torch-compile: not with"),
)
