"""Sliding windows: one grid from many windows, against a sum over patches done one by one."""

import itertools
from dataclasses import replace

import pytest
import torch
from backbone_conformance import images, load
from hypothesis import given, settings
from hypothesis import strategies as st

from featstore.backbones import describe
from featstore.backbones.tokens import Backbone, Tokens
from featstore.backbones.windows import WindowedBackbone, starts_of
from featstore.errors import ConfigError


@pytest.fixture(scope="module")
def tiny() -> Backbone:
    return load(describe("tiny-random"))


@given(side=st.integers(1, 60), size=st.integers(1, 60), stride=st.integers(1, 60))
@settings(max_examples=200)
def test_windows_cover_every_pixel_and_stay_inside(side: int, size: int, stride: int) -> None:
    size, stride = min(size, side), min(stride, size, side)
    starts = starts_of(side, size, stride)
    covered = {pixel for start in starts for pixel in range(start, start + size)}
    assert covered == set(range(side))
    assert starts == sorted(set(starts))
    assert all(b - a <= stride for a, b in itertools.pairwise(starts))


@pytest.mark.parametrize(
    ("height", "width", "window"), [(84, 84, (42, 42)), (70, 98, (42, 28)), (42, 42, (42, 14)), (56, 42, (42, 42))]
)
def test_patches_are_means_over_windows(tiny: Backbone, height: int, width: int, window: tuple[int, int]) -> None:
    size, stride = window
    pixels = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    found = WindowedBackbone(tiny, window)(pixels, layers=(2, -1))
    places = [(y, x) for y in starts_of(height, size, stride) for x in starts_of(width, size, stride)]
    parts = [tiny(pixels[:, :, y : y + size, x : x + size], layers=(2, -1)) for y, x in places]
    side, columns = size // 14, width // 14
    for pick in (lambda tokens: tokens, lambda tokens: tokens.layers[2]):
        tokens: Tokens = pick(found)
        assert torch.allclose(tokens.cls, torch.stack([pick(part).cls for part in parts]).mean(0), atol=1e-5)
        assert torch.allclose(tokens.registers, torch.stack([pick(p).registers for p in parts]).mean(0), atol=1e-5)
        for row in range(height // 14):
            for column in range(columns):
                holding = [
                    pick(part).patches[:, (row - y // 14) * side + column - x // 14]
                    for part, (y, x) in zip(parts, places)
                    if 0 <= row - y // 14 < side and 0 <= column - x // 14 < side
                ]
                expected = torch.stack(holding).mean(0)
                assert torch.allclose(tokens.patches[:, row * columns + column], expected, atol=1e-5)
    assert torch.equal(found.layers[4].patches, found.patches)


def test_one_window_is_the_network_itself(tiny: Backbone) -> None:
    pixels = images(tiny, 3, 3)
    assert torch.equal(WindowedBackbone(tiny, (42, 42))(pixels).patches, tiny(pixels).patches)
    windowed = WindowedBackbone(tiny, (42, 42))
    assert isinstance(windowed, Backbone)
    assert (windowed.device, windowed.dtype) == (tiny.device, tiny.dtype)
    assert windowed.memory == "resident"
    assert windowed.kernel == getattr(tiny, "kernel", None)


def test_networks_of_one_size_take_larger_images_through_windows(tiny: Backbone) -> None:
    facts = replace(tiny.architecture, fixed_size=True, native_size=42)
    with pytest.raises(ConfigError, match="takes images of 42 x 42 pixels only, not 84 x 84; leave --res out"):
        facts.check_size(84, 84)
    facts.check_window((42, 42), 84, 84)
    with pytest.raises(ConfigError, match="42 x 42 pixels only, not 28 x 28"):
        facts.check_window((28, 28), 84, 84)


@pytest.mark.parametrize(
    ("window", "height", "message"),
    [
        ((40, 28), 84, r"--window 40/28: size and stride must be multiples of the patch size 14; for example 28/28"),
        ((42, 10), 84, r"--window 42/10: .* for example 42/14"),
        ((42, 42), 85, r"height and width must be multiples of the patch size 14; 85 x 85 is not"),
        ((98, 98), 84, r"--window 98: images of 84x84 are smaller than one window; leave it out"),
    ],
)
def test_windows_that_do_not_fit(tiny: Backbone, window: tuple[int, int], height: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WindowedBackbone(tiny, window)(torch.zeros(1, 3, height, height))
