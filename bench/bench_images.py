"""Image size by write tracking and by dirty logging, over the guest's write rate and the sink's rate."""

import pytest
from benchkit import MIB, size

import snapengine
from snapengine.guest.params import GuestParams
from snapengine.guest.process import GuestProcess
from snapengine.handover.peer import PeerTarget
from snapengine.options import METHODS, WRITE_TRACKING

SIZE = size("SIZE", "128M")
FIGURES = (
    "image_bytes", "nonzero_bytes", "duplicate_pages", "rounds", "faults", "arm_ns", "stop_ns",
    "duration_ns", "spilled_bytes",
)  # fmt: skip


@pytest.fixture(scope="module", params=[0, 1000, 10_000, 50_000, None], ids=lambda rate: f"rate-{rate}")
def writing_guest(request, tmp_path_factory):
    """(Write rate, socket) of a running guest."""
    path = tmp_path_factory.mktemp("guest") / "socket"
    params = GuestParams(size=SIZE, zero_percent=20, hole_percent=10)
    with GuestProcess(path, params, request.param):
        yield request.param, str(path)


@pytest.mark.timeout(120)
@pytest.mark.benchmark(group="images")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sink_rate", [0, 200 * MIB, 50 * MIB], ids=lambda rate: f"sink-{rate // MIB}")
def bench_image(benchmark, writing_guest, sink_rate, method):
    write_rate, socket = writing_guest

    def save():
        target = PeerTarget(socket, method=method)
        options = {"rate_limit": sink_rate, "max_rounds": 12, "max_seconds": 15}
        with snapengine.snapshot(target, "null:", method=method, **options) as capture:
            pass
        return capture.result

    result = benchmark.pedantic(save, rounds=1)
    ratio = result.image_bytes / result.nonzero_bytes
    samples = {"ratio": [ratio]} | {name: [getattr(result, name)] for name in FIGURES}
    prefix = method.replace("-", "_")
    benchmark.extra_info.update(
        size=SIZE, method=method, write_rate=write_rate, sink_rate=sink_rate, status=result.status,
        samples={f"{prefix}_{name}": values for name, values in samples.items()},
    )  # fmt: skip
    if method == WRITE_TRACKING:
        assert result.duplicate_pages == 0
        assert SIZE < 64 * MIB or ratio <= 1.005  # fixed parts dominate a small image
