"""`probes compare`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from cli import show
from cli.extract import JsonOption, StoreOption

MetricOption = Literal["auroc", "auprc", "accuracy", "balanced_accuracy", "f1", "sensitivity", "specificity"]


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="record (id, its start, or path) or file of scores")],
    b: Annotated[str, typer.Argument(metavar="B", help="what A is compared with")],
    *,
    metric: Annotated[MetricOption, typer.Option("--metric", help="what is compared")] = "auroc",
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
    results: Annotated[
        Path | None, typer.Option("--results", help="folder of the records; default: STORE/results")
    ] = None,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Paired comparison of two records, or of scores of other tools, on the test samples that both have.

    Prints A - B, macro and per label, with patient-clustered intervals, p-values (bootstrap and DeLong) adjusted over
    the labels (Holm, Benjamini-Hochberg), and first what differs between the protocols.

    Examples: `probes compare 20260101T1200 20260101T1300 --margin 0.02`; `probes compare RECORD scores.csv --subgroups
    sex,age`. A CSV, TSV or Parquet file has a column `id` and `score:LABEL`, and may have `label:LABEL` (0, 1, empty),
    `group` (patient), `split`.
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


COMMANDS = {"compare": compare}
