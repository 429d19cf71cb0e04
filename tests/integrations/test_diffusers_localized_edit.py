"""Localized edits: bits outside the mask, the range of steps, masks of attention, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason="diffusers is not installed")

from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    WanPipeline,
)

import latentfast
from latentfast.integrations.diffusers import AttentionCapture, localized_edit
from latentfast.integrations.diffusers.localized_edit import SideBySide
from latentfast.integrations.diffusers.masks import attention_mask, dilated, sharpen
from latentfast.integrations.diffusers.sampling import clean_estimate
from latentfast.tiny import load_pipeline

CALL: dict[str, Any] = {
    "height": 64, "width": 64, "num_frames": 5, "num_inference_steps": 4, "guidance_scale": 1.5,
    "max_sequence_length": 48, "output_type": "latent",
}  # fmt: skip
SOURCE, EDITED = "a red circle and a blue star", "a green circle and a blue star"


@pytest.fixture(scope="module")
def pipe() -> WanPipeline:
    made = load_pipeline()
    made.set_progress_bar_config(disable=True)
    return made


def noise(clips: int = 1) -> Tensor:
    return torch.randn((clips, 16, 2, 8, 8), generator=torch.Generator().manual_seed(7))


def same_outside(source: Tensor, edited: Tensor, mask: Tensor) -> bool:
    outside = (mask == 0).expand_as(source)
    return torch.equal(source[outside].view(torch.int32), edited[outside].view(torch.int32))


@pytest.mark.parametrize(
    "options",
    [
        {"words": ["red circle"], "keep": ["blue star"]},
        {},
        {"words": ["star"], "invert": True, "dilate": 0},
        {"look": True},
        {"observe": 0.5, "words": ["circle"], "edit_words": ["green circle"]},
        {"look": True, "words": ["star"], "invert": True},
        {"strength": 0.5, "until": 0.75, "words": ["circle"]},
    ],
    ids=["words", "changed words", "inverted", "looked", "in both", "inverted, looked", "in the middle"],
)
def test_outside_the_mask_the_source_keeps_its_bits(pipe: WanPipeline, options: dict[str, Any]) -> None:
    made = localized_edit(pipe, SOURCE, EDITED, latents=noise(), **options, **CALL)
    assert made.source.shape == made.edited.shape == (1, 16, 2, 8, 8) and made.mask.shape == (1, 1, 2, 8, 8)
    assert set(made.mask.unique().tolist()) == {0.0, 1.0}
    assert same_outside(made.source, made.edited, made.mask)
    inside = made.mask.bool().expand_as(made.source)
    assert (made.source[inside] != made.edited[inside]).float().mean() > 0.9
    # a batch of two may be multiplied in another order
    alone = pipe(SOURCE, latents=noise(), **CALL).frames
    torch.testing.assert_close(made.source, alone, rtol=1e-3, atol=1e-3)
    again = localized_edit(pipe, SOURCE, EDITED, latents=noise(), **options, **CALL)
    assert torch.equal(made.edited, again.edited)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipe.transformer.modules())


def test_the_mask_is_that_of_the_words(pipe: WanPipeline) -> None:
    given = {"words": ["red", "circle"], "keep": ["star"], "latents": noise(), "look": True, **CALL}
    made = localized_edit(pipe, SOURCE, EDITED, **given)
    options = {"prompt": SOURCE, "own_tokens": True, "max_sequence_length": 48}
    with AttentionCapture(pipe, [["red", "circle"], "star"], **options) as capture:
        latents = pipe(SOURCE, latents=noise(), **CALL).frames
    assert torch.equal(made.maps[0], capture.maps()[0])
    assert torch.equal(made.mask, attention_mask(capture.maps(), latents, dilate=1))
    # what is kept is not edited: with the words the other way round, the masks are others
    other = localized_edit(pipe, SOURCE, EDITED, **given | {"words": ["star"], "keep": ["red", "circle"]})
    assert not torch.equal(made.mask, other.mask)


def test_a_batch_is_its_clips(pipe: WanPipeline) -> None:
    prompts = [SOURCE, "a white square on a dark background"]
    edits, words, keep = [EDITED, "a white star on a dark background"], [["circle"], ["white square"]], [["star"], []]
    both = localized_edit(pipe, prompts, edits, words=words, keep=keep, latents=noise(2), **CALL)
    for i in range(2):
        alone = localized_edit(
            pipe, prompts[i], edits[i], words=words[i], keep=keep[i], latents=noise(2)[i : i + 1], **CALL
        )
        # a batch of four may be multiplied in another order than one of two
        torch.testing.assert_close(both.maps[i], alone.maps[0], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(both.edited[i : i + 1], alone.edited, rtol=1e-2, atol=1e-2)


def test_a_mask_of_the_users_own(pipe: WanPipeline) -> None:
    mask = torch.zeros(1, 1, 1, 8, 8)
    mask[..., 2:5, 3:] = 1
    made = localized_edit(pipe, SOURCE, EDITED, mask=mask, latents=noise(), **CALL)
    assert torch.equal(made.mask, mask) and made.maps == []
    assert same_outside(made.source, made.edited, mask)
    seen: list[int] = []

    def late(step: int, source: Tensor, edited: Tensor) -> Tensor | None:
        seen.append(step)
        return mask if step >= 2 else None

    made = localized_edit(pipe, SOURCE, EDITED, mask=late, latents=noise(), **CALL)
    assert seen == [0, 1, 2, 3] and torch.equal(made.mask, mask)
    with pytest.raises(ValueError, match="mask must be known by the last step"):
        localized_edit(pipe, SOURCE, EDITED, mask=lambda *_: None, latents=noise(), **CALL)


def test_directions_move_the_edit_alone(pipe: WanPipeline) -> None:
    mask = torch.zeros(1, 1, 1, 8, 8)
    mask[..., :4] = 1
    direction = torch.ones(1, 1, 16, 1, 1, 1)
    call = {**CALL, "num_inference_steps": 1}
    plain = localized_edit(pipe, SOURCE, SOURCE, mask=mask, latents=noise(), **call)
    moved = localized_edit(pipe, SOURCE, directions=direction, strengths=[0.5], mask=mask, latents=noise(), **call)
    assert torch.equal(moved.source, plain.source)
    expected = latentfast.blend(plain.source, latentfast.edit(plain.edited, direction, [0.5]), mask)
    torch.testing.assert_close(moved.edited, expected)


def test_the_pipelines_own_frames_and_callback(pipe: WanPipeline) -> None:
    steps: list[tuple[int, tuple[int, ...]]] = []

    def own(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append((step, tuple(tensors["latents"].shape)))
        return {}

    call = {**CALL, "num_inference_steps": 2, "output_type": "pt", "callback_on_step_end": own}
    generator = torch.Generator().manual_seed(3)
    made = localized_edit(pipe, SOURCE, EDITED, generator=generator, look=True, **call)
    assert made.frames.shape == (2, 5, 3, 64, 64)
    assert steps == [(0, (1, 16, 2, 8, 8)), (1, (1, 16, 2, 8, 8)), (0, (2, 16, 2, 8, 8)), (1, (2, 16, 2, 8, 8))]


def test_the_edit_acts_in_its_range_of_steps() -> None:
    source, edited, mask = torch.zeros(1, 1, 1, 1, 2), torch.ones(1, 1, 1, 1, 2), torch.tensor([1.0, 0.0])
    confined = SideBySide(lambda *_: mask, 10, span=(0.2, 0.6))
    results = [confined(step, torch.cat([source, edited]))[1].flatten().tolist() for step in range(10)]
    assert results == [[0, 0]] * 2 + [[1, 0]] * 4 + [[1, 1]] * 3 + [[1, 0]]


def test_frames_before_channels_and_guidance_in_one_batch(pipe: WanPipeline) -> None:
    torch.manual_seed(0)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=4,
        text_embed_dim=pipe.text_encoder.config.d_model, num_layers=2, sample_width=8, sample_height=8,
        sample_frames=9, patch_size=2, temporal_compression_ratio=4, max_text_seq_length=16,
    ).eval()  # fmt: skip
    vae = AutoencoderKLCogVideoX(
        in_channels=3, out_channels=3, latent_channels=4, layers_per_block=1, norm_num_groups=2,
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8), temporal_compression_ratio=4,
    )  # fmt: skip
    cog = CogVideoXPipeline(
        tokenizer=pipe.tokenizer, text_encoder=pipe.text_encoder, vae=vae, transformer=transformer,
        scheduler=CogVideoXDDIMScheduler(),
    )  # fmt: skip
    cog.set_progress_bar_config(disable=True)
    call = {
        "height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 3, "guidance_scale": 4.0,
        "max_sequence_length": 16, "output_type": "latent",
    }  # fmt: skip
    latents = torch.randn((1, 3, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    made = localized_edit(cog, SOURCE, EDITED, words=["circle"], keep=["star"], latents=latents, **call)
    assert made.edited.shape == (1, 3, 4, 8, 8) and made.mask.shape == (1, 3, 1, 8, 8)
    assert made.maps[0].shape == (2, 3, 4, 4)
    assert same_outside(made.source, made.edited, made.mask)
    torch.testing.assert_close(made.source, cog(SOURCE, latents=latents, **call).frames, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (ValueError, "edit_prompt or directions", {"edit_prompt": None}),
        (ValueError, "as many clips as prompt, got 2 and 1", {"edit_prompt": [EDITED, EDITED]}),
        (ValueError, "'square' is not among its words: a, red, circle", {"words": ["square"]}),
        (ValueError, "words must name what is edited", {"edit_prompt": SOURCE}),
        (ValueError, "strength must be above 0", {"strength": 0.0}),
        (ValueError, "until must be above 0", {"until": 1.5}),
        (ValueError, "until must be after the edit begins, at 0.75", {"strength": 0.25, "until": 0.5}),
        (ValueError, "observe must be in", {"observe": 1.0}),
        (ValueError, "dilate must not be negative", {"dilate": -1}),
        (ValueError, "background must be above 0", {"background": 0.0}),
        (ValueError, "latents must be of 1 clip or of 1, got 2", {"latents": noise(2)}),
        (TypeError, "words must be a list of words, got 'red'", {"words": "red"}),
        (ValueError, "for each of 1 clips, got 2", {"words": [["red"], ["blue"]]}),
    ],
)
def test_what_is_refused(pipe: WanPipeline, error: type[Exception], match: str, options: dict[str, Any]) -> None:
    given = {"edit_prompt": EDITED, "latents": noise(), **CALL, "num_inference_steps": 1, **options}
    with pytest.raises(error, match=match):
        localized_edit(pipe, SOURCE, **given)


def test_the_clean_latents_of_a_step(pipe: WanPipeline) -> None:
    clean, drawn = torch.randn((2, 1, 16, 2, 8, 8), generator=torch.Generator().manual_seed(0))
    pipe.scheduler.set_timesteps(10)
    levels = pipe.scheduler.sigmas
    for step in (0, 5, 9):
        before, after = (s * drawn + (1 - s) * clean for s in levels[step : step + 2])
        # the difference of two noise levels of a tenth takes two digits of float32
        torch.testing.assert_close(clean_estimate(pipe, step, before, after), clean, rtol=1e-4, atol=1e-4)
    other = type("Other", (), {"scheduler": CogVideoXDDIMScheduler()})()
    assert clean_estimate(other, 0, drawn, clean) is clean


def test_words_that_only_the_edit_has(pipe: WanPipeline) -> None:
    added = localized_edit(pipe, "a red circle", "a red circle and a blue star", latents=noise(), **CALL)
    assert same_outside(added.source, added.edited, added.mask)
    with pytest.raises(ValueError, match="words must name what is edited: 'a red circle' has no word"):
        localized_edit(pipe, "a red circle", "a red circle and a blue star", look=True, latents=noise(), **CALL)


# ------------------------------------------------------------------------------------------------------------ masks


def two_squares() -> tuple[Tensor, Tensor, Callable[[int], Tensor]]:
    """Latents with two squares of their own colours, and maps on a grid half as fine that only say where about."""
    generator = torch.Generator().manual_seed(0)
    latents = 0.1 * torch.randn((1, 4, 3, 16, 16), generator=generator)
    latents[:, 0, :, 3:7, 3:6] += 4
    latents[:, 1, :, 9:14, 8:13] += 4
    maps = torch.full((1, 2, 3, 4, 4), 0.1)
    maps[:, 0, :, 0:2, 0:2] = torch.tensor([[0.4, 0.3], [0.9, 0.5]])
    maps[:, 1, :, 2:4, 2:4] = torch.tensor([[0.9, 0.6], [0.5, 0.4]])
    maps[:, 0, :, 2, 2] = 0.5  # the first word is paid some attention at the second square, too

    def truth(which: int) -> Tensor:
        mask = torch.zeros(1, 1, 3, 16, 16)
        (mask[..., 3:7, 3:6] if which == 0 else mask[..., 9:14, 8:13]).fill_(1)
        return mask

    return latents, maps, truth


def test_masks_have_the_outlines_of_the_latents() -> None:
    latents, maps, truth = two_squares()
    assert torch.equal(attention_mask(maps, latents), truth(0))
    assert torch.equal(attention_mask(maps.flip(1), latents), truth(1))
    assert torch.equal(attention_mask(maps, latents, dilate=1), dilated(truth(0), 1))
    # a margin doesn't reach into what else is named
    both = attention_mask(maps, latents, dilate=5)
    assert (both * truth(1)).sum() == 0 and torch.equal(both, dilated(truth(0), 5) * (1 - truth(1)))
    # one sample doesn't see another
    other = torch.cat([latents, latents.flip(4)]), torch.cat([maps, maps.flip(4)])
    assert torch.equal(attention_mask(other[1], other[0])[:1], truth(0))
    # the enlarged map alone is no such mask at any height
    plain = latentfast.heatmap_to_mask(maps.flatten(2), (3, 4, 4), (3, 16, 16))[:, :1]
    assert not any(torch.equal((plain > height / 20).float(), truth(0)) for height in range(20))


def test_the_attention_says_whose_a_cell_is() -> None:
    latents, maps, truth = two_squares()
    latents[:, :, :, 5:7, 3:6] = latents[:, :, :, 10:12, 9:12]  # a part of the first square has the second's colour
    maps[:, 1, :, 1, 0:2] = 0.4  # and the second word some attention there
    found, other = attention_mask(maps, latents), attention_mask(maps.flip(1), latents)
    assert torch.equal(found * truth(0), truth(0)) and (found * truth(1)).sum() == 0
    assert torch.equal(other * truth(1), truth(1)) and (other * truth(0)).sum() == 0


def test_sharpened_maps_are_probabilities() -> None:
    latents, maps, _ = two_squares()
    large = latentfast.heatmap_to_mask(maps.flatten(2), (3, 4, 4), (3, 16, 16))
    sharp = sharpen(large, latents)
    assert sharp.shape == large.shape and sharp.dtype == torch.float32
    assert sharp.min() >= 0 and sharp.sum(1).max() <= 1 + 1e-6
    assert sharpen(large, latents, background=1.0).sum() < sharpen(large, latents, background=0.3).sum()
    # latents that say nothing leave the maps' own word
    flat = sharpen(large, torch.zeros_like(latents))
    assert flat.isfinite().all() and (flat[:, 0] > 0.5).any()


def test_masks_that_are_refused() -> None:
    latents, maps, _ = two_squares()
    with pytest.raises(ValueError, match="of the same clips"):
        attention_mask(maps[0], latents)
    with pytest.raises(ValueError, match="of the same clips and size"):
        sharpen(maps, latents)
