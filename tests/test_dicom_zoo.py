"""154 real DICOM files and 11 broken ones against a list made elsewhere: equal pixels, or a clear reason."""

import csv
import hashlib
import time
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from featstore.configs import DicomMode
from featstore.errors import DecodeError
from featstore.images.decoded import DecodeOptions
from featstore.images.dicom import DicomFile, list_parts, open_dicom, raw_frame
from featstore.images.opening import open_bytes
from featstore.images.part import WHOLE
from featstore.images.preprocess import PreprocessSpec, preprocess
from featstore.images.raster import decode

pytestmark = pytest.mark.realdata

# The list was made with pylibjpeg-libjpeg too, which alone reads these.
GPL_ONLY = {
    "CT0012.fragmented_no_bot_jpeg_baseline.51.dcm",
    "JLSL_08_07_0_1F.dcm",
    "JPGExtended.dcm",
    "RG2_JPLY_fixed.dcm",
}
LOSSY = ("1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.81", "1.2.840.10008.1.2.4.91")
REASONS = {
    "meta_missing_tsyntax.dcm": "names no transfer syntax",
    "OT-PAL-8-face.dcm": "names no transfer syntax",
    "nested_priv_SQ.dcm": "BitsAllocated is missing",
    "MR_truncated.dcm": "truncated DICOM pixel data: 8130 bytes, 1 frame.s. need 8192",
    "badVR.dcm": "NumberOfFrames is no number",
    "JPEG-lossy.dcm": "JPEG Extended of 12 bits is read by the GPL plugin pylibjpeg-libjpeg alone",
    "JPEG2000-embedded-sequence-delimiter.dcm": "the compressed image is .* the DICOM header has 1024x256",
    "liver_rle.dcm": "damaged or unsupported RLE data",
    "liver_nonbyte_aligned_rle.dcm": "damaged or unsupported RLE data",
    "liver_deflate.dcm": "the transfer syntax of this file is not read",
    "liver_nonbyte_aligned_deflate.dcm": "the transfer syntax of this file is not read",
    "CTImage.dcm_JPEGProcess6_8TransferSyntax_1.2.840.10008.1.2.4.53.dcm": "JPEG Spectral Selection.* is not read",
    "CTImage.dcm_JPEGProcess10_12TransferSyntax_1.2.840.10008.1.2.4.55.dcm": "JPEG Full Progression.* is not read",
    "rtplan.dcm": r"DICOM object without pixel data \(RTPLAN\)",
    "rtstruct.dcm": r"DICOM object without pixel data \(RTSTRUCT\)",
    "emri_small_jpeg_2k_lossless_too_short.dcm": "truncated DICOM data: the file ends within its header",
    "truncated_half_0.dcm": "truncated DICOM pixel data: 3341 bytes",
    "truncated_half_2.dcm": "15 frame.s. need 6000",
    "truncated_in_header_0.dcm": "ends within its header",
    "empty.dcm": "the file is empty",
    "text_named.dcm": "not an image file of a known kind",
}


@pytest.fixture(scope="module")
def zoo(shared_data: Path) -> dict[Path, dict[str, str]]:
    """Path -> its row of the list."""
    folder = shared_data / "dicom"
    with (folder / "manifest.csv").open() as file:
        return {folder / row["path"]: row for row in csv.DictReader(file)}


def frames_of(path: Path) -> np.ndarray:
    data = path.read_bytes()
    opened = open_dicom(data, path)
    frames = [opened.raw(part.frame or 0) for part in list_parts(path)]
    return np.stack(frames) if len(frames) > 1 else frames[0]


def test_every_file_that_decodes_has_the_listed_pixels(zoo: dict[Path, dict[str, str]]) -> None:
    decoding = {path: row for path, row in zoo.items() if row["expect"].endswith("decodes")}
    assert len(decoding) == 102
    equal = 0
    for path, row in decoding.items():
        if path.name in GPL_ONLY:
            continue
        frames = frames_of(path)
        assert "x".join(map(str, frames.shape)) == row["shape"], path.name
        listed = np.dtype(row["dtype"])
        assert frames.dtype == listed.newbyteorder("="), path.name
        assert abs(frames.min() - float(row["vmin"])) <= 1, path.name
        assert abs(frames.max() - float(row["vmax"])) <= 1, path.name
        assert abs(frames.mean(dtype=np.float64) - float(row["mean"])) <= 0.05, path.name
        same = hashlib.sha256(frames.astype(listed).tobytes()).hexdigest()[:16] == row["pixsha"]
        assert same or row["ts"] in LOSSY, path.name
        equal += same
    assert equal >= 97  # lossy ones among them: the same decoders give the same grey levels


def test_files_that_only_the_gpl_plugin_reads_say_so(zoo: dict[Path, dict[str, str]]) -> None:
    paths = [path for path in zoo if path.name in GPL_ONLY]
    assert len(paths) == len(GPL_ONLY)
    for path in paths:
        with pytest.raises(DecodeError, match="is read by the GPL plugin pylibjpeg-libjpeg alone"):
            raw_frame(path.read_bytes(), 0)


def test_the_rest_fails_with_a_clear_reason_or_gives_an_image(zoo: dict[Path, dict[str, str]]) -> None:
    decoded = set()
    for path, row in zoo.items():
        if row["expect"].endswith("decodes"):
            continue
        try:
            opened = open_bytes(path.read_bytes())
            opened.pixels(WHOLE, DecodeOptions())
        except DecodeError as error:
            reason = str(error)
        else:
            decoded.add(path.name)
            continue
        if row["expect"].endswith("no-pixel-data") and path.name not in (*REASONS, "no_meta.dcm"):
            assert reason.startswith("DICOM object without pixel data"), path.name
    # a float image the list counted as none, one without its preamble, one whose pixels were overwritten, and a PNG
    assert decoded == {"parametric_map_float.dcm", "no_preamble.dcm", "bytes_overwritten.dcm", "png_named.dcm"}


@pytest.mark.parametrize(("name", "reason"), REASONS.items())
def test_reason_of_a_file_that_fails(zoo: dict[Path, dict[str, str]], name: str, reason: str) -> None:
    [path] = [path for path in zoo if path.name == name]
    with pytest.raises(DecodeError, match=reason):
        open_bytes(path.read_bytes()).pixels(WHOLE, DecodeOptions())


def test_a_png_named_dcm_is_no_dicom(zoo: dict[Path, dict[str, str]]) -> None:
    [path] = [path for path in zoo if path.name == "png_named.dcm"]
    with pytest.raises(DecodeError, match=r"^not a DICOM file$"):
        open_dicom(path.read_bytes(), path)


def test_parts_are_the_listed_frames_or_a_reason(zoo: dict[Path, dict[str, str]]) -> None:
    for path, row in zoo.items():
        if row["expect"] == "decodes" and path.name not in GPL_ONLY:
            shape = [int(side) for side in row["shape"].split("x")]
            frames = int(row["frames"] or 1)
            assert len(list_parts(path)) == frames, path.name
            assert frames == 1 or shape[0] == frames

    with pytest.raises(DecodeError, match=r"^DICOM object without pixel data \(RTPLAN\)$"):
        list_parts(next(path for path in zoo if path.name == "rtplan.dcm"))


@pytest.mark.parametrize(
    "mode", ["standard", *(pytest.param(mode, marks=pytest.mark.slow) for mode in get_args(DicomMode)[1:])]
)
def test_every_file_gives_finite_network_input_or_an_error_in_time(
    zoo: dict[Path, dict[str, str]], mode: DicomMode
) -> None:
    spec = PreprocessSpec(
        geometry="squash", height=32, width=32, mean=(0.5,) * 3, std=(0.5,) * 3, dicom_mode=mode, quantise="none"
    )
    made = 0
    for path in zoo:
        start = time.monotonic()
        try:
            found = open_bytes(path.read_bytes(), path).pixels(WHOLE, spec.decoding)
            planes = preprocess(found, spec)
        except DecodeError:
            continue
        finally:
            assert time.monotonic() - start < 30, path.name
        assert planes.shape[1:] == (32, 32), path.name
        assert np.isfinite(planes).all(), path.name
        assert 0 <= planes.min() <= planes.max() <= 255, path.name
        made += 1
    assert made >= (50 if mode == "xrv" else 100)


def test_hounsfield_units_of_a_chest_ct_equal_its_tiff_twin(shared_data: Path) -> None:
    twins = 0
    for path in sorted((shared_data / "ct" / "chest_dicom").iterdir()):
        tiff = next((shared_data / "ct" / "chest_tiff").glob(f"{path.stem}.tif*"), None)
        if tiff is None:
            continue
        opened = open_dicom(path.read_bytes(), path)
        assert isinstance(opened, DicomFile)
        units = opened.pixels(WHOLE, DecodeOptions(voi=False))
        assert units.display is None
        np.testing.assert_array_equal(units.pixels, decode(tiff.read_bytes()))
        twins += 1
    assert twins >= 1
