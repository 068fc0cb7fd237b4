"""Arms beside each other: budgets out of records, what makes them unequal, the verdict, the table."""

import copy
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from probes.costs import HeadClock
from probes.finetune_table import arm_table, arms_of, count_text, seeds_line, size_text, time_text, total_cost
from probes.logistic import DEFAULT_C
from probes.price import NUM_DEFAULT_C, budget_of, price_lines, price_of, price_table
from probes.report import print_tables, tables

TASK = {
    "name": "t", "digest": "d", "kind": "multilabel", "labels": ["x"], "unit": "image", "pool": None,
    "groups_known": True, "splits": {"train": 6, "val": 2, "test": 2}, "patients": {"train": 3, "val": 1, "test": 1},
    "spec": {"labels": ["x"]}, "notes": [],
}  # fmt: skip
COST = {"seconds": 2.0, "gpu_seconds": 0.0, "peak_memory_bytes": 3 * 10**8, "trainable_parameters": 11}


def record(probe: str, number: int, auroc: float = 0.8, **changes: Any) -> dict[str, Any]:
    """A record with what tables and prices read of it."""
    made: dict[str, Any] = {
        "id": f"{probe}{number}", "probe": probe, "dataset": "x", "set": "x/tiny@42", "fingerprint": "f",
        "features": "cls", "weights": {"digest": "w"}, "random_weights": False, "preprocess": {"geometry": "squash"},
        "compute_dtype": "float32", "manifest": "m", "task": TASK, "test_key": "k", "seed": 0, "num_failed": 0,
        "test_opened": 1, "deviations": [], "notes": [], "cost": COST,
        "config": {"head": {}, "evaluation": {"resamples": 20, "seed": 0}},
        "choices": {"said": "-"},
        "metrics": {"val": {"macro": {"auroc": auroc}}, "test": {"macro": {"auroc": auroc}, "skipped": 0}},
    }  # fmt: skip
    return {**made, **changes}


def tuned(seed: int, method: str = "full", auroc: float = 0.9, seeds: int = 2, **budget: Any) -> dict[str, Any]:
    said = {"configurations": 3, "seeds": seeds, "epochs": 20, "augmentation": "none", **budget}
    return record(
        "finetune",
        seed,
        auroc,
        config={
            "head": {"method": method, "preset": "fair", "train_seed": seed},
            "evaluation": {"resamples": 20, "seed": 0},
        },
        choices={"said": "lr=1e-05", "method": method, "preset": "fair", "budget": said},
        cost={**COST, "images_per_second": 10.0 + seed, "peak_gpu_memory_bytes": 10**9, "gpu_seconds": 2.0},
    )


def settled(seed: int, **head: Any) -> dict[str, Any]:
    made = tuned(seed)
    return {**made, "config": {**made["config"], "head": {**made["config"]["head"], **head}}}


def linear(**head: Any) -> dict[str, Any]:
    return record("linear", 0, config={"head": head, "evaluation": {"resamples": 20, "seed": 0}})


def result(low: float, high: float) -> dict[str, Any]:
    return {"metric": "auroc", "macro": {"delta": {"value": (low + high) / 2, "low": low, "high": high}}}


# Budgets


def test_the_default_grid_has_so_many_strengths() -> None:
    assert len(DEFAULT_C) == NUM_DEFAULT_C


@pytest.mark.parametrize(
    ("found", "configurations", "seeds", "epochs", "augmentation"),
    [
        (linear(C=None, protocol=None), 45, None, None, "none"),
        (linear(C="0.1,1,10", protocol=None), 3, None, None, "none"),
        (record("knn", 0, choices={"val_auroc": {"10": 0.5, "20": 0.6}}), 2, None, None, "none"),
        (record("mlp", 0, choices={"val_loss": {"1e-4": 1, "1e-3": 2}, "training": {"epochs": 50}}), 2, 1, 50, "none"),
        (record("knn", 0, choices={}), None, None, None, "none"),
        (tuned(0), 3, 1, 20, "none"),
    ],
)
def test_budgets(
    found: dict[str, Any], configurations: int | None, seeds: int | None, epochs: int | None, augmentation: str
) -> None:
    budget = budget_of([found])
    assert (budget["configurations"], budget["seeds"]) == (configurations, seeds)
    assert (budget["epochs"], budget["augmentation"]) == (epochs, augmentation)


def test_heads_of_a_published_protocol_count_each() -> None:
    quality = {"cls": {"0.1": 0.5, "1": 0.6}, "cls+mean_patch": {"0.1": 0.5, "1": 0.6}}
    found = record(
        "linear",
        0,
        choices={"val_auroc": quality},
        config={"head": {"protocol": "radiology", "views": 4}, "evaluation": {}},
    )
    budget = budget_of([found])
    assert (budget["configurations"], budget["seeds"], budget["augmentation"]) == (4, 1, "4 stored views")


def test_chosen_features_multiply() -> None:
    choices = {"features": {"chosen": "cls", "val_auroc": {"cls": 0.5, "mean_patch": 0.6}}}
    assert budget_of([record("linear", 0, choices=choices, config={"head": {"C": "1"}})])["configurations"] == 2


# Verdicts


def test_equal_budgets_have_a_verdict() -> None:
    sides = [tuned(0), tuned(1)], [tuned(0, "linear-online"), tuned(1, "linear-online")]
    price = price_of(*sides, result(0.01, 0.05))
    assert price["unequal"] == []
    assert price["verdict"] == "A has the better auroc: A - B lies between +0.010 and +0.050"
    assert price_of(*sides, result(-0.05, -0.01))["verdict"].startswith("B has the better auroc")
    none = price_of(*sides, result(-0.01, 0.02))["verdict"]
    assert none == "no difference in auroc is shown: the interval of A - B, -0.010 to +0.020, holds 0"
    assert price_lines(price)[-1].startswith("verdict, at equal budgets: A has")
    mae = {**result(0.01, 0.05), "metric": "mae"}
    assert price_of(*sides, mae)["verdict"].startswith("B has the better mae")
    seeds = result(0.01, 0.05)
    seeds["macro"]["seeds"] = {"delta": {"value": 0.03, "low": -0.01, "high": 0.07}}
    assert price_of(*sides, seeds)["verdict"].startswith("no difference")


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ([linear(C=None)], "configurations that validation chose from: A 3, B 45"),
        ([record("knn", 0, choices={})], "configurations that validation chose from: A 3, B not known"),
        ([tuned(0, "lora", seeds=3), tuned(1, "lora", seeds=3), tuned(2, "lora", seeds=3)], "seeds: A 2, B 3"),
        ([tuned(0, "lora"), tuned(1, "lora")][:1], "seeds: B is seed 0 of 2; name the records of all of them"),
        ([tuned(0, "lora", epochs=5), tuned(1, "lora", epochs=5)], "epochs: A 20, B 5"),
        (
            [tuned(seed, "lora", augmentation="mirrored (plain)") for seed in (0, 1)],
            "augmentation: A none; B mirrored (plain)",
        ),
        ([{**tuned(seed, "lora"), "test_key": "other"} for seed in (0, 1)], "test split: not the same"),
        ([{**tuned(seed, "lora"), "weights": {"digest": "v"}} for seed in (0, 1)], "starting weights: not the same"),
        ([{**tuned(seed), "features": "last4"} for seed in (0, 1)], "features that the head reads: A cls, B last4"),
        (
            [{**tuned(seed), "preprocess": {"geometry": "squash", "height": 7}} for seed in (0, 1)],
            "images: not the same height",
        ),
        ([settled(seed, start="random") for seed in (0, 1)], "start: A none, B random"),
        ([settled(seed, keep="last") for seed in (0, 1)], "keep: A none, B last"),
        ([settled(seed, batch=2) for seed in (0, 1)], "batch: A none, B 2"),
        ([settled(seed, drop_path=0.2) for seed in (0, 1)], "drop_path: A none, B 0.2"),
    ],
)
def test_what_is_unequal_withholds_it(other: list[dict[str, Any]], said: str) -> None:
    price = price_of([tuned(0), tuned(1)], other, result(0.01, 0.05))
    assert price["verdict"] is None
    assert said in price["unequal"]
    lines = price_lines(price)
    assert any(line.startswith("verdict withheld: what was spent on A and B is not equal") for line in lines)
    assert f"  {said}" in lines
    assert any("--method linear-online" in line for line in lines) == (other[0]["probe"] != "finetune")


def test_a_solved_head_may_have_as_many_configurations() -> None:
    assert price_of([linear(C="0.1,1,10")], [tuned(0, seeds=1)], result(0.01, 0.05))["verdict"] is not None


def test_two_frozen_probes_and_files_have_no_price() -> None:
    assert price_of([linear()], [linear()], result(0, 1)) == {}
    assert price_of([None], [tuned(0)], result(0, 1)) == {}


def test_price_table() -> None:
    price = price_of([linear(C=None)], [tuned(0), tuned(1)], result(0.01, 0.05))
    title, columns, rows = price_table(price)
    assert title == "price and tuning budget"
    assert [len(row) for row in rows] == [len(columns)] * 2
    found = dict(zip(columns, rows[1]))
    assert (found["arm"], found["seeds"], found["configurations"]) == ("finetune full (fair)", "2", "3")
    assert (found["time"], found["GPU time"], found["GPU memory"]) == ("4 s", "4 s", "1 GB")
    assert dict(zip(columns, rows[0]))["seeds"] == "draws nothing"


# The table of arms


def test_seeds_of_an_arm_share_a_row() -> None:
    records = [linear(C=None), tuned(0, auroc=0.9), tuned(1, auroc=0.8), tuned(0, "lora")]
    newer = copy.deepcopy(records[1])
    newer["id"], newer["metrics"]["test"]["macro"]["auroc"] = "newer", 0.7
    arms = arms_of([*records, newer, {**linear(), "probe": "baseline:chance"}, {**linear(), "fold": {}}])
    assert [[item["id"] for item in arm] for arm in arms] == [["linear0"], ["newer", "finetune1"], ["finetune0"]]
    title, columns, rows = arm_table(arms)
    assert title == "x · arms · t · images (patients): train 6 (3), val 2 (1), test 2 (1) · squash"
    found = [dict(zip(columns, row, strict=True)) for row in rows]
    full = next(row for row in found if row["arm"] == "finetune full (fair)")
    assert (full["seeds"], full["test AUROC [95%, one seed]"], full["sd of seeds"]) == ("2", "0.750", "0.071")
    assert (full["images/s"], full["time"]) == ("10.5", "4 s")


def test_fine_tuned_networks_are_printed_as_arms() -> None:
    other = {**tuned(0), "task": {**TASK, "digest": "e"}}
    chance = {**linear(), "probe": "baseline:chance", "task": other["task"]}
    records = [linear(C=None), tuned(0), tuned(1), other]
    for made in (*records, chance):
        made["metrics"] = copy.deepcopy(made["metrics"])
        made["metrics"]["test"]["per_label"] = []
        made["metrics"]["test"]["macro"] |= {"auprc": 0.5, "accuracy": 0.5, "balanced_accuracy": 0.5}
    assert len(tables(records)) == 1
    shown: list[tuple[str, list[str]]] = []

    def show(title: str, columns: list[str], rows: list[list[str]], **_: Any) -> None:
        shown.append((title, [row[0] for row in rows]))

    print_tables([*records, chance], show)
    arms = [rows for title, rows in shown if " · arms · " in title]
    assert arms == [["finetune full (fair)", "linear"], ["finetune full (fair)"]]
    assert shown[-1][1] == ["baseline: chance"]
    assert not any("probes finetune" in title for title, _ in shown)


def test_seeds_are_summed_up_from_records() -> None:
    three = [tuned(seed, auroc=auroc, seeds=3) for seed, auroc in enumerate((0.7, 0.8, 0.9))]
    assert seeds_line(three) == (
        "finetune full (fair): test AUROC of 3 seeds: mean 0.800, sd 0.100, 0.700 to 0.900; the interval is that of "
        "seed 0"
    )
    assert "AUROC of 2 of 3 seeds: mean 0.750, sd 0.071" in str(seeds_line(three[:2]))
    assert "AUROC of 1 of 3 seeds: mean 0.700; the interval" in str(seeds_line(three[:1]))
    assert seeds_line([tuned(0, seeds=1)]) is None


class Cuda:
    """torch.cuda of a program that used `taken` bytes of the second GPU, and makes the first one current later."""

    def __init__(self, taken: int) -> None:
        self.taken, self.resets, self.current = taken, 0, 1

    def current_device(self) -> int:
        return self.current

    def is_initialized(self) -> bool:
        return True

    def reset_peak_memory_stats(self, device: int) -> None:
        assert device == 1
        self.resets, self.current = self.resets + 1, 0

    def max_memory_allocated(self, device: int | None = None) -> int:
        return self.taken if (self.current if device is None else device) == 1 else 7 * 10**9


def test_a_head_on_a_gpu_has_gpu_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    for cuda in (None, Cuda(0), Cuda(10**6)):
        monkeypatch.setitem(sys.modules, "torch", None if cuda is None else SimpleNamespace(cuda=cuda))
        found = HeadClock().cost(7)
        taken = 0 if cuda is None else cuda.taken
        assert found["peak_gpu_memory_bytes"] == taken
        assert found["gpu_seconds"] == (found["seconds"] if taken else 0)
        assert found["trainable_parameters"] == 7
        assert cuda is None or cuda.resets == 1


def test_cost_of_seeds_adds_up() -> None:
    found = total_cost([tuned(0), tuned(1)])
    assert (found["seconds"], found["gpu_seconds"], found["peak_gpu_memory_bytes"]) == (4.0, 4.0, 10**9)
    assert total_cost([linear()])["images_per_second"] is None


def test_numbers_are_short() -> None:
    assert [count_text(n) for n in (385, 1537, 1_905_216, 1_100_000_000)] == ["385", "1.54 k", "1.91 M", "1.1 G"]
    assert [size_text(n) for n in (656_000_000, 22_400_000_000)] == ["656 MB", "22 GB"]
    assert [time_text(n) for n in (2.04, 119.0, 245.0, 9000.0)] == ["2.04 s", "119 s", "4.08 min", "2.5 h"]
