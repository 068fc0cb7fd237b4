"""`featstore import, explain`: sets in, out, and beside each other."""

from pathlib import Path
from typing import Annotated

import typer

from cli import show
from cli.extract import JsonOption, StoreOption
from cli.operations import open_home, print_facts


def import_(
    file: Annotated[Path, typer.Argument(help=".npz with a features array (N, D) and an array of ids or paths")],
    *,
    dataset: Annotated[str, typer.Option("--dataset", help="data set; registered from the file if it is not yet")],
    name: Annotated[str, typer.Option("--name", help="model part of the set's name")],
    features_key: Annotated[str, typer.Option("--features-key", help="array of the features")] = "features",
    ids_key: Annotated[
        str | None, typer.Option("--ids-key", help="array of the ids; default: id, ids, path or paths")
    ] = None,
    store: StoreOption = None,
) -> None:
    """Bring in embeddings made elsewhere, as the array `cls` of a set of their own."""
    from featstore.store.importer import import_features
    from featstore.store.layout import store_path

    home, folder, count = import_features(
        store_path(store), file, dataset=dataset, model=name, features_key=features_key, ids_key=ids_key
    )
    print(f"store {home.path}")
    print(f"{dataset}/{name}: {count} rows imported into {folder.name}")


def explain(
    first: Annotated[str, typer.Argument(help="DATASET/MODEL@RES")],
    second: Annotated[
        str | None, typer.Argument(help="another set; without it the identity of the first is shown")
    ] = None,
    *,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """What two sets differ in, field by field; or what makes up the identity of one."""
    from featstore.store.layout import differences

    home = open_home(store)
    a = home.entry(first)
    if second is None:
        if json:
            show.emit_json(a.spec)
        else:
            print(f"{a.full_name}: fingerprint {a.spec['fingerprint']} is the digest of")
            print_facts(a.spec["identity"], "  ")
        return
    b = home.entry(second)
    found = differences(a.spec["identity"], b.spec["identity"])
    if json:
        show.emit_json([{"field": key, "first": left, "second": right} for key, left, right in found])
    elif not found:
        print(f"{a.full_name} and {b.full_name} have the same identity")
    else:
        show.table(
            "", ["field", a.full_name, b.full_name], [[key, str(left), str(right)] for key, left, right in found]
        )


COMMANDS = {"import": import_, "explain": explain}
