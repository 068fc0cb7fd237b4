"""Our networks of convolutions against torchvision's and timm's: `parity_torchvision.py SITE`.

SITE is a folder in which both packages lie unpacked. They run in a process of their own, with every parameter and
running statistic random, and leave their weights, images and features in files; ours is loaded from those weights. On
torch without CUDA torchvision's compiled operators do not load, so the two that it registers on import are declared
first; none of these networks calls them.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from featstore.backbones import describe

SIZES = ((224, 224), (64, 64), (96, 160))
NAMES = ("resnet50", "vgg19", "densenet201")  # ResNet-152 is the first with more blocks
THEIRS = """
import sys
from pathlib import Path
import torch
from torch import nn
declared = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    declared.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import timm
import torchvision
from safetensors.torch import save_file

package, name, folder, sizes = sys.argv[1], sys.argv[2], Path(sys.argv[3]), eval(sys.argv[4])
network = timm.create_model(name) if package == "timm" else getattr(torchvision.models, name)()
network.eval()
generator = torch.Generator().manual_seed(1)
with torch.no_grad():
    for key, value in network.state_dict().items():
        if key.endswith("running_var"):
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
        elif value.ndim == 1:
            scale = key.endswith("weight") * (0.3 if "bn3" in key else 1.0)
            value.copy_(torch.randn(value.shape, generator=generator) * 0.05 + scale)
        elif value.ndim > 1:
            value.copy_(torch.randn(value.shape, generator=generator) * (2 / value[0].numel()) ** 0.5)
if package == "timm":
    save_file(network.state_dict(), folder / "weights.safetensors")
else:
    torch.save(network.state_dict(), folder / "weights.pth")
if name == "vgg19":
    layer = network.features
    if package == "timm":
        network.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    else:
        network.classifier[6] = nn.Identity()
else:
    layer = network.layer4 if name.startswith("resnet") else network.features
    setattr(network, "fc" if name.startswith("resnet") else "classifier", nn.Identity())
maps = []
layer.register_forward_hook(lambda module, inputs, output: maps.append(output.clone()))
found = []
for height, width in sizes:
    pixels = torch.randn(2, 3, height, width, generator=generator)
    with torch.inference_mode():
        vector = network(pixels)
    last = maps.pop().relu()  # torchvision's DenseNet applies it after its features, the others within
    found.append((pixels, vector.clone(), last.flatten(2).transpose(1, 2).clone()))
torch.save(found, folder / "features.pt")
"""


def _difference(site: Path, package: str, name: str) -> float:
    # timm's VGG is another network at other sizes: its first matrix is a convolution.
    sizes = SIZES[:1] if (package, name) == ("timm", "vgg19") else SIZES
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-c", THEIRS, package, name, folder, repr(sizes)],
            env={**os.environ, "PYTHONPATH": str(site)},
            check=True,
        )
        suffix = "safetensors" if package == "timm" else "pth"
        source = describe(name, weights=Path(folder) / f"weights.{suffix}")
        backbone = source.load(device="cpu", compute_dtype="float32")
        features = torch.load(Path(folder) / "features.pt")
    largest = 0.0
    for pixels, vector, patches in features:
        tokens = backbone(pixels)
        for found, wanted in ((tokens.cls, vector), (tokens.patches, patches)):
            assert found.shape == wanted.shape
            largest = max(largest, float((found - wanted).abs().max()) / max(1.0, float(wanted.abs().max())))
    return largest


def torchvision_parity(site: Path) -> dict[str, float]:
    """Largest difference in float32 of vectors and maps, per package and network, as a part of the largest value.

    Square and oblong images; where the largest value is below 1 the difference counts as it is.
    """
    return {
        f"{package} {name}": _difference(site, package, name) for name in NAMES for package in ("torchvision", "timm")
    }


if __name__ == "__main__":
    for network in NAMES:
        for origin in ("torchvision", "timm"):
            print(f"{origin} {network}: {_difference(Path(sys.argv[1]), origin, network):.2e}", flush=True)
