"""Live without a browser: prompts are lines of text, a video file grows."""

import json
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from longlive.build import choose_device, choose_model, load_models, make_session_config
from longlive.builtin import BUILTIN
from longlive.config import InferenceConfig
from longlive.data.shapes.captions import parse
from longlive.errors import InputError
from longlive.inference.pipeline import load_clip, on_host
from longlive.inference.session import Chunk, Session
from longlive.inference.video import VideoWriter

log = logging.getLogger(__name__)

_AHEAD_S = 1.0


@dataclass
class _Story:
    """What has been shown, for a prompt file."""

    seed: int
    start_from: str | None
    prompts: list[str] = field(default_factory=list)
    switch_frames: list[int] = field(default_factory=list)
    num_frames: int = 0

    def add(self, prompt: str, num_frames: int) -> None:
        if not self.prompts or prompt != self.prompts[-1]:
            if self.prompts:
                self.switch_frames.append(self.num_frames)
            self.prompts.append(prompt)
        self.num_frames += num_frames

    def write(self, path: Path) -> None:
        told = {"prompts": self.prompts, "switch_frame_indices": self.switch_frames, "seed": self.seed}
        told |= {"num_output_frames": self.num_frames}
        if self.start_from is not None:
            told["start_from"] = self.start_from
        path.write_text(json.dumps(told, ensure_ascii=False) + "\n", encoding="utf-8")


def live(config: InferenceConfig, explicit: frozenset[str], lines: TextIO) -> None:
    """Make a video whose prompt is the newest line, until the end of `lines` (Ctrl-D).

    At a terminal the video runs at its own pace and a line takes effect at the next block. Otherwise every line is one
    block, an empty one goes on under the same prompt: the same lines always make the same video. Beside the mp4 a
    prompt file is left that makes it again. Ctrl-C ends the video as well. Raises InputError where there is no prompt.
    """
    config = choose_model(config, explicit)
    session_config = make_session_config(config)
    clip = load_clip(config.start_from, session_config, config.fps)
    session = Session(load_models(config, choose_device(config.device)), session_config, [config.seed])
    read = _typed(lines) if lines.isatty() else _piped(lines)
    prompt = read("")
    if not prompt:
        raise InputError("no prompt: type a line, or give some on the standard input")
    path = Path(config.output_folder) / time.strftime("live-%Y%m%d-%H%M%S.mp4")
    story, start = _Story(config.seed, config.start_from), time.monotonic()
    with VideoWriter(path, config.fps, config.height, config.width, config.crf) as writer:
        log.info("the video grows in %s; each line is the next prompt, Ctrl-D ends", writer.partial_path)
        session.set_prompt(prompt)
        if clip is not None:
            _write(writer, session.start_from(clip))
        try:
            while prompt is not None:
                if config.model_name == BUILTIN and prompt not in story.prompts:
                    parse(prompt)  # warns of what the model does not know
                session.set_prompt(prompt)
                chunk = session.next_chunk()
                _write(writer, chunk)
                story.add(prompt, chunk.latents.shape[1])
                if lines.isatty():
                    ahead_s = writer.num_frames / config.fps - (time.monotonic() - start)
                    time.sleep(max(0.0, ahead_s - _AHEAD_S))
                prompt = read(prompt)
        except KeyboardInterrupt:
            if not story.prompts:
                raise
    story.write(path.with_suffix(".jsonl"))
    log.info("%s", path)


def _write(writer: VideoWriter, chunk: Chunk) -> None:
    for pixels in on_host([chunk]):
        writer.write(pixels[0])


def _piped(lines: TextIO) -> Callable[[str], str | None]:
    """For each block the next line, the prompt before it where that is empty, None at the end."""

    def read(before: str) -> str | None:
        line = lines.readline()
        return (" ".join(line.split()) or before) if line else None

    return read


def _typed(lines: TextIO) -> Callable[[str], str | None]:
    """For each block the newest line; for the first one it waits."""
    typed: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def listen() -> None:
        try:
            for line in lines:
                if line.strip():
                    typed.put(" ".join(line.split()))
        finally:  # the terminal may be gone, or what was typed no text: without an end the video would grow for ever
            typed.put(None)

    threading.Thread(target=listen, daemon=True).start()

    def read(before: str) -> str | None:
        newest: str | None = before or typed.get()
        while newest is not None and not typed.empty():
            newest = typed.get()
        return newest

    return read
