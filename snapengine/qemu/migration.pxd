# The constants of QEMU's migration stream. Extern only: there is no .pyx.

cdef extern from "snapengine/internal/migration.h" nogil:
    const unsigned int VM_MAGIC
    const int VM_VERSION
    const int VM_EOF
    const int VM_START
    const int VM_PART
    const int VM_END
    const int VM_FULL
    const int VM_SUBSECTION
    const int VM_DESCRIPTION
    const int VM_CONFIGURATION
    const int VM_COMMAND
    const int VM_FOOTER
    const int VM_CMD_SWITCHOVER_START
    const int VM_RAM_VERSION
    const unsigned long long RAM_ZERO
    const unsigned long long RAM_MEM_SIZE
    const unsigned long long RAM_PAGE
    const unsigned long long RAM_EOS
    const unsigned long long RAM_CONTINUE
    const unsigned long long RAM_XBZRLE
    const unsigned long long RAM_HOOK
    const unsigned long long RAM_COMPRESS_PAGE
    const unsigned long long RAM_MULTIFD_FLUSH
    unsigned long long vm_load64(const void *src)
    void vm_store64(void *dst, unsigned long long value)
