"""The command ``studio``: the embedded model or a local one behind a page on this machine."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from latentfast.cache import LatentCache
from latentfast.cli.errors import UserError
from latentfast.cli.request import Request
from latentfast.studio import LOOPBACK, Access, Document, Model, Shot, Studio, new_token, serve

__all__ = ["run_studio"]

PROMPT = "a big red circle moving left and a small yellow star moving right on a gray background in bright light"
SHORTEST_TOKEN = 16


def run_studio(request: Request, *, host: str, port: int, token: str | None, cache: Path | None = None) -> None:
    """Serve the studio until Ctrl-C.

    Args:
        request: Model, device, sampling.
        host: The address to bind to; one that other machines reach needs a token of the caller's.
        port: 0: any that is free.
        token: Of the page's address; None: a new one.
        cache: The folder of a latent cache, which keeps the clips that are made.
    """
    if token is None and host not in LOOPBACK:
        raise UserError(f"--host: {host} can be reached by other machines: give --token, at least 16 characters")
    if token is not None and (len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable()):
        raise UserError(f"--token: expected at least {SHORTEST_TOKEN} ASCII characters, got {len(token)}")

    @contextmanager
    def load() -> Iterator[Model]:
        with request.sampler() as sampler, nullcontext() if cache is None else LatentCache(cache) as kept:
            if request.model is None:
                from latentfast import tiny

                yield Model(sampler, tiny.rgb_factors(sampler.device), kept)
            else:
                yield Model(sampler, cache=kept)

    studio = Studio(load, _start(request))
    console = Console(highlight=False, soft_wrap=True)

    def started(address: str) -> None:
        console.print(f"latentfast studio: {address}", markup=False)
        console.print("Whoever has this address can use it. Ctrl-C ends it.", markup=False)

    try:
        asyncio.run(serve(studio, Access(token or new_token(), host), port, started=started))
        console.print("latentfast studio: ended")
    except OSError as error:
        raise UserError(f"--host, --port: {host}:{port} can't be bound: {error.strerror or error}") from error


def _start(request: Request) -> Document:
    """A clip to begin with, where it costs seconds: with the embedded model."""
    if request.model is not None:
        return Document()
    from latentfast import tiny

    call = {**tiny.RECOMMENDED}
    steps = request.steps or int(call["num_inference_steps"])
    guidance = float(call["guidance_scale"]) if request.guidance is None else request.guidance
    return replace(Document(), shot=Shot(PROMPT, 0, steps, guidance))
