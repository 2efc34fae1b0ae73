"""Sample videos of a training run, made as at inference: a look at what has been learnt so far.

Layer 4: the one place where training and inference meet, besides the weights.
"""

from collections.abc import Sequence
from pathlib import Path

from longlive.data.prompts import Script, make_script
from longlive.distributed import rank, shard, world_size
from longlive.inference.pipeline import OutputConfig, make_videos, plan_jobs
from longlive.inference.session import Models, SessionConfig
from longlive.models.dit import WanDiT
from longlive.train_config import TrainConfig
from longlive.training.parallel import Group, copy_weights
from longlive.training.trainer import Network


class SampleVideos:
    """Makes videos of a causal generator in `samples/step_000100` of the run's folder; processes share the work."""

    def __init__(
        self,
        config: TrainConfig,
        session: SessionConfig,
        models: Models,
        network: Network,
        lora_scale: float,
        prompts: Sequence[tuple[str, ...]],
        group: Group,
    ) -> None:
        """models: their generator is a plain copy, which gets the weights of `network` for as long as it samples;
        prompts: one for each video, or several that take turns."""
        self.config = config
        self.session = session
        self.models = models
        self.network = network
        self.lora_scale = lora_scale
        self.group = group
        self.scripts = [
            make_script(
                texts,
                num_frames=length,
                frames_per_block=config.num_frame_per_block,
                switch_frames=None,
                fps=config.fps,
            )
            for length in config.vis_video_lengths
            for texts in prompts[: config.vis_num_prompts]
        ]

    def __call__(self, step: int) -> None:
        """Every process calls this at the same step."""
        generator: WanDiT = self.models.generator
        averaged, trained = self.network.averaged, dict(self.network.module.named_parameters())
        copy_weights(generator, averaged if self.config.vis_ema else trained, self.lora_scale)
        self._make(Path(self.config.logdir) / "samples" / f"step_{step:06d}", self.scripts)
        copy_weights(generator, trained, self.lora_scale)
        self.group.barrier()

    def _make(self, folder: Path, scripts: Sequence[Script]) -> None:
        jobs = plan_jobs(scripts, num_samples=1, seed=self.config.seed, by_index=True, identity={"folder": str(folder)})
        output = OutputConfig(folder, fps=self.config.fps, overwrite=True)
        own = shard(jobs, rank(), world_size())
        make_videos(self.models, self.session, output, own, batch_size=1, info={}, progress=False)
