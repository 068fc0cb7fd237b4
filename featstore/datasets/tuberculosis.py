"""Montgomery and Shenzhen chest X-rays for tuberculosis, with lung masks (National Library of Medicine)."""

import re
from pathlib import Path

import pyarrow as pa

from featstore.datasets.source import Source, build_table
from featstore.datasets.splits import split_by_group, systematic_split
from featstore.datasets.walk import by_stem, find_files
from featstore.errors import ManifestError

CLASSES = ("background", "left lung", "right lung")
_IMAGE = r"{prefix}_(?P<number>[0-9]+)_(?P<label>[01])"
_LICENCE = "public, from the National Library of Medicine; cite Jaeger et al. 2014"
_AGE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(y|yr|yrs|years?|m|mo|months?|d|days?)\b", re.IGNORECASE)
_DAYS = {"y": 365.25, "m": 365.25 / 12, "d": 1.0}


def read_montgomery(root: Path) -> Source:
    """Montgomery County chest X-rays: 138 images, 58 with tuberculosis, masks of the left and the right lung.

    Layout: CXR_png/MCUCXR_0001_0.png (the last digit is the label: 0 normal, 1 tuberculosis),
    ManualMask/leftMask/ and ManualMask/rightMask/ with the same names, ClinicalReadings/MCUCXR_0001_0.txt; `root` is
    the folder MontgomerySet or one that holds it. PNG or JPEG; the bit depth is read from each file.

    One image is taken for one patient, though the release names none, so groups count as unknown. Left and right mask
    become one: 0 background, 1 left lung, 2 right lung. There is no official split: seeded 70/10/20. `split_c` has the
    69/23/46 of Baharoon et al. 2023 by systematic sampling over sorted names (approximate: their order cannot be
    reproduced). Column `tuberculosis` is 0 or 1; sex, age and the reading come from the clinical
    text. Tasks: montgomery-tb. Licence: public, NLM; cite Jaeger et al. 2014.

    Raises:
        ManifestError: no image with such a name, or two files of one name.
    """
    found = find_files(root)
    images = _images(root, found, "MCUCXR", "CXR_png/MCUCXR_0001_0.png")
    left, right = (_inside(_pictures(found), f"{side}Mask", r"/ManualMask/") for side in ("left", "right"))
    masks, parts = [], []
    for stem in images:
        both = [(left.get(stem), "values=1"), (right.get(stem), "values=2")]
        given = [(path, part) for path, part in both if path is not None]
        masks.append("|".join(path for path, _ in given) or None)
        parts.append("|".join(part for _, part in given) or None)
    part = systematic_split([name for name, mask in zip(images, masks) if mask], test=46 / 138, val=23 / 92)
    return _source(root, found, images, "montgomery", masks=masks, parts=parts, classes=CLASSES, split_c=part)


def read_shenzhen(root: Path) -> Source:
    """Shenzhen Hospital chest X-rays: 662 images, 336 with tuberculosis, lung masks for 566 of them.

    Layout: CXR_png/CHNCXR_0001_0.png (the last digit is the label: 0 normal, 1 tuberculosis) and
    ClinicalReadings/CHNCXR_0001_0.txt in ChinaSet_AllFiles; the masks are a separate release whose files are called
    CHNCXR_0001_0_mask.png (0 and 255): put them anywhere below `root`, such as masks/. PNG or JPEG.

    One image is taken for one patient, though the release names none, so groups count as unknown. 96 images have no
    mask; they stay, without one. No official split: seeded 70/10/20. `split_c` has the 361/91/114 of Baharoon et al.
    2023 among the images with a mask, by systematic sampling over sorted names (approximate: their order cannot be
    reproduced); the others are in none of its parts. Column `tuberculosis` is 0 or 1; sex, age and the reading come
    from the clinical text. Tasks: shenzhen-tb. Licence: public, NLM; cite Jaeger et al. 2014.

    Raises:
        ManifestError: no image with such a name, or two files of one name.
    """
    found = find_files(root)
    images = _images(root, found, "CHNCXR", "CXR_png/CHNCXR_0001_0.png")
    files = (path for path in _pictures(found) if Path(path).stem.endswith("_mask"))
    drawn = by_stem(files, prefer=(r"/masks?/",), key=lambda path: Path(path).stem.removesuffix("_mask"))
    masks = [drawn.get(stem) for stem in images]
    parts = [None if mask is None else "values=1" for mask in masks]
    part = systematic_split([name for name, mask in zip(images, masks) if mask], test=114 / 566, val=91 / 452)
    classes = ("background", "lung")
    return _source(root, found, images, "shenzhen", masks=masks, parts=parts, classes=classes, split_c=part)


def _images(root: Path, found: list[str], prefix: str, example: str) -> dict[str, str]:
    """Stem -> path of every image; of a PNG and a JPEG of one name the PNG."""
    pattern = re.compile(_IMAGE.format(prefix=prefix))
    named = (path for path in _pictures(found) if "mask" not in path.lower() and pattern.fullmatch(Path(path).stem))
    images = by_stem(named, prefer=(r"/CXR_png/", r"\.png$"))
    if not images:
        raise ManifestError(f"{root} has no image such as {example} in it or below; check the root")
    return dict(sorted(images.items()))


def _pictures(found: list[str]) -> list[str]:
    return [path for path in found if path.lower().endswith((".png", ".jpg", ".jpeg"))]


def _inside(found: list[str], folder: str, prefer: str) -> dict[str, str]:
    """Files somewhere in folders of this name, by stem."""
    return by_stem((path for path in found if f"/{folder.lower()}/" in f"/{path.lower()}"), prefer=(prefer,))


def _source(
    root: Path,
    found: list[str],
    images: dict[str, str],
    adapter: str,
    *,
    masks: list[str | None],
    parts: list[str | None],
    classes: tuple[str, ...],
    split_c: dict[str, str],
) -> Source:
    stems = list(images)
    labels = [stem[-1] for stem in stems]
    readings = _inside(
        [path for path in found if path.lower().endswith(".txt")], "ClinicalReadings", r"/ClinicalReadings/[^/]+$"
    )
    clinical = [_reading(root, readings.get(stem)) for stem in stems]
    original = pa.table({"tuberculosis": pa.array(labels, pa.string())}).append_column(
        "age_years", pa.array([age for _, age, _ in clinical], pa.float64())
    )
    original = original.append_column("sex", pa.array([sex for sex, _, _ in clinical], pa.string()))
    original = original.append_column("reading", pa.array([text for _, _, text in clinical], pa.string()))
    reserved = {
        "id": pa.array(stems),
        "path": pa.array(list(images.values())),
        "group": pa.array(stems),
        "split": pa.array(split_by_group(stems)),
        "mask_path": pa.array(masks, pa.string()),
        "mask_part": pa.array(parts, pa.string()),
    }
    unmasked, unread = sum(mask is None for mask in masks), sum(stem not in readings for stem in stems)
    notes = [f"{adapter}: {_LICENCE}", "one image is taken for one patient: the release names no patients"]
    notes += [f"{unmasked} images have no mask"] if unmasked else []
    notes += [f"{unread} images have no clinical reading"] if unread else []
    return Source(
        table=build_table(original, reserved, {"split_c": pa.array([split_c.get(stem, "") for stem in stems])}),
        root=root,
        adapter=adapter,
        default_task=f"{adapter}-tb",
        tasks=(f"{adapter}-tb",),
        label_columns=("tuberculosis",),
        split_origin="seeded by image, 70/10/20, seed 0",
        groups_known=False,
        notes=tuple(notes),
        mask_classes=classes,
    )


def _reading(root: Path, path: str | None) -> tuple[str | None, float | None, str | None]:
    """(sex M or F, age in years, the reading) of a clinical text, whose layout differs between and within the sets."""
    if path is None:
        return None, None, None
    text = (root / path).read_text("utf-8", "replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    sex = next(
        (word[0].upper() for word in re.findall(r"[A-Za-z]+", text) if word.lower() in ("male", "female", "m", "f")),
        None,
    )
    labelled = re.search(r"age\s*:?\s*0*([0-9]+)", text, re.IGNORECASE)
    free = _AGE.search(text)
    age: float | None = None
    if free is not None:
        age = float(free[1]) * _DAYS[free[2][0].lower()] / _DAYS["y"]
    elif labelled is not None:
        age = float(labelled[1])
    rest = [line for line in lines if not re.match(r"(patient|age|sex|male|female)", line, re.IGNORECASE)]
    return sex, age, " ".join(rest) or None
