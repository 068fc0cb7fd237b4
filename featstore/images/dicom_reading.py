"""The bytes of a DICOM file -> its elements, quietly and within bounds; what is asked of an element, as plain numbers.

pydicom parses. Its settings belong to the whole process and stay as they are.
"""

import io
import math
import re
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from featstore.errors import ConfigError, DecodeError
from featstore.images.sizes import MAX_PIXELS

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

MAX_INFLATED = 8 * MAX_PIXELS  # bytes of a deflated data set
DEFLATED = b"1.2.840.10008.1.2.1.99"
HEAD_BYTES = 4096  # hold the file meta information, and so the transfer syntax
MAX_NUMBERS = 4096  # of one text element, such as window centres
_LONG = (b"OB", b"OW", b"OF", b"OD", b"OL", b"OV", b"SQ", b"UC", b"UN", b"UR", b"UT", b"SV", b"UV")  # 4-byte lengths
_TEXT = ("DS", "IS", "UN", "LO", "SH", "CS", "ST", "LT", "UT")
# Only what is in this list is repeated in a reason: in a damaged file any text may stand in the place of a modality.
_MODALITIES = re.compile(
    "AU|CR|CT|DOC|DX|ECG|ES|GM|HD|IO|IVUS|KO|MG|MR|NM|OCT|OP|OT|PR|PT|PX|REG|RF|RTDOSE|RTIMAGE|RTPLAN|RTRECORD|"
    "RTSTRUCT|RWV|SC|SEG|SM|SR|US|XA|XC"
)
_USUAL = ("SpecificCharacterSet", "SOPClassUID", "Modality", "StudyInstanceUID", "Rows")


class BoundedFile(io.BufferedReader):
    """A file whose reads ask for no more than is left of it: a damaged length would take gigabytes at once."""

    def __init__(self, path: Path):
        super().__init__(path.open("rb", buffering=0))
        self._size = path.stat().st_size

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(self._size - self.tell(), 0)
        return super().read(left if size is None or size < 0 else min(size, left))


class _Quiet:
    """Keeps pydicom's warnings and log lines, which quote elements, from showing while any thread decodes.

    `warnings.catch_warnings` would restore the filters of one thread over those of another; here one entry stands in
    front of the list as long as somebody is inside, and pydicom's logger hands nothing on.
    """

    _MODULES = r"(pydicom|pylibjpeg|openjpeg|gdcm|PIL|numpy|featstore\.images\.dicom)\b"
    _LOGGERS = ("pydicom", "pylibjpeg", "openjpeg")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._filters: Any = []
        self._entry: Any = None
        self._handed_on: dict[str, bool] = {}

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                warnings.filterwarnings("ignore", module=self._MODULES)
                self._filters = warnings.filters
                self._entry = self._filters[0]
                for name in self._LOGGERS:
                    self._handed_on[name] = getLogger(name).propagate
                    getLogger(name).propagate = False

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                if self._entry in self._filters:
                    self._filters.remove(self._entry)
                for name, handed_on in self._handed_on.items():
                    getLogger(name).propagate = handed_on


_quiet = _Quiet()


@contextmanager
def dicom_errors(what: str) -> Iterator[None]:
    """Whatever is met in bad content becomes a DecodeError, without the words of the library: they quote elements.

    Want of memory and errors of the interpreter say nothing of the file and pass.

    Raises:
        DecodeError: as said.
    """
    with _quiet:
        try:
            yield
        except (DecodeError, ConfigError, MemoryError, SystemError):
            raise
        except Exception as error:  # two dozen types, and a closed list would let one bad file stop a run
            raise DecodeError(f"damaged, truncated or unsupported DICOM {what} ({type(error).__name__})") from None


def import_pydicom() -> Any:
    """The library.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import pydicom
    except ImportError:
        raise ConfigError("DICOM files need pydicom: pip install 'featstore[medical]'") from None
    return pydicom


def read_elements(data: bytes | BinaryIO, *, header_only: bool = False) -> "Dataset":
    """Every element of a file; `header_only` leaves out the pixel data. A file object is one that is not deflated.

    Raises:
        DecodeError: no DICOM, damaged, or a deflated data set beyond `MAX_INFLATED`.
    """
    pydicom = import_pydicom()
    with dicom_errors("header"):
        end = _meta_end(data) if isinstance(data, bytes) else 0
        if isinstance(data, bytes) and DEFLATED in data[:end]:
            head = pydicom.dcmread(io.BytesIO(data[:end]), force=True)
            plain = io.BytesIO(_inflate(data[end:]))
            dataset = pydicom.filereader.read_dataset(plain, is_implicit_VR=False, is_little_endian=True)
            dataset.file_meta = head.file_meta
        else:
            # A cut value would be taken as it is; pydicom only warns of it, so the pixel data is measured later.
            file = io.BytesIO(data) if isinstance(data, bytes) else data
            dataset = pydicom.dcmread(file, force=True, stop_before_pixels=header_only)
    # With `force` anything parses into some element.
    if not getattr(dataset, "file_meta", None) and not any(keyword in dataset for keyword in _USUAL):
        raise DecodeError("not a DICOM file")
    if not len(dataset):
        raise DecodeError("truncated DICOM data: the file ends within its header")
    return dataset  # type: ignore[no-any-return]


def _meta_end(data: bytes) -> int:
    """Where the file meta information (group 2, always explicit and little endian) ends."""
    at = 132 if data[128:132] == b"DICM" else 0
    while data[at : at + 2] == b"\x02\0":
        if data[at + 4 : at + 6] in _LONG:
            at += 12 + int.from_bytes(data[at + 8 : at + 12], "little")
        else:
            at += 8 + int.from_bytes(data[at + 6 : at + 8], "little")
    return at


def _inflate(data: bytes) -> bytes:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    plain = inflater.decompress(data, MAX_INFLATED)
    if inflater.unconsumed_tail:
        raise DecodeError(f"the deflated data set holds more than {MAX_INFLATED} bytes")
    if not inflater.eof:
        raise DecodeError("truncated DICOM data: the deflated data set has no end")
    return plain


def modality_named(dataset: "Dataset") -> str:
    """` (RTPLAN)`, or "" where no known modality is given."""
    with _quiet:
        try:
            modality = str(dataset.get("Modality", "")).strip()
        except Exception:  # whatever a damaged value raises: it is only wanted for a message
            modality = ""
    return f" ({modality})" if _MODALITIES.fullmatch(modality) else ""


def text(dataset: "Dataset", keyword: str) -> str:
    """A coded text in capitals, the first of several; "" where absent."""
    value = dataset.get(keyword)
    value = value if isinstance(value, str) or value is None else value[0]
    return "" if value is None else str(value).strip(" \0").upper()


def integer(dataset: "Dataset", keyword: str, default: int | None = None) -> int:
    """A whole number.

    Raises:
        DecodeError: it is absent and has no default, or is no whole number.
    """
    found = numbers(dataset, keyword)
    if not found and default is not None:
        return default
    if not found:
        raise DecodeError(f"the DICOM element {keyword} is missing")
    if not found[0].is_integer():
        raise DecodeError(f"the DICOM element {keyword} is no whole number")
    return int(found[0])


def numbers(dataset: "Dataset", keyword: str) -> list[float]:
    """The numbers of an element, empty where it is absent or empty; a decimal comma is read as a point.

    Raises:
        DecodeError: something else than finite numbers.
    """
    from pydicom.datadict import tag_for_keyword

    tag = tag_for_keyword(keyword)
    assert tag is not None, keyword
    if tag not in dataset:
        return []
    try:
        found = _numbers(dataset, tag)
    except (MemoryError, SystemError):
        raise
    except Exception:  # pydicom converts on access, and any damaged value may raise anything
        raise DecodeError(f"the DICOM element {keyword} is no number") from None
    if not all(math.isfinite(number) for number in found):
        raise DecodeError(f"the DICOM element {keyword} is not finite")
    return found


def _numbers(dataset: "Dataset", tag: int) -> list[float]:
    raw: Any = dataset.get_item(tag)  # not converted yet: pydicom refuses odd text that can be read
    if isinstance(raw.value, bytes) and (raw.VR in _TEXT or (raw.VR is None and _is_text(tag))):
        pieces = raw.value.decode("ascii").strip(" \0").split("\\")[:MAX_NUMBERS]
        return [float(piece.strip(" \0").replace(",", ".")) for piece in pieces if piece.strip(" \0")]
    value = dataset[tag].value
    if value is None or value == "":
        return []
    return [float(item) for item in ([value] if isinstance(value, (int, float, str)) else value)]


def _is_text(tag: int) -> bool:
    from pydicom.datadict import dictionary_VR

    return dictionary_VR(tag) in _TEXT
