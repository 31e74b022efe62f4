"""Run the command line in a child process, for tests; and list the modules that a run imported."""

import json
import os
import subprocess
import sys

COMMAND = [sys.executable, "-m", "snapengine.cli"]
IMPORTS = """\
import json, os, sys
before = set(sys.modules)
from snapengine.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as end:
    code = end.code
sys.stderr.write("\\nIMPORTED " + json.dumps([code, sorted(set(sys.modules) - before)]) + "\\n")
"""


def run(*arguments, env=None, **keywords):
    """Run a command to its end. Output is bytes; an exit code other than 0 raises nothing."""
    keywords = {"capture_output": True, "timeout": 120, "env": os.environ | (env or {})} | keywords
    given = [os.fspath(a) if isinstance(a, os.PathLike) else a if isinstance(a, bytes) else str(a)
             for a in arguments]  # fmt: skip
    return subprocess.run([*COMMAND, *given], check=False, **keywords)


def imported(*arguments, **keywords):
    """(exit code, the modules that the command imported in addition to those of a bare Python)."""
    keywords = {"capture_output": True, "timeout": 120, "text": True} | keywords
    done = subprocess.run([sys.executable, "-c", IMPORTS, *map(str, arguments)], check=False, **keywords)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("IMPORTED ")]
    code, names = json.loads(line.removeprefix("IMPORTED "))
    return code, set(names)


def one_error(done, *words):
    """The single line of an error; it must contain the words."""
    text = done.stderr.decode()
    assert text.count("\n") == 1, text
    assert "Traceback" not in text
    assert text.startswith("snapengine"), text
    for word in words:
        assert word in text
    return text
