"""Devices and compute types by name, and whether a network fits before it is loaded."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch

from featstore.errors import ConfigError, DeviceError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MEMORY_TABLE = Path("/proc/meminfo")
GROUP_TABLE = Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")
# Files of a control group: limit, use, and the line of memory.stat with pages that can be taken back.
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("memory.max", "memory.current", "inactive_file")


def resolve_dtype(name: str) -> torch.dtype:
    """The torch type of a compute dtype's name.

    Raises:
        ConfigError: no such compute dtype.
    """
    if name not in DTYPES:
        raise ConfigError(f"compute dtype must be one of {', '.join(DTYPES)}; got {name!r}")
    return DTYPES[name]


def resolve_device(name: str) -> torch.device:
    """The torch device of `cpu`, `cuda` or `cuda:N`.

    Raises:
        ConfigError: another name.
        DeviceError: this machine has no such device.
    """
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (kind == "cpu" and index) or (":" in name and not index.isdecimal()):
        raise ConfigError(f"device must be cpu, cuda or cuda:N; got {name!r}")
    if kind == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(index or 0) >= count:
        raise DeviceError(f"device {name} asked, but torch sees {count} CUDA devices on this machine; use --device cpu")
    return torch.device("cuda", int(index or 0))


def use_device(name: str) -> None:
    """Make `cuda:N` this thread's current device: pinned memory and kernels of libraries go by it."""
    if ":" in name:
        torch.cuda.set_device(resolve_device(name))


def has_bfloat16(device: torch.device) -> bool:
    """Whether a CUDA device computes in bfloat16 itself."""
    with torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def check_dtype(device: torch.device, dtype: torch.dtype) -> None:
    """Raise `DeviceError` unless the compute dtype can be had on the device."""
    if device.type == "cuda" and dtype == torch.bfloat16 and not has_bfloat16(device):
        raise DeviceError(f"{torch.cuda.get_device_name(device)} has no bfloat16; use --compute-dtype float32")


def choose_memory(
    asked: str, whole: int, streamed: int | None, device: torch.device, dtype: torch.dtype
) -> Literal["resident", "stream"]:
    """Where the weights are kept: whole on the device, or a block at a time.

    Args:
        asked: `auto` streams what does not fit with a margin for what a batch needs.
        whole: bytes of all weights on the device.
        streamed: bytes of what is there at a time when blocks are streamed; None where the network has no blocks.

    Raises:
        DeviceError: it does not fit.
    """
    free = free_bytes(device)
    if free is None:  # the system does not tell
        return "stream" if asked == "stream" else "resident"
    if asked == "stream":
        assert streamed is not None
        if streamed > free:
            raise DeviceError(
                f"even a block at a time the weights need {streamed / 1e9:.1f} GB on {device}, {free / 1e9:.1f} GB are "
                f"free; {_smaller(dtype)}"
            )
        return "stream"
    if asked == "auto" and streamed is not None and whole + margin(whole) > free >= streamed:
        return "stream"
    if whole > free:
        blockwise = streamed is not None and streamed <= free
        raise DeviceError(
            f"the weights need {whole / 1e9:.1f} GB on {device} in {str(dtype).removeprefix('torch.')}, "
            f"{free / 1e9:.1f} GB are free; {'use --memory stream, or ' if blockwise else ''}{_smaller(dtype)}"
        )
    return "resident"


def margin(weights: int) -> int:
    """Bytes to keep free beside weights, for what a batch needs: a quarter of them, at most 4 GiB."""
    return min(weights // 4, 4 * 2**30)


def _smaller(dtype: torch.dtype) -> str:
    if dtype == torch.float32:
        return "try --compute-dtype bfloat16, a smaller model or a larger device"
    return "use a smaller model or a larger device"


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be taken on a device, None where the system does not tell.

    On the CPU the least of what the machine and the control groups of this process have left.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    known = [*_free_in_groups()]
    if MEMORY_TABLE.is_file():
        known += [
            int(line.split()[1]) * 1024
            for line in MEMORY_TABLE.read_text().splitlines()
            if line.startswith("MemAvailable:")
        ]
    return min(known, default=None)


def _free_in_groups() -> Iterator[int]:
    """What every control group above this process has left of its limit, if it has one.

    Pages of files that nobody used lately can be taken back, so they count as free; kubelet reckons the same way.
    """
    if not GROUP_TABLE.is_file():
        return
    for line in GROUP_TABLE.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        limit, usage, pages = V1 if controllers else V2
        root = GROUPS / "memory" if controllers else GROUPS
        folder = root / path.lstrip("/")
        # In a container the table may state the host's path, and the container's own group is the root.
        for group in (folder, *folder.parents) if folder.is_dir() else (root,):
            values = [_read_number(group / name) for name in (limit, usage)]
            if values[0] is not None and values[1] is not None:
                yield max(0, values[0] - values[1] + _read_statistic(group / "memory.stat", pages))
            if group == root:
                break


def _read_number(file: Path) -> int | None:
    """The number in a file; None where it says `max` or cannot be read."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _read_statistic(file: Path, name: str) -> int:
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name} ")), 0)
