"""Leaks: patients, studies, volumes and images that stand on both sides of a split, or in two data sets.

Groups and file hashes prove a leak. A near-duplicate is a pair of images whose embeddings are at least as similar as a
threshold; what that means depends on the backbone and the images, so the spread of similarities across splits stands
beside the spread within one patient. Only pairs of different, or unknown, patients count: the others are told by their
group already.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from featstore.datasets.manifest import Manifest
from featstore.errors import ConfigError, TaskError, UnknownNameError
from featstore.store.catalog import Entry, Store
from featstore.store.hashes import equal_rows, file_hashes
from probes.known import TASKS
from probes.roles import SPLITS, assign_roles, crossing_groups, group_of, kept_rows, split_of
from probes.similar import (
    Progress,
    Question,
    Similar,
    equal_sets,
    no_set,
    pick_set,
    silent,
    similar_between,
    similar_in,
)
from probes.tasks import choose_task, missing_columns
from probes.taskspec import TaskSpec
from probes.units import unit_ids

EXAMPLES = 20
# Adapters whose patients are numbered by the same release; any other one shares its numbers with itself only.
FAMILIES = {"rsna": "nih"}
# Their groups are whatever a user's table or the data itself calls so.
ANONYMOUS = ("coco", "digits", "folder", "image-masks", "import", "phantom", "table")


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """Groups, studies or volumes with samples in more than one split; `by` says whose splits, `examples` are ids."""

    what: str
    by: str
    count: int
    samples: int
    examples: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Identical:
    """Byte-identical images. `hashed` of `samples` files have a known hash.

    `across`: sets of equal images that span splits (or data sets), each as (id, split) pairs; `images` counts the
    images in them. `within`: images of one split that repeat another one of it.
    """

    samples: int
    hashed: int
    across: tuple[tuple[tuple[str, str], ...], ...]
    images: int
    within: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Against:
    """What two data sets share. `patients`: ids that both have, None where their ids do not speak of the same people.

    `patient_images` are the samples of the first data set that belong to them.
    """

    dataset: str
    manifest: str
    patients: int | None
    patient_images: int
    identical: Identical
    similar: Similar | None
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Leaks:
    """Everything found in one data set, and against others. `groups` is "known" or "unknown"."""

    dataset: str
    manifest: str
    task: str | None
    groups: str
    splits: dict[str, int]
    crossings: tuple[Crossing, ...]
    identical: Identical
    similar: Similar | None
    against: tuple[Against, ...]
    notes: tuple[str, ...]

    @property
    def count(self) -> int:
        """Leaks in all: crossings, sets of equal images, near-duplicate pairs and patients shared with others."""
        identical = [self.identical, *(other.identical for other in self.against)]
        similar = [self.similar, *(other.similar for other in self.against)]
        return (
            sum(crossing.count for crossing in self.crossings)
            + sum(len(item.across) for item in identical)
            + sum(item.count for item in similar if item is not None)
            + sum(other.patients or 0 for other in self.against)
        )

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {"leaks": self.count, **asdict(self)}


def find_leaks(
    store: Store,
    dataset: str,
    *,
    task: str | None = None,
    model: str | None = None,
    against: Sequence[str] = (),
    question: Question | None = None,
    progress: Progress | None = None,
) -> Leaks:
    """Look for leaks across the splits of a data set (of a task's roles, where one is named) and against others.

    `model` is MODEL@RES of the set whose embeddings are compared; without it the one set there is, of several the one
    with trained weights and most pixels; without any set near-duplicates are not looked for, and a note says so.

    Raises:
        UnknownNameError: no such data set, task or set, or a task whose columns are absent.
        TaskError: `model` is given and another data set has no set made like it; what differs is listed. Without
            `model` this is a note, and the two are compared by patients and bytes alone.
        ConfigError: a data set against itself.
    """
    question, progress = question or Question(), progress or silent
    manifest = store.manifest(dataset)
    known = bool(manifest.meta.get("groups_known"))
    role, spec, notes = _roles(manifest, task)
    if not known:
        notes.append("patients unknown: leaks of patients cannot be excluded")
    if not (role != "").any():
        notes.append("no sample has a split, so nothing can cross one; name a --task that makes splits")
    hashes = file_hashes(store, manifest)
    parts = manifest.place("part")
    alike = equal_rows(hashes, parts)
    entry = pick_set(store, dataset, model)
    similar = None
    if entry is None:
        notes.append(no_set(dataset))
    else:
        similar = similar_in(store.open(entry), role, known, alike, question, progress)
    others = []
    for name in dict.fromkeys(against):
        if name == dataset:
            raise ConfigError(f"--against names other data sets, got {name!r} itself")
        chosen = (entry, model)
        others.append(_against(store, manifest, (hashes, parts), name, chosen, question=question, progress=progress))
    return Leaks(
        dataset=dataset,
        manifest=manifest.digest,
        task=None if spec is None else spec.name,
        groups="known" if known else "unknown",
        splits={name: int((role == name).sum()) for name in SPLITS},
        crossings=_crossings(manifest, role, spec),
        identical=_identical(manifest, role, hashes, alike),
        similar=similar,
        against=tuple(others),
        notes=tuple(notes),
    )


def _roles(manifest: Manifest, task: str | None) -> tuple[np.ndarray, TaskSpec | None, list[str]]:
    """(train, val, test or '' of every row, the task whose roles they are, notes)."""
    if task is None:
        return _own_splits(manifest), None, []
    spec = choose_task(manifest, task=task)
    missing = missing_columns(manifest, spec)
    if missing:
        fitting = ", ".join(name for name in TASKS if not missing_columns(manifest, TASKS[name])) or "none"
        raise UnknownNameError(
            f"task {task!r} reads columns that data set {manifest.name!r} lacks: {', '.join(missing)}; "
            f"tasks that fit it: {fitting}"
        )
    keep, notes = kept_rows(manifest, spec)
    split, more = split_of(manifest, spec)
    role, how = assign_roles(split, group_of(manifest), spec, keep)
    return role.astype("U5"), spec, [*notes, *more, *how]


def _own_splits(manifest: Manifest) -> np.ndarray:
    return np.array([value or "" for value in manifest.column("split")], "U5")


def _crossings(manifest: Manifest, role: np.ndarray, spec: TaskSpec | None) -> tuple[Crossing, ...]:
    """By the manifest's splits and, where a task is named, by its roles."""
    by = [("the manifest's split", _own_splits(manifest))]
    if spec is not None:
        by.append((f"task {spec.name}", role))
    found = []
    for name, splits in by:
        for what in ("patient", "study", "volume"):
            column = {"patient": "group", "study": "study", "volume": "volume"}[what]
            values = manifest.place(column) if what == "volume" else manifest.column(column)
            used = (splits != "") & np.array([value not in (None, "") for value in values])
            ids = unit_ids(manifest, TaskSpec(name="", labels=(), unit=what), used)
            crossing = crossing_groups(np.where(used, splits, ""), ids) if ids is not None else []
            if ids is not None and crossing:
                found.append(
                    Crossing(
                        what=what,
                        by=name,
                        count=len(crossing),
                        samples=int((used & np.isin(ids, crossing)).sum()),
                        examples=tuple(map(str, crossing[:EXAMPLES])),
                    )
                )
    return tuple(found)


def _identical(manifest: Manifest, role: np.ndarray, hashes: list[str | None], alike: list[list[int]]) -> Identical:
    ids = manifest.column("id")
    across, within = [], Counter[str]()
    for rows in alike:
        held = Counter(str(role[row]) for row in rows if role[row] != "")
        if len(held) > 1:
            across.append(tuple((ids[row], str(role[row])) for row in rows if role[row] != ""))
        for name, count in held.items():
            within[name] += count - 1
    return Identical(
        samples=len(ids),
        hashed=sum(value is not None for value in hashes),
        across=tuple(across),
        images=sum(map(len, across)),
        within={name: within[name] for name in SPLITS if within[name]},
    )


# ---- two data sets


def _family(manifest: Manifest) -> str | None:
    adapter = str(manifest.meta.get("adapter", ""))
    if not manifest.meta.get("groups_known") or adapter in ANONYMOUS or not adapter:
        return None
    return FAMILIES.get(adapter, adapter)


def _against(
    store: Store,
    ours: Manifest,
    files: tuple[list[str | None], list[str | None]],
    name: str,
    chosen: tuple[Entry | None, str | None],
    *,
    question: Question,
    progress: Progress,
) -> Against:
    theirs = store.manifest(name)
    notes = []
    kin = _family(ours) is not None and _family(ours) == _family(theirs)
    shared: set[str] = set()
    if kin:
        shared = {group for group in ours.column("group") if group} & set(theirs.column("group"))
    else:
        notes.append("patient ids are not compared: they are unknown in one of the two, or not of one numbering")
    hashes, parts = (mine + other for mine, other in zip(files, (file_hashes(store, theirs), theirs.place("part"))))
    size = len(ours)
    ids = [*ours.column("id"), *theirs.column("id")]
    names = [ours.name] * size + [name] * len(theirs)
    alike = [rows for rows in equal_rows(hashes, parts) if rows[0] < size <= rows[-1]]
    identical = Identical(
        samples=len(ids),
        hashed=sum(value is not None for value in hashes),
        across=tuple(tuple((ids[row], names[row]) for row in rows) for rows in alike),
        images=sum(map(len, alike)),
    )
    pair, similar = None, None
    try:
        pair = equal_sets(store, chosen, name)
        if pair is None:
            notes.append(no_set(name if chosen[0] is not None else ours.name))
    except TaskError as error:
        if chosen[1] is not None:
            raise
        notes.append(f"near-duplicates were not looked for: {error}")
    if pair is not None:
        twin = {row: number for number, rows in enumerate(alike) for row in rows}
        similar = similar_between(store.open(pair[0]), store.open(pair[1]), kin, twin, question, progress)
    return Against(
        dataset=name,
        manifest=theirs.digest,
        patients=len(shared) if kin else None,
        patient_images=sum(group in shared for group in ours.column("group")),
        identical=identical,
        similar=similar,
        notes=tuple(notes),
    )
