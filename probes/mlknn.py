"""ML-kNN: the posterior of each label given how many of the k nearest training rows have it.

Source: Zhang & Zhou 2007, "ML-kNN: A lazy learning approach to multi-label learning", Pattern Recognition 40.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64, Int
from sklearn.base import ClassifierMixin

from featstore.errors import ConfigError, TaskError
from probes.bank import NeighbourEstimator, Tile
from probes.checks import check_labels
from probes.estimator import features_of
from probes.knn import Scores
from probes.neighbours import Backend, Device
from probes.votes import label_totals


class MLKNN(ClassifierMixin, NeighbourEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """ML-kNN by cosine similarity, as a scikit-learn classifier of labels (N, L).

    With s the smoothing, n rows and c(j) the number of training rows with (or without) a label that have j positives
    among their k neighbours: prior (s + positives) / (2 s + n), likelihood (s + c(j)) / (s (k + 1) + sum of c), and the
    score is their posterior. Not in the paper: rows that a label is masked in are left out of its prior and counts, and
    count as neighbours without it.

    After `fit`: `ks_`, `k_`, `dropped_k_`, `backend_`, `bank_rows_` as in `KNNProbe`; `prior_` (L,);
    `likelihood_[k]` (2, L, k + 1), of rows without the label and with it.
    """

    def __init__(
        self,
        *,
        k: int | str | Sequence[int | str] | None = None,
        smoothing: float = 1.0,
        include_self: bool = False,
        standardize: bool = False,
        backend: Backend = "auto",
        device: Device = "auto",
    ) -> None:
        """k: neighbour counts, "all" for every other row; None for 10, 20, 100 and 200 up to the bank's size.
        smoothing: > 0. include_self: count a training row as its own neighbour, as some evaluations do; the paper does
        not, and test rows never are.
        """
        super().__init__(k=k, vote="majority", standardize=standardize, backend=backend, device=device)
        self.smoothing, self.include_self = smoothing, include_self

    def fit(self, X: Any, y: Any, mask: Any = None) -> "MLKNN":
        """Take the rows as the bank and count: `y` (N, L) of 0/1 where `mask` (N, L) is true.

        Raises:
            TaskError: arrays that do not fit together, features that are not finite or all zero, no labelled row.
            ConfigError: options that cannot be used, a k asked for by name that rows cannot answer, or a backend that
                is not there.
        """
        X = features_of(self, X, reset=True)
        if y is None:
            raise TaskError("requires y to be passed, but the target y is None; give labels for every row")
        y = np.asarray(y)
        mask = check_labels(X, y, None if mask is None else np.asarray(mask, dtype=bool), "multilabel")
        used = mask.any(1)
        self._build(X, used, reserve=0 if self.include_self else 1)
        positive, known = (y[used] == 1) & mask[used], mask[used]
        self.classes_ = np.array([0, 1])
        self._votes = positive.astype(np.float64)
        s = self.smoothing
        self.prior_ = (s + positive.sum(0)) / (2 * s + known.sum(0))
        if self.include_self:
            # The bank is scaled and of unit length already.
            tiles = self._tiles_of(self._index.bank, *self._sizes())
        else:
            tiles = self._tiles_within(None, self.ks_, *self._sizes())
        counts = {k: np.zeros((2, positive.shape[1], k + 1)) for k in self.ks_}
        for place, k, found in self._positives(tiles):
            for label in range(positive.shape[1]):
                for value in (False, True):
                    rows = known[place, label] & (positive[place, label] == value)
                    counts[k][int(value), label] += np.bincount(found[rows, label], minlength=k + 1)
        self.likelihood_ = {k: (s + of_k) / (s * (k + 1) + of_k.sum(2, keepdims=True)) for k, of_k in counts.items()}
        return self

    def scores(self, X: Any) -> Scores:
        """Posterior of every label (Q, L) for every k, from one search.

        Raises:
            TaskError: not fitted, another width than in `fit`, or features that are not finite or all zero.
        """
        self._check_fitted()
        X = features_of(self, X, reset=False)
        result = {k: np.zeros((len(X), len(self.prior_))) for k in self.ks_}
        labels = np.arange(len(self.prior_))
        for place, k, found in self._positives(self._tiles(X, *self._sizes())):
            without, having = self.likelihood_[k][:, labels, found]
            joint = self.prior_ * having
            result[k][place] = joint / (joint + (1 - self.prior_) * without)
        return result

    def predict_proba(self, X: Any) -> Float64[np.ndarray, "Q L"]:
        """Posteriors at `k_`; errors as in `scores`."""
        return self.scores(X)[self.k_]

    def predict(self, X: Any) -> Int[np.ndarray, "Q L"]:
        """Labels with a posterior above one half, at `k_`."""
        return (self.scores(X)[self.k_] > 0.5).astype(np.int64)

    def _sizes(self) -> tuple[int, int]:
        return self._votes.shape[1], len(self.prior_)

    def _positives(self, tiles: Iterable[Tile]) -> Iterable[tuple[slice, int, Int[np.ndarray, "B L"]]]:
        """(place, k, positives per label among the first k neighbours)."""
        for place, rows, _ in tiles:
            for k, total in zip(self.ks_, label_totals(self._votes, rows, np.ones(rows.shape), self.ks_)):
                yield place, k, total.astype(np.int64)

    def _check_options(self) -> None:
        super()._check_options()
        if not self.smoothing > 0:
            raise ConfigError(f"smoothing must be above 0, got {self.smoothing}")

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        tags.classifier_tags.multi_class = False
        tags.target_tags.multi_output = True
        tags.target_tags.single_output = False
        tags.target_tags.two_d_labels = True
        return tags
