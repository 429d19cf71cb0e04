"""What recipes are found by in a cache: tensors, masks, and the states between two edits.

The keys' texts are put together here from parts that are in their canonical form already, because a slider in motion
asks for new ones all the time; `Key.of` of the same description would make the same key.
"""

from __future__ import annotations

import json
from functools import lru_cache

import torch

from latentfast.backends import forced
from latentfast.cache import Key, environment

__all__ = ["Surroundings", "mask_key", "state_key", "surroundings", "tensor_key"]

_KEPT = 4096

#: What can change in a process that changes bits: the device, the backend, threads, and settings of torch's.
Surroundings = tuple[torch.device, str | None, int, bool, str]


def surroundings(device: torch.device) -> Surroundings:
    """Those of now, cheap enough to be asked in every call."""
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    settings = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
    return device, forced(), threads, *settings


@lru_cache(64)
def _environment(where: Surroundings) -> str:
    return Key.of(environment(where[0])).canonical


@lru_cache(_KEPT)
def tensor_key(reference: str) -> Key:
    """Of a tensor that recipes name."""
    return Key.of({"latentfast": "tensor", "tensor": reference})


@lru_cache(_KEPT)
def mask_key(mask: str, size: tuple[int, ...], where: Surroundings) -> Key:
    """Of the mask that an `AttentionMask`, as canonical JSON, gives at a size."""
    sizes = ",".join(map(str, size))
    text = f'{{"environment":{_environment(where)},"latentfast":"mask","mask":{mask},"size":[{sizes}]}}'
    return Key.of_canonical(text)


@lru_cache(_KEPT)
def state_key(source: str, before: str, edit: str, where: Surroundings) -> Key:
    """Of the latents after an edit.

    Args:
        source: What the first edit began with: a tensor's reference, or the caller's name for it.
        before: Digest of the recipe up to the edit.
        edit: The edit as canonical JSON.
        where: See `surroundings`.
    """
    head = f'{{"before":"{before}","edit":{edit},"environment":{_environment(where)}'
    return Key.of_canonical(f'{head},"latentfast":"recipe","source":{json.dumps(source)}}}')
