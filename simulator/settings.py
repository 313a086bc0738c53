"""Options from a TOML file and from the environment: defaults that the command line overrides."""

import os
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperOption

PREFIX = "WATTBRIDGE_SIMULATOR_"


def settings(context: typer.Context, file: Path | None) -> dict[str, Any]:
    """Return what the environment, and else the file, says about the options of a command, by parameter.

    A section of the file is the panel of the help in which an option stands, in lower case; a key is the name
    of the option, with underscores. A variable is named like the key, in capitals, after `PREFIX`.

    Raises:
        typer.BadParameter: the file cannot be read, or it says what no option takes.
    """
    sections = _options(context)
    found: dict[str, Any] = {}
    for section, values in _read(file).items() if file else ():
        if not isinstance(values, dict):
            raise typer.BadParameter(f"{file} has {section!r} outside of a section; sections are {_listed(sections)}")
        if section not in sections:
            raise typer.BadParameter(f"{file} has a section [{section}]; there are {_listed(sections)}")
        for key, value in values.items():
            option = sections[section].get(key)
            if option is None:
                raise typer.BadParameter(
                    f"{file} has {key!r} in [{section}], where there are {', '.join(sections[section])}"
                )
            with _explained(f"{file}, [{section}] {key} = {value!r}"):
                found[option.name] = _checked(context, option, value)
    # The paces exclude one another: one in the environment displaces those of the file.
    paces = sections["pace"]
    if any(os.environ.get(PREFIX + key.upper()) for key in paces):
        for option in paces.values():
            found.pop(option.name, None)
    for key, option in (item for options in sections.values() for item in options.items()):
        name = PREFIX + key.upper()
        if text := os.environ.get(name):
            with _explained(f"{name}={text}"):
                option.process_value(context, text)
            found[option.name] = text
    return found


def _options(context: typer.Context) -> dict[str, dict[str, TyperOption]]:
    """Return the options of a command by panel and key; --help and the like stand in none."""
    sections: dict[str, dict[str, TyperOption]] = {}
    for option in context.command.params:
        if isinstance(option, TyperOption) and option.rich_help_panel:
            key = option.opts[-1].removeprefix("--").replace("-", "_")
            sections.setdefault(option.rich_help_panel.lower(), {})[key] = option
    return sections


def _read(file: Path) -> Mapping[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{file} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise typer.BadParameter(f"{file} is not TOML: {error}") from error


def _checked(context: typer.Context, option: TyperOption, value: object) -> object:
    """Return a value of the file as the option would take it from the command line, where it does."""
    if option.is_flag:
        if not isinstance(value, bool):
            raise typer.BadParameter("it is either true or false")
        return value
    if isinstance(value, bool | list | dict):
        raise typer.BadParameter("it is a number or a text, as on the command line")
    text = value.isoformat() if isinstance(value, datetime) else str(value)
    option.process_value(context, text)
    return text


@contextmanager
def _explained(where: str) -> Iterator[None]:
    """Say in which place of the configuration something is wrong."""
    try:
        yield
    except typer.BadParameter as error:
        raise typer.BadParameter(f"{where}: {error.message}") from error


def _listed(sections: Mapping[str, Any]) -> str:
    return ", ".join(f"[{section}]" for section in sections)
