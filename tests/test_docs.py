"""The documentation: links resolve, commands parse, and generated parts and lists agree with the sources."""

import importlib.util
import re
import shlex

import pytest

from snapengine.cli import command
from snapengine.cli.command import COMMANDS

README_WORDS = 900
FENCE = re.compile(r"^ *```(\w*)[^\n]*\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
SOURCE = re.compile(r"`((?:pyx|snapengine|tests|bench|fuzz|docs|examples|\.ci)/[\w.*/-]+\.\w+)")
LINK = re.compile(r"\]\(([^)\s]+)\)")
WORD_HOLDERS = (
    "snapengine/base/nofault.pxd", "pyx/base/nofault_impl.h", "snapengine/base/workers.py",
    "snapengine/pipeline/encoder.pxd", "snapengine/pipeline/pool.pxd", "snapengine/process/stop_threads.pxd",
)  # fmt: skip
"""Files beside the engine that declare words which threads share."""
OUR_FOLDERS = ("docs", "examples", "bench", "tests", "fuzz")


def pages(repository):
    """Every Markdown file of the project."""
    found = sorted(repository.glob("*.md"))
    for folder in OUR_FOLDERS:
        found += sorted((repository / folder).rglob("*.md"))
    return [path for path in found if ".venv" not in path.parts]


def load(repository, name):
    """Load a generator of docs/, which is not an installed package."""
    path = repository / "docs" / "generators" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"docs_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def console_lines(text):
    """The commands of the console blocks: the text behind a dollar sign."""
    for language, block in FENCE.findall(text):
        if language == "console":
            yield from (line.strip()[2:] for line in block.splitlines() if line.strip().startswith("$ "))


def snapengine_commands(text):
    """The arguments of each `snapengine` in the console blocks, also behind a pipe."""
    for line in console_lines(text):
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&<>")
        lexer.whitespace_split = True
        command = []
        for word in [*lexer, "&&"]:
            if set(word) <= set("|&<>"):
                if command[:1] == ["snapengine"]:
                    yield command[1:]
                command = []
            else:
                command.append(word)


def parse(arguments):
    """Parse as the command does. SystemExit: a usage error."""
    if arguments[:1] == ["guest"]:
        from snapengine.guest.main import add_arguments
        from snapengine.report.terminal import Parser

        parser = Parser(prog="snapengine guest")
        add_arguments(parser)
        return parser.parse_args(arguments[1:])
    return command.parse(arguments)


def broken_links(path):
    """The relative links of a page whose files do not exist."""
    text = FENCE.sub("", path.read_text())
    for link in LINK.findall(text):
        target = link.partition("#")[0]
        if target and ":" not in target and not (path.parent / target).exists():
            yield link


def test_the_readme_is_short(repository):
    assert len((repository / "README.md").read_text().split()) <= README_WORDS


def test_relative_links_resolve(repository):
    found = pages(repository)
    assert len(found) > 40
    broken = {str(path): list(broken_links(path)) for path in found}
    assert not {path: links for path, links in broken.items() if links}


def test_files_of_the_sources_that_pages_name_exist(repository):
    found = {
        (str(page.relative_to(repository)), name)
        for page in pages(repository)
        if page.name != "CHANGELOG.md" and "bench" not in page.parts
        for name in SOURCE.findall(page.read_text())
    }
    assert len(found) > 60
    assert not {(page, name) for page, name in found if not list(repository.glob(name))}


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("[a](page.md#there) [b](absent.md) [c](https://example.org)\n```\n[d](in-code.md)\n```\n")
    assert list(broken_links(page)) == ["absent.md"]


def test_commands_parse(repository):
    parsed = 0
    for path in pages(repository):
        for arguments in snapengine_commands(path.read_text()):
            try:
                parse(arguments)
            except SystemExit as stop:
                if stop.code:
                    pytest.fail(f"{path}: snapengine {shlex.join(arguments)}")
            parsed += 1
    assert parsed > 30
    assert len(list(snapengine_commands((repository / "README.md").read_text()))) >= 5


def test_a_wrong_command_is_found(capsys):
    text = "```console\n$ snapengine save --no-such-option x.img | cat   # as it was\n$ ls\n```\n"
    (arguments,) = snapengine_commands(text)
    assert arguments == ["save", "--no-such-option", "x.img"]
    with pytest.raises(SystemExit):
        parse(arguments)
    assert "snapengine save" in capsys.readouterr().err


def test_make_targets_exist(repository):
    makefile = (repository / "Makefile").read_text()
    named = {
        line.split()[1]
        for path in pages(repository)
        for line in console_lines(path.read_text())
        if line.startswith("make ")
    }
    assert named >= {"docs", "demo", "test", "lint"}
    assert not {name for name in named if f"\n.PHONY: {name}\n" not in makefile}


def test_the_reference_of_the_command_is_complete(repository):
    text = load(repository, "cli").render()
    for name in COMMANDS:
        assert f"## `snapengine {name}`" in text, name
    for name in ("save", "restore", "analyze"):
        assert f"## `snapengine qemu {name}`" in text
    for option in ("--cut", "--via-migration", "--block-snapshot", "--hot-size", "--timeout"):
        assert re.search(rf"^\| `{option}[ `]", text, re.MULTILINE), option
    assert text.count("exit codes:\n  0    done") == 1


def test_the_page_of_the_rooms_is_complete(repository):
    rooms = load(repository, "rooms")
    text = rooms.render()
    assert set(rooms.QUESTIONS) == set(rooms.allowed())
    for room in rooms.allowed():
        assert f"\n## {room}\n" in text
        assert rooms.modules(room)
        assert not [name for name in rooms.modules(room) if not rooms.summary(name)]


def test_the_table_of_shared_words_names_words_of_the_sources(repository):
    page = (repository / "docs" / "how" / "threads.md").read_text()
    table = page.partition("## Shared words")[2]
    rows = re.findall(r"^\| ([^|]*`[^|]*)\|", table, re.MULTILINE)
    words = {word for row in rows for word in row.split("`")[1::2]}
    assert len(words) > 30
    holders = [*WORD_HOLDERS, *(repository / "snapengine" / "engine").glob("*.pxd")]
    known = set(re.findall(r"\w+", " ".join((repository / path).read_text() for path in holders)))
    parts = {part for word in words for part in re.split(r"[./*]+", word) if part}
    missing = parts - known
    assert not missing


def test_the_site_needs_no_network(repository):
    """The build fetches nothing, and no page loads a script or a font from another site."""
    text = (repository / "docs" / "conf.py").read_text()
    assert not re.search(r"intersphinx|linkcheck|https?://", text)


def test_every_page_is_in_the_index(repository):
    docs = repository / "docs"
    listed = set(re.findall(r"^([\w/-]+)$", (docs / "index.md").read_text(), re.MULTILINE))
    there = {str(path.relative_to(docs).with_suffix("")) for path in docs.rglob("*.md")} - {"index"}
    assert there == listed


