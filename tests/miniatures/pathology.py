"""Camelyon16, Camelyon17 and BCNB, in miniature: pyramids of a few hundred pixels."""

import json
from pathlib import Path

import openpyxl
from PIL import Image
from slide_files import asap_xml, draw_slide, write_slide

from featstore.datasets.splits import split_by_group
from miniatures import Miniature

OPTIONS = {"option": ["tile=40", "min_tissue=0.9", "max_tiles=2"]}
TUMOUR = [(60, 60), (140, 60), (140, 140), (60, 140)]


def _slide(path: Path, sick: bool, seed: int, *, mpp: float | None = 0.25) -> None:
    picture = draw_slide(240, 200, [(100, 100, 70)], seed=seed, red=220 if sick else 110)
    write_slide(path, picture, levels=2, mpp=mpp)


def camelyon16(root: Path) -> Miniature:
    """With the slides known to be wrong (086, 049), in the spelling of one release that writes capitals."""
    for number in range(1, 13):
        _slide(root / f"training/normal/Normal_{number:03d}.tif", False, number)
        _slide(root / f"training/tumor/tumor_{number:03d}.tif", True, 100 + number)
    _slide(root / "training/normal/Normal_086.tif", True, 86)
    lines = []
    (root / "annotations").mkdir()
    for number in range(1, 13):
        text = asap_xml([("Tumor", TUMOUR)])
        (root / f"annotations/tumor_{number:03d}.xml").write_text(text)
    for number in (1, 2, 3, 4, 49):
        sick = number % 2 == 1
        _slide(root / f"testing/images/test_{number:03d}.tif", sick, 200 + number)
        lines.append(f"test_{number:03d},{'Tumor' if sick else 'Normal'},{'IDC' if sick else 'None'},Macro")
    (root / "testing/reference.csv").write_text("\n".join(lines) + "\n")
    return Miniature(root=root, samples=2 * 28, config=OPTIONS, tasks=("camelyon16-slide",), masks=True)


def camelyon17(root: Path) -> Miniature:
    """Rows of patients (.zip) between those of slides; a patient of the test set has no stage."""
    lines = ["patient,stage"]
    slides = 0
    for patient in (*range(0, 100, 5), 150):
        stages = ("negative", "macro") if patient % 10 else ("negative", "itc")
        if patient < 100:
            lines.append(f"patient_{patient:03d}.zip,pN{patient % 10 and 1}")
        for node, stage in enumerate(stages):
            name = f"patient_{patient:03d}_node_{node}"
            _slide(root / f"Center_{patient % 100 // 20}/{name}.tif", stage != "negative", patient * 5 + node, mpp=None)
            slides += 1
            if patient < 100:
                lines.append(f"{name}.tif,{stage}")
    (root / "stages.csv").write_text("\n".join(lines) + "\n")
    (root / "patient_005_node_1.xml").write_text(asap_xml([("metastases", TUMOUR), ("normal", TUMOUR[:3])]))
    return Miniature(
        root=root,
        samples=2 * slides,
        config=OPTIONS,
        tasks=("camelyon17-slide", "camelyon17-stage4", "camelyon17-unseen-b"),
        masks=True,
    )


def bcnb(root: Path) -> Miniature:
    book = openpyxl.Workbook()
    sheet = book.active
    sheet.append(["Patient ID", "Age(years)", "ER", "PR", "HER2 Expression", "Ki67", "ALN status"])
    (root / "WSIs").mkdir()
    names = [str(number) for number in range(1, 51)]
    splits = split_by_group(names)
    for number, split in enumerate(splits, 1):
        place = splits[: number - 1].count(split)  # so that every split has both values of every label
        sick = place % 2 == 1
        picture = draw_slide(160, 120, [(80, 60, 45)], seed=number, red=220 if sick else 110)
        Image.fromarray(picture).save(root / "WSIs" / f"{number}.jpg", quality=95)
        (root / "WSIs" / f"{number}.json").write_text(json.dumps({"positive": [{"vertices": TUMOUR}], "negative": []}))
        words = ("Positive", "Negative") if sick else ("Negative", "Positive")
        sheet.append([number, 40 + number, *words, "Positive", 20 if sick else 5, "N+(1-2)" if place % 3 else "N0"])
    book.save(root / "patient-clinical-data.xlsx")
    tasks = ("bcnb-aln", "bcnb-er", "bcnb-pr", "bcnb-ki67")
    config = {"option": ["tile=40", "min_tissue=0.9", "max_tiles=1"]}
    return Miniature(root=root, samples=50, config=config, tasks=tasks, masks=True)


WRITERS = {"camelyon16": camelyon16, "camelyon17": camelyon17, "bcnb": bcnb}
