"""Networks of convolutions: tokens against transformers and closed forms, key names, counts, refusals."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import torch
import transformers
from backbone_conformance import (
    DIFFERENCE,
    TOLERANCE,
    check_batch_size_does_not_matter,
    check_frozen,
    check_same_image_same_tokens,
    check_size_must_fit_patch,
    images,
    load,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from featstore.backbones import BACKBONES, describe
from featstore.backbones.architecture import Architecture
from featstore.backbones.convnext import ConvNext
from featstore.backbones.densenet import old_key
from featstore.backbones.dinov3_convnext import meta_key
from featstore.backbones.family import HubKey, Release
from featstore.backbones.mobilenet import MOBILENETV2
from featstore.backbones.mobilenet import hub_key as mobilenet_hub_key
from featstore.backbones.network import build_empty, load_network, weights_of
from featstore.backbones.source import LoadOptions, find_family
from featstore.backbones.tensors import RandomTensors, SafetensorsFiles
from featstore.backbones.tokens import Backbone
from featstore.errors import ConfigError, WeightsError

SIZES = ((2, 2), (1, 3), (3, 2))  # in patches
STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 2, 1, 1]}
RESNET = {"depths": [1, 2, 1, 1], "downsample_in_first_stage": False}
# label -> (transformers' class for a whole checkpoint, its config, arguments, attribute that holds the trunk)
CHECKPOINTS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "dinov3_convnext": ("DINOv3ConvNextModel", "DINOv3ConvNextConfig", STAGES, ""),
    "convnext": ("ConvNextForImageClassification", "ConvNextConfig", {**STAGES, "patch_size": 2}, "convnext"),
    "resnet": ("ResNetForImageClassification", "ResNetConfig", RESNET, "resnet"),
    "mobilenet_v2": ("MobileNetV2ForImageClassification", "MobileNetV2Config", {}, "mobilenet_v2"),
}
RELEASES = (
    *(f"dinov3-convnext-{size}" for size in ("tiny", "small", "base", "large")),
    *("convnext-base", "resnet50", "resnet152", "vgg19", "densenet201", "mobilenetv2"),
)
GAIN = 1.3  # of random matrices; at 1 activations halve the signal, at sqrt(2) blocks add too much
OPTIONS = LoadOptions(device="cpu", compute_dtype="float32")


def _release(name: str) -> Release:
    release = resolve_name(BACKBONES[name])
    assert isinstance(release, Release)
    return release


def _small(name: str) -> Architecture:
    """The facts of a network like a release's, with few blocks and narrow matrices."""
    facts = _release(name).architecture
    if name == "vgg19":
        return replace(facts, variant="1-1-1-1-1", embed_dim=24)
    if name == "densenet201":
        return replace(facts, variant="2-1-1-2", embed_dim=104)
    return replace(facts, variant="1-2-1-1") if name.startswith("resnet") else facts


@torch.no_grad()
def _randomise(network: nn.Module, seed: int = 0) -> None:
    """Random numbers in every parameter and running statistic, of a size that signals keep."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in network.state_dict().items():
        if name.endswith("running_var"):
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
        elif value.is_floating_point() and value.ndim == 1:
            value.copy_(torch.randn(value.shape, generator=generator) * 0.1 + (0.9 if name.endswith("weight") else 0.0))
        elif value.is_floating_point():
            value.copy_(torch.randn(value.shape, generator=generator) * GAIN * value[0].numel() ** -0.5)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    """Networks of transformers and the folders in the hub's format that they were saved to."""
    made = {}
    for label, (model_class, config_class, arguments, _) in CHECKPOINTS.items():
        network = getattr(transformers, model_class)(getattr(transformers, config_class)(**arguments)).eval()
        _randomise(network)
        folder = tmp_path_factory.mktemp("convnets") / label
        network.save_pretrained(folder)
        made[label] = (network, folder)
    return made


@pytest.fixture(scope="module")
def backbones(checkpoints: dict[str, tuple[Any, Path]]) -> dict[str, Backbone]:
    """Everything the conformance checks run over."""
    made = {label: load(describe(f"hf:{folder}")) for label, (_, folder) in checkpoints.items()}
    for name in ("vgg19", "densenet201", "resnet50", "mobilenetv2"):
        facts = _small(name)
        family = find_family(facts.family)
        made[name] = load_network(RandomTensors(0, family), facts, family, "hf", OPTIONS)
    folder = checkpoints["convnext"][1]
    made["convnext-random"] = load(describe(f"hf:{folder}", random_weights=0))
    return made


# What every backbone must do


def check_patches_of_a_changed_corner_change_most(backbone: Backbone) -> None:
    """Places of these maps see far beyond their own square, so only far ones are compared."""
    rows, columns = 4, 6
    plain = images(backbone, rows, columns, count=1)
    half = backbone.architecture.patch_size * 3 // 2
    for corner, (down, along) in enumerate(((0, 0), (0, -half), (-half, 0), (-half, -half))):
        changed = plain.clone()
        changed[:, :, down:, along:][:, :, :half, :half] *= -1
        moved = (backbone(changed).patches - backbone(plain).patches).norm(dim=-1).view(rows, columns)
        corners = torch.stack([moved[0, 0], moved[0, -1], moved[-1, 0], moved[-1, -1]])
        assert int(corners.argmax()) == corner


CHECKS = (
    check_patches_of_a_changed_corner_change_most,
    check_batch_size_does_not_matter,
    check_same_image_same_tokens,
    check_size_must_fit_patch,
    check_frozen,
)
CONFORMING = (*CHECKPOINTS, "vgg19", "densenet201", "resnet50", "mobilenetv2", "convnext-random")


@pytest.mark.parametrize("name", CONFORMING)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_conformance(check: Callable[[Backbone], None], name: str, backbones: dict[str, Backbone]) -> None:
    check(backbones[name])


@pytest.mark.parametrize("name", CONFORMING)
def test_tokens_cover_the_grid_and_tell_images_apart(name: str, backbones: dict[str, Backbone]) -> None:
    backbone = backbones[name]
    facts = backbone.architecture
    for rows, columns in SIZES:
        tokens = backbone(images(backbone, rows, columns, count=4))
        assert tokens.cls.shape == (4, facts.embed_dim)
        assert tokens.registers.shape == (4, 0, facts.embed_dim)
        assert tokens.patches.shape == (4, rows * columns, facts.patch_width)
        assert facts.num_tokens(rows * facts.patch_size, columns * facts.patch_size) == 1 + rows * columns
        assert tokens.layers == {}
        for part in (tokens.cls, tokens.patches):
            assert part.dtype == torch.float32
            assert bool(torch.isfinite(part).all())
            assert 0.05 < float(part.pow(2).mean().sqrt()) < 20
            assert float(part.std(dim=0).mean()) > DIFFERENCE
    with pytest.raises(ConfigError, match=rf"layer 1: {facts.family} has no inner layers to keep; leave --layers out"):
        backbone(images(backbone, 1, 1), layers=(1,))


# Parity with transformers


def _expected(label: str, network: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """(cls, patches) out of transformers' own forward pass."""
    trunk = CHECKPOINTS[label][3]
    with torch.no_grad():
        output = (getattr(network, trunk) if trunk else network)(pixels)
    if label == "dinov3_convnext":
        return output.pooler_output, output.last_hidden_state[:, 1:]
    maps = output.last_hidden_state
    patches = [maps[:, :, row, column] for row in range(maps.shape[2]) for column in range(maps.shape[3])]
    return output.pooler_output.flatten(1), torch.stack(patches, dim=1)


@pytest.mark.parametrize("label", CHECKPOINTS)
def test_tokens_equal_transformers(
    label: str, checkpoints: dict[str, tuple[Any, Path]], backbones: dict[str, Backbone]
) -> None:
    backbone = backbones[label]
    for rows, columns in SIZES:
        pixels = images(backbone, rows, columns, count=3)
        cls, patches = _expected(label, checkpoints[label][0], pixels)
        tokens = backbone(pixels)
        assert torch.allclose(tokens.cls, cls, rtol=0, atol=TOLERANCE)
        assert torch.allclose(tokens.patches, patches, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", CONFORMING)
def test_bfloat16_stays_near_float32(
    name: str, checkpoints: dict[str, tuple[Any, Path]], backbones: dict[str, Backbone]
) -> None:
    exact = backbones[name]
    facts, family = exact.architecture, find_family(exact.architecture.family)
    if name in CHECKPOINTS:
        tensors: Any = SafetensorsFiles([checkpoints[name][1] / "model.safetensors"])
    else:
        tensors = RandomTensors(0, family)
    half = load_network(tensors, facts, family, "hf", replace(OPTIONS, compute_dtype="bfloat16"))
    pixels = images(exact, 2, 3, count=3)
    found, wanted = half(pixels), exact(pixels)
    for part, whole in ((found.cls, wanted.cls), (found.patches, wanted.patches)):
        assert part.dtype == torch.bfloat16
        assert float(F.cosine_similarity(part.float(), whole, dim=-1).min()) > 0.999
        # 8 bits of mantissa, through up to 53 layers
        assert float((part.float() - whole).abs().max()) < 0.05 * float(whole.abs().max())


@pytest.mark.parametrize("name", ["resnet50", "densenet201", "mobilenetv2"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_norms_stay_in_float32(name: str, dtype: str) -> None:
    facts = _small(name)
    family = find_family(facts.family)
    options = replace(OPTIONS, compute_dtype=dtype)
    network = load_network(RandomTensors(0, family), facts, family, "hf", options).network
    assert not network.training
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    for module in norms:
        assert not module.training
        for value in (module.weight, module.bias, module.running_mean, module.running_var):
            assert value is not None
            assert value.dtype == torch.float32
    held = {id(value) for module in norms for value in module.parameters()}
    assert all(v.dtype == getattr(torch, dtype) for v in network.parameters() if id(v) not in held)


# Closed forms, for the networks that transformers lacks


def _passing(network: nn.Module) -> dict[str, Tensor]:
    """Weights of zeros, and norms that do nothing."""
    weights = {name: torch.zeros(value.shape) for name, value in weights_of(network).items()}
    for name, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            weights[f"{name}.weight"] += 1
            weights[f"{name}.running_var"] += 1 - module.eps
    return weights


def _load(facts: Architecture, weights: dict[str, Tensor], file: Path) -> Backbone:
    save_file(weights, file)
    return load_network(SafetensorsFiles([file]), facts, find_family(facts.family), "hf", OPTIONS)


def _pass_channels(weight: Tensor, count: int = 3) -> None:
    """Make a convolution hand on the first channels at its middle pixel."""
    for channel in range(count):
        weight[channel, channel, weight.shape[2] // 2, weight.shape[3] // 2] = 1


def test_vgg_that_only_pools_gives_the_largest_pixel_of_each_square(tmp_path: Path) -> None:
    facts = _small("vgg19")
    weights = _passing(build_empty(facts, find_family("vgg")))
    for name, weight in weights.items():
        if name.startswith("features") and name.endswith("weight"):
            _pass_channels(weight)
    generator = torch.Generator().manual_seed(3)
    for name in ("classifier.0", "classifier.3"):
        for kind in ("weight", "bias"):
            weights[f"{name}.{kind}"].normal_(generator=generator)
    flat = {**weights, "classifier.0.weight": weights["classifier.0.weight"].flatten(1)}
    backbone = _load(facts, flat, tmp_path / "vgg.safetensors")
    for rows, columns in ((7, 7), (2, 3)):
        pixels = images(backbone, rows, columns)
        tokens = backbone(pixels)
        squares = pixels.clamp(min=0).unflatten(2, (rows, 32)).unflatten(4, (columns, 32)).amax(dim=(3, 5))
        patches = torch.zeros(2, rows * columns, 512)
        patches[..., :3] = squares.flatten(2).transpose(1, 2)
        assert torch.equal(tokens.patches, patches)
        # 7 x 7 places: each the mean of those of the map that it touches.
        grid = torch.zeros(2, 512, 7, 7)
        for row in range(7):
            for column in range(7):
                down = slice(row * rows // 7, -(-(row + 1) * rows // 7))
                along = slice(column * columns // 7, -(-(column + 1) * columns // 7))
                grid[:, :3, row, column] = squares[:, :, down, along].mean(dim=(2, 3))
        first = weights["classifier.0.weight"].flatten(1) @ grid.flatten(1).T + weights["classifier.0.bias"][:, None]
        second = weights["classifier.3.weight"] @ first.clamp(min=0) + weights["classifier.3.bias"][:, None]
        assert torch.allclose(tokens.cls, second.clamp(min=0).T, rtol=1e-5, atol=1e-4)


def test_densenet_that_only_pools_gives_means_of_largest_pixels(tmp_path: Path) -> None:
    facts = replace(_small("densenet201"), variant="1-1-1-1", embed_dim=68)
    weights = _passing(build_empty(facts, find_family("densenet")))
    for name, weight in weights.items():
        if name.endswith("conv0.weight") or (".transition" in name and name.endswith("conv.weight")):
            _pass_channels(weight)
    # One layer adds channels of its own: three times the first channel, less 0.5, after its first norm.
    layer = "features.denseblock4.denselayer1"
    weights[f"{layer}.norm1.bias"][0] = -0.5
    weights[f"{layer}.conv1.weight"][0, 0] = 3
    weights[f"{layer}.conv2.weight"][5, 0, 1, 1] = 1
    # (x - 1) / sqrt(4) * 6 + 0.25 after the last norm, for the second channel.
    eps = 1e-5
    weights["features.norm5.running_mean"][1], weights["features.norm5.running_var"][1] = 1, 4 - eps
    weights["features.norm5.weight"][1], weights["features.norm5.bias"][1] = 6, 0.25
    backbone = _load(facts, weights, tmp_path / "densenet.safetensors")
    assert backbone.architecture.embed_dim == 68
    pixels = images(backbone, 2, 3)
    largest = F.max_pool2d(F.pad(pixels[:, :, ::2, ::2].clamp(min=0), (1, 1, 1, 1)), 3, 2)  # nothing is below 0
    means = largest.unflatten(2, (2, 8)).unflatten(4, (3, 8)).mean(dim=(3, 5)).flatten(2).transpose(1, 2)
    before = backbone.architecture.embed_dim - 32
    expected = torch.zeros(2, 6, 68)
    expected[..., :3] = means
    expected[..., 1] = ((means[..., 1] - 1) * 3 + 0.25).clamp(min=0)
    expected[..., before + 5] = 3 * (means[..., 0] - 0.5).clamp(min=0)
    tokens = backbone(pixels)
    assert torch.allclose(tokens.patches, expected, rtol=0, atol=TOLERANCE)
    assert torch.allclose(tokens.cls, expected.mean(dim=1), rtol=0, atol=TOLERANCE)


# Key names


def test_metas_names_of_dinov3_convnext(checkpoints: dict[str, tuple[Any, Path]], tmp_path: Path) -> None:
    expected = {
        "model.stages.0.downsample_layers.0.weight": "downsample_layers.0.0.weight",
        "model.stages.0.downsample_layers.1.bias": "downsample_layers.0.1.bias",
        "model.stages.3.downsample_layers.1.weight": "downsample_layers.3.1.weight",
        "model.stages.2.layers.26.depthwise_conv.weight": "stages.2.26.dwconv.weight",
        "model.stages.1.layers.0.layer_norm.bias": "stages.1.0.norm.bias",
        "stages.1.layers.0.pointwise_conv1.weight": "stages.1.0.pwconv1.weight",
        "model.stages.1.layers.2.pointwise_conv2.bias": "stages.1.2.pwconv2.bias",
        "model.stages.1.layers.2.gamma": "stages.1.2.gamma",
        "layer_norm.weight": "norm.weight",
    }
    assert {live: meta_key(live).name for live in expected} == expected
    # A whole file of Meta's, which has the final norm twice, gives the same tokens as the hub's.
    network, folder = checkpoints["dinov3_convnext"]
    weights = {meta_key(live).name: value.clone() for live, value in network.state_dict().items()}
    weights |= {f"norms.3.{kind}": weights[f"norm.{kind}"].clone() for kind in ("weight", "bias")}
    source = describe(f"hf:{folder}")
    backbone = _load(source.architecture, weights, tmp_path / "meta.safetensors")
    pixels = images(backbone, 2, 3)
    assert torch.equal(backbone(pixels).patches, load(source)(pixels).patches)


def _torchvision_names(name: str) -> dict[str, Tensor]:
    """A random checkpoint with torchvision's names and classifier."""
    facts = _small(name)
    network = build_empty(facts, find_family(facts.family)).to_empty(device="cpu")
    _randomise(network)
    weights = {key: value.clone() for key, value in network.state_dict().items()}
    head = {"vgg19": "classifier.6", "densenet201": "classifier"}.get(name, "fc")
    weights |= {f"{head}.weight": torch.zeros(1000, facts.embed_dim), f"{head}.bias": torch.zeros(1000)}
    if name == "vgg19":
        weights["classifier.0.weight"] = weights["classifier.0.weight"].flatten(1)
    return weights


def _renamed(weights: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    renamed = {}
    for key, value in weights.items():
        for old, new in names.items():
            key = key.replace(old, new)
        renamed[key] = value
    return renamed


@pytest.mark.parametrize("name", ["resnet50", "vgg19", "densenet201"])
def test_torchvisions_and_timms_names_give_the_same_tokens(name: str, tmp_path: Path) -> None:
    weights, facts = _torchvision_names(name), _small(name)
    other = dict(weights)
    if name == "vgg19":
        other = _renamed(other, {"classifier.0": "pre_logits.fc1", "classifier.3": "pre_logits.fc2"})
        other = _renamed(other, {"classifier.6": "head.fc"})
        width = facts.embed_dim
        other["pre_logits.fc1.weight"] = other["pre_logits.fc1.weight"].view(width, 512, 7, 7)
        other["pre_logits.fc2.weight"] = other["pre_logits.fc2.weight"].view(width, width, 1, 1)
    elif name == "densenet201":
        inner = {f".{kind}{number}.": f".{kind}.{number}." for kind in ("norm", "conv") for number in (1, 2)}
        other = {k if "denselayer" not in k else next(iter(_renamed({k: v}, inner))): v for k, v in other.items()}
        assert "features.denseblock1.denselayer2.conv.2.weight" in other
        assert old_key("features.norm0.weight") == HubKey("features.norm0.weight")
    else:
        expected = {"layer1.0.downsample.1.running_var", "layer2.1.conv3.weight", "bn1.num_batches_tracked"}
        assert expected <= weights.keys()
    first = _load(facts, weights, tmp_path / "torchvision.safetensors")
    second = _load(facts, other, tmp_path / "timm.safetensors")
    pixels = images(first, 2, 2)
    assert torch.equal(first(pixels).cls, second(pixels).cls)
    assert float(first(pixels).cls.std(dim=0).mean()) > DIFFERENCE


def test_vgg_without_its_first_matrix_is_refused(tmp_path: Path) -> None:
    weights, facts = _torchvision_names("vgg19"), _small("vgg19")
    wrong = weights.pop("classifier.0.weight")
    with pytest.raises(WeightsError, match=r"does not fit the model: tensors 1 missing \(classifier.0.weight\)"):
        _load(facts, weights, tmp_path / "lacking.safetensors")
    with pytest.raises(WeightsError, match=r"classifier.0.weight has shape \[24, 49\], which does not give"):
        _load(facts, {**weights, "classifier.0.weight": wrong[:, :49].clone()}, tmp_path / "wrong.safetensors")


def test_torchvisions_own_mobilenet_is_refused(checkpoints: dict[str, tuple[Any, Path]], tmp_path: Path) -> None:
    facts = MOBILENETV2.architecture
    network = build_empty(facts, find_family(facts.family)).to_empty(device="cpu")
    _randomise(network)
    save_file(network.state_dict(), tmp_path / "mobilenet_v2.safetensors")
    source = describe("mobilenetv2", weights=tmp_path / "mobilenet_v2.safetensors")
    with pytest.raises(WeightsError, match="torchvision's own training, with other padding and another mean"):
        load(source)


def test_folded_mobilenet_equals_the_one_with_norms(
    checkpoints: dict[str, tuple[Any, Path]], backbones: dict[str, Backbone], tmp_path: Path
) -> None:
    """The norms of Google's network, folded into weights and biases, as files with torchvision's names have them."""
    stored = load_file(checkpoints["mobilenet_v2"][1] / "model.safetensors")
    network = build_empty(MOBILENETV2.architecture, find_family("mobilenet_v2"))
    folded = {}
    for live in weights_of(network):
        folded[live] = stored[f"mobilenet_v2.{mobilenet_hub_key(live).name}"].double()
    for name, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            parent, _, position = name.rpartition(".")
            scale = folded[f"{name}.weight"] / (folded[f"{name}.running_var"] + 0.001).sqrt()
            folded[f"{parent}.{int(position) - 1}.weight"] *= scale[:, None, None, None]
            folded[f"{name}.bias"] -= scale * folded[f"{name}.running_mean"]
            folded[f"{name}.weight"] = torch.ones_like(scale)
            folded[f"{name}.running_mean"] = torch.zeros_like(scale)
            folded[f"{name}.running_var"] = torch.full_like(scale, 0.99999)
    save_file({name: value.float() for name, value in folded.items()}, tmp_path / "folded.safetensors")
    backbone = load(describe("mobilenetv2", weights=tmp_path / "folded.safetensors"))
    pixels = images(backbone, 2, 3)
    assert torch.allclose(backbone(pixels).patches, backbones["mobilenet_v2"](pixels).patches, rtol=0, atol=1e-4)


# Facts of the releases


@pytest.mark.parametrize("name", RELEASES)
def test_counts_are_those_of_the_network(name: str) -> None:
    facts = _release(name).architecture
    family = find_family(facts.family)
    network = build_empty(facts, family).to("meta")
    assert facts.num_parameters() == sum(parameter.numel() for parameter in network.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        output = family.call(network, torch.empty(1, 3, 224, 224, device="meta"), facts)
    cls, registers, patches = family.split(output, facts)
    assert facts.gflops(224, 224) == pytest.approx(counter.get_total_flops() / 1e9, rel=1e-9)
    assert facts.gflops(448, 224) == pytest.approx(2 * facts.gflops(224, 224))
    assert cls.shape == (1, facts.embed_dim)
    assert registers.shape == (1, 0, facts.embed_dim)
    assert patches.shape == (1, 49, facts.patch_width)


# What a config.json must not say


@pytest.mark.parametrize(
    ("label", "change", "message"),
    [
        ("convnext", {"depths": [1, 2, 1]}, "config.json says 3 depths and 4 hidden_sizes"),
        ("convnext", {"depths": [1, 2, 0, 1]}, r"config.json says depths = \[1, 2, 0, 1\]; it must be a list of whole"),
        ("convnext", {"num_stages": 3}, "config.json says num_stages = 3, but depths has 4"),
        ("convnext", {"hidden_act": "relu"}, "config.json says hidden_act = 'relu', which is not supported"),
        ("dinov3_convnext", {"hidden_sizes": "8"}, "config.json says hidden_sizes = '8'; it must be a list of whole"),
        ("resnet", {"layer_type": "basic"}, "config.json says layer_type = 'basic', which is not supported"),
        ("resnet", {"depths": [1, 2]}, r"config.json says depths = \[1, 2\]; it must be four whole numbers above 0"),
        ("mobilenet_v2", {"tf_padding": False}, "config.json says tf_padding = False, which is not supported"),
        ("mobilenet_v2", {"depth_multiplier": 0.5}, "config.json says depth_multiplier = 0.5, which is not supported"),
    ],
)
def test_configs_that_are_not_supported(
    label: str, change: dict[str, Any], message: str, checkpoints: dict[str, tuple[Any, Path]], tmp_path: Path
) -> None:
    config = json.loads((checkpoints[label][1] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(WeightsError, match=message):
        describe(f"hf:{tmp_path}", random_weights=0)


def test_a_folder_states_its_own_stages(checkpoints: dict[str, tuple[Any, Path]]) -> None:
    facts = describe(f"hf:{checkpoints['convnext'][1]}").architecture
    assert isinstance(facts, ConvNext)
    assert (facts.patch_size, facts.stem, facts.embed_dim, facts.norm_eps) == (16, 2, 32, 1e-12)
    network = checkpoints["convnext"][0].convnext
    assert facts.num_parameters() == sum(parameter.numel() for parameter in network.parameters())
    with pytest.raises(WeightsError, match=r"config.json is not that of convnext-base: .*depths"):
        describe("convnext-base", weights=checkpoints["convnext"][1])
