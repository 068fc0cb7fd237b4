"""The logistic solver against scikit-learn: the sweep over labels and strengths, a softmax, and a grid of small sizes.

scikit-learn runs lbfgs at its default tolerance, up to 1,000 iterations, with one BLAS thread and with its default;
the ratio quoted is to the better of the two. Of the large sweeps it solves a seeded share, taken evenly over the
strengths, which is scaled up. Small sizes are timed in turn, so that drift of the machine hits both alike.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import harness
import numpy as np
from bench_probes import make_features, one_thread
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from probes.logistic import DEFAULT_C, LogisticProbe

PARTS = ("grid", "sweep", "softmax", "chest")
Job = tuple[int, float]  # label and strength


def sklearn_fits(X: np.ndarray, y: np.ndarray, jobs: list[Job]) -> None:
    for label, C in jobs:
        LogisticRegression(C=C, max_iter=1000).fit(X, y[:, label])


def sklearn_softmax(X: np.ndarray, y: np.ndarray, jobs: list[float]) -> None:
    for C in jobs:
        LogisticRegression(C=C, max_iter=1000).fit(X, y)


def seconds_of(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def fit_binary(X: np.ndarray, y: np.ndarray, grid: tuple[float, ...], standardize: bool) -> LogisticProbe:
    return LogisticProbe(C=grid, standardize=standardize).fit(X, y, kind="multilabel")


def standardised(X: np.ndarray) -> np.ndarray:
    result: np.ndarray = ((X - X.mean(0)) / X.std(0)).astype(np.float32)
    return result


def forget_peak() -> float:
    """Memory held now, in GiB; from here on the system counts its peak anew (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak_gibibytes() -> float:
    return _status("VmHWM")


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(name)) / 2**20


def spread_jobs(num_labels: int, grid: tuple[float, ...], count: int) -> list[Job]:
    """`count` strengths at even distances in the grid, each with a seeded label."""
    labels = np.random.default_rng(1).integers(0, num_labels, count)
    numbers = (np.arange(count) + 0.5) * len(grid) / count
    return [(int(label), grid[int(number)]) for label, number in zip(labels, numbers)]


def compare(ours: Callable[[], LogisticProbe], peer: Callable[[], object], scale: float) -> dict[str, object]:
    """One run of ours, one of the peer at each thread setting; `scale` is all its work over the share it does."""
    before = forget_peak()
    probes: list[LogisticProbe] = []
    mine = seconds_of(lambda: probes.append(ours()))
    grown = peak_gibibytes() - before
    default, single = seconds_of(peer) * scale, seconds_of(partial(one_thread, peer)) * scale
    return {
        "ours_seconds": mine,
        "peer_seconds": {"default threads": default, "1 thread": single},
        "peer_time_over_ours": min(default, single) / mine,
        "converged": float(probes[0].converged_.mean()),
        "gibibytes_above_features": grown,
    }


def run_grid(quick: bool) -> dict[str, object]:
    """Every size: rows x columns x labels x strengths, on standardised features, in turn with the peer."""
    rows, widths, labels = ((100,), (16,), (1,)) if quick else ((100, 300, 1000, 5000), (32, 384, 1024), (1, 14))
    result: dict[str, object] = {}
    for count in rows:
        for width in widths:
            X, y = make_features(count, width, 14)
            y[0], y[1] = 1, 0
            Z = standardised(X)
            for num_labels in labels:
                for grid in ((1.0,), DEFAULT_C[:: 9 if quick else 1]):
                    columns = y[:, 7 : 7 + num_labels] if num_labels == 1 else y
                    total = num_labels * len(grid)
                    share = min(total, 9 if count * width > 10**6 else 15)
                    jobs = spread_jobs(num_labels, grid, share)
                    peer = partial(sklearn_fits, Z, columns, jobs)
                    calls: dict[str, Callable[[], object]] = {
                        "ours": partial(fit_binary, X, columns, grid, True),
                        "peer": peer,
                        "peer, 1 thread": partial(one_thread, peer),
                    }
                    seconds = harness.interleave(calls, repeats=1 if quick or count * width > 10**6 else 5)
                    middle = {name: float(np.median(values)) for name, values in seconds.items()}
                    best = min(middle["peer"], middle["peer, 1 thread"]) * total / share
                    name = f"rows {count}, width {width}, labels {num_labels}, strengths {len(grid)}"
                    result[name] = {
                        "ours_ms": 1e3 * middle["ours"],
                        "peer_ms": 1e3 * best,
                        "peer_time_over_ours": best / middle["ours"],
                    }
    return result


def run_sweep(quick: bool, share: int) -> dict[str, object]:
    """Fourteen labels at 45 strengths, features as they come and standardised."""
    count, width, num_labels = (300, 16, 2) if quick else (100_000, 768, 14)
    grid = DEFAULT_C[:: 9 if quick else 1]
    X, y = make_features(count, width, num_labels)
    jobs = spread_jobs(num_labels, grid, min(share, len(grid)))
    scale = num_labels * len(grid) / len(jobs)
    result: dict[str, object] = {}
    for name, standardize in (("raw", False), ("standardised", True)):
        Z = standardised(X) if standardize else X
        result[name] = compare(partial(fit_binary, X, y, grid, standardize), partial(sklearn_fits, Z, y, jobs), scale)
    return result


def run_softmax(quick: bool, share: int) -> dict[str, object]:
    """Ten classes at 45 strengths."""
    count, width, num_classes = (300, 16, 3) if quick else (20_000, 768, 10)
    grid = DEFAULT_C[:: 9 if quick else 1]
    X, scores = make_features(count, width, 1)[0], np.random.default_rng(2).standard_normal((count, num_classes))
    mixing = np.random.default_rng(3).standard_normal((width, num_classes)) / np.sqrt(width)
    y = (X @ mixing + scores).argmax(1)
    jobs = [C for _, C in spread_jobs(1, grid, min(share, len(grid)))]
    probe = LogisticProbe(C=grid)
    return compare(
        lambda: probe.fit(X, y, kind="multiclass"),
        partial(sklearn_softmax, standardised(X), y, jobs),
        len(grid) / len(jobs),
    )


def run_chest(quick: bool) -> dict[str, object]:
    """A task of CheXpert's size; ours alone."""
    X, y = make_features(*((500, 16, 2) if quick else (181_000, 1024, 14)))
    before = forget_peak()
    probes: list[LogisticProbe] = []
    seconds = seconds_of(lambda: probes.append(fit_binary(X, y, DEFAULT_C[:: 9 if quick else 1], True)))
    return {
        "ours_seconds": seconds,
        "converged": float(probes[0].converged_.mean()),
        "gibibytes_above_features": peak_gibibytes() - before,
    }


def main() -> None:
    parser: argparse.ArgumentParser = harness.parser(__doc__ or "")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--share", type=int, default=9, help="strengths of a large sweep that the peer solves")
    options = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)
    runs: dict[str, Callable[[], dict[str, object]]] = {
        "grid": partial(run_grid, options.quick),
        "sweep": partial(run_sweep, options.quick, options.share),
        "softmax": partial(run_softmax, options.quick, options.share),
        "chest": partial(run_chest, options.quick),
    }
    harness.report("logistic", options, {part: runs[part]() for part in PARTS if part in options.parts})


if __name__ == "__main__":
    main()
