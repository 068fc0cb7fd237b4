"""Bootstrap, DeLong and a paired comparison against loops over scikit-learn, interleaved in one run.

The task is the one of the floors: 14 labels of 1 to 40 % prevalence, 20,000 rows, scores with ties, 1,000 resamples.
Peers are timed on a share of the resamples and scaled up, as the names say. All with one thread.
"""

import resource
from collections.abc import Callable

import harness
import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score
from threadpoolctl import threadpool_limits

from probes.delong import auroc_intervals
from probes.draws import Draws
from probes.metrics import METRICS
from probes.paired import Criteria, Pair, compare_pair
from probes.statistics import resample


def make_scores(num_rows: int, num_labels: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    y = (rng.random((num_rows, num_labels)) < np.geomspace(0.01, 0.4, num_labels)).astype(np.int64)
    y[0], y[1] = 0, 1
    return y, np.round(rng.standard_normal(y.shape) + 1.2 * y, 3).astype(np.float32)


def loop(y: np.ndarray, scores: np.ndarray, groups: np.ndarray, resamples: int, both: bool) -> np.ndarray:
    """AUROC (and average precision) of every label on the repeated rows of the same resamples."""
    draws = Draws.of(groups, num_resamples=resamples, seed=0)
    columns = draws.columns(groups)
    found = np.full((resamples, y.shape[1]), np.nan)
    for number, counts in enumerate(draws.counts):
        rows = np.repeat(np.arange(len(y)), counts[columns])
        for label in range(y.shape[1]):
            if 0 < y[rows, label].sum() < len(rows):
                found[number, label] = roc_auc_score(y[rows, label], scores[rows, label])
                if both:
                    average_precision_score(y[rows, label], scores[rows, label])
    return found


def main() -> None:
    options = harness.parser(__doc__ or "").parse_args()
    num_rows, num_labels, resamples, share, repeats = (400, 3, 20, 2, 1) if options.quick else (20_000, 14, 1000, 5, 3)
    y, scores = make_scores(num_rows, num_labels)
    other = scores + np.round(np.random.default_rng(1).standard_normal(y.shape), 3).astype(np.float32)
    rows = np.arange(num_rows)
    patients = rows // 2
    mask = np.ones(y.shape, dtype=bool)
    names = tuple(str(label) for label in range(num_labels))
    pair = Pair(tuple(map(str, rows)), patients, names, "multilabel", y, mask, scores, other)

    def ours(groups: np.ndarray, metrics: tuple[str, ...]) -> np.ndarray:
        found = resample(y, scores, None, groups, kind="multilabel", num_resamples=resamples, metrics=metrics)  # type: ignore[arg-type]
        return found.per_label["auroc"]

    calls: dict[str, Callable[[], object]] = {
        "AUROC, by row": lambda: ours(rows, ("auroc",)),
        "AUROC, by patient": lambda: ours(patients, ("auroc",)),
        "all seven metrics, by patient": lambda: ours(patients, METRICS),
        "AUROC and average precision, by patient": lambda: ours(patients, ("auroc", "auprc")),
        "paired comparison of two models": lambda: compare_pair(pair, Criteria(num_resamples=resamples)),
        "DeLong, by patient": lambda: auroc_intervals(y, scores, mask, patients, labels=names),
        "draw the table": lambda: Draws.of(patients, num_resamples=resamples),
        "scikit-learn AUROC": lambda: loop(y, scores, patients, share, False),
        "scikit-learn AUROC and average precision": lambda: loop(y, scores, patients, share, True),
    }
    with threadpool_limits(1):
        first = ours(patients, ("auroc",))[:share]
        difference = float(np.nanmax(np.abs(first - loop(y, scores, patients, share, False))))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        seconds = harness.interleave(calls, repeats=repeats, warmup=1)
    peers = [name for name in calls if name.startswith("scikit-learn")]
    scaled = {
        name: [value * (resamples / share if name in peers else 1) for value in values]
        for name, values in seconds.items()
    }
    results = {
        "config": {
            "rows": num_rows, "labels": num_labels, "resamples": resamples, "peer resamples": share, "repeats": repeats,
            "threads": 1,
        },
        "seconds": {name: harness.spread(values) for name, values in scaled.items()},
        "scikit-learn AUROC over ours": {
            name: harness.ratios({name: scaled[name], peers[0]: scaled[peers[0]]}, name)[peers[0]]
            for name in calls
            if name not in peers
        },
        "scikit-learn both over ours": harness.ratios(
            {"ours": scaled["AUROC and average precision, by patient"], "peer": scaled[peers[1]]}, "ours"
        )["peer"],
        "largest difference to scikit-learn": difference,
        "peak memory above the start, MB": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3,
    }  # fmt: skip
    harness.report("statistics", options, results)


if __name__ == "__main__":
    main()
