"""Work and rates become seconds, memory, and the wall that a run will hit; arithmetic alone, no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from featstore.extraction.footprint import Outlook
from featstore.extraction.plan import Plan

DECODE, DEVICE, WRITE = "decode", "device", "write"
AHEAD = 8  # batches of pixels and rows that stand between the stages
PART_NAMES = ("start-up", "decode", "forward", "write")


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Seconds of each kind of work for one set, of processors (`cpu`) and of the clock (`wall`).

    `image_*` decode an image, `pass_*` are one batch through the network, `byte_*` and `file_*` write; `start_*` is
    what happens once: imports (`imports_*` alone), loading, measuring the precision or the reductions of a new set.
    `measured` names what was; `notes` says what was not, or not as it will be.
    """

    batch_size: int
    image_cpu: float
    image_wall: float
    pass_cpu: float
    pass_wall: float
    byte_cpu: float
    byte_wall: float
    file_cpu: float
    file_wall: float
    start_cpu: float
    start_wall: float
    imports_cpu: float = 0.0
    imports_wall: float = 0.0
    memory: float = 0.0
    device_memory: float = 0.0
    measured: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What one set will take; times in seconds.

    `cpu` is by kind of work; `stages` the clock of each stage by itself; `wall` the whole on this machine.
    """

    name: str
    rows: int
    batch_size: int
    passes: int
    blocks: int
    cpu: dict[str, float]
    stages: dict[str, float]
    start: float
    wall: float
    cores: int
    imports: tuple[float, float]  # (CPU-seconds, seconds) of what a process does once, within `start-up` and `start`
    memory: float
    device_memory: float
    shared: bool = False
    measured: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    advice: list[str] = field(default_factory=list)

    @property
    def limiting(self) -> str | None:
        """The stage that takes longest; None where there is nothing to do."""
        return max(self.stages, key=lambda name: self.stages[name]) if self.rows else None

    @property
    def cpu_seconds(self) -> float:
        return sum(self.cpu.values())

    @property
    def block_seconds(self) -> float:
        """Seconds between two commits."""
        return (self.wall - self.start) / max(self.blocks, 1)

    def rate(self, stage: str) -> float | None:
        """Images a second of one stage alone."""
        return self.rows / self.stages[stage] if self.stages[stage] > 0 else None

    def of_world(self, world: int) -> float:
        """Seconds with so many machines like this one (or GPUs, each with its share of it), whole blocks each."""
        share = -(-self.blocks // world) / max(self.blocks, 1)
        return self.start + (self.wall - self.start) * share

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "rows": self.rows,
            "batch_size": self.batch_size,
            "passes": self.passes,
            "blocks": self.blocks,
            "seconds_per_block": round(self.block_seconds, 3),
            "cpu_seconds": {**{key: round(value, 3) for key, value in self.cpu.items()}, "total": self.cpu_seconds},
            "stage_seconds": {key: round(value, 3) for key, value in self.stages.items()},
            "images_per_second": {key: None if self.rate(key) is None else self.rate(key) for key in self.stages},
            "start_seconds": round(self.start, 3),
            "wall_seconds": round(self.wall, 3),
            "peak_memory_bytes": int(self.memory),
            "device_memory_bytes": int(self.device_memory),
            "limiting": self.limiting,
            "decoding_shared": self.shared,
            "measured": list(self.measured),
            "notes": list(self.notes),
            "advice": self.advice,
        }


def forecast(
    plan: Plan, outlook: Outlook, rates: Rates, *, device: str, cores: int, gpus: int = 1, shared: bool = False
) -> Forecast:
    """Seconds of a set from its work and the rates; `shared`: another set of the pass pays for decoding and imports.

    On a CPU the stages share the cores, so that no run is shorter than all its work over all of them. On GPUs the
    slowest stage decides; `gpus` of them share one machine, whole blocks each.
    """
    passes = outlook.passes(rates.batch_size)
    # Before it adds to a set, a run computes rows of it again; on a GPU it tries the shape of a batch.
    extra = int(bool(outlook.todo)) * (int((plan.folder / "spec.json").is_file()) + (device != "cpu"))
    blocks = len(outlook.todo)
    of_one = -(-blocks // gpus) / max(blocks, 1)  # share of the blocks that the busiest GPU does
    written, num_files = outlook.added.bytes, outlook.added.files
    rows = outlook.rows_here if not shared else 0
    imports = (rates.imports_cpu, rates.imports_wall) if outlook.todo and not shared else (0.0, 0.0)
    cpu = {
        "start-up": rates.start_cpu + imports[0] if outlook.todo else 0.0,
        "decode": rows * rates.image_cpu,
        "forward": (passes + extra) * rates.pass_cpu,
        "write": written * rates.byte_cpu + num_files * rates.file_cpu,
    }
    stages = {
        DECODE: rows * rates.image_wall,
        DEVICE: (passes * of_one + extra) * rates.pass_wall,
        WRITE: written * rates.byte_wall + num_files * rates.file_wall,
    }
    start = rates.start_wall + imports[1] if outlook.todo else 0.0
    busy = sum(cpu[name] for name in PART_NAMES[1:])
    span = max(*stages.values(), busy / max(cores, 1))
    made = Forecast(
        name=plan.name,
        rows=outlook.rows_here,
        batch_size=rates.batch_size,
        passes=passes,
        blocks=blocks,
        cpu=cpu,
        stages=stages,
        start=start,
        wall=start + span,
        cores=cores,
        imports=imports,
        memory=rates.memory,
        device_memory=rates.device_memory,
        shared=shared,
        measured=rates.measured,
        notes=rates.notes,
    )
    if 0 < blocks < gpus:
        made.advice.append(
            f"{blocks} {'block' if blocks == 1 else 'blocks'} for {gpus} GPUs, of which the others do nothing: "
            + _smaller_blocks(plan, outlook, gpus)
        )
    made.advice.extend(advise(plan, made, device=device))
    return made


def _smaller_blocks(plan: Plan, outlook: Outlook, gpus: int) -> str:
    """What gives every GPU a block, if anything does; rows of blocks are powers of two."""
    if (plan.folder / "spec.json").is_file():
        return "this set keeps its blocks, fewer GPUs take as long"
    if outlook.rows_here < gpus:
        return "there are fewer images than GPUs"
    return f"--block-rows {1 << ((outlook.rows_here // gpus).bit_length() - 1)}"


def advise(plan: Plan, made: Forecast, *, device: str) -> list[str]:
    """What would move the wall that a run hits, most effective first."""
    if made.limiting is None:
        return []
    identity = plan.spec["identity"]
    if made.limiting == DECODE:
        found = ["more --workers, where there are cores"]
        if identity["preprocess"].get("decode", "full") == "full" and plan.preprocess.geometry not in ("hf", "spline"):
            found.append("--decode scaled for JPEGs several times the size asked (another set: pixels differ a little)")
        found.append("--decoded-cache: pays from the second model at this size on; --model a,b decodes once for both")
        return found
    if made.limiting == DEVICE:
        found = []
        if identity["compute_dtype"] == "float32":
            found.append("--compute-dtype bfloat16: 1.5 to 3 times as fast where the processor or GPU has it")
        if made.blocks > 1:
            found.append(
                "more ranks: torchrun --nproc-per-node N -m featstore extract ..., up to one for each of the "
                f"{made.blocks} blocks" + (" (on a CPU only where cores are free)" if device == "cpu" else "")
            )
        else:
            found.append("smaller --block-rows: this is one block, which one rank computes")
        found.append("a smaller --res or model")
        return found
    found = ["fewer --tokens or --layers"]
    if any(array.name.endswith("patches") for array in plan.arrays) and not identity["reductions"]:
        found.append("--reduce pool2 or int8: a quarter or half of the bytes of patches")
    return [*found, "a faster disk, or --stage on a local one"]


def total(forecasts: Sequence[Forecast]) -> dict[str, Any]:
    """What all sets take, one after another but for what they share."""
    return {
        "wall_seconds": round(sum(item.wall for item in forecasts), 3),
        "cpu_seconds": round(sum(item.cpu_seconds for item in forecasts), 3),
        "peak_memory_bytes": int(max((item.memory for item in forecasts), default=0)),
    }
