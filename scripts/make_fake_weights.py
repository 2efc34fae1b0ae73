"""Write random weights in the layout of the published ones, for tests and benchmarks.

    python scripts/make_fake_weights.py --preset 1.3B --out DIR

makes DIR/wan_models/Wan2.1-T2V-1.3B (transformer, VAE, text encoder, tokenizer) and, except for the teacher 14B,
DIR/longlive_models/models/{longlive_base.pt,lora.pt}. Everything runs as with real weights; the videos are noise.
"""

import argparse
import io
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn

from longlive.models.dit import PRESETS, DiTConfig, WanDiT
from longlive.models.text_encoder import TextEncoder, TextEncoderConfig, byte_tokens
from longlive.models.vae import VAEConfig, WanVAE
from longlive.weights.convert import DTYPES, FILES, wan_dit_config
from longlive.weights.files import StateDict, atomic_file, write_json, write_safetensors
from longlive.weights.formats import TEXT_ENCODER

CORPUS = """
A red fox runs through fresh snow at the edge of a quiet forest while the morning sun rises behind the trees.
An old fisherman mends a net on a wooden pier, gulls circle above him, and small waves roll under the planks.
Two children fly a yellow kite on a wide green hill; the camera follows the kite up into a cloudy blue sky.
A chef slices tomatoes in a bright kitchen, steam drifts from a copper pot, close shot with shallow focus.
Night in the city: rain on the street, neon signs mirrored in puddles, a woman with an umbrella walks away.
The same fox stops, turns its head toward the camera, and then jumps over a fallen log into deep powder.
"""
SPECIAL_TOKENS = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}


@dataclass(frozen=True)
class FakeModel:
    """Sizes of one set of files."""

    dit: DiTConfig
    vae: VAEConfig
    num_shards: int = 1
    has_longlive: bool = True


FAKE_MODELS = {
    "tiny": FakeModel(replace(PRESETS["tiny"], sees_place=False), VAEConfig(base_dim=8)),
    "1.3B": FakeModel(PRESETS["1.3B"], VAEConfig()),
    "14B": FakeModel(PRESETS["14B"], VAEConfig(), num_shards=6, has_longlive=False),
}


class Fake:
    """Random tensors of a size that keeps activations near 1: norms 1, biases 0, weights N(0, 1 / inputs)."""

    def __init__(self, seed: int) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def tensor(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        kind = name.rsplit(".", 1)[-1]
        if kind == "bias":
            return torch.zeros(shape, dtype=dtype)
        if kind == "gamma" or "norm" in name:
            return torch.ones(shape, dtype=dtype)
        fan_in = shape[-1] if kind == "modulation" else math.prod(shape[1:])
        values = torch.randn(shape, generator=self.generator, device=self.device)
        return values.mul_(fan_in**-0.5).to("cpu", dtype)

    def state_dict(self, like: StateDict, dtype: torch.dtype) -> StateDict:
        return {name: self.tensor(name, tensor.shape, dtype) for name, tensor in like.items()}


def write_dit(fake: Fake, config: DiTConfig, folder: Path, num_shards: int, dtype: torch.dtype) -> None:
    """The transformer in one file, or in shards with an index; made and written shard by shard."""
    write_json(folder / "config.json", wan_dit_config(config))
    with torch.device("meta"):
        shapes = WanDiT(config).state_dict()
    path = folder / FILES["wan"]["dit"]
    if num_shards == 1:
        write_safetensors(path, fake.state_dict(shapes, dtype))
        return
    names = list(shapes)
    size = math.ceil(len(names) / num_shards)
    weight_map = {}
    for shard in range(num_shards):
        file = f"{path.stem}-{shard + 1:05}-of-{num_shards:05}.safetensors"
        chosen = names[shard * size : (shard + 1) * size]
        write_safetensors(folder / file, fake.state_dict({name: shapes[name] for name in chosen}, dtype))
        weight_map |= dict.fromkeys(chosen, file)
    num_bytes = sum(tensor.numel() for tensor in shapes.values()) * dtype.itemsize
    index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
    write_json(folder / f"{path.name}.index.json", index)


def write_longlive(fake: Fake, config: DiTConfig, folder: Path, rank: int) -> None:
    """`longlive_base.pt` and `lora.pt` as the published trainer writes them."""
    with torch.device("meta"):
        dit = WanDiT(config)
    base = fake.state_dict(dit.state_dict(), torch.float32)
    write_checkpoint(folder / "longlive_base.pt", {"generator": {f"model.{k}": v for k, v in base.items()}})
    lora = {}
    for name, module in dit.named_modules():
        if isinstance(module, nn.Linear) and name.startswith("blocks."):
            prefix = f"base_model.model.{name}"
            lora[f"{prefix}.lora_A.weight"] = torch.Size([rank, module.in_features])
            lora[f"{prefix}.lora_B.weight"] = torch.Size([module.out_features, rank])
    pairs = {name: fake.tensor(name, shape, torch.float32).mul_(0.1) for name, shape in lora.items()}
    write_checkpoint(folder / "lora.pt", {"generator_lora": pairs, "step": 0})


def write_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    with atomic_file(path) as file:
        torch.save(checkpoint, file)


def write_text_encoder(fake: Fake, config: TextEncoderConfig, path: Path) -> None:
    with torch.device("meta"):
        shapes = TEXT_ENCODER.to_original(TextEncoder(config, byte_tokens).state_dict())
    write_checkpoint(path, fake.state_dict(shapes, torch.bfloat16))


def write_tokenizer(folder: Path) -> int:
    """A small SentencePiece tokenizer with UMT5's special tokens, in all its files; returns its vocabulary's size."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.strip().splitlines()),
        model_writer=model,
        vocab_size=512,
        hard_vocab_limit=False,
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    with atomic_file(folder / "spiece.model") as file:
        file.write(model.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    vocabulary = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(len(pieces))]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2, byte_fallback=True))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS.values()])
    with atomic_file(folder / "tokenizer.json") as file:
        file.write(tokenizer.to_str().encode())
    write_json(folder / "special_tokens_map.json", SPECIAL_TOKENS)
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, **SPECIAL_TOKENS})
    return len(vocabulary)


def make_fake_weights(
    preset: str, out: Path, text_encoder: str = "tiny", dtype: str = "fp32", lora_rank: int = 256, seed: int = 0
) -> None:
    """Write everything; see the head of this file. `dtype` is the transformer's in the Wan folder."""
    model, fake = FAKE_MODELS[preset], Fake(seed)
    folder, files = out / "wan_models" / f"Wan2.1-T2V-{preset}", FILES["wan"]
    write_dit(fake, model.dit, folder, model.num_shards, DTYPES[dtype])
    with torch.device("meta"):
        vae_shapes = WanVAE(model.vae).state_dict()
    write_checkpoint(folder / files["vae"], fake.state_dict(vae_shapes, torch.float32))
    vocab_size = write_tokenizer(folder / files["tokenizer"])
    width = model.dit.text_dim
    text_config = TextEncoderConfig(vocab_size, width, dim_attn=64, dim_ffn=128, num_heads=4, num_layers=2)
    if text_encoder == "full":
        text_config = TextEncoderConfig()
    write_text_encoder(fake, text_config, folder / files["text_encoder"])
    if model.has_longlive:
        write_longlive(fake, model.dit, out / "longlive_models" / "models", lora_rank)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write random weights in the layout of the published ones.")
    parser.add_argument("--preset", choices=list(FAKE_MODELS), default="tiny", help="size of the transformer")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write into")
    parser.add_argument(
        "--text_encoder",
        choices=["full", "tiny"],
        default="tiny",
        help="full: umt5-xxl's sizes, 11 GB, for 1.3B and 14B only (default: tiny, of the width the transformer needs)",
    )
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="of the transformer in the Wan folder")
    parser.add_argument("--lora_rank", type=int, default=256, metavar="N", help="rank of lora.pt (default: 256)")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    args = parser.parse_args()
    if args.text_encoder == "full" and PRESETS[args.preset].text_dim != TextEncoderConfig.dim:
        parser.error(f"--text_encoder full does not fit preset {args.preset}")
    make_fake_weights(args.preset, args.out, args.text_encoder, args.dtype, args.lora_rank, args.seed)


if __name__ == "__main__":
    main()
