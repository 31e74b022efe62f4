from typing import Literal

from _typeshed import ReadableBuffer, WriteableBuffer

Kernel = Literal["scalar", "avx2"]

KERNEL: Kernel
KERNELS: tuple[Kernel, ...]

def copy_with(kernel: Kernel, dst: WriteableBuffer, src: ReadableBuffer) -> bool: ...
def nonzero_with(kernel: Kernel, src: ReadableBuffer) -> bool: ...
