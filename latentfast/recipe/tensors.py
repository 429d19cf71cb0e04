"""Tensors of recipes: their digests, kept so that no byte is hashed twice, and how a reference becomes a tensor."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from latentfast.cache import digest_tensor
from latentfast.recipe.errors import MissingTensorError
from latentfast.recipe.keys import mask_key, surroundings, tensor_key

if TYPE_CHECKING:
    from latentfast.recipe.masks import AttentionMask

__all__ = ["Resolve", "Tensors", "is_kept", "keep", "reference"]


class _Digests:
    """Digests of tensors by the object and its version, which torch counts up at every write."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], int, str]] = {}

    def of(self, tensor: Tensor) -> str:
        known = self._known.get(id(tensor))
        if known is not None and known[0]() is tensor and known[1] == tensor._version:
            return known[2]
        if not isinstance(tensor, Tensor):
            raise TypeError(f"must be a tensor, got {type(tensor).__name__}")
        digest = f"sha256:{digest_tensor(tensor).removeprefix('sha256:')}"
        if not tensor.is_inference():  # those made in inference mode have no version to see a write by
            number, table = id(tensor), self._known

            def forget(gone: weakref.ref[Tensor]) -> None:
                if (entry := table.get(number)) is not None and entry[0] is gone:
                    del table[number]

            table[number] = (weakref.ref(tensor, forget), tensor._version, digest)
        return digest


_digests = _Digests()


def reference(tensor: Tensor) -> str:
    """The name of a tensor in recipes: "sha256:" and the digest of its dtype, shape and values.

    The first call for a tensor reads all of it, on a GPU by way of the host; later ones look the digest up, until
    torch counts a write into it. A write behind torch's back (through a NumPy view, or by a CUDA graph that is
    replayed) is not seen; a tensor made in inference mode is read every time.
    """
    return _digests.of(tensor)


class Tensors(Mapping[str, Tensor]):
    """Tensors under their references: what `Recipe.apply` takes as `tensors`.

    Example:
        >>> import torch
        >>> from latentfast.recipe import Recipe, SlerpTowards, Tensors
        >>> tensors = Tensors()
        >>> recipe = Recipe([SlerpTowards(tensors.add(torch.tensor([[0.0, 1.0]])), 1 / 3)])
        >>> recipe.apply(torch.tensor([[1.0, 0.0]]), tensors=tensors)
        tensor([[0.8660, 0.5000]])
    """

    def __init__(self, *tensors: Tensor) -> None:
        self._tensors: dict[str, Tensor] = {}
        for tensor in tensors:
            self.add(tensor)

    def add(self, tensor: Tensor) -> str:
        """Keep a tensor, and return its reference. It must not be written into any more."""
        made = reference(tensor)
        self._tensors[made] = tensor
        return made

    def __getitem__(self, reference: str) -> Tensor:
        return self._tensors[reference]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


_VALUE = "tensor"


def keep(cache: Any, tensor: Tensor) -> str:
    """Put a tensor of recipes into a cache, where `Recipe.apply` finds it, and return its reference.

    Args:
        cache: A `latentfast.cache.LatentCache`.
        tensor: Of any shape and dtype; the cache keeps a copy.

    Example:
        >>> import torch
        >>> from latentfast.cache import LatentCache
        >>> from latentfast.recipe import LerpTowards, Recipe, keep
        >>> with LatentCache(host_bytes=1 << 20) as cache:
        ...     recipe = Recipe([LerpTowards(keep(cache, torch.ones(2)), 0.25)])
        ...     recipe.apply(torch.zeros(2), cache=cache)
        tensor([0.2500, 0.2500])
    """
    made = reference(tensor)
    cache.put(tensor_key(made), {_VALUE: tensor})
    return made


def is_kept(cache: Any, reference: str) -> bool:
    """Whether a cache very likely has the tensor of a reference; only `Resolve` reads it to be sure."""
    return tensor_key(reference) in cache


class Resolve:
    """From references to tensors: those that are given, then those in the cache."""

    __slots__ = ("_cache", "_given")

    def __init__(self, given: Mapping[str, Tensor], cache: Any) -> None:
        self._given, self._cache = given, cache

    def __call__(self, reference: str, device: torch.device | None = None) -> Tensor:
        """The tensor of a reference.

        Args:
            reference: "sha256:…".
            device: Where the cache is to put it.

        Raises:
            MissingTensorError: it is nowhere.
            ValueError: another tensor was given under this reference.
        """
        given = self._given.get(reference)
        if given is not None:
            if (found := _digests.of(given)) != reference:
                name = f"tensors[{_short(reference)!r}]"
                raise ValueError(f"{name} must be the tensor of that digest, got one of {_short(found)}")
            return given
        if reference.startswith("name:"):
            raise MissingTensorError(f"{reference!r} is a name that context must say the tensor of", reference)
        if self._cache is not None:
            kept = self._cache.get(tensor_key(reference), device=device, copy=False)
            if kept is not None:
                return kept[_VALUE]
        places = "neither in tensors nor in the cache" if self._cache is not None else "not in tensors"
        raise MissingTensorError(f"tensor {reference} is {places}", reference)

    def mask(self, mask: str | AttentionMask, latents: Tensor) -> Tensor:
        """The mask that a parameter stands for, at the latents' size."""
        if isinstance(mask, str):
            return self(mask, latents.device)
        size, cache, device = tuple(latents.shape[2:]), self._cache, latents.device
        if cache is None:
            return mask.made(self(mask.heat, device), size)
        key = mask_key(mask.canonical, size, surroundings(device))
        kept = cache.get(key, device=device, copy=False)
        if kept is not None:
            return kept[_VALUE]
        made = mask.made(self(mask.heat, device), size)
        cache.put(key, {_VALUE: made})
        return made


def _short(reference: str) -> str:
    return f"{reference[:19]}…"
