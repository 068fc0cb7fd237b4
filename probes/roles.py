"""Which rows train, select and test: filters, splits and groups. No split ever has two roles."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from featstore.datasets.manifest import Manifest
from featstore.datasets.splits import SPLIT_NAMES, carve
from featstore.errors import TaskError
from probes.taskspec import TaskSpec

SPLITS = ("train", "val", "test")
USES = {"train": "train", "val": "select", "test": "test"}


def parse_where(text: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """`source=nih,view=AP|PA` as ((column, values), ...).

    Raises:
        TaskError: a part without '=' or without a column.
    """
    parts = []
    for part in text.split(","):
        column, equals, values = part.partition("=")
        if not equals or not column.strip():
            raise TaskError(f"--where takes COLUMN=VALUE or COLUMN=VALUE|VALUE, comma-separated; got {part!r}")
        parts.append((column.strip(), tuple(value.strip() for value in values.split("|"))))
    return tuple(parts)


def where_text(spec: TaskSpec) -> str:
    """The task's filters as `--where` takes them."""
    return ",".join(f"{column}={'|'.join(values)}" for column, values in spec.where)


def _values_of(manifest: Manifest, spec: TaskSpec) -> str:
    """The values of every column that a task filters by, the first ten of them."""
    said = []
    for column in dict.fromkeys(column for column, _ in spec.where):
        texts = sorted({"" if value is None else str(value) for value in manifest.column(column)})
        more = f" and {len(texts) - 10} more" if len(texts) > 10 else ""
        said.append(f"{column} has " + ", ".join(text or "(blank)" for text in texts[:10]) + more)
    return "; ".join(said)


def kept_rows(manifest: Manifest, spec: TaskSpec) -> tuple[Bool[np.ndarray, " N"], tuple[str, ...]]:
    """Rows that pass the task's filters and are not left out by id, and what there is to say of it.

    Raises:
        TaskError: none is left.
    """
    keep = np.ones(len(manifest), dtype=bool)
    for column, values in spec.where:
        texts = ("" if value is None else str(value) for value in manifest.column(column))
        keep &= np.array([text in values for text in texts], dtype=bool)
    if not keep.any():
        raise TaskError(
            f"no sample passes the filter {where_text(spec)}; {_values_of(manifest, spec)}; check the column's values "
            f"with `featstore info {manifest.name}`"
        )
    if not spec.without:
        return keep, ()
    without = set(spec.without)
    named = np.array([sample in without for sample in manifest.column("id")], dtype=bool)
    return keep & ~named, (f"left out by id: {int(named.sum())} of {len(without)} samples that the task names",)


def split_of(manifest: Manifest, spec: TaskSpec) -> tuple[np.ndarray, tuple[str, ...]]:
    """train, val, test or '' of every row from the task's split column, and a note where it is not the usual one.

    Raises:
        TaskError: another value.
    """
    values = manifest.column(spec.split_column)
    if spec.split_column == "split":
        notes = ("groups: the data set's own split cuts volumes, so slices of one are not held together",)
        return np.array(values, dtype=object), notes if _volumes_are_cut(manifest) else ()
    texts = ["" if value is None else str(value).strip().lower() for value in values]
    odd = sorted(set(texts) - set(SPLIT_NAMES))
    if odd:
        raise TaskError(
            f"split column {spec.split_column!r} must say train, val or test or be blank; "
            f"found {len(odd)} other values, such as {odd[0]!r}"
        )
    return np.array([SPLIT_NAMES[text] for text in texts], dtype=object), (f"splits: column {spec.split_column!r}",)


def group_of(manifest: Manifest) -> np.ndarray:
    """The group (patient) of every row; without one it is the volume, slide or video, and else the sample itself.

    Volumes are no groups where the data set's own split cuts one (sections of a stack of electron microscopy).
    """
    groups, ids = manifest.column("group"), manifest.column("id")
    volumes = [None] * len(ids) if _volumes_are_cut(manifest) else manifest.place("volume")
    return np.array(
        [
            group if group is not None else f"id:{sample}" if volume is None else f"volume:{volume}"
            for group, sample, volume in zip(groups, ids, volumes)
        ]
    )


def _volumes_are_cut(manifest: Manifest) -> bool:
    """Whether a volume without group stands in two splits of the manifest; left out of all counts as one."""
    rows = zip(manifest.place("volume"), manifest.column("group"), manifest.column("split"))
    seen = {(volume, split or "") for volume, group, split in rows if volume is not None and group is None}
    return len({volume for volume, _ in seen}) < len(seen)


def assign_roles(
    split: np.ndarray,
    groups: np.ndarray,
    spec: TaskSpec,
    keep: Bool[np.ndarray, " N"],
    needed: Sequence[str] = SPLITS,
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Roles train, val, test from the splits of the manifest, and notes on how they came about; '' where not `keep`.

    Without a test split the validation split is the test split; without a validation split (left), a tenth of the
    training groups, drawn by seed, is. Which splits there are is asked of the whole manifest: a filter that empties
    one never changes what another is for.

    Raises:
        TaskError: no rows to train on, to select with or to test on, as far as they are `needed`.
    """
    role = np.where(keep, split, "")
    notes: list[str] = []
    has_test, has_val = (split == "test").any(), (split == "val").any()
    if not has_test:
        role[role == "val"] = "test"
        notes.append("test: the validation split, as there is no test split")
    elif spec.selection == "carve":
        role[role == "val"] = ""
    if not has_test or not has_val or spec.selection == "carve":
        train = np.flatnonzero(role == "train")
        role[train[carve(groups[train].tolist(), fraction=0.1, seed=spec.seed)]] = "val"
        notes.append(f"val: 10% of the training groups, seed {spec.seed}")
    counts = {name: int((role == name).sum()) for name in SPLITS}
    if min(counts[name] for name in needed) == 0:
        uses = " and ".join(", ".join(USES[name] for name in needed).rsplit(", ", 1))
        raise TaskError(
            f"task {spec.name!r} needs samples to {uses} on; it has "
            + ", ".join(f"{name} {count}" for name, count in counts.items())
            + "; check the split column and --where"
        )
    return role, tuple(notes)


def crossing_groups(role: np.ndarray, groups: np.ndarray) -> list[str]:
    """Groups with samples in more than one of train, val and test."""
    used = role != ""
    pairs = set(zip(groups[used].tolist(), role[used].tolist()))
    seen: dict[str, int] = {}
    for group, _ in pairs:
        seen[group] = seen.get(group, 0) + 1
    return sorted(group for group, count in seen.items() if count > 1)


def drop_rows(
    role: np.ndarray, train: Bool[np.ndarray, " N"], evaluation: Bool[np.ndarray, " N"]
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Roles without the rows that a policy leaves out, and how many those are."""
    notes = []
    is_train = role == "train"
    for where, dropped in ((is_train, train), (~is_train & (role != ""), evaluation)):
        for name in SPLITS:
            count = int((where & dropped & (role == name)).sum())
            if count:
                notes.append(f"{name}: {count} rows with an uncertain label left out")
    return np.where((is_train & train) | (~is_train & evaluation), "", role), tuple(notes)
