"""Every named backbone with random weights, at its real size: shapes, order, finite tokens that tell images apart.

A new line in `BACKBONES` is picked up; those above 30 M parameters run with the full counts.
"""

from typing import Any

import pytest
import torch
from backbone_conformance import DIFFERENCE, images

from featstore.backbones import BACKBONES, describe
from featstore.backbones.tokens import Backbone

QUICK, LARGEST = 30e6, 700e6  # parameters; the two largest are only built, by `test_facts_equal_the_network`


def cases() -> list[Any]:
    found = []
    for name in BACKBONES:
        facts = describe(name, random_weights=None if name == "tiny-random" else 0).architecture
        heavy = facts.num_parameters() > QUICK or facts.gflops(64, 64) > 10
        if facts.num_parameters() <= LARGEST:
            found.append(pytest.param(name, marks=[pytest.mark.slow] if heavy else []))
    return found


@pytest.mark.parametrize("name", cases())
def test_named_backbones_give_tokens_of_their_facts(name: str) -> None:
    source = describe(name, random_weights=None if name == "tiny-random" else 0)
    backbone = source.load(device="cpu", compute_dtype="float32")
    facts = backbone.architecture
    assert isinstance(backbone, Backbone)
    side = facts.native_size // facts.patch_size if facts.fixed_size else 0
    rows, columns = (side, side) if side else (2, 3)
    batch = images(backbone, rows, columns, count=2)
    with torch.inference_mode():
        tokens = backbone(batch, layers=(-1,) if facts.depth else ())
    assert tokens.cls.shape == (2, facts.embed_dim)
    assert tokens.registers.shape == (2, facts.num_registers, facts.embed_dim)
    assert tokens.patches.shape == (2, rows * columns, facts.patch_width)
    assert list(tokens.layers) == ([facts.depth] if facts.depth else [])
    for part in (tokens.cls, tokens.registers, tokens.patches):
        assert bool(torch.isfinite(part).all())
        assert not part.numel() or float(part.abs().max()) < 65504  # float16 holds them
    assert float((tokens.cls[0] - tokens.cls[1]).abs().max()) > DIFFERENCE
    assert float(tokens.patches.std(dim=1).mean()) > DIFFERENCE
    if facts.summary == "pool" and facts.family == "sam_vision_model":
        assert torch.allclose(tokens.cls, tokens.patches.mean(1), atol=1e-5)
