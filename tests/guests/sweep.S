/* A firmware that writes into the pages of a machine in address order, for ever.

   It takes the place of the BIOS (-bios): where KVM emulates code that runs without paging, SeaBIOS alone
   takes minutes. Symbols to be given to the assembler:
     START, END   addresses of 4 KiB pages: these are swept
     DELAY        turns of an empty loop after each page
     TICK         a power of two: after so many pages a '.' goes to the serial port

   Sweep number n writes n into the first word of a page, then into the word at 4088, then counts the page in
   PROGRESS. Under x86's store order a state of one instant holds a prefix of these writes; see sweepkit.py. */

ROM = 0xf0000                   /* where the 64 KiB are mapped below 1 MiB */
PROGRESS = 0x8000
SERIAL = 0x3f8

    .macro say byte
    movw $SERIAL, %dx
    movb $\byte, %al
    outb %al, %dx
    .endm

    .code16
    .globl _start
_start:
    cli
    lgdtl %cs:gdt_address - _start
    movl $1, %eax
    movl %eax, %cr0
    ljmpl $8, $(ROM + protected - _start)

    .code32
protected:
    movl $16, %eax
    movl %eax, %ds
    movl %eax, %es
    inb $0x92, %al              /* the A20 gate: without it every odd MiB aliases the one before */
    orb $2, %al
    outb %al, $0x92
    say 'A'
    xorl %ebp, %ebp
sweep:
    incl %ebp
    movl $START, %edi
page:
    movl %ebp, (%edi)
    movl %ebp, 4088(%edi)
    incl PROGRESS
    .if DELAY
    movl $DELAY, %ecx
delay:
    decl %ecx
    jnz delay
    .endif
    testl $(TICK - 1), PROGRESS
    jnz quiet
    say '.'
quiet:
    addl $4096, %edi
    cmpl $END, %edi
    jb page
    cmpl $1, %ebp
    jne sweep
    say 'B'                     /* every page has a number now */
    jmp sweep

    .balign 8
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff    /* 4 GiB of code, marked as accessed: nothing can be written here */
    .quad 0x00cf93000000ffff    /* 4 GiB of data */
gdt_address:
    .word gdt_address - gdt - 1
    .long ROM + gdt - _start

    .org 0xfff0                 /* where a processor starts */
    .code16
    ljmpw $(ROM >> 4), $0
    .org 0x10000
