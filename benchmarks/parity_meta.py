"""Meta's own networks beside ours on the same tensors: its constructors, its checkpoints, its key names.

Meta's repositories are given as folders and only their models are imported; xformers is switched off in them, so that
attention is torch's own.
"""

import importlib
import math
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from parity_networks import images, randomise

from featstore.backbones import BackboneSource, describe, dinov2, matching
from featstore.backbones.network import build_empty, weights_of
from featstore.backbones.source import find_family, from_files
from featstore.backbones.weights import find_files

# Our name, the repository, what makes the network in it, arguments.
LOADED = (
    ("dinov2-small", "dinov2", "dinov2_vits14", {}),
    ("dinov2-small-reg", "dinov2", "dinov2_vits14_reg", {}),
    ("dinov2-small, gated as in g", "dinov2", "_make_dinov2_model", {"arch_name": "vit_small"}),
    ("dinov3-small", "dinov3", "dinov3_vits16", {}),
    ("dinov3-small-plus", "dinov3", "dinov3_vits16plus", {}),
    ("dinov3-convnext-tiny", "dinov3", "dinov3_convnext_tiny", {}),
)
MAPPED = (
    ("dinov2-giant", "dinov2", "dinov2_vitg14"),
    ("dinov2-giant-reg", "dinov2", "dinov2_vitg14_reg"),
    ("dinov3-huge-plus", "dinov3", "dinov3_vith16plus"),
    ("dinov3-7b", "dinov3", "dinov3_vit7b16"),
)
SIZES = {"dinov2": ((518, 518), (224, 224), (224, 336)), "dinov3": ((224, 224), (512, 512), (224, 320))}


def constructors(repository: str, folder: Path) -> Any:
    """The module of Meta's that makes the networks of its releases."""
    os.environ["XFORMERS_DISABLED"] = "1"
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says three times that xformers is switched off
        return importlib.import_module(f"{repository}.hub.backbones")


def source_of(name: str, file: Path, pos_interp: str | None = None) -> BackboneSource:
    """A checkpoint of Meta's as ours; the gated small network is no release and so has no name."""
    if name != "dinov2-small, gated as in g":
        return describe(name, weights=file, pos_interp=pos_interp)
    width = dinov2.SMALL.architecture.embed_dim
    facts = replace(dinov2.SMALL.architecture, mlp="swiglu", mlp_dim=dinov2.swiglu_dim(width, 4))
    return from_files(
        name,
        facts,
        find_files(file),
        weights={"kind": "local"},
        origin=str(file),
        digest_cache=None,
        pos_interp=pos_interp,
    )


def compare_loaded(folders: dict[str, Path], scratch: Path) -> Iterator[tuple[str, int, int, float, float]]:
    """(network, height, width, max |difference| of CLS and of patches) in float32, positions as Meta resizes them."""
    for name, repository, maker, options in LOADED:
        network = randomise(_make(folders, repository, maker, options))
        file = scratch / f"{name}.pth"
        torch.save(network.state_dict(), file)
        backbone = source_of(name, file).load(device="cpu", compute_dtype="float32")
        for height, width in SIZES[repository]:
            pixels = images(height, width)
            with torch.inference_mode():
                theirs = network.forward_features(pixels)
            ours = backbone(pixels)
            cls = float((theirs["x_norm_clstoken"] - ours.cls).abs().max())
            yield name, height, width, cls, float((theirs["x_norm_patchtokens"] - ours.patches).abs().max())


def compare_interpolations(scratch: Path) -> Iterator[tuple[int, int, float, float, float, float]]:
    """(height, width, max |difference| of CLS, of patches, lowest cosine of CLS, of patches) between hf and meta."""
    file = scratch / "dinov2-small.pth"
    hf, meta = (
        source_of("dinov2-small", file, way).load(device="cpu", compute_dtype="float32") for way in ("hf", "meta")
    )
    for height, width in SIZES["dinov2"]:
        a, b = hf(images(height, width)), meta(images(height, width))
        pairs = ((a.cls, b.cls), (a.patches, b.patches))
        differences = [float((x - y).abs().max()) for x, y in pairs]
        cosines = [float(torch.nn.functional.cosine_similarity(x, y, dim=-1).min()) for x, y in pairs]
        yield height, width, differences[0], differences[1], cosines[0], cosines[1]


def map_keys(folders: dict[str, Path]) -> Iterator[tuple[str, int, int, int, int, list[str]]]:
    """(network, our parameters, numbers in them, Meta's tensors, numbers in them, kinds of tensors not used).

    Nothing has numbers here. A parameter without a key, a key without a parameter, or a shape that does not fit raises.
    """
    for name, repository, maker in MAPPED:
        with torch.device("meta"):
            theirs = {
                key: tuple(value.shape) for key, value in _make(folders, repository, maker, {}).state_dict().items()
            }
        facts = describe(name, random_weights=0).architecture
        family = find_family(facts.family)
        live = {key: tuple(value.shape) for key, value in weights_of(build_empty(facts, family)).items()}
        tensors = _Shapes(theirs)
        found = matching.match(family, live, tensors)
        assert found.dialect.name == "meta"
        assert found.keys.keys() == live.keys()
        assert len(set(found.keys.values())) == len(live)  # no piece twice
        matching.check_shapes(found, live, tensors)
        used = {key.name for key in found.keys.values()}
        kinds = sorted(
            {".".join("N" if part.isdigit() else part for part in key.split(".")) for key in theirs.keys() - used}
        )
        numbers = [sum(math.prod(shape) for shape in shapes.values()) for shapes in (live, theirs)]
        yield name, len(live), numbers[0], len(theirs), numbers[1], kinds


class _Shapes:
    """Shapes as a `featstore.backbones.tensors.Tensors` that can only be matched."""

    origin = "Meta's network"

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.shapes = shapes

    def read(self, key: Any, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        raise AssertionError("nothing is read")


def _make(folders: dict[str, Path], repository: str, maker: str, options: dict[str, Any]) -> Any:
    if maker.startswith("_"):
        options = {**options, "ffn_layer": "swiglufused"}
    return getattr(constructors(repository, folders[repository]), maker)(pretrained=False, **options).eval()
