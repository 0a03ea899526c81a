"""What Intel's Gaudi scripts train: the runs behind HL_LLAMA_VER, HL_LLAMA_MODEL_SIZE and HL_MIXTRAL_MODEL."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one model is trained; its architecture is a preset."""

    preset: str
    lr: str
    min_lr: str
    global_batch: str
    seq_length: str
    train_iters: str
    warmup_iters: str
    adam_eps: str
    tokenizer: str


def _llama1(size: int, lr: str, min_lr: str) -> Recipe:
    return Recipe(
        preset=f"llama1-{size}b",
        lr=lr,
        min_lr=min_lr,
        global_batch="2048",
        seq_length="2048",
        train_iters="250000",
        warmup_iters="2000",
        adam_eps="1e-8",
        tokenizer="GPTSentencePieceTokenizer",
    )


def _llama2(size: int, lr: str, min_lr: str) -> Recipe:
    return Recipe(
        preset=f"llama2-{size}b",
        lr=lr,
        min_lr=min_lr,
        global_batch="1024",
        seq_length="4096",
        train_iters="500000",
        warmup_iters="2000",
        adam_eps="1e-8",
        tokenizer="GPTSentencePieceTokenizer",
    )


def _llama31(size: int, lr: str, min_lr: str) -> Recipe:
    return Recipe(
        preset=f"llama3.1-{size}b",
        lr=lr,
        min_lr=min_lr,
        global_batch="2048",
        seq_length="8192",
        train_iters="937500",
        warmup_iters="8000",
        adam_eps="1e-5",
        tokenizer="Llama3Tokenizer",
    )


LLAMA: Mapping[tuple[str, str], Recipe] = {
    ("1", "7"): _llama1(7, "3e-4", "3e-5"),
    ("1", "13"): _llama1(13, "3e-4", "3e-5"),
    ("1", "65"): _llama1(65, "1.5e-4", "1.5e-5"),
    ("2", "7"): _llama2(7, "3e-4", "3e-5"),
    ("2", "13"): _llama2(13, "3e-4", "3e-5"),
    ("2", "34"): _llama2(34, "1.5e-4", "1.5e-5"),
    ("2", "70"): _llama2(70, "1.5e-4", "1.5e-5"),
    ("3.1", "8"): _llama31(8, "3e-4", "3e-6"),
    ("3.1", "70"): _llama31(70, "1.5e-4", "1.5e-6"),
    ("3.1", "405"): _llama31(405, "8e-5", "8e-7"),
}
"""(HL_LLAMA_VER, HL_LLAMA_MODEL_SIZE) -> the run that the script's table gives."""
DEFAULT_SIZE: Mapping[str, str] = {"1": "13", "2": "13", "3.1": "8"}


def llama(version: str, size: str | None) -> tuple[str, Recipe]:
    """The size, or the default one of that version, and how it is trained.

    Raises:
        ValueError: there is no such version, or no such size of it.
    """
    if version not in DEFAULT_SIZE:
        raise ValueError(f"HL_LLAMA_VER={version} is none of {', '.join(DEFAULT_SIZE)}")
    chosen = size or DEFAULT_SIZE[version]
    if (version, chosen) not in LLAMA:
        sizes = ", ".join(known for other, known in LLAMA if other == version)
        raise ValueError(f"HL_LLAMA_MODEL_SIZE={chosen} is none of {sizes}, the sizes of HL_LLAMA_VER={version}")
    return chosen, LLAMA[version, chosen]
