"""Files that hold many pictures, a row for each: slices of volumes, frames and pages, by kind or on request."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from featstore.configs import Frames
from featstore.datasets.progress import told
from featstore.datasets.slices import on_one_grid
from featstore.errors import DecodeError, ManifestError
from featstore.images.part import Part

if TYPE_CHECKING:
    import pyarrow as pa

# A sample of one of these would be one slice out of many; without being asked, every slice is a sample.
# Of a NIfTI pair the header stands for both files.
VOLUMES = (".nii", ".nii.gz", ".hdr", ".hdr.gz", ".mha", ".mhd", ".npy", ".npz", ".h5", ".hdf5", ".hdf", ".mat")
VIDEOS = (".mp4", ".avi", ".mkv", ".mov", ".mpg")
SINGLE = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".pgm", ".ppm")  # hold one picture; not worth opening
ORIENTED = (".nii", ".nii.gz", ".hdr", ".hdr.gz", ".mha", ".mhd")  # say where their voxels lie


@dataclass(frozen=True, slots=True)
class Expanded:
    """Rows after expansion: number of the file's row, part (None: the whole file), and place along the volume.

    `pictures` are, for each row before, all parts of its file; empty where it was not opened, None where it cannot be.
    """

    rows: list[int]
    parts: list[str | None]
    z: list[int | None]
    unread: int
    pictures: list[list[Part] | None]

    @property
    def any(self) -> bool:
        """Whether any row is a part of its file."""
        return any(part is not None for part in self.parts)

    def places(self, paths: Sequence[str]) -> dict[str, "pa.Array"]:
        """Columns `part`, `volume` (the file) and `z` of the expanded rows; none if no file was expanded."""
        import pyarrow as pa

        if not self.any:
            return {}
        volumes = [paths[row] if part is not None else None for row, part in zip(self.rows, self.parts)]
        return {
            "part": pa.array(self.parts, pa.string()),
            "volume": pa.array(volumes, pa.string()),
            "z": pa.array(self.z, pa.int64()),
        }

    def ids(self, ids: Sequence[str]) -> list[str]:
        """`id#part` for every part of a file, the id itself for a whole one."""
        return [ids[row] if part is None else f"{ids[row]}#{part}" for row, part in zip(self.rows, self.parts)]

    def masks(
        self, root: Path, paths: Sequence[str], masks: Sequence[str | None]
    ) -> tuple[list[str | None], list[str | None], list[str]]:
        """(`mask_path` and `mask_part` of the expanded rows, notes): a stack of masks is paired picture by picture.

        `paths` and `masks` have one value a row before expansion; several masks of one image are joined by "|". A mask
        of one picture serves every row; of a 4-D volume all channels share the slices of a 3-D mask. Volumes that by
        their headers lie on another grid, and masks of stacks that cannot be opened, are not used.

        Raises:
            ManifestError: a mask has another number of pictures than its image, or it is a stack in an archive.
        """
        of_row = [[] if text is None else text.split("|") for text in masks]
        pairs = {
            (paths[row], mask): row
            for row, names in enumerate(of_row)
            for mask in names
            if _must_open(paths[row], self.pictures[row], mask)
        }
        if not pairs:
            return [masks[row] for row in self.rows], [None] * len(self.rows), []
        with ThreadPoolExecutor(8) as pool:
            opened = pool.map(lambda pair: _pair(root, pair[0], self.pictures[pairs[pair]] or [], pair[1]), pairs)
            found = dict(zip(pairs, told(opened, "masks", len(pairs))))
        both = [pair for pair, parts in found.items() if parts and _on_grids(*pair, self.pictures[pairs[pair]], parts)]
        elsewhere = {pair for pair, fits in zip(both, on_one_grid(root, both)) if not fits}
        unread = sum(parts is None for parts in found.values())

        def of(row: int, z: int) -> tuple[str | None, str | None]:
            here = [(paths[row], mask) for mask in of_row[row]]
            kept = [pair for pair in here if pair not in elsewhere and found.get(pair, [""]) is not None]
            texts = [(found.get(pair) or [""])[z if pair in found else 0] for pair in kept]
            return "|".join(mask for _, mask in kept) or None, "|".join(texts) if any(texts) else None

        result = [of(row, z or 0) for row, z in zip(self.rows, self.z)]
        notes = []
        if unread:
            notes.append(f"{unread} masks of stacks could not be opened and are not used")
        if elsewhere:
            notes.append(
                f"{len(elsewhere)} masks lie on another grid than their volume by the headers (direction, size, "
                "spacing or place) and are not used"
            )
        return [path for path, _ in result], [part for _, part in result], notes


def _must_open(image: str, pictures: list[Part] | None, mask: str) -> bool:
    """Whether it takes the header of a mask to pair it: not of one picture with one picture."""
    if "!/" in image or pictures is None or mask.lower().endswith(SINGLE):
        return False
    return len(pictures) > 1 or (mask.lower().endswith(VOLUMES) and "!/" not in mask)


def _pair(root: Path, image: str, pictures: list[Part], mask: str) -> list[str] | None:
    """The part of the mask for each picture of its image ("" is the whole file); None where it cannot be opened."""
    from featstore.images.opening import list_parts

    count = max(len(pictures), 1)
    if "!/" in mask:
        raise ManifestError(
            f"{image} has {count} pictures, and its mask {mask} lies in an archive, where its pictures are not "
            "counted; unpack it"
        )
    try:
        own = list_parts(root / mask)
    except (DecodeError, OSError):
        return None if count > 1 else [""]
    if len(own) == 1:
        return [str(own[0])] * count
    if len(own) == count:
        return [str(part) for part in own]
    slices: dict[Part, int] = {}
    places = [slices.setdefault(replace(part, channel=None), len(slices)) for part in pictures]
    if len(own) == len(slices):
        return [str(own[place]) for place in places]
    raise ManifestError(
        f"{image} has {count} pictures to pair and its mask {mask} has {len(own)}; they must be one stack (or the mask "
        "one picture; --frames all counts every page and frame of an image)"
    )


def _on_grids(image: str, mask: str, pictures: list[Part] | None, parts: list[str]) -> bool:
    """Whether both files say where their voxels lie, and slices are paired rather than one picture with all."""
    if not (image.lower().endswith(ORIENTED) and mask.lower().endswith(ORIENTED)):
        return False
    return len(set(parts)) > 1 or len(pictures or ()) == 1


def expand(root: Path, paths: Sequence[str], frames: Frames | None) -> Expanded:
    """Open the headers of files that may hold several pictures, and make a row of each.

    `frames` "first" keeps one row a file, "all" makes one of every picture; without it volumes and videos give all of
    theirs, and DICOM, TIFF and GIF files their first. A file that cannot be read keeps one row, and fails when it is
    extracted. Members of archives are taken whole.
    """

    def parts_of(path: str) -> list[Part] | None:
        name = path.lower()
        if "!/" in path or name.endswith(SINGLE) or not (frames == "all" or name.endswith((*VOLUMES, *VIDEOS))):
            return []
        try:
            return list_parts(root / path)
        except (DecodeError, OSError):
            return None

    names = list(dict.fromkeys(paths))
    from featstore.images.opening import list_parts

    with ThreadPoolExecutor(8) as pool:
        found = dict(zip(names, told(pool.map(parts_of, names), "files", len(names))))
    rows: list[int] = []
    parts: list[str | None] = []
    z: list[int | None] = []
    for row, path in enumerate(paths):
        several = [str(part) or None for part in found[path] or ()]
        kept = (several[:1] if frames == "first" else several) or [None]
        rows += [row] * len(kept)
        parts += kept
        z += list(range(len(kept))) if kept != [None] else [None]
    unread = sum(item is None for item in found.values())
    return Expanded(rows, parts, z, unread, pictures=[found[path] for path in paths])
