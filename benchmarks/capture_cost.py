"""What attention capture adds to a forward of a full-size Wan 2.1 1.3B at 480p: time and memory, beside other ways."""

import itertools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

import latentfast
from latentfast.benchmarks.harness import percentiles, synchronize
from latentfast.benchmarks.rows import Environment, environment
from latentfast.benchmarks.share_of_step import TEXT_TOKENS, full_size_wan
from latentfast.benchmarks.table import headed
from latentfast.integrations.diffusers import AttentionCapture
from latentfast.integrations.diffusers._attention import text_attentions

#: Four words; the last has two tokens.
WORDS = [[3], [7], [12], [20, 21]]
MIB = 2**20
#: The package whose maps are taken for right, and its arithmetic on our hooks, which needs no installation.
PEER = "attention-map-diffusers"
ARITHMETIC = f"{PEER}' arithmetic"


@dataclass(frozen=True)
class Way:
    """A forward with one way of capture: milliseconds as [p20, p50, p80], and the peak of allocated memory.

    Attributes:
        peak_mib: None on a CPU, where it isn't counted.
        off: the largest difference of the maps from those of attention-map-diffusers' arithmetic; None without maps.
        same: whether the model's result has the bits of the plain forward.
    """

    name: str
    ms: tuple[float, float, float]
    peak_mib: float | None
    off: float | None
    same: bool


@dataclass(frozen=True)
class Cost:
    """What was measured; the first way is the plain forward.

    Attributes:
        absent: ways that could not be measured, and why.
    """

    model: str
    latents: tuple[int, ...]
    environment: Environment
    ways: list[Way]
    quick: bool
    absent: dict[str, str] = field(default_factory=dict)

    def added(self, way: Way) -> tuple[float, float | None]:
        """The share of the plain forward's time that a way adds, and MiB."""
        plain = self.ways[0]
        memory = None if way.peak_mib is None or plain.peak_mib is None else way.peak_mib - plain.peak_mib
        return way.ms[1] / plain.ms[1] - 1, memory

    def title(self) -> str:
        """What was measured, where."""
        return f"{self.model}; latents {'x'.join(map(str, self.latents))}; {self.environment.card}"

    def to_json(self) -> str:
        """One line, with what is added."""
        data = asdict(self)
        for written, way in zip(data["ways"], self.ways, strict=True):
            written["added_time"], written["added_mib"] = self.added(way)
        return json.dumps(data)


class ScoresInChunks:
    """Capture as attention-map-diffusers 1.0.0 computes it (capture/compute.py), on the hooks of `AttentionCapture`.

    1024 queries at a time: scores in float32, softmax, the words' columns, the mean over heads.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._hooks: list[Any] = []
        self._queries: Tensor | None = None
        self._sum: Tensor | None = None

    def __enter__(self) -> "ScoresInChunks":
        for block in text_attentions(self._model):

            def queries(module: nn.Module, args: tuple, output: Tensor) -> None:
                self._queries = output

            def keys(module: nn.Module, args: tuple, output: Tensor, block: Any = block) -> None:
                q, k = block.read(self._queries, output, {})
                self._queries = None
                heat = self._heat(q, k)
                self._sum = heat if self._sum is None else self._sum.add_(heat)

            self._hooks += [block.queries.register_forward_hook(queries), block.keys.register_forward_hook(keys)]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    @staticmethod
    def _heat(q: Tensor, k: Tensor) -> Tensor:
        k_t, index = k.float().mT, torch.tensor([*itertools.chain(*WORDS)], device=q.device)
        chunks = []
        for chunk in q.split(1024, 2):
            probabilities = torch.softmax(chunk.float() @ k_t * q.shape[-1] ** -0.5, -1).to(q.dtype)
            chunks.append(probabilities.index_select(-1, index).mean(1))
        columns = torch.cat(chunks, 1).float().split([len(word) for word in WORDS], -1)
        return torch.stack([column.sum(-1) for column in columns], 1)

    def maps(self) -> Tensor:
        assert self._sum is not None
        return self._sum / len(text_attentions(self._model))


class Peer:
    """Capture by attention-map-diffusers' own code (PyPI, 1.0.0): it puts attention processors of its own in place.

    Its mode "exact" makes the maps while the model runs, as the others here do ("fast" keeps queries and keys instead,
    for maps afterwards); maps stay on the device, and of the text's tokens only those of the words.

    Raises:
        ImportError: the package isn't installed.
    """

    def __init__(self, model: nn.Module) -> None:
        from attention_map_diffusers import AttentionCapture as PeersCapture

        # of a pipeline it asks for the transformer alone
        self._capture = PeersCapture(
            SimpleNamespace(transformer=model),
            relations="video->text",
            timesteps="all",
            mode="exact",
            offload=None,
            key_indices=[*itertools.chain(*WORDS)],
        )

    def __enter__(self) -> "Peer":
        self._capture.install()
        return self

    def __exit__(self, *error: object) -> None:
        self._capture.restore()

    def maps(self) -> Tensor:
        layers = [record.data.float().mean(1) for record in self._capture.records]
        columns = torch.stack(layers).mean(0).split([len(word) for word in WORDS], -1)
        return torch.stack([column.sum(-1) for column in columns], 1)


def measure(device: str, quick: bool = False) -> Cost:
    """Measures all ways, in turns.

    Args:
        device: Where the model runs.
        quick: One layer, few frames, few rounds: checks that everything runs.
    """
    with torch.inference_mode():
        return _measure(torch.device(device), quick)


def _measure(device: torch.device, quick: bool) -> Cost:
    transformer, latents = full_size_wan(device, quick)
    text = torch.randn((1, TEXT_TOKENS, transformer.config.text_dim), device=device, dtype=torch.bfloat16)
    sample = torch.randn((1, *latents), device=device, dtype=torch.bfloat16)
    now = torch.full((1,), 500, device=device)

    def forward() -> Tensor:
        given = {"hidden_states": sample, "timestep": now, "encoder_hidden_states": text}
        return transformer(**given, return_dict=False)[0]

    @contextmanager
    def eager() -> Iterator[AttentionCapture]:
        with latentfast.use_backend("eager"), AttentionCapture(transformer, WORDS) as capture:
            yield capture

    captures: dict[str, Callable[[], Any]] = {
        "plain forward": ExitStack,
        "AttentionCapture": lambda: AttentionCapture(transformer, WORDS),
        "AttentionCapture, eager backend": eager,
        ARITHMETIC: lambda: ScoresInChunks(transformer),
        PEER: lambda: Peer(transformer),
    }
    plain, absent = forward(), {}
    try:
        with captures[PEER]():
            forward()
    except ImportError as error:
        absent[PEER] = "not installed" if error.name == "attention_map_diffusers" else str(error)
    except Exception as error:  # of anothers' code, on a diffusers it may not know: the rest is measured
        absent[PEER] = f"{type(error).__name__}: {error}"
    captures = {name: capture for name, capture in captures.items() if name not in absent}
    times: dict[str, list[float]] = {name: [] for name in captures}
    seen: dict[str, tuple[float | None, Tensor | None, bool]] = {}
    for turn in range(2 if quick else 8):
        for name, capture in captures.items():
            with capture() as running:
                synchronize(device)
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
                start = time.perf_counter()
                result = forward()
                synchronize(device)
                seconds = time.perf_counter() - start
                if turn:  # kernels are compiled and loaded in the first
                    times[name].append(seconds * 1e3)
                peak = torch.cuda.max_memory_allocated(device) / MIB if device.type == "cuda" else None
                maps = running.maps().flatten(2) if hasattr(running, "maps") else None
                seen[name] = peak, maps, torch.equal(result, plain)
                del result
    exact = seen[ARITHMETIC][1]
    ways = []
    for name, (peak, maps, same) in seen.items():
        off = None if maps is None or exact is None else (maps - exact).abs().max().item()
        ways.append(Way(name, percentiles(times[name]), peak, off, same))
    size = sum(p.numel() for p in transformer.parameters()) / 1e9
    name = f"Wan 2.1 1.3B, {size:.2f} billion random weights, bfloat16, {len(WORDS)} words in all layers"
    return Cost(name, latents, environment(device, 0.0), ways, quick, absent)


def table(cost: Cost) -> Table:
    """One line for each way."""
    headers = ("capture", "ms a forward", "time added", "MiB added", "maps differ by", "same result")
    found = headed(headers, 1, cost.title())
    for way in cost.ways:
        time_added, memory = cost.added(way)
        first = way is cost.ways[0]
        found.add_row(
            way.name,
            f"{way.ms[1]:.2f}",
            "–" if first else f"{time_added:+.2%}",
            "–" if first or memory is None else f"{memory:+.1f}",
            "–" if way.off is None else f"{way.off:.1e}",
            "yes" if way.same else "no",
        )
    for name, why in cost.absent.items():
        found.add_row(name, why, *["–"] * (len(headers) - 2))
    return found
