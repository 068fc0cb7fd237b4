"""Arms beside each other: what each scores, what it costs, and how much was tried for it.

Fine-tuned networks and frozen probes of one task and split stand in one table in the order of what trains, from the
least; no arm is ranked by its score there. Work from records alone.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from featstore.backbones.source import RANDOM_ENDING
from featstore.objects import Place
from probes.costs import COSTS_LINE
from probes.protocol import seed_of, without_seed
from probes.records import float_or_nan, load_records
from probes.report import (
    FINETUNE,
    Table,
    describe_choice,
    is_baseline,
    label_table,
    notes_of,
    set_of,
    title_of,
    with_interval,
)


def arm_name(record: dict[str, Any]) -> str:
    """`finetune lora (fair)`, `linear`, `knn`."""
    head = record["config"]["head"]
    if record["probe"] == FINETUNE:
        return f"{FINETUNE} {head['method']} ({head['preset']})"
    protocol = head.get("protocol")
    return f"{record['probe']}" + (f" ({protocol})" if protocol else "")


def task_key(record: dict[str, Any]) -> tuple[Any, ...]:
    """What arms must have in common to stand in one table: task, splits, what is counted, geometry.

    The seed and number of resamples too, so that intervals are of the same draws. Networks may differ.
    """
    task, evaluation = record["task"], record["config"]["evaluation"]
    return (
        record["dataset"],
        record["test"]["dataset"] if "test" in record else "",
        task["digest"],
        task["kind"],
        task["unit"],
        task.get("pool"),
        (record["preprocess"] or {}).get("geometry"),
        evaluation["resamples"],
        evaluation["seed"],
    )


def arms_of(records: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Records of one arm each, which differ in their seed alone; the latest of each seed counts."""
    found: dict[str, dict[Any, dict[str, Any]]] = {}
    for record in records:
        if {"sensitivity", "curve", "fold"} & record.keys() or is_baseline(record):
            continue
        key = str((record["fingerprint"], sorted(without_seed(record).items(), key=str)))
        found.setdefault(key, {})[seed_of(record)] = record
    return [list(seeds.values()) for seeds in found.values()]


def seeds_mean(arm: Sequence[dict[str, Any]], split: str, metric: str) -> tuple[float, float | None]:
    """(mean over seeds of a macro metric, their standard deviation, None of one)."""
    values = np.array([float_or_nan(record["metrics"][split]["macro"].get(metric)) for record in arm])
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else None


def total_cost(arm: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What all seeds of an arm took together, and the largest memory and the rate among them.

    Of a frozen probe it is what its head took; extraction is paid once for all heads of a set.
    """
    costs = [record["cost"] for record in arm]
    rates = [cost["images_per_second"] for cost in costs if cost.get("images_per_second")]
    return {
        "trainable_parameters": max(cost["trainable_parameters"] for cost in costs),
        "seconds": sum(cost["seconds"] for cost in costs),
        "gpu_seconds": sum(cost["gpu_seconds"] for cost in costs),
        "peak_memory_bytes": max(cost["peak_memory_bytes"] for cost in costs),
        "peak_gpu_memory_bytes": max(cost.get("peak_gpu_memory_bytes", 0) for cost in costs),
        "images_per_second": float(np.median(rates)) if rates else None,
    }


COST_COLUMNS = ["trainable", "memory", "GPU memory", "time", "GPU time", "images/s"]


def cost_cells(cost: dict[str, Any]) -> list[str]:
    """One cell for each of `COST_COLUMNS`."""
    rate = cost["images_per_second"]
    return [
        count_text(cost["trainable_parameters"]),
        size_text(cost["peak_memory_bytes"]),
        size_text(cost["peak_gpu_memory_bytes"]) if cost["peak_gpu_memory_bytes"] else "-",
        time_text(cost["seconds"]),
        time_text(cost["gpu_seconds"]) if cost["gpu_seconds"] else "-",
        "-" if rate is None else f"{rate:.3g}",
    ]


def count_text(count: int) -> str:
    """`812`, `2.3 k`, `86 M`."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return str(count)


def size_text(num_bytes: int) -> str:
    """`1.3 GB`."""
    return f"{num_bytes / 1e9:.2g} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.3g} MB"


def time_text(seconds: float) -> str:
    """`12.3 s`, `4.1 min`, `2.3 h`."""
    for unit, name in ((3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds:.3g} s"


def arm_table(arms: Sequence[list[dict[str, Any]]]) -> Table:
    """One row an arm, by the numbers that train: mean over seeds and its spread, the interval of the first seed."""
    first = arms[0][0]
    columns = ["arm", "set", "features", "seeds", "val AUROC", "test AUROC [95%, one seed]", "sd of seeds"]
    rows = []
    for arm in sorted(arms, key=lambda each: (total_cost(each)["trainable_parameters"], arm_name(each[0]))):
        record = arm[0]
        val, _ = seeds_mean(arm, "val", "auroc")
        test, sd = seeds_mean(arm, "test", "auroc")
        bounds = record["metrics"]["test"].get("intervals", {}).get("macro", {}).get("auroc")
        rows.append(
            [
                arm_name(record),
                set_of(record),
                record["features"],
                str(len(arm)),
                with_interval(val, None),
                with_interval(test, bounds),
                "-" if sd is None else f"{sd:.3f}",
                *cost_cells(total_cost(arm)),
                describe_choice(record),
            ]
        )
    title = title_of(first).replace(f" · probes {first['probe']}", " · arms")
    return title, [*columns, *COST_COLUMNS, "chosen"], rows


def seeds_line(arm: Sequence[dict[str, Any]]) -> str | None:
    """Mean and spread over the seeds of an arm, from its records alone; None of one seed that was all."""
    made = arm[0]["choices"].get("budget", {}).get("seeds", len(arm))
    if max(len(arm), made) < 2:
        return None
    test, sd = seeds_mean(arm, "test", "auroc")
    values = [float_or_nan(record["metrics"]["test"]["macro"]["auroc"]) for record in arm]
    count = f"{len(arm)} seeds" if len(arm) >= made else f"{len(arm)} of {made} seeds"
    spread = "" if sd is None else f", sd {sd:.3f}, {min(values):.3f} to {max(values):.3f}"
    return (
        f"{arm_name(arm[0])}: test AUROC of {count}: mean {test:.3f}{spread}; "
        f"the interval is that of seed {seed_of(arm[0])}"
    )


def summary_lines(arm: Sequence[dict[str, Any]]) -> list[str]:
    """Mean and spread over seeds of an arm, and what to do next."""
    ids = ",".join(record["id"] for record in arm)
    return [*filter(None, [seeds_line(arm)]), f"compare it: probes compare FROZEN {ids}"]


def print_arms(
    records: list[dict[str, Any]], folder: Place, show: Callable[..., None], *, store: Place | None = None
) -> None:
    """Print the arms just made beside those that are kept of the same task, then what a reader must know.

    `store` stands in the lines that make features, None where it goes without saying.
    """
    kept = [*load_records(folder), *records]
    for key in dict.fromkeys(task_key(record) for record in records):
        mine = [record for record in records if task_key(record) == key]
        same = [record for record in kept if task_key(record) == key]
        same = list({record["id"]: record for record in same}.values())
        arms, own = arms_of(same), arms_of(mine)
        if not own:  # single folds, of which the record over all of them says everything
            _print_extract_lines(mine, store)
            continue
        show(*arm_table(arms), right=("seeds", *COST_COLUMNS))
        for arm in own:
            show(*label_table(arm[0]), right=("positives", "n"))
        for note in notes_of(mine):
            print(f"  {note}")
        for text in dict.fromkeys(text for record in mine for text in record["deviations"]):
            print(f"  not as {mine[0]['config']['head']['preset']} has it: {text}")
        print(f"  {COSTS_LINE}")
        for arm in own:
            for line in summary_lines(arm):
                print(f"  {line}")
        _print_extract_lines(mine, store)


def _print_extract_lines(records: Sequence[dict[str, Any]], store: Place | None) -> None:
    for record in records:
        if record["choices"].get("weights"):
            fold = f", fold {record['fold']['number']}" if "fold" in record else ""
            print(f"  features of seed {seed_of(record)}{fold}: {extract_line(record, store)}")


def extract_line(record: dict[str, Any], store: Place | None = None) -> str:
    """The command that makes a set of features from the trained network, whose name says what trained it.

    `store` is that of the command that trained it, where one was given.
    """
    import shlex

    network, images, data = (record["config"][name] for name in ("network", "images", "evaluation"))
    choices = record["choices"]
    model, weights = data["model"], choices["weights"]
    if model.startswith("hf:"):  # a folder that names its weights itself, and so does the run's
        model, weights = f"hf:{weights}", None
    options = {
        "dataset": data["dataset"],
        "model": model.removesuffix(RANDOM_ENDING),
        "res": network["res"] or record["set"].rpartition("@")[2],
        "weights": weights,
        "norm": network["norm"],
        "pos-interp": network["pos_interp"],
        "geometry": images["geometry"] if images["geometry"] != "squash" else None,
        "fit": images["fit"] if images["fit"] != "nearest" else None,
        "intensity": images["intensity"] if images["intensity"] != "native" else None,
        "dicom-mode": images["dicom_mode"] if images["dicom_mode"] != "standard" else None,
        "decode": images["decode"] if images["decode"] != "full" else None,
        "published": choices.get("published"),
        "store": store.absolute() if isinstance(store, Path) else store,  # a bucket is named whole
    }
    return "featstore extract " + " ".join(
        f"--{option} {shlex.quote(str(value))}" for option, value in options.items() if value is not None
    )
