"""Golden case 12: base, trainer and LoRA files give the models they describe."""

import pytest
import torch
from golden_fixture import Case, load_case
from test_golden_core import cache_config, dit_config
from torch import Tensor

from longlive.models.dit import WanDiT
from longlive.weights.files import StateDict, load_into, read_checkpoint
from longlive.weights.formats import select_network
from longlive.weights.lora import attach_lora, merge_lora, read_lora

pytestmark = pytest.mark.golden


def model_with(case: Case, state: StateDict) -> WanDiT:
    model = WanDiT(dit_config(case.config["model"]))
    load_into(model, state, "fixture")
    return model.eval().requires_grad_(False)


def network(case: Case, file: str, name: str = "generator") -> StateDict:
    path = case.path / file
    return select_network(read_checkpoint(path), path, name)


def cached_forward(case: Case, model: WanDiT) -> Tensor:
    """Per block a noisy pass, then a clean one, one block past the window; the clean flow of the last two blocks."""
    window, num = case.config["window"], case.config["nf"]
    cache = model.new_cache(cache_config(case.config, infinity=False), 1, *case.config["latent"])
    text = case.input("prompt0")
    flows = []
    for start in range(0, (window // num + 1) * num, num):
        (first, later), span = cache.plan_block(start, num), slice(start, start + num)
        model(case.input("noise")[:, span], torch.tensor([937.5]), text, cache=cache, plan=first)
        flows.append(model(case.input("renoise")[0][:, span], torch.zeros(1), text, cache=cache, plan=later))
    return torch.cat(flows[-2:], dim=1)


def score_forward(case: Case, model: WanDiT) -> Tensor:
    return model(case.input("noise")[:, : case.config["nf"]], torch.tensor([500.0]), case.input("prompt0"))


def test_base() -> None:
    case = load_case("12_checkpoints")
    case.check("base", cached_forward(case, model_with(case, network(case, "ode_init.pt"))))


def test_ema() -> None:
    case = load_case("12_checkpoints")
    state = network(case, "trainer_model.pt", "generator_ema")
    case.check("ema", cached_forward(case, model_with(case, state)))


def test_critic() -> None:
    case = load_case("12_checkpoints")
    case.check("critic", score_forward(case, model_with(case, network(case, "trainer_model.pt", "critic"))))


@pytest.mark.parametrize("merged", [True, False], ids=["merged", "attached"])
def test_lora(merged: bool) -> None:
    case = load_case("12_checkpoints")
    rank, alpha = case.config["lora"]["rank"], case.config["lora"]["alpha"]
    path = case.path / "lora.pt"
    for name, file, forward in (
        ("generator", "ode_init.pt", cached_forward),
        ("critic", "trainer_model.pt", score_forward),
    ):
        state, lora = network(case, file, name), read_lora(path, name)
        if merged:
            model = model_with(case, merge_lora(state, lora, alpha, path))
        else:
            model = model_with(case, state)
            attach_lora(model, rank, alpha, lora, path)
        case.check("lora" if name == "generator" else "critic_lora", forward(case, model))


def test_fresh_lora_changes_nothing() -> None:
    case = load_case("12_checkpoints")
    model = model_with(case, network(case, "ode_init.pt"))
    attach_lora(model, case.config["lora"]["rank"], case.config["lora"]["alpha"])
    case.check("lora_init", cached_forward(case, model))
