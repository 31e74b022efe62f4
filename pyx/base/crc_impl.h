/* CRC-32C by folding (VPCLMULQDQ on AVX-512 registers), alone and fused into the copy of a page.
 *
 * A CRC is a remainder modulo P = x^32 + 0x1EDC6F41. A block of 128 bits that precedes another by D bits can
 * therefore be replaced by (half that is first in memory) * x^(D+64) + (other half) * x^D, reduced and added
 * to the other block: two carry-less multiplications. Sixteen accumulators of 128 bits process the data. At
 * the end they are folded into one, and the crc32 instruction computes its remainder.
 *
 * The constants are x^(D+32) and x^(D-32) mod P, bit-reversed and shifted left by one: the CRC is
 * bit-reflected, and the reflected product of two 64-bit numbers is one bit short. */
#ifndef SNAPENGINE_CRC_IMPL_H
#define SNAPENGINE_CRC_IMPL_H

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define SNAP_FOLD_TARGET __attribute__((target("avx512f,avx512vl,vpclmulqdq,pclmul,sse4.2")))
#define SNAP_FOLD_INLINE SNAP_FOLD_TARGET __attribute__((always_inline)) static inline

static inline int snap_have_folding(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("vpclmulqdq") && __builtin_cpu_supports("pclmul") &&
           __builtin_cpu_supports("sse4.2");
}

SNAP_FOLD_INLINE __m128i snap_by_2048(void) { return _mm_set_epi64x(0xb9e02b86, 0xdcb17aa4); }
SNAP_FOLD_INLINE __m128i snap_by_512(void) { return _mm_set_epi64x(0x9e4addf8, 0x740eef02); }
SNAP_FOLD_INLINE __m128i snap_by_128(void) { return _mm_set_epi64x(0x14cd00bd6, 0xf20c0dfe); }

SNAP_FOLD_INLINE __m512i snap_fold(__m512i folded, __m512i by, __m512i next) {
    return _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(folded, by, 0x00),
                                     _mm512_clmulepi64_epi128(folded, by, 0x11), next, 0x96);
}

SNAP_FOLD_INLINE __m128i snap_fold_one(__m128i folded, __m128i next) {
    __m128i by = snap_by_128();
    return _mm_xor_si128(_mm_xor_si128(_mm_clmulepi64_si128(folded, by, 0x00),
                                       _mm_clmulepi64_si128(folded, by, 0x11)), next);
}

/* The remainder of four adjacent blocks of 64 bytes. */
SNAP_FOLD_INLINE uint32_t snap_remainder(__m512i a, __m512i b, __m512i c, __m512i d) {
    __m512i by = _mm512_broadcast_i32x4(snap_by_512());
    a = snap_fold(snap_fold(snap_fold(a, by, b), by, c), by, d);
    __m128i one = _mm512_extracti32x4_epi32(a, 0);
    one = snap_fold_one(one, _mm512_extracti32x4_epi32(a, 1));
    one = snap_fold_one(one, _mm512_extracti32x4_epi32(a, 2));
    one = snap_fold_one(one, _mm512_extracti32x4_epi32(a, 3));
    uint64_t rest = _mm_crc32_u64(0, (uint64_t)_mm_cvtsi128_si64(one));
    return (uint32_t)_mm_crc32_u64(rest, (uint64_t)_mm_extract_epi64(one, 1));
}

/* Add the remainder of the preceding bytes to the first 32 bits. */
SNAP_FOLD_INLINE __m512i snap_begin(__m512i first, uint32_t rest) {
    return _mm512_xor_si512(first, _mm512_zextsi128_si512(_mm_cvtsi32_si128((int)rest)));
}

SNAP_FOLD_TARGET static inline uint32_t snap_crc32c_folding(uint32_t crc, const void *data, size_t length) {
    const char *at = (const char *)data;
    uint32_t rest = ~crc;
    if (length >= 256) {
        __m512i by = _mm512_broadcast_i32x4(snap_by_2048());
        __m512i a = snap_begin(_mm512_loadu_si512(at), rest);
        __m512i b = _mm512_loadu_si512(at + 64);
        __m512i c = _mm512_loadu_si512(at + 128);
        __m512i d = _mm512_loadu_si512(at + 192);
        for (at += 256, length -= 256; length >= 256; at += 256, length -= 256) {
            a = snap_fold(a, by, _mm512_loadu_si512(at));
            b = snap_fold(b, by, _mm512_loadu_si512(at + 64));
            c = snap_fold(c, by, _mm512_loadu_si512(at + 128));
            d = snap_fold(d, by, _mm512_loadu_si512(at + 192));
        }
        rest = snap_remainder(a, b, c, d);
    }
    for (; length >= 8; at += 8, length -= 8) {
        uint64_t word;
        memcpy(&word, at, 8);
        rest = (uint32_t)_mm_crc32_u64(rest, word);
    }
    for (; length; at++, length--)
        rest = _mm_crc32_u8(rest, (unsigned char)*at);
    return ~rest;
}

/* Copy a page. Unless it is all zero, continue *crc over it and return 1. */
SNAP_FOLD_TARGET static inline int snap_copy_page_folding(char *restrict dst, const char *restrict src,
                                                   uint32_t *crc) {
    __m512i by = _mm512_broadcast_i32x4(snap_by_2048());
    __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a, any = a;
    for (int i = 0; i < 4096; i += 256) {
        __m512i w = _mm512_loadu_si512(src + i);
        __m512i x = _mm512_loadu_si512(src + i + 64);
        __m512i y = _mm512_loadu_si512(src + i + 128);
        __m512i z = _mm512_loadu_si512(src + i + 192);
        any = _mm512_ternarylogic_epi64(_mm512_ternarylogic_epi64(any, w, x, 0xfe), y, z, 0xfe);
        _mm512_storeu_si512(dst + i, w);
        _mm512_storeu_si512(dst + i + 64, x);
        _mm512_storeu_si512(dst + i + 128, y);
        _mm512_storeu_si512(dst + i + 192, z);
        a = snap_fold(a, by, i ? w : snap_begin(w, ~*crc));
        b = snap_fold(b, by, x);
        c = snap_fold(c, by, y);
        d = snap_fold(d, by, z);
    }
    if (!_mm512_test_epi64_mask(any, any))
        return 0;
    *crc = ~snap_remainder(a, b, c, d);
    return 1;
}

#endif
