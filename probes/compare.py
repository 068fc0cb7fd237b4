"""`probes compare A B`: what two records or score files share, what differs between them, and by how much.

Works from predictions alone. Records are compared on the samples and labels that both have; what differs in their
protocols is said first.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from featstore.errors import ConfigError, TaskError
from featstore.objects import Place
from featstore.store.catalog import Store
from probes.paired import Criteria, Pair, compare_pair
from probes.records import float_or_nan, load_records
from probes.score_tables import ScoreTable, open_scores
from probes.subgroups import find_column, subgroup_rows
from probes.thresholds import Scored, Thresholds, fit_thresholds

# What two records are compared for; anything else that differs is another protocol.
COMPARED = ("set", "features", "weights")


def compare(
    a: str,
    b: str,
    criteria: Criteria,
    *,
    store: Store,
    folder: Place,
    subgroups: Sequence[str] = (),
    youden: bool = False,
) -> dict[str, Any]:
    """Compare two records (id, start of an id, or path) or score files (CSV, TSV, Parquet); plain values.

    `{"a", "b", "differs", "protocol_differs", "shared", "notes", "result", "subgroups", "seeds", "thresholds"}`;
    `result` as in `probes.paired.compare_pair`, and so is each of `subgroups`, with `column` and `value`. With
    `youden`, decisions of A and B are taken at thresholds found on their own validation rows; else at 0.5.

    Raises:
        UnknownNameError: no such record, file or subgroup. TaskError: no shared sample or label, or another truth.
        ConfigError: a threshold for a metric that has none.
    """
    if youden and criteria.metric in ("auroc", "auprc"):
        raise ConfigError(
            f"--threshold youden changes nothing of {criteria.metric}, which takes no decisions; leave it out"
        )
    tables = open_scores(a, folder), open_scores(b, folder)
    pair, notes = join(*tables)
    thresholds = _thresholds((a, b), folder, pair) if youden else (0.5, 0.5)
    return {
        "a": _source(tables[0]),
        "b": _source(tables[1]),
        **_differing(tables),
        "shared": {"samples": len(pair.ids), "patients": len(np.unique(pair.groups)), "labels": list(pair.labels)},
        "notes": notes,
        "thresholds": {
            "how": "youden on validation" if youden else "0.5",
            "a": _named(pair, thresholds[0]),
            "b": _named(pair, thresholds[1]),
        },
        "result": compare_pair(pair, criteria, thresholds),
        "subgroups": [
            {"column": column, "value": value, **compare_pair(pair.part(rows), criteria, thresholds)}
            for column, value, rows in _parts(pair, tables, subgroups, store)
        ],
        "seeds": {
            name: seed_spread(table.record, folder, criteria.metric)
            for name, table in zip("ab", tables)
            if table.record is not None
        },
    }


def join(a: ScoreTable, b: ScoreTable) -> tuple[Pair, list[str]]:
    """Samples and labels that both have, in A's order, and notes on what is left out.

    Truth and patients come from whichever has them; where both have a truth it must agree.

    Raises:
        TaskError: nothing is shared, no truth at all, or truths or patients that contradict each other.
    """
    theirs, known = set(b.ids), set(b.labels)
    ids = tuple(name for name in a.ids if name in theirs)
    labels = tuple(label for label in a.labels if label in known)
    for what, shared, of_a, of_b in (("label", labels, a.labels, b.labels), ("sample", ids, a.ids, b.ids)):
        if not shared:
            raise TaskError(
                f"no {what} is in both: A ({a.name}) has {len(of_a)}, such as {of_a[0]!r}; B ({b.name}) has "
                f"{len(of_b)}, such as {of_b[0]!r}"
            )
    notes = [
        f"{what} of {side} that the other lacks, left out: {len(names) - len(shared)}"
        for what, shared, pairs in (("samples", ids, (a.ids, b.ids)), ("labels", labels, (a.labels, b.labels)))
        for side, names in zip("AB", pairs)
        if len(names) > len(shared)
    ]
    classes = a.classes and b.classes and len(labels) == len(a.labels) == len(b.labels)
    if (a.classes or b.classes) and not classes:
        notes.append("classes that only one of them has: each shared class is compared against the rest")
    a, b = a.rows(ids, labels), b.rows(ids, labels)
    y, mask = _truth(a, b)
    finite = np.isfinite(a.scores) & np.isfinite(b.scores)
    if (mask & ~finite).any():
        notes.append(f"{int((mask & ~finite).sum())} labelled entries lack a score in A or B and are left out")
    mask &= finite
    for side, table in zip("AB", (a, b)):
        if table.mask is not None and (lost := int((table.mask & finite & ~mask).sum())):
            notes.append(f"{lost} entries that {side} scored are masked in the other and are left out")
    groups, said = _groups(a, b)
    pair = Pair(ids, groups, labels, "multilabel", y, mask, a.scores, b.scores)
    if classes:
        pair = Pair(ids, groups, labels, "multiclass", y.argmax(1), np.asarray(mask.all(1)), a.scores, b.scores)
    return pair, [*notes, *said]


def _truth(a: ScoreTable, b: ScoreTable) -> tuple[np.ndarray, np.ndarray]:
    known = [(table.y, table.mask) for table in (a, b) if table.y is not None and table.mask is not None]
    if not known:
        raise TaskError(
            f"neither {a.name} nor {b.name} says what is true: compare with a record, or add columns label:NAME of "
            "0 and 1"
        )
    y, mask = known[0][0].copy(), known[0][1].copy()
    if len(known) == 2:
        both = mask & known[1][1]
        wrong = both & (y != known[1][0])
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            raise TaskError(
                f"A and B disagree on the truth of {int(wrong.sum())} entries, such as {a.labels[column]!r} of sample "
                f"{a.ids[row]!r}; evaluate both under one label policy"
            )
        mask = both
    return y, mask


def _groups(a: ScoreTable, b: ScoreTable) -> tuple[np.ndarray, list[str]]:
    if a.groups is None and b.groups is None:
        return np.array(a.ids), ["patients unknown: every sample counts for its own, and intervals may be too narrow"]
    groups = a.groups if a.groups is not None else b.groups
    assert groups is not None
    if a.groups is not None and b.groups is not None:
        pairs = set(zip(a.groups.tolist(), b.groups.tolist()))
        if not len(pairs) == len(np.unique(a.groups)) == len(np.unique(b.groups)):
            raise TaskError(
                f"A and B put the shared samples into different groups (patients): {len(np.unique(a.groups))} in A, "
                f"{len(np.unique(b.groups))} in B; evaluate both on one manifest"
            )
    return groups, []


def _named(pair: Pair, thresholds: Any) -> dict[str, float] | None:
    """Threshold of each label; None where classes are decided by the largest score."""
    if pair.kind == "multiclass":
        return None
    return dict(zip(pair.labels, np.broadcast_to(thresholds, len(pair.labels)).tolist()))


def _source(table: ScoreTable) -> dict[str, Any]:
    if table.record is None:
        return {"name": table.name, "record": None}
    random = " RANDOM WEIGHTS" if table.record["random_weights"] else ""
    return {"name": table.name + random, "record": table.record["id"]}


def protocol_fields(record: dict[str, Any]) -> dict[str, Any]:
    """Everything that says how a record came about, field by field, for telling two of them apart."""
    fields = {
        "set": record["set"],
        "features": record["features"],
        "weights": record["weights"],
        "dataset": record["dataset"],
        "test data set": record["test"]["dataset"] if "test" in record else record["dataset"],
        "probe": record["probe"],
        "manifest": record["manifest"],
        "geometry": (record["preprocess"] or {}).get("geometry"),
        "compute dtype": record["compute_dtype"],
        **{f"task {name}": record["task"].get(name) for name in ("name", "digest", "kind", "labels", "unit", "pool")},
        "deviations": record["deviations"],
    }
    # An option that was not given stands for its default, also in records from before there was one.
    given = {name: value for name, value in record["config"]["head"].items() if value is not None}
    return fields | {f"option {name}": value for name, value in sorted(given.items())}


def _differing(tables: tuple[ScoreTable, ScoreTable]) -> dict[str, Any]:
    """What differs between two records, and which of it is protocol; of a file nothing is known."""
    if tables[0].record is None or tables[1].record is None:
        files = [table.name for table in tables if table.record is None]
        return {
            "differs": {},
            "protocol_differs": [f"{name} is a file of scores: how they were made is not known" for name in files],
        }
    a, b = (protocol_fields(table.record) for table in tables if table.record is not None)
    differs = {name: [a.get(name), b.get(name)] for name in {**a, **b} if a.get(name) != b.get(name)}
    return {"differs": differs, "protocol_differs": [name for name in differs if name not in COMPARED]}


def _thresholds(names: tuple[str, str], folder: Place, pair: Pair) -> tuple[Any, Any]:
    """Thresholds of each model from its own validation rows; refused where a compared sample is among them."""
    if pair.kind == "multiclass":
        raise TaskError("classes are decided by the largest score and have no threshold; leave --threshold out")
    found = []
    for name, scores in zip(names, (pair.a, pair.b)):
        table = open_scores(name, folder, split="val")
        table = table.rows(table.ids, pair.labels)
        fitted: Thresholds = fit_thresholds(_scored(table))
        fitted.check(Scored(pair.y, scores, pair.mask, pair.ids, tuple(map(str, pair.groups)), pair.labels))
        found.append(fitted.values)
    return found[0], found[1]


def _scored(table: ScoreTable) -> Scored:
    if table.y is None or table.mask is None:
        raise TaskError(f"{table.name}: the validation rows have no truth to find a threshold with; add label:NAME")
    mask = table.mask & np.isfinite(table.scores)
    groups = table.ids if table.groups is None else tuple(map(str, table.groups.tolist()))
    return Scored(table.y, table.scores, mask, table.ids, groups, table.labels)


def _parts(
    pair: Pair, tables: tuple[ScoreTable, ScoreTable], subgroups: Sequence[str], store: Store
) -> list[tuple[str, str, np.ndarray]]:
    """(column, value, rows) of every subgroup with a sample."""
    found = []
    for asked in subgroups:
        name, values = _column(pair, tables, asked, store)
        found += [(name, value, rows) for value, rows in subgroup_rows(name, values).items()]
    return found


def _column(pair: Pair, tables: tuple[ScoreTable, ScoreTable], asked: str, store: Store) -> tuple[str, list[Any]]:
    """A column of a score file, else of a record's manifest; a unit of images has a value where all of them agree."""
    names: list[str] = []
    for table in tables:
        if table.record is None:
            columns = dict(table.rows(pair.ids, pair.labels).columns)
        else:
            columns = _manifest_columns(table.record, pair.ids, asked, store)
        names += columns
        try:
            name = find_column(list(columns), asked)
        except LookupError:
            continue
        return name, columns[name]
    return find_column(names, asked), []


def _manifest_columns(record: dict[str, Any], ids: tuple[str, ...], asked: str, store: Store) -> dict[str, list[Any]]:
    """The column asked for (or, where there is none, the names of all) for a record's test samples."""
    test = record.get("test", record)
    manifest = store.manifest(test["dataset"], test["manifest"])
    names = [name for name in manifest.table.column_names if name not in ("content", "mtime_ns")]
    try:
        name = find_column(names, asked)
    except LookupError:
        return {other: [] for other in names}
    unit = record["task"]["unit"]
    keys = (
        manifest.place("volume")
        if unit == "volume"
        else manifest.column({"image": "id", "study": "study", "patient": "group"}[unit])
    )
    values: dict[str, set[Any]] = {}
    for key, group, value in zip(keys, manifest.column("group"), manifest.column(name)):
        for text in (str(key), f"{group}/{key}"):  # ids that patients share carry the patient's
            values.setdefault(text, set()).add(value)
    if not any(key in values for key in ids):
        raise TaskError(f"the {unit}s of this record cannot be found in the manifest; subgroups need their rows")
    one = {key: next(iter(cells)) if len(cells) == 1 else None for key, cells in values.items()}
    return {name: [one.get(key) for key in ids]}


def seed_spread(record: dict[str, Any], folder: Place, metric: str) -> dict[str, Any] | None:
    """Test values of the records that differ from this one in their seed only; None where there is no other.

    `{"metric", "seeds": {seed: value}, "mean", "sd", "min", "max"}`; the latest record of each seed counts.
    """
    own = _without_seed(record)
    alike = load_records(folder, dataset=record["dataset"], probe=record["probe"], fingerprint=record["fingerprint"])
    seeds = {
        str(_seed_of(other)): float_or_nan(other["metrics"]["test"]["macro"].get(metric))
        for other in alike
        if _without_seed(other) == own
    }
    if len(seeds) < 2:
        return None
    values = np.array(list(seeds.values()))
    return {
        "metric": metric,
        "seeds": seeds,
        "mean": float(values.mean()),
        "sd": float(values.std(ddof=1)),
        "min": float(values.min()),
        "max": float(values.max()),
    }


def _without_seed(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in protocol_fields(record).items() if name != "option seed"}


def _seed_of(record: dict[str, Any]) -> Any:
    return record["config"]["head"].get("seed", record["seed"])
