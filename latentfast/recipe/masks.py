"""Where an edit acts: a mask that is there, or one that is made of the attention to words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from torch import Tensor

from latentfast.ops.mask import heatmap_to_mask
from latentfast.recipe.edit import Data, described
from latentfast.recipe.parameters import JSON, Kind, Number, Reference, TensorRef, Whole

__all__ = ["AttentionMask", "Mask"]


@described
@dataclass(frozen=True)
class AttentionMask(Data):
    """A mask of the attention to words: `latentfast.heatmap_to_mask` of a heat map that was captured before.

    Attributes:
        heat: Maps `(B, G, t, h, w)`, what `AttentionCapture.maps()` gives, on the model's grid of tokens.
        group: Which of the G maps.
        threshold: See `heatmap_to_mask`, as for all that follow.
        quantile: Or this share of the cells stays out.
        softness: Width of the ramp at the edge.
        dilate: Cells around it.
        smooth_time: Standard deviation in frames of the grid.
        invert: Everything but that.
    """

    heat: TensorRef
    group: Annotated[int, Whole(0)] = 0
    threshold: Annotated[float, Number()] | None = None
    quantile: Annotated[float, Number(0, 1)] | None = None
    softness: Annotated[float, Number(0)] = 0.0
    dilate: Annotated[int, Whole(0)] = 0
    smooth_time: Annotated[float, Number(0)] = 0.0
    invert: bool = False

    def check(self) -> None:
        if self.threshold is not None and self.quantile is not None:
            raise ValueError(f"threshold and quantile exclude each other, got {self.threshold} and {self.quantile}")
        if self.softness and self.threshold is None and self.quantile is None:
            raise ValueError(f"softness needs a threshold or a quantile, got {self.softness} without")

    def made(self, heat: Tensor, size: tuple[int, ...]) -> Tensor:
        """The mask `(B, 1, T, H, W)` for latents of size (T, H, W), or `(B, 1, H, W)` for (H, W)."""
        if heat.ndim != 5 or not self.group < heat.shape[1]:
            raise ValueError(
                f"heat must have shape (B, G, t, h, w) with more than {self.group} maps, got {tuple(heat.shape)}"
            )
        if len(size) not in (2, 3):
            raise ValueError(
                f"a mask of attention needs latents (B, C, T, H, W) or (B, C, H, W), got {len(size) + 2}-D"
            )
        mask = heatmap_to_mask(
            heat[:, self.group : self.group + 1].flatten(2),
            heat.shape[2:],
            size if len(size) == 3 else (1, *size),
            threshold=self.threshold,
            quantile=self.quantile,
            softness=self.softness,
            dilate=self.dilate,
            smooth_time=self.smooth_time,
        )
        mask = 1 - mask if self.invert else mask
        return mask if len(size) == 3 else mask[:, :, 0]


class MaskKind(Kind):
    """A reference to a mask, or an `AttentionMask`."""

    _reference = Reference()

    def checked(self, value: Any) -> str | AttentionMask:
        if isinstance(value, AttentionMask):
            return value
        if isinstance(value, Mapping):
            try:
                return AttentionMask.from_data(value)
            except (TypeError, ValueError) as error:
                raise type(error)(f"must be right: {error}") from None
        return self._reference.checked(value)

    def schema(self) -> dict[str, JSON]:
        return {"anyOf": [self._reference.schema(), AttentionMask.schema()]}

    def written(self, value: str | AttentionMask) -> JSON:
        return value if isinstance(value, str) else value.to_data()

    def references(self, value: str | AttentionMask) -> Iterator[str]:
        return iter((value,)) if isinstance(value, str) else value.references()

    def renamed(self, value: str | AttentionMask, new: Callable[[str], str]) -> str | AttentionMask:
        return new(value) if isinstance(value, str) else value.renamed(new)


#: The type of a parameter that says where an edit acts.
Mask = Annotated[str | AttentionMask, MaskKind()]
