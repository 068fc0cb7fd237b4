"""What each set of a plan will take, from a probe of this machine or from the model of a GPU."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from featstore import records
from featstore.configs import RunConfig
from featstore.extraction.footprint import Outlook, look_ahead, token_choices
from featstore.extraction.forecast import Forecast, Rates, forecast
from featstore.extraction.gpus import WORKING_BYTES, Gpu, gpu_batch_size, gpu_memory
from featstore.extraction.plan import Plan, image_gflops
from featstore.extraction.prediction import START_CPU, START_WALL, predict
from featstore.extraction.probing import (
    WRITING,
    Decoding,
    Forwarding,
    Writing,
    assumed_decoding,
    probe_decoding,
    probe_forward,
    probe_writing,
)
from featstore.images import PreprocessSpec
from featstore.store import reductions

HOST_BYTES = 3e9  # a process that drives a GPU: torch, CUDA's own memory, batches
LOSS_SECONDS = 6e-8  # of a processor for each number of a sampled image, while the loss of a reduction is measured
GPU_CORES = 0.5  # cores that wait for the device and launch its work
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Survey:
    """One set: what will be written, what each token choice would cost, how long it takes; `prediction` to be kept."""

    plan: Plan
    outlook: Outlook
    forecast: Forecast
    choices: dict[str, int]
    device: str
    workers: int
    prediction: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        added, final, outlook = self.outlook.added, self.outlook.final, self.outlook
        return {
            "set": self.plan.name,
            "weights_at_hand": self.plan.source.known,
            "samples": len(self.plan.manifest),
            "todo": len(self.plan.todo),
            "done": len(self.plan.manifest) - len(self.plan.todo),
            "failed": outlook.failed,
            "tokens": self.choices,
            "arrays": outlook.arrays,
            "bytes": {"added": added.bytes, "final": final.bytes},
            "files": {"added": added.files, "final": final.files},
            "inodes": {"added": added.inodes, "final": final.inodes},
            "device": self.device,
            "workers": self.workers,
            "forecast": self.forecast.as_dict(),
        }


def survey(plans: Sequence[Plan], run: RunConfig, *, seconds: float, say: Say, begun_cpu: float) -> list[Survey]:
    """Probe this machine for about `seconds` a set and foretell every plan.

    Args:
        begun_cpu: `time.process_time()` when the command began; what it took until here a run takes too.

    Raises:
        FeatstoreError: files changed, or the network cannot be loaded.
    """
    from featstore.extraction.creation import batch_size
    from featstore.extraction.pipeline import choose_device

    begun = time.perf_counter()
    device = choose_device(run.device)
    cores = int(records.machine()["cores"] or 1)
    workers = run.workers or cores
    start_cpu, start_wall = time.process_time() - begun_cpu, START_WALL
    before = time.process_time()
    decodings = _decodings(plans, run, seconds=seconds, workers=workers, say=say)
    base, spent = records.peak_memory_bytes(), time.process_time() - before
    store = plans[0].folder.parents[2] if plans else None
    todo = [plan for plan in plans if len(plan.todo)]
    writing, written = probe_writing(store) if store is not None and todo else (WRITING, "")
    found: list[Survey] = []
    paid: set[str] = set()
    for plan in plans:
        outlook = look_ahead(plan, run)
        if not outlook.todo:
            found.append(_report(plan, outlook, _nothing(), run, device, cores, kind="measured"))
            continue
        forward = probe_forward(
            plan,
            run,
            device,
            seconds=seconds / 2,
            batch_size=lambda backbone, plan=plan: batch_size(plan, run, device, backbone),  # type: ignore[misc]
            say=say,
        )
        decoding = decodings[plan.manifest.name]
        rates = _rates(plan, decoding, forward, writing, device=device, cores=cores)
        # Importing is paid once; loading, and what a new set needs, by each.
        rates = replace(
            rates,
            imports_cpu=max(start_cpu, START_CPU),
            imports_wall=start_wall,
            memory=_memory(plan, forward, base, device),
            notes=tuple(note for note in (forward.note, written) if note),
        )
        shared = plan.manifest.name in paid
        paid.add(plan.manifest.name)
        found.append(_report(plan, outlook, rates, run, device, cores, kind="measured", shared=shared))
    say(f"probed for {time.perf_counter() - begun:.1f} s ({spent:.1f} CPU-seconds of decoding)")
    return found


def survey_gpu(plans: Sequence[Plan], run: RunConfig, gpu: Gpu, *, gpus: int, seconds: float, say: Say) -> list[Survey]:
    """Foretell every plan on a card of the table; decoding is measured here where `seconds` are given for it."""
    own = int(records.machine()["cores"] or 1)
    cores = run.workers or own
    if seconds > 0:
        decodings = _decodings(plans, run, seconds=seconds, workers=min(cores, own), say=say)
        more = min(cores, own) / cores
        decodings = {name: replace(item, wall=item.wall * more) for name, item in decodings.items()}
    else:
        decodings = {
            plan.manifest.name: assumed_decoding(plan.manifest, plan.todo, cores, cores=cores) for plan in plans
        }
    found: list[Survey] = []
    paid: set[str] = set()
    for plan in plans:
        outlook = look_ahead(plan, run)
        architecture, dtype = plan.source.architecture, plan.spec["identity"]["compute_dtype"]
        pixels = (plan.preprocess.height, plan.preprocess.width)
        size = pixels if plan.window is None else (plan.window[0], plan.window[0])
        tokens = architecture.num_tokens(*size)
        batch = gpu_batch_size(
            tokens,
            asked=run.batch_size,
            budget=run.tokens_per_batch,
            block_rows=int(plan.spec["layout"]["block_rows"]),
        )
        gflop = batch * image_gflops(plan.source, pixels, plan.window)
        wall = gpu.seconds(gflop, architecture.patch_width, dtype, fused=run.compile != "off")
        weights, working = gpu_memory(architecture, tokens, batch, pixels[0] * pixels[1], dtype)
        whose = "--workers" if run.workers else "as this machine has, --workers N for another"
        notes = [f"decoding and CPU: {cores} {'core' if cores == 1 else 'cores'} ({whose})"]
        if not plan.source.known:
            notes.append("weights: not at hand, so that a set which exists is not known; all rows are counted")
        notes += ["device: FLOP model, not measured", "writing: a local disk, not measured"]
        notes += [] if seconds > 0 else ["decoding: from the sizes of the files, not measured (--probe 5 measures it)"]
        if weights + working > 1e9 * gpu.memory:
            notes.append(
                f"{(weights + working) / 1e9:.0f} GB do not fit the {gpu.memory:.0f} GB of one card: --memory stream, "
                "or a smaller --tokens-per-batch"
            )
        decoding = decodings[plan.manifest.name]
        rates = Rates(
            batch_size=batch,
            image_cpu=decoding.cpu,
            image_wall=decoding.wall,
            pass_cpu=GPU_CORES * wall,
            pass_wall=wall,
            byte_cpu=WRITING.cpu_byte,
            byte_wall=WRITING.wall_byte,
            file_cpu=WRITING.cpu_file,
            file_wall=WRITING.wall_file,
            start_cpu=0.0,
            start_wall=0.0,
            imports_cpu=START_CPU,
            imports_wall=START_WALL,
            memory=HOST_BYTES + _buffers(plan, batch),
            device_memory=weights + working,
            measured=("decode",) if seconds > 0 else (),
            notes=tuple(notes),
        )
        shared = plan.manifest.name in paid
        paid.add(plan.manifest.name)
        found.append(_report(plan, outlook, rates, run, gpu.name, cores, kind="model", shared=shared, gpus=gpus))
    return found


def _decodings(plans: Sequence[Plan], run: RunConfig, *, seconds: float, workers: int, say: Say) -> dict[str, Decoding]:
    """One probe a data set, for all preprocessings that its sets want: a pass reads and decodes an image once."""
    found: dict[str, Decoding] = {}
    share = seconds / 2 / max(1, len({plan.manifest.name for plan in plans}))
    for plan in plans:
        name = plan.manifest.name
        if name in found:
            continue
        mine = [other for other in plans if other.manifest.name == name and len(other.todo)]
        if not mine:
            found[name] = assumed_decoding(plan.manifest, plan.todo, workers)
            continue
        specs: list[PreprocessSpec] = []
        for other in mine:
            if other.preprocess not in specs:
                specs.append(other.preprocess)
        say(f"{name}: decoding some of {len(mine[0].todo)} images with {workers} workers")
        decoding = probe_decoding(
            plan.manifest, mine[0].todo, tuple(specs), run, seconds=share, workers=workers
        ) or assumed_decoding(plan.manifest, mine[0].todo, workers)
        if run.decoded_cache:
            decoding = _with_cache(mine[0], run, decoding)
        found[name] = decoding
    return found


def _with_cache(plan: Plan, run: RunConfig, decoding: Decoding) -> Decoding:
    """What is in the decoded cache already is not decoded again."""
    from featstore.extraction.decoded_cache import find_cache

    cache = find_cache(plan.folder.parents[2], plan.manifest, plan.preprocess)
    share = len(cache.missing(retry_failed=run.retry_failed)) / max(1, len(plan.manifest))
    return replace(decoding, cpu=decoding.cpu * share, wall=decoding.wall * share)


def _rates(
    plan: Plan,
    decoding: Decoding,
    forward: Forwarding,
    writing: Writing,
    *,
    device: str,
    cores: int,
) -> Rates:
    extra_cpu, extra_wall = _creation(plan, decoding, forward, device=device, cores=cores)
    return Rates(
        batch_size=forward.batch_size,
        image_cpu=decoding.cpu,
        image_wall=decoding.wall,
        pass_cpu=forward.cpu,
        pass_wall=forward.wall,
        byte_cpu=writing.cpu_byte,
        byte_wall=writing.wall_byte,
        file_cpu=writing.cpu_file,
        file_wall=writing.wall_file,
        start_cpu=forward.load_cpu + extra_cpu,
        start_wall=forward.load_wall + extra_wall,
        measured=("decode", "device", "write"),
    )


def _creation(plan: Plan, decoding: Decoding, forward: Forwarding, *, device: str, cores: int) -> tuple[float, float]:
    """(CPU-seconds, seconds) of what a new set needs first: the precision gate, and fitting its reductions."""
    from featstore.extraction.estimate import forward_seconds
    from featstore.extraction.precision import is_exact, sample_size

    if (plan.folder / "spec.json").is_file():
        return 0.0, 0.0
    cpu = wall = 0.0
    steps = reductions.steps_of(plan.spec)
    samples = []
    if not is_exact(plan.spec["identity"]):
        count = min(sample_size(plan, device), len(plan.manifest))
        size = (plan.preprocess.height, plan.preprocess.width)
        exact = forward_seconds(count * image_gflops(plan.source, size, plan.window), device, "float32")
        wall += exact + 2 * forward.load_wall
        cpu += exact * (cores if device == "cpu" else 1) + 2 * forward.load_cpu
        samples.append(count)
    if steps:
        count = min(reductions.SAMPLE, len(plan.manifest))
        rows, columns = plan.source.architecture.grid(plan.preprocess.height, plan.preprocess.width)
        loss = LOSS_SECONDS * count / 2 * rows * columns * plan.source.architecture.patch_width
        cpu, wall = cpu + loss, wall + loss
        samples.append(count)
    for count in samples:
        passes = -(-count // forward.batch_size)
        cpu += passes * forward.cpu + count * decoding.cpu
        wall += passes * forward.wall + count * decoding.wall
    return cpu, wall


def _buffers(plan: Plan, batch: int) -> float:
    """Bytes of batches on their way: pixels of those decoded ahead, rows of those still to be written."""
    pixels = plan.preprocess.height * plan.preprocess.width * (1 if plan.preprocess.quantise == "uint8" else 4)
    return float(batch * (4 * 3 * pixels + 4 * sum(array.row_bytes for array in plan.arrays)))


def _memory(plan: Plan, forward: Forwarding, base: int, device: str) -> float:
    """Peak of the process: as seen while the run's own batch went through, else from weights and activations."""
    size = (plan.preprocess.height, plan.preprocess.width)
    dtype = plan.spec["identity"]["compute_dtype"]
    seen = records.peak_memory_bytes()
    buffers = _buffers(plan, forward.batch_size)
    if device != "cpu" or not forward.note:
        return seen + buffers
    tokens = plan.source.architecture.num_tokens(*(size if plan.window is None else (plan.window[0], plan.window[0])))
    weights, working = gpu_memory(plan.source.architecture, tokens, forward.batch_size, size[0] * size[1], dtype)
    return max(float(seen), base + weights + working - WORKING_BYTES) + buffers


def _nothing() -> Rates:
    return Rates(
        batch_size=1,
        image_cpu=0.0,
        image_wall=0.0,
        pass_cpu=0.0,
        pass_wall=0.0,
        byte_cpu=0.0,
        byte_wall=0.0,
        file_cpu=0.0,
        file_wall=0.0,
        start_cpu=0.0,
        start_wall=0.0,
    )


def _report(
    plan: Plan,
    outlook: Outlook,
    rates: Rates,
    run: RunConfig,
    device: str,
    cores: int,
    *,
    kind: str,
    shared: bool = False,
    gpus: int = 1,
) -> Survey:
    made = forecast(plan, outlook, rates, device=device, cores=cores, gpus=gpus, shared=shared)
    alone = forecast(plan, outlook, rates, device=device, cores=cores, gpus=gpus) if shared else made
    return Survey(
        plan=plan,
        outlook=outlook,
        forecast=made,
        choices=token_choices(plan),
        device=device,
        workers=run.workers or cores,
        prediction=predict(plan, outlook, alone, device=device, kind=kind),
    )
