from typing import Literal

from _typeshed import ReadableBuffer, WriteableBuffer

Kernel = Literal["scalar", "avx2"]

KERNEL: Kernel
KERNELS: tuple[Kernel, ...]
SumKernel = Literal["apart", "folding"]
SUM_KERNELS: tuple[SumKernel, ...]

def copy_with(kernel: Kernel, dst: WriteableBuffer, src: ReadableBuffer) -> bool: ...
def nonzero_with(kernel: Kernel, src: ReadableBuffer) -> bool: ...
def copy_sum_with(
    kernel: SumKernel, dst: WriteableBuffer, src: ReadableBuffer, crc: int = 0
) -> int | None: ...
