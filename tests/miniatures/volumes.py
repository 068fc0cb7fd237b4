"""Volumes: AMOS, the Decathlon, CT-RATE, AutoPET, HECKTOR, CAMUS, ACDC, CREMI and AC3/AC4."""

import json
from collections.abc import Sequence
from pathlib import Path

import h5py
import nibabel
import numpy as np
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

from featstore.datasets.splits import seeded_rank
from miniatures import Miniature

SIDES = (24, 20, 5)
CODES = ("RAS", "LPS", "LAS", "PIR", "SLA")  # how the axes of a file may lie
Pair = tuple[np.ndarray, np.ndarray]
BACKGROUND = 0xFFFFFFFFFFFFFFFF


def write_nifti(path: Path, data: np.ndarray, codes: str = "RAS", spacing: Sequence[float] = (1.5, 1.5, 3.0)) -> None:
    """`data` (right, front, head[, channel]) as a file whose axes lie as `codes` says."""
    image = nibabel.Nifti1Image(data, np.diag([*spacing, 1.0]))
    turned = image.as_reoriented(ornt_transform(io_orientation(image.affine), axcodes2ornt(tuple(codes))))
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(np.asanyarray(turned.dataobj), turned.affine), path)


def phantom(rng: np.random.Generator, *, labels: int, sides: Sequence[int] = SIDES, bright: float = 0.0) -> Pair:
    """(Hounsfield-like volume, labels): a body with `labels` blobs; slice i is brighter than slice i - 1."""
    x, y, _ = np.meshgrid(*(np.linspace(-1, 1, side) for side in sides), indexing="ij")
    body = x**2 + y**2 < 0.9
    values = np.where(body, 40.0 + bright, -1000.0) + 20 * np.arange(sides[2])
    mask = np.zeros(sides, np.uint8)
    for label in range(1, labels + 1):
        angle = 2 * np.pi * label / labels
        inside = (x - 0.5 * np.cos(angle)) ** 2 + (y - 0.5 * np.sin(angle)) ** 2 < 0.06
        mask[inside] = label
        values[inside] += 10 * label
    return (values + rng.normal(0, 5, sides)).astype(np.int16), mask


def apple_double(path: Path) -> None:
    """The companion file that macOS adds to archives: same name after `._`, no image."""
    (path.parent / f"._{path.name}").write_bytes(b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X")


def halves(names: Sequence[str]) -> dict[str, int]:
    """0 and 1 by turns in the order in which validation patients are drawn, so that those have both."""
    return {name: place % 2 for place, name in enumerate(sorted(names, key=lambda name: seeded_rank(name, 0)))}


def amos(root: Path) -> Miniature:
    rng = np.random.default_rng(0)
    cases = {"Tr": (1, 2, 10, 507), "Va": (8, 600), "Ts": (11,)}
    home = root / "amos22"
    for ending, numbers in cases.items():
        for at, number in enumerate(numbers):
            values, mask = phantom(rng, labels=15)
            name = f"amos_{number:04d}.nii.gz"
            write_nifti(home / f"images{ending}" / name, values, CODES[at])
            if ending != "Ts":
                write_nifti(home / f"labels{ending}" / name, mask, CODES[at])
    listed = {
        key: [
            {"image": f"./images{ending}/amos_{n:04d}.nii.gz", "label": f"./labels{ending}/amos_{n:04d}.nii.gz"}
            for n in cases[ending]
        ]
        for key, ending in (("training", "Tr"), ("validation", "Va"), ("test", "Ts"))
    }
    (home / "dataset.json").write_text(json.dumps({"name": "AMOS", "labels": {"0": "background"}, **listed}))
    return Miniature(root=root, samples=6 * SIDES[2], masks=True)


def write_task(home: Path, *, cases: int = 6, channels: int = 1, labels: Sequence[str] = ("left atrium",)) -> None:
    """One task of the Decathlon, AppleDouble files and unlabelled test volumes included."""
    rng = np.random.default_rng(0)
    name = home.name.partition("_")[2].lower()[:2]
    training = []
    for number in [3, 4, 5, 7, 9, 10, 11, 14, 16, 17, 18, 19][:cases]:
        values, mask = phantom(rng, labels=len(labels))
        if channels > 1:
            values = np.stack([values + 500 * channel for channel in range(channels)], -1)
        file = f"{name}_{number:03d}.nii.gz"
        for folder, data in (("imagesTr", values), ("labelsTr", mask)):
            write_nifti(home / folder / file, data, CODES[number % 3])
            apple_double(home / folder / file)
        training.append({"image": f"./imagesTr/{file}", "label": f"./labelsTr/{file}"})
    write_nifti(home / "imagesTs" / f"{name}_020.nii.gz", values)
    modality = dict(zip("0123", ("FLAIR", "T1w", "T1gd", "T2w"))) if channels > 1 else {"0": "MRI"}
    names = {"0": "background", **{str(value): text for value, text in enumerate(labels, 1)}}
    about = {"name": name, "modality": modality, "labels": names, "numTraining": cases, "numTest": 1}
    (home / "dataset.json").write_text(
        json.dumps({**about, "training": training, "test": [f"./imagesTs/{name}_020.nii.gz"]})
    )


def msd(root: Path) -> Miniature:
    write_task(root / "Task01_BrainTumour", channels=4, labels=("edema", "non-enhancing tumour", "enhancing tumour"))
    write_task(root / "Task02_Heart")
    return Miniature(root=root, samples=6 * SIDES[2], config={"option": ["task=Task01_BrainTumour"]}, masks=True)


CT_RATE_LABELS = (
    "Medical material,Arterial wall calcification,Cardiomegaly,Pericardial effusion,"
    "Coronary artery wall calcification,Hiatal hernia,Lymphadenopathy,Emphysema,Atelectasis,Lung nodule,Lung opacity,"
    "Pulmonary fibrotic sequela,Pleural effusion,Mosaic attenuation pattern,Peribronchial thickening,Consolidation,"
    "Bronchiectasis,Interlobular septal thickening"
)


def ct_rate(root: Path) -> Miniature:
    """24 training patients (patient 2 with two scans, patient 10 with two reconstructions), 6 validation patients."""
    rng = np.random.default_rng(0)
    home, samples = root / "dataset", 0
    for split, patients, table in (("train", 24, "train"), ("valid", 6, "validation")):
        labels, metadata = [f"VolumeName,{CT_RATE_LABELS}"], ["VolumeName,Manufacturer,RescaleSlope,RescaleIntercept"]
        metadata[0] += ",XYSpacing,ZSpacing"
        sick = halves([f"{split}_{patient}" for patient in range(1, patients + 1) if (split, patient) != ("train", 3)])
        for patient in range(1, patients + 1):
            label = sick.get(f"{split}_{patient}", 0)
            names = [f"{split}_{patient}_a_1"]
            names += [f"{split}_{patient}_b_1"] if patient == 2 else []
            names += [f"{split}_{patient}_a_2"] if patient == 10 else []
            for name in names:
                values, _ = phantom(rng, labels=1, sides=(16, 16, 2), bright=400.0 * label)
                scan = name.rpartition("_")[0]
                # Stored values of an original: intercept and slope stand in the table alone.
                write_nifti(home / split / f"{split}_{patient}" / scan / f"{name}.nii.gz", values + 1024, "LPS")
                labels.append(f"{name}.nii.gz," + ",".join([str(label)] * 18))
                metadata.append(f'{name}.nii.gz,PNMS,1,-1024,"[0.7, 0.7]",1.5')
                samples += 2
        if split == "train":
            labels.append("train_99_a_1.nii.gz," + ",".join(["0"] * 18))  # not downloaded
            (home / "no_chest_train.txt").write_text("train_3_a_1.nii.gz\n")
            samples -= 2
        for folder, name, lines in (
            ("multi_abnormality_labels", f"{split}_predicted_labels.csv", labels),
            ("metadata", f"{table}_metadata.csv", metadata),
        ):
            (home / folder).mkdir(exist_ok=True)
            (home / folder / name).write_text("\n".join(lines) + "\n")
    return Miniature(root=root, samples=samples, tasks=("ct-rate-18", "ct-rate-18-b"))


def autopet(root: Path) -> Miniature:
    """Twenty patients, the second with two studies; the original CT has another grid than the rest."""
    rng = np.random.default_rng(0)
    home = root / "FDG-PET-CT-Lesions"
    lines = ["Subject ID,Study Date,diagnosis,age,sex"]
    patients = [f"PETCT_{number:02x}{number * 7919:08x}" for number in range(20)]
    train = halves([patient for place, patient in enumerate(patients) if place % 5])
    for number, patient in enumerate(patients):
        sick = train.get(patient, (number + 1) % 2)
        for study in range(2 if number == 1 else 1):
            folder = home / patient / f"0{study + 1}-02-2003-NA-PET-CT Ganzkoerper  primaer mit KM-{number:05d}"
            values, mask = phantom(rng, labels=1, sides=(16, 16, 2), bright=300.0 * sick)
            for name, data in (("CTres", values), ("PET", values * 100), ("SUV", values / 50.0)):
                write_nifti(folder / f"{name}.nii.gz", data.astype(np.float32), "LAS")
            write_nifti(folder / "SEG.nii.gz", mask * np.uint8(sick), "LAS")
            write_nifti(folder / "CT.nii.gz", phantom(rng, labels=1, sides=(24, 24, 5))[0], "LAS")
            lines.append(f"{patient},2003,{'MELANOMA' if sick else 'NEGATIVE'},061Y,M")
    (home / "Clinical Metadata FDG-PET_CT-Lesions.csv").write_text("\n".join(lines) + "\n")
    return Miniature(root=root, samples=21 * 2, tasks=("autopet-lesion",), masks=True)


def hecktor(root: Path) -> Miniature:
    rng = np.random.default_rng(0)
    home = root / "hecktor2022_training"
    for centre, mark, numbers in (("CHUM", "-", (1, 2, 10)), ("MDA", "_", (3, 4)), ("HGJ", "-", (5,))):
        for number in numbers:
            case = f"{centre}{mark}{number:03d}"
            values, mask = phantom(rng, labels=2)
            write_nifti(home / "imagesTr" / f"{case}__CT.nii.gz", values, "LPS")
            pet, other = phantom(rng, labels=2, sides=(12, 10, 4))
            write_nifti(home / "imagesTr" / f"{case}__PT.nii.gz", (pet / 50).astype(np.float32), "RAS", (3, 3, 3.75))
            # The last centre's labels lie on the grid of its PET, with axes stored the other way.
            data, spacing = (other, (3, 3, 3.75)) if centre == "HGJ" else (mask, (1.5, 1.5, 3.0))
            write_nifti(home / "labelsTr" / f"{case}.nii.gz", data, "LPS", spacing)
    return Miniature(root=root, samples=6 * SIDES[2], masks=True)


def camus(root: Path) -> Miniature:
    rng = np.random.default_rng(0)
    names: dict[str, list[str]] = {"training": [], "validation": [], "testing": []}
    for number in range(1, 25):
        patient, quality = f"patient{number:04d}", ("Good", "Medium", "Poor")[number % 3]
        names["training" if number <= 12 else "validation" if number <= 18 else "testing"].append(patient)
        folder = root / "database_nifti" / patient
        for view in ("2CH", "4CH")[: 2 if number < 3 else 1]:
            for phase in ("ED", "ES"):
                values, mask = phantom(rng, labels=3, sides=(24, 20, 1), bright=100.0 * (number % 3))
                at = folder / f"{patient}_{view}_{phase}.nii.gz"
                write_nifti(at, np.clip(values // 4, 0, 255).astype(np.uint8))
                write_nifti(at.with_name(f"{patient}_{view}_{phase}_gt.nii.gz"), mask)
            sequence = np.zeros((24, 20, 6), np.uint8)
            write_nifti(folder / f"{patient}_{view}_half_sequence.nii.gz", sequence)
            (folder / f"Info_{view}.cfg").write_text(
                f"ED: 1\nES: 6\nNbFrame: 6\nSex: F\nAge: {40 + number}\nImageQuality: {quality}\n"
                f"EF: {40 + 10 * (number % 3)}.5\nFrameRate: 50.0\n"
            )
    (root / "database_split").mkdir()
    for name, patients in names.items():
        (root / "database_split" / f"subgroup_{name}.txt").write_text("\n".join(patients) + "\n")
    return Miniature(root=root, samples=52, tasks=("camus-ef", "camus-quality"), masks=True)


def acdc(root: Path) -> Miniature:
    rng = np.random.default_rng(0)
    groups = ("DCM", "HCM", "MINF", "NOR", "RV")
    for folder, first, count in (("training", 1, 20), ("testing", 101, 5)):
        for number in range(first, first + count):
            patient, kind = f"patient{number:03d}", number % 5
            home = root / "database" / folder / patient
            last = 9 + number % 4
            for frame in (1, last):
                values, mask = phantom(rng, labels=3, sides=(16, 14, 1), bright=200.0 * kind)
                write_nifti(home / f"{patient}_frame{frame:02d}.nii.gz", values, "LPS")
                write_nifti(home / f"{patient}_frame{frame:02d}_gt.nii.gz", mask, "LPS")
            write_nifti(home / f"{patient}_4d.nii.gz", np.zeros((16, 14, 1, 3), np.int16), "LPS")
            (home / "Info.cfg").write_text(
                f"ED: 1\nES: {last}\nGroup: {groups[kind]}\nHeight: 170.0\nNbFrame: 30\nWeight: 70.0\n"
            )
    return Miniature(root=root, samples=50, tasks=("acdc-group",), masks=True)


def neurons(sections: int, side: int = 24) -> np.ndarray:
    """uint64 ids; the border of every section is background."""
    ids = np.full((sections, side, side), BACKGROUND, np.uint64)
    ids[:, 2:12, 2:-2], ids[:, 12:-2, 2:-2] = 7, 2**31 - 1
    return ids


def write_cremi(path: Path, sections: int, *, labels: bool = True, pad: int = 0) -> None:
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        raw = rng.integers(0, 256, (sections + 2 * pad, 24 + 2 * pad, 24 + 2 * pad), np.uint8)
        file["volumes/raw"] = raw
        file["volumes/raw"].attrs["resolution"] = [40.0, 4.0, 4.0]
        if labels:
            file["volumes/labels/neuron_ids"] = neurons(sections)
            file["volumes/labels/clefts"] = np.where(neurons(sections) == 7, np.uint64(3), np.uint64(BACKGROUND))
            for name in ("neuron_ids", "clefts"):
                file[f"volumes/labels/{name}"].attrs["resolution"] = [40.0, 4.0, 4.0]
                if pad:
                    file[f"volumes/labels/{name}"].attrs["offset"] = [40.0 * pad, 4.0 * pad, 4.0 * pad]


def cremi(root: Path) -> Miniature:
    for sample in "ABC":
        write_cremi(root / f"sample_{sample}_20160501.hdf", 10)
    write_cremi(root / "sample_A_padded_20160501.hdf", 10, pad=2)
    write_cremi(root / "sample_A+_20160601.hdf", 10, labels=False)
    return Miniature(root=root, samples=30, masks=True)


def write_ac34(root: Path, **sections: int) -> None:
    rng = np.random.default_rng(0)
    for name, count in sections.items():
        with h5py.File(root / f"{name}_inputs.h5", "w") as file:
            file["main"] = rng.integers(0, 256, (count, 24, 24), np.uint8)
        with h5py.File(root / f"{name}_labels.h5", "w") as file:
            file["main"] = (neurons(count) % np.uint64(1000)).astype(np.uint16)


def ac34(root: Path) -> Miniature:
    write_ac34(root, AC4=20, AC3=12)
    return Miniature(root=root, samples=32, masks=True)


WRITERS = {
    "amos": amos, "msd": msd, "ct-rate": ct_rate, "autopet": autopet, "hecktor": hecktor, "camus": camus,
    "acdc": acdc, "cremi": cremi, "ac34": ac34,
}  # fmt: skip
