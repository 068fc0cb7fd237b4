"""What the linear estimators share with scikit-learn: parameters, checked inputs, tags.

scikit-learn's own base class takes as long to import as torch; here it is imported only where something asks for it
(its tags, inputs that are no plain arrays), so that a probe on the command line never waits for it.
"""

import inspect
import warnings
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float, Float64

from featstore.errors import ConfigError, TaskError
from probes.checks import check_width

Own = TypeVar("Own", bound="Estimator")
FLOATS = (np.float16, np.float32, np.float64)


class Estimator:
    """Parameters are those of the constructor, which only keeps them; they are checked in `fit`."""

    _estimator_kind: str  # "classifier" or "regressor"
    n_features_in_: int

    @classmethod
    def _names(cls) -> list[str]:
        return sorted(name for name in inspect.signature(cls.__init__).parameters if name != "self")

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Parameters by name; `deep` is scikit-learn's and changes nothing where none is an estimator."""
        return {name: getattr(self, name) for name in self._names()}

    def set_params(self: Own, **params: Any) -> Own:
        """Set parameters; they are checked in `fit`.

        Raises:
            ConfigError: no such parameter.
        """
        for name, value in params.items():
            if name not in self._names():
                raise ConfigError(
                    f"Invalid parameter {name!r} for estimator {type(self).__name__}; it has {', '.join(self._names())}"
                )
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        """The call that makes it, without what is left at its default."""
        defaults = inspect.signature(type(self).__init__).parameters
        params = self.get_params().items()
        given = [f"{name}={value!r}" for name, value in params if repr(value) != repr(defaults[name].default)]
        return f"{type(self).__name__}({', '.join(given)})"

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "n_features_in_")

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import ClassifierTags, InputTags, RegressorTags, Tags, TargetTags

        classifier = self._estimator_kind == "classifier"
        return Tags(
            estimator_type=self._estimator_kind,
            target_tags=TargetTags(required=True, multi_output=True),
            classifier_tags=ClassifierTags(multi_label=True) if classifier else None,
            regressor_tags=None if classifier else RegressorTags(),
            input_tags=InputTags(),
        )

    def _check_fitted(self) -> None:
        if not self.__sklearn_is_fitted__():
            from probes.bank import NotFittedTaskError  # also scikit-learn's error, for its tools

            raise NotFittedTaskError("this probe is not fitted yet; call fit first")


def features_of(estimator: Any, X: Any, *, reset: bool) -> Float[np.ndarray, "N D"]:
    """Features as an array of numbers; with `reset` their width and column names are learned, else compared.

    Values that are not finite pass: masked rows may hold them.

    Raises:
        TaskError: another width. ValueError: no table of real numbers (scikit-learn's words).
    """
    plain = type(X) in (np.ndarray, np.memmap) and X.ndim == 2 and X.shape[1] > 0 and X.dtype in FLOATS
    if not reset and isinstance(X, np.ndarray) and X.ndim == 2 and X.shape[1] != estimator.n_features_in_:
        try:
            check_width(X, estimator.n_features_in_)
        except TaskError as error:
            raise TaskError(
                f"{error} (X has {X.shape[1]} features, but {type(estimator).__name__} is expecting "
                f"{estimator.n_features_in_} features as input)"
            ) from None
    if plain and not hasattr(estimator, "feature_names_in_"):
        if reset:
            estimator.n_features_in_ = X.shape[1]
        return np.asarray(X)
    from sklearn.utils.validation import validate_data

    made = validate_data(
        estimator, X, reset=reset, dtype="numeric", ensure_all_finite=False, ensure_min_samples=0, order="C"
    )
    return np.asarray(made if np.issubdtype(made.dtype, np.floating) else made.astype(np.float64))


def targets_of(y: Any, what: str) -> np.ndarray:
    """Targets as an array.

    Raises:
        TaskError: none were given.
    """
    if y is None:
        raise TaskError(f"requires y to be passed, but the target y is None; give {what} for every row")
    return np.asarray(y)


def classes_or_labels(y: Any, mask: Any) -> np.ndarray:
    """Classes (N,) or labels (N, L) of 0 and 1 as an array.

    A column (N, 1) is one label where it holds 0 and 1, or -1 for uncertain, which is refused later on, or a mask says
    what counts of it; else it holds classes, and is taken as (N,), with scikit-learn's warning.

    Raises:
        TaskError: none were given.
    """
    y = targets_of(y, "a class or labels")
    if mask is None and y.ndim == 2 and y.shape[1] == 1 and not np.isin(y, (-1, 0, 1)).all():
        from sklearn.exceptions import DataConversionWarning

        warnings.warn(
            "A column-vector y was passed when a 1d array was expected: its values are taken for classes, as they are "
            "not the 0 and 1 of a label; give y of shape (n_samples,)",
            DataConversionWarning,
            stacklevel=3,
        )
        return np.asarray(y[:, 0])
    return np.asarray(y)


def numbered(y: np.ndarray, used: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(classes, their numbers (N,)) of labels of any type; rows that are not used have number 0.

    Raises:
        TaskError: numbers with fractions, or fewer than two classes.
    """
    values = y[used]
    if values.dtype.kind == "f" and not (np.isfinite(values) & (values == np.floor(values))).all():
        raise TaskError("Unknown label type: continuous. Classes are whole numbers or names; RidgeProbe takes numbers")
    classes, inverse = np.unique(values, return_inverse=True)
    if len(values) and len(classes) < 2:
        raise TaskError(f"y has one class, {classes[0]!r}, and nothing to tell it from; give rows of at least two")
    numbers = np.zeros(len(y), np.int64)
    numbers[used] = inverse
    return classes, numbers


def row_weights(sample_weight: Any, num_rows: int) -> Float64[np.ndarray, " N"] | None:
    """Weights of the rows, None where all count alike.

    Raises:
        TaskError: not one number of at least 0 a row.
    """
    if sample_weight is None:
        return None
    weights = np.asarray(sample_weight, dtype=np.float64)
    if weights.ndim == 0:
        weights = np.full(num_rows, float(weights))
    if weights.shape != (num_rows,):
        # scikit-learn's tools look for the first words.
        raise TaskError(
            f"Sample weights must be 1D array or scalar, one for each of {num_rows} rows; got shape {weights.shape}"
        )
    if not np.isfinite(weights).all() or (weights < 0).any():
        raise TaskError("sample_weight must be finite and at least 0")
    if num_rows and not weights.any():
        raise TaskError("every row has a weight of zero in sample_weight, so none is left to fit on")
    return weights


def weighted_moments(
    X: Float[np.ndarray, "N D"], weights: Float64[np.ndarray, " N"]
) -> tuple[Float64[np.ndarray, " D"], Float64[np.ndarray, " D"]]:
    """(mean, standard deviation) of the columns with rows that count `weights` times; 1 for constant columns."""
    values = X.astype(np.float64)
    mean = np.average(values, axis=0, weights=weights)
    variance = np.average(np.square(values - mean), axis=0, weights=weights)
    eps = np.finfo(np.float64).eps
    constant = variance <= len(X) * eps * variance + np.square(len(X) * mean * eps)
    return mean, np.where(constant, 1.0, np.sqrt(variance))
