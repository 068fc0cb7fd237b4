"""Trained weights as files that `featstore extract --weights` reads: the hub's names, float32, nothing of training.

What training changed is in the tensors; what describes the network (its name, `--norm`, `--pos-interp`) is the
caller's to repeat when the file is loaded.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from featstore.backbones.architecture import Architecture
from featstore.backbones.dinov3 import PERIODS
from featstore.backbones.family import Family
from featstore.backbones.network import build_empty, weights_of
from featstore.errors import WeightsError
from featstore.files import write_atomic

FREQUENCIES = "inv_freq"  # end of the name of DINOv3's buffer of rotary frequencies


def hub_tensors(
    live: Mapping[str, Shaped[Tensor, "..."]], network: nn.Module, architecture: Architecture, family: Family
) -> dict[str, Shaped[Tensor, "..."]]:
    """Weights by the names of the hub's files, pieces of one tensor joined.

    Args:
        live: parameters and running statistics by live name, whole and plain.
        network: the one they belong to, for what is no weight of it but changes its tokens.

    Raises:
        WeightsError: a weight of the network is not among them.
    """
    fresh = build_empty(architecture, family)
    wanted = weights_of(fresh)
    if absent := [name for name in wanted if name not in live]:
        raise WeightsError(f"{len(absent)} weights of {family.model_type} are not given ({absent[0]}, ...)")
    values = {name: live[name].detach() for name in wanted}
    _keep_epsilons(values, network, fresh)
    pieces: dict[str, dict[int, Tensor]] = {}
    parts: dict[str, int] = {}
    for name, value in values.items():
        key = family.hub_key(name)
        pieces.setdefault(key.name, {})[key.part] = value
        parts[key.name] = key.parts
    tensors = {}
    for name, of_name in pieces.items():
        assert len(of_name) == parts[name], name
        ordered = [of_name[part] for part in sorted(of_name)]
        tensors[name] = ordered[0] if len(ordered) == 1 else torch.cat(ordered)
    return tensors | _changed_periods(network, fresh)


def _keep_epsilons(values: dict[str, Tensor], network: nn.Module, fresh: nn.Module) -> None:
    # Files of another dialect may have set another epsilon (MobileNetV2's folded norms), which no file of the hub's
    # can: what counts is variance + epsilon, so the difference goes into the variance.
    for name, module in fresh.named_modules():
        if isinstance(module, _BatchNorm) and (own := f"{name}.running_var") in values:
            used = network.get_submodule(name)
            assert isinstance(used, _BatchNorm)
            if used.eps != module.eps:
                values[own] = values[own] + (used.eps - module.eps)


def _changed_periods(network: nn.Module, fresh: nn.Module) -> dict[str, Tensor]:
    """Periods of rotary positions, where a checkpoint of Meta's brought rounded ones."""
    usual = dict(fresh.named_buffers())
    for name, buffer in network.named_buffers():
        if name.endswith(FREQUENCIES) and not buffer.is_meta and not torch.equal(buffer.cpu(), usual[name].cpu()):
            return {PERIODS: 1 / buffer.detach()}
    return {}


def write_weights(file: Path, tensors: Mapping[str, Shaped[Tensor, "..."]]) -> None:
    """One safetensors file, complete or absent whatever happens while it is written."""
    from safetensors.torch import save

    whole = {name: value.detach().to("cpu").contiguous().clone() for name, value in tensors.items()}
    write_atomic(file, save(whole, metadata={"format": "pt"}))


def describe_folder(
    architecture: Architecture, family: Family, processor: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """Texts of the files beside `model.safetensors` that make a folder one of the hub's; empty where it needs none.

    `processor` is the `preprocessor_config.json` of what was trained, which stays as it is: mean and std of the
    architecture are read from it, and `--geometry hf` follows it. Without one mean and std alone are written.
    """
    if family.write is None:
        return {}
    config = {"model_type": family.model_type, "architectures": [family.model_class], **family.write(architecture)}
    made = {
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(architecture.mean),
        "image_std": list(architecture.std),
    }
    return {
        "config.json": json.dumps(config, indent=2),
        "preprocessor_config.json": json.dumps(made if processor is None else dict(processor), indent=2),
    }
