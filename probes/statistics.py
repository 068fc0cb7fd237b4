"""Percentile intervals from a bootstrap that resamples groups (patients), exact and paired.

One table of counts says how often each group was drawn; every label, metric and model uses the same table, so two
models on the same rows can be compared resample by resample.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Integer

from featstore.errors import ConfigError, TaskError
from probes.checks import Kind
from probes.draws import Draws, draw_counts
from probes.metrics import METRICS, Decisions, MetricName, decide
from probes.ranking import Ranking, area_under_pr, area_under_roc, fits_lanes, pack, resample_steps

__all__ = ["Draws", "Resamples", "bootstrap", "draw_counts", "interval", "resample", "resample_decisions"]

RANKING_METRICS = ("auroc", "auprc")


@dataclass(frozen=True)
class Resamples:
    """Metric values of every resample: NaN where a label has a single class in it (accuracy: no row).

    `draws` is the digest of the table of resamples: results with one digest are paired.
    """

    per_label: dict[str, Float[np.ndarray, "B L"]]
    macro: dict[str, Float[np.ndarray, " B"]]
    labels: tuple[str, ...]
    num_groups: int
    draws: str = ""


def resample(
    y: np.ndarray,
    scores: Float[np.ndarray, "N C"],
    mask: Bool[np.ndarray, "..."] | None = None,
    groups: np.ndarray | None = None,
    *,
    kind: Kind,
    num_resamples: int = 1000,
    seed: int = 0,
    labels: Sequence[str] | None = None,
    threshold: float | Float[np.ndarray, " C"] = 0.5,
    metrics: Sequence[MetricName] = METRICS,
) -> Resamples:
    """Metrics of `probes.metrics.evaluate` on resampled groups; equal to evaluating the repeated rows.

    Without `groups` every row is its own. Groups without a valid row are not drawn. Macro values are means over
    the labels that have both classes in the data; they are NaN in a resample that lacks one of these.

    Raises:
        TaskError: arrays that do not fit together. ConfigError: fewer than one resample, an unknown kind.
    """
    decisions = decide(y, scores, mask, kind=kind, labels=labels, threshold=threshold)
    groups = np.arange(len(y)) if groups is None else groups
    if len(groups) != len(y):
        raise TaskError(f"one group per row is needed: {len(y)} rows, {len(groups)} groups")
    draws = Draws.of(groups[decisions.valid.any(1)], num_resamples=num_resamples, seed=seed)
    return resample_decisions(decisions, groups, draws, metrics=metrics)


def resample_decisions(
    decisions: Decisions, groups: np.ndarray, draws: Draws, *, metrics: Sequence[MetricName] = METRICS
) -> Resamples:
    """The chosen metrics on the resamples of a given table, the same for every model on these rows.

    Raises:
        TaskError: a valid row's group is not in the table. ConfigError: an unknown metric.
    """
    unknown = [str(name) for name in metrics if name not in METRICS]
    if unknown or not metrics:
        raise ConfigError(f"unknown metric {(unknown or [''])[0]!r}; known: {', '.join(METRICS)}")
    rows = draws.columns(groups, np.asarray(decisions.valid.any(1)))
    per_label = _ranking_metrics(decisions, rows, draws.counts, [name for name in RANKING_METRICS if name in metrics])
    macro: dict[str, np.ndarray] = {}
    if set(metrics) <= set(RANKING_METRICS):
        defined = ~np.isnan(per_label[metrics[0]])
    else:
        decided, macro, defined = _decision_metrics(decisions, rows, draws.counts)
        per_label |= decided
    # One set of labels for all resamples, or the macro would jump whenever a rare label drops out.
    everywhere = np.array([0 < column.sum() < rows.sum() for column, rows in zip(decisions.y.T, decisions.valid.T)])
    for name in metrics:
        if name not in macro:
            means = _mean_where(per_label[name][:, everywhere], defined[:, everywhere])
            macro[name] = np.where(defined[:, everywhere].all(1), means, np.nan)
    chosen = [{str(name): found[name] for name in metrics} for found in (per_label, macro)]
    return Resamples(chosen[0], chosen[1], decisions.labels, len(draws.groups), draws.digest)


def _ranking_metrics(
    decisions: Decisions, rows: Integer[np.ndarray, " N"], counts: Integer[np.ndarray, "B G"], names: Sequence[str]
) -> dict[str, Float[np.ndarray, "B L"]]:
    shape = (len(counts), len(decisions.labels))
    found = {name: np.full(shape, np.nan) for name in names}
    measures = [{"auroc": area_under_roc, "auprc": area_under_pr}[name] for name in names]
    rankings: dict[int, Ranking] = {}
    used = []
    for column in range(shape[1]) if names else ():
        valid = np.flatnonzero(decisions.valid[:, column])
        ranking = Ranking.of(decisions.y[valid, column], decisions.scores[valid, column])
        if len(ranking.positives) and len(ranking.negatives):
            rankings[column] = ranking.renumbered(rows[valid])  # weights are looked up by group
            used.append(rows[valid])
    packable = fits_lanes(used, counts)
    for block in resample_steps(max(map(len, used), default=0), len(counts)) if rankings else ():
        weights = pack(counts[block]) if packable else counts[block]
        for column, ranking in rankings.items():
            at = ranking.packed_standing(weights) if packable else ranking.standing(weights)
            for name, measure in zip(names, measures):
                found[name][block, column] = measure(at)[: block.stop - block.start]
    return found


def _decision_metrics(
    decisions: Decisions, rows: Integer[np.ndarray, " N"], counts: Integer[np.ndarray, "B G"]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], Bool[np.ndarray, "B L"]]:
    """What follows from decisions, by the confusion counts of each group: one matrix product per block of resamples.

    (per label, macro of categorical labels, whether both classes are in a resample).
    """
    num_labels, num_groups = len(decisions.labels), counts.shape[1]
    y, decided, valid = decisions.y, decisions.decided, decisions.valid
    table = np.zeros((num_groups, 4, num_labels))
    for cell, members in enumerate((y & decided & valid, y & valid, ~y & ~decided & valid, ~y & valid)):
        for column in range(num_labels):
            table[:, cell, column] = np.bincount(rows[members[:, column]], minlength=num_groups)
    flat = table.reshape(num_groups, 4 * num_labels)
    blocks = [counts[start : start + 64].astype(np.float64) @ flat for start in range(0, len(counts), 64)]
    cells = np.concatenate(blocks).reshape(len(counts), 4, num_labels)
    with np.errstate(invalid="ignore"):
        hits, positives, rejected, negatives = (cells[:, cell] for cell in range(4))
        sensitivity, specificity = hits / positives, rejected / negatives
        defined = (positives > 0) & (negatives > 0)
        per_label = {
            "accuracy": (hits + rejected) / (positives + negatives),
            "balanced_accuracy": (sensitivity + specificity) / 2,
            "f1": np.where(defined, 2 * hits / (hits + positives + negatives - rejected), np.nan),
            "sensitivity": np.where(defined, sensitivity, np.nan),
            "specificity": np.where(defined, specificity, np.nan),
            "precision": np.where(defined, hits / np.maximum(hits + negatives - rejected, 1), np.nan),
        }
        if not decisions.argmax:
            return per_label, {}, defined
        if num_labels == 1:  # two classes: the specificity is the recall of class 0
            recall = np.hstack([sensitivity, specificity])
            both = _mean_where(recall, ~np.isnan(recall))
            return per_label, {"accuracy": per_label["accuracy"][:, 0], "balanced_accuracy": both}, defined
        overall = hits.sum(1) / positives.sum(1)
    recalled = _mean_where(sensitivity, ~np.isnan(sensitivity))
    return per_label, {"accuracy": overall, "balanced_accuracy": recalled}, defined


def _mean_where(values: Float[np.ndarray, "B L"], where: Bool[np.ndarray, "B L"]) -> Float[np.ndarray, " B"]:
    count = where.sum(1)
    total = np.where(where, values, 0.0).sum(1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def interval(values: Float[np.ndarray, " B"], level: float = 0.95) -> dict[str, float | int]:
    """Percentile interval of the resamples that are defined, and how many were `skipped`.

    Raises:
        ConfigError: a level outside (0, 1).
    """
    if not 0 < level < 1:
        raise ConfigError(f"level must lie between 0 and 1, got {level}")
    defined = values[~np.isnan(values)]
    tail = 50 * (1 - level)
    low, high = np.percentile(defined, [tail, 100 - tail]) if len(defined) else (np.nan, np.nan)
    return {"low": float(low), "high": float(high), "skipped": len(values) - len(defined)}


def bootstrap(
    y: np.ndarray,
    scores: Float[np.ndarray, "N C"],
    mask: Bool[np.ndarray, "..."] | None = None,
    groups: np.ndarray | None = None,
    *,
    kind: Kind,
    num_resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    labels: Sequence[str] | None = None,
    threshold: float | Float[np.ndarray, " C"] = 0.5,
) -> dict[str, Any]:
    """Percentile intervals of all metrics, macro and per label (in the order of `evaluate`), as plain values.

    `{"level", "num_resamples", "num_groups", "seed", "draws", "macro": {metric: {"low", "high", "skipped"}},
    "per_label": [{"label", metric: {...}}]}`; arguments and errors as in `resample` and `interval`.
    `draws` is the digest of the table of resamples.
    """
    values = resample(
        y, scores, mask, groups, kind=kind, num_resamples=num_resamples, seed=seed, labels=labels, threshold=threshold
    )
    return {
        "level": level,
        "num_resamples": num_resamples,
        "num_groups": values.num_groups,
        "seed": seed,
        "draws": values.draws,
        "macro": {name: interval(values.macro[name], level) for name in METRICS},
        "per_label": [
            {"label": label, **{name: interval(values.per_label[name][:, column], level) for name in METRICS}}
            for column, label in enumerate(values.labels)
        ],
    }
