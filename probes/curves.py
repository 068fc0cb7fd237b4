"""Few-shot curves: metrics of many heads at once, their mean and band over repeats, and the tables of them."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Integer

from probes.records import float_or_nan
from probes.report import DECIDES_NOTHING, baseline_key, rule_of, set_of, title_of, with_interval

Values = dict[str, Float[np.ndarray, "..."]]
Baselines = dict[tuple[Any, ...], list[dict[str, Any]]]
LABEL_METRICS = ("auroc", "auprc", "balanced_accuracy")
CLASS_METRICS = ("auroc", "auprc", "accuracy", "balanced_accuracy")
HEADINGS = {"auroc": "AUROC", "auprc": "AUPRC", "accuracy": "accuracy", "balanced_accuracy": "balanced accuracy"}
BAND = (2.5, 97.5)  # percentiles over repeats


def label_metrics(
    y: Bool[np.ndarray, " Q"], scores: Float[np.ndarray, "Q E"], *, threshold: float = 0.0
) -> dict[str, Float[np.ndarray, " E"]]:
    """AUROC, average precision and balanced accuracy of E heads on the same rows; NaN where one class is missing.

    Ties count one half; values equal `probes.metrics.evaluate`. A score at or above `threshold` is decided positive.
    """
    num_heads = scores.shape[1]
    high, low = np.sort(scores[y].T, axis=1), np.sort(scores[~y].T, axis=1)
    result = {name: np.full(num_heads, np.nan) for name in LABEL_METRICS}
    num_high, num_low = high.shape[1], low.shape[1]
    if not num_high or not num_low:
        return result
    for number in range(num_heads):
        below = np.searchsorted(low[number], high[number], "left")
        up_to = np.searchsorted(low[number], high[number], "right")
        hits = num_high - np.searchsorted(high[number], high[number], "left")
        result["auroc"][number] = (int(below.sum()) + int(up_to.sum())) / (2 * num_high * num_low)
        result["auprc"][number] = (hits / (hits + num_low - below)).mean()
    result["balanced_accuracy"] = ((high >= threshold).mean(1) + (low < threshold).mean(1)) / 2
    return result


def class_metrics(
    y: Integer[np.ndarray, " Q"], scores: Float[np.ndarray, "E Q K"]
) -> tuple[dict[str, Float[np.ndarray, "E L"]], dict[str, Float[np.ndarray, " E"]]]:
    """(per class against the rest, macro) of E heads; values equal `probes.metrics.evaluate`.

    Two classes give one column, that of class 1, ranked by the difference of its scores.
    """
    num_classes = scores.shape[2]
    columns = [scores[:, :, 1] - scores[:, :, 0]] if num_classes == 2 else list(np.moveaxis(scores, 2, 0))
    first = num_classes - len(columns)
    found = [label_metrics(y == first + number, column.T) for number, column in enumerate(columns)]
    per_class = {name: np.stack([item[name] for item in found], 1) for name in ("auroc", "auprc")}
    decided = scores.argmax(2)
    right = decided == y
    recalls = [right[:, y == number].mean(1) for number in range(num_classes) if (y == number).any()]
    defined = ~np.isnan(per_class["auroc"][0])
    macro = {name: _mean(values[:, defined]) for name, values in per_class.items()}
    macro["accuracy"], macro["balanced_accuracy"] = right.mean(1), np.mean(recalls, 0)
    return per_class, macro


def _mean(values: Float[np.ndarray, "... L"]) -> Float[np.ndarray, "..."]:
    return np.asarray(values.mean(-1)) if values.shape[-1] else np.full(values.shape[:-1], np.nan)


def band(values: Float[np.ndarray, " R"]) -> dict[str, float | None]:
    """Mean, standard deviation and 2.5 to 97.5 % of the repeats; one repeat has no band."""
    if np.isnan(values).all():
        return {"mean": None, "sd": None, "low": None, "high": None}
    if len(values) == 1:
        return {"mean": float(values[0]), "sd": None, "low": None, "high": None}
    low, high = np.percentile(values, BAND)
    return {"mean": float(values.mean()), "sd": float(values.std(ddof=1)), "low": float(low), "high": float(high)}


def common_labels(have: Bool[np.ndarray, "B L"]) -> Bool[np.ndarray, " L"]:
    """Of labels that have or lack budgets, those that have every budget that any label has."""
    return np.asarray(have[np.asarray(have.any(1))].all(0) & have.any(0))


def macro_over_common(per_label: Values) -> tuple[Values, Bool[np.ndarray, " L"]]:
    """(macro (B, R), which labels it is over) of values (B, R, L): labels that have every budget that any label has, so
    that all points of a curve are over the same labels. A budget that none has is NaN."""
    have = np.asarray(~np.isnan(per_label["auroc"]).any(1))  # (B, L)
    common = common_labels(have)
    return {name: _mean(values[..., common]) for name, values in per_label.items()}, common


def points(
    names: Sequence[dict[str, Any]], labels: Sequence[str], per_label: Values, macro: Values
) -> list[dict[str, Any]]:
    """The curve as a record keeps it: one entry a budget with bands of every metric, macro and per label."""
    made = []
    for number, facts in enumerate(names):
        entries = [
            {"label": label, **{name: band(values[number, :, column]) for name, values in per_label.items()}}
            for column, label in enumerate(labels)
        ]
        bands = {name: band(values[number]) for name, values in macro.items()}
        made.append({**facts, "macro": bands, "per_label": entries})
    return made


def repeats_table(names: Sequence[str], labels: Sequence[str], per_label: Values, macro: Values) -> dict[str, Any]:
    """Columns budget, repeat, label and metrics: one row for every head, its macro under the label ''."""
    every = sorted({*per_label, *macro})
    columns: dict[str, list[Any]] = {"budget": [], "repeat": [], "label": [], **{name: [] for name in every}}
    num_repeats = macro["auroc"].shape[1]
    for number, budget in enumerate(names):
        for column, label in enumerate(["", *labels]):
            columns["budget"] += [budget] * num_repeats
            columns["repeat"] += range(num_repeats)
            columns["label"] += [label] * num_repeats
            for name in every:
                source = macro.get(name) if column == 0 else per_label.get(name)
                if source is None:
                    columns[name] += [None] * num_repeats
                else:
                    columns[name] += (source[number] if column == 0 else source[number, :, column - 1]).tolist()
    return columns


def with_band(point: dict[str, Any] | None) -> str:
    """`0.812 [0.745, 0.866]`, the mean alone of one repeat, or a dash where there is none."""
    if point is None or float_or_nan(point["mean"]) != float_or_nan(point["mean"]):
        return "-"
    if point["low"] is None:
        return f"{point['mean']:.3f}"
    return f"{point['mean']:.3f} [{point['low']:.3f}, {point['high']:.3f}]"


def curve_key(record: dict[str, Any]) -> tuple[Any, ...]:
    """What must be equal for two curves to stand in one table; a larger label budget is another table."""
    task, head = record["task"], record["config"]["head"]
    return (
        record["dataset"],
        record["manifest"],
        task["digest"],
        task["unit"],
        task.get("pool"),
        (record["preprocess"] or {}).get("geometry"),
        record["label_budget"]["selection"],
        tuple(sorted((name, str(value)) for name, value in head.items())),
        record["seed"],
    )


def curve_tables(
    records: list[dict[str, Any]], baselines: Baselines | None = None
) -> list[tuple[list[tuple[str, list[str], list[list[str]]]], list[str]]]:
    """(tables, notes) of comparable curves: macro, one row a set and budget, then the labels of each curve.

    Baselines of the same task stand below the macro; they have all training rows and intervals of resampled patients.
    """
    groups: dict[tuple[Any, ...], dict[tuple[str, str], dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(curve_key(record), {})[record["fingerprint"], record["features"]] = record
    made = []
    for group in groups.values():
        members = list(group.values())
        names = [name for name in CLASS_METRICS if name in members[0]["curve"][0]["macro"]]
        rows = [
            [
                set_of(record) if number == 0 else "",
                record["features"] if number == 0 else "",
                point["name"],
                f"{point['mean_rows']:.4g}",
                *(with_band(point["macro"][name]) for name in names),
                str(len(point["skipped"])),
            ]
            for record in members
            for number, point in enumerate(record["curve"])
        ]
        for record in (baselines or {}).get(baseline_key(members[0]), []):
            shown = names[:2] if record["probe"] == DECIDES_NOTHING else names
            test = record["metrics"]["test"]
            bounds = test.get("intervals", {}).get("macro", {})
            values = [with_interval(test["macro"][name], bounds.get(name)) for name in shown]
            count = str(record["task"]["splits"]["train"])
            rows.append(
                [set_of(record), record["features"], "all", count, *values, *["-"] * (len(names) - len(shown)), "-"]
            )
        columns = ["set", "features", "budget", "rows", *(HEADINGS[name] for name in names), "skipped"]
        tables = [(f"{title_of(members[0])} · {describe(members[0])}", columns, rows)]
        for record in members:
            budgets = [point["name"] for point in record["curve"]]
            body = [
                [label, *(with_band(point["per_label"][number]["auroc"]) for point in record["curve"])]
                for number, label in enumerate(item["label"] for item in record["curve"][0]["per_label"])
            ]
            tables.append(
                (f"{set_of(record)} · {record['features']}, AUROC by label (test)", ["label", *budgets], body)
            )
        made.append((tables, notes_of_curves(members)))
    return made


def notes_of_curves(records: list[dict[str, Any]]) -> list[str]:
    """What a reader must know: what a shot is, what was drawn and chosen, which labels were too rare."""
    found: dict[str, None] = {}
    for record in records:
        found |= dict.fromkeys([*record["task"]["notes"], *record["notes"]])
        if not record["task"]["groups_known"]:
            found["groups: unknown; a patient may stand in two splits"] = None
        if record["num_failed"]:
            found[f"{record['set']}: {record['num_failed']} images failed and are left out"] = None
    opened = max(record["test_opened"] for record in records)
    found[f"this test split has been scored {opened} times in this store, under any task and policy"] = None
    return list(found)


def describe(record: dict[str, Any]) -> str:
    """Head and selection in a few words."""
    head, budget = record["config"]["head"], record["label_budget"]
    return f"{head['head']}, {record['choices']['scaling']}, {budget['selection']}"


def print_curves(records: list[dict[str, Any]], show: Callable[..., None], baselines: Baselines | None = None) -> None:
    """Print all curves through `show(title, columns, rows, right=..., rule=...)`."""
    for tables, notes in curve_tables(records, baselines):
        for table in tables:
            show(*table, right=("rows", "skipped"), rule=rule_of(table))
        for note in notes:
            print(f"  {note}")
