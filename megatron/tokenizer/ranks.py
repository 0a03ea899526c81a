"""tiktoken vocabularies: Megatron's JSON form, plain rank files, and LLaMA 3's `tokenizer.model`."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from pathlib import Path

import tiktoken

from megatron.tokenizer.base import TextError, TokenizerError, fingerprint_of, read_json, require_unicode
from megatron.tokenizer.settings import TokenizerSettings

# How text is cut into words before merging. These expressions are part of the published vocabularies.
_PATTERNS = {
    "v1": r"[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    "v2": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_MEGATRON_SPECIAL = ("<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>")
_NEEDED = ("<unk>", "<s>", "</s>")
_DEFAULT_VOCAB_SIZE = 2**17
_LLAMA3_SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
)
_LLAMA3_NUM_SPECIAL = 256


class RankTokenizer:
    """A tiktoken vocabulary. Special tokens spelled out in a text stay text, so a document cannot forge them."""

    def __init__(
        self,
        engine: tiktoken.Encoding,
        *,
        name: str,
        vocab_size: int,
        bos: int,
        eod: int,
        pad: int | None,
        add_bos: bool,
        fingerprint: str,
    ) -> None:
        """Wrap an engine; `add_bos` puts BOS in front of every text."""
        self._engine = engine
        self._before = [bos] if add_bos else []
        self._fingerprint = fingerprint
        self.name = name
        self.vocab_size = vocab_size
        self.bos: int | None = bos
        self.eos: int | None = eod
        self.eod = eod
        self.pad = pad

    def encode(self, text: str) -> list[int]:
        """Token ids of one text."""
        # tiktoken would silently replace a lone surrogate by U+FFFD.
        require_unicode(text)
        try:
            return self._before + self._engine.encode_ordinary(text)
        except BaseException as error:
            # The library's regular expressions overflow on whitespace runs of about a million characters, and the
            # panic of its Rust code is not an Exception.
            if type(error).__name__ != "PanicException":
                raise
            raise TextError("cannot be encoded by tiktoken: a run of whitespace is too long for it") from error

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of every text."""
        return [self.encode(text) for text in texts]

    def surroundings(self) -> tuple[list[int], list[int]]:
        """The ids that `encode` puts in front of every text and behind it."""
        return self._before, []

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these ids, special tokens spelled out; bytes that are not UTF-8 become U+FFFD."""
        return self._engine.decode(list(ids))

    def fingerprint(self) -> str:
        """Hash of the file and the settings."""
        return self._fingerprint


def load_tiktoken(file: Path, settings: TokenizerSettings) -> RankTokenizer:
    """`TikTokenizer`: special tokens take the first ids, the ranks of the file follow.

    Raises:
        TokenizerError: the file is of another kind, or the numbers do not fit together.
    """
    pattern = settings.tiktoken_pattern
    if pattern not in _PATTERNS:
        given = "it was not given" if pattern is None else f"not {pattern!r}"
        raise TokenizerError(f"TikTokenizer needs --tiktoken-pattern v1 or v2; {given}")
    reserved = settings.tiktoken_num_special_tokens
    special = _special_ids(settings.special_tokens or _MEGATRON_SPECIAL, reserved)
    ranks = _read_json_ranks(file) if file.suffix == ".json" else _read_rank_file(file)
    vocab_size = settings.vocab_size or min(_DEFAULT_VOCAB_SIZE, len(ranks) + reserved)
    if not reserved < vocab_size <= len(ranks) + reserved:
        raise TokenizerError(
            f"--vocab-size {vocab_size} does not fit {file}: with {reserved} special tokens "
            f"(--tiktoken-num-special-tokens) it must be from {reserved + 1} to {len(ranks) + reserved}"
        )
    kept = {token: rank + reserved for token, rank in ranks.items() if rank + reserved < vocab_size}
    return RankTokenizer(
        tiktoken.Encoding(file.stem, pat_str=_PATTERNS[pattern], mergeable_ranks=kept, special_tokens=special),
        name=f"{settings.type} {file}",
        vocab_size=vocab_size,
        bos=special["<s>"],
        eod=special["</s>"],
        pad=special.get("<pad>"),
        add_bos=False,
        fingerprint=fingerprint_of(
            "tiktoken", [file], {"pattern": pattern, "special": list(special), "vocab_size": vocab_size}
        ),
    )


def load_llama3(file: Path, settings: TokenizerSettings) -> RankTokenizer:
    """`Llama3Tokenizer`: Meta's `tokenizer.model`, 256 special tokens behind the ranks, BOS in front of every text.

    Raises:
        TokenizerError: the file is of another kind.
    """
    ranks = _read_rank_file(file)
    reserved = [f"<|reserved_special_token_{2 + i}|>" for i in range(_LLAMA3_NUM_SPECIAL - len(_LLAMA3_SPECIAL))]
    special = {token: len(ranks) + i for i, token in enumerate((*_LLAMA3_SPECIAL, *reserved))}
    return RankTokenizer(
        tiktoken.Encoding(file.stem, pat_str=_LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=special),
        name=f"{settings.type} {file}",
        vocab_size=len(ranks) + _LLAMA3_NUM_SPECIAL,
        bos=special["<|begin_of_text|>"],
        eod=special["<|end_of_text|>"],
        pad=special["<|finetune_right_pad_id|>"],
        add_bos=True,
        fingerprint=fingerprint_of("llama3", [file], {}),
    )


def _special_ids(tokens: Sequence[str], reserved: int) -> dict[str, int]:
    """Special tokens by id; what is reserved and not named is filled up with `<SPECIAL_n>`."""
    if len(set(tokens)) != len(tokens):
        raise TokenizerError(f"--tokenizer-special-tokens names a token twice: {' '.join(tokens)}")
    missing = [token for token in _NEEDED if token not in tokens]
    if missing:
        raise TokenizerError(
            f"--tokenizer-special-tokens must include {' '.join(_NEEDED)}; missing: {' '.join(missing)}"
        )
    if len(tokens) > reserved:
        raise TokenizerError(f"--tiktoken-num-special-tokens {reserved} is less than the {len(tokens)} tokens named")
    filled = [*tokens, *(f"<SPECIAL_{i}>" for i in range(len(tokens), reserved))]
    return {token: i for i, token in enumerate(filled)}


def _read_json_ranks(file: Path) -> dict[bytes, int]:
    """Megatron's form: a list of objects with `rank` and `token_bytes` (base64), in order of rank."""
    expected = "a tiktoken vocabulary (a JSON list of objects with rank, token_bytes and token_str)"
    content = read_json(file, flag="--tokenizer-model", expected=expected)
    try:
        ranks = {base64.b64decode(entry["token_bytes"], validate=True): int(entry["rank"]) for entry in content}
    except (TypeError, KeyError, ValueError) as error:
        raise TokenizerError(f"--tokenizer-model {file} is not {expected}") from error
    return _checked(ranks, len(content), file)


def _read_rank_file(file: Path) -> dict[bytes, int]:
    """The form of tiktoken itself: lines of `<base64 of the bytes> <rank>`."""
    lines = [line for line in file.read_bytes().splitlines() if line]
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise TokenizerError(
                f"--tokenizer-model {file}, line {number} is not a tiktoken entry (base64 and rank). A SentencePiece "
                "model is read by --tokenizer-type Llama2Tokenizer, tokenizer.json by HuggingFaceTokenizer"
            ) from error
    return _checked(ranks, len(lines), file)


def _checked(ranks: dict[bytes, int], entries: int, file: Path) -> dict[bytes, int]:
    if not ranks or len(ranks) != entries or sorted(ranks.values()) != list(range(entries)):
        raise TokenizerError(f"--tokenizer-model {file}: the {entries} ranks are not 0, 1, 2, ... each once")
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise TokenizerError(f"--tokenizer-model {file} lacks single bytes, so it cannot encode every text")
    return ranks
