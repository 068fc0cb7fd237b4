"""Group-wise seeded splits: nothing that shares a patient is ever in two parts."""

import hashlib
from collections.abc import Sequence

import numpy as np

from featstore.errors import ConfigError

# What people call the parts, and what we call them.
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validate": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
    "": "",
}


def seeded_rank(group: str, seed: int) -> float:
    """A number in [0, 1) fixed by the group's name and the seed alone, so that new groups never move old ones."""
    raw = hashlib.sha256(f"{seed}:{group}".encode()).digest()
    return int.from_bytes(raw[:8], "little") / 2.0**64


def split_by_group(
    groups: Sequence[str], *, fractions: tuple[float, float, float] = (0.7, 0.1, 0.2), seed: int = 0
) -> list[str]:
    """Assign each row to train, val or test by its group's seeded rank.

    The assignment of a group depends on its own name only: a data set that grows keeps its split.

    Raises:
        ConfigError: the fractions are negative or do not add up to 1.
    """
    if min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-9:
        raise ConfigError(f"split fractions must be >= 0 and add up to 1, got {fractions}")
    bounds = (fractions[0], fractions[0] + fractions[1])
    part = {}
    for group in set(groups):
        rank = seeded_rank(group, seed)
        part[group] = "train" if rank < bounds[0] else "val" if rank < bounds[1] else "test"
    return [part[group] for group in groups]


def carve(
    groups: Sequence[str], *, fraction: float = 0.1, seed: int = 0
) -> "np.ndarray[tuple[int], np.dtype[np.bool_]]":
    """Mark the rows of a seeded share of the groups, at least one group when there are two or more.

    Exactly round(fraction * groups) groups are taken, those with the smallest rank.
    """
    names = sorted(set(groups), key=lambda group: (seeded_rank(group, seed), group))
    count = 0 if len(names) < 2 else min(len(names) - 1, max(1, round(fraction * len(names))))
    taken = set(names[:count])
    return np.fromiter((group in taken for group in groups), bool, len(groups))


def systematic_split(names: Sequence[str], *, test: float, val: float) -> dict[str, str]:
    """train, val or test for each name by evenly spaced picks: `test` of all, `val` of the rest, in the order given.

    The rule of Baharoon et al. 2023; their own lists depend on an order that was not published.
    """
    held = _evenly(len(names), test)
    rest = [index for index in range(len(names)) if index not in held]
    chosen = {rest[index] for index in _evenly(len(rest), val)}
    return {
        name: "test" if index in held else "val" if index in chosen else "train" for index, name in enumerate(names)
    }


def _evenly(count: int, share: float) -> set[int]:
    """`round(share * count)` evenly spaced numbers below `count`."""
    wanted = round(share * count)
    return {number * count // wanted for number in range(wanted)}
