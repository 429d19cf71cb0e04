"""An auxiliary loss that teaches the transformer early what stands where.

Flow matching rewards the right shape in the right place only through the error of its pixels. Here the tokens of a
middle block also have to tell, through one linear map, how much of their patch a shape covers and which attributes that
shape has. Aligning the middle of a diffusion transformer with what a picture means is known to speed its training (Yu
et al., "Representation Alignment for Generation", ICLR 2025, section 3); a renderer gives that meaning for nothing.
The map is thrown away after training.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.train_tiny.binding import COUNTS

FRAMES_A_LATENT, PIXELS_A_TOKEN = 4, 16


def coverage(masks: Tensor) -> Tensor:
    """How much of each token's patch and frames each shape covers: masks (N, 2, T, H, W) to (N, 2, L).

    Tokens stand in the transformer's order; the first frame has a latent of its own, the others share one in fours.
    """
    n, _, t, h, w = masks.shape
    patches = masks.view(n, 2, t, h // PIXELS_A_TOKEN, PIXELS_A_TOKEN, w // PIXELS_A_TOKEN, PIXELS_A_TOKEN).mean((4, 6))
    first, rest = patches[:, :, :1], patches[:, :, 1:]
    return torch.cat([first, rest.unflatten(2, (-1, FRAMES_A_LATENT)).mean(3)], 2).flatten(2)


class Tap(nn.Module):
    """A block of the transformer that keeps its last result until it is taken."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.states: Tensor | None = None

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        self.states = self.block(*args, **kwargs)
        return self.states

    def take(self) -> Tensor:
        """The result; what kept it would keep the whole step's graph, and with it a stream that no capture may use."""
        states, self.states = self.states, None
        return states


class Grounding(nn.Module):
    """The linear map from hidden states of ``width`` to coverage and attributes, and its loss."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.read = nn.Linear(width, 1 + sum(COUNTS))

    def forward(self, states: Tensor, cover: Tensor, table: Tensor) -> Tensor:
        """Mean cross-entropy of the coverage and, where a shape covers a token, of its four attributes.

        Args:
            states: hidden states (N, L, D).
            cover: coverage of each token by each shape (N, 2, L), in [0, 1].
            table: the scenes' factors (N, 10), see ``scene.TABLE_COLUMNS``.
        """
        states = F.layer_norm(states.float(), states.shape[-1:])
        covered, *attributes = self.read(states).split([1, *COUNTS], -1)
        loss = F.binary_cross_entropy_with_logits(covered[..., 0], cover.sum(1).clamp(0, 1))
        wanted = table[:, :8].view(-1, 1, 2, 4).clamp_min(0)
        area = cover.sum().clamp_min(1)
        for factor, logits in enumerate(attributes):
            told = logits.log_softmax(-1)
            told = told.gather(2, wanted[..., factor].expand(-1, told.shape[1], -1))  # (N, L, 2)
            loss = loss - (told * cover.mT).sum() / (len(COUNTS) * area)
        return loss
