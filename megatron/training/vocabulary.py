"""The tokenizer of a run and the architecture with its vocabulary."""

from __future__ import annotations

from megatron.config.architecture import Architecture
from megatron.config.run import RunConfig
from megatron.tokenizer import Tokenizer, build_tokenizer, settings_of_run
from megatron.training.report import Printer


def build_vocabulary(config: RunConfig, say: Printer) -> tuple[Tokenizer, Architecture]:
    """The tokenizer, and the model with as many words; reports the padding of the vocabulary as Megatron does."""
    say(f"> building {config.tokenizer.tokenizer_type} tokenizer ...")
    tokenizer = build_tokenizer(settings_of_run(config.tokenizer))
    arch = config.architecture(tokenizer.vocab_size)
    padding = arch.padded_vocab_size - arch.vocab_size
    say(f" > padded vocab (size: {arch.vocab_size}) with {padding} dummy tokens (new size: {arch.padded_vocab_size})")
    return tokenizer, arch
