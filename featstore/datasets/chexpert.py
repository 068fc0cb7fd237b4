"""CheXpert 1.0, full or small: `train.csv`, `valid.csv` and, in the later release, `test.csv` beside the images.

Layout: train/patient00001/study1/view1_frontal.jpg. The release's folder name comes first in the paths of train.csv and
valid.csv; the later test release has none in its test.csv, which may lie here or in a folder CheXpert/ here, with its
images in test/ beside it. The small release has the same layout and smaller JPEGs.

Labels are 1.0, 0.0, -1.0 (uncertain) or blank (not mentioned). Group is the patient in the path, study patient/study.
Split: official; valid.csv (234 images, radiologists' labels) is "val", the later release "test". Columns made here, for
tasks of studies that drew their own parts: `split_mgca` (valid.csv is the test part, and about 5,000 images of whole
training patients, seeded, validate) and `split_a` (70/10/20 by patient over train.csv and valid.csv, seeded).
One Sex is Unknown and three Ages are 0 in train.csv; notes count them. `age_years` is Age as a number, blank for 0.

Licence: Stanford research use agreement, by registration. Pre-training overlap: several radiograph models, such as
RAD-DINO and those of TorchXRayVision, were trained on it (exact lists unverified).
Source: Irvin et al. 2019; columns and traps as counted in the release's own files.
"""

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from featstore.datasets.source import Source, build_table, read_csv
from featstore.datasets.splits import seeded_rank, split_by_group
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
TASKS = (
    "chexpert-5", "chexpert-14", "chexpert-5-mgca", "chexpert-10-a", "chexpert-10-a-nothree", "chexpert-7-a",
    "chexpert-6-c", "chexpert-age", "chexpert-sex",
)  # fmt: skip
# Of the 223,414 rows of train.csv, those that validate (Wang et al. 2022, MGCA).
VAL_MGCA, ROWS = 5_000, 223_414
TEST_FOLDER = "CheXpert"  # of the later test release
_LAYOUT = "a CheXpert folder holds train.csv, valid.csv, train/ and valid/ (test.csv and test/ in the later release)"
_FILES = (("train.csv", "train", True), ("valid.csv", "val", True), ("test.csv", "test", False))
# The release folder's name comes first in train.csv and valid.csv, and is absent from test.csv.
_PATH = (
    r"^(?:[^/]+/)?(?P<path>(?:train|valid|test)/(?P<patient>patient[0-9]+)/(?P<study>study[0-9]+)"
    r"/[^/]*_(?P<view>frontal|lateral)[^/]*)$"
)
_LICENCE = "CheXpert: Stanford University School of Medicine research use agreement, by registration; no redistribution"
_OVERLAP = "pre-training overlap: several radiograph models (RAD-DINO, TorchXRayVision) saw it; exact lists unverified"


def read(root: Path) -> Source:
    """The rows of a CheXpert folder: every column verbatim, patients and studies from the paths, official splits.

    `root` is the folder with train.csv, whatever its name. The official validation images are split "val", the
    radiologists' test images "test".

    Raises:
        ManifestError: a file or column is missing, or a path is not patient/study/view.
    """
    tables, parts, notes = [], [], [_LICENCE, _OVERLAP]
    splits, folders = list[str](), list[str]()
    for name, split, needed in _FILES:
        folder = root
        if not needed and not (root / name).is_file():
            folder = root / TEST_FOLDER
            if not (folder / name).is_file():
                continue
            notes.append(f"{name} and its images are those of the folder {TEST_FOLDER}/")
        table = _read_file(folder, name)
        parsed = _parse(table["Path"], folder / name)
        if VIEW not in table.column_names:
            table = table.append_column(VIEW, pc.utf8_capitalize(pc.struct_field(parsed, "view")))
            notes.append(f"{name} has no {VIEW!r} column; taken from the {table.num_rows} file names")
        tables.append(table)
        parts += parsed.chunks
        splits += [split] * table.num_rows
        folders += ["" if folder == root else f"{TEST_FOLDER}/"] * table.num_rows
    original = pa.concat_tables(tables, promote_options="default").combine_chunks()
    patients, studies, paths = (
        pa.chunked_array([chunk.field(name) for chunk in parts], pa.string()) for name in ("patient", "study", "path")
    )
    reserved = {
        "id": paths,
        "path": pc.binary_join_element_wise(pa.array(folders, pa.string()), paths, ""),
        "group": patients,
        "study": pc.binary_join_element_wise(patients, studies, "/"),
        "split": pa.array(splits, pa.string()),
    }
    names = patients.to_pylist()
    derived = {
        "split_mgca": pa.array(_split_mgca(splits, names)),
        "split_a": pa.array(_split_a(splits, names)),
        "age_years": _ages(original),
    }
    return Source(
        table=build_table(original, reserved, derived),
        root=root,
        adapter="chexpert",
        default_task="chexpert-5",
        tasks=TASKS,
        label_columns=LABELS,
        split_origin="official",
        groups_known=True,
        notes=(*notes, *_oddities(original)),
    )


def _split_mgca(splits: list[str], patients: list[str]) -> list[str]:
    """valid.csv tests; patients of train.csv by seeded rank, up to about 5,000 images, validate; the rest trains."""
    images = Counter(patient for patient, split in zip(patients, splits) if split == "train")
    wanted = VAL_MGCA * min(images.total() / ROWS, 1.0)
    val, count = set[str](), 0
    for patient in sorted(images, key=lambda patient: (seeded_rank(patient, 0), patient)):
        if count >= wanted:
            break
        val.add(patient)
        count += images[patient]
    part = {"val": "test", "test": ""}
    return [part.get(split, "val" if patient in val else "train") for split, patient in zip(splits, patients)]


def _ages(original: pa.Table) -> pa.Array | pa.ChunkedArray:
    """Age as a number; null where it is 0, which is no age, or no number at all (the test release has none)."""
    if "Age" not in original.column_names:
        return pa.nulls(original.num_rows, pa.float64())
    text = original["Age"]
    ages = pc.cast(pc.if_else(pc.match_substring_regex(text, r"^[0-9]+(\.[0-9]+)?$"), text, None), pa.float64())
    return pc.if_else(pc.greater(ages, 0), ages, None)


def _split_a(splits: list[str], patients: list[str]) -> list[str]:
    drawn = split_by_group(patients)
    return ["" if split == "test" else part for split, part in zip(splits, drawn)]


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
