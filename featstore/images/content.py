"""What the bytes of a file say before anything parses them: its kind, and whether a PNG or JPEG is whole."""

import re
import zlib

from featstore.errors import DecodeError

MAGIC = {
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "JPEG": rb"\xff\xd8\xff",
    "TIFF": rb"II[*+]\0|MM\0[*+]",
    "WebP": rb"RIFF....WEBP",
    "GIF": rb"GIF8[79]a",
    "BMP": rb"BM",
    "PNM": rb"P[1-6f]\s",
}
OTHERS = {  # decoded elsewhere than in `raster`
    "HDF5": rb"(?:.{512})?\x89HDF\r\n\x1a\n",  # a MATLAB 7.3 file is one behind 512 bytes of its own
    "MATLAB": rb"MATLAB 5\.0 MAT-file",
    "MetaImage": rb"\s*(?:ObjectType|NDims)\s*=",
    "NPY": rb"\x93NUMPY",
    "NPZ": rb"PK\x03\x04",
    "video": rb".{4}ftyp|RIFF....AVI |\x1a\x45\xdf\xa3|\0\0\x01\xba",
}
# Without the 128 free bytes DICOM starts with an element of group 2 or 8: its number, then its type or its length.
_BARE_DICOM = rb"[\x02\x08]\0.\0(?:[A-Z]{2}|..\0\0)|\0[\x02\x08]\0.[A-Z]{2}"
_NIFTI_MARKS = {348: (344, (b"n+1\0", b"ni1\0")), 540: (4, (b"n+2\0", b"ni2\0"))}  # by header size: place and forms


def recognise(data: bytes) -> str:
    """The kind of image file: a key of `MAGIC` or of `OTHERS`, "DICOM" or "NIfTI"; the first 1024 bytes are enough.

    Raises:
        DecodeError: an empty file, or no known kind.
    """
    if not data:
        raise DecodeError("the file is empty")
    if data[128:132] == b"DICM" or re.match(_BARE_DICOM, data, re.DOTALL):  # first: the free bytes may hold TIFF's mark
        return "DICOM"
    if _is_nifti(data):
        return "NIfTI"
    for kind, magic in (MAGIC | OTHERS).items():
        if re.match(magic, data, re.DOTALL):
            return kind
    raise DecodeError("not an image file of a known kind (PNG, JPEG, TIFF, DICOM, NIfTI, HDF5, NumPy, video, ...)")


def _is_nifti(data: bytes) -> bool:
    head = data[:352]
    if head[:2] == b"\x1f\x8b":
        try:
            head = zlib.decompressobj(wbits=31).decompress(data[:65536], 352)
        except zlib.error:
            return False
    sizes = (int.from_bytes(head[:4], "little"), int.from_bytes(head[:4], "big"))
    return any(head[at : at + 4] in marks for size in sizes for at, marks in (_NIFTI_MARKS.get(size, (0, ())),))


def check_png(data: bytes) -> None:
    """Every critical chunk must be there and meet its checksum; Pillow skips the checksums of the image data.

    Raises:
        DecodeError: a chunk is cut or damaged, or the last one is missing.
    """
    view, at, kind = memoryview(data), 8, b""
    while kind != b"IEND":
        end = at + 12 + int.from_bytes(view[at : at + 4], "big")
        kind = bytes(view[at + 4 : at + 8])
        if end > len(data):
            raise DecodeError("truncated PNG data")
        critical = not kind[0] & 0x20
        if critical and zlib.crc32(view[at + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], "big"):
            raise DecodeError("damaged PNG data: a checksum does not match")
        at = end


def check_jpeg(data: bytes) -> None:
    """An end marker must follow the header: a file whose tail is zeros, space that was never written, has none.

    Raises:
        DecodeError: it has none.
    """
    at = 2
    while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] not in (b"\xda", b""):  # up to the first scan
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    if data.rfind(b"\xff\xd9", at) < 0:
        raise DecodeError("truncated JPEG data: the end marker is missing")
