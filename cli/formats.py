"""`featstore archive, unarchive, compact, upgrade`: the same rows in another layout."""

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import show
from cli.extract import JsonOption, StoreOption
from cli.operations import open_home

if TYPE_CHECKING:
    from featstore.store.catalog import Entry


def archive(
    name: Annotated[str, typer.Argument(help="DATASET/MODEL@RES, a complete set")],
    *,
    codec: Annotated[
        str | None,
        typer.Option("--codec", help="zstd (any zarr reader opens it) or pcodec (smaller; zarr-python only)"),
    ] = None,
    level: Annotated[
        int | None, typer.Option("--level", help="effort: zstd 1-9, default 5; pcodec 1-12, default 8")
    ] = None,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Compress a set that is kept but seldom read; `unarchive` brings back the very same bytes.

    float16 shrinks to about 87 % (zstd) or 85 % (pcodec), bfloat16 to 68 % or 66 %, features after a ReLU further.
    Everything that reads works on, slower (a chunk is decoded for one row); `extract` refuses until `unarchive`. Each
    shard is decoded again and compared with its commit before the raw ones go. Stopped at any moment, the same command
    goes on, and `unarchive` gives up. The disk must hold both forms for a while; that is checked first.

    Examples: `featstore archive chexpert/dinov3-7b@512`; `featstore archive chexpert/dinov2-base@518 --codec pcodec`.
    """
    from featstore.store.archive import archive_set
    from featstore.store.locks import writer_lock

    home = open_home(store)
    entry = home.entry(name)
    with writer_lock(home.path) as lock, show.megabytes("archive", _raw_bytes(entry)) as advance:
        facts = archive_set(entry.folder, codec=codec, level=level, advance=lock.renewing(advance))
    if json:
        show.emit_json({"set": entry.full_name, **facts})
        return
    print(
        f"{entry.full_name}: {show.size(facts['raw_bytes'])} to {show.size(facts['bytes'])}, {facts['ratio']:.2f} "
        f"times smaller ({facts['codec']}, level {facts['level']}); `featstore unarchive {entry.name}` brings it back"
    )


def unarchive(
    name: Annotated[str, typer.Argument(help="DATASET/MODEL@RES, an archived set")],
    *,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Turn an archived set back into mapped shards, byte for byte as they were committed; fast reads and growth return.

    Also gives up an archiving that was stopped half way. Damage found on the way stops it, and nothing is removed.

    Example: `featstore unarchive chexpert/dinov3-7b@512`.
    """
    from featstore.store.archive import unarchive_set
    from featstore.store.locks import writer_lock

    home = open_home(store)
    entry = home.entry(name)
    with writer_lock(home.path) as lock, show.megabytes("unarchive", _raw_bytes(entry)) as advance:
        facts = unarchive_set(entry.folder, advance=lock.renewing(advance))
    if json:
        show.emit_json({"set": entry.full_name, **facts})
    elif facts["codec"] is None:
        print(f"{entry.full_name}: the unfinished archiving is given up; the raw shards were never touched")
    else:
        print(f"{entry.full_name}: {show.size(facts['raw_bytes'])} of raw shards are back, as they were committed")


def compact(
    name: Annotated[str | None, typer.Argument(help="DATASET/MODEL@RES; default: every set")] = None,
    *,
    arrays: Annotated[
        str | None,
        typer.Option(
            "--arrays", help="comma-separated, such as cls,mean_patch; default: those of one vector a row that gain"
        ),
    ] = None,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Copy arrays of small rows (cls, mean_patch) from many small shards into few large ones, for fast cold loads.

    Blocks of a large network hold few rows, so a full load opens thousands of files; the copy needs one for 128 MiB.
    Committed shards stay as they are, and the copy may be deleted at any time. It is made anew once the set has grown.

    Examples: `featstore compact`; `featstore compact chexpert/dinov3-7b@512 --arrays cls`.
    """
    from featstore.objects import as_object
    from featstore.store.compact import compact as compact_set
    from featstore.store.compact import compactable
    from featstore.store.locks import writer_lock

    home = open_home(store)
    wanted = [part.strip() for part in arrays.split(",") if part.strip()] if arrays else None
    rows: list[dict[str, Any]] = []
    for entry in [home.entry(name)] if name else home.entries():
        total = sum(array.row_bytes * stop for array, stop in compactable(entry.folder, wanted))
        with writer_lock(home.path) as lock, show.megabytes(f"compact {entry.name}", total) as advance:
            copies = compact_set(entry.folder, arrays=wanted, progress=lock.renewing(advance))
        rows.append({"set": entry.full_name, "arrays": [asdict(copy) for copy in copies]})
        if not json:
            made = ", ".join(
                f"{copy.array} {'copied' if copy.made else 'is current'} ({copy.stop} rows)" for copy in copies
            )
            none = "nothing gains by a copy" if as_object(home.path) is None else "no copies are made in a bucket"
            print(f"{entry.full_name}: {made or none}")
    if json:
        show.emit_json(rows)


def upgrade(
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be done and change nothing")] = False,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Bring a store that an older version of featstore wrote to the present schema. Nothing is recomputed or copied.

    Shards stay the same files (hard links carry them over); specs, ledgers, metadata and seals are written anew and
    checked. Fingerprints change, because the schema is part of them: `upgraded.json` in the store keeps old and new
    beside each other, so that old records can be traced. Stopped at any moment, the same command goes on; until it
    ends the store is open for reading only.

    Examples: `featstore upgrade --dry-run`; `featstore upgrade --store /data/features`.
    """
    from featstore.store.layout import store_path
    from featstore.store.locks import writer_lock
    from featstore.store.upgrade import upgrade_store

    root = store_path(store)
    plan = upgrade_store(root, dry_run=True)
    if not dry_run:
        with writer_lock(root) as lock, show.progress("upgrade", max(1, len(plan["sets"])), "sets") as advance:
            plan = upgrade_store(root, advance=lock.renewing(advance))
    if json:
        show.emit_json({**plan, "done": not dry_run})
        return
    print(f"store {plan['store']}")
    if plan["from"] == plan["to"]:
        print(f"schema {plan['to']} already; nothing to upgrade")
        return
    for item in plan["sets"]:
        print(
            f"{item['set']}: {item['old'][:8]} {'would become' if dry_run else 'is now'} {item['new'][:8]} "
            f"({item['files']} files, {show.size(item['bytes'])})"
        )
    print(
        f"schema {plan['from']} to {plan['to']}: {len(plan['sets'])} sets, {plan['manifests']} manifests"
        f"{'; run it without --dry-run to do it' if dry_run else ''}"
    )


def _raw_bytes(entry: "Entry") -> int:
    """Bytes of all rows of a set, checksums aside."""
    from featstore.store import ledger

    book = ledger.read_ledger(entry.folder)
    return sum(array.row_bytes for array in book.arrays.values()) * book.num_rows


COMMANDS: dict[str, Callable[..., None]] = {
    "archive": archive,
    "unarchive": unarchive,
    "compact": compact,
    "upgrade": upgrade,
}
