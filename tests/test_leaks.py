"""Leaks are told by brute force over all pairs, and by what was planted."""

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import typer
from PIL import Image
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGBaseline8Bit, SecondaryCaptureImageStorage, generate_uid
from standins import write_nih
from typer.testing import CliRunner

from cli.leaks import leaks
from featstore.configs import RegisterConfig, RunConfig, SetConfig
from featstore.errors import ConfigError, TaskError, UnknownNameError
from featstore.extraction.pipeline import extract
from featstore.extraction.plan import make_plan
from featstore.register import register
from featstore.store.catalog import Store
from featstore.store.features import FeatureSet
from featstore.store.hashes import file_hashes
from probes import duplicates, similar
from probes.duplicates import Vectors
from probes.leaks import find_leaks
from probes.similar import Question


def shades(seed: int, size: int = 56) -> np.ndarray:
    """A smooth picture that no other seed resembles."""
    grid = np.random.default_rng(seed).integers(10, 230, (6, 6)).astype(np.uint8)
    return np.array(Image.fromarray(grid).resize((size, size), Image.Resampling.BICUBIC))


def write_csv(path: Path, header: list[str], rows: list[list[Any]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def embed(path: Path, name: str, res: str = "28") -> FeatureSet:
    store, run = Store(path), RunConfig(device="cpu", workers=1)
    extract(make_plan(store, name, SetConfig(model="tiny", res=res, compute_dtype="float32"), run), run)
    return store[name, f"tiny@{res}"]


def planted(root: Path, store: Path) -> None:
    """24 pictures of 12 patients; two to each. Then copies in test, by patients of their own.

    Patient p5 has one picture in train and one in val; picture 9 repeats picture 8 of the same patient and split.
    """
    root.mkdir()
    rows: list[list[Any]] = []
    for number in range(24):
        Image.fromarray(shades(8 if number == 9 else number)).save(root / f"{number:02d}.png")
        split = "train" if number < 16 else "val" if number < 20 else "test"
        rows.append([f"{number:02d}.png", f"p{number // 2}", f"s{number // 4}", "val" if number == 11 else split])
    (root / "copy.png").write_bytes((root / "00.png").read_bytes())
    Image.fromarray(shades(1)).save(root / "jpeg.jpg", quality=90)
    Image.fromarray(np.clip(shades(2).astype(int) + 5, 0, 255).astype(np.uint8)).save(root / "brighter.png")
    Image.fromarray(shades(3)[:, ::-1].copy()).save(root / "mirrored.png")
    Image.fromarray(shades(16)).save(root / "later.jpg", quality=90)  # the same patient as in val
    for name, patient in (("copy.png", "x0"), ("jpeg.jpg", "x1"), ("brighter.png", "x2"), ("mirrored.png", "x3")):
        rows.append([name, patient, patient, "test"])
    rows.append(["later.jpg", "p8", "s9", "test"])
    write_csv(root / "table.csv", ["path", "patient", "exam", "part"], rows)
    register(store, "planted", root, config(group_column="patient"))
    register(store, "unknown", root, config())


def config(**more: Any) -> RegisterConfig:
    return RegisterConfig(table=Path("table.csv"), split_column="part", study_column="exam", **more)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("leaks")
    planted(folder / "data", folder / "store")
    embed(folder / "store", "planted")
    embed(folder / "store", "unknown")
    return folder / "store"


def unit(values: np.ndarray) -> np.ndarray:
    values = values.astype(np.float64)
    return np.asarray(values / np.linalg.norm(values, axis=1, keepdims=True))


def brute_force(features: FeatureSet, name: str, threshold: float, groups: list[Any]) -> tuple[set[Any], int]:
    """({ids} of pairs in different splits and groups, number of those of one group) by a loop over all pairs."""
    values, split, ids = unit(features.load(name)), features.manifest.column("split"), features.manifest.column("id")
    found, within = set(), 0
    for a in range(len(ids)):
        for b in range(a):
            if split[a] != split[b] and "" not in (split[a], split[b]) and values[a] @ values[b] >= threshold:
                if groups[a] == groups[b]:
                    within += 1
                else:
                    found.add(frozenset((ids[a], ids[b])))
    return found, within


# ---- one data set


def test_planted_copies_are_found_and_a_mirrored_one_is_not(home: Path) -> None:
    found = find_leaks(Store(home), "planted")
    assert found.similar is not None
    pairs = {frozenset(pair.ids) for pair in found.similar.pairs}
    assert pairs == {
        frozenset(("00.png", "copy.png")),
        frozenset(("01.png", "jpeg.jpg")),
        frozenset(("02.png", "brighter.png")),
    }
    assert found.similar.count == 3
    assert [pair.identical for pair in found.similar.pairs] == [True, False, False]
    assert found.similar.one_group == 1  # of patient p8
    assert all(pair.groups == "different" for pair in found.similar.pairs)
    assert found.similar.largest == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("name", "features"), [("planted", "cls"), ("planted", "mean_patch"), ("unknown", "cls")])
@pytest.mark.parametrize("threshold", [0.99, 0.85, -1.0])
def test_pairs_equal_brute_force(
    home: Path, name: str, features: str, threshold: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "BANK_BYTES", 4 * 64 * 7)  # a few rows, then a last partial tile
    monkeypatch.setattr(duplicates, "QUERY_ROWS", 3)
    monkeypatch.setattr(duplicates, "TILE_ROWS", 2)
    store = Store(home)
    opened = store[name, "tiny@28"]
    groups = opened.manifest.column("group") if name == "planted" else list(range(len(opened)))
    wanted, within = brute_force(opened, features, threshold, groups)
    similar = find_leaks(store, name, question=Question(features=features, threshold=threshold)).similar
    assert similar is not None
    assert {frozenset(pair.ids) for pair in similar.pairs} == wanted
    assert (similar.count, similar.one_group) == (len(wanted), within)
    values = [pair.similarity for pair in similar.pairs]
    assert values == sorted(values, reverse=True)
    if name == "unknown":
        assert {pair.groups for pair in similar.pairs} == {"unknown"}


def test_spreads_equal_brute_force(home: Path) -> None:
    opened = Store(home)["planted", "tiny@28"]
    scores = unit(opened.load("cls"))
    scores = scores @ scores.T
    split, group = (np.array(opened.manifest.column(name)) for name in ("split", "group"))
    other = group[:, None] != group[None, :]
    nearest = [scores[row, (split != "test") & other[row]].max() for row in np.flatnonzero(split == "test")]
    nearest += [scores[row, (split == "train") & other[row]].max() for row in np.flatnonzero(split == "val")]
    np.fill_diagonal(scores, -2)
    within = [scores[row, ~other[row]].max() for row in range(len(group)) if (~other[row]).sum() > 1]
    similar = find_leaks(Store(home), "planted").similar
    assert similar is not None
    assert similar.across is not None
    assert similar.within is not None
    for spread, wanted in ((similar.across, nearest), (similar.within, within)):
        assert list(spread) == ["0%", "25%", "50%", "75%", "95%", "99%", "100%"]
        shares = [float(name[:-1]) / 100 for name in spread]
        np.testing.assert_allclose(list(spread.values()), np.quantile(wanted, shares), atol=1e-5)


def test_top_lists_the_most_similar_and_judges_none(home: Path) -> None:
    opened = Store(home)["planted", "tiny@28"]
    found = find_leaks(Store(home), "planted", question=Question(top=5))
    every = find_leaks(Store(home), "planted", question=Question(threshold=-1.0)).similar
    assert found.similar is not None
    assert every is not None
    assert found.similar.pairs == every.pairs[:5]
    assert (found.similar.count, found.similar.threshold, len(opened)) == (0, None, 29)


def test_patients_and_studies_in_two_splits(home: Path) -> None:
    found = find_leaks(Store(home), "planted")
    held = {crossing.what: crossing for crossing in found.crossings}
    # p5 by its own split, p8 by its later picture; exam s2 holds pictures 8 to 11.
    assert held["patient"].examples == ("p5", "p8")
    assert (held["patient"].count, held["patient"].samples) == (2, 5)
    assert held["patient"].by == "the manifest's split"
    assert "volume" not in held
    assert found.groups == "known"
    assert found.splits == {"train": 15, "val": 5, "test": 9}


def test_unknown_patients_are_said_to_be(home: Path) -> None:
    found = find_leaks(Store(home), "unknown")
    assert found.groups == "unknown"
    assert "patients unknown: leaks of patients cannot be excluded" in found.notes
    assert [crossing.what for crossing in found.crossings] == ["study"]
    assert found.similar is not None
    assert found.similar.within is None
    assert found.similar.count == 4  # the picture of p8 too: nobody knows that it is one patient


def test_identical_images_across_and_within_splits(home: Path) -> None:
    identical = find_leaks(Store(home), "planted").identical
    assert (identical.samples, identical.hashed) == (29, 29)
    assert [sorted(Path(sample).stem for sample, _ in same) for same in identical.across] == [["00", "copy"]]
    assert (identical.images, identical.within) == (2, {"train": 1})


def test_hashes_come_from_registration_too(tmp_path: Path) -> None:
    planted(tmp_path / "data", tmp_path / "store")
    store = Store(tmp_path / "store")
    before = find_leaks(store, "planted")
    assert (before.identical.hashed, before.similar) == (0, None)
    assert any("featstore extract --dataset planted" in note for note in before.notes)
    register(tmp_path / "store", "planted", tmp_path / "data", config(group_column="patient", hash=True))
    after = find_leaks(store, "planted").identical
    assert (after.hashed, len(after.across)) == (29, 1)


def test_one_volume_under_two_paths_leaks_slice_by_slice(tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        np.save(root / f"{name}.npy", np.random.default_rng(seed).integers(0, 255, (3, 30, 30)).astype(np.uint8))
    rows = [[f"{name}.npy", part] for name, part in (("a", "train"), ("b", "test"), ("c", "val"))]
    write_csv(root / "table.csv", ["path", "part"], rows)
    asked = RegisterConfig(table=Path("table.csv"), split_column="part", frames="all", hash=True)
    register(tmp_path / "store", "x", root, asked)
    identical = find_leaks(Store(tmp_path / "store"), "x").identical
    assert len(identical.across) == 3
    assert all(len(same) == 2 for same in identical.across)
    assert identical.within == {}


def test_roles_of_a_task_are_judged_beside_the_splits(tmp_path: Path) -> None:
    rows = write_nih(tmp_path / "nih", num_patients=12)
    register(tmp_path / "store", "nih", tmp_path / "nih", RegisterConfig(adapter="nih"))
    found = find_leaks(Store(tmp_path / "store"), "nih", task="nih-14")
    assert found.task == "nih-14"
    assert sum(found.splits.values()) == len(rows)
    assert found.splits["val"] > 0  # the manifest has none: the task carves them out by patient
    assert found.crossings == ()
    with pytest.raises(UnknownNameError, match=r"task 'chexpert-5' reads columns that data set 'nih' lacks: .*nih-14"):
        find_leaks(Store(tmp_path / "store"), "nih", task="chexpert-5")


def test_no_split_says_that_nothing_can_cross(tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    for number in range(3):
        Image.fromarray(shades(0)).save(root / f"{number}.png")
    write_csv(root / "table.csv", ["path", "part"], [[f"{number}.png", ""] for number in range(3)])
    register(tmp_path / "s", "x", root, RegisterConfig(table=Path("table.csv"), split_column="part", hash=True))
    embed(tmp_path / "s", "x")
    found = find_leaks(Store(tmp_path / "s"), "x")
    assert any("no sample has a split" in note for note in found.notes)
    assert found.count == 0
    assert found.similar is not None
    assert (found.similar.compared, found.similar.largest, found.similar.across) == (0, None, None)


# ---- two data sets


def write_rsna_copies(root: Path, names: list[str], source: Path) -> list[str]:
    """RSNA's layout; the images are those of a ChestX-ray14 folder as JPEG inside DICOM. Returns the ids."""
    (root / "stage_2_train_images").mkdir(parents=True)
    ids, matches = [], []
    for number, name in enumerate(names):
        picture = Image.open(next(source.rglob(name))).convert("L")
        data = io.BytesIO()
        picture.save(data, "JPEG", quality=90)
        dataset = pydicom.Dataset()
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
        dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = SecondaryCaptureImageStorage
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid(entropy_srcs=[name])
        dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = picture.height, picture.width, 1
        dataset.PhotometricInterpretation, dataset.PixelRepresentation = "MONOCHROME2", 0
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8, 8, 7
        dataset.PixelData = encapsulate([data.getvalue()])
        ids.append(f"{number:08d}-aaaa-bbbb-cccc-{number:012d}")
        dataset.save_as(root / f"stage_2_train_images/{ids[-1]}.dcm", enforce_file_format=True)
        matches.append([ids[-1], name, 0.5])
    labels = [[image, "", "", "", "", 0] for image in ids]
    write_csv(root / "stage_2_train_labels.csv", ["patientId", "x", "y", "width", "height", "Target"], labels)
    write_csv(root / "rsnamatches.csv", ["patientId", "cxr_match", "mse"], matches)
    return ids


@pytest.fixture(scope="module")
def chests(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, str]], dict[str, str]]:
    """(store, rows of ChestX-ray14, RSNA id -> its image there)."""
    folder = tmp_path_factory.mktemp("chests")
    rows = write_nih(folder / "nih", num_patients=12)
    for number, path in enumerate(sorted((folder / "nih").rglob("*.png"))):
        Image.fromarray(shades(100 + number, 64)).save(path)
    names = [row["Image Index"] for row in rows][::3]
    ids = write_rsna_copies(folder / "rsna", names, folder / "nih")
    register(folder / "store", "nih", folder / "nih", RegisterConfig(adapter="nih"))
    register(folder / "store", "rsna", folder / "rsna", RegisterConfig(adapter="rsna"))
    mapped = RegisterConfig(adapter="rsna", option=["nih_map=rsnamatches.csv"])
    register(folder / "store", "rsna-mapped", folder / "rsna", mapped)
    for name in ("nih", "rsna", "rsna-mapped"):
        embed(folder / "store", name)
    embed(folder / "store", "nih", "42")
    return folder / "store", rows, dict(zip(ids, names))


def test_rsna_images_inside_nih_are_found(chests: tuple[Path, list[dict[str, str]], dict[str, str]]) -> None:
    path, _, copies = chests
    (other,) = find_leaks(Store(path), "rsna", against=["nih"]).against
    assert other.patients is None  # without the map nobody knows whose images they are
    assert other.identical.across == ()
    assert other.similar is not None
    assert {pair.ids[0]: pair.ids[1] for pair in other.similar.pairs} == copies
    assert other.similar.count == len(copies)
    assert {pair.splits for pair in other.similar.pairs} == {("rsna", "nih")}
    assert {pair.groups for pair in other.similar.pairs} == {"unknown"}


def test_rsna_patients_inside_nih_are_found_by_the_map(
    chests: tuple[Path, list[dict[str, str]], dict[str, str]],
) -> None:
    path, rows, copies = chests
    (other,) = find_leaks(Store(path), "rsna-mapped", against=["nih"]).against
    patient = {row["Image Index"]: row["Patient ID"] for row in rows}
    assert other.patients == len({patient[name] for name in copies.values()})
    assert other.patient_images == len(copies)
    assert other.similar is not None
    assert {pair.groups for pair in other.similar.pairs} == {"same"}
    assert other.similar.one_group == other.similar.count == len(copies)


def test_one_release_under_two_names_is_byte_identical(
    chests: tuple[Path, list[dict[str, str]], dict[str, str]],
) -> None:
    path, _, copies = chests
    found = find_leaks(Store(path), "rsna-mapped", against=["rsna", "rsna"])
    (other,) = found.against  # named twice, looked at once
    assert len(other.identical.across) == len(copies)
    assert other.similar is not None
    assert all(pair.identical for pair in other.similar.pairs[: len(copies)])
    assert any("patient ids are not compared" in note for note in other.notes)
    assert found.count >= 2 * len(copies)


def test_sets_that_differ_are_not_compared(chests: tuple[Path, list[dict[str, str]], dict[str, str]]) -> None:
    path, _, _ = chests
    store = Store(path)
    with pytest.raises(TaskError, match=r"must be made alike to be compared, but differ in preprocess\.height"):
        find_leaks(store, "nih", against=["rsna"], model="tiny@42")
    assert find_leaks(store, "nih", against=["rsna"]).against[0].similar is not None  # tiny@28 is in both
    with pytest.raises(ConfigError, match="--against names other data sets, got 'nih' itself"):
        find_leaks(store, "nih", against=["nih"])
    with pytest.raises(UnknownNameError, match="unknown data set 'none'"):
        find_leaks(store, "nih", against=["none"])
    with pytest.raises(UnknownNameError, match="no set 'nih/tiny@98'"):
        find_leaks(store, "nih", model="tiny@98")


def test_patients_and_bytes_are_compared_where_sets_differ(tmp_path: Path) -> None:
    write_nih(tmp_path / "nih", num_patients=4)
    for name, res in (("one", "28"), ("two", "42")):
        register(tmp_path / "store", name, tmp_path / "nih", RegisterConfig(adapter="nih", hash=True))
        embed(tmp_path / "store", name, res)
    store = Store(tmp_path / "store")
    found = find_leaks(store, "one", against=["two"])
    (other,) = found.against
    ours = store.manifest("one")
    assert other.similar is None
    assert other.patients == len(set(ours.column("group"))) == 4
    assert (other.patient_images, other.identical.images) == (len(ours), 2 * len(ours))
    assert any(re.search(r"not looked for: .* differ in preprocess\.height", note) for note in other.notes)
    shown = CliRunner().invoke(app(), ["--dataset", "one", "--against", "two", "--store", str(store.path)])
    assert (shown.exit_code, "patients in both: 4" in shown.stdout) == (0, True), shown.output
    with pytest.raises(TaskError, match="must be made alike to be compared"):
        find_leaks(store, "one", against=["two"], model="tiny@28")


def test_pairs_of_one_patient_are_counted_beyond_those_listed(
    chests: tuple[Path, list[dict[str, str]], dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, rows, copies = chests
    monkeypatch.setattr(similar, "MAX_PAIRS", 3)
    found = find_leaks(Store(path), "rsna-mapped", against=["nih"], question=Question(threshold=-1.0))
    told = found.against[0].similar
    assert told is not None
    patient = {row["Image Index"]: row["Patient ID"] for row in rows}
    images = [row["Patient ID"] for row in rows]
    assert (told.count, len(told.pairs)) == (len(copies) * len(rows), 3)
    assert told.one_group == sum(images.count(patient[name]) for name in copies.values()) > 3


# ---- vectors and questions


def test_vectors_of_zeros_and_arrays_of_tokens(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Store(home)["planted", "tiny@28"]
    both = Vectors(opened, "cls+mean_patch")
    np.testing.assert_allclose(np.linalg.norm(both.unit(np.arange(5)), axis=1), 1, rtol=1e-6)
    assert both.unit(np.arange(0)).shape == (0, both.width)
    array = both._arrays[0]
    monkeypatch.setattr(type(array), "__getitem__", lambda self, rows: np.zeros((len(rows), self.shape[1])))
    assert (both.unit(np.arange(2)) == 0).all()
    monkeypatch.setattr(type(array), "shape", (29, 4, 8))
    with pytest.raises(TaskError, match="near-duplicates are found by vectors such as cls or mean_patch; got 'cls'"):
        Vectors(opened, "cls")


def test_a_set_of_an_older_manifest_gives_no_hashes(tmp_path: Path) -> None:
    planted(tmp_path / "data", tmp_path / "store")
    embed(tmp_path / "store", "planted")
    assert None not in file_hashes(Store(tmp_path / "store"), Store(tmp_path / "store").manifest("planted"))
    write_csv(tmp_path / "data" / "table.csv", ["path", "part", "exam"], [["00.png", "train", "e"]])
    manifest, _ = register(tmp_path / "store", "planted", tmp_path / "data", config())
    assert manifest.hashes() == [None]
    assert file_hashes(Store(tmp_path / "store"), manifest) == [None]


def test_question_refuses_what_cannot_be() -> None:
    with pytest.raises(ConfigError, match="give --threshold or --top, not both"):
        Question(threshold=0.9, top=3)
    with pytest.raises(ConfigError, match="--threshold is a cosine similarity from -1 to 1, got"):
        Question(threshold=1.5)
    with pytest.raises(ConfigError, match="--top lists 1 to 10000 pairs, got 0"):
        Question(top=0)


# ---- the command


def app() -> typer.Typer:
    made = typer.Typer()
    made.command("leaks")(leaks)
    return made


def test_command_prints_tables_json_and_an_exit_code(home: Path) -> None:
    runner = CliRunner()
    shown = runner.invoke(app(), ["--dataset", "planted", "--store", str(home)])
    assert shown.exit_code == 0
    for text in ("patients known", "patient", "copy.png", "pairs at or above 0.99: 3, 1 more of one patient", "leaks:"):
        assert text in shown.stdout
    failed = runner.invoke(app(), ["--dataset", "unknown", "--store", str(home), "--json", "--fail"])
    assert failed.exit_code == 3
    told = json.loads(failed.stdout)
    assert told == json.loads(json.dumps(find_leaks(Store(home), "unknown").as_dict()))
    # An exam in two splits, one copied file, and four near-duplicates, that copy among them.
    assert told["leaks"] == sum(item["count"] for item in told["crossings"]) + 1 + 4
    top = runner.invoke(app(), ["--dataset", "planted", "--store", str(home), "--top", "4"])
    assert "at or above" not in top.stdout


def test_command_against_another_data_set(chests: tuple[Path, list[dict[str, str]], dict[str, str]]) -> None:
    path, _, copies = chests
    asked = ["--dataset", "rsna-mapped", "--against", "nih", "--store", str(path)]
    shown = CliRunner().invoke(app(), asked)
    assert shown.exit_code == 0, shown.output
    assert "against nih" in shown.stdout
    assert f"({len(copies)} of them of one patient)" in shown.stdout
    assert CliRunner().invoke(app(), [*asked, "--fail"]).exit_code == 3


def test_nothing_found_does_not_fail(tmp_path: Path) -> None:
    write_nih(tmp_path / "nih", num_patients=4)
    register(tmp_path / "store", "nih", tmp_path / "nih", RegisterConfig(adapter="nih"))
    clean = CliRunner().invoke(app(), ["--dataset", "nih", "--store", str(tmp_path / "store"), "--fail"])
    assert (clean.exit_code, "leaks: 0" in clean.stdout) == (0, True), clean.output


@pytest.mark.realdata
def test_byte_identical_real_images_are_found(shared_data: Path, tmp_path: Path) -> None:
    asked = RegisterConfig(
        table=shared_data / "cxr/metadata.csv",
        group_column="patient_id",
        split_column="split",
        study_column="study_id",
        hash=True,
    )
    register(tmp_path / "store", "cxr", shared_data / "cxr", asked)
    found = find_leaks(Store(tmp_path / "store"), "cxr")
    with (shared_data / "cxr/metadata.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    held: dict[str, set[str]] = {}
    for row in rows:
        held.setdefault(row["sha256"], set()).add(row["split"])
    repeats = len(rows) - len(held)
    assert repeats > 0
    assert len(found.identical.across) == sum(len(splits) > 1 for splits in held.values())
    if not found.identical.across:
        assert sum(found.identical.within.values()) == repeats
    assert not any(crossing.what == "patient" for crossing in found.crossings)
