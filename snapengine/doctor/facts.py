"""Facts about this host, read from /proc, /sys and by a few harmless calls. No verdicts.

Tests make a `Host` from texts; `read_host()` reads this machine. A fact that cannot be read is None or empty.
"""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import struct
import tempfile
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from snapengine.errors import UffdPermissionError
from snapengine.kernel.pagemap import has_wp_bits

# linux/fs.h, since 6.7: _IOWR('f', 16, struct pm_scan_arg), which is twelve 64-bit words.
PAGEMAP_SCAN = 0xC0606610
_PM_SCAN_ARG = struct.Struct("=12Q")


@dataclass(frozen=True, slots=True)
class Host:
    """Facts. Texts are the raw contents of the files that their comments name."""

    machine: str = "x86_64"
    release: str = ""
    """uname -r"""
    features: int | None = None
    """UFFD_FEATURE bits that the kernel offers; None if userfaultfd could not be opened."""
    uffd_error: str = ""
    """Why it could not be opened."""
    uffd_denied: bool = False
    """It is a lack of permission."""
    device: str = ""
    """/dev/userfaultfd: "open", "denied" or "" (there is none)."""
    unprivileged: str = ""
    """/proc/sys/vm/unprivileged_userfaultfd"""
    status: str = ""
    """/proc/self/status"""
    pagemap_scan: str | None = None
    """None: it works; else why not."""
    wp_bit: bool = True
    """/proc/PID/pagemap tells what is write-protected."""
    pidfd: str | None = None
    """None: it works; else why not."""
    ptrace_scope: str = ""
    """/proc/sys/kernel/yama/ptrace_scope"""
    thp: str = ""
    """/sys/kernel/mm/transparent_hugepage/enabled"""
    shmem_thp: str = ""
    """/sys/kernel/mm/transparent_hugepage/shmem_enabled"""
    mounts: str = ""
    """/proc/self/mounts"""
    ksm: str = ""
    """/sys/kernel/mm/ksm/run"""
    swaps: str = ""
    """/proc/swaps"""
    meminfo: str = ""
    """/proc/meminfo"""
    cpuinfo: str = ""
    """/proc/cpuinfo"""
    cpus: int = 1
    spill_dir: str = ""
    spill_free: int = 0
    """Bytes free in spill_dir."""
    libraries: dict[str, str] = field(default_factory=dict)
    """Name and version, or the error, of what compresses and checksums."""

    @property
    def memory(self) -> dict[str, int]:
        """/proc/meminfo: amounts in bytes, counts as they are."""
        amounts = {}
        for line in self.meminfo.splitlines():
            name, _, rest = line.partition(":")
            words = rest.split()
            if words:
                amounts[name] = int(words[0]) * (1024 if words[1:] == ["kB"] else 1)
        return amounts

    def has_capability(self, bit: int) -> bool:
        """Whether this process has the capability in effect."""
        for line in self.status.splitlines():
            if line.startswith("CapEff:"):
                return bool(int(line.split()[1], 16) >> bit & 1)
        return False


def read_text(root: Path, path: str) -> str:
    """The text of a file below `root`, or "" if it cannot be read."""
    try:
        return (root / path).read_text(errors="replace")
    except OSError:
        return ""


def read_texts(root: Path) -> dict[str, str]:
    """The facts that are texts of files."""
    paths = {
        "unprivileged": "proc/sys/vm/unprivileged_userfaultfd",
        "status": "proc/self/status",
        "ptrace_scope": "proc/sys/kernel/yama/ptrace_scope",
        "thp": "sys/kernel/mm/transparent_hugepage/enabled",
        "shmem_thp": "sys/kernel/mm/transparent_hugepage/shmem_enabled",
        "mounts": "proc/self/mounts",
        "ksm": "sys/kernel/mm/ksm/run",
        "swaps": "proc/swaps",
        "meminfo": "proc/meminfo",
        "cpuinfo": "proc/cpuinfo",
    }
    return {name: read_text(root, path) for name, path in paths.items()}


def try_device(path: str = "/dev/userfaultfd") -> str:
    """`Host.device`."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except PermissionError:
        return "denied"
    except OSError:
        return ""
    return "open"


def try_features() -> tuple[int | None, str, bool]:
    """`Host.features`, `uffd_error` and `uffd_denied`."""
    from snapengine.kernel import uffd

    try:
        return uffd.supported_features(), "", False
    except UffdPermissionError as error:
        return None, str(error), True
    except OSError as error:
        return None, error.strerror or str(error), False


def try_pagemap_scan() -> str | None:
    """`Host.pagemap_scan`: scan the (empty) first page of the address space."""
    scan = _PM_SCAN_ARG.pack(_PM_SCAN_ARG.size, 0, 0, 4096, *[0] * 8)
    try:
        with open("/proc/self/pagemap", "rb") as pagemap:
            fcntl.ioctl(pagemap, PAGEMAP_SCAN, scan)
    except OSError as error:
        return error.strerror or str(error)
    return None


def try_pidfd() -> str | None:
    """`Host.pidfd`."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError as error:
        return error.strerror or str(error)
    return None


def library_versions() -> dict[str, str]:
    """`Host.libraries`."""
    found = {}
    for name in ("zstandard", "google-crc32c"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError as error:
            found[name] = f"missing: {error}"
    try:
        import google_crc32c

        found["google-crc32c"] += ", C" if google_crc32c.implementation == "c" else ", Python"
    except ImportError as error:
        found["google-crc32c"] = f"missing: {error}"
    return found


def read_host(root: Path = Path("/")) -> Host:
    """The facts of this machine. `root` is where proc/ and sys/ are."""
    features, uffd_error, uffd_denied = try_features()
    spill_dir = tempfile.gettempdir()
    return Host(
        machine=platform.machine(),
        release=platform.release(),
        features=features,
        uffd_error=uffd_error,
        uffd_denied=uffd_denied,
        device=try_device(),
        pagemap_scan=try_pagemap_scan(),
        wp_bit=has_wp_bits(),
        pidfd=try_pidfd(),
        cpus=len(os.sched_getaffinity(0)),
        spill_dir=spill_dir,
        spill_free=shutil.disk_usage(spill_dir).free,
        libraries=library_versions(),
        **read_texts(root),
    )
