"""ChestX-ray14, CheXpert, a folder and a table."""

from pathlib import Path

import numpy as np
from PIL import Image
from standins import write_chexpert, write_nih

from miniatures import Miniature


def nih(root: Path) -> Miniature:
    rows = write_nih(root, num_patients=12)
    return Miniature(root=root, samples=len(rows))


def chexpert(root: Path) -> Miniature:
    release = write_chexpert(root, num_patients=24)
    samples = sum(len((release / name).read_text().splitlines()) - 1 for name in ("train.csv", "valid.csv"))
    return Miniature(root=release, samples=samples, tasks=("chexpert-5",))


def _picture(path: Path, level: int, rng: np.random.Generator) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((level + rng.integers(0, 40, (32, 28))).astype(np.uint8)).save(path)


def folder(root: Path) -> Miniature:
    rng = np.random.default_rng(0)
    for number in range(40):
        _picture(root / ("dark" if number % 2 else "bright") / f"{number:02d}.png", 20 if number % 2 else 180, rng)
    return Miniature(root=root, samples=40, labels="label")


def table(root: Path) -> Miniature:
    rng = np.random.default_rng(0)
    lines = ["file,patient,bright"]
    for number in range(40):
        _picture(root / f"images/{number:02d}.png", 180 if number % 2 else 20, rng)
        lines.append(f"images/{number:02d}.png,p{number // 2},{number % 2}")
    (root / "labels.csv").write_text("\n".join(lines) + "\n")
    config = {"table": Path("labels.csv"), "path_column": "file", "group_column": "patient", "label_columns": "bright"}
    return Miniature(root=root, samples=40, config=config, labels="bright")


WRITERS = {"nih": nih, "chexpert": chexpert, "folder": folder, "table": table}
