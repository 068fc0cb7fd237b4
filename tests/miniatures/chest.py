"""MIMIC-CXR-JPG, VinDr-CXR (PhysioNet and Kaggle), VinDr-PCXR, PadChest and RSNA Pneumonia.

What shows disease is bright; everything else about the pictures is noise.
"""

import csv
import gzip
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pydicom
from PIL import Image
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from featstore.datasets.chexpert import LABELS
from miniatures import Miniature
from probes.known.chest import PADCHEST_17, PCXR_15, VINDR_6, VINDR_14, VINDR_22

PADCHEST_CSV = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv"


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table, compressed where the name ends in .gz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerows([header, *rows])


def pixels(bright: bool, rng: np.random.Generator, top: int, shape: tuple[int, int] = (36, 32)) -> np.ndarray:
    """Noise below `top`, about 3/4 of it where `bright`, else 1/4; a black and a white corner fix the range."""
    image = (rng.normal(0.75 if bright else 0.25, 0.06, shape).clip(0, 1) * top).round()
    image[0, 0], image[0, -1] = 0, top
    return image.astype(np.uint8 if top < 256 else np.uint16)


def write_dicom(path: Path, bright: bool, rng: np.random.Generator, *, inverted: bool = False) -> None:
    """12 of 16 bits; MONOCHROME1 where `inverted`, as some of the originals are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = pixels(bright, rng, 4095)
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = pydicom.uid.DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[path.name])
    dataset = pydicom.Dataset()
    dataset.file_meta = meta
    dataset.SOPClassUID, dataset.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    dataset.Modality = "DX"
    dataset.Rows, dataset.Columns = values.shape
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME1" if inverted else "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    dataset.PixelData = (4095 - values if inverted else values).astype("<u2").tobytes()
    dataset.save_as(path, enforce_file_format=True)


# ---- MIMIC-CXR-JPG


def write_mimic(root: Path, *, patients: int = 40, compressed: bool = True, images: bool = True) -> int:
    """One frontal study a patient with a lateral view every fourth; the last training study has no label row."""
    rng = np.random.default_rng(0)
    split_rows, metadata, scores, negbio = [], [], [], []
    for number in range(patients):
        subject, study, ill = 10_000_032 + number * 100_007, 50_414_267 + number, number % 2 == 0
        part = ("train", "train", "train", "train", "validate", "validate", "test", "test")[number % 8]
        views = ["PA" if number % 3 else "AP", *(["LATERAL" if number % 8 else "LL"] if number % 4 == 0 else [])]
        for view in views:
            dicom = "-".join(f"{value:08x}" for value in rng.integers(0, 2**32, 5))
            split_rows.append([dicom, study, subject, part])
            metadata.append([dicom, subject, study, "CHEST (PA AND LAT)", view, 2544, 3056, 21800506, "213014.531"])
            if images:
                path = root / f"files/p{str(subject)[:2]}/p{subject}/s{study}/{dicom}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels(ill, rng, 255)).save(path, quality=95)
        if number == patients - 5:
            continue
        # Findings follow the signal, with uncertain and blank among them; the second classifier says less.
        values = ["", *([("1.0", "-1.0")[number % 6 == 4] if ill else ("0.0", "")[number % 6 == 1]] * 12), ""]
        values[0] = "" if ill else "1.0"
        scores.append([subject, study, *values])
        negbio.append([subject, study, *("" if value == "-1.0" else value for value in values)])
    suffix = ".csv.gz" if compressed else ".csv"
    write_csv(root / f"mimic-cxr-2.0.0-split{suffix}", ["dicom_id", "study_id", "subject_id", "split"], split_rows)
    header = ["dicom_id", "subject_id", "study_id", "PerformedProcedureStepDescription", "ViewPosition", "Rows"]
    header += ["Columns", "StudyDate", "StudyTime"]
    # The metadata and label tables are in another order than the split table.
    write_csv(root / f"mimic-cxr-2.0.0-metadata{suffix}", header, reversed(metadata))
    for name, rows in (("chexpert", scores), ("negbio", negbio)):
        write_csv(root / f"mimic-cxr-2.0.0-{name}{suffix}", ["subject_id", "study_id", *LABELS], reversed(rows))
    return len(split_rows)


def mimic(root: Path) -> Miniature:
    samples = write_mimic(root)
    tasks = ("mimic-5", "mimic-14", "mimic-10-a", "mimic-10-a-nothree", "mimic-7-a")
    return Miniature(root=root, samples=samples, tasks=tasks)


# ---- VinDr


def _readers(rng: np.random.Generator) -> list[str]:
    return [f"R{number}" for number in sorted(rng.choice(np.arange(1, 18), 3, replace=False))]


def _split_images(root: Path, rng: np.random.Generator, counts: Mapping[str, int]) -> dict[str, dict[str, bool]]:
    """Image ids of each split, with what they show; one of four is MONOCHROME1."""
    found: dict[str, dict[str, bool]] = {}
    for split, count in counts.items():
        # Ids of 32 hex digits; these put ill and healthy images into a seeded tenth.
        names = [hashlib.md5(f"2:{split}:{number}".encode()).hexdigest() for number in range(count)]
        found[split] = {name: number % 2 == 0 for number, name in enumerate(names)}
        for number, (image, ill) in enumerate(found[split].items()):
            write_dicom(root / split / f"{image}.dicom", ill, rng, inverted=number % 4 == 0)
    return found


def write_vindr_physionet(
    root: Path, labels: Sequence[str], *, reader: str, folder: Path, readers: int, test_names: Mapping[str, str]
) -> int:
    """Votes a row in training, one row an image in the test table, boxes with their columns in another order."""
    rng = np.random.default_rng(0)
    images = _split_images(root, rng, {"train": 36, "test": 12})
    train, test = list[list[object]](), list[list[object]]()
    boxes, test_boxes = list[list[object]](), list[list[object]]()
    for image, ill in images["train"].items():
        for place, name in enumerate(_readers(rng)[:readers]):
            says = ill and not (place == 2 and len(train) % 5 == 0)  # now and then one reader sees nothing
            train.append([image, name, *(int(says != (label == "No finding")) for label in labels)])
            box = [120.5, 80, 480, 333.25] if says else ["", "", "", ""]
            boxes.append([name, image, labels[0] if says else "No finding", *box])
    for image, ill in images["test"].items():
        test.append([image, *(int(ill != (label == "No finding")) for label in labels)])
        test_boxes.append([image, labels[0] if ill else "No finding", *([1, 2, 30, 40] if ill else [""] * 4)])
    order = rng.permutation(len(train))
    write_csv(folder / "image_labels_train.csv", ["image_id", reader, *labels], [train[index] for index in order])
    write_csv(folder / "image_labels_test.csv", ["image_id", *(test_names.get(name, name) for name in labels)], test)
    corners = ["x_min", "y_min", "x_max", "y_max"]
    write_csv(folder / "annotations_train.csv", [reader, "image_id", "class_name", *corners], boxes)
    write_csv(folder / "annotations_test.csv", ["image_id", "class_name", *corners], test_boxes)
    return sum(map(len, images.values()))


def vindr_cxr(root: Path) -> Miniature:
    samples = write_vindr_physionet(
        root,
        (*VINDR_22, *VINDR_6),
        reader="rad_id",
        folder=root / "annotations",
        readers=3,
        test_names={"Other diseases": "Other disease"},
    )
    tasks = ("vindr-cxr-28", "vindr-cxr-22", "vindr-cxr-6", "vindr-cxr-11-a")
    return Miniature(root=root, samples=samples, tasks=tasks)


def vindr_pcxr(root: Path) -> Miniature:
    samples = write_vindr_physionet(root, PCXR_15, reader="rad_ID", folder=root, readers=1, test_names={})
    return Miniature(root=root, samples=samples, tasks=("vindr-pcxr-15", "vindr-pcxr-3-a"))


def write_vindr_kaggle(root: Path, *, train: int = 30, test: int = 4) -> int:
    """train.csv of the competition: a row for each box and reader, or one `No finding` with class 14."""
    rng = np.random.default_rng(0)
    images = _split_images(root, rng, {"train": train, "test": test})
    classes = (*VINDR_14, "No finding")
    rows: list[list[object]] = []
    for image, ill in images["train"].items():
        for place, reader in enumerate(_readers(rng)):
            if ill and place != 2:
                rows += [[image, "Cardiomegaly", 3, reader, 100, 200, 300, 400 + place]]
                rows += [[image, "Pleural effusion", 10, reader, 10, 20, 30, 40]] * (1 + place)
            else:
                rows.append([image, classes[14], 14, reader, "", "", "", ""])
    header = ["image_id", "class_name", "class_id", "rad_id", "x_min", "y_min", "x_max", "y_max"]
    write_csv(root / "train.csv", header, [rows[index] for index in rng.permutation(len(rows))])
    return train + test


# ---- PadChest


def padchest_rows() -> list[list[str]]:
    """(ImageID, ImageDir, StudyID, PatientID, ViewPosition_DICOM, Projection, MethodLabel, Labels, Report) each."""
    ill = [name for name in PADCHEST_17 if "_" not in name and name not in ("hernia", "congestion")]
    ill += ["hiatal hernia", "hilar congestion", "nodule", "Mass "]
    rows = []
    for number in range(60):
        patient = number // 2
        text = str(ill) if patient % 2 == 0 else "['normal', 'Normal ', 'normal']"
        special = {1: "", 3: "['normal', \"stent' \", 'nsg tube'']", 5: "[]", 7: "exclude"}.get(number)
        view = ("PA", "AP", "AP_horizontal", "L")[number % 4]
        name = f"2168401113669640{number:04d}_00-{number:03d}-001.png"
        dicom_view = "ANTEROPOSTERIOR" if view == "AP_horizontal" else "LATERAL" if view == "L" else "POSTEROANTERIOR"
        method = "Physician" if number % 4 == 0 else "RNN_model"
        where = [name, str(number % 3 * 27), f"S{number}", f"P{patient:03d}", dicom_view, view, method]
        rows.append([*where, text if special is None else special, "dos lineas\nde informe"])
    return rows


def write_padchest(root: Path, *, compressed: bool = False, flat: bool = False, images: bool = True) -> int:
    """16-bit PNGs whose levels fill a quarter of the range, in 0/, 27/, 54/ or all in one folder."""
    rng = np.random.default_rng(0)
    rows = padchest_rows()
    header = ["", "ImageID", "ImageDir", "StudyID", "PatientID", "ViewPosition_DICOM", "Projection", "MethodLabel"]
    table = [[number, *row] for number, row in enumerate(rows)]
    suffix = ".gz" if compressed else ""
    write_csv(root / f"{PADCHEST_CSV}{suffix}", [*header, "Labels", "Report"], table)
    for row in rows if images else []:
        path = root / ("images" if flat else row[1]) / row[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(int(row[3][1:]) % 2 == 0, rng, 16383)).save(path)
    return len(rows)


def padchest(root: Path) -> Miniature:
    return Miniature(root=root, samples=write_padchest(root), tasks=("padchest-17-a", "padchest-7-a"))


# ---- RSNA Pneumonia


def write_rsna(root: Path, *, count: int = 40, images: bool = True) -> list[str]:
    """Two rows (boxes) for every second ill image, one class row a box; returns the ids, three to a NIH patient."""
    rng = np.random.default_rng(0)
    labels: list[list[object]] = []
    classes, ids = [], []
    for number in range(count):
        kind = number % 3
        image = f"{rng.bytes(4).hex()}-{rng.bytes(2).hex()}-{rng.bytes(2).hex()}-{rng.bytes(2).hex()}-{number:012x}"
        ids.append(image)
        boxes = [[264.0, 152.0, 213.0, 379.0], [562.0, 152.0, 256.0, 453.0]][: 1 + number % 2] if kind == 0 else []
        labels += [[image, *box, 1] for box in boxes] or [[image, "", "", "", "", 0]]
        name = ("Lung Opacity", "Normal", "No Lung Opacity / Not Normal")[kind]
        classes += [[image, name]] * max(len(boxes), 1)
        if images:
            write_dicom(root / f"stage_2_train_images/{image}.dcm", kind == 0, rng)
    write_csv(root / "stage_2_train_labels.csv", ["patientId", "x", "y", "width", "height", "Target"], labels)
    write_csv(root / "stage_2_detailed_class_info.csv", ["patientId", "class"], classes)
    # 37 sure matches, one in between, one that is none, and one image the map does not name.
    matches = [[image, f"{index // 3 + 1:08d}_{index % 3:03d}.png", 0.5] for index, image in enumerate(ids[:-1])]
    matches[-1][2], matches[-2][2] = 55.0, 4.5
    write_csv(root / "rsnamatches.csv", ["patientId", "cxr_match", "mse"], matches)
    return ids


def rsna(root: Path) -> Miniature:
    samples = len(write_rsna(root))
    return Miniature(root=root, samples=samples, tasks=("rsna-pneumonia", "rsna-pneumonia-b", "rsna-3class"))


WRITERS = {"mimic-cxr": mimic, "vindr-cxr": vindr_cxr, "vindr-pcxr": vindr_pcxr, "padchest": padchest, "rsna": rsna}
