"""Images of a task's splits for training, read as extraction reads them, in an order that follows from (seed, epoch).

With the decoded cache images are decoded once and mapped afterwards; without it they are held in memory where they are
few, or decoded in every epoch. No feature that was ever extracted is read.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int64, Shaped

from featstore.configs import RunConfig
from featstore.datasets.manifest import MISSING
from featstore.errors import ConfigError, DecodeError, IncompleteError
from featstore.extraction.decoded_cache import CachedImages, fill_cache, find_cache
from featstore.extraction.loader import NO_CONTENT, Batch, Images, Job, check_files, open_loader
from featstore.extraction.plan import Plan
from featstore.extraction.stopping import Stop
from featstore.images import PreprocessSpec
from featstore.objects import Place
from featstore.store.commits import RowState
from featstore.store.features import FeatureSet
from probes.checks import Kind
from probes.roles import SPLITS
from probes.tasks import Task, make_task
from probes.taskspec import TaskSpec
from probes.trained import check_labels_or_classes, owner_of
from probes.tuning_ranks import Team
from probes.tuning_survey import Failures, Kept, look_through
from probes.tuning_watch import Rate, check_asked

HOLD_BYTES = 2 * 2**30  # of decoded images that are held in memory where there is no decoded cache


class ImageSet(FeatureSet):
    """The images behind a set, in place of its rows: tasks are made on it, and nothing of the set itself is opened.

    A sample counts as usable until it turns out that its image cannot be decoded (see `survey`).
    """

    def __init__(self, plan: Plan, run: RunConfig, *, hold_bytes: int = HOLD_BYTES) -> None:
        self.folder, self.spec, self.manifest = plan.folder, plan.spec, plan.manifest
        self.plan, self.run = plan, run
        self.preprocess: PreprocessSpec = plan.preprocess
        self.notes: list[str] = []
        self._hold_bytes = hold_bytes
        self._cache: Any = None
        self._holds = False
        self._held: dict[int, np.ndarray] = {}
        self._surveyed = np.zeros(len(plan.manifest), bool)
        self._reasons = {
            int(row): "the file was missing at registration"
            for row in np.flatnonzero(plan.manifest.table.column("size").to_numpy() == MISSING)
        }

    @property
    def row_index(self) -> Int64[np.ndarray, " N"]:
        """Not there: these are images.

        Raises:
            IncompleteError: always.
        """
        raise IncompleteError(f"{self.name}: images to train on, with no rows of features; extract the set for those")

    @property
    def failures(self) -> dict[int, str]:
        """Manifest row -> reason, for images that could not be decoded, as far as they were looked at."""
        return dict(self._reasons)

    @property
    def ok(self) -> Bool[np.ndarray, " N"]:
        """Samples whose images can be used."""
        found = np.ones(len(self.manifest), bool)
        found[list(self._reasons)] = False
        return found

    def survey(
        self,
        rows: Int64[np.ndarray, " n"],
        team: Team | None = None,
        *,
        stop: Stop | None = None,
        folder: Place | None = None,
    ) -> None:
        """Decode these samples once, into the cache where the run has one, and find those that fail.

        The processes of a team share the work. What is found is kept in `folder`, so that the same survey goes on.

        Raises:
            ManifestError: files changed since registration. FeatstoreError: too many failures.
            Stopped: asked to end.
        """
        team = team or Team()
        if self.run.decoded_cache:
            self._fill(team, stop)
        else:
            check_files(self.manifest, rows)
        rows = rows[~self._surveyed[rows]]
        total = int(self._surveyed.sum()) + len(rows)
        size = 3 * self.preprocess.height * self.preprocess.width
        size *= 1 if self.preprocess.quantise == "uint8" else 4
        self._holds = self._cache is None and team.world == 1 and size * total <= self._hold_bytes
        before = {row: reason for row, reason in self._reasons.items() if self._surveyed[row]}
        found = look_through(
            lambda jobs: self.open(jobs, check=False),
            rows,
            # A cache knows what became of its images, and has pixels of no others.
            Kept(folder, self.plan.manifest, self.preprocess, trusted=not self.run.decoded_cache),
            Failures(self.run, total, before),
            team,
            stop=stop,
        )
        self._reasons |= {row: state.reason for row, state in found.items() if state.reason is not None}
        self._surveyed[rows] = True
        self._note_contents({row: state.content for row, state in found.items() if state.content != NO_CONTENT})

    def _fill(self, team: Team, stop: Stop | None) -> None:
        """Decode what the cache lacks, of all the data set."""
        held = find_cache(self.plan.folder.parents[2], self.plan.manifest, self.preprocess)
        lacking = len(held.missing(retry_failed=False))
        # Others may be at it too: this process tells of the blocks that it takes.
        rate = Rate("images decoded", -(-lacking // team.world), speaks=team.writes)
        self._cache, lines = fill_cache(self.plan, self.run, advance=lambda images, _: rate.add(images), stop=stop)
        asked = stop is not None and stop.asked and len(self._cache.missing(retry_failed=False)) > 0
        check_asked(team.any([asked])[0], stop)
        self.notes += [line for line in lines if line not in self.notes]

    def _note_contents(self, contents: dict[int, str]) -> None:
        # Tasks compare images of different splits by the hashes of their files; some manifests state none.
        column = self.manifest.table.column_names.index("content")
        stated: list[str | None] = self.manifest.column("content")
        filled = [value or contents.get(row) for row, value in enumerate(stated)]
        table = self.manifest.table.set_column(column, "content", pa.array(filled, pa.string()))
        self.manifest = replace(self.manifest, table=table)

    def open(self, jobs: Sequence[Int64[np.ndarray, "..."]], *, check: bool = True) -> Images:
        """A context that yields a batch of pixels for each list of manifest rows, in order, read ahead.

        Raises (while it is read):
            DecodeError: with `check`, an image that could be decoded before and now cannot.
        """
        work = [Job(-1, tuple(int(row) for row in rows)) for rows in jobs]
        if self._cache is not None:
            images: Images = CachedImages([self._cache], work)
        elif work and all(row in self._held for job in work for row in job.rows):
            return _Held(self._held, work)
        else:
            images = open_loader(self.plan.manifest, self.preprocess, work, self.run)
            images = _Holding(images, self._held) if self._holds else images
        return _Checked(images, self.manifest.column("id")) if check else images


class _Held(Images):
    """Batches of images in memory; three channels where one of a batch has them."""

    def __init__(self, held: dict[int, np.ndarray], work: Iterable[Job]) -> None:
        self._held, self._work = held, work

    def __exit__(self, *_: object) -> None:
        """Nothing is on its way."""

    def __iter__(self) -> Iterator[Batch]:
        for job in self._work:
            images = [self._held[row] for row in job.rows]
            channels = max(len(image) for image in images)
            pixels = np.stack([np.broadcast_to(image, (channels, *image.shape[1:])) for image in images])
            yield Batch(job, pixels, [RowState("")] * len(images))


class _Holding(Images):
    """Batches whose good images are held from then on."""

    def __init__(self, images: Images, held: dict[int, np.ndarray]) -> None:
        self._images, self._held = images, held

    def __enter__(self) -> "_Holding":
        self._images.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._images.__exit__()

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._images:
            for row, image, state in zip(batch.job.rows, batch.pixels, batch.states):
                if state.reason is None:
                    self._held[row] = image
            yield batch


class _Checked(Images):
    """Batches of images that were all good before."""

    def __init__(self, images: Images, ids: Sequence[str | None]) -> None:
        self._images, self._ids = images, ids

    def __enter__(self) -> "_Checked":
        self._images.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._images.__exit__()

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._images:
            for row, state in zip(batch.job.rows, batch.states):
                if state.reason is not None:
                    raise DecodeError(
                        f"{self._ids[row]}: it could be decoded when the run began and cannot now ({state.reason}); "
                        "check the disk, then run the same command again"
                    )
            yield batch


def make_image_task(
    images: ImageSet,
    spec: TaskSpec,
    team: Team | None = None,
    *,
    allow_leak: bool = False,
    stop: Stop | None = None,
    folder: Place | None = None,
    splits: Sequence[str] = SPLITS,
) -> Task:
    """The task on images: every image that it uses is looked at once, and what fails is left out and counted.

    `folder` keeps what is found. `splits`: those that are used, all but for the data set of a test.

    Raises:
        TaskError, LeakError: as `make_task`. Stopped: as `ImageSet.survey`.
    """
    first = make_task(images, spec, allow_leak=True, splits=splits)
    images.survey(np.flatnonzero(np.isin(first.role, splits)), team, stop=stop, folder=folder)
    return make_task(images, spec, allow_leak=allow_leak, splits=splits)


@dataclass(frozen=True, slots=True)
class Split:
    """Images of one split with the labels they train or are measured with, in the order of `Task.index`.

    `rows` are manifest rows of `images`; `y` and `mask` are (n, L), or (n,) for classes.
    """

    images: ImageSet
    rows: Int64[np.ndarray, " n"]
    ids: tuple[str, ...]
    y: Shaped[np.ndarray, "n ..."]
    mask: Bool[np.ndarray, "n ..."]

    def __len__(self) -> int:
        return len(self.rows)


def kind_of(task: Task) -> Kind:
    """The task's kind, which a classification head has a loss for.

    Raises:
        TaskError: numbers or ranks.
    """
    return check_labels_or_classes(task, "finetune")


def split_images(task: Task, split: str) -> Split:
    """The images of a split, with the labels that a frozen probe's head has for them.

    Training images keep labels of their own, unless a task pools features; images of a unit that is measured have the
    unit's.

    Raises:
        TaskError: images of one unit are of different classes. ConfigError: the task is on features.
    """
    owner = owner_of(task, split)
    images = owner.features
    if not isinstance(images, ImageSet):
        raise ConfigError(f"{images.name} is a set of features; make the task on an ImageSet to train on its images")
    rows = owner.index(split)
    policy_y, policy_mask = (owner.y_train, owner.mask_train) if split == "train" else (owner.y, owner.mask)
    y, mask = policy_y[rows], policy_mask[rows]
    if owner.unit_ids is not None and (split != "train" or owner.pools_features):
        units = owner.units(split)
        of_units = units.labels(y, mask, owner.kind, owner.spec.unit)
        y, mask = of_units[0][units.number], of_units[1][units.number]
    names = images.manifest.column("id")
    return Split(images, rows, tuple(str(names[row]) for row in rows), y, mask)


def pool_scores(task: Task, split: str, scores: Float[np.ndarray, "n L"]) -> Float[np.ndarray, "U L"]:
    """Scores of images as scores of what is counted; where a task pools features, scores are averaged instead."""
    owner = owner_of(task, split)
    if owner.unit_ids is None:
        return scores
    return owner.units(split).pool(scores, "max" if owner.spec.pool == "max" else "mean")


def pool_note(task: Task) -> list[str]:
    """What a record should say about pooling."""
    if not task.pools_features:
        return []
    return ["the task averages the features of a unit; a fine-tuned head sees images, and their scores are averaged"]


def epoch_order(count: int, seed: int, epoch: int) -> Int64[np.ndarray, " n"]:
    """Positions of all training images in the order of an epoch (from 0)."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def cut_batches(
    order: Int64[np.ndarray, " n"], batch: int, *, drop_last: bool, least: int = 1
) -> list[Int64[np.ndarray, "..."]]:
    """The batches of an epoch, over all processes; with `drop_last` whole ones alone, but at least one.

    A last one of fewer than `least` images joins the one before.
    """
    size = min(batch, len(order))
    stop = len(order) // size * size if drop_last else len(order)
    starts = list(range(0, stop, size))
    if len(starts) > 1 and stop - starts[-1] < least:
        starts.pop()
    return [order[start:end] for start, end in zip(starts, [*starts[1:], stop])]
