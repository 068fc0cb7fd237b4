"""A user's own network: `module:function`, a callable that returns a `Backbone`."""

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

import torch
from torch import nn

from featstore.backbones.source import BackboneSource, LoadOptions
from featstore.backbones.tokens import Backbone
from featstore.errors import ConfigError, UnknownNameError, WeightsError

FIRST_LOAD = LoadOptions(device="cpu", compute_dtype="float32")


def from_function(name: str) -> BackboneSource:
    """The source of `module:function`, called as `function(device=, compute_dtype=, attention=)`.

    It is called once here, on the CPU in float32, to learn its architecture and weights. The object must satisfy
    `Backbone`; its weights are identified by its attribute `weights_digest` (any text that changes with them) or, if it
    is a torch module, by the SHA-256 of its tensors.

    Raises:
        UnknownNameError: nothing can be imported under that name.
        ConfigError: what it names or returns is no backbone, or it cannot be called so.
        WeightsError: its weights cannot be identified.
    """
    try:
        function = resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UnknownNameError(
            f"cannot import {name!r}: {error}; the module must be installed or its folder be on PYTHONPATH"
        ) from error
    if not callable(function):
        raise ConfigError(f"{name!r} names {type(function).__name__}, not a function that returns a backbone")
    loader = _FunctionLoader(name, function)
    backbone = loader(FIRST_LOAD)
    return BackboneSource(
        model=name,
        architecture=backbone.architecture,
        weights={"kind": "function", "function": name, "digest": _identify(name, backbone)},
        origin=f"function {name}",
        loader=loader,
    )


@dataclass(frozen=True)
class _FunctionLoader:
    name: str
    function: Callable[..., Any]

    def __call__(self, options: LoadOptions) -> Backbone:
        if options.memory not in ("auto", "resident") or options.weight_dtype != "same" or options.compile != "off":
            raise ConfigError(
                f"{self.name!r} loads its own network: --memory, --weight-dtype and --compile are not for it"
            )
        given = {"device": options.device, "compute_dtype": options.compute_dtype, "attention": options.attention}
        self._check_signature(given)
        backbone = self.function(**given)
        if not isinstance(backbone, Backbone):
            raise ConfigError(
                f"{self.name!r} returned {type(backbone).__name__}; it must return a backbone: "
                "a callable with architecture, device and dtype (featstore.backbones.tokens.Backbone)"
            )
        return backbone

    def _check_signature(self, given: dict[str, Any]) -> None:
        """Asked before the call, so that an error of the function itself stays one."""
        try:
            signature = inspect.signature(self.function)
        except (TypeError, ValueError):  # of some callables written in C none is known
            return
        try:
            signature.bind(**given)
        except TypeError as error:
            raise ConfigError(
                f"{self.name!r} takes {signature}, and is called as function(device=, compute_dtype=, attention=) "
                f"({error}); write it as `def {self.name.rpartition(':')[2]}(*, device, compute_dtype, attention)`"
            ) from error


def _identify(name: str, backbone: Backbone) -> str:
    stated = getattr(backbone, "weights_digest", None)
    if stated is not None:
        return str(stated)
    if not isinstance(backbone, nn.Module):
        raise WeightsError(
            f"the weights of {name!r} cannot be identified: give the object an attribute weights_digest, "
            "a text that changes whenever they do, or make it a torch module"
        )
    state = backbone.state_dict()
    summary = hashlib.sha256()
    for key in sorted(state):
        tensor = state[key].detach().cpu().contiguous()
        summary.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        summary.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return summary.hexdigest()
