"""torch.compile for the blocks of a network: one program serves all of them, and hooks stay outside.

Shapes are static, as a run has one. Where the machine cannot compile, the network runs as it is and says so.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import nn

from featstore.backbones.family import Family
from featstore.errors import ConfigError


@dataclass(slots=True)
class Compilation:
    """How a network runs; `failure` says why it runs uncompiled although it was to be compiled."""

    mode: str
    failure: str | None = None

    @property
    def ran(self) -> str:
        """The mode that is in effect: off, on or graphs."""
        return "off" if self.failure is not None else self.mode


def compile_blocks(network: nn.Module, family: Family, mode: str) -> Compilation:
    """Have a network's blocks, or the whole network where the family has none, compiled at their first call.

    `mode` is `on`, or `graphs`, which records CUDA graphs on top.

    Raises:
        ConfigError: another mode, or CUDA graphs without a CUDA device.
    """
    if mode not in ("on", "graphs"):
        raise ConfigError(f"compile must be on or graphs here; got {mode!r}")
    device = next(parameter.device for parameter in network.parameters() if not parameter.is_meta)
    if mode == "graphs" and device.type != "cuda":
        raise ConfigError(f"--compile graphs records CUDA graphs, and the device is {device}; use --compile on or off")
    compilation = Compilation(mode)
    modules = list(network.get_submodule(family.blocks).children()) if family.blocks else [network]
    for module in modules:
        module.forward = _guarded(module.forward, compilation)
    if mode == "graphs":
        network.register_forward_pre_hook(_begin_step)
    network._compilation = compilation  # type: ignore[assignment]
    return compilation


def compilation_of(backbone: object) -> Compilation:
    """How a backbone's network runs."""
    found = getattr(getattr(backbone, "network", None), "_compilation", None)
    return found if isinstance(found, Compilation) else Compilation("off")


def _begin_step(network: nn.Module, inputs: tuple[Any, ...]) -> None:
    torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]


def _guarded(plain: Callable[..., Any], compilation: Compilation) -> Callable[..., Any]:
    """`plain` compiled, until the compiler fails; what the network itself raises passes through."""
    from torch._dynamo.exc import TorchDynamoException

    graphs = compilation.mode == "graphs"
    compiled = torch.compile(plain, dynamic=False, mode="reduce-overhead" if graphs else None)

    def forward(*args: Any, **options: Any) -> Any:
        if compilation.failure is not None:
            return plain(*args, **options)
        try:
            found = compiled(*args, **options)
        except TorchDynamoException as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            compilation.failure = f"{type(error).__name__}: {lines[0][:200]}"
            return plain(*args, **options)
        # The next step of a graph overwrites its outputs, which may be on their way to the host then.
        return _copied(found) if graphs else found

    return forward


def _copied(found: Any) -> Any:
    """Outputs of a module with tensors of their own: single ones, sequences, mappings and transformers' ModelOutput.

    Raises:
        ConfigError: an object that may hide tensors.
    """
    if isinstance(found, torch.Tensor):
        return found.clone()
    if isinstance(found, Mapping):
        values = {key: _copied(item) for key, item in found.items()}
        return type(found)(**values) if is_dataclass(found) else type(found)(values)  # type: ignore[call-arg]
    if isinstance(found, tuple) and hasattr(found, "_fields"):
        return type(found)(*(_copied(item) for item in found))
    if isinstance(found, list | tuple):
        return type(found)(_copied(item) for item in found)
    if found is None or isinstance(found, bool | int | float | str):
        return found
    raise ConfigError(
        f"--compile graphs copies the outputs of a network, and does not know how to copy {type(found).__name__}; "
        "use --compile on or off"
    )
