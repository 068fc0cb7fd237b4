"""Image files for tests of decoding: small ones of every format, and such as Pillow does not write."""

import io
import struct
import zlib
from typing import Any, Literal

import numpy as np
from PIL import Image

SECRET = "DOE^JANE"


def smooth(height: int = 24, width: int = 31, seed: int = 0) -> np.ndarray:
    """A grey uint8 image with structure and some noise."""
    noise = np.random.default_rng(seed).integers(0, 40, (height, width))
    return (noise + np.linspace(10, 200, width)[None] * np.linspace(0.4, 1, height)[:, None]).astype(np.uint8)


def colour(seed: int = 0) -> np.ndarray:
    gray = smooth(seed=seed)
    return np.stack([gray, gray[::-1], gray[:, ::-1]], axis=-1)


def encode(image: np.ndarray | Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def png(samples: np.ndarray, colour_type: int, *, filtered: bool = False) -> bytes:
    """A PNG of 8 or 16 bits written from the format's definition: Pillow writes no 16-bit colour."""
    depth = 8 * samples.dtype.itemsize
    rows = samples.astype(">u2" if depth == 16 else np.uint8).reshape(len(samples), -1).view(np.uint8)
    if filtered:  # "Up": each byte less the one above
        rows = np.diff(rows.astype(int), axis=0, prepend=0).astype(np.uint8)
    scanlines = b"".join(bytes([2 if filtered else 0]) + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", samples.shape[1], samples.shape[0], depth, colour_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(scanlines)) + chunk(b"IEND", b"")
    )


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def tiff(
    samples: np.ndarray,
    *,
    photometric: int = 1,
    order: Literal["<", ">"] = "<",
    drop: tuple[int, ...] = (),
    **tags: int,
) -> bytes:
    """One uncompressed strip of a one- or multi-channel TIFF in either byte order; `tags` are added as `t<number>`."""
    channels = 1 if samples.ndim == 2 else samples.shape[2]
    kind = {"u": 1, "i": 2, "f": 3}[samples.dtype.kind]
    body = samples.astype(samples.dtype.newbyteorder(order)).tobytes()
    bits = [8 * samples.dtype.itemsize] * channels
    entries: dict[int, list[int]] = {
        256: [samples.shape[1]], 257: [samples.shape[0]], 258: bits, 259: [1], 262: [photometric], 273: [0],
        277: [channels], 278: [samples.shape[0]], 279: [len(body)], 339: [kind] * channels,
    }  # fmt: skip
    entries |= {int(name[1:]): [value] for name, value in tags.items()}
    entries = {tag: values for tag, values in sorted(entries.items()) if tag not in drop}
    size = 8 + 2 + 12 * len(entries) + 4
    extra = b""
    directory = struct.pack(order + "H", len(entries))
    for tag, values in entries.items():
        if tag == 273:
            values = [size + 64]
        if len(values) == 1:
            directory += struct.pack(order + "HHII", tag, 4, 1, values[0])
        elif len(values) == 2:  # fits where others have their offset
            directory += struct.pack(order + "HHIHH", tag, 3, 2, *values)
        else:
            directory += struct.pack(order + "HHII", tag, 3, len(values), size + len(extra))
            extra += struct.pack(f"{order}{len(values)}H", *values)
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(order + "I", 8) + directory + struct.pack(order + "I", 0) + extra.ljust(64, b"\0") + body


def valid_files() -> dict[str, bytes]:
    """Small files of every format and most of their forms."""
    gray, rgb = smooth(), colour()
    palette = Image.fromarray(rgb).quantize(16)
    exif = Image.Exif()
    exif[274], exif[315] = 6, SECRET
    return {
        "png": encode(gray, "PNG"),
        "png colour": encode(rgb, "PNG"),
        "png 16": encode(gray.astype(np.uint16) * 257, "PNG"),
        "png 48": png(rgb.astype(np.uint16) * 257, 2),
        "png palette": encode(palette, "PNG"),
        "png alpha": encode(Image.fromarray(rgb).convert("RGBA"), "PNG", exif=exif),
        "jpeg": encode(gray, "JPEG", exif=exif, comment=SECRET),
        "jpeg colour": encode(rgb, "JPEG"),
        "jpeg progressive": encode(rgb, "JPEG", progressive=True),
        "jpeg restart": encode(gray, "JPEG", restart_marker_rows=1),
        "jpeg cmyk": encode(Image.fromarray(rgb).convert("CMYK"), "JPEG"),
        "tiff": encode(gray, "TIFF", description=SECRET),
        "tiff lzw": encode(rgb, "TIFF", compression="tiff_lzw"),
        "tiff float": encode(gray.astype(np.float32), "TIFF"),
        "tiff 16": encode(gray.astype(np.uint16), "TIFF", compression="tiff_adobe_deflate"),
        "tiff 64": tiff(gray.astype(np.float64)),
        "tiff jpeg": encode(rgb, "TIFF", compression="jpeg"),
        "tiff fax": encode(Image.fromarray(gray > 100), "TIFF", compression="group4"),
        "webp": encode(rgb, "WEBP"),
        "webp lossless": encode(rgb, "WEBP", lossless=True),
        "bmp": encode(gray, "BMP"),
        "bmp colour": encode(rgb, "BMP"),
        "gif": encode(gray, "GIF"),
        "gif animated": encode(palette, "GIF", save_all=True, append_images=[palette.rotate(90)]),
        "pgm": encode(gray, "PPM"),
        "ppm": encode(rgb, "PPM"),
    }


FILES = valid_files()
