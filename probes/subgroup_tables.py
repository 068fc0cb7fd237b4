"""One record by subgroups: how many, how well it ranks and decides, with patient-clustered intervals."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from featstore.errors import ConfigError, TaskError
from featstore.objects import Place
from featstore.store.catalog import Store
from probes.compare import join, scored_of
from probes.draws import Draws
from probes.manifest_columns import parts
from probes.metrics import MetricName, decide
from probes.paired import FEW, Pair
from probes.regression import NUMBER_METRICS, check_numbers, resample_numbers
from probes.report import Table, with_interval
from probes.score_tables import open_scores
from probes.statistics import interval, resample_decisions
from probes.subgroups import AGE_BANDS
from probes.thresholds import Scored, Thresholds, fit_thresholds

RANKED: tuple[MetricName, ...] = ("auroc", "auprc")
DECIDED: tuple[MetricName, ...] = ("sensitivity", "specificity")
OF_CLASSES: tuple[MetricName, ...] = ("auroc", "auprc", "accuracy", "balanced_accuracy")
HEADINGS = {
    "auroc": "AUROC", "auprc": "AUPRC", "sensitivity": "sensitivity", "specificity": "specificity",
    "accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "mae": "MAE", "rmse": "RMSE", "r2": "R2",
    "pearson": "Pearson r", "spearman": "Spearman rho", "qwk": "weighted kappa",
}  # fmt: skip


def by_subgroup(
    name: str,
    columns: Sequence[str],
    *,
    store: Store,
    folder: Place,
    bands: Sequence[int] = AGE_BANDS,
    level: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Test metrics of one record (or file of scores) in every subgroup; plain values.

    `{"name", "record", "metrics", "level", "num_resamples", "seed", "thresholds", "notes", "subgroups": [{"column",
    "value", "n", "num_groups", "num_labels", "skipped", "macro": {metric: {"value", "low", "high", "skipped"}},
    "per_label": [{"label", "n", "positives", "patients", metric: {...}}], "few"}]}`. The first entry is all samples
    (`column` ""). Sensitivity and specificity are at Youden's threshold of each label on the validation rows; without
    these rows they are left out and a note says so. Labels with one class in a subgroup are NaN and counted as
    `skipped`. `folder` holds the records.

    Raises:
        UnknownNameError: no such record, file or column. TaskError: no truth, or a column of too many values.
        ConfigError: a level or number of resamples that cannot be.
    """
    if not columns:
        raise ConfigError("subgroups need a column to go by; give --by sex, age, view or a column of the manifest")
    table = open_scores(name, folder)
    pair, notes = join(table, table)
    thresholds, said = _thresholds(name, folder, pair)
    metrics = _metrics_of(pair, thresholds)
    found = [("", "all", np.ones(len(pair.ids), dtype=bool)), *parts((table,), pair.ids, columns, store, bands)]
    options: dict[str, Any] = {"num_resamples": num_resamples, "seed": seed}
    values = None if thresholds is None else thresholds.values
    entries = [
        {"column": column, "value": value, **_measured(pair.part(rows), values, metrics, level, options)}
        for column, value, rows in found
    ]
    return {
        "name": table.name + (" RANDOM WEIGHTS" if table.record and table.record["random_weights"] else ""),
        "record": None if table.record is None else table.record["id"],
        "metrics": list(metrics),
        "level": level,
        **options,
        "thresholds": None if values is None else dict(zip(pair.labels, values.tolist())),
        "notes": [*notes, *said],
        "subgroups": entries,
    }


def _metrics_of(pair: Pair, thresholds: Thresholds | None) -> tuple[str, ...]:
    if pair.kind == "regression" or pair.kind == "ordinal":
        return NUMBER_METRICS[pair.kind]
    if pair.kind == "multiclass":
        return OF_CLASSES
    return RANKED if thresholds is None else (*RANKED, *DECIDED)


def _thresholds(name: str, folder: Place, pair: Pair) -> tuple[Thresholds | None, list[str]]:
    """Youden's thresholds on the validation rows, or none and why."""
    if pair.kind != "multilabel":
        return None, []
    try:
        table = open_scores(name, folder, split="val")
        fitted = fit_thresholds(scored_of(table.rows(table.ids, pair.labels).of_labels()))
    except TaskError as error:
        return None, [f"no sensitivity and specificity: {error}"]
    fitted.check(Scored(pair.y, pair.a, pair.mask, pair.ids, tuple(map(str, pair.groups)), pair.labels))
    pooled = [label for label, borrowed in zip(fitted.labels, fitted.pooled) if borrowed]
    said = "sensitivity and specificity at Youden's threshold of the validation rows"
    return fitted, [said + (f"; {', '.join(pooled)}: one class there, median of the others" if pooled else "")]


def _measured(
    pair: Pair, thresholds: np.ndarray | None, metrics: Sequence[str], level: float, options: dict[str, Any]
) -> dict[str, Any]:
    """Values on the samples and intervals over resamples of the subgroup's own patients."""
    valid = np.asarray(pair.mask if pair.mask.ndim == 1 else pair.mask.any(1))
    draws = Draws.of(pair.groups[valid], **options)
    once = np.ones((1, len(draws.groups)), np.uint8)
    both = Draws(draws.groups, np.concatenate([once, draws.counts]), draws.seed)  # the samples themselves come first
    if pair.kind == "regression" or pair.kind == "ordinal":
        check_numbers(np.where(pair.mask, pair.y, 0.0), np.where(pair.mask, pair.a, 0.0), pair.mask)
        rows = both.columns(pair.groups, valid)
        per_label, macro = resample_numbers(
            pair.y, pair.a, pair.mask, rows, both.counts, kind=pair.kind, num_classes=pair.num_classes
        )
        labels, truth, mask = pair.labels, None, pair.mask
        tested = [len(np.unique(pair.y[known, column])) > 1 for column, known in enumerate(mask.T)]
    else:
        limit = 0.5 if thresholds is None else thresholds
        decisions = decide(pair.y, pair.a, pair.mask, kind=pair.kind, labels=pair.labels, threshold=limit)
        found = resample_decisions(decisions, pair.groups, both, metrics=metrics)  # type: ignore[arg-type]
        per_label, macro, labels = found.per_label, found.macro, decisions.labels
        truth, mask = decisions.y, decisions.valid
        tested = [0 < y[known].sum() < known.sum() for y, known in zip(truth.T, mask.T)]
    entries = []
    for column, label in enumerate(labels):
        known = mask[:, column]
        entry: dict[str, Any] = {"label": label, "n": int(known.sum())}
        if truth is not None:
            entry["positives"] = int(truth[known, column].sum())
        entry["patients"] = len(np.unique(pair.groups[known]))
        entries.append(entry | {name: _with(per_label[name][:, column], level) for name in metrics})
    return {
        "n": int(valid.sum()),
        "num_groups": len(draws.groups),
        "num_labels": sum(map(bool, tested)),
        "skipped": len(labels) - sum(map(bool, tested)),
        "macro": {name: _with(macro[name], level) for name in metrics},
        "per_label": entries,
        "few": _few(entries, len(draws.groups)),
    }


def _with(values: np.ndarray, level: float) -> dict[str, Any]:
    """The value of the samples, which comes first, and the interval of the resamples."""
    return {"value": float(values[0]), **interval(values[1:], level)}


def _few(entries: list[dict[str, Any]], num_groups: int) -> list[str]:
    """Why the intervals of a subgroup are not to be relied on."""
    found = [f"{num_groups} patients"] if num_groups < FEW else []
    for name in ("positives", "negatives"):
        counts = [
            (entry["positives"] if name == "positives" else entry["n"] - entry["positives"])
            for entry in entries
            if "positives" in entry
        ]
        low = sum(count < FEW for count in counts)
        if low:
            found.append(f"fewer than {FEW} {name} for {low} of {len(counts)} labels")
    return found


def tables(found: dict[str, Any]) -> list[Table]:
    """Macro, one row a subgroup, then the same of every label."""
    metrics = found["metrics"]
    percent = f"[{100 * found['level']:g}%]"
    headings = [f"{HEADINGS[name]} {percent}" for name in metrics]
    rows = [
        [
            entry["column"], entry["value"], str(entry["n"]), str(entry["num_groups"]), str(entry["num_labels"]),
            *(with_interval(entry["macro"][name]["value"], entry["macro"][name]) for name in metrics),
        ]
        for entry in found["subgroups"]
    ]  # fmt: skip
    made: list[Table] = [
        (f"{found['name']} · macro by subgroup (test)", ["column", "value", "n", "patients", "labels", *headings], rows)
    ]
    for number, label in enumerate(item["label"] for item in found["subgroups"][0]["per_label"]):
        cells = [(entry, entry["per_label"][number]) for entry in found["subgroups"]]
        counted = ["positives"] if "positives" in cells[0][1] else []
        body = [
            [
                entry["column"], entry["value"], str(item["n"]), *(str(item[name]) for name in counted),
                str(item["patients"]), *(with_interval(item[name]["value"], item[name]) for name in metrics),
            ]
            for entry, item in cells
        ]  # fmt: skip
        made.append((label, ["column", "value", "n", *counted, "patients", *headings], body))
    return made


def print_subgroups(found: dict[str, Any], show: Callable[..., None]) -> None:
    """Print everything through `show(title, columns, rows, right=...)`."""
    for table in tables(found):
        show(*table, right=("n", "positives", "patients", "labels"))
    lines = list(found["notes"])
    for entry in found["subgroups"]:
        where = f"{entry['column']} {entry['value']}".strip()
        if entry["skipped"]:
            lines.append(f"{where}: {entry['skipped']} labels have one class there; the macro leaves them out")
        if entry["few"]:
            lines.append(f"warning: {where}: {', '.join(entry['few'])}; intervals are unreliable")
    for line in lines:
        print(f"  {line}")
