"""What was foretold of a run is kept until it is over, and compared with what happened.

`featstore plan` keeps its forecast of each set in `cache/plans` of the store, or in the user's cache where the store
cannot be written or is a bucket. It counts only for the very work that it was made for.
"""

import contextlib
import os
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from featstore import files, records
from featstore.configs import RunConfig
from featstore.errors import FeatstoreError
from featstore.extraction.footprint import Outlook, look_ahead
from featstore.extraction.forecast import DECODE, PART_NAMES, Forecast, Rates, forecast
from featstore.extraction.gpus import gpu_batch_size
from featstore.extraction.plan import Plan
from featstore.objects import Place, as_object

START = PART_NAMES[0]
COMPARED = ("wall_seconds", "cpu_seconds", "bytes", "files", "peak_memory_bytes")


def predict(plan: Plan, outlook: Outlook, made: Forecast, *, device: str, kind: str) -> dict[str, Any]:
    """What is kept of the forecast of a set by itself, with what `of_pass` needs; what nothing is known of is left out.

    `kind` is `measured`, or `model` where rates come from FLOP and sizes alone.
    """
    memory = {"peak_memory_bytes": int(made.memory)} if made.memory else {}
    return {
        "set": plan.name,
        "kind": kind,
        "device": device,
        "manifest": plan.manifest.short,
        "rows": made.rows,
        "batch_size": made.batch_size,
        "wall_seconds": round(made.wall, 3),
        "cpu_seconds": round(made.cpu_seconds, 3),
        "cpu_seconds_by_stage": {key: round(value, 3) for key, value in made.cpu.items()},
        "stage_seconds": {key: round(value, 3) for key, value in made.stages.items()},
        "start_seconds": round(made.start, 3),
        "imports_seconds": {"cpu": round(made.imports[0], 3), "wall": round(made.imports[1], 3)},
        "cores": made.cores,
        "bytes": outlook.final.bytes,
        "files": outlook.final.files,
        **memory,
        "limiting": made.limiting,
    }


def of_pass(predictions: Sequence[dict[str, Any]], *, imports: bool = True) -> dict[str, Any]:
    """What sets take together whose images are decoded once by one process; bytes and files are those of all.

    `imports` False: this process did its imports for an earlier pass. Of sets that were planned by themselves the one
    with the most decoding stands for that of all.
    """
    order = sorted(predictions, key=lambda item: -float(item["cpu_seconds_by_stage"][DECODE]))
    parts = [_part(item, first=not number, imports=imports) for number, item in enumerate(order)]
    found: dict[str, Any] = {
        "kind": "measured" if all(item["kind"] == "measured" for item in predictions) else "model",
        "wall_seconds": round(sum(wall for wall, _ in parts), 3),
        "cpu_seconds": round(sum(cpu for _, cpu in parts), 3),
        "bytes": sum(int(item["bytes"]) for item in predictions),
        "files": sum(int(item["files"]) for item in predictions),
    }
    if all("peak_memory_bytes" in item for item in predictions):
        found["peak_memory_bytes"] = max(int(item["peak_memory_bytes"]) for item in predictions)
    return found


def _part(item: dict[str, Any], *, first: bool, imports: bool) -> tuple[float, float]:
    """(seconds, CPU-seconds) that a set adds to a pass, as `forecast` counts a set that shares decoding."""
    stages, cpu, once = item["stage_seconds"], item["cpu_seconds_by_stage"], item["imports_seconds"]
    wall, used = float(item["wall_seconds"]), float(item["cpu_seconds"])
    if not first:
        busy = sum(value for name, value in cpu.items() if name not in (START, DECODE))
        longest = max(value for name, value in stages.items() if name != DECODE)
        wall = item["start_seconds"] + max(longest, busy / max(item["cores"], 1))
        used -= cpu[DECODE]
    if first and imports:
        return wall, used
    return wall - once["wall"], used - once["cpu"]


def _name(plan: Plan) -> str:
    return f"{files.digest({'set': plan.name, 'fingerprint': plan.spec['fingerprint']})[:32]}.json"


def _places(plan: Plan) -> list[Place]:
    store = plan.folder.parents[2]
    own = files.user_cache() / "plans" / files.digest(str(store))[:16] / _name(plan)
    return [own] if as_object(store) is not None else [store / "cache" / "plans" / _name(plan), own]


def keep(plan: Plan, prediction: dict[str, Any]) -> Place | None:
    """Keep a prediction where the run will find it; None where nothing can be written."""
    record = {**prediction, "work": _work(plan)}
    for place in _places(plan):
        with contextlib.suppress(OSError, FeatstoreError):
            files.write_atomic(place, files.sealed(record))
            return place
    return None


def held_prediction(plan: Plan) -> dict[str, Any] | None:
    """What `featstore plan` said of this very work: the same set, rows and arrays to do; None where it said nothing."""
    for place in _places(plan):
        with contextlib.suppress(OSError, FeatstoreError, KeyError):
            record = files.unseal(place.read_bytes(), place)
            if record.pop("work") == _work(plan):
                return record
    return None


def _work(plan: Plan) -> dict[str, Any]:
    return {
        "form": 1,  # of what `of_pass` reads; raise it when that changes
        "set": plan.name,
        "fingerprint": plan.spec["fingerprint"],
        "manifest": plan.manifest.digest,
        "missing": {name: len(rows) for name, rows in sorted(plan.missing.items())},
    }


# Where nothing was measured: importing torch and a network's code on one core.
START_CPU, START_WALL, LOAD_BYTE = 4.0, 3.5, 8e-10


def cheap_prediction(plan: Plan, run: RunConfig, *, device: str, forward: float) -> dict[str, Any]:
    """Bytes and files as exact as ever, seconds from FLOP and the sizes of the files; `forward` as `forward_seconds`.

    For a run that nobody planned; takes no longer than reading the set's markers.
    """
    from featstore.extraction.probing import WRITING, assumed_decoding

    outlook = look_ahead(plan, run)
    cores = int(records.machine()["cores"] or 1)
    size = (plan.preprocess.height, plan.preprocess.width) if plan.window is None else (plan.window[0], plan.window[0])
    tokens = plan.source.architecture.num_tokens(*size)
    budget = run.tokens_per_batch or (4096 if device == "cpu" else None)
    block_rows = int(plan.spec["layout"]["block_rows"])
    batch = gpu_batch_size(tokens, asked=run.batch_size, budget=budget, block_rows=block_rows)
    decoding = assumed_decoding(plan.manifest, plan.todo, run.workers or cores)
    passes = max(outlook.passes(batch), 1)
    # Tails of blocks are filled up: they cost a whole batch.
    full = forward * passes * batch / max(len(plan.todo), 1)
    item = 4 if plan.spec["identity"]["compute_dtype"] == "float32" else 2
    load = LOAD_BYTE * item * plan.source.architecture.num_parameters()
    rates = Rates(
        batch_size=batch,
        image_cpu=decoding.cpu,
        image_wall=decoding.wall,
        pass_cpu=full / passes * (cores if device == "cpu" else 1),
        pass_wall=full / passes,
        byte_cpu=WRITING.cpu_byte,
        byte_wall=WRITING.wall_byte,
        file_cpu=WRITING.cpu_file,
        file_wall=WRITING.wall_file,
        start_cpu=load,
        start_wall=load,
        imports_cpu=START_CPU,
        imports_wall=START_WALL,
    )
    return predict(
        plan, outlook, forecast(plan, outlook, rates, device=device, cores=cores), device=device, kind="model"
    )


def compare(prediction: dict[str, Any], actual: dict[str, Any]) -> dict[str, Any]:
    """{figure: {predicted, actual, error}} of what both know; the error is (predicted - actual) / actual."""
    found = {}
    for name in COMPARED:
        said, was = prediction.get(name), actual.get(name)
        if said is not None and was is not None and (said or was):
            error = None if not was else round(float(said) / float(was) - 1, 4)
            found[name] = {"predicted": said, "actual": was, "error": error}
    return found


def comparison_line(prediction: dict[str, Any], found: dict[str, Any]) -> str:
    """`took 41 s, plan said 38 s (-7 %); 40 CPU-seconds, said 50 (+25 %); ...`, or '' where no time is known."""
    if "wall_seconds" not in found:
        return ""
    who = "plan said" if prediction.get("kind") == "measured" else "FLOP alone said"
    wall = found["wall_seconds"]
    line = f"took {wall['actual']:.3g} s, {who} {wall['predicted']:.3g} s{_percent(wall)}"
    if "cpu_seconds" in found:
        cpu = found["cpu_seconds"]
        line += f"; {cpu['actual']:.3g} CPU-seconds, said {cpu['predicted']:.3g}{_percent(cpu)}"
    if "bytes" in found:
        line += f"; bytes{_percent(found['bytes'])}"
    return line


def _percent(figure: dict[str, Any]) -> str:
    return "" if figure["error"] is None else f" ({100 * figure['error']:+.0f} %)"


@dataclass
class Watch:
    """What this process, and its children that ended, have used since a moment."""

    begun: float = field(default_factory=time.time)
    cpu: float = field(default_factory=lambda: _cpu_seconds())

    @staticmethod
    def of_process() -> "Watch":
        """Since this process began, imports included: what a command takes."""
        return Watch(begun=_process_start(), cpu=0.0)

    def actual(self) -> dict[str, Any]:
        """What this process took, to compare a prediction with."""
        return {
            "wall_seconds": round(time.time() - self.begun, 3),
            "cpu_seconds": round(_cpu_seconds() - self.cpu, 3),
            "peak_memory_bytes": records.peak_memory_bytes(),
        }


def with_own_file(record: dict[str, Any], said: dict[str, Any], actual: dict[str, Any]) -> dict[str, Any]:
    """The record of a run with its comparison, in which the file that the record becomes is counted too.

    Its length depends on the figures that it states, and is settled in two or three rounds; where it would go on
    between two lengths, it states one a byte or two beside the file's.
    """
    size, whole = 0, record
    for _ in range(8):
        counted = {**actual, "bytes": actual["bytes"] + size, "files": actual["files"] + 1}
        whole = {**record, "comparison": compare(said, counted)}
        length = len(files.sealed(whole))
        if length == size:
            break
        size = length
    return whole


def _cpu_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _process_start() -> float:
    """When this process began, in seconds since 1970; now where the system does not tell."""
    try:
        ticks = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        up = float(Path("/proc/uptime").read_text().split()[0])
        return time.time() - up + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return time.time()
