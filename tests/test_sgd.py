"""The batched engine of linear heads against one `nn.Linear` a head, autograd and torch's own optimisers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from featstore.errors import ConfigError, TaskError
from probes.sgd import Heads, Held, Recipe, Targets, batches, cosine_factor, starts, train_grid

N, D = 90, 11
RATES = (0.003, 0.02, 0.1)


def data(seed: int = 0, labels: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(N, D, generator=generator)
    y = ((X[:, :labels] + torch.randn(N, labels, generator=generator)) > 0.3).float()
    return X, y


def dino_way(
    X: Tensor,
    loss_of: Any,
    groups: Sequence[tuple[slice, tuple[float, ...]]],
    recipe: Recipe,
    *,
    num_rows: int,
    outputs: int,
    after: Any = None,
) -> list[list[nn.Linear]]:
    """One `nn.Linear` for every head, their losses summed, one backward, torch's optimiser and scheduler."""
    heads = []
    for number, (columns, rates) in enumerate(groups):
        weights, biases = starts(recipe, number, len(range(X.shape[1])[columns]), len(rates), outputs)
        made = []
        for weight, bias in zip(weights, biases):
            head = nn.Linear(len(weight), outputs)
            with torch.no_grad():
                head.weight.copy_(weight.T)
                head.bias.copy_(bias)
            made.append(head)
        heads.append(made)
    parameters: list[Any] = [
        {"params": list(head.parameters()), "lr": rate}
        for made, (_, rates) in zip(heads, groups)
        for head, rate in zip(made, rates)
    ]
    total, _ = recipe.steps(num_rows)
    optimizer: torch.optim.Optimizer = (
        torch.optim.SGD(parameters, momentum=0.9, weight_decay=0)
        if recipe.optimizer == "sgd"
        else torch.optim.AdamW(parameters, weight_decay=0)
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total, eta_min=0)
    for step, batch in zip(range(total), batches(num_rows, recipe, views=len(X) // num_rows)):
        index = torch.from_numpy(batch)
        losses = [
            loss_of(head(X[index][:, columns]), index % num_rows)
            for made, (columns, _) in zip(heads, groups)
            for head in made
        ]
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
        if recipe.cosine:
            scheduler.step()
        if after is not None:
            after(step + 1, heads)
    return heads


def check_same(found: list[Heads], expected: list[list[nn.Linear]]) -> None:
    for heads, others in zip(found, expected, strict=True):
        for number, other in enumerate(others):
            np.testing.assert_allclose(heads.coef[number].T, other.weight.detach(), atol=2e-5)
            np.testing.assert_allclose(heads.intercept[number], other.bias.detach(), atol=2e-5)


GROUPS = [(slice(0, 4), RATES), (slice(2, D), RATES), (slice(0, D), RATES)]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("sampling", ["endless", "epochs", "whole batches"])
def test_every_head_takes_the_steps_of_its_own_linear_layer(optimizer: Any, sampling: Any) -> None:
    X, y = data()
    recipe = Recipe(optimizer=optimizer, batch=16, epochs=7, sampling=sampling, cosine=sampling != "epochs", seed=3)
    expected = dino_way(
        X,
        lambda logits, rows: nn.functional.binary_cross_entropy_with_logits(logits, y[rows]),
        GROUPS,
        recipe,
        num_rows=N,
        outputs=3,
    )
    found = train_grid(X, Targets(y, 3), GROUPS, recipe)
    check_same(found, expected)
    np.testing.assert_allclose(found[1].logits(X)[2], expected[1][2](X[:, 2:]).detach(), atol=1e-4)
    assert found[0].finite.all()


def test_masks_and_weights_of_positives() -> None:
    """Per label the mean over its valid rows of torch's own loss; a label without valid rows in a batch is left out."""
    X, y = data()
    valid = torch.rand(N, 3, generator=torch.Generator().manual_seed(5)) < torch.tensor([1.0, 0.5, 0.02])
    weight = torch.tensor([1.0, 3.0, 0.4])

    def loss(logits: Tensor, rows: Tensor) -> Tensor:
        total = torch.zeros(())
        for label in range(3):
            known = valid[rows, label]
            if known.any():
                total = total + nn.functional.binary_cross_entropy_with_logits(
                    logits[known, label], y[rows, label][known], pos_weight=weight[label]
                )
        return total / 3

    recipe = Recipe(batch=16, epochs=5, start="uniform", sampling="epochs")
    targets = Targets(y * valid, 3, valid, weight)
    found = train_grid(X, targets, GROUPS, recipe)
    check_same(found, dino_way(X, loss, GROUPS, recipe, num_rows=N, outputs=3))
    logits = found[2].logits(X)
    expected = [float(loss(head, torch.arange(N))) for head in logits]
    np.testing.assert_allclose(targets.loss(logits), expected, rtol=1e-5)


def test_classes_by_softmax() -> None:
    X, _ = data()
    y = (X[:, 0] > 0).long() + (X[:, 1] > 0.5).long()
    recipe = Recipe(batch=16, epochs=5)
    targets = Targets(y, 3)
    found = train_grid(X, targets, GROUPS, recipe)
    loss = nn.functional.cross_entropy
    check_same(found, dino_way(X, lambda z, rows: loss(z, y[rows]), GROUPS, recipe, num_rows=N, outputs=3))
    expected = [float(loss(head, y)) for head in found[0].logits(X)]
    np.testing.assert_allclose(targets.loss(found[0].logits(X)), expected, rtol=1e-5)


def test_pieces_and_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = data()
    whole = train_grid(X, Targets(y, 3), GROUPS, Recipe(batch=16, epochs=3))
    monkeypatch.setattr("probes.sgd.PIECE", 1)
    single = train_grid(X, Targets(y, 3), GROUPS, Recipe(batch=16, epochs=3))
    for one, other in zip(whole, single):
        np.testing.assert_allclose(one.coef, other.coef, atol=1e-6)
    again = train_grid(X, Targets(y, 3), GROUPS, Recipe(batch=16, epochs=3))
    np.testing.assert_array_equal(single[2].coef, again[2].coef)
    other_seed = train_grid(X, Targets(y, 3), GROUPS, Recipe(batch=16, epochs=3, seed=1))
    assert np.abs(np.asarray(other_seed[2].coef - again[2].coef)).max() > 1e-3


def test_the_learning_rate_falls_as_a_cosine() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8, eta_min=0)
    for step in range(8):
        assert cosine_factor(step, 8) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        scheduler.step()
    assert cosine_factor(0, 8) == 1.0
    assert cosine_factor(4, 8) == pytest.approx(0.5)
    assert cosine_factor(8, 8) == pytest.approx(0.0)


@pytest.mark.parametrize("sampling", ["endless", "epochs", "whole batches"])
def test_batches_are_permutations(sampling: Any) -> None:
    recipe = Recipe(batch=4, sampling=sampling, seed=2)
    drawn = batches(10, recipe)
    got = [next(drawn) for _ in range({"endless": 5, "epochs": 6, "whole batches": 4}[sampling])]
    sizes = {"endless": [4] * 5, "epochs": [4, 4, 2] * 2, "whole batches": [4] * 4}[sampling]
    assert [len(batch) for batch in got] == sizes
    rows = np.concatenate(got)
    half = len(rows) // 2
    for part in (rows[:half], rows[half:]):
        assert len(set(part.tolist())) == half
    assert rows[:half].tolist() != rows[half:].tolist()
    repeated = batches(10, recipe)
    np.testing.assert_array_equal(np.concatenate([next(repeated) for _ in got]), rows)


def test_a_row_takes_every_view_once_before_any_again() -> None:
    drawn = batches(10, Recipe(batch=10, sampling="epochs"), views=3)
    views = np.zeros((6, 10), int)
    for number in range(6):
        index = next(drawn)
        assert sorted(index % 10) == list(range(10))
        views[number, index % 10] = index // 10
    assert (np.sort(views[:3], 0) == np.arange(3)[:, None]).all()
    assert (np.sort(views[3:], 0) == np.arange(3)[:, None]).all()
    assert len(set(views[0].tolist())) == 3  # rows do not all take the same one


def test_training_on_views_reads_their_rows() -> None:
    X, y = data()
    seen = torch.cat([X, X + 0.1, X * 2])
    recipe = Recipe(batch=16, epochs=6, sampling="epochs")

    def loss(logits: Tensor, rows: Tensor) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(logits, y[rows])

    found = train_grid(seen, Targets(y, 3), GROUPS, recipe)
    check_same(found, dino_way(seen, loss, GROUPS, recipe, num_rows=N, outputs=3))
    with pytest.raises(ConfigError, match="a multiple of 90 rows, got 91"):
        train_grid(torch.cat([X, X[:1]]), Targets(y, 3), GROUPS, recipe)


def test_the_epoch_with_the_lowest_loss_is_kept() -> None:
    X, y = data()
    other_X, other_y = data(1)
    recipe = Recipe(optimizer="adamw", batch=16, epochs=12, cosine=False, sampling="epochs")
    found = train_grid(X, Targets(y, 3), GROUPS, recipe, held=Held(other_X[:30], Targets(other_y[:30], 3)))
    loss = nn.functional.binary_cross_entropy_with_logits
    kept: dict[tuple[int, int], tuple[float, int, np.ndarray]] = {}

    def after(step: int, heads: list[list[nn.Linear]]) -> None:
        if step % 6:
            return
        for group, ((columns, _), made) in enumerate(zip(GROUPS, heads)):
            for number, head in enumerate(made):
                value = float(loss(head(other_X[:30, columns]), other_y[:30]).detach())
                if value < kept.get((group, number), (np.inf,))[0]:
                    kept[group, number] = (value, step // 6, head.weight.detach().numpy().copy())

    dino_way(X, lambda z, rows: loss(z, y[rows]), GROUPS, recipe, num_rows=N, outputs=3, after=after)
    epochs = {value[1] for value in kept.values()}
    assert len(epochs) > 1  # or nothing would be chosen
    for (group, number), (_, epoch, weight) in kept.items():
        assert found[group].epoch is not None
        assert found[group].epoch[number] == epoch  # type: ignore[index]
        np.testing.assert_allclose(found[group].coef[number].T, weight, atol=1e-4)


def test_heads_that_run_away_are_known() -> None:
    X, y = data()
    groups = [(slice(None), (0.01, 1e38))]
    found = train_grid(X * 1e6, Targets(y, 3), groups, Recipe(batch=16, epochs=8))
    assert found[0].finite.tolist() == [True, False]
    held = Held(X[:20] * np.nan, Targets(y[:20], 3))
    assert train_grid(X, Targets(y, 3), groups[:1], Recipe(epochs=1, batch=16), held=held)[0].finite.tolist() == [
        False,
        False,
    ]


def test_progress_counts_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("probes.sgd.SHOWN", 0.0)
    X, y = data()
    told: list[int] = []
    train_grid(X, Targets(y, 3), GROUPS, Recipe(iterations=9), advance=told.append)
    assert told == [1] * 9


def test_number_of_steps() -> None:
    assert Recipe(epoch_steps=1250).steps(40) == (12500, 1250)
    assert Recipe(batch=128, sampling="epochs").steps(1000) == (80, 8)
    assert Recipe(batch=30, epochs=100, sampling="whole batches").steps(100) == (300, 3)
    assert Recipe(iterations=7, batch=10).steps(100) == (7, 10)
    with pytest.raises(TaskError, match=r"20 training rows do not fill one of 30; lower --batch"):
        Recipe(batch=30, sampling="whole batches").steps(20)
