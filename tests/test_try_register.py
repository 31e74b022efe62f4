"""Registering many regions at once refuses what one call for each refuses."""

import ctypes
import errno
import mmap

import pytest

from snapengine.kernel.procmaps import read_maps
from snapengine.kernel.uffd import FEATURES, Uffd
from snapengine.process.try_register import refusal, refused_regions
from snapengine.regions import Region

pytestmark = pytest.mark.usefixtures("requires_uffd")

PAGE = 4096
PIECES = 12

munmap = ctypes.CDLL(None, use_errno=True).munmap
munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


@pytest.fixture
def memory():
    """Every second page of a mapping; its address."""
    size = 2 * PIECES * PAGE
    whole = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    addr = ctypes.addressof(ctypes.c_char.from_buffer(whole))
    for number in range(PIECES):
        assert munmap(addr + (2 * number + 1) * PAGE, PAGE) == 0
    return addr, whole


def regions_of(addr):
    return [Region(f"r{i}", addr + 2 * i * PAGE, PAGE) for i in range(PIECES)]


def uffd():
    return Uffd(FEATURES["PAGEFAULT_FLAG_WP"])


def registered(one, regions):
    """The regions that are registered: those that can be protected."""
    found = []
    for region in regions:
        try:
            one.protect(region.addr, region.length)
        except FileNotFoundError:
            continue
        one.unprotect(region.addr, region.length)
        found.append(region)
    return found


@pytest.fixture(params=["runs", "stopped"])
def how(request):
    """The arguments for a running target, and for a stopped one."""
    if request.param == "runs":
        with open("/proc/self/maps", "rb", buffering=0) as maps:
            yield lambda: (maps.fileno(), None)
    else:
        yield lambda: (-1, read_maps())


def call(one, how, regions):
    maps, mappings = how()
    return refused_regions(one, maps, regions, mappings)


def test_all_are_taken(memory, how):
    regions = regions_of(memory[0])
    with uffd() as one:
        assert call(one, how, regions) == []
        assert registered(one, regions) == regions


def test_what_is_tracked_already_is_refused_alone(memory, how):
    regions = regions_of(memory[0])
    with uffd() as other, uffd() as one:
        other.register(regions[4].addr, PAGE)
        other.register(regions[11].addr, PAGE)
        assert call(one, how, regions) == [regions[4], regions[11]]
        assert refusal(one, -1, regions[4].addr, regions[4].addr + PAGE) == errno.EBUSY
        other.close()  # closing it ends its registrations, so that those of `one` can be listed
        assert registered(one, regions) == regions[:4] + regions[5:11]


def test_what_lies_between_is_let_alone(memory, how):
    """Memory between regions was not selected, or is not a region."""
    regions = regions_of(memory[0])
    left_out = regions[3:6] + regions[9:10]
    wanted = [region for region in regions if region not in left_out]
    with uffd() as one:
        assert call(one, how, wanted) == []
        assert registered(one, regions) == wanted


def test_what_has_gone(memory):
    """Nothing is mapped there: EINVAL, as for memory that the kernel does not track."""
    regions = regions_of(memory[0])
    assert munmap(regions[5].addr, PAGE) == 0
    with uffd() as one, open("/proc/self/maps", "rb", buffering=0) as maps:
        assert refused_regions(one, maps.fileno(), regions) == [regions[5]]
        assert registered(one, regions) == regions[:5] + regions[6:]


def test_what_has_grown_is_registered_as_a_whole(memory):
    whole = mmap.mmap(-1, 4 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole.madvise(mmap.MADV_DONTFORK)  # so that it is a mapping of its own
    addr = ctypes.addressof(ctypes.c_char.from_buffer(whole))
    all_of_it = Region("all", addr, 4 * PAGE)
    with uffd() as one, open("/proc/self/maps", "rb", buffering=0) as maps:
        assert refused_regions(one, maps.fileno(), [Region("known", addr + PAGE, PAGE)]) == []
        assert registered(one, [all_of_it]) == [all_of_it]
        assert len([m for m in read_maps() if addr <= m.start < addr + 4 * PAGE]) == 1


def test_no_regions(how):
    with uffd() as one:
        assert call(one, how, []) == []
