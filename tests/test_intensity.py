"""The intensity grammar and what its steps make of values: against closed forms and numpy."""

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import example as with_example
from hypothesis import strategies as st
from image_files import smooth
from PIL import Image

from featstore.errors import ConfigError, DecodeError
from featstore.images import PreprocessSpec, decode, preprocess
from featstore.images.decoded import Decoded
from featstore.images.equalise import clahe, equalise
from featstore.images.intensity import (
    GRAMMAR,
    WINDOWS,
    canonical_intensity,
    parse_intensity,
    percentiles,
    rounded_minmax,
    to_byte_range,
)

DEEP = [np.uint16, np.int16, np.int32, np.float32, np.float64]


def mapped(pixels: np.ndarray, intensity: str, **facts: Any) -> np.ndarray:
    return to_byte_range(Decoded(pixels, **facts), intensity)


# Grammar


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("native", "native"),
        ("minmax", "minmax"),
        ("minmax-channels", "minmax-channels"),
        ("brain-c", "brain-c"),
        ("percentile:1-99", "percentile:1-99"),
        ("percentile:01.0-99.50", "percentile:1-99.5"),
        ("percentile:5-95:volume", "percentile:5-95:volume"),
        ("window:40/400", "window:-160..240"),
        ("window:-160..240", "window:-160..240"),
        ("window:mediastinum", "window:-160..240"),
        ("window:-600/1500", "window:-1350..150"),
        ("window:0.25/0.5", "window:0..0.5"),
        ("window:-1.5..-0.50", "window:-1.5..-0.5"),
        ("window:amos", "window:-1024..600"),
        ("windows:lung,mediastinum,bone", "windows:-1350..150,-160..240,-500..1300"),
        ("windows: 40/80, amos ,0..1", "windows:0..80,-1024..600,0..1"),
        ("bits:16", "bits:16"),
        ("bits:08", "bits:8"),
        ("bits:stored", "bits:stored"),
        ("equalise", "native+equalise"),
        ("clahe", "native+clahe:2/8"),
        ("clahe:2.0/8", "native+clahe:2/8"),
        ("minmax + clahe:0/16", "minmax+clahe:0/16"),
        ("window:lung+minmax+equalise", "window:-1350..150+minmax+equalise"),
        ("windows:lung,bone,brain+percentile:1-99", "windows:-1350..150,-500..1300,0..80+percentile:1-99"),
    ],
)
def test_one_spelling_of_every_intensity(text: str, canonical: str) -> None:
    assert canonical_intensity(text) == canonical
    assert parse_intensity(canonical) == parse_intensity(text)


@given(st.decimals(-5000, 5000, places=4), st.decimals("0.0001", 5000, places=4))
def test_windows_keep_their_numbers(centre: Any, width: Any) -> None:
    once = canonical_intensity(f"window:{centre}/{width}")
    numbers = parse_intensity(f"window:{centre}/{width}")[0].numbers
    assert numbers == pytest.approx((float(centre - width / 2), float(centre + width / 2)), abs=1e-6)
    low, high = once.removeprefix("window:").split("..")
    assert (float(low), float(high)) == numbers


NUMBERS = st.decimals(-(10**9) + 1, 10**9 - 1, places=6).map(lambda number: f"{number:f}") | st.sampled_from(
    ["0.0125", "0.5", "-0", "+1.50", "007", "999999999", "0.000001"]
)
STEPS = st.one_of(
    st.builds("window:{}/{}".format, NUMBERS, NUMBERS),
    st.builds("window:{}..{}".format, NUMBERS, NUMBERS),
    st.builds("windows:{}/{},lung,{}..{}".format, NUMBERS, NUMBERS, NUMBERS, NUMBERS),
    st.builds("percentile:{:f}-{:f}{}".format, *[st.decimals(0, 100, places=6)] * 2, st.sampled_from(["", ":volume"])),
    st.builds("clahe:{}/{}".format, NUMBERS, st.integers(0, 99)),
    st.builds("bits:{}".format, st.integers(0, 40)),
)


@settings(deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(st.lists(STEPS | st.sampled_from(["minmax", "equalise", "clahe"]), min_size=1, max_size=3).map("+".join))
@with_example("window:0.5/0.0125")
@with_example("window:999999999/999999999")
@with_example("window:0.000001/0.000001")
def test_the_canonical_text_is_in_the_grammar_and_canonical(text: str) -> None:
    try:
        once = canonical_intensity(text)
    except ConfigError:
        assume(False)
    assert canonical_intensity(once) == once
    assert parse_intensity(once) == parse_intensity(text)


def test_a_window_of_four_decimals_has_a_text_of_six() -> None:
    assert canonical_intensity("window:0.5/0.0125") == "window:0.49375..0.50625"
    assert canonical_intensity("window:0.49375..0.50625") == "window:0.49375..0.50625"


def test_ends_of_a_window_that_cannot_be_written_are_refused() -> None:
    with pytest.raises(ConfigError, match="the ends of a window lie within 999999999 of 0; got '999999999/999999999'"):
        parse_intensity("window:999999999/999999999")


@pytest.mark.parametrize(
    "text",
    [
        "", "log", "window:\u0664\u0660/400", "bits:\u0668", "clahe:2/\u0668", "window:0.1234567/1",
        "native+", "+native", "Native", "percentile", "percentile:99-1", "percentile:5-5",
        "percentile:0-101", "percentile:1-99:slice", "percentile:-1-99", "window", "window:", "window:liver",
        "window:40", "windows:lung,bone", "windows:lung", "window:lung,bone,brain", "bits", "bits:0", "bits:33",
        "bits:x", "clahe:", "clahe:2", "clahe:2/0", "clahe:-1/8", "clahe:nan/8", "equalise:2", "window:inf/4",
        "window:1e3/4", "percentile:nan-99",
    ],
)  # fmt: skip
def test_texts_outside_the_grammar_are_refused_with_the_grammar(text: str) -> None:
    with pytest.raises(
        ConfigError, match=r"intensity must be steps joined by '\+' out of native, minmax, .*window:NAME"
    ):
        parse_intensity(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("window:40/0", "a window needs a width above 0, its low end below its high one; got '40/0'"),
        ("window:5..5", "a window needs a width above 0"),
        ("windows:lung,5..4,bone", "a window needs a width above 0"),
        ("native+native", "native can only come first; after the first step come minmax, minmax-channels, percentile"),
        ("minmax+window:lung", r"window:-1350\.\.150 can only come first"),
        ("minmax+percentile:1-99:volume", "percentile:1-99:volume can only come first"),
        ("minmax+brain-c", "brain-c can only come first"),
        ("windows:lung,bone,brain+equalise", "equalise and clahe need grey, three windows make colour; use one window"),
        ("windows:lung,bone,brain+minmax+clahe", "three windows make colour"),
    ],
)
def test_intensities_that_make_no_sense(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        parse_intensity(text)


def test_every_line_of_the_grammar_parses() -> None:
    examples = {
        "LOW-HIGH": "1-99",
        "CENTRE/WIDTH": "40/400",
        "LOW..HIGH": "-160..240",
        "NAME": "lung",
        "A,B,C": "lung,bone,brain",
    }
    for text in GRAMMAR:
        line = text.replace("[:CLIP/TILES]", "").replace("bits:N", "bits:12")
        for name, example in examples.items():
            line = line.replace(name, example)
        assert str(parse_intensity(line)[-1]).split(":")[0] == line.split(":")[0]
    for name, ends in WINDOWS.items():
        assert parse_intensity(f"window:{name}")[0].numbers == ends


# Mapping


def test_native_leaves_8_bits_alone() -> None:
    image = smooth()
    assert mapped(image, "native") is image


@pytest.mark.parametrize("rule", ["native", "minmax", "minmax-channels"])
@pytest.mark.parametrize("dtype", DEEP)
def test_deep_images_span_0_to_255(rule: str, dtype: type) -> None:
    scaled = mapped(np.array([[7, 107], [57, 207]], dtype), rule)
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(scaled, [[0, 127.5], [63.75, 255]], rtol=1e-6)


def test_native_follows_the_range_that_a_file_shows() -> None:
    image = np.array([[0, 100, 250, 300]], np.int32)
    np.testing.assert_allclose(mapped(image, "native", display=(50.0, 250.0)), [[0, 63.75, 255, 255]], rtol=1e-6)
    np.testing.assert_allclose(mapped(image, "minmax", display=(50.0, 250.0)), [[0, 85, 212.5, 255]], rtol=1e-6)


def test_minmax_also_spreads_8_bits_over_all_channels_together() -> None:
    image = np.array([[[10, 20, 30]], [[60, 20, 10]]], np.uint8)
    np.testing.assert_allclose(mapped(image, "minmax"), (image.astype(float) - 10) * 5.1, rtol=1e-6)


def test_minmax_channels_spreads_each_channel() -> None:
    image = np.array([[[10, 20, 7]], [[60, 40, 7]], [[35, 35, 7]]], np.uint8)
    expected = np.array([[0, 0, 0], [255, 255, 0], [127.5, 191.25, 0]])
    np.testing.assert_allclose(mapped(image, "minmax-channels")[:, 0], expected)
    grey = smooth()
    np.testing.assert_array_equal(mapped(grey, "minmax-channels"), mapped(grey, "minmax"))


@pytest.mark.parametrize(
    "rule", ["native", "minmax", "minmax-channels", "percentile:1-99", "brain-c", "minmax+equalise"]
)
@pytest.mark.parametrize("dtype", DEEP)
def test_constant_images_become_black(rule: str, dtype: type) -> None:
    np.testing.assert_array_equal(mapped(np.full((3, 4), 77, dtype), rule), np.zeros((3, 4)))


@pytest.mark.parametrize(
    "image",
    [
        np.array([[-(2**31), 2**31 - 1, 0]], np.int32),
        np.array([[-3e38, 3e38, 0]], np.float32),
        np.array([[0, 65535, 1]], np.uint16),
        np.array([[0, 21, 1]], np.uint16),  # 21 * (255 / 21) is 255.00002 in float32
        np.array([[2**30, 2**30 + 3, 2**30 + 1]], np.int32),
        np.array([[0, 1e-45, 0]], np.float32),
    ],
)
def test_extreme_ranges_stay_in_range(image: np.ndarray) -> None:
    low, high = np.longdouble(image.min()), np.longdouble(image.max())
    exact = (image.astype(np.longdouble) - low) / (high - low) * 255
    for rule in ("native", "percentile:0-100"):
        scaled = mapped(image, rule)
        assert (scaled.min(), scaled.max()) == (0, 255)
        np.testing.assert_allclose(scaled, exact.astype(float), rtol=1e-6, atol=1e-6)


@settings(deadline=None)
@given(st.integers(0, 49), st.integers(51, 100), st.integers(0, 99), st.sampled_from([np.uint8, *DEEP]))
def test_percentiles_by_numpy(low: int, high: int, seed: int, dtype: type) -> None:
    image: np.ndarray = np.random.default_rng(seed).permutation(120)[:63].reshape(9, 7).astype(dtype)
    ends = np.percentile(image.astype(np.float64), (low, high))
    expected = (image.astype(float).clip(*ends) - ends[0]) / (ends[1] - ends[0]) * 255
    np.testing.assert_allclose(mapped(image, f"percentile:{low}-{high}"), expected, rtol=1e-5, atol=1e-4)


@settings(deadline=None)
@given(
    st.floats(0, 100), st.floats(0, 100), st.integers(1, 40), st.sampled_from([np.uint8, np.uint16, np.int16, np.int32])
)
def test_counted_percentiles_are_numpys(low: float, high: float, size: int, dtype: type) -> None:
    ends = np.iinfo(dtype)
    image: np.ndarray = np.random.default_rng(size).integers(ends.min, ends.max, size, endpoint=True).astype(dtype)
    np.testing.assert_allclose(
        percentiles(image, low, high), np.percentile(image.astype(float), (low, high)), atol=1e-6
    )


def test_percentiles_counted_piece_by_piece_are_numpys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featstore.images.intensity._COUNTED", 7)
    image = np.random.default_rng(3).integers(-900, 900, (5, 4, 3)).astype(np.int16)
    assert percentiles(image, 3.0, 98.0) == pytest.approx(tuple(np.percentile(image.astype(float), (3, 98))))


def test_percentiles_of_a_volume_are_those_that_the_decoder_gives() -> None:
    asked = []

    def percentiles(low: float, high: float) -> tuple[float, float]:
        asked.append((low, high))
        return 100.0, 300.0

    image = np.array([[0, 100, 200, 400]], np.int16)
    np.testing.assert_allclose(mapped(image, "percentile:5-95:volume", percentiles=percentiles), [[0, 0, 127.5, 255]])
    assert asked == [(5.0, 95.0)]
    assert mapped(image, "percentile:0-100", percentiles=percentiles)[0, 1] == 63.75


def test_percentiles_of_a_volume_fail_where_there_is_none() -> None:
    with pytest.raises(
        DecodeError,
        match="percentile:5-95:volume needs a slice of a volume, and this image stands alone; percentile:5-95 takes",
    ):
        mapped(np.zeros((2, 2), np.int16), "percentile:5-95:volume")


@pytest.mark.parametrize("name", sorted(WINDOWS))
@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32, np.float64])
def test_a_window_in_hounsfield_units(name: str, dtype: type) -> None:
    low, high = WINDOWS[name]
    image: np.ndarray = np.array([[low - 1, low, (low + high) / 2, high, high + 1]], dtype)
    np.testing.assert_allclose(mapped(image, f"window:{name}"), [[0, 0, 127.5, 255, 255]], rtol=1e-6)


def test_the_named_windows_have_the_usual_numbers() -> None:
    usual = {
        "lung": (-600, 1500),
        "mediastinum": (40, 400),
        "bone": (400, 1800),
        "brain": (40, 80),
        "abdomen": (60, 400),
    }
    for name, (centre, width) in usual.items():
        assert WINDOWS[name] == (centre - width / 2, centre + width / 2)


def test_amos_window_is_minus_1024_to_600() -> None:
    assert WINDOWS["amos"] == (-1024, 600)


def test_ct_clip_window_is_minus_1000_to_1000() -> None:
    assert WINDOWS["ct-clip"] == (-1000, 1000)


def test_three_windows_are_red_green_and_blue() -> None:
    image = np.random.default_rng(0).integers(-1024, 3000, (5, 6)).astype(np.int16)
    found = mapped(image, "windows:lung,mediastinum,bone")
    assert found.shape == (5, 6, 3)
    assert found.dtype == np.float32
    for channel, name in enumerate(("lung", "mediastinum", "bone")):
        np.testing.assert_array_equal(found[..., channel], mapped(image, f"window:{name}"))
    spec = PreprocessSpec(
        geometry="squash", height=4, width=4, intensity="windows:lung,bone,brain", mean=(0.0,) * 3, std=(1.0,) * 3
    )
    assert preprocess(image, spec).shape == (3, 4, 4)


@pytest.mark.parametrize("rule", ["windows:lung,mediastinum,bone", "equalise", "clahe", "minmax+equalise"])
def test_colour_is_refused_where_grey_is_needed(rule: str) -> None:
    colour = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    name = rule.split(":")[0].split("+")[-1]
    with pytest.raises(DecodeError, match=f"intensity {name} works on grey images, and this one has colour"):
        mapped(colour, rule)
    grey = colour[..., 0]
    np.testing.assert_array_equal(mapped(np.stack([grey] * 3, axis=-1), rule), mapped(grey, rule))


def test_bits_16_is_dark_where_12_bits_are_used() -> None:
    """As torchxrayvision reads PadChest: 65535 is white, whatever the image holds."""
    image = np.array([[0, 4095, 65535]], np.uint16)
    np.testing.assert_allclose(mapped(image, "bits:16"), image / 65535 * 255, rtol=1e-6)
    np.testing.assert_allclose(mapped(image, "bits:12"), [[0, 255, 255]])
    np.testing.assert_allclose(mapped(image, "bits:stored"), image / 65535 * 255, rtol=1e-6)
    np.testing.assert_allclose(mapped(image, "bits:stored", display=(0.0, 4095.0)), [[0, 255, 255]])
    small = smooth()
    assert mapped(small, "bits:8") is small
    assert mapped(small, "bits:stored") is small


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32])
def test_bits_of_a_type_that_states_none(dtype: type) -> None:
    with pytest.raises(DecodeError, match=f"bits:stored needs .*, got {np.dtype(dtype)}; name the depth"):
        mapped(np.zeros((2, 2), dtype), "bits:stored")


@pytest.mark.parametrize("dtype", [np.uint8, *DEEP])
def test_brain_c_cuts_above_the_95th_and_blackens_up_to_the_5th(dtype: type) -> None:
    image: np.ndarray = np.random.default_rng(2).integers(20, 120, (20, 20)).astype(dtype)
    low, high = np.percentile(image.astype(np.float64), (5, 95))
    cut = np.where(image <= high, image, high)
    cut = np.where(cut <= low, 0.0, cut)
    np.testing.assert_allclose(mapped(image, "brain-c"), (cut - cut.min()) / (cut.max() - cut.min()) * 255, rtol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers_are_refused(value: float) -> None:
    with pytest.raises(DecodeError, match="the image has NaN or infinite values"):
        mapped(np.array([[0, value]], np.float32), "percentile:1-99")


# 16 bits


@pytest.mark.parametrize("rule", ["native", "minmax", "bits:16", "window:2048..4095", "percentile:0-100"])
def test_16_bit_values_above_2048_stay_distinct(rule: str) -> None:
    """float16 holds no odd number above 2048."""
    image = np.arange(2048, 4096, dtype=np.uint16).reshape(32, 64)
    assert len(np.unique(image.astype(np.float16))) < 2048
    assert len(np.unique(mapped(image, rule))) == 2048


def test_16_bit_png_is_not_clipped_as_pillow_converts_to_l() -> None:
    """Pillow's convert("L") makes 255 of everything above 255."""
    image = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    file.seek(0)
    assert (np.asarray(Image.open(file).convert("L")) == 255).mean() > 0.99
    scaled = mapped(decode(file.getvalue()), "native")
    np.testing.assert_allclose(scaled, image / (65536 - 16) * 255, rtol=1e-5)


# Later steps and low-is-white


def test_low_is_white_is_turned_after_the_mapping_and_before_equalisation() -> None:
    image = np.random.default_rng(4).integers(0, 4096, (16, 16)).astype(np.uint16)
    low, high = int(image.min()), int(image.max())
    levels = np.rint((image.astype(np.float64) - low) / (high - low) * 255).astype(np.uint8)
    np.testing.assert_array_equal(mapped(image, "minmax+equalise", invert=True), equalise(255 - levels))
    turned_last = 255 - equalise(levels)
    assert not np.array_equal(mapped(image, "minmax+equalise", invert=True), turned_last)
    np.testing.assert_allclose(mapped(image, "minmax", invert=True), 255 - mapped(image, "minmax"))
    np.testing.assert_array_equal(mapped(levels, "native", invert=True), 255 - levels)


def test_a_range_is_taken_before_low_is_white_is_turned() -> None:
    image = np.array([[0, 100, 200]], np.int16)
    np.testing.assert_allclose(mapped(image, "window:0..100", invert=True), [[255, 0, 0]])


def test_equalisation_rounds_to_whole_levels_first() -> None:
    image = np.random.default_rng(6).integers(-1000, 2000, (24, 20)).astype(np.int16)
    levels = np.rint(mapped(image, "window:lung")).astype(np.uint8)
    np.testing.assert_array_equal(mapped(image, "window:lung+equalise"), equalise(levels))
    np.testing.assert_array_equal(mapped(image, "window:lung+clahe:3/4"), clahe(levels, clip=3.0, tiles=4))
    np.testing.assert_array_equal(
        mapped(image, "window:lung+equalise+clahe"), clahe(equalise(levels), clip=2.0, tiles=8)
    )


def test_halves_round_as_img_as_ubyte_rounds_them() -> None:
    """170 levels: every odd one falls on a half; skimage divides first and multiplies by 255 then."""
    image = np.arange(171, dtype=np.uint8).reshape(9, 19)
    levels = np.rint(image / 170 * 255).astype(np.uint8)
    np.testing.assert_array_equal(mapped(image, "minmax+equalise"), equalise(levels))


@pytest.mark.parametrize("dtype", [np.uint8, *DEEP])
def test_levels_by_table_are_those_by_division(dtype: type) -> None:
    image: np.ndarray = np.random.default_rng(9).integers(0, 171, (30, 30)).astype(dtype)
    values = image.astype(np.float64) - float(image.min())
    np.testing.assert_array_equal(rounded_minmax(image), np.rint(values / values.max() * 255))
    ends = np.array([[-32768, 32767, 0]], np.int16)
    np.testing.assert_array_equal(rounded_minmax(ends), [[0, 255, 128]])


def test_a_window_may_be_spread_again() -> None:
    image = np.array([[-2000, 0, 200]], np.int16)
    np.testing.assert_allclose(mapped(image, "window:amos+minmax"), (image.clip(-1024) + 1024) / 1224 * 255, rtol=1e-5)
