"""PET/CT: AutoPET (FDG-PET-CT-Lesions) and HECKTOR 2022; one row an axial slice."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from featstore.datasets.slices import (
    Volume,
    check_fold,
    find_home,
    fold_split,
    natural,
    nifti_slices,
    stem,
    walk,
)
from featstore.datasets.source import Source, read_csv
from featstore.datasets.splits import split_by_group
from featstore.errors import ManifestError

_AUTOPET = "AutoPET lies in FDG-PET-CT-Lesions/PETCT_<id>/<study>/ with CT, CTres, PET, SUV and SEG.nii.gz"
_HECKTOR = "HECKTOR 2022 lies in hecktor2022_training/imagesTr (CHUM-001__CT.nii.gz, CHUM-001__PT.nii.gz) and labelsTr"
_FDG = ("CT", "CTres", "PET", "SUV", "SEG")
_STEM = re.compile(r"(?P<centre>[A-Za-z]+)[-_](?P<number>[0-9]+)")


def read_autopet(
    root: Path, *, image: Literal["SUV", "CTres", "CT", "PET"] = "SUV", fold: int = 0, every: int = 1
) -> Source:
    """AutoPET-II, the TCIA collection FDG-PET-CT-Lesions: whole-body FDG-PET/CT, masks of lesions, one row a slice.

    Layout: `FDG-PET-CT-Lesions/PETCT_<id>/<study>/{CT,CTres,PET,SUV,SEG}.nii.gz` as the collection's tcia2nifti writes
    it; ROOT is that folder or the one around it.

    Rows: every axial slice of one file of every study, from foot to head: `--option image=SUV` (default; standardised
    uptake values), `CTres` (the CT resampled to the PET's grid, -1024 outside), `PET` (as measured) or `CT`. The masks
    (SEG, 1 is lesion) lie on the grid of SUV, PET and CTres; the original CT has another and gets none. A study without
    the chosen file is left out and counted. `volume` and study are `PETCT_<id>/<study>`, `z` the slice.
    Where a table beside the folders names `Subject ID` and `diagnosis`, the columns `diagnosis`, `age`, `sex` and
    `lesion` ("0" where the diagnosis is NEGATIVE, else "1") are filled for patients about whom it says one thing.

    Split: the release has none. Column `fold` is 0 to 4: of the sorted patients every fifth from the k-th on is fold
    k, so that the studies of a patient stay together; the fold of `--option fold=0` is "test", the others "train"
    (80/20), and probes select on a tenth of the training patients. Groups: the patient, some of whom have more than
    one study. State how Dice is counted on studies without lesions: it is undefined there. `--option every=5` keeps
    every fifth slice.

    Access: The Cancer Imaging Archive, FDG-PET-CT-Lesions (suffix gkr0-xv29); its terms apply. Source: Gatidis et al.
    2022.

    Raises:
        ManifestError: no study folder, or none with the chosen file.
    """
    check_fold(fold)
    home = find_home(root, ("FDG-PET-CT-Lesions",), ("PETCT_*",), _AUTOPET)
    paths, hidden = walk(root, home)
    studies: dict[str, dict[str, str]] = {}
    for path in paths:
        patient, study, name = ("", "", *path.split("/"))[-3:]
        if patient.startswith("PETCT_") and stem(name) in _FDG:
            studies.setdefault(f"{patient}/{study}", {})[stem(name)] = path
    volumes = []
    for study, found in studies.items():
        if image in found:
            patient = study.partition("/")[0]
            mask = found.get("SEG") if image != "CT" else None
            volumes.append(Volume(name=study, path=found[image], group=patient, study=study, mask_path=mask))
    if not volumes:
        raise ManifestError(f"{root} has {len(studies)} studies, none with {image}.nii.gz: {_AUTOPET}")
    patients = sorted({study.partition("/")[0] for study in studies})
    of = {patient: str(place % 5) for place, patient in enumerate(patients)}
    volumes = [
        Volume(
            name=volume.name, path=volume.path, group=volume.group, study=volume.study, mask_path=volume.mask_path,
            split=fold_split(of[str(volume.group)], fold),
        )
        for volume in volumes
    ]  # fmt: skip
    notes = ["FDG-PET-CT-Lesions: terms of The Cancer Imaging Archive; cite Gatidis et al. 2022"]
    if len(volumes) < len(studies):
        notes.append(f"{len(studies) - len(volumes)} studies have no {image}.nii.gz and are left out")
    if image == "CT":
        notes.append("the original CT is not on the grid of SEG and has no masks; CTres has")
    if hidden:
        notes.append(f"{hidden} AppleDouble files (._*) are passed over")
    facts, more = _facts(root, home, [str(volume.group) for volume in volumes])
    derived: dict[str, Sequence[str | None]] = {"fold": [of[str(volume.group)] for volume in volumes], **facts}
    table, most = nifti_slices(root, volumes, derived, every=every)
    return Source(
        table=table,
        root=root,
        adapter="autopet",
        default_task="autopet-lesion" if facts else None,
        tasks=("autopet-lesion",) if facts else (),
        label_columns=("lesion",) if facts else (),
        split_origin=f"5 folds of the sorted patients; fold {fold} is test",
        groups_known=True,
        notes=(*notes, *more, *most),
        mask_classes=("background", "lesion"),
    )


def _facts(root: Path, home: str, patients: Sequence[str]) -> tuple[dict[str, list[str | None]], list[str]]:
    """Columns of a clinical table, for patients about whom all its rows agree; {} where there is none."""
    for path in sorted({*root.glob("*.csv"), *(root / home).glob("*.csv")}):
        if path.name.startswith("."):
            continue
        table = read_csv(path)
        lower = {name.strip().lower(): name for name in table.column_names}
        if "subject id" not in lower or "diagnosis" not in lower:
            continue
        known = {key: table[lower[key]].to_pylist() for key in ("diagnosis", "age", "sex") if key in lower}
        said: dict[str, dict[str, set[str | None]]] = {}
        for row, subject in enumerate(table[lower["subject id"]].to_pylist()):
            for key, values in known.items():
                said.setdefault(subject or "", {}).setdefault(key, set()).add(values[row])
        facts: dict[str, list[str | None]] = {}
        for key in known:
            one = {subject: next(iter(values[key])) for subject, values in said.items() if len(values[key]) == 1}
            facts[key] = [one.get(patient) for patient in patients]
        facts["lesion"] = [
            None if text is None else "0" if text.strip().upper() == "NEGATIVE" else "1" for text in facts["diagnosis"]
        ]
        blank = len({patient for patient, text in zip(patients, facts["lesion"]) if text is None})
        notes = [f"diagnosis and lesion come from {path.name}, by patient"]
        return facts, notes + ([f"{blank} patients have no diagnosis there, or several"] if blank else [])
    return {}, []


def read_hecktor(root: Path, *, image: Literal["CT", "PT"] = "CT", every: int = 1) -> Source:
    """HECKTOR 2022: head and neck FDG-PET/CT of seven centres, masks of tumour and nodes, one row an axial slice.

    Layout: `hecktor2022_training/imagesTr/{CHUM-001__CT,CHUM-001__PT}.nii.gz` and `labelsTr/CHUM-001.nii.gz`; ROOT is
    that folder or the one around it. A dash or a low line between centre and number (`CHUM_001`) are taken for the
    same.

    Rows: every axial slice of the CT (`--option image=CT`, default) or of the PET (`image=PT`) of every case, from
    foot to head. CT and PET lie on different grids, and the release gives one label volume a case: it is the mask only
    where by the headers it lies on the grid of the chosen image (1 GTVp, the primary tumour; 2 GTVn, nodes); how often
    it does not is a note. `volume` is the file's stem, `case` the patient as CHUM-001, `z` the slice, `centre` the
    prefix.

    Split: the release has none; patients are split 70/10/20, seed 0. Column `split_b` is 80/20 (train and test, drawn
    by patient, seed 0), as the DINOv3 study reports; its own list is not published, so this is near to it, not equal.
    Groups: the patient (one study each); `centre`
    serves a split by centre. PT is said to hold standardised uptake values; check it before a fixed window is used.
    `--option every=5` keeps every fifth slice. Cases without a label volume are kept without mask.

    Access: request form of the HECKTOR challenge. Source: Andrearczyk et al. 2022.

    Raises:
        ManifestError: no images, or a file that is not called CENTRE-NUMBER__CT or __PT.
    """
    home = find_home(root, ("hecktor2022_training", "hecktor2022"), ("imagesTr",), _HECKTOR)
    images, hidden = walk(root, f"{home}/imagesTr".lstrip("/"))
    labels: list[str] = []
    if (root / home / "labelsTr").is_dir():
        labels, more = walk(root, f"{home}/labelsTr".lstrip("/"))
        hidden += more
    masks = {_case(path)[0]: path for path in labels}
    volumes, centres, kinds = [], [], set()
    for path in sorted(images, key=natural):
        case, centre, kind = _case(path)
        kinds.add(kind)
        if kind == image:
            centres.append(centre)
            name = stem(path.rpartition("/")[2])
            volumes.append(Volume(name=name, path=path, group=case, mask_path=masks.get(case)))
    if not volumes:
        raise ManifestError(f"{root} has {len(images)} images, none is called ...__{image}.nii.gz: {_HECKTOR}")
    groups = [str(volume.group) for volume in volumes]
    volumes = [
        Volume(name=volume.name, path=volume.path, group=volume.group, mask_path=volume.mask_path, split=split)
        for volume, split in zip(volumes, split_by_group(groups))
    ]
    notes = ["HECKTOR 2022: by request form; cite Andrearczyk et al. 2022"]
    if bare := sum(volume.mask_path is None for volume in volumes):
        notes.append(f"{bare} cases have no label volume")
    if hidden:
        notes.append(f"{hidden} AppleDouble files (._*) are passed over")
    notes.append("split_b: 80/20 by patient, seed 0; the paper's own list is not published")
    derived = {
        "case": list(groups),
        "centre": list(centres),
        "split_b": list(split_by_group(groups, fractions=(0.8, 0.0, 0.2))),
    }
    table, most = nifti_slices(root, volumes, derived, every=every)
    return Source(
        table=table,
        root=root,
        adapter="hecktor",
        default_task=None,
        tasks=(),
        label_columns=(),
        split_origin="seeded by patient, 70/10/20, seed 0",
        groups_known=True,
        notes=(*notes, *most),
        mask_classes=("background", "GTVp", "GTVn"),
    )


def _case(path: str) -> tuple[str, str, str]:
    """(case as CHUM-001, centre, CT or PT; "" for a label volume)."""
    name, _, kind = stem(path.rpartition("/")[2]).partition("__")
    found = _STEM.fullmatch(name)
    if found is None or kind not in ("CT", "PT", ""):
        raise ManifestError(
            f"{path}: files of HECKTOR are called CENTRE-NUMBER__CT, CENTRE-NUMBER__PT or CENTRE-NUMBER"
        )
    return f"{found['centre']}-{found['number']}", found["centre"], kind
