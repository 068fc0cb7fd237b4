"""Exact kNN against scikit-learn's brute force, the vote against DINO's one-hot formula, and approximate indexes.

scikit-learn is timed with one BLAS thread and with its default; the ratio quoted is to the better of the two. All calls
of a part are timed in turn. The search alone, without putting near-equal similarities in order, is timed beside ours.
"""

from collections.abc import Callable
from functools import partial

import harness
import numpy as np
import torch
from bench_logistic import forget_peak, peak_gibibytes
from bench_probes import make_features, one_thread
from sklearn.neighbors import NearestNeighbors

from probes.ann import build_ann, recall
from probes.neighbours import Backend, build_index, import_faiss, ranked, unit_rows
from probes.votes import class_totals, softmax_weights

PARTS = ("search", "vote", "ann")
COUNTS = (10, 20, 100, 200)


def dino_vote(similarity: torch.Tensor, labels: torch.Tensor, num_classes: int) -> list[torch.Tensor]:
    """The published vote: softmax over all neighbours, one-hot times weight, sum over the first k."""
    weights = torch.softmax(similarity / 0.07, 1)
    votes = torch.nn.functional.one_hot(labels, num_classes) * weights[:, :, None]
    return [votes[:, :k].sum(1) for k in COUNTS]


def our_vote(similarity: np.ndarray, labels: np.ndarray, num_classes: int) -> list[np.ndarray]:
    return [total.copy() for total in class_totals(labels, softmax_weights(similarity, 0.07), num_classes, COUNTS)]


def against_best(seconds: dict[str, list[float]], ours: str, peers: tuple[str, ...]) -> dict[str, object]:
    """Spread of every call, and the ratio to the better of the peers."""
    best = min(peers, key=lambda name: float(np.median(seconds[name])))
    return {
        "seconds": {name: harness.spread(values) for name, values in seconds.items()},
        "better_peer": best,
        "peer_time_over_ours": harness.ratios({ours: seconds[ours], best: seconds[best]}, ours)[best],
    }


def run_search(quick: bool, repeats: int) -> dict[str, object]:
    """Index and search: 200 neighbours of 2,000 queries among 100,000 unit rows of 768."""
    count, width, num_queries, k = (300, 16, 20, 20) if quick else (100_000, 768, 2000, 200)
    X = make_features(count + num_queries, width, 1)[0]
    unit = unit_rows(X)
    bank, queries = unit[:count], unit[count:]

    def ours(backend: Backend) -> np.ndarray:
        return ranked(build_index(bank, backend, "cpu")[0], queries, k)[1]

    def sklearn_brute() -> np.ndarray:
        found = NearestNeighbors(n_neighbors=k, algorithm="brute", metric="euclidean").fit(bank)
        return np.asarray(found.kneighbors(queries, return_distance=False))

    def search_alone() -> object:
        flat = import_faiss().IndexFlatIP(width)
        flat.add(bank)
        return flat.search(queries, k)

    calls: dict[str, Callable[[], object]] = {
        "ours, faiss": partial(ours, "faiss"),
        "scikit-learn, default threads": sklearn_brute,
        "scikit-learn, 1 thread": partial(one_thread, sklearn_brute),
        "ours, torch": partial(ours, "torch"),
        "faiss alone": search_alone,
        "unit rows": partial(unit_rows, X),
    }
    before = forget_peak()
    same = float(np.mean(ours("faiss") == ours("torch")))
    grown = peak_gibibytes() - before
    seconds = harness.interleave(calls, repeats=repeats, warmup=0)
    return {
        "config": {"rows": count, "width": width, "queries": num_queries, "k": k},
        **against_best(seconds, "ours, faiss", ("scikit-learn, default threads", "scikit-learn, 1 thread")),
        "same_neighbours_faiss_torch": same,
        "gibibytes_above_features": grown,
        "gibibytes_of_features": X.nbytes / 2**30,
    }


def run_vote(quick: bool, repeats: int) -> dict[str, object]:
    """One batch of 256 queries with 200 neighbours, for four k at once."""
    result: dict[str, object] = {}
    rng = np.random.default_rng(0)
    for num_classes in (10,) if quick else (10, 100, 1000):
        similarity = -np.sort(-rng.random((256, 200), dtype=np.float32), axis=1)
        labels = rng.integers(0, num_classes, similarity.shape)
        peer = partial(dino_vote, torch.from_numpy(similarity), torch.from_numpy(labels), num_classes)
        mine = partial(our_vote, similarity, labels, num_classes)
        difference = max(float(np.abs(a - b.numpy()).max()) for a, b in zip(mine(), peer()))
        seconds = harness.interleave({"ours": mine, "DINO": peer}, repeats=1 if quick else 5 * repeats)
        result[f"classes {num_classes}"] = {
            **against_best(seconds, "ours", ("DINO",)),
            "largest_difference": difference,
        }
    return result


def run_ann(quick: bool, repeats: int) -> dict[str, object]:
    """Approximate indexes of `featstore search` on the same rows, one query at a time."""
    count, width = (400, 16) if quick else (50_000, 384)
    unit = unit_rows(make_features(count + 100, width, 1)[0])
    bank, queries = unit[:count], unit[count:]
    exact = build_index(bank, "faiss", "cpu")[0]

    def one_by_one(search: Callable[[np.ndarray, int], object]) -> None:
        for query in queries:
            search(query[None], 10)

    result: dict[str, object] = {}
    for kind in ("ivf", "hnsw"):
        index = build_ann(bank, kind)
        calls = {"ours": partial(one_by_one, index.search), "exact": partial(one_by_one, exact.nearest)}
        seconds = harness.interleave(calls, repeats=repeats)
        result[kind] = {
            **against_best(seconds, "ours", ("exact",)),
            "recall@10": recall(index, exact, queries, 10),
        }
    return result


def main() -> None:
    parser = harness.parser(__doc__ or "")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each call")
    options = parser.parse_args()
    runs = {"search": run_search, "vote": run_vote, "ann": run_ann}
    harness.report("knn", options, {part: runs[part](options.quick, options.repeats) for part in options.parts})


if __name__ == "__main__":
    main()
