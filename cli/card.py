"""`featstore card`."""

from pathlib import Path
from typing import Annotated

import typer

from cli import show
from cli.extract import JsonOption, StoreOption


def card(
    name: Annotated[str, typer.Argument(help="a registered data set")],
    *,
    images: Annotated[int, typer.Option("--images", help="headers to read, of a seeded sample; 0 reads none")] = 200,
    seed: Annotated[int, typer.Option("--seed", help="which images the sample takes")] = 0,
    columns: Annotated[str, typer.Option("--columns", help="further columns to describe, comma-separated")] = "",
    output: Annotated[Path | None, typer.Option("--output", help="write the card here as Markdown")] = None,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Describe a data set for a reader: counts, patients, labels by split, views, files, masks, what is not known.

    Columns named as view, sex, age or device usually are come by themselves. A card holds counts and spreads, no ids:
    columns whose values tell samples or patients apart are left out, and refused with --columns.

    Examples: `featstore card chexpert`; `featstore card nih --output card.md` for a supplement;
    `featstore card mine --columns hospital,scanner --images 1000`.
    """
    from cli.operations import existing_home
    from featstore.card import make_card
    from featstore.card_text import markdown, sections

    home = existing_home(store)
    asked = [column.strip() for column in columns.split(",") if column.strip()]
    total = min(images, len(home.manifest(name)))
    with show.progress("headers", max(1, total)) as advance:
        made = make_card(home, name, images=images, seed=seed, columns=asked, advance=advance)
    if output is not None:
        output.write_text(markdown(made), encoding="utf-8")
    if json:
        show.emit_json(made)
        return
    if output is not None:
        print(f"wrote {output}")
        return
    print(f"data card of {name}")
    for section in sections(made):
        print(f"\n{section.title}")
        for note in section.notes:
            print(f"  {note}")
        if section.rows:
            show.table("", list(section.columns), [list(row) for row in section.rows], right=section.right)


COMMANDS = {"card": card}
