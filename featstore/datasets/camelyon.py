"""Camelyon16 and Camelyon17: whole slides of lymph nodes, tiled where there is tissue."""

import re
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from featstore.datasets.source import Source, build_table, read_csv
from featstore.datasets.splits import split_by_group
from featstore.datasets.tiles import Tiles, Tiling, cut_slides
from featstore.datasets.walk import by_stem, find_files
from featstore.errors import ManifestError

SUFFIXES = (".tif", ".tiff", ".svs", ".mrxs")
EXCLUDED = ("normal_086", "test_049", "test_114")
NOT_EXHAUSTIVE = ("015", "018", "020", "029", "033", "044", "046", "051", "054", "055", "079", "092", "095")
PARTLY = ("061", "082")
STAGES = ("negative", "itc", "micro", "macro")
_C16 = re.compile(r"(normal|tumor|test)_[0-9]{3}")
_C17 = re.compile(r"(patient_[0-9]{3})_node_([0-9])")
_CENTRE = re.compile(r"cent(?:re|er)_?([0-4])", re.IGNORECASE)


def read_16(
    root: Path,
    *,
    tile: int = 224,
    mpp: float = 0.0,
    slide_mpp: float = 0.0,
    min_tissue: float = 0.25,
    max_tiles: int = 0,
    exclude: bool = True,
) -> Source:
    """Camelyon16: 399 slides of sentinel lymph nodes, with or without metastases, and outlines of the tumours.

    Layout: normal_001.tif, tumor_001.tif, test_001.tif in any sub-folders (training/normal, training/tumor,
    testing/images), their outlines as tumor_001.xml and test_001.xml, and reference.csv for the labels of the test
    slides (slide name first, then normal or tumor). Names are compared without regard to case.

    Each tile without overlap that shows tissue is a sample (tissue as CLAM finds it on a thumbnail); `volume` is the
    slide, x and y are pixels of its finest level. Columns: `label` (0 normal, 1 tumour; of the slide, not the tile),
    `slide_class`, `exhaustive` (0: not all tumour of the slide is outlined). Masks come from the outlines: 1 tumour.
    One slide is taken for one patient (the release names none), so groups are slides.

    Official split: 270 training and 129 test slides; validation slides are carved from training by the task. Known
    errors of the release are left out: normal_086 (mislabelled), test_049 and test_114 (duplicate or odd);
    `--option exclude=false` keeps them. Tasks: camelyon16-slide.
    Options: `tile` pixels a side, `mpp` micrometres a pixel (0: finest level), `slide_mpp` for slides that do not state
    theirs, `min_tissue` share of tissue in a tile, `max_tiles` a slide (0: all).
    Licence: CC0; cite Bejnordi et al. 2017.

    Raises:
        ManifestError: no such slides, or two of one name. ConfigError: options that cannot be.
    """
    found = find_files(root)
    slides = _slides(found, _C16, root, "normal_001.tif, tumor_001.tif or test_001.tif")
    left_out = [name for name in slides if name in EXCLUDED] if exclude else []
    names = [name for name in slides if name not in left_out]
    paths = [slides[name] for name in names]
    reference = _reference(root, found)
    classes = [name.split("_")[0] if not name.startswith("test") else reference.get(name) for name in names]
    outlines = _outlines(found)
    incomplete = {f"tumor_{number}" for number in (*NOT_EXHAUSTIVE, *PARTLY)}
    tiles = cut_slides(root, paths, _tiling(tile, mpp, slide_mpp, min_tissue, max_tiles))
    columns: dict[str, Sequence[str | None]] = {
        "label": [None if item is None else str(int(item == "tumor")) for item in classes],
        "slide_class": classes,
        "exhaustive": ["0" if name in incomplete else "1" for name in names],
    }
    splits = ["test" if name.startswith("test") else "train" for name in names]
    notes = ["Camelyon16: CC0, cite Bejnordi et al. 2017", "one slide is taken for one patient: none are named"]
    notes += [f"left out as errors of the release: {', '.join(left_out)}"] if left_out else []
    unlabelled = classes.count(None)
    notes += [f"{unlabelled} test slides have no label (reference.csv)"] if unlabelled else []
    return _source(
        root,
        "camelyon16",
        tiles,
        names=names,
        paths=paths,
        groups=names,
        splits=splits,
        columns=columns,
        outlines=[outlines.get(name) for name in names],
        notes=notes,
        origin="official",
        groups_known=False,
    )


def read_17(
    root: Path,
    *,
    tile: int = 224,
    mpp: float = 0.0,
    slide_mpp: float = 0.0,
    min_tissue: float = 0.25,
    max_tiles: int = 0,
    itc: bool = True,
) -> Source:
    """Camelyon17: slides of five lymph nodes of each patient, five centres, stages by slide and by patient.

    Layout: patient_000_node_0.tif in any sub-folders (centre_0 to centre_4, however spelt), the stages as
    stage_labels.csv or stages.csv (`patient,stage`; its rows patient_000.zip are stages of patients and
    patient_000_node_0.tif classes of slides), outlines of 50 slides as patient_000_node_0.xml.

    Each tile without overlap that shows tissue is a sample; `volume` is the slide, groups are patients, x and y pixels
    of the finest level. Columns: `slide_class` (negative, itc, micro, macro), `label` (0 negative, 1 other), `pn_stage`
    of the patient, `centre`. Slides without a stage (the official test patients) have an empty split. Patients with
    stages are split 70/10/20, seeded. `split_centre` tests on centres 3 and 4 and trains on the others (whose seen and
    unseen slides in DINOv3 as a medical vision standard are not listed, so it is approximate).
    Tasks: camelyon17-slide, camelyon17-stage4, camelyon17-unseen-b (without ITC slides).
    Options: as for camelyon16, and `itc=false` leaves slides with isolated tumour cells out.
    Licence: CC0; cite Bandi et al. 2019.

    Raises:
        ManifestError: no such slides, two of one name, or stages without their columns. ConfigError: options that
            cannot be.
    """
    found = find_files(root)
    slides = _slides(found, _C17, root, "patient_000_node_0.tif")
    stages, patients_stage = _stages(root, found)
    names = [name for name in slides if itc or stages.get(name) != "itc"]
    paths = [slides[name] for name in names]
    patients = [name.rpartition("_node_")[0] for name in names]
    centres = [
        match[1] if (match := _CENTRE.search(path)) else _centre(patient) for path, patient in zip(paths, patients)
    ]
    classes = [stages.get(name) for name in names]
    outlines = _outlines(found)
    tiles = cut_slides(root, paths, _tiling(tile, mpp, slide_mpp, min_tissue, max_tiles))
    drawn = split_by_group(patients)
    splits = [split if label is not None else "" for split, label in zip(drawn, classes)]
    by_centre = [
        "" if label is None else "test" if centre in ("3", "4") else "train" for centre, label in zip(centres, classes)
    ]
    columns: dict[str, Sequence[str | None]] = {
        "label": [None if item is None else str(int(item != "negative")) for item in classes],
        "slide_class": classes,
        "pn_stage": [patients_stage.get(patient) for patient in patients],
        "centre": centres,
        "split_centre": by_centre,
    }
    notes = ["Camelyon17: CC0, cite Bandi et al. 2019"]
    unlabelled = classes.count(None)
    notes += [f"{unlabelled} slides have no stage and stand in no split"] if unlabelled else []
    return _source(
        root,
        "camelyon17",
        tiles,
        names=names,
        paths=paths,
        groups=patients,
        splits=splits,
        columns=columns,
        outlines=[outlines.get(name) for name in names],
        notes=notes,
        origin="seeded by patient, 70/10/20, seed 0",
        groups_known=True,
    )


def _name(path: str) -> str:
    return Path(path).stem.lower()


def _outlines(found: list[str]) -> dict[str, str]:
    return by_stem((path for path in found if path.lower().endswith(".xml")), prefer=(r"annotations?/",), key=_name)


def _tiling(tile: int, mpp: float, slide_mpp: float, min_tissue: float, max_tiles: int) -> Tiling:
    return Tiling(tile=tile, mpp=mpp, slide_mpp=slide_mpp, min_tissue=min_tissue, max_tiles=max_tiles)


def _source(
    root: Path,
    adapter: str,
    tiles: Tiles,
    *,
    names: list[str],
    paths: list[str],
    groups: list[str],
    splits: list[str],
    columns: dict[str, Sequence[str | None]],
    outlines: list[str | None],
    notes: list[str],
    origin: str,
    groups_known: bool,
) -> Source:
    """Rows of tiles, each with what is known of its slide."""
    of = tiles.slides
    masks = [outlines[slide] for slide in of]
    reserved = {
        "id": pa.array(tiles.ids(names)),
        "path": pa.array([paths[slide] for slide in of], pa.string()),
        "group": pa.array([groups[slide] for slide in of], pa.string()),
        "study": pa.array([names[slide] for slide in of], pa.string()),
        "split": pa.array([splits[slide] for slide in of], pa.string()),
        "mask_path": pa.array(masks, pa.string()),
        "mask_part": pa.array([f"{part}&draw=asap" if mask else None for part, mask in zip(tiles.parts, masks)]),
        **tiles.places(names),
    }
    table = pa.table({key: pa.array([values[slide] for slide in of], pa.string()) for key, values in columns.items()})
    default = f"{adapter}-slide"
    tasks = {
        "camelyon16": (default,),
        "camelyon17": (default, "camelyon17-stage4", "camelyon17-unseen-b"),
    }[adapter]
    return Source(
        table=build_table(table, reserved),
        root=root,
        adapter=adapter,
        default_task=default,
        tasks=tasks,
        label_columns=("label", "slide_class"),
        split_origin=origin,
        groups_known=groups_known,
        notes=(*notes, *tiles.notes),
        mask_classes=("background", "tumour"),
    )


def _slides(found: list[str], pattern: re.Pattern[str], root: Path, example: str) -> dict[str, str]:
    """Slides by lower-case stem (masks of the release end in _mask)."""
    named = (path for path in found if path.lower().endswith(SUFFIXES) and pattern.fullmatch(_name(path)))
    slides = by_stem(named, prefer=(r"/(training|testing|cent(re|er)_?[0-4])/", r"/(normal|tumor|images)/"), key=_name)
    if not slides:
        raise ManifestError(f"{root} has no slide such as {example} in it or below; check the root")
    return dict(sorted(slides.items()))


def _reference(root: Path, found: list[str]) -> dict[str, str]:
    """normal or tumor by the name of a test slide, wherever in a line it stands."""
    path = next((path for path in found if Path(path).name.lower() == "reference.csv"), None)
    if path is None:
        return {}
    labels = {}
    for line in (root / path).read_text("utf-8-sig", "replace").splitlines():
        fields = [field.strip().strip('"').lower() for field in line.split(",")]
        name = fields[0].rsplit(".", 1)[0]
        told = [field for field in fields[1:] if field in ("normal", "tumor", "tumour")]
        if _C16.fullmatch(name) and told:
            labels[name] = "normal" if told[0] == "normal" else "tumor"
    return labels


def _stages(root: Path, found: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """(class by slide, stage by patient); the file mixes rows of both, told apart by their suffix."""
    path = next((path for path in found if Path(path).name.lower() in ("stage_labels.csv", "stages.csv")), None)
    if path is None:
        return {}, {}
    table = read_csv(root / path)
    if not {"patient", "stage"} <= set(table.column_names):
        raise ManifestError(f"{root / path} must have the columns patient and stage, got {table.column_names}")
    slides, patients = {}, {}
    for name, stage in zip(table["patient"].to_pylist(), table["stage"].to_pylist()):
        stem, _, suffix = (name or "").lower().rpartition(".")
        if stage and suffix == "zip":
            patients[stem] = stage
        elif stage and suffix:
            slides[stem] = stage.lower()
    return slides, patients


def _centre(patient: str) -> str:
    """Twenty patients of each centre follow each other in the numbers 0 to 99, and again from 100 on."""
    return str(int(patient.rpartition("_")[2]) % 100 // 20)
