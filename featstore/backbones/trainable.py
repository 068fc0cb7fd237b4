"""A loaded backbone as a module that trains: the same tokens by the same pass, with gradients.

What a frozen network never does stays off while it trains, unless it is asked for: dropping of paths, DINOv3's random
stretching of positions, and the update of batch statistics. So a network that nothing has trained yet gives the tokens
of the store, in training too, and an adapter that adds nothing changes nothing.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from featstore.backbones.anatomy import depths_of, find_blocks, find_key_biases
from featstore.backbones.architecture import Architecture
from featstore.backbones.compiling import compilation_of
from featstore.backbones.family import Family
from featstore.backbones.network import NetworkBackbone, compute_tokens
from featstore.backbones.pooling import layers_of, pool
from featstore.backbones.quantised import QuantisedLinear
from featstore.backbones.tokens import Backbone, Tokens
from featstore.errors import ConfigError

ROPE = "RopePositionEmbedding"  # end of the class name of transformers' module with the random stretching
DROP_PATH = ("drop_path", "drop_path1", "drop_path2")  # where transformers' and timm's blocks have a place for it
LORA_DROPOUT = "lora_dropout"  # of peft's layers
FOLDED = 1e-4  # how far from 1 a running variance may be that nothing was measured into
PROBE_SIDE = 2  # patches along a side of the image that tells which parameters the features depend on


class DropPath(nn.Module):
    """Leaves a block's branch out for whole images with probability `rate` while it trains; kept ones are scaled up.

    Source: Huang et al. 2016 (stochastic depth).
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Float[Tensor, "B ..."]) -> Float[Tensor, "B ..."]:
        """The branch, or zeros."""
        if not self.training or self.rate == 0:
            return branch
        keep = 1 - self.rate
        drawn = torch.empty((len(branch), *(1,) * (branch.ndim - 1)), dtype=branch.dtype, device=branch.device)
        return branch * drawn.bernoulli_(keep).div_(keep)


class Trainable(nn.Module):
    """A backbone's own network with gradients: the backbone gives the trained tokens afterwards.

    Attributes:
        network: all parameters, by their live names; none of them trains until something sets `requires_grad`.
        checkpointing: blocks are computed a second time in the backward pass instead of keeping what is inside them.
        batch_norm: `frozen`, so that running statistics are used and kept; or `train`, so that those of the batch are
            used and the running ones follow (only of norms whose weight trains).
        augments_positions: DINOv3's positions are stretched at random while it trains.
        key_biases: biases, or parts of them along axis 0, that no token depends on, by the names before any wrapping.
    """

    def __init__(self, network: nn.Module, architecture: Architecture, family: Family | None) -> None:
        super().__init__()
        self.network = network
        self.architecture = architecture
        self.family = family
        self.checkpointing = False
        self.batch_norm: Literal["frozen", "train"] = "frozen"
        self.block_names = find_blocks(network, family.blocks if family is not None else "")
        self.augments_positions = False
        self.key_biases = find_key_biases(network, family)
        self.eval()

    @property
    def blocks(self) -> list[nn.Module]:
        """The modules that repeat, from the input to the output: units of checkpointing, of sharding, of depth."""
        return [self.network.get_submodule(name) for name in self.block_names]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.network.parameters()).device

    def depths(self) -> dict[str, int]:
        """Depth of every parameter: 0 before the blocks, 1..L in them, L + 1 behind them.

        Raises:
            ConfigError: no blocks are known.
        """
        return depths_of([name for name, _ in self.network.named_parameters()], self.block_names)

    def forward(self, pixels: Float[Tensor, "B 3 H W"], layers: tuple[int, ...] = ()) -> Tokens:
        """Tokens of normalised images, and of the blocks `layers`, with gradients where the caller records them.

        Raises:
            ConfigError: the size is no multiple of the patch size, or a layer does not exist; an own network that
                computes without gradients; or batch norms that are to take the statistics of a single image.
        """
        facts = self.architecture
        facts.check_size(*pixels.shape[2:])
        if self.training and self.batch_norm == "train" and len(pixels) == 1:
            raise ConfigError(
                "batch norms that move need at least 2 images at once, and a batch has 1: use another batch size, "
                "--drop-last, or --batch-norm frozen"
            )
        inputs = pixels.to(self.device, torch.float32)
        with self.checkpointed():
            if self.family is not None:
                return compute_tokens(self.network, facts, self.family, inputs, facts.block_numbers(layers))
            tokens: Tokens = self.network(inputs, layers=layers)
        asked = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.network.parameters())
        if asked and not (tokens.cls.requires_grad or tokens.patches.requires_grad):
            raise ConfigError(
                f"{type(self.network).__name__} computes without gradients; to train it, its forward must run under "
                "neither torch.inference_mode nor torch.no_grad, which extraction sets itself"
            )
        return tokens

    def folded_norms(self) -> int:
        """How many batch norms were trained, by their biases, but hold no statistics: mean 0 and variance 1.

        Exports for inference fold the statistics into weights and biases. What such norms see is far from mean 0 and
        variance 1, so taking the statistics of the batch instead makes another network of them, before the first step:
        with Google's MobileNetV2 the features of radiographs then correlate with the frozen ones by -0.00, and a linear
        probe on them finds nothing (AUROC 0.50, of 0.95). Norms that nothing has trained have biases of 0.
        """
        return sum(_is_folded(module) for module in self.network.modules())

    def features(self, pixels: Float[Tensor, "B 3 H W"], features: str) -> Float32[Tensor, "B D"]:
        """The input of a head by the names of `pooling.parts_of`; what a set would hold, in float32.

        Raises:
            ConfigError: no such features, or as `forward`.
        """
        return pool(self(pixels, layers_of(features, self.architecture)), features, self.architecture)

    def train(self, mode: bool = True) -> "Trainable":
        """Switch on what is asked for, of all that networks do otherwise while they train."""
        self.training = mode
        self.network.eval()
        for name, module in self.network.named_modules():
            if LORA_DROPOUT in name.split(".") or isinstance(module, DropPath):
                module.train(mode)
            elif isinstance(module, _BatchNorm):
                moves = self.batch_norm == "train" and module.weight is not None and module.weight.requires_grad
                module.train(mode and moves)
            elif self.augments_positions and type(module).__name__.endswith(ROPE):
                module.train(mode)
        return self

    def drop_paths(self, rate: float) -> None:
        """Drop paths while training, with a rate that grows from 0 in the first block to `rate` in the last.

        Raises:
            ConfigError: a rate outside [0, 1), or blocks that have no place for it.
        """
        if not 0 <= rate < 1:
            raise ConfigError(f"the rate of dropped paths must be at least 0 and below 1; got {rate}")
        last = max(1, len(self.block_names) - 1)
        found = 0
        for place, block in enumerate(self.blocks):
            for parent in list(block.modules()):
                for name, module in list(parent.named_children()):
                    if name in DROP_PATH and isinstance(module, nn.Identity | DropPath):
                        setattr(parent, name, DropPath(rate * place / last))
                        found += 1
        if not found:
            raise ConfigError(f"the blocks of {self.architecture.family} have no place to drop paths; leave it out")
        self.train(self.training)  # a new module trains, whatever the others do

    def augment_positions(self) -> None:
        """Stretch DINOv3's positions at random while training, as its pre-training did (`pos_embed_rescale` 2).

        Raises:
            ConfigError: a network without them.
        """
        if not any(type(module).__name__.endswith(ROPE) for module in self.network.modules()):
            raise ConfigError(f"{self.architecture.family} has no rotary positions to stretch; leave it out")
        self.augments_positions = True

    def unused(self, features: str) -> tuple[str, ...]:
        """Parameters that these features do not depend on, such as a mask token, or a norm of what is not pooled.

        Found by one backward pass over a small image, on whatever device and with whatever parameters train.

        Raises:
            ConfigError: no such features.
        """
        facts = self.architecture
        side = facts.native_size if facts.fixed_size else PROBE_SIDE * facts.patch_size
        trained = {name: parameter for name, parameter in self.network.named_parameters() if parameter.requires_grad}
        was = self.training
        self.eval()  # no statistics move, and nothing is drawn
        try:
            with torch.enable_grad():
                found = self.features(torch.zeros(1, 3, side, side, device=self.device), features)
                gradients = torch.autograd.grad(found.sum(), list(trained.values()), allow_unused=True)
        finally:
            self.train(was)
        return tuple(name for name, gradient in zip(trained, gradients, strict=True) if gradient is None)

    def check_checkpointing(self) -> None:
        """Raise `ConfigError` where blocks cannot be computed twice."""
        if not self.block_names:
            raise ConfigError(f"{self.architecture.family} has no known blocks to checkpoint; leave checkpointing out")
        norms = any(isinstance(module, _BatchNorm) for block in self.blocks for module in block.modules())
        if norms and self.batch_norm == "train":
            raise ConfigError(
                "checkpointing computes a block twice, and its batch norms would count every batch twice; "
                "use frozen batch norms, or leave checkpointing out"
            )

    @contextlib.contextmanager
    def checkpointed(self) -> Iterator[None]:
        """Within it blocks are checkpointed, if that is asked for; nothing stays behind, so that copies are sound."""
        blocks = self.blocks if self.checkpointing and torch.is_grad_enabled() else []
        if blocks:
            self.check_checkpointing()
        try:
            for block in blocks:
                block.__dict__["forward"] = _twice(block.forward)
            yield
        finally:
            for block in blocks:
                block.__dict__.pop("forward", None)


def _is_folded(module: nn.Module) -> bool:
    if not isinstance(module, _BatchNorm) or module.running_mean is None or module.running_var is None:
        return False
    if module.running_var.is_meta:
        return False
    biased = module.bias is not None and bool(module.bias.any())
    still = not bool(module.running_mean.any()) and float((module.running_var - 1).abs().max()) <= FOLDED
    return biased and still


def _twice(plain: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **options: Any) -> Any:
        return checkpoint(plain, *args, use_reentrant=False, **options)

    return forward


def make_trainable(
    backbone: Backbone, *, checkpointing: bool = False, drop_path: float = 0.0, augment_positions: bool = False
) -> Trainable:
    """The network of a loaded backbone as a module that can train; its weights are the backbone's own, not a copy.

    Weights must be float32: the masters that an optimiser adds small steps to. Computing in bfloat16 is the caller's
    `torch.autocast`.

    Raises:
        ConfigError: weights that are not whole, plain and float32 on one device; an own network that is no torch
            module; blocks or positions that cannot do what is asked.
    """
    if isinstance(backbone, NetworkBackbone):
        network, family = backbone.network, backbone.family
        memory = backbone.memory
    elif isinstance(backbone, nn.Module):
        network, family, memory = backbone, None, "resident"
    else:
        kind = type(backbone).__name__
        raise ConfigError(
            f"{kind} cannot train: it must be a torch module, or a listed network that is whole on one device "
            "(--memory resident)"
        )
    types = {parameter.dtype for parameter in network.parameters() if parameter.is_floating_point()}
    plain = not any(isinstance(module, QuantisedLinear) for module in network.modules())
    if memory != "resident" or not plain or types - {torch.float32}:
        found = ", ".join(sorted(str(each).removeprefix("torch.") for each in types))
        raise ConfigError(
            f"training needs whole float32 weights on one device; these are {found}, memory {memory}"
            f"{'' if plain else ', matrices in 8 bits'}: load with compute dtype float32, memory resident and weight "
            "dtype same"
        )
    if compilation_of(backbone).mode != "off":
        raise ConfigError("a network that extraction compiled has no gradients; load it with --compile off")
    trainable = Trainable(network, backbone.architecture, family).requires_grad_(False)
    if drop_path:
        trainable.drop_paths(drop_path)
    if augment_positions:
        trainable.augment_positions()
    if checkpointing:
        trainable.checkpointing = True
        trainable.check_checkpointing()
    return trainable
