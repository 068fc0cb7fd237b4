"""A checkpoint's `preprocessor_config.json`: what of it decides pixels, and the pixels that follow.

Two kinds exist. Most image processors resize 8-bit values with Pillow and normalise afterwards. DINOv3's rescales to
[0, 1] first and resizes floats with torch. Of the first kind transformers also has torchvision variants, whose
normalised values differ by up to 0.02; the Pillow ones are followed here.
"""

from typing import Any

import numpy as np
from jaxtyping import UInt8

from featstore.errors import ConfigError, DecodeError
from featstore.images.sizes import MAX_PIXELS

PILLOW_FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # in the order of Pillow's numbers
INSTEAD = "use --geometry dino or squash"

_ALWAYS = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
_CLIP = {
    "size": {"shortest_edge": 224},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
_SQUARE = {"size": {"height": 224, "width": 224}, "resample": 2, "do_center_crop": False, "crop_size": None}

# What transformers' classes take for a key that the file leaves out.
PROCESSORS: dict[str, dict[str, Any]] = {
    "BitImageProcessor": _ALWAYS | _CLIP,
    "CLIPImageProcessor": _ALWAYS | _CLIP,
    "DINOv3ViTImageProcessor": _ALWAYS
    | _SQUARE
    | {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
    "ViTImageProcessor": _ALWAYS | _SQUARE | {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]},
}
RESCALE_FIRST = {"DINOv3ViTImageProcessor"}


def canonical_processor(processor: dict[str, Any]) -> dict[str, Any]:
    """The keys that decide pixels, transformers' defaults filled in. Canonical input comes back unchanged.

    Raises:
        ConfigError: a class, a step or a size that is not followed.
    """
    kind = str(processor.get("image_processor_type")).removesuffix("Fast").removesuffix("Pil")
    if kind not in PROCESSORS:
        raise ConfigError(
            f"--geometry hf follows {', '.join(PROCESSORS)}; the checkpoint's processor is {kind}; {INSTEAD}"
        )
    full: dict[str, Any] = dict(PROCESSORS[kind])
    for key, value in processor.items():
        if key in full and value is not None:
            full[key] = value
        elif key.startswith("do_") and key != "do_convert_rgb" and value:
            raise ConfigError(f"--geometry hf does not follow {key} of the checkpoint's {kind}; {INSTEAD}")
    if not (full["do_resize"] and full["do_rescale"] and full["rescale_factor"] == 1 / 255):
        raise ConfigError(f"--geometry hf needs a {kind} that resizes, and rescales by 1/255; {INSTEAD}")
    if full["resample"] not in ((2, 3) if kind in RESCALE_FIRST else range(len(PILLOW_FILTERS))):
        raise ConfigError(
            f"--geometry hf does not follow resample {full['resample']} of the checkpoint's {kind}; {INSTEAD}"
        )
    if not full["do_normalize"]:
        full["image_mean"], full["image_std"] = [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]
    square = processor.get("default_to_square") or PROCESSORS[kind]["crop_size"] is None
    full["size"] = _edges(full["size"], square=bool(square))
    full["crop_size"] = _edges(full["crop_size"], square=True) if full["do_center_crop"] else None
    _check_sizes(kind, full["size"], full["crop_size"])
    return {
        "image_processor_type": kind,
        **full,
        "image_mean": [float(value) for value in full["image_mean"]],
        "image_std": [float(value) for value in full["image_std"]],
    }


def _edges(size: Any, *, square: bool) -> dict[str, Any]:
    """A size as a dictionary with only the edges that count; older files give one number."""
    if isinstance(size, int):
        return {"height": size, "width": size} if square else {"shortest_edge": size}
    return {str(edge): pixels for edge, pixels in dict(size or {}).items() if pixels is not None}


def _check_sizes(kind: str, size: dict[str, Any], crop: dict[str, Any] | None) -> None:
    said = f"{kind} with size {size} and crop {crop}"
    edges = [*size.values(), *(crop or {}).values()]
    if any(not isinstance(edge, int) or edge < 1 for edge in edges) or set(crop or size) != {"height", "width"}:
        raise ConfigError(f"--geometry hf needs one fixed size in whole pixels, the checkpoint has a {said}; {INSTEAD}")
    if set(size) not in ({"height", "width"}, {"shortest_edge"}) or (crop and kind in RESCALE_FIRST):
        raise ConfigError(f"--geometry hf does not follow a {said}; {INSTEAD}")
    if crop and any(crop[side] > size.get(side, size.get("shortest_edge")) for side in crop):
        raise ConfigError(
            f"--geometry hf cannot crop more than there is: {said}; correct the checkpoint's preprocessor_config.json"
        )


def hf_size(processor: dict[str, Any]) -> tuple[int, int]:
    """(height, width) in pixels of what the processor makes of every image.

    Raises:
        ConfigError: as `canonical_processor`.
    """
    full = canonical_processor(processor)
    size = full["crop_size"] or full["size"]
    return size["height"], size["width"]


def resized_size(height: int, width: int, size: dict[str, int]) -> tuple[int, int]:
    """(height, width) after the processor's resize; the longer side is cut, not rounded, to whole pixels.

    Raises:
        DecodeError: an image so long that this would be absurdly large.
    """
    if "shortest_edge" not in size:
        return size["height"], size["width"]
    short = size["shortest_edge"]
    long = int(short * max(height, width) / min(height, width))
    if short * long > MAX_PIXELS:
        raise DecodeError(f"{height}x{width} pixels are too long a shape to resize the short side to {short}")
    return (long, short) if width <= height else (short, long)


def pillow_pixels(
    image: UInt8[np.ndarray, "H W"] | UInt8[np.ndarray, "H W 3"], processor: dict[str, Any]
) -> UInt8[np.ndarray, "C h w"]:
    """Resized and cropped bit for bit as transformers' Pillow processors do; grey stays one channel.

    Raises:
        DecodeError: as `resized_size`.
    """
    from PIL import Image

    height, width = resized_size(image.shape[0], image.shape[1], processor["size"])
    resized = np.array(Image.fromarray(image).resize((width, height), Image.Resampling(processor["resample"])))
    crop = processor["crop_size"] or {"height": height, "width": width}
    top, left = (height - crop["height"]) // 2, (width - crop["width"]) // 2
    cropped = resized[top : top + crop["height"], left : left + crop["width"]]
    return np.ascontiguousarray(cropped[None] if cropped.ndim == 2 else cropped.transpose(2, 0, 1))
