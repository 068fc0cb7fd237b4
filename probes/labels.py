"""Reading label columns: 0/1/-1/blank and readers' votes under a policy, classes, numbers and ranks.

Labels stay verbatim in the manifest; what they mean is said here, by the task's policies and kind.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int, Int8, Real

from featstore.errors import TaskError
from probes.cells import Cells, cells_of, is_blank
from probes.policies import UNCERTAIN, Policy, Readers
from probes.taskspec import PLAIN, TaskSpec
from probes.words import word_of

TargetKind = Literal["multilabel", "multiclass", "regression", "ordinal"]
MAX_CLASSES = 1000
MOST_NUMBERS = 20  # numbers that are taken for classes without being asked
MOST_NAMED = 10  # values in a message
NUMBERS = {"1": 1, "0": 0, "-1": -1}
BLANK = -2  # what a cell says beside 1, 0 and -1
Columns = Mapping[str, Sequence[Any] | Cells]


@dataclass(frozen=True)
class Targets:
    """Labels of every row under both policies, and the rows that a policy leaves out altogether.

    multilabel, regression and ordinal: y and mask (N, L), numbers and ranks as float64; multiclass: (N,).
    """

    kind: TargetKind
    labels: tuple[str, ...]
    y_train: Real[np.ndarray, "N ..."]
    mask_train: Bool[np.ndarray, "N ..."]
    y: Real[np.ndarray, "N ..."]
    mask: Bool[np.ndarray, "N ..."]
    dropped_train: Bool[np.ndarray, " N"]
    dropped: Bool[np.ndarray, " N"]
    notes: tuple[str, ...] = ()


def label_columns(spec: TaskSpec) -> tuple[str, ...]:
    """Columns of the manifest that a task reads as labels: merged ones as their parts, `drop_labels` and `normal`."""
    merged = dict(spec.merge)
    names = [*spec.labels]
    for policy in (spec.train_policy, spec.eval_policy):
        names += [*policy.drop_labels, *([policy.normal] if policy.normal else [])]
    return tuple(dict.fromkeys(column for name in names for column in merged.get(name, (name,))))


def check_spec(spec: TaskSpec) -> None:
    """What a task says of its labels must fit together.

    Raises:
        TaskError: otherwise.
    """
    kind = spec.kind
    where = f"task {spec.name!r}"
    twice = [name for number, name in enumerate(spec.labels) if name in spec.labels[:number]]
    if twice:
        raise TaskError(f"{where} names the label {twice[0]!r} twice; name it once")
    stray = [name for name, _ in spec.merge if name not in spec.labels]
    if stray:
        raise TaskError(f"{where}: merge makes {stray[0]!r}, which is not among its labels; add it or leave it out")
    if spec.merge and kind not in ("auto", "multilabel"):
        raise TaskError(f"{where}: only 0/1 labels can be merged, not those of a {kind} task")
    if kind == "multiclass" and len(spec.labels) != 1:
        raise TaskError(f"{where}: a multiclass task has one label column, got {len(spec.labels)}")
    if spec.classes and (kind in ("regression", "multilabel") or (kind == "auto" and len(spec.labels) != 1)):
        raise TaskError(f"{where}: classes belong to one categorical column or to ordinal ones; leave them out")
    if kind == "ordinal" and len(spec.classes) < 2:
        raise TaskError(f"{where}: an ordinal task needs its classes in order, at least two; name them with --classes")
    if spec.unit == "image" and spec.pool != "mean":
        raise TaskError(f"{where}: pool {spec.pool!r} needs a unit of several images: volume, study or patient")
    if spec.eval_policy.uncertain == "class" and spec.train_policy.uncertain != "class":
        raise TaskError(
            f"{where}: the evaluation policy adds the label {UNCERTAIN!r}, which the training policy does not; "
            "use extra-class for both, or another policy for evaluation"
        )


def read_targets(columns: Columns, spec: TaskSpec, *, every_class: bool = False) -> Targets:
    """Labels of a task from its columns (`label_columns`); rows that are not used hold None.

    With `every_class` each of the task's classes must be in some row; rows of other values are left out, with a note.

    Raises:
        TaskError: a value that the kind of task cannot read, too many classes, or a class that no row has.
    """
    cells = {name: cells_of(values) for name, values in columns.items()}
    if spec.classes and every_class:
        _check_classes([cells[label] for label in spec.labels], spec)
    if spec.kind in ("regression", "ordinal"):
        _check_policies(spec, spec.kind)
        return _read_numbers(cells, spec)
    first = cells[spec.labels[0]] if not spec.merge else None
    if first is not None and len(spec.labels) == 1 and spec.kind != "multilabel":
        other = any(code_of(value, "majority") is None for value in first.values)
        if other or spec.kind == "multiclass" or spec.classes:
            _check_policies(spec, "multiclass")
            return _read_classes(first, spec)
    return _read_binary(cells, spec)


def _check_policies(spec: TaskSpec, kind: TargetKind) -> None:
    """Policies are never passed over in silence."""
    if (spec.train_policy, spec.eval_policy) != (PLAIN, PLAIN):
        raise TaskError(
            f"task {spec.name!r} is {kind}: label policies read columns of 1, 0, -1 and blank; leave --kind, "
            "--train-policy, --eval-policy and --policies out"
        )


def blank_rows(columns: Columns) -> Bool[np.ndarray, " N"]:
    """Rows that are blank in every one of these columns."""
    blank = np.stack([cells_of(values).mapped(is_blank, np.bool_) for values in columns.values()])
    return np.asarray(blank.all(0))


def code_of(value: Any, readers: Readers) -> int | None:
    """1, 0, -1 or BLANK for `1`, `1.0`, `"-1.0"`, True, blank, or votes such as `1|0|1`; None for anything else."""
    if is_blank(value):
        return BLANK
    text = str(int(value)) if isinstance(value, bool) else str(value).strip()
    if "|" not in text:
        return NUMBERS.get(text.removesuffix(".0"))
    votes = [BLANK if not vote.strip() else NUMBERS.get(vote.strip().removesuffix(".0")) for vote in text.split("|")]
    return None if None in votes else _count(votes, readers)


def _count(votes: list[int | None], readers: Readers) -> int:
    """One code from the votes of several readers; a tie is no majority and hence 0."""
    ones, zeros = votes.count(1), votes.count(0)
    uncertain = -1 if -1 in votes else BLANK
    if readers == "any":
        return 1 if ones else -1 if -1 in votes else 0 if zeros else BLANK
    return int(ones > zeros) if ones or zeros else uncertain


def read_codes(values: Sequence[Any] | Cells, label: str, readers: Readers) -> Int8[np.ndarray, " N"]:
    """1, 0, -1 or BLANK of every row.

    Raises:
        TaskError: another value.
    """
    cells = cells_of(values)
    codes = [code_of(value, readers) for value in cells.values]
    row = cells.first([number for number, code in enumerate(codes) if code is None])
    if row is not None:
        value = cells.values[cells.index[row]]
        raise TaskError(
            f"label {label!r}: row {row + 1} says {value!r}; several labels together must be 0, 1, -1 or blank"
        )
    return np.asarray(np.array([*codes, BLANK], np.int8)[cells.index])


Pair = tuple[np.ndarray, np.ndarray]


def override_of(policy: Policy, label: str) -> Literal["mask", "zero", "one"] | None:
    """What a policy says of one label: by its name, else by the word that spellings share."""
    by_word = {word_of(name): how for name, how in reversed(policy.overrides)}
    return dict(policy.overrides).get(label, by_word.get(word_of(label)))


def without_effect(spec: TaskSpec) -> tuple[str, ...]:
    """Notes on policies that single out labels none of which the task has."""
    merged = dict(spec.merge)
    names = [name for label in spec.labels for name in (label, *merged.get(label, ()))]
    notes = []
    for what, policy in (("training", spec.train_policy), ("evaluation", spec.eval_policy)):
        if policy.overrides and all(override_of(policy, name) is None for name in names):
            singled = ", ".join(name for name, _ in policy.overrides)
            notes.append(
                f"{what} policy: it singles out {singled}, which the task has not; every uncertain value: "
                f"{policy.uncertain}"
            )
    return tuple(notes)


def apply_policy(
    codes: Int8[np.ndarray, " N"], policy: Policy, *names: str
) -> tuple[Int8[np.ndarray, " N"], Bool[np.ndarray, " N"]]:
    """(0/1, mask) of codes; `names` are those of the column and its label, the first with an override counts."""
    uncertain = next((found for name in names if (found := override_of(policy, name)) is not None), policy.uncertain)
    unsure = codes == -1
    y = (codes == 1) | (unsure & (uncertain == "one"))
    mask = (
        (codes >= 0)
        | (unsure & (uncertain in ("zero", "one", "class")))
        | ((codes == BLANK) & (policy.blank == "zero"))
    )
    return y.astype(np.int8), mask


def read_labels(
    values: Sequence[Any], policy: Policy, label: str
) -> tuple[Int[np.ndarray, " N"], Bool[np.ndarray, " N"]]:
    """(0/1, mask) of a 0/1/-1/blank column, or of readers' votes, under a policy.

    Raises:
        TaskError: another value.
    """
    return apply_policy(read_codes(values, label, policy.readers), policy, label)


def _read_binary(columns: Mapping[str, Cells], spec: TaskSpec) -> Targets:
    read = [_under(columns, spec, policy) for policy in (spec.train_policy, spec.eval_policy)]
    labels = spec.labels
    if "class" in (spec.train_policy.uncertain, spec.eval_policy.uncertain):
        if UNCERTAIN in labels:
            raise TaskError(
                f"task {spec.name!r} has a label {UNCERTAIN!r} already; use another policy than extra-class"
            )
        labels = (*labels, UNCERTAIN)
    (y_train, mask_train, dropped_train), (y, mask, dropped) = (
        _extended(codes, pair, policy, len(labels) > len(spec.labels))
        for (codes, pair), policy in zip(read, (spec.train_policy, spec.eval_policy))
    )
    return Targets("multilabel", labels, y_train, mask_train, y, mask, dropped_train, dropped)


def _under(columns: Mapping[str, Cells], spec: TaskSpec, policy: Policy) -> tuple[Mapping[str, np.ndarray], Pair]:
    """(uncertain rows by label, (y, mask)) under one policy; merged labels are 1, else masked, else 0."""
    merged = dict(spec.merge)
    codes = {name: read_codes(columns[name], name, policy.readers) for name in columns}
    if policy.normal:
        normal = codes[policy.normal] == 1
        others = codes.keys() - {policy.normal, *policy.normal_keeps}
        codes |= {name: np.where(normal, np.int8(0), codes[name]) for name in others}
    y, mask = [], []
    for label in spec.labels:
        parts = [apply_policy(codes[name], policy, name, label) for name in merged.get(label, (label,))]
        positive = np.any([part[0] == 1 for part in parts], axis=0)
        mask.append(positive | np.all([part[1] for part in parts], axis=0))
        y.append(positive.astype(np.int8))
    # Labels that are named to drop rows do so; an override keeps a label's rows only where none is named.
    asked = policy.drop_labels if policy.uncertain == "drop" else ()
    unsure = {
        label: np.any([codes[name] == -1 for name in merged.get(label, (label,))], axis=0)
        for label in asked or spec.labels
        if asked or policy.uncertain != "drop" or override_of(policy, label) is None
    }
    return unsure, (np.stack(y, 1), np.stack(mask, 1))


def _extended(
    unsure: Mapping[str, np.ndarray], pair: Pair, policy: Policy, extra: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(y, mask, dropped rows): the label `Uncertain` where asked for, and rows without any label where dropped."""
    y, mask = pair
    uncertain = np.any([*unsure.values(), np.zeros(len(y), dtype=bool)], axis=0)
    if extra:
        known = policy.uncertain == "class"
        y = np.column_stack([y, (uncertain & known).astype(np.int8)])
        mask = np.column_stack([mask, np.full(len(y), known)])
    dropped = uncertain & (policy.uncertain == "drop")
    return y, mask & ~dropped[:, None], dropped


def _text(value: Any) -> str:
    return "" if value is None or value != value else str(value)


def _read_classes(cells: Cells, spec: TaskSpec) -> Targets:
    """One categorical column: the task's classes, else those there are in sorted order; other rows are masked."""
    found = set(map(_text, cells.values)) - {""}
    if not spec.classes and spec.kind == "auto" and len(found) > MOST_NUMBERS and all(map(_is_number, found)):
        raise TaskError(
            f"label {spec.labels[0]!r} has {len(found)} different values, all of them numbers: with --kind regression "
            "they are numbers to fit; --kind multiclass takes each for a class of its own"
        )
    classes = spec.classes or tuple(sorted(found))
    if len(classes) > MAX_CLASSES:
        raise TaskError(
            f"label {spec.labels[0]!r} has {len(classes)} different values; "
            f"a categorical label has at most {MAX_CLASSES}"
        )
    y, mask = _numbered(cells, classes)
    none = np.zeros(len(y), dtype=bool)
    return Targets("multiclass", classes, y, mask, y, mask, none, none, _unnamed(spec.labels[0], cells, classes))


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _class_of(value: Any, classes: tuple[str, ...]) -> int:
    """Number of the class that a value is, -1 for none; 1.0 is the class 1."""
    text = _text(value)
    known = [name for name in (text, text.removesuffix(".0")) if name in classes]
    return classes.index(known[0]) if known else -1


def _numbered(cells: Cells, classes: tuple[str, ...]) -> tuple[Int[np.ndarray, " N"], Bool[np.ndarray, " N"]]:
    number = {value: _class_of(value, classes) for value in map(_text, cells.values)} | {"": _class_of("", classes)}
    y = cells.mapped(lambda value: number[_text(value)], np.int64)
    return np.maximum(y, 0), y >= 0


def _counts(cells: Cells) -> dict[str, int]:
    """Rows of each value, the most frequent first."""
    rows = np.bincount(cells.index[cells.index >= 0], minlength=len(cells.values)).tolist()
    found: dict[str, int] = {}
    for value, count in zip(cells.values, rows):
        if not is_blank(value):
            found[_text(value)] = found.get(_text(value), 0) + count
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def _listed(counts: Mapping[str, int]) -> str:
    """`mild (120), severe (103)`, cut short where there are many."""
    named = [f"{value} ({count})" for value, count in counts.items()]
    return ", ".join(named[:MOST_NAMED]) + (f" and {len(named) - MOST_NAMED} more" if len(named) > MOST_NAMED else "")


def _check_classes(columns: Sequence[Cells], spec: TaskSpec) -> None:
    """Every class of a task is in some row.

    Raises:
        TaskError: one is in none, as where it is misspelt.
    """
    counts: dict[str, int] = {}
    for cells in columns:
        for value, count in _counts(cells).items():
            counts[value] = counts.get(value, 0) + count
    there = {_class_of(value, spec.classes) for value in counts}
    for number, name in enumerate(spec.classes):
        if number not in there:
            free = {value.lower(): value for value in counts if _class_of(value, spec.classes) < 0}
            near = [free[found] for found in get_close_matches(name.lower(), free, n=3)]
            raise TaskError(
                f"task {spec.name!r}: no row of {', '.join(map(repr, spec.labels))} is of the class {name!r}"
                + (f" (near it: {', '.join(map(repr, near))})" if near else "")
                + f"; name classes as the column spells them. Its values, with their rows: {_listed(counts)}"
            )


def _unnamed(label: str, cells: Cells, classes: tuple[str, ...]) -> tuple[str, ...]:
    """A note on rows whose value is none of the classes."""
    left = {value: count for value, count in _counts(cells).items() if _class_of(value, classes) < 0}
    return (f"{label}: rows of values that are none of the classes left out: {_listed(left)}",) if left else ()


def _read_numbers(columns: Mapping[str, Cells], spec: TaskSpec) -> Targets:
    """Numbers as they are, or ranks 0 to K - 1 of ordered classes; blank cells are masked, whatever the policies."""
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    notes: list[str] = []
    for label in spec.labels:
        if spec.kind == "regression":
            pairs.append(read_numbers(columns[label], label))
        else:
            ranks, mask = _numbered(columns[label], spec.classes)
            pairs.append((ranks.astype(np.float64), mask))
            notes += _unnamed(label, columns[label], spec.classes)
    y, mask = (np.stack([pair[part] for pair in pairs], 1) for part in (0, 1))
    none = np.zeros(len(y), dtype=bool)
    kind: TargetKind = "regression" if spec.kind == "regression" else "ordinal"
    return Targets(kind, spec.labels, y, mask, y, mask, none, none, tuple(notes))


def read_numbers(values: Sequence[Any] | Cells, label: str) -> tuple[Float[np.ndarray, " N"], Bool[np.ndarray, " N"]]:
    """(float64, mask) of a column of numbers; blank is masked.

    Raises:
        TaskError: a value that is no finite number.
    """
    cells = cells_of(values)
    numbers = [0.0 if is_blank(value) else _number(value) for value in cells.values]
    row = cells.first([place for place, number in enumerate(numbers) if not math.isfinite(number)])
    if row is not None:
        raise TaskError(
            f"label {label!r}: row {row + 1} holds a value that is no number; a regression task reads numbers and "
            "blanks only (give units such as years in a column of their own)"
        )
    return np.array([*numbers, 0.0])[cells.index], ~cells.mapped(is_blank, np.bool_)


def _number(value: Any) -> float:
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return math.nan
