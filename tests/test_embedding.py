"""A Cython and a C embedder build and run against the installed package, with the sources absent."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EMBED = Path(__file__).parent / "embed"

pytestmark = [pytest.mark.slow_build, pytest.mark.timeout(900)]

PRELUDE = """
import json, os, snapengine, c_consumer, cython_consumer
from snapengine.image import open_image

def runs(fd):
    "The byte that fills each page of the image in `fd`; 0 for a zero page or a hole."
    with open_image(os.fdopen(os.dup(fd), "rb")) as image:
        image.verify()
        region, = image.regions
        content = image.read(region, 0, region.length)
    pages = [content[at:at + 4096] for at in range(0, len(content), 4096)]
    assert all(page.count(page[0]) == len(page) for page in pages)
    return [page[0] for page in pages]
"""


@pytest.fixture(scope="module")
def embedder(installed, tmp_path_factory):
    """A function that runs Python code beside the built consumers, and returns its output."""
    room = tmp_path_factory.mktemp("embed")
    shutil.copytree(EMBED, room, dirs_exist_ok=True)
    # PYTHONPATH has precedence over site-packages and the finder of an editable install.
    env = os.environ | {"PYTHONPATH": str(installed)}

    def run(*arguments):
        done = subprocess.run(
            [sys.executable, *arguments], cwd=room, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    run("setup.py", "-q", "build_ext", "--inplace")
    return run


@pytest.fixture
def value(embedder):
    """A function that runs code after the prelude and returns the value of its last expression."""

    def run(code):
        *lines, last = code.strip().splitlines()
        return json.loads(embedder("-c", PRELUDE + "\n".join([*lines, f"print(json.dumps(({last})))"])))

    return run


def test_the_package_is_the_installed_one(embedder, installed):
    where = embedder("-c", "import snapengine; print(snapengine.__file__)")
    assert Path(where).parent.parent == installed


def test_a_cython_embedder(value):
    # RFC 3720, B.4: 32 bytes of zeros.
    assert value("cython_consumer.checksum(bytes(32))") == 0x8A9136AA
    assert value("cython_consumer.claims()") == [0xFF, 0xF00]
    assert value("[cython_consumer.is_zero(bytes(4095) + last) for last in (b'\\0', b'1')]") == [True, False]


def test_a_cython_embedder_protects_by_itself(requires_uffd, value):
    assert value("cython_consumer.protect_nothing()") == errno.ENOENT


def test_a_cython_embedder_takes_a_snapshot(requires_uffd, value):
    (saved, image_bytes), pages = value("""
fd = os.memfd_create("image")
figures = cython_consumer.snapshot(fd, 1000)
figures, runs(fd)
""")
    assert pages == [1 + page % 200 for page in range(1000)]
    assert saved == 1000
    assert image_bytes < 1000 * 4096 / 10, "compression was asked for"


def test_the_capsule(value):
    assert value("c_consumer.version()") == 1


def test_the_primitives(value):
    # RFC 3720: the check value of CRC-32C.
    assert value("c_consumer.primitives()") == [0, 1, 0, 0xE3069283]


@pytest.mark.parametrize("own_thread", [True, False])
@pytest.mark.parametrize("malloc", [True, False])
def test_a_c_embedder_takes_a_snapshot(requires_uffd, value, malloc, own_thread):
    figures, pages = value(f"""
fd = os.memfd_create("image")
figures = c_consumer.snapshot(fd, 600, malloc={malloc}, own_thread={own_thread})
figures, runs(fd)
""")
    assert figures["err"] == 0, figures
    if malloc:  # malloc's block begins inside a page: the image holds its bytes, in slices of 4096
        assert figures["pages_total"] == 601
    else:
        assert figures["pages_total"] == 600
        assert figures["pages_saved"] == figures["hole_pages"] == 300
    assert pages == [0 if page % 2 else 1 + page % 200 for page in range(600)]


def test_a_file_descriptor_and_a_pause(requires_uffd, value, tmp_path):
    figures, pages = value(f"""
fd = os.open({str(tmp_path / "image")!r}, os.O_RDWR | os.O_CREAT)
figures = c_consumer.snapshot(fd, 64, pauses=1)
figures, runs(fd)
""")
    assert figures["err"] == 0, figures
    assert figures["pauses"] == 1
    assert pages[:3] == [1, 0, 3]
    assert figures["image_bytes"] == (tmp_path / "image").stat().st_size


def test_dirty_logging_gives_the_state_at_the_end(requires_uffd, value):
    figures, pages = value("""
fd = os.memfd_create("image")
figures = c_consumer.snapshot(fd, 64, method=1, pauses=1)
figures, runs(fd)
""")
    assert figures["err"] == 0, figures
    assert figures["pauses"] == 1
    # The consumer writes once after the start. The end may come before, during or after that write.
    assert all(page in (255, 0 if number % 2 else 1 + number) for number, page in enumerate(pages))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("-1, 8", "fd: -1 is not a descriptor"),
        ("9999, 8", "Bad file descriptor"),
        ("fd, 8, method=7", "method 7 is unknown"),
        ("fd, 8, zstd=99", "level 99"),
        ("fd, 8, memory_limit=4096", "memory_limit"),
        ("fd, 8, method=1", "pause"),
        ("fd, 8, pauses=-1", "pause: the callback failed"),
    ],
)
def test_a_refusal_has_a_text(requires_uffd, value, arguments, text):
    figures = value(f"""
fd = os.memfd_create("image")
c_consumer.snapshot({arguments})
""")
    assert figures["err"] == -1
    assert text in figures["text"]


def test_cancel(requires_uffd, value):
    figures = value("c_consumer.snapshot(os.memfd_create('image'), 20000, cancel=True)")
    assert figures["err"] in (0, errno.ECANCELED), figures
    assert figures["err"] == 0 or "cancelled" in figures["text"]


def test_an_unknown_option_is_refused(requires_uffd, value):
    started, text = value("c_consumer.snapshot(os.memfd_create('image'), 8, newer=1)")
    assert not started
    assert "does not know" in text


def test_an_older_result_is_not_overrun(requires_uffd, value):
    err, image_bytes, behind = value("c_consumer.short_result(os.memfd_create('image'))")
    assert err == 0
    assert image_bytes > 16 * 4096
    assert behind == 0x5A5A5A5A5A5A5A5A
