"""PadChest: over 160,000 radiographs (16-bit PNG) of about 67,000 patients, with 174 findings from Spanish reports.

Layout: the folders 0 ... 54 (ImageDir) with the images (ImageID), or all images in any other folder, and beside them
PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv or .csv.gz.

`Labels` is the text of a Python list. It is taken apart, never evaluated: findings in lower case, without outer spaces
and quotes (some have a stray one), each once, give one column each ("pleural effusion": 1 or 0). A blank, empty or
unreadable text leaves all of them blank; no row is dropped. `MethodLabel` tells who labelled (27 % physicians).
Views are told by `Projection` (PA, L, AP, AP_horizontal, ...); `ViewPosition_DICOM` differs in places.

Group is PatientID, study is StudyID. There is no official split: 70/10/20 by patient, seeded.
Some published files are damaged or absent: name them in skip.txt beside the table (one ImageID a line, or
`--option skip=FILE`) to leave them out, or register with --allow-missing to keep them as failed rows.
The grey levels in use are a part of the 16 bits that differs between files: `native` shows them by the file's range.

Licence: BIMCV, by request form; no redistribution. Pre-training overlap: several radiograph models, such as RAD-DINO
and those of TorchXRayVision, were trained on it (exact lists unverified). Source: Bustos et al. 2020.
"""

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from featstore.datasets.locate import locate, need_table
from featstore.datasets.source import Source, build_table, read_csv
from featstore.datasets.splits import split_by_group
from featstore.errors import ManifestError

LATERAL = "L"
MAX_FINDINGS = 1000  # each becomes a column
_TABLE = "PADCHEST_chest_x_ray_images_labels*"
_LAYOUT = "a PadChest folder holds the folders 0 to 54 with images, and the table of labels"
_LICENCE = "PadChest: BIMCV research use, by request form; no redistribution"
_OVERLAP = "pre-training overlap: several radiograph models (RAD-DINO, TorchXRayVision) saw it; exact lists unverified"
# A comma ends an item only where a new one follows; a finding may hold one, and one may hold or end with a quote.
_BETWEEN = re.compile(r",\s*(?=['\"]|nan\b|None\b)")
_NOTHING = ("", "nan", "none")


def read(root: Path, *, skip: str | None = None) -> Source:
    """The rows of the PadChest table, every column verbatim, then one "0"/"1" column for each finding.

    Raises:
        ManifestError: the table, a column or the file of `skip` is missing, or there are far too many findings.
    """
    path, notes = need_table(root, _TABLE, _LAYOUT)
    original = read_csv(path)
    absent = [
        name for name in ("ImageID", "ImageDir", "PatientID", "Labels", "Projection")
        if name not in original.column_names
    ]  # fmt: skip
    if absent:
        raise ManifestError(f"{path} lacks the columns {absent}; it names {original.column_names}")
    original, skipped = _without_skipped(root, original, skip)
    derived, label_notes = _expand(original["Labels"])
    images = original["ImageID"]
    expected = pc.binary_join_element_wise(original["ImageDir"], images, "/", null_handling="skip").to_pylist()
    paths, path_notes = locate(root, images.to_pylist(), expected, "<ImageDir>/<ImageID>")
    patients = original["PatientID"].to_pylist()
    reserved = {
        "id": images,
        "path": pa.array(paths, pa.string()),
        "group": original["PatientID"],
        "study": original["StudyID"] if "StudyID" in original.column_names else pa.nulls(len(images), pa.string()),
        "split": pa.array(
            split_by_group([patient or f"id:{image}" for patient, image in zip(patients, images.to_pylist())]),
            pa.string(),
        ),
    }
    return Source(
        table=build_table(original, reserved, derived),
        root=root,
        adapter="padchest",
        default_task="padchest-17-a",
        tasks=("padchest-17-a", "padchest-7-a"),
        label_columns=tuple(derived),
        split_origin="seeded by patient, 70/10/20, seed 0",
        groups_known=True,
        notes=(_LICENCE, _OVERLAP, *notes, *skipped, *label_notes, *_views(original), *path_notes),
    )


def parse_labels(text: str) -> list[str] | None:
    """The findings of a text such as `['Normal', "stent' ", 'normal']`: lower case, trimmed, each once; None if it
    is no list."""
    body = text.strip()
    if not (body.startswith("[") and body.endswith("]")):
        return None
    items = (item.replace("\\'", "'").strip(" \t\r\n'\"").lower() for item in _BETWEEN.split(body[1:-1]))
    return list(dict.fromkeys(item for item in items if item not in _NOTHING))


def _without_skipped(root: Path, original: pa.Table, skip: str | None) -> tuple[pa.Table, list[str]]:
    if skip is None and not (root / "skip.txt").is_file():
        return original, []
    candidates = [Path(skip), root / skip] if skip is not None else [root / "skip.txt"]
    file = next((path for path in candidates if path.is_file()), None)
    if file is None:
        raise ManifestError(
            f"--option skip: {skip} is no file, neither here nor in {root}; it lists one ImageID a line"
        )
    named = pa.array(file.read_text("utf-8-sig", "replace").split(), pa.string())
    keep = pc.invert(pc.is_in(original["ImageID"], value_set=named))
    kept = original.filter(keep)
    return kept, [f"{original.num_rows - kept.num_rows} images named in {file.name} are left out"]


def _expand(labels: pa.ChunkedArray) -> tuple[dict[str, pa.Array], list[str]]:
    """One column for each finding that occurs, in alphabetical order; rows without a readable list are blank."""
    encoded = labels.combine_chunks().dictionary_encode()
    parsed = [parse_labels(text) for text in encoded.dictionary.to_pylist()]
    # An empty list names no finding, not even "normal": nothing is known of the image.
    known = [set(items) if items else None for items in parsed]
    names = sorted(set().union(*(items for items in known if items)))
    if len(names) > MAX_FINDINGS:
        raise ManifestError(
            f"the column Labels names {len(names)} different findings; PadChest has 174 and some diagnoses: is it the "
            "release's table?"
        )
    columns = {}
    for name in names:
        flags = [None if items is None else "1" if name in items else "0" for items in known]
        columns[name] = pa.array(flags, pa.string()).take(encoded.indices)
    counts = pc.value_counts(encoded.indices).to_pylist()
    odd = {"no": 0, "empty": 0}
    for entry in counts:
        if entry["values"] is not None and not known[entry["values"]]:
            odd["no" if parsed[entry["values"]] is None else "empty"] += entry["counts"]
    texts = [
        (labels.null_count, "rows have no label text; their findings are blank"),
        (odd["empty"], "rows have an empty list of labels; their findings are blank"),
        (odd["no"], "rows have a label text that is no list; their findings are blank"),
    ]
    return columns, [f"{count} {text}" for count, text in texts if count]


def _views(original: pa.Table) -> list[str]:
    total = original.num_rows
    projection = original["Projection"]
    lateral = pc.sum(pc.equal(projection, LATERAL)).as_py() or 0
    notes = [f"{lateral} of {total} images are lateral (Projection L)"] if lateral else []
    if "ViewPosition_DICOM" in original.column_names:
        differ = pc.sum(pc.not_equal(projection, original["ViewPosition_DICOM"])).as_py() or 0
        notes += (
            [f"{differ} images have another ViewPosition_DICOM than Projection; Projection counts"] if differ else []
        )
    if "MethodLabel" in original.column_names:
        counts = pc.value_counts(original["MethodLabel"]).to_pylist()
        said = sorted(f"{entry['values']} {entry['counts']}" for entry in counts)
        notes.append(f"labelled by (MethodLabel): {', '.join(said)}")
    return notes
