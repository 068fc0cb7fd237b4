"""Cards are compared with counts made from the written files by the standard library."""

import csv
import json
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import typer
from miniatures import WRITERS
from PIL import Image
from typer.testing import CliRunner

from cli.card import card
from featstore.card import describe, make_card, usual_columns
from featstore.card_text import markdown, sections
from featstore.configs import RegisterConfig, RunConfig, SetConfig
from featstore.errors import ConfigError, DecodeError, UnknownNameError
from featstore.extraction.pipeline import extract
from featstore.extraction.plan import make_plan
from featstore.images.headers import read_header
from featstore.images.opening import OpenFiles
from featstore.images.part import WHOLE, Part
from featstore.inputs import Inputs
from featstore.register import register
from featstore.store.catalog import Store


def mini(adapter: str, folder: Path, **more: Any) -> tuple[Store, Path]:
    """A store with the miniature as `mine`, and its folder."""
    (folder / "data").mkdir()
    made = WRITERS[adapter](folder / "data")
    register(folder / "store", "mine", made.root, RegisterConfig(adapter=adapter, **made.config, **more))
    return Store(folder / "store"), made.root


def write_csv(path: Path, header: list[str], rows: list[list[Any]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# ---- miniatures


def test_chexpert_counts_equal_those_of_its_tables(tmp_path: Path) -> None:
    store, root = mini("chexpert", tmp_path)
    made = make_card(store, "mine", images=0)
    rows = {"train": read_csv(root / "train.csv"), "val": read_csv(root / "valid.csv")}
    for split, table in rows.items():
        assert made["splits"][split] == len(table)
        for label in ("Cardiomegaly", "No Finding", "Pleural Effusion"):
            counts = Counter(row[label] for row in table)
            told = made["labels"][label]["splits"][split]
            wanted = {"positive": "1.0", "negative": "0.0", "uncertain": "-1.0", "blank": ""}
            assert {key: told[key] for key in wanted} == {key: counts[text] for key, text in wanted.items()}
            said = counts["1.0"] + counts["0.0"]
            assert told["prevalence"] == pytest.approx(counts["1.0"] / said, abs=1e-6)
            assert told["of_all"] == pytest.approx(counts["1.0"] / len(table), abs=1e-6)
        views = made["columns"]["Frontal/Lateral"]
        assert views["about"] == "view"
        assert views["splits"][split]["counts"] == Counter(row["Frontal/Lateral"] for row in table)
        ages = [float(row["Age"]) for row in table]
        spread = made["columns"]["Age"]["splits"][split]["quantiles"]
        assert (spread["0%"], spread["50%"], spread["100%"]) == (min(ages), statistics.median(ages), max(ages))
        patients = Counter(row["Path"].split("/")[2] for row in table)
        assert made["groups"]["splits"][split] == len(patients)
    every = Counter(row["Path"].split("/")[2] for table in rows.values() for row in table)
    assert made["groups"]["samples_each"]["max"] >= max(every.values())
    assert made["groups_known"] is True
    assert made["files"]["files"] == sum(made["splits"].values())
    assert made["files"]["bytes"] == sum(path.stat().st_size for path in root.rglob("*.jpg"))
    assert made["sample"] is None


def test_nih_ages_views_and_sexes(tmp_path: Path) -> None:
    store, root = mini("nih", tmp_path)
    made = make_card(store, "mine")
    rows = read_csv(root / "Data_Entry_2017_v2020.csv")
    told = made["columns"]["View Position"]["splits"]
    assert sum((Counter(part["counts"]) for part in told.values()), Counter()) == Counter(
        row["View Position"] for row in rows
    )
    assert made["columns"]["Patient Age"]["about"] == "age"
    positives = sum("Effusion" in row["Finding Labels"].split("|") for row in rows)
    assert sum(part["positive"] for part in made["labels"]["Effusion"]["splits"].values()) == positives
    sizes = Counter(row["Patient ID"] for row in rows).values()
    each = made["groups"]["samples_each"]
    assert (each["min"], each["median"], each["max"]) == (min(sizes), statistics.median(sizes), max(sizes))
    held = made["sample"]
    assert held["kinds"] == {"PNG": len(rows)}
    assert held["photometric"] == {"grey": len(rows) - 1, "RGB with alpha": 1}  # some originals are RGBA
    assert held["bits"] == {"8": len(rows)}


def test_vindr_votes_and_unknown_patients(tmp_path: Path) -> None:
    store, root = mini("vindr-cxr", tmp_path)
    made = make_card(store, "mine", images=9)
    votes: dict[str, list[str]] = {}
    for row in read_csv(next(root.rglob("image_labels_train.csv"))):
        votes.setdefault(row["image_id"], []).append(row["No finding"])
    told = made["labels"]["No finding"]["splits"]["train"]
    assert told["positive"] == sum(group.count("1") > len(group) / 2 for group in votes.values())
    assert told["positive_any"] == sum("1" in group for group in votes.values())
    assert told["positive_any"] > told["positive"]
    assert (made["groups"], made["groups_known"]) == (None, False)
    assert made["sample"]["images"] == 9
    assert list(made["sample"]["kinds"]) == ["DICOM"]
    assert set(made["sample"]["photometric"]) <= {"MONOCHROME1", "MONOCHROME2"}
    assert made["sample"]["compression"]
    text = markdown(made)
    assert "patients unknown: no leak of patients can be excluded" in text
    assert "readers' votes by majority" in text


def test_msd_volumes_masks_and_slice_sizes(tmp_path: Path) -> None:
    import nibabel

    store, root = mini("msd", tmp_path)
    made = make_card(store, "mine")
    files = [
        path for path in sorted((root / "Task01_BrainTumour/imagesTr").iterdir()) if not path.name.startswith("._")
    ]
    depths = [nibabel.load(path).shape[2] for path in files]
    assert made["volumes"]["count"] == len(files)
    assert made["volumes"]["samples_each"] == {
        "min": min(depths), "median": statistics.median(depths), "max": max(depths)
    }  # fmt: skip
    assert sum(made["splits"].values()) == sum(depths) == made["masks"]["samples"]
    assert made["masks"]["classes"][0] == "background"
    assert made["files"]["bytes"] == sum(path.stat().st_size for path in files)  # a file's slices share its bytes
    assert "mask classes: 0 background" in markdown(made)


def test_camelyon_slides_and_tiles(tmp_path: Path) -> None:
    store, _ = mini("camelyon16", tmp_path)
    made = make_card(store, "mine")
    manifest = store.manifest("mine")
    slides = Counter(manifest.place("volume"))
    assert made["volumes"]["count"] == len(slides)
    assert made["volumes"]["samples_each"]["max"] == max(slides.values())
    assert made["sample"]["kinds"] == {"slide": len(manifest)}
    part = manifest.place("part")[0]
    height, width = (part.partition(f"{side}=")[2].split("&")[0] for side in ("height", "width"))
    assert made["sample"]["sizes"] == {f"{height}x{width}": len(manifest)}


@pytest.mark.parametrize("adapter", ["nih", "chexpert", "msd"])
def test_no_id_of_a_patient_stands_in_a_card_and_it_is_repeatable(adapter: str, tmp_path: Path) -> None:
    store, _ = mini(adapter, tmp_path)
    made = make_card(store, "mine", images=7)
    assert made == make_card(store, "mine", images=7)
    assert markdown(made) == markdown(json.loads(json.dumps(made)))
    assert make_card(store, "mine", images=7, seed=1)["sample"]["seed"] == 1
    manifest = store.manifest("mine")
    told = json.dumps(made) + markdown(made)
    for column in ("id", "path"):
        assert not [value for value in manifest.column(column) if value in told]
    assert str(tmp_path) not in told


# ---- columns


def column(values: list[Any], splits: list[str] | None = None, **more: Any) -> dict[str, Any]:
    table = pa.table({"split": splits or ["train"] * len(values), "x": values})
    return describe(table, "x", **more)


def test_spellings_of_zero_and_one_are_one_value() -> None:
    told = column(["1", "1.0", " 1 ", "0", "0.0", "-1", "-1.0", "", None])
    assert told["kind"] == "binary"
    assert told["splits"]["train"] == {
        "positive": 3, "negative": 2, "uncertain": 2, "blank": 2, "prevalence": 0.6, "of_all": 0.333333
    }  # fmt: skip


def test_votes_of_readers_and_ties() -> None:
    told = column(["1|1|0", "1|0", "-1|-1", "|", "0|-1", "-1|1"])["splits"]["train"]
    assert (told["positive"], told["negative"], told["uncertain"], told["blank"]) == (2, 2, 1, 1)
    assert told["positive_any"] == 3


def test_numbers_are_quantiles_and_few_of_them_are_counted() -> None:
    values = [str(number) for number in range(2, 33)] + ["", None]
    told = column(values, ["train"] * 30 + ["test"] * 3)
    assert told["kind"] == "numeric"
    quantiles = np.quantile(np.arange(2, 32), [0, 0.25, 0.5, 0.75, 1])
    assert list(told["splits"]["train"]["quantiles"].values()) == pytest.approx(list(quantiles))
    assert told["splits"]["test"] == {
        "values": 1, "blank": 2, "quantiles": dict.fromkeys(["0%", "25%", "50%", "75%", "100%"], 32.0)
    }  # fmt: skip
    few = column(["3", "2", "3"])
    assert (few["kind"], few["splits"]["train"]["counts"]) == ("categorical", {"3": 2, "2": 1})


def test_ages_with_units_are_years() -> None:
    told = column(["045Y", "006M", "14D", "63", None], age=True)["splits"]["train"]
    assert (told["values"], told["blank"]) == (4, 1)
    assert told["quantiles"]["0%"] == pytest.approx(14 / 365.25, abs=1e-4)
    assert told["quantiles"]["100%"] == 63
    assert column(["45", "adult"], age=True)["kind"] == "categorical"


def test_many_values_are_cut_at_twenty() -> None:
    told = column([f"v{number:02d}" for number in range(25)] + ["v24", "nan"])["splits"]["train"]
    assert len(told["counts"]) == 20
    assert next(iter(told["counts"].items())) == ("v24", 2)
    assert (told["others"], told["other_values"]) == (6, 6)


def test_columns_that_are_no_text_and_columns_of_nothing() -> None:
    assert column([1, 0, 1])["splits"]["train"]["positive"] == 2
    assert column([None, None])["splits"]["train"] == {"counts": {}, "blank": 2}
    assert column([0.5, None], ["", "val"])["splits"].keys() == {"val", "none"}
    assert describe(pa.table({"split": ["train", "val"]}), "split")["splits"]["val"]["counts"] == {"val": 1}


def test_usual_columns_are_known_by_name() -> None:
    names = ["View Position", "Patient Gender", "AGE", "PatientSex_DICOM", "source_view", "Findings", "AP/PA"]
    assert usual_columns(names) == {
        "View Position": "view", "Patient Gender": "sex", "AGE": "age", "PatientSex_DICOM": "sex",
        "source_view": "view", "AP/PA": "view",
    }  # fmt: skip


# ---- files


def pictures(root: Path) -> None:
    root.mkdir()
    grey = np.arange(30 * 20).reshape(30, 20)
    Image.fromarray(grey.astype(np.uint8)).save(root / "a.png")
    (root / "b.png").write_bytes((root / "a.png").read_bytes())
    Image.fromarray(grey.astype(np.uint16) * 100).save(root / "c.png")
    Image.fromarray(np.dstack([grey] * 3).astype(np.uint8)).save(root / "d.jpg")
    Image.fromarray(grey.astype(np.float32)).save(root / "e.tiff")
    Image.fromarray(grey.astype(np.uint16)).save(root / "f.tiff", compression="tiff_lzw")
    Image.fromarray(grey.astype(np.uint8)).save(root / "g.webp")
    np.save(root / "h.npy", grey.astype(np.uint16))
    (root / "i.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
    (root / "j.png").write_bytes(b"no image at all")
    names = [f"{path.name}" for path in sorted(root.iterdir())] + ["k.png"]
    rows = [[name, "train" if number % 2 else "test", "a|b<c\nd"] for number, name in enumerate(names)]
    write_csv(root / "table.csv", ["path", "part", "place"], rows)


CONFIG = RegisterConfig(table=Path("table.csv"), split_column="part", allow_missing=True, frames="first")


def test_sizes_bits_and_colours_of_a_sample(tmp_path: Path) -> None:
    pictures(tmp_path / "data")
    register(tmp_path / "store", "x", tmp_path / "data", CONFIG)
    told: list[int] = []
    made = make_card(Store(tmp_path / "store"), "x", advance=told.append)
    held = made["sample"]
    assert (held["of"], held["images"], sum(told)) == (10, 10, 10)
    assert made["files"]["missing"] == 1
    assert held["kinds"] == {"PNG": 3, "TIFF": 2, "JPEG": 1, "NPY": 1, "WebP": 1}
    assert held["bits"] == {"8": 4, "16": 3, "32": 1}
    assert held["photometric"] == {"grey": 6, "RGB": 2}  # WebP has no grey
    assert held["sizes"] == {"30x20": 8}
    assert held["height"] == {"min": 30, "median": 30.0, "max": 30}
    assert held["compression"] == {"raw": 1, "tiff_lzw": 1}
    assert len(held["unreadable"]) == 2
    small = make_card(Store(tmp_path / "store"), "x", images=3)["sample"]
    assert (small["images"], small["of"]) == (3, 10)


def test_duplicates_and_failures_are_told_once_they_are_known(tmp_path: Path) -> None:
    pictures(tmp_path / "data")
    register(tmp_path / "store", "x", tmp_path / "data", CONFIG)
    store = Store(tmp_path / "store")
    before = make_card(store, "x", images=0)
    assert before["duplicates"]["hashed"] == 0
    assert "not known: no file was hashed" in markdown(before)
    run = RunConfig(device="cpu", workers=1, max_failed="100%")
    extract(make_plan(store, "x", SetConfig(model="tiny", res="28", compute_dtype="float32"), run), run)
    after = make_card(store, "x", images=0)
    assert after["duplicates"] == {"hashed": 10, "sets": 1, "samples": 2}
    (failed,) = after["failures"].values()
    assert (failed["failed"], failed["pending"], sum(failed["reasons"].values())) == (3, 0, 3)
    assert "the file was missing at registration" in failed["reasons"]
    assert "3 images failed" in markdown(after)
    write_csv(tmp_path / "data/table.csv", ["path", "part"], [["a.png", "train"]])
    register(tmp_path / "store", "x", tmp_path / "data", CONFIG)
    assert make_card(store, "x", images=0)["failures"] == {}  # the set is of the earlier manifest


@pytest.mark.parametrize("damaged", ["spec.json", "ledger", "commits"])
def test_a_damaged_set_is_listed_and_stops_no_card(damaged: str, tmp_path: Path) -> None:
    pictures(tmp_path / "data")
    register(tmp_path / "store", "x", tmp_path / "data", CONFIG)
    store, run = Store(tmp_path / "store"), RunConfig(device="cpu", workers=1, max_failed="100%")
    for res in ("28", "42"):
        extract(make_plan(store, "x", SetConfig(model="tiny", res=res, compute_dtype="float32"), run), run)
    whole = make_card(store, "x", images=0)
    (bad,) = (entry for entry in store.find("x", "tiny@28"))
    files = [path for path in bad.folder.rglob("*") if path.is_file() and damaged in str(path.relative_to(bad.folder))]
    assert files
    for path in files:
        path.write_bytes(path.read_bytes()[:-40])
    made = make_card(Store(tmp_path / "store"), "x", images=0)
    assert made["unreadable_sets"] == [bad.full_name]
    assert list(made["failures"]) == [name for name in whole["failures"] if name != bad.full_name]
    assert len(made["failures"]) == 1
    assert f"- {bad.full_name}: unreadable, and not counted; `featstore verify` tells why" in markdown(made)
    assert whole["unreadable_sets"] == []


def test_text_of_a_table_cannot_leave_its_cell(tmp_path: Path) -> None:
    pictures(tmp_path / "data")
    register(tmp_path / "store", "x", tmp_path / "data", CONFIG)
    made = make_card(Store(tmp_path / "store"), "x", images=0, columns=["place"])
    assert made["columns"]["place"]["about"] == "asked for"
    assert "| a\\|b&lt;c d | 5 | 6 |" in markdown(made)


def test_headers_refuse_what_is_no_image(tmp_path: Path) -> None:
    pictures(tmp_path / "data")
    inputs, opened = Inputs(tmp_path / "data"), OpenFiles()
    with pytest.raises(DecodeError, match=r"damaged or unsupported PNG header"):
        read_header(inputs, "i.png", WHOLE, opened)
    with pytest.raises(DecodeError, match="not an image file of a known kind"):
        read_header(inputs, "j.png", WHOLE, opened)
    with pytest.raises(DecodeError):
        read_header(inputs, "h.npy", Part(index=3), opened)
    with pytest.raises(DecodeError, match=r"damaged or unsupported TIFF header \(EOFError\)"):
        read_header(inputs, "e.tiff", Part(frame=5), opened)


def test_groups_in_two_splits_and_samples_without_one_are_noted(tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    for number in range(4):
        (root / f"{number}.png").write_bytes(b"x")
    rows = [["0.png", "train", "p"], ["1.png", "test", "p"], ["2.png", "val", "q"], ["3.png", "", ""]]
    write_csv(root / "table.csv", ["path", "part", "patient"], rows)
    asked = RegisterConfig(table=Path("table.csv"), split_column="part", group_column="patient")
    register(tmp_path / "store", "x", root, asked)
    made = make_card(Store(tmp_path / "store"), "x", images=0)
    assert made["splits"] == {"train": 1, "val": 1, "test": 1, "none": 1}
    assert made["groups"]["count"] == 2
    assert made["groups"]["splits"] == {"train": 1, "val": 1, "test": 1}
    text = markdown(made)
    assert "patients: some stand in more than one split" in text
    assert "1 samples belong to none of the patients" in text


# ---- the command


def test_command_prints_tables_json_and_markdown(tmp_path: Path) -> None:
    store, _ = mini("chexpert", tmp_path)
    app = typer.Typer()
    app.command("card")(card)
    asked = ["mine", "--store", str(store.path), "--images", "5"]
    shown = CliRunner().invoke(app, asked)
    assert shown.exit_code == 0, shown.output
    made = make_card(store, "mine", images=5)
    for section in sections(made):
        assert section.title in shown.stdout
    told = CliRunner().invoke(app, [*asked, "--json"])
    assert json.loads(told.stdout) == json.loads(json.dumps(made))
    written = CliRunner().invoke(app, [*asked, "--output", str(tmp_path / "card.md")])
    assert f"wrote {tmp_path / 'card.md'}" in written.stdout
    assert (tmp_path / "card.md").read_text() == markdown(made)
    assert (tmp_path / "card.md").read_text().startswith("# Data card: mine\n\n## Overview\n")


def test_unknown_names_and_counts_are_refused(tmp_path: Path) -> None:
    store, _ = mini("table", tmp_path)
    with pytest.raises(ConfigError, match="--images is a number of images to look at, 0 or more; got -1"):
        make_card(store, "mine", images=-1)
    with pytest.raises(UnknownNameError, match="--columns none: data set 'mine' has no such column; its columns: id"):
        make_card(store, "mine", columns=["bright", "none"])
    with pytest.raises(UnknownNameError, match="unknown data set 'other'"):
        make_card(store, "other")


@pytest.mark.realdata
def test_card_of_real_radiographs(shared_data: Path, tmp_path: Path) -> None:
    asked = RegisterConfig(
        table=shared_data / "cxr/metadata.csv",
        group_column="patient_id",
        split_column="split",
        study_column="study_id",
        label_columns="Effusion,Pneumonia",
        hash=True,
    )
    register(tmp_path / "store", "cxr", shared_data / "cxr", asked)
    made = make_card(Store(tmp_path / "store"), "cxr")
    rows = read_csv(shared_data / "cxr/metadata.csv")
    assert made["splits"] == Counter(row["split"] for row in rows)
    assert made["groups"]["count"] == len({row["patient_id"] for row in rows}) == 676
    for split in ("train", "val", "test"):
        counts = Counter(row["Effusion"] for row in rows if row["split"] == split)
        told = made["labels"]["Effusion"]["splits"][split]
        assert (told["positive"], told["negative"], told["blank"]) == (counts["1"], counts["0"], counts[""])
    repeats = [count for count in Counter(row["sha256"] for row in rows).values() if count > 1]
    assert made["duplicates"] == {"hashed": len(rows), "sets": len(repeats), "samples": sum(repeats)}
    assert sum(made["sample"]["kinds"].values()) == 200
