"""Arguments of `probes finetune` as tests give them."""

from pathlib import Path
from typing import Any

SMALL = {
    "dataset": "pics", "model": "tiny-random", "res": "42", "labels": "first,second", "resamples": "20",
    "device": "cpu", "workers": "1", "method": "full", "lr": "1e-3", "epochs": "2", "batch": "8", "seeds": "2",
    "start": "random",
}  # fmt: skip


def arguments(store: Path, runs: Path, **options: Any) -> list[str]:
    """The command's arguments; results go beside the runs."""
    given = {**SMALL, "store": store, "runs": runs, "results": runs / "results", **options}
    found = ["finetune", "--json"]
    for name, value in given.items():
        if value is not None:  # leaves an option of SMALL out
            found += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return found
