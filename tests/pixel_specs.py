"""Specifications, checkpoint processors and images for tests of preprocessing."""

from typing import Any

import numpy as np
import torch
from PIL import Image

from featstore.images import PreprocessSpec, preprocess, stack, to_pixels
from featstore.images.hf import hf_size

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DINOV2: dict[str, Any] = {  # as on the hub
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": list(MEAN),
    "image_processor_type": "BitImageProcessor",
    "image_std": list(STD),
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 256},
}
DINOV3: dict[str, Any] = {
    "crop_size": None,
    "data_format": "channels_first",
    "default_to_square": True,
    "do_center_crop": None,
    "do_convert_rgb": None,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": list(MEAN),
    "image_processor_type": "DINOv3ViTImageProcessorFast",
    "image_std": list(STD),
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 224, "width": 224},
}


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def photo(height: int, width: int, channels: int = 0) -> np.ndarray:
    """Smooth structure with a little noise, as in a photograph."""
    y, x = np.mgrid[:height, :width]
    planes = [
        128 + 90 * np.sin(x / 9 + k) * np.cos(y / 7) + 0.03 * noise(height, width, seed=k)
        for k in range(max(channels, 1))
    ]
    stacked = np.stack(planes, -1).clip(0, 255).astype(np.uint8)
    return stacked if channels else stacked[..., 0]


def make_spec(geometry: Any = "squash", height: int = 32, width: int = 32, **changes: Any) -> PreprocessSpec:
    return PreprocessSpec(
        **{"geometry": geometry, "height": height, "width": width, "mean": MEAN, "std": STD} | changes
    )


def hf_spec(processor: dict[str, Any], **changes: Any) -> PreprocessSpec:
    height, width = hf_size(processor)
    fields: dict[str, Any] = {"geometry": "hf", "height": height, "width": width, "processor": processor}
    return PreprocessSpec(**fields | changes)


def planes(image: np.ndarray) -> np.ndarray:
    return image[None] if image.ndim == 2 else image.transpose(2, 0, 1)


def pillow_resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bicubic in (C, H, W), the horizontal pass first in every version of Pillow."""
    across = Image.fromarray(image).resize((width, image.shape[0]), Image.Resampling.BICUBIC)
    return planes(np.asarray(across.resize((width, height), Image.Resampling.BICUBIC)))


def our_pixels(image: np.ndarray, spec: PreprocessSpec) -> np.ndarray:
    """What the network is fed for one image: (3, H, W) float32."""
    batch = torch.from_numpy(stack([preprocess(image, spec)], spec))
    return to_pixels(batch, spec, device="cpu", dtype=torch.float32)[0].numpy()
