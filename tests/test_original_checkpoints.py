"""Meta's own checkpoints and timm's copies: names, packed matrices, positions, and files that are none of them."""

import io
import pickle
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from backbone_conformance import SMALL, images, largest_difference, load, make_network, save_small
from safetensors.torch import load_file, save_file
from torch import Tensor

from featstore.backbones import BackboneSource, describe
from featstore.backbones.meta_positions import meta_positions
from featstore.backbones.source import from_files
from featstore.backbones.weights import find_files
from featstore.errors import ConfigError, WeightsError

ROOT = Path(__file__).parent.parent
SMALL_CASES = ("DINOv3 S+/16", "DINOv3 ConvNeXt-T", "ViT-B/16", "MAE B/16", "MSN B/16", "CLIP B/16", "MobileNetV2")
DINOV2 = [label for label in SMALL if label.startswith("dinov2")]
DINOV3 = [label for label in SMALL if label in ("dinov3", "dinov3-gated")]
LABELS = [*DINOV2, *DINOV3]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_small(tmp_path_factory.mktemp("originals"))


def hub_tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def packed(t: dict[str, Tensor], names: tuple[str, str, str], end: str) -> Tensor:
    """Query, key and value as one tensor; a bias that is absent counts as zero."""
    found = [t.get(f"{name}.{end}") for name in names]
    length = next(tensor for tensor in found if tensor is not None)
    return torch.cat([torch.zeros_like(length) if tensor is None else tensor for tensor in found])


def meta_dinov2(t: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a small hub checkpoint under the names of Meta's code."""
    out = {
        "cls_token": t["embeddings.cls_token"],
        "pos_embed": t["embeddings.position_embeddings"],
        "mask_token": t["embeddings.mask_token"],
    }
    if "embeddings.register_tokens" in t:
        out["register_tokens"] = t["embeddings.register_tokens"]
    for end in ("weight", "bias"):
        out[f"patch_embed.proj.{end}"] = t[f"embeddings.patch_embeddings.projection.{end}"]
        out[f"norm.{end}"] = t[f"layernorm.{end}"]
        for i in range(3):
            hub, meta = f"encoder.layer.{i}", f"blocks.{i}"
            attention = tuple(f"{hub}.attention.attention.{name}" for name in ("query", "key", "value"))
            if f"{attention[0]}.{end}" in t:
                out[f"{meta}.attn.qkv.{end}"] = packed(t, attention, end)
            out[f"{meta}.attn.proj.{end}"] = t[f"{hub}.attention.output.dense.{end}"]
            for number in (1, 2):
                out[f"{meta}.norm{number}.{end}"] = t[f"{hub}.norm{number}.{end}"]
                out[f"{meta}.ls{number}.gamma"] = t[f"{hub}.layer_scale{number}.lambda1"]
            if f"{hub}.mlp.fc1.{end}" in t:
                out[f"{meta}.mlp.fc1.{end}"] = t[f"{hub}.mlp.fc1.{end}"]
                out[f"{meta}.mlp.fc2.{end}"] = t[f"{hub}.mlp.fc2.{end}"]
            else:
                out[f"{meta}.mlp.w12.{end}"] = t[f"{hub}.mlp.weights_in.{end}"]
                out[f"{meta}.mlp.w3.{end}"] = t[f"{hub}.mlp.weights_out.{end}"]
    return out


def meta_dinov3(t: dict[str, Tensor]) -> dict[str, Tensor]:
    out = {
        "cls_token": t["embeddings.cls_token"],
        "storage_tokens": t["embeddings.register_tokens"],
        "mask_token": t["embeddings.mask_token"][0],
        "rope_embed.periods": 100.0 ** (torch.arange(4) / 4),
        "local_cls_norm.weight": torch.ones(32),
    }
    for end in ("weight", "bias"):
        out[f"patch_embed.proj.{end}"] = t[f"embeddings.patch_embeddings.{end}"]
        out[f"norm.{end}"] = t[f"norm.{end}"]
        for i in range(3):
            hub, meta = f"layer.{i}", f"blocks.{i}"
            attention = tuple(f"{hub}.attention.{name}_proj" for name in "qkv")
            if f"{attention[0]}.{end}" in t:
                out[f"{meta}.attn.qkv.{end}"] = packed(t, attention, end)
            out[f"{meta}.attn.proj.{end}"] = t[f"{hub}.attention.o_proj.{end}"]
            for number in (1, 2):
                out[f"{meta}.norm{number}.{end}"] = t[f"{hub}.norm{number}.{end}"]
                out[f"{meta}.ls{number}.gamma"] = t[f"{hub}.layer_scale{number}.lambda1"]
            if f"{hub}.mlp.gate_proj.{end}" in t:
                for new, old in (("w1", "gate_proj"), ("w2", "up_proj"), ("w3", "down_proj")):
                    out[f"{meta}.mlp.{new}.{end}"] = t[f"{hub}.mlp.{old}.{end}"]
            else:
                out[f"{meta}.mlp.fc1.{end}"] = t[f"{hub}.mlp.up_proj.{end}"]
                out[f"{meta}.mlp.fc2.{end}"] = t[f"{hub}.mlp.down_proj.{end}"]
    for i in range(3):
        if f"blocks.{i}.attn.qkv.bias" in out:
            out[f"blocks.{i}.attn.qkv.bias_mask"] = torch.cat((torch.ones(32), torch.zeros(32), torch.ones(32)))
    return out


def meta_tensors(label: str, folders: dict[str, Path]) -> dict[str, Tensor]:
    tensors = hub_tensors(folders[label])
    return {k: v.clone() for k, v in (meta_dinov2 if label in DINOV2 else meta_dinov3)(tensors).items()}


def save(tensors: dict[str, Any], file: Path) -> Path:
    if file.suffix == ".safetensors":
        save_file(tensors, file)
    else:
        torch.save(tensors, file)
    return file


def source_of(label: str, file: Path, folders: dict[str, Path], pos_interp: str | None = None) -> BackboneSource:
    """A file with the architecture of a small network."""
    architecture = describe(f"hf:{folders[label]}").architecture
    facts = {"kind": "local"}
    return from_files(
        label, architecture, find_files(file), weights=facts, origin="", digest_cache=None, pos_interp=pos_interp
    )


# Names


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("label", LABELS)
def test_meta_names(label: str, suffix: str, folders: dict[str, Path], tmp_path: Path) -> None:
    file = save(meta_tensors(label, folders), tmp_path / f"original{suffix}")
    assert find_files(file).meta
    hub = load(describe(f"hf:{folders[label]}"))
    original = load(source_of(label, file, folders))
    side = hub.architecture.native_size // hub.architecture.patch_size
    pixels = images(hub, side, side)
    # The periods are powers as Meta computes them, and their inverse is rounded once more.
    assert largest_difference(original(pixels), hub(pixels)) <= (0 if label in DINOV2 else 1e-5)


@pytest.mark.parametrize("label", LABELS)
def test_training_checkpoint(label: str, folders: dict[str, Path], tmp_path: Path) -> None:
    tensors = {f"backbone.{name}": value for name, value in meta_tensors(label, folders).items()}
    tensors["dino_head.mlp.0.weight"] = torch.zeros(3, 3)
    file = save({"teacher": tensors, "iteration": 7}, tmp_path / "teacher.pth")
    plain = save(meta_tensors(label, folders), tmp_path / "plain.pth")
    pixels = images(load(source_of(label, plain, folders)), 2, 4)
    trained, released = load(source_of(label, file, folders)), load(source_of(label, plain, folders))
    assert largest_difference(trained(pixels), released(pixels)) == 0


def timm_tensors(label: str, folders: dict[str, Path], *, biased: bool = True) -> dict[str, Tensor]:
    """As timm's own filters turn Meta's checkpoints into its own."""
    out = {}
    meta = meta_tensors(label, folders)
    for name, value in meta.items():
        if name.endswith(("mask_token", "periods", "bias_mask")) or name.startswith("local_cls_norm"):
            continue
        if label in DINOV3 and name.endswith("qkv.bias"):
            if biased:
                out[name.replace("qkv.bias", "q_bias")], _, out[name.replace("qkv.bias", "v_bias")] = value.chunk(3)
            continue
        for old, new in (
            *((("w12", "fc1"), ("w3", "fc2")) if label in DINOV2 else ()),
            *((("w1", "fc1_g"), ("w2", "fc1_x"), ("w3", "fc2")) if label in DINOV3 else ()),
            *((("ls1.gamma", "gamma_1"), ("ls2.gamma", "gamma_2")) if label in DINOV3 else ()),
            ("storage_tokens", "reg_token"),
            ("register_tokens", "reg_token"),
        ):
            name = name.replace(old, new)
        out[name] = value
    if label == "dinov2-reg":
        out["cls_token"] = meta["cls_token"] + meta["pos_embed"][:, :1]
        out["pos_embed"] = meta["pos_embed"][:, 1:]
    return {name: value.contiguous().clone() for name, value in out.items()}


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("label", LABELS)
def test_timm_names(label: str, suffix: str, folders: dict[str, Path], tmp_path: Path) -> None:
    file = save(timm_tensors(label, folders), tmp_path / f"timm{suffix}")
    assert not find_files(file).meta
    source = source_of(label, file, folders)
    assert source.pos_interp == "hf"
    hub, timm = load(describe(f"hf:{folders[label]}")), load(source)
    for rows, columns in ((3, 3), (2, 5)):
        pixels = images(hub, rows, columns)
        assert largest_difference(timm(pixels), hub(pixels)) <= (1e-5 if label == "dinov2-reg" else 0)


def test_timm_without_biases(folders: dict[str, Path], tmp_path: Path) -> None:
    file = save(timm_tensors("dinov3", folders, biased=False), tmp_path / "timm.safetensors")
    network = make_network("dinov3")
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith(("q_proj.bias", "v_proj.bias")):
                parameter.zero_()
    timm = load(source_of("dinov3", file, folders))
    pixels = images(timm, 3, 3)
    with torch.no_grad():
        expected = network(pixels).last_hidden_state
    torch.testing.assert_close(timm(pixels).patches, expected[:, 5:], rtol=0, atol=1e-5)


def drop(*names: str) -> Any:
    return lambda tensors: [tensors.pop(name) for name in names]


@pytest.mark.parametrize(
    ("label", "edit", "message"),
    [
        ("dinov2", drop("blocks.1.attn.qkv.weight"), r"tensors 1 missing \(blocks\.1\.attn\.qkv\.weight\)"),
        ("dinov2-swiglu", drop("blocks.2.mlp.w12.bias"), r"tensors 1 missing \(blocks\.2\.mlp\.w12\.bias\)"),
        ("dinov2-reg", drop("register_tokens", "norm.bias"), r"tensors 2 missing \(norm\.bias, register_tokens\)"),
        ("dinov3", drop("blocks.0.ls1.gamma"), r"tensors 1 missing \(blocks\.0\.ls1\.gamma\)"),
        ("dinov3-gated", drop("blocks.0.mlp.w2.weight"), r"tensors 1 missing \(blocks\.0\.mlp\.w2\.weight\)"),
        ("dinov2", lambda t: t.update(head=torch.zeros(2)), r"tensors 1 left over \(head\)"),
        (
            "dinov3",
            lambda t: t.update({"cls_norm.bias": torch.zeros(32)}),
            r"tensors 1 left over \(cls_norm\.bias\)",
        ),
        (
            "dinov3-gated",
            lambda t: t.update({"blocks.0.attn.qkv.bias": torch.zeros(96)}),
            r"tensors 1 left over \(blocks\.0\.attn\.qkv\.bias\)",
        ),
        (
            "dinov2",
            lambda t: t.update({"blocks.0.attn.qkv.weight": torch.zeros(64, 32)}),
            r"tensors 1 of another shape \(blocks\.0\.attn\.qkv\.weight\)",
        ),
    ],
)
def test_tensors_that_do_not_fit(label: str, edit: Any, message: str, folders: dict[str, Path], tmp_path: Path) -> None:
    tensors = meta_tensors(label, folders)
    edit(tensors)
    with pytest.raises(WeightsError, match=message):
        load(source_of(label, save(tensors, tmp_path / "edited.pth"), folders))


def test_timm_file_with_one_bias_less(folders: dict[str, Path], tmp_path: Path) -> None:
    tensors = timm_tensors("dinov3", folders)
    del tensors["blocks.1.attn.v_bias"]
    with pytest.raises(WeightsError, match=r"tensors .*blocks\.\d\.attn\.[qv]_bias"):
        load(source_of("dinov3", save(tensors, tmp_path / "timm.safetensors"), folders))


# Rotary positions and masked biases


def test_periods_of_the_checkpoint_are_followed(folders: dict[str, Path], tmp_path: Path) -> None:
    tensors = meta_tensors("dinov3", folders)
    rounded = (1.1 * tensors["rope_embed.periods"]).bfloat16()
    tensors["rope_embed.periods"] = rounded
    original = load(source_of("dinov3", save(tensors, tmp_path / "rounded.pth"), folders))
    network = make_network("dinov3")
    (frequencies,) = [buffer for name, buffer in network.named_buffers() if name.endswith("inv_freq")]
    pixels = images(original, 3, 4)
    with torch.no_grad():
        exact = network(pixels).last_hidden_state[:, 5:]
        frequencies.copy_(1 / rounded.float())
        expected = network(pixels).last_hidden_state[:, 5:]
    torch.testing.assert_close(original(pixels).patches, expected, rtol=0, atol=1e-6)
    assert float((original(pixels).patches - exact).abs().max()) > 1e-4


@pytest.mark.parametrize("masked", [True, False])
def test_bias_of_the_key(masked: bool, folders: dict[str, Path], tmp_path: Path) -> None:
    tensors = meta_tensors("dinov3", folders)
    tensors["blocks.1.attn.qkv.bias"][40] = 1.0
    if not masked:
        del tensors["blocks.1.attn.qkv.bias_mask"]
    source = source_of("dinov3", save(tensors, tmp_path / "bias.pth"), folders)
    if masked:  # Meta's code multiplies it by the mask's zero
        hub = load(describe(f"hf:{folders['dinov3']}"))
        pixels = images(hub, 2, 2)
        assert largest_difference(load(source)(pixels), hub(pixels)) <= 1e-5
    else:
        with pytest.raises(WeightsError, match=r"blocks\.1\.attn\.qkv\.bias must be zero for the key and whole for"):
            load(source)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_mask_of_the_value(value: float, folders: dict[str, Path], tmp_path: Path) -> None:
    tensors = meta_tensors("dinov3", folders)
    tensors["blocks.2.attn.qkv.bias_mask"][95] = value
    with pytest.raises(WeightsError, match=r"whole for query and value, .* it is not; give another checkpoint"):
        load(source_of("dinov3", save(tensors, tmp_path / "mask.pth"), folders))


# Positions


def cubic(distance: float) -> float:
    """Keys' kernel with a = -0.75, as torch's bicubic."""
    a, x = -0.75, abs(distance)
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def resampling(side: int, count: int, offset: float) -> Tensor:
    """Weights (count, side) of one axis: places (i + 0.5) / scale - 0.5 with scale (count + offset) / side."""
    weights = torch.zeros(count, side, dtype=torch.float64)
    for i in range(count):
        place = (i + 0.5) * side / (count + offset) - 0.5
        for j in range(int(place // 1) - 1, int(place // 1) + 3):
            weights[i, min(max(j, 0), side - 1)] += cubic(place - j)
    return weights


def brute_force(table: Tensor, rows: int, columns: int, offset: float = 0.1) -> Tensor:
    side = round((table.shape[1] - 1) ** 0.5)
    square = table[0, 1:].double().reshape(side, side, -1)
    down, across = resampling(side, rows, offset), resampling(side, columns, offset)
    resized = torch.einsum("ri,cj,ijd->rcd", down, across, square).reshape(rows * columns, -1)
    return torch.cat((table[0, :1].double(), resized))[None].to(table.dtype)


@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (16, 24), (36, 36), (37, 36), (38, 1), (73, 73)])
def test_meta_positions(rows: int, columns: int) -> None:
    table = torch.randn(1, 1 + 37 * 37, 3, generator=torch.Generator().manual_seed(0))
    resized = meta_positions(table, rows, columns)
    torch.testing.assert_close(resized, brute_force(table, rows, columns), rtol=0, atol=2e-4)
    assert float((resized - brute_force(table, rows, columns, offset=0.0)).abs().max()) > 2e-3
    half = meta_positions(table.bfloat16(), rows, columns)
    assert half.dtype == torch.bfloat16
    expected = meta_positions(table.bfloat16().float(), rows, columns)  # in float32, then rounded once
    assert torch.equal(half, expected.bfloat16())


def test_native_table_is_untouched() -> None:
    table = torch.randn(1, 1 + 9, 4)
    assert meta_positions(table, 3, 3) is table
    assert meta_positions(table, 9, 1).shape == (1, 10, 4)  # as many patches, another shape


def test_network_with_positions_as_meta(folders: dict[str, Path], tmp_path: Path) -> None:
    # A network trained at 5 x 5, whose table is the small one resized, is the truth at that size.
    original = load(source_of("dinov2", save(meta_tensors("dinov2", folders), tmp_path / "a.pth"), folders))
    tensors = meta_tensors("dinov2", folders)
    tensors["pos_embed"] = brute_force(tensors["pos_embed"], 5, 5)
    file = save(tensors, tmp_path / "b.pth")
    config = (folders["dinov2"] / "config.json").read_text().replace('"image_size": 42', '"image_size": 70')
    (tmp_path / "larger").mkdir()
    (tmp_path / "larger" / "config.json").write_text(config)
    save_file(hub_tensors(folders["dinov2"]), tmp_path / "larger" / "model.safetensors")
    native = load(source_of("dinov2", file, {"dinov2": tmp_path / "larger"}))
    assert native.architecture.native_size == 70
    pixels = images(original, 5, 5)
    assert largest_difference(original(pixels), native(pixels)) <= 1e-5


def test_who_chooses_the_positions(folders: dict[str, Path], tmp_path: Path) -> None:
    file = save(meta_tensors("dinov2", folders), tmp_path / "a.pth")
    original, as_hub = source_of("dinov2", file, folders), source_of("dinov2", file, folders, "hf")
    hub, as_meta = (describe(f"hf:{folders['dinov2']}", pos_interp=way) for way in (None, "meta"))
    assert [s.identity["pos_interp"] for s in (original, as_hub, hub, as_meta)] == ["meta", "hf", "hf", "meta"]
    networks = [load(source) for source in (original, as_hub, hub, as_meta)]
    pixels = images(networks[0], 2, 5)
    tokens = [network(pixels) for network in networks]
    assert largest_difference(tokens[0], tokens[3]) == largest_difference(tokens[1], tokens[2]) == 0
    assert largest_difference(tokens[0], tokens[2]) > 1e-3


@pytest.mark.parametrize("label", ["dinov2-reg", *DINOV3])
def test_positions_that_do_not_differ(label: str, folders: dict[str, Path], tmp_path: Path) -> None:
    file = save(meta_tensors(label, folders), tmp_path / "a.pth")
    assert source_of(label, file, folders).identity["pos_interp"] == "hf"
    with pytest.raises(ConfigError, match="has no position table that Meta's code resizes otherwise"):
        source_of(label, file, folders, "meta")


# Files


def test_folder_with_a_torch_file(folders: dict[str, Path], tmp_path: Path) -> None:
    tensors = hub_tensors(folders["dinov3"])
    (tmp_path / "config.json").write_text((folders["dinov3"] / "config.json").read_text())
    save(tensors, tmp_path / "pytorch_model.bin")
    source, hub = describe(f"hf:{tmp_path}"), load(describe(f"hf:{folders['dinov3']}"))
    assert source.weights["kind"] == "local"
    pixels = images(hub, 2, 3)
    assert largest_difference(load(source)(pixels), hub(pixels)) == 0
    (tmp_path / "model.safetensors").write_bytes((folders["dinov3"] / "model.safetensors").read_bytes())
    assert find_files(tmp_path).files == (tmp_path / "model.safetensors",)


def zipped(entries: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def old_format() -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: b"", "is no torch checkpoint; a Git LFS pointer, an error page or a download cut short"),
        (lambda: b"<!DOCTYPE html>", "is no torch checkpoint; .* fetch it again"),
        (lambda: b"version https://git-lfs.github.com/spec/v1\n", "is no torch checkpoint; a Git LFS pointer"),
        (old_format, "is a pickle as torch wrote it before version 1.6, .* load it with torch and save its"),
        (lambda: pickle.dumps({"a": 1}), r"is a pickle as torch wrote it before version 1\.6"),
        (lambda: zipped({"a/data.pkl": b"x"})[:-30], r"is cut short or damaged: .* \(.*\); fetch it again"),
        (lambda: b"PK", "is cut short or damaged"),
        (lambda: zipped({"readme.txt": b"x"}), "is a zip archive but no torch checkpoint of tensors; give a file"),
    ],
    ids=["empty", "page", "lfs", "old", "pickle", "short", "two-bytes", "zip"],
)
def test_files_that_are_no_checkpoints(content: Any, message: str, tmp_path: Path) -> None:
    for suffix in (".pth", ".pt", ".bin"):
        file = tmp_path / f"w{suffix}"
        file.write_bytes(content())
        started = time.monotonic()
        with pytest.raises(WeightsError, match=message):
            describe("dinov2-small", weights=file)
        assert time.monotonic() - started < 1


def test_cut_short_anywhere(folders: dict[str, Path], tmp_path: Path) -> None:
    whole = save(meta_tensors("dinov2", folders), tmp_path / "whole.pth").read_bytes()
    for length in (1, 100, len(whole) // 2, len(whole) - 1):
        file = tmp_path / f"{length}.pth"
        file.write_bytes(whole[:length])
        with pytest.raises(WeightsError, match="cut short"):
            find_files(file)


def test_other_suffix(tmp_path: Path) -> None:
    (tmp_path / "w.ckpt").write_bytes(b"x")
    with pytest.raises(WeightsError, match=r"w\.ckpt is not a \.safetensors, \.pth, \.pt or \.bin file; other formats"):
        find_files(tmp_path / "w.ckpt")


def test_checked_without_torch(folders: dict[str, Path], tmp_path: Path) -> None:
    file = save(meta_tensors("dinov2", folders), tmp_path / "a.pth")
    code = (
        "import sys; from pathlib import Path; from featstore.backbones.weights import find_files; "
        f"print(find_files(Path({str(file)!r})).meta, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "True False\n"


class Executed:
    """A pickle that writes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_nothing_in_a_checkpoint_is_executed(folders: dict[str, Path], tmp_path: Path) -> None:
    tensors = {**meta_tensors("dinov2", folders), "extra": Executed(tmp_path / "written")}
    file = save(tensors, tmp_path / "evil.pth")
    with pytest.raises(WeightsError, match=r"evil\.pth cannot be read as plain tensors \(UnpicklingError: "):
        load(source_of("dinov2", file, folders))
    assert not (tmp_path / "written").exists()


# The page of measurements


def test_parity_page() -> None:
    page = (ROOT / "docs" / "parity.md").read_text()
    assert "Not run" not in page
    assert "failed" not in page
    assert "**" not in page  # what is above its bound
    for label in ("DINOv2 S/14 with registers", "dinov3-small-plus", "dinov2-giant", "dinov3-7b", "ResNet50"):
        assert f"| {label} |" in page


@pytest.mark.slow
def test_parity_script(tmp_path: Path) -> None:
    page = tmp_path / "parity.md"
    command = [sys.executable, str(ROOT / "benchmarks" / "parity.py"), "--quick", "--output", str(page)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    assert text.count("Not run: needs") == 2
    assert text.count("\n| DINOv2 S/14 |") == 3
    for label in SMALL_CASES:
        assert f"| {label} |" in text
