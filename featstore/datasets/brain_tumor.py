"""Brain Tumor (Cheng, figshare 1512427): 3,064 contrast-enhanced T1 slices of 233 patients with a tumour mask.

Layout: 1.mat ... 3064.mat (MATLAB 7.3, in any sub-folders) and cvind.mat with the official five folds. A file holds
cjdata/{label, PID, image, tumorBorder, tumorMask}: label 1 meningioma, 2 glioma, 3 pituitary tumour, stored as a float
array; PID as character codes; arrays lie transposed, in MATLAB's order, and are turned back. Sizes differ.

A patient's slices stay together: groups are the PIDs. The default split is fold 1 test, fold 2 validation of cvind.mat
(its folds separate patients), or seeded 70/10/20 by patient without it or where it is a MATLAB 5 file; column `fold`
keeps the folds, and `split_c` is patient-level with 50 validation and 70 test patients by systematic sampling over
sorted PIDs, as Baharoon et al. 2023 describe (approximate: their list is not public). Columns: `label` (1, 2, 3),
`tumour` (its name), `fold`.
Tasks: brain-tumor-3, brain-tumor-3-c. Licence: CC BY 4.0; cite Cheng et al. 2015.
Every file is opened to read its label and patient (a few kilobytes of each).
"""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa

from featstore.datasets.progress import told
from featstore.datasets.source import Source, build_table
from featstore.datasets.splits import split_by_group, systematic_split
from featstore.datasets.walk import by_stem, find_files, stem
from featstore.errors import ManifestError

NAMES = {"1": "meningioma", "2": "glioma", "3": "pituitary"}


def read(root: Path) -> Source:
    """One row a file, in the order of their numbers.

    Raises:
        ManifestError: no such files, two of one number, one without `cjdata`, a label other than 1, 2, 3, or folds of
            another number.
    """
    files = (path for path in find_files(root, (".mat",)) if re.search(r"(?:^|/)[0-9]+\.mat$", path))
    named = by_stem(files, prefer=(r"/brainTumorDataPublic",), key=lambda path: str(int(stem(path))))
    numbered = {int(name): path for name, path in named.items()}
    if not numbered:
        raise ManifestError(f"{root} has no 1.mat, 2.mat, ...: unpack the four archives of figshare 1512427 there")
    numbers = sorted(numbered)
    paths = [numbered[number] for number in numbers]
    with ThreadPoolExecutor(4) as pool:
        facts = list(told(pool.map(lambda path: _facts(root / path), paths), "files", len(paths)))
    labels, patients = [label for label, _ in facts], [patient for _, patient in facts]
    folds, fold_notes = _folds(root, numbers)
    if folds is None:
        split, origin = split_by_group(patients), "seeded by patient, 70/10/20, seed 0"
    else:
        split = [{"1": "test", "2": "val"}.get(fold, "train") for fold in folds]
        origin = "folds of cvind.mat: 1 test, 2 validation, 3 to 5 training"
        crossing = len({(patient, part) for patient, part in zip(patients, split)}) - len(set(patients))
        if crossing:
            split, origin = split_by_group(patients), "seeded by patient, 70/10/20, seed 0 (folds share patients)"
    part = systematic_split(sorted(set(patients)), test=70 / 233, val=50 / 163)
    original = pa.table(
        {
            "label": pa.array(labels),
            "tumour": pa.array([NAMES[label] for label in labels]),
            "fold": pa.array(folds, pa.string()) if folds else pa.nulls(len(paths), pa.string()),
            "split_c": pa.array([part[patient] for patient in patients]),
        }
    )
    reserved = {
        "id": pa.array([str(number) for number in numbers]),
        "path": pa.array(paths),
        "part": pa.array(["key=cjdata/image"] * len(paths)),
        "group": pa.array(patients),
        "split": pa.array(split),
        "mask_path": pa.array(paths),
        "mask_part": pa.array(["key=cjdata/tumorMask"] * len(paths)),
    }
    return Source(
        table=build_table(original, reserved),
        root=root,
        adapter="brain-tumor",
        default_task="brain-tumor-3",
        tasks=("brain-tumor-3", "brain-tumor-3-c"),
        label_columns=("tumour", "label"),
        split_origin=origin,
        groups_known=True,
        notes=("Brain Tumor: CC BY 4.0, figshare 1512427, cite Cheng et al. 2015", *fold_notes),
        mask_classes=("background", "tumour"),
    )


def _open(path: Path) -> Any:
    try:
        import h5py
    except ImportError as error:
        raise ManifestError("MATLAB 7.3 files need h5py: pip install 'featstore[medical]'") from error
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise ManifestError(f"{path} is no MATLAB 7.3 file; download it again") from error


def _facts(path: Path) -> tuple[str, str]:
    """(label, patient id) of one file."""
    with _open(path) as file:
        try:
            label, codes = float(file["cjdata/label"][()].item()), file["cjdata/PID"][()]
        except (KeyError, AttributeError, ValueError, OSError):
            raise ManifestError(f"{path} has no cjdata/label and cjdata/PID; it is no file of this data set") from None
    if label not in (1.0, 2.0, 3.0):
        raise ManifestError(f"{path}: the label must be 1, 2 or 3, got {label}")
    return str(int(label)), "".join(chr(int(code)) for code in codes.ravel())


def _folds(root: Path, numbers: list[int]) -> tuple[list[str] | None, list[str]]:
    """(fold of every file by its number, notes) from cvind.mat; None where there is none that can be read."""
    found = [path for path in find_files(root, ("cvind.mat",)) if path.rsplit("/", 1)[-1].lower() == "cvind.mat"]
    if not found:
        return None, []
    with (root / found[0]).open("rb") as file:
        old = file.read(10) == b"MATLAB 5.0"
    if old:
        return None, [f"{found[0]} is a MATLAB 5 file, so its folds are not read; save it again with -v7.3 to use them"]
    with _open(root / found[0]) as file:
        values = [str(int(value)) for value in file["cvind"][()].ravel()] if "cvind" in file else []
    if len(values) < max(numbers):
        raise ManifestError(
            f"{root / found[0]} must hold cvind with a fold for each of {max(numbers)} files, got {len(values)}"
        )
    return [values[number - 1] for number in numbers], []
