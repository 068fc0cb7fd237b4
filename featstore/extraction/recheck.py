"""`recheck`: do the images and the backbone still give what is stored? A seeded sample is computed again."""

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from featstore import files
from featstore.backbones import BACKBONES, BackboneSource, describe
from featstore.backbones.pooling import pick
from featstore.backbones.tokens import Backbone, Tokens
from featstore.configs import RunConfig
from featstore.datasets.manifest import stat_files
from featstore.errors import ConfigError, IncompleteError, MissingWeightsError, WeightsError
from featstore.extraction.backbone import load_for_set
from featstore.extraction.batching import default_batch_size
from featstore.extraction.creation import TORCH_DTYPES
from featstore.extraction.loader import Batch, Job, open_loader
from featstore.extraction.pipeline import choose_device
from featstore.extraction.reduce import Reducer
from featstore.images import PreprocessSpec, to_pixels
from featstore.images.augment import Augment
from featstore.request import request_of
from featstore.store import commits
from featstore.store.diff import as_tokens, parity_limit, parity_of, row_differences
from featstore.store.features import FeatureSet, RowArray
from featstore.store.layout import DECODED, differences


@dataclass(slots=True)
class ArrayCheck:
    """One array: rows compared, the largest relative difference and whose it is, and what is allowed."""

    name: str
    tolerance: float
    rows: int = 0
    max_relative: float = 0.0
    worst: str | None = None

    @property
    def ok(self) -> bool:
        """Within the tolerance."""
        return self.max_relative <= self.tolerance


@dataclass(frozen=True, slots=True)
class Recheck:
    """Outcome: `changed` says of samples what is no longer as it was when they were computed."""

    name: str
    device: str
    sampled: int
    changed: dict[str, str]
    arrays: list[ArrayCheck]

    @property
    def ok(self) -> bool:
        return not self.changed and all(array.ok for array in self.arrays)


def recheck(
    features: FeatureSet,
    run: RunConfig,
    *,
    rows: int = 16,
    seed: int = 0,
    weights: Path | None = None,
    digest_cache: Path | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> Recheck:
    """Compute `rows` committed rows again, drawn by `seed`, and compare them with what is stored.

    Reduced arrays are compared as tokens. `weights` says where the set's weights are on this machine; of a set made by
    a function it must be that `module:function`. `advance` is told the number of images, as they are done.

    Raises:
        ConfigError: imported features, fewer than one row, preprocessing that this version does otherwise, or a
            function that the caller did not name.
        IncompleteError: no row is committed.
        WeightsError: the weights found are not those of the set.
        MissingWeightsError: they are not on this machine.
    """
    if rows < 1 or seed < 0:
        raise ConfigError(f"--rows must be at least 1 and --seed at least 0, got {rows} and {seed}")
    source = find_backbone(features.spec, weights, digest_cache)
    spec = preprocessing(features.spec["identity"]["preprocess"])
    arrays = {name: features.array(name) for name in features.arrays}
    drawn = _draw(features, arrays, rows, seed)
    changed = _changed_files(features, drawn)
    ids = features.manifest.column("id")
    good = np.array([row for row in drawn if ids[row] not in changed], dtype=np.int64)
    device = choose_device(run.device)
    tolerance = parity_of(features.spec)
    checks = [ArrayCheck(name, tolerance) for name in arrays]
    if len(good):
        backbone = load_for_set(source, features.spec["identity"], run, device)
        num_tokens = source.architecture.num_tokens(spec.height, spec.width)
        size = min(run.batch_size or default_batch_size(num_tokens, device), len(good))
        layers = tuple(sorted({int(name.split("/")[1]) for name in arrays if "/" in name}))
        jobs = [Job(-1, tuple(good[first : first + size].tolist())) for first in range(0, len(good), size)]
        with open_loader(features.manifest, spec, jobs, run) as loader:
            for batch in loader:
                changed |= _changed_content(features, batch)
                tokens = _forward(backbone, batch, spec, size, layers)
                for check in checks:
                    _compare(check, arrays[check.name], tokens, batch, ids=ids, changed=changed, tolerance=tolerance)
                advance(len(batch.states))
    return Recheck(features.name, device, len(drawn), changed, checks)


def function_of(spec: dict[str, Any]) -> str | None:
    """The `module:function` that a set was made by, according to its spec; None where it is no function."""
    facts = spec["weights"]
    model = str(facts["function"] if facts["kind"] == "function" else request_of(spec).get("model", ""))
    return model if ":" in model and not model.startswith("hf:") else None


def find_backbone(spec: dict[str, Any], weights: Path | None, digest_cache: Path | None) -> BackboneSource:
    """The backbone that a set was made by, its weights checked against the set's identity; see `recheck`."""
    identity, facts = spec["identity"], spec["weights"]
    if facts["kind"] == "imported":
        raise ConfigError(
            f"{spec['dataset']}/{spec['model']} holds imported features, which no backbone here can compute again; "
            "compare with their file by importing it again"
        )
    if facts["kind"] == DECODED:
        raise ConfigError(
            f"{spec['dataset']}/{spec['model']} holds decoded images, which no backbone made; "
            "`featstore verify` checks them"
        )
    # A store may come from others, and what its spec names would be imported and called.
    function = function_of(spec)
    if function is not None and str(weights) != function:
        raise ConfigError(
            f"{spec['dataset']}/{spec['model']} was made by the function {function}, whose code runs only where it is "
            f"named: give --weights {function} if you trust it" + (f", got --weights {weights}" if weights else "")
        )
    if function is not None:
        weights = None
    request = request_of(spec)
    model, seed = str(request["model"]), request.get("random_weights")
    if ":" not in model and model not in BACKBONES and facts["kind"] == "hub":
        model = f"hf:{facts['repo']}"  # of sets made before requests were kept
    model = function or model
    held = weights or (Path(request["weights"]) if request.get("weights") else None)
    if facts["kind"] == "local" and weights is None and held is not None and not held.exists():
        raise MissingWeightsError(f"{spec['model']}: weights from local files, and {held} is not there; give --weights")
    if model.startswith("hf:") and held is not None:
        model, held = f"hf:{held}", None
    revision = facts["revision"] if facts["kind"] == "hub" and held is None and weights is None else None
    own = function is not None or model.startswith("timm:")
    source = describe(
        model,
        weights=held,
        random_weights=seed,
        revision=revision,
        digest_cache=digest_cache,
        pos_interp=None if own else request.get("pos_interp"),
        norm=None if own else request.get("norm"),
    )
    found = json.loads(files.canonical_json(source.identity))
    other = differences({key: identity[key] for key in found}, found)
    if other:
        raise WeightsError(
            f"the weights found ({source.origin}) are not those of {spec['dataset']}/{spec['model']}: "
            f"{', '.join(key for key, _, _ in other)} differ; give the right ones by --weights"
        )
    return source


def preprocessing(held: dict[str, Any]) -> PreprocessSpec:
    """The specification behind its dictionary in a set's identity.

    Raises:
        ConfigError: this version would give other pixels.
    """
    published, drawn = held["geometry"] == "hf", held.get("augment")
    spec = PreprocessSpec(
        geometry=held["geometry"],
        height=held["height"],
        width=held["width"],
        intensity=held["intensity"],
        quantise=held["quantise"],
        mean=() if published else tuple(held["mean"]),
        std=() if published else tuple(held["std"]),
        processor=held["processor"],
        dicom_mode=held.get("dicom_mode", "standard"),
        decode=held.get("decode", "full"),
        augment=None if drawn is None else Augment(recipe=drawn["recipe"], view=drawn["view"], seed=drawn["seed"]),
    )
    other = differences(held, json.loads(files.canonical_json(spec.as_dict())))
    if other:
        raise ConfigError(
            f"the set's preprocessing differs from this version's in {', '.join(key for key, _, _ in other)}; recheck "
            "with the version that `featstore info` lists"
        )
    return spec


def _draw(features: FeatureSet, arrays: dict[str, RowArray], count: int, seed: int) -> Int64[np.ndarray, " K"]:
    """Manifest rows that are committed in some array and did not fail, in order."""
    there = ~np.all([array.pending for array in arrays.values()], axis=0) if arrays else np.zeros(len(features), bool)
    there[list(features.failures)] = False
    known = np.flatnonzero(there)
    if not len(known):
        raise IncompleteError(f"{features.name}: no row is committed, so there is nothing to check; run extract first")
    return np.sort(np.random.default_rng(seed).choice(known, min(count, len(known)), replace=False))


def _changed_files(features: FeatureSet, rows: Int64[np.ndarray, " K"]) -> dict[str, str]:
    """Sampled files that are gone or have another size. Their time says nothing while their bytes are the same."""
    picked = features.manifest.table.take(rows)
    ids, paths, sizes = (picked.column(name).to_pylist() for name in ("id", "path", "size"))
    now, _ = stat_files(features.manifest.root, paths)
    return {
        sample: "the file is gone" if size < 0 else f"the file has {size} bytes, {was} when it was registered"
        for sample, size, was in zip(ids, now, sizes)
        if size != was
    }


def _changed_content(features: FeatureSet, batch: Batch) -> dict[str, str]:
    """Samples of a batch whose bytes are others than those that were embedded, or do not decode any more."""
    found: dict[str, str] = {}
    size = int(features.spec["layout"]["block_rows"])
    ids = features.manifest.column("id")
    for manifest_row, state in zip(batch.job.rows, batch.states):
        row = int(features.row_index[manifest_row])
        for group in features.ledger.groups:
            try:
                held = commits.read_commit(features.folder, group, row // size).content(row)
            except FileNotFoundError:
                continue
            if held != state.content:
                found[ids[manifest_row]] = "the file holds other bytes than were embedded, of the same number"
            elif state.reason is not None:
                found[ids[manifest_row]] = f"the same bytes cannot be decoded any more: {state.reason}"
    return found


def _forward(backbone: Backbone, batch: Batch, spec: PreprocessSpec, size: int, layers: tuple[int, ...]) -> Tokens:
    pixels = torch.from_numpy(batch.pixels)
    if len(pixels) < size:  # one shape a run, as in extraction
        pixels = torch.cat([pixels, pixels.new_zeros((size - len(pixels), *pixels.shape[1:]))])
    dtype = next(kind for kind in TORCH_DTYPES.values() if kind == backbone.dtype)
    with torch.inference_mode():
        return backbone(to_pixels(pixels, spec, device=str(backbone.device), dtype=dtype), layers=layers)


def _compare(
    check: ArrayCheck,
    array: RowArray,
    tokens: Tokens,
    batch: Batch,
    *,
    ids: list[str],
    changed: Collection[str],
    tolerance: float,
) -> None:
    """Fold one batch into the check of an array."""
    rows = np.array(batch.job.rows)
    use = np.array([ids[row] not in changed for row in rows]) & ~array.pending[rows]
    if not use.any():
        return
    held = as_tokens(array.stored.gather(array.rows[rows[use]], verify=array.stored.is_mapped), array.reduction)
    fresh = _tokens_of(pick(tokens, check.name)[: len(rows)], array)[use]
    relative = row_differences(held, fresh)
    worst = int(relative.argmax())
    if relative[worst] > check.max_relative:
        check.max_relative, check.worst = float(relative[worst]), ids[int(rows[use][worst])]
    limit = parity_limit(tolerance, held, array.reduction)
    check.tolerance = min(check.tolerance, limit) if check.rows else limit
    check.rows += int(use.sum())


def _tokens_of(values: Tensor, array: RowArray) -> Float[np.ndarray, "..."]:
    """Fresh values in the space in which stored ones are compared."""
    if array.reduction is None:
        return values.float().cpu().numpy()
    return as_tokens(Reducer(array.reduction, values.device)(values).cpu().numpy(), array.reduction)
