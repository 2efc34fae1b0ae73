"""The web server: addresses, the WebSocket, and the life of the whole (docs/PROTOCOL.md)."""

import asyncio
import json
import logging
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp
from starlette.websockets import WebSocket, WebSocketDisconnect

import longlive
from longlive.errors import InputError
from longlive.web.course import Branch
from longlive.web.guard import Guard
from longlive.web.hall import Hall
from longlive.web.live_session import LiveSession
from longlive.web.protocol import FORMATS, Message, ProtocolError, Throttle, parse
from longlive.web.serve_config import ServeConfig
from longlive.web.uploads import decode
from longlive.web.viewer import CLOSE_BUSY, CLOSE_ENDED, CLOSE_SLOW, Viewer

log = logging.getLogger(__name__)

PROTOCOL = 1
PAGE = Path(__file__).parent / "static"
_STATUS = {"no_session": 404, "no_branch": 404, "not_found": 404, "too_large": 413, "loading": 503}
_LIMITS = (
    *("max_sessions", "max_queue", "max_kept", "idle_s", "forget_s", "max_message_bytes", "max_messages_per_s"),
    *("max_prompt_chars", "max_upload_bytes", "max_upload_px", "upload_s", "max_branches", "max_video_s"),
    "max_session_mb",
)
_CLOSING_S = 2.0
_LOADING_TOLD_S = 20.0
_NO_PAGE = "<!doctype html><title>LongLive</title><p>The server runs; its page is not installed."


def serve(config: ServeConfig, explicit: frozenset[str]) -> None:
    """Run the server until Ctrl-C. Raises InputError where the port is taken or the models cannot be loaded."""
    listening = _listen(config)
    host, port = config.host.strip("[]"), listening.getsockname()[1]
    failures: list[str] = []

    def fail(reason: str) -> None:
        failures.append(reason)
        server.should_exit = True

    app = make_app(Hall(config, explicit, fail))
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            ws_max_size=config.max_message_bytes,
            ws_per_message_deflate=False,  # the media is compressed already
            timeout_graceful_shutdown=3,
        )
    )
    shown = f"[{host}]" if ":" in host else host
    log.info("listening on http://%s:%d/%s", shown, port, f"#token={quote(config.token)}" if config.token else "")
    try:
        server.run(sockets=[listening])
    except KeyboardInterrupt:
        log.info("stopped")
    if failures:
        raise InputError(failures[0])


def make_app(hall: Hall) -> ASGIApp:
    """The ASGI application, which starts and stops the hall."""

    @asynccontextmanager
    async def life(app: Starlette) -> AsyncIterator[None]:
        hall.start()
        yield
        hall.stop()

    handlers = {ProtocolError: _refuse, HTTPException: _refuse_http, Exception: _refuse_unexpected}
    app = Starlette(routes=Web(hall).routes(), exception_handlers=handlers, lifespan=life)
    return Guard(app, hall.config)


class Web:
    """What is done at each address."""

    def __init__(self, hall: Hall) -> None:
        self._hall = hall
        self._decoding = asyncio.Semaphore(2)  # pictures at a time: each may take max_upload_px

    def routes(self) -> list[BaseRoute]:
        page: BaseRoute = Mount("/", StaticFiles(directory=PAGE, html=True))
        if not (PAGE / "index.html").is_file():
            page = Route("/", lambda request: HTMLResponse(_NO_PAGE))
        api = [
            Route("/health", self.health),
            Route("/info", self.info),
            Route("/upload", self.upload, methods=["POST"]),
            Route("/session/{key}/download", self.download),
            Route("/session/{key}/thumbnail", self.thumbnail),
            WebSocketRoute("/session", self.session),
        ]
        return [Mount("/api", routes=api), page]

    async def health(self, request: Request) -> Response:
        return JSONResponse(self._hall.health())

    async def info(self, request: Request) -> Response:
        self._check_loaded()
        return JSONResponse(self._hello())

    async def upload(self, request: Request) -> Response:
        self._check_loaded()
        config, info = self._hall.config, self._hall.info
        data = bytearray()
        async for chunk in request.stream():
            data += chunk
            if len(data) > config.max_upload_bytes:
                raise ProtocolError("too_large", f"a picture's file may have {config.max_upload_bytes} bytes")
        async with self._decoding:
            picture, (width, height) = await asyncio.to_thread(
                decode, bytes(data), info.height, info.width, config.max_upload_px
            )
        return JSONResponse({"upload": self._hall.uploads.add(picture), "width": width, "height": height})

    async def download(self, request: Request) -> Response:
        branch = self._branch(request).copy()
        what = request.query_params.get("what", "mp4")
        if what not in ("mp4", "jsonl", "zip"):
            raise ProtocolError("bad_value", "what: must be one of mp4, jsonl, zip")
        if not branch.blocks:
            raise ProtocolError("not_found", f"branch {branch.number}: nothing is made yet")
        if what == "mp4":
            content, kind = await asyncio.to_thread(branch.video), "video/mp4"
        elif what == "zip":
            content, kind = await asyncio.to_thread(branch.archive, self._hall.info.settings), "application/zip"
        else:
            content, kind = branch.script().encode(), "application/jsonl"
        name = f'attachment; filename="longlive-{branch.number}.{what}"'
        return Response(content, media_type=kind, headers={"Content-Disposition": name})

    async def thumbnail(self, request: Request) -> Response:
        branch, frame = self._branch(request), _number(request, "frame")
        block = branch.block_at(frame)
        if block is None:
            raise ProtocolError("not_found", f"frame {frame}: branch {branch.number} has {branch.num_frames} frames")
        headers = {"Cache-Control": "private, max-age=3600"}  # what is made does not change
        return Response(block.thumbnail(), media_type="image/webp", headers=headers)

    async def session(self, websocket: WebSocket) -> None:
        """One viewer, from the handshake to the end of the connection."""
        await websocket.accept()
        if not await self._outlasts_loading(websocket):
            return
        viewer = Viewer()
        conversation = Conversation(self._hall, viewer)
        viewer.send(self._hello())
        tasks = {asyncio.create_task(_read(websocket, conversation)), asyncio.create_task(_write(websocket, viewer))}
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            conversation.leave()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            task.result()

    async def _outlasts_loading(self, websocket: WebSocket) -> bool:
        """Wait for the models; whether the viewer is still there. It is told again and again, as to many a viewer a
        server that is silent for long is dead."""
        with suppress(WebSocketDisconnect):
            while not self._hall.ready.is_set():
                await websocket.send_json({"type": "state", "state": "loading"})
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._hall.ready.wait(), _LOADING_TOLD_S)
            return True
        return False

    def _branch(self, request: Request) -> Branch:
        return self._hall.find(request.path_params["key"]).find_branch(_number(request, "branch"))

    def _check_loaded(self) -> None:
        if not self._hall.ready.is_set():
            raise ProtocolError("loading", "the models are being loaded: try again in a moment")

    def _hello(self) -> dict[str, Any]:
        info, config = self._hall.info, self._hall.config
        return {
            "type": "hello",
            "protocol": PROTOCOL,
            "version": longlive.__version__,
            "model": info.model,
            "mime": info.mime,
            "formats": list(FORMATS),
            "width": info.width,
            "height": info.height,
            "fps": info.fps,
            "frames_per_block": info.frames_per_block,
            "video_frames_per_frame": info.video_frames_per_frame,
            "ahead_s": config.ahead_s,
            "limits": {name: getattr(config, name) for name in _LIMITS},
        }


class Conversation:
    """What one connection has opened, and how fast it may speak."""

    def __init__(self, hall: Hall, viewer: Viewer) -> None:
        self.viewer = viewer
        self.session: LiveSession | None = None
        self.throttle = Throttle(hall.config.max_messages_per_s, time.monotonic())
        self._hall = hall

    def take(self, text: str | None) -> None:
        """Obey a message, or say why not; what comes after an end is not heard."""
        if self.viewer.close_code is not None:
            return
        try:
            if text is None:
                raise ProtocolError("bad_message", "messages are text, not binary")
            message = parse(text, self._hall.config.max_prompt_chars)
            try:
                self._obey(message)
            except ProtocolError as error:
                error.id = message.id
                raise
        except ProtocolError as error:
            self.viewer.send(error.describe())
            if error.code == "busy" and self.session is None:
                self.viewer.close(CLOSE_BUSY)

    def leave(self) -> None:
        if self.session is not None:
            self._hall.leave(self.session, self.viewer)

    def _obey(self, message: Message) -> None:
        if message.type == "ping":
            self.viewer.send({"type": "pong"} if message.id is None else {"type": "pong", "id": message.id})
            return
        if message.type == "open":
            if self.session is not None:
                raise ProtocolError("out_of_order", "open: this connection has opened a session already")
            self.session = self._hall.open(message, self.viewer)
        elif self.session is None:
            raise ProtocolError("out_of_order", f"{message.type}: the first message must be open")
        elif message.type != "end":
            self.session.obey(message)
        if message.id is not None:
            self.viewer.send({"type": "ok", "id": message.id})
        if message.type == "end" and self.session is not None:
            self._hall.end(self.session, CLOSE_ENDED)


async def _read(websocket: WebSocket, conversation: Conversation) -> None:
    """Obey the viewer until it leaves, or does not read what it is sent."""
    while not conversation.viewer.is_slow:
        event = await websocket.receive()
        if event["type"] == "websocket.disconnect":
            return
        conversation.take(event.get("text"))
        await asyncio.sleep(conversation.throttle.wait_s(time.monotonic()))
    with suppress(TimeoutError):
        await asyncio.wait_for(websocket.close(CLOSE_SLOW), _CLOSING_S)


async def _write(websocket: WebSocket, viewer: Viewer) -> None:
    """Send what waits for the viewer, until the connection is to be closed."""
    # The viewer has gone, or uvicorn has closed a connection on which too large a message came: `_read` sees it too.
    with suppress(WebSocketDisconnect, RuntimeError):
        while (item := await viewer.next()) is not None:
            if isinstance(item, bytes):
                await websocket.send_bytes(item)
            else:
                await websocket.send_text(json.dumps(item, ensure_ascii=False))
        await websocket.close(viewer.close_code or CLOSE_ENDED)


def _number(request: Request, name: str) -> int:
    """A whole number of the query, 0 if it is not there."""
    text = request.query_params.get(name, "0")
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise ProtocolError("bad_value", f"{name}: must be a whole number")
    return int(text)


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, ProtocolError)
    return JSONResponse(error.describe(), _STATUS.get(error.code, 400))


async def _refuse_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    told = ProtocolError("not_found" if error.status_code == 404 else "bad_message", error.detail)
    return JSONResponse(told.describe(), error.status_code)


async def _refuse_unexpected(request: Request, error: Exception) -> Response:
    """The traceback goes to the log alone."""
    return JSONResponse(ProtocolError("internal", "the server has made a mistake").describe(), 500)


def _listen(config: ServeConfig) -> socket.socket:
    host = config.host.strip("[]")
    try:
        family = socket.getaddrinfo(host, config.port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, config.port), family=family, backlog=128)
    except OSError as error:
        raise InputError(f"host={config.host} port={config.port}: cannot listen there ({error.strerror})") from error
