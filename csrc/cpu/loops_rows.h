// Loops over many long rows at once, whose speed is the memory's: part of loops.cpp, which is compiled once
// for every instruction set.
#pragma once

#include <cstring>

#include "cpu/loops.h"
#if defined(__x86_64__)
#include <immintrin.h>
// gcc warns of the undefined operand inside its own AVX-512 intrinsics (its bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

namespace latentfast {
namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

// How far ahead the rows of long streams are fetched, in bytes. On Zen 5 this was never slower than leaving
// it to the hardware; 4,096 was, where others kept the memory busy.
constexpr int kAhead = 1024;
// Registers of one stream that are read, or written, before it is the next one's turn: the memory serves
// several lines in a row faster than single ones of many streams.
constexpr int kRun = 4;

template <typename C>
inline void fetch_run(const C* x) {
  const char* ahead = reinterpret_cast<const char*>(x) + kAhead;
  for (int at = 0; at < kRun * kBytes; at += 64) __builtin_prefetch(ahead + at);
}

template <typename C>
using Vector __attribute__((vector_size(kBytes))) = C;

template <typename C>
inline Vector<C> load(const C* x) {
  Vector<C> out;
  std::memcpy(&out, x, sizeof out);
  return out;
}

inline void store_around(void* to, const void* from) {
#if defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i*>(to), _mm512_loadu_si512(from));
#elif defined(__AVX__)
  _mm256_stream_si256(static_cast<__m256i*>(to), _mm256_loadu_si256(static_cast<const __m256i*>(from)));
#elif defined(__x86_64__)
  _mm_stream_si128(static_cast<__m128i*>(to), _mm_loadu_si128(static_cast<const __m128i*>(from)));
#else
  std::memcpy(to, from, kBytes);
#endif
}

// Bytes before `x` is aligned for store_around.
inline int64_t unaligned_bytes(const void* x) {
  return (kBytes - reinterpret_cast<intptr_t>(x) % kBytes) % kBytes;
}

template <bool kStreams, typename V>
inline void store(void* to, V value) {
  if constexpr (kStreams) {
    store_around(to, &value);
  } else {
    std::memcpy(to, &value, sizeof value);
  }
}

template <int kCount, bool kMasked, bool kStreams, typename C>
void add_steps_of(const C* from, const Step<C>* steps, int n, C* out) {
  constexpr int kStep = kBytes / sizeof(C);
  const C* direction[kCount];
  const C* mask[kCount];
  C strength[kCount];
  for (int k = 0; k < kCount; ++k) {
    direction[k] = steps[k].direction;
    mask[k] = steps[k].mask;
    strength[k] = steps[k].strength;
  }
  int i = 0;
  for (; i + kRun * kStep <= n; i += kRun * kStep) {
    fetch_run(from + i);
    for (int k = 0; k < kCount; ++k) fetch_run(direction[k] + i);
    Vector<C> value[kRun];
    for (int j = 0; j < kRun; ++j) value[j] = load(from + i + j * kStep);
    for (int k = 0; k < kCount; ++k) {
      for (int j = 0; j < kRun; ++j) {
        const Vector<C> step = strength[k] * load(direction[k] + i + j * kStep);
        value[j] += kMasked ? load(mask[k] + i + j * kStep) * step : step;
      }
    }
    for (int j = 0; j < kRun; ++j) store<kStreams>(out + i + j * kStep, value[j]);
  }
  for (; i < n; ++i) {
    C value = from[i];
    for (int k = 0; k < kCount; ++k) {
      const C step = strength[k] * direction[k][i];
      value += kMasked ? mask[k][i] * step : step;
    }
    out[i] = value;
  }
}

template <int kCount, bool kMasked, typename C>
void add_steps_to(const C* from, const Step<C>* steps, int n, C* out, bool streams) {
  if (streams && unaligned_bytes(out) == 0) {
    add_steps_of<kCount, kMasked, true>(from, steps, n, out);
  } else {
    add_steps_of<kCount, kMasked, false>(from, steps, n, out);
  }
}

template <bool kMasked, typename C>
void add_steps(const C* from, const Step<C>* steps, int count, int n, C* out, bool streams) {
  static_assert(kSteps == 4);
  switch (count) {
    case 1:
      return add_steps_to<1, kMasked>(from, steps, n, out, streams);
    case 2:
      return add_steps_to<2, kMasked>(from, steps, n, out, streams);
    case 3:
      return add_steps_to<3, kMasked>(from, steps, n, out, streams);
    default:
      return add_steps_to<4, kMasked>(from, steps, n, out, streams);
  }
}

template <bool kStreams, typename C>
void blend_to(const C* base, const C* edited, const C* mask, int n, C* out) {
  constexpr int kStep = kBytes / sizeof(C);
  int i = 0;
  for (; i + kRun * kStep <= n; i += kRun * kStep) {
    fetch_run(base + i);
    fetch_run(edited + i);
    Vector<C> x[kRun], y[kRun];
    for (int j = 0; j < kRun; ++j) x[j] = load(base + i + j * kStep);
    for (int j = 0; j < kRun; ++j) y[j] = load(edited + i + j * kStep);
    for (int j = 0; j < kRun; ++j) {
      const Vector<C> m = load(mask + i + j * kStep);
      const Vector<C> mixed = x[j] + m * (y[j] - x[j]);
      const Vector<C> inside = m == C(1) ? y[j] : mixed;
      store<kStreams>(out + i + j * kStep, m == C(0) ? x[j] : inside);
    }
  }
  for (; i < n; ++i) {
    const C x = base[i], y = edited[i], m = mask[i];
    const C mixed = x + m * (y - x);
    const C inside = m == 1 ? y : mixed;
    out[i] = m == 0 ? x : inside;
  }
}

template <typename C>
void blend(const C* base, const C* edited, const C* mask, int n, C* out, bool streams) {
  if (streams && unaligned_bytes(out) == 0) {
    blend_to<true>(base, edited, mask, n, out);
  } else {
    blend_to<false>(base, edited, mask, n, out);
  }
}

template <bool kStep, bool kStreams, typename C>
void guide_to(const C* cond, const C* uncond, const C* sample, int n, C wc, C wd, C dt, C* out) {
  constexpr int kWide = kBytes / sizeof(C);
  int i = 0;
  for (; i + kRun * kWide <= n; i += kRun * kWide) {
    fetch_run(cond + i);
    fetch_run(uncond + i);
    if constexpr (kStep) fetch_run(sample + i);
    Vector<C> value[kRun];
    for (int j = 0; j < kRun; ++j) value[j] = load(cond + i + j * kWide);
    for (int j = 0; j < kRun; ++j) value[j] = wc * value[j] + wd * (value[j] - load(uncond + i + j * kWide));
    for (int j = 0; j < kRun; ++j) {
      if constexpr (kStep) value[j] = load(sample + i + j * kWide) + dt * value[j];
      store<kStreams>(out + i + j * kWide, value[j]);
    }
  }
  for (; i < n; ++i) {
    const C value = wc * cond[i] + wd * (cond[i] - uncond[i]);
    out[i] = kStep ? sample[i] + dt * value : value;
  }
}

template <bool kStep, typename C>
void guide(const C* cond, const C* uncond, const C* sample, int n, C wc, C wd, C dt, C* out, bool streams) {
  if (streams && unaligned_bytes(out) == 0) {
    guide_to<kStep, true>(cond, uncond, sample, n, wc, wd, dt, out);
  } else {
    guide_to<kStep, false>(cond, uncond, sample, n, wc, wd, dt, out);
  }
}

template <int kCount, bool kStreams, typename C>
void combine_to(const C* const* x, const C* w, int n, C* out) {
  constexpr int kStep = kBytes / sizeof(C);
  const C* from[kCount];
  C weight[kCount];
  for (int k = 0; k < kCount; ++k) {
    from[k] = x[k];
    weight[k] = w[k];
  }
  int i = 0;
  for (; i + kRun * kStep <= n; i += kRun * kStep) {
    for (int k = 0; k < kCount; ++k) fetch_run(from[k] + i);
    Vector<C> value[kRun];
    for (int j = 0; j < kRun; ++j) value[j] = weight[0] * load(from[0] + i + j * kStep);
    for (int k = 1; k < kCount; ++k) {
      for (int j = 0; j < kRun; ++j) value[j] += weight[k] * load(from[k] + i + j * kStep);
    }
    for (int j = 0; j < kRun; ++j) store<kStreams>(out + i + j * kStep, value[j]);
  }
  for (; i < n; ++i) {
    C value = weight[0] * from[0][i];
    for (int k = 1; k < kCount; ++k) value += weight[k] * from[k][i];
    out[i] = value;
  }
}

template <int kCount, typename C>
void combine(const C* const* x, const C* w, int n, C* out, bool streams) {
  if (streams && unaligned_bytes(out) == 0) {
    combine_to<kCount, true>(x, w, n, out);
  } else {
    combine_to<kCount, false>(x, w, n, out);
  }
}

}  // namespace
}  // namespace latentfast
