"""Retrieval: the rows of a set most similar to one image, exact, or approximate with measured recall."""

import json
import logging
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from featstore import files
from featstore.errors import ConfigError, TaskError, UnknownNameError
from featstore.objects import as_object
from featstore.store.catalog import Store
from featstore.store.features import FeatureSet
from probes.ann import Ann, Kind, build_ann, load_ann, recall, save_ann
from probes.neighbours import build_index, ranked, unit_rows
from probes.roles import parse_where

SAMPLE = 100  # seeded rows that recall is measured on

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Hit:
    """One neighbour: manifest row, cosine similarity, and what the manifest says of it."""

    rank: int
    id: str
    similarity: float
    split: str
    group: str | None
    labels: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """Neighbours of one query, in order; `searched` rows could have been among them.

    `index` says what searched; `recall` is its measured share of the exact k nearest rows, None where it is exact.
    """

    hits: tuple[Hit, ...]
    searched: int
    index: str
    recall: float | None
    cached: bool


def query_row(features: FeatureSet, sample: str) -> int | None:
    """The manifest row of an id, None if the set has no such sample."""
    ids = features.manifest.column("id")
    return ids.index(sample) if sample in ids else None


def stored_vector(features: FeatureSet, row: int, parts: list[str]) -> Float[np.ndarray, " D"]:
    """The vectors of one row, joined.

    Raises:
        TaskError: the row has none, because its image failed. IncompleteError: it is not extracted yet.
    """
    vector = np.concatenate([np.asarray(features.array(name)[row]).astype(np.float32).reshape(-1) for name in parts])
    if not vector.any():
        raise TaskError(
            f"the features of {features.manifest.column('id')[row]!r} are zero and have no direction to search in; ask "
            "for another sample"
        )
    if not np.isfinite(vector).all():
        raise TaskError(
            f"{features.manifest.column('id')[row]} failed ({features.failures.get(row, 'unknown')}) and has no "
            "embedding; ask for another sample"
        )
    return vector


def search(
    store: Store,
    features: FeatureSet,
    query: Float[np.ndarray, " D"],
    name: str,
    *,
    k: int = 10,
    where: str = "",
    index: Literal["exact", "ivf", "hnsw"] = "exact",
    without: int | None = None,
) -> Answer:
    """The k rows of a set most similar to `query` in the features `name`, among those that pass `where`.

    `without` is a manifest row that is no answer: the query's own. IVF and HNSW are built once and kept in the store's
    cache; their recall is measured against exact search on rows drawn by a fixed seed, and reported.

    Raises:
        ConfigError: k below one, or an approximate index without FAISS or with too few rows.
        TaskError: features that are no vectors, or a filter that nothing passes.
    """
    if k < 1:
        raise ConfigError(f"--k must be at least 1, got {k}")
    usable = np.flatnonzero(features.ok)
    allowed = _passing(features, where)[usable] & (usable != (-1 if without is None else without))
    if not allowed.any():
        raise TaskError(f"no embedded sample of {features.name} is left to search; check --where {where!r}")
    unit = unit_rows(query[None])
    if index == "exact":
        bank = _bank(features, name, usable[allowed], query)
        similarity, rows = ranked(build_index(bank, "auto")[0], unit, min(k, len(bank)))
        rows = np.flatnonzero(allowed)[rows]
        made, measured, cached = "exact", None, False
    else:
        ann, measured, cached = _approximate(store, features, name, usable, query, kind=index, k=k)
        similarity, rows = ann.search(unit, min(k, int(allowed.sum())), None if allowed.all() else allowed)
        made = ann.recipe
    found = [(float(value), int(usable[row])) for value, row in zip(similarity[0], rows[0]) if row >= 0]
    return Answer(hits=_hits(features, found), searched=int(allowed.sum()), index=made, recall=measured, cached=cached)


def _passing(features: FeatureSet, where: str) -> Bool[np.ndarray, " N"]:
    keep = np.ones(len(features), dtype=bool)
    for column, values in parse_where(where) if where else ():
        if column not in features.manifest.table.column_names:
            known = ", ".join(features.manifest.table.column_names)
            raise UnknownNameError(f"{features.name} has no column {column!r}; its columns: {known}")
        texts = ("" if value is None else str(value) for value in features.manifest.column(column))
        keep &= np.array([text in values for text in texts], dtype=bool)
    return keep


def _bank(
    features: FeatureSet, name: str, rows: Int[np.ndarray, " M"], query: Float[np.ndarray, " D"]
) -> Float[np.ndarray, "M D"]:
    """Unit rows of the set's features."""
    values = features.load(name)
    if values.ndim != 2 or values.shape[1] != len(query):
        raise TaskError(
            f"features {name!r} are {values.shape[1:]} a sample and the query has {len(query)}; search takes vectors: "
            "cls, mean_patch, cls+mean_patch or layers/K/cls"
        )
    zero = rows[~values[rows].any(1)]
    if len(zero):
        raise TaskError(
            f"the features of {len(zero)} samples of {features.name} are zero, such as those of "
            f"{features.manifest.column('id')[zero[0]]!r}, and have no direction to be near to; leave them out with "
            "--where, or import features without them"
        )
    return unit_rows(values[rows])


def _approximate(
    store: Store,
    features: FeatureSet,
    name: str,
    usable: Int[np.ndarray, " M"],
    query: Float[np.ndarray, " D"],
    *,
    kind: Kind,
    k: int,
) -> tuple[Ann, float, bool]:
    """(index over the usable rows, its recall at k, whether it was kept from before)."""
    key = [features.fingerprint, features.manifest.digest, files.digest(usable.tolist()), name, kind]
    folder = (store.path if as_object(store.path) is None else files.user_cache()) / "cache" / "search"
    path = Path(str(folder)) / f"{files.digest(key)[:16]}.faiss"
    kept = _kept(path, key)
    k = min(k, len(usable))
    if kept is not None and str(k) in kept[1]["recall"]:
        return kept[0], float(kept[1]["recall"][str(k)]), True
    bank = _bank(features, name, usable, query)
    ann = kept[0] if kept is not None else build_ann(bank, kind)
    drawn = np.random.default_rng(0).choice(len(bank), min(SAMPLE, len(bank)), replace=False)
    measured = recall(ann, build_index(bank, "auto")[0], bank[np.sort(drawn)], k)
    known = {**(kept[1]["recall"] if kept is not None else {}), str(k): measured}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if kept is None:
            spare = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
            save_ann(ann, spare)
            os.replace(spare, path)
        files.write_atomic(path.with_suffix(".json"), files.sealed({"key": key, "recipe": ann.recipe, "recall": known}))
    except OSError as error:  # stores may be read-only
        logger.warning("the index is not kept: %s", error)
    return ann, measured, kept is not None


def _kept(path: Path, key: list[Any]) -> tuple[Ann, dict[str, Any]] | None:
    """The index in the cache with what is known of it; None where there is none that can be used."""
    about = path.with_suffix(".json")
    if not (path.is_file() and about.is_file()):
        return None
    try:
        facts = files.unseal(about.read_bytes(), about)
        return (load_ann(path, facts["recipe"]), facts) if facts["key"] == json.loads(json.dumps(key)) else None
    except (OSError, RuntimeError, KeyError) as error:  # FAISS raises RuntimeError on damaged files
        logger.warning("%s cannot be used and is built again: %s", path, str(error).splitlines()[0])
        return None


def _hits(features: FeatureSet, found: list[tuple[float, int]]) -> tuple[Hit, ...]:
    table = features.manifest.table.take([row for _, row in found]).to_pylist()
    columns = features.manifest.meta["label_columns"]
    return tuple(
        Hit(
            rank=rank,
            id=facts["id"],
            similarity=similarity,
            split=facts["split"] or "",
            group=facts["group"],
            labels={name: facts[name] for name in columns},
        )
        for rank, ((similarity, _), facts) in enumerate(zip(found, table), 1)
    )
