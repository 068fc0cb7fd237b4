"""One pass over everything: what is read and fitted, what a second run takes as it is, and what it must not."""

import json
import logging
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from probe_sets import write_set
from typer.testing import CliRunner

from cli.main import _probe_app
from featstore.errors import ConfigError, TaskError, UnknownNameError
from featstore.store.catalog import Store
from featstore.store.features import FeatureSet
from featstore.store.importer import import_features
from probes import BASELINES, PROBES, evaluation, fewshot, suite, tasks
from probes.configs import EvalConfig, KnnConfig, TaskConfig
from probes.evaluation import evaluate_sets
from probes.fewshot_config import FewShotConfig, FewShotData
from probes.records import load_records
from probes.suite import CONFIGS, IMPLEMENTATION, Suite, evaluate_all
from probes.suite_config import SuiteConfig
from probes.trained_config import MlpConfig

SIZE = 160
CONFIG = EvalConfig(dataset="x", labels="a,b", resamples=20)
WHOLE = SuiteConfig(shots="1", repeats=3)
FAST = replace(WHOLE, probes="knn,fewshot", metadata="")
NEIGHBOURS = SuiteConfig(probes="knn", metadata="")
NUM = 2 * 2 + 2  # two sets, two probes, two baselines
NUM_WHOLE = 2 * 3 + 3


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two sets of 160 samples with two labels, ages and views: `store`, and `warm` after a run."""
    path = tmp_path_factory.mktemp("suite")
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, (SIZE, 2))
    columns: dict[str, list[Any]] = {
        "part": ["train", "train", "val", "test"] * (SIZE // 4),
        "pid": [f"p{row}" for row in range(SIZE)],
        "a": [str(value) for value in y[:, 0]],
        "b": [str(value) for value in y[:, 1]],
        "age": [str(int(value)) for value in rng.integers(20, 90, SIZE)],
        "view": [["AP", "PA"][value] for value in rng.integers(0, 2, SIZE)],
        "depth": [f"{value:.3f}" for value in rng.standard_normal(SIZE)],
    }
    X = rng.standard_normal((SIZE, 6))
    X[:, :2] += y
    write_set(path / "store", path / "root", columns, X, label_columns="a,b", model="one")
    names = np.array([f"{row:03d}.png" for row in range(SIZE)])
    np.savez(path / "two.npz", features=(X + 1).astype(np.float32), id=names)
    import_features(path / "store", path / "two.npz", dataset="x", model="two")
    shutil.copytree(path / "store", path / "warm")
    run(Store(path / "warm"))
    return path


@pytest.fixture
def store(made: Path, store_path: Path) -> Store:
    """The store as it was before any run."""
    shutil.copytree(made / "store", store_path)
    return Store(store_path)


@pytest.fixture
def warm(made: Path, store_path: Path) -> Store:
    """The store after a run."""
    shutil.copytree(made / "warm", store_path)
    return Store(store_path)


class Counts:
    """What a run reads and fits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reads: list[str] = []
        self.fits: list[str] = []
        self.stop_at: int | None = None
        read, fit, curve = FeatureSet.load, evaluation.evaluate_one, fewshot.record_curve

        def load(found: FeatureSet, features: str = "cls+mean_patch", **options: Any) -> np.ndarray:
            self.reads.append(f"{found.name}:{features}")
            return read(found, features, **options)

        def one(probe: str, job: Any, *rest: Any, **options: Any) -> dict[str, Any]:
            self.count(f"{probe}:{job.task.features.name}")
            return fit(probe, job, *rest, **options)

        def record(task: Any, *rest: Any, **options: Any) -> dict[str, Any]:
            self.count(f"fewshot:{task.features.name}")
            return curve(task, *rest, **options)

        monkeypatch.setattr(FeatureSet, "load", load)
        monkeypatch.setattr(suite, "evaluate_one", one)
        monkeypatch.setattr(fewshot, "record_curve", record)

    def count(self, what: str) -> None:
        if self.stop_at == len(self.fits):
            raise KeyboardInterrupt
        self.fits.append(what)

    def clear(self) -> None:
        self.reads, self.fits = [], []


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    return Counts(monkeypatch)


def run(store: Store, config: EvalConfig = CONFIG, options: SuiteConfig = FAST, **more: Any) -> Suite:
    return evaluate_all(store, config, options, **more)


def test_features_are_read_once_for_all_probes(store: Store, counts: Counts) -> None:
    steps: list[int] = []

    class Told:
        def __init__(self, total: int) -> None:
            steps.append(total)

        def __enter__(self) -> Any:
            return steps.append

        def __exit__(self, *_: object) -> None:
            pass

    found = run(store, options=WHOLE, progress=Told)
    assert counts.reads == ["x/one:cls", "x/two:cls"]
    assert counts.fits[:6] == [f"{probe}:x/{name}" for name in ("one", "two") for probe in ("knn", "linear", "fewshot")]
    assert [name.partition(":x")[0] for name in counts.fits[6:]] == list(BASELINES)
    assert steps == [NUM_WHOLE] + [1] * NUM_WHOLE
    assert (found.num_made, found.num_kept, found.failed, len(found.records)) == (NUM_WHOLE, 0, [], NUM_WHOLE)
    assert len(load_records(store.path / "results")) == NUM_WHOLE


def test_records_are_those_of_the_single_commands(store: Store) -> None:
    found = {(record["probe"], record["set"]): record for record in run(store).records}
    single = evaluate_sets(store, "knn", replace(CONFIG, model="one"), KnnConfig())[0]
    assert found["knn", "x/one"]["metrics"] == single["metrics"]
    [curve] = fewshot.evaluate_fewshot(
        store,
        FewShotData(dataset="x", labels="a,b", model="one"),
        FewShotConfig(shots="1", repeats=3),
    )
    assert found["fewshot", "x/one"]["curve"] == curve["curve"]


def test_a_second_run_computes_nothing_and_says_the_same(store: Store, counts: Counts) -> None:
    first = run(store)
    opened = [record["test_opened"] for record in first.records]
    assert sorted(opened) == list(range(1, NUM + 1))
    counts.clear()
    second = run(store)
    assert (counts.reads, counts.fits) == ([], [])
    assert (second.num_made, second.num_kept) == (0, NUM)
    assert second.records == first.records
    # The next record of this test split counts on from what there is, not from how often tables were shown.
    assert evaluate_sets(store, "knn", replace(CONFIG, model="one"), KnnConfig())[0]["test_opened"] == NUM + 1


@pytest.mark.parametrize("stop", [0, 1, 3, 5])
def test_a_run_that_was_killed_goes_on(store: Store, counts: Counts, stop: int) -> None:
    counts.stop_at = stop
    with pytest.raises(KeyboardInterrupt):
        run(store)
    done = counts.fits
    counts.clear()
    counts.stop_at = None
    found = run(store)
    assert not set(done) & set(counts.fits)
    assert len(done) + len(counts.fits) == NUM
    assert (found.num_made, found.num_kept) == (NUM - stop, stop)
    assert len(load_records(store.path / "results")) == NUM


def test_a_kill_between_a_record_and_its_answer_costs_that_record(
    store: Store, counts: Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(suite, "keep", cut)
        with pytest.raises(KeyboardInterrupt):
            run(store)
    assert run(store).num_made == NUM
    assert len(load_records(store.path / "results")) == NUM + 1


def test_only_what_is_new_is_computed(warm: Store, counts: Counts, tmp_path: Path) -> None:
    counts.clear()
    values = np.random.default_rng(3).standard_normal((SIZE, 4)).astype(np.float32)
    np.savez(tmp_path / "three.npz", features=values, id=np.array([f"{row:03d}.png" for row in range(SIZE)]))
    import_features(warm.path, tmp_path / "three.npz", dataset="x", model="three")
    assert run(warm).num_made == 2
    assert set(counts.fits) == {f"{probe}:x/three" for probe in ("knn", "fewshot")}
    assert counts.reads == ["x/three:cls"]
    # Fewer probes, or one set of several, ask nothing new.
    counts.clear()
    assert run(warm, replace(CONFIG, model="two"), NEIGHBOURS).num_made == 0
    assert run(warm, replace(CONFIG, features="cls")).num_made == 0


@pytest.mark.parametrize(
    ("config", "options", "again"),
    [
        ({"resamples": 21}, {}, NUM - 2),  # bands of curves are of their draws
        ({"seed": 1}, {}, NUM),
        ({"labels": "a"}, {}, NUM),
        ({"where": "view=AP"}, {}, NUM),
        ({}, {"repeats": 4}, 2),
        ({}, {"shots": "2"}, 2),
        ({}, {"metadata": "age"}, 1),
        ({}, {"again": True}, NUM),
    ],
)
def test_other_options_are_other_records(
    warm: Store, config: dict[str, Any], options: dict[str, Any], again: int
) -> None:
    assert run(warm, replace(CONFIG, **config), replace(FAST, **options)).num_made == again


def test_other_readings_and_implementations_are_other_records(warm: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(warm, reading=TaskConfig(train_policy="zeros")).num_made == NUM
    monkeypatch.setitem(IMPLEMENTATION, "knn", IMPLEMENTATION["knn"] + 1)
    assert run(warm).num_made == 2
    monkeypatch.setitem(IMPLEMENTATION, "tasks", IMPLEMENTATION["tasks"] + 1)
    assert run(warm).num_made == NUM


def test_rows_that_fail_or_heal_are_other_rows(warm: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = FeatureSet.ok.fget  # type: ignore[attr-defined]

    def without(found: FeatureSet) -> np.ndarray:
        rows: np.ndarray = whole(found)
        rows[0] = found.name != "x/one"
        return rows

    monkeypatch.setattr(FeatureSet, "ok", property(without))
    found = run(warm)
    assert (found.num_made, found.num_kept) == (2, NUM - 2)
    trains = {record["set"]: record["task"]["splits"]["train"] for record in found.records if record["probe"] == "knn"}
    assert trains == {"x/one": SIZE // 2 - 1, "x/two": SIZE // 2}


def test_another_manifest_is_another_task(warm: Store, made: Path) -> None:
    from featstore.configs import RegisterConfig
    from featstore.register import register

    root = made / "root"
    table = RegisterConfig(table=root / "labels.parquet", label_columns="a,b", split_column="part")
    register(warm.path, "x", root, table)  # without groups
    for name, file in (("one", root / "f.npz"), ("two", made / "two.npz")):
        import_features(warm.path, file, dataset="x", model=name)
    assert run(warm).num_made == NUM
    assert run(warm).num_made == 0


def test_a_task_that_is_read_otherwise_is_not_taken_for_the_same(warm: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digest of the task is asked wherever anything has to be computed."""
    folder = warm.path / "results"
    next(path for path in folder.glob("*.json") if json.loads(path.read_bytes())["probe"] == "knn").unlink()
    real = tasks.make_task

    def other(*args: Any, **options: Any) -> Any:
        made = real(*args, **options)
        made.role[np.flatnonzero(made.role == "test")[:2]] = ""
        return made

    monkeypatch.setattr(suite, "make_task", other)
    assert run(warm).num_made >= 2


@pytest.mark.parametrize("damage", ["record", "predictions", "answer", "gone", "no predictions"])
def test_damage_is_told_and_made_again(warm: Store, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    first = run(warm).records
    folder = warm.path / "results"
    path = Path(first[0]["file"])
    if damage == "gone":
        path.unlink()
    elif damage == "no predictions":
        path.with_suffix(".parquet").unlink()
    elif damage == "answer":
        for answer in (folder / "suite").glob("*.json"):
            if first[0]["id"] in answer.read_text():
                answer.write_text(answer.read_text().replace(first[0]["id"], first[1]["id"]))
    else:
        broken = path if damage == "record" else path.with_suffix(".parquet")
        data = bytearray(broken.read_bytes())
        data[len(data) // 2] ^= 1
        broken.write_bytes(bytes(data))
    with caplog.at_level(logging.WARNING):
        found = run(warm)
    assert found.num_made == 1
    assert (
        "is gone; its record is made again" if damage in ("gone", "no predictions") else "made again: "
    ) in caplog.text
    assert run(warm).num_made == 0


def test_numbers_have_no_curves_and_the_others_go_on(store: Store) -> None:
    config = replace(CONFIG, labels="depth")
    options = replace(FAST, metadata=None)
    found = run(store, config, options, reading=TaskConfig(kind="regression"))
    assert list(found.notes) == ["few-shot curves are of labels and classes, not of numbers and ranks"]
    assert [record["probe"] for record in found.records] == ["knn"] * 2 + list(BASELINES)
    assert found.records[-1]["choices"]["columns"] == ["age", "view"]
    again = run(store, config, options, reading=TaskConfig(kind="regression"))
    assert (again.num_made, list(again.notes)) == (0, list(found.notes))


def test_metadata_that_there_is_not_is_said(store: Store) -> None:
    found = run(store)
    assert [record["probe"] for record in found.records][-2:] == ["baseline:chance", "baseline:majority"]
    only = replace(CONFIG, labels="view")
    columns = run(store, only, replace(NEIGHBOURS, metadata=None)).records[-1]["choices"]["columns"]
    assert columns == ["age"]  # view is what is predicted


def test_a_probe_that_cannot_be_fitted_does_not_stop_the_others(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        suite, "head_of", lambda probe, options: KnnConfig(k="5000") if probe == "knn" else HEADS[probe]
    )
    found = run(store)
    assert len(found.failed) == 2
    assert found.failed[0].startswith("knn on x/one · cls: k=5000")
    assert found.num_made == NUM - 2


HEADS = {probe: suite.head_of(probe, FAST) for probe in ("linear", "fewshot", *BASELINES)}


def test_options_of_every_probe_are_known() -> None:
    for probe in PROBES:
        assert suite.head_of(probe, SuiteConfig()) is not None
    assert set(CONFIGS) <= {*PROBES, "fewshot"}
    assert suite.head_of("fewshot", FAST).counts == (1,)


def test_options_that_one_pass_does_not_have(store: Store) -> None:
    with pytest.raises(ConfigError, match="--policies belongs to `probes linear` and `probes knn`"):
        run(store, reading=TaskConfig(policies="zeros,ones"))
    with pytest.raises(ConfigError, match="--test-dataset belongs to"):
        run(store, reading=TaskConfig(test_dataset="y"))
    with pytest.raises(ConfigError, match="--choose-features belongs to"):
        run(store, replace(CONFIG, choose_features=True))
    with pytest.raises(UnknownNameError, match=r"unknown probe 'svm'; --probes takes .*fewshot, knn, linear"):
        SuiteConfig(probes="knn,svm")
    with pytest.raises(ConfigError, match="--probes names no probe"):
        SuiteConfig(probes=" ,")


def test_the_command_shows_tables_and_how_to_compare_with_random_weights(store: Store) -> None:
    call = [
        "all",
        "--dataset",
        "x",
        "--labels",
        "a,b",
        "--resamples",
        "20",
        "--shots",
        "1",
        "--repeats",
        "3",
        "--probes",
        "knn,fewshot",
    ]
    runner = CliRunner()
    first = runner.invoke(_probe_app(), [*call, "--store", str(store.path)])
    assert first.exit_code == 0, first.output
    for text in ("probes knn", "probes fewshot", "baseline: chance", "baseline: metadata"):
        assert text in first.stdout
    assert "no set with random weights to compare with, and imported features name no network" in first.stdout
    assert "7 records made, 0 there already" in first.stderr
    second = runner.invoke(_probe_app(), [*call, "--store", str(store.path)])
    assert second.stdout == first.stdout
    assert "0 records made, 7 there already" in second.stderr
    shown = runner.invoke(_probe_app(), [*call, "--store", str(store.path), "--json"])
    assert [record["probe"] for record in json.loads(shown.stdout)][-3:] == list(BASELINES)
    help_ = runner.invoke(_probe_app(), ["all", "--help"]).stdout
    assert "goes on where it stopped" in help_
    assert "probes all --dataset chexpert" in help_


def test_what_failed_is_the_exit_code(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        suite, "head_of", lambda probe, options: KnnConfig(k="5000") if probe == "knn" else HEADS[probe]
    )
    call = [
        "all",
        "--dataset",
        "x",
        "--labels",
        "a,b",
        "--resamples",
        "20",
        "--probes",
        "knn",
        "--store",
        str(store.path),
    ]
    found = CliRunner().invoke(_probe_app(), call)
    assert found.exit_code == 2
    assert "2 records could not be made:\n  knn on x/one · cls: k=5000" in found.stderr
    assert "baseline: chance" in found.stdout


def test_a_warm_run_imports_nothing_heavy(warm: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options of every probe are made as usual; the trained head is a small one."""
    probes, usual = "knn,fewshot,mlp,attentive,mil", suite.head_of
    small = MlpConfig(lr="0.01", epochs=1, hidden=4)
    monkeypatch.setattr(suite, "head_of", lambda *of: small if of[0] == "mlp" else usual(*of))
    assert run(warm, options=replace(FAST, probes=probes)).num_made == 2
    code = (
        "import sys; from pathlib import Path; from featstore.store.catalog import Store\n"
        "from probes import suite; from probes.suite_config import SuiteConfig\n"
        "from probes.configs import EvalConfig; from probes.report import print_tables; from cli import show\n"
        "from probes.trained_config import MlpConfig\n"
        "whole, usual = SuiteConfig(), suite.head_of\n"
        "assert all(usual(probe, whole) for probe in suite.PROBES)\n"
        "suite.head_of = lambda *of: MlpConfig(lr='0.01', epochs=1, hidden=4) if of[0] == 'mlp' else usual(*of)\n"
        f"found = suite.evaluate_all(Store(Path({str(warm.path)!r})),\n"
        "    EvalConfig(dataset='x', labels='a,b', resamples=20),\n"
        f"    SuiteConfig(shots='1', repeats=3, probes={probes!r}, metadata=''))\n"
        "print_tables(found.records, show.table)\n"
        f"assert (found.num_made, found.num_kept) == (0, {NUM + 2})\n"
        "print(sorted({'torch', 'sklearn', 'faiss', 'scipy', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_what_cannot_be_meant_is_refused_before_anything_is_fitted(store: Store, counts: Counts) -> None:
    with pytest.raises(UnknownNameError, match=r"--metadata names no column of 'x': 'foo'; it has .*age"):
        run(store, options=replace(FAST, metadata="age,foo"))
    with pytest.raises(
        TaskError, match="--metadata a is a label of the task, which would predict itself; leave it out"
    ):
        run(store, options=replace(FAST, metadata="a"))
    assert counts.fits == counts.reads == []
    for flag, given in (("--shots", {"shots": "1"}), ("--repeats", {"repeats": 3})):
        with pytest.raises(ConfigError, match=f"{flag} belongs to the probe fewshot, which --probes knn leaves out"):
            SuiteConfig(probes="knn", **given)  # type: ignore[arg-type]
    assert SuiteConfig().budgets == {"shots": FewShotConfig().shots, "repeats": FewShotConfig().repeats}
