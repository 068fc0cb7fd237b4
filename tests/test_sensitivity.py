"""What the reading of uncertain labels changes: one record per policy, paired differences on the same test rows."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from probe_sets import by_patient, write_set
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

from cli import main
from featstore.errors import TaskError, UnknownNameError
from featstore.store.catalog import Store
from probes import report
from probes.configs import EvalConfig, KnnConfig, LinearConfig, SplitConfig, TaskConfig
from probes.evaluation import evaluate_sets
from probes.known import TASKS
from probes.policies import POLICIES, SENSITIVITY, Policy
from probes.records import load_predictions, load_records
from probes.sensitivity import PolicyComparison, policy_specs
from probes.statistics import draw_counts, interval
from probes.taskspec import TaskSpec


@pytest.fixture
def uncertain(tmp_path: Path, store_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """240 samples, two a patient; a fifth of the labels is uncertain, mostly positives."""
    rng = np.random.default_rng(0)
    y = (rng.random((240, 2)) < 0.4).astype(int)
    features = rng.standard_normal((240, 6))
    features[:, :2] += 1.2 * y
    cells = np.where(rng.random(y.shape) < 0.1 + 0.2 * y, -1, y)
    patient = np.arange(240) // 2
    columns: dict[str, list[Any]] = {
        **by_patient(patient),
        "a": [str(value) for value in cells[:, 0]],
        "b": [str(value) for value in cells[:, 1]],
        "kind": [("x", "y", "z")[number % 3] for number in range(240)],
    }
    write_set(store_path, tmp_path / "x", columns, features)
    own = Policy(uncertain="zero", blank="zero", overrides=(("a", "one"),))
    monkeypatch.setitem(TASKS, "t", TaskSpec(name="t", labels=("a", "b"), train_policy=own))
    return Store(store_path)


def run(store: Store, policies: str, probe: str = "linear", head: Any = None, **options: Any) -> list[dict[str, Any]]:
    config = EvalConfig(dataset="x", **{"task": "t", "features": "cls", "resamples": 60, **options})
    head = head or LinearConfig(C="0.01,1")
    return evaluate_sets(store, probe, config, head, reading=TaskConfig(policies=policies))


def test_the_tasks_own_policy_comes_first_and_once() -> None:
    mixed = TaskSpec(name="t", labels=("a",), train_policy=POLICIES["mixed"])
    assert list(policy_specs(mixed, "all")) == ["mixed", "zeros", "ones", "ignore", "drop-row", "extra-class"]
    assert list(policy_specs(mixed, "ones, mixed")) == ["mixed", "ones"]
    own = TaskSpec(name="t", labels=("a",))
    assert list(policy_specs(own, "all")) == ["labelled-only", *SENSITIVITY]
    assert all(spec.eval_policy == own.eval_policy for spec in policy_specs(own, "all").values())
    with pytest.raises(UnknownNameError, match="unknown label policy 'none'; known: ignore"):
        policy_specs(own, "none")


@pytest.mark.parametrize(("probe", "head"), [("linear", None), ("knn", KnnConfig(k="5,15"))])
def test_one_record_per_policy_on_the_same_test_rows(uncertain: Store, probe: str, head: Any) -> None:
    records = run(uncertain, "all", probe, head)
    assert [record["sensitivity"]["policy"] for record in records] == ["own", *SENSITIVITY]
    assert len({record["task"]["digest"] for record in records}) == len(records)
    tables = [load_predictions(record).to_pydict() for record in records]
    for table, record in zip(tables, records):
        rows = [row for row, part in enumerate(table["split"]) if part == "test"]
        assert [table["id"][row] for row in rows] == [tables[0]["id"][row] for row in rows]
        assert [table["mask:a"][row] for row in rows] == [tables[0]["mask:a"][row] for row in rows]
        assert record["sensitivity"]["reference_task"] == records[0]["task"]["digest"]
    train = {record["sensitivity"]["policy"]: record["task"]["splits"]["train"] for record in records}
    assert train["drop-row"] < train["zeros"] == 144


def test_differences_are_paired_by_patient(uncertain: Store) -> None:
    records = run(uncertain, "ones")
    tables = [load_predictions(record).to_pydict() for record in records]
    rows = [row for row, part in enumerate(tables[0]["split"]) if part == "test"]
    groups = np.array([tables[0]["group"][row] for row in rows])
    masks, truths = (
        [np.array([tables[0][f"{what}:{label}"][row] for row in rows]) for label in "ab"] for what in ("mask", "label")
    )
    used = masks[0] | masks[1]
    ids, index = np.unique(groups[used], return_inverse=True)
    number = np.zeros(len(groups), int)
    number[used] = index
    counts = draw_counts(ids, num_resamples=60, seed=0)

    def macro(table: dict[str, list[Any]], weights: np.ndarray) -> float:
        found = []
        for label, mask, truth in zip("ab", masks, truths):
            scores = np.array([table[f"score:{label}"][row] for row in rows])
            found.append(roc_auc_score(truth[mask], scores[mask], sample_weight=weights[mask]))
        return float(np.mean(found))

    def paired(weights: np.ndarray) -> float:
        return macro(tables[1], weights) - macro(tables[0], weights)

    entry = records[1]["sensitivity"]["difference"]
    assert entry["auroc"] == pytest.approx(paired(np.ones(len(rows))), abs=1e-12)
    values = np.array([paired(np.where(used, row[number], 0).astype(float)) for row in counts])
    assert entry == pytest.approx({"auroc": entry["auroc"], **interval(values)}, abs=1e-12)
    assert records[0]["sensitivity"]["difference"]["auroc"] == 0.0


def test_heads_fitted_again_have_a_column_of_their_own(uncertain: Store) -> None:
    config = EvalConfig(dataset="x", task="t", features="cls", resamples=6)
    head, reading = LinearConfig(C="1"), TaskConfig(policies="ones")
    records = evaluate_sets(uncertain, "linear", config, head, reading=reading, splits=SplitConfig(train_resamples=2))
    _, columns, rows = report.sensitivity_table(records)
    bounds = records[1]["metrics"]["test"]["intervals_nested"]["macro"]["auroc"]
    assert rows[1][columns.index("[95%] + training")] == f"[{bounds['low']:.3f}, {bounds['high']:.3f}]"
    assert {len(row) for row in rows} == {len(columns)}


def test_the_table_shows_every_policy_once(uncertain: Store, capsys: pytest.CaptureFixture[str]) -> None:
    run(uncertain, "ones,extra-class")
    records = run(uncertain, "ones,extra-class")
    kept = load_records(uncertain.path / "results")
    assert len(kept) == 6
    assert report.tables(kept) == []
    [(table, notes)] = report.sensitivity_tables(kept)
    assert table == report.sensitivity_tables(records)[0][0]
    assert [row[0] for row in table[2]] == ["own (the task's own)", "ones", "extra-class"]
    assert table[2][0][4] == "-"
    low, high = (records[1]["sensitivity"]["difference"][key] for key in ("low", "high"))
    assert table[2][1][4].endswith(f"[{low:.3f}, {high:.3f}]")
    assert any("scored 6 times" in note for note in notes), "every policy opens the same test split"
    shown: list[str] = []
    report.print_tables(records, lambda title, *_, **__: shown.append(title))
    assert shown == [table[0]]
    assert "scored" in capsys.readouterr().out


def test_policies_of_a_categorical_task(uncertain: Store) -> None:
    with pytest.raises(TaskError, match="is multiclass: label policies read columns of 1, 0, -1 and blank; leave"):
        run(uncertain, "ones", task=None, labels="kind")


def test_other_test_rows_are_not_compared(uncertain: Store) -> None:
    from probes.selection import Fitted
    from probes.tasks import choose_task, make_task

    features = uncertain["x", "m"]
    manifest = features.manifest
    compare = PolicyComparison(["own", "ones"], resamples=5, seed=0)
    for name, reading in (("own", TaskConfig()), ("ones", TaskConfig(eval_policy="drop-row"))):
        task = make_task(features, choose_task(manifest, task="t", reading=reading))
        count = len(task.truth("test").ids)
        fitted = Fitted(np.zeros((1, 2)), np.random.default_rng(0).random((count, 2)), {}, 0)
        if name == "own":
            assert compare(task, fitted)["difference"]["auroc"] == 0.0
        else:
            with pytest.raises(TaskError, match="policy 'ones' leaves other test rows than 'own'"):
                compare(task, fitted)


def test_policies_are_compared_without_the_extra_label(uncertain: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    extra = POLICIES["extra-class"]
    spec = TaskSpec(name="t", labels=("a", "b"), train_policy=extra, eval_policy=extra)
    monkeypatch.setitem(TASKS, "t", spec)
    records = run(uncertain, "all")
    assert [record["sensitivity"]["policy"] for record in records] == ["extra-class", *SENSITIVITY[:-1]]
    for record in records:
        assert record["task"]["spec"]["eval_policy"]["uncertain"] == "zero"
        assert any("compared without the label Uncertain" in text for text in record["deviations"])
        scored = [entry["label"] for entry in record["metrics"]["test"]["per_label"] if entry["n"]]
        assert scored == ["a", "b"]
    specs = policy_specs(TASKS["chexpert-6-c"], "all").values()
    assert {spec.eval_policy for spec in specs} == {Policy(uncertain="zero", blank="zero")}


@pytest.mark.parametrize("arguments", [["--policies", "all"], ["--train-policy", "ones", "--eval-policy", "ignore"]])
def test_the_command(uncertain: Store, arguments: list[str]) -> None:
    command = ["knn", "--dataset", "x", "--labels", "a,b", "--resamples", "10"]
    done = CliRunner().invoke(main._probe_app(), [*command, *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    if "--policies" in arguments:
        assert "training policies" in done.stdout
        assert "extra-class" in done.stdout
    else:
        assert "val AUROC" in done.stdout
        [record] = load_records(uncertain.path / "results")
        assert record["task"]["spec"]["train_policy"]["uncertain"] == "one"
        assert record["config"]["task"]["eval_policy"] == "ignore"
