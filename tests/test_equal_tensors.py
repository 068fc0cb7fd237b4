"""Digests of tensors: equal for equal numbers in any format, order, precision and dialect, else not."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from backbone_conformance import make_network, shards
from safetensors.torch import load_file, save_file

from cli.exchange import explain
from featstore import files
from featstore.backbones import describe
from featstore.backbones.equal_tensors import same_tensors, tensors_digest
from featstore.backbones.tiny import FOLDER as TINY_FOLDER
from featstore.store.layout import check_store, make_spec, set_folder


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return load_file(TINY_FOLDER / "model.safetensors")


def digest(path: Path) -> str | None:
    return tensors_digest(describe("tiny", weights=path))


def test_format_order_and_precision_do_not_matter(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    wide = {name: value.float() for name, value in reversed(list(weights.items()))}
    save_file(wide, tmp_path / "wide.safetensors")
    torch.save(wide, tmp_path / "wide.bin")
    torch.save({"model": weights}, tmp_path / "nested.pth")
    found = tensors_digest(describe("tiny"))
    assert found is not None
    assert [digest(tmp_path / name) for name in ("wide.safetensors", "wide.bin", "nested.pth")] == [found] * 3
    assert len({describe("tiny", weights=path).weights["digest"] for path in tmp_path.iterdir()}) == 3


def test_shards_are_one_network(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    folder = shards(tmp_path / "sharded", {})
    names = sorted(weights)
    halves = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: weights[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_bytes((TINY_FOLDER / "config.json").read_bytes())
    assert digest(folder) == tensors_digest(describe("tiny"))


@pytest.mark.parametrize("name", ["embeddings.cls_token", "encoder.layer.3.mlp.fc2.bias", "layernorm.weight"])
def test_any_number_matters(name: str, weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    changed = {key: value.clone() for key, value in weights.items()}
    changed[name].view(-1)[-1] += 1
    save_file(changed, tmp_path / "w.safetensors")
    assert digest(tmp_path / "w.safetensors") != tensors_digest(describe("tiny"))


def test_what_the_tokens_do_not_depend_on_is_left_out(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    changed = {key: value + 1 if "mask_token" in key else value for key, value in weights.items()}
    save_file(changed, tmp_path / "w.safetensors")
    assert digest(tmp_path / "w.safetensors") == tensors_digest(describe("tiny"))


def as_meta(weights: dict[str, torch.Tensor], depth: int) -> dict[str, torch.Tensor]:
    """The same numbers under the names of Meta's DINOv2 code, query, key and value in one tensor."""
    found = {
        "cls_token": weights["embeddings.cls_token"],
        "mask_token": weights["embeddings.mask_token"],
        "register_tokens": weights["embeddings.register_tokens"],
        "pos_embed": weights["embeddings.position_embeddings"],
        "patch_embed.proj.weight": weights["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": weights["embeddings.patch_embeddings.projection.bias"],
        "norm.weight": weights["layernorm.weight"],
        "norm.bias": weights["layernorm.bias"],
    }
    for block in range(depth):
        old, new = f"encoder.layer.{block}.", f"blocks.{block}."
        for kind in ("weight", "bias"):
            qkv = [weights[f"{old}attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            found[f"{new}attn.qkv.{kind}"] = torch.cat(qkv)
            found[f"{new}attn.proj.{kind}"] = weights[f"{old}attention.output.dense.{kind}"]
            for part in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                found[f"{new}{part}.{kind}"] = weights[f"{old}{part}.{kind}"]
        for number in (1, 2):
            found[f"{new}ls{number}.gamma"] = weights[f"{old}layer_scale{number}.lambda1"]
    return found


def test_hub_and_meta_are_linked(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    meta = as_meta(weights, depth=4)
    torch.save(meta, tmp_path / "meta.pth")
    hub, other = describe("tiny"), describe("tiny", weights=tmp_path / "meta.pth")
    cache = tmp_path / "cache" / "tensors.json"
    assert same_tensors(hub.identity, hub.identity, cache) is True
    assert same_tensors(hub.identity, other.identity, cache) is None  # nobody has looked yet
    assert tensors_digest(hub, cache) == tensors_digest(other, cache)
    assert same_tensors(hub.identity, other.identity, cache) is True
    assert same_tensors(hub.identity, other.identity, None) is None
    meta["norm.bias"] = meta["norm.bias"] + 1
    torch.save(meta, tmp_path / "tuned.pth")
    tuned = describe("tiny", weights=tmp_path / "tuned.pth")
    tensors_digest(tuned, cache)
    assert same_tensors(hub.identity, tuned.identity, cache) is False


def test_explain_says_so(
    weights: dict[str, torch.Tensor],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FEATSTORE_HOME", str(tmp_path / "store"))
    check_store(tmp_path / "store", create=True)
    save_file({name: value.float() for name, value in weights.items()}, tmp_path / "wide.safetensors")
    for name, path in (("a", None), ("b", tmp_path / "wide.safetensors")):
        source = describe("tiny", weights=path)
        spec = make_spec(
            dataset="d",
            model=name,
            resolution="",
            identity=source.identity,
            rows_per_block=256,
            weights={**source.weights, "model": "tiny"},
            random=False,
        )
        spec["request"] = {"model": "tiny", "weights": None if path is None else str(path)}
        folder = set_folder(tmp_path / "store", spec)
        folder.mkdir(parents=True)
        (folder / "spec.json").write_bytes(files.sealed(spec))
    said = []
    for tensors in (False, True, False):
        explain("d/a", "d/b", tensors=tensors)
        said.append(capsys.readouterr().out.splitlines()[-1])
    unknown = "weights: other files; whether their tensors are equal is not known, --tensors reads them"
    assert said == [unknown, "weights: other files, equal tensors", "weights: other files, equal tensors"]
    explain("d/a", "d/b", json=True)
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["field"], row["equal_tensors"]) == ("weights", True)


def test_explain_says_what_has_no_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEATSTORE_HOME", str(tmp_path / "store"))
    for name in ("tiny", "tiny-random"):
        source = describe(name)
        spec = make_spec(
            dataset="d",
            model=name,
            resolution="",
            identity=source.identity,
            rows_per_block=256,
            weights={**source.weights, "model": "tiny"},
            random=source.random,
        )
        folder = set_folder(tmp_path / "store", spec)
        folder.mkdir(parents=True)
        (folder / "spec.json").write_bytes(files.sealed(spec))
    for tensors in (False, True):
        explain("d/tiny", "d/tiny-random", tensors=tensors)
        line = capsys.readouterr().out.splitlines()[-1]
        assert re.fullmatch(r"weights: no files to compare: d/tiny-random-\w+ is of random weights", line)


def test_it_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "tensors.json"
    found = tensors_digest(describe("tiny"), cache)
    monkeypatch.setattr("featstore.backbones.equal_tensors._digest", None)
    assert tensors_digest(describe("tiny"), cache) == found


def test_only_files_have_one(tmp_path: Path) -> None:
    assert tensors_digest(describe("tiny-random")) is None


def test_packed_and_split_matrices(tmp_path: Path) -> None:
    """SwiGLU's two input matrices are one tensor in the hub's files, and two in memory."""
    network: Any = make_network("dinov2-swiglu")
    network.save_pretrained(tmp_path / "a")
    folder = tmp_path / "a"
    found = tensors_digest(describe(f"hf:{folder}"))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert tensors_digest(describe(f"hf:{folder}")) == found
