"""Every rule: flags that break it, and words that its message must hold (the value, what is allowed, the flag)."""

from __future__ import annotations

import inspect

import pytest

from megatron.config import (
    fp8_rules,
    model_rules,
    moe_rules,
    phase_rules,
    pipeline_rules,
    probe_rules,
    rules,
    run_rules,
    sequence_rules,
)
from megatron.config.parser import ConfigError, defaults
from tests.config import fp8_cases, moe_cases, phase_cases
from tests.config.commands import config

M, P, R, S = model_rules, pipeline_rules, run_rules, sequence_rules
L = probe_rules
HALF = ("--fp16",)
# rule, further flags, flags of the small run that are left out, words of the message
TABLE = [
    (M.world_is_a_multiple_of_the_model, "--tensor-model-parallel-size 3", "", "world size 4: multiple of 3"),
    (
        M.no_pipeline_is_kept,
        "--no-pipeline-parallel --pipeline-model-parallel-size 2",
        "",
        "--pipeline-model-parallel-size 2: must be 1",
    ),
    (P.pipeline_has_ranks, "--pipeline-schedule zbv", "", "--pipeline-schedule: --pipeline-model-parallel-size"),
    (
        P.pipeline_has_stages,
        "--pipeline-model-parallel-size 4 --num-layers 6",
        "",
        "--num-layers 6: multiple of 4 pipeline stages --pipeline-model-parallel-layout",
    ),
    (
        P.deepspeed_has_one_schedule,
        "--pipeline-model-parallel-size 2 --deepspeed --pipeline-schedule zbv",
        "",
        "--pipeline-schedule zbv: with --deepspeed 1f1b",
    ),
    (
        P.deepspeed_pipeline_shards_the_optimizer,
        "--pipeline-model-parallel-size 2 --deepspeed --zero-stage 2",
        "",
        "--zero-stage 2: 1 --deepspeed --pipeline-model-parallel-size 2 native",
    ),
    (
        P.deepspeed_stages_have_layers,
        "--pipeline-model-parallel-size 2 --deepspeed --standalone-embedding-stage",
        "",
        "first pipeline stage has no layers: --deepspeed",
    ),
    (
        P.split_backward_keeps_parameters,
        "--pipeline-model-parallel-size 2 --pipeline-schedule zbv --zero-stage 2",
        "",
        "--zero-stage 2: 0 or 1 --pipeline-schedule zbv",
    ),
    (
        P.split_backward_is_not_compiled,
        "--pipeline-model-parallel-size 2 --enable-zbh1-pipeline --use-torch-compile true",
        "",
        "--use-torch-compile: --pipeline-schedule zero-bubble 1f1b",
    ),
    (
        P.split_backward_has_logits,
        "--pipeline-model-parallel-size 2 --enable-zbh1-pipeline --op linear_cross_entropy=chunked",
        "",
        "--op linear_cross_entropy=chunked: --pipeline-schedule zero-bubble 1f1b",
    ),
    (
        M.query_heads_split,
        "--tensor-model-parallel-size 4 --num-attention-heads 6 --hidden-size 96",
        "",
        "--num-attention-heads 6: multiple of --tensor-model-parallel-size 4",
    ),
    (
        M.kv_heads_split,
        "--tensor-model-parallel-size 4 --num-attention-heads 12 --hidden-size 96 --num-query-groups 6",
        "",
        "--num-key-value-heads 6: multiple of --tensor-model-parallel-size 4 divide",
    ),
    (
        M.kv_copies_are_those_needed,
        "--tensor-model-parallel-size 4 --num-query-groups 2 --kv_replicator 4",
        "",
        "--kv-replicator 4: must be 2 --num-key-value-heads 2 --tensor-model-parallel-size 4",
    ),
    (
        M.ffn_splits,
        "--tensor-model-parallel-size 2 --ffn-hidden-size 101",
        "",
        "--ffn-hidden-size 101: --tensor-model-parallel-size 2",
    ),
    (
        M.world_is_a_multiple_of_the_model,
        "--context-parallel-size 4 --ds-sequence-parallel-size 2",
        "",
        "world size 4: multiple of 8 --context-parallel-size 4 --ds-sequence-parallel-size 2",
    ),
    (
        S.sequence_is_shared_evenly,
        "--tensor-model-parallel-size 2 --sequence-parallel --seq-length 31",
        "",
        "--seq-length 31: --tensor-model-parallel-size 2 with --sequence-parallel",
    ),
    (
        S.sequence_is_shared_evenly,
        "--context-parallel-size 2 --ds-sequence-parallel-size 2 --seq-length 28",
        "",
        "--seq-length 28: multiple of 8 = 2 x --context-parallel-size 2 x --ds-sequence-parallel-size 2",
    ),
    (
        S.sequence_is_shared_evenly,
        "--context-parallel-size 2 --cp-comm-type a2a --seq-length 31",
        "",
        "--seq-length 31: multiple of 2 = --ds-sequence-parallel-size 2",
    ),
    (
        S.sequence_is_shared_evenly,
        "--context-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel --seq-length 30",
        "",
        "--seq-length 30: multiple of 4 = 2 x --context-parallel-size 2",
    ),
    (
        S.heads_are_shared_evenly,
        "--tensor-model-parallel-size 2 --ds-sequence-parallel-size 4",
        "",
        "--ds-sequence-parallel-size 4: must divide --num-attention-heads",
    ),
    (
        S.heads_are_shared_by_one_flag,
        "--context-parallel-size 2 --cp-comm-type a2a --ds-sequence-parallel-size 2",
        "",
        "--cp-comm-type a2a: not with --ds-sequence-parallel-size 2",
    ),
    (
        S.ring_drops_no_attention,
        "--context-parallel-size 2 --attention-dropout 0.1",
        "",
        "--attention-dropout 0.1: must be 0 with --context-parallel-size 2",
    ),
    (
        M.padded_vocabulary_splits,
        "--tensor-model-parallel-size 2 --padded-vocab-size 1001",
        "",
        "--padded-vocab-size 1001: --tensor-model-parallel-size 2",
    ),
    (
        M.heads_divide_hidden,
        "--hidden-size 66",
        "",
        "--hidden-size 66: multiple of --num-attention-heads 4 --kv-channels",
    ),
    (
        M.query_heads_share_kv_heads,
        "--num-key-value-heads 3",
        "",
        "--num-key-value-heads 3: divide --num-attention-heads 4",
    ),
    (M.groups_are_counted, "--group-query-attention", "", "--group-query-attention: --num-query-groups"),
    (
        M.sequence_fits_positions,
        "--max-position-embeddings 31",
        "",
        "--seq-length 32: at most --max-position-embeddings 31",
    ),
    (
        M.rotary_settings_have_rope,
        "--rotary-base 500 --use-alibi-position-embeddings",
        "",
        "--rotary-base: --position-embedding-type rope alibi",
    ),
    (
        M.rotated_part_is_even,
        "--use-rotary-position-embeddings --rotary-percent 0.95",
        "",
        "--rotary-percent 0.95 --kv-channels 16 15: even",
    ),
    (
        M.one_way_to_stretch_positions,
        "--use-rotary-position-embeddings --use-rope-scaling --rotary-seq-len-interpolation-factor 2",
        "",
        "--use-rope-scaling and --rotary-seq-len-interpolation-factor: one of them",
    ),
    (
        M.one_way_to_stretch_positions,
        "--use-rotary-position-embeddings --rope-scaling-factor 2",
        "",
        "--rope-scaling-factor: only with --use-rope-scaling",
    ),
    (M.dropout_keeps_something, "--hidden-dropout 1", "", "--hidden-dropout 1.0: below 1"),
    (M.residual_format_differs, "--fp32-residual-connection", "", "--fp32-residual-connection: --bf16 or --fp16"),
    (M.vocabulary_is_known, "", "--vocab-size", "--vocab-size: --tokenizer-type NullTokenizer"),
    (M.tokenizer_has_its_files, "--tokenizer-type HFTokenizer", "", "--tokenizer-type HFTokenizer: --tokenizer-model"),
    (
        M.tokenizer_has_its_files,
        "--tokenizer-type GPT2BPETokenizer --vocab-file v",
        "",
        "--tokenizer-type GPT2BPETokenizer: --vocab-file --merge-file",
    ),
    (
        M.tokenizer_has_its_files,
        "--tokenizer-type BertWordPieceCase",
        "",
        "--tokenizer-type BertWordPieceCase: decoder-only",
    ),
    (
        M.vocabulary_is_padded_once,
        "--no-pad-vocab-size --padded-vocab-size 1024",
        "",
        "--padded-vocab-size 1024: --no-pad-vocab-size",
    ),
    (
        M.unpadded_vocabulary_is_whole,
        "--no-pad-vocab-size --tensor-model-parallel-size 2",
        "",
        "--no-pad-vocab-size: --tensor-model-parallel-size 1 2 --padded-vocab-size",
    ),
    (M.data_has_one_source, "", "--mock-data", "no training data: --data-path --mock-data"),
    (
        M.data_has_one_source,
        "--data-path a --train-data-path b",
        "--mock-data",
        "--data-path and --train-data-path, one source",
    ),
    (M.data_has_one_source, "--valid-data-path a", "--mock-data", "--train-data-path is missing"),
    (M.data_has_one_source, "--data-path a", "", "--data-path and --mock-data: one source"),
    (M.data_has_one_source, "--data-path", "--mock-data", "--data-path: at least one prefix"),
    (
        R.batch_divides,
        "--global-batch-size 12",
        "",
        "--global-batch-size 12: multiple of 8 --micro-batch-size 2 data-parallel size 4",
    ),
    (
        R.batch_divides,
        "--global-batch-size 32 --rampup-batch-size 12 4 100 --train-samples 1000",
        "--train-iters",
        "--rampup-batch-size 12 4 100: multiples of 8",
    ),
    (
        R.rampup_is_well_formed,
        "--rampup-batch-size 8 many 100 --train-samples 1000",
        "--train-iters",
        "--rampup-batch-size 8 many 100: three whole numbers",
    ),
    (
        R.rampup_is_well_formed,
        "--rampup-batch-size 8 16 --train-samples 1000",
        "--train-iters",
        "--rampup-batch-size 8 16: three whole numbers",
    ),
    (
        R.rampup_is_well_formed,
        "--global-batch-size 32 --rampup-batch-size 8 16 100 --train-samples 1000",
        "--train-iters",
        "--rampup-batch-size 8 16 100: --global-batch-size 32",
    ),
    (R.length_is_given_once, "--train-samples 1000", "", "--train-iters and --train-samples: one of them"),
    (R.length_is_given_once, "", "--train-iters", "missing: --train-iters --train-samples --train-tokens"),
    (
        R.rampup_counts_samples,
        "--global-batch-size 16 --rampup-batch-size 8 8 100",
        "",
        "--train-iters: --rampup-batch-size --train-samples",
    ),
    (R.schedule_has_the_unit_of_the_run, "--lr-decay-samples 5", "", "--lr-decay-samples: measured in iters"),
    (
        R.schedule_has_the_unit_of_the_run,
        "--train-samples 1000 --lr-warmup-iters 5",
        "--train-iters",
        "--lr-warmup-iters: measured in samples",
    ),
    (
        R.warmup_is_given_once,
        "--lr-warmup-fraction 0.1 --lr-warmup-iters 2",
        "",
        "--lr-warmup-fraction and --lr-warmup-iters: one of them",
    ),
    (R.rates_are_ordered, "--min-lr 1", "", "--min-lr 1.0: at most --lr 0.001"),
    (R.rates_are_ordered, "--lr-warmup-init 1", "", "--lr-warmup-init 1.0: at most --lr 0.001"),
    (R.wsd_has_a_last_phase, "--lr-decay-style WSD", "", "--lr-decay-style WSD: --lr-wsd-decay-iters"),
    (R.wsd_has_a_last_phase, "--lr-wsd-decay-iters 3", "", "only with --lr-decay-style WSD linear"),
    (
        R.one_scheduler_wins,
        "--override-opt_param-scheduler --use-checkpoint-opt_param-scheduler",
        "",
        "--override-opt_param-scheduler and --use-checkpoint-opt_param-scheduler: one of them",
    ),
    (
        R.weight_decay_grows,
        "--start-weight-decay 0.1",
        "",
        "--start-weight-decay 0.1 --weight-decay-incr-style --weight-decay",
    ),
    (
        R.weight_decay_grows,
        "--weight-decay-incr-style linear",
        "",
        "--weight-decay-incr-style linear: --start-weight-decay and --end-weight-decay",
    ),
    (
        R.weight_decay_grows,
        "--weight-decay-incr-style linear --start-weight-decay 0.2 --end-weight-decay 0.1",
        "",
        "--start-weight-decay 0.2 --end-weight-decay 0.1: at most",
    ),
    (R.host_optimizer_is_for_deepspeed, "--cpu-optimizer", "", "--cpu-optimizer: --deepspeed"),
    (R.host_optimizer_is_for_deepspeed, "--deepspeed --cpu_torch_adam", "", "--cpu_torch_adam: --cpu-optimizer"),
    (
        R.parameters_elsewhere_are_sharded,
        "--remote-device cpu --deepspeed --zero-stage 2",
        "",
        "--remote-device cpu: --deepspeed --zero-stage 3",
    ),
    (R.one_half_precision, "--fp16 --bf16", "", "--fp16 and --bf16: one of them"),
    (R.loss_scale_is_for_float16, "--bf16 --loss-scale 8 --hysteresis 3", "", "--loss-scale, --hysteresis: --fp16"),
    (R.gradients_have_one_format, "--grad-reduce-in-bf16", "", "--grad-reduce-in-bf16: --bf16"),
    (
        R.gradients_have_one_format,
        "--bf16 --grad-reduce-in-bf16 --accumulate-allreduce-grads-in-fp32",
        "",
        "--grad-reduce-in-bf16 and --accumulate-allreduce-grads-in-fp32: one of them",
    ),
    (R.deepspeed_shards_16_bits, "--deepspeed --bf16 --zero-stage 0", "", "--zero-stage 0: --bf16 1, 2 or 3"),
    (R.deepspeed_shards_16_bits, "--deepspeed --fp16 --zero-stage 0", "", "--zero-stage 0: --fp16 1, 2 or 3"),
    (R.export_needs_checkpoints, "--save-hf out", "", "--save-hf out: --save"),
    (R.export_needs_checkpoints, "--save-hf out --save ckpt --skip-train", "", "--save-hf out: --skip-train"),
    (
        R.deepspeed_keeps_to_itself,
        "--deepspeed --log-num-zeros-in-grad",
        "",
        "--log-num-zeros-in-grad: without --deepspeed",
    ),
    (
        R.deepspeed_has_its_flag,
        "--deepspeed_config /none.json",
        "",
        "--deepspeed_config /none.json: only with --deepspeed",
    ),
    (
        R.hybrid_sharding_divides,
        "--num-distributed-optimizer-instances 2",
        "",
        "--num-distributed-optimizer-instances 2: --use-distributed-optimizer",
    ),
    (
        R.hybrid_sharding_divides,
        "--use-distributed-optimizer --num-distributed-optimizer-instances 3",
        "",
        "--num-distributed-optimizer-instances 3: data-parallel size 4",
    ),
    (
        R.recomputation_is_complete,
        "--recompute-method block",
        "",
        "--recompute-method block: --recompute-granularity full",
    ),
    (
        R.recomputation_is_complete,
        "--recompute-activations --recompute-num-layers 2",
        "",
        "--recompute-num-layers: --recompute-granularity full",
    ),
    (
        R.recomputed_layers_are_listed_once,
        "--recomputation-layer-num 1 --recompute-granularity selective",
        "",
        "--recomputation-layer-num 1: --recompute-granularity full --recompute-method block",
    ),
    (
        R.recomputed_layers_are_listed_once,
        "--recomputation-layer-num 1 --recompute-num-layers 1",
        "",
        "--recomputation-layer-num 1 --recompute-num-layers: one of them",
    ),
    (
        R.recomputed_layers_are_listed_once,
        "--recomputation-layer-num 1 --pipeline-model-parallel-size 2",
        "",
        "--recomputation-layer-num 1: 2 numbers, one for each pipeline stage",
    ),
    (
        R.recomputed_layers_are_listed_once,
        "--recomputation-layer-num 0 3 --pipeline-model-parallel-size 2",
        "",
        "--recomputation-layer-num 0 3: stage 1 has 2, not 3",
    ),
    (
        R.activations_on_the_host_are_kept,
        "--checkpoint-in-cpu",
        "",
        "--checkpoint-in-cpu: --recompute-granularity full --cpu-offloading-num-layers",
    ),
    (
        R.activations_on_the_host_are_kept,
        "--cpu-offloading-num-layers 1 --recompute-granularity full",
        "",
        "--cpu-offloading-num-layers 1: not --recompute-granularity full --checkpoint-in-cpu",
    ),
    (
        R.activations_on_the_host_are_kept,
        "--cpu-offloading-num-layers 9",
        "",
        "--cpu-offloading-num-layers 9: at most 4 layers of a stage",
    ),
    (
        R.recomputed_layers_exist,
        "--recompute-granularity full --recompute-num-layers 5",
        "",
        "--recompute-num-layers 5: at most 4",
    ),
    (R.saving_has_an_interval, "--save x", "", "--save x: --save-interval"),
    (R.saving_has_an_interval, "--keep-last 3", "", "--keep-last: --save"),
    (
        R.saving_has_an_interval,
        "--save x --save-interval 4 --save-retain-interval 6",
        "",
        "--save-retain-interval 6: multiple of --save-interval 4",
    ),
    (R.saving_has_an_interval, "--async-save --verify-checkpoint", "", "--async-save, --verify-checkpoint: --save"),
    (R.saving_has_an_interval, "--heal-replica-drift --auto-resume", "", "--heal-replica-drift, --auto-resume: --save"),
    (
        R.auto_resume_needs_the_optimizer,
        "--save s --save-interval 1 --auto-resume --no-save-optim",
        "",
        "--auto-resume and --no-save-optim: one",
    ),
    (
        R.what_is_beside_checkpoints_is_local,
        "--save s3://a --save-interval 1 --save-hf b",
        "",
        "--save s3://a: --save-hf local",
    ),
    (
        R.what_is_beside_checkpoints_is_local,
        "--save s3://a --save-interval 1 --profile pt",
        "",
        "--save s3://a: --profile --tensorboard-dir",
    ),
    (R.rolling_back_needs_checkpoints, "--on-nan rollback", "", "--on-nan rollback: --save"),
    (R.rolling_back_needs_checkpoints, "--on-loss-spike rollback", "", "--on-loss-spike rollback: --save"),
    (R.spikes_have_a_policy, "--loss-spike-factor 3", "", "--loss-spike-factor: --on-loss-spike"),
    (R.spikes_have_a_policy, "--on-loss-spike skip --deepspeed", "", "--on-loss-spike skip: --deepspeed rollback"),
    (
        R.loading_has_a_directory,
        "--finetune --ckpt-step 3 --reset-iteration",
        "",
        "--ckpt-step, --finetune, --reset-iteration: --load",
    ),
    (R.stop_signal_is_handled, "--exit-signal SIGINT", "", "--exit-signal: --exit-signal-handler"),
    (R.garbage_interval_is_manual, "--manual-gc-interval 5", "", "--manual-gc-interval 5: --manual-gc"),
    (R.skipped_iterations_count_from_one, "--iterations-to-skip 3 0", "", "--iterations-to-skip 0: at least 1"),
    (R.profiled_steps_are_a_range, "--profile_steps 4,3", "", "--profile_steps 4,3: first,last"),
    (R.profiled_steps_are_a_range, "--profile_steps two", "", "--profile_steps two: first,last"),
    (R.profiled_ranks_exist, "--profile-ranks 0 4", "", "--profile-ranks 4: below world size 4"),
    (R.wandb_runs_have_names, "--wandb-project p", "", "--wandb-project p: --wandb-exp-name"),
    (R.wandb_runs_have_names, "--wandb-exp-name e", "", "--wandb-exp-name: --wandb-project"),
    *phase_cases.TABLE,
    *moe_cases.TABLE,
    *fp8_cases.TABLE,
    (
        R.pieces_of_attention_have_operations_of_their_own,
        "--context-parallel-size 2 --op attention=fused_sdpa",
        "",
        "--op attention=fused_sdpa: --context-parallel-size 2 --op attention_block, attention_block_backward",
    ),
    (R.operations_are_named, "--op attention", "", "--op attention: operation=implementation"),
    (
        L.logged_tensors_have_a_place,
        "--log-bwd-grads --tensor-logger-end-iter 3",
        "",
        "--log-bwd-grads: give --tensor-logger-path",
    ),
    (L.logged_tensors_have_a_place, "--log-bwd-grads", "", "--log-bwd-grads: give --tensor-logger-end-iter"),
    (
        L.logged_tensors_have_a_place,
        "--tensor-logger-end-iter 3",
        "",
        "--tensor-logger-end-iter 3: give --log-model-inputs",
    ),
    (
        L.logged_tensors_have_a_place,
        "--log-bwd-grads --tensor-logger-path p --tensor-logger-start-iter 4 --tensor-logger-end-iter 3",
        "",
        "--tensor-logger-start-iter 4: at most 3",
    ),
    (
        L.replicas_can_be_compared,
        "--check-tp-norm --tensor-model-parallel-size 2 --sequence-parallel",
        "",
        "--check-tp-norm-type all: must be wb with --sequence-parallel",
    ),
    (L.replicas_can_be_compared, "--check-tp-norm-type io", "", "--check-tp-norm-type: only with --check-tp-norm"),
]


@pytest.mark.parametrize(
    ("rule", "words", "without", "expected"), TABLE, ids=lambda item: getattr(item, "__name__", None)
)
def test_rule(rule, words, without, expected):
    with pytest.raises(ConfigError) as caught:
        config(*words.split(), without=tuple(without.split()), world_size=4)
    matching = [problem for problem in caught.value.problems if all(part in problem for part in expected.split())]
    assert matching, caught.value.problems


def test_every_rule_is_in_the_table():
    assert {row[0] for row in TABLE} == set(rules.RULES)


def test_rules_of_a_module_are_all_run():
    modules = (model_rules, moe_rules, pipeline_rules, run_rules, phase_rules, sequence_rules, fp8_rules, probe_rules)
    for module in modules:
        public = {
            value
            for name, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
        }
        assert public == set(module.RULES)


def test_rules_name_settings():
    known = defaults().keys() | {"given"}
    for rule in rules.RULES:
        assert {name for name, _ in rules.parameters(rule)} <= known, rule


NOT_YET_FLAGS = {
    "mlp_type": "--mlp-type residual",
}


@pytest.mark.parametrize("row", rules.NOT_YET, ids=lambda row: row.setting)
def test_features_that_are_missing_are_refused(row):
    words = NOT_YET_FLAGS[row.setting]
    with pytest.raises(ConfigError) as caught:
        config(*words.split(), world_size=4)
    assert f"{words}: not implemented yet ({row.feature}); leave it out" in caught.value.problems


def test_all_mistakes_are_reported_together():
    with pytest.raises(ConfigError) as caught:
        config(
            *("--hidden-size", "63", "--min-lr", "1", "--fp16", "--bf16", "--num-lyers", "3", "--kd", "--seed", "-1"),
            *("--save", "x", "--mlp-type", "residual", "--batch-size", "1", "--optimizer", "best"),
            without=("--micro-batch-size", "--mock-data"),
        )
    text = str(caught.value)
    for words in (
        *("--hidden-size 63", "--min-lr 1.0", "--fp16 and --bf16", "--num-lyers: no such flag", "--kd: ", "--seed -1"),
        *("--save x", "--mlp-type", "--batch-size 1: has a new name", "--optimizer best", "--micro-batch-size is"),
        "no training data",
    ):
        assert words in text, words


def test_a_rule_without_its_settings_is_left_out():
    with pytest.raises(ConfigError) as caught:
        config(without=("--num-layers", "--hidden-size", "--num-attention-heads", "--seq-length", "--lr"))
    assert sorted(caught.value.problems) == [
        "--hidden-size is missing",
        "--lr is missing",
        "--num-attention-heads is missing",
        "--num-layers is missing",
        "--seq-length is missing",
    ]
