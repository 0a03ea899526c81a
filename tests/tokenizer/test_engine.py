"""The fast engine gives the ids of the tokenizer itself, or is not taken."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from megatron.tokenizer import TextError, TokenizerSettings, build_tokenizer
from megatron.tokenizer.base import TokenizerError
from megatron.tokenizer.characters import changeable, finder, unknown
from megatron.tokenizer.engine import choose_engine, first_difference, load_encoder, probes
from megatron.tokenizer.flat import FlatIds, ListEncoder, append, interleave, prepend, select, strip, wrap
from megatron.tokenizer.gigatoken import SPLIT_PATTERNS, obstacle
from tests.tokenizer.conftest import EOD, TEXT

gigatoken = pytest.importorskip("gigatoken", reason="the optional gigatoken engine is not installed")

_WORDS = [
    *("I'll", "we'VE", "don't", "1234567", "_init_", "ZWÖLF", "naïve", "漢字かな"),
    *("안녕하세요", "мир", "שלום", "مرحبا", "नमस्ते", "ไทย", "😀👩‍👩‍👧", "é"),
    *("\n\n", "\r\n", "\t\t", "   ", " = ", "//", "...", "\u00a0", "\u3000"),
]
_CORPUS = [*TEXT, *(" ".join(_WORDS[i:] + _WORDS[:i]) for i in range(len(_WORDS)))] * 3
_ADDED = ["<|im_start|>", "<|im_start|>user", "<mask>"]
_LEVEL = pre_tokenizers.ByteLevel


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    cut = pre_tokenizers.Split(Regex(pattern), "isolated", False)
    return pre_tokenizers.Sequence([cut, _LEVEL(add_prefix_space=False, use_regex=False)])


def _byte_level(cutter: pre_tokenizers.PreTokenizer) -> tokenizers.Tokenizer:
    engine = tokenizers.Tokenizer(models.BPE())
    engine.pre_tokenizer, engine.decoder = cutter, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=[EOD, "<pad>"], initial_alphabet=_LEVEL.alphabet(), show_progress=False
    )
    engine.train_from_iterator(_CORPUS, trainer)
    engine.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in _ADDED])
    engine.add_tokens([AddedToken("    ", normalized=False)])
    return engine


def _pieces_json() -> tokenizers.Tokenizer:
    """LLaMA 2's form: no cutting, spaces become U+2581, unknown characters become bytes."""
    engine = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    engine.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=names, show_progress=False)
    engine.train_from_iterator(_CORPUS, trainer)
    config = json.loads(engine.to_str())
    config["added_tokens"] = config["added_tokens"][:3]
    config["pre_tokenizer"] = None
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    prepend_one = {"type": "Prepend", "prepend": "\u2581"}
    config["normalizer"] = {"type": "Sequence", "normalizers": [prepend_one, space]}
    return tokenizers.Tokenizer.from_str(json.dumps(config))


def _ignoring_merges() -> tokenizers.Tokenizer:
    config = json.loads(_byte_level(_split(sorted(SPLIT_PATTERNS)[0])).to_str())
    config["model"]["ignore_merges"] = True
    return tokenizers.Tokenizer.from_str(json.dumps(config))


def _with_bos() -> tokenizers.Tokenizer:
    engine = _byte_level(_LEVEL(add_prefix_space=False))
    marks = [(name, engine.token_to_id(name)) for name in (EOD, "<pad>")]
    engine.post_processor = processors.TemplateProcessing(single=f"{EOD} $A <pad>", special_tokens=marks)
    return engine


def _normalizing() -> tokenizers.Tokenizer:
    """Qwen's form."""
    engine = _byte_level(_split(sorted(SPLIT_PATTERNS)[0]))
    engine.normalizer = normalizers.NFC()
    return engine


FORMS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "gpt2": lambda: _byte_level(_LEVEL(add_prefix_space=False)),
    "gpt2 with a space in front": lambda: _byte_level(_LEVEL(add_prefix_space=True)),
    "llama2": _pieces_json,
    "llama3 without merges of whole words": _ignoring_merges,
    "with bos": _with_bos,
    "qwen with nfc": _normalizing,
    **{
        f"pattern {number}": lambda pattern=pattern: _byte_level(_split(pattern))  # type: ignore[misc]
        for number, pattern in enumerate(sorted(SPLIT_PATTERNS))
    },
}


# 1 = all of Unicode: what a new version of the engine or of its tables has to pass, minutes long.
UNICODE_STEP = int(os.environ.get("UNICODE_STEP", "10"))

# Forms that cut text like another one of the list.
_SAME_CUTS = ("gpt2 with a space in front", "llama3 without merges of whole words", "with bos")


def _settings(engine: tokenizers.Tokenizer, folder: Path, eos: str) -> TokenizerSettings:
    engine.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    return TokenizerSettings(type="HuggingFaceTokenizer", model=str(folder))


def _each_character_between_others(step: int = 1) -> Iterator[str]:
    """Every character where it matters whether it is a letter, a number, a mark or white space."""
    for code in range(0, 0x110000, step):
        if not 0xD800 <= code < 0xE000:
            yield f"a{chr(code)}a 1{chr(code)}. {chr(code)}"


def _all_characters(size: int, step: int = 1) -> Iterator[str]:
    """All of Unicode in runs of neighbours."""
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    for first in range(0, len(characters), size * step):
        yield "".join(characters[first : first + size])


@pytest.mark.parametrize("form", FORMS)
def test_ids_are_those_of_the_tokenizer_itself(form: str, tmp_path: Path) -> None:
    tokenizer = build_tokenizer(_settings(FORMS[form](), tmp_path, "</s>" if form == "llama2" else EOD))
    assert obstacle(tokenizer) is None
    choice = choose_engine(tokenizer, "auto", _CORPUS[:50])
    assert choice.engine == "gigatoken", choice.line
    assert "same ids as HuggingFaceTokenizer" in choice.line
    encoder = load_encoder(tokenizer, "gigatoken")
    added = random.Random(1).choices([*_ADDED, EOD, "<s>", "</s>", "<unk>", "<0x41>", "a", " ", "\u2581"], k=300)
    texts = [
        *probes(tokenizer, seed=1),
        *_all_characters(16, step=20),
        *_each_character_between_others(step=397),
        *(f"{chr(code)}\u4e00 {chr(code)}" for code in range(0x323B0, 0x33480, 5)),
        *_CORPUS,
        *map("".join, zip(*[iter(added)] * 5, strict=True)),
    ]
    assert first_difference(tokenizer, encoder, texts) is None


@pytest.mark.slow
@pytest.mark.parametrize("form", [form for form in FORMS if form not in _SAME_CUTS])
def test_ids_over_all_of_unicode_and_many_strings(form: str, tmp_path: Path) -> None:
    tokenizer = build_tokenizer(_settings(FORMS[form](), tmp_path, "</s>" if form == "llama2" else EOD))
    encoder = load_encoder(tokenizer, "gigatoken")
    assert first_difference(tokenizer, encoder, list(_all_characters(16, step=UNICODE_STEP))) is None
    assert first_difference(tokenizer, encoder, list(_each_character_between_others(step=UNICODE_STEP))) is None
    assert first_difference(tokenizer, encoder, list(probes(tokenizer, seed=2, number=10_000))) is None


@pytest.mark.parametrize("add_bos", [False, True])
def test_sentencepiece_models(tmp_path: Path, add_bos: bool) -> None:
    with (tmp_path / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(_CORPUS),
            model_writer=file,
            vocab_size=700,
            model_type="bpe",
            byte_fallback=True,
            character_coverage=0.99,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
    kind = "Llama2Tokenizer" if add_bos else "GPTSentencePieceTokenizer"
    tokenizer = build_tokenizer(TokenizerSettings(type=kind, model=str(tmp_path / "tokenizer.model")))
    assert choose_engine(tokenizer, "auto", _CORPUS[:20]).engine == "gigatoken"
    spelled = ["a</s>b", "plain", "<s>", "x <unk> y", ""]
    texts = [*probes(tokenizer, seed=2), *_all_characters(16, step=40), *spelled]
    assert first_difference(tokenizer, load_encoder(tokenizer, "gigatoken"), texts) is None


def _refused(change: Callable[[tokenizers.Tokenizer], None], folder: Path) -> str:
    engine = _byte_level(_LEVEL(add_prefix_space=False))
    change(engine)
    choice = choose_engine(build_tokenizer(_settings(engine, folder, EOD)), "auto", ["a"])
    assert choice.engine == "own"
    return choice.line


def test_forms_that_may_differ_stay_with_the_tokenizer_itself(tmp_path: Path) -> None:
    def normalize(engine: tokenizers.Tokenizer) -> None:
        engine.normalizer = normalizers.NFKC()

    def strip_spaces(engine: tokenizers.Tokenizer) -> None:
        engine.add_special_tokens([AddedToken("<x>", lstrip=True, special=True)])

    def cut_otherwise(engine: tokenizers.Tokenizer) -> None:
        engine.pre_tokenizer = _split(r"\w+|\W")

    def digits(engine: tokenizers.Tokenizer) -> None:
        engine.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(), _LEVEL()])

    assert "since gigatoken may not stand in for it: it normalizes text (NFKC)" in _refused(normalize, tmp_path)
    assert "takes white space along" in _refused(strip_spaces, tmp_path)
    assert "cuts text into words in a way that is not known" in _refused(cut_otherwise, tmp_path)
    assert "cuts text into words in a way that is not known" in _refused(digits, tmp_path)


def test_an_engine_that_is_asked_for_is_taken_or_refused(tmp_path: Path) -> None:
    null = build_tokenizer(TokenizerSettings(type="NullTokenizer", vocab_size=10))
    assert choose_engine(null, "own", []).line.endswith("as asked for")
    assert "no fast engine is known for NullTokenizer" in choose_engine(null, "auto", []).line
    with pytest.raises(TokenizerError, match=r"--tokenizer-engine gigatoken cannot be used: .*NullTokenizer"):
        choose_engine(null, "gigatoken", [])


def test_a_difference_on_the_input_is_found(tmp_path: Path) -> None:
    one = build_tokenizer(_settings(_byte_level(_LEVEL(add_prefix_space=False)), tmp_path, EOD))
    other = ListEncoder(one)
    assert (
        first_difference(one, lambda texts: other([text.replace("q", "k") for text in texts]), ["a", "q", "qq"]) == "q"
    )


def test_text_that_is_no_unicode_is_refused(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(_settings(_byte_level(_LEVEL(add_prefix_space=False)), tmp_path, EOD))
    with pytest.raises(TextError, match="lone surrogate at character 1"):
        load_encoder(tokenizer, "gigatoken")(["fine", "a\ud800"])


def test_characters_of_other_unicode_versions_are_known() -> None:
    find = finder(unknown())
    assert not any(map(find, ["a", "\u00e4", "\u6f22", "\U0001f600", "\U00020000", "\ue000", "\n\x00"]))
    # A letter since Unicode 17, one of no version yet, one that will never be one, and the last of all.
    assert all(map(find, ["\U000323b0", "\U0003fff0", "\uffff", "\U0010ffff"]))


def test_texts_that_normalization_leaves_alone_are_known() -> None:
    find = finder(changeable())
    plain = [
        "def f(x):\n",
        "na\u00efve",
        "\u6f22\u5b57\u304b\u306a",
        "\uc548\ub155",
        "\U0001f600",
        "\u043c\u0438\u0440",
        "",
    ]
    assert not any(map(find, plain))
    changed = ["e\u0301", "\u1100\u1161", "\u212b", "\u0958", "\u09c7\u09be", "\u304b\u3099", "\U0001d15e", "\ufa10"]
    assert all(map(find, changed))
    rng = random.Random(0)
    for _ in range(20_000):
        limit = rng.choice((0x400, 0x3100, 0x10000, 0x110000))
        codes = [rng.randrange(limit) for _ in range(4)]
        text = "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)
        if not find(text):
            assert unicodedata.is_normalized("NFC", text)


def _flat(rows: list[list[int]]) -> FlatIds:
    return FlatIds(np.array([i for row in rows for i in row], np.int64), np.array([len(row) for row in rows], np.int64))


def test_flat_ids_do_what_lists_do() -> None:
    rng = random.Random(0)
    for _ in range(50):
        rows = [[rng.randrange(9) for _ in range(rng.randrange(4))] for _ in range(rng.randrange(1, 7))]
        flat, marks = _flat(rows), np.array([rng.random() < 0.5 for _ in rows])
        assert flat.rows() == rows
        assert wrap(flat, [7, 8], [9]).rows() == [[7, 8, *row, 9] for row in rows]
        assert append(flat, 5, marks).rows() == [
            [*row, 5] if mark else row for row, mark in zip(rows, marks, strict=True)
        ]
        assert select(flat, marks).rows() == [row for row, mark in zip(rows, marks, strict=True) if mark]
        tokens = np.arange(len(rows))
        expected = [[i, *row] if mark else row for i, (row, mark) in enumerate(zip(rows, marks, strict=True))]
        assert prepend(flat, tokens, marks).rows() == expected
        cut = np.array([min(1, len(row)) for row in rows])
        assert strip(flat, cut, np.zeros_like(cut)).rows() == [row[1:] for row in rows]
        assert strip(flat, np.zeros_like(cut), cut).rows() == [row[:-1] for row in rows]
        both = interleave(select(flat, ~marks), select(flat, marks), marks)
        assert both.rows() == rows
        assert dataclasses.is_dataclass(both)
