"""The command `plan`: what an extraction will take and which wall it will hit, before anything runs."""

import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import show
from cli.extract import JsonOption, StoreOption
from cli.flags import with_config
from featstore.configs import RunConfig, SetConfig, each_set, parse_bytes
from featstore.errors import ConfigError
from featstore.objects import Place, as_object

if TYPE_CHECKING:
    from featstore.extraction.gpus import Gpu
    from featstore.extraction.plan import Plan
    from featstore.extraction.survey import Survey
    from featstore.store.catalog import Store

PROBE_SECONDS = 5.0


@with_config(config=SetConfig, run=RunConfig)
def plan(
    *,
    dataset: Annotated[str | None, typer.Option("--dataset", help="data set; default: every registered one")] = None,
    config: SetConfig,
    run: RunConfig,
    store: StoreOption = None,
    json: JsonOption = False,
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", help="foretell for this card (h200, h100, a100, l4, rtx-4090, ...), unmeasured"),
    ] = None,
    gpus: Annotated[int, typer.Option("--gpus", help="--gpu: cards in the machine, one rank on each")] = 1,
    probe: Annotated[
        float | None,
        typer.Option(
            "--probe", help="seconds to try decoding and the network, a set; 5; with --gpu: 0, nothing is tried"
        ),
    ] = None,
) -> None:
    """Say what an extraction will take, before it runs: rows, bytes and files, time, memory, and what limits it.

    Takes the options of `featstore extract` and writes nothing to any set. A few seconds of decoding and of the network
    are tried on this machine; what it says is kept, and the run is compared with it when it ends.

    Examples: `featstore plan --dataset cxr --model dinov3-base --res 512`; with `--tokens cls,patches --reduce pool2`
    to see what patches cost; `--model dinov3-small,dinov3-base --res 224,512` for several sets in one pass; `--gpu
    h200 --gpus 8 --workers 96` for a machine that is not at hand, with 96 cores (weights are not needed); `--world 4`
    for four machines like this.
    """
    from featstore.extraction import prediction
    from featstore.extraction.distributed import find_ranks
    from featstore.extraction.gpus import find_gpu
    from featstore.store.catalog import Store
    from featstore.store.layout import store_path

    begun_cpu = 0.0 if Path(sys.argv[0]).name.startswith(("featstore", "__main__")) else time.process_time()
    card = None if gpu is None else find_gpu(gpu)
    if gpus < 1 or (gpus > 1 and card is None):
        raise ConfigError(f"--gpus counts the cards of --gpu, at least 1; got {gpus}{'' if card else ' without --gpu'}")
    if probe is not None and not 0 <= probe <= 600:
        raise ConfigError(f"--probe is between 0 and 600 seconds, got {probe:g}")
    seconds = probe if probe is not None else 0.0 if card is not None else PROBE_SECONDS
    if card is None and seconds == 0:
        raise ConfigError("--probe 0 measures nothing; name the machine instead, such as --gpu h200")
    # A world alone is that of all its ranks; what starts a process here says nothing of the run.
    find_ranks(0 if run.rank is None and run.world is not None else run.rank, run.world, environ={})
    home = Store(store_path(store))
    if not json:
        print(f"store {home.path}", flush=True)
    plans = make_plans(home, dataset, config, run, card)
    if card is not None:
        from featstore.extraction.survey import survey_gpu

        found = survey_gpu(plans, run, card, gpus=gpus, seconds=seconds, say=show.say)
    else:
        from featstore.extraction.survey import survey

        found = survey(plans, run, seconds=seconds, say=show.say, begun_cpu=begun_cpu)
        for item in found:
            if item.outlook.todo:
                prediction.keep(item.plan, item.prediction)
    room = free_room(home.path)
    if json:
        show.emit_json(_as_dict(found, room, run))
        return
    for item in found:
        _print_survey(item, run)
    _print_total(found, room, run, home.path)


def make_plans(
    home: "Store", dataset: str | None, config: SetConfig, run: RunConfig, card: "Gpu | None"
) -> "list[Plan]":
    """Plans of every set asked for, data set by data set; for a card in the type that it computes best."""
    from featstore.extraction import plan as planning

    if ":" in config.model:
        sys.path.append(str(Path.cwd()))  # so that `module:function` finds a module beside the user
    settings = [(item, planning.describe_backbone(home, item, facts=card is not None)) for item in each_set(config)]
    made = []
    for name in planning.registered_datasets(home, dataset):
        for item, source in settings:
            here = replace(run, device="cpu") if card is not None else run
            one = planning.make_plan(home, name, item, here, source)
            fits = card is not None and card.has_bfloat16 and item.compute_dtype == "auto"
            if fits and not (one.folder / "spec.json").is_file():
                one = planning.make_plan(home, name, replace(item, compute_dtype="bfloat16"), here, source)
            made.append(one)
    return made


def free_room(place: Place) -> tuple[int, int] | None:
    """(bytes, inodes) that are free where the store is; inodes -1 where they are not counted; None for a bucket."""
    if as_object(place) is not None:
        return None
    while not place.exists():
        place = place.parent
    found = os.statvfs(str(place))
    return shutil.disk_usage(str(place)).free, found.f_favail if found.f_files else -1


def _print_survey(item: "Survey", run: RunConfig) -> None:
    plan, outlook, made = item.plan, item.outlook, item.forecast
    for note in plan.notes:
        print(note)
    print(f"{plan.name} ({'RANDOM WEIGHTS, ' if plan.source.random else ''}{plan.source.origin})")
    count = len(plan.manifest)
    failed = f", {outlook.failed} of them failed" if outlook.failed else ""
    print(f"  rows        {len(plan.todo)} to do, {count - len(plan.todo)} of {count} done{failed}")
    print(f"  tokens      {', '.join(f'{name} {show.size(size)}' for name, size in item.choices.items())}")
    if not outlook.todo:
        print("  nothing to compute")
        return
    added, final = outlook.added, outlook.final
    print(
        f"  to write    {show.size(added.bytes)} in {added.files:,} files, {added.inodes:,} inodes with folders"
        + (f" (the set then: {show.size(final.bytes)} in {final.files:,})" if final != added else "")
    )
    kind = "" if made.measured else " (not measured)"
    rates = [f"{name} {_rate(made.rate(name))}" for name in made.stages if made.stages[name] > 0]
    shared = "; decoding is shared with the set above" if made.shared else ""
    print(f"  images/s    {', '.join(rates)}{kind}{shared}")
    parts = ", ".join(f"{name} {value:.3g}" for name, value in made.cpu.items())
    print(f"  CPU-seconds {made.cpu_seconds:.3g}: {parts}")
    world = run.world or 1
    ranks = f"; {_time(made.of_world(world))} with --world {world}" if world > 1 else ""
    print(
        f"  time        {_time(made.wall)} on {item.device} with {item.workers} workers, "
        f"{_time(made.start)} of it before the first batch{ranks}"
    )
    rows = outlook.rows_per_block
    pace = _time(made.block_seconds)
    print(f"  blocks      {made.blocks} of up to {rows} rows, one every {pace}; batches of {made.batch_size}")
    device = f", {show.size(made.device_memory)} on the card" if made.device_memory else ""
    print(f"  peak memory {show.size(made.memory)}{device}")
    for note in made.notes:
        print(f"  note        {note}")
    print(f"  wall        {made.limiting} limits; what would move it:")
    for line in made.advice:
        print(f"              - {line}")


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _time(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else show.duration(seconds)


def _print_total(found: "Sequence[Survey]", room: tuple[int, int] | None, run: RunConfig, place: Place) -> None:
    wanted = sum(item.outlook.added.bytes for item in found)
    inodes = sum(item.outlook.added.inodes for item in found)
    if len(found) > 1:
        wall = sum(item.forecast.wall for item in found)
        cpu = sum(item.forecast.cpu_seconds for item in found)
        print(
            f"all {len(found)} sets: {show.size(wanted)}, {_time(wall)}, {cpu:.3g} CPU-seconds, decoding counted once"
        )
    if room is not None:
        free = "" if room[1] < 0 else f" and {room[1]:,} inodes"
        print(f"{show.size(room[0])}{free} free in {place}")
        if wanted > room[0] or (0 <= room[1] < inodes):
            print("  not enough: keep fewer --tokens, or another --store")
    if wanted > parse_bytes(run.max_bytes):
        print(f"  more than --max-bytes {run.max_bytes}: `featstore extract` will ask for --yes")


def _as_dict(found: "Sequence[Survey]", room: tuple[int, int] | None, run: RunConfig) -> dict[str, Any]:
    from featstore.extraction.forecast import total

    wanted = sum(item.outlook.added.bytes for item in found)
    return {
        "sets": [item.as_dict() for item in found],
        "total": {**total([item.forecast for item in found]), "bytes": wanted},
        "free": None if room is None else {"bytes": room[0], "inodes": None if room[1] < 0 else room[1]},
        "max_bytes": parse_bytes(run.max_bytes),
    }


COMMANDS = {"plan": plan}
