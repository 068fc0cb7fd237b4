"""`probes compare` on records and score files: what is shared, what differs, and what is refused."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from probe_sets import write_set
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

from cli import comparing
from featstore.errors import ConfigError, FeatstoreError, LeakError, TaskError, UnknownNameError
from featstore.store.catalog import Store
from probes.compare import compare
from probes.compare_seeds import seed_spread
from probes.configs import EvalConfig, KnnConfig, LinearConfig, TaskConfig
from probes.evaluation import evaluate_sets, load_records_at
from probes.paired import Criteria
from probes.records import load_predictions, save_record
from probes.score_tables import find_record, open_scores
from probes.subgroups import age_band, age_of, find_column, subgroup_rows

SMALL = Criteria(num_resamples=60)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, dict[str, dict[str, Any]]]:
    """320 samples, two a patient, with sex, age and view; records of kNN and of two linear heads."""
    root = tmp_path_factory.mktemp("compare")
    rng = np.random.default_rng(0)
    y = (rng.random((320, 2)) < 0.4).astype(int)
    features = rng.standard_normal((320, 8))
    features[:, :2] += 1.5 * y
    patient = np.arange(320) // 2
    columns: dict[str, list[Any]] = {
        "part": [("train", "train", "val", "test")[number % 4] for number in patient],
        "pid": [f"p{number}" for number in patient],
        "a": y[:, 0].tolist(),
        "b": y[:, 1].tolist(),
        "Patient Gender": ["M" if number % 8 < 4 else "F" for number in patient],
        "Patient Age": [f"{20 + number % 50:03d}Y" for number in patient],
        "view": [("AP", "PA")[number % 2] for number in range(320)],
    }
    write_set(root / "store", root / "x", columns, features)
    store = Store(root / "store")
    config = EvalConfig(dataset="x", labels="a,b", features="cls", resamples=20)
    records = {
        "knn": evaluate_sets(store, "knn", config, KnnConfig(k="5,15"))[0],
        "linear": evaluate_sets(store, "linear", config, LinearConfig(C="0.1,1"))[0],
        "weak": evaluate_sets(store, "linear", config, LinearConfig(C="1e-6"))[0],
        "patients": evaluate_sets(store, "linear", config, LinearConfig(C="0.1,1"), reading=TaskConfig(unit="patient"))[
            0
        ],
    }
    return store, records


def run(
    made: tuple[Store, dict[str, Any]], a: str, b: str, criteria: Criteria = SMALL, **options: Any
) -> dict[str, Any]:
    store, records = made
    names = [records[name]["id"] if name in records else name for name in (a, b)]
    return compare(names[0], names[1], criteria, store=store, folder=store.path / "results", **options)


def scores_of(record: dict[str, Any], split: str = "test") -> dict[str, list[Any]]:
    table = load_predictions(record).to_pydict()
    rows = [number for number, value in enumerate(table["split"]) if value == split]
    return {name: [values[row] for row in rows] for name, values in table.items()}


def write_csv(path: Path, columns: dict[str, list[Any]]) -> str:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values()))
    return str(path)


def test_two_records(made: tuple[Store, dict[str, Any]]) -> None:
    found = run(made, "linear", "knn")
    tables = [scores_of(made[1][name]) for name in ("linear", "knn")]
    areas = [[roc_auc_score(table[f"label:{c}"], table[f"score:{c}"]) for c in "ab"] for table in tables]
    for column, entry in enumerate(found["result"]["per_label"]):
        assert entry["a"]["value"] == pytest.approx(areas[0][column], abs=1e-12)
        assert entry["delta"]["value"] == pytest.approx(areas[0][column] - areas[1][column], abs=1e-12)
    assert found["shared"] == {"samples": 80, "patients": 40, "labels": ["a", "b"]}
    assert "probe" in found["protocol_differs"]
    assert found["differs"]["probe"] == ["linear", "knn"]
    json.dumps(found)


def test_what_differs_is_said(made: tuple[Store, dict[str, Any]]) -> None:
    same = run(made, "linear", "linear")
    assert (same["differs"], same["protocol_differs"]) == ({}, [])
    assert run(made, "linear", "weak")["differs"] == {"option C": ["0.1,1", "1e-6"]}


def test_a_file_of_scores_takes_truth_and_patients_from_the_record(
    made: tuple[Store, dict[str, Any]], tmp_path: Path
) -> None:
    table = scores_of(made[1]["knn"])
    order = np.random.default_rng(0).permutation(80)[:70]
    columns = {
        "id": [table["id"][row] for row in order] + ["elsewhere.png"],
        "prob_b": [table["score:b"][row] for row in order] + [0.5],
        "prob_a": [table["score:a"][row] for row in order] + [0.5],
    }
    found = run(made, "linear", write_csv(tmp_path / "s.csv", columns))
    assert found["shared"]["samples"] == 70
    assert found["notes"] == [
        "samples of A that the other lacks, left out: 10",
        "samples of B that the other lacks, left out: 1",
    ]
    assert found["protocol_differs"] == ["s.csv is a file of scores: how they were made is not known"]
    truth = dict(zip(table["id"], table["label:b"]))
    expected = roc_auc_score([truth[name] for name in columns["id"][:-1]], columns["prob_b"][:-1])
    assert found["result"]["per_label"][1]["b"]["value"] == pytest.approx(expected, abs=1e-12)
    again = run(made, write_csv(tmp_path / "s.tsv", columns), "linear")
    assert again["result"]["macro"]["delta"]["value"] == pytest.approx(-found["result"]["macro"]["delta"]["value"])


def test_two_files_with_missing_scores_and_masks(made: tuple[Store, dict[str, Any]], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 60)
    columns = {
        "id": [f"s{number}" for number in range(60)],
        "label:x": y.tolist(),
        "score:x": rng.random(60).tolist(),
    }
    first = write_csv(tmp_path / "a.csv", columns | {"mask:x": [int(number > 4) for number in range(60)]})
    second = tmp_path / "b.parquet"
    scores = rng.random(60).tolist()
    pq.write_table(pa.table({**columns, "score:x": [None, *scores[1:59], None]}), second)
    found = run(made, first, str(second))
    assert found["result"]["per_label"][0]["n"] == 54
    assert any(note.startswith("1 labelled entries lack a score") for note in found["notes"])
    assert any(note.startswith("patients unknown") for note in found["notes"])
    expected = roc_auc_score(y[5:59], scores[5:59])
    assert found["result"]["per_label"][0]["b"]["value"] == pytest.approx(expected, abs=1e-12)


def test_subgroups_of_the_manifest(made: tuple[Store, dict[str, Any]]) -> None:
    store, records = made
    found = run(made, "linear", "knn", subgroups=("sex", "age", "view"))
    values = {(part["column"], part["value"]): part for part in found["subgroups"]}
    assert [key for key in values if key[0] == "Patient Gender"] == [("Patient Gender", "F"), ("Patient Gender", "M")]
    assert [key[1] for key in values if key[0] == "Patient Age"] == ["18-39", "40-59", "60-79"]
    manifest = store.manifest("x")
    views = dict(zip(manifest.column("id"), manifest.column("view")))
    table = scores_of(records["linear"])
    rows = [number for number, name in enumerate(table["id"]) if views[name] == "PA"]
    expected = np.mean(
        [roc_auc_score(*[[table[f"{kind}:{c}"][row] for row in rows] for kind in ("label", "score")]) for c in "ab"]
    )
    part = values["view", "PA"]
    assert part["macro"]["a"]["value"] == pytest.approx(expected, abs=1e-12)
    assert part["macro"]["a"]["low"] <= expected <= part["macro"]["a"]["high"]
    assert sum(part["per_label"][0]["n"] for key, part in values.items() if key[0] == "view") == 80
    patients = run(made, "patients", "patients", subgroups=("sex", "view"))["subgroups"]
    assert [(part["column"], part["value"]) for part in patients] == [
        ("Patient Gender", "F"), ("Patient Gender", "M"), ("view", "unknown"),
    ]  # fmt: skip
    with pytest.raises(UnknownNameError, match="no column 'country' to make subgroups of; columns: id"):
        run(made, "linear", "knn", subgroups=("country",))
    with pytest.raises(TaskError, match="column 'path' has 80 different values"):
        run(made, "linear", "knn", subgroups=("path",))


def test_subgroups_of_a_file(made: tuple[Store, dict[str, Any]], tmp_path: Path) -> None:
    table = scores_of(made[1]["knn"])
    columns = {"id": table["id"], "score:a": table["score:a"], "site": ["here", "there"] * 40}
    found = run(made, "linear", write_csv(tmp_path / "s.csv", columns), subgroups=("site",))
    assert [part["value"] for part in found["subgroups"]] == ["here", "there"]


def test_thresholds_come_from_validation(made: tuple[Store, dict[str, Any]], tmp_path: Path) -> None:
    found = run(made, "linear", "knn", Criteria(metric="sensitivity", num_resamples=20), youden=True)
    table, validation = (scores_of(made[1]["linear"], split) for split in ("test", "val"))
    threshold = found["thresholds"]["a"]["a"]
    assert threshold in validation["score:a"]
    decided, y = np.array(table["score:a"]) >= threshold, np.array(table["label:a"]) == 1
    assert found["result"]["per_label"][0]["a"]["value"] == pytest.approx(decided[y].mean())
    with pytest.raises(ConfigError, match="--threshold youden changes nothing of auroc"):
        run(made, "linear", "knn", youden=True)
    leaking = {name: [*validation[name], *table[name]] for name in table}
    leaking["split"] = ["val"] * (len(validation["id"])) + ["test"] * 80
    leaking["id"] = [f"v{number}" for number in range(len(validation["id"]))] + leaking["id"][-80:]
    leaking["group"] = [leaking["group"][-1], *leaking["group"][1:]]
    path = write_csv(tmp_path / "s.csv", {name: leaking[name] for name in leaking if not name.startswith("mask")})
    with pytest.raises(LeakError, match=r"1 groups \(patients\) are in both"):
        run(made, "linear", path, Criteria(metric="f1", num_resamples=20), youden=True)


def test_logits_are_not_decided_at_one_half(made: tuple[Store, dict[str, Any]], tmp_path: Path) -> None:
    table = scores_of(made[1]["linear"])
    scores = {name: np.array(table[name]) for name in ("score:a", "score:b")}
    logits = {name: np.log(values / (1 - values)).tolist() for name, values in scores.items()}
    file = write_csv(tmp_path / "logit.csv", {"id": table["id"], **logits})
    with pytest.raises(
        ConfigError,
        match=r"accuracy decides at a score of 0\.5, .* those of B \(logit\.csv\) reach from -\d.* to \d.*: give "
        r"--threshold youden, .* sigmoid",
    ):
        run(made, "knn", file, Criteria(metric="accuracy", num_resamples=20))
    with pytest.raises(ConfigError, match=r"those of A \(logit\.csv\) reach"):
        run(made, file, "knn", Criteria(metric="f1", num_resamples=20))
    assert run(made, "linear", file)["result"]["macro"]["delta"]["value"] == pytest.approx(0, abs=1e-12)
    sigmoid = write_csv(tmp_path / "p.csv", {"id": table["id"], **{name: v.tolist() for name, v in scores.items()}})
    same = run(made, "linear", sigmoid, Criteria(metric="accuracy", num_resamples=20))
    assert same["result"]["macro"]["delta"]["value"] == 0


def test_seeds_that_differ_are_a_spread(made: tuple[Store, dict[str, Any]], tmp_path: Path) -> None:
    record = made[1]["linear"]
    predictions = load_predictions(record).to_pydict()
    own = ("schema", "id", "time", "versions", "machine", "file", "digest")
    body = {name: value for name, value in record.items() if name not in own}
    for seed, value in ((0, 0.8), (1, 0.9), (2, 0.7)):
        changed = json.loads(json.dumps(body))
        changed["config"]["head"]["seed"] = seed
        changed["metrics"]["test"]["macro"]["auroc"] = value
        path = save_record(tmp_path, changed, predictions)
    spread = seed_spread(load_records_at(path), tmp_path, "auroc")
    assert spread is not None
    assert spread["seeds"] == {"0": 0.8, "1": 0.9, "2": 0.7}
    assert (spread["mean"], spread["sd"], spread["min"], spread["max"]) == pytest.approx((0.8, 0.1, 0.7, 0.9))
    assert seed_spread(record, made[0].path / "results", "auroc") is None
    found = compare(str(path), record["id"], SMALL, store=made[0], folder=made[0].path / "results")
    assert found["seeds"] == {"a": None, "b": None}


def test_records_are_found_by_id_its_start_and_path(made: tuple[Store, dict[str, Any]]) -> None:
    store, records = made
    folder = store.path / "results"
    record = records["linear"]
    for name in (record["id"], record["id"][:-4], record["file"], record["file"].replace(".json", ".parquet")):
        table = open_scores(name, folder)
        assert table.record is not None
        assert table.record["id"] == record["id"]
    with pytest.raises(UnknownNameError, match="4 records start with '2'"):
        find_record("2", folder)
    with pytest.raises(UnknownNameError, match="no record starts with 'zzz'"):
        find_record("zzz", folder)
    with pytest.raises(UnknownNameError, match=r"no record /nowhere\.json"):
        find_record("/nowhere.json", folder)
    with pytest.raises(UnknownNameError, match=r"no score file nothing\.csv"):
        open_scores("nothing.csv", folder)
    with pytest.raises(TaskError, match="no row of the split 'dev'; it has test, val"):
        open_scores(record["id"], folder, split="dev")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"name": ["x"], "score:a": [0.5]}, "names its samples in a column `id`; it has name, score:a"),
        ({"id": ["x", "x"], "score:a": [0.5, 0.6]}, "sample 'x' has more than one row"),
        ({"id": ["x"], "a": [0.5]}, "no column of scores; name them score:LABEL"),
        ({"id": ["x"], "score:a": ["high"]}, "column 'score:a' holds what is no number"),
        ({"id": ["x"], "score:a": [0.5], "label:a": [2]}, r"labels are 0, 1 or empty; found \[2.0\]"),
        (
            {"id": ["x"], "score:a": [0.5], "label": ["c"]},
            "the column `label` names 'c', which has no column of scores",
        ),
        ({"id": ["x"], "score:c": [0.5]}, r"no label is in both: .* such as 'a'; B \(s.csv\) has 1, such as 'c'"),
        ({"id": ["x"], "score:a": [0.5]}, "no sample is in both"),
        ({"id": ["x"], "score:a": [0.5], "split": ["train"]}, "no row of the split 'test'; it has train"),
    ],
)
def test_files_that_cannot_be_compared(
    made: tuple[Store, dict[str, Any]], tmp_path: Path, columns: dict[str, list[Any]], message: str
) -> None:
    with pytest.raises(TaskError, match=message):
        run(made, "linear", write_csv(tmp_path / "s.csv", columns))


def test_tables_that_are_none(made: tuple[Store, dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text("id,score:a\nx,0.5,7\n")
    with pytest.raises(TaskError, match=r"row 2 has another number of cells than the header \(2\)"):
        run(made, "linear", str(tmp_path / "s.csv"))
    (tmp_path / "s.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TaskError, match="not a table of text"):
        run(made, "linear", str(tmp_path / "s.csv"))


def test_truths_and_patients_that_contradict_each_other(made: tuple[Store, dict[str, Any]], tmp_path: Path) -> None:
    table = scores_of(made[1]["knn"])
    columns = {name: table[name] for name in ("id", "score:a")}
    other = write_csv(tmp_path / "a.csv", columns | {"label:a": [1 - table["label:a"][0], *table["label:a"][1:]]})
    with pytest.raises(TaskError, match="disagree on the truth of 1 entries, such as 'a' of sample"):
        run(made, "linear", other)
    groups = write_csv(tmp_path / "b.csv", columns | {"group": [f"g{number // 4}" for number in range(80)]})
    with pytest.raises(TaskError, match=r"different groups \(patients\): 40 in A, 20 in B"):
        run(made, "linear", groups)
    bare = write_csv(tmp_path / "c.csv", columns)
    with pytest.raises(TaskError, match=r"neither c.csv nor c.csv says what is true"):
        run(made, bare, bare)


def test_ages_and_spellings() -> None:
    assert [age_band(value) for value in ("040Y", 17, "17.9", 18, "85", None, "", "x", 999, "18M")] == [
        "40-59", "0-17", "0-17", "18-39", "80+", "unknown", "unknown", "unknown", "unknown", "0-17",
    ]  # fmt: skip
    assert age_of("026W") == pytest.approx(0.498, abs=1e-3)
    assert find_column(["Sex", "AP/PA", "Frontal/Lateral"], "view") == "Frontal/Lateral"
    assert find_column(["Sex"], "sex") == "Sex"
    assert list(subgroup_rows("age", [70, 5, None, 101])) == ["0-17", "60-79", "80+", "unknown"]


def command(made: tuple[Store, dict[str, Any]], *arguments: str) -> Any:
    app = typer.Typer()
    app.command("compare")(comparing.COMMANDS["compare"])
    return CliRunner().invoke(app, [*arguments, "--store", str(made[0].path), "--resamples", "30"])


def test_the_command_prints_tables(made: tuple[Store, dict[str, Any]]) -> None:
    ids = [made[1][name]["id"] for name in ("linear", "knn")]
    done = command(made, *ids, "--margin", "0.05", "--subgroups", "age")
    assert done.exit_code == 0, done.output
    for text in (
        "A  linear on x/m",
        "protocol differs in probe: A linear, B knn",
        "A - B [95%]",
        "p bootstrap",
        "p delong",
        "p Holm",
        "macro",
        "Patient Age",
        "not worse: one-sided at 0.025",
        "warning: Patient Age 60-79: only",
    ):
        assert text in done.output, text
    found = json.loads(command(made, *ids, "--json", "--metric", "f1").output)
    assert found["result"]["metric"] == "f1"
    refused = command(made, ids[0], "zzz")
    assert isinstance(refused.exception, FeatstoreError)
