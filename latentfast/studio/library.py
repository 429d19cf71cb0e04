"""What was made for a document: clips, masks of words, directions. And the recipe that a document comes to."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from latentfast.integrations.diffusers.masks import attention_mask
from latentfast.recipe import Edit, Recipe, reference
from latentfast.studio.document import Document, Layer, Shot, Word
from latentfast.studio.kinds import KINDS, colour_direction, recipe_edit
from latentfast.studio.model import Clip

__all__ = ["Built", "Library"]

_MaskName = tuple[Shot, tuple[Word, ...]]


@dataclass(frozen=True)
class Built:
    """A document as a recipe.

    Attributes:
        recipe: Of the layers that are on and ready.
        tensors: Those that it names.
        problems: Why a layer is not in it though it is on, by the layers' ids.
        masks: Masks that must be made before all of it can be there.
    """

    recipe: Recipe
    tensors: Mapping[str, Tensor]
    problems: Mapping[int, str] = field(default_factory=dict)
    masks: tuple[_MaskName, ...] = ()

    def apply(self, latents: Tensor) -> Tensor:
        """The edited latents; without edits the latents themselves."""
        return latents if not self.recipe.edits else self.recipe.apply(latents, tensors=self.tensors)


class Library:
    """Clips and masks, the longest unused forgotten when there are too many. Used from any thread.

    Args:
        most: Bytes of clips, beside those that are wanted.
    """

    def __init__(self, most: int = 1 << 30) -> None:
        self._most = most
        self._lock = threading.RLock()
        self._clips: OrderedDict[Shot, Clip] = OrderedDict()
        self._masks: OrderedDict[_MaskName, Tensor] = OrderedDict()
        self._wanted: frozenset[Shot] = frozenset()
        self.factors: tuple[Tensor, Tensor] | None = None

    def want(self, shots: list[Shot]) -> None:
        """These are not to be forgotten."""
        with self._lock:
            self._wanted = frozenset(shots)

    def clip(self, shot: Shot | None) -> Clip | None:
        """The clip of a shot, if it was made."""
        with self._lock:
            found = self._clips.get(shot) if shot is not None else None
            if found is not None:
                self._clips.move_to_end(shot)  # type: ignore[arg-type]
            return found

    def keep(self, shot: Shot, clip: Clip) -> None:
        """A clip that was made; its tensors are known by their digests from now on."""
        reference(clip.latents)
        with self._lock:
            self._clips[shot] = clip
            for old in [shot for shot in self._clips if shot not in self._wanted]:
                if sum(clip.bytes for clip in self._clips.values()) <= self._most:
                    break
                del self._clips[old]
                for name in [name for name in self._masks if name[0] == old]:
                    del self._masks[name]

    def mask(self, shot: Shot, words: tuple[Word, ...]) -> Tensor | None:
        """The mask of words, if it was made."""
        with self._lock:
            return self._masks.get((shot, words))

    def make_mask(self, shot: Shot, words: tuple[Word, ...]) -> Tensor | None:
        """Where words of a clip's prompt are, `(1, 1, T, H, W)`; None if the clip is not there or has not these words.

        The attention to all of them together, its outlines found in the latents, where no rival has more of it.
        """
        clip = self.clip(shot)
        if clip is None or clip.heat is None or not set(words) <= set(clip.words):
            return None
        found = self.mask(shot, words)
        if found is None:
            rows = [clip.words.index(word) for word in words]
            with torch.no_grad():
                sought = clip.heat[:, rows].mean(1, keepdim=True)
                maps = torch.cat([sought, clip.heat[:, rivals(clip.heat[0].flatten(1), rows)]], 1)
                found = attention_mask(maps, clip.latents).contiguous()
            reference(found)
            with self._lock:
                self._masks[shot, words] = found
                while len(self._masks) > 256:
                    self._masks.popitem(last=False)
        return found

    def build(self, document: Document) -> Built:
        """The recipe of a document, as far as its clips and masks are there. Quick: nothing is made here."""
        source = self.clip(document.shot)
        edits: list[Edit] = []
        tensors: dict[str, Tensor] = {}
        problems: dict[int, str] = {}
        masks: list[_MaskName] = []
        for layer in document.layers:
            if not layer.on:
                continue
            if isinstance(tensor := self._tensor(layer, source), str):
                problems[layer.id] = tensor
                continue
            mask = None
            if layer.words:
                known = set() if source is None else set(source.words)
                if missing := [word for word in layer.words if word not in known]:
                    problems[layer.id] = f"“{missing[0][0]}” is not among the words of this clip"
                    continue
                assert document.shot is not None
                mask = self.mask(document.shot, layer.words)
                if mask is None:
                    masks.append((document.shot, layer.words))
                    continue
            names = [None if x is None else reference(x) for x in (tensor, mask)]
            tensors |= {name: x for name, x in zip(names, (tensor, mask), strict=True) if name and x is not None}
            edits.append(recipe_edit(layer.kind, layer.amount, *names))
        return Built(Recipe(edits), tensors, problems, tuple(masks))

    def _tensor(self, layer: Layer, source: Clip | None) -> Tensor | str | None:
        """What a layer needs beside its amount, or why that is not there."""
        kind = KINDS[layer.kind]
        if kind.clip:
            other = self.clip(layer.shot)
            return "its clip is not there yet" if other is None else other.latents
        if kind.colour is None:
            return None
        if self.factors is None or source is None:
            return "the model's colours are not known yet"
        with self._lock:
            if layer.kind not in source.directions:
                source.directions[layer.kind] = colour_direction(self.factors[0], kind.colour, source.latents)
            return source.directions[layer.kind]


def rivals(maps: Tensor, rows: list[int]) -> list[int]:
    """Words that other things in the picture are called by: looked for in few places, and not in those of `rows`.

    In clips of the embedded model the words of one thing ("big", "red", "circle") have maps with a correlation of 1.0,
    those of two things of -0.2; their largest values are 2 to 3 times the mean, where those of words that name no thing
    are 1.1 to 1.8 times the mean.

    Args:
        maps: The attention to each word, `(G, cells)`.
        rows: The words that are sought.
    """
    sought = maps[rows].mean(0, keepdim=True)
    alike = torch.corrcoef(torch.cat([sought, maps]))[0, 1:]
    peak = maps.amax(1) / maps.mean(1).clamp_min(torch.finfo(maps.dtype).tiny)
    found = ((alike < 0.3) & (peak > 2)).tolist()
    return [row for row, is_rival in enumerate(found) if is_rival and row not in rows]
