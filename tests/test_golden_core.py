"""Golden cases 01-06: schedule, bidirectional model, cached calls, rollouts, prompt switches."""

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden_fixture import Case, load_case, variants
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


def cache_config(variant: dict[str, Any], infinity: bool) -> CacheConfig:
    return CacheConfig(
        window_frames=variant["window"],
        sink_frames=variant["sink"],
        relative=infinity,
        published_sink_fill=variant["sink"] > variant["nf"],
    )


def check_prefixed(case: Case, prefix: str, found: dict[str, Tensor]) -> None:
    """Check every output `<prefix>.<name>` of the case; `_lastN` and `_lastNblocks` mean the newest frames only."""
    names = [name for name in case.outputs if name.startswith(f"{prefix}.")]
    assert names
    for name in names:
        what = name.removeprefix(f"{prefix}.")
        base = re.sub(r"_last\d+(blocks)?$", "", what)
        actual = found[what] if what in found else found[base][:, -case.expected(name).shape[1] :]
        case.check(name, actual)


def test_scheduler() -> None:
    case = load_case("01_scheduler")
    x0, noise, flow, timesteps = (case.input(name) for name in ("x0", "noise", "flow", "timesteps"))
    raw = case.input("raw_timesteps")
    for shift in case.config["shifts"]:
        schedule = FlowSchedule(shift)
        sigma = schedule.sigma_at(timesteps)[:, None, None, None]
        xt = add_noise(x0, noise, sigma)
        found = {
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
        prefix = f"shift{int(shift)}_"
        names = [name for name in case.outputs if name.startswith(prefix)]
        assert len(names) == len(found)
        for name in names:
            case.check(name, found[name.removeprefix(prefix)])


@pytest.mark.parametrize("model", ["full", "score"])
def test_bidirectional(model: str) -> None:
    case = load_case("02_bidirectional")
    spec = case.config[model]
    dit = load_dit(case, spec, spec["weights"].removeprefix("models/"))
    schedule = FlowSchedule(case.config["x0_shift"])
    names = [name for name in case.outputs if name.startswith(f"{model}_t")]
    assert names
    for name in names:
        match = re.fullmatch(rf"{model}_t(\d+)_b(\d+)_(flow|x0)", name)
        assert match is not None, name
        batch = int(match[2])
        timesteps = torch.stack([case.input("timesteps")[int(match[1])], torch.tensor(250.0)])[:batch]
        x = case.input("x")[:batch]
        flow = dit(x, timesteps, case.input("prompt_embeds")[:batch])
        sigma = schedule.sigma_at(timesteps)[:, None, None, None, None]
        case.check(name, flow if match[3] == "flow" else flow_to_x0(flow, x, sigma))


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


@pytest.mark.parametrize("name", variants("03_causal_kv"))
def test_causal_kv(name: str) -> None:
    check_raw_calls("03_causal_kv", name)


@pytest.mark.parametrize("name", variants("04_causal_kv_infinity"))
def test_causal_kv_infinity(name: str) -> None:
    check_raw_calls("04_causal_kv_infinity", name)


@torch.no_grad()
def check_raw_calls(case_name: str, name: str) -> None:
    case = load_case(case_name)
    variant, (height, width) = case.config["variants"][name], case.config["latent"]
    num, batch = variant["nf"], variant["B"]
    dit = load_dit(case, case.config["model"], "causal")
    cache = dit.new_cache(cache_config(variant, case.config["infinity"]), batch, height, width)
    noise, renoise = case.input("noise"), case.input("renoise")
    calls = {
        "pass0": (1000, [noise, renoise[2]]),
        "pass1": (625, [renoise[0], renoise[1]]),
        "clean": (0, [renoise[1], noise]),
    }
    text = dit.project_text(torch.cat([case.input("prompt0"), case.input("prompt1")][:batch]))
    schedule = FlowSchedule(case.config["timestep_shift"])
    flows: dict[str, list[Tensor]] = {key: [] for key in calls}
    found: dict[str, Tensor] = {}
    for block in range(variant["nblocks"]):
        span = slice(block * num, (block + 1) * num)
        first, later = cache.plan_block(block * num, num)
        for key, (timestep, inputs) in calls.items():
            x = torch.cat(inputs[:batch])[:, span]
            timesteps = torch.full((batch, num), float(timestep))
            flow = dit(x, timesteps, text, cache=cache, plan=first if key == "pass0" else later)
            flows[key].append(flow)
            sigma = schedule.sigma_at(timesteps)[..., None, None, None]
            found[f"{key}_x0_last_block"] = flow_to_x0(flow, x, sigma)
    total = variant["nblocks"] * num
    found |= {f"{key}_flow": torch.cat(value, dim=1) for key, value in flows.items()}
    for layer in range(dit.config.num_layers):
        found[f"kv{layer}_k"], found[f"kv{layer}_v"] = published_buffer(cache, layer, total, token_grid(case))
        found[f"crossattn_k{layer}"] = text[layer][0].transpose(1, 2)
    tokens = cache.frame_tokens
    found["kv_global_end"] = torch.tensor([total * tokens])
    found["kv_local_end"] = torch.tensor([min(total, variant["window"]) * tokens])
    check_prefixed(case, name, found)


def make_rollout(case: Case, variant: dict[str, Any], policy: str) -> Rollout:
    dit = load_dit(case, case.config["model"], "causal")
    steps = tuple(case.config["denoising_step_list"])
    sampler = Sampler(
        SamplerConfig(
            steps=steps,
            warp=case.config["warp_denoising_step"],
            shift=case.config["timestep_shift"],
            context_timestep=float(case.config["context_noise"]),
            frames_per_block=variant["nf"],
        )
    )
    config = cache_config(variant, variant["infinity"])
    cache = dit.new_cache(config, variant["B"], *case.config["latent"])
    return Rollout(dit, sampler, cache, policy)


def num_rollout_frames(variant: dict[str, Any]) -> int:
    """Length of a rollout: 30 frames, rounded up to whole blocks, where the variant does not say."""
    num = variant["nf"]
    return variant.get("F", -(-30 // num) * num)


@pytest.mark.parametrize("name", variants("05_rollout"))
def test_rollout(name: str) -> None:
    case = load_case("05_rollout")
    variant = case.config["variants"][name]
    batch, num = variant["B"], variant["nf"]
    renoise = case.input("renoise")
    noise = torch.cat([case.input("noise"), renoise[1]][:batch])
    fresh = torch.stack([renoise, torch.stack([renoise[2], case.input("noise"), renoise[0]])])[:batch]
    rollout = make_rollout(case, variant, "keep")
    rollout.set_text(rollout.model.project_text(torch.cat([case.input("prompt0"), case.input("prompt1")][:batch])))
    num_frames = num_rollout_frames(variant)
    blocks = []
    for start in range(0, num_frames, num):
        span = slice(start, start + num)
        blocks.append(rollout.next_block(noise[:, span], lambda step, span=span: fresh[:, step, 0, span]))
    check_prefixed(case, name, {"latents": torch.cat(blocks, dim=1)})


@pytest.mark.parametrize("name", variants("06_interactive"))
def test_interactive(name: str) -> None:
    case = load_case("06_interactive")
    variant = case.config["variants"][name]
    noise, renoise = case.input("noise"), case.input("renoise")
    num, switches = variant["nf"], list(variant["switch_frame_indices"])
    rollout = make_rollout(case, variant, "keep" if variant["global_sink"] else "rewrite")
    prompts = [rollout.model.project_text(case.input(f"prompt{index}")) for index in range(len(switches) + 1)]
    rollout.set_text(prompts.pop(0))
    num_frames = num_rollout_frames(variant)
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
    check_prefixed(case, name, found)
