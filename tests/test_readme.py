"""What the README and the pages on probes show is so: commands parse, the table is that of the result files."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from cli import main

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = README + "".join((ROOT / "docs" / name).read_text() for name in ("probes.md", "finetuning.md"))


def commands() -> list[str]:
    found = []
    for block in re.findall(r"```(?:bash|console)\n(.*?)```", PAGES, re.DOTALL):
        text = block.replace("\\\n", " ")
        for line in text.splitlines():
            for part in line.split("#")[0].removeprefix("$ ").split(";"):
                if part.strip().startswith(("featstore ", "probes ")):
                    found.append(part.strip())
    return found


@pytest.mark.parametrize("command", commands())
def test_commands_parse_as_typed(command: str) -> None:
    program, name, *arguments = shlex.split(command)
    app = typer.main.get_command(main._store_app() if program == "featstore" else main._probe_app())
    found = app.commands[name]  # type: ignore[attr-defined]
    found.make_context(name, arguments)  # raises on an unknown option, a missing one or a wrong value


def test_there_are_commands() -> None:
    assert len(commands()) > 20


def test_the_table_is_the_one_of_the_result_files() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "table.py")], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() in README
