"""Committed rows computed again: what agrees, what does not, and images that are no longer the same."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from pictures import register_pictures

from cli import exchange
from featstore import files
from featstore.backbones.tiny import FOLDER
from featstore.configs import RunConfig, SetConfig
from featstore.errors import (
    ConfigError,
    CorruptError,
    IncompleteError,
    ManifestError,
    MissingWeightsError,
    WeightsError,
)
from featstore.extraction.pipeline import extract
from featstore.extraction.plan import make_plan
from featstore.extraction.recheck import Recheck, find_backbone, preprocessing, recheck
from featstore.store.catalog import Store
from featstore.store.importer import import_features
from featstore.store.shards import ShardWriter

RUN = RunConfig(batch_size=8, workers=1, device="cpu")
TINY = SetConfig(model="tiny", res="42", block_rows=16)


def make(store: Path, root: Path, config: SetConfig = TINY, count: int = 20) -> None:
    register_pictures(store, root, count)
    extract(make_plan(Store(store), "pics", config, RUN), RUN)


def check(store: Path, name: str = "pics/tiny@42", run: RunConfig = RUN, **options: object) -> Recheck:
    return recheck(Store(store).set(name), run, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        SetConfig(model="tiny", res="42", tokens="cls,registers,patches", layers="2", dtype="bfloat16"),
        SetConfig(model="tiny-random", res="42", geometry="letterbox", compute_dtype="bfloat16"),
        SetConfig(model="tiny", res="56", random_weights=3, name="noise"),
        SetConfig(model="tiny", res="42", tokens="cls,patches", reduce="pool2,int8"),
        SetConfig(model="tiny", res="42", tokens="patches", reduce="pca:4"),
    ],
    ids=["plain", "bfloat16", "random", "seed", "int8", "pca"],
)
def test_what_was_extracted_is_found_again(tmp_path: Path, config: SetConfig) -> None:
    make(tmp_path / "store", tmp_path / "data", config)
    seen: list[int] = []
    (name,) = Store(tmp_path / "store").sets()
    found = check(tmp_path / "store", name, rows=5, run=RunConfig(batch_size=2, device="cpu"), advance=seen.append)
    assert found.ok
    assert (found.sampled, seen, found.changed, found.device) == (5, [2, 2, 1], {}, "cpu")
    assert {array.name for array in found.arrays} == set(Store(tmp_path / "store").set(name).arrays)
    assert all(array.rows == 5 and array.max_relative <= array.tolerance for array in found.arrays)


def test_the_sample_is_seeded_and_bounded(tmp_path: Path) -> None:
    make(tmp_path / "store", tmp_path / "data")
    (tmp_path / "data" / "images" / "00003.png").write_bytes(b"no image")
    found = check(tmp_path / "store", rows=1000)
    assert found.sampled == 20
    assert found.changed == {"images/00003.png": found.changed["images/00003.png"]}
    seen = [set(check(tmp_path / "store", rows=19, seed=seed).changed) for seed in range(6)]
    assert seen == [set(check(tmp_path / "store", rows=19, seed=seed).changed) for seed in range(6)]
    with pytest.raises(ConfigError, match="--rows must be at least 1 and --seed at least 0, got 0 and 0"):
        check(tmp_path / "store", rows=0)


def damage(store: Path, row: int) -> None:
    """Replace the first shard by a whole one in which a row holds other numbers."""
    shard = Store(store).entry("pics/tiny").folder / "data.zarr" / "cls" / "c" / "0" / "0"
    array = Store(store)["pics/tiny"].ledger.arrays["cls"]
    values = Store(store)["pics/tiny"].cls.stored.read(0, 16)
    values[row] *= np.float16(1.1)
    shard.unlink()
    with ShardWriter(
        shard,
        row_shape=array.row_shape,
        dtype=array.dtype,
        chunk_rows=array.chunk_rows,
        shard_rows=array.shard_rows,
    ) as writer:
        writer.append(values)


def test_other_numbers_are_found_and_named(tmp_path: Path) -> None:
    make(tmp_path / "store", tmp_path / "data")
    damage(tmp_path / "store", 7)
    found = check(tmp_path / "store", rows=20)
    assert not found.ok
    cls = next(array for array in found.arrays if array.name == "cls")
    assert (cls.worst, cls.ok, cls.tolerance) == ("images/00007.png", False, 5e-3)
    assert cls.max_relative == pytest.approx(0.1 / 1.1, rel=0.05)
    assert all(array.ok for array in found.arrays if array.name != "cls")


def test_changed_images_are_told_as_such(tmp_path: Path) -> None:
    make(tmp_path / "store", tmp_path / "data")
    images = tmp_path / "data" / "images"
    (images / "00001.png").unlink()
    with open(images / "00002.png", "ab") as file:
        file.write(b"more")
    raw = bytearray((images / "00004.png").read_bytes())
    facts = (images / "00004.png").stat()
    raw[-20] ^= 1  # size and time stay
    (images / "00004.png").write_bytes(raw)
    os.utime(images / "00004.png", ns=(facts.st_atime_ns, facts.st_mtime_ns))
    os.utime(images / "00005.png")  # touched: the bytes are the same
    found = check(tmp_path / "store", rows=20)
    size = facts.st_size
    assert found.changed == {
        "images/00001.png": "the file is gone",
        "images/00002.png": found.changed["images/00002.png"],
        "images/00004.png": "the file holds other bytes than were embedded, of the same number",
    }
    assert size
    assert "when it was registered" in found.changed["images/00002.png"]
    assert not found.ok
    assert all(array.ok and array.rows == 17 for array in found.arrays)


def test_bytes_that_do_not_decode_any_more_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from featstore.errors import DecodeError
    from featstore.extraction import loader
    from featstore.images.decoded import Opened

    make(tmp_path / "store", tmp_path / "data", count=4)

    def refuse(data: bytes, path: Path) -> Opened:
        raise DecodeError("not today")

    monkeypatch.setattr(loader, "open_bytes", refuse)
    found = check(tmp_path / "store")
    assert set(found.changed.values()) == {"the same bytes cannot be decoded any more: not today"}
    assert len(found.changed) == 4


def test_nothing_committed_is_told(tmp_path: Path) -> None:
    make(tmp_path / "store", tmp_path / "data", count=4)
    for marker in Store(tmp_path / "store").entry("pics/tiny").folder.glob("commits/*/*.json"):
        marker.unlink()
    with pytest.raises(IncompleteError, match="no row is committed, so there is nothing to check; run extract first"):
        check(tmp_path / "store")


def test_imported_sets_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "f.npz", features=np.ones((3, 2), np.float32), id=np.array(["a", "b", "c"]))
    import_features(tmp_path / "store", tmp_path / "f.npz", dataset="x", model="m")
    with pytest.raises(ConfigError, match="x/m holds imported features, which no backbone here can compute again"):
        check(tmp_path / "store", "x/m")


def test_weights_must_be_those_of_the_set(tmp_path: Path) -> None:
    make(tmp_path / "store", tmp_path / "data", count=4)
    spec = Store(tmp_path / "store").entry("pics/tiny").spec
    other = {**spec, "identity": {**spec["identity"], "weights": "0" * 64}}
    with pytest.raises(WeightsError, match=r"are not those of pics/tiny: weights differ; give the right ones by"):
        find_backbone(other, None, None)
    gone = {
        **spec,
        "weights": {**spec["weights"], "kind": "local"},
        "request": {"model": "tiny", "weights": str(tmp_path / "gone"), "res": "42"},
    }
    with pytest.raises(MissingWeightsError, match=r"weights from local files, and .*gone is not there; give --weights"):
        find_backbone(gone, None, None)
    assert find_backbone(gone, FOLDER, None).identity["weights"] == spec["identity"]["weights"]


@pytest.mark.parametrize("kind", ["function", "bundled"])
def test_code_that_a_store_names_runs_only_when_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    make(tmp_path / "store", tmp_path / "data", count=4)
    folder = Store(tmp_path / "store").entry("pics/tiny").folder
    spec = files.unseal((folder / "spec.json").read_bytes(), folder / "spec.json")
    weights = {**spec["weights"], "kind": kind} | ({"function": "boom_net:boom"} if kind == "function" else {})
    (folder / "spec.json").write_bytes(
        files.sealed({**spec, "weights": weights, "request": {**spec["request"], "model": "boom_net:boom"}})
    )
    (tmp_path / "boom_net.py").write_text("def boom(**_):\n    raise SystemExit(3)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = [*sys.path]
    for given in (None, FOLDER, Path("other_net:boom")):
        with pytest.raises(
            ConfigError, match=r"pics/tiny was made by the function boom_net:boom, whose code runs only"
        ):
            exchange.recheck("pics/tiny", weights=given, device="cpu", store=str(tmp_path / "store"))
    assert sys.path == before
    assert "boom_net" not in sys.modules
    with pytest.raises(SystemExit):
        exchange.recheck("pics/tiny", weights=Path("boom_net:boom"), device="cpu", store=str(tmp_path / "store"))
    del sys.modules["boom_net"]


def test_other_preprocessing_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "store", tmp_path / "data", count=4)
    held = Store(tmp_path / "store").entry("pics/tiny").spec["identity"]["preprocess"]
    assert preprocessing(held).as_dict() == held
    with pytest.raises(ConfigError, match="preprocessing differs from this version's in implementation; recheck with"):
        preprocessing({**held, "implementation": 0})


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "store", tmp_path / "data")
    store = str(tmp_path / "store")
    exchange.recheck("pics/tiny", rows=3, device="cpu", store=store)
    printed = capsys.readouterr().out
    assert printed.startswith("pics/tiny@42: 3 rows computed again on cpu, seed 0\n  cls: ok, largest relative")
    exchange.recheck("pics/tiny", rows=3, device="cpu", store=store, json=True)
    assert json.loads(capsys.readouterr().out)["ok"] is True
    (tmp_path / "data" / "images" / "00003.png").unlink()
    with pytest.raises(ManifestError, match="1 of 20 files are not what was embedded; run `featstore register` again"):
        exchange.recheck("pics/tiny", rows=20, device="cpu", store=store)
    assert "images/00003.png: the file is gone" in capsys.readouterr().out
    damage(tmp_path / "store", 7)
    with pytest.raises(CorruptError, match="stored rows are not what this machine computes; `featstore verify --deep`"):
        exchange.recheck("pics/tiny", rows=20, device="cpu", store=store)
    assert "cls: TOO FAR" in capsys.readouterr().out
