"""Everything the training command can be told, under the published names where there is one.

Layer 4, like `config`, which owns how configurations are read.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longlive.config import (
    DEVICE,
    FRAME_NUMBERS,
    MULTIPLE_OF_16,
    POSITIVE,
    STEPS,
    AdapterSettings,
    ModelKwargs,
    Rule,
    Section,
    Values,
    at_least,
    between,
    load_config,
    one_of,
    setting,
)
from longlive.data.shapes import FPS, HEIGHT, WIDTH
from longlive.errors import InputError

log = logging.getLogger(__name__)

STAGES = ("self_forcing", "streaming", "causal_init", "pretrain", "vae")
DISTRIBUTION_MATCHING = ("self_forcing", "streaming")
CAUSAL = (*DISTRIBUTION_MATCHING, "causal_init")

WORLD_SIZE = (HEIGHT, WIDTH, FPS)

BELOW_1 = Rule("at least 0 and below 1", lambda value: 0 <= value < 1)

PUBLISHED_WITHOUT_EFFECT = {
    "auto_resume": "a run always goes on at its newest checkpoint",
    "causal": "follows from the stage",
    "config_path": "an argument of the command",
    "denoising_loss_type": "the critic learns by flow matching",
    "disable_wandb": "without wandb_project there is none",
    "discriminator_lr_multiplier": "there is no discriminator",
    "distribution_loss": "follows from the stage",
    "fake_score_fsdp_wrap_strategy": "every block is a unit",
    "gc_interval": "nothing needs collecting",
    "generator_fsdp_wrap_strategy": "every block is a unit",
    "i2v": "text to video only",
    "independent_first_frame": "all blocks are of one size",
    "load_raw_video": "data are prompts or latents",
    "min_num_training_frames": "always num_training_frames",
    "mixed_precision": "bfloat16 with float32 masters on a GPU",
    "no_save": "checkpoints are always saved",
    "no_visualize": "vis_interval=0 is the same",
    "num_train_timestep": "always 1000",
    "real_score_fsdp_wrap_strategy": "every block is a unit",
    "slice_last_frames": "always num_training_frames",
    "text_encoder_fsdp_wrap_strategy": "the text encoder is not sharded",
    "trainer": "follows from the stage",
    "ts_schedule": "timesteps are uniform",
    "ts_schedule_max": "timesteps are uniform",
    "use_wandb": "wandb_project names one",
    "wandb_entity": "the variable WANDB_ENTITY",
    "wandb_host": "the variable WANDB_BASE_URL",
    "wandb_key": "the variable WANDB_API_KEY",
    "wandb_save_dir": "always the run's folder",
}
"""Keys of published configurations that are accepted and change nothing, and what holds instead."""


@dataclass(frozen=True)
class TrainAdapterSettings(AdapterSettings):
    """LoRA training: what is trained beside the frozen weights."""

    type: str = setting("none", "lora = train LoRA weights; none = train all weights", one_of("lora", "none"))
    dropout: float = setting(0.0, "published; there is none", Rule("0", lambda value: value == 0))
    apply_to_critic: bool = setting(True, "the critic is trained by LoRA too; false = all of it")


@dataclass(frozen=True)
class TrainConfig(Section):
    """Everything the training command can be told. One latent frame is 4 video frames (the first one is 1)."""

    stage: str = setting("self_forcing", "what to train, and how; see README.md, Training", one_of(*STAGES))
    logdir: str = setting("runs/train", "folder of the run: checkpoints, logs, samples, exported weights", path=True)
    seed: int = setting(0, "of all random numbers", between(0, 2**63 - 1))
    max_iters: int = setting(1000, "steps in all", at_least(1))

    model_name: str = setting("Wan2.1-T2V-1.3B", "generator, VAE and text encoder: folder inside wan_folder")
    wan_folder: str = setting("wan_models", "folder of the Wan models", path=True)
    generator_ckpt: str | None = setting(
        None, "generator to begin with; null = what the stage before has exported (init_logdir), else Wan's", path=True
    )
    preset: str | None = setting(
        None,
        "begin with random weights of these sizes instead: tiny, 1.3B or 14B; null = with weights that are there",
        one_of("tiny", "1.3B", "14B"),
    )
    vae_ckpt: str | None = setting(None, "VAE weights; null = those of the Wan model", path=True)
    init_logdir: str | None = setting(None, "run folder of the stage before", path=True)
    lora_ckpt: str | None = setting(None, "LoRA to begin with; null = none", path=True)
    real_name: str = setting("Wan2.1-T2V-14B", "teacher: folder inside wan_folder")
    real_ckpt: str | None = setting(None, "teacher: weights file; null = those of real_name", path=True)
    fake_name: str | None = setting(None, "critic to begin with: folder inside wan_folder; null = model_name")
    critic_ckpt: str | None = setting(
        None, "critic to begin with: weights file; null = exported in init_logdir, else fake_name", path=True
    )
    teacher_precision: str = setting(
        "auto", "fp8 = half the memory; auto = bf16, on the CPU float32", one_of("auto", "fp8")
    )
    teacher_sequence_parallel: int = setting(
        1, "processes that share the frames of one clip in the teacher, for memory", at_least(1)
    )
    adapter: TrainAdapterSettings = field(default_factory=TrainAdapterSettings)
    model_kwargs: ModelKwargs = field(default_factory=ModelKwargs)

    data_path: str = setting("example/long_example.txt", "prompts: .txt or .jsonl", path=True)
    switch_prompt_path: str | None = setting(
        None,
        "streaming: the prompts after the switch, line by line; null = data_path holds pairs",
        path=True,
    )
    clips_path: str | None = setting(
        None, "causal_init, pretrain, vae: .jsonl of clips with prompts (python -m longlive clips --help)", path=True
    )
    world: str | None = setting(
        None, "train on scenes of this procedural world instead of data_path and clips_path", one_of("shapes")
    )
    num_scenes: int = setting(32768, "scenes of the world to train on", at_least(1))
    worn_past: bool = setting(
        False,
        "causal_init on a world: behind the sink the past shows bodies off their place, and blocks learn to bring them "
        "back by a part",
    )
    switch_share: float = setting(
        0.0,
        "causal_init on a world: share of the clips that go through a prompt switch; they have the prompt after it, "
        "are learnt from there on, and are not worn",
        between(0, 1),
    )
    negative_prompt: str = setting("", "what guidance leads away from")
    prompt_dropout: float = setting(0.1, "causal_init, pretrain: share of clips without prompt", between(0, 1))
    hint_share: float = setting(
        0.0,
        "pretrain: share of the clips in which one frame has less noise than the others: from there the prompt tells "
        "where the rest must be",
        between(0, 1),
    )
    picture_share: float = setting(
        0.0, "vae, pretrain: share of the steps that are on pictures, the first frames of more clips", between(0, 1)
    )
    batch_size: int = setting(1, "videos per process and micro-batch", at_least(1))
    gradient_accumulation_steps: int = setting(1, "micro-batches per step", at_least(1))
    total_batch_size: int | None = setting(
        None, "videos per step of all processes; sets gradient_accumulation_steps; null = as it comes", at_least(1)
    )

    height: int = setting(480, "pixels", MULTIPLE_OF_16)
    width: int = setting(832, "pixels", MULTIPLE_OF_16)
    fps: int = setting(16, "video frames per second of the data and of samples", at_least(1))
    num_training_frames: int = setting(21, "latent frames of a clip", at_least(1))
    num_frame_per_block: int = setting(3, "latent frames made at a time", at_least(1))
    denoising_step_list: tuple[int, ...] = setting(
        (1000, 750, 500, 250), "noise levels of the denoising steps of a block, of 1000; one pass each", STEPS
    )
    warp_denoising_step: bool = setting(True, "warp denoising_step_list by timestep_shift")
    context_noise: int = setting(0, "timestep at which finished frames enter the cache", between(0, 1000))
    same_step_across_blocks: bool = setting(True, "one random exit step for all blocks of a clip; false = each its own")
    last_step_only: bool = setting(False, "always make all denoising steps")
    global_sink: bool = setting(True, "a prompt switch keeps the sink; false = renews it")
    recache_policy: str = setting(
        "inference",
        "prompt switches as at inference, or as in the published training",
        one_of("inference", "published"),
    )

    guidance_scale: float = setting(3.0, "of the teacher: cond + scale (cond - uncond)", at_least(0))
    fake_guidance_scale: float = setting(0.0, "of the critic", at_least(0))
    score_timestep_shift: float = setting(8.0, "noise schedule by which scores become x0, as published", POSITIVE)
    min_score_timestep: float = setting(20.0, "noise levels of the scores: lowest", between(0, 1000))
    max_score_timestep: float = setting(980.0, "noise levels of the scores: highest", between(0, 1000))
    dfake_gen_update_ratio: int = setting(5, "critic updates per generator update", at_least(1))

    streaming_chunk_size: int = setting(21, "streaming: latent frames of the clip a loss sees", at_least(1))
    streaming_max_length: int = setting(240, "streaming: latent frames of a sequence", at_least(1))
    streaming_min_new_frame: int = setting(18, "streaming: new latent frames of a chunk, at least", at_least(1))
    train_first_chunk: bool = setting(True, "streaming: train on the first chunk too")
    switch_mode: str = setting(
        "random_choice",
        "streaming: the prompt switches at one of switch_choices, at any block, at switch_frame_index, or never",
        one_of("random_choice", "random", "fixed", "none"),
    )
    switch_choices: tuple[int, ...] = setting(
        (21, 39, 57, 75, 93, 111, 129, 147, 165, 183, 201), "streaming: latent frames of a switch", FRAME_NUMBERS
    )
    switch_frame_index: int = setting(21, "streaming: latent frame of a fixed switch", at_least(0))

    lr: float = setting(2e-6, "learning rate", POSITIVE)
    lr_critic: float = setting(4e-7, "learning rate of the critic", POSITIVE)
    muon_lr: float = setting(
        0.0,
        "learning rate of Muon for the matrices of the generator's blocks, on one process; 0 = AdamW trains them too",
        at_least(0),
    )
    beta1: float = setting(0.0, "AdamW", BELOW_1)
    beta2: float = setting(0.999, "AdamW", BELOW_1)
    beta1_critic: float = setting(0.0, "AdamW of the critic", BELOW_1)
    beta2_critic: float = setting(0.999, "AdamW of the critic", BELOW_1)
    weight_decay: float = setting(0.01, "AdamW", at_least(0))
    max_grad_norm_generator: float = setting(10.0, "gradients are clipped to this norm", POSITIVE)
    max_grad_norm_critic: float = setting(10.0, "the same for the critic", POSITIVE)
    lr_warmup_steps: int = setting(0, "steps in which learning rates rise linearly", at_least(0))
    lr_final_ratio: float = setting(1.0, "learning rates end at this share, falling by a cosine", between(0, 1))
    ema_weight: float = setting(0.99, "decay of the averaged generator; 0 = none", BELOW_1)
    ema_start_step: int = setting(200, "step from which the average is one", at_least(0))

    vae_base_dim: int = setting(8, "vae: width of the first level", at_least(1))
    vae_num_res_blocks: int = setting(2, "vae: residual blocks of a level", at_least(1))
    vae_z_dim: int = setting(16, "vae: latent channels", at_least(1))
    kl_weight: float = setting(1e-4, "vae: weight of the KL term", at_least(0))
    foreground_weight: float = setting(1.0, "vae: weight of pixels unlike their frame's median colour", at_least(1))

    log_iters: int = setting(50, "steps between checkpoints; 0 = only at the end", at_least(0))
    max_checkpoints: int = setting(3, "checkpoints to keep", at_least(1))
    vis_interval: int = setting(0, "steps between sample videos; 0 = none", at_least(0))
    vis_video_lengths: tuple[int, ...] = setting((120,), "latent frames of the sample videos")
    vis_num_prompts: int = setting(2, "prompts of data_path that samples are made of", at_least(1))
    vis_ema: bool = setting(True, "samples are of the averaged generator, where there is one")
    tensorboard: bool = setting(False, "write TensorBoard logs too")
    wandb_project: str | None = setting(None, "log to this project of Weights & Biases too")

    device: str = setting("auto", "auto = cuda where there is one", DEVICE)
    attention: str = setting("auto", "attention kernel", one_of("auto", "sdpa", "cudnn", "flash2", "flash3"))
    compile: bool = setting(False, "compile the blocks of all transformers: slow to start, then faster")
    cuda_graphs: bool = setting(
        False, "replay passes as CUDA graphs, for small models on one GPU; needs activation_checkpointing=none"
    )
    one_gradient_pass: bool = setting(
        False, "self_forcing, streaming: one pass with gradient over all blocks of a clip, faster for small models"
    )
    activation_checkpointing: str = setting(
        "selective",
        "what the backward pass computes again, to save memory: nothing, all but attention, or all",
        one_of("none", "selective", "full"),
    )
    sharding_strategy: str = setting(
        "full", "weights are shared out over all processes, or over those of a node", one_of("full", "hybrid_full")
    )
    low_memory: bool = setting(False, "keep the text encoder off the GPU")

    def __post_init__(self) -> None:
        super().__post_init__()
        block, model = self.num_frame_per_block, self.model_kwargs
        chunk = "streaming_chunk_size" if self.stage == "streaming" else "num_training_frames"
        lengths = {chunk: self.clip_frames}
        if self.stage == "streaming":
            new = self.streaming_min_new_frame
            lengths |= {"streaming_max_length": self.streaming_max_length, "streaming_min_new_frame": new}
            if not new < self.clip_frames <= self.streaming_max_length:
                raise InputError(
                    f"streaming_min_new_frame={new}, streaming_chunk_size={self.clip_frames}, streaming_max_length="
                    f"{self.streaming_max_length}: new frames must be less than a chunk, a chunk not more than all"
                )
        if self.stage == "streaming" and not self.train_first_chunk:
            shortest = self.clip_frames + self.streaming_min_new_frame
            if shortest > self.streaming_max_length:
                raise InputError(
                    f"streaming_max_length={self.streaming_max_length}: must hold the first chunk and another with "
                    f"train_first_chunk=false, at least {shortest}"
                )
        if self.picture_share and self.stage not in ("vae", "pretrain"):
            raise InputError(f"picture_share={self.picture_share}: not available with stage={self.stage}")
        if self.hint_share and self.stage != "pretrain":
            raise InputError(f"hint_share={self.hint_share}: not available with stage={self.stage}")
        if self.vis_interval and self.stage not in CAUSAL:
            raise InputError(f"vis_interval: not available with stage={self.stage}")
        if self.has_lora and self.stage == "vae":
            raise InputError(f"adapter.type=lora: not available with stage={self.stage}")
        wrong = [f"{name}={frames}" for name, frames in lengths.items() if self.stage in CAUSAL and frames % block]
        if self.vis_interval and any(frames % block or frames < 1 for frames in self.vis_video_lengths):
            wrong.append(f"vis_video_lengths={list(self.vis_video_lengths)}")
        if wrong:
            raise InputError(f"{wrong[0]}: must be a multiple of num_frame_per_block={block}")
        model.check_window(block)
        if model.use_infinite_attention and self.stage not in CAUSAL:
            raise InputError(f"model_kwargs.use_infinite_attention=true: not available with stage={self.stage}")
        if model.use_infinite_attention and self.recache_policy == "published":
            raise InputError("model_kwargs.use_infinite_attention=true: not available with recache_policy=published")
        is_rolled_with_gradient = self.stage in DISTRIBUTION_MATCHING and not self.one_gradient_pass
        if model.use_infinite_attention and is_rolled_with_gradient and self.activation_checkpointing != "none":
            raise InputError(
                "model_kwargs.use_infinite_attention=true: needs one_gradient_pass=true or "
                "activation_checkpointing=none"
            )
        if self.stage not in DISTRIBUTION_MATCHING and self.clips_path is None and self.world is None:
            raise InputError(f"clips_path is not given, and stage={self.stage} trains on clips")
        is_on_world = self.stage == "causal_init" and self.world is not None
        if self.worn_past and not (is_on_world and model.sink_size):
            raise InputError("worn_past=true: needs stage=causal_init, a world, and a sink")
        if self.switch_share and not is_on_world:
            raise InputError(f"switch_share={self.switch_share}: needs stage=causal_init and a world")
        shortest = self.first_frame_behind_sink + 2 * block
        if (self.worn_past or self.switch_share) and self.clip_frames < shortest:
            raise InputError(
                f"num_training_frames={self.clip_frames}: must hold the sink and two more blocks with worn_past or "
                f"switch_share, at least {shortest}"
            )
        if self.world is not None and self.clips_path is not None:
            raise InputError(f"world={self.world}, clips_path={self.clips_path}: there can be only one of them")
        if self.world is not None and (self.height, self.width, self.fps) != WORLD_SIZE:
            height, width, fps = WORLD_SIZE
            raise InputError(f"world={self.world}: its pictures are of height={height}, width={width}, fps={fps}")
        if self.cuda_graphs and self.activation_checkpointing != "none" and self.stage != "vae":
            raise InputError("cuda_graphs=true: needs activation_checkpointing=none")
        if self.one_gradient_pass and self.stage not in DISTRIBUTION_MATCHING:
            raise InputError(f"one_gradient_pass=true: not available with stage={self.stage}")
        if self.one_gradient_pass and self.recache_policy == "published" and model.sink_size > block:
            raise InputError(
                f"one_gradient_pass=true: not available with recache_policy=published and sink_size={model.sink_size}, "
                f"longer than num_frame_per_block={block}"
            )
        if self.min_score_timestep >= self.max_score_timestep:
            raise InputError(f"min_score_timestep={self.min_score_timestep}: must be less than max_score_timestep")

    @property
    def clip_frames(self) -> int:
        """Latent frames of the clip that a loss sees."""
        return self.streaming_chunk_size if self.stage == "streaming" else self.num_training_frames

    @property
    def first_frame_behind_sink(self) -> int:
        """The first latent frame of the first block behind the sink."""
        block = self.num_frame_per_block
        return -(-self.model_kwargs.sink_size // block) * block

    @property
    def has_switch(self) -> bool:
        return self.switch_mode != "none"

    @property
    def has_lora(self) -> bool:
        return self.adapter.type == "lora"

    def num_rounds(self, world_size: int) -> int:
        """Micro-batches per step. Raises InputError where the processes cannot share total_batch_size evenly."""
        if self.total_batch_size is None:
            return self.gradient_accumulation_steps
        rounds, rest = divmod(self.total_batch_size, self.batch_size * world_size)
        if rest or not rounds:
            raise InputError(
                f"total_batch_size={self.total_batch_size}: must be a multiple of batch_size {self.batch_size} times "
                f"{world_size} processes"
            )
        return rounds

    def switch_frames(self) -> tuple[int, ...]:
        """The latent frames at which a sequence may switch its prompt. Raises InputError where there is none."""
        block, end = self.num_frame_per_block, self.streaming_max_length
        choices: Sequence[int] = {
            "random_choice": self.switch_choices,
            "random": range(block, end, block),
            "fixed": (self.switch_frame_index,),
        }[self.switch_mode]
        last = end - self.streaming_min_new_frame  # a sequence may end soon after it
        within = tuple(frame for frame in choices if 0 < frame <= last)
        if not within:
            raise InputError(
                f"switch_mode={self.switch_mode}: no switch frame lies between 1 and streaming_max_length - "
                f"streaming_min_new_frame = {last}"
            )
        return within


def load_train_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """The configuration of a training run, published files included. Raises InputError, one line."""
    return load_config(TrainConfig, path, overrides, translate_published)[0]


def translate_published(values: Values) -> Values:
    """Published keys that mean the same as ours, under our names; those without effect are left out, and told."""
    translated: Values = {}
    ignored = [name for name in values if name.partition(".")[0] in PUBLISHED_WITHOUT_EFFECT]
    if ignored:
        told = ", ".join(f"{name} ({PUBLISHED_WITHOUT_EFFECT[name.partition('.')[0]]})" for name in ignored)
        log.info("without effect here: %s", told)
    for name, value in values.items():
        if name not in ignored:
            translated |= _translate(name, value)
    return translated


def _translate(name: str, value: Any) -> Values:
    is_true = str(value).lower() == "true"
    if name == "streaming_training":
        return {"stage": "streaming"} if is_true else {}
    if name == "gradient_checkpointing":
        return {"activation_checkpointing": "selective" if is_true else "none"}
    if name == "real_guidance_scale":
        return {"guidance_scale": value}
    if name == "image_or_video_shape":
        sizes = value if isinstance(value, list) else str(value).strip("[] ").split(",")
        if len(sizes) != 5 or not all(str(size).strip().isdigit() for size in sizes):
            raise InputError(f"image_or_video_shape={value}: must be batch, frames, channels, height, width of latents")
        frames, height, width = (int(sizes[i]) for i in (1, 3, 4))
        return {"num_training_frames": frames, "height": 8 * height, "width": 8 * width}
    return {name: value}
