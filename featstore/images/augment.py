"""Seeded augmented copies of images, as published for training heads: crops of the source, mirroring, small turns.

What is done to a sample is a function of recipe, seed, view and sample id alone, never of worker, order or machine. The
numbers are drawn from SHA-256, so that no version of a library can change them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from math import cos, exp, log, radians, sin, sqrt
from typing import Any, get_args

import numpy as np
from jaxtyping import Shaped

from featstore.configs import Augmentation, SetConfig
from featstore.errors import ConfigError

IMPLEMENTATION = 1  # raised whenever the same recipe, seed, view and sample would give other pixels; part of identity
RATIOS = (3 / 4, 4 / 3)  # width to height of a crop; torchvision's default, which the published transforms keep
TRIES = 10  # draws of a crop that must fit the image, before its centre is taken
FLIP = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """One published augmentation.

    `scale` is the share of the source's area that a crop takes; without one the whole image goes through the set's own
    geometry. `degrees` is the largest turn to either side of the resized image, nearest neighbour, black outside.
    `deviations`: how the published code differs, whole sentences without a stop.
    """

    title: str
    source: str
    scale: tuple[float, float] | None = None
    degrees: float = 0.0
    deviations: tuple[str, ...] = ()


RECIPES: dict[Augmentation, Recipe] = {
    "dino": Recipe(
        title="random crop of 8 to 100 % of the area, resized; mirrored in half of the cases",
        source="DINOv2 and DINOv3, linear evaluation: RandomResizedCrop (scale 0.08-1, ratio 3/4-4/3) and hflip 0.5",
        scale=(0.08, 1.0),
    ),
    "radiology": Recipe(
        title="random crop of 75 to 100 % of the area, resized; mirrored in half of the cases",
        source="Baharoon et al. 2023, arXiv 2312.02366, code: RandomResizedCrop (scale 0.75-1, bicubic) and hflip 0.5",
        scale=(0.75, 1.0),
        deviations=("intensities are mapped on the whole image, before the crop; theirs on the crop",),
    ),
    "chest": Recipe(
        title="mirrored in half of the cases, then turned by up to 7 degrees: nearest neighbour, black outside",
        source="Tayebi Arasteh et al. 2025, arXiv 2510.07191, code: hflip 0.5 and RandomRotation of 7 degrees",
        degrees=7.0,
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Augment:
    """Which augmented copy of every image a set holds; views are numbered from 1.

    Raises:
        ConfigError: an unknown recipe, or numbers that cannot be.
    """

    recipe: Augmentation
    view: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.recipe not in get_args(Augmentation):
            raise ConfigError(f"augment must be one of {', '.join(get_args(Augmentation))}, got {self.recipe!r}")
        if self.view < 1 or self.seed < 0:
            raise ConfigError(f"views are numbered from 1 and seeds from 0, got view {self.view} and seed {self.seed}")

    @property
    def crops(self) -> bool:
        """Whether a part of the source takes the place of the set's geometry."""
        return RECIPES[self.recipe].scale is not None

    def as_dict(self) -> dict[str, Any]:
        """Canonical and ready for JSON."""
        return {"recipe": self.recipe, "view": self.view, "seed": self.seed, "implementation": IMPLEMENTATION}


def augment_of(config: SetConfig) -> Augment | None:
    """The augmented copy that a request is for, None for the images themselves.

    Raises:
        ConfigError: it is for several sets.
    """
    if config.views:
        raise ConfigError(
            f"--views {config.views} asks for {config.views + 1} sets; plan each item of featstore.configs.each_set"
        )
    if config.view is None or config.augment is None:
        return None
    return Augment(recipe=config.augment, view=config.view, seed=config.augment_seed)


@dataclass(frozen=True, slots=True)
class Drawn:
    """What is done to one image: the part (top, left, height, width) of the source, None for all of it, whether it is
    mirrored left to right, and by how many degrees it is then turned counter-clockwise."""

    box: tuple[int, int, int, int] | None
    is_mirrored: bool
    degrees: float


def draw(augment: Augment, sample: str, height: int, width: int) -> Drawn:
    """The augmentation of one sample whose source has `height` x `width` pixels."""
    recipe = RECIPES[augment.recipe]
    numbers = _uniform(f"{augment.recipe}\0{augment.seed}\0{augment.view}\0{sample}")
    box = None if recipe.scale is None else _draw_box(numbers, recipe.scale, height, width)
    is_mirrored = next(numbers) < FLIP
    degrees = _between(next(numbers), -recipe.degrees, recipe.degrees) if recipe.degrees else 0.0
    return Drawn(box, is_mirrored, degrees)


def _uniform(key: str) -> Iterator[float]:
    """Numbers in [0, 1), each from 53 bits of SHA-256 over the key and a counter."""
    start = sha256(f"featstore augment {IMPLEMENTATION}\0{key}".encode(errors="surrogatepass"))
    counter = 0
    while True:
        block = start.copy()
        block.update(b"\0%d" % counter)
        digest = block.digest()
        for first in range(0, len(digest), 8):
            yield (int.from_bytes(digest[first : first + 8], "big") >> 11) * 2.0**-53
        counter += 1


def _between(number: float, low: float, high: float) -> float:
    return low + number * (high - low)


def _draw_box(
    numbers: Iterator[float], scale: tuple[float, float], height: int, width: int
) -> tuple[int, int, int, int]:
    """(top, left, height, width) as RandomResizedCrop draws it: area uniform, ratio uniform in its logarithm."""
    for _ in range(TRIES):
        area = height * width * _between(next(numbers), *scale)
        ratio = exp(_between(next(numbers), log(RATIOS[0]), log(RATIOS[1])))
        wide, high = round(sqrt(area * ratio)), round(sqrt(area / ratio))
        if 0 < wide <= width and 0 < high <= height:
            top, left = (int(next(numbers) * (room + 1)) for room in (height - high, width - wide))
            return top, left, high, wide
    # The largest part in the middle whose ratio is allowed.
    high, wide = height, width
    if width / height < RATIOS[0]:
        high = round(width / RATIOS[0])
    elif width / height > RATIOS[1]:
        wide = round(height * RATIOS[1])
    return (height - high) // 2, (width - wide) // 2, high, wide


def mirrored_and_turned(planes: Shaped[np.ndarray, "C H W"], drawn: Drawn) -> Shaped[np.ndarray, "C H W"]:
    """The resized image as it was drawn; the crop is made before."""
    if drawn.is_mirrored:
        planes = planes[..., ::-1]
    if drawn.degrees:
        planes = turn(planes, drawn.degrees)
    return np.ascontiguousarray(planes)


def turn(planes: Shaped[np.ndarray, "C H W"], degrees: float) -> Shaped[np.ndarray, "C H W"]:
    """Turned counter-clockwise about the centre at the same size: nearest neighbour, 0 outside.

    That is RandomRotation with its defaults, and Pillow's `rotate`.
    """
    height, width = planes.shape[1:]
    along, across = cos(radians(degrees)), sin(radians(degrees))
    y = (np.arange(height) + 0.5 - height / 2)[:, None]
    x = (np.arange(width) + 0.5 - width / 2)[None, :]
    # Where each pixel comes from: its centre turned back.
    columns = np.floor(along * x - across * y + width / 2).astype(np.int64)
    rows = np.floor(across * x + along * y + height / 2).astype(np.int64)
    inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    turned = planes[:, rows.clip(0, height - 1), columns.clip(0, width - 1)]
    turned[:, ~inside] = 0
    return turned
