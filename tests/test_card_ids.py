"""No column that tells samples or patients apart comes into a card."""

import csv
from pathlib import Path

import pytest
from miniatures import WRITERS

from featstore.card import identifies, make_card
from featstore.card_text import markdown
from featstore.configs import RegisterConfig
from featstore.errors import ConfigError
from featstore.register import register
from featstore.store.catalog import Store


def listed(folder: Path, columns: dict[str, list[str]], group: str | None = "patient", labels: str = "") -> Store:
    """40 samples of 20 patients (of nobody knows whom without `group`) and these columns, registered as `x`."""
    root = folder / "data"
    root.mkdir(parents=True)
    names = [f"{number:02d}.png" for number in range(40)]
    for name in names:
        (root / name).write_bytes(b"x")
    patients = [f"p{1000 + number // 2}" for number in range(40)]
    rows = [list(row) for row in zip(names, patients, *columns.values(), strict=True)]
    with (root / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["path", "patient", *columns], *rows])
    asked = RegisterConfig(table=Path("table.csv"), group_column=group, label_columns=labels)
    register(folder / "store", "x", root, asked)
    return Store(folder / "store")


@pytest.mark.parametrize("name", ["id", "path", "group", "study", "mask_path", "content"])
def test_columns_of_ids_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"--columns {name}: this column names samples, patients or files"):
        make_card(listed(tmp_path, {}), "x", images=0, columns=[name])


def test_hash_part_and_volume_are_refused_where_they_say_where_a_sample_lies(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    made = WRITERS["msd"](tmp_path / "data")
    register(tmp_path / "store", "mine", made.root, RegisterConfig(adapter="msd", hash=True, **made.config))
    store = Store(tmp_path / "store")
    for name in ("part", "volume", "hash"):
        with pytest.raises(ConfigError, match=f"--columns {name}: this column names samples"):
            make_card(store, "mine", images=0, columns=[name])
    table = listed(tmp_path / "own", {"part": ["left", "right"] * 20})
    assert make_card(table, "x", images=0, columns=["part"])["columns"]["part"]["kind"] == "categorical"


PATIENT = [number // 2 for number in range(40)]
IDS = {
    "names": [f"name {number}" for number in PATIENT],
    "images": [f"image {number}" for number in range(40)],
    "numbers": [str(1000 + number) for number in PATIENT],  # the number in each group
    "floats": [f"{1000 + number}.0" for number in PATIENT],
    "records": [str(7300000 + 13 * number) for number in PATIENT],
    "zeros": [f"{number:04d}" for number in PATIENT],
    "dates": [str(20150301 + number) for number in PATIENT],
    "with unknown": ["N/A" if number < 26 else f"image {number}" for number in range(40)],
    "with blanks": ["" if number < 15 else f"name {number}" for number in PATIENT],
    "text": ["no finding" if number % 3 == 0 else f"a report of {number}" for number in range(40)],
}


@pytest.mark.parametrize("name", IDS)
def test_columns_that_tell_patients_or_samples_apart_are_refused(name: str, tmp_path: Path) -> None:
    store = listed(tmp_path, {name: IDS[name]})
    with pytest.raises(ConfigError, match=f"--columns {name}: its values tell samples or groups apart"):
        make_card(store, "x", images=0, columns=[name])


def test_values_that_many_share_and_amounts_are_described(tmp_path: Path) -> None:
    shared = {
        "sex": ["F", "M", "F", "F"] * 10,
        "age": [f"{20 + number:03d}Y" for number in PATIENT],
        "dose": [str(10 * number + 5) for number in range(40)],
        "score": [f"{number / 7:.3f}" for number in range(40)],
        "scanner": [f"scanner {number % 3}" for number in PATIENT[:-2]] + ["rare", "rare"],
        "finding": [str(number % 2) for number in range(40)],
        "constant": ["CT"] * 40,
        "empty": [""] * 40,
    }
    store = listed(tmp_path, shared)
    made = make_card(store, "x", images=0, columns=list(shared))
    assert set(made["columns"]) == set(shared)
    assert made["columns"]["age"]["about"] == "age"  # asked for or not
    assert made["columns"]["age"]["kind"] == made["columns"]["dose"]["kind"] == "numeric"
    assert not any("left out" in note for note in made["notes"])


def test_labels_and_usual_columns_that_are_ids_are_left_out_with_a_note(tmp_path: Path) -> None:
    store = listed(
        tmp_path, {"caption": IDS["images"], "kind": ["a", "b"] * 20, "view": IDS["names"]}, labels="caption,kind"
    )
    made = make_card(store, "x", images=0)
    assert list(made["labels"]) == ["kind"]
    assert made["columns"] == {}
    assert [note.split()[1] for note in made["notes"] if "left out: its values tell" in note] == ["caption", "view"]
    text = markdown(made)
    assert "column caption is left out" in text
    assert not [value for value in IDS["images"] + IDS["names"] if value in text]


def test_samples_are_told_apart_where_patients_are_unknown(tmp_path: Path) -> None:
    manifest = listed(tmp_path, {"pairs": IDS["names"], "images": IDS["images"]}, None).manifest("x")
    assert identifies(manifest, "images")
    assert not identifies(manifest, "pairs")  # of two samples each, and nobody knows that they are one patient's
    assert identifies(listed(tmp_path / "known", {"pairs": IDS["names"]}).manifest("x"), "pairs")
