"""The reference of the command line, as Markdown, from the parsers themselves."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from unittest import mock

from snapengine.cli.command import make_parser
from snapengine.guest.main import add_arguments
from snapengine.report.terminal import EXIT_CODES, Parser

OMITTED = (argparse._HelpAction, argparse._SubParsersAction)


def render() -> str:
    """One section for each command, in the order of `snapengine --help`."""
    with mock.patch.dict(os.environ, {"COLUMNS": "100"}):  # argparse wraps the usage lines to the terminal
        parser = make_parser()
        return "\n".join([*_section(parser, 2), *_commands(parser, 2)])


def commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Name and parser of each subcommand."""
    found = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return {name: sub for action in found for name, sub in action.choices.items()}


def _commands(parser: argparse.ArgumentParser, level: int) -> Iterator[str]:
    for name, command in commands(parser).items():
        if command.prog == "snapengine guest":
            command = _guest()
        if not command.prog.endswith(name):
            raise ValueError(f"{command.prog}: an alias of a command has no section")
        yield from _section(command, level)
        yield from _commands(command, level)


def _guest() -> argparse.ArgumentParser:
    """`snapengine guest` has a parser of its own."""
    parser = Parser(
        prog="snapengine guest", description="A process that owns RAM, writes it and hands itself over."
    )
    add_arguments(parser)
    return parser


def _section(parser: argparse.ArgumentParser, level: int) -> Iterator[str]:
    yield f"{'#' * level} `{parser.prog}`\n"
    yield f"{_escaped(parser.description or '')}\n"
    yield f"```text\n{parser.format_usage().strip()}\n```\n"
    rows = list(_rows(parser))
    if rows:
        yield from ["| | |", "| --- | --- |", *rows, ""]
    epilog = (parser.epilog or "").strip()
    if parser.prog != "snapengine":  # these stand once, in the section of the command itself
        epilog = epilog.replace(EXIT_CODES, "").strip()
    if epilog:
        yield f"```text\n{epilog}\n```\n"


def _rows(parser: argparse.ArgumentParser) -> Iterator[str]:
    formatter = parser._get_formatter()
    for action in parser._actions:
        if action.help == argparse.SUPPRESS or isinstance(action, OMITTED):
            continue
        value = formatter._format_args(action, formatter._get_default_metavar_for_optional(action))
        names = ", ".join(action.option_strings)
        name = f"{names} {value}".strip() if names else value
        yield f"| `{name.replace('|', chr(92) + '|')}` | {_escaped(formatter._expand_help(action))} |"


def _escaped(text: str) -> str:
    for character in "\\|<>*_":
        text = text.replace(character, "\\" + character)
    return text
