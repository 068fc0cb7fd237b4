"""BCNB: 1,058 core-needle biopsies of breast cancer, one slide stored as JPEG for each patient, with clinical labels.

Layout: <id>.jpg (the slides), <id>.json (outlines of the tumour) and one .xlsx with the clinical data, in any
sub-folders of `root` (where there is a folder WSIs, the slides are those in it); the official splits
{train,val,test}-type-0.json ... -4.json if you have them. Names of folders and of the columns are not documented by the
release, so the table is taken as it is: its first column whose values are the slides' ids joins it.

Each tile without overlap that shows tissue is a sample; `volume` is the slide, groups are patients (one slide each), x
and y are pixels. Columns of the clinical table follow verbatim, and `aln` (0 for N0, 1 for N+), `er`, `pr`, `her2` and
`ki67` (0/1) are derived from the columns whose names hold these words, where there are any: positive and negative, for
her2 else the grade (0 and 1+ are 0, 3+ is 1, the equivocal 2+ is blank), for ki67 else a percentage (above 14 is 1, the
usual cut-off; state it when you publish; a column of fractions up to 1 is told by its largest value).
Split: `type-0` of the official files, else seeded 70/10/20 by patient. Tasks: bcnb-aln, bcnb-er, bcnb-pr, bcnb-her2,
bcnb-ki67. Options: `tile` pixels a side, `min_tissue` share of tissue, `max_tiles` a slide (0: all).
Licence: by registration; cite Xu et al. 2021.
"""

import json
import re
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import pyarrow as pa

from featstore.datasets.source import Source, build_table
from featstore.datasets.splits import split_by_group
from featstore.datasets.tiles import Tiling, cut_slides
from featstore.datasets.walk import by_stem, find_files
from featstore.errors import ManifestError

KI67_ABOVE = 14.0
_WORDS = {
    "aln": re.compile(r"aln|lymph", re.IGNORECASE),
    "er": re.compile(r"^er\b|\ber$", re.IGNORECASE),
    "pr": re.compile(r"^pr\b|\bpr$", re.IGNORECASE),
    "her2": re.compile(r"her-?2", re.IGNORECASE),
    "ki67": re.compile(r"ki-?67", re.IGNORECASE),
}


def read(root: Path, *, tile: int = 224, min_tissue: float = 0.25, max_tiles: int = 0) -> Source:
    """Tiles of every slide, with the clinical columns of its patient.

    Raises:
        ManifestError: no slides, two of one name, no clinical table, or none of its columns holds the slides' ids.
    """
    found = find_files(root)
    numbered = [path for path in found if re.fullmatch(r"[0-9]+\.(?:jpg|jpeg|png|tif|svs)", Path(path).name)]
    # The release also comes with patches, whose names are numbers as well.
    slides = by_stem([path for path in numbered if "/wsis/" in f"/{path.lower()}"] or numbered)
    if not slides:
        raise ManifestError(f"{root} has no slide such as 1.jpg in it or below; check the root")
    names = sorted(slides, key=int)
    clinical, columns = _clinical(root, found, names)
    derived = {key: _flags(key, [clinical.get(name, {}) for name in names], columns) for key in _WORDS}
    tiles = cut_slides(
        root, [slides[name] for name in names], Tiling(tile=tile, min_tissue=min_tissue, max_tiles=max_tiles)
    )
    drawn = (path for path in found if path.lower().endswith(".json") and Path(path).stem in slides)
    outlines = by_stem(drawn, prefer=(r"/WSIs/",))
    official = _official(root, found)
    parts = official or dict(zip(names, split_by_group(names)))
    of = tiles.slides
    masks = [outlines.get(names[slide]) for slide in of]
    reserved = {
        "id": pa.array(tiles.ids(names)),
        "path": pa.array([slides[names[slide]] for slide in of], pa.string()),
        "group": pa.array([names[slide] for slide in of], pa.string()),
        "split": pa.array([parts.get(names[slide], "") for slide in of], pa.string()),
        "mask_path": pa.array(masks, pa.string()),
        "mask_part": pa.array([f"{part}&draw=polygons" if mask else None for part, mask in zip(tiles.parts, masks)]),
        **tiles.places(names),
    }
    original = pa.table(
        {key: pa.array([clinical.get(names[slide], {}).get(key) for slide in of], pa.string()) for key in columns}
    )
    labels = {key: pa.array([values[slide] for slide in of], pa.string()) for key, values in derived.items()}
    given = tuple(key for key, values in derived.items() if any(value is not None for value in values))
    absent = sum(name not in clinical for name in names)
    notes = ["BCNB: by registration, cite Xu et al. 2021", *tiles.notes]
    notes += [f"{absent} slides have no row in the clinical table"] if absent else []
    equivocal = sum(_is_equivocal(clinical.get(name, {}), columns) for name in names)
    notes += [f"{equivocal} slides have the equivocal HER2 grade 2+ and no verdict; their her2 is blank"] * (
        equivocal > 0
    )
    missing = [key for key in _WORDS if key not in given]
    notes += [f"no column of the clinical table tells {', '.join(missing)}"] if missing else []
    return Source(
        table=build_table(original, reserved, labels),
        root=root,
        adapter="bcnb",
        default_task=f"bcnb-{given[0]}" if given else None,
        tasks=tuple(f"bcnb-{key}" for key in given),
        label_columns=given,
        split_origin="official (type 0)" if official else "seeded by patient, 70/10/20, seed 0",
        groups_known=True,
        notes=tuple(notes),
        mask_classes=("background", "tumour"),
    )


def _clinical(root: Path, found: list[str], names: list[str]) -> tuple[dict[str, dict[str, str | None]], list[str]]:
    """(rows by slide id, names of the columns) of the first sheet."""
    path = next((path for path in found if path.lower().endswith(".xlsx")), None)
    if path is None:
        raise ManifestError(f"{root} has no .xlsx with the clinical data")
    try:
        import openpyxl
        from openpyxl.utils.exceptions import InvalidFileException
    except ImportError as error:
        raise ManifestError("the clinical table needs openpyxl: pip install 'featstore[slides]'") from error
    try:
        book = openpyxl.load_workbook(root / path, read_only=True, data_only=True)
        lines = [[_text(cell) for cell in line] for line in book.worksheets[0].iter_rows(values_only=True)]
        book.close()
    except (OSError, KeyError, ValueError, IndexError, SyntaxError, BadZipFile, InvalidFileException) as error:
        raise ManifestError(f"{root / path} cannot be read as .xlsx ({type(error).__name__})") from None
    header = [name or f"unnamed_{position}" for position, name in enumerate(lines[0], 1)] if lines else []
    known = set(names)
    key = next((at for at in range(len(header)) if known & {line[at] for line in lines[1:]}), None)
    if key is None:
        raise ManifestError(f"{root / path}: no column holds the slides' ids, such as {names[0]}")
    rows = {str(line[key]): dict(zip(header, line)) for line in lines[1:] if line[key] is not None}
    return rows, header


def _text(cell: Any) -> str | None:
    if cell is None or cell == "":
        return None
    return str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell)


def _flags(key: str, rows: list[dict[str, str | None]], columns: list[str]) -> list[str | None]:
    """0 or 1 of one marker for each row, from the first column named for it that says something known.

    Words count before numbers, wherever they stand: a grade or a share is evidence, a verdict is the answer.
    """
    named = [column for column in columns if _WORDS[key].search(column)]
    texts = [[(row.get(column) or "").strip().lower() for column in named] for row in rows]
    # One column is all percentages or all fractions: "1" is one percent beside 20, and all of it beside 0.2.
    shares = [[number for row in texts if (number := _number(row[at])) is not None] for at in range(len(named))]
    fraction = [max(column, default=0.0) <= 1 and any(value % 1 for value in column) for column in shares]
    flags = []
    for row in texts:
        words = (_verdict(key, text) for text in row)
        numbers = (_measure(key, text, 100.0 if scale else 1.0) for text, scale in zip(row, fraction))
        flags.append(next((flag for flag in (*words, *numbers) if flag is not None), None))
    return flags


def _verdict(key: str, text: str) -> str | None:
    if key == "aln" and re.match(r"n[0-9+]", text):
        return str(int(text != "n0"))
    if key in ("er", "pr", "aln") and text in ("1", "+", "0"):
        return str(int(text != "0"))
    return {"positive": "1", "yes": "1", "negative": "0", "no": "0", "-": "0"}.get(text)


def _measure(key: str, text: str, scale: float) -> str | None:
    """The grade of HER2 (immunohistochemistry) or the share of Ki67 as 0 or 1."""
    if key == "her2":
        return {"0": "0", "1": "0", "1+": "0", "3": "1", "3+": "1"}.get(text)
    if key == "ki67":
        share = _number(text.removesuffix("%").rstrip())
        return None if share is None else str(int(share * (1.0 if text.endswith("%") else scale) > KI67_ABOVE))
    return None


def _number(text: str) -> float | None:
    return float(text) if re.fullmatch(r"[0-9]+(?:\.[0-9]+)?", text) else None


def _is_equivocal(row: dict[str, str | None], columns: list[str]) -> bool:
    grades = [(row.get(column) or "").strip() for column in columns if _WORDS["her2"].search(column)]
    return any(grade in ("2", "2+") for grade in grades) and _flags("her2", [row], columns) == [None]


def _official(root: Path, found: list[str]) -> dict[str, str]:
    """Split by slide id from the files {train,val,test}-type-0.json; empty without all three."""
    parts: dict[str, str] = {}
    for split in ("train", "val", "test"):
        path = next((path for path in found if Path(path).name == f"{split}-type-0.json"), None)
        if path is None:
            return {}
        try:
            items = json.loads((root / path).read_text("utf-8"))
            parts |= {str(item["id"]): split for item in items}
        except (ValueError, TypeError, KeyError):
            raise ManifestError(f"{root / path} must be a list of objects with an id") from None
    return parts
