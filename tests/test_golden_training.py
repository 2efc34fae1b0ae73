"""Golden cases 07-09: training rollout, streaming chunks, DMD losses; gradients with a cache that passes none."""

import re
from typing import Any

import pytest
import torch
from golden_fixture import Case, load_case, variants
from test_golden_core import dit_config
from torch import Tensor, nn

from longlive.models.dit import WanDiT
from longlive.models.kv_cache import CacheConfig
from longlive.rollout import BlockTraining, Rollout, Sampler, SamplerConfig
from longlive.training.dmd import DMD, DMDConfig

pytestmark = pytest.mark.golden


def trainable(case: Case, model: dict[str, Any], weights: str) -> WanDiT:
    dit = WanDiT(dit_config(model))
    dit.load_state_dict(case.weights(weights))
    return dit


def check_gradients(case: Case, prefix: str, module: nn.Module) -> None:
    """Compare with `<prefix>grad_norms` and every stored `<prefix>grad.<parameter>`; where the case stores both kinds,
    with those of a detached cache."""
    parameters = dict(module.named_parameters())
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in parameters.items()}
    for kind in ("grad", "detached_grad"):
        names = [name for name in case.outputs if name.startswith((f"{prefix}{kind}.", f"{prefix}{kind}_norms"))]
        detached = [name for name in case.outputs if name.startswith(f"{prefix}detached_{kind}")]
        if not names or detached:
            continue
        for name in names:
            if name.endswith("_norms"):
                case.check(name, torch.stack([gradient.norm() for gradient in gradients.values()]))
            else:
                case.check(name, gradients[name.removeprefix(f"{prefix}{kind}.")])


def make_rollout(case: Case, variant: dict[str, Any], capacity_frames: int) -> Rollout:
    config = case.config
    sampler = SamplerConfig(
        steps=tuple(config["denoising_step_list"]),
        warp=config["warp_denoising_step"],
        shift=config["timestep_shift"],
        context_timestep=float(config["context_noise"]),
        frames_per_block=config["num_frame_per_block"],
    )
    dit = trainable(case, config["model"], "causal")
    cache_config = CacheConfig(variant["window"], variant["sink"])
    cache = dit.new_cache(cache_config, 1, *config["latent"], capacity_frames)
    return Rollout(dit, Sampler(sampler), cache, "published_training")


@pytest.mark.parametrize("name", variants("07_training_rollout"))
def test_training_rollout(name: str) -> None:
    case = load_case("07_training_rollout")
    variant, frames = case.config["variants"][name], case.config["num_training_frames"]
    num, steps = case.config["num_frame_per_block"], case.config["denoising_step_list"]
    rollout = make_rollout(case, variant, variant["window"] + frames)
    noise, renoise, context = (case.input(key) for key in ("noise", "renoise", "context_noise_eps"))
    prompt = case.input("prompt0")
    with torch.no_grad():
        rollout.set_text(rollout.model.project_text(prompt))
    blocks = []
    for block, start in enumerate(range(0, frames, num)):
        exit_step = variant["flags"][0 if variant["same"] else block]
        span = slice(start, start + num)
        embeds = prompt if start >= frames - variant["slice_last"] else None
        training = BlockTraining(exit_step, embeds, context[:, span])
        blocks.append(rollout.next_block(noise[:, span], lambda i, span=span: renoise[i][:, span], training))
    latents = torch.cat(blocks, dim=1)
    loss = (latents * case.input("R")[:, :frames]).mean()
    loss.backward()
    exits = [*steps, 0]
    first = variant["flags"][0]
    found = {
        "latents": latents,
        "loss": loss,
        "denoised_timestep_from_to": torch.tensor(exits[first : first + 2] if variant["same"] else [-1, -1]),
    }
    check_outputs(case, name, found)
    check_gradients(case, f"{name}.", rollout.model)


@pytest.mark.parametrize("name", variants("08_streaming"))
def test_streaming(name: str) -> None:
    case = load_case("08_streaming")
    config, switch = case.config, case.config["variants"][name]["switch"]
    num = config["num_frame_per_block"]
    rollout = make_rollout(case, config, config["kv_cache_frames"])
    noise, renoise, context = (case.input(key) for key in ("noise", "renoise", "context_noise_eps"))
    prompt = case.input("prompt0")
    rollout.set_text(rollout.model.project_text(prompt))
    for chunk, ((first, length), exit_step) in enumerate(
        zip(config["chunks"], config["exit_step_per_chunk"], strict=True)
    ):
        rollout.model.zero_grad()
        blocks, switches_here = [], switch is not None and first <= switch < first + length
        for start in range(first, first + length, num):
            span = slice(start, start + num)
            if switch is not None and start - num < switch <= start:
                prompt = case.input("prompt1")
                rollout.set_text(rollout.model.project_text(prompt))
            has_gradient = not switches_here or start >= switch
            training = BlockTraining(exit_step, prompt if has_gradient else None, context[:, span])
            blocks.append(rollout.next_block(noise[:, span], lambda i, span=span: renoise[i][:, span], training))
        latents = torch.cat(blocks, dim=1)
        loss = (latents * case.input("R")[:, first : first + length]).mean()
        loss.backward()
        prefix = f"{name}.chunk{chunk}"
        if any(output.startswith(f"{prefix}.") for output in case.outputs):
            check_outputs(case, prefix, {"latents": latents, "loss": loss})
            check_gradients(case, f"{prefix}.", rollout.model)
    cache, total, held = rollout.cache, first + length, config["kv_cache_frames"]
    first_frames = torch.arange(config["sink"]) if config["sink"] else torch.tensor([max(0, total - held)])
    slots = cache._tokens(cache._slots(first_frames))
    found = {
        "final_kv0_k_sink": cache.layers[0].k[:, :, slots].transpose(1, 2),
        "kv_end": torch.tensor([total, min(total, held)]) * cache.frame_tokens,
    }
    for what, actual in found.items():
        if f"{name}.{what}" in case.outputs:
            case.check(f"{name}.{what}", actual)


def check_outputs(case: Case, prefix: str, found: dict[str, Tensor]) -> None:
    """Check the outputs `<prefix>.<name>` that are not gradients; `_lastN` means the newest N frames."""
    names = [name for name in case.outputs if name.startswith(f"{prefix}.") and "grad" not in name]
    assert names
    for name in names:
        what = name.removeprefix(f"{prefix}.")
        base = re.sub(r"_last\d+$", "", what)
        case.check(name, found[what] if what in found else found[base][:, -case.expected(name).shape[1] :])


@pytest.mark.parametrize("name", variants("09_dmd"))
def test_dmd(name: str) -> None:
    case = load_case("09_dmd")
    config, variant = case.config, case.config["variants"][name]
    dmd = DMD(
        DMDConfig(
            guidance=variant.get("real_guidance_scale", config["guidance_scale"]),
            fake_guidance=variant.get("fake_guidance_scale", 0.0),
            shift=config["timestep_shift"],
            score_shift=config["score_x0_shift"],
            min_timestep=config["min_step"],
            max_timestep=config["max_step"],
        )
    )
    teacher = trainable(case, config["score_model"], "real_score").requires_grad_(False)
    critic = trainable(case, config["score_model"], "fake_score")
    samples = case.input("latents").requires_grad_()
    batch, frames = samples.shape[:2]
    prompts = [case.input("prompt0")] + ([case.input("prompt1")] if batch > 1 else [])
    text, negative = torch.cat(prompts), case.input("uncond").expand(batch, -1, -1)
    raw = torch.as_tensor(variant["t"]).reshape(-1, 1).expand(batch, 1)
    mask = None
    if variant["mask"] is not None:
        mask = (torch.arange(frames) >= variant["mask"])[:, None, None, None]
    noised = dmd.noised(samples.detach(), raw, case.input("score_noise")[:batch])
    loss, gradient_norm = dmd.generator_loss(samples, noised, teacher, critic, text, negative, mask)
    loss.backward()
    case.check(f"{name}.generator_loss", loss)
    case.check(f"{name}.dmdtrain_gradient_norm", gradient_norm)
    case.check(f"{name}.timestep", noised.timesteps[:, :1])
    case.check(f"{name}.grad_latents", samples.grad)
    for kind, critic_mask in (("critic", None), ("streaming_critic", mask)):
        if f"{name}.{kind}_loss" not in case.outputs:
            continue
        critic.zero_grad()
        loss = dmd.critic_loss(samples.detach(), noised, critic, text, critic_mask)
        loss.backward()
        case.check(f"{name}.{kind}_loss", loss)
        check_gradients(case, f"{name}.{kind}_", critic)
