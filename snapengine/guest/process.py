"""Run an embedded guest as a child process: start it, read its counters, end it."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from snapengine.errors import SnapengineError
from snapengine.guest.params import GuestParams

CLOSE_SECONDS = 10.0


class GuestProcess:
    """A guest in a child process, ready when the constructor returns. A context manager.

    Parameters
    ----------
    path
        The Unix socket where engines listen; the guest connects to them.
    params
        The guest's memory.
    rate
        Pages written per second; None: no limit, 0: none.
    timeout
        Seconds to wait until the guest is ready, and for each answer.

    Raises
    ------
    SnapengineError
        The guest did not start, has ended, or did not answer in time.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        params: GuestParams,
        rate: int | None = None,
        timeout: float = 60.0,
    ) -> None:
        self.params = params
        self._timeout = timeout
        self._pending = b""
        environment = dict(os.environ)
        package = str(Path(__file__).resolve().parent.parent.parent)
        environment["PYTHONPATH"] = os.pathsep.join(
            [package, *filter(None, [environment.get("PYTHONPATH")])]
        )
        self._process = subprocess.Popen(
            [sys.executable, "-m", "snapengine.guest", *_arguments(os.fspath(path), params, rate)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=environment,
        )
        try:
            self._receive("start")
        except BaseException:
            self.kill()
            raise

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def stats(self) -> dict[str, Any]:
        """Counters (`Guest.stats`): ``writes`` per thread, ``stalls``, ``handovers``, ``ended``, ..."""
        stats: dict[str, Any] = self._request("stats")["stats"]
        return stats

    def bins(self, since_ns: int = 0) -> list[tuple[int, int]]:
        """Writes per 10 ms of the last 80 s: (ns of CLOCK_MONOTONIC, writes), without empty bins."""
        return [(at, writes) for at, writes in self._request("bins", since_ns=since_ns)["bins"]]

    def fork(self, path: str | os.PathLike[str]) -> int:
        """Save the RAM by a forked child (`Guest.fork`); returns the child's process id without waiting."""
        return int(self._request("fork", path=os.fspath(path))["child"])

    def pause(self) -> list[int]:
        """Pause the writers; returns the number of writes of each."""
        writes: list[int] = self._request("pause")["writes"]
        return writes

    def resume(self) -> None:
        """Resume the writers."""
        self._request("resume")

    def close(self) -> dict[str, Any]:
        """End and reap the guest; returns its last counters, {} if it had already ended. Idempotent."""
        try:
            if self._process.poll() is None and self._process.stdin is not None:
                self._process.stdin.close()
                return self._receive("end")
        except (SnapengineError, OSError):
            pass
        finally:
            self._reap()
        return {}

    def kill(self) -> None:
        """Send SIGKILL and reap the guest."""
        self._process.kill()
        self._reap()

    def __enter__(self) -> GuestProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _reap(self) -> None:
        try:
            self._process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _request(self, command: str, **arguments: Any) -> dict[str, Any]:
        if self._process.stdin is None or self._process.stdin.closed:
            raise SnapengineError(f"guest: {command}: the guest was closed")
        try:
            self._process.stdin.write(json.dumps({"cmd": command, **arguments}).encode() + b"\n")
        except BrokenPipeError:
            raise SnapengineError(f"guest: {command}: the process has ended") from None
        answer = self._receive(command)
        if not answer["ok"]:
            raise SnapengineError(f"guest: {command}: {answer['error']}")
        return answer

    def _receive(self, what: str) -> dict[str, Any]:
        assert self._process.stdout is not None
        deadline = time.monotonic() + self._timeout
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._pending:
            if not select.select([descriptor], [], [], max(0, deadline - time.monotonic()))[0]:
                raise SnapengineError(f"guest: {what}: no answer in {self._timeout:g} s")
            data = os.read(descriptor, 1 << 16)
            if not data:
                raise SnapengineError(f"guest: {what}: the process has ended")
            self._pending += data
        line, self._pending = self._pending.split(b"\n", 1)
        answer: dict[str, Any] = json.loads(line)
        return answer


def _arguments(path: str, params: GuestParams, rate: int | None) -> list[str]:
    values = {
        "--socket": path,
        "--size": params.size,
        "--backing": params.backing,
        "--pages": params.pages,
        "--threads": params.threads,
        "--rate": "max" if rate is None else rate,
        "--pattern": params.pattern,
        "--hot-size": params.hot_size,
        "--zero": params.zero_percent,
        "--holes": params.hole_percent,
        "--seed": params.seed,
    }
    flags = ["--stdio", "--json"] + (["--incompressible"] if params.incompressible else [])
    return [f"{option}={value}" for option, value in values.items()] + flags
