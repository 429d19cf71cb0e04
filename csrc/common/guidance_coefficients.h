// Guidance as a linear combination: from the inner products of a sample to its coefficients, in float64. One
// mechanism for all kinds, shared by the CPU's and the GPU's kernels; nothing here knows torch.
//
// The basis is (c, d), the conditional prediction and its difference d = c − u from the unconditional one: d
// is small, and exact or nearly so, where c and u agree, which is where (c, u) would cancel.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace latentfast {

enum class Guidance : int { cfg = 0, apg = 1, cfg_zero = 2, tcfg = 3, magnitude_aware = 4, zero = 5 };

// Over all elements of a sample: Σ c, …, Σ c·c, …. m = d + beta·(the old momentum); without one the sums of m
// are not looked at, m is d.
struct GuidanceSums {
  double c, d, m, cc, cd, dd, cm, dm, mm;
};

struct GuidanceOptions {
  int kind;
  bool original, has_momentum;
  double scale, rescale, eta, norm_threshold, alpha;
  int64_t elements;  // of a sample
};

// The guided prediction is c·cond + d·(cond − uncond) + m·momentum; m is 0 where there is no momentum.
struct GuidanceCoefficients {
  double c, d, m;
};

// Whether the coefficients depend on the sums at all: if not, one pass does.
LATENTFAST_HD bool guidance_needs_sums(const GuidanceOptions& o) {
  const auto kind = static_cast<Guidance>(o.kind);
  return kind != Guidance::zero && (kind != Guidance::cfg || o.rescale > 0.0);
}

// A variance of less than this share of the squares that it is made of, and of those of c, is what rounding
// left of a constant: it counts as 0.
constexpr double kConstantShare = 1e-12;

namespace guidance_detail {

// The unconditional prediction's part: u' = c·cond + d·(cond − uncond); then with `base` the point that
// guidance starts at, p = base + scale·(c − u').
LATENTFAST_HD GuidanceCoefficients away_from(double c, double d, const GuidanceOptions& o) {
  return o.original ? GuidanceCoefficients{1.0 + o.scale - o.scale * c, -o.scale * d, 0.0}
                    : GuidanceCoefficients{o.scale + (1.0 - o.scale) * c, (1.0 - o.scale) * d, 0.0};
}

// 2503.18886, equation 9: u' = ⟨c, u⟩ / |u|² · u
LATENTFAST_HD GuidanceCoefficients cfg_zero(const GuidanceOptions& o, const GuidanceSums& s) {
  const double a = (s.cc - s.cd) / ((s.cc - s.cd) - (s.cd - s.dd) + 1e-8);
  return away_from(a, -a, o);
}

// u' is u's projection on the first right singular vector of [c; u]: x·y·c + y²·u, (x, y) being the first
// eigenvector of their Gram matrix.
LATENTFAST_HD GuidanceCoefficients tcfg(const GuidanceOptions& o, const GuidanceSums& s) {
  const double cu = s.cc - s.cd, longer = s.cd + (s.cd - s.dd);  // ⟨c, u⟩ and |c|² − |u|²
  const double h = hypot(longer, 2.0 * cu);
  if (h == 0.0) return away_from(0.0, 0.0, o);
  const double xy = cu / h;
  const double yy = longer > 0.0 ? 2.0 * xy * (cu / (h + longer)) : 0.5 * (1.0 - longer / h);
  return away_from(xy + yy, -yy, o);
}

// 2410.02416, algorithm 1: the update's length limited, its part along c weakened to eta of it.
LATENTFAST_HD GuidanceCoefficients apg(const GuidanceOptions& o, const GuidanceSums& s) {
  const double cm = o.has_momentum ? s.cm : s.cd, mm = o.has_momentum ? s.mm : s.dd;
  const double length = sqrt(mm);
  double step = o.scale;
  if (o.norm_threshold > 0.0 && !(length <= o.norm_threshold)) step *= o.norm_threshold / length;
  const double along = s.cc == 0.0 ? 0.0 : cm / s.cc;
  const double c = 1.0 - step * (1.0 - o.eta) * along, d = o.original ? 0.0 : -1.0;
  return o.has_momentum ? GuidanceCoefficients{c, d, step} : GuidanceCoefficients{c, d + step, 0.0};
}

// The larger the step would be beside u, the less of the scale is applied.
LATENTFAST_HD GuidanceCoefficients magnitude_aware(const GuidanceOptions& o, const GuidanceSums& s) {
  const double square = (s.cc - s.cd) - (s.cd - s.dd);
  const double uu = square < 0.0 ? 0.0 : square;  // NaN stays NaN
  double damping = 1.0;
  if (o.alpha != 0.0 && s.dd != 0.0) damping = exp(-o.alpha * (sqrt(s.dd) / sqrt(uu)));
  return {1.0, o.original ? o.scale * damping : (o.scale - 1.0) * damping, 0.0};
}

// φ·std(c)/std(p) + 1 − φ (2305.08891, section 3.4); 1 where p is constant.
LATENTFAST_HD double rescale_factor(const GuidanceOptions& o, const GuidanceSums& s,
                                    const GuidanceCoefficients& p, double constant_share) {
  if (o.elements < 2) return 1.0;
  const double n = static_cast<double>(o.elements);
  const double cc = s.cc - s.c * (s.c / n);
  double squares = s.cc + p.c * p.c * s.cc + p.d * p.d * s.dd;
  double pp =
      p.c * p.c * cc + 2.0 * p.c * p.d * (s.cd - s.c * (s.d / n)) + p.d * p.d * (s.dd - s.d * (s.d / n));
  if (o.has_momentum) {
    squares += p.m * p.m * s.mm;
    pp += p.m * (2.0 * p.c * (s.cm - s.c * (s.m / n)) + 2.0 * p.d * (s.dm - s.d * (s.m / n)) +
                 p.m * (s.mm - s.m * (s.m / n)));
  }
  if (pp <= constant_share * squares) return 1.0;
  const double ratio = cc <= constant_share * s.cc ? 0.0 : sqrt(cc / pp);
  return o.rescale * ratio + 1.0 - o.rescale;
}

}  // namespace guidance_detail

// `constant_share`: larger where the sums are less exact than those of float64.
LATENTFAST_HD GuidanceCoefficients guidance_coefficients(const GuidanceOptions& o, const GuidanceSums& s,
                                                         double constant_share = kConstantShare) {
  GuidanceCoefficients p;
  switch (static_cast<Guidance>(o.kind)) {
    case Guidance::apg:
      p = guidance_detail::apg(o, s);
      break;
    case Guidance::cfg_zero:
      p = guidance_detail::cfg_zero(o, s);
      break;
    case Guidance::tcfg:
      p = guidance_detail::tcfg(o, s);
      break;
    case Guidance::magnitude_aware:
      p = guidance_detail::magnitude_aware(o, s);
      break;
    case Guidance::zero:
      return {0.0, 0.0, 0.0};
    default:
      p = {1.0, o.original ? o.scale : o.scale - 1.0, 0.0};
  }
  if (o.rescale > 0.0) {
    const double factor = guidance_detail::rescale_factor(o, s, p, constant_share);
    p = {factor * p.c, factor * p.d, factor * p.m};
  }
  return p;
}

}  // namespace latentfast
