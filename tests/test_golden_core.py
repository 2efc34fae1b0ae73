"""Golden cases 01-06: schedule, bidirectional model, cached calls, rollouts, prompt switches."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden_fixture import FOLDER, KINDS, Case, cases, kind_of, variants
from torch import Tensor

from longlive.flow import FlowSchedule, add_noise, flow_to_x0, x0_to_flow
from longlive.models.dit import DiTConfig, WanDiT
from longlive.models.kv_cache import CacheConfig, KVCache
from longlive.models.rope import apply_rope, rope_table
from longlive.rollout import Rollout, Sampler, SamplerConfig

pytestmark = pytest.mark.golden


def dit_config(model: dict[str, Any]) -> DiTConfig:
    same = ("dim", "ffn_dim", "num_heads", "num_layers", "freq_dim", "text_dim", "text_len", "eps")
    return DiTConfig(
        in_channels=model["in_dim"],
        out_channels=model["out_dim"],
        patch_size=tuple(model["patch_size"]),
        **{key: model[key] for key in same},
    )


def load_dit(case: Case, model: dict[str, Any], weights: str) -> WanDiT:
    dit = WanDiT(dit_config(model))
    dit.load_state_dict(case.weights(weights))
    return dit.eval().requires_grad_(False)


def cache_config(settings: dict[str, Any]) -> CacheConfig:
    return CacheConfig(
        window_frames=settings["window"],
        sink_frames=settings["sink"],
        relative=settings.get("infinity", False),
        published_sink_fill=settings["sink"] > settings["nf"],
    )


def test_every_case_is_checked() -> None:
    if "LONGLIVE_GOLDEN" not in os.environ and not FOLDER.exists():
        pytest.skip(f"no golden fixtures in {FOLDER}")
    folders = [path for path in sorted(FOLDER.glob("*")) if kind_of(path) or (path / "case.json").exists()]
    assert folders, f"no case folders in {FOLDER}"
    unknown = [path.name for path in folders if kind_of(path) not in KINDS]
    assert not unknown, f"no test knows the case folders {unknown}; known are {', '.join(KINDS)}"
    for case in map(Case, folders):
        names = case.config.get("variants")
        stray = [output for output in case.outputs if names and output.split(".")[0] not in names]
        assert not stray, f"{case.path.name}: outputs of no variant: {stray}"


@pytest.mark.parametrize("folder", cases("01"))
def test_scheduler(folder: Path) -> None:
    case = Case(folder)
    x0, noise, flow, timesteps = (case.input(name) for name in ("x0", "noise", "flow", "timesteps"))
    raw = case.input("raw_timesteps")
    found: dict[str, Tensor] = {}
    for shift in case.config["shifts"]:
        schedule = FlowSchedule(shift)
        sigma = schedule.sigma_at(timesteps)[:, None, None, None]
        xt = add_noise(x0, noise, sigma)
        tables = {
            "sigmas": schedule.sigmas,
            "timesteps": schedule.timesteps,
            "linear_timesteps_weights": schedule.training_weights(),
            "add_noise": xt,
            "flow_to_x0": flow_to_x0(flow, xt, sigma),
            "x0_to_flow": x0_to_flow(x0, xt, sigma),
            "warped_steps": schedule.warp_steps(case.config["denoising_step_list"]),
            "nearest_index": schedule.nearest_index(timesteps),
            "shifted_clamped": schedule.shift_timesteps(raw, case.config["min_step"], case.config["max_step"]),
        }
        found |= {f"shift{shift:g}_{name}": table for name, table in tables.items()}
    case.check_all("", found)


@pytest.mark.parametrize("folder", cases("02"))
def test_bidirectional(folder: Path) -> None:
    case = Case(folder)
    specs = {name: spec for name, spec in case.config.items() if isinstance(spec, dict) and "weights" in spec}
    dits = {name: load_dit(case, spec, spec["weights"].removeprefix("models/")) for name, spec in specs.items()}
    schedule = FlowSchedule(case.config["x0_shift"])
    for name in case.outputs:
        match = re.fullmatch(r"(.+)_t(\d+)_b(\d+)_(flow|x0)", name)
        assert match is not None, name
        batch = int(match[3])
        timesteps = torch.stack([case.input("timesteps")[int(match[2])], torch.tensor(250.0)])[:batch]
        x = case.input("x")[:batch]
        flow = dits[match[1]](x, timesteps, case.input("prompt_embeds")[:batch])
        sigma = schedule.sigma_at(timesteps)[:, None, None, None, None]
        case.check(name, flow if match[4] == "flow" else flow_to_x0(flow, x, sigma))


def storage_order(cache: KVCache, num_frames: int) -> Tensor:
    """Token indices of the cache in the order sink, then oldest to newest frame."""
    window, sink = cache.config.window_frames, cache.config.sink_frames
    window = num_frames if window == -1 else window
    newest = range(max(sink, num_frames - (window - sink)), num_frames)
    frames = torch.tensor([*range(min(sink, num_frames)), *newest])
    return cache._tokens(cache._slots(frames))


def published_buffer(cache: KVCache, layer: int, num_frames: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """k, v [B, window tokens, H, D] as the published code stores them: in storage order, with relative positions
    unrotated, empty slots zero. grid: token height and width of a frame."""
    window, past = cache.config.window_frames, cache.layers[layer]
    order = storage_order(cache, num_frames)
    k, v = past.k[:, :, order], past.v[:, :, order]
    if cache.config.relative:  # undo our rotation, which is by the position in the window
        shift = 0 if window == -1 else max(0, num_frames - window)
        frames = torch.arange(order.numel() // cache.frame_tokens) + shift
        cos, sin = rope_table(frames, *grid, k.shape[-1])
        k = apply_rope(k, torch.stack([cos, -sin]))
    empty = (num_frames if window == -1 else window) * cache.frame_tokens - order.numel()
    k, v = (F.pad(tensor, (0, 0, 0, empty)).transpose(1, 2) for tensor in (k, v))
    return k, v


def token_grid(case: Case) -> tuple[int, int]:
    (height, width), (_, p, q) = case.config["latent"], case.config["model"]["patch_size"]
    return height // p, width // q


@pytest.mark.parametrize(("folder", "name"), [*variants("03"), *variants("04")])
@torch.no_grad()
def test_causal_kv(folder: Path, name: str) -> None:
    case = Case(folder)
    settings = case.settings(name)
    num, batch, num_blocks = settings["nf"], settings["B"], settings["nblocks"]
    dit = load_dit(case, settings["model"], "causal")
    cache = dit.new_cache(cache_config(settings), batch, *settings["latent"])
    noise, renoise = case.input("noise"), case.input("renoise")
    calls = {
        "pass0": (1000, [noise, renoise[2]]),
        "pass1": (625, [renoise[0], renoise[1]]),
        "clean": (0, [renoise[1], noise]),
    }
    text = dit.project_text(torch.cat([case.input("prompt0"), case.input("prompt1")][:batch]))
    schedule = FlowSchedule(settings["timestep_shift"])
    flows: dict[str, list[Tensor]] = {key: [] for key in calls}
    found: dict[str, Tensor] = {}
    for block in range(num_blocks):
        span = slice(block * num, (block + 1) * num)
        first, later = cache.plan_block(block * num, num)
        for key, (timestep, inputs) in calls.items():
            x = torch.cat(inputs[:batch])[:, span]
            timesteps = torch.full((batch, num), float(timestep))
            flow = dit(x, timesteps, text, cache=cache, plan=first if key == "pass0" else later)
            flows[key].append(flow)
            sigma = schedule.sigma_at(timesteps)[..., None, None, None]
            found[f"{key}_x0_last_block"] = flow_to_x0(flow, x, sigma)
    total, window = num_blocks * num, settings["window"]
    found |= {f"{key}_flow": torch.cat(value, dim=1) for key, value in flows.items()}
    for layer in range(dit.config.num_layers):
        found[f"kv{layer}_k"], found[f"kv{layer}_v"] = published_buffer(cache, layer, total, token_grid(case))
        found[f"crossattn_k{layer}"] = text[layer][0].transpose(1, 2)
    tokens = cache.frame_tokens
    found["kv_global_end"] = torch.tensor([total * tokens])
    found["kv_local_end"] = torch.tensor([(total if window == -1 else min(total, window)) * tokens])
    case.check_all(f"{name}.", found)


def make_rollout(case: Case, settings: dict[str, Any], policy: str) -> Rollout:
    dit = load_dit(case, settings["model"], "causal")
    sampler = Sampler(
        SamplerConfig(
            steps=tuple(settings["denoising_step_list"]),
            warp=settings["warp_denoising_step"],
            shift=settings["timestep_shift"],
            context_timestep=float(settings["context_noise"]),
            frames_per_block=settings["nf"],
        )
    )
    cache = dit.new_cache(cache_config(settings), settings["B"], *settings["latent"])
    return Rollout(dit, sampler, cache, policy)


def num_rollout_frames(settings: dict[str, Any]) -> int:
    """Length of a rollout: 30 frames, rounded up to whole blocks, where the variant does not say."""
    num = settings["nf"]
    return settings.get("F", -(-30 // num) * num)


@pytest.mark.parametrize(("folder", "name"), variants("05"))
def test_rollout(folder: Path, name: str) -> None:
    case = Case(folder)
    settings = case.settings(name)
    batch, num = settings["B"], settings["nf"]
    renoise = case.input("renoise")
    noise = torch.cat([case.input("noise"), renoise[1]][:batch])
    fresh = torch.stack([renoise, torch.stack([renoise[2], case.input("noise"), renoise[0]])])[:batch]
    rollout = make_rollout(case, settings, "keep")
    rollout.set_text(rollout.model.project_text(torch.cat([case.input("prompt0"), case.input("prompt1")][:batch])))
    blocks = []
    for start in range(0, num_rollout_frames(settings), num):
        span = slice(start, start + num)
        blocks.append(rollout.next_block(noise[:, span], lambda step, span=span: fresh[:, step, 0, span]))
    case.check_all(f"{name}.", {"latents": torch.cat(blocks, dim=1)})


@pytest.mark.parametrize(("folder", "name"), variants("06"))
def test_interactive(folder: Path, name: str) -> None:
    case = Case(folder)
    settings = case.settings(name)
    noise, renoise = case.input("noise"), case.input("renoise")
    num, switches = settings["nf"], list(settings["switch_frame_indices"])
    rollout = make_rollout(case, settings, "keep" if settings["global_sink"] else "rewrite")
    prompts = [rollout.model.project_text(case.input(f"prompt{index}")) for index in range(len(switches) + 1)]
    rollout.set_text(prompts.pop(0))
    num_frames = num_rollout_frames(settings)
    blocks = []
    for start in range(0, num_frames, num):
        span = slice(start, start + num)
        while switches and start >= switches[0]:
            switches.pop(0)
            rollout.set_text(prompts.pop(0))
        blocks.append(rollout.next_block(noise[:, span], lambda step, span=span: renoise[step][:, span]))
    found = {"latents": torch.cat(blocks, dim=1)}
    first_block = f"{name}.final_kv0_k_first_block"
    if first_block in case.outputs:
        k, _ = published_buffer(rollout.cache, 0, num_frames, token_grid(case))
        found["final_kv0_k_first_block"] = k[:, : case.expected(first_block).shape[1]]
    case.check_all(f"{name}.", found)
