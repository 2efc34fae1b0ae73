"""The page of `serve` in a real browser, against the real server with the built-in model (see docs/LIVE.md)."""

import base64
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from longlive.data.shapes.captions import understand, worded
from longlive.data.shapes.world import Caption, Look
from longlive.eval.judge import judge, score

playwright_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed (requirements-dev.txt)")
Page = Any

pytestmark = pytest.mark.browser

RED = Caption("white", (Look("red", "star", "big", "sway"),))
CYAN = Caption("black", (Look("cyan", "ring", "big", "sway"),))
FIRST, THEN = worded(RED, 0), worded(CYAN, 0)
SEED = 7
SETTLED = 48  # video frames after a switch: the model takes its time
TIMEOUT_MS = 60_000
SAME_LEVELS, OTHER_LEVELS = 1.0, 3.0  # mean difference of videos of one prompt and of two

Frames = NDArray[np.uint8]

CAPTURE = """
([first, count]) => new Promise((done) => {
  const picture = document.querySelector("#picture");
  const source = picture.querySelector("video:not([hidden]), canvas:not([hidden])");
  const [width, height] = [source.videoWidth ?? source.width, source.videoHeight ?? source.height];
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  const frames = {};
  const observer = new MutationObserver(() => {
    const videoFrame = Number(picture.dataset.videoFrame);
    if (videoFrame < first) return;
    context.drawImage(source, 0, 0);
    const { data } = context.getImageData(0, 0, width, height);
    frames[videoFrame] = btoa(data.reduce((text, byte) => text + String.fromCharCode(byte), ""));
    if (Object.keys(frames).length < count) return;
    observer.disconnect();
    done({ width, height, frames });
  });
  observer.observe(picture, { attributeFilter: ["data-video-frame"] });
})
"""


# What everything runs on


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    names = ("chromium", "chromium-browser", "google-chrome")
    path = os.environ.get("LONGLIVE_BROWSER") or next(filter(None, map(shutil.which, names)), None)
    with playwright_api.sync_playwright() as playwright:
        if path is None and not Path(playwright.chromium.executable_path).is_file():
            pytest.skip("no browser: install Chromium, or run `playwright install chromium`, or set LONGLIVE_BROWSER")
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


class Server:
    """`python -m longlive serve` in a process of its own. url: as it printed it."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "longlive", "serve", "port=0", "device=cpu", "model_name=tiny", *arguments]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        said: list[str] = []
        for line in self.process.stderr:
            said.append(line)
            found = re.search(r"http://\S+", line)
            if found:
                self.url = found[0]
                break
        else:
            pytest.fail("the server did not start: " + "".join(said))
        self._draining = threading.Thread(target=self.process.stderr.read)  # so that it never waits for a full pipe
        self._draining.start()

    @property
    def port(self) -> int:
        return int(re.search(r":(\d+)/", self.url)[1])  # type: ignore[index]

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.wait(30)
        self._draining.join()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    started = Server()
    yield started
    started.stop()


class Viewer:
    """A page, and what went wrong in it: errors in the console, which violations of the security policy are too."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.problems: list[str] = []
        page.set_default_timeout(TIMEOUT_MS)
        page.on("console", lambda message: message.type == "error" and self.problems.append(message.text))
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("dialog", lambda dialog: self.problems.append(f"dialog: {dialog.message}"))

    def wait_state(self, *states: str) -> None:
        self.page.wait_for_function("(states) => states.includes(document.body.dataset.state)", arg=list(states))

    def wait_shown(self, video_frame: int, branch: int = 0) -> None:
        """Until this video frame of this branch, or a later one, was on the screen."""
        self.page.wait_for_function(
            """([branch, first]) => {
              const { dataset } = document.querySelector("#picture");
              return Number(dataset.branch) === branch && Number(dataset.videoFrame) >= first;
            }""",
            arg=[branch, video_frame],
        )

    @property
    def shown(self) -> int:
        return int(self.page.get_attribute("#picture", "data-video-frame"))

    def begin(self, prompt: str) -> None:
        """A video of SEED."""
        self.wait_state("ready")
        self.page.fill("#start-seed", str(SEED))
        self.page.fill("#prompt", prompt)
        self.page.click("#restart")
        self.wait_shown(0, branch=1)

    def send(self, prompt: str) -> None:
        self.page.fill("#prompt", prompt)
        self.page.press("#prompt", "Enter")

    def switch_to(self, prompt: str) -> None:
        """Send the second prompt of a branch and wait for its first picture."""
        self.send(prompt)
        self.page.wait_for_function("() => document.querySelectorAll('#track-prompts span').length === 2")
        self.page.wait_for_function("() => document.querySelector('#message').textContent === ''")

    def capture(self, first: int, count: int) -> dict[int, Frames]:
        """What is on the screen from video frame `first` on: `count` frames [height, width, 3] by their number."""
        taken = self.page.evaluate(CAPTURE, [first, count])
        size = taken["height"], taken["width"], 4
        pixels = {
            int(number): np.frombuffer(base64.b64decode(data), np.uint8) for number, data in taken["frames"].items()
        }
        return {number: data.reshape(size)[..., :3] for number, data in pixels.items()}

    def download(self, what: str, branch: int) -> bytes:
        with self.page.expect_download() as download:
            self.page.click(f"#branches a[download='longlive-{branch}.{what}']")
        return bytes(Path(download.value.path()).read_bytes())

    def video(self, branch: int) -> Frames:
        """All frames [V, height, width, 3] of a branch, as downloaded."""
        return decode(self.download("mp4", branch))


def decode(mp4: bytes) -> Frames:
    with av.open(io.BytesIO(mp4)) as container:
        frames = [frame.reformat(format="rgb24", src_colorspace="ITU709") for frame in container.decode(video=0)]
    return np.stack([frame.to_ndarray() for frame in frames])


def levels_apart(left: Frames, right: Frames) -> float:
    """Mean absolute difference of two pictures, or of two videos."""
    return float(np.abs(left.astype(np.float32) - right).mean())


def assert_same(shown: Mapping[int, Frames], made: Frames, levels: float = 4.0) -> None:
    """Each frame by its number is nearest to the one of that number, or to its neighbour: codecs blur little change."""
    for number, frame in shown.items():
        apart = [levels_apart(frame, other) for other in made]
        assert abs(int(np.argmin(apart)) - number) <= 1
        assert apart[number] < levels


OpenPage = Callable[..., Viewer]


@pytest.fixture
def open_page(browser: Any, server: Server) -> Iterator[OpenPage]:
    """Opens pages; in the end none may have had a problem. Options are those of a browser context."""
    with ExitStack() as stack:
        viewers = []

        def open_(url: str = "", **options: Any) -> Viewer:
            context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
            stack.callback(context.close)
            viewer = Viewer(context.new_page())
            viewers.append(viewer)
            viewer.page.goto(url if "://" in url else server.url + url)
            return viewer

        yield open_
        assert [viewer.problems for viewer in viewers] == [[] for _ in viewers]


@pytest.fixture
def screenshots(tmp_path: Path) -> Path:
    """Where pictures of the page are kept: $LONGLIVE_SCREENSHOTS, or a folder of the test's own."""
    folder = Path(os.environ.get("LONGLIVE_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def check_shows(frames: Frames, caption: Caption) -> None:
    """The judge of Shapes videos sees what was asked for."""
    reading = judge(frames)
    right = score(reading, caption)
    assert all(right[name] for name in ("background", "colour", "shape", "size")), reading


# Playing


def test_plays_what_is_typed_and_follows_the_next_prompt(open_page: OpenPage, screenshots: Path) -> None:
    viewer = open_page()
    page = viewer.page
    viewer.wait_state("ready")
    assert page.locator("#suggestions button").count() == 4
    page.screenshot(path=screenshots / "empty.png")

    viewer.begin(FIRST)
    viewer.wait_state("playing")
    times = []
    for later in (4, 8, 12):
        viewer.wait_shown(later, branch=1)
        times.append(page.evaluate("document.querySelector('#video').currentTime"))
    assert times == sorted(set(times))
    before = viewer.capture(13, 12)

    viewer.switch_to(THEN)
    after = viewer.capture(viewer.shown + SETTLED, 36)
    assert float(re.fullmatch(r"([\d.]+) s", page.inner_text("#latency"))[1]) > 0  # type: ignore[index]
    assert re.fullmatch(r"[\d.]+ fps", page.inner_text("#speed"))
    page.screenshot(path=screenshots / "playing.png")

    assert min(frame.std() for frame in [*before.values(), *after.values()]) > 5  # not black, nor of any one colour
    check_shows(np.stack(list(before.values())), RED)
    check_shows(np.stack(list(after.values())), CYAN)
    page.keyboard.press("Escape")
    page.keyboard.press("Space")
    viewer.wait_state("paused")
    assert_same(before | after, viewer.video(1))


def test_suggestions_are_prompts_that_the_model_knows(open_page: OpenPage) -> None:
    """All that can be reached by following them."""
    viewer = open_page()
    viewer.wait_state("ready")
    texts = viewer.page.evaluate(
        """async () => {
          const { suggestions } = await import(new URL("shapes.js", document.baseURI));
          const texts = new Set([""]);
          for (const prompt of texts) for (const { text } of suggestions(prompt)) texts.add(text);
          return [...texts].slice(1);
        }"""
    )
    assert len(texts) > 100
    assert {text: problems for text in texts if (problems := understand(text)[1])} == {}


def test_pause_stops_the_picture_and_goes_on_from_there(open_page: OpenPage) -> None:
    viewer = open_page()
    page = viewer.page
    viewer.begin(FIRST)
    viewer.wait_shown(20, branch=1)
    page.click("#video")
    viewer.wait_state("paused")
    assert page.inner_text("#pause") == "Go on"
    assert page.evaluate("document.querySelector('#video').paused")  # and not only nothing more made
    # A picture may be on its way to the screen. Sixty refreshes take a second, in which sixteen more would be shown.
    page.wait_for_function(
        """() => {
          const { videoFrame } = document.querySelector("#picture").dataset;
          window.refreshes = videoFrame === window.last ? window.refreshes + 1 : 0;
          window.last = videoFrame;
          return window.refreshes === 60;
        }"""
    )
    stopped = viewer.shown
    viewer.send(THEN)
    page.wait_for_function("() => document.querySelector('#message').textContent.startsWith('Paused')")
    page.click("#pause")
    viewer.wait_state("playing")
    viewer.wait_shown(stopped + 40, branch=1)
    assert page.locator("#track-prompts span").all_inner_texts() == [FIRST, THEN]


def test_a_click_on_the_time_line_branches_with_what_is_typed(open_page: OpenPage, screenshots: Path) -> None:
    viewer = open_page()
    page = viewer.page
    viewer.begin(FIRST)
    viewer.wait_shown(80, branch=1)
    page.fill("#prompt", THEN)
    page.click("#track", position={"x": 32 * 2.5, "y": 50})  # after 2.5 s: the block that begins at video frame 33
    viewer.wait_shown(33, branch=2)
    assert page.locator("#branches .branch").count() == 2
    assert page.input_value("#prompt") == ""
    shown = viewer.capture(33 + SETTLED, 36)
    check_shows(np.stack(list(shown.values())), CYAN)
    assert page.locator("#branches .selected").inner_text().startswith("Branch 2")
    assert "from 1 at 0:02" in page.inner_text("#branches .selected")
    page.hover("#track", position={"x": 64, "y": 60})
    page.screenshot(path=screenshots / "branches.png")

    old, new = viewer.video(1), viewer.video(2)
    assert levels_apart(old[:33], new[:33]) == 0
    assert levels_apart(old[45:80], new[45:80]) > OTHER_LEVELS, "the prompt did not reach the picture"
    assert_same(shown, new)

    page.click("#branches .branch-select >> text=Branch 1")  # on at the end of the other one
    viewer.wait_shown(len(old), branch=1)
    page.click("[aria-label='Delete branch 2']")
    page.wait_for_function("() => document.querySelectorAll('#branches .branch').length === 1")


def test_the_same_prompt_again_makes_the_same_pictures(open_page: OpenPage) -> None:
    """So what the test above takes for the effect of a prompt is one."""
    viewer = open_page()
    viewer.begin(FIRST)
    viewer.wait_shown(60, branch=1)
    viewer.page.click("#track", position={"x": 32, "y": 50})
    viewer.wait_shown(60, branch=2)
    old, new = viewer.video(1), viewer.video(2)
    assert levels_apart(old[:60], new[:60]) < SAME_LEVELS


def test_downloads_replay(open_page: OpenPage, tmp_path: Path) -> None:
    viewer = open_page()
    viewer.begin(FIRST)
    viewer.wait_shown(8, branch=1)
    viewer.send(THEN)
    viewer.page.wait_for_function("() => document.querySelectorAll('#track-prompts span').length === 2")
    viewer.wait_shown(40, branch=1)
    viewer.page.click("#pause")
    viewer.wait_state("paused")
    script = json.loads(viewer.download("jsonl", 1))
    assert (script["prompts"], script["seed"]) == ([FIRST, THEN], SEED)
    with zipfile.ZipFile(io.BytesIO(viewer.download("zip", 1))) as archive:
        archive.extractall(tmp_path)
    command = [sys.executable, "-m", "longlive", "interactive", "--config_path", "settings.yaml", "device=cpu"]
    arguments = ["data_path=script.jsonl", "output_folder=again"]
    result = subprocess.run([*command, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    (again,) = (tmp_path / "again").glob("*.mp4")
    live, replayed = decode((tmp_path / "video.mp4").read_bytes()), decode(again.read_bytes())
    assert live.shape == replayed.shape
    assert_same(dict(enumerate(live)), replayed, levels=8)  # encoded anew


def test_pictures_where_video_cannot_be_played(open_page: OpenPage, screenshots: Path) -> None:
    viewer = open_page("?format=webp")
    page = viewer.page
    viewer.begin(FIRST)
    assert page.is_visible("#canvas")
    assert not page.is_visible("#video")
    shown = viewer.capture(12, 24)
    viewer.switch_to(THEN)
    page.screenshot(path=screenshots / "webp.png")
    made = viewer.video(1)
    assert min(frame.std() for frame in shown.values()) > 5
    assert_same(shown, made, levels=12)  # two codecs
    page.fill("#prompt", FIRST)
    page.click("#track", position={"x": 40, "y": 50})
    viewer.wait_shown(40, branch=2)


# Beginning anew


def test_begins_with_a_seed_and_a_picture(open_page: OpenPage, tmp_path: Path, screenshots: Path) -> None:
    viewer = open_page()
    page = viewer.page
    viewer.begin(FIRST)
    Image.linear_gradient("L").convert("RGB").resize((300, 200)).save(tmp_path / "start.png")
    page.set_input_files("#start-picture", tmp_path / "start.png")
    page.wait_for_selector("#picture-name >> text=start.png")
    page.fill("#start-seed", "12345")
    page.screenshot(path=screenshots / "start.png")
    page.click("#restart")
    viewer.wait_shown(12, branch=2)
    assert page.inner_text("#seed") == "12345"
    assert "from a picture" in page.inner_text("#branches .selected")
    assert page.inner_text("#picture-name") == "The same as before"


def test_what_cannot_be_taken_is_said_in_the_page(open_page: OpenPage, tmp_path: Path) -> None:
    viewer = open_page()
    page = viewer.page
    viewer.begin(FIRST)
    viewer.send("A fox in the snow.")
    page.wait_for_selector("#message.error >> text=does not know this prompt")
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG and then nothing")
    for name, words in (("notes.txt", "only PNG, JPEG and WebP"), ("broken.png", "cannot be read")):
        page.set_input_files("#start-picture", tmp_path / name)
        page.wait_for_selector(f"#message.error >> text={words}")
    page.fill("#start-seed", "seven")
    page.click("#restart")
    page.wait_for_selector("#message.error >> text=A seed is a whole number")
    assert page.locator("#branches .branch").count() == 1


# Connections


class Relay:
    """Passes connections on to the server, until they are cut."""

    def __init__(self, port: int) -> None:
        self._target = ("127.0.0.1", port)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listening.getsockname()[1]}/"

    def cut(self) -> None:
        for end in self._open:
            with suppress(OSError):  # it is closed already
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listening.close()
        self.cut()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                here, _ = self._listening.accept()
                there = socket.create_connection(self._target)
                self._open += [here, there]
                for ends in ((here, there), (there, here)):
                    threading.Thread(target=self._pass_on, args=ends, daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):  # cut
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


@contextmanager
def relay_to(server: Server) -> Iterator[Relay]:
    relay = Relay(server.port)
    yield relay
    relay.close()


def test_comes_back_when_the_connection_breaks(open_page: OpenPage, server: Server) -> None:
    with relay_to(server) as relay:
        viewer = open_page(relay.url)
        page = viewer.page
        viewer.begin(FIRST)
        viewer.wait_shown(24, branch=1)
        key = page.evaluate("sessionStorage.getItem('longlive.session')")
        page.evaluate(
            """() => {
              window.states = [];
              const note = () => window.states.push(document.body.dataset.state);
              new MutationObserver(note).observe(document.body, { attributeFilter: ["data-state"] });
            }"""
        )
        relay.cut()
        page.wait_for_function("() => window.states.includes('reconnecting')")
        viewer.wait_state("playing")
        viewer.wait_shown(viewer.shown + 40, branch=1)
        assert page.evaluate("sessionStorage.getItem('longlive.session')") == key
        assert page.locator("#branches .branch").count() == 1

        page.reload()
        viewer.wait_shown(60, branch=1)
        assert page.evaluate("sessionStorage.getItem('longlive.session')") == key
        assert page.locator("#track-prompts span").all_inner_texts() == [FIRST]


def test_a_session_is_watched_in_one_window(open_page: OpenPage) -> None:
    viewer = open_page()
    viewer.begin(FIRST)
    with viewer.page.context.expect_page() as opened:
        viewer.page.evaluate("window.open(location.href)")  # which takes its session storage along
    other = Viewer(opened.value)
    viewer.wait_state("replaced")
    other.wait_shown(24, branch=1)
    viewer.page.click("text=Watch it here")
    other.wait_state("replaced")
    viewer.wait_shown(48, branch=1)
    viewer.page.click("text=End the session")
    viewer.wait_state("ended")
    viewer.page.click("text=Begin a new one")
    viewer.wait_state("ready")
    assert viewer.page.locator("#branches .branch").count() == 1
    assert other.problems == []


def test_goes_on_when_the_engine_dies(open_page: OpenPage, server: Server) -> None:
    viewer = open_page()
    viewer.begin(FIRST)
    viewer.wait_shown(24, branch=1)
    tasks = Path(f"/proc/{server.process.pid}/task")
    children = {int(pid) for task in tasks.iterdir() for pid in (task / "children").read_text().split()}
    (engine,) = [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(engine, signal.SIGKILL)
    viewer.wait_state("restarting")
    last = viewer.shown
    viewer.wait_state("playing")
    viewer.wait_shown(last + 40, branch=1)


def test_asks_for_a_token(browser: Any, screenshots: Path) -> None:
    server = Server("token=open sesame")
    try:
        address, _, secret = server.url.partition("#")
        assert secret == "token=open%20sesame"
        context = browser.new_context()
        with_token = Viewer(context.new_page())
        with_token.page.goto(server.url)
        with_token.wait_state("ready")
        assert with_token.problems == []
        with_token.begin(FIRST)
        with_token.page.wait_for_function("() => document.querySelector('#track img').naturalWidth > 0")
        assert len(with_token.video(1)) > 0

        without = Viewer(browser.new_context().new_page())
        without.page.goto(address)
        without.wait_state("unauthorized")
        without.page.screenshot(path=screenshots / "token.png")
        without.page.fill("#token", "open sesame")
        without.page.press("#token", "Enter")
        without.wait_state("ready")
        assert all("401" in problem for problem in without.problems)
    finally:
        server.stop()


HIDE = """(isHidden) => {
  Object.defineProperty(document, "hidden", { value: isHidden, configurable: true });
  document.dispatchEvent(new Event("visibilitychange"));
}"""


def test_who_comes_back_to_a_page_finds_it_as_it_was_left(open_page: OpenPage) -> None:
    """Hidden for so long that the session was parked: it goes on, unless it had been paused."""
    server = Server("idle_s=1")
    try:
        viewer = open_page(server.url)
        page, sent = viewer.page, []
        page.on("websocket", lambda socket: socket.on("framesent", lambda data: sent.append(data)))
        page.reload()
        viewer.begin(FIRST)
        page.evaluate(HIDE, True)
        viewer.wait_state("parked")
        page.evaluate(HIDE, False)
        viewer.wait_state("playing")
        page.click("#pause")
        viewer.wait_state("paused")
        page.evaluate(HIDE, True)
        viewer.wait_state("parked")
        sent.clear()
        page.evaluate(HIDE, False)
        page.click("#pause")
        viewer.wait_state("playing")
        assert len([message for message in sent if json.loads(message)["type"] == "resume"]) == 1
    finally:
        server.stop()


def test_the_time_line_follows_after_a_reload(open_page: OpenPage) -> None:
    viewer = open_page(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    viewer.begin(FIRST)
    viewer.wait_shown(250, branch=1)  # 15 s, of which 10 are in view
    assert viewer.page.evaluate("document.documentElement.scrollWidth") == 360  # the page is not stretched by it
    viewer.page.reload()
    viewer.wait_shown(270, branch=1)
    viewer.page.wait_for_function(
        """() => {
          const place = (id) => document.getElementById(id).getBoundingClientRect();
          const [head, seen] = [place("playhead"), place("scroller")];
          return head.left >= seen.left && head.left <= seen.right;
        }"""
    )


def test_works_where_storage_is_forbidden(open_page: OpenPage) -> None:
    viewer = open_page()
    forbid = "Object.defineProperty(window, '%s', { get() { throw new DOMException('', 'SecurityError'); } });"
    viewer.page.add_init_script("".join(forbid % name for name in ("localStorage", "sessionStorage")))
    viewer.page.reload()
    viewer.wait_state("ready")
    viewer.send(FIRST)
    viewer.wait_shown(0)


# Everybody


def test_keyboard_alone(open_page: OpenPage) -> None:
    viewer = open_page()
    page = viewer.page
    press = page.keyboard.press
    focused = "document.activeElement.id"
    viewer.wait_state("ready")
    press("Tab")
    press("Enter")  # "To the prompt"
    press("Tab")
    assert page.evaluate(focused) in ("send", "prompt")
    press("Escape")
    press("/")
    assert page.evaluate(focused) == "prompt"
    page.keyboard.type(FIRST)
    press("Enter")
    viewer.wait_shown(60)
    press("ArrowUp")
    assert page.input_value("#prompt") == FIRST
    page.keyboard.type("!")
    press("ArrowDown")
    assert page.input_value("#prompt") == ""
    press("ArrowUp")
    assert page.input_value("#prompt") == f"{FIRST}!"
    press("ArrowDown")
    press("Space")  # in the empty box
    viewer.wait_state("paused")
    page.keyboard.type(THEN)
    press("Escape")
    press("t")
    assert page.evaluate(focused) == "track"
    press("Home")
    press("ArrowRight")
    press("ArrowRight")
    assert page.get_attribute("#track", "aria-valuetext").startswith("0:01")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    press("Enter")
    viewer.wait_shown(21, branch=1)
    assert "from 0 at 0:01" in page.inner_text("#branches .selected")
    press("[")
    viewer.wait_shown(60, branch=0)
    press("r")
    assert page.evaluate(focused) == "start-seed"
    page.keyboard.type("99")
    press("Enter")
    viewer.wait_shown(0, branch=2)
    page.evaluate("document.activeElement.blur()")
    press("?")
    assert page.evaluate("document.querySelector('#keys').open")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_fits_a_phone(open_page: OpenPage, screenshots: Path, scheme: str) -> None:
    viewer = open_page(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True, color_scheme=scheme)
    page = viewer.page
    viewer.wait_state("ready")
    viewer.send(FIRST)
    viewer.wait_shown(40)
    viewer.send(THEN)
    page.wait_for_function("() => document.querySelectorAll('#track-prompts span').length === 2")
    page.screenshot(path=screenshots / f"phone-{scheme}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = np.mean([int(level) for level in re.findall(r"\d+", paper)])
    assert (brightness > 128) == (scheme == "light")


def test_nothing_moves_while_it_plays(open_page: OpenPage, screenshots: Path) -> None:
    viewer = open_page(viewport={"width": 1600, "height": 1000}, color_scheme="dark")
    page = viewer.page
    viewer.wait_state("ready")
    page.evaluate(
        """() => {
          window.shifts = [];
          const place = ({ node, previousRect: from, currentRect: to }) => [node?.id || node?.className, from, to];
          const add = (list) => {
            for (const { value, sources } of list.getEntries()) {
              if (value > 0.001) window.shifts.push([value, ...sources.map(place)]);
            }
          };
          new PerformanceObserver(add).observe({ type: "layout-shift" });
        }"""
    )
    viewer.send(FIRST)
    viewer.wait_shown(60)
    viewer.send(THEN)
    viewer.wait_shown(100)
    page.screenshot(path=screenshots / "wide-dark.png")
    assert page.evaluate("window.shifts") == []
