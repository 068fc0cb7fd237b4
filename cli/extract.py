"""`featstore register` and `featstore extract`."""

import contextlib
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import show
from cli.flags import with_config
from cli.running import make_stop, raise_errors, run_plans
from featstore.configs import RegisterConfig, RunConfig, SetConfig, each_set, parse_bytes
from featstore.errors import ConfigError, StoreError
from featstore.objects import Place, as_object

if TYPE_CHECKING:
    from featstore.datasets.manifest import Manifest
    from featstore.extraction.decoded_cache import Cache
    from featstore.extraction.plan import Plan
    from featstore.extraction.stopping import Stop

StoreOption = Annotated[
    str | None,
    typer.Option("--store", help="store: a folder or s3://BUCKET/PREFIX; default: FEATSTORE_HOME, else the user cache"),
]
DatasetOption = Annotated[str | None, typer.Option("--dataset", help="data set; default: every registered one")]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]


@with_config(config=RegisterConfig)
def register(
    name: Annotated[str, typer.Argument(help="name of the data set from now on; a family's name picks its adapter")],
    root: Annotated[Path | None, typer.Argument(help="folder that holds the images")] = None,
    *,
    config: RegisterConfig,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Register a data set: fix its samples, labels, patients and splits under a name.

    Examples: `featstore register chexpert /data/CheXpert-v1.0`; `featstore register mine /data --table labels.csv
    --path-column file --group-column patient --label-columns Edema,Effusion`; `featstore register phantom`.
    Registering again after files were added or changed keeps the old manifest readable.
    """
    from featstore.datasets.contents import hashing_cost
    from featstore.datasets.progress import watched
    from featstore.register import register as register_source
    from featstore.store.layout import store_path

    with contextlib.ExitStack() as stack:
        shown: list[show.Advance] = []

        def advance(done: int, total: int) -> None:
            if not shown:
                shown.append(stack.enter_context(show.progress(f"{name}: hashing", total, "files")))
            shown[0](done)

        bars: dict[str, show.Advance] = {}

        def watch(what: str, done: int, total: int) -> None:
            if what not in bars:
                bars[what] = stack.enter_context(show.progress(f"{name}: {what}", total, ""))
            bars[what](1)

        stack.enter_context(watched(watch))
        manifest, before = register_source(store_path(store), name, root, config, advance=advance)
    facts, cost = describe_manifest(manifest), hashing_cost(manifest)
    if json:
        to_hash = {"files": cost.files, "bytes": cost.bytes, "seconds": round(cost.seconds, 1)}
        show.emit_json({**facts, "to_hash": to_hash})
        return
    print(f"store {store_path(store)}")
    print(
        f"{name}: {facts['samples']} samples, {facts['groups'] or 'unknown'} patients, manifest {manifest.short} "
        f"({facts['adapter']}, {manifest.root})"
    )
    print(
        f"  splits ({manifest.meta['split_origin']}): "
        + ", ".join(f"{key or 'unused'} {n}" for key, n in facts["splits"].items())
    )
    if facts["label_columns"]:
        print(f"  labels: {show.some(facts['label_columns'], 30)}")
    if facts["renamed"]:
        said = ", ".join(f"{own} is {there}" for own, there in facts["renamed"].items())
        print(f"  columns of yours named like the manifest's own: {said}")
    if facts["tasks"]:
        print(f"  tasks: {', '.join(facts['tasks'])}")
    for note in [*manifest.meta["notes"], *([f"{facts['missing']} files are missing"] if facts["missing"] else [])]:
        print(f"  note: {note}")
    if cost.files:
        took = show.duration(max(1, cost.seconds))
        print(f"  hashing all {cost.files:,} files would read {show.size(cost.bytes)}, about {took} (--hash)")
    if before is not None and before.short != manifest.short:
        print(f"  the manifest before was {before.short} ({len(before)} samples); it stays readable")


def describe_manifest(manifest: "Manifest") -> dict[str, Any]:
    """Counts of a manifest for people and machines."""
    import pyarrow.compute as pc

    splits = manifest.table.column("split").value_counts().to_pylist()
    names = set(manifest.table.column_names)
    renamed = {name.removeprefix("source_"): name for name in manifest.table.column_names if name.startswith("source_")}
    return {
        "dataset": manifest.name,
        "manifest": manifest.digest,
        "samples": len(manifest),
        "groups": pc.count_distinct(manifest.table.column("group"), mode="only_valid").as_py(),
        "splits": {item["values"]: item["counts"] for item in sorted(splits, key=lambda item: item["values"] or "")},
        "renamed": {own: there for own, there in renamed.items() if own in names},
        **manifest.meta,
    }


@with_config(config=SetConfig, run=RunConfig)
def extract(
    *,
    dataset: DatasetOption = None,
    config: SetConfig,
    run: RunConfig,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Run frozen backbones over a data set and keep their embeddings.

    Only what is missing is computed: a second run does nothing, a killed one goes on, new images are added.
    Examples: `featstore extract --model dinov3-7b --res 512`; `featstore extract --dataset cxr --model tiny --res 98
    --tokens cls,mean_patch,patches`; `featstore extract --model dinov2-base,dinov3-large --res 224,512` decodes every
    image once for all four; `--views 4 --augment radiology` adds four augmented copies of every image, for heads that
    train on such; add `--random-weights 0` to try without weights. On 8 GPUs: `torchrun --nproc-per-node 8
    -m featstore extract ...`; as one of 16 jobs that start by themselves: `--rank 3 --world 16 --time-budget 3h50m`
    (recipes/array.sbatch is that for Slurm). `featstore plan` says beforehand what it will take.
    """
    from featstore.extraction.stopping import signals

    stop = make_stop(run)  # the budget counts from here
    with signals(stop):
        _extract(dataset, config, run, store, stop, json=json)


def _extract(
    dataset: str | None, config: SetConfig, run: RunConfig, store: str | None, stop: "Stop", *, json: bool
) -> None:
    from featstore.extraction import plan as planning
    from featstore.extraction.distributed import find_ranks
    from featstore.store.catalog import Store
    from featstore.store.layout import store_path
    from featstore.store.scratch import check_stage

    home = Store(store_path(store))
    check_stage(run.stage, home.path)
    ranks = find_ranks(run.rank, run.world)
    quiet = json or not ranks.speaks
    if not quiet:
        print(f"store {home.path}", flush=True)
    if ":" in config.model:
        sys.path.append(str(Path.cwd()))  # so that `module:function` finds a module beside the user
    wanted = [(each, planning.describe_backbone(home, each)) for each in each_set(config)]
    plans = [
        planning.make_plan(home, name, each, run, source)
        for name in planning.registered_datasets(home, dataset)
        for each, source in wanted
    ]
    if not quiet:
        for plan in plans:
            _print_plan(plan, run)
    check_space(home.path, plans, run, quiet=quiet)
    results = [] if run.dry_run else run_plans(plans, run, quiet=quiet, stop=stop)
    if json and ranks.speaks:
        show.emit_json(
            [
                {
                    "set": plan.name,
                    "todo": len(plan.todo),
                    "bytes": plan.new_bytes,
                    "decoded_bytes": _cache_bytes(plan, run),
                }
                for plan in plans
            ]
            if run.dry_run
            else results
        )
    raise_errors(results)
    if results and all(item["samples"] and item["failed"] == item["samples"] for item in results):
        raise ConfigError("no image could be decoded; check the root and the files")


def _print_plan(plan: "Plan", run: RunConfig) -> None:
    for note in plan.notes:
        print(note)
    weights = "RANDOM WEIGHTS, " if plan.source.random else ""
    print(f"{plan.name} ({weights}{plan.source.origin})")
    if len(plan.todo) == 0:
        print(
            f"  complete: all {len(plan.manifest)} samples have {', '.join(array.name for array in plan.arrays)}; "
            f"nothing to {'compute' if run.decoded_cache else 'do'}",
            flush=True,
        )
    else:
        _print_work(plan, run)
    if run.decoded_cache:
        _print_cache(plan, run)


def _print_work(plan: "Plan", run: RunConfig) -> None:
    from featstore.extraction.estimate import forward_seconds
    from featstore.extraction.pipeline import choose_device

    device = choose_device(run.device)
    seconds = forward_seconds(plan.gflop, device, plan.spec["identity"]["compute_dtype"])
    print(
        f"  {len(plan.todo)} of {len(plan.manifest)} samples to do: "
        f"{show.size(plan.new_bytes)} in {plan.new_files} files, "
        f"{plan.gflop / 1e3:.3g} TFLOP, about {show.duration(max(1, seconds))} of computing on {device}",
        flush=True,
    )


def _print_cache(plan: "Plan", run: RunConfig) -> None:
    cache, more = _cache_of(plan), _cache_bytes(plan, run)
    if not more:
        text = "all there, nothing is decoded"
    elif not cache.exists:
        text = f"at most {show.size(more)} to be kept beside it, a third of that if all are grey"
    elif cache.channels == 1:
        text = f"{show.size(more)} more in {cache.name}; the first one in colour makes all of it three times as large"
    else:
        text = f"{show.size(more)} more in {cache.name}"
    print(f"  decoded images: {text}", flush=True)


def _cache_of(plan: "Plan") -> "Cache":
    from featstore.extraction.decoded_cache import find_cache

    return find_cache(plan.folder.parents[2], plan.manifest, plan.preprocess)


def _cache_bytes(plan: "Plan", run: RunConfig) -> int:
    """Bytes that the decoded cache may take; an upper bound where it is still to be made."""
    return _cache_of(plan).new_bytes(retry_failed=run.retry_failed) if run.decoded_cache else 0


def check_space(root: Place, plans: "list[Plan]", run: RunConfig, *, quiet: bool) -> None:
    """Say what is free; stop before the disk is full or more is written than was agreed to."""
    wanted = sum(plan.new_bytes + _cache_bytes(plan, run) for plan in plans)
    if not wanted:
        return
    place = root
    remote = as_object(root) is not None
    while not remote and not place.exists():
        place = place.parent
    free = float("inf") if remote else shutil.disk_usage(place).free
    if not quiet:
        known = (
            "free space is not checked: a bucket does not state it" if remote else f"{show.size(free)} free in {place}"
        )
        print(f"  {known}" + ("; dry run, nothing written" if run.dry_run else ""), flush=True)
    if run.dry_run or run.yes:
        return
    most = "at most " if run.decoded_cache else ""
    if wanted > free:
        raise StoreError(
            f"{most}{show.size(wanted)} are to be written and {show.size(free)} are free in {place}; "
            "pass --yes to go on anyway"
        )
    if wanted > parse_bytes(run.max_bytes):
        raise ConfigError(
            f"{most}{show.size(wanted)} are to be written, more than --max-bytes {run.max_bytes}; "
            "keep fewer --tokens, or pass --yes"
        )


COMMANDS = {"register": register, "extract": extract}
