"""The product's targets and its Freezer, which wait for others as long as a test does."""

from waitkit import PATIENCE_S

from snapengine.handover import peer
from snapengine.process import freezer
from snapengine.process import target as process


class PeerTarget(peer.PeerTarget):
    """It waits for a peer that is started late."""

    def __init__(self, path, timeout=PATIENCE_S, step_timeout=PATIENCE_S, **more):
        super().__init__(path, timeout, step_timeout, **more)


class ProcessTarget(process.ProcessTarget):
    """It waits for threads that get no CPU."""

    def __init__(self, *arguments, deadline=PATIENCE_S, **more):
        super().__init__(*arguments, deadline=deadline, **more)


def Freezer(pid, deadline=PATIENCE_S):
    """It waits for threads that get no CPU."""
    return freezer.Freezer(pid, deadline=deadline)
