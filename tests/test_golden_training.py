"""Golden cases 07-09: training rollout, streaming chunks, DMD losses; gradients with a cache that passes none."""

from pathlib import Path
from typing import Any

import pytest
import torch
from golden_fixture import Case, cases, variants
from test_golden_core import dit_config
from torch import Tensor, nn

from longlive.flow import FlowSchedule
from longlive.models.dit import WanDiT
from longlive.models.kv_cache import CacheConfig
from longlive.rollout import BlockTraining, Rollout, Sampler, SamplerConfig
from longlive.training.dmd import DMD, DMDConfig

pytestmark = pytest.mark.golden


def trainable(case: Case, model: dict[str, Any], weights: str) -> WanDiT:
    dit = WanDiT(dit_config(model))
    dit.load_state_dict(case.weights(weights))
    return dit


def gradients(case: Case, prefix: str, module: nn.Module) -> dict[str, Tensor]:
    """The gradients of a module under the names of the outputs: `<prefix>grad.<parameter>`, `<prefix>grad_norms`."""
    parameters = dict(module.named_parameters())
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in parameters.items()}
    norms = torch.stack([found[name].norm() for name in case.spec["param_names"]])
    return {f"{prefix}grad.{name}": gradient for name, gradient in found.items()} | {f"{prefix}grad_norms": norms}


def make_rollout(case: Case, settings: dict[str, Any], capacity_frames: int) -> Rollout:
    sampler = SamplerConfig(
        steps=tuple(settings["denoising_step_list"]),
        warp=settings["warp_denoising_step"],
        shift=settings["timestep_shift"],
        context_timestep=float(settings["context_noise"]),
        frames_per_block=settings["num_frame_per_block"],
    )
    dit = trainable(case, settings["model"], "causal")
    cache_config = CacheConfig(settings["window"], settings["sink"])
    cache = dit.new_cache(cache_config, 1, *settings["latent"], capacity_frames)
    return Rollout(dit, Sampler(sampler), cache, "published_training")


def step_number(sampler: Sampler, step: int) -> int:
    """The denoising step as 1000 - its index in the schedule; 0 after the last."""
    if step == len(sampler.timesteps):
        return 0
    return 1000 - int(FlowSchedule(sampler.config.shift).nearest_index(torch.tensor(sampler.timesteps[step])))


@pytest.mark.parametrize(("folder", "name"), variants("07"))
def test_training_rollout(folder: Path, name: str) -> None:
    case = Case(folder)
    settings = case.settings(name)
    frames, num, flags = settings["num_training_frames"], settings["num_frame_per_block"], settings["flags"]
    rollout = make_rollout(case, settings, settings["window"] + frames)
    noise, renoise, context = (case.input(key) for key in ("noise", "renoise", "context_noise_eps"))
    prompt = case.input("prompt0")
    with torch.no_grad():
        rollout.set_text(rollout.model.project_text(prompt))
    blocks = []
    for block, start in enumerate(range(0, frames, num)):
        exit_step = flags[0 if settings["same"] else block]
        span = slice(start, start + num)
        embeds = prompt if start >= frames - settings["slice_last"] else None
        training = BlockTraining(exit_step, embeds, context[:, span])
        blocks.append(rollout.next_block(noise[:, span], lambda i, span=span: renoise[i][:, span], training))
    latents = torch.cat(blocks, dim=1)
    loss = (latents * case.input("R")[:, :frames]).mean()
    loss.backward()
    exits = [step_number(rollout.sampler, flags[0] + i) for i in range(2)] if settings["same"] else [-1, -1]
    found = {
        "latents": latents,
        "loss": loss,
        "denoised_timestep_from_to": torch.tensor(exits),
    }
    case.check_all(f"{name}.", found | gradients(case, "", rollout.model))


@pytest.mark.parametrize(("folder", "name"), variants("08"))
def test_streaming(folder: Path, name: str) -> None:
    case = Case(folder)
    settings = case.settings(name)
    num, switch, held = settings["num_frame_per_block"], settings["switch"], settings["kv_cache_frames"]
    rollout = make_rollout(case, settings, held)
    noise, renoise, context = (case.input(key) for key in ("noise", "renoise", "context_noise_eps"))
    prompt = case.input("prompt0")
    rollout.set_text(rollout.model.project_text(prompt))
    found: dict[str, Tensor] = {}
    for chunk, ((first, length), exit_step) in enumerate(
        zip(settings["chunks"], settings["exit_step_per_chunk"], strict=True)
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
        found |= {f"chunk{chunk}.latents": latents, f"chunk{chunk}.loss": loss}
        found |= gradients(case, f"chunk{chunk}.", rollout.model)
    cache, total, sink = rollout.cache, first + length, settings["sink"]
    first_frames = torch.arange(sink) if sink else torch.tensor([max(0, total - held)])
    slots = cache._tokens(cache._slots(first_frames))
    found["final_kv0_k_sink"] = cache.layers[0].k[:, :, slots].transpose(1, 2)
    found["kv_end"] = torch.tensor([total, min(total, held)]) * cache.frame_tokens
    case.check_all(f"{name}.", found)


@pytest.mark.parametrize("folder", cases("08b"))
def test_streaming_model(folder: Path) -> None:
    pytest.skip("streaming training is not implemented yet")


@pytest.mark.parametrize(("folder", "name"), variants("09"))
def test_dmd(folder: Path, name: str) -> None:
    case = Case(folder)
    settings = case.settings(name)
    dmd = DMD(
        DMDConfig(
            guidance=settings.get("real_guidance_scale", settings["guidance_scale"]),
            fake_guidance=settings.get("fake_guidance_scale", 0.0),
            shift=settings["timestep_shift"],
            score_shift=settings["score_x0_shift"],
            min_timestep=settings["min_step"],
            max_timestep=settings["max_step"],
        )
    )
    teacher = trainable(case, settings["score_model"], "real_score").requires_grad_(False)
    critic = trainable(case, settings["score_model"], "fake_score")
    batch = len(case.expected(f"{name}.timestep"))
    samples = case.input("latents")[:batch].requires_grad_()
    prompts = [case.input("prompt0")] + ([case.input("prompt1")] if batch > 1 else [])
    text, negative = torch.cat(prompts), case.input("uncond").expand(batch, -1, -1)
    raw = torch.as_tensor(settings["t"]).reshape(-1, 1).expand(batch, 1)
    mask = None
    if settings["mask"] is not None:
        mask = (torch.arange(samples.shape[1]) >= settings["mask"])[:, None, None, None]
    noised = dmd.noised(samples.detach(), raw, case.input("score_noise")[:batch])
    loss, gradient_norm = dmd.generator_loss(samples, noised, teacher, critic, text, negative, mask)
    loss.backward()
    found = {
        "generator_loss": loss,
        "dmdtrain_gradient_norm": gradient_norm,
        "timestep": noised.timesteps[:, :1],
        "grad_latents": samples.grad,
    }
    for kind, critic_mask in (("critic", None), ("streaming_critic", mask)):
        critic.zero_grad()
        loss = dmd.critic_loss(samples.detach(), noised, critic, text, critic_mask)
        loss.backward()
        found |= {f"{kind}_loss": loss} | gradients(case, f"{kind}_", critic)
    case.check_all(f"{name}.", found)
