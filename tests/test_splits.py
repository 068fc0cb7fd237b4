"""Group-wise splits: nothing of a group in two parts, nothing moved by growth, shares as asked."""

import hashlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featstore.datasets.splits import SPLIT_NAMES, carve, seeded_rank, split_by_group
from featstore.errors import ConfigError

groups_lists = st.lists(st.sampled_from([f"p{number}" for number in range(40)]), max_size=60)


@settings(max_examples=100, deadline=None)
@given(groups_lists, groups_lists, st.integers(-2, 5))
def test_growth_never_moves_a_group_and_no_group_is_in_two_parts(old: list[str], new: list[str], seed: int) -> None:
    before = split_by_group(old, seed=seed)
    after = split_by_group(old + new, seed=seed)
    assert after[: len(old)] == before
    assert set(after) <= {"train", "val", "test"}
    parts = {group: {part for part, other in zip(after, old + new) if other == group} for group in old + new}
    assert all(len(found) == 1 for found in parts.values())


@settings(max_examples=50, deadline=None)
@given(st.permutations([f"p{number}" for number in range(12)]))
def test_order_does_not_matter(groups: list[str]) -> None:
    straight = dict(zip(sorted(groups), split_by_group(sorted(groups))))
    assert dict(zip(groups, split_by_group(groups))) == straight


@pytest.mark.parametrize("fractions", [(0.7, 0.1, 0.2), (0.6, 0.15, 0.25), (0.0, 0.5, 0.5), (1.0, 0.0, 0.0)])
def test_shares_are_as_asked(fractions: tuple[float, float, float]) -> None:
    size = 10000
    counts = Counter(split_by_group([str(number) for number in range(size)], fractions=fractions, seed=3))
    for name, share in zip(("train", "val", "test"), fractions):
        deviation = (size * share * (1 - share)) ** 0.5  # of a binomial count
        assert abs(counts[name] - size * share) <= 4 * deviation, name


def test_ranks_are_uniform_fixed_and_depend_on_the_seed() -> None:
    ranks = np.sort([seeded_rank(str(number), 0) for number in range(5000)])
    assert ranks[0] >= 0
    assert ranks[-1] < 1
    distance = np.abs(ranks - (np.arange(5000) + 0.5) / 5000).max()
    assert distance < 1.63 / 5000**0.5  # Kolmogorov-Smirnov at 1%
    expected = int.from_bytes(hashlib.sha256(b"7:patient-1").digest()[:8], "little") / 2**64
    assert seeded_rank("patient-1", 7) == expected
    assert split_by_group(["a", "b", "c", "d"], seed=0) != split_by_group(["a", "b", "c", "d"], seed=1)
    # Published splits rest on these: they must never change.
    parts = split_by_group([f"patient{number}" for number in range(20)], seed=0)
    assert [number for number, part in enumerate(parts) if part == "val"] == [9]
    assert [number for number, part in enumerate(parts) if part == "test"] == [5, 10, 13, 14, 15, 17, 19]


@pytest.mark.parametrize("fractions", [(0.5, 0.5, 0.5), (-0.1, 0.6, 0.5), (0.3, 0.3, 0.3)])
def test_fractions_that_are_none(fractions: tuple[float, float, float]) -> None:
    with pytest.raises(ConfigError, match=r"split fractions must be >= 0 and add up to 1, got \("):
        split_by_group(["a"], fractions=fractions)


@settings(max_examples=100, deadline=None)
@given(groups_lists, st.floats(0.01, 0.99), st.integers(0, 3))
def test_carve_takes_the_exact_number_of_whole_groups(groups: list[str], fraction: float, seed: int) -> None:
    taken = carve(groups, fraction=fraction, seed=seed)
    assert taken.shape == (len(groups),)
    inside = {group for group, mark in zip(groups, taken) if mark}
    outside = {group for group, mark in zip(groups, taken) if not mark}
    assert not inside & outside
    total = len(set(groups))
    expected = 0 if total < 2 else min(total - 1, max(1, round(fraction * total)))
    assert len(inside) == expected
    if inside:
        assert max(seeded_rank(group, seed) for group in inside) <= min(seeded_rank(group, seed) for group in outside)


@pytest.mark.parametrize(("size", "expected"), [(0, 0), (1, 0), (2, 1), (3, 1), (10, 1), (14, 1), (16, 2), (995, 100)])
def test_carve_of_a_tenth(size: int, expected: int) -> None:
    assert carve([str(number) for number in range(size)], fraction=0.1).sum() == expected


def test_split_names_lead_to_three_parts() -> None:
    assert set(SPLIT_NAMES.values()) == {"train", "val", "test", ""}
    assert all(name == name.lower() for name in SPLIT_NAMES)
