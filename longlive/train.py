"""A training run from its configuration: checks, trainer, resuming, exported weights.

Layer 4. What a user may have got wrong is checked before any GPU memory is taken, as far as that can tell.
"""

import logging
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from longlive.build import (
    choose_device,
    choose_dtype,
    place_encoder,
)
from longlive.config import InferenceConfig, to_dict, to_yaml
from longlive.data.clips import PixelClips, PixelPool, PixelSource
from longlive.data.order import Order
from longlive.data.shapes import HEIGHT, WIDTH
from longlive.data.shapes.clips import ShapesClips
from longlive.distributed import is_main, local_world_size, world_size
from longlive.errors import InputError
from longlive.inference.video import check_writable
from longlive.models.vae import VAEConfig, WanVAE
from longlive.train_build import (
    compile_norms,
    ema_config,
    graphed,
    make_trainer,
    optimizer_config,
    trainer_config,
)
from longlive.train_config import CAUSAL, TrainConfig, load_train_config
from longlive.train_inputs import Inputs, read_base, read_inputs
from longlive.train_world import world_batches
from longlive.training.checkpoint import Checkpoints, check_identity, find_latest, read_identity
from longlive.training.clock import Clock
from longlive.training.draw import Pictures, derived_seed
from longlive.training.export import GENERATOR, export, export_vae
from longlive.training.metrics import Metrics, check_trackers
from longlive.training.networks import Weights
from longlive.training.parallel import Group, process_group, shard
from longlive.training.sequence_parallel import share_frames
from longlive.training.trainer import Network, Trainer
from longlive.training.vae_stage import Autoencoder, VAELossConfig, VAETraining, begin_as_images
from longlive.weights.files import atomic_file, fingerprint, shorten, write_json
from longlive.weights.formats import DIT, find_weights

log = logging.getLogger(__name__)


CONFIG = "train_config.json"
STATISTICS_PIXELS = 64 * 2**20


@dataclass(frozen=True)
class Job:
    """What a stage trains, read and checked. identity: the settings that its checkpoints share; make_trainer: puts the
    models on the device."""

    identity: dict[str, Any]
    make_trainer: Callable[[Group, Checkpoints], Trainer]


def run_training(config: TrainConfig) -> bool:
    """Train as a configuration says, from the newest checkpoint where there is one, and export the weights.

    Returns whether training is complete; it is not after a signal, which saves a checkpoint. Raises InputError for
    mistakes of the user, NonFiniteError for a run that broke.
    """
    check_processes(config)
    check_trackers(config.tensorboard, config.wandb_project)
    job = read_job(config)
    folder = Path(config.logdir)
    latest = find_latest(folder / "checkpoints")
    if latest is not None:
        if "begun_with" in job.identity and read_identity(latest).get("begun_with") is None:
            job.identity["begun_with"] = None  # full training did not tell it once
        check_identity(latest, job.identity)
    check_writable(folder)
    device = choose_device(config.device)
    shard_size = local_world_size() if config.sharding_strategy == "hybrid_full" else None
    with process_group(device, shard_size) as group:
        checkpoints = Checkpoints(folder / "checkpoints", config.max_checkpoints, job.identity)
        trainer = job.make_trainer(group, checkpoints)
        latest = checkpoints.latest()  # all processes go on from the same one, whatever they see of a shared disk
        if latest is not None:
            trainer.resume(latest)
            log.info("going on after step %d of %d, from %s", trainer.progress.step, config.max_iters, latest)
        with open_metrics(config, trainer.progress.step) if group.is_main else nullcontext() as metrics:
            trainer.metrics = metrics
            is_complete = trainer.fit()
        latest = checkpoints.latest()
    if is_complete and latest is not None and is_main():
        export_checkpoint(config, latest)
    return is_complete


def export_folder(folder: Path, checkpoint: Path | None) -> None:
    """Write the weights of a checkpoint of the run in `folder`, by default the newest. Raises InputError."""
    config = replace(load_train_config(folder / CONFIG), logdir=str(folder.absolute()))
    checkpoint = checkpoint or find_latest(folder / "checkpoints")
    if checkpoint is None:
        raise InputError(f"{folder}: holds no checkpoint yet")
    export_checkpoint(config, checkpoint)


def read_job(config: TrainConfig) -> Job:
    """Read and check what a stage needs. Raises InputError."""
    return vae_job(config) if config.stage == "vae" else generator_job(config)


def open_metrics(config: TrainConfig, start_step: int) -> Metrics:
    """The run's log, and its configuration beside it."""
    folder = Path(config.logdir)
    write_json(folder / CONFIG, to_dict(config))
    return Metrics(
        folder,
        tensorboard=config.tensorboard,
        wandb_project=config.wandb_project,
        config=to_dict(config),
        start_step=start_step,
    )


def export_checkpoint(config: TrainConfig, checkpoint: Path) -> None:
    """Write the weights of a checkpoint and, of a causal model, a configuration that generates with them."""
    folder = Path(config.logdir)
    if config.stage == "vae":
        device, num_clips = choose_device(config.device), num_statistics_clips(config)
        clips = pixel_clips(replace(config, num_scenes=num_clips), device)
        order = Order(len(clips), config.seed)
        batches = (clips.pixels([order[i]]).to(device) for i in range(num_clips))
        written = export_vae(checkpoint, folder, batches, device)
    else:
        written = export(checkpoint, folder, base_of(checkpoint, config), config.adapter.alpha)
    for path in written:
        log.info("wrote %s", path)
    if config.stage in CAUSAL:
        path = Path(config.logdir) / "inference.yaml"
        with atomic_file(path) as file:
            file.write(to_yaml(inference_settings(config)).encode())
        log.info("see what it has learnt: bash inference.sh --config_path %s", path)


def base_of(checkpoint: Path, config: TrainConfig) -> Weights | None:
    """The weights that a checkpoint's LoRA lies beside; none where all are trained. Raises InputError for others."""
    if not config.has_lora:
        return None
    base = read_base(config)
    if source_of(base) != read_identity(checkpoint)["begun_with"][0]:
        raise InputError(
            f"{base.source}: is not what the LoRA in {checkpoint} was trained beside; it has changed since"
        )
    return base


def check_processes(config: TrainConfig) -> None:
    """Raise InputError where the processes cannot share the work as the configuration says."""
    total = world_size()
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if total > 1 and missing:
        raise InputError(
            f"WORLD_SIZE={total}, but {shorten(missing)} not set; torchrun and NUM_GPUS=N bash train_init.sh set all"
        )
    config.num_rounds(total)
    if config.sharding_strategy == "hybrid_full" and total % local_world_size():
        raise InputError(
            f"sharding_strategy=hybrid_full: {total} processes are not whole nodes of {local_world_size()}"
        )
    size = config.teacher_sequence_parallel
    if total % size:
        raise InputError(f"teacher_sequence_parallel={size}: does not divide the {total} processes")
    share_frames(config.clip_frames, size)


def inference_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings, other than defaults, that generate with the weights of a run as it was trained."""
    same = (
        *("model_name", "wan_folder", "vae_ckpt", "height", "width", "fps", "num_frame_per_block"),
        *("warp_denoising_step", "context_noise", "global_sink"),
    )
    block = config.num_frame_per_block
    return {key: getattr(config, key) for key in same} | {
        "generator_ckpt": str(Path(config.logdir) / GENERATOR),
        "lora_ckpt": None,
        "denoising_step_list": list(config.denoising_step_list),
        "model_kwargs": asdict(config.model_kwargs),
        "num_output_frames": -(-InferenceConfig.num_output_frames // block) * block,
        "output_folder": str(Path(config.logdir) / "videos"),
    }


def generator_job(config: TrainConfig) -> Job:
    """All stages but that of the VAE."""
    inputs = read_inputs(config)

    def make(group: Group, checkpoints: Checkpoints) -> Trainer:
        encode_prompts = place_encoder(inputs.encoder, group.device, config.low_memory)
        if config.world is not None:
            encode_prompts.fill([prompt for prompts in inputs.prompts for prompt in prompts])
        return make_trainer(config, inputs, encode_prompts, group, checkpoints)

    return Job(run_identity(config, inputs), make)


def run_identity(config: TrainConfig, inputs: Inputs) -> dict[str, Any]:
    """The settings that a run shares with the checkpoints it may go on from."""
    keys = ("type", "rank", "alpha", "apply_to_critic") if config.has_lora else ("type",)
    begun_with = [network for network in (inputs.generator, inputs.critic) if network is not None]
    return {
        "stage": config.stage,
        "seed": config.seed,
        "generator": inputs.generator.config.told(),
        "critic": None if inputs.critic is None else inputs.critic.config.told(),
        "begun_with": [source_of(network) for network in begun_with],
        "max_frames": config.streaming_max_length if config.model_kwargs.local_attn_size == -1 else None,
        "adapter": {key: getattr(config.adapter, key) for key in keys},
        "ema": config.ema_weight > 0,
        "frames": [config.clip_frames, config.num_frame_per_block],
        "height": config.height,
        "width": config.width,
        "model_kwargs": asdict(config.model_kwargs),
    }


def source_of(weights: Weights) -> str:
    """What a network began with, or its LoRA lies beside: its file's fingerprint, or what takes a file's place."""
    path = Path(weights.source)
    return fingerprint(find_weights(DIT, path)) if path.exists() else str(weights.source)


def pixel_clips(config: TrainConfig, device: torch.device) -> PixelSource:
    """The clips that a VAE trains on: files, or scenes of a world, which are drawn on the device and stay there."""
    num_video_frames = VAEConfig().num_video_frames(config.num_training_frames)
    if config.world is None:
        assert config.clips_path is not None
        return PixelClips(config.clips_path, config.height, config.width, num_video_frames, config.fps)
    clips = ShapesClips(config.num_scenes, config.seed, num_video_frames, device=device)
    batches = world_batches(range(len(clips)), num_video_frames, device)
    pixels = torch.empty(len(clips), num_video_frames, HEIGHT, WIDTH, 3, dtype=torch.uint8, device=device)
    for numbers in batches:
        pixels[numbers] = clips.frames(numbers)
    return PixelPool(pixels)


def num_statistics_clips(config: TrainConfig) -> int:
    """How many clips the statistics of a VAE's latents are taken of: enough values, in minutes on a CPU."""
    pixels = VAEConfig().temporal_factor * config.num_training_frames * config.height * config.width
    return max(4, min(64, STATISTICS_PIXELS // pixels))


def vae_job(config: TrainConfig) -> Job:
    """The stage of the VAE."""
    z_dim = config.vae_z_dim
    statistics: dict[str, Any] = {"latents_mean": (0.0,) * z_dim, "latents_std": (1.0,) * z_dim}
    vae_config = VAEConfig(config.vae_base_dim, z_dim, num_res_blocks=config.vae_num_res_blocks, **statistics)
    files = pixel_clips(config, torch.device("cpu")) if config.world is None else None  # to see now what can be read

    def make(group: Group, checkpoints: Checkpoints) -> Trainer:
        clips = files or pixel_clips(config, group.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(config.seed, "weights"))
            autoencoder = Autoencoder(WanVAE(vae_config))
            begin_as_images(autoencoder.vae)
        autoencoder.to(group.device)
        dtype = choose_dtype("auto", group.device)
        shard(autoencoder, group, dtype)
        if config.compile:
            compile_norms(autoencoder)
        loss = VAELossConfig(config.kl_weight, config.foreground_weight)
        clock = Clock(group.device)
        stage = VAETraining(
            graphed(autoencoder, config, group),
            vae_config,
            clips,
            Order(len(clips), config.seed),
            loss,
            clock,
            Pictures(config.picture_share, config.num_training_frames),
        )
        networks = {"vae": Network(autoencoder, optimizer_config(config), ema_config(config), dtype)}
        return Trainer(stage, networks, trainer_config(config, group), group, checkpoints, None, clock)

    sizes = {"vae": asdict(vae_config), "frames": config.num_training_frames}
    size = {"height": config.height, "width": config.width}
    return Job({"stage": config.stage, "seed": config.seed, "ema": config.ema_weight > 0, **sizes, **size}, make)
