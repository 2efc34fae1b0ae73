"""The model that is there without any download: a small one of the Shapes world, from scripts/train_shapes.sh. Layer 4.

Its text encoder is frozen as it is drawn: word embeddings, and one layer of attention whose heads each look at one
neighbouring word, or at all before or all after. So the embedding of "star" tells which size, colour and motion stand
beside it, and whether another body was told before. Nothing more is needed to follow captions of a small grammar.
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
BUILTIN_STEPS = (1000, 400, 200, 80)  # as in configs/shapes_train_long.yaml, like all of these
BUILTIN_MODEL_KWARGS = {"timestep_shift": 15.0, "use_infinite_attention": True}

TEXT = TextEncoderConfig(
    vocab_size=128, dim=192, dim_attn=160, dim_ffn=256, num_heads=10, num_layers=1, text_len=32, max_distance=32
)

_HALF = TEXT.num_buckets // 2
# Of each head, in UMT5's buckets: 1, 2, … words towards the start of the text, half of all further on to its end.
_LOOKS_AT = [
    *([bucket] for distance in (1, 2, 3, 4) for bucket in (distance, _HALF + distance)),
    range(1, _HALF),
    range(_HALF + 1, TEXT.num_buckets),
]
_BIAS = 12.0  # of the scores, which are about 1 themselves


def builtin_encoder() -> TextEncoder:
    """The text encoder, drawn from a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = TextEncoder(TEXT, word_tokens)
    bias = torch.zeros(TEXT.num_buckets, TEXT.num_heads)
    for head, buckets in enumerate(_LOOKS_AT):
        bias[list(buckets), head] = _BIAS
    state = {name: bias for name in encoder.state_dict() if name.endswith("relative_attention_bias.weight")}
    encoder.load_state_dict(state, strict=False)
    return encoder
