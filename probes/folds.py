"""Cross-validation over all rows of a task: groups dealt to folds, and the roles that one fold gives.

Fold k is the test split, fold k + 1 selects (or a share of the other groups does), the others train. So every row is
tested once, by a head that saw no row of its group.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, Shaped

from featstore.datasets.manifest import Manifest
from featstore.datasets.splits import carve, seeded_rank
from featstore.errors import TaskError, UnknownNameError
from probes.configs import SplitConfig
from probes.labels import Targets
from probes.roles import kept_rows
from probes.taskspec import Fold, TaskSpec


def fold_specs(manifest: Manifest, spec: TaskSpec, splits: SplitConfig) -> list[TaskSpec]:
    """The task once per fold, or as it is without folds.

    Raises:
        UnknownNameError: no such column. TaskError: a column with one fold, or too few folds to train and select.
    """
    if not splits.crossed:
        return [spec]
    count = splits.folds or 0
    if splits.fold_column:
        if splits.fold_column not in manifest.table.column_names:
            raise UnknownNameError(
                f"data set {manifest.name!r} has no column {splits.fold_column!r}; --fold-column names one of "
                + ", ".join(manifest.table.column_names)
            )
        count = len(_named(manifest, spec, splits.fold_column)[0])
        if count < 2:
            raise TaskError(f"--fold-column {splits.fold_column}: at least two folds are needed, it names {count}")
    if count < 3 and splits.fold_val is None:
        raise TaskError(f"{count} folds leave nothing to train on beside test and selection; add --fold-val 0.1")
    return [
        replace(
            spec,
            fold=Fold(number=number, of=count, seed=splits.fold_seed, column=splits.fold_column, val=splits.fold_val),
        )
        for number in range(count)
    ]


def _named(manifest: Manifest, spec: TaskSpec, column: str) -> tuple[list[str], Int[np.ndarray, " N"]]:
    """(names of the folds in order, numbers where they are numbers; the fold of every row, -1 for none)."""
    keep, _ = kept_rows(manifest, spec)
    texts = ["" if value is None else str(value).strip() for value in manifest.column(column)]
    names = {text for text, kept in zip(texts, keep) if kept and text}
    if all(name.lstrip("-").isdigit() for name in names):
        ordered = sorted(names, key=int)
    else:
        ordered = sorted(names)
    number = {name: place for place, name in enumerate(ordered)}
    return ordered, np.array([number.get(text, -1) if kept else -1 for text, kept in zip(texts, keep)], np.int64)


def strata_of(targets: Targets) -> Int[np.ndarray, " N"] | None:
    """The class of every row, -1 where it has none; None where a task has no single categorical label."""
    if targets.kind == "multiclass":
        return np.where(targets.mask, targets.y, -1).astype(np.int64)
    if targets.kind == "regression" or targets.y.shape[1] != 1:
        return None
    return np.where(targets.mask[:, 0], targets.y[:, 0], -1).astype(np.int64)


def deal(
    groups: Shaped[np.ndarray, " n"], strata: Int[np.ndarray, " n"] | None, count: int, seed: int
) -> Int[np.ndarray, " n"]:
    """The fold of every row: whole groups, every class and the rows as a whole spread evenly.

    Groups go one by one to the fold where they add least to the squared shares of the classes (and of all rows) that
    the folds hold: those with the rarest classes first, then the largest, equal ones in seeded order.

    Raises:
        TaskError: fewer groups than folds.
    """
    names, index = np.unique(groups, return_inverse=True)
    if len(names) < count:
        raise TaskError(f"{count} folds need at least as many groups (patients), got {len(names)}")
    kinds, code = np.unique(np.zeros(len(groups), np.int64) if strata is None else strata, return_inverse=True)
    rows = np.zeros((len(names), len(kinds) + 1))  # of every group, by class, and all of them
    np.add.at(rows, (index, code), 1)
    rows[:, :-1] *= kinds >= 0  # rows without a class are rows, but no class
    rows[:, -1] = np.bincount(index)
    totals = rows.sum(0)
    rarity = np.where((rows > 0) & (totals > 0), totals, np.inf).min(1)
    ranks = np.array([seeded_rank(str(name), seed) for name in names])
    # (a + b)^2 - a^2 = 2 a b + b^2, where b is the group's share: the same for all folds.
    weights = 1 / np.maximum(totals, 1) ** 2
    held = np.zeros((count, len(totals)))
    fold = np.empty(len(names), np.int64)
    for group in np.lexsort((names, ranks, -rows[:, -1], rarity)):
        added = (held * weights) @ rows[group]
        best = np.flatnonzero(added <= added.min() * (1 + 1e-12))
        fold[group] = best[held[best, -1].argmin()]
        held[fold[group]] += rows[group]
    return fold[index]


def carve_strata(
    groups: Shaped[np.ndarray, " n"], strata: Int[np.ndarray, " n"], fraction: float, seed: int
) -> Bool[np.ndarray, " n"]:
    """Mark the rows of a seeded share of the groups, as `carve` does, that holds this share of every class too.

    A group stands with its rarest class. As many are taken as `carve` takes: by the middle of the part that each is of
    its class, in seeded order. The first of a class goes before all such, its last one stays, so that both sides have
    every class of two or more groups where so many are taken.
    """
    names, index = np.unique(groups, return_inverse=True)
    kinds, code, sizes = np.unique(strata, return_inverse=True, return_counts=True)
    totals = np.where(kinds >= 0, sizes, len(groups) + 1)  # rows without a class decide where there are no others
    rarest = np.argsort(totals, kind="stable")
    order_of = np.argsort(rarest)
    stratum = np.full(len(names), len(kinds))
    np.minimum.at(stratum, index, order_of[code])  # of equally rare classes the first
    ranks = np.array([seeded_rank(str(name), seed) for name in names])
    place = np.empty(len(names))
    for number in np.unique(stratum):
        members = np.flatnonzero(stratum == number)
        members = members[np.lexsort((names[members], ranks[members]))]
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
        if kinds[rarest[number]] >= 0:
            place[members[0]], place[members[-1]] = 0, 1
    count = 0 if len(names) < 2 else min(len(names) - 1, max(1, round(fraction * len(names))))
    taken = np.zeros(len(names), bool)
    taken[np.lexsort((names, ranks, stratum, place))[:count]] = True
    return taken[index]


def fold_roles(
    manifest: Manifest, spec: TaskSpec, groups: np.ndarray, keep: Bool[np.ndarray, " N"], targets: Targets
) -> tuple[np.ndarray, tuple[str, ...]]:
    """train, val, test or '' of every row in one fold, and how they came about.

    Raises:
        TaskError: fewer groups than folds, or nothing to train, select or test on.
    """
    fold = spec.fold
    assert fold is not None
    number, strata = np.full(len(groups), -1), strata_of(targets)
    if fold.column:
        names, number = _named(manifest, spec, fold.column)
        how = f"fold {names[fold.number]!r} of {fold.of} in column {fold.column!r}"
    else:
        number[keep] = deal(groups[keep], None if strata is None else strata[keep], fold.of, fold.seed)
        spread = "stratified by class" if strata is not None else "not stratified"
        how = f"fold {fold.number + 1} of {fold.of} over all rows, seed {fold.seed}, groups intact, {spread}"
    role: np.ndarray = np.full(len(groups), "", dtype=object)
    role[number >= 0] = "train"
    role[number == fold.number] = "test"
    if fold.val is None:
        role[number == (fold.number + 1) % fold.of] = "val"
        how += "; the next fold selects"
    else:
        rest = np.flatnonzero(role == "train")
        share = fold.val * len(set(groups[number >= 0].tolist())) / len(set(groups[rest].tolist()))
        if share >= 1:
            raise TaskError(f"--fold-val {fold.val:g} with {fold.of} folds leaves nothing to train on; give less")
        if strata is None:
            taken = carve(groups[rest].tolist(), fraction=share, seed=fold.seed)
        else:
            taken = carve_strata(groups[rest], strata[rest], share, fold.seed)
        role[rest[taken]] = "val"
        how += f"; {100 * fold.val:g}% of the groups, seed {fold.seed}, select"
        how += ", stratified by class" if strata is not None else ""
    counts = {name: int((role == name).sum()) for name in ("train", "val", "test")}
    if min(counts.values()) == 0:
        said = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise TaskError(f"task {spec.name!r}: {how}: it has {said}; take other folds")
    return role, (f"splits: {how}",)


def spread(values: Sequence[Any]) -> dict[str, float | int]:
    """Mean, standard deviation (n - 1), smallest and largest of a metric over folds or seeds; `n` are defined."""
    numbers = np.array([np.nan if value is None else float(value) for value in values])
    defined = numbers[~np.isnan(numbers)]
    nan = float("nan")
    return {
        "mean": float(defined.mean()) if len(defined) else nan,
        "sd": float(defined.std(ddof=1)) if len(defined) > 1 else nan,
        "min": float(defined.min()) if len(defined) else nan,
        "max": float(defined.max()) if len(defined) else nan,
        "n": len(defined),
    }
