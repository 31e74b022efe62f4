"""Everything that the CI calls exists: targets of the Makefile, scripts in .ci/, tests in the Makefile."""

import os
import re

import pytest

yaml = pytest.importorskip("yaml")

TARGET = re.compile(r"^([a-z][a-z-]*):", re.MULTILINE)
MAKE = re.compile(r"^\s*(?:\w+=\S+ )*make ([a-z][a-z -]*)", re.MULTILINE)
SCRIPT = re.compile(r"(?<![\w/])\.ci/[\w.-]+")


@pytest.fixture
def makefile(repository):
    return (repository / "Makefile").read_text()


@pytest.fixture
def jobs(repository):
    return yaml.safe_load((repository / ".github" / "workflows" / "ci.yml").read_text())["jobs"]


def commands(jobs):
    return [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]


def missing(text, makefile, repository):
    """The targets and scripts in a text that do not exist."""
    called = {target for line in MAKE.findall(text) for target in line.split()}
    scripts = {script for script in SCRIPT.findall(text) if not os.access(repository / script, os.X_OK)}
    return (called - set(TARGET.findall(makefile))) | scripts


def test_the_workflow_calls_what_is_there(jobs, makefile, repository):
    text = "\n".join(commands(jobs))
    assert "make test" in text
    assert not missing(text, makefile, repository)


def test_the_local_ci_calls_what_is_there(makefile, repository):
    text = (repository / ".ci" / "run").read_text()
    assert "make test" in text
    assert not missing(text, makefile, repository)


@pytest.mark.parametrize("command", ["make tests", "FUZZ=1 make fuzzy FUZZ_SECONDS=2", ".ci/nothing a"])
def test_what_is_not_there_is_told(makefile, repository, command):
    assert missing(f"set -e\n{command}\n", makefile, repository)


def test_every_step_runs_something_on_a_chosen_system(jobs):
    for name, job in jobs.items():
        assert job["timeout-minutes"] <= 60, name
        assert str(job["runs-on"]).startswith(("ubuntu-", "${{ matrix.os")), name
        assert all(("run" in step) != ("uses" in step) for step in job["steps"]), name


def test_the_makefile_names_tests_and_scripts_that_are_there(makefile, repository):
    named = {f"test_{name}" for line in re.findall(r"addprefix tests/test_,((?:.|\\\n)*?)\)", makefile)
             for name in line.replace("\\\n", " ").split()}  # fmt: skip
    assert len(named) > 10
    assert not {name for name in named if not (repository / "tests" / name).exists()}
    called = {script.rstrip(".") for script in SCRIPT.findall(makefile)}
    assert not {script for script in called if not (repository / script).exists()}
