"""What training cost, kept with the settings that it was computed with.

These decide about time and memory and about nothing else, so that a run goes on, or is read again, with others.
"""

import gc
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from featstore.records import peak_memory_bytes
from probes.tuning_ranks import Team
from probes.tuning_state import NOT_KNOWN, Progress

MEMORY = ("peak_memory_bytes", "peak_gpu_memory_bytes")
SETTINGS = ("device", "processes", "micro", "checkpointing", "sharded")


def on_gpu(team: Team) -> bool:
    """Whether these processes have a GPU each."""
    return team.device.startswith("cuda")


def settings_of(team: Team, micro: int | None, checkpointing: bool, sharded: bool) -> dict[str, Any]:
    """How a run is computed by this command: `SETTINGS`; of `device` the name of the GPU, or `cpu`."""
    device = torch.cuda.get_device_name(team.device) if on_gpu(team) else "cpu"
    return dict(zip(SETTINGS, (device, team.world, micro, checkpointing, sharded), strict=True))


def spent_on(team: Team, seconds: float) -> dict[str, float]:
    """GPU-seconds of `seconds` on the clock, and the largest memory of any process so far; a call of all processes."""
    taken = torch.cuda.max_memory_allocated(team.device) if on_gpu(team) else 0
    found = team.objects((peak_memory_bytes(), taken))
    largest = (max(sizes) for sizes in zip(*found, strict=True))
    return {"gpu_seconds": seconds * team.world if on_gpu(team) else 0.0, **dict(zip(MEMORY, largest, strict=True))}


def reset_peak(team: Team) -> None:
    """Count the largest memory of this process's GPU from here on."""
    if on_gpu(team):
        torch.cuda.reset_peak_memory_stats(team.device)


def free_memory(team: Team) -> None:
    """Give back what models hold that nothing names any more; those that are cut or wrapped for a team hold themselves.

    Without it the next model would come beside the last one.
    """
    gc.collect()
    if on_gpu(team):
        torch.cuda.empty_cache()


def run_cost(progress: Progress, num_trainable: int) -> dict[str, Any]:
    """What all attempts of a run took; `processes` are the most that any of them had."""
    parts = progress.trained_with
    return {
        "trainable_parameters": num_trainable,
        "seconds": round(progress.seconds, 3),
        "gpu_seconds": round(sum(part.get("gpu_seconds", 0.0) for part in parts), 3),
        "images_per_second": round(progress.images / max(progress.seconds, 1e-9), 3),
        **{name: max((part.get(name, 0) for part in parts), default=0) for name in MEMORY},
        "processes": processes_of(progress),
        "trained_with": merged([parts]),
    }


def processes_of(progress: Progress) -> int:
    """The most that trained together in any attempt."""
    return max((part.get("processes", 1) for part in progress.trained_with), default=1)


def merged(runs: Iterable[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """An entry for each of the settings that several runs were computed with: time, images, largest memory."""
    found: list[dict[str, Any]] = []
    for part in (part for run in runs for part in run):
        same = [each for each in found if _settings(each) == _settings(part)]
        if not same:
            found.append({name: round(value, 3) if isinstance(value, float) else value for name, value in part.items()})
            continue
        held = same[0]
        for name in ("seconds", "gpu_seconds", "images"):
            if name in part:
                held[name] = round(held[name] + part[name], 3)
        held |= {name: max(held[name], part[name]) for name in MEMORY if name in part}
    return found


def describe_settings(settings: Mapping[str, Any]) -> str:
    """`2 processes on cpu, --micro 4, --checkpointing`."""
    if settings["device"] == NOT_KNOWN:
        return "settings that its version did not keep (GPU time is not known and not counted)"
    count = settings["processes"]
    return ", ".join(
        [
            f"{count} process{'es' * (count != 1)} on {settings['device']}",
            *([] if settings["micro"] is None else [f"--micro {settings['micro']}"]),
            *["--checkpointing"] * settings["checkpointing"],
            *["sharded"] * settings["sharded"],
        ]
    )


def cost_notes(trained_with: Sequence[Mapping[str, Any]], asked: Mapping[str, Any]) -> list[str]:
    """That time and memory are of other settings than this command's, where anything was trained with others."""
    if all(_settings(part) == dict(asked) for part in trained_with):
        return []
    said = "; ".join(f"{describe_settings(part)} ({part['seconds']:.3g} s)" for part in trained_with)
    return [
        f"trained with {said}: time and memory are of that; this command has {describe_settings(asked)}, and to "
        "measure these give another folder by --runs"
    ]


def _settings(part: Mapping[str, Any]) -> dict[str, Any]:
    return {name: part.get(name) for name in SETTINGS}
