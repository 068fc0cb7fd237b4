"""All probes against what one would use in their place, with the floors that must hold, interleaved in one run.

Peers (`probe_rivals.py`) run with one thread and with all; the ratio is to the better of the two. Where a peer's work
is too long, it does a share that is scaled up, as `share` says. Large logistic sweeps take four strengths at even
distances, a seeded label each; times at the strengths between are interpolated on logarithmic scales.
Parts by name with --only; a run of some parts is kept as stage `probes_part`.
"""

import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import harness
import numpy as np
import probe_rivals as rivals
import torch
from sklearn.exceptions import ConvergenceWarning

from probes.delong import auroc_intervals
from probes.fewshot_config import FewShotConfig
from probes.fewshot_heads import Space, _Batch, fit_heads
from probes.fewshot_solvers import binary_logistic
from probes.logistic import DEFAULT_C, LogisticProbe
from probes.neighbours import Backend, build_index, ranked, unit_rows
from probes.ridge import DEFAULT_ALPHA, RidgeProbe
from probes.sgd import Recipe, Targets, train_grid
from probes.shots import Shots, ShotTable, pools
from probes.statistics import resample
from probes.votes import class_totals, softmax_weights
from probes.workers import worker_threads

Call = Callable[[], object]
Rows = dict[str, dict[str, Any]]
RATES = tuple(lr * 128 / 256 for lr in (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1))
SMALL_STRATA = 12  # strengths that the peer is timed at where that is quick
BLOCK = 25  # few-shot draws solved and scored together


@dataclass(frozen=True)
class Sizes:
    """Rows and columns of every part."""

    sweep: tuple[int, int, int] = (100_000, 768, 14)
    softmax: tuple[int, int, int] = (20_000, 768, 10)
    small_softmax: tuple[tuple[int, int, int], ...] = ((300, 32, 30), (1000, 32, 100), (1000, 128, 10), (2000, 384, 3))
    single_rows: tuple[int, ...] = (100, 300, 1000, 3000, 10_000)
    single_widths: tuple[int, ...] = (32, 384, 1024)
    grid: tuple[float, ...] = DEFAULT_C
    strata: int = 4
    sgd: tuple[int, int, int, int] = (20_000, 768, 14, 100)  # rows, columns, labels, steps
    fewshot: tuple[int, int, int, int, int] = (20_000, 10_000, 768, 14, 100)  # rows, queries, columns, labels, draws
    shots: tuple[int, ...] = (1, 4, 16)
    bootstrap: tuple[int, int, int, int] = (20_000, 14, 1000, 5)  # rows, labels, resamples, those of the peer
    search: tuple[int, int, int, int] = (100_000, 768, 1000, 200)  # rows, columns, queries, neighbours
    ridge: tuple[int, int, int] = (20_000, 768, 14)
    repeats: int = 3


QUICK = Sizes(
    (300, 16, 2), (300, 16, 3), ((100, 8, 3),), (100,), (16,), DEFAULT_C[::9], 2, (300, 16, 2, 5),
    (400, 200, 16, 2, 4), (2, 4), (400, 3, 20, 2), (300, 16, 20, 20), (300, 16, 2), 1,
)  # fmt: skip


def make_features(count: int, width: int, num_labels: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Anisotropic features with a power-law spectrum, and labels of 2 to 40 % prevalence that depend on them."""
    rng = np.random.default_rng(seed)
    latent = rng.standard_normal((count, 64), dtype=np.float32)
    mixing = rng.standard_normal((64, width), dtype=np.float32) * np.arange(1, 65, dtype=np.float32)[:, None] ** -0.5
    X = latent @ mixing + 0.35 * rng.standard_normal((count, width), dtype=np.float32)
    scores = latent @ rng.standard_normal((64, num_labels)) / 4 + rng.standard_normal((count, num_labels))
    bounds = np.quantile(scores, 1 - np.geomspace(0.02, 0.4, num_labels), axis=0).diagonal()
    return X, (scores > bounds).astype(np.int64)


def forget_peak() -> float:
    """Memory held now, in GiB; from here on the system counts its peak anew (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(name)) / 2**20


def measure(
    ours: Call, peers: dict[str, Call], floor: float | None, *, repeats: int, share: float = 1.0
) -> dict[str, Any]:
    """One row: ours in turn with every peer at both thread settings, theirs scaled up from `share` of the work."""
    before = forget_peak()
    ours()
    grown = _status("VmHWM") - before
    calls = {"ours": ours}
    for name, peer in peers.items():
        calls |= {f"{name}, all threads": peer, f"{name}, 1 thread": partial(rivals.one_thread, peer)}
    seconds = harness.interleave(calls, repeats=repeats, warmup=0)
    return row(
        seconds.pop("ours"), {n: [v / share for v in values] for n, values in seconds.items()}, floor, grown, share
    )


def row(
    ours: list[float], peers: dict[str, list[float]], floor: float | None, gibibytes: float, share: float
) -> dict[str, Any]:
    """Seconds, and the ratio to the best of the peers; the floor holds where the median ratio is not below it."""
    best = min(peers, key=lambda name: float(np.median(peers[name])))
    ratio = harness.ratios({"ours": ours, best: peers[best]}, "ours")[best]
    return {
        "ours_seconds": harness.spread(ours),
        "peer": best,
        "peer_seconds": harness.spread(peers[best]),
        "peer_time_over_ours": ratio,
        "share": share,
        "floor": floor,
        "holds": None if floor is None else ratio["median"] >= floor,
        "ours_gibibytes": gibibytes,
    }


def timed(call: Call) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def sweep_row(
    fit: Callable[[], LogisticProbe], peer: Callable[[float], object], fits: int, floor: float, sizes: Sizes
) -> dict[str, Any]:
    """A whole grid of ours against `fits` fits of the peer per strength, timed at some strengths."""
    before = forget_peak()
    probes: list[LogisticProbe] = []
    ours = [timed(lambda: probes.append(fit())) for _ in range(2 if sizes.repeats > 1 else 1)]
    grown = _status("VmHWM") - before
    numbers = ((np.arange(sizes.strata) + 0.5) * len(sizes.grid) / sizes.strata).astype(int)
    settings: dict[str, Callable[[Call], object]] = {"1 thread": rivals.one_thread, "all threads": lambda call: call()}
    # The first strength, the quickest, decides how many threads the peer gets for the rest.
    first = {name: timed(lambda run=run: run(partial(peer, sizes.grid[numbers[0]]))) for name, run in settings.items()}
    best = min(first, key=lambda name: first[name])
    rest = [timed(lambda C=C: settings[best](partial(peer, C))) for C in (sizes.grid[n] for n in numbers[1:])]
    logs = np.log([first[best], *rest])
    whole = float(np.exp(np.interp(np.arange(len(sizes.grid)), numbers, logs)).sum()) * fits
    found = row(ours, {f"scikit-learn lbfgs, {best}": [whole] * len(ours)}, floor, grown, 1.0)
    return found | {
        "share": sizes.strata / (fits * len(sizes.grid)),
        "peer_seconds_at": dict(zip((f"{sizes.grid[n]:.3g}" for n in numbers), [first[best], *rest])),
        "converged": float(probes[0].converged_.mean()),
    }


def run_sweep(sizes: Sizes) -> Rows:
    """Every label at every strength, features as they come and standardised."""
    X, y = make_features(*sizes.sweep)
    num_labels = y.shape[1]
    label = iter(np.random.default_rng(1).integers(0, num_labels, 100))
    Z = ((X - X.mean(0)) / X.std(0)).astype(np.float32)
    found = {}
    for name, A, floor in (("raw", X, 100.0), ("standardised", Z, 40.0)):
        found[f"logistic, {num_labels} labels x {len(sizes.grid)} C, {name}"] = sweep_row(
            lambda name=name: LogisticProbe(C=sizes.grid, standardize=name != "raw").fit(X, y, kind="multilabel"),
            lambda C, A=A: rivals.logistic(A, y[:, int(next(label))], C),
            num_labels,
            floor,
            sizes,
        )
    return found


def run_softmax(sizes: Sizes) -> Rows:
    """A softmax at every strength, features as they come; on few rows weak penalties are the hard ones."""
    found = {}
    for count, width, num_classes in (sizes.softmax, *sizes.small_softmax):
        X, scores = make_features(count, width, num_classes)
        y = (np.random.default_rng(5).standard_normal(scores.shape) + 2 * scores).argmax(1)
        fit = partial(LogisticProbe(C=sizes.grid, standardize=False).fit, X, y, kind="multiclass")
        peer = partial(rivals.logistic, X, y)
        large = (count, width, num_classes) == sizes.softmax
        name = f"softmax, {num_classes} classes x {len(sizes.grid)} C" + ("" if large else f", {count} x {width}")
        how = sizes if large else replace(sizes, strata=min(SMALL_STRATA, len(sizes.grid)))
        found[name] = sweep_row(fit, peer, 1, 10.0 if large else 1.0, how)
    return found


def run_single(sizes: Sizes) -> Rows:
    """One label at C=1: the rarest and the most frequent, raw and standardised (both standardise within the fit)."""
    found = {}
    for count in sizes.single_rows:
        for width in sizes.single_widths:
            X, every = make_features(count, width, 4)
            every[0], every[1] = 1, 0
            for standardize, label in ((False, 0), (False, 3), (True, 0), (True, 3)):
                y = every[:, label]
                fit = partial(LogisticProbe(C=1.0, standardize=standardize).fit, X, y[:, None], kind="multilabel")
                peer = partial(rivals.scaled_logistic if standardize else rivals.logistic, X, y, 1.0)
                repeats = sizes.repeats * (3 if count * width < 1e6 else 1)
                kind = f"{'standardised' if standardize else 'raw'}, {'2 %' if label == 0 else '40 %'} positive"
                made = measure(fit, {"scikit-learn lbfgs": peer}, 1.0, repeats=repeats)
                Z = (X - X.mean(0)) / X.std(0) if standardize else X
                reached = rivals.objective(rivals.logistic(Z, y, 1.0), Z, y, 1.0)
                made["peer_objective_over_ours"] = reached / float(fit().objective_[0, 0])
                found[f"one fit, {count} x {width}, {kind}"] = made
    return found


def run_sgd(sizes: Sizes) -> Rows:
    """A step of 13 learning rates."""
    count, width, num_labels, steps = sizes.sgd
    X, y = make_features(count, width, num_labels)
    rows, target = torch.from_numpy(X), torch.from_numpy(y).float()
    ours = partial(
        train_grid, rows, Targets(target, num_labels), [(slice(None), RATES)], Recipe(iterations=steps, batch=128)
    )
    peer = partial(rivals.dino_heads, rows, target, RATES, 128, steps)
    made = measure(ours, {"DINO heads": peer}, 2.5, repeats=sizes.repeats)
    return {f"SGD, {len(RATES)} learning rates x {num_labels} labels, {steps} steps": made}


class Draws:
    """Features, labels and classes with their shots."""

    def __init__(self, sizes: Sizes) -> None:
        count, queries, width, labels, repeats = sizes.fewshot
        X, y = make_features(count, width, labels)
        self.space, self.rows = Space.of(X, "standardize"), torch.from_numpy(X)
        self.Z = self.space.of_all(X).numpy()
        self.queries = self.space.of_all(make_features(queries, width, labels, seed=1)[0])
        self.random = np.random.default_rng(1)
        self.num_classes = labels
        classes = (np.random.default_rng(5).standard_normal((count, labels)) + y[:, :1]).argmax(1)
        every, groups, most = np.ones(y.shape, dtype=bool), np.arange(count), max(sizes.shots)
        names = [str(label) for label in range(labels)]
        found = pools(y, every, groups, "sample", num_classes=2)
        self.labels = ShotTable.drawn(found, names, most, repeats=repeats, seed=0)
        found = pools(classes, every[:, 0], groups, "sample", num_classes=labels)
        self.classes = ShotTable.drawn(found, ["classes"], most, repeats=repeats, seed=0)

    def jobs(self, shots: Shots, grid: Sequence[float], count: int) -> tuple[list[tuple[int, float]], float]:
        """(seeded jobs (draw, C), strengths at even distances; their share of all)."""
        count = min(count, len(shots.rows) * len(grid))
        draws = self.random.integers(0, len(shots.rows), count).tolist()
        numbers = ((np.arange(count) + 0.5) * len(grid) / count).astype(int)
        return [(draw, grid[n]) for draw, n in zip(draws, numbers)], count / (len(shots.rows) * len(grid))


def solve_parts(shots: Shots, work: Callable[[Shots], bool]) -> None:
    firsts = range(0, len(shots.rows), BLOCK)
    parts = [shots.take(np.arange(first, min(first + BLOCK, len(shots.rows)))) for first in firsts]
    with worker_threads() as workers:
        assert all(workers.map(work, parts))


def run_fewshot(sizes: Sizes) -> Rows:
    """All draws of every label, or of classes, with the scores of the queries; and fits over the whole grid."""
    data, found = Draws(sizes), {}
    repeats = sizes.fewshot[-1]

    def fit(part: Shots, num_classes: int | None) -> bool:
        heads = fit_heads(data.rows, data.space, part, FewShotConfig(), num_classes=num_classes, quality=None)
        return bool(heads.converged.all()) and len(heads.scores(data.queries)) > 0

    def fit_grid(part: Shots) -> bool:
        batch = _Batch.of(data.rows, data.space, part)
        strengths = torch.tensor(sizes.grid, dtype=torch.float64).expand(len(batch.y), -1)
        solved = binary_logistic(batch.K, batch.y.double(), batch.weight, strengths)
        torch.bmm(solved.a, batch.F)
        return bool(solved.converged.all())

    for number in sizes.shots:
        for name, table, classes, count in (("binary", data.labels, None, 28), ("softmax", data.classes, 14, 4)):
            shots = table.at(number)
            jobs, share = data.jobs(shots, (1.0,), count)
            peer = partial(rivals.few_shot_loop, data.Z, data.queries.numpy(), shots, jobs)
            K = None if classes is None else data.num_classes
            ours = partial(solve_parts, shots, partial(fit, num_classes=K))
            made = measure(
                ours, {"scikit-learn lbfgs": peer}, 5.0 if number < 16 else 3.0, repeats=sizes.repeats, share=share
            )
            found[f"few-shot {name}, {number} shots x {repeats} draws"] = made
    shots = data.labels.at(sizes.shots[-1])
    jobs, share = data.jobs(shots, sizes.grid, 45)
    peer = partial(rivals.few_shot_loop, data.Z, None, shots, jobs)
    made = measure(
        partial(solve_parts, shots, fit_grid), {"scikit-learn lbfgs": peer}, 20.0, repeats=sizes.repeats, share=share
    )
    found[f"few-shot binary, {sizes.shots[-1]} shots x {repeats} draws x {len(sizes.grid)} C"] = made
    return found


def run_bootstrap(sizes: Sizes) -> Rows:
    """AUROC of all labels on the same resamples; DeLong's interval of the same scores has no floor."""
    count, num_labels, resamples, few = sizes.bootstrap
    rng = np.random.default_rng(0)
    y = (rng.random((count, num_labels)) < np.geomspace(0.01, 0.4, num_labels)).astype(np.int64)
    y[0], y[1] = 0, 1
    scores = np.round(rng.standard_normal(y.shape) + 1.2 * y, 3).astype(np.float32)
    groups, mask = np.arange(count), np.ones(y.shape, dtype=bool)

    def ours() -> np.ndarray:
        made = resample(y, scores, None, groups, kind="multilabel", num_resamples=resamples, metrics=("auroc",))
        return made.per_label["auroc"]

    peer = partial(rivals.bootstrap_loop, y, scores, groups, few)
    peers: dict[str, Call] = {"scikit-learn loop": peer}
    name = f"AUROC of {num_labels} labels, {count} rows, {resamples} resamples"
    made = measure(ours, peers, 40.0, repeats=sizes.repeats, share=few / resamples)
    made["largest_difference"] = float(np.nanmax(np.abs(ours()[:few] - peer())))
    names = tuple(str(label) for label in range(num_labels))
    delong = partial(auroc_intervals, y, scores, mask, groups, labels=names)
    return {name: made, f"DeLong in place of {name}": measure(delong, peers, None, repeats=1, share=few / resamples)}


def run_knn(sizes: Sizes) -> Rows:
    """Index and exact search, ties in order, and the vote of one batch for four k."""
    count, width, num_queries, k = sizes.search
    unit = unit_rows(make_features(count + num_queries, width, 1)[0])
    bank, queries = unit[:count], unit[count:]

    def ours(backend: Backend) -> np.ndarray:
        return ranked(build_index(bank, backend, "cpu")[0], queries, k)[1]

    found = {}
    title = f"kNN, {k} of {count} x {width}"
    brute = partial(rivals.brute_neighbours, bank, queries, k)
    product = partial(rivals.product_and_topk, bank, queries, k)
    found[title] = measure(partial(ours, "auto"), {"scikit-learn brute": brute}, 1.8, repeats=sizes.repeats)
    found[title]["same_neighbours"] = float(np.mean(ours("auto") == brute()))
    found[f"{title}, torch's product and topk"] = measure(
        partial(ours, "auto"), {"torch": product}, 1.2, repeats=sizes.repeats
    )
    rng = np.random.default_rng(0)
    for num_classes in (10,) if sizes.repeats == 1 else (100, 1000):
        similarity = -np.sort(-rng.random((256, 200), dtype=np.float32), axis=1)
        labels = rng.integers(0, num_classes, similarity.shape)

        def vote(similarity: np.ndarray, labels: np.ndarray, num_classes: int) -> list[np.ndarray]:
            weights = softmax_weights(similarity, 0.07)
            return [total.copy() for total in class_totals(labels, weights, num_classes, rivals.VOTE_COUNTS)]

        mine = partial(vote, similarity, labels, num_classes)
        peer = partial(rivals.dino_vote, torch.from_numpy(similarity), torch.from_numpy(labels), num_classes)
        floor = 20.0 if num_classes == 1000 else None
        made = measure(mine, {"DINO one-hot": peer}, floor, repeats=3 * sizes.repeats)
        made["largest_difference"] = max(float(np.abs(a - b.numpy()).max()) for a, b in zip(mine(), peer()))
        found[f"kNN vote, {num_classes} classes"] = made
    return found


def run_ridge(sizes: Sizes) -> Rows:
    """Every target at 45 strengths."""
    X, y = make_features(*sizes.ridge)
    targets = 2.0 * y - 1
    alphas = DEFAULT_ALPHA
    ours = partial(RidgeProbe(alpha=alphas, standardize=False).fit, X, targets)
    few = tuple(alphas[:: max(1, len(alphas) // 5)])
    peer = partial(rivals.ridge_loop, X, targets, few)
    made = measure(ours, {"scikit-learn Ridge": peer}, 10.0, repeats=sizes.repeats, share=len(few) / len(alphas))
    return {f"ridge, {y.shape[1]} targets x {len(alphas)} strengths": made}


PARTS: dict[str, Callable[[Sizes], Rows]] = {
    "sweep": run_sweep,
    "softmax": run_softmax,
    "single": run_single,
    "sgd": run_sgd,
    "fewshot": run_fewshot,
    "bootstrap": run_bootstrap,
    "knn": run_knn,
    "ridge": run_ridge,
}


def main() -> None:
    parser = harness.parser(__doc__ or "")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="parts to run")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each call")
    options = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)
    sizes = QUICK if options.quick else replace(Sizes(), repeats=options.repeats)
    results: dict[str, Any] = {}
    for name in options.only:
        found = PARTS[name](sizes)
        for case, made in found.items():
            print(f"{case}: {made['peer_time_over_ours']['median']:.3g}x, floor {made['floor']}", file=sys.stderr)
        results |= found
    config = {
        "threads": torch.get_num_threads(),
        "missed": [n for n, made in results.items() if made["holds"] is False],
    }
    stage = "probes" if set(options.only) == set(PARTS) else "probes_part"
    harness.report(stage, options, {"config": config, **results})


if __name__ == "__main__":
    main()
