"""`probes compare` and `probes subgroups`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from cli import show
from cli.extract import JsonOption, StoreOption

MetricOption = Literal[
    "auroc", "auprc", "accuracy", "balanced_accuracy", "f1", "sensitivity", "specificity", "precision",
    "mae", "rmse", "r2", "pearson", "spearman", "qwk",
]  # fmt: skip
ResultsOption = Annotated[Path | None, typer.Option("--results", help="folder of the records; default: STORE/results")]


def compare(
    a: Annotated[
        str, typer.Argument(metavar="A", help="record (id, its start, or path), or file of scores; A1,A2: seeds")
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="what A is compared with")],
    *,
    metric: Annotated[
        MetricOption | None,
        typer.Option("--metric", help="what is compared; default: auroc, of numbers r2, of ranks qwk"),
    ] = None,
    margin: Annotated[
        float | None, typer.Option("--margin", help="test non-inferiority and equivalence within this much")
    ] = None,
    subgroups: Annotated[
        str, typer.Option("--subgroups", help="columns, comma-separated: sex,age,view or any of the manifest's")
    ] = "",
    threshold: Annotated[
        Literal["0.5", "youden"],
        typer.Option("--threshold", help="where decisions are taken; youden: found on each one's validation rows"),
    ] = "0.5",
    level: Annotated[float, typer.Option("--level", help="confidence of the intervals")] = 0.95,
    resamples: Annotated[int, typer.Option("--resamples", help="bootstrap resamples, by patient")] = 1000,
    seed: Annotated[int, typer.Option("--seed", help="seed of the bootstrap")] = 0,
    results: ResultsOption = None,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Paired comparison of two records, or of scores of other tools, on the test samples that both have.

    Prints A - B, macro and per label, with patient-clustered intervals, p-values (bootstrap and DeLong) adjusted over
    the labels (Holm, Benjamini-Hochberg), and first what differs between the protocols.

    Examples: `probes compare 20260101T1200 20260101T1300 --margin 0.02`; `probes compare RECORD scores.csv --subgroups
    sex,age`; runs that differ in their seed: `probes compare A1,A2,A3 B1,B2,B3`. A CSV, TSV or Parquet file has a
    column `id` and `score:LABEL`, and may have `label:LABEL` (0, 1, empty; or a number), `group` (patient), `split`.
    Two few-shot curves are compared at each budget, draw by draw.
    """
    from featstore.store.catalog import Store
    from featstore.store.layout import store_path
    from probes.compare import compare as run
    from probes.compare_tables import print_comparison
    from probes.paired import Criteria

    home = Store(store_path(store))
    criteria = Criteria(metric=metric, margin=margin, level=level, num_resamples=resamples, seed=seed)
    found = run(
        a,
        b,
        criteria,
        store=home,
        folder=results or home.path / "results",
        subgroups=tuple(name.strip() for name in subgroups.split(",") if name.strip()),
        youden=threshold == "youden",
    )
    if json:
        show.emit_json(found)
    else:
        print_comparison(found, show.table)


def subgroups(
    record: Annotated[str, typer.Argument(metavar="RECORD", help="record (id, its start, or path) or file of scores")],
    *,
    by: Annotated[str, typer.Option("--by", help="columns, comma-separated: sex,age,view or any of the manifest's")],
    bands: Annotated[str, typer.Option("--bands", help="bands of age")] = "0-18,18-40,40-60,60-80,80+",
    level: Annotated[float, typer.Option("--level", help="confidence of the intervals")] = 0.95,
    resamples: Annotated[int, typer.Option("--resamples", help="bootstrap resamples, by patient")] = 1000,
    seed: Annotated[int, typer.Option("--seed", help="seed of the bootstrap")] = 0,
    results: ResultsOption = None,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Test metrics of one record by sex, age, view or any column of its manifest, with patient-clustered intervals.

    Counts, AUROC, AUPRC, and sensitivity and specificity at Youden's threshold of the validation rows; of numbers and
    ranks their own metrics. A band of age ends before the next one starts. A label with one class in a subgroup is a
    dash there. The difference of two records by subgroup: `probes compare A B --subgroups sex`.

    Examples: `probes subgroups RECORD --by sex,age,view`; `probes subgroups RECORD --by age --bands 0,50,70 --json`.
    """
    from featstore.store.catalog import Store
    from featstore.store.layout import store_path
    from probes.subgroup_tables import by_subgroup, print_subgroups
    from probes.subgroups import parse_bands

    home = Store(store_path(store))
    found = by_subgroup(
        record,
        [name.strip() for name in by.split(",") if name.strip()],
        store=home,
        folder=results or home.path / "results",
        bands=parse_bands(bands),
        level=level,
        num_resamples=resamples,
        seed=seed,
    )
    if json:
        show.emit_json(found)
    else:
        print_subgroups(found, show.table)


COMMANDS = {"compare": compare, "subgroups": subgroups}
