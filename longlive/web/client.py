"""A small client of the live protocol (docs/PROTOCOL.md), synchronous: for tests, scripts and notebooks.

with LiveClient("http://127.0.0.1:8000") as client:
    client.open(prompt="a big red circle moves left on a black background", seed=7)
    for block in client.blocks(4):
        ...
"""

import json
import struct
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlencode

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

_HEADER_BYTES = 16


class LiveError(Exception):
    """The server has refused something: its `code`, and its message."""

    def __init__(self, error: Mapping[str, Any]) -> None:
        super().__init__(f"{error['code']}: {error['message']}")
        self.code: str = error["code"]


@dataclass(frozen=True)
class Media:
    """A binary frame. kind: 1 init segment, 2 fragment, 3 picture."""

    kind: int
    epoch: int
    video_frame: int
    num_video_frames: int
    data: bytes


@dataclass(frozen=True)
class ReceivedBlock:
    """A block and its media: one fragment, or pictures."""

    told: Mapping[str, Any]
    media: tuple[Media, ...]


@dataclass
class LiveClient:
    """One viewer. plays: report everything as played as soon as it arrives, so that the server goes on at full speed.

    A server that stays silent for `timeout_s` raises TimeoutError; a closed connection ConnectionClosed, and
    `close_code` tells why.
    """

    url: str
    token: str | None = None
    origin: str | None = None
    plays: bool = True
    timeout_s: float = 60.0
    session: str | None = None
    epoch: int = 0
    state: str | None = None
    position: int | None = None
    branches: Mapping[str, Any] | None = None
    hello: Mapping[str, Any] = field(default_factory=dict)
    _next_id: int = 1

    def __enter__(self) -> Self:
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        self._connecting = connect(
            f"{self.url.rstrip('/').replace('http', 'ws', 1)}/api/session",
            additional_headers=headers,
            origin=self.origin,  # type: ignore[arg-type]
            compression=None,
            max_size=None,
            open_timeout=self.timeout_s,
        )
        self._socket = self._connecting.__enter__()
        self.hello = self.wait("hello")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connecting.__exit__(kind, error, trace)

    @property
    def close_code(self) -> int | None:
        return self._socket.protocol.close_code

    def open(self, **fields: Any) -> None:
        """Open a session and wait until it is told."""
        self.request("open", **fields)

    def send(self, type: str, **fields: Any) -> None:
        """A message, without waiting for an answer."""
        self.send_raw(json.dumps({"type": type, **fields}))

    def send_raw(self, data: str | bytes) -> None:
        self._socket.send(data)

    def request(self, type: str, **fields: Any) -> None:
        """A message that the server takes in, or raises LiveError. What arrives meanwhile, media too, is lost."""
        id, self._next_id = self._next_id, self._next_id + 1
        self.send(type, id=id, **fields)
        while True:
            answer = self.receive()
            if isinstance(answer, Media) or answer.get("id") != id:
                continue
            if answer["type"] == "error":
                raise LiveError(answer)
            return

    def receive(self) -> Mapping[str, Any] | Media:
        """The next message or media of the present epoch."""
        while True:
            data = self._socket.recv(self.timeout_s)
            if isinstance(data, str):
                return self._note(json.loads(data))
            kind, epoch, video_frame, num_video_frames = struct.unpack_from(">B3xIII", data)
            media = Media(kind, epoch, video_frame, num_video_frames, data[_HEADER_BYTES:])
            if media.epoch == self.epoch:
                if self.plays and media.num_video_frames:
                    with suppress(ConnectionClosed):  # what came before the end is still to be read
                        self.send("played", epoch=self.epoch, video_frame=media.video_frame + media.num_video_frames)
                return media

    def wait(self, type: str, **fields: Any) -> Mapping[str, Any]:
        """The next message of this type with these fields."""
        while True:
            message = self.receive()
            if not isinstance(message, Media) and message["type"] == type and fields.items() <= message.items():
                return message

    def wait_state(self, state: str) -> None:
        """Until the session is in this state; at once if it is."""
        while self.state != state:
            self.receive()

    def blocks(self, number: int) -> Iterator[ReceivedBlock]:
        """The next blocks with their media."""
        for _ in range(number):
            told = self.wait("block")
            media: list[Media] = []
            while sum(part.num_video_frames for part in media) < told["num_video_frames"]:
                part = self.receive()
                if isinstance(part, Media) and part.num_video_frames:
                    media.append(part)
            yield ReceivedBlock(told, tuple(media))

    def get(self, path: str, **query: Any) -> bytes:
        """What an address of HTTP answers. Raises LiveError."""
        return self._fetch(f"{path}?{urlencode(query)}" if query else path, None)

    def download(self, branch: int = 0, what: str = "mp4") -> bytes:
        """A branch of this session as `mp4`, `jsonl` or `zip`."""
        return self.get(f"/api/session/{self.session}/download", branch=branch, what=what)

    def upload(self, picture: bytes) -> str:
        """The key of an uploaded PNG, JPEG or WebP."""
        key: str = json.loads(self._fetch("/api/upload", picture))["upload"]
        return key

    def _fetch(self, path: str, body: bytes | None) -> bytes:
        request = urllib.request.Request(self.url.rstrip("/") + path, data=body)
        if self.token:
            request.add_header("Authorization", f"Bearer {self.token}")
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_s) as answer:
                content: bytes = answer.read()
                return content
        except urllib.error.HTTPError as error:
            raise LiveError(json.loads(error.read())) from None

    def _note(self, message: dict[str, Any]) -> dict[str, Any]:
        match message["type"]:
            case "session":
                self.session = message["session"]
            case "stream":
                self.epoch = message["epoch"]
            case "state":
                self.state, self.position = message["state"], message.get("position")
            case "branches":
                self.branches = message
        return message


__all__ = ["ConnectionClosed", "LiveClient", "LiveError", "Media", "ReceivedBlock"]
