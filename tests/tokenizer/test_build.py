"""What is refused and with which words, the fingerprint, and the check against a dataset."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron.config.schema import options
from megatron.config.tokenizer import TokenizerConfig
from megatron.tokenizer import (
    TextError,
    TokenizerError,
    TokenizerSettings,
    build_tokenizer,
    check_fits,
    settings_of_run,
)
from megatron.tokenizer.flags import add_tokenizer_flags, tokenizer_settings
from tests.tokenizer.conftest import EOD
from tests.tokenizer.test_ids import build


def refused(pattern: str, kind: str, **fields: object) -> None:
    with pytest.raises(TokenizerError, match=pattern):
        build(kind, **fields)


def test_unknown_and_refused_types() -> None:
    refused("'HuggingFaceTokeniser' is unknown; did you mean HuggingFaceTokenizer", "HuggingFaceTokeniser")
    refused("unknown; did you mean .*GPT2BPETokenizer", "gpt2bpe")
    refused("BertWordPieceCase is not supported: it is for BERT", "BertWordPieceCase")


def test_missing_flags_and_files(tmp_path: Path, folder: Path) -> None:
    refused("needs --vocab-file, which was not given", "GPT2BPETokenizer")
    refused("needs --merge-file", "GPT2BPETokenizer", vocab_file=str(folder / "vocab.json"))
    refused("--vocab-file .*: no such file", "GPT2BPETokenizer", vocab_file="/no/vocab.json", merge_file="x")
    refused("needs --tokenizer-model, which", "HFTokenizer")
    refused("needs --tokenizer-model, which", "Llama2Tokenizer")
    refused("is a folder; Llama2Tokenizer needs a file", "Llama2Tokenizer", model=str(tmp_path))
    refused("needs --vocab-size", "NullTokenizer")
    refused("fetch it first with `hf download some/model`", "HFTokenizer", model="some/model")
    refused("holds none of tokenizer.json, .*found: nothing", "HFTokenizer", model=str(tmp_path))


def test_wrong_kinds_of_file(folder: Path, pieces: Path, rank_file: Path, rank_json: Path) -> None:
    fast = str(folder / "tokenizer.json")
    refused("SentencePiece model: use --tokenizer-type Llama2", "HFTokenizer", model=str(pieces))
    refused("use --tokenizer-type TikTokenizer", "HFTokenizer", model=str(rank_json))
    refused("tokenizer.json is read by --tokenizer-type HuggingFaceTokenizer", "Llama2Tokenizer", model=fast)
    refused("use --tokenizer-type Llama3Tokenizer", "Llama2Tokenizer", model=str(rank_file))
    refused("line 1 is not a tiktoken entry", "Llama3Tokenizer", model=str(pieces))
    refused("is not a tiktoken vocabulary", "TikTokenizer", model=fast, tiktoken_pattern="v1")
    merges = str(folder / "merges.txt")
    refused("is not a vocab.json", "GPT2BPETokenizer", vocab_file=merges, merge_file=merges)
    refused("looks like a tokenizer.json", "GPT2BPETokenizer", vocab_file=fast, merge_file=merges)
    refused(
        "does not belong to|not a merges", "GPT2BPETokenizer", vocab_file=str(folder / "vocab.json"), merge_file=fast
    )


def test_missing_end_of_document(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "tokenizer.json", tmp_path)
    refused(
        re.escape(f"its special tokens are {EOD}, <pad>); name one with --eod-token"),
        "HFTokenizer",
        model=str(tmp_path),
    )
    refused("--eod-token 'nope' is not in the vocabulary", "HFTokenizer", model=str(tmp_path), eod_token="nope")
    assert build("HFTokenizer", model=str(tmp_path), eod_token="<pad>").eod == 1
    vocab = json.loads((folder / "vocab.json").read_text())
    del vocab[EOD]
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    files = {"vocab_file": str(tmp_path / "vocab.json"), "merge_file": str(folder / "merges.txt")}
    refused(
        "has no '<.endoftext.>' to end documents with; name its token with --eod-token", "GPT2BPETokenizer", **files
    )


def test_settings_a_type_cannot_obey(folder: Path, pieces: Path, rank_json: Path) -> None:
    refused("has no use for --merge-file", "HFTokenizer", model=str(folder), merge_file="merges.txt")
    refused("has no use for --vocab-extra-ids", "Llama2Tokenizer", model=str(pieces), vocab_extra_ids=3)
    refused("--vocab-size 786 was given, but .* has 400 ids", "HFTokenizer", model=str(folder), vocab_size=786)
    assert build("HFTokenizer", model=str(folder), vocab_size=400).vocab_size == 400
    tik = {"model": str(rank_json), "tiktoken_pattern": "v2"}
    refused("needs --tiktoken-pattern v1 or v2; it was not given", "TikTokenizer", model=str(rank_json))
    refused("not 'v3'", "TikTokenizer", model=str(rank_json), tiktoken_pattern="v3")
    refused("missing: <unk> </s>", "TikTokenizer", special_tokens=("<s>",), **tik)
    refused("names a token twice", "TikTokenizer", special_tokens=("<s>", "<s>"), **tik)
    refused("5 is less than the 7 tokens named", "TikTokenizer", tiktoken_num_special_tokens=5, **tik)
    refused("must be from 1001 to 1265", "TikTokenizer", vocab_size=5000, **tik)
    refused("--vocab-size 0: must be at least 1", "NullTokenizer", vocab_size=0)
    refused("--null-tokenizer-eod-id 100: must be from 0 to 99", "NullTokenizer", vocab_size=100, null_eod_id=100)


def test_damaged_ranks(tmp_path: Path, rank_file: Path) -> None:
    lines = rank_file.read_bytes().splitlines(keepends=True)
    gap, bytes_missing = tmp_path / "gap", tmp_path / "bytes"
    gap.write_bytes(b"".join(lines[:5] + lines[6:]))
    bytes_missing.write_bytes(b"".join(lines[:100]))
    refused("ranks are not 0, 1, 2", "Llama3Tokenizer", model=str(gap))
    refused("lacks single bytes", "Llama3Tokenizer", model=str(bytes_missing))


def test_texts_that_cannot_be_encoded(folder: Path, pieces: Path, rank_file: Path) -> None:
    kinds = (
        build("HFTokenizer", model=str(folder)),
        build("Llama2Tokenizer", model=str(pieces)),
        build("Llama3Tokenizer", model=str(rank_file)),
    )
    for tokenizer in kinds:
        with pytest.raises(TextError, match="lone surrogate at character 1"):
            tokenizer.encode_batch(["fine", "a\ud800b"])
    with pytest.raises(TextError, match="whitespace is too long"):
        kinds[2].encode("a" + " " * 2_000_000 + "b")
    null = build("NullTokenizer", vocab_size=10)
    with pytest.raises(TextError, match="holds id 11"):
        null.encode("3 11")
    with pytest.raises(TextError, match="not numbers"):
        null.encode("3 x")


def test_fingerprint_depends_on_content_and_settings_not_on_paths(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    original = build("HFTokenizer", model=str(folder)).fingerprint()
    assert build("HuggingFaceTokenizer", model=str(copy)).fingerprint() == original
    assert build("HFTokenizer", model=str(folder), eod_token="<pad>").fingerprint() != original
    (copy / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<pad>"}))
    assert build("HFTokenizer", model=str(copy)).fingerprint() != original
    assert build("NullTokenizer", vocab_size=5).fingerprint() != build("NullTokenizer", vocab_size=6).fingerprint()


def test_cached_hub_name_is_found_without_network(folder: Path, tmp_path: Path) -> None:
    commit = "0" * 40
    cached = tmp_path / "hub" / "models--some--model"
    shutil.copytree(folder, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    code = (
        "from megatron.tokenizer import *;"
        "print(build_tokenizer(TokenizerSettings(type='HFTokenizer', model='some/model')).vocab_size)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"HF_HOME": str(tmp_path), "PATH": "/usr/bin", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "400\n", done.stderr


def test_folder_with_tokens_beyond_its_model_is_refused(pieces: Path, tmp_path: Path) -> None:
    shutil.copy(pieces, tmp_path / "tokenizer.model")
    (tmp_path / "added_tokens.json").write_text('{"<extra>": 400}')
    refused("adds tokens that tokenizer.model does not have", "PretrainedFromHF", model=str(tmp_path))


def test_check_fits() -> None:
    tokenizer = build_tokenizer(TokenizerSettings(type="NullTokenizer", vocab_size=70_000))
    check_fits(tokenizer, max_id=70_000, dtype=np.dtype(np.int32), dataset="corpus")
    with pytest.raises(TokenizerError, match=r"corpus holds token id 70001, but NullTokenizer .* ids 0 to 70000"):
        check_fits(tokenizer, max_id=70_001, dtype=np.dtype(np.int32), dataset="corpus")
    with pytest.raises(TokenizerError, match="stores ids as uint16, at most 65535"):
        check_fits(tokenizer, max_id=5, dtype=np.dtype(np.uint16), dataset="corpus")


def test_nothing_heavy_is_imported() -> None:
    heavy = "{'torch', 'transformers', 'tokenizers', 'tiktoken', 'sentencepiece', 'huggingface_hub'}"
    code = f"import sys, megatron.tokenizer; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_flags_of_a_tool_and_of_a_run_give_the_same_settings() -> None:
    words = (
        "--tokenizer-type TikTokenizer --tokenizer-model m --vocab-file v --merge-file g --vocab-size 9 "
        "--vocab-extra-ids 3 --eod-token e --tokenizer-special-tokens a b --tiktoken-pattern v1 "
        "--tiktoken-num-special-tokens 7 --null-tokenizer-eod-id 5 --null-tokenizer-pad-id 4 "
        "--tokenizer-hf-no-use-fast --tokenizer-hf-no-include-special-tokens"
    )
    parser = argparse.ArgumentParser()
    add_tokenizer_flags(parser)
    of_tool = tokenizer_settings(parser.parse_args(words.split()))
    of_run = settings_of_run(
        TokenizerConfig(
            tokenizer_type="TikTokenizer",
            tokenizer_model="m",
            vocab_file="v",
            merge_file="g",
            vocab_size=9,
            vocab_extra_ids=3,
            eod_token="e",
            special_tokens=("a", "b"),
            tiktoken_pattern="v1",
            tiktoken_num_special_tokens=7,
            null_tokenizer_eod_id=5,
            null_tokenizer_pad_id=4,
            tokenizer_hf_no_use_fast=True,
            tokenizer_hf_no_include_special_tokens=True,
        )
    )
    assert of_tool == of_run
    neutral = TokenizerSettings(type="NullTokenizer")
    assert tokenizer_settings(parser.parse_args(["--tokenizer-type", "NullTokenizer"])) == neutral
    assert settings_of_run(TokenizerConfig(tokenizer_type="NullTokenizer")) == neutral
    # Every flag that a tool takes is also a flag of training.
    flags = {name for action in parser._actions for name in action.option_strings} - {"-h", "--help"}
    known = {name for option in options(TokenizerConfig) for name in option.names}
    assert flags - known <= {"--tokenizer-not-use-fast"}
