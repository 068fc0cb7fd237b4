"""Medical Segmentation Decathlon, Task01 to Task10: one row an axial slice of imagesTr, masks from labelsTr.

Layout: `TaskXX_Name/{imagesTr,labelsTr,imagesTs,dataset.json}`. ROOT is one such folder, or a folder with several and
`--option task=02` (or Task02_Heart, or Heart) that says which. Names that start with `._` (AppleDouble files of the
original archives) are passed over. `dataset.json` names the classes of the masks and the modalities; where it lists
other cases than there are files, the files count and a note says so.

Rows: every axial slice of every labelled volume, from foot to head whatever the file's orientation; `volume` is the
case, `z` the slice, `modality` what is read. Task01 (FLAIR, T1w, T1gd, T2w) and Task05 have several channels:
`--option channel=0` (default) reads one, `--option channel=0,1,2` three as red, green, blue. Studies that use these two
tasks with 2-D backbones seldom say which they read.

Split: the release has labels for imagesTr alone; imagesTs is left out (`--option unlabelled=true` keeps it with an
empty split). Column `fold` (0 to 4) divides the cases by seed 0; the fold of `--option fold=0` is "test", the others
"train" (80/20), and probes select on a tenth of the training cases. Task02 has 20 labelled cases; there column
`split_c` (12/4/4: every 5th case test, every 4th of the others val) comes near to the slice counts of the study of
DINOv2 in radiology, whose list is not published. Groups: the case; the release names no patients. `--option every=5`
keeps every fifth slice.

Licence: CC BY-SA 4.0. Source: Antonelli et al. 2022, Simpson et al. 2019.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from featstore.datasets.slices import (
    Volume,
    check_fold,
    class_names,
    fold_split,
    folds,
    join,
    nifti_slices,
    read_json,
    stem,
    systematic,
    walk,
)
from featstore.datasets.source import Source
from featstore.errors import ManifestError
from featstore.images.part import Part

_LAYOUT = "a folder of the Decathlon is called TaskXX_Name and holds imagesTr, labelsTr, imagesTs and dataset.json"
_HEART = 2


def read(
    root: Path,
    *,
    task: str | None = None,
    channel: str = "0",
    fold: int = 0,
    unlabelled: bool = False,
    every: int = 1,
) -> Source:
    """The slices of one task; see the text of this module.

    Raises:
        ManifestError: no such task, no volumes, or a channel that they do not have.
    """
    check_fold(fold)
    home = _choose(root, task)
    about = read_json(root / home / "dataset.json")
    volumes, notes = _volumes(root, home, about, unlabelled)
    names = [volume.name for volume in volumes if volume.mask_path is not None]
    of = folds(names)
    volumes = [
        Volume(
            name=volume.name,
            path=volume.path,
            group=volume.name,
            split=fold_split(of[volume.name], fold) if volume.mask_path else "",
            mask_path=volume.mask_path,
        )
        for volume in volumes
    ]
    derived: dict[str, list[str | None]] = {
        "modality": [_modality(about, channel)] * len(volumes),
        "fold": [of.get(volume.name) for volume in volumes],
    }
    if _task_number(root, home) == _HEART:
        listed = systematic(names, test=5, val=4)
        derived["split_c"] = [listed.get(volume.name, "") for volume in volumes]
        notes.append("split_c: every 5th case test, every 4th of the others val; the paper's own list is not published")
    if Part(channel=channel).channels == (0,):
        channel = ""  # the one channel of 3-D files needs no naming
    table, more = nifti_slices(root, volumes, derived, channel=channel, every=every)
    return Source(
        table=table,
        root=root,
        adapter="msd",
        default_task=None,
        tasks=(),
        label_columns=(),
        split_origin=f"5 folds by case, seed 0; fold {fold} is test",
        groups_known=False,
        notes=("Medical Segmentation Decathlon: CC BY-SA 4.0; cite Antonelli et al. 2022", *notes, *more),
        mask_classes=class_names(_mapping(about, "labels"), f"{join(home, 'dataset.json')}"),
    )


def _choose(root: Path, task: str | None) -> str:
    """The folder below `root` that holds the task; "" for `root` itself."""
    found = sorted(path.parent.name for path in root.glob("Task*/imagesTr"))
    if (root / "imagesTr").is_dir():
        found = [root.resolve().name] if task is not None else [""]
    elif not found:
        raise ManifestError(f"{root} has no imagesTr and no folder Task*/imagesTr: {_LAYOUT}")
    if task is not None:
        found = [name for name in found if _is_called(name, task)]
    if len(found) != 1:
        known = ", ".join(sorted(path.parent.name for path in root.glob("Task*/imagesTr"))) or root.resolve().name
        raise ManifestError(
            f"{root} must hold one task, or --option task=02 say which; it holds {known}"
            + (f", and {task!r} is {'none' if not found else 'several'} of them" if task is not None else "")
        )
    return "" if (root / "imagesTr").is_dir() else found[0]


def _is_called(folder: str, task: str) -> bool:
    number, _, name = folder.removeprefix("Task").partition("_")
    return task.lower() in (folder.lower(), name.lower(), number) or (task.isdigit() and int(task) == _digits(number))


def _digits(text: str) -> int:
    return int(text) if text.isdigit() else -1


def _task_number(root: Path, home: str) -> int:
    return _digits((home or root.resolve().name).removeprefix("Task").partition("_")[0])


def _mapping(about: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = about.get(key)
    return value if isinstance(value, dict) else {}


def _modality(about: Mapping[str, Any], channel: str) -> str | None:
    known = _mapping(about, "modality")
    names = [str(known[str(number)]) for number in Part(channel=channel).channels if str(number) in known]
    return ",".join(names) or None


def _volumes(root: Path, home: str, about: Mapping[str, Any], unlabelled: bool) -> tuple[list[Volume], list[str]]:
    images, hidden = walk(root, join(home, "imagesTr"))
    labels: list[str] = []
    tests: list[str] = []
    for name, into in (("labelsTr", labels), ("imagesTs", tests)):
        if (root / home / name).is_dir():
            paths, more = walk(root, join(home, name))
            into += paths
            hidden += more
    by_name = {stem(Path(path).name): path for path in labels}
    made = [
        Volume(name=stem(Path(path).name), path=path, mask_path=by_name.get(stem(Path(path).name))) for path in images
    ]
    notes = []
    for key, count in (("numTraining", len(images)), ("numTest", len(tests))):
        if about.get(key) not in (None, count):
            notes.append(f"dataset.json says {key} {about[key]}, the folder holds {count}")
    if hidden:
        notes.append(f"{hidden} AppleDouble files (._*) are passed over")
    if bare := sum(volume.mask_path is None for volume in made):
        notes.append(f"{bare} volumes of imagesTr have no labels and are {'kept' if unlabelled else 'left out'}")
    if unlabelled:
        return made + [Volume(name=stem(Path(path).name), path=path) for path in tests], notes
    if tests:
        notes.append(f"{len(tests)} volumes of imagesTs have no labels and are left out (--option unlabelled=true)")
    return [volume for volume in made if volume.mask_path is not None], notes
