"""What a network is fed in training and measuring: images, normalised on the device, or cached activations."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from featstore import files
from featstore.errors import ConfigError
from featstore.extraction.device import Transfers
from featstore.extraction.stopping import Stop
from featstore.images import to_pixels
from probes.finetune_tasks import contents_digest
from probes.tuning_activations import Activations, Entry, check_entry, entry_block, frozen_digest
from probes.tuning_augment import Augmenter, Draws
from probes.tuning_images import Split
from probes.tuning_model import Tuned
from probes.tuning_ranks import Team
from probes.tuning_recipe import Precision
from probes.tuning_watch import Watch, check_asked

AHEAD = 2  # batches of activations that are read before they are asked for

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
        with ThreadPoolExecutor(1, "activations") as reader:
            ahead = deque(reader.submit(self._rows, cut) for cut in cuts[:AHEAD])
            for number in range(len(cuts)):
                rows = ahead.popleft().result()
                if number + AHEAD < len(cuts):
                    ahead.append(reader.submit(self._rows, cuts[number + AHEAD]))
                yield rows.to(self._device)

    def _rows(self, cut: Int64[np.ndarray, " b"]) -> Float32[Tensor, "b ..."]:
        return self._held.read(self._positions[cut])


def fill_rows(
    held: Activations,
    split: Split,
    compute: Callable[[Float32[Tensor, "b 3 H W"]], Float32[Tensor, "b ..."]],
    team: Team,
    *,
    batch: int,
    what: str,
    stop: Stop | None = None,
) -> None:
    """Compute what `held` lacks of a split's images; the processes of a team share its blocks. `what` begins its lines.

    Raises:
        Stopped: asked to end; committed blocks stay.
    """
    missing: list[int] = team.objects(held.missing)[0]
    mine = missing[team.rank :: team.world]
    rounds = len(missing[:: team.world])  # as many for all
    sizes = [held.rows_of(block) for block in mine]
    cuts = [rows[start : start + batch] for rows in sizes for start in range(0, len(rows), batch)]
    total = sum(len(held.rows_of(block)) for block in missing)
    with Watch(what, total, team, stop) as watch, closing(PixelFeed(split, team.device).read(cuts)) as inputs:
        for number in range(rounds):
            rows = sizes[number] if number < len(mine) else np.arange(0)
            if len(rows):
                with torch.no_grad():
                    parts = [compute(next(inputs)) for _ in range(0, len(rows), batch)]
                held.write(mine[number], torch.cat(parts))
                watch.kept()
            asked, _ = watch.step(len(rows))
            if number + 1 < rounds:  # else it is done
                check_asked(asked, stop)
    team.wait()


def cache_activations(
    model: Tuned,
    splits: dict[str, Split],
    team: Team,
    folder: Path,
    *,
    batch: int,
    dtype: Precision = "float32",
    stop: Stop | None = None,
) -> dict[str, Feed]:
    """Make the model go on from its last frozen block, and give what it is fed for each split.

    What is not in `folder` yet is computed in one pass over the images, which the processes of a team share. Nothing of
    it depends on the head, the method's settings or the seed, so that all runs of a network share it.

    Raises:
        ConfigError: see `entry_block` and `check_entry`. Stopped: asked to end; what is committed stays.
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
            "images": files.digest(
                [split.images.manifest.digest, split.rows.tolist(), contents_digest(split.images, split.rows)]
            ),
            "preprocess": split.images.preprocess.as_dict(),
            "architecture": trainable.architecture.as_dict(),
            "pos_interp": split.images.spec["identity"]["pos_interp"],
            "weights": digest,
            "block": number,
            "precision": model.precision,
        }
        held = Activations(folder, key, len(split), dtype)
        was = trainable.training
        trainable.eval()
        what = f"frozen blocks, {name} images"
        fill_rows(held, split, partial(_taken, model, entry), team, batch=batch, what=what, stop=stop)
        trainable.train(was)
        feeds[name] = ActivationFeed(held, np.arange(len(split)), team.device)
    model.entry = entry
    return feeds


def _taken(model: Tuned, entry: Entry, images: Float32[Tensor, "b 3 H W"]) -> Float32[Tensor, "b ..."]:
    with torch.autocast(model.trainable.device.type, torch.bfloat16, enabled=model.precision == "bfloat16"):
        return entry.take(lambda: model.trainable.features(images, model.features)).float()
