"""Everything the evaluate command can be told: how the models are loaded, as at inference, and what is measured."""

from dataclasses import dataclass, replace

from longlive.clips_config import ClipsConfig
from longlive.config import POSITIVE, InferenceConfig, Rule, at_least, setting
from longlive.data.shapes import FPS, HEIGHT, WIDTH
from longlive.errors import InputError

PARTS = ("world", "vae", "teacher", "length", "switch")
SWITCH_CACHES = ("recache", "keep", "clear")
WINDOW_S = 5
WINDOW_VIDEO_FRAMES = FPS * WINDOW_S + 1
"""A clip of 21 latent frames: what a teacher makes, and how much of a video is judged at a time."""
UNUSED = frozenset(
    {
        *("data_path", "prompt", "start_from", "output_folder", "overwrite", "save_with_index", "contact_sheet"),
        *("animation", "inference_iter", "num_samples", "num_output_frames", "fps", "crf", "switch_frame_indices"),
    }
)
"""Keys of inference that mean nothing here. Its configuration files may hold them."""

_TIMES = Rule(
    f"increasing whole seconds from {WINDOW_S}",
    lambda value: len(value) > 0 and value[0] >= WINDOW_S and list(value) == sorted(set(value)),
)


def _some_of(choices: tuple[str, ...]) -> Rule:
    return Rule(f"some of {', '.join(choices)}", lambda value: len(value) > 0 and {*value} <= {*choices})


@dataclass(frozen=True)
class EvaluateConfig(InferenceConfig):
    """The keys of inference, and those of the suite. Seconds are seconds of video at 16 frames each."""

    model_name: str = setting("tiny", "tiny = the built-in model, or a folder inside wan_folder")
    batch_size: int = setting(50, "videos made at the same time", at_least(1))
    height: int = setting(HEIGHT, f"pixels; the suite's world has {HEIGHT}", at_least(1))
    width: int = setting(WIDTH, f"pixels; the suite's world has {WIDTH}", at_least(1))
    seed: int = setting(0, "seed of scenes and noise; another seed has other scenes", at_least(0))

    parts: tuple[str, ...] = setting(
        ("length", "switch"),
        "what is measured: world = the judge, on the scenes themselves; vae = the VAE, on scenes encoded and decoded; "
        "teacher; length = long videos; switch = prompt switches",
        _some_of(PARTS),
    )
    num_prompts: int = setting(200, "held-out scenes of every part", at_least(2))

    lengths_s: tuple[int, ...] = setting(
        (5, 10, 30, 60, 120, 240), "length: seconds into the video at which its last 5 s are judged", _TIMES
    )
    drift_s: tuple[int, ...] = setting(
        (20, 39), "length: more such times for drift alone, as far as the longest of lengths_s", _TIMES
    )
    long_s: int = setting(120, "length: beyond this second only num_long_prompts videos go on", at_least(WINDOW_S))
    num_long_prompts: int = setting(48, "length: videos that go on to the longest of lengths_s", at_least(2))

    switch_s: int = setting(5, "switch: seconds of the first prompt, up to the end of a block", at_least(WINDOW_S))
    switch_caches: tuple[str, ...] = setting(
        SWITCH_CACHES,
        "switch: what becomes of the cache, each in its turn: recache = what inference does; keep = nothing is "
        "recomputed; clear = the video begins anew, with other noise",
        _some_of(SWITCH_CACHES),
    )

    teacher_ckpt: str | None = setting(None, "teacher: weights of the bidirectional model", path=True)
    teacher_steps: int = setting(50, "teacher: denoising steps", at_least(1))
    teacher_guidance: float = setting(1.0, "teacher: cond + guidance (cond - uncond)", at_least(0))
    teacher_stochastic: bool = setting(True, "teacher: draw noise anew in every step; false = the deterministic path")
    teacher_timestep_shift: float = setting(10.0, "teacher: schedule of its steps, as in its training", POSITIVE)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.height, self.width) != (HEIGHT, WIDTH):
            raise InputError(
                f"height={self.height} width={self.width}: the suite's world is {HEIGHT}x{WIDTH} px, and no other size"
            )
        if "teacher" in self.parts and self.teacher_ckpt is None:
            raise InputError("parts=teacher: needs the teacher's weights, teacher_ckpt=FILE")

    @property
    def times_s(self) -> tuple[int, ...]:
        """When videos are judged: the first window, against which drift is measured, and all that is asked for."""
        drift_s = [time for time in self.drift_s if time < self.lengths_s[-1]]
        return tuple(sorted({WINDOW_S, *self.lengths_s, *drift_s}))


def teacher_clips(config: EvaluateConfig, seed: int, num_frames: int) -> ClipsConfig:
    """What the clips command would be told to make the teacher's samples, of `num_frames` latent frames."""
    shared = ("model_name", "wan_folder", "vae_ckpt", "height", "width", "device", "attention", "low_memory")
    return replace(
        ClipsConfig(),
        **{key: getattr(config, key) for key in shared},
        real_name=config.model_name,
        real_ckpt=config.teacher_ckpt,
        num_training_frames=num_frames,
        seed=seed,
        guidance_scale=config.teacher_guidance,
        num_steps=config.teacher_steps,
        timestep_shift=config.teacher_timestep_shift,
        stochastic=config.teacher_stochastic,
    )
