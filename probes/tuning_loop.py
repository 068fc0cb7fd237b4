"""The loop that fine-tunes a network on images, whatever of it trains: one loop for every method.

A step belongs to a batch that is the same for any number of processes and for any cut into smaller pieces; losses are
summed over valid entries and divided by the count of all of them. What is drawn in a step follows from (seed, epoch,
step, rank), so a run that was ended anywhere goes on to the same bits on a CPU.
"""

import hashlib
import logging
import math
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, Int64, Shaped
from torch import Tensor, nn

from featstore.errors import TaskError
from featstore.extraction.stopping import Stop
from probes.checks import Kind
from probes.training import Targets, probabilities
from probes.tuning_augment import Augmenter
from probes.tuning_cost import settings_of, spent_on
from probes.tuning_feed import Feed
from probes.tuning_images import Split, cut_batches, epoch_order
from probes.tuning_model import Average, TrueZeros, Tuned, make_optimizer, optimizer_state, restore_optimizer
from probes.tuning_ranks import Team
from probes.tuning_recipe import TuningRecipe
from probes.tuning_state import Checkpoints, Progress
from probes.tuning_watch import Watch, check_asked

SHOWN_SECONDS = 5.0  # between two lines of progress
MODEL, OPTIMIZER, AVERAGE = "model:", "optimizer:", "average:"  # begin the names of a checkpoint's tensors
Quality = Callable[[Float64[np.ndarray, "V L"]], float]

log = logging.getLogger(__name__)


class _Asked(Exception):
    """The run was asked to end while it measured."""


@dataclass(frozen=True, slots=True)
class Data:
    """What is trained on and what chooses. `quality` is what validation maximises with `keep` auroc (macro AUROC)."""

    kind: Kind
    train: Split
    val: Split
    feeds: dict[str, Feed]
    quality: Quality
    weight: Float64[np.ndarray, " L"] | None = None
    augmenter: Augmenter | None = None


@dataclass
class Run:
    """One run: a model on its device, its data, how it is trained, who trains, where it is kept, what may end it."""

    model: Tuned
    data: Data
    recipe: TuningRecipe
    team: Team
    checkpoints: Checkpoints
    stop: Stop | None = None
    shard: bool = False
    progress: Progress = field(default_factory=Progress)

    def train(self) -> Progress:
        """Train to the end, from the last checkpoint where there is one; the model has the best epoch's weights then.

        Raises:
            Stopped: it was asked to end; a checkpoint is kept, and the same call goes on.
            TaskError: the loss left the finite numbers before the first validation.
            ConfigError: the checkpoint is of another run.
        """
        self._started = time.monotonic()
        before = torch.random.get_rng_state()
        try:
            self._prepare()
            if self.stop is not None:
                self.stop.is_working = True
            while not self.progress.finished:
                self._epoch()
        finally:
            torch.random.set_rng_state(before)
            if self.stop is not None:
                self.stop.is_working = False
        self._finish()
        return self.progress

    def _prepare(self) -> None:
        recipe = self.recipe
        kept = self.checkpoints.open()
        done = kept is not None and kept.finished
        groups = self.model.groups(recipe.optimisation)
        self._wrapped: nn.Module = self.team.wrap(self.model, self.model.trainable, shard=self.shard)
        self._zeros = TrueZeros(self.model)
        self._optimizer = make_optimizer(self.model, recipe.optimisation, groups)
        decay = recipe.optimisation.ema
        self._average = None if decay is None else Average(self.model, decay)
        data = self.data
        self._targets = Targets.of(data.kind, data.train.y, data.train.mask, "cpu", data.weight)
        self._val = Targets.of(data.kind, data.val.y, data.val.mask, self.team.device, data.weight)
        self._per_epoch = len(self._cut(np.arange(len(data.train))))
        self._shown = self._counted = time.monotonic()
        self._images = 0
        if kept is None:
            return
        self.progress = kept
        if done:
            return
        kept.resumed += 1
        tensors = self.checkpoints.last()
        self.model.restore(_below(tensors, MODEL))
        restore_optimizer(self.model, self._optimizer, _below(tensors, OPTIMIZER))
        if self._average is not None:
            self._average.restore(_below(tensors, AVERAGE))
        if not self.team.writes:  # sums of all processes are kept by one of them
            kept.total = 0.0
        log.info("going on from epoch %d, step %d", kept.epoch + 1, kept.step)

    @property
    def settings(self) -> dict[str, Any]:
        """How it is computed here, apart from what decides about the result."""
        return settings_of(self.team, self.recipe.micro, self.model.trainable.checkpointing, self.shard)

    # One epoch

    def _epoch(self) -> None:
        progress, recipe, data = self.progress, self.recipe, self.data
        order = epoch_order(len(data.train), recipe.seed, progress.epoch)
        steps = [self._plan(batch) for batch in self._cut(order)]
        left = steps[progress.step :]
        cuts = [cut for step in left for cut in step.cuts]
        draws = [drawn for step in left for drawn in step.draws] if self._augments else None
        self._wrapped.train()
        with closing(data.feeds["train"].read(cuts, draws)) as inputs:
            for step in left:
                loss = self._step(step, inputs)
                progress.total += loss
                progress.weight += step.size
                progress.step += 1
                progress.images += len(step.batch)
                self._images += len(step.batch)
                stopped, progress.diverged = self.team.any([self._is_asked(), not math.isfinite(loss)])
                if progress.diverged:
                    self._diverge()
                    return
                self._show()
                if stopped:
                    self._leave()
        self._judge()

    @property
    def _augments(self) -> bool:
        return self.data.augmenter is not None and self.data.augmenter.changes

    def _cut(self, order: Int64[np.ndarray, " n"]) -> list[Int64[np.ndarray, "..."]]:
        """The batches of an epoch; where batch norms move each gives every process two images or more."""
        least = least_images(self.model.trainable.batch_norm == "train", self.team.world)
        return cut_batches(order, self.recipe.batch, drop_last=self.recipe.drop_last, least=least)

    def _plan(self, batch: Int64[np.ndarray, " b"]) -> "_Step":
        """Labels, draws and pieces of a batch; labels are those of the images as they will be, mirrored or not."""
        data, recipe = self.data, self.recipe
        y, mask = self._targets.y.numpy()[batch], self._targets.mask.numpy()[batch] > 0
        mine, counts = self.team.share(len(batch))
        micro = recipe.micro or len(mine)
        # One image has no variance, so that it goes with the piece before where batch norms take that of a piece.
        least = 2 if self.model.trainable.batch_norm == "train" else 1
        pieces = cut_batches(mine, micro, drop_last=False, least=least)
        draws = []
        if self._augments:
            assert data.augmenter is not None
            spec = data.train.images.preprocess
            ids = [data.train.ids[row] for row in batch.tolist()]
            # Only this process's images are drawn, unless mirroring changes labels, which all processes count.
            if data.augmenter.flip == "mapped":
                drawn = data.augmenter.draw(ids, self.progress.epoch, (spec.height, spec.width))
                y, mask = data.augmenter.labels(y, mask, drawn.mirrored)
                draws = [drawn.take(piece) for piece in pieces]
            else:
                draws = [
                    data.augmenter.draw([ids[row] for row in piece], self.progress.epoch, (spec.height, spec.width))
                    for piece in pieces
                ]
        targets = Targets.of(data.kind, y, mask, self.team.device, data.weight)
        return _Step(batch, [batch[piece] for piece in pieces], pieces, counts, draws, targets, _size(targets))

    def _step(self, step: "_Step", inputs: Any) -> float:
        """One step of the optimizer down the mean loss of a batch; returns this process's part of the sum."""
        progress, recipe = self.progress, self.recipe
        self._seed(progress.epoch, progress.step)
        self._optimizer.zero_grad(set_to_none=True)
        total = 0.0
        place = 0
        for number, piece in enumerate(step.pieces):
            counts = step.counts[place : place + len(piece)]
            place += len(piece)
            with self._quiet(number + 1 < len(step.pieces)):
                loss = _loss(self._wrapped(next(inputs)), step.targets, piece, counts)
                # Averaged over processes afterwards, so that all rows of the batch weigh alike.
                (loss * (self.team.world / max(step.size, 1e-12))).backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        self._zeros.hold()
        how = recipe.optimisation
        done = progress.epoch * self._per_epoch + progress.step
        factor = how.factor(done, recipe.epochs * self._per_epoch, self._per_epoch)
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        if how.clip is not None:
            torch.nn.utils.clip_grad_norm_(list(self.model.trained().values()), how.clip)
        if math.isfinite(total):
            self._optimizer.step()
            if self._average is not None:
                self._average.add()
        return total

    def _quiet(self, more: bool) -> Any:
        """Within it gradients are kept back, as more of the same step follow."""
        if self.shard:
            self.model.set_requires_gradient_sync(not more)  # type: ignore[operator]
            return nullcontext()
        if more and self.team.world > 1:
            return self._wrapped.no_sync()  # type: ignore[operator]
        return nullcontext()

    def _seed(self, epoch: int, step: int) -> None:
        """Dropout and dropped paths of a step, as if nothing had been drawn before."""
        key = f"fine-tuning {self.recipe.seed} {epoch} {step} {self.team.rank}".encode()
        torch.manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:8], "little") >> 1)

    # Measuring

    def measure(self, split: Split, feed: Feed, *, may_end: bool = False) -> Float32[Tensor, "n L"]:
        """Logits of a split in its order, on every process; the model as it is now.

        With `may_end` it is given up where the run is asked to end.
        """
        mine, _ = self.team.share(len(split))
        size = self.recipe.micro or max(1, -(-self.recipe.batch // self.team.world))
        cuts = [mine[start : start + size] for start in range(0, len(mine), size)]
        self.model.eval()
        found = []
        watch = Watch("images measured", len(split), self.team, self.stop)
        with watch, closing(feed.read(cuts)) as inputs, torch.no_grad():
            for batch in inputs:
                found.append(self.model(batch).float())
                asked, _ = watch.step(len(batch))
                if asked and may_end:
                    raise _Asked
        return self.team.join(torch.cat(found), len(split))

    def scores(self, split: Split, feed: Feed) -> Float64[np.ndarray, "n L"]:
        """Probabilities of a split's images.

        Raises:
            Stopped: asked to end; the weights are kept, and the same call measures again.
        """
        # Not where nothing that stays was done: ended here each time, no attempt would ever get further.
        (may_end,) = self.team.any([self.stop is not None and self.stop.has_kept])
        try:
            logits = self.measure(split, feed, may_end=may_end)
        except _Asked:
            check_asked(True, self.stop)
            raise
        return probabilities(logits, self.data.kind)

    def _judge(self) -> None:
        """Measure on validation, keep the weights if they are the best so far, and commit the epoch."""
        progress, recipe, data = self.progress, self.recipe, self.data
        if self.model.trainable.batch_norm == "train":
            self.team.equalise(self.model.statistics())
        rows = np.arange(len(data.val))
        try:
            with self._average.shown() if self._average is not None else nullcontext():
                # Not where this attempt has trained nothing yet: ended here each time, none would ever get further.
                trained = progress.step > 0 and self._images > 0
                logits = self.measure(data.val, data.feeds["val"], may_end=trained)
                loss = float(self._val.loss(logits, rows)) / max(self._val.size(rows), 1e-12)
                key, quality = [-loss], math.nan
                if recipe.keep == "auroc" and math.isfinite(loss):
                    quality = data.quality(probabilities(logits, data.kind))
                    key = [quality if math.isfinite(quality) else -1.0, -loss]
                elif recipe.keep == "last":  # validation may be trained on
                    key = [float(progress.epoch)]
                better = math.isfinite(loss) and (not progress.best or key > progress.best)
                kept = self.model.snapshot() if better else None
        except _Asked:
            self._leave()
        if not math.isfinite(loss):
            self._diverge()
            return
        (total,) = self.team.sum([progress.total])
        progress.train_loss.append(total / max(progress.weight, 1e-12))
        progress.val_loss.append(loss)
        if recipe.keep == "auroc":
            progress.val_quality.append(quality if math.isfinite(quality) else None)
        progress.epoch += 1
        progress.step, progress.total, progress.weight = 0, 0.0, 0.0
        if better:
            progress.best, progress.chosen = key, progress.epoch
        idle = progress.epoch - progress.chosen
        over = recipe.patience is not None and idle >= recipe.patience
        progress.finished = progress.epoch >= min(recipe.epochs, recipe.stop_after or recipe.epochs) or over
        log.info(
            "epoch %d/%d: train loss %.4f, val loss %.4f%s", progress.epoch, recipe.epochs, progress.train_loss[-1],
            loss, " (best)" if better else "",
        )  # fmt: skip
        self._save(kept)
        if self.team.any([self._is_asked()])[0]:  # also after the last epoch: what is left to do may take long
            raise self.team.stopped(self.stop)

    def _diverge(self) -> None:
        """The loss left the finite numbers: keep what was the best, or say that nothing was."""
        progress = self.progress
        progress.diverged = True
        if not progress.chosen:
            raise TaskError(
                f"training left the finite numbers in epoch {progress.epoch + 1} before anything was measured; lower "
                "the learning rate"
            )
        progress.finished = True
        progress.total = progress.weight = 0.0
        self._save(None)

    # Ending and going on

    def _is_asked(self) -> bool:
        return self.stop is not None and self.stop.asked

    def _leave(self) -> NoReturn:
        """Keep a checkpoint in the middle of an epoch, and end."""
        (self.progress.total,) = self.team.sum([self.progress.total])
        self._save(None)
        raise self.team.stopped(self.stop)

    def _save(self, best: dict[str, Shaped[Tensor, "..."]] | None) -> None:
        progress = self.progress
        now = time.monotonic()
        progress.spend(self.settings, now - self._started, spent_on(self.team, now - self._started))
        self._started = now
        last = None
        if not progress.finished:
            last = {f"{MODEL}{name}": value for name, value in self.model.snapshot().items()}
            states = optimizer_state(self.model, self._optimizer)
            last |= {f"{OPTIMIZER}{name}": value for name, value in states.items()}
            if self._average is not None:
                last |= {f"{AVERAGE}{name}": value for name, value in self._average.snapshot().items()}
        self.checkpoints.save(progress, last, best)
        if self.stop is not None:
            self.stop.has_kept = True
        self.team.wait()

    def _finish(self) -> None:
        """Put the best epoch's weights into the model."""
        self.checkpoints.reread()
        best = self.checkpoints.best()
        if best is None:
            raise TaskError("no epoch had a finite loss on validation; lower the learning rate")
        self.model.restore(best)
        self.model.eval()

    def _show(self) -> None:
        now = time.monotonic()
        if not self.team.writes or now - self._shown < SHOWN_SECONDS:
            return
        progress = self.progress
        spent = now - self._counted
        rate = self._images / max(spent, 1e-9)
        of_all = len(self.data.train) * self.recipe.epochs
        left = (of_all - progress.epoch * len(self.data.train) - progress.step * self.recipe.batch) / max(rate, 1e-9)
        self._shown = now
        log.info(
            "epoch %d/%d, step %d/%d: %.1f images/s, at most %.0f s left%s", progress.epoch + 1, self.recipe.epochs,
            progress.step, self._per_epoch, rate, left, _memory(self.team.device),
        )  # fmt: skip


def least_images(moves: bool, world: int) -> int:
    """Images that a batch needs so that every process has two of it where batch norms move, else one."""
    return world + 1 if moves else 1


@dataclass(frozen=True, slots=True)
class _Step:
    """A batch of all processes and this one's pieces of it: `cuts` are training positions, `pieces` those within the
    batch; `counts` says which rows of them are no repetitions."""

    batch: Int64[np.ndarray, " b"]
    cuts: list[Int64[np.ndarray, "..."]]
    pieces: list[Int64[np.ndarray, "..."]]
    counts: Bool[np.ndarray, " m"]
    draws: list[Any]
    targets: Targets
    size: float


def _loss(
    logits: Float32[Tensor, "b L"], targets: Targets, piece: Int64[np.ndarray, " b"], counts: Bool[np.ndarray, " b"]
) -> Tensor:
    """Sum over the valid entries of the rows that count."""
    if counts.all():
        return targets.loss(logits, piece)
    kept = torch.from_numpy(np.flatnonzero(counts)).to(logits.device)
    # Every process goes back through its network, also where none of its rows count.
    return targets.loss(logits[kept], piece[counts]) + logits.sum() * 0


def _size(targets: Targets) -> float:
    return targets.size(np.arange(len(targets.y)))


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _memory(device: str) -> str:
    if not device.startswith("cuda"):
        return ""
    return f", peak {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"
