"""`snapengine completion`: a script that lets a shell complete commands and options."""

from __future__ import annotations

import argparse
from typing import Any

from snapengine.errors import UnsupportedError
from snapengine.report.terminal import EXIT_CODES, EXIT_OK, raw

DESCRIPTION = """\
Print a script for the shell, which then completes the commands and options of snapengine.
"""
EPILOG = f"""\
Needs shtab: pip install 'snapengine[completion]'

examples:
  snapengine completion bash > ~/.local/share/bash-completion/completions/snapengine
  snapengine completion zsh > ~/.zfunc/_snapengine
  eval "$(snapengine completion bash)"

{EXIT_CODES}
"""
SHELLS = ("bash", "zsh", "tcsh")


def add_completion(commands: argparse._SubParsersAction[Any], line: str) -> None:
    """Add `completion` to the command line."""
    parser = commands.add_parser(
        "completion", help=line, description=DESCRIPTION, epilog=EPILOG, formatter_class=raw
    )
    parser.add_argument("shell", choices=SHELLS, help="the shell")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The command."""
    from snapengine.cli.command import make_parser

    try:
        import shtab
    except ImportError:
        raise UnsupportedError("shtab is not installed: pip install 'snapengine[completion]'") from None
    print(shtab.complete(make_parser(), args.shell))
    return EXIT_OK
