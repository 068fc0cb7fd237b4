"""`probes all`."""

from typing import Annotated, Any

import typer

from cli import show
from cli.extract import JsonOption, StoreOption
from cli.flags import with_config
from probes.configs import EvalConfig, TaskConfig
from probes.suite_config import SuiteConfig

RandomOption = Annotated[
    bool,
    typer.Option("--extract", help="first extract the sets with random weights to compare with, where there is none"),
]


@with_config(config=EvalConfig, reading=TaskConfig, suite=SuiteConfig)
def all_(
    *,
    config: EvalConfig,
    reading: TaskConfig,
    suite: SuiteConfig,
    extract: RandomOption = False,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Every probe on every set of a data set in one pass, beside its baselines; what is there already is not redone.

    Features are read once for all probes. Stop it when you like: the same command goes on where it stopped, and when
    there is nothing to do it shows the tables in seconds. A record is taken as it is where set, rows, task, features,
    probe and all options are equal; `--again` makes it anew. Baselines: chance (one score for all), majority (what is
    most frequent in training), metadata only (age, sex, view; `--metadata`), and a network with random weights
    (`--extract` makes it).

    Examples: `probes all --dataset chexpert`; `probes all --dataset cxr --labels Edema,Effusion --probes knn,linear`;
    another baseline: `probes all --dataset cxr --metadata age,sex,scanner`. `probes compare` takes baselines too:
    `probes results --json` tells their ids.
    """
    from featstore.errors import TaskError
    from featstore.store.catalog import Store
    from featstore.store.layout import store_path
    from probes.report import print_tables
    from probes.suite import evaluate_all, missing_random

    home = Store(store_path(store))
    if not json:
        print(f"store {home.path}", flush=True)
    if extract:
        _extract_random(home, config.dataset)
    found = evaluate_all(
        home, config, suite, reading=reading, progress=lambda total: show.progress("probes all", total, unit="records")
    )
    if json:
        show.emit_json(found.records)
    else:
        print_tables(found.records, show.table)
        for note in (*found.notes, *missing_random(home, config.dataset)):
            print(f"  {note}")
    show.say(f"{found.num_made} records made, {found.num_kept} there already")
    if found.failed:
        raise TaskError(f"{len(found.failed)} records could not be made:\n  " + "\n  ".join(found.failed))


def _extract_random(home: Any, dataset: str) -> None:
    """Run the extractions that the hint would name."""
    from dataclasses import replace

    from cli.extract import check_space
    from cli.running import raise_errors, run_plans
    from featstore.configs import RunConfig
    from featstore.extraction.plan import make_plan
    from featstore.request import config_of
    from probes.suite import random_twins

    run = RunConfig()
    wanted = [
        replace(config_of(entry.spec), random_weights=0, weights=None, name=None)
        for entry in random_twins(home, dataset)
    ]
    plans = [make_plan(home, dataset, item, run) for item in wanted]
    if plans:
        check_space(home.path, plans, run, quiet=True)
        raise_errors(run_plans(plans, run, quiet=True))


COMMANDS = {"all": all_}
