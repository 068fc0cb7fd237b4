"""Makes opencv_equalise.npz: images and what OpenCV's equalizeHist and CLAHE make of them.

Run where opencv-python-headless is installed (made with 5.0.0): `python tests/opencv_equalise.py`.
"""

from pathlib import Path

import numpy as np

# (rows, columns, clip, tiles): divided by the tiles, not, by one side alone, smaller than the tiles, one pixel
CASES = [(64, 48, 2.0, 8), (61, 47, 2.0, 8), (64, 50, 4.0, 8), (3, 5, 2.0, 8), (1, 1, 40.0, 8), (40, 33, 0.0, 3)]


def make_image(rows: int, columns: int, seed: int) -> np.ndarray:
    """A slope with noise that leaves some levels empty."""
    noise = np.random.default_rng(seed).normal(0, 12, (rows, columns))
    slope = np.linspace(30, 180, columns)[None] + np.linspace(0, 30, rows)[:, None]
    image: np.ndarray = (slope + noise).clip(0, 255).astype(np.uint8)
    return image


def main() -> None:
    import cv2

    arrays: dict[str, np.ndarray] = {}
    for number, (rows, columns, clip, tiles) in enumerate(CASES):
        image = make_image(rows, columns, number)
        arrays[f"image{number}"] = image
        arrays[f"equalised{number}"] = cv2.equalizeHist(image)
        arrays[f"clahe{number}"] = cv2.createCLAHE(clip, (tiles, tiles)).apply(image)
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **arrays)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
