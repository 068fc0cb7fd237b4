"""A folder of images: one sub-folder per class, or none; `train`, `val`, `test` above the classes are splits."""

import os
from pathlib import Path

from featstore.datasets.source import Source
from featstore.datasets.splits import SPLIT_NAMES, split_by_group
from featstore.datasets.table import with_reserved
from featstore.errors import ConfigError, ManifestError

SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".bmp", ".gif"}


def find_images(root: Path) -> list[str]:
    """Relative POSIX paths of all image files below `root`, sorted; hidden files and folders are left out.

    Links to folders are followed, each folder is read once.

    Raises:
        ManifestError: a folder cannot be read, or a name is not UTF-8.
    """
    found = []
    seen = set()
    for folder, folders, names in os.walk(root, onerror=_stop, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:  # a link to a folder that was walked already, or around in a circle
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES:
                found.append((Path(folder) / name).relative_to(root).as_posix())
    odd = [path for path in found if not _is_text(path)]
    if odd:
        raise ManifestError(f"{len(odd)} file names are not UTF-8, such as {odd[0]!r}; rename them")
    return sorted(found)


def _stop(error: OSError) -> None:
    # os.walk would pass over the folder, and its images would be absent without a word.
    raise ManifestError(f"{error.filename}: cannot be read ({error.strerror}); every folder below the root must be")


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def read(root: Path, *, seed: int = 0) -> Source:
    """Class = the folder that holds the image (null for images at the top); split = a first folder named as one.

    Without split folders the images are split 70/10/20, seeded; no patients are known.

    Raises:
        ManifestError: no images, or some lie outside the split folders. ConfigError: a seed, and nothing to draw.
    """
    import pyarrow as pa

    if not root.is_dir():
        raise ManifestError(f"{root}: no such folder")
    paths = find_images(root)
    if not paths:
        raise ManifestError(f"{root}: no images ({', '.join(sorted(SUFFIXES))}) in this folder or below")
    parts = [Path(path).parts[:-1] for path in paths]
    outside = [path for path, part in zip(paths, parts) if not part or part[0].lower() not in SPLIT_NAMES]
    split_folders = not outside
    found = {SPLIT_NAMES[part[0].lower()] for part in parts if part and part[0].lower() in SPLIT_NAMES}
    if outside and "train" in found and len(found) > 1:
        raise ManifestError(
            f"{root} has folders {', '.join(sorted(found))}, and {len(outside)} images lie outside of them, such as "
            f"{outside[0]}; move these away, or name splits in a table (--table, --split-column)"
        )
    if split_folders:
        if seed:
            raise ConfigError(f"--split-seed {seed}: {root} has split folders, so no split is drawn")
        splits = [SPLIT_NAMES[part[0].lower()] for part in parts]
        parts = [part[1:] for part in parts]
    else:
        splits = split_by_group([f"id:{path}" for path in paths], seed=seed)
    labels = ["/".join(part) or None for part in parts]
    nothing: list[str | None] = [None] * len(paths)
    reserved: dict[str, list[str | None]] = {
        "id": list(paths),
        "path": list(paths),
        "group": nothing,
        "study": nothing,
        "split": list(splits),
        "mask_path": nothing,
    }
    classes = {label for label in labels if label is not None}
    return Source(
        table=with_reserved(pa.table({"label": pa.array(labels, pa.string())}), reserved),
        root=root,
        adapter="folder",
        default_task=None,
        tasks=(),
        label_columns=("label",) if len(classes) > 1 else (),
        split_origin="folders" if split_folders else f"seeded, 70/10/20, seed {seed}",
        groups_known=False,
        notes=(),
    )
