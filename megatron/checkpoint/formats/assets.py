"""The files of a Hugging Face folder that are no weights: configuration and tokenizer.

Formats other than Hugging Face's keep them in a sub-folder `huggingface` beside the checkpoints, so that a model that
went through several formats comes back complete.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.checkpoint.errors import CorruptCheckpoint

FOLDER = "huggingface"
CONFIG = "config.json"
_TOKENIZER = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
)
_LOADABLE = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class Assets:
    """Files to carry along, by the name they have in a Hugging Face folder."""

    files: Mapping[str, Path] = field(default_factory=dict)

    def config(self) -> dict[str, Any] | None:
        """What config.json says; None if there is none."""
        path = self.files.get(CONFIG)
        return None if path is None else read_json(path)

    def has_tokenizer(self) -> bool:
        """Whether a tokenizer can be made of the files."""
        return any(name in self.files for name in _LOADABLE)

    def tokenizer_folder(self) -> Path | None:
        """The folder of the tokenizer, if one can be made of the files."""
        return next((self.files[name].parent for name in _LOADABLE if name in self.files), None)

    def copy_to(self, folder: Path) -> None:
        """Write all of them into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, path in self.files.items():
            shutil.copyfile(path, folder / name)


def read_json(path: Path) -> dict[str, Any]:
    """The contents of a JSON file.

    Raises:
        CorruptCheckpoint: it is missing, or not JSON.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CorruptCheckpoint(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise CorruptCheckpoint(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CorruptCheckpoint(f"{path} does not hold a JSON object")
    return content


def assets_in(folder: Path) -> Assets:
    """The files in a Hugging Face folder."""
    names = (CONFIG, "generation_config.json", *_TOKENIZER)
    return Assets({name: folder / name for name in names if (folder / name).is_file()})


def assets_beside(root: Path, settings: Mapping[str, Any]) -> Assets:
    """The files that were carried along with checkpoints, completed by the tokenizer of the run that wrote them.

    Args:
        root: folder of the checkpoints.
        settings: record of the run, whose tokenizer is taken if none was carried along and it is still there.
    """
    carried = assets_in(root / FOLDER)
    return carried if carried.has_tokenizer() else Assets({**_tokenizer_of(settings).files, **carried.files})


def with_tokenizer(assets: Assets, tokenizer: Path | None) -> Assets:
    """The files with another tokenizer: a folder, or one file of it."""
    if tokenizer is None:
        return assets
    others = {name: path for name, path in assets.files.items() if name not in _TOKENIZER}
    return Assets({**others, **_tokenizer_of({"tokenizer_model": str(tokenizer)}).files})


def _tokenizer_of(settings: Mapping[str, Any]) -> Assets:
    model = settings.get("tokenizer_model")
    if isinstance(model, str) and Path(model).is_dir():
        found = assets_in(Path(model)).files
        return Assets({name: path for name, path in found.items() if name in _TOKENIZER})
    sources = {"vocab.json": settings.get("vocab_file"), "merges.txt": settings.get("merge_file")}
    if isinstance(model, str):
        sources["tokenizer.json" if model.endswith(".json") else "tokenizer.model"] = model
    found = {name: Path(path) for name, path in sources.items() if isinstance(path, str) and Path(path).is_file()}
    return Assets(found)
