"""The model that is there without any download: a small one of the Shapes world, from scripts/train_shapes.sh. Layer 4.

Its text encoder is frozen as it is drawn: word embeddings, and one layer of attention whose heads each look at one
neighbouring word, so that the embedding of "star" tells which size, colour and motion stand beside it. Nothing more is
needed to follow captions of a small grammar.
"""

from pathlib import Path

import torch

from longlive.data.shapes.captions import word_tokens
from longlive.data.shapes.world import HEIGHT, WIDTH
from longlive.models.text_encoder import TextEncoder, TextEncoderConfig

BUILTIN = "tiny"
"""The built-in model as `model_name`."""

FOLDER = Path(__file__).parent / "shapes_model"
BUILTIN_GENERATOR, BUILTIN_VAE = FOLDER / "generator.safetensors", FOLDER / "vae.safetensors"
BUILTIN_HEIGHT_PX, BUILTIN_WIDTH_PX = HEIGHT, WIDTH
BUILTIN_TIMESTEP_SHIFT = 15.0  # as in configs/shapes_train_long.yaml

TEXT = TextEncoderConfig(
    vocab_size=128, dim=128, dim_attn=128, dim_ffn=256, num_heads=8, num_layers=1, text_len=32, max_distance=32
)

_NEIGHBOURS = (-4, -3, -2, -1, 1, 2, 3, 4)
_NEIGHBOUR_BIAS = 12.0  # of the scores, which are about 1 themselves


def builtin_encoder() -> TextEncoder:
    """The text encoder, drawn from a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = TextEncoder(TEXT, word_tokens)
    bias = torch.zeros(TEXT.num_buckets, TEXT.num_heads)
    for head, offset in enumerate(_NEIGHBOURS):
        # UMT5 counts buckets from the query: 1, 2, … towards the start of the text, half of all further on to its end.
        bias[abs(offset) + (TEXT.num_buckets // 2 if offset > 0 else 0), head] = _NEIGHBOUR_BIAS
    state = {name: bias for name in encoder.state_dict() if name.endswith("relative_attention_bias.weight")}
    encoder.load_state_dict(state, strict=False)
    return encoder
