/* Targets with one oddity each. usage: odd WORDS vfork|seccomp|zombie */
#include "target.h"
#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>

static void count_for_ever(void) {
    words[READY] = 1;
    for (;;) {
        words[COUNTERS]++;
        usleep(500);
    }
}

/* The parent of a vfork sleeps uninterruptibly until its child executes or ends. */
static void wait_for_vfork(void) {
    pid_t self = getpid();
    words[READY] = 1;
    pid_t child = vfork();
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        words[VALUES] = (uint64_t)getpid();
        while (!words[MEMORY] && getppid() == self) /* it may have been killed before the prctl */
            usleep(1000);
        _exit(0);
    }
    waitpid(child, 0, 0);
    count_for_ever();
}

static void die_of_userfaultfd(void) {
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_userfaultfd, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {sizeof code / sizeof *code, code};
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program))
        exit(3);
    count_for_ever();
}

/* Has a zombie child; its pid is in VALUES. */
static void keep_zombie(void) {
    pid_t child = fork();
    if (child == 0)
        _exit(0);
    siginfo_t info;
    waitid(P_PID, (id_t)child, &info, WEXITED | WNOWAIT);
    words[VALUES] = (uint64_t)child;
    count_for_ever();
}

int main(int argc, char **argv) {
    open_words(argv[1]);
    if (argc > 2 && !strcmp(argv[2], "vfork"))
        wait_for_vfork();
    if (argc > 2 && !strcmp(argv[2], "seccomp"))
        die_of_userfaultfd();
    if (argc > 2 && !strcmp(argv[2], "zombie"))
        keep_zombie();
    count_for_ever();
}
