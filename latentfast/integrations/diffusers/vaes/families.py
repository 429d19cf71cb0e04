"""The autoencoders: what of a family's coding is its own. Each class has its parent's name, config and weights."""
# What a mixin calls by super() is the autoencoder's, and so are the attributes that it reads.
# mypy: disable-error-code="attr-defined, misc, override"

from collections.abc import Iterator, Sequence
from typing import Any

import diffusers
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify, unpatchify
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor, nn

from latentfast.integrations.diffusers.vaes import chunks
from latentfast.integrations.diffusers.vaes.graphs import GRAPHS
from latentfast.integrations.diffusers.vaes.tiling import Axis, coded_in_clips, coded_in_tiles

#: Of diffusers' class: the one that takes its place.
REPLACEMENTS: dict[type, type] = {}


def _replacement(cls: type) -> type:
    """Of its last base."""
    parent = cls.__bases__[-1]
    # Pipelines write a component's module and name into model_index.json, which plain diffusers must be able to load.
    cls.__module__ = parent.__module__
    REPLACEMENTS[parent] = cls
    return cls


def _output(sample: Tensor, return_dict: bool) -> Any:
    return DecoderOutput(sample=sample) if return_dict else (sample,)


def _through(convolution: nn.Module | None, x: Tensor) -> Tensor:
    """quant_conv and post_quant_conv, which some families or configurations do not have."""
    return x if convolution is None else convolution(x)


class _Seamless:
    """Tiles whose seams are one launch. Tiles that do not meet as they were cut go the parent's way."""

    config: Any
    encoder: Any
    decoder: Any
    quant_conv: nn.Module | None
    post_quant_conv: nn.Module | None
    use_tiling: bool
    #: The least and the largest value of what is decoded in tiles.
    _tiled_clamp: tuple[float, float] | None = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles are the parent's: who loads one needs no latentfast."""
        reduced: Any = super().__reduce_ex__(2)
        return object.__new__, (type(self).__bases__[-1],), *reduced[2:]

    def _axes(self, decodes: bool) -> tuple[Axis, Axis]:
        """How height and width are cut."""
        raise NotImplementedError

    def _decoded_tile(self, z: Tensor, *conditions: Any) -> Tensor:
        return self.decoder(_through(getattr(self, "post_quant_conv", None), z), *conditions)

    def _encoded_tile(self, x: Tensor) -> Tensor:
        return _through(getattr(self, "quant_conv", None), self.encoder(x))

    def _finished(self, sample: Tensor) -> Tensor:
        """What else becomes of what was decoded."""
        return sample

    def _tiles(self, x: Tensor, decodes: bool) -> bool:
        """Whether something of this size is cut."""
        height, width = self._axes(decodes)
        return self.use_tiling and (x.shape[-1] > width.size or x.shape[-2] > height.size)

    def _seamless(self, z: Tensor, *conditions: Any) -> Tensor | None:
        """Decoded in tiles; None: the parent has to."""

        def decoded(tile: Tensor) -> Tensor:
            return self._decoded_tile(tile, *conditions)

        sample = coded_in_tiles(z, self._axes(True), decoded, self._tiled_clamp)
        return None if sample is None else self._finished(sample)

    def tiled_decode(self, z: Tensor, return_dict: bool = True) -> Any:
        """Decode tile by tile, with the parent's bits: the seams are one launch.

        Args:
            z: Latents, `(B, C, T, H, W)`, or `(B, C, H, W)` of images.
            return_dict: Whether to return a `DecoderOutput` and not a tuple.
        """
        sample = self._seamless(z)
        return super().tiled_decode(z, return_dict=return_dict) if sample is None else _output(sample, return_dict)

    def tiled_encode(self, x: Tensor) -> Tensor:
        """Encode tile by tile, with the parent's bits: the seams are one launch.

        Args:
            x: A video, `(B, C, T, H, W)`.
        """
        encoded = coded_in_tiles(x, self._axes(False), self._encoded_tile)
        return super().tiled_encode(x) if encoded is None else encoded


class _Strided(_Seamless):
    """Tiles given by sizes and strides in pixels."""

    spatial_compression_ratio: int

    def _axes(self, decodes: bool) -> tuple[Axis, Axis]:
        ratio = self.spatial_compression_ratio
        return self._axis("height", ratio, decodes), self._axis("width", ratio, decodes)

    def _axis(self, name: str, ratio: int, decodes: bool, patch: int = 1) -> Axis:
        """`patch`: pixels that the decoder leaves beside one another in its channels."""
        cut: Sequence[int] = getattr(self, f"tile_sample_min_{name}"), getattr(self, f"tile_sample_stride_{name}")
        sample, latent = ([n // patch for n in cut], [n // ratio for n in cut])
        (size, stride), (after, kept) = (latent, sample) if decodes else (sample, latent)
        return Axis.of(size, stride, kept, after - kept, ratio // patch, decodes)


class _Overlapping(_Seamless):
    """Tiles given by sizes in pixels and in latents, and the share of them that overlaps."""

    def _axis(self, sample: int, latent: int, factor: float, decodes: bool) -> Axis:
        size, after = (latent, sample) if decodes else (sample, latent)
        stride, shared = int(size * (1 - factor)), int(after * factor)
        return Axis.of(size, stride, after - shared, shared, 2 ** (len(self.config.block_out_channels) - 1), decodes)


class _InClips(_Strided):
    """Clips that share frames, each of them tiled where it is large."""

    temporal_compression_ratio: int
    #: Whether a clip that is not the first loses its last decoded frame rather than its first.
    _drops_last: bool

    def _clip_axis(self, decodes: bool) -> Axis:
        return self._axis("num_frames", self.temporal_compression_ratio, decodes)

    def _temporal_tiled_decode(self, z: Tensor, *conditions: Any, return_dict: bool = True) -> Any:
        def decoded(clip: Tensor) -> Tensor:
            if self._tiles(clip, True):
                return self.tiled_decode(clip, *conditions, return_dict=False)[0]
            return self._decoded_tile(clip, *conditions)

        sample = coded_in_clips(z, self._clip_axis(True), decoded, self._drops_last)
        if sample is None:
            return super()._temporal_tiled_decode(z, *conditions, return_dict=return_dict)
        return _output(sample, return_dict)

    def _temporal_tiled_encode(self, x: Tensor) -> Tensor:
        def encoded(clip: Tensor) -> Tensor:
            return self.tiled_encode(clip) if self._tiles(clip, False) else self._encoded_tile(clip)

        latents = coded_in_clips(x, self._clip_axis(False), encoded)
        return super()._temporal_tiled_encode(x) if latents is None else latents


class InChunks(_Seamless):
    """Groups of frames, each coded with what the convolutions kept of the one before."""

    #: Whether a clip that is not tiled goes through quant_conv and post_quant_conv as a whole, not by groups.
    _convolves_whole: bool
    #: The least and the largest value of a clip that was not tiled.
    _whole_clamp: tuple[float, float] | None = None

    def _encode_groups(self, x: Tensor) -> Sequence[Tensor]:
        raise NotImplementedError

    def _decode_groups(self, z: Tensor) -> Sequence[Tensor]:
        raise NotImplementedError

    def _encode_step(self, x: Tensor, cache: Any) -> tuple[Tensor, Any]:
        raise NotImplementedError

    def _decode_step(self, z: Tensor, cache: Any) -> tuple[Tensor, Any]:
        raise NotImplementedError

    def _convolved_encode_step(self, x: Tensor, cache: Any) -> tuple[Tensor, Any]:
        latents, cache = self._encode_step(x, cache)
        return _through(self.quant_conv, latents), cache

    def _convolved_decode_step(self, z: Tensor, cache: Any) -> tuple[Tensor, Any]:
        return self._decode_step(_through(self.post_quant_conv, z), cache)

    def _decoded(self, step: chunks.Step, groups: Sequence[Tensor]) -> Iterator[Tensor]:
        vae: Any = self
        graphs = GRAPHS.get(vae)
        return chunks.coded(step, groups) if graphs is None else graphs.coded(step, groups, vae)

    def _decoded_tile(self, z: Tensor, *conditions: Any) -> Tensor:
        groups = self._decode_groups(z)
        parts = self._decoded(self._convolved_decode_step, groups)
        return chunks.joined(parts) if torch.is_grad_enabled() else chunks.in_one_buffer(parts, len(groups))

    def _encoded_tile(self, x: Tensor) -> Tensor:
        return chunks.joined(chunks.coded(self._convolved_encode_step, self._encode_groups(x)))

    def _decode(self, z: Tensor, return_dict: bool = True) -> Any:
        if torch.is_grad_enabled() or self._tiles(z, True):
            return super()._decode(z, return_dict=return_dict)
        step: chunks.Step = self._convolved_decode_step
        if self._convolves_whole:
            z, step = _through(self.post_quant_conv, z), self._decode_step
        groups = self._decode_groups(z)
        parts = map(self._finished, self._decoded(step, groups))
        return _output(chunks.in_one_buffer(parts, len(groups), self._whole_clamp), return_dict)

    def _encode(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or self._tiles(x, False):
            return super()._encode(x)
        groups = self._encode_groups(self._prepared(x))
        step = self._encode_step if self._convolves_whole else self._convolved_encode_step
        latents = chunks.in_one_buffer(chunks.coded(step, groups), len(groups))
        return _through(self.quant_conv, latents) if self._convolves_whole else latents

    def _prepared(self, x: Tensor) -> Tensor:
        """What is done to a video before it is encoded."""
        return x


@_replacement
class AutoencoderKL(_Overlapping, diffusers.AutoencoderKL):
    """`diffusers.AutoencoderKL`."""

    def _axes(self, decodes: bool) -> tuple[Axis, Axis]:
        axis = self._axis(self.tile_sample_min_size, self.tile_latent_min_size, self.tile_overlap_factor, decodes)
        return axis, axis

    def tiled_encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """The parent's, which is deprecated; `encode` uses another.

        Args:
            x: Images, `(B, C, H, W)`.
            return_dict: Whether to return an `AutoencoderKLOutput` and not a tuple.
        """
        return diffusers.AutoencoderKL.tiled_encode(self, x, return_dict=return_dict)

    def _tiled_encode(self, x: Tensor) -> Tensor:
        encoded = coded_in_tiles(x, self._axes(False), self._encoded_tile)
        return super()._tiled_encode(x) if encoded is None else encoded


@_replacement
class AutoencoderKLHunyuanVideo(_InClips, diffusers.AutoencoderKLHunyuanVideo):
    """`diffusers.AutoencoderKLHunyuanVideo`."""

    _drops_last = False


@_replacement
class AutoencoderKLLTXVideo(_InClips, diffusers.AutoencoderKLLTXVideo):
    """`diffusers.AutoencoderKLLTXVideo`."""

    _drops_last = True

    def tiled_decode(self, z: Tensor, temb: Tensor | None, return_dict: bool = True) -> Any:
        """Decode tile by tile, with the parent's bits: the seams are one launch.

        Args:
            z: Latents, `(B, C, T, H, W)`.
            temb: The decoder's timestep, where it is conditioned on one.
            return_dict: Whether to return a `DecoderOutput` and not a tuple.
        """
        sample = self._seamless(z, temb)
        if sample is None:
            return diffusers.AutoencoderKLLTXVideo.tiled_decode(self, z, temb, return_dict=return_dict)
        return _output(sample, return_dict)


@_replacement
class AutoencoderKLMochi(_Strided, diffusers.AutoencoderKLMochi):
    """`diffusers.AutoencoderKLMochi`."""

    def _decoded_tile(self, z: Tensor, *conditions: Any) -> Tensor:
        groups = z.split(self.num_latent_frames_batch_size, 2) if self.use_framewise_decoding else [z]
        sample = chunks.joined(chunks.coded(self.decoder, groups))
        if self.drop_last_temporal_frames and sample.shape[2] >= self.temporal_compression_ratio:
            return sample[:, :, self.temporal_compression_ratio - 1 :]
        return sample

    def _encoded_tile(self, x: Tensor) -> Tensor:
        return self.encoder(x)[0]

    def tiled_encode(self, x: Tensor) -> Tensor:
        """Encode tile by tile, with the parent's bits: the seams are one launch.

        Args:
            x: A video, `(B, C, T, H, W)`.
        """
        if self.use_framewise_encoding:  # the parent says why it cannot be done
            return diffusers.AutoencoderKLMochi.tiled_encode(self, x)
        return super().tiled_encode(x)


@_replacement
class AutoencoderKLCogVideoX(InChunks, _Overlapping, diffusers.AutoencoderKLCogVideoX):
    """`diffusers.AutoencoderKLCogVideoX`."""

    _convolves_whole = False

    def _axes(self, decodes: bool) -> tuple[Axis, Axis]:
        def axis(name: str) -> Axis:
            sample, latent = getattr(self, f"tile_sample_min_{name}"), getattr(self, f"tile_latent_min_{name}")
            return self._axis(sample, latent, getattr(self, f"tile_overlap_factor_{name}"), decodes)

        return axis("height"), axis("width")

    @staticmethod
    def _groups(x: Tensor, size: int) -> list[Tensor]:
        """Groups of so many frames; what is left over is in the first."""
        frames = x.shape[2]
        left = frames % size
        begins = [0, *range(left + size, frames, size)]
        return [x[:, :, begin:end] for begin, end in zip(begins, [*begins[1:], frames], strict=True)]

    def _encode_groups(self, x: Tensor) -> Sequence[Tensor]:
        return self._groups(x, self.num_sample_frames_batch_size)

    def _decode_groups(self, z: Tensor) -> Sequence[Tensor]:
        return self._groups(z, self.num_latent_frames_batch_size)

    def _encode_step(self, x: Tensor, cache: Any) -> tuple[Tensor, Any]:
        return self.encoder(x, conv_cache=cache)

    def _decode_step(self, z: Tensor, cache: Any) -> tuple[Tensor, Any]:
        return self.decoder(z, conv_cache=cache)


class _Wan(InChunks, _Strided):
    """Latent frame by latent frame, the first of which is one frame and any other four."""

    _convolves_whole = True
    _whole_clamp = (-1.0, 1.0)

    def _encode_groups(self, x: Tensor) -> Sequence[Tensor]:
        later = (x.shape[2] - 1) // 4
        return [x[:, :, :1], *(x[:, :, 1 + 4 * k : 5 + 4 * k] for k in range(later))]

    def _decode_groups(self, z: Tensor) -> Sequence[Tensor]:
        return z.split(1, 2)

    def _encode_step(self, x: Tensor, cache: Any) -> tuple[Tensor, Any]:
        cache = self._cache(self.encoder, cache)
        return self.encoder(x, feat_cache=cache, feat_idx=[0]), cache

    def _decode_step(self, z: Tensor, cache: Any) -> tuple[Tensor, Any]:
        cache = self._cache(self.decoder, cache)
        return self.decoder(z, feat_cache=cache, feat_idx=[0]), cache

    @staticmethod
    def _cache(coder: nn.Module, before: list[Any] | None) -> list[Any]:
        """A list of its own, which the coder writes to: a place for each convolution."""
        return list(before or [None] * sum(isinstance(module, nn.Conv3d) for module in coder.modules()))


@_replacement
class AutoencoderKLWan(_Wan, diffusers.AutoencoderKLWan):
    """`diffusers.AutoencoderKLWan`, of Wan 2.1 and 2.2."""

    _tiled_clamp = (-1.0, 1.0)

    def _axes(self, decodes: bool) -> tuple[Axis, Axis]:
        # What is cut to be encoded is patchified already, and so is what is decoded as long as it is in tiles.
        patch, ratio = self.config.patch_size or 1, self.spatial_compression_ratio
        if decodes:
            return self._axis("height", ratio, True, patch), self._axis("width", ratio, True, patch)
        return self._axis("height", ratio // patch, False), self._axis("width", ratio // patch, False)

    def _decode_step(self, z: Tensor, cache: Any) -> tuple[Tensor, Any]:
        first, cache = cache is None, self._cache(self.decoder, cache)
        return self.decoder(z, feat_cache=cache, feat_idx=[0], first_chunk=first), cache

    def _prepared(self, x: Tensor) -> Tensor:
        patch = self.config.patch_size
        return x if patch is None else patchify(x, patch_size=patch)

    def _finished(self, sample: Tensor) -> Tensor:
        patch = self.config.patch_size
        return sample if patch is None else unpatchify(sample, patch_size=patch)


@_replacement
class AutoencoderKLQwenImage(_Wan, diffusers.AutoencoderKLQwenImage):
    """`diffusers.AutoencoderKLQwenImage`."""
