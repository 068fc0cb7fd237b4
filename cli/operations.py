"""`featstore ls, info, datasets`."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import show
from cli.extract import JsonOption, StoreOption, describe_manifest
from featstore.errors import UnknownNameError

if TYPE_CHECKING:
    from featstore.store.catalog import Store


def open_home(store: str | None) -> "Store":
    # Deferred: --help needs neither numpy nor the store.
    from featstore.store.catalog import open_store

    return open_store(store)


def existing_home(store: str | None) -> "Store":
    """A store that is there: a check of nothing must not pass for a check.

    Raises:
        UnknownNameError: no store at that place.
    """
    home = open_home(store)
    if not (home.path / "store.json").is_file():
        raise UnknownNameError(
            f"there is no store at {home.path}; check --store and FEATSTORE_HOME, or make one by `featstore register`"
        )
    return home


def ls(
    dataset: Annotated[str | None, typer.Argument(help="only this data set")] = None,
    *,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """List data sets and the sets of embeddings that stand in the store."""
    home = open_home(store)
    datasets = [describe_manifest(home.manifest(name)) for name in home.datasets() if dataset in (None, name)]
    rows = [row for row in home.summaries() if dataset is None or row["set"].startswith(f"{dataset}/")]
    if json:
        show.emit_json({"store": str(home.path), "datasets": datasets, "sets": rows})
        return
    print(f"store {home.path}")
    if not datasets:
        print(
            "no data sets; start with `featstore register NAME ROOT`" if dataset is None else f"no data set {dataset!r}"
        )
        return
    show.table(
        "",
        ["data set", "samples", "patients", "splits", "labels", "manifest"],
        [
            [
                item["dataset"],
                str(item["samples"]),
                str(item["groups"] or "unknown"),
                " ".join(f"{key or 'unused'} {count}" for key, count in item["splits"].items()),
                item["default_task"]
                or ",".join(item["label_columns"][:4]) + (",..." if len(item["label_columns"]) > 4 else ""),
                item["manifest"][:8],
            ]
            for item in datasets
        ],
        right=("samples", "patients"),
    )
    if rows:
        names = [row["set"] for row in rows]
        unique = [names.count(row["set"]) == 1 for row in rows]
        cells = [_set_row(row, unique=alone) for row, alone in zip(rows, unique)]
        show.table("", SET_COLUMNS, cells, right=("ok", "failed", "pending", "size"))
    else:
        print("no sets; `featstore extract --model NAME` makes one")


ManifestOption = Annotated[
    str | None, typer.Option("--manifest", help="an older manifest, by the start of its digest; default: the current")
]
SET_COLUMNS = ["set", "weights", "pixels", "arrays", "dtype", "ok", "failed", "pending", "size"]


def _set_row(row: dict[str, Any], *, unique: bool) -> list[str]:
    """Cells of one set; where its name is not unique, the fingerprint that tells it from the others."""
    name = row["set"] if unique else f"{row['set']}-{row['fingerprint'][:8]}"
    if "error" in row:
        return [name, "", "", row["error"], "", "", "", "", ""]
    pixels = "x".join(map(str, row["pixels"])) if row["pixels"] else ""
    return [
        name,
        "RANDOM" if row["weights"] == "random" else row["weights"],
        f"{pixels} {row['geometry'] or ''}".strip(),
        ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in row["arrays"].items()) + _form(row),
        row["dtype"] + _computed(row),
        str(row["ok"]),
        str(row["failed"]),
        str(row["pending"]),
        show.size(row["bytes"]),
    ]


def _computed(row: dict[str, Any]) -> str:
    """What the network computed in, where it was not float32 with weights of the same type."""
    dtype, weights = row["compute_dtype"], row.get("weight_dtype")
    if weights is not None:
        return f" (in {dtype}, {weights} weights)"
    return f" (in {dtype})" if dtype not in (None, "float32") else ""


def _form(row: dict[str, Any]) -> str:
    """What was done to the rows besides storing them."""
    steps = ",".join(row.get("reduction", {}).get("steps", []))
    return (f"; patches {steps}" if steps else "") + (f"; archived ({row['archived']})" if row["archived"] else "")


def info(
    name: Annotated[str, typer.Argument(help="DATASET/MODEL@RES, or a data set")],
    *,
    failed: Annotated[bool, typer.Option("--failed", help="list every failed image with its reason")] = False,
    manifest: ManifestOption = None,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Everything about one set or data set: identity, counts, failures, runs; for an older manifest too."""
    import json as jsonlib

    home = open_home(store)
    if "/" not in name:
        facts = describe_manifest(home.manifest(name, manifest))
        facts["columns"] = home.manifest(name, manifest).table.column_names
    else:
        features = home.set(name, manifest=manifest)
        ids = features.manifest.column("id")
        runs = [jsonlib.loads(path.read_bytes()) for path in sorted((features.folder / "runs").glob("*.json"))]
        facts = {
            **features.summary(),
            "folder": str(features.folder),
            "block_rows": features.spec["layout"]["block_rows"],
            "identity": features.spec["identity"],
            "failures": {ids[row]: reason for row, reason in sorted(features.failures.items())},
            "runs": sorted(runs, key=lambda run: run["time"]),
        }
    if json:
        show.emit_json(facts)
        return
    failures = facts.pop("failures", {})
    runs = facts.pop("runs", [])
    print_facts(facts)
    if failures:
        shown = list(failures.items()) if failed else list(failures.items())[:5]
        print(f"failures: {len(failures)}" + ("" if failed or len(failures) <= 5 else " (all with --failed)"))
        for sample, reason in shown:
            print(f"  {sample}: {reason}")
    for run in runs:
        done = run["summary"]
        print(
            f"run {run['time']}: {done['computed']} images in {show.duration(done['seconds'])} "
            f"on {run['machine']['processor']} ({done['device']}, batch {done['batch_size']}), weights {run['weights']}"
        )


def print_facts(facts: dict[str, Any], indent: str = "") -> None:
    for key, value in facts.items():
        if isinstance(value, dict) and value:
            print(f"{indent}{key}:")
            print_facts(value, indent + "  ")
        elif isinstance(value, list):
            print(f"{indent}{key}: {', '.join(map(str, value))}")
        elif value not in (None, ""):
            print(f"{indent}{key}: {show.size(value) if key == 'bytes' else value}")


def datasets(
    name: Annotated[str | None, typer.Argument(help="a family: explain its layout")] = None, *, json: JsonOption = False
) -> None:
    """Data set families that `register` knows; with NAME its layout, columns, splits, options, licence and traps."""
    from featstore.datasets import DATASETS, explain

    if name is not None and name not in DATASETS:
        raise UnknownNameError(f"unknown adapter {name!r}; known: {', '.join(sorted(DATASETS))}")
    chosen = [key for key in sorted(DATASETS) if name in (None, key)]
    texts = {key: explain(key) for key in chosen}
    if json:
        show.emit_json(texts)
    elif name is not None:
        print(texts[name])
    else:
        show.table("", ["family", "what"], [[key, text.splitlines()[0]] for key, text in texts.items()])


COMMANDS = {"ls": ls, "info": info, "datasets": datasets}
