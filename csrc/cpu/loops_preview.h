// The loops of previews: part of loops.cpp, which has them compiled for every instruction set.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace latentfast {
namespace {

template <typename C>
void add_to_rgb(const C* __restrict x, int n, const C* weight, C* __restrict red, C* __restrict green,
                C* __restrict blue) {
  const C r = weight[0], g = weight[1], b = weight[2];
  for (int i = 0; i < n; ++i) {
    red[i] += r * x[i];
    green[i] += g * x[i];
    blue[i] += b * x[i];
  }
}

template <typename C>
void between(const C* __restrict a, const C* __restrict b, int n, C f, C* __restrict out) {
  for (int i = 0; i < n; ++i) out[i] = a[i] + f * (b[i] - a[i]);
}

// Added to a number from 0 to 255, 2^23 (2^52 for double) leaves it in the lowest bits, rounded to nearest,
// ties to even: an addition, where a conversion would round as the processor is set to and come in several
// steps.
template <typename C>
void between_as_bytes(const C* __restrict a, const C* __restrict b, int n, C f, uint8_t* __restrict out) {
  using Bits = std::conditional_t<std::is_same_v<C, double>, uint64_t, uint32_t>;
  constexpr C kWhole = std::is_same_v<C, double> ? C(4503599627370496.0) : C(8388608.0);
  for (int i = 0; i < n; ++i) {
    const C value = a[i] + f * (b[i] - a[i]);
    const C above = value > 0 ? value : C(0);  // NaN is not above 0
    const C inside = (above < 255 ? above : C(255)) + kWhole;
    Bits raw;
    std::memcpy(&raw, &inside, sizeof raw);
    out[i] = static_cast<uint8_t>(raw);
  }
}

}  // namespace
}  // namespace latentfast
