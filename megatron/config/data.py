"""Settings of the training data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron.config.schema import option, resolved


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where tokens come from, and how samples are cut from them."""

    data_path: tuple[str, ...] | None = option(
        None, "Prefixes of .bin/.idx pairs: one, or weight prefix weight prefix ...; split by --split.", many="*"
    )
    train_data_path: tuple[str, ...] | None = option(None, "As --data-path, for training alone.", many="*")
    valid_data_path: tuple[str, ...] | None = option(None, "As --data-path, for validation alone.", many="*")
    test_data_path: tuple[str, ...] | None = option(None, "As --data-path, for testing alone.", many="*")
    data_args_path: str | None = option(None, "File whose words are the value of --data-path.")
    per_split_data_args_path: str | None = option(
        None, "JSON file with the lists train, valid and test: the values of the three --*-data-path."
    )
    mock_data: bool = option(False, "Train on made-up token sequences; no data files needed.")
    split: str = option("969, 30, 1", "Proportions of training, validation and test documents.")
    data_cache_path: str | None = option(None, "Directory for index files. Default: beside the data.")
    seq_length: int = resolved("Length of a sample, in tokens.", minimum=1)
    dataloader_type: Literal["single", "cyclic"] = resolved(
        "single: one pass in a fixed order; cyclic: shuffled passes. Default: single."
    )
    num_workers: int = option(2, "Processes per rank that load data; 0 loads in the training process.", minimum=0)
    mid_level_dataset_surplus: float = option(
        0.005, "Fraction by which each corpus of a blend is prepared beyond its share, of its samples.", minimum=0
    )
    reset_position_ids: bool = option(False, "Positions start again after an end-of-document token.")
    reset_attention_mask: bool = option(False, "Attention does not cross an end-of-document token.")
    is_instruction_dataset: bool = option(
        False, "The data paths are prefixes of instruction data: only answers are learned."
    )
    neat_pack: bool = option(
        False, "With instruction data: several examples share a sample, and do not see each other."
    )
    variable_seq_lengths: bool = option(
        False, "With instruction data: pad to the longest sample of a micro-batch, not to --seq-length."
    )
    eod_mask_loss: bool = option(False, "No loss for end-of-document tokens.")
    fim_data: bool = option(False, "Rearrange training documents to learn to fill in their middle.")
    fim_rate: float = option(0.5, "Probability that a document is rearranged.", minimum=0, maximum=1)
    fim_spm_rate: float = option(
        0.5, "Probability that a rearranged document starts with its suffix.", minimum=0, maximum=1
    )
    fim_split_sample: str | None = option(None, "Token around which documents are cut into fragments.")
    fim_fragment_rate: float | None = option(
        None, "Probability that a fragment is rearranged, of a document that is chosen.", minimum=0, maximum=1
    )
    fim_no_prefix: str | None = option(None, "Documents that begin with this text are left as they are.")
    fim_prefix_token: str = option("<fim_prefix>", "Token in front of the prefix.")
    fim_middle_token: str = option("<fim_middle>", "Token in front of the middle.")
    fim_suffix_token: str = option("<fim_suffix>", "Token in front of the suffix.")
    fim_pad_token: str = option("<fim_pad>", "Token that fills samples up.")
    fim_eod_token: str | None = option(None, "Token that ends documents. Default: that of the tokenizer.")
    train_data_exact_num_epochs: int | None = option(
        None, "Build the training samples from exactly this number of epochs.", minimum=1
    )
