"""Writes the model card from what training and evaluation measured; no figure in it is typed by hand."""

from __future__ import annotations

import json
from pathlib import Path

FACTORS = ("shape", "colour", "size", "motion", "background", "light", "count")

TEXT = """# Model card: the embedded model of `latentfast.tiny`

A text-to-video latent diffusion model in diffusers' `WanPipeline` format, trained from nothing by this project on
rendered clips, so that everything that works with it works with the real Wan weights. It exists for tests,
demonstrations and measurements without a network or a GPU. It knows one or two flat shapes before a plain background,
and nothing else.

| part | class | parameters |
|---|---|---|
| autoencoder | `AutoencoderKLWan`, 8x in space, 4x in time, 16 channels | {vae:.2f}M |
| transformer | `WanTransformer3DModel`, 8 layers of width 256 | {transformer:.2f}M |
| text encoder | `UMT5EncoderModel`, 3 layers of width 128, one token a word | {text:.2f}M |
| judge | `latentfast.tiny.judge.JudgeNet`, reads clips back; not part of the pipeline | {judge:.2f}M |

Weights: float16 safetensors, {megabytes:.1f} MB in all. Clips: 128 x 128, 25 frames.

## What it was trained on

`latentfast.tiny.render`: shape (circle, square, triangle, star), colour (8), size (2) and motion (6) of one or two
shapes, background (4), light (2). Two shapes of a scene differ in shape or colour. Captions are in free word order with
words left out (`latentfast.tiny.caption`). Vocabulary: {words} words; others are read as unknown.

| stage | steps | result |
|---|---|---|
| autoencoder | {vae_steps} | {psnr:.2f} dB, see below |
| judge | {judge_steps} | see below |
| text encoder and transformer | {steps}, {seconds:.0f} s | loss {loss:.4f} |
{more}
The text encoder first learns alone which words describe the same shape (`tools/train_tiny/binding.py`); while the
transformer learns, the tokens of a middle block also have to tell what stands where (`grounding.py`).

Repeat it: `python -m tools.train_tiny all --seed {seed}{cut}` (by time), or with `--vae-steps {vae_steps}
--judge-steps {judge_steps} --steps {steps}` for as many steps on a slower or faster device.
{again}
## What was measured

On {device}, torch {torch}, by `python -m tools.train_tiny evaluate`: diffusers' own pipeline, float16 weights,
float32 arithmetic, {settings}, scenes and prompts
from seeds that training does not use. {shipped}A factor of a clip with two shapes is right if it is right for both.

Reconstruction of {clips} held-out clips: **{psnr:.2f} dB** PSNR (of the mean error), the worst clip {worst:.2f} dB.

Prompts in free word order that mention every factor:

{table}

"Shape and colour" is right if each shape has its own colour; "all" is every factor at once.

{cpu}

## The judge

On 256 rendered clips of each kind that it was not trained on:

{judge_table}

## Guidance and scheduler

{sweep_prompts} validation prompts of each kind a row; the share that is right:

{sweep}

## Limits

- Captions that leave a factor out let the model choose it. Words outside the vocabulary are ignored or mislead it.
- Prompts are padded as the pipeline does by default (`max_sequence_length=512`); 48 to 512 were trained on.
- Other sizes or numbers of frames than 128 x 128 x 25 run, but were not trained on.
"""


def percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def table(rows: dict[str, dict[str, float]], columns: tuple[str, ...]) -> str:
    names = {"binding": "shape and colour", "mask_iou": "mask IoU"}
    lines = ["| | " + " | ".join(names.get(c, c) for c in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        cells = [f"{row[c]:.3f}" if c == "mask_iou" else percent(row[c]) for c in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write(folder: Path) -> str:
    """The card's text, from ``training.json``, ``metrics.json`` and the sizes of the weights in ``folder``."""
    from latentfast.tiny.caption import VOCABULARY
    from latentfast.tiny.pipeline import recommended

    training = json.loads((folder / "training.json").read_text())
    metrics = json.loads((folder / "metrics.json").read_text())
    measured, advised = metrics["recommended"], recommended(folder / "weights")
    shipped = "These are the `RECOMMENDED` settings. "
    if measured != advised:
        other = ", ".join(f"{k}={v}" for k, v in advised.items() if measured.get(k) != v)
        shipped = f"**`RECOMMENDED` has {other}** instead, chosen on the validation prompts below. "
    first = training["transformer"]
    more = again = ""
    if "continuation" in training:
        c = training["continuation"]
        more = f"| the same, continued | {c['steps']} of batch {c['batch']}, {c['seconds']:.0f} s "
        more += f"on {c['devices']} GPU{'s' * (c['devices'] > 1)} | loss {c['loss']:.4f} |\n"
        options = " ".join(f"--{k.replace('_', '-')} {v}" for k, v in c["recipe"].items())
        again = (
            f"Then `python -m tools.train_tiny transformer --start out/tiny/transformer.pt --seed {c.get('seed', 0)} "
        )
        again += f"--steps {c['steps']}\n{options}`.\n"
        if "stopped_of_seconds" in first:
            again += f"The first run was planned for {first['stopped_of_seconds']} s and lost its machine after "
            again += f"{first['seconds']:.0f}, at a high rate still; the second one started\nfrom its averaged weights "
            again += "and let the rate fall to zero. One run of the whole length was not tried.\n"
    size = sum(p.stat().st_size for p in (folder / "weights").rglob("*") if p.is_file())
    columns = (*FACTORS, "binding", "all")
    rows = {
        f"{metrics[k]['prompts']} prompts, {n}": metrics[k]
        for k, n in (("one_shape", "one shape"), ("two_shapes", "two shapes"))
    }
    if "one_shape_length_64" in metrics:
        rows["one shape, padded to 64"] = metrics["one_shape_length_64"]
    cpu = "Time on a CPU: not measured yet (`python -m tools.train_tiny cpu`)."
    if "cpu" in metrics:
        c = metrics["cpu"]
        cpu = f"Prompt to pixels of one clip on {c['threads']} CPU threads, float32, torch {c['torch']}: "
        cpu += f"**{c['seconds']:.1f} s**."
    sweep = [
        "| scheduler | guidance | one shape, all | two shapes, shape and colour | two shapes, all |",
        "|---|---|---|---|---|",
    ]
    for row in metrics.get("sweep", {}).get("rows", ()):
        one, two = row["one_shape"], row["two_shapes"]
        cells = [percent(one["all"]), percent(two["binding"]), percent(two["all"])]
        sweep.append(f"| {row['scheduler']} | {row['guidance_scale']} | " + " | ".join(cells) + " |")
    judge = {n: training["judge"][k] for k, n in (("one_shape", "one shape"), ("two_shapes", "two shapes"))}
    return TEXT.format(
        vae=training["vae"]["million_parameters"],
        transformer=training["transformer"]["million_parameters"],
        text=training["transformer"]["text_encoder_million_parameters"],
        judge=training["judge"]["million_parameters"],
        megabytes=size / 1e6,
        words=len(VOCABULARY),
        vae_steps=training["vae"]["steps"],
        judge_steps=training["judge"]["steps"],
        seed=first.get("seed", 0),
        cut=f" --hold {first['recipe']['hold']} --seconds {first['stopped_of_seconds']}"
        if "stopped_of_seconds" in first
        else "",
        steps=training["transformer"]["steps"],
        seconds=training["transformer"]["seconds"],
        loss=training["transformer"]["loss"],
        device=metrics["measured_on"]["device"],
        torch=metrics["measured_on"]["torch"],
        settings=", ".join(f"{k}={v}" for k, v in measured.items()),
        shipped=shipped,
        more=more,
        again=again,
        clips=metrics["reconstruction"]["clips"],
        psnr=metrics["reconstruction"]["psnr_db"],
        worst=metrics["reconstruction"]["worst_clip_db"],
        table=table(rows, columns),
        cpu=cpu,
        judge_table=table(judge, (*columns, "mask_iou")),
        sweep_prompts=metrics.get("sweep", {}).get("prompts", 0),
        sweep="\n".join(sweep),
    )
