"""CheXpert 1.0, full or small: `train.csv`, `valid.csv` and, in the later release, `test.csv` beside the images.

Layout: train/patient00001/study1/view1_frontal.jpg. Labels are 1.0, 0.0, -1.0 (uncertain) or blank (not mentioned).
Source: Irvin et al. 2019; columns and traps as counted in the release's own files.
"""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from featstore.datasets.source import Source, build_table, read_csv
from featstore.errors import ManifestError

LABELS = (
    "No Finding",
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
)
VIEW = "Frontal/Lateral"
_LAYOUT = "a CheXpert folder holds train.csv, valid.csv, train/ and valid/ (test.csv and test/ in the later release)"
_FILES = (("train.csv", "train", True), ("valid.csv", "val", True), ("test.csv", "test", False))
# The release folder's name comes first in train.csv and valid.csv, and is absent from test.csv.
_PATH = (
    r"^(?:[^/]+/)?(?P<path>(?:train|valid|test)/(?P<patient>patient[0-9]+)/(?P<study>study[0-9]+)"
    r"/[^/]*_(?P<view>frontal|lateral)[^/]*)$"
)
_LICENCE = "CheXpert: Stanford University School of Medicine research use agreement, by registration; no redistribution"


def read(root: Path) -> Source:
    """The rows of a CheXpert folder: every column verbatim, patients and studies from the paths, official splits.

    `root` is the folder with train.csv, whatever its name. The official validation images are split "val", the
    radiologists' test images "test".

    Raises:
        ManifestError: a file or column is missing, or a path is not patient/study/view.
    """
    tables, parts, splits, notes = [], [], [], [_LICENCE]
    for name, split, needed in _FILES:
        if not needed and not (root / name).is_file():
            continue
        table = _read_file(root, name)
        parsed = _parse(table["Path"], root / name)
        if VIEW not in table.column_names:
            table = table.append_column(VIEW, pc.utf8_capitalize(pc.struct_field(parsed, "view")))
            notes.append(f"{name} has no {VIEW!r} column; taken from the {table.num_rows} file names")
        tables.append(table)
        parts += parsed.chunks
        splits += [split] * table.num_rows
    original = pa.concat_tables(tables, promote_options="default").combine_chunks()
    patients, studies, paths = (
        pa.chunked_array([chunk.field(name) for chunk in parts], pa.string()) for name in ("patient", "study", "path")
    )
    reserved = {
        "id": paths,
        "path": paths,
        "group": patients,
        "study": pc.binary_join_element_wise(patients, studies, "/"),
        "split": pa.array(splits, pa.string()),
    }
    return Source(
        table=build_table(original, reserved),
        root=root,
        adapter="chexpert",
        default_task="chexpert-5",
        tasks=("chexpert-5", "chexpert-14"),
        label_columns=LABELS,
        split_origin="official",
        groups_known=True,
        notes=(*notes, *_oddities(original)),
    )


def _read_file(root: Path, name: str) -> pa.Table:
    path = root / name
    if not path.is_file():
        inner = sorted(folder.parent.name for folder in root.glob("*/train.csv"))
        hint = f"; did you mean {root / inner[0]}?" if inner else ""
        raise ManifestError(f"{path} is missing: {_LAYOUT}{hint}")
    table = read_csv(path)
    absent = [column for column in ("Path", *LABELS) if column not in table.column_names]
    if absent:
        raise ManifestError(f"{path} lacks the columns {absent}; CheXpert's files name Path and {len(LABELS)} labels")
    return table


def _parse(paths: pa.ChunkedArray, where: Path) -> pa.ChunkedArray:
    """Structs of path below the root, patient, study and view."""
    parts = pc.extract_regex(paths, _PATH)
    if parts.null_count:
        row = pc.index(pc.is_null(parts), True).as_py()
        raise ManifestError(
            f"{where}: {parts.null_count} paths are not [release/]train/patientNNNNN/studyN/viewN_frontal.jpg; "
            f"the first is row {row + 1}: {paths[row].as_py()!r}"
        )
    return parts


def _oddities(original: pa.Table) -> list[str]:
    """What a reader of the numbers should know, with counts; nothing is changed or dropped."""
    num_rows = original.num_rows
    given = [pc.is_valid(original[label]) for label in LABELS]
    labelled = given[0]
    for valid in given[1:]:
        labelled = pc.or_(labelled, valid)
    counts = [
        (sum(_count_equal(original[label], "-1.0") for label in LABELS), "label values are -1.0 (uncertain)"),
        (num_rows - (pc.sum(labelled).as_py() or 0), "rows have no label at all"),
        (_count_equal(original[VIEW], "Lateral"), f"of {num_rows} images are lateral"),
    ]
    for column, value in (("Sex", "Unknown"), ("Age", "0")):
        if column in original.column_names:
            counts.append((_count_equal(original[column], value), f"rows have {column} {value}"))
    return [f"{count} {what}" for count, what in counts if count]


def _count_equal(values: pa.ChunkedArray, text: str) -> int:
    return int(pc.sum(pc.equal(values, text)).as_py() or 0)
