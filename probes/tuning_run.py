"""One fine-tuning run from a task on images to scores, costs and weights that `featstore extract` reads."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float64

from featstore import files
from featstore.backbones.exporting import describe_folder, hub_tensors, write_weights
from featstore.errors import ConfigError
from featstore.extraction.stopping import Stop
from probes.adapters import Adapted
from probes.finetune_tasks import training_digest
from probes.roles import SPLITS
from probes.selection import check_two_classes, macro_quality
from probes.tasks import Task
from probes.training import balance
from probes.tuning_augment import Augmenter
from probes.tuning_cost import processes_of, reset_peak, run_cost
from probes.tuning_feed import Feed, PixelFeed, cache_activations
from probes.tuning_hold import alone
from probes.tuning_images import Split, kind_of, pool_note, pool_scores, split_images
from probes.tuning_loop import Data, Run, least_images
from probes.tuning_model import Tuned, make_head, start_head
from probes.tuning_ranks import Team, should_shard, whole
from probes.tuning_recipe import Precision, TuningRecipe
from probes.tuning_state import Checkpoints, Progress

CHECKPOINTS, MODEL, HEAD, ADAPTERS = "checkpoints", "model.safetensors", "head.safetensors", "adapters.safetensors"
LIVE = "live.safetensors"  # of an own network


@dataclass(frozen=True, slots=True)
class LinearStart:
    """A fitted linear probe that the head starts from: scores are weight @ ((x - mean) / scale) + bias."""

    weight: Float[np.ndarray, "L D"]
    bias: Float[np.ndarray, " L"]
    mean: Float[np.ndarray, " D"] | None = None
    scale: Float[np.ndarray, " D"] | None = None

    @property
    def digest(self) -> str:
        """Changes with every number."""
        arrays = (self.weight, self.bias, self.mean, self.scale)
        return files.digest([None if array is None else files.digest(array.tobytes()) for array in arrays])


@dataclass(frozen=True, kw_only=True, slots=True)
class TuningOptions:
    """What does not belong to the recipe. `start`: what the head starts from; without one small random weights.

    `cache`: folder of activations behind the last frozen block, made where they are not there, in `cache_dtype`.
    `shard`: cut the network over the processes (FSDP2); None: from a billion parameters on. `export`: write weights.
    `score_test`: off for runs among which validation still chooses. `processor`: the `preprocessor_config.json` that
    the network came with, written beside its weights.
    """

    features: str
    start: LinearStart | None = None
    cache: Path | None = None
    cache_dtype: Precision = "float32"
    shard: bool | None = None
    export: bool = True
    score_test: bool = True
    processor: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class TuningResult:
    """What a run leaves for a record; scores are probabilities of what is counted, images of a unit pooled.

    `test_scores` is None where the test split was not to be scored. `weights` is what `featstore extract --weights`
    takes, None where none were asked for. `cost` is of the training, whichever command did it; `asked` is how this one
    would (`tuning_cost.settings_of`).
    """

    val_scores: Float64[np.ndarray, "V L"]
    test_scores: Float64[np.ndarray, "T L"] | None
    progress: Progress
    num_trainable: int
    cost: dict[str, Any]
    settings: dict[str, Any]
    notes: tuple[str, ...]
    weights: Path | None
    asked: dict[str, Any]

    @property
    def history(self) -> dict[str, Any]:
        """Losses (and macro AUROC, where it chooses) of every epoch."""
        held = self.progress
        found = {"train_loss": held.train_loss, "val_loss": held.val_loss}
        return found | ({"val_auroc": held.val_quality} if held.val_quality else {})


def finetune(
    task: Task,
    adapted: Adapted,
    recipe: TuningRecipe,
    folder: Path,
    *,
    options: TuningOptions,
    team: Team | None = None,
    stop: Stop | None = None,
) -> TuningResult:
    """Train a network with a method applied on a task's images; choose the epoch on validation, score the test once.

    `folder` is this run's own: the same call goes on from what is kept there, and waits for another one that is at it.

    Raises:
        TaskError: a split without both classes of any label, or a loss that left the finite numbers.
        ConfigError: options that exclude each other, or a folder of another run.
        StoreError: the folder cannot be written.
        Stopped: it was asked to end, and kept a checkpoint.
    """
    team = team or Team(str(adapted.trainable.device))
    kind = kind_of(task)
    splits = {split: split_images(task, split) for split in SPLITS}
    for split, held in splits.items():
        check_two_classes(task, split, held.y, held.mask)
    shard = should_shard(options.shard, adapted.trainable, team.world)
    augmenter = Augmenter(recipe.augment, task.labels, recipe.seed)
    if options.cache is not None and augmenter.changes:
        raise ConfigError("--from-cache keeps images as they are; leave augmentation out (flip, degrees, crop)")
    if options.cache is not None and shard:
        raise ConfigError("--from-cache needs the network whole on every device; leave sharding out")
    model = _make_model(task, adapted, recipe, options)
    reset_peak(team)
    feeds = _feeds(model, splits, team, recipe, options, augmenter, stop=stop)
    weight = balance(kind, splits["train"].y, splits["train"].mask, len(task.labels)) if recipe.class_weight else None
    truth = task.truth("val")

    def quality(scores: Float64[np.ndarray, "V L"]) -> float:
        return macro_quality(task, pool_scores(task, "val", scores), truth)

    data = Data(kind, splits["train"], splits["val"], feeds, quality, weight, augmenter)
    identity = _identity(task, adapted, recipe, options)
    checkpoints = Checkpoints(folder / CHECKPOINTS, identity, writes=team.writes)
    run = Run(model, data, recipe, team, checkpoints, stop, shard)
    with alone(folder, team, stop):
        progress = run.train()
        scores = {
            split: pool_scores(task, split, run.scores(splits[split], feeds[split])).astype(np.float64)
            for split in (("val", "test") if options.score_test else ("val",))
        }
        weights = export(model, folder, team, options.processor) if options.export else None
    return TuningResult(
        scores["val"],
        scores.get("test"),
        progress,
        model.num_trainable(),
        run_cost(progress, model.num_trainable()),
        _settings(recipe, adapted, progress),
        (*adapted.notes, *augmenter.notes, *pool_note(task), *_notes(model, data, recipe, progress)),
        weights,
        run.settings,
    )


def _settings(recipe: TuningRecipe, adapted: Adapted, progress: Progress) -> dict[str, Any]:
    """The recipe and the method; what decides about cost alone is what it was trained with, at last."""
    last = progress.trained_with[-1]
    return {
        "recipe": recipe.as_dict() | {"micro": last.get("micro")},
        "method": adapted.method,
        "adapter": adapted.settings,
        "sharded": last.get("sharded"),
        "checkpointing": last.get("checkpointing"),
    }


def _make_model(task: Task, adapted: Adapted, recipe: TuningRecipe, options: TuningOptions) -> Tuned:
    head = make_head(adapted, options.features, len(task.labels), recipe.seed)
    if options.start is not None:
        start_head(head, options.start.weight, options.start.bias, options.start.mean, options.start.scale)
    return Tuned(adapted, options.features, head, recipe.precision)


def _feeds(
    model: Tuned,
    splits: dict[str, Split],
    team: Team,
    recipe: TuningRecipe,
    options: TuningOptions,
    augmenter: Augmenter,
    *,
    stop: Stop | None,
) -> dict[str, Feed]:
    if options.cache is not None:
        size = recipe.micro or recipe.batch
        return cache_activations(model, splits, team, options.cache, batch=size, dtype=options.cache_dtype, stop=stop)
    return {
        split: PixelFeed(held, team.device, augmenter if split == "train" else None) for split, held in splits.items()
    }


def _identity(task: Task, adapted: Adapted, recipe: TuningRecipe, options: TuningOptions) -> dict[str, Any]:
    """What decides about the result beyond rounding: another one is another run."""
    spec = task.features.spec
    moves = adapted.trainable.batch_norm == "train"  # then how a batch is cut decides about statistics too
    return {
        "recipe": recipe.identity() | ({"micro": recipe.micro} if moves else {}),
        "task": training_digest(task),
        "weights": spec["identity"]["weights"],
        "architecture": adapted.trainable.architecture.as_dict(),
        "pos_interp": spec["identity"]["pos_interp"],
        "preprocess": spec["identity"]["preprocess"],
        "features": options.features,
        "method": adapted.method,
        "adapter": adapted.settings,
        "head": None if options.start is None else options.start.digest,
        "cache": None if options.cache is None else options.cache_dtype,
    }


def _notes(model: Tuned, data: Data, recipe: TuningRecipe, progress: Progress) -> list[str]:
    found = []
    world = processes_of(progress)
    if progress.chosen == recipe.epochs and recipe.epochs > 1 and recipe.keep != "last":
        found.append(f"the best epoch is the last of {recipe.epochs}: more epochs could be better")
    if progress.diverged:
        found.append(f"training left the finite numbers in epoch {progress.epoch + 1}; epoch {progress.chosen} is kept")
    if progress.resumed:
        often = f"{progress.resumed} times" if progress.resumed > 1 else "once"
        found.append(f"went on {often} from a checkpoint")
    if model.trainable.batch_norm == "train" and (world > 1 or recipe.micro is not None):
        found.append("batch norms take the statistics of each process's part of a batch, which changes with its size")
    left = len(data.train) % recipe.batch
    joins = recipe.batch < len(data.train) and not recipe.drop_last
    if joins and 0 < left < least_images(model.trainable.batch_norm == "train", world):
        found.append(
            f"the last {left} of an epoch's {len(data.train)} images join the batch before: batch norms that move need "
            "two images on every process"
        )
    return found


def export(model: Tuned, folder: Path, team: Team, processor: Mapping[str, Any] | None = None) -> Path | None:
    """Write the head, the adapters of LoRA, and the whole network as the hub has it; a call of all processes.

    Returns what `featstore extract --weights` takes: the folder, or the file where the hub has no `config.json` for the
    family; None for an own network, which reads its weights itself (its state is written by live names).
    """
    adapted, family = model.adapted, model.trainable.family
    live = {name: whole(value.detach()).cpu() for name, value in adapted.live_state().items()}
    own = model.snapshot()
    facts = model.trainable.architecture
    texts = {} if family is None else describe_folder(facts, family, processor)
    if team.writes:
        head = {name: value for name, value in own.items() if name.startswith("head.")}
        write_weights(folder / HEAD, head)
        if adapted.method == "lora":
            write_weights(folder / ADAPTERS, {name: value for name, value in own.items() if name not in head})
        for name, text in texts.items():
            files.write_atomic(folder / name, text.encode())
        if family is None:
            write_weights(folder / LIVE, live)
        else:
            write_weights(folder / MODEL, hub_tensors(live, model.trainable.network, facts, family))
    team.wait()
    if family is None:
        return None
    return folder if texts else folder / MODEL
