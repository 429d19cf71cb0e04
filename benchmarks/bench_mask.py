"""Masks: what of them is measured, at which sizes."""

import torch
import torch.nn.functional as F
from torch import Tensor

import latentfast
from latentfast.benchmarks.operation import Baseline, Case, Operation
from latentfast.reference import mask as reference

#: Attention (H, Nq, Nk, D) between a clip's tokens and its prompt's.
ATTENTION: dict[str, tuple[int, ...]] = {
    "wan14b_720p": (40, 75600, 512, 128),  # Wan 2.1 14B, 81 frames of 1280x720
    "wan1b_480p": (12, 32760, 512, 128),  # Wan 2.1 1.3B, 81 frames of 832x480
    "wan1b_480p_5_frames": (12, 7800, 512, 128),  # the first five latent frames of it
}
#: Heat maps (G, t, h, w) on a token grid; the latents have twice its height and width.
GRIDS: dict[str, tuple[int, ...]] = {"wan720_grid": (4, 21, 45, 80), "wan480_grid": (4, 21, 30, 52)}
#: Four prompts' words, a token each.
TOKENS = [[1], [2], [3], [4]]
MASK = {"quantile": 0.9, "softness": 0.1, "dilate": 1, "smooth_time": 1.0}


def _attention(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    b, heads, queries, keys, width = shape
    q = torch.randn((b, heads, queries, width), device=device, dtype=dtype)
    return q, torch.randn((b, heads, keys, width), device=device, dtype=dtype)


def _reference(q: Tensor, k: Tensor) -> Tensor:
    """In float64, where it is the yardstick, some queries at a time: all scores would take 12 GB and more."""
    of = reference.token_heatmap_in_chunks if q.dtype == torch.float64 else reference.token_heatmap
    return of(q, k, TOKENS)


def _field(q: Tensor, k: Tensor) -> Tensor:
    """The mean map of all tokens, then some of them, in the operands' own precision."""
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    return torch.stack([weights[..., token].sum(-1).mean(1) for token in TOKENS], 1)


def _peer(q: Tensor, k: Tensor) -> Tensor:
    """As attention processors that keep their maps do: each head's whole softmax, stored, then averaged."""
    maps = [(q[:, h] @ k[:, h].transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) for h in range(q.shape[1])]
    mean = torch.stack(maps, 1).mean(1)
    return torch.stack([mean[..., token].sum(-1) for token in TOKENS], 1)


def _flops(inputs: tuple[Tensor, ...]) -> int:
    """Of Q·Kᵀ."""
    q, k = inputs
    return 2 * q.numel() * k.shape[2]


TOKEN_HEATMAP = Operation(
    stem="mask",
    name="token_heatmap",
    variant="4 tokens",
    inputs=_attention,
    batch_dims=(0, 0),
    outputs=(0,),
    ours=lambda q, k: latentfast.token_heatmap(q, k, TOKENS),
    reference=Baseline(_reference, "latentfast.reference, float64 in chunks"),
    field=Baseline(_field, "softmax(qkᵀ)[..., tokens].mean(1)"),
    peer=Baseline(_peer, "attention maps kept whole, head by head"),
    sizes=ATTENTION,
    flops=_flops,
)


def _heat(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Skewed as attention is: most of a map is near its least value."""
    return (torch.rand(shape, device=device, dtype=torch.float32).pow(4).to(dtype),)


def _doubled(heat: Tensor) -> tuple[int, int, int]:
    t, h, w = heat.shape[2:]
    return t, 2 * h, 2 * w


def _masks(function):
    return lambda heat: function(heat.flatten(2), tuple(heat.shape[2:]), _doubled(heat), **MASK)


def _field_mask(heat: Tensor) -> Tensor:
    """The same with what PyTorch has: padding and a convolution over time, interpolate, a pool, torch.quantile."""
    x = heat - heat.amin((2, 3, 4), keepdim=True)
    x = x / x.amax((2, 3, 4), keepdim=True)
    weights = torch.exp(-0.5 * torch.arange(-3, 4, device=x.device, dtype=x.dtype).square())
    b, g, t, h, w = x.shape
    rows = x.reshape(b * g, 1, t, h * w)
    rows = F.pad(rows, (0, 0, 3, 3), mode="replicate")
    x = F.conv2d(rows, (weights / weights.sum()).view(1, 1, 7, 1)).view(b, g, t, h, w)
    x = F.interpolate(x, _doubled(heat), mode="trilinear", align_corners=False)
    x = F.max_pool3d(x, (1, 3, 3), stride=1, padding=(0, 1, 1))
    limit = torch.quantile(x.flatten(2), 0.9, dim=-1)
    u = ((x - limit[:, :, None, None, None]) / 0.1 + 0.5).clamp(0, 1)
    return u * u * (3 - 2 * u)


HEATMAP_TO_MASK = Operation(
    stem="mask",
    name="heatmap_to_mask",
    variant="quantile, dilated, smoothed",
    inputs=_heat,
    batch_dims=(0,),
    outputs=(0,),
    ours=_masks(latentfast.heatmap_to_mask),
    reference=Baseline(_masks(reference.heatmap_to_mask), "latentfast.reference"),
    field=Baseline(_field_mask, "interpolate, max_pool3d, torch.quantile"),
    sizes=GRIDS,
)

CASES = [
    Case(TOKEN_HEATMAP, "wan14b_720p", 1),
    Case(HEATMAP_TO_MASK, "wan720_grid", 1, torch.float32),
    Case(TOKEN_HEATMAP, "wan1b_480p", 1),
    Case(HEATMAP_TO_MASK, "wan720_grid", 8, torch.float32),
]
CPU_CASES = [
    Case(TOKEN_HEATMAP, "wan1b_480p_5_frames", 1, torch.float32),
    Case(HEATMAP_TO_MASK, "wan480_grid", 1, torch.float32),
]
