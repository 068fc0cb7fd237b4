"""Two few-shot curves on the same draws of shots: the difference at each budget, repeat by repeat."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from featstore.errors import ConfigError, TaskError
from probes.curves import CLASS_METRICS, LABEL_METRICS, common_labels
from probes.paired import Criteria
from probes.protocol import differing
from probes.records import load_predictions

Record = dict[str, Any]
# What must be equal for repeat r of two curves to be fitted on the same rows and scored on the same test.
DRAWN = ("by", "sampling", "repeats")
NOTE = (
    "bands and standard errors are over draws of shots, which both sides share, on one test split: they lack the "
    "chance of the test patients"
)


def compare_curves(
    sides: Sequence[Sequence[Record | None]], criteria: Criteria, *, subgroups: bool = False, youden: bool = False
) -> dict[str, Any]:
    """A - B of two curves at every budget that both have; plain values.

    `{"a", "b", "differs", "protocol_differs", "shared", "notes", "metric", "level", "curve": [{"name", "macro": entry,
    "per_label": [entry]}]}`. An entry holds the means `a` and `b` and of their difference `delta` the mean, standard
    deviation and percentile band over repeats, the `standard_error` of the mean, and `better`, the share of repeats
    where A is above B (ties count one half). There are no p-values: repeats share their test samples.

    Raises:
        TaskError: something else than one curve on each side, or curves of other data or draws.
        ConfigError: an option that is of predictions, or a metric that curves do not have.
    """
    a, b = _two(sides)
    for flag, given in (("--margin", criteria.margin), ("--subgroups", subgroups), ("--threshold youden", youden)):
        if given:
            raise ConfigError(f"{flag} needs predictions, of which few-shot curves keep none; leave it out")
    metric = str(criteria.metric or "auroc")
    known = CLASS_METRICS if a["task"]["kind"] == "multiclass" else LABEL_METRICS
    if metric not in known:
        raise ConfigError(f"{metric} is no metric of these curves; they have {', '.join(known)}")
    _check_draws(a, b)
    tables = _values(a, metric), _values(b, metric)
    budgets = [point["name"] for point in a["curve"] if any(point["name"] == other["name"] for other in b["curve"])]
    if not budgets:
        names = [", ".join(point["name"] for point in record["curve"]) for record in (a, b)]
        raise TaskError(f"no budget is in both curves: A has {names[0]}; B has {names[1]}")
    labels = [item["label"] for item in a["curve"][0]["per_label"]]
    kept = _common(tables, budgets, labels) if a["task"]["kind"] == "multilabel" else None
    macro = [_macro(table, budgets, kept) for table in tables]
    points = [
        {
            "name": budget,
            "macro": _entry(macro[0][number], macro[1][number], criteria.level),
            "per_label": [
                {"label": label, **_entry(tables[0][budget, label], tables[1][budget, label], criteria.level)}
                for label in labels
                if (budget, label) in tables[0]
            ],
        }
        for number, budget in enumerate(budgets)
    ]
    left = sorted({point["name"] for record in (a, b) for point in record["curve"]} - set(budgets))
    notes = [NOTE, *([f"budgets that only one curve has, left out: {', '.join(left)}"] if left else [])]
    if kept is not None and len(kept) < len(labels):
        which = f"macro over {', '.join(kept)}: the labels" if kept else "no macro: no label is among those"
        notes.append(f"{which} that have, in both curves, every shared budget that any label has in both")
    return {
        "a": _source(a),
        "b": _source(b),
        **differing(a, b),
        "shared": {"budgets": budgets, "labels": labels, "repeats": len(macro[0][0])},
        "notes": notes,
        "metric": metric,
        "level": criteria.level,
        "curve": points,
    }


def _two(sides: Sequence[Sequence[Record | None]]) -> tuple[Record, Record]:
    found = [record for side in sides for record in side]
    if any(len(side) > 1 for side in sides):
        raise TaskError("few-shot curves have their repeats in one record; name one record on each side")
    if any(record is None or "curve" not in record for record in found):
        raise TaskError(
            "a few-shot curve is compared with another curve, not with a record of predictions; give two records of "
            "`probes fewshot`, or compare `probes linear` at the full training split"
        )
    return found[0], found[1]  # type: ignore[return-value]


def _check_draws(a: Record, b: Record) -> None:
    facts: dict[str, tuple[Any, Any]] = {name: (a.get(name), b.get(name)) for name in ("dataset", "manifest")}
    for name in ("digest", "unit", "pool"):
        facts[f"task {name}"] = (a["task"].get(name), b["task"].get(name))
    facts["seed"] = (a["seed"], b["seed"])
    for name in DRAWN:
        facts[name] = (a["config"]["head"].get(name), b["config"]["head"].get(name))
    other = [f"{name} (A {of_a}, B {of_b})" for name, (of_a, of_b) in facts.items() if of_a != of_b]
    if other:
        raise TaskError(
            f"the curves are of other draws, which cannot be paired: {', '.join(other)}; run `probes fewshot` for both "
            "with the same data, --seed, --by, --sampling and --repeats"
        )


def _values(record: Record, metric: str) -> dict[tuple[str, str], Float[np.ndarray, " R"]]:
    """(budget, label) -> values of all repeats in order; the macro has the label ''."""
    table = load_predictions(record).to_pydict()
    found: dict[tuple[str, str], dict[int, float]] = {}
    for budget, label, repeat, value in zip(table["budget"], table["label"], table["repeat"], table[metric]):
        found.setdefault((budget, label), {})[repeat] = float("nan") if value is None else float(value)
    return {key: np.array([values[repeat] for repeat in sorted(values)]) for key, values in found.items()}


def _common(
    tables: Sequence[dict[tuple[str, str], np.ndarray]], budgets: Sequence[str], labels: Sequence[str]
) -> list[str]:
    """Labels that have, in both curves, every budget that any label has in both."""
    have = np.array(
        [
            [not any(np.isnan(values[budget, label]).any() for values in tables) for label in labels]
            for budget in budgets
        ]
    )
    return [label for label, keep in zip(labels, common_labels(have)) if keep]


def _macro(
    table: dict[tuple[str, str], np.ndarray], budgets: Sequence[str], kept: Sequence[str] | None
) -> list[Float[np.ndarray, " R"]]:
    """Macro of every budget: of classes their own, else the mean over the labels that are kept."""
    if kept is None:
        return [table[budget, ""] for budget in budgets]
    if not kept:
        return [np.full(len(table[budget, ""]), np.nan) for budget in budgets]
    return [np.mean([table[budget, label] for label in kept], axis=0) for budget in budgets]


def _entry(a: Float[np.ndarray, " R"], b: Float[np.ndarray, " R"], level: float) -> dict[str, Any]:
    delta = a - b
    if np.isnan(delta).any():
        nan = float("nan")
        return {"a": nan, "b": nan, "delta": {"value": nan, "low": nan, "high": nan}, "better": nan}
    found: dict[str, Any] = {"value": float(delta.mean())}
    if len(delta) > 1:
        low, high = np.percentile(delta, [50 * (1 - level), 100 - 50 * (1 - level)])
        sd = float(delta.std(ddof=1))
        found |= {"sd": sd, "standard_error": sd / len(delta) ** 0.5, "low": float(low), "high": float(high)}
    else:  # one draw has no band
        found |= {"low": None, "high": None}
    better = float((delta > 0).mean() + (delta == 0).mean() / 2)
    return {"a": float(a.mean()), "b": float(b.mean()), "delta": found, "better": better}


def _source(record: Record) -> dict[str, Any]:
    random = " RANDOM WEIGHTS" if record["random_weights"] else ""
    head = record["config"]["head"]["head"]
    return {"name": f"fewshot {head} on {record['set']} ({record['features']}){random}", "record": record["id"]}
