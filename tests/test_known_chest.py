"""Tasks on chest radiographs are well-formed against the columns that the adapters give."""

from pathlib import Path
from typing import Any

import pytest
from miniatures import WRITERS
from miniatures.chest import write_vindr_kaggle

from featstore.configs import RegisterConfig, RunConfig, SetConfig
from featstore.datasets import read_source
from featstore.datasets.source import Source
from featstore.extraction.pipeline import extract
from featstore.extraction.plan import make_plan
from featstore.register import register
from featstore.store.catalog import Store
from probes.configs import EvalConfig, KnnConfig, TaskConfig
from probes.cross import word_in
from probes.evaluation import evaluate_sets
from probes.known import TASKS
from probes.known.chest import SHARED_7, VINDR_11, WORDS
from probes.known.chest import TASKS as CHEST
from probes.known.volumes import CT_RATE_18
from probes.words import word_of

CHEST_ADAPTERS = ("chexpert", "mimic-cxr", "nih", "padchest", "rsna", "vindr-cxr", "vindr-pcxr")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    found = {}
    for adapter in CHEST_ADAPTERS:
        made = WRITERS[adapter](tmp_path_factory.mktemp(adapter))
        found[adapter] = read_source(adapter, made.root)
    kaggle = tmp_path_factory.mktemp("kaggle")
    write_vindr_kaggle(kaggle)
    found["vindr-cxr (Kaggle)"] = read_source("vindr-cxr", kaggle)
    return found


def test_every_chest_task_belongs_to_an_adapter(sources: dict[str, Source]) -> None:
    offered = {name for source in sources.values() for name in source.tasks}
    assert offered == {spec.name for spec in CHEST}
    assert offered <= set(TASKS)
    assert all(source.default_task in source.tasks for source in sources.values())


def test_columns_that_tasks_name_exist_and_hold_values(sources: dict[str, Source]) -> None:
    for source in sources.values():
        table: dict[str, list[Any]] = source.table.to_pydict()
        for name in source.tasks:
            spec = TASKS[name]
            merge = dict(spec.merge)
            needed = [part for label in spec.labels for part in merge.get(label, (label,))]
            needed += [column for column, _ in spec.where] + [spec.split_column]
            assert not [column for column in needed if column not in table], name
            for column, values in spec.where:
                assert set(values) & set(table[column]), (name, column)
            assert {"train", "test"} <= set(table[spec.split_column]), name
            if spec.classes:
                assert set(spec.classes) <= set(table[spec.labels[0]]), name
            assert set(merge) <= set(spec.labels), name
            assert {label for label, _ in spec.names} <= set(spec.labels), name


def test_tasks_of_papers_name_their_source() -> None:
    for spec in CHEST:
        if spec.name.endswith(("-a", "-b", "-c", "-mgca", "-nothree")):
            assert spec.source, spec.name
            assert spec.deviations, spec.name


@pytest.mark.parametrize(
    ("task", "count"),
    [
        *(("chexpert-10-a", 10), ("mimic-10-a", 10), ("nih-14-a", 14), ("padchest-17-a", 17), ("vindr-cxr-11-a", 11)),
        *(("vindr-pcxr-3-a", 3), ("vindr-cxr-28", 28), ("vindr-cxr-22", 22), ("vindr-cxr-6", 6), ("nih-15-c", 15)),
        *(("vindr-pcxr-15", 15), ("chexpert-6-c", 5), ("vindr-cxr-15-kaggle", 15)),
    ],
)
def test_label_counts_are_the_published_ones(task: str, count: int) -> None:
    assert len(set(TASKS[task].labels)) == len(TASKS[task].labels) == count


def test_nih_paper_a_leaves_infiltration_out() -> None:
    assert "Infiltration" not in TASKS["nih-14-a"].labels
    assert "No Finding" in TASKS["nih-14-a"].labels


@pytest.mark.parametrize("task", ["chexpert-7-a", "mimic-7-a", "nih-7-a", "padchest-7-a"])
def test_seven_shared_labels_have_the_same_words(task: str) -> None:
    assert tuple(word for _, word in TASKS[task].names) == SHARED_7


def test_vindr_nodule_mass_is_a_column_not_merged() -> None:
    assert "Nodule/Mass" in VINDR_11
    assert TASKS["vindr-cxr-11-a"].merge == ()
    assert TASKS["vindr-cxr-11-a"].train_policy.readers == "any"


def test_pcxr_bronchitis_and_bronchiolitis_are_merged() -> None:
    assert TASKS["vindr-pcxr-3-a"].merge == (("Bronchitis/Bronchiolitis", ("Bronchitis", "Bronchiolitis")),)


def test_words_are_one_a_label() -> None:
    assert all(WORDS[word] == word for word in SHARED_7)
    for spec in CHEST:
        assert len({word for _, word in spec.names}) == len(spec.names), spec.name


def test_first_tasks_keep_what_is_hashed() -> None:
    """Records made before the other tasks came stay comparable."""
    for name in ("chexpert-5", "chexpert-14", "nih-14", "nih-15"):
        assert set(TASKS[name].as_dict()) == {
            *("name", "labels", "train_policy", "eval_policy", "where", "selection", "seed"),
        }


# What each task shares with the others, by its own spellings.
SPELT = {
    "chexpert-14": {"No Finding": "no_finding", "Cardiomegaly": "cardiomegaly", "Lung Opacity": "lung_opacity",
        "Edema": "edema", "Consolidation": "consolidation", "Pneumonia": "pneumonia", "Atelectasis": "atelectasis",
        "Pneumothorax": "pneumothorax", "Pleural Effusion": "effusion"},
    "nih-15": {"No Finding": "no_finding", "Cardiomegaly": "cardiomegaly", "Edema": "edema", "Hernia": "hernia",
        "Consolidation": "consolidation", "Pneumonia": "pneumonia", "Atelectasis": "atelectasis",
        "Pneumothorax": "pneumothorax", "Effusion": "effusion", "Emphysema": "emphysema", "Fibrosis": "fibrosis",
        "Infiltration": "infiltration", "Pleural_Thickening": "pleural_thickening"},
    "vindr-cxr-28": {"No finding": "no_finding", "Cardiomegaly": "cardiomegaly", "Edema": "edema",
        "Consolidation": "consolidation", "Pneumonia": "pneumonia", "Atelectasis": "atelectasis",
        "Pneumothorax": "pneumothorax", "Pleural effusion": "effusion", "Emphysema": "emphysema",
        "Pulmonary fibrosis": "fibrosis", "Infiltration": "infiltration", "Pleural thickening": "pleural_thickening",
        "Lung Opacity": "lung_opacity", "Nodule/Mass": "nodule_mass"},
    "padchest-17-a": {"no_finding": "no_finding", "cardiomegaly": "cardiomegaly", "hernia": "hernia",
        "consolidation": "consolidation", "pneumonia": "pneumonia", "atelectasis": "atelectasis",
        "pneumothorax": "pneumothorax", "pleural effusion": "effusion", "emphysema": "emphysema",
        "pleural thickening": "pleural_thickening", "nodule_mass": "nodule_mass"},
    "ct-rate-18": {"Cardiomegaly": "cardiomegaly", "Emphysema": "emphysema", "Atelectasis": "atelectasis",
        "Lung opacity": "lung_opacity", "Pleural effusion": "effusion", "Consolidation": "consolidation"},
}  # fmt: skip


@pytest.mark.parametrize("one", SPELT)
@pytest.mark.parametrize("other", SPELT)
def test_every_pair_of_chest_tasks_shares_its_words(one: str, other: str) -> None:
    found = [{word_in(TASKS[name], label) for label in TASKS[name].labels} for name in (one, other)]
    expected = set(SPELT[one].values()) & set(SPELT[other].values())
    assert expected <= found[0] & found[1]
    if one != other:
        extra = {word for word in found[0] & found[1] if word in WORDS.values()} - expected
        assert not extra


def test_all_tasks_on_the_chest_have_one_word_a_label() -> None:
    for spec in (*CHEST, TASKS["ct-rate-18"], TASKS["ct-rate-18-b"]):
        if spec.kind in ("auto", "multilabel"):
            assert len({word_in(spec, label) for label in spec.labels}) == len(spec.labels), spec.name
    assert word_of("Pericardial effusion") == "Pericardial effusion"
    assert "Pericardial effusion" in CT_RATE_18


def test_external_validation_of_mimic_on_nih_and_chexpert(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    run = RunConfig(device="cpu", workers=1)
    for adapter in ("mimic-cxr", "nih", "chexpert"):
        (tmp_path / adapter).mkdir()
        made = WRITERS[adapter](tmp_path / adapter)
        register(store.path, adapter, made.root, RegisterConfig(adapter=adapter, **made.config))
        config = SetConfig(model="tiny", res="28", compute_dtype="float32")
        extract(make_plan(store, adapter, config, run), run)

    def tested(**reading: Any) -> list[dict[str, Any]]:
        config = EvalConfig(dataset="mimic-cxr", task=reading.pop("task"), features="cls", resamples=2)
        asked = TaskConfig(test_dataset="nih,chexpert", **reading)
        return evaluate_sets(Store(store.path), "knn", config, KnnConfig(k="3"), reading=asked)

    records = tested(task="mimic-7-a")
    assert [record["test"]["task"]["name"] for record in records] == ["nih-7-a", "chexpert-7-a"]
    for record in records:
        assert record["task"]["labels"] == list(SHARED_7)
        assert any(f"task {record['test']['task']['name']}, which shares" in note for note in record["task"]["notes"])
    named = tested(task="mimic-7-a", test_task="nih-15,chexpert-14")
    assert [record["test"]["task"]["name"] for record in named] == ["nih-15", "chexpert-14"]
    assert [sorted(record["task"]["labels"]) for record in named] == [sorted(SHARED_7)] * 2
    assert [record["test_opened"] for record in named] == [2, 1], "nih-7-a and nih-15 test on the same images"
    default = tested(task=None)
    assert [record["test"]["task"]["name"] for record in default] == ["nih-14", "chexpert-5"]
    assert all("effusion" in record["task"]["labels"] and len(record["task"]["labels"]) == 5 for record in default)
