"""docs/clusters.md: its commands parse as typed, its recipes exist, its numbers are those of the code."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from cli import main
from featstore.configs import RunConfig
from featstore.extraction import stopping

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "clusters.md").read_text()


def commands() -> list[list[str]]:
    """Arguments of every `featstore` command of the page, by itself, by torchrun, or as a recipe runs it."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line)
            if "recipes/" in line and words[0] == "sbatch":
                place = next(at for at, word in enumerate(words) if word.startswith("recipes/"))
                found.append(["extract", *words[place + 1 :]])
            elif "featstore" in words and words[0] in ("featstore", "torchrun"):
                found.append(words[words.index("featstore") + 1 :])
    return found


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_commands_parse_as_typed(command: list[str]) -> None:
    name, *arguments = command
    app = typer.main.get_command(main._store_app())
    app.commands[name].make_context(name, arguments)  # type: ignore[attr-defined]


def test_all_recipes_are_named_and_are_there() -> None:
    assert len(commands()) >= 7
    named = set(re.findall(r"recipes/[\w.]+\w", PAGE))
    assert named == {f"recipes/{path.name}" for path in (ROOT / "recipes").iterdir()}


def test_options_and_numbers_are_those_of_the_code() -> None:
    app = typer.main.get_command(main._store_app())
    known = {
        option
        for command in app.commands.values()  # type: ignore[attr-defined]
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    slurm = {"--array", "--time", "--signal", "--nodes", "--nproc-per-node"}
    assert set(re.findall(r"(--[a-z][a-z-]+)", PAGE)) - slurm <= known
    for number, code in stopping.SIGNALS.items():
        assert re.search(rf"{number.name}.*\| {code} \|", PAGE)
    assert f"no more than {stopping.GRACE:g} s" in PAGE
    assert f"{stopping.GRACE + 1:g} s after the first" in PAGE
    assert f"`--patience` seconds ({RunConfig().patience:g})" in PAGE
