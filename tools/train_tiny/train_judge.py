"""Trains the judge on single frames of rendered clips, disturbed the way generated clips are: blurred,
noisy, off in colour.
"""

from __future__ import annotations

import math
import time
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from latentfast.tiny import scene
from latentfast.tiny.judge import Judge, JudgeNet, agreement
from tools.train_tiny.common import Budget, Log, MuonAdamW, amp, captured, millions, synchronize

RATE, WARMUP = 3e-3, 50
VALIDATION_SEED = 777


def disturb(frames: Tensor) -> Tensor:
    """Blur of random strength, gain and offset of each channel, and noise."""
    n, device = len(frames), frames.device
    blurred = F.avg_pool2d(F.pad(frames, (1, 1, 1, 1), mode="replicate"), 3, 1)
    blurred2 = F.avg_pool2d(F.pad(blurred, (1, 1, 1, 1), mode="replicate"), 3, 1)
    pick = torch.rand(n, 1, 1, 1, device=device)
    frames = torch.where(pick < 0.4, frames, torch.where(pick < 0.75, blurred, blurred2))
    gain = 1 + 0.06 * torch.randn(n, 3, 1, 1, device=device)
    offset = 0.03 * torch.randn(n, 3, 1, 1, device=device)
    noise = 0.06 * torch.rand(n, 1, 1, 1, device=device) * torch.randn_like(frames)
    return (frames * gain + offset + noise).clamp(-1, 1)


def labelled_frames(n: int, each: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Frames (n * each, 3, H, W), each pixel's colour (8 = background) and kind of shape (-1 = none), and
    the table's rows.
    """
    table = scene.random_table(n, two=0.6, device=device)
    # Two shapes of one colour have no border in colour: show them more often than chance would.
    same = (torch.rand(n, device=device) < 0.15) & (table[:, 4] >= 0)
    other = (table[:, 0] + torch.randint(1, len(scene.SHAPES), (n,), device=device)) % len(scene.SHAPES)
    table[:, 4] = torch.where(same, other, table[:, 4])
    table[:, 5] = torch.where(same, table[:, 1], table[:, 5])
    clips = scene.draw(table, scene.random_layout(table), times=torch.rand(n, each, device=device))
    back, front = (clips.masks > 0.5).unbind(1)
    column = (n, 1, 1, 1)

    def label(first: Tensor, second: Tensor, none: int) -> Tensor:
        return torch.where(front, second.view(column), torch.where(back, first.view(column), none)).flatten(0, 1)

    colour = label(table[:, 1], table[:, 5], len(scene.COLOURS))
    kind = label(table[:, 0], table[:, 4], -1)
    return clips.video.transpose(1, 2).flatten(0, 1), colour, kind, table.repeat_interleave(each, 0)


def judge_loss(net: JudgeNet, frames: Tensor, colour: Tensor, kind: Tensor, table: Tensor) -> Tensor:
    colours, kinds, frame = net(frames)
    weight = scene.constant((3.0,) * len(scene.COLOURS) + (1.0,), frames.device)  # most pixels are background
    loss = F.cross_entropy(colours, colour, weight)
    inside = kind >= 0
    entropy = F.cross_entropy(kinds, kind.clamp_min(0), reduction="none")
    loss = loss + 0.5 * (entropy * inside).sum() / inside.sum().clamp_min(1)
    for logits, wanted in zip(
        frame.split((4, 2, 2), 1), (table[:, 8], table[:, 9], (table[:, 4] >= 0).long()), strict=True
    ):
        loss = loss + 0.1 * F.cross_entropy(logits, wanted)
    return loss


def train(budget: Budget, log: Log, device: str, smoke: bool = False) -> JudgeNet:
    """Trains, validates on rendered clips not seen, and saves ``judge.safetensors`` in float16."""
    net = JudgeNet().to(device)
    net = net.to(memory_format=torch.channels_last)
    rate = torch.full((), 1e-5, device=device)
    optimizer = MuonAdamW(
        net.named_parameters(), rate, decay=1e-4, betas=(0.9, 0.98), adamw_names=("pixels", "shape", "frame")
    )
    on_gpu = device.startswith("cuda")
    clips = 2 if smoke else 64 if on_gpu else 12  # seven minutes on one CPU core are enough with 12

    def step() -> Tensor:
        frames, colour, kind, table = labelled_frames(clips, 2, device)
        with amp(device) if on_gpu else nullcontext():
            loss = judge_loss(net, disturb(frames), colour, kind, table)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    run = captured(step, log, device)
    synchronize(device)
    budget.restart()
    count, fraction, told, loss = 0, 0.0, time.time(), torch.zeros(())
    while True:
        if count % 10 == 0:
            synchronize(device)
            fraction = budget.fraction(count)
            if count and (time.time() - told > 10 or fraction >= 1):
                told = time.time()
                if not math.isfinite(loss.item()):
                    raise RuntimeError(f"the judge's training diverged at step {count}")
                log(f"judge: step {count}, {100 * fraction:.0f}%, loss {loss.item():.4f}")
            if fraction >= 1:
                break
        rate.fill_(RATE * min(1, (count + 1) / WARMUP) * (0.5 + 0.5 * math.cos(math.pi * fraction)) + 1e-6)
        loss = run()
        count += 1
    state = {k: v.detach().half().cpu().contiguous() for k, v in net.state_dict().items()}
    save_file(state, str(log.folder / "judge.safetensors"))
    net.load_state_dict({k: v.float() for k, v in state.items()})
    log.record(
        "judge", steps=count, million_parameters=millions(net), **validate(net, device, 8 if smoke else 256, log)
    )
    return net


@torch.no_grad()
def validate(net: JudgeNet, device: str, n: int, log: Log) -> dict[str, dict[str, float]]:
    """The share of rendered clips whose factors are read back right, and the masks' mean intersection over
    union.
    """
    judge, result = Judge(net, device), {}
    for name, two in (("one_shape", 0.0), ("two_shapes", 1.0)):
        generator = torch.Generator().manual_seed(VALIDATION_SEED + int(two))
        table = scene.random_table(n, two=two, generator=generator)
        right: list[dict[str, bool]] = []
        overlaps: list[float] = []
        for part in table.split(16):
            clips = scene.render(part, generator=generator, device=device)
            readings = judge.read(clips.video)
            for wanted, mask, reading in zip(scene.from_table(part), clips.masks, readings, strict=True):
                right.append(agreement(wanted, reading.scene))
                overlaps += mask_overlaps(mask, reading.masks, len(wanted.shapes))
        result[name] = share_right(right) | {"mask_iou": sum(overlaps) / len(overlaps)}
        log(f"judge on {n} rendered clips, {name}:", {k: round(v, 3) for k, v in result[name].items()})
    return result


def mask_overlaps(wanted: Tensor, seen: Tensor, shapes: int) -> list[float]:
    """Intersection over union of each shape's mask over the whole clip, in the better of the two orders."""
    wanted, seen = wanted[:shapes] > 0.5, seen > 0.5
    ways = []
    for order in (seen, seen.flip(0)):
        pairs = list(zip(wanted, order, strict=False))
        ways.append([((a & b).sum() / (a | b).sum().clamp_min(1)).item() for a, b in pairs])
    return max(ways, key=sum)


def share_right(right: list[dict[str, bool]]) -> dict[str, float]:
    return {k: sum(r[k] for r in right) / len(right) for k in right[0]}
