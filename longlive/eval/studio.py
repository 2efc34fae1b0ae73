"""Videos made in batches, and cut into the windows that are judged while they are being made."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from longlive.inference.session import Models, Session, SessionConfig


@dataclass(frozen=True)
class Studio:
    """What makes videos. bar: counts the frames that were wanted."""

    models: Models
    session: SessionConfig
    bar: "tqdm[Any]"

    def whole_blocks(self, num_video_frames: int) -> int:
        """The video frames of the whole blocks that hold this many."""
        vae, block = self.models.vae.config, self.session.sampler.frames_per_block
        return vae.num_video_frames(-(-vae.num_latent_frames(num_video_frames) // block) * block)

    def play(self, session: Session, num_video_frames: int) -> Iterator[Tensor]:
        """Pixels [B, V, height, width, 3] uint8 of blocks, until there are this many frames."""
        made = 0
        while made < num_video_frames:
            pixels = session.next_chunk().pixels
            self.bar.update(len(pixels) * min(pixels.shape[1], num_video_frames - made))
            made += pixels.shape[1]
            yield pixels


def batches(numbers: range, largest: int) -> Iterator[range]:
    """Numbers in as few batches as hold them, of nearly one size."""
    num_batches = -(-len(numbers) // largest)
    for i in range(num_batches):
        yield numbers[len(numbers) * i // num_batches : len(numbers) * (i + 1) // num_batches]


def cut_windows(pieces: Iterable[Tensor], windows: Sequence[range]) -> Iterator[Tensor]:
    """Frames of the windows, [B, len(window), …] each, from consecutive pieces [B, V, …] of one batch of videos.

    Windows come in the order of their starts and of their ends. Only frames of windows to come are held.
    """
    pieces, held, start, end = iter(pieces), list[Tensor](), 0, 0
    for window in windows:
        while end < window.stop:
            held.append(next(pieces))
            end += held[-1].shape[1]
            while held and start + held[0].shape[1] <= window.start:
                start += held.pop(0).shape[1]
        yield torch.cat(held, dim=1)[:, window.start - start : window.stop - start]
