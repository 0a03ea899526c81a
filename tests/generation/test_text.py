"""Between text and tokens: prompts, stop words, text that is shown while it is written."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, pre_tokenizers, processors

from megatron.generation.prompts import read_prompts
from megatron.generation.text import PromptError, Stream, Text, encode_prompts
from megatron.tokenizer import Tokenizer, TokenizerSettings, build_tokenizer
from tests.model.helpers import FAMILIES

ARCH = FAMILIES["llama"]


def byte_tokenizer(folder: Path) -> Tokenizer:
    """A token for each byte, <s> in front of every text, </s> behind it."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate([*letters, "<s>", "</s>"])}
    engine = Engine(models.BPE(vocabulary, []))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    engine.add_special_tokens(["<s>", "</s>"])
    marks = [("<s>", vocabulary["<s>"]), ("</s>", vocabulary["</s>"])]
    engine.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=marks)
    folder.mkdir(parents=True, exist_ok=True)
    engine.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    return build_tokenizer(TokenizerSettings(type="HuggingFaceTokenizer", model=str(folder)))


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return byte_tokenizer(tmp_path)


def _bytes(tokenizer: Tokenizer, text: str) -> list[int]:
    return encode_prompts(tokenizer, [text], replace(ARCH, max_positions=1000))[0][1:]


def test_prompts_begin_as_texts_begin_and_do_not_end(tokenizer: Tokenizer) -> None:
    whole = tokenizer.encode("ab")
    assert whole[0] == tokenizer.bos and whole[-1] == tokenizer.eos
    assert encode_prompts(tokenizer, ["ab", ""], ARCH) == [whole[:-1], [tokenizer.bos]]


@pytest.mark.parametrize(
    ("prompts", "arch", "message"),
    [
        (["x", "y" * 40], ARCH, r"prompt 2 of 2 \('y+'\) has 41 tokens, but the model has 32 positions: shorten it"),
        (["z" * 300], replace(ARCH, position="learned"), r"prompt 1 of 1 \('z{40}'\.\.\.\) has 301 tokens"),
    ],
)
def test_prompts_that_are_too_long(prompts: list[str], arch: object, message: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(PromptError, match=message):
        encode_prompts(tokenizer, prompts, arch)


def test_alibi_has_no_longest_text(tokenizer: Tokenizer) -> None:
    arch = FAMILIES["bloom"]
    (prompt,) = encode_prompts(tokenizer, ["z" * 300], arch)
    assert Text(tokenizer, prompt).ending(arch, ends=frozenset(), new_tokens=7).length == 7


def test_positions_limit_what_is_written(tokenizer: Tokenizer) -> None:
    """The last token that is written need not be read any more."""
    (prompt,) = encode_prompts(tokenizer, ["y" * 29], ARCH)
    assert len(prompt) == 30
    assert Text(tokenizer, prompt).ending(ARCH, ends=frozenset(), new_tokens=9).length == 3


def test_a_prompt_without_tokens() -> None:
    nothing = build_tokenizer(TokenizerSettings(type="NullTokenizer", vocab_size=82))
    with pytest.raises(PromptError, match="has no tokens"):
        encode_prompts(nothing, [""], ARCH)


def test_stop_words_end_a_text_and_are_not_part_of_it(tokenizer: Tokenizer) -> None:
    text = Text(tokenizer, [5], ["END", "STOP"])
    tokens = _bytes(tokenizer, "a bSTOP cEND")
    assert text.written(tokens) == "a b"
    assert [text.stopped(tokens[:at]) for at in (6, 7, 8)] == [False, True, True]
    ending = text.ending(ARCH, ends=frozenset({tokens[4]}), new_tokens=12)
    assert [ending.reason(tokens[:at]) for at in (4, 5, 7, 12)] == [None, "eos", "stop", "stop"]


def test_a_text_is_shown_as_far_as_it_is_certain(tokenizer: Tokenizer) -> None:
    """No part of a character, no part of a stop word; in the end everything."""
    pieces: list[str] = []
    stream = Stream(Text(tokenizer, [5], ["END"]), pieces.append)
    for token in _bytes(tokenizer, "a\u20acE\u00e9 EN"):
        stream.add(token)
    assert [piece for piece in pieces if piece] == ["a", "\u20ac", "E\u00e9", " "]
    stream.finish()
    assert "".join(pieces) == "a\u20acE\u00e9 EN"


def test_ids_without_a_text_are_left_out(tokenizer: Tokenizer) -> None:
    tokens = _bytes(tokenizer, "ab")
    assert Text(tokenizer, [5]).written([tokens[0], tokenizer.vocab_size, tokens[1]]) == "ab"


class _Pieces:
    """Like SentencePiece: the space in front of the first word is lost."""

    vocab_size = 100

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(f"w{number}" for number in ids)


def test_the_space_behind_a_prompt_is_kept() -> None:
    assert Text(_Pieces(), [1, 2]).written([3, 4]) == " w3 w4"


def test_prompts_of_a_command(tmp_path: Path) -> None:
    nowhere = io.StringIO("")
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "b.jsonl").write_text('{"prompt": "three\\nfour"}\n{"text": "five"}\n')
    assert read_prompts(["zero"], tmp_path / "a.txt", nowhere) == ["zero", "one", "two"]
    assert read_prompts([], tmp_path / "b.jsonl", nowhere) == ["three\nfour", "five"]
    assert read_prompts([], Path("-"), io.StringIO("six\nseven\n")) == ["six", "seven"]


def test_prompts_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"prompt": "x"}\n{"promt": "y"}\n')
    (tmp_path / "c.jsonl").write_text("{\n")
    for file, message in (
        (None, "give --prompt TEXT"),
        (tmp_path / "none.txt", "none.txt cannot be read"),
        (tmp_path / "b.jsonl", "line 2 must be a JSON object"),
        (tmp_path / "c.jsonl", "line 1 is not JSON"),
    ):
        with pytest.raises(PromptError, match=message):
            read_prompts([], file, io.StringIO(""))
