"""Small tokenizers of every kind, trained once for all tests of this folder."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

EOD = "<|endoftext|>"
TEXT = [
    "The quick brown fox jumps over the lazy dog.",
    "def encode(self, text):\n    return [self.vocab[word] for word in text.split()]\n",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich; 字 漢 émile.",
    "It's what they've done, and we'll see: 1234567 times, 3.14 at most...   \n\n\t end",
] * 20


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a byte-level BPE, and GPT-2's pair of files of the same tokenizer."""
    path = tmp_path_factory.mktemp("hf")
    engine = tokenizers.Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[EOD, "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    engine.train_from_iterator(TEXT, trainer)
    engine.save(str(path / "tokenizer.json"))
    engine.model.save(str(path))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOD,
        "pad_token": {"__type": "AddedToken", "content": "<pad>", "special": True},
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="session")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model in LLaMA's layout: unk 0, BOS 1, EOS 2, no PAD, byte fallback."""
    path = tmp_path_factory.mktemp("spm") / "tokenizer.model"
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return path


def ranks() -> list[bytes]:
    """A tiny tiktoken vocabulary: all bytes, then some merges."""
    return [*(bytes([i]) for i in range(256)), b"th", b"he", b"the", b" the", b"in", b"ing", b"  ", b"er", b"12"]


@pytest.fixture(scope="session")
def rank_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The vocabulary as a tiktoken file, as LLaMA 3 has it."""
    path = tmp_path_factory.mktemp("tik") / "tokenizer.model"
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranks())]
    path.write_bytes(b"".join(lines))
    return path


@pytest.fixture(scope="session")
def rank_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The vocabulary in Megatron's JSON form."""
    path = tmp_path_factory.mktemp("tik") / "vocab.json"
    entries = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": token.decode("latin-1")}
        for rank, token in enumerate(ranks())
    ]
    path.write_text(json.dumps(entries))
    return path


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing here may reach for the network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    yield
