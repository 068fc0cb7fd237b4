"""Miniature volumes as sources, and one part of a file read as extraction does."""

import atexit
from functools import cache
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any

import numpy as np
from miniatures import volumes as make

from featstore.datasets import read_source
from featstore.datasets.source import Source
from featstore.images.decoded import DecodeOptions
from featstore.images.opening import open_path
from featstore.images.part import parse_part
from featstore.inputs import Inputs


def pixels(root: Path, path: str, part: str) -> np.ndarray:
    """The pixels of a part, named by its text, before any intensity step."""
    parsed = parse_part(part)
    _, opened = open_path(Inputs(root), path, parsed)
    assert not isinstance(opened, Exception), opened
    return opened.pixels(parsed, DecodeOptions()).pixels


def source_of(adapter: str, root: Path, **options: Any) -> Source:
    return read_source(adapter, root, **options)


def column(source: Source, name: str) -> list[Any]:
    return list(source.table[name].to_pylist())


def by_volume(source: Source, name: str) -> dict[str, Any]:
    return dict(zip(column(source, "volume"), column(source, name)))


@cache
def volume_root(adapter: str) -> Path:
    """The miniature of an adapter, written once and only read."""
    home = Path(mkdtemp(prefix="volumes-"))
    atexit.register(rmtree, home, ignore_errors=True)
    return make.WRITERS[adapter](home).root


def volume_source(adapter: str, **options: Any) -> Source:
    return source_of(adapter, volume_root(adapter), **options)
