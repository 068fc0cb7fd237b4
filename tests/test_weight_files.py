"""Folders and files of weights: what is read from them, what must fit, what is said of damaged ones."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from backbone_conformance import SMALL, images, largest_difference, load, safetensors_bytes, save_small, shards
from safetensors.torch import load_file, save_file
from torch import Tensor

from featstore.backbones import describe, weights
from featstore.backbones.source import find_family
from featstore.backbones.tiny import FOLDER as TINY_FOLDER
from featstore.errors import MissingWeightsError, WeightsError


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_small(tmp_path_factory.mktemp("weights"))


# Folders


def test_no_weights_there(tmp_path: Path) -> None:
    with pytest.raises(MissingWeightsError, match=r"absent does not exist; give a folder with config\.json"):
        describe("tiny", weights=tmp_path / "absent")
    with pytest.raises(MissingWeightsError, match=r"has no config\.json; give a folder as the hub has it"):
        describe("tiny", weights=tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        MissingWeightsError, match=r"neither a \.safetensors file nor pytorch_model\.bin; fetch it again"
    ):
        describe("tiny", weights=tmp_path)
    checkpoint = tmp_path / "weights.pth"
    checkpoint.write_bytes(b"x")
    with pytest.raises(WeightsError, match=r"weights\.pth is no torch checkpoint; a Git LFS pointer"):
        describe("tiny", weights=checkpoint)


def test_home_folder_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(TINY_FOLDER, tmp_path / "own")
    assert describe("tiny", weights=Path("~/own")).identity == describe("tiny").identity
    assert describe("hf:~/own").name == "own"


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [("{", r"is no JSON file \(.*\); fetch it again"), ("[1]", "must hold a JSON object, it holds list")],
)
def test_damaged_json(name: str, content: str, message: str, tmp_path: Path) -> None:
    folder = shutil.copytree(TINY_FOLDER, tmp_path / "copy")
    (folder / name).write_text(content)
    with pytest.raises(WeightsError, match=f"{name} {message}"):
        describe("tiny", weights=folder)


def test_shards_that_are_not_all_there(tmp_path: Path) -> None:
    folder = shards(tmp_path / "sharded", {f"model-{i}.safetensors": b"x" for i in range(5)})
    assert len(weights.find_files(folder).files) == 5
    for i in range(4):
        (folder / f"model-{i}.safetensors").unlink()
    with pytest.raises(
        MissingWeightsError,
        match=r"4 of 5 files .* are missing \(model-0\.safetensors, model-1\.safetensors, model-2\.safetensors\)",
    ):
        weights.find_files(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(MissingWeightsError, match=r"0 of 0 files .* are missing; fetch the folder again"):
        weights.find_files(folder)


def test_several_files_without_index(tmp_path: Path) -> None:
    folder = shards(tmp_path / "sharded", {"a.safetensors": b"x", "b.safetensors": b"y"})
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(WeightsError, match=r"2 \.safetensors files and no model\.safetensors\.index\.json; give the"):
        weights.find_files(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is no safetensors file \(header of 0 bytes in a file of 0\); a Git LFS pointer"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "is no safetensors file .*LFS pointer"),
        ((2).to_bytes(8, "little") + b"[]", "is no safetensors file"),
        ((2).to_bytes(8, "little") + b"{x", "is no safetensors file"),
        (b'\x07\0\0\0\0\0\0\0{"a":1}', "is no safetensors file"),
        (safetensors_bytes(b"abc")[:-1], "bytes but its header promises .*; fetch it again"),
        (safetensors_bytes(b"abc") + b"d", "bytes but its header promises .*; fetch it again"),
    ],
    ids=["empty", "lfs", "list", "broken", "entry", "short", "long"],
)
def test_damaged_file(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    file.write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        describe("tiny", weights=file)


# Loading


def test_sources_of_files(folders: dict[str, Path], tmp_path: Path) -> None:
    source = describe(f"hf:{folders['dinov2-reg']}")
    assert source.name == "dinov2-reg"
    assert source.weights.keys() == {"kind", "digest"}
    assert source.weights["kind"] == "local"
    assert source.origin == f"folder {folders['dinov2-reg']}"
    assert str(tmp_path.parent) not in json.dumps([source.weights, source.identity])
    assert source.processor is None
    assert source.pos_interp == "hf"
    moved = shutil.copytree(folders["dinov2-reg"], tmp_path / "elsewhere")
    assert describe(f"hf:{moved}").identity == source.identity
    assert describe(f"hf:{folders['dinov3']}").identity != source.identity


def test_processor_gives_mean_and_std(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["dinov3"], tmp_path / "satellite")
    processor = {"image_mean": [0.43, 0.411, 0.296], "image_std": [0.213, 0.156, 0.143], "resample": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    for random_weights in (None, 0):
        source = describe(f"hf:{folder}", random_weights=random_weights)
        assert source.processor == processor
        assert source.architecture.mean == (0.43, 0.411, 0.296)
        assert source.architecture.std == (0.213, 0.156, 0.143)
    assert describe(f"hf:{folders['dinov3']}").architecture.mean == (0.485, 0.456, 0.406)
    (folder / "preprocessor_config.json").write_text(json.dumps({**processor, "image_std": [1.0]}))
    with pytest.raises(WeightsError, match=r"image_std = \[1\.0\]; it must be three numbers"):
        describe(f"hf:{folder}")


def test_single_file_and_shards_load_like_the_folder(folders: dict[str, Path], tmp_path: Path) -> None:
    expected = load(describe("tiny"))
    pixels = images(expected, 3, 4)
    file = tmp_path / "weights.safetensors"
    shutil.copy(TINY_FOLDER / "model.safetensors", file)
    single = describe("tiny", weights=file)
    assert single.weights == {"kind": "local", "digest": describe("tiny").weights["digest"]}
    assert single.processor is None
    assert largest_difference(load(single)(pixels), expected(pixels)) == 0

    folder = tmp_path / "sharded"
    network = transformers.Dinov2WithRegistersModel.from_pretrained(TINY_FOLDER)
    network.save_pretrained(folder, max_shard_size="2MB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    sharded = describe("tiny", weights=folder)
    assert largest_difference(load(sharded)(pixels), expected(pixels)) == 0

    renamed = shutil.copytree(folders["dinov3"], tmp_path / "renamed")
    (renamed / "model.safetensors").rename(renamed / "other.safetensors")
    assert describe(f"hf:{renamed}").identity == describe(f"hf:{folders['dinov3']}").identity
    pixels = images(load(describe(f"hf:{renamed}")), 2, 2)
    assert (
        largest_difference(load(describe(f"hf:{renamed}"))(pixels), load(describe(f"hf:{folders['dinov3']}"))(pixels))
        == 0
    )


def test_config_contradicts_the_name(folders: dict[str, Path]) -> None:
    with pytest.raises(
        WeightsError,
        match=r"not that of dinov2-small: embed_dim 32 instead of 384; depth 3 instead of 12; .*hf:DIR to take",
    ):
        describe("dinov2-small", weights=folders["dinov2"])
    with pytest.raises(WeightsError, match=r"not that of dinov2-base-reg: family 'dinov2' instead of"):
        describe("dinov2-base-reg", weights=folders["dinov2"])


def test_training_size_matters_only_with_a_position_table(tmp_path: Path) -> None:
    for name, fits in (("dinov3-base", True), ("dinov2-base", False)):
        facts = describe(name, random_weights=0).architecture
        config = {"model_type": facts.family, **find_family(facts.family).write(facts), "image_size": 448}
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
        if fits:
            assert describe(name, weights=folder).architecture == facts
        else:
            with pytest.raises(WeightsError, match="not that of dinov2-base: native_size 448 instead of 518"):
                describe(name, weights=folder)


def edited(folder: Path, target: Path, edit: Callable[[dict[str, Tensor]], Any]) -> Path:
    """A copy of a folder whose tensors `edit` has changed."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    edit(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("norm.bias"), r"tensors 1 missing \(norm\.bias\)"),
        (lambda t: t.update(extra=torch.zeros(2)), r"tensors 1 left over \(extra\)"),
        (lambda t: t.update({"norm.bias": torch.zeros(2)}), r"tensors 1 of another shape \(norm\.bias\)"),
        (
            lambda t: [t.pop(key) for key in list(t) if key.startswith("layer.2.")],
            r"tensors 1\d missing \(layer\.2\.[a-z0-9_.]+, .*, .*, \.\.\.\)",
        ),
        (
            lambda t: (t.clear(), t.update({"blocks.0.attn.qkv.weight": torch.zeros(2)})),
            r"tensors 4\d missing \(blocks\.0\.attn\.proj\.bias, .*, \.\.\.\)",
        ),
    ],
    ids=["missing", "left-over", "shape", "block", "meta"],
)
def test_tensors_that_do_not_fit(
    edit: Callable[[dict[str, Tensor]], Any], message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    source = describe(f"hf:{edited(folders['dinov3'], tmp_path / 'edited', edit)}")
    with pytest.raises(WeightsError, match=message):
        load(source)


@pytest.mark.parametrize("label", SMALL)
def test_mask_token_may_be_absent(label: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = edited(folders[label], tmp_path / "edited", lambda t: t.pop("embeddings.mask_token"))
    backbone, whole = load(describe(f"hf:{folder}")), load(describe(f"hf:{folders[label]}"))
    pixels = images(whole, 2, 2)
    assert largest_difference(backbone(pixels), whole(pixels)) == 0


def test_file_of_an_unknown_number_type(tmp_path: Path) -> None:
    header = json.dumps({"norm.bias": {"dtype": "F7", "shape": [2], "data_offsets": [0, 8]}}).encode()
    file = tmp_path / "odd.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(
        WeightsError, match=r"odd\.safetensors: tensor norm\.bias has the type F7; it must be one of F64"
    ):
        load(describe("tiny", weights=file))


def test_loading_is_silent_and_leaves_settings(
    capsys: pytest.CaptureFixture[str], folders: dict[str, Path], tmp_path: Path
) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    folder = edited(folders["dinov3"], tmp_path / "edited", lambda t: t.pop("norm.bias"))
    capsys.readouterr()
    load(describe(f"hf:{folders['dinov3']}"))
    with pytest.raises(WeightsError, match="missing"):
        load(describe(f"hf:{folder}"))
    assert capsys.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
