"""Near-duplicates by stored embeddings: between the splits of one set, or between the sets of two data sets."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int64

from featstore.datasets.manifest import Manifest
from featstore.errors import ConfigError, TaskError
from featstore.store.catalog import Entry, Store
from featstore.store.features import FeatureSet
from featstore.store.layout import differences
from probes.duplicates import Found, Side, Vectors, nearest_within, quantiles, search
from probes.roles import SPLITS

# Ours, not from a paper, and tried with the embedded demonstration network only: re-encoded copies lie above it there.
# Other backbones spread their similarities otherwise; `Similar.across` and `Similar.within` show how.
DEFAULT_THRESHOLD = 0.99
MAX_PAIRS = 10_000  # listed; all are counted

Progress = Callable[[int], AbstractContextManager[Callable[[int], None]]]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two images; `splits`: split or data set of the one, of the other. `groups`: "same", "different" or "unknown"."""

    ids: tuple[str, str]
    splits: tuple[str, str]
    similarity: float
    groups: str
    identical: bool


@dataclass(frozen=True, kw_only=True)
class Similar:
    """Near-duplicates by the embeddings of `set`, of `compared` images.

    `count`: pairs at or above `threshold` (None: not judged, `pairs` are just the most similar). `one_group`: such
    pairs of one patient, which count only between data sets. `across`: quantiles of each image's similarity to the
    nearest one of another patient on the other side; `within`: of seeded images to the nearest of the same patient,
    None where patients are unknown.
    """

    set: str
    features: str
    random_weights: bool
    threshold: float | None
    compared: int
    without_features: int
    count: int
    one_group: int
    largest: float | None
    pairs: tuple[Pair, ...]
    across: dict[str, float] | None
    within: dict[str, float] | None


@dataclass(frozen=True, kw_only=True)
class Question:
    """How near-duplicates are looked for: `top` lists the most similar pairs and judges none by a threshold.

    Raises:
        ConfigError: values that cannot be, or both a threshold and `top`.
    """

    features: str = "cls"
    threshold: float | None = None
    top: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.threshold is not None and self.top is not None:
            raise ConfigError("give --threshold or --top, not both: --top lists pairs whatever their similarity")
        if self.threshold is not None and not -1 <= self.threshold <= 1:
            raise ConfigError(f"--threshold is a cosine similarity from -1 to 1, got {self.threshold}")
        if self.top is not None and not 1 <= self.top <= MAX_PAIRS:
            raise ConfigError(f"--top lists 1 to {MAX_PAIRS} pairs, got {self.top}")

    @property
    def judged(self) -> float | None:
        return DEFAULT_THRESHOLD if self.threshold is None and self.top is None else self.threshold

    def start(self) -> Found:
        """An empty list of findings."""
        judged = self.judged
        if judged is None:
            return Found(threshold=np.inf, keep=self.top or 1, floor=-2.0)
        return Found(threshold=judged, keep=MAX_PAIRS, floor=judged)


def silent(total: int) -> AbstractContextManager[Callable[[int], None]]:
    return nullcontext(lambda _: None)


def pick_set(store: Store, dataset: str, model: str | None) -> Entry | None:
    if model is not None:
        return store.entry(f"{dataset}/{model}")
    return min(store.find(dataset), key=_worth, default=None)


def _worth(entry: Entry) -> tuple[bool, int, str]:
    """Trained weights first, then most pixels, then by name."""
    preprocess = entry.spec["identity"].get("preprocess") or {}
    pixels = int(preprocess.get("height", 0)) * int(preprocess.get("width", 0))
    return bool(entry.spec["random_weights"]), -pixels, entry.full_name


def no_set(dataset: str) -> str:
    return (
        f"near-duplicates of {dataset} were not looked for: there are no embeddings; "
        f"run `featstore extract --dataset {dataset} --model NAME`"
    )


def _facts(entry: Entry) -> dict[str, Any]:
    """What must be equal for similarities to mean something; imported rows have a digest of their own as weights."""
    identity = dict(entry.spec["identity"])
    if identity.get("imported"):
        identity = {**identity, "weights": None, "model": entry.spec["model"]}
    return identity


def equal_sets(store: Store, chosen: tuple[Entry | None, str | None], name: str) -> tuple[Entry, Entry] | None:
    """One set of each data set, made alike; None if one of the two has no embeddings.

    Raises:
        TaskError: none is alike; what differs between the nearest two is listed.
    """
    entry, model = chosen
    theirs = store.find(name)
    if entry is None or not theirs:
        return None
    mine = [entry] if model is not None else sorted(store.find(entry.dataset), key=_worth)
    for one in mine:
        for other in theirs:
            if _facts(one) == _facts(other):
                return one, other
    nearest = min(theirs, key=lambda other: (len(differences(_facts(entry), _facts(other))), other.full_name))
    keys = ", ".join(key for key, _, _ in differences(_facts(entry), _facts(nearest)))
    raise TaskError(
        f"{entry.name} and {nearest.full_name} must be made alike to be compared, but differ in {keys}; extract both "
        "data sets with the same options, or choose another --model"
    )


def _codes(groups: Sequence[str | None]) -> Int64[np.ndarray, " N"]:
    """A number for each group, from 0; of its own below 0 for each sample without one."""
    names: dict[str, int] = {}
    return np.array(
        [-1 - row if group is None else names.setdefault(group, len(names)) for row, group in enumerate(groups)],
        np.int64,
    )


def _groups(manifest: Manifest) -> list[str | None]:
    if not manifest.meta.get("groups_known"):
        return [None] * len(manifest)
    return [value or None for value in manifest.column("group")]


def similar_in(
    features: FeatureSet,
    role: np.ndarray,
    known: bool,
    alike: list[list[int]],
    question: Question,
    progress: Progress,
) -> Similar:
    """Test rows against training and validation rows, then validation rows against training rows."""
    vectors = Vectors(features, question.features)
    manifest = features.manifest
    groups = _groups(manifest)
    codes, ok = _codes(groups), features.ok
    rows = {name: np.flatnonzero((role == name) & ok) for name in SPLITS}
    tests = [
        (rows["test"], np.concatenate([rows["train"], rows["val"]])),
        (rows["val"], rows["train"]),
    ]
    found = question.start()
    with progress(sum(len(first) * len(second) // 1000 for first, second in tests)) as advance:
        for first, second in tests:
            search(Side(vectors, first, codes[first]), Side(vectors, second, codes[second]), found, advance)
    twin = {row: number for number, same in enumerate(alike) for row in same}
    ids = manifest.column("id")
    pairs = tuple(
        Pair(
            ids=(ids[a], ids[b]),
            splits=(str(role[a]), str(role[b])),
            similarity=similarity,
            groups="unknown" if groups[a] is None or groups[b] is None else "different",
            identical=a in twin and twin[a] == twin.get(b),
        )
        for similarity, a, b in found.pairs
    )
    used = np.flatnonzero((role != "") & ok)
    within = nearest_within(vectors, used, codes[used], seed=question.seed) if known else []
    left_out = int(((role != "") & ~ok).sum())
    return _as_similar(features, question, found, pairs, (len(used), left_out), quantiles(within))


def similar_between(
    ours: FeatureSet, theirs: FeatureSet, kin: bool, twin: dict[int, int], question: Question, progress: Progress
) -> Similar:
    """Every image of the one against every image of the other."""
    first, second = np.flatnonzero(ours.ok), np.flatnonzero(theirs.ok)
    size = len(ours)
    groups = [*_groups(ours.manifest), *_groups(theirs.manifest)]
    codes = _codes([None] * len(groups))  # a copy in another data set is one whoever the patient is
    patients = _codes(groups) if kin else codes
    found = question.start()
    with progress(len(first) * len(second) // 1000) as advance:
        search(
            Side(Vectors(ours, question.features), first, codes[first], patients[first]),
            Side(Vectors(theirs, question.features), second, codes[second + size], patients[second + size]),
            found,
            advance,
        )
    ids, other_ids = ours.manifest.column("id"), theirs.manifest.column("id")

    def kinship(a: int, b: int) -> str:
        # Numbers of two releases say nothing of each other even where they read the same.
        if not kin or groups[a] is None or groups[b + size] is None:
            return "unknown"
        return "same" if groups[a] == groups[b + size] else "different"

    pairs = tuple(
        Pair(
            ids=(ids[a], other_ids[b]),
            splits=(ours.manifest.name, theirs.manifest.name),
            similarity=similarity,
            groups=kinship(a, b),
            identical=a in twin and twin[a] == twin.get(b + size),
        )
        for similarity, a, b in found.pairs
    )
    left_out = len(ours) + len(theirs) - len(first) - len(second)
    return _as_similar(ours, question, found, pairs, (len(first) + len(second), left_out), None)


def _as_similar(
    features: FeatureSet,
    question: Question,
    found: Found,
    pairs: tuple[Pair, ...],
    counts: tuple[int, int],
    within: dict[str, float] | None,
) -> Similar:
    """A search's findings; `counts` are rows compared and rows without features."""
    largest = max((value for value in found.nearest if np.isfinite(value)), default=None)
    return Similar(
        set=features.name,
        features=question.features,
        random_weights=features.random,
        threshold=question.judged,
        compared=counts[0],
        without_features=counts[1],
        count=found.count,
        one_group=found.within,
        largest=largest,
        pairs=pairs,
        across=quantiles(found.nearest),
        within=within,
    )
