"""Few-shot probes of many draws at once against a loop of scikit-learn fits on the same shots, interleaved in one run.

Both score the test rows. scikit-learn is timed with one BLAS thread and with its default; the ratio quoted is to the
better of the two. Its loop runs on a seeded share of the draws and is scaled up, as the names say.
"""

import resource
from collections.abc import Callable
from functools import partial
from typing import Any

import harness
import numpy as np
import torch
from bench_probes import make_features, measure
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestCentroid

from probes.fewshot_config import FewShotConfig
from probes.fewshot_heads import Space, fit_heads
from probes.logistic import DEFAULT_C
from probes.shots import Shots, ShotTable, pools
from probes.workers import worker_threads

BLOCK = 25  # draws solved and scored together


def ours(
    X: torch.Tensor, space: Space, queries: torch.Tensor, shots: Shots, config: FewShotConfig, K: int | None
) -> None:
    parts = [
        shots.take(np.arange(first, min(first + BLOCK, len(shots.rows)))) for first in range(0, len(shots.rows), BLOCK)
    ]

    def work(part: Shots) -> float:
        heads = fit_heads(X, space, part, config, num_classes=K, quality=None)
        assert heads.converged.all()
        return float(heads.scores(queries)[0, 0].sum())

    with worker_threads() as workers:
        list(workers.map(work, parts))


def theirs(X: np.ndarray, queries: np.ndarray, shots: Shots, draws: list[int], make: Callable[[], Any]) -> None:
    for draw in draws:
        model = make().fit(X[shots.rows[draw]], shots.y[draw])
        model.predict(queries) if isinstance(model, NearestCentroid) else model.decision_function(queries)


def grid_ours(X: torch.Tensor, space: Space, shots: Shots, grid: list[float]) -> None:
    from probes.fewshot_heads import _Batch
    from probes.fewshot_solvers import binary_logistic

    parts = [
        shots.take(np.arange(first, min(first + BLOCK, len(shots.rows)))) for first in range(0, len(shots.rows), BLOCK)
    ]

    def work(part: Shots) -> bool:
        batch = _Batch.of(X, space, part)
        strengths = torch.tensor(grid, dtype=torch.float64).expand(len(batch.y), -1)
        solved = binary_logistic(batch.K, batch.y.double(), batch.weight, strengths)
        torch.bmm(solved.a, batch.F)
        return bool(solved.converged.all())

    with worker_threads() as workers:
        assert all(workers.map(work, parts))


def grid_theirs(X: np.ndarray, shots: Shots, jobs: list[tuple[int, float]]) -> None:
    for draw, C in jobs:
        LogisticRegression(C=C, max_iter=1000).fit(X[shots.rows[draw]], shots.y[draw])


Case = tuple[Callable[[], object], Callable[[], object], float]


class Data:
    """Features, labels and classes with their draws, and the cases that are measured on them."""

    def __init__(self, count: int, queries: int, width: int, labels: int, repeats: int) -> None:
        self.X, self.y = make_features(count, width, labels)
        self.repeats, self.labels = repeats, labels
        self.space = Space.of(self.X, "standardize")
        self.Z = self.space.of_all(self.X).numpy()
        self.queries = self.space.of_all(make_features(queries, width, labels, seed=1)[0])
        self.rows = torch.from_numpy(self.X)
        self.random = np.random.default_rng(1)
        classes = (np.random.default_rng(5).standard_normal((count, 14)) + self.y[:, :1]).argmax(1)
        every, groups = np.ones(self.y.shape, dtype=bool), np.arange(count)
        found = pools(self.y, every, groups, "sample", num_classes=2)
        self.table = ShotTable.drawn(found, [str(label) for label in range(labels)], 16, repeats=repeats, seed=0)
        found = pools(classes, every[:, 0], groups, "sample", num_classes=14)
        self.classes = ShotTable.drawn(found, ["classes"], 16, repeats=repeats, seed=0)

    def case(self, config: FewShotConfig, shots: int, share: int, num_classes: int | None) -> Case:
        """(ours, the peer on one draw of `share`, that share)."""
        draws = (self.table if num_classes is None else self.classes).at(shots)
        picked = self.random.permutation(len(draws.rows))[: max(2, len(draws.rows) // share)].tolist()
        make = NearestCentroid if config.head == "ncm" else partial(LogisticRegression, max_iter=1000)
        return (
            partial(ours, self.rows, self.space, self.queries, draws, config, num_classes),
            partial(theirs, self.Z, self.queries.numpy(), draws, picked, make),
            len(picked) / len(draws.rows),
        )

    def grid_case(self, shots: int, grid: list[float], share: int) -> Case:
        draws = self.table.at(shots)
        every = [(draw, C) for draw in range(len(draws.rows)) for C in grid]
        picked = [every[number] for number in self.random.permutation(len(every))[: max(2, len(every) // share)]]
        return (
            partial(grid_ours, self.rows, self.space, draws, grid),
            partial(grid_theirs, self.Z, draws, picked),
            len(picked) / len(every),
        )


def main() -> None:
    parser = harness.parser(__doc__ or "")
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    options = parser.parse_args()
    sizes = (400, 200, 16, 2, 4) if options.quick else (20_000, 10_000, 768, 14, 100)
    data = Data(*sizes)
    grid = list(DEFAULT_C[::9] if options.quick else DEFAULT_C)
    cases: dict[str, Case] = {}
    for shots in (2, 4) if options.quick else (1, 4, 16):
        cases[f"logistic, {shots} shots (peer: 1/200 of the draws)"] = data.case(FewShotConfig(), shots, 200, None)
        cases[f"softmax, {shots} shots (peer: 1/50 of the draws)"] = data.case(FewShotConfig(), shots, 50, 14)
        if shots > 1:  # scikit-learn's class means warn of single rows
            head = FewShotConfig(head="ncm", scaling="standardize")
            cases[f"nearest class mean, {shots} shots (peer: 1/25 of the draws)"] = data.case(head, shots, 25, 14)
    shots = 4 if options.quick else 16
    cases[f"logistic, {shots} shots, whole C grid (fits alone; peer: 1/3000)"] = data.grid_case(shots, grid, 3000)
    results = {name: measure(*case, 1 if options.quick else 3) for name, case in cases.items() if options.only in name}
    config = dict(zip(("rows", "test", "width", "labels", "repeats"), sizes)) | {"C": len(grid)}
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    harness.report("fewshot", options, {"config": config, "peak_memory_bytes": memory, **results})


if __name__ == "__main__":
    main()
