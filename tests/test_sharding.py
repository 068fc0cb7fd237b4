"""Sharding: two gloo processes give the resident network's tokens, and an error in one of them ends both."""

import json
import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from backbone_conformance import SMALL_DINOV3
from torch import Tensor

from featstore.backbones import describe, sharding
from featstore.backbones.family import HubKey
from featstore.backbones.sharding import _read_share
from featstore.backbones.streaming import Piece
from featstore.errors import ConfigError

RANK = "import sys; from test_sharding import run_rank; run_rank(int(sys.argv[1]), sys.argv[2])"


def run_rank(rank: int, folder: str) -> None:
    """One process: the same network whole and sharded, then an error in rank 1."""
    address = (Path(folder) / "address").read_text()
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    found: dict[str, Any] = {}
    source = describe(f"hf:{folder}/network")
    for kind, origin in (("files", source), ("random", describe(f"hf:{folder}/network", random_weights=0))):
        compare(found, kind, origin)
    broken: Any = source.load(device="cpu", compute_dtype="float32", memory="shard")
    images = torch.zeros(3, 3, 32, 32)
    if rank == 1:
        broken.backbone.network.model.layer[1].register_forward_pre_hook(lambda module, inputs: 1 / 0)
        found["failed"] = record(broken.serve)
    else:
        found["failed"] = record(lambda: broken(images))
        found["again"] = record(lambda: broken(images))
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))


def compare(found: dict[str, Any], kind: str, source: Any) -> None:
    """Note this rank's share of the blocks and, on rank 0, differences to the resident network by batch size."""
    backbone: Any = source.load(device="cpu", compute_dtype="float32", memory="shard")
    inner = list(backbone.backbone.network.model.layer.parameters())
    found[f"{kind} share"] = sum(p.to_local().numel() for p in inner) / sum(p.numel() for p in inner)
    one = torch.zeros(1, 3, 16, 16)
    if backbone.rank == 1:
        found["call on 1"] = record(lambda: backbone(one))
        backbone.serve()
        return
    resident = source.load(device="cpu", compute_dtype="float32", memory="resident")
    for count in (1, 2, 3, 5):
        pixels = torch.randn(count, 3, 48, 32, generator=torch.Generator().manual_seed(count))
        here, there = backbone(pixels, layers=(1, -1)), resident(pixels, layers=(1, -1))
        for a, b in ((here, there), *((here.layers[n], there.layers[n]) for n in there.layers)):
            for x, y in ((a.cls, b.cls), (a.registers, b.registers), (a.patches, b.patches)):
                assert x.shape == y.shape
                found[f"{kind} {count}"] = max(found.get(f"{kind} {count}", 0.0), float((x - y).abs().max()))
    found["serve on 0"] = record(backbone.serve)
    found["bad size"] = record(lambda: backbone(torch.zeros(1, 3, 17, 16)))
    backbone.close()
    backbone.close()
    found["closed"] = record(lambda: backbone(one))


def record(function: Any) -> str:
    """The error that a call ends in."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    config = transformers.DINOv3ViTConfig(**{**SMALL_DINOV3, "hidden_size": 40, "intermediate_size": 45})
    transformers.DINOv3ViTModel(config).save_pretrained(tmp_path / "network")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "address").write_text(f"tcp://127.0.0.1:{port}")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=240)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], said
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    for kind in ("files", "random"):
        assert all(first[f"{kind} {count}"] <= 1e-6 for count in (1, 2, 3, 5))
        assert 0.45 < first[f"{kind} share"] < 0.55
        assert first[f"{kind} share"] + second[f"{kind} share"] == pytest.approx(1)
    assert first["serve on 0"] == "ConfigError: rank 0 gives the images; the other ranks serve()"
    assert "multiples of the patch size 16; 17 x 16 is not" in first["bad size"]
    only = "ConfigError: only rank 0 gives a sharded backbone images, until it closes it; "
    assert first["closed"] == only + "this backbone is closed"
    assert first["again"] == only + "this backbone is closed"
    assert second["call on 1"] == only + "rank 1 runs serve()"
    for rank in (first, second):
        assert rank["failed"] == (
            "DeviceError: the sharded network failed on rank 1 of 2: ZeroDivisionError: division by zero"
        )


# Without a group


class _Stored:
    """Tensors that remember what was asked of them."""

    origin = "memory"

    def __init__(self, values: Tensor) -> None:
        self.values, self.shapes, self.asked = (
            values,
            {"w": tuple(values.shape)},
            list[tuple[HubKey, tuple[int, ...]]](),
        )

    def read(self, key: HubKey, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        self.asked.append((key, shape))
        return self.values.chunk(key.parts)[key.part].reshape(shape).to(dtype)

    def read_into(self, key: HubKey, values: Tensor) -> None:
        values.copy_(self.read(key, tuple(values.shape), values.dtype))


@pytest.mark.parametrize(
    ("rows", "part", "parts", "whole"), [(6, 0, 1, False), (6, 1, 2, False), (7, 0, 1, True), (7, 1, 2, True)]
)
def test_ranks_read_their_own_rows(
    rows: int, part: int, parts: int, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = _Stored(torch.randn(rows * parts, 4))
    live = stored.values.chunk(parts)[part]
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    piece = Piece("w", HubKey("w", part, parts), (rows, 4), torch.float32, 0)
    for rank, expected in enumerate(torch.chunk(live, 3)):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        share = torch.empty_like(expected)
        _read_share(stored, piece, share)
        assert torch.equal(share, expected)
        assert stored.asked[-1][1] == ((rows, 4) if whole else tuple(expected.shape))


def test_needs_a_group(tmp_path: Path) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "RANK"):
        assert name not in os.environ
    with pytest.raises(
        ConfigError, match=r"--memory shard needs a torch\.distributed group; start the command by torchrun"
    ):
        describe("tiny").load(device="cpu", compute_dtype="float32", memory="shard")
    with pytest.raises(ConfigError, match="start them by torchrun --nproc-per-node N -m featstore extract"):
        sharding.join_group("cpu")


def test_one_device_per_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    with pytest.raises(ConfigError, match="one device per process; ask for cuda instead of cuda:1"):
        sharding.own_device(torch.device("cuda", 1), "cuda:1")
