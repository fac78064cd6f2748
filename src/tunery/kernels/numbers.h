// What the kernels of this folder share: bfloat16, the exponential, and how many threads are worth waking.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <omp.h>

using std::int64_t;

struct bf16 {
    std::uint16_t bits;
};

static inline float get(float x) { return x; }

static inline float get(bf16 x) {
    const std::uint32_t bits = std::uint32_t(x.bits) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}

static inline void put(float& to, float x) { to = x; }

// To the nearest, ties to even; what is not a number stays so.
static inline void put(bf16& to, float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const std::uint32_t nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    to.bits = x != x ? 0x7fc0 : std::uint16_t(nearest);
}

template <class X> static inline float rounded(float x) {
    X y;
    put(y, x);
    return get(y);
}

// exp(x) to about two units in the last place: 2^n e^r with |r| <= ln 2 / 2, and seven terms of the series of e^r.
// ln 2 is taken off in two parts, the first with so few bits that n times it is exact. (The library's own expf is a
// call for each number, which keeps the loops around it from being vectorised.)
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    const float n = std::rint(x * 1.44269504f);
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float y = 1.0f / 5040;
    y = y * r + 1.0f / 720;
    y = y * r + 1.0f / 120;
    y = y * r + 1.0f / 24;
    y = y * r + 1.0f / 6;
    y = y * r + 0.5f;
    y = y * r + 1.0f;
    y = y * r + 1.0f;
    const std::int32_t power = (std::int32_t(n) + 127) << 23;
    float two_to_n;
    std::memcpy(&two_to_n, &power, 4);
    return y * two_to_n;
}

// Below this many elements waking the other threads costs more than they do.
static inline int team(int64_t elements, int64_t threads) { return elements < 16384 ? 1 : int(threads); }
