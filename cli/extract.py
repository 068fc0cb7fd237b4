"""`featstore register` and `featstore extract`."""

import contextlib
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import show
from cli.flags import with_config
from featstore.configs import RegisterConfig, RunConfig, SetConfig, parse_bytes
from featstore.errors import ConfigError, DeviceError, FeatstoreError, StoreError
from featstore.objects import Place, as_object

if TYPE_CHECKING:
    from featstore.backbones.tokens import Backbone
    from featstore.datasets.manifest import Manifest
    from featstore.extraction.decoded_cache import Cache
    from featstore.extraction.pipeline import Summary
    from featstore.extraction.plan import Plan
    from featstore.extraction.sharded import Lenders

StoreOption = Annotated[
    str | None,
    typer.Option("--store", help="store: a folder or s3://BUCKET/PREFIX; default: FEATSTORE_HOME, else the user cache"),
]
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
    return {
        "dataset": manifest.name,
        "manifest": manifest.digest,
        "samples": len(manifest),
        "groups": pc.count_distinct(manifest.table.column("group"), mode="only_valid").as_py(),
        "splits": {item["values"]: item["counts"] for item in sorted(splits, key=lambda item: item["values"] or "")},
        **manifest.meta,
    }


@with_config(config=SetConfig, run=RunConfig)
def extract(
    *,
    dataset: Annotated[str | None, typer.Option("--dataset", help="data set; default: every registered one")] = None,
    config: SetConfig,
    run: RunConfig,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Run a frozen backbone over a data set and keep its embeddings.

    Only what is missing is computed: a second run does nothing, a killed one goes on, new images are added.
    Examples: `featstore extract --model dinov3-7b --res 512`; `featstore extract --dataset cxr --model tiny --res 98
    --tokens cls,mean_patch,patches`; add `--random-weights 0` to try without weights.
    """
    from featstore.extraction import plan as planning
    from featstore.store.catalog import Store
    from featstore.store.layout import store_path

    home = Store(store_path(store))
    # Of the processes of torchrun that share one network, the first one speaks.
    speaks = run.memory != "shard" or os.environ.get("RANK", "0") == "0"
    quiet = json or not speaks
    if not quiet:
        print(f"store {home.path}", flush=True)
    if ":" in config.model:
        sys.path.append(str(Path.cwd()))  # so that `module:function` finds a module beside the user
    source = planning.describe_backbone(home, config)
    plans = [
        planning.make_plan(home, name, config, run, source) for name in planning.registered_datasets(home, dataset)
    ]
    if not quiet:
        for plan in plans:
            _print_plan(plan, run)
    check_space(home.path, plans, run, quiet=quiet)
    summaries = [] if run.dry_run else run_plans(plans, run, quiet=quiet)
    if json and speaks:
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
            else summaries
        )
    raise_errors(summaries)
    if summaries and all(item["samples"] and item["failed"] == item["samples"] for item in summaries):
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


def run_plans(plans: "list[Plan]", run: RunConfig, *, quiet: bool) -> list[dict[str, Any]]:
    """Extract one set after another; over several processes where the network is sharded, of which one reports.

    Where several are asked for, one whose images or options cannot do leaves the others alone: its result has `error`.
    """
    if run.memory != "shard":
        return _run_plans(plans, run, None, quiet=quiet)
    from featstore.extraction.pipeline import choose_device
    from featstore.extraction.sharded import Lenders

    lenders = Lenders(plans, run, choose_device(run.device))
    if lenders.rank:
        lenders.serve()
        return []
    try:
        return _run_plans(plans, run, lenders, quiet=quiet)
    finally:
        lenders.dismiss()


def _run_plans(plans: "list[Plan]", run: RunConfig, lenders: "Lenders | None", *, quiet: bool) -> list[dict[str, Any]]:
    results = []
    backbones = _Backbones(plans, run, lenders)
    for number, plan in enumerate(plans):
        try:
            results.append(_run_plan(plan, run, partial(backbones.get, number), quiet=quiet))
        except FeatstoreError as error:
            # The store, the weights' files, the device and the other processes are the next set's too.
            if len(plans) == 1 or lenders is not None or isinstance(error, OSError | DeviceError):
                raise
            show.say(f"{plan.name}: error: {error}")
            results.append({"set": plan.name, "samples": 0, "failed": 0, "blocks": 0, "error": str(error)})
    return results


def raise_errors(results: list[dict[str, Any]]) -> None:
    """Raise `ConfigError` that names every set that `run_plans` could not make."""
    broken = [f"{item['set']}: {item['error']}" for item in results if "error" in item]
    if broken:
        raise ConfigError(f"{len(broken)} of {len(results)} sets failed, the others are done: {'; '.join(broken)}")


class _Backbones:
    """The network of one plan at a time, kept while the next plan computes in the same type."""

    def __init__(self, plans: "list[Plan]", run: RunConfig, lenders: "Lenders | None"):
        self._plans, self._run, self._lenders = plans, run, lenders
        self._dtype = ""
        self._held: Backbone | None = None

    def get(self, number: int) -> "Backbone":
        from featstore.extraction.creation import load_backbone
        from featstore.extraction.pipeline import choose_device

        plan = self._plans[number]
        dtype = plan.spec["identity"]["compute_dtype"]
        if self._held is None or self._dtype != dtype:
            self._held, self._dtype = None, dtype  # let go of the one before
            if self._lenders is None:
                self._held = load_backbone(plan, self._run, choose_device(self._run.device))
            else:
                self._held = self._lenders.load(number)
        return self._held


def _run_plan(plan: "Plan", run: RunConfig, backbone: "Callable[[], Backbone]", *, quiet: bool) -> dict[str, Any]:
    from featstore.extraction.prepare import is_prepared, prepare

    cache, notes = _fill_cache(plan, run) if run.decoded_cache else (None, [])
    if len(plan.todo) == 0:
        if not is_prepared(plan):  # a manifest with nothing new: only the mapping of its rows is missing
            prepare(plan)
        if not quiet:
            for note in notes:
                print(f"    {note}")
        return {"set": plan.name, "samples": 0, "failed": 0, "blocks": 0, "seconds": 0.0, "notes": notes}
    from featstore.extraction import pipeline

    show.say(f"{plan.name}: loading the backbone")
    network = backbone()
    with show.progress(plan.name, len(plan.todo)) as advance:
        summary = pipeline.extract(plan, run, backbone=network, cache=cache, advance=advance, say=show.say)
    summary.notes[:0] = notes
    return _report(summary, plan, quiet=quiet)


def _fill_cache(plan: "Plan", run: RunConfig) -> "tuple[Cache, list[str]]":
    from featstore.extraction import decoded_cache

    lacking = len(_cache_of(plan).missing(retry_failed=run.retry_failed))
    with show.progress(f"{plan.name}: decoding", lacking) as advance:
        return decoded_cache.fill_cache(plan, run, advance=advance)


def _report(summary: "Summary", plan: "Plan", *, quiet: bool) -> dict[str, Any]:
    rate = summary.computed / max(summary.seconds, 1e-9)
    if not quiet:
        print(
            f"  {plan.name}: {summary.computed} computed in {show.duration(summary.seconds)} "
            f"({rate:.1f} images/s on {summary.device}, "
            f"batch {summary.batch_size}), {summary.blocks} blocks committed, {summary.failed} failed"
        )
        for note in summary.notes:
            print(f"    {note}")
        for reason, count in sorted(summary.reasons.items(), key=lambda item: -item[1]):
            print(f"    {count} x {reason}")
    return {
        "set": plan.name,
        "samples": summary.computed,
        "failed": summary.failed,
        "blocks": summary.blocks,
        "seconds": round(summary.seconds, 3),
        "reasons": summary.reasons,
        "notes": summary.notes,
    }


COMMANDS = {"register": register, "extract": extract}
