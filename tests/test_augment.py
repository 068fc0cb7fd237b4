"""Augmented copies: drawn from ids alone, as the published transforms do it, against Pillow and simulation."""

import hashlib
import math
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image, ImageOps
from pixel_specs import DINOV2, hf_spec, make_spec, photo, pillow_resize, planes

from featstore import files
from featstore.configs import Augmentation
from featstore.errors import ConfigError
from featstore.images import preprocess
from featstore.images.augment import RATIOS, RECIPES, Augment, draw, turn
from featstore.images.decoded import Decoded
from featstore.images.masks import fit_mask
from featstore.images.preprocess import preprocess_each

IDS = [f"patient{number:05d}/study1/view1_frontal.jpg" for number in range(4000)]
# Digests of specifications as they were before there were augmented copies.
GOLDEN = {
    "squash": "f8fc9bb7df3cfd33a72d8412fbc4911b5071921aff3aafe88e146295542fabe2",
    "dino": "4d611e37dd08fd66362cff9e35ee837ad9abba0254cfbef4161f4b7fe20cd9ec",
    "spline": "87e2c7d244bab0db5dae663ed9101f5dab97f204e1c4a92be7c261340662192b",
}


def augment(recipe: Augmentation, view: int = 1, seed: int = 0) -> Augment:
    return Augment(recipe=recipe, view=view, seed=seed)


def numbers_of(recipe: str, seed: int, view: int, sample: str, count: int) -> list[float]:
    """The stream as its description has it, written down once more."""
    found: list[float] = []
    for block in range(count):
        text = f"featstore augment 1\0{recipe}\0{seed}\0{view}\0{sample}\0{block}"
        words = np.frombuffer(hashlib.sha256(text.encode()).digest(), ">u8")
        found += [int(word) / 2**64 for word in words]
    return found


@pytest.mark.parametrize(("recipe", "low"), [("dino", 0.08), ("radiology", 0.75)])
def test_a_crop_follows_from_recipe_seed_view_and_id(recipe: Augmentation, low: float) -> None:
    tried = 0
    for sample in IDS[:200]:
        stream = iter(numbers_of(recipe, 3, 2, sample, 12))
        box = (0, 0, 300, 400)  # which a ratio of 4/3 allows as it is
        for _ in range(10):
            area = 300 * 400 * (low + (1 - low) * next(stream))
            ratio = (3 / 4) ** (1 - 2 * next(stream))
            width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            tried += 1
            if width <= 400 and height <= 300:
                top, left = math.floor(next(stream) * (301 - height)), math.floor(next(stream) * (401 - width))
                box = top, left, height, width
                break
        found = draw(augment(recipe, 2, 3), sample, 300, 400)
        assert (found.box, found.is_mirrored, found.degrees) == (box, next(stream) < 0.5, 0.0)
    assert tried > 200


def test_a_turn_follows_from_recipe_seed_view_and_id() -> None:
    for sample in IDS[:50]:
        mirror, angle, *_ = numbers_of("chest", 0, 1, sample, 1)
        found = draw(augment("chest"), sample, 300, 400)
        assert (found.box, found.is_mirrored) == (None, mirror < 0.5)
        assert found.degrees == pytest.approx(14 * angle - 7, abs=1e-12)


def simulated(rng: np.random.Generator, low: float, height: int, width: int, count: int) -> np.ndarray:
    """(area share, log ratio, top share, left share) of crops drawn as RandomResizedCrop's description has it."""
    found = []
    while len(found) < count:
        area, ratio = height * width * rng.uniform(low, 1), math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if wide <= width and high <= height:
            top, left = rng.integers(0, height - high + 1), rng.integers(0, width - wide + 1)
            found.append((high * wide / (height * width), math.log(wide / high), top, left))
    return np.array(found)


@pytest.mark.parametrize(("recipe", "low"), [("dino", 0.08), ("radiology", 0.75)])
def test_crops_are_spread_as_published(recipe: Augmentation, low: float) -> None:
    from scipy.stats import ks_2samp

    drawn = [draw(augment(recipe, 4), sample, 512, 480) for sample in IDS]
    boxes = [each.box for each in drawn if each.box is not None]
    assert len(boxes) == len(IDS)
    ours = np.array([(h * w / (512 * 480), math.log(w / h), top, left) for top, left, h, w in boxes])
    theirs = simulated(np.random.default_rng(0), low, 512, 480, 20_000)
    for mine, other in zip(ours.T, theirs.T):
        assert ks_2samp(mine, other).pvalue > 1e-3
    assert ours[:, 0].min() >= low - 0.01
    assert abs(ours[:, 1]).max() <= math.log(4 / 3) + 0.02
    assert abs(np.mean([each.is_mirrored for each in drawn]) - 0.5) < 3 * 0.5 / math.sqrt(len(IDS))


def test_turns_are_uniform_and_views_and_seeds_are_independent() -> None:
    from scipy.stats import kstest

    kinds = [augment("chest"), augment("chest", 2), augment("chest", 1, 1)]
    drawn = [[draw(kind, sample, 9, 9) for sample in IDS] for kind in kinds]
    angles = np.array([[each.degrees for each in one] for one in drawn])
    for one in angles:
        assert kstest(one, "uniform", args=(-7, 14)).pvalue > 1e-3
    flips = np.array([[each.is_mirrored for each in one] for one in drawn], float)
    limit = 3.5 / math.sqrt(len(IDS))
    for both in (np.corrcoef(angles), np.corrcoef(flips), np.corrcoef(np.r_[flips, angles])):
        assert abs(both - np.eye(len(both))).max() < limit


@pytest.mark.parametrize(("height", "width", "box"), [(4, 4000, (0, 1997, 4, 5)), (4000, 3, (1998, 0, 4, 3))])
def test_shapes_that_no_crop_fits_give_their_middle(height: int, width: int, box: tuple[int, ...]) -> None:
    assert {draw(augment("radiology"), sample, height, width).box for sample in IDS[:20]} == {box}


def test_the_smallest_image_is_its_own_crop() -> None:
    for sample in IDS[:20]:
        assert draw(augment("dino"), sample, 1, 1).box == (0, 0, 1, 1)


@pytest.mark.parametrize("recipe", ["dino", "radiology"])
def test_crops_are_cut_from_the_source_and_resized_as_pillow_does(recipe: Augmentation) -> None:
    """A ramp tells where each pixel comes from: red counts columns of the source, green its rows."""
    rows, columns = 240, 250
    image = np.zeros((rows, columns, 3), np.uint8)
    image[..., 0], image[..., 1] = np.arange(columns)[None], np.arange(rows)[:, None]
    spec = make_spec(height=40, width=56, augment=augment(recipe))
    mirrored = 0
    for sample in IDS[:20]:
        drawn = draw(augment(recipe), sample, rows, columns)
        assert drawn.box is not None
        top, left, height, width = drawn.box
        found = preprocess(image, spec, sample)
        across = left + (np.arange(56) + 0.5) * width / 56 - 0.5
        down = top + (np.arange(40) + 0.5) * height / 40 - 0.5
        across = across[::-1] if drawn.is_mirrored else across
        inner = slice(4, -4)  # at its edges the filter is another
        assert abs(found[0, :, inner] - across[inner]).max() <= 1
        assert abs(found[1, inner] - down[inner, None]).max() <= 1
        cut = Image.fromarray(photo(rows, columns, 3)).crop((left, top, left + width, top + height))
        cut = ImageOps.mirror(cut) if drawn.is_mirrored else cut
        difference = np.abs(
            preprocess(photo(rows, columns, 3), spec, sample).astype(int) - pillow_resize(np.asarray(cut), 40, 56)
        )
        assert difference.max() <= 2
        mirrored += drawn.is_mirrored
    assert 0 < mirrored < 20


@pytest.mark.parametrize("shape", [(56, 56), (56, 57), (31, 70)])
def test_turns_are_those_of_pillow(shape: tuple[int, int]) -> None:
    image = photo(*shape, 3)
    for degrees in (-7.0, -3.3, 0.4, 6.9, *([90.0] if shape[0] == shape[1] else [])):
        theirs = planes(
            np.asarray(Image.fromarray(image).rotate(degrees, Image.Resampling.NEAREST, fillcolor=(0,) * 3))
        )
        differs = (turn(planes(image), degrees) != theirs).any(axis=0)
        assert differs.mean() < 0.002  # where a centre falls between two pixels, rounding decides


@pytest.mark.parametrize("geometry", ["squash", "letterbox", "dino", "short", "spline"])
def test_chest_mirrors_and_turns_what_the_geometry_gives(geometry: str) -> None:
    image = photo(90, 120)
    spec = make_spec(geometry, height=56, width=56, augment=augment("chest"))
    plain = preprocess(image, make_spec(geometry, height=56, width=56))[0]
    for sample in IDS[:6]:
        drawn = draw(augment("chest"), sample, 90, 120)
        picture = Image.fromarray(plain)
        picture = ImageOps.mirror(picture) if drawn.is_mirrored else picture
        theirs = np.asarray(picture.rotate(drawn.degrees, Image.Resampling.NEAREST, fillcolor=0))
        assert (preprocess(image, spec, sample)[0] != theirs).mean() < 0.002


def test_chest_of_a_checkpoint_s_own_processor_and_floats() -> None:
    spec = hf_spec(DINOV2, augment=augment("chest"))
    found = preprocess(photo(300, 260, 3), spec, "a")
    assert found.shape == (3, 224, 224)
    floats = preprocess(photo(90, 90), make_spec(quantise="none", augment=augment("dino")), "a")
    assert floats.dtype == np.float32
    eight = preprocess(photo(90, 90), make_spec(augment=augment("dino")), "a")
    assert abs(floats - eight).max() <= 1


def test_one_at_a_time_or_all_together_give_equal_pixels() -> None:
    image = Decoded(photo(120, 90).astype(np.uint16) * 13)
    specs = [
        make_spec(intensity="minmax"),
        make_spec(intensity="percentile:5-95"),
        make_spec("spline", intensity="minmax"),
        *(make_spec(intensity="minmax", augment=augment(recipe, 2)) for recipe in get_args(Augmentation)),
        make_spec(intensity="percentile:5-95", augment=augment("dino", 5)),
    ]
    together = preprocess_each(image, specs, "x")
    for spec, found in zip(specs, together, strict=True):
        np.testing.assert_array_equal(found, preprocess(image, spec, "x"))
    assert len({found.tobytes() for found in together}) == len(specs)


def test_intensity_is_done_once_for_all_views(monkeypatch: pytest.MonkeyPatch) -> None:
    from featstore.images import intensity

    module = __import__("featstore.images.preprocess", fromlist=["preprocess"])
    seen: list[str] = []

    def counted(image: Decoded, name: str) -> Any:
        seen.append(name)
        return intensity.to_byte_range(image, name)

    monkeypatch.setattr(module, "to_byte_range", counted)
    views = [make_spec(intensity="minmax", augment=augment("dino", view)) for view in range(1, 5)]
    preprocess_each(Decoded(photo(40, 40)), [make_spec(intensity="minmax"), *views, make_spec()], "x")
    assert len(seen) == 2


def test_identity_states_it_and_nothing_where_there_is_none() -> None:
    for geometry, digest in GOLDEN.items():
        plain = make_spec(geometry, height=42, width=56, intensity="minmax")
        assert files.digest(plain.as_dict()) == digest
    spec = make_spec(height=42, width=56, intensity="minmax", augment=augment("radiology", 3, 7))
    plain = make_spec(height=42, width=56, intensity="minmax")
    held = {"recipe": "radiology", "view": 3, "seed": 7, "implementation": 1}
    assert spec.as_dict() == {**plain.as_dict(), "augment": held}


@pytest.mark.parametrize("recipe", get_args(Augmentation))
def test_recipes_say_what_they_are(recipe: Augmentation) -> None:
    found = RECIPES[recipe]
    assert all((found.title, found.source))
    assert (found.scale is None) != (found.degrees == 0)
    assert RATIOS == (0.75, 4 / 3)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: augment("dino", 0), r"views are numbered from 1 and seeds from 0, got view 0 and seed 0"),
        (lambda: augment("dino", 1, -1), r"got view 1 and seed -1"),
        (
            lambda: make_spec("spline", augment=augment("dino")),
            r"--augment dino cuts its crops from the source at its full size, before any resize: geometry spline",
        ),
        (lambda: hf_spec(DINOV2, augment=augment("radiology")), r"--augment radiology .* geometry hf"),
        (lambda: make_spec(decode="scaled", augment=augment("dino")), r"with decode scaled has none to cut from"),
        (
            lambda: preprocess(photo(9, 9), make_spec(augment=augment("dino"))),
            r"an augmented copy is drawn from the id of a sample, and this image has none",
        ),
        (
            lambda: fit_mask(np.zeros((9, 9), np.int64), make_spec(augment=augment("chest"))),
            r"masks lie on the images themselves, not on augmented copies; use the plain set",
        ),
    ],
)
def test_what_cannot_be(make: Any, error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        make()


def test_recipes_that_the_types_rule_out() -> None:
    """The tests' type checks would stop such a value at the constructor; stores of others hold anything."""
    made = object.__new__(Augment)
    for name, value in {"recipe": "mixup", "view": 1, "seed": 0}.items():
        object.__setattr__(made, name, value)
    with pytest.raises(ConfigError, match=r"augment must be one of dino, radiology, chest, got 'mixup'"):
        made.__post_init__()
