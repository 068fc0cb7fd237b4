"""Several files of one name below a root: which one counts, and what is said when that cannot be told."""

import json
from pathlib import Path

import pytest
from PIL import Image

from featstore.datasets import coco
from featstore.datasets.locate import locate
from featstore.datasets.manifest import build
from featstore.datasets.walk import by_stem
from featstore.errors import ManifestError


def test_by_stem_takes_the_documented_folder() -> None:
    assert by_stem([]) == {}
    assert by_stem(["a/1.png", "b/2.jpg"]) == {"1": "a/1.png", "2": "b/2.jpg"}
    paths = ["Images/1.jpg", "Images/1.png", "thumbs/1.png"]
    assert by_stem(paths, prefer=("/images/", r"\.png$")) == {"1": "Images/1.png"}
    assert by_stem(["images/1.png", "images/T.png"], key=str.upper) == {
        "IMAGES/1.PNG": "images/1.png",
        "IMAGES/T.PNG": "images/T.png",
    }


def test_by_stem_names_both_files_it_cannot_choose_from() -> None:
    message = r"2 names stand for more than one file, such as a/1\.png and b/1\.png; keep one of them"
    with pytest.raises(ManifestError, match=message):
        by_stem(["a/1.png", "b/1.png", "a/2.png", "b/2.png", "a/3.png"], prefer=("/images/",))


def test_locate_ranks_the_expected_path_then_the_layout(tmp_path: Path) -> None:
    for path in (
        "128px/a.png",
        "images/a.png",
        "0/b.png",
        "images_002/images/b.png",
        "1/c.png",
        "2/x/c.png",
        "0/d.png",
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    names = ["a.png", "b.png", "c.png", "d.png", "e.png"]
    expected = ["images/a.png", "images/b.png", "x/c.png", "images/d.png", "images/e.png"]
    found, notes = locate(tmp_path, names, expected, "images/<name>", prefer=r"images_[0-9]+/images/[^/]+")
    assert found == ["images/a.png", "images_002/images/b.png", "2/x/c.png", "0/d.png", "images/e.png"]
    assert notes == [
        "1 images are not below the folder; their path is images/<name>",
        "3 images lie in other folders too; those of the documented layout are taken",
    ]


def write_coco(path: Path, names: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"id": number, "file_name": name, "width": 8, "height": 8} for number, name in enumerate(names)]
    path.write_text(json.dumps({"images": images, "annotations": [], "categories": [{"id": 1, "name": "a"}]}))


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8)).save(path)


@pytest.mark.parametrize("folder", ["val", "val2017", "instances_val"])
def test_coco_base_names_that_repeat_are_told_by_their_split(folder: str, tmp_path: Path) -> None:
    for path in ("train/0001.png", f"{folder}/0001.png", "other/only.png"):
        picture(tmp_path / path)
    write_coco(tmp_path / "annotations/instances_val.json", ["0001.png", "only.png"])
    assert coco.read(tmp_path).table["path"].to_pylist() == [f"{folder}/0001.png", "other/only.png"]
    write_coco(tmp_path / "annotations/instances_train.json", ["0001.png"])
    table = coco.read(tmp_path).table
    assert dict(zip(table["path"].to_pylist(), table["split"].to_pylist())) == {
        "train/0001.png": "train",
        f"{folder}/0001.png": "val",
        "other/only.png": "val",
    }


def test_coco_base_names_that_repeat_without_a_split(tmp_path: Path) -> None:
    for path in ("one/0001.png", "two/0001.png"):
        picture(tmp_path / path)
    write_coco(tmp_path / "all.json", ["0001.png"])
    with pytest.raises(ManifestError, match=r"all\.json: an image's file_name fits one/0001\.png and two/0001\.png"):
        coco.read(tmp_path)
    write_coco(tmp_path / "all.json", ["two/0001.png"])
    assert coco.read(tmp_path).table["path"].to_pylist() == ["two/0001.png"]
    (tmp_path / "data").mkdir()
    for name in ("one", "two"):
        (tmp_path / name).rename(tmp_path / "data" / name)
    assert coco.read(tmp_path).table["path"].to_pylist() == ["data/two/0001.png"]


def test_coco_damaged_json_is_named(tmp_path: Path) -> None:
    picture(tmp_path / "train/0001.png")
    picture(tmp_path / "val/0002.png")
    write_coco(tmp_path / "val.json", ["0002.png"])
    (tmp_path / "train.json").write_text('{"images": [')
    with pytest.raises(ManifestError, match=r"train\.json is no JSON \(cut off\?\); mend or remove it"):
        coco.read(tmp_path)
    assert coco.read(tmp_path, annotations="val.json").table.num_rows == 1


def test_coco_absent_images_are_reported(tmp_path: Path) -> None:
    picture(tmp_path / "1.png")
    write_coco(tmp_path / "all.json", ["1.png", "2.png"])
    source = coco.read(tmp_path)
    with pytest.raises(ManifestError, match=r"1 of 2 files are missing under .*, such as 2\.png"):
        build("mine", source)
