"""Train a byte-level BPE tokenizer on a jsonl file and save it as a Hugging Face folder.

The folder holds tokenizer.json with its two configuration files (`--tokenizer-type HuggingFaceTokenizer`), and the same
tokenizer as vocab.json and merges.txt (`--tokenizer-type GPT2BPETokenizer`). The same text gives the same files.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

EOD = "<|endoftext|>"
_BYTES = 256


def texts(file: Path, key: str) -> Iterator[str]:
    """The texts of a jsonl file."""
    with file.open(encoding="utf-8") as stream:
        for line in stream:
            if line.strip():
                yield json.loads(line)[key]


def train(documents: Iterator[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of at most `vocab_size` tokens: the end of a document, all bytes, and the most frequent merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))
    roles = {"bos_token": EOD, "eos_token": EOD, "unk_token": EOD}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **roles}
    for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", roles)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Train, save, and say what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, type=Path, help="jsonl file")
    parser.add_argument("--output", required=True, type=Path, help="folder to write")
    parser.add_argument("--vocab-size", type=int, default=8192, help="number of tokens")
    parser.add_argument("--json-key", default="text", help="field of the text")
    args = parser.parse_args()
    if args.vocab_size < _BYTES + 1:
        parser.error(f"--vocab-size {args.vocab_size}: must be at least {_BYTES + 1}, the bytes and {EOD}")
    if not args.input.is_file():
        parser.error(f"--input {args.input}: no such file")
    tokenizer = train(texts(args.input, args.json_key), args.vocab_size)
    save(tokenizer, args.output)
    print(f"{args.output}: {tokenizer.get_vocab_size()} tokens")


if __name__ == "__main__":
    main()
