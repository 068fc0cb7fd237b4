"""`--geometry hf`: against transformers' own processors, and DINOv3's steps restated."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pixel_specs import DINOV2, DINOV3, MEAN, STD, hf_spec, noise, our_pixels

from featstore.errors import ConfigError
from featstore.images import decode, preprocess
from featstore.images.hf import canonical_processor, hf_size

# The checkpoint's own processor


SIZES = [(300, 400), (400, 300), (224, 224), (256, 256), (97, 613), (37, 20)]


def transformers_pixels(config: dict[str, Any], image: np.ndarray) -> np.ndarray:
    """What transformers' Pillow processor of that class makes of the image: (3, H, W) float32."""
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    classes = {"Bit": BitImageProcessorPil, "CLIP": CLIPImageProcessorPil, "ViT": ViTImageProcessorPil}
    kind = config["image_processor_type"].split("ImageProcessor")[0]
    options = {key: value for key, value in config.items() if key != "image_processor_type"}
    processor = classes[kind](**options)
    return np.asarray(processor(Image.fromarray(image).convert("RGB"), return_tensors="np")["pixel_values"][0])


CONFIGS = {
    "dinov2": DINOV2,
    "class defaults": {"image_processor_type": "BitImageProcessor"},
    "fixed size": {**DINOV2, "size": {"height": 98, "width": 126}, "do_center_crop": False},
    "fixed size, default crop": {key: DINOV2[key] for key in ("image_processor_type", "image_mean", "image_std")}
    | {"size": {"height": 256, "width": 300}},
    "old numbers": {"image_processor_type": "CLIPImageProcessor", "size": 240, "crop_size": 223},
    "crop not square": {**DINOV2, "crop_size": {"height": 196, "width": 251}},
    "bilinear": {**DINOV2, "resample": 2},
    "lanczos": {**DINOV2, "resample": 1},
    "vit": {"image_processor_type": "ViTImageProcessorFast", "size": {"height": 64, "width": 80}},
    "not normalised": {**DINOV2, "do_normalize": False},
}


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("shape", [*SIZES, (120, 97, 3), (300, 301, 3)])
def test_hf_equals_transformers_bit_for_bit(name: str, shape: tuple[int, ...]) -> None:
    image = noise(*shape)
    ours, theirs = our_pixels(image, hf_spec(CONFIGS[name])), transformers_pixels(CONFIGS[name], image)
    assert ours.dtype == theirs.dtype == np.float32
    np.testing.assert_array_equal(ours, theirs)


def dinov3_pixels(image: np.ndarray, height: int, width: int, mode: str) -> np.ndarray:
    """DINOv3's steps restated with torch: RGB, rescale, resize floats with antialias, normalise."""
    rgb = torch.from_numpy(np.asarray(Image.fromarray(image).convert("RGB")).copy()).permute(2, 0, 1)[None]
    rescaled = rgb * 0.00392156862745098
    resized = torch.nn.functional.interpolate(rescaled, (height, width), mode=mode, antialias=True, align_corners=False)
    mean, std = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (MEAN, STD))
    return ((resized - mean) / std)[0].numpy()


@pytest.mark.parametrize("resample", [2, 3])
@pytest.mark.parametrize("shape", [*SIZES, (300, 301, 3)])
def test_hf_equals_the_steps_of_dinov3(shape: tuple[int, ...], resample: int) -> None:
    image = noise(*shape)
    config = DINOV3 | {"resample": resample, "size": {"height": 224, "width": 192}}
    theirs = dinov3_pixels(image, 224, 192, "bilinear" if resample == 2 else "bicubic")
    np.testing.assert_allclose(our_pixels(image, hf_spec(config)), theirs, atol=1e-6, rtol=0)


def test_hf_equals_transformers_dinov3_where_it_can_be_imported() -> None:
    pytest.importorskip("torchvision", reason="transformers' DINOv3 processor needs torchvision")
    from transformers import DINOv3ViTImageProcessor

    image = noise(300, 301, 3)
    options = {key: value for key, value in DINOV3.items() if key != "image_processor_type" and value is not None}
    theirs = DINOv3ViTImageProcessor(**options)(Image.fromarray(image), return_tensors="pt")["pixel_values"][0]
    np.testing.assert_allclose(our_pixels(image, hf_spec(DINOV3)), theirs.numpy(), atol=1e-6, rtol=0)


def test_hf_of_deep_images_goes_through_intensity() -> None:
    """A 16-bit image that spans its range exactly as an 8-bit one gives the 8-bit one's pixels."""
    image = noise(100, 120)
    image[0, :2] = 0, 255
    deep = image.astype(np.uint16) * 200 + 7
    np.testing.assert_array_equal(preprocess(deep, hf_spec(DINOV2)), preprocess(image, hf_spec(DINOV2)))
    np.testing.assert_allclose(preprocess(deep, hf_spec(DINOV3)), preprocess(image, hf_spec(DINOV3)), atol=1e-6)


def test_hf_settles_what_is_left_open() -> None:
    spec = hf_spec(DINOV2)
    assert (spec.height, spec.width, spec.quantise, spec.mean, spec.std) == (224, 224, "uint8", MEAN, STD)
    assert spec == hf_spec(DINOV2, mean=MEAN, std=STD, quantise="uint8")
    assert hf_spec(DINOV3).quantise == "none"
    assert len({spec, hf_spec(DINOV2), hf_spec(DINOV3)}) == 2
    assert hf_size(DINOV2 | {"crop_size": {"height": 196, "width": 224}}) == (196, 224)


def test_the_canonical_processor_is_a_fixed_point() -> None:
    for config in [*CONFIGS.values(), DINOV3]:
        canonical = canonical_processor(config)
        assert canonical_processor(canonical) == canonical == json.loads(json.dumps(canonical))
    assert canonical_processor(DINOV2) == canonical_processor(DINOV2 | {"data_format": None, "do_pad": False})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"image_processor_type": "SamImageProcessor"},
            "follows BitImageProcessor, CLIP.*processor is SamImageProcessor",
        ),
        ({"image_processor_type": None}, "the checkpoint's processor is None"),
        (
            {"do_pad": True},
            "does not follow do_pad of the checkpoint's BitImageProcessor; use --geometry dino or squash",
        ),
        ({"do_resize": False}, "needs a BitImageProcessor that resizes, and rescales by 1/255"),
        ({"do_rescale": False}, "that resizes, and rescales by 1/255"),
        ({"rescale_factor": 1 / 127.5}, "that resizes, and rescales by 1/255"),
        ({"resample": 6}, "does not follow resample 6"),
        ({**DINOV3, "resample": 1}, "does not follow resample 1"),
        ({"do_center_crop": False}, "needs one fixed size in whole pixels"),
        ({"size": {"height": 224.5, "width": 224}, "do_center_crop": False}, "needs one fixed size in whole pixels"),
        ({"crop_size": {"height": 0, "width": 224}}, "needs one fixed size in whole pixels"),
        ({"crop_size": {"shortest_edge": 20}}, "needs one fixed size in whole pixels"),
        ({"size": {"shortest_edge": 256, "longest_edge": 300}}, "does not follow a BitImageProcessor with size"),
        ({**DINOV3, "do_center_crop": True, "crop_size": 200}, "does not follow a DINOv3ViTImageProcessor with size"),
        ({"size": {"shortest_edge": 200}}, "cannot crop more than there is"),
        ({"size": {"height": 300, "width": 200}}, "cannot crop more than there is"),
    ],
)
def test_processors_that_are_not_followed(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        hf_size(DINOV2 | changes)


@pytest.mark.realdata
def test_real_radiographs_equal_transformers(shared_data: Path) -> None:
    folder = shared_data / "weights" / "dinov2-tiny-distilled" / "hf"
    config = json.loads((folder / "preprocessor_config.json").read_text())
    spec = hf_spec(config)
    for path in sorted((shared_data / "cxr" / "images").rglob("*.*"))[::40]:
        image = decode(path.read_bytes())
        np.testing.assert_array_equal(our_pixels(image, spec), transformers_pixels(config, image))
