"""All sessions: who has a place at the engine, who waits, who is parked or forgotten. Runs in the event loop."""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from typing import Any

from longlive.web.engine_process import EngineProcess
from longlive.web.live_session import LiveSession
from longlive.web.messages import Broken, FromEngine, Made, Notice, Picture, Ready, Rebuilt, ToEngine
from longlive.web.protocol import Message, ProtocolError
from longlive.web.serve_config import ServeConfig
from longlive.web.uploads import Uploads
from longlive.web.viewer import CLOSE_FORGOTTEN, CLOSE_REPLACED, CLOSE_SHUTDOWN, Viewer

log = logging.getLogger(__name__)

_TIDY_S = 1.0


class Hall:
    """on_failed: the engine cannot be started at all, and why."""

    def __init__(self, config: ServeConfig, explicit: frozenset[str], on_failed: Callable[[str], None]) -> None:
        self.config = config
        self.uploads = Uploads(config.max_uploads, config.upload_s)
        self.ready = asyncio.Event()  # the models have been loaded once
        self._engine = EngineProcess(config, explicit, self._take, self._engine_changed, on_failed)
        self._sessions: dict[str, LiveSession] = {}
        self._queue: list[LiveSession] = []
        self._tidying: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._engine.start()
        self._tidying = asyncio.get_running_loop().create_task(self._tidy())

    def stop(self) -> None:
        for session in list(self._sessions.values()):
            self.end(session, CLOSE_SHUTDOWN)
        if self._tidying is not None:
            self._tidying.cancel()
        self._engine.stop()

    @property
    def info(self) -> Ready:
        """What the engine has said of its models."""
        assert self._engine.info is not None, "asked before the models are loaded"
        return self._engine.info

    @property
    def engine_state(self) -> str:
        return self._engine.state

    @property
    def engine_pid(self) -> int | None:
        return self._engine.pid

    def health(self) -> dict[str, Any]:
        """For `/api/health`."""
        active = sum(session.place == "active" for session in self._sessions.values())
        counts = {"sessions": len(self._sessions), "active": active, "queued": len(self._queue)}
        counts["kept_bytes"] = sum(session.num_bytes for session in self._sessions.values())
        return {"status": "ok", "engine": self.engine_state, **counts}

    # For viewers

    def open(self, message: Message, viewer: Viewer) -> LiveSession:
        """The session that an `open` names, or a new one, attached to the viewer. Raises ProtocolError."""
        fields = dict(message.fields)
        format = fields.pop("format", "mp4")
        if "session" in fields:
            if len(fields) > 1:
                raise ProtocolError("bad_value", "open: a session that goes on takes only a format")
            session = self.find(fields["session"])
            if session.viewer is not None:
                session.viewer.send(ProtocolError("replaced", "another viewer has opened this session").describe())
                session.viewer.close(CLOSE_REPLACED)
            session.format = format
        else:
            picture = self.uploads.get(fields["upload"]) if "upload" in fields else None
            self._make_room()
            seed = fields.get("seed", secrets.randbits(31))
            session = LiveSession(self, format, seed, fields.get("prompt"), picture)
            self._sessions[session.key] = session
        try:
            session.attach(viewer)
        except ProtocolError:  # no place, not even in the queue
            session.detach()
            if "session" not in fields:
                self.end(session, CLOSE_FORGOTTEN)
            raise
        return session

    def leave(self, session: LiveSession, viewer: Viewer) -> None:
        """A viewer's connection has ended."""
        if session.viewer is viewer:
            session.detach()
            if session in self._queue:
                self._queue.remove(session)
                session.place = "none"
            self._advance()

    def find(self, key: str) -> LiveSession:
        """Raises ProtocolError."""
        if key not in self._sessions:
            raise ProtocolError("no_session", "this session is not there, or not any more")
        return self._sessions[key]

    # For sessions

    def send(self, message: ToEngine) -> None:
        self._engine.send(message)

    def picture(self, key: str) -> Picture:
        return self.uploads.get(key)

    def request_place(self, session: LiveSession) -> None:
        """Give the session a place, or let it wait for one. Raises ProtocolError where too many wait already."""
        self._free_unwatched(len(self._queue) + 1)
        if self._num_free() == 0 and len(self._queue) >= self.config.max_queue:
            raise ProtocolError("busy", "all places are taken, and so are those in the queue: try again later")
        session.place = "queued"
        self._queue.append(session)
        self._advance()

    def queue_position(self, session: LiveSession) -> int:
        return self._queue.index(session) + 1

    def end(self, session: LiveSession, close_code: int) -> None:
        """Forget a session and free everything of it."""
        self._sessions.pop(session.key, None)
        if session in self._queue:
            self._queue.remove(session)
        session.close(close_code)
        self._advance()

    # Inside

    def _num_free(self) -> int:
        return self.config.max_sessions - sum(session.place == "active" for session in self._sessions.values())

    def _free_unwatched(self, num_waiting: int) -> None:
        """Where free places are too few, park the session that nobody has watched for longest."""
        unwatched = [session for session in self._sessions.values() if session.place == "active" and not session.viewer]
        if unwatched and self._num_free() < num_waiting:
            min(unwatched, key=lambda session: session.last_seen).park()

    def _advance(self) -> None:
        """Give free places to those who wait, and tell the others how far they have come."""
        self._free_unwatched(len(self._queue))
        while self._queue and self._num_free() > 0:
            session = self._queue.pop(0)
            session.place = "active"
            session.begin()
        for session in self._queue:
            session.announce()

    def _make_room(self) -> None:
        """For one more session."""
        if len(self._sessions) < self.config.max_kept:
            return
        unwatched = [session for session in self._sessions.values() if session.viewer is None]
        if not unwatched:
            raise ProtocolError("busy", "there are too many sessions: try again later")
        self.end(min(unwatched, key=lambda session: session.last_seen), CLOSE_FORGOTTEN)

    def _take(self, message: FromEngine) -> None:
        assert isinstance(message, Rebuilt | Made | Notice | Broken)
        session = self._sessions.get(message.session)
        if session is not None:
            session.take(message)

    def _engine_changed(self) -> None:
        """It is loaded, or it has died."""
        self.ready.set()
        for session in list(self._sessions.values()):
            if self.engine_state != "ready":
                session.engine_died()
                if session.keeps_crashing:
                    log.error("a session is given up: the engine dies of it")
                    self.end(session, CLOSE_FORGOTTEN)
            else:
                session.begin()

    async def _tidy(self) -> None:
        period_s = min(_TIDY_S, self.config.idle_s / 4, self.config.forget_s / 4)
        while True:
            await asyncio.sleep(period_s)
            self._tidy_once(time.monotonic())

    def _tidy_once(self, now: float) -> None:
        """Park who is idle, forget whom nobody comes back to, and old uploads."""
        for session in list(self._sessions.values()):
            if session.viewer is None and now - session.last_seen > self.config.forget_s:
                self.end(session, CLOSE_FORGOTTEN)
            elif session.idle_s(now) > self.config.idle_s:
                session.park()
        self.uploads.forget_old()
        self._advance()
