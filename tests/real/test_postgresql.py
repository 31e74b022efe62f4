"""PostgreSQL under pgbench: a backend and the postmaster are saved, and the sums of the bank stay correct."""

import os
import pwd
import subprocess
from pathlib import Path

import pytest
from realkit import MODES, Running, check_core, children, find, need, need_all, room, save_under_load
from waitkit import PATIENCE_S

pytestmark = [pytest.mark.host_optional, pytest.mark.usefixtures("requires_uffd"), pytest.mark.timeout(1800)]

SETTINGS = {
    "listen_addresses": "", "shared_buffers": "32MB", "fsync": "off", "huge_pages": "off",
    "max_connections": "20", "log_min_messages": "warning",
}  # fmt: skip
SUMS = (
    "SELECT (SELECT sum(abalance) FROM pgbench_accounts), (SELECT sum(tbalance) FROM pgbench_tellers), "
    "(SELECT sum(bbalance) FROM pgbench_branches), (SELECT coalesce(sum(delta), 0) FROM pgbench_history)"
)


class Bank:
    """A database in `folder`, and the commands of its owner."""

    def __init__(self, folder):
        self.folder = folder
        name = "postgres" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
        self.prefix = []
        if os.geteuid() == 0:
            user = pwd.getpwnam(name)
            os.chown(folder, user.pw_uid, user.pw_gid)
            self.prefix = ["setpriv", f"--reuid={name}", f"--regid={user.pw_gid}", "--clear-groups"]
        self.access = ["-h", str(folder), "-U", "bank", "-d", "postgres"]

    def command(self, name, *arguments):
        return [*self.prefix, find(name), *map(str, arguments)]

    def run(self, name, *arguments):
        """Run a command to its end; returns its output."""
        done = subprocess.run(
            self.command(name, *arguments),
            cwd=self.folder, capture_output=True, text=True, timeout=PATIENCE_S, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    def initialize(self):
        self.run("initdb", "-D", self.folder / "data", "-U", "bank", "-A", "trust", "--no-sync")

    def server(self):
        settings = [f"--{name}={value}" for name, value in SETTINGS.items()]
        place = f"--unix_socket_directories={self.folder}"
        command = self.command("postgres", "-D", self.folder / "data", place, *settings)
        return Running(command, self.folder.with_suffix(".log"))

    def query(self, text):
        return self.run("psql", *self.access, "-At", "-c", text).strip()


@pytest.fixture(scope="module")
def bank():
    need_all("PostgreSQL")
    need("postgres", "initdb", "pgbench", "psql", "pg_isready")
    try:
        pwd.getpwnam("postgres")
    except KeyError:
        pytest.skip("there is no user postgres")
    with room() as folder:
        (folder / "bank").mkdir()
        made = Bank(folder / "bank")
        made.initialize()
        with made.server() as server:
            server.until(lambda: (made.folder / ".s.PGSQL.5432").exists(), "it does not listen")
            server.until(lambda: ready(made), "it does not answer")
            made.run("pgbench", *made.access[:4], "-i", "-q", "-s", "2", "postgres")
            made.pid = server.pid
            yield made


def ready(bank):
    command = bank.command("pg_isready", "-h", bank.folder)
    return subprocess.run(command, capture_output=True, check=False, cwd=bank.folder).returncode == 0


def backends(bank):
    """The processes of pgbench's connections."""
    found = []
    for child in children(bank.pid):
        words = Path(f"/proc/{child}/cmdline").read_bytes()
        if b"bank postgres [local]" in words:
            found.append(child)
    return found


def progressed(bench):
    """The lines of pgbench that report transactions."""
    lines = [line for line in bench.said().splitlines() if line.startswith("progress:")]
    return [line for line in lines if " 0.0 tps" not in line]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("which", ["backend", "postmaster"])
def test_postgresql(bank, tmp_path, which, mode):
    arguments = ["-n", "-c", "3", "-j", "1", "-T", "1800", "-P", "1", *bank.access[:4], "postgres"]
    log = bank.folder.with_suffix(".bench")
    with Running(bank.command("pgbench", *arguments), log) as bench:
        bench.until(lambda: len(backends(bank)) == 3 and progressed(bench), "pgbench does nothing")
        pid = backends(bank)[0] if which == "backend" else bank.pid

        def busy():
            before = len(progressed(bench))
            bench.until(lambda: len(progressed(bench)) > before, "pgbench makes no progress")

        # No page of the memory that all its processes share may be lost: realkit.check_lost.
        save_under_load(pid, mode, tmp_path, busy=busy, discards=True, check=lambda path, take: take())
        said = bench.said().lower()
        assert "error" not in said
        assert "abort" not in said
        assert not [line for line in progressed(bench) if "failed" in line and " 0 failed" not in line]
    if mode == "stop":
        check_core(tmp_path / "image", find("postgres"), tmp_path)
    sums = bank.query(SUMS).split("|")
    assert len(set(sums)) == 1, sums
    assert "PANIC" not in bank.folder.with_suffix(".log").read_text()
