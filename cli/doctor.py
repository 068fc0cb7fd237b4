"""`featstore doctor`: can a store live here?"""

from typing import Annotated

import typer

from cli import show
from cli.extract import JsonOption


def doctor(
    place: Annotated[
        str | None,
        typer.Argument(
            metavar="[STORE]", help="a folder or s3://BUCKET/PREFIX; default: FEATSTORE_HOME, else the user cache"
        ),
    ] = None,
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only report; settle nothing")] = False,
    json: JsonOption = False,
) -> None:
    """Probe the place of a store and settle how commits are made safely there.

    Local disks and NFS need nothing. Where hard links are missing (some FUSE, SMB and container mounts) it finds
    another safe way and writes it into the store as mode.json, or allows one writer at a time, or refuses. Without
    fsync it says so: commits then survive kills, not power cuts. What it writes to find out is removed again.

    Examples: `featstore doctor /mnt/share/features`; `featstore doctor s3://bucket/features --dry-run`.
    """
    from featstore.doctor import diagnose, probes_of, settle
    from featstore.store.layout import store_path

    root = store_path(place)
    with show.progress("probing", len(probes_of(root)), "probes") as advance:
        found = diagnose(root, advance=advance)
    if not json:
        print(f"store {root}")
        rows = [[item.name, item.state, item.value, item.meaning] for item in found.findings]
        show.table("", ["probe", "state", "measured", "meaning"], rows)
        print(f"mode {found.mode}: {found.why}" if found.mode else f"no mode: {found.why}")
        if found.mode and not found.fsync:
            print("without fsync: commits survive kills, not power cuts")
    done = None if dry_run else settle(root, found) if found.mode or not json else None
    if json:
        show.emit_json({**found.as_dict(), "done": done})
        if not dry_run and found.mode is None:
            settle(root, found)
    else:
        print("dry run: nothing written" if done is None else done)


COMMANDS = {"doctor": doctor}
