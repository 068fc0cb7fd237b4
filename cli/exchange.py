"""`featstore import, export, merge, diff, recheck, explain`: sets in, out, and beside each other."""

import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cli import show
from cli.extract import JsonOption, StoreOption
from cli.operations import ManifestOption, existing_home, open_home, print_facts
from featstore.errors import ConfigError, CorruptError, ManifestError

if TYPE_CHECKING:
    from featstore.store.catalog import Entry, Store
    from featstore.store.diff import SetDiff
    from featstore.store.merge import Merged

Failed = Literal["drop", "nan"]
Keep = Literal["target"]


def import_(
    file: Annotated[
        Path, typer.Argument(help=".npz, .npy, .parquet, .safetensors, .h5 or .hdf5 with features of shape (N, D)")
    ],
    *,
    dataset: Annotated[str, typer.Option("--dataset", help="data set; registered from the file if it is not yet")],
    name: Annotated[str, typer.Option("--name", help="model part of the set's name")],
    features_key: Annotated[
        str,
        typer.Option("--features-key", help="array of the features; in parquet a list column, or the head of numbered"),
    ] = "features",
    ids_key: Annotated[
        str | None, typer.Option("--ids-key", help="array of the ids; default: id, ids, path or paths")
    ] = None,
    ids: Annotated[
        Path | None,
        typer.Option("--ids", help="csv, tsv, txt or parquet with one id a row, for files that hold numbers only"),
    ] = None,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Bring in embeddings made elsewhere, as the array `cls` of a set of their own.

    Examples: `featstore import lab.npz --dataset cxr --name lab`; `featstore import f.npy --ids ids.csv --dataset cxr
    --name lab`; `featstore import t.parquet --features-key feature_ ...` for columns feature_0, feature_1, and so on.
    Rows find their samples by id; samples that the file lacks are marked failed. float16 and bfloat16 stay, other
    floats become float32. Nothing is ever unpickled. The same file again adds nothing.
    """
    from featstore.backbones.catalogue import check_import_name
    from featstore.store.importer import import_features
    from featstore.store.layout import store_path
    from featstore.store.locks import writer_lock

    check_import_name(name)
    root = store_path(store)
    with writer_lock(root):
        home, folder, count = import_features(
            root, file, dataset=dataset, model=name, features_key=features_key, ids_key=ids_key, ids_file=ids
        )
    if json:
        show.emit_json({"store": str(home.path), "set": f"{dataset}/{name}", "folder": str(folder), "rows": count})
        return
    print(f"store {home.path}")
    print(f"{dataset}/{name}: {count} rows imported into {folder.name}")


def export(
    name: Annotated[str, typer.Argument(help="DATASET/MODEL@RES")],
    file: Annotated[Path, typer.Argument(help="FILE.npy, .npz, .parquet, .safetensors or .faiss: the ending decides")],
    *,
    features: Annotated[
        str, typer.Option("--features", help="array names joined by +, such as cls or cls+mean_patch, or mean_all")
    ] = "cls+mean_patch",
    split: Annotated[str | None, typer.Option("--split", help="only this split: train, val or test")] = None,
    labels: Annotated[str, typer.Option("--labels", help="comma-separated label columns to write beside the ids")] = "",
    failed: Annotated[
        Failed, typer.Option("--failed", help="rows without embeddings: drop them, or keep them as nan")
    ] = "drop",
    deidentify: Annotated[
        bool, typer.Option("--deidentify", help="pseudonyms for ids, groups and studies; no paths; order by pseudonym")
    ] = False,
    salt: Annotated[
        Path | None,
        typer.Option("--salt", help="with --deidentify: file whose bytes make the pseudonyms, so that exports agree"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="replace files that exist")] = False,
    manifest: ManifestOption = None,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Write features to one file for other programs.

    Examples: `featstore export cxr/dinov3-base@512 train.npz --split train --labels Edema,Effusion`; `featstore export
    cxr/dinov3-base@512 cxr.faiss --features cls` (inner product of unit rows); `featstore export cxr/dinov3-base@512
    public.parquet --deidentify`. .npy, .safetensors and .faiss hold numbers only: ids, split and labels stand in the
    same order in FILE.rows.parquet. With --deidentify every id, group and study becomes a prefix of a keyed SHA-256;
    without --salt nobody knows the key, and two exports share no name. Label columns that may name people (long or many
    different numbers, many different texts, parts of the sample's own id, path, group or study) are then refused.
    """
    from featstore.store.export import ExportConfig, export_features, new_salt

    if re.match(r"[a-z0-9]+:/", str(file)):
        raise ConfigError(f"export writes to local disks, got {str(file)!r}; copy the file from there")
    if salt is not None and not deidentify:
        raise ConfigError("--salt makes pseudonyms, which only --deidentify asks for; add it or leave --salt out")
    key = None
    if deidentify:
        key = new_salt() if salt is None else salt.read_bytes()
    config = ExportConfig(
        features=features,
        split=split,
        labels=tuple(label.strip() for label in labels.split(",") if label.strip()),
        failed=failed,
        salt=key,
        force=force,
    )
    opened = open_home(store).set(name, manifest=manifest)
    with show.progress(f"export {opened.name}", len(opened), "rows") as advance:
        done = export_features(opened, file, config, advance=advance)
    if json:
        show.emit_json({**asdict(done), "files": [str(path) for path in done.files], "deidentified": deidentify})
        return
    left = f", {done.left_out} failed left out" if done.left_out else ""
    print(f"{opened.name}: {done.rows} rows of {done.dim} {done.dtype} to {', '.join(map(str, done.files))}{left}")
    if deidentify:
        how = "a random salt that is kept nowhere" if salt is None else f"the salt in {salt}, which is not written"
        print(f"  ids, groups and studies are pseudonyms by {how}; rows stand in the order of the pseudonyms")


def merge(
    source: Annotated[str, typer.Argument(help="the other store: a folder or s3://BUCKET/PREFIX")],
    names: Annotated[list[str] | None, typer.Argument(help="sets DATASET/MODEL@RES; default: all of them")] = None,
    *,
    keep: Annotated[
        Keep | None, typer.Option("--keep", help="where both have other numbers: leave those of the target")
    ] = None,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Bring what another machine extracted into this store.

    Example: two machines ran the same `featstore extract`, each into a store of its own, and each got as far as it did;
    then `featstore merge /mnt/other/store` brings what this store lacks, byte for byte what was written there. Blocks
    that both have are compared; nothing that is committed here ever changes. A merge that was killed goes on when run
    again.
    """
    from featstore.store.layout import store_path
    from featstore.store.locks import writer_lock
    from featstore.store.merge import merge as merge_sets
    from featstore.store.merge import num_blocks

    home, target = existing_home(source), store_path(store)
    with writer_lock(target), show.progress("merge", num_blocks(home, names or []), "blocks") as advance:
        results = merge_sets(home, target, names or [], keep=keep, advance=advance)
    if json:
        show.emit_json({"store": str(target), "sets": [asdict(result) for result in results]})
        return
    print(f"store {target}")
    for result in results:
        print(f"{result.name}: {_merged(result)}")
        for conflict in result.conflicts:
            print(f"  kept: {conflict}")


def _merged(result: "Merged") -> str:
    counts = [
        f"{result.copied} blocks ({result.rows} rows) came",
        f"{result.equal} were here",
        f"{result.within_parity} were here within rounding" if result.within_parity else "",
        f"{result.failed_here_only} rows failed here and not there (extract --retry-failed)"
        if result.failed_here_only
        else "",
        f"{result.left} rows fill no block here and are left for extract" if result.left else "",
    ]
    return ", ".join(text for text in counts if text)


def diff(
    first: Annotated[str, typer.Argument(help="DATASET/MODEL@RES")],
    second: Annotated[str | None, typer.Argument(help="another set of this store")] = None,
    *,
    other: Annotated[
        str | None, typer.Option("--other", help="store in which the second set is; default for it: the same name")
    ] = None,
    manifest: ManifestOption = None,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Are two sets the same numbers? Samples are matched by id, also across manifests.

    Examples: `featstore diff cxr/tiny@98-1a2b cxr/tiny@98-3c4d`; `featstore diff cxr/tiny@98 --other /mnt/other/store`.
    Exit code 0: equal, or within the tolerance that other hardware may cause (relative to each row's norm: 0.5 % for
    sets computed in float32, 5 % in bfloat16, 2 % in float16). 1: different, also where samples or arrays are on one
    side only. 2: they could not be compared.
    """
    from featstore.store.diff import diff_sets

    if second is None and other is None:
        raise ConfigError("diff needs a second set, or --other STORE with the same set in another store")
    a = open_home(store).set(first, manifest=manifest)
    b = (open_home(other) if other is not None else open_home(store)).set(second or first, manifest=manifest)
    with show.progress("diff", len(a) * len(a.arrays), "rows") as advance:
        found = diff_sets(a, b, advance=advance)
    if json:
        show.emit_json(asdict(found))
    else:
        _print_diff(found)
    if found.verdict == "different":
        sys.exit(1)


def _print_diff(found: "SetDiff") -> None:
    print(f"{found.first} and {found.second}: {found.verdict}")
    print(f"  {found.common} samples in both")
    sides = ((found.num_only_first, found.only_first, "first"), (found.num_only_second, found.only_second, "second"))
    for count, examples, side in sides:
        if count:
            print(f"  {count} samples only in the {side}, such as {', '.join(examples)}")
    if found.failed_in_one:
        print(f"  {found.failed_in_one} samples failed in one only")
    if found.pending_in_one:
        print(f"  {found.pending_in_one} samples are extracted in one only")
    rows = [
        [
            array.name,
            array.problem or array.verdict,
            f"{array.identical}/{array.rows}",
            *(f"{value:.3g}" for value in (array.max_relative, array.mean_relative, array.tolerance)),
            f"{array.min_cosine:.6f}",
            array.worst or "",
        ]
        for array in found.arrays
    ]
    columns = ["array", "verdict", "identical", "max relative", "mean", "allowed", "min cosine", "worst"]
    show.table("", columns, rows, right=("identical", "max relative", "mean", "allowed", "min cosine"))


def recheck(
    name: Annotated[str, typer.Argument(help="DATASET/MODEL@RES")],
    *,
    rows: Annotated[int, typer.Option("--rows", help="committed rows to compute again")] = 16,
    seed: Annotated[int, typer.Option("--seed", help="which rows are drawn")] = 0,
    weights: Annotated[
        Path | None,
        typer.Option(
            "--weights",
            help="where the set's weights are, if not where they were; of a set made by a function: module:function",
        ),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:1")] = "auto",
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="images per forward pass")] = None,
    manifest: ManifestOption = None,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Compute a sample of a set again, from the images, and compare it with what is stored.

    Example: `featstore recheck cxr/dinov3-base@512 --rows 64` after new drivers, a new machine or a copied store. Code
    that a store names runs only if you name it too: `featstore recheck cxr/mine@512 --weights my_nets:large`.
    Exit code 2 if a row is further off than other hardware may cause, or an image file is not what was embedded.
    """
    from featstore import files
    from featstore.configs import RunConfig
    from featstore.extraction.recheck import function_of
    from featstore.extraction.recheck import recheck as check
    from featstore.objects import as_object

    home = open_home(store)
    opened = home.set(name, manifest=manifest)
    if weights is not None and str(weights) == function_of(opened.spec):
        sys.path.append(str(Path.cwd()))  # so that `module:function` finds a module beside the user
    cache = (home.path if as_object(home.path) is None else files.user_cache()) / "cache" / "weights.json"
    run = RunConfig(device=device, batch_size=batch_size)
    with show.progress("recheck", rows) as advance:
        found = check(opened, run, rows=rows, seed=seed, weights=weights, digest_cache=cache, advance=advance)
    facts: dict[str, Any] = {**asdict(found), "ok": found.ok}
    if json:
        show.emit_json(facts)
    else:
        print(f"{found.name}: {found.sampled} rows computed again on {found.device}, seed {seed}")
        for array in found.arrays:
            verdict = "ok" if array.ok else "TOO FAR"
            worst = f", worst {array.worst}" if array.worst else ""
            print(
                f"  {array.name}: {verdict}, largest relative difference {array.max_relative:.3g} of "
                f"{array.tolerance:.3g} allowed over {array.rows} rows{worst}"
            )
        for sample, what in found.changed.items():
            print(f"  {sample}: {what}")
    if not all(array.ok for array in found.arrays):
        raise CorruptError(
            f"{found.name}: stored rows are not what this machine computes; `featstore verify --deep` tells whether "
            "they are damaged, `featstore info` by which versions they were made"
        )
    if found.changed:
        raise ManifestError(
            f"{found.name}: {len(found.changed)} of {found.sampled} files are not what was embedded; run `featstore "
            "register` again, then extract computes what changed"
        )


def explain(
    first: Annotated[str, typer.Argument(help="DATASET/MODEL@RES")],
    second: Annotated[
        str | None, typer.Argument(help="another set; without it the identity of the first is shown")
    ] = None,
    *,
    tensors: Annotated[
        bool, typer.Option("--tensors", help="read weights that differ, and say whether their tensors are equal")
    ] = False,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """What two sets differ in, field by field; or what makes up the identity of one.

    The hub, Meta and timm publish one network in different files. With --tensors both are read, every byte of them, and
    the answer is remembered.
    """
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
    other = any(key == "weights" for key, _, _ in found)
    without = _without_files(a, b)
    equal = _equal_tensors(home, a, b, compute=tensors) if other and without is None else None
    if json:
        rows: list[dict[str, Any]] = [{"field": key, "first": left, "second": right} for key, left, right in found]
        show.emit_json([{**row, "equal_tensors": equal} if row["field"] == "weights" else row for row in rows])
    elif not found:
        print(f"{a.full_name} and {b.full_name} have the same identity")
    else:
        show.table(
            "", ["field", a.full_name, b.full_name], [[key, str(left), str(right)] for key, left, right in found]
        )
        if other:
            print(f"weights: {without or SAID_OF_TENSORS[equal]}")


NO_FILES = {"imported": "imported features", "random": "random weights", "function": "your own function"}


def _without_files(*entries: "Entry") -> str | None:
    """Why there are no tensors to compare, where a set's numbers come from something else than files of weights."""
    lines = [
        f"{entry.full_name} is of {NO_FILES[kind]}"
        for entry in entries
        if (kind := entry.spec["weights"]["kind"]) in NO_FILES
    ]
    return f"no files to compare: {' and '.join(lines)}" if lines else None


SAID_OF_TENSORS = {
    True: "other files, equal tensors",
    False: "other files, other tensors",
    None: "other files; whether their tensors are equal is not known, --tensors reads them",
}


def _equal_tensors(home: "Store", a: "Entry", b: "Entry", *, compute: bool) -> bool | None:
    """Whether two sets' weights are the same numbers in other files; None where nobody has looked."""
    from featstore import files
    from featstore.backbones.equal_tensors import same_tensors, tensors_digest
    from featstore.objects import as_object

    folder = (home.path if as_object(home.path) is None else files.user_cache()) / "cache"
    if any("architecture" not in entry.spec["identity"] for entry in (a, b)):
        return None  # imported features
    if compute:
        from featstore.extraction.recheck import find_backbone

        for entry in (a, b):
            if entry.spec["weights"]["kind"] not in ("hub", "local", "embedded"):
                return None  # no files
            tensors_digest(find_backbone(entry.spec, None, folder / "weights.json"), folder / "tensors.json")
    return same_tensors(a.spec["identity"], b.spec["identity"], folder / "tensors.json")


COMMANDS = {
    "import": import_,
    "export": export,
    "merge": merge,
    "diff": diff,
    "recheck": recheck,
    "explain": explain,
}
