"""Rows of slices: order, parts and masks of volumes, from their headers alone."""

from pathlib import Path

import nibabel
import numpy as np
import pytest
from miniatures import volumes as make
from volume_parts import pixels

from featstore.datasets.slices import (
    Volume,
    class_names,
    folds,
    measure,
    natural,
    nifti_slices,
    read_cfg,
    read_json,
    stem,
    systematic,
    walk,
)
from featstore.errors import ManifestError


def test_natural_order_puts_slice_9_before_slice_10() -> None:
    names = ["train_10_a", "train_9_b", "train_9_a10", "train_9_a9", "a", "10", "9"]
    assert sorted(names, key=natural) == ["9", "10", "a", "train_9_a9", "train_9_a10", "train_9_b", "train_10_a"]


def test_stem_knows_double_suffixes() -> None:
    names = ["la_003.nii.gz", "la_003.nii", "a.b.hdf", "sample_A+_1.hdf", "plain"]
    assert [stem(name) for name in names] == ["la_003", "la_003", "a.b", "sample_A+_1", "plain"]


def test_walk_skips_appledouble_and_follows_no_circle(tmp_path: Path) -> None:
    for name in ("b/10.nii.gz", "b/9.nii.gz", "b/._9.nii.gz", "a/1.nii", "a/.hidden.nii", "a/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a/up").symlink_to(tmp_path)
    assert walk(tmp_path, "") == (["a/1.nii", "b/9.nii.gz", "b/10.nii.gz"], 1)


def test_systematic_rule_takes_every_kth() -> None:
    names = [f"c{number}" for number in range(150)]
    parts = systematic(names, test=3, val=5)
    counts = {part: list(parts.values()).count(part) for part in ("train", "val", "test")}
    assert counts == {"train": 80, "val": 20, "test": 50}
    assert [name for name in names if parts[name] == "test"] == names[2::3]
    assert list(systematic(names[:20], test=5, val=4).values()).count("train") == 12


def test_folds_are_equal_and_do_not_depend_on_order() -> None:
    names = [f"case{number}" for number in range(23)]
    found = folds(names)
    assert sorted(list(found.values()).count(str(fold)) for fold in range(5)) == [4, 4, 5, 5, 5]
    assert folds(names[::-1]) == found


@pytest.mark.parametrize(("depths", "every"), [((1,), 1), ((5, 1, 4), 1), ((5, 1, 4), 2), ((7, 3), 3), ((2,), 9)])
def test_every_kth_slice_is_kept_with_its_own_index(tmp_path: Path, depths: tuple[int, ...], every: int) -> None:
    volumes = []
    for number, depth in enumerate(depths):
        make.write_nifti(tmp_path / f"v{number}.nii.gz", np.zeros((3, 4, depth), np.int16), "LPS")
        volumes.append(Volume(name=f"v{number}", path=f"v{number}.nii.gz", mask_path=f"v{number}.nii.gz"))
    table, notes = nifti_slices(tmp_path, volumes, {"extra": [v.name.upper() for v in volumes]}, every=every)
    truth = [(f"v{n}", z) for n, depth in enumerate(depths) for z in range(0, depth, every)]
    assert list(zip(table["volume"].to_pylist(), table["z"].to_pylist())) == truth
    assert table["id"].to_pylist() == [f"{name}/{z:04d}" for name, z in truth]
    assert table["part"].to_pylist() == table["mask_part"].to_pylist() == [f"axis=axial&index={z}" for _, z in truth]
    assert table["extra"].to_pylist() == [name.upper() for name, _ in truth]
    assert notes == []


def test_slices_are_in_anatomical_order_whatever_the_orientation_of_the_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    data = rng.integers(0, 1000, (6, 5, 4)).astype(np.int16)
    mask = (data > 500).astype(np.uint8)
    for number, codes in enumerate((*make.CODES, "SPR", "ILP")):
        make.write_nifti(tmp_path / f"{number}.nii.gz", data, codes)
        make.write_nifti(tmp_path / f"{number}_m.nii.gz", mask, make.CODES[number % 3])  # its own axes
        volume = Volume(name=str(number), path=f"{number}.nii.gz", mask_path=f"{number}_m.nii.gz")
        table, notes = nifti_slices(tmp_path, [volume], {})
        assert notes == []
        assert table.num_rows == 4
        for z, row in enumerate(table.to_pylist()):
            assert row["z"] == z
            found = pixels(tmp_path, row["path"], row["part"])
            # The truth by nibabel's own reorientation; a picture has the front at the top and the right on the left.
            truth = np.asanyarray(nibabel.as_closest_canonical(nibabel.load(tmp_path / row["path"])).dataobj)
            assert np.array_equal(found, truth[::-1, ::-1, z].T)
            assert np.array_equal(found, data[::-1, ::-1, z].T)
            assert np.array_equal(pixels(tmp_path, row["mask_path"], row["mask_part"]), mask[::-1, ::-1, z].T)


def test_registration_reads_headers_and_no_voxels(tmp_path: Path) -> None:
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.int16)
    header.set_data_shape((1024, 1024, 900))
    header.set_sform(np.diag([1.0, 1, 1, 1]), code=1)
    header["magic"], header["vox_offset"] = b"n+1", 352
    path = tmp_path / "case.nii"
    with path.open("wb") as file:  # 1.9 GB, none of which is on the disk
        file.write(header.binaryblock)
        file.truncate(352 + 1024 * 1024 * 900 * 2)
    assert path.stat().st_blocks * 512 < 1 << 20
    from resource import RUSAGE_SELF, getrusage

    before = getrusage(RUSAGE_SELF).ru_maxrss
    table, _ = nifti_slices(tmp_path, [Volume(name="case", path="case.nii", mask_path="case.nii")], {})
    assert table.num_rows == 900
    assert getrusage(RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_a_volume_without_readable_header_keeps_one_row(tmp_path: Path) -> None:
    (tmp_path / "bad.nii.gz").write_bytes(b"no volume")
    make.write_nifti(tmp_path / "good.nii.gz", np.zeros((3, 3, 2), np.int16))
    volumes = [Volume(name=name, path=f"{name}.nii.gz", mask_path="bad.nii.gz") for name in ("bad", "good")]
    table, notes = nifti_slices(tmp_path, volumes, {})
    assert table["id"].to_pylist() == ["bad/0000", "good/0000", "good/0001"]
    assert table["mask_path"].null_count == 3
    assert notes[0].startswith("1 volumes have no readable header")
    assert measure(tmp_path, ["bad.nii.gz"]) == {"bad.nii.gz": None}


def test_hundred_thousand_rows_take_no_time() -> None:
    from time import perf_counter

    from featstore.datasets.slices import slice_table

    volumes = [Volume(name=f"v{n}", path=f"p/v{n}.nii.gz", group=f"g{n // 2}") for n in range(1000)]
    parts = [f"axis=axial&index={z}" for z in range(300)]
    start = perf_counter()
    table = slice_table(
        volumes, [300] * 1000, {"a": ["x"] * 1000}, parts=(parts, ()), masks=[None] * 1000, mask_parts=parts
    )
    assert table.num_rows == 300_000
    assert perf_counter() - start < 5
    assert table.slice(299_999, 1).to_pylist()[0]["id"] == "v999/0299"


def test_slice_options_are_checked(tmp_path: Path) -> None:
    make.write_nifti(tmp_path / "a.nii.gz", np.zeros((3, 3, 2), np.int16))
    one = Volume(name="a", path="a.nii.gz")
    with pytest.raises(ManifestError, match=r"option every is 1 .* got 0"):
        nifti_slices(tmp_path, [one], {}, every=0)
    with pytest.raises(ManifestError, match="1 volumes are there twice, such as a; keep one"):
        nifti_slices(tmp_path, [one, one], {})
    with pytest.raises(ManifestError, match=r"option channel '2': a.nii.gz has 1 channels"):
        nifti_slices(tmp_path, [one], {}, channel="2")


def test_small_files_beside_the_volumes(tmp_path: Path) -> None:
    assert read_json(tmp_path / "none.json") == {}
    assert read_cfg(tmp_path / "none.cfg") == {}
    (tmp_path / "Info.cfg").write_text("ED: 1\nGroup:  DCM \nno colon\n: nameless\n")
    assert read_cfg(tmp_path / "Info.cfg") == {"ED": "1", "Group": "DCM"}
    for text in ("[1]", "{", ""):
        (tmp_path / "dataset.json").write_text(text)
        with pytest.raises(ManifestError, match=r"dataset.json must be a JSON object"):
            read_json(tmp_path / "dataset.json")
    assert class_names({"0": "background", "2": "liver"}, "x") == ("background", "label 1", "liver")
    assert class_names({}, "x") == ()
    for key in ("spleen", "256", "-1"):
        with pytest.raises(ManifestError, match="`labels` must map numbers from 0 to 255"):
            class_names({key: "1"}, "x")


def place(path: Path, affine: np.ndarray | None, sides: tuple[int, ...] = (6, 5, 4)) -> str:
    """A volume of zeros there; without affine its header says nothing of axes (qform and sform 0)."""
    nibabel.save(nibabel.Nifti1Image(np.zeros(sides, np.int16), affine), path)
    return path.name


def used_masks(root: Path, pairs: list[tuple[str, str]]) -> tuple[list[str | None], list[str]]:
    volumes = [Volume(name=f"{at}", path=image, mask_path=mask) for at, (image, mask) in enumerate(pairs)]
    table, notes = nifti_slices(root, volumes, {})
    return list(dict(zip(table["volume"].to_pylist(), table["mask_path"].to_pylist())).values()), notes


EYE = np.diag([2.0, 2, 3, 1])


@pytest.mark.parametrize(
    ("change", "fits"),
    [
        (lambda a: a @ np.diag([1.0, 1, -1, 1]), False),  # the same array turned upside down
        (lambda a: a @ np.diag([1.0, 1, 2, 1]), False),
        (lambda a: a @ np.diag([1.0, 1, 1.005, 1]), True),
        (lambda a: a @ np.diag([1.0, 1, 1.02, 1]), False),
        (lambda a: shifted(a, 2, 1.4), True),
        (lambda a: shifted(a, 2, 1.6), False),
        (lambda a: shifted(a, 0, -1.1), False),
        (lambda a: tilted(a, 0.004), True),
        (lambda a: tilted(a, 0.1), False),
    ],
)
def test_a_mask_of_equal_shape_is_used_only_where_the_headers_agree(tmp_path: Path, change, fits: bool) -> None:
    image, mask = place(tmp_path / "i.nii.gz", EYE), place(tmp_path / "m.nii.gz", change(EYE))
    masks, notes = used_masks(tmp_path, [(image, mask)])
    assert masks == [mask if fits else None]
    assert notes == ([] if fits else [notes[0]])
    assert fits or notes[0].startswith("1 label volumes have the shape of their image, but by the headers another dir")


def shifted(affine: np.ndarray, axis: int, millimetres: float) -> np.ndarray:
    moved = affine.copy()
    moved[axis, 3] += millimetres
    return moved


def tilted(affine: np.ndarray, angle: float) -> np.ndarray:
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return turn @ affine


def test_masks_without_stated_place_need_shape_and_axes_alone(tmp_path: Path) -> None:
    paths = [
        place(tmp_path / "a.nii", None),
        place(tmp_path / "b.nii", None),
        place(tmp_path / "c.nii", shifted(np.diag([-2.0, 2, 3, 1]), 1, 40)),  # the axes that nibabel takes as given
        place(tmp_path / "d.nii", EYE),
        place(tmp_path / "e.nii", None, (5, 6, 4)),
    ]
    header = nibabel.load(tmp_path / "a.nii").header
    assert (int(header["qform_code"]), int(header["sform_code"])) == (0, 0)
    masks, notes = used_masks(tmp_path, [(paths[0], mask) for mask in paths[1:]])
    assert masks == [paths[1], paths[2], None, None]
    assert len(notes) == 2


def test_headers_that_need_mending_are_read_without_a_word(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("i.nii", "m.nii"):
        place(tmp_path / name, EYE)
        data = bytearray((tmp_path / name).read_bytes())
        data[76:80] = np.float32(0).tobytes()  # pixdim[0] must be 1 or -1
        (tmp_path / name).write_bytes(data)
    assert used_masks(tmp_path, [("i.nii", "m.nii")]) == (["m.nii"], [])
    assert capfd.readouterr() == ("", "")


def test_dangling_links_are_volumes_without_header(tmp_path: Path) -> None:
    make.write_nifti(tmp_path / "good.nii.gz", np.zeros((3, 3, 2), np.int16))
    (tmp_path / "gone.nii.gz").symlink_to(tmp_path / "nowhere.nii.gz")
    assert walk(tmp_path, "")[0] == ["gone.nii.gz", "good.nii.gz"]
    volumes = [Volume(name="a", path="gone.nii.gz"), Volume(name="b", path="good.nii.gz", mask_path="gone.nii.gz")]
    table, notes = nifti_slices(tmp_path, volumes, {})
    assert table["id"].to_pylist() == ["a/0000", "b/0000", "b/0001"]
    assert table["mask_path"].null_count == 3
    assert "1 label volumes have no readable header and are not used as masks" in notes


def test_upper_case_suffixes_are_volumes_too(tmp_path: Path) -> None:
    place(tmp_path / "A_1.NII.GZ", EYE)
    place(tmp_path / "a_2.Nii", EYE)
    paths, _ = walk(tmp_path, "")
    assert [stem(path) for path in paths] == ["A_1", "a_2"]
    assert used_masks(tmp_path, [(paths[0], paths[1])]) == ([paths[1]], [])
