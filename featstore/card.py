"""The data card of a registered data set: counts, labels, files and what is not known, fit for a paper's supplement.

Only counts and spreads are told; no id of a patient, study or image stands in a card, and no column whose values tell
samples or patients apart. What is told of files comes from a seeded sample and is called so.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from featstore.datasets.contents import MISSING
from featstore.datasets.manifest import Manifest
from featstore.errors import ConfigError, DecodeError, IncompleteError, StoreError, UnknownNameError
from featstore.store.catalog import Entry, Store
from featstore.store.hashes import equal_rows, file_hashes
from featstore.store.layout import read_spec

if TYPE_CHECKING:
    import pyarrow as pa

SPLITS = ("train", "val", "test", "")
MAX_VALUES = 20  # of a categorical column; the rest is counted together
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
# Of the manifest's own columns; `_PLACED` only where they say where a sample lies, for a table may call a column so.
_NAMING = ("id", "path", "group", "study", "mask_path", "content", "hash")
_PLACED = ("part", "mask_part", "volume")
_UNITS = ("group", "study", "volume", "id")  # what a value may tell apart, the widest first
_LONG_NUMBER = 6  # digits from which whole numbers are taken for names: dates, record and accession numbers
# What releases call the columns that readers ask for first, without case and punctuation.
USUAL = {
    "view": (
        "view", "viewposition", "frontallateral", "appa", "projection", "viewpositiondicom", "laterality", "plane",
        "performedprocedurestepdescription", "axis",
    ),
    "sex": ("sex", "gender", "patientgender", "patientsex", "patientsexdicom", "patientssex"),
    "age": ("age", "patientage", "ageatstudy", "patientsage", "ageyears", "anchorage"),
    "device": (
        "manufacturer", "scanner", "scannermodel", "modelname", "manufacturermodelname", "modality", "modalitydicom",
        "center", "centre", "hospital", "vendor", "field", "magneticfieldstrength", "patientorientation",
    ),
}  # fmt: skip
_AGE = re.compile(r"0*([0-9]+(?:\.[0-9]+)?)([YyMmWwDd]?)")
_YEARS = {"": 1.0, "Y": 1.0, "M": 1 / 12, "W": 7 / 365.25, "D": 1 / 365.25}
_VOTES = ("1", "0", "-1", "")

Count = dict[tuple[str, str | None], int]  # (split, text of the value) -> rows


def make_card(
    store: Store,
    name: str,
    *,
    images: int = 200,
    seed: int = 0,
    columns: Sequence[str] = (),
    advance: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Everything a card says, ready for JSON; the same for one manifest, store and seed.

    `images` headers are read of a seeded sample, none at 0; `columns` are described besides the usual ones. `advance`
    is told of every image looked at.

    Raises:
        UnknownNameError: no such data set or column.
        ConfigError: a negative number of images, or a column of `columns` that identifies samples or patients. A label
            or usual column that does is left out, and a note says so.
    """
    if images < 0:
        raise ConfigError(f"--images is a number of images to look at, 0 or more; got {images}")
    manifest = store.manifest(name)
    missing = [column for column in columns if column not in manifest.table.column_names]
    if missing:
        known = ", ".join(manifest.table.column_names)
        raise UnknownNameError(f"--columns {missing[0]}: data set {name!r} has no such column; its columns: {known}")
    labels = [column for column in manifest.meta.get("label_columns", ()) if column in manifest.table.column_names]
    found = usual_columns([column for column in manifest.table.column_names if column not in labels])
    found = {**dict.fromkeys(columns, "asked for"), **found}
    for column in columns:
        _check_column(manifest, column)
    hidden = [column for column in (*labels, *found) if identifies(manifest, column, age=found.get(column) == "age")]
    for column in hidden:
        if column in columns:
            raise ConfigError(
                f"--columns {column}: its values tell samples or groups apart, and a card holds no ids; choose columns "
                "whose values many samples share"
            )
    failures, unreadable = _failures(store, manifest)
    sizes = manifest.table.column("size").to_numpy()
    return {
        "dataset": manifest.name,
        "manifest": manifest.digest,
        "adapter": manifest.meta.get("adapter", ""),
        "split_origin": manifest.meta.get("split_origin", ""),
        "default_task": manifest.meta.get("default_task", ""),
        "tasks": list(manifest.meta.get("tasks", ())),
        "notes": [
            *manifest.meta.get("notes", ()),
            *(f"column {column} is left out: its values tell samples or groups apart" for column in hidden),
        ],
        "groups_known": bool(manifest.meta.get("groups_known")),
        "splits": _splits(manifest),
        "groups": _members(manifest, manifest.column("group")) if manifest.meta.get("groups_known") else None,
        "studies": _members(manifest, manifest.column("study")),
        "volumes": _members(manifest, manifest.place("volume")),
        "labels": {column: describe(manifest.table, column) for column in labels if column not in hidden},
        "columns": {
            column: {"about": about, **describe(manifest.table, column, age=about == "age")}
            for column, about in found.items()
            if column not in hidden
        },
        "files": {
            "files": len(set(manifest.column("path"))),
            "bytes": _bytes(manifest),
            "missing": int((sizes == MISSING).sum()),
        },
        "masks": _masks(manifest),
        "duplicates": _duplicates(store, manifest),
        "failures": failures,
        "unreadable_sets": unreadable,
        "sample": _sample(manifest, images, seed, advance),
    }


def usual_columns(names: Iterable[str]) -> dict[str, str]:
    """Column -> what it tells (view, sex, age, device), for those whose name is a usual one."""
    found = {}
    for name in names:
        plain = re.sub(r"[^a-z0-9]", "", name.lower()).removeprefix("source")
        for about, known in USUAL.items():
            if plain in known:
                found[name] = about
    return found


def _splits(manifest: Manifest) -> dict[str, int]:
    counts = Counter(value or "" for value in manifest.column("split"))
    return {name or "none": counts[name] for name in SPLITS if counts[name]}


def _members(manifest: Manifest, values: list[str | None]) -> dict[str, Any] | None:
    """How many groups, studies or volumes there are in each split, and how many samples each has; None without any."""
    held = Counter(value for value in values if value)
    if not held:
        return None
    pairs = {(split or "", value) for split, value in zip(manifest.column("split"), values) if value}
    splits = Counter(split for split, _ in pairs)
    sizes = list(held.values())
    return {
        "count": len(held),
        "samples_without": sum(not value for value in values),
        "splits": {name or "none": splits[name] for name in SPLITS if splits[name]},
        "samples_each": {"min": min(sizes), "median": float(np.median(sizes)), "max": max(sizes)},
    }


# ---- columns that are ids


def _check_column(manifest: Manifest, column: str) -> None:
    placed = column in _PLACED and column in manifest.meta.get("places", ())
    if column in _NAMING or placed:
        raise ConfigError(
            f"--columns {column}: this column names samples, patients or files, and a card holds no ids; choose others"
        )


def identifies(manifest: Manifest, column: str, *, age: bool = False) -> bool:
    """Whether the values of a column are ids, or tell samples or groups apart as ids do.

    Text does where most values stand in one group each (in one study, volume or sample where groups are unknown).
    Numbers do where most equal the id of their row, and as text does from six digits on; votes and 0, 1, -1 never do.
    """
    texts = {text for _, text in _count(manifest.table, column) if text is not None}
    if len(texts) < 2 or all(_is_binary(text) for text in texts):
        return False
    numbers = [_number(text, age) for text in texts]
    units = [name for name in _UNITS if name != "volume" or name in manifest.meta.get("places", ())]
    if None not in numbers and (age or 2 * sum(map(_is_name, texts)) <= len(texts)):
        return any(_equal_ids(_pairs(manifest, column, unit)) for unit in units)
    unit = next(name for name in units if name == "id" or any(manifest.column(name)))
    rows: Counter[str] = Counter()
    owners: dict[str, set[str]] = {}
    for (text, owner), count in _pairs(manifest, column, unit).items():
        rows[text] += count
        owners.setdefault(text, set()).add(owner)
    alone = [text for text, held in owners.items() if len(held) == 1]
    mostly = 2 * sum(rows[text] for text in alone) >= rows.total()
    # Ids beside a word that stands for "unknown" in most rows are ids nevertheless.
    nearly_all = len(owners) >= 10 and 10 * len(alone) >= 9 * len(owners)
    return 2 * len(alone) > len(owners) and (mostly or nearly_all)


def _is_name(text: str) -> bool:
    """A whole number that is no amount: 100345, 100345.0, 0012."""
    if re.fullmatch("0[0-9]+", text):
        return True
    value = _number(text, age=False)
    return value is not None and value == int(value) and abs(value) >= 10 ** (_LONG_NUMBER - 1)


def _pairs(manifest: Manifest, column: str, unit: str) -> dict[tuple[str, str], int]:
    """(value, id of the unit) -> rows; rows without a value are left out, those without a unit count by themselves."""
    found: Counter[tuple[str, str]] = Counter()
    owners, ids = manifest.column(unit), manifest.column("id")
    for value, owner, name in zip(manifest.column(column), owners, ids):
        text = "" if value is None else str(value).strip()
        if text:
            found[text, owner or f"\0{name}"] += 1
    return found


def _equal_ids(pairs: dict[tuple[str, str], int]) -> bool:
    """Most rows hold the number that their id ends with: 7 of p007, of 7.0 or of 0007."""
    equal = sum(count for (text, owner), count in pairs.items() if _number(text, age=False) == _last_number(owner))
    return 2 * equal > sum(pairs.values())


def _last_number(name: str) -> float:
    match = re.search(r"([0-9]+)(?:\.0)?$", name.rsplit("\0", 1)[-1])
    return float(match[1]) if match else math.nan


# ---- columns


def describe(table: "pa.Table", column: str, *, age: bool = False) -> dict[str, Any]:
    """One column by split: `kind` "binary" (0, 1, -1, votes of readers), "numeric" or "categorical".

    Votes (`1|0|1`) count by majority, a tie as 0, as `positive_any` where any reader says 1. Ages such as 045Y or 006M
    are years.
    """
    counts = _count(table, column)
    texts = {text for _, text in counts if text is not None}
    splits = [name for name in SPLITS if any(split == name for split, _ in counts)]
    if texts and not age and all(_is_binary(text) for text in texts):
        kind, tell = "binary", _binary
    elif texts and (numbers := {text: _number(text, age) for text in texts}) and None not in numbers.values():
        few = len(set(numbers.values())) <= MAX_VALUES and not age
        kind, tell = ("categorical", _categorical) if few else ("numeric", lambda part: _numeric(part, age))
    else:
        kind, tell = "categorical", _categorical
    parts = {name: {text: n for (split, text), n in counts.items() if split == name} for name in splits}
    return {"kind": kind, "splits": {name or "none": tell(part) for name, part in parts.items()}}


def _count(table: "pa.Table", column: str) -> Count:
    import pyarrow as pa

    # A column of the release may be called `split` only as `source_split`, so the two names never meet.
    names = ["split", column] if column != "split" else ["split"]
    grouped = table.select(names).group_by(names).aggregate([([], "count_all")])
    values = grouped.column(column)
    if not pa.types.is_string(values.type):
        values = pa.chunked_array(
            [[None if value is None else str(value) for value in values.to_pylist()]], pa.string()
        )
    counts: Count = {}
    rows = zip(grouped.column("split").to_pylist(), values.to_pylist(), grouped.column("count_all").to_pylist())
    for split, value, count in rows:
        text = value.strip() if value is not None else ""
        key = (split or "", text or None)
        counts[key] = counts.get(key, 0) + count
    return counts


def _is_binary(text: str) -> bool:
    return all(_vote(vote) is not None for vote in text.split("|"))


def _vote(text: str) -> str | None:
    """1, 0, -1 or blank as text, whether written 1, 1.0 or +1; None of anything else."""
    text = text.strip()
    try:
        plain = "" if not text else f"{float(text):g}"
    except ValueError:
        return None
    return plain if plain in _VOTES else None


def _binary(part: dict[str | None, int]) -> dict[str, Any]:
    found: Counter[str] = Counter(positive=0, negative=0, uncertain=0, blank=0)
    anyone, readers = 0, False
    for text, count in part.items():
        votes = Counter(_vote(vote) for vote in (text or "").split("|"))
        readers |= votes.total() > 1
        anyone += count * (votes["1"] > 0)
        if votes["1"] + votes["0"]:
            found["positive" if votes["1"] > votes["0"] else "negative"] += count
        else:
            found["uncertain" if votes["-1"] else "blank"] += count
    said = found["positive"] + found["negative"]
    prevalence = round(found["positive"] / said, 6) if said else None
    of_all = round(found["positive"] / found.total(), 6)
    return {**found, "prevalence": prevalence, "of_all": of_all, **({"positive_any": anyone} if readers else {})}


def _number(text: str, age: bool) -> float | None:
    match = _AGE.fullmatch(text) if age else None
    if match:
        return float(match[1]) * _YEARS[match[2].upper()]
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _numeric(part: dict[str | None, int], age: bool) -> dict[str, Any]:
    pairs = [(_number(text, age), count) for text, count in part.items() if text is not None]
    values = np.repeat([value for value, _ in pairs], [count for _, count in pairs]).astype(np.float64)
    spread = (
        {f"{100 * share:g}%": round(float(np.quantile(values, share)), 4) for share in SHARES} if len(values) else {}
    )
    return {"values": len(values), "blank": part.get(None, 0), "quantiles": spread}


def _categorical(part: dict[str | None, int]) -> dict[str, Any]:
    ranked = sorted(((text, n) for text, n in part.items() if text is not None), key=lambda item: (-item[1], item[0]))
    rest = ranked[MAX_VALUES:]
    return {
        "counts": dict(ranked[:MAX_VALUES]),
        "blank": part.get(None, 0),
        **({"others": sum(count for _, count in rest), "other_values": len(rest)} if rest else {}),
    }


# ---- files


def _bytes(manifest: Manifest) -> int:
    """Size of all files; the parts of one are counted once."""
    sizes = dict(zip(manifest.column("path"), manifest.column("size")))
    return sum(size for size in sizes.values() if size != MISSING)


def _masks(manifest: Manifest) -> dict[str, Any] | None:
    paths = manifest.column("mask_path")
    if not any(paths):
        return None
    counts = Counter(split or "" for split, path in zip(manifest.column("split"), paths) if path)
    return {
        "samples": sum(counts.values()),
        "splits": {name or "none": counts[name] for name in SPLITS if counts[name]},
        "classes": list(manifest.meta.get("mask_classes", ())),
    }


def _duplicates(store: Store, manifest: Manifest) -> dict[str, Any]:
    """Samples that are equal byte for byte, as far as registration or an extraction has hashed their files."""
    try:
        hashes = file_hashes(store, manifest)
    except StoreError:  # a damaged set: what registration has taken is still known
        hashes = [taken or stated for taken, stated in zip(manifest.hashes(), manifest.column("content"))]
    equal = equal_rows(hashes, manifest.place("part"))
    return {
        "hashed": sum(value is not None for value in hashes),
        "sets": len(equal),
        "samples": sum(map(len, equal)),
    }


def _failures(store: Store, manifest: Manifest) -> tuple[dict[str, Any], list[str]]:
    """(samples that could not be decoded, for each set that was made for this manifest; names of damaged sets)."""
    found: dict[str, Any] = {}
    unreadable = []
    for path in sorted((store.path / "sets" / manifest.name).glob("*/spec.json")):
        folder = path.parent
        if folder.name.startswith("."):
            continue
        try:
            entry = Entry(folder, read_spec(folder))
            features = store.open(entry)
            reasons, pending = Counter(features.failures.values()), int(features.pending().sum())
        except IncompleteError:  # made for another manifest
            continue
        except OSError:  # damaged, of another schema, or removed just now
            unreadable.append(f"{manifest.name}/{folder.name}")
            continue
        found[entry.full_name] = {
            "failed": sum(reasons.values()),
            "pending": pending,
            "reasons": dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0]))),
        }
    return found, unreadable


def _sample(manifest: Manifest, images: int, seed: int, advance: Callable[[int], None] | None) -> dict[str, Any] | None:
    """What the headers of a seeded sample of the images say, counted."""
    if images == 0 or not manifest.root.is_dir():
        return None
    # Deferred: counting needs none of the libraries that decode.
    from featstore.images.headers import Header, read_header
    from featstore.images.opening import OpenFiles
    from featstore.images.part import parse_part
    from featstore.inputs import Inputs

    present = np.flatnonzero(manifest.table.column("size").to_numpy() != MISSING)
    chosen = np.sort(np.random.default_rng(seed).permutation(present)[:images])
    inputs, opened = Inputs(manifest.root), OpenFiles()
    paths, parts = manifest.column("path"), manifest.place("part")
    headers: list[Header] = []
    failed: Counter[str] = Counter()
    for row in chosen.tolist():
        try:
            headers.append(read_header(inputs, paths[row], parse_part(parts[row]), opened))
        except DecodeError as error:
            failed[str(error)] += 1
        except OSError as error:
            failed[error.strerror or type(error).__name__] += 1
        if advance is not None:
            advance(1)
    opened.close()
    return {
        "of": len(present),
        "images": len(chosen),
        "seed": seed,
        "kinds": _ranked(header.kind for header in headers),
        "sizes": _ranked(f"{header.height}x{header.width}" for header in headers),
        "height": _spread([header.height for header in headers]),
        "width": _spread([header.width for header in headers]),
        "bits": _ranked(str(header.bits or "not stated") for header in headers),
        "photometric": _ranked(header.photometric for header in headers),
        "compression": _ranked(header.compression for header in headers if header.compression),
        "unreadable": _ranked(failed.elements()),
    }


def _ranked(texts: Iterable[str]) -> dict[str, int]:
    """Counts, the largest first; what comes after `MAX_VALUES` is counted together."""
    ranked = sorted(Counter(texts).items(), key=lambda item: (-item[1], item[0]))
    rest = sum(count for _, count in ranked[MAX_VALUES:])
    return dict(ranked[:MAX_VALUES]) | ({"others": rest} if rest else {})


def _spread(values: list[int]) -> dict[str, Any] | None:
    return {"min": min(values), "median": float(np.median(values)), "max": max(values)} if values else None
