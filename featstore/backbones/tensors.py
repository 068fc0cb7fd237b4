"""Named tensors out of files or out of a seed, one at a time: what a network is filled from, whole or block by block.

Files are read at their offsets, never unpickled and never held whole: memory is the network and one tensor, and a
network that does not fit is read again block by block.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Shaped
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from featstore.backbones.family import Family, HubKey
from featstore.backbones.random_weights import draw, draw_into
from featstore.backbones.weights import HEADER_LENGTH_BYTES
from featstore.errors import WeightsError

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "I8": torch.int8,
    "BOOL": torch.bool,
}
CHUNK = 1 << 20  # numbers converted at a time
NESTED = ("model", "state_dict", "teacher")  # where training code keeps the weights inside a checkpoint


@runtime_checkable
class Tensors(Protocol):
    """Where weights come from."""

    @property
    def origin(self) -> str:
        """For messages: a path or a seed."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]] | None:
        """Shape of every tensor there is; None where any name can be had."""

    def read(self, key: HubKey, shape: tuple[int, ...], dtype: torch.dtype) -> Shaped[Tensor, "..."]:
        """The piece `key` on the CPU, in `dtype` and with `shape`.

        Raises:
            WeightsError: it has another shape, or cannot be read.
        """

    def read_into(self, key: HubKey, values: Shaped[Tensor, "..."]) -> None:
        """The same into a tensor that is there: contiguous, on the CPU; its shape and type are the wanted ones."""


def fitting(found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether two shapes differ by nothing but axes of length 1."""
    return [n for n in found if n != 1] == [n for n in wanted if n != 1]


@dataclass(frozen=True, slots=True)
class _Place:
    file: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class SafetensorsFiles:
    """The tensors of one or several safetensors files."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._origin = str(files[0])
        self._places: dict[str, _Place] = {}
        for file in files:
            with open(file, "rb") as opened:
                length = int.from_bytes(opened.read(HEADER_LENGTH_BYTES), "little")
                header: dict[str, Any] = json.loads(opened.read(length))
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                if entry["dtype"] not in SAFETENSORS_DTYPES:
                    raise WeightsError(
                        f"{file}: tensor {name} has the type {entry['dtype']}; it must be one of "
                        f"{', '.join(SAFETENSORS_DTYPES)}"
                    )
                start = HEADER_LENGTH_BYTES + length + entry["data_offsets"][0]
                self._places[name] = _Place(file, start, SAFETENSORS_DTYPES[entry["dtype"]], tuple(entry["shape"]))

    @property
    def origin(self) -> str:
        """The first file."""
        return self._origin

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """As the headers state them."""
        return {name: place.shape for name, place in self._places.items()}

    def read(self, key: HubKey, shape: tuple[int, ...], dtype: torch.dtype) -> Shaped[Tensor, "..."]:
        """The piece `key`, read at its offset: nothing is mapped, so nothing counts twice."""
        values = torch.empty(shape, dtype=dtype)
        self.read_into(key, values)
        return values

    def read_into(self, key: HubKey, values: Shaped[Tensor, "..."]) -> None:
        """The piece `key` into a tensor; memory beside it is `CHUNK` numbers, and none where the types are equal."""
        place = self._places[key.name]
        _cut_shape(place.shape, key, tuple(values.shape), self.origin)
        _read_numbers(place, key, values)


def _read_numbers(place: _Place, key: HubKey, values: Tensor) -> None:
    """Consecutive numbers of a file into a tensor, from the piece's first on."""
    flat = values.reshape(-1)
    scratch = flat if place.dtype == flat.dtype else torch.empty(min(CHUNK, len(flat)), dtype=place.dtype)
    with open(place.file, "rb", buffering=0) as file:
        file.seek(place.start + key.part * len(flat) * place.dtype.itemsize)
        for start in range(0, len(flat), max(1, len(scratch))):
            part = scratch[: len(flat) - start]
            if _read_bytes(file, part.view(torch.uint8).numpy().data) != part.nbytes:
                raise WeightsError(f"{place.file} ends within tensor {key.name}; fetch it again")
            if scratch is not flat:
                flat[start : start + len(part)].copy_(part)


def _read_bytes(file: Any, buffer: memoryview) -> int:
    done = 0
    while done < len(buffer):
        read = file.readinto(buffer[done:])
        if not read:
            break
        done += read
    return done


class TorchFile:
    """The tensors of a `.pth`, `.pt` or `.bin` file, or of its shards: torch's own format, with nothing in it executed.

    Only its table of contents is loaded; numbers are read at their offsets, because pages of a mapped file count as
    memory of the process until the system takes them back.
    """

    def __init__(self, *files: Path) -> None:
        self._origin = str(files[0])
        self._tensors: dict[str, Tensor] = {}
        self._files: dict[str, Path] = {}
        for file in files:
            found = self._contents(file)
            self._tensors |= found
            self._files |= dict.fromkeys(found, file)

    @staticmethod
    def _contents(file: Path) -> dict[str, Tensor]:
        try:
            # Under this mode torch.load makes tensors without memory that know where in the file their numbers are.
            with FakeTensorMode():
                content: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # torch raises UnpicklingError, RuntimeError, ValueError, ... by what is wrong
            first = (str(error).splitlines() or [""])[0]
            raise WeightsError(
                f"{file} cannot be read as plain tensors ({type(error).__name__}: {first}); it must be a checkpoint of "
                "tensors only, saved by torch.save since version 1.6; fetch it again"
            ) from error
        for name in NESTED:
            if isinstance(content, dict) and isinstance(content.get(name), dict):
                content = content[name]
        if not isinstance(content, dict):
            raise WeightsError(f"{file} holds {type(content).__name__}, not tensors by name")
        return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}

    @property
    def origin(self) -> str:
        """The first file."""
        return self._origin

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of all tensors."""
        return {name: tuple(value.shape) for name, value in self._tensors.items()}

    def read(self, key: HubKey, shape: tuple[int, ...], dtype: torch.dtype) -> Shaped[Tensor, "..."]:
        """The piece `key`, read at its offset."""
        values = torch.empty(shape, dtype=dtype)
        self.read_into(key, values)
        return values

    def read_into(self, key: HubKey, values: Shaped[Tensor, "..."]) -> None:
        """The piece `key` into a tensor; a transposed one is read whole first."""
        stored = self._tensors[key.name]
        cut = _cut_shape(tuple(stored.shape), key, tuple(values.shape), self.origin)
        if stored.is_contiguous():
            _read_numbers(self._place(key.name, int(stored.storage_offset()), tuple(stored.shape)), key, values)
            return
        strides, offset = stored.stride(), int(stored.storage_offset())
        extent = 1 + sum((n - 1) * stride for n, stride in zip(stored.shape, strides)) if stored.numel() else 0
        numbers = torch.empty(extent, dtype=stored.dtype)
        _read_numbers(self._place(key.name, offset, (extent,)), HubKey(key.name), numbers)
        whole = numbers.as_strided(tuple(stored.shape), strides)
        values.copy_((whole.reshape(key.parts, *cut)[key.part] if key.parts > 1 else whole).reshape(values.shape))

    def _place(self, name: str, offset: int, shape: tuple[int, ...]) -> _Place:
        stored = self._tensors[name]
        first = stored.untyped_storage()._checkpoint_offset
        assert first is not None
        return _Place(self._files[name], first + offset * stored.dtype.itemsize, stored.dtype, shape)


def _cut_shape(stored: tuple[int, ...], key: HubKey, shape: tuple[int, ...], origin: str) -> tuple[int, ...]:
    """Shape of one piece of a stored tensor, which must fit the wanted one."""
    cut = stored if key.parts == 1 else (stored[0] // key.parts, *stored[1:]) if stored else ()
    if not fitting(cut, shape) or (key.parts > 1 and stored[0] % key.parts):
        raise WeightsError(f"{origin}: tensor {key.name} has shape {list(stored)}, which does not give {list(shape)}")
    return cut


class RandomTensors:
    """Random weights: any name can be had, and gives the same numbers every time."""

    def __init__(self, seed: int, family: Family) -> None:
        self._seed, self._family = seed, family

    @property
    def origin(self) -> str:
        """The seed."""
        return f"random weights, seed {self._seed}"

    @property
    def shapes(self) -> None:
        """Any."""
        return

    def read(self, key: HubKey, shape: tuple[int, ...], dtype: torch.dtype) -> Shaped[Tensor, "..."]:
        """Drawn anew."""
        return draw(key, shape, seed=self._seed, device=torch.device("cpu"), dtype=dtype, gain=self._family.gain)

    def read_into(self, key: HubKey, values: Shaped[Tensor, "..."]) -> None:
        """Drawn anew into a tensor."""
        draw_into(key, values, seed=self._seed, gain=self._family.gain)


def open_files(files: Sequence[Path]) -> Tensors:
    """The tensors of weight files, by their format."""
    if files[0].suffix == ".safetensors":
        return SafetensorsFiles(files)
    return TorchFile(*files)
