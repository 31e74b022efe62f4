"""A caller's writable memory: what a capture or restore may use, and how it is kept exported meanwhile."""

from __future__ import annotations

import ctypes
import re
from typing import Any

_FIELD_NAME = re.compile(r":[^:]*:")  # PEP 3118: names in a format stand between colons


class HeldBuffer:
    """One buffer, or CPU tensor, exported so that its memory stays: ``addr`` and ``length`` in bytes.

    A buffer is exported, so that its owner cannot resize or close it (`BufferError`). Of a tensor, which has
    no buffer protocol, the storage is kept: a tensor can be given another one (``p.data = ...``, ``set_``)
    while it is in use. Neither stops an owner who frees the memory all the same (``resize(refcheck=False)``
    of numpy, ``resize_`` of a storage): `check` finds what was done before, the capture what comes after.

    ``read_only`` says in an error what follows from that. Raises TypeError (no buffer, Python objects) or
    ValueError (empty, read-only, not contiguous).
    """

    def __init__(self, name: str, buffer: Any, read_only: str = "it cannot be filled") -> None:
        self.name = name
        self._read_only = read_only
        self._export: Any = None
        self._buffer = buffer
        try:
            view = memoryview(buffer)
        except TypeError:
            self.addr, self.length = _tensor_address(name, buffer)
            self._export = _storage_of(buffer)
        else:
            self.addr, self.length = self._hold(view)
        if self.length == 0:
            raise ValueError(f"buffer {name!r} is empty")

    def _hold(self, view: memoryview) -> tuple[int, int]:
        if holds_objects(view.format):
            raise TypeError(
                f"buffer {self.name!r} holds Python objects (format {view.format!r}): its bytes are "
                "addresses, which mean nothing later; use an array of numbers or bytes, or pickle"
            )
        if view.readonly:
            raise ValueError(f"buffer {self.name!r} is read-only: {self._read_only}")
        if not view.c_contiguous:
            raise ValueError(f"buffer {self.name!r} is not C-contiguous")
        if view.nbytes == 0:
            return 0, 0
        self._export = (ctypes.c_char * view.nbytes).from_buffer(view)
        return ctypes.addressof(self._export), view.nbytes

    def check(self) -> None:
        """`ValueError`: the owner has moved or resized the memory since it was lent."""
        if self._export is None:
            raise ValueError(f"buffer {self.name!r} was released already: a target is used once")
        if isinstance(self._export, ctypes.Array):
            view = memoryview(self._buffer)
            now = ctypes.addressof((ctypes.c_char * view.nbytes).from_buffer(view)) if view.nbytes else 0
            same = (now, view.nbytes) == (self.addr, self.length)
        else:
            start, length = _storage_range(self._export, self.addr, self.length)
            same = start <= self.addr and self.addr + self.length <= start + length
        if not same:
            raise ValueError(f"buffer {self.name!r} was moved or resized since it was lent")

    def view(self) -> memoryview:
        """Its bytes, until `release`."""
        return memoryview((ctypes.c_char * self.length).from_address(self.addr)).cast("B")

    def release(self) -> None:
        """Let go of it. Idempotent."""
        self._export = self._buffer = None


def holds_objects(form: str) -> bool:
    """Whether a buffer of that format (PEP 3118) holds references to Python objects, also within records."""
    return "O" in _FIELD_NAME.sub("", form)


def _tensor_address(name: str, tensor: Any) -> tuple[int, int]:
    """Address and bytes of a CPU tensor (PyTorch's interface), which has no buffer protocol."""
    try:
        device, addr = str(tensor.device), int(tensor.data_ptr())
        length = int(tensor.numel()) * int(tensor.element_size())
        contiguous = bool(tensor.is_contiguous())
    except AttributeError:
        raise TypeError(f"{name!r}: {type(tensor).__name__} is neither a buffer nor a tensor") from None
    except RuntimeError as error:  # a sparse or a fake one
        raise ValueError(f"tensor {name!r} has no memory of its own: {error}") from None
    if device != "cpu":
        raise ValueError(f"tensor {name!r} is on {device}, not in this machine's memory")
    if not contiguous:
        raise ValueError(f"tensor {name!r} is not contiguous")
    if length and not addr:
        raise ValueError(f"tensor {name!r} has no memory of its own")
    return addr, length


def _storage_of(tensor: Any) -> Any:
    """What owns the bytes (PyTorch 2.0; before that the tensor is all there is to hold)."""
    return tensor.untyped_storage() if hasattr(tensor, "untyped_storage") else tensor


def _storage_range(storage: Any, addr: int, length: int) -> tuple[int, int]:
    if not hasattr(storage, "nbytes") or not hasattr(storage, "data_ptr"):
        return addr, length
    size = storage.nbytes
    return int(storage.data_ptr()), int(size() if callable(size) else size)
