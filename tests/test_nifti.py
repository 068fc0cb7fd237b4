"""Volumes with an orientation, against nibabel and against arrays turned by hand."""

import contextlib
import gzip
import struct
import threading
import zlib
from pathlib import Path
from typing import Any
from unittest import mock

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from volume_files import SHAPE, metaimage_bytes, metaimage_text, nifti_bytes, orientations, stored_as

from featstore.errors import ConfigError, DecodeError
from featstore.images import opening
from featstore.images.decoded import DecodeOptions
from featstore.images.intensity import percentiles
from featstore.images.nifti import list_parts, open_metaimage, open_nifti, volume_shape
from featstore.images.part import Part

nib: Any = nibabel  # it has no types
OPTIONS = DecodeOptions()
ANATOMY = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)  # (right, front, head)


def slice_of(data: bytes, **part: object) -> np.ndarray:
    return open_nifti(data, None).pixels(Part(**part), OPTIONS).pixels  # type: ignore[arg-type]


@pytest.mark.parametrize(("axes", "signs"), orientations())
def test_a_marked_voxel_lands_where_the_anatomy_says(axes: tuple[int, ...], signs: tuple[int, ...]) -> None:
    right, front, head = 4, 1, 2  # far right, towards the back
    anatomy = np.zeros(SHAPE, np.uint8)
    anatomy[right, front, head] = 9
    opened = open_nifti(nifti_bytes(*stored_as(anatomy, axes, signs)), None)
    for axis, index, shape, place in (
        ("axial", head, (6, 5), (SHAPE[1] - 1 - front, SHAPE[0] - 1 - right)),
        ("coronal", front, (7, 5), (SHAPE[2] - 1 - head, SHAPE[0] - 1 - right)),
        ("sagittal", right, (7, 6), (SHAPE[2] - 1 - head, SHAPE[1] - 1 - front)),
    ):
        found = opened.pixels(Part(axis=axis, index=index), OPTIONS).pixels  # type: ignore[arg-type]
        assert found.shape == shape
        assert np.argwhere(found).tolist() == [list(place)]
        assert not opened.pixels(Part(axis=axis, index=index - 1), OPTIONS).pixels.any()  # type: ignore[arg-type]


@pytest.mark.parametrize(("axes", "signs"), orientations()[::5])
def test_every_slice_is_nibabels_closest_canonical(axes: tuple[int, ...], signs: tuple[int, ...]) -> None:
    stored, affine = stored_as(ANATOMY, axes, signs)
    tilt = np.eye(4)
    tilt[:3, :3] = [[0.98, -0.17, 0.05], [0.17, 0.98, 0.03], [-0.05, -0.02, 1.0]]
    data = nifti_bytes(stored, tilt @ affine)
    expected = np.asarray(nib.as_closest_canonical(nib.Nifti1Image.from_bytes(data)).dataobj)
    opened = open_nifti(data, None)
    for index in range(SHAPE[2]):
        found = opened.pixels(Part(index=index), OPTIONS).pixels
        assert np.array_equal(found, expected[:, :, index].T[::-1, ::-1])


def test_slices_come_in_anatomical_order_not_in_the_order_of_text(tmp_path: Path) -> None:
    levels = np.broadcast_to(np.arange(12, dtype=np.uint8), (3, 4, 12))
    stored, affine = stored_as(levels, (2, 0, 1), (-1, 1, 1))
    path = tmp_path / "levels.nii"
    path.write_bytes(nifti_bytes(stored, affine))
    opened, parts = open_nifti(path.read_bytes(), path), opening.list_parts(path)
    assert [part.index for part in parts] == list(range(12))
    assert [opened.pixels(part, OPTIONS).pixels.max() for part in parts] == list(range(12))


def test_orientation_stored_is_the_array_as_it_lies() -> None:
    stored, affine = stored_as(ANATOMY, (1, 2, 0), (-1, 1, -1))
    data = nifti_bytes(stored, affine)
    assert np.array_equal(slice_of(data, orientation="stored", index=2), stored[:, :, 2])
    assert np.array_equal(slice_of(data, orientation="stored", axis="sagittal", index=2), stored[2])
    for axis in range(3):
        assert np.array_equal(slice_of(data, axis=str(axis), index=3), stored.take(3, axis))


@pytest.mark.parametrize("dtype", ["u1", "i1", "<i2", ">i2", "u2", "i4", "u4", "i8", "u8", "f4", ">f4"])
@pytest.mark.parametrize("second", [False, True])
def test_integers_stay_integers_and_byte_order_becomes_the_machines(dtype: str, second: bool) -> None:
    volume = (ANATOMY % 100).astype(dtype)
    found = slice_of(nifti_bytes(volume, second=second), index=3)
    assert found.dtype == np.dtype(dtype).newbyteorder("=")
    assert np.array_equal(found, volume[:, :, 3].T[::-1, ::-1])


def test_float64_becomes_float32() -> None:
    volume = np.random.default_rng(0).normal(size=SHAPE) * 1000
    found = slice_of(nifti_bytes(volume), index=0)
    assert found.dtype == np.float32
    assert np.array_equal(found, volume[:, :, 0].T[::-1, ::-1].astype(np.float32))


def test_slope_and_intercept_are_applied_once_and_give_float32() -> None:
    found = slice_of(nifti_bytes(ANATOMY, scl_slope=0.5, scl_inter=-1024), index=1)
    assert found.dtype == np.float32
    assert np.array_equal(found, ANATOMY[:, :, 1].T[::-1, ::-1] * np.float32(0.5) - 1024)
    assert slice_of(nifti_bytes(ANATOMY, scl_slope=1, scl_inter=0), index=1).dtype == np.int16
    assert slice_of(nifti_bytes(ANATOMY, scl_slope=0, scl_inter=7), index=1).dtype == np.int16  # no scaling said


@pytest.mark.parametrize("slope", [1.0, 2.5, -2.5])
def test_percentiles_are_those_of_the_whole_volume(slope: float) -> None:
    volume = np.random.default_rng(1).integers(-1000, 3000, SHAPE, dtype=np.int16)
    opened = open_nifti(nifti_bytes(volume, scl_slope=slope, scl_inter=4), None)
    percentiles = opened.pixels(Part(index=0), OPTIONS).percentiles
    assert percentiles is not None
    expected = np.percentile(volume * slope + 4, (0.5, 99.5))
    assert percentiles(0.5, 99.5) == pytest.approx(tuple(expected))


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32])
def test_percentiles_of_signed_volumes_do_not_overflow(dtype: type) -> None:
    ends = np.iinfo(dtype)
    array: np.ndarray = np.array([ends.min, ends.max] * 12).reshape(4, 3, 2).astype(dtype)
    found = open_nifti(nifti_bytes(array), None).pixels(Part(index=0), OPTIONS).percentiles
    assert found is not None
    assert found(1.0, 50.0) == pytest.approx(tuple(np.percentile(array.astype(float), (1, 50))))


def test_percentiles_are_found_once_for_all_threads() -> None:
    opened = open_nifti(nifti_bytes(ANATOMY), None)
    results: list[tuple[float, float]] = []
    with mock.patch("featstore.images.volume.percentiles", wraps=percentiles) as called:
        ask = [opened.pixels(Part(index=index), OPTIONS).percentiles for index in range(4)]
        threads = [threading.Thread(target=lambda f=f: results.append(f(1.0, 99.0))) for f in ask]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(results) == 4
    assert len(set(results)) == 1
    assert called.call_count == 1


def test_4d_channels_are_picked_one_or_three_at_a_time() -> None:
    volume = np.random.default_rng(2).integers(0, 99, (*SHAPE, 4), dtype=np.uint8)
    data = nifti_bytes(volume)
    plain = volume[:, :, 2].transpose(1, 0, 2)[::-1, ::-1]
    assert np.array_equal(slice_of(data, index=2, channel="3"), plain[..., 3])
    assert np.array_equal(slice_of(data, index=2, channel="3,0,1"), plain[..., [3, 0, 1]])
    assert slice_of(nifti_bytes(volume[..., :1]), index=2).shape == (6, 5)
    fifth = slice_of(nifti_bytes(volume[:, :, :, None]), index=2, channel="1")
    assert np.array_equal(fifth, plain[..., 1])
    with pytest.raises(DecodeError, match="the volume has 4 channels; name one with channel="):
        slice_of(data, index=2)
    with pytest.raises(DecodeError, match="no channel 4; it has 4, counted from 0"):
        slice_of(data, index=2, channel="4")


def test_4d_lists_every_channel(tmp_path: Path) -> None:
    path = tmp_path / "four.nii"
    path.write_bytes(nifti_bytes(np.zeros((3, 4, 2, 3), np.uint8)))
    parts = list_parts(path)
    assert [(part.channel, part.index) for part in parts] == [(c, i) for c in "012" for i in (0, 1)]
    assert volume_shape(path) == (3, 4, 2, 3)


@pytest.mark.parametrize("kind", ["RGB", "RGBA"])
def test_colour_voxels_become_colour_without_alpha(kind: str) -> None:
    rng = np.random.default_rng(3)
    voxels = rng.integers(0, 255, (*SHAPE, len(kind)), dtype=np.uint8)
    image = nib.Nifti1Image(voxels.view([(name, "u1") for name in kind])[..., 0], np.eye(4))
    found = slice_of(image.to_bytes(), index=1)
    assert np.array_equal(found, voxels[:, :, 1, :3].transpose(1, 0, 2)[::-1, ::-1])


def test_labels_are_as_stored() -> None:
    big = np.full(SHAPE, 2**64 - 1, np.uint64)
    big[0, 0, 0] = 2**60 + 1
    labels = open_nifti(nifti_bytes(big), None).labels(Part(index=0))
    assert labels.dtype == np.uint64
    assert labels[-1, -1] == 2**60 + 1
    scaled = open_nifti(nifti_bytes(ANATOMY, scl_slope=2, scl_inter=0), None).labels(Part(index=0))
    assert np.array_equal(scaled, 2.0 * ANATOMY[:, :, 0].T[::-1, ::-1])


def test_gzip_pairs_and_several_members(tmp_path: Path) -> None:
    data = nifti_bytes(ANATOMY)
    expected = slice_of(data, index=4)
    assert np.array_equal(slice_of(gzip.compress(data), index=4), expected)
    assert np.array_equal(slice_of(gzip.compress(data[:400]) + gzip.compress(data[400:]), index=4), expected)
    assert np.array_equal(slice_of(gzip.compress(data) + bytes(512), index=4), expected)
    nib.Nifti1Pair(ANATOMY, np.eye(4)).to_filename(tmp_path / "pair.hdr")
    path = tmp_path / "pair.hdr"
    opened = opening.open_bytes(path.read_bytes(), path)
    assert np.array_equal(opened.pixels(Part(index=4), OPTIONS).pixels, expected)
    (tmp_path / "pair.img.gz").write_bytes(gzip.compress((tmp_path / "pair.img").read_bytes()))
    (tmp_path / "pair.img").unlink()
    assert np.array_equal(open_nifti(path.read_bytes(), path).pixels(Part(index=4), OPTIONS).pixels, expected)
    (tmp_path / "pair.img.gz").unlink()
    with pytest.raises(DecodeError, match=r"the .img beside the header of a NIfTI pair is missing"):
        open_nifti(path.read_bytes(), path)
    with pytest.raises(DecodeError, match=r"read from a file of its own, beside its .img"):
        open_nifti(path.read_bytes(), None)


def test_header_alone_is_read_for_shapes_and_parts(tmp_path: Path) -> None:
    stored, affine = stored_as(ANATOMY, (2, 0, 1), (1, -1, 1))
    path = tmp_path / "cut.nii.gz"
    noise = np.random.default_rng(4).integers(0, 2**15, (40, *stored.shape[1:]), dtype=np.int16)
    whole = gzip.compress(nifti_bytes(noise, affine))
    path.write_bytes(whole[:600])  # what follows is never looked at
    assert volume_shape(path) == (5, 6, 40, 1)
    assert len(list_parts(path)) == 40
    with pytest.raises(DecodeError, match="truncated gzip data"):
        open_nifti(path.read_bytes(), path)


def test_truncated_and_damaged_files_are_refused() -> None:
    data = nifti_bytes(ANATOMY)
    packed = gzip.compress(data)
    with pytest.raises(DecodeError, match="truncated volume: there are fewer samples than its header says"):
        open_nifti(data[:-1], None)
    with pytest.raises(DecodeError, match="truncated gzip data"):
        open_nifti(packed[:-4], None)  # every sample is there, the checksum is not
    with pytest.raises(DecodeError, match="damaged gzip data"):
        open_nifti(packed[:-8] + bytes(4) + packed[-4:], None)
    with pytest.raises(DecodeError, match="truncated NIfTI header"):
        open_nifti(data[:347], None)
    with pytest.raises(DecodeError, match="damaged or unsupported NIfTI header"):
        open_nifti(nifti_bytes(ANATOMY, datatype=999), None)


def test_want_of_memory_is_no_damage() -> None:
    with (
        mock.patch("featstore.images.nifti._nifti_header", side_effect=MemoryError),
        pytest.raises(MemoryError),
    ):
        open_nifti(nifti_bytes(ANATOMY), None)


def test_size_bombs_are_refused_before_memory_is_taken(tmp_path: Path) -> None:
    small = nifti_bytes(np.zeros((2, 2, 2), np.uint8))
    huge = bytearray(small)
    struct.pack_into("<8h", huge, 40, 3, 30000, 30000, 30000, 1, 1, 1, 1)
    for data in (bytes(huge), gzip.compress(bytes(huge))):
        with pytest.raises(DecodeError, match="27000000000000 bytes, above the limit of 2147483648"):
            open_nifti(data, None)
    with pytest.raises(DecodeError, match="holds more than the volume's header says"):
        open_nifti(gzip.compress(small + bytes(10_000_000)), None)
    with pytest.raises(DecodeError, match="holds more than the volume's header says"):
        open_nifti(gzip.compress(small) + gzip.compress(bytes(10)), None)
    struct.pack_into("<8h", huge, 40, 3, 0, 4, 4, 1, 1, 1, 1)
    with pytest.raises(DecodeError, match="a side without extent"):
        open_nifti(bytes(huge), None)


def test_a_slice_above_the_limit_of_pixels_is_refused() -> None:
    opened = open_nifti(nifti_bytes(ANATOMY), None)
    with (
        mock.patch("featstore.images.volume.MAX_PIXELS", 29),
        pytest.raises(DecodeError, match="more than the limit of 29 pixels"),
    ):
        opened.pixels(Part(index=0), OPTIONS)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e300])
def test_values_that_are_no_numbers_are_refused(bad: float) -> None:
    volume = np.zeros(SHAPE)
    volume[0, 0, 3] = bad
    opened = open_nifti(nifti_bytes(volume), None)
    assert not opened.pixels(Part(index=2), OPTIONS).pixels.any()
    with pytest.raises(DecodeError, match="the slice has NaN or infinite values"):
        opened.pixels(Part(index=3), OPTIONS)
    if not np.isfinite(bad):
        with pytest.raises(DecodeError, match="the volume has NaN or infinite values"):
            opened.percentiles((0,), 0.0, 100.0)


def test_parts_that_cannot_be() -> None:
    data = nifti_bytes(ANATOMY)
    with pytest.raises(DecodeError, match="no slice 7 along this axis; it has 7, counted from 0"):
        slice_of(data, index=7)
    with pytest.raises(DecodeError, match="7 slices along this axis; name one with index="):
        slice_of(data)
    with pytest.raises(DecodeError, match="axes 0, 1 and 2 are those of the array as stored"):
        slice_of(data, axis="0", index=1, orientation="canonical")
    with pytest.raises(DecodeError, match="a volume has no frame; its parts are named by axis, channel, index, orient"):
        slice_of(data, frame=1)
    with pytest.raises(DecodeError, match="a volume of complex64 samples is not read"):
        open_nifti(nifti_bytes(np.zeros(SHAPE, np.complex64)), None)
    with pytest.raises(DecodeError, match="a volume has 3 axes and one of channels, this one has 5"):
        open_nifti(nifti_bytes(np.zeros((2, 2, 2, 2, 2), np.uint8)), None)
    colour = np.zeros((*SHAPE, 2), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    with pytest.raises(DecodeError, match="a volume of coloured voxels has 3 axes"):
        open_nifti(nifti_bytes(colour), None)


def test_a_file_that_does_not_say_where_its_axes_point_is_read_as_stored() -> None:
    data = nifti_bytes(ANATOMY, sform_code=1, srow_x=[0, 0, 0, 0])
    with pytest.raises(DecodeError, match="does not say where its axes point; name orientation=stored"):
        slice_of(data, index=0)
    assert np.array_equal(slice_of(data, index=0, orientation="stored"), ANATOMY[:, :, 0])


def test_no_orientation_at_all_is_taken_as_nibabel_does() -> None:
    data = nifti_bytes(ANATOMY, sform_code=0, qform_code=0)
    expected = np.asarray(nib.as_closest_canonical(nib.Nifti1Image.from_bytes(data)).dataobj)
    assert np.array_equal(slice_of(data, index=3), expected[:, :, 3].T[::-1, ::-1])


def test_a_picture_of_two_axes_is_one_slice(tmp_path: Path) -> None:
    path = tmp_path / "echo.nii.gz"
    path.write_bytes(gzip.compress(nifti_bytes(ANATOMY[:, :, 0])))
    assert list_parts(path) == [Part(axis="axial", index=0)]
    found = open_nifti(path.read_bytes(), path).pixels(Part(), OPTIONS).pixels
    assert np.array_equal(found, ANATOMY[:, :, 0].T[::-1, ::-1])


def test_memory_is_told_and_given_back() -> None:
    opened = open_nifti(nifti_bytes(ANATOMY), None)
    assert opened.num_bytes == ANATOMY.nbytes
    opened.close()
    with pytest.raises(DecodeError, match="no slice"):
        opened.pixels(Part(index=1, orientation="stored", axis="0"), OPTIONS)


def test_without_nibabel_the_extra_is_named() -> None:
    with (
        mock.patch.dict("sys.modules", {"nibabel.nifti1": None}),
        pytest.raises(ConfigError, match=r"pip install 'featstore\[medical\]'"),
    ):
        open_nifti(nifti_bytes(ANATOMY), None)


def test_another_kind_of_file_has_no_orientation(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", ANATOMY)
    with pytest.raises(DecodeError, match="this is a NPY file and no volume"):
        volume_shape(tmp_path / "a.npy")


# MetaImage


def metaimage_slice(data: bytes, path: Path | None = None, **part: object) -> np.ndarray:
    return open_metaimage(data, path).pixels(Part(**part), OPTIONS).pixels  # type: ignore[arg-type]


@pytest.mark.parametrize("compressed", [False, True])
def test_metaimage_points_left_and_back_where_nifti_points_right_and_front(compressed: bool) -> None:
    data = metaimage_bytes(ANATOMY, compressed=compressed, TransformMatrix="1 0 0 0 1 0 0 0 1")
    # Stored to the left, the back and the head: already as it is shown.
    assert np.array_equal(metaimage_slice(data, index=3), ANATOMY[:, :, 3].T)
    assert np.array_equal(metaimage_slice(data, index=3, orientation="stored"), ANATOMY[:, :, 3])


@pytest.mark.parametrize(("axes", "signs"), orientations()[::7])
def test_metaimage_directions_are_one_row_for_each_stored_axis(axes: tuple[int, ...], signs: tuple[int, ...]) -> None:
    stored, affine = stored_as(ANATOMY, axes, signs)
    rows = affine[:3, :3].T * (-1, -1, 1)  # to left, back, head
    data = metaimage_bytes(stored, TransformMatrix=" ".join(str(v) for v in rows.ravel()), ElementSpacing="0.5 2 3")
    assert np.array_equal(metaimage_slice(data, index=2), ANATOMY[:, :, 2].T[::-1, ::-1])


def test_metaimage_data_beside_its_header(tmp_path: Path) -> None:
    path, raw = tmp_path / "a.mhd", tmp_path / "a.raw"
    path.write_bytes(metaimage_text(SHAPE, "MET_SHORT", "a.raw", ElementByteOrderMSB="True"))
    text = path.read_bytes().replace(b"BinaryDataByteOrderMSB = False\n", b"")
    raw.write_bytes(b"head" + ANATOMY.astype(">i2").tobytes(order="F"))
    expected = ANATOMY[:, :, 1].T
    for skip in ("HeaderSize = 4\n", "HeaderSize = -1\n"):
        path.write_bytes(text.replace(b"ElementData", skip.encode() + b"ElementData").rstrip(b"\n"))
        assert np.array_equal(metaimage_slice(path.read_bytes(), path, index=1), expected)
    assert volume_shape(path) == (*SHAPE, 1)
    assert len(opening.list_parts(path)) == 7


def test_metaimage_never_reads_outside_its_folder(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    (tmp_path / "secret.raw").write_bytes(ANATOMY.tobytes(order="F"))
    (inner / "link.raw").symlink_to(tmp_path / "secret.raw")
    path = inner / "a.mhd"
    for name in ("../secret.raw", str(tmp_path / "secret.raw"), "..\\secret.raw", "LIST", "slice%02d.raw", ".."):
        with pytest.raises(DecodeError, match="must be in one file, in the same folder as its header"):
            open_metaimage(metaimage_text(SHAPE, "MET_SHORT", name), path)
    for name in ("link.raw", "absent.raw"):
        with pytest.raises(DecodeError, match="the file of samples beside the MetaImage's header is missing"):
            open_metaimage(metaimage_text(SHAPE, "MET_SHORT", name), path)
    with pytest.raises(DecodeError, match="is read from a folder, not from an archive"):
        open_metaimage(metaimage_text(SHAPE, "MET_SHORT", "a.raw"), None)


def test_metaimage_channels_and_two_axes() -> None:
    colour = np.random.default_rng(5).integers(0, 255, (4, 5, 3), dtype=np.uint8)  # (x, y, rgb)
    text = metaimage_text((4, 5), "MET_UCHAR", "LOCAL", ElementNumberOfChannels="3")
    found = metaimage_slice(text + colour.transpose(1, 0, 2).tobytes())
    assert np.array_equal(found, colour.transpose(1, 0, 2))
    four = np.random.default_rng(6).integers(0, 255, (4, 5, 2, 3), dtype=np.uint8)
    text = metaimage_text((4, 5, 2, 3), "MET_UCHAR", "LOCAL")
    found = metaimage_slice(text + four.tobytes(order="F"), index=1, channel="2")
    assert np.array_equal(found, four[:, :, 1, 2].T)


def test_metaimages_that_cannot_be_read() -> None:
    good = metaimage_bytes(ANATOMY, compressed=True)
    for bad in (b"NDims = 3\n", b"ObjectType = Image\nNDims = x\nElementDataFile = LOCAL\n"):
        with pytest.raises(DecodeError, match="damaged MetaImage header"):
            open_metaimage(bad, None)
    with pytest.raises(DecodeError, match="damaged MetaImage header"):
        open_metaimage(metaimage_bytes(ANATOMY, TransformMatrix="1 0"), None)
    with pytest.raises(DecodeError, match="2, 3 or 4 axes of binary samples"):
        open_metaimage(metaimage_text((2, 2), "MET_UCHAR", "LOCAL", BinaryData="False"), None)
    with pytest.raises(DecodeError, match="samples of a type that is not read"):
        open_metaimage(metaimage_text((2, 2), "MET_STRING", "LOCAL"), None)
    with pytest.raises(DecodeError, match="damaged compressed data in the MetaImage"):
        open_metaimage(good.replace(b"LOCAL\n", b"LOCAL\nno zlib"), None)
    with pytest.raises(DecodeError, match="truncated volume"):
        open_metaimage(good[:-20], None)
    bomb = metaimage_text((2, 2), "MET_UCHAR", "LOCAL", CompressedData="True") + zlib.compress(bytes(10**7))
    with pytest.raises(DecodeError, match="holds more than its header says"):
        open_metaimage(bomb, None)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), packed=st.booleans())
def test_damaged_volumes_are_refused_or_read_but_never_crash(seed: int, packed: bool) -> None:
    rng = np.random.default_rng(seed)
    data = np.frombuffer(nifti_bytes(ANATOMY) if not packed else gzip.compress(nifti_bytes(ANATOMY)), np.uint8).copy()
    where = rng.integers(0, min(len(data), 400), rng.integers(1, 6))
    data[where] = rng.integers(0, 256, len(where))
    with contextlib.suppress(DecodeError):
        opened = opening.open_bytes(data[: rng.integers(1, len(data) + 1)].tobytes())
        assert opened.num_bytes < 2**31
        opened.pixels(Part(index=1, channel="0"), OPTIONS)


@pytest.mark.realdata
def test_hippocampus_labels_are_the_three_classes_in_every_slice(shared_data: Path) -> None:
    labels = sorted((shared_data / "mri/volumes/hippocampus/labels").glob("*.nii.gz"))
    assert len(labels) == 40
    for path in labels:
        image_path = path.parents[1] / "images" / path.name
        assert volume_shape(image_path) == volume_shape(path)
        opened, image = open_nifti(path.read_bytes(), path), open_nifti(image_path.read_bytes(), image_path)
        expected = np.asarray(nib.as_closest_canonical(nib.load(path)).dataobj)
        for part in list_parts(path):
            found = opened.labels(part)
            assert set(np.unique(found).tolist()) <= {0, 1, 2}
            assert np.array_equal(found, expected[:, :, part.index].T[::-1, ::-1])
            assert image.pixels(part, OPTIONS).pixels.shape == found.shape


@pytest.mark.realdata
def test_float64_volumes_are_read(shared_data: Path) -> None:
    paths = sorted((shared_data / "mri/volumes/btp").rglob("*.nii.gz"))
    assert paths
    for path in paths:
        opened = open_nifti(path.read_bytes(), path)
        pixels = [opened.pixels(part, OPTIONS).pixels for part in list_parts(path)]
        assert {array.dtype for array in pixels} == {np.dtype(np.float32)}
        expected = np.asarray(nib.as_closest_canonical(nib.load(path)).dataobj)
        assert np.array_equal(np.stack(pixels, -1), expected.transpose(1, 0, 2)[::-1, ::-1].astype(np.float32))
