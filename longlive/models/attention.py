"""Attention behind one signature, and the choice of the kernel that computes it.

An `AttentionFn` maps queries [B, heads, queries, d], keys and values [B, heads, keys, d] to [B, heads, queries, d]:
softmax(q k^T / sqrt(d)) v, no mask. The choice is made once, when a model is built. This is the only importer of
flash-attn, which is optional.
"""

from collections.abc import Callable, Sequence
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


def attend_to(
    attention: AttentionFn,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: slice,
    parts: Sequence[slice],
    turn: Tensor | None = None,
) -> Tensor:
    """Attention of some of the queries to those parts of all keys that they see, put together: no mask is needed.

    turn: RoPE by which the keys of the first part are turned.
    """
    keys, values = ([x[:, :, part] for part in parts] for x in (k, v))
    if turn is not None:
        keys[0] = apply_rope(keys[0], turn)
    return attention(q[:, :, queries], torch.cat(keys, dim=2), torch.cat(values, dim=2))


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
