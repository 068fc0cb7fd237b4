"""Bytes -> pixels: decode at full depth, map intensities, fit the geometry, normalise on the device.

`preprocess` is both a module and its main function; as an attribute of this package it is the function.
"""

from typing import TYPE_CHECKING, Any

from featstore.images.preprocess import PreprocessSpec, preprocess, stack
from featstore.images.sizes import fit_size, parse_resolution

if TYPE_CHECKING:
    from featstore.images.pixels import to_pixels as to_pixels
    from featstore.images.raster import decode as decode

__all__ = ["PreprocessSpec", "decode", "fit_size", "parse_resolution", "preprocess", "stack", "to_pixels"]

_LAZY = {"decode": "featstore.images.raster:decode", "to_pixels": "featstore.images.pixels:to_pixels"}


def __getattr__(name: str) -> Any:
    # Deferred: Pillow's readers are not needed to plan a run, nor is torch.
    if name in _LAZY:
        from pkgutil import resolve_name

        return resolve_name(_LAZY[name])
    raise AttributeError(f"module 'featstore.images' has no attribute {name!r}")
