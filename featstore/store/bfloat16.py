"""bfloat16 for zarr-python, which has no such data type (3.1 to 3.4): the name and bytes that tensorstore uses.

Importing this module imports zarr and needs ml_dtypes, which gives numpy the type; `register` then makes zarr read
and write it. Our own reader and writer of shards need neither zarr nor this module.
"""

import struct
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from zarr.core.dtype.common import HasEndianness, HasItemSize
from zarr.dtype import DataTypeValidationError, ZDType, data_type_registry

from featstore.store.shards import numpy_dtype

_NATIVE = numpy_dtype("bfloat16")
_BIG_ENDIAN = _NATIVE.newbyteorder(">")


# Without HasEndianness zarr stores the `bytes` codec without its byte order, and tensorstore refuses the array.
@dataclass(frozen=True, kw_only=True, slots=True)
class BFloat16(ZDType[Any, Any], HasEndianness, HasItemSize):
    """The zarr v3 data type `bfloat16`; it has no zarr v2 form."""

    dtype_cls: ClassVar[type[np.dtype[Any]]] = type(_NATIVE)
    _zarr_v3_name: ClassVar[Literal["bfloat16"]] = "bfloat16"

    @property
    def item_size(self) -> int:
        return 2

    @classmethod
    def from_native_dtype(cls, dtype: np.dtype[Any]) -> "BFloat16":
        if type(dtype) is not cls.dtype_cls:
            raise DataTypeValidationError(f"not numpy's bfloat16: {dtype}")
        return cls(endianness="big" if dtype == _BIG_ENDIAN else "little")

    def to_native_dtype(self) -> np.dtype[Any]:
        return _BIG_ENDIAN if self.endianness == "big" else _NATIVE

    @classmethod
    def _from_json_v2(cls, data: object) -> "BFloat16":
        raise DataTypeValidationError(f"zarr v2 has no bfloat16: {data!r}")

    @classmethod
    def _from_json_v3(cls, data: object) -> "BFloat16":
        if data != cls._zarr_v3_name:
            raise DataTypeValidationError(f"not 'bfloat16': {data!r}")
        return cls()

    def to_json(self, zarr_format: Literal[2, 3]) -> Any:
        if zarr_format != 3:
            raise ValueError("bfloat16 exists in zarr v3 only; create the array with zarr_format=3")
        return self._zarr_v3_name

    def _check_scalar(self, data: object) -> bool:
        return isinstance(data, (int, float, np.number, _NATIVE.type))

    def cast_scalar(self, data: object) -> Any:
        if not self._check_scalar(data):
            raise TypeError(f"a number must come for a bfloat16 scalar, got {data!r}")
        return _NATIVE.type(data)

    def default_scalar(self) -> Any:
        return _NATIVE.type(0)

    def to_json_scalar(self, data: object, *, zarr_format: Literal[2, 3]) -> float | str:
        number = float(self.cast_scalar(data))
        if np.isnan(number):
            return "NaN"
        if np.isinf(number):
            return "Infinity" if number > 0 else "-Infinity"
        return number

    def from_json_scalar(self, data: object, *, zarr_format: Literal[2, 3]) -> Any:
        """A number, `NaN`, `Infinity`, `-Infinity`, or the bit pattern in hexadecimal (`0x7fc0`), as the zarr v3
        specification writes floating-point fill values."""
        if data in ("NaN", "Infinity", "-Infinity"):
            return _NATIVE.type(float(str(data)))
        if isinstance(data, str) and data.startswith("0x") and len(data) == 6:
            return np.frombuffer(struct.pack("<H", int(data, 16)), np.uint16).view(_NATIVE)[0]
        return self.cast_scalar(data)


def register() -> None:
    """Make zarr-python know bfloat16, for arrays and for numpy arrays of ml_dtypes.bfloat16; again is harmless."""
    data_type_registry.register(BFloat16._zarr_v3_name, BFloat16)
