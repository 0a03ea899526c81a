"""Access to the C++ index builders."""

from __future__ import annotations

import importlib
from types import ModuleType


def index_builder() -> ModuleType:
    """The compiled module of `csrc/index_builder.cpp`.

    There is no slow substitute and nothing is compiled here: a training job is the wrong place for both.

    Raises:
        ImportError: the extension was not built for this Python.
    """
    try:
        return importlib.import_module("megatron.data._index_builder")
    except ImportError as error:
        raise ImportError(
            f"The C++ index builders are not usable ({error}). "
            "Build them once, from the root of the repository and with this Python: pip install -e ."
        ) from error
