"""Montgomery, Shenzhen, SARS-CoV-2 CT and the brain tumours of figshare, in miniature."""

from pathlib import Path

import h5py
import numpy as np
from PIL import Image

from miniatures import Miniature


def lungs(rng: np.random.Generator, sick: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A grey picture (48, 56), and the masks of its left and right half of lung; the sick one is brighter."""
    rows, columns = np.mgrid[:48, :56]
    right, left = (((rows - 24) / 18) ** 2 + ((columns - at) / 9) ** 2 < 1 for at in (16, 40))
    picture = 150 + rng.normal(0, 5, rows.shape)
    picture[left | right] = 130 if sick else 40
    return picture.clip(0, 255).astype(np.uint8), left, right


def montgomery(root: Path) -> Miniature:
    rng = np.random.default_rng(0)
    base = root / "MontgomerySet"
    for folder in ("CXR_png", "ManualMask/leftMask", "ManualMask/rightMask", "ClinicalReadings"):
        (base / folder).mkdir(parents=True)
    for number in range(1, 41):
        name = f"MCUCXR_{number:04d}_{number % 2}"
        picture, left, right = lungs(rng, number % 2 == 1)
        # Bit depth is not stated by the release: some of these are deeper.
        deep = Image.fromarray(picture.astype(np.uint16) * 257) if number % 3 == 0 else Image.fromarray(picture)
        deep.save(base / "CXR_png" / f"{name}.png")
        Image.fromarray(left).save(base / "ManualMask/leftMask" / f"{name}.png")
        Image.fromarray(right).save(base / "ManualMask/rightMask" / f"{name}.png")
        text = f"Patient's Sex: {'FM'[number % 2]}\nPatient's Age: {number + 20:03d}Y\nnormal\n"
        (base / "ClinicalReadings" / f"{name}.txt").write_text(text)
    return Miniature(root=root, samples=40, tasks=("montgomery-tb", "montgomery-age"), masks=True)


def shenzhen(root: Path) -> Miniature:
    rng = np.random.default_rng(1)
    images, masks, texts = (root / name for name in ("CXR_png", "masks", "ClinicalReadings"))
    for folder in (images, masks, texts):
        folder.mkdir()
    for number in range(1, 41):
        name = f"CHNCXR_{number:04d}_{number % 2}"
        picture, left, right = lungs(rng, number % 2 == 1)
        Image.fromarray(np.dstack([picture] * 3)).save(images / f"{name}{'.jpg' if number % 5 == 0 else '.png'}")
        if number % 7:  # as 96 of the original have none
            Image.fromarray((left | right).astype(np.uint8) * 255).save(masks / f"{name}_mask.png")
        (texts / f"{name}.txt").write_text(f"{'male' if number % 2 else 'female'} {number + 15}yrs\nPTB in the upper\n")
    return Miniature(root=root, samples=40, tasks=("shenzhen-tb", "shenzhen-age"), masks=True)


def sars_cov_2(root: Path) -> Miniature:
    rng = np.random.default_rng(2)
    count = 0
    for label, level in (("Covid", 200), ("Healthy", 120), ("Others", 40)):
        for patient in range(14):
            folder = root / label / str(patient)
            folder.mkdir(parents=True)
            for number in (2, 10):
                size = tuple(rng.integers(30, 60, 2))
                grey = (level + rng.integers(0, 30, size)).astype(np.uint8)
                alpha = np.full(size, 255, np.uint8)
                alpha[: number + 1] = 0
                Image.fromarray(np.dstack([grey] * 3 + [alpha])).save(folder / f"{number}.png")
                count += 1
    return Miniature(root=root, samples=count, tasks=("sars-cov-2-covid", "sars-cov-2-3class", "sars-cov-2-c"))


def write_mat(path: Path, fields: dict[str, np.ndarray]) -> None:
    """A MATLAB 7.3 file: HDF5 behind 512 bytes of MATLAB's own, arrays transposed."""
    with h5py.File(path, "w", userblock_size=512) as file:
        for name, values in fields.items():
            file[name] = values.T
    with path.open("r+b") as raw:
        raw.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + bytes([0, 2]) + b"IM")


def brain_tumor(root: Path) -> Miniature:
    rng = np.random.default_rng(3)
    folds = []
    for number in range(1, 46):
        label, patient = number % 3 + 1, (number - 1) // 3 % 8 * 3 + number % 3
        folder = root / f"brainTumorDataPublic_{(number - 1) // 20}"
        folder.mkdir(exist_ok=True)
        size = 64 if number % 4 else 32  # never one fixed size
        image = rng.integers(0, 200, (size, size)).astype(np.int16) + 400 * label
        mask = np.zeros((size, size), np.uint8)
        mask[size // 4 : size // 2, size // 8 : size // 3] = 1
        image[mask > 0] += 3000
        image[:, -size // 4 :] //= label + 1
        pid = np.frombuffer(f"1{patient:05d}".encode(), np.uint8).astype(np.uint16)[None]
        write_mat(
            folder / f"{number}.mat",
            {
                "cjdata/label": np.array([[float(label)]]),
                "cjdata/PID": pid,
                "cjdata/image": image,
                "cjdata/tumorBorder": rng.random((1, 8)),
                "cjdata/tumorMask": mask,
            },
        )
        folds.append(patient % 5 + 1)
    write_mat(root / "cvind.mat", {"cvind": np.array([folds], np.float64)})
    return Miniature(root=root, samples=45, tasks=("brain-tumor-3", "brain-tumor-3-c"), masks=True)


WRITERS = {"montgomery": montgomery, "shenzhen": shenzhen, "sars-cov-2": sars_cov_2, "brain-tumor": brain_tumor}
