"""Votes, leave-one-out, ties and devices of the kNN estimators against scikit-learn and brute force."""

import inspect
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import probe_conformance as conformance
import pyarrow.csv
import pytest
import torch
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor

import probes.neighbours
from featstore.errors import ConfigError, DeviceError, TaskError
from probes.knn import KNNProbe, KNNRegressor
from probes.mlknn import MLKNN
from probes.neighbours import build_index, distances, largest, ranked, rounding, unit_rows

CASES = {
    "majority": lambda: KNNProbe(k=15, vote="majority"),
    "distance": lambda: KNNProbe(k=15, vote="distance", backend="torch"),
    "standardised": lambda: KNNProbe(k=15, standardize=True),
    "mlknn": lambda: MLKNN(k=15),
    "mlknn-self": lambda: MLKNN(k=15, include_self=True, backend="torch"),
}


@pytest.mark.parametrize("check", conformance.CHECKS)
@pytest.mark.parametrize("case", CASES)
def test_conformance(check: Callable[[conformance.Case], None], case: str) -> None:
    """Among them: random labels give an AUROC of one half within three standard errors over 20 seeds."""
    check(conformance.Case(CASES[case], conformance.fit_knn, lambda probe, X: probe.predict_proba(X), 1e-4))


def blobs(num_rows: int = 240, width: int = 12, seed: int = 0, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    y = random.integers(0, classes, num_rows)
    centres = np.random.default_rng(9).standard_normal((classes, width))
    return (centres[y] + 1.5 * random.standard_normal((num_rows, width))).astype(np.float32), y


@pytest.mark.parametrize(("vote", "weights"), [("majority", "uniform"), ("distance", "distance")])
@pytest.mark.parametrize("standardize", [False, True])
def test_votes_equal_sklearns(vote: Any, weights: str, standardize: bool) -> None:
    X, y = blobs()
    queries = np.vstack([blobs(40, seed=1)[0], X[:5]])  # five stand in the bank, at distance 0
    probe = KNNProbe(k=(1, 7, 30), vote=vote, standardize=standardize).fit(X, y)
    bank, asked = X.astype(float), queries.astype(float)
    if standardize:
        bank, asked = (bank - bank.mean(0)) / bank.std(0), (asked - bank.mean(0)) / bank.std(0)
    for k, scores in probe.scores(queries).items():
        peer = KNeighborsClassifier(k, weights=weights, metric="cosine", algorithm="brute").fit(bank, y)
        # A distance that scikit-learn rounds to 1e-16 is 0 here; both leave nothing to the others.
        np.testing.assert_allclose(scores, peer.predict_proba(asked), atol=2e-5)
    numbers = np.random.default_rng(3).standard_normal((len(X), 2))
    found = KNNRegressor(k=7, vote=vote, standardize=standardize).fit(X, numbers).predict(queries)
    peer = KNeighborsRegressor(7, weights=weights, metric="cosine", algorithm="brute").fit(bank, numbers)
    np.testing.assert_allclose(found, peer.predict(asked), atol=1e-4)


def test_shares_are_renormalised_unless_told_otherwise() -> None:
    X, y = blobs()
    queries = blobs(30, seed=1)[0]
    shares, sums = (KNNProbe(k=(5, 50), renormalize=flag).fit(X, y).scores(queries) for flag in (True, False))
    for k in (5, 50):
        np.testing.assert_allclose(shares[k].sum(1), 1)
        np.testing.assert_allclose(sums[k] / sums[k].sum(1, keepdims=True), shares[k])
    assert (sums[5].sum(1) < 0.999).any()
    labels, mask = np.eye(4, dtype=int)[y], np.random.default_rng(0).random((len(y), 4)) < 0.5
    published = KNNProbe(k=50, renormalize=False).fit(X, labels, mask).scores(queries)[50]
    expected = KNNProbe(k=50, renormalize=False).fit(X, labels * mask).scores(queries)[50]
    kept = mask.any(1)
    if kept.all():
        np.testing.assert_allclose(published, expected)
    np.testing.assert_allclose(
        published, KNNProbe(k=50, renormalize=False).fit(X[kept], (labels * mask)[kept]).scores(queries)[50]
    )


def test_counts_up_to_the_whole_bank() -> None:
    X, y = blobs(90)
    probe = KNNProbe(k=(3, "all"), vote="majority").fit(X, y)
    assert (probe.ks_, probe.k_) == ((3, 90), 90)
    np.testing.assert_allclose(probe.scores(X[:4])[90], np.tile(probe.prevalence_, (4, 1)))
    assert MLKNN(k="all").fit(X, np.eye(4, dtype=int)[y]).ks_ == (89,)
    with pytest.raises(ConfigError, match="k must be counts or 'all', got 'most'"):
        KNNProbe(k="most").fit(X, y)
    with pytest.raises(ConfigError, match="vote is one of softmax, majority, distance, got 'loud'"):
        KNNProbe().set_params(vote="loud").fit(X, y)


def others(X: np.ndarray, groups: np.ndarray, row: int, k: int) -> list[int]:
    """Brute force: the k nearest rows outside the row's group, equal ones in order."""
    unit = unit_rows(X).astype(float)
    order = np.argsort(-np.round(unit @ unit[row], 12), kind="stable")
    return [int(other) for other in order if groups[other] != groups[row]][:k]


@pytest.mark.parametrize("backend", ["faiss", "torch"])
@pytest.mark.parametrize("grouped", [False, True])
def test_leave_one_out(backend: Any, grouped: bool) -> None:
    """The second half repeats the first: the row itself is left out, and its duplicate is its nearest neighbour."""
    half, classes = blobs(60)
    X, y = np.vstack([half, half]), np.concatenate([classes, 3 - classes])
    groups = np.arange(120) % 60 // 2 if grouped else np.arange(120)
    probe = KNNProbe(k=(1, 9), vote="majority", backend=backend).fit(X, y)
    found = probe.leave_one_out(groups if grouped else None)
    for k in (1, 9):
        expected = [np.bincount(y[others(X, groups, row, k)], minlength=4) / k for row in range(120)]
        np.testing.assert_allclose(found[k], expected)
    if not grouped:
        np.testing.assert_array_equal(found[1].argmax(1), y[(np.arange(120) + 60) % 120])
    numbers = KNNRegressor(k=9, vote="majority", backend=backend).fit(X, y.astype(float)).leave_one_out(groups)[9]
    np.testing.assert_allclose(numbers[:, 0], [y[others(X, groups, row, 9)].mean() for row in range(120)])


def test_leave_one_out_needs_other_rows() -> None:
    X, y = blobs(30)
    with pytest.raises(ConfigError, match=r"leave-one-out with k=20 needs as many rows .* 30 rows, 15 of them in one"):
        KNNProbe(k=20).fit(X, y).leave_one_out(np.arange(30) // 15)
    with pytest.raises(TaskError, match="leave-one-out needs the group of each of the bank's 30 rows, got 4"):
        KNNProbe(k=2).fit(X, y).leave_one_out(np.arange(4))
    with pytest.raises(TaskError, match="this KNNProbe is not fitted yet; call fit first"):
        KNNProbe().leave_one_out()
    assert list(KNNProbe().fit(X, y).leave_one_out(np.arange(30) // 15)) == [10]
    with pytest.raises(ConfigError, match=r"30 of them in one group; add samples of other groups"):
        KNNProbe(k="all").fit(X, y).leave_one_out(np.zeros(30))


@pytest.mark.parametrize(
    ("k", "counts", "dropped"),
    [(None, (10,), (20, 100, 200)), ("all", (15,), ()), ((4, "all"), (4, 15), ())],
    ids=str,
)
def test_counts_are_kept_to_those_that_leaving_groups_out_can_answer(k: Any, counts: Any, dropped: Any) -> None:
    """30 rows, two groups of 15."""
    X, y = blobs(30)
    groups = np.arange(30) // 15
    probe = KNNProbe(k=k, vote="majority").fit(X, y)
    assert tuple(probe.leave_one_out(groups)) == counts
    assert probe.keep_within(groups) == 15
    assert (probe.ks_, probe.k_, probe.dropped_k_) == (counts, counts[-1], dropped)
    assert tuple(probe.scores(X)) == counts
    # The rows outside a group are all that there are.
    if counts[-1] == 15:
        scores = probe.leave_one_out(groups)[15]
        for number in range(2):
            shares = np.bincount(y[groups != number], minlength=len(probe.classes_)) / 15
            np.testing.assert_allclose(scores[groups == number], np.tile(shares, (15, 1)))


def exact_neighbours(bank: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    """By loops over pairs in float64, ties by row."""
    result = []
    for query in queries.astype(float):
        values = [float(np.einsum("d,d->", row, query)) for row in bank.astype(float)]
        result.append(sorted(range(len(bank)), key=lambda row: (-values[row], row))[:k])
    return np.array(result)


@pytest.mark.parametrize("width", [7, 33, 768])
@pytest.mark.parametrize("piece", [None, 37])
def test_backends_agree_on_near_ties(width: int, piece: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row stands up to 40 times, some moved by one float32 step; the bank is searched whole or in pieces."""
    random = np.random.default_rng(width)
    rows = unit_rows(random.standard_normal((12, width)).astype(np.float32))
    bank = rows[random.permutation(np.repeat(np.arange(12), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 20, 40]))]
    moved = random.random(len(bank)) < 0.3
    bank[moved, 0] = np.nextafter(bank[moved, 0], np.float32(2))
    queries = unit_rows(np.vstack([rows[:6], random.standard_normal((6, width))]).astype(np.float32))
    if piece is not None:
        monkeypatch.setattr(probes.neighbours, "SCORE_BYTES", 4 * len(queries) * piece)
    for k in (1, 10, 30, len(bank)):
        expected = exact_neighbours(bank, queries, k)
        for backend in ("faiss", "torch"):
            similarity, found = ranked(build_index(bank, backend)[0], queries, k)  # type: ignore[arg-type]
            np.testing.assert_array_equal(found, expected)
            assert (np.diff(similarity) <= 0).all()


@pytest.mark.parametrize("width", [16, 768, 4096])
def test_rounding_covers_what_backends_differ_by(width: int) -> None:
    random = np.random.default_rng(0)
    rows = unit_rows((random.standard_normal((400, width)) + 1).astype(np.float32))  # all alike: products near 1
    exact = rows.astype(float) @ rows.astype(float).T
    for backend in ("faiss", "torch"):
        similarity, found = build_index(rows, backend)[0].nearest(rows, 400)  # type: ignore[arg-type]
        assert np.abs(similarity - np.take_along_axis(exact, found, 1)).max() < rounding(width) / 2


def test_distances_of_equal_rows_are_zero() -> None:
    rows = unit_rows(np.random.default_rng(0).standard_normal((9, 50)).astype(np.float32))
    found = distances(rows, rows, np.tile(np.arange(9), (9, 1)))
    assert (np.diag(found) == 0).all()
    np.testing.assert_allclose(found, 1 - rows.astype(float) @ rows.astype(float).T, atol=1e-7)


@pytest.mark.parametrize(("count", "k"), [(1, 1), (40, 40), (43, 10), (1000, 1), (1003, 7), (5000, 200)])
@pytest.mark.parametrize("ties", [False, True])
def test_partial_sort_by_groups_is_a_sort(count: int, k: int, ties: bool) -> None:
    values = np.random.default_rng(count).standard_normal((9, count)).astype(np.float32)
    values = np.round(values, 1) if ties else values
    best, columns = (part.numpy() for part in largest(torch.from_numpy(values), k))
    np.testing.assert_array_equal(best, -np.sort(-values, axis=1)[:, :k])
    np.testing.assert_array_equal(np.take_along_axis(values, columns, 1), best)
    assert all(len(set(row)) == k for row in columns.tolist())


class FaissWithGpu(types.ModuleType):
    """FAISS as its GPU build is called; `copies` are the indexes moved there, `searched` the k asked of them."""

    def __init__(self, gpus: int) -> None:
        super().__init__("faiss")
        self.gpus, self.searched = gpus, []  # type: ignore[var-annotated]
        self.IndexFlatIP, self.rev_swig_ptr = faiss.IndexFlatIP, faiss.rev_swig_ptr
        self.StandardGpuResources = object

    def get_num_gpus(self) -> int:
        return self.gpus

    def index_cpu_to_gpu(self, resources: object, device: int, index: Any) -> Any:
        assert device == 0

        def search(queries: np.ndarray, k: int) -> Any:
            assert k <= 2048
            self.searched.append(k)
            return index.search(queries, k)

        return types.SimpleNamespace(search=search)


def test_faiss_on_a_gpu_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for faiss-gpu; its selection is limited to 2,048 neighbours, beyond which the CPU answers."""
    X, y = blobs(3000, 4)
    expected = KNNProbe(k=(5, 2500)).fit(X, y).scores(X[:3])
    few = KNNProbe(k=5).fit(X, y).scores(X[:3])
    stand_in = FaissWithGpu(1)
    monkeypatch.setattr(probes.neighbours, "import_faiss", lambda: stand_in)
    for device in ("auto", "cuda"):
        probe = KNNProbe(k=(5, 2500), device=device).fit(X, y)  # type: ignore[arg-type]
        assert probe.backend_ == "faiss-gpu"
        np.testing.assert_array_equal(probe.scores(X[:3])[2500], expected[2500])
        assert stand_in.searched == []
    np.testing.assert_array_equal(KNNProbe(k=5).fit(X, y).scores(X[:3])[5], few[5])
    assert stand_in.searched == [5 + probes.neighbours.SPARE]
    assert KNNProbe(k=5, device="cpu").fit(X, y).backend_ == "faiss"
    monkeypatch.setattr(probes.neighbours, "import_faiss", lambda: FaissWithGpu(0))
    assert KNNProbe(k=5).fit(X, y).backend_ == "faiss"
    with pytest.raises(DeviceError, match="device='cuda' with FAISS needs faiss-gpu and a GPU that it sees"):
        KNNProbe(k=5, backend="faiss", device="cuda").fit(X, y)


def test_torch_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for CUDA: what goes to the device goes to the CPU, and is counted."""
    X, y = blobs()
    expected = KNNProbe(k=5).fit(X, y).scores(X[:9])[5]
    moved: list[str] = []
    to = torch.Tensor.to

    def fake(self: torch.Tensor, device: Any, *rest: Any) -> torch.Tensor:
        moved.append(str(device))
        return to(self, "cpu", *rest)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "to", fake)
    probe = KNNProbe(k=5, backend="torch", device="cuda").fit(X, y)
    assert (probe.backend_, moved) == ("torch-cuda", ["cuda"])
    np.testing.assert_allclose(probe.scores(X[:9])[5], expected, atol=1e-6)
    assert KNNProbe(k=5, device="cuda").fit(X, y).backend_ == "torch-cuda"  # of FAISS without a GPU and torch with one
    assert KNNProbe(k=5, backend="torch", device="cpu").fit(X, y).backend_ == "torch"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="device='cuda' needs a GPU, and torch sees none"):
        KNNProbe(k=5, backend="torch", device="cuda").fit(X, y)
    with pytest.raises(ConfigError, match="device is 'auto', 'cpu' or 'cuda', got 'tpu'"):
        inspect.unwrap(build_index)(unit_rows(X), "torch", "tpu")


@pytest.mark.parametrize("k", [(3,), (3, 40)])
def test_tiles_do_not_matter(k: Sequence[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded by tiles of queries; a bank far above it is answered alike."""
    X, y = blobs()
    expected = KNNProbe(k=k).fit(X, y).scores(X)
    monkeypatch.setattr("probes.bank.SCORE_BYTES", 1)
    for size, scores in KNNProbe(k=k).fit(X, y).scores(X).items():
        np.testing.assert_allclose(scores, expected[size], atol=1e-9)


@pytest.mark.realdata
def test_published_reference_results(shared_data: Path) -> None:
    """k = 11, cosine distance weights, train and val as neighbours, NIH images alone, test AUROC."""
    with np.load(shared_data / "features" / "cxr_mobilenetv2.npz", allow_pickle=False) as data:
        X, split = data["features"].astype(np.float32), data["split"]
    table = pyarrow.csv.read_csv(
        shared_data / "cxr" / "metadata.csv",
        convert_options=pyarrow.csv.ConvertOptions(column_types={"extra": "string"}),
    ).to_pylist()
    known = {"view": ("AP", 0.978), "sex": ("F", 0.863), "No_Finding": (1, 0.815), "Edema": (1, 0.818)}
    known |= {"Effusion": (1, 0.646), "Cardiomegaly": (1, 0.593)}
    nih = np.array([row["source"] == "nih" for row in table])
    for column, (value, reference) in known.items():
        y = np.array([row[column] == value for row in table]).astype(int)
        used = nih & np.array([row[column] is not None for row in table])
        library, test = used & (split != "test"), used & (split == "test")
        scores = KNNProbe(k=11, vote="distance").fit(X[library], y[library]).predict_proba(X[test])[:, 1]
        assert abs(roc_auc_score(y[test], scores) - reference) < 0.002, column
