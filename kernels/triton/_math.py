"""Scalar mathematics of the kernels, the same on a GPU and in Triton's interpreter.

`libdevice` is absent from the interpreter, and `tl` has no arc tangent. Angles are few, one a vector, so float64
polynomials cost nothing, and one code path serves both.

The launchers compile with `enable_fp_fusion=False`: where a fused multiply-add is wanted it is written, so that
the bits do not depend on what the compiler happens to fuse, and `two_product` keeps its meaning.
"""

import triton
import triton.language as tl
from latentfast._settings import triton_interpreted

#: Triton's interpreter truncates where a GPU rounds to nearest when it narrows float32 to bfloat16.
_TRUNCATES_BFLOAT16 = tl.constexpr(triton_interpreted())


@triton.jit
def widen(x):
    """`x` in the precision that elements are computed in: float64 stays, everything else becomes float32."""
    if x.dtype == tl.float64:
        return x
    else:
        return x.to(tl.float32)


@triton.jit
def double(x):
    """`x` in float64, by way of float32: the interpreter knows no direct conversion from bfloat16."""
    return widen(x).to(tl.float64)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """`x` rounded once, to nearest even, to the element type of a tensor."""
    if dtype == tl.bfloat16 and _TRUNCATES_BFLOAT16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(x == x, rounded, 0x7FC0)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    elif x.dtype == tl.float64 and dtype != tl.float64:
        return narrow(x.to(tl.float32), dtype)
    else:
        return x.to(dtype)


@triton.jit
def square_root(x):
    """√x, correctly rounded: `tl.sqrt` is approximate for float32, `tl.sqrt_rn` unknown for float64."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def pick(k: tl.constexpr, v0, v1, v2, v3, v4, v5, v6, v7):
    """The k-th of the scalars that a launch carries, float64 [1].

    In the interpreter they are Python floats, which an assignment to a variable would turn into float32: hence returns.
    """
    if k == 0:
        return tl.full([1], v0, tl.float64)
    elif k == 1:
        return tl.full([1], v1, tl.float64)
    elif k == 2:
        return tl.full([1], v2, tl.float64)
    elif k == 3:
        return tl.full([1], v3, tl.float64)
    elif k == 4:
        return tl.full([1], v4, tl.float64)
    elif k == 5:
        return tl.full([1], v5, tl.float64)
    elif k == 6:
        return tl.full([1], v6, tl.float64)
    else:
        return tl.full([1], v7, tl.float64)


@triton.jit
def two_product(x, y):
    """(p, e) with p = fl(x·y) and p + e = x·y exactly (Dekker 1971, with Veltkamp's split); |x|, |y| < 2^995."""
    p = x * y
    cx = 134217729.0 * x
    cy = 134217729.0 * y
    xh = cx - (cx - x)
    yh = cy - (cy - y)
    xl = x - xh
    yl = y - yh
    return p, ((xh * yh - p) + xh * yl + xl * yh) + xl * yl


@triton.jit
def sincos(x):
    """(sin x, cos x) in float64, measured error below 1.5e-16 for |x| ≤ 1e5.

    π/2 is taken off in three parts, the first two of 33 bits (exact up to 2^20 quarters), then Taylor polynomials on
    [−π/4, π/4], whose first terms left out are r^19/19! < 1e-19 and r^18/18! < 3e-18.
    """
    k = tl.floor(x * 0.6366197723675814 + 0.5)
    r = ((x - k * 1.5707963267341256) - k * 6.077100506303966e-11) - k * 2.0222662487959506e-21
    q = r * r
    s = q * (1.0 / 355687428096000.0)
    s = q * (-1.0 / 1307674368000.0 + s)
    s = q * (1.0 / 6227020800.0 + s)
    s = q * (-1.0 / 39916800.0 + s)
    s = q * (1.0 / 362880.0 + s)
    s = q * (-1.0 / 5040.0 + s)
    s = q * (1.0 / 120.0 + s)
    s = q * (-1.0 / 6.0 + s)
    s = r + r * s
    c = q * (1.0 / 20922789888000.0)
    c = q * (-1.0 / 87178291200.0 + c)
    c = q * (1.0 / 479001600.0 + c)
    c = q * (-1.0 / 3628800.0 + c)
    c = q * (1.0 / 40320.0 + c)
    c = q * (-1.0 / 720.0 + c)
    c = q * (1.0 / 24.0 + c)
    c = 1.0 + (-0.5 * q + q * c)
    quarter = k - 4.0 * tl.floor(k * 0.25)
    odd = (quarter == 1.0) | (quarter == 3.0)
    sine = tl.where(odd, c, s)
    cosine = tl.where(odd, s, c)
    sine = tl.where(quarter >= 2.0, -sine, sine)
    cosine = tl.where((quarter == 1.0) | (quarter == 2.0), -cosine, cosine)
    return sine, cosine


@triton.jit
def atan2_upper(y, x):
    """atan2(y, x) for y ≥ 0, not both zero, in float64: measured error below 2e-16, relative 4e-16.

    A polynomial that is right to 1e-5 (Abramowitz & Stegun 4.4.49), then one correction: turned back by that guess, the
    point lies d < 2e-5 off the axis, and atan d = d − d³/3 to 1e-24.
    """
    ax = tl.abs(x)
    steep = y > ax
    z = tl.where(steep, ax, y) / tl.where(steep, y, ax)
    q = z * z
    guess = z * (0.9998660 + q * (-0.3302995 + q * (0.1801410 + q * (-0.0851330 + q * 0.0208351))))
    guess = tl.where(steep, 1.5707963267948966 - guess, guess)
    guess = tl.where(x < 0.0, 3.141592653589793 - guess, guess)
    s, c = sincos(guess)
    d = (y * c - x * s) / (x * c + y * s)
    return guess + (d - d * d * d / 3.0)


@triton.jit
def halving_scale(x):
    """The power of two s for which x·s² lies in [1, 4), for a positive float64 x."""
    exponent = ((x.to(tl.int64, bitcast=True) >> 52) & 2047) - 1023
    return ((1023 - (exponent >> 1)) << 52).to(tl.float64, bitcast=True)


@triton.jit
def ordered_sum(ptr, count, BLOCK: tl.constexpr):
    """Sum of `count` float64 numbers, in an order that depends on `count` alone."""
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, count, BLOCK):
        total += tl.load(ptr + start + lane, mask=start + lane < count, other=0.0)
    return tl.sum(total, 0)
