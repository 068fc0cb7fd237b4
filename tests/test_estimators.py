"""The linear and class-mean estimators and ML-kNN as scikit-learn's: its checks, parameters, pickles, weights."""

import inspect
import pickle
import subprocess
import sys
from typing import Any

import jaxtyping
import numpy as np
import pytest
from sklearn.base import clone, is_classifier, is_regressor
from sklearn.exceptions import DataConversionWarning, NotFittedError
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.neighbors import NearestCentroid
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from featstore.errors import ConfigError, TaskError
from probes.knn import KNNProbe
from probes.logistic import DEFAULT_C, LogisticProbe
from probes.mlknn import MLKNN
from probes.ncm import NearestMeanProbe
from probes.ridge import DEFAULT_ALPHA, RidgeProbe

# Checks of scikit-learn's that do not apply, and why.
NOT_TO_1E_7 = {
    "check_sample_weight_equivalence_on_dense_data": "wants probabilities equal to 1e-7; the solver stops within 1e-8 "
    "of the least loss, where they are equal to 1e-5; the weights have their own test below"
}
NOT_CALIBRATED = {
    "check_classifier_multioutput": "ranks rows by probabilities, which are exactly 1 for several of its far rows"
}
TAKES_CLASSES = "gives classes 1 and 2 in a column; labels are 0 and 1"
NOT_FOR_01 = {
    "check_estimators_dtypes": TAKES_CLASSES,
    "check_classifier_data_not_an_array": TAKES_CLASSES,
    "check_fit2d_1feature": TAKES_CLASSES,
    "check_classifiers_classes": "gives classes (N,); labels are (N, L)",
    "check_classifiers_train": "gives classes, and names them by strings",
    "check_classifiers_one_label": "gives the class 1 alone as 1 and 2",
    "check_classifiers_regression_target": "looks for its own words; numbers other than 0 and 1 are refused",
    "check_classifier_not_supporting_multiclass": "looks for its own words; numbers other than 0 and 1 are refused",
    "check_fit2d_1sample": "looks for its own words; one row has no neighbours, and is refused so",
}


@pytest.mark.filterwarnings("ignore")  # scikit-learn warns of what it skips
@pytest.mark.parametrize(
    ("estimator", "exempt"),
    [
        (LogisticProbe(), NOT_TO_1E_7),
        (LogisticProbe(C=0.1, standardize=False, class_weight="balanced"), {}),
        (RidgeProbe(), {}),
        (RidgeProbe(alpha=0.1, standardize=False), {}),
        (NearestMeanProbe(), NOT_CALIBRATED),
        (NearestMeanProbe(scaling="centred"), {}),
        (MLKNN(k=3), NOT_FOR_01),
    ],
    ids=lambda value: "" if isinstance(value, dict) else str(value),
)
def test_scikit_learns_checks(estimator: Any, exempt: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    # One check passes nonsense to the constructor, which must take it until `fit`; types are checked in tests alone.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    results = check_estimator(estimator, expected_failed_checks=exempt, on_fail=None)
    failed = {result["check_name"]: str(result["exception"]) for result in results if result["status"] == "failed"}
    assert failed == {}
    assert sum(result["status"] == "passed" for result in results) >= 47
    # An exemption that is not needed would hide a check.
    assert {result["check_name"] for result in results if result["status"] == "xfail"} == set(exempt)


def blobs(num_rows: int = 120, width: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    y = random.integers(0, 3, num_rows)
    return np.eye(3, width)[y] + 0.6 * random.standard_normal((num_rows, width)), y


@pytest.mark.parametrize("make", [LogisticProbe, NearestMeanProbe, KNNProbe])
def test_a_column_is_a_label_or_classes(make: Any) -> None:
    """0 and 1 in a column are a label; any other values are classes, as in scikit-learn."""
    X, y = blobs()
    with pytest.warns(DataConversionWarning, match="A column-vector y was passed when a 1d array was expected"):
        column = make().fit(X, y[:, None])
    flat = make().fit(X, y)
    np.testing.assert_array_equal(column.predict(X), flat.predict(X))
    assert column.score(X, y[:, None]) == flat.score(X, y) == np.mean(flat.predict(X) == y)
    label = make().fit(X, (y == 1).astype(int)[:, None])
    assert label.predict(X).shape == (len(X), 1)
    masked = make().fit(X, np.where(y == 0, -1, y - 1)[:, None], (y > 0)[:, None])
    assert masked.predict_proba(X).shape == (len(X), 1)


def test_a_strength_is_chosen_by_a_column_of_classes() -> None:
    X, y = blobs()
    probe = LogisticProbe(C=[0.01, 1.0]).fit(X[:80], y[:80])
    chosen = probe.choose(X[80:], y[80:]).C_index_
    np.testing.assert_array_equal(probe.choose(X[80:], y[80:, None]).C_index_, chosen)


@pytest.mark.parametrize("make", [LogisticProbe, RidgeProbe, NearestMeanProbe])
def test_parameters_are_those_of_the_constructor(make: Any) -> None:
    X, y = blobs()
    estimator = make()
    assert set(estimator.get_params()) == set(inspect.signature(make).parameters)
    assert repr(estimator) == f"{make.__name__}()"
    assert clone(estimator).get_params() == estimator.get_params()
    with pytest.raises(ConfigError, match=f"Invalid parameter 'neighbours' for estimator {make.__name__}; it has "):
        estimator.set_params(neighbours=3)
    for error in (NotFittedError, TaskError):
        with pytest.raises(error, match="this probe is not fitted yet; call fit first"):
            estimator.predict(X)
    fitted = estimator.fit(X, y)
    assert fitted is estimator
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(fitted)).predict(X), fitted.predict(X))
    assert (is_classifier(estimator), is_regressor(estimator)) == (make is not RidgeProbe, make is RidgeProbe)


def test_it_works_inside_scikit_learns_tools() -> None:
    X, y = blobs()
    search = GridSearchCV(LogisticProbe(), {"C": [0.001, 0.1, 10.0], "standardize": [True, False]}, cv=3).fit(X, y)
    assert search.best_params_["C"] in (0.001, 0.1, 10.0)
    assert cross_val_score(make_pipeline(StandardScaler(), NearestMeanProbe()), X, y, cv=3).mean() > 0.7
    assert cross_val_score(RidgeProbe(), X, X[:, :2] @ [1.0, 2.0], cv=3).mean() > 0.9


def test_import_leaves_scikit_learn_alone() -> None:
    program = (
        "import sys, numpy as np\n"
        "from probes.logistic import LogisticProbe\nfrom probes.ridge import RidgeProbe\n"
        "from probes.ncm import NearestMeanProbe\n"
        "X = np.random.default_rng(0).standard_normal((30, 4))\n"
        "for made in (LogisticProbe(), RidgeProbe(), NearestMeanProbe()): made.fit(X, np.arange(30) % 2).predict(X)\n"
        "sys.exit('sklearn' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


# --- logistic


def test_classes_of_any_name() -> None:
    X, y = blobs()
    names = np.array(["cat", "cow", "dog"])[y]
    probe = LogisticProbe(standardize=False).fit(X, names)
    reference = LogisticRegression(solver="newton-cholesky", tol=1e-10).fit(X, names)
    assert probe.classes_.tolist() == ["cat", "cow", "dog"]
    np.testing.assert_allclose(probe.predict_proba(X), reference.predict_proba(X), atol=1e-4)
    assert (probe.predict(X) == reference.predict(X)).mean() > 0.99
    assert probe.score(X, names) == pytest.approx(np.mean(probe.predict(X) == names))
    assert probe.decision_function(X).shape == (120, 3)
    two = LogisticProbe(standardize=False).fit(X, names == "dog")
    reference = LogisticRegression(solver="newton-cholesky", tol=1e-10).fit(X, names == "dog")
    np.testing.assert_allclose(two.decision_function(X), reference.decision_function(X), atol=1e-3)
    assert two.predict_proba(X).shape == (120, 2)
    masked = LogisticProbe().fit(X, names, np.arange(120) < 60)
    np.testing.assert_array_equal(masked.predict_proba(X), LogisticProbe().fit(X[:60], names[:60]).predict_proba(X))
    with pytest.raises(TaskError, match=r"y has one class, .*, and nothing to tell it from"):
        LogisticProbe().fit(X, np.full(120, 3))
    with pytest.raises(TaskError, match="Unknown label type: continuous"):
        LogisticProbe().fit(X, X[:, 0])


def test_several_strengths_are_chosen_on_validation() -> None:
    X, classes = blobs(300)
    y = np.stack([classes == 0, classes == 1], 1).astype(int)
    probe = LogisticProbe(C=DEFAULT_C[::11]).fit(X[:150], y[:150])
    for call in (probe.predict, probe.predict_proba, probe.decision_function):
        with pytest.raises(
            TaskError, match=r"5 values of C were fitted and none is chosen; call choose\(X_val, y_val\)"
        ):
            call(X)
    probe.choose(X[150:], y[150:])
    areas = [
        [roc_auc_score(y[150:, label], scores[:, label]) for label in range(2)] for scores in probe.decision(X[150:])
    ]
    assert probe.C_index_ is not None
    np.testing.assert_array_equal(probe.C_index_, np.argmax(areas, 0))
    np.testing.assert_array_equal(probe.predict_proba(X), probe.probabilities(X, probe.C_index_))
    np.testing.assert_array_equal(probe.predict(X), probe.predict_proba(X) >= 0.5)
    names = np.array(["a", "b", "c"])[classes]
    categorical = LogisticProbe(C=(1e-6, 1.0)).fit(X[:150], names[:150]).choose(X[150:], names[150:])
    macro = [
        roc_auc_score(classes[150:], categorical.probabilities(X[150:], number), multi_class="ovr") for number in (0, 1)
    ]
    assert categorical.C_index_ is not None
    assert categorical.C_index_.tolist() == [int(np.argmax(macro))]
    with pytest.raises(TaskError, match=r"a class to choose by was not there to fit on; classes: \['a', 'b', 'c'\]"):
        categorical.choose(X[:2], np.array(["a", "z"]))
    assert LogisticProbe(C=2.0).fit(X, names).choose(X, names).C_index_.tolist() == [0]  # type: ignore[union-attr]


def objective(X: np.ndarray, y: np.ndarray, weights: np.ndarray, C: float, coef: np.ndarray, intercept: float) -> float:
    """scikit-learn's objective of one label with a weight for each row."""
    logits = X @ coef + intercept
    return float(0.5 * coef @ coef + C * (weights * np.logaddexp(0, np.where(y == 1, -logits, logits))).sum())


@pytest.mark.parametrize("width", [8, 200])
@pytest.mark.parametrize("class_weight", [None, "balanced", "positives", {0: 0.5, 1: 3.0}])
@pytest.mark.parametrize("standardize", [False, True])
def test_weights_are_those_of_scikit_learn(class_weight: Any, standardize: bool, width: int) -> None:
    random = np.random.default_rng(0)
    X = random.standard_normal((90, width)) * 3 + 1
    y = (X[:, 0] + random.standard_normal(90) > 3).astype(int)
    sample = random.integers(0, 4, 90).astype(float) * 0.7
    grid = (1e-3, 1.0)
    probe = LogisticProbe(C=grid, standardize=standardize, class_weight=class_weight)
    probe.fit(X, y[:, None], sample_weight=sample)
    kept = sample > 0
    scaler = StandardScaler(with_mean=standardize, with_std=standardize).fit(X[kept], sample_weight=sample[kept])
    Z, target, weights = scaler.transform(X[kept]), y[kept], sample[kept].copy()
    total = [weights[target == value].sum() for value in (0, 1)]
    by_class = {
        None: (1.0, 1.0),
        "balanced": (sum(total) / (2 * total[0]), sum(total) / (2 * total[1])),
        "positives": (1.0, total[0] / total[1]),
    }.get(class_weight if isinstance(class_weight, str | None) else "", (0.5, 3.0))
    weights *= np.array(by_class)[target]
    for number, C in enumerate(grid):
        reference = LogisticRegression(C=C, solver="newton-cholesky", tol=1e-8, max_iter=1000)
        reference.fit(Z, target, sample_weight=weights)
        best = objective(Z, target, weights, C, reference.coef_[0], float(reference.intercept_[0]))
        ours = (np.asarray(X[kept]) - probe.mean_) / probe.scale_
        found = objective(ours, target, weights, C, probe.coef_[number, :, 0], float(probe.intercept_[number, 0]))
        assert (found - best) / best <= 1e-6
        assert probe.objective_[number, 0] == pytest.approx(best, rel=1e-6)
        expected = reference.predict_proba(scaler.transform(X))[:, 1]
        np.testing.assert_allclose(probe.probabilities(X, number)[:, 0], expected, atol=2e-3)


def test_weights_of_classes_and_of_masked_labels() -> None:
    X, y = blobs()
    sample = np.random.default_rng(1).uniform(0.2, 2, 120)
    weight = {0: 2.0, 2: 0.1}
    probe = LogisticProbe(C=0.5, standardize=False, class_weight=weight).fit(X, y, sample_weight=sample)
    reference = LogisticRegression(C=0.5, solver="newton-cholesky", tol=1e-10, class_weight={**weight, 1: 1.0})
    np.testing.assert_allclose(
        probe.predict_proba(X), reference.fit(X, y, sample_weight=sample).predict_proba(X), atol=1e-4
    )
    labels = np.stack([y == 0, y == 1], 1).astype(int)
    mask = np.random.default_rng(2).random(labels.shape) < 0.7
    several = LogisticProbe(C=0.5, standardize=False, class_weight="positives").fit(
        X, labels, mask, sample_weight=sample
    )
    for label in range(2):
        rows = mask[:, label]
        alone = LogisticProbe(C=0.5, standardize=False, class_weight="positives").fit(
            X[rows], labels[rows][:, [label]], sample_weight=sample[rows]
        )
        assert several.objective_[0, label] == pytest.approx(alone.objective_[0, 0], rel=1e-7)


def test_weights_that_cannot_be_used() -> None:
    X, y = blobs()
    with pytest.raises(ConfigError, match="class_weight 'positives' is of labels and of two classes; y has 3"):
        LogisticProbe(class_weight="positives").fit(X, y)
    for weight in ({0: -1.0}, {0: float("nan")}, {0: "much"}):
        with pytest.raises(ConfigError, match="class_weight maps classes to numbers above 0, got"):
            LogisticProbe().set_params(class_weight=weight).fit(X, y)
    for sample, message in (
        (np.ones(7), r"Sample weights must be 1D array or scalar, one for each of 120 rows; got shape \(7,\)"),
        (np.full(120, -1.0), "sample_weight must be finite and at least 0"),
        (np.zeros(120), "every row has a weight of zero in sample_weight"),
    ):
        for estimator in (LogisticProbe(), RidgeProbe(), NearestMeanProbe()):
            with pytest.raises(TaskError, match=message):
                estimator.fit(X, y, sample_weight=sample)
    with pytest.raises(
        TaskError, match="requires y to be passed, but the target y is None; give numbers for every row"
    ):
        RidgeProbe().fit(X, None)


# --- ridge


@pytest.mark.parametrize("width", [6, 200])
@pytest.mark.parametrize("standardize", [False, True])
def test_ridge_with_weights_is_scikit_learns(standardize: bool, width: int) -> None:
    random = np.random.default_rng(0)
    X, sample = random.standard_normal((90, width)) * 2 + 1, random.integers(0, 3, 90).astype(float)
    y = X[:, :2] @ [[1.0, 2.0], [0.5, -1.0]] + random.standard_normal((90, 2))
    kept = sample > 0
    scaler = StandardScaler(with_mean=standardize, with_std=standardize).fit(X[kept], sample_weight=sample[kept])
    probe = RidgeProbe(alpha=3.0, standardize=standardize).fit(X, y, sample_weight=sample)
    reference = Ridge(alpha=3.0).fit(scaler.transform(X), y, sample_weight=sample)
    np.testing.assert_allclose(probe.predict(X), reference.predict(scaler.transform(X)), rtol=1e-8, atol=1e-9)
    assert probe.score(X, y, sample) == pytest.approx(reference.score(scaler.transform(X), y, sample))


def test_alpha_is_chosen_on_validation() -> None:
    random = np.random.default_rng(0)
    X = random.standard_normal((120, 30))
    y = X[:, :2] + np.array([0.1, 5.0]) * random.standard_normal((120, 2))
    probe = RidgeProbe(alpha=DEFAULT_ALPHA[::5]).fit(X[:60], y[:60])
    with pytest.raises(
        TaskError, match=r"9 values of alpha were fitted and none is chosen; call choose\(X_val, y_val\)"
    ):
        probe.predict(X)
    mask = random.random((60, 2)) < 0.8
    probe.choose(X[60:], np.where(mask, y[60:], np.nan), mask)
    errors = np.array(
        [
            [np.mean((found[m, t] - y[60:][m, t]) ** 2) for t, m in enumerate(mask.T)]
            for found in probe.predictions(X[60:])
        ]
    )
    assert probe.alpha_index_ is not None
    np.testing.assert_array_equal(probe.alpha_index_, errors.argmin(0))
    np.testing.assert_array_equal(
        probe.predict(X), np.stack([probe.predictions(X)[n, :, t] for t, n in enumerate(probe.alpha_index_)], 1)
    )
    assert RidgeProbe().fit(X, y[:, 0]).predict(X).shape == (120,)
    with pytest.raises(TaskError, match=r"targets to choose by have shape \(60, 2\); got \(60, 1\)"):
        probe.choose(X[60:], y[60:, 0])
    with pytest.raises(TaskError, match="a target has no row to choose alpha by"):
        probe.choose(X[60:], y[60:], mask & [True, False])


# --- nearest class mean


def test_the_nearest_mean_is_scikit_learns() -> None:
    X, y = blobs()
    queries = blobs(50, seed=1)[0]
    names = np.array(["cat", "cow", "dog"])[y]
    np.testing.assert_array_equal(
        NearestMeanProbe().fit(X, names).predict(queries), NearestCentroid().fit(X, names).predict(queries)
    )
    unit = (X - X.mean(0)) / np.linalg.norm(X - X.mean(0), axis=1, keepdims=True)
    moved = (queries - X.mean(0)) / np.linalg.norm(queries - X.mean(0), axis=1, keepdims=True)
    probe = NearestMeanProbe(scaling="centred").fit(X, names)
    np.testing.assert_array_equal(probe.predict(queries), NearestCentroid().fit(unit, names).predict(moved))
    distances = np.square(moved[:, None] - np.stack([unit[y == number].mean(0) for number in range(3)])).sum(2)
    weights = np.exp(-distances / 2)
    np.testing.assert_allclose(probe.predict_proba(queries), weights / weights.sum(1, keepdims=True), rtol=1e-9)
    assert probe.score(X, names) == np.mean(probe.predict(X) == names)


def test_means_of_labels_are_those_of_each_label() -> None:
    X, classes = blobs()
    y = np.stack([classes == 0, classes == 1], 1).astype(int)
    mask = np.random.default_rng(0).random(y.shape) < 0.7
    probe = NearestMeanProbe().fit(X, np.where(mask, y, -1), mask)
    for label, rows in enumerate(mask.T):
        alone = NearestMeanProbe().fit(X[rows], y[rows, label])
        np.testing.assert_allclose(probe.decision_function(X)[:, label], alone.decision_function(X), atol=1e-12)
        np.testing.assert_allclose(probe.predict_proba(X)[:, label], alone.predict_proba(X)[:, 1], atol=1e-12)
        np.testing.assert_array_equal(probe.predict(X)[:, label], alone.predict(X))
    with pytest.raises(TaskError, match="label 1 has one class among the rows to fit on"):
        NearestMeanProbe().fit(X, y * [1, 0])
    with pytest.raises(ConfigError, match="scaling is one of standardize, none, unit, centred, got 'loud'"):
        NearestMeanProbe().set_params(scaling="loud").fit(X, y)
    with pytest.raises(TaskError, match="no labelled row to fit on among 120"):
        NearestMeanProbe().fit(X, y, np.zeros(y.shape, dtype=bool))
