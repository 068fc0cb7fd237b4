"""Sliding windows: a network run over parts of a large image, and one grid of patches put together from them.

A network trained at 224 or 512 pixels sees detail of a 2048-pixel radiograph without seeing sizes it never met, and
memory grows with the area and not with its square (DINOv3's own segmentation evaluation slides windows of 512).
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from featstore.backbones.architecture import Architecture
from featstore.backbones.tokens import Backbone, Tokens


def starts_of(side: int, size: int, stride: int) -> list[int]:
    """Where windows begin along a side: every `stride` pixels, the last one at the far edge.

    >>> starts_of(1024, 512, 384)
    [0, 384, 512]
    """
    found = list(range(0, side - size + 1, stride))
    return found if found[-1] == side - size else [*found, side - size]


class WindowedBackbone:
    """A backbone seen through windows.

    A patch that several windows hold is the float32 mean of its tokens there; CLS and registers are the means over
    windows. All windows of a batch go through the network `len(batch)` at a time, as whole images would.
    """

    def __init__(self, backbone: Backbone, window: tuple[int, int]) -> None:
        self.backbone = backbone
        self.window = window

    @property
    def architecture(self) -> Architecture:
        """The network's, whose images may be of any size that its patch divides."""
        return replace(self.backbone.architecture, fixed_size=False)

    @property
    def device(self) -> torch.device:
        """Of the network."""
        return self.backbone.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the network; tokens are float32, as means are."""
        return self.backbone.dtype

    @property
    def network(self) -> object:
        """The network's module, where it has one."""
        return getattr(self.backbone, "network", None)

    @property
    def kernel(self) -> str | None:
        """The network's attention kernel."""
        kernel: str | None = getattr(self.backbone, "kernel", None)
        return kernel

    @property
    def memory(self) -> str:
        """How the network is held."""
        return str(getattr(self.backbone, "memory", "resident"))

    def __call__(self, pixels: Float[Tensor, "B 3 H W"], *, layers: tuple[int, ...] = ()) -> Tokens:
        """Tokens of whole images.

        Raises:
            ConfigError: windows do not fit the image or the patch.
        """
        size, stride = self.window
        height, width = pixels.shape[2:]
        self.backbone.architecture.check_window(self.window, height, width)
        total: _Sum | None = None
        inner: dict[int, _Sum] = {}
        for top in starts_of(height, size, stride):
            for left in starts_of(width, size, stride):
                part = self.backbone(pixels[:, :, top : top + size, left : left + size], layers=layers)
                if total is None:
                    grid = self.architecture.grid(height, width)
                    total = _Sum(part, grid)
                    inner = {number: _Sum(tokens, grid) for number, tokens in part.layers.items()}
                cell = (top // self.architecture.patch_size, left // self.architecture.patch_size)
                total.add(part, cell, size // self.architecture.patch_size)
                for number, tokens in part.layers.items():
                    inner[number].add(tokens, cell, size // self.architecture.patch_size)
        assert total is not None
        return replace(total.mean(), layers={number: tokens.mean() for number, tokens in inner.items()})


class _Sum:
    """Tokens of the windows of a batch, added up in float32."""

    def __init__(self, like: Tokens, grid: tuple[int, int]) -> None:
        self.windows = 0
        self.cls = torch.zeros_like(like.cls, dtype=torch.float32)
        self.registers = torch.zeros_like(like.registers, dtype=torch.float32)
        batch, _, width = like.patches.shape
        self.patches = torch.zeros((batch, *grid, width), dtype=torch.float32, device=like.patches.device)
        self.counts = torch.zeros((*grid, 1), dtype=torch.float32, device=like.patches.device)

    def add(self, tokens: Tokens, cell: tuple[int, int], side: int) -> None:
        """One window of `side` x `side` patches whose first patch is `cell`."""
        self.windows += 1
        self.cls += tokens.cls
        self.registers += tokens.registers
        rows, columns = (slice(first, first + side) for first in cell)
        self.patches[:, rows, columns] += tokens.patches.reshape(len(tokens.patches), side, side, -1)
        self.counts[rows, columns] += 1

    def mean(self) -> Tokens:
        """Over the windows that hold a token."""
        return Tokens(
            cls=self.cls / self.windows,
            registers=self.registers / self.windows,
            patches=(self.patches / self.counts).flatten(1, 2),
        )
