"""Electron microscopy: CREMI and AC3/AC4, stacks of sections with every neuron labelled."""

from pathlib import Path
from typing import Any, Literal

from featstore.datasets.slices import Shape, Volume, slice_table, walk
from featstore.datasets.source import Source
from featstore.errors import ManifestError
from featstore.images.part import Part

_RAW = "volumes/raw"
_CREMI = "a CREMI folder holds sample_A_20160501.hdf, sample_B_20160501.hdf, sample_C_20160501.hdf"
_AC34 = "the folder holds AC3_inputs.h5, AC3_labels.h5, AC4_inputs.h5 and AC4_labels.h5, each with the data set `main`"
_NOTE = "a stack shares one animal: neighbouring sections are much alike, also across the split"


def read_cremi(
    root: Path,
    *,
    mask: Literal["neuron_ids", "clefts"] = "neuron_ids",
    padded: bool = False,
    unlabelled: bool = False,
    every: int = 1,
) -> Source:
    """CREMI: three stacks of serial-section electron microscopy of the fruit fly's brain; one row a section.

    Layout: `sample_A_20160501.hdf` (B, C likewise) with `volumes/raw` (uint8), `volumes/labels/neuron_ids` and
    `volumes/labels/clefts` (uint64), each with the attribute `resolution` (nanometres along z, y, x). Padded variants
    (`sample_A_padded_20160501.hdf`) show the same sections in a larger field and are passed over; `--option
    padded=true` takes them instead, without masks, since raw and labels differ in size there. Test stacks
    (`sample_A+_20160601.hdf`) have no labels and are left out unless `--option unlabelled=true`; their split is empty.

    Rows: section i of every stack. The mask is section i of the labels: ids of neurons up to 2^64 - 1, exact, with
    0xffffffffffffffff for background (they name instances, not classes), or with `--option mask=clefts` synaptic
    clefts. `volume` is the stack (`sample_A`), `z` the section; `resolution_z`, `resolution_y`, `resolution_x` are
    columns.

    Split: the first four fifths of a stack are "train" and the last fifth "test": of 125 sections the first 100 and
    the last 25, as the DINOv3 study has them; probes select on a tenth of the training sections. Groups: none; a stack
    as one group would cross this split, so that to probes every section is a group. `--option every=5` keeps every
    fifth section.

    Access: cremi.org, see the terms there; cite the challenge. Source: MICCAI Challenge on Circuit Reconstruction from
    EM Images 2016.

    Raises:
        ManifestError: no such file, or one that is damaged or lacks `volumes/raw`.
    """
    paths, _ = walk(root, "", (".hdf", ".h5", ".hdf5"))
    paths = [path for path in paths if path.rpartition("/")[2].startswith("sample_")]
    if not paths:
        raise ManifestError(f"{root} has no file sample_*.hdf: {_CREMI}")
    wanted = [path for path in paths if ("_padded" in path.rpartition("/")[2]) == padded]
    key = f"volumes/labels/{mask}"
    volumes, depths, used, splits, resolutions = [], [], [], [], []
    bare = other = 0
    for path in wanted:
        found = _stacks(root / path, (_RAW, key))
        if _RAW not in found:
            raise ManifestError(f"{root / path} has no data set {_RAW}, or is damaged; download it again")
        shape, resolution = found[_RAW]
        fits = key in found and found[key][0] == shape
        bare += key not in found
        other += key in found and not fits
        if key not in found and not unlabelled:
            continue
        volumes.append(Volume(name=_sample(path), path=path))
        depths.append(shape[0])
        used.append(path if fits else None)
        resolutions.append(resolution)
        train = shape[0] * 4 // 5  # 100 of 125
        splits += ["train" if z < train else "test" for z in range(shape[0])] if key in found else [""] * shape[0]
    notes = ["CREMI: see the terms at cremi.org; cite the challenge", _NOTE]
    if len(wanted) < len(paths):
        notes.append(f"{len(paths) - len(wanted)} {'unpadded' if padded else 'padded'} files are passed over")
    if bare:
        notes.append(f"{bare} stacks have no {mask}" + ("" if unlabelled else " and are left out"))
    if other:
        notes.append(f"{other} stacks have raw data and labels of different size; their labels are not used as masks")
    if mask == "neuron_ids":
        notes.append("masks hold ids of neurons (uint64), background is 0xffffffffffffffff")
    derived = {f"resolution_{name}": [axes[at] for axes in resolutions] for at, name in enumerate("zyx")}
    table = slice_table(
        volumes, depths, derived, parts=(_parts(_RAW, depths), ()), masks=used, mask_parts=_parts(key, depths),
        every=every, splits=splits,
    )  # fmt: skip
    return _source(root, "cremi", table, "sections: the first 4/5 of a stack train, the rest test", tuple(notes))


def read_ac34(root: Path, *, voxel_size: str = "3x3x29", every: int = 1) -> Source:
    """AC3/AC4: two stacks of serial-section electron microscopy of mouse cortex; one row a section.

    Layout: `AC3_inputs.h5`, `AC3_labels.h5`, `AC4_inputs.h5`, `AC4_labels.h5`, each with the data set `main`
    (sections, rows, columns): 256 and 100 sections of 1024 x 1024.

    Rows: section i of both stacks, with section i of the labels as mask (ids of neurons: they name instances, not
    classes). `volume` is AC3 or AC4, `z` the section. Column `voxel_size` is x, y, z in nanometres as
    `--option voxel_size=3x3x29` (default) gives it: papers say 3x3x29, loaders of the SNEMI3D challenge, which shows
    the same tissue, 6x6x30; nothing is computed from it.

    Split, as in the DINOv3 study: the first 80 sections of AC4 are "train", the first 100 of AC3 "test", the rest has
    an empty split; probes select on a tenth of the training sections. Groups: none are known. `--option every=5` keeps
    every fifth section.

    Access: copies differ in terms. Source: Kasthuri et al. 2015.

    Raises:
        ManifestError: a file is missing, lacks `main`, or images and labels differ in size.
    """
    if not voxel_size.replace("x", "").replace(".", "").isdigit() or voxel_size.count("x") != 2:
        raise ManifestError(f"option voxel_size is x, y, z in nanometres such as 3x3x29, got {voxel_size!r}")
    volumes, depths, used, splits = [], [], [], []
    for name, split, first in (("AC4", "train", 80), ("AC3", "test", 100)):
        shapes = []
        for kind in ("inputs", "labels"):
            path = root / f"{name}_{kind}.h5"
            if not path.is_file():
                raise ManifestError(f"{path} is missing: {_AC34}")
            found = _stacks(path, ("main",))
            if "main" not in found:
                raise ManifestError(f"{path} has no data set main of three axes, or is damaged: {_AC34}")
            shapes.append(found["main"][0])
        if shapes[0] != shapes[1]:
            raise ManifestError(f"{name}: images are {shapes[0]} and labels {shapes[1]}; they must be one stack")
        volumes.append(Volume(name=name, path=f"{name}_inputs.h5"))
        depths.append(shapes[0][0])
        used.append(f"{name}_labels.h5")
        splits += [split if z < first else "" for z in range(shapes[0][0])]
    texts = _parts("main", depths)
    table = slice_table(
        volumes, depths, {"voxel_size": [voxel_size] * 2}, parts=(texts, ()), masks=used, mask_parts=texts,
        every=every, splits=splits,
    )  # fmt: skip
    notes = (
        "AC3/AC4: cite Kasthuri et al. 2015",
        f"voxel size is taken as {voxel_size} nm; sources say 3x3x29 or 6x6x30",
        _NOTE,
    )
    return _source(root, "ac34", table, "AC4: the first 80 sections train; AC3: the first 100 test", notes)


def _source(root: Path, adapter: str, table: Any, origin: str, notes: tuple[str, ...]) -> Source:
    return Source(
        table=table,
        root=root,
        adapter=adapter,
        default_task=None,
        tasks=(),
        label_columns=(),
        split_origin=origin,
        groups_known=False,
        notes=notes,
    )


def _stacks(path: Path, keys: tuple[str, ...]) -> dict[str, tuple[Shape, tuple[str | None, ...]]]:
    """(shape, resolution along z, y, x as text) of the data sets of three axes; {} for a damaged file."""
    try:
        import h5py
    except ImportError:
        raise ManifestError(f"{path}: reading HDF5 needs pip install 'featstore[medical]'") from None
    found: dict[str, tuple[Shape, tuple[str | None, ...]]] = {}
    try:
        with h5py.File(path, "r") as file:
            for key in keys:
                item = file.get(key)
                if isinstance(item, h5py.Dataset) and len(item.shape) == 3:
                    given = item.attrs.get("resolution")
                    axes = [None] * 3 if given is None or len(given) != 3 else [f"{float(value):g}" for value in given]
                    found[key] = (tuple(item.shape), tuple(axes))
    except OSError:
        return {}
    return found


def _parts(key: str, depths: list[int]) -> list[str]:
    return [str(Part(key=key, index=index)) for index in range(max(depths, default=0))]


def _sample(path: str) -> str:
    """sample_A of sample_A_20160501.hdf, sample_A+ of sample_A+_20160601.hdf, with _padded where it is."""
    name = path.rpartition("/")[2].rpartition(".")[0]
    head, _, last = name.rpartition("_")
    return head if last.isdigit() else name
