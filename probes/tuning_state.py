"""Checkpoints of a run that trains: tensors as safetensors, all else as sealed JSON; whole or absent, never pickled.

`state.json` names the files that belong together, and replacing it is what commits a checkpoint: a kill at any moment
leaves the one before. Kept are the last one and the weights of the best epoch.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import google_crc32c
import torch
from jaxtyping import Shaped
from torch import Tensor

from featstore import files
from featstore.errors import ConfigError, CorruptError

STATE = "state.json"
LAST, BEST = "last-", "best-"  # begin the names of the files of tensors
NOT_KNOWN = "not known"  # device of attempts of which only time and images were kept
SCHEMA = 1
PIECE = 8 * 2**20
TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass
class Progress:
    """Where a run is and what it has measured.

    `epoch` counts those that are finished, with their validation; `step` the steps of the one after. `total` is the sum
    of the losses of that epoch so far and `weight` what it is to be divided by. `best` is what is maximised, `chosen`
    the epoch it belongs to, from 1. `seconds` and `images` are of all attempts together; `trained_with` has an entry
    for each way in which they were computed (see `spend`), the one that trained last at the end.
    """

    epoch: int = 0
    step: int = 0
    total: float = 0.0
    weight: float = 0.0
    train_loss: list[float] = field(default_factory=list)
    val_loss: list[float] = field(default_factory=list)
    val_quality: list[float | None] = field(default_factory=list)
    best: list[float] = field(default_factory=list)
    chosen: int = 0
    diverged: bool = False
    finished: bool = False
    seconds: float = 0.0
    images: int = 0
    resumed: int = 0
    trained_with: list[dict[str, Any]] = field(default_factory=list)

    def spend(self, settings: Mapping[str, Any], seconds: float, used: Mapping[str, float]) -> None:
        """Count what was trained since the last time, by the settings that it was computed with.

        Args:
            settings: how, apart from what decides about the result: device, processes, cut of a batch, ...
            seconds: on the clock.
            used: `gpu_seconds` to add, and the largest memory so far, in bytes.
        """
        images = self.images - sum(each["images"] for each in self.trained_with)
        same = [each for each in self.trained_with if all(each.get(name) == settings[name] for name in settings)]
        held = same[0] if same else {**settings, "seconds": 0.0, "images": 0, **dict.fromkeys(used, 0)}
        for name, value in used.items():
            held[name] = held[name] + value if name == "gpu_seconds" else max(held[name], value)
        held |= {"seconds": held["seconds"] + seconds, "images": held["images"] + images}
        self.seconds += seconds
        self.trained_with = [each for each in self.trained_with if each is not held] + [held]


class Checkpoints:
    """The checkpoints of one run in a folder of its own; `identity` is what makes it this run and no other.

    One process writes (`writes`); all may read.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], *, writes: bool = True) -> None:
        self.folder, self.identity, self.writes = folder, identity, writes
        self._files: dict[str, dict[str, Any]] = {}

    def open(self) -> Progress | None:
        """Where the run in this folder is; None where nothing is kept.

        Raises:
            ConfigError: it is another run.
            CorruptError: damaged.
        """
        path = self.folder / STATE
        if not path.is_file():
            return None
        try:
            body = files.unseal(path.read_bytes(), path)
        except CorruptError as error:
            raise CorruptError(f"{error}, or remove {self.folder} and begin this run anew") from error
        if body["schema"] != SCHEMA:
            raise ConfigError(f"{path} was written by another version; remove {self.folder} or give another folder")
        if different := _differences(body["identity"], self.identity):
            raise ConfigError(
                f"{self.folder} holds the checkpoint of another run: {'; '.join(different[:4])}"
                f"{f'; and {len(different) - 4} more' if len(different) > 4 else ''}; give the same options and data, "
                "or another folder"
            )
        self._files = body["files"]
        if self.writes:
            self._prune()  # one that ended between its last commit and this would leave files for ever
        known = {each.name for each in fields(Progress)}
        found = Progress(**{name: value for name, value in body["progress"].items() if name in known})
        if found.seconds and not found.trained_with:  # kept by a version that had time and images alone
            found.trained_with = [{"device": NOT_KNOWN, "seconds": found.seconds, "images": found.images}]
        return found

    def save(
        self,
        progress: Progress,
        last: Mapping[str, Shaped[Tensor, "..."]] | None,
        best: Mapping[str, Shaped[Tensor, "..."]] | None = None,
    ) -> None:
        """Commit a checkpoint: where the run is, its tensors (None: as before), and those of a new best epoch.

        Raises:
            StoreError: it cannot be written.
        """
        if not self.writes:
            return
        with files.writing(self.folder):
            files.make_folder(self.folder)
        for kind, tensors in ((BEST, best), (LAST, last)):
            if tensors is not None:
                name = f"{kind}{progress.epoch:05d}-{progress.step:07d}.safetensors"
                if self._files.get(kind, {}).get("name") == name:  # never in the place of what is committed
                    name = name.replace(".safetensors", f"-{progress.resumed}.safetensors")
                self._files = {**self._files, kind: _write(self.folder / name, tensors)}
        if progress.finished:
            self._files.pop(LAST, None)
        body = {
            "schema": SCHEMA,
            "identity": self.identity,
            "progress": asdict(progress),
            "random": "numbers of a step follow from (seed, epoch, step, rank); no generator is kept",
            "files": self._files,
        }
        files.write_atomic(self.folder / STATE, files.sealed(body))
        self._prune()

    def last(self) -> dict[str, Shaped[Tensor, "..."]]:
        """Tensors of the last checkpoint.

        Raises:
            CorruptError: damaged or absent.
        """
        return self._read(LAST)

    def best(self) -> dict[str, Shaped[Tensor, "..."]] | None:
        """Tensors of the best epoch; None before the first.

        Raises:
            CorruptError: damaged or absent.
        """
        return self._read(BEST) if BEST in self._files else None

    def reread(self) -> None:
        """Learn what the process that writes has committed."""
        if not self.writes:
            self.open()

    def _read(self, kind: str) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        held = self._files.get(kind)
        path = self.folder / (held["name"] if held else f"{kind}?")
        if held is None or not path.is_file() or _checksum(path) != (held["bytes"], held["crc32c"]):
            raise CorruptError(
                f"{path}: this part of the checkpoint is missing or damaged; restore it from a copy, or remove "
                f"{self.folder} and begin this run anew"
            )
        return load_file(path)

    def _prune(self) -> None:
        """Remove what no checkpoint names any more, and what a kill has left half."""
        named = {held["name"] for held in self._files.values()}
        for path in self.folder.iterdir():
            half = path.name.endswith(".partial")
            old = path.suffix == ".safetensors" and path.name.startswith((LAST, BEST)) and path.name not in named
            if old or (half and files.is_dead(path.name)):
                path.unlink(missing_ok=True)


def _differences(held: dict[str, Any], given: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name in sorted(held.keys() | given.keys()):
        before, now = held.get(name), given.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            found += _differences(before, now, f"{prefix}{name}.")
        elif files.canonical_json(before) != files.canonical_json(now):
            found.append(f"{prefix}{name} {_short(before)} there, {_short(now)} here")
    return found


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _write(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write tensors beside, sync, rename; returns what the checkpoint says about the file.

    Not by safetensors itself, which writes to a hidden file of its own beside: what a kill leaves there is as large as
    the checkpoint, and nothing would tell whose it is. Its errors also do not say that a disk is full.
    """
    temporary = path.with_name(f"{path.name}.{files.own_name()}.partial")
    size = checksum = 0
    with files.writing(path):
        try:
            with open(temporary, "xb") as file:
                for piece in _pieces(tensors):
                    file.write(piece)
                    size, checksum = size + len(piece), google_crc32c.extend(checksum, piece)
                file.flush()
                files.sync(file.fileno(), path)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        files.sync_folder(path.parent)
    return {"name": path.name, "bytes": size, "crc32c": f"{checksum:08x}"}


def _pieces(tensors: Mapping[str, Tensor]) -> Iterator[bytes]:
    """The bytes of a safetensors file: length of the header, header, tensors without a gap, the widest type first.

    Source: the format's description, https://github.com/huggingface/safetensors#format
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header, place = {}, 0
    for name in names:
        value = tensors[name]
        end = place + value.numel() * value.element_size()
        header[name] = {"dtype": TYPES[value.dtype], "shape": list(value.shape), "data_offsets": [place, end]}
        place = end
    text = files.canonical_json(header)
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        bits = tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        for start in range(0, len(bits), PIECE):
            yield bits[start : start + PIECE].tobytes()


def _checksum(path: Path) -> tuple[int, str]:
    total, size = 0, 0
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            total, size = google_crc32c.extend(total, piece), size + len(piece)
    return size, f"{total:08x}"
