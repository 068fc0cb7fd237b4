"""Tables from records alone. Records whose task, split, manifest, probe, geometry or protocol differ are never ranked
together; within a table validation ranks and test is shown. Baselines of the same task and split stand below the others
and are never ranked with them."""

from collections.abc import Callable, Sequence
from typing import Any

from probes.costs import COSTS_LINE
from probes.policies import POLICIES
from probes.records import float_or_nan
from probes.units import PLURALS

Table = tuple[str, list[str], list[list[str]]]
FINETUNE = "finetune"
BASELINE = "baseline:"  # with which the probe of a baseline begins
NESTED = "[95%] + training"  # heading of intervals that hold the chance of the training patients too
DECIDES_NOTHING = f"{BASELINE}chance"  # one score for all: whatever it seems to decide is an accident of the threshold
# Metrics of a table by kind of task: (name in the record, heading); the first one ranks, by validation.
CLASSES = (
    ("auroc", "AUROC"), ("auprc", "AUPRC"), ("accuracy", "accuracy"), ("balanced_accuracy", "balanced accuracy"),
)  # fmt: skip
COLUMNS = {
    "multilabel": CLASSES,
    "multiclass": CLASSES,
    "regression": (
        ("r2", "R2"), ("mae", "MAE"), ("rmse", "RMSE"), ("pearson", "Pearson r"), ("spearman", "Spearman rho"),
    ),
    "ordinal": (("qwk", "weighted kappa"), ("mae", "MAE in ranks"), ("spearman", "Spearman rho")),
}  # fmt: skip


def metrics_of(record: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """(name, heading) of the metrics that a record's kind of task has."""
    return COLUMNS[record["task"]["kind"]]


def protocol_key(record: dict[str, Any]) -> tuple[Any, ...]:
    """What must be equal for two records to be ranked."""
    geometry = (record["preprocess"] or {}).get("geometry")
    evaluation = record["config"]["evaluation"]
    return (
        record["dataset"],
        record["test"]["dataset"] if "test" in record else "",
        record["probe"],
        record["task"]["name"],
        record["task"]["digest"],
        record["task"]["kind"],
        geometry,
        record["task"]["unit"],
        record["task"].get("pool"),
        tuple(record["task"].get("not_fitted", ())),  # whose macro is over other labels
        # An option that was not given stands for its default, also in records from before there was one.
        tuple(sorted((item for item in record["config"]["head"].items() if _counts(*item)), key=str)),
        evaluation["resamples"],
        evaluation["seed"],
    )


def is_baseline(record: dict[str, Any]) -> bool:
    """Whether a record is of a constant or of metadata, and not of embeddings."""
    return str(record["probe"]).startswith(BASELINE)


def baseline_key(record: dict[str, Any]) -> tuple[Any, ...]:
    """What a baseline must have in common with the records that it is shown with: what is counted, and where."""
    task = record["task"]
    tested = record["test"]["dataset"] if "test" in record else ""
    left_out = tuple(task.get("not_fitted", ()))
    return record["dataset"], tested, task["digest"], task["kind"], task["unit"], task.get("pool"), left_out


def _counts(option: str, value: Any) -> bool:
    """Whether an option of a head can change its numbers, and was given."""
    return value is not None and option not in ("backend", "device")


def with_interval(value: Any, interval: dict[str, Any] | None) -> str:
    """`0.981 [0.965, 0.993]`, or a dash where it is not defined."""
    number = float_or_nan(value)
    if number != number:
        return "-"
    if not interval or interval["low"] is None:
        return f"{number:.3f}"
    return f"{number:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


def interval_alone(interval: dict[str, Any] | None) -> str:
    """`[0.965, 0.993]`, or a dash where there is none."""
    if not interval or interval["low"] is None:
        return "-"
    return f"[{interval['low']:.3f}, {interval['high']:.3f}]"


def nested_of(record: dict[str, Any]) -> dict[str, Any]:
    """The intervals over heads that were fitted again on resampled training patients (`--train-resamples`); or none."""
    return dict(record["metrics"]["test"].get("intervals_nested", {}))


def describe_choice(record: dict[str, Any]) -> str:
    """The chosen k, C or alpha, with a mark where it stands at the edge of its grid; else what the probe says."""
    choices = record["choices"]
    if "said" in choices:
        return str(choices["said"])
    if record["probe"] == "knn":
        return f"k={choices['k']}" + ("*" if choices["at_edge"] else "")
    name = next((known for known in ("alpha", "C") if isinstance(choices.get(known), dict)), None)
    if name is None:
        return "-"
    values = sorted(set(choices[name].values()))
    text = f"{name}={values[0]:.2g}" if len(values) == 1 else f"{name}={values[0]:.2g}..{values[-1]:.2g}"
    return text + ("*" if any(choices["at_edge"].values()) else "")


def ranked(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Best on validation first: by AUROC, R2 or weighted kappa."""
    return sorted(records, key=lambda record: -_or(record["metrics"]["val"]["macro"][metrics_of(record)[0][0]], -1e300))


def _or(value: Any, default: float) -> float:
    number = float_or_nan(value)
    return default if number != number else number


def task_name(task: dict[str, Any]) -> str:
    """The task's name, short enough for a title."""
    columns = task["spec"]["labels"]
    if not task["name"].startswith("labels:"):
        return str(task["name"])
    return ", ".join(columns) if len(columns) <= 3 else f"{', '.join(columns[:2])} and {len(columns) - 2} more labels"


def title_of(record: dict[str, Any]) -> str:
    """Data set, probe, task, what is counted and how many, geometry."""
    task = record["task"]
    known, unit = task["groups_known"], task["unit"]
    counts = ", ".join(
        f"{split} {task['splits'][split]}" + (f" ({task['patients'][split]})" if known and unit != "patient" else "")
        for split in ("train", "val", "test")
    )
    what = PLURALS[unit] + ("" if unit == "patient" else " (patients)" if known else ", patients unknown")
    if record["probe"] == "mil":
        what += f", bags ({record['choices']['pooling']})"
    elif unit != "image":
        what += f", {'features averaged' if task['pool'] == 'features' else task['pool'] + ' of scores'}"
    dataset = record["dataset"] + (f" -> {record['test']['dataset']}" if "test" in record else "")
    vote = f" ({record['choices']['vote']})" if "vote" in record["choices"] else ""
    title = f"{dataset} · probes {record['probe']}{vote} · {task_name(task)} · {what}: {counts}"
    return title + (f" · {record['preprocess']['geometry']}" if record["preprocess"] else "")


def set_of(record: dict[str, Any]) -> str:
    """The set without its data set; random weights and baselines are said."""
    if is_baseline(record):
        return f"{BASELINE} {record['probe'].removeprefix(BASELINE)}"
    return str(record["set"].split("/", 1)[1]) + (" RANDOM WEIGHTS" if record["random_weights"] else "")


def macro_table(records: list[dict[str, Any]], baselines: Sequence[dict[str, Any]] = ()) -> Table:
    """One row a record, best on validation first, then one a baseline."""
    anyone = [*records, *baselines][0]
    metrics = metrics_of(anyone)
    first = metrics[0][1]
    resampled = any(nested_of(record) for record in records)
    columns = ["set", "features", f"val {first}", f"test {first} [95%]", *([NESTED] if resampled else [])]
    columns += [heading for _, heading in metrics[1:]]
    rows = []
    for record in [*ranked(records), *baselines]:
        test = record["metrics"]["test"]
        intervals = test.get("intervals", {}).get("macro", {})
        shown = metrics[:2] if record["probe"] == DECIDES_NOTHING and metrics is CLASSES else metrics
        values = [with_interval(test["macro"][name], intervals.get(name)) for name, _ in shown]
        nested = [interval_alone(nested_of(record).get("macro", {}).get(metrics[0][0]))] if resampled else []
        rows.append(
            [
                set_of(record),
                record["features"],
                with_interval(record["metrics"]["val"]["macro"][metrics[0][0]], None),
                *[values[0], *nested, *values[1:]],
                *("-" for _ in metrics[len(shown) :]),
                describe_choice(record),
                str(record["num_failed"]),
            ]
        )
    return title_of(anyone), [*columns, "chosen", "failed"], rows


def label_table(record: dict[str, Any]) -> Table:
    """One row a label, class or target of one record."""
    test, metrics = record["metrics"]["test"], metrics_of(record)
    intervals = {item["label"]: item for item in test.get("intervals", {}).get("per_label", [])}
    nested = {item["label"]: item for item in nested_of(record).get("per_label", [])}
    counts = ("positives", "n") if metrics is CLASSES else ("n",)
    rows = []
    for item in test["per_label"]:
        bounds = intervals.get(item["label"], {})
        values = [with_interval(item[name], bounds.get(name)) for name, _ in metrics]
        if nested:
            values.insert(1, interval_alone(nested.get(item["label"], {}).get(metrics[0][0])))
        rows.append([item["label"], *(str(item[name]) for name in counts), *values])
    title = f"{record['set'].split('/', 1)[1]} · {record['features']}, by label (test)"
    first = [f"{metrics[0][1]} [95%]", *([NESTED] if nested else [])]
    return title, ["label", *counts, *first, *(heading for _, heading in metrics[1:])], rows


def sensitivity_table(records: list[dict[str, Any]]) -> Table:
    """One row a training policy: macro AUROC on the same test rows, and its paired difference to the task's own."""
    rows = []
    resampled = any(nested_of(record) for record in records)
    for record in records:
        entry, test = record["sensitivity"], record["metrics"]["test"]
        own = entry["policy"] == entry["reference"]
        auroc = with_interval(test["macro"]["auroc"], test.get("intervals", {}).get("macro", {}).get("auroc"))
        difference = "-" if own else with_interval(entry["difference"]["auroc"], entry["difference"])
        rows.append(
            [
                entry["policy"] + (" (the task's own)" if own else ""),
                str(record["task"]["splits"]["train"]),
                with_interval(record["metrics"]["val"]["macro"]["auroc"], None),
                auroc,
                *([interval_alone(nested_of(record).get("macro", {}).get("auroc"))] if resampled else []),
                difference,
                describe_choice(record),
            ]
        )
    first = records[0]
    title = f"training policies · {title_of(first)} · {set_of(first)} · {first['features']}"
    aurocs = ["val AUROC", "test AUROC [95%]", *([NESTED] if resampled else [])]
    return title, ["policy", "train", *aurocs, "difference [95%]", "chosen"], rows


def sensitivity_tables(records: list[dict[str, Any]]) -> list[tuple[Table, list[str]]]:
    """(table, notes) for every set and feature whose records compare training policies; the latest of each counts."""
    groups: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for record in records:
        key = protocol_key(record)
        entry = record["sensitivity"]
        # The task's digest differs by policy; that of the task's own stands for all.
        key = (*key[:4], entry["reference_task"], *key[5:], record["fingerprint"], record["features"])
        groups.setdefault(key, {})[entry["policy"]] = record
    made = []
    for group in groups.values():
        reference = next(iter(group.values()))["sensitivity"]["reference"]
        order = [reference, *(name for name in POLICIES if name != reference)]
        members = [group[name] for name in order if name in group]
        made.append((sensitivity_table(members), notes_of(members)))
    return made


def notes_of(records: list[dict[str, Any]]) -> list[str]:
    """What a reader of the table must know: roles of splits, masked labels, grid edges, skipped labels, use of test."""
    found: dict[str, None] = {}
    for record in records:
        for note in [*record["task"]["notes"], *record["notes"]]:
            found[note] = None
        skipped = record["metrics"]["test"]["skipped"] - len(record["task"].get("not_fitted", ()))
        if skipped > 0 and metrics_of(record) is CLASSES:
            found[f"{skipped} labels have one class in the test split and no AUROC; the macro leaves them out"] = None
        elif skipped:
            found[f"{skipped} targets have one value in the test split; the macro leaves them out"] = None
        if not record["task"]["groups_known"]:
            found["groups: unknown; a patient may stand in two splits, and intervals take every sample for its own"] = (
                None
            )
        if record["num_failed"]:
            found[f"{record['set']}: {record['num_failed']} images failed and are left out"] = None
    counts = sorted({nested_of(record)["train_resamples"] for record in records if nested_of(record)})
    if counts:
        found[
            f"{NESTED}: of the same, over heads fitted again on {' or '.join(map(str, counts))} resamples of the "
            "training patients with the strength that was chosen, each scored on test resamples of its own; the record "
            "has it of every metric"
        ] = None
    if any(describe_choice(record).endswith("*") for record in records):
        found["* chosen at the edge of the grid: a wider grid could be better"] = None
    opened = max(record["test_opened"] for record in records)
    found[f"this test split has been scored {opened} times in this store, under any task and policy"] = None
    return list(found)


def tables(records: list[dict[str, Any]]) -> list[tuple[Table, Table, list[str]]]:
    """(macro table, labels of its best record, notes) for every group of comparable records.

    Records of a comparison of training policies, curves over shots, and fine-tuned networks have tables of their own;
    folds are shown by the record over all of them.
    """
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    baselines = baselines_of(records)
    for record in records:
        own_table = is_baseline(record) or record["probe"] == FINETUNE
        if not {"sensitivity", "curve", "fold"} & record.keys() and not own_table:
            groups.setdefault(protocol_key(record), []).append(record)
    for key, group in groups.items():  # the same set and features evaluated again: the latest stands for all
        groups[key] = list({(record["fingerprint"], record["features"]): record for record in group}.values())
    made = []
    for group in groups.values():
        below = baselines.get(baseline_key(group[0]), [])
        made.append((macro_table(group, below), label_table(ranked(group)[0]), notes_of([*group, *below])))
    return made


def baselines_of(records: list[dict[str, Any]]) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Baselines by what they may be shown with: the latest of each, from the weakest."""
    found: dict[tuple[Any, ...], dict[tuple[str, str], dict[str, Any]]] = {}
    for record in records:
        if is_baseline(record):
            found.setdefault(baseline_key(record), {})[record["fingerprint"], record["features"]] = record
    return {key: sorted(group.values(), key=lambda record: record["probe"]) for key, group in found.items()}


def with_baselines(records: list[dict[str, Any]], kept: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records and those baselines among the kept ones that belong in their tables (`probes all` makes them)."""
    keys = {baseline_key(record) for record in records}
    return [*records, *(record for record in kept if is_baseline(record) and baseline_key(record) in keys)]


def lone_baselines(records: list[dict[str, Any]]) -> list[Table]:
    """Tables of baselines whose task no other record has."""
    others = {baseline_key(record) for record in records if not is_baseline(record) and record["probe"] != FINETUNE}
    groups = [group for key, group in baselines_of(records).items() if key not in others]
    return [macro_table([], group) for group in groups]


def rule_of(table: Table) -> int | None:
    """Row that a line stands above: the first baseline."""
    return next((number for number, row in enumerate(table[2]) if row[0].startswith(BASELINE)), None)


def print_tables(records: list[dict[str, Any]], show: Callable[..., None]) -> None:
    """Print all tables through `show(title, columns, rows, right=...)`."""
    for macro, labels, notes in tables(records):
        show(*macro, right=("failed",), rule=rule_of(macro))
        show(*labels, right=("positives", "n"))
        for note in notes:
            print(f"  {note}")
    for table, notes in sensitivity_tables([record for record in records if "sensitivity" in record]):
        show(*table, right=("train",))
        for note in notes:
            print(f"  {note}")
    if any(record["probe"] == FINETUNE for record in records):
        _print_arms(records, show)
    for table in lone_baselines(records):
        show(*table, right=("failed",))
    curves = [record for record in records if "curve" in record]
    if curves:
        from probes.curves import print_curves  # which takes titles from here

        print_curves(curves, show, baselines_of(records))


def _print_arms(records: list[dict[str, Any]], show: Callable[..., None]) -> None:
    """Print fine-tuned networks beside the frozen probes of the same task, one table a task."""
    # These take titles from here.
    from probes.finetune_table import COST_COLUMNS, arm_table, arms_of, seeds_line, task_key

    for key in dict.fromkeys(task_key(record) for record in records if record["probe"] == FINETUNE):
        arms = arms_of([record for record in records if task_key(record) == key])
        tuned = [record for arm in arms for record in arm if record["probe"] == FINETUNE]
        if tuned:
            show(*arm_table(arms), right=("seeds", *COST_COLUMNS))
            spreads = [seeds_line(arm) for arm in arms if arm[0]["probe"] == FINETUNE]
            for line in [*notes_of(tuned), COSTS_LINE, *filter(None, spreads)]:
                print(f"  {line}")
