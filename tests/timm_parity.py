"""Compare featstore's networks with timm's own forward, and with CONCH's own code, on the same random tensors.

    python tests/timm_parity.py [--conch DIR] [--full] [NAME ...]

Prints one JSON line per comparison: the largest |difference| of `cls` and of patches in float32; and for networks of
timm, in float64, what random numbers in the biases of keys that softmax should ignore change, and in their other
pieces. Run it in a process of
its own, with timm and torchvision installed or on PYTHONPATH. Beside a CPU torch the operators that torchvision's
library would define are declared here, which is enough for timm. DIR is a checkout of github.com/mahmoodlab/CONCH;
`--full` takes its published size instead of a small one.
"""

import argparse
import contextlib
import importlib
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if torch.version.cuda is None:
    _LIBRARY: Any = vars(torch.library)["Library"]("torchvision", "DEF")  # kept: its schemas last as long as it does
    for _name in ("nms", "qnms"):
        _LIBRARY.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from featstore.backbones import describe
from featstore.backbones.anatomy import find_key_biases
from featstore.backbones.architecture import VisionTransformer
from featstore.backbones.network import load_network
from featstore.backbones.pathology import BIOMEDCLIP, CONCH, UNI
from featstore.backbones.source import LoadOptions, find_family
from featstore.backbones.tensors import TorchFile

DEFAULT = ("vit_small_patch16_dinov3", "resnet18", "convnext_atto", "swin_tiny_patch4_window7_224")
RELEASES = {"biomedclip": BIOMEDCLIP, "uni": UNI, "conch": CONCH}
OPTIONS = LoadOptions(device="cpu", compute_dtype="float32")


def randomise(network: Any) -> dict[str, Tensor]:
    """Random numbers in every parameter and running statistic, biases and scales too; returns them all by name."""
    generator = torch.Generator().manual_seed(0)
    for name, value in network.state_dict().items():
        if not value.is_floating_point():
            continue
        noise = torch.randn(value.shape, generator=generator)
        if name.endswith("running_var"):
            value.copy_(1 + 0.1 * noise.abs())
        elif value.ndim > 1:
            value.copy_(noise * (2 / max(1, value[0].numel())) ** 0.5)
        else:
            value.copy_(0.2 * noise + float(name.endswith("weight")))
    return {name: value.clone() for name, value in network.state_dict().items()}


def report(network: str, against: str, size: tuple[int, int], pairs: dict[str, tuple[Tensor, Tensor]]) -> None:
    """One line on stdout."""
    differences = {name: float((ours - theirs).abs().max()) for name, (ours, theirs) in pairs.items()}
    scale = float(next(iter(pairs.values()))[1].abs().max())
    print(json.dumps({"network": network, "against": against, "size": size, "scale": scale, **differences}), flush=True)


def noise(height: int, width: int) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(height + width))


def small(name: str, *, full: bool) -> VisionTransformer:
    """The architecture of a release, or of a small network of its kind."""
    architecture = RELEASES[name].architecture
    assert isinstance(architecture, VisionTransformer)
    if full:
        return architecture
    architecture = replace(architecture, depth=3, num_heads=4, mlp_dim=192, native_size=96, counts=(0, 0.0))
    return replace(architecture, embed_dim=48) if name == "uni" else replace(architecture, embed_dim=32, patch_dim=48)


def timm_trunk(architecture: VisionTransformer, *, scaled: bool) -> Any:
    from timm.models.vision_transformer import VisionTransformer as Trunk

    return Trunk(
        img_size=architecture.native_size,
        patch_size=16,
        embed_dim=architecture.patch_width,
        depth=architecture.depth,
        num_heads=architecture.num_heads,
        mlp_ratio=architecture.mlp_dim / architecture.patch_width,
        num_classes=0,
        init_values=1e-5 if scaled else None,
        dynamic_img_size=True,
    ).eval()


def sizes(native: int) -> Iterator[tuple[int, int]]:
    yield native, native
    yield native - 32, native + 64
    yield native + 80, native - 16


def load_release(name: str, architecture: VisionTransformer, state: dict[str, Tensor], folder: Path) -> Any:
    """Our network, from a file as users have it."""
    file = folder / "pytorch_model.bin"
    torch.save(state, file)
    return load_network(TorchFile(file), architecture, find_family(name), "hf", OPTIONS)


def compare_trunks(folder: Path, *, full: bool) -> None:
    """BiomedCLIP (timm's CLS times the matrix) and UNI against timm's forward."""
    for name in ("uni", "biomedclip"):
        architecture = small(name, full=full)
        trunk = timm_trunk(architecture, scaled=name == "uni")
        state = randomise(trunk)
        matrix = noise(architecture.embed_dim, architecture.patch_width)[0, 0] * 0.1
        if name == "biomedclip":
            state = {f"visual.trunk.{key}": value for key, value in state.items()} | {"visual.head.proj.weight": matrix}
        backbone = load_release(name, architecture, state, folder)
        for size in sizes(architecture.native_size):
            pixels = noise(*size)
            with torch.inference_mode():
                theirs, vector = trunk.forward_features(pixels), trunk(pixels)
            found = backbone(pixels)
            vector = vector @ matrix.T if name == "biomedclip" else vector
            report(name, "timm", size, {"cls": (found.cls, vector), "patches": (found.patches, theirs[:, 1:])})


def compare_conch(checkout: Path, folder: Path, *, full: bool) -> None:
    """CONCH against the image tower of its own code."""
    sys.path.insert(0, str(checkout))
    code = importlib.import_module("conch.open_clip_custom.coca_model")

    architecture = small("conch", full=full)
    settings = code.CoCaVisionCfg(
        layers=architecture.depth,
        width=architecture.patch_width,
        num_heads=architecture.num_heads,
        image_size=architecture.native_size,
        attentional_pool_contrast=True,
        attentional_pool_caption=True,
        output_tokens=True,
    )
    tower = code._build_vision_tower(architecture.embed_dim, settings, architecture.patch_width).eval()
    state = {f"visual.{key}": value for key, value in randomise(tower).items()}
    backbone = load_release("conch", architecture, {**state, "logit_scale": torch.ones(())}, folder)
    for size in sizes(architecture.native_size):
        pixels = noise(*size)
        with torch.inference_mode():
            theirs, vector = tower.trunk(pixels), tower.forward_no_head(pixels, normalize=False)
        found = backbone(pixels)
        report("conch", "its own code", size, {"cls": (found.cls, vector), "patches": (found.patches, theirs[:, 1:])})


def compare_timm(name: str, folder: Path) -> None:
    """`timm:NAME`, from a file with the classifier still in it, against timm's network made the plain way."""
    import timm
    from safetensors.torch import save_file

    network = timm.create_model(name).eval()
    state = randomise(network)
    file = folder / "model.safetensors"
    save_file({key: value.contiguous() for key, value in state.items()}, file)
    source = describe(f"timm:{name}", weights=file)
    facts = source.architecture
    backbone = source.load(device="cpu", compute_dtype="float32")
    native = facts.native_size
    others = () if facts.fixed_size else ((native, 2 * native), (2 * native, native))
    for size in ((native, native), *others):
        pixels = noise(*size)
        plain: Any = network
        if size != (native, native):
            with contextlib.suppress(TypeError):  # networks of convolutions take any size as they are
                plain = timm.create_model(name, dynamic_img_size=True).eval()
                plain.load_state_dict(state)
        with torch.inference_mode():
            features = plain.forward_features(pixels)
            vector = plain.forward_head(features, pre_logits=True)
        if facts.summary == "token":
            vector = features[:, 0]
        prefix = getattr(plain, "num_prefix_tokens", 0)
        if features.ndim == 3:
            patches = features[:, prefix:]
        elif getattr(plain, "output_fmt", "") == "NHWC":
            patches = features.flatten(1, 2)
        else:
            patches = features.flatten(2).mT
        found = backbone(pixels)
        pairs = {"cls": (found.cls, vector), "patches": (found.patches, patches)}
        if prefix > 1:
            pairs["registers"] = (found.registers, features[:, 1:prefix])
        report(f"timm:{name}", "timm", size, pairs)


def move_key_biases(name: str) -> None:
    """Add random numbers to what `find_key_biases` found in a network of timm, then to the rest of the same biases."""
    import timm

    network = timm.create_model(name, num_classes=0).eval()
    randomise(network)
    found = find_key_biases(network.double(), find_family("timm"))
    pixels = noise(*network.pretrained_cfg["input_size"][1:]).double()
    moved = {}
    for which in ("ignored", "others"):
        with torch.inference_mode():
            before = network(pixels)
            for live, part in found.items():
                bias = network.get_parameter(live)
                change = torch.randn(bias.shape, dtype=bias.dtype, generator=torch.Generator().manual_seed(1))
                inside = torch.zeros_like(bias, dtype=torch.bool)
                inside[part] = True
                bias += torch.where(inside if which == "ignored" else ~inside, change, 0.0)
            moved[which] = float((network(pixels) - before).abs().max())
    print(json.dumps({"network": f"timm:{name}", "key_biases": len(found), **moved}), flush=True)


def main() -> None:
    """Run the comparisons that the command line asks for."""
    parser = argparse.ArgumentParser(description="Compare featstore's networks with timm's and CONCH's own.")
    parser.add_argument("names", nargs="*", default=DEFAULT, help="models of timm")
    parser.add_argument("--conch", type=Path, help="checkout of CONCH")
    parser.add_argument("--full", action="store_true", help="published sizes of BiomedCLIP, UNI and CONCH")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compare_trunks(Path(folder), full=arguments.full)
        if arguments.conch is not None:
            compare_conch(arguments.conch, Path(folder), full=arguments.full)
        for name in arguments.names:
            compare_timm(name, Path(folder))
            move_key_biases(name)


if __name__ == "__main__":
    main()
