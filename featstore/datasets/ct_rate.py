"""CT-RATE: chest CT volumes with 18 machine-read abnormalities; one row an axial slice, tasks on whole volumes.

Layout: `dataset/{train,valid}/train_1/train_1_a/train_1_a_1.nii.gz` (or `train_fixed`, `valid_fixed`), beside them
`multi_abnormality_labels/{train,valid}_predicted_labels.csv`, `metadata/{train,validation}_metadata.csv` and
`no_chest_train.txt`, `no_chest_valid.txt`. ROOT is the folder `dataset` or the one around it. What is not on disk is no
row: part of the release is enough.

Which folders: `--option files=auto` (default) takes the `_fixed` one of a split where it exists, else the original;
`fixed` and `original` insist. Original files need RescaleSlope and RescaleIntercept of the metadata table to become
Hounsfield units; the `_fixed` folders are taken to hold files that need no table, which the release does not prove, so
look at one. Pixels are what the file and its own header say; nothing here applies the columns. A volume whose minimum
is near -1000 holds Hounsfield units already: never apply slope and intercept twice. A fixed window such as [-1000,
1000] (`--intensity window:...`) is right for Hounsfield units only.

Rows: every axial slice, from foot to head; `volume` is the VolumeName without suffix (one reconstruction), `z` the
slice, study the scan (`train_1_a`). Groups: the patient (`train_1`), so that reconstructions of a scan, and scans of a
patient, never part. Columns: VolumeName, the 18 labels ("1", "0", verbatim, read from the reports by a machine), and
of the metadata RescaleSlope, RescaleIntercept, XYSpacing (text "[x, y]"), ZSpacing, Manufacturer, PatientSex,
PatientAge where they are there; `--option all_metadata=true` takes every column. Reports are not read: they would be
repeated in every slice.

Split: train is "train", valid is "val"; there is no other, so tasks test on it and select on a tenth of the training
patients. Volumes named in `no_chest_*.txt` are left out (`--option no_chest=true` keeps them). 50,188 volumes are some
fifteen million slices: `--option every=10` keeps every tenth.

Licence: CC BY-NC-SA 4.0, gated at the Hugging Face hub (ibrahimhamamci/CT-RATE). Source: Hamamci et al. 2024.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from featstore.datasets.slices import Volume, find_home, join, nifti_slices, stem, walk
from featstore.datasets.source import Source, read_csv
from featstore.errors import ManifestError

if TYPE_CHECKING:
    import pyarrow as pa

LABELS = (
    "Medical material", "Arterial wall calcification", "Cardiomegaly", "Pericardial effusion",
    "Coronary artery wall calcification", "Hiatal hernia", "Lymphadenopathy", "Emphysema", "Atelectasis", "Lung nodule",
    "Lung opacity", "Pulmonary fibrotic sequela", "Pleural effusion", "Mosaic attenuation pattern",
    "Peribronchial thickening", "Consolidation", "Bronchiectasis", "Interlobular septal thickening",
)  # fmt: skip
METADATA = (
    "RescaleSlope", "RescaleIntercept", "XYSpacing", "ZSpacing", "Manufacturer", "PatientSex", "PatientAge",
)  # fmt: skip
_SPLITS = (("train", "train", ("train",)), ("valid", "val", ("validation", "valid")))
_LAYOUT = "CT-RATE's folder `dataset` holds train or train_fixed, valid or valid_fixed, and multi_abnormality_labels"
Files = Literal["auto", "fixed", "original"]


def read(
    root: Path, *, files: Files = "auto", no_chest: bool = False, all_metadata: bool = False, every: int = 1
) -> Source:
    """The slices of a CT-RATE folder; see the text of this module.

    Raises:
        ManifestError: no volumes, a file name without patient and scan, a table that lacks a column, or a volume with
            contradictory labels.
    """
    kinds = {"auto": ("_fixed", ""), "fixed": ("_fixed",), "original": ("",)}[files]
    holds = [name + kind for name, _, _ in _SPLITS for kind in kinds]
    home = find_home(root, ("dataset",), holds, _LAYOUT)
    volumes: list[Volume] = []
    notes = [
        "CT-RATE: CC BY-NC-SA 4.0, gated; cite Hamamci et al. 2024",
        "labels are machine-read from reports (predicted_labels)",
    ]
    for name, split, _ in _SPLITS:
        folder = next((name + kind for kind in kinds if (root / home / (name + kind)).is_dir()), None)
        if folder is None:
            continue
        notes.append(
            f"{split}: {folder}; check one volume: a minimum near -1000 means Hounsfield units"
            if folder.endswith("_fixed")
            else f"{split}: {folder}; RescaleSlope and RescaleIntercept are columns and are not applied to the pixels"
        )
        paths, hidden = walk(root, join(home, folder))
        notes += [f"{hidden} AppleDouble files (._*) are passed over"] if hidden else []
        volumes += [_volume(path, split) for path in paths]
    listed = _no_chest(root, home)
    outside = [volume.name for volume in volumes if {volume.name, volume.study} & listed]
    if outside and not no_chest:
        notes.append(f"{len(outside)} volumes of no_chest_*.txt are left out; --option no_chest=true keeps them")
        gone = set(outside)
        volumes = [volume for volume in volumes if volume.name not in gone]
    columns, more = _columns(root / home, volumes, all_metadata)
    table, most = nifti_slices(root, volumes, {}, columns, every=every)
    return Source(
        table=table,
        root=root,
        adapter="ct-rate",
        default_task="ct-rate-18",
        tasks=("ct-rate-18", "ct-rate-18-b"),
        label_columns=LABELS,
        split_origin="official",
        groups_known=True,
        notes=(*notes, *more, *most),
    )


def _volume(path: str, split: str) -> Volume:
    name = stem(path.rpartition("/")[2])
    pieces = name.split("_")
    if len(pieces) < 4 or not all(pieces):
        raise ManifestError(f"{path}: volumes of CT-RATE are called SPLIT_PATIENT_SCAN_RECONSTRUCTION.nii.gz")
    return Volume(name=name, path=path, group="_".join(pieces[:2]), study="_".join(pieces[:3]), split=split)


def _no_chest(root: Path, home: str) -> set[str]:
    """Volumes and scans named in the lists, which lie beside the folders, beside the metadata or above."""
    folders = {root, root / home, root / home / "metadata"}
    names: set[str] = set()
    for path in {path for folder in folders for path in folder.glob("no_chest_*.txt")}:
        lines = path.read_text("utf-8-sig").replace(",", "\n").splitlines()
        names |= {stem(line.strip().rstrip("/").rpartition("/")[2]) for line in lines}
    return names - {""}


def _columns(home: Path, volumes: Sequence[Volume], all_metadata: bool) -> tuple["pa.Table", list[str]]:
    """Labels and metadata of every volume, blank where a table does not name it."""
    import pyarrow as pa

    row = {volume.name: number for number, volume in enumerate(volumes)}
    columns: dict[str, list[str | None]] = {"VolumeName": [Path(volume.path).name for volume in volumes]}
    columns |= {label: [None] * len(volumes) for label in LABELS}
    notes: list[str] = []
    absent = 0
    labelled: set[int] = set()
    for folder, _, spellings in _SPLITS:
        path = home / "multi_abnormality_labels" / f"{folder}_predicted_labels.csv"
        if path.is_file():
            found, strangers = _fill(columns, path, row, LABELS, insist=True)
            labelled |= found
            absent += strangers
        else:
            notes.append(f"{path.name} is not there; its volumes have no labels")
        tables = [home / "metadata" / f"{spelling}_metadata.csv" for spelling in spellings]
        for path in [path for path in tables if path.is_file()][:1]:
            _fill(columns, path, row, None if all_metadata else METADATA, insist=False)
    if len(labelled) < len(volumes):
        notes.append(f"{len(volumes) - len(labelled)} volumes have no labels")
    if absent:
        notes.append(f"{absent} volumes of the label tables are left out or not on disk")
    return pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()}), notes


def _fill(
    columns: dict[str, list[str | None]],
    path: Path,
    row: dict[str, int],
    names: Sequence[str] | None,
    *,
    insist: bool,
) -> tuple[set[int], int]:
    """Write the values of a table where its volumes stand; (rows written, volumes that are not there)."""
    table = read_csv(path)
    lacking = [name for name in ("VolumeName", *(names or ())) if name not in table.column_names]
    if "VolumeName" in lacking or (insist and lacking):
        raise ManifestError(f"{path} lacks the columns {lacking}; CT-RATE's tables name VolumeName and what they tell")
    at = [row.get(stem(name or ""), -1) for name in table["VolumeName"].to_pylist()]
    if insist and (unlike := _contradictions(table.select([*names]) if names else table, at)):
        raise ManifestError(
            f"{path}: {unlike} volumes stand in several rows with different labels; a volume must have one row, so "
            "download the table again or remove what is wrong"
        )
    wanted = [name for name in table.column_names if name != "VolumeName" and (names is None or name in names)]
    for name in wanted:
        values = columns.setdefault(name, [None] * len(row))
        for place, value in zip(at, table[name].to_pylist()):
            if place >= 0:
                values[place] = value
    return set(at) - {-1}, at.count(-1)


def _contradictions(table: "pa.Table", at: Sequence[int]) -> int:
    """Number of volumes on disk whose rows do not all say the same."""
    place_of = np.asarray(at, np.int64)
    seen, counts = np.unique(place_of[place_of >= 0], return_counts=True)
    rows = np.flatnonzero(np.isin(place_of, seen[counts > 1]))
    said: dict[int, set[tuple[str | None, ...]]] = {}
    for place, values in zip(place_of[rows].tolist(), table.take(rows).to_pylist()):
        said.setdefault(place, set()).add(tuple(values.values()))
    return sum(len(values) > 1 for values in said.values())
