"""The live server as viewers meet it: a real server on a free port, the built-in model in a real engine process."""

import contextlib
import gc
import http.client
import io
import json
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
import zipfile
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import av
import pytest
import torch
import uvicorn
from PIL import Image
from torch import Tensor
from websockets.exceptions import ConnectionClosed, InvalidStatus

from longlive.build import choose_device, choose_model, load_models, load_scripts, make_session_config
from longlive.config import InferenceConfig, load_config
from longlive.inference.pipeline import load_clip, play
from longlive.inference.session import Past, Session
from longlive.web.client import LiveClient, LiveError, Media
from longlive.web.engine import picture_settings, to_tensor, warm_up
from longlive.web.hall import Hall
from longlive.web.serve_config import ServeConfig
from longlive.web.server import make_app
from longlive.web.terminal import live

ROOT = Path(__file__).parents[1]
PATIENCE_S = 120.0  # after which something hangs; a loaded machine may need 30 to start an engine
SETTINGS: dict[str, Any] = {  # small and quick
    "model_name": "tiny",
    "height": 32,
    "width": 32,
    "denoising_step_list": (1000, 500),
    "max_sessions": 1,
    "max_queue": 2,
    "max_kept": 4,
    "idle_s": 1.0,
    "max_branches": 3,
    "max_messages_per_s": 10_000.0,
    "max_message_bytes": 4096,
    "max_prompt_chars": 100,
    "max_upload_bytes": 100_000,
    "max_upload_px": 100_000,
    "max_video_s": 9.0,
}
REPLIES = {"hello", "session", "state", "branches", "stream", "block", "switch", "notice", "ok", "pong", "error"}
PROTOCOL = (ROOT / "docs" / "PROTOCOL.md").read_text(encoding="utf-8")
RED, BLUE, GREEN = (f"a big {colour} circle moves left on a black background" for colour in ("red", "blue", "green"))


class Server:
    """A server in a thread of its own, its engine in a process."""

    def __init__(self, **changes: Any) -> None:
        self.failed: Future[str] = Future()
        self.hall = Hall(ServeConfig(**{**SETTINGS, **changes}), frozenset(), self.failed.set_result)
        listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{listening.getsockname()[1]}"
        self.url = f"http://{self.address}"
        settings: dict[str, Any] = {"log_config": None, "ws_max_size": self.hall.config.max_message_bytes}
        self._server = uvicorn.Server(uvicorn.Config(make_app(self.hall), timeout_graceful_shutdown=1, **settings))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listening]}, daemon=True)
        self._thread.start()

    def client(self, **changes: Any) -> LiveClient:
        return LiveClient(self.url, timeout_s=PATIENCE_S, **changes)

    def health(self) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(self.client().get("/api/health"))
        return told

    def wait_health(self, **expected: Any) -> None:
        """Ask until it says so."""
        deadline = time.monotonic() + PATIENCE_S
        while not expected.items() <= (found := self.health()).items():
            assert time.monotonic() < deadline, found

    def latents(self, client: LiveClient, branch: int) -> list[Tensor]:
        """What the server keeps of a branch, by block or picture."""
        assert client.session is not None
        return [to_tensor(chunk) for _, chunk in self.hall.find(client.session).find_branch(branch).past()]

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(PATIENCE_S)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """In the engines too, so that they compute what these tests do, bit for bit (see conftest.py)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.stop()


@pytest.fixture
def client(server: Server) -> Iterator[LiveClient]:
    """A viewer alone with the server."""
    with server.client() as viewer:
        yield viewer
    end(server, viewer.session)
    server.wait_health(sessions=0, active=0, queued=0)


def end(server: Server, key: str | None) -> None:
    """Forget a session, if it is still there."""
    if key is not None:
        with contextlib.suppress(LiveError), server.client() as viewer:
            viewer.open(session=key)
            viewer.request("end")


def decode(mp4: bytes) -> list[tuple[float, bytes]]:
    """Time and pixels of every frame."""
    with av.open(io.BytesIO(mp4)) as container:
        return [(frame.time, frame.to_ndarray(format="rgb24").tobytes()) for frame in container.decode(video=0)]


def replay(archive: bytes, folder: Path) -> list[Tensor]:
    """The latents that the scripts would make from a downloaded zip."""
    with zipfile.ZipFile(io.BytesIO(archive)) as files:
        files.extractall(folder)
    config, explicit = load_config(InferenceConfig, folder / "settings.yaml", [f"data_path={folder}/script.jsonl"])
    config = choose_model(config, explicit)
    (script,) = load_scripts(config)
    session_config = make_session_config(config)
    session = Session(load_models(config, choose_device("cpu")), session_config, [script.seed or 0])
    clip = load_clip(script.start_from, session_config, config.fps)
    return [chunk.latents for chunk in play(session, [script], clip)]


def begins_with(whole: list[Tensor], part: list[Tensor]) -> bool:
    """While something is compared another block may come."""
    return len(part) <= len(whole) and all(map(torch.equal, whole, part))


def picture() -> bytes:
    target = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").save(target, format="PNG")
    return target.getvalue()


def test_stream_is_the_download(server: Server, client: LiveClient) -> None:
    assert client.hello["height"] == 32
    client.send("open", prompt=RED, seed=7)
    media: list[Media] = []
    while sum(part.num_video_frames for part in media) < 33:
        message = client.receive()
        if isinstance(message, Media):
            media.append(message)
    assert [(part.kind, part.video_frame, part.num_video_frames) for part in media] == [
        *((1, 0, 0), (2, 0, 9), (2, 9, 12), (2, 21, 12))
    ]
    streamed = decode(b"".join(part.data for part in media))
    assert [time for time, _ in streamed] == [number / 16 for number in range(33)]
    assert decode(client.download())[:33] == streamed
    thumbnail = client.get(f"/api/session/{client.session}/thumbnail", branch=0, frame=4)
    assert Image.open(io.BytesIO(thumbnail)).size == (32, 32)


def test_a_long_story_can_be_replayed(server: Server, client: LiveClient, tmp_path: Path) -> None:
    """Prompts, rewinding, parking, another viewer, and the engine's death leave no trace in what is made."""
    client.open(prompt=RED, seed=5)
    list(client.blocks(4))
    client.request("prompt", text=BLUE)
    switch = client.wait("switch", text=BLUE)
    assert switch["seconds"] > 0
    list(client.blocks(2))

    client.request("rewind", branch=0, frame=7)
    stream = client.wait("stream")
    assert (stream["branch"], stream["frame"], stream["video_frame"]) == (1, 6, 21)
    list(client.blocks(3))
    assert begins_with(server.latents(client, 0), server.latents(client, 1)[:4])

    os.kill(server.hall.engine_pid or 0, signal.SIGKILL)
    client.wait("state", state="restarting")
    num_frames = sum(chunk.shape[1] for chunk in server.latents(client, 1))
    assert client.wait("stream")["frame"] == num_frames
    list(client.blocks(1))

    client.request("pause")
    client.wait_state("parked")
    client.request("prompt", text=GREEN)
    client.wait_state("paused")
    client.request("resume")
    assert client.wait("switch")["text"] == GREEN
    list(client.blocks(1))

    with server.client() as other:
        other.open(session=client.session)
        with pytest.raises(ConnectionClosed):
            client.wait_state("ended")
        assert client.close_code == 4001
        list(other.blocks(1))
        other.request("select", branch=0)
        assert other.wait("stream")["branch"] == 0
        other.request("pause")
        for branch in (0, 1):
            found = replay(other.download(branch, "zip"), tmp_path / str(branch))
            assert len(found) >= 6
            assert begins_with(server.latents(other, branch), found)
        prompts = [json.loads(other.download(branch, "jsonl"))["prompts"] for branch in (0, 1)]
        assert prompts == [[RED, BLUE], [RED, GREEN]]
        other.request("end")


def test_picture_to_start_from(server: Server, client: LiveClient, tmp_path: Path) -> None:
    client.open(prompt=RED, seed=3, upload=client.upload(picture()))
    first, second = client.blocks(2)
    assert [block.told["num_video_frames"] for block in (first, second)] == [13, 12]
    client.request("rewind", branch=0, frame=4, prompt=BLUE)
    list(client.blocks(2))
    client.request("restart", upload=None)
    assert client.wait("stream")["frame"] == 0
    (without,) = client.blocks(1)
    assert without.told["num_video_frames"] == 9
    found = replay(client.download(1, "zip"), tmp_path)
    assert found[0].shape[1] == 1
    assert begins_with(server.latents(client, 1), found)
    assert not torch.equal(found[1], server.latents(client, 2)[0])


@pytest.mark.slow
@torch._dynamo.config.patch(recompile_limit=64)
def test_nothing_is_compiled_for_a_viewer() -> None:
    """Once the engine is warm: neither for blocks nor for switches, nor to take up a session again."""
    torch.compiler.reset()
    settings = [
        "model_name=tiny",
        "height=32",
        "width=32",
        "denoising_step_list=1000",
        "model_kwargs.local_attn_size=6",
    ]
    config = choose_model(*load_config(InferenceConfig, ROOT / "configs" / "longlive_inference.yaml", settings))
    models, session_config = load_models(config, choose_device("cpu")), make_session_config(config)
    for module in (*models.generator.blocks, models.vae.decoder):
        module.compile(backend="eager")
    warm_up(models, session_config)
    with torch.compiler.set_stance("fail_on_recompile"):
        session = Session(models, session_config, [1])
        past = []
        for prompt in (RED, BLUE, BLUE, RED, GREEN, GREEN):
            session.set_prompt(prompt)
            past.append(Past((prompt,), session.next_chunk().latents))
        again = Session(models, session_config, [1])
        list(again.resume(past))
        assert torch.equal(again.next_chunk().latents, session.next_chunk().latents)
    torch.compiler.reset()


def test_pictures_instead_of_mp4(client: LiveClient) -> None:
    client.open(prompt=RED, format="webp")
    first, second = client.blocks(2)
    assert [part.video_frame for part in (*first.media, *second.media)] == list(range(21))
    assert all(Image.open(io.BytesIO(part.data)).size == (32, 32) for part in first.media)


def test_branches(client: LiveClient) -> None:
    client.open(prompt=RED, seed=1)
    list(client.blocks(2))
    client.request("restart", seed=2)
    client.request("restart", seed=2, prompt=BLUE)
    with pytest.raises(LiveError, match="limit: a session may have 3 branches"):
        client.request("rewind", branch=0, frame=0)
    client.request("delete", branch=1)
    with pytest.raises(LiveError, match="bad_value: frame 99"):
        client.request("rewind", branch=0, frame=99)
    with pytest.raises(LiveError, match="no_branch: branch 1: this session has 0, 2"):
        client.request("select", branch=1)
    with pytest.raises(LiveError, match="bad_value: branch 2"):
        client.request("delete", branch=2)
    client.request("rewind", branch=0, frame=3)
    assert client.branches is not None
    assert client.branches["selected"] == 3
    told = {branch["branch"]: branch for branch in client.branches["branches"]}
    assert told.keys() == {0, 2, 3}
    assert (told[3]["parent"], told[3]["fork_frame"], told[3]["seed"]) == (0, 3, 1)
    assert told[3]["prompts"] == [{"frame": 0, "video_frame": 0, "text": RED}]
    assert told[2]["seed"] == 2


def test_branch_that_is_long_enough_is_full(client: LiveClient) -> None:
    client.open(prompt=RED)
    client.wait_state("full")
    client.request("restart")
    (block,) = client.blocks(1)
    assert (block.told["branch"], block.told["frame"]) == (1, 0)


def test_viewer_that_stands_still_is_not_flooded(server: Server) -> None:
    with server.client(plays=False) as client:
        client.open(prompt=RED)
        made, slowest_s = 0, 0.0
        while client.state != "parked":
            message = client.receive()
            if isinstance(message, Media):
                made += message.num_video_frames
            elif message["type"] == "block":
                slowest_s = max(slowest_s, message["seconds"])
        assert 0 < made <= 16 * (client.hello["ahead_s"] + 2 * slowest_s) + 12
        client.send("played", epoch=client.epoch, video_frame=made)
        client.request("resume")
        assert client.wait("stream")["video_frame"] == made
        client.request("end")


def test_queue(server: Server) -> None:
    """Who waits is told how many go first, and again whenever somebody has gone; who finds no place is told so."""
    with server.client() as first, server.client() as second, server.client() as third, server.client() as fourth:
        first.open(prompt=RED)
        second.open(prompt=RED)
        third.open(prompt=RED)
        assert [(viewer.state, viewer.position) for viewer in (second, third)] == [("queued", 1), ("queued", 2)]
        assert server.health().items() >= {"sessions": 3, "active": 1, "queued": 2}.items()
        with pytest.raises(LiveError, match="busy: all places are taken, and so are those in the queue"):
            fourth.open(prompt=RED)
        with pytest.raises(ConnectionClosed):
            fourth.receive()
        assert fourth.close_code == 1013
        assert server.health()["sessions"] == 3  # nothing of it is left
        first.request("end")
        assert third.wait("state")["position"] == 1
        list(second.blocks(1))
        second.request("end")
        list(third.blocks(1))
        third.request("end")
    server.wait_health(sessions=0, active=0, queued=0)


def test_place_of_a_session_that_nobody_watches_is_free(server: Server) -> None:
    with server.client() as second, server.client() as third:
        second.open(prompt=RED)
        second.request("pause")  # and is still there when the next one comes
        third.open(prompt=RED)
        third.wait_state("queued")
        second.__exit__(None, None, None)
        list(third.blocks(1))
        third.request("end")
    with server.client() as back:
        back.open(session=second.session)
        back.wait_state("paused")
        back.request("end")
    server.wait_health(sessions=0, active=0, queued=0)


def test_parked_session_that_finds_no_place_is_told_so(server: Server) -> None:
    with server.client() as parked:
        parked.open(prompt=RED)
        parked.request("pause")
        parked.wait_state("parked")
        with server.client() as active, server.client() as first, server.client() as second:
            for viewer in (active, first, second):
                viewer.open(prompt=RED)
            with pytest.raises(LiveError, match="busy"):
                parked.request("resume")
            assert parked.state == "parked"
            first.request("end")
            parked.request("resume")
            parked.wait_state("queued")
            assert parked.position == 2
            active.request("end")
            second.request("end")
            list(parked.blocks(1))
        parked.request("end")
    server.wait_health(sessions=0, active=0, queued=0)


def pictures(client: LiveClient, end: int) -> dict[int, bytes]:
    """What comes, by video frame, until `end`."""
    found: dict[int, bytes] = {}
    while end - 1 not in found:
        part = client.receive()
        if isinstance(part, Media):
            found[part.video_frame] = part.data
    return found


def test_parked_session_comes_back_with_the_same_pictures(server: Server) -> None:
    with server.client(plays=False) as client:
        client.open(prompt=RED, seed=9, format="webp")
        client.wait_state("parked")  # nothing is played
        client.request("resume")
        begin = client.wait("stream")["video_frame"]
        client.plays = True
        found = pictures(client, begin + 36)
        assert min(found) == begin
        client.request("end")
    with server.client() as unbroken:
        unbroken.open(prompt=RED, seed=9, format="webp")
        expected = pictures(unbroken, begin + 36)
        unbroken.request("end")
    assert found == {number: expected[number] for number in found}


def test_session_that_nobody_comes_back_to_is_forgotten() -> None:
    server = Server(forget_s=0.1)
    with server.client() as client:
        client.open(prompt=RED)
        list(client.blocks(1))
        assert server.health()["kept_bytes"] > 0
    server.wait_health(sessions=0, kept_bytes=0)
    with server.client() as back, pytest.raises(LiveError, match="no_session"):
        back.open(session=client.session)
    server.stop()


def test_connections_come_and_go(server: Server) -> None:
    """What is forgotten is freed, and no more is kept than what may be come back to."""
    sessions = {}
    for number in range(10):
        with server.client() as client:
            client.open(prompt=RED, seed=number)
            list(client.blocks(number % 2))
            assert client.session is not None
            sessions[client.session] = weakref.ref(server.hall.find(client.session))
    assert len(sessions) == 10
    server.wait_health(sessions=4)  # max_kept; the others were forgotten
    assert server.health()["kept_bytes"] > 0
    for key in sessions:
        end(server, key)
    server.wait_health(sessions=0, active=0, kept_bytes=0)
    deadline = time.monotonic() + PATIENCE_S
    while any(session() for session in sessions.values()):
        assert time.monotonic() < deadline
        gc.collect()


@pytest.mark.parametrize(
    "origin",
    [
        *("http://evil.example", "http://localhost:{port}", "http://127.0.0.1", "null", "", "file://", "http://[::1"),
        *("http://127.0.0.1:{port}.evil.example", "http://127.0.0.1:{port}@evil.example"),
        *("http://evil.example/127.0.0.1:{port}", "http://evil.example#127.0.0.1:{port}", "127.0.0.1:{port}"),
    ],
)
def test_other_sites_are_kept_out(server: Server, client: LiveClient, origin: str) -> None:
    """Neither a new session nor, knowing its key, one that is there."""
    client.open(prompt=RED)
    list(client.blocks(1))
    origin = origin.format(port=server.address.rpartition(":")[2])
    with pytest.raises(InvalidStatus, match="403"), server.client(origin=origin):
        pass
    for method, path in (
        *(("GET", f"/api/session/{client.session}/{what}?branch=0") for what in ("download", "thumbnail")),
        *(("GET", "/"), ("GET", "/api/info"), ("GET", "/api/health"), ("POST", "/api/upload")),
    ):
        status, body = raw_request(server, method, path, picture() if method == "POST" else None, Origin=origin)
        assert (status, json.loads(body)["code"]) == (403, "forbidden")


def test_its_own_page_may_come_in(server: Server) -> None:
    with server.client(origin=server.url) as client:
        assert client.hello["type"] == "hello"


def raw_request(server: Server, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(server.address)
    connection.putrequest(method, path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name, value)
    if body is not None:
        connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body)
    response = connection.getresponse()
    return response.status, response.read()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/../longlive/errors.py", 404),
        ("GET", "/%2e%2e/longlive/errors.py", 404),
        ("GET", "/..%2f..%2f..%2fetc/passwd", 404),
        ("GET", "//etc/passwd", 404),
        ("GET", "/api/session/..%2f..%2fetc/download", 404),
        ("GET", "/api/session/none/download?branch=0", 404),
        ("GET", "/api/session/none/thumbnail?branch=0&frame=-1", 404),
        ("GET", "/api/none", 404),
        ("GET", "/api/upload", 405),
        ("POST", "/api/health", 405),
    ],
)
def test_addresses_that_are_not_there(server: Server, method: str, path: str, status: int) -> None:
    found, body = raw_request(server, method, path)
    assert found == status
    error = json.loads(body)
    assert error["type"] == "error"
    assert "\n" not in error["message"]


def test_http_refuses_other_hosts_and_bad_pictures(server: Server) -> None:
    assert raw_request(server, "GET", "/api/health", Host="evil.example")[0] == 403
    assert raw_request(server, "POST", "/api/upload", picture(), Origin="http://evil.example")[0] == 403
    for body, status, code in (
        (b"GIF89a" + bytes(100), 400, "bad_picture"),
        (bytes(100_001), 413, "too_large"),
        (picture()[:-100], 400, "bad_picture"),
    ):
        found, answer = raw_request(server, "POST", "/api/upload", body)
        assert (found, json.loads(answer)["code"]) == (status, code)
    assert raw_request(server, "POST", "/api/upload", picture())[0] == 200
    connection = http.client.HTTPConnection(server.address)
    connection.request("GET", "/")
    response = connection.getresponse()
    assert response.status == 200
    assert "default-src 'none'" in (response.getheader("Content-Security-Policy") or "")


def test_order_of_messages(client: LiveClient) -> None:
    with pytest.raises(LiveError, match="out_of_order: prompt"):
        client.request("prompt", text=RED)
    with pytest.raises(LiveError, match="no_session"):
        client.request("open", session="nobody")
    with pytest.raises(LiveError, match="no_upload"):
        client.request("open", upload="nothing")
    client.open()
    client.wait_state("ready")
    with pytest.raises(LiveError, match="out_of_order: open"):
        client.request("open")
    client.request("pause")
    client.request("resume")
    client.request("prompt", text="x" * 100)
    assert "does not know" in client.wait("notice")["message"]
    with pytest.raises(LiveError, match="too_long"):
        client.request("prompt", text="x" * 101)
    list(client.blocks(1))


def fuzz(rng: random.Random) -> str | bytes:
    """A message that is malformed, oversized, out of order, or, at times, right."""
    kinds = ["open", "prompt", "pause", "resume", "played", "rewind", "restart", "select", "delete", "ping", "end ", ""]
    names = ["type", "id", "text", "epoch", "video_frame", "branch", "frame", "prompt", "seed", "upload", "session"]
    values = [None, True, 0, 1, -1, 2**31, 2**70, 1e308, "", "x", RED, "\u0000", "😀" * 50, "x" * 200, [], [[]], {}]
    message = {rng.choice(names): rng.choice(values) for _ in range(rng.randrange(4))}
    message["type"] = rng.choice(kinds)
    text = json.dumps(message)
    match rng.randrange(12):
        case 0:
            return text[: rng.randrange(len(text))]
        case 1:
            return rng.randbytes(rng.randrange(50))
        case 2:
            return "".join(chr(rng.randrange(1, 0xD000)) for _ in range(20))
        case 3:
            return "[" * rng.randrange(4000)
        case 4:
            return json.dumps({"type": "prompt", "text": "x" * 8000})  # closes the connection
        case 5:
            return json.dumps({"type": "rewind", "branch": rng.randrange(3), "frame": rng.randrange(9)})
    return text


def check_reply(reply: Mapping[str, Any]) -> None:
    """It is one of the protocol's messages, and an error is one of its errors, in one line."""
    assert reply["type"] in REPLIES
    if reply["type"] == "error":
        assert f"`{reply['code']}`" in PROTOCOL
        assert reply["code"] != "internal"
        assert reply["message"]
        assert "\n" not in reply["message"]


@pytest.mark.parametrize("number", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_fuzzer(server: Server, number: int, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever comes: every reply is one of the protocol's, nothing fails, and the server goes on to serve."""
    rng = random.Random(number)
    server.wait_health(engine="ready")
    engine = server.hall.engine_pid
    sent = num_replies = 0
    while sent < number:
        with contextlib.suppress(ConnectionClosed), server.client() as client:
            while sent < number:
                sent += 1
                client.send_raw(fuzz(rng))
                if sent % 10 == 0:
                    client.send("ping", id=sent)
                    reply: Mapping[str, Any] | Media = {}
                    while isinstance(reply, Media) or reply.get("id") != sent:
                        reply = client.receive()
                        if not isinstance(reply, Media):
                            check_reply(reply)
                            num_replies += 1
        assert client.close_code != 1011, "the server has failed"
    assert num_replies > number / 4
    with server.client() as client:
        client.open(prompt=RED)
        list(client.blocks(1))
        client.request("end")
    assert server.health()["engine"] == "ready"
    assert server.hall.engine_pid == engine
    errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert [record.getMessage() for record in errors if record.name != "websockets.client"] == []


def run_command(*arguments: str, stdin: int = subprocess.PIPE) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "longlive", *arguments]
    pipes: dict[str, Any] = {"stderr": subprocess.PIPE, "stdin": stdin, "text": True, "errors": "surrogateescape"}
    return subprocess.Popen(command, env=environment, **pipes)


def test_command_serves_until_it_is_interrupted() -> None:
    process = run_command("serve", "port=0", "model_name=tiny", "token=a b", "height=32", "width=32")
    assert process.stderr is not None
    while "listening on " not in (line := process.stderr.readline()):
        assert line, "the server has ended"
    address, _, fragment = line.split()[-1].partition("#")
    assert fragment == "token=a%20b"
    with pytest.raises(InvalidStatus, match="403"), LiveClient(address, token="wrong"):
        pass
    with LiveClient(address, token="a b") as client:
        client.open(prompt=RED)
        list(client.blocks(1))
        process.send_signal(signal.SIGINT)
        with pytest.raises(ConnectionClosed):
            client.wait("never")
    assert process.wait() == 0
    assert "Traceback" not in process.stderr.read()


def test_command_tells_mistakes_in_one_line(server: Server) -> None:
    port = server.address.rpartition(":")[2]
    for arguments, words in (
        ([f"port={port}"], f"port={port}: cannot listen there"),
        (["host=0.0.0.0", "port=0"], "viewers need token=SECRET"),
        (["prompt=a cat"], "prompt means nothing to serve"),
        (["idle_s=0"], "idle_s=0.0: must be between 0.1 and"),
        (["forget_s=-1"], "forget_s=-1.0: must be between 0.1 and"),
        (["port=0", "model_name=tiny", "generator_ckpt=nothing.pt"], "nothing.pt"),
    ):
        process = run_command("serve", *arguments)
        _, told = process.communicate()
        assert process.returncode == 2
        assert told.splitlines()[-1].startswith("error: ")
        assert words in told.splitlines()[-1]
        assert "Traceback" not in told


def test_live_in_a_terminal_of_its_own(tmp_path: Path) -> None:
    settings = ["model_name=tiny", "height=32", "width=32", "denoising_step_list=1000, 500", "seed=4"]
    process = run_command("live", f"output_folder={tmp_path}", *settings)
    _, told = process.communicate(f"{RED}\n\n  {BLUE} \n")
    assert process.returncode == 0, told
    (video,) = tmp_path.glob("live-*.mp4")
    assert str(video) in told
    assert len(decode(video.read_bytes())) == 9 + 2 * 12
    assert json.loads(video.with_suffix(".jsonl").read_text()) == {
        "prompts": [RED, BLUE],
        "switch_frame_indices": [6],
        "seed": 4,
        "num_output_frames": 9,
    }


def test_a_zip_names_weights_but_no_folder_of_this_machine() -> None:
    places = {"generator_ckpt": str(ROOT / "longlive_models" / "base.pt"), "lora_ckpt": f"{ROOT}/../me/lora.pt"}
    settings = picture_settings(ServeConfig(**places))
    assert settings["generator_ckpt"] == "longlive_models/base.pt"  # as configurations of the repository name it
    assert settings["lora_ckpt"] == "lora.pt"
    assert settings["vae_ckpt"] is None
    assert not any(str(value).startswith("/") for value in settings.values())


class UntilInterrupted(io.StringIO):
    """Lines, and then Ctrl-C."""

    def readline(self, size: int = -1, /) -> str:
        line = super().readline(size)
        if not line:
            raise KeyboardInterrupt
        return line


def test_live_interrupted_is_complete(tmp_path: Path) -> None:
    settings = [
        "model_name=tiny",
        "height=32",
        "width=32",
        "denoising_step_list=1000, 500",
        f"output_folder={tmp_path}",
    ]
    config, explicit = load_config(InferenceConfig, ROOT / "configs" / "longlive_inference.yaml", settings)
    with pytest.raises(KeyboardInterrupt):
        live(config, explicit, UntilInterrupted())
    assert list(tmp_path.iterdir()) == []
    live(config, explicit, UntilInterrupted(f"{RED}\n{BLUE}\n"))
    (video,) = tmp_path.glob("live-*.mp4")
    assert len(decode(video.read_bytes())) == 9 + 12
    assert json.loads(video.with_suffix(".jsonl").read_text())["prompts"] == [RED, BLUE]


def test_live_says_what_it_cannot_show(tmp_path: Path) -> None:
    settings = ["model_name=tiny", "height=32", "width=32", "denoising_step_list=1000, 500"]
    process = run_command("live", f"output_folder={tmp_path}", *settings)
    _, told = process.communicate(f"{RED}\na fox \udcff\n")  # a byte that is no text
    assert process.returncode == 0, told
    assert told.count("does not know this prompt") == 1
    (script,) = tmp_path.glob("live-*.jsonl")
    assert json.loads(script.read_text(encoding="utf-8"))["prompts"] == [RED, "a fox \ufffd"]


def test_command_ends_though_nobody_is_left_to_tell() -> None:
    """The terminal is gone, the engine has died, a viewer is still there: SIGTERM ends it all the same."""
    process = run_command("serve", "port=0", "model_name=tiny", "height=32", "width=32")
    assert process.stderr is not None
    while "listening on " not in (line := process.stderr.readline()):
        assert line, "the server has ended"
    process.stderr.close()
    with LiveClient(line.split()[-1]) as client:
        client.open(prompt=RED)
        list(client.blocks(1))
        for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            os.kill(int(child), signal.SIGKILL)
        client.wait("state", state="restarting")
        list(client.blocks(1))
        process.send_signal(signal.SIGTERM)
        with pytest.raises(ConnectionClosed):
            client.wait("never")
        assert process.wait(PATIENCE_S) == -signal.SIGTERM


def test_live_ends_with_its_terminal(tmp_path: Path) -> None:
    ours, theirs = os.openpty()
    settings = ["model_name=tiny", "height=32", "width=32", "denoising_step_list=1000, 500"]
    process = run_command("live", f"output_folder={tmp_path}", *settings, stdin=theirs)
    os.close(theirs)
    os.write(ours, f"{RED}\n".encode())
    assert process.stderr is not None
    while "the video grows" not in (line := process.stderr.readline()):
        assert line, "it has ended"
    os.close(ours)
    try:
        assert process.wait(PATIENCE_S) == 0
    finally:
        process.kill()
    assert len(list(tmp_path.glob("live-*.mp4"))) == 1
