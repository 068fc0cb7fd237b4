"""Metrics of numbers and of ordered classes, per target and macro, with masks and patient-clustered intervals.

Values equal scikit-learn's `mean_absolute_error`, `root_mean_squared_error`, `r2_score` and `cohen_kappa_score` with
quadratic weights, and scipy's `pearsonr` and `spearmanr`; what is not defined is NaN and never guessed.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int, Integer, Real

from featstore.errors import TaskError
from probes.statistics import draw_counts, interval

NumberKind = Literal["regression", "ordinal"]
NUMBER_METRICS: dict[NumberKind, tuple[str, ...]] = {
    "regression": ("mae", "rmse", "r2", "pearson", "spearman"),
    "ordinal": ("mae", "qwk", "spearman"),
}
RESAMPLES_PER_PASS = 64


def check_numbers(
    y: Real[np.ndarray, "..."], scores: Float[np.ndarray, "..."], mask: Bool[np.ndarray, "..."] | None
) -> Bool[np.ndarray, "..."]:
    """The mask, all true where None, once shapes and values fit together.

    Raises:
        TaskError: shapes that differ, or a valid target or prediction that is not finite.
    """
    mask = np.ones(y.shape, dtype=bool) if mask is None else mask
    if not y.shape == scores.shape == mask.shape:
        raise TaskError(f"targets, predictions and mask have one shape; got {y.shape}, {scores.shape} and {mask.shape}")
    if not np.isfinite(y[mask]).all() or not np.isfinite(scores[mask]).all():
        raise TaskError("targets and predictions must be finite numbers; mask other rows out")
    return mask


def evaluate_numbers(
    y: Real[np.ndarray, "..."],
    scores: Float[np.ndarray, "..."],
    mask: Bool[np.ndarray, "..."] | None = None,
    *,
    kind: NumberKind,
    labels: Sequence[str],
    num_classes: int = 0,
) -> dict[str, Any]:
    """Predictions `scores` (N, T) of targets `y` (N, T) where `mask` (N, T) is true.

    `{"n", "macro": {metric}, "per_label": [{"label", "n", metric}], "skipped"}`.

    regression: MAE, RMSE, R2, Pearson r, Spearman rho. ordinal: `y` are ranks 0 to `num_classes` - 1; MAE in ranks,
    quadratic weighted kappa of predictions rounded to a rank (halves to the even one), Spearman rho. Macro values are
    means over the targets with two different values; the others are counted in `skipped`.

    Raises:
        TaskError: see `check_numbers`.
    """
    mask = check_numbers(y, scores, mask)
    once = np.ones((1, len(y)), np.uint8)
    names = NUMBER_METRICS[kind]
    per_label, defined = [], []
    for column, label in enumerate(labels):
        rows = np.flatnonzero(mask[:, column])
        values = _column(y[rows, column], scores[rows, column], rows, once, kind, num_classes)
        per_label.append({"label": label, "n": len(rows), **{name: float(values[name][0]) for name in names}})
        defined.append(len(np.unique(y[rows, column])) > 1)
    chosen = [entry for entry, keep in zip(per_label, defined) if keep]
    macro = {name: float(np.mean([entry[name] for entry in chosen])) if chosen else float("nan") for name in names}
    return {"n": int(mask.any(1).sum()), "macro": macro, "per_label": per_label, "skipped": defined.count(False)}


def bootstrap_numbers(
    y: Real[np.ndarray, "..."],
    scores: Float[np.ndarray, "..."],
    mask: Bool[np.ndarray, "..."] | None = None,
    groups: np.ndarray | None = None,
    *,
    kind: NumberKind,
    labels: Sequence[str],
    num_classes: int = 0,
    num_resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Any]:
    """Percentile intervals of all metrics from resampled groups, in the form of `probes.statistics.bootstrap`.

    Raises:
        TaskError: see `check_numbers`. ConfigError: no resample, or a level outside (0, 1).
    """
    mask = check_numbers(y, scores, mask)
    groups = np.arange(len(y)) if groups is None else groups
    used = np.flatnonzero(mask.any(1))
    ids, index = np.unique(groups[used], return_inverse=True)
    counts = draw_counts(ids, num_resamples=num_resamples, seed=seed)
    number = np.zeros(len(y), np.int64)
    number[used] = index
    names = NUMBER_METRICS[kind]
    per_label, macro = resample_numbers(y, scores, mask, number, counts, kind=kind, num_classes=num_classes)
    return {
        "level": level,
        "num_resamples": num_resamples,
        "num_groups": len(ids),
        "seed": seed,
        "macro": {name: interval(macro[name], level) for name in names},
        "per_label": [
            {"label": label, **{name: interval(per_label[name][:, column], level) for name in names}}
            for column, label in enumerate(labels)
        ],
    }


def resample_numbers(
    y: Real[np.ndarray, "N T"],
    scores: Float[np.ndarray, "N T"],
    mask: Bool[np.ndarray, "N T"],
    rows: Integer[np.ndarray, " N"],
    counts: Integer[np.ndarray, "B G"],
    *,
    kind: NumberKind,
    num_classes: int = 0,
) -> tuple[dict[str, Float[np.ndarray, "B T"]], dict[str, Float[np.ndarray, " B"]]]:
    """(per target, macro) of every metric on resamples, where row i is repeated `counts[:, rows[i]]` times.

    The macro is over the targets with two different values in the data; it is NaN in a resample that lacks one of them,
    so that no resample has another set of them.
    """
    found, defined = [], []
    for column in range(y.shape[1]):
        valid = np.flatnonzero(mask[:, column])
        found.append(_column(y[valid, column], scores[valid, column], rows[valid], counts, kind, num_classes))
        defined.append(len(np.unique(y[valid, column])) > 1)
    names = NUMBER_METRICS[kind]
    per_label = {name: np.stack([values[name] for values in found], axis=1) for name in names}
    if not any(defined):
        return per_label, {name: np.full(len(counts), np.nan) for name in names}
    return per_label, {name: values[:, np.array(defined)].mean(1) for name, values in per_label.items()}


def _column(
    y: Real[np.ndarray, " n"],
    scores: Float[np.ndarray, " n"],
    rows: Integer[np.ndarray, " n"],
    counts: Integer[np.ndarray, "B G"],
    kind: NumberKind,
    num_classes: int,
) -> dict[str, Float[np.ndarray, " B"]]:
    """Metrics of one target where row i is repeated `counts[:, rows[i]]` times."""
    y, scores = y.astype(np.float64), scores.astype(np.float64)
    blocks = [counts[start : start + RESAMPLES_PER_PASS] for start in range(0, len(counts), RESAMPLES_PER_PASS)]
    parts = [_weighted(y, scores, block[:, rows].astype(np.float64)) for block in blocks]
    result = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if kind == "ordinal":
        ranks = np.clip(np.rint(scores), 0, num_classes - 1).astype(np.int64)
        cells = y.astype(np.int64) * num_classes + ranks
        result["qwk"] = np.concatenate(
            [
                _kappa(np.stack([np.bincount(cells, w, num_classes**2) for w in block[:, rows]]), num_classes)
                for block in blocks
            ]
        )
    return result


def _weighted(
    y: Float[np.ndarray, " n"], scores: Float[np.ndarray, " n"], weights: Float[np.ndarray, "B n"]
) -> dict[str, Float[np.ndarray, " B"]]:
    total = weights.sum(1)
    error = y - scores
    y_ranks, y_varies = _ranks(y, weights)
    s_ranks, s_varies = _ranks(scores, weights)
    both = y_varies & s_varies
    with np.errstate(divide="ignore", invalid="ignore"):
        square = weights @ np.square(error)
        centred = y - ((weights @ y) / total)[:, None]
        spread = (weights * np.square(centred)).sum(1)
        return {
            "mae": weights @ np.abs(error) / total,
            "rmse": np.sqrt(square / total),
            "r2": np.where(y_varies, 1 - square / spread, np.nan),
            "pearson": np.where(both, _correlation(np.broadcast_to(y, weights.shape), scores, weights), np.nan),
            "spearman": np.where(both, _correlation(y_ranks, s_ranks, weights), np.nan),
        }


def _ranks(
    values: Float[np.ndarray, " n"], weights: Float[np.ndarray, "B n"]
) -> tuple[Float[np.ndarray, "B n"], Bool[np.ndarray, " B"]]:
    """(mean rank of every row among the repeated rows, whether two different values are there)."""
    distinct, number = np.unique(values, return_inverse=True)
    if not len(distinct):
        return weights, np.zeros(len(weights), dtype=bool)
    order = np.argsort(number, kind="stable")
    starts = np.searchsorted(number[order], np.arange(len(distinct)))
    totals = np.add.reduceat(weights[:, order], starts, axis=1)
    middle = np.cumsum(totals, axis=1) - totals + (totals + 1) / 2
    return middle[:, number], (totals > 0).sum(1) > 1


def _correlation(
    a: Float[np.ndarray, "B n"], b: Float[np.ndarray, "... n"], weights: Float[np.ndarray, "B n"]
) -> Float[np.ndarray, " B"]:
    total = weights.sum(1, keepdims=True)
    a = a - (weights * a).sum(1, keepdims=True) / total
    b = b - (weights * b).sum(1, keepdims=True) / total
    spread = (weights * a * a).sum(1) * (weights * b * b).sum(1)
    return np.asarray(np.clip((weights * a * b).sum(1) / np.sqrt(spread), -1, 1))


def _kappa(cells: Float[np.ndarray, "B C"], num_classes: int) -> Float[np.ndarray, " B"]:
    """Quadratic weighted kappa of confusion counts; NaN where one class is all there is."""
    table = cells.reshape(-1, num_classes, num_classes)
    classes: Int[np.ndarray, " K"] = np.arange(num_classes)
    penalty = np.square(classes[:, None] - classes).astype(np.float64)
    expected = table.sum(2)[:, :, None] * table.sum(1)[:, None, :]
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = (expected * penalty).sum((1, 2)) / table.sum((1, 2))
        kappa = 1 - (table * penalty).sum((1, 2)) / expected
    return np.where(expected > 0, kappa, np.nan)
