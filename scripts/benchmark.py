"""Time the parts of generation on random weights and print one JSON line.

    python scripts/benchmark.py --preset 1.3B --height 480 --width 832 [--compile] [--blocks 20]

Parts: one transformer pass with a full window, one block (all denoising steps and the clean pass), decoding a block's
latents, recaching at a prompt switch, and the whole of it end to end, decoding included, as video frames per second.
Every figure is the median over the measured blocks, in milliseconds unless named otherwise.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from longlive.build import choose_device, choose_dtype, compile_models
from longlive.inference.session import Models, Session, SessionConfig
from longlive.models.attention import select_attention
from longlive.models.dit import PRESETS, WanDiT
from longlive.models.kv_cache import CacheConfig
from longlive.models.vae import VAEConfig, WanVAE
from longlive.rollout import SamplerConfig, constant_timesteps, recache


def random_models(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Models:
    """Models of full size made on the device; prompts are random embeddings."""
    config = PRESETS[args.preset]
    vae_config = VAEConfig() if args.preset != "tiny" else VAEConfig(base_dim=8)
    with torch.device(device):
        torch.manual_seed(0)
        generator = WanDiT(config, select_attention(args.attention, device, dtype))
        vae = WanVAE(vae_config)
        embeddings = {text: torch.randn(1, config.text_len, config.text_dim) for text in ("first", "second")}
    for module in (generator, vae):
        module.to(device, dtype).eval().requires_grad_(False)
    if device.type == "cuda":
        vae.use_channels_last()
    if args.compile:
        compile_models(generator, vae)
    return Models(generator, vae, lambda prompts: torch.cat([embeddings[prompt] for prompt in prompts]))


def median_ms(function: Callable[[], object], device: torch.device, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return round(1000 * statistics.median(times), 2)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def measure(args: argparse.Namespace, models: Models) -> dict[str, Any]:
    device = models.device
    cache_config = CacheConfig(args.window, args.sink, relative=args.relative)
    sampler = SamplerConfig(frames_per_block=args.frames_per_block)
    session = Session(models, SessionConfig(args.height, args.width, sampler, cache_config), [0])
    session.set_prompt("first")
    for _ in range(args.window // args.frames_per_block + 3):  # fill the window, compile, warm up
        chunk = session.next_chunk()
    rollout = session._rollout
    xt, text, start = chunk.latents, rollout.text, rollout.num_frames
    assert text is not None
    assert rollout.recent is not None
    plan = rollout.cache.plan(start, xt.shape[1])
    timesteps, recent, cache = constant_timesteps(xt, 500.0), rollout.recent, rollout.cache
    stream = session._stream.clone()
    figures: dict[str, Any] = {
        "pass_ms": median_ms(
            lambda: models.generator(xt, timesteps, text, cache=cache, plan=plan), device, args.blocks
        ),
        "decode_ms": median_ms(lambda: models.vae.decode(xt, stream), device, args.blocks),
    }
    noise = torch.randn_like(xt)
    figures["block_ms"] = median_ms(lambda: rollout.next_block(noise, lambda _: noise), device, args.blocks)
    figures["recache_ms"] = median_ms(
        lambda: recache(models.generator, recent, rollout.num_frames, text, cache, "keep"), device, args.blocks
    )
    figures["end_to_end_ms"] = median_ms(session.next_chunk, device, args.blocks)
    video_frames = models.vae.config.temporal_factor * args.frames_per_block
    figures["end_to_end_fps"] = round(1000 * video_frames / figures["end_to_end_ms"], 2)
    if device.type == "cuda":
        figures["peak_memory_gb"] = round(torch.cuda.max_memory_allocated(device) / 1e9, 2)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="1.3B")
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--window", type=int, default=12)
    parser.add_argument("--sink", type=int, default=3)
    parser.add_argument("--frames_per_block", type=int, default=3)
    parser.add_argument("--relative", action="store_true")
    parser.add_argument("--blocks", type=int, default=20, help="measurements of each part")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    device = choose_device(args.device)
    models = random_models(args, device, choose_dtype(args.dtype, device))
    settings = {
        **vars(args),
        "torch": torch.__version__,
        "attention": models.generator.blocks[0].self_attn.attention.__name__,
    }
    if device.type == "cuda":
        settings["gpu"] = torch.cuda.get_device_name(device)
    print(json.dumps({**settings, **measure(args, models)}))


if __name__ == "__main__":
    main()
