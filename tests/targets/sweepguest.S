/* A machine without an operating system that writes for ever. Boots from the first sector of a disk, fills
 * the pages of [1 MiB, END) with their own address, says 'R' on the serial port, and then adds 1 to byte 8 of
 * each page of [1 MiB, HOT), over and over. So along the addresses these bytes make one step at most at any
 * instant. At 0x8000 it counts its rounds. */
        .code16
        .globl _start
_start: cli
        xor %ax, %ax
        mov %ax, %ds
        in $0x92, %al                   /* address line 20 */
        or $2, %al
        out %al, $0x92
        lgdt table
        mov $1, %eax
        mov %eax, %cr0
        data32 ljmp $8, $wide
        .code32
wide:   mov $16, %eax
        mov %eax, %ds
        mov $0x100000, %edi
fill:   mov %edi, (%edi)
        mov %edi, 0x800(%edi)
        add $0x1000, %edi
        cmp $END, %edi
        jb fill
        mov $0x3f8, %dx
        mov $'R', %al
        out %al, %dx
round:  mov $0x100000, %edi
sweep:  incb 8(%edi)
        add $0x1000, %edi
        cmp $HOT, %edi
        jb sweep
        incl 0x8000
        jmp round
        .balign 8
flat:   .quad 0, 0x00cf9a000000ffff, 0x00cf92000000ffff
table:  .word 23
        .long flat
        .org 510
        .byte 0x55, 0xaa
