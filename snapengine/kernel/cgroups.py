"""Whether a process is frozen by its cgroup: then its threads cannot run, so they cannot make a call for us.

Sources: Documentation/admin-guide/cgroup-v2.rst (cgroup.freeze, cgroup.events) and
cgroup-v1/freezer-subsystem.rst.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from snapengine.kernel import procfs


def frozen_by(pid: int) -> tuple[str, str] | None:
    """The cgroup directory that freezes a process, and the file and value that thaw it; None: it is not
    frozen, or its cgroups cannot be seen from here."""
    with contextlib.suppress(OSError):
        for line in procfs.lines(f"/proc/{pid}/cgroup"):
            number, controllers, path = line.split(":", 2)
            if number == "0" and not controllers:
                found = _frozen_v2(path)
            elif "freezer" in controllers.split(","):
                found = _frozen_v1(path)
            else:
                continue
            if found is not None:
                return found
    return None


def _frozen_v2(path: str) -> tuple[str, str] | None:
    for folder in _folders("cgroup2", "", path):
        if "frozen 1" not in _read(f"{folder}/cgroup.events").split("\n"):
            continue
        origin = _origin(folder, "cgroup.freeze")
        return origin, f"echo 0 > {origin}/cgroup.freeze"
    return None


def _frozen_v1(path: str) -> tuple[str, str] | None:
    for folder in _folders("cgroup", "freezer", path):
        if _read(f"{folder}/freezer.state") not in ("FROZEN", "FREEZING"):
            continue
        origin = _origin(folder, "freezer.self_freezing")
        return origin, f"echo THAWED > {origin}/freezer.state"
    return None


def _origin(folder: str, name: str) -> str:
    """The directory at or above `folder` that was frozen; the cgroups below it are frozen with it."""
    at = folder
    while os.path.exists(f"{at}/{name}"):
        if _read(f"{at}/{name}") == "1":
            return at
        at = os.path.dirname(at)
    return folder


def _folders(kind: str, option: str, path: str) -> Iterator[str]:
    """Where the cgroup `path` is mounted here (proc_pid_mountinfo(5))."""
    if path.startswith("/.."):  # outside of our cgroup namespace
        return
    for line in procfs.lines("/proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        root, mounted = before.split(" ")[3:5]
        found, _, options = after.split(" ", 2)
        if found != kind or (option and option not in options.split(",")):
            continue
        below = os.path.relpath(path, root)
        folder = os.path.normpath(os.path.join(_unescaped(mounted), below))
        if not below.startswith("..") and os.path.isdir(folder):
            yield folder


def _unescaped(text: str) -> str:
    for number in (0o40, 0o11, 0o12, 0o134):
        text = text.replace(f"\\{number:03o}", chr(number))
    return text


def _read(path: str) -> str:
    try:
        return procfs.read(path).strip()
    except OSError:
        return ""
