"""The studio as a web server: its page, a WebSocket, two downloads, and who may have them."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import secrets
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from importlib import resources
from typing import Any
from urllib.parse import parse_qs, urlsplit

import anyio
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from latentfast.preview import encode_mp4
from latentfast.studio.client import Client
from latentfast.studio.hub import Studio
from latentfast.studio.pictures import FPS
from latentfast.studio.protocol import LARGEST, RefusedError

__all__ = ["LOOPBACK", "Access", "application", "new_token", "running", "serve"]

_log = logging.getLogger("latentfast")

_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
#: Messages a second that a tab may send for long, and how many at once. Who sends more is read more slowly.
RATE, BURST = 200, 400
#: Seconds that a tab may take to accept a message before it counts as gone.
STUCK = 20.0
#: Close codes of the WebSocket: a wrong token, too many tabs, too much nonsense.
FORBIDDEN, FULL, NONSENSE = 4403, 4429, 4400
#: Hosts that nothing but this machine reaches.
LOOPBACK = ("127.0.0.1", "localhost", "::1")

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",  # the token is in the address
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def new_token() -> str:
    """A token that nobody guesses: 128 bits."""
    return secrets.token_urlsafe(16)


@dataclass(frozen=True)
class Access:
    """Who may use the studio: whoever has the token, from a page of the studio's own.

    Attributes:
        token: Must be in every address but those of the page's own files, which hold no secret.
        host: What the server is bound to. On a loopback address requests must name one too, so that no other site's
            name can be made to lead here (DNS rebinding).
    """

    token: str
    host: str = "127.0.0.1"

    def refusal(self, host: str, origin: str | None) -> str | None:
        """Why a request to this host from a page of this origin is refused; None: it is not."""
        name = urlsplit(f"//{host}").hostname or ""
        if self.host in LOOPBACK and name not in LOOPBACK:
            return f"this studio is at {self.host}, not at {name or 'no name'}"
        if origin is not None and urlsplit(origin).netloc != host:
            return "another site's page may not use this studio"
        return None

    def knows(self, query: str) -> bool:
        """Whether a query has the token."""
        given = parse_qs(query).get("token", [""])[-1]
        return hmac.compare_digest(given.encode(), self.token.encode())


class _Guard:
    """Refuses requests before anything else sees them, and puts the headers on every answer."""

    def __init__(self, app: Any, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            refusal = self._access.refusal(headers.get("host", ""), headers.get("origin"))
        except ValueError:  # an address that is none
            refusal = "that address is none"
        open_to_all = scope["type"] == "http" and scope["path"].startswith("/static/")
        if refusal is None and not open_to_all and not self._access.knows(scope["query_string"].decode("latin-1")):
            refusal = "open the address that `latentfast studio` printed: it has the token"
            if scope["type"] == "websocket":
                return await _close(WebSocket(scope, receive, send), FORBIDDEN, refusal)
        if refusal is not None:
            answer = PlainTextResponse(refusal + "\n", 403, _HEADERS)
            if scope["type"] == "websocket":
                return await _close(WebSocket(scope, receive, send), None, refusal)
            return await answer(scope, receive, send)

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] += [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
            await send(message)

        await self._app(scope, receive, send_with_headers if scope["type"] == "http" else send)


async def _close(websocket: WebSocket, code: int | None, reason: str) -> None:
    if code is not None:  # a browser shows a page why only once the connection was there
        await websocket.accept()
    await websocket.close(code or 1008, reason[:120])


def _files() -> dict[str, tuple[bytes, str]]:
    """The page's files, read once: no path of a request ever leads to a file."""
    found = {}
    for entry in (resources.files("latentfast.studio") / "static").iterdir():
        suffix = entry.name[entry.name.rfind(".") :]
        if suffix in _TYPES:
            found[entry.name] = entry.read_bytes(), _TYPES[suffix]
    return found


def application(studio: Studio, access: Access) -> Any:
    """The studio as an ASGI application. The studio must be entered."""
    files = _files()

    async def page(request: Request) -> Response:
        return Response(files["index.html"][0], media_type="text/html")

    async def static(request: Request) -> Response:
        content, kind = files.get(request.path_params["name"], (None, ""))
        return PlainTextResponse("no such file\n", 404) if content is None else Response(content, media_type=kind)

    async def movie(request: Request) -> Response:
        try:
            frames = await studio.frames()
            data = await asyncio.to_thread(encode_mp4, frames, fps=FPS)
        except ValueError as error:
            return PlainTextResponse(f"{error}\n", 409)
        return Response(data, media_type="video/mp4", headers=_attachment("clip.mp4"))

    async def run(request: Request) -> Response:
        try:
            text = json.dumps(studio.run(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        except RefusedError as error:
            return PlainTextResponse(f"{error}\n", 409)
        return Response(text, media_type="application/json", headers=_attachment("run.json"))

    async def tab(websocket: WebSocket) -> None:
        await websocket.accept()
        try:
            client = studio.enter()
        except RefusedError as error:
            await websocket.close(FULL, str(error))
            return
        try:
            await _serve_client(studio, client, websocket)
        finally:
            studio.leave(client)

    routes = [
        Route("/", page),
        Route("/static/{name}", static),
        Route("/export/clip.mp4", movie),
        Route("/export/run.json", run),
        WebSocketRoute("/ws", tab),
    ]
    return _Guard(Starlette(routes=routes), access)


def _attachment(name: str) -> Mapping[str, str]:
    return {"Content-Disposition": f'attachment; filename="{name}"'}


async def _serve_client(studio: Studio, client: Client, websocket: WebSocket) -> None:
    """Read and write until either ends."""
    tasks = [
        asyncio.create_task(_read(studio, client, websocket)),
        asyncio.create_task(client.send_all(_sender(websocket))),
    ]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        error = None if task.cancelled() else task.exception()
        # A tab that is gone, or takes nothing, is no error of ours.
        if error is not None and not isinstance(error, WebSocketDisconnect | RuntimeError | TimeoutError | OSError):
            _log.error("a tab's connection failed", exc_info=error)
    with suppress(Exception), anyio.move_on_after(1.0):  # it may be closed already, from either side
        await websocket.close(NONSENSE if client.refused >= Client.MOST_REFUSED else 1000)


def _sender(websocket: WebSocket) -> Callable[[str | bytes], Awaitable[None]]:
    async def send(message: str | bytes) -> None:
        # not asyncio.wait_for, which before Python 3.12 may lose a cancellation
        with anyio.fail_after(STUCK):
            await (websocket.send_text(message) if isinstance(message, str) else websocket.send_bytes(message))

    return send


async def _read(studio: Studio, client: Client, websocket: WebSocket) -> None:
    allowed, before = float(BURST), time.monotonic()
    while True:
        message = await websocket.receive()
        if message["type"] == "websocket.disconnect":
            return
        now = time.monotonic()
        allowed, before = min(BURST, allowed + (now - before) * RATE), now
        if allowed < 1:
            await asyncio.sleep((1 - allowed) / RATE)  # meanwhile its own connection fills, and nobody else's
        allowed -= 1
        try:
            # What is not text is no message: it is refused like one.
            if not studio.receive(client, message.get("text") or ""):
                return
        except Exception:
            _log.exception("a message could not be handled")
            client.complain("something went wrong in the studio: its log says what")


class _Server(uvicorn.Server):
    """Leaves signals to whoever runs it."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def running(studio: Studio, access: Access, port: int) -> AsyncIterator[str]:
    """A studio that is served inside the block.

    Args:
        studio: Is entered here.
        access: Who may use it, and the address to bind to.
        port: 0: any that is free.

    Yields:
        The address of the page, with the token.

    Raises:
        OSError: the address can't be bound.
    """
    family = socket.AF_INET6 if ":" in access.host else socket.AF_INET
    # not uvicorn's own way, which ends the process where the address is taken
    bound = socket.create_server((access.host, port), family=family)
    config = uvicorn.Config(
        application(studio, access),
        ws="websockets-sansio",
        ws_max_size=LARGEST,
        ws_ping_interval=20.0,
        ws_ping_timeout=20.0,
        ws_per_message_deflate=False,  # pixels: compressing them takes longer than sending them
        limit_concurrency=128,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=2,
        access_log=False,  # the token is in the address
        server_header=False,
        lifespan="off",
        log_level="error",
    )
    shown = f"[{access.host}]" if ":" in access.host else access.host
    server = _Server(config)
    async with studio:
        task = asyncio.create_task(server.serve(sockets=[bound]))
        try:
            yield f"http://{shown}:{bound.getsockname()[1]}/?token={access.token}"
        finally:
            server.should_exit = True
            await task


async def serve(studio: Studio, access: Access, port: int, *, started: Callable[[str], None]) -> None:
    """Serve a studio until SIGINT or SIGTERM; see `running`.

    Args:
        studio, access, port: As there.
        started: Told the address.
    """
    ended, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ended.set)
    async with running(studio, access, port) as address:
        started(address)
        await ended.wait()
