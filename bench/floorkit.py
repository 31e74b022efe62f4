"""Builds and loads the native modules of the bench, and runs loops that need threads."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ("floors", "floor_protect", "floor_faults", "floor_sigbus", "floor_forks")
LOOPS = ("qemu_shape", "forkd_shape", "fork_save")
SERVED_IN_S = 30.0


def build() -> None:
    """Compile changed modules into build/bench/. They are not part of the wheel."""
    subprocess.run([sys.executable, str(ROOT / "bench/setup_floors.py")], check=True)


def load(name: str) -> ModuleType:
    """Import a built module."""
    (path,) = (ROOT / "build/bench").glob(f"{name}.*.so")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_floors() -> SimpleNamespace:
    """The functions of all floors' modules by name."""
    found: dict[str, Any] = {}
    for module in map(load, FLOORS):
        found.update({name: value for name, value in vars(module).items() if not name.startswith("_")})
    return SimpleNamespace(**found)


def load_loops() -> SimpleNamespace:
    """The modules of the peers' loops by name."""
    return SimpleNamespace(**{name: load(name) for name in LOOPS})


def in_thread(call: Callable[..., Any], *arguments: Any) -> Any:
    """Run `call` in a new thread and return its result. A CPU affinity that it sets ends with the thread."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(call(*arguments)), daemon=True)
    thread.start()
    thread.join(SERVED_IN_S)
    if not found:
        raise RuntimeError(f"{call} failed, or did not end in {SERVED_IN_S:g} s")
    return found[0]


def fault_ns(
    floors: SimpleNamespace, tracked: tuple[int, int, int], cpus: Sequence[int], writer_cpu: int = 0
) -> Sequence[int]:
    """Nanoseconds of each write to protected memory, with a handler on each of `cpus`.

    `cpus` are indices of usable CPUs; `tracked` is the (descriptor, address, length) of `benchkit.protected`.
    """
    fd, addr, length = tracked
    floors.write_protect_ns(fd, addr, length, length, True)
    loop = floors.FaultLoop(fd, addr, length, len(cpus))
    handlers = [threading.Thread(target=loop.serve, args=(cpu,), daemon=True) for cpu in cpus]
    for handler in handlers:
        handler.start()
    taken: Sequence[int] = in_thread(loop.run, writer_cpu)
    for handler in handlers:
        handler.join(SERVED_IN_S)
    return taken


def spread_ns(name: str, taken: Sequence[int]) -> dict[str, float]:
    """Median, p99 and longest of single times, as samples."""
    order = sorted(taken)
    return {
        f"{name}_p50_ns": order[len(order) // 2],
        f"{name}_p99_ns": order[len(order) * 99 // 100],
        f"{name}_longest_ns": order[-1],
    }
