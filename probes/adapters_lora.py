"""LoRA through peft: adapters into a network in place, their sum with it, and plain weights out of it.

peft is imported here and nowhere else, when LoRA is asked for; none of it reaches a network (only `from_pretrained`
would, and nothing here calls it).
"""

import contextlib
import hashlib
import importlib.util
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from featstore.errors import ConfigError

NAME = "default"  # of the one adapter, in peft's names of parameters
BASE = "base_layer."  # what peft puts into the names of what it wraps


def import_peft() -> Any:
    """The module `peft`.

    Raises:
        ConfigError: it is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise ConfigError(
            "LoRA needs peft, which is not installed: pip install 'featstore[finetune]'; "
            "full, bitfit, last-k and linear-online run without it"
        )
    import peft

    return peft


def inject(
    network: nn.Module,
    targets: Sequence[str],
    *,
    r: int,
    alpha: float,
    dropout: float,
    bias: str,
    seed: int,
) -> None:
    """Wrap the modules `targets` so that x -> W x + (alpha / r) B A x; B is zero, so nothing changes yet.

    A is drawn from the seed and the module's name alone: the same for any order and any other draws. Works on empty
    networks (the meta device) too.
    """
    peft = import_peft()
    config = peft.LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        bias=bias,
        target_modules="|".join(re.escape(name) for name in targets),
    )
    empty = next(network.parameters()).is_meta
    with torch.random.fork_rng(devices=[]):  # peft draws A too, from everybody's generator
        peft.inject_adapter_in_model(config, network, adapter_name=NAME, low_cpu_mem_usage=empty)
    if empty:
        return
    for name, layer in lora_layers(network):
        matrix = layer.lora_A[NAME].weight
        drawn = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1
        fresh = torch.empty(matrix.shape)
        # As in peft and in Microsoft's own code of the paper.
        nn.init.kaiming_uniform_(fresh, a=math.sqrt(5), generator=torch.Generator().manual_seed(drawn))
        with torch.no_grad():
            matrix.copy_(fresh)


def lora_layers(network: nn.Module) -> list[tuple[str, Any]]:
    """(name, peft's layer) of every module with an adapter; empty where nothing was injected, without peft."""
    return [(name, module) for name, module in network.named_modules() if _is_lora(module)]


def _is_lora(module: nn.Module) -> bool:
    parts = module._modules
    return "base_layer" in parts and "lora_A" in parts and "lora_B" in parts


def plain_name(name: str) -> str | None:
    """The name of a parameter or buffer without peft's wrapping; None for those of adapters."""
    return None if ".lora_" in name else name.replace(BASE, "")


def merged_weight(layer: Any) -> Float[Tensor, "..."]:
    """The weight of a wrapped module with its adapter added."""
    base: Tensor = layer.get_base_layer().weight.detach()
    added: Tensor = layer.get_delta_weight(NAME)
    return base + added.detach().to(base.dtype)


def plain_state(network: nn.Module) -> dict[str, Shaped[Tensor, "..."]]:
    """Parameters and running statistics by the names that they had before anything was wrapped, adapters added in.

    The network itself stays as it is.
    """
    state = {plain: value for name, value in network.state_dict().items() if (plain := plain_name(name)) is not None}
    for name, layer in lora_layers(network):
        state[f"{plain_name(name)}.weight"] = merged_weight(layer)
    return state


@contextlib.contextmanager
def merged(network: nn.Module) -> Iterator[None]:
    """Within it wrapped modules run as plain ones, one product instead of three; afterwards not a bit differs.

    peft's own `unmerge` subtracts what it added, which rounds; here the weights from before come back.
    """
    layers = [layer for _, layer in lora_layers(network)]
    before = [layer.get_base_layer().weight.data for layer in layers]
    try:
        for layer in layers:
            layer.get_base_layer().weight.data = merged_weight(layer)
            layer.merged_adapters.append(NAME)
        yield
    finally:
        for layer, weight in zip(layers, before, strict=True):
            layer.get_base_layer().weight.data = weight
            layer.merged_adapters.clear()
