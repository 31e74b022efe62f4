"""Pause at T of a guest with a small hot set in a large memory: plain against two-step arming, alternated."""

import pytest
from benchkit import ROUNDS, Samples, size

import snapengine
from snapengine.guest.params import GuestParams
from snapengine.handover.peer import PeerTarget
from snapengine.options import MIB, Options

SIZE = size("ARMING_SIZE", "4G")
HOT = 32 * MIB
WAYS = ("plain", "two-step")
FLOORS = {"two_step_pause_ns": "plain_pause_ns", "two_step_arm_ns": "plain_arm_ns"}


@pytest.mark.timeout(300)
@pytest.mark.benchmark(group="arming")
def bench_hot_set_pause(benchmark, start_guest):
    params = GuestParams(size=SIZE, pattern="hot", hot_size=HOT, incompressible=True)
    _, socket = start_guest(params, None)
    samples = Samples()
    benchmark.extra_info.update(size=SIZE, hot=HOT, samples=samples, floors=FLOORS)

    def pause_ns(way):
        with snapengine.snapshot(PeerTarget(socket), "null:", Options(arming=way)) as capture:
            pass
        name = way.replace("-", "_")
        samples.note(**{f"{name}_pause_ns": capture.result.pause_ns, f"{name}_arm_ns": capture.result.arm_ns})
        return capture.result.pause_ns

    def alternate():
        plain, two_step = map(pause_ns, WAYS)
        samples.note(pause_ratio=two_step / plain)

    alternate()
    samples.clear()
    benchmark.pedantic(alternate, rounds=ROUNDS)
