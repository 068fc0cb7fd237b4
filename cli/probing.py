"""`probes knn`, `probes linear`, `probes results`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from cli import show
from cli.extract import JsonOption, StoreOption
from cli.flags import with_config
from probes.configs import EvalConfig, KnnConfig, LinearConfig, SplitConfig, TaskConfig

ExtractOption = Annotated[
    bool,
    typer.Option(
        "--extract", help="extract the set that --model MODEL@RES names first, if it is missing or incomplete"
    ),
]


@with_config(config=EvalConfig, reading=TaskConfig, splits=SplitConfig, head=KnnConfig)
def knn(
    *,
    config: EvalConfig,
    reading: TaskConfig,
    splits: SplitConfig,
    head: KnnConfig,
    extract: ExtractOption = False,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """k nearest neighbours by cosine similarity: --vote softmax (DINO's, T = 0.07), majority, distance or mlknn.

    k is chosen on validation.

    Numbers and ranks get the weighted mean of the neighbours instead.

    Examples: `probes knn --dataset cxr --labels view` ranks every set of the data set; `--unit study --pool max` counts
    studies; `probes knn --dataset ct --labels age --kind regression`.
    """
    evaluate("knn", config, reading, head, splits=splits, extract=extract, store=store, json=json)


@with_config(config=EvalConfig, reading=TaskConfig, splits=SplitConfig, head=LinearConfig)
def linear(
    *,
    config: EvalConfig,
    reading: TaskConfig,
    splits: SplitConfig,
    head: LinearConfig,
    extract: ExtractOption = False,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Logistic regression, solved to its optimum; C chosen per label on validation. Ridge for numbers and ranks.

    Examples: `probes linear --dataset chexpert`; `probes linear --dataset cxr --model tiny --labels Edema,Effusion`.
    As papers train their heads, step by step: `probes linear --dataset nih --protocol radiology` trains a head for
    every learning rate x last 1 or 4 blocks x with or without the mean patch, chooses one on validation and lists what
    is not as published. Last blocks must be stored (`featstore extract ... --tokens cls --layers 9,10,11` of twelve
    blocks; the record names the missing ones), and `--views 4` trains on four stored augmented copies
    (`featstore extract ... --views 4 --augment radiology`). `--lr`, `--batch`, `--iterations` and `--optimizer` depart
    from what was published.
    What uncertain labels change: `probes linear --dataset chexpert --policies all`. External validation:
    `probes linear --dataset mimic-cxr --task mimic-7-a --test-dataset nih,chexpert` fits and chooses on the first data
    set and tests on the others, by the labels they share; `--test-task nih-7-a,chexpert-14` names their tasks. Data
    sets that share images or patients are refused. `--where` filters the first data set only.
    """
    evaluate("linear", config, reading, head, splits=splits, extract=extract, store=store, json=json)


def evaluate(
    probe: str,
    config: EvalConfig,
    reading: TaskConfig,
    head: Any,
    *,
    extract: bool,
    store: str | None,
    json: bool,
    splits: SplitConfig | None = None,
) -> None:
    """Make the records of one probe, as every command of a probe does, and print them."""
    from featstore.store.catalog import Store
    from featstore.store.layout import store_path
    from probes.evaluation import evaluate_sets

    home = Store(store_path(store))
    if not json:
        print(f"store {home.path}", flush=True)
    if extract:
        _extract_first(home, config)
    with show.told("probes.training"):
        records = evaluate_sets(
            home,
            probe,
            config,
            head,
            reading=reading,
            splits=splits,
            progress=lambda total: show.progress(f"probes {probe}", total, unit="records"),
        )
    if json:
        show.emit_json(records)
        return
    from probes.records import load_records
    from probes.report import print_tables, with_baselines

    print_tables(with_baselines(records, load_records(config.results or home.path / "results")), show.table)


def _extract_first(home: Any, config: EvalConfig) -> None:
    """Run the extraction that the probe would ask for: of a set that is there as it was made, else by name."""
    from cli.extract import check_space
    from cli.running import raise_errors, run_plans
    from featstore.configs import RunConfig, SetConfig
    from featstore.errors import ConfigError
    from featstore.extraction.plan import make_plan
    from featstore.request import config_of

    if not config.model:
        raise ConfigError("--extract needs --model MODEL or MODEL@RES, to know what to extract")
    model, _, resolution = config.model.partition("@")
    for entry in home.find(config.dataset, config.model):
        if entry.spec["weights"]["kind"] == "imported":
            raise ConfigError(
                f"{entry.full_name} holds imported features, which no extraction makes; leave --extract out"
            )
    made = [config_of(entry.spec) for entry in home.find(config.dataset, config.model) if entry.spec["resolution"]]
    run = RunConfig()
    plans = [
        make_plan(home, config.dataset, wanted, run)
        for wanted in made or [SetConfig(model=model, res=resolution or None)]
    ]
    check_space(home.path, plans, run, quiet=True)
    raise_errors(run_plans(plans, run, quiet=True))


def results(
    *,
    dataset: Annotated[str | None, typer.Option("--dataset", help="only this data set")] = None,
    probe: Annotated[str | None, typer.Option("--probe", help="only this probe")] = None,
    results: Annotated[
        Path | None, typer.Option("--results", help="folder of the records; default: STORE/results")
    ] = None,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Every record kept so far, ranked within equal task, split, manifest and geometry."""
    from featstore.store.layout import store_path
    from probes.records import load_records
    from probes.report import print_tables

    folder = results or store_path(store) / "results"
    equal = {key: value for key, value in (("dataset", dataset), ("probe", probe)) if value is not None}
    records = load_records(folder, **equal)
    if json:
        show.emit_json(records)
    elif not records:
        print(f"no records in {folder}; `probes knn --dataset NAME` makes one")
    else:
        print_tables(records, show.table)


COMMANDS = {"knn": knn, "linear": linear, "results": results}
