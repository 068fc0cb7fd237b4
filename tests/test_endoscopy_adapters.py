"""Kvasir-Capsule, EDD2020, EndoVis18 and AutoLaparo: what their files say, with their traps."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from miniatures import endoscopy
from PIL import Image

from featstore.datasets import autolaparo, edd2020, endovis, kvasir
from featstore.errors import ConfigError, ManifestError
from featstore.images.decoded import DecodeOptions
from featstore.images.masks import read_mask
from featstore.images.opening import OpenFiles
from featstore.images.part import parse_part
from featstore.images.video import open_video
from featstore.inputs import Inputs


def test_kvasir_class_names_of_the_csv_are_not_the_folders(tmp_path: Path) -> None:
    endoscopy.kvasir(tmp_path)
    table = kvasir.read(tmp_path).table
    pairs = {(label, folder) for label, folder in zip(table["label"].to_pylist(), table["folder"].to_pylist())}
    assert pairs == {*endoscopy.KVASIR.items(), (None, "Polyp")}


def test_kvasir_extension_of_the_csv_is_not_that_of_the_file(tmp_path: Path) -> None:
    endoscopy.kvasir(tmp_path)
    rows = {row["id"]: row for row in kvasir.read(tmp_path).table.to_pylist()}
    assert rows["00cafe_2"]["path"] == "labelled_images/Blood - fresh/00cafe_2.png"
    assert rows["00cafe_2"]["split"] == "train"
    assert rows["01cafe_2"]["split"] == "test"


def test_kvasir_images_outside_the_splits_stay_unused(tmp_path: Path) -> None:
    endoscopy.kvasir(tmp_path)
    source = kvasir.read(tmp_path)
    rows = [row for row in source.table.to_pylist() if row["folder"] == "Polyp"]
    assert [(row["split"], row["label"]) for row in rows] == [("", None)] * 2
    assert "2 images stand in neither split file" in source.notes


def test_kvasir_groups_are_videos_unless_they_cross(tmp_path: Path) -> None:
    endoscopy.kvasir(tmp_path)
    source = kvasir.read(tmp_path)
    assert source.groups_known
    assert source.table.to_pylist()[0]["group"] == "00cafe"
    second = tmp_path / "official_splits/split_1.csv"
    first = tmp_path / "official_splits/split_0.csv"
    line = first.read_text().splitlines()[1]
    first.write_text(first.read_text().replace(f"{line}\n", ""))
    second.write_text(f"{second.read_text()}{line}\n")
    crossed = kvasir.read(tmp_path)
    assert not crossed.groups_known
    assert "1 videos stand in both official splits; groups are taken as unknown" in crossed.notes


def test_kvasir_boxes(tmp_path: Path) -> None:
    endoscopy.kvasir(tmp_path)
    rows = {row["id"]: row["boxes"] for row in kvasir.read(tmp_path).table.to_pylist()}
    assert json.loads(rows["00cafe_1"]) == [[1, 2, 9, 2, 9, 8, 1, 8]]
    assert rows["01cafe_2"] is None


def test_kvasir_errors(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="has no images in class folders"):
        kvasir.read(tmp_path)
    endoscopy.kvasir(tmp_path)
    first, second = (tmp_path / f"official_splits/split_{number}.csv" for number in (0, 1))
    text = second.read_text()
    second.write_text(first.read_text())
    with pytest.raises(ManifestError, match=r"28 images stand in split_0\.csv and in split_1\.csv"):
        kvasir.read(tmp_path)
    second.write_text(text.replace("filename", "file"))
    with pytest.raises(ManifestError, match=r"must have the columns filename and label, got \['file', 'label'\]"):
        kvasir.read(tmp_path)
    second.unlink()
    with pytest.raises(ManifestError, match=r"has no split_1\.csv"):
        kvasir.read(tmp_path)


def test_kvasir_thumbnails_are_not_the_images(tmp_path: Path) -> None:
    endoscopy.kvasir(tmp_path)
    before = kvasir.read(tmp_path).table["path"].to_pylist()
    (tmp_path / "thumbs").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "thumbs/00cafe_1.png")
    assert kvasir.read(tmp_path).table["path"].to_pylist() == before
    (tmp_path / "labelled_images").rename(tmp_path / "images")
    with pytest.raises(ManifestError, match=r"images/Angiectasia/00cafe_1\.jpg and thumbs/00cafe_1\.png; keep one"):
        kvasir.read(tmp_path)


def test_kvasir_contradictory_rows(tmp_path: Path) -> None:
    endoscopy.kvasir(tmp_path)
    path = tmp_path / "official_splits/split_0.csv"
    path.write_text(f"{path.read_text()}00cafe_1.jpg,Angiectasia\n")  # the same again says nothing new
    kvasir.read(tmp_path)
    path.write_text(f"{path.read_text()}00cafe_1.jpg,Ulcer\n")
    with pytest.raises(ManifestError, match=r"split_0\.csv: 1 rows give an image another label than a row before"):
        kvasir.read(tmp_path)


def test_edd_passes_over_files_that_are_no_images(tmp_path: Path) -> None:
    endoscopy.edd2020(tmp_path)
    before = edd2020.read(tmp_path).table
    (tmp_path / "EDD2020_release-I_2020-01-15/masks/Thumbs.db").write_bytes(b"x")
    assert edd2020.read(tmp_path).table.equals(before)


def test_edd_copies_of_one_name(tmp_path: Path) -> None:
    endoscopy.edd2020(tmp_path)
    before = edd2020.read(tmp_path).table
    for path in ("originalImages/EDD2020_ACB0001.jpg", "masks/EDD2020_ACB0005_BE.png"):
        (tmp_path / "zz" / path).parent.mkdir(parents=True)
        Image.new("L", (4, 4)).save(tmp_path / "zz" / path)
    assert edd2020.read(tmp_path).table.equals(before)
    (tmp_path / "EDD2020_release-I_2020-01-15").rename(tmp_path / "release")
    with pytest.raises(ManifestError, match=r"release/originalImages/EDD2020_ACB0001\.jpg and zz/originalImages/"):
        edd2020.read(tmp_path)


def test_edd_one_mask_file_for_each_image_and_class(tmp_path: Path) -> None:
    endoscopy.edd2020(tmp_path)
    source = edd2020.read(tmp_path)
    row = next(row for row in source.table.to_pylist() if row["id"] == "EDD2020_ACB0005")
    base = "EDD2020_release-I_2020-01-15/masks/EDD2020_ACB0005"
    assert row["mask_path"] == f"{base}_BE.tif|{base}_HGD.tif"
    assert row["mask_part"] == "values=1|values=3"
    assert [row[name] for name in edd2020.CLASSES] == ["1", "0", "1", "0", "0"]
    assert json.loads(row["boxes"]) == [[0, 0, 12, 10, "BE"], [12, 8, 24, 18, "HGD"]]
    assert not source.groups_known
    assert source.mask_classes[3] == "HGD"


def test_edd_errors(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="has no originalImages/EDD2020_"):
        edd2020.read(tmp_path)
    endoscopy.edd2020(tmp_path)
    base = tmp_path / "EDD2020_release-I_2020-01-15"
    (base / "bbox/EDD2020_ACB0001.txt").write_text("1 2 3 4 BE\n\n1 2 x 4 BE\n")
    with pytest.raises(ManifestError, match=r"EDD2020_ACB0001\.txt line 3: a box is x1 y1 x2 y2 class"):
        edd2020.read(tmp_path)
    (base / "bbox/EDD2020_ACB0001.txt").unlink()
    Image.new("L", (2, 2)).save(base / "masks/EDD2020_ACB9999_BE.tif")
    assert "1 masks are of no image here" in edd2020.read(tmp_path).notes
    Image.new("L", (2, 2)).save(base / "masks/EDD2020_ACB0001_odd.tif")
    with pytest.raises(ManifestError, match=r"a mask ends in _CLASS, one of BE, .*; got 'odd'"):
        edd2020.read(tmp_path)


def test_endovis_split_is_by_sequence(tmp_path: Path) -> None:
    endoscopy.endovis18(tmp_path)
    source = endovis.read(tmp_path)
    table = source.table
    split = dict(zip(table["group"].to_pylist(), table["split"].to_pylist()))
    assert split == {"seq_1": "train", "seq_2": "test", "seq_3": "train", "seq_5": "test", "seq_8": ""}
    assert table["z"].to_pylist()[:3] == [0, 1, 10]
    assert table["path"].to_pylist()[0] == "miccai_challenge_2018_release_1/seq_1/left_frames/frame000.png"
    assert set(endovis.TRAIN).isdisjoint(endovis.TEST)
    assert (len(endovis.TRAIN), len(endovis.TEST)) == (11, 4)


def test_endovis_colours_become_classes(tmp_path: Path) -> None:
    endoscopy.endovis18(tmp_path)
    source = endovis.read(tmp_path)
    assert source.table["mask_part"].to_pylist()[0] == "values=00ff00:1,00ffff:2"
    assert source.mask_classes == ("background-tissue", "instrument-shaft", "instrument-clasper")
    (tmp_path / "miccai_challenge_2018_release_1/labels.json").unlink()
    plain = endovis.read(tmp_path)
    assert plain.table["mask_part"].null_count == 15
    assert "no labels.json: masks are taken as class numbers" in plain.notes


def test_endovis_other_mask_folder(tmp_path: Path) -> None:
    endoscopy.endovis18(tmp_path)
    (tmp_path / "miccai_challenge_2018_release_1/seq_1/isinet").mkdir()
    Image.new("L", (2, 2)).save(tmp_path / "miccai_challenge_2018_release_1/seq_1/isinet/frame001.png")
    source = endovis.read(tmp_path, labels="isinet")
    assert [path is not None for path in source.table["mask_path"].to_pylist()].index(True) == 1
    assert "14 frames have no mask" in source.notes


def test_endovis_isinet_masks_are_class_numbers(tmp_path: Path) -> None:
    endoscopy.endovis18(tmp_path)
    folder = tmp_path / "miccai_challenge_2018_release_1/seq_1/instrument_types"
    folder.mkdir()
    numbers = np.tile(np.arange(8, dtype=np.uint8), (8, 4))
    Image.fromarray(numbers).save(folder / "frame000.png")
    source = endovis.read(tmp_path, labels="instrument_types")
    row = source.table.to_pylist()[0]
    mask = read_mask(Inputs(source.root), OpenFiles(), row["mask_path"], row["mask_part"])
    np.testing.assert_array_equal(mask, numbers)  # labels.json would have made background of all of it
    assert source.mask_classes == ()
    assert any(note.startswith("masks of instrument_types/ are taken as class numbers") for note in source.notes)


def test_endovis_second_release_with_the_same_sequence(tmp_path: Path) -> None:
    endoscopy.endovis18(tmp_path)
    first = "miccai_challenge_2018_release_1/seq_1"
    shutil.copytree(tmp_path / first, tmp_path / "test_data/seq_1")
    with pytest.raises(ManifestError, match=f"sequence 1 lies in {first} and in test_data/seq_1"):
        endovis.read(tmp_path)


def test_endovis_errors(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"has no seq_N/left_frames/frameNNN\.png"):
        endovis.read(tmp_path)
    endoscopy.endovis18(tmp_path)
    (tmp_path / "miccai_challenge_2018_release_1/labels.json").write_text('[{"name": "x"}]')
    with pytest.raises(ManifestError, match="must be a list of objects with name, color"):
        endovis.read(tmp_path)


def test_autolaparo_labels_a_second_or_a_frame(tmp_path: Path) -> None:
    endoscopy.autolaparo(tmp_path)
    rows = autolaparo.read(tmp_path).table.to_pylist()
    by_video = {name: [row for row in rows if row["group"] == name] for name in ("01", "02")}
    for video in by_video.values():  # one file has a line a second, the other one a frame
        assert [row["part"] for row in video] == [f"frame={5 * second}" for second in range(8)]
        assert [row["phase"] for row in video] == ["1", "2", "3", "4", "5", "6", "7", "1"]
    opened = open_video(tmp_path / by_video["02"][3]["path"])
    pixels = opened.pixels(parse_part(by_video["02"][3]["part"]), DecodeOptions()).pixels
    opened.close()
    assert abs(float(pixels[:, -8:].mean()) - 120) < 4  # the picture of phase 4


def test_autolaparo_label_file_that_begins_late_is_not_shifted(tmp_path: Path) -> None:
    endoscopy.autolaparo(tmp_path)
    rows = [row for row in autolaparo.read(tmp_path).table.to_pylist() if row["group"] == "15"]
    assert [row["z"] for row in rows] == [2, 3, 4, 5, 6, 7]
    assert [row["part"] for row in rows] == [f"frame={5 * second}" for second in range(2, 8)]
    assert [row["phase"] for row in rows] == ["3", "4", "5", "6", "7", "1"]
    opened = open_video(tmp_path / rows[0]["path"])
    pixels = opened.pixels(parse_part(rows[0]["part"]), DecodeOptions()).pixels
    opened.close()
    assert abs(float(pixels[:, -8:].mean()) - 90) < 4  # the picture of phase 3


@pytest.mark.parametrize(
    ("numbers", "seconds", "frames"),
    [
        (range(1, 9), range(8), range(0, 40, 5)),  # seconds from 1
        (range(8), range(8), range(0, 40, 5)),  # seconds from 0
        (range(0, 40, 5), range(8), range(0, 40, 5)),  # frames from 0, one a second
        (range(11, 41), range(2, 8), range(10, 40, 5)),  # frames from 1, the first ten without
        ((13, 14, 15, 16, 30), (2, 3, 5), (12, 15, 29)),  # frames with gaps
        ((1, 2, 8, 9, 10), (0, 1, 7), (0, 5, 35)),  # two seconds more than the video has
    ],
)
def test_autolaparo_first_field_places_the_label(
    numbers: Sequence[int], seconds: Sequence[int], frames: Sequence[int], tmp_path: Path
) -> None:
    endoscopy.autolaparo(tmp_path)
    text = "".join(f"{number}\t{1 + number % 7}\n" for number in numbers)
    (tmp_path / "AutoLaparo_Task1/labels/label_01.txt").write_text(f"Frame\tPhase\n{text}")
    source = autolaparo.read(tmp_path)
    rows = [row for row in source.table.to_pylist() if row["group"] == "01"]
    assert [row["z"] for row in rows] == list(seconds)
    assert [row["part"] for row in rows] == [f"frame={frame}" for frame in frames]
    late = "2 labels lie behind the end of their video and are left out"
    assert (late in source.notes) == (max(numbers) == 10)


def test_autolaparo_two_files_of_one_video(tmp_path: Path) -> None:
    endoscopy.autolaparo(tmp_path)
    (tmp_path / "small").mkdir()
    (tmp_path / "small/01.mp4").write_bytes(b"")
    assert autolaparo.read(tmp_path).table["path"].to_pylist()[0] == "AutoLaparo_Task1/videos/01.mp4"
    (tmp_path / "AutoLaparo_Task1/videos/1.avi").write_bytes(b"")
    with pytest.raises(ManifestError, match=r"videos/01\.mp4 and AutoLaparo_Task1/videos/1\.avi"):
        autolaparo.read(tmp_path)


def test_autolaparo_split_is_by_video(tmp_path: Path) -> None:
    endoscopy.autolaparo(tmp_path)
    table = autolaparo.read(tmp_path).table
    split = dict(zip(table["group"].to_pylist(), table["split"].to_pylist()))
    assert split == {"01": "train", "02": "train", "11": "val", "12": "val", "15": "test", "16": "test"}


def test_autolaparo_every(tmp_path: Path) -> None:
    endoscopy.autolaparo(tmp_path)
    assert autolaparo.read(tmp_path, every=3).table["z"].to_pylist()[:3] == [0, 3, 6]
    with pytest.raises(ConfigError, match="--option every must be at least 1, got 0"):
        autolaparo.read(tmp_path, every=0)


def test_autolaparo_errors(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"has no videos/01\.mp4 with labels/label_01\.txt"):
        autolaparo.read(tmp_path)
    endoscopy.autolaparo(tmp_path)
    labels = tmp_path / "AutoLaparo_Task1/labels"
    (labels / "label_16.txt").rename(labels / "label_17.txt")
    assert any(note.startswith("2 videos or label files") for note in autolaparo.read(tmp_path).notes)
    (labels / "label_01.txt").write_text("Frame Phase\n1 1\n2 8\n")
    with pytest.raises(ManifestError, match=r"label_01\.txt line 3: expected the frame and its phase, 1 to 7"):
        autolaparo.read(tmp_path)
    (labels / "label_01.txt").write_text("Frame Phase\n1 1\n3 2\n3 2\n")
    with pytest.raises(ManifestError, match=r"label_01\.txt line 4: the frames of a label file must increase"):
        autolaparo.read(tmp_path)
