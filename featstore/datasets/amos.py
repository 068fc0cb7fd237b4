"""AMOS22: abdominal CT and MRI with masks of 15 organs; one row an axial slice.

Layout: `amos22/{imagesTr,labelsTr,imagesVa,labelsVa,imagesTs}/amos_0001.nii.gz` and `dataset.json`; ROOT is the folder
with `imagesTr` or the one around it. Some folders may be absent.

Rows: every axial slice of every volume, counted from foot to head whatever the file's orientation; `volume` is the case
(`amos_0001`), `z` the slice. The mask is the label volume, same slice: 0 background, 1 spleen ... 15 prostate/uterus.
Column `modality` is CT for case numbers below 500 and MRI from 500 on. nnU-Net's conversion draws the line at 410
(imagesTr), 409 (imagesVa) and 500 (imagesTs); that is the same unless a number lies between.

Split: imagesTr is "train" and imagesVa "val", as released (240 and 120 volumes). imagesTs has no labels and is left
out; `--option unlabelled=true` keeps it with an empty split. Column `split_c` follows the study of DINOv2 in radiology
(80/20/50 of 150 labelled volumes): every 3rd of the first 150 CT volumes of imagesTr by number is test, every 5th of
the others val. Which 150 the paper took is not published, so this is near to it, not equal. Groups: the case; the
release names no patients. `--option every=5` keeps every fifth slice.

Licence: Creative Commons BY-NC family, see Zenodo record 7262581. Source: Ji et al. 2022.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from featstore.datasets.slices import Volume, find_home, join, natural, nifti_slices, read_json, stem, systematic, walk
from featstore.datasets.source import Source
from featstore.errors import ManifestError

ORGANS = (
    "background", "spleen", "right kidney", "left kidney", "gall bladder", "esophagus", "liver", "stomach", "aorta",
    "postcava", "pancreas", "right adrenal gland", "left adrenal gland", "duodenum", "bladder", "prostate/uterus",
)  # fmt: skip
FIRST_MRI = 500
_PARTS = (("Tr", "train", "training"), ("Va", "val", "validation"), ("Ts", "", "test"))
_LAYOUT = "an AMOS22 folder holds imagesTr, labelsTr, imagesVa, labelsVa and imagesTs with amos_NNNN.nii.gz"
_NUM_C = 150


def read(root: Path, *, unlabelled: bool = False, every: int = 1) -> Source:
    """The slices of an AMOS22 folder; see the text of this module.

    Raises:
        ManifestError: no images, or a file that is not called amos_NNNN.
    """
    home = find_home(root, ("amos22",), ("imagesTr", "imagesVa"), _LAYOUT)
    listed = read_json(root / home / "dataset.json")
    volumes: list[Volume] = []
    notes = ["AMOS22: Creative Commons BY-NC family (Zenodo record 7262581); cite Ji et al. 2022"]
    hidden = bare = 0
    for ending, split, key in _PARTS:
        images, skipped = _files(root, join(home, f"images{ending}"))
        masks, more = _files(root, join(home, f"labels{ending}"))
        hidden += skipped + more
        if isinstance(listed.get(key), list) and images and len(listed[key]) != len(images):
            notes.append(f"dataset.json lists {len(listed[key])} {key} cases, images{ending} holds {len(images)}")
        for name, path in images.items():
            if name not in masks and not unlabelled:
                bare += 1
                continue
            split_here = split if name in masks else ""
            volumes.append(Volume(name=name, path=path, group=name, split=split_here, mask_path=masks.get(name)))
    if bare:
        notes.append(f"{bare} volumes without labels are left out; --option unlabelled=true keeps them")
    if hidden:
        notes.append(f"{hidden} AppleDouble files (._*) are passed over")
    modality = ["MRI" if _number(volume) >= FIRST_MRI else "CT" for volume in volumes]
    derived: dict[str, Sequence[str | None]] = {"modality": modality, "split_c": _split_c(volumes, modality)}
    table, more_notes = nifti_slices(root, volumes, derived, every=every)
    return Source(
        table=table,
        root=root,
        adapter="amos",
        default_task=None,
        tasks=(),
        label_columns=(),
        split_origin="official",
        groups_known=False,
        notes=(
            *notes,
            *more_notes,
            "modality by case number: MRI from 500 on (nnU-Net: above 410, 409, 500 in imagesTr, -Va, -Ts)",
            "split_c: 150 volumes, every 3rd test, every 5th of the others val; the paper's own list is not published",
        ),
        mask_classes=ORGANS,
    )


def _files(root: Path, folder: str) -> tuple[dict[str, str], int]:
    if not (root / folder).is_dir():
        return {}, 0
    paths, hidden = walk(root, folder)
    return {stem(path.rpartition("/")[2]): path for path in paths}, hidden


def _number(volume: Volume) -> int:
    found = re.fullmatch(r"amos_([0-9]+)", volume.name)
    if found is None:
        raise ManifestError(
            f"{volume.path}: volumes of AMOS22 are called amos_NNNN.nii.gz; the number tells CT from MRI"
        )
    return int(found[1])


def _split_c(volumes: list[Volume], modality: list[str]) -> list[str | None]:
    pool = [volume.name for volume, kind in zip(volumes, modality) if kind == "CT" and volume.split == "train"]
    chosen = systematic(sorted(pool, key=natural)[:_NUM_C], test=3, val=5)
    return [chosen.get(volume.name, "") for volume in volumes]
