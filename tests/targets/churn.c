/* Threads that keep creating threads, and one that keeps forking. usage: churn WORDS */
#include "target.h"
#include <pthread.h>
#include <sys/wait.h>

static void *nothing(void *arg) {
    for (volatile int i = 0; i < 2000; i++)
        ;
    return arg;
}

static void *make_threads(void *arg) {
    for (;;) {
        pthread_t thread;
        if (pthread_create(&thread, 0, nothing, 0) == 0)
            pthread_join(thread, 0);
        else
            words[ERRORS]++;
        words[COUNTERS]++;
    }
    return arg;
}

static void *make_processes(void *arg) {
    for (;;) {
        int status = 0;
        pid_t child = fork();
        if (child == 0)
            _exit(7);
        if (child < 0 || waitpid(child, &status, 0) != child || WEXITSTATUS(status) != 7)
            words[ERRORS]++;
        words[COUNTERS + 1]++;
    }
    return arg;
}

int main(int argc, char **argv) {
    pthread_t thread;
    if (argc < 2)
        return 1;
    open_words(argv[1]);
    for (int i = 0; i < 3; i++)
        pthread_create(&thread, 0, make_threads, 0);
    words[READY] = 1;
    make_processes(0);
}
