"""Turns frozen config dataclasses into command-line flags: a field is a flag, its annotation the help text.

Also what is said where `--dataset` is left out, or its name given without it.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, cast, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand

from featstore.errors import FeatstoreError

# Of click, or of the copy of it that later releases of typer carry.
_USAGE_ERROR = cast(type[Exception], typer.BadParameter.__mro__[1])


class Command(TyperCommand):
    """A command whose errors of usage help with `--dataset`, where it has that option and takes no bare words."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except _USAGE_ERROR as error:
            takes = {item.name: item.param_type_name for item in self.params}
            if takes.get("dataset") != "option" or "argument" in takes.values():
                raise
            try:
                values, words, _ = self.make_parser(ctx).parse_args(given)
            except _USAGE_ERROR:
                raise error from None
            if words and "dataset" not in values:
                ctx.fail(f"{words[0]!r} stands without an option; did you mean --dataset {words[0]}?")
            if getattr(getattr(error, "param", None), "name", None) == "dataset":
                ctx.fail(f"--dataset is needed, the name of a registered data set; {_registered(values.get('store'))}")
            raise


def _registered(store: str | None) -> str:
    from featstore.store.catalog import Store
    from featstore.store.layout import store_path

    try:
        home = Store(store_path(store))
        names = home.datasets()
    except (FeatstoreError, OSError) as error:
        return f"the store cannot be read: {error}"
    if not names:
        return f"none is registered in {home.path}: start with `featstore register NAME ROOT`"
    return f"registered in {home.path}: {', '.join(names)}"


def _parameter(field: dataclasses.Field[Any], hint: Any) -> inspect.Parameter:
    base, text = get_args(hint)[:2] if get_origin(hint) is Annotated else (hint, "")
    name = field.name.replace("_", "-")
    # A switch that is off by default has no --no- form: there is nothing it could undo.
    # All names are written out, because releases of typer differ in whether they keep capitals.
    is_switch = base is bool or base == bool | None
    flag = f"--{name}/--no-{name}" if is_switch and field.default is not False else f"--{name}"
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    required = default is dataclasses.MISSING
    option = typer.Option(flag, help=text, show_default=default not in (None, "", []) and default is not False)
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if required else default,
        annotation=Annotated[base, option],
    )


def with_config(**configs: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace the named parameters of a command by the fields of their dataclasses."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command)
        hints = get_type_hints(command, include_extras=True)
        parameters = [
            parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
            for name, parameter in own.parameters.items()
            if name not in configs
        ]
        fields: dict[str, list[str]] = {}
        for name, config in configs.items():
            config_hints = get_type_hints(config, include_extras=True)
            items = dataclasses.fields(config)
            fields[name] = [item.name for item in items]
            parameters += [_parameter(item, config_hints[item.name]) for item in items]
        # Arguments first, then what has no default: click wants them so.
        parameters.sort(key=lambda parameter: parameter.default is not inspect.Parameter.empty)

        @functools.wraps(command)
        def run(**values: Any) -> None:
            made = {name: config(**{key: values.pop(key) for key in fields[name]}) for name, config in configs.items()}
            command(**values, **made)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate
