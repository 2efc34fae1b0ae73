"""Attention behind one signature, and the choice of the kernel that computes it.

An `AttentionFn` maps queries [B, heads, queries, d], keys and values [B, heads, keys, d] to [B, heads, queries, d]:
softmax(q k^T / sqrt(d)) v, no mask. The choice is made once, when a model is built. This is the only importer of
flash-attn, which is optional.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from longlive.errors import InputError
from longlive.models.rope import apply_rope

AttentionFn = Callable[[Tensor, Tensor, Tensor], Tensor]

CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's own choice of kernel; runs everywhere and is the reference for the others."""
    return F.scaled_dot_product_attention(q, k, v)


def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch SDPA with the cuDNN kernel first: the fastest on Hopper without extra packages."""
    with sdpa_kernel(CUDNN_FIRST, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v)


def flash2(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The flash-attn 2 package; half precision on CUDA only."""
    from flash_attn import flash_attn_func

    return flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def flash3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The flash-attn 3 package (`flash_attn_interface`); half precision on Hopper only."""
    from flash_attn_interface import flash_attn_func

    out = flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    out = out[0] if isinstance(out, tuple) else out  # early releases also return the log-sum-exp
    return out.transpose(1, 2)


@dataclass(frozen=True)
class View:
    """What some frames of a pass see. queries, keys: ranges of frames among all queries and all keys; turn: RoPE
    [2, 1, D / 2] by which the keys of the first range are turned."""

    queries: range
    keys: tuple[range, ...]
    turn: Tensor | None = None


def attend_views(
    attention: AttentionFn, q: Tensor, k: Tensor, v: Tensor, views: Sequence[View], frame_tokens: int
) -> Tensor:
    """Attention of frames, view by view, to the keys that each sees, put together: no mask is needed.

    q [B, H, F S, D], k and v [B, H, keys, D] of frames of S tokens -> [B, H, F S, D] in the order of the views. All is
    split once, in the largest pieces that fit every view: the backward pass puts pieces together, where slices would
    each be added to zeros of full size.
    """
    bounds = [bound for view in views for part in (view.queries, *view.keys) for bound in (part.start, part.stop)]
    assert max(bounds) * frame_tokens <= k.shape[2], "a view reaches beyond the keys"
    size = math.gcd(*bounds)
    queries, keys, values = (x.split(size * frame_tokens, dim=2) for x in (q, k, v))

    def pieces(of: Sequence[Tensor], parts: Sequence[range]) -> list[Tensor]:
        return [piece for part in parts for piece in of[part.start // size : part.stop // size]]

    outs = []
    for view in views:
        seen = pieces(keys, view.keys[:1])
        if seen and view.turn is not None:
            seen = [apply_rope(torch.cat(seen, dim=2), view.turn)]
        seen_keys = torch.cat([*seen, *pieces(keys, view.keys[1:])], dim=2)
        seen_values = torch.cat(pieces(values, view.keys), dim=2)
        outs.append(attention(torch.cat(pieces(queries, [view.queries]), dim=2), seen_keys, seen_values))
    return torch.cat(outs, dim=2)


BACKENDS: dict[str, AttentionFn] = {"sdpa": sdpa, "cudnn": cudnn, "flash2": flash2, "flash3": flash3}


def _available(name: str, device: torch.device, dtype: torch.dtype) -> bool:
    if name == "sdpa":
        return True
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    if name == "cudnn":
        return torch.backends.cudnn.is_available()
    if name == "flash3" and torch.cuda.get_device_capability(device)[0] != 9:
        return False
    try:
        import_module({"flash2": "flash_attn", "flash3": "flash_attn_interface"}[name])
    except ImportError:  # not there, or built for another torch
        return False
    return True


def select_attention(name: str, device: torch.device, dtype: torch.dtype) -> AttentionFn:
    """The kernel called `name`, or for "auto" the best one present: flash3, cudnn on Hopper or newer, flash2, sdpa.

    Raises InputError where the named kernel does not exist or cannot run on this device and type.
    """
    if name == "auto":
        newer = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9
        order = ["flash3", *(["cudnn"] if newer else []), "flash2", "sdpa"]
        return BACKENDS[next(found for found in order if _available(found, device, dtype))]
    if name not in BACKENDS:
        raise InputError(f"attention={name}: unknown; accepted are auto, {', '.join(BACKENDS)}")
    if not _available(name, device, dtype):
        raise InputError(f"attention={name}: not available here with {dtype} on {device}; use attention=auto")
    return BACKENDS[name]
