"""`featstore search`."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from cli import show
from cli.extract import JsonOption, StoreOption
from cli.operations import ManifestOption

LABELS = 8  # columns of the table; JSON has all


def search(
    name: Annotated[str, typer.Argument(help="DATASET/MODEL@RES")],
    image: Annotated[str, typer.Argument(help="an image file, or the id of a sample of the data set")],
    *,
    k: Annotated[int, typer.Option("--k", help="neighbours to show")] = 10,
    where: Annotated[str, typer.Option("--where", help="search rows by column: 'split=train,view=AP|PA', quoted")] = "",
    features: Annotated[str, typer.Option("--features", help="cls, mean_patch, or both joined by +")] = "cls",
    index: Annotated[
        Literal["exact", "ivf", "hnsw"],
        typer.Option("--index", help="exact, or an approximate index that is kept in the store's cache"),
    ] = "exact",
    groups: Annotated[bool, typer.Option("--groups", help="show the group (patient) of each neighbour")] = False,
    weights: Annotated[
        Path | None,
        typer.Option(
            "--weights",
            help="where the set's weights are, if not where they were; of a set made by a function: module:function",
        ),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:1; for the backbone")] = "auto",
    manifest: ManifestOption = None,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """The images of a set most similar to one image, by the cosine of their embeddings.

    An image file goes through the set's own backbone and preprocessing; an id takes the row that is stored, and is not
    among its own neighbours. Approximate indexes are for millions of rows; their recall is measured and printed.

    Examples: `featstore search chexpert/dinov3-base@512 new.png --k 20`; `featstore search cxr/tiny@98
    images/00001.png --where split=train`.
    """
    from cli.operations import open_home
    from probes import retrieval

    home = open_home(store)
    opened = home.set(name, manifest=manifest)
    parts = opened.parts(features)
    row = retrieval.query_row(opened, image)
    if row is not None:
        query = retrieval.stored_vector(opened, row, parts)
    else:
        query = _embedded(home, opened, Path(image), parts, weights, device)
    answer = retrieval.search(home, opened, query, features, k=k, where=where, index=index, without=row)
    if json:
        hits = [{key: value for key, value in asdict(hit).items() if groups or key != "group"} for hit in answer.hits]
        show.emit_json({"set": opened.name, "features": features, "query": image, **asdict(answer), "hits": hits})
        return
    print(f"store {home.path}")
    _print(opened, image, features, answer, groups)


def _embedded(home: Any, opened: Any, image: Path, parts: list[str], weights: Path | None, device: str) -> Any:
    """The image through the backbone of the set."""
    from featstore import files
    from featstore.configs import RunConfig
    from featstore.extraction.recheck import function_of
    from featstore.extraction.single import embed_image
    from featstore.objects import as_object

    if weights is not None and str(weights) == function_of(opened.spec):
        sys.path.append(str(Path.cwd()))  # so that `module:function` finds a module beside the user
    cache = (home.path if as_object(home.path) is None else files.user_cache()) / "cache" / "weights.json"
    return embed_image(opened, image, parts, RunConfig(device=device), weights=weights, digest_cache=cache)


def _print(opened: Any, image: str, features: str, answer: Any, groups: bool) -> None:
    random = " RANDOM WEIGHTS" if opened.random else ""
    how = (
        answer.index
        if answer.recall is None
        else (
            f"{answer.index}{', from the cache' if answer.cached else ''}; APPROXIMATE, recall {answer.recall:.3f} "
            "on seeded rows of the set"
        )
    )
    print(f"{image}: nearest of {answer.searched} samples of {opened.name}{random} by {features}; search {how}")
    labels = list(answer.hits[0].labels)[:LABELS] if answer.hits else []
    columns = ["rank", "similarity", "id", *(["group"] if groups else []), "split", *labels]
    rows = [
        [
            str(hit.rank),
            f"{hit.similarity:.4f}",
            hit.id,
            *([hit.group or ""] if groups else []),
            hit.split,
            *("" if hit.labels[name] is None else str(hit.labels[name]) for name in labels),
        ]
        for hit in answer.hits
    ]
    show.table("", columns, rows, right=("rank", "similarity"))


COMMANDS = {"search": search}
