"""LoRA weights: W + (alpha / rank) B A, either merged into W at load or attached beside it through peft.

Files: `{"generator_lora": ..., "critic_lora": ...}` as the published trainer writes them, or a plain state dict (also
as safetensors). Names are PEFT's: `base_model.model.<module>.lora_A.weight` [rank, in], `….lora_B.weight` [out, rank].
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from longlive.errors import InputError
from longlive.models.dit import WanDiT
from longlive.weights.files import StateDict, check_finite, read_checkpoint, shorten, state_dict_of
from longlive.weights.formats import unwrap_name

Lora = dict[str, tuple[Tensor, Tensor]]
"""Module name in the transformer -> its (A [rank, in], B [out, rank])."""

_NAME = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.default)?\.weight")


def read_lora(path: str | Path, network: str = "generator") -> Lora:
    """The LoRA of `network` (`generator` or `critic`) in a file. Raises `InputError` naming the file."""
    return parse_lora(read_checkpoint(path), path, network)


def parse_lora(checkpoint: Mapping[str, Any], source: str | Path, network: str = "generator") -> Lora:
    """As `read_lora`, for what a file holds. All pairs must be complete and of one rank."""
    nested = [name for name, value in checkpoint.items() if isinstance(value, Mapping)]
    entry = f"{network}_lora"
    if nested and entry not in nested:
        raise InputError(f"{source}: has no {entry}; it holds {shorten(nested)}")
    sides: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state_dict_of(checkpoint[entry] if nested else checkpoint, source).items():
        found = _NAME.fullmatch(unwrap_name(unwrap_name(name).removeprefix("base_model.model.")))
        if not found:
            raise InputError(f"{source}: {name} is not a LoRA weight; accepted are …lora_A.weight and …lora_B.weight")
        sides.setdefault(found["module"], {})[found["side"]] = tensor
    halves = [module for module, pair in sides.items() if len(pair) < 2]
    if halves:
        raise InputError(f"{source}: lora_A or lora_B is missing for {shorten(halves)}")
    lora = {module: (pair["A"], pair["B"]) for module, pair in sides.items()}
    wrong = [module for module, (a, b) in lora.items() if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1]]
    if wrong:
        raise InputError(f"{source}: lora_A [rank, in] and lora_B [out, rank] do not fit each other: {shorten(wrong)}")
    check_finite(
        {f"{module}.lora_{side}": w for module, pair in lora.items() for side, w in zip("AB", pair, strict=True)},
        source,
    )
    ranks = {len(a) for a, _ in lora.values()}
    if len(ranks) > 1:
        raise InputError(f"{source}: ranks differ between modules: {sorted(ranks)}; accepted is one rank")
    return lora


def lora_rank(lora: Lora) -> int:
    """The one rank of all pairs."""
    return len(next(iter(lora.values()))[0])


def check_rank(lora: Lora, rank: int, source: str | Path) -> None:
    """Raise `InputError` unless `lora`, read from `source`, has the rank that was asked for."""
    if lora_rank(lora) != rank:
        raise InputError(
            f"{source}: LoRA of rank {lora_rank(lora)}, not adapter.rank={rank}; set adapter.rank and adapter.alpha to "
            "those it was trained with"
        )


def merge_lora(
    state_dict: StateDict, lora: Lora, alpha: float, source: str | Path, dtype: torch.dtype | None = None
) -> StateDict:
    """A copy of `state_dict` (original names) with W + (alpha / rank) B A, computed in float32, in W's type.

    dtype: instead of W's type for the merged weights. Each is cast as soon as it is merged, so that a model meant for
    bfloat16 is never in memory as float32. Weights without LoRA are shared with `state_dict` as they are. Raises
    `InputError` naming `source` and the modules for which `state_dict` has no weight, or one of another shape; or an
    `alpha` that is not a positive number.
    """
    if not 0 < alpha < math.inf:
        raise InputError(f"{source}: LoRA alpha is {alpha}, accepted is a positive number")
    check_targets(lora, state_dict, source)
    scale = alpha / lora_rank(lora)
    merged = dict(state_dict)
    for module, (a, b) in lora.items():
        weight = state_dict[f"{module}.weight"]
        update = (b.float() @ a.float()).mul_(scale).to(weight.device)
        merged[f"{module}.weight"] = update.add_(weight).to(dtype or weight.dtype)
    return merged


def attach_lora(model: WanDiT, rank: int, alpha: float, lora: Lora | None = None, source: str | Path = "") -> None:
    """Put trainable LoRA pairs beside every linear layer of the transformer's blocks, in place; all else is frozen.

    Starts from `lora`, read from `source`, or from B = 0, which changes nothing. Raises `InputError` when `lora` has
    another rank than `rank`, or does not fit the model.
    """
    if lora is not None:
        check_rank(lora, rank, source)
        check_targets(lora, model.state_dict(), source)
    linears = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    targets = [name for name in linears if name.startswith("blocks.")]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets), model)  # type: ignore[arg-type]
    if lora is None:
        return
    with torch.no_grad():
        for module, pair in lora.items():
            for side, tensor in zip("AB", pair, strict=True):
                model.get_parameter(f"{module}.lora_{side}.default.weight").copy_(tensor)


def peft_names(state: StateDict) -> StateDict:
    """LoRA weights as a model has them attached, under the names of PEFT's files."""
    return {f"base_model.model.{name.replace('.default', '')}": tensor for name, tensor in state.items()}


def check_targets(lora: Lora, state_dict: StateDict, source: str | Path) -> None:
    """Raise `InputError` unless every pair of `lora`, read from `source`, fits a weight of `state_dict`."""
    homeless = [module for module in lora if f"{module}.weight" not in state_dict]
    if homeless:
        raise InputError(f"{source}: the model has no such modules to apply LoRA to: {shorten(homeless)}")
    expected = {module: list(state_dict[f"{module}.weight"].shape) for module in lora}
    wrong = [
        f"{module} updates {[len(b), a.shape[1]]}, the weight is {expected[module]}"
        for module, (a, b) in lora.items()
        if [len(b), a.shape[1]] != expected[module]
    ]
    if wrong:
        raise InputError(f"{source}: LoRA does not fit the model; {shorten(wrong)}")
