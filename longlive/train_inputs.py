"""What a training run begins with: weights, prompts, clips, read and checked before anything is on a GPU. Layer 4."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from longlive.build import (
    find_wan_folder,
    load_encoder,
    load_vae,
)
from longlive.builtin import BUILTIN, BUILTIN_GENERATOR
from longlive.data.clips import LatentClips
from longlive.data.prompts import read_pairs, read_prompts
from longlive.data.shapes.clips import ShapesClips, ShapesSwitches
from longlive.errors import InputError
from longlive.models.dit import PRESETS, DiTConfig, WanDiT, init_weights
from longlive.models.text_encoder import TextEncoder
from longlive.models.vae import WanVAE
from longlive.train_config import DISTRIBUTION_MATCHING, TrainConfig
from longlive.training.draw import derived_seed
from longlive.training.export import CRITIC, GENERATOR
from longlive.training.networks import (
    Weights,
    check_weights,
)
from longlive.weights.files import StateDict, read_checkpoint, read_json, shorten
from longlive.weights.formats import has_network, read_dit, read_generator
from longlive.weights.lora import Lora, check_rank, check_targets, read_lora

CLIP_SETTINGS = "settings.json"
"""Beside an index of clips: how they were made."""


@dataclass(frozen=True)
class Inputs:
    """What a run begins with, read and checked, on the CPU. prompts: for every item its prompt, or a pair."""

    generator: Weights
    critic: Weights | None
    teacher: Weights | None
    lora: Lora | None
    critic_lora: Lora | None
    vae: WanVAE
    encoder: TextEncoder
    prompts: Sequence[tuple[str, ...]]
    clips: LatentClips | None


def read_inputs(config: TrainConfig) -> Inputs:
    """Read what a run needs. Raises InputError for what is missing, does not fit or cannot be read."""
    prompts, clips = read_data(config)
    named = [key for key in ("generator_ckpt", "init_logdir") if getattr(config, key) is not None]
    if config.preset is not None and named:
        raise InputError(f"preset={config.preset}: {named[0]} names weights to begin with; use {named[0]}=null")
    start = None if config.preset else read_start(config)
    folder = None
    if config.model_name != BUILTIN:
        folder = existing_folder(config.wan_folder, config.model_name, "model_name")
    vae = load_vae(folder, torch.float32, config.vae_ckpt)
    encoder = load_encoder(folder, DiTConfig().text_len if start is None else start.config.text_len)
    generator = start or random_weights(config, vae, encoder)
    is_matching = config.stage in DISTRIBUTION_MATCHING
    critic = read_critic(config) if is_matching else None
    teacher = read_network(config.wan_folder, config.real_ckpt, config.real_name, "real_name") if is_matching else None
    for network in (generator, critic, teacher):
        if network is not None:
            check_interface(network, vae, encoder)
    lora = critic_lora = None
    if config.lora_ckpt is not None:
        if not config.has_lora:
            raise InputError(f"lora_ckpt={config.lora_ckpt}: needs adapter.type=lora, which it would go on training")
        lora = read_lora(config.lora_ckpt)
        check_rank(lora, config.adapter.rank, config.lora_ckpt)
        check_targets(lora, generator.state, config.lora_ckpt)
        check_complete(lora, generator.state, config.lora_ckpt)
        critic_lora = read_critic_lora(config, critic)
    if clips is not None:
        check_clips(config, clips, vae)
    return Inputs(generator, critic, teacher, lora, critic_lora, vae, encoder, prompts, clips)


def check_interface(network: Weights, vae: WanVAE, encoder: TextEncoder) -> None:
    """Raise InputError unless a transformer works on the latents of the VAE and the prompts of the text encoder."""
    wanted = {"in_channels": vae.config.z_dim, "out_channels": vae.config.z_dim, "text_dim": encoder.config.dim}
    found = {name: getattr(network.config, name) for name in wanted}
    wrong = [f"{name} is {found[name]}, not {size}" for name, size in wanted.items() if found[name] != size]
    if wrong:
        raise InputError(f"{network.source}: does not fit VAE and text encoder: {', '.join(wrong)}")


def read_critic_lora(config: TrainConfig, critic: Weights | None) -> Lora | None:
    """The critic's LoRA where `lora_ckpt` holds one and it is to be trained."""
    path = config.lora_ckpt
    if (
        path is None
        or critic is None
        or not config.adapter.apply_to_critic
        or "critic_lora" not in read_checkpoint(path)
    ):
        return None
    lora = read_lora(path, "critic")
    check_rank(lora, config.adapter.rank, path)
    check_targets(lora, critic.state, path)
    return lora


def check_complete(lora: Lora, state: StateDict, source: str) -> None:
    """Raise InputError unless a LoRA has a pair for every linear layer of the blocks, all of which are trained."""
    linear = [name for name, weight in state.items() if re.fullmatch(r"blocks\..+\.weight", name) and weight.ndim == 2]
    missing = [module for name in linear if (module := name.removesuffix(".weight")) not in lora]
    if missing:
        raise InputError(f"{source}: LoRA of another model: has none for {shorten(missing)}")


def read_data(config: TrainConfig) -> tuple[list[tuple[str, ...]], LatentClips | None]:
    """Prompts, in pairs where they switch; for stages that train on clips these, and prompts for samples if wanted."""
    if config.world is not None:
        return world_prompts(config), None
    if config.stage not in DISTRIBUTION_MATCHING:
        assert config.clips_path is not None
        prompts = read_prompts(config.data_path) if config.vis_interval else []
        return [(prompt,) for prompt in prompts], LatentClips(config.clips_path)
    if config.stage == "streaming" and config.has_switch:
        config.switch_frames()
        return list(read_pairs(config.data_path, config.switch_prompt_path)), None
    return [(prompt,) for prompt in read_prompts(config.data_path)], None


def world_prompts(config: TrainConfig) -> list[tuple[str, ...]]:
    """The prompts of all scenes of a world, in pairs where they, or some of them, switch."""
    items = range(config.num_scenes)
    is_streamed = config.stage == "streaming" and config.has_switch
    if is_streamed:
        config.switch_frames()
    if is_streamed or config.switch_share:
        return list(ShapesSwitches(config.num_scenes, config.seed, switch_video_frame=0).prompts(items))
    return [(prompt,) for prompt in ShapesClips(config.num_scenes, config.seed).prompts(items)]


def check_clips(config: TrainConfig, clips: LatentClips, vae: WanVAE) -> None:
    """Raise InputError unless the clips are of the size that is trained on."""
    wanted = (config.clip_frames, *latent_shape(config, vae))
    if clips.shape != wanted:
        raise InputError(
            f"{config.clips_path}: clips are {list(clips.shape)} latents (frames, channels, height, width), but "
            f"num_training_frames, height and width ask for {list(wanted)}"
        )
    num_steps = len(config.denoising_step_list)
    if config.stage == "causal_init" and clips.num_steps not in (0, num_steps):
        raise InputError(
            f"{config.clips_path}: clips hold {clips.num_steps} ODE states, but denoising_step_list has "
            f"{num_steps} steps"
        )
    settings = Path(config.clips_path or "").parent / CLIP_SETTINGS
    if clips.num_steps and settings.exists():
        made = read_json(settings)
        ours = {
            "denoising_step_list": list(config.denoising_step_list),
            "warp_denoising_step": config.warp_denoising_step,
            "timestep_shift": config.model_kwargs.timestep_shift,
        }
        for key, value in ours.items():
            if made.get(key, value) != value:
                raise InputError(f"{settings}: ODE states were made with {key}={made[key]}, not {value}")


def read_start(config: TrainConfig) -> Weights:
    """The generator's weights to begin with: named, or exported by the stage before, or Wan's, or none yet."""
    if config.generator_ckpt is not None:
        return read_network(config.wan_folder, config.generator_ckpt, config.model_name, "model_name")
    if config.init_logdir is not None:
        exported = Path(config.init_logdir) / GENERATOR
        if not exported.exists():
            raise InputError(
                f"init_logdir: {exported} does not exist; train the stage before first, or name weights by "
                "generator_ckpt=FILE"
            )
        return read_network(config.wan_folder, str(exported), config.model_name, "model_name")
    return read_network(config.wan_folder, None, config.model_name, "model_name")


def read_base(config: TrainConfig) -> Weights:
    """The weights that a run's LoRA lies beside."""
    return read_inputs(config).generator if config.preset else read_start(config)


def random_weights(config: TrainConfig, vae: WanVAE, encoder: TextEncoder) -> Weights:
    """Fresh weights of the sizes that `preset` names, for the latents and prompts of VAE and text encoder."""
    assert config.preset is not None
    channels, text = vae.config.z_dim, encoder.config
    dit_config = replace(
        PRESETS[config.preset],
        in_channels=channels,
        out_channels=channels,
        text_dim=text.dim,
        text_len=text.text_len,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(config.seed, "weights"))
        model = WanDiT(dit_config)
        init_weights(model)
    return Weights(dit_config, dict(model.state_dict()), f"preset={config.preset}")


def read_critic(config: TrainConfig) -> Weights:
    """The critic's weights to begin with: named, or exported by the stage before, or those of the Wan model."""
    exported = Path(config.init_logdir or "") / CRITIC
    path = config.critic_ckpt or (str(exported) if config.init_logdir and exported.exists() else None)
    entry = "critic" if path is not None and has_network(path, "critic") else "generator"
    return read_network(config.wan_folder, path, config.fake_name or config.model_name, "fake_name", entry)


def read_network(wan_folder: str, path: str | None, name: str, key: str, entry: str = "generator") -> Weights:
    """A transformer from the file `path`, or of the Wan model called `name`, which the configuration's `key` tells.

    entry: which one of a training checkpoint that holds several.
    """
    if path is None and name == BUILTIN:
        return Weights(*read_dit(BUILTIN_GENERATOR), "the built-in model")
    if path is not None:
        folder = find_wan_folder(wan_folder, name)
        source, (dit_config, state) = path, read_generator(path, folder, entry)
    else:
        source = str(existing_folder(wan_folder, name, key))
        dit_config, state = read_dit(source)
    weights = Weights(dit_config, state, source)
    check_weights(weights)
    return weights


def existing_folder(wan_folder: str, name: str, key: str) -> Path:
    folder = find_wan_folder(wan_folder, name)
    if not folder.exists():
        raise InputError(
            f"{key}: {folder} does not exist; bash scripts/download_weights.sh --teacher fetches the models"
        )
    return folder


def latent_shape(config: TrainConfig, vae: WanVAE) -> tuple[int, int, int]:
    """Channels, height and width of a latent frame."""
    factor = vae.config.spatial_factor
    return vae.config.z_dim, config.height // factor, config.width // factor
