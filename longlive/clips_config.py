"""Everything the command that makes training clips can be told. Layer 4, like `train_config`, whose names it shares."""

from dataclasses import dataclass

from longlive.config import DEVICE, DTYPES, MULTIPLE_OF_16, POSITIVE, STEPS, Section, at_least, between, one_of, setting
from longlive.errors import InputError


@dataclass(frozen=True)
class ClipsConfig(Section):
    """Everything the command that makes training clips can be told."""

    source: str = setting(
        "teacher",
        "videos = encode those that data_path lists; teacher = sample from a bidirectional model for its prompts",
        one_of("videos", "teacher"),
    )
    data_path: str = setting(
        "example/long_example.txt",
        'teacher: prompts, .txt or .jsonl; videos: .jsonl with {"prompt": "…", "video": "file"} in every line',
        path=True,
    )
    world: str | None = setting(
        None, "teacher: prompts of scenes of this procedural world instead of data_path", one_of("shapes")
    )
    num_scenes: int = setting(4096, "scenes of the world, each with its prompt", at_least(1))
    output_folder: str = setting("clips", "where the clips go; its clips.jsonl is training's clips_path", path=True)
    clip_dtype: str = setting("float32", "type of the latents in the files", one_of(*DTYPES))
    batch_size: int = setting(1, "clips made at the same time", at_least(1))

    model_name: str = setting("Wan2.1-T2V-1.3B", "VAE and text encoder: folder inside wan_folder")
    wan_folder: str = setting("wan_models", "folder of the Wan models", path=True)
    vae_ckpt: str | None = setting(None, "VAE weights; null = those of the Wan model", path=True)
    height: int = setting(480, "pixels", MULTIPLE_OF_16)
    width: int = setting(832, "pixels", MULTIPLE_OF_16)
    fps: int = setting(16, "videos: frames per second at which they are read", at_least(1))
    num_training_frames: int = setting(21, "latent frames of a clip", at_least(1))

    real_name: str = setting("Wan2.1-T2V-14B", "teacher: folder inside wan_folder")
    real_ckpt: str | None = setting(None, "teacher: weights file; null = those of real_name", path=True)
    num_samples: int = setting(1, "teacher: clips per prompt, each of its own noise; may be raised later", at_least(1))
    seed: int = setting(0, "teacher: seed of the noise", between(0, 2**63 - 1))
    negative_prompt: str = setting("", "teacher: what guidance leads away from")
    guidance_scale: float = setting(3.0, "teacher: cond + scale (cond - uncond)", at_least(0))
    num_steps: int = setting(50, "teacher: denoising steps", at_least(1))
    timestep_shift: float = setting(5.0, "teacher: warp of the noise schedule, its own and the student's", POSITIVE)
    stochastic: bool = setting(
        False, "teacher: draw noise anew in every step, which mends what earlier steps did wrong; not with trajectory"
    )
    trajectory: bool = setting(
        False, "teacher: store the states at denoising_step_list too, from which causal_init learns by regression"
    )
    denoising_step_list: tuple[int, ...] = setting(
        (1000, 750, 500, 250), "trajectory: the student's denoising steps, as its training says", STEPS
    )
    warp_denoising_step: bool = setting(True, "trajectory: warp denoising_step_list by timestep_shift")

    device: str = setting("auto", "auto = cuda where there is one", DEVICE)
    attention: str = setting("auto", "attention kernel", one_of("auto", "sdpa", "cudnn", "flash2", "flash3"))
    low_memory: bool = setting(False, "keep the text encoder off the GPU")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trajectory and self.source != "teacher":
            raise InputError(f"trajectory=true: needs source=teacher, not {self.source}; videos have no noisy states")
        if self.trajectory and self.stochastic:
            raise InputError("trajectory=true stochastic=true: a student learns from the deterministic path alone")
        if self.world is not None and self.source != "teacher":
            raise InputError(f"world={self.world}: needs source=teacher, not {self.source}")
