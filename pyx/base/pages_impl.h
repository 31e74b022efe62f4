/* Copy one page and test it for non-zero bytes: a scalar reference and an AVX2 version. */
#ifndef SNAPENGINE_PAGES_IMPL_H
#define SNAPENGINE_PAGES_IMPL_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define SNAP_PAGE 4096

static int snap_copy_page_scalar(char *restrict dst, const char *restrict src) {
    uint64_t any = 0;
    for (int i = 0; i < SNAP_PAGE; i += 8) {
        uint64_t word;
        memcpy(&word, src + i, 8);
        any |= word;
        memcpy(dst + i, &word, 8);
    }
    return any != 0;
}

static int snap_page_nonzero_scalar(const char *src) {
    for (int i = 0; i < SNAP_PAGE; i += 8) {
        uint64_t word;
        memcpy(&word, src + i, 8);
        if (word)
            return 1;
    }
    return 0;
}

__attribute__((target("avx2"))) static int snap_copy_page_avx2(char *restrict dst, const char *restrict src) {
    __m256i any = _mm256_setzero_si256();
    for (int i = 0; i < SNAP_PAGE; i += 128) {
        __m256i a = _mm256_loadu_si256((const __m256i *)(src + i));
        __m256i b = _mm256_loadu_si256((const __m256i *)(src + i + 32));
        __m256i c = _mm256_loadu_si256((const __m256i *)(src + i + 64));
        __m256i d = _mm256_loadu_si256((const __m256i *)(src + i + 96));
        any = _mm256_or_si256(any, _mm256_or_si256(_mm256_or_si256(a, b), _mm256_or_si256(c, d)));
        _mm256_storeu_si256((__m256i *)(dst + i), a);
        _mm256_storeu_si256((__m256i *)(dst + i + 32), b);
        _mm256_storeu_si256((__m256i *)(dst + i + 64), c);
        _mm256_storeu_si256((__m256i *)(dst + i + 96), d);
    }
    return !_mm256_testz_si256(any, any);
}

__attribute__((target("avx2"))) static int snap_page_nonzero_avx2(const char *src) {
    for (int i = 0; i < SNAP_PAGE; i += 128) {
        __m256i a = _mm256_loadu_si256((const __m256i *)(src + i));
        __m256i b = _mm256_loadu_si256((const __m256i *)(src + i + 32));
        __m256i c = _mm256_loadu_si256((const __m256i *)(src + i + 64));
        __m256i d = _mm256_loadu_si256((const __m256i *)(src + i + 96));
        __m256i any = _mm256_or_si256(_mm256_or_si256(a, b), _mm256_or_si256(c, d));
        if (!_mm256_testz_si256(any, any))
            return 1;
    }
    return 0;
}

typedef int (*snap_copy_page_t)(char *restrict dst, const char *restrict src);
typedef int (*snap_page_nonzero_t)(const char *src);

static inline int snap_have_avx2(void) { return __builtin_cpu_supports("avx2"); }

#endif
