"""`probes knn` with its options: what each does to a record, its table, and what is refused."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from probe_sets import by_patient, two_label_store, write_set
from sklearn.metrics import roc_auc_score

from featstore.errors import ConfigError, TaskError
from featstore.store.catalog import Store
from probes.configs import EvalConfig, KnnConfig, TaskConfig
from probes.evaluation import evaluate_sets
from probes.knn import KNNProbe
from probes.knn_fit import fit_knn
from probes.knn_protocols import Plan
from probes.mlknn import MLKNN
from probes.records import load_predictions
from probes.report import tables
from probes.retrieval import search, stored_vector
from probes.tasks import choose_task, make_task


@pytest.fixture
def store(tmp_path: Path, store_path: Path) -> Store:
    return two_label_store(store_path, tmp_path / "x")


def run(store: Store, head: KnnConfig, labels: str = "a,b", **reading: Any) -> dict[str, Any]:
    config = EvalConfig(dataset="x", labels=labels, features="cls", resamples=20)
    return evaluate_sets(store, "knn", config, head, reading=TaskConfig(**reading))[0]


def task_of(store: Store, labels: tuple[str, ...] = ("a", "b")) -> Any:
    features = store.set("x/m")
    return make_task(features, choose_task(features.manifest, labels=labels))


def kept_scores(record: dict[str, Any]) -> np.ndarray:
    columns = load_predictions(record).to_pydict()
    rows = [number for number, split in enumerate(columns["split"]) if split == "test"]
    return np.array([[columns[f"score:{name}"][row] for name in ("a", "b")] for row in rows])


@pytest.mark.parametrize(
    ("head", "make", "named"),
    [
        (KnnConfig(k="9"), lambda: KNNProbe(k=9), "softmax vote, T=0.07"),
        (KnnConfig(k="9", temperature=0.5), lambda: KNNProbe(k=9, temperature=0.5), "softmax vote, T=0.5"),
        (KnnConfig(k="9", vote="majority"), lambda: KNNProbe(k=9, vote="majority"), "majority vote"),
        (
            KnnConfig(k="9", vote="distance", standardize=True, backend="torch"),
            lambda: KNNProbe(k=9, vote="distance", standardize=True),
            "distance-weighted vote, standardised",
        ),
        (KnnConfig(k="9", vote="mlknn"), lambda: MLKNN(k=9), "ML-kNN, s=1, without self-neighbour"),
        (
            KnnConfig(k="9", vote="mlknn", smoothing=0.5, self_neighbour=True),
            lambda: MLKNN(k=9, smoothing=0.5, include_self=True),
            "ML-kNN, s=0.5, with self-neighbour",
        ),
        (
            KnnConfig(k="9", protocol="dino", device="cpu"),
            lambda: KNNProbe(k=9, renormalize=False),
            "softmax vote, T=0.07, protocol dino",
        ),
    ],
)
def test_every_option_reaches_the_scores(store: Store, head: KnnConfig, make: Any, named: str) -> None:
    record = run(store, head)
    task = task_of(store)
    X, y, mask, _, _ = task.arrays("train", "cls")
    expected = make().fit(X, y, mask).scores(task.arrays("test", "cls")[0])[9]
    np.testing.assert_allclose(kept_scores(record), expected, atol=1e-6)
    assert record["choices"]["vote"] == named
    assert record["choices"]["k"] == 9
    assert record["choices"]["backend"] == ("torch" if head.backend else "faiss")
    assert record["config"]["head"]["vote"] == head.vote


def test_records_of_other_votes_are_not_ranked_together(store: Store) -> None:
    made = [run(store, KnnConfig(k="9", vote=vote)) for vote in ("majority", "distance")]  # type: ignore[arg-type]
    assert len(tables(made)) == 2


def test_leaving_patients_out_chooses_k(store: Store) -> None:
    """The quality of each k is that of rows scored by other patients; the truth is counted by hand."""
    record = run(store, KnnConfig(k="1,5,30", select="loo"))
    task = task_of(store)
    X, y, mask, groups, _ = task.arrays("train", "cls")
    unit = X / np.linalg.norm(X, axis=1, keepdims=True)
    for k in (1, 5, 30):
        scores = np.zeros(y.shape)
        for row in range(len(X)):
            order = [r for r in np.argsort(-(unit @ unit[row]), kind="stable") if groups[r] != groups[row]][:30]
            weights = np.exp((unit[order] @ unit[row]) / 0.07)[:k]
            for label in range(2):
                known = mask[order[:k], label]
                prior = y[mask[:, label], label].mean()
                share = (
                    (weights * known * (y[order[:k], label] == 1)).sum() / (weights * known).sum()
                    if known.any()
                    else prior
                )
                scores[row, label] = share
        macro = np.mean([roc_auc_score(y[mask[:, c], c], scores[mask[:, c], c]) for c in range(2)])
        assert record["choices"]["loo_auroc"][str(k)] == pytest.approx(macro, abs=1e-6)
    best = max((1, 5, 30), key=lambda k: record["choices"]["loo_auroc"][str(k)])
    assert record["choices"]["k"] == best


def test_refit_takes_validation_rows_as_neighbours_of_the_test_alone(store: Store) -> None:
    plain, refit = (run(store, KnnConfig(k="3,9", refit=flag)) for flag in (False, True))
    assert refit["choices"]["val_auroc"] == plain["choices"]["val_auroc"]
    assert refit["metrics"]["val"] == plain["metrics"]["val"]
    assert any("tested with train and val as neighbours" in note for note in refit["notes"])
    task = task_of(store)
    parts = [task.arrays(split, "cls")[:3] for split in ("train", "val")]
    X, y, mask = (np.concatenate(pair) for pair in zip(*parts))
    k = refit["choices"]["k"]
    expected = KNNProbe(k=k).fit(X, y, mask).scores(task.arrays("test", "cls")[0])[k]
    np.testing.assert_allclose(kept_scores(refit), expected, atol=1e-6)


def test_deviations_from_protocols_are_listed(store: Store) -> None:
    record = run(store, KnnConfig(k="9", protocol="dino", temperature=0.1, select="loo", refit=True))
    assert record["choices"]["protocol_deviations"] == [
        "preprocessing of imported features unknown",
        *([] if store.set("x/m").spec["identity"]["stored_dtype"] == "float32" else ["features rounded to float16 in "
          "the store; published neighbours are of what the network gives"]),
        "k from 9 in place of 10,20,100,200",
        "one k, chosen on leave-one-patient-out on train, is tested; the protocol reports every k",
        "temperature 0.1 in place of 0.07",
        "train and val as the library in place of train",
        f"{sum(record['num_masked'][split] for split in ('train', 'val'))} masked label entries of the library count "
        "as absent; the protocol has none",
    ]  # fmt: skip
    assert f"deviates from protocol dino: {record['choices']['protocol_deviations'][1]}" in record["notes"]
    radiology = run(store, KnnConfig(protocol="radiology", smoothing=2.0, standardize=True))
    assert radiology["choices"]["vote"] == "ML-kNN, s=2, with self-neighbour, standardised, protocol radiology"
    found = radiology["choices"]["protocol_deviations"]
    assert {"standardised features", "smoothing 2 in place of 1"} <= set(found)
    assert "k chosen on val; the k behind the published table is not known" in found
    assert any("tested with train and val" in note for note in radiology["notes"])
    numbers = run(store, KnnConfig(k="9", protocol="dino"), labels="age", kind="regression")
    assert "weighted mean of numbers; the protocol has classes only" in numbers["choices"]["protocol_deviations"]
    assert run(store, KnnConfig(k="9"))["choices"]["protocol_deviations"] == []


def test_sets_and_units_that_are_not_as_published_are_listed(store: Store) -> None:
    task = task_of(store)
    images = {"geometry": "squash", "height": 98, "width": 224, "intensity": "native", "mean": [0.5], "std": [0.5]}
    task.features.spec["identity"] |= {"preprocess": images, "stored_dtype": "float16"}
    task = dataclasses.replace(task, spec=dataclasses.replace(task.spec, unit="study", pool="features"))
    geometry = "geometry squash at 98x224 in place of short side 256, centre crop 224"
    rounded = "features rounded to float16 in the store; published neighbours are of what the network gives"
    dino = Plan.of(KnnConfig(protocol="dino"))
    mean = "mean [0.5] and std [0.5] in place of ImageNet's"
    assert dino.deviations(task, "cls", masked=0)[:4] == [geometry, mean, rounded, "features averaged per study"]
    images |= {"geometry": "dino", "height": 224, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    task.features.spec["identity"]["stored_dtype"] = "float32"
    one_k = "one k, chosen on val, is tested; the protocol reports every k"
    assert dino.deviations(task, "cls", masked=0) == ["features averaged per study", one_k]
    radiology = Plan.of(KnnConfig(protocol="radiology"))
    asked = "published: featstore extract --published dinov2-radiology"
    chosen = "k chosen on val; the k behind the published table is not known"
    found = radiology.deviations(task, "cls", masked=0)
    assert found == [f"images: geometry dino at 224x224, intensity native; {asked}", chosen]
    images["geometry"] = "squash"
    task.features.spec["published"] = {"name": "dinov2-radiology", "deviations": ["antialiased", "its kNN differs"]}
    task = dataclasses.replace(task, spec=dataclasses.replace(task.spec, pool="mean"))
    assert radiology.deviations(task, "cls", masked=0) == [
        "geometry squash at 224x224 in place of short side 256, centre crop 224",
        "images: antialiased",
        "mean of the scores of images per study; published: features are averaged before the head (--pool features)",
        chosen,
    ]


def test_counts_may_name_the_whole_library(store: Store) -> None:
    record = run(store, KnnConfig(k="5,all", vote="majority"))
    assert sorted(record["choices"]["val_auroc"], key=int) == ["5", str(record["task"]["splits"]["train"])]
    # The whole library says the same of every query.
    assert record["choices"]["val_auroc"][str(record["task"]["splits"]["train"])] == pytest.approx(0.5)


@pytest.mark.parametrize(("k", "tried"), [(None, ["5"]), ("all", ["5"]), ("2,all", ["2", "5"])])
def test_leaving_patients_out_of_few_rows(tmp_path: Path, store_path: Path, k: str | None, tried: list[str]) -> None:
    """Eight training rows, three of one patient: five neighbours are what every row has."""
    columns: dict[str, list[Any]] = {
        "part": ["train"] * 8 + ["val"] * 4 + ["test"] * 4,
        "pid": ["p0", "p0", "p0", "p1", "p1", "p2", "p3", "p4", *(f"q{number}" for number in range(8))],
        "a": [str(number % 2) for number in range(16)],
    }
    write_set(store_path, tmp_path / "x", columns, np.random.default_rng(0).standard_normal((16, 4)))
    record = run(Store(store_path), KnnConfig(k=k, select="loo"), labels="a")
    choices = record["choices"]
    assert list(choices["loo_auroc"]) == tried
    assert str(choices["k"]) in tried
    said = "k 10, 20, 100, 200 left out: more than the 5 training rows outside the patient that has most"
    assert (said in record["notes"]) == (k is None)
    with pytest.raises(ConfigError, match=r"leave-one-out with k=8 needs as many rows .* lower k"):
        run(Store(store_path), KnnConfig(k="8,all", select="loo"), labels="a")


@pytest.mark.parametrize(("row", "split"), [(0, "train"), (13, "val"), (18, "test")])
def test_samples_without_a_direction_are_named(tmp_path: Path, store_path: Path, row: int, split: str) -> None:
    patient = np.arange(60)
    columns = {**by_patient(patient), "a": [str(number % 2) for number in range(60)]}
    X = np.random.default_rng(0).standard_normal((60, 4))
    name = next(number for number in range(row % 10, 60) if columns["part"][number] == split)
    X[name] = 0
    write_set(store_path, tmp_path / "x", columns, X)
    store = Store(store_path)
    named = rf"features of 1 sample are zero, such as those of '{name:03d}\.png' \({split}\), and have no direction"
    with pytest.raises(TaskError, match=named):
        run(store, KnnConfig(k="3"), labels="a")
    assert run(store, KnnConfig(k="3", standardize=True), labels="a")["choices"]["k"] == 3
    with pytest.raises(TaskError, match=rf"of x/m are zero, such as those of '{name:03d}\.png', and have no direction"):
        search(store, store.set("x/m"), np.ones(4, np.float32), "cls")
    with pytest.raises(TaskError, match=rf"the features of '{name:03d}\.png' are zero and have no direction to search"):
        stored_vector(store.set("x/m"), name, ["cls"])


def test_what_becomes_of_masked_labels_is_said_as_it_is(store: Store) -> None:
    task = task_of(store)
    for protocol, said in (
        (
            "radiology",
            "3 masked label entries of the library are left out of their label's prior and counts, and their",
        ),
        ("dino", "3 masked label entries of the library count as absent; the protocol has none"),
    ):
        assert Plan.of(KnnConfig(protocol=protocol)).deviations(task, "cls", masked=3)[-1].startswith(said)  # type: ignore[arg-type]
    classes = task_of(store, ("kind",))
    assert Plan.of(KnnConfig(protocol="dino")).deviations(classes, "cls", masked=3)[-1] == (
        "3 masked label entries of the library are left out; the protocol has none"
    )


def test_ml_knn_is_of_labels(store: Store) -> None:
    for labels, reading in (("kind", {}), ("age", {"kind": "regression"})):
        with pytest.raises(TaskError, match="ML-kNN is of labels that are present or not, and this task is"):
            run(store, KnnConfig(vote="mlknn"), labels=labels, **reading)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "--temperature must be above 0, got 0.0"),
        ({"smoothing": -1.0, "vote": "mlknn"}, "--smoothing must be above 0, got -1.0"),
        ({"protocol": "dino", "vote": "majority"}, "--protocol dino votes by softmax; leave out --vote majority"),
        ({"temperature": 0.1, "vote": "majority"}, "--temperature belongs to --vote softmax, and the vote is majority"),
        (
            {"temperature": 0.1, "protocol": "radiology"},
            "--temperature belongs to --vote softmax, and the vote is mlknn",
        ),
        ({"smoothing": 1.0}, "--smoothing belongs to --vote mlknn, and the vote is softmax"),
        ({"self_neighbour": True}, "--self-neighbour belongs to --vote mlknn, and the vote is softmax"),
        ({"vote": "mlknn", "select": "loo"}, "--select loo is not there for ML-kNN"),
        ({"k": "2.5"}, "--k takes whole numbers, got '2.5'"),
        ({"k": "some"}, "--k takes positive numbers, comma-separated; got 'some'"),
        ({"k": ","}, "--k takes whole numbers above 0 and all, comma-separated; got ','"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        KnnConfig(**options)


def test_random_labels_choose_nothing(store: Store) -> None:
    """Labels drawn without the features: the whole path, selection of k included, tests at one half over 20 seeds."""
    task = task_of(store, ("a",))
    areas = []
    for seed in range(20):
        random = np.random.default_rng(seed).integers(0, 2, task.y.shape)
        task.y[:], task.y_train[:] = random, random
        fitted = fit_knn(task, "cls", KnnConfig(k="3,15,60"))
        truth = task.truth("test")
        areas.append(roc_auc_score(truth.y[:, 0], fitted.test_scores[:, 0]))
    assert abs(np.mean(areas) - 0.5) <= 3 * np.std(areas, ddof=1) / np.sqrt(20)
