/* Threads that write in a known order. usage: order WORDS KIND THREADS PAGES STRIDE
 * KIND: anon, thp, memfd, hugetlb, heap. COUNTERS: the last write of each thread. */
#include "order.h"

int main(int argc, char **argv) {
    if (argc != 6)
        return 1;
    open_words(argv[1]);
    order_begin(argv[2], atoi(argv[3]), atoi(argv[4]), atoi(argv[5]));
    words[READY] = 1;
    for (;;)
        pause();
}
