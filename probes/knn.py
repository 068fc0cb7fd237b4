"""k nearest neighbours by cosine similarity with DINO's weighted vote, for classes and for masked labels.

Weights are softmax(similarity / T) over the k_max nearest rows; the vote for a smaller k is the sum over the first k of
them. One search at k_max serves every k.
Source: Wu et al. 2018 (weighted k-NN); k, T and the order of softmax and cut as in DINO's and DINOv2's evaluation.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from featstore.errors import ConfigError, TaskError
from probes.checks import CHUNK, Kind, check_finite, check_labels, check_width
from probes.neighbours import SCORE_BYTES, SPARE, Backend, Index, build_index

DEFAULT_K = (10, 20, 100, 200)
# exp of the lowest exponent is above zero in float64, so that every neighbour keeps some weight at any temperature.
LOWEST_EXPONENT = -700.0


class KNNProbe:
    """Weighted vote of the nearest training rows, scikit-learn style.

    After `fit`: `ks_` the neighbour counts that are scored, `k_` the one that `predict` uses (the largest until
    `choose`), `dropped_k_` default counts above the bank, `backend_` what searches ("faiss" or "torch"),
    `prevalence_` (L,) of the labels among their labelled rows (0.5 where a label has none).

    After `scores` on labels: `unlabelled_`, for each k the number of queries per label that had no labelled neighbour
    and got the prevalence.
    """

    def __init__(
        self, *, k: int | Sequence[int] | None = None, temperature: float = 0.07, backend: Backend = "auto"
    ) -> None:
        """k: neighbour counts; None for 10, 20, 100 and 200 up to the bank's size. temperature: > 0.

        Raises:
            ConfigError: counts below one or twice the same, or a temperature that is not positive.
        """
        self.k, self.temperature, self.backend = k, temperature, backend
        counts = [k] if isinstance(k, int) else list(DEFAULT_K if k is None else k)
        if not counts or min(counts) < 1 or len(set(counts)) < len(counts):
            raise ConfigError(f"k must be different counts of at least 1, got {k}")
        if not temperature > 0:
            raise ConfigError(f"temperature must be above 0, got {temperature}")
        self._counts = tuple(sorted(counts))

    def fit(
        self,
        X: Float[np.ndarray, "N D"],
        y: np.ndarray,
        mask: Bool[np.ndarray, "..."] | None = None,
        *,
        num_classes: int | None = None,
    ) -> "KNNProbe":
        """Take the rows as the bank: `y` (N,) class numbers, or (N, L) of 0/1 where `mask` (N, L) is true.

        Rows without any valid label are left out and may hold NaN.

        Raises:
            TaskError: arrays that do not fit together, features that are not finite or all zero, no labelled row.
            ConfigError: a k asked for by name above the bank's size, or a backend that is not there.
        """
        kind: Kind = "multiclass" if y.ndim == 1 else "multilabel"
        mask = check_labels(X, y, mask, kind, num_classes)
        used = mask if kind == "multiclass" else mask.any(1)
        if not used.any():
            raise TaskError(
                f"no labelled row to take as neighbours among {len(X)}; check the masks and the training split"
            )
        if not used.all():
            X, y, mask = X[used], y[used], mask[used]
        self._set_counts(len(X))
        self.width_, self.kind_ = X.shape[1], kind
        self._index, self.backend_ = build_index(unit_rows(X), self.backend)
        if kind == "multiclass":
            self.num_classes_ = num_classes or max(2, int(y.max()) + 1)
            self.prevalence_ = np.bincount(y, minlength=self.num_classes_) / len(y)
            self._votes = y.astype(np.int64)
        else:
            positive, labelled = ((y == 1) & mask).sum(0), mask.sum(0)
            self.prevalence_ = np.where(labelled > 0, positive / np.maximum(labelled, 1), 0.5)
            self._votes = np.hstack([(y == 1) & mask, mask]).astype(np.float64)  # (N, 2 L)
        return self

    def _set_counts(self, num_rows: int) -> None:
        """Counts that the bank can answer; the whole bank where every default is larger."""
        above = tuple(count for count in self._counts if count > num_rows)
        if above and self.k is not None:
            raise ConfigError(f"k={above[-1]} neighbours asked of a bank with {num_rows} rows; lower k or extract more")
        self.dropped_k_ = above
        self.ks_ = tuple(count for count in self._counts if count <= num_rows) or (num_rows,)
        self.k_ = self.ks_[-1]

    def choose(self, k: int) -> "KNNProbe":
        """Let `predict` and `predict_proba` use this k.

        Raises:
            ConfigError: a k that is not scored.
        """
        if k not in self._fitted().ks_:
            raise ConfigError(f"k={k} is not among the fitted {', '.join(map(str, self.ks_))}; pass it as k before fit")
        self.k_ = k
        return self

    def scores(self, X: Float[np.ndarray, "Q D"]) -> dict[int, Float[np.ndarray, "Q L"]]:
        """Votes for every k, from one search.

        Classes: sums of weights, each row's total at most 1 (1 at the largest k). Labels: the weighted share of
        positives among the first k neighbours that are labelled for it; the prevalence where none is.

        Raises:
            TaskError: another width than in `fit`, or features that are not finite or all zero.
        """
        check_width(X, self._fitted().width_)
        queries = unit_rows(X)
        result = {k: np.zeros((len(X), len(self.prevalence_))) for k in self.ks_}
        self.unlabelled_ = {k: np.zeros(len(self.prevalence_), np.int64) for k in self.ks_}
        vote = self._class_votes if self.kind_ == "multiclass" else self._label_votes
        tile = self._tile()
        for start in range(0, len(X), tile):
            similarity, rows = ranked(self._index, queries[start : start + tile], self.ks_[-1])
            exponent = (similarity.astype(np.float64) - similarity[:, :1]) / self.temperature
            weights = np.exp(np.maximum(exponent, LOWEST_EXPONENT))
            weights /= weights.sum(1, keepdims=True)
            for k, votes in zip(self.ks_, vote(weights, rows)):
                result[k][start : start + tile] = votes
        return result

    def predict_proba(self, X: Float[np.ndarray, "Q D"]) -> Float[np.ndarray, "Q L"]:
        """Scores at `k_`; those of classes divided by their sum. Errors as in `scores`."""
        scores = self.scores(X)[self.k_]
        return scores / scores.sum(1, keepdims=True) if self.kind_ == "multiclass" else scores

    def predict(self, X: Float[np.ndarray, "Q D"]) -> Int[np.ndarray, "Q ..."]:
        """Class with the largest score (Q,), or labels with a score of at least one half (Q, L), at `k_`."""
        scores = self.scores(X)[self.k_]
        return scores.argmax(1) if self.kind_ == "multiclass" else (scores >= 0.5).astype(np.int64)

    def _class_votes(
        self, weights: Float[np.ndarray, "B k"], rows: Int[np.ndarray, "B k"]
    ) -> Iterator[Float[np.ndarray, "B C"]]:
        """Totals per class after each k: the rows between two counts are added to one accumulator."""
        num_queries, num_classes = len(rows), self.num_classes_
        cell = self._votes[rows] + np.arange(num_queries)[:, None] * num_classes
        total = np.zeros(num_queries * num_classes)
        start = 0
        for k in self.ks_:
            new = slice(start, k)
            total += np.bincount(cell[:, new].ravel(), weights[:, new].ravel(), minlength=len(total))
            start = k
            yield total.reshape(num_queries, num_classes)

    def _label_votes(
        self, weights: Float[np.ndarray, "B k"], rows: Int[np.ndarray, "B k"]
    ) -> Iterator[Float[np.ndarray, "B L"]]:
        """Weight of positives over weight of labelled neighbours after each k."""
        votes = self._votes[rows]  # (B, k, 2 L)
        num_labels = len(self.prevalence_)
        total = np.zeros((len(rows), 2 * num_labels))
        start = 0
        for k in self.ks_:
            total += (weights[:, None, start:k] @ votes[:, start:k])[:, 0]
            start = k
            positive, labelled = total[:, :num_labels], total[:, num_labels:]
            none = labelled == 0
            self.unlabelled_[k] += none.sum(0)
            yield np.where(none, self.prevalence_, self._bounded(positive / np.where(none, 1, labelled)))

    def _bounded(self, share: Float[np.ndarray, "B L"]) -> Float[np.ndarray, "B L"]:
        # Sums of the same weights in another order can exceed each other by rounding.
        return np.asarray(np.minimum(share, 1))

    def _tile(self) -> int:
        """Queries at a time, so that similarities and votes stay within SCORE_BYTES."""
        per_query = self.ks_[-1] * (self._votes.shape[1] if self.kind_ == "multilabel" else 3) + len(self.prevalence_)
        per_query = max(per_query, len(self._index.bank) if self.backend_ == "torch" else 0)
        return min(max(SCORE_BYTES // (8 * per_query), 16), 4096)

    def _fitted(self) -> "KNNProbe":
        if not hasattr(self, "ks_"):
            raise TaskError("this probe is not fitted yet; call fit first")
        return self


class KNNRegressor(KNNProbe):
    """Similarity-weighted mean of the targets of the nearest training rows that are labelled for them.

    `prevalence_` holds the targets' means, which stand in where no neighbour is labelled; weights as in `KNNProbe`.
    """

    def fit(
        self,
        X: Float[np.ndarray, "N D"],
        y: np.ndarray,
        mask: Bool[np.ndarray, "..."] | None = None,
        *,
        num_classes: int | None = None,
    ) -> "KNNRegressor":
        """Take the rows as the bank: `y` (N, T) numbers where `mask` (N, T) is true; `num_classes` stays None.

        Raises:
            TaskError: arrays that do not fit together, values that are not finite, no labelled row.
            ConfigError: a k asked for by name above the bank's size, or a backend that is not there.
        """
        mask = np.ones(y.shape, dtype=bool) if mask is None else mask
        if num_classes is not None or y.ndim != 2 or y.shape != mask.shape or len(y) != len(X):
            raise TaskError(f"targets and mask of {len(X)} rows are (N, T); got {y.shape} and {mask.shape}")
        if not np.isfinite(y[mask]).all():
            raise TaskError("targets must be finite numbers; mask other rows out")
        used = mask.any(1)
        # The bank, its counts and its index are those of labels; the votes are replaced.
        super().fit(X, mask.astype(np.int8), mask)
        numbers = np.where(mask, y, 0).astype(np.float64)[used]
        known = mask[used]
        self.prevalence_ = numbers.sum(0) / np.maximum(known.sum(0), 1)
        self._votes = np.hstack([numbers, known])
        return self

    def predict(self, X: Float[np.ndarray, "Q D"]) -> Float[np.ndarray, "Q T"]:
        """Weighted means at `k_`; errors as in `scores`."""
        return self.scores(X)[self.k_]

    def _bounded(self, share: Float[np.ndarray, "B L"]) -> Float[np.ndarray, "B L"]:
        return share


def unit_rows(X: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
    """Rows divided by their L2 norm, float32.

    Raises:
        TaskError: a row is not finite, or zero.
    """
    result = np.empty(X.shape, np.float32)
    for start in range(0, len(X), CHUNK):
        part = X[start : start + CHUNK].astype(np.float64)
        square = np.einsum("ij,ij->i", part, part)
        odd = np.flatnonzero(~((square > 1e-200) & (square < 1e200)))
        if len(odd):
            check_finite(X)
            largest = np.abs(part[odd]).max(1, initial=0)
            if not largest.all():
                row = start + int(odd[largest.argmin()])
                raise TaskError(
                    f"row {row} of the features is zero and has no direction; leave failed rows out with the mask"
                )
            part[odd] /= largest[:, None]  # squares had left the range of float64
            square[odd] = np.square(part[odd]).sum(1)
        np.multiply(part, (1 / np.sqrt(square))[:, None], out=result[start : start + CHUNK], casting="same_kind")
    return result


def ranked(
    index: Index, queries: Float[np.ndarray, "Q D"], k: int
) -> tuple[Float[np.ndarray, "Q k"], Int[np.ndarray, "Q k"]]:
    """(similarity, row) of the k nearest rows in descending order; equal similarities in order of the row."""
    num_rows = len(index.bank)
    asked = min(k + SPARE, num_rows)
    similarity, rows = index.nearest(queries, asked)
    # Both backends answer in descending order; only rows with equal neighbours have to be put in order.
    tied = np.flatnonzero((similarity[:, 1:] == similarity[:, :-1]).any(1))
    order = np.lexsort((rows[tied], -similarity[tied]))
    rows[tied] = np.take_along_axis(rows[tied], order, 1)
    if asked < num_rows:
        # Which of more than SPARE equal rows came back is chance: rank the whole bank for these queries.
        for query in np.flatnonzero(similarity[:, k - 1] == similarity[:, -1]):
            every = index.bank @ queries[query]
            best = np.argsort(-every, kind="stable")[:k]
            similarity[query, :k], rows[query, :k] = every[best], best
    return similarity[:, :k], rows[:, :k]
