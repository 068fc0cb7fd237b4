"""Tables from records alone. Records whose task, split, manifest, probe, geometry or protocol differ are never ranked
together; within a table validation ranks and test is shown."""

from collections.abc import Callable
from typing import Any

from probes.records import float_or_nan

Table = tuple[str, list[str], list[list[str]]]


def protocol_key(record: dict[str, Any]) -> tuple[Any, ...]:
    """What must be equal for two records to be ranked."""
    geometry = (record["preprocess"] or {}).get("geometry")
    evaluation = record["config"]["evaluation"]
    return (
        record["dataset"],
        record["probe"],
        record["task"]["name"],
        record["task"]["digest"],
        geometry,
        record["task"]["unit"],
        tuple(sorted(record["config"]["head"].items(), key=str)),
        evaluation["resamples"],
        evaluation["seed"],
    )


def with_interval(value: Any, interval: dict[str, Any] | None) -> str:
    """`0.981 [0.965, 0.993]`, or a dash where it is not defined."""
    number = float_or_nan(value)
    if number != number:
        return "-"
    if not interval or interval["low"] is None:
        return f"{number:.3f}"
    return f"{number:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


def describe_choice(record: dict[str, Any]) -> str:
    """The chosen k or C, with a mark where it stands at the edge of its grid."""
    choices = record["choices"]
    if record["probe"] == "knn":
        return f"k={choices['k']}" + ("*" if choices["at_edge"] else "")
    values = sorted(set(choices["C"].values()))
    text = f"C={values[0]:.2g}" if len(values) == 1 else f"C={values[0]:.2g}..{values[-1]:.2g}"
    return text + ("*" if any(choices["at_edge"].values()) else "")


def ranked(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Best validation AUROC first."""
    return sorted(records, key=lambda record: -_or(record["metrics"]["val"]["macro"]["auroc"], -1.0))


def _or(value: Any, default: float) -> float:
    number = float_or_nan(value)
    return default if number != number else number


def task_name(task: dict[str, Any]) -> str:
    """The task's name, short enough for a title."""
    columns = task["spec"]["labels"]
    if not task["name"].startswith("labels:"):
        return str(task["name"])
    return ", ".join(columns) if len(columns) <= 3 else f"{', '.join(columns[:2])} and {len(columns) - 2} more labels"


def macro_table(records: list[dict[str, Any]]) -> Table:
    """One row a record."""
    first = records[0]
    task = first["task"]
    known = task["groups_known"]
    counts = ", ".join(
        f"{split} {task['splits'][split]}" + (f" ({task['patients'][split]})" if known else "")
        for split in ("train", "val", "test")
    )
    unit = "images (patients)" if known else "images, patients unknown"
    title = f"{first['dataset']} · probes {first['probe']} · {task_name(task)} · {unit}: {counts}"
    if first["preprocess"]:
        title += f" · {first['preprocess']['geometry']}"
    columns = [
        "set",
        "features",
        "val AUROC",
        "test AUROC [95%]",
        "AUPRC",
        "accuracy",
        "balanced accuracy",
        "chosen",
        "failed",
    ]
    rows = []
    for record in ranked(records):
        test = record["metrics"]["test"]
        intervals = test.get("intervals", {}).get("macro", {})
        name = record["set"].split("/", 1)[1] + (" RANDOM WEIGHTS" if record["random_weights"] else "")
        rows.append(
            [
                name,
                record["features"],
                with_interval(record["metrics"]["val"]["macro"]["auroc"], None),
                *(
                    with_interval(test["macro"][metric], intervals.get(metric))
                    for metric in ("auroc", "auprc", "accuracy", "balanced_accuracy")
                ),
                describe_choice(record),
                str(record["num_failed"]),
            ]
        )
    return title, columns, rows


def label_table(record: dict[str, Any]) -> Table:
    """One row a label of one record."""
    test = record["metrics"]["test"]
    intervals = {item["label"]: item for item in test.get("intervals", {}).get("per_label", [])}
    rows = []
    for item in test["per_label"]:
        bounds = intervals.get(item["label"], {})
        metrics = [
            with_interval(item[name], bounds.get(name)) for name in ("auroc", "auprc", "accuracy", "balanced_accuracy")
        ]
        rows.append([item["label"], str(item["positives"]), str(item["n"]), *metrics])
    title = f"{record['set'].split('/', 1)[1]} · {record['features']}, by label (test)"
    return title, ["label", "positives", "n", "AUROC [95%]", "AUPRC", "accuracy", "balanced accuracy"], rows


def notes_of(records: list[dict[str, Any]]) -> list[str]:
    """What a reader of the table must know: roles of splits, masked labels, grid edges, skipped labels, use of test."""
    found: dict[str, None] = {}
    for record in records:
        for note in [*record["task"]["notes"], *record["notes"]]:
            found[note] = None
        skipped = record["metrics"]["test"]["skipped"]
        if skipped:
            found[f"{skipped} labels have one class in the test split and no AUROC; the macro leaves them out"] = None
        if record["num_failed"]:
            found[f"{record['set']}: {record['num_failed']} images failed and are left out"] = None
    if any(describe_choice(record).endswith("*") for record in records):
        found["* chosen at the edge of the grid: a wider grid could be better"] = None
    opened = max(record["test_opened"] for record in records)
    found[f"the test split of this task has been scored {opened} times in this store"] = None
    return list(found)


def tables(records: list[dict[str, Any]]) -> list[tuple[Table, Table, list[str]]]:
    """(macro table, labels of its best record, notes) for every group of comparable records."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(protocol_key(record), []).append(record)
    for key, group in groups.items():  # the same set and features evaluated again: the latest stands for all
        groups[key] = list({(record["fingerprint"], record["features"]): record for record in group}.values())
    return [(macro_table(group), label_table(ranked(group)[0]), notes_of(group)) for group in groups.values()]


def print_tables(records: list[dict[str, Any]], show: Callable[..., None]) -> None:
    """Print all tables through `show(title, columns, rows, right=...)`."""
    for macro, labels, notes in tables(records):
        show(*macro, right=("failed",))
        show(*labels, right=("positives", "n"))
        for note in notes:
            print(f"  {note}")
