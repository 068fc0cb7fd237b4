"""`featstore verify, gc, du, mv, rm`: keeping a store whole and small."""

from typing import TYPE_CHECKING, Annotated

import typer

from cli import show
from cli.extract import JsonOption, StoreOption
from cli.operations import existing_home
from featstore.errors import ConfigError, CorruptError, FeatstoreError

if TYPE_CHECKING:
    from featstore.store.catalog import Store
    from featstore.store.verify import Repair, Verdict


def verify(
    name: Annotated[str | None, typer.Argument(help="DATASET/MODEL@RES; default: every set and data set")] = None,
    *,
    deep: Annotated[
        bool, typer.Option("--deep", help="read every byte: chunk checksums, NaN and zero rows, manifests, all seals")
    ] = False,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair",
            help="take back the commits of damaged blocks, so that extract redoes them; write zarr.json anew",
        ),
    ] = False,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Check that every committed byte is what its commit says. Exit code 2 if anything is wrong and not mended.

    Without --deep sizes, index checksums and all small files are checked: seconds, for a look before a run. With it
    every byte is read: after a copy, a crash of the machine or a doubtful disk. What --repair cannot mend (the spec,
    the ledger, a mapping, a manifest) is listed with what to do.

    Examples: `featstore verify`; `featstore verify chexpert/dinov3-base@512 --deep --repair`.
    """
    home = existing_home(store)
    outcomes: list[tuple[Verdict, Repair | None]] = []
    for verdict in _verdicts(home, name, deep):
        mended = _mend(home, verdict) if repair and not verdict.ok else None
        outcomes.append((verdict, mended))
        if not json:
            _print_verdict(verdict, mended, deep)
    if json:
        show.emit_json(
            [
                {
                    "set": verdict.name,
                    "blocks": verdict.num_blocks,
                    "bytes": verdict.num_bytes,
                    "problems": [{"place": item.place, "what": item.what} for item in verdict.problems],
                    "notes": verdict.notes,
                    "blocks_taken_back": mended.num_blocks if mended else 0,
                    "files_written_again": mended.num_files if mended else 0,
                }
                for verdict, mended in outcomes
                if verdict.name != "data sets" or verdict.problems
            ]
        )
    if any(mended and mended.num_blocks for _, mended in outcomes):
        show.say("run the same `featstore extract` again to compute the blocks taken back")
    bad = sum(bool(mended.left if mended else verdict.problems) for verdict, mended in outcomes)
    if bad:
        hint = "what is left needs the step named with it" if repair else "--repair mends what can be computed again"
        raise CorruptError(f"{bad} of {len(outcomes)} places checked have problems; {hint}")


def _verdicts(home: "Store", name: str | None, deep: bool) -> "list[Verdict]":
    from featstore.store.verify import expected_bytes, set_folders, verify_set, verify_store

    entry = home.entry(name) if name else None
    total = sum(expected_bytes(folder) for folder in ([entry.folder] if entry else set_folders(home)))
    with show.megabytes("verify", total) as advance:
        if entry is not None:
            return [verify_set(home, entry, deep=deep, advance=advance)]
        return [*verify_store(home, deep=deep, advance=advance)]


def _mend(home: "Store", verdict: "Verdict") -> "Repair":
    """One set that cannot be written must not keep the others from being mended."""
    from featstore.store.locks import writer_lock
    from featstore.store.verify import Repair, repair_set

    try:
        with writer_lock(home.path):
            return repair_set(verdict)
    except FeatstoreError as error:
        show.say(f"{verdict.name}: not repaired: {error}")
        return Repair(0, 0, verdict.problems)


def _print_verdict(verdict: "Verdict", mended: "Repair | None", deep: bool) -> None:
    state = "ok" if verdict.ok else f"{len(verdict.problems)} PROBLEMS"
    if verdict.name == "data sets":
        print(f"data sets: {state} ({verdict.num_blocks} manifests{', deep' if deep else ''})")
    else:
        size = show.size(verdict.num_bytes)
        print(f"{verdict.name}: {state} ({verdict.num_blocks} blocks, {size}{' read' if deep else ''})")
    for problem in verdict.problems:
        print(f"  {problem.place}: {problem.what}")
    for note in verdict.notes:
        print(f"  also there: {note} (harmless; `featstore gc` lists what is old enough to go)")
    if mended and (mended.num_blocks or mended.num_files):
        print(f"  repaired: {mended.num_blocks} blocks taken back, {mended.num_files} files written again")


def gc(
    *,
    older_than: Annotated[
        str,
        typer.Option("--older-than", help="a writer that changed nothing for this long is dead: 90s, 10min, 1h, 2d"),
    ] = "1h",
    manifests: Annotated[
        bool,
        typer.Option("--manifests", help="also manifests that are not current and that no set and no record names"),
    ] = False,
    stale: Annotated[
        bool,
        typer.Option("--stale", help="also sets that hold nothing, and those of an older schema that were made anew"),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="remove it; without this, only list it")] = False,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """List what killed runs left behind, and with --yes remove it. Nothing committed and no living writer is touched.

    Examples: `featstore gc` lists; `featstore gc --yes` removes; `featstore gc --manifests --stale` looks further.
    """
    from featstore.store.gc import collect, parse_age, plan_gc

    home = existing_home(store)
    doomed = plan_gc(home, older_than=parse_age(older_than), manifests=manifests, stale=stale)
    if not json:
        for item in doomed:
            print(f"{item.place.relative_to(home.path)}  {show.size(item.num_bytes)}  {item.why}")
    total = sum(item.num_bytes for item in doomed)
    removed = 0
    if yes:
        with show.progress("gc", max(1, len(doomed)), "places") as advance:
            for item in doomed:
                removed += collect(home, item)
                advance(1)
    if json:
        places = [{"path": str(item.place), "bytes": item.num_bytes, "why": item.why} for item in doomed]
        show.emit_json({"found": places, "bytes": total, "removed": removed})
    elif yes:
        print(f"removed {removed} of {len(doomed)} places; {show.size(total)} were found")
    else:
        print(f"{len(doomed)} places, {show.size(total)}" + ("; --yes removes them" if doomed else ""))


def du(
    dataset: Annotated[str | None, typer.Argument(help="only this data set; default: the whole store")] = None,
    *,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """What takes the space: bytes, blocks on disk and files of every set, array, manifest and of the results.

    `on disk` is what the file system uses: less than the bytes where files are sparse or linked, more for many small
    ones. A file with several names counts once.

    Examples: `featstore du`; `featstore du chexpert --json`.
    """
    from featstore.store.usage import measure

    home = existing_home(store)
    rows = measure(home.path, dataset)
    if json:
        show.emit_json(
            [
                {"owner": row.owner, "part": row.part, "bytes": row.num_bytes, "disk": row.disk, "files": row.num_files}
                for row in rows
            ]
        )
        return
    print(f"store {home.path}")
    cells = [[row.owner, row.part, show.size(row.num_bytes), show.size(row.disk), str(row.num_files)] for row in rows]
    total = [sum(row.num_bytes for row in rows), sum(row.disk for row in rows), sum(row.num_files for row in rows)]
    cells.append(["total", "", show.size(total[0]), show.size(total[1]), str(total[2])])
    show.table("", ["of", "what", "bytes", "on disk", "files"], cells, right=("bytes", "on disk", "files"))


def mv(
    name: Annotated[str, typer.Argument(help="DATASET/MODEL@RES")],
    new: Annotated[str | None, typer.Argument(help="DATASET/NEW-MODEL: the set's new name")] = None,
    *,
    to: Annotated[str | None, typer.Option("--to", help="another store (a folder) to move the set to")] = None,
    store: StoreOption = None,
) -> None:
    """Rename the model part of a set, or move the set to another store. Records that name it stay valid.

    A set is identified by its fingerprint, which neither changes. To another store the set is copied (linked on one
    file system), read back, and only then removed here; a move that was stopped goes on when it is run again.

    Examples: `featstore mv chexpert/vit@224 chexpert/vit-ours`; `featstore mv chexpert/vit@224 --to /data/store2`.
    """
    from featstore.backbones.catalogue import check_new_name
    from featstore.store.moving import move_set, rename_set, set_bytes

    if (new is None) == (to is None):
        raise ConfigError("give either a new name (DATASET/NEW-MODEL) or --to STORE")
    home = existing_home(store)
    entry = home.entry(name)
    if new is not None:
        check_new_name(new.partition("/")[2], entry.spec)
        print(f"renamed to {rename_set(entry, new)}")
    elif to is not None:
        with show.megabytes("mv", set_bytes(entry)) as advance:
            folder = move_set(home, entry, to, advance=advance)
        print(f"moved to {folder}")


def rm(
    name: Annotated[str, typer.Argument(help="DATASET/MODEL@RES, or a data set without sets")],
    *,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
    store: StoreOption = None,
) -> None:
    """Remove one set of embeddings, or forget a data set. Images are never touched."""
    home = existing_home(store)
    what = home.entry(name).full_name if "/" in name else name
    if not yes:
        typer.confirm(f"remove {what} from {home.path}?", abort=True)
    folder = home.remove(name) if "/" in name else home.remove_dataset(name)
    print(f"removed {folder}")


COMMANDS = {"verify": verify, "gc": gc, "du": du, "mv": mv, "rm": rm}
