"""Sizes: against closed forms and exhaustive search."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featstore.errors import ConfigError
from featstore.images import fit_size, parse_resolution


@pytest.mark.parametrize(("text", "size"), [("512", (512, 512)), ("384x512", (384, 512)), ("1", (1, 1))])
def test_resolutions_are_height_by_width(text: str, size: tuple[int, int]) -> None:
    assert parse_resolution(text) == size


@pytest.mark.parametrize(
    "text", ["", "abc", "0", "512x", "x512", "12x0", "-5", "1.5", " 512", "512X512", "1x2x3", "٣", "9999999"]
)
def test_other_resolutions_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--res must be pixels such as 512, or 384x512"):
        parse_resolution(text)


@pytest.mark.parametrize(
    ("side", "patch", "nearest", "floor", "tokens"),
    [
        (512, 14, 518, 504, 448),
        (224, 14, 224, 224, 196),
        (512, 16, 512, 512, 512),
        (21, 14, 28, 14, 14),
        (500, 14, 504, 490, 434),
    ],
)
def test_the_rules_by_hand(side: int, patch: int, nearest: int, floor: int, tokens: int) -> None:
    for rule, expected in (("nearest", nearest), ("floor", floor), ("tokens", tokens)):
        assert fit_size((side, side), patch, rule) == (expected, expected)


@given(
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.sampled_from([8, 13, 14, 16, 32]),
    st.sampled_from(["nearest", "floor", "tokens"]),
)
def test_every_rule_gives_whole_patches(height: int, width: int, patch: int, rule: str) -> None:
    if rule == "floor" and min(height, width) < patch:
        return
    fitted = fit_size((height, width), patch, rule)
    for side, result in zip((height, width), fitted, strict=True):
        assert result % patch == 0
        assert result >= patch
        if rule == "nearest":
            multiples = np.arange(1, 3000 // patch + 2) * patch
            distance = np.abs(multiples - side)
            assert result == multiples[distance == distance.min()].max()
        elif rule == "floor":
            assert 0 <= side - result < patch
        else:
            assert result // patch == fit_size((side, side), 16, "nearest")[0] // 16
    if rule != "tokens" and height % patch == 0 and width % patch == 0:
        assert fitted == (height, width) == fit_size((height, width), patch, "strict")


def test_sizes_that_are_refused() -> None:
    with pytest.raises(
        ConfigError, match="--fit strict: 512 is no multiple of the patch size 14; use --res 504 or 518"
    ):
        fit_size((512, 512), 14, "strict")
    with pytest.raises(ConfigError, match=r"patch size 14; use --res 14$"):
        fit_size((14, 9), 14, "strict")
    with pytest.raises(ConfigError, match="--fit floor: 9 pixels are less than one patch of 14"):
        fit_size((14, 9), 14, "floor")
    with pytest.raises(ConfigError, match="--fit must be one of nearest, floor, tokens, strict, got 'ceil'"):
        fit_size((14, 14), 14, "ceil")
