"""Augmentation of training images on the device: what is drawn for a sample depends on seed, epoch and its id alone.

Neither the batch it comes in, nor the number of processes, nor the device changes what is drawn. The numbers are those
of the store's augmented views (`featstore.images.augment`), the epoch in the place of the view.
"""

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, Int64, Shaped, UInt8
from torch import Tensor

from featstore.configs import Augmentation
from featstore.errors import ConfigError
from featstore.images.augment import RECIPES, Augment, draw
from probes.tuning_recipe import AugmentRecipe, Crop, Flip

SIDES = {"left": "right", "right": "left", "l": "r", "r": "l", "lt": "rt", "rt": "lt"}
WHOLE = ("left", "right")  # sides that are words; the short ones count only at the ends of a name
EYES = {"od": "os", "os": "od"}
CAPITALS = re.compile(r"[LR][A-Z]{1,3}")
CROPS: dict[Crop, Augmentation] = {"0.75-1": "radiology", "0.08-1": "dino"}
TURNS: Augmentation = "chest"
DEVIATION = "crops are cut from the stored image and not from the source at its full size"
PARTS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+|[^A-Za-z\d]+")


@dataclass(frozen=True, slots=True)
class Draws:
    """What is done to each image of a batch; `boxes` are (top, left, height, width), None where nothing is cropped."""

    mirrored: Bool[np.ndarray, " B"]
    degrees: Float64[np.ndarray, " B"]
    boxes: Int64[np.ndarray, "B 4"] | None

    def take(self, index: Int64[np.ndarray, " b"]) -> "Draws":
        """Those of some images."""
        return Draws(self.mirrored[index], self.degrees[index], None if self.boxes is None else self.boxes[index])


class Augmenter:
    """A recipe, settled for the labels of a task."""

    def __init__(self, recipe: AugmentRecipe, labels: Sequence[str], seed: int) -> None:
        self.recipe, self.seed = recipe, seed
        self.flip, self.swapped = settle_flip(recipe.flip, labels)
        self.changes = self.flip != "off" or recipe.degrees > 0 or recipe.crop != "off"

    @property
    def notes(self) -> list[str]:
        """What a record should say about it."""
        said = [DEVIATION] if self.recipe.crop != "off" else []
        if self.recipe.flip == "auto":
            why = {"off": "a label names a side that has no counterpart", "plain": "no label names a side"}
            why["mapped"] = "labels of the left and the right are swapped with the image"
            said.append(f"flip {self.flip}: {why[self.flip]}")
        return said

    def draw(self, ids: Sequence[str], epoch: int, size: tuple[int, int]) -> Draws:
        """What is done in an epoch (from 0) to the samples `ids`, whose images have `size` (height, width)."""
        count = len(ids)
        mirrored, degrees = np.zeros(count, bool), np.zeros(count)
        boxes = None if self.recipe.crop == "off" else np.zeros((count, 4), np.int64)
        # Mirroring comes with every recipe of the views; a crop's is taken where there is one.
        main = Augment(recipe=CROPS.get(self.recipe.crop, TURNS), view=epoch + 1, seed=self.seed)
        turns = Augment(recipe=TURNS, view=epoch + 1, seed=self.seed)
        for place, sample in enumerate(ids):
            drawn = draw(main, sample, *size)
            mirrored[place] = self.flip != "off" and drawn.is_mirrored
            if boxes is not None:
                assert drawn.box is not None
                boxes[place] = drawn.box
            if self.recipe.degrees:
                turned = drawn.degrees if main == turns else draw(turns, sample, *size).degrees
                degrees[place] = turned / RECIPES[TURNS].degrees * self.recipe.degrees
        return Draws(mirrored, degrees, boxes)

    def labels(
        self,
        y: Shaped[np.ndarray, "B ..."],
        mask: Bool[np.ndarray, "B ..."],
        mirrored: Bool[np.ndarray, " B"],
    ) -> tuple[Shaped[np.ndarray, "B ..."], Bool[np.ndarray, "B ..."]]:
        """(y, mask) of a batch, left and right swapped where the image is mirrored and labels are mapped."""
        if self.flip != "mapped" or not mirrored.any():
            return y, mask
        if y.ndim == 1:
            return np.where(mirrored, self.swapped[y], y), mask
        rows = mirrored[:, None]
        return np.where(rows, y[:, self.swapped], y), np.where(rows, mask[:, self.swapped], mask)

    def apply(
        self, batch: UInt8[Tensor, "B C H W"] | Float32[Tensor, "B C H W"], draws: Draws, *, top: float = 255.0
    ) -> Float32[Tensor, "B C H W"]:
        """The batch as it was drawn, in float32 and on its device; `top` is the largest intensity."""
        values = batch.to(torch.float32)
        if draws.boxes is not None:
            values = crop(values, draws.boxes).clamp_(0, top)
        if draws.mirrored.any():
            mirrored = torch.from_numpy(draws.mirrored).to(values.device)
            values = torch.where(mirrored[:, None, None, None], values.flip(-1), values)
        if draws.degrees.any():
            values = turn(values, draws.degrees, self.recipe.interpolation)
        return values


def crop(values: Float32[Tensor, "B C H W"], boxes: Int64[np.ndarray, "B 4"]) -> Float32[Tensor, "B C H W"]:
    """Each image's box resized to the whole image: bicubic, with the coefficients of Pillow."""
    height, width = values.shape[2:]
    top, left, high, wide = (torch.from_numpy(boxes[:, place].astype(np.float32)) for place in range(4))
    found = torch.empty_like(values)
    # One image at a time: pixels beyond a box must not show in its edge, so each box is a picture of its own.
    for place in range(len(values)):
        y, x, h, w = (int(part[place]) for part in (top, left, high, wide))
        box = values[place : place + 1, :, y : y + h, x : x + w]
        whole = (h, w) == (height, width)
        found[place] = (
            box if whole else torch.nn.functional.interpolate(box, (height, width), mode="bicubic", antialias=True)
        )[0]
    return found


def turn(
    values: Float32[Tensor, "B C H W"], degrees: Float64[np.ndarray, " B"], how: Literal["bilinear", "nearest"]
) -> Float32[Tensor, "B C H W"]:
    """Each image turned counter-clockwise about its centre at the same size, 0 outside.

    `nearest` gives the pixels of RandomRotation with its defaults, and of the store's views.
    """
    batch, _, height, width = values.shape
    device = values.device
    angles = torch.tensor([math.radians(angle) for angle in degrees.tolist()], dtype=torch.float64, device=device)
    along, across = angles.cos()[:, None, None], angles.sin()[:, None, None]
    y = (torch.arange(height, dtype=torch.float64, device=device) + 0.5 - height / 2)[None, :, None]
    x = (torch.arange(width, dtype=torch.float64, device=device) + 0.5 - width / 2)[None, None, :]
    # Where each pixel comes from, in pixels from the upper left corner: its centre turned back.
    columns = along * x - across * y + width / 2  # (B, H, W)
    rows = across * x + along * y + height / 2
    if how == "nearest":
        return _pick(values, rows.floor().long(), columns.floor().long())
    rows, columns = rows - 0.5, columns - 0.5
    top, left = rows.floor(), columns.floor()
    down, right = (rows - top).float()[:, None], (columns - left).float()[:, None]
    first, second = top.long(), left.long()
    above = _pick(values, first, second) * (1 - right) + _pick(values, first, second + 1) * right
    below = _pick(values, first + 1, second) * (1 - right) + _pick(values, first + 1, second + 1) * right
    assert len(above) == batch
    return above * (1 - down) + below * down


def _pick(
    values: Float32[Tensor, "B C H W"], rows: Int64[Tensor, "B H W"], columns: Int64[Tensor, "B H W"]
) -> Float32[Tensor, "B C H W"]:
    """The pixels at whole-numbered places, 0 outside."""
    batch, channels, height, width = values.shape
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    index = rows.clamp(0, height - 1) * width + columns.clamp(0, width - 1)
    found = values.flatten(2).gather(2, index.flatten(1)[:, None].expand(batch, channels, height * width))
    return found.view_as(values) * inside[:, None]


def other_side(label: str, labels: Collection[str] = ()) -> str | None:
    """The label's name with left and right exchanged; None where it names no side.

    A side is the word left or right anywhere among the parts of a name (`effusion_left`, `Left lung`, `LeftEffusion`),
    or L, R, LT, RT as its only, first or last part (`effusion_R`, `rt_effusion`; not before a number, as the vertebra
    in `L1 fracture`), in any spelling of capitals. Anything that could be one (OD and OS, LLL and RLL, `lung l upper`)
    is one where the name that the exchange gives stands among `labels`.
    """
    parts: list[str] = PARTS.findall(label)
    words = [place for place, part in enumerate(parts) if part[0].isalpha()]
    sure, possible = list(parts), list(parts)
    for place in words:
        word, following = parts[place].lower(), "".join(parts[place + 1 :]).lstrip(" _-.")[:1]
        outer = place in (words[0], words[-1]) and not following.isdigit()
        if word in WHOLE or (word in SIDES and outer):
            sure[place] = _spelled(SIDES[word], parts[place])
        if word in SIDES or word in EYES:
            possible[place] = _spelled({**SIDES, **EYES}[word], parts[place])
        elif CAPITALS.fullmatch(parts[place]):  # LLL, RCC, LVH
            possible[place] = _spelled(SIDES[word[0]], "L") + parts[place][1:]
    found = ["".join(each) for each in (sure, possible) if each != parts]
    return next((name for name in found if name in labels), "".join(sure) if sure != parts else None)


def _spelled(word: str, like: str) -> str:
    return word.upper() if like.isupper() else word.capitalize() if like[0].isupper() else word


def settle_flip(flip: Flip, labels: Sequence[str]) -> tuple[Flip, Int64[np.ndarray, " L"]]:
    """(what mirroring does for these labels, the number of each label's other side, its own where it names none).

    Raises:
        ConfigError: `mapped` where a label's other side is not among the labels.
    """
    numbers = {label: number for number, label in enumerate(labels)}
    others = [other_side(label, labels) for label in labels]
    single = [label for label, other in zip(labels, others) if other is not None and other not in numbers]
    swapped = np.array(
        [number if other is None else numbers.get(other, number) for number, other in enumerate(others)], np.int64
    )
    if flip == "mapped" and single:
        raise ConfigError(
            f"flip mapped swaps labels of the left and the right, and {single[0]!r} has no counterpart among the "
            f"labels ({len(single)} such); use flip off"
        )
    if flip != "auto":
        return flip, swapped
    if single:
        return "off", swapped
    return ("mapped" if any(other is not None for other in others) else "plain"), swapped
