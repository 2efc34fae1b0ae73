"""What a session has made: branches of blocks, which share their past. No torch.

Frames are latent frames, counted from the beginning of a branch; video frames are counted likewise.
"""

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from longlive.config import to_yaml
from longlive.web.messages import Latents, Picture
from longlive.web.spool import Kept
from longlive.web.stream import one_file


@dataclass(frozen=True)
class Block:
    """One block of a branch. shapes: of its chunks of latents, two where a picture came first; content: their bytes,
    then fragment and thumbnail."""

    frame: int
    num_frames: int
    video_frame: int
    num_video_frames: int
    prompt: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    content: Kept

    @property
    def num_bytes(self) -> int:
        return self.content.num_bytes

    def chunks(self) -> tuple[Latents, ...]:
        return tuple(Latents(self.content.part(i), shape, self.dtype) for i, shape in enumerate(self.shapes))

    def fragment(self) -> bytes:
        return self.content.part(-2)

    def thumbnail(self) -> bytes:
        return self.content.part(-1)


@dataclass
class Branch:
    """One course of the video. prompt: what the next block is to show; init: of the mp4, once something is made."""

    number: int
    parent: int | None
    fork_frame: int
    seed: int
    prompt: str | None
    picture: Picture | None
    blocks: list[Block] = field(default_factory=list)
    init: bytes = b""

    @property
    def num_frames(self) -> int:
        return self.blocks[-1].frame + self.blocks[-1].num_frames if self.blocks else 0

    @property
    def num_video_frames(self) -> int:
        return self.blocks[-1].video_frame + self.blocks[-1].num_video_frames if self.blocks else 0

    def past(self) -> tuple[tuple[str, Latents], ...]:
        """Every chunk with its prompt."""
        return tuple((block.prompt, chunk) for block in self.blocks for chunk in block.chunks())

    def fork(self, number: int, frame: int, prompt: str | None) -> "Branch":
        """A new branch with the blocks that end at or before `frame`; without a prompt, that of the last of them."""
        shared = [block for block in self.blocks if block.frame + block.num_frames <= frame]
        if prompt is None:
            prompt = shared[-1].prompt if shared else self.first_prompt
        fork_frame = shared[-1].frame + shared[-1].num_frames if shared else 0
        return Branch(number, self.number, fork_frame, self.seed, prompt, self.picture, shared, self.init)

    @property
    def first_prompt(self) -> str | None:
        return self.blocks[0].prompt if self.blocks else self.prompt

    def block_at(self, frame: int) -> Block | None:
        """The block that holds this frame."""
        return next((block for block in self.blocks if block.frame <= frame < block.frame + block.num_frames), None)

    def switches(self) -> list[Block]:
        """The first block of every prompt."""
        before: list[str | None] = [None, *(block.prompt for block in self.blocks)]
        return [block for block, prompt in zip(self.blocks, before, strict=False) if block.prompt != prompt]

    def describe(self) -> dict[str, Any]:
        """As the protocol's `branches` tells it."""
        return {
            "branch": self.number,
            "parent": self.parent,
            "fork_frame": self.fork_frame,
            "seed": self.seed,
            "upload": self.picture is not None,
            "num_frames": self.num_frames,
            "num_video_frames": self.num_video_frames,
            "prompts": [
                {"frame": block.frame, "video_frame": block.video_frame, "text": block.prompt}
                for block in self.switches()
            ],
        }

    def script(self) -> str:
        """A prompt file of this branch alone. A picture that it began with is `start.png` and not counted in frames."""
        offset = 0 if self.picture is None else 1
        first, *others = self.switches()
        script = {
            "prompts": [first.prompt, *(block.prompt for block in others)],
            "switch_frame_indices": [block.frame - offset for block in others],
            "seed": self.seed,
            "num_output_frames": self.num_frames - offset,
        }
        if self.picture is not None:
            script["start_from"] = "start.png"
        return json.dumps(script, ensure_ascii=False) + "\n"

    def video(self) -> bytes:
        """The mp4 of what is made so far. Takes a while: for another thread, on a `copy`."""
        return one_file(self.init, (block.fragment() for block in self.blocks))

    def archive(self, settings: Mapping[str, Any]) -> bytes:
        """A zip of the video and of all that makes it again. For another thread, as `video`."""
        target = io.BytesIO()
        with zipfile.ZipFile(target, "w") as archive:
            archive.writestr("video.mp4", self.video())
            archive.writestr("script.jsonl", self.script())
            archive.writestr("settings.yaml", to_yaml(settings))
            if self.picture is not None:
                archive.writestr("start.png", to_png(self.picture))
        return target.getvalue()

    def copy(self) -> "Branch":
        """As it is now, whatever is added later."""
        return Branch(**{**self.__dict__, "blocks": list(self.blocks)})


def to_png(picture: Picture) -> bytes:
    target = io.BytesIO()
    Image.frombytes("RGB", (picture.width, picture.height), picture.data).save(target, format="PNG")
    return target.getvalue()
