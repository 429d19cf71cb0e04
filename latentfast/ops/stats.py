"""Statistics of latents' channels and what pipelines do with them: `channel_stats`, `adain`, `standardize`,
`unstandardize` and `tone_map`; `frequency_mix` has a file of its own."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from latentfast._operators import LAYOUTS
from latentfast.backends import implementation
from latentfast.ops import _checks

_Layout = tuple[int, int, int, int]
_PerChannel = Tensor | Sequence[float]


def _layout(z: Tensor, channel_dim: object) -> tuple[int, _Layout]:
    """(channel_dim from the left, z's shape as (p, n, q, m): samples, positions, channels, positions)."""
    if isinstance(channel_dim, bool) or not isinstance(channel_dim, int):
        raise TypeError(f"channel_dim must be an int, got {type(channel_dim).__name__}")
    d = channel_dim + z.ndim if channel_dim < 0 else channel_dim
    if z.ndim < 2 or not 1 <= d < z.ndim:
        raise ValueError(
            f"channel_dim must name a dimension after the batch, 1 to {z.ndim - 1} for a {z.ndim}-D z, "
            f"got {channel_dim}"
        )
    return d, (z.shape[0], math.prod(z.shape[1:d]), z.shape[d], math.prod(z.shape[d + 1 :]))


def _wants_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


# --- Statistics and AdaIN ---------------------------------------------------------------------------------------------


def _stats(z: Tensor, layout: _Layout, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and std as (p, 1, q, 1)."""
    p, n, q, m = layout
    mean, std = (torch.empty((p, 1, q, 1), dtype=dtype, device=z.device) for _ in range(2))
    implementation("channel_stats", z)(z, p, n, q, m, mean, std)
    return mean, std


def _inverse(x: Tensor) -> Tensor:
    """1/x, and 0 for 0."""
    return torch.where(x == 0, 0.0, 1.0 / torch.where(x == 0, 1.0, x))


def _moments_gradient(z: Tensor, layout: _Layout, grad_mean: Tensor, grad_std: Tensor, stats=None) -> Tensor:
    """The gradient in z of its channels' mean and std, whose gradients are (p, 1, q, 1) float64."""
    mean, std = stats or _stats(z, layout, torch.float64)
    count = layout[1] * layout[3]
    wide = _checks.wide(z.dtype)
    slope = grad_std * _inverse(std) / max(count - 1, 1)
    rest = z.view(layout).to(wide) - mean.to(wide)
    out = rest.mul_(slope.to(wide)).add_((grad_mean / max(count, 1)).to(wide))
    return out.to(z.dtype).view(z.shape)


class _ChannelStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, layout):
        ctx.save_for_backward(z)
        ctx.layout = layout
        p, _, q, _ = layout
        mean, std = _stats(z, layout, _checks.wide(z.dtype))
        return mean.view(p, q), std.view(p, q)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_mean, grad_std):
        (z,) = ctx.saved_tensors
        p, _, q, _ = ctx.layout
        grads = (grad.double().reshape(p, 1, q, 1) for grad in (grad_mean, grad_std))
        return _moments_gradient(z, ctx.layout, *grads), None


def channel_stats(z: Tensor, *, channel_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel of each sample, in one read.

    Sums are taken from each channel's first element on and in float64, so that a mean far from 0 costs no digits and a
    constant channel has a deviation of exactly 0.

    Args:
        z: Latents `(B, C, …)`, float32, float16, bfloat16 or float64; packed `(B, N, C)` with `channel_dim=-1`.
        channel_dim: The dimension of the channels.

    Returns:
        `(mean, std)`, each `(B, C)`, float32 (float64 for float64 latents). `std` is the unbiased estimate (divided by
        the number of elements less one), 0 for a channel of one element; a channel of none has mean 0 and std 0.

    Raises:
        TypeError: z is no tensor of a known dtype, or channel_dim is no int.
        ValueError: channel_dim names no dimension after the batch.

    Differentiable in `z`, once.

    Example:
        >>> import torch, latentfast
        >>> mean, std = latentfast.channel_stats(torch.tensor([[[1.0, 3.0, 5.0]]]))
        >>> mean.item(), std.item()
        (3.0, 2.0)
    """
    _, layout = _layout(_checks.latent("z", z), channel_dim)
    z = z.contiguous()
    if _wants_gradient(z):
        return _ChannelStats.apply(z, layout)
    p, _, q, _ = layout
    mean, std = (torch.empty((p, q), dtype=_checks.wide(z.dtype), device=z.device) for _ in range(2))
    implementation("channel_stats", z)(z, *layout, mean, std)
    return mean, std


def _run_adain(z: Tensor, ref: Tensor, factor: float, layout: _Layout, ref_layout: _Layout, out: Tensor) -> Tensor:
    ref_p, ref_n, _, ref_m = ref_layout
    implementation("adain", z)(z, ref, factor, *layout, ref_p, ref_n, ref_m, out)
    return out


class _Adain(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, ref, factor, layout, ref_layout):
        ctx.save_for_backward(z, ref)
        ctx.rest = factor, layout, ref_layout
        return _run_adain(z, ref, factor, layout, ref_layout, torch.empty_like(z))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        z, ref = ctx.saved_tensors
        factor, layout, ref_layout = ctx.rest
        p, n, q, m = layout
        count, wide = n * m, _checks.wide(z.dtype)
        grad = grad.contiguous()
        mean, std = _stats(z, layout, torch.float64)
        ref_stats = _stats(ref, ref_layout, torch.float64)
        grad_mean, _ = _stats(grad, layout, torch.float64)
        dots = torch.empty((1, p * q, 1), dtype=torch.float64, device=z.device)
        implementation("vector_dots", z)(grad.unsqueeze(0), z.unsqueeze(0), *layout, dots)
        inverse = _inverse(std)
        # Σ grad · (z − mean)/std, what the style's deviation sees
        along = (dots.view(p, 1, q, 1) - count * grad_mean * mean) * inverse
        gain = factor * ref_stats[1] * inverse
        grad_z = grad_ref = None
        if ctx.needs_input_grad[0]:
            rest = z.view(layout).to(wide) - mean.to(wide)
            rest.mul_((-gain * along * inverse / max(count - 1, 1)).to(wide))
            rest.add_(grad.view(layout).to(wide) * (1 - factor + gain).to(wide))
            grad_z = rest.sub_((gain * grad_mean).to(wide)).to(z.dtype).view(z.shape)
        if ctx.needs_input_grad[1]:
            of_mean, of_std = factor * count * grad_mean, factor * along
            if ref_layout[0] != p:  # one style for all samples
                of_mean, of_std = of_mean.sum(0, keepdim=True), of_std.sum(0, keepdim=True)
            grad_ref = _moments_gradient(ref, ref_layout, of_mean, of_std, ref_stats)
        return grad_z, grad_ref, None, None, None


def adain(z: Tensor, ref: Tensor, factor: float = 1.0, *, channel_dim: int = 1, out: Tensor | None = None) -> Tensor:
    """Gives each channel of each sample the mean and the deviation that it has in a reference: adaptive instance
    normalisation (Huang and Belongie, 2017, equation 8), what LTX-Video's upsampler calls `adain_filter_latent`.

    With μ and σ the mean and the unbiased standard deviation of a channel, factor · ((z − μ_z)/σ_z · σ_ref + μ_ref) +
    (1 − factor) · z. A channel that is constant in `z` has no contrast to scale: it becomes μ_ref, never NaN.

    Args:
        z: Latents `(B, C, …)`, float32, float16, bfloat16 or float64; packed `(B, N, C)` with `channel_dim=-1`.
        ref: Latents of `z`'s dtype, dimensions' number and channels, for `z`'s samples or a single one for all; frames,
            height and width may differ.
        factor: How far to go, 0 for `z` itself; below 0 and above 1 extrapolate.
        channel_dim: The dimension of the channels, in both.
        out: A contiguous tensor like `z` to write into; not differentiable.

    Returns:
        A new contiguous tensor like `z`, computed in float32 (float64 for float64) and rounded once.

    Raises:
        TypeError: an argument is no tensor, or of an unknown or different dtype.
        ValueError: shapes or devices do not fit; `ref` has no elements where `z` has some.

    Differentiable in `z` and `ref`, once; the slope of a constant channel's deviation counts as 0.

    Example:
        >>> import torch, latentfast
        >>> z, ref = torch.tensor([[[-1.0, 1.0]]]), torch.tensor([[[10.0, 14.0]]])
        >>> latentfast.adain(z, ref)
        tensor([[[10., 14.]]])
    """
    d, layout = _layout(_checks.latent("z", z), channel_dim)
    _checks.latent("ref", ref)
    _checks.same_kind("ref", ref, "z", z)
    _checks.number("factor", factor)
    if ref.ndim != z.ndim or ref.shape[d] != z.shape[d] or ref.shape[0] not in (1, z.shape[0]):
        wanted = [str(n) if i == d else "…" for i, n in enumerate(z.shape)]
        wanted[0] = f"{z.shape[0]} or 1"
        raise ValueError(f"ref must have shape ({', '.join(wanted)}), got {tuple(ref.shape)}")
    ref_layout = _layout(ref, channel_dim)[1]
    if z.numel() and not ref.numel():
        raise ValueError(f"ref must have elements to take the statistics of, got shape {tuple(ref.shape)}")
    z, ref = z.contiguous(), ref.contiguous()
    if out is not None:
        out = _checks.output(out, tuple(z.shape), "z", z, (z, ref))
    elif _wants_gradient(z, ref):
        return _Adain.apply(z, ref, float(factor), layout, ref_layout)
    else:
        out = torch.empty_like(z)
    return _run_adain(z, ref, float(factor), layout, ref_layout, out)


# --- The VAE's affine, with packing -----------------------------------------------------------------------------------


class _Standardize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, mean, std, host_mean, host_std, rest, shape):
        ctx.save_for_backward(std)
        ctx.rest = host_std, rest, z.shape
        return _run_standardize(z, mean, std, host_mean, host_std, rest, z.new_empty(shape))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (std,) = ctx.saved_tensors
        host_std, (scale, inverse, layout, *sizes), shape = ctx.rest
        back = {LAYOUTS["same"]: LAYOUTS["same"], LAYOUTS["pack"]: LAYOUTS["unpack"],
                LAYOUTS["unpack"]: LAYOUTS["pack"]}[layout]  # fmt: skip
        rest = (scale, inverse, back, *sizes)
        grad = _run_standardize(grad.contiguous(), None, std, [], host_std, rest, grad.new_empty(shape))
        return grad, None, None, None, None, None, None


def _run_standardize(z, mean, std, host_mean, host_std, rest, out) -> Tensor:
    implementation("standardize", z)(z, mean, std, host_mean, host_std, *rest, out)
    return out


def _per_channel(name: str, values: object, z: Tensor, channels: int) -> tuple[Tensor | None, list[float]]:
    """One number a channel: a tensor, or numbers on the host."""
    if isinstance(values, Tensor):
        if values.dtype not in _checks.DTYPES:
            raise TypeError(f"{name} must be floats, got a tensor of {values.dtype}")
        if values.shape != (channels,):
            raise ValueError(f"{name} must have shape ({channels},), one for each channel, got {tuple(values.shape)}")
        _checks.same_device(name, values, "z", z)
        if _wants_gradient(values):
            raise ValueError(f"{name} requires grad, but is not differentiable here; pass {name}.detach()")
        return values.to(_checks.wide(z.dtype)).contiguous(), []
    try:
        host = [float(x) for x in values]  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a sequence of floats or a tensor, got {type(values).__name__}") from None
    if len(host) != channels:
        raise ValueError(f"{name} must hold {channels} numbers, one for each channel, got {len(host)}")
    return None, host


def _patch(name: str, given: object, dims: tuple[int, ...]) -> tuple[int, ...]:
    if not isinstance(given, tuple | list) or not all(isinstance(x, int) and x > 0 for x in given):
        raise TypeError(f"{name} must be positive ints, got {given!r}")
    if len(given) not in dims:
        raise ValueError(f"{name} must have {' or '.join(map(str, dims))} numbers, got {tuple(given)}")
    return tuple(given)


def _packing(z: Tensor, patch: Sequence[int], size: Sequence[int] | None, inverse: bool, channel_dim: int):
    """(channels, layout, (B, C, T, H, W), (pt, ph, pw), result's shape) of a call with patches."""
    if channel_dim != 1:
        raise ValueError(
            f"channel_dim must be 1 beside patch: packed tokens hold channels and patches, got {channel_dim}"
        )
    if inverse:
        if z.ndim != 3:
            raise ValueError(f"z must be packed, (B, tokens, C·patch), beside patch, got shape {tuple(z.shape)}")
        patch = _patch("patch", patch, (2, 3))
        if size is None:
            raise ValueError("size must be given beside patch: the latents' (T, H, W), or (H, W) of an image")
        size = _patch("size", size, (len(patch),))
        if z.shape[2] % math.prod(patch):
            raise ValueError(
                f"z's last dimension must be a multiple of {math.prod(patch)} for {patch=}, got {z.shape[2]}"
            )
        shape = (z.shape[0], z.shape[2] // math.prod(patch), *size)
    else:
        if z.ndim not in (4, 5):
            raise ValueError(f"z must be (B, C, T, H, W) or (B, C, H, W) beside patch, got shape {tuple(z.shape)}")
        patch, shape = _patch("patch", patch, (z.ndim - 2,)), tuple(z.shape)
    for n, part in zip(shape[2:], patch, strict=True):
        if n % part:
            raise ValueError(f"patch must divide the latents' size {tuple(shape[2:])}, got {patch}")
    tokens = math.prod([n // part for n, part in zip(shape[2:], patch, strict=True)])
    if inverse and z.shape[1] != tokens:
        raise ValueError(f"z must hold {tokens} tokens for {size=} and {patch=}, got {z.shape[1]}")
    result = shape if inverse else (shape[0], tokens, shape[1] * math.prod(patch))
    front = (1,) * (3 - len(patch))
    t, h, w = (*front, *shape[2:])
    pt, ph, pw = (*front, *patch)
    if ph == pw == 1:  # rows follow each other in the tokens as in the latents: one long row serves the kernels better
        h, w = 1, h * w
        if pt == 1:
            t, w = 1, t * w
    return shape[1], LAYOUTS["unpack" if inverse else "pack"], (*shape[:2], t, h, w, pt, ph, pw), result


def _affine(z, mean, std, scale, channel_dim, patch, size, inverse, out) -> Tensor:
    _, (p, n, q, m) = _layout(_checks.latent("z", z), channel_dim)
    _checks.number("scale", scale)
    if scale == 0:
        raise ValueError("scale must not be 0")
    if patch is None:
        if size is not None:
            raise ValueError("size is for packed latents: give patch as well")
        channels, layout, sizes, shape = q, LAYOUTS["same"], (p * n, q, 1, 1, m, 1, 1, 1), tuple(z.shape)
    else:
        channels, layout, sizes, shape = _packing(z, patch, size, inverse, channel_dim)
    mean, host_mean = _per_channel("mean", mean, z, channels)
    std, host_std = _per_channel("std", std, z, channels)
    if not all(0 < x < math.inf for x in host_std):
        raise ValueError(f"std must be positive and finite, got {min(host_std, key=lambda x: 0 < x < math.inf)}")
    z = z.contiguous()
    rest = (float(scale), inverse, layout, *sizes)
    if out is not None:
        out = _checks.output(out, shape, "z", z, (z, mean, std))
    elif _wants_gradient(z):
        return _Standardize.apply(z, mean, std, host_mean, host_std, rest, shape)
    else:
        out = z.new_empty(shape)
    return _run_standardize(z, mean, std, host_mean, host_std, rest, out)


def standardize(
    z: Tensor,
    mean: _PerChannel,
    std: _PerChannel,
    scale: float = 1.0,
    *,
    channel_dim: int = 1,
    patch: Sequence[int] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Brings a VAE's latents to the transformer's scale, (z − mean)/std · scale for each channel, and packs them to
    tokens in the same pass if `patch` is given.

    What diffusers does in `_normalize_latents` and `_pack_latents`; a token holds its patch channel by channel, each
    with its frames, rows and columns in order, as there.

    Args:
        z: Latents `(B, C, …)`, float32, float16, bfloat16 or float64.
        mean: One number a channel, `vae.config.latents_mean`: a sequence of C floats, or a tensor `(C,)` on z's device.
            A sequence goes to the kernel by value: nothing is copied to the device in a call.
        std: The same of the deviations, positive.
        scale: The VAE's scaling factor.
        channel_dim: The dimension of the channels; 1 beside `patch`.
        patch: The patch of a token, `(pt, ph, pw)` for video `(B, C, T, H, W)`, `(ph, pw)` for images `(B, C, H, W)`;
            (1, 1, 1) for LTX-Video, (2, 2) for Flux.
        out: A contiguous tensor like the result to write into; not differentiable.

    Returns:
        A new contiguous tensor like `z`, or `(B, T/pt · H/ph · W/pw, C·pt·ph·pw)`. Computed in float32 (float64 for
        float64), rounded once.

    Raises:
        TypeError: an argument is no tensor, or of an unknown or different dtype.
        ValueError: shapes or devices do not fit; std is not positive; mean or std requires grad.

    Differentiable in `z`, once.

    Example:
        >>> import torch, latentfast
        >>> z = torch.arange(8.0).reshape(1, 2, 1, 2, 2)
        >>> latentfast.standardize(z, [0.0, 4.0], [1.0, 0.5], patch=(1, 2, 2))
        tensor([[[0., 1., 2., 3., 0., 2., 4., 6.]]])
    """
    return _affine(z, mean, std, scale, channel_dim, patch, None, False, out)


def unstandardize(
    z: Tensor,
    mean: _PerChannel,
    std: _PerChannel,
    scale: float = 1.0,
    *,
    channel_dim: int = 1,
    patch: Sequence[int] | None = None,
    size: Sequence[int] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The inverse of `standardize`, z · std/scale + mean: the transformer's latents as the VAE takes them, unpacked
    from tokens in the same pass if `patch` and `size` are given.

    Args:
        z: Latents `(B, C, …)`, or tokens `(B, T/pt · H/ph · W/pw, C·pt·ph·pw)` beside `patch`.
        mean: One number a channel, as for `standardize`.
        std: The same of the deviations, positive.
        scale: The VAE's scaling factor.
        channel_dim: The dimension of the channels; 1 beside `patch`.
        patch: The patch of a token, `(pt, ph, pw)` or `(ph, pw)`, as for `standardize`.
        size: The latents' `(T, H, W)`, or `(H, W)` for images; beside `patch` alone.
        out: A contiguous tensor like the result to write into; not differentiable.

    Returns:
        A new contiguous tensor like `z`, or the latents `(B, C, T, H, W)` or `(B, C, H, W)`.

    Raises:
        TypeError: an argument is no tensor, or of an unknown or different dtype.
        ValueError: shapes or devices do not fit; std is not positive; mean or std requires grad.

    Differentiable in `z`, once.

    Example:
        >>> import torch, latentfast
        >>> tokens = torch.tensor([[[0.0, 1.0, 2.0, 3.0]]])
        >>> latentfast.unstandardize(tokens, [1.0], [2.0], patch=(2, 2), size=(2, 2))
        tensor([[[[1., 3.],
                  [5., 7.]]]])
    """
    return _affine(z, mean, std, scale, channel_dim, patch, size, True, out)


# --- Tone -------------------------------------------------------------------------------------------------------------


def _run_tone_map(z: Tensor, grad: Tensor | None, compression: float, out: Tensor) -> Tensor:
    implementation("tone_map", z)(z, grad, compression, out)
    return out


class _ToneMap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, compression):
        ctx.save_for_backward(z)
        ctx.compression = compression
        return _run_tone_map(z, None, compression, torch.empty_like(z))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (z,) = ctx.saved_tensors
        return _run_tone_map(z, grad.contiguous(), ctx.compression, torch.empty_like(z)), None


def tone_map(z: Tensor, compression: float, *, out: Tensor | None = None) -> Tensor:
    """Presses large values together: z · (1 − 0.8·s·sigmoid(4·s·(|z| − 1))) with s = 0.75·compression, the
    `tone_map_latents` of LTX-Video's upsampler.

    Args:
        z: Latents of any shape, float32, float16, bfloat16 or float64.
        compression: How strongly, in [0, 1]; 0 changes nothing.
        out: A contiguous tensor like `z` to write into; not differentiable.

    Returns:
        A new contiguous tensor like `z`, computed in float32 (float64 for float64) and rounded once.

    Raises:
        TypeError: z is no tensor of a known dtype, or compression is no number.
        ValueError: compression lies outside of [0, 1].

    Differentiable in `z`, once.

    Example:
        >>> import torch, latentfast
        >>> latentfast.tone_map(torch.tensor([0.0, 1.0, 10.0]), 1.0)
        tensor([0.0000, 0.7000, 4.0000])
    """
    _checks.latent("z", z)
    compression = float(_checks.number("compression", compression, 0.0, 1.0))
    z = z.contiguous()
    if out is not None:
        return _run_tone_map(z, None, compression, _checks.output(out, tuple(z.shape), "z", z, (z,)))
    if _wants_gradient(z):
        return _ToneMap.apply(z, compression)
    return _run_tone_map(z, None, compression, torch.empty_like(z))
