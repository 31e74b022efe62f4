/* Coverage of C code for libFuzzer, with any gcc: -fsanitize-coverage=trace-pc calls this at each edge.
 *
 * libFuzzer itself wants clang's inline counters; so the edges are counted here, by a hash of the address, and
 * the counters are handed to it (fuzz/run.py) as if they were a module's.
 */
#include <stdint.h>

#define COUNTERS 16384

uint8_t fuzz_counters[COUNTERS];
uintptr_t fuzz_addresses[2 * COUNTERS]; /* libFuzzer wants an (address, flags) pair for each counter */

void __sanitizer_cov_trace_pc(void) {
    uint64_t from = (uint64_t)__builtin_return_address(0);
    fuzz_counters[from * UINT64_C(0x9E3779B97F4A7C15) >> 50]++;
}
