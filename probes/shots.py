"""Which training rows are shots: nested, from one seeded table (repeat, label or class, shot).

What a shot means. Several labels: each label is a problem of its own, and n shots are n positives and n negatives of
that label; rows where it is masked are never drawn. Classes: n shots are n of every class. By sample a shot is one row.
By patient it is a patient with all of its training rows of that class; a patient with a positive row is never a
negative shot. A percentage is a share of all training patients or samples, drawn once for all labels, which then have
as many positives as fall to them.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int, Integer, Shaped

By = Literal["patient", "sample"]
NONE = -1  # no row: draws of one table have different lengths


@dataclass(frozen=True)
class Budget:
    """How many labels a draw holds; `name` is what tables say."""

    name: str
    shots: int | None = None
    percent: float | None = None


@dataclass(frozen=True)
class Shots:
    """Draws of some problems at one budget, one row each.

    `rows` training rows, NONE at the end of a shorter draw; `shot` the number of the sample or patient within its class
    (or draw), which inner folds never part; `y` class of each row (0/1 for a label); `repeat` (E,) and `label` (E,):
    the label that is fitted, 0 for classes.
    """

    rows: Integer[np.ndarray, "E n"]
    shot: Integer[np.ndarray, "E n"]
    y: Integer[np.ndarray, "E n"]
    repeat: Integer[np.ndarray, " E"]
    label: Integer[np.ndarray, " E"]

    @property
    def valid(self) -> Bool[np.ndarray, "E n"]:
        """Where a draw has a row."""
        return np.asarray(self.rows != NONE)

    def take(self, index: Integer[np.ndarray, " e"]) -> "Shots":
        """Some of the problems, without columns that none of them fills."""
        length = int(self.valid[index].sum(1).max(initial=0))
        return Shots(
            self.rows[index, :length],
            self.shot[index, :length],
            self.y[index, :length],
            self.repeat[index],
            self.label[index],
        )


@dataclass(frozen=True)
class Pool:
    """Rows of one class in runs of equal unit (sample or patient): unit u has rows[starts[u]:starts[u + 1]]."""

    rows: Int[np.ndarray, " m"]
    starts: Int[np.ndarray, " units_and_one"]

    @classmethod
    def of(cls, rows: Int[np.ndarray, " m"], groups: Shaped[np.ndarray, " N"], by: By) -> "Pool":
        """Gather rows by patient, in order of their name, or take each for itself."""
        if by == "sample":
            return cls(rows, np.arange(len(rows) + 1))
        names, unit = np.unique(groups[rows], return_inverse=True)
        order = np.argsort(unit, kind="stable")
        return cls(rows[order], np.append(0, np.cumsum(np.bincount(unit, minlength=len(names)))))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def drawn(self, units: Int[np.ndarray, " s"]) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """(rows, number of the unit in the draw) of units in order."""
        sizes = self.starts[units + 1] - self.starts[units]
        shot = np.repeat(np.arange(len(units)), sizes)
        within = np.arange(len(shot)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return self.rows[self.starts[units][shot] + within], shot


def seeded_order(key: Sequence[int], count: int, most: int) -> Int[np.ndarray, " most"]:
    """The first `most` of a random order of `count` things; to ask for more never changes the earlier ones.

    Source: Fisher and Yates' shuffle, stopped early, which moves only the places it touches.
    """
    moved: dict[int, int] = {}
    order = np.empty(most, np.int64)
    for place, value in enumerate(np.random.default_rng(list(key)).random(most).tolist()):
        other = place + int(value * (count - place))
        order[place] = moved.get(other, other)
        moved[other] = moved.get(place, place)
    return order


def pools(
    y: np.ndarray,
    mask: np.ndarray,
    groups: Shaped[np.ndarray, " N"],
    by: By,
    *,
    num_classes: int,
) -> list[list[Pool]]:
    """Pools of every problem: negatives and positives of each label (`y`, `mask` (N, L)), or the classes (N,)."""
    if y.ndim == 1:
        return [[Pool.of(np.flatnonzero(mask & (y == number)), groups, by) for number in range(num_classes)]]
    found = []
    for column in range(y.shape[1]):
        positive = np.flatnonzero(mask[:, column] & (y[:, column] == 1))
        negative = np.flatnonzero(mask[:, column] & (y[:, column] == 0))
        if by == "patient":
            negative = negative[~np.isin(groups[negative], np.unique(groups[positive]))]
        found.append([Pool.of(negative, groups, by), Pool.of(positive, groups, by)])
    return found


@dataclass(frozen=True)
class ShotTable:
    """The seeded order of every pool in every repeat; smaller budgets are prefixes of larger ones.

    `available` (problems,): shots that the smallest pool of a problem holds.
    """

    pools: list[list[Pool]]
    orders: list[list[list[Int[np.ndarray, "..."]]]]  # problem, class, repeat
    available: Int[np.ndarray, " problems"]
    num_repeats: int

    @classmethod
    def drawn(cls, found: list[list[Pool]], names: Sequence[str], most: int, *, repeats: int, seed: int) -> "ShotTable":
        """Draw up to `most` shots. The draw of a label depends on its name, not on the labels beside it."""
        orders = [
            [
                [
                    seeded_order((seed, zlib.crc32(name.encode()), number, repeat), len(pool), min(most, len(pool)))
                    for repeat in range(repeats)
                ]
                for number, pool in enumerate(classes)
            ]
            for name, classes in zip(names, found)
        ]
        available = np.array([min(len(pool) for pool in classes) for classes in found])
        return cls(found, orders, available, repeats)

    def at(self, num_shots: int) -> Shots:
        """The draws with `num_shots` of each class, of the problems that have as many."""
        draws = []
        for problem in np.flatnonzero(self.available >= num_shots):
            for repeat in range(self.num_repeats):
                parts = [
                    pool.drawn(orders[repeat][:num_shots])
                    for pool, orders in zip(self.pools[problem], self.orders[problem])
                ]
                y = np.repeat(np.arange(len(parts)), [len(rows) for rows, _ in parts])
                rows, shot = (np.concatenate([part[number] for part in parts]) for number in (0, 1))
                draws.append((rows, shot, y, repeat, int(problem)))
        return padded(draws)


def padded(draws: list[tuple[np.ndarray, np.ndarray, np.ndarray, int, int]]) -> Shots:
    """(rows, shot, y, repeat, label) of draws of any length as one table."""
    length = max((len(draw[0]) for draw in draws), default=0)
    rows = np.full((len(draws), length), NONE, np.int64)
    shot, y = np.zeros_like(rows), np.zeros_like(rows)
    for number, draw in enumerate(draws):
        for target, values in zip((rows, shot, y), draw[:3]):
            target[number, : len(values)] = values
    repeat, label = (np.array([draw[part] for draw in draws], np.int64) for part in (3, 4))
    return Shots(rows, shot, y, repeat, label)


def shared(units: list[tuple[np.ndarray, np.ndarray]], y: np.ndarray, mask: np.ndarray) -> Shots:
    """Draws (rows, shot), one a repeat, that serve all labels: each label has those of its rows that are not masked."""
    draws = []
    for repeat, (rows, shot) in enumerate(units):
        for column in range(1 if y.ndim == 1 else y.shape[1]):
            known, values = (mask[rows], y[rows]) if y.ndim == 1 else (mask[rows, column], y[rows, column])
            draws.append((rows[known], shot[known], values[known].astype(np.int64), repeat, column))
    return padded(draws)


def percentage(
    labelled: Int[np.ndarray, " m"],
    groups: Shaped[np.ndarray, " N"],
    by: By,
    percent: float,
    *,
    repeats: int,
    seed: int,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(rows, shot) of a share of the training patients or samples, at least one; a smaller share is a prefix."""
    pool = Pool.of(labelled, groups, by)
    most = max(1, int(np.ceil(len(pool) * percent / 100 - 1e-9)))
    draws = []
    for repeat in range(repeats):
        order = np.random.default_rng([seed, zlib.crc32(b"percent"), repeat]).permutation(len(pool))
        draws.append(pool.drawn(order[:most]))
    return draws


def first_patients(
    y: np.ndarray, mask: np.ndarray, groups: Shaped[np.ndarray, " N"], num_shots: int, *, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """(rows, shot): of each class the first patients in order of their name that have it, with all their rows.

    Source: the deterministic few-shot protocol published for NIH ChestX-ray14; no seed, one draw for all labels.
    """
    rank: dict[str, int] = {}
    for number in range(num_classes):
        has = mask & (y == number) if y.ndim == 1 else mask[:, number] & (y[:, number] == 1)
        for place, name in enumerate(np.unique(groups[has])[:num_shots].tolist()):
            rank[name] = min(place, rank.get(name, place))
    labelled = mask if mask.ndim == 1 else mask.any(1)
    rows = np.flatnonzero(labelled & np.isin(groups, list(rank)))
    order = {name: number for number, name in enumerate(sorted(rank, key=lambda name: (rank[name], name)))}
    return rows, np.array([order[name] for name in groups[rows].tolist()], np.int64)


def systematic(labelled: Int[np.ndarray, " m"], num_shots: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows, shot): `num_shots` samples in all at equal steps of the training rows, 0, N/n, 2N/n, ...

    Source: the deterministic protocol published for the other data sets; no seed, one draw for all labels.
    """
    steps: Float[np.ndarray, " n"] = np.arange(num_shots) * (len(labelled) / num_shots)
    places = np.unique(steps.astype(np.int64))
    return labelled[places], np.arange(len(places))
