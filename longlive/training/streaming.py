"""Streaming long tuning: one long sequence, generated chunk by chunk across training iterations (arXiv 2509.22622).

The cache and the newest frames live on from chunk to chunk, so that the generator trains on what it will meet at
inference. All random numbers are arguments. Latents are [B, F, C, height, width], float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longlive.models.dit import WanDiT
from longlive.models.vae import WanVAE
from longlive.rollout import BlockTraining, ExitStep, Rollout
from longlive.training.clip_pass import ClipPass


@dataclass(frozen=True)
class ChunkNoise:
    """The random numbers of a chunk of F frames.

    noise [B, F, ...]; renoise: for every denoising step but the last, noise [B, F, ...] for the step after it;
    context [B, F, ...]: noise of what enters the cache, or None; exit_steps: for every block, the last step made.
    """

    noise: Tensor
    renoise: Sequence[Tensor]
    context: Tensor | None
    exit_steps: Sequence[int]


@dataclass(frozen=True)
class Clip:
    """What a loss looks at. latents [B, F, C, height, width]; num_new: frames at its end that count, the new ones."""

    latents: Tensor
    num_new: int


class StreamingSequence:
    """A sequence in the making: its rollout, its prompts, the frame at which the second prompt takes over."""

    def __init__(
        self,
        rollout: Rollout,
        prompts: Sequence[Tensor],
        switch_frame: int | None = None,
        trained: WanDiT | ClipPass | None = None,
    ) -> None:
        """prompts: embeddings [B, L, text_dim] of one prompt, or of two with a `switch_frame`: the switch comes before
        the first block that starts at or after it. trained: the network of the passes with gradient, by default the
        rollout's own; a `ClipPass` makes those of all blocks of a chunk at once."""
        assert len(prompts) == (1 if switch_frame is None else 2)
        self.rollout = rollout
        self.prompts = prompts
        if trained is None:
            assert isinstance(rollout.model, WanDiT)
            trained = rollout.model
        self.trained = trained
        block = rollout.sampler.config.frames_per_block
        self.switch_frame = None if switch_frame is None else -(-switch_frame // block) * block

    @property
    def num_frames(self) -> int:
        """Frames made so far."""
        return self.rollout.num_frames

    @property
    def prompt(self) -> Tensor:
        """The prompt of the newest frames: the one a loss on them takes."""
        return self.prompts[self.switch_frame is not None and self.num_frames > self.switch_frame]

    def generate(self, chunk: ChunkNoise, gradient_from_frame: int | None = 0, is_last: bool = False) -> Tensor:
        """Make the next frames [B, F, C, height, width], with gradient from `gradient_from_frame` of the chunk on.

        In a chunk that contains the switch only the blocks after it have a gradient. is_last: the sequence ends here.
        """
        rollout, num = self.rollout, self.rollout.sampler.config.frames_per_block
        first, end = self.num_frames, self.num_frames + chunk.noise.shape[1]
        switch = self.switch_frame
        if gradient_from_frame is not None and switch is not None and first <= switch < end:
            gradient_from_frame = max(gradient_from_frame, switch - first)
        prompt = self.prompts[switch is not None and first > switch]
        with torch.no_grad():  # the weights may have changed since the last chunk
            rollout.text = rollout.model.project_text(prompt)
        at_once = self.trained if isinstance(self.trained, ClipPass) else None
        block_by_block = self.trained if isinstance(self.trained, WanDiT) else None
        blocks: list[Tensor] = []
        exits: list[ExitStep] = []
        for index, offset in enumerate(range(0, end - first, num)):
            span = slice(offset, offset + num)
            if switch == first + offset:
                prompt = self.prompts[1]
                with torch.no_grad():
                    rollout.set_text(rollout.model.project_text(prompt))
            has_gradient = gradient_from_frame is not None and offset >= gradient_from_frame
            training = BlockTraining(
                exit_step=chunk.exit_steps[index],
                trained=block_by_block if has_gradient else None,
                prompt_embeds=prompt,
                context_noise=None if chunk.context is None else chunk.context[:, span],
                is_last=is_last and first + offset + num == end,
                exits=exits if has_gradient and at_once is not None else None,
            )
            fresh = [noise[:, span] for noise in chunk.renoise]
            blocks.append(rollout.next_block(chunk.noise[:, span], fresh.__getitem__, training))
        if exits and at_once is not None:
            blocks[-len(exits) :] = [at_once(exits, prompt, rollout.cache, end - num * len(exits))]
        return torch.cat(blocks, dim=1)


def make_clip(vae: WanVAE, previous: Tensor | None, new: Tensor, num_frames: int) -> Clip:
    """The newest `num_frames` frames for the score models, which know clips from their beginning only.

    previous: the frames before the new ones, enough to fill the clip, or None at the start of a sequence. The first
    frame of a clip taken from the middle is encoded anew as a picture: the last video frame of everything up to it.
    """
    if previous is None:
        assert new.shape[1] == num_frames, f"the first chunk has {new.shape[1]} frames, a clip {num_frames}"
        return Clip(new, num_frames)
    frames = torch.cat([previous, new], dim=1)
    num_before = frames.shape[1] - num_frames
    with torch.no_grad():
        picture = vae.decode_last(frames[:, : num_before + 1]).clamp(-1, 1)
        first = vae.encode(picture).to(frames.dtype)
    return Clip(torch.cat([first, frames[:, num_before + 1 :]], dim=1), min(new.shape[1], num_frames))
