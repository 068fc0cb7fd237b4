"""ViT, MAE, MSN, CLIP, SAM and their DINO relatives: facts, `config.json`, and what releases are taken for."""

import json
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import torch
import transformers
from backbone_conformance import largest_difference, load
from safetensors.torch import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from vit_models import ALL, TOWER, save_all

from featstore.backbones import BACKBONES, canonical_name, describe
from featstore.backbones.architecture import Architecture
from featstore.backbones.family import Release
from featstore.backbones.network import build_empty
from featstore.backbones.sam import WindowedTransformer
from featstore.backbones.source import find_family, read_architecture
from featstore.errors import ConfigError, WeightsError

RELEASES = (
    "vit-base",
    "vit-large",
    "vit-large-in21k",
    "mae-base",
    "mae-large",
    "msn-large",
    "clip-large",
    "openclip-huge",
    "sam-large",
    "rad-dino",
    "dinov3-large-sat",
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_all(tmp_path_factory.mktemp("weights"))


# Facts


def built(architecture: Architecture) -> nn.Module:
    network = build_empty(architecture, find_family(architecture.family))
    assert isinstance(network, nn.Module)
    return network


@pytest.mark.parametrize("name", [name for name in RELEASES if name not in ("vit-large-in21k", "mae-base")])
def test_facts_equal_the_network(name: str) -> None:
    facts = describe(name, random_weights=0).architecture
    network: Any = built(facts).to("meta")
    assert facts.num_parameters() == sum(parameter.numel() for parameter in network.parameters())
    network.set_attn_implementation("eager")  # its products are counted; the kernels behind sdpa have formulas
    side = facts.native_size
    with FlopCounterMode(display=False) as counter, torch.inference_mode(), torch.device("meta"):
        find_family(facts.family).call(network, torch.empty(1, 3, side, side), facts)
    assert facts.gflops(side, side) == pytest.approx(counter.get_total_flops() / 1e9, rel=1e-9)


@pytest.mark.parametrize("label", ALL)
def test_small_networks_are_counted(label: str, folders: dict[str, Path]) -> None:
    facts = describe(f"hf:{folders[label]}", random_weights=0).architecture
    assert facts.num_parameters() == sum(parameter.numel() for parameter in built(facts).parameters())


def test_parameters_of_the_papers() -> None:
    # Millions: protocols of the papers say 300 for the large networks; heads, poolers and text towers are left out.
    published = {"vit-base": 85.8, "vit-large": 303.3, "clip-large": 303.2, "openclip-huge": 630.8, "rad-dino": 86.6}
    for name, millions in published.items():
        facts = describe(name, random_weights=0).architecture
        assert facts.num_parameters() / 1e6 == pytest.approx(millions, rel=1e-3)


@pytest.mark.parametrize(
    "model_type", ["vit", "vit_mae", "vit_msn", "clip", "clip_vision_model", "sam", "sam_vision_model"]
)
def test_absent_config_fields_have_transformers_defaults(model_type: str) -> None:
    defaults = json.loads(json.dumps(transformers.CONFIG_MAPPING[model_type]().to_dict()))
    assert read_architecture({"model_type": model_type}, None) == read_architecture(defaults, None)


@pytest.mark.parametrize("name", RELEASES)
def test_config_round_trip(name: str) -> None:
    facts = describe(name, random_weights=0).architecture
    family = find_family(facts.family)
    assert family.write is not None
    config = {"model_type": facts.family, **family.write(facts)}
    found = read_architecture(json.loads(json.dumps(config)), None)
    assert replace(found, mean=facts.mean, std=facts.std, final_norm=facts.final_norm) == facts
    assert json.loads(json.dumps(facts.as_dict())) == facts.as_dict()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "vit", "hidden_act": "relu"},
            r"hidden_act = 'relu', which is not supported; it must be 'gelu'",
        ),
        ({"model_type": "vit_mae", "num_channels": 1}, r"num_channels = 1, which is not supported; it must be 3"),
        (
            {"model_type": "clip_vision_model", "hidden_act": "relu"},
            r"hidden_act = 'relu', which is not supported; it must be 'gelu' or 'quick_gelu'",
        ),
        ({"model_type": "clip", "vision_config": [1]}, r"vision_config is no object; .* image tower's fields"),
        ({"model_type": "clip", "vision_config_dict": 3}, r"vision_config is no object; .* image tower's fields"),
        ({"model_type": "sam", "vision_config": "x"}, r"vision_config is no object; .* image encoder's fields"),
        ({"model_type": "sam_vision_model", "use_rel_pos": False}, r"use_rel_pos = False, which is not supported"),
        ({"model_type": "sam_vision_model", "use_abs_pos": False}, r"use_abs_pos = False, which is not supported"),
        ({"model_type": "sam_vision_model", "global_attn_indexes": 2}, r"indexes = 2; it must be a list of block"),
        ({"model_type": "sam_vision_model", "global_attn_indexes": [-1]}, r"indexes = \[-1\]; it must be a list"),
    ],
)
def test_config_that_cannot_be_used(config: dict[str, Any], message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        read_architecture(config, None)


def test_widths_of_sam() -> None:
    fields = {"model_type": "sam_vision_model", "hidden_size": 48, "num_attention_heads": 3, "num_hidden_layers": 4}
    for given, expected in (({}, 192), ({"mlp_ratio": 2.5}, 120), ({"mlp_dim": 50, "mlp_ratio": 2.5}, 50)):
        facts = read_architecture({**fields, **given}, None)
        assert isinstance(facts, WindowedTransformer)
        assert facts.mlp_dim == expected == transformers.SamVisionConfig(**fields, **given).mlp_dim
        assert facts.global_blocks == (2,)  # of 2, 5, 8, 11 the ones that there are


@pytest.mark.parametrize("older", [None, {"hidden_size": 96}, {"num_hidden_layers": 2, "patch_size": 14}])
def test_fields_that_clip_states_twice(older: dict[str, Any] | None) -> None:
    config = {"model_type": "clip", "vision_config": TOWER, "vision_config_dict": older}
    own = transformers.CLIPConfig(**{key: value for key, value in config.items() if key != "model_type"}).vision_config
    found = read_architecture(config, None)
    assert (found.embed_dim, found.depth, found.patch_size, found.native_size) == (
        own.hidden_size,
        own.num_hidden_layers,
        own.patch_size,
        own.image_size,
    )


# The releases, and what they are taken for


def test_releases_say_what_they_are() -> None:
    releases: dict[str, Release] = {name: resolve_name(BACKBONES[name]) for name in RELEASES}
    ids = {
        "vit-base": "timm/vit_base_patch16_224.augreg_in21k",
        "vit-large": "google/vit-large-patch16-224",
        "vit-large-in21k": "google/vit-large-patch16-224-in21k",
        "mae-large": "facebook/vit-mae-large",
        "msn-large": "facebook/vit-msn-large",
        "clip-large": "openai/clip-vit-large-patch14",
        "openclip-huge": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        "sam-large": "facebook/sam-vit-large",
        "rad-dino": "microsoft/rad-dino",
        "dinov3-large-sat": "facebook/dinov3-vitl16-pretrain-sat493m",
        "dinov3-7b-sat": "facebook/dinov3-vit7b16-pretrain-sat493m",
    }
    for name, repo in ids.items():
        assert resolve_name(BACKBONES[name]).hub_id == repo
        assert canonical_name(repo) == name
    assert canonical_name("vit_base_patch16_224_in21k") == "vit-base"
    for name, release in releases.items():
        assert release.licence, name
        assert release.pretraining, name
    # Paper (c) says ImageNet-21k of an id that was fine-tuned on ImageNet-1k as well.
    assert releases["vit-large"].pretraining == ("ImageNet-21k", "ImageNet-1k")
    assert "AND fine-tuned on ImageNet-1k" in releases["vit-large"].feature
    assert releases["vit-large-in21k"].pretraining == ("ImageNet-21k",)
    assert "not fine-tuned" in releases["vit-large-in21k"].feature
    assert {"CheXpert", "MIMIC-CXR", "NIH ChestX-ray14"} < set(releases["rad-dino"].pretraining)


def test_dino_releases_state_licence_and_data() -> None:
    for name, place in BACKBONES.items():
        if place.startswith("featstore.backbones.dinov2:") and name != "rad-dino":
            assert (resolve_name(place).licence, resolve_name(place).pretraining) == ("Apache-2.0", ("LVD-142M",))
        if place.startswith("featstore.backbones.dinov3:"):
            data = "SAT-493M" if name.endswith("-sat") else "LVD-1689M"
            assert (resolve_name(place).gated, resolve_name(place).pretraining) == (True, (data,))
            assert "DINOv3 License" in resolve_name(place).licence


def test_norm_and_input_of_the_releases() -> None:
    facts = {name: describe(name, random_weights=0).architecture for name in (*RELEASES, "dinov3-7b-sat")}
    after_norm = {name for name, fact in facts.items() if fact.final_norm}
    assert after_norm == {"vit-base", "rad-dino", "dinov3-large-sat", "dinov3-7b-sat"}
    assert all(fact.as_dict().get("final_norm", True) == fact.final_norm for fact in facts.values())
    assert facts["vit-base"].mean == facts["vit-large"].std == (0.5, 0.5, 0.5)
    assert facts["clip-large"].mean == facts["openclip-huge"].mean == (0.48145466, 0.4578275, 0.40821073)
    assert facts["mae-large"].mean == facts["sam-large"].mean == facts["msn-large"].mean == (0.485, 0.456, 0.406)
    assert (facts["rad-dino"].mean, facts["rad-dino"].std) == ((0.5307,) * 3, (0.2583,) * 3)
    for name in ("dinov3-large-sat", "dinov3-7b-sat"):
        assert facts[name].mean == (0.430, 0.411, 0.296)
        assert facts[name].std == (0.213, 0.156, 0.143)
    assert getattr(facts["clip-large"], "mlp", "") == "quick_gelu"
    assert getattr(facts["openclip-huge"], "mlp", "") == "gelu"
    assert describe("vit-large", random_weights=0, norm="final").architecture.final_norm


@pytest.mark.parametrize(
    ("name", "side", "grid"),
    [("dinov2-base", 518, 37), ("rad-dino", 518, 37), ("vit-base", 512, 32), ("clip-large", 504, 36)],
)
def test_patches_of_14_and_16(name: str, side: int, grid: int) -> None:
    facts = describe(name, random_weights=0).architecture
    facts.check_size(side, side)
    assert facts.grid(side, side) == (grid, grid)
    wrong = 512 if facts.patch_size == 14 else 518
    proposal = "use 504 x 504 or 518 x 518" if facts.patch_size == 14 else "use 512 x 512 or 528 x 528"
    with pytest.raises(ConfigError, match=f"patch size {facts.patch_size}; {wrong} x {wrong} is not: {proposal}"):
        facts.check_size(wrong, wrong)


def test_folder_of_another_model_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(WeightsError, match=r"not that of clip-large: embed_dim 32 instead of 1024; .*mlp_dim 48"):
        describe("clip-large", weights=folders["clip"])
    with pytest.raises(WeightsError, match=r"not that of mae-large: family 'vit' instead of 'vit_mae'"):
        describe("mae-large", weights=folders["vit"])
    with pytest.raises(WeightsError, match=r"window_size 3 instead of 14; global_blocks \(1,\) instead of \(5, 11, 17"):
        describe("sam-large", weights=folders["sam"])


def test_activations_of_clip_are_told_apart(folders: dict[str, Path], tmp_path: Path) -> None:
    openai = describe("clip-large", random_weights=0).architecture
    family = find_family(openai.family)
    assert family.write is not None
    config = {"model_type": "clip", "vision_config": {**family.write(openai), "hidden_act": "gelu"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"not that of clip-large: mlp 'gelu' instead of 'quick_gelu'"):
        describe("clip-large", weights=tmp_path)
    pixels = torch.randn(2, 3, 42, 42, generator=torch.Generator().manual_seed(0))
    quick, exact = (load(describe(f"hf:{folders[label]}")) for label in ("clip", "clip-gelu"))
    assert largest_difference(quick(pixels), exact(pixels)) > 1e-3  # the same weights
