"""What the bench makes of its samples: rows and how they are judged, pictures, and the history of changes."""

import json

import history
import pytest
import report
from plot_rates import page_costs
from plot_stalls import shares
from plots import draw
from rows import GIB, Figure
from wanted import WANTED, sample_figures

NS = [1.0e6, 2.0e6, 3.0e6]


def bench(name, group="copy", **info):
    return {"name": name, "group": group, "extra_info": info}


def run(*benches):
    cpu = {"brand_raw": "A CPU", "count": 2}
    machine = {"cpu": cpu, "node": "a-host"}
    return {"datetime": "2026-01-02T03:04:05", "machine_info": machine, "benchmarks": list(benches)}


def own_buffer(size=GIB, ratios=(0.7, 1.1, 1.2)):
    samples = {"memcpy_ratio": list(ratios), "memcpy_ns": NS, "capture_ns": [2.0e6, 2.0e6, 2.0e6]}
    return bench("bench_copy_own_buffer", size=size, samples=samples)


@pytest.mark.parametrize(
    ("values", "at_least", "met"),
    [
        ([1, 2, 3], False, "yes"),
        ([1, 1, 1], False, "yes, aim"),
        ([2, 2, 9], False, "median only"),
        ([1, 1, 9], False, "median only, aim"),
        ([9, 9, 1], False, "no"),
        ([4, 5, 6], True, "yes"),
        ([1, 5, 6], True, "median only"),
    ],
)
def test_every_value_or_only_the_median(values, at_least, met):
    aim = 6 if at_least else 1
    figure = Figure("x", "must", values, "count", 3, at_least, aim="aim", aim_limit=aim)
    assert figure.met == met


def test_a_run_that_is_too_small_is_not_judged():
    (figure,) = sample_figures({"bench_copy_own_buffer": own_buffer(size=GIB // 2)["extra_info"]})
    assert figure.met == "-"


def test_what_is_only_aimed_at():
    assert Figure("x", "", [1, 2, 9], "count", 0, aim="≤ 3", aim_limit=3).met == "aim"
    assert Figure("x", "", [1, 4, 9], "count", 0, aim="≤ 3", aim_limit=3).met == "-"


def test_the_floor_is_divided_round_by_round():
    (figure,) = sample_figures({"bench_copy_own_buffer": own_buffer()["extra_info"]})
    assert figure.ratios == [2.0, 1.0, pytest.approx(2 / 3)]
    assert figure.met == "yes, aim"


def test_an_aim_can_be_a_multiple_of_the_floor():
    samples = {"stall_p99_ns": [1190.0] * 3, "floor_p99_ns": [1000.0] * 3}
    infos = {"bench_writer_stalls[large]": {"size": GIB, "samples": samples}}
    (figure,) = sample_figures(infos)
    assert figure.met == "yes, aim"
    samples["floor_p99_ns"] = [900.0] * 3
    assert sample_figures(infos)[0].met == "yes"


def test_variants_of_a_bench_have_a_row_each():
    info = {"size": GIB, "samples": {"zstd_ratio": [1.0]}}
    found = sample_figures({"bench_zstd_command[guest]": info, "bench_zstd_command[text]": info})
    assert [figure.name.rpartition(" ")[2] for figure in found] == ["[guest]", "[text]"]


def test_every_row_is_wanted_once():
    keys = [(wanted.bench, wanted.sample) for wanted in WANTED]
    assert len(keys) == len(set(keys))


def test_the_command_prints_one_table_and_joins_files(tmp_path, capsys):
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    first.write_text(json.dumps(run(own_buffer())))
    second.write_text(json.dumps(run(bench("bench_sparse", size=64 * GIB, samples={"arm_ns": [6e7]}))))
    assert report.main([str(first), str(second)]) == 0
    text = capsys.readouterr().out
    assert "memcpy / idle capture" in text
    assert "64 GiB sparse" in text
    assert "All samples" not in text
    assert report.main(["--json", str(first)]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["met"], row["median"], row["floor"]) == ("yes, aim", 1.1, "memcpy_ns")


def test_what_peers_did_is_in_the_table_too():
    def saved(total, longest):
        stalls = {"stall_longest_ns": longest, "stall_longest_after_t_ns": longest}
        return [{"total_ns": total, "stall_p99_ns": 10, **stalls}]

    ways = {"ours": saved(10, 5), "qemu-shape": saved(70, 5), "forkd-shape": saved(20, 500)}
    found = report.figures([bench("bench_peers[null]", "peers", size=GIB, sink="null", runs=ways)])
    assert [figure.values for figure in found] [:3] == [[7.0], [1.0], [0.01]]
    assert all(figure.met == "yes" for figure in found)


def test_a_page_costs_what_its_call_does_divided(tmp_path):
    samples = {"protect_64_pages_ns": [6400.0], "vm_read_1_page_rate": [4096e6], "other_ns": [1.0]}
    assert page_costs(samples, "protect") == [(64, [100.0])]
    assert page_costs(samples, "vm_read") == [(1, [pytest.approx(1000.0)])]
    assert page_costs(samples, "unprotect") == []


def test_buckets_without_a_stall_are_drawn_as_none():
    edges, heights = shares({1000: 3, 9000: 1})
    assert edges == [1000.0, 1125.0, 9000.0]
    assert heights == [0.75, 0.0, 0.25]


def test_pictures_of_what_there_is(tmp_path):
    histograms = {"ours": [[8000, 10], [9000, 1]], "floor": [[7000, 5]], "engine": []}
    work = {"at_ns": [-10_000_000, 0, 10_000_000], "writes": [5, 3, 5], "ended_ns": 10_000_000}
    benches = [
        bench("s", "stalls", size=GIB, samples={}, histograms=histograms),
        bench("w", "attach", size=GIB, samples={"attach_lost_ns": NS, "fork_lost_ns": NS},
              work={"attach": work, "fork": work}),
        bench("r", "scale", size=GIB, by_size={str(GIB): {"capture_ns": NS, "memcpy_ns": NS}}),
        bench("f", "floors", samples={"protect_1_page_ns": NS, "protect_64_pages_ns": NS}),
    ]  # fmt: skip
    names = [path.name for path in draw(benches, tmp_path)]
    assert names == ["stalls.png", "work.png", "sizes.png", "batches.png"]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names)
    assert list(draw([], tmp_path)) == []


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """A file of a run."""
    monkeypatch.setattr(history, "commit", lambda: "0123456789ab+")
    path = tmp_path / "run.json"
    ways = {"ours": [{"total_ns": total, "completed": True, "why": ""} for total in (5, 7)]}
    path.write_text(json.dumps(run(own_buffer(), bench("bench_peers[null]", "peers", size=GIB, runs=ways))))
    return path


def test_an_entry_keeps_four_numbers_and_no_host(measured, tmp_path):
    path = history.add("two-walkers", [measured], tmp_path / "history")
    assert path.name == "2026-01-02-two-walkers.json"
    entry = json.loads(path.read_text())
    assert entry["commit"] == "0123456789ab+"
    assert entry["cpu"] == "A CPU"
    kept = entry["benches"]["bench_copy_own_buffer"]
    assert kept["samples"]["memcpy_ns"] == {"median": 2e6, "min": 1e6, "max": 3e6, "n": 3}
    assert entry["benches"]["bench_peers[null]"]["samples"] == {
        "ours.total_ns": {"median": 6, "min": 5, "max": 7, "n": 2}
    }
    assert "a-host" not in path.read_text()
    assert str(tmp_path) not in path.read_text()


def test_a_name_is_a_word_and_taken_once(measured, tmp_path):
    for name in ("", "../x", "A b", "-x"):
        with pytest.raises(ValueError, match="small letters"):
            history.add(name, [measured], tmp_path / "history")
    history.add("once", [measured], tmp_path / "history")
    with pytest.raises(FileExistsError):
        history.add("once", [measured], tmp_path / "history")


def test_the_medians_over_the_entries(measured, tmp_path):
    folder = tmp_path / "history"
    for name in ("b-second", "a-first"):
        history.add(name, [measured], folder)
    rows = history.rows_of("memcpy_ns", folder=folder)
    assert [row[1] for row in rows] == ["a-first", "b-second"]
    assert rows[0][3:] == ("bench_copy_own_buffer", "2.00 ms", "1.00 ms .. 3.00 ms", "3")
    assert history.rows_of("memcpy_ns", "peers", folder=folder) == []


def test_the_commit_is_that_of_the_tree(repository):
    if not (repository / ".git").exists():
        pytest.skip("not a clone: the sources have no commit")
    assert len(history.commit().rstrip("+")) == 12
