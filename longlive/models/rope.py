"""Rotary position embedding over (frame, row, column), as in Wan (arXiv 2503.20314).

Neighbouring elements (2i, 2i+1) of a head form a pair; of the c = head_dim / 2 pairs the first c - 2 (c // 3) turn with
the frame index, the next c // 3 with the row, the last c // 3 with the column. Angles are computed for the positions at
hand, in float64: there is no table to run out of, however long the video.
"""

import torch
from torch import Tensor

BASE = 10_000.0


def _angles(positions: Tensor, num_pairs: int) -> Tensor:
    """position * BASE^(-j / num_pairs) for pair j: [positions, pairs] float64."""
    exponents = torch.arange(num_pairs, dtype=torch.float64, device=positions.device) / num_pairs
    return positions.double()[:, None] * BASE**-exponents


def rope_table(frames: Tensor, height: int, width: int, head_dim: int) -> Tensor:
    """Cosines and sines for every token of the given frames.

    frames: [F] frame positions; height, width: tokens per column and row. Returns [2, F * height * width, head_dim / 2]
    float32, tokens ordered frame, row, column.
    """
    pairs = head_dim // 2
    spatial = pairs // 3
    device, size = frames.device, (len(frames), height, width)
    angles = torch.cat(
        [
            _angles(frames, pairs - 2 * spatial)[:, None, None].expand(*size, -1),
            _angles(torch.arange(height, device=device), spatial)[None, :, None].expand(*size, -1),
            _angles(torch.arange(width, device=device), spatial)[None, None, :].expand(*size, -1),
        ],
        dim=-1,
    ).flatten(0, 2)
    return torch.stack([angles.cos(), angles.sin()]).float()


def apply_rope(x: Tensor, table: Tensor) -> Tensor:
    """Rotate x [..., tokens, head_dim] by `table` [2, tokens, head_dim / 2]; float32 inside, type of `x` outside."""
    cos, sin = table
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return rotated.flatten(-2).to(x.dtype)
