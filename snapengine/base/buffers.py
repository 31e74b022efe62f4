"""Writable buffers of a caller: validation, and their export during a capture or restore."""

from __future__ import annotations

import ctypes
import re
from typing import Any

_FIELD_NAME = re.compile(r":[^:]*:")  # PEP 3118: names in a format are enclosed in colons


class ExportedBuffer:
    """One buffer or CPU tensor, exported so that its memory stays valid: ``addr`` and ``length`` in bytes.

    The owner of an exported buffer cannot resize or close it (`BufferError`). A tensor has no buffer
    protocol: a reference to its storage is held, since the tensor can get another storage (``p.data = ...``,
    ``set_``) while it is in use. The owner can still free the memory (``resize(refcheck=False)`` of numpy,
    ``resize_`` of a storage): `check` detects it before a capture, the capture detects it later.

    ``read_only`` is the text of an error about a read-only buffer. Raises TypeError (no buffer, Python
    objects) or ValueError (empty, read-only, not contiguous).
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
            self.addr, self.length = self._export_view(view)
        if self.length == 0:
            raise ValueError(f"buffer {name!r} is empty")

    def _export_view(self, view: memoryview) -> tuple[int, int]:
        if holds_objects(view.format):
            raise TypeError(
                f"buffer {self.name!r} holds Python objects (format {view.format!r}): its bytes are "
                "addresses, which are invalid later; use an array of numbers or bytes, or pickle"
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
        """Raise ValueError if the owner has moved or resized the memory since the export."""
        if self._export is None:
            raise ValueError(f"buffer {self.name!r} was already released: a target can be used only once")
        if isinstance(self._export, ctypes.Array):
            view = memoryview(self._buffer)
            now = ctypes.addressof((ctypes.c_char * view.nbytes).from_buffer(view)) if view.nbytes else 0
            same = (now, view.nbytes) == (self.addr, self.length)
        else:
            start, length = _storage_range(self._export, self.addr, self.length)
            same = start <= self.addr and self.addr + self.length <= start + length
        if not same:
            raise ValueError(f"buffer {self.name!r} was moved or resized after it was passed to the target")

    def view(self) -> memoryview:
        """The bytes of the buffer; valid until `release`."""
        return memoryview((ctypes.c_char * self.length).from_address(self.addr)).cast("B")

    def release(self) -> None:
        """Release the buffer. Idempotent."""
        self._export = self._buffer = None


def holds_objects(form: str) -> bool:
    """Whether a buffer of this format (PEP 3118) contains references to Python objects, also in records."""
    return "O" in _FIELD_NAME.sub("", form)


def _tensor_address(name: str, tensor: Any) -> tuple[int, int]:
    """Address and bytes of a CPU tensor (PyTorch's interface), which has no buffer protocol."""
    try:
        device, addr = str(tensor.device), int(tensor.data_ptr())
        length = int(tensor.numel()) * int(tensor.element_size())
        contiguous = bool(tensor.is_contiguous())
    except AttributeError:
        raise TypeError(f"{name!r}: {type(tensor).__name__} is neither a buffer nor a tensor") from None
    except RuntimeError as error:  # a sparse or fake tensor
        raise ValueError(f"tensor {name!r} has no memory of its own: {error}") from None
    if device != "cpu":
        raise ValueError(f"tensor {name!r} is on {device}, not in host memory: only CPU tensors can be used")
    if not contiguous:
        raise ValueError(f"tensor {name!r} is not contiguous")
    if length and not addr:
        raise ValueError(f"tensor {name!r} has no memory of its own")
    return addr, length


def _storage_of(tensor: Any) -> Any:
    """The owner of the bytes: the storage (PyTorch 2.0), in earlier versions the tensor."""
    return tensor.untyped_storage() if hasattr(tensor, "untyped_storage") else tensor


def _storage_range(storage: Any, addr: int, length: int) -> tuple[int, int]:
    if not hasattr(storage, "nbytes") or not hasattr(storage, "data_ptr"):
        return addr, length
    size = storage.nbytes
    return int(storage.data_ptr()), int(size() if callable(size) else size)
