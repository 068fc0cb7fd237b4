"""Options: how their texts are read, what is refused, and how dataclasses become command-line flags."""

import dataclasses
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
from typer.testing import CliRunner

from cli.flags import with_config
from featstore.configs import RegisterConfig, RunConfig, SetConfig, parse_bytes, parse_layers, parse_share, parse_tokens
from featstore.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("17", 17),
        ("100GB", 100 * 10**9),
        ("1.5TB", 1_500_000_000_000),
        ("500M", 5 * 10**8),
        (" 2 kb ", 2000),
        ("3b", 3),
    ],
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1e9", "1GiB", "1 000", "ten", "1.GB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--max-bytes must be a size such as 100GB or 1\.5TB, got"):
        RunConfig(max_bytes=text)


@pytest.mark.parametrize(("text", "expected"), [("1%", 0.01), ("0.01", 0.01), ("0", 0.0), ("100%", 1.0), ("1", 1.0)])
def test_shares(text: str, expected: float) -> None:
    assert parse_share(text) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["", "%", "-1%", "101%", "2", "nan", "inf", "1%%", "one"])
def test_shares_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--max-failed must be a share such as 1% or 0\.01, got"):
        RunConfig(max_failed=text)


def test_tokens_come_in_canonical_order() -> None:
    assert parse_tokens("patches, cls,cls") == ("cls", "patches")
    assert parse_tokens("registers,mean_patch") == ("mean_patch", "registers")
    for text in ("", ",", "cls,pooled", "CLS"):
        with pytest.raises(
            ConfigError, match="--tokens takes a comma-separated choice of cls, mean_patch, registers, patches"
        ):
            SetConfig(model="m", tokens=text)


def test_layers() -> None:
    assert parse_layers("") == ()
    assert parse_layers("4, 8,-1") == (4, 8, -1)
    for text in ("0", "1,0", "four", "1.5"):
        with pytest.raises(ConfigError, match=r"--layers takes block numbers such as 4,8,12 or -4,-1 .*, got"):
            SetConfig(model="m", layers=text)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weights": Path("w"), "random_weights": 0}, "--weights and --random-weights exclude each other; give one"),
        ({"name": "a/b"}, "--name is letters, digits, '.', '_' and '-', got 'a/b'"),
        ({"name": ""}, "--name is letters"),
        ({"block_rows": 0}, r"--block-rows must be a power of two \(16, 256, 4096, ...\), got 0"),
        ({"block_rows": 48}, "--block-rows must be a power of two .*, got 48"),
        ({"block_rows": -16}, "--block-rows must be a power of two .*, got -16"),
    ],
)
def test_set_options_that_cannot_be(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SetConfig(model="m", **values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 0}, "--batch-size must be at least 1, got 0"),
        ({"workers": 0}, "--workers must be at least 1, got 0"),
        ({"device": "gpu"}, "--device is auto, cpu, cuda or cuda:N, got 'gpu'"),
        ({"device": "cuda:"}, "--device is auto, cpu, cuda or cuda:N, got 'cuda:'"),
    ],
)
def test_run_options_that_cannot_be(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig(**values)


def test_options_at_their_edges() -> None:
    config = SetConfig(model="m", weights=None, random_weights=0, block_rows=1, name="a.b-c_1")
    assert (config.random_weights, config.block_rows) == (0, 1)
    assert RunConfig(device="cuda:3", batch_size=1, workers=1).device == "cuda:3"
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.model = "other"  # type: ignore[misc]


def test_options_reach_the_adapter_that_knows_them() -> None:
    config = RegisterConfig(table=Path("t.csv"), path_column="file", label_columns=" a, b ,", group_column="pid")
    assert config.options("table") == {
        "table": Path("t.csv"),
        "path_column": "file",
        "group_column": "pid",
        "label_columns": ("a", "b"),
        "seed": 0,
        "frames": None,
    }
    assert RegisterConfig(split_seed=3, frames="all").options("folder") == {"seed": 3, "frames": "all"}
    assert RegisterConfig(allow_missing=True).options("chexpert") == {}


@pytest.mark.parametrize(
    ("values", "adapter", "message"),
    [
        ({}, "table", r"the table adapter needs --table FILE \(CSV, TSV or Parquet\)"),
        (
            {"id_column": "i", "mask_column": "m"},
            "folder",
            "--id-column, --mask-column: only the table adapter takes these, not 'folder'; add --adapter table",
        ),
        ({"path_column": "file"}, "nih", "--path-column: only the table adapter takes these, not 'nih'"),
        ({"table": Path("t.csv")}, "chexpert", "--table: only the table adapter takes these"),
        ({"frames": "all"}, "chexpert", "--frames all: the adapter 'chexpert' knows its own samples; leave it out"),
        ({"split_seed": 1}, "chexpert", "--split-seed: the adapter 'chexpert' has a split of its own"),
        (
            {"table": Path("t.csv"), "split_column": "s", "split_seed": 1},
            "table",
            "--split-seed and --split-column exclude each other: the column is the split",
        ),
    ],
)
def test_options_that_an_adapter_would_ignore(values: dict[str, Any], adapter: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RegisterConfig(**values).options(adapter)


# --- flags


@dataclass(frozen=True, kw_only=True)
class Head:
    """A config with every kind of field."""

    dataset: Annotated[str, "needed, without default"]
    C: Annotated[str | None, "a capital"] = None
    class_weight: Annotated[Literal["none", "balanced"], "a choice"] = "none"
    folder: Annotated[Path | None, "a path"] = None
    seed: Annotated[int, "default zero"] = 0
    rate: Annotated[float, "a number"] = 0.5
    standardize: Annotated[bool, "on by default"] = True
    refit: Annotated[bool, "off by default"] = False
    plain: int = 7

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ConfigError("rate below 0")


made: list[tuple[str, bool, Head]] = []


@with_config(head=Head)
def fit(
    name: Annotated[str, typer.Argument(help="an argument")],
    *,
    head: Head,
    json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Fit a head."""
    made.append((name, json, head))


def run(*arguments: str) -> Any:
    made.clear()
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(fit)
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


def test_defaults_are_those_of_the_dataclass() -> None:
    assert run("x", "--dataset", "d").exit_code == 0
    assert made == [("x", False, Head(dataset="d"))]


def test_every_field_is_a_flag() -> None:
    arguments = (
        "--dataset d --C 0.1 --class-weight balanced --folder f --seed 3 --rate 1 --no-standardize --refit --plain 1"
    )
    assert run("x", "--json", *arguments.split()).exit_code == 0
    expected = Head(
        dataset="d",
        C="0.1",
        class_weight="balanced",
        folder=Path("f"),
        seed=3,
        rate=1.0,
        standardize=False,
        refit=True,
        plain=1,
    )
    assert made == [("x", True, expected)]


@pytest.mark.parametrize(
    "arguments",
    [
        ["x"],
        ["--dataset", "d"],
        ["x", "--dataset", "d", "--class-weight", "other"],
        ["x", "--dataset", "d", "--seed", "one"],
        ["x", "--dataset", "d", "--no-refit"],
        ["x", "--dataset", "d", "--c", "1"],
        ["x", "--dataset", "d", "--head", "1"],
    ],
)
def test_wrong_usage_is_refused(arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 2
    assert made == []


def test_validation_of_the_dataclass_speaks() -> None:
    result = run("x", "--dataset", "d", "--rate", "-1")
    assert isinstance(result.exception, ConfigError)


def test_help_has_texts_and_defaults() -> None:
    text = run("--help").output
    for part in (
        "needed, without default",
        "a capital",
        "default zero",
        "--no-standardize",
        "default: 0]",
        "default: 0.5]",
    ):
        assert part in text
    assert "--no-refit" not in text
    assert "default: None" not in text


def test_signature_shows_the_fields_and_keeps_the_name() -> None:
    names = list(inspect.signature(fit).parameters)
    assert names[:2] == ["name", "dataset"]
    assert set(names) == {"name", "json", *(field.name for field in dataclasses.fields(Head))}
    assert (fit.__name__, fit.__doc__) == ("fit", "Fit a head.")


def test_two_meanings_of_one_flag_are_found_when_the_command_is_made() -> None:
    with pytest.raises(ValueError, match="duplicate parameter name: 'seed'"):

        @with_config(head=Head)
        def clash(*, head: Head, seed: int = 0) -> None:
            raise AssertionError((head, seed))
