"""Augmented views: made with the plain set in one pass, equal however they are made, found again, never ranked."""

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from pictures import CONFIG, register_pictures, sets_of, write_pictures, write_table
from typer.testing import CliRunner

from cli import extract as extracting
from cli import operations, running
from featstore.configs import RunConfig, SetConfig, each_set
from featstore.errors import ConfigError, TaskError, UnknownNameError
from featstore.extraction.pipeline import extract, extract_sets
from featstore.extraction.plan import Plan, make_plan
from featstore.extraction.recheck import preprocessing, recheck
from featstore.extraction.single import embed_image
from featstore.images import preprocess, stack, to_pixels
from featstore.register import register
from featstore.request import command_of, config_of
from featstore.store.catalog import Store
from featstore.store.diff import diff_sets
from featstore.store.layout import augment_of
from featstore.store.merge import merge
from featstore.store.verify import verify_store
from featstore.store.views import is_view, views_command, views_of
from probes.configs import EvalConfig, KnnConfig
from probes.evaluation import complete_sets, evaluate_sets

RUN = RunConfig(device="cpu", batch_size=8)
VIEWS = SetConfig(model="tiny", res="42", block_rows=16, views=2)


def plans(store: Path, config: SetConfig = VIEWS, run: RunConfig = RUN) -> list[Plan]:
    return [make_plan(Store(store), "pics", each, run) for each in each_set(config)]


@pytest.fixture(scope="module")
def viewed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 45 pictures with a set, two dino views and one chest view of it; for reading."""
    root = tmp_path_factory.mktemp("views")
    register_pictures(root / "store", root / "data", 45)
    extract_sets(plans(root / "store"), RUN)
    extract(plans(root / "store", replace(VIEWS, views=0, view=1, augment="chest"))[0], RUN)
    return root / "store"


# One pass, and what it writes


def test_views_and_their_plain_set_decode_each_image_once(tmp_path: Path, decoded: list[str]) -> None:
    register_pictures(tmp_path / "store", tmp_path / "data", 45)
    found = running.run_plans(plans(tmp_path / "store"), RUN, quiet=True)
    assert [(item["set"], item["samples"]) for item in found] == [
        ("pics/tiny@42", 45),
        ("pics/tiny@42~dino1", 45),
        ("pics/tiny@42~dino2", 45),
    ]
    assert len(decoded) == len(set(decoded)) == 45
    # More of them later: what is there is kept, also where it stands between what is new.
    store = Store(tmp_path / "store")
    store.remove("pics/tiny@42~dino1")
    before = sets_of(tmp_path / "store")
    decoded.clear()
    found = running.run_plans(plans(tmp_path / "store", replace(VIEWS, views=3)), RUN, quiet=True)
    assert [item["samples"] for item in found] == [0, 45, 0, 45]
    assert len(decoded) == 45
    after = sets_of(tmp_path / "store")
    assert len(after) == 4
    assert {name: after[name] for name in before} == before


def test_one_network_is_loaded_for_all_and_goes_into_one_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, viewed: Path
) -> None:
    from featstore.extraction import creation

    loaded: list[str] = []
    real = creation.load_backbone

    def counted(plan: Plan, *more: Any) -> Any:
        loaded.append(plan.name)
        return real(plan, *more)

    monkeypatch.setattr(creation, "load_backbone", counted)
    monkeypatch.setattr(running, "_free_memory", lambda _: 0)  # the network is larger than half of what is free
    register_pictures(tmp_path / "store", tmp_path / "data", 45)
    running.run_plans(plans(tmp_path / "store"), RUN, quiet=True)
    assert loaded == ["pics/tiny@42"]
    runs = [json.loads(path.read_text()) for path in (tmp_path / "store").glob("sets/pics/*/runs/*.json")]
    assert [item["summary"]["how"]["sets_in_pass"] for item in runs] == [3, 3, 3]
    made = sets_of(tmp_path / "store")
    assert made == {name: tree for name, tree in sets_of(viewed).items() if name in made}


def test_each_alone_in_any_order_gives_the_same_bytes(tmp_path: Path, viewed: Path) -> None:
    register_pictures(tmp_path / "store", tmp_path / "data", 45)
    run = RunConfig(device="cpu", batch_size=8, workers=3)
    for plan in reversed(plans(tmp_path / "store", run=run)):
        extract(plan, run)
    made = sets_of(tmp_path / "store")
    assert made == {name: tree for name, tree in sets_of(viewed).items() if name in made}
    assert len(made) == 3


@pytest.mark.slow
def test_processes_that_decode_give_the_same_bytes(tmp_path: Path, viewed: Path) -> None:
    register_pictures(tmp_path / "store", tmp_path / "data", 45)
    run = RunConfig(device="cpu", batch_size=8, workers=1, worker_type="process")
    extract_sets(plans(tmp_path / "store", run=run), run)
    made = sets_of(tmp_path / "store")
    assert made == {name: tree for name, tree in sets_of(viewed).items() if name in made}


def test_two_ranks_and_a_kill_give_the_same_bytes(tmp_path: Path, viewed: Path) -> None:
    register_pictures(tmp_path / "store", tmp_path / "data", 45)

    def stop(images: int, failed: int, seen: list[int] = []) -> None:  # noqa: B006
        seen.append(images)
        if sum(seen) > 60:
            raise KeyboardInterrupt

    from featstore.extraction.pipeline import Hooks

    with pytest.raises(KeyboardInterrupt):
        extract_sets(plans(tmp_path / "store"), RUN, hooks=Hooks(stop))
    left = [len(plan.todo) for plan in plans(tmp_path / "store")]
    assert 0 < sum(left) < 3 * 45
    for rank in (1, 0):
        run = RunConfig(device="cpu", batch_size=8, rank=rank, world=2, take_over=False)
        extract_sets(plans(tmp_path / "store", run=run), run)
    made = sets_of(tmp_path / "store")
    assert made == {name: tree for name, tree in sets_of(viewed).items() if name in made}


def test_a_view_follows_the_id_of_a_sample_and_not_its_place(tmp_path: Path, viewed: Path) -> None:
    names = write_pictures(tmp_path / "data", 45)
    write_table(tmp_path / "data", names[::-1][:30])
    register(tmp_path / "store", "pics", tmp_path / "data", CONFIG)
    extract_sets(plans(tmp_path / "store"), RUN)
    for name in ("tiny@42", "tiny@42~dino2"):
        here, there = Store(tmp_path / "store")["pics", name], Store(viewed)["pics", name]
        position = {sample: row for row, sample in enumerate(there.manifest.column("id"))}
        rows = [position[sample] for sample in here.manifest.column("id")]
        np.testing.assert_allclose(here.load(), there.load()[rows], rtol=0, atol=2e-3)
        assert len(here) == 30


@pytest.mark.parametrize("name", ["tiny@42~dino2", "tiny@42~chest1"])
def test_a_view_holds_the_network_s_tokens_of_the_augmented_image(viewed: Path, name: str) -> None:
    from PIL import Image

    view = Store(viewed)["pics", name]
    spec = preprocessing(view.spec["identity"]["preprocess"])
    network = plans(viewed)[0].source.load(device="cpu", compute_dtype="float32")
    for row in (0, 17, 44):
        picture = np.asarray(Image.open(view.manifest.root / view.manifest.column("path")[row]))
        pixels = torch.from_numpy(stack([preprocess(picture, spec, view.manifest.column("id")[row])], spec))
        with torch.inference_mode():
            tokens = network(to_pixels(pixels, spec, device="cpu", dtype=torch.float32), layers=())
        np.testing.assert_allclose(view.cls[row], tokens.cls[0].numpy(), rtol=2e-3, atol=2e-3)
    plain = Store(viewed)["pics", "tiny@42"].load("cls")
    assert (abs(view.load("cls") - plain).max(axis=1) > 0.01).mean() > 0.5  # small turns move no pixel of these


def test_a_view_is_rechecked_verified_merged_and_told_from_others(viewed: Path, tmp_path: Path) -> None:
    store = Store(viewed)
    found = recheck(store.set("pics/tiny@42~dino2"), RUN, rows=5)
    assert (found.ok, found.sampled) == (True, 5)
    assert all(verdict.ok for verdict in verify_store(store))
    merge(store, tmp_path / "other", ["pics/tiny@42~dino2"])
    assert Store(tmp_path / "other").sets() == ["pics/tiny@42~dino2"]
    other = Store(tmp_path / "other")["pics", "tiny@42~dino2"]
    assert diff_sets(store["pics", "tiny@42~dino2"], other).verdict == "equal"
    assert diff_sets(store["pics", "tiny@42~dino2"], store["pics", "tiny@42~dino1"]).verdict == "different"


# What a set is, and how it is asked for


def test_identity_keeps_plain_sets_as_they_are(viewed: Path) -> None:
    specs = {name.partition("/")[2]: Store(viewed).set(name).spec for name in Store(viewed).sets()}
    assert list(specs) == ["tiny@42", "tiny@42~chest1", "tiny@42~dino1", "tiny@42~dino2"]
    assert "augment" not in specs["tiny@42"]["identity"]["preprocess"]
    assert set(specs["tiny@42"]["request"]) == {"model", "res", "block_rows", "compute_dtype"}
    alone = make_plan(Store(viewed), "pics", SetConfig(model="tiny", res="42"), RUN)
    assert (alone.spec["fingerprint"], len(alone.todo)) == (specs["tiny@42"]["fingerprint"], 0)
    assert augment_of(specs["tiny@42~dino2"]) == {"recipe": "dino", "view": 2, "seed": 0, "implementation": 1}
    assert len({spec["fingerprint"] for spec in specs.values()}) == 4
    [seeded] = plans(viewed, SetConfig(model="tiny", res="42", view=2, augment_seed=3))
    assert seeded.name == "pics/tiny@42~dino2s3"
    assert seeded.spec["fingerprint"] not in {spec["fingerprint"] for spec in specs.values()}


def test_a_view_s_own_request_comes_back(viewed: Path) -> None:
    spec = Store(viewed).set("pics/tiny@42~chest1").spec
    assert command_of(spec) == (
        "featstore extract --dataset pics --model tiny --res 42 --compute-dtype float32 --view 1 --augment chest "
        "--block-rows 16"
    )
    again = make_plan(Store(viewed), "pics", config_of(spec), RUN)
    assert (again.spec["fingerprint"], len(again.todo)) == (spec["fingerprint"], 0)


def test_what_views_expand_to() -> None:
    found = each_set(SetConfig(model="tiny,dinov2-small", res="42,56", views=2, augment="radiology", augment_seed=1))
    plain = [SetConfig(model=model, res=res) for model in ("tiny", "dinov2-small") for res in ("42", "56")]
    assert found == [
        each
        for one in plain
        for each in (one, *(replace(one, view=view, augment="radiology", augment_seed=1) for view in (1, 2)))
    ]
    assert each_set(SetConfig(model="tiny", view=7))[0].augment == "dino"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"views": -1}, r"--views and --augment-seed must be at least 0, got -1 and 0"),
        ({"views": 1, "augment_seed": -2}, r"must be at least 0, got 1 and -2"),
        ({"view": 0}, r"--view is the number of one augmented copy, from 1, without --views; got --view 0"),
        ({"view": 1, "views": 2}, r"without --views; got --view 1 --views 2"),
        ({"augment": "chest"}, r"--augment and --augment-seed say what the copies of --views are; add --views 4"),
        ({"augment_seed": 1}, r"--augment and --augment-seed say what"),
        (
            {"views": 1, "tokens": "patches", "reduce": "pool2,pca:4"},
            r"--views: principal components are fitted for each set.*leave pca out",
        ),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        SetConfig(model="tiny", **options)


def test_what_cannot_be_done_with_views(viewed: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--views 2 asks for 3 sets; plan each item of featstore.configs.each_set"):
        make_plan(Store(viewed), "pics", VIEWS, RUN)
    cached = replace(RUN, decoded_cache=True)
    with pytest.raises(ConfigError, match=r"--decoded-cache keeps images as the plain set has them.*leave"):
        extract_sets(plans(viewed, SetConfig(model="tiny", res="56", view=1)), cached)
    image = tmp_path / "data.png"
    image.write_bytes((viewed.parent / "data/images/00001.png").read_bytes())
    view = Store(viewed)["pics", "tiny@42~dino1"]
    with pytest.raises(ConfigError, match=r"holds augmented copies, which are drawn from the id of a sample, and data"):
        embed_image(view, image, ["cls"], RUN)


def test_precision_follows_the_plain_set_and_the_other_way_round(viewed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from featstore.extraction import plan as planning

    def found(config: SetConfig) -> str:
        return str(make_plan(Store(viewed), "pics", config, RUN).spec["identity"]["compute_dtype"])

    real = Store.entries

    def as_bfloat16(store: Store, dataset: str | None = None) -> Any:
        entries = [entry for entry in real(store, dataset) if entry.name == keep]
        for entry in entries:
            entry.spec["identity"]["compute_dtype"] = "bfloat16"
        return entries

    assert found(SetConfig(model="tiny", res="42", view=9)) == "float32"
    monkeypatch.setattr(planning.Store, "entries", as_bfloat16)
    keep = "pics/tiny@42"
    assert found(SetConfig(model="tiny", res="42", view=9)) == "bfloat16"
    assert found(SetConfig(model="tiny", res="56", view=1)) == "float32"
    keep = "pics/tiny@42~dino1"
    assert found(SetConfig(model="tiny", res="42")) == "bfloat16"
    assert found(SetConfig(model="tiny", res="42", view=2, augment="chest")) == "bfloat16"


# Finding them, and leaving them out


def test_names_find_plain_sets_and_views_under_their_own(viewed: Path) -> None:
    store = Store(viewed)
    assert [entry.name for entry in store.find("pics")] == ["pics/tiny@42"]
    assert [entry.name for entry in store.find("pics", "tiny")] == ["pics/tiny@42"]
    assert store.entry("pics/tiny").name == "pics/tiny@42"
    assert store.entry("pics/tiny@42").name == "pics/tiny@42"
    view = store.entry("pics/tiny@42~dino1")
    assert store.entry(view.full_name).folder == view.folder
    assert [row.get("augment", {}).get("view") for row in store.summaries()] == [None, 1, 1, 2]
    with pytest.raises(UnknownNameError, match=r"no set 'pics/tiny@42~dino9'"):
        store.entry("pics/tiny@42~dino9")


def test_views_of_a_set(viewed: Path, tmp_path: Path) -> None:
    store = Store(viewed)
    plain = store.set("pics/tiny@42")
    names = [view.name for view in views_of(store, plain, "dino")]
    assert names == ["pics/tiny@42~dino1", "pics/tiny@42~dino2"]
    assert [view.name for view in views_of(store, plain, "chest", seed=0)] == ["pics/tiny@42~chest1"]
    assert views_of(store, plain, "radiology") == views_of(store, plain, seed=4) == []
    assert [is_view(item.spec) for item in (plain, *views_of(store, plain, "chest"))] == [False, True]
    with pytest.raises(ConfigError, match=r"several kinds: 1 of chest \(seed 0\), 2 of dino \(seed 0\); say which"):
        views_of(store, plain)
    with pytest.raises(ConfigError, match=r"tiny@42~dino1 is itself an augmented view"):
        views_of(store, store.set("pics/tiny@42~dino1"))


def test_views_in_order_of_their_number_once_they_are_complete(tmp_path: Path) -> None:
    register_pictures(tmp_path / "store", tmp_path / "data", 20)
    config = SetConfig(model="tiny", res="42", name="mine", block_rows=16)
    for view in (None, 10, 2):
        extract(plans(tmp_path / "store", replace(config, view=view))[0], RUN)
    store = Store(tmp_path / "store")
    plain = store.set("pics/mine@42")

    def stop(images: int, failed: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(plans(tmp_path / "store", replace(config, view=1))[0], RUN, advance=stop)
    assert [view.name for view in views_of(store, plain)] == ["pics/mine@42~dino2", "pics/mine@42~dino10"]
    # Views of a manifest are those that have all its rows.
    register_pictures(tmp_path / "store", tmp_path / "data", 24)
    assert views_of(store, store.set("pics/mine@42", manifest=plain.manifest.short))
    extract(plans(tmp_path / "store", config)[0], RUN)
    assert views_of(store, store.set("pics/mine@42")) == []


def test_the_command_that_makes_views(viewed: Path, tmp_path: Path) -> None:
    plain = Store(viewed).set("pics/tiny@42")
    command = views_command(plain, 4, "chest", seed=2)
    assert command == (
        "featstore extract --dataset pics --model tiny --res 42 --compute-dtype float32 --views 4 --augment chest "
        "--augment-seed 2 --block-rows 16"
    )
    assert "--augment dino" in views_command(plain, 1)
    register_pictures(tmp_path / "store", tmp_path / "data", 20)
    whole = SetConfig(model="tiny", res="42", tokens="cls,mean_patch,patches", layers="1,2")
    extract(plans(tmp_path / "store", whole)[0], RUN)
    found = views_command(Store(tmp_path / "store").set("pics/tiny@42"), 2)
    assert "--layers 1,2" in found
    assert "--tokens" not in found  # vectors alone, which are the default


def test_probes_never_take_a_view(viewed: Path, tmp_path: Path) -> None:
    store = Store(viewed)
    config = EvalConfig(dataset="pics", results=tmp_path / "results", resamples=2)
    assert [item.name for item in complete_sets(store, config)] == ["pics/tiny@42"]
    records = evaluate_sets(store, "knn", config, KnnConfig(k="3"))
    assert {record["set"] for record in records} == {"pics/tiny@42"}
    with pytest.raises(TaskError, match=r"tiny@42~dino1 holds augmented copies.*--model tiny@42$"):
        complete_sets(store, replace(config, model="tiny@42~dino1"))


# The command


def featstore(*arguments: str) -> Any:
    app = typer.Typer()
    for name, command in {**extracting.COMMANDS, "ls": operations.ls}.items():
        app.command(name)(command)
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})


def test_the_command(store_path: Path, tmp_path: Path) -> None:
    register_pictures(store_path, tmp_path / "data", 20)
    arguments = ["extract", "--model", "tiny", "--res", "42", "--device", "cpu", "--views", "2"]
    done = featstore(*arguments, "--augment", "radiology")
    assert done.exit_code == 0, done.output
    for name in ("tiny@42", "tiny@42~radiology1", "tiny@42~radiology2"):
        assert f"pics/{name}: 20 computed" in done.output
    assert done.output.count("loading the backbone") == 1
    listed = json.loads(featstore("ls", "--json").stdout)["sets"]
    assert [item["set"] for item in listed] == ["pics/tiny@42", "pics/tiny@42~radiology1", "pics/tiny@42~radiology2"]
    store = Store(store_path)
    typed = shlex.split(views_command(store.set("pics/tiny@42"), 2, "radiology"))
    again = json.loads(featstore(*typed[1:], "--dry-run", "--json").stdout)
    assert [item["todo"] for item in again] == [0, 0, 0]
    refused = featstore(*arguments, "--decoded-cache")
    assert refused.exit_code != 0
    assert "leave --decoded-cache out" in refused.output + str(refused.exception)


def test_help_says_what_mirroring_does_to_labels_of_a_side() -> None:
    told = " ".join(featstore("extract", "--help").output.replace("│", " ").split())
    assert "mirroring swaps left and right, which labels of a side do not follow" in told
