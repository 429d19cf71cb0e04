// Slerp's weights for many pairs of short vectors at once: part of loops.cpp, so compiled for every
// instruction set.
//
// The same formulas as common/interpolation_weights.h, for the ordinary case alone, with functions that
// become vector code: libm's would take longer than all else that is done for a vector of a few elements.
#pragma once

#include <cstdint>

namespace latentfast {
namespace {

// atan(x) for x in [0, 1] (Cephes: a rational function below 0.66, atan(x) = π/4 + atan((x − 1)/(x + 1))
// above).
inline double arc_tangent(double x) {
  const bool far = x > 0.66;
  const double r = far ? (x - 1.0) / (x + 1.0) : x, z = r * r;
  const double p =
      (((-8.750608600031904122785e-1 * z - 1.615753718733365076637e1) * z - 7.500855792314704667340e1) * z -
       1.228866684490136173410e2) *
          z -
      6.485021904942025371773e1;
  const double q =
      ((((z + 2.485846490142306297962e1) * z + 1.650270098316988542046e2) * z + 4.328810604912902668951e2) *
           z +
       4.853903996359136964868e2) *
          z +
      1.945506571482613964425e2;
  const double near = r + r * (z * p / q);
  return far ? 7.85398163397448309616e-1 + (near + 3.061616997868382943e-17) : near;  // π/4 in two parts
}

// sin(x) for |x| ≤ 100: x is brought to [−π/2, π/2] with π in three parts, and Taylor's series ends at
// x²¹/21!.
inline double sine_of(double x) {
  constexpr double kRound =
      6755399441055744.0;  // 1.5·2⁵²: adding it leaves the nearest integer in the lowest bits
  const double shifted = x * 3.18309886183790671538e-1 + kRound, turns = shifted - kRound;
  const double r = ((x - turns * 3.14159250259399414062) - turns * 1.509957883172319266e-7) -
                   turns * 1.078060571631623810e-14;
  const double z = r * r;
  double sum = 1.0 / 51090942171709440000.0;
  sum = sum * z - 1.0 / 121645100408832000.0;
  sum = sum * z + 1.0 / 355687428096000.0;
  sum = sum * z - 1.0 / 1307674368000.0;
  sum = sum * z + 1.0 / 6227020800.0;
  sum = sum * z - 1.0 / 39916800.0;
  sum = sum * z + 1.0 / 362880.0;
  sum = sum * z - 1.0 / 5040.0;
  sum = sum * z + 1.0 / 120.0;
  sum = sum * z - 1.0 / 6.0;
  const double value = r + r * (z * sum);
  const uint64_t odd = __builtin_bit_cast(uint64_t, shifted) << 63;  // an odd number of half turns
  return __builtin_bit_cast(double, __builtin_bit_cast(uint64_t, value) ^ odd);
}

// See Loops::angles.
void angles(const double* __restrict aa, const double* __restrict bb, const double* __restrict ab, int n,
            double* __restrict theta, double* __restrict sine, double* __restrict ordinary) {
  for (int i = 0; i < n; ++i) {
    const double p = aa[i] * bb[i], q = ab[i] * ab[i];
    const double square = ((p - q) + (__builtin_fma(aa[i], bb[i], -p) - __builtin_fma(ab[i], ab[i], -q))) / p;
    const double s = __builtin_sqrt(square > 0.0 ? square : 0.0), c = ab[i] / __builtin_sqrt(p);
    const double size = c < 0.0 ? -c : c;
    const bool steep = s > size;
    const double low = arc_tangent((steep ? size : s) / (steep ? s : size));
    const double acute = steep ? 1.57079632679489661923 - low : low;
    theta[i] = c < 0.0 ? 3.14159265358979323846 - acute : acute;
    sine[i] = s;
    // false for NaN, for lengths whose products leave the range of numbers, and for all that is nearly
    // opposite
    const bool in_range = (aa[i] > 1e-140) & (bb[i] > 1e-140) & (aa[i] < 1e140) & (bb[i] < 1e140);
    ordinary[i] = in_range & (c > -0.99) ? 1.0 : 0.0;
  }
}

// sin(sθ)/sin θ, see `arc_weight`.
inline double weight_of(double s, double theta, double sine) {
  const double tt = theta * theta, ss = s * s;
  const double series = s * (1.0 + tt * ((1.0 - ss) / 6.0 + tt * (7.0 - ss * (10.0 - 3.0 * ss)) / 360.0));
  const double quotient = sine_of(s * theta) / sine;
  return theta < 1e-3 ? series : quotient;
}

// See Loops::arc_weights.
void arc_weights(const double* __restrict theta, const double* __restrict sine, const double* __restrict t,
                 int n, double* __restrict a, double* __restrict b) {
  for (int i = 0; i < n; ++i) {
    a[i] = weight_of(1.0 - t[i], theta[i], sine[i]);
    b[i] = weight_of(t[i], theta[i], sine[i]);
  }
}

}  // namespace
}  // namespace latentfast
