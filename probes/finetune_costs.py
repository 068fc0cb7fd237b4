"""What a record of fine-tuning says of its cost: all runs of a seed, and what comes before, kept beside the runs."""

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from featstore import files
from featstore.errors import Stopped
from probes.finetune_arm import Arm
from probes.tuning_cost import MEMORY, merged, on_gpu
from probes.tuning_ranks import Team
from probes.tuning_state import NOT_KNOWN

COSTS = "cost.json"
TIMES = ("seconds", "gpu_seconds")


def spent_in_vain(seconds: float, team: Team) -> dict[str, Any]:
    """The cost of a run that came to nothing."""
    used = seconds * team.world if on_gpu(team) else 0.0
    return {"seconds": seconds, "gpu_seconds": used, **dict.fromkeys(MEMORY, 0), "trained_with": []}


def keep_cost(cost: dict[str, Any], path: Path, team: Team) -> dict[str, Any]:
    """Write a run's cost beside it; memory of attempts that kept it here and nowhere else is taken over from there."""
    if any(part["device"] == NOT_KNOWN for part in cost["trained_with"]) and path.is_file():
        held = json.loads(path.read_bytes())
        cost = cost | {name: max(cost[name], held.get(name, 0)) for name in MEMORY}
    team.wait()  # all have read it
    if team.writes:
        files.write_atomic(path, json.dumps(cost).encode())
    return cost


def seed_cost(
    runs: Sequence[Mapping[str, Any]], before: Iterable[Mapping[str, float]], chosen: Mapping[str, Any]
) -> dict[str, Any]:
    """What all runs of a seed took, and what came `before` them; images/s are the chosen one's, validation included."""
    paid = [*before, *runs]
    return {
        **{name: round(sum(part[name] for part in paid), 3) for name in TIMES},
        **{name: max(run[name] for run in runs) for name in MEMORY},
        **{name: chosen[name] for name in ("trainable_parameters", "images_per_second", "processes")},
        "runs": len(runs),
        "trained_with": merged(run["trained_with"] for run in runs),
    }


@contextmanager
def paying(arm: Arm, what: str) -> Iterator[None]:
    """Add the time of a part that comes before all runs to what it took so far, also where it is asked to end."""
    began = time.monotonic()
    try:
        yield
    except Stopped:
        _pay(arm, what, time.monotonic() - began)
        raise
    _pay(arm, what, time.monotonic() - began)


def _pay(arm: Arm, what: str, seconds: float) -> None:
    if not arm.team.writes:
        return
    held = read_before(arm, what)
    used = seconds * arm.team.world if on_gpu(arm.team) else 0.0
    more = {name: round(held[name] + value, 3) for name, value in zip(TIMES, (seconds, used), strict=True)}
    files.write_atomic(arm.root / COSTS, json.dumps({**_held(arm), what: more}).encode())


def read_before(arm: Arm, what: str) -> dict[str, float]:
    """Seconds and GPU-seconds that a part has taken, by whichever command."""
    found = _held(arm).get(what, dict.fromkeys(TIMES, 0.0))
    # Before there were two numbers there was one, and nothing said on how many GPUs.
    return found if isinstance(found, dict) else {"seconds": float(found), "gpu_seconds": 0.0}


def _held(arm: Arm) -> dict[str, Any]:
    path = arm.root / COSTS
    found: dict[str, Any] = json.loads(path.read_bytes()) if path.is_file() else {}
    return found
