"""What comes before a run: the linear probe that its head starts from, and the check that bfloat16 may stand in."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32, Float64
from torch import Tensor

from featstore import files
from featstore.backbones.trainable import Trainable
from featstore.errors import ConfigError
from featstore.extraction.stopping import Stop
from probes.configs import LinearConfig
from probes.linear import choose_C, kind_of, logistic_head, probabilities_per_C
from probes.logistic import DEFAULT_C
from probes.selection import check_two_classes, macro_quality
from probes.tasks import Task
from probes.tuning_activations import Activations
from probes.tuning_augment import Augmenter
from probes.tuning_cost import free_memory
from probes.tuning_feed import Feed, PixelFeed, fill_rows
from probes.tuning_images import Split, pool_scores, split_images
from probes.tuning_images import kind_of as tuned_kind
from probes.tuning_loop import Data, Run
from probes.tuning_model import Tuned
from probes.tuning_ranks import Team, should_shard
from probes.tuning_recipe import AugmentRecipe, Precision, TuningRecipe
from probes.tuning_run import LinearStart
from probes.tuning_state import Checkpoints

PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")
PARITY_STEPS = 12  # of training in each precision
PARITY_ROWS = 256  # validation images that both score
LOSS_GAP = 0.02  # relative difference of the mean training loss that passes: about bfloat16's rounding, 2^-8, times 5
SCORE_GAP = 0.02  # mean absolute difference of probabilities that passes


def frozen_features(
    trainable: Trainable, split: Split, features: str, team: Team, *, batch: int, folder: Path, stop: Stop | None = None
) -> Float32[np.ndarray, "n D"]:
    """What the frozen network gives for a split's images, in their order, on every process.

    Args:
        trainable: a network that no method was applied to, or whose adapters add nothing yet.
        folder: of this network alone; it keeps what is computed, so that the same call goes on.

    Raises:
        Stopped: asked to end.
    """
    key = {"images": files.digest([split.images.manifest.digest, split.rows.tolist()]), "features": features}
    held = Activations(folder, key, len(split))
    trainable.eval()

    def compute(images: Float32[Tensor, "b 3 H W"]) -> Float32[Tensor, "b D"]:
        return trainable.features(images, features).float()

    fill_rows(held, split, compute, team, batch=batch, what="frozen features", stop=stop)
    return held.read(np.arange(len(split))).numpy()


def linear_start(
    task: Task,
    trainable: Trainable,
    features: str,
    team: Team,
    *,
    batch: int,
    class_weight: str,
    folder: Path,
    stop: Stop | None = None,
) -> tuple[LinearStart, dict[str, Any]]:
    """(the linear probe of the frozen features, what a record says of it): C chosen on validation, as `probes linear`.

    Source: Kumar et al. 2022 (LP-FT), arXiv 2202.10054.

    Raises:
        TaskError: a split without both classes of any label. Stopped: asked to end (see `frozen_features`).
    """
    parts = {split: split_images(task, split) for split in ("train", "val")}
    for split, held in parts.items():
        check_two_classes(task, split, held.y, held.mask)
    X = {
        split: frozen_features(trainable, held, features, team, batch=batch, folder=folder, stop=stop)
        for split, held in parts.items()
    }
    weight: Literal["none", "balanced", "positives"] = "none"
    if class_weight == "balanced":
        weight = "balanced" if task.kind == "multiclass" else "positives"
    head = logistic_head(LinearConfig(class_weight=weight), DEFAULT_C)
    head.fit(X["train"], parts["train"].y, parts["train"].mask, **kind_of(task))
    truth = task.truth("val")
    per_C = np.stack([pool_scores(task, "val", scores) for scores in probabilities_per_C(task, head, X["val"])])
    index, _, _ = choose_C(task, per_C, truth.y, truth.mask)
    # One number for a softmax, one per label else.
    columns = np.arange(head.coef_.shape[2])
    chosen = np.broadcast_to(index, columns.shape)
    coef, bias = head.coef_[chosen, :, columns], head.intercept_[chosen, columns]  # (L, D), (L,)
    if task.kind == "multiclass" and len(columns) == 1:  # two classes have one logit: half of it to either side
        coef, bias = np.concatenate([-coef, coef]) / 2, np.concatenate([-bias, bias]) / 2
    scores = pool_scores(task, "val", head.probabilities(X["val"], index))
    facts = {
        "C": [float(head.C_[number]) for number in np.unique(index)],
        "val_auroc": macro_quality(task, scores, truth),
        "images": len(parts["train"]) + len(parts["val"]),
    }
    return LinearStart(coef, bias, head.mean_, head.scale_), facts


def check_parity(
    task: Task,
    make: Callable[[Precision], Tuned],
    recipe: TuningRecipe,
    folder: Path,
    team: Team,
    *,
    shard: bool | None = None,
    stop: Stop | None = None,
) -> dict[str, Any]:
    """Train a few steps in float32 and in bfloat16 from the same start on the same images, and compare.

    Args:
        make: a model in the precision of that name, the same for both in everything else; called twice, and nothing is
            left of the first model then.
        folder: keeps what is done, so that the same call goes on; the caller removes it.
        shard: as `TuningOptions.shard`.

    Returns:
        Relative difference of the mean training loss, mean and largest difference of probabilities of validation.

    Raises:
        ConfigError: they differ by more than rounding may.
        Stopped: asked to end.
    """
    train, val = (split_images(task, split) for split in ("train", "val"))
    few = _first(train, PARITY_STEPS * recipe.batch)
    seen = _first(val, PARITY_ROWS)
    plain = AugmentRecipe()
    feeds: dict[str, Feed] = {"train": PixelFeed(few, team.device), "val": PixelFeed(seen, team.device)}
    data = Data(tuned_kind(task), few, seen, feeds, lambda _: 0.0, None, Augmenter(plain, task.labels, recipe.seed))
    found = []
    for precision in PRECISIONS:
        short = replace(
            recipe, epochs=1, precision=precision, patience=None, keep="loss", drop_last=False, augment=plain,
            optimisation=replace(recipe.optimisation, warmup=0.0, schedule="constant"),
        )  # fmt: skip
        found.append(_short_run(partial(make, precision), data, short, folder, team, shard=shard, stop=stop))
        free_memory(team)
    (loss, scores), (low_loss, low_scores) = found
    gap = abs(scores - low_scores)
    facts = {
        "steps": -(-len(few) // recipe.batch),
        "images": len(seen),
        "loss_float32": loss,
        "loss_bfloat16": low_loss,
        "loss_gap": abs(low_loss - loss) / max(abs(loss), 1e-12),
        "mean_score_gap": float(gap.mean()),
        "largest_score_gap": float(gap.max()),
    }
    if not (facts["loss_gap"] <= LOSS_GAP and facts["mean_score_gap"] <= SCORE_GAP):
        raise ConfigError(
            f"--compute-dtype bfloat16 departs from float32 within {facts['steps']} steps: the loss by "
            f"{100 * facts['loss_gap']:.1f} % (at most {100 * LOSS_GAP:g} % may be rounding), scores by "
            f"{facts['mean_score_gap']:.3f} on average (at most {SCORE_GAP:g}); leave it out, and train in float32"
        )
    return facts


def _short_run(
    make: Callable[[], Tuned],
    data: Data,
    recipe: TuningRecipe,
    folder: Path,
    team: Team,
    *,
    shard: bool | None,
    stop: Stop | None,
) -> tuple[float, Float64[np.ndarray, "n L"]]:
    """(mean training loss, probabilities of validation) of a short run, kept so that it is done once."""
    identity = {
        "recipe": recipe.identity(),
        "images": [[split.images.manifest.digest, split.rows.tolist()] for split in (data.train, data.val)],
    }
    place = folder / f"{recipe.precision}-{files.digest(identity)[:10]}"
    done = place / "scores.json"
    if not team.any([done.is_file()])[0]:
        model = make()
        cut = should_shard(shard, model.trainable, team.world)
        run = Run(model, data, recipe, team, Checkpoints(place, identity, writes=team.writes), stop, cut)
        loss = run.train().train_loss[0]
        scores = run.scores(data.val, data.feeds["val"])
        if team.writes:
            files.write_atomic(done, files.sealed({"loss": loss, "scores": scores.tolist()}))
            for path in place.glob("*.safetensors"):  # as large as the network
                path.unlink()
        team.wait()
    held = files.unseal(done.read_bytes(), done)
    team.wait()  # before it may be removed
    return held["loss"], np.array(held["scores"])


def _first(split: Split, count: int) -> Split:
    """Images of a split spread evenly over it, so that a table in order of classes gives all of them."""
    if count >= len(split):
        return split
    rows = np.linspace(0, len(split) - 1, count).round().astype(np.int64)
    return Split(split.images, split.rows[rows], tuple(split.ids[row] for row in rows), split.y[rows], split.mask[rows])
