// Loops of the statistics: part of loops.cpp, which is compiled once for every instruction set.
#pragma once

#include "cpu/loops_lanes.h"
#include "cpu/loops_powers.h"

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

// Each x becomes its result, or grad times the slope there.
template <bool kSlope, int kCount, typename C>
inline void tone_map_of(Vector<C> (&x)[kCount], [[maybe_unused]] const Vector<C> (&grad)[kCount], C s) {
  constexpr double kLog2E = 1.44269504088896340736;
  const C steepness = 4 * s, depth = C(0.8) * s, doublings = static_cast<C>(4 * kLog2E * s);
  const Vector<C> least = Vector<C>{} - 64;
  Vector<C> size[kCount], grown[kCount];
  for (int j = 0; j < kCount; ++j) size[j] = x[j] > -x[j] ? x[j] : -x[j];
  for (int j = 0; j < kCount; ++j) grown[j] = doublings * (1 - size[j]);
  // from −64 on 1 + 2^y is 1; NaN, as 0·∞ is, counts as −64 too: x brings its own
  for (int j = 0; j < kCount; ++j) grown[j] = grown[j] > least ? grown[j] : least;
  raise_two<kCount, C>(grown);
  for (int j = 0; j < kCount; ++j) grown[j] += 1;
  for (int j = 0; j < kCount; ++j) {
    if constexpr (kSlope) {
      const Vector<C> gate = 1 / grown[j];
      x[j] = grad[j] * (1 - depth * gate * (1 + steepness * size[j] * (1 - gate)));
    } else {
      x[j] *= 1 - depth / grown[j];
    }
  }
}

template <bool kSlope, bool kStreams, typename C>
void tone_map_to(const C* x, const C* grad, int n, C s, C* out) {
  constexpr int kStep = kBytes / sizeof(C), kPiece = kRun * kStep;
  Vector<C> value[kRun] = {}, upstream[kRun] = {};
  int i = 0;
  for (; i + kPiece <= n; i += kPiece) {
    fetch_run(x + i);
    if constexpr (kSlope) fetch_run(grad + i);
    for (int j = 0; j < kRun; ++j) value[j] = load(x + i + j * kStep);
    if constexpr (kSlope) {
      for (int j = 0; j < kRun; ++j) upstream[j] = load(grad + i + j * kStep);
    }
    tone_map_of<kSlope, kRun, C>(value, upstream, s);
    for (int j = 0; j < kRun; ++j) store<kStreams>(out + i + j * kStep, value[j]);
  }
  const int64_t left = static_cast<int64_t>(n - i) * static_cast<int64_t>(sizeof(C));
  if (left == 0) return;
  std::memcpy(value, x + i, left);
  if constexpr (kSlope) std::memcpy(upstream, grad + i, left);
  tone_map_of<kSlope, kRun, C>(value, upstream, s);
  std::memcpy(out + i, value, left);
}

template <bool kSlope, typename C>
void tone_map(const C* x, const C* grad, int n, C s, C* out, bool streams) {
  if (streams && unaligned_bytes(out) == 0) {
    tone_map_to<kSlope, true>(x, grad, n, s, out);
  } else {
    tone_map_to<kSlope, false>(x, grad, n, s, out);
  }
}

}  // namespace
}  // namespace latentfast
