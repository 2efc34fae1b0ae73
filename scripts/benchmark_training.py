"""Time a cycle of distribution matching on random weights and print one JSON line.

    python scripts/benchmark_training.py [key=value ...] [--cycles 1]
    torchrun --nproc-per-node 4 scripts/benchmark_training.py [key=value ...]

A cycle is one generator update and five critic updates (dfake_gen_update_ratio). By default, at full size: generator
and critic of 1.3B with LoRA of rank 256, a teacher of 14B, 480×832, clips of 21 latent frames, exit at the last step;
any key of the training configuration can be given. Prompts are random embeddings: no text encoder takes part.

Times are medians over the measured cycles, in seconds per cycle; "parts" come from the trainer's own clock. Memory is
the peak of one process during the measured cycles.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from longlive.build import choose_device
from longlive.config import load_config
from longlive.models.dit import PRESETS, DiTConfig, WanDiT
from longlive.models.text_encoder import TextEncoder, TextEncoderConfig, byte_tokens
from longlive.models.vae import VAEConfig, WanVAE
from longlive.train import run_identity
from longlive.train_build import make_trainer
from longlive.train_config import TrainConfig, translate_published
from longlive.train_inputs import Inputs
from longlive.training.checkpoint import Checkpoints
from longlive.training.networks import Weights
from longlive.training.parallel import process_group
from longlive.training.trainer import Trainer

FULL_SIZE = [
    "adapter.type=lora",
    "last_step_only=true",
    "max_iters=1000000",
    "lr=1e-5",
    "lr_critic=2e-6",
]


class RandomWeights(Mapping[str, Tensor]):
    """Weights made on the device as they are asked for: no 14B state dict is ever in memory."""

    def __init__(self, config: DiTConfig, device: torch.device) -> None:
        with torch.device("meta"):
            self.shapes = {name: p.shape for name, p in WanDiT(config).named_parameters()}
        self.device = device

    def __getitem__(self, name: str) -> Tensor:
        values = torch.randn(self.shapes[name], device=self.device) * 0.02
        return values + 1 if "norm" in name and name.endswith("weight") else values

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def random_inputs(args: argparse.Namespace, device: torch.device) -> Inputs:
    student, teacher = PRESETS[args.preset], PRESETS[args.teacher]
    weights = [Weights(config, RandomWeights(config, device), "random") for config in (student, student, teacher)]
    torch.manual_seed(0)
    with device:
        vae = WanVAE(VAEConfig(base_dim=8) if args.preset == "tiny" else VAEConfig())
    return Inputs(
        generator=weights[0],
        critic=weights[1],
        teacher=weights[2],
        lora=None,
        critic_lora=None,
        vae=vae,
        encoder=TextEncoder(TextEncoderConfig.tiny(), byte_tokens),
        prompts=[(f"prompt {i}", f"prompt {i} goes on") for i in range(64)],
        clips=None,
    )


def random_embeddings(config: DiTConfig, device: torch.device) -> Callable[[Sequence[str]], Tensor]:
    def encode(prompts: Sequence[str]) -> Tensor:
        return torch.randn(len(prompts), config.text_len, config.text_dim, device=device, dtype=torch.bfloat16)

    return encode


def measure(trainer: Trainer, num_cycles: int, critic_steps: int, device: torch.device) -> dict[str, object]:
    """Run one step of generator and critic to warm up, then the measured cycles."""
    times: list[float] = []
    parts: dict[str, list[float]] = {}
    for num_steps in [1, *[critic_steps] * num_cycles]:
        trainer.progress.step = -(-trainer.progress.step // critic_steps) * critic_steps  # a generator's turn
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        spent: dict[str, float] = {}
        for _ in range(num_steps):
            values = trainer.read(trainer.step())
            trainer.progress.step += 1
            for name, value in values.items():
                if name.startswith("time/"):
                    spent[name[5:]] = spent.get(name[5:], 0.0) + value
        times.append(time.perf_counter() - start)
        for name, value in spent.items():
            parts.setdefault(name, []).append(value)
    figures: dict[str, object] = {
        "first_step_s": round(times[0], 2),
        "cycle_s": round(statistics.median(times[1:] or times), 2),
        "parts": {name: round(statistics.median(values[1:] or values), 2) for name, values in parts.items()},
        "critic_loss": values["critic/loss"],
    }
    if device.type == "cuda":
        figures["peak_memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        figures["reserved_memory_gb"] = round(torch.cuda.max_memory_reserved() / 1e9, 2)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="1.3B", help="generator and critic")
    parser.add_argument("--teacher", choices=PRESETS, default="14B")
    parser.add_argument("--cycles", type=int, default=1, help="measured cycles; 0 = only the step to warm up")
    parser.add_argument(
        "--checkpoint", type=Path, help="folder: resume from its checkpoint if it has one, and save one"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    config, _ = load_config(TrainConfig, os.devnull, [*FULL_SIZE, *args.overrides], translate_published)
    device = choose_device(config.device)
    with process_group(device) as group, tempfile.TemporaryDirectory() as scratch:
        inputs = random_inputs(args, device)
        encode_prompts = random_embeddings(inputs.generator.config, device)
        folder = args.checkpoint or Path(scratch)
        checkpoints = Checkpoints(folder, 1, run_identity(config, inputs))
        trainer = make_trainer(config, inputs, encode_prompts, group, checkpoints)
        latest = checkpoints.latest()
        if latest is not None:
            trainer.resume(latest)
        figures = measure(trainer, args.cycles, config.dfake_gen_update_ratio, device)
        if args.checkpoint:
            start = time.perf_counter()
            trainer.save()
            figures["save_blocks_s"] = round(time.perf_counter() - start, 2)
            checkpoints.wait()
            figures["save_s"] = round(time.perf_counter() - start, 2)
        if group.is_main:
            num_samples = group.world_size * config.batch_size * config.num_rounds(group.world_size)
            clips = config.dfake_gen_update_ratio * num_samples
            settings = {
                "preset": args.preset,
                "teacher": args.teacher,
                "overrides": args.overrides,
                "world_size": group.world_size,
                "torch": torch.__version__,
                "resumed_at": None if latest is None else latest.name,
                "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
            }
            cycle_s = figures["cycle_s"]
            assert isinstance(cycle_s, float)
            print(json.dumps({**settings, **figures, "critic_clips_per_second": round(clips / cycle_s, 4)}))


if __name__ == "__main__":
    main()
