"""MIMIC-CXR-JPG: radiographs of 65,379 patients with labels of two text classifiers, and the official split.

Layout: files/p10/p10000032/s50414267/<dicom_id>.jpg (or the folders p10 ... p19 themselves), and beside them
mimic-cxr-2.0.0-split, -metadata, -chexpert and -negbio, each .csv or .csv.gz.

Split and view stand per image, labels per study: every image gets the labels of its study, joined on (subject_id,
study_id). Studies without a label row exist; their images stay, with blank labels, and are counted in a note. Values
are 1, 0, -1 (uncertain) or blank (not mentioned). The two classifiers do not agree: `--option labels=negbio` takes the
other one's. ViewPosition tells the view (AP, PA; lateral is LATERAL or LL).

Group is subject_id, study is study_id. Split: official, `validate` is "val". Column `split_a`: 70/10/20 by patient,
seeded, for tasks of a study that drew its own 20 % for testing. `--option images=dicom` names the .dcm files of
MIMIC-CXR, which lie in the same folders.

Licence: PhysioNet credentialed health data, with training. Pre-training overlap: several radiograph models, such as
RAD-DINO and those of TorchXRayVision, were trained on it (exact lists unverified).
Source: Johnson et al. 2019 and the release's own files.
"""

from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from featstore.datasets.chexpert import LABELS
from featstore.datasets.locate import need_table
from featstore.datasets.source import Source, build_table, read_csv
from featstore.datasets.splits import split_by_group
from featstore.datasets.table import normal_splits
from featstore.errors import ManifestError

TASKS = ("mimic-5", "mimic-14", "mimic-10-a", "mimic-10-a-nothree", "mimic-7-a")
LATERAL = ("LATERAL", "LL")
_LAYOUT = (
    "a MIMIC-CXR-JPG folder holds files/ and mimic-cxr-2.0.0-split.csv.gz, -metadata.csv.gz, -chexpert.csv.gz and "
    "-negbio.csv.gz (the tables may be plain .csv)"
)
_LICENCE = "MIMIC-CXR-JPG: PhysioNet credentialed health data licence, with training; no redistribution"
_OVERLAP = "pre-training overlap: several radiograph models (RAD-DINO, TorchXRayVision) saw it; exact lists unverified"


def read(
    root: Path, *, labels: Literal["chexpert", "negbio"] = "chexpert", images: Literal["jpg", "dicom"] = "jpg"
) -> Source:
    """The images of the split table, with their metadata and the labels of their study.

    Raises:
        ManifestError: a table or column is missing, an image or a study has two rows, or a split has another name.
    """
    splits, split_notes = _read(root, "split", ("dicom_id", "subject_id", "study_id", "split"))
    metadata, metadata_notes = _read(root, "metadata", ("dicom_id", "ViewPosition"))
    scores, score_notes = _read(root, labels, ("subject_id", "study_id", *LABELS))
    ids = splits["dicom_id"]
    facts = _lookup(ids, metadata, metadata["dicom_id"], "an image stands in the metadata twice")
    keys = [pc.binary_join_element_wise(table["subject_id"], table["study_id"], "/") for table in (splits, scores)]
    studied = _lookup(keys[0], scores, keys[1], f"a study stands in the {labels} labels twice")
    original = splits
    for table, skip in ((facts, ("dicom_id", "subject_id", "study_id")), (studied, ("subject_id", "study_id"))):
        for name in table.column_names:
            if name not in (*skip, *original.column_names):
                original = original.append_column(name, table[name])
    parts = normal_splits(splits["split"].to_pylist(), "split")
    reserved = {
        "id": ids,
        "path": _paths(root, splits, ".jpg" if images == "jpg" else ".dcm"),
        "group": splits["subject_id"],
        "study": splits["study_id"],
        "split": pa.array(parts, pa.string()),
    }
    patients = splits["subject_id"].to_pylist()
    derived = {"split_a": pa.array(split_by_group(patients), pa.string())}
    notes = [_LICENCE, _OVERLAP, f"labels are those of the {labels} classifier; the other one's differ"]
    notes += _oddities(splits, metadata, keys, original)
    return Source(
        table=build_table(original, reserved, derived),
        root=root,
        adapter="mimic-cxr",
        default_task="mimic-5",
        tasks=TASKS,
        label_columns=LABELS,
        split_origin="official",
        groups_known=True,
        notes=(*notes, *split_notes, *metadata_notes, *score_notes),
    )


def _read(root: Path, name: str, columns: tuple[str, ...]) -> tuple[pa.Table, list[str]]:
    path, notes = need_table(root, f"mimic-cxr-*-{name}", _LAYOUT)
    table = read_csv(path)
    absent = [column for column in columns if column not in table.column_names]
    if absent:
        raise ManifestError(f"{path} lacks the columns {absent}; it names {table.column_names}")
    return table, notes


def _lookup(keys: pa.ChunkedArray, table: pa.Table, table_keys: pa.ChunkedArray, twice: str) -> pa.Table:
    """The rows of `table` for `keys`, in their order; a key it lacks gives a row of nulls."""
    unique = table_keys.combine_chunks()
    if len(unique.unique()) != len(unique):
        raise ManifestError(f"{twice}; download the table again")
    return table.take(pc.index_in(keys, value_set=unique))


def _paths(root: Path, splits: pa.Table, suffix: str) -> pa.ChunkedArray:
    subjects, studies = splits["subject_id"], splits["study_id"]
    inner = not (root / "files").is_dir() and any((root / f"p{number}").is_dir() for number in range(10, 20))
    first = pc.binary_join_element_wise("p" if inner else "files/p", pc.utf8_slice_codeunits(subjects, 0, 2), "")
    patient = pc.binary_join_element_wise("p", subjects, "")
    study = pc.binary_join_element_wise("s", studies, "")
    name = pc.binary_join_element_wise(splits["dicom_id"], suffix, "")
    return pc.binary_join_element_wise(first, patient, study, name, "/")


def _oddities(splits: pa.Table, metadata: pa.Table, keys: list[pa.ChunkedArray], original: pa.Table) -> list[str]:
    """What a reader of the numbers should know, with counts; nothing is changed or dropped."""
    unlabelled = pc.invert(pc.is_in(keys[0], value_set=keys[1].combine_chunks()))
    known = pc.is_in(splits["dicom_id"], value_set=metadata["dicom_id"].combine_chunks())
    views = original["ViewPosition"]
    total = splits.num_rows
    counts = [
        (_count(unlabelled), f"of {total} images belong to studies without a label row; their labels are blank"),
        (_count(pc.invert(known)), "images have no metadata row; their view is blank"),
        (_count(pc.is_in(views, value_set=pa.array(LATERAL))), f"of {total} images are lateral (LATERAL, LL)"),
        (views.null_count, "images have no ViewPosition"),
        (sum(_count(pc.is_in(original[label], value_set=pa.array(["-1.0", "-1"]))) for label in LABELS),
         "label values, counted per image, are -1 (uncertain)"),
    ]  # fmt: skip
    return [f"{count} {what}" for count, what in counts if count]


def _count(flags: pa.ChunkedArray) -> int:
    return int(pc.sum(flags).as_py() or 0)
