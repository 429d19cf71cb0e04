"""What an entry of the table of operations is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

import latentfast
from latentfast import reference
from tests.helpers import GUIDANCE_ULPS, HEAT_ULPS, LOSS_ULPS, ULPS, Draw

Shape = Sequence[int]
_STEMS = [getattr(reference, stem) for stem in reference.__all__]
_LATENTS = ("a", "b", "keys", "latents", "z", "directions", "base", "edited", "ref")


@dataclass(frozen=True)
class Operation:
    """One form of a public operation.

    `samples` says along which dimension each input has its samples (None: it is shared by all), `result_samples` the
    same of the result; None there if a vector spans samples, so that the rules about samples do not apply.
    """

    name: str
    function: str
    inputs: Callable[[Draw, Shape], dict[str, Tensor]]
    samples: dict[str, int | None]
    result_samples: int | None = 0
    options: dict = field(default_factory=dict)
    differentiable: tuple[str, ...] = ("a", "b")
    takes_out: bool = True
    #: The formula without the cases that keep bits, where those hide a derivative; None: `spec`.
    smooth: Callable[..., Tensor] | None = None
    #: How many rounded parts of an input's gradient autograd adds up.
    gradient_parts: int = 1
    #: N×N numbers at every position: too slow for large shapes.
    heavy: bool = False
    #: The inputs that are latents: where a NaN could come from. None: those of the usual names.
    latent_names: tuple[str, ...] | None = None
    #: Halves are computed in float32 and rounded once; else the stem's own tests say what their bits are.
    rounds_once: bool = True
    #: Of several results, the one that is looked at.
    part: int | None = None

    @property
    def call(self) -> Callable[..., Tensor]:
        """The public operation; takes the inputs by name."""
        return self._one(partial(getattr(latentfast, self.function), **self.options))

    @property
    def spec(self) -> Callable[..., Tensor]:
        """The same of the reference."""
        stem = next(stem for stem in _STEMS if hasattr(stem, self.function))
        return self._one(partial(getattr(stem, self.function), **self.options))

    def _one(self, function: Callable) -> Callable[..., Tensor]:
        return function if self.part is None else lambda **inputs: function(**inputs)[self.part]

    @property
    def gradient_spec(self) -> Callable[..., Tensor]:
        """What the gradients are those of."""
        return self.smooth or self.spec

    @property
    def ulps(self) -> dict:
        if self.function == "token_heatmap":
            return HEAT_ULPS
        if self.function in ("guide", "guided_step"):
            return GUIDANCE_ULPS
        return LOSS_ULPS if self.function.endswith("loss") else ULPS

    @property
    def widens(self) -> bool:
        """Whether the result is float32 at least, whatever the inputs' dtype."""
        return self.function.endswith("loss") or self.function in (
            "token_heatmap", "heatmap_to_mask", "latent_to_rgb", "channel_stats",
        )  # fmt: skip

    @property
    def latents(self) -> tuple[str, ...]:
        """The inputs that are latents: where a NaN could come from."""
        return self.latent_names or tuple(name for name in self.samples if name in _LATENTS)

    def __str__(self) -> str:
        return self.name


def one_for_all(shape: Shape, *full: int) -> list[int]:
    """`shape` with all dimensions but `full` of size 1."""
    return [n if d in full else 1 for d, n in enumerate(shape)]
