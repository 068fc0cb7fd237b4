"""k nearest neighbours by cosine similarity, for classes, masked labels and numbers.

Votes are `softmax` (DINO: softmax(similarity / T) over the k_max nearest rows, cut at k), `majority` and `distance`.
One search at k_max serves every k.
Source: Wu et al. 2018 (weighted k-NN); k, T and the order of softmax and cut as in DINO's and DINOv2's evaluation.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float64, Int
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.utils.multiclass import check_classification_targets

from featstore.errors import TaskError
from probes.bank import NeighbourEstimator, Tile
from probes.checks import Kind, check_labels
from probes.estimator import classes_or_labels, features_of
from probes.neighbours import Backend, Device
from probes.votes import Vote, class_totals, label_totals

Scores = dict[int, Float64[np.ndarray, "Q L"]]
Unlabelled = dict[int, Int[np.ndarray, " L"]]


class KNNProbe(ClassifierMixin, NeighbourEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """Vote of the nearest training rows, as a scikit-learn classifier.

    After `fit`: `classes_` the classes (0 and 1 for labels), `ks_` the neighbour counts that are scored, `k_` the one
    that `predict` uses (the largest until `choose`), `dropped_k_` default counts above the bank, `backend_` what
    searches ("faiss", "faiss-gpu", "torch" or "torch-cuda"), `bank_rows_` the rows of X that are neighbours,
    `prevalence_` (L,) of the labels among their labelled rows (0.5 where a label has none).

    After `scores` on labels: `unlabelled_`, for each k the number of queries per label that had no labelled neighbour
    and got the prevalence.
    """

    def __init__(
        self,
        *,
        k: int | str | Sequence[int | str] | None = None,
        vote: Vote = "softmax",
        temperature: float = 0.07,
        renormalize: bool = True,
        standardize: bool = False,
        backend: Backend = "auto",
        device: Device = "auto",
    ) -> None:
        """k: neighbour counts, "all" for the whole bank; None for 10, 20, 100 and 200 up to the bank's size.
        temperature: > 0, of the softmax vote. renormalize: divide by the weights of the neighbours that count; without
        it scores are the published sums, where the first k hold a part of the softmax over k_max.
        """
        super().__init__(
            k=k, vote=vote, temperature=temperature, standardize=standardize, backend=backend, device=device
        )
        self.renormalize = renormalize

    def fit(self, X: Any, y: Any, mask: Any = None, *, num_classes: int | None = None) -> "KNNProbe":
        """Take the rows as the bank: `y` (N,) classes, or (N, L) of 0/1 where `mask` (N, L) is true.

        Classes are any labels; with `num_classes` they are numbers below it, also those that no row has. Rows without
        any valid label are left out and may hold NaN.

        Raises:
            TaskError: arrays that do not fit together, features that are not finite or all zero, no labelled row.
            ConfigError: options that cannot be used, a k asked for by name above the bank's size, or a backend that is
                not there.
        """
        X = features_of(self, X, reset=True)
        y = classes_or_labels(y, mask)
        kind: Kind = "multilabel" if y.ndim == 2 else "multiclass"
        mask = None if mask is None else np.asarray(mask, dtype=bool)
        mask = check_labels(X, y, mask, kind, num_classes) if kind == "multilabel" or num_classes else _any(X, y, mask)
        used = mask if kind == "multiclass" else mask.any(1)
        self.kind_ = kind
        self._build(X, used)
        if kind == "multiclass":
            if num_classes is None:
                check_classification_targets(y[used])
                self.classes_, numbers = np.unique(y[used], return_inverse=True)
            else:
                self.classes_, numbers = np.arange(num_classes), y[used].astype(np.int64)
            self.prevalence_ = np.bincount(numbers, minlength=len(self.classes_)) / len(numbers)
            self._votes = numbers
        else:
            y, mask = y[used] == 1, mask[used]
            positive, labelled = (y & mask).sum(0), mask.sum(0)
            self.classes_ = np.array([0, 1])
            self.prevalence_ = np.where(labelled > 0, positive / np.maximum(labelled, 1), 0.5)
            self._votes = np.hstack([y & mask, mask]).astype(np.float64)  # (N, 2 L)
        return self

    def scores(self, X: Any) -> Scores:
        """Votes (Q, L) for every k, from one search.

        Classes: share of the weight of the first k neighbours. Labels: the weighted share of positives among those of
        them that are labelled for it; the prevalence where none is. Without `renormalize`: the sums themselves.

        Raises:
            TaskError: not fitted, another width than in `fit`, or features that are not finite or all zero.
        """
        scores, self.unlabelled_ = self._scored(X)
        return scores

    def leave_one_out(self, groups: np.ndarray | None = None) -> Scores:
        """Votes for the bank's own rows (`bank_rows_`), each by the others, or by those outside its group.

        Neither the row itself nor, with `groups` (one per row of the bank, such as patients), any row of its group is
        its neighbour; an equal row of another group is. k: those of `ks_` that every row can answer.

        Raises:
            ConfigError: a k asked for by name is more than that.
        """
        ks = self._counts_within(groups)
        scores, self.unlabelled_ = self._counted(
            self._tiles_within(groups, ks, *self._sizes()), len(self.bank_rows_), ks
        )
        return scores

    def predict_proba(self, X: Any) -> Float64[np.ndarray, "Q L"]:
        """Scores at `k_`; those of classes divided by their sum. Errors as in `scores`."""
        scores = self._scored(X)[0][self.k_]
        return scores / scores.sum(1, keepdims=True) if self.kind_ == "multiclass" else scores

    def predict(self, X: Any) -> np.ndarray:
        """Class with the largest score (Q,), or labels with a score of at least one half (Q, L), at `k_`."""
        scores = self._scored(X)[0][self.k_]
        if self.kind_ == "multiclass":
            return np.asarray(self.classes_[scores.argmax(1)])
        return (scores >= 0.5).astype(np.int64)

    def _sizes(self) -> tuple[int, int]:
        """Numbers that a vote holds for each neighbour, and for each query."""
        return (self._votes.shape[1] if self.kind_ == "multilabel" else 3), len(self.prevalence_)

    def _scored(self, X: Any) -> tuple[Scores, Unlabelled]:
        self._check_fitted()
        X = features_of(self, X, reset=False)
        return self._counted(self._tiles(X, *self._sizes()), len(X), self.ks_)

    def _counted(self, tiles: Iterable[Tile], num_queries: int, ks: Sequence[int]) -> tuple[Scores, Unlabelled]:
        result = {k: np.zeros((num_queries, len(self.prevalence_))) for k in ks}
        unlabelled = {k: np.zeros(len(self.prevalence_), np.int64) for k in ks}
        for place, rows, weights in tiles:
            if self.kind_ == "multiclass":
                totals = class_totals(self._votes[rows], weights, len(self.classes_), ks)
                for k, total in zip(ks, totals):
                    result[k][place] = total / weights[:, :k].sum(1, keepdims=True) if self.renormalize else total
            else:
                for k, total in zip(ks, label_totals(self._votes, rows, weights, ks)):
                    positive, labelled = np.split(total, 2, axis=1)
                    unlabelled[k] += (labelled == 0).sum(0)
                    result[k][place] = self._label_scores(positive, labelled)
        return result, unlabelled

    def _label_scores(
        self, positive: Float64[np.ndarray, "B L"], labelled: Float64[np.ndarray, "B L"]
    ) -> Float64[np.ndarray, "B L"]:
        none = labelled == 0
        if not self.renormalize:
            return positive
        # Sums of the same weights in another order can exceed each other by rounding.
        share = np.minimum(positive / np.where(none, 1, labelled), 1)
        return np.where(none, self.prevalence_, share)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        tags.target_tags.multi_output = True
        return tags


class KNNRegressor(RegressorMixin, NeighbourEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """Weighted mean of the targets of the nearest training rows that are labelled for them.

    Weights and attributes as in `KNNProbe`; `prevalence_` holds the targets' means, which stand in where no neighbour
    is labelled.
    """

    def fit(self, X: Any, y: Any, mask: Any = None) -> "KNNRegressor":
        """Take the rows as the bank: `y` (N, T) numbers where `mask` (N, T) is true, or (N,) numbers.

        Raises:
            TaskError: arrays that do not fit together, values that are not finite, no labelled row.
            ConfigError: options that cannot be used, a k asked for by name above the bank's size, or a backend that is
                not there.
        """
        X = features_of(self, X, reset=True)
        if y is None:
            raise TaskError("requires y to be passed, but the target y is None; give numbers for every row")
        y = np.asarray(y, dtype=np.float64)
        mask = np.ones(y.shape, dtype=bool) if mask is None else np.asarray(mask, dtype=bool)
        if y.ndim not in (1, 2) or y.shape != mask.shape or len(y) != len(X):
            raise TaskError(f"targets and mask of {len(X)} rows are (N, T) or (N,); got {y.shape} and {mask.shape}")
        if not np.isfinite(y[mask]).all():
            raise TaskError("targets must be finite numbers, not NaN or infinity; mask other rows out")
        self._flat = y.ndim == 1
        y, mask = y.reshape(len(X), -1), mask.reshape(len(X), -1)
        used = mask.any(1)
        self._build(X, used)
        numbers, known = np.where(mask, y, 0)[used], mask[used]
        self.prevalence_ = numbers.sum(0) / np.maximum(known.sum(0), 1)
        self._votes = np.hstack([numbers, known]).astype(np.float64)
        return self

    def scores(self, X: Any) -> Scores:
        """Weighted means (Q, T) for every k, from one search; errors as in `KNNProbe.scores`."""
        scores, self.unlabelled_ = self._scored(X)
        return scores

    def leave_one_out(self, groups: np.ndarray | None = None) -> Scores:
        """Means for the bank's own rows, each of the others; see `KNNProbe.leave_one_out`."""
        ks = self._counts_within(groups)
        scores, self.unlabelled_ = self._averaged(
            self._tiles_within(groups, ks, *self._sizes()), len(self.bank_rows_), ks
        )
        return scores

    def predict(self, X: Any) -> Float64[np.ndarray, "Q ..."]:
        """Weighted means at `k_`, (Q, T), or (Q,) if the targets were; errors as in `scores`."""
        scores = self._scored(X)[0][self.k_]
        return scores[:, 0] if self._flat else scores

    def _sizes(self) -> tuple[int, int]:
        return self._votes.shape[1], len(self.prevalence_)

    def _scored(self, X: Any) -> tuple[Scores, Unlabelled]:
        self._check_fitted()
        X = features_of(self, X, reset=False)
        return self._averaged(self._tiles(X, *self._sizes()), len(X), self.ks_)

    def _averaged(self, tiles: Iterable[Tile], num_queries: int, ks: Sequence[int]) -> tuple[Scores, Unlabelled]:
        result = {k: np.zeros((num_queries, len(self.prevalence_))) for k in ks}
        unlabelled = {k: np.zeros(len(self.prevalence_), np.int64) for k in ks}
        for place, rows, weights in tiles:
            for k, total in zip(ks, label_totals(self._votes, rows, weights, ks)):
                number, known = np.split(total, 2, axis=1)
                none = known == 0
                unlabelled[k] += none.sum(0)
                result[k][place] = np.where(none, self.prevalence_, number / np.where(none, 1, known))
        return result, unlabelled

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


def _any(X: Float[np.ndarray, "N D"], y: np.ndarray, mask: np.ndarray | None) -> Bool[np.ndarray, " N"]:
    """The mask of classes of any type, once rows, classes and mask fit together."""
    numbers: Int[np.ndarray, " N"] = np.zeros(y.shape, np.int64)
    return check_labels(X, numbers, mask, "multiclass")
