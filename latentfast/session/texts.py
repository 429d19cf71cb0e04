"""Texts that were encoded before are not encoded again."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from latentfast.cache import Key, LatentCache
from latentfast.session import states
from latentfast.session.arguments import UnwritableError, to_data
from latentfast.session.trajectory import Request

__all__ = ["Texts"]

#: Texts that are remembered where there is no cache.
_MOST = 16


class Texts:
    """What a pipeline's `encode_prompt` returned, by its arguments and what it computes with.

    Args:
        pipe: The pipeline.
        cache: Where it is kept; None: here, the last few.
    """

    def __init__(self, pipe: Any, cache: LatentCache | None) -> None:
        self._pipe, self._cache = pipe, cache
        self._here: OrderedDict[str, dict[str, Tensor]] = OrderedDict()

    @contextmanager
    def remembered(self, request: Request) -> Iterator[None]:
        """Inside, the pipeline's `encode_prompt` looks there first."""
        pipe = self._pipe
        if request.data is None or not hasattr(pipe, "encode_prompt") or "encode_prompt" in vars(pipe):
            yield
            return
        known = request.data["pipeline"]
        parts = {name: part for name, part in known["components"].items() if name.startswith(("text", "token"))}
        where = {**known, "components": parts}
        encode = pipe.encode_prompt

        def look(*args: Any, **kwargs: Any) -> Any:
            try:
                given = to_data([list(args), kwargs], dict(request.inputs), "encode_prompt")
            except UnwritableError:
                return encode(*args, **kwargs)
            key = Key.of({"kind": "text", "pipeline": where, "arguments": given})
            found = self._here.get(key.digest) if self._cache is None else self._cache.get(key, device=request.device)
            if found is not None:
                return _tuples(states.read(found, states.layout_of(found)))
            begin = time.perf_counter()
            made = encode(*args, **kwargs)
            self._keep(key, made, request.device, time.perf_counter() - begin)
            return made

        pipe.encode_prompt = look
        try:
            yield
        finally:
            del pipe.encode_prompt

    def _keep(self, key: Key, made: Any, device: torch.device, seconds: float) -> None:
        pool = states.Pool(device)
        tensors = pool.with_layout(pool.write(made))
        if self._cache is not None:
            self._cache.put(key, tensors, seconds=seconds)
            return
        self._here[key.digest] = tensors
        while len(self._here) > _MOST:
            self._here.popitem(last=False)


def _tuples(value: Any) -> Any:
    """As pipelines return several results."""
    return tuple(value) if isinstance(value, list) else value
