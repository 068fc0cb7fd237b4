"""Sets of given features on a table of given columns, for tests of tasks: no backbone, no images to decode."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from featstore.configs import RegisterConfig
from featstore.register import register
from featstore.store.catalog import Store
from featstore.store.features import FeatureSet
from featstore.store.importer import import_features

PARTS = ["train"] * 4 + ["val"] * 2 + ["test"] * 2


def write_set(
    store: Path,
    root: Path,
    columns: dict[str, list[Any]],
    features: np.ndarray,
    *,
    name: str = "x",
    model: str = "m",
    failed: tuple[int, ...] = (),
    label_columns: str = "",
) -> FeatureSet:
    """Register `columns` (`part` splits, `pid` groups, `stud` studies) as a data set and import its features."""
    root.mkdir(parents=True, exist_ok=True)
    size = len(features)
    names = [f"{number:03d}.png" for number in range(size)]
    for file in names:
        (root / file).write_bytes(file.encode())  # no two alike: that would be a leak
    pq.write_table(pa.table({"path": names, **columns}), root / "labels.parquet")
    config = RegisterConfig(
        table=root / "labels.parquet",
        label_columns=label_columns,
        split_column="part" if "part" in columns else None,
        group_column="pid" if "pid" in columns else None,
        study_column="stud" if "stud" in columns else None,
    )
    register(store, name, root, config)
    kept = [number for number in range(size) if number not in failed]
    np.savez(root / "f.npz", features=features[kept].astype(np.float32), id=np.array([names[row] for row in kept]))
    return import_features(store, root / "f.npz", dataset=name, model=model)[0][name, model]


def by_patient(patient: np.ndarray) -> dict[str, list[Any]]:
    """Columns `part` and `pid` of samples of these patients: of ten, six train, two are val and two test."""
    return {
        "part": np.where(patient % 10 < 6, "train", np.where(patient % 10 < 8, "val", "test")).tolist(),
        "pid": [f"p{number}" for number in patient],
    }


def two_label_store(store: Path, root: Path) -> Store:
    """240 samples, two a patient; labels a and b (with blanks), three classes, two classes, that the features tell."""
    rng = np.random.default_rng(0)
    y = (rng.random((240, 2)) < 0.4).astype(int)
    features = rng.standard_normal((240, 6))
    features[:, :2] += 1.2 * y
    patient = np.arange(240) // 2
    columns: dict[str, list[Any]] = {
        **by_patient(patient),
        "stud": [f"t{number}" for number in patient],
        "a": [str(value) for value in y[:, 0]],
        "b": ["" if number % 9 == 0 else str(value) for number, value in enumerate(y[:, 1])],
        "kind": ["xyz"[value] for value in y[:, 0] + y[:, 1]],
        "pair": ["no" if value == 0 else "yes" for value in y[:, 0]],
        "age": [float(value) for value in features[:, 0] + 50],
    }
    write_set(store, root, columns, features)
    return Store(store)


def with_patches(features: FeatureSet, model: str = "p") -> FeatureSet:
    """A set of the same samples with patches (3, 8) of noise, stored as an extraction stores them."""
    from tiny_sets import PATCHES, make_spec_of, prepare, write_missing

    store = features.folder.parents[2]
    spec = make_spec_of(dataset=features.manifest.name, model=model, block_rows=1024)
    write_missing(prepare(store, spec, features.manifest, [PATCHES]), 0, block_rows=1024)
    return Store(store).set(f"{features.manifest.name}/{model}@42")


def with_volumes(features: FeatureSet) -> FeatureSet:
    """The set with its column `volume` read as the ids of volumes."""
    meta = {**features.manifest.meta, "places": ["volume"]}
    features.manifest = dataclasses.replace(features.manifest, meta=meta)
    return features
