"""The rooms of the package and the directions of their imports, for `import` and `cimport` alike.

A room imports from the rooms that its line in `ALLOWED` names, and from itself. Every room may import the
values that callers see (`VALUES`), which import only each other.
"""

import ast
import importlib
import re
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter

import pytest

import snapengine

VALUES = {"errors", "options", "regions", "result"}
FACE = {"", "capi"}  # `snapengine` itself and its C API, which callers import: it may import everything

ALLOWED = {
    "base": "",
    "kernel": "base",
    "storage": "base",
    "image": "base storage",
    "pipeline": "base image storage",
    "engine": "base kernel image pipeline",
    "targets": "base kernel",
    "handover": "base kernel",
    "process": "base kernel image targets",
    "capture": "base kernel storage image pipeline engine targets process",
    "restore": "image",
    "export": "base kernel storage image process",
    "qemu": "base kernel storage image pipeline targets process",
    "report": "base capture qemu",
    "guest": "base kernel handover report",
    "doctor": "base kernel process report",
    "demo": "base image handover capture guest report",
    "cli": "base storage image targets handover process capture export qemu report guest doctor demo",
}
IMPORT = re.compile(
    r"^\s*(?:from\s+(snapengine[\w.]*)\s+c?import\s+(\([^)]*\)|.*)|c?import\s+(snapengine[\w.]*))", re.M
)


def sources(repository):
    """(module, text) of every interface and implementation; an extension and its .pxd are one module."""
    for top in ("snapengine", "pyx"):
        for path in sorted((repository / top).rglob("*")):
            if path.suffix in (".py", ".pyx", ".pxd"):
                parts = path.relative_to(repository / top).with_suffix("").parts
                yield ".".join(part for part in parts if part != "__init__"), path.read_text()


def imported(text, modules):
    """Our modules that a source imports, also within functions and for types only."""
    for match in IMPORT.finditer(text):
        base = (match[1] or match[3]).removeprefix("snapengine").lstrip(".")
        names = re.findall(r"\w+", re.sub(r"#.*|\bas\s+\w+", "", match[2] or ""))
        inner = [f"{base}.{name}".lstrip(".") for name in names]
        found = [module for module in inner if module in modules]
        yield from found
        if base in modules and len(found) < max(len(inner), 1):
            yield base


def room_of(module):
    return module.partition(".")[0] if "." in module or module in ALLOWED else None


def wrong_directions(edges):
    """The imports that the table does not allow."""
    wrong = []
    for here, there in sorted(edges):
        room, other = room_of(here), room_of(there)
        if here in FACE or there in VALUES or room == other is not None:
            continue
        if room == "cli" and there == "":  # the version
            continue
        if here in VALUES or other is None or other not in ALLOWED[room].split():
            wrong.append(f"{here} imports {there}")
    return wrong


@pytest.fixture(scope="module")
def edges(repository):
    texts = list(sources(repository))
    modules = {module for module, _ in texts}
    found = {(here, there) for here, text in texts for there in imported(text, modules) if here != there}
    assert len(modules) > 180
    assert len(found) > 600
    return found


def test_every_import_goes_in_an_allowed_direction(edges):
    assert not wrong_directions(edges)


def test_every_module_is_in_a_room(repository):
    loose = {module for module, _ in sources(repository) if room_of(module) is None}
    assert loose == VALUES | FACE | {"__main__"} & loose
    assert {room_of(module) for module, _ in sources(repository)} - {None} == set(ALLOWED)


def test_the_rooms_have_an_order():
    assert list(TopologicalSorter({room: names.split() for room, names in ALLOWED.items()}).static_order())


def test_every_allowed_direction_is_used(edges):
    used = {(room_of(here), room_of(there)) for here, there in edges}
    unused = [(room, name) for room, names in ALLOWED.items() for name in names.split()]
    assert not [pair for pair in unused if pair not in used]


def test_no_circle_of_modules(edges):
    """Imports and cimports together have no circle: a reader need not know the modules above."""
    graph = defaultdict(set)
    for here, there in edges:
        if here not in FACE and there not in FACE:
            graph[here].add(there)
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(error.args[1])}")


PLANTED = [
    ("engine.walk", "from snapengine.capture.capture import snapshot\n"),
    ("engine.walk", "    from snapengine.process.target cimport thing\n"),
    ("base.bitmap", "from snapengine.kernel cimport uffd\n"),
    ("base.bitmap", "import snapengine.kernel.uffd\n"),
    ("image.image", "from snapengine.export.raw import (\n    export_raw,\n)\n"),
    ("errors", "from snapengine.base.units import format_size\n"),
    ("kernel.uffd", "import snapengine\n"),
]


@pytest.mark.parametrize(("module", "text"), PLANTED)
def test_a_planted_violation_is_found(repository, module, text):
    modules = {name for name, _ in sources(repository)}
    assert module in modules
    assert wrong_directions({(module, there) for there in imported(text, modules)})


def test_the_names_in_this_table_are_python(repository):
    for module, _ in sources(repository):
        ast.parse(f"import snapengine.{module}" if module else "import snapengine")


@pytest.mark.parametrize(
    ("room", "names"),
    {
        "capture": {"Capture", "Progress", "snapshot"},
        "handover": {"PeerTarget"},
        "process": {"ProcessTarget"},
        "targets": {"BufferTarget", "Target"},
    }.items(),
)
def test_a_room_offers_what_callers_need(room, names):
    """It exports the same objects as the package itself, and no other name."""
    module = importlib.import_module(f"snapengine.{room}")
    assert set(module.__all__) == names
    for name in names:
        assert getattr(module, name) is getattr(snapengine, name)
    assert not hasattr(module, "nothing")
