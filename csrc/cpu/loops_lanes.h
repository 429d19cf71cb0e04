// Sums in explicit registers, so that the lanes are the same whatever their width: part of loops.cpp, which
// is compiled once for every instruction set.
#pragma once

#include <cstring>

#include "cpu/loops_rows.h"

namespace latentfast {
namespace {

constexpr int kWidth = kBytes / sizeof(double);
constexpr int kRegisters = kLanes / kWidth;
typedef double Doubles __attribute__((vector_size(kBytes)));
typedef float Floats __attribute__((vector_size(kBytes / 2)));

inline Doubles load_doubles(const double* x) {
  Doubles out;
  std::memcpy(&out, x, sizeof out);
  return out;
}

inline Doubles load_doubles(const float* x) {
  // gcc 12 makes a detour of __builtin_convertvector where one instruction does it
#if defined(__AVX512F__)
  return _mm512_cvtps_pd(_mm256_loadu_ps(x));
#elif defined(__AVX__)
  return _mm256_cvtps_pd(_mm_loadu_ps(x));
#else
  Floats narrow;
  std::memcpy(&narrow, x, sizeof narrow);
  return __builtin_convertvector(narrow, Doubles);
#endif
}

inline void store_floats(float* to, Doubles x) {
#if defined(__AVX512F__)
  _mm256_storeu_ps(to, _mm512_cvtpd_ps(x));
#elif defined(__AVX__)
  _mm_storeu_ps(to, _mm256_cvtpd_ps(x));
#else
  const Floats narrow = __builtin_convertvector(x, Floats);
  std::memcpy(to, &narrow, sizeof narrow);
#endif
}

// out[k] = Σ w[k·count + t]·x[t] for all k at once, so that what is read is converted once.
template <int kOutputs>
void combine_in_double(const float* const* x, int count, const double* w, int n, float* const* out) {
  int i = 0;
  for (; i + kRun * kWidth <= n; i += kRun * kWidth) {
    Doubles sum[kOutputs][kRun];
    for (int t = 0; t < count; ++t) {
      fetch_run(x[t] + i);
      for (int j = 0; j < kRun; ++j) {
        const Doubles value = load_doubles(x[t] + i + j * kWidth);
        for (int k = 0; k < kOutputs; ++k) {
          const Doubles term = w[k * count + t] * value;
          sum[k][j] = t == 0 ? term : sum[k][j] + term;
        }
      }
    }
    for (int k = 0; k < kOutputs; ++k) {
      for (int j = 0; j < kRun; ++j) store_floats(out[k] + i + j * kWidth, sum[k][j]);
    }
  }
  for (; i < n; ++i) {
    for (int k = 0; k < kOutputs; ++k) {
      double sum = w[k * count] * x[0][i];
      for (int t = 1; t < count; ++t) sum += w[k * count + t] * x[t][i];
      out[k][i] = static_cast<float>(sum);
    }
  }
}

struct Lanes {
  Doubles part[kRegisters];

  explicit Lanes(const double* from) { std::memcpy(part, from, sizeof part); }
  void store(double* to) const { std::memcpy(to, part, sizeof part); }
};

}  // namespace
}  // namespace latentfast
