"""Frequencies of clips: `frequency_mix`."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from latentfast.ops import _checks
from latentfast.reference.stats import low_pass

KINDS = ("butterworth", "gaussian", "ideal")


#: Filters that are kept for calls to come: those of so many sizes and settings.
_MOST_KEPT = 32
_kept: dict[tuple, Tensor] = {}
#: Kept filters that captured graphs read. A graph does not own what was made before it, so these are never let go.
_read_by_graphs: dict[tuple, Tensor] = {}


def _half_spectrum(
    size: tuple[int, ...], cutoff: float, order: float, temporal: float, kind: str, dtype: torch.dtype,
    device: torch.device,
) -> Tensor:  # fmt: skip
    """The filter at the frequencies that `rfftn` keeps, divided by the number of all: the inverse transform's factor.

    FreeInit's filter is not symmetric where a size is odd. Of two real clips the mix is real by the filter's even part,
    which is what taking the real part of the complex transform's result comes to.
    """
    with torch.inference_mode(False):
        dims = (-3, -2, -1)
        response = torch.fft.ifftshift(low_pass(size, cutoff, order, temporal, kind, torch.float64, device), dim=dims)
        opposite = response.flip(dims).roll((1, 1, 1), dims)
        even = (response + opposite) / (2 * response.numel())
        return even[..., : size[-1] // 2 + 1].to(dtype).contiguous()


def _response(*settings) -> Tensor:
    """`_half_spectrum(*settings)`, kept. Made while a graph is traced or captured, a filter belongs to that graph."""
    if torch.compiler.is_compiling():
        return _half_spectrum(*settings)
    device = settings[-1]
    captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    response = _read_by_graphs.get(settings, _kept.get(settings))
    if response is None:
        response = _half_spectrum(*settings)
        if not captured:
            while len(_kept) >= _MOST_KEPT:
                _kept.pop(next(iter(_kept), ()), None)  # the oldest
            _kept[settings] = response
    elif captured:
        _read_by_graphs[settings] = response
    return response


def _filtered(x: Tensor, response: Tensor) -> Tensor:
    dims = (-3, -2, -1)
    return torch.fft.irfftn(torch.fft.rfftn(x, dim=dims).mul_(response), s=x.shape[-3:], dim=dims, norm="forward")


class _FrequencyMix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, low, high, response):
        ctx.response = response
        wide = _checks.wide(low.dtype)
        base = high.to(wide)
        # linear: one transform of the difference in place of one of each
        return _filtered(low.to(wide) - base, response).add_(base).to(low.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        wide = grad.to(_checks.wide(grad.dtype))
        passed = _filtered(wide, ctx.response)  # real and even: its own adjoint
        grad_high = (wide - passed).to(grad.dtype) if ctx.needs_input_grad[1] else None
        return passed.to(grad.dtype) if ctx.needs_input_grad[0] else None, grad_high, None


def frequency_mix(
    low: Tensor,
    high: Tensor,
    cutoff: float = 0.25,
    order: float = 4,
    *,
    temporal_cutoff: float | None = None,
    kind: str = "butterworth",
) -> Tensor:
    """The low frequencies of one clip with the high ones of another, over frames, rows and columns: FreeInit's noise
    reinitialisation (Wu et al., 2023, section 4.2).

    The filter comes in closed form and is kept for each size; the transforms are torch's (cuFFT, MKL), two real ones
    in all.

    Args:
        low: Latents `(B, C, T, H, W)`, float32, float16, bfloat16 or float64: the noised clip in FreeInit.
        high: Latents like `low`: fresh noise in FreeInit.
        cutoff: The spatial stop frequency d_s in [0, 1], 1 being the highest frequency; 0 lets nothing of `low` pass.
        order: The steepness of the Butterworth filter.
        temporal_cutoff: The temporal stop frequency d_t; None: `cutoff`.
        kind: "butterworth", "gaussian" or "ideal", as in diffusers.

    Returns:
        A new contiguous tensor like `low`; computed in float32 (float64 for float64). The same bits on every run of
        one shape; whether a sample's bits depend on its batch is up to the library of Fourier transforms.

    Raises:
        TypeError: an argument is no tensor, or of an unknown or different dtype.
        ValueError: shapes or devices do not fit, a cutoff lies outside of [0, 1], the kind is unknown.

    Differentiable in `low` and `high`, once.

    Example:
        >>> import torch, latentfast
        >>> low, high = torch.ones(1, 1, 2, 4, 4), torch.zeros(1, 1, 2, 4, 4)
        >>> latentfast.frequency_mix(low, high, 0.5).mean().item()  # the mean is the lowest frequency of all
        1.0
    """
    _checks.latent("low", low)
    _checks.like("high", high, "low", low)
    if low.ndim != 5:
        raise ValueError(f"low must have 5 dimensions (B, C, T, H, W), got shape {tuple(low.shape)}")
    cutoff = _checks.number("cutoff", cutoff, 0.0, 1.0)
    temporal = cutoff if temporal_cutoff is None else _checks.number("temporal_cutoff", temporal_cutoff, 0.0, 1.0)
    order = _checks.number("order", order)
    if kind not in KINDS:
        raise ValueError(f"kind must be butterworth, gaussian or ideal, got {kind!r}")
    if not low.numel():
        return torch.empty_like(low, memory_format=torch.contiguous_format)
    response = _response(tuple(low.shape[-3:]), cutoff, order, temporal, kind, _checks.wide(low.dtype), low.device)
    return _FrequencyMix.apply(low, high, response)
