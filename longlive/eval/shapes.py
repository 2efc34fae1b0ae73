"""The Shapes suite: makes videos of held-out scenes, judges them, and writes every figure to one JSON file.

A video is judged in windows as it is made, and only the frames of windows to come are held: its length costs no memory.
Scenes and noise follow from the seed and the number of the scene alone.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from longlive.build import choose_device, load_models, make_session_config, versions, weight_files
from longlive.config import check_used, to_dict
from longlive.data.clips import from_uint8
from longlive.data.shapes import FPS
from longlive.data.shapes.captions import prompt_of
from longlive.data.shapes.clips import HELD_OUT, ShapesClips, ShapesSwitches
from longlive.data.shapes.render import render
from longlive.data.shapes.world import Scene
from longlive.errors import InputError
from longlive.eval.evaluate_config import (
    UNUSED,
    WINDOW_S,
    WINDOW_VIDEO_FRAMES,
    EvaluateConfig,
    teacher_clips,
)
from longlive.eval.figures import (
    Figures,
    accuracy,
    attribute_rates,
    drifts,
    jumps,
    scene_accuracy,
    switch_accuracy,
    switch_drifts,
)
from longlive.eval.judge import PLACE_FRAMES, Reading, judge_batch, jump_px, observe_batch, read
from longlive.eval.measure import Measures
from longlive.eval.report import markdown_table
from longlive.eval.statistics import Figure, average
from longlive.eval.studio import Studio, batches, cut_windows
from longlive.inference.session import Models, Session, to_uint8
from longlive.inference.video import check_writable
from longlive.make_clips import make_teacher
from longlive.training.draw import derived_seed
from longlive.weights.files import fingerprint, write_json

log = logging.getLogger(__name__)

SWITCH_WINDOWS = {"0-2 s": range(0, 2 * FPS), "2-4 s": range(2 * FPS, 4 * FPS)}
"""Video frames after a switch in which the new caption is looked for."""
_SETTLED = range(2 * FPS, 2 * FPS + PLACE_FRAMES)  # after a switch, for drift
_BEFORE = WINDOW_VIDEO_FRAMES  # frames judged before a switch


def run_shapes(config: EvaluateConfig, explicit: frozenset[str], out: Path) -> None:
    """Evaluate the models of a configuration and write the figures to `out`. explicit: keys typed on the command line.

    Raises InputError for files that do not fit and for an `out` that cannot be written, before any video is made.
    """
    check_used(explicit, UNUSED, "to evaluate, which makes its own prompts")
    if not out.parent.is_dir():
        raise InputError(f"--json {out}: the folder {out.parent} does not exist")
    check_writable(out.parent)
    start = time.perf_counter()
    device = choose_device(config.device)
    files = weight_files(config)
    if "teacher" in config.parts:
        files.append(Path(config.teacher_ckpt or ""))
    weights = {str(path): fingerprint(path) for path in files}
    figures = evaluate(config, load_models(config, device))
    results = {
        **{"suite": "shapes", "seed": config.seed, "wall_s": time.perf_counter() - start},
        **{"versions": versions(device), "weights": weights, "config": to_dict(config)},
        **figures,
    }
    write_json(out, results)
    log.info("%s\n\nwritten to %s", markdown_table({out.stem: results}), out)


def evaluate(config: EvaluateConfig, models: Models) -> dict[str, Any]:
    """The figures of every part, by its name."""
    figures: dict[str, Any] = {}
    with logging_redirect_tqdm(), tqdm(unit=" frames", dynamic_ncols=True, smoothing=0.05) as bar:
        studio = Studio(models, make_session_config(config), bar)
        bar.reset(num_video_frames(config, studio))
        scenes = ShapesClips(config.num_prompts, config.seed, split=HELD_OUT).scenes(range(config.num_prompts))
        for part in ("world", "vae"):
            if part in config.parts:
                readings, psnr_db = judge_scenes(config, studio, scenes, is_encoded=part == "vae")
                figures[part] = scene_accuracy(readings, scenes) | {"psnr_db": psnr_db}
        taught = judge_teacher(config, studio, scenes) if "teacher" in config.parts else []
        if taught:
            figures["teacher"] = accuracy(taught, [scene.caption for scene in scenes])
        if "length" in config.parts:
            figures |= length_figures(config, judge_lengths(config, studio, scenes), taught, scenes)
        if "switch" in config.parts:
            figures["switch"] = {cache: judge_switches(config, studio, cache) for cache in config.switch_caches}
    return figures


def num_video_frames(config: EvaluateConfig, studio: Studio) -> int:
    """How many frames all parts make, of all videos."""
    parts = {
        "world": config.num_prompts * WINDOW_VIDEO_FRAMES,
        "vae": config.num_prompts * WINDOW_VIDEO_FRAMES,
        "teacher": config.num_prompts * WINDOW_VIDEO_FRAMES,
        "length": sum(len(numbers) * judged_window(times[-1]).stop for numbers, times in length_groups(config)),
        "switch": len(config.switch_caches) * config.num_prompts * (switch_frame(config, studio) + _SETTLED.stop),
    }
    return sum(parts[part] for part in config.parts)


# --- the world and the VAE --------------------------------------------------------------------------------------------


@torch.no_grad()
def judge_scenes(
    config: EvaluateConfig, studio: Studio, scenes: Sequence[Scene], is_encoded: bool
) -> tuple[list[Reading], Figure]:
    """Readings of the scenes themselves, or encoded and decoded, and the PSNR of each, in dB (infinite: None)."""
    vae, readings, ratios = studio.models.vae, list[Reading](), list[float]()
    for numbers in batches(range(len(scenes)), config.batch_size):
        frames = render([scenes[number] for number in numbers], 0, WINDOW_VIDEO_FRAMES, studio.models.device)
        made = frames
        if is_encoded:
            made = to_uint8(vae.decode(vae.encode(from_uint8(frames))))
            errors = (made.float() - frames.float()).square().mean(dim=(1, 2, 3, 4))
            ratios += (10 * torch.log10(255**2 / errors)).tolist()
        readings += judge_batch(made)
        studio.bar.update(made.shape[0] * made.shape[1])
    return readings, average(ratios)


# --- the teacher ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def judge_teacher(config: EvaluateConfig, studio: Studio, scenes: Sequence[Scene]) -> list[Reading]:
    """Clips of the teacher for every scene, as the clips command makes them."""
    vae = studio.models.vae
    num_frames = vae.config.num_latent_frames(WINDOW_VIDEO_FRAMES)
    clips = teacher_clips(config, derived_seed(config.seed, "teacher"), num_frames)
    make = make_teacher(clips, [prompt_of(scene) for scene in scenes])
    readings = []
    for numbers in batches(range(len(scenes)), config.batch_size):
        pixels = to_uint8(vae.decode(make(numbers)[0]))
        readings += judge_batch(pixels)
        studio.bar.update(pixels.shape[0] * pixels.shape[1])
    return readings


# --- long videos ------------------------------------------------------------------------------------------------------


def judged_window(time_s: int) -> range:
    """The video frames judged for a time: those of the 5 s before it."""
    return range(FPS * (time_s - WINDOW_S), FPS * time_s + 1)


def length_groups(config: EvaluateConfig) -> list[tuple[range, tuple[int, ...]]]:
    """Numbers of scenes with the times at which they are judged: the first ones go on for longer."""
    num_long = min(config.num_long_prompts, config.num_prompts)
    early = tuple(time_s for time_s in config.times_s if time_s <= config.long_s)
    if early == config.times_s:
        return [(range(config.num_prompts), early)]
    groups = [(range(num_long), config.times_s), (range(num_long, config.num_prompts), early)]
    return [(numbers, times) for numbers, times in groups if numbers and times]


def judge_lengths(config: EvaluateConfig, studio: Studio, scenes: Sequence[Scene]) -> dict[int, list[Reading]]:
    """For every time the readings of the first scenes, of as many as go on for so long."""
    readings: dict[int, list[Reading]] = {time_s: [] for time_s in config.times_s}
    for group, times in length_groups(config):
        windows = [judged_window(time_s) for time_s in times]
        for numbers in batches(group, config.batch_size):
            session = Session(
                studio.models, studio.session, [derived_seed(config.seed, "length", number) for number in numbers]
            )
            session.set_prompt([prompt_of(scenes[number]) for number in numbers])
            pixels = cut_windows(studio.play(session, windows[-1].stop), windows)
            for time_s, window in zip(times, pixels, strict=True):
                readings[time_s] += judge_batch(window)
    return readings


def length_figures(
    config: EvaluateConfig, readings: dict[int, list[Reading]], taught: Sequence[Reading], scenes: Sequence[Scene]
) -> dict[str, dict[str, Figures]]:
    """Accuracy at every length, and drift since the first window.

    change: the videos' attributes against those of the same videos in their first 5 s; over_teacher: against those of
    the teacher's clips for the same scenes.
    """
    captions = [scene.caption for scene in scenes]
    rates = {time_s: attribute_rates(seen, captions[: len(seen)]) for time_s, seen in readings.items()}
    length = {str(time_s): accuracy(readings[time_s], captions[: len(readings[time_s])]) for time_s in config.lengths_s}
    for time_s in config.lengths_s:
        if time_s > WINDOW_S:
            length[str(time_s)]["change"] = _paired(rates[time_s], rates[WINDOW_S])
        elif taught:
            length[str(time_s)]["over_teacher"] = _paired(rates[time_s], attribute_rates(taught, captions))
    first = readings[WINDOW_S]
    drift = {str(time_s): drifts(first[: len(seen)], seen) for time_s, seen in readings.items() if time_s > WINDOW_S}
    return {"length": length, "drift": drift}


def _paired(values: Sequence[float], others: Sequence[float]) -> dict[str, float | int | None]:
    return average([a - b for a, b in zip(values, others, strict=False)])


# --- switches ---------------------------------------------------------------------------------------------------------


def switch_frame(config: EvaluateConfig, studio: Studio) -> int:
    """The video frame from which the second prompt holds: the first of a block."""
    return studio.whole_blocks(FPS * config.switch_s + 1)


def judge_switches(config: EvaluateConfig, studio: Studio, cache: str) -> dict[str, Figures]:
    """The figures of switches with what becomes of the cache, one of SWITCH_CACHES."""
    frame = switch_frame(config, studio)
    pairs = ShapesSwitches(config.num_prompts, config.seed, frame, HELD_OUT)
    readings: list[SwitchReadings] = []
    for numbers in batches(range(len(pairs)), config.batch_size):
        pieces = play_switch(config, studio, cache, numbers, pairs.prompts(numbers))
        (pixels,) = cut_windows(pieces, [range(frame - _BEFORE, frame + _SETTLED.stop)])
        readings += read_switches(pixels)
    return switch_figures(readings, pairs.scenes(range(len(pairs))))


def play_switch(
    config: EvaluateConfig, studio: Studio, cache: str, numbers: Sequence[int], prompts: Sequence[tuple[str, str]]
) -> Iterator[Tensor]:
    """Pixels of the blocks of videos whose prompts switch."""
    settings = replace(studio.session, switch_policy="none") if cache == "keep" else studio.session
    session = Session(studio.models, settings, [derived_seed(config.seed, "switch", number) for number in numbers])
    session.set_prompt([before for before, _ in prompts])
    yield from studio.play(session, switch_frame(config, studio))
    if cache == "clear":
        session = Session(studio.models, settings, [derived_seed(config.seed, "cleared", number) for number in numbers])
    session.set_prompt([after for _, after in prompts])
    yield from studio.play(session, _SETTLED.stop)


@dataclass(frozen=True)
class SwitchReadings:
    """What is seen of one switch. after: by the names of SWITCH_WINDOWS; settled: late and long enough for places."""

    before: Reading
    after: dict[str, Reading]
    settled: Reading
    jump_px: float


def read_switches(videos: Tensor) -> list[SwitchReadings]:
    """Read videos [B, V, height, width, 3] uint8 that switch after their first _BEFORE frames."""
    return [
        SwitchReadings(
            read(video, 0, _BEFORE),
            {name: _read_after(video, window) for name, window in SWITCH_WINDOWS.items()},
            _read_after(video, _SETTLED),
            jump_px(video, _BEFORE),
        )
        for video in observe_batch(videos)
    ]


def _read_after(video: Measures, window: range) -> Reading:
    return read(video, _BEFORE + window.start, _BEFORE + window.stop)


def switch_figures(readings: Sequence[SwitchReadings], scenes: Sequence[tuple[Scene, Scene]]) -> dict[str, Figures]:
    """Accuracy in the windows after a switch, continuity at it, and drift across it."""
    pairs = [(before.caption, after.caption) for before, after in scenes]
    befores, settled = [one.before for one in readings], [one.settled for one in readings]
    return {
        **{name: switch_accuracy([one.after[name] for one in readings], pairs) for name in SWITCH_WINDOWS},
        "continuity": jumps([one.jump_px for one in readings]),
        "drift": switch_drifts(befores, settled, pairs),
    }
