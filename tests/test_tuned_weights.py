"""Trained weights out and in again: the hub's files, adapters alone, refusals."""

import warnings
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import torch
from backbone_conformance import make_network
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tuning import FACTS, OPTIONS, fresh, gap, load, perturb, pixels, same

from featstore.backbones import BACKBONES, describe
from featstore.backbones.dinov3 import PERIODS
from featstore.backbones.exporting import describe_folder, hub_tensors, write_weights
from featstore.backbones.family import Release
from featstore.backbones.matching import check_shapes, match
from featstore.backbones.network import NetworkBackbone, build_empty, load_network, weights_of
from featstore.backbones.source import find_family
from featstore.backbones.tensors import SafetensorsFiles
from featstore.backbones.trainable import make_trainable
from featstore.errors import WeightsError
from probes.adapters import adapt
from probes.adapters_config import METHODS, AdapterConfig

# Out and in again


@pytest.mark.parametrize("method", ["lora", "full", "bitfit"])
@pytest.mark.parametrize("label", FACTS)
def test_exported_weights_give_the_tuned_tokens(label: str, method: str, tmp_path: Path) -> None:
    trainable = fresh(label)
    adapted = adapt(trainable, method, AdapterConfig(r=3) if method == "lora" else AdapterConfig())
    perturb(adapted, 0.02)
    batch = pixels(trainable)
    with torch.no_grad():
        expected = trainable.eval()(batch)
    adapted.export(tmp_path / "model.safetensors")
    facts, family = trainable.architecture, trainable.family
    assert family is not None
    again = load_network(SafetensorsFiles([tmp_path / "model.safetensors"]), facts, family, "hf", OPTIONS)
    assert gap(again(batch), expected) <= 1e-5
    assert gap(load(label)(batch), expected) > 1e-3


@pytest.mark.parametrize("label", ["dinov2-swiglu", "dinov3"])
def test_exported_files_are_the_hubs(label: str, tmp_path: Path) -> None:
    """Round trip over the command line's own way in, and names and shapes as transformers itself writes them."""
    make_network(label).save_pretrained(tmp_path / "original")
    source = describe(f"hf:{tmp_path / 'original'}")
    backbone = source.load(device="cpu", compute_dtype="float32")
    trainable = make_trainable(backbone)
    adapted = adapt(trainable, "lora", AdapterConfig(r=2, targets="qkv,fc1,fc2"))
    perturb(adapted)
    batch = pixels(trainable)
    with torch.no_grad():
        expected = trainable(batch)
    folder = tmp_path / "tuned"
    folder.mkdir()
    adapted.export(folder / "model.safetensors")
    assert trainable.family is not None
    for name, text in describe_folder(trainable.architecture, trainable.family).items():
        (folder / name).write_text(text)
    original = load_file(tmp_path / "original" / "model.safetensors")
    written = load_file(folder / "model.safetensors")
    assert {name: value.shape for name, value in written.items()} == {
        name: value.shape for name, value in original.items()
    }
    again = describe(f"hf:{folder}")
    assert again.architecture == source.architecture
    assert again.identity["weights"] != source.identity["weights"]
    assert gap(again.load(device="cpu", compute_dtype="float32")(batch), expected) <= 1e-5


def test_extract_takes_the_file_by_the_models_name(tmp_path: Path) -> None:
    trainable = make_trainable(describe("tiny").load(device="cpu", compute_dtype="float32"))
    adapted = adapt(trainable, "lora")
    perturb(adapted)
    adapted.export(tmp_path / "tuned.safetensors")
    batch = pixels(trainable)
    again = describe("tiny", weights=tmp_path / "tuned.safetensors").load(device="cpu", compute_dtype="float32")
    with torch.no_grad():
        assert gap(again(batch), trainable(batch)) <= 1e-5


class Shapes:
    """Files of which only names and shapes are known."""

    origin = "shapes"

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.shapes = {name: tuple(value.shape) for name, value in tensors.items()}

    def read(self, *_: object) -> Tensor:
        raise AssertionError("nothing is read here")

    read_into = read


def one_of_each_kind() -> list[str]:
    """Names of listed networks: of each family the first, and the gated ones."""
    found: dict[tuple[str, str], str] = {}
    for name, place in BACKBONES.items():
        release = resolve_name(place)
        facts = release.architecture if isinstance(release, Release) else release
        found.setdefault((facts.family, getattr(facts, "mlp", "")), name)
    return list(found.values())


@pytest.mark.parametrize("name", one_of_each_kind())
def test_names_of_every_family_can_be_read_again(name: str) -> None:
    release = resolve_name(BACKBONES[name])
    facts = release.architecture if isinstance(release, Release) else release
    family = find_family(facts.family)
    network = build_empty(facts, family)
    weights = weights_of(network)
    written: Any = Shapes(hub_tensors(weights, network, facts, family))
    shapes = {live: tuple(value.shape) for live, value in weights.items()}
    found = match(family, shapes, written)
    check_shapes(found, shapes, written)
    assert found.keys.keys() == shapes.keys()
    assert found.dialect is family.dialects[0]


def test_rounded_periods_of_metas_checkpoints_go_along(tmp_path: Path) -> None:
    trainable = fresh("dinov3")
    for name, buffer in trainable.network.named_buffers():
        if name.endswith("inv_freq"):
            buffer.mul_(1.003)
    batch = pixels(trainable)
    facts, family = trainable.architecture, trainable.family
    assert family is not None
    adapted = adapt(trainable, "linear-online")
    adapted.export(tmp_path / "model.safetensors")
    assert PERIODS in load_file(tmp_path / "model.safetensors")
    again = load_network(SafetensorsFiles([tmp_path / "model.safetensors"]), facts, family, "hf", OPTIONS)
    with torch.no_grad():
        assert gap(again(batch), trainable(batch)) <= 1e-6
    assert gap(load("dinov3")(batch), again(batch)) > 1e-6


def test_another_epsilon_goes_into_the_variance(tmp_path: Path) -> None:
    """Google's MobileNetV2 under torchvision's names has norms folded into biases and its own epsilon."""
    plain = load("mobilenet").network.state_dict()
    save_file(
        {name: value.clone() for name, value in plain.items() if value.is_floating_point()}, tmp_path / "tv.safetensors"
    )
    facts, family = FACTS["mobilenet"], find_family("mobilenet_v2")
    backbone = load_network(SafetensorsFiles([tmp_path / "tv.safetensors"]), facts, family, "hf", OPTIONS)
    assert isinstance(backbone, NetworkBackbone)
    trainable = make_trainable(backbone)
    assert {module.eps for module in trainable.modules() if isinstance(module, nn.BatchNorm2d)} == {1e-5}
    adapted = adapt(trainable, "full", AdapterConfig(batch_norm="train"))
    perturb(adapted, 0.02)
    trainable.train()
    for seed in range(3):
        trainable(pixels(trainable, seed=seed))
    trainable.eval()
    adapted.export(tmp_path / "hub.safetensors")
    again = load_network(SafetensorsFiles([tmp_path / "hub.safetensors"]), facts, family, "hf", OPTIONS)
    batch = pixels(trainable)
    with torch.no_grad():
        assert gap(again(batch), trainable(batch)) <= 1e-5


@pytest.mark.realdata
def test_googles_own_weights_come_back_under_the_hubs_names(shared_data: Path, tmp_path: Path) -> None:
    published = shared_data / "weights" / "mobilenet_v2_imagenet_fp16.safetensors"
    backbone = describe("mobilenetv2", weights=published).load(device="cpu", compute_dtype="float32")
    trainable = make_trainable(backbone)
    adapted = adapt(trainable, "lora", features="cls")
    perturb(adapted, 0.005)
    adapted.export(tmp_path / "tuned.safetensors")
    again = describe("mobilenetv2", weights=tmp_path / "tuned.safetensors")
    batch = pixels(trainable)
    with torch.no_grad():
        expected = trainable(batch)
    assert gap(again.load(device="cpu", compute_dtype="float32")(batch), expected) <= 1e-5


def test_pieces_must_be_whole() -> None:
    backbone = load("dinov2-swiglu")
    weights = weights_of(backbone.network)
    del weights["layernorm.bias"]
    with pytest.raises(WeightsError, match=r"1 weights of dinov2 are not given \(layernorm.bias"):
        hub_tensors(weights, backbone.network, backbone.architecture, backbone.family)


@pytest.mark.parametrize("method", METHODS)
def test_what_training_changed_is_saved_alone(method: str, tmp_path: Path) -> None:
    label = "mobilenet" if method in ("full", "last-k") else "dinov2"
    trainable = fresh(label)
    adapted = adapt(trainable, method)
    perturb(adapted, 0.02)
    if method == "full":
        trainable.train()(pixels(trainable))
    trainable.eval()
    adapted.save(tmp_path / "state.safetensors")
    assert set(load_file(tmp_path / "state.safetensors")) == set(adapted.state())
    other = adapt(fresh(label), method)
    other.load(tmp_path / "state.safetensors")
    batch = pixels(trainable)
    with torch.no_grad():
        assert same(other.trainable.eval()(batch), trainable(batch))


def test_saved_weights_must_be_of_the_same_kind(tmp_path: Path) -> None:
    adapted = adapt(fresh("dinov2"), "lora", AdapterConfig(r=2))
    adapted.save(tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match=r'saved for lora {.*"r": 2.*and this is lora {.*"r": 3'):
        adapt(fresh("dinov2"), "lora", AdapterConfig(r=3)).load(tmp_path / "a.safetensors")
    write_weights(tmp_path / "b.safetensors", {"x": torch.zeros(1)})
    with pytest.raises(WeightsError, match="saved for something else than featstore's adapters"):
        adapted.load(tmp_path / "b.safetensors")
    with pytest.raises(WeightsError, match=r"of another network or method than lora: 12 tensors do not fit"):
        adapted.load_state({})


def test_nothing_reaches_for_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*arguments: object) -> None:
        raise AssertionError(f"a connection to {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted = adapt(fresh("dinov2"), "lora")
        perturb(adapted)
        with adapted.merged():
            adapted.trainable(pixels(adapted.trainable))
