"""The doctor's verdicts on made-up hosts, its reading of files, and the command on this host."""

import dataclasses
import io
import json
import subprocess
import sys

import pytest

from snapengine.doctor import checks
from snapengine.doctor import main as doctor
from snapengine.doctor.facts import Host, read_host, read_texts, try_pagemap_scan, try_pidfd

ALL_FEATURES = (1 << 17) - 1
ROOT = "Name:\tpython\nCapEff:\t000001ffffffffff\n"
USER = "Name:\tpython\nCapEff:\t0000000000000000\n"
GOOD = Host(
    release="6.12.1-amd64",
    features=ALL_FEATURES,
    device="open",
    unprivileged="0\n",
    status=ROOT,
    thp="always [madvise] never\n",
    shmem_thp="always within_size [advise] never deny force\n",
    mounts="tmpfs /dev/shm tmpfs rw,nosuid,nodev,huge=within_size 0 0\n",
    ksm="0\n",
    swaps="Filename\tType\tSize\n/swap\tfile\t100\n",
    meminfo="MemTotal: 4194304 kB\nMemAvailable: 2097152 kB\nHugePages_Total: 8\nHugePages_Free: 7\n",
    cpuinfo="processor\t: 0\nflags\t\t: fpu sse2 avx avx2 bmi1\n",
    cpus=2,
    spill_dir="/tmp",
    spill_free=5 << 30,
    libraries={"zstandard": "0.25", "google-crc32c": "1.9, C"},
)


def change(**facts):
    return dataclasses.replace(GOOD, **facts)


def denied(**facts):
    return change(features=None, uffd_denied=True, uffd_error="not permitted", status=USER, **facts)


def find(host, name):
    (check,) = [check for check in doctor.examine(host) if check.name.strip() == name]
    return check


def printed(host):
    out = io.StringIO()
    doctor.print_checks(doctor.examine(host), out)
    return out.getvalue()


def test_a_good_host_has_nothing_to_complain_about():
    found = doctor.examine(GOOD)
    assert all(check.ok for check in found)
    assert doctor.can_track(found)
    assert not any(check.why or check.fix for check in found)
    assert printed(GOOD).rstrip().endswith("Write tracking works on this host.")


@pytest.mark.parametrize(
    ("facts", "name", "needed"),
    [
        ({"machine": "aarch64"}, "processor type", True),
        ({"release": "6.1.0-28-amd64"}, "kernel", False),
        ({"features": ALL_FEATURES & ~1}, "PAGEFAULT_FLAG_WP", True),
        ({"features": ALL_FEATURES & ~(1 << 12)}, "WP_HUGETLBFS_SHMEM", False),
        ({"features": ALL_FEATURES & ~(1 << 15)}, "WP_ASYNC", False),
        ({"features": ALL_FEATURES & ~(1 << 5)}, "MISSING_SHMEM", False),
        ({"features": ALL_FEATURES & ~(1 << 1)}, "EVENT_FORK", False),
        ({"pagemap_scan": "Inappropriate ioctl for device"}, "PAGEMAP_SCAN", False),
        ({"pagemap_scan": "Inappropriate ioctl", "wp_bit": False}, "write protection in pagemap", False),
        ({"pidfd": "Function not implemented"}, "pidfd", False),
        ({"status": USER, "ptrace_scope": "1\n"}, "reading other processes", False),
        ({"ksm": "1\n"}, "KSM", False),
        ({"meminfo": "MemTotal: 300000 kB\nMemAvailable: 200000 kB\n"}, "memory", False),
        ({"spill_free": 1 << 20}, "spill directory", False),
        ({"libraries": {"google-crc32c": "1.9, Python"}}, "google-crc32c", True),
        ({"libraries": {"zstandard": "missing: No module"}}, "zstandard", True),
    ],
)
def test_every_no_says_why_and_what_to_do(facts, name, needed):
    host = change(**facts)
    check = find(host, name)
    assert check.ok is False
    assert check.needed is needed
    assert check.why
    assert check.fix
    assert doctor.can_track(doctor.examine(host)) is not needed
    assert check.why in printed(host)
    assert check.fix in printed(host).replace("\n", " ")


@pytest.mark.parametrize(
    ("facts", "name"),
    [
        ({"thp": "always madvise [never]\n"}, "transparent huge pages"),
        ({"thp": ""}, "transparent huge pages"),
        ({"meminfo": "MemTotal: 4194304 kB\nMemAvailable: 2097152 kB\n"}, "hugetlb pages"),
        ({"cpuinfo": "flags\t\t: fpu sse2 avx\n"}, "processors"),
        ({"release": "strange"}, "kernel"),
        ({"meminfo": ""}, "memory"),
    ],
)
def test_what_is_merely_absent_is_no_fault(facts, name):
    host = change(**facts)
    assert find(host, name).ok is None
    assert find(host, name).why
    assert doctor.can_track(doctor.examine(host))


def test_no_permission_names_the_three_ways():
    host = denied(device="denied", unprivileged="0\n")
    check = find(host, "userfaultfd")
    assert check.ok is False
    assert check.found == "/dev/userfaultfd: not for this user, vm.unprivileged_userfaultfd=0"
    for way in ("CAP_SYS_PTRACE", "/dev/userfaultfd", "vm.unprivileged_userfaultfd=1"):
        assert way in check.fix
    assert find(host, "WP_ASYNC").ok is None
    assert not doctor.can_track(doctor.examine(host))


def test_refused_despite_the_capability_points_at_seccomp():
    host = dataclasses.replace(denied(device=""), status=ROOT)
    assert "seccomp" in find(host, "userfaultfd").why


def test_a_kernel_without_userfaultfd_is_no_question_of_rights():
    host = change(features=None, uffd_error="Function not implemented", device="")
    assert "CONFIG_USERFAULTFD" in find(host, "userfaultfd").fix


@pytest.mark.parametrize(
    ("facts", "found"),
    [
        ({}, "through /dev/userfaultfd"),
        ({"device": ""}, "system call, by CAP_SYS_PTRACE"),
        ({"device": "denied", "status": USER}, "system call, by vm.unprivileged_userfaultfd=1"),
    ],
)
def test_the_way_to_userfaultfd_is_named(facts, found):
    assert find(change(**facts), "userfaultfd").found == found


def test_texts_are_read_below_a_root(tmp_path):
    (tmp_path / "proc/sys/vm").mkdir(parents=True)
    (tmp_path / "proc/sys/vm/unprivileged_userfaultfd").write_text("1\n")
    (tmp_path / "proc/swaps").write_bytes(b"Filename\n/\xff file\n")
    texts = read_texts(tmp_path)
    assert texts["unprivileged"] == "1\n"
    assert texts["ksm"] == ""
    assert find(change(**texts), "swap").found == "1 in use"


def test_the_probes_agree_with_the_kernel():
    assert try_pidfd() is None
    major, minor = (int(part) for part in read_host().release.split(".")[:2])
    assert (try_pagemap_scan() is None) == ((major, minor) >= (6, 7))


def test_the_command(requires_uffd):
    command = [sys.executable, "-m", "snapengine.cli", "doctor"]
    run = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    rows = json.loads(run.stdout)
    assert list(rows[0]) == [field.name for field in dataclasses.fields(checks.Check)]
    needed_missing = [row["name"] for row in rows if row["needed"] and not row["ok"]]
    assert run.returncode == (1 if needed_missing else 0)
    assert run.stderr == ""
    text = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    assert all(row["name"].strip() in text for row in rows)


@pytest.mark.parametrize(
    ("mounts", "found"),
    [
        ("tmpfs /dev/shm tmpfs rw 0 0\n", "not used"),
        ("tmpfs /dev/shm tmpfs rw,huge=advise 0 0\ntmpfs /tmp tmpfs rw,huge=always 0 0\n", "not used"),
        ("tmpfs /dev/shm tmpfs rw,huge=always 0 0\ntmpfs /dev/shm tmpfs rw 0 0\n", "not used"),
        ("/dev/sda1 /dev/shm ext4 rw 0 0\n", "no tmpfs"),
        ("", "no tmpfs"),
    ],
)
def test_a_slow_tmpfs_is_no_fault(mounts, found):
    """The last mount of a place is the one that counts."""
    check = find(change(mounts=mounts), "huge pages in /dev/shm")
    assert check.ok is None
    assert found in check.found
    assert check.why
    assert doctor.can_track(doctor.examine(change(mounts=mounts)))
