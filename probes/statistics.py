"""Percentile intervals from a bootstrap that resamples groups (patients), exact and paired.

One table of counts says how often each group was drawn; every label, metric and model uses the same table, so two
models on the same rows can be compared resample by resample.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Integer, UInt8

from featstore.errors import ConfigError, TaskError
from probes.checks import Kind
from probes.metrics import METRICS, Decisions, decide
from probes.ranking import Ranking

# Resamples per pass: 8 running sums over 20,000 rows stay in a core's cache.
RESAMPLES_PER_PASS = 8


def draw_counts(groups: np.ndarray, *, num_resamples: int = 1000, seed: int = 0) -> UInt8[np.ndarray, "B G"]:
    """How often each group (in sorted order of its id) stands in each resample of all groups with replacement.

    The first resamples of a longer table equal a shorter one of the same seed.

    Raises:
        ConfigError: fewer than one resample.
    """
    if num_resamples < 1:
        raise ConfigError(f"num_resamples must be at least 1, got {num_resamples}")
    num_groups = len(np.unique(groups))
    generator = np.random.default_rng(seed)
    # A byte is enough: a group is drawn about once, and more than 255 times with probability below 1e-500.
    counts = np.zeros((num_resamples, num_groups), np.uint8)
    for row in counts if num_groups else ():
        row[:] = np.bincount(generator.integers(0, num_groups, num_groups), minlength=num_groups)
    return counts


@dataclass(frozen=True)
class Resamples:
    """Metric values of every resample: NaN where a label has a single class in it (accuracy: no row)."""

    per_label: dict[str, Float[np.ndarray, "B L"]]
    macro: dict[str, Float[np.ndarray, " B"]]
    labels: tuple[str, ...]
    num_groups: int


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
) -> Resamples:
    """All metrics of `probes.metrics.evaluate` on resampled groups; equal to evaluating the repeated rows.

    Without `groups` every row is its own. Groups without a valid row are not drawn. Macro values are means over
    the labels that have both classes in the data; they are NaN in a resample that lacks one of these.

    Raises:
        TaskError: arrays that do not fit together. ConfigError: fewer than one resample, an unknown kind.
    """
    decisions = decide(y, scores, mask, kind=kind, labels=labels, threshold=threshold)
    groups = np.arange(len(y)) if groups is None else groups
    if len(groups) != len(y):
        raise TaskError(f"one group per row is needed: {len(y)} rows, {len(groups)} groups")
    used = decisions.valid.any(1)
    ids, index = np.unique(groups[used], return_inverse=True)
    counts = draw_counts(ids, num_resamples=num_resamples, seed=seed)
    rows = np.zeros(len(y), np.int64)
    rows[used] = index
    per_label, macro = _decision_metrics(decisions, rows, counts)
    auroc, auprc = _ranking_metrics(decisions, rows, counts)
    per_label |= {"auroc": auroc, "auprc": auprc}
    defined = ~np.isnan(auroc)
    # One set of labels for all resamples, or the macro would jump whenever a rare label drops out.
    everywhere = np.array([0 < column.sum() < rows.sum() for column, rows in zip(decisions.y.T, decisions.valid.T)])
    for name in METRICS:
        if name not in macro:
            means = _mean_where(per_label[name][:, everywhere], defined[:, everywhere])
            macro[name] = np.where(defined[:, everywhere].all(1), means, np.nan)
    return Resamples(per_label, macro, decisions.labels, len(ids))


def _ranking_metrics(
    decisions: Decisions, rows: Integer[np.ndarray, " N"], counts: Integer[np.ndarray, "B G"]
) -> tuple[Float[np.ndarray, "B L"], Float[np.ndarray, "B L"]]:
    shape = (len(counts), len(decisions.labels))
    auroc, auprc = np.full(shape, np.nan), np.full(shape, np.nan)
    for column in range(shape[1]):
        valid = np.flatnonzero(decisions.valid[:, column])
        ranking = Ranking.of(decisions.y[valid, column], decisions.scores[valid, column])
        if len(ranking.positives) and len(ranking.negatives):
            ranking = ranking.renumbered(rows[valid])  # weights are looked up by group
            for start in range(0, len(counts), RESAMPLES_PER_PASS):
                block = slice(start, start + RESAMPLES_PER_PASS)
                auroc[block, column], auprc[block, column] = ranking.weighted(counts[block])
    return auroc, auprc


def _decision_metrics(
    decisions: Decisions, rows: Integer[np.ndarray, " N"], counts: Integer[np.ndarray, "B G"]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Accuracy and balanced accuracy from the confusion counts of each group: one matrix product per block."""
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
        sensitivity, specificity = cells[:, 0] / cells[:, 1], cells[:, 2] / cells[:, 3]
        per_label = {
            "accuracy": (cells[:, 0] + cells[:, 2]) / (cells[:, 1] + cells[:, 3]),
            "balanced_accuracy": (sensitivity + specificity) / 2,
        }
        if not decisions.argmax:
            return per_label, {}
        if num_labels == 1:  # two classes: the specificity is the recall of class 0
            recall = np.hstack([sensitivity, specificity])
            return per_label, {
                "accuracy": per_label["accuracy"][:, 0],
                "balanced_accuracy": _mean_where(recall, ~np.isnan(recall)),
            }
        overall = cells[:, 0].sum(1) / cells[:, 1].sum(1)
    return per_label, {"accuracy": overall, "balanced_accuracy": _mean_where(sensitivity, ~np.isnan(sensitivity))}


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

    `{"level", "num_resamples", "num_groups", "seed", "macro": {metric: {"low", "high", "skipped"}},
    "per_label": [{"label", metric: {...}}]}`; arguments and errors as in `resample` and `interval`.
    """
    values = resample(
        y, scores, mask, groups, kind=kind, num_resamples=num_resamples, seed=seed, labels=labels, threshold=threshold
    )
    return {
        "level": level,
        "num_resamples": num_resamples,
        "num_groups": values.num_groups,
        "seed": seed,
        "macro": {name: interval(values.macro[name], level) for name in METRICS},
        "per_label": [
            {"label": label, **{name: interval(values.per_label[name][:, column], level) for name in METRICS}}
            for column, label in enumerate(values.labels)
        ],
    }
