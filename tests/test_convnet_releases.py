"""Releases of convolutional networks: what each says of itself."""

import json
from dataclasses import replace

import pytest
from test_convnets import RELEASES, _release

from featstore.backbones import describe
from featstore.backbones.source import find_family


@pytest.mark.parametrize("name", RELEASES)
def test_releases_say_what_they_are(name: str) -> None:
    release = _release(name)
    facts = release.architecture
    assert (facts.depth, facts.num_registers, facts.summary, facts.patch_size) == (0, 0, "pool", 32)
    assert (facts.native_size, facts.patch_dim) == (224, 512 if name == "vgg19" else None)
    assert release.licence
    assert release.pretraining
    assert release.gated == name.startswith("dinov3")
    assert describe(name, random_weights=0).architecture == facts
    for model in filter(None, (release.hub_id, release.meta_name)):
        assert describe(model, random_weights=0).model == name
    assert facts.as_dict()["summary"] == "pool"
    family = find_family(facts.family)
    if family.read is not None and family.write is not None:
        found = family.read(json.loads(json.dumps(family.write(facts))))
        assert replace(found, mean=facts.mean, std=facts.std) == facts  # which config.json does not state


def test_equal_facts_of_different_networks_differ() -> None:
    stated = [json.dumps(_release(name).architecture.as_dict(), sort_keys=True) for name in RELEASES]
    assert len(set(stated)) == len(RELEASES)
