"""Run the inputs of the fuzzing corpus (fuzz/corpus) through their targets, without the fuzzer."""

import importlib.util
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parent.parent / "fuzz"
NAMES = sorted(path.name for path in FUZZ.glob("corpus/*"))


@pytest.fixture(scope="module")
def fuzz(repository):
    """fuzz/targets.py."""
    sys.path.insert(0, str(FUZZ))
    try:
        spec = importlib.util.spec_from_file_location("fuzz_targets", FUZZ / "targets.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(FUZZ))
    return module


def test_each_target_has_a_corpus(fuzz):
    assert sorted(fuzz.TARGETS) == NAMES
    assert sum(path.stat().st_size for path in FUZZ.glob("corpus/*/*")) < 300 << 10


@pytest.mark.parametrize("name", NAMES)
def test_the_corpus_breaks_no_invariant(fuzz, name):
    kept = [path.read_bytes() for path in sorted(FUZZ.glob(f"corpus/{name}/*"))]
    assert kept
    for data in [b"", *fuzz.seeds(name), *kept]:
        assert fuzz.TARGETS[name](data) is None


def test_a_broken_invariant_is_noticed(fuzz, monkeypatch):
    (sound,) = fuzz.seeds("threads")
    monkeypatch.setattr(fuzz, "pack_threads", lambda threads: b"other")
    with pytest.raises(AssertionError):
        fuzz.TARGETS["threads"](sound)


def test_another_error_than_the_documented_one_is_noticed(fuzz, monkeypatch):
    def parse(data):
        raise KeyError("x")

    monkeypatch.setattr(fuzz, "parse_offer", parse)
    with pytest.raises(KeyError):
        fuzz.TARGETS["handover"](fuzz.seeds("handover")[0])
