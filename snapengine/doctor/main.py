"""`snapengine doctor`: every check in order, the verdict, and the table."""

from __future__ import annotations

from typing import TextIO

from snapengine.doctor import checks
from snapengine.doctor.checks import Check
from snapengine.doctor.facts import Host, read_host
from snapengine.report.tables import print_table, print_text


def examine(host: Host | None = None) -> list[Check]:
    """All checks of `host` (default: of this machine)."""
    host = host or read_host()
    return [
        checks.check_machine(host),
        checks.check_kernel(host),
        checks.check_userfaultfd(host),
        *checks.check_features(host),
        checks.check_pagemap_scan(host),
        checks.check_wp_bit(host),
        checks.check_pidfd(host),
        checks.check_ptrace(host),
        checks.check_thp(host),
        checks.check_tmpfs(host),
        checks.check_hugetlb(host),
        checks.check_ksm(host),
        checks.check_swap(host),
        checks.check_memory(host),
        checks.check_spill(host),
        checks.check_cpu(host),
        *checks.check_libraries(host),
    ]


def can_track(found: list[Check]) -> bool:
    """Whether write tracking can work: nothing that it needs is missing or unknown."""
    return all(check.ok for check in found if check.needed)


def word(check: Check) -> str:
    """The verdict of one line."""
    if check.ok is None:
        return "-"
    return "yes" if check.ok else "no, needed" if check.needed else "no"


def print_checks(found: list[Check], out: TextIO | None = None) -> None:
    """The table; below it, for each "no", why and what to do; then the verdict."""
    rows = [(check.name, word(check), check.found) for check in found]
    print_table(rows, titles=("feature", "", "found"), out=out)
    for check in found:
        if check.ok is False or (check.ok is None and check.needed):
            print(file=out)
            print_text(f"{check.name.strip()}: {check.why}", out)
            if check.fix:
                print_text(f"  {check.fix}", out)
    works = "works" if can_track(found) else "does not work"
    print(file=out)
    print_text(f"Write tracking {works} on this host.", out)
