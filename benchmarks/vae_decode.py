"""Wan's VAE in tiles, diffusers' class and ours: the seams alone, and a whole decode with CUDA graphs.

For the seams a module takes the decoder's place that returns ready frames, so that a decode is nothing but cutting,
putting together, and those calls; what the calls take alone is measured beside it. The whole decode has the published
VAE's shape and random weights, which take as long as trained ones.
"""

import copy
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from latentfast.benchmarks.harness import percentiles, synchronize
from latentfast.benchmarks.rows import Environment, environment
from latentfast.benchmarks.table import headed, number

#: Latents (C, T, H, W): 720p and 81 frames, 480p and 17; what a CPU does in seconds; a smoke run's.
SEAMS = {"cuda": (16, 21, 90, 160), "cpu": (16, 3, 60, 104), "quick": (16, 2, 14, 13)}
DECODE = {"cuda": (16, 5, 60, 104), "cpu": (16, 2, 14, 13), "quick": (16, 2, 9, 8)}
#: 256x256 pixels and 17 frames: where the host is what takes longest.
SMALL_DECODE = (16, 5, 32, 32)
#: Elements that the ready frames are cut from: in bf16 more bytes than a GPU's L2 holds.
POOL = 1 << 26
#: What the host calls to start something on the device.
_STARTS = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cudaMemcpy", "cudaMemset")


@dataclass(frozen=True)
class Way:
    """One way to decode: milliseconds as [p20, p50, p80] from the call until the device is done.

    `device_ms`: what the device was busy for; `launches`: how often the host started something there; `reserved_mib`:
    the most memory that torch held at once, beyond what it held with the models alone. None on a CPU.
    """

    name: str
    ms: tuple[float, float, float]
    device_ms: float | None
    launches: int | None
    reserved_mib: float | None
    same_bits: bool


@dataclass(frozen=True)
class Part:
    """What was decoded, and each way; the first is diffusers'."""

    name: str
    latents: tuple[int, ...]
    dtype: str
    ways: list[Way]
    #: The calls that are no seams, in both ways: of the module in the decoder's place.
    calls: Way | None = None

    def faster(self, way: Way) -> float:
        """How many times as fast as diffusers'."""
        return self.ways[0].ms[1] / way.ms[1]

    def faster_seams(self, way: Way) -> float | None:
        """The same of the seams, which is what is left without those calls; None where that is nothing."""
        alone = self.calls.ms[1] if self.calls else 0.0
        left = way.ms[1] - alone
        return (self.ways[0].ms[1] - alone) / left if self.calls and left > 0 else None


@dataclass(frozen=True)
class Decodes:
    """What was measured."""

    environment: Environment
    parts: list[Part]
    quick: bool

    @property
    def wrong(self) -> str:
        """What is, in a few words; nothing if all is right."""
        same = all(way.same_bits for part in self.parts for way in part.ways)
        return "" if same else "not the bits of diffusers"

    def to_json(self) -> str:
        """One line, with the factors."""
        data = asdict(self)
        for written, part in zip(data["parts"], self.parts, strict=True):
            for way, measured in zip(written["ways"], part.ways, strict=True):
                way |= {"faster": part.faster(measured), "faster_seams": part.faster_seams(measured)}
        return json.dumps(data)


class ReadyFrames(nn.Module):
    """In a decoder's place: other random frames for every group of every tile, already there."""

    def __init__(self, pool: Tensor):
        super().__init__()
        self.pool, self.calls = pool, 0

    def forward(self, z: Tensor, feat_cache: Any = None, feat_idx: Any = None, first_chunk: bool = False) -> Tensor:
        shape = (z.shape[0], 3, 1 if first_chunk else 4, 8 * z.shape[-2], 8 * z.shape[-1])
        numel = torch.Size(shape).numel()
        begin = self.calls * 64 * 7919 % (self.pool.numel() - numel)
        self.calls += 1
        return self.pool[begin : begin + numel].view(shape)


def measure(device: str, quick: bool = False) -> Decodes:
    """Measure the seams and a decode on a device.

    Args:
        device: "cuda"; or "cpu", where clips are smaller and there are no graphs.
        quick: few tiles, few rounds: checks that everything runs.
    """
    there = torch.device(device)
    with torch.inference_mode():
        size = "quick" if quick else device
        parts = [_seams(there, SEAMS[size], quick), *_decodes(there, DECODE[size], quick)]
    # No floor is taken from these numbers, so no copy rate is measured.
    return Decodes(environment(there, 0.0), parts, quick)


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _seams(device: torch.device, latents: tuple[int, ...], quick: bool) -> Part:
    from diffusers import AutoencoderKLWan

    from latentfast.integrations.diffusers.vaes import accelerate_vae

    dtype = _dtype(device)
    z = torch.randn((1, *latents), device=device, dtype=dtype)
    vae = AutoencoderKLWan(base_dim=4, z_dim=latents[0], dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()
    ready = ReadyFrames(torch.randn(POOL if not quick else POOL >> 4, device=device, dtype=dtype))
    vae.decoder, vae.post_quant_conv = ready, nn.Identity()
    _tile(vae, quick)
    ours = copy.deepcopy(vae)
    ours.decoder = ready
    accelerate_vae(ours)

    def decoded(by: Any) -> Callable[[], Tensor]:
        def call() -> Tensor:
            ready.calls = 0
            return by.decode(z, return_dict=False)[0]

        return call

    def calls() -> Tensor:
        size, stride = vae.tile_sample_min_height // 8, vae.tile_sample_stride_height // 8
        for i in range(0, z.shape[-2], stride):
            for j in range(0, z.shape[-1], stride):
                for k in range(z.shape[2]):
                    last = ready(z[:, :, k : k + 1, i : i + size, j : j + size], first_chunk=k == 0)
        return last

    ways = {"diffusers": decoded(vae), "latentfast": decoded(ours), "calls": calls}
    first, second, alone = _compared(ways, device, 3 if quick else 9)
    return Part("seams alone", latents, str(dtype).removeprefix("torch."), [first, second], alone)


def _decodes(device: torch.device, latents: tuple[int, ...], quick: bool) -> list[Part]:
    from diffusers import AutoencoderKLWan

    from latentfast.integrations.diffusers.vaes import accelerate_vae

    dtype = _dtype(device)
    small = {"base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1} if device.type == "cpu" else {}
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**small).eval().to(device, dtype)
    cases = [("whole clip", latents, False), ("in tiles", latents, True)]
    if device.type == "cuda":
        cases.append(("small whole clip", SMALL_DECODE, False))
    parts = []
    for name, size, tiled in cases:
        z = torch.randn((1, *size), device=device, dtype=dtype)
        ways = {"diffusers": copy.deepcopy(vae), "latentfast": copy.deepcopy(vae)}
        if device.type == "cuda":
            ways["latentfast, CUDA graphs"] = copy.deepcopy(vae)
        for way, by in ways.items():
            if tiled:
                _tile(by, quick)
            if way != "diffusers":
                accelerate_vae(by, cuda_graph="graphs" in way)
        calls = {way: lambda by=by, z=z: by.decode(z, return_dict=False)[0] for way, by in ways.items()}
        compared = _compared(calls, device, 2 if quick else 5)
        parts.append(Part(name, size, str(dtype).removeprefix("torch."), compared))
    return parts


def _tile(vae: Any, quick: bool) -> None:
    if quick:
        vae.enable_tiling(64, 64, 48, 48)
    else:
        vae.enable_tiling()  # 256 pixels every 192


def _compared(ways: dict[str, Callable[[], Tensor]], device: torch.device, rounds: int) -> list[Way]:
    """All ways, interleaved; the first is what the others' bits are compared to."""
    on_gpu = device.type == "cuda"
    expected: Tensor | None = None
    same, reserved, profiles = {}, {}, {}
    if on_gpu:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(device)
    for name, call in ways.items():  # also warms up: algorithms are chosen, graphs recorded
        if on_gpu:
            torch.cuda.empty_cache()
            held = torch.cuda.memory_reserved(device) - before  # by other ways' graphs, and what is compared to
            torch.cuda.reset_peak_memory_stats(device)
        result = call()
        if on_gpu:
            result = call()
            reserved[name] = (torch.cuda.max_memory_reserved(device) - before - held) / 2**20
            profiles[name] = profiled(call)
        expected = result if expected is None else expected
        same[name] = torch.equal(result, expected)
    del result, expected
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, call in ways.items():
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            times[name].append((time.perf_counter() - start) * 1e3)
    return [
        Way(name, percentiles(times[name]), *profiles.get(name, (None, None)), reserved.get(name), same[name])
        for name in ways
    ]


def profiled(call: Callable[[], Any]) -> tuple[float, int]:
    """Milliseconds that the GPU was busy with a call, and how often the host started something there."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        call()
        torch.cuda.synchronize()
    events = found.key_averages()
    busy = sum(event.self_device_time_total for event in events if event.device_type == DeviceType.CUDA)
    return busy / 1e3, sum(event.count for event in events if event.key.startswith(_STARTS))


def table(found: Decodes) -> Table:
    """Each part's ways."""
    headers = (
        "Wan VAE", "latents", "way", "ms", "device ms", "launches", "reserved MiB", "bits", "faster", "its seams"
    )  # fmt: skip
    result = headed(headers, 3)
    for part in found.parts:
        shape = f"{'x'.join(map(str, part.latents))}, {part.dtype}"
        for i, way in enumerate(part.ways):
            first = (part.name, shape) if i == 0 else ("", "")
            factors = [f"{x:.2f}x" if x else "" for x in (part.faster(way), part.faster_seams(way))]
            compared = ("", "", "") if i == 0 else ("same" if way.same_bits else "OTHER", *factors)
            result.add_row(*first, way.name, *_numbers(way), *compared)
        if part.calls is not None:
            result.add_row("", "", "of it no seams: the decoder's stand-in", *_numbers(part.calls))
    return result


def _numbers(way: Way) -> tuple[str, str, str, str]:
    launches = "–" if way.launches is None else f"{way.launches:,}"
    return number(way.ms[1]), number(way.device_ms), launches, number(way.reserved_mib)
