/* QEMU's migration stream, file version 3, as QEMU 7.2 and 10.0 write it. All integers are big-endian. */
#ifndef SNAPENGINE_MIGRATION_H
#define SNAPENGINE_MIGRATION_H

#define VM_MAGIC 0x5145564du /* "QEVM" */
#define VM_VERSION 3

/* The first byte of each part of a stream. */
#define VM_EOF 0x00
#define VM_START 0x01
#define VM_PART 0x02
#define VM_END 0x03
#define VM_FULL 0x04
#define VM_SUBSECTION 0x05
#define VM_DESCRIPTION 0x06
#define VM_CONFIGURATION 0x07
#define VM_COMMAND 0x08
#define VM_FOOTER 0x7e

#define VM_CMD_SWITCHOVER_START 11

/* The section "ram", version 4: flags in the low 12 bits of a record's first u64. */
#define VM_RAM_VERSION 4
#define RAM_ZERO 0x02
#define RAM_MEM_SIZE 0x04
#define RAM_PAGE 0x08
#define RAM_EOS 0x10
#define RAM_CONTINUE 0x20
#define RAM_XBZRLE 0x40
#define RAM_HOOK 0x80
#define RAM_COMPRESS_PAGE 0x100
#define RAM_MULTIFD_FLUSH 0x200

static inline unsigned long long vm_load64(const void *from)
{
    unsigned long long value;
    __builtin_memcpy(&value, from, 8);
    return __builtin_bswap64(value);
}

static inline void vm_store64(void *to, unsigned long long value)
{
    value = __builtin_bswap64(value);
    __builtin_memcpy(to, &value, 8);
}

#endif
