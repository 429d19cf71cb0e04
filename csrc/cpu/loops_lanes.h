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

struct Lanes {
  Doubles part[kRegisters];

  explicit Lanes(const double* from) { std::memcpy(part, from, sizeof part); }
  void store(double* to) const { std::memcpy(to, part, sizeof part); }
};

}  // namespace
}  // namespace latentfast
