// Rows to tokens and back, transposed in registers: part of loops.cpp, which is compiled once for every
// instruction set.
#pragma once

#include "cpu/loops_stats.h"

namespace latentfast {
namespace {

// Positions of rows that are too few for squares, or no floats, on their way to tokens or back.
constexpr int kBlock = 128;

// Registers of floats are interleaved by instructions; anything else goes element by element.
template <typename C>
constexpr bool kInterleaves = false;

#if defined(__x86_64__)
template <>
constexpr bool kInterleaves<float> = true;

// With units of kUnit floats, a0 b0 a1 b1 …: the first half of it, and the second.
template <int kUnit>
inline void interleave(Vector<float> a, Vector<float> b, Vector<float>& first, Vector<float>& second) {
#if defined(__AVX512F__)
  const __m512i low = kUnit == 1 ? _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
                                 : _mm512_setr_epi32(0, 1, 16, 17, 2, 3, 18, 19, 4, 5, 20, 21, 6, 7, 22, 23);
  first = _mm512_permutex2var_ps(a, low, b);
  second = _mm512_permutex2var_ps(a, _mm512_add_epi32(low, _mm512_set1_epi32(8)), b);
#elif defined(__AVX__)
  const __m256d x = _mm256_castps_pd(a), y = _mm256_castps_pd(b);
  // within each 16 bytes first
  const __m256 low = kUnit == 1 ? _mm256_unpacklo_ps(a, b) : _mm256_castpd_ps(_mm256_unpacklo_pd(x, y));
  const __m256 high = kUnit == 1 ? _mm256_unpackhi_ps(a, b) : _mm256_castpd_ps(_mm256_unpackhi_pd(x, y));
  first = _mm256_permute2f128_ps(low, high, 0x20);
  second = _mm256_permute2f128_ps(low, high, 0x31);
#else
  first = kUnit == 1 ? _mm_unpacklo_ps(a, b) : _mm_movelh_ps(a, b);
  second = kUnit == 1 ? _mm_unpackhi_ps(a, b) : _mm_movehl_ps(b, a);
#endif
}
#endif

// A square of as many registers as one has units. Interleaving its halves moves the highest bit of a row's
// number to the lowest of the column's; once for every bit, the two have changed places.
template <int kUnit, typename C>
inline void transpose(Vector<C> (&x)[kBytes / sizeof(C) / kUnit]) {
  constexpr int kHalf = kBytes / sizeof(C) / kUnit / 2;
  for (int bit = kHalf; bit > 0; bit /= 2) {
    Vector<C> y[2 * kHalf];
    for (int i = 0; i < kHalf; ++i) interleave<kUnit>(x[i], x[i + kHalf], y[2 * i], y[2 * i + 1]);
    for (int i = 0; i < 2 * kHalf; ++i) x[i] = y[i];
  }
}

// f(position, row) for whole squares that cover kTokenRows / kUnit rows of n elements; the last ones go once
// more over what the ones before them have done. False where there are none.
template <int kUnit, typename C, typename F>
inline bool for_squares(int count, int n, F&& f) {
  constexpr int kStep = kBytes / sizeof(C);
  if (!kInterleaves<C> || count * kUnit != kTokenRows || n < kStep) return false;
  for (int k = 0; k < n; k += kStep) {
    const int position = k + kStep <= n ? k : n - kStep;
    for (int r = 0; r < count; r += kStep / kUnit) f(position, r);
  }
  return true;
}

// f(r) for the rows of an incomplete group, in fours: a loop that does not know how few they are gathers and
// scatters, which takes longer.
template <typename F>
inline void for_few(int count, F&& f) {
  int r = 0;
  for (; r + 4 <= count; r += 4) {
    f(r);
    f(r + 1);
    f(r + 2);
    f(r + 3);
  }
  switch (count - r) {
    case 3:
      f(r + 2);
      [[fallthrough]];
    case 2:
      f(r + 1);
      [[fallthrough]];
    case 1:
      f(r);
  }
}

template <int kUnit, typename C>
void affine_to_tokens(const C* const* rows, const RowAffines<C>& own, int count, int n, C* tokens,
                      int64_t stride) {
  constexpr int kSide = kBytes / sizeof(C) / kUnit;
  const auto square = [&]([[maybe_unused]] int k, [[maybe_unused]] int r) {
    if constexpr (kInterleaves<C>) {
      Vector<C> x[kSide];
      for (int i = 0; i < kSide; ++i) {
        const Vector<C> apart = load(rows[r + i] + k) - own.centre[r + i];
        x[i] = apart * own.gain[r + i] + own.offset[r + i];
      }
      transpose<kUnit, C>(x);
      for (int i = 0; i < kSide; ++i) store<false>(tokens + (k / kUnit + i) * stride + r * kUnit, x[i]);
    }
  };
  if (for_squares<kUnit, C>(count, n, square)) return;
  C block[kTokenRows][kBlock];
  for (int k = 0; k < n; k += kBlock) {
    const int size = n - k < kBlock ? n - k : kBlock;
    for (int r = 0; r < count; ++r)
      affine(rows[r] + k, size, own.centre[r], own.gain[r], own.offset[r], block[r]);
    for (int i = 0; i < size; ++i) {
      C* token = tokens + (k + i) / kUnit * stride + i % kUnit;
      for_few(count, [&](int r) { token[r * kUnit] = block[r][i]; });
    }
  }
}

template <int kUnit, typename C>
void affine_from_tokens(const C* tokens, int64_t stride, const RowAffines<C>& own, int count, int n,
                        C* const* rows) {
  constexpr int kSide = kBytes / sizeof(C) / kUnit;
  const auto square = [&]([[maybe_unused]] int k, [[maybe_unused]] int r) {
    if constexpr (kInterleaves<C>) {
      Vector<C> x[kSide];
      for (int i = 0; i < kSide; ++i) x[i] = load(tokens + (k / kUnit + i) * stride + r * kUnit);
      transpose<kUnit, C>(x);
      for (int i = 0; i < kSide; ++i) {
        const Vector<C> apart = x[i] - own.centre[r + i];
        store<false>(rows[r + i] + k, apart * own.gain[r + i] + own.offset[r + i]);
      }
    }
  };
  if (for_squares<kUnit, C>(count, n, square)) return;
  C block[kTokenRows][kBlock];
  for (int k = 0; k < n; k += kBlock) {
    const int size = n - k < kBlock ? n - k : kBlock;
    for (int i = 0; i < size; ++i) {
      const C* token = tokens + (k + i) / kUnit * stride + i % kUnit;
      for_few(count, [&](int r) { block[r][i] = token[r * kUnit]; });
    }
    for (int r = 0; r < count; ++r)
      affine(block[r], size, own.centre[r], own.gain[r], own.offset[r], rows[r] + k);
  }
}

}  // namespace
}  // namespace latentfast
