"""AutoLaparo: 21 videos of laparoscopic hysterectomy with seven surgical phases.

Layout: AutoLaparo_Task1/videos/01.mp4 ... 21.mp4 and labels/label_01.txt ... (a header line, then frame and phase
1 to 7, parted by tabs or blanks); `root` is that folder or one that holds it.

One sample a labelled second, placed by the first number of its line: seconds or frames of the video, whichever the
largest number of the file fits (25 frames a second leave no doubt), counted from 1 unless the file has a 0. Of numbers
in seconds the frame shown then is taken, of numbers in frames the first labelled one of each second; a file may begin
late or have gaps. `--option every=5` keeps the seconds 0, 5, 10, ... Groups and `volume` are the videos (one patient
each), `z` is the second.

Columns: `phase` (1 to 7) and `phase_name` (Preparation, Dividing Ligament and Peritoneum, Dividing Uterine Vessels and
Ligament, Transecting the Vagina, Specimen Removal, Suturing, Washing). Official split: videos 1 to 10 train, 11 to 14
validation, 15 to 21 test. Tasks: autolaparo-7. Frames are read from the videos in place.
Licence: by request to the authors, for research; cite Wang et al. 2022.
"""

import math
import re
from pathlib import Path

import pyarrow as pa

from featstore.datasets.progress import told
from featstore.datasets.source import Source, build_table
from featstore.datasets.walk import by_stem, find_files
from featstore.errors import ConfigError, ManifestError
from featstore.images.video import video_facts

PHASES = (
    "Preparation",
    "Dividing Ligament and Peritoneum",
    "Dividing Uterine Vessels and Ligament",
    "Transecting the Vagina",
    "Specimen Removal",
    "Suturing",
    "Washing",
)


def read(root: Path, *, every: int = 1) -> Source:
    """One row a labelled second of every video that has a label file.

    Raises:
        ManifestError: no pair of video and labels, two files for one, a label line that is not frame and phase, or
            frames that do not increase. ConfigError: `every`.
    """
    if every < 1:
        raise ConfigError(f"--option every must be at least 1, got {every}")
    found = find_files(root)
    videos = _numbered(found, r"([0-9]+)\.(?:mp4|avi|mkv|mov)", r"/videos/")
    labels = _numbered(found, r"label_?([0-9]+)\.txt", r"/labels/")
    if not videos.keys() & labels.keys():
        raise ManifestError(f"{root} has no videos/01.mp4 with labels/label_01.txt in it or below; check the root")
    rows: list[tuple[int, int, int, int]] = []
    beyond = 0
    pairs = sorted(videos.keys() & labels.keys())
    for number in told(pairs, "videos", len(pairs)):
        num_frames, rate = video_facts(root / videos[number])
        for second, frame, phase in _seconds(_phases(root / labels[number]), num_frames, rate):
            if second % every == 0:
                beyond += frame >= num_frames
                rows += [(number, second, frame, phase)] if frame < num_frames else []
    groups = [f"{number:02d}" for number, *_ in rows]
    original = pa.table(
        {
            "phase": pa.array([str(phase) for *_, phase in rows]),
            "phase_name": pa.array([PHASES[phase - 1] for *_, phase in rows]),
        }
    )
    reserved = {
        "id": pa.array([f"{number:02d}/{second:05d}" for number, second, *_ in rows]),
        "path": pa.array([videos[number] for number, *_ in rows]),
        "part": pa.array([f"frame={frame}" for _, _, frame, _ in rows]),
        "group": pa.array(groups),
        "split": pa.array(["train" if n <= 10 else "val" if n <= 14 else "test" for n, *_ in rows]),
        "volume": pa.array(groups),
        "z": pa.array([second for _, second, *_ in rows], pa.int64()),
    }
    alone = len(videos.keys() ^ labels.keys())
    notes = ["AutoLaparo: by request to the authors, cite Wang et al. 2022"]
    notes += [f"{alone} videos or label files have no counterpart and are left out"] if alone else []
    notes += [f"{beyond} labels lie behind the end of their video and are left out"] if beyond else []
    return Source(
        table=build_table(original, reserved),
        root=root,
        adapter="autolaparo",
        default_task="autolaparo-7",
        tasks=("autolaparo-7",),
        label_columns=("phase_name", "phase"),
        split_origin="official (10, 4 and 7 videos)",
        groups_known=True,
        notes=tuple(notes),
    )


def _numbered(found: list[str], pattern: str, prefer: str) -> dict[int, str]:
    matches = ((re.fullmatch(pattern, Path(path).name, re.IGNORECASE), path) for path in found)
    numbers = {path: int(match[1]) for match, path in matches if match}
    return {
        numbers[path]: path for path in by_stem(numbers, prefer=(prefer,), key=lambda path: str(numbers[path])).values()
    }


def _seconds(phases: list[tuple[int, int]], num_frames: int, rate: float) -> list[tuple[int, int, int]]:
    """(second, frame, phase) of one line of each labelled second."""
    first = 0 if phases and phases[0][0] == 0 else 1
    # In seconds the largest number is about num_frames / rate, in frames about num_frames: halfway, as ratios go.
    if phases and phases[-1][0] <= num_frames / math.sqrt(max(rate, 1.0)):
        return [(number - first, round((number - first) * rate), phase) for number, phase in phases]
    rows: list[tuple[int, int, int]] = []
    for number, phase in phases:
        second = int((number - first) / rate)
        if not rows or second != rows[-1][0]:
            rows.append((second, number - first, phase))
    return rows


def _phases(path: Path) -> list[tuple[int, int]]:
    """(frame or second, phase) of every line after the header."""
    phases: list[tuple[int, int]] = []
    lines = [line.split() for line in path.read_text("utf-8", "replace").splitlines()]
    for number, fields in enumerate(lines, 1):
        if not fields or (number == 1 and not fields[0].isdigit()):
            continue
        if len(fields) < 2 or not re.fullmatch("[0-9]{1,9}", fields[0]) or not re.fullmatch("[1-7]", fields[1]):
            raise ManifestError(f"{path} line {number}: expected the frame and its phase, 1 to 7")
        if phases and int(fields[0]) <= phases[-1][0]:
            raise ManifestError(f"{path} line {number}: the frames of a label file must increase; sort or mend it")
        phases.append((int(fields[0]), int(fields[1])))
    return phases
