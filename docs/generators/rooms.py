"""The page "Rooms", as Markdown: what each room answers, what it may import, and what its modules do.

The directions come from the table that tests/test_rooms.py checks; what a module does, from its docstring.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
KINDS = {".py": "snapengine", ".pyx": "pyx", ".pxd": "snapengine"}
"""Where a module's text may be, in the order in which its summary is looked for."""

QUESTIONS = {
    "base": "Which small parts know nothing of snapshots?",
    "kernel": "What does Linux offer?",
    "storage": "Where do the bytes of an image go to and come from?",
    "image": "What is an image?",
    "pipeline": "How do filled slots become chunks?",
    "engine": "How is a consistent copy made?",
    "targets": "Whose memory is saved?",
    "handover": "How does a peer hand its memory over?",
    "process": "How is another process attached to, described and stopped?",
    "capture": "What happens in one snapshot, from arming to its result?",
    "restore": "How do pages get back into memory?",
    "export": "What do other tools read?",
    "qemu": "How are QEMU machines saved and restored?",
    "report": "How are figures shown to people?",
    "guest": "What is saved in tests, and what proves an image consistent?",
    "doctor": "What can this host do, and what would a capture meet?",
    "demo": "How do both methods compare on the same work?",
    "cli": "What do people type?",
}


def render() -> str:
    """A table of all rooms, then one section for each."""
    return "\n".join([*_overview(), *(line for room in allowed() for line in _room(room))])


def allowed() -> dict[str, str]:
    """The table `ALLOWED` of tests/test_rooms.py: a room, and the names of those that it may import."""
    tree = ast.parse((ROOT / "tests/test_rooms.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "ALLOWED":
            table: dict[str, str] = ast.literal_eval(node.value)
            return table
    raise ValueError("tests/test_rooms.py has no table ALLOWED")


def _overview() -> Iterator[str]:
    yield from ["| room | its question | may import |", "| --- | --- | --- |"]
    for room, names in allowed().items():
        others = ", ".join(f"`{name}`" for name in names.split())
        yield f"| [`{room}`](#{room}) | {QUESTIONS.get(room) or summary(f'{room}/__init__')} | {others} |"
    yield ""


def _room(room: str) -> Iterator[str]:
    yield from [f"## {room}", "", summary(f"{room}/__init__"), "", "| module | |", "| --- | --- |"]
    for name in modules(room):
        yield f"| `{name.replace('/', '.')}` | {summary(name)} |"
    yield ""


def modules(room: str) -> list[str]:
    """The modules of a room, Python and Cython, without their suffixes."""
    folders = (ROOT / "snapengine" / room, ROOT / "pyx" / room)
    found = {path.stem for folder in folders for path in folder.glob("*.p*") if path.suffix in KINDS}
    return sorted(f"{room}/{name}" for name in found if not name.endswith("__"))


def summary(name: str) -> str:
    """The first paragraph of a module's docstring; of an interface alone, its first comment."""
    for suffix, folder in KINDS.items():
        path = ROOT / folder / f"{name}{suffix}"
        if path.exists():
            return _first_sentence(_docstring(path))
    raise FileNotFoundError(name)


def _docstring(path: Path) -> str:
    text = path.read_text()
    if path.suffix == ".pxd":
        comment = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
        return " ".join(line.lstrip("# ") for line in comment)
    if path.suffix == ".py":
        return ast.get_docstring(ast.parse(text)) or ""
    found = re.match(r'\s*(?:#[^\n]*\n\s*)*r?"""(.*?)"""', text, re.DOTALL)
    return found[1] if found else ""


def _first_sentence(text: str) -> str:
    first = " ".join(text.strip().split("\n\n")[0].split())
    return first.replace("|", "\\|").replace("<", "\\<").replace("*", "\\*")
