// Cross-entropy of rows of logits and its gradient, which takes their place: three passes over a row in the cache, where
// torch's operations take ten over the whole chunk in memory. linear_cross_entropy.py has the formulas; compiled.py
// builds this file and says what the arguments are. Arithmetic is in float32; X is the stored type.

#include "numbers.h"

#include <cmath>

// Probabilities below this have the gradient 0: what comes of multiplying with such numbers is too small for the usual
// form of a float, and the products with them would be many times slower.
static const float LEAST = 1e-30f;

// losses[i] = weights[i] (log sum exp(scale z[i]) - scale z[i, targets[i]]); where `slope`, z becomes the gradient of
// their sum. Where a target is outside the row, only `outside` is written: the number of such targets.
template <class X>
static void cross_entropy(
    X* z, const int64_t* targets, const float* weights, float* losses, int64_t* outside, int64_t rows, int64_t width,
    float scale, int64_t slope, int64_t threads
) {
    for (int64_t i = 0; i < rows; i++) *outside += targets[i] < 0 || targets[i] >= width;
    if (*outside) return;
    const int64_t whole = width / LANES * LANES;
#pragma omp parallel for schedule(static) num_threads(team(rows * width, threads))
    for (int64_t i = 0; i < rows; i++) {
        X* row = z + i * width;
        Vector many = Vector{} - INFINITY;
        for (int64_t j = 0; j < whole; j += LANES) many = larger(load(row + j) * scale, many);
        float most = -INFINITY;
        for (int l = 0; l < LANES; l++) most = many[l] > most ? many[l] : most;
        for (int64_t j = whole; j < width; j++) most = get(row[j]) * scale > most ? get(row[j]) * scale : most;
        Vector sums = {};
        for (int64_t j = 0; j < whole; j += LANES) sums += exponentials(load(row + j) * scale - most);
        float sum = sum_of(sums);
        for (int64_t j = whole; j < width; j++) sum += exponential(get(row[j]) * scale - most);
        const float lse = most + std::log(sum), factor = weights[i] * scale;
        losses[i] = weights[i] * (lse - get(row[targets[i]]) * scale);
        if (!slope) continue;
        const float likely = (exponential(get(row[targets[i]]) * scale - lse) - 1.0f) * factor;
        const Vector none = {}, least = none + LEAST;
        for (int64_t j = 0; j < whole; j += LANES) {
            const Vector p = exponentials(load(row + j) * scale - lse);
            store(row + j, (p < least ? none : p) * factor);
        }
        for (int64_t j = whole; j < width; j++) {
            const float p = exponential(get(row[j]) * scale - lse);
            put(row[j], (p < LEAST ? 0.0f : p) * factor);
        }
        put(row[targets[i]], likely);
    }
}

#define PUBLIC extern "C" const void* const
PUBLIC cross_entropy_b = (const void*)&cross_entropy<bf16>;
PUBLIC cross_entropy_f = (const void*)&cross_entropy<float>;
