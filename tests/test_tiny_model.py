"""The judge on rendered clips, and the embedded pipeline."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

from latentfast.tiny import (
    RECOMMENDED,
    Judge,
    Scene,
    Shape,
    agreement,
    load_pipeline,
    model_path,
    pipeline,
    render,
    scene,
)
from latentfast.tiny.judge import weights_file

pytest.importorskip("diffusers")
needs_judge = pytest.mark.skipif(not weights_file().exists(), reason=f"the judge is not trained: no {weights_file()}")
needs_model = pytest.mark.skipif(
    not (model_path() / "model_index.json").exists(),
    reason=f"the embedded model is not trained: none in {model_path()}",
)


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge()


@needs_judge
@pytest.mark.parametrize("shapes", [1, 2])
def test_judge_reads_rendered_clips(judge: Judge, shapes: int) -> None:
    """The floors are what the judge must hold (97% a factor of one shape, 93% all of two), rounded down to clips."""
    generator = torch.Generator().manual_seed(100 + shapes)
    table = scene.random_table(24, two=float(shapes - 1), generator=generator)
    clips = render(table, generator=generator)
    readings = judge.read(clips.video)
    right = [agreement(s, r.scene) for s, r in zip(scene.from_table(table), readings, strict=True)]
    for factor in right[0]:
        assert sum(r[factor] for r in right) >= (23 if shapes == 1 else 22), factor
    for wanted, reading, r in zip(clips.masks, readings, right, strict=True):
        if r["all"]:
            whole, seen = (wanted.sum(0) > 0.5), (reading.masks.sum(0) > 0.5)
            assert (whole & seen).sum() / (whole | seen).sum() > 0.85


@needs_judge
def test_judge_separates_shapes_of_one_colour(judge: Judge) -> None:
    wanted = Scene((Shape("square", "red", "big", "left"), Shape("circle", "red", "small", "right")), "gray")
    clips = render(wanted, generator=torch.Generator().manual_seed(1))
    reading = judge.read(clips.video)[0]
    assert agreement(wanted, reading.scene)["all"]
    overlap = [(clips.masks[0, k] * reading.masks[k]).sum() / clips.masks[0, k].sum() for k in range(2)]
    assert min(overlap) > 0.8


@needs_judge
def test_judge_refuses_other_sizes(judge: Judge) -> None:
    with pytest.raises(ValueError, match="video must be"):
        judge.read(torch.zeros(1, 3, 5, 64, 64))


def test_agreement_pairs_shapes_and_counts() -> None:
    a, b = Shape("star", "red", "big", "left"), Shape("circle", "blue", "small", "up")
    wanted = Scene((a, b))
    assert all(agreement(wanted, Scene((b, a))).values())
    swapped = Scene((dataclasses.replace(a, colour="blue"), dataclasses.replace(b, colour="red")))
    result = agreement(wanted, swapped)
    assert not result["binding"]
    assert not result["all"]
    assert not any(agreement(wanted, Scene((a,)))[k] for k in ("count", "shape", "colour", "binding", "all"))


@needs_model
def test_pipeline_is_plain_and_makes_the_clip_asked_for(judge: Judge) -> None:
    from diffusers import WanPipeline

    pipe = load_pipeline()
    assert type(pipe) is WanPipeline
    pipe.set_progress_bar_config(disable=True)
    text = "a big red circle moving left on a dark background in bright light"
    clips = [
        pipe(text, **RECOMMENDED, generator=torch.Generator().manual_seed(3), output_type="pt").frames for _ in range(2)
    ]
    assert torch.equal(*clips), "the same seed gives the same clip"
    assert clips[0].shape == (1, 25, 3, 128, 128)
    seen = judge.read(clips[0].movedim(2, 1) * 2 - 1)[0].scene
    assert seen == Scene((Shape("circle", "red", "big", "left"),), "dark", "bright")


@needs_model
@needs_judge
def test_each_of_two_shapes_has_its_own_adjectives(judge: Judge) -> None:
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    text = "a small yellow star moving right and a big blue square moving left on a gray background in bright light"
    clip = pipe(text, **RECOMMENDED, generator=torch.Generator().manual_seed(3), output_type="pt").frames
    wanted = Scene(
        (Shape("star", "yellow", "small", "right"), Shape("square", "blue", "big", "left")), "gray", "bright"
    )
    right = agreement(wanted, judge.read(clip.movedim(2, 1) * 2 - 1)[0].scene)
    assert all(right.values()), right


@needs_model
def test_pipeline_dtype_and_size() -> None:
    pipe = load_pipeline(dtype=torch.bfloat16)
    assert pipe.vae.dtype == pipe.transformer.dtype == torch.bfloat16
    files = [p for p in model_path().rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 24_000_000
    assert max(p.stat().st_size for p in files) <= 15 * 2**20


@needs_model
def test_autoencoder_reconstructs() -> None:
    """38 dB is the model card's floor over many clips; one clip may be a little harder."""
    vae = load_pipeline().vae
    clip = render(Scene((Shape("square", "yellow", "big", "right"),)), generator=torch.Generator().manual_seed(2)).video
    with torch.no_grad():
        got = vae.decode(vae.encode(clip).latent_dist.mode()).sample
    assert -10 * torch.log10((got - clip).square().mean() / 4) > 36


def test_missing_extra_is_one_clear_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)  # what an import of a missing module looks like
    with pytest.raises(ImportError, match=r"pip install 'latentfast\[diffusers\]'"):
        load_pipeline()


def test_missing_weights_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pipeline, "model_path", lambda: tmp_path)
    with pytest.raises(FileNotFoundError, match="the embedded model is missing"):
        load_pipeline()
