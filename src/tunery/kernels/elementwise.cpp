// RMSNorm, rotary embedding and gated activations on a CPU, each in one pass over memory and one over the cache.
// compiled.py builds this file for the machine it runs on and says what the arguments are; the formulas are in
// rms_norm.py, rotary.py and swiglu.py. Arithmetic is in float32; X, Y, A are the stored types, float or bfloat16.

#include "numbers.h"

// Both activations are x * sigmoid(z(x)): see triton_swiglu.py. The sigmoid is 1 / (1 + exp(-z)); this is exp(-z).
template <bool SILU> static inline float exp_minus_z(float x) {
    return exponential(SILU ? -x : -1.5957691216f * (x + 0.044715f * x * x * x));
}

template <bool SILU> static inline float slope_of_z(float x) {
    return SILU ? 1.0f : 1.5957691216f * (1.0f + 0.134145f * x * x);
}

template <class X, class Y>
static void rms_forward(
    const X* x, const X* residual, X* h, const float* scale, Y* y, float* rstd, int64_t rows, int64_t width,
    int64_t x_stride, int64_t residual_stride, float eps, int64_t cast_first, int64_t threads
) {
#pragma omp parallel for schedule(static) num_threads(team(rows * width, threads))
    for (int64_t i = 0; i < rows; i++) {
        const X* row = x + i * x_stride;
        if (residual) {
            const X* other = residual + i * residual_stride;
            X* sum = h + i * width;
#pragma omp simd
            for (int64_t j = 0; j < width; j++) put(sum[j], get(row[j]) + get(other[j]));
            row = sum;
        }
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t j = 0; j < width; j++) squares += get(row[j]) * get(row[j]);
        const float r = 1.0f / std::sqrt(squares / width + eps);
        rstd[i] = r;
        Y* out = y + i * width;
        if (cast_first) {
#pragma omp simd
            for (int64_t j = 0; j < width; j++) put(out[j], rounded<X>(get(row[j]) * r) * scale[j]);
        } else {
#pragma omp simd
            for (int64_t j = 0; j < width; j++) put(out[j], get(row[j]) * r * scale[j]);
        }
    }
}

// dh may be null; parts, one row of `width` zeros a thread, may be null when the weight does not train.
template <class X, class Y>
static void rms_backward(
    const Y* dy, const X* dh, const X* h, const float* scale, const float* rstd, X* dx, float* parts, int64_t rows,
    int64_t width, int64_t dy_stride, int64_t dh_stride, int64_t h_stride, int64_t cast_first, int64_t threads
) {
#pragma omp parallel for schedule(static) num_threads(team(rows * width, threads))
    for (int64_t i = 0; i < rows; i++) {
        const Y* up = dy + i * dy_stride;
        const X* row = h + i * h_stride;
        X* out = dx + i * width;
        const float r = rstd[i];
        float inner = 0;
#pragma omp simd reduction(+ : inner)
        for (int64_t j = 0; j < width; j++) inner += get(up[j]) * scale[j] * get(row[j]);
        const float c = inner * r * r * r / width;
        if (dh) {
            const X* more = dh + i * dh_stride;
#pragma omp simd
            for (int64_t j = 0; j < width; j++) put(out[j], get(up[j]) * scale[j] * r - get(row[j]) * c + get(more[j]));
        } else {
#pragma omp simd
            for (int64_t j = 0; j < width; j++) put(out[j], get(up[j]) * scale[j] * r - get(row[j]) * c);
        }
        if (parts) {
            float* part = parts + omp_get_thread_num() * width;
            if (cast_first) {
#pragma omp simd
                for (int64_t j = 0; j < width; j++) part[j] += get(up[j]) * rounded<X>(get(row[j]) * r);
            } else {
#pragma omp simd
                for (int64_t j = 0; j < width; j++) part[j] += get(up[j]) * get(row[j]) * r;
            }
        }
    }
}

template <class X, class A>
static void turn(
    const X* x, const A* cosines, const A* sines, X* y, int64_t batch, int64_t heads, int64_t tokens, int64_t half,
    int64_t rest, int64_t x_batch, int64_t x_head, int64_t x_token, int64_t y_batch, int64_t y_head, int64_t y_token,
    int64_t angle_batch, int64_t back, int64_t threads
) {
    const int64_t work = batch * heads * tokens * (2 * half + rest);
#pragma omp parallel for schedule(static) num_threads(team(work, threads))
    for (int64_t i = 0; i < batch * tokens; i++) {
        const int64_t b = i / tokens, t = i % tokens;
        const A* cos_a = cosines + b * angle_batch + t * 2 * half;
        const A* sin_a = sines + b * angle_batch + t * 2 * half;
        const A* cos_b = cos_a + half;
        const A* sin_b = sin_a + half;
        for (int64_t head = 0; head < heads; head++) {
            const X* from = x + b * x_batch + t * x_token + head * x_head;
            X* to = y + b * y_batch + t * y_token + head * y_head;
            if (back) {
#pragma omp simd
                for (int64_t j = 0; j < half; j++) {
                    const float first = get(from[j]), second = get(from[j + half]);
                    put(to[j], first * get(cos_a[j]) + second * get(sin_b[j]));
                    put(to[j + half], second * get(cos_b[j]) - first * get(sin_a[j]));
                }
            } else {
#pragma omp simd
                for (int64_t j = 0; j < half; j++) {
                    const float first = get(from[j]), second = get(from[j + half]);
                    put(to[j], first * get(cos_a[j]) - second * get(sin_a[j]));
                    put(to[j + half], second * get(cos_b[j]) + first * get(sin_b[j]));
                }
            }
            if (rest) std::memcpy(to + 2 * half, from + 2 * half, rest * sizeof(X));
        }
    }
}

template <bool SILU> static inline float gated(float x, float up) {
    return x / (1.0f + exp_minus_z<SILU>(x)) * up;
}

template <class X, bool SILU>
static inline void gated_gradients(float above, float x, float up, X& to_gate, X& to_up) {
    const float e = exp_minus_z<SILU>(x), s = 1.0f / (1.0f + e);
    put(to_up, above * x * s);
    // e s is 1 - s without the cancellation, which the slope would magnify.
    put(to_gate, above * up * s * (1.0f + x * (e * s) * slope_of_z<SILU>(x)));
}

template <class X, bool SILU>
static void gated_forward(
    const X* gate, const X* up, X* y, int64_t rows, int64_t width, int64_t gate_stride, int64_t up_stride, int64_t threads
) {
#pragma omp parallel for schedule(static) num_threads(team(rows * width, threads))
    for (int64_t i = 0; i < rows; i++) {
        const X* g = gate + i * gate_stride;
        const X* u = up + i * up_stride;
        X* out = y + i * width;
#pragma omp simd
        for (int64_t j = 0; j < width; j++) put(out[j], gated<SILU>(get(g[j]), get(u[j])));
    }
}

// Where `again`, what gated_forward gave is written over dy.
template <class X, bool SILU>
static void gated_backward(
    X* dy, const X* gate, const X* up, X* dgate, X* dup, int64_t rows, int64_t width, int64_t dy_stride,
    int64_t gate_stride, int64_t up_stride, int64_t again, int64_t threads
) {
#pragma omp parallel for schedule(static) num_threads(team(rows * width, threads))
    for (int64_t i = 0; i < rows; i++) {
        X* d = dy + i * dy_stride;
        const X* g = gate + i * gate_stride;
        const X* u = up + i * up_stride;
        X* to_gate = dgate + i * width;
        X* to_up = dup + i * width;
        if (again) {
#pragma omp simd
            for (int64_t j = 0; j < width; j++) {
                const float above = get(d[j]), x = get(g[j]);
                gated_gradients<X, SILU>(above, x, get(u[j]), to_gate[j], to_up[j]);
                put(d[j], gated<SILU>(x, get(u[j])));
            }
        } else {
#pragma omp simd
            for (int64_t j = 0; j < width; j++) {
                gated_gradients<X, SILU>(get(d[j]), get(g[j]), get(u[j]), to_gate[j], to_up[j]);
            }
        }
    }
}

// What compiled.py looks up: the function, then a letter for each of its stored types, b (bfloat16) or f (float32).
#define PUBLIC extern "C" const void* const
PUBLIC rms_forward_bb = (const void*)&rms_forward<bf16, bf16>;
PUBLIC rms_forward_bf = (const void*)&rms_forward<bf16, float>;
PUBLIC rms_forward_ff = (const void*)&rms_forward<float, float>;
PUBLIC rms_backward_bb = (const void*)&rms_backward<bf16, bf16>;
PUBLIC rms_backward_bf = (const void*)&rms_backward<bf16, float>;
PUBLIC rms_backward_ff = (const void*)&rms_backward<float, float>;
PUBLIC turn_bb = (const void*)&turn<bf16, bf16>;
PUBLIC turn_bf = (const void*)&turn<bf16, float>;
PUBLIC turn_fb = (const void*)&turn<float, bf16>;
PUBLIC turn_ff = (const void*)&turn<float, float>;
PUBLIC silu_forward_b = (const void*)&gated_forward<bf16, true>;
PUBLIC silu_forward_f = (const void*)&gated_forward<float, true>;
PUBLIC silu_backward_b = (const void*)&gated_backward<bf16, true>;
PUBLIC silu_backward_f = (const void*)&gated_backward<float, true>;
PUBLIC gelu_tanh_forward_b = (const void*)&gated_forward<bf16, false>;
PUBLIC gelu_tanh_forward_f = (const void*)&gated_forward<float, false>;
PUBLIC gelu_tanh_backward_b = (const void*)&gated_backward<bf16, false>;
PUBLIC gelu_tanh_backward_f = (const void*)&gated_backward<float, false>;
