// Causal attention within the sequences of a packed stream on a CPU, tile by tile (FlashAttention-2, arXiv:2307.08691,
// algorithms 1 and 2): scores live in tiles of 64 keys by 64 queries that stay in the first cache, and the backward
// makes them again from the logarithms of the softmax's sums. segment_attention.py has the formulas and the form in
// torch operations; compiled.py builds this file and says what the arguments are.
//
// Tiles hold keys in rows and queries in columns, so that every sum over keys, and every number of a query, runs along
// the vectors. Products are of bfloat16 in pairs (AVX512-BF16's dot product of two) or of float32; sums, scores and
// softmax are float32, and probabilities are rounded to the inputs' type before they are multiplied.

#include "numbers.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t TILE = 64;
constexpr float LOWEST = -1e30f;  // below every score: the maximum of none

// How a stored type is multiplied: `Unit` is PAIR adjacent numbers along the sum of a product.
template <class X> struct Product;

template <> struct Product<float> {
    typedef float Unit;
    static constexpr int64_t PAIR = 1;
    static Vector add(Vector sum, Unit a, const Unit* b) { return sum + load(b) * a; }
    static Unit pair(float x, float) { return x; }
    static void put_row(float* to, Vector x) { store(to, x); }
    static void put_pair(Unit* to, Vector x, Vector) { store(to, x); }
};

#ifdef __AVX512BF16__
template <> struct Product<bf16> {
    typedef std::uint32_t Unit;
    static constexpr int64_t PAIR = 2;
    static Vector add(Vector sum, Unit a, const Unit* b) {
        const __m512i many = _mm512_set1_epi32(int(a)), row = _mm512_loadu_si512(b);
        return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)many, (__m512bh)row);
    }
    static Unit pair(bf16 x, bf16 y) { return Unit(x.bits) | Unit(y.bits) << 16; }
    static void put_row(bf16* to, Vector x) {
        _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh((__m512)x));
    }
    static void put_pair(Unit* to, Vector x, Vector y) {
        const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x));
        const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)y));
        _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
};
#endif

template <class T> struct Buffer {
    explicit Buffer(int64_t size) : data((T*)::operator new(std::size_t(size) * sizeof(T), std::align_val_t(64))) {}
    ~Buffer() { ::operator delete(data, std::align_val_t(64)); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    T* data;
};

// A matrix of units, read one at a time: the left side of a product.
template <class Unit> struct Left {
    const Unit* data;
    int64_t row, step;
};

// c[R, 16 N] (+)= a[R, steps] b[steps, 16 N], all of c in registers.
template <class X, int R, int N, class Unit = typename Product<X>::Unit>
inline void small_product(
    Left<Unit> a, const Unit* b, int64_t b_step, float* c, int64_t c_row, int64_t steps, bool add
) {
    Vector sums[R][N];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) sums[r][n] = add ? load(c + r * c_row + n * LANES) : Vector{};
    for (int64_t k = 0; k < steps; k++) {
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int n = 0; n < N; n++)
                sums[r][n] = Product<X>::add(sums[r][n], a.data[r * a.row + k * a.step], b + k * b_step + n * LANES);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) store(c + r * c_row + n * LANES, sums[r][n]);
}

template <class X, int N, class Unit = typename Product<X>::Unit>
inline void columns_product(
    Left<Unit> a, const Unit* b, int64_t b_step, float* c, int64_t c_row, int64_t rows, int64_t steps, bool add
) {
    int64_t r = 0;
    for (; r + 6 <= rows; r += 6)
        small_product<X, 6, N>({a.data + r * a.row, a.row, a.step}, b, b_step, c + r * c_row, c_row, steps, add);
    for (; r + 2 <= rows; r += 2)
        small_product<X, 2, N>({a.data + r * a.row, a.row, a.step}, b, b_step, c + r * c_row, c_row, steps, add);
    if (r < rows) small_product<X, 1, N>({a.data + r * a.row, a.row, a.step}, b, b_step, c + r * c_row, c_row, steps, add);
}

// c[rows, columns] (+)= a[rows, steps] b[steps, columns]; columns a multiple of 16.
template <class X, class Unit = typename Product<X>::Unit>
void product(
    Left<Unit> a, const Unit* b, int64_t b_step, float* c, int64_t c_row, int64_t rows, int64_t columns, int64_t steps,
    bool add
) {
    int64_t n = 0;
    for (; n + 4 * LANES <= columns; n += 4 * LANES)
        columns_product<X, 4>(a, b + n, b_step, c + n, c_row, rows, steps, add);
    switch ((columns - n) / LANES) {
    case 3: return columns_product<X, 3>(a, b + n, b_step, c + n, c_row, rows, steps, add);
    case 2: return columns_product<X, 2>(a, b + n, b_step, c + n, c_row, rows, steps, add);
    case 1: return columns_product<X, 1>(a, b + n, b_step, c + n, c_row, rows, steps, add);
    }
}

// Rows of x [rows <= 64, depth] as columns: out [depth / PAIR, 64], zeros beyond the last.
template <class X, class Unit = typename Product<X>::Unit>
void as_columns(const X* x, int64_t stride, int64_t rows, int64_t depth, Unit* out) {
    constexpr int64_t P = Product<X>::PAIR;
    for (int64_t m = 0; m < rows; m++)
        for (int64_t d = 0; d < depth / P; d++)
            out[d * TILE + m] = Product<X>::pair(x[m * stride + d * P], x[m * stride + d * P + P - 1]);
    for (int64_t d = 0; d < depth / P; d++)
        for (int64_t m = rows; m < TILE; m++) out[d * TILE + m] = Unit{};
}

// PAIR rows of x [rows, depth] in one: out [ceil(rows / PAIR), depth], zeros after an odd last one.
template <class X, class Unit = typename Product<X>::Unit>
void as_pairs(const X* x, int64_t stride, int64_t rows, int64_t depth, Unit* out) {
    constexpr int64_t P = Product<X>::PAIR;
    int64_t n = 0;
    for (; n + P <= rows; n += P)
        for (int64_t d = 0; d < depth; d++)
            out[n / P * depth + d] = Product<X>::pair(x[n * stride + d], x[(n + P - 1) * stride + d]);
    if (n < rows)
        for (int64_t d = 0; d < depth; d++) out[n / P * depth + d] = Product<X>::pair(x[n * stride + d], X{});
}

// What all of the functions below are told. Strides are of heads and of tokens, in numbers.
struct Shape {
    // Of the sequences, [segments + 1]; those of the keys where the queries of a sequence are its last ones only.
    const int64_t *bounds, *key_bounds;
    int64_t segments, heads, kv, dim, width, window;
    int64_t group() const { return heads / kv; }
    int64_t tokens() const { return bounds[segments]; }
    int64_t keys() const { return key_bounds[segments]; }
    // From the number of a query to that of the key of the same token.
    int64_t key_of(int64_t segment, int64_t query) const {
        return query + key_bounds[segment + 1] - bounds[segment + 1];
    }
    // Where a sequence's paired rows begin, whatever PAIR is.
    int64_t paired(int64_t segment, int64_t pair) const { return (key_bounds[segment] + segment * (pair - 1)) / pair; }
    int64_t paired_rows(int64_t pair) const { return keys() / pair + segments + 1; }
    // The first tile of keys that the queries from the one at key `place` on may see.
    int64_t first_tile(int64_t start, int64_t place) const {
        return window && place + 1 - window > start ? start + (place + 1 - window - start) / TILE * TILE : start;
    }
};

template <class X> struct Tensor {
    const X* data;
    int64_t head, token;
    const X* at(int64_t h, int64_t t) const { return data + h * head + t * token; }
};

// For one key, the 16 queries from number `query` on: -1 where they may see it.
inline Integers visible(int64_t key, int64_t query, int64_t window) {
    Integers i;
    for (int j = 0; j < LANES; j++) i[j] = j;
    i += std::int32_t(query - key);
    const std::int32_t most = window ? std::int32_t(std::min<int64_t>(window, 1 << 30)) : 1 << 30;
    return (i >= 0) & (i < most);
}

inline bool all_visible(int64_t key, int64_t first_query, int64_t window) {
    return key <= first_query && (!window || first_query + TILE - 1 - key < window);
}

// c[keys, 64] = rows of `a` by the columns of a tile of queries; on the diagonal without what nobody may see.
template <class X, class Unit = typename Product<X>::Unit>
inline void scores(const X* a, int64_t stride, const Unit* b, float* c, int64_t keys, int64_t depth, bool diagonal) {
    constexpr int64_t P = Product<X>::PAIR;
    const Left<Unit> left = {(const Unit*)a, stride / P, 1};
    if (!diagonal) return product<X>(left, b, TILE, c, TILE, keys, TILE, depth / P, false);
    for (int64_t n = 0; n < keys; n += LANES)
        product<X>(
            {left.data + n * left.row, left.row, 1}, b + n, TILE, c + n * TILE + n, TILE, std::min(LANES, keys - n),
            TILE - n, depth / P, false
        );
}

template <class X>
void attention_forward(
    const X* q, const X* k, const X* v, X* out, float* lse, const int64_t* bounds, const int64_t* key_bounds,
    int64_t segments, int64_t heads, int64_t kv, int64_t dim, int64_t width, int64_t q_head, int64_t q_token,
    int64_t k_head, int64_t k_token, int64_t v_head, int64_t v_token, int64_t window, float scale, int64_t threads
) {
    typedef Product<X> By;
    typedef typename By::Unit Unit;
    constexpr int64_t P = By::PAIR;
    const Shape shape = {bounds, key_bounds, segments, heads, kv, dim, width, window};
    const Tensor<X> query = {q, q_head, q_token}, key = {k, k_head, k_token}, value = {v, v_head, v_token};
    const int64_t tokens = shape.tokens(), paired_rows = shape.paired_rows(P);
    Buffer<Unit> values(kv * paired_rows * width);
    struct Task {
        int64_t segment, first;
    };
    std::vector<Task> tasks;
    for (int64_t s = 0; s < segments; s++)
        for (int64_t first = bounds[s]; first < bounds[s + 1]; first += TILE) tasks.push_back({s, first});

#pragma omp parallel num_threads(team(tokens * heads * dim, threads))
    {
        Buffer<Unit> columns(dim / P * TILE), probs(TILE / P * TILE);
        Buffer<float> tile(TILE * TILE), sums(TILE * width);
#pragma omp for schedule(static) collapse(2)
        for (int64_t g = 0; g < kv; g++)
            for (int64_t s = 0; s < segments; s++)
                as_pairs(
                    value.at(g, key_bounds[s]), v_token, key_bounds[s + 1] - key_bounds[s], width,
                    values.data + (g * paired_rows + shape.paired(s, P)) * width
                );
#pragma omp for schedule(dynamic, 1)
        for (int64_t t = 0; t < int64_t(tasks.size()) * heads; t++) {
            const Task task = tasks[t / heads];
            const int64_t h = t % heads, g = h / shape.group(), first = task.first, start = key_bounds[task.segment];
            const int64_t place = shape.key_of(task.segment, first);
            const int64_t rows = std::min(TILE, bounds[task.segment + 1] - first);
            const Unit* paired = values.data + (g * paired_rows + shape.paired(task.segment, P)) * width;
            as_columns(query.at(h, first), q_token, rows, dim, columns.data);
            alignas(64) float most[TILE], total[TILE], factor[TILE];
            std::fill_n(most, TILE, LOWEST);
            std::fill_n(total, TILE, 0.0f);
            bool begun = false;
            for (int64_t from = shape.first_tile(start, place); from < place + rows; from += TILE, begun = true) {
                const int64_t keys = std::min(TILE, place + rows - from);
                scores(key.at(g, from), k_token, columns.data, tile.data, keys, dim, from == place);
                for (int64_t m = 0; m < TILE; m += LANES) {
                    const Vector before = load(most + m);
                    Vector now = before, sum = Vector{};
                    for (int64_t n = 0; n < keys; n++) {
                        Vector x = load(tile.data + n * TILE + m) * scale;
                        if (!all_visible(from + n, place, window))
                            x = visible(from + n, place + m, window) ? x : Vector{} - std::numeric_limits<float>::infinity();
                        store(tile.data + n * TILE + m, x);
                        now = larger(x, now);
                    }
                    for (int64_t n = 0; n < keys; n += P) {
                        Vector pair[2] = {};
                        for (int64_t i = 0; i < P && n + i < keys; i++) {
                            const Vector x = load(tile.data + (n + i) * TILE + m);
                            Vector p = exponentials(x - now);
                            if (!all_visible(from + n + i, place, window))
                                p = visible(from + n + i, place + m, window) ? p : Vector{};
                            pair[i] = p;
                            sum += p;
                        }
                        By::put_pair(probs.data + n / P * TILE + m, pair[0], pair[1]);
                    }
                    const Vector shrink = exponentials(before - now);
                    store(factor + m, shrink);
                    store(most + m, now);
                    store(total + m, load(total + m) * shrink + sum);
                }
                if (begun)
                    for (int64_t m = 0; m < rows; m++)
                        for (int64_t d = 0; d < width; d++) sums.data[m * width + d] *= factor[m];
                product<X>(
                    {probs.data, 1, TILE}, paired + (from - start) / P * width, width, sums.data, width, rows, width,
                    (keys + P - 1) / P, begun
                );
            }
            for (int64_t m = 0; m < rows; m++) {
                // Where every score overflowed to -inf there is no softmax, and nothing finite may come out.
                const float share = most[m] > LOWEST ? 1.0f / total[m] : std::numeric_limits<float>::quiet_NaN();
                X* to = out + ((first + m) * heads + h) * width;
                for (int64_t d = 0; d < width; d++) put(to[d], sums.data[m * width + d] * share);
                lse[h * tokens + first + m] = most[m] - std::log(share);
            }
        }
    }
}

// dk and dv [splits, keys, kv, ...] are zeros to be added to: one for each query head of a group, or one for all.
template <class X>
void attention_backward(
    const X* q, const X* k, const X* v, const X* out, const X* dout, const float* lse, X* dq, float* dk, float* dv,
    const int64_t* bounds, const int64_t* key_bounds, int64_t segments, int64_t heads, int64_t kv, int64_t dim,
    int64_t width, int64_t q_head, int64_t q_token, int64_t k_head, int64_t k_token, int64_t v_head, int64_t v_token,
    int64_t dq_head, int64_t dq_token, int64_t splits, int64_t window, float scale, int64_t threads
) {
    typedef Product<X> By;
    typedef typename By::Unit Unit;
    constexpr int64_t P = By::PAIR;
    const Shape shape = {bounds, key_bounds, segments, heads, kv, dim, width, window};
    const Tensor<X> query = {q, q_head, q_token}, key = {k, k_head, k_token}, value = {v, v_head, v_token};
    const Tensor<X> output = {out, width, heads * width}, upstream = {dout, width, heads * width};
    const int64_t tokens = shape.tokens(), each = shape.group() / splits;
    std::vector<int64_t> order(segments);  // the longest first: the threads end together
    for (int64_t s = 0; s < segments; s++) order[s] = s;
    std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
        const int64_t x = key_bounds[a + 1] - key_bounds[a], y = key_bounds[b + 1] - key_bounds[b];
        return x != y ? x > y : a < b;
    });
    const int64_t longest = segments ? key_bounds[order[0] + 1] - key_bounds[order[0]] : 0;

#pragma omp parallel num_threads(team(tokens * heads * dim, threads))
    {
        Buffer<Unit> keys_paired((longest / P + 1) * dim), q_columns(dim / P * TILE), d_columns(width / P * TILE);
        Buffer<Unit> q_pairs(TILE / P * dim), d_pairs(TILE / P * width), dscores_paired(TILE / P * TILE);
        Buffer<float> tile(TILE * TILE), dtile(TILE * TILE), dquery(TILE * dim);
        Buffer<X> probs(TILE * TILE), dscores(TILE * TILE);
#pragma omp for schedule(dynamic, 1)
        for (int64_t t = 0; t < segments * kv * splits; t++) {
            const int64_t s = order[t / (kv * splits)], g = t / splits % kv, split = t % splits;
            const int64_t start = key_bounds[s], end = bounds[s + 1];
            as_pairs(key.at(g, start), k_token, key_bounds[s + 1] - start, dim, keys_paired.data);
            for (int64_t part = 0; part < each; part++) {
                const int64_t h = g * shape.group() + split * each + part;
                for (int64_t first = bounds[s]; first < end; first += TILE) {
                    const int64_t rows = std::min(TILE, end - first), pairs = (rows + P - 1) / P;
                    const int64_t place = shape.key_of(s, first);
                    as_columns(query.at(h, first), q_token, rows, dim, q_columns.data);
                    as_columns(upstream.at(h, first), upstream.token, rows, width, d_columns.data);
                    as_pairs(query.at(h, first), q_token, rows, dim, q_pairs.data);
                    as_pairs(upstream.at(h, first), upstream.token, rows, width, d_pairs.data);
                    alignas(64) float inner[TILE] = {}, logs[TILE] = {};
                    for (int64_t m = 0; m < rows; m++) {
                        const X *o = output.at(h, first + m), *d = upstream.at(h, first + m);
                        float sum = 0;
#pragma omp simd reduction(+ : sum)
                        for (int64_t j = 0; j < width; j++) sum += get(o[j]) * get(d[j]);
                        inner[m] = sum;
                        logs[m] = lse[h * tokens + first + m];
                    }
                    bool begun = false;
                    const int64_t seen = place + rows;
                    for (int64_t from = shape.first_tile(start, place); from < seen; from += TILE, begun = true) {
                        const int64_t keys = std::min(TILE, seen - from);
                        scores(key.at(g, from), k_token, q_columns.data, tile.data, keys, dim, from == place);
                        scores(value.at(g, from), v_token, d_columns.data, dtile.data, keys, width, from == place);
                        for (int64_t m = 0; m < TILE; m += LANES) {
                            const Vector log = load(logs + m), mean = load(inner + m);
                            for (int64_t n = 0; n < keys; n += P) {
                                Vector pair[2] = {};
                                for (int64_t i = 0; i < P && n + i < keys; i++) {
                                    const int64_t at = (n + i) * TILE + m;
                                    Vector p = exponentials(load(tile.data + at) * scale - log);
                                    Vector d = p * (load(dtile.data + at) - mean) * scale;
                                    if (!all_visible(from + n + i, place, window)) {
                                        const Integers sees = visible(from + n + i, place + m, window);
                                        p = sees ? p : Vector{};
                                        d = sees ? d : Vector{};
                                    }
                                    By::put_row(probs.data + at, p);
                                    By::put_row(dscores.data + at, d);
                                    pair[i] = d;
                                }
                                By::put_pair(dscores_paired.data + n / P * TILE + m, pair[0], pair[1]);
                            }
                        }
                        const int64_t to = (split * shape.keys() + from) * kv + g;
                        product<X>(
                            {(const Unit*)probs.data, TILE / P, 1}, d_pairs.data, width, dv + to * width, kv * width,
                            keys, width, pairs, true
                        );
                        product<X>(
                            {(const Unit*)dscores.data, TILE / P, 1}, q_pairs.data, dim, dk + to * dim, kv * dim, keys,
                            dim, pairs, true
                        );
                        product<X>(
                            {dscores_paired.data, 1, TILE}, keys_paired.data + (from - start) / P * dim, dim,
                            dquery.data, dim, rows, dim, (keys + P - 1) / P, begun
                        );
                    }
                    for (int64_t m = 0; m < rows; m++) {
                        X* row = dq + h * dq_head + (first + m) * dq_token;
                        for (int64_t d = 0; d < dim; d++) put(row[d], dquery.data[m * dim + d]);
                    }
                }
            }
        }
    }
}

}  // namespace

#define PUBLIC extern "C" const void* const
PUBLIC attention_forward_f = (const void*)&attention_forward<float>;
PUBLIC attention_backward_f = (const void*)&attention_backward<float>;
#ifdef __AVX512BF16__
PUBLIC attention_forward_b = (const void*)&attention_forward<bf16>;
PUBLIC attention_backward_b = (const void*)&attention_backward<bf16>;
#else  // bfloat16 that is not multiplied in hardware is left to torch's operations
PUBLIC attention_forward_b = nullptr;
PUBLIC attention_backward_b = nullptr;
#endif
