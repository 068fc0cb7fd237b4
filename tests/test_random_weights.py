"""Random weights: the same numbers everywhere, different for another seed, and names that no version changes."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backbone_conformance import SMALL, images, load, make_network, save_small
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from featstore.backbones import describe
from featstore.backbones.family import HubKey
from featstore.backbones.random_weights import CHUNK, draw, uniform_chunks
from featstore.backbones.source import find_family


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_small(tmp_path_factory.mktemp("weights"))


@pytest.mark.parametrize(
    "name",
    ["dinov2-small", "dinov2-small-reg", "dinov2-base", "dinov2-base-reg", "dinov3-small", "dinov3-base"],
)
def test_releases_run_with_random_weights(name: str) -> None:
    source = describe(name, random_weights=0)
    backbone = load(source, "bfloat16")
    tokens = backbone(images(backbone, 2, 2))
    assert source.random
    assert tokens.cls.shape == (2, source.architecture.embed_dim)
    assert bool(torch.isfinite(tokens.patches).all())
    assert float((tokens.cls[0] - tokens.cls[1]).abs().max()) > 0.1
    assert sum(p.numel() for p in backbone.network.parameters()) == source.architecture.num_parameters()


def parameters_of(backbone: Any) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in backbone.network.named_parameters()}


def test_random_weights_depend_on_the_seed_only(folders: dict[str, Path]) -> None:
    model = f"hf:{folders['dinov3']}"
    first, again, other = (describe(model, random_weights=seed) for seed in (7, 7, 8))
    assert first == again
    assert first.weights == {"kind": "random", "seed": 7, "scheme": 1, "digest": first.weights["digest"]}
    assert first.origin == "random weights, seed 7"
    assert first.weights["digest"] != other.weights["digest"]
    assert first.weights["digest"] != describe("tiny", random_weights=7).weights["digest"]
    torch.manual_seed(1)
    one = parameters_of(load(first))
    torch.manual_seed(2)
    two, three = parameters_of(load(again)), parameters_of(load(other))
    assert all(torch.equal(one[name], two[name]) for name in one)
    matrices = [name for name in one if one[name].dim() > 1 and not name.endswith("mask_token")]
    assert all(not torch.equal(one[name], three[name]) for name in matrices)
    assert len({one[name].flatten()[0].item() for name in matrices}) == len(matrices)
    halves = parameters_of(load(first, "bfloat16"))
    assert all(torch.equal(one[name].to(torch.bfloat16), halves[name]) for name in one)


def test_tiny_random_never_has_the_embedded_weights() -> None:
    source, embedded = describe("tiny-random"), describe("tiny")
    assert source.random
    assert not embedded.random
    assert source.name == "tiny-random"
    assert source.weights == describe("tiny", random_weights=0).weights
    ours, theirs = parameters_of(load(source)), parameters_of(load(embedded))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if torch.equal(ours[name], theirs[name])] == ["embeddings.mask_token"]  # zeros


@pytest.mark.parametrize("label", SMALL)
def test_random_parameters_are_scaled_by_kind(label: str, folders: dict[str, Path]) -> None:
    for name, values in parameters_of(load(describe(f"hf:{folders[label]}", random_weights=0))).items():
        if name.endswith(("bias", "mask_token")):
            assert bool((values == 0).all()), name
        elif values.dim() == 1:
            assert bool((values == 1).all()), name
        else:
            std = 0.02 if "embeddings" in name and "patch" not in name else 1 / math.sqrt(values[0].numel())
            assert float(values.abs().max()) <= math.sqrt(3) * std
            assert float(values.pow(2).mean().sqrt()) == pytest.approx(std, rel=0.3)


@pytest.mark.parametrize("label", SMALL)
def test_canonical_names_are_those_of_the_hubs_files(label: str, folders: dict[str, Path]) -> None:
    network = make_network(label)
    family = find_family(network.config.model_type)
    stored = load_file(folders[label] / "model.safetensors")
    assert {family.hub_key(name).name for name, _ in network.named_parameters()} == set(stored)
    for name, parameter in network.named_parameters():
        key = family.hub_key(name)
        assert torch.equal(stored[key.name].chunk(key.parts)[key.part], parameter)


def test_dinov2_names_of_both_versions_of_transformers() -> None:
    hub_key = find_family("dinov2").hub_key
    block = "encoder.layer.3"
    pairs = {
        "attention.q_proj.weight": "attention.attention.query.weight",
        "attention.k_proj.bias": "attention.attention.key.bias",
        "attention.v_proj.weight": "attention.attention.value.weight",
        "attention.o_proj.bias": "attention.output.dense.bias",
        "mlp.down_proj.weight": "mlp.weights_out.weight",
        "mlp.fc1.weight": "mlp.fc1.weight",
    }
    for new, old in pairs.items():
        assert hub_key(f"{block}.{new}") == hub_key(f"{block}.{old}") == HubKey(f"{block}.{old}")
    assert hub_key(f"{block}.mlp.weights_in.bias") == HubKey(f"{block}.mlp.weights_in.bias")
    assert hub_key(f"{block}.mlp.gate_proj.bias") == HubKey(f"{block}.mlp.weights_in.bias", 0, 2)
    assert hub_key(f"{block}.mlp.up_proj.bias") == HubKey(f"{block}.mlp.weights_in.bias", 1, 2)


@pytest.mark.parametrize("rows", [4, 5, 7])
def test_halves_of_a_tensor_are_cut_from_the_whole(rows: int) -> None:
    cpu = torch.device("cpu")
    whole = draw(HubKey("a.weights_in.weight"), (2 * rows, 3), seed=1, device=cpu, dtype=torch.float32)
    for part in (0, 1):
        half = draw(HubKey("a.weights_in.weight", part, 2), (rows, 3), seed=1, device=cpu, dtype=torch.float32)
        assert torch.equal(half, whole[part * rows : (part + 1) * rows])


@given(skip=st.integers(0, 9), extra=st.integers(-5, 5), chunks=st.integers(0, 2))
@settings(deadline=None, max_examples=40)
def test_chunks_are_one_stream(skip: int, extra: int, chunks: int) -> None:
    count = max(0, chunks * CHUNK + extra)
    found = np.concatenate([np.empty(0, np.float32), *uniform_chunks("x", 3, count=count, skip=skip, std=1.0)])
    whole = np.concatenate(list(uniform_chunks("x", 3, count=3 * CHUNK, std=1.0)))
    assert np.array_equal(found, whole[skip : skip + count])


def test_random_numbers_never_change() -> None:
    # Sets on disk name this scheme: other numbers need another RANDOM_SCHEME.
    (values,) = uniform_chunks("encoder.layer.0.mlp.fc1.weight", 0, count=6, std=1.0)
    assert values.dtype == np.float32
    steps = values.astype(np.float64) / (math.sqrt(3) / 2**15) - 0.5
    assert steps == pytest.approx([-23458, -3672, -8088, -13740, 22031, 10272], abs=0.01)
    (many,) = uniform_chunks("y", 0, count=100_000, std=0.5)
    assert many.mean() == pytest.approx(0, abs=0.01)
    assert many.std() == pytest.approx(0.5, rel=0.01)
    assert np.histogram(many, bins=10)[0].min() > 9_500


@pytest.mark.parametrize("label", ["dinov3", "dinov3-gated"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rotary_frequencies_are_computed(label: str, dtype: str, folders: dict[str, Path]) -> None:
    for random_weights in (None, 0):
        network = load(describe(f"hf:{folders[label]}", random_weights=random_weights), dtype).network
        head_dim = 32 // 2
        expected = [100 ** -(4 * i / head_dim) for i in range(head_dim // 4)]
        assert network.rope_embeddings.inv_freq.dtype == torch.float32
        assert network.rope_embeddings.inv_freq.tolist() == pytest.approx(expected, rel=1e-6)
        assert not any(tensor.is_meta for tensor in (*network.buffers(), *network.parameters()))


def test_no_numbers_are_drawn_for_empty_tensors() -> None:
    values = draw(HubKey("registers"), (1, 0, 8), seed=0, device=torch.device("cpu"), dtype=torch.float32)
    assert values.shape == (1, 0, 8)
