"""The product's targets and its Freezer, with time limits as long as those of a test."""

from waitkit import PATIENCE_S

from snapengine.handover import peer
from snapengine.process import freezer
from snapengine.process import target as process


class PeerTarget(peer.PeerTarget):
    """Also waits for a peer that is started late."""

    def __init__(self, path, timeout=PATIENCE_S, step_timeout=PATIENCE_S, **more):
        super().__init__(path, timeout, step_timeout, **more)


class ProcessTarget(process.ProcessTarget):
    """Also waits for threads that get no CPU."""

    def __init__(self, *arguments, deadline=PATIENCE_S, **more):
        super().__init__(*arguments, deadline=deadline, **more)


def Freezer(pid, deadline=PATIENCE_S):
    """Also waits for threads that get no CPU."""
    return freezer.Freezer(pid, deadline=deadline)
