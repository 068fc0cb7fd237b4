"""k nearest neighbours from a task to scores: k chosen on validation, or by leaving patients out of train."""

from typing import Any

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
    X, y, mask, groups = parts["train"]
    more = {"num_classes": len(task.labels)} if task.kind == "multiclass" else {}
    head = plan.make(task.kind).fit(X, y, mask, **more)
    val = {k: task.pool("val", scores) for k, scores in head.scores(parts["val"][0]).items()}
    if config.select == "loo":
        rows = head.bank_rows_
        truth = Samples(y[rows], mask[rows], groups[rows], [])
        quality = {
            k: macro_quality(task, scores, truth) for k, scores in head.leave_one_out(groups[rows]).items() if k in val
        }
    else:
        quality = {k: macro_quality(task, scores, task.truth("val")) for k, scores in val.items()}
    best = max(quality, key=lambda k: (quality[k], -k))
    notes, dropped, num_train = [], head.dropped_k_, len(X)
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
        notes.append(f"k {', '.join(map(str, dropped))} left out: more than the {num_train} training rows")
    notes += [f"deviates from protocol {config.protocol}: {text}" for text in deviations]
    return Fitted(val[best], test, choices, 0, tuple(notes))
