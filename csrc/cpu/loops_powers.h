// 2^x in registers, of the same bits whatever their width: part of loops.cpp, which is compiled once for
// every instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/loops_rows.h"

namespace latentfast {
namespace {

template <typename C>
struct Exponent;
template <>
struct Exponent<float> {
  using Bits = uint32_t;
  static constexpr int kMantissa = 23, kTerms = 7;
  static constexpr Bits kOne = 0x3f800000u;
  static constexpr float kLeast = -126.0f;
  // 2^x for |x| ≤ 1/2 to 2e-9 of it, the least that one with 2^0 = 1 can be off
  static constexpr float kPowers[kTerms] = {
      1.0f,
      6.931471825e-1f,
      2.402264774e-1f,
      5.550332367e-2f,
      9.618436918e-3f,
      1.339887385e-3f,
      1.535336196e-4f,
  };
};
template <>
struct Exponent<double> {
  using Bits = uint64_t;
  static constexpr int kMantissa = 52, kTerms = 14;
  static constexpr Bits kOne = 0x3ff0000000000000u;
  static constexpr double kLeast = -1022.0;
  // ln(2)^i / i!, to 4e-18
  static constexpr double kPowers[kTerms] = {
      1.0,
      0.6931471805599453,
      0.24022650695910072,
      0.05550410866482158,
      0.009618129107628477,
      0.0013333558146428443,
      0.0001540353039338161,
      1.5252733804059841e-05,
      1.321548679014431e-06,
      1.01780860092397e-07,
      7.054911620801123e-09,
      4.4455382718708116e-10,
      2.5678435993488206e-11,
      1.3691488853904128e-12,
  };
};

// Each x becomes 2^x, for kLeast ≤ x ≤ 126; NaN stays. A step is done for all registers before the next: else
// a processor would have to look several exponentials ahead for something to do.
template <int kCount, typename C>
inline void raise_two(Vector<C> (&x)[kCount]) {
  using E = Exponent<C>;
  using Bits = Vector<typename E::Bits>;
  // adding this puts x, rounded to an integer, into the lowest bits
  constexpr C kRound = C(3) * (typename E::Bits(1) << (E::kMantissa - 1));
  Vector<C> shifted[kCount], rest[kCount], value[kCount];
  for (int j = 0; j < kCount; ++j) shifted[j] = x[j] + kRound;
  for (int j = 0; j < kCount; ++j) rest[j] = x[j] - (shifted[j] - kRound);
  for (int j = 0; j < kCount; ++j) value[j] = rest[j] * E::kPowers[E::kTerms - 1] + E::kPowers[E::kTerms - 2];
  for (int i = E::kTerms - 3; i >= 0; --i) {
    for (int j = 0; j < kCount; ++j) value[j] = value[j] * rest[j] + E::kPowers[i];
  }
  for (int j = 0; j < kCount; ++j) {
    Bits bits;
    std::memcpy(&bits, &shifted[j], sizeof bits);
    bits = (bits << E::kMantissa) + E::kOne;
    Vector<C> power;
    std::memcpy(&power, &bits, sizeof power);
    x[j] = value[j] * power;
  }
}

}  // namespace
}  // namespace latentfast
