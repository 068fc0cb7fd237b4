"""Forms in which weights are published: torch's files, whole models with heads, folders of timm's and open_clip's."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import torch
import transformers
from backbone_conformance import images, largest_difference, load
from hub_server import COMMIT, serving
from huggingface_hub import constants, snapshot_download
from safetensors.torch import load_file, save
from torch import Tensor

from featstore.backbones import BACKBONES, describe
from featstore.backbones.family import Release
from featstore.backbones.fetching import fetch_model
from featstore.backbones.tiny import FOLDER as TINY_FOLDER
from featstore.errors import MissingWeightsError, WeightsError

REPO = "lab/tiny-net"
JSON = {path.name: path.read_bytes() for path in TINY_FOLDER.glob("*.json")}
TENSORS = load_file(TINY_FOLDER / "model.safetensors")
RELEASES = {
    name: entry
    for name, place in BACKBONES.items()
    if isinstance(entry := resolve_name(place), Release) and entry.files
}


@pytest.fixture(autouse=True)
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return cache


def torch_bytes(tensors: dict[str, Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()


def torch_files(shards: int) -> dict[str, bytes]:
    """The tiny network as torch's file, or as shards with their index."""
    if shards == 1:
        return {"pytorch_model.bin": torch_bytes(TENSORS)}
    names = [f"pytorch_model-{i:05d}-of-{shards:05d}.bin" for i in range(1, shards + 1)]
    places = {key: names[i % shards] for i, key in enumerate(TENSORS)}
    files = {name: torch_bytes({key: TENSORS[key] for key in places if places[key] == name}) for name in names}
    return {**files, "pytorch_model.bin.index.json": json.dumps({"weight_map": places}).encode()}


# Torch's files on the hub


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("fetched", [True, False])
def test_a_repository_with_torch_files_only(shards: int, fetched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {**JSON, **torch_files(shards)}
    others = {"training_args.bin": b"x", "flax_model.msgpack": b"x", "tf_model.h5": b"x"}
    with serving(REPO, {**wanted, **others}, monkeypatch) as server:
        if fetched:
            found = fetch_model(f"hf:{REPO}")
            assert (set(found.files), found.checked) == (set(wanted), True)
        source = describe(f"hf:{REPO}")
        gets = [path for method, path in server.asked if method == "GET" and "/resolve/" in path]
    assert sorted(path.rpartition("/")[2] for path in gets) == sorted(wanted)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert describe(f"hf:{REPO}", revision=COMMIT).identity == source.identity
    assert set(fetch_model(f"hf:{REPO}").files) == set(wanted)
    backbone, pixels = load(source), images(load(describe("tiny")), 2, 3)
    assert largest_difference(backbone(pixels), load(describe("tiny"))(pixels)) == 0


@pytest.mark.parametrize("shards", [1, 2])
def test_torch_files_that_another_program_fetched(shards: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the hub has both forms, and the cache the older one."""
    safetensors = {"model.safetensors": (TINY_FOLDER / "model.safetensors").read_bytes()}
    with serving(REPO, {**JSON, **torch_files(shards), **safetensors}, monkeypatch):
        snapshot_download(REPO, allow_patterns=["*.json", "pytorch_model*"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    source = describe(f"hf:{REPO}")
    assert source.weights["digest"] != describe("tiny").weights["digest"]
    pixels = images(load(source), 2, 2)
    assert largest_difference(load(source)(pixels), load(describe("tiny"))(pixels)) == 0


def test_a_shard_that_is_not_there(tmp_path: Path) -> None:
    for name, content in {**JSON, **torch_files(2)}.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(
        MissingWeightsError,
        match=r"1 of 2 files that pytorch_model\.bin\.index\.json names are missing "
        r"\(pytorch_model-00002-of-00002\.bin\); fetch the folder again",
    ):
        describe(f"hf:{tmp_path}")


# Releases whose folders are not in transformers' format

CLIP_HUGE = {
    "model_type": "clip",
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "patch_size": 14,
        "hidden_act": "gelu",
    },
}
PROCESSOR = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}


def published(name: str) -> dict[str, bytes]:
    """A repository of the release's layout; its weights are one number."""
    weights = RELEASES[name].files[0]
    number = {"x": torch.ones(1)}
    files: dict[str, bytes] = {weights: save(number) if weights.endswith(".safetensors") else torch_bytes(number)}
    beside: dict[str, Any] = {}
    if name == "openclip-huge":
        beside = {"config.json": CLIP_HUGE, "preprocessor_config.json": PROCESSOR}
        files |= {"open_clip_model.safetensors": b"x", "pytorch_model.bin": b"x"}
    elif name == "biomedclip":
        beside = {"open_clip_config.json": {"model_cfg": {}}}
    elif name == "uni":
        beside = {"config.json": {"architecture": "vit_large_patch16_224", "model_args": {}}}
    elif name != "conch":
        beside = {"config.json": {"architecture": name, "pretrained_cfg": {}}}
        files |= {"pytorch_model.bin": b"x"}
    return {**files, **{key: json.dumps(value).encode() for key, value in beside.items()}}


@pytest.mark.parametrize("name", RELEASES)
def test_the_printed_line_takes_the_fetched_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = published(name)
    with serving(RELEASES[name].hub_id, files, monkeypatch):
        found = fetch_model(name)
    assert RELEASES[name].files[0] in found.files
    assert set(found.files) == {RELEASES[name].files[0], *(file for file in files if file.endswith(".json"))}
    assert found.copied_lines[1].endswith(f"--model {name} --weights DIR")
    copied = Path(shutil.copytree(found.folder, tmp_path / "copied"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cached, local = describe(name, revision=COMMIT), describe(name, weights=copied)
    assert local.identity == cached.identity
    assert local.processor == cached.processor == (PROCESSOR if name == "openclip-huge" else None)
    assert describe(name, weights=copied / RELEASES[name].files[0]).weights == local.weights


def test_a_config_of_transformers_must_still_be_that_of_the_name(tmp_path: Path) -> None:
    for file, content in published("openclip-huge").items():
        (tmp_path / file).write_bytes(content)
    (tmp_path / "config.json").write_text(json.dumps({**CLIP_HUGE, "vision_config": {}}))
    with pytest.raises(WeightsError, match=r"config\.json is not that of openclip-huge: embed_dim 768 instead of 1280"):
        describe("openclip-huge", weights=tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(WeightsError, match=r"config\.json must hold a JSON object, it holds list"):
        describe("openclip-huge", weights=tmp_path)


def test_a_folder_of_timms_loads(tmp_path: Path) -> None:
    drawn = load(describe("resnet50", random_weights=0))
    content = {**drawn.network.state_dict(), "fc.weight": torch.ones(2, 2048), "fc.bias": torch.ones(2)}
    (tmp_path / "model.safetensors").write_bytes(save(content))
    config = {"architecture": "resnet50", "num_classes": 1000, "pretrained_cfg": {"tag": "tv2_in1k"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    pixels = images(drawn, 2, 3)
    assert largest_difference(load(describe("resnet50", weights=tmp_path))(pixels), drawn(pixels)) == 0


# Whole models

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 48,
    "patch_size": 16,
}
WHOLE: dict[str, Callable[[], Any]] = {
    "dinov2": lambda: transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**SMALL)),
    "dinov2_with_registers": lambda: transformers.Dinov2WithRegistersForImageClassification(
        transformers.Dinov2WithRegistersConfig(**SMALL)
    ),
    "vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, intermediate_size=64)),
    "simmim": lambda: transformers.ViTForMaskedImageModeling(transformers.ViTConfig(**SMALL, intermediate_size=64)),
    "mae": lambda: transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**SMALL, intermediate_size=64)),
    "convnext": lambda: transformers.ConvNextForImageClassification(
        transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)
    ),
    "clip": lambda: transformers.CLIPForImageClassification(
        transformers.CLIPConfig(vision_config={**SMALL, "intermediate_size": 64})
    ),
}


def saved(label: str, folder: Path) -> Any:
    """The whole model, saved in a folder."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = WHOLE[label]().eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("label", ["dinov2", "dinov2_with_registers"])
def test_dinov2_with_a_head(label: str, tmp_path: Path) -> None:
    model = saved(label, tmp_path)
    assert any(name.startswith(f"{label}.") for name in load_file(tmp_path / "model.safetensors"))
    backbone = load(describe(f"hf:{tmp_path}"))
    pixels = images(backbone, 3, 3)
    with torch.inference_mode():
        expected = getattr(model, label)(pixels).last_hidden_state
    tokens = backbone(pixels)
    assert torch.allclose(tokens.cls, expected[:, 0], rtol=0, atol=1e-5)
    assert torch.allclose(tokens.patches, expected[:, -9:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("label", WHOLE)
def test_what_stands_beside_the_network_must_be_known(label: str, tmp_path: Path) -> None:
    saved(label, tmp_path)
    load(describe(f"hf:{tmp_path}"))
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").write_bytes(save({**tensors, "adapter.weight": torch.ones(2)}))
    with pytest.raises(WeightsError, match=r"does not fit the model: tensors 1 left over \(adapter\.weight\)"):
        load(describe(f"hf:{tmp_path}"))


def test_masked_autoencoder_for_a_vision_transformer(tmp_path: Path) -> None:
    """Their encoders have the same names and shapes: MAE's decoder tells them apart."""
    saved("mae", tmp_path / "mae")
    saved("vit", tmp_path / "vit")
    shutil.copy(tmp_path / "mae" / "model.safetensors", tmp_path / "vit")
    with pytest.raises(WeightsError, match=r"tensors \d+ left over \(decoder\.decoder_embed\.bias"):
        load(describe(f"hf:{tmp_path / 'vit'}"))
    saved("vit", tmp_path / "vit")
    shutil.copy(tmp_path / "vit" / "model.safetensors", tmp_path / "mae")
    with pytest.raises(WeightsError, match=r"tensors 2 left over \(classifier\.bias, classifier\.weight\)"):
        load(describe(f"hf:{tmp_path / 'mae'}"))


# What a preprocessor_config.json says of numbers


def normalisation(folder: Path, processor: dict[str, Any] | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) of the folder's network with that file, or without one."""
    path = folder / "preprocessor_config.json"
    path.unlink(missing_ok=True)
    if processor is not None:
        path.write_text(json.dumps(processor))
    facts = describe(f"hf:{folder}", random_weights=0).architecture
    return facts.mean, facts.std


@pytest.fixture
def config_only(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    return tmp_path


HALF = (0.5, 0.5, 0.5)


def test_a_processor_that_does_not_normalise(config_only: Path) -> None:
    neutral = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    stated = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    assert normalisation(config_only, {"do_normalize": False, **stated}) == neutral
    assert normalisation(config_only, {"do_normalize": False, "image_mean": None, "image_std": None}) == neutral
    assert normalisation(config_only, {"do_normalize": False}) == neutral
    assert normalisation(config_only, {"do_normalize": True, **stated})[0] == (0.1, 0.2, 0.3)
    assert normalisation(config_only, {"do_normalize": None, **stated})[0] == (0.1, 0.2, 0.3)
    with pytest.raises(WeightsError, match="image_mean = None; it must be three numbers"):
        normalisation(config_only, {"do_normalize": True, "image_mean": None, "image_std": None})


@pytest.mark.parametrize(
    "said",
    [
        {"rescale_factor": 1 / 127.5},
        {"rescale_factor": 1.0},
        {"rescale_factor": 1 / 256, "do_normalize": False},
        {"do_rescale": False},
        {"rescale_factor": 1 / 127.5, "image_mean": None, "image_std": None},
    ],
)
def test_another_scale_gives_the_numbers_of_transformers(said: dict[str, Any], config_only: Path) -> None:
    processor = {"do_resize": False, "image_mean": [0.7, 0.8, 0.9], "image_std": [0.4, 0.5, 0.6], **said}
    if processor["image_mean"] is None:
        del processor["image_mean"], processor["image_std"]
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in normalisation(config_only, processor))
    picture = torch.arange(3 * 16 * 16).view(3, 16, 16) % 256
    theirs = transformers.models.vit.image_processing_pil_vit.ViTImageProcessorPil(**processor)
    expected = torch.from_numpy(theirs(picture.byte().numpy(), input_data_format="channels_first").pixel_values[0])
    assert torch.allclose((picture / 255 - mean) / std, expected, rtol=1e-5, atol=1e-5)


def test_a_scale_that_is_1_over_255(config_only: Path) -> None:
    for factor in (1 / 255, 0.00392156862745098, 0.003921569, None):
        assert normalisation(config_only, {"rescale_factor": factor}) == (HALF, HALF)
    for wrong in (0, -1, "1/255", True):
        with pytest.raises(WeightsError, match=r"says rescale_factor = .*; it must be a number above 0"):
            normalisation(config_only, {"rescale_factor": wrong})


@pytest.mark.parametrize(
    ("model_type", "module", "processor"),
    [
        ("vit", "vit", "ViTImageProcessorPil"),
        ("vit_mae", "vit", "ViTImageProcessorPil"),
        ("vit_msn", "vit", "ViTImageProcessorPil"),
        ("convnext", "convnext", "ConvNextImageProcessorPil"),
        ("resnet", "convnext", "ConvNextImageProcessorPil"),
        ("mobilenet_v2", "mobilenet_v2", "MobileNetV2ImageProcessorPil"),
        ("clip", "clip", "CLIPImageProcessorPil"),
        ("sam", "sam", "SamImageProcessorPil"),
    ],
)
def test_without_a_processor_that_of_the_type_counts(
    model_type: str, module: str, processor: str, tmp_path: Path
) -> None:
    theirs = resolve_name(f"transformers.models.{module}.image_processing_pil_{module}:{processor}")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert normalisation(tmp_path, None) == (tuple(theirs.image_mean), tuple(theirs.image_std))
