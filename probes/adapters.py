"""What of a network trains beside its head: all of it, low-rank adapters, biases, the last blocks, or nothing.

A method says which parameters train, so that one loop serves all of them. The head always trains and is no part of the
counts here.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from featstore.backbones.anatomy import find_targets, usual_targets
from featstore.backbones.exporting import hub_tensors, write_weights
from featstore.backbones.trainable import Trainable
from featstore.errors import ConfigError, WeightsError
from featstore.files import canonical_json, digest
from probes import adapters_lora
from probes.adapters_config import LAST_K, LORA_DEFAULTS, METHODS, OWNERS, AdapterConfig

SPARED = "mask_token"  # for pre-training: no token depends on it
FOLDED = "{} of {} hold no statistics (mean 0, variance 1: folded into weights and biases)"


class Counts(NamedTuple):
    """Numbers that train, all numbers of the network with what was added, and what was added; the head's in none."""

    trainable: int
    total: int
    added: int


class Adapted:
    """A network with a method applied.

    Attributes:
        parameters: those that train, by name, in the network's order.
        settings: the method's settings in full, defaults too, as a record should have them.
        notes: what a reader should know of them.
    """

    def __init__(self, trainable: Trainable, method: str, settings: dict[str, Any], notes: Sequence[str]) -> None:
        self.trainable = trainable
        self.method = method
        self.settings = settings
        self.notes = list(notes)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Those that train, by name."""
        named = self.trainable.network.named_parameters()
        return {name: parameter for name, parameter in named if parameter.requires_grad}

    def counts(self) -> Counts:
        """How much trains; add the head's own numbers beside it."""
        named = list(self.trainable.network.named_parameters())
        return Counts(
            trainable=sum(parameter.numel() for _, parameter in named if parameter.requires_grad),
            total=sum(parameter.numel() for _, parameter in named),
            added=sum(parameter.numel() for name, parameter in named if adapters_lora.plain_name(name) is None),
        )

    def ignored(self) -> dict[str, slice]:
        """Those of `parameters` (or a part along axis 0) that no token depends on: biases of attention keys, by name.

        They count among those that train, but whatever gradient they have is rounding; the true one is 0.
        """
        known = self.trainable.key_biases
        plain = {name: adapters_lora.plain_name(name) for name in self.parameters}
        return {name: known[own] for name, own in plain.items() if own is not None and own in known}

    def groups(self, *, lr: float, weight_decay: float = 0.0, layer_decay: float = 1.0) -> list[dict[str, Any]]:
        """Groups for an optimiser, with their `names`: lr x layer_decay^(depths above), vectors without weight decay.

        The head, and what stands behind the blocks, has the whole learning rate; each block below multiplies it once
        more, and what stands before the blocks has the lowest. Not decayed: biases, norms, scales, tokens, positions.
        Source: Clark et al. 2020 (ELECTRA), with depths as Bao et al. 2021 (BEiT) count them for vision transformers.

        Raises:
            ConfigError: a decay outside (0, 1], or of a network whose blocks are not known.
        """
        if not 0 < layer_decay <= 1:
            raise ConfigError(f"layer decay must be above 0 and at most 1; got {layer_decay}")
        depths = self.trainable.depths() if layer_decay != 1 else {}
        top = len(self.trainable.block_names) + 1
        made: dict[tuple[int, bool], dict[str, Any]] = {}
        for name, parameter in self.parameters.items():
            depth, decayed = depths.get(name, top), parameter.ndim > 1 and not _is_token(name)
            group = made.setdefault(
                (depth, decayed),
                {
                    "params": [],
                    "names": [],
                    "lr": lr * layer_decay ** (top - depth),
                    "weight_decay": weight_decay if decayed else 0.0,
                    "depth": depth,
                },
            )
            group["params"].append(parameter)
            group["names"].append(name)
        return list(made.values())

    # Weights

    def state(self) -> dict[str, Shaped[Tensor, "..."]]:
        """What training changes, by name: parameters that train, and running statistics where they move. No copies."""
        found: dict[str, Tensor] = {name: parameter.detach() for name, parameter in self.parameters.items()}
        if self.trainable.batch_norm == "train":
            for name, module in self.trainable.network.named_modules():
                if isinstance(module, _BatchNorm) and module.weight is not None and module.weight.requires_grad:
                    found |= {f"{name}.{key}": value for key, value in module.named_buffers() if value is not None}
        return found

    def load_state(self, state: Mapping[str, Shaped[Tensor, "..."]]) -> None:
        """Put values of `state()` back.

        Raises:
            WeightsError: they are not of this network and method.
        """
        own = self.state()
        wrong = sorted(own.keys() ^ state.keys()) or [
            name for name, value in own.items() if value.shape != state[name].shape
        ]
        if wrong:
            raise WeightsError(
                f"these weights are of another network or method than {self.method}: {len(wrong)} tensors do not fit "
                f"({wrong[0]}, ...)"
            )
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(state[name])

    def save(self, file: Path) -> None:
        """What training changed alone, as safetensors: adapters of a giant are megabytes where the network is 4 GB."""
        from safetensors.torch import save

        from featstore.files import write_atomic

        tensors = {name: value.to("cpu").contiguous().clone() for name, value in self.state().items()}
        write_atomic(file, save(tensors, metadata={"format": "pt", "featstore": self._signature()}))

    def load(self, file: Path) -> None:
        """Read what `save` wrote, into a network of the same kind with the same method.

        Raises:
            WeightsError: the file is of another network, method or settings.
        """
        from safetensors import safe_open
        from safetensors.torch import load_file

        with safe_open(file, framework="pt") as opened:
            signature = (opened.metadata() or {}).get("featstore")
        if signature != self._signature():
            raise WeightsError(
                f"{file} was saved for {_said(signature)}, and this is {_said(self._signature())}; "
                "give the same model, method and settings"
            )
        self.load_state(load_file(file))

    def _signature(self) -> str:
        architecture = self.trainable.architecture.as_dict()
        signature = {"method": self.method, "settings": self.settings, "architecture": digest(architecture)[:16]}
        return canonical_json(signature).decode()

    def live_state(self) -> dict[str, Shaped[Tensor, "..."]]:
        """The whole network's weights by live name, adapters added in; the network stays as it is."""
        return adapters_lora.plain_state(self.trainable.network)

    @contextlib.contextmanager
    def merged(self) -> Iterator[None]:
        """Within it adapters are part of the weights, for faster inference; afterwards not a bit differs."""
        with adapters_lora.merged(self.trainable.network):
            yield

    def export(self, file: Path) -> None:
        """The whole network as one file for `featstore extract --weights FILE`, in the hub's names where it has some.

        Raises:
            ConfigError: an own network (`module:function`), which brings its own weights.
        """
        family = self.trainable.family
        if family is None:
            raise ConfigError(
                "an own network reads its weights itself; save `live_state()` and have its function load the file"
            )
        facts = self.trainable.architecture
        write_weights(file, hub_tensors(self.live_state(), self.trainable.network, facts, family))


def _said(signature: str | None) -> str:
    if signature is None:
        return "something else than featstore's adapters"
    read = json.loads(signature)
    return f"{read['method']} {json.dumps(read['settings'])} on architecture {read['architecture']}"


def _is_token(name: str) -> bool:
    """Whether a parameter is a token (CLS, register, mask) or a table of positions."""
    return any(
        part.startswith(("pos_", "rel_pos", "position")) or part.endswith(("_token", "_tokens", "class_embedding"))
        for part in name.split(".")
    )


def adapt(
    trainable: Trainable, method: str, config: AdapterConfig | None = None, *, features: str | None = None
) -> Adapted:
    """Apply a method to a network that no method has been applied to.

    Args:
        features: the head's input; parameters that it does not depend on are then frozen, because they would have no
            gradients, which distributed training does not forgive. None leaves all but mask tokens.

    Raises:
        ConfigError: no such method, settings that are not its own, or that the network cannot follow.
    """
    config = AdapterConfig() if config is None else config
    if method not in METHODS:
        raise ConfigError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    for name, owner in OWNERS.items():
        if getattr(config, name) is not None and method != owner:
            raise ConfigError(f"{name} is a setting of {owner}, and the method is {method}; leave it out")
    network = trainable.network
    if any(parameter.requires_grad for parameter in network.parameters()) or adapters_lora.lora_layers(network):
        raise ConfigError("a method was applied to this network before; load it anew for another one")
    settings, notes = _apply(trainable, method, config)
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    folded = trainable.folded_norms()
    trainable.batch_norm = "train" if _statistics_move(method, config, bool(norms), folded) else "frozen"
    if norms:
        settings["batch_norm"] = trainable.batch_norm
    if folded and method == "full" and trainable.batch_norm == "frozen" and config.batch_norm == "auto":
        notes.append(f"batch norms stay frozen: {FOLDED.format(folded, len(norms))}")
    if folded and trainable.batch_norm == "train":
        notes.append(f"batch norms move although {FOLDED.format(folded, len(norms))}: training starts far from them")
    if trainable.checkpointing:
        trainable.check_checkpointing()
    for name, parameter in network.named_parameters():
        if name.endswith(SPARED):
            parameter.requires_grad_(False)
    if features is not None and any(parameter.requires_grad for parameter in network.parameters()):
        unused = trainable.unused(features)
        for name in unused:
            network.get_parameter(name).requires_grad_(False)
        if unused:
            notes.append(f"{len(unused)} parameters are not trained, {features} does not depend on them: {unused[0]}")
    return Adapted(trainable, method, settings, notes)


def _statistics_move(method: str, config: AdapterConfig, has_norms: bool, folded: int) -> bool:
    """Whether batch norms use and update the statistics of the batch.

    By default only where everything trains: adapters, biases and last blocks are corrections to a network that is
    otherwise the frozen one, and statistics that drift would change all of it, with the batch size, without a gradient,
    and differently on every rank. And only where norms hold statistics (`Trainable.folded_norms`): folded ones are
    plain scales and shifts, without which the network is another one, and nothing is left to fine-tune.
    """
    if config.batch_norm != "auto" and not has_norms:
        raise ConfigError(f"batch norm {config.batch_norm}: the network has no batch norms; leave it out")
    if config.batch_norm == "train" and method in ("lora", "linear-online"):
        raise ConfigError(f"batch norm train: {method} trains no batch norm; leave it out")
    moves = method == "full" and not folded
    return has_norms and (config.batch_norm == "train" or (config.batch_norm == "auto" and moves))


def _apply(trainable: Trainable, method: str, config: AdapterConfig) -> tuple[dict[str, Any], list[str]]:
    network, blocks = trainable.network, trainable.block_names
    if method == "lora":
        return _apply_lora(trainable, config)
    if method == "full":
        network.requires_grad_(True)
    elif method == "bitfit":
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(is_bias(name))
        if not any(parameter.requires_grad for parameter in network.parameters()):
            raise ConfigError("bitfit trains biases, and this network has none; use another method")
    elif method == "last-k":
        k = LAST_K if config.k is None else config.k
        depths = trainable.depths()
        if k > len(blocks):
            raise ConfigError(f"last-k {k}: the network has {len(blocks)} blocks; use a smaller k, or full")
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(depths[name] > len(blocks) - k)
        behind = sum(depth == len(blocks) + 1 for depth in depths.values())
        said = f"and the {behind} parameters behind them (final norm)" if behind else "and nothing behind them"
        return {"k": k}, [f"blocks {len(blocks) - k + 1} to {len(blocks)} {said} train"]
    return {}, []


def is_bias(name: str) -> bool:
    """Whether a parameter is one of BitFit's: its own name ends in "bias" (`bias`, timm's `q_bias`), norms included.

    The radiology paper's code takes every name that contains "bias", which for its networks is the same set; for others
    it would add tables such as Swin's `relative_position_bias_table`, which are no bias.
    """
    return name.rpartition(".")[2].endswith("bias")


def _apply_lora(trainable: Trainable, config: AdapterConfig) -> tuple[dict[str, Any], list[str]]:
    adapters_lora.import_peft()
    network, blocks = trainable.network, trainable.block_names
    trainable.depths()  # adapters belong to blocks
    asked = config.targets or usual_targets(network, blocks)
    names, notes = find_targets(network, blocks, asked)
    settings = {
        name: default if getattr(config, name) is None else getattr(config, name)
        for name, default in LORA_DEFAULTS.items()
    }
    adapters_lora.inject(network, names, seed=config.seed, **settings)
    for name, parameter in network.named_parameters():
        only = adapters_lora.plain_name(name) is None
        bias = settings["bias"] == "lora_only" and name.endswith(f".{adapters_lora.BASE}bias")
        parameter.requires_grad_(only or bias)
    trainable.eval()
    return {**settings, "targets": asked, "modules": len(names), "seed": config.seed}, list(notes)
