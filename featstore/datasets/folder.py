"""A folder of images: one sub-folder per class, or none; `train`, `val`, `test` above the classes are splits.

Images are PNG, JPEG, TIFF, WebP, BMP, GIF, DICOM (also without a suffix), NIfTI (of a pair the .hdr), MetaImage, NumPy
and MATLAB or HDF5 arrays, in folders or inside .zip and .tar archives, which are read in place: `cxr.zip` counts as the
folder it lies in.
Of a volume every slice is a sample, of a DICOM or TIFF file the first picture; `--frames first` or `all` says
otherwise.
"""

from pathlib import Path

from featstore.configs import Frames
from featstore.datasets.expand import VOLUMES, expand
from featstore.datasets.source import Source, build_table
from featstore.datasets.splits import SPLIT_NAMES, split_by_group
from featstore.datasets.walk import find_files
from featstore.errors import ConfigError, DecodeError, ManifestError
from featstore.packs import list_members

SUFFIXES = {
    ".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".bmp", ".gif", ".dcm", ".dicom", ".dic", ".ima", *VOLUMES,
}  # fmt: skip
ARCHIVES = (".zip", ".tar")
PAIRS = (".hdr", ".hdr.gz")


def find_images(root: Path) -> list[str]:
    """Relative paths of all images below `root`, members of archives as `cxr.zip!/a.png`, sorted.

    A file without a suffix is one if it is a DICOM file with its mark.

    Raises:
        ManifestError: as `find_files`; an archive that cannot be read.
    """
    found = []
    for path in find_files(root):
        name = path.rsplit("/", 1)[-1]
        if path.lower().endswith(ARCHIVES):
            found += [f"{path}!/{member}" for member in list_members(root / path) if _is_named(member)]
        elif is_image(root, path) or ("." not in name and _has_mark(root / path)):
            found.append(path)
    return sorted(found)


def is_image(root: Path, path: str) -> bool:
    """Whether a file counts as an image by its name; a .hdr must be the header of a NIfTI pair, whose .img does not."""
    from featstore.images.opening import kind_of_file

    if path.lower().endswith(PAIRS):
        try:
            return not path.rsplit("/", 1)[-1].startswith(".") and kind_of_file(root / path) == "NIfTI"
        except (DecodeError, OSError):
            return False
    return _is_named(path)


def _is_named(path: str) -> bool:
    """By the name alone; half of a pair is no image where it cannot find the other half."""
    name = path.rsplit("/", 1)[-1].lower()
    return not name.startswith(".") and name.endswith(tuple(SUFFIXES)) and not name.endswith(PAIRS)


def _has_mark(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def read(root: Path, *, seed: int = 0, frames: Frames | None = None) -> Source:
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
    # An archive stands for the folder that it lies in.
    parts = [tuple(part for part in Path(path).parts[:-1] if not part.endswith("!")) for path in paths]
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
    expanded = expand(root, paths, frames)
    reserved = {
        "id": pa.array(expanded.ids(paths)),
        "path": pa.array([paths[row] for row in expanded.rows]),
        "split": pa.array([splits[row] for row in expanded.rows]),
        **expanded.places(paths),
    }
    table = pa.table({"label": pa.array([labels[row] for row in expanded.rows], pa.string())})
    classes = {label for label in labels if label is not None}
    return Source(
        table=build_table(table, reserved),
        root=root,
        adapter="folder",
        default_task=None,
        tasks=(),
        label_columns=("label",) if len(classes) > 1 else (),
        split_origin="folders" if split_folders else f"seeded, 70/10/20, seed {seed}",
        groups_known=False,
        notes=(f"{expanded.unread} files could not be opened; extraction says why",) if expanded.unread else (),
    )
