"""``AutoencoderKLWan`` over a whole clip at once: the library's weights and result, without its cache of chunks.

The library walks a clip four frames at a time and carries the last frames of every convolution along. For
training that is slow; the same result comes from one pass in which a causal convolution sees the whole clip,
and the two resampling steps in time treat the first frame apart. ``tests/test_tiny_training.py`` holds the two
walks together.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders import autoencoder_kl_wan as wan
from torch import Tensor, nn

from tools.train_tiny.norm_silu import norm_silu


def encode_mean(vae: AutoencoderKLWan, video: Tensor) -> Tensor:
    """The latent's mean (N, 16, T', H/8, W/8) of clips (N, 3, T, H, W) in [-1, 1]."""
    e = vae.encoder
    x = _conv(e.conv_in, wan.patchify(video, vae.config.patch_size))
    for block in e.down_blocks:
        x = _down(block, x)
    x = _head(e, _middle(e.mid_block, x))
    return _conv(vae.quant_conv, x)[:, : vae.config.z_dim]


def decode_raw(vae: AutoencoderKLWan, latent: Tensor) -> Tensor:
    """The clip of a latent, not clamped: a clamp would stop the gradient of every pixel outside [-1, 1]."""
    d = vae.decoder
    x = _middle(d.mid_block, _conv(d.conv_in, _conv(vae.post_quant_conv, latent)))
    for block in d.up_blocks:
        x = _up(block, x)
    return wan.unpatchify(_head(d, x), vae.config.patch_size)


def _conv(m: nn.Module, x: Tensor) -> Tensor:
    # Channels last: the fastest layout of cuDNN's half-precision 3-D convolutions by far.
    past = m._padding[4]
    x = x.contiguous(memory_format=torch.channels_last_3d)
    if past:
        x = F.pad(x.permute(0, 2, 3, 4, 1), (0, 0, 0, 0, 0, 0, past, 0)).permute(0, 4, 1, 2, 3)
    weight = m.weight.contiguous(memory_format=torch.channels_last_3d)
    return F.conv3d(x, weight, m.bias, m.stride, (0, m._padding[2], m._padding[0]))


def _norm_silu(m: nn.Module, x: Tensor) -> Tensor:
    return norm_silu(x.movedim(1, -1), m.gamma.view(-1)).movedim(-1, 1)


def _head(m: nn.Module, x: Tensor) -> Tensor:
    return _conv(m.conv_out, _norm_silu(m.norm_out, x))


def _residual(m: nn.Module, x: Tensor) -> Tensor:
    skip = x if isinstance(m.conv_shortcut, nn.Identity) else _conv(m.conv_shortcut, x)
    x = _conv(m.conv1, _norm_silu(m.norm1, x))
    return _conv(m.conv2, _norm_silu(m.norm2, x)) + skip


def _middle(m: nn.Module, x: Tensor) -> Tensor:
    x = _residual(m.resnets[0], x)
    for attention, resnet in zip(m.attentions, m.resnets[1:], strict=True):
        x = _residual(resnet, attention(x))
    return x


def _frames(m: nn.Module, x: Tensor) -> Tensor:
    """Applies a module for pictures to every frame."""
    b, c, t, h, w = x.shape
    y = m(x.permute(0, 2, 1, 3, 4).reshape(b * t, c, h, w))
    return y.view(b, t, *y.shape[1:]).permute(0, 2, 1, 3, 4)


def _down(m: nn.Module, x: Tensor) -> Tensor:
    skip = m.avg_shortcut(x)
    for resnet in m.resnets:
        x = _residual(resnet, x)
    if m.downsampler is not None:
        x = _frames(m.downsampler.resample, x)
        if m.downsampler.mode == "downsample3d" and x.shape[2] > 1:
            x = torch.cat([x[:, :, :1], _conv(m.downsampler.time_conv, x)], 2)
    return x + skip


def _up(m: nn.Module, x: Tensor) -> Tensor:
    skip = x
    for resnet in m.resnets:
        x = _residual(resnet, x)
    if m.upsampler is not None:
        if m.upsampler.mode == "upsample3d" and x.shape[2] > 1:
            y = _conv(m.upsampler.time_conv, x[:, :, 1:])  # every frame but the first becomes two
            b, c, t, h, w = y.shape
            y = y.reshape(b, 2, c // 2, t, h, w).permute(0, 2, 3, 1, 4, 5).reshape(b, c // 2, 2 * t, h, w)
            x = torch.cat([x[:, :, :1], y], 2)
        up, conv = m.upsampler.resample
        x = _frames(lambda f: conv(F.interpolate(f, scale_factor=up.scale_factor, mode="nearest")), x)
    return x if m.avg_shortcut is None else x + m.avg_shortcut(skip, first_chunk=True)
