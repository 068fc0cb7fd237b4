"""Entry points `featstore` and `probes`: every expected error becomes one message and exit code 2."""

import functools
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import typer

from cli.flags import Command
from featstore import __version__
from featstore.errors import FeatstoreError, Stopped

# Threads that spin while they wait starve the decoding beside them; read by OpenMP when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

ASKING = ("register", "extract", "plan", "search", "import", "card", "fetch")  # without options they print their help
HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 120}


def _version(wanted: bool) -> None:
    if wanted:
        print(f"featstore {__version__}")
        raise typer.Exit


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Turn what a user can act on into one message and an exit code; a bug keeps its traceback."""

    @functools.wraps(command)
    def run(**values: Any) -> None:
        try:
            command(**values)
        except Stopped as error:
            stop(f"\n{error}", error.code)
        except FeatstoreError as error:
            stop(f"error: {error}", 2)
        except KeyboardInterrupt:
            stop("\nstopped; what is committed stays, the same command goes on from there", 130)
        except BrokenPipeError:
            # The reader of our output (head, less) has gone; nothing is wrong.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        except OSError as error:
            place = f"{error.filename}: " if error.filename else ""
            stop(f"error: {place}{error.strerror or error}", 2)

    return run


def stop(message: str, code: int) -> NoReturn:
    """Say why and exit."""
    print(message, file=sys.stderr)
    sys.exit(code)


def _store_app() -> typer.Typer:
    from cli import (
        backbones,
        card,
        demo,
        doctor,
        exchange,
        extract,
        formats,
        intensities,
        maintenance,
        operations,
        searching,
    )
    from cli import plan as planning

    app = typer.Typer(
        name="featstore",
        help="Extract frozen-backbone embeddings once, probe them forever.\n\n"
        "Start with `featstore register NAME ROOT`, then `featstore extract --dataset NAME --model dinov3-base "
        "--res 512`, then `probes linear --dataset NAME`. `featstore demo` shows all of it in two minutes.",
        no_args_is_help=True,
        context_settings=HELP,
        rich_markup_mode=None,  # rich help imports Markdown and syntax highlighting: 0.3 s before the first line
        pretty_exceptions_enable=False,
        add_completion=False,
    )

    @app.callback()
    def root(
        version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="print the version"),
    ) -> None:
        pass

    first = (extract, planning, operations, backbones, card, intensities)
    for module in (*first, maintenance, exchange, formats, searching, doctor, demo):
        for name, command in module.COMMANDS.items():
            app.command(name, cls=Command, no_args_is_help=name in ASKING)(guarded(command))
    return app


def _probe_app() -> typer.Typer:
    from cli import comparing, fewshot, finetune, heads, leaks, probing, suite

    app = typer.Typer(
        name="probes",
        help="Fit and evaluate heads on cached embeddings.\n\n"
        "`probes linear --dataset chexpert` fits a head on every set of the data set, chooses on validation, tests "
        "once, prints one table and keeps a record of each result.",
        no_args_is_help=True,
        context_settings=HELP,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        add_completion=False,
    )

    @app.callback()
    def root(
        version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="print the version"),
    ) -> None:
        pass

    for module in (probing, heads, finetune, suite, fewshot, comparing, leaks):
        for name, command in module.COMMANDS.items():
            app.command(name, cls=Command, no_args_is_help=name != "results")(guarded(command))
    return app


def featstore() -> None:
    """Console script `featstore`."""
    _store_app()()


def probes() -> None:
    """Console script `probes`."""
    _probe_app()()
