"""Builds and loads the native modules of the bench, and runs the loops that need threads."""

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
    """Compile what is older than its source into build/bench/ (never a part of the wheel)."""
    subprocess.run([sys.executable, str(ROOT / "bench/setup_floors.py")], check=True)


def load(name: str) -> ModuleType:
    """One built module."""
    (path,) = (ROOT / "build/bench").glob(f"{name}.*.so")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_floors() -> SimpleNamespace:
    """What all modules of floors offer, under their names."""
    found: dict[str, Any] = {}
    for module in map(load, FLOORS):
        found.update({name: value for name, value in vars(module).items() if not name.startswith("_")})
    return SimpleNamespace(**found)


def load_loops() -> SimpleNamespace:
    """The modules of the peers' loops, under their names."""
    return SimpleNamespace(**{name: load(name) for name in LOOPS})


def in_thread(call: Callable[..., Any], *arguments: Any) -> Any:
    """What `call` returns in a thread of its own: a CPU that it binds itself to ends with it."""
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
    """Nanoseconds of each write to protected memory, with a handler on each of `cpus` (numbers of usable
    CPUs). `tracked`: (descriptor, address, length) as `benchkit.protected` gives it."""
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
    """Three samples of single times: median, p99 and the longest."""
    order = sorted(taken)
    return {
        f"{name}_p50_ns": order[len(order) // 2],
        f"{name}_p99_ns": order[len(order) * 99 // 100],
        f"{name}_longest_ns": order[-1],
    }
