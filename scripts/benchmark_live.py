"""The live server measured from a viewer's side; prints one JSON line. Linux. Settings are those of `longlive serve`.

python scripts/benchmark_live.py --seconds 600 [key=value ...]

First, with --blocks N, a viewer that takes N blocks as fast as they are made: full_speed_fps is what the server can do.
Then one for some minutes who plays in real time what it has received and types a prompt now and then. Meanwhile others
come and go (--connects of them, one after the other; 0: none), and one opens a session and never reads.

    first_picture_s       from opening the session to its first block
    fps, kept_up          shown in a second, from the first picture on; whether that is the content's, within 1 %
    prompt_to_received_s  from sending a prompt to having received the first block made under it
    prompt_to_shown_s     to its first picture shown, after all that was received before
    block_s               what a block takes, as the server tells
    memory_mb             of the processes, after a tenth of the time and at the end
    on_disk_mb            what all sessions have made, which the server keeps there, at the same times
    gpu                   with NVIDIA's driver: its name, the memory in use at most

python scripts/benchmark_live.py --browser [key=value ...]

The page in Chromium (requirements-dev.txt; LONGLIVE_BROWSER=/path/to/another): time from the key that sends a prompt
until the first video frame made under it is on the screen, by the page's clock. page_says_s: the page's own figure.
"""

import argparse
import json
import logging
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from longlive.web.client import LiveClient, Media

COLOURS = ("red", "blue", "green", "yellow", "pink")
PERIOD_S = 0.1  # between reports of what has been played
SAMPLE_S = 5.0  # between readings of the memory
WARM_UP_BLOCKS = 8
SILENCE_S = 600.0  # blocks may be compiled before the first one comes
log = logging.getLogger("benchmark_live")

# Which video frame is shown when. Of the first branch the times in the browser's clock are those of the branch.
RECORD = """
(fps) => {
  const video = document.querySelector("#video");
  window.measured = { submitted: 0, shown: [] };
  document.querySelector("#prompt").addEventListener("keydown", ({ key, timeStamp }) => {
    if (key === "Enter") window.measured = { submitted: timeStamp, shown: [] };
  }, { capture: true });
  const note = (now, { mediaTime, expectedDisplayTime }) => {
    window.measured.shown.push([Math.round(mediaTime * fps), Math.max(now, expectedDisplayTime)]);
    video.requestVideoFrameCallback(note);
  };
  video.requestVideoFrameCallback(note);
}
"""


class Viewer:
    """Plays a session in real time, and types prompts at moments that have nothing to do with the blocks."""

    def __init__(self, url: str) -> None:
        self.client = LiveClient(url, plays=False, timeout_s=SILENCE_S)
        self.received = self.played = self.stalled_s = self.first_picture_s = 0.0
        self.to_received_s: list[float] = []
        self.to_shown_s: list[float] = []
        self.block_s: list[float] = []
        self._prompt = prompt(0)
        self._sent_at: float | None = None  # when the newest prompt was, until it is shown
        self._awaited: int | None = None  # video frame from which it is
        self._lock = threading.Lock()

    def run(self, seconds: float, switch_s: float) -> None:
        """From the first picture on."""
        between, number = random.Random(0), 0
        with self.client:
            opened = time.monotonic()
            self.client.open(prompt=self._prompt, seed=1)
            threading.Thread(target=self._receive, daemon=True).start()
            while not self.received:
                time.sleep(0.01)
            begin = last = time.monotonic()
            self.first_picture_s = begin - opened
            next_switch = begin + switch_s
            while (now := time.monotonic()) < begin + seconds:
                self._play(now - last)
                last = now
                if now >= next_switch:
                    number, next_switch = number + 1, now + switch_s * between.uniform(0.7, 1.3)
                    with self._lock:
                        self._prompt, self._sent_at, self._awaited = prompt(number), now, None
                    self.client.send("prompt", text=self._prompt)
                self.client.send("played", epoch=self.client.epoch, video_frame=int(self.played))
                time.sleep(PERIOD_S)
            self.client.send("end")

    def _play(self, elapsed_s: float) -> None:
        fps = self.client.hello["fps"]
        with self._lock:
            can_play_s = (self.received - self.played) / fps
            self.stalled_s += max(0.0, elapsed_s - can_play_s)
            self.played += min(elapsed_s, can_play_s) * fps
            if self._awaited is not None and self._sent_at is not None and self.played > self._awaited:
                self.to_shown_s.append(time.monotonic() - self._sent_at)
                self._sent_at = self._awaited = None

    def _receive(self) -> None:
        try:
            while True:
                item = self.client.receive()
                with self._lock:
                    if isinstance(item, Media):
                        self.received = max(self.received, item.video_frame + item.num_video_frames)
                        if item.video_frame == self._awaited and self._sent_at is not None:
                            self.to_received_s.append(time.monotonic() - self._sent_at)
                    elif item["type"] == "switch" and item["text"] == self._prompt:
                        self._awaited = item["video_frame"]
                    elif item["type"] == "block":
                        self.block_s.append(item["seconds"])
        except Exception as error:  # the session has ended
            log.info("the viewer's connection: %s", error)


def prompt(number: int) -> str:
    return f"A big {COLOURS[number % len(COLOURS)]} circle moves left on a black background."


def rss_mb(pid: int) -> float:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+)", text)[0]) / 1000


def processes(server: int) -> dict[str, int]:
    """The server and its engine, which is the child that takes most memory."""
    children = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            if int(path.read_text().rpartition(")")[2].split()[1]) == server:
                children.append(int(path.parent.name))
    return {"server": server, "engine": max(children, key=rss_mb)}


def gpu() -> tuple[str, int] | None:
    """The first GPU's name and how much of its memory is in use, MB; None where there is no NVIDIA driver."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=name,memory.used", "--format=csv,noheader,nounits"]
    name, used = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].split(", ")
    return name, int(used)


def others(url: str, connects: int, period_s: float, stop: threading.Event) -> None:
    """Viewers that come, open a session, see a little and leave; the first of them stays and never reads."""
    with LiveClient(url, plays=False) as stalled:
        stalled.send("open", prompt=prompt(1), seed=2)
        for number in range(connects):
            if stop.wait(period_s):
                return
            with LiveClient(url) as visitor:
                visitor.send("open", prompt=prompt(number), seed=number)
        stop.wait()


@contextmanager
def serving(settings: Sequence[str]) -> Iterator[tuple[int, str]]:
    """A server with its models loaded: process and address."""
    command = [sys.executable, "-m", "longlive", "serve", "port=0", *settings]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        said = relayed(server.stderr)
        found = next((found for line in said if (found := re.search(r"http://\S+:\d+", line))), None)
        if found is None:
            sys.exit("the server did not start")
        url = found[0]
        threading.Thread(target=deque, args=(said, 0), daemon=True).start()  # so that it never waits for a full pipe
        while LiveClient(url).get("/api/health").find(b'"ready"') < 0:
            time.sleep(0.5)
        try:
            yield server.pid, url
        finally:
            server.terminate()


def relayed(lines: Iterable[str]) -> Iterator[str]:
    """The same lines, said here too."""
    for line in lines:
        sys.stderr.write(line)
        yield line


def at_full_speed(url: str, num_blocks: int) -> float:
    """Video frames a second that a viewer gets who takes every block at once, from a full window on."""
    with LiveClient(url, timeout_s=SILENCE_S) as viewer:
        viewer.open(prompt=prompt(0), seed=0)
        list(viewer.blocks(WARM_UP_BLOCKS))
        begin = time.monotonic()
        num_video_frames = sum(block.told["num_video_frames"] for block in viewer.blocks(num_blocks))
        passed_s = time.monotonic() - begin
        viewer.request("end")
    return num_video_frames / passed_s


def soak(server: int, url: str, seconds: float, switch_s: float, connects: int) -> dict[str, Any]:
    """One viewer who stays, and others."""
    viewer, stop, memory, kept = Viewer(url), threading.Event(), list[dict[str, float]](), list[float]()
    around = (url, connects, seconds * 0.8 / max(connects, 1), stop)
    gpus: list[tuple[str, int] | None] = []

    def watch() -> None:
        while True:
            kept.append(json.loads(LiveClient(url).get("/api/health"))["kept_bytes"] / 1e6)
            memory.append({name: rss_mb(pid) for name, pid in processes(server).items()})
            gpus.append(gpu())
            if stop.wait(SAMPLE_S):
                return

    if connects:
        threading.Thread(target=others, args=around, daemon=True).start()
    threading.Thread(target=watch, daemon=True).start()
    viewer.run(seconds, switch_s)
    stop.set()
    early, late, fps = len(kept) // 10, len(kept) - 1, viewer.client.hello["fps"]
    return {
        **{name: viewer.client.hello[name] for name in ("model", "height", "width")},
        "torch": version("torch"),
        "seconds": seconds,
        "first_picture_s": round(viewer.first_picture_s, 2),
        "played_video_frames": int(viewer.played),
        "fps": round(viewer.played / seconds, 2),
        "kept_up": viewer.played / seconds >= 0.99 * fps,
        "stalled_s": round(viewer.stalled_s, 2),
        "prompts": len(viewer.to_shown_s),
        "prompt_to_received_s": summary(viewer.to_received_s),
        "prompt_to_shown_s": summary(viewer.to_shown_s),
        "block_s": summary(viewer.block_s),
        "memory_mb": {name: [round(memory[i][name], 1) for i in (early, late)] for name in memory[early]},
        "on_disk_mb": [round(kept[i], 1) for i in (early, late)],
        "gpu": max(gpus, key=lambda used: used or ("", 0)),
        "connects": connects,
    }


def in_browser(url: str, num_prompts: int) -> dict[str, Any]:
    """Prompts typed into the page, at moments that have nothing to do with the blocks."""
    from playwright.sync_api import sync_playwright

    fps = json.loads(LiveClient(url).get("/api/info"))["fps"]
    switches: list[int] = []  # the first video frame under each prompt, as the server tells it
    measured_s: list[float] = []
    told_s: list[float] = []
    between = random.Random(0)

    def listen(frame: str | bytes) -> None:
        if isinstance(frame, str) and (message := json.loads(frame))["type"] == "switch":
            switches.append(message["video_frame"])

    with sync_playwright() as playwright:
        path = os.environ.get("LONGLIVE_BROWSER") or shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page()
        page.on("websocket", lambda socket: socket.on("framereceived", listen))
        page.goto(url)
        page.wait_for_function("() => document.body.dataset.state === 'ready'")
        page.evaluate(RECORD, fps)
        for number in range(num_prompts + 1):
            page.fill("#prompt", prompt(number))
            page.press("#prompt", "Enter")
            while len(switches) <= number:
                page.wait_for_timeout(20)
            page.wait_for_function("(first) => measured.shown.some(([frame]) => frame >= first)", arg=switches[number])
            passed_ms = page.evaluate(
                "(first) => measured.shown.find(([frame]) => frame >= first)[1] - measured.submitted", switches[number]
            )
            page.wait_for_timeout(between.uniform(1000, 3000))
            if number > 0:  # the first prompt begins the video
                measured_s.append(passed_ms / 1000)
                told_s.append(float(page.inner_text("#latency").removesuffix(" s")))
        result = {
            "browser": f"Chromium {browser.version}",
            "prompts": num_prompts,
            "prompt_to_visible_s": summary(measured_s),
            "page_says_s": summary(told_s),
            "largest_difference_s": round(max(abs(a - b) for a, b in zip(measured_s, told_s, strict=True)), 3),
            "speed": page.inner_text("#speed"),
        }
        browser.close()
    return result


def summary(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {name: round(of(values), 2) for name, of in (("median", statistics.median), ("min", min), ("max", max))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--switch-s", type=float, default=15.0, help="seconds between prompts")
    parser.add_argument("--connects", type=int, default=50)
    parser.add_argument("--blocks", type=int, default=0, help="to take at full speed first")
    parser.add_argument("--browser", action="store_true", help="measure in the page instead")
    parser.add_argument("--prompts", type=int, default=20, help="of --browser")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    args = parser.parse_args()
    with serving(args.settings) as (server, url):
        if args.browser:
            result = in_browser(url, args.prompts)
        else:
            full_speed = {"full_speed_fps": round(at_full_speed(url, args.blocks), 2)} if args.blocks else {}
            result = full_speed | soak(server, url, args.seconds, args.switch_s, args.connects)
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
