"""UMT5 text encoder: prompts to the embeddings that condition the DiT.

Layer 1. The network is transformers' UMT5; cleaning, tokens and padding are those of Wan2.1.
Shapes: B prompts, L = text_len tokens, D = dim.
"""

import html
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import ftfy
import torch
from accelerate import cpu_offload
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from longlive.errors import InputError

log = logging.getLogger(__name__)

PAD_ID, EOS_ID = 0, 1

Tokenize = Callable[[str], list[int]]
"""Cleaned text to token ids: ends with EOS, neither padded nor truncated."""


@dataclass(frozen=True)
class TextEncoderConfig:
    """Sizes of a UMT5 encoder; the defaults are umt5-xxl, as used by every Wan2.1 model."""

    vocab_size: int = 256384
    dim: int = 4096
    dim_attn: int = 4096
    dim_ffn: int = 10240
    num_heads: int = 64
    num_layers: int = 24
    num_buckets: int = 32
    max_distance: int = 128
    text_len: int = 512
    eps: float = 1e-6

    @classmethod
    def tiny(cls) -> "TextEncoderConfig":
        """Sizes to test and measure with, without files, for use with `byte_tokens`."""
        return cls(vocab_size=384, dim=64, dim_attn=64, dim_ffn=128, num_heads=4, num_layers=2)


def clean_text(text: str) -> str:
    """Wan's cleaning: repair broken Unicode, undo HTML escapes (twice), collapse and strip white space."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


def byte_tokens(text: str) -> list[int]:
    """ByT5 tokens: UTF-8 bytes shifted past the three special ids (pad, EOS, unknown), then EOS."""
    return [byte + 3 for byte in text.encode()] + [EOS_ID]


def load_tokenizer(folder: Path) -> Tokenize:
    """The UMT5 tokenizer of a Wan folder (`google/umt5-xxl` in the original layout, `tokenizer` in the diffusers one).

    `tokenizer.json` is read as it stands: `AutoTokenizer` of transformers 5 would rebuild its normalisation from the
    class it belongs to. Raises InputError if the file is missing, unreadable or not a T5 tokenizer.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{path}: no such file; the UMT5 tokenizer is expected there")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers package raises nothing narrower
        raise InputError(f"{path}: not a readable tokenizer: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if tokenizer.token_to_id("<pad>") != PAD_ID or tokenizer.encode("").ids != [EOS_ID]:
        raise InputError(f"{path}: not a UMT5 tokenizer: <pad> must be token {PAD_ID}, the end of a text {EOS_ID}")
    return lambda text: tokenizer.encode(text).ids


class TextEncoder(nn.Module):
    """A frozen UMT5 encoder with its tokenizer. Computes in the dtype and on the device of its parameters.

    Parameters are named as in transformers' `UMT5EncoderModel`, without the alias `shared.weight` of the embedding.
    """

    def __init__(self, config: TextEncoderConfig, tokenize: Tokenize) -> None:
        super().__init__()
        self.config = config
        self.tokenize = tokenize
        # The outer model only adds a second name for the embedding; taking the stack leaves nothing tied, so that
        # building on the meta device, `assign=True` and `.to()` need no care.
        self.encoder = UMT5EncoderModel(
            UMT5Config(
                vocab_size=config.vocab_size,
                d_model=config.dim,
                d_kv=config.dim_attn // config.num_heads,
                d_ff=config.dim_ffn,
                num_layers=config.num_layers,
                num_heads=config.num_heads,
                relative_attention_num_buckets=config.num_buckets,
                relative_attention_max_distance=config.max_distance,
                layer_norm_epsilon=config.eps,
                dropout_rate=0.0,
            )
        ).encoder
        # Rounds as Wan does in bfloat16: scores in the weights' dtype, padded keys at its minimum, softmax in float32.
        self.encoder.set_attn_implementation("eager")
        self.requires_grad_(False)

    def token_ids(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids and mask (true on tokens), both `[B, L]` on the CPU. Longer prompts are cut, with a warning."""
        rows = [self._fit(prompt) for prompt in prompts]
        ids = torch.full((len(rows), self.config.text_len), PAD_ID)
        for padded, row in zip(ids, rows, strict=True):
            padded[: len(row)] = torch.tensor(row)
        lengths = torch.tensor([len(row) for row in rows])
        return ids, torch.arange(self.config.text_len) < lengths[:, None]

    def _fit(self, prompt: str) -> list[int]:
        """Tokens of one prompt, at most L of them, the last one always EOS."""
        text = clean_text(prompt)
        ids, limit = self.tokenize(text), self.config.text_len
        if len(ids) > limit:
            start = " ".join(text.split()[:8])[:80]
            log.warning("prompt cut by %d tokens to the limit of %d: %s …", len(ids) - limit, limit, start)
            ids = ids[: limit - 1] + ids[-1:]
        return ids

    def encode_ids(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Hidden states `[B, L, D]` of token ids `[B, L]`; keys where `mask` `[B, L]` is 0 are not attended to."""
        hidden: Tensor = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return hidden

    def forward(self, prompts: Sequence[str], device: torch.device | None = None) -> Tensor:
        """Prompt embeddings `[B, L, D]`, zero past the end of each prompt, as the DiT expects them.

        device: where to compute, if `offload` brings the weights there; by default where they are.
        """
        device = device or self.encoder.embed_tokens.weight.device
        ids, mask = (tensor.to(device) for tensor in self.token_ids(prompts))
        return self.encode_ids(ids, mask).masked_fill(~mask[..., None], 0.0)


def offload(encoder: TextEncoder, device: torch.device) -> None:
    """Keep the weights on the CPU; each layer's are on `device` only while it computes there."""
    cpu_offload(encoder.encoder, device, preload_module_classes=["UMT5Block"])


class PromptCache:
    """Embeddings of the most recently used prompts, computed and kept on `device`.

    Each prompt is encoded alone, so that its embedding does not depend on its neighbours.
    """

    def __init__(self, encoder: TextEncoder, device: torch.device, max_prompts: int = 64) -> None:
        self.encoder = encoder
        self.device = device
        self.max_prompts = max_prompts
        self._embeddings: OrderedDict[str, Tensor] = OrderedDict()
        self._rows: dict[str, int] = {}
        self._table: Tensor | None = None

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Prompt embeddings `[B, L, D]` on `device`, as `TextEncoder.forward` makes them."""
        if self._table is not None and all(prompt in self._rows for prompt in prompts):
            rows = torch.tensor([self._rows[prompt] for prompt in prompts])
            return self._table[rows.to(self.device, non_blocking=True)]
        self._embeddings.update(self._encode([p for p in dict.fromkeys(prompts) if p not in self._embeddings]))
        for prompt in prompts:
            self._embeddings.move_to_end(prompt)
        stacked = torch.stack([self._embeddings[prompt] for prompt in prompts])
        while len(self._embeddings) > max(self.max_prompts, len(set(prompts))):
            self._embeddings.popitem(last=False)
        return stacked

    def fill(self, prompts: Sequence[str], batch_size: int = 1024) -> None:
        """Encode many prompts, `batch_size` at a time, and keep them in place of those of the last call.

        For models whose rounding does not matter.
        """
        self._rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        unique = list(self._rows)
        parts = (unique[start : start + batch_size] for start in range(0, len(unique), batch_size))
        self._table = torch.cat([self.encoder(part, self.device) for part in parts])

    def _encode(self, prompts: list[str]) -> dict[str, Tensor]:
        return {prompt: self.encoder([prompt], self.device)[0] for prompt in prompts}
