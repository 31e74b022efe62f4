"""redis-server under SET commands: its own BGSAVE against a capture by attaching, alternated."""

import os
import shutil
import socket
import subprocess
import threading
import time

import pytest
from benchkit import Samples, size, warm_file

import snapengine
from snapengine.options import Options
from snapengine.process.target import ProcessTarget

SIZE = size("REDIS_SIZE", "512M")
VALUE_BYTES = 4000
PAIRS = 3

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.benchmark(group="redis"),
    pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed"),
]


class Client:
    """One connection, one command at a time."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(str(path))
        self.file = self.socket.makefile("rb")

    def close(self):
        self.file.close()
        self.socket.close()

    def __call__(self, *words):
        parts = [word if isinstance(word, bytes) else str(word).encode() for word in words]
        lines = b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts)
        self.socket.sendall(b"*%d\r\n" % len(parts) + lines)
        line = self.file.readline()
        if line[:1] == b"-":
            raise RuntimeError(line.decode())
        if line[:1] == b"$" and line != b"$-1\r\n":
            return self.file.read(int(line[1:]) + 2)[:-2]
        return line[1:].strip()

    def info(self, name):
        for line in self("INFO").decode().splitlines():
            if line.startswith(name + ":"):
                return line.split(":")[1]
        raise KeyError(name)


class Load(threading.Thread):
    """Sets random keys until it is stopped; notes the latency of each command in ns."""

    def __init__(self, path, keys):
        super().__init__()
        self.client, self.keys = Client(path), keys
        self.latencies = []
        self.stopping = False

    def run(self):
        value = bytes(range(250)) * (VALUE_BYTES // 250)
        number = 1
        while not self.stopping:
            number = (number * 6364136223846793005 + 1442695040888963407) % 2**64
            began = time.monotonic_ns()
            self.client("SET", b"key%d" % ((number >> 33) % self.keys), value)
            self.latencies.append(time.monotonic_ns() - began)


@pytest.fixture
def redis(tmp_path, tmpfs):
    path = tmp_path / "redis.sock"
    dump = tmpfs.with_name(f"snapengine-{os.getpid()}.rdb")
    process = subprocess.Popen(
        ["redis-server", "--port", "0", "--unixsocket", path, "--save", "", "--dir", dump.parent,
         "--dbfilename", dump.name, "--rdbcompression", "no"],
        stdout=subprocess.DEVNULL)  # fmt: skip
    try:
        until = time.monotonic() + 10
        while not path.exists() and time.monotonic() < until:
            time.sleep(0.01)
        client = Client(path)
        keys = SIZE // (VALUE_BYTES + 96)
        fill(client, keys)
        yield process.pid, path, client, keys
        client.close()
    finally:
        process.terminate()
        process.wait()
        dump.unlink(missing_ok=True)


def fill(client, keys):
    """Set all keys, a thousand per message."""
    value = bytes(range(250)) * (VALUE_BYTES // 250)
    for first in range(0, keys, 1000):
        last = min(first + 1000, keys)
        pairs = [word for number in range(first, last) for word in (b"key%d" % number, value)]
        client("MSET", *pairs)


def bench_redis(benchmark, redis, tmpfs):
    pid, path, client, keys = redis
    samples = Samples()
    benchmark.extra_info.update(size=SIZE, samples=samples)

    def attach():
        with snapengine.snapshot(ProcessTarget(pid), tmpfs, Options(spill_dir=str(tmpfs.parent))) as capture:
            pass
        return capture.result.peak_buffer_bytes + capture.result.spilled_bytes

    def bgsave():
        client("BGSAVE")
        while client.info("rdb_bgsave_in_progress") != "0":
            time.sleep(0.005)
        assert client.info("rdb_last_bgsave_status") == "ok"
        return int(client.info("rdb_last_cow_size"))

    def alternate():
        for name, save in (("attach", attach), ("bgsave", bgsave)):
            tmpfs.unlink(missing_ok=True)
            warm_file(tmpfs, SIZE + SIZE // 8)
            tmpfs.unlink(missing_ok=True)
            load = Load(path, keys)
            load.start()
            time.sleep(0.5)
            first = len(load.latencies)
            began = time.monotonic_ns()
            extra = save()
            done = time.monotonic_ns()
            load.stopping = True
            load.join()
            load.client.close()
            during = sorted(load.latencies[first:])
            samples.note(
                **{
                    f"{name}_ns": done - began,
                    f"{name}_extra_bytes": extra,
                    f"{name}_latency_max_ns": during[-1],
                    f"{name}_latency_p99_ns": during[len(during) * 99 // 100],
                    f"{name}_commands_per_s": len(during) / ((done - began) / 1e9),
                }
            )

    alternate()
    samples.clear()
    benchmark.pedantic(alternate, rounds=PAIRS)
