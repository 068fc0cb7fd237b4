"""SARS-CoV-2 CT: slices of 210 patients in Covid/, Healthy/ and Others/; also the release of 2,482 slices.

Layout of the 210-patient release: Covid/<patient>/*.png (80 patients), Healthy/<patient>/*.png (50) and
Others/<patient>/*.png (80), 4,173 slices as RGBA PNG of varying size (the alpha channel is dropped). `root` is the
folder that holds the three.

The popular release of 2,482 slices has two folders, COVID/ and non-COVID/, and no patients: it is read too, its groups
are unknown, and its slices are split at random: neighbouring slices of one patient then stand on both sides.

Groups are patients (folder names repeat between classes, so the class is part of the group), `volume` is the patient,
`z` the place of a slice in the numeric order of the file names (2 before 10). Columns: `class` (covid, healthy,
others) and `covid` (0/1). No official split: seeded 70/10/20 by patient; `split_c` is 90/50/70 patients by systematic
sampling, as Baharoon et al. 2023 describe theirs (their lists are not public, so it is approximate).
Tasks: sars-cov-2-covid, sars-cov-2-3class, sars-cov-2-c. Licence: see the release's page; cite Soares et al. 2020.
"""

import re
from collections import Counter
from pathlib import Path

import pyarrow as pa

from featstore.datasets.source import Source, build_table
from featstore.datasets.splits import split_by_group, systematic_split
from featstore.datasets.walk import find_files
from featstore.errors import ManifestError

CLASSES = ("covid", "healthy", "others")
_FOLDERS = {"covid": "covid", "healthy": "healthy", "others": "others", "other": "others", "non-covid": "others"}
_NOTE = "SARS-CoV-2 CT-Scan (Soares et al. 2020), public on Kaggle; its page states the terms"


def read(root: Path) -> Source:
    """Every slice, its patient, and the class that its folder names.

    Raises:
        ManifestError: no class folders, or slices both in patient folders and outside of them.
    """
    rows = sorted((_place(path) for path in find_files(root, (".png",))), key=lambda row: row[:3])
    rows = [row for row in rows if row[0]]
    classes = {row[0] for row in rows}
    if "covid" not in classes or len(classes) < 2:
        raise ManifestError(
            f"{root}: expected the folders Covid, Healthy and Others with a folder of PNG slices for each patient "
            f"(or COVID and non-COVID with the slices), found {', '.join(sorted(classes)) or 'no PNG in such folders'}"
        )
    known = [bool(row[1]) for row in rows]
    if any(known) and not all(known):
        raise ManifestError(
            f"{root}: {len(known) - sum(known)} slices lie outside of patient folders and {sum(known)} inside; "
            "the two releases must not be mixed"
        )
    paths = [row[3] for row in rows]
    groups = [f"{label}/{patient}" if patient else None for label, patient, _, _ in rows]
    patients = list(dict.fromkeys(groups)) if all(known) else []
    part = systematic_split([name for name in patients if name], test=70 / 210, val=50 / 140)
    counters: Counter[str | None] = Counter()
    z = []
    for group in groups:
        z.append(counters[group])
        counters[group] += 1
    original = pa.table(
        {
            "class": pa.array([row[0] for row in rows]),
            "covid": pa.array(["1" if row[0] == "covid" else "0" for row in rows]),
            "split_c": pa.array([part.get(group or "", "") for group in groups], pa.string()),
        }
    )
    reserved = {
        "id": pa.array(paths),
        "path": pa.array(paths),
        "group": pa.array(groups, pa.string()),
        "split": pa.array(split_by_group([group or f"id:{path}" for group, path in zip(groups, paths)])),
    }
    if all(known):
        reserved |= {"volume": pa.array(groups, pa.string()), "z": pa.array(z, pa.int64())}
    three = len(classes) == 3
    notes = [_NOTE] if all(known) else [_NOTE, "this release names no patients: slices of one may cross splits"]
    return Source(
        table=build_table(original, reserved),
        root=root,
        adapter="sars-cov-2",
        default_task="sars-cov-2-covid",
        tasks=("sars-cov-2-covid", *(("sars-cov-2-3class", "sars-cov-2-c") if three and all(known) else ())),
        label_columns=("covid", "class"),
        split_origin=f"seeded by {'patient' if all(known) else 'slice'}, 70/10/20, seed 0",
        groups_known=all(known),
        notes=tuple(notes),
    )


def _place(path: str) -> tuple[str, str, list[tuple[int, str]], str]:
    """(class or "", patient or "", natural order of the name, path)."""
    parts = path.split("/")
    at = next((at for at, part in enumerate(parts[:-1]) if part.lower() in _FOLDERS), None)
    if at is None:
        return "", "", [], path
    numbers = [(int(text), "") if text.isdigit() else (-1, text) for text in re.split(r"([0-9]+)", parts[-1]) if text]
    return _FOLDERS[parts[at].lower()], "/".join(parts[at + 1 : -1]), numbers, path
