"""Metrics against scikit-learn, and against published AUROCs of real predictions."""

import csv
import gzip
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, average_precision_score, balanced_accuracy_score, roc_auc_score

from featstore.errors import ConfigError, TaskError
from probes.metrics import METRICS, auroc, average_precision, decide, evaluate

Pairs = st.lists(st.tuples(st.booleans(), st.integers(0, 6)), min_size=2, max_size=40)


@settings(deadline=None, max_examples=200)
@given(Pairs)
def test_auroc_and_average_precision_equal_sklearn_with_ties_and_weights(rows: list[tuple[bool, int]]) -> None:
    y = np.array([positive for positive, _ in rows])
    scores = np.array([score / 4 for _, score in rows])
    weights = np.random.default_rng(len(rows)).integers(0, 4, len(rows)).astype(float)
    if y.all() or not y.any():
        assert np.isnan(auroc(y, scores))
        assert np.isnan(average_precision(y, scores))
        return
    assert auroc(y, scores) == pytest.approx(roc_auc_score(y, scores), abs=1e-12)
    assert average_precision(y, scores) == pytest.approx(average_precision_score(y, scores), abs=1e-12)
    if weights[y].sum() == 0 or weights[~y].sum() == 0:
        assert np.isnan(auroc(y, scores, weights))
        return
    used = weights > 0  # scikit-learn divides by zero where nothing is selected yet
    expected = roc_auc_score(y[used], scores[used], sample_weight=weights[used])
    assert auroc(y, scores, weights) == pytest.approx(expected, abs=1e-12)
    expected = average_precision_score(y[used], scores[used], sample_weight=weights[used])
    assert average_precision(y, scores, weights) == pytest.approx(expected, abs=1e-12)


def test_all_scores_tied_is_one_half() -> None:
    y = np.array([0, 1, 1, 0, 0])
    assert auroc(y, np.ones(5, np.float32)) == 0.5
    assert average_precision(y, np.ones(5)) == pytest.approx(0.4)


def test_infinite_scores_rank_at_the_ends() -> None:
    assert auroc(np.array([0, 1, 1]), np.array([-np.inf, 0.0, np.inf])) == 1


def multilabel(num_rows: int = 300, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, scores with ties, mask; the last label has no positives, the one before no valid row."""
    random = np.random.default_rng(seed)
    y = (random.random((num_rows, 5)) < (0.05, 0.3, 0.6, 0.5, 0.0)).astype(np.int8)
    scores = np.round(np.clip(random.random((num_rows, 5)) * 0.7 + 0.3 * y, 0, 1), 2)
    mask = random.random((num_rows, 5)) < 0.8
    mask[:, 3] = False
    return y, scores, mask


@pytest.mark.parametrize("threshold", [0.5, np.array([0.2, 0.4, 0.6, 0.5, 0.5])])
def test_multilabel_equals_sklearn_on_the_valid_rows(threshold: float | np.ndarray) -> None:
    y, scores, mask = multilabel()
    result = evaluate(y, scores, mask, kind="multilabel", labels=list("abcde"), threshold=threshold)
    assert [entry["label"] for entry in result["per_label"]] == list("abcde")
    for column, entry in enumerate(result["per_label"][:3]):
        rows = mask[:, column]
        true, score = y[rows, column], scores[rows, column]
        decided = score >= np.broadcast_to(threshold, 5)[column]
        assert (entry["n"], entry["positives"]) == (rows.sum(), true.sum())
        assert entry["auroc"] == pytest.approx(roc_auc_score(true, score), abs=1e-12)
        assert entry["auprc"] == pytest.approx(average_precision_score(true, score), abs=1e-12)
        assert entry["accuracy"] == pytest.approx(accuracy_score(true, decided), abs=1e-12)
        assert entry["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(true, decided), abs=1e-12)
    empty, one_class = result["per_label"][3:]
    assert (empty["n"], one_class["positives"]) == (0, 0)
    assert all(np.isnan(empty[name]) for name in METRICS)
    assert all(np.isnan(one_class[name]) for name in METRICS if name != "accuracy")
    assert 0 < one_class["accuracy"] < 1
    assert result["skipped"] == 2
    for name in METRICS:
        assert result["macro"][name] == pytest.approx(
            np.mean([entry[name] for entry in result["per_label"][:3]]), abs=1e-15
        )


def test_masked_entries_may_hold_anything() -> None:
    y, scores, mask = multilabel()
    other_y, other_scores = np.where(mask, y, -1), np.where(mask, scores, np.nan)
    np.testing.assert_equal(
        evaluate(other_y, other_scores, mask, kind="multilabel"), evaluate(y, scores, mask, kind="multilabel")
    )


def test_multiclass_equals_sklearn() -> None:
    random = np.random.default_rng(1)
    y = random.integers(0, 4, 200)
    scores = np.round(random.random((200, 5)) + 0.4 * np.eye(5)[y], 1)  # class 4 never occurs
    mask = random.random(200) < 0.7
    result = evaluate(np.where(mask, y, 99), scores, mask, kind="multiclass")
    true, valid = y[mask], scores[mask]
    decided = valid.argmax(1)
    assert result["n"] == mask.sum()
    assert result["skipped"] == 1
    for label, entry in enumerate(result["per_label"][:4]):
        assert entry["auroc"] == pytest.approx(roc_auc_score(true == label, valid[:, label]), abs=1e-12)
        assert entry["auprc"] == pytest.approx(average_precision_score(true == label, valid[:, label]), abs=1e-12)
        expected = balanced_accuracy_score(true == label, decided == label)
        assert entry["balanced_accuracy"] == pytest.approx(expected, abs=1e-12)
    assert result["macro"]["accuracy"] == pytest.approx(accuracy_score(true, decided), abs=1e-12)
    seen = np.where(decided == 4, 0, decided)  # scikit-learn warns about a class that only the decisions have
    moved = evaluate(true, np.eye(5)[seen], kind="multiclass")
    assert moved["macro"]["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(true, seen), abs=1e-12)
    assert result["macro"]["auroc"] == pytest.approx(np.mean([entry["auroc"] for entry in result["per_label"][:4]]))


def test_two_classes_give_one_auroc() -> None:
    random = np.random.default_rng(2)
    y = random.integers(0, 2, 100)
    positive = np.round(np.clip(random.random(100) * 0.7 + 0.3 * y, 0, 1), 2)
    scores = np.stack([1 - positive, positive], 1)
    result = evaluate(y, scores, kind="multiclass", labels=["AP", "PA"])
    (entry,) = result["per_label"]
    assert (entry["label"], entry["positives"], result["skipped"]) == ("PA", y.sum(), 0)
    assert entry["auroc"] == pytest.approx(roc_auc_score(y, positive), abs=1e-12)
    assert entry["auprc"] == pytest.approx(average_precision_score(y, positive), abs=1e-12)
    decided = scores.argmax(1)
    for scores_of in (entry, result["macro"]):
        assert scores_of["accuracy"] == pytest.approx(accuracy_score(y, decided), abs=1e-12)
        assert scores_of["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(y, decided), abs=1e-12)


@pytest.mark.parametrize("kind", ["multilabel", "multiclass"])
def test_no_rows(kind: str) -> None:
    y = np.zeros((0, 3) if kind == "multilabel" else 0, np.int64)
    result = evaluate(y, np.zeros((0, 3)), kind=kind)  # type: ignore[arg-type]
    assert (result["n"], result["skipped"]) == (0, 3)
    assert all(np.isnan(result["macro"][name]) for name in METRICS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"y": np.array([[0], [2]])}, r"labels must be 0 or 1, found \[0, 2\]"),
        ({"scores": np.array([[0.1], [np.nan]])}, "scores must be numbers; row 1 is NaN"),
        ({"y": np.array([0, 1])}, r"need labels and mask of shape \(2, 1\); got \(2,\)"),
        ({"mask": np.ones((3, 1), dtype=bool)}, r"got \(2, 1\) and \(3, 1\)"),
        ({"labels": ["a", "b"]}, "2 label names given for 1 columns"),
        ({"kind": "multiclass", "y": np.array([0, 1])}, "at least two classes, got 1 column"),
        (
            {"kind": "multiclass", "y": np.array([0, 2]), "scores": np.ones((2, 2))},
            "classes must be 0 to 1, found 0 to 2",
        ),
        ({"kind": "multiclass", "y": np.array([0, 1]), "scores": np.full((2, 2), np.nan)}, "some are NaN"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(arguments: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"y": np.array([[0], [1]]), "scores": np.array([[0.1], [0.9]]), "kind": "multilabel"}
    with pytest.raises(TaskError, match=message):
        evaluate(**{**good, **arguments})


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="kind is 'multilabel' or 'multiclass', got 'ranking'"):
        inspect.unwrap(decide)(np.zeros((1, 1), int), np.zeros((1, 1)), kind="ranking")


def read_gzip_csv(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.realdata
def test_published_aurocs_of_a_chexnet_replica(shared_data: Path) -> None:
    folder = shared_data / "labels"
    findings = {
        row["Image Index"]: set(row["Finding Labels"].split("|"))
        for row in read_gzip_csv(folder / "nih" / "Data_Entry_2017_v2020.csv.gz")
    }
    predictions = read_gzip_csv(folder / "chexnet" / "preds.csv.gz")
    with (folder / "chexnet" / "aucs.csv").open(newline="") as file:
        published = {row["label"]: float(row["auc"]) for row in csv.DictReader(file)}
    assert (len(predictions), len(published)) == (22_433, 14)
    labels = list(published)
    y = np.array([[label in findings[row["Image Index"]] for label in labels] for row in predictions])
    scores = np.array([[float(row[f"prob_{label}"]) for label in labels] for row in predictions])
    for column, label in enumerate(labels):
        assert auroc(y[:, column], scores[:, column]) == pytest.approx(published[label], abs=5e-7), label
    result = evaluate(y.astype(np.int8), scores, kind="multilabel", labels=labels)
    assert [entry["auroc"] for entry in result["per_label"]] == pytest.approx(list(published.values()), abs=5e-7)
    assert (min(entry["positives"] for entry in result["per_label"]), result["skipped"]) == (42, 0)
