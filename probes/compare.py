"""`probes compare A B`: what two records or score files share, what differs between them, and by how much.

Works from predictions alone. Records are compared on the samples and labels that both have; what differs in their
protocols is said first.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from featstore.errors import ConfigError, TaskError
from featstore.objects import Place
from featstore.store.catalog import Store
from probes.compare_curves import compare_curves
from probes.compare_seeds import check_seeds, common, names_of, seed_of, seed_spread
from probes.manifest_columns import parts
from probes.paired import Criteria, Pair, compare_pair
from probes.price import price_of
from probes.protocol import differing
from probes.regression import NUMBER_METRICS, NumberKind
from probes.score_tables import ScoreTable, open_scores, record_of
from probes.thresholds import Scored, Thresholds, fit_thresholds

ROUNDING = 1e-6  # that a probability in float32 may lie beyond 0 or 1 by


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

    `{"a", "b", "differs", "protocol_differs", "shared", "notes", "result", "price", "subgroups", "seeds",
    "thresholds"}`; `result` as in `probes.paired.compare_pair`, and so is each of `subgroups`, with `column` and
    `value`; `price` as in `probes.price.price_of`. With
    `youden`, decisions of A and B are taken at thresholds found on their own validation rows; else at 0.5.
    Several names separated by commas are runs that differ in their seed: means over seeds are compared. Two few-shot
    curves are compared at each budget, see `probes.compare_curves`.

    Raises:
        UnknownNameError: no such record, file or subgroup. TaskError: no shared sample or label, or another truth;
            runs that differ in more than their seed; curves of other draws.
        ConfigError: a metric or threshold that what is compared does not have, or scores that 0.5 cannot decide.
    """
    names = names_of(a), names_of(b)
    records = [[record_of(name, folder) for name in side] for side in names]
    if any(record is not None and "curve" in record for side in records for record in side):
        return compare_curves(records, criteria, subgroups=bool(subgroups), youden=youden)
    for side, runs in zip("AB", records):
        check_seeds(side, runs)
    sides = tuple([open_scores(name, folder) for name in side] for side in names)
    pair, notes = join_all(*sides, metric=criteria.metric)
    criteria = criteria.of(pair.kind)
    if youden and criteria.metric in ("auroc", "auprc", *NUMBER_METRICS["regression"], *NUMBER_METRICS["ordinal"]):
        raise ConfigError(
            f"--threshold youden changes nothing of {criteria.metric}, which takes no decisions; leave it out"
        )
    limits: list[list[Any]] = [_thresholds(side, folder, pair) if youden else [0.5] * len(side) for side in names]
    if not youden:
        _check_decided(pair, sides, str(criteria.metric))
    tables = sides[0][0], sides[1][0]
    result = compare_pair(pair, criteria, (limits[0], limits[1]))
    return {
        "a": _source(sides[0]),
        "b": _source(sides[1]),
        **differing(tables[0].record, tables[1].record, [table.name for table in tables if table.record is None]),
        "shared": {"samples": len(pair.ids), "patients": len(np.unique(pair.groups)), "labels": list(pair.labels)},
        "notes": notes,
        "thresholds": {
            "how": "youden on validation" if youden else "0.5",
            "a": _named(pair, limits[0]),
            "b": _named(pair, limits[1]),
        },
        "result": result,
        "price": price_of(records[0], records[1], result),
        "subgroups": [
            {"column": column, "value": value, **compare_pair(pair.part(rows), criteria, (limits[0], limits[1]))}
            for column, value, rows in parts(tables, pair.ids, subgroups, store)
        ],
        "seeds": {
            name: seed_spread(side[0].record, folder, str(criteria.metric))
            for name, side in zip("ab", sides)
            if side[0].record is not None and len(side) == 1
        },
    }


def join_all(a: Sequence[ScoreTable], b: Sequence[ScoreTable], *, metric: str | None = None) -> tuple[Pair, list[str]]:
    """The pair of two sides of one or more models each; see `join`. `metric` says that files hold numbers."""
    if len(a) + len(b) == 2:
        return join(a[0], b[0], metric=metric)
    ids, labels = common([*a, *b])
    left = max(len(table.ids) for table in (*a, *b)) - len(ids)
    notes = [f"samples that not all models have, left out: {left}"] if left else []
    every = [table.rows(ids, labels) for table in (*a, *b)]
    pair, said = join(every[0], every[len(a)], metric=metric)
    mask = pair.mask
    for table in every[1:]:
        mask = mask & join(every[0], table, metric=metric)[0].mask
    scores = [table.scores for table in every]
    seeds = [[seed_of(table.record) for table in side if table.record is not None] for side in (a, b)]
    same = seeds[0] == seeds[1] and len(seeds[0]) == len(a) == len(b)
    further = tuple(scores[1 : len(a)]), tuple(scores[len(a) + 1 :])
    return replace(pair, mask=mask, further=further, same_seeds=same), [*notes, *said]


def join(a: ScoreTable, b: ScoreTable, *, metric: str | None = None) -> tuple[Pair, list[str]]:
    """Samples and labels that both have, in A's order, and notes on what is left out.

    Truth and patients come from whichever has them; where both have a truth it must agree. Two files hold numbers
    where a `metric` of numbers is asked for.

    Raises:
        TaskError: nothing is shared, no truth at all, or truths or patients that contradict each other; numbers beside
            labels.
    """
    numbers = _numbers(a, b, metric)
    if numbers is None:
        a, b = a.of_labels(), b.of_labels()
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
    classes = numbers is None and a.classes and b.classes and len(labels) == len(a.labels) == len(b.labels)
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
    ranks = max(a.num_classes, b.num_classes)
    pair = Pair(ids, groups, labels, numbers or "multilabel", y, mask, a.scores, b.scores, num_classes=ranks)
    if classes:
        pair = Pair(ids, groups, labels, "multiclass", y.argmax(1), np.asarray(mask.all(1)), a.scores, b.scores)
    return pair, [*notes, *said]


def _numbers(a: ScoreTable, b: ScoreTable, metric: str | None) -> NumberKind | None:
    """What kind of numbers are compared; None for labels and classes. A file is what its partner is."""
    kinds = {table.numbers or "labels" for table in (a, b) if table.record is not None}
    if len(kinds) > 1:
        said = " and ".join(f"{table.name} of {table.numbers or 'labels'}" for table in (a, b))
        raise TaskError(f"records of one kind of task are compared, got {said}")
    if a.numbers == b.numbers == "ordinal" and a.num_classes != b.num_classes:
        raise TaskError(f"ranks of one scale are compared, got {a.num_classes} and {b.num_classes} classes")
    if kinds:
        return a.numbers or b.numbers
    return "regression" if metric in NUMBER_METRICS["regression"] else None


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
        wrong = both & ~np.isclose(y, known[1][0], rtol=1e-6, atol=0)  # decimal text of a number may be shorter
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


def _check_decided(pair: Pair, sides: Sequence[Sequence[ScoreTable]], metric: str) -> None:
    """Labels are decided at 0.5, which is a threshold of scores from 0 to 1 alone; logits would be cut anywhere."""
    if pair.kind != "multilabel" or metric in ("auroc", "auprc"):
        return
    names = [f"{side} ({table.name})" for side, tables in zip("AB", sides) for table in tables]
    for name, scores in zip(names, pair.models):
        low, high = float(scores[pair.mask].min(initial=0)), float(scores[pair.mask].max(initial=1))
        if low < -ROUNDING or high > 1 + ROUNDING:
            raise ConfigError(
                f"{metric} decides at a score of 0.5, which needs scores from 0 to 1; those of {name} reach from "
                f"{low:.4g} to {high:.4g}: give --threshold youden, which is found on validation rows, or write their "
                "sigmoid into the file where they are logits"
            )


def _named(pair: Pair, thresholds: Sequence[Any]) -> Any:
    """Threshold of each label, of several seeds one each; None where classes or numbers have none."""
    if pair.kind != "multilabel":
        return None
    made = [dict(zip(pair.labels, np.broadcast_to(each, len(pair.labels)).tolist())) for each in thresholds]
    return made[0] if len(made) == 1 else made


def _source(tables: Sequence[ScoreTable]) -> dict[str, Any]:
    record = tables[0].record
    if record is None:
        return {"name": tables[0].name, "record": None}
    random = " RANDOM WEIGHTS" if record["random_weights"] else ""
    if len(tables) == 1:
        return {"name": tables[0].name + random, "record": record["id"]}
    ids = [table.record["id"] for table in tables if table.record is not None]
    seeds = [seed_of(table.record) for table in tables if table.record is not None]
    return {"name": f"{tables[0].name}{random}, {len(ids)} seeds", "record": ids, "seeds": seeds}


def _thresholds(names: Sequence[str], folder: Place, pair: Pair) -> list[Any]:
    """Thresholds of each model from its own validation rows; refused where a compared sample is among them."""
    if pair.kind == "multiclass":
        raise TaskError("classes are decided by the largest score and have no threshold; leave --threshold out")
    made = []
    for name in names:
        table = open_scores(name, folder, split="val")
        table = table.rows(table.ids, pair.labels).of_labels()
        fitted: Thresholds = fit_thresholds(scored_of(table))
        fitted.check(Scored(pair.y, pair.a, pair.mask, pair.ids, tuple(map(str, pair.groups)), pair.labels))
        made.append(fitted.values)
    return made


def scored_of(table: ScoreTable) -> Scored:
    """A table with a truth in the form that thresholds take.

    Raises:
        TaskError: no truth.
    """
    if table.y is None or table.mask is None:
        raise TaskError(f"{table.name}: the validation rows have no truth to find a threshold with; add label:NAME")
    mask = table.mask & np.isfinite(table.scores)
    groups = table.ids if table.groups is None else tuple(map(str, table.groups.tolist()))
    return Scored(table.y, table.scores, mask, table.ids, groups, table.labels)
