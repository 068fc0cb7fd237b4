"""What is said where `--dataset` is left out, or the name of a data set stands without it."""

from pathlib import Path

import pytest
from pictures import register_pictures
from typer.testing import CliRunner

from cli import main


def said(program: str, *arguments: str, store: Path, code: int = 2) -> str:
    app = main._store_app() if program == "featstore" else main._probe_app()
    done = CliRunner().invoke(app, list(arguments), env={"FEATSTORE_HOME": str(store), "COLUMNS": "400"})
    assert done.exit_code == code, done.output
    return done.output


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ("featstore", ("extract", "cxr", "--model", "tiny")),
        ("featstore", ("extract", "cxr")),  # --model is missing too
        ("featstore", ("plan", "--model", "tiny", "cxr")),
        ("probes", ("linear", "cxr", "--labels", "Edema")),
        ("probes", ("finetune", "cxr")),
    ],
)
def test_a_name_without_its_option(program: str, arguments: tuple[str, ...], store_path: Path) -> None:
    output = said(program, *arguments, store=store_path)
    assert "'cxr' stands without an option; did you mean --dataset cxr?" in output


def test_a_probe_without_a_data_set_says_which_there_are(tmp_path: Path, store_path: Path) -> None:
    needed = "--dataset is needed, the name of a registered data set; "
    assert f"{needed}none is registered in {store_path}" in said("probes", "linear", "--labels", "a", store=store_path)
    register_pictures(store_path, tmp_path / "data", 3)
    assert f"{needed}registered in {store_path}: pics" in said("probes", "knn", "--labels", "a", store=store_path)
    other = said("probes", "mil", "--store", str(tmp_path / "other"), "--model", "tiny", store=store_path)
    assert f"{needed}none is registered in {tmp_path / 'other'}" in other
    (tmp_path / "file").touch()
    assert f"{needed}the store cannot be read: " in said("probes", "knn", "--k", "5", store=tmp_path / "file")


def test_other_errors_of_usage_stay(store_path: Path) -> None:
    assert "No such option: --datset" in said("probes", "linear", "--datset", "x", store=store_path)
    assert "No such option: --datset" in said("probes", "linear", "cxr", "--datset", "x", store=store_path)
    assert "unexpected extra argument" in said("probes", "linear", "more", "--dataset", "x", store=store_path)
    assert "unexpected extra argument" in said("featstore", "ls", "one", "two", store=store_path)
    assert "Missing option '--model'" in said("featstore", "extract", "--dataset", "x", store=store_path)
    assert "Usage:" in said("featstore", "extract", "cxr", "--help", store=store_path, code=0)
