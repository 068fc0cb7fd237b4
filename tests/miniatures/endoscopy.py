"""Kvasir-Capsule, EDD2020, EndoVis18 and AutoLaparo, in miniature."""

import json
from pathlib import Path

import av
import numpy as np
from PIL import Image

from miniatures import Miniature

KVASIR = {  # words of the split files -> folder
    "Angiectasia": "Angiectasia",
    "Blood": "Blood - fresh",
    "Reduced Mucosal View": "Reduced mucosal view",
    "Ulcer": "Ulcer",
}


def kvasir(root: Path) -> Miniature:
    """PNG or JPEG in the folders, `.jpg` in the split files; two images of a class too small for the splits."""
    rng = np.random.default_rng(0)
    rows: dict[int, list[str]] = {0: [], 1: []}
    count = 0
    for at, (label, folder) in enumerate(KVASIR.items()):
        (root / "labelled_images" / folder).mkdir(parents=True)
        for video in range(14):
            stem = f"{video:02d}cafe_{at + 1}"
            colour = np.zeros((30, 30, 3), np.uint8)
            colour[..., at % 3] = 60 * at + 40
            picture = (colour + rng.integers(0, 30, colour.shape)).astype(np.uint8)
            suffix = ".png" if at == 1 else ".jpg"
            Image.fromarray(picture).save(root / "labelled_images" / folder / f"{stem}{suffix}")
            rows[video % 2].append(f"{stem}.jpg,{label}")
            count += 1
    (root / "labelled_images" / "Polyp").mkdir()
    for frame in (1, 2):
        Image.new("RGB", (30, 30)).save(root / "labelled_images/Polyp" / f"ffcafe_{frame}.jpg")
    (root / "official_splits").mkdir()
    for number, lines in rows.items():
        (root / "official_splits" / f"split_{number}.csv").write_text("\n".join(["filename,label", *lines]) + "\n")
    header = "filename,video_id,frame_number,finding_category,finding_class,x1,y1,x2,y2,x3,y3,x4,y4"
    lines = [
        "00cafe_1.jpg,00cafe,1,Luminal,Angiectasia,1,2,9,2,9,8,1,8",
        "01cafe_2.jpg,01cafe,1,L,Blood" + "," * 8,
    ]
    (root / "metadata.csv").write_text("\n".join([header, *lines]).replace(",", ";") + "\n")
    return Miniature(root=root, samples=count + 2, tasks=("kvasir-capsule-11",))


def edd2020(root: Path) -> Miniature:
    rng = np.random.default_rng(1)
    base = root / "EDD2020_release-I_2020-01-15"
    for folder in ("originalImages", "masks", "bbox"):
        (base / folder).mkdir(parents=True)
    classes = ("BE", "suspicious", "HGD", "cancer", "polyp")
    for number in range(60):
        stem = f"EDD2020_ACB{number:04d}"
        picture = rng.integers(0, 60, (36, 44, 3)).astype(np.uint8)
        lines = []
        for at, name in enumerate(classes):
            if (number >> at) % 2 == 0 and number % 7:
                continue
            mask = np.zeros((36, 44), np.uint8)
            mask[4 * at : 4 * at + 10, 6 * at : 6 * at + 12] = 255
            picture[mask > 0] = (40 * at + 60, 250 - 40 * at, 128)
            Image.fromarray(mask).save(base / "masks" / f"{stem}_{name}.tif")
            lines.append(f"{6 * at} {4 * at} {6 * at + 12} {4 * at + 10} {name}")
        Image.fromarray(picture).save(base / "originalImages" / f"{stem}.jpg", quality=95)
        (base / "bbox" / f"{stem}.txt").write_text("\n".join(lines) + "\n")
    (base / "class_list.txt").write_text("\n".join(classes) + "\n")
    return Miniature(root=root, samples=60, tasks=("edd2020-5",), masks=True)


SCENE = (("background-tissue", (0, 0, 0)), ("instrument-shaft", (0, 255, 0)), ("instrument-clasper", (0, 255, 255)))


def endovis18(root: Path) -> Miniature:
    rng = np.random.default_rng(2)
    release = {
        1: "miccai_challenge_2018_release_1",
        2: "miccai_challenge_2018_release_1",
        5: "miccai_challenge_release_2",
    }
    for number in (1, 2, 3, 5, 8):
        sequence = root / release.get(number, "miccai_challenge_release_3") / f"seq_{number}"
        for folder in ("left_frames", "right_frames", "labels"):
            (sequence / folder).mkdir(parents=True)
        for frame in (0, 1, 10):
            colours = np.zeros((40, 50, 3), np.uint8)
            colours[5:20, 5:25] = SCENE[1][1]
            colours[20:35, 10:40] = SCENE[2][1]
            picture = (colours // 2 + rng.integers(0, 80, colours.shape)).astype(np.uint8)
            Image.fromarray(picture).save(sequence / "left_frames" / f"frame{frame:03d}.png")
            Image.fromarray(picture).save(sequence / "right_frames" / f"frame{frame:03d}.png")
            Image.fromarray(colours).save(sequence / "labels" / f"frame{frame:03d}.png")
    items = [{"name": name, "color": list(colour), "classid": number} for number, (name, colour) in enumerate(SCENE)]
    (root / "miccai_challenge_2018_release_1/labels.json").write_text(json.dumps(items))
    return Miniature(root=root, samples=15, masks=True)


def autolaparo(root: Path) -> Miniature:
    """Videos of eight seconds; one label file has a line for every frame, the others one a second, one begins late."""
    base = root / "AutoLaparo_Task1"
    (base / "videos").mkdir(parents=True)
    (base / "labels").mkdir()
    rate, samples = 5, 0
    for number in (1, 2, 11, 12, 15, 16):
        seconds = 8
        with av.open(str(base / "videos" / f"{number:02d}.mp4"), "w") as container:
            stream = container.add_stream("mpeg4", rate=rate)
            stream.width = stream.height = 48
            stream.pix_fmt = "yuv420p"
            for frame in range(seconds * rate):
                phase = frame // rate % 7 + 1
                picture = np.full((48, 48, 3), 30 * phase, np.uint8)
                picture[:, : 6 * phase] = 255 - 30 * phase
                picture[: 2 * number, :32] //= 2  # no two videos are alike
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
        step = 1 if number == 2 else rate
        lines = [f"{line + 1}\t{frame // rate % 7 + 1}" for line, frame in enumerate(range(0, seconds * rate, step))]
        late = 2 if number == 15 else 0  # its first seconds are not annotated
        (base / "labels" / f"label_{number:02d}.txt").write_text("\n".join(["Frame\tPhase", *lines[late:]]) + "\n")
        samples += seconds - late
    return Miniature(root=root, samples=samples, tasks=("autolaparo-7",))


WRITERS = {"kvasir-capsule": kvasir, "edd2020": edd2020, "endovis18": endovis18, "autolaparo": autolaparo}
