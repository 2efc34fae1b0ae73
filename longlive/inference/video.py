"""Frames to files: mp4 or animated picture written as they are made, contact sheet.

Frames are uint8 RGB tensors [F, H, W, 3] (F = video frames). A file takes its name only once it is complete.
"""

import os
import tempfile
import textwrap
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Self, cast

import av
import torch
from av.video.reformatter import Colorspace
from av.video.stream import VideoStream
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from longlive.errors import InputError
from longlive.weights.files import atomic_file

# hybrid_fragmented: fragments while writing, an ordinary indexed mp4 once closed; delay_moov: time stamps from 0.
_MP4_OPTIONS = {"movflags": "+frag_keyframe+delay_moov+hybrid_fragmented", "flush_packets": "1"}
# veryfast: 4x as fast as medium at the same PSNR. x264's output depends on the number of threads and on the CPU (with
# AVX-512 it even varies from run to run): both are fixed, so that the same frames give the same file everywhere.
_H264_OPTIONS = {"preset": "veryfast", "threads": "4", "x264-params": "cpu-independent=1"}
_COLOUR_OPTIONS = {"colorspace": "bt709", "color_primaries": "bt709", "color_trc": "bt709", "color_range": "tv"}
_WithOptions = tuple[str, dict[str, str]]
"""A name of FFmpeg's with its options."""
_WEBP_OPTIONS = {"quality": "80", "compression_level": "6"}


def check_writable(folder: str | Path) -> None:
    """Make `folder` where it is missing and try it with a temporary file. Raises `InputError`."""
    with _reporting_write_errors(Path(folder)):
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


class VideoWriter:
    """H.264 mp4 (yuv420p, BT.709), encoded frame by frame in constant memory. A context manager.

    Until the end the file is `NAME.partial.mp4`, in fragments of one second, so that it plays even if the process is
    killed (then without the last two seconds or so, which are still in the encoder). Leaving the context completes it
    and renames it to `NAME.mp4`; leaving by an exception, Ctrl-C included, completes it under its partial name. A video
    of no frames leaves no file. Raises `InputError` when the folder cannot be written or the disk is full; the final
    name then does not appear. Threads may take turns with it, but not use it at once.
    """

    _COLOURS = Colorspace.ITU709

    def __init__(self, path: str | Path, fps: int, height: int, width: int, crf: int = 18) -> None:
        encoder = {"crf": str(crf), "g": str(fps), **_H264_OPTIONS, **_COLOUR_OPTIONS}
        self._begin(path, fps, (height, width), ("mp4", _MP4_OPTIONS), ("libx264", encoder))

    def _begin(
        self, path: str | Path, fps: int, size: tuple[int, int], container: _WithOptions, encoder: _WithOptions
    ) -> None:
        self.path = Path(path)
        self.partial_path = self.path.with_name(f"{self.path.stem}.partial{self.path.suffix}")
        self.num_frames = 0
        self._time_base = Fraction(1, fps)
        self._lock = threading.Lock()  # a second Ctrl-C closes the file while another thread may still be writing
        check_writable(self.path.parent)
        with _reporting_write_errors(self.path):
            # Absolute, because FFmpeg takes what stands before a colon in a relative path for a protocol.
            target, (kind, options) = str(self.partial_path.absolute()), container
            self._container = av.open(target, "w", format=kind, options=options)
            self._stream = cast(VideoStream, self._container.add_stream(encoder[0], rate=fps, options=encoder[1]))
            self._stream.height, self._stream.width = size
            self._stream.pix_fmt = "yuv420p"
            self._container.start_encoding()

    def write(self, frames: Tensor) -> None:
        """Append uint8 frames [F, H, W, 3], on any device."""
        assert frames.dtype == torch.uint8, frames.dtype
        assert frames.shape[1:] == (self._stream.height, self._stream.width, 3), frames.shape
        with self._lock, _reporting_write_errors(self.path):
            for pixels in frames.cpu().numpy():
                rgb = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame = rgb.reformat(format="yuv420p", dst_colorspace=self._COLOURS)
                frame.pts, frame.time_base = self.num_frames, self._time_base
                self._container.mux(self._stream.encode(frame))
                self.num_frames += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock, _reporting_write_errors(self.path):
            try:
                self._container.mux(self._stream.encode(None))
            finally:
                self._container.close()
                if self.num_frames == 0:
                    self.partial_path.unlink()
            if error is None and self.num_frames > 0:
                os.replace(self.partial_path, self.path)


class AnimationWriter(VideoWriter):
    """An animated WebP (BT.601), for small videos: a `VideoWriter` whose encoder keeps what it has been given in memory
    and writes all of it at the end, so that the partial file of a killed process is empty."""

    _COLOURS = Colorspace.ITU601

    def __init__(self, path: str | Path, fps: int, height: int, width: int) -> None:
        self._begin(path, fps, (height, width), ("webp", {"loop": "0"}), ("libwebp_anim", _WEBP_OPTIONS))


class ContactSheet:
    """A picture of `num_tiles` frames spread evenly over a video, taken as the frames pass by in constant memory."""

    _COLUMNS, _GAP_PX, _LABEL_PX, _LINE_PX, _INDENT_PX = 4, 16, 30, 19, 32
    _BACKGROUND, _TEXT, _FAINT = "#14161a", "#d8dbe0", "#8b919b"
    _COLOURS = ("#6cb6ff", "#f0a35e", "#7ecb8f", "#e58fb5", "#c3a6ff", "#e0cf6a")  # of prompts, in turn

    def __init__(self, num_video_frames: int, fps: int, *, num_tiles: int = 12, tile_width_px: int = 320) -> None:
        last, gaps = num_video_frames - 1, max(num_tiles - 1, 1)
        self._wanted = sorted({round(i * last / gaps) for i in range(num_tiles)})
        self._fps = fps
        self._tile_width_px = tile_width_px
        self._num_seen = 0
        self._tiles: list[tuple[int, Image.Image]] = []  # (video frame, thumbnail)

    def add(self, frames: Tensor) -> None:
        """Take what is needed of the next uint8 frames [F, H, W, 3]."""
        start, self._num_seen = self._num_seen, self._num_seen + len(frames)
        for index in self._wanted:
            if start <= index < self._num_seen:
                picture = Image.fromarray(frames[index - start].cpu().numpy())
                size_px = (self._tile_width_px, round(self._tile_width_px * picture.height / picture.width))
                self._tiles.append((index, picture.resize(size_px, Image.Resampling.LANCZOS)))

    def save(self, path: str | Path, captions: Sequence[tuple[int, str]]) -> None:
        """Write a PNG: the tiles with their times, and below them every prompt that they show.

        `captions` are (first video frame, prompt) in order of time; where there are several, tiles and prompts bear
        the prompt's number. Nothing is written if no frame was seen. Raises `InputError` when it cannot be written.
        """
        if not self._tiles:
            return
        active = [sum(first <= index for first, _ in captions) for index, _ in self._tiles]  # prompt numbers, from 1
        num_columns = min(self._COLUMNS, len(self._tiles))
        width_px = num_columns * (self._tile_width_px + self._GAP_PX) + self._GAP_PX
        row_px = self._tiles[0][1].height + self._LABEL_PX
        legend_top_px = self._GAP_PX + self._GAP_PX // 2 + -(-len(self._tiles) // num_columns) * row_px

        indent_px = self._INDENT_PX if len(captions) > 1 else 0
        shown = [number for number in range(1, len(captions) + 1) if number in active]
        legend = {n: _wrap(captions[n - 1][1], width_px - indent_px - 2 * self._GAP_PX) for n in shown}
        legend_px = sum(len(lines) * self._LINE_PX + self._GAP_PX // 2 for lines in legend.values())

        sheet = Image.new("RGB", (width_px, legend_top_px + legend_px + self._GAP_PX // 2), self._BACKGROUND)
        for i, ((index, tile), number) in enumerate(zip(self._tiles, active, strict=True)):
            x = self._GAP_PX + i % num_columns * (self._tile_width_px + self._GAP_PX)
            y = self._GAP_PX + i // num_columns * row_px
            sheet.paste(tile, (x, y))
            self._draw_label(sheet, x, y + tile.height + self._LABEL_PX // 2, index, number if indent_px else None)
        self._draw_legend(sheet, legend_top_px, indent_px, legend)
        with atomic_file(path) as file:
            sheet.save(file, format="PNG")

    def _draw_label(self, sheet: Image.Image, x: int, y: int, index: int, number: int | None) -> None:
        """Below a tile: the time at its right end, the number of its prompt at the left. `y` is the line's middle."""
        minutes, seconds = divmod(round(10 * index / self._fps), 600)
        time = f"{minutes}:{seconds / 10:04.1f}"
        ImageDraw.Draw(sheet).text((x + self._tile_width_px, y), time, self._FAINT, _font(), anchor="rm")
        if number is not None:
            self._draw_number(sheet, x, y, number)

    def _draw_legend(self, sheet: Image.Image, y: int, indent_px: int, legend: Mapping[int, Sequence[str]]) -> None:
        draw = ImageDraw.Draw(sheet)
        for number, lines in legend.items():
            if indent_px:
                self._draw_number(sheet, self._GAP_PX, y + self._LINE_PX // 2, number)
            for line in lines:
                draw.text((self._GAP_PX + indent_px, y + self._LINE_PX // 2), line, self._TEXT, _font(), anchor="lm")
                y += self._LINE_PX
            y += self._GAP_PX // 2

    def _draw_number(self, sheet: Image.Image, x: int, y: int, number: int) -> None:
        draw, colour = ImageDraw.Draw(sheet), self._COLOURS[(number - 1) % len(self._COLOURS)]
        draw.rounded_rectangle((x, y - 8, x + 22, y + 8), 5, colour)
        draw.text((x + 11, y), str(number), self._BACKGROUND, _font(), anchor="mm")


def _font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(14)


def _wrap(text: str, width_px: int) -> list[str]:
    """Break `text` into at most 8 lines that fit into `width_px`, as far as its characters are of even width."""
    text = " ".join(text.split())
    mean_px = _font().getlength(text) / max(len(text), 1)
    return textwrap.wrap(text, int(width_px / max(mean_px, 1) / 1.06), max_lines=8, placeholder=" …") or [""]


@contextmanager
def _reporting_write_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals, a full disk among them, into an `InputError` about `path`."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error
