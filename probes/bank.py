"""What the kNN estimators share: a bank of training rows, its search, the weights of neighbours, leave-one-out."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Bool, Float, Float64, Int
from sklearn.base import BaseEstimator
from sklearn.exceptions import NotFittedError

from featstore.errors import ConfigError, TaskError
from probes.checks import check_finite
from probes.neighbours import SCORE_BYTES, Backend, Device, Index, build_index, distances, ranked, unit_rows
from probes.votes import VOTES, Vote, distance_weights, softmax_weights

DEFAULT_K = (10, 20, 100, 200)
LARGEST_TILE = 4096  # queries at a time; more gain nothing

Estimator = TypeVar("Estimator", bound="NeighbourEstimator")


class NotFittedTaskError(TaskError, NotFittedError):  # type: ignore[misc]  # scikit-learn has no types
    """Asked before `fit`; also scikit-learn's error of that name."""


class Tile(NamedTuple):
    """Some queries: their place, the rows of the bank nearest to them in order, and how much each counts."""

    place: slice
    rows: Int[np.ndarray, "B k"]
    weights: Float64[np.ndarray, "B k"]


class NeighbourEstimator(BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """Base of the kNN estimators; parameters are checked in `fit`, as in scikit-learn."""

    def __init__(
        self,
        *,
        k: int | str | Sequence[int | str] | None = None,
        vote: Vote = "softmax",
        temperature: float = 0.07,
        standardize: bool = False,
        backend: Backend = "auto",
        device: Device = "auto",
    ) -> None:
        """k: neighbour counts, "all" for the whole bank; None for 10, 20, 100 and 200 up to the bank's size.
        temperature: > 0, of the softmax vote. standardize: scale by the bank's mean and deviation first.
        """
        self.k, self.vote, self.temperature, self.standardize = k, vote, temperature, standardize
        self.backend, self.device = backend, device

    def choose(self: Estimator, k: int) -> Estimator:
        """Let `predict` and `predict_proba` use this k.

        Raises:
            ConfigError: a k that is not scored.
        """
        self._check_fitted()
        if k not in self.ks_:
            raise ConfigError(f"k={k} is not among the fitted {', '.join(map(str, self.ks_))}; pass it as k before fit")
        self.k_ = k
        return self

    def keep_within(self: Estimator, groups: np.ndarray) -> int:
        """Score from now on the counts alone that `leave_one_out` answers; returns the largest count that it can.

        "all" becomes that count, as do the default counts where each of them is larger; the others are dropped.

        Raises:
            ConfigError: a k asked for by name is larger. TaskError: groups of other rows.
        """
        kept = self._counts_within(groups)
        limit = self._limit_within(groups)
        self.dropped_k_ = tuple(k for k in self._asked()[0] if k > limit)
        self.ks_, self.k_ = kept, kept[-1]
        return limit

    def _asked(self) -> tuple[list[int], bool]:
        """(counts asked for or by default, ascending; whether the whole bank is asked for by name).

        Raises:
            ConfigError: neither counts nor "all".
        """
        asked = DEFAULT_K if self.k is None else (self.k,) if isinstance(self.k, int | np.integer | str) else self.k
        named = [item for item in asked if isinstance(item, str)]
        if set(named) - {"all"}:
            raise ConfigError(f"k must be counts or 'all', got {self.k!r}")
        counts = sorted(int(item) for item in asked if not isinstance(item, str))
        if not (counts or named) or min(counts, default=1) < 1 or len(set(asked)) < len(list(asked)):
            raise ConfigError(f"k must be different counts of at least 1, got {self.k}")
        return counts, bool(named)

    def _build(self, X: Float[np.ndarray, "N D"], used: Bool[np.ndarray, " N"], reserve: int = 0) -> None:
        """Take the used rows as the bank; k is at most their number less `reserve`.

        Raises:
            TaskError: no row, or features that are not finite or zero. ConfigError: see `_check_options`.
        """
        self._check_options()
        if not used.any():
            raise TaskError(
                f"no labelled row to take as neighbours among {len(X)}; check the masks and the training split"
            )
        self.bank_rows_ = np.flatnonzero(used)
        if not used.all():
            X = X[used]
        self._set_counts(len(X), reserve)
        if self.standardize:
            check_finite(X)
            deviation = X.std(0, dtype=np.float64)
            # A constant column says nothing; its rounding must not become a feature.
            flat = deviation <= 1e-6 * np.abs(X).max(0)
            self._centre, self._scale = X.mean(0, dtype=np.float64), np.where(flat, 1.0, deviation)
        self._index, self.backend_ = build_index(self._unit(X), self.backend, self.device)

    def _unit(self, X: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
        return unit_rows((X - self._centre) / self._scale if self.standardize else X)

    def _check_options(self) -> None:
        if self.vote not in VOTES:
            raise ConfigError(f"vote is one of {', '.join(VOTES)}, got {self.vote!r}")
        if not self.temperature > 0:
            raise ConfigError(f"temperature must be above 0, got {self.temperature}")

    def _set_counts(self, num_rows: int, reserve: int = 0) -> None:
        """Counts that the bank can answer; the whole bank where every default is larger. `reserve`: rows left out."""
        counts, whole = self._asked()
        limit = num_rows - reserve
        above = tuple(count for count in counts if count > limit)
        if above and self.k is not None:
            raise ConfigError(
                f"k={above[-1]} neighbours asked of a bank with {'one sample' if limit == 1 else f'{limit} rows'}"
                f"{' beside the row itself' if reserve else ''}; lower k or extract more"
            )
        self.dropped_k_ = above
        self.ks_ = tuple(sorted({count for count in counts if count <= limit} | ({limit} if whole else set())))
        if limit < 1:
            raise ConfigError("neighbours beside the row itself asked of a bank with one row; extract more")
        self.ks_ = self.ks_ or (limit,)
        self.k_ = self.ks_[-1]

    def _tiles(self, queries: Float[np.ndarray, "Q D"], per_neighbour: int, per_query: int) -> Iterator[Tile]:
        """Search for tiles of queries, so that what is held at once stays within SCORE_BYTES.

        `per_neighbour` and `per_query` are the numbers that a vote holds for each.
        """
        return self._tiles_of(self._unit(queries), per_neighbour, per_query)

    def _tiles_of(self, unit: Float[np.ndarray, "Q D"], per_neighbour: int, per_query: int) -> Iterator[Tile]:
        tile = _tile(self.ks_[-1] * (per_neighbour + 3) + per_query)
        for start in range(0, len(unit), tile):
            part = unit[start : start + tile]
            similarity, rows = ranked(self._index, part, self.ks_[-1])
            yield Tile(slice(start, start + tile), rows, self._weights(part, similarity, rows))

    def _tiles_within(
        self, groups: np.ndarray | None, ks: Sequence[int], per_neighbour: int, per_query: int
    ) -> Iterator[Tile]:
        """The bank's own rows as queries, whose neighbours are never themselves, nor of their group.

        The row itself is told by its number: an equal row with a lower one would come first.
        """
        bank = self._index.bank
        groups = np.arange(len(bank)) if groups is None else np.unique(groups, return_inverse=True)[1]
        largest = int(np.bincount(groups).max())
        asked = min(len(bank), ks[-1] + largest)
        tile = _tile(asked * (per_neighbour + 3) + per_query)
        for start in range(0, len(bank), tile):
            part = bank[start : start + tile]
            similarity, rows = ranked(self._index, part, asked)
            own = groups[rows] == groups[start : start + tile, None]
            order = np.argsort(own, axis=1, kind="stable")[:, : ks[-1]]  # others first, in their order
            similarity, rows = (np.take_along_axis(values, order, 1) for values in (similarity, rows))
            yield Tile(slice(start, start + tile), rows, self._weights(part, similarity, rows))

    def _limit_within(self, groups: np.ndarray | None) -> int:
        """Rows that every row of the bank has outside its own group.

        Raises:
            TaskError: groups of other rows.
        """
        self._check_fitted()
        num_rows = len(self.bank_rows_)
        if groups is not None and len(groups) != num_rows:
            raise TaskError(f"leave-one-out needs the group of each of the bank's {num_rows} rows, got {len(groups)}")
        return num_rows - (1 if groups is None else int(np.unique(groups, return_counts=True)[1].max()))

    def _counts_within(self, groups: np.ndarray | None) -> tuple[int, ...]:
        """Counts that every row of the bank can answer without the largest group; "all" is the largest of them.

        Raises:
            ConfigError: a k asked for by name is above that, or nothing is left. TaskError: groups of other rows.
        """
        limit, num_rows = self._limit_within(groups), len(self.bank_rows_)
        counts, whole = self._asked()
        above = [] if self.k is None else [count for count in counts if count > limit]
        if limit < 1 or above:
            raise ConfigError(
                f"leave-one-out with k={above[-1] if above else self.ks_[-1]} needs as many rows outside each row's "
                f"own group; the bank has {num_rows} rows, {num_rows - limit} of them in one group; "
                f"{'lower k' if limit else 'add samples of other groups'}"
            )
        kept = {count for count in counts if count <= limit} | ({limit} if whole else set())
        return tuple(sorted(kept)) or (limit,)

    def _weights(
        self, queries: Float[np.ndarray, "B D"], similarity: Float[np.ndarray, "B k"], rows: Int[np.ndarray, "B k"]
    ) -> Float64[np.ndarray, "B k"]:
        """Weights of the neighbours: ones, or numbers with a sum of 1 over the largest k."""
        if self.vote == "majority":
            return np.ones(rows.shape)  # counts are exact, so that equal votes are equal numbers in any order
        if self.vote == "distance":
            return distance_weights(distances(self._index.bank, queries, rows))
        return softmax_weights(similarity, self.temperature)

    def _check_fitted(self) -> None:
        if not hasattr(self, "_index"):
            raise NotFittedTaskError(f"this {type(self).__name__} is not fitted yet; call fit first")

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "_index")

    def __getstate__(self) -> dict[str, Any]:
        """The index is kept as its bank, and built again where it is loaded."""
        state = dict(super().__getstate__())
        index: Index | None = state.pop("_index", None)
        if index is not None:
            state["_bank"] = np.array(index.bank)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        bank = state.pop("_bank", None)
        super().__setstate__(state)
        if bank is not None:
            self._index, self.backend_ = build_index(bank, self.backend, self.device)


def _tile(per_query: int) -> int:
    return min(max(SCORE_BYTES // (8 * per_query), 16), LARGEST_TILE)
