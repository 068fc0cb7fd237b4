"""k nearest neighbours from a task to scores: k chosen on validation, or by leaving patients out of train."""

from typing import Any

import numpy as np

from featstore.errors import TaskError
from probes.configs import KnnConfig
from probes.selection import Both, Fitted, load, macro_quality
from probes.tasks import Samples, Task


def fit_knn(task: Task, features: str, config: KnnConfig) -> Fitted:
    """k nearest neighbours by the vote asked for (mean for numbers and ranks); one k for all labels.

    k is chosen on validation, or by leaving each patient out of train; with refit the test sees train and val.
    """
    from probes.knn_protocols import Plan  # imports scikit-learn, which takes a second or two that others need not pay

    plan = Plan.of(config)
    parts = load(task, features)
    if not config.standardize:  # which moves the origin
        _check_directions(task, parts)
    X, y, mask, groups = parts["train"]
    more = {"num_classes": len(task.labels)} if task.kind == "multiclass" else {}
    head = plan.make(task.kind).fit(X, y, mask, **more)
    rows = head.bank_rows_
    most = head.keep_within(groups[rows]) if config.select == "loo" else len(rows)
    val = {k: task.pool("val", scores) for k, scores in head.scores(parts["val"][0]).items()}
    if config.select == "loo":
        truth = Samples(y[rows], mask[rows], groups[rows], [])
        left = head.leave_one_out(groups[rows])
        quality = {k: macro_quality(task, scores, truth) for k, scores in left.items()}
    else:
        quality = {k: macro_quality(task, scores, task.truth("val")) for k, scores in val.items()}
    best = max(quality, key=lambda k: (quality[k], -k))
    notes, dropped = [], head.dropped_k_
    if plan.refit:
        both = Both.of(task, parts)
        X, (y, mask, _, _) = both.X, both.fitted
        head = plan.make(task.kind).set_params(k=best).fit(X, y, mask, **more)
        notes.append("tested with train and val as neighbours; k was chosen, and val is scored, with train alone")
    test = task.pool("test", head.scores(parts["test"][0])[best])
    numeric = task.kind in ("regression", "ordinal")
    deviations = plan.deviations(task, features, masked=int((~mask).sum()))
    choices: dict[str, Any] = {
        "k": best,
        "vote": plan.name,
        f"{config.select or 'val'}_{'r2' if numeric else 'auroc'}": {str(k): value for k, value in quality.items()},
        "at_edge": len(quality) > 1 and best in (min(quality), max(quality)),
        "dropped": list(dropped),
        "backend": head.backend_,
        "protocol_deviations": deviations,
    }
    if plan.vote != "mlknn":  # test rows a label, scored by prevalence
        choices["without_labelled_neighbour"] = head.unlabelled_[best].tolist()
    if dropped:
        outside = " outside the patient that has most" if config.select == "loo" else ""
        notes.append(f"k {', '.join(map(str, dropped))} left out: more than the {most} training rows{outside}")
    notes += [f"deviates from protocol {config.protocol}: {text}" for text in deviations]
    return Fitted(val[best], test, choices, 0, tuple(notes))


def _check_directions(task: Task, parts: dict[str, Any]) -> None:
    """Every row that is searched or searched with has a direction; the estimators know rows by number alone.

    Raises:
        TaskError: rows of zeros.
    """
    found = []
    for split, (X, _, mask, _) in parts.items():
        rows = np.flatnonzero(X[:, 0] == 0)
        rows = rows[~X[rows].any(1)]
        if split == "train":  # others are not in the bank
            rows = rows[mask[rows] if mask.ndim == 1 else mask[rows].any(1)]
        if len(rows):
            ids = task.samples(split, "train" if split == "train" else "eval").ids
            found += [(split, ids[row]) for row in rows]
    if found:
        split, name = found[0]
        raise TaskError(
            f"the features of {len(found)} sample{'s' if len(found) > 1 else ''} are zero, such as those of {name!r} "
            f"({split}), and have no direction to be near to: import features without them, which marks them failed, "
            "or give --standardize, or use `probes linear`"
        )
