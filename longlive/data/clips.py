"""Pictures and clips: read from files as pixels, or stored as latents to train on.

Training takes clips from a source: of latents with their prompts (`LatentSource`) or of pixels (`PixelSource`). A
source here is a `.jsonl` index, one clip per line, paths relative to the index:

    {"prompt": "A red fox …", "latents": "000000.safetensors"}
    {"prompt": "A red fox …", "video": "fox.mp4"}

A safetensors file holds `latents` [F, C, h, w] and, for ODE pairs, `trajectory` [S, F, C, h, w]: the noisy states x_t
at the S denoising steps, in the order of the steps. All files of an index agree in these shapes.
"""

import json
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import av
import numpy as np
import safetensors.torch
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from torch import Tensor

from longlive.data.prompts import VIDEO_FRAMES_PER_LATENT, IndexLine, naming, read_index
from longlive.errors import InputError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

_FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")  # of safetensors

Shapes = dict[str, list[int]]
"""Of the tensors of a file, by name."""


@dataclass(frozen=True)
class ClipBatch:
    """B clips, float32, on the source's device.

    latents [B, F, C, h, w]; trajectory [B, S, F, C, h, w]: a teacher's states on the way to them; past [B, F, C, h, w]:
    what stands for them as a past; learnt_from [B]: the first frame that is to be learnt.
    """

    prompts: list[str]
    latents: Tensor
    trajectory: Tensor | None = None
    past: Tensor | None = None
    learnt_from: Tensor | None = None


class LatentSource(Protocol):
    """Clips of latents to train on."""

    def __len__(self) -> int: ...

    def batch(self, items: Sequence[int]) -> ClipBatch: ...


class PixelSource(Protocol):
    """Clips of pixels to train on: `pixels` gives [B, F, 3, H, W] in [-1, 1] (F = video frames), float32."""

    def __len__(self) -> int: ...

    def pixels(self, items: Sequence[int]) -> Tensor: ...


class LatentClips:
    """The clips of an index of safetensors files: a `LatentSource` that reads the values when a batch asks for them."""

    def __init__(self, path: str | Path) -> None:
        """Read the index and the header of every file. Raises `InputError` naming the line and the file that cannot be
        read or has other shapes than the first."""
        self._lines = read_index(path, "latents")
        shapes = _read_shapes(self._lines)
        num_frames, channels, height, width = shapes["latents"]
        self.shape = (num_frames, channels, height, width)
        self.num_steps = shapes["trajectory"][0] if "trajectory" in shapes else 0

    def __len__(self) -> int:
        return len(self._lines)

    def batch(self, items: Sequence[int]) -> ClipBatch:
        """The clips of these numbers. Raises `InputError` for NaN or infinite values and for a file gone by now."""
        lines = [self._lines[item] for item in items]
        latents = torch.stack([_read_tensor(line, "latents") for line in lines])
        trajectory = torch.stack([_read_tensor(line, "trajectory") for line in lines]) if self.num_steps else None
        return ClipBatch([line.prompt for line in lines], latents, trajectory)


def from_uint8(frames: Tensor) -> Tensor:
    """Pictures [..., H, W, 3] uint8 to pixels [..., 3, H, W] float32 in [-1, 1]."""
    return frames.movedim(-1, -3) / 127.5 - 1


class LatentPool:
    """Clips in memory, on any device: a `LatentSource`."""

    def __init__(
        self,
        prompts: Sequence[str],
        latents: Tensor,
        past: Tensor | None = None,
        learnt_from: Tensor | None = None,
    ) -> None:
        """latents and past [N, F, C, h, w] float32; learnt_from [N]."""
        self._prompts, self._latents, self._past, self._learnt_from = prompts, latents, past, learnt_from

    def __len__(self) -> int:
        return len(self._latents)

    def batch(self, items: Sequence[int]) -> ClipBatch:
        index = torch.tensor(items).to(self._latents.device, non_blocking=True)
        past = None if self._past is None else self._past[index]
        learnt_from = None if self._learnt_from is None else self._learnt_from[index]
        return ClipBatch([self._prompts[item] for item in items], self._latents[index], None, past, learnt_from)


class PixelPool:
    """Clips in memory, on any device: a `PixelSource`."""

    def __init__(self, frames: Tensor) -> None:
        """frames [N, F, H, W, 3] uint8."""
        self._frames = frames

    def __len__(self) -> int:
        return len(self._frames)

    def pixels(self, items: Sequence[int]) -> Tensor:
        index = torch.tensor(items).to(self._frames.device, non_blocking=True)
        return from_uint8(self._frames[index])


class ClipWriter:
    """Writes a folder of clips for `LatentClips`: `000000.safetensors`, …, and the index `clips.jsonl`.

    A clip is listed once its file is complete, and in a folder that has clips writing goes on after the last one
    listed. Only one process at a time may write to a folder.
    """

    def __init__(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """`dtype` is that of the files. Raises `InputError` when the folder cannot be written or its clips not read."""
        assert dtype in (torch.float32, torch.float16, torch.bfloat16), dtype
        self.index = Path(folder) / "clips.jsonl"
        self.num_clips = 0
        self._dtype = dtype
        self._shapes: Shapes = {}  # of all clips, once there is one
        with _reporting_write_errors(self.index):
            self.index.parent.mkdir(parents=True, exist_ok=True)
            with self.index.open("ab+") as file:
                file.seek(0)
                end = file.read().rfind(b"\n") + 1
                file.truncate(end)  # drops a last line that was cut off
        if end > 0:
            lines = read_index(self.index, "latents")
            self._shapes = _read_shapes(lines)
            self.num_clips = len(lines)
            if [line.file.name for line in lines] != [_file_name(number) for number in range(len(lines))]:
                raise InputError(f"{self.index}: lists other files than this writer would; write to a new folder")

    def add(self, prompt: str, latents: Tensor, trajectory: Tensor | None = None) -> None:
        """Append a clip: latents [F, C, h, w] and, for ODE pairs, trajectory [S, F, C, h, w], on any device.

        Raises `InputError` for NaN or infinite values, for shapes unlike those of the clips before, and when the clip
        cannot be written.
        """
        assert prompt.strip()
        tensors = {"latents": latents} if trajectory is None else {"latents": latents, "trajectory": trajectory}
        # Copies, because safetensors refuses tensors that share memory.
        stored = {
            name: tensor.detach().to("cpu", self._dtype, copy=True, memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        }
        file = self.index.with_name(_file_name(self.num_clips))
        with naming(str(file)):
            for name, tensor in stored.items():
                _check_finite(name, tensor)
            self._shapes = _check_shapes({name: list(tensor.shape) for name, tensor in stored.items()}, self._shapes)
        with _reporting_write_errors(file):
            temporary = file.with_suffix(".tmp")  # a kill may leave it behind; the next run writes it again
            temporary.write_bytes(safetensors.torch.save(stored))
            os.replace(temporary, file)
            with self.index.open("a", encoding="utf-8") as index:
                index.write(json.dumps({"prompt": prompt, "latents": file.name}, ensure_ascii=False) + "\n")
        self.num_clips += 1


class PixelClips:
    """The first `num_video_frames` of the videos or pictures of an index, at one size and rate: a `PixelSource`."""

    def __init__(self, path: str | Path, height: int, width: int, num_video_frames: int, fps: int) -> None:
        """Read the index. Raises `InputError` naming the line that is malformed or whose file is missing."""
        self._lines = read_index(path, "video")
        self._height, self._width, self._num_video_frames, self._fps = height, width, num_video_frames, fps

    def __len__(self) -> int:
        return len(self._lines)

    @property
    def prompts(self) -> list[str]:
        """The prompt of every clip."""
        return [line.prompt for line in self._lines]

    def pixels(self, items: Sequence[int]) -> Tensor:
        """[B, num_video_frames, 3, height, width] in [-1, 1]: frames resampled, scaled and cropped as by `read_clip`.

        Raises `InputError` naming line and file when it cannot be decoded or is too short.
        """
        frames = torch.stack([self._read(self._lines[item]) for item in items])
        return from_uint8(frames)

    def _read(self, line: IndexLine) -> Tensor:
        with naming(line.where):
            frames = list(islice(_frames(line.file, self._height, self._width, self._fps), self._num_video_frames))
            if len(frames) < self._num_video_frames:
                raise InputError(
                    f"{line.file}: too short, {len(frames)} of the {self._num_video_frames} frames needed at "
                    f"{self._fps} fps"
                )
        return torch.from_numpy(np.stack(frames))


def read_clip(path: str | Path, height: int, width: int, fps: int, max_frames: int = 81) -> Tensor:
    """Read a picture or clip as uint8 [F, height, width, 3] with F = 1 + 4k <= `max_frames`.

    A clip is resampled to `fps` and its last frames are kept, because they are what a continuation follows. Frames are
    scaled to cover height x width (with antialiasing) and cropped around the centre; transparency becomes white.
    Raises `InputError` for a file that cannot be decoded.
    """
    factor = VIDEO_FRAMES_PER_LATENT
    newest = deque(_frames(Path(path), height, width, fps), maxlen=1 + factor * ((max_frames - 1) // factor))
    num_kept = 1 + factor * ((len(newest) - 1) // factor)
    return torch.from_numpy(np.stack(list(newest)[-num_kept:]))


def _frames(path: Path, height: int, width: int, fps: int) -> Iterator[np.ndarray[Any, Any]]:
    """The frames [height, width, 3] of a picture or clip, at least one, made as `read_clip` says."""
    is_empty = True
    try:
        for picture in _pictures(path, fps):
            yield _fit(picture, height, width)
            is_empty = False
    # Damaged files also make Pillow raise SyntaxError, ValueError and DecompressionBombError.
    except (OSError, av.FFmpegError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: cannot be read as a picture or video ({error})") from None
    if is_empty:
        raise InputError(f"{path}: holds no picture")


def _pictures(path: Path, fps: int) -> Iterator[Image.Image]:
    """The one picture of an image file, or those of a clip at `fps`, upright. None of a clip of sound alone."""
    if path.suffix.lower() in IMAGE_SUFFIXES:
        with Image.open(path) as picture:
            yield ImageOps.exif_transpose(picture)
        return
    with av.open(str(path.absolute()), metadata_errors="replace") as container:
        if container.streams.video:
            for frame in _at_rate(container.decode(video=0), fps):
                yield frame.to_image().rotate(frame.rotation, expand=True)


def _at_rate(frames: Iterable[av.VideoFrame], fps: int) -> Iterator[av.VideoFrame]:
    """The frame shown at the middle of every 1/fps of a clip. The last one is shown for at least 1/fps.

    A frame without a time stamp (raw streams have none) follows the one before it.
    """
    step = Fraction(1, fps)
    next_time, end, previous = step / 2, Fraction(0), None
    for frame in frames:
        time_base = frame.time_base or step
        time = end if frame.pts is None else frame.pts * time_base
        if previous is None:
            next_time += time
        while previous is not None and next_time < time:
            yield previous
            next_time += step
        end = time + (frame.duration * time_base or step)
        previous = frame
    while previous is not None and next_time < max(end, time + step):
        yield previous
        next_time += step


def _fit(picture: Image.Image, height: int, width: int) -> np.ndarray[Any, Any]:
    if picture.mode.startswith("I;16"):  # 16-bit grey, which Pillow would clip instead of scale
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return np.array(ImageOps.fit(picture.convert("RGB"), (width, height), Image.Resampling.LANCZOS))


def _file_name(number: int) -> str:
    return f"{number:06d}.safetensors"


def _read_shapes(lines: Sequence[IndexLine]) -> Shapes:
    """The shapes in which all files agree, from their headers."""
    shapes: Shapes = {}
    for line in lines:
        with naming(f"{line.where}: {line.file}"), _opened(line.file) as file:
            slices = {name: file.get_slice(name) for name in ("latents", "trajectory") if name in set(file.keys())}
            for name, values in slices.items():
                if values.get_dtype() not in _FLOAT_DTYPES:
                    raise InputError(f"{name} are {values.get_dtype()}, accepted are {', '.join(_FLOAT_DTYPES)}")
            shapes = _check_shapes({name: values.get_shape() for name, values in slices.items()}, shapes)
    return shapes


def _check_shapes(shapes: Shapes, expected: Shapes) -> Shapes:
    """`shapes` itself when it is that of a clip and, where there are such, as `expected`."""
    latents, trajectory = shapes.get("latents"), shapes.get("trajectory")
    if latents is None or len(latents) != 4 or 0 in latents:
        raise InputError(f"needs latents [F, C, h, w], found {latents}")
    if trajectory is not None and (trajectory[1:] != latents or 0 in trajectory):
        raise InputError(f"needs trajectory [S, F, C, h, w] of the latents {latents}, found {trajectory}")
    if expected and shapes != expected:
        raise InputError(f"has {shapes}, the first clip {expected}")
    return shapes


def _read_tensor(line: IndexLine, name: str) -> Tensor:
    """Float32; a view of the file where that is float32 too."""
    with naming(f"{line.where}: {line.file}"), _opened(line.file) as file:
        tensor: Tensor = file.get_tensor(name).float()
        _check_finite(name, tensor)
    return tensor


def _check_finite(name: str, tensor: Tensor) -> None:
    if not tensor.isfinite().all():
        raise InputError(f"NaN or infinite values in {name}")


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot be read as safetensors ({error})") from None


@contextmanager
def _reporting_write_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error
