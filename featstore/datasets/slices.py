"""Volumes to rows: one sample a slice, from the headers of the files alone."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int64

from featstore.datasets.progress import told
from featstore.datasets.source import build_table
from featstore.datasets.splits import seeded_rank
from featstore.errors import DecodeError, ManifestError
from featstore.images.content import recognise
from featstore.images.part import Part

if TYPE_CHECKING:
    import pyarrow as pa

NIFTI = (".nii.gz", ".nii")
Shape = tuple[int, ...]
_SLACK = 1e-2  # by which spacing (relative) and direction cosines of one grid may differ from file to file
_HEAD = 4096  # bytes of a file that hold the header of a MetaImage
_CHUNK = 1 << 20  # rows a column chunk: Arrow's text arrays hold 2 GiB each


@dataclass(frozen=True, kw_only=True, slots=True)
class Volume:
    """One volume of a data set: `name` is unique; paths are below the root, `mask_path` lies on the same grid."""

    name: str
    path: str
    group: str | None = None
    study: str | None = None
    split: str = ""
    mask_path: str | None = None


def natural(text: str) -> tuple[tuple[int, int | str], ...]:
    """A sort key that puts case 9 before case 10."""
    return tuple((0, int(piece)) if piece.isdigit() else (1, piece) for piece in re.split(r"([0-9]+)", text) if piece)


def stem(name: str) -> str:
    """A file name without its suffix, which may be .nii.gz."""
    return re.sub(r"(\.nii\.gz|\.[A-Za-z0-9]+)$", "", name, flags=re.IGNORECASE)


def walk(root: Path, below: str, suffixes: tuple[str, ...] = NIFTI) -> tuple[list[str], int]:
    """(paths below `root` of all files under `below` that end so, in natural order; number of AppleDouble files).

    `suffixes` are in lower case and match names in any case.
    Names that start with a dot (`._case.nii.gz`, which macOS adds to archives) are no files of the data set.
    """
    found: list[str] = []
    hidden = 0
    folders, seen = [below], set()
    while folders:
        folder = folders.pop()
        status = os.stat(root / folder)
        if (status.st_dev, status.st_ino) in seen:  # a symlink that leads back
            continue
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(root / folder) as entries:
            for entry in entries:
                relative = f"{folder}/{entry.name}" if folder else entry.name
                if entry.name.lower().endswith(suffixes) and not entry.is_dir():
                    if entry.name.startswith("."):
                        hidden += entry.name.startswith("._")
                    else:
                        found.append(relative)
                elif not entry.name.startswith(".") and entry.is_dir():
                    folders.append(relative)
    return sorted(found, key=natural), hidden


def find_home(root: Path, names: Sequence[str], holds: Sequence[str], layout: str) -> str:
    """The folder below `root` that holds one of `holds` (names or patterns): "" is `root` itself, else one of `names`.

    Raises:
        ManifestError: neither does.
    """
    for name in ("", *names):
        if any(next((root / name).glob(item), None) is not None for item in holds):
            return name
    raise ManifestError(f"{root} has no {' or '.join(holds)}: {layout}")


def join(*pieces: str) -> str:
    """Pieces of a path with forward slashes, empty ones left out."""
    return "/".join(piece for piece in pieces if piece)


def read_json(path: Path) -> dict[str, Any]:
    """`dataset.json` of a challenge; {} where there is none.

    Raises:
        ManifestError: it is not a JSON object.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text("utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError):
        value = None
    if not isinstance(value, dict):
        raise ManifestError(f"{path} must be a JSON object; copy or download it again")
    return value


def read_cfg(path: Path) -> dict[str, str]:
    """The `Key: value` lines of an .cfg file; {} where there is none."""
    if not path.is_file():
        return {}
    pairs = (line.partition(":") for line in path.read_text("utf-8", errors="replace").splitlines())
    return {key.strip(): value.strip() for key, colon, value in pairs if colon and key.strip()}


def class_names(labels: Mapping[str, Any], what: str) -> tuple[str, ...]:
    """Names of the mask values from 0 on, of a mapping "1" -> "liver" as challenges write it.

    Raises:
        ManifestError: a key that is no number from 0 to 255.
    """
    if any(not (key.isascii() and key.isdigit() and int(key) < 256) for key in labels):
        raise ManifestError(f"{what}: `labels` must map numbers from 0 to 255 to names, got {sorted(labels)[:5]}")
    names = {int(key): str(name) for key, name in labels.items()}
    return tuple(names.get(value, f"label {value}") for value in range(max(names, default=-1) + 1))


def folds(names: Sequence[str], count: int = 5, seed: int = 0) -> dict[str, str]:
    """A fold "0" ... for each name, equally many in each, in the order of their seeded ranks."""
    order = sorted(set(names), key=lambda name: (seeded_rank(name, seed), name))
    return {name: str(place % count) for place, name in enumerate(order)}


def fold_split(fold: str, test: int) -> str:
    """ "test" for the fold that is left out, else "train"."""
    return "test" if fold == str(test) else "train"


def check_fold(fold: int, count: int = 5) -> None:
    """Raise ManifestError for a fold that there is not."""
    if not 0 <= fold < count:
        raise ManifestError(f"option fold counts from 0 to {count - 1}, got {fold}")


def systematic(names: Sequence[str], *, test: int, val: int) -> dict[str, str]:
    """Every `test`-th of the sorted names is "test", every `val`-th of the others "val", the rest "train"."""
    order = sorted(names, key=natural)
    tests = set(order[test - 1 :: test])
    rest = [name for name in order if name not in tests]
    vals = set(rest[val - 1 :: val])
    return {name: "test" if name in tests else "val" if name in vals else "train" for name in order}


def measure(root: Path, paths: Sequence[str]) -> dict[str, Shape | None]:
    """(x, y, z in anatomical order, channels) of volumes by their headers; None where there is none to read."""
    from featstore.images.nifti import volume_shape

    def one(path: str) -> Shape | None:
        try:
            return tuple(volume_shape(root / path))
        except (DecodeError, OSError):  # a dangling link too: registration tells missing files by itself
            return None

    names = list(dict.fromkeys(paths))
    with ThreadPoolExecutor(8) as pool:  # network file systems answer many at once
        return dict(zip(names, told(pool.map(one, names, chunksize=64), "headers", len(names))))


@dataclass(frozen=True, eq=False, slots=True)
class Grid:
    """Where the voxels of a volume lie: `affine` takes indices of the array as stored to millimetres.

    `placed` is False where the file does not say (NIfTI with neither qform nor sform) and the affine is a convention.
    """

    shape: Shape
    affine: Float[np.ndarray, "4 4"]
    placed: bool

    def matches(self, mask: "Grid") -> bool:
        """Whether slice i of both, turned to anatomical orientation, is the same place of the body.

        Spacing may differ by 1 %, origins by half a voxel. Where either is not `placed`, axes must be stored alike.
        """
        from nibabel.orientations import aff2axcodes, inv_ornt_aff, io_orientation

        def canonical(grid: "Grid") -> tuple[Shape, Float[np.ndarray, "4 4"]]:
            turn = io_orientation(grid.affine)  # type: ignore[no-untyped-call]
            shape = tuple(grid.shape[axis] for axis in np.argsort(turn[:, 0]))
            return shape, np.asarray(grid.affine @ inv_ornt_aff(turn, grid.shape))  # type: ignore[no-untyped-call]

        alike = aff2axcodes(self.affine) == aff2axcodes(mask.affine)  # type: ignore[no-untyped-call]
        if not (self.placed and mask.placed):
            return bool(alike and self.shape == mask.shape)
        (shape, here), (of_mask, there) = canonical(self), canonical(mask)
        if shape != of_mask:
            return False
        if alike:  # rounded spacings do not move the first voxel as stored
            here, there = self.affine, mask.affine
        spacing, other = (np.linalg.norm(affine[:3, :3], axis=0) for affine in (here, there))
        if not np.allclose(spacing, other, rtol=_SLACK, atol=0):
            return False
        if np.abs(here[:3, :3] / spacing - there[:3, :3] / other).max() > _SLACK:
            return False
        return bool(np.abs(np.linalg.solve(here[:3, :3], there[:3, 3] - here[:3, 3])).max() <= 0.5)


def read_grid(path: Path) -> Grid | None:
    """The grid of a NIfTI file or MetaImage by its header; None where it cannot be read."""
    import nibabel
    from nibabel.spatialimages import HeaderDataError

    from featstore.images.metaimage import read_header

    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
        if recognise(head) == "MetaImage":
            volume = read_header(head).volume
            return Grid(volume.shape, volume.affine, True)
        image: Any = nibabel.load(path)
        header = image.header
        placed = bool(header["qform_code"] or header["sform_code"])
        return Grid((*image.shape, 1, 1, 1)[:3], np.asarray(image.affine, np.float64), placed)
    except (DecodeError, OSError, KeyError, ValueError, HeaderDataError, nibabel.filebasedimages.ImageFileError):
        return None


def on_one_grid(root: Path, pairs: Sequence[tuple[str, str]]) -> list[bool]:
    """For each (image, mask) whether their headers say that they lie on one grid; see `Grid.matches`."""
    from nibabel.imageglobals import LoggingOutputSuppressor

    def one(pair: tuple[str, str]) -> bool:
        if pair[0] == pair[1]:
            return True
        image, mask = (read_grid(root / path) for path in pair)
        return image is not None and mask is not None and image.matches(mask)

    # nibabel would write each header that it mends to the screen.
    with LoggingOutputSuppressor(), ThreadPoolExecutor(8) as pool:
        return list(told(pool.map(one, pairs, chunksize=64), "grids", len(pairs)))


def _usable(
    root: Path, volumes: Sequence[Volume], shapes: Mapping[str, Shape | None]
) -> tuple[list[str | None], list[str]]:
    """(the mask of each volume that lies on its grid, else None; notes on the others)."""
    used: list[str | None] = [None] * len(volumes)
    unread = other = 0
    pairs: dict[int, tuple[str, str]] = {}
    for number, volume in enumerate(volumes):
        size = shapes[volume.path]
        if volume.mask_path is None or size is None:
            continue
        of_mask = shapes[volume.mask_path]
        unread += of_mask is None
        other += of_mask is not None and of_mask[:3] != size[:3]
        if of_mask is not None and of_mask[:3] == size[:3]:
            pairs[number] = (volume.path, volume.mask_path)
    fits = on_one_grid(root, list(pairs.values()))
    for (number, (_, mask)), fit in zip(pairs.items(), fits):
        used[number] = mask if fit else None
    notes = []
    if unread:
        notes.append(f"{unread} label volumes have no readable header and are not used as masks")
    if other:
        notes.append(f"{other} label volumes are not on the grid of their image and are not used as masks")
    if turned := fits.count(False):
        notes.append(
            f"{turned} label volumes have the shape of their image, but by the headers another direction, spacing or "
            "place; they are not used as masks"
        )
    return used, notes


def nifti_slices(
    root: Path,
    volumes: Sequence[Volume],
    derived: Mapping[str, Sequence[str | None]],
    original: "pa.Table | None" = None,
    *,
    channel: str = "",
    every: int = 1,
) -> tuple["pa.Table", list[str]]:
    """(table of a `Source`, notes): a row for every axial slice of every volume, from foot to head.

    `derived` and `original` have one value a volume. `channel` is read of volumes that have several. A mask whose
    grid by the headers (shape, direction, spacing, origin) is not that of its image is not used. A volume without
    readable header keeps one row, which extraction marks failed.

    Raises:
        ManifestError: a volume lacks the channel, `every` is below 1, or two volumes have one name.
    """
    masks = [volume.mask_path for volume in volumes if volume.mask_path is not None]
    shapes = measure(root, [volume.path for volume in volumes] + masks)
    sizes = [shapes[volume.path] for volume in volumes]
    wanted = max(Part(channel=channel or None).channels, default=0)
    for volume, size in zip(volumes, sizes):
        if size is not None and wanted >= size[3]:
            raise ManifestError(
                f"option channel {channel!r}: {volume.path} has {size[3]} channels, counted from 0; ask for fewer"
            )
    used, of_masks = _usable(root, volumes, shapes)
    depths = [1 if size is None else max(size[2], 1) for size in sizes]
    several = [size is not None and size[3] > 1 for size in sizes]
    deepest = max(depths, default=0)
    plain = [str(Part(axis="axial", index=index)) for index in range(deepest)]
    chosen = [str(Part(axis="axial", index=index, channel=channel or "0")) for index in range(deepest)]
    notes = []
    if unread := sum(size is None for size in sizes):
        notes.append(f"{unread} volumes have no readable header; each keeps one row, which extraction marks failed")
    notes += of_masks
    if any(several):
        notes.append(f"{sum(several)} volumes have several channels; channel {channel or '0'} is read")
    table = slice_table(
        volumes, depths, derived, original,
        parts=(plain, chosen), several=several, masks=used, mask_parts=plain, every=every,
    )  # fmt: skip
    return table, notes


def slice_table(
    volumes: Sequence[Volume],
    depths: Sequence[int],
    derived: Mapping[str, Sequence[str | None]],
    original: "pa.Table | None" = None,
    *,
    parts: tuple[Sequence[str], Sequence[str]],
    several: Sequence[bool] = (),
    masks: Sequence[str | None],
    mask_parts: Sequence[str],
    every: int = 1,
    splits: Sequence[str] | None = None,
) -> "pa.Table":
    """The table of a `Source` with every `every`-th slice of each volume, in order; ids are `<volume>/<slice>`.

    `parts[0][i]` is the text of slice i, `parts[1][i]` that of volumes marked in `several`. `masks` and `derived` have
    one value a volume. `splits`, one value a slice in order (before `every`), stands for those of the volumes.

    Raises:
        ManifestError: `every` is below 1, or two volumes have one name.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if every < 1:
        raise ManifestError(f"option every is 1 (all slices) or more, got {every}")
    names = [volume.name for volume in volumes]
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ManifestError(f"{len(twice)} volumes are there twice, such as {twice[0]}; keep one file of each")
    counts = -(-np.asarray(depths, np.int64) // every)
    row = np.repeat(np.arange(len(volumes)), counts)  # (N,) number of the volume
    z = (np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)) * every  # (N,)

    def text(values: Sequence[str | None], index: Int64[np.ndarray, " N"]) -> "pa.ChunkedArray":
        array = pa.array(values, pa.string())
        pieces = [array.take(pa.array(index[at : at + _CHUNK])) for at in range(0, len(index), _CHUNK)]
        return pa.chunked_array(pieces, pa.string())

    name = text(names, row)
    chosen = parts[0] if not any(several) else [*parts[0], *parts[1]]
    shift = np.array(several, np.int64)[row] * len(parts[0]) if any(several) else 0
    has_mask = np.array([mask is not None for mask in masks], bool)[row] if len(volumes) else np.zeros(0, bool)
    start = np.repeat(np.cumsum(depths) - np.asarray(depths), counts) if len(volumes) else z
    reserved = {
        "id": pc.binary_join_element_wise(name, text([f"{at:04d}" for at in range(max(depths, default=0))], z), "/"),
        "path": text([volume.path for volume in volumes], row),
        "group": text([volume.group for volume in volumes], row),
        "study": text([volume.study for volume in volumes], row),
        "split": text([volume.split for volume in volumes], row) if splits is None else text(splits, start + z),
        "mask_path": text(masks, row),
        "part": text(chosen, z + shift),
        "mask_part": text([*mask_parts, None], np.where(has_mask, z, len(mask_parts))),
        "volume": name,
        "z": pa.chunked_array([pa.array(z, pa.int64())]),
    }
    columns = {key: text(values, row) for key, values in derived.items()}
    given = {} if original is None else {key: original[key].to_pylist() for key in original.column_names}
    # The number of rows must hold also where there is no column.
    verbatim = pa.table({"": pa.nulls(len(row)), **{key: text(values, row) for key, values in given.items()}})
    return build_table(verbatim.drop_columns([""]), reserved, columns)
