"""Weights on disk without torch: which files a folder holds, whether they are whole, what they say."""

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featstore.errors import MissingWeightsError, WeightsError

HEADER_LENGTH_BYTES = 8  # of a safetensors file, before the JSON header
LONGEST_HEADER = 100_000_000  # the format's own limit
TORCH_SUFFIXES = (".pth", ".pt", ".bin")
LONGEST_PICKLE = 32_000_000  # names and shapes of a thousand tensors take 0.1 MB
# Tensors that Meta's own checkpoints have, and neither the hub's (other names) nor timm's copies (no mask token).
META_NAMES = (b"blocks.0.attn.qkv.weight", b"cls_token", b"mask_token")


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightFiles:
    """The files of one network, one or several shards, and the folder's two JSON files if it has them.

    `meta`: the names of the tensors are those of Meta's own checkpoints, whatever the format. timm's copies have nearly
    the same names; they lack the mask token, which Meta's code writes always and timm never.
    """

    files: tuple[Path, ...]
    config: dict[str, Any] | None
    processor: dict[str, Any] | None
    meta: bool = False


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file beside weights.

    Raises:
        WeightsError: the text is no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{path} is no JSON file ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{path} must hold a JSON object, it holds {type(value).__name__}; fetch it again")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a folder in the hub's format.

    Raises:
        MissingWeightsError: the folder has none.
        WeightsError: it cannot be read.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise MissingWeightsError(
            f"{folder} has no config.json; give a folder as the hub has it (config.json and *.safetensors) "
            "or, with a model's name, one .safetensors or .pth file"
        )
    return read_json(path)


def read_processor(folder: Path) -> dict[str, Any] | None:
    """`preprocessor_config.json` of a folder, None where there is none."""
    path = folder / "preprocessor_config.json"
    return read_json(path) if path.is_file() else None


def find_files(path: Path, names: Sequence[str] = ()) -> WeightFiles:
    """Weights at `path`: a folder in the hub's format, or one `.safetensors`, `.pth`, `.pt` or `.bin` file.

    `names` are the weight files of a published model; a folder that has them needs no `config.json`.

    Raises:
        MissingWeightsError: nothing is there, or the folder lacks a file that it should have.
        WeightsError: a file is of another format or not whole.
    """
    config, processor = None, None
    if path.is_file():
        if path.suffix not in (".safetensors", *TORCH_SUFFIXES):
            raise WeightsError(
                f"{path} is not a .safetensors, .pth, .pt or .bin file; other formats are not read, save its tensors "
                "in one of these"
            )
        files: tuple[Path, ...] = (path,)
    elif path.is_dir() and names and all((path / name).is_file() for name in names):
        config = read_config(path) if (path / "config.json").is_file() else None
        files, processor = tuple(path / name for name in names), read_processor(path)
    elif path.is_dir():
        config = read_config(path)
        files, processor = _files_in(path), read_processor(path)
    else:
        raise MissingWeightsError(f"{path} does not exist; give a folder with config.json and *.safetensors")
    for file in files:
        check_whole(file)
    return WeightFiles(files=files, config=config, processor=processor, meta=_speaks_meta(files))


def _files_in(folder: Path) -> tuple[Path, ...]:
    # The order in which transformers looks, so that what is digested is what is loaded.
    found = _whole_or_shards(folder, "model.safetensors")
    if found:
        return found
    others = sorted(folder.glob("*.safetensors"))
    if len(others) == 1:
        return (others[0],)
    if others:
        raise WeightsError(
            f"{folder} has {len(others)} .safetensors files and no model.safetensors.index.json; "
            "give the one file to use"
        )
    found = _whole_or_shards(folder, "pytorch_model.bin")
    if found:
        return found
    raise MissingWeightsError(
        f"{folder} has neither a .safetensors file nor pytorch_model.bin; fetch it again, or give the one file to use"
    )


def _whole_or_shards(folder: Path, name: str) -> tuple[Path, ...]:
    """The file of a name, or the shards that its index names; empty where the folder has neither."""
    single, index = folder / name, folder / f"{name}.index.json"
    if single.is_file():
        return (single,)
    if not index.is_file():
        return ()
    names = sorted(set(read_json(index).get("weight_map", {}).values()))
    absent = [name for name in names if not (folder / name).is_file()]
    if absent or not names:
        raise MissingWeightsError(
            f"{folder}: {len(absent)} of {len(names)} files that {index.name} names are missing"
            f"{' (' + ', '.join(absent[:3]) + ')' if absent else ''}; fetch the folder again"
        )
    return tuple(folder / name for name in names)


def check_whole(path: Path) -> None:
    """Compare a file with what its own table of contents promises; nothing in it is executed.

    Raises:
        WeightsError: the file is cut short, too long or of another format.
    """
    if path.suffix in TORCH_SUFFIXES:
        _pickle_of(path)
        return
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(HEADER_LENGTH_BYTES), "little")
            if not 2 <= length <= min(LONGEST_HEADER, size - HEADER_LENGTH_BYTES):
                raise ValueError(f"header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise WeightsError(
            f"{path} is no safetensors file ({error}); a Git LFS pointer or a download cut short? fetch it again"
        ) from error
    expected = HEADER_LENGTH_BYTES + length + max(ends, default=0)
    if size != expected:
        raise WeightsError(f"{path} has {size} bytes but its header promises {expected}; fetch it again")


def _pickle_of(path: Path) -> bytes:
    """The part of a torch checkpoint that names its tensors, not unpickled."""
    with open(path, "rb") as file:
        start = file.read(2)
    if start == b"PK":
        try:
            with zipfile.ZipFile(path) as archive:
                names = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
                if len(names) == 1:
                    with archive.open(names[0]) as opened:
                        content = opened.read(LONGEST_PICKLE + 1)
                    if len(content) <= LONGEST_PICKLE:
                        return content
        except (zipfile.BadZipFile, EOFError, NotImplementedError, ValueError, OSError) as error:
            raise WeightsError(
                f"{path} is cut short or damaged: the table of contents at the end of a torch checkpoint cannot be "
                f"read ({error}); fetch it again"
            ) from error
        raise WeightsError(
            f"{path} is a zip archive but no torch checkpoint of tensors; give a file that torch.save wrote of a "
            "state_dict"
        )
    if start[:1] == b"\x80":
        raise WeightsError(
            f"{path} is a pickle as torch wrote it before version 1.6, which is not read because reading it can run "
            "code in it; if you trust it, load it with torch and save its state_dict again"
        )
    raise WeightsError(
        f"{path} is no torch checkpoint; a Git LFS pointer, an error page or a download cut short? fetch it again"
    )


def _speaks_meta(files: Sequence[Path]) -> bool:
    contents = []
    for file in files:
        if file.suffix in TORCH_SUFFIXES:
            contents.append(_pickle_of(file))
        else:
            with open(file, "rb") as opened:
                contents.append(opened.read(int.from_bytes(opened.read(HEADER_LENGTH_BYTES), "little")))
    return all(any(name in content for content in contents) for name in META_NAMES)
