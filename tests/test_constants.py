"""Our constants equal the kernel's: compared with the headers of this host and with the kernel's UAPI."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import snapengine
from snapengine.kernel.pagemap import CATEGORIES, CHECK_WPASYNC, WP_MATCHING
from snapengine.kernel.uffd import FEATURES, MODE_MINOR, MODE_MISSING, MODE_WP

# include/uapi/linux/userfaultfd.h and fs.h of Linux 6.12; each comment names the first version that has it.
KERNEL = {
    "UFFD_API": 0xAA,
    "UFFDIO_API": 0xC018AA3F,
    "UFFDIO_REGISTER": 0xC020AA00,
    "UFFDIO_UNREGISTER": 0x8010AA01,
    "UFFDIO_WAKE": 0x8010AA02,
    "UFFDIO_COPY": 0xC028AA03,
    "UFFDIO_ZEROPAGE": 0xC020AA04,
    "UFFDIO_WRITEPROTECT": 0xC018AA06,  # 5.7
    "UFFDIO_CONTINUE": 0xC020AA07,  # 5.13
    "UFFDIO_POISON": 0xC020AA08,  # 6.6
    "USERFAULTFD_IOC_NEW": 0xAA00,  # 6.1
    "UFFDIO_REGISTER_MODE_MISSING": 1,
    "UFFDIO_REGISTER_MODE_WP": 2,
    "UFFDIO_REGISTER_MODE_MINOR": 4,  # 5.13
    "UFFDIO_WRITEPROTECT_MODE_WP": 1,
    "UFFDIO_COPY_MODE_DONTWAKE": 1,
    "UFFDIO_COPY_MODE_WP": 2,  # 5.7
    "UFFDIO_ZEROPAGE_MODE_DONTWAKE": 1,
    "UFFDIO_CONTINUE_MODE_DONTWAKE": 1,  # 5.13
    "UFFDIO_CONTINUE_MODE_WP": 2,  # 6.4
    "UFFDIO_POISON_MODE_DONTWAKE": 1,  # 6.6
    "UFFD_FEATURE_PAGEFAULT_FLAG_WP": 1 << 0,
    "UFFD_FEATURE_EVENT_FORK": 1 << 1,
    "UFFD_FEATURE_EVENT_REMAP": 1 << 2,
    "UFFD_FEATURE_EVENT_REMOVE": 1 << 3,
    "UFFD_FEATURE_MISSING_HUGETLBFS": 1 << 4,
    "UFFD_FEATURE_MISSING_SHMEM": 1 << 5,
    "UFFD_FEATURE_EVENT_UNMAP": 1 << 6,
    "UFFD_FEATURE_MINOR_HUGETLBFS": 1 << 9,  # 5.13
    "UFFD_FEATURE_MINOR_SHMEM": 1 << 10,  # 5.14
    "UFFD_FEATURE_WP_HUGETLBFS_SHMEM": 1 << 12,  # 5.19
    "UFFD_FEATURE_WP_UNPOPULATED": 1 << 13,  # 6.4
    "UFFD_FEATURE_POISON": 1 << 14,  # 6.6
    "UFFD_FEATURE_WP_ASYNC": 1 << 15,  # 6.7
    "UFFD_EVENT_PAGEFAULT": 0x12,
    "UFFD_EVENT_FORK": 0x13,
    "UFFD_EVENT_REMAP": 0x14,
    "UFFD_EVENT_REMOVE": 0x15,
    "UFFD_EVENT_UNMAP": 0x16,
    "UFFD_PAGEFAULT_FLAG_WP": 2,
    "UFFD_PAGEFAULT_FLAG_MINOR": 4,  # 5.13
    "PAGEMAP_SCAN": 0xC0606610,  # 6.7, like all below
    "PAGE_IS_WRITTEN": 1 << 1,
    "PAGE_IS_FILE": 1 << 2,
    "PAGE_IS_PRESENT": 1 << 3,
    "PAGE_IS_SWAPPED": 1 << 4,
    "PAGE_IS_PFNZERO": 1 << 5,
    "PAGE_IS_HUGE": 1 << 6,
    "PM_SCAN_WP_MATCHING": 1 << 0,
    "PM_SCAN_CHECK_WPASYNC": 1 << 1,
    "PROCMAP_QUERY": 0xC0686611,  # 6.11
    "PAGE_IS_GUARD": 1 << 8,  # 6.15
}
SIZES = {
    "struct uffd_msg": 32,
    "struct uffdio_api": 24,
    "struct uffdio_range": 16,
    "struct uffdio_register": 32,
    "struct uffdio_writeprotect": 24,
    "struct uffdio_copy": 40,
    "struct uffdio_zeropage": 32,
    "struct uffdio_continue": 32,  # 5.13
    "struct uffdio_poison": 32,  # 6.6
    "struct page_region": 24,  # 6.7
    "struct pm_scan_arg": 96,  # 6.7
    "struct procmap_query": 104,  # 6.11
}
# #ifdef cannot test for a struct, but for its ioctl.
NEWEST = {
    "struct uffdio_poison": "UFFDIO_POISON",
    "struct page_region": "PAGEMAP_SCAN",
    "struct pm_scan_arg": "PAGEMAP_SCAN",
    "struct procmap_query": "PROCMAP_QUERY",
}


def program(includes, host_only):
    """C that prints every name and value that exists."""
    lines = [*(f"#include <{name}>" for name in includes), "#include <stdio.h>", "int main(void) {"]
    for name in KERNEL:
        lines += [f"#ifdef {name}", f'printf("%s=%llu\\n", "{name}", (unsigned long long){name});', "#endif"]
    for name in SIZES:
        guard = NEWEST.get(name, "UFFD_API") if host_only else "UFFD_API"
        lines += [f"#ifdef {guard}", f'printf("%s=%zu\\n", "{name}", sizeof({name}));', "#endif"]
    return "\n".join([*lines, "return 0; }", ""])


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    """``values(includes, host_only)``: the values that a compiled C program prints."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler, "no C compiler"
    room = tmp_path_factory.mktemp("constants")

    def run(includes, host_only):
        (room / "show.c").write_text(program(includes, host_only))
        paths = [] if host_only else [f"-I{path}" for path in snapengine.get_include()]
        command = [compiler, "-w", *paths, "-o", str(room / "show"), str(room / "show.c")]
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        assert built.returncode == 0, built.stderr
        out = subprocess.run([str(room / "show")], capture_output=True, text=True, check=True).stdout
        return {name: int(value) for name, value in (line.rsplit("=", 1) for line in out.splitlines())}

    return run


def test_the_headers_of_this_host_agree(values):
    """The host's headers alone, without ours: their values must equal those in this file."""
    host = values(["linux/userfaultfd.h", "linux/fs.h"], True)
    assert len(host) >= 30, "even the oldest headers we build with (6.1) have most of them"
    assert host == {name: value for name, value in {**KERNEL, **SIZES}.items() if name in host}


def test_our_header_has_them_all(values):
    assert values(["snapengine/internal/linux_compat.h"], False) == {**KERNEL, **SIZES}


def test_what_python_sees():
    assert {f"UFFD_FEATURE_{name}": bit for name, bit in FEATURES.items()} == {
        name: value for name, value in KERNEL.items() if name.startswith("UFFD_FEATURE_")
    }
    assert {f"PAGE_IS_{name}": bit for name, bit in CATEGORIES.items()} == {
        name: value for name, value in KERNEL.items() if name.startswith("PAGE_IS_")
    }
    assert KERNEL["UFFDIO_REGISTER_MODE_MISSING"] == MODE_MISSING
    assert KERNEL["UFFDIO_REGISTER_MODE_WP"] == MODE_WP
    assert KERNEL["UFFDIO_REGISTER_MODE_MINOR"] == MODE_MINOR
    assert KERNEL["PM_SCAN_WP_MATCHING"] == WP_MATCHING
    assert KERNEL["PM_SCAN_CHECK_WPASYNC"] == CHECK_WPASYNC


def test_every_kernel_name_we_use_is_checked():
    text = (Path(snapengine.__file__).parent / "kernel" / "linux.pxd").read_text()
    pattern = r"\b((?:UFFD(?:IO)?|PAGE_IS|PM_SCAN)_[A-Z_]+|PAGEMAP_SCAN|PROCMAP_QUERY)\b"
    names = {name.removeprefix("IOCTL_") for name in re.findall(pattern, text)}
    assert names - set(KERNEL) == set()
    structs = set(re.findall(r"\bstruct (uffd\w*|p\w+):", text))
    assert {f"struct {name}" for name in structs} - set(SIZES) == set()
