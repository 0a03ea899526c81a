"""SIMULATION of what vendors' migration toolkits do: calls meant for "cuda" reach the simulated device.

Which names are redirected follows the list that torch_npu publishes with its `transfer_to_npu`, as far as this project,
FSDP2 and DTensor call them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.utils._device import _device_constructors

from tests.sim.build import Device

FACTORIES = (
    *("arange", "as_tensor", "empty", "empty_like", "empty_strided", "eye", "full", "full_like", "linspace", "load"),
    *("logspace", "normal", "ones", "ones_like", "rand", "rand_like", "randint", "randint_like", "randn"),
    *("randn_like", "randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros", "zeros_like"),
)
TENSOR_METHODS = (
    *("new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros", "pin_memory", "to"),
)
MODULE_METHODS = ("to", "to_empty")
KEYWORDS = ("device", "device_type", "map_location", "device_id")

Kind = Literal["match", "modified", "mismatch"]
"""The same function of the device; emulated with other calls; not there."""
Seen = Callable[[Kind, str, str, str], None]
"""Called with the kind, the name of the function, the call as it was written, and the call that was made of it."""


def written(name: str, args: Iterable[Any], kwargs: Mapping[str, Any]) -> str:
    """A call as source text; tensors and modules by their type alone."""

    def short(value: Any) -> str:
        plain = isinstance(value, (str, int, float, bool, torch.device, torch.dtype, torch.Size, type(None)))
        return repr(value) if plain else type(value).__name__

    words = [short(value) for value in args] + [f"{key}={short(value)}" for key, value in kwargs.items()]
    return f"{name}({', '.join(words)})"


class Redirect:
    """Changes torch so that `cuda` means a device.

    Args:
        device: the simulated device.
        place: what a number of a card is called on it; None for the current one.
        backend: takes the place of "nccl".
        seen: is told about every call that is redirected.
    """

    def __init__(self, device: Device, place: Callable[[int | None], str], backend: str, seen: Seen) -> None:
        self._device, self._place, self._backend, self._seen = device, place, backend, seen
        self.names: list[str] = []
        """Functions that are redirected."""

    def everything(self) -> None:
        """Redirect torch, its tensors and modules, `torch.cuda` and torch.distributed."""
        _device_constructors()  # torch keeps this list of its own functions: it must not see ours
        self._functions(torch, "torch", FACTORIES)
        self._functions(torch.Tensor, "torch.Tensor", TENSOR_METHODS)
        self._functions(torch.nn.Module, "torch.nn.Module", MODULE_METHODS)
        self._cuda()
        self._shortcuts()
        self._collectives()

    def elsewhere(self, value: Any) -> Any:
        """`value` with cuda replaced by the device, if it names that; else `value` itself."""
        if isinstance(value, str) and value.partition(":")[0] == "cuda":
            number = value.partition(":")[2]
            return self._place(int(number) if number else None)
        if isinstance(value, torch.device) and value.type == "cuda":
            return torch.device(self._place(value.index))
        return value

    def _functions(self, owner: Any, label: str, names: Iterable[str]) -> None:
        for name in names:
            self._set(owner, name, f"{label}.{name}", self._moving(getattr(owner, name), f"{label}.{name}"))

    def _set(self, owner: Any, name: str, label: str, function: Callable[..., Any]) -> None:
        setattr(owner, name, function)
        self.names.append(label)

    def _moving(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The function with its device arguments replaced."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            new_args = [self.elsewhere(value) for value in args]
            new_kwargs = {key: self.elsewhere(value) if key in KEYWORDS else value for key, value in kwargs.items()}
            pairs = [*zip(args, new_args, strict=True), *((kwargs[key], new_kwargs[key]) for key in kwargs)]
            if any(old is not new for old, new in pairs):
                self._seen("modified", name, written(name, args, kwargs), written(name, new_args, new_kwargs))
            return function(*new_args, **new_kwargs)

        return call

    def _cuda(self) -> None:
        module = torch.get_device_module(self._device)
        for name, function in vars(module).items():
            if not callable(function) or not hasattr(torch.cuda, name) or name == "Any":
                continue
            if name.startswith("_"):  # how torch itself asks whether the device is in use
                setattr(torch.cuda, name, function)
            else:
                self._set(torch.cuda, name, f"torch.cuda.{name}", self._same(name, function))
        self._set(torch.cuda, "get_device_capability", "torch.cuda.get_device_capability", self._none)

    def _same(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The device's function of the same name."""
        old, new = f"torch.cuda.{name}", f"torch.{self._device}.{name}"

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            new_args = [self.elsewhere(value) for value in args]
            new_kwargs = {key: self.elsewhere(value) for key, value in kwargs.items()}
            self._seen("match", old, written(old, args, kwargs), written(new, new_args, new_kwargs))
            return function(*new_args, **new_kwargs)

        return call

    def _none(self, device: Any = None) -> None:
        """Compute capabilities are NVIDIA's."""
        name = "torch.cuda.get_device_capability"
        self._seen("mismatch", name, written(name, (), {}), "None")

    def _shortcuts(self) -> None:
        """`.cuda()` of tensors and modules."""

        def cuda(value: Any, device: int | None = None, non_blocking: bool = False) -> Any:
            label = f"torch.{'Tensor' if isinstance(value, torch.Tensor) else 'nn.Module'}.cuda"
            place = self._place(device)
            self._seen("modified", label, written(label, (), {}), written(label.replace("cuda", "to"), (place,), {}))
            return value.to(place, non_blocking=non_blocking)

        self._set(torch.Tensor, "cuda", "torch.Tensor.cuda", cuda)
        self._set(torch.nn.Module, "cuda", "torch.nn.Module.cuda", cuda)

    def _collectives(self) -> None:
        real = dist.init_process_group
        label = "torch.distributed.init_process_group"

        @functools.wraps(real)
        def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> None:
            new = self._backend if backend == "nccl" else backend
            if new is not backend:
                self._seen("modified", label, written(label, (backend,), {}), written(label, (new,), {}))
            real(new, *args, **kwargs)

        self._set(dist, "init_process_group", label, init_process_group)
        get_backend = dist.ProcessGroup._get_backend
        dist.ProcessGroup._get_backend = lambda group, device: get_backend(group, self.elsewhere(device))
