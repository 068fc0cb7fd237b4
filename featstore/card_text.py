"""A data card as tables: one list of sections, printed on a terminal or written as Markdown."""

from dataclasses import dataclass
from typing import Any

NO_GROUPS = "patients unknown: no leak of patients can be excluded"


@dataclass(frozen=True)
class Section:
    """One table of a card, with sentences below its title; columns in `right` hold numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    right: tuple[str, ...] = ()


def sections(card: dict[str, Any]) -> list[Section]:
    """The tables of a card, in the order of reading; those without content are left out."""
    made = [_overview(card), _counts(card), _binary(card)]
    made += [_other(name, told) for name, told in card["labels"].items() if told["kind"] != "binary"]
    made += [_other(name, told) for name, told in card["columns"].items() if told["kind"] != "binary"]
    made += [_files(card), *_sample(card), _failures(card)]
    return [section for section in made if section.rows or section.notes]


def markdown(card: dict[str, Any]) -> str:
    """The card as Markdown."""
    lines = [f"# Data card: {card['dataset']}", ""]
    for section in sections(card):
        lines += [f"## {_plain(section.title)}", ""]
        lines += [line for note in section.notes for line in (f"- {_plain(note)}",)]
        if section.notes:
            lines.append("")
        if section.rows:
            marks = ["---:" if name in section.right else "---" for name in section.columns]
            lines += [_row(section.columns), _row(marks), *(_row(row) for row in section.rows), ""]
    return "\n".join(lines).rstrip() + "\n"


def _row(cells: Any) -> str:
    return "| " + " | ".join(_plain(cell) for cell in cells) + " |"


def _plain(text: str) -> str:
    """Text that cannot leave its cell: labels are verbatim and may hold bars and line ends."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def _overview(card: dict[str, Any]) -> Section:
    rows = [
        ("manifest", card["manifest"]),
        ("adapter", card["adapter"]),
        ("split", card["split_origin"]),
        ("default task", card["default_task"] or "none"),
        ("tasks", ", ".join(card["tasks"]) or "none"),
    ]
    notes = tuple(card["notes"]) + (() if card["groups_known"] else (NO_GROUPS,))
    return Section("Overview", ("fact", "value"), tuple(rows), notes)


def _counts(card: dict[str, Any]) -> Section:
    """Samples, patients, studies and volumes by split; how many samples each has."""
    splits = list(card["splits"])
    columns = ("what", *splits, "all", "samples each: min", "median", "max")
    samples = card["splits"]
    rows: list[tuple[str, ...]] = [
        ("samples", *(str(samples[name]) for name in splits), str(sum(samples.values())), "", "", "")
    ]
    notes = []
    for what, told in (("patients", card["groups"]), ("studies", card["studies"]), ("volumes", card["volumes"])):
        if told is None:
            continue
        each = told["samples_each"]
        counts = (str(told["splits"].get(name, 0)) for name in splits)
        rows.append((what, *counts, str(told["count"]), str(each["min"]), f"{each['median']:g}", str(each["max"])))
        if told["samples_without"]:
            notes.append(f"{told['samples_without']} samples belong to none of the {what}")
        if sum(told["splits"].values()) > told["count"]:
            notes.append(f"{what}: some stand in more than one split; `probes leaks` tells which")
    if card["groups"] is None:
        rows.append(("patients", *("unknown" for _ in splits), "unknown", "", "", ""))
    if card["masks"]:
        masks = card["masks"]
        counts = (str(masks["splits"].get(name, 0)) for name in splits)
        rows.append(("with a mask", *counts, str(masks["samples"]), "", "", ""))
        if masks["classes"]:
            notes.append("mask classes: " + ", ".join(f"{i} {name}" for i, name in enumerate(masks["classes"])))
    return Section("Counts", columns, tuple(rows), tuple(notes), columns[1:])


def _binary(card: dict[str, Any]) -> Section:
    """Labels of 0 and 1: one row a label and split."""
    columns: tuple[str, ...] = ("label", "split", "positive", "negative", "uncertain", "blank", "prevalence", "of all")
    told = {name: item for part in ("labels", "columns") for name, item in card[part].items()}
    binary = {name: item for name, item in told.items() if item["kind"] == "binary"}
    rows: list[tuple[str, ...]] = []
    voted = any("positive_any" in row for item in binary.values() for row in item["splits"].values())
    for name, item in binary.items():
        for split, row in item["splits"].items():
            share = "" if row["prevalence"] is None else f"{row['prevalence']:.4f}"
            counts = (str(row[key]) for key in columns[2:6])
            cells = [name, split, *counts, share, f"{row['of_all']:.4f}"]
            rows.append((*cells, str(row.get("positive_any", ""))) if voted else tuple(cells))
    meaning = "prevalence: positives among positive and negative; of all: among all samples of the split"
    notes = [meaning] if rows else []
    if voted:
        notes.append("readers' votes by majority, a tie as negative; any: at least one reader says positive")
        columns = (*columns, "any")
    return Section("Labels", columns, tuple(rows), tuple(notes), columns[2:])


def _other(name: str, told: dict[str, Any]) -> Section:
    about = told.get("about", "")
    title = f"Column {name}" + (f" ({about})" if about not in ("", "asked for") and about != name.lower() else "")
    parts = told["splits"]
    splits = tuple(parts)
    if told["kind"] == "numeric":
        shares = next((tuple(part["quantiles"]) for part in parts.values() if part["quantiles"]), ())
        rows = [
            (split, str(part["values"]), str(part["blank"]), *(f"{value:g}" for value in part["quantiles"].values()))
            for split, part in parts.items()
        ]
        rows = [row + ("",) * (3 + len(shares) - len(row)) for row in rows]
        columns = ("split", "values", "blank", *shares)
        return Section(title, columns, tuple(rows), right=columns[1:])
    totals: dict[str, int] = {}
    for part in parts.values():
        for value, count in part["counts"].items():
            totals[value] = totals.get(value, 0) + count
    values = sorted(totals, key=lambda value: (-totals[value], value))
    rows = [(value, *(_count(part, value) for part in parts.values())) for value in values]
    if any(part.get("others") for part in parts.values()):
        rows.append(("(other values)", *(str(part.get("others", 0)) for part in parts.values())))
    if any(part["blank"] for part in parts.values()):
        rows.append(("(blank)", *(str(part["blank"]) for part in parts.values())))
    return Section(title, ("value", *splits), tuple(rows), right=splits)


def _count(part: dict[str, Any], value: str) -> str:
    """A count; blank where a value may be among the others of a split."""
    return str(part["counts"].get(value, "" if part.get("others") else 0))


def _files(card: dict[str, Any]) -> Section:
    files, twice = card["files"], card["duplicates"]
    known = f"{twice['samples']} samples in {twice['sets']} sets, of {twice['hashed']} with a known hash"
    rows = [
        ("files", str(files["files"])),
        ("bytes", str(files["bytes"])),
        ("missing at registration", str(files["missing"])),
        ("byte-identical", known if twice["hashed"] else "not known: no file was hashed (`featstore register --hash`)"),
    ]
    return Section("Files", ("fact", "value"), tuple(rows))


def _sample(card: dict[str, Any]) -> list[Section]:
    told = card["sample"]
    if told is None:
        return []
    rows = [
        (what, value, str(count))
        for what, key in (
            ("format", "kinds"),
            ("bits", "bits"),
            ("colour", "photometric"),
            ("compression", "compression"),
            ("pixels (height x width)", "sizes"),
            ("not readable", "unreadable"),
        )
        for value, count in told[key].items()
    ]
    notes = [f"headers of {told['images']} of {told['of']} images, drawn with seed {told['seed']}: a sample"]
    for side in ("height", "width"):
        if told[side]:
            spread = told[side]
            notes.append(f"{side}: {spread['min']} to {spread['max']} pixels, median {spread['median']:g}")
    return [Section("Images", ("what", "value", "images"), tuple(rows), tuple(notes), ("images",))]


def _failures(card: dict[str, Any]) -> Section:
    rows = [
        (name, reason, str(count))
        for name, told in card["failures"].items()
        for reason, count in told["reasons"].items()
    ]
    notes = [
        f"{name}: {told['failed']} images failed" + (f", {told['pending']} pending" if told["pending"] else "")
        for name, told in card["failures"].items()
    ]
    notes += [f"{name}: unreadable, and not counted; `featstore verify` tells why" for name in card["unreadable_sets"]]
    return Section("Extraction", ("set", "reason", "images"), tuple(rows), tuple(notes), ("images",))
