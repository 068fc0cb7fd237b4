"""`probes subgroups`: values and intervals of every part of the samples against scikit-learn, row by row."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from probe_sets import write_set
from sklearn.metrics import average_precision_score, mean_absolute_error, recall_score, roc_auc_score
from test_compare import scores_of, write_csv
from typer.testing import CliRunner

from cli import comparing
from featstore.errors import ConfigError, FeatstoreError, TaskError, UnknownNameError
from featstore.store.catalog import Store
from probes.configs import EvalConfig, LinearConfig, TaskConfig
from probes.draws import Draws
from probes.evaluation import evaluate_sets
from probes.subgroup_tables import by_subgroup
from probes.subgroups import parse_bands, subgroup_rows
from probes.thresholds import youden_threshold


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, dict[str, Any]]:
    """480 samples, two a patient; label `b` has no positive among those seen from the side."""
    root = tmp_path_factory.mktemp("subgroups")
    rng = np.random.default_rng(0)
    patient = np.arange(480) // 2
    y = (rng.random((480, 2)) < 0.4).astype(int)
    view = np.where(np.arange(480) % 2 == 0, "AP", "LL")
    y[view == "LL", 1] = 0
    features = rng.standard_normal((480, 6))
    features[:, :2] += 1.2 * y
    age = 20 + patient % 60
    columns = {
        "part": [("train", "val", "test")[number % 3] for number in patient],
        "pid": [f"p{number}" for number in patient],
        "a": y[:, 0].tolist(),
        "b": y[:, 1].tolist(),
        "Sex": ["M" if number % 5 < 3 else "F" for number in patient],
        "Age": [None if number % 17 == 0 else f"{value}" for number, value in zip(patient, age)],
        "view": view.tolist(),
        "weight": [f"{value:.1f}" for value in 60 + 10 * features[:, 2] + rng.standard_normal(480)],
    }
    write_set(root / "store", root / "x", columns, features)
    store = Store(root / "store")
    labels = EvalConfig(dataset="x", labels="a,b", features="cls", resamples=20)
    numbers = EvalConfig(dataset="x", labels="weight", features="cls", resamples=20)
    classes = EvalConfig(dataset="x", labels="Sex", features="cls", resamples=20)
    reading = {"numbers": TaskConfig(kind="regression"), "classes": TaskConfig(kind="multiclass", classes="M,F")}
    return store, {
        "labels": evaluate_sets(store, "linear", labels, LinearConfig(C="0.1"))[0],
        "numbers": evaluate_sets(store, "linear", numbers, LinearConfig(alpha="1"), reading=reading["numbers"])[0],
        "classes": evaluate_sets(store, "linear", classes, LinearConfig(C="0.1"), reading=reading["classes"])[0],
    }


def run(made: tuple[Store, dict[str, Any]], name: str, *columns: str, **options: Any) -> dict[str, Any]:
    store, records = made
    record = records[name]["id"] if name in records else name
    return by_subgroup(
        record, columns, store=store, folder=store.path / "results", **{"num_resamples": 15, "seed": 2, **options}
    )


def test_every_subgroup_is_that_of_its_rows(made: tuple[Store, dict[str, Any]]) -> None:
    found = run(made, "labels", "sex", "age")
    json.dumps(found)
    manifest = made[0].manifest("x")
    cells = {name: dict(zip(manifest.column("id"), manifest.column(name))) for name in ("Sex", "Age")}
    table, validation = scores_of(made[1]["labels"]), scores_of(made[1]["labels"], "val")
    limits = {c: youden_threshold(np.array(validation[f"label:{c}"]), np.array(validation[f"score:{c}"])) for c in "ab"}
    assert found["thresholds"] == pytest.approx(limits)
    assert [(entry["column"], entry["value"]) for entry in found["subgroups"]] == [
        ("", "all"), ("Sex", "F"), ("Sex", "M"),
        ("Age", "18-39"), ("Age", "40-59"), ("Age", "60-79"), ("Age", "unknown"),
    ]  # fmt: skip
    for entry in found["subgroups"]:
        rows = np.array([belongs(cells, entry, name) for name in table["id"]])
        groups = np.array(table["group"])[rows]
        draws = Draws.of(groups, num_resamples=15, seed=2)
        assert (entry["n"], entry["num_groups"]) == (rows.sum(), len(draws.groups))
        for item, label in zip(entry["per_label"], "ab"):
            y, scores = (np.array(table[f"{kind}:{label}"])[rows] for kind in ("label", "score"))
            decided = (scores >= limits[label]).astype(int)
            assert (item["n"], item["positives"]) == (rows.sum(), y.sum())
            for name, value in (
                ("auroc", roc_auc_score(y, scores)), ("auprc", average_precision_score(y, scores)),
                ("sensitivity", recall_score(y, decided)), ("specificity", recall_score(1 - y, 1 - decided)),
            ):  # fmt: skip
                assert item[name]["value"] == pytest.approx(value, abs=1e-12), (entry["value"], name)
            columns = draws.columns(groups)
            repeated = [np.repeat(np.arange(len(y)), counts[columns]) for counts in draws.counts]
            areas = [roc_auc_score(y[part], scores[part]) for part in repeated if 0 < y[part].sum() < len(part)]
            bounds = np.percentile(areas, [2.5, 97.5])
            assert (item["auroc"]["low"], item["auroc"]["high"]) == pytest.approx(tuple(bounds), abs=1e-12)
            if y.sum() > 0:
                kept = [part for part in repeated if 0 < y[part].sum() < len(part)]
                recalls = np.percentile([decided[part][y[part] == 1].mean() for part in kept], [2.5, 97.5])
                assert (item["sensitivity"]["low"], item["sensitivity"]["high"]) == pytest.approx(tuple(recalls))
        macro = np.mean([item["auroc"]["value"] for item in entry["per_label"]])
        assert entry["macro"]["auroc"]["value"] == pytest.approx(macro)


def belongs(cells: dict[str, dict[Any, Any]], entry: dict[str, Any], name: str) -> bool:
    if not entry["column"]:
        return True
    value = cells[entry["column"]][name]
    if entry["column"] == "Sex":
        return bool(value == entry["value"])
    if value is None or entry["value"] == "unknown":
        return value is None and entry["value"] == "unknown"
    low, high = entry["value"].split("-")
    return bool(int(low) <= int(value) <= int(high))


def test_a_label_with_one_class_is_a_dash_and_counted(made: tuple[Store, dict[str, Any]]) -> None:
    found = run(made, "labels", "view")
    side = next(entry for entry in found["subgroups"] if entry["value"] == "LL")
    assert (side["num_labels"], side["skipped"]) == (1, 1)
    assert np.isnan(side["per_label"][1]["auroc"]["value"])
    assert side["macro"]["auroc"]["value"] == pytest.approx(side["per_label"][0]["auroc"]["value"])
    assert "fewer than 20 positives for 1 of 2 labels" in side["few"]


def test_numbers_and_classes_have_their_own_metrics(made: tuple[Store, dict[str, Any]]) -> None:
    found = run(made, "numbers", "sex")
    table = scores_of(made[1]["numbers"])
    assert found["metrics"] == ["mae", "rmse", "r2", "pearson", "spearman"]
    assert found["thresholds"] is None
    expected = mean_absolute_error(table["label:weight"], table["score:weight"])
    assert found["subgroups"][0]["macro"]["mae"]["value"] == pytest.approx(expected)
    assert sum(entry["n"] for entry in found["subgroups"][1:]) == len(table["id"])
    classes = run(made, "classes", "view")
    assert classes["metrics"] == ["auroc", "auprc", "accuracy", "balanced_accuracy"]
    table = scores_of(made[1]["classes"])
    scores = np.array([table["score:M"], table["score:F"]]).T
    right = np.array(["M", "F"])[scores.argmax(1)] == np.array(table["label"])
    assert classes["subgroups"][0]["macro"]["accuracy"]["value"] == pytest.approx(right.mean())


def test_files_of_scores(made: tuple[Store, dict[str, Any]], tmp_path: Path) -> None:
    table = scores_of(made[1]["labels"])
    columns = {name: table[name] for name in ("id", "score:a", "label:a", "group")}
    columns["site"] = ["here", "there"] * (len(table["id"]) // 2)
    found = run(made, write_csv(tmp_path / "s.csv", columns), "site")
    assert [entry["value"] for entry in found["subgroups"]] == ["all", "here", "there"]
    assert found["metrics"] == ["auroc", "auprc"]
    columns["split"] = ["test"] * len(table["id"])
    said = run(made, write_csv(tmp_path / "t.csv", columns), "site")["notes"]
    assert said[-1].startswith("no sensitivity and specificity: ")
    assert "no row of the split 'val'" in said[-1]
    assert "has no column `split`, so all its rows are test rows" in found["notes"][-1]
    bare = write_csv(tmp_path / "u.csv", {name: table[name] for name in ("id", "score:a")})
    with pytest.raises(TaskError, match="says what is true"):
        run(made, bare, "site")


def test_what_cannot_be_a_subgroup(made: tuple[Store, dict[str, Any]]) -> None:
    with pytest.raises(UnknownNameError, match="no column 'country' to make subgroups of; columns: id"):
        run(made, "labels", "country")
    with pytest.raises(TaskError, match=r"column 'weight' has .* different values"):
        run(made, "labels", "weight")
    with pytest.raises(ConfigError, match="subgroups need a column to go by; give --by sex, age, view"):
        run(made, "labels")


def test_bands() -> None:
    assert parse_bands("0-18,18-40,40-60,60-80,80+") == parse_bands("0,18,40,60,80") == (0, 18, 40, 60, 80)
    assert list(subgroup_rows("age", [70, 5, 50, 4], bands=(5, 50))) == ["5-49", "50+", "unknown"]
    for text, message in (
        ("a", "bands of age are whole years such as 0,18,40"),
        ("5,5", "bands of age ascend from 0 or more"),
        ("", "bands of age ascend from 0 or more"),
        ("0-18,20+", "a band of age ends where the next starts and the last is open"),
        ("0-18,18-40", "a band of age ends where the next starts and the last is open"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_bands(text)


def test_the_command_prints_tables(made: tuple[Store, dict[str, Any]]) -> None:
    app = typer.Typer()
    for name, call in comparing.COMMANDS.items():
        app.command(name)(call)
    more = ["--store", str(made[0].path), "--resamples", "20"]
    record = made[1]["labels"]["id"]
    done = CliRunner().invoke(app, ["subgroups", record, "--by", "view,age", "--bands", "0,50", *more])
    assert done.exit_code == 0, done.output
    for text in (
        "macro by subgroup (test)",
        "sensitivity [95%]",
        "0-49",
        "view LL: 1 labels have one class there; the macro leaves them out",
        "sensitivity and specificity at Youden's threshold of the validation rows",
        "warning: ",
    ):
        assert text in done.output, text
    found = json.loads(CliRunner().invoke(app, ["subgroups", record, "--by", "sex", "--json", *more]).output)
    assert [entry["value"] for entry in found["subgroups"]] == ["all", "F", "M"]
    refused = CliRunner().invoke(app, ["subgroups", record, "--by", "planet", *more])
    assert isinstance(refused.exception, FeatstoreError)
