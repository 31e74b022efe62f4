"""A sink that the test can block: while its gate is closed, a capture can only fill its buffers."""

import os
import threading

from waitkit import PATIENCE_S

from snapengine.storage.sink import NO_DESCRIPTOR
from snapengine.storage.sinks import FileSink

MIB = 1 << 20


class GatedFile(FileSink):
    """A file that accepts its first MiB, and the rest once `gate` is open."""

    def __init__(self, path):
        super().__init__(path)
        self.gate = threading.Event()
        self._taken = 0
        self._file, self.fd = self.fd, NO_DESCRIPTOR

    def write(self, data):
        if self._taken > MIB:
            assert self.gate.wait(PATIENCE_S), "nobody opened the gate"
        self._taken += len(data)
        view = memoryview(data).cast("B")
        while view:
            view = view[os.write(self._file, view) :]

    def _commit(self):
        self.fd = self._file
        super()._commit()

    def _abort(self):
        self.fd = self._file
        super()._abort()
