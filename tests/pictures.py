"""Small synthetic image data sets for tests."""

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from featstore.configs import RegisterConfig
from featstore.datasets.manifest import Manifest
from featstore.register import register


def write_pictures(root: Path, count: int, *, start: int = 0, size: int = 40) -> list[str]:
    """Grey PNGs whose brightness pattern tells the class (`number % 3`); returns their relative paths."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    names = []
    for number in range(start, start + count):
        rng = np.random.default_rng(number)
        pixels = rng.integers(0, 120, (size, size), dtype=np.uint8)
        pixels[:, : size // 2] += np.uint8(60 * (number % 3))
        names.append(f"images/{number:05d}.png")
        Image.fromarray(pixels).save(root / names[-1])
    return names


def write_table(root: Path, names: list[str]) -> None:
    """`table.csv`: path, patient (two images each), split, class."""
    with open(root / "table.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "patient", "split", "kind", "first", "second"])
        for number, name in enumerate(names):
            patient = number // 2
            split = ("train", "train", "val", "test")[patient % 4]
            kind = int(Path(name).stem) % 3
            writer.writerow(
                [name, f"p{patient:04d}", split, "abc"[kind], int(kind == 0), "" if number % 7 == 0 else int(kind == 1)]
            )


CONFIG = RegisterConfig(table=Path("table.csv"), group_column="patient", split_column="split", label_columns="kind")


def register_pictures(store: Path, root: Path, count: int, name: str = "pics") -> Manifest:
    """Write `count` images and register them."""
    write_table(root, write_pictures(root, count))
    return register(store, name, root, CONFIG)[0]


def tree_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of a set that must be equal however it was made (all but `runs`)."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] != "runs"
    }


def sets_of(store: Path) -> dict[str, dict[str, bytes]]:
    """`tree_bytes` of every set of the data set `pics`, by the name of its folder."""
    return {folder.name: tree_bytes(folder) for folder in sorted((store / "sets/pics").iterdir())}
