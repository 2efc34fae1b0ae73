"""Clips to train on: videos encoded to latents, or samples of a bidirectional teacher, with their ODE states if wanted.

Layer 4. A folder of clips grows in order and goes on where it stopped. Several processes share the clips without
talking: each writes a folder of its own inside, and whichever ends last lists all of them in one index.
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from longlive.build import choose_device, choose_dtype, load_encoder, load_vae, place_encoder, place_vae
from longlive.builtin import BUILTIN
from longlive.clips_config import ClipsConfig
from longlive.config import to_dict
from longlive.data.clips import ClipWriter, PixelClips, PixelSource
from longlive.data.prompts import read_index, read_prompts
from longlive.data.shapes.clips import ShapesClips
from longlive.distributed import is_main, rank, shard, world_size
from longlive.errors import InputError
from longlive.models.attention import select_attention
from longlive.models.dit import WanDiT
from longlive.models.text_encoder import TextEncoder
from longlive.models.vae import WanVAE
from longlive.rollout import Sampler, SamplerConfig
from longlive.train_inputs import CLIP_SETTINGS, existing_folder, read_network
from longlive.training.dmd import Score
from longlive.training.draw import derived_seed
from longlive.training.networks import Weights
from longlive.training.sampling import sample_clips
from longlive.weights.files import atomic_file, check_finite, fingerprint, load_into, read_json, shorten, write_json

log = logging.getLogger(__name__)

Make = Callable[[Sequence[int]], tuple[Tensor, Tensor | None]]
"""The clips of these numbers: latents [B, F, C, h, w] and, where wanted, states [B, S, F, C, h, w]."""

INDEX = "clips.jsonl"
FREE = {
    *("output_folder", "data_path", "world", "num_scenes", "wan_folder", "num_samples"),
    *("batch_size", "device", "attention", "low_memory"),
}
"""Keys that may change between the runs that fill a folder. The prompts are compared themselves."""


def make_clips(config: ClipsConfig) -> None:
    """Make the clips that a configuration asks for and that are not there yet. Raises InputError."""
    folder, num_processes = Path(config.output_folder), world_size()
    prompts = clip_prompts(config)
    settings = clip_settings(config, num_processes)
    check_settings(folder, settings)
    numbers = shard(range(len(prompts)), rank(), num_processes)
    dtype = choose_dtype(config.clip_dtype, torch.device("cpu"))
    writer = ClipWriter(folder if num_processes == 1 else folder / part_name(rank()), dtype)
    check_prompts(writer, [prompts[number] for number in numbers])
    if writer.num_clips < len(numbers):
        make = make_encoder(config) if config.source == "videos" else make_teacher(config, prompts)
        write_json(folder / CLIP_SETTINGS, settings)
        write_clips(writer, numbers, prompts, make, config.batch_size)
    if num_processes > 1:
        merge_parts(folder, num_processes, len(prompts))
    log.info("clips are in %s", folder)


def clip_prompts(config: ClipsConfig) -> list[str]:
    """The prompt of every clip. Of a teacher's, all prompts come once before any comes again."""
    if config.source == "videos":
        return [line.prompt for line in read_index(config.data_path, "video")]
    if config.world is not None:
        scenes = ShapesClips(config.num_scenes, config.seed)
        return scenes.prompts(range(config.num_scenes)) * config.num_samples
    return read_prompts(config.data_path) * config.num_samples


def write_clips(
    writer: ClipWriter, numbers: Sequence[int], prompts: Sequence[str], make: Make, batch_size: int
) -> None:
    """Make and write the clips of these numbers, from the first that the writer does not have.

    Batches are the same wherever writing began, and so are the clips, to the last bit.
    """
    done = writer.num_clips
    with (
        logging_redirect_tqdm(),
        tqdm(total=len(numbers), initial=done, unit=" clips", disable=not is_main(), dynamic_ncols=True) as bar,
    ):
        for start in range(0, len(numbers), batch_size):
            batch = numbers[start : start + batch_size]
            if start + len(batch) <= done:
                continue
            latents, states = make(batch)
            for i in range(max(done - start, 0), len(batch)):
                writer.add(prompts[batch[i]], latents[i], None if states is None else states[i])
                bar.update()


# --- sources ----------------------------------------------------------------------------------------------------------


def make_encoder(config: ClipsConfig) -> Make:
    """The VAE over the videos of `data_path`."""
    device = choose_device(config.device)
    vae = load_vae(model_folder(config), torch.float32, config.vae_ckpt)
    place_vae(vae, device, choose_dtype("auto", device))
    num_video_frames = vae.config.num_video_frames(config.num_training_frames)
    videos = PixelClips(config.data_path, config.height, config.width, num_video_frames, config.fps)
    return encoded_videos(vae, videos, device)


def encoded_videos(vae: WanVAE, videos: PixelSource, device: torch.device) -> Make:
    """Clip n is video n."""

    @torch.no_grad()
    def make(numbers: Sequence[int]) -> tuple[Tensor, None]:
        return vae.encode(videos.pixels(numbers).to(device)), None

    return make


def make_teacher(config: ClipsConfig, prompts: Sequence[str]) -> Make:
    """The teacher on its device, with the text encoder."""
    weights = read_network(config.wan_folder, config.real_ckpt, config.real_name, "real_name")
    folder = model_folder(config)
    vae, encoder = load_vae(folder, torch.float32, config.vae_ckpt), load_encoder(folder, weights.config.text_len)
    check_parts(weights, vae, encoder)
    factor = vae.config.spatial_factor
    device = choose_device(config.device)
    encode_prompts = place_encoder(encoder, device, config.low_memory)
    sampling = Sampling(
        latent_shape=(config.num_training_frames, vae.config.z_dim, config.height // factor, config.width // factor),
        seed=config.seed,
        negative_prompt=config.negative_prompt,
        guidance=config.guidance_scale,
        shift=config.timestep_shift,
        num_steps=config.num_steps,
        keep_sigmas=student_sigmas(config) if config.trajectory else (),
        stochastic=config.stochastic,
    )
    return sampled_clips(load_teacher(config, weights, device), encode_prompts, prompts, sampling, device)


@dataclass(frozen=True)
class Sampling:
    """How a teacher is sampled, see `sample_clips`. latent_shape: frames, channels, height, width of a clip."""

    latent_shape: tuple[int, int, int, int]
    seed: int
    negative_prompt: str
    guidance: float
    shift: float
    num_steps: int
    keep_sigmas: tuple[float, ...] = ()
    stochastic: bool = False


def sampled_clips(
    teacher: Score,
    encode_prompts: Callable[[Sequence[str]], Tensor],
    prompts: Sequence[str],
    sampling: Sampling,
    device: torch.device,
) -> Make:
    """Clip n is a sample for prompt n, of noise that follows from the seed and n alone, whatever the device."""

    def make(numbers: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        seeds = [derived_seed(sampling.seed, "clip", number) for number in numbers]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]

        def draw_noise() -> Tensor:
            noise = [torch.randn(sampling.latent_shape, generator=generator) for generator in generators]
            return torch.stack(noise).to(device)

        return sample_clips(
            teacher,
            draw_noise(),
            encode_prompts([prompts[number] for number in numbers]),
            encode_prompts([sampling.negative_prompt] * len(numbers)),
            guidance=sampling.guidance,
            shift=sampling.shift,
            num_steps=sampling.num_steps,
            keep_sigmas=sampling.keep_sigmas,
            fresh_noise=draw_noise if sampling.stochastic else None,
        )

    return make


def student_sigmas(config: ClipsConfig) -> tuple[float, ...]:
    """The noise levels of the student's denoising steps."""
    sampler = SamplerConfig(config.denoising_step_list, config.warp_denoising_step, config.timestep_shift)
    return tuple(Sampler(sampler).sigmas)


def model_folder(config: ClipsConfig) -> Path | None:
    """The Wan model's folder; None for the built-in model."""
    if config.model_name == BUILTIN:
        return None
    return existing_folder(config.wan_folder, config.model_name, "model_name")


def check_parts(weights: Weights, vae: WanVAE, encoder: TextEncoder) -> None:
    """Raise InputError unless the teacher makes the VAE's latents from the text encoder's embeddings."""
    teacher = weights.config
    sizes = {
        "latent channels": (teacher.in_channels, vae.config.z_dim),
        "channels of prompt embeddings": (teacher.text_dim, encoder.config.dim),
    }
    for what, (theirs, ours) in sizes.items():
        if theirs != ours:
            raise InputError(f"{weights.source}: takes {theirs} {what}, but model_name has {ours}")


def load_teacher(config: ClipsConfig, weights: Weights, device: torch.device) -> WanDiT:
    """The teacher, frozen, in the compute type."""
    dtype = choose_dtype("auto", device)
    check_finite(weights.state, weights.source)
    with torch.device("meta"):
        teacher = WanDiT(weights.config, select_attention(config.attention, device, dtype))
    load_into(teacher, weights.state, weights.source, dtype)
    return teacher.to(device).eval().requires_grad_(False)


# --- a folder that goes on --------------------------------------------------------------------------------------------


def clip_settings(config: ClipsConfig, num_processes: int) -> dict[str, Any]:
    """What all clips of a folder share, as JSON gives it back."""
    files = [path for path in (config.real_ckpt, config.vae_ckpt) if path is not None]
    settings = {name: value for name, value in to_dict(config).items() if name not in FREE}
    settings |= {"processes": num_processes, "weights": [fingerprint(path) for path in files]}
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Raise InputError where a folder holds clips of other settings."""
    path = folder / CLIP_SETTINGS
    if not path.exists():
        return
    begun = read_json(path)
    told = [
        f"{name} was {begun.get(name, 'not set')} and is {settings.get(name, 'not set')}"
        for name in sorted({*begun, *settings})
        if begun.get(name) != settings.get(name)
    ]
    if told:
        raise InputError(f"{folder}: was begun with other settings: {shorten(told)}; name another output_folder")


def check_prompts(writer: ClipWriter, prompts: Sequence[str]) -> None:
    """Raise InputError where the clips that are there already have other prompts than they would get now."""
    lines = read_index(writer.index, "latents") if writer.num_clips else []
    for line, prompt in zip(lines, prompts, strict=False):
        if line.prompt != prompt:
            raise InputError(
                f"{line.where}: has another prompt than data_path gives it now; a line taken out renumbers those after "
                "it: replace it instead, or name another output_folder"
            )


def part_name(number: int) -> str:
    """The folder of a process's clips."""
    return f"rank_{number}"


def merge_parts(folder: Path, num_parts: int, num_clips: int) -> None:
    """List the clips of all processes in one index, in order; while some are missing, do nothing."""
    parts = [_complete_lines(folder / part_name(number) / INDEX) for number in range(num_parts)]
    missing = sum(max(len(range(i, num_clips, num_parts)) - len(lines), 0) for i, lines in enumerate(parts))
    if missing:
        log.info("%d of %d clips are still to come from other processes", missing, num_clips)
        return
    with atomic_file(folder / INDEX) as file:
        for number in range(num_clips):
            fields = json.loads(parts[number % num_parts][number // num_parts])
            fields["latents"] = f"{part_name(number % num_parts)}/{fields['latents']}"
            file.write(json.dumps(fields, ensure_ascii=False).encode() + b"\n")


def _complete_lines(index: Path) -> list[str]:
    """Another process may be writing the last line."""
    return index.read_text(encoding="utf-8").split("\n")[:-1] if index.exists() else []
