"""Options from a file. The command line has priority, then the environment (KBNE_EDIT_BAKE_RULE), then the file, then
the defaults.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from .. import __version__

PREFIX = "KBNE_EDIT"  # of environment variables: PREFIX_COMMAND_OPTION


def config() -> click.Option:
    """--config of every command."""
    return click.Option(
        ["--config"],
        type=click.Path(path_type=Path),
        is_eager=True,
        expose_value=False,
        callback=_read,
        help="YAML file with options of this command, e.g. `rule: specific`.",
    )


def from_environment(command: click.Command, name: str) -> None:
    """Read each option from an environment variable with the option's name: KBNE_EDIT_BAKE_NO_MEASURE=1."""
    for param in command.params:
        if isinstance(param, click.Option) and param.envvar is None:
            param.envvar = "_".join((PREFIX, name, _long(param).replace("-", "_"))).upper()


def _read(context: click.Context, option: click.Parameter, path: Path | None) -> None:
    """Use the file's values as defaults of this run. Raises InputError."""
    from ..errors import InputError, shown
    from ..yamlfile import read_yaml

    if path is None:
        return
    try:
        data, _ = read_yaml(path)
    except InputError as error:
        raise InputError(f"--config {path}: {error}") from None
    if not isinstance(data, dict):
        raise InputError(f"--config {path}: must be a mapping of options to values, such as `rule: specific`")
    params = {_long(param): param for param in context.command.params if param is not option}
    if unknown := sorted(str(key) for key in data if key not in params):
        raise InputError(f"--config {path}: {context.command.name} has no option {shown(unknown[0])}")
    context.default_map = {str(params[key].name): _value(params[key], value) for key, value in data.items()}


def converted(convert: Callable[[Any], Any]) -> Callable[[click.Context, click.Parameter, Any], Any]:
    """A callback for an option whose value differs from the typed text; `used` writes the text."""

    def callback(context: click.Context, param: click.Parameter, value: Any) -> Any:
        context.meta[_TYPED + str(param.name)] = value
        return convert(value)

    return callback


_TYPED = f"{__name__}."  # key in a context's meta, followed by the option's name


def _long(param: click.Parameter) -> str:
    """The name of an option as it is typed, without its dashes, or the name of an argument."""
    return max(param.opts, key=len).lstrip("-")


def used() -> str:
    """The options of the running command, in the form that --config reads, without defaults."""
    import yaml

    context = click.get_current_context()
    given = {}
    for param in context.command.params:
        name = str(param.name)
        value = context.meta.get(_TYPED + name, context.params.get(name))
        if value not in (None, ()) and context.get_parameter_source(name) not in _DEFAULTS:
            given[_long(param)] = _plain(value)
    head = f"# kbne-edit {__version__}; to run it again: kbne-edit {context.command.name} --config FILE\n"
    return head + (yaml.safe_dump(given, sort_keys=False, allow_unicode=True) if given else "{}\n")


_DEFAULTS = (ParameterSource.DEFAULT, None)


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value if isinstance(value, (bool, int, float)) else str(value)


def _value(param: click.Parameter, value: Any) -> Any:
    """Join lists with commas, except for options and arguments that may be repeated."""
    repeated = param.nargs == -1 or (isinstance(param, click.Option) and param.multiple)
    return ",".join(map(str, value)) if isinstance(value, list) and not repeated else value
