"""Decoding damaged files, and many at a time: an array that is right, or a DecodeError that quotes nothing."""

import io
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from image_files import FILES, SECRET, chunk, encode, smooth, tiff
from PIL import Image

from featstore.errors import DecodeError
from featstore.images import decode

# Files that are damaged


@pytest.mark.parametrize("name", list(FILES))
def test_no_beginning_of_a_file_decodes_to_something_else(name: str) -> None:
    data = FILES[name]
    whole = decode(data)
    for length in range(1, len(data), 1 + len(data) // 250):
        try:
            part = decode(data[:length])
        except DecodeError:
            continue
        np.testing.assert_array_equal(part, whole)


@pytest.mark.parametrize("name", ["png", "png colour", "png 16", "png palette"])
def test_no_changed_byte_of_png_data_passes(name: str) -> None:
    """Pillow alone lets some through: it never looks at the checksums of the image data."""
    data = FILES[name]
    for at in range(8, len(data) - 4, 3):
        changed = bytearray(data)
        changed[at] ^= 0x10
        with pytest.raises(DecodeError):
            decode(bytes(changed))


def test_a_damaged_comment_behind_the_pixels_costs_nothing() -> None:
    data = FILES["png"]
    comment = chunk(b"tEXt", b"Comment\0" + SECRET.encode())
    np.testing.assert_array_equal(decode(data[:-12] + comment[:-1] + b"x" + data[-12:]), smooth())


def test_png_reasons() -> None:
    data = FILES["png"]
    with pytest.raises(DecodeError, match="truncated PNG data"):
        decode(data[:-1])
    with pytest.raises(DecodeError, match="a checksum does not match"):
        decode(data[:60] + bytes([data[60] ^ 1]) + data[61:])
    with pytest.raises(DecodeError, match=r"damaged, truncated or unsupported PNG data"):
        decode(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", bytes(13)) + chunk(b"IEND", b""))


@pytest.mark.parametrize("name", ["jpeg", "jpeg colour", "jpeg progressive", "jpeg restart"])
def test_a_jpeg_whose_tail_is_zeros(name: str) -> None:
    data = FILES[name]
    for length in range(len(data) // 2, len(data) - 2, 37):
        with pytest.raises(DecodeError, match="JPEG"):
            decode(data[:length] + bytes(len(data) - length))
    with pytest.raises(DecodeError, match="the end marker is missing"):
        decode(data[:-2] + bytes(2))


@pytest.mark.parametrize("name", ["jpeg large", "jpeg large colour", "jpeg large restart"])
def test_a_cut_jpeg_with_an_end_marker_is_no_half_grey_image(name: str) -> None:
    image = smooth(200, 160) if "colour" not in name else np.dstack([smooth(200, 160, seed) for seed in range(3)])
    data = encode(image, "JPEG", restart_marker_rows=1 if "restart" in name else 0)
    for share in (0.4, 0.6, 0.8, 0.9):
        with pytest.raises(DecodeError, match="the end of the image is missing"):
            decode(data[: int(share * len(data))] + b"\xff\xd9")


def test_a_jpeg_that_ends_in_mid_grey_is_whole() -> None:
    image = smooth(64, 64)
    image[32:] = 128
    for options in ({}, {"progressive": True}, {"restart_marker_rows": 1}):
        decoded = decode(encode(image, "JPEG", quality=95, **options))
        assert (decoded[-1] == 128).all()
        assert decoded.shape == (64, 64)


def test_a_tiff_without_its_last_strips() -> None:
    with pytest.raises(DecodeError, match="strips are missing"):
        decode(tiff(smooth(), t257=999))
    with pytest.raises(DecodeError, match="strips are missing"):
        decode(tiff(np.zeros((4, 4, 3), np.uint16), photometric=2, t257=999))


def mutate(data: bytes, generator: np.random.Generator) -> bytes:
    """Cut, overwrite, insert or delete at random."""
    mutated = bytearray(data)
    at = int(generator.integers(0, len(data)))
    noise = generator.integers(0, 256, int(generator.integers(1, 40)), dtype=np.uint8).tobytes()
    match generator.integers(0, 5):
        case 0:
            del mutated[at:]
        case 1:
            for place in generator.integers(0, len(data), 5):
                mutated[place] = generator.integers(0, 256)
        case 2:  # headers, with the values that break arithmetic
            for place in generator.integers(0, min(len(data), 120), 3):
                mutated[place] = generator.choice([0, 1, 127, 128, 255])
        case 3:
            mutated[at:at] = noise
        case _:
            del mutated[at : at + len(noise)]
    return bytes(mutated)


def test_damaged_files_give_an_array_or_a_decode_error() -> None:
    """Warnings are errors here, so none escapes; other exceptions and hangs fail the test."""
    generator = np.random.default_rng(7)
    outcomes = {"array": 0, "error": 0}
    for data in list(FILES.values()) * 60:
        reason = ""
        try:
            pixels = decode(mutate(data, generator))
        except DecodeError as error:
            reason = str(error)
        assert SECRET not in reason
        assert len(reason) < 120
        outcomes["error" if reason else "array"] += 1
        if reason:
            continue
        assert pixels.dtype in (np.uint8, np.uint16, np.int32, np.float32)
        assert pixels.ndim == 2 or pixels.shape[2] == 3
    assert min(outcomes.values()) > 100


def test_reasons_quote_nothing_from_the_file(caplog: pytest.LogCaptureFixture) -> None:
    for name in ("jpeg", "tiff", "png alpha"):
        data = FILES[name]
        with pytest.raises(DecodeError) as caught:
            decode(data[: len(data) // 2])
        assert SECRET not in str(caught.value)
        assert caught.value.__suppress_context__
    assert SECRET not in caplog.text


# Threads


def test_decoding_in_threads_equals_decoding_in_turn() -> None:
    jobs = [mutate(data, np.random.default_rng(seed)) for seed in range(8) for data in FILES.values()]

    def outcome(data: bytes) -> str | bytes:
        try:
            return decode(data).tobytes()
        except DecodeError as error:
            return str(error)

    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(outcome, jobs))
    assert together == [outcome(data) for data in jobs]
    assert list(warnings.filters) == before


def test_warnings_of_pillow_are_hidden_and_those_of_others_are_not() -> None:
    """Warnings are errors here: unless Pillow's is filtered out, this whole image would be refused."""
    data = FILES["png"]
    odd = data[:33] + chunk(b"acTL", bytes(8)) + data[33:]  # an animation of no pictures
    with pytest.warns(UserWarning, match="Invalid APNG"):
        Image.open(io.BytesIO(odd))
    np.testing.assert_array_equal(decode(odd), smooth())
    from featstore.images.raster import _quiet_pillow

    with _quiet_pillow, pytest.warns(UserWarning, match="mine"):
        warnings.warn("mine", UserWarning, stacklevel=1)
