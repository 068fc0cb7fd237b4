"""Heart: CAMUS (ultrasound) and ACDC (cine MRI) with the left and right ventricle and the myocardium."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from featstore.datasets.slices import Volume, find_home, join, nifti_slices, read_cfg, stem, systematic, walk
from featstore.datasets.source import Source
from featstore.datasets.splits import split_by_group
from featstore.errors import ManifestError

if TYPE_CHECKING:
    import pyarrow as pa

_CAMUS = "CAMUS lies in database_nifti/patient0001/patient0001_2CH_ED.nii.gz, with _gt files, Info_2CH.cfg"
_ACDC = "ACDC lies in database/{training,testing}/patient001/ with Info.cfg, patient001_frame01(_gt).nii.gz"
_VIEW = re.compile(r"(?P<patient>patient[0-9]+)_(?P<view>2CH|4CH)_(?P<phase>ED|ES)")
_FRAME = re.compile(r"(?P<patient>patient[0-9]+)_frame(?P<frame>[0-9]+)")
_LISTS = (("subgroup_training.txt", "train"), ("subgroup_validation.txt", "val"), ("subgroup_testing.txt", "test"))
_EF = ("EF", "LVef")


def read_camus(root: Path) -> Source:
    """CAMUS: echocardiograms of 500 patients, two- and four-chamber views at end diastole and end systole.

    Layout: `database_nifti/patient0001/patient0001_{2CH,4CH}_{ED,ES}.nii.gz` and `..._gt.nii.gz`, `Info_2CH.cfg`,
    `Info_4CH.cfg`; `database_split/subgroup_{training,validation,testing}.txt` with one patient a line. The older
    release has `.mhd`/`.raw` files; ROOT is the folder with `database_nifti`, that folder, or any folder of
    `patient0001` ones.

    Rows: one image each, four a patient (sequences are not read). The mask is the `_gt` file: 1 left ventricle, 2
    myocardium, 3 left atrium. `volume` is the image (`patient0001_2CH_ED`), `z` 0, study the view of a patient
    (`patient0001_2CH`). Groups: the patient. Columns: `view`, `phase`, `ef` (the ejection fraction in percent that the
    .cfg calls EF, or LVef) and the keys of the view's .cfg as they stand, such as ImageQuality (Good, Medium, Poor),
    Sex, Age.

    Split: the subgroup lists (400/50/50 patients) where they are there; without any, patients are split 70/10/20,
    seed 0; some without the others are an error.
    Tasks: `camus-ef` (regression by patient), `camus-quality` (ordinal by view).

    Access: see the terms of the release. Source: Leclerc et al. 2019.

    Raises:
        ManifestError: no such images, only some of the lists, or a patient stands in two of them.
    """
    home = find_home(root, ("database_nifti", "database", "training"), ("patient*",), _CAMUS)
    paths, hidden = walk(root, home, (".nii.gz", ".nii", ".mhd"))
    by_stem = {join(path.rpartition("/")[0], stem(path.rpartition("/")[2])): path for path in paths}
    listed, notes = _subgroups(root, home)
    if hidden:
        notes.append(f"{hidden} AppleDouble files (._*) are passed over")
    found = [(path, _VIEW.fullmatch(stem(path.rpartition("/")[2]))) for path in by_stem.values()]
    images = [(path, match) for path, match in found if match is not None]
    if not images:
        raise ManifestError(f"{root} has no image called patientNNNN_2CH_ED or like it: {_CAMUS}")
    patients = [match["patient"] for _, match in images]
    splits = [listed.get(patient, "") for patient in patients] if listed else split_by_group(patients)
    volumes = [
        Volume(
            name=match[0],
            path=path,
            group=match["patient"],
            study=f"{match['patient']}_{match['view']}",
            split=split,
            mask_path=by_stem.get(join(path.rpartition("/")[0], f"{match[0]}_gt")),
        )
        for (path, match), split in zip(images, splits)
    ]
    infos = [_info(root, path, match["view"]) for path, match in images]
    derived: dict[str, Sequence[str | None]] = {
        "view": [match["view"] for _, match in images],
        "phase": [match["phase"] for _, match in images],
        "ef": [next((info[key] for key in _EF if info.get(key)), None) for info in infos],
    }
    if listed and (outside := len({patient for patient in patients if patient not in listed})):
        notes.append(f"{outside} patients stand in no subgroup list; their split is empty")
    table, more = nifti_slices(root, volumes, derived, _table(infos))
    tasks, labels = _tasks(table, {"ef": "camus-ef", "ImageQuality": "camus-quality"})
    return Source(
        table=table,
        root=root,
        adapter="camus",
        default_task=tasks[0] if tasks else None,
        tasks=tasks,
        label_columns=labels,
        split_origin="official" if listed else "seeded by patient, 70/10/20, seed 0",
        groups_known=True,
        notes=("CAMUS: see the terms of the release; cite Leclerc et al. 2019", *notes, *more),
        mask_classes=("background", "left ventricle", "myocardium", "left atrium"),
    )


def _subgroups(root: Path, home: str) -> tuple[dict[str, str], list[str]]:
    """Patient -> split of the official lists; {} where there are none.

    Raises:
        ManifestError: only some of the lists are there, or a patient stands in two.
    """
    listed: dict[str, str] = {}
    places = [root / "database_split", root / home / "database_split", root]
    if root.resolve().name.startswith("database"):  # the lists lie beside the images
        places.append(root.resolve().parent / "database_split")
    found = {name: next((place / name for place in places if (place / name).is_file()), None) for name, _ in _LISTS}
    if lacking := [name for name, path in found.items() if path is None]:
        if len(lacking) < len(_LISTS):
            raise ManifestError(
                f"{root} lacks {', '.join(lacking)}: the official split needs all three subgroup lists; add the rest, "
                "or move all away for a split by seed"
            )
        return {}, ["no subgroup list is there; patients are split by seed"]
    for name, split in _LISTS:
        path = found[name] or root
        for patient in path.read_text("utf-8-sig").split():
            if listed.setdefault(patient, split) != split:
                raise ManifestError(f"{path}: a patient stands in two subgroup lists; download the lists again")
    return listed, [] if listed else ["the subgroup lists are empty; patients are split by seed"]


def _info(root: Path, path: str, view: str) -> dict[str, str]:
    return read_cfg(root / path.rpartition("/")[0] / f"Info_{view}.cfg")


def _table(infos: Sequence[Mapping[str, str]]) -> "pa.Table":
    """One row each; keys of .cfg files in the order of the first that has them."""
    import pyarrow as pa

    names = list(dict.fromkeys(key for info in infos for key in info))
    return pa.table({name: pa.array([info.get(name) or None for info in infos], pa.string()) for name in names})


def _tasks(table: "pa.Table", known: Mapping[str, str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(tasks, label columns) of the columns that are there and not blank throughout."""
    labels = tuple(name for name in known if name in table.column_names and table[name].null_count < table.num_rows)
    return tuple(known[name] for name in labels), labels


def read_acdc(root: Path) -> Source:
    """ACDC: short-axis cine MRI of 150 patients in five groups of heart disease, end diastole and end systole.

    Layout: `database/{training,testing}/patient001/{Info.cfg, patient001_4d.nii.gz, patient001_frame01.nii.gz,
    patient001_frame01_gt.nii.gz}`; ROOT is `database` or the folder around it.

    Rows: every axial slice of the two labelled frames of a patient, in the order of the file's z axis turned to
    anatomical orientation; the 4-D file is not read. The mask is the `_gt` file: 1 right ventricle, 2 myocardium, 3
    left ventricle. `volume` is the frame (`patient001_frame01`), `z` the slice. Groups: the patient. Columns: `phase`
    (ED or ES, by the frame numbers of Info.cfg) and the keys of Info.cfg as they stand: ED, ES, Group, Height,
    NbFrame, Weight.

    Split: training is "train" (100 patients) and testing "test" (50), as released; probes select on a tenth of the
    training patients. Column `split_b` (80/20/50) makes every fifth training patient "val"; the division of the DINOv3
    study that reports such counts is not published.
    Task: `acdc-group`, Group (NOR, MINF, DCM, HCM, RV) by patient.

    Access: see the terms of the release. Source: Bernard et al. 2018.

    Raises:
        ManifestError: neither training nor testing, or no frames in them.
    """
    home = find_home(root, ("database", "ACDC"), ("training", "testing"), _ACDC)
    volumes: list[Volume] = []
    infos: list[dict[str, str]] = []
    phases: list[str | None] = []
    hidden = 0
    for folder, split in (("training", "train"), ("testing", "test")):
        if not (root / home / folder).is_dir():
            continue
        paths, more = walk(root, join(home, folder))
        hidden += more
        by_stem = {join(path.rpartition("/")[0], stem(path.rpartition("/")[2])): path for path in paths}
        for at, path in by_stem.items():
            match = _FRAME.fullmatch(at.rpartition("/")[2])
            if match is not None:
                infos.append(read_cfg(root / at.rpartition("/")[0] / "Info.cfg"))
                phases.append(_phase(infos[-1], int(match["frame"])))
                mask = by_stem.get(f"{at}_gt")
                volumes.append(Volume(name=match[0], path=path, group=match["patient"], split=split, mask_path=mask))
    if not volumes:
        raise ManifestError(f"{root} has no file called patientNNN_frameNN.nii.gz: {_ACDC}")
    training = sorted({str(volume.group) for volume in volumes if volume.split == "train"})
    inner = systematic(training, test=len(training) + 1, val=5)
    derived: dict[str, Sequence[str | None]] = {
        "phase": phases,
        "split_b": ["test" if volume.split == "test" else inner[str(volume.group)] for volume in volumes],
    }
    notes = [f"{hidden} AppleDouble files (._*) are passed over"] if hidden else []
    if unknown := phases.count(None):
        notes.append(f"{unknown} frames are neither ED nor ES by their Info.cfg, or it is not there")
    table, more_notes = nifti_slices(root, volumes, derived, _table(infos))
    tasks, labels = _tasks(table, {"Group": "acdc-group"})
    return Source(
        table=table,
        root=root,
        adapter="acdc",
        default_task=tasks[0] if tasks else None,
        tasks=tasks,
        label_columns=labels,
        split_origin="official",
        groups_known=True,
        notes=("ACDC: see the terms of the release; cite Bernard et al. 2018", *notes, *more_notes),
        mask_classes=("background", "right ventricle", "myocardium", "left ventricle"),
    )


def _phase(info: Mapping[str, str], frame: int) -> str | None:
    for name in ("ED", "ES"):
        if info.get(name, "").isdigit() and int(info[name]) == frame:
            return name
    return None
