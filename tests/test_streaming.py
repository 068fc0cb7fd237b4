"""Streaming: the tokens of the resident network bit for bit, memory of two blocks, every source, every error."""

import gc
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from backbone_conformance import SMALL, images, save_small
from fake_cuda import FakeCuda
from safetensors.torch import load_file, save_file
from torch import Tensor

from featstore.backbones import BackboneSource, describe, devices, streaming
from featstore.backbones import tensors as tensors_module
from featstore.backbones.architecture import VisionTransformer
from featstore.backbones.family import HubKey
from featstore.backbones.network import build_empty, check_options, weights_of
from featstore.backbones.source import LoadOptions, find_family, from_seed
from featstore.backbones.streaming import Piece, lay_out, length_of
from featstore.backbones.tensors import RandomTensors, SafetensorsFiles, TorchFile
from featstore.backbones.tokens import Tokens
from featstore.errors import ConfigError, DeviceError, WeightsError

GB = 10**9
SLACK = 30e6  # of allocators, for activations and one tensor on its way


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small networks as safetensors, and the same tensors as .pth."""
    folder = tmp_path_factory.mktemp("streamed")
    saved = save_small(folder / "safetensors")
    for label, source in saved.items():
        target = folder / "pth" / label
        target.mkdir(parents=True)
        (target / "config.json").write_text((source / "config.json").read_text())
        torch.save(load_file(source / "model.safetensors"), target / "pytorch_model.bin")
    return {**saved, **{f"{label}.pth": folder / "pth" / label for label in saved}}


def load(source: BackboneSource, memory: str, dtype: str = "float32") -> Any:
    return source.load(device="cpu", compute_dtype=dtype, memory=memory)


def parts(tokens: Tokens) -> Iterator[Tensor]:
    yield from (tokens.cls, tokens.registers, tokens.patches)
    for inner in tokens.layers.values():
        yield from parts(inner)


def check_equal(found: Tokens, expected: Tokens) -> None:
    assert list(found.layers) == list(expected.layers)
    pairs = list(zip(parts(found), parts(expected), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)


# Equality


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("safetensors", "float32"),
        ("pth", "bfloat16"),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in (
                ("safetensors", "bfloat16"),
                ("pth", "float32"),
                ("random", "float32"),
                ("random", "bfloat16"),
            )
        ),
    ],
)
@pytest.mark.parametrize("label", SMALL)
def test_equals_resident(label: str, kind: str, dtype: str, folders: dict[str, Path]) -> None:
    folder = folders[f"{label}.pth" if kind == "pth" else label]
    source = describe(f"hf:{folder}", random_weights=3 if kind == "random" else None)
    resident, streamed = load(source, "resident", dtype), load(source, "stream", dtype)
    assert (resident.memory, resident.streams) == ("resident", False)
    assert (streamed.memory, streamed.streams) == ("stream", True)
    assert streamed.dtype == getattr(torch, dtype)
    for count, rows, columns, layers in ((2, 2, 3, (1, -1)), (2, 2, 3, ()), (5, 3, 1, (2,)), (1, 2, 2, (3, 1))):
        pixels = images(resident, rows, columns, count=count)
        check_equal(streamed(pixels, layers=layers), resident(pixels, layers=layers))


@pytest.mark.parametrize("label", ["dinov2", "dinov2-reg", "dinov3"])
def test_equals_resident_before_the_norm(label: str, folders: dict[str, Path]) -> None:
    source = describe(f"hf:{folders[label]}", norm="none")
    assert not source.architecture.final_norm
    resident, streamed = load(source, "resident"), load(source, "stream")
    pixels = images(resident, 2, 3)
    check_equal(streamed(pixels, layers=(1, 3)), resident(pixels, layers=(1, 3)))


def test_backbones_do_not_disturb_each_other(folders: dict[str, Path]) -> None:
    sources = [describe(f"hf:{folders[label]}") for label in ("dinov2", "dinov3")]
    resident, streamed = [load(s, "resident") for s in sources], [load(s, "stream") for s in sources]
    batches = [images(backbone, 2, 2) for backbone in resident]
    for _ in range(3):
        for here, there, pixels in zip(streamed, resident, batches):
            check_equal(here(pixels), there(pixels))


def test_two_threads_share_a_backbone(folders: dict[str, Path]) -> None:
    source = describe(f"hf:{folders['dinov3']}")
    resident, streamed = load(source, "resident"), load(source, "stream")
    batches = [images(resident, 2, 2, seed=seed) for seed in range(4)]
    found: dict[int, Tokens] = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: streamed(batches[i], layers=(1,))})) for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, pixels in enumerate(batches):
        check_equal(found[index], resident(pixels, layers=(1,)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("holds_all", [True, False])
def test_equals_resident_on_gpu(holds_all: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "fits_host", lambda needed: holds_all)
    source = describe("dinov3-small", random_weights=0)
    backbones = [source.load(device="cuda", compute_dtype="bfloat16", memory=m) for m in ("resident", "stream")]
    for count in (64, 3, 64, 64):
        pixels = images(backbones[0], 14, 14, count=count).cuda()
        resident, streamed = (backbone(pixels, layers=(1, 5)) for backbone in backbones)
        check_equal(streamed, resident)


def test_buffers_are_written_behind_what_may_use_their_memory(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of events on a device with streams, which this machine need not have."""
    source = describe(f"hf:{folders['dinov3']}")
    resident = load(source, "resident")
    pixels = images(resident, 2, 3)
    expected = resident(pixels)
    fake, empty = FakeCuda(), torch.empty
    gpu = torch.device("cuda")
    with monkeypatch.context() as patch:
        fake.install(patch)
        patch.setattr(streaming, "_event", fake.Event)
        patch.setattr(Tensor, "record_stream", lambda self, stream: None)

        def plain(*args: Any, device: Any = None, pin_memory: bool = False, **options: Any) -> Tensor:
            return empty(*args, device="cpu" if device == gpu else device, **options)

        patch.setattr(torch, "empty", plain)
        real = streaming.Streamer.__init__
        patch.setattr(streaming.Streamer, "__init__", lambda self, b, layout, t, device: real(self, b, layout, t, gpu))
        streamed = load(source, "stream")
        for _ in range(2):
            check_equal(streamed(pixels), expected)
        del streamed
        gc.collect()
    # Both buffers are the device's from the moment on at which the memory was taken.
    assert fake.log[:2] == ["main records 2", "main records 4"]
    assert [line for line in fake.log if line.startswith("side0 waits")][:2] == [
        "side0 waits for 4",
        "side0 waits for 2",
    ]
    assert fake.unguarded == 0


# What is in memory


def test_blocks_are_empty_between_batches(folders: dict[str, Path]) -> None:
    streamed = load(describe(f"hf:{folders['dinov3']}"), "stream")
    blocks = streamed.network.get_submodule(streamed.family.blocks)
    for _ in range(2):
        assert all(parameter.is_meta for parameter in blocks.parameters())
        assert not any(p.is_meta for n, p in streamed.network.named_parameters() if not n.startswith("model.layer."))
        streamed(images(streamed, 2, 2))


def test_blocks_are_empty_after_an_error(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    source = describe(f"hf:{folders['dinov3']}")
    streamed, resident = load(source, "stream"), load(source, "resident")
    blocks = streamed.network.get_submodule(streamed.family.blocks)
    with monkeypatch.context() as patch:
        patch.setattr(blocks[1].norm2, "forward", lambda values: 1 / 0)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                streamed(images(streamed, 2, 2))
            assert all(parameter.is_meta for parameter in blocks.parameters())
    check_equal(streamed(images(streamed, 2, 2)), resident(images(streamed, 2, 2)))


def test_thread_ends_with_the_backbone(folders: dict[str, Path]) -> None:
    def readers() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name.startswith("featstore-blocks")}

    gc.collect()
    before = readers()
    streamed = load(describe(f"hf:{folders['dinov3']}"), "stream")
    streamed(images(streamed, 2, 2))
    (reader,) = readers() - before
    del streamed
    gc.collect()  # networks of transformers hold themselves
    reader.join(timeout=20)
    assert not reader.is_alive()


# 12 blocks of 12.6 MB
MANY = VisionTransformer(
    family="dinov3_vit",
    embed_dim=512,
    depth=12,
    num_heads=8,
    patch_size=16,
    num_registers=4,
    mlp="gelu",
    mlp_dim=2048,
    native_size=32,
    rope_theta=100.0,
)
PEAK = """
import gc, sys
from pathlib import Path
import torch
from featstore.backbones.network import load_network
from featstore.backbones.source import LoadOptions, find_family
from featstore.backbones.tensors import RandomTensors, SafetensorsFiles, TorchFile
from featstore.records import peak_memory_bytes
from test_streaming import MANY, small_network

family, options = find_family("dinov3_vit"), LoadOptions(device="cpu", compute_dtype="float32", memory="stream")
small_network()(torch.zeros(1, 3, 32, 32))
before = peak_memory_bytes()
for tensors in (RandomTensors(0, family), SafetensorsFiles([Path(sys.argv[1])]), TorchFile(Path(sys.argv[2]))):
    backbone = load_network(tensors, MANY, family, "hf", options)
    for _ in range(2):
        tokens = backbone(torch.ones(1, 3, 32, 32))
    assert bool(torch.isfinite(tokens.cls).all())
    del backbone
    gc.collect()
    print(peak_memory_bytes() - before)
"""


def small_network() -> Any:
    """Streams too, so that everything is imported and warm."""
    source = from_seed("small", replace(MANY, embed_dim=32, depth=2, num_heads=2, mlp_dim=32), 0)
    return load(source, "stream")


@pytest.mark.slow
def test_peak_is_two_blocks(tmp_path: Path) -> None:
    """As the system measures it over a whole process; mapped pages of files would count."""
    family = find_family("dinov3_vit")
    shapes = {name: value.shape for name, value in weights_of(build_empty(MANY, family)).items()}
    state = {family.hub_key(name).name: torch.rand(shape) / 64 for name, shape in shapes.items()}
    save_file(state, tmp_path / "model.safetensors")
    torch.save(state, tmp_path / "model.pth")
    total = sum(value.nbytes for value in state.values())
    block = sum(value.nbytes for name, value in state.items() if name.startswith("layer.0."))
    run = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "model.safetensors"), str(tmp_path / "model.pth")],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"},
    )
    allowed = (total - 12 * block) + 2 * block + SLACK
    assert 2 * allowed < total
    found = run.stdout.split()
    assert len(found) == 3
    for more in found:
        assert block < int(more) < allowed


# Sources


def test_torch_files_are_read_at_their_offsets(tmp_path: Path) -> None:
    whole = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    state = {
        "plain": whole,
        "transposed": whole.t(),
        "part": whole[1:3],
        "columns": whole[:, 2:4],
        "half": whole.to(torch.bfloat16),
        "parameter": torch.nn.Parameter(whole + 1),
        "number": torch.tensor(7.5),
        "none": torch.empty(0, 6),
        "note": "text",
    }
    torch.save({"model": state}, tmp_path / "a.pth")
    tensors = TorchFile(tmp_path / "a.pth")
    assert "note" not in tensors.shapes
    for name, shape in tensors.shapes.items():
        expected = state[name]
        assert isinstance(expected, Tensor)
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            assert torch.equal(tensors.read(HubKey(name), shape, dtype), expected.detach().to(dtype))
    for part in (0, 1):
        assert torch.equal(tensors.read(HubKey("plain", part, 2), (2, 6), torch.float32), whole.chunk(2)[part])
        assert torch.equal(tensors.read(HubKey("transposed", part, 2), (3, 4), torch.float32), whole.t().chunk(2)[part])
    with pytest.raises(WeightsError, match=r"tensor plain has shape \[4, 6\], which does not give \[6, 4\]"):
        tensors.read(HubKey("plain"), (6, 4), torch.float32)


@pytest.mark.parametrize("kind", ["safetensors", "pth", "random"])
def test_reading_into_a_tensor_equals_reading(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors_module, "CHUNK", 5)  # several, and a rest
    state = {"a.weight": torch.randn(4, 6), "b.weight": torch.randn(4, 6).to(torch.bfloat16)}
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "a.pth")
    tensors = {
        "safetensors": lambda: SafetensorsFiles([tmp_path / "a.safetensors"]),
        "pth": lambda: TorchFile(tmp_path / "a.pth"),
        "random": lambda: RandomTensors(0, find_family("dinov2")),
    }[kind]()
    for name, value in state.items():
        for dtype in (torch.float32, torch.bfloat16):
            for key, rows in ((HubKey(name), slice(0, 4)), (HubKey(name, 1, 2), slice(2, 4))):
                shape = tuple(value[rows].shape)
                found = torch.full(shape, float("nan"), dtype=dtype)
                tensors.read_into(key, found)
                assert torch.equal(found, tensors.read(key, shape, dtype))
                if kind != "random":
                    assert torch.equal(found, value[rows].to(dtype))


def test_errors_of_the_reading_thread_reach_the_caller(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(folders["dinov3"], folder)
    source = describe(f"hf:{folder}")
    streamed = load(source, "stream")
    pixels = images(streamed, 2, 2)
    expected = streamed(pixels)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    for _ in range(2):
        with pytest.raises(WeightsError, match=r"model.safetensors ends within tensor layer\..*; fetch it again"):
            streamed(pixels)
    (folder / "model.safetensors").write_bytes(whole)
    check_equal(streamed(pixels), expected)


def test_layout() -> None:
    live = {
        "stem.weight": ((3, 3), torch.float32),
        "layers.0.a": ((3,), torch.float32),
        "layers.0.b.c": ((200, 2), torch.bfloat16),
        "layers.1.a": ((), torch.float32),
        "layers_of_another.0.a": ((3,), torch.float32),
    }
    layout = lay_out(live, {"layers.0.a": HubKey("x", 1, 2)}, "layers")
    assert layout == [
        (
            Piece("a", HubKey("x", 1, 2), (3,), torch.float32, 0),
            Piece("b.c", None, (200, 2), torch.bfloat16, 512),
        ),
        (Piece("a", None, (), torch.float32, 0),),
    ]
    assert [length_of(pieces) for pieces in layout] == [512 + 1024, 512]
    assert lay_out(live, {}, "") == []


# The choice


def memory_of(monkeypatch: pytest.MonkeyPatch, source: BackboneSource, free: int, asked: str = "auto") -> str:
    monkeypatch.setattr(devices, "free_bytes", lambda device: free)
    return str(load(source, asked).memory)


def test_auto_streams_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    source = from_seed("many", replace(MANY, embed_dim=64, mlp_dim=128, num_heads=2), 0)
    whole = 4 * (source.architecture.num_parameters())
    assert memory_of(monkeypatch, source, whole + whole // 4) == "resident"
    assert memory_of(monkeypatch, source, whole + whole // 4 - 10**4) == "stream"
    assert memory_of(monkeypatch, source, whole // 2) == "stream"
    assert memory_of(monkeypatch, source, whole, "resident") == "resident"
    assert memory_of(monkeypatch, source, 100 * whole, "stream") == "stream"
    with pytest.raises(DeviceError, match=r"GB are free; use --memory stream, or try --compute-dtype bfloat16, a sm"):
        memory_of(monkeypatch, source, whole // 2, "resident")
    with pytest.raises(
        DeviceError, match=r"even a block at a time the weights need .* GB on cpu, 0\.0 GB are free; try"
    ):
        memory_of(monkeypatch, source, whole // 10, "stream")
    with pytest.raises(DeviceError, match=r"the weights need .* GB on cpu in float32, 0\.0 GB are free; try --compute"):
        memory_of(monkeypatch, source, whole // 10)


def test_the_choice_by_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """dinov3-7b: 26.9 GB, of which 1.4 GB at a time when streamed."""
    cpu = torch.device("cpu")
    figures = 27 * GB, 3 * GB // 2

    def choose(asked: str, free: int | None, streamed: int | None = figures[1]) -> str:
        monkeypatch.setattr(devices, "free_bytes", lambda device: free)
        return devices.choose_memory(asked, figures[0], streamed, cpu, torch.bfloat16)

    assert devices.margin(27 * GB) == 4 * 2**30
    assert devices.margin(4 * GB) == GB
    assert [choose("auto", free) for free in (32 * GB, 31 * GB, 2 * GB, None)] == [
        "resident", "stream", "stream", "resident",
    ]  # fmt: skip
    assert choose("stream", None) == "stream"
    assert choose("auto", 27 * GB, None) == "resident"
    with pytest.raises(
        DeviceError, match=r"need 27\.0 GB on cpu in bfloat16, 20\.0 GB are free; use a smaller model or"
    ):
        choose("auto", 20 * GB, None)
    with pytest.raises(DeviceError, match=r"need 27\.0 GB .* 20\.0 GB are free; use --memory stream, or use a smaller"):
        choose("resident", 20 * GB)


def test_options_that_exclude_each_other(folders: dict[str, Path]) -> None:
    source = describe(f"hf:{folders['dinov3']}")
    with pytest.raises(
        ConfigError, match="--memory stream keeps weights as they compute; leave --weight-dtype int8 out"
    ):
        source.load(device="cpu", compute_dtype="float32", memory="stream", weight_dtype="int8")
    with pytest.raises(ConfigError, match="--compile graphs replays one place in memory, and --memory stream moves"):
        source.load(device="cpu", compute_dtype="float32", memory="stream", compile="graphs")
    family = replace(find_family("dinov2"), blocks="", model_type="blockless")
    with pytest.raises(ConfigError, match="--memory stream: blockless has no list of blocks to take one by one"):
        check_options(LoadOptions(device="cpu", compute_dtype="float32", memory="stream"), family)


def test_control_groups_limit_what_is_free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table, groups = tmp_path / "cgroup", tmp_path / "groups"
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemAvailable:    9000000 kB\n")
    monkeypatch.setattr(devices, "MEMORY_TABLE", meminfo)
    monkeypatch.setattr(devices, "GROUP_TABLE", table)
    monkeypatch.setattr(devices, "GROUPS", groups)

    def group(folder: Path, version: tuple[str, str, str], limit: str, usage: int, pages: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / version[0]).write_text(f"{limit}\n")
        (folder / version[1]).write_text(f"{usage}\n")
        (folder / "memory.stat").write_text(f"cache 1\n{version[2]} {pages}\n")

    def free() -> int | None:
        return devices.free_bytes(torch.device("cpu"))

    assert free() == 9_216_000_000
    table.write_text("0::/user/job\n")
    assert free() == 9_216_000_000  # no such folder, no limit
    group(groups / "user" / "job", devices.V2, "max", 5 * GB)
    group(groups / "user", devices.V2, str(8 * GB), 5 * GB, GB)
    assert free() == 4 * GB
    group(groups / "user" / "job", devices.V2, str(3 * GB), 2 * GB)
    assert free() == GB
    group(groups / "user" / "job", devices.V2, str(3 * GB), 4 * GB)
    assert free() == 0
    table.write_text("3:cpu:/a\n4:memory,x:/process/b\n")
    group(groups / "memory", devices.V1, "9223372036854771712", GB)
    group(groups / "memory" / "process" / "b", devices.V1, str(2 * GB), GB, 10**8)
    assert free() == 11 * 10**8
    table.write_text("4:memory:/path/of/the/host\n")
    group(groups / "memory", devices.V1, str(6 * GB), GB)
    assert free() == 5 * GB
    (groups / "memory" / "memory.stat").unlink()
    assert free() == 5 * GB
    meminfo.unlink()
    assert free() == 5 * GB
