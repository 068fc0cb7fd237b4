"""From plans to sets on disk: what one process does of it, and what it says about how it was done."""

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from featstore import files, records
from featstore.backbones.tokens import Backbone
from featstore.configs import RunConfig
from featstore.errors import DeviceError, FeatstoreError, Stopped, StoreError
from featstore.extraction.blocks import check_failures, progress_of
from featstore.extraction.claims import sweep_claims
from featstore.extraction.creation import create_set, load_backbone
from featstore.extraction.decoded_cache import Cache, fill_cache
from featstore.extraction.device import facts_of
from featstore.extraction.distributed import ranks_of
from featstore.extraction.estimate import forward_seconds
from featstore.extraction.footprint import COMPACT_BYTES, measure_folder
from featstore.extraction.lane import Lane
from featstore.extraction.loader import Batch, check_files
from featstore.extraction.passes import Pass, in_step
from featstore.extraction.plan import Plan
from featstore.extraction.prediction import (
    Watch,
    cheap_prediction,
    compare,
    comparison_line,
    held_prediction,
    of_pass,
    with_own_file,
)
from featstore.extraction.prepare import is_prepared, prepare
from featstore.extraction.sharing import Sharing
from featstore.extraction.stopping import AGAIN, Stop
from featstore.objects import Place
from featstore.store import commits, compact, ledger
from featstore.store.layout import read_spec
from featstore.store.locks import writer_lock


@dataclass(slots=True)
class Summary:
    """What one run did to one set, and how; `notes` are lines to print, such as the loss of reductions it created.

    `micro_batch` images went through the network at once, `batch_size` unless memory was short. `stages` says how fast
    decoding, the device and writing were. Of the units of work `taken_over` were of other ranks' stripes, and at
    `helped` somebody else was too. `comparison` says what the pass that this set ended took, and what was foretold.
    """

    name: str
    computed: int = 0
    failed: int = 0
    blocks: int = 0
    seconds: float = 0.0
    batch_size: int = 0
    micro_batch: int = 0
    device: str = ""
    how: dict[str, Any] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    stages: dict[str, Any] = field(default_factory=dict)
    taken_over: int = 0
    helped: int = 0
    comparison: str = ""


def choose_device(asked: str) -> str:
    """`auto` takes a CUDA device when there is one.

    Raises:
        DeviceError: CUDA is asked for and absent.
    """
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if asked.startswith("cuda") and not torch.cuda.is_available():
        raise DeviceError(f"--device {asked}: this machine or this build of torch has no CUDA device; use --device cpu")
    if ":" in asked and int(asked.partition(":")[2]) >= torch.cuda.device_count():
        raise DeviceError(f"--device {asked}: there are {torch.cuda.device_count()} CUDA devices, numbered from 0")
    return asked


@dataclass(frozen=True, slots=True)
class Hooks:
    """What a run calls: `advance(images, failed)` after each batch, from the thread that writes, and `say(line)` before
    work that is not part of any batch; `watch(pass, sharing)` gives what is called after each batch too. What they
    raise stops the run. `stop` is asked whether to end. `is_command`: what this process used since it began counts.
    """

    advance: Callable[[int, int], None] = lambda *_: None
    say: Callable[[str], None] = lambda _: None
    watch: "Callable[[Pass, Sharing], Callable[[Batch], None]]" = lambda *_: lambda _: None
    stop: Stop | None = None
    is_command: bool = False


def extract(
    plan: Plan,
    run: RunConfig,
    *,
    backbone: Backbone | None = None,
    cache: Cache | None = None,
    advance: Callable[[int, int], None] = lambda *_: None,
    say: Callable[[str], None] = lambda _: None,
    stop: Stop | None = None,
) -> Summary:
    """`extract_sets` for one plan."""
    [summary] = extract_sets(
        [plan],
        run,
        backbones=lambda _: backbone,
        caches=None if cache is None else [cache],
        hooks=Hooks(advance, say, stop=stop),
    )
    return summary


def extract_sets(
    plans: Sequence[Plan],
    run: RunConfig,
    *,
    backbones: Callable[[int], Backbone | None] = lambda _: None,
    caches: Sequence[Cache] | None = None,
    hooks: Hooks = Hooks(),
) -> list[Summary]:
    """Compute and commit every missing block of the plans of one data set, whose images are decoded once for all.

    Of several processes (`run.rank`, torchrun) each does its share, and returns when nothing is left to do. `backbones`
    gives the network of a plan where it is loaded already, None where not; `caches`, one a plan, saves completing the
    same decoded caches twice.

    Raises:
        Stopped: `hooks.stop` was asked to end; what is committed stays.
        FeatstoreError: files changed, too many failures, an overflow, or results that do not match what is committed.
    """
    with writer_lock(plans[0].folder.parents[2]) as lock:

        def alive(images: int, failed: int) -> None:
            lock.renew()
            hooks.advance(images, failed)

        return _extract(list(plans), run, backbones, caches, replace(hooks, advance=alive))


def _extract(
    plans: list[Plan],
    run: RunConfig,
    backbones: Callable[[int], Backbone | None],
    caches: Sequence[Cache] | None,
    hooks: Hooks,
) -> list[Summary]:
    started, watch = time.monotonic(), Watch.of_process() if hooks.is_command else Watch()
    summaries = {plan.name: Summary(plan.name) for plan in plans}
    said: dict[int, dict[str, Any] | None] = {}
    device = ranks_of(run).own_device(choose_device(run.device))
    lanes: list[Lane] = []
    held: dict[int, Cache] = {}
    for number, plan in enumerate(plans):
        notes = summaries[plan.name].notes
        if run.decoded_cache:
            held[number], lines = (
                (caches[number], []) if caches else fill_cache(plan, run, say=hooks.say, stop=hooks.stop)
            )
            notes += lines
        if len(plan.todo) == 0:
            if not is_prepared(plan):
                prepare(plan)
            sweep_claims(plan.folder)
            continue
        with _about(plan):
            check_files(plan.manifest, plan.todo)
            said[number] = foretold(plan, run, device)
            made, backbone, lines = create_set(plan, run, device, backbones(number), hooks.say)
            notes[:0] = lines
            lanes.append(Lane(made, run, device, backbone or load_backbone(made, run, device), number=number))
            lanes[-1].guard()
    is_stopped = hooks.stop is not None and hooks.stop.asked
    groups = in_step(lanes)
    for group in groups:
        own = [held[lane.number] for lane in group] if run.decoded_cache else []
        for lane, summary in zip(group, _compute(group, run, own, hooks, meeting_place(group, plans))):
            summary.notes[:0] = summaries[lane.plan.name].notes
            summary.seconds = time.monotonic() - started
            summaries[lane.plan.name] = summary
        is_stopped = hooks.stop is not None and hooks.stop.asked
        finish(
            [(lane.plan, summaries[lane.plan.name], said[lane.number]) for lane in group],
            run,
            is_stopped=is_stopped,
            watch=watch if len(groups) == 1 else None,
            imports=hooks.is_command,
        )
    if hooks.stop is not None and is_stopped:
        raise Stopped(f"{hooks.stop.reason}; {AGAIN}", hooks.stop.code)
    return [summaries[plan.name] for plan in plans]


def foretold(plan: Plan, run: RunConfig, device: str) -> dict[str, Any] | None:
    """What `featstore plan` said of this very work, else what FLOP and sizes say; None for a share of it."""
    if ranks_of(run).world > 1:
        return None
    held = held_prediction(plan)
    if held is not None:
        return held
    forward = forward_seconds(plan.gflop, device, plan.spec["identity"]["compute_dtype"], seconds=0.02)
    return cheap_prediction(plan, run, device=device, forward=forward)


def finish(
    done: Sequence[tuple[Plan, Summary, dict[str, Any] | None]],
    run: RunConfig,
    *,
    is_stopped: bool,
    watch: Watch | None = None,
    imports: bool = True,
) -> None:
    """What is left when the blocks of a pass are written: compact copies, and how it was done beside what was foretold.

    `done` are its sets with what was foretold of each by itself. Time and memory are those of the whole pass: one
    process decodes for all. They are compared where `watch` tells them; `imports`, whether those are part of it.
    """
    for plan, summary, _ in done:
        commits.sweep_attempts(plan.folder, older_than=commits.STALE_SECONDS)
        if not is_stopped:
            _compact(plan, summary)
    predictions = [said for _, _, said in done if said is not None]
    if is_stopped or len(predictions) < len(done):
        for plan, summary, said in done:
            _write_run(plan, _record(plan, run, summary, said) | {"comparison": None})
        return
    together = of_pass(predictions, imports=imports)
    took = watch.actual() if watch is not None else {}
    of = "the set" if len(done) == 1 else f"a pass of {len(done)} sets"
    total = {**took, "bytes": 0, "files": 0}
    for (plan, summary, _), said in zip(done, predictions):
        size = measure_folder(plan.folder)
        record = _record(plan, run, summary, said) | {"comparison_of": of}
        own = {**together, "bytes": said["bytes"], "files": said["files"]}
        record = with_own_file(record, own, {**took, "bytes": size.bytes, "files": size.files})
        _write_run(plan, record)
        for name in ("bytes", "files"):
            total[name] += record["comparison"][name]["actual"]
    line = comparison_line(together, compare(together, total))
    if all(said["kind"] == "measured" for said in predictions):  # nobody asked what FLOP alone say: that is recorded
        done[-1][1].comparison = line if len(done) == 1 or not line else f"{of} {line}"


def _compact(plan: Plan, summary: Summary) -> None:
    """Large shards of small arrays beside a set that is complete; without them it is whole too, only slower to load."""
    try:
        gain = [
            array.name for array, stop in compact.compactable(plan.folder) if stop * array.row_bytes >= COMPACT_BYTES
        ]
        if gain and not _is_incomplete(plan.folder):
            compact.compact(plan.folder, arrays=gain)
    except StoreError as error:
        summary.notes.append(f"no compact copies: {error}")


def _is_incomplete(folder: Place) -> bool:
    """Whether any block of any array is not committed."""
    book = ledger.read_ledger(folder)
    blocks = {block for block, _, _ in book.blocks(int(read_spec(folder)["layout"]["block_rows"]))}
    return any(blocks - commits.committed_blocks(folder, group) for group in book.groups)


@contextmanager
def _about(plan: Plan) -> Iterator[None]:
    """Errors in here say which set they are about."""
    try:
        yield
    except FeatstoreError as error:
        error.about = plan.name
        raise


def meeting_place(group: Sequence[Lane], plans: Sequence[Plan]) -> tuple[Place, int]:
    """(set folder for claims, rows of a unit) of sets that go in step: the same for every process of one command.

    Sets that are complete by now count too, as they were not for those that began earlier.
    """
    rows = max(lane.blocks.rows_per_block for lane in group)
    for plan in plans:
        if not is_prepared(plan):
            continue
        held = read_spec(plan.folder)["layout"]["block_rows"]
        if np.array_equal(ledger.read_rows(plan.folder, plan.manifest.short), group[0].row_index):
            ranges = ledger.read_ledger(plan.folder).blocks(held)
            size = max(rows, held)
            if all(start // size == (stop - 1) // size for _, start, stop in ranges):
                return plan.folder, size
    return group[0].plan.folder, rows


def _compute(
    lanes: list[Lane], run: RunConfig, caches: list[Cache], hooks: Hooks, meeting: tuple[Place, int]
) -> list[Summary]:
    """One pass over the images of sets that go in step; what this process did for each of them.

    Claims stand in the folder of `meeting`, and units have as many rows as it says.
    """
    work = Pass(lanes, run, caches=caches, rows=meeting[1])
    tallies = work.tallies()
    with Sharing(meeting[0], list(work.units), work.left, work.jobs, run, hooks.stop) as sharing:
        watch = hooks.watch(work, sharing)

        def advance(batch: Batch) -> None:
            hooks.advance(*progress_of(batch))
            watch(batch)

        blocks = work.compute(
            sharing,
            tallies,
            stop=hooks.stop,
            advance=advance,
            committed=sharing.committed,
            failed=sharing.give_up,
        )
        if not work.left():
            sharing.claims.sweep()  # also what was killed before it had said whose it was
            for lane, tally in zip(lanes, tallies):
                check_failures(lane.blocks, tally)
    found = []
    for lane, tally, count in zip(lanes, tallies, blocks):
        summary = Summary(lane.plan.name, tally.computed, tally.failed, count, reasons=tally.reasons)
        summary.device, summary.batch_size, summary.micro_batch = lane.device, lane.batch_size, lane.pieces.size
        summary.how = facts_of(lane.backbone) | {"sets_in_pass": len(lanes)}
        summary.stages = work.stages.facts()
        summary.taken_over, summary.helped = sharing.taken_over, sharing.helped
        summary.notes = work.notes + lane.notes()
        found.append(summary)
    return found


def _record(plan: Plan, run: RunConfig, summary: Summary, said: dict[str, Any] | None) -> dict[str, Any]:
    """How and where it was computed, and what was foretold of it; never part of identity."""
    return {
        "time": records.utc_now(),
        "manifest": plan.manifest.short,
        "weights": plan.source.origin,
        "run": {name: str(value) if isinstance(value, Path) else value for name, value in asdict(run).items()},
        "summary": asdict(summary),
        "versions": records.versions(),
        "machine": records.machine(),
        "peak_memory_bytes": records.peak_memory_bytes(),
        "prediction": said,
    }


def _write_run(plan: Plan, record: dict[str, Any]) -> None:
    files.write_atomic(plan.folder / "runs" / f"{uuid.uuid4().hex}.json", files.sealed(record))
