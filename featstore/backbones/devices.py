"""Devices and compute types by name, and whether a network fits before it is loaded."""

from pathlib import Path

import torch

from featstore.errors import ConfigError, DeviceError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MEMORY_TABLE = Path("/proc/meminfo")


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


def check_memory(num_parameters: int, device: torch.device, dtype: torch.dtype) -> None:
    """Raise `DeviceError` unless the weights fit where they are going, and the compute dtype can be had there."""
    if (
        device.type == "cuda"
        and dtype == torch.bfloat16
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        raise DeviceError(f"{torch.cuda.get_device_name(device)} has no bfloat16; use --compute-dtype float32")
    needed = num_parameters * dtype.itemsize
    free = free_bytes(device)
    if free is not None and needed > free:
        smaller = (
            "try --compute-dtype bfloat16, a smaller model or a larger device"
            if dtype == torch.float32
            else "use a smaller model or a larger device"
        )
        raise DeviceError(
            f"the weights need {needed / 1e9:.1f} GB on {device} in {str(dtype).removeprefix('torch.')}, "
            f"{free / 1e9:.1f} GB are free; {smaller}"
        )


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be taken on a device, None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if not MEMORY_TABLE.is_file():
        return None
    for line in MEMORY_TABLE.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None
