"""What the transformer learns from: latents of rendered clips, held on the device, and their captions."""

from __future__ import annotations

import random

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from latentfast.tiny import scene
from latentfast.tiny.caption import END, MAX_TOKENS, PAD, VOCABULARY, caption, make_tokenizer
from tools.train_tiny.train_vae import encode_pool

EMPTY_PROMPT = 0.1
CAPTIONS = 2  # wordings of each scene


def draw_captions(scenes: list[scene.Scene], seed: int, each: int = CAPTIONS, *, complete: float) -> Tensor:
    """Token ids (scenes, each, MAX_TOKENS), int16: wordings with no, few or many factors left out."""
    rng = random.Random(seed)
    texts = [
        caption(s, rng, drop=0.0 if rng.random() < complete else rng.uniform(0.1, 0.6))
        for s in scenes
        for _ in range(each)
    ]
    encoded = make_tokenizer()(
        texts, padding="max_length", max_length=MAX_TOKENS, truncation=False, return_tensors="pt"
    )
    if encoded.input_ids.shape[1] != MAX_TOKENS:
        raise RuntimeError(f"a caption has {encoded.input_ids.shape[1]} tokens; MAX_TOKENS is {MAX_TOKENS}")
    return encoded.input_ids.view(len(scenes), each, MAX_TOKENS).to(torch.int16)


class Pool:
    """Latents with the scenes they show; old ones are replaced by clips of scenes not seen before.

    Args:
        vae: with its latents' statistics; encodes what is drawn.
        scenes: scenes with captions, drawn by ``seed``.
        clips: latents held at a time.
        two_shapes: share of the scenes that have two shapes.
        complete: share of the captions that leave no factor out.
    """

    def __init__(
        self,
        vae: AutoencoderKLWan,
        *,
        scenes: int,
        clips: int,
        two_shapes: float,
        complete: float,
        seed: int,
        device: str,
        smoke: bool,
    ) -> None:
        self.vae, self.device, self.smoke = vae, device, smoke
        statistics = torch.tensor([vae.config.latents_mean, vae.config.latents_std], device=device)
        self.mean, self.std = statistics.view(2, 1, -1, 1, 1, 1)
        table = scene.random_table(scenes, two=two_shapes, generator=torch.Generator().manual_seed(seed))
        self.ids = draw_captions(scene.from_table(table), seed, complete=complete).to(device)
        self.table = table.to(device)
        self.empty = torch.full((MAX_TOKENS,), VOCABULARY.index(PAD), device=device)
        self.empty[0] = VOCABULARY.index(END)
        self.owner = torch.arange(clips, device=device)
        self.latents, self.cover = self._draw(self.owner)
        self.next_scene, self.next_slot = clips % scenes, 0

    def _draw(self, owners: Tensor) -> tuple[Tensor, Tensor]:
        latents, cover = encode_pool(self.vae, self.table[owners], self.device, self.smoke)
        return (latents - self.mean) / self.std, cover

    def refresh(self, n: int) -> None:
        owners = (self.next_scene + torch.arange(n, device=self.device)) % len(self.table)
        slots = (self.next_slot + torch.arange(n, device=self.device)) % len(self.owner)
        self.owner[slots] = owners
        self.latents[slots], self.cover[slots] = self._draw(owners)
        self.next_scene = (self.next_scene + n) % len(self.table)
        self.next_slot = (self.next_slot + n) % len(self.owner)

    def sample(self, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Latents (n, 16, T', H', W'), the coverage of their tokens by each shape (n, 2, L), the ids (n, MAX_TOKENS) of
        one of their captions or of the empty prompt, and their factors (n, 10).
        """
        slot = torch.randint(0, len(self.owner), (n,), device=self.device)
        wording = torch.randint(0, self.ids.shape[1], (n,), device=self.device)
        ids = self.ids[self.owner[slot], wording].long()
        dropped = torch.rand(n, 1, device=self.device) < EMPTY_PROMPT
        return self.latents[slot], self.cover[slot], torch.where(dropped, self.empty, ids), self.table[self.owner[slot]]
