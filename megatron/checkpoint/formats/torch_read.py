"""Files of `torch.save`, read without running anything that is in them.

Checkpoints of training programs hold objects of those programs beside the tensors: arguments, enumerations, random
states. They are not needed here, their classes need not be installed, and a pickle could run any code. So only the
few things that tensors, containers and argument lists are made of are brought to life; whatever else is in the file
becomes an `Inert`.
"""

from __future__ import annotations

import argparse
import collections
import io
import pickle
import types
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.errors import CorruptCheckpoint


def _without_attributes(make: Any, _: Any, arguments: tuple[Any, ...], __: Any) -> Any:
    """A tensor that had a class or attributes of its own, without them; `make` has been let in already."""
    return make(*arguments)


def _data(data: Tensor, *_: Any) -> Tensor:
    """What a parameter holds."""
    return data


_ALLOWED: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor"): torch._utils._rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): _data,
    ("torch._utils", "_rebuild_parameter_with_state"): _data,
    ("torch._tensor", "_rebuild_from_type_v2"): _without_attributes,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("argparse", "Namespace"): argparse.Namespace,
    ("types", "SimpleNamespace"): types.SimpleNamespace,
    ("builtins", "set"): set,
    ("builtins", "complex"): complex,
    ("__builtin__", "set"): set,
}


class Inert:
    """Stands for an object whose class is not brought to life: what it was made of, and its attributes.

    Attributes:
        made_from: arguments of its construction.
        items: what was put into it, if it was a container.
    """

    made_from: tuple[Any, ...]
    items: list[Any]

    def __new__(cls, *made_from: Any, **_: Any) -> Inert:
        """What a pickle calls, sometimes without `__init__`."""
        made = super().__new__(cls)
        made.made_from, made.items = made_from, []
        return made

    def __call__(self, *made_from: Any) -> Inert:
        """What it would return is not known either."""
        return Inert(*made_from)

    def __setstate__(self, state: Any) -> None:
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.__dict__.update({str(name): value for name, value in part.items()})

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def append(self, value: Any) -> None:
        """What a pickled list subclass calls."""
        self.items.append(value)

    def extend(self, values: Any) -> None:
        """What a pickled list subclass calls."""
        self.items.extend(values)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Called for every global that the file names; never imports anything."""
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return type(name, (Inert,), {"__module__": module})


def _load(file: Any, **options: Any) -> Any:
    return _Unpickler(file, **options).load()


def load_torch(path: Path | io.BytesIO) -> Any:
    """What `torch.save` wrote. Tensors are views of the mapped file: they take memory when they are used.

    A file of torch before 1.6 cannot be mapped and is read as a whole.

    Raises:
        CorruptCheckpoint: it is missing, cut off or not a file of torch.
    """
    pickling = types.SimpleNamespace(__name__="inert", Unpickler=_Unpickler, load=_load)
    try:
        return torch.load(
            path,
            map_location="cpu",
            mmap=isinstance(path, Path) and zipfile.is_zipfile(path),
            weights_only=False,
            pickle_module=pickling,
        )
    except FileNotFoundError:
        raise CorruptCheckpoint(f"{path} is missing") from None
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError, TypeError) as error:
        raise CorruptCheckpoint(f"{path} cannot be read as a file of torch.save: {error}") from error


def flatten(tree: Any, prefix: str = "") -> dict[str, Tensor]:
    """The tensors in nested dictionaries, by their keys joined with dots; whatever is no tensor is left out."""
    if isinstance(tree, Tensor):
        return {prefix.removesuffix("."): tree.detach()}
    if not isinstance(tree, dict):
        return {}
    return {name: tensor for key, part in tree.items() for name, tensor in flatten(part, f"{prefix}{key}.").items()}
