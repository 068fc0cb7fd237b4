"""`probes compare` beyond labels: numbers and ranks, runs of several seeds, few-shot curves, families of tests."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from probe_sets import write_set
from scipy.stats import false_discovery_control, spearmanr, t
from sklearn.metrics import cohen_kappa_score, mean_absolute_error, r2_score, roc_auc_score
from test_compare import command, scores_of, write_csv

from featstore.errors import ConfigError, TaskError
from featstore.store.catalog import Store
from probes.compare import compare
from probes.compare_curves import _common
from probes.configs import EvalConfig, KnnConfig, LinearConfig, TaskConfig
from probes.draws import Draws
from probes.evaluation import evaluate_sets, load_records_at
from probes.fewshot import evaluate_fewshot
from probes.fewshot_config import FewShotConfig, FewShotData
from probes.multiplicity import holm
from probes.paired import Criteria, Pair, compare_pair
from probes.records import load_predictions, save_record


def numbers(kind: str, num_groups: int = 60) -> Pair:
    """Patients of one to three rows, two targets with gaps, and predictions of two models."""
    random = np.random.default_rng(3)
    groups = np.repeat(np.arange(num_groups), random.integers(1, 4, num_groups))
    shape = (len(groups), 2)
    y = random.integers(0, 4, shape).astype(float) if kind == "ordinal" else random.normal(50, 10, shape)
    a, b = (y + spread * random.standard_normal(shape) for spread in ((0.5, 0.9) if kind == "ordinal" else (5.0, 8.0)))
    mask = random.random(shape) < 0.8
    names = tuple(map(str, range(len(groups))))
    return Pair(names, groups, ("x", "y"), kind, y, mask, a, b, num_classes=4)  # type: ignore[arg-type]


def kappa(y: np.ndarray, scores: np.ndarray) -> float:
    return float(cohen_kappa_score(y, np.clip(np.rint(scores), 0, 3), weights="quadratic", labels=range(4)))


MEASURES = {
    "mae": mean_absolute_error,
    "r2": r2_score,
    "qwk": kappa,
    "spearman": lambda y, scores: float(spearmanr(y, scores).statistic),
}


@pytest.mark.parametrize(
    ("kind", "metric"), [("regression", "mae"), ("regression", "r2"), ("ordinal", "qwk"), ("ordinal", "spearman")]
)
def test_numbers_differ_as_counted_by_hand_on_every_resample(kind: str, metric: Any) -> None:
    pair, measure = numbers(kind), MEASURES[metric]
    found = compare_pair(pair, Criteria(metric=metric, num_resamples=40, seed=5))
    used = pair.mask.any(1)
    draws = Draws.of(pair.groups[used], num_resamples=40, seed=5)
    columns = draws.columns(pair.groups, used)
    table = []
    for counts in draws.counts:
        rows = np.repeat(np.arange(len(pair.y)), counts[columns] * used)
        differences = []
        for target in range(2):
            part = rows[pair.mask[rows, target]]
            values = [measure(pair.y[part, target], scores[part, target]) for scores in (pair.a, pair.b)]
            differences.append(values[0] - values[1])
        table.append(differences)
    resamples = np.array(table)
    own = []
    for target, entry in enumerate(found["per_label"]):
        part = pair.mask[:, target]
        values = [measure(pair.y[part, target], scores[part, target]) for scores in (pair.a, pair.b)]
        own.append(values[0] - values[1])
        assert (entry["a"]["value"], entry["b"]["value"]) == pytest.approx(tuple(values), abs=1e-9)
        bounds = np.percentile(resamples[:, target], [2.5, 97.5])
        assert (entry["delta"]["low"], entry["delta"]["high"]) == pytest.approx(tuple(bounds), abs=1e-9)
        assert list(entry["p"]) == ["bootstrap"]
        assert entry["n"] == part.sum()
    macro = found["macro"]["delta"]
    assert macro["value"] == pytest.approx(np.mean(own), abs=1e-9)
    bounds = np.percentile(resamples.mean(1), [2.5, 97.5])
    assert (macro["low"], macro["high"]) == pytest.approx(tuple(bounds), abs=1e-9)
    p = np.array([entry["p"]["bootstrap"] for entry in found["per_label"]])
    np.testing.assert_allclose([entry["p_holm"]["bootstrap"] for entry in found["per_label"]], holm(p))
    np.testing.assert_allclose(
        [entry["p_bh"]["bootstrap"] for entry in found["per_label"]], false_discovery_control(p, method="bh")
    )


def test_less_of_a_loss_is_better() -> None:
    """A errs less than B: not worse by any margin; B against A is worse, so it is not."""
    pair = numbers("regression")
    swapped = Pair(
        pair.ids, pair.groups, pair.labels, pair.kind, pair.y, pair.mask, pair.b, pair.a, num_classes=pair.num_classes
    )
    criteria = Criteria(metric="mae", margin=1.5, num_resamples=200)
    better, worse = (compare_pair(item, criteria)["macro"] for item in (pair, swapped))
    assert better["delta"]["value"] < -1.5
    assert better["noninferiority"]["holds"] == {"bootstrap": True}
    assert worse["noninferiority"]["holds"] == {"bootstrap": False}
    assert not better["equivalence"]["holds"]["bootstrap"]
    assert compare_pair(pair, Criteria(metric="mae", margin=9.0, num_resamples=200))["macro"]["equivalence"]["holds"][
        "bootstrap"
    ]
    with pytest.raises(ConfigError, match=r"a margin of mae lies above 0, got -1\.0"):
        Criteria(metric="mae", margin=-1.0)


def test_a_target_with_one_value_is_in_no_family() -> None:
    pair = numbers("regression")
    y = pair.y.copy()
    y[:, 1] = 7.0
    for metric in ("mae", "r2"):
        found = compare_pair(
            Pair(pair.ids, pair.groups, pair.labels, pair.kind, y, pair.mask, pair.a, pair.b),
            Criteria(metric=metric, num_resamples=60),  # type: ignore[arg-type]
        )
        first, second = found["per_label"]
        assert found["num_labels"] == 1
        assert np.isnan(second["p"]["bootstrap"])
        assert first["p_holm"] == first["p"]
        assert found["macro"]["delta"]["value"] == pytest.approx(first["delta"]["value"])


def test_metrics_of_another_kind_are_refused() -> None:
    with pytest.raises(ConfigError, match="qwk is no metric of regression tasks; they have mae, rmse, r2"):
        compare_pair(numbers("regression"), Criteria(metric="qwk"))
    with pytest.raises(ConfigError, match="auroc is no metric of ordinal tasks; they have mae, qwk, spearman"):
        compare_pair(numbers("ordinal"), Criteria(metric="auroc"))


def test_a_true_null_of_numbers_is_seldom_rejected() -> None:
    rejected = 0
    for seed in range(60):
        random = np.random.default_rng(seed)
        groups = np.repeat(np.arange(80), 2)
        common = random.standard_normal(80)[groups]
        y = random.standard_normal((160, 1))
        a, b = (y + (common + random.standard_normal(160) + random.standard_normal(80)[groups])[:, None] for _ in "ab")
        pair = Pair(tuple(map(str, range(160))), groups, ("x",), "regression", y, y < 9, a, b)
        rejected += compare_pair(pair, Criteria(metric="mae", num_resamples=200))["macro"]["p"]["bootstrap"] <= 0.05
    assert rejected <= 10  # binom.ppf(0.999, 60, 0.05)


def seeds_pair(num_a: int, num_b: int, *, same: bool = False) -> Pair:
    random = np.random.default_rng(1)
    groups = np.repeat(np.arange(100), 2)
    y = (random.random((200, 2)) < 0.4).astype(np.int64)
    scores = [y * gain + random.standard_normal((200, 2)) for gain in [1.2] * num_a + [1.0] * num_b]
    return Pair(
        tuple(map(str, range(200))), groups, ("x", "y"), "multilabel", y, np.ones((200, 2), dtype=bool), scores[0],
        scores[num_a], (tuple(scores[1:num_a]), tuple(scores[num_a + 1 :])), same,
    )  # fmt: skip


@pytest.mark.parametrize(("num_a", "num_b", "same"), [(3, 3, True), (3, 2, False), (3, 1, False)])
def test_means_over_seeds(num_a: int, num_b: int, same: bool) -> None:
    pair = seeds_pair(num_a, num_b, same=same)
    found = compare_pair(pair, Criteria(num_resamples=50))
    areas = np.array([[roc_auc_score(pair.y[:, c], scores[:, c]) for c in range(2)] for scores in pair.models])
    a, b = areas[:num_a], areas[num_a:]
    for column, entry in enumerate(found["per_label"]):
        assert entry["delta"]["value"] == pytest.approx(a[:, column].mean() - b[:, column].mean(), abs=1e-12)
        assert entry["seeds"]["a"] == pytest.approx(a[:, column].tolist())
    draws = Draws.of(pair.groups, num_resamples=50)
    columns = draws.columns(pair.groups)
    resamples = []
    for counts in draws.counts:
        rows = np.repeat(np.arange(200), counts[columns])
        each = [np.mean([roc_auc_score(pair.y[rows, c], s[rows, c]) for c in range(2)]) for s in pair.models]
        resamples.append(np.mean(each[:num_a]) - np.mean(each[num_a:]))
    macro = found["macro"]
    bounds = np.percentile(resamples, [2.5, 97.5])
    assert (macro["delta"]["low"], macro["delta"]["high"]) == pytest.approx(tuple(bounds), abs=1e-12)
    spread = macro["seeds"]
    assert spread["sd_a"] == pytest.approx(a.mean(1).std(ddof=1))
    assert (spread["sd_b"] is None) == (num_b == 1)
    parts = [(np.var(resamples, ddof=1), 99)]
    sides = [a.mean(1) - b.mean(1)] if same else [side.mean(1) for side in (a, b) if len(side) > 1]
    parts += [(side.var(ddof=1) / len(side), len(side) - 1) for side in sides]
    total = sum(part for part, _ in parts)
    half = t.ppf(0.975, total**2 / sum(part**2 / n for part, n in parts)) * np.sqrt(total)
    assert spread["delta"]["high"] - spread["delta"]["low"] == pytest.approx(2 * half)
    assert spread["delta"]["standard_error"] == pytest.approx(np.sqrt(total))
    part = pair.part(np.arange(200) < 100)
    assert [len(scores) for scores in part.models] == [100] * (num_a + num_b)


def test_delong_of_means_agrees_with_the_bootstrap() -> None:
    entry = compare_pair(seeds_pair(3, 2), Criteria(num_resamples=2000))["macro"]
    width = entry["delta"]["high"] - entry["delta"]["low"]
    assert 2 * 1.959964 * entry["delta"]["standard_error"] == pytest.approx(width, rel=0.08)


# --- records


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, dict[str, Any]]:
    """240 samples, two a patient, with labels, an age and a grade that features know of, in two feature sets."""
    root = tmp_path_factory.mktemp("kinds")
    rng = np.random.default_rng(1)
    age = np.round(rng.normal(60, 10, 240), 2)
    patient = np.arange(240) // 2
    sick = (rng.random(240) < 0.4).astype(int)
    columns = {
        "part": [("train", "train", "val", "test")[number % 4] for number in patient],
        "pid": [f"p{number}" for number in patient],
        "age": [f"{value}" for value in age],
        "grade": ["low" if value < 55 else "mid" if value < 65 else "high" for value in age],
        "a": sick.tolist(),
    }
    for model, noise in (("m", 1.0), ("n", 2.0)):
        features = noise * rng.standard_normal((240, 6))
        features[:, 0] += (age - 60) / 5
        features[:, 1] += 2 * sick
        write_set(root / "store", root / f"x{model}", columns, features, name=f"x{model}", model=model)
    store = Store(root / "store")
    records: dict[str, Any] = {}
    for name, kind, label, more in (
        ("age", "regression", "age", {}), ("grade", "ordinal", "grade", {"classes": "low,mid,high"}),
        ("sick", "multilabel", "a", {}),
    ):  # fmt: skip
        config = EvalConfig(dataset="xm", labels=label, features="cls", resamples=20)
        reading = TaskConfig(kind=kind, **more)  # type: ignore[arg-type]
        alpha = LinearConfig(C="0.1") if kind == "multilabel" else LinearConfig(alpha="10")
        records[name] = evaluate_sets(store, "linear", config, alpha, reading=reading)[0]
        records[f"{name} knn"] = evaluate_sets(store, "knn", config, KnnConfig(k="9"), reading=reading)[0]
    return store, records


def run(made: tuple[Store, dict[str, Any]], a: str, b: str, criteria: Criteria, **options: Any) -> dict[str, Any]:
    store, records = made
    names = [records[name]["id"] if name in records else name for name in (a, b)]
    return compare(names[0], names[1], criteria, store=store, folder=store.path / "results", **options)


SMALL = Criteria(num_resamples=40)


def test_records_of_numbers_and_ranks(made: tuple[Store, dict[str, Any]]) -> None:
    found = run(made, "age", "age knn", SMALL)
    tables = [scores_of(made[1][name]) for name in ("age", "age knn")]
    own = [r2_score(table["label:age"], table["score:age"]) for table in tables]
    assert found["result"]["metric"] == "r2"
    assert found["result"]["macro"]["delta"]["value"] == pytest.approx(own[0] - own[1])
    json.dumps(found)
    ranks = run(made, "grade", "grade knn", SMALL)
    tables = [scores_of(made[1][name]) for name in ("grade", "grade knn")]
    expected = [
        cohen_kappa_score(table["label:grade"], np.clip(np.rint(table["score:grade"]), 0, 2), weights="quadratic")
        for table in tables
    ]
    assert ranks["result"]["metric"] == "qwk"
    assert ranks["result"]["macro"]["delta"]["value"] == pytest.approx(expected[0] - expected[1])
    with pytest.raises(
        TaskError, match=r"records of one kind of task are compared, got .* of labels and .* of regression"
    ):
        run(made, "sick", "age", SMALL)
    with pytest.raises(ConfigError, match="--threshold youden changes nothing of r2"):
        run(made, "age", "age knn", SMALL, youden=True)


def test_numbers_of_files(made: tuple[Store, dict[str, Any]], tmp_path: Path) -> None:
    table = scores_of(made[1]["age knn"])
    columns = {name: table[name] for name in ("id", "score:age", "label:age")}
    short = write_csv(tmp_path / "s.csv", columns | {"label:age": [f"{value:.2f}" for value in table["label:age"]]})
    expected = run(made, "age", "age knn", SMALL)["result"]["macro"]["delta"]
    assert run(made, "age", short, SMALL)["result"]["macro"]["delta"] == pytest.approx(expected)
    alone = run(made, short, short, Criteria(metric="mae", num_resamples=20))
    assert alone["result"]["macro"]["a"]["value"] == pytest.approx(
        mean_absolute_error(table["label:age"], table["score:age"])
    )
    with pytest.raises(
        TaskError, match=r"s.csv: labels are 0, 1 or empty; found .*; numbers are compared by --metric mae"
    ):
        run(made, short, short, SMALL)


def seeded(folder: Path, record: dict[str, Any], seed: int, noise: float) -> str:
    """A copy of a record as another seed would have made it."""
    table = load_predictions(record).to_pydict()
    random = np.random.default_rng(seed)
    table["score:a"] = [value + noise * random.standard_normal() for value in table["score:a"]]
    own = ("schema", "id", "time", "versions", "machine", "file", "digest")
    body = json.loads(json.dumps({name: value for name, value in record.items() if name not in own}))
    body["config"]["head"]["train_seed"] = seed
    return str(load_records_at(save_record(folder, body, table))["file"])


def test_runs_of_several_seeds(made: tuple[Store, dict[str, Any]], tmp_path: Path) -> None:
    a = [seeded(tmp_path, made[1]["sick"], seed, 0.2) for seed in range(3)]
    b = [seeded(tmp_path, made[1]["sick knn"], seed, 0.5) for seed in range(3)]
    found = run(made, ",".join(a), ",".join(b), Criteria(metric="auroc", num_resamples=40), subgroups=("grade",))
    areas = []
    for name in (*a, *b):
        table = scores_of(load_records_at(Path(name)))
        areas.append(roc_auc_score(table["label:a"], table["score:a"]))
    macro = found["result"]["macro"]
    assert macro["delta"]["value"] == pytest.approx(np.mean(areas[:3]) - np.mean(areas[3:]))
    assert macro["seeds"]["b"] == pytest.approx(areas[3:])
    assert macro["seeds"]["paired"]
    assert found["a"]["seeds"] == [0, 1, 2]
    assert len(found["subgroups"]) == 3
    unequal = run(made, ",".join(a[:2]), b[0], Criteria(num_resamples=20))["result"]["macro"]["seeds"]
    assert (unequal["paired"], unequal["sd_b"]) == (False, None)
    decided = run(made, ",".join(a), ",".join(b), Criteria(metric="f1", num_resamples=20), youden=True)
    assert len(decided["thresholds"]["a"]) == 3
    printed = command(made, ",".join(a), ",".join(b))
    assert printed.exit_code == 0, printed.output
    for text in ("3 seeds, sd ", "with the chance of the seeds (seed by seed) as well"):
        assert text in printed.output, text
    for names, error, message in (
        (
            f"{a[0]},{b[1]}",
            TaskError,
            "A names several runs, which may differ in their seed alone; .* differs from .* in",
        ),
        (
            f"{a[0]},{seeded(tmp_path, made[1]['sick'], 0, 0.1)}",
            TaskError,
            "A names 2 runs of the seeds 0, 0; give one",
        ),
        (f"{a[0]},{a[0]}", ConfigError, "records of several seeds are named once each"),
        (f"{a[0]},{write_csv(tmp_path / 's.csv', {'id': ['x'], 'score:a': [1]})}", TaskError, "which must be records"),
    ):
        with pytest.raises(error, match=message):
            run(made, names, b[0], SMALL)


@pytest.fixture(scope="module")
def curves(made: tuple[Store, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    def one(head: str, shots: str = "1,4", seed: int = 0) -> dict[str, Any]:
        data = FewShotData(dataset="xm", labels="a", features="cls", seed=seed)
        return evaluate_fewshot(made[0], data, FewShotConfig(shots=shots, repeats=12, head=head))[0]  # type: ignore[arg-type]

    return {
        "ncm": one("ncm"),
        "ridge": one("ridge", "1,4,8"),
        "other": one("ncm", seed=1),
        "single": one("ncm", "2"),
        "beyond": one("ncm", "1,900"),
        "ridge beyond": one("ridge", "1,900"),
    }


def test_a_macro_holds_labels_that_both_curves_have() -> None:
    nan = np.nan
    a = {("1", "x"): [0.5, 0.6], ("1", "y"): [0.7, 0.8], ("2", "x"): [0.9, 0.9], ("2", "y"): [0.9, nan]}
    b = {("1", "x"): [0.5, 0.5], ("1", "y"): [0.5, 0.5], ("2", "x"): [0.5, 0.5], ("2", "y"): [0.5, 0.5]}
    tables = [{key: np.array(values) for key, values in side.items()} for side in (a, b)]
    assert _common(tables, ["1", "2"], ["x", "y"]) == ["x"]
    assert _common(tables, ["1"], ["x", "y"]) == ["x", "y"]
    assert _common([{key: np.full(2, nan) for key in a}, tables[1]], ["1", "2"], ["x", "y"]) == []


def test_curves_are_compared_draw_by_draw(
    made: tuple[Store, dict[str, Any]], curves: dict[str, dict[str, Any]]
) -> None:
    everything = made[0], {**made[1], **curves}
    found = run(everything, "ncm", "ridge", SMALL)
    assert found["shared"] == {"budgets": ["1 shot", "4 shots"], "labels": ["a"], "repeats": 12}
    assert "budgets that only one curve has, left out: 8 shots" in found["notes"]
    tables = [load_predictions(curves[name]).to_pydict() for name in ("ncm", "ridge")]
    for point in found["curve"]:
        values = [
            np.array(
                [
                    v
                    for v, b, n in zip(table["auroc"], table["budget"], table["label"])
                    if (b, n) == (point["name"], "a")
                ]
            )
            for table in tables
        ]
        delta = values[0] - values[1]
        for entry in (point["macro"], point["per_label"][0]):
            assert entry["delta"]["value"] == pytest.approx(delta.mean())
            assert entry["delta"]["sd"] == pytest.approx(delta.std(ddof=1))
            assert (entry["delta"]["low"], entry["delta"]["high"]) == pytest.approx(
                tuple(np.percentile(delta, [2.5, 97.5]))
            )
            assert entry["better"] == pytest.approx(np.mean(delta > 0) + np.mean(delta == 0) / 2)
    json.dumps(found)
    beyond = run(everything, "beyond", "ridge beyond", SMALL)
    assert [point["name"] for point in beyond["curve"]] == ["1 shot", "900 shots"]
    for entry in (beyond["curve"][0]["macro"], beyond["curve"][0]["per_label"][0]):
        assert entry["delta"] == found["curve"][0]["macro"]["delta"]  # a budget that no label has empties no other
    assert np.isnan(beyond["curve"][1]["macro"]["a"])
    printed = command(everything, curves["ncm"]["id"], curves["ridge"]["id"])
    assert printed.exit_code == 0, printed.output
    assert "mean over 12 draws of shots, the same for both" in printed.output
    for a, b, error, message in (
        ("ncm", "other", TaskError, r"the curves are of other draws, .*: seed \(A 0, B 1\); run `probes fewshot`"),
        ("ncm", "sick", TaskError, "a few-shot curve is compared with another curve, not with a record of predictions"),
        ("ncm", "single", TaskError, "no budget is in both curves: A has 1 shot, 4 shots; B has 2 shots"),
    ):
        with pytest.raises(error, match=message):
            run(everything, a, b, SMALL)
    with pytest.raises(ConfigError, match="--margin needs predictions, of which few-shot curves keep none"):
        run(everything, "ncm", "ridge", Criteria(margin=0.1))
    with pytest.raises(ConfigError, match="mae is no metric of these curves; they have auroc"):
        run(everything, "ncm", "ridge", Criteria(metric="mae"))
    with pytest.raises(TaskError, match="few-shot curves have their repeats in one record; name one record"):
        run(everything, f"{curves['ncm']['id']},{curves['other']['id']}", "ncm", SMALL)
