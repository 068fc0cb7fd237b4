"""The exact search for similar pairs, against a full matrix of products; rows that are equal by their bytes."""

import numpy as np
import pytest

from featstore.store.hashes import equal_rows
from probes import duplicates
from probes.duplicates import Found, Side, Vectors, nearest_within, quantiles, search


def unit(values: np.ndarray) -> np.ndarray:
    values = values.astype(np.float64)
    return np.asarray(values / np.linalg.norm(values, axis=1, keepdims=True))


class Given(Vectors):
    def __init__(self, values: np.ndarray):
        self.values, self.width = values.astype(np.float32), values.shape[1]

    def unit(self, rows: np.ndarray) -> np.ndarray:
        return np.asarray(self.values[rows])


def test_most_similar_pairs_are_kept_when_there_are_more_than_can_be() -> None:
    rng = np.random.default_rng(0)
    values = unit(rng.standard_normal((60, 5)))
    groups = np.arange(60)
    found = Found(threshold=0.1, keep=7, floor=0.1)
    first, second = np.arange(20), np.arange(20, 60)
    told: list[int] = []
    search(Side(Given(values), first, groups[first]), Side(Given(values), second, groups[second]), found, told.append)
    scores = values[first] @ values[second].T
    assert found.count == (scores >= 0.1).sum() > 7
    wanted = np.sort(scores.ravel())[::-1][:7]
    np.testing.assert_allclose([similarity for similarity, _, _ in found.pairs], wanted, rtol=1e-5)
    assert all(abs(values[a] @ values[b] - similarity) < 1e-5 for similarity, a, b in found.pairs)
    np.testing.assert_allclose(found.nearest, scores.max(1), rtol=1e-5)
    assert len(told) == 1


@pytest.mark.parametrize(("first", "second"), [(0, 3), (3, 0), (0, 0)])
def test_an_empty_side_finds_nothing(first: int, second: int) -> None:
    values = unit(np.ones((3, 2)))
    found, groups = Found(threshold=0.0, keep=3, floor=0.0), np.arange(3)
    queries, bank = (Side(Given(values), np.arange(size), groups[:size]) for size in (first, second))
    search(queries, bank, found, lambda _: None)
    assert (found.count, found.pairs, len(found.nearest)) == (0, [], first)
    assert quantiles(found.nearest) is None


def test_large_patients_are_cut_and_many_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "WITHIN_GROUP", 4)
    monkeypatch.setattr(duplicates, "WITHIN_ROWS", 10)
    values = unit(np.random.default_rng(1).standard_normal((50, 3)))
    groups = np.array([0] * 20 + [1] * 20 + [2] * 9 + [3])
    found = nearest_within(Given(values), np.arange(50), groups, seed=0)
    assert len(found) == 12  # three patients of four pictures; a patient with one has no other
    assert found == nearest_within(Given(values), np.arange(50), groups, seed=0)
    assert nearest_within(Given(values), np.arange(0), groups[:0], seed=0) == []


def test_patients_are_counted_in_every_tile_and_stay_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "BANK_BYTES", 4 * 5 * 7)  # seven rows of the bank at once, in tiles of two
    monkeypatch.setattr(duplicates, "QUERY_ROWS", 3)
    monkeypatch.setattr(duplicates, "TILE_ROWS", 2)
    rng = np.random.default_rng(0)
    values, patients, alone = unit(rng.standard_normal((60, 5))), rng.integers(0, 4, 60), np.arange(60)
    first, second = np.arange(20), np.arange(20, 60)
    found = Found(threshold=0.1, keep=5, floor=0.1)
    queries, bank = (Side(Given(values), rows, alone[rows], patients[rows]) for rows in (first, second))
    search(queries, bank, found, lambda _: None)
    near = values[first] @ values[second].T >= 0.1
    assert found.count == near.sum()
    assert found.within == (near & (patients[first][:, None] == patients[second])).sum() > found.keep
    judged_by_none = Found(threshold=np.inf, keep=5, floor=-2.0)
    search(queries, bank, judged_by_none, lambda _: None)
    assert judged_by_none.within == 0


def test_slices_of_one_file_are_not_duplicates_of_each_other() -> None:
    hashes = ["a", "a", "a", "a", None, None, "b"]
    parts = ["axis=axial&index=0", "axis=axial&index=1", "axis=axial&index=0", None, None, None, None]
    assert equal_rows(hashes, parts) == [[0, 2]]
    assert equal_rows(["a", "a"], [None, ""]) == [[0, 1]]
