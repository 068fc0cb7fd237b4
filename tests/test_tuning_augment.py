"""Augmentation on the device: pixels of independent implementations; draws follow from seed, epoch and id alone."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import affine_transform

from featstore.errors import ConfigError
from featstore.images.augment import Augment, draw
from featstore.images.augment import turn as turn_view
from probes.tuning_augment import DEVIATION, Augmenter, crop, other_side, settle_flip, turn
from probes.tuning_recipe import AugmentRecipe, Optimisation, TuningRecipe

IDS = [f"sample-{number}" for number in range(40)]


def batch(count: int = 5, channels: int = 1, size: int = 24) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, channels, size, size), dtype=np.uint8)


def test_turns_by_nearest_neighbour_are_those_of_the_views_and_of_pillow() -> None:
    images, degrees = batch(), np.array([-7.0, -1.3, 0.0, 4.4, 6.9])
    found = turn(torch.from_numpy(images).float(), degrees, "nearest").numpy()
    for image, angle, turned in zip(images, degrees, found):
        np.testing.assert_array_equal(turned, turn_view(image, float(angle)))
        pillow = np.asarray(Image.fromarray(image[0]).rotate(float(angle)))
        assert (turned[0] != pillow).mean() < 0.01  # Pillow counts in 16 bits of fraction


def test_bilinear_turns_are_those_of_scipy() -> None:
    images, degrees = batch(channels=3), np.array([-7.0, -1.3, 30.0, 4.4, 90.0])
    found = turn(torch.from_numpy(images).float(), degrees, "bilinear").numpy()
    middle = np.array([11.5, 11.5])
    for image, angle, turned in zip(images, np.radians(degrees), found):
        matrix = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        for plane, other in zip(image.astype(float), turned):
            padded = np.pad(plane, 2)
            expected = affine_transform(padded, matrix, middle + 2 - matrix @ (middle + 2), order=1)[2:-2, 2:-2]
            np.testing.assert_allclose(other, expected, atol=2e-3)


def test_crops_are_those_of_pillow() -> None:
    images = batch(3) // 3 + 80  # between its two passes Pillow cuts off what overshoots 8 bits
    boxes = np.array([[0, 0, 24, 24], [3, 5, 14, 17], [10, 0, 9, 12]])
    found = crop(torch.from_numpy(images).float(), boxes).numpy()
    np.testing.assert_array_equal(found[0], images[0])
    for image, (top, left, high, wide), cropped in zip(images, boxes.tolist(), found):
        part = Image.fromarray(image[0]).crop((left, top, left + wide, top + high))
        np.testing.assert_allclose(cropped[0], np.asarray(part.resize((24, 24), Image.Resampling.BICUBIC)), atol=1.2)


@pytest.mark.parametrize(
    "recipe", [AugmentRecipe(flip="plain", degrees=7.0, crop="0.75-1"), AugmentRecipe(crop="0.08-1")]
)
def test_a_sample_looks_alike_in_any_batch(recipe: AugmentRecipe) -> None:
    augmenter = Augmenter(recipe, ["a"], seed=3)
    images = torch.from_numpy(batch(40, 3))
    whole = augmenter.apply(images, augmenter.draw(IDS, 2, (24, 24)))
    order = np.random.default_rng(1).permutation(40)
    for cut in np.split(order, [1, 9, 30]):
        draws = augmenter.draw([IDS[row] for row in cut], 2, (24, 24))
        assert torch.equal(augmenter.apply(images[torch.from_numpy(cut)], draws), whole[torch.from_numpy(cut)])
    taken = augmenter.draw(IDS, 2, (24, 24)).take(order[:3])
    assert torch.equal(augmenter.apply(images[torch.from_numpy(order[:3])], taken), whole[torch.from_numpy(order[:3])])


def test_draws_are_those_of_the_views_and_change_with_epoch_and_seed() -> None:
    augmenter = Augmenter(AugmentRecipe(flip="plain", degrees=7.0), ["a"], seed=5)
    draws = augmenter.draw(IDS, 3, (24, 24))
    views = [draw(Augment(recipe="chest", view=4, seed=5), sample, 24, 24) for sample in IDS]
    assert draws.mirrored.tolist() == [view.is_mirrored for view in views]
    np.testing.assert_allclose(draws.degrees, [view.degrees for view in views], rtol=1e-12)
    assert 10 < draws.mirrored.sum() < 30
    assert np.abs(draws.degrees).max() <= 7
    for other in (augmenter.draw(IDS, 4, (24, 24)), Augmenter(augmenter.recipe, ["a"], seed=6).draw(IDS, 3, (24, 24))):
        assert (other.degrees != draws.degrees).all()
    half = Augmenter(AugmentRecipe(degrees=3.5), ["a"], seed=5).draw(IDS, 3, (24, 24))
    np.testing.assert_allclose(half.degrees * 2, draws.degrees)
    assert not half.mirrored.any()


def test_nothing_is_done_where_nothing_is_asked() -> None:
    augmenter = Augmenter(AugmentRecipe(), ["a"], seed=0)
    assert not augmenter.changes
    assert augmenter.notes == []
    images = torch.from_numpy(batch())
    assert torch.equal(augmenter.apply(images, augmenter.draw(IDS[:5], 0, (24, 24))), images.float())
    assert Augmenter(AugmentRecipe(crop="0.75-1"), ["a"], 0).notes == [DEVIATION]


@pytest.mark.parametrize(
    ("label", "other"),
    [
        ("effusion_left", "effusion_right"),
        ("pleural_effusion_right", "pleural_effusion_left"),
        ("Left lung", "Right lung"),
        ("LeftEffusion", "RightEffusion"),
        ("EFFUSION-LEFT", "EFFUSION-RIGHT"),
        ("effusion_R", "effusion_L"),
        ("knee lt", "knee rt"),
        ("effusion", None),
        ("L", "R"),
        ("rt_effusion", "lt_effusion"),
        ("R effusion", "L effusion"),
        ("L1 fracture", None),
        ("L 5", None),
        ("RCC", None),
        ("OD", None),
        ("RLL opacity", None),
        ("cleft", None),
        ("upright", None),
        ("vitamin_l_deficit", None),
    ],
)
def test_sides_in_names(label: str, other: str | None) -> None:
    assert other_side(label) == other
    if other is not None:
        assert other_side(other) == label


def test_mirroring_follows_the_labels() -> None:
    paired = ["effusion_left", "healthy", "effusion_right"]
    assert settle_flip("auto", ["a", "b"])[0] == "plain"
    assert settle_flip("auto", paired)[0] == "mapped"
    assert settle_flip("auto", ["effusion_left", "healthy"])[0] == "off"
    for pair in (["L", "R"], ["OD", "OS"], ["LCC", "RCC"], ["LLL opacity", "RLL opacity"], ["a l b", "a r b"]):
        assert settle_flip("auto", [*pair, "c"]) == ("mapped", pytest.approx([1, 0, 2]))
    assert settle_flip("auto", ["RCC", "L1", "LVH"])[0] == "plain"
    assert settle_flip("auto", ["R", "both"])[0] == "off"
    assert settle_flip("plain", paired)[0] == "plain"
    assert settle_flip("mapped", paired)[1].tolist() == [2, 1, 0]
    with pytest.raises(ConfigError, match=r"'effusion_left' has no counterpart among the labels \(1 such\)"):
        settle_flip("mapped", ["effusion_left", "healthy"])
    said = {name: Augmenter(AugmentRecipe(flip="auto"), labels, 0).notes for name, labels in
            {"plain": ["a"], "mapped": paired, "off": paired[:2]}.items()}  # fmt: skip
    assert said["plain"] == ["flip plain: no label names a side"]
    assert said["mapped"] == ["flip mapped: labels of the left and the right are swapped with the image"]
    assert said["off"] == ["flip off: a label names a side that has no counterpart"]


def test_labels_of_mirrored_images_change_sides() -> None:
    augmenter = Augmenter(AugmentRecipe(flip="mapped"), ["x_left", "y", "x_right"], 0)
    y = np.array([[1, 0, 0], [1, 1, 0]], np.float32)
    mask = np.array([[True, True, False], [True, False, True]])
    mirrored = np.array([True, False])
    found_y, found_mask = augmenter.labels(y, mask, mirrored)
    assert found_y.tolist() == [[0, 0, 1], [1, 1, 0]]
    assert found_mask.tolist() == [[False, True, True], [True, False, True]]
    classes, kept = augmenter.labels(np.array([0, 1, 2]), np.ones(3, bool), np.array([True, True, False]))
    assert classes.tolist() == [2, 1, 2]
    assert kept.all()
    plain = Augmenter(AugmentRecipe(flip="plain"), ["x_left", "y", "x_right"], 0)
    assert plain.labels(y, mask, mirrored)[0] is y


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flip": "both"}, "flip is one of off, plain, mapped, auto; got 'both'"),
        ({"interpolation": "cubic"}, "interpolation is one of bilinear, nearest"),
        ({"crop": "0.5"}, "crop is one of off, 0.75-1, 0.08-1"),
        ({"degrees": 200.0}, "degrees of turning lie between 0 and 180"),
    ],
)
def test_augmentation_that_cannot_be(options: dict[str, Any], message: str) -> None:
    recipe = AugmentRecipe()
    for name, value in options.items():
        object.__setattr__(recipe, name, value)  # past the types, which are checked here alone
    with pytest.raises(ConfigError, match=message):
        recipe.__post_init__()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": float("nan")}, "the learning rate must be above 0; got nan$"),
        ({"head_lr": -1.0}, "the head's learning rate must be above 0; got -1"),
        ({"weight_decay": -0.1}, "weight decay must be at least 0"),
        ({"momentum": 1.0}, "momentum must be at least 0 and below 1"),
        ({"layer_decay": 0.0}, "layer decay must be above 0 and at most 1"),
        ({"warmup": -1.0}, "warmup must be at least 0 epochs"),
        ({"clip": 0.0}, "clip must be above 0"),
        ({"ema": 1.0}, "ema must be above 0 and below 1"),
    ],
)
def test_optimisation_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Optimisation(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"micro": 0}, "micro must be at least 1"),
        ({"patience": 0}, "patience must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        (
            {"optimisation": Optimisation(warmup=4.0)},
            "warmup of 4 epochs must fit into the 3 of training; give a shorter one, or more epochs",
        ),
    ],
)
def test_recipes_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TuningRecipe(**{"epochs": 3, "batch": 4, **options})


def test_the_schedule() -> None:
    how = Optimisation(warmup=0.5)
    factors = [how.factor(step, 40, 8) for step in range(40)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0
    np.testing.assert_allclose(factors[22], 0.5)
    assert 0 < factors[39] < 0.01
    assert Optimisation(schedule="constant").factor(39, 40, 8) == 1.0
