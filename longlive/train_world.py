"""Scenes of a world as latents to train on, with a past that may not agree with what is to be learnt. Layer 4.

Teacher forcing shows a perfect past, in which the newest frames tell all that a block needs: nothing in it teaches a
model to look to the sink, or to a prompt that has changed. So a past may be *worn*: behind the sink its bodies are off
their place, and what is to be learnt brings them back by a part. And a clip may go through a *switch*: all of it has
the prompt after the switch, as where the cache is recached, and what comes before is shown but not to be learnt.
"""

import random
from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from longlive.data.clips import LatentPool, PixelSource
from longlive.data.shapes.clips import ShapesClips, ShapesSwitches
from longlive.distributed import is_main
from longlive.models.vae import WanVAE
from longlive.train_config import TrainConfig
from longlive.train_inputs import Inputs, latent_shape

_UNHEALED = 0.75
"""Of what is off in a worn past, how much is still off in the block after it."""
_BATCH_FRAMES = {"cuda": 256 * 81, "cpu": 16 * 81}
"""Video frames of scenes drawn or encoded at a time, of some 2 MB each: with fewer, a GPU's time goes into launching
kernels."""


def world_batches(numbers: Sequence[int], num_video_frames: int, device: torch.device) -> list[Sequence[int]]:
    """The numbers of scenes, parted into what is drawn or encoded at a time."""
    size = max(1, _BATCH_FRAMES[device.type] // num_video_frames)
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]


def encode_world(config: TrainConfig, inputs: Inputs, device: torch.device) -> LatentPool:
    """The latents of all scenes of a world, drawn and encoded on the device, where they stay.

    Scenes that switch are not worn.
    """
    switches = switch_frames(config)
    prompts = [texts[-1 if frame else 0] for texts, frame in zip(inputs.prompts, switches, strict=True)]
    latents = torch.empty(config.num_scenes, config.clip_frames, *latent_shape(config, inputs.vae), device=device)
    past = torch.empty_like(latents) if config.worn_past else None
    encoder = _Encoder(config, inputs.vae, device)
    unswitched = encoder.worn if config.worn_past else encoder.plain
    with tqdm(total=config.num_scenes, desc="encoding scenes", unit=" scenes", disable=not is_main()) as bar:
        for frame in sorted(set(switches)):
            numbers = [number for number, switch in enumerate(switches) if switch == frame]
            for batch in world_batches(numbers, encoder.num_video_frames, device):
                shown, latents[batch] = encoder.switched(batch, frame) if frame else unswitched(batch)
                if past is not None:
                    past[batch] = shown
                bar.update(len(batch))
    return LatentPool(prompts, latents, past, torch.tensor(switches, device=device) if any(switches) else None)


def switch_frames(config: TrainConfig) -> list[int]:
    """For every scene the latent frame at which it switches, the first of a block; 0: it does not."""
    block = config.num_frame_per_block
    frames = range(config.first_frame_behind_sink + block, config.clip_frames - block + 1, block)
    rng = random.Random(f"switches {config.seed}")
    return [rng.choice(frames) if rng.random() < config.switch_share else 0 for _ in range(config.num_scenes)]


def encode_batch(vae: WanVAE, pixels: Tensor) -> Tensor:
    """Means of the latents [B, F, C, h, w] float32 of pixels [B, V, 3, height, width] in [-1, 1]."""
    return vae.normalized(vae.encode_distribution(pixels)[0]).float()


class _Encoder:
    """Draws and encodes scenes by their numbers: the past that is shown, and what is to be learnt, [N, F, C, h, w]."""

    def __init__(self, config: TrainConfig, vae: WanVAE, device: torch.device) -> None:
        self._config, self._vae, self._device = config, vae, device
        self.num_video_frames = vae.config.num_video_frames(config.clip_frames)

    def plain(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """As they are."""
        latents = self._encode(self._scenes(), numbers)
        return latents, latents

    def worn(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Behind the sink bodies are off their place in the past, and from a block later on less in what is to be
        learnt: so blocks learn to follow the sink where it and the window do not agree."""
        num_true = self._config.first_frame_behind_sink
        start = num_true + self._config.num_frame_per_block
        true = self._encode(self._scenes(num_frames=start), numbers)
        past, target = (self._encode(self._scenes(worn_share=share), numbers) for share in (1.0, _UNHEALED))
        past[:, :num_true], target[:, :start] = true[:, :num_true], true
        return past, target

    def switched(self, numbers: Sequence[int], frame: int) -> tuple[Tensor, Tensor]:
        """Through a switch at this latent frame, from which on they are to be learnt."""
        config, at = self._config, self._vae.config.num_video_frames(frame)
        clips = ShapesSwitches(
            config.num_scenes, config.seed, at, num_video_frames=self.num_video_frames, device=self._device
        )
        latents = self._encode(clips, numbers)
        return latents, latents

    def _scenes(self, num_frames: int | None = None, worn_share: float = 0.0) -> ShapesClips:
        config = self._config
        end = self._vae.config.num_video_frames(num_frames or config.clip_frames)
        return ShapesClips(config.num_scenes, config.seed, end, device=self._device, worn_share=worn_share)

    @torch.no_grad()
    def _encode(self, clips: PixelSource, numbers: Sequence[int]) -> Tensor:
        return encode_batch(self._vae, clips.pixels(numbers))
