"""The UMT5 text encoder against the golden case and a plain float64 twin; its tokens, cache and weight loading."""

import html
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from golden_fixture import Case, parts
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast, UMT5EncoderModel

from longlive.errors import InputError
from longlive.models.text_encoder import (
    PromptCache,
    TextEncoder,
    TextEncoderConfig,
    Tokenize,
    byte_tokens,
    clean_text,
    load_tokenizer,
    offload,
)
from longlive.weights.files import write_safetensors
from longlive.weights.formats import TEXT_ENCODER, load_text_encoder, read_part

State = dict[str, Tensor]
SMALL = replace(TextEncoderConfig.tiny(), dim=24, dim_attn=32, dim_ffn=40, text_len=40)
PROMPTS = ["a red fox", "a red fox runs over fresh snow", ""]


def original_state(config: TextEncoderConfig, seed: int = 0) -> State:
    """Random weights under Wan's names, large enough for the position bias and the gate to matter."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float) -> Tensor:
        return torch.randn(shape, generator=generator) * std

    dim, inner, ffn = config.dim, config.dim_attn, config.dim_ffn
    state = {"token_embedding.weight": normal(config.vocab_size, dim, std=1.0), "norm.weight": 1 + normal(dim, std=0.2)}
    for i in range(config.num_layers):
        block = {
            "attn.q.weight": normal(inner, dim, std=(dim * inner / config.num_heads) ** -0.5),
            "attn.k.weight": normal(inner, dim, std=dim**-0.5),
            "attn.v.weight": normal(inner, dim, std=dim**-0.5),
            "attn.o.weight": normal(dim, inner, std=inner**-0.5),
            "norm1.weight": 1 + normal(dim, std=0.2),
            "norm2.weight": 1 + normal(dim, std=0.2),
            "ffn.gate.0.weight": normal(ffn, dim, std=dim**-0.5),
            "ffn.fc1.weight": normal(ffn, dim, std=dim**-0.5),
            "ffn.fc2.weight": normal(dim, ffn, std=ffn**-0.5),
            "pos_embedding.embedding.weight": normal(config.num_buckets, config.num_heads, std=1.0),
        }
        state |= {f"blocks.{i}.{name}": weight for name, weight in block.items()}
    return state


def build(config: TextEncoderConfig = SMALL, tokenize: Tokenize = byte_tokens) -> TextEncoder:
    """An encoder with `original_state` weights, built on the meta device as large checkpoints are."""
    with torch.device("meta"):
        encoder = TextEncoder(config, tokenize)
    load_text_encoder(encoder, original_state(config), "weights.pth")
    return encoder


def twin_buckets(length: int, config: TextEncoderConfig) -> Tensor:
    """Bucket of every (query, key): sign, then exact small distances, then logarithmic ones up to max_distance."""
    half = config.num_buckets // 2
    exact = half // 2

    def bucket(distance: int) -> int:
        side, size = (half if distance > 0 else 0), abs(distance)
        if size < exact:
            return side + size
        scaled = math.log(size / exact) / math.log(config.max_distance / exact) * (half - exact)
        return side + min(exact + int(scaled), half - 1)

    return torch.tensor([[bucket(key - query) for key in range(length)] for query in range(length)])


def twin_encode(state: State, config: TextEncoderConfig, ids: Tensor, mask: Tensor) -> Tensor:
    """The encoder written out plainly in float64, on Wan's weight names."""
    weights = {name: tensor.double() for name, tensor in state.items()}
    buckets = twin_buckets(ids.shape[1], config)

    def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config.eps).sqrt() * weight

    x = weights["token_embedding.weight"][ids]
    for i in range(config.num_layers):
        w = {name.removeprefix(f"blocks.{i}."): tensor for name, tensor in weights.items()}
        y = rms_norm(x, w["norm1.weight"])
        q, k, v = ((y @ w[f"attn.{n}.weight"].T).unflatten(-1, (config.num_heads, -1)).transpose(1, 2) for n in "qkv")
        scores = q @ k.transpose(-1, -2) + w["pos_embedding.embedding.weight"][buckets].permute(2, 0, 1)
        probabilities = scores.masked_fill(mask[:, None, None] == 0, -math.inf).softmax(-1)
        x = x + (probabilities @ v).transpose(1, 2).flatten(2) @ w["attn.o.weight"].T
        y = rms_norm(x, w["norm2.weight"])
        gate = F.gelu(y @ w["ffn.gate.0.weight"].T, approximate="tanh")
        x = x + (gate * (y @ w["ffn.fc1.weight"].T)) @ w["ffn.fc2.weight"].T
    return rms_norm(x, weights["norm.weight"])


def golden_encoder(case: Case, ids: Tensor, mask: Tensor) -> TextEncoder:
    """The case's model, whose prompts "0", "1", ... are the rows of `ids`."""
    c = case.config
    assert not c["shared_pos"], "UMT5 has one position bias per layer"
    config = TextEncoderConfig(
        vocab_size=c["vocab"],
        dim=c["dim"],
        dim_attn=c["dim_attn"],
        dim_ffn=c["dim_ffn"],
        num_heads=c["num_heads"],
        num_layers=c["num_layers"],
        num_buckets=c["num_buckets"],
        text_len=ids.shape[1],
    )
    encoder = TextEncoder(config, lambda text: ids[int(text)][mask[int(text)] > 0].tolist())
    load_text_encoder(encoder, case.weights("t5"), "t5.safetensors")
    return encoder


def suffixed(stem: str, name: str) -> str:
    """`stem` with the suffix of output `name`: `prompt_embeds_long` goes with the input `ids_long`."""
    return stem + name.removeprefix("raw").removeprefix("prompt_embeds")


@pytest.mark.golden
@pytest.mark.parametrize(("folder", "name"), parts("11", lambda case: [n for n in case.outputs if "bucket" not in n]))
def test_golden_embeddings(folder: Path, name: str) -> None:
    case = Case(folder)
    ids, mask = case.input(suffixed("ids", name)), case.input(suffixed("mask", name))
    encoder = golden_encoder(case, ids, mask)
    if name.startswith("raw"):
        case.check(name, encoder.encode_ids(ids, mask))
    else:
        case.check(name, encoder([str(row) for row in range(len(ids))]))


@pytest.mark.golden
@pytest.mark.parametrize(("folder", "name"), parts("11", lambda case: [n for n in case.outputs if "bucket" in n]))
def test_golden_buckets(folder: Path, name: str) -> None:
    case = Case(folder)
    expected = case.expected(name)
    encoder = golden_encoder(case, case.input("ids"), case.input("mask"))
    attention = encoder.encoder.block[0].layer[0].SelfAttention
    numbers = torch.arange(encoder.config.num_buckets).float()
    attention.relative_attention_bias.weight.copy_(numbers[:, None].expand(-1, encoder.config.num_heads))
    buckets = attention.compute_bias(expected.shape[1], expected.shape[1])[0, 0]
    queries = (expected == 0).int().argmax(dim=1)  # only a token's own position falls into bucket 0
    case.check(name, buckets[queries].round().long())


@pytest.mark.parametrize("length", [5, 200])
def test_agrees_with_float64_twin(length: int) -> None:
    encoder = build()
    ids = torch.randint(0, SMALL.vocab_size, (3, length), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(length) < torch.tensor([[length], [length // 2], [1]])).long()
    actual = encoder.encode_ids(ids, mask)
    torch.testing.assert_close(actual.double(), twin_encode(original_state(SMALL), SMALL, ids, mask), atol=2e-5, rtol=0)


def test_agrees_with_transformers_class() -> None:
    encoder = build()
    model = UMT5EncoderModel(encoder.encoder.config).eval()
    state = hf_state(SMALL)
    model.load_state_dict(state | {"encoder.embed_tokens.weight": state["shared.weight"]})
    ids, mask = encoder.token_ids(PROMPTS)
    expected = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(encoder.encode_ids(ids, mask), expected, atol=1e-6, rtol=0)


def test_bfloat16_stays_close_to_float64() -> None:
    encoder = build()
    ids, mask = encoder.token_ids(PROMPTS)
    exact = twin_encode(original_state(SMALL), SMALL, ids, mask)
    narrow = encoder.to(torch.bfloat16)(PROMPTS)
    assert narrow.dtype == torch.bfloat16
    error = (narrow.double() - exact)[mask]
    assert error.square().mean().sqrt() < 0.02


def test_rows_past_the_prompt_are_zero() -> None:
    embeddings = build()(PROMPTS)
    assert embeddings.shape == (3, SMALL.text_len, SMALL.dim)
    assert not embeddings.requires_grad
    for row, prompt in zip(embeddings, PROMPTS, strict=True):
        num_tokens = len(prompt) + 1
        assert (row[:num_tokens].abs().amax(dim=-1) > 0).all()
        assert (row[num_tokens:] == 0).all()


def test_batch_equals_one_by_one() -> None:
    encoder = build()
    alone = torch.cat([encoder([prompt]) for prompt in PROMPTS])
    torch.testing.assert_close(encoder(PROMPTS), alone, atol=1e-6, rtol=0)


def test_output_does_not_depend_on_mode() -> None:
    encoder = build()
    assert torch.equal(encoder.train()(PROMPTS), encoder.eval()(PROMPTS))


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  a \t fox\n\nruns \u3000", "a fox runs"),
        ("<salt> &amp;amp; pepper", "<salt> & pepper"),  # ftfy leaves escapes alone beside a "<"
        ("a schÃ¶n day", "a schön day"),
        ("two&nbsp;&nbsp;words", "two words"),
        ("", ""),
    ],
)
def test_cleaning(text: str, cleaned: str) -> None:
    assert clean_text(text) == cleaned


def test_prompts_are_cleaned_before_tokens() -> None:
    encoder = build()
    messy = html.escape("  fox \n & hare ")
    assert torch.equal(encoder([messy]), encoder(["fox & hare"]))


def test_byte_tokens_are_those_of_byt5() -> None:
    reference = ByT5Tokenizer()
    for text in ["", "a red fox", "früh 狐狸 🦊"]:
        assert byte_tokens(text) == reference(text).input_ids
    assert len(reference) == TextEncoderConfig.tiny().vocab_size


def test_long_prompts_are_cut_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    encoder = build()
    longest = "x" * (SMALL.text_len - 1)
    ids, mask = encoder.token_ids([longest])
    assert mask.all()
    assert not caplog.records
    cut_ids, cut_mask = encoder.token_ids([longest + "and much more"])
    assert torch.equal(cut_ids, ids)
    assert torch.equal(cut_mask, mask)
    message = caplog.messages[0]
    assert "13 tokens" in message
    assert str(SMALL.text_len) in message
    assert "xxx" in message
    assert "\n" not in message


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small SentencePiece-like tokenizer, laid out as in a Wan folder."""
    folder = tmp_path_factory.mktemp("wan") / "google" / "umt5-xxl"
    folder.mkdir(parents=True)
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    corpus = ["a red fox runs over fresh snow", "the blue boat drifts on a calm lake", "fresh snow on the lake"] * 4
    special = ["<pad>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(
        corpus, trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>", show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", "</s>"], pair=["$A", "</s>", "$B", "</s>"], special_tokens=[("</s>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_tokens_of_a_wan_folder(tokenizer_folder: Path) -> None:
    config = replace(SMALL, text_len=12)
    encoder = build(config, load_tokenizer(tokenizer_folder))
    reference = PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_folder / "tokenizer.json"), pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    prompts = [
        "a red fox",
        "   fresh  snow on the lake \n",
        "",
        "Ａ ｒｅｄ fox 🦊",
        "the blue boat drifts on a calm lake " * 3,
    ]
    ids, mask = encoder.token_ids(prompts)
    expected = reference(
        [clean_text(prompt) for prompt in prompts],
        padding="max_length",
        truncation=True,
        max_length=config.text_len,
        add_special_tokens=True,
        return_tensors="pt",
    )
    assert torch.equal(ids, expected.input_ids)
    assert torch.equal(mask.long(), expected.attention_mask)
    assert (ids.gather(1, mask.sum(1, keepdim=True) - 1) == 1).all(), "the last token is </s>"
    assert (ids[~mask] == 0).all()


def test_stored_padding_and_truncation_are_ignored(tokenizer_folder: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    tokenizer.enable_padding(length=30)
    tokenizer.enable_truncation(max_length=4)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = "a red fox runs over fresh snow"
    assert load_tokenizer(tmp_path)(text) == load_tokenizer(tokenizer_folder)(text)


def test_bad_tokenizers_are_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(InputError, match=r"tokenizer\.json: no such file"):
        load_tokenizer(tmp_path)
    path.write_text('{"version": "1.0", "trunc')
    with pytest.raises(InputError, match=r"tokenizer\.json: not a readable tokenizer"):
        load_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(single=["$A"], pair=["$A", "$B"], special_tokens=[])
    tokenizer.save(str(path))
    with pytest.raises(InputError, match=r"tokenizer\.json: not a UMT5 tokenizer"):
        load_tokenizer(tmp_path)


def counted() -> tuple[TextEncoder, list[str]]:
    """An encoder, and the texts it will be asked for."""
    calls: list[str] = []

    def tokenize(text: str) -> list[int]:
        calls.append(text)
        return byte_tokens(text)

    return build(tokenize=tokenize), calls


def test_cache_returns_what_the_encoder_makes() -> None:
    encoder, calls = counted()
    cache = PromptCache(encoder, torch.device("cpu"))
    first = cache(["fox", "hare", "fox"])
    assert calls == ["fox", "hare"]
    assert torch.equal(first, torch.cat([encoder([prompt]) for prompt in ("fox", "hare", "fox")]))
    calls.clear()
    assert torch.equal(cache(["hare", "fox"]), first[[1, 0]])
    assert calls == []


def test_cache_forgets_the_least_recently_used() -> None:
    encoder, calls = counted()
    cache = PromptCache(encoder, torch.device("cpu"), max_prompts=2)
    assert cache(["a", "b", "c", "d"]).shape[0] == 4, "one call may ask for more than the cache keeps"
    calls.clear()
    cache(["c"])
    cache(["e"])  # now c is more recent than d
    cache(["c", "e"])
    assert calls == ["e"]
    cache(["d"])
    assert calls == ["e", "d"]


def test_a_filled_cache_encodes_nothing_again() -> None:
    encoder, calls = counted()
    cache = PromptCache(encoder, torch.device("cpu"))
    cache.fill(["fox", "hare", "fox", "owl"], batch_size=2)
    assert calls == ["fox", "hare", "owl"]
    calls.clear()
    found = cache(["owl", "fox", "owl"])
    assert calls == []
    torch.testing.assert_close(found, torch.cat([encoder([prompt]) for prompt in ("owl", "fox", "owl")]))
    calls.clear()
    assert torch.equal(cache(["lynx", "fox"])[0], encoder(["lynx"])[0])
    assert "lynx" in calls


def test_offloaded_weights_give_the_same_embeddings() -> None:
    encoder, device = build(), torch.device("cpu")
    expected = encoder(PROMPTS, device)
    offload(encoder, device)
    for _ in range(2):
        assert torch.equal(encoder(PROMPTS, device), expected)
        assert all(parameter.is_meta for parameter in encoder.parameters()), "weights stay away between calls"


@pytest.mark.gpu
def test_low_memory_leaves_nothing_on_the_gpu() -> None:
    encoder, device = build(), torch.device("cuda")
    expected = encoder(PROMPTS, torch.device("cpu"))
    offload(encoder, device)
    baseline = torch.cuda.memory_allocated(device)
    embeddings = PromptCache(encoder, device)(PROMPTS)
    assert embeddings.device.type == "cuda"
    assert torch.cuda.memory_allocated(device) - baseline < 4 * embeddings.numel() * embeddings.itemsize
    torch.testing.assert_close(embeddings.cpu(), expected, atol=1e-4, rtol=0)


def hf_state(config: TextEncoderConfig) -> State:
    return TEXT_ENCODER.to_hub(original_state(config))


@pytest.mark.parametrize("embedding", [{"shared"}, {"encoder.embed_tokens"}, {"shared", "encoder.embed_tokens"}])
def test_hf_layout_loads_under_either_embedding_name(tmp_path: Path, embedding: set[str]) -> None:
    state = hf_state(SMALL)
    table = state.pop("shared.weight")
    write_safetensors(tmp_path / "model.safetensors", state | {f"{name}.weight": table for name in embedding})
    config, found = read_part(TEXT_ENCODER, tmp_path / "model.safetensors")
    encoder = TextEncoder(replace(config, text_len=SMALL.text_len), byte_tokens)
    load_text_encoder(encoder, found, "model.safetensors")
    assert torch.equal(encoder(PROMPTS), build()(PROMPTS))


def test_loading_makes_no_copy() -> None:
    state = {name: tensor.bfloat16() for name, tensor in original_state(SMALL).items()}
    with torch.device("meta"):
        encoder = TextEncoder(SMALL, byte_tokens)
    load_text_encoder(encoder, state, "weights.pth", torch.bfloat16)
    parameters = dict(encoder.named_parameters())
    assert {p.data_ptr() for p in parameters.values()} == {tensor.data_ptr() for tensor in state.values()}
    assert len(parameters) == len(state)
    assert not any(p.requires_grad for p in parameters.values())
    assert all(p.dtype == torch.bfloat16 for p in parameters.values())
    assert not any(True for _ in encoder.buffers()), "a buffer would be left on the meta device"


@pytest.mark.parametrize("layout", ["original", "hf"])
def test_misfits_are_refused(tmp_path: Path, layout: str) -> None:
    """Errors have Wan's names, which are those of the original file; names that are not known stay as they are."""
    state = original_state(SMALL) if layout == "original" else hf_state(SMALL)
    key = "blocks.1.attn.q.weight"
    stored = key if layout == "original" else "encoder.block.1.layer.0.SelfAttention.q.weight"
    path = tmp_path / "model.safetensors"
    without = {name: tensor for name, tensor in state.items() if name != stored}
    spare = state | {"scaled_fp8": torch.zeros(2)}
    reshaped = state | {stored: torch.zeros(3, 5)}
    encoder = TextEncoder(SMALL, byte_tokens)
    for bad, words in [
        (without, ["missing", key]),
        (spare, ["unexpected", "scaled_fp8"]),
        (reshaped, ["wrong shape", f"{key} is [3, 5], expected [{SMALL.dim_attn}, {SMALL.dim}]"]),
        ({name: tensor for name, tensor in state.items() if "norm" not in name}, ["missing", " and 2 more"]),
    ]:
        before = encoder(["fox"])
        write_safetensors(path, bad)
        _, found = read_part(TEXT_ENCODER, path)
        with pytest.raises(InputError) as caught:
            load_text_encoder(encoder, found, path)
        message = str(caught.value)
        assert message.startswith(f"{path}: ")
        assert "\n" not in message
        assert all(word in message for word in words), message
        assert torch.equal(encoder(["fox"]), before), "nothing was loaded"


def test_tiny_is_reproducible_from_a_seed() -> None:
    def embed(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return TextEncoder(TextEncoderConfig.tiny(), byte_tokens)(["a red fox"])

    assert torch.equal(embed(3), embed(3))
    assert not torch.equal(embed(3), embed(4))
    assert embed(3).isfinite().all()
