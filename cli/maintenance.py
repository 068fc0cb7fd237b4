"""`featstore verify, rm`: keeping a store whole and small."""

from typing import Annotated

import typer

from cli import show
from cli.extract import JsonOption, StoreOption
from cli.operations import open_home
from featstore.errors import CorruptError


def verify(
    name: Annotated[str | None, typer.Argument(help="DATASET/MODEL@RES; default: every set")] = None,
    *,
    deep: Annotated[
        bool, typer.Option("--deep", help="read every byte: chunk checksums, NaN rows, manifest digests")
    ] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="take back the commits of damaged blocks, so that extract redoes them")
    ] = False,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Check that every committed byte is what its commit says. Exit code 2 if anything is wrong."""
    from featstore.store.verify import repair_set, verify_set

    home = open_home(store)
    entries = [home.entry(name)] if name else home.entries()
    verdicts = []
    mended = 0
    for entry in entries:
        verdict = verify_set(home, entry, deep=deep)
        verdicts.append(verdict)
        if not json:
            state = "ok" if verdict.ok else f"{len(verdict.problems)} PROBLEMS"
            print(
                f"{entry.full_name}: {state} ({verdict.num_blocks} blocks, {show.size(verdict.num_bytes)} checked"
                f"{', deep' if deep else ''})"
            )
            for problem in verdict.problems:
                print(f"  {problem.place}: {problem.what}")
        if repair and not verdict.ok:
            mended += repair_set(entry, verdict)
    if json:
        show.emit_json(
            [
                {
                    "set": verdict.name,
                    "blocks": verdict.num_blocks,
                    "bytes": verdict.num_bytes,
                    "problems": [{"place": item.place, "what": item.what} for item in verdict.problems],
                }
                for verdict in verdicts
            ]
        )
    if mended:
        show.say(f"{mended} blocks taken back; run the same `featstore extract` again")
    bad = sum(not verdict.ok for verdict in verdicts)
    if bad and not mended:
        raise CorruptError(
            f"{bad} of {len(verdicts)} sets have problems; --repair makes the next extract redo damaged blocks"
        )


def rm(
    name: Annotated[str, typer.Argument(help="DATASET/MODEL@RES, or a data set without sets")],
    *,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
    store: StoreOption = None,
) -> None:
    """Remove one set of embeddings, or forget a data set. Images are never touched."""
    home = open_home(store)
    what = home.entry(name).full_name if "/" in name else name
    if not yes:
        typer.confirm(f"remove {what} from {home.path}?", abort=True)
    folder = home.remove(name) if "/" in name else home.remove_dataset(name)
    print(f"removed {folder}")


COMMANDS = {"verify": verify, "rm": rm}
