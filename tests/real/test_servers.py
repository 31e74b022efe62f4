"""Servers under load: redis, memcached, nginx. No client gets an error before, during or after a save."""

import http.client
import os
import socket
from pathlib import Path

import pytest
from handoverkit import connect
from realkit import MODES, Load, Running, check_core, check_sequence, children, need, room, save_under_load
from waitkit import PATIENCE_S

pytestmark = [pytest.mark.host_optional, pytest.mark.usefixtures("requires_uffd"), pytest.mark.timeout(1800)]


def core_of(pid, mode, folder):
    """The last stop cut, in gdb."""
    if mode == "stop":
        check_core(folder / "image", Path(f"/proc/{pid}/exe").resolve(), folder)


class Lines:
    """A connection whose answers are lines."""

    def __init__(self, path):
        self._socket = connect(path)
        self._socket.settimeout(PATIENCE_S)
        self._file = self._socket.makefile("rb")

    def ask(self, request, answer):
        self._socket.sendall(request)
        line = self._file.readline()
        assert line == answer, f"{request!r}: {line!r}"

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self._file.close()
        self._socket.close()


@pytest.mark.parametrize("mode", MODES)
def test_redis(tmp_path, mode):
    """redis appends the values that one client sends in order, while a benchmark changes other keys."""
    need("redis-server", "redis-benchmark")
    with room() as folder:
        path = folder / "socket"
        command = ["redis-server", "--port", "0", "--unixsocket", path, "--save", "", "--dir", folder]
        bench = ["redis-benchmark", "-s", path, "-q", "-l", "-c", "4"]
        bench += ["-r", "5000", "-d", "300", "-t", "set,incr,lpush"]
        with Running(command, folder / "log") as server, Lines(path) as lines:

            def append(number):
                lines.ask(b"RPUSH list VAL%08d\r\n" % number, b":%d\r\n" % (number + 1))

            with Running(bench, folder / "bench") as benchmark, Load(append) as load:
                save_under_load(
                    server.pid, mode, tmp_path, discards=True, busy=load.check,
                    check=lambda path, take: check_sequence(path, take, load),
                )  # fmt: skip
                load.check()
                assert not benchmark.ended()
                assert "rror" not in benchmark.said()
            core_of(server.pid, mode, tmp_path)


@pytest.mark.parametrize("mode", MODES)
def test_memcached(tmp_path, mode):
    """memcached has four threads, which share the work of several clients."""
    need("memcached")
    with room() as folder:
        path = folder / "socket"
        user = ["-u", "nobody"] if os.geteuid() == 0 else []
        folder.chmod(0o777)
        command = ["memcached", "-s", path, "-a", "666", "-m", "256", "-t", "4", *user]
        with (
            Running(command, folder / "log") as server,
            Lines(path) as lines,
            Lines(path) as other,
        ):

            def store(number):
                lines.ask(b"set key%d 0 0 11\r\nVAL%08d\r\n" % (number, number), b"STORED\r\n")

            def replace(number):
                other.ask(b"set other 0 0 5\r\n%05d\r\n" % (number % 100000), b"STORED\r\n")

            with Load(store) as load, Load(replace) as second:
                save_under_load(
                    server.pid, mode, tmp_path, busy=load.check,
                    check=lambda path, take: check_sequence(path, take, load),
                )  # fmt: skip
                load.check()
                second.check()
            core_of(server.pid, mode, tmp_path)


NGINX = """
daemon off;
worker_processes 1;
pid {folder}/pid;
events {{ worker_connections 64; }}
http {{
    access_log {folder}/access combined buffer=64k;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    server {{ listen unix:{folder}/socket; root {folder}/files; gzip on; gzip_types *; }}
}}
"""


class Pages(http.client.HTTPConnection):
    """A keep-alive connection to the server at a Unix socket."""

    def __init__(self, path):
        super().__init__("localhost")
        self._path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(PATIENCE_S)
        self.sock.connect(str(self._path))

    def check(self, name, content):
        self.request("GET", name)
        answer = self.getresponse()
        body = answer.read()
        assert (answer.status, body == content) == (200, True), f"{name}: {answer.status}, {len(body)} bytes"


@pytest.mark.parametrize("mode", MODES)
def test_nginx(tmp_path, mode):
    """The worker, which runs as another user than the master."""
    (nginx,) = need("nginx")
    with room() as folder:
        (folder / "files").mkdir()
        content = os.urandom(50_000).hex().encode()
        (folder / "files" / "page").write_bytes(content)
        (folder / "conf").write_text(NGINX.format(folder=folder))
        command = [nginx, "-p", folder, "-e", folder / "error", "-c", folder / "conf"]
        with Running(command, folder / "log") as server:
            (worker,) = server.until(lambda: children(server.pid), "no worker")
            connect(folder / "socket").close()
            clients = [Pages(folder / "socket") for _ in range(2)]

            def get(number):
                clients[0].check("/page", content)
                if number % 10 == 0:
                    clients[1].close()
                clients[1].check("/page", content)

            with Load(get) as load:
                save_under_load(worker, mode, tmp_path, busy=load.check, check=lambda path, take: take())
                load.check()
            core_of(worker, mode, tmp_path)
            for client in clients:
                client.close()
            assert "alert" not in (folder / "error").read_text()
