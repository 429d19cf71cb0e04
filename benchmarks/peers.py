"""The expressions that the field uses for these operations: what a reader would otherwise paste into a pipeline."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def slerp_acos(a: Tensor, b: Tensor, t: Tensor, dim: Sequence[int] = (1, 2, 3, 4), threshold: float = 0.9995) -> Tensor:
    """Slerp by a bare arc cosine, with a switch to lerp near parallel vectors.

    After the function `slerp` that diffusers' community pipelines and many scripts copy from one another, with one
    angle a vector and without their wait for the device. `t` () gives one result, (K,) gives K in front.
    """
    x, y = a.float(), b.float()
    na = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    nb = torch.linalg.vector_norm(y, dim=dim, keepdim=True)
    dot = ((x / na) * (y / nb)).sum(dim, keepdim=True).clamp(-1, 1)
    theta = torch.acos(dot)
    sine = torch.sin(theta)
    t = t.reshape(*t.shape, *([1] * a.ndim))
    curved = torch.sin((1 - t) * theta) / sine * x + torch.sin(t * theta) / sine * y
    mixed = torch.where(dot.abs() > threshold, (1 - t) * x + t * y, curved)
    return mixed.to(a.dtype).reshape(*t.shape[: -a.ndim], *a.shape)


def nlerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """The normalised straight line, with the length interpolated too."""
    x, y = a.float().flatten(1), b.float().flatten(1)
    length = (1 - t) * x.norm(dim=1, keepdim=True) + t * y.norm(dim=1, keepdim=True)
    return (F.normalize((1 - t) * x + t * y, dim=1) * length).to(a.dtype).view_as(a)


def edit(z: Tensor, directions: Tensor, strengths: Tensor, mask: Tensor) -> Tensor:
    """z + Σ s·m·d in the latents' own precision."""
    s = strengths.to(z.dtype).view(-1, *([1] * z.ndim))
    return z + (s * mask * directions).sum(0)


def blend(base: Tensor, edited: Tensor, mask: Tensor) -> Tensor:
    """The blend of diffusers' inpainting pipelines."""
    return (1 - mask) * base + mask * edited


def temporal_loss(z: Tensor, ref: Tensor, mask: Tensor, first: float, second: float) -> Tensor:
    """First and second differences over the frames against a reference clip, masked, in float32."""
    x, m = z.float() - ref.float(), mask.float()
    over = (1, 2, 3, 4)
    d1, w1 = x[:, :, 1:] - x[:, :, :-1], m[:, :, 1:] * m[:, :, :-1]
    d2, w2 = x[:, :, 2:] - 2 * x[:, :, 1:-1] + x[:, :, :-2], m[:, :, 2:] * m[:, :, 1:-1] * m[:, :, :-2]
    tiny, channels = 1e-12, z.shape[1]
    loss = first * (w1 * d1.square()).sum(over) / (w1.sum(over) * channels).clamp_min(tiny)
    loss = loss + second * (w2 * d2.square()).sum(over) / (w2.sum(over) * channels).clamp_min(tiny)
    return loss.mean()


def warp_loss(z: Tensor, flow: Tensor, mask: Tensor) -> Tensor:
    """The next frame pulled back along the flow by `grid_sample`, compared where the mask and the frame allow it."""
    b, c, _, h, w = z.shape
    x = z.float().transpose(1, 2)
    following, frames = x[:, 1:].reshape(-1, c, h, w), x[:, :-1].reshape(-1, c, h, w)
    offsets = flow.float().transpose(1, 2).reshape(-1, 2, h, w)
    xs = torch.arange(w, device=z.device) + offsets[:, 0]
    ys = torch.arange(h, device=z.device).view(h, 1) + offsets[:, 1]
    grid = torch.stack((2 * xs / (w - 1) - 1, 2 * ys / (h - 1) - 1), -1)
    warped = F.grid_sample(following, grid, mode="bilinear", align_corners=True)
    inside = (xs >= 0) & (xs <= w - 1) & (ys >= 0) & (ys <= h - 1)
    weight = (inside * mask.float().transpose(1, 2).reshape(-1, h, w)).unsqueeze(1)
    total = (weight.reshape(b, -1).sum(1) * c).clamp_min(1e-12)
    return ((weight * (warped - frames).square()).reshape(b, -1).sum(1) / total).mean()


def _seam(a: Tensor, b: Tensor, overlap: int, dim: int) -> None:
    """A whole seam at once: the end of `a` fades into the beginning of `b`, in place."""
    extent = min(a.shape[dim], b.shape[dim], overlap)
    if not extent:
        return
    ramp = torch.arange(extent, device=b.device, dtype=torch.float32) / extent
    ramp = ramp.view(-1, *([1] * (b.ndim - 1 - dim)))
    before, own = a.narrow(dim, a.shape[dim] - extent, extent), b.narrow(dim, 0, extent)
    own.copy_(before * (1 - ramp) + own * ramp)


def _kept(parts: Sequence[Tensor], overlap: int, dim: int) -> Tensor:
    ends = [min(a.shape[dim], b.shape[dim], overlap) for a, b in pairwise(parts)] + [0]
    return torch.cat([x.narrow(dim, 0, x.shape[dim] - end) for x, end in zip(parts, ends, strict=True)], dim)


def _stitch_with(seams: Sequence[Callable[..., object]], tiles: Sequence, overlap: Sequence[int]) -> Tensor:
    """Tiles (rows of them, or a list of such rows for temporal tiles) by functions that blend a seam in place."""
    over_time, down, across = seams
    temporal = len(overlap) == 3
    height, width = overlap[-2:]
    clips = []
    for rows in tiles if temporal else [tiles]:
        rows = [[tile.clone() for tile in row] for row in rows]
        for i, row in enumerate(rows):
            for j, tile in enumerate(row):
                if i > 0:
                    down(rows[i - 1][j], tile, height)
                if j > 0:
                    across(row[j - 1], tile, width)
        clips.append(_kept([_kept(row, width, 4) for row in rows], height, 3))
    for a, b in pairwise(clips):
        over_time(a, b, overlap[0])
    return _kept(clips, overlap[0], 2) if temporal else clips[0]


def stitch(tiles: Sequence, overlap: Sequence[int]) -> Tensor:
    """diffusers' seams without its loops over rows and columns."""
    return _stitch_with([partial(_seam, dim=dim) for dim in (2, 3, 4)], tiles, overlap)


def diffusers_stitch(tiles: Sequence, overlap: Sequence[int]) -> Tensor:
    """The seams by the methods of a diffusers autoencoder, as its `tiled_decode` and `_temporal_tiled_decode` call
    them; on copies of the tiles, because they change them.
    """
    from diffusers import AutoencoderKLHunyuanVideo as Vae

    return _stitch_with([partial(f, None) for f in (Vae.blend_t, Vae.blend_v, Vae.blend_h)], tiles, overlap)


def overlap_add(tiles: Sequence, overlap: Sequence[int]) -> Tensor:
    """Rows of tiles faded in and out by ramps of half steps and added up, in float32."""
    height, width = overlap
    first = tiles[0][0]
    downs = [_window([row[0].shape[3] for row in tiles], i, height, first) for i in range(len(tiles))]
    acrosses = [_window([tile.shape[4] for tile in tiles[0]], j, width, first) for j in range(len(tiles[0]))]
    total = first.new_zeros(
        (*first.shape[:3], downs[-1][0] + len(downs[-1][1]), acrosses[-1][0] + len(acrosses[-1][1])),
        dtype=torch.float32,
    )
    for row, (top, down) in zip(tiles, downs, strict=True):
        for tile, (left, across) in zip(row, acrosses, strict=True):
            there = total[..., top : top + tile.shape[3], left : left + tile.shape[4]]
            there += tile * (down[:, None] * across)
    return total.to(first.dtype)


def _window(sizes: Sequence[int], k: int, overlap: int, like: Tensor) -> tuple[int, Tensor]:
    """Where tile k begins, and its weights."""
    extents = [0, *(min(a, b, overlap) for a, b in pairwise(sizes)), 0]
    up, down = (
        (torch.arange(n, device=like.device, dtype=torch.float32) + 0.5) / max(n, 1) for n in extents[k : k + 2]
    )
    middle = like.new_ones(sizes[k] - len(up) - len(down), dtype=torch.float32)
    return sum(sizes[:k]) - sum(extents[: k + 1]), torch.cat((up, middle, 1 - down))


def adain(z: Tensor, ref: Tensor) -> Tensor:
    """AdaIN of all channels at once: a deviation of 0 gives NaN."""
    dims = (2, 3, 4)
    std, mean = torch.std_mean(z.float(), dims, keepdim=True)
    ref_std, ref_mean = torch.std_mean(ref.float(), dims, keepdim=True)
    return ((z.float() - mean) / std * ref_std + ref_mean).to(z.dtype)


def standardize_to_tokens(z: Tensor, mean: Tensor, std: Tensor, patch: int = 1) -> Tensor:
    """The VAE's affine, then one token for each patch of `patch` by `patch` positions."""
    view = (1, -1, 1, 1, 1)
    x = ((z - mean.view(view)) / std.view(view)).to(z.dtype)
    if patch == 1:
        return x.flatten(2).transpose(1, 2).contiguous()
    b, c, t, h, w = x.shape
    parts = x.view(b, c, t, h // patch, patch, w // patch, patch)
    return parts.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)


def unstandardize_from_tokens(tokens: Tensor, mean: Tensor, std: Tensor, size: Sequence[int]) -> Tensor:
    """Tokens of one position each as latents, with the inverse of the VAE's affine."""
    view = (1, -1, 1, 1, 1)
    x = tokens.transpose(1, 2).unflatten(2, size)
    return (x * std.view(view) + mean.view(view)).to(tokens.dtype).contiguous()


def tone_map(z: Tensor, compression: float) -> Tensor:
    """Sigmoid compression, each step in the latents' own dtype."""
    s = 0.75 * compression
    return z * (1 - 0.8 * s * torch.sigmoid(4 * s * (z.abs() - 1)))


def frequency_mix(low: Tensor, high: Tensor, response: Tensor) -> Tensor:
    """Complex transforms of both clips, with a filter that lies ready."""
    dims = (-3, -2, -1)
    x, y = torch.fft.fftn(low.float(), dim=dims), torch.fft.fftn(high.float(), dim=dims)
    return torch.fft.ifftn(x * response + y * (1 - response), dim=dims).real.to(low.dtype)


def latent_to_rgb(z: Tensor, weight: Tensor, bias: Tensor, size: tuple[int, int] | None) -> Tensor:
    """A preview as user interfaces make it: the channels mixed, every frame enlarged by `F.interpolate`, to bytes."""
    rgb = torch.einsum("bcthw,ck->btkhw", z.float(), weight) + bias.view(3, 1, 1)
    frames = rgb.flatten(0, 1)
    if size is not None:
        frames = F.interpolate(frames, size=size, mode="bilinear", align_corners=False)
    pixels = (frames + 1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).unflatten(0, rgb.shape[:2]).contiguous()
