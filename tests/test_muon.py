"""Muon against PyTorch's own, and in a network beside AdamW."""

from pathlib import Path

import pytest
import torch
from torch import nn
from training_world import Setup, training

from longlive.training.muon import Muon, orthogonal
from longlive.training.trainer import OptimizerConfig


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_orthogonal(shape: tuple[int, int]) -> None:
    matrices = torch.randn(3, *shape)
    found = orthogonal(matrices)
    u, _, vt = torch.linalg.svd(matrices, full_matrices=False)
    s = u.mT @ found @ vt.mT
    assert (torch.linalg.svdvals(found) - 0.95).abs().max() < 0.35
    assert (s - torch.diag_embed(s.diagonal(dim1=1, dim2=2))).abs().max() < 1e-4


def test_steps_are_those_of_pytorch() -> None:
    """Up to the rounding of its bfloat16."""
    begin = [torch.randn(shape) for shape in ((8, 8), (16, 8), (8, 8), (8, 32))]
    ours, theirs = ([nn.Parameter(value.clone()) for value in begin] for _ in range(2))
    muon = Muon(ours, lr=0.02, weight_decay=0.1)
    twin = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for own, other in zip(ours, theirs, strict=True):
            own.grad = torch.randn_like(own)
            other.grad = own.grad.clone()
        muon.step()
        twin.step()
    for first, own, other in zip(begin, ours, theirs, strict=True):
        moved = (other - first).norm()
        assert moved > 0.05
        assert (own - other).norm() < 0.02 * moved


def test_matrices_of_blocks_are_muons(tmp_path: Path) -> None:
    config = OptimizerConfig(lr=1e-3, muon_lr=2e-2, warmup_steps=3)
    with training(Setup("pretrain", generator=config), tmp_path) as trainer:
        network = trainer.networks["generator"]
        assert network.muon is not None
        trainer.step()
        moments = network.state()["optimizer"]
        kept = {name for name, found in moments.items() if found.keys() == {"momentum"}}
        assert kept == {n for n, p in network.parameters.items() if n.startswith("blocks.") and p.ndim == 2}
        assert all(found["momentum"].any() for name, found in moments.items() if name in kept)
        assert network.muon.param_groups[0]["lr"] == 0.5e-2
        assert network.optimizer.param_groups[0]["lr"] == 0.25e-3
