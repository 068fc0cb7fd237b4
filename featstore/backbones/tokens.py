"""What every backbone returns, and what an object must have to be one."""

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from featstore.backbones.architecture import Architecture


@dataclass(frozen=True)
class Tokens:
    """Tokens of a batch after the final norm; patches run along rows of the image, from the top left.

    `layers` holds the tokens of earlier blocks by block number (1 = after the first block), after the same norm.
    """

    cls: Float[Tensor, "B D"]
    registers: Float[Tensor, "B R D"]
    patches: Float[Tensor, "B P E"]
    layers: dict[int, "Tokens"] = field(default_factory=dict)


@runtime_checkable
class Backbone(Protocol):
    """A frozen network on one device."""

    @property
    def architecture(self) -> Architecture:
        """Facts about the network."""

    @property
    def device(self) -> torch.device:
        """Where the weights are and the tokens will be."""

    @property
    def dtype(self) -> torch.dtype:
        """Type in which it computes and of the tokens."""

    def __call__(self, pixels: Float[Tensor, "B 3 H W"], *, layers: tuple[int, ...] = ()) -> Tokens:
        """Tokens of normalised images, and of the blocks `layers` (1..depth, or -1 for the last).

        Raises:
            ConfigError: the size is no multiple of the patch size, or a layer does not exist.
        """
