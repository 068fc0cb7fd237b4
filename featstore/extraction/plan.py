"""From a request to what has to be done: the set's identity, its arrays, the rows that are missing, bytes and files."""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from featstore import files
from featstore.backbones import BackboneSource, describe, describe_facts
from featstore.backbones.catalogue import check_set_name, pretraining_of
from featstore.configs import RunConfig, SetConfig, parse_layers, parse_reduce, parse_tokens, parse_window
from featstore.datasets.manifest import Manifest
from featstore.errors import ConfigError, IncompleteError
from featstore.images import PreprocessSpec, fit_size, parse_resolution
from featstore.images.augment import augment_of
from featstore.images.intensity import canonical_intensity
from featstore.images.preprocess import hf_size
from featstore.images.published import apply_published, deviations_of, published
from featstore.objects import Place, as_object
from featstore.request import as_request
from featstore.store import commits, ledger, reductions
from featstore.store.catalog import Store
from featstore.store.kinds import check_kind, check_random_name
from featstore.store.layout import (
    ITEMSIZE,
    ArraySpec,
    block_rows,
    make_spec,
    read_spec,
    set_folder,
    set_name,
    without_augment,
)
from featstore.store.packed import check_not_archived
from featstore.store.reductions import Reduction


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that one set of one data set needs; made without torch unless the compute dtype must be resolved."""

    manifest: Manifest
    source: BackboneSource
    preprocess: PreprocessSpec
    spec: dict[str, Any]
    folder: Place
    arrays: list[ArraySpec]
    layers: tuple[int, ...]
    missing: dict[str, Int64[np.ndarray, " M"]]
    notes: list[str]
    rows: Int64[np.ndarray, " N"]  # of the manifest's samples in the set; negative: it has none yet

    @property
    def name(self) -> str:
        """`dataset/model@res`."""
        return f"{self.manifest.name}/{set_name(self.spec)}"

    @cached_property
    def todo(self) -> Int64[np.ndarray, " M"]:
        """Manifest rows that lack at least one of the arrays."""
        return np.unique(np.concatenate([np.empty(0, np.int64), *self.missing.values()]))

    @property
    def new_bytes(self) -> int:
        """Bytes that the missing rows will take, checksums and markers aside."""
        return sum(len(self.missing[array.name]) * array.row_bytes for array in self.arrays)

    @property
    def new_files(self) -> int:
        """Shards and markers that will be written."""
        size = int(self.spec["layout"]["block_rows"])
        shards = sum(-(-len(self.missing[array.name]) // array.layout(size)[0]) for array in self.arrays)
        return shards + -(-len(self.todo) // size)

    @property
    def gflop(self) -> float:
        """Work of the missing rows in GFLOP."""
        size = (self.preprocess.height, self.preprocess.width)
        return len(self.todo) * image_gflops(self.source, size, self.window)

    @property
    def window(self) -> tuple[int, int] | None:
        """(size, stride) of the windows that the network runs over."""
        held = self.spec["identity"].get("window")
        return None if held is None else (int(held[0]), int(held[1]))


def image_gflops(source: BackboneSource, pixels: tuple[int, int], window: tuple[int, int] | None) -> float:
    """GFLOP of one image, through windows of (size, stride) where they are asked for."""
    if window is None:
        return source.architecture.gflops(*pixels)
    size, stride = window
    windows = prod(1 + -(-(side - size) // stride) for side in pixels)
    return windows * source.architecture.gflops(size, size)


def set_resolution(config: SetConfig, source: BackboneSource) -> tuple[str, tuple[int, int], list[str]]:
    """(name of the resolution, pixels fed to the network, lines to print about it)."""
    patch = source.architecture.patch_size
    if config.geometry == "hf":
        if source.processor is None:
            raise ConfigError(
                f"--geometry hf needs the checkpoint's preprocessor_config.json, and {source.name} comes without one; "
                "use --geometry dino or squash, or --weights with a folder that has it"
            )
        size = hf_size(source.processor)
        if config.res is not None and parse_resolution(config.res) != size:
            raise ConfigError(
                f"--geometry hf: the checkpoint's processor makes {size[0]}x{size[1]} images, --res says {config.res}; "
                "leave --res out"
            )
        asked = size
    else:
        native = source.architecture.native_size
        asked = parse_resolution(config.res) if config.res is not None else (native, native)
    name = str(asked[0]) if asked[0] == asked[1] else f"{asked[0]}x{asked[1]}"
    pixels = fit_size(asked, patch, config.fit)
    window = parse_window(config.window)
    if window is None:
        source.architecture.check_size(*pixels)
    else:
        source.architecture.check_window(window, *pixels)
    notes = []
    if pixels != asked:
        rows, columns = source.architecture.grid(*pixels)
        notes.append(
            f"{name} is no multiple of the patch size {patch}: images are {pixels[0]}x{pixels[1]}, "
            f"a grid of {rows}x{columns} (--fit {config.fit})"
        )
    return name, pixels, notes


def set_arrays(
    source: BackboneSource, pixels: tuple[int, int], config: SetConfig
) -> tuple[list[ArraySpec], tuple[int, ...]]:
    """Arrays to write and the absolute block numbers behind `--layers`."""
    architecture = source.architecture
    rows, columns = architecture.grid(*pixels)
    shapes = {
        "cls": (architecture.embed_dim,),
        "mean_patch": (architecture.patch_width,),
        "registers": (architecture.num_registers, architecture.embed_dim),
        "patches": (rows * columns, architecture.patch_width),
    }
    tokens = parse_tokens(config.tokens)
    if "registers" in tokens and architecture.num_registers == 0:
        raise ConfigError(f"--tokens registers: {source.name} has no register tokens")
    if config.layers and not architecture.depth:
        raise ConfigError(f"--layers {config.layers}: {source.name} has no inner layers of tokens; leave it out")
    layers = []
    for layer in parse_layers(config.layers):
        absolute = layer if layer > 0 else architecture.depth + 1 + layer
        if not 1 <= absolute <= architecture.depth:
            raise ConfigError(
                f"--layers {layer}: {source.name} has blocks 1 to {architecture.depth} (or -{architecture.depth} to -1)"
            )
        layers.append(absolute)
    kept = tuple(sorted(set(layers)))
    names = [*tokens, *(f"layers/{layer}/{token}" for layer in kept for token in tokens)]
    return [ArraySpec(name=name, row_shape=shapes[name.rsplit("/", 1)[-1]], dtype=config.dtype) for name in names], kept


def reduced_arrays(
    arrays: list[ArraySpec], steps: tuple[str, ...], grid: tuple[int, int], dim: int
) -> tuple[list[ArraySpec], list[str]]:
    """(the arrays as `--reduce` leaves them, lines to print about it).

    Raises:
        ConfigError: more principal components than the network has dimensions.
    """
    if not steps:
        return arrays, []
    reduction = Reduction(steps=steps, grid=grid, dim=dim, dtype="float32")
    if (reduction.components or 0) > dim:
        raise ConfigError(
            f"--reduce pca:{reduction.components}: tokens of this network have {dim} dimensions; ask for fewer"
        )
    kept = [reduction.array(array) if reductions.is_reduced(array.name, steps) else array for array in arrays]
    notes = []
    if any(side % reduction.cell for side in grid):
        rows, columns = reduction.kept_grid
        notes.append(
            f"a grid of {grid[0]}x{grid[1]} becomes {rows}x{columns} by pool{reduction.cell}: the last cells average "
            "the patches that are left"
        )
    return kept, notes


def cuda_driver() -> bool:
    """Whether the system has an NVIDIA driver at all; where not, importing torch to ask is saved."""
    return any(Path(path).exists() for path in ("/dev/nvidiactl", "/dev/dxg", "/proc/driver/nvidia/version"))


def resolve_compute_dtype(
    store: Store, name: tuple[str, str, str], identity: dict[str, Any], *, asked: str, device: str
) -> str:
    """Precision belongs to the set: an existing set keeps its own, a new one takes what the device does best.

    `name` is (data set, model, resolution): a set of another name says nothing about this one. Augmented views and
    their plain set go together: where one of them is new, it follows the others.
    """
    if asked != "auto":
        return asked
    own: set[str] = set()
    family: set[str] = set()
    for entry in store.entries(name[0]):
        if (entry.spec["model"], entry.spec["resolution"]) != name[1:]:
            continue
        other, wanted = dict(entry.spec["identity"]), {**identity, "schema": entry.spec["schema"]}
        dtype = other.pop("compute_dtype", None)
        if dtype is None:
            continue
        if other == wanted:
            own.add(str(dtype))
        if without_augment(other) == without_augment(wanted):
            family.add(str(dtype))
    held = own or family
    if len(held) > 1:
        raise ConfigError(
            f"there are sets of {name[0]!r} in {' and '.join(sorted(held))}; say which to go on with by --compute-dtype"
        )
    if held:
        return held.pop()
    if device == "cpu" or not cuda_driver():
        return "float32"
    import torch

    from featstore.backbones.devices import has_bfloat16, resolve_device

    if not torch.cuda.is_available():
        return "float32"
    return "bfloat16" if has_bfloat16(resolve_device("cuda" if device == "auto" else device)) else "float32"


def make_plan(
    store: Store, dataset: str, config: SetConfig, run: RunConfig, source: BackboneSource | None = None
) -> Plan:
    """Resolve one set of one data set and find what it lacks. Writes nothing.

    `source` saves describing the same backbone again for the next data set.
    """
    manifest = store.manifest(dataset)
    if source is None:
        source = describe_backbone(store, config)
    settled = apply_published(config)
    resolution, pixels, notes = set_resolution(settled, source)
    arrays, layers = set_arrays(source, pixels, config)
    steps = parse_reduce(config.reduce)
    grid, dim = source.architecture.grid(*pixels), source.architecture.patch_width
    arrays, lines = reduced_arrays(arrays, steps, grid, dim)
    preprocess = make_preprocess(settled, source, pixels)
    identity = {
        "weights": source.weights["digest"],
        "architecture": source.architecture.as_dict(),
        "preprocess": preprocess.as_dict(),
        "pos_interp": source.pos_interp,
        "stored_dtype": config.dtype,
        "reductions": reductions.identity_of(steps),
    }
    # What came later is stated where it is not the default, so that sets made before keep their fingerprint.
    window = parse_window(config.window)
    if window is not None:
        identity["window"] = list(window)
    if config.weight_dtype != "same":
        identity["weight_dtype"] = config.weight_dtype
    identity["compute_dtype"] = resolve_compute_dtype(
        store,
        (dataset, config.name or source.name, resolution),
        identity,
        asked=config.compute_dtype,
        device=run.device,
    )
    tokens = source.architecture.num_tokens(*pixels) + 1  # all final tokens and the mean
    if steps:
        tokens -= grid[0] * grid[1]
    per_row = tokens * dim * ITEMSIZE[config.dtype]
    per_row += next((array.row_bytes for array in arrays if reductions.is_reduced(array.name, steps)), 0)
    trained = pretraining_of(source)
    spec = make_spec(
        dataset=dataset,
        model=config.name or source.name,
        resolution=resolution,
        identity=identity,
        rows_per_block=config.block_rows or block_rows(image_gflops(source, pixels, window), per_row),
        weights={**source.weights, "model": source.model, **({"pretraining": trained} if trained else {})},
        random=source.random,
    )
    spec["request"] = as_request(config, compute_dtype=identity["compute_dtype"])
    if config.published is not None:
        spec["published"], said = describe_published(config.published, preprocess)
        lines = [*lines, *said]
    folder = set_folder(store.path, spec)
    if not (folder / "spec.json").is_file():
        check_name(store, dataset, config, source)
    spec = existing_spec(folder, spec, config.block_rows)
    rows = held_rows(folder, manifest, spec)
    missing = missing_rows(folder, manifest, arrays, spec, rows=rows, retry_failed=run.retry_failed)
    if any(len(rows) for rows in missing.values()):
        check_not_archived(folder)
    return Plan(
        manifest=manifest,
        source=source,
        preprocess=preprocess,
        spec=spec,
        folder=folder,
        arrays=arrays,
        layers=layers,
        missing=missing,
        notes=notes + lines,
        rows=rows,
    )


def check_name(store: Store, dataset: str, config: SetConfig, source: BackboneSource) -> None:
    """Random, imported and real weights never share a name in a listing.

    Raises:
        ConfigError: the name of a new set says something else than what its weights are.
    """
    name = config.name or source.name
    if config.name is not None:
        check_set_name(config.name, source)
    if not source.random:
        check_random_name(name, "give another --name")
    check_kind(store, dataset, name, "random" if source.random else "real")


def make_preprocess(config: SetConfig, source: BackboneSource, pixels: tuple[int, int]) -> PreprocessSpec:
    """How images become pixels; mean and std are the preset's, else the processor's, else the model's.

    Raises:
        ConfigError: as `PreprocessSpec`.
    """
    exact = config.geometry == "hf"  # then the processor settles mean and std
    preset = None if config.published is None else published(config.published)
    mean, std = (preset.mean, preset.std) if preset is not None else (None, None)
    return PreprocessSpec(
        geometry=config.geometry,
        height=pixels[0],
        width=pixels[1],
        mean=() if exact else mean or source.architecture.mean,
        std=() if exact else std or source.architecture.std,
        processor=source.processor if exact else None,
        intensity=config.intensity,
        dicom_mode=config.dicom_mode,
        decode=config.decode,
        augment=augment_of(config),
    )


def describe_published(name: str, preprocess: PreprocessSpec) -> tuple[dict[str, Any], list[str]]:
    """(what the spec keeps of a preset beside the identity, lines to print about it)."""
    preset = published(name)
    deviations = deviations_of(name, (preprocess.height, preprocess.width))
    facts = {"name": name, "source": preset.source, "deviations": list(deviations)}
    settings = (
        f"intensity {preprocess.intensity}, geometry {preprocess.geometry}, "
        f"{preprocess.height}x{preprocess.width} pixels, mean {preprocess.mean}, std {preprocess.std}"
    )
    if not deviations:
        return facts, [f"images as published by {name}: {settings}"]
    return facts, [
        f"images after {name}: {settings}; not as published:",
        *(f"  - {sentence}" for sentence in deviations),
    ]


def describe_backbone(store: Store, config: SetConfig, *, facts: bool = False) -> BackboneSource:
    """Name, weights digest and architecture, without loading the network; `facts`: without weights too if need be.

    Raises:
        ConfigError: an intensity or a preset that cannot be; said before any backbone is looked for.
    """
    canonical_intensity(apply_published(config).intensity)
    return (describe_facts if facts else describe)(
        config.model,
        weights=config.weights,
        random_weights=config.random_weights,
        revision=config.revision,
        pos_interp=config.pos_interp,
        norm=config.norm,
        digest_cache=(store.path if as_object(store.path) is None else files.user_cache()) / "cache" / "weights.json",
    )


def existing_spec(folder: Place, spec: dict[str, Any], asked_block_rows: int | None) -> dict[str, Any]:
    """The spec on disk where there is one: its block size stays.

    Raises:
        ConfigError: another block size was asked for.
    """
    if not (folder / "spec.json").is_file():
        return spec
    held = read_spec(folder)
    rows = held["layout"]["block_rows"]
    if asked_block_rows is not None and asked_block_rows != rows:
        raise ConfigError(
            f"{folder.name} has {rows} rows per block, which stays; leave --block-rows {asked_block_rows} out"
        )
    return held


def held_rows(folder: Place, manifest: Manifest, spec: dict[str, Any]) -> Int64[np.ndarray, " N"]:
    """Row of every sample of a manifest in a set; those that it does not know yet lie in block -1, never committed."""
    size = int(spec["layout"]["block_rows"])
    if not (folder / "spec.json").is_file():
        return np.full(len(manifest), -size, np.int64)
    try:
        return ledger.read_rows(folder, manifest.short)
    except IncompleteError:
        held = ledger.preview_rows(folder, manifest, lambda: committed_contents(folder))
        return np.where(held < 0, -size, held)


def missing_rows(
    folder: Place,
    manifest: Manifest,
    arrays: list[ArraySpec],
    spec: dict[str, Any],
    *,
    rows: Int64[np.ndarray, " N"] | None = None,
    retry_failed: bool,
) -> dict[str, Int64[np.ndarray, " M"]]:
    """Manifest rows that each array lacks; `rows` is what `held_rows` says, if that is known already."""
    everything = np.arange(len(manifest))
    if not (folder / "spec.json").is_file():
        return {array.name: everything for array in arrays}
    book = ledger.read_ledger(folder)
    size = int(spec["layout"]["block_rows"])
    rows = held_rows(folder, manifest, spec) if rows is None else rows
    missing = {}
    for array in arrays:
        done: set[int] = set()
        if array.name in book.arrays:
            group = book.group_of(array.name)
            done = commits.committed_blocks(folder, group)
            if retry_failed:
                done -= failed_blocks(folder, group, set(rows.tolist()))
        missing[array.name] = everything[~np.isin(rows // size, np.fromiter(done, np.int64, len(done)))]
    return missing


def failed_blocks(folder: Place, group: str, rows: Collection[int]) -> set[int]:
    """Committed blocks in which at least one of these rows failed."""
    found = commits.read_commits(folder, group).items()
    return {block for block, commit in found if any(row in rows for row in commit.failed)}


def committed_contents(folder: Place) -> dict[int, str]:
    """Content hash of every committed row of a set."""
    found: dict[int, str] = {}
    for group in ledger.read_ledger(folder).groups:
        for _, commit in sorted(commits.read_commits(folder, group).items()):
            for row in range(commit.start, commit.stop):
                found.setdefault(row, commit.content(row))
    return found


def has_files(manifest: Manifest) -> bool:
    """Whether any sample had a file at registration; a data set made from imported features has none."""
    return int(manifest.meta.get("missing", 0)) < len(manifest)


def registered_datasets(store: Store, dataset: str | None) -> list[str]:
    """The data set asked for, or every registered one.

    Raises:
        ConfigError: none is registered.
    """
    if dataset is not None:
        if not has_files(store.manifest(dataset)):
            raise ConfigError(
                f"data set {dataset!r} has no image files (imported features only); register its images first"
            )
        return [dataset]
    names = [name for name in store.datasets() if has_files(store.manifest(name))]
    if not names:
        raise ConfigError(
            f"no data set is registered in {store.path}; start with `featstore register chexpert /data/CheXpert-v1.0` "
            "or `featstore register phantom`"
        )
    return names
