"""DINOv3's ConvNeXt against Meta's own code, which the user has beside the checkout: `meta_convnext.py META_ROOT`.

Meta's network gets random numbers in every parameter and is saved as Meta saves it; ours is loaded from that file.
"""

import importlib.util
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from featstore.backbones import describe

SIZES = ((224, 224), (64, 64), (96, 160))


def metas_network(meta_root: Path) -> Any:
    """Meta's ConvNeXt tiny out of `dinov3/models/convnext.py` below `meta_root`, with random parameters."""
    file = meta_root / "dinov3" / "models" / "convnext.py"
    spec = importlib.util.spec_from_file_location("metas_convnext", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network = module.get_convnext_arch("convnext_tiny")()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            deviation = 0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            offset = 1.0 if name.endswith(("norm.weight", ".0.weight", ".1.weight")) and parameter.ndim == 1 else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * deviation + offset)
    return network.eval()


def compare(meta_root: Path) -> float:
    """Largest difference of CLS and patches in float32 over square and oblong images."""
    network = metas_network(meta_root)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "dinov3_convnext_tiny_pretrain_lvd1689m.pth"
        torch.save(network.state_dict(), file)
        backbone = describe("dinov3-convnext-tiny", weights=file).load(device="cpu", compute_dtype="float32")
    largest = 0.0
    for height, width in SIZES:
        pixels = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(height))
        with torch.no_grad():
            expected = network(pixels, is_training=True)
        tokens = backbone(pixels)
        for found, wanted in (
            (tokens.cls, expected["x_norm_clstoken"]),
            (tokens.patches, expected["x_norm_patchtokens"]),
        ):
            largest = max(largest, float((found - wanted).abs().max()))
    return largest


if __name__ == "__main__":
    print(compare(Path(sys.argv[1])))
