/* A thread that is nearly always inside a restartable sequence (rseq(2)). usage: rseq WORDS
 *
 * COUNTERS: sequences finished; COUNTERS + 1: sequences that the kernel aborted, as it must when the
 * thread lost its CPU; ERRORS: sequences that finished although the kernel assumed that the thread had left them. */
#include "target.h"
#include <stddef.h>
#include <sys/rseq.h>

static struct rseq *area(void) { return (struct rseq *)((char *)__builtin_thread_pointer() + __rseq_offset); }

static int sequence(struct rseq *rseq, uint64_t *still_inside) {
    __asm__ goto(".pushsection .data.rel, \"aw\"\n\t.balign 32\n"
                 "3: .long 0, 0\n\t.quad 1f, 2f - 1f, 4f\n\t.popsection\n"
                 "leaq 3b(%%rip), %%rax\n\tmovq %%rax, %[section]\n"
                 "1: movq $300000, %%rcx\n"
                 "5: decq %%rcx\n\tjnz 5b\n\tmovq %[section], %%rdx\n\tmovq %%rdx, %[still]\n"
                 "2:\n"
                 ".pushsection .text.unlikely, \"ax\"\n\t.byte 0x0f, 0xb9, 0x3d\n\t.long 0x53053053\n"
                 "4: jmp %l[aborted]\n\t.popsection"
                 :
                 : [section] "m"(rseq->rseq_cs), [still] "m"(*still_inside)
                 : "rax", "rcx", "rdx", "memory", "cc"
                 : aborted);
    return 1;
aborted:
    return 0;
}

int main(int argc, char **argv) {
    uint64_t still_inside = 0;
    if (argc < 2 || __rseq_size == 0)
        return 3;
    open_words(argv[1]);
    words[READY] = 1;
    for (;;) {
        if (sequence(area(), &still_inside)) {
            words[COUNTERS]++;
            words[ERRORS] += still_inside == 0;
        } else {
            words[COUNTERS + 1]++;
        }
    }
}
