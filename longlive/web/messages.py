"""What server and engine say to each other: plain values, picklable, without torch.

A session is known by its id; an epoch is one unbroken course of it, and whatever bears an older epoch is stale.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Latents:
    """One chunk [1, F, C, h, w], byte for byte, in the models' dtype."""

    data: bytes
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_frames(self) -> int:
        return self.shape[1]


@dataclass(frozen=True)
class Picture:
    """RGB bytes [height, width, 3] at the models' size."""

    data: bytes
    height: int
    width: int


@dataclass(frozen=True)
class OfEpoch:
    """What belongs to one course of a session."""

    session: str
    epoch: int


@dataclass(frozen=True)
class Start(OfEpoch):
    """Take up a session where `past` ends: chunks with their prompts. picture: what it begins with if `past` is empty.
    as_pictures: WebP is wanted besides mp4."""

    seed: int
    past: tuple[tuple[str, Latents], ...]
    prompt: str
    picture: Picture | None
    as_pictures: bool


@dataclass(frozen=True)
class SetPrompt(OfEpoch):
    """From the next block on."""

    text: str


@dataclass(frozen=True)
class Grant(OfEpoch):
    """Make blocks until there are `num_frames` latent frames."""

    num_frames: int


@dataclass(frozen=True)
class Drop:
    """Free everything of a session."""

    session: str


ToEngine = Start | SetPrompt | Grant | Drop


@dataclass(frozen=True)
class Ready:
    """The models are loaded. settings: those of inference that determine the picture, without paths."""

    model: str
    height: int
    width: int
    fps: int
    frames_per_block: int
    video_frames_per_frame: int
    mime: str
    settings: Mapping[str, Any]

    def num_video_frames(self, num_frames: int) -> int:
        """Video frames of the first `num_frames` latent frames: the first one is one, every other several."""
        return max(0, 1 + self.video_frames_per_frame * (num_frames - 1))


@dataclass(frozen=True)
class Failed:
    """The models cannot be loaded, and why: in one line, for who started the server."""

    message: str


@dataclass(frozen=True)
class Rebuilt(OfEpoch):
    """A session stands where its past ends; its stream begins with the segment `init`."""

    init: bytes


@dataclass(frozen=True)
class Made(OfEpoch):
    """A block. chunks: its latents, two where a picture came first; fragment: mp4; pictures: WebP, if wanted."""

    prompt: str
    chunks: tuple[Latents, ...]
    fragment: bytes
    thumbnail: bytes
    pictures: tuple[bytes, ...]


@dataclass(frozen=True)
class Notice(OfEpoch):
    """What a viewer should know of a prompt, in one line."""

    message: str


@dataclass(frozen=True)
class Broken(OfEpoch):
    """This session cannot go on, and why, in one line; the engine has dropped it."""

    message: str


FromEngine = Ready | Failed | Rebuilt | Made | Notice | Broken
