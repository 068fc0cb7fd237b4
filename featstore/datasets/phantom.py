"""The chest phantom as a data set: synthetic patients, their studies and labels, written in two folder layouts.

`generate` writes PNG images, lung and lesion masks and one table with the truth; `generate_chexpert` writes the same
patients as a CheXpert folder with labels as uncertain and incomplete as a report parser's. Everything follows from a
seed; a patient's images do not depend on how many others there are.
"""

import csv
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from jaxtyping import Bool, UInt8

from featstore import files
from featstore.datasets import chexpert
from featstore.datasets.phantom_render import (
    Anatomy,
    Blob,
    Findings,
    Pose,
    Rendering,
    fits_in_lung,
    render_frontal,
    render_lateral,
)
from featstore.datasets.source import Source, build_table, read_csv
from featstore.datasets.splits import carve
from featstore.errors import ConfigError, ManifestError

LABELS = (
    "No Finding",
    "Cardiomegaly",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Support Devices",
)
MARKER = "generated.json"
_VERSION = 1  # of the pixels and labels that a seed gives
_COLUMNS = (
    "path",
    "patient_id",
    "study_id",
    "view",
    "sex",
    "age",
    *LABELS,
    "heart_ratio",
    "effusion_height",
    "lesion_x",
    "lesion_y",
    "lesion_radius",
    "mask_path",
    "lesion_mask_path",
    "split",
)
Rows = list[dict[str, str]]
_NOTE = "synthetic phantom: rendered, no patient; for tests and demonstrations, its scores say nothing about medicine"


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """One visit: what is to be seen, and one exposure or two."""

    findings: Findings
    frontal: Pose
    lateral: Pose | None

    def present(self) -> frozenset[str]:
        """The names of `LABELS` that hold."""
        shown = self.findings
        truth = {
            "Cardiomegaly": shown.heart_ratio > 0.5,
            "Lung Lesion": shown.lesion is not None,
            "Edema": shown.edema > 0,
            "Consolidation": bool(shown.consolidations),
            "Atelectasis": bool(shown.atelectases),
            "Pneumothorax": shown.pneumothorax is not None,
            "Pleural Effusion": bool(shown.effusions),
        }
        names = {name for name, holds in truth.items() if holds} or {"No Finding"}
        if shown.tube or shown.line or shown.pacemaker:
            names.add("Support Devices")
        return frozenset(names)


@dataclass(frozen=True, kw_only=True, slots=True)
class Patient:
    """A body, its owner's data, and the studies."""

    anatomy: Anatomy
    sex: str
    age: int
    studies: tuple[Study, ...]


def read(root: Path) -> Source:
    """The phantom in `root`, generated with the defaults when the folder is absent, empty or was left unfinished.

    Raises:
        ManifestError: `root` holds other files.
    """
    if not is_complete(root, "table"):
        generate(root)
    original = read_csv(root / "metadata.csv")
    reserved = {
        "id": pc.replace_substring_regex(original["path"], r"^images/(.*)\.png$", r"\1"),
        "path": original["path"],
        "group": original["patient_id"],
        "study": original["study_id"],
        "split": original["split"],
        "mask_path": original["mask_path"],
    }
    return Source(
        table=build_table(original, reserved),
        root=root,
        adapter="phantom",
        default_task=None,
        tasks=(),
        label_columns=LABELS,
        split_origin="seeded by patient, 60/15/25",
        groups_known=True,
        notes=(_NOTE,),
    )


def generate(root: Path, *, num_patients: int = 240, seed: int = 0, size: int = 256) -> None:
    """Write images/pNNNN_sK[_lateral].png, masks/ and metadata.csv; a finished folder of the same request is kept.

    Images are 8-bit, `size` x `size`; masks are 0/255. metadata.csv has one row for each image: labels as 0/1, the
    heart's share of the chest width (an AP view magnifies it by 8 %), the fluid's height in plane units, the lesion's
    column, row and radius in pixels (the top left pixel's centre is 0, 0), and a patient-wise split of 60/15/25 %.

    Raises:
        ConfigError: fewer than 3 patients (no split may be empty) or less than 32 pixels.
        ManifestError: `root` holds other files, or a phantom of another request.
    """
    _check_request(num_patients, size)

    def write(folder: Path) -> None:
        splits = _patient_splits(num_patients, seed)
        work = partial(_write_patient, folder, splits, seed=seed, size=size)
        write_table(folder / "metadata.csv", _COLUMNS, _rows_of(range(num_patients), work))

    request = {"layout": "table", "num_patients": num_patients, "seed": seed, "size": size}
    write_once(root, request, write)


def generate_chexpert(
    root: Path, *, num_patients: int = 60, seed: int = 0, size: int = 256, with_test: bool = False, small: bool = True
) -> Path:
    """Write the phantom below `root` as a CheXpert release and return its folder.

    `num_patients` train patients, a fifth as many (at least 12) for valid.csv and, on request, test.csv, whose paths
    lack the release folder and whose table has labels only. Train labels are 1.0, 0.0, -1.0 and blank, mostly but not
    always in line with the image, the others are true and complete. "Pleural Other" and "Fracture" are not rendered:
    positives are noise in train and do not occur elsewhere.

    Raises:
        ConfigError, ManifestError: as for `generate`.
    """
    _check_request(num_patients, size)
    release = root / ("CheXpert-v1.0-small" if small else "CheXpert-v1.0")
    few = max(num_patients // 5, 12)
    # First numbers as in the original, so that patients of the three files differ.
    parts = [("train", 1, num_patients), ("valid", 64541, few), *([("test", 64741, few)] if with_test else [])]

    def write(folder: Path) -> None:
        for part, first, count in parts:
            about = [] if part == "test" else ["Sex", "Age", "Frontal/Lateral", "AP/PA"]
            work = partial(_write_chexpert_patient, folder, part, seed=seed, size=size)
            rows = _rows_of(range(first, first + count), work)
            write_table(folder / f"{part}.csv", ["Path", *about, *chexpert.LABELS], rows)

    request = {"layout": "chexpert", "num_patients": num_patients, "seed": seed, "size": size, "with_test": with_test}
    write_once(release, request, write)
    return release


def _check_request(num_patients: int, size: int) -> None:
    if num_patients < 3:
        raise ConfigError(f"a phantom needs at least 3 patients for its three splits, not {num_patients}")
    if size < 32:
        raise ConfigError(f"a phantom image needs at least 32 pixels a side, not {size}")


def draw_patient(seed: int, number: int) -> Patient:
    """Patient `number` of the phantom with that seed: the same whatever else is drawn."""
    rng = np.random.Generator(np.random.PCG64([seed, number]))
    sex = "F" if rng.random() < 0.5 else "M"
    anatomy = Anatomy(
        chest=rng.uniform(0.68, 0.80),
        base=rng.uniform(0.28, 0.42),
        heart_height=rng.uniform(0.31, 0.36),
        heart_tilt=rng.uniform(0.15, 0.40),
        mediastinum=rng.uniform(0.12, 0.16),
        knob=rng.uniform(0.06, 0.085),
        rib_spacing=rng.uniform(0.15, 0.18),
        rib_slope=rng.uniform(0.12, 0.32),
        bone=rng.uniform(0.11, 0.17),
        flesh=rng.uniform(0.68, 0.80),
        breast=rng.uniform(0.27, 0.36) if sex == "F" else 0.0,
        scoliosis=rng.uniform(-0.03, 0.03),
        texture=_draw_seed(rng),
    )
    ratio = rng.uniform(0.56, 0.64) if rng.random() < 0.28 else rng.uniform(0.38, 0.47)
    lesion = _draw_lesion(rng, anatomy, ratio) if rng.random() < 0.2 else None
    pacemaker = _draw_side(rng) if rng.random() < 0.06 else 0
    age = int(rng.uniform(18, 91))
    num_studies = 1 + int(rng.uniform(0, 4))
    studies = tuple(_draw_study(rng, ratio, lesion, pacemaker) for _ in range(num_studies))
    return Patient(anatomy=anatomy, sex=sex, age=age, studies=studies)


def _draw_study(rng: np.random.Generator, ratio: float, lesion: Blob | None, pacemaker: int) -> Study:
    portable = rng.random() < 0.4
    ill = rng.random() < (0.75 if portable else 0.55)

    def happens(share: float) -> bool:
        return bool(rng.random() < share) and ill

    sides = ((-1,), (1,), (-1, 1))[int(rng.uniform(0, 3))]
    effusions = tuple((side, rng.uniform(0.10, 0.40)) for side in sides) if happens(0.45) else ()
    foci = tuple(_draw_focus(rng) for _ in range(1 + int(rng.uniform(0, 2.5)))) if happens(0.30) else ()
    findings = Findings(
        heart_ratio=ratio,
        effusions=effusions,
        lesion=lesion,
        consolidations=foci,
        pneumothorax=(_draw_side(rng), rng.uniform(0.08, 0.16)) if happens(0.20) else None,
        edema=rng.uniform(0.40, 0.75) if happens(0.30) else 0.0,
        atelectases=((_draw_side(rng), rng.uniform(0.06, 0.16)),) if happens(0.30) else (),
        tube=portable and bool(rng.random() < 0.3),
        line=_draw_side(rng) if rng.random() < (0.35 if portable else 0.06) else 0,
        pacemaker=pacemaker,
    )
    frontal = _draw_pose(rng, portable=portable)
    lateral = _draw_pose(rng, portable=False) if not portable and rng.random() < 0.25 else None
    return Study(findings=findings, frontal=frontal, lateral=lateral)


def _draw_pose(rng: np.random.Generator, *, portable: bool) -> Pose:
    return Pose(
        lean=rng.uniform(-0.05, 0.05),
        shift_x=rng.uniform(-0.05, 0.05),
        shift_y=rng.uniform(-0.05, 0.05),
        scale=rng.uniform(0.92, 1.04),
        portable=portable,
        gain=rng.uniform(0.90, 1.08),
        noise=rng.uniform(0.008, 0.020),
        seed=_draw_seed(rng),
    )


def _draw_lesion(rng: np.random.Generator, anatomy: Anatomy, heart_ratio: float) -> Blob:
    """A nodule or mass of 14 to 37 pixels across at 256, anywhere in the lungs where nothing hides it."""
    while True:
        place = Blob(
            x=_draw_side(rng) * rng.uniform(0.20, 0.70),
            y=rng.uniform(-0.60, 0.40),
            radius=rng.uniform(0.06, 0.14),
            depth=rng.uniform(-0.25, 0.30),
        )
        if fits_in_lung(anatomy, heart_ratio, place):
            return place


def _draw_focus(rng: np.random.Generator) -> Blob:
    return Blob(
        x=_draw_side(rng) * rng.uniform(0.28, 0.52),
        y=rng.uniform(-0.40, 0.22),
        radius=rng.uniform(0.18, 0.30),
        depth=rng.uniform(-0.2, 0.3),
    )


def _draw_side(rng: np.random.Generator) -> int:
    return -1 if rng.random() < 0.5 else 1


def _draw_seed(rng: np.random.Generator) -> int:
    return int(rng.random() * 2**48)


def _patient_splits(num_patients: int, seed: int) -> list[str]:
    """60 % train, 15 % val, 25 % test, by patient and at least one each."""
    names = [f"p{number}" for number in range(num_patients)]
    splits = ["train"] * num_patients
    for split, share in (("test", 0.25), ("val", 0.15 / 0.75)):
        left = [number for number in range(num_patients) if splits[number] == "train"]
        taken = carve([names[number] for number in left], fraction=share, seed=seed)
        for number in np.array(left)[taken]:
            splits[number] = split
    return splits


def _write_patient(folder: Path, splits: list[str], number: int, *, seed: int, size: int) -> Rows:
    rows = []
    patient = draw_patient(seed, number)
    name = f"p{number + 1:04d}"
    for k, study in enumerate(patient.studies, 1):
        present = study.present()
        for view, rendering in _exposures(patient, study, size):
            stem = f"{name}_s{k}" + ("_lateral" if view == "LATERAL" else "")
            write_image(folder / "images" / f"{stem}.png", rendering.image)
            write_image(folder / "masks" / f"{stem}_lungs.png", _as_mask(rendering.lungs))
            row = dict.fromkeys(_COLUMNS, "")
            row |= {"path": f"images/{stem}.png", "patient_id": name, "study_id": f"{name}_s{k}", "view": view}
            row |= {
                "sex": patient.sex,
                "age": str(patient.age),
                "split": splits[number],
                "mask_path": f"masks/{stem}_lungs.png",
            }
            row |= {label: "1" if label in present else "0" for label in LABELS}
            row["heart_ratio"] = f"{study.findings.heart_ratio:.3f}"
            row["effusion_height"] = f"{max((height for _, height in study.findings.effusions), default=0.0):.3f}"
            if rendering.lesion is not None and rendering.lesion_mask is not None:
                write_image(folder / "masks" / f"{stem}_lesion.png", _as_mask(rendering.lesion_mask))
                row["lesion_mask_path"] = f"masks/{stem}_lesion.png"
                keys = ("lesion_x", "lesion_y", "lesion_radius")
                row |= {key: f"{value:.2f}" for key, value in zip(keys, rendering.lesion, strict=True)}
            rows.append(row)
    return rows


def _exposures(patient: Patient, study: Study, size: int) -> Iterator[tuple[str, Rendering]]:
    pose = study.frontal
    yield "AP" if pose.portable else "PA", render_frontal(patient.anatomy, study.findings, pose, size)
    if study.lateral is not None:
        yield "LATERAL", render_lateral(patient.anatomy, study.findings, study.lateral, size)


def _write_chexpert_patient(folder: Path, part: str, number: int, *, seed: int, size: int) -> Rows:
    rows = []
    patient = draw_patient(seed, number)
    rng = np.random.Generator(np.random.PCG64([seed, number, 0xC4E]))
    # The original has three patients aged 0 and one of unknown sex; here the first and second train patients.
    age = 0 if number == 1 else patient.age
    sex = "Unknown" if number == 2 else {"F": "Female", "M": "Male"}[patient.sex]
    release = "" if part == "test" else f"{folder.name}/"
    for k, study in enumerate(patient.studies, 1):
        labels = chexpert_labels(study, rng if part == "train" else None)
        for i, (view, rendering) in enumerate(_exposures(patient, study, size), 1):
            side = "Lateral" if view == "LATERAL" else "Frontal"
            relative = f"{part}/patient{number:05d}/study{k}/view{i}_{side.lower()}.jpg"
            write_image(folder / relative, rendering.image)
            row = {"Path": release + relative, **labels}
            if part != "test":
                row |= {"Sex": sex, "Age": str(age), "Frontal/Lateral": side, "AP/PA": "" if i > 1 else view}
            rows.append(row)
    return rows


def chexpert_labels(study: Study, rng: np.random.Generator | None) -> dict[str, str]:
    """The 14 labels of a study: true and complete, or with `rng` as a report would mention them."""
    truth = set(study.present())
    shown = study.findings
    if shown.heart_ratio > 0.60:
        truth.add("Enlarged Cardiomediastinum")
    if truth & {"Edema", "Consolidation", "Atelectasis", "Lung Lesion"}:
        truth.add("Lung Opacity")
    if len(shown.consolidations) > 1:
        truth.add("Pneumonia")
    if rng is None:
        return {label: "1.0" if label in truth else "0.0" for label in chexpert.LABELS}
    labels = {}
    for label in chexpert.LABELS:
        u = rng.random()
        if label == "No Finding":
            labels[label] = "1.0" if label in truth else ""
        elif label in truth:
            labels[label] = "1.0" if u < 0.80 else "-1.0" if u < 0.92 else ""
        else:
            labels[label] = "" if u < 0.70 else "0.0" if u < 0.93 else "-1.0" if u < 0.98 else "1.0"
    return labels


def _rows_of(numbers: range, work: Callable[[int], Rows]) -> Rows:
    """Rows of all patients in order; threads help because numpy and the image codecs release the interpreter."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return [row for rows in pool.map(work, numbers) for row in rows]


def write_once(root: Path, request: dict[str, Any], write: Callable[[Path], None]) -> None:
    """Fill `root` by `write` unless it holds just this already; an unfinished folder is filled again.

    A marker file is written first and again at the end. It says whose folder this is, what was asked for and
    whether it is finished, so that a run that is killed is redone and nobody else's files are touched.

    Raises:
        ManifestError: `root` holds other files, or the result of another request.
    """
    request = {"version": _VERSION, **request}
    state = _read_marker(root)
    # A kill may leave the marker's temporary file, which is ours.
    if (
        state is None
        and root.exists()
        and not (root.is_dir() and all(path.name.startswith(MARKER) for path in root.iterdir()))
    ):
        raise ManifestError(f"{root} holds other files; give an empty or a new folder to generate into")
    if state is not None and state.get("complete"):
        held = {key: state.get(key) for key in request if state.get(key) != request[key]}
        if held:
            raise ManifestError(f"{root} was generated with {held}, not as asked; choose another folder or remove it")
        return
    files.write_atomic(root / MARKER, files.canonical_json({**request, "complete": False}))
    write(root)
    files.write_atomic(root / MARKER, files.canonical_json({**request, "complete": True}))


def is_complete(root: Path, layout: str) -> bool:
    """Whether `write_once` finished a request of this layout in the folder."""
    state = _read_marker(root)
    return state is not None and state.get("complete") is True and state.get("layout") == layout


def _read_marker(root: Path) -> dict[str, Any] | None:
    try:
        state = json.loads((root / MARKER).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return state if isinstance(state, dict) else None


def write_image(path: Path, pixels: UInt8[np.ndarray, "H W"]) -> None:
    """Write grey pixels as PNG or JPEG, by the suffix; never half a file under the final name."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.partial")
    options: dict[str, Any] = {
        ".png": {"format": "PNG", "compress_level": 3},
        ".jpg": {"format": "JPEG", "quality": 90},
    }
    Image.fromarray(pixels).save(part, **options[path.suffix])
    part.replace(path)


def write_table(path: Path, columns: Sequence[str], rows: Sequence[dict[str, str]]) -> None:
    """Write rows as CSV with a header, whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    files.write_atomic(path, text.getvalue().encode())


def _as_mask(mask: Bool[np.ndarray, "S S"]) -> UInt8[np.ndarray, "S S"]:
    return mask.astype(np.uint8) * np.uint8(255)
