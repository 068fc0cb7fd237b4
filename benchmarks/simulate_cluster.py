"""What stripes with take-over make of 8 to 512 GPUs when blocks are slow and ranks fail: a simulation, no GPU is used.

The policy is `featstore.extraction.division`, the clock is virtual (`virtual_cluster.py`), the spread of block times is
measured (`block_times.py`). `--output` keeps a result file; `--markdown` prints the tables of docs/scaling.md from the
newest full one.
"""

import json
import statistics
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import block_times
import harness
import numpy as np
from virtual_cluster import Cluster, Draws, Job, Outcome, Strategy, run_stripes

from featstore.store.layout import block_rows

STAGE = "cluster"
START_UP = 30.0  # seconds of importing and loading weights; assumed
STALL = 3.0  # measured times above this many medians are stalls: slow blocks are modelled by themselves
GOAL = 0.95
# GFLOP an image and bytes a row as computed for the networks (cls and mean_patch in float16); images/s of one H200 that
# only computes, estimated from memory traffic and peak rates. Estimated, not measured.
MODELS = {
    "dinov3-7b@512": (14511.0, 2 * 8192, 46.0),
    "dinov3-large@512": (727.0, 2 * 2048, 880.0),
    "dinov2-base@224": (46.3, 2 * 1536, 10000.0),
}
FIVE_TIMES = {"failures_per_day": 5.0, "restart": 600.0}
CONDITIONS: dict[str, dict[str, Any]] = {
    "as asked": {},
    "five times worse": {"slow_share": 0.05, **FIVE_TIMES},
    "25 times slow": {"slow_factor": 25.0, **FIVE_TIMES},
}
TAKE_OVER, ALONE, CENTRAL = Strategy(), Strategy("stripes"), Strategy("central")
UNHELPED = Strategy(helping=False)
# Column -> whose blocks are slow, and what the ranks do.
COLUMNS: dict[str, tuple[str, Strategy]] = {
    "stripes": ("block", ALONE),
    "bad data": ("block", TAKE_OVER),
    "bad moment, no helping": ("rank", UNHELPED),
    "bad moment": ("rank", TAKE_OVER),
    "central": ("block", CENTRAL),
}


@dataclass(frozen=True, slots=True)
class Case:
    """A job and its cluster; `rows` of a block, by default as a set of this model gets them."""

    model: str
    images: int
    cluster: Cluster
    rows: int = 0
    stalls: bool = False

    @property
    def size(self) -> int:
        gflop, row_bytes, _ = MODELS[self.model]
        return self.rows or block_rows(gflop, row_bytes)

    @property
    def blocks(self) -> int:
        return -(-self.images // self.size)

    @property
    def seconds(self) -> float:
        return self.size / MODELS[self.model][2]


Row = tuple[Case, dict[str, tuple[str, Strategy]], dict[str, str]]  # what a row shows, its columns, its own words


def spreads() -> tuple[np.ndarray, np.ndarray, str]:
    """Measured block times, mean 1: without stalls, with them; and the file they are from."""
    values, name = block_times.measured()
    whole = np.array(values)
    usual = whole[whole <= STALL]
    return usual / usual.mean(), whole / usual.mean(), name


def simulate(case: Case, strategy: Strategy, seeds: int) -> dict[str, Any]:
    """Median, least and greatest efficiency over the seeds, with and without starting up; seconds of the job; waste."""
    usual, whole, _ = spreads()
    found: list[tuple[Outcome, Draws]] = []
    for seed in range(seeds):
        draws = Draws(case.cluster, case.blocks, case.seconds, whole if case.stalls else usual, seed)
        found.append((run_stripes(draws) if strategy.what == "stripes" else Job(draws, strategy).run(), draws))
    efficiency = [outcome.efficiency(draws) for outcome, draws in found]
    started = [outcome.efficiency(draws, START_UP) for outcome, draws in found]
    return {
        **{key: round(value, 4) for key, value in harness.spread(efficiency).items()},
        "with_start_up": round(statistics.median(started), 4),
        "seconds": round(statistics.median(outcome.makespan for outcome, _ in found), 1),
        "wasted": round(statistics.median(outcome.wasted / draws.work for outcome, draws in found), 5),
        "exit_later": round(statistics.median(outcome.last_exit - outcome.makespan for outcome, _ in found), 1),
        "doubled": statistics.median(outcome.doubled for outcome, _ in found),
    }


def row(case: Case, columns: dict[str, tuple[str, Strategy]], more: dict[str, str], seeds: int) -> dict[str, Any]:
    """One row of a table."""
    made: dict[str, Any] = {"model": case.model, "images": case.images, "gpus": case.cluster.gpus}
    made |= {
        "rows": case.size,
        "blocks": case.blocks,
        "blocks_a_gpu": round(case.blocks / case.cluster.gpus, 1),
        **more,
    }
    for name, (slow_of, strategy) in columns.items():
        cluster = replace(case.cluster, slow_of=slow_of)  # type: ignore[arg-type]
        made[name] = simulate(replace(case, cluster=cluster), strategy, seeds)
    return made


def jobs(quick: bool) -> Iterator[tuple[str, int, int]]:
    for model in MODELS:
        for images in (10**5,) if quick else (10**6, 10**7, 10**8):
            for gpus in (8,) if quick else (8, 64, 512):
                yield model, images, gpus


def block_size_cases(quick: bool) -> list[tuple[str, int, int]]:
    """(model, images, rows of a block) on 512 GPUs, from the default on."""
    if quick:
        return [("dinov3-7b@512", 10**5, 64)]
    asked = [("dinov3-7b@512", images, rows) for images in (10**6, 10**7) for rows in (256, 128, 64, 32, 16)]
    asked += [("dinov3-large@512", 10**8, rows) for rows in (256, 512, 1024, 2048, 4096)]
    return asked


def variants(quick: bool) -> list[Row]:
    """What single decisions are worth: one job, one thing changed at a time."""
    model, images, gpus = ("dinov3-7b@512", 10**5, 16) if quick else ("dinov3-7b@512", 10**7, 512)
    base = Cluster(gpus, slow_of="rank", **CONDITIONS["25 times slow"])
    far = replace(base, machine=1)
    tried: dict[str, tuple[Cluster, Strategy, bool]] = {
        "as it is": (base, TAKE_OVER, False),
        "no helping": (base, UNHELPED, False),
        "a helper's success is noticed after 5 s": (base, replace(TAKE_OVER, notice=5.0), False),
        "every rank on a machine of its own": (far, TAKE_OVER, False),
        "every rank on a machine of its own, no helping": (far, UNHELPED, False),
        "patience 30 s, every rank on a machine of its own": (replace(far, patience=30.0), TAKE_OVER, False),
        "thieves all take the last block of the longest stripe": (base, replace(TAKE_OVER, spread=False), False),
        "a look before every claim": (base, replace(TAKE_OVER, tries=1), False),
        "looking again every 30 s": (replace(base, poll=30.0), TAKE_OVER, False),
        "measured stalls of the CPU run left in": (base, TAKE_OVER, True),
    }
    return [
        (Case(model, images, cluster, rows=64, stalls=stalls), {"take-over": ("rank", strategy)}, {"change": name})
        for name, (cluster, strategy, stalls) in tried.items()
    ]


def planned(quick: bool) -> dict[str, list[Row]]:
    """Every table of the page, row by row, before anything runs."""
    found: dict[str, list[Row]] = {}
    for name, changes in CONDITIONS.items():
        found[name] = [
            (Case(model, images, Cluster(gpus, **changes)), COLUMNS, {})
            for model, images, gpus in jobs(quick)
            if name != "25 times slow" or gpus == 512 or quick
        ]
    pair = {"bad data": COLUMNS["bad data"], "bad moment": COLUMNS["bad moment"], "central": COLUMNS["central"]}
    cluster = Cluster(8 if quick else 512)
    sizes = block_size_cases(quick)
    found["block size"] = [(Case(model, images, cluster, rows=rows), pair, {}) for model, images, rows in sizes]
    found["variants"] = variants(quick)
    return found


def tables(options: Any) -> dict[str, list[dict[str, Any]]]:
    """Every table of the page, as rows."""
    work = planned(options.quick)
    with ProcessPoolExecutor(options.processes) as pool:
        running = {name: [pool.submit(row, *line, options.seeds) for line in lines] for name, lines in work.items()}
        return {name: [line.result() for line in lines] for name, lines in running.items()}


def percent(value: dict[str, Any]) -> str:
    return f"{100 * value['median']:.1f} ({100 * value['min']:.1f})"


def grid(heads: list[str], lines: list[list[str]]) -> str:
    made = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    return "\n".join(made + ["| " + " | ".join(line) + " |" for line in lines]) + "\n"


def job_cells(line: dict[str, Any]) -> list[str]:
    return [line["model"], f"{line['images']:.0e}".replace("e+0", "e"), str(line["gpus"]), f"{line['blocks_a_gpu']:g}"]


def verdict(lines: list[dict[str, Any]], column: str) -> str:
    """In how many rows the goal holds, and from how many blocks a GPU on in all of them."""
    held = [line for line in lines if line[column]["median"] >= GOAL]
    below = [line["blocks_a_gpu"] for line in lines if line[column]["median"] < GOAL]
    enough = [line["blocks_a_gpu"] for line in lines if not below or line["blocks_a_gpu"] > max(below)]
    always = f", in all with {min(enough):g} blocks a GPU or more" if enough else "; more blocks a GPU are no guarantee"
    return f"{column}: at least {100 * GOAL:.0f} % in {len(held)} of {len(lines)} jobs{always}"


def markdown(results: dict[str, Any]) -> str:
    """The tables of docs/scaling.md."""
    made = []
    for name in CONDITIONS:
        lines = results["tables"][name]
        heads = ["set", "images", "GPUs", "blocks a GPU", "seconds", *COLUMNS, "bad data, with starting up"]
        cells = [
            [*job_cells(line), f"{line['bad data']['seconds']:,.0f}", *(percent(line[column]) for column in COLUMNS)]
            + [f"{100 * line['bad data']['with_start_up']:.1f}"]
            for line in lines
        ]
        made.append(f"**{name[0].upper()}{name[1:]}**\n\n" + grid(heads, cells))
        made.append("\n".join(f"- {verdict(lines, column)}" for column in ("bad data", "bad moment", "central")) + "\n")
    lines = results["tables"]["block size"]
    heads = ["set", "images", "GPUs", "blocks a GPU", "rows of a block", "bad data", "bad moment", "central"]
    cells = [[*job_cells(line), str(line["rows"]), *(percent(line[column]) for column in heads[5:])] for line in lines]
    made.append("**Block size**\n\n" + grid(heads, cells))
    lines = results["tables"]["variants"]
    heads = ["changed", "efficiency", "GPU time computed in vain, %", "blocks done twice", "last rank free after, s"]
    cells = [
        [line["change"], percent(line["take-over"]), f"{100 * line['take-over']['wasted']:.2f}"]
        + [f"{line['take-over']['doubled']:g}", f"{line['take-over']['exit_later']:g}"]
        for line in lines
    ]
    made.append("**One thing changed**\n\n" + grid(heads, cells))
    return "\n".join(made)


def newest() -> dict[str, Any]:
    """Results of the newest full run."""
    for path in sorted(block_times.RESULTS.glob(f"{STAGE}-*.json"), reverse=True):
        record = json.loads(path.read_text())
        if not record["quick"]:
            results: dict[str, Any] = record["results"]
            return results
    raise FileNotFoundError(f"no full result of {STAGE} in {block_times.RESULTS}; run this with --output first")


def main() -> None:
    made = harness.parser(__doc__)
    made.add_argument("--seeds", type=int, default=5, help="runs of every job, each with other chances")
    made.add_argument("--processes", type=int, default=1, help="rows that are simulated at once; results do not change")
    made.add_argument("--markdown", action="store_true", help="print the tables of the newest full result and stop")
    options = made.parse_args()
    if options.markdown:
        print(markdown(newest()))
        return
    options.seeds = min(options.seeds, 2) if options.quick else options.seeds
    assumed = {"models": MODELS, "start_up": START_UP, "seeds": options.seeds, "block_times": spreads()[2]}
    assumed |= {"cluster": asdict(Cluster(8)), "conditions": CONDITIONS, "rates": "estimated, not measured"}
    harness.report(STAGE, options, {"assumed": assumed, "tables": tables(options)})


if __name__ == "__main__":
    main()
