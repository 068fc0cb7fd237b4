"""`probes linear --protocol`: a paper's grid of heads trained on train, one of them chosen on validation, test scored.

Validation scores are always those of heads that were trained on train alone, also where the choice is trained again on
train and val before the test.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor

from featstore.errors import IncompleteError, TaskError
from featstore.store.catalog import Store
from featstore.store.features import FeatureSet
from featstore.store.views import views_command, views_of
from probes.configs import LinearConfig
from probes.linear_protocols import PROTOCOLS, Protocol, deviations, head_columns, recipe_of
from probes.metrics import evaluate
from probes.selection import Both, Fitted, load
from probes.sgd import Heads, Held, Recipe, Targets, train_grid
from probes.tasks import Task
from probes.training import Watch

Part = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # X, y, mask, groups


def fit_protocol(task: Task, features: str, config: LinearConfig) -> Fitted:
    """Train and choose as `config.protocol` has it.

    Raises:
        TaskError: the task is of numbers or ranks; every head ran away. IncompleteError: fewer views are stored than
            asked for.
    """
    assert config.protocol is not None
    protocol = PROTOCOLS[config.protocol]
    if task.kind == "regression" or task.kind == "ordinal":
        raise TaskError(
            f"task {task.name!r} is of numbers or ranks, and --protocol {protocol.name} trains heads for labels and "
            "classes; leave --protocol out: ridge regression fits it"
        )
    run = Run.of(task, features, config, protocol)
    trained, steps = run.train()
    quality, scores = run.judge(trained)
    best = max(quality, key=lambda item: (quality[item], -item[0], -item[1]))
    if quality[best] == -np.inf:
        raise TaskError(
            f"task {task.name!r}: no head of protocol {protocol.name} has a finite validation score; lower --lr, or "
            "scale the features with --standardize"
        )
    chosen = _one(trained[best[0]], best[1])
    notes = [run.told(chosen, ("train",), steps)]
    tested = chosen
    if protocol.refit or config.refit:
        tested, more = run.again(chosen)
        notes.append("val is scored, and the head chosen, with train alone; tested after training it on train and val")
        notes.append(run.told(tested, ("train", "val"), more))
    num_rows, masked = int(_labelled(run.parts["train"][2]).sum()), int((~run.parts["train"][2]).sum())
    endless = run.recipe.sampling == "endless"
    passes = steps * run.recipe.batch / num_rows if endless else steps / run.recipe.steps(num_rows)[1]
    found = deviations(protocol, task, config, heads=run.columns, masked=masked, passes=passes)
    notes += [f"deviates from protocol {protocol.name}: {text}" for text in found] or [
        f"protocol {protocol.name} as published"
    ]
    choices = run.describe(quality, best) | {
        **({"epoch": int(chosen.epoch[0])} if chosen.epoch is not None else {}),
        "steps": steps,
        "optimizer": run.recipe.optimizer,
        "batch": run.recipe.batch,
        "views": config.views,
        "protocol_deviations": found,
    }
    if choices["diverged"]:
        notes.append(f"ran away, not chosen from: {', '.join(choices['diverged'])}")
    test = task.pool("test", run.scores(tested, run.parts["test"][0])[0])
    return Fitted(scores[best], test, choices, chosen.coef[0].numel() + chosen.intercept[0].numel(), tuple(notes))


@dataclass(frozen=True, slots=True)
class Scaler:
    """Mean and deviation of the training rows; none leaves features as they are."""

    mean: Float[np.ndarray, " D"] | None = None
    scale: Float[np.ndarray, " D"] | None = None

    @classmethod
    def of(cls, X: Float32[np.ndarray, "N D"]) -> "Scaler":
        """Of these rows; a constant column keeps its scale."""
        deviation = X.std(0, dtype=np.float64)
        return cls(X.mean(0, dtype=np.float64), np.where(deviation == 0, 1.0, deviation))

    def tensor(self, X: Float32[np.ndarray, "N D"]) -> Float32[Tensor, "N D"]:
        """The rows, scaled."""
        if self.mean is not None and self.scale is not None:
            X = ((X - self.mean) / self.scale).astype(np.float32)
        return torch.from_numpy(np.ascontiguousarray(X))


@dataclass(frozen=True, slots=True)
class Run:
    """One protocol on one task: what it trains on, and which heads.

    `columns` are what each head reads, by name; `rates` the learning rates before they are scaled by `factor`;
    `views` the rows of train and val as each augmented copy has them.
    """

    task: Task
    config: LinearConfig
    protocol: Protocol
    recipe: Recipe
    parts: dict[str, Part]
    columns: dict[str, slice]
    rates: tuple[float, ...]
    factor: float
    scaler: Scaler
    views: dict[str, list[np.ndarray]]

    @classmethod
    def of(cls, task: Task, features: str, config: LinearConfig, protocol: Protocol) -> "Run":
        """Read everything.

        Raises:
            TaskError: a split with nothing to fit or score. IncompleteError: too few views.
        """
        recipe = recipe_of(protocol, config)
        splits = ("train", "val") if protocol.refit or config.refit else ("train",)
        views = {} if config.views is None else read_views(task, features, config.views, protocol, splits)
        parts = load(task, features)
        X = parts["train"][0]
        return cls(
            task,
            config,
            protocol,
            recipe,
            parts,
            head_columns(protocol, task.features, features, X.shape[1]),
            config.rates or protocol.rates,
            recipe.batch / 256 if protocol.scaled else 1.0,
            Scaler.of(X[_labelled(parts["train"][2])]) if config.standardize else Scaler(),
            views,
        )

    def train(self) -> tuple[list[Heads], int]:
        """(the whole grid trained on train, steps)."""
        X, y, mask, _ = self.parts["train"]
        targets = make_targets(self.protocol, self.task, y, mask)
        held = None
        if self.protocol.keep_best:
            val, y_val, mask_val, _ = self.parts["val"]
            held_targets = make_targets(self.protocol, self.task, y_val, mask_val, positive=targets.positive)
            held = Held(self.scaler.tensor(val), held_targets)
        groups = [(part, tuple(rate * self.factor for rate in self.rates)) for part in self.columns.values()]
        used = _labelled(mask)
        rows, steps = self._seen(X, ("train",), used), self.recipe.steps(int(used.sum()))[0]
        watch = Watch(f"training {sum(len(rates) for _, rates in groups)} heads", 1, steps, "steps")
        heads = train_grid(
            rows, targets.rows(used), groups, self.recipe, held=held, advance=lambda count: watch.advance(0, count)
        )
        return heads, steps

    def again(self, chosen: Heads) -> tuple[Heads, int]:
        """(the chosen head trained anew on train and val, steps)."""
        X, y, mask = self._both()
        used = _labelled(mask)
        targets = make_targets(self.protocol, self.task, y, mask).rows(used)
        found = train_grid(
            self._seen(X, ("train", "val"), used), targets, [(chosen.columns, chosen.rates)], self.recipe
        )
        return found[0], self.recipe.steps(int(used.sum()))[0]

    def _both(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        both = Both.of(self.task, self.parts)
        return both.X, both.fitted.y, both.fitted.mask

    def _seen(self, X: np.ndarray, splits: tuple[str, ...], used: Bool[np.ndarray, " N"]) -> Float32[Tensor, "M D"]:
        """What is trained on: the rows, or those of every view one view after another."""
        if not self.views:
            return self.scaler.tensor(X[used])
        each = zip(*(self.views[split] for split in splits))
        return self.scaler.tensor(np.concatenate([np.concatenate(rows)[used] for rows in each]))

    def told(self, heads: Heads, splits: tuple[str, ...], steps: int) -> str:
        """A note on how the training of one head ended: its loss on the rows it was trained on."""
        X, y, mask = self.parts["train"][:3] if splits == ("train",) else self._both()
        used = _labelled(mask)
        targets = make_targets(self.protocol, self.task, y, mask).rows(used)
        loss = targets.loss(heads.logits(self.scaler.tensor(X[used])))[0]
        name = {"sgd": "SGD", "adamw": "AdamW"}[self.recipe.optimizer]
        where = " and ".join(splits)
        kept = "" if heads.epoch is None else f", weights of epoch {int(heads.epoch[0])} kept"
        return f"{steps} steps of {name} on {where}{kept}: loss {loss:.4g} there; no optimum was solved for"

    def scores(self, heads: Heads, X: Float32[np.ndarray, "N D"]) -> Float32[np.ndarray, "P N L"]:
        """Probabilities of every label or class by each head; NaN where one ran away."""
        logits = heads.logits(self.scaler.tensor(X))
        if self.task.kind == "multiclass" and logits.shape[2] > 1:
            return np.asarray(torch.softmax(logits, 2))
        positive = np.asarray(torch.sigmoid(logits))
        if self.task.kind == "multiclass":
            return np.concatenate([1 - positive, positive], axis=2)
        return positive

    @property
    def metric(self) -> str:
        """What the choice on validation maximises."""
        return self.protocol.classes_by if self.task.kind == "multiclass" else "auroc"

    def judge(self, trained: list[Heads]) -> tuple[dict[tuple[int, int], float], dict[tuple[int, int], np.ndarray]]:
        """(what each head reaches on validation, -inf where it ran away; its scores), by (group, head)."""
        truth = self.task.truth("val")
        kind: Any = self.task.kind
        quality, scores = {}, {}
        for group, heads in enumerate(trained):
            pooled = self.task.pool("val", self.scores(heads, self.parts["val"][0]))
            for head, finite in enumerate(heads.finite & np.isfinite(pooled).all((1, 2))):
                item = (group, head)
                scores[item], quality[item] = pooled[head], -np.inf
                if finite:
                    found = evaluate(truth.y, pooled[head], truth.mask, kind=kind, labels=self.task.labels)["macro"]
                    quality[item] = float(found["accuracy" if self.metric == "accuracy" else "auroc"])
        return quality, scores

    def describe(self, quality: dict[tuple[int, int], float], best: tuple[int, int]) -> dict[str, Any]:
        """The choice, for the record: `lr` as in the grid, `lr_scaled` as it was trained with."""
        names = list(self.columns)
        head, rate = names[best[0]], self.rates[best[1]]
        at_edge = len(self.rates) > 1 and best[1] in (0, len(self.rates) - 1)
        said = f"{self.protocol.name}: lr={rate:g}{'*' if at_edge else ''}"
        return {
            "protocol": self.protocol.name,
            "said": f"{said}, {head}" if len(names) > 1 else said,
            "head": head,
            "lr": rate,
            "lr_scaled": rate * self.factor,
            "at_edge": {"lr": at_edge},
            f"val_{self.metric}": {
                name: {f"{rate:g}": quality[group, number] for number, rate in enumerate(self.rates)}
                for group, name in enumerate(names)
            },
            "diverged": [
                f"{names[group]} lr={self.rates[number]:g}"
                for (group, number), value in quality.items()
                if value == -np.inf
            ],
        }


def make_targets(
    protocol: Protocol, task: Task, y: np.ndarray, mask: np.ndarray, *, positive: Float32[Tensor, " L"] | None = None
) -> Targets:
    """What heads are fitted to; classes as one label where there are two and the protocol has one logit for them.

    `positive` weighs positives in place of what the protocol makes of these rows.
    """
    if task.kind == "multiclass" and not (protocol.one_logit and len(task.labels) == 2):
        return Targets(torch.from_numpy(y.astype(np.int64)), len(task.labels))
    y, mask = (y, mask) if y.ndim == 2 else (y[:, None], mask[:, None])
    present = (y == 1) & mask
    if positive is None and protocol.positives:
        counts = present.sum(0)
        weights = np.where(counts > 0, (mask.sum(0) - counts) / np.maximum(counts, 1), 1.0)
        positive = torch.from_numpy(weights.astype(np.float32))
    valid = None if mask.all() else torch.from_numpy(mask)
    return Targets(torch.from_numpy(present.astype(np.float32)), y.shape[1], valid, positive)


def read_views(
    task: Task, features: str, count: int, protocol: Protocol, splits: tuple[str, ...]
) -> dict[str, list[np.ndarray]]:
    """The rows of some splits as the first `count` augmented copies of the set have them, in view order.

    Raises:
        TaskError: imported features, of which no views can be made.
        IncompleteError: too few are stored, or a copy lacks rows; the message says how to make them.
    """
    plain = task.features
    found = views_of(Store(plain.folder.parent.parent.parent), plain, protocol.augment)
    needs = plain.parts(features)
    if len(found) < count and plain.spec["weights"]["kind"] == "imported":
        raise TaskError(f"{plain.name} holds imported features, which have no augmented views; leave --views out")
    if len(found) < count:
        raise IncompleteError(
            f"{plain.name} has {len(found)} complete augmented views ({protocol.augment}) of {count} asked for; run\n"
            f"  {views_command(plain, count, protocol.augment, needs=needs)}"
        )
    result: dict[str, list[np.ndarray]] = {split: [] for split in splits}
    for view in found[:count]:
        values = view.load(features)
        for split in splits:
            result[split].append(_rows_of_view(task, split, view, values))
    return result


def _rows_of_view(task: Task, split: str, view: FeatureSet, values: np.ndarray) -> Float32[np.ndarray, "n D"]:
    index = task.index(split)
    failed = int((~view.ok[index]).sum())
    if failed:
        raise IncompleteError(
            f"{view.name}: {failed} {split} images failed that its plain set has; run its extraction again with "
            "--retry-failed, or leave --views out"
        )
    rows = task.units(split).mean(values[index]) if task.pools_features else values[index]
    return np.asarray(rows, dtype=np.float32)


def _labelled(mask: Bool[np.ndarray, "N ..."]) -> Bool[np.ndarray, " N"]:
    return np.asarray(mask.any(1) if mask.ndim == 2 else mask)


def _one(heads: Heads, number: int) -> Heads:
    """One head as a group of its own."""
    part = slice(number, number + 1)
    epoch = None if heads.epoch is None else heads.epoch[part]
    return Heads(heads.columns, heads.rates[part], heads.coef[part], heads.intercept[part], epoch)
