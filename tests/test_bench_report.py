"""The report of the bench: figures, goals, tables, pictures and the history, computed from samples."""

import json

import figures
import history
import pytest
import report
from figures import Figure, summarize, to_bench
from goals import GIB, GOALS, Goal, Verdict, judge
from plot_rates import page_costs
from plot_stalls import shares
from plots import draw

NS = [1.0e6, 2.0e6, 3.0e6]


def bench(name, group="copy", **info):
    return {"name": name, "group": group, "extra_info": info}


def result(*benches):
    """A file as pytest-benchmark writes it, with the members that the report reads."""
    machine = {"cpu": {"brand_raw": "A CPU", "count": 2}, "node": "a-host", "release": "6.18.44-of-a-host"}
    commit = {"id": "0123456789abcdef", "dirty": True, "branch": "a-branch"}
    return {
        "datetime": "2026-01-02T03:04:05", "machine_info": machine, "commit_info": commit,
        "benchmarks": list(benches),
    }  # fmt: skip


def own_buffer(size=GIB, ratios=(0.7, 1.1, 1.2)):
    samples = {"memcpy_ratio": list(ratios), "memcpy_ns": NS, "capture_ns": [2.0e6, 2.0e6, 2.0e6]}
    floors = {"capture_ns": "memcpy_ns"}
    return bench("bench_copy_own_buffer", size=size, samples=samples, floors=floors)


def peers(sink="null"):
    def saved(total):
        return [{"total_ns": total + 1, "stall_p99_ns": 10}, {"total_ns": total - 1, "stall_p99_ns": 10}]

    runs = {"ours": saved(10), "qemu-shape": saved(70)}
    samples = {"qemu_shape_rate_ratio": [7.0, 7.5]}
    return bench(f"bench_peers[{sink}]", "peers", size=GIB, sink=sink, load=0.5, runs=runs, samples=samples)


def machine(name="bench_qemu[hot-127-sink-0]", completed=True):
    parts = {"stop": 1_000_000, "device_state": 2_000_000, "arm": 500_000, "cont": 100_000}
    ours = {
        "completed": completed, "why": "", "total_ns": 1e9, "stop_ns": 4e6, "image_bytes": GIB,
        "rate_before": 1000.0, "rate_during": 900.0, "lost_ns": 1e8, "gap_ns": 2e6, "gap_before_ns": 1e5,
        "bins": [1.0], "huge_ratio": 1.0, "stop_parts_ns": parts,
    }  # fmt: skip
    facts = {"hot": 127 << 20, "sink_rate": 0, "huge": True, "accel": "kvm", "version": "7.2.22", "load": 1.0}
    return bench(name, "qemu", size=GIB, runs={"ours": [ours]}, samples={"stop_ns": [4e6]}, **facts)


def image(method, **more):
    prefix = method.replace("-", "_")
    values = {"ratio": 1.001, "duplicate_pages": 0, "rounds": 1, "stop_ns": 1e6} | more
    samples = {f"{prefix}_{name}": [value] for name, value in values.items()}
    return bench(f"bench_image[{method}-{more}]", "images", size=GIB, method=method, write_rate=None,
                 sink_rate=0, status="completed", samples=samples)  # fmt: skip


@pytest.fixture
def write(tmp_path):
    """``write(*benches)``: the path of a result file."""

    def write(*benches, name="run.json"):
        path = tmp_path / name
        path.write_text(json.dumps(result(*benches)))
        return path

    return write


@pytest.fixture
def judged(write):
    """``judged(*benches)``: the verdicts on a run of them."""
    return lambda *benches: judge(figures.read_run(write(*benches)))


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
def test_every_round_or_only_the_median(values, at_least, met):
    goal = Goal("b", "x", "x", "must", 3, 0, at_least, aim="aim", aim_limit=6 if at_least else 1)
    figure = summarize("x", values)
    assert Verdict(goal, "", figure, figure, full_size=True).met == met


def test_a_run_that_is_too_small_is_not_judged(judged):
    (verdict,) = judged(own_buffer(size=GIB // 2))
    assert verdict.met == "-"


def test_what_is_only_aimed_at():
    goal = Goal("b", "x", "x", "", 0, 0, aim="≤ 3", aim_limit=3)
    for values, met in (([1, 2, 9], "aim"), ([1, 4, 9], "-")):
        figure = summarize("x", values)
        assert Verdict(goal, "", figure, figure, full_size=True).met == met


def test_the_floor_is_divided_round_by_round(judged):
    (verdict,) = judged(own_buffer())
    assert verdict.floored == Figure("ns", 2e6, 2e6, 2e6, 3, "memcpy_ns", 2e6, 1.0)
    assert summarize("x_ns", [1.0, 6.0, 9.0], "y_ns", [1.0, 2.0, 1.0]).floor_ratio == 3.0
    assert summarize("x_ns", [1.0, 6.0], "y_ns", [1.0]).floor_ratio is None
    assert verdict.met == "yes, aim"


def test_an_aim_can_be_a_multiple_of_the_floor(judged):
    def writer_stalls(floor):
        samples = {"stall_p99_ns": [1190.0] * 3, "floor_p99_ns": [floor] * 3}
        floors = {"stall_p99_ns": "floor_p99_ns"}
        return bench("bench_writer_stalls[large]", size=GIB, samples=samples, floors=floors)

    assert judged(writer_stalls(1000.0))[0].met == "yes, aim"
    assert judged(writer_stalls(900.0))[0].met == "yes"


def test_variants_of_a_bench_have_a_row_each(judged):
    info = {"size": GIB, "samples": {"zstd_ratio": [1.0]}}
    found = judged(bench("bench_zstd_command[guest]", **info), bench("bench_zstd_command[text]", **info))
    assert [verdict.name.rpartition(" ")[2] for verdict in found] == ["[guest]", "[text]"]


def test_image_sizes_are_judged_together(judged):
    ratio, twice = judged(
        image("write-tracking"), image("write-tracking", ratio=1.01), image("dirty-logging")
    )
    assert (ratio.figure.max, ratio.figure.n, ratio.met) == (1.01, 2, "no")
    assert (twice.figure.max, twice.met) == (0, "yes")


def test_every_goal_is_there_once():
    keys = [(goal.bench, goal.sample) for goal in GOALS]
    assert len(keys) == len(set(keys))


def test_a_bench_of_ways_has_the_figures_of_each():
    found = to_bench("b", machine(completed=False)["extra_info"])
    assert found.figures["ours.completed"].median == 0
    assert found.figures["ours.stop_parts.arm_ns"] == Figure("ns", 500_000, 500_000, 500_000, 1)
    assert "ours.bins" not in found.figures
    assert found.facts["version"] == "7.2.22"


def test_the_command_joins_files(write, capsys):
    first = write(own_buffer(), name="a.json")
    second = write(bench("bench_sparse", size=64 * GIB, samples={"arm_ns": [6e7]}), name="b.json")
    assert report.main([str(first), str(second)]) == 0
    text = capsys.readouterr().out
    assert "memcpy / idle capture" in text
    assert "64 GiB sparse" in text
    assert "All figures" not in text
    assert "commit 0123456789ab+; A CPU, 2 CPUs, Linux 6.18.44" in text


def test_what_each_make_target_wrote_has_its_tables(write, capsys):
    path = write(peers(), machine(), machine("bench_qemu_small_pages", completed=False),
                 image("write-tracking"), image("dirty-logging", ratio=2.5))  # fmt: skip
    assert report.main([str(path), "--all"]) == 0
    text = capsys.readouterr().out
    for title in (
        "Peers",
        "QEMU machines",
        "Parts of our stop",
        "Image / non-zero bytes",
        "All figures",
        "Goals",
    ):
        assert f"\n{title}" in text
    assert "hot set 127 MiB, sink no limit" in text
    assert "gave up" in text
    assert "guest stopped, huge pages" in text
    assert "QEMU 7.2.22 (kvm)" in text
    assert "load 0.5 to 1.0" in text


def test_figures_for_programs(write, capsys):
    assert report.main(["--json", str(write(own_buffer()))]) == 0
    found = json.loads(capsys.readouterr().out)
    (goal,) = found["goals"]
    assert (goal["met"], goal["median"], goal["floor"]) == ("yes, aim", 1.1, "memcpy_ns")
    assert found["benches"]["bench_copy_own_buffer"]["figures"]["capture_ns"]["floor_ratio"] == 1.0


def test_files_that_cannot_be_reported(write, tmp_path, capsys, monkeypatch):
    (tmp_path / "other.json").write_text("{}")
    path = str(write(own_buffer()))
    for arguments, message in (
        ([str(tmp_path / "other.json")], "neither a result of `make bench` nor an entry"),
        ([path, path], "bench_copy_own_buffer: in two of the files"),
        ([str(tmp_path / "none.json")], "No such file"),
    ):
        with pytest.raises(SystemExit):
            report.main(arguments)
        assert message in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        report.main([])
    assert "run `make bench`" in capsys.readouterr().err


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
    benches += [image("write-tracking"), image("dirty-logging")]
    names = [path.name for path in draw(benches, tmp_path)]
    assert names == ["images.png", "stalls.png", "work.png", "sizes.png", "batches.png"]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names)
    assert list(draw([], tmp_path)) == []


@pytest.fixture
def measured(write):
    """A file of a run."""
    return write(own_buffer(), peers())


def test_an_entry_keeps_medians_and_no_host(measured, tmp_path):
    path = history.add("two-walkers", [measured], tmp_path / "history")
    assert path.name == "2026-01-02-two-walkers.json"
    entry = json.loads(path.read_text())
    assert entry["commit"] == "0123456789ab+"
    assert entry["machine"] == {
        "cpu": "A CPU", "cpus": 2, "kernel": "6.18.44", "memory_bytes": entry["machine"]["memory_bytes"],
    }  # fmt: skip
    kept = entry["benches"]["bench_copy_own_buffer"]["figures"]
    assert kept["memcpy_ns"] == {"unit": "ns", "median": 2e6, "min": 1e6, "max": 3e6, "n": 3}
    floor = {"floor": "memcpy_ns", "floor_median": 2e6, "floor_ratio": 1}
    assert kept["capture_ns"] == {"unit": "ns", "median": 2e6, "min": 2e6, "max": 2e6, "n": 3} | floor
    assert entry["benches"]["bench_peers[null]"]["figures"]["ours.total_ns"] == {
        "unit": "ns", "median": 10, "min": 9, "max": 11, "n": 2,
    }  # fmt: skip
    text = path.read_text()
    for private in ("a-host", "a-branch", str(tmp_path)):
        assert private not in text
    assert sum('"median"' in line for line in text.splitlines()) == text.count('"median"')


def test_an_entry_reads_back_as_what_was_measured(measured, tmp_path, capsys):
    path = history.add("once", [measured], tmp_path / "history")
    assert figures.read_run(path).benches == figures.read_run(measured).benches
    tables = []
    for file in (measured, path):
        assert report.main([str(file), "--all"]) == 0
        tables.append(capsys.readouterr().out.partition("2026-01-02, commit")[0])
    assert tables[0] == tables[1]


def test_a_name_is_a_word_and_taken_once(measured, tmp_path):
    for name in ("", "../x", "A b", "-x"):
        with pytest.raises(ValueError, match="small letters"):
            history.add(name, [measured], tmp_path / "history")
    history.add("once", [measured], tmp_path / "history")
    with pytest.raises(FileExistsError):
        history.add("once", [measured], tmp_path / "history")


def test_two_entries_side_by_side(write, tmp_path, capsys):
    folder = tmp_path / "history"
    history.add("before", [write(own_buffer(), peers())], folder)
    twice = own_buffer()
    twice["extra_info"]["samples"]["capture_ns"] = [4.0e6] * 3
    old = history.find("before", folder)
    new = history.find(str(write(twice)), folder)
    (row,) = history.common_figures(old, new, "own_buffer.capture_ns")
    assert (row[0], row[1], row[2].median, row[3].median) == ("copy_own_buffer", "capture_ns", 2e6, 4e6)
    assert {bench for bench, *_ in history.common_figures(old, new)} == {"copy_own_buffer"}
    table = history.compare_table(old, new, "own_buffer.capture_ns")
    assert list(table.columns[-1].cells) == ["2.00"]
    assert list(history.list_table(folder).columns[0].cells) == ["before"]
    with pytest.raises(ValueError, match="neither an entry"):
        history.find("none", folder)
    (path,) = folder.iterdir()
    assert history.main(["compare", str(path), str(path), "--match", "qemu-shape.total"]) == 0
    assert "before (0123456789ab+) and before" in capsys.readouterr().out


def test_the_kept_entries_can_be_read(repository):
    paths = sorted((repository / "bench/history").glob("*.json"))
    assert paths
    for path in paths:
        run = figures.read_run(path)
        assert path.name == f"{run.date}-{run.name}.json"
        assert judge(run)
