"""The last blocks of a network on their own: what comes out of the blocks before them can be computed once and kept.

Where only the last k of L blocks train, an epoch over kept sequences costs about k / L of one over images.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from featstore.backbones.network import compute_tokens
from featstore.backbones.tokens import Tokens
from featstore.backbones.trainable import Trainable
from featstore.errors import ConfigError


class _ReachedError(Exception):
    """The pass has come to the block that was waited for."""


class Tail(nn.Module):
    """The last `k` blocks of a network and what stands behind them, its own parameters, for images of one size.

    `layers` of `forward` count from the image, as everywhere. Whoever keeps sequences must know them by the weights of
    the blocks before these, by the images and by the type that `inputs` computed in.

    Raises:
        ConfigError: a network that is no list of blocks, as many blocks as it has or none, or positions at random.
    """

    def __init__(self, trainable: Trainable, k: int, height: int, width: int) -> None:
        super().__init__()
        facts, family = trainable.architecture, trainable.family
        if family is None or not family.blocks:
            raise ConfigError(
                f"{facts.family} has no list of blocks that run one behind the other on tokens; leave the kept "
                "sequences out and train from images"
            )
        if not 1 <= k < len(trainable.block_names):
            raise ConfigError(
                f"a tail has at least 1 and fewer than the network's {len(trainable.block_names)} blocks; got {k}"
            )
        if trainable.augments_positions:
            raise ConfigError("a tail keeps positions as they are; leave their augmentation out, or train from images")
        facts.check_size(height, width)
        self.trainable = trainable
        self.k = k
        self.size = (height, width)
        nothing = torch.zeros(1, 3, height, width, device=trainable.device)
        was = trainable.training
        trainable.eval()
        with torch.no_grad():
            sequence, self._arguments, self._options = self._reach(nothing)
            found, expected = self(sequence), trainable(nothing)
        trainable.train(was)
        if not (torch.equal(found.cls, expected.cls) and torch.equal(found.patches, expected.patches)):
            raise ConfigError(
                f"the blocks of {facts.family} do not run one behind the other; leave the kept sequences out and train "
                "from images"
            )

    @torch.no_grad()
    def inputs(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B ..."]:
        """What the first of these blocks gets of normalised images, in float32; nothing behind it is computed.

        Raises:
            ConfigError: images of another size than the tail's.
        """
        if tuple(pixels.shape[2:]) != self.size:
            raise ConfigError(
                f"this tail was made for images of {self.size[0]} x {self.size[1]} pixels, these have "
                f"{pixels.shape[2]} x {pixels.shape[3]}; make one for them"
            )
        return self._reach(pixels.to(self.trainable.device, torch.float32))[0]

    def forward(self, sequence: Float[Tensor, "B ..."], layers: tuple[int, ...] = ()) -> Tokens:
        """Tokens from what `inputs` gave, as the whole network gives them, with gradients where they are recorded.

        Raises:
            ConfigError: tokens of a block before these are asked for.
        """
        facts, family = self.trainable.architecture, self.trainable.family
        assert family is not None
        wanted = facts.block_numbers(layers)
        start = facts.depth - self.k
        if early := [number for number in wanted if number <= start]:
            raise ConfigError(f"block {early[0]} is not among the last {self.k}; use features of blocks {start + 1} on")
        norm = self.trainable.network.get_submodule(family.norm) if family.norm else None

        def split(block_output: Tensor) -> Tokens:
            finished = family.finish(norm, block_output) if facts.final_norm else block_output
            cls, registers, patches = family.split(finished, facts)
            return Tokens(cls=cls, registers=registers, patches=patches)

        inner: dict[int, Tokens] = {}
        with self.trainable.checkpointed():
            for number, block in enumerate(self.trainable.blocks[-self.k :], start=start + 1):
                output = block(sequence, *self._arguments, **self._options)
                sequence = output[0] if isinstance(output, tuple) else output
                if number in wanted:
                    inner[number] = split(sequence)
        final = split(sequence)
        return Tokens(
            cls=final.cls, registers=final.registers, patches=final.patches, layers={n: inner[n] for n in wanted}
        )

    def _reach(self, pixels: Tensor) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
        """(sequence, other arguments) that come to the first block; the arguments do not depend on the images."""
        found: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []

        def keep(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
            found.append((arguments[0], arguments[1:], options))
            raise _ReachedError

        family = self.trainable.family
        assert family is not None
        first = self.trainable.blocks[-self.k]
        handle = first.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            compute_tokens(self.trainable.network, self.trainable.architecture, family, pixels)
        except _ReachedError:
            pass
        finally:
            handle.remove()
        return found[0]
