"""One record over all folds: mean and spread of the folds, and their test rows scored together."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from featstore import files
from featstore.objects import Place
from probes.folds import spread
from probes.metrics import evaluate
from probes.records import load_predictions, load_records_at, save_record
from probes.regression import bootstrap_numbers, evaluate_numbers
from probes.statistics import bootstrap

POOLED_NOTE = (
    "cross-validation: test shows the rows of all folds scored together, intervals resample their patients; scores of "
    "different folds come from different heads, so the mean over folds (in the record) may differ; val is that mean"
)
CARRIED = ("vote", "pooling", "method", "preset", "budget")  # choices that no fold makes for itself
SHARED = (
    "probe", "dataset", "set", "fingerprint", "weights", "random_weights", "preprocess", "compute_dtype", "manifest",
    "groups", "config", "num_failed", "seed", "pretraining_overlap",
)  # fmt: skip


def with_summaries(records: list[dict[str, Any]], folder: Place, opened: Counter[str]) -> list[dict[str, Any]]:
    """The records of folds, and after those of every set and feature the record over them, which is kept as well."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        chosen = "" if "features" in record["choices"] else record["features"]
        groups.setdefault((record["fingerprint"], chosen), []).append(record)
    made = []
    for members in groups.values():
        key = files.digest([record["test_key"] for record in members])
        opened[key] += 1
        made += [*members, summarise(members, folder, key, opened[key])]
    return made


def summarise(folds: Sequence[dict[str, Any]], folder: Place, key: str, opened: int) -> dict[str, Any]:
    """Keep and return the record over the folds of one set and feature; `key` names all their test rows."""
    import pyarrow as pa
    import pyarrow.compute as pc

    tables = []
    for record in folds:
        table = load_predictions(record)
        table = table.filter(pc.equal(table["split"], "test"))
        tables.append(table.append_column("fold", pa.array([record["fold"]["number"]] * len(table), pa.int64())))
    pooled = pa.concat_tables(tables)
    task = _task(folds)
    names = sorted({record["features"] for record in folds})
    record = {
        **{name: folds[0][name] for name in SHARED},
        "task": task,
        "features": names[0] if len(names) == 1 else f"chosen: {', '.join(names)}",
        "num_masked": {
            split: sum(item["num_masked"][split] for item in folds) if split == "test" else count
            for split, count in folds[0]["num_masked"].items()
        },
        "choices": {"said": f"in each of {len(folds)} folds", **_choices(folds)},
        "metrics": {
            "val": {"scored": "mean over folds", "macro": _means([item["metrics"]["val"]["macro"] for item in folds])},
            "test": _scores(task, pooled, folds[0]),
        },
        "folds": {"of": len(folds), "records": [item["id"] for item in folds], **_spreads(folds)},
        "test_opened": opened,
        "test_key": key,
        "cost": {
            "seconds": round(sum(item["cost"]["seconds"] for item in folds), 3),
            "peak_memory_bytes": max(item["cost"]["peak_memory_bytes"] for item in folds),
            "peak_gpu_memory_bytes": max(item["cost"].get("peak_gpu_memory_bytes", 0) for item in folds),
            "trainable_parameters": folds[0]["cost"]["trainable_parameters"],
            "gpu_seconds": sum(item["cost"]["gpu_seconds"] for item in folds),
            **{name: folds[0]["cost"][name] for name in ("not_counted",) if name in folds[0]["cost"]},
        },
        "deviations": list(dict.fromkeys(text for item in folds for text in item["deviations"])),
        "notes": [POOLED_NOTE, _said(folds), *_common(folds)],
    }
    return load_records_at(save_record(folder, record, {name: pooled[name] for name in pooled.column_names}))


def _task(folds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The task over all folds: its test rows are all rows, its training rows those of a fold on average."""
    first = folds[0]["task"]
    counts = {
        what: {
            split: round(sum(item["task"][what][split] for item in folds) / (1 if split == "test" else len(folds)))
            for split in first[what]
        }
        for what in ("splits", "images", "patients")
    }
    fold = {name: value for name, value in first["spec"]["fold"].items() if name != "number"}
    fewer = first["notes"] if len(folds) == 1 else [text for text in first["notes"] if not text.startswith("splits: ")]
    where = f"column {fold['column']!r}" if fold["column"] else f"seed {fold['seed']}, groups intact"
    return {
        **first,
        **counts,
        "digest": files.digest([item["task"]["digest"] for item in folds]),
        # In some fold at least: its test rows are not scored by the label.
        "not_fitted": [name for name in first["labels"] if any(name in item["task"]["not_fitted"] for item in folds)],
        "spec": {**first["spec"], "fold": fold},
        "notes": [*fewer, f"splits: {len(folds)} folds over all rows, {where}; of train and val the mean counts"],
    }


def _choices(folds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What every fold chose."""
    return {
        **{name: folds[0]["choices"][name] for name in CARRIED if name in folds[0]["choices"]},
        "per_fold": [item["choices"] for item in folds],
    }


def _scores(task: dict[str, Any], table: Any, first: dict[str, Any]) -> dict[str, Any]:
    """Metrics of all test rows together, with intervals from resampled patients."""
    kind, labels = task["kind"], task["labels"]
    groups = np.array(table["group"].to_pylist())
    scores = np.stack([table[f"score:{label}"].to_numpy() for label in labels], 1)
    if kind == "multiclass":
        number = {name: place for place, name in enumerate(labels)}
        y = np.array([number[name] for name in table["label"].to_pylist()])
        mask = np.ones(len(y), dtype=bool)
    else:
        y = np.stack([table[f"label:{label}"].to_numpy() for label in labels], 1)
        mask = np.stack([table[f"mask:{label}"].to_numpy(zero_copy_only=False) for label in labels], 1)
    settings = first["config"]["evaluation"]
    draws: dict[str, Any] = {"num_resamples": settings["resamples"], "seed": settings["seed"], "labels": labels}
    if kind in ("regression", "ordinal"):
        more = {"kind": kind, "num_classes": len(task["spec"].get("classes", ()))}
        result = evaluate_numbers(y, scores, mask, labels=labels, **more)
        return {**result, "intervals": bootstrap_numbers(y, scores, mask, groups, **more, **draws)}
    metrics = evaluate(y, scores, mask, kind=kind, labels=labels)
    return {**metrics, "intervals": bootstrap(y, scores, mask, groups, kind=kind, **draws)}


def _means(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {name: spread([entry[name] for entry in entries])["mean"] for name in entries[0]}


def _spreads(folds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and spread over folds: of every macro metric, per label, at the thresholds of each fold, and calibration."""
    found: dict[str, Any] = {}
    for split in ("val", "test"):
        macros = [item["metrics"][split]["macro"] for item in folds]
        found[split] = {name: spread([macro[name] for macro in macros]) for name in macros[0]}
    tests = [item["metrics"]["test"] for item in folds]
    found["per_label"] = [
        {
            "label": entry["label"],
            **{
                name: spread([test["per_label"][place][name] for test in tests])
                for name in entry
                if name not in ("label", "n", "positives")
            },
        }
        for place, entry in enumerate(tests[0]["per_label"])
    ]
    for name in ("at_youden", "at_test_youden"):
        macros = [test[name]["macro"] for test in tests if name in test]
        if macros:
            found[name] = {metric: spread([macro[metric] for macro in macros]) for metric in macros[0]}
            if name == "at_test_youden":
                found[name] = {"optimistic": True, **found[name]}
    for part in ("raw", "temperature"):
        macros = [test["calibration"][part]["macro"] for test in tests if part in test.get("calibration", {})]
        if macros:
            found.setdefault("calibration", {})[part] = {
                metric: spread([macro[metric] for macro in macros]) for metric in macros[0]
            }
    return found


def _common(folds: Sequence[dict[str, Any]]) -> list[str]:
    """Notes that every fold has, and so say how all of them were made; those of single folds stay in their records."""
    return [note for note in folds[0]["notes"] if all(note in item["notes"] for item in folds)]


def _said(folds: Sequence[dict[str, Any]]) -> str:
    """The mean and spread of the metric that ranks, in words."""
    name = {"regression": "r2", "ordinal": "qwk"}.get(folds[0]["task"]["kind"], "auroc")
    found = spread([item["metrics"]["test"]["macro"][name] for item in folds])
    return (
        f"{folds[0]['set']} {folds[0]['features']}: {name} of the {len(folds)} folds: mean {found['mean']:.3f}, "
        f"sd {found['sd']:.3f}, {found['min']:.3f} to {found['max']:.3f}"
    )
