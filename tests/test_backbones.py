"""Backbones: names, facts, tokens against transformers' own forward pass, random weights, devices, every error."""

import contextlib
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from backbone_conformance import CHECKS, SMALL, TOLERANCE, images, largest_difference, load, make_network, save_small
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from featstore.backbones import BACKBONES, canonical_name, describe, devices
from featstore.backbones.dinov2 import _write as write_dinov2
from featstore.backbones.family import ConfigFields, Release
from featstore.backbones.network import build_empty
from featstore.backbones.source import COMPUTE_DTYPES, FAMILIES, find_family, read_architecture
from featstore.backbones.tiny import FOLDER as TINY_FOLDER
from featstore.backbones.tokens import Backbone, Tokens
from featstore.errors import (
    ConfigError,
    DeviceError,
    MissingWeightsError,
    UnknownNameError,
    WeightsError,
)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_small(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="session")
def backbones(folders: dict[str, Path]) -> dict[str, Backbone]:
    """Everything the conformance checks run over, loaded once."""
    loaded = {label: load(describe(f"hf:{folder}")) for label, folder in folders.items()}
    loaded |= {f"{label}-random": load(describe(f"hf:{folders[label]}", random_weights=0)) for label in SMALL}
    loaded |= {name: load(describe(name)) for name in ("tiny", "tiny-random")}
    return loaded


CONFORMING = (*SMALL, *(f"{label}-random" for label in SMALL), "tiny", "tiny-random")


@pytest.mark.parametrize("name", CONFORMING)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_conformance(check: Callable[[Backbone], None], name: str, backbones: dict[str, Backbone]) -> None:
    check(backbones[name])


# Parity with transformers


@pytest.mark.parametrize("label", SMALL)
@pytest.mark.parametrize(("rows", "columns"), [(3, 3), (2, 5), (6, 4)], ids=["native", "wide", "tall"])
def test_tokens_equal_transformers(label: str, rows: int, columns: int, backbones: dict[str, Backbone]) -> None:
    network, backbone = make_network(label), backbones[label]
    pixels = images(backbone, rows, columns, count=3)
    with torch.no_grad():
        output = network(pixels, output_hidden_states=True)
        states = [(network.norm if hasattr(network, "norm") else network.layernorm)(s) for s in output.hidden_states]
    tokens = backbone(pixels, layers=(1, 2, -1))
    registers = getattr(network.config, "num_register_tokens", 0)
    assert backbone.architecture.num_registers == registers
    for sequence, found in ((output.last_hidden_state, tokens), *((states[k], tokens.layers[k]) for k in (1, 2, 3))):
        assert torch.allclose(found.cls, sequence[:, 0], rtol=0, atol=TOLERANCE)
        assert torch.allclose(found.patches, sequence[:, -rows * columns :], rtol=0, atol=TOLERANCE)
        if registers:
            assert torch.allclose(found.registers, sequence[:, 1 : 1 + registers], rtol=0, atol=TOLERANCE)
    assert torch.allclose(tokens.cls, output.pooler_output, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("label", SMALL)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_equals_transformers(label: str, dtype: str, folders: dict[str, Path]) -> None:
    backbone = load(describe(f"hf:{folders[label]}"), dtype)
    network = getattr(transformers, SMALL[label][0]).from_pretrained(folders[label], dtype=getattr(torch, dtype))
    pixels = images(backbone, 2, 3)
    with torch.no_grad():
        expected = network(pixels.to(getattr(torch, dtype))).last_hidden_state
    tokens = backbone(pixels)
    assert tokens.cls.dtype == getattr(torch, dtype)
    assert torch.equal(tokens.cls, expected[:, 0])
    assert torch.equal(tokens.patches, expected[:, -6:])


def test_attention_is_the_one_asked_for(folders: dict[str, Path]) -> None:
    for source in (describe(f"hf:{folders['dinov3']}"), describe("tiny-random")):
        loaded = {attention: load(source, attention=attention) for attention in ("sdpa", "eager")}
        for attention, backbone in loaded.items():
            assert backbone.network.config._attn_implementation == attention
        pixels = images(loaded["sdpa"], 3, 2)
        assert largest_difference(loaded["sdpa"](pixels), loaded["eager"](pixels)) <= TOLERANCE


# Names and facts


def test_names_and_aliases() -> None:
    expected = {
        "facebook/dinov2-base": "dinov2-base",
        "facebook/dinov2-with-registers-base": "dinov2-base-reg",
        "facebook/dinov3-vitb16-pretrain-lvd1689m": "dinov3-base",
        "facebook/dinov3-vits16plus-pretrain-lvd1689m": "dinov3-small-plus",
        "facebook/dinov3-vith16plus-pretrain-lvd1689m": "dinov3-huge-plus",
        "facebook/dinov3-vit7b16-pretrain-lvd1689m": "dinov3-7b",
        "dinov2_vits14": "dinov2-small",
        "dinov2_vitb14_reg": "dinov2-base-reg",
        "dinov2_vitg14": "dinov2-giant",
        "dinov3_vitl16": "dinov3-large",
        "dinov3_vit7b16": "dinov3-7b",
        "tiny": "tiny",
    }
    assert {alias: canonical_name(alias) for alias in expected} == expected
    releases = [resolve_name(place) for place in BACKBONES.values()]
    ids = [
        text
        for release in releases
        if isinstance(release, Release)
        for text in (release.hub_id, release.meta_name, *release.aliases)
        if text
    ]
    assert len(ids) == len(set(ids))
    for alias in ids:
        assert describe(alias, random_weights=0).model == canonical_name(alias)
        assert describe(alias, random_weights=0).name == f"{canonical_name(alias)}-random"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            "dinov4",
            r"unknown backbone 'dinov4'; did you mean .*\? `featstore models` lists all; or give hf:DIR_OR_ID",
        ),
        ("dinov3-bse", r"did you mean dinov3-base"),
        ("facebook/dinov2-bas", r"did you mean facebook/dinov2-base"),
        ("", r"unknown backbone ''; known: "),
    ],
)
def test_unknown_name(model: str, message: str) -> None:
    with pytest.raises(UnknownNameError, match=message):
        describe(model)


@pytest.mark.parametrize("name", BACKBONES)
def test_facts_equal_the_network(name: str) -> None:
    facts = describe(name, random_weights=None if name == "tiny-random" else 0).architecture
    network = build_empty(facts, find_family(facts.family))
    assert facts.num_parameters() == sum(parameter.numel() for parameter in network.parameters())
    assert all(parameter.is_meta for parameter in network.parameters())
    assert not any(buffer.is_meta for buffer in network.buffers())
    assert facts.gflops(facts.native_size, facts.native_size) > 0


def test_parameters_and_gflops_of_the_papers() -> None:
    # Millions of parameters as published, and 2 x multiply-adds per image counted by torch's FlopCounterMode.
    published = {
        "dinov2-small": (22.1, 12.3),
        "dinov2-base": (86.6, 46.3),
        "dinov2-large": (304.4, 162),
        "dinov2-giant": (1136.5, 599),
        "dinov3-small": (21.6, 9.4),
        "dinov3-small-plus": (28.7, 12.2),
        "dinov3-base": (85.7, 35.9),
        "dinov3-large": (303.1, 126),
        "dinov3-huge-plus": (840.6, 344),
        "dinov3-7b": (6716.0, 2725),
    }
    for name, (millions, gflops) in published.items():
        facts = describe(name, random_weights=0).architecture
        assert facts.num_parameters() / 1e6 == pytest.approx(millions, rel=5e-3)
        assert facts.gflops(224, 224) == pytest.approx(gflops, rel=1e-2)


READ = [name for name in FAMILIES if find_family(name).read is not None]


@pytest.mark.parametrize("model_type", READ)
def test_absent_config_fields_have_transformers_defaults(model_type: str) -> None:
    defaults = transformers.CONFIG_MAPPING[model_type]().to_dict()
    assert read_architecture({"model_type": model_type}, None) == read_architecture(defaults, None)


@pytest.mark.parametrize("name", BACKBONES)
def test_config_round_trip(name: str) -> None:
    facts = describe(name, random_weights=None if name == "tiny-random" else 0).architecture
    assert json.loads(json.dumps(facts.as_dict())) == facts.as_dict()
    write = find_family(facts.family).write
    if write is not None and facts.family in READ:
        config = {"model_type": facts.family, **write(facts)}
        found = read_architecture(json.loads(json.dumps(config)), None)
        # What a config.json does not say: the processor's numbers, what was counted, what the papers take.
        same = replace(found, mean=facts.mean, std=facts.std, counts=facts.counts, final_norm=facts.final_norm)
        assert same == facts


def test_sizes_in_pairs_are_read() -> None:
    config = {"model_type": "dinov3_vit", "patch_size": [16, 16], "image_size": [48, 48]}
    assert read_architecture(config, None).patch_size == 16


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "siglip"}, r"model_type = 'siglip'; supported: dinov2, .*dinov3_vit"),
        ({"model_type": ["dinov2"]}, r"model_type = \['dinov2'\]; supported"),
        ({"model_type": "vgg"}, r"model_type = 'vgg', whose folders are not read; give the model's name"),
        ({}, r"model_type = None; supported"),
    ],
)
def test_unsupported_model_type(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnknownNameError, match=message):
        describe(f"hf:{tmp_path}")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_channels": 1}, r"num_channels = 1, which is not supported; it must be 3"),
        ({"hidden_act": "relu"}, r"hidden_act = 'relu', which is not supported; it must be 'gelu'"),
        ({"use_gated_mlp": True}, r"hidden_act = 'gelu', which is not supported; it must be 'silu'"),
        ({"patch_size": [16, 8]}, r"patch_size = \[16, 8\]; it must be one whole number >= 1"),
        ({"hidden_size": "many"}, r"hidden_size = 'many'; it must be one whole number"),
        ({"num_register_tokens": -1}, r"num_register_tokens = -1; it must be one whole number >= 0"),
        ({"rope_theta": 0}, r"rope_theta = 0; it must be a number above 0"),
        ({"query_bias": "yes"}, r"query_bias = 'yes'; it must be true or false"),
    ],
)
def test_config_that_cannot_be_used(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        read_architecture({"model_type": "dinov3_vit", **fields}, None)


def test_swiglu_width_without_ratio() -> None:
    facts = describe("dinov2-giant", random_weights=0).architecture
    with pytest.raises(WeightsError, match=r"mlp_dim 4099 is no width of a swiglu block of 1536"):
        write_dinov2(replace(facts, mlp_dim=4099))


def test_config_fields_keep_to_known_ones() -> None:
    assert ConfigFields({"unknown": 1, "known": 2}, {"known": 3}).values == {"known": 2}


@given(height=st.integers(0, 300), width=st.integers(0, 300), patch=st.integers(1, 40))
@settings(deadline=None, max_examples=200)
def test_size_check_agrees_with_division(height: int, width: int, patch: int) -> None:
    facts = replace(describe("tiny-random").architecture, patch_size=patch)
    if height % patch == 0 == width % patch and height and width:
        facts.check_size(height, width)
    else:
        with pytest.raises(ConfigError, match=r"height and width must be multiples") as caught:
            facts.check_size(height, width)
        for proposal in str(caught.value).partition("use ")[2].split(" or "):
            facts.check_size(*(int(side) for side in proposal.split(" x ")))


@given(layers=st.lists(st.sampled_from([-4, -3, -2, -1, 1, 2, 3, 4])))
def test_block_numbers(layers: list[int]) -> None:
    numbers = describe("tiny-random").architecture.block_numbers(layers)
    names = ["zero", "first", "second", "third", "fourth"]
    assert list(dict.fromkeys((names[1:])[layer] if layer < 0 else names[layer] for layer in layers)) == [
        names[number] for number in numbers
    ]


# Options


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        ("tiny", {"weights": Path("x"), "random_weights": 0}, ConfigError, "exclude each other"),
        ("tiny", {"random_weights": -1}, ConfigError, "must be 0 or more; got -1"),
        ("dinov2-small", {"revision": "main", "random_weights": 0}, ConfigError, "a revision is one of the hub's"),
        ("dinov2-small", {"revision": "main", "weights": Path("x")}, ConfigError, "a revision is one of the hub's"),
        ("tiny", {"revision": "main"}, ConfigError, "tiny comes with the package and has no revisions"),
        ("tiny-random", {"revision": "main"}, ConfigError, "tiny-random comes with the package"),
        ("tiny-random", {"weights": Path("x")}, ConfigError, "random weights of seed 0; for others give the model"),
        ("tiny-random", {"random_weights": 1}, ConfigError, "random weights of seed 0; for others give the model"),
        ("os:getcwd", {"norm": "none"}, ConfigError, "is its own network: --pos-interp and --norm are not for it"),
        ("tiny", {"norm": "raw"}, ConfigError, "--norm must be one of final, none; got 'raw'"),
        ("resnet50", {"norm": "none", "random_weights": 0}, ConfigError, "resnet has no final norm over tokens"),
        ("dinov3-small", {"pos_interp": "meta", "random_weights": 0}, ConfigError, "--pos-interp meta: dinov3_vit"),
        (
            "dinov2-small",
            {"pos_interp": "timm", "random_weights": 0},
            ConfigError,
            "must be one of hf, meta; got 'timm'",
        ),
        (f"hf:{TINY_FOLDER}", {"weights": Path("x")}, ConfigError, "already; leave --weights out or give the model's"),
        (f"hf:{TINY_FOLDER}", {"weights": TINY_FOLDER}, ConfigError, f"give --model hf:{TINY_FOLDER} in place of both"),
        (f"hf:{TINY_FOLDER}", {"revision": "main"}, ConfigError, "is a folder on this machine and has no revisions"),
        (
            f"hf:{TINY_FOLDER}/config.json",
            {},
            ConfigError,
            "does not say what model it is; give the name and --weights",
        ),
        ("hf:/no/such/folder", {}, MissingWeightsError, "hf:/no/such/folder: there is no such folder"),
        ("os:getcwd", {"random_weights": 0}, ConfigError, "brings its own weights; leave weights, random weights"),
    ],
)
def test_options_that_do_not_go_together(
    model: str, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        describe(model, **options)


def test_load_options() -> None:
    source = describe("tiny-random")
    assert tuple(devices.DTYPES) == COMPUTE_DTYPES
    with pytest.raises(ConfigError, match="compute dtype must be one of float32, bfloat16, float16; got 'int8'"):
        source.load(device="cpu", compute_dtype="int8")
    with pytest.raises(ConfigError, match="compute dtype must be one of float32, bfloat16, float16; got 'half'"):
        devices.resolve_dtype("half")
    with pytest.raises(ConfigError, match="attention must be one of sdpa, eager, xformers, flash; got 'fast'"):
        source.load(device="cpu", compute_dtype="float32", attention="fast")
    for option, value, known in (
        ("memory", "disk", "auto, resident, stream, shard"),
        ("weight_dtype", "int4", "same, int8, fp8"),
        ("compile", "yes", "off, on, graphs"),
    ):
        with pytest.raises(ConfigError, match=f"{option.replace('_', ' ')} must be one of {known}; got '{value}'"):
            source.load(device="cpu", compute_dtype="float32", **{option: value})
    for name in ("tpu", "cpu:1", "cuda:", "cuda:x", "cuda:-1", ""):
        with pytest.raises(ConfigError, match=f"device must be cpu, cuda or cuda:N; got '{name}'"):
            source.load(device=name, compute_dtype="float32")


def test_absent_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match=r"device cuda asked, but torch sees 0 CUDA devices .* use --device cpu"):
        describe("tiny").load(device="cuda", compute_dtype="float32")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices.resolve_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(DeviceError, match="device cuda:2 asked, but torch sees 2 CUDA devices"):
        devices.resolve_device("cuda:2")


def test_gpu_without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**30))
    place = torch.device("cuda", 0)
    with pytest.raises(DeviceError, match="Old GPU has no bfloat16; use --compute-dtype float32"):
        devices.check_dtype(place, torch.bfloat16)
    devices.check_dtype(place, torch.float16)
    with pytest.raises(DeviceError, match=r"need 4\.0 GB on cuda:0 in float32, 1\.1 GB are free"):
        devices.choose_memory("auto", 4 * 10**9, None, place, torch.float32)


def test_too_little_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table = tmp_path / "meminfo"
    table.write_text("MemTotal:       99999999 kB\nMemAvailable:    9000000 kB\n")
    monkeypatch.setattr(devices, "MEMORY_TABLE", table)
    monkeypatch.setattr(devices, "GROUP_TABLE", tmp_path / "absent")
    source = describe("dinov3-7b", random_weights=0)
    with pytest.raises(
        DeviceError,
        match=r"26\.9 GB on cpu in float32, 9\.2 GB are free; use --memory stream, or try --compute-dtype bfloat16",
    ):
        source.load(device="cpu", compute_dtype="float32", memory="resident")
    with pytest.raises(
        DeviceError, match=r"13\.4 GB on cpu in bfloat16, 9\.2 GB are free; use --memory stream, or use"
    ):
        source.load(device="cpu", compute_dtype="bfloat16", memory="resident")
    table.write_text("MemTotal: 1 kB\nMemAvailable: 1000000 kB\n")
    with pytest.raises(
        DeviceError, match=r"26\.9 GB on cpu in float32, 1\.0 GB are free; try --compute-dtype bfloat16"
    ):
        source.load(device="cpu", compute_dtype="float32")
    table.write_text("MemTotal: 1 kB\nMemAvailable: 10 kB\n")
    with pytest.raises(DeviceError, match=r"need 0\.0 GB on cpu in float32"):
        describe("tiny").load(device="cpu", compute_dtype="float32")
    table.write_text("MemTotal: 1 kB\n")
    assert devices.free_bytes(torch.device("cpu")) is None
    monkeypatch.setattr(devices, "MEMORY_TABLE", tmp_path / "absent")
    assert load(describe("tiny-random")).device.type == "cpu"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_equals_cpu() -> None:
    source = describe("dinov3-small", random_weights=0)
    here, there = load(source), source.load(device="cuda", compute_dtype="float32")
    pixels = images(here, 14, 14)
    tokens = there(pixels.cuda())
    moved = Tokens(cls=tokens.cls.cpu(), registers=tokens.registers.cpu(), patches=tokens.patches.cpu())
    assert largest_difference(moved, here(pixels)) <= 1e-4


# tiny


def test_tiny_is_small_and_has_the_digest_of_its_card() -> None:
    source = describe("tiny")
    assert source.weights["kind"] == "embedded"
    assert source.weights["digest"] in (TINY_FOLDER / "README.md").read_text()
    assert f"{source.architecture.num_parameters():,} parameters" in (TINY_FOLDER / "README.md").read_text()
    assert sum(file.stat().st_size for file in TINY_FOLDER.iterdir()) < 4_000_000
    assert all(tensor.dtype == torch.float16 for tensor in load_file(TINY_FOLDER / "model.safetensors").values())
    assert load(source).dtype == torch.float32


@pytest.mark.realdata
def test_tiny_equals_its_known_answers(shared_data: Path) -> None:
    from PIL import Image

    folder = shared_data / "weights" / "dinov2-tiny-distilled"
    known = np.load(folder / "expected.npz")
    mean, std = (np.array(v, np.float32)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    original, embedded = load(describe("tiny", weights=folder / "hf")), load(describe("tiny"))
    for size in (98, 112, 224):
        grey = [
            np.asarray(Image.open(shared_data / str(path)).convert("L").resize((size, size), Image.Resampling.BICUBIC))
            for path in known["paths"]
        ]
        pixels = torch.from_numpy(np.stack([(g[None] / np.float32(255) - mean) / std for g in grey]).astype(np.float32))
        if size == 98:
            assert np.array_equal(pixels.numpy(), known["input_98"])
        # 0.0019 is what float16 rounding of the weights costs, as the card says.
        for backbone, tolerance in ((original, 1e-5), (embedded, 2e-3)):
            tokens = backbone(pixels)
            assert np.abs(tokens.cls.numpy() - known[f"cls_{size}"]).max() <= tolerance
            assert np.abs(tokens.patches.numpy() - known[f"patch_{size}"]).max() <= tolerance


# Workers and imports


def test_sources_travel_to_other_processes(folders: dict[str, Path]) -> None:
    for source in (describe("tiny"), describe("tiny-random"), describe(f"hf:{folders['dinov3']}")):
        copy = pickle.loads(pickle.dumps(source))
        assert copy == source
        pixels = images(load(source), 2, 2)
        assert largest_difference(load(copy)(pixels), load(source)(pixels)) == 0


def test_describe_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from featstore.backbones import describe; s = describe('tiny'); describe('dinov3-7b', "
        "random_weights=0); s.identity; print([m for m in ('torch', 'transformers', 'huggingface_hub') "
        "if m in sys.modules])"
    )
    root = Path(__file__).resolve().parent.parent
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
