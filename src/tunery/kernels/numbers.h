// What the kernels of this folder share: bfloat16, vectors, the exponential, how many threads are worth waking.

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

// Sixteen numbers at a time. Compilers make of it whatever the processor has.
constexpr int64_t LANES = 16;
typedef float Vector __attribute__((vector_size(64)));
typedef std::int32_t Integers __attribute__((vector_size(64)));
typedef std::uint32_t Words __attribute__((vector_size(64)));
typedef std::uint16_t Halves __attribute__((vector_size(32)));

static inline Vector load(const float* from) {
    Vector v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

static inline Vector load(const bf16* from) {
    Halves h;
    std::memcpy(&h, from, sizeof h);
    return (Vector)(__builtin_convertvector(h, Words) << 16);
}

static inline void store(float* to, Vector v) { std::memcpy(to, &v, sizeof v); }

static inline void store(bf16* to, Vector v) {
    const Words bits = (Words)v, nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Halves h = __builtin_convertvector(v == v ? nearest : Words{} + 0x7fc0, Halves);
    std::memcpy(to, &h, sizeof h);
}

static inline Vector larger(Vector a, Vector b) { return a > b ? a : b; }

static inline float sum_of(Vector v) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += v[i];
    return sum;
}

// The exponential above, sixteen at a time.
static inline Vector exponentials(Vector x) {
    const Vector lowest = Vector{} - 87.0f, highest = Vector{} + 88.0f, magic = Vector{} + 12582912.0f;
    x = x < lowest ? lowest : x;
    x = x > highest ? highest : x;
    const Vector n = (x * 1.44269504f + magic) - magic;  // rounded to a whole number
    const Vector r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Vector y = Vector{} + 1.0f / 5040;
    y = y * r + 1.0f / 720;
    y = y * r + 1.0f / 120;
    y = y * r + 1.0f / 24;
    y = y * r + 1.0f / 6;
    y = y * r + 0.5f;
    y = y * r + 1.0f;
    y = y * r + 1.0f;
    const Integers power = (__builtin_convertvector(n, Integers) + 127) << 23;
    return y * (Vector)power;
}
