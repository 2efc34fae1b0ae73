"""Scenes of the Shapes world to train and to evaluate on, by number."""

import random
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from longlive.data.clips import from_uint8
from longlive.data.shapes.captions import prompt_of, worded
from longlive.data.shapes.render import render
from longlive.data.shapes.world import TWO_BODIES_SHARE, Scene, sample_scene, switched, switched_caption, worn

TRAINED_TWO_BODIES_SHARE = 0.5  # of the scenes to train on: more than in the world, as they are harder to learn
_CLIP_VIDEO_FRAMES = 81  # 5 s, unless it is said
TRAIN, HELD_OUT = "train", "held out"  # splits: the same seed and number give other scenes in each


@lru_cache(maxsize=2**16)
def scene_number(number: int, seed: int, split: str) -> Scene:
    """Scene `number` of the endless stream that belongs to a seed and a split."""
    assert split in (TRAIN, HELD_OUT), split
    rng = random.Random(f"{split} {seed} {number}")
    return sample_scene(rng, TWO_BODIES_SHARE if split == HELD_OUT else TRAINED_TWO_BODIES_SHARE)


class ShapesClips:
    """Clips of the first frames of scenes, with their prompts: a `PixelSource`."""

    def __init__(
        self,
        num_clips: int,
        seed: int,
        num_video_frames: int = _CLIP_VIDEO_FRAMES,
        split: str = TRAIN,
        device: torch.device | str = "cpu",
        worn_share: float = 0.0,
    ) -> None:
        """device: where clips are drawn and returned; worn_share: how much scenes are `worn`."""
        self._num_clips, self._seed, self._num_video_frames = num_clips, seed, num_video_frames
        self._split, self._device = split, device
        self._worn_share = worn_share

    def __len__(self) -> int:
        return self._num_clips

    def scenes(self, items: Sequence[int]) -> list[Scene]:
        scenes = [scene_number(item, self._seed, self._split) for item in items]
        return [worn(scene, self._worn_share) for scene in scenes] if self._worn_share else scenes

    def prompts(self, items: Sequence[int]) -> list[str]:
        return [prompt_of(scene) for scene in self.scenes(items)]

    def frames(self, items: Sequence[int]) -> Tensor:
        """[B, num_video_frames, HEIGHT, WIDTH, 3] uint8."""
        return render(self.scenes(items), 0, self._num_video_frames, self._device)

    def pixels(self, items: Sequence[int]) -> Tensor:
        """[B, num_video_frames, 3, HEIGHT, WIDTH] float32 in [-1, 1]."""
        return from_uint8(self.frames(items))


class ShapesSwitches:
    """Pairs of scenes in which the second goes on from the first at a frame, with their prompts, and their clips from
    the beginning: a `PixelSource`."""

    def __init__(
        self,
        num_pairs: int,
        seed: int,
        switch_video_frame: int,
        split: str = TRAIN,
        num_video_frames: int = _CLIP_VIDEO_FRAMES,
        device: torch.device | str = "cpu",
    ) -> None:
        """num_video_frames: of a clip; device: where clips are drawn and returned."""
        self._before = ShapesClips(num_pairs, seed, split=split)
        self._switch_video_frame = switch_video_frame
        self._num_video_frames, self._device = num_video_frames, device

    def __len__(self) -> int:
        return len(self._before)

    def scenes(self, items: Sequence[int]) -> list[tuple[Scene, Scene]]:
        """The scene before, and the one valid from the switch on."""
        before = self._before.scenes(items)
        return [(scene, switched(scene, self._switch_video_frame, scene.wording)) for scene in before]

    def prompts(self, items: Sequence[int]) -> list[tuple[str, str]]:
        before = self._before.scenes(items)
        return [(prompt_of(scene), worded(*switched_caption(scene, scene.wording))) for scene in before]

    def pixels(self, items: Sequence[int]) -> Tensor:
        """[B, num_video_frames, 3, HEIGHT, WIDTH] float32 in [-1, 1]."""
        before, after = zip(*self.scenes(items), strict=True)
        switch, end = self._switch_video_frame, self._num_video_frames
        pieces = render(before, 0, switch, self._device), render(after, switch, end, self._device)
        return from_uint8(torch.cat(pieces, dim=1))
