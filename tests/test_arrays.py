"""HDF5, MATLAB and NumPy files against h5py, SciPy and the arrays that were written."""

import contextlib
import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.io import loadmat, savemat
from volume_files import hdf5_bytes, matlab73_bytes

from featstore.errors import ConfigError, DecodeError
from featstore.images import opening
from featstore.images.arrayfile import decode_errors
from featstore.images.arrays import ArrayFile, open_hdf5, open_matlab, open_npy, open_npz
from featstore.images.decoded import DecodeOptions
from featstore.images.part import Part
from featstore.images.sizes import MAX_PIXELS

OPTIONS = DecodeOptions()
VOLUME = np.random.default_rng(0).integers(0, 30000, (4, 5, 6), dtype=np.int16)
BACKGROUND = 2**64 - 1


def npy_bytes(array: np.ndarray, *, pickled: bool = False) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=pickled)
    return file.getvalue()


def npz_bytes(*, packed: bool = True, **arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    save: Any = np.savez_compressed if packed else np.savez
    save(file, **arrays)
    return file.getvalue()


def mat_bytes(*, packed: bool = True, **arrays: object) -> bytes:
    file = io.BytesIO()
    savemat(file, arrays, do_compression=packed)
    return file.getvalue()


FORMS: dict[str, Callable[[np.ndarray], bytes]] = {
    "npy": npy_bytes,
    "npz": lambda array: npz_bytes(image=array),
    "mat": lambda array: mat_bytes(image=array),
    "mat-plain": lambda array: mat_bytes(packed=False, image=array),
    "h5": lambda array: hdf5_bytes({"main": array}),
}


def pixels(data: bytes, **part: object) -> np.ndarray:
    return opening.open_bytes(data).pixels(Part(**part), OPTIONS).pixels  # type: ignore[arg-type]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("axis", [None, "0", "1", "2"])
def test_slices_along_each_axis(form: str, axis: str | None, tmp_path: Path) -> None:
    data = FORMS[form](VOLUME)
    for index in range(VOLUME.shape[int(axis or 0)]):
        found = pixels(data, axis=axis, index=index)
        assert found.dtype == np.int16
        assert np.array_equal(found, VOLUME.take(index, int(axis or 0)))
    path = tmp_path / "file"
    path.write_bytes(data)
    assert opening.list_parts(path) == [Part(index=index) for index in range(4)]


@pytest.mark.parametrize("form", FORMS)
def test_one_picture_colour_and_channels(form: str, tmp_path: Path) -> None:
    make = FORMS[form]
    assert np.array_equal(pixels(make(VOLUME[0])), VOLUME[0])
    colour = np.random.default_rng(1).integers(0, 255, (5, 6, 4), dtype=np.uint8)
    assert np.array_equal(pixels(make(colour)), colour[..., :3])
    assert np.array_equal(pixels(make(colour[..., :3])), colour[..., :3])
    assert np.array_equal(pixels(make(colour), channel="3"), colour[..., 3])
    assert np.array_equal(pixels(make(colour), index=4), colour[4])  # named: a volume after all
    stack = np.random.default_rng(2).integers(0, 255, (3, 5, 6, 2), dtype=np.uint16)
    assert np.array_equal(pixels(make(stack), index=2, channel="1"), stack[2, ..., 1])
    assert np.array_equal(pixels(make(stack), axis="2", index=5, channel="1,0,0"), stack[:, :, 5, [1, 0, 0]])
    path = tmp_path / "file"
    path.write_bytes(make(colour))
    assert opening.list_parts(path) == [Part()]
    path.write_bytes(make(stack))
    assert opening.list_parts(path) == [Part(index=i, channel=c) for c in "01" for i in range(3)]


@pytest.mark.parametrize("form", FORMS)
def test_percentiles_are_those_of_all_slices(form: str) -> None:
    percentiles = opening.open_bytes(FORMS[form](VOLUME)).pixels(Part(index=0), OPTIONS).percentiles
    assert percentiles is not None
    assert percentiles(2.0, 98.0) == pytest.approx(tuple(np.percentile(VOLUME, (2, 98))))
    alone = opening.open_bytes(FORMS[form](VOLUME[0])).pixels(Part(), OPTIONS)
    assert alone.percentiles is None


def test_types_that_become_pixels() -> None:
    assert pixels(npy_bytes(VOLUME[0] > 9)).tolist() == ((VOLUME[0] > 9) * 255).tolist()
    doubles = VOLUME[0] / 7
    found = pixels(npy_bytes(doubles))
    assert found.dtype == np.float32
    assert np.array_equal(found, doubles.astype(np.float32))
    swapped = pixels(npy_bytes(VOLUME[0].astype(">i2")))
    assert swapped.dtype == np.dtype(np.int16)
    assert np.array_equal(swapped, VOLUME[0])
    assert np.array_equal(pixels(npy_bytes(np.asfortranarray(VOLUME)), index=1), VOLUME[1])
    with pytest.raises(DecodeError, match="NaN or infinite"):
        pixels(npy_bytes(np.array([[np.nan, 1], [2, 3]])))
    bad = opening.open_bytes(npy_bytes(np.array([[[1.0, 1], [2, 3]], [[1, 1], [2, np.inf]]])))
    percentiles = bad.pixels(Part(index=0), OPTIONS).percentiles
    assert percentiles is not None
    with pytest.raises(DecodeError, match="the array has NaN or infinite values"):
        percentiles(0.0, 100.0)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", ["?", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"])
def test_matlab_5_types_are_those_that_scipy_reads(dtype: str, packed: bool) -> None:
    array = np.random.default_rng(6).integers(0, 100, (3, 4)).astype(dtype)
    data = mat_bytes(packed=packed, image=array, text="words", cell=np.array([[1, "a"]], object), record={"a": 1})
    expected = loadmat(io.BytesIO(data))["image"]
    found = open_matlab(data, None).labels(Part())
    assert np.array_equal(found, expected)
    assert found.dtype == (np.bool_ if dtype == "?" else expected.dtype)


def test_cremi_uint64_labels_never_pass_through_float_or_int32() -> None:
    ids = np.random.default_rng(3).integers(2**53, 2**63, (3, 4, 5)).astype(np.uint64) * 2 + 1
    ids[1, 2, 3] = BACKGROUND
    names = {"volumes/raw": np.zeros((3, 4, 5), np.uint8), "volumes/labels/neuron_ids": ids}
    opened = open_hdf5(hdf5_bytes(names, chunks=(1, 2, 5), compression="gzip"), None)
    for index in range(3):
        found = opened.labels(Part(key="volumes/labels/neuron_ids", index=index))
        assert found.dtype == np.uint64
        assert np.array_equal(found, ids[index])
    assert int(opened.labels(Part(key="/volumes/labels/neuron_ids", index=1))[2, 3]) == BACKGROUND


def test_only_the_slice_is_read_from_hdf5(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, read = [], h5py.Dataset.__getitem__

    def spy(dataset: h5py.Dataset, place: object, **more: object) -> object:
        asked.append(place)
        return read(dataset, place, **more)

    opened = open_hdf5(hdf5_bytes({"main": VOLUME}, chunks=(1, 5, 6)), None)
    monkeypatch.setattr(h5py.Dataset, "__getitem__", spy)
    opened.pixels(Part(index=2), OPTIONS)
    opened.pixels(Part(axis="2", index=1), OPTIONS)
    assert asked == [(2,), (slice(None), slice(None), 1)]


def test_matlab_73_arrays_are_turned_back_to_the_order_of_matlab(tmp_path: Path) -> None:
    image = np.arange(20, dtype=np.int16).reshape(4, 5)
    arrays = {"cjdata/image": image, "cjdata/tumorMask": (image > 7).astype(np.uint8), "cjdata/label": np.ones((1, 1))}
    data = matlab73_bytes(tmp_path / "1.mat", arrays, chars={"cjdata/PID": "MR012", "#refs#/a": "ab"})
    assert np.array_equal(pixels(data, key="cjdata/image"), image)
    assert np.array_equal(pixels(data, key="cjdata/tumorMask"), image > 7)
    stack = matlab73_bytes(tmp_path / "2.mat", {"volume": VOLUME})
    for axis in range(3):
        assert np.array_equal(pixels(stack, axis=str(axis), index=3), VOLUME.take(3, axis))
    # The same data set without MATLAB's own header lies as HDF5 has it.
    assert np.array_equal(pixels(hdf5_bytes({"volume": VOLUME.T}), axis="2", index=3), VOLUME[3].T)
    assert len(opening.list_parts(tmp_path / "2.mat")) == 4


def test_several_arrays_must_be_named_and_one_is_found(tmp_path: Path) -> None:
    two = hdf5_bytes({"raw": VOLUME, "labels/ids": VOLUME, "scale": np.ones(3)})
    (tmp_path / "two.h5").write_bytes(two)
    for attempt in (lambda: pixels(two, index=0), lambda: opening.list_parts(tmp_path / "two.h5")):
        with pytest.raises(DecodeError, match=r"several arrays that could be an image; name one .* labels/ids, raw$"):
            attempt()
    with pytest.raises(DecodeError, match="no array of the key named; it has labels/ids, raw, scale"):
        pixels(two, key="nothing", index=0)
    with pytest.raises(DecodeError, match="no array that could be an image; name one with key=: none"):
        pixels(hdf5_bytes({"text": np.bytes_("abc")}))
    with pytest.raises(DecodeError, match="the array is no image: it must have 2 to 4 axes"):
        pixels(two, key="scale")
    one = npz_bytes(image=VOLUME[0], spacing=np.ones(3), names=np.array(["a"]))
    assert np.array_equal(pixels(one), VOLUME[0])
    many = hdf5_bytes({f"a{number:02d}": VOLUME[0] for number in range(25)})
    with pytest.raises(DecodeError, match="a19 and 5 more"):
        pixels(many)


@pytest.mark.parametrize("form", FORMS)
def test_parts_that_cannot_be(form: str) -> None:
    data, picture = FORMS[form](VOLUME), FORMS[form](VOLUME[0])
    for part, message in (
        ({}, "the array has 4 slices along this axis; name one with index="),
        ({"index": 4}, "no slice 4 along this axis; it has 4, counted from 0"),
        ({"axis": "axial", "index": 0}, "an array has no orientation; count its slices along axis 0, 1 or 2"),
        ({"orientation": "canonical", "index": 0}, "an array has no orientation"),
        ({"index": 0, "channel": "1"}, "the array has no axis of channels; leave channel out"),
        ({"frame": 1}, "an array has no frame; its parts are named by axis, channel, index, key, orientation"),
    ):
        with pytest.raises(DecodeError, match=message):
            pixels(data, **part)
    with pytest.raises(DecodeError, match="the array is one picture; leave index and axis out"):
        pixels(picture, index=1)
    stack = FORMS[form](np.zeros((3, 5, 6, 2), np.uint8))
    with pytest.raises(DecodeError, match="the array has 2 channels; name one with channel="):
        pixels(stack, index=0)
    with pytest.raises(DecodeError, match="the array has no channel 2; it has 2, counted from 0"):
        pixels(stack, index=0, channel="2")
    with (
        mock.patch("featstore.images.arrayfile.MAX_PIXELS", 29),
        pytest.raises(DecodeError, match="a picture has more than the limit of 29 pixels"),
    ):
        pixels(data, index=0)


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize("shape", [(4, 5, 6), (7, 3)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_headers_of_every_version_are_those_that_numpy_reads(
    version: tuple[int, int], shape: tuple[int, ...], order: str
) -> None:
    array = np.asarray(np.arange(np.prod(shape)).reshape(shape), order=order, dtype=">u2")  # type: ignore[call-overload]
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version=version)
    part = Part(index=2) if len(shape) == 3 else Part()
    found = open_npy(file.getvalue(), None).labels(part)
    np.testing.assert_array_equal(found, np.load(io.BytesIO(file.getvalue()))[2 if len(shape) == 3 else slice(None)])


def test_npy_headers_of_other_writers() -> None:
    numbers = np.arange(20, dtype=np.uint8)
    for text in (
        b'{"shape":(4,5),"fortran_order":False,"descr":"|u1"}\n',
        b"{'descr': '|u1', 'fortran_order': False, 'shape': (4L, 5L), }  \n",
    ):
        data = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + numbers.tobytes()
        np.testing.assert_array_equal(pixels(data), numbers.reshape(4, 5))
    records = np.zeros((2, 2), [("shape", "f4"), ("descr", "<i2")])
    assert pixels(npz_bytes(image=VOLUME[0], records=records)).shape == (5, 6)


def test_threads_read_npz_files_without_an_error_at_random() -> None:
    data = npz_bytes(image=VOLUME, label=np.zeros(3))

    def read(index: int) -> bool:
        return np.array_equal(pixels(data, key="image", index=index % 4), VOLUME[index % 4])

    with (
        mock.patch("ast.literal_eval", side_effect=SystemError("AST constructor recursion depth mismatch")),
        ThreadPoolExecutor(8) as pool,
    ):
        assert all(pool.map(read, range(200)))


@pytest.mark.parametrize("error", [MemoryError, SystemError])
def test_want_of_memory_and_interpreter_errors_are_no_damage(error: type[Exception]) -> None:
    with pytest.raises(error), decode_errors("NPY"):
        raise error
    with (
        pytest.raises(DecodeError, match=r"^damaged, truncated or unsupported NPY data .KeyError"),
        decode_errors("NPY"),
    ):
        raise KeyError


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [np.uint16, np.float32, np.float64])
@pytest.mark.parametrize("channels", [3, 4])
def test_deep_colour_is_one_picture_and_keeps_its_depth(form: str, dtype: type, channels: int, tmp_path: Path) -> None:
    colour: np.ndarray = np.random.default_rng(5).integers(0, 60000, (17, 20, channels)).astype(dtype)
    data = FORMS[form](colour)
    found = pixels(data)
    np.testing.assert_array_equal(found, colour[..., :3])
    assert found.dtype == (np.float32 if found.dtype.kind == "f" else dtype)
    np.testing.assert_array_equal(pixels(data, index=4), colour[4])  # named: a volume after all
    (tmp_path / "a").write_bytes(data)
    assert opening.list_parts(tmp_path / "a") == [Part()]


def test_deep_arrays_with_a_short_last_axis_are_colour_only_where_the_sides_are_much_longer(tmp_path: Path) -> None:
    for shape, parts in (((13, 13, 3), 1), ((12, 40, 3), 12), ((40, 12, 3), 40), ((16, 40, 4), 16), ((40, 40, 5), 40)):
        (tmp_path / "a").write_bytes(npy_bytes(np.zeros(shape, np.float32)))
        assert len(opening.list_parts(tmp_path / "a")) == parts


@pytest.mark.parametrize("shape", [(2, 3, 64, 64), (2, 30, 30, 17), (2, 3, 40, 4)])
def test_four_axes_that_do_not_end_in_channels_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    array = np.random.default_rng(6).integers(0, 900, shape).astype(np.int16)
    data = npy_bytes(array)
    (tmp_path / "a").write_bytes(data)
    clear = f"{shape[3]} channels of {shape[1]}x{shape[2]} pixels are not clear: name axis= and index= .* channel="
    with pytest.raises(DecodeError, match=clear):
        opening.list_parts(tmp_path / "a")
    with pytest.raises(DecodeError, match=clear):
        pixels(data, index=1)
    np.testing.assert_array_equal(pixels(data, axis="1", index=1, channel="3"), array[:, 1, :, 3])


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32])
def test_percentiles_of_signed_arrays_do_not_overflow(dtype: type) -> None:
    ends = np.iinfo(dtype)
    array: np.ndarray = np.array([ends.min, ends.max] * 12).reshape(4, 3, 2).astype(dtype)
    percentiles = opening.open_bytes(npy_bytes(array)).pixels(Part(index=0), OPTIONS).percentiles
    assert percentiles is not None
    assert percentiles(1.0, 50.0) == pytest.approx(tuple(np.percentile(array.astype(float), (1, 50))))


# What must never happen


def test_nothing_outside_an_hdf5_file_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.h5").write_bytes(hdf5_bytes({"main": VOLUME}))
    VOLUME.tofile(tmp_path / "secret.raw")
    with h5py.File(tmp_path / "bad.h5", "w") as file:
        file["external"] = h5py.ExternalLink(str(tmp_path / "secret.h5"), "main")
        file["through"] = h5py.SoftLink("/external")
        layout = h5py.VirtualLayout(VOLUME.shape, VOLUME.dtype)
        layout[:] = h5py.VirtualSource(str(tmp_path / "secret.h5"), "main", VOLUME.shape)
        file.create_virtual_dataset("virtual", layout)
        space = [(str(tmp_path / "secret.raw"), 0, h5py.h5f.UNLIMITED)]
        file.create_dataset("raw", VOLUME.shape, VOLUME.dtype, external=space)
    data = (tmp_path / "bad.h5").read_bytes()
    for key in ("external", "through", "virtual", "raw"):
        with pytest.raises(DecodeError, match="the array named is a link, or its samples lie in another file"):
            pixels(data, key=key, index=0)
    with pytest.raises(DecodeError, match="no array of the key named"):
        pixels(data, key="external/main", index=0)
    with pytest.raises(DecodeError, match="no array that could be an image"):
        opening.list_parts(tmp_path / "bad.h5")


def test_a_group_that_holds_itself_ends_and_references_are_no_images() -> None:
    file = io.BytesIO()
    with h5py.File(file, "w") as opened:
        group = opened.create_group("a")
        group["again"] = group
        group["main"] = VOLUME
        opened.create_dataset("reference", data=np.array([[group.ref, group.ref]] * 2), dtype=h5py.ref_dtype)
        opened.create_dataset("ragged", (2, 2), h5py.vlen_dtype(np.int32))
        opened.create_dataset("records", data=np.zeros((2, 2), [("x", "f4")]))
        opened["empty"] = h5py.Empty("f4")
    assert np.array_equal(pixels(file.getvalue(), index=1), VOLUME[1])
    for key in ("reference", "ragged", "records", "empty"):
        with pytest.raises(DecodeError, match="no array of the key named"):
            pixels(file.getvalue(), key=key)
    with (
        mock.patch("featstore.images.hdf5._MAX_OBJECTS", 1),
        pytest.raises(DecodeError, match="the HDF5 file has more than 1 objects"),
    ):
        pixels(hdf5_bytes({"a/b": VOLUME, "c/d": VOLUME, "e": VOLUME}), key="e")


def test_pickles_are_refused(tmp_path: Path) -> None:
    objects = np.array([[{"a": 1}, {"b": 2}]], dtype=object)
    for data in (npy_bytes(objects, pickled=True), mat_bytes(cell=objects)):
        with pytest.raises(DecodeError, match=r"no image|no array that could be an image"):
            pixels(data)
    file = io.BytesIO()
    np.savez(file, bad=objects)
    with pytest.raises(DecodeError, match="no array that could be an image"):
        pixels(file.getvalue())
    with pytest.raises(DecodeError, match="the array is no image"):
        pixels(file.getvalue(), key="bad")


def test_size_bombs_are_refused_before_memory_is_taken(tmp_path: Path) -> None:
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (40000, 40000, 40000), }"
    npy = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
    with pytest.raises(DecodeError, match="a picture has more than the limit of 268435456 pixels"):
        pixels(npy, index=0)
    flat = npy.replace(b"40000, 40000, 40000", b"900000, 1000, 900  ")
    with pytest.raises(DecodeError, match="the array takes 810000000000 bytes, above the limit of 2147483648"):
        pixels(flat, index=0)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", flat + bytes(10**6))
    with pytest.raises(DecodeError, match="the array takes 810000000000 bytes"):
        pixels(file.getvalue(), index=0)
    wide = io.BytesIO()
    with h5py.File(wide, "w") as opened:
        opened.create_dataset("main", (2**20, 2**20), np.uint8, chunks=(2**16, 2**15 + 1), compression="gzip")
    with pytest.raises(DecodeError, match="the HDF5 file has chunks above the limit of 2 GiB"):
        pixels(wide.getvalue())
    bomb = mat_bytes(packed=False, a=np.zeros((2, 2)))[:128] + struct.pack("<II", 15, 0)
    packed = zlib.compress(bytes(10**6))
    bomb = bomb[:-4] + struct.pack("<I", len(packed)) + packed
    with (
        mock.patch("featstore.images.matlab.MAX_VOLUME_BYTES", 10**5),
        pytest.raises(DecodeError, match="the MATLAB file holds more than the limit of 100000 bytes"),
    ):
        pixels(bomb)


@pytest.mark.parametrize("form", FORMS)
def test_truncated_files_are_refused(form: str) -> None:
    data = FORMS[form](VOLUME)
    for length in (len(data) - 30, len(data) // 2):
        with pytest.raises(DecodeError, match=r"truncated|damaged"):
            pixels(data[:length], index=3)


def test_damage_is_told() -> None:
    mat = mat_bytes(image=VOLUME)
    with pytest.raises(DecodeError, match=r"^damaged MATLAB data"):
        pixels(mat[:136] + b"xx" + mat[138:], index=0)
    with pytest.raises(DecodeError, match=r"^truncated MATLAB data"):
        pixels(mat[:-3], index=0)
    inner = zlib.compress(zlib.decompress(mat[136:]))[:-8]
    with pytest.raises(DecodeError, match=r"^truncated MATLAB data"):
        pixels(mat[:128] + struct.pack("<II", 15, len(inner)) + inner, index=0)
    with pytest.raises(DecodeError, match="no array that could be an image"):
        pixels(mat_bytes(image=VOLUME[0] * 1j))
    plain = mat_bytes(packed=False, image=VOLUME)
    sides = struct.pack("<3i", *VOLUME.shape)
    with pytest.raises(DecodeError, match=r"^damaged MATLAB data"):
        pixels(plain.replace(sides, struct.pack("<3i", 4, 5, 7)), index=0)
    npy = npy_bytes(VOLUME)
    with pytest.raises(DecodeError, match=r"a .npy file of another version than 1.0, 2.0 and 3.0 is not read"):
        pixels(npy[:6] + b"\x04\x00" + npy[8:], index=0)
    with pytest.raises(DecodeError, match=r"the header of an NPY array takes \d+ bytes, above the limit of 65536"):
        pixels(npy[:6] + b"\x03\x00" + npy[8:], index=0)
    for bad in (npy[:20] + b"(" + npy[21:], npy[:60], npy[:10] + b"{}" + b" " * (len(npy) - 12)):
        with pytest.raises(DecodeError, match=r"^damaged or truncated NPY data: its header does not describe an array"):
            pixels(bad, index=0)
    with pytest.raises(DecodeError, match=r"^damaged, truncated or unsupported NPY data .TypeError"):
        pixels(npy.replace(b"<i2", b"<q9"), index=0)


@settings(max_examples=120, deadline=None)
@given(seed=st.integers(0, 2**32), form=st.sampled_from(sorted(FORMS)))
def test_damaged_files_are_refused_or_read_but_never_crash(seed: int, form: str) -> None:
    rng = np.random.default_rng(seed)
    data = np.frombuffer(FORMS[form](VOLUME), np.uint8).copy()
    where = rng.integers(0, len(data), rng.integers(1, 9))
    data[where] = rng.integers(0, 256, len(where))
    with contextlib.suppress(DecodeError):
        found = opening.open_bytes(data.tobytes()).pixels(Part(index=1), OPTIONS).pixels
        assert found.ndim in (2, 3)
        assert 0 < found.size <= MAX_PIXELS
        assert np.isfinite(found).all()


def test_memory_is_told_and_given_back() -> None:
    data = npz_bytes(image=VOLUME)
    opened = open_npz(data, None)
    before = opened.num_bytes
    assert before == len(data)
    opened.pixels(Part(index=0), OPTIONS)
    assert opened.num_bytes == before + VOLUME.nbytes
    held = open_npy(npy_bytes(VOLUME), None)
    held.pixels(Part(index=0), OPTIONS)
    assert held.num_bytes == len(npy_bytes(VOLUME))  # a view of the bytes
    for each in (opened, held, open_hdf5(hdf5_bytes({"a": VOLUME}), None), open_matlab(mat_bytes(a=VOLUME), None)):
        assert isinstance(each, ArrayFile)
        each.close()
        with pytest.raises(DecodeError, match="no array that could be an image"):
            each.pixels(Part(index=0), OPTIONS)


def test_without_h5py_the_extra_is_named() -> None:
    data = hdf5_bytes({"a": VOLUME})
    with (
        mock.patch.dict("sys.modules", {"h5py": None}),
        pytest.raises(ConfigError, match=r"pip install 'featstore\[medical\]'"),
    ):
        open_hdf5(data, None)


def test_another_kind_of_file_holds_no_arrays(tmp_path: Path) -> None:
    from featstore.images.arrays import list_parts

    (tmp_path / "a").write_bytes(b"GIF89a")
    with pytest.raises(DecodeError, match="this is a GIF file and holds no arrays"):
        list_parts(tmp_path / "a")
