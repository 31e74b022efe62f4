"""The registers of one stopped thread, as the kernel returns them (ptrace(2): PTRACE_GETREGSET)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ThreadState:
    """One thread at T, x86-64.

    ``regs`` is the kernel's ``struct user_regs_struct`` (NT_PRSTATUS, 216 bytes), ``fpregs`` its
    ``struct user_fpregs_struct`` (NT_PRFPREG, 512 bytes), ``xstate`` the XSAVE area (NT_X86_XSTATE; its
    size depends on the CPU; may be empty). ``sigmask`` is the mask of blocked signals, bit n-1 for signal n.
    ``comm`` is the thread's name (at most 15 bytes).
    """

    tid: int
    comm: str
    regs: bytes
    fpregs: bytes
    xstate: bytes
    sigmask: int
