"""What a record says of decisions and probabilities: thresholds and a temperature found on validation, used on test.

Rows that find them were scored by a head that was not fitted on them: validation rows by a head of the training rows,
or, after a refit, out of fold. A row whose patient is also in train or test (a leak that was allowed) finds nothing.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from featstore import files
from probes.calibration import (
    Temperature,
    calibration,
    class_calibration,
    fit_class_temperature,
    fit_temperature,
)
from probes.cross import CrossTask
from probes.draws import Draws
from probes.paired import FEW
from probes.selection import Fitted
from probes.tasks import Task
from probes.thresholds import DECISIONS, Scored, fit_thresholds, optimistic_youden
from probes.unfitted import unfitted_labels

ROUNDING = 1e-6  # a vote's or a softmax's sum may leave [0, 1] by its rounding
PROPERTIES = ("ece", "ece_mass", "brier")


@dataclass(frozen=True, slots=True)
class Held:
    """Test rows, and the validation rows that may find a threshold for them; `left_out` share a patient with others."""

    val: Scored
    test: Scored
    left_out: int

    def said(self, fitted: Fitted) -> dict[str, Any]:
        """What thresholds and temperature were found on; `ids` is a digest of the samples in their order."""
        return {
            "split": "val",
            "scored": "out of fold" if fitted.val_metrics is not None else "by a head fitted on train",
            "n": len(self.val.ids),
            "patients": len(set(self.val.groups)),
            "left_out": self.left_out,
            "ids": files.digest(list(self.val.ids)),
        }


def scored_rows(task: Task, split: str, scores: Float[np.ndarray, "U L"], *, every_class: bool = False) -> Scored:
    """Scores of a split as what is present or not: the labels, or each class against the rest.

    Of two classes it is the second alone, unless `every_class`. Samples and groups of a test on another data set bear
    its name, as equal ids in two data sets are not the same patients.
    """
    y, mask, groups, ids = task.truth(split)
    labels = task.labels
    if task.kind == "multiclass":
        y, mask = (y[:, None] == np.arange(len(labels))).astype(np.int8), np.repeat(mask[:, None], len(labels), axis=1)
        if len(labels) == 2 and not every_class:
            y, mask, scores, labels = y[:, 1:], mask[:, 1:], scores[:, 1:], labels[1:]
    owner = f"{split if split == 'test' else 'train'}/" if isinstance(task, CrossTask) else ""
    return Scored(
        y, scores, mask, tuple(owner + name for name in ids), tuple(owner + str(name) for name in groups), labels
    )


def held_rows(task: Task, fitted: Fitted, *, every_class: bool = False) -> Held:
    """Validation and test rows of what was fitted, without validation rows of patients that train or test has too."""
    val = scored_rows(task, "val", fitted.val_scores, every_class=every_class)
    test = scored_rows(task, "test", fitted.test_scores, every_class=every_class)
    owner = "train/" if isinstance(task, CrossTask) else ""
    train = {owner + str(name) for name in task.truth("train").groups}
    keep = np.array([group not in train for group in val.groups], dtype=bool)
    groups, ids = set(test.groups), set(test.ids)
    keep &= np.array([group not in groups and name not in ids for group, name in zip(val.groups, val.ids)], dtype=bool)
    if keep.all():
        return Held(val, test, 0)
    rows = np.flatnonzero(keep)
    kept = Scored(
        val.y[rows],
        val.scores[rows],
        val.mask[rows],
        tuple(val.ids[row] for row in rows),
        tuple(val.groups[row] for row in rows),
        val.labels,
    )
    return Held(kept, test, int((~keep).sum()))


def operating(
    task: Task, fitted: Fitted, *, resamples: int, seed: int, test_youden: bool = False
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(`at_youden`, `at_test_youden` and `calibration` of the test rows, notes); nothing for numbers and ranks.

    `test_youden` asks for intervals of the optimistic metrics, which take as long as those of AUROC.
    """
    if task.kind not in ("multilabel", "multiclass"):
        return {}, ()
    held = held_rows(task, fitted)
    used = held.test.mask.any(1)
    draws = Draws.of(np.array(held.test.groups)[used], num_resamples=resamples, seed=seed)
    found: dict[str, Any] = {}
    notes = list(scarce(held.test, task.features.manifest.meta["groups_known"], unfitted_labels(task)))
    if held.left_out:
        notes.append(
            f"{held.left_out} validation rows find no threshold or temperature: their patients are in train or test too"
        )
    both = [0 < held.val.y[rows, column].sum() < rows.sum() for column, rows in enumerate(held.val.mask.T)]
    if any(both):
        found["at_youden"] = _at_youden(held, fitted, draws)
    else:
        notes.append("no label has both classes among the validation rows that may find a threshold or temperature")
    found["at_test_youden"] = optimistic_youden(held.test, draws if test_youden else None)
    scores = np.concatenate([fitted.val_scores, fitted.test_scores])
    if not ((scores >= -ROUNDING) & (scores <= 1 + ROUNDING)).all():
        notes.append("scores are no probabilities, so the record has no calibration")
    else:
        found["calibration"] = _calibration(task, fitted, any(both))
    return found, tuple(notes)


def _at_youden(held: Held, fitted: Fitted, draws: Draws) -> dict[str, Any]:
    thresholds = fit_thresholds(held.val)
    metrics = thresholds.evaluate(held.test)
    return {
        "found_on": held.said(fitted),
        # Null in JSON: nothing is decided positive, as no cut of the validation rows was better than that.
        "thresholds": dict(zip(thresholds.labels, thresholds.values.tolist())),
        "pooled": dict(zip(thresholds.labels, thresholds.pooled)),
        "macro": {name: metrics["macro"][name] for name in DECISIONS},
        "per_label": [
            {"label": item["label"], "n": item["n"], "positives": item["positives"]}
            | {name: item[name] for name in DECISIONS}
            for item in metrics["per_label"]
        ],
        "intervals": thresholds.intervals(held.test, draws),
    }


def _calibration(task: Task, fitted: Fitted, found: bool) -> dict[str, Any]:
    """Raw, and with the temperature where one can be found."""
    held = held_rows(task, fitted, every_class=True)
    val, test = (_clipped(part) for part in (held.val, held.test))
    classes = task.kind == "multiclass"
    result = {"found_on": held.said(fitted), "raw": _properties(test, classes)}
    if found:
        temperature: Temperature = fit_class_temperature(val) if classes else fit_temperature(val)
        labels = task.spec.labels if classes else val.labels
        mended = _with_scores(test, temperature.apply(test))
        result["temperature"] = {
            "T": dict(zip(labels, temperature.values.tolist())),
            "at_bound": dict(zip(labels, temperature.at_bound)),
            **_properties(mended, classes),
        }
    return result


def _properties(scored: Scored, classes: bool) -> dict[str, Any]:
    if classes:
        return {"macro": class_calibration(scored)}
    per_label = calibration(scored)
    macro = {}
    for name in PROPERTIES:
        values = np.array([float(entry[name]) for entry in per_label])
        macro[name] = float(np.nanmean(values)) if not np.isnan(values).all() else float("nan")
    return {"macro": macro, "per_label": per_label}


def _clipped(scored: Scored) -> Scored:
    return _with_scores(scored, np.clip(scored.scores, 0, 1))


def _with_scores(scored: Scored, scores: Float[np.ndarray, "N L"]) -> Scored:
    return Scored(scored.y, scores, scored.mask, scored.ids, scored.groups, scored.labels)


def scarce(test: Scored, groups_known: bool, left_out: Collection[str] = ()) -> tuple[str, ...]:
    """Warnings of test rows too few to rely on: under 20 patients, or positives or negatives of a label.

    Labels that were left out altogether have no interval to warn of.
    """
    found = []
    patients = len(set(np.array(test.groups)[test.mask.any(1)].tolist()))
    if patients < FEW:
        what = "patients" if groups_known else "samples (patients unknown)"
        found.append(f"test has {patients} {what}: under {FEW}, intervals are unreliable")
    counts = [
        (label, int(((test.y[:, number] == 1) & rows).sum()), int(rows.sum()))
        for number, (label, rows) in enumerate(zip(test.labels, test.mask.T))
        if label not in left_out
    ]
    for what, few in (
        ("positives", [f"{label} ({count})" for label, count, _ in counts if count < FEW]),
        ("negatives", [f"{label} ({total - count})" for label, count, total in counts if total - count < FEW]),
    ):
        if few:
            found.append(f"under {FEW} {what} in test: {', '.join(few)}; do not rely on their intervals")
    return tuple(found)
