"""Autoencoders of diffusers whose tiled decode and encode put their tiles together in one launch, with the same bits.

`accelerate_vae` gives an autoencoder the class of this package that has its class's name, and takes it back again:
weights, config and attributes stay as they are, and it saves, copies and pickles as diffusers' own. Tiles are cut as
`enable_tiling(...)` says.

Autoencoders that decode by groups of frames (Wan, Qwen-Image, CogVideoX) write each group into one buffer as soon as
it is there; Wan's and Qwen-Image's parents let the clip grow by `torch.cat`, which holds it twice and moves it once
more with each group. With `cuda_graph=True` their groups, hundreds of small launches each, are replayed as CUDA graphs.

What is left to diffusers' own code: tiles whose sizes the compression does not divide, which meet elsewhere than they
were cut, or share more than half of themselves; devices other than CPU and CUDA; with gradients on, clips that are not
tiled.

Example:
    >>> import torch, diffusers
    >>> from latentfast.integrations.diffusers.vaes import accelerate_vae
    >>> vae = diffusers.AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()
    >>> vae.enable_tiling(64, 64, 48, 48)
    >>> replacement = accelerate_vae(vae)
    >>> with torch.no_grad():
    ...     vae.decode(torch.randn(1, 4, 2, 14, 13)).sample.shape
    torch.Size([1, 3, 5, 112, 104])
    >>> replacement.undo()
"""

from dataclasses import dataclass
from typing import Any

from latentfast.integrations.diffusers.vaes.families import (
    REPLACEMENTS,
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLMochi,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    InChunks,
)
from latentfast.integrations.diffusers.vaes.graphs import GRAPHS, ChunkGraphs

__all__ = [
    "AutoencoderKL",
    "AutoencoderKLCogVideoX",
    "AutoencoderKLHunyuanVideo",
    "AutoencoderKLLTXVideo",
    "AutoencoderKLMochi",
    "AutoencoderKLQwenImage",
    "AutoencoderKLWan",
    "ChunkGraphs",
    "Replacement",
    "accelerate_vae",
    "replacement_for",
    "why_not",
]


@dataclass(frozen=True)
class Replacement:
    """What was done to an autoencoder."""

    vae: Any
    #: Its class before.
    parent: type
    #: One line of a report.
    note: str

    def undo(self) -> None:
        """Give the autoencoder its own class back, and free its graphs. A second time does nothing."""
        if type(self.vae) is REPLACEMENTS[self.parent]:
            self.vae.__class__ = self.parent
        GRAPHS.pop(self.vae, None)


def replacement_for(vae: Any) -> type | None:
    """The class of this package that can take the place of an autoencoder's class; None if there is none.

    Args:
        vae: An autoencoder of diffusers.

    Example:
        >>> import diffusers
        >>> from latentfast.integrations.diffusers.vaes import replacement_for
        >>> replacement_for(diffusers.AutoencoderKL()).__name__
        'AutoencoderKL'
    """
    return REPLACEMENTS.get(type(vae))


def why_not(vae: Any) -> str:
    """Why an autoencoder's class is not replaced; "" if it can be.

    Args:
        vae: An autoencoder of diffusers.

    Example:
        >>> import diffusers
        >>> from latentfast.integrations.diffusers.vaes import why_not
        >>> why_not(diffusers.AutoencoderKLTemporalDecoder())
        'AutoencoderKLTemporalDecoder does not decode in tiles that latentfast knows'
    """
    name = type(vae).__name__
    if replacement_for(vae) is not None:
        return ""
    if type(vae) in REPLACEMENTS.values():
        return f"{name} is replaced already"
    if isinstance(vae, tuple(REPLACEMENTS)):
        return f"{name} is a subclass, which may do otherwise what would be replaced"
    return f"{name} does not decode in tiles that latentfast knows"


def accelerate_vae(vae: Any, cuda_graph: bool = False) -> Replacement | str:
    """Replace an autoencoder's class, in place.

    Args:
        vae: An autoencoder of diffusers.
        cuda_graph: Whether to decode groups of frames (Wan, Qwen-Image, CogVideoX) through CUDA graphs, recorded when a
            shape is first decoded and then replayed, under `torch.no_grad()` or inference mode. They keep the working
            memory of a group and feature caches of up to eight shapes on the device (`ChunkGraphs`). Where they cannot
            be (gradients on, training, offloading hooks, a failed recording) groups are decoded step by step.

    Returns:
        How to undo it; or, where there is nothing to replace, the reason.

    Example:
        >>> import diffusers
        >>> from latentfast.integrations.diffusers.vaes import accelerate_vae
        >>> vae = diffusers.AutoencoderKL()
        >>> accelerate_vae(vae).note
        'AutoencoderKL: the seams of tiles in one launch'
        >>> accelerate_vae(vae)
        'AutoencoderKL is replaced already'
    """
    replacement = replacement_for(vae)
    if replacement is None:
        return why_not(vae)
    parent, done = type(vae), ["the seams of tiles in one launch"]
    if issubclass(replacement, InChunks):
        done.append("groups of frames in one buffer")
        if cuda_graph:
            GRAPHS[vae] = ChunkGraphs()
            done.append("decoded by CUDA graphs")
    elif cuda_graph:
        done.append("no CUDA graphs, since it does not decode by groups of frames")
    vae.__class__ = replacement
    return Replacement(vae, parent, f"{parent.__name__}: {', '.join(done)}")
