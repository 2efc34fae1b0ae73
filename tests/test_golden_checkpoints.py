"""Golden case 12: base, trainer and LoRA files give the models they describe."""

from pathlib import Path

import pytest
import torch
from golden_fixture import Case, cases, parts
from test_golden_core import cache_config, dit_config
from torch import Tensor

from longlive.models.dit import WanDiT
from longlive.training.ema import EMA
from longlive.weights.files import StateDict, load_into, read_checkpoint
from longlive.weights.formats import select_network
from longlive.weights.lora import attach_lora, merge_lora, read_lora

pytestmark = pytest.mark.golden

# The checkpoint file and the network in it that an output is made with.
SOURCES = {
    "base": ("ode_init.pt", "generator"),
    "ema": ("trainer_model.pt", "generator_ema"),
    "critic": ("trainer_model.pt", "critic"),
    "lora_init": ("ode_init.pt", "generator"),
    "lora": ("ode_init.pt", "generator"),
    "critic_lora": ("trainer_model.pt", "critic"),
}


def model_with(case: Case, state: StateDict) -> WanDiT:
    model = WanDiT(dit_config(case.config["model"]))
    load_into(model, state, "fixture")
    return model.eval().requires_grad_(False)


def network(case: Case, file: str, name: str) -> StateDict:
    path = case.path / file
    return select_network(read_checkpoint(path), path, name)


def cached_forward(case: Case, model: WanDiT) -> Tensor:
    """Per block a noisy pass, then a clean one, one block past the window; the clean flow of the last two blocks."""
    window, num = case.config["window"], case.config["nf"]
    cache = model.new_cache(cache_config(case.config), 1, *case.config["latent"])
    text = case.input("prompt0")
    flows = []
    for start in range(0, (window // num + 1) * num, num):
        (first, later), span = cache.plan_block(start, num), slice(start, start + num)
        model(case.input("noise")[:, span], torch.tensor([937.5]), text, cache=cache, plan=first)
        flows.append(model(case.input("renoise")[0][:, span], torch.zeros(1), text, cache=cache, plan=later))
    return torch.cat(flows[-2:], dim=1)


def score_forward(case: Case, model: WanDiT) -> Tensor:
    return model(case.input("noise")[:, : case.config["nf"]], torch.tensor([500.0]), case.input("prompt0"))


def models(case: Case, output: str) -> list[WanDiT]:
    """The models that must give an output; with a trained LoRA two: merged into the weights, and attached."""
    file, name = SOURCES[output]
    state = network(case, file, name)
    if "lora" not in output:
        return [model_with(case, state)]
    rank, alpha, path = case.config["lora"]["rank"], case.config["lora"]["alpha"], case.path / "lora.pt"
    attached = model_with(case, state)
    if output == "lora_init":
        attach_lora(attached, rank, alpha)
        return [attached]
    lora = read_lora(path, name)
    attach_lora(attached, rank, alpha, lora, path)
    return [model_with(case, merge_lora(state, lora, alpha, path)), attached]


def forward_outputs(case: Case) -> list[str]:
    return [output for output in case.outputs if not output.startswith("ema_shadow")]


@pytest.mark.parametrize(("folder", "output"), parts("12", forward_outputs))
def test_checkpoint(folder: Path, output: str) -> None:
    case = Case(folder)
    forward = score_forward if "critic" in output else cached_forward
    for model in models(case, output):
        case.check(output, forward(case, model))


@pytest.mark.parametrize("folder", cases("12"))
def test_ema(folder: Path) -> None:
    case = Case(folder)
    ema = EMA([case.input("ema_w0"), case.input("ema_b0")], case.config["ema_decay"])
    shadows = []
    for step in zip(case.input("ema_upd_w"), case.input("ema_upd_b"), strict=True):
        ema.update(step)
        shadows.append([shadow.clone() for shadow in ema.shadow])
    for output, shadow in zip(("ema_shadow_w", "ema_shadow_b"), zip(*shadows, strict=True), strict=True):
        case.check(output, torch.stack(shadow))
