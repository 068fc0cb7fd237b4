"""NIH ChestX-ray14: `Data_Entry_2017*.csv`, the official lists, and images in any sub-folder.

Layout: Data_Entry_2017_v2020.csv (or Data_Entry_2017.csv), train_val_list.txt, test_list.txt, BBox_List_2017.csv (each
may end in .gz) and the PNGs in images/, images_001/images/ ... Some PNGs are RGBA; they are read as gray.

Labels are findings joined by a bar, one column each, and "No Finding", a value of its own; "Effusion" is what others
call Pleural Effusion. Group is the patient; the official lists separate patients: train (86,524) and test (25,596).
Columns made here: `age_years` (the first release writes 040Y), `sex` (M, F), `boxes` (984 boxes as JSON, corners in
pixels of 1024; "Infiltrate" there is Infiltration) and `split_c`: the split of Baharoon et al. 2023, whose validation
images are the last 10,002 of train_val_list.txt (of a part of the list, the same share in whole patients); it separates
patients too.

RSNA Pneumonia holds images of this data set. Pre-training overlap: several radiograph models, such as RAD-DINO and
those of TorchXRayVision, were trained on it (exact lists unverified).
Source: Wang et al. 2017 and the release's own files, old and 2020 spelling of the header.
"""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from featstore.datasets.boxes import collect_boxes
from featstore.datasets.locate import find_table, locate
from featstore.datasets.source import Source, build_table, read_csv
from featstore.errors import ManifestError

FINDINGS = (
    "Atelectasis",
    "Cardiomegaly",
    "Effusion",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pneumonia",
    "Pneumothorax",
    "Consolidation",
    "Edema",
    "Emphysema",
    "Fibrosis",
    "Pleural_Thickening",
    "Hernia",
)
LABELS = (*FINDINGS, "No Finding")
TASKS = ("nih-14", "nih-15", "nih-14-a", "nih-14-c", "nih-15-c", "nih-7-a", "nih-age", "nih-sex")
# Images at the end of the official list that validate, and how many the list has (Baharoon et al. 2023, their code).
VAL_C, LISTED = 10_002, 86_524
MAX_AGE = 120  # some entries of the first release say over 400
_IMAGES = r"images(_[0-9]+)?/(images/)?[^/]+"
_LAYOUT = (
    "a ChestX-ray14 folder holds Data_Entry_2017_v2020.csv (or Data_Entry_2017.csv), train_val_list.txt, test_list.txt "
    "and images/ or images_001/ ... (text files may end in .gz)"
)
_LICENCE = (
    "ChestX-ray14: use unrestricted; link the NIH download site, acknowledge the NIH Clinical Center, "
    "cite Wang et al. 2017; pre-training overlap: several radiograph models (RAD-DINO, TorchXRayVision) saw it; exact "
    "lists unverified"
)


def read(root: Path) -> Source:
    """The rows of a ChestX-ray14 folder: columns verbatim, then one "0"/"1" column for each of `LABELS`.

    An image's path is where the folder has it (of several that in images/ or images_NNN/), else `images/<name>`. With
    one official list the other images form the other split; with none every split is empty. Official train and
    validation images are one split, "train".

    Raises:
        ManifestError: a file or column is missing, a finding is unknown, or an image has two rows or stands in both
            lists.
    """
    entry_path, notes = _find_entries(root)
    original = read_csv(entry_path)
    images = _column(original, entry_path, "Image Index")
    findings = _column(original, entry_path, "Finding Labels")
    patients = _column(original, entry_path, "Patient ID")
    derived = _expand(findings, entry_path)
    splits, split_notes = _official_splits(root, images)
    names = images.to_pylist()
    repeated = len(names) - len(set(names))
    if repeated:
        raise ManifestError(f"{entry_path}: {repeated} rows repeat an image of another row; every image has one row")
    paths, path_notes = locate(root, names, [f"images/{name}" for name in names], "images/<name>", prefer=_IMAGES)
    about, about_notes = _about(original)
    boxes, box_notes = _boxes(root, names)
    derived |= about | boxes | _split_c(root, names, patients.to_pylist(), splits)
    reserved = {"id": images, "path": pa.array(paths, pa.string()), "group": patients}
    if splits is not None:
        reserved["split"] = splits
    if findings.null_count:
        notes.append(f"{findings.null_count} rows have no finding text; their labels are blank")
    return Source(
        table=build_table(original, reserved, derived),
        root=root,
        adapter="nih",
        default_task="nih-14",
        tasks=TASKS,
        label_columns=LABELS,
        split_origin="none" if splits is None else "official",
        groups_known=True,
        notes=(_LICENCE, *notes, *split_notes, *about_notes, *box_notes, *path_notes),
    )


def _find_entries(root: Path) -> tuple[Path, list[str]]:
    # The 2020 version corrects the first one and sorts after it.
    path, notes = find_table(root, "Data_Entry_2017*")
    if path is None:
        raise ManifestError(f"{root} has no Data_Entry_2017*.csv: {_LAYOUT}")
    return path, notes


def _column(table: pa.Table, path: Path, name: str) -> pa.ChunkedArray:
    for spelling in (name, name.replace(" ", "_")):
        if spelling in table.column_names:
            return table[spelling]
    raise ManifestError(f"{path} lacks the column {name!r}; it names {table.column_names}")


def _expand(findings: pa.ChunkedArray, path: Path) -> dict[str, pa.Array]:
    """One column of "0"/"1" for each label; a blank text stays null in all of them."""
    encoded = findings.combine_chunks().dictionary_encode()
    # 112,120 rows hold under a thousand different texts.
    combinations = [text.split("|") for text in encoded.dictionary.to_pylist()]
    unknown = sorted({name for names in combinations for name in names} - set(LABELS))
    if unknown:
        raise ManifestError(f"{path} has the unknown findings {unknown}; known: {', '.join(LABELS)}")
    columns = {}
    for label in LABELS:
        flags = pa.array(["1" if label in names else "0" for names in combinations], pa.string())
        columns[label] = flags.take(encoded.indices)
    return columns


def _official_splits(root: Path, images: pa.ChunkedArray) -> tuple[pa.ChunkedArray | None, list[str]]:
    train_val, test = _read_list(root, "train_val_list.txt"), _read_list(root, "test_list.txt")
    if train_val is None and test is None:
        return None, ["no official list is beside the labels; splits are empty"]
    in_train = pc.is_in(images, value_set=train_val) if train_val is not None else None
    in_test = pc.is_in(images, value_set=test) if test is not None else pc.invert(in_train)
    in_train = in_train if in_train is not None else pc.invert(in_test)
    both = pc.sum(pc.and_(in_train, in_test)).as_py() or 0
    if both:
        raise ManifestError(
            f"{both} images stand in train_val_list.txt and in test_list.txt; download both lists again"
        )
    splits = pc.if_else(in_train, "train", pc.if_else(in_test, "test", ""))
    notes = []
    if train_val is None or test is None:
        notes.append("one official list is absent; the images outside the other list are taken for it")
    for name, listed in (("train_val_list.txt", train_val), ("test_list.txt", test)):
        if listed is not None:
            strangers = len(listed) - (pc.sum(pc.is_in(listed, value_set=images)).as_py() or 0)
            notes += [f"{strangers} names of {name} are not in the labels"] if strangers else []
    outside = pc.sum(pc.equal(splits, "")).as_py() or 0
    notes += [f"{outside} images stand in neither list"] if outside else []
    return splits, notes


def _read_list(root: Path, name: str) -> pa.Array | None:
    for candidate in (root / name, root / f"{name}.gz"):
        if candidate.is_file():
            try:
                with pa.input_stream(str(candidate), compression="detect") as stream:
                    return pa.array(stream.read().decode("utf-8-sig").split(), pa.string())
            except (OSError, UnicodeDecodeError) as error:
                raise ManifestError(f"{candidate} is damaged ({error}); download it again") from None
    return None


def _about(original: pa.Table) -> tuple[dict[str, pa.Array | pa.ChunkedArray], list[str]]:
    """Age in years, a number, and sex, where the table has them; an age above `MAX_AGE` is blank."""
    derived: dict[str, pa.Array | pa.ChunkedArray] = {}
    notes = []
    names = {name.replace("_", " "): name for name in original.column_names}
    if "Patient Age" in names:
        # 57, 057Y, 003M, 012D; other text has no age.
        parts = pc.extract_regex(original[names["Patient Age"]], r"^\s*(?P<number>[0-9]+)\s*(?P<unit>[YMDymd]?)\s*$")
        number = pc.cast(pc.struct_field(parts, "number"), pa.float64())
        unit = pc.utf8_upper(pc.struct_field(parts, "unit"))
        ages = pc.if_else(pc.equal(unit, "M"), pc.divide(number, 12.0), number)
        ages = pc.if_else(pc.equal(unit, "D"), pc.divide(number, 365.25), ages)
        possible = pc.less_equal(ages, MAX_AGE)
        derived["age_years"] = pc.if_else(possible, ages, None)
        counts = [
            (pc.sum(pc.invert(possible)).as_py() or 0, f"ages are above {MAX_AGE} years; age_years is blank"),
            (ages.null_count, "rows have no age that can be read; age_years is blank"),
        ]
        notes = [f"{count} {text}" for count, text in counts if count]
    if "Patient Gender" in names:
        derived["sex"] = original[names["Patient Gender"]]
    return derived, notes


def _boxes(root: Path, images: list[str]) -> tuple[dict[str, pa.Array], list[str]]:
    path, _ = find_table(root, "BBox_List_2017*")
    if path is None:
        return {}, []
    table = read_csv(path)
    # The header has commas inside "Bbox [x,y,w,h]", so it names four columns.
    x, y, width, height = (_column(table, path, name) for name in ("Bbox [x", "y", "w", "h]"))
    labels = _column(table, path, "Finding Label")
    boxes = collect_boxes(
        _column(table, path, "Image Index"),
        (x, y, width, height),
        path,
        sizes=True,
        labels=labels,
        names={"Infiltrate": "Infiltration"},
    )
    strangers = len(set(boxes) - set(images))
    notes = [f"{strangers} images with boxes are not in the labels"] if strangers else []
    return {"boxes": pa.array([boxes.get(image) for image in images], pa.string())}, notes


def _split_c(root: Path, images: list[str], patients: list[str], splits: pa.ChunkedArray | None) -> dict[str, pa.Array]:
    """The official split with the end of the training list, in its order, as validation."""
    if splits is None:
        return {}
    parts = dict(zip(images, splits.to_pylist()))
    listed = _read_list(root, "train_val_list.txt")
    # Without that list its images stand in the order of the table, which is the list's.
    order = [name for name in (images if listed is None else listed.to_pylist()) if parts.get(name) == "train"]
    count = VAL_C if len(order) == LISTED else round(len(order) * VAL_C / LISTED)
    start = len(order) - count
    if len(order) != LISTED:  # the whole list happens to be cut between two patients
        owner = dict(zip(images, patients))
        while 0 < start < len(order) and owner[order[start]] == owner[order[start - 1]]:
            start += 1
    val = set(order[start:])
    return {"split_c": pa.array(["val" if name in val else part for name, part in parts.items()], pa.string())}
