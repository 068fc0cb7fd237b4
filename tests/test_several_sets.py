"""Several backbones and sizes in one pass: images are decoded once, every set is as if it had been made alone."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pictures import register_pictures, sets_of

from featstore.configs import RunConfig, SetConfig, each_set
from featstore.errors import ConfigError, StoreError
from featstore.extraction.lane import Lane
from featstore.extraction.passes import Pass, in_step
from featstore.extraction.pipeline import extract, extract_sets
from featstore.extraction.plan import Plan, make_plan
from featstore.extraction.prepare import prepare
from featstore.store.catalog import Store

RUN = RunConfig(device="cpu", batch_size=8)
CONFIGS = (
    SetConfig(model="tiny", res="42", block_rows=16),
    SetConfig(model="tiny", res="98", block_rows=8, tokens="cls,patches"),
    SetConfig(model="tiny", res="42", block_rows=32, intensity="minmax", name="bright"),
    SetConfig(model="tiny", res="42", block_rows=16, name="layers", layers="1"),
)


def plans(store: Path, configs: tuple[SetConfig, ...] = CONFIGS, run: RunConfig = RUN) -> list[Plan]:
    return [make_plan(Store(store), "pics", config, run) for config in configs]


def register_twice(store: Path, root: Path) -> None:
    register_pictures(store, root / "data", 45)
    shutil.copytree(store, root / "alone")


def alone(store: Path, configs: tuple[SetConfig, ...] = CONFIGS, run: RunConfig = RUN) -> dict[str, dict[str, bytes]]:
    for config in configs:
        extract(make_plan(Store(store), "pics", config, run), run)
    return sets_of(store)


@pytest.mark.parametrize("batch_size", [pytest.param(8, marks=pytest.mark.slow), 5])
def test_one_pass_gives_the_sets_that_each_alone_gives(
    tmp_path: Path, store_path: Path, decoded: list[str], batch_size: int
) -> None:
    run = RunConfig(device="cpu", batch_size=batch_size)
    register_twice(store_path, tmp_path)
    expected = alone(tmp_path / "alone", run=run)
    assert len(decoded) == 4 * 45
    decoded.clear()
    summaries = extract_sets(plans(store_path, run=run), run)
    assert [(summary.computed, summary.failed) for summary in summaries] == [(45, 0)] * 4
    assert [summary.blocks for summary in summaries] == [3, 6, 2, 3]
    assert len(decoded) == len(set(decoded)) == 45
    assert sets_of(store_path) == expected
    assert all(item["summary"]["how"]["sets_in_pass"] == 4 for item in runs(store_path))


def runs(store: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in store.glob("sets/pics/*/runs/*.json")]


def test_what_is_complete_is_left_out_and_what_is_begun_goes_on(
    tmp_path: Path, store_path: Path, decoded: list[str]
) -> None:
    register_twice(store_path, tmp_path)
    expected = alone(tmp_path / "alone")
    extract(plans(store_path)[0], RUN)

    def stop(images: int, failed: int, seen: list[int] = []) -> None:  # noqa: B006
        seen.append(images)
        if sum(seen) > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(plans(store_path)[1], RUN, advance=stop)
    decoded.clear()
    summaries = extract_sets(plans(store_path), RUN)
    assert [summary.computed for summary in summaries] == [0, 21, 45, 45]
    # The guard decodes two committed rows of the set that goes on; all others are read once.
    assert len(decoded) == 45 + 2
    assert sets_of(store_path) == expected


def test_sets_whose_rows_differ_take_a_pass_each(tmp_path: Path, store_path: Path) -> None:
    register_pictures(store_path, tmp_path / "data", 20)
    extract(plans(store_path)[0], RUN)
    register_pictures(store_path, tmp_path / "data", 45)
    made = plans(store_path)
    for plan in made:
        prepare(plan)
    lanes = [Lane(plan, RUN, "cpu", plan.source.load(device="cpu", compute_dtype="float32")) for plan in made]
    # The first set's new rows begin with a block of their own, behind a gap that the others do not have.
    assert [len(group) for group in in_step(lanes)] == [1, 3]
    assert [summary.computed for summary in extract_sets(made, RUN)] == [25, 45, 45, 45]


def test_units_are_as_long_as_the_largest_block(tmp_path: Path, store_path: Path) -> None:
    register_pictures(store_path, tmp_path / "data", 45)
    made = plans(store_path)
    for plan in made:
        prepare(plan)
    network = made[0].source.load(device="cpu", compute_dtype="float32")
    work = Pass([Lane(plan, RUN, "cpu", network) for plan in made], RUN)
    assert (work.rows, list(work.units)) == (32, [0, 1])
    assert [tally.total for tally in work.tallies()] == [45] * 4
    assert len(work.specs) == 3  # two sets share their pixels
    jobs = work.jobs(0)
    assert {(job.lane, job.block) for job in jobs} == {
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
        (1, 2),
        (1, 3),
        (2, 0),
        (3, 0),
        (3, 1),
    }
    for lane in range(4):
        assert [row for job in jobs if job.lane == lane for row in job.rows] == list(range(32))
    lasts = [max(job.rows) for job in jobs]
    assert lasts == sorted(lasts)  # the sets take turns, so that few images wait
    assert work.left() == [0, 1]


def test_a_decoded_cache_serves_all_sets(tmp_path: Path, store_path: Path, decoded: list[str]) -> None:
    register_twice(store_path, tmp_path)
    expected = alone(tmp_path / "alone")
    decoded.clear()
    run = RunConfig(device="cpu", batch_size=8, decoded_cache=True)
    extract_sets(plans(store_path, run=run), run)
    assert len(decoded) == 3 * 45  # once for each kind of pixels
    found = sets_of(store_path)
    assert {name: found[name] for name in expected} == expected


@pytest.mark.slow
def test_the_command_takes_lists(tmp_path: Path, store_path: Path) -> None:
    register_pictures(store_path, tmp_path / "data", 20)
    log = tmp_path / "log.jsonl"
    arguments = ["extract", "--model", "tiny", "--res", "42, 98", "--device", "cpu", "--log-json", str(log)]
    done = subprocess.run([sys.executable, "-m", "featstore", *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for name in ("tiny@42", "tiny@98"):
        assert f"pics/{name}: 20 computed" in done.stdout
        assert not Store(store_path)["pics", name].pending().any()
    assert re.search(
        r"40/40, .* images/s; decode \S+/s, device \S+/s, write \S+/s \((decode|device|write) limits\)", done.stderr
    )
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["event"] for line in lines[:1] + lines[-3:]] == ["start", "progress", "result", "result"]
    assert (lines[-3]["done"], lines[-3]["total"], lines[-3]["eta_seconds"]) == (40, 40, 0.0)
    assert lines[-3]["stages"]["limiting"] in ("decode", "device", "write")
    assert [line["set"] for line in lines[-2:]] == ["pics/tiny@42", "pics/tiny@98"]


def test_every_model_at_every_size() -> None:
    found = each_set(SetConfig(model="tiny,dinov2-small", res="224, 512x384", tokens="cls"))
    assert [(each.model, each.res, each.tokens) for each in found] == [
        ("tiny", "224", "cls"),
        ("tiny", "512x384", "cls"),
        ("dinov2-small", "224", "cls"),
        ("dinov2-small", "512x384", "cls"),
    ]
    assert each_set(SetConfig(model="tiny")) == [SetConfig(model="tiny")]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"model": "tiny,tiny"}, r"--model tiny,tiny: an item is empty or stands there twice"),
        ({"model": "tiny,"}, r"--model tiny,: an item is empty"),
        ({"model": "tiny", "res": "224,"}, r"--res 224,: an item is empty"),
        ({"model": "a,b", "name": "x"}, r"--name belongs to one model, and --model names 2; run that model by itself"),
        ({"model": "a,b", "weights": Path("w"), "revision": "r"}, r"--weights, --revision belongs to one model"),
    ],
)
def test_lists_that_cannot_be(options: dict[str, Any], error: str) -> None:
    with pytest.raises(ConfigError, match=re.compile(error)):
        each_set(SetConfig(**options))


def command(store: Path, *more: str) -> "subprocess.CompletedProcess[str]":
    arguments = ["extract", "--device", "cpu", "--batch-size", "8", "--store", str(store), *more]
    return subprocess.run([sys.executable, "-m", "featstore", *arguments], capture_output=True, text=True, timeout=300)


def test_one_set_of_a_pass_that_cannot_be_leaves_the_others_together(
    tmp_path: Path, store_path: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from cli import running
    from featstore.extraction import pipeline

    register_pictures(store_path, tmp_path / "data", 20)
    real = pipeline.create_set

    def refused(plan: Plan, *more: Any) -> Any:
        if plan.name == "pics/tiny@98":
            raise ConfigError("its precision is not good enough")
        return real(plan, *more)

    monkeypatch.setattr(pipeline, "create_set", refused)
    found = running.run_plans(plans(store_path), RUN, quiet=True)
    assert [item.get("error") for item in found] == [None, "its precision is not good enough", None, None]
    assert len(decoded) == 20  # the three others share a pass
    with pytest.raises(ConfigError, match=r"1 of 4 sets failed, the others are done: pics/tiny@98: its precision is"):
        running.raise_errors(found)
    with pytest.raises(ConfigError, match=r"1 of 1 sets failed: pics/tiny@98"):
        running.raise_errors(found[1:2])


def test_networks_that_do_not_fit_together_run_one_after_the_other(
    tmp_path: Path, store_path: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from cli import running
    from featstore.errors import DeviceError

    register_pictures(store_path, tmp_path / "data", 20)
    real = running._Backbones.get
    held: list[int] = []

    def full(backbones: Any, number: int, *, alone: bool) -> Any:
        held.append(number)
        if not alone and len(held) > 1:
            raise DeviceError("no memory for a second network")
        return real(backbones, number, alone=alone)

    monkeypatch.setattr(running._Backbones, "get", full)
    found = running.run_plans(plans(store_path), RUN, quiet=True)
    assert [(item["samples"], item.get("error")) for item in found] == [(20, None)] * 4
    assert len(decoded) == 4 * 20


def test_networks_of_one_pass_fit_the_memory(tmp_path: Path, store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cli import running

    register_pictures(store_path, tmp_path / "data", 20)
    others = [SetConfig(model="tiny", res="42", random_weights=seed, name=f"seed{seed}") for seed in range(4)]
    made = plans(store_path, tuple(others))
    size = running._network_bytes(made[0])
    assert size == 4 * made[0].source.architecture.num_parameters()
    for room, groups in ((10 * size, [[0, 1, 2, 3]]), (4 * size, [[0, 1], [2, 3]]), (0, [[0], [1], [2], [3]])):
        monkeypatch.setattr(running, "_free_memory", lambda _, room=room: room)
        runs = running._Runs(made, RUN, running.make_stop(RUN), None, quiet=True)
        assert runs._groups() == groups
    # Sets of one network share it.
    runs = running._Runs(plans(store_path), RUN, running.make_stop(RUN), None, quiet=True)
    assert runs._groups() == [[0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("none/log.jsonl", r"--log-json none/log.jsonl: No such file or directory; name a file that can be written"),
        ("/dev/full", r"--log-json /dev/full: No space left on device; name a file that can be written"),
    ],
)
def test_a_log_that_cannot_be_written_is_said_before_anything_is_done(
    tmp_path: Path, store_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, error: str
) -> None:
    from cli import running

    monkeypatch.chdir(tmp_path)
    register_pictures(store_path, tmp_path / "data", 20)
    run = RunConfig(device="cpu", log_json=Path(place))
    with pytest.raises(StoreError, match=error):
        running.run_plans(plans(store_path), run, quiet=True)
    assert not (store_path / "sets").exists()
    with pytest.raises(ConfigError, match=r"--log-json takes the name of a file; - is not one"):
        RunConfig(log_json=Path("-"))


@pytest.mark.slow
def test_the_first_rank_says_what_stands_of_the_whole_set(tmp_path: Path, store_path: Path) -> None:
    register_pictures(store_path, tmp_path / "data", 45)
    (tmp_path / "data/images/00040.png").write_bytes(b"broken")
    from pictures import CONFIG as REGISTERED

    from featstore.register import register

    register(store_path, "pics", tmp_path / "data", REGISTERED)
    options = ["--model", "tiny", "--res", "42", "--block-rows", "16", "--rank", "0", "--world", "2"]
    done = command(store_path, *options, "--json")
    assert done.returncode == 0, done.stderr
    [found] = json.loads(done.stdout)
    assert {key: found[key] for key in ("rank", "world", "set_rows", "set_failed")} == {
        "rank": 0,
        "world": 2,
        "set_rows": 45,
        "set_failed": 1,
    }
