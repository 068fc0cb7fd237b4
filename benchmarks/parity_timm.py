"""timm's own tokens, from a process of its own: `python parity_timm.py FOLDER NAME HEIGHT WIDTH`, timm on PYTHONPATH.

Writes FOLDER/weights.safetensors (random weights as timm saves them), FOLDER/pixels.pt and FOLDER/tokens.pt. timm
imports torchvision, whose operators a torch without CUDA does not have: their schemas are declared before, and none of
them is called here.
"""

import sys
from pathlib import Path

import torch
from parity_networks import images, randomise
from safetensors.torch import save_file


def declare_operators() -> torch.library.Library:
    """What `import torchvision` looks up; keep the result as long as they are needed."""
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def main() -> None:
    folder, name, height, width = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    library = declare_operators()
    import timm

    options = {"img_size": (height, width)} if height else {}
    network = randomise(timm.create_model(name, pretrained=False, num_classes=0, **options))
    pixels = images(*network.patch_embed.img_size)
    with torch.inference_mode():
        features = network.forward_features(pixels)
    cls, patches = features[:, 0], features[:, network.num_prefix_tokens :]
    save_file({key: value.contiguous() for key, value in network.state_dict().items()}, folder / "weights.safetensors")
    torch.save(pixels, folder / "pixels.pt")
    torch.save({"cls": cls.clone(), "patches": patches.clone()}, folder / "tokens.pt")
    del library


if __name__ == "__main__":
    main()
