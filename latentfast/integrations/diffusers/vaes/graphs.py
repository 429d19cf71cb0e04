"""The steps of a chunked decode as CUDA graphs.

A graph is a step with fixed addresses. A clip's first groups each have one of their own, since the feature cache still
grows (Wan: nothing, one frame, two frames); as soon as a step leaves the cache in the form in which it found it, that
step is the one for all groups that follow, and writes the cache back to where it read it.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from latentfast.integrations.diffusers.vaes.chunks import Step, coded

_logger = logging.getLogger("latentfast")


class Record(Protocol):
    """Records what a function does on the device; what it returns stays where it is.

    Returns a function that does it all again, and the function's own result.
    """

    def __call__(self, body: Callable[[], Any]) -> tuple[Callable[[], None], Any]: ...


class CudaRecord:
    """CUDA graphs that share the memory of their intermediates: no two of them run at once."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, body: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        graph = torch.cuda.CUDAGraph()
        # another thread's allocations are no reason to fail
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = body()
        return graph.replay, result


def leaves(cache: Any) -> list[Any]:
    """What a feature cache holds, in order: tensors, None and markers."""
    if isinstance(cache, dict):
        return [leaf for value in cache.values() for leaf in leaves(value)]
    if isinstance(cache, (list, tuple)):
        return [leaf for value in cache for leaf in leaves(value)]
    return [cache]


def _form(cache: Any) -> list[Any]:
    return [(leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves(cache)]


@dataclass(frozen=True)
class _Link:
    """One recorded step."""

    group: Tensor  # it reads its frames here
    replay: Callable[[], None]
    result: Tensor
    cache: Any  # what it leaves; held, so that no other graph gets that memory


@dataclass
class _Chain:
    """The recorded steps of clips of one shape, as many as there was need of."""

    record: Record
    links: list[_Link] = field(default_factory=list)
    repeats: bool = False  # the last link is for all groups that follow

    def extend(self, step: Step, groups: Sequence[Tensor]) -> None:
        while len(self.links) < len(groups) and not self.repeats:
            self._add(step, groups[len(self.links)])

    def _add(self, step: Step, like: Tensor) -> None:
        before = self.links[-1].cache if self.links else None
        shared = [link.group for link in self.links if link.group.shape == like.shape]
        group = shared[0] if shared else torch.zeros_like(like, memory_format=torch.contiguous_format)
        # Once unrecorded: libraries load kernels and choose algorithms. What is in the caches does not matter here.
        after = step(group, before)[1]
        repeats = bool(self.links) and _form(after) == _form(before)
        del after

        def body() -> tuple[Tensor, Any]:
            result, after = step(group, before)
            if not repeats:
                return result, after
            for old, new in zip(leaves(before), leaves(after), strict=True):
                if isinstance(new, Tensor) and new is not old:
                    old.copy_(new)
            return result, before

        replay, (result, cache) = self.record(body)
        self.links.append(_Link(group, replay, result, cache))
        self.repeats = repeats

    def run(self, groups: Sequence[Tensor]) -> Iterator[Tensor]:
        """Each group's result: the first is the caller's, each later one stays until the next is asked for."""
        for i, group in enumerate(groups):
            link = self.links[min(i, len(self.links) - 1)]
            link.group.copy_(group)
            link.replay()
            yield link.result if i else link.result.clone()


class ChunkGraphs:
    """The graphs of one autoencoder: recorded the first time that a shape is decoded, then replayed.

    They hold, on the device, the working memory of one group of the largest shape (which torch's allocator cannot use
    for anything else), and for each shape the feature cache about twice and the results of up to three steps. A tiled
    decode has up to four shapes: whole tiles, the right edge's, the lower edge's, the corner's. Shapes beyond
    `MOST_SHAPES` push out the least recently used.

    Recorded addresses are the weights' too: when weights have moved (`vae.to`, offloading), graphs are recorded anew.
    """

    MOST_SHAPES = 8

    def __init__(self, record: Callable[[], Record] = CudaRecord, device: str = "cuda") -> None:
        self._new_record, self._device = record, device
        self._record: Record | None = None
        self._chains: dict[Any, _Chain] = {}
        self._weights: Any = None
        #: Why recording failed, after which nothing is recorded any more; "" as long as it has not.
        self.failure = ""

    def why_not(self, groups: Sequence[Tensor], vae: nn.Module) -> str:
        """Why these groups go through the decoder step by step; "" if as graphs."""
        if self.failure:
            return self.failure
        if groups[0].device.type != self._device:
            return f"latents on {groups[0].device.type}"
        if torch.is_grad_enabled():
            return "gradients are on (torch.no_grad() turns them off)"
        if torch.compiler.is_compiling() or (groups[0].is_cuda and torch.cuda.is_current_stream_capturing()):
            return "inside another compilation or capture"
        for module in (vae, *_modules(vae)):
            if module.training:
                return "in training mode (vae.eval() ends it)"
            if _HOOKED & module.__dict__.keys() or module._forward_pre_hooks or module._forward_hooks:
                return "hooks on the modules, as offloading has them"
        if any(weight.device != groups[0].device for weight in _weights(vae)):
            return "weights on another device"
        return ""

    def coded(self, step: Step, groups: Sequence[Tensor], vae: nn.Module) -> Iterator[Tensor]:
        """Each group's result, by graphs where that is possible."""
        recorded = None if self.why_not(groups, vae) else self._recorded(step, groups, vae)
        return coded(step, groups) if recorded is None else recorded.run(groups)

    def _recorded(self, step: Step, groups: Sequence[Tensor], vae: nn.Module) -> _Chain | None:
        weights = [(weight.data_ptr(), weight.dtype) for weight in _weights(vae)]
        if weights != self._weights:
            self._chains.clear()
            self._weights = weights
        key = (step.__name__, groups[0].shape, groups[-1].shape, groups[0].dtype, groups[0].device, _settings())
        if self._record is None:
            self._record = self._new_record()
        found = self._chains.pop(key, None) or _Chain(self._record)
        try:
            # outside of inference mode, whose tensors could not be written to after it
            with torch.inference_mode(False), torch.no_grad():
                found.extend(step, groups)
        except RuntimeError as error:  # out of memory; something in the decoder that cannot be captured
            self.failure = f"recording failed: {error}"
            _logger.warning("the VAE decodes without CUDA graphs from now on: %s", self.failure)
            self._chains.clear()
            return None
        self._chains[key] = found  # the most recently used last
        if len(self._chains) > self.MOST_SHAPES:
            del self._chains[next(iter(self._chains))]
        return found


#: Of each autoencoder that decodes by graphs; not an attribute of it, since it can neither be copied nor saved.
GRAPHS: "WeakKeyDictionary[nn.Module, ChunkGraphs]" = WeakKeyDictionary()

#: What accelerate and diffusers leave on modules that they load, move or cast around a call.
_HOOKED = {"_hf_hook", "_diffusers_hook"}


def _modules(vae: nn.Module) -> Iterator[nn.Module]:
    """What a decode uses."""
    for part in (vae.decoder, getattr(vae, "post_quant_conv", None)):
        if isinstance(part, nn.Module):
            yield from part.modules()


def _weights(vae: nn.Module) -> Iterator[Tensor]:
    for module in _modules(vae):
        yield from module.parameters(recurse=False)
        yield from module.buffers(recurse=False)


def _settings() -> tuple[Any, ...]:
    """What else chooses the kernels that were recorded."""
    return (
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cuda"),
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
    )
