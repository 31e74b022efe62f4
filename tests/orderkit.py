"""The counterpart of targets/order.h: checks whether an image holds a prefix of the writes, and which."""

import numpy as np
from targetkit import COUNTERS, MEMORY, PAGES, VALUES, Target

from snapengine.image import open_image

MIB = 1 << 20
PAGE = 4096
STRIDES = (1, 40503)


class OrderTarget(Target):
    """``with OrderTarget(kind, threads, stride) as target``: writes in a known order."""

    def __init__(self, kind, threads, stride, size=16 * MIB, name="order", arguments=(), **popen):
        self.threads = threads
        self.stride = stride
        super().__init__(name, kind, threads, size // PAGE, stride, *arguments, **popen)

    @property
    def region(self):
        """The target's memory, in the form of the argument ``regions``."""
        start = self.words[MEMORY]
        return f"{start:x}-{start + self.words[PAGES] * PAGE:x}"

    def last_write(self):
        """A completed write. If no thread has run yet, it is the last write of the first round."""
        return max(self.words[PAGES], *self.words[COUNTERS : COUNTERS + self.threads])


def faults_of_order(memory, stride):
    """(M, inconsistent pages): M is the last write in the memory, which must hold all writes before M."""
    page_words = np.frombuffer(memory, dtype="<u8").reshape(-1, 512)
    first, last = page_words[:, 0].astype(np.int64), page_words[:, 511].astype(np.int64)
    pages = len(first)
    newest = int(first.max())
    inverse = pow(stride, -1, pages)
    numbers = np.arange(pages, dtype=np.int64) * inverse % pages  # writes into the page, modulo pages
    wanted = newest - (newest - numbers) % pages
    bad = (first != wanted) | (last != wanted)
    at = newest * stride % pages
    bad[at] = first[at] != newest or last[at] not in (newest, max(newest - pages, 0))
    return newest, np.flatnonzero(bad)


def check_order(path, target, low=0, high=None):
    """The image is a prefix of the writes, at least to `low`, at most to `high` and one more per thread."""
    with open_image(path) as image:
        image.verify()
        memory = image.read_at(target.words[MEMORY], target.words[PAGES] * PAGE)
        turn = int.from_bytes(image.read_at(target.words[VALUES], 8), "little")
    newest, bad = faults_of_order(memory, target.stride)
    assert not len(bad), (
        f"write {newest} is in the image, but {len(bad)} pages lack an earlier write: {bad[:5]}"
    )
    assert newest in (turn - 1, turn), "the mapping with the turn is from another instant"
    assert newest >= low
    assert high is None or newest <= high + target.threads
    return newest
