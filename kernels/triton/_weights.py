"""The weights of lerp, nlerp and slerp and their derivatives from a vector's three sums, in float64, one a vector.

The angle comes from the sums |a|², |b|², a·b: sin²θ = (|a|²|b|² − (a·b)²)/(|a|²|b|²), with both products taken to twice
the precision, then atan2. What is left is the sums' own rounding: a relative error of about 1e-16/(π − θ)² in the
weights near π. That stays below the error of float32 arithmetic on the vectors up to where they count as opposite; for
float64 vectors it is above that of the specification, `latentfast.reference.interpolate`.
"""

import triton
import triton.language as tl
from latentfast.kernels.triton._math import atan2_upper, halving_scale, sincos, two_product

#: As in the specification: |u + v| below which unit vectors count as opposite, angle below which the series holds.
_OPPOSITE = tl.constexpr(1.4e-6)
_SMALL_ANGLE = tl.constexpr(1e-3)
_PI = tl.constexpr(3.141592653589793)

LERP = tl.constexpr(0)
NLERP = tl.constexpr(1)
SLERP = tl.constexpr(2)


@triton.jit
def angle(aa, bb, ab):
    """(θ, sin θ, cos θ, one is zero, opposite) of vectors with |a|² = aa, |b|² = bb, a·b = ab."""
    zero = (aa == 0.0) | (bb == 0.0)
    sa = halving_scale(aa)
    sb = halving_scale(bb)
    x = aa * sa * sa
    y = bb * sb * sb
    z = ab * sa * sb
    length = tl.where(zero, 1.0, tl.sqrt(x) * tl.sqrt(y))
    p, p_rest = two_product(x, y)
    s, s_rest = two_product(z, z)
    square = (p - s) + (p_rest - s_rest)
    sine = tl.sqrt(tl.where(square < 0.0, 0.0, square)) / length
    cosine = tl.where(zero, 1.0, z / length)
    theta = atan2_upper(sine, cosine)
    # |u + v|² = 2 (1 + cos θ), which cancels near π
    plus = tl.where(cosine < 0.0, 2.0 * sine * sine / (1.0 + tl.abs(cosine)), 2.0 + 2.0 * cosine)
    return theta, sine, cosine, zero, (plus <= _OPPOSITE * _OPPOSITE) & (zero == 0)


@triton.jit
def _slerp_weight(s, theta, sine, small):
    """sin(sθ)/sin θ."""
    s2 = s * s
    t2 = theta * theta
    series = s * (1.0 + t2 * ((1.0 - s2) / 6.0 + t2 * (7.0 - s2 * (10.0 - 3.0 * s2)) / 360.0))
    sin_s, _ = sincos(s * theta)
    return tl.where(small, series, sin_s / tl.where(small, 1.0, sine))


@triton.jit
def slerp_weights(t, aa, bb, ab, LONG: tl.constexpr):
    """(weight of a, of b, of a turned by a quarter)."""
    theta, sine, _, zero, opposite = angle(aa, bb, ab)
    small = (theta < _SMALL_ANGLE) | opposite | zero
    straight = zero | opposite
    wa = tl.where(straight, 1.0 - t, _slerp_weight(1.0 - t, theta, sine, small))
    wb = tl.where(straight, t, _slerp_weight(t, theta, sine, small))
    wt = 0.0 * wa
    if LONG:  # a vector of one element has no way round: its opposite is reached by lerp
        length = (1.0 - t) + t * (tl.sqrt(bb) / tl.where(zero, 1.0, tl.sqrt(aa)))
        sin_t, cos_t = sincos(t * _PI)
        wa = tl.where(opposite, length * cos_t, wa)
        wb = tl.where(opposite, 0.0, wb)
        wt = tl.where(opposite, length * sin_t, 0.0)
    return wa, wb, wt


@triton.jit
def _straight_length(t, aa, bb, ab):
    """(|lerp(a, b, t)|, (1 − t)|a| + t|b|, whether the first counts as 0)."""
    u = 1.0 - t
    square = u * u * aa + t * t * bb + 2.0 * t * u * ab
    actual = tl.sqrt(tl.where(square < 0.0, 0.0, square))
    wanted = u * tl.sqrt(aa) + t * tl.sqrt(bb)
    return actual, wanted, actual <= tl.abs(wanted) * _OPPOSITE


@triton.jit
def nlerp_weights(t, aa, bb, ab, LONG: tl.constexpr):
    """(weight of a, of b, of a turned by a quarter)."""
    actual, wanted, vanishes = _straight_length(t, aa, bb, ab)
    length = tl.abs(wanted)
    ratio = tl.where(vanishes, 1.0, length / tl.where(vanishes, 1.0, actual))
    wa = (1.0 - t) * ratio
    wb = t * ratio
    wt = 0.0 * wa
    if LONG:
        wa = tl.where(vanishes, 0.0, wa)
        wb = tl.where(vanishes, 0.0, wb)
        wt = tl.where(vanishes, length / tl.where(aa == 0.0, 1.0, tl.sqrt(aa)), 0.0)
    return wa, wb, wt


@triton.jit
def weights(t, aa, bb, ab, MODE: tl.constexpr, LONG: tl.constexpr):
    """(weight of a, of b, of a turned by a quarter) at each t."""
    if MODE == LERP:
        return 1.0 - t, t, 0.0 * t
    elif MODE == NLERP:
        return nlerp_weights(t, aa, bb, ab, LONG)
    else:
        return slerp_weights(t, aa, bb, ab, LONG)


@triton.jit
def _slerp_slope(s, theta, sine, cosine, small):
    """(d sin(sθ)/sin θ)/dθ, divided by sin θ: finite at θ = 0."""
    sin_s, cos_s = sincos(s * theta)
    safe = tl.where(small, 1.0, sine)
    s2 = s * s
    series = s * ((1.0 - s2) / 3.0 + theta * theta * ((7.0 - 10.0 * s2 + 3.0 * s2 * s2) / 90.0 + (1.0 - s2) / 18.0))
    return tl.where(small, series, (s * cos_s * sine - sin_s * cosine) / (safe * safe * safe))


@triton.jit
def _slerp_speed(s, theta, sine, small):
    """(d sin(sθ)/sin θ)/ds."""
    _, cos_s = sincos(s * theta)
    s2 = s * s
    t2 = theta * theta
    series = 1.0 + t2 * ((1.0 - 3.0 * s2) / 6.0 + t2 * (7.0 - s2 * (30.0 - 15.0 * s2)) / 360.0)
    return tl.where(small, series, theta * cos_s / tl.where(small, 1.0, sine))


@triton.jit
def slerp_gradient(t, aa, bb, ab, ga, gb, gt, LONG: tl.constexpr):
    """Of L with Σ g·a = ga, Σ g·b = gb, Σ g·turn(a) = gt: (caa, cab, cbb, dL/dt).

    dL/da = wa·g + caa·a + cab·b and dL/db = wb·g + cbb·b + cab·a. Where the path does not follow the angle (a zero
    vector, opposite vectors) the angle is held constant: the c are 0.
    """
    theta, sine, cosine, zero, opposite = angle(aa, bb, ab)
    small = (theta < _SMALL_ANGLE) | opposite | zero
    straight = zero | opposite
    u = 1.0 - t
    slope = ga * _slerp_slope(u, theta, sine, cosine, small) + gb * _slerp_slope(t, theta, sine, cosine, small)
    slope = tl.where(straight, 0.0, slope)
    safe_aa = tl.where(straight, 1.0, aa)
    safe_bb = tl.where(straight, 1.0, bb)
    caa = slope * cosine / safe_aa
    cbb = slope * cosine / safe_bb
    cab = -slope / (tl.sqrt(safe_aa) * tl.sqrt(safe_bb))
    speed = gb * _slerp_speed(t, theta, sine, small) - ga * _slerp_speed(u, theta, sine, small)
    speed = tl.where(straight, gb - ga, speed)
    if LONG:
        ratio = tl.sqrt(bb) / tl.where(zero, 1.0, tl.sqrt(aa))
        length = u + t * ratio
        sin_t, cos_t = sincos(t * _PI)
        growth = (ratio - 1.0) * (cos_t * ga + sin_t * gt)
        turning = length * _PI * (cos_t * gt - sin_t * ga)
        speed = tl.where(opposite, growth + turning, speed)
    return caa, cab, cbb, speed


@triton.jit
def nlerp_gradient(t, aa, bb, ab, ga, gb, gt, LONG: tl.constexpr):
    """As `slerp_gradient`; where the straight line vanishes the lengths are held constant."""
    actual, wanted, vanishes = _straight_length(t, aa, bb, ab)
    sign = tl.where(wanted < 0.0, -1.0, 1.0)
    u = 1.0 - t
    na = tl.sqrt(aa)
    nb = tl.sqrt(bb)
    safe = tl.where(vanishes, 1.0, actual)
    ratio = tl.where(vanishes, 1.0, tl.abs(wanted) / safe)
    slope = tl.where(vanishes, 0.0, (u * ga + t * gb) / safe)
    shrink = ratio / safe
    caa = slope * (tl.where(aa == 0.0, 0.0, sign * u / tl.where(aa == 0.0, 1.0, na)) - u * u * shrink)
    cbb = slope * (tl.where(bb == 0.0, 0.0, sign * t / tl.where(bb == 0.0, 1.0, nb)) - t * t * shrink)
    cab = -slope * u * t * shrink
    along = t * bb + (u - t) * ab - u * aa
    speed = ratio * (gb - ga) + slope * (sign * (nb - na) - shrink * along)
    if LONG:
        speed = tl.where(vanishes, gt * sign * (nb - na) / tl.where(aa == 0.0, 1.0, na), speed)
    return caa, cab, cbb, speed
