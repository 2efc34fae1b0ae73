"""Exponential moving average of weights, in float32."""

from collections.abc import Iterable

import torch
from torch import Tensor


class EMA:
    """shadow = decay shadow + (1 - decay) parameter, for a fixed list of parameters (what this process has of them)."""

    def __init__(self, parameters: Iterable[Tensor], decay: float) -> None:
        self.decay = decay
        self.shadow = [parameter.detach().clone().float() for parameter in parameters]

    @torch.no_grad()
    def update(self, parameters: Iterable[Tensor]) -> None:
        """Take in the parameters' present values, in the order given at the start."""
        torch._foreach_lerp_(self.shadow, [parameter.float() for parameter in parameters], 1 - self.decay)

    @torch.no_grad()
    def reset(self, parameters: Iterable[Tensor]) -> None:
        """Begin again at the parameters' present values."""
        torch._foreach_copy_(self.shadow, list(parameters))
