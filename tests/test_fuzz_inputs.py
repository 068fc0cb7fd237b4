"""Damaged files of every kind: finite pixels or a DecodeError, in bounded time and memory, and never a crash.

The files are decoded in a process of their own, so that a decoder that dies is seen, with the seed that killed it.
"""

import gzip
import io
import itertools
import resource
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import h5py
import nibabel
import numpy as np
import pytest
from pydicom.uid import UID, JPEGBaseline8Bit, RLELossless

sys.path.insert(0, str(Path(__file__).parent))  # the process of its own starts in this file

import dicom_files
import image_files

from featstore.configs import DicomMode
from featstore.errors import DecodeError, ManifestError
from featstore.images.decoded import DecodeOptions
from featstore.images.opening import list_parts, open_bytes
from featstore.images.part import WHOLE, Part
from featstore.images.sizes import MAX_PIXELS

SECONDS = 20  # for one file of a few KB; a decoder that takes longer hangs
MAX_MEMORY = 4 * 2**30
MODES = get_args(DicomMode)


def _volume() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 900, (6, 7, 5)).astype(np.int16)


def _hdf5() -> bytes:
    out = io.BytesIO()
    with h5py.File(out, "w") as file:
        file.create_dataset("volumes/raw", data=_volume(), chunks=(2, 7, 5), compression="gzip")
        file.create_dataset("flat", data=_volume()[0])
    return out.getvalue()


def _npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def _npz() -> bytes:
    out = io.BytesIO()
    np.savez_compressed(out, image=_volume()[0], stack=_volume())
    return out.getvalue()


def _dicom() -> dict[str, bytes]:
    grey, colour = dicom_files.phantom(), np.stack([dicom_files.phantom(bits=8, seed=n) for n in range(3)], -1)
    window = {"WindowCenter": 1000, "WindowWidth": 2000, "RescaleSlope": 1, "RescaleIntercept": -1024}
    made = {
        f"DICOM {UID(syntax).name}": dicom_files.encode(dicom_files.dataset(grey, bits=12, **window), syntax)
        for syntax in dicom_files.LOSSLESS
    }
    made["DICOM baseline"] = dicom_files.encode(dicom_files.dataset(colour), JPEGBaseline8Bit)
    frames = np.stack([dicom_files.phantom(12, 10, seed=n) for n in range(3)])
    made["DICOM frames"] = dicom_files.encode(dicom_files.dataset(frames, frames=3), RLELossless)
    made["DICOM tables"] = dicom_files.encode(dicom_files.with_tables())
    made["DICOM palette"] = dicom_files.encode(dicom_files.with_palette())
    return made


def valid_files() -> dict[str, tuple[bytes, Part]]:
    """A small file of every kind, and a part of it."""
    nifti = nibabel.Nifti1Image(_volume(), np.diag([1.0, 2.0, -1.5, 1.0])).to_bytes()  # type: ignore[no-untyped-call]
    slice_ = Part(axis="axial", index=2)
    frames = {"DICOM frames": Part(frame=1)}
    return {
        **{name: (data, frames.get(name, WHOLE)) for name, data in _dicom().items()},
        **{name: (data, WHOLE) for name, data in image_files.valid_files().items()},
        "NIfTI": (nifti, slice_),
        "NIfTI gz": (gzip.compress(nifti, mtime=0), slice_),
        "NPY": (_npy(_volume()), Part(axis="0", index=1)),
        "NPZ": (_npz(), Part(key="stack", axis="0", index=1)),
        "HDF5": (_hdf5(), Part(key="volumes/raw", axis="0", index=1)),
    }


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """One to three injuries at random places."""
    for _ in range(rng.integers(1, 4)):
        data = INJURIES[rng.integers(len(INJURIES))](bytearray(data), rng)
    return data


def _place(data: bytearray, rng: np.random.Generator, size: int = 1) -> int:
    """Anywhere, but half of the time in the first 600 bytes, where headers are."""
    end = max(len(data) - size, 1)
    return int(rng.integers(min(600, end) if rng.random() < 0.5 else end))


def flip_bits(data: bytearray, rng: np.random.Generator) -> bytes:
    for _ in range(rng.integers(1, 9) if data else 0):
        data[_place(data, rng)] ^= 1 << int(rng.integers(8))
    return bytes(data)


def truncate(data: bytearray, rng: np.random.Generator) -> bytes:
    return bytes(data[: rng.integers(len(data) + 1)])


def swap_blocks(data: bytearray, rng: np.random.Generator) -> bytes:
    size = int(rng.integers(1, 65))
    one, other = _place(data, rng, size), _place(data, rng, size)
    data[one : one + size], data[other : other + size] = data[other : other + size], data[one : one + size]
    return bytes(data)


def change_length(data: bytearray, rng: np.random.Generator) -> bytes:
    """A number of 2 or 4 bytes, either byte order, becomes an extreme one."""
    size = int(rng.choice([2, 4]))
    at, value = _place(data, rng, size), int(rng.choice([0, 1, 0x7F, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF]))
    data[at : at + size] = (value % 2 ** (8 * size)).to_bytes(size, str(rng.choice(["little", "big"])))
    return bytes(data)


def insert_zeros(data: bytearray, rng: np.random.Generator) -> bytes:
    at = _place(data, rng)
    return bytes(data[:at]) + bytes(int(rng.integers(1, 65))) + bytes(data[at:])


INJURIES: tuple[Callable[[bytearray, np.random.Generator], bytes], ...] = (
    flip_bits,
    truncate,
    swap_blocks,
    change_length,
    insert_zeros,
)


def injured(kinds: dict[str, tuple[bytes, Part]], seed: int) -> tuple[str, bytes, Part]:
    """The damaged file of a seed: the kinds take turns."""
    name = list(kinds)[seed % len(kinds)]
    data, part = kinds[name]
    return name, mutate(data, np.random.default_rng(seed)), part


def outcome(data: bytes, part: Part, mode: DicomMode) -> str:
    """ "pixels" or "error"; anything else raises."""
    try:
        found = open_bytes(data).pixels(part, DecodeOptions(dicom_mode=mode)).pixels
    except DecodeError as error:
        reason = str(error)
    else:
        assert found.ndim in (2, 3)
        assert 0 < found.shape[0] * found.shape[1] <= MAX_PIXELS, found.shape
        assert np.isfinite(found).all()
        return "pixels"
    assert 5 < len(reason) < 400, reason
    assert not any(secret in reason for secret in ("Doe", image_files.SECRET)), reason
    return "error"


def listed(data: bytes, path: Path) -> None:
    path.write_bytes(data)
    try:
        parts = list_parts(path)
    except (DecodeError, ManifestError):
        return
    assert 1 <= len(parts) <= 2**20


def work(first: int, count: int) -> None:
    """Decode the damaged files of these seeds; each is announced before it is touched."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    kinds = valid_files()
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(first, first + count):
            name, data, part = injured(kinds, seed)
            print(f"{seed} {name}", flush=True)
            signal.alarm(SECONDS)  # ends the process: a handler would not run within a decoder
            found = outcome(data, part, MODES[seed % len(MODES)])
            listed(data, Path(folder) / "file")
            signal.alarm(0)
            print(f"= {found}", flush=True)


def run(first: int, count: int) -> Counter[str]:
    """How the files of these seeds ended; fails with the seed that ended the process."""
    command = [sys.executable, "-W", "error", __file__, str(first), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    lines = done.stdout.splitlines()
    if done.returncode:
        last = next((line for line in reversed(lines) if not line.startswith("=")), "before the first file")
        pytest.fail(f"the decoding process ended with {done.returncode} at seed {last}\n{done.stderr[-3000:]}")
    return Counter(line[2:] for line in lines if line.startswith("="))


def test_damaged_files_of_every_kind_give_pixels_or_an_error() -> None:
    found = run(0, 100)
    assert sum(found.values()) == 100
    assert found["pixels"] >= 10  # neither side is trivial
    assert found["error"] >= 25


@pytest.mark.slow
@pytest.mark.parametrize("first", range(200, 2200, 500))
def test_thousands_of_damaged_files_give_pixels_or_an_error(first: int) -> None:
    assert sum(run(first, 500).values()) == 500


def test_every_file_is_whole_before_it_is_damaged() -> None:
    for name, (data, part) in valid_files().items():
        assert outcome(data, part, "standard") == "pixels", name


def test_injuries_change_the_bytes_and_repeat_for_a_seed() -> None:
    kinds = {"a": (bytes(range(256)) * 8, WHOLE)}
    changed = [injured(kinds, seed)[1] for seed in range(50)]
    assert changed == [injured(kinds, seed)[1] for seed in range(50)]
    assert sum(data != kinds["a"][0] for data in changed) >= 48
    assert all(one != other for one, other in itertools.pairwise(changed))


if __name__ == "__main__":
    work(int(sys.argv[1]), int(sys.argv[2]))
