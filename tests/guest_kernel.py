"""Debian's cloud kernel for the Linux guest: unpacked from its package into a cache, never installed.

``python3 tests/guest_kernel.py`` fetches it if it is not in the cache, and prints its release. It uses the
standard library only: it runs before anything is set up.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGE = "linux-image-cloud-amd64"
MODULES = [
    *("virtio", "virtio_ring", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "virtio_blk"),
]
FETCH_S = 300
RETRY = ("-o", "Acquire::Retries=3")


class NoKernel(Exception):
    """There is no kernel in the cache, and it cannot be fetched: the text says why."""


def cache():
    """The cache directory: ``vmlinuz``, ``release`` and the modules that are not built into the kernel."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "snapengine" / "guest-kernel"


def find():
    """The cache directory, with a kernel that is fetched if necessary. Raises NoKernel."""
    room = cache()
    if not (room / "release").exists():
        _fetch(room)
    return room


def _fetch(room):
    for tool in ("apt-get", "apt-cache", "dpkg-deb"):
        if not shutil.which(tool):
            raise NoKernel(f"{tool} is missing: the kernel comes from a Debian package")
    room.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=room.parent) as name:
        work = Path(name)
        work.chmod(0o755)  # apt downloads as another user if it can
        _run(["apt-get", "-q", *RETRY, "download", _package()], work)
        (package,) = work.glob("*.deb")
        _run(["dpkg-deb", "-x", str(package), "root"], work)
        (kernel,) = (work / "root" / "boot").glob("vmlinuz-*")
        ready = work / "ready"
        ready.mkdir()
        kernel.rename(ready / "vmlinuz")
        for path in (work / "root").rglob("*.ko"):
            if path.stem in MODULES:
                path.rename(ready / path.name)
        (ready / "release").write_text(kernel.name.removeprefix("vmlinuz-") + "\n")
        try:
            ready.rename(room)
        except OSError as error:  # another test run was faster
            if not (room / "release").exists():
                raise NoKernel(f"{room}: {error.strerror}") from error


def _package():
    """The package that the metapackage depends on; its name contains the release."""
    for attempt in range(2):
        listed = subprocess.run(
            ["apt-cache", "depends", PACKAGE], capture_output=True, text=True, check=False
        )
        found = re.search(r"Depends: (linux-image-\S+)", listed.stdout)
        if found:
            return found[1]
        if attempt == 0 and os.geteuid() == 0:
            _run(["apt-get", "-q", *RETRY, "update"], Path("/"))
    raise NoKernel(f"the configured package sources have no {PACKAGE}")


def _run(command, cwd):
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=FETCH_S)
    except subprocess.TimeoutExpired as error:
        raise NoKernel(f"{command[0]} took more than {FETCH_S} s") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise NoKernel(f"{' '.join(command[:3])}: {last}")


if __name__ == "__main__":
    try:
        print((find() / "release").read_text().strip())
    except NoKernel as error:
        sys.exit(f"guest_kernel: {error}")
