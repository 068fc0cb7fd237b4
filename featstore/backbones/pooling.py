"""What a head sees of an image's tokens, by the names that feature sets have for it: one function for both.

Extraction stores what `pick` gives; training on images pools with `pool`, so that a frozen network shows a head the
numbers that the store would have held in float32.
"""

import re

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from featstore.backbones.architecture import Architecture
from featstore.backbones.tokens import Tokens
from featstore.errors import ConfigError

MEAN_ALL = "mean_all"
VECTORS = ("cls", "mean_patch")  # parts of one vector per image
LAST = re.compile(r"last([1-9][0-9]*)")  # as in the names of a set's features
LAYER = re.compile(r"layers/([1-9][0-9]*)/(cls|mean_patch)")


def pick(tokens: Tokens, name: str) -> Float[Tensor, "..."]:
    """The array `name` (`cls`, `layers/3/patches`, ...) out of one forward pass; the patch mean is taken in float32."""
    *layer, part = name.split("/")
    source = tokens.layers[int(layer[1])] if layer else tokens
    if part == "mean_patch":
        return source.patches.float().mean(1)
    found: Tensor = getattr(source, part)
    return found


def parts_of(features: str, facts: Architecture) -> tuple[str, ...]:
    """Arrays that `features` joins: `cls`, `mean_patch`, `layers/N/cls`, `lastN`, joined by '+'; or `mean_all` alone.

    `lastN` stands for the CLS tokens of the last N blocks in order of depth; the last of them is `cls`.

    Raises:
        ConfigError: another name, or one that this network does not have.
    """
    if features == MEAN_ALL:
        if facts.summary == "pool":
            raise ConfigError(
                f"mean_all is the mean over CLS, registers and patches, and {facts.family} has no CLS token: its cls "
                "is what it pools from the patches; use cls or mean_patch"
            )
        return (MEAN_ALL,)
    parts: list[str] = []
    for name in features.split("+"):
        last, layer = LAST.fullmatch(name), LAYER.fullmatch(name)
        if last is not None:
            count = int(last[1])
            if count > facts.depth:
                raise ConfigError(
                    f"{name} asks for the tokens of {count} blocks, and {facts.family} has {facts.depth} that can be "
                    "kept; use cls or a smaller number"
                )
            parts += [f"layers/{block}/cls" for block in range(facts.depth - count + 1, facts.depth)]
            parts.append("cls")
        elif layer is not None:
            facts.block_numbers((int(layer[1]),))
            parts.append(name)
        elif name in VECTORS:
            parts.append(name)
        else:
            raise ConfigError(
                f"a head takes vectors: {', '.join(VECTORS)}, lastN and layers/N/cls joined by '+', or mean_all; "
                f"got {name!r} in {features!r}"
            )
    return tuple(parts)


def layers_of(features: str, facts: Architecture) -> tuple[int, ...]:
    """Block numbers whose tokens `pool` needs.

    Raises:
        ConfigError: as `parts_of`.
    """
    found = [int(part.split("/")[1]) for part in parts_of(features, facts) if "/" in part]
    return tuple(dict.fromkeys(found))


def width_of(features: str, facts: Architecture) -> int:
    """Numbers that `pool` gives per image.

    Raises:
        ConfigError: as `parts_of`.
    """
    parts = parts_of(features, facts)
    return sum(facts.patch_width if part.endswith("mean_patch") else facts.embed_dim for part in parts)


def pool(tokens: Tokens, features: str, facts: Architecture) -> Float32[Tensor, "B D"]:
    """The input of a head, in float32 and with gradients where the tokens have them.

    Raises:
        ConfigError: as `parts_of`.
    """
    parts = parts_of(features, facts)
    if parts == (MEAN_ALL,):
        whole = torch.cat((tokens.cls[:, None], tokens.registers, tokens.patches), dim=1)
        return whole.float().mean(1)
    return torch.cat([pick(tokens, part).float() for part in parts], dim=1)
