"""An auxiliary loss that teaches the text encoder which attributes belong together.

From flow matching alone the encoder hardly learns which of two nouns an adjective belongs to: a swap costs little
in latent error. Here the embedding of every word that names an attribute of exactly one shape has to tell all four
attributes of that shape, through one linear map, which is what the cross-attention's keys and values can read.
The map is thrown away after training.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentfast.tiny.caption import MOTION_WORDS, SIZE_WORDS, VOCABULARY
from latentfast.tiny.scene import BACKGROUNDS, COLOURS, MOTIONS, SHAPE_FACTORS, SHAPES, SIZES

WORDS: tuple[dict[str, int], ...] = (
    {w: i for i, w in enumerate(SHAPES)},
    {w: i for i, w in enumerate(COLOURS)},
    {w: i for i, v in enumerate(SIZES) for w in SIZE_WORDS[v]},
    {w: i for i, v in enumerate(MOTIONS) for w in MOTION_WORDS[v]}
    | dict.fromkeys(("still", "not"), MOTIONS.index("nowhere")),
)
COUNTS = [len(values) for values in SHAPE_FACTORS.values()]


class Binding(nn.Module):
    """The linear map from embeddings of ``width`` to the four attributes, and its loss."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.read = nn.Linear(width, sum(COUNTS))
        meaning = torch.full((2, len(VOCABULARY)), -1)
        for factor, words in enumerate(WORDS):
            for word, value in words.items():
                meaning[:, VOCABULARY.index(word)] = torch.tensor([factor, value])
        self.register_buffer("meaning", meaning)

    def owners(self, ids: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """Which shape, 0 or 1, each word (N, L) describes, -1 for a word that describes none or could be of both; and
        whether the caption mentions each factor of each shape, (N, 2, 4).
        """
        factor, value = self.meaning[:, ids]
        # "green" may be the background's.
        green = (table[:, 8] == BACKGROUNDS.index("green"))[:, None] & (ids == VOCABULARY.index("green"))
        shapes = table[:, :8].view(-1, 2, 4)
        of_shape = shapes.gather(2, factor.clamp_min(0)[:, None].expand(-1, 2, -1))
        matches = (of_shape == value[:, None]) & (factor >= 0)[:, None]  # (N, 2, L)
        factors = torch.arange(4, device=ids.device)
        mentioned = (matches[..., None] & (factor[:, None, :, None] == factors)).any(2)
        one = (matches[:, 0] ^ matches[:, 1]) & ~green
        return torch.where(one, matches[:, 1].long(), -1), mentioned

    def forward(self, states: Tensor, ids: Tensor, table: Tensor) -> Tensor:
        """Mean cross-entropy of the factors that the caption mentions, and the share of them that is right: (2,).

        Args:
            states: embeddings (N, K, D) with K >= L.
            ids: token ids (N, L).
            table: the scenes' factors (N, 10), see ``scene.TABLE_COLUMNS``.
        """
        owner, mentioned = self.owners(ids, table)
        index = owner.clamp_min(0)[..., None].expand(-1, -1, 4)
        counts = (mentioned.gather(1, index) & (owner >= 0)[..., None]).float()  # (N, L, 4)
        wanted = table[:, :8].view(-1, 2, 4).gather(1, index).clamp_min(0)
        logits = self.read(states[:, : ids.shape[1]].float()).split(COUNTS, -1)
        result = []
        for logit, target, count in zip(logits, wanted.unbind(-1), counts.unbind(-1), strict=True):
            missed = F.cross_entropy(logit.flatten(0, 1), target.flatten(), reduction="none").view_as(count)
            right = logit.detach().argmax(-1) == target
            result.append(torch.stack([(missed * count).sum(), (right * count).sum()]))
        return torch.stack(result).sum(0) / counts.sum().clamp_min(1)
