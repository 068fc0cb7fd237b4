"""`featstore plan`: bytes and files against the folder that an extraction leaves, rates, what is kept and compared."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from click.testing import Result
from pictures import CONFIG, register_pictures, write_pictures, write_table
from typer.testing import CliRunner

from cli import plan as plan_command
from cli.main import guarded
from featstore.configs import RunConfig, SetConfig
from featstore.errors import ConfigError, MissingWeightsError, UnknownNameError
from featstore.extraction import footprint, prediction
from featstore.extraction.batching import default_batch_size
from featstore.extraction.footprint import Footprint, Outlook, look_ahead, measure_folder
from featstore.extraction.forecast import Rates, forecast
from featstore.extraction.gpus import GPUS, find_gpu, gpu_batch_size
from featstore.extraction.pipeline import extract, extract_sets
from featstore.extraction.plan import Plan, make_plan
from featstore.extraction.probing import draw_rows
from featstore.register import register
from featstore.store.catalog import Store

RUN = RunConfig(device="cpu", workers=2)


def plan_of(store: Path, run: RunConfig = RUN, **settings: Any) -> Plan:
    return make_plan(Store(store), "pics", SetConfig(model="tiny", res="42", **settings), run)


def check(plan: Plan, run: RunConfig = RUN) -> Outlook:
    """Files, folders and bytes foretold and found; both of the whole set and of what the run adds."""
    before = measure_folder(plan.folder) if plan.folder.exists() else Footprint()
    outlook = look_ahead(plan, run)
    extract(plan, run)
    after = measure_folder(plan.folder)
    assert (outlook.final.files, outlook.final.folders) == (after.files, after.folders)
    assert (outlook.added.files, outlook.added.folders) == (after.files - before.files, after.folders - before.folders)
    # Runs write about themselves, at a length that nobody knows before.
    slack = 4000 * (plan.todo.size > 0)
    assert outlook.final.bytes == pytest.approx(after.bytes, rel=0.002, abs=slack)
    assert outlook.added.bytes == pytest.approx(after.bytes - before.bytes, rel=0.002, abs=slack)
    return outlook


@pytest.mark.parametrize(
    ("count", "settings"),
    [
        (1, {}),
        (37, {"tokens": "cls,mean_patch,registers,patches", "layers": "1,-1", "block_rows": 8}),
        (40, {"tokens": "cls,patches", "dtype": "float32", "block_rows": 16}),
        (33, {"tokens": "patches", "reduce": "pool2", "block_rows": 32}),
        (40, {"tokens": "cls,patches", "reduce": "pool2,pca:16,int8"}),
        (20, {"compute_dtype": "bfloat16", "dtype": "bfloat16"}),
    ],
)
def test_a_new_set_takes_what_was_foretold(
    store_path: Path, tmp_path: Path, count: int, settings: dict[str, Any]
) -> None:
    register_pictures(store_path, tmp_path / "data", count)
    outlook = check(plan_of(store_path, **settings))
    assert outlook.rows_here == count
    assert look_ahead(plan_of(store_path, **settings), RUN).todo == {}


def test_a_set_that_grows_and_gains_arrays_takes_what_was_foretold(store_path: Path, tmp_path: Path) -> None:
    register_pictures(store_path, tmp_path / "data", 21)
    check(plan_of(store_path, block_rows=8))
    check(plan_of(store_path, tokens="cls,patches", layers="2"))
    again = check(plan_of(store_path, tokens="cls,patches", layers="2"))
    assert again.added == Footprint()
    write_table(tmp_path / "data", write_pictures(tmp_path / "data", 30))
    register(store_path, "pics", tmp_path / "data", CONFIG)
    grown = check(plan_of(store_path, tokens="cls,patches", layers="2"))
    assert grown.rows_here == 9


def test_a_run_that_was_stopped_leaves_the_rest_to_foretell(store_path: Path, tmp_path: Path) -> None:
    register_pictures(store_path, tmp_path / "data", 40)
    plan = plan_of(store_path, tokens="cls,patches", block_rows=8)
    done = 0

    class Stopped(Exception):
        pass

    def stop(images: int, failed: int) -> None:
        nonlocal done
        done += images
        if done >= 20:
            raise Stopped

    with pytest.raises(Stopped):
        extract(plan, RunConfig(device="cpu", batch_size=4), advance=stop)
    rest = plan_of(store_path, tokens="cls,patches")
    assert 0 < len(rest.todo) < 40
    check(rest)


def test_failed_rows_are_counted_and_tried_again(store_path: Path, tmp_path: Path) -> None:
    names = write_pictures(tmp_path / "data", 12)
    (tmp_path / "data" / names[3]).write_bytes(b"no picture")
    write_table(tmp_path / "data", names)
    register(store_path, "pics", tmp_path / "data", CONFIG)
    check(plan_of(store_path, block_rows=4))
    outlook = look_ahead(plan_of(store_path), RUN)
    assert (outlook.failed, outlook.todo) == (1, {})
    again = RunConfig(device="cpu", retry_failed=True)
    outlook = look_ahead(plan_of(store_path, again), again)
    assert list(outlook.todo) == [0]
    assert outlook.rows_here == 4


def test_compact_copies_are_foretold(store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from featstore.extraction import pipeline

    register_pictures(store_path, tmp_path / "data", 30)
    monkeypatch.setattr(footprint, "COMPACT_BYTES", 1)
    monkeypatch.setattr(pipeline, "COMPACT_BYTES", 1)
    outlook = check(plan_of(store_path, block_rows=4))
    assert (outlook.book.num_rows, (plan_of(store_path).folder / "compact.zarr" / "cls").is_dir()) == (30, True)


def runs_of(plan: Plan) -> list[dict[str, Any]]:
    return [json.loads(path.read_bytes()) for path in (plan.folder / "runs").glob("*.json")]


def check_record(plan: Plan, record: dict[str, Any]) -> None:
    """What the record says of files and bytes is what stands there, itself included, and what was foretold."""
    found, size = record["comparison"], measure_folder(plan.folder)
    assert found["files"] == {"predicted": size.files, "actual": size.files, "error": 0.0}
    assert found["bytes"]["actual"] == pytest.approx(size.bytes, abs=4)
    assert found["bytes"]["predicted"] == record["prediction"]["bytes"]


def run_command(*arguments: str, code: int = 0) -> Result:
    app = typer.Typer()
    app.command("plan")(guarded(plan_command.plan))
    done = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    assert done.exit_code == code, done.output
    return done


def test_the_command_says_everything_and_writes_nothing_to_the_set(store_path: Path, tmp_path: Path) -> None:
    register_pictures(store_path, tmp_path / "data", 24)
    common = ("--dataset", "pics", "--model", "tiny", "--res", "42", "--device", "cpu", "--probe", "0.2")
    output = run_command(*common, "--block-rows", "8").output
    for words in (
        "24 to do, 0 of 24 done",
        "cls 9.22 kB, mean_patch 9.22 kB, registers",
        "each of --layers 18.4 kB",
        "CPU-seconds",
        "blocks      3 of up to 8 rows",
        "limits; what would move it",
        "inodes free in",
    ):
        assert words in output
    assert not (store_path / "sets").exists()
    plan = plan_of(store_path, block_rows=8)
    held = prediction.held_prediction(plan)
    assert held is not None
    assert held["kind"] == "measured"
    assert held["bytes"] == look_ahead(plan, RunConfig(device="cpu")).final.bytes
    summary = extract(plan, RUN)
    assert summary.comparison.startswith("took ")
    assert "plan said" in summary.comparison
    (record,) = runs_of(plan)
    assert record["prediction"] == held
    assert record["comparison_of"] == "the set"
    check_record(plan, record)
    assert prediction.held_prediction(plan_of(store_path)) is None  # other work: nothing is missing any more
    said = json.loads(run_command(*common, "--json").stdout)
    assert (said["sets"][0]["todo"], said["sets"][0]["done"], said["total"]["bytes"]) == (0, 24, 0)


def test_sets_of_one_pass_pay_for_decoding_once(store_path: Path, tmp_path: Path) -> None:
    register_pictures(store_path, tmp_path / "data", 16)
    said = json.loads(
        run_command("--model", "tiny", "--res", "42,56", "--device", "cpu", "--probe", "0.2", "--json").stdout
    )
    first, second = (item["forecast"] for item in said["sets"])
    assert first["cpu_seconds"]["decode"] > 0
    assert (second["cpu_seconds"]["decode"], second["decoding_shared"]) == (0, True)
    assert second["cpu_seconds"]["start-up"] < first["cpu_seconds"]["start-up"]
    assert said["total"]["wall_seconds"] == pytest.approx(first["wall_seconds"] + second["wall_seconds"], abs=0.01)


def test_sets_of_one_pass_are_compared_once(store_path: Path, tmp_path: Path) -> None:
    register_pictures(store_path, tmp_path / "data", 16)
    both = ("--model", "tiny", "--res", "42,56", "--device", "cpu", "--probe", "0.2", "--json")
    said = json.loads(run_command(*both).stdout)
    plans = [make_plan(Store(store_path), "pics", SetConfig(model="tiny", res=res), RUN) for res in ("42", "56")]
    held = [prediction.held_prediction(plan) for plan in plans]
    first, second = (item for item in held if item is not None)
    # Each by itself pays for all; together decoding and imports count once, as the plan's total does.
    assert second["cpu_seconds_by_stage"]["decode"] > 0
    together = prediction.of_pass([first, second])
    assert together["wall_seconds"] == pytest.approx(said["total"]["wall_seconds"], abs=0.01)
    assert together["cpu_seconds"] == pytest.approx(said["total"]["cpu_seconds"], abs=0.01)
    assert together["wall_seconds"] < first["wall_seconds"] + second["wall_seconds"] - prediction.START_WALL / 2
    later = prediction.of_pass([first, second], imports=False)
    assert together["cpu_seconds"] - later["cpu_seconds"] == pytest.approx(first["imports_seconds"]["cpu"], abs=0.01)
    assert prediction.of_pass([first]) == {name: first[name] for name in prediction.of_pass([first])}

    summaries = extract_sets(plans, RUN)
    lines = [summary.comparison for summary in summaries if "plan said" in summary.comparison]
    assert [line.startswith("a pass of 2 sets took ") for line in lines] == [True]
    records = [record for plan in plans for record in runs_of(plan)]
    assert [record["comparison_of"] for record in records] == ["a pass of 2 sets"] * 2
    for name in ("wall_seconds", "cpu_seconds", "peak_memory_bytes"):
        assert records[0]["comparison"][name] == records[1]["comparison"][name]
        assert records[0]["comparison"][name]["predicted"] == pytest.approx(later[name], abs=0.01)
    for plan, record in zip(plans, records, strict=True):
        check_record(plan, record)


def test_the_record_of_a_run_nobody_planned_is_whole_too(store_path: Path, tmp_path: Path) -> None:
    register_pictures(store_path, tmp_path / "data", 200)
    plan = plan_of(store_path, tokens="cls,patches", block_rows=64)
    extract(plan, RUN)
    (record,) = runs_of(plan)
    check_record(plan, record)
    assert set(record["comparison"]) == {"wall_seconds", "cpu_seconds", "bytes", "files"}
    assert abs(record["comparison"]["bytes"]["error"]) < 0.02


def test_a_named_card_needs_no_weights_and_no_network(
    store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    from featstore.backbones import hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("is_reachable", "download"):
        monkeypatch.setattr(hub, name, lambda *_: pytest.fail("the hub is asked"))
    register_pictures(store_path, tmp_path / "data", 40)
    asked = ("--res", "224", "--gpu", "h200", "--gpus", "8", "--json")
    for model in ("dinov3-7b", "uni", "resnet50", "hf:facebook/dinov2-base"):
        found = json.loads(run_command("--model", model, *asked).stdout)["sets"][0]
        assert (found["todo"], found["weights_at_hand"]) == (40, False)
        assert any(line.startswith("weights: not at hand") for line in found["forecast"]["notes"])
    known = json.loads(run_command("--model", "dinov3-7b", "--random-weights", "0", *asked).stdout)["sets"][0]
    unknown = json.loads(run_command("--model", "dinov3-7b", *asked).stdout)["sets"][0]
    assert known["weights_at_hand"]
    assert known["forecast"]["stage_seconds"] == unknown["forecast"]["stage_seconds"]
    assert known["bytes"]["added"] == pytest.approx(unknown["bytes"]["added"], abs=1000)
    # Sets of weights that are at hand are looked up.
    extract(plan_of(store_path), RUN)
    assert json.loads(run_command("--model", "tiny", "--res", "42", *asked[2:]).stdout)["sets"][0]["todo"] == 0


def test_facts_without_weights_load_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    from featstore.backbones import BACKBONES, describe_facts

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in BACKBONES:
        source = describe_facts(name)
        assert source.known == name.startswith("tiny")
        assert (source.listed, source.random) == (name, name == "tiny-random")
    with pytest.raises(MissingWeightsError, match="weights of facebook/dinov2-base must be at hand"):
        describe_facts("dinov2-base").load(device="cpu", compute_dtype="float32")
    with pytest.raises(UnknownNameError, match="did you mean dinov2-base"):
        describe_facts("dinov2-bas")
    with pytest.raises(ConfigError, match="neither a folder on this machine nor a hub id"):
        describe_facts("hf:dinov2-base")


def test_cores_of_another_machine_are_those_asked_for(store_path: Path, tmp_path: Path) -> None:
    register_pictures(store_path, tmp_path / "data", 40)
    common = ("--model", "dinov2-base", "--random-weights", "0", "--res", "224", "--gpu", "l4")
    one, many = (
        json.loads(run_command(*common, "--workers", count, "--json").stdout)["sets"][0] for count in ("1", "64")
    )
    assert (one["workers"], many["workers"]) == (1, 64)
    seconds = [item["forecast"]["stage_seconds"]["decode"] for item in (one, many)]
    assert seconds[0] == pytest.approx(64 * seconds[1], abs=0.04)
    assert one["forecast"]["cpu_seconds"]["decode"] == many["forecast"]["cpu_seconds"]["decode"]
    assert "decoding and CPU: 64 cores (--workers)" in run_command(*common, "--workers", "64").output
    assert "(as this machine has, --workers N for another)" in run_command(*common).output


def test_gpus_take_whole_blocks(store_path: Path, tmp_path: Path) -> None:
    register_pictures(store_path, tmp_path / "data", 40)
    plan = plan_of(store_path, block_rows=8)
    outlook = look_ahead(plan, RUN)

    def seconds(gpus: int) -> float:
        return forecast(plan, outlook, rates(pass_wall=1.0), device="h200", cores=64, gpus=gpus).stages["device"]

    # Five blocks, a batch each, and one to try the shape.
    assert [seconds(gpus) for gpus in (1, 2, 3, 5, 8)] == pytest.approx([6, 4, 3, 2, 2])
    made = forecast(plan, outlook, rates(pass_wall=1.0), device="h200", cores=64, gpus=8)
    assert made.advice[0] == "5 blocks for 8 GPUs, of which the others do nothing: --block-rows 4"
    made = forecast(plan, outlook, rates(pass_wall=1.0), device="h200", cores=64, gpus=64)
    assert made.advice[0].endswith("there are fewer images than GPUs")
    made = forecast(plan, outlook, rates(pass_wall=1.0), device="h200", cores=64, gpus=5)
    assert not any("for 5 GPUs" in line for line in made.advice)


def test_a_named_card_is_modelled_and_nothing_is_kept(store_path: Path, tmp_path: Path) -> None:
    register_pictures(store_path, tmp_path / "data", 16)
    common = ("--model", "dinov3-7b", "--random-weights", "0", "--res", "224", "--gpu")
    said = json.loads(run_command(*common, "h200", "--json").stdout)["sets"][0]
    made = said["forecast"]
    assert made["measured"] == []
    # 13.4 GB of weights; 2,726 GFLOP an image; 790 TFLOP/s; the ceiling for a width of 4096 is 0.89.
    assert made["notes"][0].startswith("decoding and CPU: ")
    assert 14e9 < made["device_memory_bytes"] < 20e9
    gpu = find_gpu("H200")
    seconds = gpu.seconds(2726.0, 4096, "bfloat16", fused=True)
    assert seconds == pytest.approx(2.726 / (790 * 0.85) / 0.9, rel=0.03)
    passes = made["passes"] + 1
    assert made["stage_seconds"]["device"] == pytest.approx(passes * made["batch_size"] * seconds, rel=0.01)
    assert not (store_path / "cache" / "plans").exists()
    assert "do not fit the 16 GB of one card" in run_command(*common, "t4").output


def test_no_torch_for_a_named_card(store_path: Path, tmp_path: Path) -> None:
    import subprocess

    register_pictures(store_path, tmp_path / "data", 4)
    script = (
        "import sys; from cli.plan import plan; from cli.main import guarded; import typer\n"
        "app = typer.Typer(); app.command('plan')(guarded(plan))\n"
        "try: app(['--model', 'dinov3-base', '--gpu', 'l4'])\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'transformers', 'pandas'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpu", "h2000"), "unknown GPU 'h2000'; did you mean h200"),
        (("--gpus", "2"), "--gpus counts the cards of --gpu, at least 1; got 2 without --gpu"),
        (("--rank", "5", "--world", "3"), "below the number of processes; got rank 5 of 3"),
        (("--rank", "5"), "--rank and --world belong together"),
        (("--world", "0"), "got rank 0 of 0"),
        (("--probe", "-1"), "--probe is between 0 and 600 seconds, got -1"),
        (("--probe", "0"), "--probe 0 measures nothing; name the machine instead"),
    ],
)
def test_wrong_options(store_path: Path, arguments: tuple[str, ...], message: str) -> None:
    assert message in run_command("--model", "tiny", *arguments, code=2).output


def test_cards_are_found_however_they_are_spelled() -> None:
    for name, gpu in GPUS.items():
        assert find_gpu(name.upper().replace("-", " ")) is gpu
    assert find_gpu("4090").name == "rtx-4090"
    with pytest.raises(UnknownNameError, match="known: a10, a100"):
        find_gpu("voodoo")
    # Published (timm) shares of 165 TFLOP/s at 256 pixels, compiled: S .42, B .58, L .66, H+ .75.
    for width, published in ((384, 0.42), (768, 0.58), (1024, 0.66), (1280, 0.75)):
        assert find_gpu("rtx-4090").share(width, "bfloat16", fused=True) == pytest.approx(published, abs=0.05)


@pytest.mark.parametrize("tokens", [10, 257, 1370, 70000])
@pytest.mark.parametrize("budget", [None, 4096])
def test_batches_of_a_card_are_those_of_the_run(tokens: int, budget: int | None) -> None:
    assert gpu_batch_size(tokens, asked=None, budget=budget, block_rows=1 << 20) == default_batch_size(
        tokens, "cuda", budget=budget
    )
    assert gpu_batch_size(tokens, asked=7, budget=budget, block_rows=4) == 4


def rates(**changes: float) -> Rates:
    zero = dict.fromkeys(
        ("image_cpu", "image_wall", "pass_cpu", "pass_wall", "byte_cpu", "byte_wall", "file_cpu", "file_wall"), 0.0
    )
    return Rates(batch_size=8, start_cpu=3.0, start_wall=2.0, **{**zero, **changes})  # type: ignore[arg-type]


def test_the_longest_stage_or_the_cores_decide(store_path: Path, tmp_path: Path) -> None:
    register_pictures(store_path, tmp_path / "data", 20)
    plan = plan_of(store_path, block_rows=8)
    outlook = look_ahead(plan, RUN)
    assert outlook.passes(8) == 3
    assert outlook.passes(3) == 3 + 3 + 2
    made = forecast(plan, outlook, rates(image_wall=0.5, image_cpu=1.0, pass_wall=1.0), device="cpu", cores=2)
    assert (made.limiting, made.wall, made.cpu_seconds) == ("decode", 2 + 20 * 0.5, 3 + 20)
    assert any("--decoded-cache" in line for line in made.advice)
    made = forecast(plan, outlook, rates(image_wall=0.1, pass_wall=5.0, pass_cpu=10.0), device="cpu", cores=1)
    assert (made.limiting, made.wall) == ("device", 2 + 30)  # three passes of ten seconds on one core
    assert made.of_world(2) == 2 + 30 * 2 / 3
    assert any("bfloat16" in line for line in made.advice)
    made = forecast(plan, outlook, rates(byte_wall=1.0), device="cpu", cores=2)
    assert made.limiting == "write"
    assert any("--tokens" in line for line in made.advice)


def test_images_are_drawn_over_all_sizes_and_always_the_same(store_path: Path, tmp_path: Path) -> None:
    for size in (16, 64):
        write_pictures(tmp_path / "data" / str(size), 30, size=size)
    manifest, _ = register(store_path, "sizes", tmp_path / "data", CONFIG.__class__())
    import numpy as np

    rows = np.arange(60)
    drawn = draw_rows(manifest, rows, 20)
    assert drawn == draw_rows(manifest, rows, 20)
    assert len(set(drawn)) == 20
    assert sum("64/" in manifest.column("path")[row] for row in drawn) == 10
    assert sorted(draw_rows(manifest, rows, 100)) == list(range(60))


def test_predictions_survive_a_store_that_cannot_be_written(
    store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prediction.files, "user_cache", lambda: tmp_path / "mine")
    register_pictures(store_path, tmp_path / "data", 6)
    plan = plan_of(store_path)
    said = prediction.cheap_prediction(plan, RUN, device="cpu", forward=2.0)
    assert "peak_memory_bytes" not in said, "nothing is known of it"
    assert (said["kind"], said["bytes"]) == ("model", look_ahead(plan, RUN).final.bytes)
    shutil.rmtree(store_path / "cache", ignore_errors=True)
    (store_path / "cache").write_text("a file where a folder would be")
    place = prediction.keep(plan, said)
    assert place is not None
    assert (tmp_path / "mine") in Path(str(place)).parents
    assert prediction.held_prediction(plan) == said
    Path(str(place)).write_text("{}")
    assert prediction.held_prediction(plan) is None


def test_a_comparison_states_relative_errors() -> None:
    said = {"kind": "measured", "wall_seconds": 38.0, "cpu_seconds": 50.0, "bytes": 100, "files": 3}
    found = prediction.compare(said, {"wall_seconds": 41.0, "cpu_seconds": 40.0, "bytes": 100, "files": 4})
    assert found["wall_seconds"]["error"] == pytest.approx(38 / 41 - 1, abs=1e-4)
    assert (found["cpu_seconds"]["error"], found["bytes"]["error"], found["files"]["error"]) == (0.25, 0.0, -0.25)
    line = prediction.comparison_line(said, found)
    assert line == "took 41 s, plan said 38 s (-7 %); 40 CPU-seconds, said 50 (+25 %); bytes (+0 %)"
    assert prediction.comparison_line({**said, "kind": "model"}, found).startswith("took 41 s, FLOP alone said 38 s")


def test_a_network_too_large_to_load_is_tried_with_two_blocks(
    store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from featstore.extraction import probing

    register_pictures(store_path, tmp_path / "data", 4)
    config = SetConfig(model="dinov3-small", random_weights=0, res="64")
    plan = make_plan(Store(store_path), "pics", config, RUN)
    monkeypatch.setattr(probing, "LARGEST_WEIGHTS", 1e6)
    said: list[str] = []
    found = probing.probe_forward(plan, RUN, "cpu", seconds=0.3, batch_size=lambda _: 4, say=said.append)
    assert "of its 12 blocks with random weights, scaled by FLOP" in found.note
    assert found.batch_size == 4
    assert found.cpu > 0
    assert "loading" in said[0]


def test_help_teaches() -> None:
    output = run_command("--help").output
    assert "featstore plan --dataset cxr --model dinov3-base --res 512" in output
    assert "--gpu" in output


def test_config_errors_are_those_of_extract(store_path: Path, tmp_path: Path) -> None:
    register_pictures(store_path, tmp_path / "data", 4)
    with pytest.raises(ConfigError, match="stands there twice"):
        plan_command.make_plans(Store(store_path), "pics", SetConfig(model="tiny,tiny"), RUN, None)
