"""Trained heads in one pass, what they read and why they are left out, and sets with random weights to compare with."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import register_pictures
from probe_sets import write_set
from reduced import config, run
from typer.testing import CliRunner

from cli.main import _probe_app, _store_app
from featstore.errors import IncompleteError, TaskError
from featstore.store.catalog import Store
from probes import suite
from probes.configs import EvalConfig, KnnConfig, TaskConfig
from probes.evaluation import evaluate_sets
from probes.sets import choose_features, with_patches
from probes.suite import evaluate_all, random_command, random_twins
from probes.suite_config import SuiteConfig
from probes.trained_config import AttentiveConfig, MilConfig, MlpConfig

HEADS: dict[str, Any] = {
    "mlp": MlpConfig(lr="1e-2", epochs=2, hidden=4),
    "attentive": AttentiveConfig(lr="1e-2", epochs=1),
    "mil": MilConfig(lr="1e-2", epochs=2, project=4),
    "knn": KnnConfig(k="5"),
}
TRAINED = SuiteConfig(probes="knn,mlp,attentive,mil", metadata="")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few epochs."""
    usual = suite.head_of
    monkeypatch.setattr(suite, "head_of", lambda probe, options: HEADS.get(probe) or usual(probe, options))


@pytest.fixture
def studies(tmp_path: Path, store_path: Path) -> Store:
    """80 samples, two a study, with a label and a number."""
    rng = np.random.default_rng(0)
    y = np.repeat(rng.integers(0, 2, 40), 2)
    X = rng.standard_normal((80, 4))
    X[:, 0] += y
    columns: dict[str, list[Any]] = {
        "part": ["train"] * 40 + ["val"] * 20 + ["test"] * 20,
        "pid": [f"p{row // 2}" for row in range(80)],
        "stud": [f"s{row // 2}" for row in range(80)],
        "a": [str(value) for value in y],
        "depth": [f"{value:.3f}" for value in np.repeat(rng.standard_normal(40), 2)],
    }
    write_set(store_path, tmp_path / "root", columns, X)
    return Store(store_path)


@pytest.fixture
def pictures(tmp_path: Path, store_path: Path) -> Store:
    """A tiny set with patches and one without, of 32 pictures."""
    register_pictures(store_path, tmp_path / "data", 32)
    run(store_path, config(""))
    run(store_path, config("", tokens="cls", res="28"))
    return Store(store_path)


def asked(**options: Any) -> EvalConfig:
    return EvalConfig(**{"dataset": "x", "labels": "a", "resamples": 10, **options})


def named(found: suite.Suite) -> list[tuple[str, str, str]]:
    return [
        (record["probe"], record["set"], record["features"])
        for record in found.records
        if not record["probe"].startswith("baseline")
    ]


def test_bags_are_of_units(studies: Store) -> None:
    found = evaluate_all(studies, asked(), TRAINED)
    assert [probe for probe, _, _ in named(found)] == ["knn", "mlp"]
    assert "probes mil is of bags, and the task counts images; --unit volume, study or patient" in "".join(found.notes)
    assert "probes attentive: x/m has no patches; run\n  featstore import FILE --dataset x" in "".join(found.notes)
    units = evaluate_all(studies, asked(), TRAINED, reading=TaskConfig(unit="study"))
    assert [probe for probe, _, _ in named(units)] == ["knn", "mlp", "mil"]
    assert units.records[2]["choices"]["bags"]["test"]["bags"] == units.records[0]["task"]["splits"]["test"] == 10
    assert not units.failed
    [single] = evaluate_sets(studies, "mil", asked(), HEADS["mil"], reading=TaskConfig(unit="study"))
    assert units.records[2]["metrics"] == single["metrics"]
    again = evaluate_all(studies, asked(), TRAINED, reading=TaskConfig(unit="study"))
    assert (again.num_made, again.records, again.notes) == (0, units.records, units.notes)
    averaged = evaluate_all(studies, asked(), TRAINED, reading=TaskConfig(unit="study", pool="features"))
    assert "--pool features averages images before a head sees them" in "".join(averaged.notes)
    assert not averaged.failed


def test_heads_of_labels_are_not_of_numbers(studies: Store) -> None:
    found = evaluate_all(studies, asked(labels="depth"), TRAINED, reading=TaskConfig(kind="regression", unit="study"))
    assert [probe for probe, _, _ in named(found)] == ["knn"]
    assert found.failed == []
    for probe in ("mlp", "mil"):
        assert f"probes {probe} trains heads of labels and classes, not of numbers and ranks" in found.notes


def test_features_that_are_not_there_stop_no_other_set(studies: Store) -> None:
    found = evaluate_all(studies, asked(features="cls,mean_patch"), replace(TRAINED, probes="mlp"))
    assert named(found) == [("mlp", "x/m", "cls")]
    assert found.failed[0].startswith(
        "mlp on x/m · mean_patch: x/m has no mean_patch, which mean_patch is made of; run"
    )


def test_patches_are_for_the_head_that_pools_them(pictures: Store) -> None:
    wanted = asked(dataset="pics", labels="kind")
    found = evaluate_all(pictures, wanted, replace(TRAINED, probes="knn,attentive"))
    assert named(found) == [
        ("knn", "pics/tiny@28", "cls"),
        ("knn", "pics/tiny@42", "cls"),
        ("attentive", "pics/tiny@42", "patches"),
    ]
    assert found.failed == []
    (note,) = found.notes
    assert note.startswith("probes attentive: pics/tiny@28 has no patches; run\n  featstore extract --dataset pics")
    assert "--tokens cls,patches" in note
    # Named, they are read by this probe alone.
    both = evaluate_all(pictures, replace(wanted, features="cls,patches"), replace(TRAINED, probes="knn,attentive"))
    assert (both.num_made, named(both)) == (0, named(found))


def test_attentive_reads_patches_where_nothing_is_named(pictures: Store, caplog: pytest.LogCaptureFixture) -> None:
    with_them = replace(asked(dataset="pics", labels="kind"), model="tiny@42")
    [record] = evaluate_sets(pictures, "attentive", with_them, HEADS["attentive"])
    assert record["features"] == "patches"
    sets = [pictures.open(entry) for entry in pictures.find("pics")]
    assert choose_features(sets[1], None, MlpConfig()) == ["cls"]
    assert choose_features(sets[1], None, MlpConfig(protocol="chest")) == ["cls"]
    assert choose_features(sets[1], "cls", HEADS["attentive"]) == ["cls"]
    assert [item.name for item in with_patches(sets, None, HEADS["attentive"])] == ["pics/tiny@42"]
    assert "skipped, no patches: 1 of 2 sets; run\n  featstore extract --dataset pics" in caplog.text
    assert with_patches(sets, "layers/1/patches", HEADS["attentive"]) == sets
    assert with_patches(sets, None, HEADS["mlp"]) == sets
    without = [item for item in sets if item.name == "pics/tiny@28"]
    assert with_patches(without, None, HEADS["attentive"]) == without
    with pytest.raises(IncompleteError, match="pics/tiny@28 has no patches, which patches is made of; run"):
        evaluate_sets(pictures, "attentive", replace(with_them, model="tiny@28"), HEADS["attentive"])


def test_random_weights_are_extracted_and_stand_in_the_table(pictures: Store, tmp_path: Path) -> None:
    wanted = shlex.split("all --dataset pics --labels kind --resamples 10 --probes knn,attentive --features cls")
    call = [*wanted, "--store", str(pictures.path)]
    runner = CliRunner()
    plain = runner.invoke(_probe_app(), call)
    assert plain.exit_code == 0, plain.output
    lines = [random_command(entry) for entry in random_twins(pictures, "pics")]
    assert len(lines) == 2
    hint = "no set with random weights to compare with; --extract makes it, or run\n  " + "\n  ".join(lines)
    assert hint in plain.stdout
    assert "RANDOM WEIGHTS" not in plain.stdout

    made = runner.invoke(_probe_app(), [*call, "--extract"])
    assert made.exit_code == 0, made.output
    store = Store(pictures.path)
    found = {entry.name: entry.spec for entry in store.find("pics") if entry.spec["random_weights"]}
    assert sorted(found) == ["pics/tiny-random@28", "pics/tiny-random@42"]
    assert random_twins(store, "pics") == []
    assert "no set with random weights" not in made.stdout
    assert made.stdout.count("RANDOM WEIGHTS") == 3  # two of knn, one of patches
    # Only the sets that are new were fitted; a second run has nothing to extract or to fit.
    assert "3 records made, 5 there already" in made.stderr
    again = runner.invoke(_probe_app(), [*call, "--extract"])
    assert again.stdout == made.stdout
    assert "0 records made, 8 there already" in again.stderr
    # One set by name has the same baseline beside it only where it is asked for.
    one = runner.invoke(_probe_app(), [*call, "--model", "tiny@42"])
    assert "tiny-random@42" in one.stdout
    assert "tiny@28" not in one.stdout

    # The line that is shown makes the same set.
    other = tmp_path / "other"
    register_pictures(other, tmp_path / "data", 32)
    line = next(line for line in lines if "--res 42" in line)
    typed = runner.invoke(_store_app(), [*shlex.split(line)[1:], "--store", str(other)])
    assert typed.exit_code == 0, typed.output
    (entry,) = Store(other).find("pics")
    assert entry.spec["fingerprint"] == found["pics/tiny-random@42"]["fingerprint"]


def test_training_again_on_resamples_is_refused_before_anything_is_trained(pictures: Store) -> None:
    call = ["attentive", "--dataset", "pics", "--train-resamples", "5", "--store", str(pictures.path)]
    found = CliRunner().invoke(_probe_app(), call)
    assert found.exit_code == 2
    assert "training probes attentive so many times is not offered; leave it out" in found.stderr
    assert "records" not in found.stdout


def test_folds_of_a_trained_head(studies: Store) -> None:
    call = shlex.split("mil --dataset x --labels a --unit study --folds 3 --epochs 1 --lr 1e-2 --resamples 10")
    found = CliRunner().invoke(_probe_app(), [*call, "--store", str(studies.path), "--project", "4"])
    assert found.exit_code == 0, found.output
    assert "in each of 3 folds" in found.stdout
    with pytest.raises(TaskError, match="counts images, and a bag is the images of one"):
        evaluate_sets(studies, "mil", asked(), HEADS["mil"])
