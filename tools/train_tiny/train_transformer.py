"""Trains the text encoder and the transformer together, by flow matching on latents of rendered clips.

The pipeline pads prompts with zero vectors to ``max_sequence_length`` (512 unless told otherwise;
``encode_prompt`` alone: 226), and Wan's cross-attention has no mask, so the number of zeros is part of what the
model sees. All those keys are equal: here they are one key whose logit carries the logarithm of their number,
and that number is drawn at random, 512 half of the time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor, nn
from transformers import UMT5EncoderModel

from latentfast.tiny.caption import PAD, VOCABULARY
from tools.train_tiny.binding import Binding
from tools.train_tiny.common import Budget, Log, MuonAdamW, Snapshot, amp, captured, millions, synchronize
from tools.train_tiny.grounding import Grounding, Tap
from tools.train_tiny.models import FLOW_SHIFT, make_text_encoder, make_transformer
from tools.train_tiny.pool import Pool
from tools.train_tiny.world import GradientMean, World

MUON_RATE, DECAY, EMA = 3.0, 0.01, 0.999
BATCH = 64
TEXT_BATCH, TEXT_RATE = 256, 1e-3
KEYS, LONGEST = 48, 512  # keys of the cross-attention while training; the largest padded length they stand for
REFRESH, REFRESH_EVERY = 64, 25  # clips drawn anew, and the steps between
CHECK_EVERY, SAVE_EVERY = 20, 60  # steps between looks at the clock and the loss; seconds between checkpoints
EMBEDDINGS = ("shared", "embed", "patch_embedding", "proj_out", "scale_shift", "time_embedder", "relative", "probe")


@dataclass(frozen=True)
class Recipe:
    """What one run may choose; each field is an option of the command line."""

    rate: float = field(default=1e-3, metadata={"help": "peak learning rate"})
    warmup: int = field(default=150, metadata={"help": "steps up to it"})
    hold: float = field(default=0.3, metadata={"help": "share of the budget at it, before a cosine to zero"})
    two_shapes: float = field(default=0.65, metadata={"help": "share of the scenes that have two shapes"})
    complete: float = field(default=0.6, metadata={"help": "share of the captions that leave no factor out"})
    sampler_levels: float = field(default=0.2, metadata={"help": "share of the noise levels spread as the sampler's"})
    binding: float = field(default=0.1, metadata={"help": "weight of the text encoder's auxiliary loss"})
    text_steps: int = field(default=2000, metadata={"help": "steps on that loss alone, before the transformer's first"})
    grounding: float = field(default=0.05, metadata={"help": "weight of the transformer's auxiliary loss, at the peak"})
    scenes: int = field(default=131072, metadata={"help": "scenes with captions, of each process"})
    clips: int = field(default=16384, metadata={"help": "latents held at a time, by each process"})


class Attention:
    """Wan's attention, both kinds. One object serves all blocks.

    Cross-attention gets a bias on each key: the last key stands for many equal ones. The rotation of queries and keys
    is one expression; the library's two strided writes into an empty tensor took a fifth of a compiled training step.
    """

    def __init__(self) -> None:
        self.bias: Tensor | None = None  # (N, 1, 1, KEYS)

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None) -> Tensor:
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        heads = (attn.heads, -1)
        q = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, heads)
        k = attn.norm_k(attn.to_k(source)).unflatten(2, heads)
        v = attn.to_v(source).unflatten(2, heads)
        if rotary_emb is not None:
            q, k = rotated(q, *rotary_emb), rotated(k, *rotary_emb)
        bias = None if encoder_hidden_states is None else self.bias.to(q.dtype)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=bias)
        return attn.to_out[0](out.transpose(1, 2).flatten(2).type_as(q))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of neighbouring pairs; ``cos`` and ``sin`` have each value twice."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-second, first], -1).flatten(-2)
    return (x * cos + turned * sin).type_as(x)


def key_bias(total: Tensor) -> Tensor:
    """Bias (N, 1, 1, KEYS) for prompts padded to ``total`` (N,) positions, all at least ``KEYS``."""
    bias = torch.zeros(len(total), KEYS, device=total.device)
    bias[:, -1] = torch.log(total - (KEYS - 1))
    return bias.view(-1, 1, 1, KEYS)


def embed(text_encoder: UMT5EncoderModel, ids: Tensor) -> Tensor:
    """Embeddings (N, KEYS, D) of token ids (N, L), zero where a prompt has ended, as the pipeline makes them."""
    there = ids != VOCABULARY.index(PAD)
    # Four dimensions: the library takes such a mask as it is, without reading it back on the host.
    mask = torch.where(there, 0.0, torch.finfo(torch.float32).min)[:, None, None]
    states = text_encoder(ids, mask).last_hidden_state * there[..., None]
    return F.pad(states, (0, 0, 0, KEYS - ids.shape[1]))


def noise_levels(n: int, device: str, sampler_levels: float = Recipe.sampler_levels) -> Tensor:
    """Logit-normal with the sampler's shift; a fifth is uniform, so that low noise, where edges form, is not
    starved. A share of ``sampler_levels`` is spread as the sampler's own steps are, a fifth of which lie above
    0.92, where it is decided what stands where and logit-normal levels are rare.
    """
    u = torch.sigmoid(torch.randn(n, device=device))
    if sampler_levels:
        u = torch.where(torch.rand(n, device=device) < sampler_levels, torch.rand(n, device=device), u)
    shifted = FLOW_SHIFT * u / (1 + (FLOW_SHIFT - 1) * u)
    return torch.where(torch.rand(n, device=device) < 0.2, torch.rand(n, device=device), shifted)


def teach_text(
    text_encoder: UMT5EncoderModel, probe: Binding, pool: Pool, steps: int, batch: int, log: Log, device: str
) -> None:
    """``steps`` on the auxiliary loss alone, hundreds of times cheaper than the transformer's, which then meets words
    that are bound already: 99.8% of the attributes are read right after 800 steps of 64 captions, against 78% when a
    transformer had already settled on embeddings from which they cannot be told.
    """
    began = time.time()
    rate = torch.full((), 1e-5, device=device)
    named = [(f"text.{n}", p) for n, p in text_encoder.named_parameters()]
    named += [(f"probe.{n}", p) for n, p in probe.named_parameters()]
    optimizer = MuonAdamW(named, rate, muon_rate=MUON_RATE, decay=DECAY, adamw_names=EMBEDDINGS)

    def step() -> Tensor:
        scenes = torch.randint(0, len(pool.table), (batch,), device=device)
        ids = pool.ids[scenes, torch.randint(0, pool.ids.shape[1], (batch,), device=device)].long()
        with amp(device):
            text = embed(text_encoder, ids)
        told = probe(text, ids, pool.table[scenes])
        optimizer.zero_grad()
        told[0].backward()
        optimizer.step()
        return told.detach()

    run = captured(step, log, device)
    for i in range(steps):
        rate.fill_(TEXT_RATE * min(1, (i + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * i / steps)) + 1e-6)
        result = run()
        if i % max(1, steps // 4) == 0 or i == steps - 1:
            loss, right = result.tolist()
            log(f"text encoder: step {i}, loss {loss:.3f}, binding read {100 * right:.1f}%")
    log(f"text encoder: {steps} steps in {time.time() - began:.1f} s")


def train(
    vae: AutoencoderKLWan,
    budget: Budget,
    log: Log,
    device: str,
    *,
    recipe: Recipe,
    world: World,
    seed: int = 0,
    start: Path | None = None,
    compile_blocks: bool = True,
    smoke: bool = False,
) -> None:
    """Trains, and saves the averaged weights to ``transformer.pt`` every minute and at the end.

    ``start`` is such a file, or a pipeline's folder, to go on from. Each process of ``world`` has its own pool and
    batch; the weights stay the same in all.
    """
    began = time.time()
    if smoke:
        recipe = replace(recipe, scenes=64, clips=16, text_steps=min(recipe.text_steps, 20))
    batch = 4 if smoke else BATCH
    if start:
        text_encoder, transformer = (m.train() for m in load(start, device, smoke))
    else:
        text_encoder, transformer = make_text_encoder(smoke).to(device), make_transformer(smoke).to(device)
    probe = Binding(text_encoder.config.d_model).to(device)
    ground = Grounding(transformer.config.num_attention_heads * transformer.config.attention_head_dim).to(device)
    seed += 1000 * world.rank
    torch.manual_seed(seed)  # from here on each process draws its own scenes and noise
    pool = Pool(
        vae,
        scenes=recipe.scenes,
        clips=recipe.clips,
        two_shapes=recipe.two_shapes,
        complete=recipe.complete,
        seed=seed,
        device=device,
        smoke=smoke,
    )
    synchronize(device)
    log(
        f"transformer: {millions(transformer):.2f}M, text encoder {millions(text_encoder):.2f}M; {world.size} x a pool "
        f"of {recipe.clips} latents, {recipe.scenes} scenes in {time.time() - began:.1f} s"
    )
    named = [(f"text.{n}", p) for n, p in text_encoder.named_parameters()]
    named += [(f"video.{n}", p) for n, p in transformer.named_parameters()]
    released = len(named)
    if recipe.text_steps and not start:  # a trained transformer would no longer know the words
        teach_text(text_encoder, probe, pool, recipe.text_steps, 16 if smoke else TEXT_BATCH, log, device)
    if recipe.binding:
        named += [(f"probe.binding.{n}", p) for n, p in probe.named_parameters()]
    if recipe.grounding:
        named += [(f"probe.grounding.{n}", p) for n, p in ground.named_parameters()]
    params = [p for _, p in named]
    world.copy_from_first(params)
    rate, blend = torch.full((), 1e-5, device=device), torch.ones((), device=device)
    grounding = torch.full((), recipe.grounding, device=device)
    optimizer = MuonAdamW(named, rate, muon_rate=MUON_RATE, decay=DECAY, adamw_names=EMBEDDINGS)
    average = [p.detach().clone() for p in params[:released]]
    attention = Attention()
    for block in transformer.blocks:
        block.attn1.processor = block.attn2.processor = attention
    attention.bias = torch.zeros(batch, 1, 1, KEYS, device=device)

    def gradients() -> Tensor:
        x, cover, ids, table = pool.sample(batch)
        noise, level = torch.randn_like(x), noise_levels(batch, device, recipe.sampler_levels)
        s = level.view(-1, 1, 1, 1, 1)
        shorter = torch.exp(math.log(KEYS) + torch.rand(batch, device=device) * math.log(LONGEST / KEYS))
        attention.bias.copy_(key_bias(torch.where(torch.rand(batch, device=device) < 0.5, LONGEST, shorter)))
        with amp(device):
            text = embed(text_encoder, ids)
            velocity = transformer(
                (1 - s) * x + s * noise, timestep=level * 1000, encoder_hidden_states=text, return_dict=False
            )[0]
        loss = F.mse_loss(velocity.float(), noise - x)
        total, told = loss, [loss.detach()]
        if recipe.binding:
            bound, right = probe(text, ids, table)
            total = loss + recipe.binding * bound
            told.append(right.detach())
        if recipe.grounding:
            total = total + grounding * ground(middle.take(), cover, table)
        optimizer.zero_grad()
        total.backward()
        return torch.stack(told)

    def update() -> Tensor:
        optimizer.step()
        with torch.no_grad():
            torch._foreach_mul_(average, 1 - blend)
            torch._foreach_add_(average, torch._foreach_mul([p.detach() for p in params[:released]], blend))
        return blend

    began = time.time()
    if compile_blocks:
        transformer.compile_repeated_blocks(fullgraph=True)
    index = (len(transformer.blocks) - 1) // 2
    middle = transformer.blocks[index] = Tap(transformer.blocks[index])  # outside of what is compiled
    if compile_blocks:
        try:
            gradients()
            synchronize(device)
        except Exception as e:  # a slower run is better than none
            log("NOT COMPILED, running eagerly:", repr(e)[:800])
            torch.compiler.set_stance("force_eager")
    run = captured_step(gradients, update, params, log, device, world)
    synchronize(device)
    log(f"transformer: compiled and captured in {time.time() - began:.1f} s")

    def save(step: int, final: bool) -> None:
        world.copy_from_first(params)  # equal already, if the devices' arithmetic is; then this changes nothing
        if world.rank:
            return
        state = {n: a.detach().half().cpu() for (n, _), a in zip(named, average, strict=False)}
        path = log.folder / "transformer.pt"
        torch.save({"weights": state, "step": step, "final": final}, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)  # a run cut while writing leaves the last whole one

    safe, restarts = Snapshot(params), 0
    budget.restart()
    began = told = saved = time.time()
    step_count, losses, recent = 0, [], [math.nan]
    while True:
        if step_count % CHECK_EVERY == 0:
            synchronize(device)
            broken = bool(losses) and not math.isfinite(losses[-1][0].item())
            ages = (time.time() - told, time.time() - saved)
            fraction, broken, quiet, unsaved = world.largest([budget.fraction(step_count), float(broken), *ages])
            if broken:
                restarts += 1
                log(f"transformer: DIVERGED at step {step_count}; back to the last good weights, half the rate")
                if restarts > 5:
                    raise RuntimeError("the transformer's training diverged six times")
                safe.restore()
                for a, p in zip(average, params, strict=False):
                    a.copy_(p.detach())
                optimizer.reset()
                losses.clear()
            elif step_count % 1000 == 0:
                safe.take()
            if losses and (quiet > 20 or fraction >= 1):
                told = time.time()
                recent = torch.stack(losses).mean(0).tolist()
                losses.clear()
                pace = 1000 * (told - began) / step_count
                extra = f", binding read {100 * recent[1]:.1f}%" if recipe.binding else ""
                log(
                    f"transformer: step {step_count}, {100 * fraction:.0f}%, loss {recent[0]:.4f}{extra}, "
                    f"{pace:.1f} ms a step"
                )
            if fraction >= 1:
                break
            if unsaved > SAVE_EVERY:
                saved = time.time()
                save(step_count, final=False)
        if step_count % REFRESH_EVERY == REFRESH_EVERY - 1:
            pool.refresh(min(REFRESH, recipe.clips))
        rest = max(0.0, fraction - recipe.hold) / (1 - recipe.hold)
        slope = 0.5 + 0.5 * math.cos(math.pi * rest)
        rate.fill_(recipe.rate * 0.5**restarts * min(1, (step_count + 1) / recipe.warmup) * slope + 1e-6)
        grounding.fill_(recipe.grounding * slope)  # in the end only the clip counts
        blend.fill_(1 - min(EMA, (step_count + 1) / (step_count + 10)))
        losses.append(run().clone())
        step_count += 1
    save(step_count, final=True)
    log.record(
        "continuation" if start else "transformer",
        steps=step_count,
        seconds=time.time() - began,
        loss=recent[0],
        devices=world.size,
        batch=batch * world.size,
        recipe=asdict(recipe),
        million_parameters=millions(transformer),
        text_encoder_million_parameters=millions(text_encoder),
    )


def captured_step(
    gradients: Callable[[], Tensor],
    update: Callable[[], Tensor],
    params: list[nn.Parameter],
    log: Log,
    device: str,
    world: World,
) -> Callable[[], Tensor]:
    """One training step: a single graph for one process, two with the gradients' mean between them for several."""
    if world.size == 1:

        def whole() -> Tensor:
            result = gradients()
            update()
            return result

        return captured(whole, log, device)
    mean = GradientMean(params, world)

    def collect() -> Tensor:
        result = gradients()
        mean.collect()
        return result

    def give() -> Tensor:
        mean.give()
        return update()

    first = captured(collect, log, device)
    if first is collect:
        collect()
    world.wait()
    mean.reduce()  # so that the second one's warm-up moves the weights of all processes alike
    second = captured(give, log, device)

    def run() -> Tensor:
        result = first()
        mean.reduce()
        second()
        return result

    return run


def load(path: Path, device: str, smoke: bool = False) -> tuple[UMT5EncoderModel, WanTransformer3DModel]:
    """Fresh modules, never compiled, with the averaged weights of a checkpoint or of a pipeline's folder."""
    if path.is_dir():
        text_encoder = UMT5EncoderModel.from_pretrained(
            path / "text_encoder", dtype=torch.float32, attn_implementation="eager", local_files_only=True
        )
        transformer = WanTransformer3DModel.from_pretrained(
            path / "transformer", torch_dtype=torch.float32, local_files_only=True
        )
        return text_encoder.to(device).eval(), transformer.to(device).eval()
    weights = torch.load(path, map_location=device)["weights"]
    text_encoder, transformer = make_text_encoder(smoke).to(device), make_transformer(smoke).to(device)
    for prefix, module in (("text.", text_encoder), ("video.", transformer)):
        state = {n.removeprefix(prefix): w.float() for n, w in weights.items() if n.startswith(prefix)}
        result = module.load_state_dict(state, strict=False)
        # Tied copies and constant buffers are not parameters; anything else missing is a mistake.
        missing = [n for n in result.missing_keys if n in dict(module.named_parameters())]
        if missing or result.unexpected_keys:
            raise RuntimeError(f"{path} does not fit the model: missing {missing}, unexpected {result.unexpected_keys}")
    return text_encoder.eval(), transformer.eval()
