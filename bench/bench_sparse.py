"""A sparse mapping: time of arming, and page tables that it adds."""

import pytest
from benchkit import KIB, MIB, ROUNDS, Samples, process_status, size, small_pages

import snapengine

SIZE = size("SPARSE_SIZE", "64G")
WRITTEN = size("SPARSE_WRITTEN", "256M")
RUN = 64 * KIB


@pytest.mark.timeout(300)
@pytest.mark.benchmark(group="sparse")
def bench_sparse(benchmark):
    """The written memory is in runs of 64 KiB, evenly spread."""
    memory = small_pages(SIZE)
    for start in range(0, SIZE, SIZE // (WRITTEN // RUN)):
        memory[start : start + RUN] = b"\x5a" * RUN
    samples = Samples()

    def save():
        tables, resident = process_status("VmPTE"), process_status("RssAnon")
        with snapengine.snapshot(snapengine.BufferTarget(memory), "null:") as capture:
            armed = process_status("VmPTE")
        ended = process_status("VmPTE")
        result = capture.result
        assert result.pages_saved == WRITTEN // 4096
        assert result.hole_pages == (SIZE - WRITTEN) // 4096
        del capture  # and its buffers
        assert process_status("RssAnon") - resident < 16 * MIB
        samples.note(arm_ns=result.arm_ns, capture_ns=result.duration_ns)
        samples.note(tables_before_bytes=tables, tables_added_bytes=max(armed, ended) - tables)

    benchmark.pedantic(save, rounds=ROUNDS)
    benchmark.extra_info.update(size=SIZE, written=WRITTEN, samples=samples)
