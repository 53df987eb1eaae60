/* The two loops of the product that touch payload bytes. Compiled once per instruction set and
 * chosen when the module is loaded (GCC target_clones); 32-bit words are summed into 64-bit lanes,
 * so no carry is lost before 2^32 words. */
#ifndef PODLOOM_CHECKSUM_SUM_H
#define PODLOOM_CHECKSUM_SUM_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__gnu_linux__)
#define PODLOOM_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define PODLOOM_CLONES
#endif

/* Headers, and what vectors leave over, are too short for vectors to pay: 8 bytes at a time, the carry
 * added back (RFC 1071, section 2). */
static inline uint64_t podloom_sum_short(const uint8_t *data, size_t length)
{
    uint64_t sum = 0;
    uint32_t word;
    uint16_t half, last = 0;

    for (; length >= 8; data += 8, length -= 8) {
        uint64_t two_words;
        memcpy(&two_words, data, 8);
        sum += two_words;
        sum += sum < two_words;
    }
    sum = (sum & 0xFFFFFFFF) + (sum >> 32);
    if (length & 4) {
        memcpy(&word, data, 4);
        sum += word;
        data += 4;
    }
    if (length & 2) {
        memcpy(&half, data, 2);
        sum += half;
        data += 2;
    }
    if (length & 1) {
        memcpy(&last, data, 1);
        sum += last;
    }
    return sum;
}

PODLOOM_CLONES
static uint64_t podloom_sum_long(const uint8_t *data, size_t length, uint64_t total)
{
    size_t words = length / 4;
    uint64_t sum = 0;

    for (size_t i = 0; i < words; i++) {
        uint32_t word;
        memcpy(&word, data + i * 4, 4);
        sum += word;
    }
    return total + sum + podloom_sum_short(data + words * 4, length & 3);
}

static inline uint64_t podloom_sum(const uint8_t *data, size_t length, uint64_t total)
{
    return length < 128 ? total + podloom_sum_short(data, length) : podloom_sum_long(data, length, total);
}

PODLOOM_CLONES
static uint64_t podloom_sum_copy(uint8_t *restrict to, const uint8_t *restrict data, size_t length, uint64_t total)
{
    size_t words = length / 4;
    uint64_t sum = 0;

    for (size_t i = 0; i < words; i++) {
        uint32_t word;
        memcpy(&word, data + i * 4, 4);
        memcpy(to + i * 4, &word, 4);
        sum += word;
    }
    memcpy(to + words * 4, data + words * 4, length & 3);
    return total + sum + podloom_sum_short(data + words * 4, length & 3);
}

#endif
