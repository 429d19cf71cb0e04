// Compiled once for every instruction set: -DLATENTFAST_ISA=… names it. See loops.h.
#include "cpu/loops.h"

#include <cstring>
#include <utility>

#include "cpu/loops_arc.h"
#include "cpu/loops_lanes.h"
#include "cpu/loops_powers.h"
#include "cpu/loops_preview.h"
#include "cpu/loops_rows.h"
#include "cpu/loops_scores.h"
#include "cpu/loops_stats.h"
#include "cpu/loops_tokens.h"
#ifndef LATENTFAST_ISA
#error "compile with -DLATENTFAST_ISA=<name>"
#endif

namespace latentfast {
namespace {

// ---- reductions ----

template <typename C>
void sums(const C* a, const C* b, int n, double* aa, double* bb, double* ab) {
  Lanes raa(aa), rbb(bb), rab(ab);
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int r = 0; r < kRegisters; ++r) {
      const Doubles x = load_doubles(a + i + r * kWidth), y = load_doubles(b + i + r * kWidth);
      raa.part[r] += x * x;
      rbb.part[r] += y * y;
      rab.part[r] += x * y;
    }
  }
  raa.store(aa);
  rbb.store(bb);
  rab.store(ab);
  for (int lane = 0; i < n; ++i, ++lane) {
    const double x = a[i], y = b[i];
    aa[lane] += x * x;
    bb[lane] += y * y;
    ab[lane] += x * y;
  }
}

template <bool kPlain, typename C>
void apart_sums(const C* c, const C* u, int n, const ApartSums& sums) {
  Lanes cc(sums.cc), cd(sums.cd), dd(sums.dd), c1(sums.c), d1(sums.d);
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    C apart[kLanes];  // stays in registers
    for (int j = 0; j < kLanes; ++j) apart[j] = c[i + j] - u[i + j];
    for (int r = 0; r < kRegisters; ++r) {
      const Doubles x = load_doubles(c + i + r * kWidth), y = load_doubles(apart + r * kWidth);
      cc.part[r] += x * x;
      cd.part[r] += x * y;
      dd.part[r] += y * y;
      if constexpr (kPlain) {
        c1.part[r] += x;
        d1.part[r] += y;
      }
    }
  }
  cc.store(sums.cc);
  cd.store(sums.cd);
  dd.store(sums.dd);
  c1.store(sums.c);
  d1.store(sums.d);
  for (int lane = 0; i < n; ++i, ++lane) {
    const double x = c[i], y = static_cast<C>(c[i] - u[i]);
    sums.cc[lane] += x * x;
    sums.cd[lane] += x * y;
    sums.dd[lane] += y * y;
    if constexpr (kPlain) {
      sums.c[lane] += x;
      sums.d[lane] += y;
    }
  }
}

template <typename C>
void dot(const C* x, const C* y, int n, double* lanes) {
  Lanes acc(lanes);
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int r = 0; r < kRegisters; ++r)
      acc.part[r] += load_doubles(x + i + r * kWidth) * load_doubles(y + i + r * kWidth);
  }
  acc.store(lanes);
  for (int lane = 0; i < n; ++i, ++lane) lanes[lane] += static_cast<double>(x[i]) * static_cast<double>(y[i]);
}

template <typename C>
void sum(const C* x, int n, double* lanes) {
  Lanes acc(lanes);
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int r = 0; r < kRegisters; ++r) acc.part[r] += load_doubles(x + i + r * kWidth);
  }
  acc.store(lanes);
  for (int lane = 0; i < n; ++i, ++lane) lanes[lane] += static_cast<double>(x[i]);
}

// ---- elementwise loops: the compiler vectorises them, and no order of its own choosing can change a bit
// ----

template <typename C>
void dot_columns(const C* __restrict x, const C* __restrict y, int n, double* __restrict columns) {
  for (int i = 0; i < n; ++i) columns[i] += static_cast<double>(x[i]) * static_cast<double>(y[i]);
}

template <typename C>
void sums_columns(const C* __restrict a, const C* __restrict b, int n, double* __restrict aa,
                  double* __restrict bb, double* __restrict ab) {
  for (int i = 0; i < n; ++i) {
    const double x = a[i], y = b[i];
    aa[i] += x * x;
    bb[i] += y * y;
    ab[i] += x * y;
  }
}

template <typename C>
void mix(const C* __restrict a, const C* __restrict b, int n, C wa, C wb, C* __restrict out) {
  for (int i = 0; i < n; ++i) out[i] = wa * a[i] + wb * b[i];
}

template <typename C>
void mix_columns(const C* __restrict a, const C* __restrict b, int n, const C* __restrict wa,
                 const C* __restrict wb, C* __restrict out) {
  for (int i = 0; i < n; ++i) out[i] = wa[i] * a[i] + wb[i] * b[i];
}

template <typename C>
void add_scaled(const C* __restrict x, int n, C w, C* __restrict out) {
  for (int i = 0; i < n; ++i) out[i] += w * x[i];
}

template <typename C>
void add_scaled_columns(const C* __restrict x, int n, const C* __restrict w, C* __restrict out) {
  for (int i = 0; i < n; ++i) out[i] += w[i] == 0 ? 0 : w[i] * x[i];
}

template <typename C>
void subtract(const C* __restrict x, const C* __restrict y, int n, C* __restrict out) {
  for (int i = 0; i < n; ++i) out[i] = x[i] - y[i];
}

template <typename C>
void multiply(const C* __restrict x, const C* __restrict y, int n, C* __restrict out) {
  for (int i = 0; i < n; ++i) out[i] = x[i] * y[i];
}

inline float root(float x) { return __builtin_sqrtf(x); }
inline double root(double x) { return __builtin_sqrt(x); }

// ρ(d) and ρ'(d)
template <Norm kNorm, typename C>
inline void penalty_of(C d, C eps, C& value, C& slope) {
  if constexpr (kNorm == Norm::l2) {
    value = d * d;
    slope = d + d;
  } else if constexpr (kNorm == Norm::l1) {
    value = d < 0 ? -d : d;
    slope = d > 0 ? C(1) : (d < 0 ? C(-1) : d);  // 0 at 0, NaN at NaN
  } else {
    const C length = root(d * d + eps * eps);
    value = length - eps;
    slope = length > 0 ? d / length : (length == 0 ? C(0) : length);
  }
}

template <Norm kNorm, bool kMasked, bool kSecond, typename C>
void difference(const FrameRows<C>& rows, int n, C eps, C scale, C* __restrict penalty, C* __restrict slope) {
  const C* __restrict x0 = rows.x[0];
  const C* __restrict x1 = rows.x[1];
  const C* __restrict x2 = rows.x[2];
  const C* __restrict m0 = rows.mask[0];
  const C* __restrict m1 = rows.mask[1];
  const C* __restrict m2 = rows.mask[2];
  for (int i = 0; i < n; ++i) {
    C d, value, rise;
    if constexpr (kSecond) {
      d = x2[i] - 2 * x1[i] + x0[i];
    } else {
      d = x1[i] - x0[i];
    }
    penalty_of<kNorm>(d, eps, value, rise);
    if constexpr (kMasked) {
      C w = m0[i] * m1[i];
      if constexpr (kSecond) w = w * m2[i];
      penalty[i] = w == 0 ? 0 : w * value;
      slope[i] = w == 0 ? 0 : scale * (w * rise);
    } else {
      penalty[i] = value;
      slope[i] = scale * rise;
    }
  }
}

// One frame further with the first difference alone: x and slope go from one frame to the next in place.
template <Norm kNorm, bool kMasked, typename C>
inline void first_step_of(const C* __restrict z, const C* __restrict ref, const C* __restrict m0,
                          const C* __restrict m1, int n, C eps, C scale, C* __restrict x, C* __restrict slope,
                          C* __restrict penalty, C* __restrict grad) {
  for (int i = 0; i < n; ++i) {
    const C next = z[i] - ref[i];
    C value, rise;
    penalty_of<kNorm>(next - x[i], eps, value, rise);
    C fresh;
    if constexpr (kMasked) {
      const C w = m0[i] * m1[i];
      penalty[i] = w == 0 ? 0 : w * value;
      fresh = w == 0 ? 0 : scale * (w * rise);
    } else {
      penalty[i] = value;
      fresh = scale * rise;
    }
    grad[i] = slope[i] - fresh;
    slope[i] = fresh;
    x[i] = next;
  }
}

template <Norm kNorm, bool kMasked, typename C>
void first_step(const FirstStep<C>& f, int n, C eps, C scale) {
  constexpr int kBlock = 128;
  for (int j = 0; j < n; j += kBlock) {
    // The rows of neighbouring frames lie far apart: no hardware looks ahead from one to the next.
    for (int i = 0; i < kBlock; i += 64 / sizeof(C)) {
      __builtin_prefetch(f.z + j + i + f.z_ahead);
      __builtin_prefetch(f.ref + j + i + f.ref_ahead);
      if constexpr (kMasked) __builtin_prefetch(f.m1 + j + i + f.mask_ahead);
    }
    const int size = n - j < kBlock ? n - j : kBlock;
    first_step_of<kNorm, kMasked>(f.z + j, f.ref + j, kMasked ? f.m0 + j : nullptr,
                                  kMasked ? f.m1 + j : nullptr, size, eps, scale, f.x + j, f.slope + j,
                                  f.penalty + j, f.grad + j);
  }
}

// ---- halves ----

template <typename To, typename From>
inline To bits(From x) {
  return __builtin_bit_cast(To, x);
}

inline float half_to_float(uint16_t h) {
  const uint32_t magnitude = uint32_t(h & 0x7fffu) << 13;
  const float finite = bits<float>(magnitude) * 0x1p112f;  // exact, subnormals too
  const uint32_t u = (h & 0x7fffu) >= 0x7c00u ? magnitude | 0x7f800000u : bits<uint32_t>(finite);
  return bits<float>(u | uint32_t(h & 0x8000u) << 16);
}

// Round to nearest even. Adding a power of two 13 bits above the last digit kept does the rounding.
inline uint16_t float_to_half(float x) {
  const uint32_t u = bits<uint32_t>(x), doubled = u + u;
  const float scaled = (bits<float>(u & 0x7fffffffu) * 0x1p112f) * 0x1p-110f;
  const uint32_t exponent = doubled & 0xff000000u;
  const uint32_t bias = exponent < 0x71000000u ? 0x71000000u : exponent;
  const uint32_t r = bits<uint32_t>(bits<float>((bias >> 1) + 0x07800000u) + scaled);
  const uint32_t finite = ((r >> 13) & 0x7c00u) + (r & 0x0fffu);
  return uint16_t((u >> 16 & 0x8000u) | (doubled > 0xff000000u ? 0x7e00u : finite));
}

void widen_half(const uint16_t* __restrict x, int n, float* __restrict out) {
  int i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i));
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(v));
  }
#endif
  for (; i < n; ++i) out[i] = half_to_float(x[i]);
}

void round_half(const float* __restrict x, int n, uint16_t* __restrict out) {
  int i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    const __m128i v = _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), v);
  }
#endif
  for (; i < n; ++i) out[i] = float_to_half(x[i]);
}

void widen_bfloat16(const uint16_t* __restrict x, int n, float* __restrict out) {
  for (int i = 0; i < n; ++i) out[i] = bits<float>(uint32_t(x[i]) << 16);
}

void round_bfloat16(const float* __restrict x, int n, uint16_t* __restrict out) {
  for (int i = 0; i < n; ++i) {
    const uint32_t u = bits<uint32_t>(x[i]);
    const uint32_t nearest_even = (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
    out[i] = uint16_t((u & 0x7fffffffu) > 0x7f800000u ? (u >> 16 | 0x40u) : nearest_even);
  }
}

void to_double(const float* __restrict x, int n, double* __restrict out) {
  for (int i = 0; i < n; ++i) out[i] = x[i];
}

void to_single(const double* __restrict x, int n, float* __restrict out) {
  for (int i = 0; i < n; ++i) out[i] = static_cast<float>(x[i]);
}

void select(const uint16_t* __restrict base, const uint16_t* __restrict edited, const float* __restrict mask,
            int n, uint16_t* __restrict out) {
  for (int i = 0; i < n; ++i) {
    const uint16_t inside = mask[i] == 1 ? edited[i] : out[i];
    out[i] = mask[i] == 0 ? base[i] : inside;
  }
}

void stream(const void* x, int64_t bytes, void* out) {
  const char* from = static_cast<const char*>(x);
  char* to = static_cast<char*>(out);
  const int64_t unaligned = unaligned_bytes(to);
  int64_t i = unaligned < bytes ? unaligned : bytes;
  std::memcpy(to, from, i);
  for (; i + kBytes <= bytes; i += kBytes) store_around(to + i, from + i);
  std::memcpy(to + i, from + i, bytes - i);
}

template <Norm kNorm, typename C>
constexpr void put_norm(LoopsOf<C>& out) {
  constexpr int norm = static_cast<int>(kNorm);
  out.first_difference[norm][0] = difference<kNorm, false, false, C>;
  out.first_difference[norm][1] = difference<kNorm, true, false, C>;
  out.second_difference[norm][0] = difference<kNorm, false, true, C>;
  out.second_difference[norm][1] = difference<kNorm, true, true, C>;
  out.first_step[norm][0] = first_step<kNorm, false, C>;
  out.first_step[norm][1] = first_step<kNorm, true, C>;
}

template <typename C, int... kIndex>
constexpr void put_combine(LoopsOf<C>& out, std::integer_sequence<int, kIndex...>) {
  ((out.combine[kIndex] = combine<kIndex + 1, C>), ...);
}

template <typename C>
constexpr LoopsOf<C> loops_for() {
  LoopsOf<C> out{};
  out.sums = sums<C>;
  out.dot = dot<C>;
  out.sum = sum<C>;
  out.dot_columns = dot_columns<C>;
  out.sums_columns = sums_columns<C>;
  out.mix = mix<C>;
  out.mix_columns = mix_columns<C>;
  out.add_scaled = add_scaled<C>;
  out.add_scaled_columns = add_scaled_columns<C>;
  out.add_steps[0] = add_steps<false, C>;
  out.add_steps[1] = add_steps<true, C>;
  out.blend = blend<C>;
  out.subtract = subtract<C>;
  out.multiply = multiply<C>;
  out.scores = scores<C>;
  out.softmax_row = softmax_row<C>;
  put_norm<Norm::l2>(out);
  put_norm<Norm::l1>(out);
  put_norm<Norm::charbonnier>(out);
  out.shifted_sums = shifted_sums<C>;
  out.shifted_sums_columns = shifted_sums_columns<C>;
  out.affine = affine<C>;
  out.affine_columns = affine_columns<C>;
  out.affine_to_tokens[0] = affine_to_tokens<1, C>;
  out.affine_to_tokens[1] = affine_to_tokens<2, C>;
  out.affine_from_tokens[0] = affine_from_tokens<1, C>;
  out.affine_from_tokens[1] = affine_from_tokens<2, C>;
  out.tone_map[0] = tone_map<false, C>;
  out.tone_map[1] = tone_map<true, C>;
  out.add_to_rgb = add_to_rgb<C>;
  out.between = between<C>;
  out.between_as_bytes = between_as_bytes<C>;
  out.apart_sums[0] = apart_sums<false, C>;
  out.apart_sums[1] = apart_sums<true, C>;
  out.guide[0] = guide<false, C>;
  out.guide[1] = guide<true, C>;
  put_combine(out, std::make_integer_sequence<int, kTerms>());
  return out;
}

}  // namespace

#define LATENTFAST_JOIN_(a, b) a##b
#define LATENTFAST_JOIN(a, b) LATENTFAST_JOIN_(a, b)
#define LATENTFAST_TEXT_(a) #a
#define LATENTFAST_TEXT(a) LATENTFAST_TEXT_(a)

extern const Loops LATENTFAST_JOIN(kLoops_, LATENTFAST_ISA);
const Loops LATENTFAST_JOIN(kLoops_, LATENTFAST_ISA) = {
    LATENTFAST_TEXT(LATENTFAST_ISA),
    loops_for<float>(),
    loops_for<double>(),
    widen_half,
    widen_bfloat16,
    round_half,
    round_bfloat16,
    to_double,
    to_single,
    {combine_in_double<1>, combine_in_double<2>, combine_in_double<3>, combine_in_double<4>},
    select,
    stream,
    angles,
    arc_weights,
};

}  // namespace latentfast
