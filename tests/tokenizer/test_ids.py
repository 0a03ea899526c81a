"""Ids equal those of the reference libraries, and decoding gives the text back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import processors

from megatron.tokenizer import Tokenizer, TokenizerSettings, build_tokenizer
from tests.tokenizer.conftest import EOD, TEXT, ranks

SAMPLES = [
    *TEXT[:4],
    "",
    " ",
    "\n\n  x\ty  ",
    f"one{EOD}two",
    "emoji \U0001f600 and combining e\u0301",
    "a" * 3000,
    "\x00\x7f\ufeff",
    "<s> </s> <unk> <pad>",
]
unicode_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
_quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def build(kind: str, **fields: object) -> Tokenizer:
    return build_tokenizer(TokenizerSettings(type=kind, **fields))  # type: ignore[arg-type]


def gpt2(folder: Path) -> Tokenizer:
    return build("GPT2BPETokenizer", vocab_file=str(folder / "vocab.json"), merge_file=str(folder / "merges.txt"))


def test_gpt2_ids_equal_transformers(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.GPT2TokenizerFast(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    ours = gpt2(folder)
    assert ours.encode_batch(SAMPLES) == [reference(text).input_ids for text in SAMPLES]
    assert (ours.vocab_size, ours.eod) == (len(reference), reference.eos_token_id)


def test_gpt2_pair_equals_tokenizer_json(folder: Path) -> None:
    texts = [text for text in SAMPLES if "<pad>" not in text]  # Only tokenizer.json knows that <pad> is special.
    assert gpt2(folder).encode_batch(texts) == build("HFTokenizer", model=str(folder)).encode_batch(texts)


@pytest.mark.parametrize("before", [[], ["<bos>"]])
def test_huggingface_folder_equals_transformers(folder: Path, tmp_path: Path, before: list[str]) -> None:
    transformers = pytest.importorskip("transformers")
    engine = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    engine.add_special_tokens(before)
    special = [(token, engine.token_to_id(token)) for token in before]
    engine.post_processor = processors.TemplateProcessing(single=[*before, "$A"], special_tokens=special)
    engine.save(str(tmp_path / "tokenizer.json"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"additional_special_tokens": ["<extra>"], "add_eos_token": True}  # tokenizer.json overrules the latter.
    config |= dict.fromkeys(["bos_token"], before[0]) if before else {}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = build("HuggingFaceTokenizer", model=str(tmp_path))
    texts = [*SAMPLES, "with an <extra> token"]
    assert ours.encode_batch(texts) == [reference(text).input_ids for text in texts]
    assert [ours.encode(text) for text in texts] == ours.encode_batch(texts)
    assert ours.vocab_size == len(reference)
    assert (ours.bos, ours.eos, ours.pad) == (
        reference.bos_token_id,
        reference.eos_token_id,
        reference.pad_token_id,
    )
    bare = build("HuggingFaceTokenizer", model=str(tmp_path), hf_include_special_tokens=False)
    assert bare.encode_batch(texts) == [reference(text, add_special_tokens=False).input_ids for text in texts]


def test_truncation_and_padding_of_a_saved_file_do_not_cut_documents(folder: Path, tmp_path: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": "BatchLongest",
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 1,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    ours = build("HFTokenizer", model=str(tmp_path / "tokenizer.json"), eod_token=EOD)
    assert ours.encode_batch(TEXT[:4]) == gpt2(folder).encode_batch(TEXT[:4])


def test_sentencepiece_kinds(pieces: Path) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    expected = [reference.encode(text) for text in SAMPLES]
    plain = build("GPTSentencePieceTokenizer", model=str(pieces))
    llama = build("Llama2Tokenizer", model=str(pieces))
    folder = build("PretrainedFromHF", model=str(pieces.parent), hf_use_fast=False)
    assert plain.encode_batch(SAMPLES) == expected
    assert llama.encode_batch(SAMPLES) == [[1, *ids] for ids in expected] == folder.encode_batch(SAMPLES)
    assert (plain.vocab_size, plain.eod, plain.bos, plain.pad) == (400, 2, 1, None)


def test_marked_sentencepiece_adds_tokens_behind_the_model(pieces: Path) -> None:
    ours = build("SentencePieceTokenizer", model=str(pieces), vocab_extra_ids=2)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    assert ours.vocab_size == 400 + 4 + 1 + 2  # CLS SEP EOD MASK, PAD (the model has none), two extra ids
    assert (ours.eod, ours.pad, ours.bos, ours.eos) == (402, 404, 1, 2)
    assert ours.encode("the dog<EOD><extra_id_1> fox") == [
        *reference.encode("the dog"),
        402,
        406,
        *reference.encode(" fox"),
    ]
    assert ours.decode(ours.encode("the dog<EOD>fox")) == "the dog <EOD> fox"
    for text in (text for text in SAMPLES if "<" not in text):
        assert ours.encode(text) == reference.encode(text)


@pytest.mark.parametrize("pattern", ["v1", "v2"])
def test_tiktoken_json_and_rank_file(rank_json: Path, rank_file: Path, pattern: str) -> None:
    fields = {"tiktoken_pattern": pattern, "tiktoken_num_special_tokens": 10}
    ours = build("TikTokenizer", model=str(rank_json), **fields)
    same = build("TikTokenizer", model=str(rank_file), **fields)
    from megatron.tokenizer.ranks import _PATTERNS

    reference = tiktoken.Encoding(
        "reference",
        pat_str=_PATTERNS[pattern],
        mergeable_ranks={token: rank for rank, token in enumerate(ranks())},
        special_tokens={},
    )
    expected = [[number + 10 for number in reference.encode_ordinary(text)] for text in SAMPLES]
    assert ours.encode_batch(SAMPLES) == expected == same.encode_batch(SAMPLES)
    assert (ours.vocab_size, ours.bos, ours.eod, ours.pad) == (len(ranks()) + 10, 1, 2, 4)
    smaller = build("TikTokenizer", model=str(rank_json), vocab_size=266, **fields)
    assert smaller.encode("the") == [10 + byte for byte in b"the"]


def test_llama3_special_tokens_follow_the_ranks(rank_file: Path) -> None:
    ours = build("Llama3Tokenizer", model=str(rank_file))
    size = len(ranks())
    assert (ours.vocab_size, ours.bos, ours.eod, ours.pad) == (size + 256, size, size + 1, size + 4)
    assert ours.encode("the") == [size, 258]
    assert ours.encode("123 ")[1:] == [264, ord("3"), ord(" ")]
    assert ours.decode([size + 9]) == "<|eot_id|>"


def test_null_tokenizer_conventions() -> None:
    inside = build("NullTokenizer", vocab_size=100, null_eod_id=99, null_pad_id=0)
    behind = build("NullTokenizer", vocab_size=100)
    assert (behind.vocab_size, behind.eod, behind.pad) == (101, 100, None)
    assert (inside.vocab_size, inside.eod, inside.pad) == (100, 99, 0)
    assert behind.encode("1 2  100") == [1, 2, 100]
    assert behind.decode([1, 2]) == "1 2"


@_quick
@given(text=unicode_text)
def test_byte_level_round_trip(folder: Path, rank_json: Path, text: str) -> None:
    for ours in _lossless(folder, rank_json):
        ids = ours.encode(text)
        assert ours.decode(ids) == text
        assert all(0 <= number < ours.vocab_size for number in ids)


@_quick
@given(text=unicode_text)
def test_gpt2_equals_the_folder_on_any_text(folder: Path, text: str) -> None:
    assert gpt2(folder).encode(text) == build("HFTokenizer", model=str(folder)).encode(text)


def _lossless(folder: Path, rank_json: Path) -> list[Tokenizer]:
    tik = build("TikTokenizer", model=str(rank_json), tiktoken_pattern="v2", tiktoken_num_special_tokens=10)
    return [gpt2(folder), build("HFTokenizer", model=str(folder)), tik]
