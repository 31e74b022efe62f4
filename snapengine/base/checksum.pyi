from typing import Any, Literal

Kernel = Literal["libcrc32c", "folding"]

KERNELS: tuple[Kernel, ...]

def crc32c_of(data: Any, crc: int = 0) -> int: ...
def crc32c_with(kernel: Kernel, data: Any, crc: int = 0) -> int: ...
