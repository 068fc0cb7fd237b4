"""The phantom: what its table says is what its pixels show, and the same seed gives the same bytes."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from standins import read_rows

from featstore.datasets import phantom
from featstore.datasets.phantom_render import (
    Anatomy,
    Blob,
    Film,
    Findings,
    Pose,
    Rendering,
    bump,
    fits_in_lung,
    ramp,
    render_frontal,
    render_lateral,
)
from featstore.errors import ConfigError, ManifestError

BODY = Anatomy(
    chest=0.75,
    base=0.35,
    heart_height=0.33,
    heart_tilt=0.3,
    mediastinum=0.14,
    knob=0.07,
    rib_spacing=0.16,
    rib_slope=0.2,
    bone=0.14,
    flesh=0.75,
    breast=0.0,
    scoliosis=0.0,
    texture=7,
)
POSE = Pose()
SIZE = 128


def show(findings: Findings, *, view: str = "frontal", pose: Pose = POSE) -> Rendering:
    render = render_frontal if view == "frontal" else render_lateral
    return render(BODY, findings, pose, SIZE)


def change(findings: Findings, *, view: str = "frontal") -> np.ndarray:
    """How much brighter each pixel is than without the finding; noise is the same in both."""
    with_it, without = (show(shown, view=view).image.astype(int) for shown in (findings, Findings()))
    difference: np.ndarray = with_it - without
    return difference


def halves(values: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """The half of the image on the patient's `side`, and the other one."""
    right, left = values[:, : SIZE // 2], values[:, SIZE // 2 :]
    return (right, left) if side < 0 else (left, right)


def read_image(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def tree_digest(root: Path) -> dict[str, str]:
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# ---- parts of the renderer


@given(st.floats(-3, 3), st.floats(0.01, 2))
def test_edges_are_smooth_steps(distance: float, width: float) -> None:
    at = np.array([distance, -width, 0.0, width])
    np.testing.assert_allclose(ramp(at, width)[1:], [0, 0.5, 1])
    assert 0 <= ramp(at, width)[0] <= 1
    np.testing.assert_allclose(ramp(at, width) + ramp(-at, width), 1)
    np.testing.assert_allclose(bump(at, width)[1:], [0, 1, 0])
    assert (bump(at, width)[0] > 0) == (abs(distance) < width)


def test_grain_sums_random_bytes() -> None:
    film = Film(Pose(seed=5), 64)
    raw = np.random.PCG64(5).random_raw(64 * 64)
    sums = [sum(int(value).to_bytes(8, "little")) for value in raw]
    np.testing.assert_allclose(film.grain().ravel(), (np.array(sums) - 1020) / np.sqrt(8 * 65535 / 12))
    assert abs(film.grain().mean()) < 0.06
    assert film.grain().std() == pytest.approx(1, abs=0.05)


@given(st.integers(0, 2**40), st.integers(2, 30))
@settings(max_examples=20, deadline=None)
def test_clouds_interpolate_their_grid(seed: int, cells: int) -> None:
    film = Film(Pose(), 2 * cells)  # pixel centres lie at a quarter and three quarters of each cell
    clouds = film.clouds(seed, cells)
    grid = (np.random.PCG64(seed).random_raw((cells + 2) ** 2) / 2.0**63 - 1).reshape(cells + 2, cells + 2)
    near, far = 0.25**2 * (3 - 0.5), 1 - 0.25**2 * (3 - 0.5)
    expected = far * (far * grid[0, 0] + near * grid[0, 1]) + near * (far * grid[1, 0] + near * grid[1, 1])
    assert clouds.shape == (2 * cells, 2 * cells)
    assert clouds[0, 0] == pytest.approx(expected)
    assert np.abs(clouds).max() <= 1


@given(
    lean=st.floats(-0.1, 0.1),
    shift=st.floats(-0.1, 0.1),
    scale=st.floats(0.9, 1.1),
    x=st.floats(-0.6, 0.6),
    y=st.floats(-0.6, 0.6),
)
@settings(max_examples=50, deadline=None)
def test_places_and_pixels_agree(lean: float, shift: float, scale: float, x: float, y: float) -> None:
    """The pixel that `to_pixels` names has the place's coordinates, to half a pixel's width."""
    film = Film(Pose(lean=lean, shift_x=shift, shift_y=-shift, scale=scale), SIZE)
    column, row, radius = film.to_pixels(x, y, 0.1)
    i, j = round(row), round(column)
    pixel = 2 / SIZE / scale
    assert abs(film.y[i, 0] - y) <= pixel * 0.52
    assert abs(film.x[i, j] - x) <= pixel * 0.60
    assert radius == pytest.approx(0.1 * scale * SIZE / 2, abs=0.01)


# ---- findings


def test_normal_chest_has_two_lungs_and_a_narrow_heart() -> None:
    rendering = show(Findings())
    lungs = rendering.lungs
    assert rendering.image.shape == (SIZE, SIZE)
    assert rendering.image.dtype == np.uint8
    assert rendering.lesion is None
    assert rendering.lesion_mask is None
    middle = SIZE // 2
    assert not lungs[:, middle - 4 : middle + 4].any()
    right, left = lungs[:, :middle].mean(), lungs[:, middle:].mean()
    assert 0.15 < left < right < 0.5  # the heart takes more of the left one
    assert rendering.image[lungs].mean() < rendering.image[~lungs].mean() - 40
    assert rendering.image[0, 0] < 40  # air


@pytest.mark.parametrize("ratio", [0.50, 0.56, 0.60, 0.64])
@pytest.mark.parametrize("portable", [False, True])
def test_heart_is_as_wide_as_stated(ratio: float, portable: bool) -> None:
    lungs = render_frontal(BODY, Findings(heart_ratio=ratio), Pose(portable=portable), 512).lungs
    borders = []
    for row in lungs[200:340]:  # between hila and diaphragm
        right, left = np.flatnonzero(row[:256]), np.flatnonzero(row[256:])
        if len(right) and len(left):
            borders.append((right[-1], 256 + left[0]))
    # The borders' extremes lie at different heights, because the heart leans.
    width = max(left for _, left in borders) - min(right for right, _ in borders)
    stated = ratio * (1.08 if portable else 1.0) * BODY.chest * 512
    assert width == pytest.approx(stated, abs=2.5)


@given(x=st.floats(0.25, 0.6), y=st.floats(-0.5, 0.3), radius=st.floats(0.05, 0.14), side=st.sampled_from([-1, 1]))
@settings(max_examples=25, deadline=None)
def test_lesion_lies_where_it_is_stated(x: float, y: float, radius: float, side: int) -> None:
    place = Blob(x=side * x, y=y, radius=radius, depth=0.1)
    for view in ("frontal", "lateral"):
        rendering = show(Findings(lesion=place), view=view, pose=Pose(lean=0.03, shift_x=0.02, scale=0.95))
        assert rendering.lesion is not None
        assert rendering.lesion_mask is not None
        column, row, pixels = rendering.lesion
        rows, columns = np.nonzero(rendering.lesion_mask)
        assert columns.mean() == pytest.approx(column, abs=0.3)
        assert rows.mean() == pytest.approx(row, abs=0.3)
        assert rendering.lesion_mask.sum() == pytest.approx(np.pi * pixels**2, rel=0.25)


def test_lesion_brightens_its_disc_only() -> None:
    place = Blob(x=-0.4, y=-0.2, radius=0.1, depth=0.2)
    for view in ("frontal", "lateral"):
        mask = show(Findings(lesion=place), view=view).lesion_mask
        brighter = change(Findings(lesion=place), view=view)
        assert mask is not None
        assert (brighter[~mask] == 0).all()
        assert brighter[mask].mean() > 25


def test_fits_in_lung_agrees_with_the_mask() -> None:
    """Every disc that is said to fit lies in the rendered lung field, and both answers occur."""
    rng = np.random.default_rng(0)
    film = Film(Pose(), SIZE)
    answers = set()
    lungs = render_frontal(BODY, Findings(heart_ratio=0.6), Pose(portable=True), SIZE).lungs
    for _ in range(200):
        place = Blob(x=rng.uniform(-0.8, 0.8), y=rng.uniform(-0.9, 0.8), radius=rng.uniform(0.04, 0.12))
        fits = fits_in_lung(BODY, 0.6, place)
        answers.add(fits)
        if fits:
            disc = film.disc(*film.to_pixels(place.x, place.y, place.radius)) <= 1
            assert lungs[disc].mean() > 0.97
    assert answers == {True, False}


@pytest.mark.parametrize("side", [-1, 1])
def test_effusion_fills_one_base(side: int) -> None:
    brighter = change(Findings(effusions=((side, 0.25),)))
    there, other = halves(brighter, side)
    assert (there > 15).mean() > 0.05
    assert (other != 0).mean() < 0.01
    rows = np.nonzero((brighter > 15).any(axis=1))[0]
    assert rows.min() > SIZE * 0.35  # the apex stays clear
    higher = change(Findings(effusions=((side, 0.40),)))
    assert (higher > 15).sum() > 1.3 * (brighter > 15).sum()


def test_meniscus_climbs_the_chest_wall() -> None:
    brighter = change(Findings(effusions=((-1, 0.25),))) > 15
    tops = [int(np.argmax(brighter[:, column])) for column in range(SIZE) if brighter[:, column].any()]
    assert tops[1] < tops[len(tops) // 2] - 4  # columns run from the wall to the heart


@pytest.mark.parametrize("side", [-1, 1])
def test_pneumothorax_is_a_dark_rim(side: int) -> None:
    brighter = change(Findings(pneumothorax=(side, 0.12)))
    there, other = halves(brighter, side)
    assert (other != 0).mean() < 0.01
    assert (there < -8).mean() > 0.01
    columns = np.nonzero(brighter < -8)[1]
    assert np.median(np.abs(columns - SIZE / 2)) > SIZE / 4  # towards the wall


def test_edema_hazes_both_lungs() -> None:
    brighter = change(Findings(edema=0.6))
    lungs = show(Findings()).lungs
    for half in (slice(0, SIZE // 2), slice(SIZE // 2, None)):
        assert brighter[:, half][lungs[:, half]].mean() > 8
    assert np.abs(brighter[~lungs]).mean() < 2


def test_consolidation_is_local() -> None:
    place = Blob(x=-0.4, y=-0.1, radius=0.25, depth=0.1)
    film = Film(Pose(), SIZE)
    for view, x in (("frontal", place.x), ("lateral", place.depth)):
        brighter = change(Findings(consolidations=(place,)), view=view)
        inside = film.disc(*film.to_pixels(x, place.y, place.radius * 1.2)) <= 1
        assert (brighter[~inside] == 0).all()
        assert (brighter[inside] > 15).mean() > 0.15


@pytest.mark.parametrize("side", [-1, 1])
def test_atelectasis_is_basal_and_one_sided(side: int) -> None:
    brighter = change(Findings(atelectases=((side, 0.1),)))
    there, other = halves(brighter, side)
    assert (other == 0).all()
    assert (there > 15).mean() > 0.01
    assert np.nonzero((there > 15).any(axis=1))[0].min() > SIZE // 2


@pytest.mark.parametrize("findings", [Findings(tube=True), Findings(line=-1), Findings(line=1), Findings(pacemaker=1)])
def test_devices_are_bright_and_thin(findings: Findings) -> None:
    brighter = change(findings)
    assert (brighter >= 0).all()
    assert brighter.max() > 30
    assert 0 < (brighter > 10).mean() < 0.05


@pytest.mark.parametrize(
    "findings",
    [
        Findings(heart_ratio=0.62),
        Findings(effusions=((1, 0.3),)),
        Findings(edema=0.6),
        Findings(atelectases=((1, 0.1),)),
        Findings(pacemaker=1),
    ],
)
def test_lateral_view_shows_findings(findings: Findings) -> None:
    assert (np.abs(change(findings, view="lateral")) > 8).mean() > 0.002


# ---- patients


def test_patients_are_drawn_alone_and_within_range() -> None:
    patients = [phantom.draw_patient(3, number) for number in range(120)]
    assert phantom.draw_patient(3, 17) == patients[17]
    assert phantom.draw_patient(4, 17) != patients[17]
    assert {patient.sex for patient in patients} == {"F", "M"}
    assert all(18 <= patient.age <= 90 for patient in patients)
    assert all((patient.anatomy.breast > 0) == (patient.sex == "F") for patient in patients)
    assert {len(patient.studies) for patient in patients} == {1, 2, 3, 4}
    studies = [study for patient in patients for study in patient.studies]
    for label in phantom.LABELS:
        assert 0.05 < np.mean([label in study.present() for study in studies]) < 0.5, label
    for study in studies:
        diseases = study.present() - {"Support Devices", "No Finding"}
        assert bool(diseases) != ("No Finding" in study.present())
    for patient in patients:
        for study in patient.studies:
            place = study.findings.lesion
            assert place is None or fits_in_lung(patient.anatomy, study.findings.heart_ratio, place)


def test_pixels_are_the_same_on_every_machine() -> None:
    """A change of the drawing or rendering must raise `_VERSION` and this digest together."""
    total = hashlib.sha256()
    patient = phantom.draw_patient(0, 1)
    for study in patient.studies:
        total.update(render_frontal(patient.anatomy, study.findings, study.frontal, 64).image.tobytes())
        total.update(render_lateral(patient.anatomy, study.findings, study.frontal, 64).image.tobytes())
    assert total.hexdigest()[:16] == "8a4d0dfcde5742b6"


# ---- the folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("phantom") / "p"
    phantom.generate(root, num_patients=20, seed=1, size=64)
    return root


def test_table_tells_what_the_files_hold(folder: Path) -> None:
    rows = read_rows(folder / "metadata.csv")
    lesions = 0
    for row in rows:
        image, lungs = read_image(folder / row["path"]), read_image(folder / row["mask_path"])
        assert image.shape == lungs.shape == (64, 64)
        assert image.dtype == np.uint8
        assert set(np.unique(lungs)) == {0, 255}
        assert row["path"] == f"images/{row['study_id']}{'_lateral' if row['view'] == 'LATERAL' else ''}.png"
        assert row["study_id"].startswith(row["patient_id"])
        assert (row["Cardiomegaly"] == "1") == (float(row["heart_ratio"]) > 0.5)
        assert (row["Pleural Effusion"] == "1") == (float(row["effusion_height"]) > 0)
        assert (row["Lung Lesion"] == "1") == bool(row["lesion_mask_path"]) == bool(row["lesion_x"])
        if row["lesion_mask_path"]:
            lesions += 1
            mask = read_image(folder / row["lesion_mask_path"])
            column, line, radius = (float(row[key]) for key in ("lesion_x", "lesion_y", "lesion_radius"))
            i, j = np.indices(mask.shape)
            np.testing.assert_array_equal(mask, np.where((j - column) ** 2 + (i - line) ** 2 <= radius**2, 255, 0))
    assert lesions > 1
    assert {row["view"] for row in rows} == {"AP", "PA", "LATERAL"}
    stored = {path.relative_to(folder).as_posix() for path in folder.rglob("*.png")}
    assert stored == {row[key] for row in rows for key in ("path", "mask_path", "lesion_mask_path")} - {""}


def test_splits_are_by_patient(folder: Path) -> None:
    rows = read_rows(folder / "metadata.csv")
    splits = {row["patient_id"]: row["split"] for row in rows}
    assert len({(row["patient_id"], row["split"]) for row in rows}) == len(splits) == 20
    assert [list(splits.values()).count(split) for split in ("train", "val", "test")] == [12, 3, 5]


@pytest.mark.parametrize("num_patients", [3, 4, 7])
def test_small_phantoms_fill_all_splits(tmp_path: Path, num_patients: int) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / f"{phantom.MARKER}.0f.partial").touch()  # as a kill at the very start leaves it
    phantom.generate(tmp_path / "p", num_patients=num_patients, size=32)
    assert {row["split"] for row in read_rows(tmp_path / "p" / "metadata.csv")} == {"train", "val", "test"}


def test_adapter_keeps_the_table(folder: Path) -> None:
    source = phantom.read(folder)
    rows = read_rows(folder / "metadata.csv")
    taken = {"path": "source_path", "mask_path": "source_mask_path", "split": "source_split"}
    for got, row in zip(source.table.to_pylist(), rows, strict=True):
        assert {taken.get(key, key): value or None for key, value in row.items()}.items() <= got.items()
        assert got["id"] == Path(row["path"]).stem
        assert (got["path"], got["mask_path"], got["split"]) == (row["path"], row["mask_path"], row["split"])
        assert (got["group"], got["study"]) == (row["patient_id"], row["study_id"])
    assert (source.adapter, source.default_task, source.tasks) == ("phantom", None, ())
    assert (source.label_columns, source.groups_known) == (phantom.LABELS, True)
    assert "synthetic phantom" in source.notes[0]


def test_same_seed_same_bytes(folder: Path, tmp_path: Path) -> None:
    phantom.generate(tmp_path / "again", num_patients=20, seed=1, size=64)
    assert tree_digest(tmp_path / "again") == tree_digest(folder)
    phantom.generate(tmp_path / "other", num_patients=20, seed=2, size=64)
    assert tree_digest(tmp_path / "other") != tree_digest(folder)


def test_finished_folder_is_kept(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    phantom.generate(folder, num_patients=20, seed=1, size=64)
    phantom.read(folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_killed_generation_is_redone(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "p"
    code = (
        "from pathlib import Path; from featstore.datasets import phantom; "
        f"phantom.generate(Path({str(root)!r}), num_patients=20, seed=1, size=64)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent.parent)
    deadline = time.monotonic() + 30
    while not (root / "images").is_dir() and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not phantom.is_complete(root, "table")
    phantom.generate(root, num_patients=20, seed=1, size=64)
    assert phantom.is_complete(root, "table")
    for partial in root.rglob("*.partial"):
        partial.unlink()
    assert tree_digest(root) == tree_digest(folder)


def test_errors_leave_the_folder_alone(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least 3 patients for its three splits, not 2"):
        phantom.generate(tmp_path / "a", num_patients=2)
    with pytest.raises(ConfigError, match="at least 32 pixels a side, not 31"):
        phantom.generate_chexpert(tmp_path / "a", size=31)
    assert not (tmp_path / "a").exists()
    (tmp_path / "metadata.csv").write_text("mine")
    with pytest.raises(ManifestError, match="holds other files; give an empty or a new folder to generate into"):
        phantom.read(tmp_path)
    with pytest.raises(ManifestError, match="holds other files"):
        phantom.read(tmp_path / "metadata.csv")
    assert (tmp_path / "metadata.csv").read_text() == "mine"
    with pytest.raises(ManifestError, match=r"was generated with \{'seed': 1\}, not as asked; choose another folder"):
        phantom.generate(folder, num_patients=20, seed=5, size=64)


@pytest.mark.parametrize(
    ("marker", "match"),
    [
        ("[1]", "holds other files"),
        ('{"complete": true, "layout": "digits"}', "was generated with .*'layout': 'digits'"),
    ],
)
def test_folders_of_others_are_refused(tmp_path: Path, marker: str, match: str) -> None:
    (tmp_path / phantom.MARKER).write_text(marker)
    (tmp_path / "images").mkdir()
    with pytest.raises(ManifestError, match=match):
        phantom.read(tmp_path)


# ---- CheXpert's layout


def test_chexpert_train_labels_follow_the_image_mostly(tmp_path: Path) -> None:
    release = phantom.generate_chexpert(tmp_path, num_patients=40, size=32, small=False)
    assert release.name == "CheXpert-v1.0"
    given, agreeing = 0, 0
    for row in read_rows(release / "train.csv"):
        patient, study = row["Path"].split("/")[2:4]
        shown = phantom.draw_patient(0, int(patient[7:])).studies[int(study[5:]) - 1].present()
        for label in set(phantom.LABELS) - {"No Finding"}:
            if row[label] in ("1.0", "0.0"):
                given += 1
                agreeing += (row[label] == "1.0") == (label in shown)
    assert 0.90 < agreeing / given < 1.0


def test_chexpert_truth_of_composed_labels() -> None:
    big = Findings(heart_ratio=0.62, consolidations=(Blob(x=0.4, y=0.0, radius=0.2), Blob(x=-0.4, y=0.0, radius=0.2)))
    labels = phantom.chexpert_labels(phantom.Study(findings=big, frontal=Pose(), lateral=None), None)
    positive = {label for label, value in labels.items() if value == "1.0"}
    assert positive == {"Cardiomegaly", "Enlarged Cardiomediastinum", "Consolidation", "Lung Opacity", "Pneumonia"}
    assert set(labels.values()) == {"1.0", "0.0"}
    clear = phantom.chexpert_labels(phantom.Study(findings=Findings(), frontal=Pose(), lateral=None), None)
    assert [label for label, value in clear.items() if value == "1.0"] == ["No Finding"]


# ---- what a network sees


@pytest.mark.realdata
def test_findings_are_visible_to_the_tiny_network(shared_data: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.preprocessing import StandardScaler
    from transformers import Dinov2WithRegistersModel

    phantom.generate(tmp_path / "p", num_patients=120, size=98)
    rows = [row for row in read_rows(tmp_path / "p" / "metadata.csv") if row["view"] != "LATERAL"]
    pixels = np.stack([read_image(tmp_path / "p" / row["path"]) for row in rows]).astype(np.float32) / 255
    normal = (torch.from_numpy(pixels)[:, None] - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / 0.226
    network = Dinov2WithRegistersModel.from_pretrained(shared_data / "weights" / "dinov2-tiny-distilled" / "hf")
    with torch.inference_mode():  # the network comes in evaluation mode
        tokens = torch.cat([network(batch).last_hidden_state for batch in normal.split(32)])
    features = torch.cat([tokens[:, 0], tokens[:, 5:].mean(1)], dim=1).numpy()
    train = np.array([row["split"] == "train" for row in rows])
    features = StandardScaler().fit(features[train]).transform(features)
    for label in ("Cardiomegaly", "Pleural Effusion"):
        truth = np.array([row[label] == "1" for row in rows])
        head = LogisticRegression(C=0.01, max_iter=1000).fit(features[train], truth[train])
        assert roc_auc_score(truth[~train], head.decision_function(features[~train])) > 0.8, label
