// Weights of lerp, nlerp and slerp, and their derivatives, from three inner products of a pair of vectors.
//
// Torch-free and shared by the CPU and CUDA kernels, once a vector (and a value of t). The inner products are
// float64, and so is every difference that cancels; the rest is computed in the type `C`: float64, or float32
// where nothing wider is made of the weights and float64 functions would take longer than the elements. The
// definitions are those of latentfast/reference/interpolate.py.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "host_device.h"

namespace latentfast {

enum class Mode : int { lerp = 0, nlerp = 1, slerp = 2 };

// Inner products of one pair of vectors: |a|², |b|², a·b.
struct Sums {
  double aa, bb, ab;
};

// The interpolated vector is a·A + b·B + turn·Q(A), where Q turns A by a quarter: (x0, x1) → (−x1, x0) for
// each pair of its elements, times `quarter_turn_scale` if their number is odd.
template <typename C>
struct WeightsIn {
  C a, b, turn;
};
using Weights = WeightsIn<double>;

// How the weights change: with |A|², |B|² and A·B (nothing while the turned vector is used: its angle is
// held), and with t.
struct WeightSlopes {
  double a_aa, a_bb, a_ab, b_aa, b_bb, b_ab;
  double a_t, b_t, turn_t;
};

constexpr double kPi = 3.14159265358979323846;
// |u + v| below which two unit vectors count as opposite, and its square.
constexpr double kOpposite = 1.4e-6;
constexpr double kOppositeSquared = kOpposite * kOpposite;
// Angle below which sin(sθ)/sin(θ) is taken from its series; the first term left out is of the order θ⁶.
constexpr double kSmallAngle = 1e-3;
// Weights this large cancel each other (vectors that are nearly opposite).
constexpr double kLargeWeight = 8.0;

// Whether elements have to be combined in float64 with these.
LATENTFAST_HD bool is_delicate(const Weights& w) {
  return w.turn != 0.0 || fabs(w.a) > kLargeWeight || fabs(w.b) > kLargeWeight;
}

// What a pair of vectors is for its weights, whatever t: computed once for a whole path.
template <typename C>
struct PairIn {
  enum Kind : int { straight, arc, nearly_parallel, opposite, normalised };

  Kind kind;
  bool single;   // one element leaves no way round
  double theta;  // the angle between the vectors (slerp), as exact as C, and near π as exact as C makes π − θ
  C sine, cosine;  // of it
  Sums sums;

  LATENTFAST_HD double na() const { return sqrt(sums.aa); }
  LATENTFAST_HD double nb() const { return sqrt(sums.bb); }
};
using Pair = PairIn<double>;

LATENTFAST_HD double power_of_two(int e) {
  return std::bit_cast<double>(static_cast<uint64_t>(e + 1023) << 52);
}

// x·2^-e with e even and x in [1, 4), so that the square root is scaled by an exact power of two; e is
// returned. Zero, infinity and NaN stay as they are.
LATENTFAST_HD int even_exponent(double& x) {
  if (!(x > 0.0) || !(x <= 1.7976931348623157e308)) return 0;
  int below = 0;
  if (x < 2.2250738585072014e-308) {
    below = 108;
    x *= power_of_two(below);
  }
  const int e = (static_cast<int>(std::bit_cast<uint64_t>(x) >> 52) - 1023) & ~1;
  x *= power_of_two(-e);
  return e - below;
}

// x·y − z², every digit of both products kept until they are subtracted (Kahan's difference of products).
LATENTFAST_HD double product_minus_square(double x, double y, double z) {
  const double p = x * y, q = z * z;
  return (p - q) + (fma(x, y, -p) - fma(z, z, -q));
}

// sin(x). In float32 it is as exact near the multiples of π as elsewhere: x is brought to [−π/2, π/2] in
// float64, where a polynomial of degree 11 is good for float32.
template <typename C>
LATENTFAST_HD C sine_of(double x) {
  if constexpr (std::is_same_v<C, double>) {
    return sin(x);
  } else {
    constexpr double kToInteger =
        6755399441055744.0;  // 1.5 · 2^52: a sum with it is a whole number, and ends in its bits
    const double shifted = x * (1.0 / kPi) + kToInteger;
    const C y = static_cast<C>(fma(kToInteger - shifted, kPi, x)), z = y * y;
    const C p =
        -1.6666667e-1f + z * (8.3333310e-3f + z * (-1.9840874e-4f + z * (2.7525562e-6f - z * 2.3889859e-8f)));
    const C s = y + y * z * p;
    return std::bit_cast<uint64_t>(shifted) % 2 == 0 ? s : -s;
  }
}

// `elements`: how many elements each of the vectors has.
template <typename C = double>
LATENTFAST_HD PairIn<C> make_pair_of(Mode mode, const Sums& sums, int64_t elements) {
  using P = PairIn<C>;
  P pair{P::straight, elements == 1, 0.0, 1, 1, sums};
  if (mode == Mode::lerp) return pair;
  if (mode == Mode::nlerp) {
    pair.kind = P::normalised;
    return pair;
  }
  if (sums.aa == 0.0 || sums.bb == 0.0) return pair;  // a zero vector has no direction: lerp

  double aa = sums.aa, bb = sums.bb;
  const int ea = even_exponent(aa), eb = even_exponent(bb);
  const double ab = sums.ab * power_of_two(-ea / 2) * power_of_two(-eb / 2);
  const double unit = aa * bb;  // in [1, 16): neither overflows nor underflows
  // sin θ and cos θ, both times √unit
  const double square = product_minus_square(aa, bb, ab);
  const C opposite = square <= 0.0 ? C(0) : sqrt(static_cast<C>(square));  // NaN stays NaN
  const C adjacent = static_cast<C>(ab), hypotenuse = sqrt(static_cast<C>(unit));
  pair.sine = opposite / hypotenuse;
  pair.cosine = adjacent / hypotenuse;
  const double acute = atan2(opposite, fabs(adjacent));
  pair.theta = adjacent < 0 ? kPi - acute : acute;
  // |u + v|² = 2(1 + cos θ) = 2 sin²θ/(1 − cos θ), without the cancellation
  if (adjacent < 0 && 2 * pair.sine * pair.sine <= static_cast<C>(kOppositeSquared) * (1 - pair.cosine)) {
    pair.kind = pair.single ? P::straight : P::opposite;
  } else {
    pair.kind = pair.theta < kSmallAngle ? P::nearly_parallel : P::arc;
  }
  return pair;
}

// sin(sθ)/sin(θ)
template <typename C>
LATENTFAST_HD C arc_weight(const PairIn<C>& pair, double s) {
  if (pair.kind == PairIn<C>::arc) return sine_of<C>(s * pair.theta) / pair.sine;
  const C theta = static_cast<C>(pair.theta), tt = theta * theta, x = static_cast<C>(s), ss = x * x;
  return x * (1 + tt * ((1 - ss) / 6 + tt * (7 - ss * (10 - 3 * ss)) / 360));
}

// Its derivative with s.
LATENTFAST_HD double arc_weight_s(const Pair& pair, double s) {
  if (pair.kind == Pair::arc) return cos(s * pair.theta) * pair.theta / pair.sine;
  const double tt = pair.theta * pair.theta, ss = s * s;
  return 1.0 + tt * ((1.0 - 3.0 * ss) / 6.0 + tt * (7.0 - ss * (30.0 - 15.0 * ss)) / 360.0);
}

// Its derivative with cos θ, which is finite for parallel vectors.
LATENTFAST_HD double arc_weight_cosine(const Pair& pair, double s) {
  if (pair.kind == Pair::arc) {
    const double angle = s * pair.theta;
    const double slope = s * cos(angle) * pair.sine - sin(angle) * pair.cosine;  // dw/dθ · sin²θ
    return -slope / (pair.sine * pair.sine * pair.sine);
  }
  const double tt = pair.theta * pair.theta, ss = s * s;
  return -s * ((1.0 - ss) / 3.0 * (1.0 + tt / 6.0) + tt * (7.0 - ss * (10.0 - 3.0 * ss)) / 90.0);
}

// lerp's length (1 − t)|a| + t|b| before its absolute value, and |lerp|².
struct StraightLength {
  double wanted, square;
  bool vanishes;
};

template <typename C>
LATENTFAST_HD StraightLength straight_length(const PairIn<C>& pair, double t) {
  const double r = 1.0 - t, ab = pair.sums.ab, na = pair.na(), nb = pair.nb();
  // |r a + t b|² = (r|a| − t|b|)² + 2rt(|a||b| + a·b), or the same with both signs turned: that which cancels
  // least. Single elements are parallel or opposite, whatever was lost in rounding their products.
  const double side = ab < 0.0 ? -1.0 : 1.0;
  const double apart = na * nb + fabs(ab);
  const double defect = pair.single   ? 0.0
                        : apart > 0.0 ? product_minus_square(pair.sums.aa, pair.sums.bb, ab) / apart
                                      : apart;
  const double along = r * na + side * t * nb;
  StraightLength out;
  out.wanted = r * na + t * nb;
  out.square = along * along - side * 2.0 * r * t * defect;
  out.vanishes = out.square <= kOppositeSquared * out.wanted * out.wanted;
  return out;
}

// The weights at t. Exactly at 0 and 1 the kernels copy the end point's bits instead (see `end_point`).
template <typename C>
LATENTFAST_HD WeightsIn<C> interpolation_weights(const PairIn<C>& pair, double t) {
  using P = PairIn<C>;
  const double r = 1.0 - t;
  const WeightsIn<C> straight{static_cast<C>(r), static_cast<C>(t), 0};
  switch (pair.kind) {
    case P::arc:
    case P::nearly_parallel:
      return {arc_weight(pair, r), arc_weight(pair, t), 0};
    case P::opposite: {
      if (t == 1.0) return {0, 1, 0};  // b itself, which takes the gradient too
      const C length = static_cast<C>(r + t * (pair.nb() / pair.na()));  // in units of |a|
      return {length * sine_of<C>(kPi * (0.5 - t)), 0, length * sine_of<C>(kPi * t)};
    }
    case P::normalised: {
      const StraightLength actual = straight_length(pair, t);
      if (actual.vanishes) {
        if (pair.single || pair.sums.aa == 0.0) return straight;
        return {0, 0, static_cast<C>(fabs(actual.wanted) / pair.na())};
      }
      const double scale = fabs(actual.wanted) / sqrt(actual.square);
      return {static_cast<C>(r * scale), static_cast<C>(t * scale), 0};
    }
    default:
      return straight;
  }
}

// -1 where the result at t is a blend, 0 where it has the bits of a, 1 where it has those of b.
LATENTFAST_HD int end_point(double t) { return t == 0.0 ? 0 : (t == 1.0 ? 1 : -1); }

LATENTFAST_HD WeightSlopes interpolation_slopes(const Pair& pair, double t) {
  const double r = 1.0 - t;
  WeightSlopes out{0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0, 1.0, 0.0};
  switch (pair.kind) {
    case Pair::arc:
    case Pair::nearly_parallel: {
      const double a_c = arc_weight_cosine(pair, r), b_c = arc_weight_cosine(pair, t);
      const double c_aa = -0.5 * pair.cosine / pair.sums.aa, c_bb = -0.5 * pair.cosine / pair.sums.bb;
      const double c_ab = 1.0 / (pair.na() * pair.nb());
      return {a_c * c_aa,
              a_c * c_bb,
              a_c * c_ab,
              b_c * c_aa,
              b_c * c_bb,
              b_c * c_ab,
              -arc_weight_s(pair, r),
              arc_weight_s(pair, t),
              0.0};
    }
    case Pair::opposite: {
      const double ratio = pair.nb() / pair.na(), length = r + t * ratio, growth = ratio - 1.0;
      const double c = cos(kPi * t), s = sin(kPi * t);
      out.a_t = growth * c - length * kPi * s;
      out.b_t = 0.0;
      out.turn_t = growth * s + length * kPi * c;
      return out;
    }
    case Pair::normalised: {
      const StraightLength straight = straight_length(pair, t);
      const double sign = straight.wanted < 0.0 ? -1.0 : 1.0;
      if (straight.vanishes) {
        if (pair.single || pair.sums.aa == 0.0) return out;
        out.a_t = out.b_t = 0.0;
        out.turn_t = sign * (pair.nb() - pair.na()) / pair.na();
        return out;
      }
      const double inverse = 1.0 / sqrt(straight.square);
      const double scale = sign * straight.wanted * inverse;
      const double fall = -0.5 * scale * inverse * inverse;  // of the scale with |lerp|²
      const double s_aa = (pair.sums.aa > 0.0 ? 0.5 * sign * r / pair.na() * inverse : 0.0) + fall * r * r;
      const double s_bb = (pair.sums.bb > 0.0 ? 0.5 * sign * t / pair.nb() * inverse : 0.0) + fall * t * t;
      const double s_ab = fall * 2.0 * t * r;
      const double square_t = 2.0 * (t * pair.sums.bb - r * pair.sums.aa + (1.0 - 2.0 * t) * pair.sums.ab);
      const double s_t = sign * (pair.nb() - pair.na()) * inverse + fall * square_t;
      return {r * s_aa, r * s_bb,        r * s_ab,        t * s_aa, t * s_bb,
              t * s_ab, r * s_t - scale, t * s_t + scale, 0.0};
    }
    default:
      return out;
  }
}

// The quarter turn of a vector of an odd number of elements leaves the last one out; what is left is scaled
// to the vector's length. `left` is |a|² without the last element. 0: nothing is left, the turned vector is
// (|a|, 0, 0, …).
LATENTFAST_HD double quarter_turn_scale(double aa, double left) { return left > 0.0 ? sqrt(aa / left) : 0.0; }

}  // namespace latentfast
