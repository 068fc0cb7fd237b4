"""What two arms cost and how much was tried for each; a verdict only where that was equal.

Works from records alone, as `probes compare` does.
"""

from collections.abc import Sequence
from typing import Any

from probes.configs import parse_numbers
from probes.costs import COSTS_LINE
from probes.finetune_table import COST_COLUMNS, arm_name, cost_cells, total_cost
from probes.paired import LOSSES
from probes.protocol import seed_of
from probes.report import FINETUNE, Table

NUM_DEFAULT_C = 45  # strengths that `probes linear` tries unless told otherwise
BY_SEED = ("mlp", "attentive", "mil", FINETUNE)  # draw first weights, orders, ...; a linear protocol does too
NONE = "none"
# Options that methods share; rates, layer decay and an adapter's own settings belong to a method.
SETTLED = (
    *("batch", "drop_last", "optimizer", "weight_decay", "schedule", "warmup", "clip", "ema"),
    *("class_weight", "start", "keep", "patience", "compute_dtype", "refit", "drop_path", "stretch_positions"),
)


def budget_of(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How much was tried for an arm: configurations that validation chose from, seeds, epochs, augmentation.

    `configurations` None: not known; `seeds` None: nothing is drawn, another seed gives the same; `epochs` None: solved
    to an optimum, or nothing is trained. `seeds_made` is how many there are where that is known.
    """
    record = records[0]
    head, choices = record["config"]["head"], record["choices"]
    if record["probe"] == FINETUNE:
        said = choices["budget"]
        return {
            "configurations": said["configurations"],
            "seeds": len(records),
            "seeds_made": said["seeds"],
            "epochs": said["epochs"],
            "augmentation": said["augmentation"],
        }
    drawn = record["probe"] in BY_SEED or (record["probe"] == "linear" and head.get("protocol") is not None)
    views = head.get("views")
    return {
        "configurations": _configurations(record),
        "seeds": len(records) if drawn else None,
        "seeds_made": None,
        "epochs": choices.get("training", {}).get("epochs") if drawn else None,
        "augmentation": f"{views} stored views" if views else NONE,
    }


def _configurations(record: dict[str, Any]) -> int | None:
    head, choices = record["config"]["head"], record["choices"]
    if record["probe"] == "linear" and head.get("protocol") is None:
        tried = NUM_DEFAULT_C if head.get("C") is None else len(set(parse_numbers(head["C"], "--C")))
    else:
        names = ("val_auroc", "val_accuracy", "loo_auroc", "val_loss")
        tried = max((_leaves(choices[name]) for name in names if name in choices), default=0)
    features = choices.get("features")
    if isinstance(features, dict):  # `--choose-features` tries all of that for each
        tried *= max(len(value) for value in features.values() if isinstance(value, dict))
    return tried or None


def _leaves(values: Any) -> int:
    """Numbers in what a probe keeps of each head that it tried, by learning rate, features or k."""
    if isinstance(values, dict):
        return sum(map(_leaves, values.values()))
    return 1


def price_of(a: Sequence[dict[str, Any] | None], b: Sequence[dict[str, Any] | None], result: Any) -> dict[str, Any]:
    """Price and budget of both sides of a comparison in which a network was trained; empty for any other.

    `{"a", "b", "unequal", "verdict"}`: each side's `arm`, `cost` and `budget`; what is not equal, in words; and which
    is better by the interval of A - B, None where anything is unequal.
    """
    sides = [[record for record in side if record is not None] for side in (a, b)]
    if not all(sides) or FINETUNE not in (sides[0][0]["probe"], sides[1][0]["probe"]):
        return {}
    budgets = [budget_of(side) for side in sides]
    unequal = _unequal(sides[0], sides[1], budgets[0], budgets[1])
    made = {
        name: {"arm": arm_name(side[0]), "cost": total_cost(side), "budget": budget}
        for name, side, budget in zip("ab", sides, budgets)
    }
    return {**made, "unequal": unequal, "verdict": None if unequal else _verdict(result)}


def _unequal(
    a: Sequence[dict[str, Any]], b: Sequence[dict[str, Any]], own: dict[str, Any], other: dict[str, Any]
) -> list[str]:
    found = []
    for name, of_a, of_b in (
        ("task and splits", a[0]["task"]["digest"], b[0]["task"]["digest"]),
        ("test split", a[0]["test_key"], b[0]["test_key"]),
        ("geometry", (a[0]["preprocess"] or {}).get("geometry"), (b[0]["preprocess"] or {}).get("geometry")),
        ("starting weights", a[0]["weights"].get("digest"), b[0]["weights"].get("digest")),
    ):
        if of_a != of_b:
            found.append(f"{name}: not the same")
    if a[0]["features"] != b[0]["features"]:
        found.append(f"features that the head reads: A {a[0]['features']}, B {b[0]['features']}")
    pixels = [
        {name: value for name, value in (side[0]["preprocess"] or {}).items() if name != "geometry"} for side in (a, b)
    ]
    if differing := sorted(
        name for name in pixels[0].keys() | pixels[1].keys() if pixels[0].get(name) != pixels[1].get(name)
    ):
        found.append(f"images: not the same {', '.join(differing)}")
    if a[0]["probe"] == b[0]["probe"] == FINETUNE:
        heads = [side[0]["config"]["head"] for side in (a, b)]
        for name in SETTLED:
            if heads[0].get(name) != heads[1].get(name):
                found.append(f"{name}: A {heads[0].get(name, NONE)}, B {heads[1].get(name, NONE)}")
    if own["configurations"] is None or own["configurations"] != other["configurations"]:
        found.append(
            f"configurations that validation chose from: A {_said(own['configurations'])}, "
            f"B {_said(other['configurations'])}"
        )
    for name in ("seeds", "epochs"):
        if None not in (own[name], other[name]) and own[name] != other[name]:
            found.append(f"{name}: A {own[name]}, B {other[name]}")
    for side, budget, records in (("A", own, a), ("B", other, b)):
        if budget["seeds_made"] is not None and budget["seeds"] < budget["seeds_made"]:
            seeds = ", ".join(str(seed_of(record)) for record in records)
            found.append(f"seeds: {side} is seed {seeds} of {budget['seeds_made']}; name the records of all of them")
    if own["augmentation"] != other["augmentation"]:
        found.append(f"augmentation: A {own['augmentation']}; B {other['augmentation']}")
    return found


def _said(count: int | None) -> str:
    return "not known" if count is None else str(count)


def _verdict(result: dict[str, Any]) -> str:
    """What the interval of A - B says; with several seeds that which holds their chance too."""
    macro, metric = result["macro"], result["metric"]
    delta = macro.get("seeds", {}).get("delta", macro["delta"])
    low, high = delta.get("low"), delta.get("high")
    if low is None or high is None or low != low:
        return f"no interval of {metric}: nothing can be said"
    if low <= 0 <= high:
        return f"no difference in {metric} is shown: the interval of A - B, {low:+.3f} to {high:+.3f}, holds 0"
    better = "A" if (low > 0) != (metric in LOSSES) else "B"
    return f"{better} has the better {metric}: A - B lies between {low:+.3f} and {high:+.3f}"


def price_table(price: dict[str, Any]) -> Table:
    """One row a side."""
    names = ["configurations", "seeds", "epochs"]
    rows = []
    for side in "ab":
        part = price[side]
        budget = part["budget"]
        words = {"configurations": "not known", "seeds": "draws nothing", "epochs": "-"}
        cells = [words[name] if budget[name] is None else str(budget[name]) for name in names]
        rows.append([side.upper(), part["arm"], *cost_cells(part["cost"]), *cells, budget["augmentation"]])
    return "price and tuning budget", ["", "arm", *COST_COLUMNS, *names, "augmentation"], rows


def price_lines(price: dict[str, Any]) -> list[str]:
    """The verdict, or why there is none and how to come to one."""
    lines = [COSTS_LINE]
    if not price["unequal"]:
        return [*lines, f"verdict, at equal budgets: {price['verdict']}"]
    arms = [price[side]["arm"] for side in "ab"]
    lines.append("verdict withheld: what was spent on A and B is not equal, so a difference may come from that")
    lines += [f"  {text}" for text in price["unequal"]]
    if not all(arm.startswith(FINETUNE) for arm in arms):
        lines.append(
            "for an equal budget of the frozen network: probes finetune --method linear-online, with the other options "
            "as they were"
        )
    return lines
