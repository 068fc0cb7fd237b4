"""`probes finetune`: what cannot be is said before an image is read, by a dry run too; an external test data set."""

import json
from pathlib import Path
from typing import Any

import pytest
from finetunes import evaluate, request
from pictures import write_pictures, write_table
from tuning import Closed, Own
from tuning_runs import RUN, pictures
from typer.testing import CliRunner

import probes
from cli.main import _probe_app
from featstore.backbones import BACKBONES
from featstore.backbones import describe as describe_backbone
from featstore.configs import RegisterConfig, SetConfig
from featstore.errors import ConfigError, FeatstoreError, TaskError
from featstore.extraction.loader import Loader
from featstore.extraction.pipeline import extract
from featstore.extraction.plan import make_plan
from featstore.register import register
from featstore.store.catalog import Store
from probes.adapters_counts import count_last, count_lora
from probes.configs import EvalConfig, LinearConfig, TaskConfig
from probes.evaluation import evaluate_sets
from probes.finetune import describe
from probes.finetune_check import foresee
from probes.records import load_predictions


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("checks"), 48)


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """No image may be decoded."""

    def refuse(*_: Any) -> None:
        raise AssertionError("an image was read")

    monkeypatch.setattr(Loader, "__iter__", refuse)


CONVNEXT = {"model": "dinov3-convnext-tiny", "random_weights": 0, "res": "64", "features": "cls"}
NORMS = {"model": "mobilenetv2", "random_weights": 0, "res": "32", "features": "cls"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"method": "last-k", "from_cache": True},
            "and training would change them; add --flip off --degrees 0, or leave --from-cache out",
        ),
        ({"method": "last-k", "from_cache": True, "flip": "off", "degrees": 0.0, "crop": "0.75-1"}, "add --crop off,"),
        (
            {"method": "full", "from_cache": True, "flip": "off", "degrees": 0.0},
            "--from-cache needs frozen blocks in front of all that trains, and full trains from the first on",
        ),
        (
            {"method": "last-k", "k": 1, "features": "last4", "from_cache": True, "flip": "off", "degrees": 0.0},
            "--from-cache keeps the activations behind block 3, and last4 reads block",
        ),
        ({"method": "lora", "targets": "nope"}, "nope"),
        ({"method": "last-k", "k": 99}, "last-k 99: the network has 4 blocks; use a smaller k, or full"),
        ({"method": "full", "stretch_positions": True}, "has no rotary positions to stretch; leave it out"),
        ({"method": "full", "drop_path": 2.0}, "--drop-path must be at least 0 and below 1; got 2"),
        ({"method": "full", "drop_path": 0.1, **NORMS}, "have no place to drop paths; leave it out"),
        ({"method": "full", "layer_decay": 2.0}, r"layer decay must be above 0 and at most 1; got 2"),
        ({"method": "full", "batch_norm": "train"}, "batch norm train: the network has no batch norms; leave it out"),
        ({"method": "full", "shard": True}, "--shard cuts a network over several processes, and there is one; start"),
        ({"method": "linear-online", "batch_norm": "train", **NORMS}, "linear-online trains no batch norm"),
        ({"method": "full", "batch_norm": "train", "micro": 1, **NORMS}, "--batch or --micro allows one; give 2 or"),
        (
            {"method": "full", "batch_norm": "train", "checkpointing": True, **NORMS},
            "checkpointing computes a block twice, and its batch norms would count every batch twice",
        ),
        ({"labels": "first left,second", "flip": "mapped"}, "has no column 'first left'"),
        ({"lr": "nan"}, "the learning rate must be above 0; got nan"),
        ({"warmup": 3.0}, "warmup of 3 epochs must fit into the 1 of training; give a shorter one, or more epochs"),
    ],
)
def test_what_cannot_be_is_said_first(
    options: dict[str, Any], message: str, home: Path, tmp_path: Path, unread: None
) -> None:
    with pytest.raises(FeatstoreError, match=message):
        describe(Store(home), request(**options), foreseen=True)
    with pytest.raises(FeatstoreError, match=message):
        evaluate(home, runs=tmp_path / "runs", results=tmp_path / "results", **options)
    assert not list(tmp_path.iterdir())


def test_a_warm_up_of_the_preset_gives_way() -> None:
    assert request(epochs=1, preset="fair").settled.recipe((1e-3, None), 0).optimisation.warmup == 1.0
    assert request(epochs=3, warmup=2.5).settled.recipe((1e-3, None), 0).optimisation.warmup == 2.5


def labelled(tmp_path: Path, name: str, columns: dict[str, list[str]], splits: list[str]) -> Path:
    """A store with a data set of that name, its labels and splits."""
    root = tmp_path / name
    names = write_pictures(root, len(splits), start=600 if name != "pics" else 0)
    lines = [",".join(["path", "patient", "split", *columns])]
    lines += [
        ",".join([path, f"{name}{row}", splits[row], *(values[row] for values in columns.values())])
        for row, path in enumerate(names)
    ]
    (root / "table.csv").write_text("\n".join(lines))
    config = RegisterConfig(
        table=Path("table.csv"), group_column="patient", split_column="split", label_columns=",".join(columns)
    )
    register(tmp_path / "store", name, root, config)
    return tmp_path / "store"


SPLITS = ["train"] * 12 + ["val"] * 6 + ["test"] * 6


@pytest.mark.parametrize(("split", "start", "stop"), [("train", 0, 12), ("val", 12, 18), ("test", 18, 24)])
def test_one_class_alone_in_a_split(split: str, start: int, stop: int, tmp_path: Path, unread: None) -> None:
    values = [str(number % 2) for number in range(24)]
    values[start:stop] = ["1"] * (stop - start)
    store = labelled(tmp_path, "pics", {"first": values}, SPLITS)
    with pytest.raises(TaskError, match=rf"in {split}.*first {stop - start} positive 0 negative"):
        describe(Store(store), request(labels="first"), foreseen=True)


def test_sides_without_a_counterpart(tmp_path: Path, unread: None) -> None:
    values = [str(number % 2) for number in range(24)]
    store = labelled(tmp_path, "pics", {"lung left": values}, SPLITS)
    with pytest.raises(ConfigError, match=r"flip mapped swaps labels .* 'lung left' has no counterpart"):
        describe(Store(store), request(labels="lung left", flip="mapped"), foreseen=True)
    # `auto` settles on no mirroring here, which activations can be cached for
    options = {"labels": "lung left", "method": "last-k", "from_cache": True, "degrees": 0.0}
    assert describe(Store(store), request(**options), foreseen=True).facts["head_parameters"] > 0


@pytest.mark.parametrize(
    "options",
    [
        {"method": "linear-online"},
        {"method": "last-k", "k": 2},
        {"method": "lora", "r": 4, "targets": "q,v"},
        {"method": "lora", "r": 4, **CONVNEXT},
    ],
)
def test_a_dry_run_counts_what_trains(options: dict[str, Any], home: Path, unread: None) -> None:
    facts = describe_backbone(options.get("model", "tiny-random"), random_weights=options.get("random_weights"))
    found = describe(Store(home), request(**options), foreseen=True)
    width = facts.architecture.embed_dim * (1 if "features" in options else 2)
    assert found.facts["head_parameters"] == 2 * width + 2
    network = {
        "linear-online": lambda: 0,
        "last-k": lambda: count_last(facts.architecture, 2),
        "lora": lambda: count_lora(facts.architecture, 4, "fc1,fc2" if "model" in options else "q,v"),
    }[options["method"]]()
    assert found.facts["trainable_parameters"] == network + 2 * width + 2
    assert f"  {network + 2 * width + 2:,} parameters train, {2 * width + 2:,} of them the head's" in found.lines
    assert "trainable_parameters" not in describe(Store(home), request(**options)).facts


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKBONES)
def test_every_listed_network_can_be_foreseen(name: str) -> None:
    source = describe_backbone(name, random_weights=None if name.startswith("tiny") else 0)
    asked = request(method="full", start="random")
    found = foresee(source, asked.settled, asked.work, features="cls", outputs=3)
    spared = source.architecture.num_parameters() - found.network
    assert 0 <= spared < 0.03 * found.network, found.notes  # mask tokens, norms and heads behind what is read
    assert found.head == 3 * (source.architecture.embed_dim + 1)


def test_an_own_network_is_tried(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "own_net.py").write_text(
        "from tuning import Closed, Own\n"
        "def make(*, device, compute_dtype, attention): return Own()\n"
        "def closed(*, device, compute_dtype, attention): return Closed()\n"
        "def short(): return Own()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    options = {"features": "mean_patch", "method": "full"}
    found = describe(Store(home), request(model="own_net:make", **options), foreseen=True).facts
    own = sum(parameter.numel() for parameter in Own().parameters())
    assert found["trainable_parameters"] == own + 2 * 8 + 2
    with pytest.raises(ConfigError, match=f"{Closed.__name__} computes without gradients; to train it"):
        describe(Store(home), request(model="own_net:closed", **options), foreseen=True)
    with pytest.raises(ConfigError, match=r"'own_net:short' takes \(\), and is called as function\(device=, compute_"):
        describe(Store(home), request(model="own_net:short", **options))


def dry_run(store: Path, *arguments: str) -> Any:
    given = ["finetune", "--dataset", "pics", "--model", "tiny-random", "--res", "42", "--labels", "first,second"]
    runner = CliRunner(env={"FEATSTORE_HOME": str(store), "COLUMNS": "200"})
    return runner.invoke(_probe_app(), [*given, "--device", "cpu", "--dry-run", *arguments])


def test_the_command_says_so(home: Path, unread: None) -> None:
    done = dry_run(home, "--method", "last-k", "--from-cache")
    assert done.exit_code != 0
    assert "add --flip off --degrees 0" in " ".join(done.output.split())
    one = dry_run(home, "--method", "full", "--lr", "1e-3", "--seeds", "1")
    assert one.exit_code == 0, one.output
    assert "  1 run: lr=0.001 with seed 0\n" in one.output
    two = dry_run(home, "--method", "full", "--lr", "1e-3", "--seeds", "2", "--refit")
    assert (
        "  2 runs: lr=0.001 with seed 0, then the best with 1 more seed, then each again on train + val\n" in two.output
    )
    assert "parameters train, " in two.output
    assert json.loads(dry_run(home, "--method", "full", "--json").stdout)["trainable_parameters"] > 10**6


# A data set for testing alone


@pytest.fixture
def external(tmp_path: Path) -> Path:
    """`ext` has test rows and no others."""
    store = pictures(tmp_path, 48)
    root = tmp_path / "ext"
    write_table(root, write_pictures(root, 20, start=500))
    text = (root / "table.csv").read_text()
    (root / "table.csv").write_text(text.replace(",train,", ",test,").replace(",val,", ",test,"))
    config = RegisterConfig(
        table=Path("table.csv"), group_column="patient", split_column="split", label_columns="first,second"
    )
    register(store, "ext", root, config)
    return store


def test_fine_tuning_is_tested_on_a_cohort_without_training_rows(external: Path) -> None:
    (record,) = evaluate(external, test_dataset="ext")
    assert record["test"]["dataset"] == "ext"
    assert record["task"]["splits"]["test"] == 20
    table = load_predictions(record).to_pydict()
    tested = [name for name, split in zip(table["id"], table["split"]) if split == "test"]
    assert sorted(tested) == sorted(f"images/{number:05d}.png" for number in range(500, 520))
    assert not any("training groups" in note for note in record["notes"])


def test_probes_are_tested_on_a_cohort_without_training_rows(external: Path) -> None:
    for name in ("pics", "ext"):
        config = SetConfig(model="tiny-random", res="42", compute_dtype="float32")
        extract(make_plan(Store(external), name, config, RUN), RUN)
    config = EvalConfig(dataset="pics", labels="first,second", features="cls", resamples=20)
    reading = TaskConfig(test_dataset="ext")
    (record,) = evaluate_sets(Store(external), "linear", config, LinearConfig(C="1"), reading=reading)
    assert record["task"]["splits"]["test"] == 20
    alone = Store(external).set("ext/tiny-random@42")
    with pytest.raises(TaskError, match="needs samples to train, select and test on; it has train 0, val 0, test 20"):
        probes.task(alone, labels=["first"])


def test_a_target_without_test_rows_is_refused(external: Path, unread: None) -> None:
    values = [str(number % 2) for number in range(20)]
    labelled(external.parent, "learn", {"first": values}, ["train"] * 20)
    with pytest.raises(TaskError, match="needs samples to test on; it has train 18, val 2, test 0; check the split"):
        evaluate(external, test_dataset="learn")
