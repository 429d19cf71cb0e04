"""Statistics: the operators' signatures in front of the reference."""

import torch

from latentfast._operators import LAYOUTS
from latentfast.reference import stats as reference


def channel_stats(z, p, n, q, m, mean, std) -> None:
    found = reference.channel_stats(z.reshape(p, n, q, m), channel_dim=2)
    for out, value in zip((mean, std), found, strict=True):
        out.copy_(value.reshape(out.shape))


def adain(z, ref, factor, p, n, q, m, ref_p, ref_n, ref_m, out) -> None:
    x, style = z.reshape(p, n, q, m), ref.reshape(ref_p, ref_n, q, ref_m)
    out.copy_(reference.adain(x, style, factor, channel_dim=2).reshape(out.shape))


def standardize(z, mean, std, host_mean, host_std, scale, inverse, layout, b, c, t, h, w, pt, ph, pw, out) -> None:
    if not out.numel():
        return
    function = reference.unstandardize if inverse else reference.standardize
    patch, size = (pt, ph, pw), (t, h, w)
    x = reference.unpack(z, patch, size) if layout == LAYOUTS["unpack"] else z.reshape(b, c, *size)
    y = function(x, (host_mean or [0.0] * c) if mean is None else mean, host_std if std is None else std, scale)
    y = reference.pack(y, patch) if layout == LAYOUTS["pack"] else y
    out.copy_(y.reshape(out.shape))


def tone_map(z, grad, compression, out) -> None:
    if grad is None:
        out.copy_(reference.tone_map(z, compression))
        return
    x, s = reference.working(z), 0.75 * compression
    size = x.abs()
    gate = torch.sigmoid(4 * s * (size - 1))
    out.copy_(grad * (1 - 0.8 * s * gate * (1 + 4 * s * size * (1 - gate))))
