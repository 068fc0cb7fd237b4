"""Probes against scikit-learn: the logistic sweep, exact kNN and the bootstrap, interleaved in one run.

scikit-learn is timed with one BLAS thread and with its default; the ratio quoted is to the better of the two. Its
logistic sweep and bootstrap are timed on a seeded share of the work and scaled up, as the names say.
"""

from collections.abc import Callable
from functools import partial

import harness
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_limits

from probes.knn import KNNProbe
from probes.logistic import DEFAULT_C, LogisticProbe
from probes.statistics import bootstrap


def make_features(count: int, width: int, num_labels: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Anisotropic features with a power-law spectrum, and labels of 2 to 40 % prevalence that depend on them."""
    rng = np.random.default_rng(seed)
    latent = rng.standard_normal((count, 64), dtype=np.float32)
    mixing = rng.standard_normal((64, width), dtype=np.float32) * np.arange(1, 65, dtype=np.float32)[:, None] ** -0.5
    X = latent @ mixing + 0.35 * rng.standard_normal((count, width), dtype=np.float32)
    scores = latent @ rng.standard_normal((64, num_labels)) / 4 + rng.standard_normal((count, num_labels))
    bounds = np.quantile(scores, 1 - np.geomspace(0.02, 0.4, num_labels), axis=0).diagonal()
    return X, (scores > bounds).astype(np.int64)


def one_thread(call: Callable[[], object]) -> None:
    with threadpool_limits(1):
        call()


def sklearn_sweep(X: np.ndarray, y: np.ndarray, jobs: list[tuple[int, float]]) -> None:
    for label, C in jobs:
        LogisticRegression(C=C, max_iter=1000).fit(X, y[:, label])


def sklearn_bootstrap(y: np.ndarray, scores: np.ndarray, resamples: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(resamples):
        rows = rng.integers(0, len(y), len(y))
        for label in range(y.shape[1]):
            roc_auc_score(y[rows, label], scores[rows, label])


def measure(
    ours: Callable[[], object], peer: Callable[[], object], share: float, repeats: int
) -> dict[str, dict[str, float]]:
    """Seconds and ratios, the peer's scaled up from `share` of the work."""
    calls = {"ours": ours, "scikit-learn, default threads": peer, "scikit-learn, 1 thread": partial(one_thread, peer)}
    seconds = harness.interleave(calls, repeats=repeats)
    scaled = {
        name: [value / (1.0 if name == "ours" else share) for value in values] for name, values in seconds.items()
    }
    best = min(scaled, key=lambda name: np.inf if name == "ours" else float(np.median(scaled[name])))
    return {
        "ours_seconds": harness.spread(scaled["ours"]),
        "peer_seconds": harness.spread(scaled[best]),
        "peer_time_over_ours": harness.ratios({"ours": scaled["ours"], best: scaled[best]}, "ours")[best],
    }


def main() -> None:
    options = harness.parser(__doc__ or "").parse_args()
    count, width, num_labels, resamples, repeats = (300, 16, 2, 10, 1) if options.quick else (5000, 384, 14, 1000, 3)
    X, y = make_features(count, width, num_labels)
    Z = (X - X.mean(0)) / X.std(0)
    grid = DEFAULT_C[::9] if options.quick else DEFAULT_C
    every = [(label, C) for label in range(num_labels) for C in grid]
    picked = [every[number] for number in np.random.default_rng(1).permutation(len(every))[: max(1, len(every) // 30)]]
    queries = X[: count // 5]
    scores = np.round(np.random.default_rng(2).standard_normal(y.shape) + y, 3)
    groups = np.arange(count) // 2
    results = {
        "logistic sweep, standardised (all labels x all C; peer: 1/30 of the fits)": measure(
            lambda: LogisticProbe(C=grid).fit(X, y, kind="multilabel"),
            lambda: sklearn_sweep(Z, y, picked),
            len(picked) / len(every),
            repeats,
        ),
        "kNN, 200 neighbours with vote (peer: search alone)": measure(
            lambda: KNNProbe(k=(10, 20, min(200, count))).fit(X, y).scores(queries),
            lambda: (
                NearestNeighbors(n_neighbors=min(200, count), algorithm="brute", metric="cosine")
                .fit(X)
                .kneighbors(queries)
            ),
            1.0,
            repeats,
        ),
        "bootstrap of four metrics (peer: AUROC alone, 1/100 of the resamples)": measure(
            lambda: bootstrap(y, scores, None, groups, kind="multilabel", num_resamples=resamples),
            lambda: sklearn_bootstrap(y, scores, max(1, resamples // 100)),
            max(1, resamples // 100) / resamples,
            repeats,
        ),
    }
    config = {
        "rows": count,
        "width": width,
        "labels": num_labels,
        "C": len(grid),
        "resamples": resamples,
        "repeats": repeats,
    }
    harness.report("probes", options, {"config": config, **results})


if __name__ == "__main__":
    main()
