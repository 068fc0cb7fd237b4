"""`featstore search`: exact neighbours against brute force, images from outside, approximate indexes, the cache."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import register_pictures
from PIL import Image
from probe_sets import write_set

import probes.ann
from cli import searching
from featstore.configs import RunConfig, SetConfig
from featstore.errors import ConfigError, DecodeError, TaskError, UnknownNameError
from featstore.extraction.pipeline import extract
from featstore.extraction.plan import make_plan
from featstore.extraction.single import embed_image
from featstore.store.catalog import Store
from probes.ann import build_ann, recall
from probes.neighbours import build_index, unit_rows
from probes.retrieval import query_row, search, stored_vector

RUN = RunConfig(batch_size=8, workers=1, device="cpu")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 pictures with a tiny set of them; the sixth cannot be decoded."""
    root = tmp_path_factory.mktemp("search")
    register_pictures(root / "store", root / "data", 40)
    bad = root / "data" / "images" / "00005.png"
    whole = bad.read_bytes()
    bad.write_bytes(b"x" * len(whole))
    shutil.copystat(root / "data" / "images" / "00004.png", bad)
    register_again(root)
    extract(make_plan(Store(root / "store"), "pics", SetConfig(model="tiny", res="42", block_rows=16), RUN), RUN)
    return root


def register_again(root: Path) -> None:
    from pictures import CONFIG

    from featstore.register import register

    register(root / "store", "pics", root / "data", CONFIG)


def ask(root: Path, capsys: pytest.CaptureFixture[str], image: str, **options: Any) -> dict[str, Any]:
    searching.search("pics/tiny@42", image, store=str(root / "store"), json=True, **options)
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_stored_sample_finds_its_neighbours(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By brute force in float64: never itself, never the failed row, and only what passes the filter."""
    fs = Store(pictures / "store").set("pics/tiny@42")
    ids, split = fs.manifest.column("id"), fs.manifest.column("split")
    for features in ("cls", "cls+mean_patch"):
        values = fs.load(features).astype(float)
        unit = values / np.linalg.norm(values, axis=1, keepdims=True)
        similarity = unit @ unit[3]
        for where, passes in (("", lambda row: True), ("split=val|test", lambda row: split[row] in ("val", "test"))):
            rows = [row for row in range(40) if row not in (3, 5) and passes(row)]
            best = sorted(rows, key=lambda row: -similarity[row])[:4]
            found = ask(pictures, capsys, "images/00003.png", k=4, where=where, features=features)
            assert [hit["id"] for hit in found["hits"]] == [ids[row] for row in best]
            assert [hit["similarity"] for hit in found["hits"]] == pytest.approx(similarity[best].tolist(), abs=1e-6)
            assert (found["searched"], found["index"], found["recall"]) == (len(rows), "exact", None)
    assert [hit["labels"] for hit in found["hits"]] == [{"kind": fs.manifest.column("kind")[row]} for row in best]


def test_an_image_goes_through_the_sets_own_backbone(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "new.png"
    shutil.copy(pictures / "data" / "images" / "00007.png", copy)
    found = ask(pictures, capsys, str(copy), k=2)
    assert found["hits"][0]["id"] == "images/00007.png"
    assert found["hits"][0]["similarity"] == pytest.approx(1, abs=1e-4)
    fs = Store(pictures / "store").set("pics/tiny@42")
    for part in ("cls", "mean_patch"):
        vector = embed_image(fs, copy, [part], RUN)
        np.testing.assert_allclose(vector, fs.array(part)[7].astype(np.float32), rtol=2e-3, atol=2e-3)
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    with pytest.raises(DecodeError):
        embed_image(fs, tmp_path / "bad.png", ["cls"], RUN)
    pages = [Image.new("L", (40, 40), shade) for shade in (10, 200)]
    pages[0].save(tmp_path / "two.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(ConfigError, match=r"two\.tif holds 2 pictures; give a file with one"):
        embed_image(fs, tmp_path / "two.tif", ["cls"], RUN)


def test_groups_are_hidden_unless_asked_for(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options: dict[str, Any] = {"store": str(pictures / "store"), "k": 3}
    searching.search("pics/tiny@42", "images/00003.png", **options)
    text = capsys.readouterr().out
    assert "images/00003.png: nearest of 38 samples of pics/tiny@42 by cls; search exact" in text
    assert "p00" not in text
    assert "group" not in ask(pictures, capsys, "images/00003.png")["hits"][0]
    searching.search("pics/tiny@42", "images/00003.png", groups=True, **options)
    assert "p00" in capsys.readouterr().out
    assert ask(pictures, capsys, "images/00003.png", groups=True)["hits"][0]["group"].startswith("p00")


@pytest.fixture
def large(tmp_path: Path, store_path: Path) -> Store:
    """900 imported rows around ten centres."""
    random = np.random.default_rng(0)
    number = np.arange(900)
    features = np.eye(10, 16)[number % 10] + 0.3 * random.standard_normal((900, 16))
    columns = {"part": ["train", "val", "test"] * 300, "a": (number % 10 == 0).astype(int).astype(str).tolist()}
    write_set(store_path, tmp_path / "x", columns, features, label_columns="a")
    return Store(store_path)


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_approximate_indexes_are_kept_and_measured(large: Store, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fs = large.set("x/m")
    query = stored_vector(fs, 4, ["cls"])
    exact = search(large, fs, query, "cls", k=10, without=4)
    built: list[str] = []
    monkeypatch.setattr("probes.retrieval.build_ann", lambda bank, kind: built.append(kind) or build_ann(bank, kind))
    first = search(large, fs, query, "cls", k=10, index=kind, without=4)
    again = search(large, fs, query, "cls", k=10, index=kind, without=4)
    other = search(large, fs, query, "cls", k=3, index=kind, without=4)
    assert (built, first.cached, again.cached, other.cached) == ([kind], False, True, True)
    assert again.hits == first.hits
    assert first.recall is not None
    assert 0.9 <= first.recall <= 1
    assert len({hit.id for hit in first.hits} & {hit.id for hit in exact.hits}) >= 9
    assert first.index.startswith(kind.upper())
    filtered = search(large, fs, query, "cls", k=10, where="part=val", index=kind, without=4)
    assert (filtered.searched, {hit.split for hit in filtered.hits}) == (299, {"val"})
    kept = sorted((large.path / "cache" / "search").iterdir())  # type: ignore[union-attr]
    assert [path.suffix for path in kept] == [".faiss", ".json"]
    kept[0].write_bytes(kept[0].read_bytes()[:200])  # type: ignore[union-attr]
    assert search(large, fs, query, "cls", k=10, index=kind, without=4).hits == first.hits
    assert built == [kind, kind]


def test_recall_is_counted_against_exact_search() -> None:
    rows = unit_rows(np.random.default_rng(0).standard_normal((3000, 24)).astype(np.float32))
    ann = build_ann(rows, "ivf")
    ann.index.nprobe = 1
    exact = build_index(rows, "torch")[0]
    found, truth = ann.search(rows[:50], 10)[1], exact.nearest(rows[:50], 10)[1]
    share = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, truth)])
    assert share < 0.95  # one list of many misses some
    assert recall(ann, exact, rows[:50], 10) == pytest.approx(share, abs=1e-9)


def test_what_is_refused(
    pictures: Path, large: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnknownNameError, match=r"gone\.png is neither an image file nor the id of a sample of pics"):
        ask(pictures, capsys, "gone.png")
    with pytest.raises(TaskError, match=r"images/00005\.png failed \(.*\) and has no embedding; ask for another"):
        ask(pictures, capsys, "images/00005.png")
    with pytest.raises(UnknownNameError, match="pics/tiny@42 has no column 'colour'; its columns: id, path"):
        ask(pictures, capsys, "images/00003.png", where="colour=red")
    with pytest.raises(TaskError, match="no embedded sample of pics/tiny@42 is left to search; check --where 'kind=q'"):
        ask(pictures, capsys, "images/00003.png", where="kind=q")
    with pytest.raises(ConfigError, match="--k must be at least 1, got 0"):
        ask(pictures, capsys, "images/00003.png", k=0)
    with pytest.raises(ConfigError, match="an IVF index needs at least 156 rows, got 39; use exact"):
        ask(pictures, capsys, "images/00003.png", index="ivf")
    fs = large.set("x/m")
    with pytest.raises(
        TaskError, match=r"features 'cls' are \(16,\) a sample and the query has 3; search takes vectors"
    ):
        search(large, fs, np.ones(3), "cls")
    assert query_row(fs, "nothing") is None

    def broken() -> None:
        raise ImportError("no such module")

    monkeypatch.setattr(probes.ann, "import_faiss", broken)
    with pytest.raises(
        ConfigError, match=r"approximate search needs FAISS, .*ImportError: no such module.* --index exact"
    ):
        search(large, fs, np.ones(16), "cls", index="hnsw")
