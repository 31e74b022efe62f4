/* Threads that write in a known order. usage: order WORDS KIND THREADS PAGES STRIDE
 * KIND: anon, thp, memfd, hugetlb, heap. COUNTERS: the last write of each thread. EXECUTE: execute another program. */
#include "order.h"

enum { EXECUTE = 7 };

int main(int argc, char **argv) {
    if (argc != 6)
        return 1;
    open_words(argv[1]);
    order_begin(argv[2], atoi(argv[3]), atoi(argv[4]), atoi(argv[5]));
    words[READY] = 1;
    while (!words[EXECUTE])
        usleep(1000);
    execlp("sleep", "sleep", "600", (char *)0);
    return 1;
}
