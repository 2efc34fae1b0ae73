"""The live server measured from a viewer's side; prints one JSON line. Linux. Settings are those of `longlive serve`.

python scripts/benchmark_live.py --seconds 600 [key=value ...]

A viewer of the protocol for some minutes: frame rate, stalls, time from prompt to picture, memory. It plays at the
content's frame rate what it has received and types a prompt now and then. Meanwhile others come and go (--connects of
them, one after the other), and one opens a session and never reads. memory_mb: of the processes, after a tenth of the
time and at the end; on_disk_mb: what all sessions have made, which the server keeps there, at the same times.

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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from longlive.web.client import LiveClient, Media

COLOURS = ("red", "blue", "green", "yellow", "pink")
PERIOD_S = 0.1  # between reports of what has been played
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
    """Plays a session in real time. shown: (when, first video frame of the new prompt) of every switch to come."""

    def __init__(self, url: str) -> None:
        self.client = LiveClient(url, plays=False)
        self.received = self.played = self.stalled_s = 0.0
        self.latencies_s: list[float] = []
        self._sent_at: float | None = None
        self._awaited: float | None = None  # video frame from which the newest prompt is seen
        self._lock = threading.Lock()

    def run(self, seconds: float, switch_s: float) -> None:
        with self.client:
            self.client.open(prompt=prompt(0), seed=1)
            threading.Thread(target=self._receive, daemon=True).start()
            begin = last = time.monotonic()
            number, next_switch = 0, begin + switch_s
            while (now := time.monotonic()) < begin + seconds:
                self._play(now - last)
                last = now
                if now >= next_switch:
                    number, next_switch = number + 1, now + switch_s
                    with self._lock:
                        self._sent_at, self._awaited = now, None
                    self.client.send("prompt", text=prompt(number))
                self.client.send("played", epoch=self.client.epoch, video_frame=int(self.played))
                time.sleep(PERIOD_S)
            self.client.send("end")

    def _play(self, elapsed_s: float) -> None:
        fps = self.client.hello["fps"]
        with self._lock:
            if self.received and self.played >= self.received:
                self.stalled_s += elapsed_s
            self.played = min(self.played + elapsed_s * fps, self.received)
            if self._awaited is not None and self._sent_at is not None and self.played > self._awaited:
                self.latencies_s.append(time.monotonic() - self._sent_at)
                self._sent_at = self._awaited = None

    def _receive(self) -> None:
        try:
            while True:
                item = self.client.receive()
                with self._lock:
                    if isinstance(item, Media):
                        self.received = max(self.received, item.video_frame + item.num_video_frames)
                    elif item["type"] == "switch":
                        self._awaited = item["video_frame"]
        except Exception as error:  # the session has ended
            log.info("the viewer's connection: %s", error)


def prompt(number: int) -> str:
    return f"A big {COLOURS[number % len(COLOURS)]} star stands still on a black background."


def rss_mb(pid: int) -> float:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+)", text)[0]) / 1000


def processes(server: int) -> dict[str, int]:
    """The server and its engine, which is the child that takes most memory."""
    children = [int(pid) for pid in Path(f"/proc/{server}/task/{server}/children").read_text().split()]
    return {"server": server, "engine": max(children, key=rss_mb)}


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
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        assert server.stdout is not None
        url = next(found[0] for line in server.stdout if (found := re.findall(r"http://\S+:\d+", line)))
        threading.Thread(target=lambda: [None for _ in server.stdout or ()], daemon=True).start()
        while LiveClient(url).get("/api/health").find(b'"ready"') < 0:
            time.sleep(0.5)
        try:
            yield server.pid, url
        finally:
            server.terminate()


def soak(server: int, url: str, seconds: float, switch_s: float, connects: int) -> dict[str, Any]:
    """One viewer who stays, and others."""
    viewer, stop, memory, kept = Viewer(url), threading.Event(), list[dict[str, float]](), list[float]()
    around = (url, connects, seconds * 0.8 / max(connects, 1), stop)

    def watch() -> None:
        while not stop.wait(5):
            kept.append(json.loads(LiveClient(url).get("/api/health"))["kept_bytes"] / 1e6)
            memory.append({name: rss_mb(pid) for name, pid in processes(server).items()})

    threading.Thread(target=others, args=around, daemon=True).start()
    threading.Thread(target=watch, daemon=True).start()
    viewer.run(seconds, switch_s)
    stop.set()
    early, late = len(kept) // 10, len(kept) - 1
    return {
        "seconds": seconds,
        "played_video_frames": int(viewer.played),
        "fps": round(viewer.played / seconds, 2),
        "stalled_s": round(viewer.stalled_s, 2),
        "prompts": len(viewer.latencies_s),
        "prompt_to_picture_s": summary(viewer.latencies_s),
        "memory_mb": {name: [round(memory[i][name], 1) for i in (early, late)] for name in memory[early]},
        "on_disk_mb": [round(kept[i], 1) for i in (early, late)],
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


def summary(values: Sequence[float]) -> dict[str, float]:
    return {name: round(of(values), 2) for name, of in (("median", statistics.median), ("min", min), ("max", max))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--switch-s", type=float, default=15.0, help="seconds between prompts")
    parser.add_argument("--connects", type=int, default=50)
    parser.add_argument("--browser", action="store_true", help="measure in the page instead")
    parser.add_argument("--prompts", type=int, default=20, help="of --browser")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    args = parser.parse_args()
    with serving(args.settings) as (server, url):
        if args.browser:
            result = in_browser(url, args.prompts)
        else:
            result = soak(server, url, args.seconds, args.switch_s, args.connects)
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
