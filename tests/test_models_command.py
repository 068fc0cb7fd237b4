"""`featstore models`: the list, and everything about one backbone; names that imports may not take."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cli.backbones import models
from cli.exchange import import_
from featstore import files
from featstore.backbones import BACKBONES, canonical_name, describe
from featstore.backbones.catalogue import explain_model, list_models, owners
from featstore.errors import ConfigError, UnknownNameError
from featstore.pretraining import CORPORA
from featstore.store.catalog import Store
from featstore.store.importer import import_features
from featstore.store.kinds import check_kind

ROOT = Path(__file__).resolve().parent.parent


def test_every_backbone_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    rows = list_models()
    assert [row["model"] for row in rows] == list(BACKBONES)
    assert all(row["licence"] != "not stated" and row["embed_dim"] > 0 for row in rows)
    models(json=True)
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(rows))
    models()
    text = capsys.readouterr().out
    assert "facebook/dinov3-vit7b16-pretrain-lvd1689m (gated)" in text
    assert "6716.0 M" in text


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_is_explained(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    facts = explain_model(name)
    assert facts["extract"].startswith(f"featstore extract --dataset NAME --model {name} --res ")
    assert (facts["fetch"] is None) == name.startswith("tiny")
    assert all(canonical_name(alias) in (name, "tiny") for alias in facts["aliases"])
    assert [item for item in facts["pretraining"] if not item["source"]] == []
    models(name)
    assert f"model: {name}\n" in capsys.readouterr().out
    models(name, json=True)
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(facts))


def test_what_is_said_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    models("facebook/dinov3-vit7b16-pretrain-lvd1689m")
    lines = capsys.readouterr().out.splitlines()
    for line in (
        "model: dinov3-7b",
        "also: dinov3_vit7b16, facebook/dinov3-vit7b16-pretrain-lvd1689m",
        "weights: facebook/dinov3-vit7b16-pretrain-lvd1689m (gated: accept the licence on its page first)",
        "cls: 4096 numbers, a token of the network",
        "patches: 4096 numbers for each 16 x 16 pixels",
        "registers: 4",
        "sizes: multiples of 16; native 224 x 224",
        "mean, std: 0.485, 0.456, 0.406; 0.229, 0.224, 0.225",
        "norm: tokens after the last norm (the default; --norm none for before)",
        "layers: 1 to 40",
        f"  LVD-1689M: {CORPORA['LVD-1689M'].source}",
        "fetch: featstore fetch dinov3-7b",
        "extract: featstore extract --dataset NAME --model dinov3-7b --res 512",
    ):
        assert line in lines
    models("dinov2-base")
    assert "pos-interp: hf | meta" in capsys.readouterr().out
    models("vit-large")
    assert "before the last norm (the default; --norm final for after)" in capsys.readouterr().out
    models("sam-large")
    text = capsys.readouterr().out
    assert "sizes: 1024 x 1024 only" in text
    assert "pooled by the network" in text
    with pytest.raises(UnknownNameError, match="unknown backbone 'dinov3-8b'; did you mean dinov3-7b") as caught:
        models("dinov3-8b")
    assert "? `featstore models` lists all; or give hf:DIR_OR_ID, timm:NAME or module:function" in str(caught.value)
    assert "known: " not in str(caught.value)
    with pytest.raises(UnknownNameError, match="'dinov2'; did you mean dinov2-small or dinov2-base or dinov2-large or"):
        models("dinov2")
    with pytest.raises(UnknownNameError, match=r"'qqqq'; known: dinov2-small, .*, tiny-random; or give hf:DIR_OR_ID"):
        models("qqqq")


def test_what_is_said_of_places(capsys: pytest.CaptureFixture[str]) -> None:
    models("hf:facebook/dinov2-base")
    assert "model: dinov2-base\n" in capsys.readouterr().out
    for place in ("hf:foo/bar", "timm:resnet50", "nets:make"):
        with pytest.raises(
            ConfigError, match=rf"{place}: only networks that have a name here .*--model {place} --dry-run"
        ):
            models(place)


@pytest.mark.parametrize("name", BACKBONES)
def test_advice_on_norms_can_be_followed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    models(name)
    text = capsys.readouterr().out
    assert "also: \n" not in text
    advised = re.findall(r"--norm (\w+)", text)
    for way in advised:
        assert (
            describe(name, norm=way, random_weights=None if name == "tiny-random" else 0).architecture
            != describe(name, random_weights=None if name == "tiny-random" else 0).architecture
        )
    assert (advised == []) == (explain_model(name)["norms"] in ([], ["final"]))


def test_nothing_heavy_is_loaded() -> None:
    script = (
        "import sys\nfrom cli.backbones import models\nmodels()\nmodels('dinov3-7b')\nmodels('resnet152')\n"
        "heavy = {'torch', 'transformers', 'timm', 'huggingface_hub'} & set(sys.modules)\nassert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", script], cwd=ROOT, check=True, capture_output=True)


# Names


def features(path: Path, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    np.savez(path, features=rng.normal(size=(8, 3)).astype(np.float32), ids=np.arange(8).astype(str))
    return path


@pytest.mark.parametrize(
    ("name", "whose"),
    [
        ("tiny", "a backbone of this package"),
        ("dinov3-7b", "a backbone of this package"),
        ("DINOv2-Base", "a backbone of this package"),
        ("vit-mae-large", "another name of the backbone mae-large"),
        ("dinov2_vits14", "another name of the backbone dinov2-small"),
    ],
)
def test_imports_do_not_take_a_backbones_name(name: str, whose: str, tmp_path: Path, store_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"--name {name}: {name} is {whose}, .* such as {name}-imported"):
        import_(features(tmp_path / "f.npz"), dataset="x", name=name)
    assert not store_path.exists()


def test_imports_do_not_pass_for_random_weights(tmp_path: Path, store_path: Path) -> None:
    with pytest.raises(ConfigError, match="names that end in -random are those of random weights; choose another"):
        import_features(store_path, features(tmp_path / "f.npz"), dataset="x", model="mine-Random")
    assert not store_path.exists()


def test_every_name_of_a_backbone_is_reserved() -> None:
    names = owners()
    assert set(BACKBONES) <= set(names)
    assert names["dinov2-with-registers-base"] == "dinov2-base-reg"
    assert names["dinov3_vit7b16"] == "dinov3-7b"
    assert names["conch"] == "conch"
    assert "" not in names


def test_kinds_never_share_a_name(tmp_path: Path, store_path: Path) -> None:
    store, folder, _ = import_features(store_path, features(tmp_path / "f.npz"), dataset="x", model="mine")
    check_kind(store, "x", "mine", "imported")
    check_kind(store, "x", "mine2", "real")
    check_kind(store, "y", "mine", "real")
    with pytest.raises(ConfigError, match=r"mine: x/mine in .* holds imported features, these are of a network with"):
        check_kind(store, "x", "mine", "real")
    with pytest.raises(ConfigError, match="imported features, these are of random weights; choose another --name"):
        check_kind(store, "x", "mine", "random")
    # The same set, as if a network had made it.
    spec = files.unseal((folder / "spec.json").read_bytes(), folder / "spec.json")
    for random, said in ((True, "random weights"), (False, "a network with trained weights")):
        changed = {**spec, "weights": {**spec["weights"], "kind": "hub"}, "random_weights": random}
        (folder / "spec.json").unlink()
        (folder / "spec.json").write_bytes(files.sealed(changed))
        with pytest.raises(ConfigError, match=f"x/mine in .* holds {said}, these are of imported features"):
            import_features(store_path, features(tmp_path / "g.npz", seed=1), dataset="x", model="mine")
        with pytest.raises(ConfigError, match=f"x/mine in .* holds {said}"):
            check_kind(Store(store_path), "x", "mine", "real" if random else "random")
