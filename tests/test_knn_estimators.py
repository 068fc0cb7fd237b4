"""The kNN estimators as scikit-learn's: its own checks, parameters, clones, pickles, pipelines."""

import inspect
import pickle
from typing import Any

import jaxtyping
import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from featstore.errors import ConfigError, TaskError
from probes.knn import KNNProbe, KNNRegressor
from probes.mlknn import MLKNN

# Checks of scikit-learn's that do not apply, and why.
NOT_FOR_COSINES = {"check_estimators_dtypes": "has a row of zeros, which has no direction and is refused"}
NOT_STRICT = {
    "check_classifiers_multilabel_output_format_predict_proba": "wants shares strictly between 0 and 1; five "
    "neighbours may agree"
}


@pytest.mark.filterwarnings("ignore")  # scikit-learn warns of what it skips
@pytest.mark.parametrize(
    ("estimator", "exempt"),
    [
        (KNNProbe(), NOT_FOR_COSINES),
        (KNNProbe(k=5, vote="distance", backend="torch"), NOT_FOR_COSINES | NOT_STRICT),
        (KNNProbe(k=3, vote="majority", standardize=True), NOT_STRICT),
        (KNNRegressor(), NOT_FOR_COSINES),
        (KNNRegressor(k=5, vote="distance", backend="torch"), NOT_FOR_COSINES),
    ],
    ids=str,
)
def test_scikit_learns_checks(estimator: Any, exempt: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    # One check passes nonsense to the constructor, which must take it until `fit`; types are checked in tests alone.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    results = check_estimator(estimator, expected_failed_checks=exempt, on_fail=None)
    failed = {result["check_name"]: str(result["exception"]) for result in results if result["status"] == "failed"}
    assert failed == {}
    assert sum(result["status"] == "passed" for result in results) >= 48
    # An exemption that is not needed would hide a check.
    assert {result["check_name"] for result in results if result["status"] == "xfail"} == set(exempt)


def blobs(num_rows: int = 120) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    y = random.integers(0, 3, num_rows)
    return np.eye(3, 6)[y] + 0.4 * random.standard_normal((num_rows, 6)), y


@pytest.mark.parametrize("make", [KNNProbe, KNNRegressor, MLKNN])
def test_parameters_are_those_of_the_constructor(make: Any) -> None:
    names = set(inspect.signature(make).parameters)
    estimator = make(k=(3, 5), backend="torch")
    assert set(estimator.get_params()) == names
    assert estimator.set_params(k=4) is estimator
    assert clone(estimator).get_params() == estimator.get_params()
    with pytest.raises(ValueError, match="Invalid parameter 'neighbours'"):
        estimator.set_params(neighbours=3)
    with pytest.raises(NotFittedError, match="is not fitted yet; call fit first"):
        estimator.predict(blobs()[0])
    with pytest.raises(TaskError, match=f"this {make.__name__} is not fitted yet"):
        estimator.choose(4)


@pytest.mark.parametrize("make", [KNNProbe, KNNRegressor, MLKNN])
@pytest.mark.parametrize("backend", ["faiss", "torch"])
def test_pickles_answer_alike(make: Any, backend: str) -> None:
    X, y = blobs()
    target = np.eye(3, dtype=int)[y] if make is MLKNN else y
    fitted = make(k=(3, 5), standardize=True, backend=backend).fit(X, target).choose(3)
    again = pickle.loads(pickle.dumps(fitted))
    assert (again.n_features_in_, again.k_, again.backend_) == (6, 3, backend)
    np.testing.assert_array_equal(again.predict(X), fitted.predict(X))
    assert pickle.loads(pickle.dumps(make(k=3))).get_params() == make(k=3).get_params()


def test_any_classes_and_clear_words_on_width() -> None:
    X, y = blobs()
    names = np.array(["cat", "cow", "dog"])[y]
    probe = KNNProbe(k=5).fit(X.tolist(), names.tolist())
    assert probe.classes_.tolist() == ["cat", "cow", "dog"]
    assert probe.score(X, names) > 0.9
    np.testing.assert_allclose(probe.predict_proba(X), KNNProbe(k=5).fit(X, y).predict_proba(X))
    with pytest.raises(TaskError, match=r"features have 4 columns, the probe was fitted on 6; .* \(X has 4 features"):
        probe.predict(X[:, :4])
    with pytest.raises(ConfigError, match="k=500 neighbours asked of a bank with 120 rows; lower k or extract more"):
        KNNProbe(k=500).fit(X, y)
    for estimator in (KNNProbe(), KNNRegressor()):
        with pytest.raises(TaskError, match="requires y to be passed, but the target y is None"):
            estimator.fit(X, None)


def test_numbers_of_one_column_come_back_flat() -> None:
    X, y = blobs()
    flat, column = KNNRegressor(k=5).fit(X, y), KNNRegressor(k=5).fit(X, y[:, None])
    assert (flat.predict(X).shape, column.predict(X).shape) == ((120,), (120, 1))
    with pytest.raises(TaskError, match=r"targets and mask of 120 rows are \(N, T\) or \(N,\); got \(119,\)"):
        KNNRegressor(k=5).fit(X, y[1:])


def test_it_works_inside_scikit_learns_tools() -> None:
    X, y = blobs()
    search = GridSearchCV(KNNProbe(vote="majority"), {"k": [1, 5, 20]}, cv=3).fit(X, y)
    assert search.best_params_["k"] in (1, 5, 20)
    assert cross_val_score(make_pipeline(StandardScaler(), KNNProbe(k=9)), X, y, cv=3).mean() > 0.8
