"""One image through the backbone and preprocessing of a set: a query to compare with its rows."""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32

from featstore.backbones.pooling import pick
from featstore.configs import RunConfig
from featstore.errors import ConfigError, DecodeError, UnknownNameError
from featstore.extraction.backbone import load_for_set
from featstore.extraction.creation import TORCH_DTYPES
from featstore.extraction.pipeline import choose_device
from featstore.extraction.recheck import find_backbone, preprocessing
from featstore.images import preprocess, stack, to_pixels
from featstore.images.opening import list_parts, open_path
from featstore.inputs import Inputs
from featstore.store.features import FeatureSet


def embed_image(
    features: FeatureSet,
    image: Path,
    parts: list[str],
    run: RunConfig,
    *,
    weights: Path | None = None,
    digest_cache: Path | None = None,
) -> Float32[np.ndarray, " D"]:
    """The vectors `parts` (such as `cls`, `mean_patch`) of one image file, joined, as the set's own were computed.

    Raises:
        UnknownNameError: no such file, or arrays that are no vectors of the set.
        ConfigError: a file of several pictures, vectors that were reduced, or a set that cannot be computed again.
        DecodeError: the file cannot be decoded.
        WeightsError, MissingWeightsError: as for `recheck`.
    """
    if not image.is_file():
        raise UnknownNameError(f"{image} is neither an image file nor the id of a sample of {features.name}")
    for name in parts:
        reduction = features.array(name).reduction
        if reduction is not None and not reduction.is_int8:
            raise ConfigError(f"{features.name}:{name} is kept reduced, and cannot be compared with a new image")
    source = find_backbone(features.spec, weights, digest_cache)
    spec = preprocessing(features.spec["identity"]["preprocess"])
    if spec.augment is not None:
        raise ConfigError(
            f"{features.name} holds augmented copies, which are drawn from the id of a sample, and {image.name} has "
            "none; search the plain set"
        )
    pictures = list_parts(image)
    if len(pictures) != 1:
        raise ConfigError(
            f"{image} holds {len(pictures)} pictures; give a file with one, or the id of a registered sample"
        )
    _, opened = open_path(Inputs(image.parent), image.name, pictures[0])
    if isinstance(opened, DecodeError):
        raise opened
    try:
        pixels = preprocess(opened.pixels(pictures[0], spec.decoding), spec)
    finally:
        opened.close()
    device = choose_device(run.device)
    backbone = load_for_set(source, features.spec["identity"], run, device)
    layers = tuple(sorted({int(name.split("/")[1]) for name in parts if "/" in name}))
    dtype = next(kind for kind in TORCH_DTYPES.values() if kind == backbone.dtype)
    with torch.inference_mode():
        batch = to_pixels(torch.from_numpy(stack([pixels], spec)), spec, device=str(backbone.device), dtype=dtype)
        tokens = backbone(batch, layers=layers)
    return np.concatenate([pick(tokens, name)[0].float().cpu().numpy().reshape(-1) for name in parts])
