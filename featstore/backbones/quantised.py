"""Matrices of the blocks kept in 8 bits: half the bytes of bfloat16, at a loss that the precision gate measures.

Symmetric, with one float32 scale per output channel. A matrix is made whole again in the compute dtype each time it is
used, so every device computes the same numbers from it; fp8 tensor cores, which would round the activations too, are
not used for that reason. Biases, norms, tokens, positions and the patch projection stay as they are.
"""

from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from featstore.backbones.family import Family
from featstore.errors import ConfigError

STORED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
LARGEST = {"int8": 127.0, "fp8": 448.0}  # -128 is left out: the scale is symmetric


class QuantisedLinear(nn.Module):
    """A linear layer whose matrix is `quantised * scale`; both are buffers, the bias stays a parameter."""

    quantised: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear, weight_dtype: str) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        quantised, scale = quantise_matrix(linear.weight.detach(), weight_dtype)
        self.register_buffer("quantised", quantised)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, inputs: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        """The linear map, in the type of `inputs`."""
        # Every level of int8 and fp8 is exact in the compute dtypes, and the float32 scale makes the product float32:
        # the matrix is rounded once.
        matrix = (self.quantised.to(inputs.dtype) * self.scale).to(inputs.dtype)
        return nn.functional.linear(inputs, matrix, self.bias)

    def extra_repr(self) -> str:
        """As torch prints a linear layer, with the stored type."""
        return f"in_features={self.in_features}, out_features={self.out_features}, stored={self.quantised.dtype}"


def quantise_matrix(
    matrix: Float[Tensor, "O I"], weight_dtype: str
) -> tuple[Shaped[Tensor, "O I"], Float[Tensor, "O 1"]]:
    """(levels in 8 bits, scale): the largest number of each output channel becomes the largest level.

    For int8 every number is at most scale / 2 away from level x scale; for fp8 (e4m3) at most 1/16 of itself, or
    scale / 1024 near zero.
    """
    exact = matrix.float()
    scale = exact.abs().amax(1, keepdim=True) / LARGEST[weight_dtype]
    # A channel of zeros, or of numbers so small that the scale would be zero, has nothing to keep.
    scale = torch.where(scale > torch.finfo(torch.float32).tiny, scale, 1.0)
    levels = (exact / scale).clamp(-LARGEST[weight_dtype], LARGEST[weight_dtype])
    return (levels.round() if weight_dtype == "int8" else levels).to(STORED[weight_dtype]), scale


def quantise_block(block: nn.Module, weight_dtype: str) -> int:
    """Put quantised layers in the place of the linear layers within a block, one at a time.

    Layers that are there already stay as they are. Returns the number of layers replaced.

    Raises:
        ConfigError: no such type of weights.
    """
    if weight_dtype not in STORED:
        raise ConfigError(f"weight dtype must be one of {', '.join(STORED)}; got {weight_dtype!r}")
    replaced = 0
    for parent in list(block.modules()):
        for name, module in list(parent.named_children()):
            # Subclasses have a reason of their own, such as a caller that reads the matrix and skips forward.
            if type(module) is nn.Linear:
                setattr(parent, name, QuantisedLinear(module, weight_dtype))
                replaced += 1
    return replaced


def quantise(network: nn.Module, family: Family, weight_dtype: str) -> None:
    """Quantise the linear layers of all blocks of a network whose weights are in place.

    Raises:
        ConfigError: the family has no blocks with linear layers, or no such type of weights.
    """
    blocks: Any = network.get_submodule(family.blocks).children() if family.blocks else ()
    if not sum(quantise_block(block, weight_dtype) for block in blocks):
        raise ConfigError(
            f"--weight-dtype {weight_dtype}: {family.model_type} has no blocks with linear layers, whose matrices "
            "could be kept in 8 bits; leave it out"
        )
