"""Geometry, depth and normalisation: against Pillow and closed forms."""

import dataclasses
import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pixel_specs import DINOV2, DINOV3, MEAN, STD, hf_spec, make_spec, noise, our_pixels, photo, pillow_resize, planes

from featstore.errors import ConfigError, DecodeError
from featstore.images import PreprocessSpec, decode, preprocess, stack, to_pixels
from featstore.images.hf import canonical_processor
from featstore.images.preprocess import IMPLEMENTATION
from featstore.images.resize import resize

# Resizing


@settings(deadline=None)
@given(
    st.integers(1, 200),
    st.integers(1, 200),
    st.integers(1, 120),
    st.integers(1, 120),
    st.booleans(),
    st.integers(0, 99),
)
def test_8_bits_stay_within_a_level_of_pillow(
    rows: int, columns: int, height: int, width: int, in_colour: bool, seed: int
) -> None:
    """Both round between their two passes; on noise that adds up to a second level at a few pixels."""
    for image in (noise(rows, columns, *([3] if in_colour else []), seed=seed), photo(rows, columns)):
        difference = np.abs(resize(image, height, width).astype(int) - pillow_resize(image, height, width))
        assert difference.max() <= 2
        assert (difference > 1).sum() <= 3 + difference.size / 1000


@pytest.mark.parametrize("shape", [(1024, 1024), (700, 1000), (1000, 700, 3), (512, 513)])
def test_a_radiograph_sampled_down_stays_within_one_level_of_pillow(shape: tuple[int, ...]) -> None:
    image = photo(shape[0], shape[1], 3 if len(shape) == 3 else 0)
    theirs = planes(np.asarray(Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC))).astype(int)
    assert np.abs(preprocess(image, make_spec(height=224, width=224)) - theirs).max() <= 1


@settings(deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 90), st.integers(1, 90))
def test_floats_equal_pillow(rows: int, columns: int, height: int, width: int) -> None:
    image = noise(rows, columns, seed=rows).astype(np.float32)
    theirs = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
    np.testing.assert_allclose(resize(image, height, width)[0], theirs, atol=0.02)


@settings(deadline=None)
@given(
    st.integers(1, 90),
    st.integers(1, 90),
    st.integers(1, 60),
    st.integers(1, 60),
    st.sampled_from([np.uint8, np.float32]),
)
def test_grey_equals_its_copy_in_three_channels(rows: int, columns: int, height: int, width: int, dtype: type) -> None:
    image: np.ndarray = noise(rows, columns, seed=columns).astype(dtype)
    three = resize(np.repeat(image[..., None], 3, axis=2), height, width)
    np.testing.assert_array_equal(three, np.repeat(resize(image, height, width), 3, axis=0))


def test_views_and_read_only_arrays() -> None:
    image = noise(40, 30, 3)
    expected = resize(image, 16, 16)
    frozen = image.copy()
    frozen.flags.writeable = False
    np.testing.assert_array_equal(resize(frozen, 16, 16), expected)
    flipped = np.ascontiguousarray(image[::-1, :, ::-1])[::-1, :, ::-1]
    np.testing.assert_array_equal(resize(flipped, 16, 16), expected)


# Geometries


@pytest.mark.parametrize("geometry", ["squash", "letterbox"])
@pytest.mark.parametrize("shape", [(32, 48), (32, 48, 3)])
def test_an_image_of_the_right_size_is_untouched(geometry: str, shape: tuple[int, ...]) -> None:
    image = noise(*shape)
    np.testing.assert_array_equal(preprocess(image, make_spec(geometry, 32, 48)), planes(image))
    as_floats = preprocess(image, make_spec(geometry, 32, 48, quantise="none"))
    assert as_floats.dtype == np.float32
    np.testing.assert_array_equal(as_floats, planes(image))


@pytest.mark.parametrize("geometry", ["squash", "letterbox", "dino", "short", "spline"])
@pytest.mark.parametrize("quantise", ["uint8", "none"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float32])
@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (50, 1), (33, 47, 3), (7, 90)])
def test_shape_type_and_range(shape: tuple[int, ...], dtype: type, quantise: str, geometry: str) -> None:
    spec = make_spec(geometry, 28, 42, quantise=quantise)
    result = preprocess(noise(*shape).astype(dtype), spec)
    assert result.shape == (3 if len(shape) == 3 else 1, 28, 42)
    assert result.dtype == (np.uint8 if quantise == "uint8" else np.float32)
    assert result.min() >= 0
    assert result.max() <= 255
    assert result.flags.c_contiguous


@settings(deadline=None)
@given(st.integers(1, 120), st.integers(1, 120), st.integers(1, 50), st.integers(1, 50))
def test_letterbox_by_exact_arithmetic(rows: int, columns: int, height: int, width: int) -> None:
    from fractions import Fraction

    image = np.full((rows, columns), 200, np.uint8)
    box = preprocess(image, make_spec("letterbox", height, width))[0]
    scale = min(Fraction(height, rows), Fraction(width, columns))
    inner = [max(1, int(side * scale + Fraction(1, 2))) for side in (rows, columns)]
    top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
    expected = np.zeros((height, width), np.uint8)
    expected[top : top + inner[0], left : left + inner[1]] = 200
    np.testing.assert_array_equal(box, expected)
    assert max(top, left) == 0 or scale * rows < height or scale * columns < width


def test_letterbox_holds_the_whole_image() -> None:
    image = photo(100, 50)
    box = preprocess(image, make_spec("letterbox", 40, 60))
    np.testing.assert_array_equal(box[:, :, 20:40], resize(image, 40, 20))
    assert not box[:, :, :20].any()
    assert not box[:, :, 40:].any()


@pytest.mark.parametrize("shape", [(300, 400), (400, 300, 3), (224, 224), (1000, 999), (97, 613), (30, 40)])
@pytest.mark.parametrize("side", [224, 98, 512])
def test_dino_equals_resize_and_centre_crop_with_pillow(shape: tuple[int, ...], side: int) -> None:
    """The rule of torchvision's Resize(side * 256 / 224) and CenterCrop(side), written out with Pillow."""
    image = photo(shape[0], shape[1], 3 if len(shape) == 3 else 0)
    short = int(side * 256 / 224 + 0.5)
    rows, columns = shape[:2]
    size = (short, int(short * columns / rows)) if rows <= columns else (int(short * rows / columns), short)
    resized = pillow_resize(image, *size)
    top, left = (round((length - side) / 2.0) for length in size)
    expected = resized[:, top : top + side, left : left + side].astype(int)
    difference = np.abs(preprocess(image, make_spec("dino", side, side)).astype(int) - expected)
    assert difference.max() <= 2
    assert (difference > 1).mean() < 1e-3


@settings(deadline=None)
@given(st.integers(1, 150), st.integers(1, 150), st.integers(8, 60), st.integers(8, 60))
def test_dino_fills_any_target(rows: int, columns: int, height: int, width: int) -> None:
    """A constant image stays constant: the crop never leaves the resized image."""
    box = preprocess(np.full((rows, columns), 90, np.uint8), make_spec("dino", height, width))
    assert box.shape == (1, height, width)
    assert (box == 90).all()


def test_absurdly_long_images_are_refused() -> None:
    with pytest.raises(DecodeError, match="1x200000000 pixels are too long a shape for the geometry short"):
        preprocess(np.broadcast_to(np.zeros(1, np.uint8), (1, 200_000_000)), make_spec("short", 224, 224))
    with pytest.raises(DecodeError, match="1x20000 pixels are too long a shape for the geometry dino"):
        preprocess(np.zeros((1, 20000), np.uint8), make_spec("dino", 224, 224))
    with pytest.raises(DecodeError, match="20000x1 pixels are too long a shape to resize the short side to 256"):
        preprocess(np.zeros((20000, 1), np.uint8), hf_spec(DINOV2))


# Depth and quantisation


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_deep_images_are_resized_before_they_are_rounded(dtype: type) -> None:
    shift = 0 if dtype == np.uint16 else 500
    image: np.ndarray = (photo(120, 90).astype(np.float64) * 17 - shift).astype(dtype)
    low, high = float(image.min()), float(image.max())
    scaled = ((image.astype(np.float64) - low) / (high - low) * 255).astype(np.float32)
    exact = np.asarray(Image.fromarray(scaled).resize((40, 56), Image.Resampling.BICUBIC)).clip(0, 255)
    as_floats = preprocess(image, make_spec(height=56, width=40, quantise="none"))[0]
    np.testing.assert_allclose(as_floats, exact, atol=0.01)
    rounded = preprocess(image, make_spec(height=56, width=40))[0]
    np.testing.assert_array_equal(rounded, np.rint(as_floats))


def test_minmax_applies_to_8_bits_too() -> None:
    image = np.array([[100, 110], [105, 120]], np.uint8)
    spread = preprocess(image, make_spec(height=2, width=2, intensity="minmax"))
    np.testing.assert_array_equal(spread[0], [[0, 128], [64, 255]])  # 127.5 and 63.75


def test_quantisation_costs_no_more_than_it_must() -> None:
    image = photo(300, 200)
    rounded, exact = (preprocess(image, make_spec(height=224, width=224, quantise=q)) for q in ("uint8", "none"))
    assert np.abs(rounded - exact).max() < 1.6  # both passes round


# The specification


def test_the_dictionary_is_canonical() -> None:
    spec = make_spec("letterbox", 224, 448, intensity="minmax", quantise="none")
    assert spec.as_dict() == {
        "implementation": IMPLEMENTATION,
        "geometry": "letterbox",
        "height": 224,
        "width": 448,
        "intensity": "minmax",
        "quantise": "none",
        "resample": "bicubic",
        "antialias": True,
        "resize_with": "torch",
        "mean": list(MEAN),
        "std": list(STD),
        "processor": None,
    }
    assert json.loads(json.dumps(spec.as_dict())) == spec.as_dict()
    assert make_spec().as_dict()["quantise"] == "uint8"
    assert len({spec, make_spec(), make_spec()}) == 2


def test_equal_intensities_in_other_words_give_equal_dictionaries() -> None:
    first, second = (make_spec(intensity=text) for text in ("window:40/400+clahe", "window:mediastinum + clahe:2.0/8"))
    assert first == second
    assert first.as_dict() == second.as_dict()
    assert first.as_dict()["intensity"] == "window:-160..240+clahe:2/8"
    assert make_spec(intensity="equalise").as_dict() != make_spec().as_dict()


def test_the_dictionary_of_spline_says_that_nothing_is_antialiased() -> None:
    described = make_spec("spline").as_dict()
    assert (described["resample"], described["antialias"], described["resize_with"]) == (
        "quadratic spline",
        False,
        "scipy",
    )


@pytest.mark.parametrize(
    ("intensity", "voi"),
    [("native", True), ("equalise", True), ("minmax", False), ("window:lung", False), ("bits:stored", False)],
)
def test_the_window_of_the_file_counts_for_native_alone(intensity: str, voi: bool) -> None:
    spec = make_spec(intensity=intensity, dicom_mode="raw_minmax", decode="scaled", height=20, width=30)
    assert spec.decoding.voi is voi
    assert (spec.decoding.dicom_mode, spec.decoding.decode, spec.decoding.target) == ("raw_minmax", "scaled", (20, 30))


@pytest.mark.parametrize(
    "spec", [lambda: make_spec("spline", decode="scaled"), lambda: hf_spec(DINOV2, decode="scaled")]
)
def test_scaled_decoding_is_refused_where_pixels_are_those_of_others(spec: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"decode scaled changes pixels, and geometry (spline|hf) repeats those of oth"
    ):
        spec()


def test_the_dictionary_of_hf() -> None:
    described = hf_spec(DINOV3).as_dict()
    assert (described["resample"], described["resize_with"], described["quantise"]) == ("bilinear", "torch", "none")
    described = hf_spec(DINOV2).as_dict()
    assert (described["resample"], described["resize_with"], described["quantise"]) == ("bicubic", "pillow", "uint8")
    assert described["processor"] == canonical_processor(DINOV2)
    mine = dict(DINOV2)
    spec = hf_spec(mine)
    mine["resample"] = 0
    assert spec.as_dict() == described
    described["processor"]["size"]["shortest_edge"] = 1
    assert spec.as_dict() != described


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"height": 0}, "at least 1 pixel, got 0x32"),
        ({"intensity": "log"}, r"intensity must be steps joined by '\+' out of native, minmax.*got 'log'"),
        ({"geometry": "hf"}, "geometry hf needs the checkpoint's preprocessor_config.json"),
        ({"processor": DINOV2}, "no other geometry takes one"),
        ({"mean": ()}, "mean and std must be three finite numbers each, std above 0"),
        ({"std": (1.0, 1.0)}, "mean and std must be three finite numbers"),
        ({"std": (1.0, 1.0, 0.0)}, "std above 0"),
        ({"mean": (0.0, 0.0, float("nan"))}, "mean and std must be three finite numbers"),
    ],
)
def test_specifications_that_cannot_be(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        make_spec(**changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"geometry": "stretch"}, "geometry must be one of squash, letterbox, dino, short, spline, hf, got 'stretch'"),
        ({"quantise": "int4"}, "quantise must be one of auto, uint8, none, got 'int4'"),
    ],
)
def test_names_that_the_types_rule_out(changes: dict[str, Any], reason: str) -> None:
    """The tests' type checks would stop such values at the constructor; users run without those."""
    fields = dataclasses.asdict(make_spec()) | changes
    spec = object.__new__(PreprocessSpec)
    for name, value in fields.items():
        object.__setattr__(spec, name, value)
    with pytest.raises(ConfigError, match=reason):
        spec.__post_init__()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"height": 512, "width": 512},
            "the checkpoint's processor makes 224x224 images, asked are 512x512; leave the resolution out",
        ),
        ({"mean": (0.5, 0.5, 0.5)}, r"the processor has mean \(0.485, .*, asked is \(0.5, 0.5, 0.5\); leave it out"),
        ({"std": (0.5, 0.5, 0.5)}, "the processor has std"),
        ({"quantise": "none"}, "the processor has quantise uint8, asked is none"),
    ],
)
def test_specifications_that_contradict_the_processor(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        hf_spec(DINOV2, **changes)


# Batches and pixels


def test_stack_takes_the_most_channels() -> None:
    spec = make_spec(height=4, width=5)
    gray, colour = noise(1, 4, 5), noise(3, 4, 5)
    assert stack([gray, None], spec).shape == (2, 1, 4, 5)
    batch = stack([gray, None, colour], spec)
    assert batch.dtype == np.uint8
    np.testing.assert_array_equal(batch[0], np.repeat(gray, 3, axis=0))
    assert not batch[1].any()
    np.testing.assert_array_equal(batch[2], colour)


def test_stack_of_nothing() -> None:
    floats = make_spec(height=4, width=5, quantise="none")
    assert stack([], floats).shape == (0, 1, 4, 5)
    assert stack([None, None], floats).dtype == np.float32
    assert to_pixels(torch.from_numpy(stack([], floats)), floats, device="cpu", dtype=torch.float32).shape == (
        0,
        3,
        4,
        5,
    )


@pytest.mark.parametrize("quantise", ["uint8", "none"])
def test_pixels_by_the_formula(quantise: str) -> None:
    spec = make_spec(height=16, width=16, quantise=quantise)
    levels = np.arange(256, dtype=np.uint8 if quantise == "uint8" else np.float32).reshape(1, 1, 16, 16)
    pixels = to_pixels(torch.from_numpy(levels), spec, device="cpu", dtype=torch.float32).numpy()
    for channel in range(3):
        exact = (np.arange(256) / 255 - MEAN[channel]) / STD[channel]
        np.testing.assert_allclose(pixels[0, channel].ravel(), exact, atol=1e-6)


@pytest.mark.parametrize("spec", [make_spec(height=8, width=9), make_spec(height=8, width=9, quantise="none")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_grey_and_its_copy_give_the_same_bits(spec: PreprocessSpec, dtype: torch.dtype) -> None:
    image = noise(50, 40)
    ones, threes = stack([preprocess(image, spec)], spec), stack([preprocess(np.dstack([image] * 3), spec)], spec)
    assert (ones.shape[1], threes.shape[1]) == (1, 3)
    pixels = [to_pixels(torch.from_numpy(batch), spec, device="cpu", dtype=dtype) for batch in (ones, threes)]
    assert pixels[0].dtype == dtype
    assert pixels[0].shape == (1, 3, 8, 9)
    assert torch.equal(*pixels)


def test_normalisation_is_in_float32_whatever_the_default_dtype() -> None:
    spec = make_spec(height=8, width=8)
    batch = torch.from_numpy(noise(2, 1, 8, 8))
    expected = to_pixels(batch, spec, device="cpu", dtype=torch.float32)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(to_pixels(batch, spec, device="cpu", dtype=torch.float32), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_pixels_on_a_gpu_are_those_of_the_cpu() -> None:
    for spec in (make_spec(height=16, width=16), hf_spec(DINOV2), hf_spec(DINOV3)):
        batch = torch.from_numpy(stack([preprocess(noise(300, 200, 3), spec)], spec))
        host, device = (to_pixels(batch, spec, device=device, dtype=torch.float32).cpu() for device in ("cpu", "cuda"))
        assert torch.equal(host, device)


# Threads and files


def test_threads_give_what_a_loop_gives() -> None:
    specs = [make_spec(g, 56, 42, quantise=q) for g in ("squash", "letterbox", "dino") for q in ("uint8", "none")]
    specs += [hf_spec(DINOV2), hf_spec(DINOV3)]
    files = []
    for seed, kind in enumerate(["PNG", "JPEG", "TIFF", "WEBP", "BMP"]):
        file = io.BytesIO()
        Image.fromarray(noise(120 + seed, 90, *([3] if seed % 2 else []), seed=seed)).save(file, kind)
        files.append(file.getvalue())
    jobs = [(data, spec) for spec in specs for data in files] * 2

    def work(job: tuple[bytes, PreprocessSpec]) -> bytes:
        return preprocess(decode(job[0]), job[1]).tobytes()

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(work, jobs))
    assert together == [work(job) for job in jobs]


@pytest.mark.realdata
def test_the_known_input_of_the_tiny_checkpoint(shared_data: Path) -> None:
    """Its `input_98` was made with Pillow: grey, bicubic to 98 x 98, ImageNet's mean and std."""
    folder = shared_data / "weights" / "dinov2-tiny-distilled"
    known = np.load(folder / "expected.npz")
    spec = make_spec("squash", 98, 98)
    for path, expected in zip(known["paths"], known["input_98"], strict=True):
        image = decode((shared_data / str(path)).read_bytes())
        gray = image if image.ndim == 2 else np.asarray(Image.fromarray(image).convert("L"))
        # One grey level is 1 / 255 / 0.224 after normalisation.
        np.testing.assert_allclose(our_pixels(gray, spec), expected, atol=1.05 / 255 / 0.224)


@pytest.mark.realdata
def test_real_radiographs_stay_within_one_level_of_pillow(shared_data: Path) -> None:
    paths = sorted((shared_data / "cxr" / "images").rglob("*.*"))[::40]
    assert len(paths) > 20
    for path in paths:
        image = decode(path.read_bytes())
        squashed = preprocess(image, make_spec("squash", 224, 224)).astype(int)
        assert np.abs(squashed - pillow_resize(image, 224, 224)).max() <= 1
