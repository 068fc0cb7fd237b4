"""NIH ChestX-ray14: `Data_Entry_2017*.csv`, the official lists, and images in any sub-folder.

Labels are findings joined by a bar; the official lists separate patients. Source: Wang et al. 2017 and the release's
own files, old and 2020 spelling of the header.
"""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

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
_LAYOUT = (
    "a ChestX-ray14 folder holds Data_Entry_2017_v2020.csv (or Data_Entry_2017.csv), train_val_list.txt, test_list.txt "
    "and images/ or images_001/ ... (text files may end in .gz)"
)
_LICENCE = (
    "ChestX-ray14: use unrestricted; link the NIH download site, acknowledge the NIH Clinical Center, "
    "cite Wang et al. 2017"
)


def read(root: Path) -> Source:
    """The rows of a ChestX-ray14 folder: columns verbatim, then one "0"/"1" column for each of `LABELS`.

    An image's path is where the folder has it, else `images/<name>`. With one official list the other images form
    the other split; with none every split is empty. Official train and validation images are one split, "train".

    Raises:
        ManifestError: a file or column is missing, a finding is unknown, or an image stands in both lists.
    """
    entry_path, notes = _find_entries(root)
    original = read_csv(entry_path)
    images = _column(original, entry_path, "Image Index")
    findings = _column(original, entry_path, "Finding Labels")
    patients = _column(original, entry_path, "Patient ID")
    derived = _expand(findings, entry_path)
    splits, split_notes = _official_splits(root, images)
    paths, path_notes = _locate(root, images)
    reserved = {"id": images, "path": paths, "group": patients}
    if splits is not None:
        reserved["split"] = splits
    if findings.null_count:
        notes.append(f"{findings.null_count} rows have no finding text; their labels are blank")
    return Source(
        table=build_table(original, reserved, derived),
        root=root,
        adapter="nih",
        default_task="nih-14",
        tasks=("nih-14", "nih-15"),
        label_columns=LABELS,
        split_origin="none" if splits is None else "official",
        groups_known=True,
        notes=(_LICENCE, *notes, *split_notes, *path_notes),
    )


def _find_entries(root: Path) -> tuple[Path, list[str]]:
    names = sorted(path.name for path in root.glob("Data_Entry_2017*") if path.name.endswith((".csv", ".csv.gz")))
    if not names:
        raise ManifestError(f"{root} has no Data_Entry_2017*.csv: {_LAYOUT}")
    # The 2020 version corrects the first one and sorts after it; of one version the plain file is taken.
    chosen = max(names, key=lambda name: (name.removesuffix(".gz"), not name.endswith(".gz")))
    others = [name for name in names if name != chosen]
    return root / chosen, [f"{chosen} is read, {', '.join(others)} is not"] if others else []


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


def _locate(root: Path, images: pa.ChunkedArray) -> tuple[pa.Array, list[str]]:
    """Paths below `root`, found by one walk of its folders; the first of equal names in path order counts."""
    wanted = set(images.to_pylist())
    found: dict[str, str] = {}
    repeated = 0
    folders, seen = [""], set()
    while folders:
        folder = folders.pop()
        status = os.stat(root / folder)
        if (status.st_dev, status.st_ino) in seen:  # a symlink to a folder that was walked already
            continue
        seen.add((status.st_dev, status.st_ino))
        inner = []
        with os.scandir(root / folder) as entries:
            for entry in entries:
                relative = f"{folder}/{entry.name}" if folder else entry.name
                if entry.name in wanted:
                    repeated += entry.name in found
                    found[entry.name] = min(relative, found.get(entry.name, relative))
                elif entry.is_dir():
                    inner.append(relative)
        folders += sorted(inner, reverse=True)
    absent = len(wanted) - len(found)
    notes = [f"{absent} images are not below the folder; their path is images/<name>"] if absent else []
    notes += [f"{repeated} images lie in more than one folder; the first path is taken"] if repeated else []
    return pa.array([found.get(name, f"images/{name}") for name in images.to_pylist()], pa.string()), notes
