from __future__ import annotations

import dataclasses
import json

import pytest

from megatron.config import dump
from megatron.config.architecture import RopeScaling
from megatron.config.parser import SECTIONS, ConfigError
from megatron.config.run import parse
from megatron.config.schema import options
from megatron.training.microbatches import BatchPlan, RampUp
from tests.config.commands import SMALL, config


def test_what_megatron_computes():
    run = config(world_size=4)
    assert run.parallel.data_parallel_size == 4
    assert run.training.global_batch_size == 8
    assert run.training.eval_micro_batch_size == 2
    assert run.model.ffn_hidden_size == 256
    assert run.model.kv_channels == 16
    assert run.model.num_key_value_heads == 4
    assert run.model.max_position_embeddings == 32
    assert run.model.position_embedding_type == "learned_absolute"
    assert run.data.dataloader_type == "single"
    assert (run.optimizer.start_weight_decay, run.optimizer.end_weight_decay) == (0.01, 0.01)
    assert run.precision.params_dtype == "float32"
    assert run.parallel.distributed_backend is None
    assert run.tokenizer.tokenizer_type == "NullTokenizer"


@pytest.mark.parametrize(("hidden", "ffn"), [(64, 128), (320, 832), (768, 2048), (4096, 10880), (5120, 13632)])
def test_gated_feed_forward_is_two_thirds_rounded_to_64(hidden, ffn):
    run = config("--swiglu", "--hidden-size", str(hidden))
    assert run.model.ffn_hidden_size == ffn == int((4 * hidden * 2 / 3) / 64) * 64


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("--use-rotary-position-embeddings", "position_embedding_type", "rope"),
        ("--use-rotary-position-embeddings --no-position-embedding", "position_embedding_type", "rope"),
        ("--no-position-embedding", "position_embedding_type", "none"),
        ("--use-alibi-position-embeddings", "position_embedding_type", "alibi"),
        ("--position-embedding-type absolute", "position_embedding_type", "learned_absolute"),
        ("", "activation", "gelu_tanh"),
        ("--no-bias-gelu-fusion", "activation", "gelu"),
        ("--disable-bias-linear", "activation", "gelu"),
        ("--swiglu", "activation", "swiglu"),
        ("--glu-activation geglu", "activation", "geglu"),
        ("--squared-relu", "activation", "squared_relu"),
        ("--openai-gelu --no-bias-gelu-fusion", "activation", "gelu_tanh"),
        ("--recompute-activations", "recompute_granularity", "selective"),
        ("--checkpoint-activations", "recompute_method", "uniform"),
        ("--checkpoint-activations --checkpoint-num-layers 2", "recompute_num_layers", 2),
        ("--recompute-granularity full", "recompute_method", "uniform"),
        ("--recomputation-layer-num 2", "recompute_granularity", "full"),
        ("--recomputation-layer-num 2", "recompute_method", "block"),
        ("--checkpoint-policy custom --recomputation-layer-num 2", "recompute_method", "block"),
        ("--checkpoint-activations --checkpoint-policy block --checkpoint_block_layer 3", "recompute_num_layers", 3),
        ("--checkpoint-activations --deepspeed-activation-checkpointing", "recompute_granularity", "full"),
        ("--dataloader-inter-document-masking", "reset_attention_mask", True),
        ("--full-validation", "eval_iters", -1),
        ("--use-flash-attn", "attention_backend", "flash"),
        ("--use-flash-attn-v1", "attention_backend", "flash"),
        ("--use-fused-sdpa true", "attention_backend", "fused"),
        ("--use-fused-sdpa 0", "attention_backend", "unfused"),
        ("--use-fused-sdpa 1 --no-masked-softmax-fusion", "masked_softmax_fusion", True),
        ("--no-masked-softmax-fusion", "masked_softmax_fusion", False),
        ("--bf16", "accumulate_allreduce_grads_in_fp32", True),
        ("--bf16 --grad-reduce-in-bf16", "accumulate_allreduce_grads_in_fp32", False),
        ("--bf16", "params_dtype", "bfloat16"),
        ("--fp16", "apply_query_key_layer_scaling", True),
        ("--bf16", "apply_query_key_layer_scaling", False),
        ("--distributed-backend nccl", "distributed_backend", "nccl"),
        ("", "zero_stage_native", 0),
        ("--use-distributed-optimizer", "zero_stage_native", 1),
        ("--use-distributed-optimizer --zero-stage 2", "zero_stage_native", 2),
        ("--zero-stage 1", "zero_stage_native", 1),
        ("--use-torch-fsdp2", "zero_stage_native", 3),
        ("--deepspeed", "zero_stage", 1),
    ],
)
def test_resolution(words, name, value):
    assert config(*words.split()).values()[name] == value


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("--swiglu --squared-relu", ("--squared-relu", "squared_relu", "--swiglu", "swiglu")),
        ("--swiglu --activation relu", ("--swiglu", "--activation", "relu")),
        ("--use-rotary-position-embeddings --use-alibi-position-embeddings", ("rope", "alibi")),
        ("--use-torch-fsdp2 --zero-stage 1", ("--use-torch-fsdp2", "--zero-stage", "1")),
        ("--recompute-activations --checkpoint-activations", ("full", "selective")),
    ],
)
def test_flags_that_stand_for_different_values_contradict(words, parts):
    with pytest.raises(ConfigError) as caught:
        config(*words.split())
    assert any(all(part in problem for part in parts) for problem in caught.value.problems), caught.value.problems


def test_agreeing_flags_are_no_contradiction():
    assert config("--swiglu", "--activation", "swiglu").model.activation == "swiglu"


NUMBERS = [option for kind in SECTIONS.values() for option in options(kind) if option.kind in ("int", "float")]


@pytest.mark.parametrize("option", NUMBERS, ids=lambda option: option.dest)
def test_any_number_is_obeyed_or_refused(option):
    for number in ("0", "-1", "1000000007"):
        try:
            config(option.main, number, world_size=4)
        except ConfigError as error:
            assert not any("missing" in problem for problem in error.problems), error.problems


def test_tokens_become_samples_or_iterations():
    run = config("--train-tokens", "3201", without=("--train-iters",))
    assert (run.training.train_samples, run.training.train_iters) == (101, 50)
    both = config("--train-tokens", "3201", "--train-samples", "50", without=("--train-iters",))
    assert both.training.train_samples == 50
    assert config("--train-tokens", "321").training.train_iters == 6  # 11 samples in steps of 2
    assert config("--train-tokens", "32000000").training.train_iters == 10


@pytest.mark.parametrize("ramp", ["", "8 8 100", "8 8 1000", "8 16 33", "40 1 7", "8 8 0"])
@pytest.mark.parametrize("samples", [1, 8, 39, 107, 108, 500, 1313])
def test_samples_become_the_iterations_that_they_last(samples, ramp):
    words = f"--micro-batch-size 1 --global-batch-size 40 --train-samples {samples}"
    if ramp:
        words += f" --rampup-batch-size {ramp}"
    run = config(*words.split(), without=("--train-iters",))
    ramp_up = RampUp.parse(ramp.split()) if ramp else None
    plan = BatchPlan(global_batch_size=40, micro_batch_size=1, data_parallel_size=1, ramp_up=ramp_up)
    assert run.training.train_iters == plan.iterations(samples)


def test_a_flag_wins_over_a_preset():
    words = ("--preset", "llama-tiny", "--num-layers", "1", "--position-embedding-type", "alibi", "--normalization")
    run = config(*words, "LayerNorm", without=("--num-layers", "--hidden-size", "--num-attention-heads"))
    assert (run.model.num_layers, run.model.position_embedding_type) == (1, "alibi")
    assert run.model.normalization == "layernorm"
    assert (run.model.hidden_size, run.model.activation) == (64, "swiglu")


def test_a_preset_gives_a_null_tokenizer_its_size():
    run = config("--preset", "llama-tiny", without=("--vocab-size",))
    assert run.tokenizer.vocab_size == 511


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match=r"--preset llama2-7B: no such preset; the nearest is llama2-7b"):
        config("--preset", "llama2-7B")


def test_given_are_the_flags_and_what_they_stand_for():
    run = config("--swiglu")
    assert {"num_layers", "activation", "lr"} <= run.given
    assert "ffn_hidden_size" not in run.given


def test_ranks_come_from_the_environment():
    run = parse(SMALL, {"WORLD_SIZE": "8", "LOCAL_RANK": "3", "RANK": "3"})
    assert (run.parallel.world_size, run.parallel.local_rank) == (8, 3)
    assert parse([*SMALL, "--local_rank=1"], {"WORLD_SIZE": "2"}).parallel.local_rank == 1
    with pytest.raises(ConfigError, match=r"WORLD_SIZE=many in the environment: must be a whole number"):
        parse(SMALL, {"WORLD_SIZE": "many"})


def test_the_result_cannot_be_changed():
    run = config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.model.num_layers = 3  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.given = frozenset()  # type: ignore[misc]


def test_architecture():
    run = config(
        *("--use-rotary-position-embeddings", "--use-rope-scaling", "--rope-scaling-factor", "32", "--add-qkv-bias"),
        *(
            "--disable-bias-linear",
            "--swiglu",
            "--normalization",
            "RMSNorm",
            "--num-query-groups",
            "2",
            "--window-size",
        ),
        *("8", "--untie-embeddings-and-output-weights", "--tensor-model-parallel-size", "2", "--qk-layernorm"),
        world_size=2,
    )
    arch = run.architecture(501)
    assert arch.padded_vocab_size == 512
    assert (arch.num_kv_heads, arch.head_dim, arch.ffn_hidden_size) == (2, 16, 128)
    assert arch.rope_scaling == RopeScaling(factor=32.0)
    assert (arch.linear_bias, arch.qkv_bias, arch.tied_embeddings, arch.qk_norm) == (False, True, False, True)
    assert (arch.position, arch.norm, arch.activation, arch.sliding_window) == ("rope", "rmsnorm", "swiglu", 8)


@pytest.mark.parametrize(
    ("words", "tokens", "rows"),
    [
        ("", 500, 512),
        ("", 512, 512),
        ("--make-vocab-size-divisible-by 100", 501, 600),
        ("--no-pad-vocab-size", 501, 501),
        ("--padded-vocab-size 700", 501, 700),
    ],
)
def test_rows_of_the_embedding(words, tokens, rows):
    assert config(*words.split()).architecture(tokens).padded_vocab_size == rows


def test_an_embedding_that_is_too_small_is_refused():
    with pytest.raises(ValueError, match=r"--padded-vocab-size 400: must be at least 501"):
        config("--padded-vocab-size", "400").architecture(501)


COMMANDS = {
    "Megatron-DeepSpeed's LLaMA-2": """
        --tensor-model-parallel-size 2 --pipeline-model-parallel-size 1 --num-layers 24 --hidden-size 2048
        --ffn-hidden-size 5504 --num-attention-heads 16 --micro-batch-size 4 --global-batch-size 32 --seq-length 2048
        --max-position-embeddings 2048 --train-iters 250000 --save x --load x --data-path y --data-impl mmap
        --tokenizer-type GPTSentencePieceTokenizer --tokenizer-model tokenizer.model --split 949,50,1
        --distributed-backend nccl --lr 3e-4 --lr-decay-style cosine --min-lr 3e-5 --weight-decay 0.1 --clip-grad 1
        --lr-warmup-iters 2000 --optimizer adam --adam-beta1 0.9 --adam-beta2 0.95 --log-interval 1
        --save-interval 10000 --eval-interval 1000 --eval-iters 10 --bf16 --no-query-key-layer-scaling
        --attention-dropout 0 --hidden-dropout 0 --use-rotary-position-embeddings
        --untie-embeddings-and-output-weights --swiglu --normalization rmsnorm --disable-bias-linear
        --num-key-value-heads 4 --deepspeed --zero-stage=1 --no-pipeline-parallel
        --deepspeed-activation-checkpointing""",
    "Gaudi's run_llama.sh": """
        --deepspeed --tensor-model-parallel-size 2 --pipeline-model-parallel-size 1 --num-layers 32 --hidden-size 4096
        --ffn-hidden-size 14336 --num-attention-heads 32 --seq-length 8192 --micro-batch-size 1
        --global-batch-size 2048 --train-iters 937500 --log-interval 10 --eval-iters 100 --eval-interval 1000
        --data-path x --optimizer fusedadamw --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-5 --lr 3e-4
        --min-lr 3e-6 --lr-warmup-iters 8000 --lr-decay-style cosine --clip-grad 1.0 --weight-decay 0.1
        --attention-dropout 0.0 --hidden-dropout 0.0 --no-query-key-layer-scaling
        --use-rotary-position-embeddings --rotary-position-embeddings-theta 500000
        --untie-embeddings-and-output-weights --swiglu --normalization rmsnorm --disable-bias-linear
        --num-key-value-heads 8 --no-masked-softmax-fusion --no-bias-gelu-fusion --no-bias-dropout-fusion
        --no-gradient-accumulation-fusion --max-position-embeddings 8192 --use-fused-sdpa 1 --use-fused-rmsnorm 1
        --log-validation-ppl-to-tensorboard --log-batch-size-to-tensorboard --log-timers-to-tensorboard --load x
        --tensorboard-dir t --bf16 --exit-interval 30 --sequence-parallel --zero-stage 1
        --tokenizer-type Llama3Tokenizer --tokenizer-model m --verify-checkpoint
        --verify-checkpoint-model-type LLAMA --kill-switch-path k --save x --save-interval 2000
        --use-torch-compile=False --profile-steps 3,4""",
    "Megatron-LM's GPT": """
        --num-layers 12 --hidden-size 768 --num-attention-heads 12 --seq-length 1024 --max-position-embeddings 1024
        --micro-batch-size 1 --global-batch-size 16 --rampup-batch-size 8 8 1000 --train-samples 100000
        --lr-decay-samples 90000 --lr-warmup-samples 1000 --weight-decay 0.1 --adam-beta2 0.95
        --init-method-std 0.006 --clip-grad 1.0 --fp16 --lr 6.0e-5 --lr-decay-style cosine --min-lr 6.0e-6
        --data-path d --vocab-file v --merge-file m --split 949,50,1 --log-interval 100 --save s --save-interval 1000
        --eval-interval 1000 --eval-iters 10 --use-mcore-models --overlap-grad-reduce --overlap-param-gather
        --use-distributed-optimizer --transformer-impl local --attention-softmax-in-fp32 --loss-scale-window 500""",
    "BLOOM": """
        --preset bloom-13b --seq-length 2048 --micro-batch-size 1 --global-batch-size 1024
        --rampup-batch-size 16 16 5_000_000 --train-samples 300_000_000 --lr 1e-4 --min-lr 1e-5
        --lr-decay-samples 126_953_125 --lr-warmup-samples 216_320 --lr-decay-style cosine --bf16 --deepspeed
        --zero-stage 1 --data-path x --vocab-file v --merge-file m --eval-iters 5 --eval-interval 100 --seed 42
        --checkpoint-activations --deepspeed-activation-checkpointing --embed-layernorm
        --use-alibi-position-embeddings --no-masked-softmax-fusion --tensor-model-parallel-size 4""",
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_commands_of_published_scripts(command):
    run = parse(command.split(), {"WORLD_SIZE": "8"})
    assert run.architecture(50000).num_parameters() > 10**8


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_flags_give_the_same_run_again(command):
    run = parse([*command.split(), "--dry-run", "--op", "attention=reference"], {"WORLD_SIZE": "8"})
    again = parse(run.to_flags(), {"WORLD_SIZE": "8"})
    assert again.values() == run.values()
    assert again.dry_run and again.to_flags() == run.to_flags()


def test_the_dump_has_megatrons_form():
    lines = dump.lines(config("--num-experts", "1", "--data-impl", "mmap"))
    assert lines[0] == "------------------------ arguments ------------------------"
    assert "  num_layers ...................................... 4" in lines
    assert "  num_experts ..................................... [1]" in lines
    end = lines.index("-------------------- end of arguments ---------------------")
    names = [line.split()[0] for line in lines[1:end]]
    assert names == sorted(names, key=str.lower)
    assert lines[end + 1 :] == [
        "--data-impl has no effect: there is one format of indexed data, read by memory-mapping"
    ]


def test_checkpoint_args_replace_what_was_not_given():
    saved = config("--swiglu", "--num-query-groups", "2", "--hidden-dropout", "0.3").as_namespace()
    asked: list[object] = []

    def read_record(settings):
        asked.append(settings["ckpt_step"])
        return json.loads(json.dumps(saved))

    words = "--micro-batch-size 1 --lr 1 --train-iters 5 --mock-data --load x --use-checkpoint-args --ckpt-step 7"
    run = parse(words.split(), {}, read_record=read_record)
    assert asked == [7]
    assert (run.model.num_layers, run.model.activation, run.model.num_key_value_heads) == (4, "swiglu", 2)
    assert (run.data.seq_length, run.tokenizer.vocab_size) == (32, 500)
    assert run.model.hidden_dropout == 0.1
    for change in ("--num-layers 2", "--preset llama-tiny"):
        with pytest.raises(ConfigError, match=r"--num-layers 2: the checkpoint in --load x has 4"):
            parse([*words.split(), *change.split()], {}, read_record=read_record)


def test_checkpoint_args_need_a_checkpoint():
    def no_checkpoint(settings):
        raise FileNotFoundError("no checkpoint in x")

    words = [*SMALL, "--load", "x", "--use-checkpoint-args"]
    with pytest.raises(ConfigError, match="no checkpoint in x"):
        parse(words, {}, read_record=no_checkpoint)
    with pytest.raises(ConfigError, match="does not read checkpoints"):
        parse(words, {})
