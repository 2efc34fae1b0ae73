"""From scripts to video files: plan the jobs, batch them, play them through sessions, write what comes out.

A job is one video. Its file name says which prompt and sample it is and ends in a fingerprint of everything that
determines the picture; a finished video is therefore never made twice, nor overwritten by another, and an interrupted
run goes on where it stopped.
"""

import hashlib
import itertools
import json
import logging
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from longlive.data.clips import from_uint8, read_clip
from longlive.data.prompts import Script
from longlive.inference.session import Chunk, Models, Session, SessionConfig
from longlive.inference.video import AnimationWriter, ContactSheet, VideoWriter
from longlive.weights.files import fingerprint, write_json

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One video to make. name: file name without ending."""

    name: str
    script: Script
    seed: int

    @property
    def schedule(self) -> tuple[object, ...]:
        """What jobs must share to be made side by side: also where the prompt does not change at a switch, as a switch
        of one video recaches all."""
        script = self.script
        changes = [before != after for before, after in itertools.pairwise(script.prompts)]
        return script.num_frames, script.switch_frames, changes, script.start_from


@dataclass(frozen=True)
class OutputConfig:
    """Where and how videos are written. crf: H.264 quality, 0 (lossless) to 51."""

    folder: Path
    fps: int = 16
    crf: int = 18
    contact_sheet: bool = True
    animation: bool = False
    overwrite: bool = False


def plan_jobs(
    scripts: Sequence[Script], *, num_samples: int, seed: int, by_index: bool, identity: Mapping[str, Any]
) -> list[Job]:
    """All videos of a run: `num_samples` of every script, with seeds seed, seed + 1, ... (the script's own seed first).

    identity: whatever else determines the files; it enters the fingerprint in the names. Scripts that would make the
    same video under the same name make it once.
    """
    jobs: dict[str, Job] = {}
    for index, script in enumerate(scripts):
        for sample in range(num_samples):
            job_seed = (seed if script.seed is None else script.seed) + sample
            clip = None if script.start_from is None else fingerprint(Path(script.start_from))
            content = {**identity, **asdict(script), "start_from": clip, "seed": job_seed}
            digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:8]
            words = "-".join(re.findall(r"\w+", script.prompts[0].lower()))[:60].strip("-")
            stem = f"{index:03d}-{sample}" if by_index else f"{words or 'prompt'}-{sample}"
            name = f"{stem}-{digest}"
            jobs[name] = Job(name, script, job_seed)
    return list(jobs.values())


def missing_jobs(jobs: Sequence[Job], output: OutputConfig) -> list[Job]:
    """The jobs whose video, or animated picture where one is wanted, is not there yet; all, if they are to be
    overwritten."""
    suffixes = [".mp4", ".webp"] if output.animation else [".mp4"]
    missing = [
        job
        for job in jobs
        if output.overwrite or not all((output.folder / f"{job.name}{suffix}").exists() for suffix in suffixes)
    ]
    if len(missing) < len(jobs):
        log.info("%d of %d videos are there already in %s", len(jobs) - len(missing), len(jobs), output.folder)
    return missing


def make_videos(
    models: Models,
    session_config: SessionConfig,
    output: OutputConfig,
    jobs: Sequence[Job],
    *,
    batch_size: int,
    info: Mapping[str, Any],
    progress: bool,
) -> None:
    """Make every job's video. info: what the sidecars say besides prompts, seed and timings."""
    factor = models.vae.config.temporal_factor
    total = sum(num_video_frames(job.script, None, factor) for job in jobs)
    with (
        logging_redirect_tqdm(),
        tqdm(total=total, unit=" frames", disable=not progress, dynamic_ncols=True, smoothing=0.05) as bar,
    ):
        for _, group in itertools.groupby(jobs, key=lambda job: job.schedule):
            same = list(group)
            script = same[0].script
            clip = load_clip(script.start_from, session_config, output.fps)
            added = num_video_frames(script, clip, factor) - num_video_frames(script, None, factor)
            for first in range(0, len(same), batch_size):
                batch = same[first : first + batch_size]
                bar.set_description(batch[0].name)
                session = Session(models, session_config, [job.seed for job in batch])
                bar.total += added * len(batch)
                _make_batch(session, output, batch, clip, info, bar)
                session.close()


def _make_batch(
    session: Session,
    output: OutputConfig,
    batch: Sequence[Job],
    clip: Tensor | None,
    info: Mapping[str, Any],
    bar: "tqdm[Any]",
) -> None:
    scripts, device = [job.script for job in batch], session.models.device
    clock = Clock(device)
    session.models.encode_prompts([prompt for script in scripts for prompt in script.prompts])
    clock.start()
    with ExitStack() as stack:
        videos = [stack.enter_context(VideoFile(output, session, job, clip)) for job in batch]
        writer = stack.enter_context(ThreadPoolExecutor(max_workers=1))  # left before the files are closed
        written: Future[None] | None = None
        for pixels in on_host(play(session, scripts, clip)):
            clock.add(pixels.shape[1])
            if written is not None:
                written.result()
            written = writer.submit(_write, videos, pixels, bar)
        if written is not None:
            written.result()
        for video in videos:
            video.describe({**info, "timings": clock.summary()})


def _write(videos: Sequence["VideoFile"], pixels: Tensor, bar: "tqdm[Any]") -> None:
    """Add pixels [B, V, height, width, 3] to B videos. Runs beside the main thread, which must keep the GPU's queue of
    kernels full: it holds only a part of a block."""
    for video, frames in zip(videos, pixels, strict=True):
        video.write(frames)
    bar.update(pixels.shape[0] * pixels.shape[1])


def load_clip(path: str | None, config: SessionConfig, fps: int) -> Tensor | None:
    """A picture or clip at the session's size and rate as pixels [1, 1 + 4k, 3, height, width] in [-1, 1]."""
    if path is None:
        return None
    frames = read_clip(path, config.height, config.width, fps)
    return from_uint8(frames)[None]


def num_video_frames(script: Script, clip: Tensor | None, temporal_factor: int) -> int:
    """Video frames of a script's video; the first latent of a video is one frame, every other `temporal_factor`."""
    if clip is None:
        return 1 + temporal_factor * (script.num_frames - 1)
    return clip.shape[1] + temporal_factor * script.num_frames


def prompt_starts(script: Script, frames_per_block: int, clip: Tensor | None, temporal_factor: int) -> list[int]:
    """The video frame at which each prompt takes over: a block's first, after the clip if there is one."""
    clip_frames = 0 if clip is None else clip.shape[1]
    starts = [-(-switch // frames_per_block) * frames_per_block for switch in script.switch_frames]
    skipped = 0 if clip_frames else temporal_factor - 1  # the first latent of a video is one frame
    return [0, *(clip_frames + temporal_factor * start - skipped for start in starts)]


def play(session: Session, scripts: Sequence[Script], clip: Tensor | None = None) -> Iterator[Chunk]:
    """Run scripts of one schedule through a session and yield its chunks.

    Prompt i + 1 takes over at the first block that starts at or after its switch frame. The frames of a clip to start
    from come first and are not counted.
    """
    prompts, switches = list(zip(*(script.prompts for script in scripts), strict=True)), scripts[0].switch_frames
    session.set_prompt(prompts[0])
    if clip is not None:
        yield session.start_from(clip)
    offset = session.num_frames
    while (frame := session.num_frames - offset) < scripts[0].num_frames:
        session.set_prompt(prompts[sum(frame >= switch for switch in switches)])
        yield session.next_chunk()


class VideoFile:
    """The files of one job: the mp4, and beside it a JSON sidecar, a contact sheet, an animated picture. A context
    manager."""

    def __init__(self, output: OutputConfig, session: Session, job: Job, clip: Tensor | None) -> None:
        self.output, self.job = output, job
        self.path = output.folder / f"{job.name}.mp4"
        size = (session.config.height, session.config.width)
        self._writer = VideoWriter(self.path, output.fps, *size, output.crf)
        animation = self.path.with_suffix(".webp")
        self._animation = AnimationWriter(animation, output.fps, *size) if output.animation else None
        self._open = ExitStack()
        factor = session.models.vae.config.temporal_factor
        self._starts = prompt_starts(job.script, session.config.sampler.frames_per_block, clip, factor)
        num_frames = num_video_frames(job.script, clip, factor)
        self._sheet = ContactSheet(num_frames, output.fps) if output.contact_sheet else None

    def __enter__(self) -> Self:
        self._open.enter_context(self._writer)
        if self._animation is not None:
            self._open.enter_context(self._animation)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._open.__exit__(*exception)

    def write(self, frames: Tensor) -> None:
        """Add frames [V, height, width, 3] uint8."""
        self._writer.write(frames)
        if self._animation is not None:
            self._animation.write(frames)
        if self._sheet is not None:
            self._sheet.add(frames)

    def describe(self, info: Mapping[str, Any]) -> None:
        """Write sidecar and contact sheet: they are there before the finished mp4 gets its name."""
        script = self.job.script
        if self._sheet is not None:
            self._sheet.save(self.path.with_suffix(".png"), list(zip(self._starts, script.prompts, strict=True)))
        told = {
            "prompts": script.prompts,
            "prompt_start_seconds": [start / self.output.fps for start in self._starts],
            "switch_frame_indices": script.switch_frames,
            "num_output_frames": script.num_frames,
            "num_video_frames": self._writer.num_frames,
            "seed": self.job.seed,
            "start_from": script.start_from,
            "fps": self.output.fps,
        }
        write_json(self.path.with_suffix(".json"), {**told, **info})


def on_host(chunks: Iterable[Chunk]) -> Iterator[Tensor]:
    """The pixels of each chunk on the CPU: the first at once, the others one chunk behind, so that the GPU makes the
    next while the caller uses this one."""
    waiting: deque[Callable[[], Tensor]] = deque()
    for number, chunk in enumerate(chunks):
        if chunk.pixels.device.type != "cuda":
            yield chunk.pixels
            continue
        waiting.append(download(chunk.pixels))
        if number != 1:
            yield waiting.popleft()()
    while waiting:
        yield waiting.popleft()()


def download(tensor: Tensor) -> Callable[[], Tensor]:
    """Start to bring a tensor to the CPU; calling the result waits until it has arrived."""
    if tensor.device.type != "cuda":
        return lambda: tensor
    host = torch.empty_like(tensor, device="cpu", pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def arrived() -> Tensor:
        copied.synchronize()
        return host

    return arrived


class Clock:
    """Times a batch: the prompts, the first chunk, and everything from there on."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._created = time.perf_counter()
        self._started = self._first = self._created
        self._frames: list[int] = []
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def start(self) -> None:
        """The prompts are encoded; generation begins."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._started = time.perf_counter()

    def add(self, num_video_frames: int) -> None:
        """A chunk has arrived on the host."""
        if not self._frames:
            self._first = time.perf_counter()
        self._frames.append(num_video_frames)

    def summary(self) -> dict[str, Any]:
        """Seconds, and video frames per second of each video: generation, decoding and encoding to H.264 included."""
        now = time.perf_counter()
        told = {
            "encode_prompts_seconds": round(self._started - self._created, 3),
            "first_chunk_seconds": round(self._first - self._started, 3),
            "total_seconds": round(now - self._started, 3),
            "fps": round(sum(self._frames) / (now - self._started), 2),
        }
        if len(self._frames) > 1:
            told["fps_after_first_chunk"] = round(sum(self._frames[1:]) / (now - self._first), 2)
        if self._device.type == "cuda":
            told["peak_gpu_memory_gb"] = round(torch.cuda.max_memory_allocated(self._device) / 1e9, 2)
        return told
