"""The 1,797 real handwritten digits that ship with scikit-learn, written once as 8 x 8 PNG files.

They are the test part of the UCI "Optical Recognition of Handwritten Digits" set; grey values 0..16 become 0..255.
"""

from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from featstore.datasets.phantom import is_complete, write_image, write_once, write_table
from featstore.datasets.source import Source, build_table, read_csv
from featstore.datasets.splits import split_by_group

_SEED = 0
_NOTE = (
    "Optical Recognition of Handwritten Digits (Alpaydin and Kaynak 1998), UCI, CC BY 4.0, as shipped by scikit-learn"
)
_WRITERS = "several people wrote these digits and no row names its writer, so one hand stands in all splits"


def read(root: Path) -> Source:
    """The digits in `root`, written there when the folder is absent, empty or was left unfinished.

    The label is the column `digit`; the split is seeded by image, about 60/15/25 %.

    Raises:
        ManifestError: `root` holds other files.
    """
    if not is_complete(root, "digits"):
        generate(root)
    original = read_csv(root / "metadata.csv")
    reserved = {
        "id": pc.replace_substring_regex(original["path"], r"^images/(.*)\.png$", r"\1"),
        "path": original["path"],
        "split": original["split"],
    }
    return Source(
        table=build_table(original, reserved),
        root=root,
        adapter="digits",
        default_task=None,
        tasks=(),
        label_columns=("digit",),
        split_origin=f"seeded by image, 60/15/25, seed {_SEED}",
        groups_known=False,
        notes=(_NOTE, _WRITERS),
    )


def generate(root: Path) -> None:
    """Write images/NNNN.png and metadata.csv (path, digit, split); a finished folder is kept.

    Raises:
        ManifestError: `root` holds other files.
    """

    def write(folder: Path) -> None:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        names = [f"{number:04d}" for number in range(len(bunch.target))]
        splits = split_by_group(names, fractions=(0.60, 0.15, 0.25), seed=_SEED)
        for name, values in zip(names, bunch.images, strict=True):
            write_image(folder / "images" / f"{name}.png", np.rint(values * (255 / 16)).astype(np.uint8))
        rows = [
            {"path": f"images/{name}.png", "digit": str(digit), "split": split}
            for name, digit, split in zip(names, bunch.target, splits, strict=True)
        ]
        write_table(folder / "metadata.csv", ("path", "digit", "split"), rows)

    write_once(root, {"layout": "digits"}, write)
