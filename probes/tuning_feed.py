"""What a network is fed in training and measuring: images, normalised on the device, or cached activations."""

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from featstore import files
from featstore.errors import ConfigError
from featstore.extraction.device import Transfers
from featstore.images import to_pixels
from probes.tuning_activations import Activations, Entry, check_entry, entry_block, frozen_digest
from probes.tuning_augment import Augmenter, Draws
from probes.tuning_images import Split
from probes.tuning_model import Tuned
from probes.tuning_ranks import Team
from probes.tuning_recipe import Precision

Cuts = Sequence[Int64[np.ndarray, "..."]]


class Feed(ABC):
    """Inputs of one split, on the device, for lists of positions in their order."""

    @abstractmethod
    def read(self, cuts: Cuts, draws: Sequence[Draws] | None = None) -> Generator[Float32[Tensor, "..."]]:
        """Inputs for each list, read ahead; augmented as `draws` say, where they are given."""


class PixelFeed(Feed):
    """Normalised images (b, 3, H, W)."""

    def __init__(self, split: Split, device: str, augmenter: Augmenter | None = None) -> None:
        self._split, self._device, self._augmenter = split, device, augmenter

    def read(self, cuts: Cuts, draws: Sequence[Draws] | None = None) -> Generator[Float32[Tensor, "..."]]:
        split, transfers = self._split, Transfers(self._device)
        with split.images.open([split.rows[cut] for cut in cuts]) as images:
            for number, batch in enumerate(images):
                pixels = transfers.upload(batch.pixels, len(batch.pixels))
                if draws is not None and self._augmenter is not None:
                    top = 1.0 if split.images.preprocess.unit_range else 255.0
                    pixels = self._augmenter.apply(pixels, draws[number], top=top)
                inputs = to_pixels(pixels, split.images.preprocess, device=self._device, dtype=torch.float32)
                transfers.download({})  # the slot is free once what was queued so far is done
                yield inputs


class ActivationFeed(Feed):
    """Activations behind the last frozen block, as they were cached."""

    def __init__(self, held: Activations, positions: Int64[np.ndarray, " n"], device: str) -> None:
        self._held, self._positions, self._device = held, positions, device

    def read(self, cuts: Cuts, draws: Sequence[Draws] | None = None) -> Generator[Float32[Tensor, "..."]]:
        if draws is not None:
            raise ConfigError("cached activations are of images as they are; leave augmentation or --from-cache out")
        for cut in cuts:
            yield self._held.read(self._positions[cut]).to(self._device)


def cache_activations(
    model: Tuned, splits: dict[str, Split], team: Team, folder: Path, *, batch: int, dtype: Precision = "float32"
) -> dict[str, Feed]:
    """Make the model go on from its last frozen block, and give what it is fed for each split.

    What is not in `folder` yet is computed in one pass over the images, which the processes of a team share. Nothing of
    it depends on the head, the method's settings or the seed, so that all runs of a network share it.

    Raises:
        ConfigError: see `entry_block` and `check_entry`.
    """
    number = entry_block(model.adapted, model.features)
    trainable = model.trainable
    feeds: dict[str, Feed] = {}
    spec = next(iter(splits.values())).images.preprocess
    entry = Entry(trainable, number, (spec.height, spec.width))
    check_entry(trainable, entry, model.features)
    digest = frozen_digest(trainable, number)
    for name, split in splits.items():
        key = {
            "images": files.digest([split.images.manifest.digest, split.rows.tolist()]),
            "preprocess": split.images.preprocess.as_dict(),
            "architecture": trainable.architecture.as_dict(),
            "pos_interp": split.images.spec["identity"]["pos_interp"],
            "weights": digest,
            "block": number,
            "precision": model.precision,
        }
        held = Activations(folder, key, len(split), dtype)
        _fill(held, model, split, entry, team, batch)
        feeds[name] = ActivationFeed(held, np.arange(len(split)), team.device)
    model.entry = entry
    return feeds


def _fill(held: Activations, model: Tuned, split: Split, entry: Entry, team: Team, batch: int) -> None:
    trainable, kind = model.trainable, model.trainable.device.type
    was = trainable.training
    trainable.eval()
    mine = held.missing[team.rank :: team.world]
    sizes = [held.rows_of(block) for block in mine]
    cuts = [rows[start : start + batch] for rows in sizes for start in range(0, len(rows), batch)]
    with closing(PixelFeed(split, team.device).read(cuts)) as inputs:
        for block, rows in zip(mine, sizes):
            parts = []
            for _ in range(0, len(rows), batch):
                images = next(inputs)
                with torch.no_grad(), torch.autocast(kind, torch.bfloat16, enabled=model.precision == "bfloat16"):
                    parts.append(entry.take(lambda images=images: trainable.features(images, model.features)).float())  # type: ignore[misc]
            held.write(block, torch.cat(parts))
    trainable.train(was)
    team.wait()
