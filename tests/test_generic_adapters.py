"""Generic families: COCO's JSON, image and mask folders, and files that hold many pictures in tables and folders."""

import io
import json
import zipfile
from pathlib import Path

import nibabel
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from miniatures import generic
from PIL import Image

from featstore.configs import Frames, RegisterConfig
from featstore.datasets import coco, folder, image_masks, table
from featstore.datasets.expand import expand
from featstore.datasets.manifest import build
from featstore.datasets.source import Source
from featstore.errors import ConfigError, ManifestError
from featstore.images.masks import read_mask
from featstore.images.opening import OpenFiles
from featstore.inputs import Inputs
from probes.roles import assign_roles, group_of, split_of
from probes.taskspec import TaskSpec


def png(level: int, size: tuple[int, int] = (6, 8)) -> bytes:
    sink = io.BytesIO()
    Image.new("L", size, level).save(sink, "PNG")
    return sink.getvalue()


def volume(path: Path, slices: int = 5) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 6, slices), np.int16), np.eye(4)), path)


def test_coco_categories_are_labels_and_files_are_splits(tmp_path: Path) -> None:
    generic.coco(tmp_path)
    source = coco.read(tmp_path)
    assert source.label_columns == ("tube", "opacity")  # by id
    assert source.mask_classes == ("background", "tube", "opacity")
    rows = source.table.to_pylist()
    assert {row["path"].split("/")[0]: row["split"] for row in rows} == {
        "train2017": "train",
        "val2017": "val",
        "test2017": "test",
    }
    first = next(row for row in rows if row["path"].endswith("train2017/000000000002.jpg"))
    assert (first["opacity"], first["tube"], first["mask_part"]) == ("1", "1", "draw=coco:2")
    assert json.loads(first["boxes"]) == [[10, 5, 20, 20, "opacity"]]


def test_coco_without_split_names_is_split_by_seed(tmp_path: Path) -> None:
    generic.coco(tmp_path)
    names = sorted((tmp_path / "annotations").iterdir())
    names[0].rename(tmp_path / "mine.json")
    source = coco.read(tmp_path, annotations="mine.json")
    assert source.split_origin == "seeded by image, 70/10/20, seed 0"
    assert source.table.num_rows == 10


def test_coco_errors(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"images": 3}')
    with pytest.raises(ManifestError, match="has no JSON with images, annotations and categories"):
        coco.read(tmp_path)
    with pytest.raises(ManifestError, match=r"--option annotations: .*z\.json does not exist below the root"):
        coco.read(tmp_path, annotations="z.json")
    (tmp_path / "x.json").unlink()
    generic.coco(tmp_path)
    path = tmp_path / "annotations/instances_val2017.json"
    document = json.loads(path.read_text())
    (tmp_path / "copy_val.json").write_text(json.dumps(document))
    with pytest.raises(ManifestError, match="10 images stand more than once in the JSON files"):
        coco.read(tmp_path)
    (tmp_path / "copy_val.json").write_text(json.dumps({**document, "categories": [{"id": 1, "name": "x"}]}))
    with pytest.raises(ManifestError, match=r"has other categories than .*; register them one by one"):
        coco.read(tmp_path)
    (tmp_path / "copy_val.json").write_text(json.dumps({**document, "categories": [{"id": 1}]}))
    with pytest.raises(ManifestError, match="a category must have an id and a name"):
        coco.read(tmp_path, annotations="copy_val.json")
    (tmp_path / "copy_val.json").write_text(json.dumps({**document, "annotations": [{"image_id": 999}]}))
    with pytest.raises(ManifestError, match="images need id and file_name, annotations the image_id and category_id"):
        coco.read(tmp_path, annotations="copy_val.json")


def test_image_masks_pair_by_name(tmp_path: Path) -> None:
    generic.image_masks(tmp_path)
    source = image_masks.read(tmp_path)
    rows = {row["file"]: row for row in source.table.to_pylist()}
    assert rows["a/3"]["mask_path"] == "masks/a/3_mask.png"
    assert rows["a/5"]["mask_path"] is None
    assert "1 images have no mask" in source.notes
    assert image_masks.read(tmp_path, values="255:1").table["mask_part"].to_pylist()[0] == "values=255:1"


def test_image_masks_of_volumes_go_slice_by_slice(tmp_path: Path) -> None:
    volume(tmp_path / "train/images/a.nii.gz")
    volume(tmp_path / "train/masks/a_seg.nii.gz")
    volume(tmp_path / "test/images/b.nii", slices=2)
    source = image_masks.read(tmp_path, values="1")
    rows = source.table.to_pylist()
    assert [row["split"] for row in rows] == ["test"] * 2 + ["train"] * 5
    assert rows[4]["part"] == "axis=axial&index=2"
    assert rows[4]["mask_part"] == "axis=axial&index=2&values=1"
    assert rows[4]["volume"] == "train/images/a.nii.gz"
    assert [row["z"] for row in rows] == [0, 1, 0, 1, 2, 3, 4]


def test_image_masks_errors(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="has no images in a folder called 'images'; name it by --option images="):
        image_masks.read(tmp_path)
    generic.image_masks(tmp_path)
    with pytest.raises(ManifestError, match="no file in a folder called 'other' has the name of an image"):
        image_masks.read(tmp_path, masks="other")
    (tmp_path / "masks/a/3.png").write_bytes(png(1))
    with pytest.raises(ManifestError, match=r"are masks of one image; keep one"):
        image_masks.read(tmp_path)


def test_a_folder_with_an_archive_reads_it_in_place(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "cxr.zip", "w") as archive:
        for name in ("train/sick/a.png", "test/well/b.png", "train/readme.txt", "__MACOSX/._a.png"):
            archive.writestr(name, png(3))
    (tmp_path / "train/well").mkdir(parents=True)
    (tmp_path / "train/well/c.png").write_bytes(png(4))
    source = folder.read(tmp_path)
    assert [(row["path"], row["label"], row["split"]) for row in source.table.to_pylist()] == [
        ("cxr.zip!/test/well/b.png", "well", "test"),
        ("cxr.zip!/train/sick/a.png", "sick", "train"),
        ("train/well/c.png", "well", "train"),
    ]


def test_a_folder_takes_dicom_without_suffix_by_its_mark(tmp_path: Path) -> None:
    (tmp_path / "IM0001").write_bytes(bytes(128) + b"DICM")
    (tmp_path / "LICENSE").write_text("text")
    (tmp_path / "short").write_bytes(b"x")
    assert folder.find_images(tmp_path) == ["IM0001"]


def test_frames_first_and_all(tmp_path: Path) -> None:
    pages = [Image.new("L", (4, 4), level) for level in (1, 2, 3)]
    pages[0].save(tmp_path / "p.tif", save_all=True, append_images=pages[1:])
    volume(tmp_path / "v.nii.gz")
    (tmp_path / "x.png").write_bytes(png(1))
    paths = ["p.tif", "v.nii.gz", "x.png", "gone.nii"]
    assert expand(tmp_path, paths, None).rows == [0, 1, 1, 1, 1, 1, 2, 3]
    everything = expand(tmp_path, paths, "all")
    assert everything.rows == [0, 0, 0, 1, 1, 1, 1, 1, 2, 3]
    assert everything.parts[:4] == ["frame=0", "frame=1", "frame=2", "axis=axial&index=0"]
    assert everything.unread == 1
    first = expand(tmp_path, paths, "first")
    assert first.rows == [0, 1, 2, 3]
    assert first.parts == [None, "axis=axial&index=0", None, None]
    assert not expand(tmp_path, ["x.png"], "all").any


def test_a_table_of_volumes_has_a_row_for_each_slice(tmp_path: Path) -> None:
    volume(tmp_path / "a.nii.gz", 3)
    volume(tmp_path / "b.nii.gz", 2)
    volume(tmp_path / "b_mask.nii.gz", 2)
    (tmp_path / "t.csv").write_text("path,label,patient,mask\na.nii.gz,1,p,\nb.nii.gz,0,q,b_mask.nii.gz\n")
    source = table.read(
        tmp_path, table=Path("t.csv"), label_columns=("label",), group_column="patient", mask_column="mask"
    )
    rows = source.table.to_pylist()
    assert [(row["id"], row["label"], row["group"], row["z"]) for row in rows[2:4]] == [
        ("a.nii.gz#axis=axial&index=2", "1", "p", 2),
        ("b.nii.gz#axis=axial&index=0", "0", "q", 0),
    ]
    assert rows[0]["mask_path"] is None
    assert (rows[4]["mask_path"], rows[4]["mask_part"]) == ("b_mask.nii.gz", "axis=axial&index=1")


def test_a_parquet_column_of_images_is_read_in_place(tmp_path: Path) -> None:
    images = [{"bytes": png(level), "path": f"{level}.png"} for level in (1, 2, 3)]
    pq.write_table(pa.table({"image": images, "label": ["0", "1", "0"]}), tmp_path / "part.parquet")
    source = table.read(tmp_path, table=Path("part.parquet"), path_column="image", label_columns=("label",))
    assert source.table["path"].to_pylist() == [f"part.parquet!/image/{row}" for row in range(3)]
    assert "image" not in source.table.column_names
    (tmp_path / "inner").mkdir()
    with pytest.raises(ManifestError, match=r"holds the images themselves, so .* must lie below the root"):
        table.read(tmp_path / "inner", table=tmp_path / "part.parquet", path_column="image")


def test_frames_are_for_tables_and_folders() -> None:
    with pytest.raises(ConfigError, match="--frames all: the adapter 'msd' knows its own samples; leave it out"):
        RegisterConfig(frames="all").options("msd")


# masks of stacks


def tiff(path: Path, levels: tuple[int, ...]) -> str:
    pages = [Image.new("L", (4, 4), level) for level in levels]
    pages[0].save(path, save_all=True, append_images=pages[1:])
    return path.name


def nifti(path: Path, sides: tuple[int, ...], affine: np.ndarray | None = None) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = np.broadcast_to(np.arange(sides[2], dtype=np.uint8)[:, None] if sides[3:] else np.arange(sides[2]), sides)
    nibabel.save(nibabel.Nifti1Image(data.astype(np.uint8), np.eye(4) if affine is None else affine), path)
    return path.name


def one_row(root: Path, image: str, mask: str, frames: Frames | None = None) -> Source:
    (root / "t.csv").write_text(f"path,mask\n{image},{mask}\n")
    return table.read(root, table=Path("t.csv"), mask_column="mask", frames=frames)


def mask_levels(source: Source) -> list[list[int]]:
    """The values of the mask of each row."""
    inputs, opened = Inputs(source.root), OpenFiles()
    names = source.table.column_names
    parts = source.table["mask_part"].to_pylist() if "mask_part" in names else [None] * source.table.num_rows
    found = [read_mask(inputs, opened, *pair) for pair in zip(source.table["mask_path"].to_pylist(), parts)]
    opened.close()
    return [np.unique(mask).tolist() for mask in found]


def test_pages_of_a_mask_stack_go_with_the_pages_of_their_image(tmp_path: Path) -> None:
    image, mask = tiff(tmp_path / "i.tif", (9, 8, 7, 6)), tiff(tmp_path / "m.tif", (0, 1, 2, 3))
    assert mask_levels(one_row(tmp_path, image, mask, "all")) == [[0], [1], [2], [3]]
    assert mask_levels(one_row(tmp_path, image, mask)) == [[0]]  # the first of both
    gif = tmp_path / "m.gif"
    frames = [Image.new("L", (4, 4), level) for level in (0, 1, 2, 3)]
    frames[0].save(gif, save_all=True, append_images=frames[1:])
    assert one_row(tmp_path, image, "m.gif", "all").table["mask_part"].to_pylist() == [f"frame={n}" for n in range(4)]


def test_a_mask_of_one_picture_serves_every_slice(tmp_path: Path) -> None:
    image = nifti(tmp_path / "v.nii.gz", (4, 4, 3))
    (tmp_path / "m.png").write_bytes(png(2, (4, 4)))
    assert mask_levels(one_row(tmp_path, image, "m.png")) == [[2], [2], [2]]
    assert mask_levels(one_row(tmp_path, image, tiff(tmp_path / "m.tif", (5,)))) == [[5]] * 3
    assert mask_levels(one_row(tmp_path, image, nifti(tmp_path / "m.nii.gz", (4, 4, 1)))) == [[0]] * 3


def test_a_mask_with_another_number_of_slices_is_refused(tmp_path: Path) -> None:
    image = nifti(tmp_path / "v.nii.gz", (4, 4, 4))
    for mask in (nifti(tmp_path / "m.nii.gz", (4, 4, 8)), tiff(tmp_path / "m.tif", (0,) * 8)):
        with pytest.raises(
            ManifestError, match=r"v.nii.gz has 4 pictures to pair and its mask m.* has 8; they must be"
        ):
            one_row(tmp_path, image, mask)
    (tmp_path / "p.png").write_bytes(png(1))
    with pytest.raises(ManifestError, match=r"p.png has 1 pictures to pair and its mask m.nii.gz has 8"):
        one_row(tmp_path, "p.png", "m.nii.gz")
    with pytest.raises(ManifestError, match=r"its mask m.zip!/m.tif lies in an archive.*; unpack it"):
        one_row(tmp_path, image, "m.zip!/m.tif")


def test_a_channel_of_a_4d_image_is_none_of_its_3d_mask(tmp_path: Path) -> None:
    image, mask = nifti(tmp_path / "v.nii.gz", (4, 4, 3, 2)), nifti(tmp_path / "m.nii.gz", (4, 4, 3))
    source = one_row(tmp_path, image, mask)
    assert source.table["part"].to_pylist()[3] == "axis=axial&index=0&channel=1"
    assert source.table["mask_part"].to_pylist() == [f"axis=axial&index={z}" for z in (0, 1, 2, 0, 1, 2)]
    assert mask_levels(source) == [[0], [1], [2]] * 2


def test_mask_volumes_on_another_grid_are_not_used(tmp_path: Path) -> None:
    image = nifti(tmp_path / "images/a.nii.gz", (4, 4, 3))
    nifti(tmp_path / "images/b.nii.gz", (4, 4, 3))
    nifti(tmp_path / "masks/a.nii.gz", (4, 4, 3), np.diag([1.0, 1, -1, 1]))
    nifti(tmp_path / "masks/b.nii.gz", (4, 4, 3))
    source = image_masks.read(tmp_path, values="1")
    assert source.table["mask_path"].to_pylist() == [None] * 3 + ["masks/b.nii.gz"] * 3
    assert source.table["mask_part"].to_pylist()[3:] == [f"axis=axial&index={z}&values=1" for z in range(3)]
    assert any(note.startswith("1 masks lie on another grid than their volume by the headers") for note in source.notes)
    source = one_row(tmp_path, f"images/{image}", f"masks/{image}|masks/b.nii.gz")
    assert set(source.table["mask_path"].to_pylist()) == {"masks/b.nii.gz"}
    nifti(tmp_path / "masks/a.nii.gz", (5, 4, 3))
    assert one_row(tmp_path, f"images/{image}", "masks/a.nii.gz").table["mask_path"].null_count == 3


def test_a_numpy_image_takes_the_slices_of_a_nifti_mask_in_order(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((3, 4, 4), np.int16))
    source = one_row(tmp_path, "a.npy", nifti(tmp_path / "m.nii.gz", (4, 4, 3)))
    assert mask_levels(source) == [[0], [1], [2]]


def test_masks_that_cannot_be_opened_stop_no_other(tmp_path: Path) -> None:
    image = nifti(tmp_path / "v.nii.gz", (4, 4, 3))
    (tmp_path / "bad.nii.gz").write_bytes(b"no volume")
    for mask in ("bad.nii.gz", "gone.nii.gz"):
        source = one_row(tmp_path, image, mask)
        assert source.table["mask_path"].null_count == 3
        assert "1 masks of stacks could not be opened and are not used" in source.notes
    assert one_row(tmp_path, "bad.nii.gz", image).table["mask_path"].to_pylist() == [image]


def test_of_a_nifti_pair_the_header_is_the_sample(tmp_path: Path) -> None:
    for name in ("well/a", "sick/b"):
        (tmp_path / name).parent.mkdir()
        pair = nibabel.Nifti1Pair(np.zeros((4, 4, 3), np.int16), np.eye(4))
        nibabel.save(pair, tmp_path / f"{name}.hdr")
    (tmp_path / "well/scene.hdr").write_text("ENVI\n")
    (tmp_path / "well/gone.hdr").symlink_to(tmp_path / "nowhere")
    source = folder.read(tmp_path)
    assert list(dict.fromkeys(source.table["path"].to_pylist())) == ["sick/b.hdr", "well/a.hdr"]
    assert source.table["part"].to_pylist() == [f"axis=axial&index={z}" for z in range(3)] * 2
    source = one_row(tmp_path, "well/a.hdr", "sick/b.hdr")
    assert source.table["mask_part"].to_pylist() == [f"axis=axial&index={z}" for z in range(3)]
    assert mask_levels(source) == [[0]] * 3


# groups


def test_names_are_taken_without_the_blanks_around_them(tmp_path: Path) -> None:
    for number in range(6):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    rows = [f"{n}.png,P{n // 2}{' ' * (n % 2)}, s{n // 2},i{n}{' ' * (n % 2)}" for n in range(6)]
    (tmp_path / "t.csv").write_text("\n".join(["path,patient,study,name", *rows]) + "\n")
    source = table.read(tmp_path, table=Path("t.csv"), group_column="patient", study_column="study", id_column="name")
    assert source.table["group"].to_pylist() == ["P0", "P0", "P1", "P1", "P2", "P2"]
    assert source.table["source_study"].to_pylist()[0] == " s0"  # the column itself stays as it is
    assert [note.partition(":")[0] for note in source.notes] == ["column 'name'", "column 'patient'", "column 'study'"]
    assert source.notes[0].endswith("3 values had blanks around them, which are not part of the name")
    (tmp_path / "t.csv").write_text("path,name\n0.png,a\n1.png,a \n")
    source = table.read(tmp_path, table=Path("t.csv"), id_column="name")
    with pytest.raises(ManifestError, match="ids must be unique; 1 occur more than once, such as a"):
        build("d", source)
    (tmp_path / "t.csv").write_text("path,name\n0.png,a\n1.png, \n")
    with pytest.raises(ManifestError, match="every sample needs an id; row 2 has none"):
        build("d", table.read(tmp_path, table=Path("t.csv"), id_column="name"))


def roles_by_volume(source: Source) -> tuple[dict[str, set[str]], tuple[str, ...]]:
    manifest, spec = build("d", source), TaskSpec(name="t", labels=("label",))
    split, notes = split_of(manifest, spec)
    role, _ = assign_roles(split, group_of(manifest), spec, np.ones(len(manifest), bool))
    found: dict[str, set[str]] = {}
    for name, part in zip(manifest.place("volume"), role):
        found.setdefault(name, set()).add(str(part))
    return found, notes


def test_slices_of_one_volume_never_train_and_select(tmp_path: Path) -> None:
    lines = ["path,label,part_of"]
    for number in range(12):
        volume(tmp_path / f"{('train', 'test')[number % 4 == 3]}/{'ab'[number % 2]}/{number}.nii.gz", 10)
        path = next(tmp_path.glob(f"*/*/{number}.nii.gz")).relative_to(tmp_path)
        lines.append(f"{path},{number % 2},{path.parts[0]}")
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    for source in (folder.read(tmp_path), table.read(tmp_path, table=Path("t.csv"), split_column="part_of")):
        found, notes = roles_by_volume(source)
        assert len(found) == 12
        assert {len(parts) for parts in found.values()} == {1}
        assert {part for parts in found.values() for part in parts} == {"train", "val", "test"}
        assert notes == ()


def test_rows_of_one_file_are_split_together(tmp_path: Path) -> None:
    volume(tmp_path / "a.nii.gz", 2)
    rows = "".join(f"a.nii.gz,i{number}\n" for number in range(40))
    (tmp_path / "t.csv").write_text("path,name\n" + rows)
    source = table.read(tmp_path, table=Path("t.csv"), id_column="name")
    assert len(set(source.table["split"].to_pylist())) == 1
