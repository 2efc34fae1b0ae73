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
from longlive.models.vae import VAEConfig, WanVAE
from longlive.rollout import Rollout, Sampler, SamplerConfig
from longlive.training.dmd import DMD, DMDConfig, Noised
from longlive.training.streaming import ChunkNoise, StreamingSequence, make_clip

pytestmark = pytest.mark.golden


def trainable(case: Case, model: dict[str, Any], weights: str) -> WanDiT:
    dit = WanDiT(dit_config(model))
    dit.load_state_dict(case.weights(weights))
    return dit


def gradients(case: Case, prefix: str, module: nn.Module, names: list[str] | None = None) -> dict[str, Tensor]:
    """The gradients of a module under the names of the outputs: `<prefix>grad.<parameter>`, `<prefix>grad_norms`.

    names: the order of the norms, by default the case's `param_names`.
    """
    parameters = dict(module.named_parameters())
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in parameters.items()}
    norms = torch.stack([found[name].norm() for name in names or case.spec["param_names"]])
    return {f"{prefix}grad.{name}": gradient for name, gradient in found.items()} | {f"{prefix}grad_norms": norms}


def make_rollout(case: Case, settings: dict[str, Any], capacity_frames: int) -> Rollout:
    sampler = SamplerConfig(
        steps=tuple(settings["denoising_step_list"]),
        warp=settings.get("warp_denoising_step", True),
        shift=settings["timestep_shift"],
        context_timestep=float(settings.get("context_noise", 0)),
        frames_per_block=settings["num_frame_per_block"],
    )
    dit = trainable(case, settings["model"], "causal")
    cache_config = CacheConfig(
        settings["window"],
        settings["sink"],
        published_sink_fill=settings["sink"] > settings["num_frame_per_block"],
    )
    cache = dit.new_cache(cache_config, 1, *settings["latent"], capacity_frames)
    return Rollout(dit, Sampler(sampler), cache, "published_training")


@torch.no_grad()
def scores(
    dmd: DMD, critic: WanDiT, teacher: WanDiT, noised: Noised, text: Tensor, negative: Tensor
) -> tuple[Tensor, Tensor]:
    fake = dmd.guided_x0(critic, noised, text, negative, dmd.config.fake_guidance)
    return fake, dmd.guided_x0(teacher, noised, text, negative, dmd.config.guidance)


def chunk_noise(case: Case, first: int, length: int, exit_steps: list[int]) -> ChunkNoise:
    """The stored random numbers of frames [first, first + length)."""
    span = slice(first, first + length)
    renoise = [noise[:, span] for noise in case.input("renoise")]
    return ChunkNoise(case.input("noise")[:, span], renoise, case.input("context_noise_eps")[:, span], exit_steps)


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
    exit_steps = [flags[0]] * (frames // num) if settings["same"] else flags
    sequence = StreamingSequence(rollout, [case.input("prompt0")])
    latents = sequence.generate(chunk_noise(case, 0, frames, exit_steps), frames - settings["slice_last"])
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
    prompts = [case.input("prompt0"), case.input("prompt1")]
    sequence = StreamingSequence(rollout, prompts[: 1 if switch is None else 2], switch)
    found: dict[str, Tensor] = {}
    for chunk, ((first, length), exit_step) in enumerate(
        zip(settings["chunks"], settings["exit_step_per_chunk"], strict=True)
    ):
        rollout.model.zero_grad()
        latents = sequence.generate(chunk_noise(case, first, length, [exit_step] * (length // num)))
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
    """Chunks in turn for the generator (G) and the critic (C), with the losses on the clips made of them."""
    case = Case(folder)
    settings = case.config
    num, size = settings["num_frame_per_block"], settings["streaming_chunk_size"]
    rollout = make_rollout(case, settings, settings["kv_cache_frames"])
    teacher = trainable(case, settings["score_model"], "real_score").requires_grad_(False)
    critic = trainable(case, settings["score_model"], "fake_score")
    vae = WanVAE(VAEConfig(base_dim=settings["vae_dim"]))
    vae.load_state_dict(case.weights("vae"))
    dmd = DMD(DMDConfig(guidance=settings["guidance_scale"], shift=settings["timestep_shift"]))
    prompts = [case.input("prompt0"), case.input("prompt1")]
    sequence = StreamingSequence(rollout, prompts, settings["switch_frame_index"])
    found: dict[str, Tensor] = {}
    previous = None
    for chunk, (role, exit_step, timestep, told) in enumerate(
        zip(
            settings["plan"],
            settings["exit_step_per_chunk"],
            settings["raw_timestep_per_chunk"],
            settings["infos"],
            strict=True,
        )
    ):
        length, trained = told["new_frames_generated"], rollout.model if role == "G" else critic
        trained.zero_grad()
        noise = chunk_noise(case, sequence.num_frames, length, [exit_step] * (length // num))
        new = sequence.generate(noise, 0 if role == "G" else None)
        clip = make_clip(vae, previous, new, size)
        frames = new if previous is None else torch.cat([previous, new], dim=1)
        previous = frames[:, -size:].detach()
        samples = clip.latents if role == "G" else clip.latents.detach()
        noised = dmd.noised(samples.detach(), torch.tensor([[timestep]]), case.input("score_noise"))
        if role == "G":
            fake, real = scores(dmd, critic, teacher, noised, sequence.prompt, case.input("uncond"))
            loss, _ = dmd.generator_loss(samples, fake, real, clip.num_new)
        else:
            loss = dmd.critic_loss(samples, noised, critic, sequence.prompt, clip.num_new)
        loss.backward()
        assert sequence.num_frames == told["current_length"]
        found |= {
            f"chunk{chunk}.chunk": clip.latents,
            f"chunk{chunk}.previous_frames_first": previous[:, :1],
            f"chunk{chunk}.mask_frames": (torch.arange(size) >= size - clip.num_new).long(),
            f"chunk{chunk}.loss": loss,
        }
        names = case.spec["param_names_generator" if role == "G" else "param_names_critic"]
        found |= gradients(case, f"chunk{chunk}.", trained, names)
    case.check_all("", found)


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
    num_new = None if settings["mask"] is None else samples.shape[1] - settings["mask"]
    noised = dmd.noised(samples.detach(), raw, case.input("score_noise")[:batch])
    loss, gradient_norm = dmd.generator_loss(samples, *scores(dmd, critic, teacher, noised, text, negative), num_new)
    loss.backward()
    found = {
        "generator_loss": loss,
        "dmdtrain_gradient_norm": gradient_norm,
        "timestep": noised.timesteps[:, :1],
        "grad_latents": samples.grad,
    }
    for kind, critic_num_new in (("critic", None), ("streaming_critic", num_new)):
        critic.zero_grad()
        loss = dmd.critic_loss(samples.detach(), noised, critic, text, critic_num_new)
        loss.backward()
        found |= {f"{kind}_loss": loss} | gradients(case, f"{kind}_", critic)
    case.check_all(f"{name}.", found)
