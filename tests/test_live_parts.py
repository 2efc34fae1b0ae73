"""The parts of the live server that need no server: messages, streams, pictures, who may come in."""

import asyncio
import io
import json
import math
import random
import resource
import time
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from starlette.websockets import WebSocket

from longlive.data.clips import read_clip
from longlive.errors import InputError
from longlive.web.course import Block, Branch, to_png
from longlive.web.guard import Guard
from longlive.web.hall import Hall
from longlive.web.live_session import LiveSession
from longlive.web.messages import Grant, Latents, Made, Picture, Ready, Rebuilt, Start, ToEngine
from longlive.web.protocol import Message, ProtocolError, Throttle, parse
from longlive.web.serve_config import ServeConfig
from longlive.web.server import Conversation, Web
from longlive.web.spool import Spool
from longlive.web.stream import Mp4Stream, one_file
from longlive.web.uploads import Uploads, decode
from longlive.web.viewer import CLOSE_ENDED, CLOSE_REPLACED, CLOSE_SLOW, Viewer


def moving(num_video_frames: int) -> np.ndarray:
    """A bar on a ramp that moves on by two pixels a frame, [V, 32, 48, 3]."""
    ramp = np.broadcast_to(np.linspace(0, 200, 48, dtype=np.uint8)[None, :, None], (32, 48, 3)).copy()
    ramp[:, 8:16, 0] = 255
    return np.stack([np.roll(ramp, 2 * number, axis=1) for number in range(num_video_frames)])


def decoded(mp4: bytes) -> tuple[np.ndarray, list[float]]:
    with av.open(io.BytesIO(mp4)) as container:
        frames = list(container.decode(video=0))
    return np.stack([frame.to_ndarray(format="rgb24") for frame in frames]), [float(frame.time) for frame in frames]


def test_fragments_of_two_streams_are_one_video() -> None:
    frames = moving(33)
    first, second = (Mp4Stream(16, 32, 48, 12) for _ in range(2))
    assert first.init == second.init
    fragments = [first.fragment(frames[:9], 0), first.fragment(frames[9:21], 9), second.fragment(frames[21:], 21)]
    for file in (first.init + b"".join(fragments), one_file(first.init, fragments)):
        found, times = decoded(file)
        assert times == [number / 16 for number in range(33)]
        assert np.abs(found.astype(int) - frames).mean() < 4
    found, times = decoded(second.init + fragments[2])  # a viewer who comes in the middle
    assert times[0] == 21 / 16
    assert np.abs(found.astype(int) - frames[21:]).mean() < 4
    assert first.mime.startswith('video/mp4; codecs="avc1.')


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "bad_json"),
        ("{", "bad_json"),
        ("[" * 100_000, "bad_json"),
        ("1" * 10_000, "bad_json"),
        ('{"type": "played", "epoch": NaN, "video_frame": 1}', "bad_json"),
        ("[]", "bad_message"),
        ("null", "bad_message"),
        ("{}", "bad_message"),
        ('{"type": ["open"]}', "bad_message"),
        ('{"type": "close"}', "bad_message"),
        ('{"type": "pause", "now": true}', "bad_message"),
        ('{"type": "prompt"}', "bad_message"),
        ('{"type": "prompt", "text": 3}', "bad_value"),
        ('{"type": "prompt", "text": " \\n "}', "bad_value"),
        ('{"type": "prompt", "text": "a\\u0000b"}', "bad_value"),
        ('{"type": "prompt", "text": "\\ud800"}', "bad_value"),
        ('{"type": "prompt", "text": "' + "x" * 21 + '"}', "too_long"),
        ('{"type": "played", "epoch": true, "video_frame": 1}', "bad_value"),
        ('{"type": "played", "epoch": 1, "video_frame": -1}', "bad_value"),
        ('{"type": "played", "epoch": 1, "video_frame": 1.5}', "bad_value"),
        ('{"type": "open", "seed": 9223372036854775808}', "bad_value"),
        ('{"type": "open", "format": "gif"}', "bad_value"),
        ('{"type": "open", "upload": "../../etc/passwd' + "x" * 99 + '"}', "bad_value"),
        ('{"type": "ping", "id": "1"}', "bad_value"),
        ('{"type": "ping", "id": -1}', "bad_value"),
    ],
)
def test_malformed_messages_are_refused(text: str, code: str) -> None:
    with pytest.raises(ProtocolError) as refused:
        parse(text, max_prompt_chars=20)
    assert refused.value.code == code
    assert "\n" not in str(refused.value)


def test_well_formed_messages() -> None:
    message = parse('{"type": "prompt", "text": " a\\n  \\ud83d\\ude00 cat ", "id": 7}', max_prompt_chars=20)
    assert (message.type, message.fields, message.id) == ("prompt", {"text": "a 😀 cat"}, 7)
    assert parse('{"type": "restart", "upload": null}', 20).fields == {"upload": None}
    with pytest.raises(ProtocolError) as refused:
        parse('{"type": "select", "branch": "0", "id": 5}', 20)
    assert refused.value.describe()["id"] == 5


def test_throttle_lets_bursts_pass_and_slows_floods() -> None:
    throttle = Throttle(per_s=10, now=0.0)
    assert [throttle.wait_s(0.0) for _ in range(20)] == [0.0] * 20
    assert throttle.wait_s(0.0) == pytest.approx(0.1)
    assert throttle.wait_s(10.0) == 0.0


def test_viewer_that_does_not_read_is_given_up() -> None:
    async def scenario() -> None:
        viewer = Viewer()
        viewer.send_media(b"stale")
        viewer.send({"n": 0})
        viewer.drop_media()
        assert await viewer.next() == {"n": 0}
        for number in range(1000):
            viewer.send({"n": number})
        assert viewer.is_slow
        assert await viewer.next() is None
        assert viewer.close_code == CLOSE_SLOW

    asyncio.run(scenario())


SPOOL = Spool()


def block(number: int, prompt: str) -> Block:
    chunk = Latents(bytes(8), (1, 3, 1, 1, 1), "float32")
    first = 12 * number - 3 if number else 0
    content = SPOOL.keep([chunk.data, bytes(number), b""])
    return Block(3 * number, 3, first, 12 if number else 9, prompt, (chunk.shape,), chunk.dtype, content)


def test_a_spool_gives_back_what_it_was_given_and_fills_its_holes() -> None:
    spool, rng = Spool(), random.Random(0)
    given = {number: [rng.randbytes(rng.randrange(300)) for _ in range(3)] for number in range(60)}
    kept = {number: spool.keep(parts) for number, parts in given.items()}
    most = sum(found.num_bytes for found in kept.values())
    for number in range(60, 600):
        del kept[rng.choice(list(kept))]
        given[number] = [rng.randbytes(rng.randrange(300)) for _ in range(3)]
        kept[number] = spool.keep(given[number])
    for number, found in kept.items():
        assert [found.part(0), found.part(1), found.part(-1)] == given[number]
        assert found.num_bytes == sum(map(len, given[number]))
    assert spool.read(0, 10**7) != b""
    assert len(spool.read(0, 10**7)) < 2 * most, "what is forgotten makes no room"


def test_branches_share_their_past() -> None:
    branch = Branch(0, None, 0, seed=5, prompt="C", picture=None, blocks=[block(i, p) for i, p in enumerate("AABBC")])
    assert (branch.num_frames, branch.num_video_frames) == (15, 57)
    assert json.loads(branch.script()) == {
        "prompts": ["A", "B", "C"],
        "switch_frame_indices": [6, 12],
        "seed": 5,
        "num_output_frames": 15,
    }
    fork = branch.fork(1, 10, None)  # inside the fourth block
    assert (fork.fork_frame, fork.num_frames, fork.prompt) == (9, 9, "B")
    assert fork.blocks[0] is branch.blocks[0]
    assert branch.fork(2, 0, None).prompt == "A"
    assert branch.fork(2, 15, "D").prompt == "D"
    found = branch.block_at(4)
    assert found is not None
    assert found.frame == 3
    assert branch.block_at(15) is None
    fork.blocks.append(block(3, "D"))
    assert branch.blocks[3].prompt == "B"


class Desk:
    """All that a session has around it: an engine of which nothing is seen but what it is sent."""

    engine_state = "ready"

    def __init__(self, fps: int, **changes: Any) -> None:
        self.config = ServeConfig(**changes)
        self.info = Ready("tiny", 32, 32, fps, 3, 4, "video/mp4", {})
        self.granted: list[int] = []
        self.num_started = 0

    def send(self, message: ToEngine) -> None:
        self.num_started += isinstance(message, Start)
        if isinstance(message, Grant):
            self.granted.append(message.num_frames)
            assert len(self.granted) < 100, "it grants without end"

    def request_place(self, session: LiveSession) -> None:
        session.place = "active"
        session.begin()

    def queue_position(self, session: LiveSession) -> int:
        raise NotImplementedError

    def picture(self, key: str) -> Picture:
        raise NotImplementedError

    def end(self, session: LiveSession, close_code: int) -> None:
        raise NotImplementedError


@pytest.mark.parametrize("played", [0, 1, 10, 2**31 - 1])
@pytest.mark.parametrize("fps", [1, 16, 10**6])  # so a block lasts 12 s, 0.75 s, or less than it takes to make it
@pytest.mark.parametrize("picture", [None, Picture(b"", 32, 32)])
def test_no_more_than_two_blocks_are_under_way(picture: Picture | None, fps: int, played: int) -> None:
    desk = Desk(fps)
    session = LiveSession(desk, "mp4", 0, "A", picture)
    session.attach(Viewer())
    num_first = 0 if picture is None else 1
    session.take(Rebuilt(session.key, 1, b""))
    assert desk.granted[:1] == [num_first + 3]  # the viewer has nothing
    for number in range(5):
        if desk.granted[-1] == session.branch.num_frames:
            break  # it waits for the viewer
        shapes = [1, 3] if picture is not None and number == 0 else [3]
        chunks = tuple(Latents(b"", (1, num_frames, 1, 1, 1), "float32") for num_frames in shapes)
        session.take(Made(session.key, 1, "A", chunks, b"", b"", ()))
        session.obey(Message("played", {"epoch": 1, "video_frame": played}, None))
        assert desk.granted[-1] - session.branch.num_frames in (0, 3, 6)
    assert desk.granted == sorted(set(desk.granted))
    if fps == 10**6 or played > 10**6:
        assert session.branch.num_frames == num_first + 15  # it has never waited
    elif fps == 1:
        assert session.branch.num_frames < num_first + 15


def test_session_is_not_idle_while_a_block_is_made() -> None:
    """However long it takes: its viewer waits for it."""
    desk = Desk(fps=1)
    session = LiveSession(desk, "mp4", 0, "A", None)
    session.attach(Viewer())
    later = time.monotonic() + 1000
    assert session.idle_s(later) == 0
    session.take(Rebuilt(session.key, 1, b""))
    assert session.idle_s(later) == 0
    while desk.granted[-1] > session.branch.num_frames:
        assert session.idle_s(later) == 0
        session.take(Made(session.key, 1, "A", (Latents(b"", (1, 3, 1, 1, 1), "float32"),), b"", b"", ()))
    assert session.idle_s(later) > 900


def test_session_ends_with_a_message_where_the_disk_is_full() -> None:
    ended = []

    class FullDesk(Desk):
        def end(self, session: LiveSession, close_code: int) -> None:
            ended.append(session)

    viewer = Viewer()
    session = LiveSession(FullDesk(16), "mp4", 0, "A", None)
    session.attach(viewer)
    session.take(Rebuilt(session.key, 1, b""))
    chunk = Latents(b"", (1, 3, 1, 1, 1), "float32")
    session.take(Made(session.key, 1, "A", (chunk,), bytes(500), b"", ()))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        session.take(Made(session.key, 1, "A", (chunk,), bytes(5000), b"", ()))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert ended == [session]
    assert session.branch.num_frames == 3

    async def told() -> list[dict[str, Any]]:
        viewer.close(CLOSE_SLOW)
        messages = []
        while (message := await viewer.next()) is not None:
            if not isinstance(message, bytes):
                messages.append(dict(message))
        return messages

    errors = [message for message in asyncio.run(told()) if message["type"] == "error"]
    assert [error["code"] for error in errors] == ["engine"]
    assert "cannot be kept" in errors[0]["message"]


def test_session_that_holds_too_much_is_full() -> None:
    """Nothing more is made until something else is begun; what was told of it is heard all the same."""
    desk = Desk(16, max_session_mb=1)
    session = LiveSession(desk, "mp4", 0, "A", None)
    session.attach(Viewer())
    session.take(Rebuilt(session.key, 1, b""))
    chunk = Latents(b"", (1, 3, 1, 1, 1), "float32")
    session.take(Made(session.key, 1, "A", (chunk,), bytes(500_000), b"", ()))
    assert session.state == "playing"
    session.take(Made(session.key, 1, "A", (chunk,), bytes(500_000), b"", ()))
    assert session.state == "full"
    granted = list(desk.granted)
    session.obey(Message("prompt", {"text": "B"}, None))
    session.obey(Message("played", {"epoch": 1, "video_frame": 21}, None))
    assert (session.state, desk.granted) == ("full", granted)
    session.obey(Message("restart", {"seed": 1}, None))
    assert session.state == "full"  # the other branch is kept
    assert desk.num_started == 1
    session.obey(Message("delete", {"branch": 0}, None))
    assert (session.state, desk.num_started) == ("rebuilding", 2)


def test_a_branch_without_a_prompt_is_idle() -> None:
    """Whatever was being rebuilt when it was selected."""
    session = LiveSession(Desk(16), "mp4", 0, None, None)
    session.attach(Viewer())
    session.obey(Message("restart", {"seed": 1}, None))
    session.obey(Message("prompt", {"text": "A"}, None))
    assert (session.state, session.idle_s(math.inf)) == ("rebuilding", 0.0)
    session.obey(Message("select", {"branch": 0}, None))
    assert (session.state, session.idle_s(math.inf)) == ("ready", math.inf)


def take_place(hall: Hall) -> tuple[LiveSession, Viewer]:
    viewer = Viewer()
    return hall.open(Message("open", {}, None), viewer), viewer


def test_a_viewer_that_comes_again_keeps_its_place_in_the_queue() -> None:
    hall = Hall(ServeConfig(max_sessions=1, max_queue=2), frozenset(), print)
    take_place(hall)
    (second, viewer), (third, _) = take_place(hall), take_place(hall)
    again = Viewer()
    hall.open(Message("open", {"session": second.key}, None), again)  # no place is left in the queue
    assert viewer.close_code == CLOSE_REPLACED
    assert (second.place, hall.queue_position(second), hall.queue_position(third)) == ("queued", 1, 2)
    hall.leave(second, viewer)
    assert hall.queue_position(third) == 2
    hall.leave(second, again)
    assert (second.place, hall.queue_position(third)) == ("none", 1)


def test_who_is_away_keeps_its_place_while_others_are_free() -> None:
    hall = Hall(ServeConfig(max_sessions=2), frozenset(), print)
    first, viewer = take_place(hall)
    hall.leave(first, viewer)
    second, _ = take_place(hall)
    assert (first.place, second.place) == ("active", "active")
    third, _ = take_place(hall)
    assert (first.place, second.place, third.place) == ("none", "active", "active")


def test_nothing_is_heard_after_the_end() -> None:
    hall, viewer = Hall(ServeConfig(), frozenset(), print), Viewer()
    conversation = Conversation(hall, viewer)
    for message in ("open", "end", "prompt"):
        conversation.take(json.dumps({"type": message} | ({"text": "A"} if message == "prompt" else {})))
    assert viewer.close_code == CLOSE_ENDED
    assert conversation.session is not None
    assert conversation.session.place == "none"
    assert hall.health()["sessions"] == hall.health()["active"] == 0


def test_who_waits_for_the_models_is_told_again_until_it_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longlive.web.server._LOADING_TOLD_S", 0.0)
    hall, told = Hall(ServeConfig(), frozenset(), print), list[Any]()

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(event: Any) -> None:
        if len(told) == 4:
            raise OSError("the viewer has gone")
        told.append(event)

    asyncio.run(Web(hall).session(WebSocket({"type": "websocket"}, receive, send)))
    assert told[0]["type"] == "websocket.accept"
    assert [json.loads(event["text"]) for event in told[1:]] == 3 * [{"type": "state", "state": "loading"}]
    assert hall.health()["sessions"] == 0


def picture_file(format: str, size: tuple[int, int] = (90, 40), **options: Any) -> bytes:
    ramp = np.linspace(0, 255, size[0] * size[1] * 3).astype(np.uint8).reshape(size[1], size[0], 3)
    target = io.BytesIO()
    Image.fromarray(ramp).save(target, format=format, **options)
    return target.getvalue()


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_uploaded_picture_is_what_a_clip_of_it_would_be(format: str, tmp_path: Path) -> None:
    data = picture_file(format)
    picture, size = decode(data, 32, 48, 10_000)
    assert size == (90, 40)
    path = tmp_path / f"picture.{format.lower()}"
    path.write_bytes(data)
    assert picture.data == read_clip(path, 32, 48, 16).numpy().tobytes()
    again = tmp_path / "start.png"
    again.write_bytes(to_png(picture))
    assert picture.data == read_clip(again, 32, 48, 16).numpy().tobytes()


def bomb() -> bytes:
    """A small PNG that says it is 50,000 x 50,000."""
    data = bytearray(picture_file("PNG"))
    data[16:24] = (50_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "bad_picture"),
        (b"\x89PNG\r\n\x1a\n", "bad_picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "bad_picture"),
        (picture_file("GIF"), "bad_picture"),
        (picture_file("BMP"), "bad_picture"),
        (picture_file("PNG")[:-200], "bad_picture"),
        (picture_file("JPEG")[:300], "bad_picture"),
        (picture_file("WEBP")[:60], "bad_picture"),
        (picture_file("PNG", size=(400, 400)), "too_large"),
        (bomb(), "too_large"),
    ],
)
def test_bad_uploads_are_refused(data: bytes, code: str) -> None:
    with pytest.raises(ProtocolError) as refused:
        decode(data, 32, 48, max_px=100_000)
    assert refused.value.code == code


def test_only_the_newest_uploads_are_kept() -> None:
    uploads = Uploads(max_kept=2, keep_s=1000)
    pictures = [Picture(bytes(3), 1, 1) for _ in range(3)]
    keys = [uploads.add(picture) for picture in pictures]
    assert uploads.get(keys[2]) is pictures[2]
    with pytest.raises(ProtocolError, match="not there"):
        uploads.get(keys[0])
    brief = Uploads(max_kept=2, keep_s=-1)
    with pytest.raises(ProtocolError):
        brief.get(brief.add(pictures[0]))


def answer(config: ServeConfig, path: str, kind: str = "http", query: str = "", **headers: str) -> Any:
    """What the guard answers to a request, or "passed"."""
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        sent.append("passed")

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    scope = {"type": kind, "method": "GET", "path": path, "query_string": query.encode()}
    scope["headers"] = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    asyncio.run(Guard(app, config)(scope, receive, send))
    first = sent[0]
    return first if first == "passed" else first.get("status", first["type"])


LOCAL = ServeConfig()
REMOTE = replace(LOCAL, host="0.0.0.0", token="s3cret ü")


@pytest.mark.parametrize(
    ("config", "path", "headers", "expected"),
    [
        (LOCAL, "/", {"Host": "localhost:9000"}, "passed"),
        (LOCAL, "/api/info", {"Host": "127.0.0.1:8000", "Origin": "http://127.0.0.1:8000"}, "passed"),
        (LOCAL, "/api/info", {"Host": "[::1]:8000"}, "passed"),
        (LOCAL, "/api/info", {"Host": "evil.example"}, 403),
        (LOCAL, "/", {"Host": "127.0.0.1.evil.example"}, 403),
        (LOCAL, "/", {"Host": "[::1"}, 403),
        (LOCAL, "/", {}, 403),
        (LOCAL, "/api/info", {"Host": "localhost", "Origin": "http://evil.example"}, 403),
        (LOCAL, "/api/info", {"Host": "localhost:8000", "Origin": "http://localhost:9000"}, 403),
        (LOCAL, "/api/info", {"Host": "localhost:8000", "Origin": "null"}, 403),
        (LOCAL, "/api/info", {"Host": "localhost:8000", "Origin": "http://[::1"}, 403),
        (replace(REMOTE, allowed_hosts=("live.example",)), "/", {"Host": "live.example:443"}, "passed"),
        (replace(REMOTE, allowed_hosts=("live.example",)), "/", {"Host": "other.example"}, 403),
        (REMOTE, "/", {"Host": "anything"}, "passed"),
        (REMOTE, "/api/health", {"Host": "anything"}, "passed"),
        (REMOTE, "/api/info", {"Host": "anything"}, 401),
        (REMOTE, "/api/session/x/download", {"Host": "anything", "Authorization": "Bearer wrong"}, 401),
    ],
)
def test_guard(config: ServeConfig, path: str, headers: dict[str, str], expected: Any) -> None:
    assert answer(config, path, **headers) == expected
    over_websocket = answer(config, path, kind="websocket", **headers)
    assert over_websocket == ("passed" if expected == "passed" else "websocket.close")


def test_guard_takes_the_token_from_header_or_query() -> None:
    config = replace(REMOTE, token="s3cret")
    assert answer(config, "/api/info", Host="x", Authorization="Bearer s3cret") == "passed"
    assert answer(config, "/api/info", query="token=s3cret", Host="x") == "passed"
    assert answer(config, "/api/info", query="token=s3cre", Host="x") == 401
    assert answer(config, "/api/session", kind="websocket", query="token=s3cret", Host="x") == "passed"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "example.org"])
def test_others_need_a_token(host: str) -> None:
    with pytest.raises(InputError, match="token=SECRET"):
        replace(LOCAL, host=host)
    assert replace(LOCAL, host=host, token="x").token == "x"
    for loopback in ("127.0.0.1", "127.1.2.3", "::1", "[::1]", "localhost"):
        assert replace(LOCAL, host=loopback).token is None


@pytest.mark.parametrize("name", ["idle_s", "forget_s"])
def test_times_have_bounds(name: str) -> None:
    for value in (0.0, -1.0, 1e-9, math.inf, math.nan):
        with pytest.raises(InputError) as refused:
            ServeConfig(**{name: value})
        assert str(refused.value).startswith(f"{name}")
        assert "between 0.1 and" in str(refused.value)
        assert "\n" not in str(refused.value)
    assert getattr(ServeConfig(**{name: 0.1}), name) == 0.1
