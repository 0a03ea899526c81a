"""What the faked vendor operators have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.sim.build import Device


class Operators:
    """A namespace of simulated operators under the vendor's own schemas.

    An operator's maths is registered for host tensors. The simulated device runs it like any operator of torch: it
    checks that no tensor is elsewhere, counts the call and wraps the results.

    Args:
        device: the simulated device.
        namespace: of the operators, such as "npu".
        schemas: name -> schema, as the vendor's library registers it.
    """

    def __init__(self, device: Device, namespace: str, schemas: dict[str, str]) -> None:
        self._device = device
        self._namespace = namespace
        self._library = torch.library.Library(namespace, "FRAGMENT")
        self._schemas = schemas
        self._autograd = "AutogradHPU" if device == "hpu" else "AutogradPrivateUse1"

    def define(self, name: str, maths: Callable[..., Any], *, random: bool = False) -> None:
        """Register an operator; `random` ones draw from the device's generator through torch's default one."""
        tags = (torch.Tag.nondeterministic_seeded,) if random else ()
        self._library.define(self._schemas[name], tags=tags)
        self._library.impl(name, maths, "CPU")

    def differentiable(self, name: str, apply: Callable[..., Any]) -> None:
        """Let `apply` take calls of the operator that may need gradients."""
        self._library.impl(name, apply, self._autograd)

    def bind(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments by name, those left out with the schema's defaults."""
        schema = torch._C.parse_schema(f"{self._namespace}::{self._schemas[name]}")
        bound = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
        return bound | {a.name: value for a, value in zip(schema.arguments, args, strict=False)} | kwargs

    def function(self, name: str) -> Callable[..., Any]:
        """The operator as the vendor's Python package exports it: host tensors are refused."""
        operator = getattr(getattr(torch.ops, self._namespace), name)

        def call(*args: Any, **kwargs: Any) -> Any:
            for value in (*args, *kwargs.values()):
                if isinstance(value, Tensor) and value.device.type != self._device:
                    raise NotImplementedError(
                        f"Could not run '{self._namespace}::{name}' with arguments from the '{value.device}' backend"
                    )
            return operator(*args, **kwargs)

        call.__name__ = name
        return call


def below_autograd(operator: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call an operator from the forward of its own autograd function."""
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args, **kwargs)
