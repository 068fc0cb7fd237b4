"""A folder of images beside a folder of masks with the same names: any segmentation set of your own.

Layout: images/a.png with masks/a.png; sub-folders must agree, suffixes need not, and the name of a mask may end in
_mask, _seg, _label or _gt (for volumes too: images/a.nii.gz, masks/a_seg.nii.gz, slice by slice). Folders train, val
and test above or below these are the splits; without them images are split 70/10/20, seeded.

Options: `images` and `masks` name the two folders; `values` says what the masks' values mean: `255:1,128:2` maps, `1`
makes class 1 of all that is not 0, and without it integers are classes (a mask of 0 and 255 is taken as 0 and 1).
Images without a mask stay, without one. A mask volume that by its header lies on another grid than its image is not
used, and one with another number of slices is an error. No patients are known. Licence: your data's own.
"""

import re
from pathlib import Path

import pyarrow as pa

from featstore.datasets.expand import expand
from featstore.datasets.folder import is_image
from featstore.datasets.source import Source, build_table
from featstore.datasets.splits import SPLIT_NAMES, split_by_group
from featstore.datasets.walk import find_files
from featstore.errors import ManifestError

_ENDING = re.compile(r"[_-](mask|masks|seg|segmentation|label|labels|gt)$", re.IGNORECASE)


def read(root: Path, *, images: str = "images", masks: str = "masks", values: str = "") -> Source:
    """One row an image (or slice), with the mask of its name.

    Raises:
        ManifestError: no images in such a folder, no mask that fits, two masks of one image, or a mask with another
            number of slices than its image.
    """
    found = [path for path in find_files(root) if is_image(root, path)]
    pictures = {_key(path, images): path for path in found if _inside(path, images)}
    if not pictures:
        raise ManifestError(f"{root} has no images in a folder called {images!r}; name it by --option images=NAME")
    drawn: dict[str, str] = {}
    for path in found:
        if not _inside(path, masks):
            continue
        key = _key(path, masks)
        bare = key if key in pictures else _ENDING.sub("", key)
        if bare in drawn:
            raise ManifestError(f"{root}: {drawn[bare]} and {path} are masks of one image; keep one")
        drawn[bare] = path
    keys = sorted(pictures)
    paths = [pictures[key] for key in keys]
    held = [drawn.get(key) for key in keys]
    if not any(held):
        raise ManifestError(
            f"{root}: no file in a folder called {masks!r} has the name of an image; name it by --option masks=NAME"
        )
    splits = [_split(path) for path in paths]
    if any(splits):
        origin = "folders"
    else:
        splits, origin = split_by_group([f"id:{path}" for path in paths]), "seeded by image, 70/10/20, seed 0"
    expanded = expand(root, paths, None)
    of_rows, own, more = expanded.masks(root, paths, held)
    parts = []
    for mask, part in zip(of_rows, own):
        pieces = [part] if part else []
        pieces += [f"values={values}"] if values and mask else []
        parts.append("&".join(pieces) or None)
    reserved = {
        "id": pa.array(expanded.ids(paths)),
        "path": pa.array([paths[row] for row in expanded.rows]),
        "split": pa.array([splits[row] for row in expanded.rows]),
        "mask_path": pa.array(of_rows, pa.string()),
        "mask_part": pa.array(parts, pa.string()),
        **expanded.places(paths),
    }
    missing = held.count(None)
    strangers = len(drawn.keys() - pictures.keys())
    notes = ["no patients are known"]
    notes += [f"{missing} images have no mask"] if missing else []
    notes += [f"{strangers} masks have no image"] if strangers else []
    notes += more
    return Source(
        table=build_table(pa.table({"file": pa.array([keys[row] for row in expanded.rows])}), reserved),
        root=root,
        adapter="image-masks",
        default_task=None,
        tasks=(),
        label_columns=(),
        split_origin=origin,
        groups_known=False,
        notes=tuple(notes),
    )


def _inside(path: str, folder: str) -> bool:
    return f"/{folder.lower().strip('/')}/" in f"/{path.lower().rsplit('/', 1)[0]}/"


def _key(path: str, folder: str) -> str:
    """The path without that folder and without suffix: what an image and its mask have in common."""
    stem = re.sub(r"\.(nii|hdr)\.gz$|\.[^./]+$", "", path, flags=re.IGNORECASE)
    return re.sub(rf"(^|/){re.escape(folder.strip('/'))}/", r"\1", stem, count=1, flags=re.IGNORECASE)


def _split(path: str) -> str:
    return next((SPLIT_NAMES[part] for part in path.lower().split("/")[:-1] if part and part in SPLIT_NAMES), "")
