"""Sizes in pixels: what the user asks for, and what a patch size makes of it."""

import re
from collections.abc import Callable

from featstore.errors import ConfigError

MAX_PIXELS = 2**28  # more in one image, as decoded or as resized before a crop, is refused (16384 x 16384)
REFERENCE_PATCH = 16  # `tokens` asks for the grid that this patch size gives


def parse_resolution(text: str) -> tuple[int, int]:
    """`512` as (512, 512), `384x512` as (384, 512): height x width, in pixels.

    Raises:
        ConfigError: anything else, or a zero.
    """
    match = re.fullmatch(r"([0-9]{1,6})(?:x([0-9]{1,6}))?", text)
    height, width = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if height == 0 or width == 0:
        raise ConfigError(f"--res must be pixels such as 512, or 384x512 (height x width), got {text!r}")
    return height, width


def fit_size(resolution: tuple[int, int], patch_size: int, fit: str) -> tuple[int, int]:
    """(height, width) in pixels that the patch size divides and that is fed to the network.

    `fit` names a rule of `FITS`. A resolution that is a multiple already is kept by every rule but `tokens`.

    Raises:
        ConfigError: an unknown rule; a side below one patch under `floor`; a side that is no multiple under `strict`.
    """
    if fit not in FITS:
        raise ConfigError(f"--fit must be one of {', '.join(FITS)}, got {fit!r}")
    height, width = (FITS[fit](side, patch_size) for side in resolution)
    return height, width


def _nearest(side: int, patch_size: int) -> int:
    """Nearest positive multiple; the larger one where two are equally near."""
    return max(1, (2 * side + patch_size) // (2 * patch_size)) * patch_size


def _floor(side: int, patch_size: int) -> int:
    if side < patch_size:
        raise ConfigError(f"--fit floor: {side} pixels are less than one patch of {patch_size}; ask for a larger --res")
    return side // patch_size * patch_size


def _tokens(side: int, patch_size: int) -> int:
    return _nearest(side, REFERENCE_PATCH) // REFERENCE_PATCH * patch_size


def _strict(side: int, patch_size: int) -> int:
    if side % patch_size:
        below = side // patch_size * patch_size
        near = f"{below} or {below + patch_size}" if below else f"{patch_size}"
        raise ConfigError(f"--fit strict: {side} is no multiple of the patch size {patch_size}; use --res {near}")
    return side


FITS: dict[str, Callable[[int, int], int]] = {
    "nearest": _nearest,
    "floor": _floor,
    "tokens": _tokens,
    "strict": _strict,
}
