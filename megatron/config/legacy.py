"""Options that old scripts may hold and that no code reads: renamed, without effect, or refused, each with its reason.

Together with the sections and the equivalents these are all options of Megatron-DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from megatron.config.schema import Kind, Option

Effect = Literal["none", "refused", "renamed"]


@dataclass(frozen=True)
class Legacy:
    """One such option. For a renamed one, `reason` is what to use instead."""

    option: Option
    effect: Effect
    reason: str


def _option(spec: tuple[Any, ...]) -> Option:
    """The option that a row says: (spelling [spelling], default [, kind [, choices or "+"]])."""
    spellings, default, *rest = spec
    names = tuple(spellings.split())
    kinds: dict[type, Kind] = {bool: "switch", int: "int", float: "float", str: "str"}
    kind: Kind = rest[0] if rest else kinds[type(default)]
    extra = rest[1] if len(rest) > 1 else ()
    choices = extra if isinstance(extra, tuple) else ()
    return Option(
        dest=_DESTS.get(names[0], names[0].lstrip("-").replace("-", "_")),
        names=names,
        kind=kind,
        default=default,
        help="",
        many="+" if extra == "+" else None,
        choices=choices,
        synonyms={str(choice).lower(): choice for choice in choices},
    )


def _rows(effect: Effect, groups: tuple[tuple[str, tuple[tuple[Any, ...], ...]], ...]) -> Iterator[Legacy]:
    for reason, specs in groups:
        for spec in specs:
            yield Legacy(_option(spec), effect, reason)


_DESTS = {
    "--disable-mem-efficient-ln": "mem_efficient_ln",
    "--bert-no-binary-head": "bert_binary_head",
    "--no-async-tensor-model-parallel-allreduce": "async_tensor_model_parallel_allreduce",
    "--no-gradient-accumulation-fusion": "gradient_accumulation_fusion",
    "--no-initialization": "perform_initialization",
    "--no-contiguous-buffers-in-local-ddp": "use_contiguous_buffers_in_local_ddp",
    "--overlap-p2p-communication": "overlap_p2p_comm",
    "--no-scatter-gather-tensors-in-pipeline": "scatter_gather_tensors_in_pipeline",
    "--no-data-sharding": "data_sharding",
    "--no-rope-fusion": "apply_rope_fusion",
    "--no-create-attention-mask-in-dataloader": "create_attention_mask_in_dataloader",
    "--no-check-for-nan-in-loss-and-grad": "check_for_nan_in_loss_and_grad",
    "--no-ckpt-fully-parallel-save": "ckpt_fully_parallel_save",
    "--no-scaled-init": "use_scaled_init_method",
    "--no-seq-len-plus-one-tokens": "use_seq_len_plus_one_tokens",
}

RENAMED = (
    ("--micro-batch-size", (("--batch-size", None, "int"),)),
    ("--lr-warmup-fraction, --lr-warmup-iters or --lr-warmup-samples", (("--warmup", None, "int"),)),
    ("--tensor-model-parallel-size", (("--model-parallel-size", None, "int"),)),
    ("--deepspeed", (("--deepscale", False),)),
    ("--deepspeed_config", (("--deepscale_config", None, "str"),)),
    (
        "--recompute-granularity full --recompute-method",
        (("--activations-checkpoint-method", None, "str", ("uniform", "block")),),
    ),
    ("--recompute-num-layers", (("--activations-checkpoint-num-layers", 1),)),
    ("--seq-length", (("--encoder-seq-length", None, "int"),)),
    ("--num-layers", (("--encoder-num-layers", None, "int"),)),
    ("--iterations-to-skip", (("--skip-train-iteration-range", None, "str", "+"),)),
    ("--train-data-path", (("--train-weighted-split-paths", None, "str", "+"),)),
    ("--valid-data-path", (("--valid-weighted-split-paths", None, "str", "+"),)),
    ("--test-data-path", (("--test-weighted-split-paths", None, "str", "+"),)),
    ("--ckpt-step, with the iteration", (("--load-tag", None, "str"),)),
    ("--device hpu", (("--use_hpu", False),)),
)

WITHOUT_EFFECT = (
    (
        "tokens always travel to experts and back by an all-to-all, sorted by expert",
        (
            ("--moe-token-dispatcher-type", "allgather", "str", ("allgather", "alltoall", "flex")),
            ("--moe-permute-fusion", False),
        ),
    ),
    (
        "experts always have parameter groups of their own and are shared among the tensor-parallel ranks",
        (("--create-moe-param-group", False), ("--enable-expert-tensor-parallelism", False)),
    ),
    ("products of all experts are one operation, see --op grouped_matmul", (("--moe-grouped-gemm", False),)),
    ("routers always compute in float32", (("--moe-router-dtype", None, "str", ("fp32", "fp64")),)),
    ("the number of key-value heads alone decides", (("--group-query-attention", False),)),
    ("the attention softmax is always computed in float32", (("--attention-softmax-in-fp32", False),)),
    (
        "kernels are chosen by the device; see --op",
        (
            ("--disable-mem-efficient-ln", True),
            ("--no-persist-layer-norm", False),
            ("--no-gradient-accumulation-fusion", True),
            ("--onnx-safe", None, "word"),
            ("--no-rope-fusion", True),
            ("--cross-entropy-loss-fusion", False),
            ("--cross-entropy-fusion-impl", "native", "str", ("native", "te")),
            ("--abort-on-unmet-fused-kernel-constraints", False),
        ),
    ),
    (
        "communication always overlaps where the engine and the device can",
        (
            ("--no-async-tensor-model-parallel-allreduce", True),
            ("--overlap-param-gather", False),
            ("--no-contiguous-buffers-in-local-ddp", True),
            ("--no-scatter-gather-tensors-in-pipeline", True),
            ("--overlap-p2p-communication", False),
        ),
    ),
    (
        "with one rank, sharing sequences by heads is the same computation",
        (("--force-ds-sequence-parallel", False),),
    ),
    (
        "recomputation is the same with both engines",
        (("--deepspeed-activation-checkpointing", False), ("--pytorch-activation-checkpointing", False)),
    ),
    (
        "it moves no result, only how DeepSpeed's own recomputation lays out memory, which is not used",
        (("--contigious-checkpointing", False), ("--synchronize-each-layer", False), ("--profile-backward", False)),
    ),
    (
        "nothing random is saved: dropout and data follow from --seed and the position in the run",
        (
            ("--no-save-rng", None, "switch"),
            ("--no-load-rng", None, "switch"),
            ("--te-rng-tracker", False),
        ),
    ),
    ("gradients are always clipped before the update", (("--enable-zbh1-exact-semantics", False),)),
    ("a pipeline has the stages of --pipeline-model-parallel-size", (("--no-pipeline-parallel", False),)),
    ("the optimizer's kernel is chosen by --op adamw", (("--ds_fused_adam", False),)),
    (
        "optimizer state is spread over the ranks; its norms are not written",
        (("--log-optimizer-states-to-tensorboard", False),),
    ),
    ("the order of the data never depends on the layout", (("--no-data-sharding", True),)),
    (
        "initial weights are always drawn on the host, the same for every layout",
        (("--use-cpu-initialization", None, "switch"),),
    ),
    ("initial weights are always drawn, then overwritten by what is loaded", (("--no-initialization", True),)),
    ("every checkpoint can be loaded in every layout", (("--universal-checkpoint", False),)),
    (
        "--verify-checkpoint checks every tensor of any model",
        (("--verify-checkpoint-model-type", "GPT", "str", ("GPT", "BLOOM", "LLAMA")),),
    ),
    (
        "there is one format of indexed data, read by memory-mapping",
        (("--data-impl", "infer", "str", ("mmap", "infer")),),
    ),
    ("the operating system reads files ahead", (("--mmap-warmup", False),)),
    ("samples are counted before the run, so data never runs out", (("--repeated-dataloader", False),)),
    ("no code from a tokenizer's directory is ever run", (("--trust-remote-code", False),)),
    (
        "Megatron-DeepSpeed does not read it either; set it in DeepSpeed's JSON",
        (
            ("--zero-reduce-scatter", False),
            ("--zero-contigious-gradients", False),
            ("--zero-reduce-bucket-size", 0, "int"),
            ("--zero-allgather-bucket-size", 0, "int"),
            ("--use-pin-memory", False),
        ),
    ),
    (
        "Megatron-DeepSpeed does not read it either",
        (
            ("--scattered-embeddings", False),
            ("--memory-centric-tiled-linear", False),
            ("--tile-factor", 1),
        ),
    ),
    ("there is one model implementation", (("--use-mcore-models", False),)),
    ("the loss is always the mean over all tokens of the global batch", (("--calculate-per-token-loss", False),)),
    ("no attention mask is made in advance", (("--no-create-attention-mask-in-dataloader", True),)),
    ("steps that are not finite are always counted and reported", (("--no-check-for-nan-in-loss-and-grad", True),)),
    (
        "every rank writes and reads its own part of a checkpoint",
        (
            ("--no-ckpt-fully-parallel-save", True),
            ("--ckpt-fully-parallel-load", False),
            ("--ckpt-assume-constant-structure", False),
            ("--auto-detect-ckpt-format", False),
        ),
    ),
    ("only --adlr-autoresume reads it", (("--adlr-autoresume-interval", 1000),)),
    ("scales are measured over whole steps; see --fp8-interval", (("--fp8-manual-mode", True, "word"),)),
    ("positions are embedded once, with the tokens", (("--fix-position-emb-redundant-alloc", False),)),
    ("masks are part of the attention kernels", (("--mask-tensor-adding", False),)),
)

_DECODER_ONLY = "this distribution trains decoder-only language models"
_NO_SERVING = "this distribution trains models and does not serve them"
REFUSED = (
    (
        "the capacity bins of a run stay as they are; choose them with --moe-capacity-bins",
        (("--moe-capacity-bins-optimize-interval", 0), ("--moe-capacity-bins-optimize-max-group", 1)),
    ),
    (
        f"{_DECODER_ONLY}, no encoders",
        (
            ("--bert-no-binary-head", True),
            ("--output-bert-embeddings", False),
            ("--bert-embedder-type", "megatron", "str", ("megatron", "huggingface")),
            ("--bert-load", None, "str"),
            ("--mask-prob", 0.15),
            ("--short-seq-prob", 0.1),
            ("--sample-rate", 1.0),
            ("--decoder-num-layers", None, "int"),
            ("--decoder-seq-length", None, "int"),
            ("--pipeline-model-parallel-split-rank", None, "int"),
        ),
    ),
    (
        f"{_DECODER_ONLY}, no retrieval",
        (
            ("--retro-workdir", None, "str"),
            ("--retro-add-retriever", False),
            ("--retro-cyclic-train-iters", None, "int"),
            ("--retro-encoder-layers", 2),
            ("--retro-encoder-hidden-dropout", 0.1),
            ("--retro-encoder-attention-dropout", 0.1),
            ("--retro-num-neighbors", 2),
            ("--retro-num-retrieved-chunks", 2),
            ("--retro-return-doc-ids", False),
            ("--retriever-seq-length", 256),
            ("--ict-head-size", None, "int"),
            ("--ict-load", None, "str"),
            ("--biencoder-projection-dim", 0),
            ("--biencoder-shared-query-context-model", False),
            ("--titles-data-path", None, "str"),
            ("--query-in-block-prob", 0.1),
            ("--use-one-sent-docs", False),
            ("--evidence-data-path", None, "str"),
            ("--retriever-report-topk-accuracies", (), "int", "+"),
            ("--retriever-score-scaling", False),
            ("--block-data-path", None, "str"),
            ("--embedding-path", None, "str"),
            ("--indexer-batch-size", 128),
            ("--indexer-log-interval", 1000),
        ),
    ),
    (
        f"{_DECODER_ONLY}, no vision",
        (
            ("--num-classes", 1000),
            ("--img-h", 224),
            ("--img-w", 224),
            ("--num-channels", 3),
            ("--patch-dim", 16),
            ("--classes-fraction", 1.0),
            ("--data-per-class-fraction", 1.0),
            ("--head-lr-mult", 1.0),
            ("--vision-pretraining", False),
            ("--vision-pretraining-type", "classify", "str", ("classify", "inpaint", "dino")),
            ("--vision-backbone-type", "vit", "str", ("vit", "mit", "swin")),
            ("--swin-backbone-type", "tiny", "str", ("tiny", "base", "h3")),
            ("--mask-type", "random", "str", ("random", "row")),
            ("--mask-factor", 1.0),
            ("--iter-per-epoch", 1250),
            ("--dino-local-img-size", 96),
            ("--dino-local-crops-number", 10),
            ("--dino-head-hidden-size", 2048),
            ("--dino-bottleneck-size", 256),
            ("--dino-freeze-last-layer", 1.0),
            ("--dino-norm-last-layer", False),
            ("--dino-warmup-teacher-temp", 0.04),
            ("--dino-teacher-temp", 0.07),
            ("--dino-warmup-teacher-temp-epochs", 30),
        ),
    ),
    (
        f"{_DECODER_ONLY}, without a teacher model",
        (
            ("--num-layers-teacher", None, "int"),
            ("--num-experts-teacher", (1,), "int", "+"),
            ("--hidden-size-teacher", None, "int"),
            ("--num-attention-heads-teacher", None, "int"),
            ("--mos", False),
            ("--kd", False),
            ("--kd-alpha-ce", 1.0),
            ("--kd-beta-ce", 1.0),
            ("--kd-temp", 1.0),
            ("--load-teacher", None, "str"),
        ),
    ),
    (
        "every layer sees every token of the full sequence, at every step",
        (("--random-ltd", False), ("--data-efficiency-curriculum-learning", False), ("--return-data-index", False)),
    ),
    (
        "samples come from the data files and the seed, not from prepared index files",
        (
            ("--train-idx-path", None, "str"),
            ("--train-desc-path", None, "str"),
            ("--train-doc-idx-path", None, "str"),
            ("--train-sample-idx-path", None, "str"),
            ("--train-shuffle-idx-path", None, "str"),
        ),
    ),
    (
        _NO_SERVING,
        (
            ("--inference-batch-times-seqlen-threshold", 512),
            ("--max-tokens-to-oom", 12000),
            ("--inference", False),
            ("--ds-inference", False),
        ),
    ),
    ("there is one model implementation; --op chooses its kernels", (("--use-legacy-models", False),)),
    (
        "a rank computes its part of a sequence at once; share sequences among more ranks with --context-parallel-size",
        (
            ("--ds-sequence-parallel-fpdt", False),
            ("--ds-sequence-parallel-fpdt-chunk-size", 65536),
            ("--ds-sequence-parallel-fpdt-offloading", False),
        ),
    ),
    (
        "--use-torch-compile compiles the backward pass of each layer as well",
        (
            ("--use-torch-compiled-autograd", False, "word"),
            ("--compiled-autograd-fallback-mode", "nothing", "str", ("nothing", "warn", "error")),
        ),
    ),
    ("lazy mode keeps graphs and runs them again by itself", (("--use-hpu-graphs", False),)),
    ("kernels choose the order of their sums", (("--hpu-deterministic", False),)),
    ("norms and biases never decay", (("--do-norm-bias-weight-decay", False),)),
    ("weights of attention output and MLP output always start smaller in deeper models", (("--no-scaled-init", True),)),
    (
        "a run ends by its length or time, not by a loss; see --exit-interval",
        (("--eval-loss-exit-value", None, "float"),),
    ),
    ("documents are always shuffled", (("--disable-doc-shuffling", False),)),
    (
        "a sample has one token more than --seq-length, so that every position has a label",
        (("--no-seq-len-plus-one-tokens", True),),
    ),
    ("angles of rotary positions are always computed in float32", (("--eval-hf-rope", False),)),
    ("text is read as tools/preprocess_data.py has written it", (("--eval-add-bos", False),)),
    ("use --num-experts", (("--num-experts-switch", None, "int"),)),
    ("experts are plain PyTorch here", (("--use-tutel", False),)),
    ("the embedding has the format of the other parameters", (("--embedding-weights-in-fp32", False),)),
    ("recomputation takes whole layers or attention; see --recompute-granularity", (("--split-transformers", False),)),
    ("the loss is always computed in float32", (("--fp16-lm-cross-entropy", False),)),
    ("all ranks start from the same weights", (("--data-parallel-random-init", False),)),
    (
        "every tensor-parallel rank keeps the inputs of recomputed layers; --sequence-parallel splits them",
        (
            ("--partition-activations", False),
            ("--distribute-saved-activations", False),
            ("--distribute-checkpointed-activations", False),
        ),
    ),
    (
        "there is one data-parallel implementation; --zero-stage chooses what it shards",
        (("--DDP-impl", "local", "str", ("local", "torch", "FSDP")),),
    ),
    ("it needs a PyTorch build of its own", (("--use-ring-exchange-p2p", False),)),
    ("set the allocator of the device instead", (("--empty-unused-memory-level", 0, "int", (0, 1, 2)),)),
    (
        "all parts of a run are set up at its start",
        (("--lazy-mpu-init", None, "word"), ("--use-dataset-only", False, "word")),
    ),
    ("data is read from local paths", (("--aml-data-download-path", None, "str"),)),
    ("it needs a service of one cluster", (("--adlr-autoresume", False),)),
    (
        "checkpoints have one format; tools/convert_checkpoint.py writes the others",
        (("--ckpt-format", "torch_dcp", "str", ("torch_dcp", "torch_dist", "torch", "fsdp_dtensor")),),
    ),
)

LEGACY: tuple[Legacy, ...] = (
    *_rows("renamed", RENAMED),
    *_rows("none", WITHOUT_EFFECT),
    *_rows("refused", REFUSED),
)
