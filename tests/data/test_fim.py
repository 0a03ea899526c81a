"""Fill in the middle: what is rearranged, how often, and that nothing is lost."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from megatron.data.batch import MaskRules, make_batch
from megatron.data.errors import DataError
from megatron.data.fim import FimDataset, FimSettings, find_tokens
from megatron.tokenizer import TokenizerSettings, build_tokenizer
from megatron.tokenizer.base import Tokenizer

EOD = "<|endoftext|>"
NAMES = ("<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>")
WORDS = "def f(x): return x + 1 # \u00e4\u00f6 \u6f22\u5b57"


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Bytes and the special tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    engine = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    engine.pre_tokenizer, engine.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    engine.add_special_tokens([AddedToken(text, special=True) for text in (EOD, "<file>", *NAMES)])
    engine.save(str(folder / "tokenizer.json"))
    return build_tokenizer(
        TokenizerSettings(type="HuggingFaceTokenizer", model=str(folder / "tokenizer.json"), eod_token=EOD)
    )


def _samples(codec: Tokenizer, number: int, length: int = 200) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    samples = []
    for _ in range(number):
        ids: list[int] = []
        while len(ids) < length:
            start = int(rng.integers(0, len(WORDS)))
            ids += [*codec.encode((WORDS[start:] + WORDS) * int(rng.integers(1, 3))), codec.eod]
        samples.append(np.array(ids[:length], np.int64))
    return samples


def _dataset(codec: Tokenizer, samples: list[np.ndarray], **settings: object) -> FimDataset:
    chosen = FimSettings(**settings)  # type: ignore[arg-type]
    return FimDataset(samples, chosen, find_tokens(chosen, codec, codec.eod), codec, 7)


def _restored(text: str) -> str:
    """The document that a rearranged one was made of: the plain reading of the two published forms."""
    if not text.startswith(NAMES[0]):
        return text
    if text.startswith(NAMES[0] + NAMES[2]):  # suffix first
        suffix, rest = text[len(NAMES[0] + NAMES[2]) :].split(NAMES[1])
        return rest + suffix
    prefix, rest = text[len(NAMES[0]) :].split(NAMES[2])
    suffix, middle = rest.split(NAMES[1])
    return prefix + middle + suffix


def test_documents_come_back(codec: Tokenizer) -> None:
    samples = _samples(codec, 40, 400)
    dataset = _dataset(codec, samples, rate=0.7, spm_rate=0.4)
    changed = first_suffix = total = 0
    for number, before in enumerate(samples):
        after = dataset[number]
        assert len(after) == len(before)
        documents = codec.decode(after.tolist()).split(EOD)
        originals = codec.decode(before.tolist()).split(EOD)
        # The last ones are cut where the sample ends.
        for document, original in zip(documents[:-1], originals, strict=False):
            assert _restored(document) == original
            total += 1
            changed += document.startswith(NAMES[0])
            first_suffix += document.startswith(NAMES[0] + NAMES[2])
    assert 0.6 < changed / total < 0.8
    assert 0.3 < first_suffix / changed < 0.5


def test_it_depends_on_the_seed_and_the_number_alone(codec: Tokenizer) -> None:
    samples = _samples(codec, 4)
    dataset = _dataset(codec, samples)
    forward = [dataset[i].tolist() for i in range(4)]
    again = pickle.loads(pickle.dumps(dataset))
    assert [again[i].tolist() for i in reversed(range(4))] == forward[::-1]
    same = _dataset(codec, [samples[0]] * 6, rate=1.0)
    assert len({tuple(same[i].tolist()) for i in range(6)}) > 3


def test_no_rate_changes_nothing(codec: Tokenizer) -> None:
    samples = _samples(codec, 3)
    dataset = _dataset(codec, samples, rate=0.0)
    assert all((dataset[i] == samples[i]).all() for i in range(3))


def test_fragments_and_prefixes_that_stay(codec: Tokenizer) -> None:
    text = "<file>keep this<file>change this one<file>keep that"
    sample = np.array([*codec.encode(text), codec.eod], np.int64)
    rules = {"rate": 1.0, "split_sample": "<file>", "fragment_rate": 1.0, "no_prefix": "keep"}
    after = codec.decode(_dataset(codec, [np.concatenate([sample, sample])], **rules)[0].tolist())
    first, *_ = after.split(EOD)
    pieces = first.split("<file>")
    assert [pieces[0], pieces[1], pieces[3]] == ["", "keep this", "keep that"]
    assert pieces[2].startswith(NAMES[0])
    assert _restored(pieces[2]) == "change this one"


def test_a_sample_that_begins_within_a_character_is_left_alone(codec: Tokenizer) -> None:
    sample = np.array(codec.encode("\u6f22\u5b57")[1:], np.int64)
    assert (_dataset(codec, [sample], rate=1.0)[0] == sample).all()


def test_padding_is_not_learned(codec: Tokenizer) -> None:
    pad = find_tokens(FimSettings(), codec, codec.eod).pad
    samples = np.array([[1, 2, pad, pad]])
    batch = make_batch(samples, np.array([True]), MaskRules(eod=codec.eod, pad=pad), 0)
    assert batch.loss_mask.tolist() == [[1, 0, 0]]


def test_settings_that_cannot_be_obeyed(codec: Tokenizer) -> None:
    with pytest.raises(DataError, match="--fim-middle-token '<no>' is 4 tokens, not one"):
        find_tokens(FimSettings(middle_token="<no>"), codec, codec.eod)
    with pytest.raises(DataError, match=r"--fim-rate 1\.5: must be from 0 to 1"):
        FimSettings(rate=1.5)
    with pytest.raises(DataError, match="go together"):
        FimSettings(fragment_rate=0.5)


def test_through_the_loader(codec: Tokenizer, tmp_path: Path) -> None:
    from megatron.data.indexed_writer import IndexedDatasetWriter
    from megatron.data.loader import build_data_iterators
    from megatron.data.samplers import Share
    from megatron.data.settings import DataSettings, SampleCounts

    with IndexedDatasetWriter(tmp_path / "a", np.uint16) as writer:
        for sample in _samples(codec, 20):
            writer.add_document(sample)
    settings = DataSettings(seq_length=64, seed=1, data_path=(str(tmp_path / "a"),), split="90,10", num_workers=1)
    chosen = FimSettings(rate=1.0)
    streams = build_data_iterators(
        settings,
        SampleCounts(train=8, valid=2, test=0),
        share=Share(micro_batch_size=2),
        vocab_size=codec.vocab_size,
        eod=codec.eod,
        fim=(chosen, find_tokens(chosen, codec, codec.eod), codec),
    )
    assert streams.train is not None
    assert streams.valid is not None
    prefix = find_tokens(chosen, codec, codec.eod).prefix
    assert (next(streams.train).tokens == prefix).any()
    assert not (next(streams.valid).tokens == prefix).any()
