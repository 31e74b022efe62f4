"""`--metrics FILE`: the figures of a capture for Prometheus."""

import os
import re
import subprocess
import sys

import pytest
from clikit import run
from prometheus_client.parser import text_string_to_metric_families
from streamkit import SOME_PAGES, stream
from targetkit import Target


def read(path):
    families = text_string_to_metric_families(path.read_text())
    return {(each.name, *each.labels.values()): each.value for family in families for each in family.samples}


def test_of_a_process(requires_uffd, tmp_path):
    path = tmp_path / "save.prom"
    path.write_text("old")
    with Target("compute", 1) as target:
        done = run("save", "--pid", str(target.pid), "--json", "--metrics", path, tmp_path / "image")
    assert done.returncode == 0
    found = read(path)
    assert found["snapengine_completed",] == 1
    assert found["snapengine_image_bytes",] == (tmp_path / "image").stat().st_size
    assert found["snapengine_end_timestamp_seconds",] > found["snapengine_instant_timestamp_seconds",] > 1e9
    assert found["snapengine_duration_seconds",] > 0
    assert found["snapengine_fault_wait_seconds", "1"] >= found["snapengine_fault_wait_seconds", "0.5"]
    assert sorted(os.listdir(tmp_path)) == ["image", "save.prom"]


def test_of_a_stream(tmp_path):
    (tmp_path / "stream").write_bytes(stream(SOME_PAGES))
    done = run("ingest", "--metrics", tmp_path / "m", tmp_path / "stream", tmp_path / "image")
    assert done.returncode == 0
    assert read(tmp_path / "m")["snapengine_instant_timestamp_seconds",] == 0


def test_a_capture_that_fails_leaves_the_file(tmp_path):
    (tmp_path / "stream").write_bytes(b"QEVM")
    (tmp_path / "m").write_text("old")
    assert run("ingest", "--metrics", tmp_path / "m", tmp_path / "stream", tmp_path / "image").returncode == 1
    assert (tmp_path / "m").read_text() == "old"


@pytest.mark.parametrize(("name", "words"), [("no/m", "there is no directory"), (".", "is a directory")])
def test_a_file_that_cannot_be_is_refused_at_once(tmp_path, name, words):
    done = run("ingest", "--metrics", f"{tmp_path}/{name}", "/nowhere", tmp_path / "image")
    assert done.returncode == 2
    assert re.search(words, done.stderr.decode())


def test_without_the_library(tmp_path):
    hidden = "import sys; sys.modules['prometheus_client'] = None\n"
    code = f"{hidden}import sys; from snapengine.cli import main; sys.exit(main(sys.argv[1:]))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, "ingest", "--metrics", tmp_path / "m", "/nowhere", "null:"]
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert done.returncode == 2
    assert b"pip install 'snapengine[metrics]'" in done.stderr
