"""`--engine ray`: the blocks of sets computed by actors on a Ray cluster, which may grow, shrink and lose machines.

This process plans, hands out units of work, counts and reports; it computes nothing. Every actor keeps its networks and
its pipeline while it is fed. Where a unit is done twice, by an actor that was thought lost or was slow, the first
commit of a block decides, as between any two processes; a run that was killed goes on from what is committed.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import featstore
from featstore import files, records
from featstore.configs import RunConfig
from featstore.errors import ConfigError, Stopped, StoreError
from featstore.extraction.claims import Claims
from featstore.extraction.creation import CREATION
from featstore.extraction.distributed import find_ranks
from featstore.extraction.pipeline import Hooks, Summary, extract_sets, finish
from featstore.extraction.plan import Plan
from featstore.extraction.prepare import is_prepared, prepare
from featstore.extraction.ray_actor import Order
from featstore.extraction.ray_fleet import Fleet, Shape
from featstore.extraction.stopping import AGAIN
from featstore.objects import Place

OBJECT_STORE_BYTES = 100 * 2**20  # of a cluster that is started here: nothing but the plans goes through it
STALE_TOKEN_SECONDS = 30 * 86400.0  # no run lasts that long
CORES = 2  # processor cores of an actor without a GPU


def run_on_ray(plans: Sequence[Plan], run: RunConfig, hooks: Hooks) -> list[Summary]:
    """Compute and commit every missing block of the plans of one data set on a Ray cluster: `extract_sets` there.

    A cluster that this process is connected to is used; else the one at `run.address`; else one is started here for as
    long as it takes. `hooks.watch` is not called: there is no pass in this process.

    Raises:
        ConfigError: Ray is not installed or not reachable, the machines have other versions, or the store or a device
            cannot be shared.
        Stopped: `hooks.stop` was asked to end; what is committed stays.
        FeatstoreError: as from `extract_sets`, from whichever machine it came.
    """
    plans = list(plans)
    local = replace(run, engine="local", address=None, actors=None)
    if not any(len(plan.todo) for plan in plans):
        return extract_sets(plans, local, hooks=hooks)
    root = plans[0].folder.parents[2]
    check_shareable(root, run)
    started = time.monotonic()
    most = max(-(-len(plan.todo) // int(plan.spec["layout"]["block_rows"])) for plan in plans) + 1
    for plan in plans:
        if len(plan.todo) == 0 and not is_prepared(plan):
            prepare(plan)
    with _cluster(run) as ray, _token(root) as token:
        shape = choose_shape(ray.cluster_resources(), run, most)
        versions = records.versions()
        order = Order(plans=plans, run=run, token=token, world=shape.count, versions=versions)
        fleet = Fleet(ray, order, shape, hooks, most=most)
        hooks.say(f"{plans[0].manifest.name}: {shape.count} Ray actors on {shape.device}, loading the network")
        try:
            fleet.work()
        finally:
            fleet.disband()
    summaries = [fleet.summary(number, plan.name) for number, plan in enumerate(plans)]
    is_stopped = hooks.stop is not None and hooks.stop.asked
    for plan, summary in zip(plans, summaries):
        if len(plan.todo):
            summary.seconds = time.monotonic() - started
            if not is_stopped:
                with Claims(plan.folder, patience=run.patience) as claims:
                    claims.sweep([*fleet.units(), CREATION])
            # What `plan` foretold is of one machine.
            finish([(plan, summary, None)], run, is_stopped=is_stopped)
    if hooks.stop is not None and is_stopped:
        raise Stopped(f"{hooks.stop.reason}; {AGAIN}", hooks.stop.code)
    return summaries


def check_shareable(root: Place, run: RunConfig) -> None:
    """Whether several processes may write to this store, each on the device that Ray gives it.

    Raises:
        ConfigError: one GPU is named for all.
        StoreError: the store takes one writer at a time.
    """
    if find_ranks().world > 1:
        raise ConfigError("--engine ray is started by one process; leave torchrun away")
    if run.device.startswith("cuda:"):
        raise ConfigError(f"--device {run.device}: Ray gives every actor a GPU of its own; use --device cuda, or auto")
    if files.commit_mode(root) == "single":
        raise StoreError(
            f"{root}: this store takes one writer at a time (`featstore doctor` says why), and the actors of "
            "--engine ray are several; use --engine local, or a store on other storage"
        )


def choose_shape(resources: dict[str, float], run: RunConfig, most: int) -> Shape:
    """What an actor takes of the cluster, and how many there are to be: never more than `most`, the blocks to do.

    A GPU each; without GPUs two cores each, or one where that is needed to have as many as asked for.
    """
    gpus, cpus = int(resources.get("GPU", 0)), resources.get("CPU", 0.0)
    if run.device == "cpu" or (run.device == "auto" and not gpus):
        count = min(run.actors or max(1, int(cpus // CORES)), most)
        return Shape("cpu", count, cpus=CORES if cpus >= CORES * count else 1, gpus=0)
    return Shape("cuda", min(run.actors or max(1, gpus), most), cpus=1, gpus=1)


def import_ray() -> Any:
    """The package.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigError("--engine ray needs the package ray; pip install 'featstore[ray]'") from error
    return ray


@contextlib.contextmanager
def _cluster(run: RunConfig) -> Iterator[Any]:
    """Ray, connected to the cluster that the run is to use."""
    import logging
    import os

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray = import_ray()
    if ray.is_initialized():
        yield ray
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if run.address is not None:
        options["address"] = run.address
        package = Path(featstore.__file__).parent
        if "site-packages" not in package.parts:  # a checkout, which other machines do not have
            options["runtime_env"] = {"py_modules": [str(package)], "excludes": ["__pycache__"]}
    else:
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # actors have processes of their own
        os.environ.setdefault("RAY_enable_worker_prestart", "0")
        options |= {
            "num_cpus": max(find_ranks().cores, run.actors or 1),
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
        }
    try:
        with kept_signals():
            ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = "a cluster could not be started here" if run.address is None else f"no Ray cluster at {run.address}"
        raise ConfigError(f"--engine ray: {where}: {error}") from error
    try:
        yield ray
    finally:
        with kept_signals():
            ray.shutdown()


@contextlib.contextmanager
def kept_signals() -> Iterator[None]:
    """Ray sets a handler of SIGTERM, which is ours to handle."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _token(root: Place) -> Iterator[Place]:
    """A file in the store by which actors know that they see the same one; those of killed drivers are swept."""
    folder = root / "cache" / "ray"
    token = folder / files.own_name()
    files.write_atomic(token, b"a Ray run is going on\n")
    try:
        yield token
    finally:
        with contextlib.suppress(OSError):
            now = token.stat().st_mtime
            token.unlink(missing_ok=True)
            for path in folder.glob("*"):
                if now - path.stat().st_mtime > STALE_TOKEN_SECONDS:
                    path.unlink(missing_ok=True)
