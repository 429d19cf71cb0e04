// Loops of the statistics: part of loops.cpp, which is compiled once for every instruction set.
#pragma once

#include "cpu/loops_lanes.h"

namespace latentfast {
namespace {

template <typename C>
void shifted_sums(const C* x, int n, C shift, double* sum, double* squares) {
  Lanes s(sum), ss(squares);
  const Doubles from = Doubles{} + static_cast<double>(shift);
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int r = 0; r < kRegisters; ++r) {
      const Doubles d = load_doubles(x + i + r * kWidth) - from;
      s.part[r] += d;
      ss.part[r] += d * d;
    }
  }
  s.store(sum);
  ss.store(squares);
  for (int lane = 0; i < n; ++i, ++lane) {
    const double d = static_cast<double>(x[i]) - static_cast<double>(shift);
    sum[lane] += d;
    squares[lane] += d * d;
  }
}

template <typename C>
void shifted_sums_columns(const C* __restrict x, const C* __restrict shift, int n, double* __restrict sum,
                          double* __restrict squares) {
  for (int i = 0; i < n; ++i) {
    const double d = static_cast<double>(x[i]) - static_cast<double>(shift[i]);
    sum[i] += d;
    squares[i] += d * d;
  }
}

template <typename C>
void affine(const C* __restrict x, int n, C centre, C gain, C offset, C* __restrict out) {
  for (int i = 0; i < n; ++i) out[i] = (x[i] - centre) * gain + offset;
}

template <typename C>
void affine_columns(const C* __restrict x, int n, const C* __restrict centre, const C* __restrict gain,
                    const C* __restrict offset, C* __restrict out) {
  for (int i = 0; i < n; ++i) out[i] = (x[i] - centre[i]) * gain[i] + offset[i];
}

// e^x for x <= 4, to 1e-7 of its value. Arguments below −87, and NaN, count as −87.
inline float exponential(float x) {
  x = x > -87.0f ? x : -87.0f;
  // added to 1.5·2^23 a quotient is rounded to a whole number, which then ends the bits
  const float rounded = x * 1.44269504f + 12582912.0f, k = rounded - 12582912.0f;
  // ln 2 in two parts, the first of so few bits that its products are exact
  const float r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
  // Cephes' polynomial for |r| <= ln 2 / 2
  float y = 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = (y * r) * r + r + 1.0f;
  return y * __builtin_bit_cast(float, (__builtin_bit_cast(uint32_t, rounded) + 127u) << 23);
}
inline double exponential(double x) { return __builtin_exp(x); }

template <bool kSlope, typename C>
void tone_map_of(const C* __restrict x, const C* __restrict grad, int n, C s, C* __restrict out) {
  const C steepness = 4 * s, depth = C(0.8) * s;
  for (int i = 0; i < n; ++i) {
    const C size = x[i] < 0 ? -x[i] : x[i];
    const C gate = 1 / (1 + exponential(steepness * (1 - size)));
    if constexpr (kSlope) {
      out[i] = grad[i] * (1 - depth * gate * (1 + steepness * size * (1 - gate)));
    } else {
      out[i] = x[i] * (1 - depth * gate);
    }
  }
}

template <typename C>
void tone_map(const C* x, const C* grad, int n, C s, C* out) {
  grad == nullptr ? tone_map_of<false>(x, grad, n, s, out) : tone_map_of<true>(x, grad, n, s, out);
}

}  // namespace
}  // namespace latentfast
