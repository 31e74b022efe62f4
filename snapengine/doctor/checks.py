"""The verdicts: one function per feature, from a `Host` to a `Check`. No I/O."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from snapengine.base.units import format_size
from snapengine.doctor.facts import Host
from snapengine.kernel.features import PAGEMAP_SCAN, PAGEMAP_WP_BIT, UFFD_FEATURES, KernelFeature
from snapengine.kernel.uffd import FEATURES

CAP_SYS_PTRACE = 19
MIB = 1 << 20
GIB = 1 << 30

THREE_WAYS = (
    "one of: run as root or with CAP_SYS_PTRACE; allow this user to open /dev/userfaultfd (a udev rule "
    'such as KERNEL=="userfaultfd", GROUP="kvm", MODE="0660"); '
    "sysctl -w vm.unprivileged_userfaultfd=1 (every user may then)"
)


@dataclass(frozen=True, slots=True)
class Check:
    """One feature. `why` and `fix` are filled where `ok` is not True."""

    name: str
    ok: bool | None
    """True: yes. False: no. None: absent, which is no problem, or unknown."""
    found: str
    """What was found."""
    why: str = ""
    """What does not work without it, or what it breaks."""
    fix: str = ""
    """The remedy."""
    needed: bool = False
    """Write tracking does not work without it."""

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON types, keys in the order of the fields."""
        return asdict(self)


def chosen(text: str) -> str:
    """The word in brackets of ``always [madvise] never``."""
    match = re.search(r"\[(\w+)\]", text)
    return match[1] if match else ""


def check_machine(host: Host) -> Check:
    """The instruction set."""
    ok = host.machine == "x86_64"
    why = "" if ok else "the parts in C are written for x86-64"
    return Check("processor type", ok, host.machine, why, "" if ok else "use an x86-64 machine", True)


def check_kernel(host: Host) -> Check:
    """The release. The features themselves are checked one by one below."""
    match = re.match(r"(\d+)\.(\d+)", host.release)
    if match is None:
        return Check("kernel", None, host.release or "unknown", "the release is not readable")
    if (int(match[1]), int(match[2])) >= (6, 7):
        return Check("kernel", True, host.release)
    why = "6.7 is the first release with everything that is used; the rows below say what is missing"
    return Check("kernel", False, host.release, why, "use Linux 6.7 or newer")


def check_userfaultfd(host: Host) -> Check:
    """Whether this user may open one, and how."""
    name = "userfaultfd"
    if host.features is not None:
        if host.device == "open":
            return Check(name, True, "through /dev/userfaultfd", needed=True)
        way = "CAP_SYS_PTRACE" if host.has_capability(CAP_SYS_PTRACE) else "vm.unprivileged_userfaultfd=1"
        return Check(name, True, f"system call, by {way}", needed=True)
    if not host.uffd_denied:
        fix = "use a kernel with CONFIG_USERFAULTFD=y"
        return Check(name, False, host.uffd_error, "the kernel does not offer it", fix, True)
    found = [
        {"denied": "/dev/userfaultfd: not for this user", "": "no /dev/userfaultfd"}.get(host.device, ""),
        f"vm.unprivileged_userfaultfd={host.unprivileged.strip() or '?'}",
    ]
    if host.has_capability(CAP_SYS_PTRACE):
        # The kernel itself never refuses root. Seccomp profiles of containers and user namespaces do.
        why = "refused although this process has CAP_SYS_PTRACE: by a seccomp filter or a user namespace"
        fix = "allow userfaultfd in the container's seccomp profile, or pass /dev/userfaultfd into it"
        return Check(name, False, ", ".join(filter(None, found)), why, fix, True)
    return Check(name, False, ", ".join(filter(None, found)), "this user may not use it", THREE_WAYS, True)


def check_features(host: Host) -> Iterator[Check]:
    """Each UFFD_FEATURE that is used."""
    for row in UFFD_FEATURES.values():
        if not row.purpose:
            continue
        name = f"  {row.name}"
        if host.features is None:
            why = f"for {row.purpose}; userfaultfd cannot be asked"
            yield Check(name, None, "unknown", why, "", row.needed)
        else:
            yield _from_table(row, bool(host.features & FEATURES[row.name]), "missing", name)


def _from_table(row: KernelFeature, there: bool, found: str, name: str = "") -> Check:
    if there:
        return Check(name or row.name, True, row.purpose, needed=row.needed)
    return Check(name or row.name, False, found, row.without, f"use Linux {row.since} or newer", row.needed)


def check_pagemap_scan(host: Host) -> Check:
    """PAGEMAP_SCAN finds populated, huge and written pages."""
    return _from_table(PAGEMAP_SCAN, host.pagemap_scan is None, host.pagemap_scan or "")


def check_wp_bit(host: Host) -> Check:
    """Tells after each copy whether the page is still protected, without PAGEMAP_SCAN."""
    return _from_table(PAGEMAP_WP_BIT, host.wp_bit or host.pagemap_scan is None, "missing")


def check_pidfd(host: Host) -> Check:
    """pidfd_open tells when a peer dies (its userfaultfd does not)."""
    if host.pidfd is None:
        return Check("pidfd", True, "tells when a target dies")
    return Check("pidfd", False, host.pidfd, "the end of a target is noticed late", "use Linux 5.3 or newer")


def check_ptrace(host: Host) -> Check:
    """process_vm_readv of a peer's private memory needs ptrace rights over it."""
    name = "reading other processes"
    if host.has_capability(CAP_SYS_PTRACE):
        return Check(name, True, "CAP_SYS_PTRACE")
    scope = host.ptrace_scope.strip()
    if scope in ("", "0"):
        return Check(name, True, "of the same user" + (" (no Yama)" if not scope else ""))
    why = "private memory of a peer that this process did not start cannot be read; a memfd can"
    fix = "run as root or with CAP_SYS_PTRACE; or sysctl -w kernel.yama.ptrace_scope=0"
    return Check(name, False, f"ptrace_scope={scope}", why, fix)


def check_thp(host: Host) -> Check:
    """Transparent huge pages: protecting them is some 300 times faster."""
    mode, shmem = chosen(host.thp), chosen(host.shmem_thp)
    found = f"{mode or 'none'}, shared memory {shmem or 'none'}"
    if mode in ("always", "madvise"):
        return Check("transparent huge pages", True, found)
    why = "arming takes 16 ms per GiB of small pages, 0.05 ms of huge ones"
    return Check("transparent huge pages", None, found, why,
                 "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled")  # fmt: skip


def check_tmpfs(host: Host) -> Check:
    """Images in memory: the kernel makes a file of huge pages five times as fast as one of small pages."""
    name = "huge pages in /dev/shm"
    for line in reversed(host.mounts.splitlines()):
        _, where, kind, options, *_ = line.split()
        if where == "/dev/shm" and kind == "tmpfs":
            break
    else:
        return Check(name, None, "no tmpfs there", "images cannot be kept in memory there")
    if re.search(r"\bhuge=(always|within_size)\b", options):
        return Check(name, True, "used")
    why = "an image of 1 GiB takes 0.5 s to write there, and 0.1 s in huge pages (Linux 6.14)"
    fix = "mount -o remount,huge=within_size /dev/shm"
    return Check(name, None, "not used: images are written there at 2 GB/s", why, fix)


def check_hugetlb(host: Host) -> Check:
    """Reserved huge pages; only for targets that use them."""
    total, free = host.memory.get("HugePages_Total", 0), host.memory.get("HugePages_Free", 0)
    if total:
        return Check("hugetlb pages", True, f"{total}, {free} free")
    return Check("hugetlb pages", None, "none reserved", "only guests with --pages hugetlb need them",
                 "echo 256 > /proc/sys/vm/nr_hugepages")  # fmt: skip


def check_ksm(host: Host) -> Check:
    """ksmd drops the protection of the pages that it merges."""
    if host.ksm.strip() != "1":
        return Check("KSM", True, "not running")
    why = "merging drops the write protection of a page: writes to it go unseen"
    return Check("KSM", False, "running", why, "echo 0 > /sys/kernel/mm/ksm/run for the time of a snapshot")


def check_memory(host: Host) -> Check:
    """Room for the buffer and for the guest of the demo."""
    free = host.memory.get("MemAvailable")
    if free is None:
        return Check("memory", None, "unknown", "/proc/meminfo is not readable")
    found = f"{format_size(free)} available of {format_size(host.memory.get('MemTotal', 0))}"
    if free >= 512 * MIB:
        return Check("memory", True, found)
    return Check("memory", False, found, "the demo needs 512 MiB", "use a smaller --size and --memory-limit")


def check_swap(host: Host) -> Check:
    """Swapped pages are saved, too; they are read back for it."""
    areas = host.swaps.splitlines()[1:]
    return Check("swap", True, f"{len(areas)} in use" if areas else "none")


def check_spill(host: Host) -> Check:
    """Holds pages when the sink is slower than the writers."""
    found = f"{format_size(host.spill_free)} free in {host.spill_dir}"
    if host.spill_free >= GIB:
        return Check("spill directory", True, found)
    why = "a slow sink and fast writers may need as much room as the target has memory"
    return Check("spill directory", False, found, why, "choose another with --spill-dir or TMPDIR")


def check_cpu(host: Host) -> Check:
    """AVX2 for the copy with the zero test."""
    count = f"{host.cpus} usable" if host.cpus > 1 else "1 usable: faults wait for the walk"
    if re.search(r"^flags\s*:.*\bavx2\b", host.cpuinfo, re.MULTILINE):
        return Check("processors", True, f"{count}, AVX2")
    why = "pages are copied and tested for zeros by the scalar version, which is slower"
    return Check("processors", None, f"{count}, no AVX2", why)


def check_libraries(host: Host) -> Iterator[Check]:
    """zstd and CRC-32C."""
    for name, found in host.libraries.items():
        if found.startswith("missing"):
            yield Check(name, False, found, "it is a dependency", f"pip install {name}", True)
        elif "Python" in found:
            why = "checksums in Python slow the sink down"
            yield Check(name, False, found, why, f"install a wheel of {name} that has its C part", True)
        else:
            yield Check(name, True, found)
