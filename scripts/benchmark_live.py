"""A viewer of the live server for some minutes: frame rate, stalls, time from prompt to picture, memory.

python scripts/benchmark_live.py --seconds 600 [key=value ...]     settings are those of `longlive serve`

The viewer plays at the content's frame rate what it has received and types a prompt now and then. Meanwhile others come
and go (--connects of them, one after the other), and one opens a session and never reads. Prints one JSON line. Linux.

memory_mb: after a tenth of the time, and at the end. kept: latents and video of all sessions, which the server keeps so
that their viewers may go back; what it takes besides must not grow.
"""

import argparse
import json
import logging
import re
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

from longlive.web.client import LiveClient, Media

COLOURS = ("red", "blue", "green", "yellow", "pink")
PERIOD_S = 0.1  # between reports of what has been played
log = logging.getLogger("benchmark_live")


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
    return f"A big {COLOURS[number % len(COLOURS)]} star spins on a black background."


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--switch-s", type=float, default=15.0, help="seconds between prompts")
    parser.add_argument("--connects", type=int, default=50)
    parser.add_argument("settings", nargs="*", metavar="key=value")
    args = parser.parse_args()
    command = [sys.executable, "-m", "longlive", "serve", "port=0", *args.settings]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        assert server.stdout is not None
        url = next(found[0] for line in server.stdout if (found := re.findall(r"http://\S+:\d+", line)))
        threading.Thread(target=lambda: [None for _ in server.stdout or ()], daemon=True).start()
        while LiveClient(url).get("/api/health").find(b'"ready"') < 0:
            time.sleep(0.5)
        viewer, stop, memory = Viewer(url), threading.Event(), list[dict[str, float]]()
        around = threading.Thread(
            target=others, args=(url, args.connects, args.seconds * 0.8 / max(args.connects, 1), stop), daemon=True
        )

        def watch() -> None:
            while not stop.wait(5):
                kept = json.loads(LiveClient(url).get("/api/health"))["kept_bytes"] / 1e6
                rss = {name: rss_mb(pid) for name, pid in processes(server.pid).items()}
                memory.append({**rss, "kept": kept, "server_but_kept": rss["server"] - kept})

        around.start()
        threading.Thread(target=watch, daemon=True).start()
        viewer.run(args.seconds, args.switch_s)
        stop.set()
        server.terminate()
    early, late = memory[len(memory) // 10], memory[-1]
    result = {
        "seconds": args.seconds,
        "played_video_frames": int(viewer.played),
        "fps": round(viewer.played / args.seconds, 2),
        "stalled_s": round(viewer.stalled_s, 2),
        "prompts": len(viewer.latencies_s),
        "prompt_to_picture_s": {
            "median": round(statistics.median(viewer.latencies_s), 2),
            "max": round(max(viewer.latencies_s), 2),
        },
        "memory_mb": {name: [round(early[name], 1), round(late[name], 1)] for name in early},
        "connects": args.connects,
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
