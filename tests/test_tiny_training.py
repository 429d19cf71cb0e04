"""What training relies on: the whole-clip walk, the padded cross-attention, the text path, optimizer and kernel."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("diffusers")

from latentfast.tiny import random_scenes
from latentfast.tiny.caption import MAX_TOKENS
from tools.train_tiny import common, models, norm_silu, train_transformer, train_vae, vae_walk
from tools.train_tiny.pool import CAPTIONS, draw_captions


def stirred(module: torch.nn.Module) -> torch.nn.Module:
    """Weights away from their start, where half of the autoencoder's blocks are the identity."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return module.eval()


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 5, 9])
def test_whole_walk_is_the_librarys_chunked_walk(frames: int) -> None:
    torch.manual_seed(frames)
    vae = stirred(models.make_vae(smoke=True))
    clip = torch.rand(2, 3, frames, 32, 32) * 2 - 1
    mean = vae.encode(clip).latent_dist.mean
    # Some thirty convolutions in another order of summation.
    torch.testing.assert_close(vae_walk.encode_mean(vae, clip), mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        vae_walk.decode_raw(vae, mean).clamp(-1, 1), vae.decode(mean).sample, rtol=1e-3, atol=1e-3
    )


@torch.no_grad()
@pytest.mark.parametrize("total", [48, 226, 512])
def test_one_weighted_key_stands_for_all_padding(total: int) -> None:
    torch.manual_seed(0)
    transformer = stirred(models.make_transformer(smoke=True))
    latent, level = torch.randn(2, 16, 2, 4, 4), torch.tensor([300.0, 700.0])
    text = torch.randn(2, train_transformer.KEYS, 128)
    text[0, 10:], text[1, 25:] = 0, 0
    padded = F.pad(text, (0, 0, 0, total - train_transformer.KEYS))
    wanted = transformer(latent, timestep=level, encoder_hidden_states=padded, return_dict=False)[0]
    attention = train_transformer.Attention()
    attention.bias = train_transformer.key_bias(torch.full((2,), float(total)))
    for block in transformer.blocks:
        block.attn1.processor = block.attn2.processor = attention
    got = transformer(latent, timestep=level, encoder_hidden_states=text, return_dict=False)[0]
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_training_embeds_text_as_the_pipeline_does() -> None:
    from diffusers import WanPipeline

    torch.manual_seed(0)
    encoder = models.make_text_encoder(smoke=True).eval()
    tokenizer = models.make_tokenizer()
    pipe = WanPipeline(
        tokenizer, encoder, models.make_vae(True), models.make_scheduler(), models.make_transformer(True)
    )
    texts = ["a red circle and a blue star moving left", ""]
    ids = tokenizer(texts, padding="max_length", max_length=40, return_tensors="pt").input_ids
    wanted = pipe.encode_prompt(texts, do_classifier_free_guidance=False, max_sequence_length=64)[0]
    got = train_transformer.embed(encoder, ids)
    torch.testing.assert_close(got, wanted[:, : train_transformer.KEYS], rtol=1e-4, atol=1e-5)
    assert wanted[:, train_transformer.KEYS :].abs().max() == 0


def test_caption_pool_is_repeatable_and_fits() -> None:
    scenes = random_scenes(200, two=0.6, generator=torch.Generator().manual_seed(0))
    ids = draw_captions(scenes, seed=5, complete=0.4)
    assert torch.equal(ids, draw_captions(scenes, seed=5, complete=0.4))
    assert ids.shape == (200, CAPTIONS, MAX_TOKENS)


def test_training_clips_window_is_a_part_of_a_whole_picture() -> None:
    torch.manual_seed(0)
    video, cover = train_vae.training_clips(6, 9, 32, 64, "cpu")
    assert video.shape == (6, 3, 9, 32, 32)
    assert cover.shape == (6, 1, 9, 32, 32)
    assert (cover[:, 0, 4].amax((1, 2)) > 0.9).all(), "a shape is in the window's middle frame"


def test_muon_brings_singular_values_near_one() -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(common.orthogonalize(torch.randn(3, 40, 24)).float())
    # Five steps of this polynomial end in a band, by design (Jordan 2024): about 0.7 to 1.2.
    assert values.min() > 0.4
    assert values.max() < 1.4


def test_optimizer_fits_a_line_and_its_snapshot_restores() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 32))
    optimizer = common.MuonAdamW(net.named_parameters(), torch.tensor(2e-2))
    assert len(optimizer.groups) == 1, "both matrices go to Muon, the biases to AdamW"
    x = torch.randn(256, 32)
    y = x @ torch.randn(32, 32) / 6
    losses = []
    for step in range(60):
        if step == 40:
            safe = common.Snapshot(optimizer.params)
        loss = F.mse_loss(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    before = [p.detach().clone() for p in net.parameters()]
    safe.restore()
    assert not all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(safe.copy, net.parameters(), strict=True))


def test_norm_silu_reference_is_the_librarys_norm() -> None:
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm

    torch.manual_seed(0)
    norm = WanRMS_norm(24, images=False)
    torch.nn.init.uniform_(norm.gamma, 0.5, 1.5)
    x = torch.randn(2, 24, 3, 4, 4)
    got = norm_silu.reference(x.movedim(1, -1), norm.gamma.view(-1)).movedim(-1, 1)
    torch.testing.assert_close(got, F.silu(norm(x)), rtol=1e-5, atol=1e-5)


def test_norm_silu_kernel() -> None:
    """On a machine without a GPU in Triton's interpreter, which the suite switches on."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert norm_silu.kernel_error(device) < 1e-5  # float32 in another order of summation
