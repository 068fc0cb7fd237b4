"""What decoders hand over and what they are told: full-depth pixels, and how their file wants them shown."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from featstore.configs import DecodeMode, DicomMode
from featstore.images.part import Part


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeOptions:
    """What a decoder must know of the preprocessing.

    `voi`: the intensity is `native`, so a DICOM file's own window applies; any other intensity is given the values
    after the modality LUT (Hounsfield units of a CT). `target` is (height, width) of what is wanted where `decode` is
    "scaled": a JPEG may then be decoded at 1/2, 1/4 or 1/8 of its size, not below twice the target.
    """

    dicom_mode: DicomMode = "standard"
    voi: bool = True
    decode: DecodeMode = "full"
    target: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Decoded:
    """Pixels (H, W) or (H, W, 3) at the depth of the file, before any intensity step.

    `display` is the range that the file itself shows from black to white (after its window), None where it has no say:
    `native` maps it to 0 to 255. `invert`: low values are white (MONOCHROME1), to be turned round after the intensity
    step. `percentiles(low, high)` gives these percentiles over the whole volume that a slice belongs to, None where
    the image stands alone.
    """

    pixels: np.ndarray
    display: tuple[float, float] | None = None
    invert: bool = False
    percentiles: Callable[[float, float], tuple[float, float]] | None = None


@runtime_checkable
class Opened(Protocol):
    """A file parsed once that holds several samples; used by several threads at once."""

    @property
    def num_bytes(self) -> int:
        """Memory it takes while it is kept."""

    def pixels(self, part: Part, options: DecodeOptions) -> Decoded:
        """One of its samples.

        Raises:
            DecodeError: no such part, or damaged content; the message quotes nothing from the file.
        """

    def close(self) -> None:
        """Give back what is held; it is not used afterwards."""
