"""`probes leaks`."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from cli import show
from cli.extract import JsonOption, StoreOption

if TYPE_CHECKING:
    from probes.leaks import Against, Identical, Leaks
    from probes.similar import Similar

SHOWN = 20  # rows of a table; JSON has all
FOUND = 3  # exit code of --fail


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    with show.progress("comparing", max(1, total), unit="thousand pairs") as advance:
        yield advance


def leaks(
    *,
    dataset: Annotated[str, typer.Option("--dataset", help="data set to look into")],
    task: Annotated[str | None, typer.Option("--task", help="also judge by this task's roles, not the splits")] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="MODEL@RES of the embeddings to compare; default: trained weights, most pixels"),
    ] = None,
    against: Annotated[str, typer.Option("--against", help="other data sets, comma-separated")] = "",
    features: Annotated[str, typer.Option("--features", help="cls, mean_patch, or both joined by +")] = "cls",
    threshold: Annotated[
        float | None,
        typer.Option("--threshold", help="cosine similarity from which a pair is a near-duplicate; default: 0.99"),
    ] = None,
    top: Annotated[
        int | None, typer.Option("--top", help="list so many most similar pairs, and judge none by a threshold")
    ] = None,
    fail: Annotated[bool, typer.Option("--fail", help="exit with 3 if anything leaks, for automatic checks")] = False,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Find patients, studies, volumes and images that stand in two splits, or in two data sets.

    Equal images are told by the hashes of their files, which `register --hash` or any extraction takes. Near-duplicates
    (another format, another size) are told by stored embeddings, exactly: test against training and validation images,
    validation against training images. What a similarity means depends on the backbone, so the spread across splits is
    shown beside the spread within one patient. Mirrored images are not found.

    Examples: `probes leaks --dataset chexpert`; `probes leaks --dataset rsna --against nih --model dinov3-base@512`;
    `probes leaks --dataset mine --top 50`, then look at the pairs; `probes leaks --dataset mine --fail` in a script.
    """
    from cli.operations import existing_home
    from probes.leaks import find_leaks
    from probes.similar import Question

    home = existing_home(store)
    found = find_leaks(
        home,
        dataset,
        task=task,
        model=model,
        against=[name.strip() for name in against.split(",") if name.strip()],
        question=Question(features=features, threshold=threshold, top=top),
        progress=_progress,
    )
    if json:
        show.emit_json(found.as_dict())
    else:
        print(f"store {home.path}")
        _print(found)
    if fail and found.count:
        sys.exit(FOUND)


def _print(found: "Leaks") -> None:
    splits = ", ".join(f"{name} {count}" for name, count in found.splits.items())
    by = f"roles of task {found.task}" if found.task else "splits of the manifest"
    print(f"{found.dataset} {found.manifest[:8]}, {by}: {splits}; patients {found.groups}")
    for note in found.notes:
        print(f"note: {note}")
    if found.crossings:
        show.table(
            "in more than one split",
            ["what", "by", "count", "samples", "such as"],
            [
                [item.what, item.by, str(item.count), str(item.samples), ", ".join(item.examples[:3])]
                for item in found.crossings
            ],
            right=("count", "samples"),
        )
    else:
        print(f"no {'patient, ' if found.groups == 'known' else ''}study or volume stands in more than one split")
    _print_identical(found.identical, "splits")
    repeats = ", ".join(f"{name} {count}" for name, count in found.identical.within.items())
    if repeats:
        print(f"repeats within one split (no leak): {repeats}")
    if found.similar is not None:
        _print_similar(found.similar, "split")
    for other in found.against:
        _print_against(other)
    print(f"leaks: {found.count}")


def _print_identical(identical: "Identical", what: str) -> None:
    missing = identical.samples - identical.hashed
    print(
        f"byte-identical images across {what}: {len(identical.across)} sets of {identical.images} images"
        + (f"; {missing} of {identical.samples} have no hash yet (`featstore register --hash`)" if missing else "")
    )
    if identical.across:
        cells = [["  ".join(f"{sample} ({where})" for sample, where in same)] for same in identical.across[:SHOWN]]
        show.table("", ["equal images"], cells)
        _print_rest(len(identical.across))


def _print_similar(similar: "Similar", what: str) -> None:
    weights = ", RANDOM WEIGHTS" if similar.random_weights else ""
    print(
        f"near-duplicates by {similar.features} of {similar.set}{weights}: {similar.compared} images compared", end=""
    )
    print(f", {similar.without_features} without features" if similar.without_features else "")
    if similar.threshold is not None:
        largest = "" if similar.largest is None else f"; largest {similar.largest:.4f}"
        between = what == "data set"
        apart = f" ({similar.one_group} of them of one patient)" if between else f", {similar.one_group} more of one"
        print(
            f"pairs at or above {similar.threshold:g}: {similar.count}{apart}{'' if between else ' patient'}{largest}"
        )
    spreads = [("nearest image on the other side", similar.across), ("nearest of the same patient", similar.within)]
    rows = [[name, *(f"{value:.4f}" for value in spread.values())] for name, spread in spreads if spread is not None]
    if rows:
        names = list(next(spread for _, spread in spreads if spread is not None))
        show.table("", ["cosine similarity", *names], rows, right=tuple(names))
    if similar.pairs:
        columns = ["image", what, "image", what, "similarity", "patients", "bytes"]
        cells = [
            [
                pair.ids[0],
                pair.splits[0],
                pair.ids[1],
                pair.splits[1],
                f"{pair.similarity:.4f}",
                pair.groups,
                "equal" if pair.identical else "",
            ]
            for pair in similar.pairs[:SHOWN]
        ]
        show.table("", columns, cells, right=("similarity",))
        _print_rest(len(similar.pairs))


def _print_against(other: "Against") -> None:
    print(f"\nagainst {other.dataset} {other.manifest[:8]}")
    for note in other.notes:
        print(f"note: {note}")
    if other.patients is not None:
        print(f"patients in both: {other.patients}, with {other.patient_images} images")
    _print_identical(other.identical, "data sets")
    if other.similar is not None:
        _print_similar(other.similar, "data set")


def _print_rest(count: int) -> None:
    if count > SHOWN:
        print(f"... and {count - SHOWN} more, all with --json")


COMMANDS = {"leaks": leaks}
