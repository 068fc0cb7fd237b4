"""Few-shot heads against scikit-learn on the same shots, and the table of shots against its promises."""

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import average_precision_score, balanced_accuracy_score, roc_auc_score
from sklearn.neighbors import NearestCentroid

from featstore.errors import ConfigError, TaskError
from probes import fewshot_heads
from probes.curves import band, class_metrics, label_metrics, macro_over_common
from probes.fewshot_config import FewShotConfig, FewShotData
from probes.fewshot_heads import Space, fit_heads, neighbour_scores
from probes.fewshot_solvers import binary_logistic, multinomial_logistic
from probes.logistic import DEFAULT_C
from probes.metrics import evaluate
from probes.shots import NONE, Pool, Shots, ShotTable, first_patients, percentage, pools, seeded_order, systematic

N, WIDTH = 300, 40


def example(seed: int = 0, num_classes: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(X, y, groups): two labels, or class numbers, that the features tell a little."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((N, WIDTH)) @ np.diag(np.arange(1, WIDTH + 1) ** -0.5) + 0.3
    if num_classes:
        y = (X[:, :num_classes] + 0.3 * rng.standard_normal((N, num_classes))).argmax(1)
    else:
        y = (X[:, :2] + 0.5 * rng.standard_normal((N, 2)) > 0.5).astype(np.int64)
    return X.astype(np.float32), y, np.array([f"p{row // 3:03d}" for row in range(N)])


def table(X: np.ndarray, y: np.ndarray, groups: np.ndarray, by: Any = "sample", most: int = 16) -> ShotTable:
    found = pools(y, np.ones(y.shape, dtype=bool), groups, by, num_classes=int(y.max()) + 1)
    return ShotTable.drawn(found, [f"l{number}" for number in range(len(found))], most, repeats=4, seed=3)


def heads_of(X: np.ndarray, shots: Shots, num_classes: int | None = None, **options: Any) -> Any:
    config = FewShotConfig(**options)
    space = Space.of(X, config.space)
    made = fit_heads(torch.from_numpy(X), space, shots, config, num_classes=num_classes, quality=None)
    return made, space(torch.from_numpy(X)).numpy()


def binary_objective(model: Any, Z: np.ndarray, y: np.ndarray, C: float) -> float:
    f = Z @ model.coef_[0] + model.intercept_[0]
    return float(C * np.logaddexp(0, -(2 * y - 1) * f).sum() + 0.5 * np.square(model.coef_).sum())


def softmax_objective(W: np.ndarray, b: np.ndarray, Z: np.ndarray, y: np.ndarray, C: float) -> float:
    f = Z @ W.T + b
    loss = np.log(np.exp(f - f.max(1, keepdims=True)).sum(1)) + f.max(1) - f[np.arange(len(y)), y]
    return float(C * loss.sum() + 0.5 * np.square(W).sum())


# --- shots


def test_smaller_draws_are_prefixes_and_have_exactly_n_of_each_class() -> None:
    X, y, groups = example()
    made = table(X, y, groups)
    large = made.at(16)
    assert large.valid.all()
    for count in (1, 2, 8):
        small = made.at(count)
        assert small.rows.shape == (8, 2 * count)
        np.testing.assert_array_equal(small.rows, large.rows[:, np.flatnonzero(large.shot[0] < count)])
        np.testing.assert_array_equal(small.y.sum(1), np.full(8, count))
        for rows, truth, label in zip(small.rows, small.y, small.label):
            np.testing.assert_array_equal(y[rows, label], truth)
            assert len(set(rows.tolist())) == 2 * count


def test_more_shots_repeats_or_labels_leave_the_earlier_draws() -> None:
    _, y, groups = example()
    found = pools(y, np.ones(y.shape, dtype=bool), groups, "sample", num_classes=2)
    one = ShotTable.drawn(found[1:], ["b"], 4, repeats=2, seed=0).at(4)
    many = ShotTable.drawn(found, ["a", "b"], 30, repeats=5, seed=0).at(4)
    picked = many.take(np.flatnonzero((many.label == 1) & (many.repeat < 2)))
    np.testing.assert_array_equal(one.rows, picked.rows)
    other = ShotTable.drawn(found[1:], ["b"], 4, repeats=2, seed=1).at(4)
    assert not np.array_equal(one.rows, other.rows)


def test_order_is_a_uniform_draw_without_replacement() -> None:
    orders = np.array([seeded_order((0, number), 7, 3) for number in range(7000)])
    assert all(len(set(order)) == 3 for order in orders.tolist())
    np.testing.assert_array_equal(np.sort(seeded_order((1,), 50, 50)), np.arange(50))
    for column in orders.T:  # 1000 of each expected, standard deviation 29
        assert np.abs(np.bincount(column, minlength=7) - 1000).max() < 5 * 29.3


def test_masked_rows_are_never_drawn() -> None:
    _, y, groups = example()
    mask = np.random.default_rng(0).random(y.shape) < 0.3
    shots = ShotTable.drawn(pools(y, mask, groups, "sample", num_classes=2), ["a", "b"], 8, repeats=20, seed=0).at(8)
    assert mask[shots.rows, shots.label[:, None]].all()


def test_patients_come_whole_and_never_on_both_sides() -> None:
    _, y, groups = example()
    made = ShotTable.drawn(
        pools(y, np.ones(y.shape, dtype=bool), groups, "patient", num_classes=2), ["a", "b"], 5, repeats=10, seed=0
    )
    shots = made.at(5)
    for rows, truth, valid, shot, label in zip(shots.rows, shots.y, shots.valid, shots.shot, shots.label):
        positive, negative = (set(groups[rows[valid & (truth == number)]].tolist()) for number in (1, 0))
        assert len(positive) == len(negative) == 5
        assert not positive & negative
        expected = {row for row in range(N) if groups[row] in positive and y[row, label] == 1}
        expected |= {row for row in range(N) if groups[row] in negative}
        assert set(rows[valid].tolist()) == expected
        assert (rows[~valid] == NONE).all()
        # A shot number is one patient.
        pairs = set(zip(shot[valid].tolist(), truth[valid].tolist(), groups[rows[valid]].tolist()))
        assert len(pairs) == 10


def test_labels_without_enough_samples_are_left_out() -> None:
    X, y, groups = example()
    y[:, 1] = 0
    y[:3, 1] = 1
    made = table(X, y, groups)
    assert made.available.tolist()[1] == 3
    assert set(made.at(2).label.tolist()) == {0, 1}
    assert set(made.at(4).label.tolist()) == {0}


def test_percentages_are_nested_shares() -> None:
    _, _, groups = example()
    labelled = np.arange(N)
    small = percentage(labelled, groups, "patient", 3.0, repeats=2, seed=0)
    large = percentage(labelled, groups, "patient", 20.0, repeats=2, seed=0)
    for (few, _), (many, shot) in zip(small, large):
        np.testing.assert_array_equal(few, many[: len(few)])
        assert len(set(groups[few].tolist())) == 3
        assert len(few) == 9
        assert shot.max() == 19
    everything = percentage(labelled, groups, "sample", 100.0, repeats=1, seed=0)[0][0]
    np.testing.assert_array_equal(np.sort(everything), labelled)


def test_published_sampling() -> None:
    y = np.array([[1, 0], [0, 1], [1, 0], [0, 0], [0, 1], [1, 1]])
    groups = np.array(["c", "a", "a", "b", "d", "e"])
    rows, shot = first_patients(y, np.ones(y.shape, dtype=bool), groups, 1, num_classes=2)
    assert rows.tolist() == [1, 2]  # patient a is the first of both labels; all of its rows
    rows, shot = first_patients(y, np.ones(y.shape, dtype=bool), groups, 2, num_classes=2)
    assert rows.tolist() == [0, 1, 2, 4]  # c is the second with the first label, d with the second one
    assert sorted(set(shot.tolist())) == [0, 1, 2]
    taken, _ = systematic(np.arange(10, 20), 3)
    assert taken.tolist() == [10, 13, 16]  # arange(0, 10, 10 / 3)


def test_pools_by_patient_in_order_of_their_name() -> None:
    pool = Pool.of(np.array([0, 1, 2, 3]), np.array(["b", "a", "b", "c"]), "patient")
    rows, shot = pool.drawn(np.array([1, 0]))
    assert rows.tolist() == [0, 2, 1]
    assert shot.tolist() == [0, 0, 1]


# --- heads


@pytest.mark.parametrize("count", [1, 4, 16])
@pytest.mark.parametrize("C", [1e-3, 1.0, 1e3])
def test_logistic_is_newton_cholesky(count: int, C: float) -> None:
    X, y, groups = example()
    shots = table(X, y, groups).at(count)
    made, Z = heads_of(X, shots, C=str(C))
    assert made.converged.all()
    for number in range(len(shots.rows)):
        rows, truth = shots.rows[number], shots.y[number]
        model = LogisticRegression(C=C, solver="newton-cholesky", tol=1e-10, max_iter=1000).fit(Z[rows], truth)
        best = binary_objective(model, Z[rows], truth, C)
        model.coef_, model.intercept_ = made.W[number : number + 1].numpy(), made.b[number : number + 1].numpy()
        ours = binary_objective(model, Z[rows], truth, C)
        assert ours <= best * (1 + 1e-8)
        assert made.objective[number] == pytest.approx(ours, rel=1e-9)


def test_grid_of_strengths_is_optimal_everywhere() -> None:
    X, y, groups = example()
    shots = table(X, y, groups).at(8)
    Z = X.astype(np.float64)[shots.rows]
    K = torch.from_numpy(Z @ Z.transpose(0, 2, 1))
    target = torch.from_numpy(shots.y).double()
    grid = torch.tensor(DEFAULT_C, dtype=torch.float64).expand(len(K), -1)
    solved = binary_logistic(K, target, torch.ones_like(target), grid)
    assert solved.converged.all()
    for value in range(0, 45, 4):
        for number in range(0, len(K), 3):
            model = LogisticRegression(C=DEFAULT_C[value], solver="newton-cholesky", tol=1e-8, max_iter=1000)
            model.fit(Z[number], shots.y[number])
            best = binary_objective(model, Z[number], shots.y[number], DEFAULT_C[value])
            assert float(solved.objective[number, value]) <= best * (1 + 1e-6)


def test_weights_of_zero_are_rows_that_are_not_there() -> None:
    X, y, groups = example()
    shots = table(X, y, groups, "patient").at(6)
    assert not shots.valid.all()
    made, Z = heads_of(X, shots, C="2")
    for number in range(len(shots.rows)):
        rows, truth = shots.rows[number][shots.valid[number]], shots.y[number][shots.valid[number]]
        model = LogisticRegression(C=2, solver="newton-cholesky", tol=1e-10).fit(Z[rows], truth)
        np.testing.assert_allclose(made.W[number].numpy(), model.coef_[0], atol=1e-6)
        assert float(made.b[number]) == pytest.approx(model.intercept_[0], abs=1e-6)


@pytest.mark.parametrize("by", ["sample", "patient"])
@pytest.mark.parametrize("C", [0.01, 1.0, 100.0])
def test_multinomial_is_newton_cholesky(C: float, by: Any) -> None:
    X, y, groups = example(num_classes=4)
    shots = table(X, y, groups, by).at(5)
    made, Z = heads_of(X, shots, 4, C=str(C), scaling="none")
    assert made.converged.all()
    for number in range(len(shots.rows)):
        rows, truth = shots.rows[number][shots.valid[number]], shots.y[number][shots.valid[number]]
        model = LogisticRegression(C=C, solver="newton-cholesky", tol=1e-10, max_iter=1000).fit(Z[rows], truth)
        best = softmax_objective(model.coef_, model.intercept_, Z[rows], truth, C)
        ours = softmax_objective(made.W[number].numpy(), made.b[number].numpy(), Z[rows], truth, C)
        assert ours <= best * (1 + 1e-7)
        assert made.objective[number] == pytest.approx(ours, rel=1e-8)


def test_multinomial_grid() -> None:
    X, y, groups = example(num_classes=3)
    shots = table(X, y, groups).at(4)
    Z = X.astype(np.float64)[shots.rows]
    grid = np.array([1e-5, 1e-2, 1.0, 1e2, 1e4])
    K = torch.from_numpy(Z @ Z.transpose(0, 2, 1))
    solved = multinomial_logistic(
        K, torch.from_numpy(shots.y), torch.ones(shots.y.shape, dtype=torch.float64),
        torch.from_numpy(grid).expand(len(K), -1), num_classes=3,
    )  # fmt: skip
    for value, C in enumerate(grid):
        for number in range(len(K)):
            model = LogisticRegression(C=C, solver="newton-cholesky", tol=1e-8, max_iter=1000)
            model.fit(Z[number], shots.y[number])
            best = softmax_objective(model.coef_, model.intercept_, Z[number], shots.y[number], C)
            assert float(solved.objective[number, value]) <= best * (1 + 1e-6)


@pytest.mark.parametrize("scaling", ["none", "standardize", "unit", "centred"])
def test_class_means_predict_as_nearest_centroid(scaling: Any) -> None:
    X, y, groups = example(num_classes=5)
    shots = table(X, y, groups).at(3)
    made, Z = heads_of(X, shots, 5, head="ncm", scaling=scaling)
    scores = made.scores(torch.from_numpy(Z).float()).numpy()
    for number in range(len(shots.rows)):
        model = NearestCentroid().fit(Z[shots.rows[number]], shots.y[number])
        np.testing.assert_array_equal(scores[number].argmax(1), model.predict(Z))


def test_class_means_of_a_label_are_one_difference() -> None:
    X, y, groups = example()
    shots = table(X, y, groups).at(4)
    made, Z = heads_of(X, shots, head="ncm")
    scores = made.scores(torch.from_numpy(Z).float()).numpy()
    for number in range(len(shots.rows)):
        model = NearestCentroid().fit(Z[shots.rows[number]], shots.y[number])
        np.testing.assert_array_equal(scores[:, number] > 0, model.predict(Z) == 1)


def test_centred_is_scaled_by_the_training_mean() -> None:
    X, _, _ = example()
    expected = X - X.astype(np.float64).mean(0)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(Space.of(X, "centred").of_all(X).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("by", ["sample", "patient"])
def test_ridge_is_ridge(by: Any) -> None:
    X, y, groups = example()
    shots = table(X, y, groups, by).at(6)
    made, Z = heads_of(X, shots, head="ridge", alpha="3")
    for number in range(len(shots.rows)):
        rows, truth = shots.rows[number][shots.valid[number]], shots.y[number][shots.valid[number]]
        model = Ridge(alpha=3).fit(Z[rows], 2 * truth - 1)
        np.testing.assert_allclose(made.W[number].numpy(), model.coef_, atol=1e-10)
        assert float(made.b[number]) == pytest.approx(model.intercept_, abs=1e-10)


def test_ridge_of_classes() -> None:
    X, y, groups = example(num_classes=3)
    shots = table(X, y, groups).at(6)
    made, Z = heads_of(X, shots, 3, head="ridge", alpha="0.5")
    for number in range(len(shots.rows)):
        model = Ridge(alpha=0.5).fit(Z[shots.rows[number]], 2.0 * np.eye(3)[shots.y[number]] - 1)
        np.testing.assert_allclose(made.W[number].numpy(), model.coef_, atol=1e-10)
        np.testing.assert_allclose(made.b[number].numpy(), model.intercept_, atol=1e-10)


@pytest.mark.parametrize("k", [None, 3])
def test_neighbours_by_brute_force(k: int | None) -> None:
    X, y, groups = example()
    shots = table(X, y, groups, "patient").at(4)
    space = Space.of(X, "centred")
    Z = space(torch.from_numpy(X)).numpy()
    found = neighbour_scores(
        torch.from_numpy(X), space, space.of_all(X), shots, k=k, temperature=0.1, num_classes=None
    ).numpy()
    for number in range(len(shots.rows)):
        rows, truth = shots.rows[number][shots.valid[number]], shots.y[number][shots.valid[number]]
        for query in range(0, N, 17):
            similarity = Z[rows] @ Z[query]
            best = np.argsort(-similarity, kind="stable")[:k]
            weights = np.exp(similarity[best] / 0.1)
            assert found[query, number] == pytest.approx((weights * truth[best]).sum() / weights.sum(), abs=1e-5)


@pytest.mark.parametrize(("head", "num_classes"), [("logistic", None), ("logistic", 2), ("logistic", 3), ("ridge", 3)])
@pytest.mark.parametrize("select", ["fixed", pytest.param("inner", marks=pytest.mark.slow)])
def test_large_problems_have_the_same_heads(
    head: Any, num_classes: int | None, select: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    X, y, groups = example(num_classes=num_classes or 0)
    shots = table(X, y, groups, "patient").at(8)
    options: dict[str, Any] = {"head": head, "select": select}
    options["C" if head == "logistic" else "alpha"] = "0.3" if select == "fixed" else "0.001,0.1,10"
    small, Z = heads_of(X, shots, num_classes, **options)
    monkeypatch.setattr(fewshot_heads, "MAX_ROWS", 0)
    large, _ = heads_of(X, shots, num_classes, **options)
    np.testing.assert_array_equal(small.strength, large.strength)
    np.testing.assert_array_equal(small.at_edge, large.at_edge)
    queries = torch.from_numpy(Z).float()
    np.testing.assert_allclose(small.scores(queries).numpy(), large.scores(queries).numpy(), atol=2e-3)


def test_inner_selection_is_a_loop_over_folds() -> None:
    X, y, groups = example()
    shots = table(X, y, groups).at(8)
    grid = (0.001, 0.03, 1.0, 30.0)
    made, Z = heads_of(X, shots, select="inner", C=",".join(map(str, grid)))
    for number in range(len(shots.rows)):
        rows, truth, fold = shots.rows[number], shots.y[number], shots.shot[number] % 5
        losses = []
        for C in grid:
            loss = 0.0
            for held in range(5):
                model = LogisticRegression(C=C, solver="newton-cholesky", tol=1e-10, max_iter=1000)
                model.fit(Z[rows[fold != held]], truth[fold != held])
                margin = (2 * truth[fold == held] - 1) * model.decision_function(Z[rows[fold == held]])
                loss += float(np.logaddexp(0, -margin).sum())
            losses.append(loss)
        assert made.strength[number] == grid[int(np.argmin(losses))]
        assert made.at_edge[number] == (made.strength[number] in (grid[0], grid[-1]))


def test_one_shot_has_nothing_to_hold_out() -> None:
    X, y, groups = example()
    made, _ = heads_of(X, table(X, y, groups).at(1), select="inner", C="0.01,10")
    assert (made.strength == 1.0).all()
    assert made.without_choice == 8


# --- metrics and curves


def test_label_metrics_are_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    y = rng.random(200) < 0.3
    scores = np.round(rng.standard_normal((200, 6)) + y[:, None], 1).astype(np.float32)  # ties
    found = label_metrics(y, scores)
    for number in range(6):
        assert found["auroc"][number] == pytest.approx(roc_auc_score(y, scores[:, number]), abs=1e-12)
        assert found["auprc"][number] == pytest.approx(average_precision_score(y, scores[:, number]), abs=1e-12)
        expected = balanced_accuracy_score(y, scores[:, number] >= 0)
        assert found["balanced_accuracy"][number] == pytest.approx(expected, abs=1e-12)
    assert np.isnan(label_metrics(np.zeros(200, dtype=bool), scores)["auroc"]).all()


@pytest.mark.parametrize("num_classes", [2, 4])
def test_class_metrics_are_those_of_evaluate(num_classes: int) -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(0, num_classes, 150)
    scores = rng.random((3, 150, num_classes)).astype(np.float32)
    per_class, macro = class_metrics(y, scores)
    for number in range(3):
        expected = evaluate(y, scores[number], kind="multiclass")
        for name, value in macro.items():
            assert value[number] == pytest.approx(expected["macro"][name], abs=1e-12)  # type: ignore[literal-required]
        for column, entry in enumerate(expected["per_label"]):
            assert per_class["auroc"][number, column] == pytest.approx(entry["auroc"], abs=1e-12)


def test_band_is_the_middle_of_the_repeats() -> None:
    values = np.arange(101) / 100
    found = band(values)
    assert found["mean"] == pytest.approx(0.5)
    assert (found["low"], found["high"]) == pytest.approx((0.025, 0.975))
    assert band(values[:1]) == {"mean": 0.0, "sd": None, "low": None, "high": None}


def test_macro_is_over_the_same_labels_at_every_budget() -> None:
    values = {"auroc": np.array([[[0.6, 0.9]], [[0.7, np.nan]]])}
    macro, common = macro_over_common(values)
    assert common.tolist() == [True, False]
    assert macro["auroc"].tolist() == [[0.6], [0.7]]


def test_a_budget_that_no_label_has_empties_no_other_macro() -> None:
    nan = np.nan
    values = {"auroc": np.array([[[0.6, 0.9, nan]], [[0.7, nan, nan]], [[nan, nan, nan]]])}
    macro, common = macro_over_common(values)
    assert common.tolist() == [True, False, False]
    np.testing.assert_array_equal(macro["auroc"], [[0.6], [0.7], [nan]])
    macro, common = macro_over_common({"auroc": np.array([[[0.6, nan]], [[nan, 0.7]]])})
    assert not common.any()
    assert np.isnan(macro["auroc"]).all()


# --- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shots": "1,2.5"}, "--shots takes whole numbers"),
        ({"shots": "x"}, "--shots takes positive numbers"),
        ({"percent": "101"}, "--percent takes numbers up to 100"),
        ({"shots": ""}, "--shots and --percent are both empty"),
        ({"repeats": 0}, "--repeats must be at least 1, got 0"),
        ({"sampling": "first"}, "--sampling first takes patients, --by patient"),
        ({"sampling": "systematic", "by": "patient"}, "--sampling systematic takes samples, --by sample"),
        ({"sampling": "first", "by": "patient", "percent": "1"}, "--percent is drawn at random"),
        ({"sampling": "first", "by": "patient", "repeats": 100}, "draws without chance, once; leave --repeats 100 out"),
        ({"head": "ncm", "C": "1"}, "--C belongs to --head logistic, not ncm"),
        ({"k": 3}, "--k belongs to --head knn, not logistic"),
        ({"head": "ncm", "select": "inner"}, "--select inner has nothing to choose for --head ncm"),
        ({"C": "1,2"}, "several strengths need --select inner"),
        ({"head": "knn", "k": 0}, "--k must be at least 1, got 0"),
        ({"head": "knn", "temperature": -1.0}, "--temperature must be above 0"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FewShotConfig(**options)


def test_a_record_says_how_often_was_drawn() -> None:
    assert (FewShotConfig().repeats, FewShotConfig(repeats=3).num_repeats) == (100, 3)
    assert FewShotConfig(sampling="systematic", repeats=1) == FewShotConfig(sampling="systematic")


def test_negative_seed() -> None:
    with pytest.raises(ConfigError, match="--seed must be 0 or more, got -1"):
        FewShotData(dataset="x", seed=-1)


def test_zero_rows_have_no_direction() -> None:
    X = np.zeros((3, 2), np.float32)
    with pytest.raises(TaskError, match="has no direction; use --scaling none"):
        Space.of(X, "unit").of_all(X)


def test_more_neighbours_than_shots() -> None:
    X, y, groups = example()
    space = Space.of(X, "unit")
    with pytest.raises(ConfigError, match="k=9 neighbours asked of 2 shots"):
        neighbour_scores(
            torch.from_numpy(X), space, space.of_all(X), table(X, y, groups).at(1), k=9, temperature=0.1,
            num_classes=None,
        )  # fmt: skip
