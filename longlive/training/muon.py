"""Muon: steps along the orthogonal factor of the momentum, for the weight matrices of a transformer's blocks.

Jordan et al. 2024; the length of a step is that of Moonlight (arXiv 2502.16982), so that learning rates are like
AdamW's. `torch.optim.Muon` takes the same steps matrix by matrix, which is some 2,000 small kernels for eight blocks;
here all matrices of one shape are done together.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # of x, x³, x⁵: takes singular values to about 1 in 5 rounds
_NUM_ROUNDS = 5
_ADAMW_RMS = 0.2  # root mean square of an update of AdamW, of its learning rate


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay, over whole (not sharded) matrices."""

    def __init__(
        self, matrices: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0, momentum: float = 0.95
    ) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        for group in self.param_groups:
            for matrix in group["params"]:
                self.state[matrix] = {"momentum": torch.zeros_like(matrix.detach())}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        assert closure is None
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape.setdefault(matrix.shape, []).append(matrix)
            for shape, matrices in by_shape.items():
                gradients = [matrix.grad for matrix in matrices if matrix.grad is not None]
                momenta = [self.state[matrix]["momentum"] for matrix in matrices]
                torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
                ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])
                steps = orthogonal(torch.stack(ahead)) * (_ADAMW_RMS * math.sqrt(max(shape)))
                torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(matrices, list(steps.unbind()), alpha=-group["lr"])


def orthogonal(matrices: Tensor) -> Tensor:
    """About the orthogonal factor U Vᵀ of each of [N, rows, columns] = U S Vᵀ: singular values from 0.7 to 1.2.

    By Newton-Schulz rounds, on a GPU in bfloat16.
    """
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    is_tall = x.shape[1] > x.shape[2]
    x = x.mT if is_tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = _NEWTON_SCHULZ
    for _ in range(_NUM_ROUNDS):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).to(matrices.dtype)
