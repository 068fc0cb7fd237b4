"""EndoVis 2018 robotic scene segmentation: sequences of 149 frames with masks of 12 classes.

Layout: seq_N/left_frames/frameNNN.png and seq_N/labels/frameNNN.png below the four releases
(miccai_challenge_2018_release_1, miccai_challenge_release_2 to _4), anywhere below `root`. The masks' folder is the one
beside left_frames that has "label" or "annotation" in its name. labels.json (a list of name, color, classid) beside the
sequences tells the colours of the masks; without it masks are taken as class numbers.

A sequence stands once below `root`: another release with the same seq_N (the challenge's test data) needs a root of its
own.

The 12 scene classes (anatomy, shaft, clasper, wrist, kidney parenchyma, covered kidney, thread, clamps, suturing
needle, suction, small intestine, ultrasound probe) are not the seven instrument types of ISINet, whose relabelled masks
are a separate release; option `labels` names their folder beside left_frames if you have them. Their PNGs hold class
numbers: labels.json is not used for them.

Groups and videos are the sequences. Split as ISINet's: sequences 1, 3, 4, 6, 7, 10 to 14 and 16 train, 2, 5, 9 and 15
test; others none. Frames are used as they are: 1280 x 1024 when cropped; uncropped ones are larger, with the picture
from row 28 and column 320 on, so crop them to 1280 x 1024 there before registering, and their masks if they need it.
Segmentation only. Licence: by registration with the challenge; cite Allan et al. 2020.
"""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa

from featstore.datasets.source import Source, build_table
from featstore.datasets.walk import find_files
from featstore.errors import ManifestError

TRAIN = (1, 3, 4, 6, 7, 10, 11, 12, 13, 14, 16)
TEST = (2, 5, 9, 15)
_FRAME = re.compile(
    r"(?:^|.*/)seq_(?P<number>[0-9]+)(?:_[^/]*)?/left_frames/(?P<frame>frame[0-9]+)\.png", re.IGNORECASE
)


def read(root: Path, *, labels: str = "") -> Source:
    """One row a left frame, in the order of sequences and frames.

    Raises:
        ManifestError: no frames, a sequence that lies in two folders, or a labels.json that is no list of names and
            colours.
    """
    found = find_files(root)
    frames = sorted(
        (int(match["number"]), match["frame"].lower(), path) for path in found if (match := _FRAME.fullmatch(path))
    )
    if not frames:
        raise ManifestError(f"{root} has no seq_N/left_frames/frameNNN.png in it or below; unpack the releases there")
    _check_sequences(root, frames)
    masks = {}
    for path in found:
        folder, name = Path(path).parent, Path(path).stem.lower()
        inside = folder.name.lower()
        if inside == labels.lower() if labels else ("label" in inside or "annotation" in inside):
            masks[folder.parent.as_posix(), name] = path
    classes, values = _classes(root, found) if not labels else ((), None)
    mask_paths = [masks.get((Path(path).parent.parent.as_posix(), frame)) for _, frame, path in frames]
    sequences = [f"seq_{number}" for number, _, _ in frames]
    original = pa.table({"sequence": pa.array([str(number) for number, _, _ in frames])})
    reserved = {
        "id": pa.array([f"seq_{number}/{frame}" for number, frame, _ in frames]),
        "path": pa.array([path for _, _, path in frames]),
        "group": pa.array(sequences),
        "split": pa.array(["train" if n in TRAIN else "test" if n in TEST else "" for n, _, _ in frames]),
        "volume": pa.array(sequences),
        "z": pa.array([int(frame.removeprefix("frame")) for _, frame, _ in frames], pa.int64()),
        "mask_path": pa.array(mask_paths, pa.string()),
        "mask_part": pa.array([values if path else None for path in mask_paths], pa.string()),
    }
    unmasked = mask_paths.count(None)
    notes = ["EndoVis 2018: by registration with the challenge, cite Allan et al. 2020"]
    notes += [f"{unmasked} frames have no mask"] if unmasked else []
    if labels:
        notes += [f"masks of {labels}/ are taken as class numbers; labels.json is for the scene masks and is not used"]
    elif values is None:
        notes += ["no labels.json: masks are taken as class numbers"]
    return Source(
        table=build_table(original, reserved),
        root=root,
        adapter="endovis18",
        default_task=None,
        tasks=(),
        label_columns=(),
        split_origin="ISINet's sequences (11 train, 4 test)",
        groups_known=True,
        notes=tuple(notes),
        mask_classes=classes,
    )


def _check_sequences(root: Path, frames: list[tuple[int, str, str]]) -> None:
    folders: dict[int, str] = {}
    for number, _, path in frames:
        folder = Path(path).parent.parent.as_posix()
        if folders.setdefault(number, folder) != folder:
            raise ManifestError(
                f"{root}: sequence {number} lies in {folders[number]} and in {folder}; releases that number theirs "
                "alike are data sets of their own, so register them one by one"
            )


def _classes(root: Path, found: list[str]) -> tuple[tuple[str, ...], str | None]:
    """(names by class number, colours -> numbers as the `values` of a part) from labels.json; empty without one."""
    path = next((path for path in found if Path(path).name.lower() == "labels.json"), None)
    if path is None:
        return (), None
    try:
        items: list[dict[str, Any]] = json.loads((root / path).read_text("utf-8"))
        numbers = [(int(item["classid"]), str(item["name"]), [int(part) for part in item["color"]]) for item in items]
        colours = {number: bytes(color[:3]).hex() for number, _, color in numbers}
    except (ValueError, TypeError, KeyError):
        raise ManifestError(f"{root / path} must be a list of objects with name, color [r, g, b] and classid") from None
    names = dict.fromkeys(range(max(colours, default=-1) + 1), "") | {number: name for number, name, _ in numbers}
    pairs = (f"{colours[number]}:{number}" for number in sorted(colours) if colours[number] != "000000")
    return tuple(names[number] for number in sorted(names)), "values=" + ",".join(pairs)
