"""Weights people have: layouts, bad files, LoRA, conversion; diffusers, transformers and peft are the oracles."""

import argparse
import importlib.util
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny import tiny_dit
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from longlive.errors import InputError
from longlive.models.dit import DiTConfig, WanDiT
from longlive.models.text_encoder import TextEncoder, TextEncoderConfig, load_tokenizer
from longlive.models.vae import VAEConfig, WanVAE
from longlive.weights import convert as conversion
from longlive.weights.convert import convert, wan_dit_config
from longlive.weights.files import (
    atomic_file,
    check_finite,
    fingerprint,
    load_into,
    read_checkpoint,
    read_json,
    write_json,
    write_pickle,
    write_safetensors,
)
from longlive.weights.formats import (
    DIT,
    TEXT_ENCODER,
    VAE,
    load_text_encoder,
    read_dit,
    read_generator,
    read_part,
    read_text_encoder,
    read_vae,
    select_network,
    weight_files,
)
from longlive.weights.lora import attach_lora, check_rank, merge_lora, parse_lora, peft_names, read_lora

ROOT = Path(__file__).parents[1]
MICRO = DiTConfig(dim=24, ffn_dim=40, num_heads=2, num_layers=2, freq_dim=32, text_dim=20, text_len=6)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def on_meta(build: Callable[[], nn.Module]) -> Any:
    with torch.device("meta"):
        return build().eval().requires_grad_(False)


def flow(model: nn.Module, config: DiTConfig = MICRO) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 2, config.in_channels, 4, 6, generator=generator)
    text = torch.randn(1, config.text_len, config.text_dim, generator=generator)
    with torch.no_grad():
        return model(latents, torch.tensor([500.0]), text)


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """Writes past `num_bytes` fail in this process, as they do on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def fake_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_fake_weights", ROOT / "scripts" / "make_fake_weights.py")
    assert spec
    assert spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def fake(fake_module: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of fake weights in the published layout."""
    out = tmp_path_factory.mktemp("fake")
    fake_module.make_fake_weights("tiny", out, lora_rank=4)
    return out


@pytest.fixture(scope="module")
def wan(fake: Path) -> Path:
    return fake / "wan_models" / "Wan2.1-T2V-tiny"


@pytest.fixture
def micro_file(tmp_path: Path) -> Path:
    """A micro transformer in one file, in our layout's naming but without metadata."""
    path = tmp_path / "micro.safetensors"
    write_safetensors(path, tiny_dit(MICRO).state_dict())
    return path


# --- the published layouts, against the libraries that define them ----------------------------------------------------


@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
def test_diffusers_transformer_folder_gives_its_outputs(tmp_path: Path, shard_size: str) -> None:
    oracle = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=20,
        freq_dim=32,
        ffn_dim=40,
        num_layers=2,
    ).eval()
    for parameter in oracle.parameters():
        nn.init.normal_(parameter, std=0.2)
    oracle.save_pretrained(tmp_path / "transformer", max_shard_size=shard_size)
    assert (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors.index.json").exists() == (
        shard_size != "1GB"
    )

    config, state_dict = read_dit(tmp_path)
    assert config == replace(MICRO, text_len=512)
    assert read_dit(tmp_path / "transformer")[0] == config
    model = on_meta(lambda: WanDiT(config))
    load_into(model, state_dict, tmp_path)
    latents, text = torch.randn(2, 3, 16, 4, 6), torch.randn(2, 6, 20)
    timesteps = torch.tensor([900.0, 30.0])
    with torch.no_grad():
        expected = oracle(latents.transpose(1, 2), timesteps, text, return_dict=False)[0].transpose(1, 2)
        torch.testing.assert_close(model(latents, timesteps, text), expected, atol=2e-5, rtol=1e-4)


def test_diffusers_vae_folder_gives_its_outputs(tmp_path: Path) -> None:
    mean, std = [0.1, -0.2, 0.3, 0.4], [1.5, 0.5, 2.0, 1.0]
    oracle = AutoencoderKLWan(
        base_dim=6, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=mean, latents_std=std, scale_factor_spatial=4, scale_factor_temporal=2,
    ).eval()  # fmt: skip
    oracle.save_pretrained(tmp_path / "vae")

    config, state_dict = read_vae(tmp_path)
    sizes = VAEConfig(6, 4, (1, 2, 4), 1, (False, True), tuple(mean), tuple(std))
    assert config == sizes
    vae = on_meta(lambda: WanVAE(config))
    load_into(vae, state_dict, tmp_path)
    pixels = torch.rand(1, 5, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        mu = oracle.encode(pixels.transpose(1, 2)).latent_dist.mean
        shape = (1, 4, 1, 1, 1)
        latents = ((mu - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)).transpose(1, 2)
        torch.testing.assert_close(vae.encode(pixels), latents, atol=1e-4, rtol=1e-4)
        decoded = oracle.decode(mu).sample.transpose(1, 2)
        torch.testing.assert_close(vae.decode(latents).clamp(-1, 1), decoded, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shard_size", ["1GB", "5KB"])
def test_transformers_text_encoder_folder_gives_its_outputs(tmp_path: Path, wan: Path, shard_size: str) -> None:
    oracle = UMT5EncoderModel(
        UMT5Config(vocab_size=500, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=3, layer_norm_epsilon=1e-5)
    ).eval()
    oracle.save_pretrained(tmp_path / "text_encoder", max_shard_size=shard_size)
    shutil.copytree(wan / "google/umt5-xxl", tmp_path / "tokenizer")

    config, state_dict, tokenizer = read_text_encoder(tmp_path)
    expected = TextEncoderConfig(500, dim=16, dim_attn=24, dim_ffn=24, num_heads=3, num_layers=2, eps=1e-5)
    assert (config, tokenizer) == (expected, tmp_path / "tokenizer")
    encoder = on_meta(lambda: TextEncoder(config, load_tokenizer(tokenizer)))
    load_text_encoder(encoder, state_dict, tmp_path)
    ids, mask = encoder.token_ids(["a red fox", "rain on the street at night"])
    with torch.no_grad():
        expected_states = oracle(ids, mask).last_hidden_state
        torch.testing.assert_close(encoder.encode_ids(ids, mask), expected_states, atol=1e-5, rtol=1e-5)


def test_hub_libraries_load_what_we_convert(tmp_path: Path, wan: Path) -> None:
    convert(wan, tmp_path / "hub", "diffusers")
    classes = {"transformer": WanTransformer3DModel, "vae": AutoencoderKLWan, "text_encoder": UMT5EncoderModel}
    for part, (folder, hub_class) in zip((DIT, VAE, TEXT_ENCODER), classes.items(), strict=True):
        model, info = hub_class.from_pretrained(tmp_path / "hub" / folder, output_loading_info=True)
        assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        _, state_dict = read_part(part, wan)
        loaded = part.to_original(model.state_dict())
        assert all(torch.equal(loaded[name].to(tensor.dtype), tensor) for name, tensor in state_dict.items())
    pipeline = json.loads((tmp_path / "hub" / "model_index.json").read_text())
    assert set(classes) < set(pipeline)
    assert (tmp_path / "hub" / "tokenizer" / "tokenizer.json").exists()


def test_every_layout_round_trips_exactly(tmp_path: Path, wan: Path) -> None:
    previous = wan
    for to in ("longlive", "diffusers", "wan", "diffusers", "longlive", "wan"):
        current = tmp_path / f"{len(list(tmp_path.iterdir()))}_{to}"
        convert(previous, current, to)
        previous = current
        for part in (DIT, VAE, TEXT_ENCODER):
            config, state_dict = read_part(part, wan)
            found_config, found = read_part(part, current)
            assert same(found, state_dict), (to, part.name)
            assert found_config == config, (to, part.name)
        *_, tokenizer = read_text_encoder(current)
        assert load_tokenizer(tokenizer)("a fox") == load_tokenizer(wan / "google/umt5-xxl")("a fox")
    names = {str(path.relative_to(current)) for path in current.rglob("*") if path.is_file()}
    assert names == {str(path.relative_to(wan)) for path in wan.rglob("*") if path.is_file()}


def test_a_model_that_sees_places_stays_one(tmp_path: Path, fake_module: ModuleType) -> None:
    seeing, previous = replace(MICRO, sees_place=True), tmp_path / "0"
    fake_module.write_dit(fake_module.Fake(seed=3), seeing, previous, 1, torch.float32)
    for number, to in enumerate(("longlive", "wan", "longlive"), 1):
        convert(previous, tmp_path / str(number), to)
        previous = tmp_path / str(number)
        assert read_dit(previous)[0] == seeing
    with pytest.raises(InputError, match="sees_place"):
        convert(previous, tmp_path / "hub", "diffusers")
    assert not (tmp_path / "hub").exists()


def test_sharded_original_folder_equals_single_file(tmp_path: Path, fake_module: ModuleType) -> None:
    for shards in (1, 3):
        write = fake_module.write_dit
        write(fake_module.Fake(seed=3), MICRO, tmp_path / str(shards), shards, torch.float32)
    assert len(list((tmp_path / "3").glob("*-of-00003.safetensors"))) == 3
    (config, single), (sharded_config, sharded) = read_dit(tmp_path / "1"), read_dit(tmp_path / "3")
    assert config == sharded_config == MICRO
    assert same(sharded, single)


def test_fake_weights_load_and_run(fake: Path, wan: Path) -> None:
    config, state_dict = read_dit(wan)
    base_config, base = read_generator(fake / "longlive_models/models/longlive_base.pt", wan)
    assert base.keys() == state_dict.keys()
    assert base_config == config
    lora = read_lora(fake / "longlive_models/models/lora.pt")
    check_rank(lora, 4, "lora.pt")
    model = on_meta(lambda: WanDiT(config))
    load_into(model, merge_lora(base, lora, 4, "lora.pt"), wan)
    assert 0.05 < flow(model, config).std() < 20


# --- training checkpoints ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "prefix", "inside", "network"),
    [
        (None, "", "", "generator"),
        (None, "model.", "", "generator"),
        ("model", "", "", "generator"),
        ("generator", "model.", "", "generator"),
        ("generator", "model._orig_mod.", "_checkpoint_wrapped_module.", "generator"),
        ("generator_ema", "model._fsdp_wrapped_module.", "", "generator_ema"),
        ("generator_ema", "model.", "_fsdp_wrapped_module.", "generator_ema"),
        ("generator_ema", "_fsdp_wrapped_module.model.", "_fsdp_wrapped_module._orig_mod.", "generator_ema"),
        ("critic", "model.", "", "critic"),
    ],
)
@pytest.mark.parametrize("scheme", ["original", "diffusers"])
def test_checkpoint_names_are_normalised(
    tmp_path: Path, entry: str | None, prefix: str, inside: str, network: str, scheme: str
) -> None:
    wanted = tiny_dit(MICRO).state_dict()
    stored = DIT.to_hub(wanted) if scheme == "diffusers" else wanted
    wrapped = {prefix + name.replace("blocks.1.", f"blocks.1.{inside}"): tensor for name, tensor in stored.items()}
    other = {f"model.{name}": tensor + 1 for name, tensor in wanted.items()}
    checkpoint: dict[str, Any] = wrapped
    if entry:
        others = {"generator": other, "generator_ema": other, "critic": other}
        checkpoint = ({} if entry == "model" else others) | {entry: wrapped, "step": 3}
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    found = select_network(read_checkpoint(tmp_path / "checkpoint.pt"), "checkpoint.pt", network)
    assert same(found, wanted)


def test_absent_network_names_what_is_there(micro_file: Path) -> None:
    with pytest.raises(InputError, match=r"x\.pt: has no generator_ema; it holds generator, critic"):
        select_network({"generator": {}, "critic": {}, "step": 1}, "x.pt", "generator_ema")
    with pytest.raises(InputError, match="has no generator or model; it holds critic"):
        select_network({"critic": {}}, "x.pt")
    with pytest.raises(InputError, match="has no generator_ema; it is a plain state dict"):
        read_dit(micro_file, "generator_ema")
    with pytest.raises(InputError, match="not: epoch"):
        select_network({"epoch": 3, "w": torch.ones(1)}, "x.pt")


def test_number_of_heads_needs_a_config_unless_heads_are_128_wide(micro_file: Path) -> None:
    with pytest.raises(InputError, match=r"micro\.safetensors: the number of heads is not known"):
        read_dit(micro_file)
    write_json(micro_file.parent / "config.json", wan_dit_config(MICRO))
    assert read_dit(micro_file)[0] == MICRO


@pytest.mark.parametrize("to", ["wan", "diffusers", "longlive"])
def test_bare_checkpoint_takes_its_config_from_the_wan_folder(tmp_path: Path, micro_file: Path, to: str) -> None:
    odd = replace(MICRO, num_heads=6, eps=1e-5)
    source, wan_folder, checkpoint = (
        tmp_path / "source",
        tmp_path / "wan_models",
        tmp_path / "base" / "longlive_base.pt",
    )
    weights = tiny_dit(odd).state_dict()
    write_safetensors(source / "x.safetensors", weights)
    write_json(source / "config.json", wan_dit_config(odd))
    (dit,) = convert(source / "x.safetensors", wan_folder, to)
    if to != "longlive":  # there the config is in the file itself
        dit.unlink()
    state = {f"model.{name}": tensor for name, tensor in weights.items()}
    write_pickle(checkpoint, state)
    config, found = read_generator(checkpoint, wan_folder)
    assert config == (replace(odd, text_len=512) if to == "diffusers" else odd)
    assert same(found, weights)

    write_json(checkpoint.with_name("config.json"), wan_dit_config(MICRO))
    assert read_generator(checkpoint, wan_folder)[0] == MICRO
    write_json(checkpoint.with_name("config.json"), {"model_type": "another"})
    assert read_generator(checkpoint, wan_folder)[0] == config
    with pytest.raises(InputError, match=r"longlive_base\.pt: the number of heads is not known"):
        read_generator(checkpoint, tmp_path / "absent")
    with pytest.raises(InputError, match="has no generator_ema"):
        read_generator(checkpoint, wan_folder, "generator_ema")


def test_weight_files_are_those_that_are_read(tmp_path: Path, wan: Path, fake_module: ModuleType) -> None:
    for to, names in conversion.FILES.items():
        convert(wan, tmp_path / to, to)
        paths = [tmp_path / to / names[part] for part in ("dit", "vae", "text_encoder")]
        assert weight_files(tmp_path / to) == [*paths, tmp_path / to / names["tokenizer"] / "tokenizer.json"]
    paths[0].unlink()
    with pytest.raises(InputError, match="no dit weights there"):
        weight_files(tmp_path / to)
    assert weight_files(tmp_path / to, [VAE])[:-1] == paths[1:2]
    fake_module.write_dit(fake_module.Fake(seed=3), MICRO, tmp_path / "sharded", 3, torch.float32)
    index = tmp_path / "sharded" / "diffusion_pytorch_model.safetensors.index.json"
    (tmp_path / "sharded" / "tokenizer").mkdir()
    with pytest.raises(InputError, match="no tokenizer there"):
        weight_files(tmp_path / "sharded", [DIT])
    (tmp_path / "sharded" / "tokenizer" / "tokenizer.json").write_text("{}")
    assert weight_files(tmp_path / "sharded", [DIT])[0] == index


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_loading_maps_the_file_and_makes_no_copy(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    state_dict = tiny_dit(MICRO).state_dict()
    (write_pickle if suffix == ".pt" else write_safetensors)(path, state_dict)
    content = path.read_bytes()
    model = on_meta(lambda: WanDiT(MICRO))
    load_into(model, read_checkpoint(path), path)
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    ranges = [[int(end, 16) for end in line[0].split("-")] for line in lines]
    for tensor in model.state_dict().values():
        assert any(start <= tensor.data_ptr() < end for start, end in ranges)
    assert same(model.state_dict(), state_dict)
    with torch.no_grad():
        model.patch_embedding.weight.add_(1)
    assert path.read_bytes() == content


def test_old_pickle_format_loads(tmp_path: Path) -> None:
    torch.save({"w": torch.arange(3.0)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert same(read_checkpoint(tmp_path / "old.pth"), {"w": torch.arange(3.0)})


class _Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("true",)


def _bad_files() -> dict[str, tuple[str, Callable[[Path], object], str]]:
    tensors = {f"w{i}": torch.randn(64, 64) for i in range(4)}

    def cut(path: Path) -> None:
        (save_file if path.suffix == ".safetensors" else torch.save)(tensors, path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    def scramble(path: Path) -> None:
        torch.save(tensors, path)
        content = bytearray(path.read_bytes())
        content[64:512] = b"\xff" * 448
        path.write_bytes(content)

    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    index = {"weight_map": {"w0": "shard-1.safetensors"}}
    return {
        "missing": ("x.pt", lambda path: None, "cannot read .No such file"),
        "folder": ("x.pt", lambda path: path.mkdir(), "cannot read .Is a directory"),
        "empty": ("x.pth", lambda path: path.touch(), "the file is empty"),
        "empty safetensors": ("x.safetensors", lambda path: path.touch(), "the file is empty"),
        "truncated": ("x.pt", cut, "truncated or corrupt"),
        "truncated safetensors": ("x.safetensors", cut, "truncated or corrupt"),
        "corrupt zip": ("x.pt", scramble, "truncated or corrupt"),
        "text": ("x.bin", lambda path: path.write_text("hello " * 99), "truncated or corrupt"),
        "text safetensors": ("x.safetensors", lambda path: path.write_text("hello " * 99), "truncated or corrupt"),
        "code": ("x.pt", lambda path: torch.save({"w": _Code()}, path), "refused, the pickle contains code"),
        **{
            f"bare pickle {n}": (
                "x.pt",
                lambda path, n=n: path.write_bytes(pickle.dumps(_Code(), n)),
                "refused, .* plain",
            )
            for n in range(6)
        },
        "zeros": ("x.pt", lambda path: path.write_bytes(bytes(1000)), "refused, corrupt or not of plain tensors"),
        "not a dict": (
            "x.pt",
            lambda path: torch.save(torch.ones(1), path),
            "expected a dict of tensors, found Tensor",
        ),
        "git lfs": ("x.safetensors", lambda path: path.write_bytes(pointer), "Git LFS pointer"),
        "git lfs pickle": ("x.pt", lambda path: path.write_bytes(pointer), "Git LFS pointer"),
        "suffix": (
            "x.gguf",
            lambda path: path.write_text("x"),
            r"not a checkpoint file; accepted are .*\.safetensors, \.pt",
        ),
        "index": ("x.index.json", lambda path: path.write_text("{"), "not valid JSON"),
        "index list": ("x.index.json", lambda path: path.write_text("[]"), "expected a JSON object"),
        "index map": ("x.index.json", lambda path: path.write_text("{}"), "no weight_map"),
        "shard": (
            "x.index.json",
            lambda path: path.write_text(json.dumps(index)),
            r"shard-1\.safetensors: cannot read",
        ),
    }


@pytest.mark.parametrize("case", _bad_files())
def test_bad_file_is_one_clear_line(tmp_path: Path, case: str, recwarn: pytest.WarningsRecorder) -> None:
    name, make, message = _bad_files()[case]
    make(tmp_path / name)
    with pytest.raises(InputError, match=message) as caught:
        read_checkpoint(tmp_path / name)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not any(word in str(caught.value) for word in ("weights_only", "miniz", ". "))
    assert not list(recwarn)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({0: torch.ones(2)}, "names as keys, but these are not: 0"),
        ({"w": 3}, "expected a state dict of tensors, but these entries are not: w"),
        ({"w": torch.ones(2, dtype=torch.int32)}, r"w is torch\.int32"),
        ({"w": torch.ones(2, dtype=torch.complex64)}, r"w is torch\.complex64"),
        ({"w": torch.eye(2).to_sparse()}, r"w is torch\.sparse_coo"),
        ({"w": torch.ones(2, device="meta")}, r"w is without values \(meta\)"),
    ],
)
@pytest.mark.parametrize(
    ("read", "nest"),
    [(read_dit, None), (read_dit, "generator"), (read_vae, None), (read_lora, None), (read_lora, "generator_lora")],
)
def test_what_is_no_weight_is_named(
    tmp_path: Path, entry: dict[Any, Any], message: str, read: Callable[[Path], Any], nest: str | None
) -> None:
    torch.save({nest: entry} if nest else entry, tmp_path / "x.pt")
    with pytest.raises(InputError, match=rf"x\.pt: .*{message}$"):
        read(tmp_path / "x.pt")


@pytest.mark.parametrize("read", [read_dit, read_lora])
def test_entries_without_names_are_told(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    torch.save({0: {"w": torch.ones(2)}}, tmp_path / "x.pt")
    with pytest.raises(InputError, match=r"x\.pt: has no generator.*; it holds 0"):
        read(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"eps": "x"}, "eps is 'x', accepted is a positive number"),
        ({"eps": 0}, "eps is 0, accepted"),
        ({"eps": float("nan")}, "eps is nan, accepted"),
        ({"eps": float("inf")}, "eps is inf, accepted"),
        ({"text_len": 0}, "text_len is 0, accepted is a positive whole number"),
        ({"text_len": -5}, "text_len is -5, accepted"),
        ({"text_len": True}, "text_len is True, accepted"),
        ({"num_heads": 2.0}, r"num_heads is 2\.0, accepted"),
        ({"num_heads": 5}, "dim=24: must be an even multiple of num_heads=5"),
        ({"in_dim": [16]}, r"in_dim is \[16\], accepted"),
        ({"patch_size": [1, 2]}, r"patch_size is \[1, 2\], accepted is three positive whole numbers"),
        ({"patch_size": [1, 2, 0]}, r"patch_size is \[1, 2, 0\], accepted"),
        ({"patch_size": 2}, "patch_size is 2, accepted"),
        ({"model_type": "i2v"}, "model_type is 'i2v', accepted is 't2v'"),
    ],
)
def test_bad_config_names_file_key_and_value(micro_file: Path, config: dict[str, Any], message: str) -> None:
    path = micro_file.with_name("config.json")
    path.write_text(json.dumps(wan_dit_config(MICRO) | config))
    with pytest.raises(InputError, match=rf"/config\.json: {message}"):
        read_dit(micro_file)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "not valid JSON"),
        ('{"dim_mult": []}', r"dim_mult is \[\], accepted is a list of positive whole numbers"),
        ('{"temporal_downsample": [1]}', r"temporal_downsample is \[1\], accepted is a list of true and false"),
        ('{"latents_mean": ["a"]}', r"latents_mean is \['a'\], accepted is a list of numbers"),
        ('{"latents_mean": [NaN]}', r"latents_mean is \[nan\], accepted"),
        ('{"latents_mean": [0.5]}', "latents_mean has 1 values"),
    ],
)
def test_bad_metadata_names_file_key_and_value(tmp_path: Path, config: str, message: str) -> None:
    path = tmp_path / "vae.safetensors"
    write_safetensors(path, WanVAE(VAEConfig(base_dim=4)).state_dict(), {"part": "vae", "config": config})
    with pytest.raises(InputError, match=rf"vae\.safetensors: {message}"):
        read_vae(path)


def test_null_in_a_config_is_not_told(micro_file: Path) -> None:
    write_json(micro_file.with_name("config.json"), wan_dit_config(MICRO) | {"out_dim": None})
    assert read_dit(micro_file)[0] == MICRO


def test_odd_shapes_are_told(tmp_path: Path) -> None:
    write_safetensors(
        tmp_path / "x.safetensors", tiny_dit(MICRO).state_dict() | {"patch_embedding.weight": torch.ones(5)}
    )
    with pytest.raises(InputError, match=r"x\.safetensors: the shapes are not those of dit weights"):
        read_dit(tmp_path / "x.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_named(dtype: torch.dtype, value: float) -> None:
    largest = torch.full((2, 99), torch.finfo(dtype).max).to(dtype)
    good = {"a": largest, "empty": torch.ones(0).to(dtype), "count": torch.tensor(3)}
    check_finite(good, "x.pt")
    bad = torch.full((2, 99), 1.0)
    bad[1, 40] = value
    with pytest.raises(InputError, match=r"^x\.pt: NaN or infinite values in b$"):
        check_finite(good | {"b": bad.to(dtype)}, "x.pt")


def test_shard_without_a_listed_tensor_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "s.safetensors")
    (tmp_path / "x.index.json").write_text(json.dumps({"weight_map": {"a": "s.safetensors", "b": "s.safetensors"}}))
    with pytest.raises(InputError, match=r"not there: b in s\.safetensors"):
        read_checkpoint(tmp_path / "x.index.json")


def test_folder_without_the_part_says_where_it_looked(tmp_path: Path, wan: Path) -> None:
    with pytest.raises(InputError, match=r"no vae weights there; looked for vae\.safetensors, .*Wan2\.1_VAE\.pth"):
        read_vae(tmp_path)
    with pytest.raises(InputError, match="cannot read"):
        read_dit(tmp_path / "absent.safetensors")
    with pytest.raises(InputError, match=r"Wan2\.1_VAE\.pth: not dit weights; missing: patch_embedding\.weight"):
        read_dit(wan / "Wan2.1_VAE.pth")
    for i in (1, 2):
        save_file({"a": torch.ones(1)}, tmp_path / f"diffusion_pytorch_model-0000{i}-of-00002.safetensors")
    with pytest.raises(InputError, match=r"several files match .* no index"):
        read_dit(tmp_path)


def test_misfitting_weights_name_keys_and_shapes(micro_file: Path) -> None:
    state_dict = read_checkpoint(micro_file)
    state_dict["extra.weight"] = state_dict.pop("head.head.bias")
    state_dict["blocks.0.ffn.0.weight"] = torch.zeros(7, 24)
    for model in (tiny_dit(MICRO), on_meta(lambda: WanDiT(MICRO))):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(InputError) as caught:
            load_into(model, state_dict, micro_file)
        assert str(caught.value) == (
            f"{micro_file}: weights do not fit the model; missing: head.head.bias; unexpected: extra.weight; "
            "wrong shape: blocks.0.ffn.0.weight is [7, 24], expected [40, 24]"
        )
        after = model.state_dict()
        assert all(tensor.is_meta or torch.equal(tensor, after[name]) for name, tensor in before.items())
    with pytest.raises(InputError, match=r"missing: .*, .*, .* and \d+ more"):
        load_into(tiny_dit(MICRO), {"extra.weight": torch.ones(1)}, micro_file)


def test_loading_converts_to_the_dtype_asked_for(micro_file: Path) -> None:
    state_dict = read_checkpoint(micro_file)
    with torch.device("meta"):
        model = WanDiT(MICRO)
    load_into(model, state_dict, micro_file, torch.bfloat16)
    assert all(parameter.dtype == torch.bfloat16 and parameter.requires_grad for parameter in model.parameters())
    model = tiny_dit(MICRO, seed=1).to(torch.bfloat16)
    load_into(model, state_dict, micro_file)
    assert same(model.state_dict(), {name: tensor.bfloat16() for name, tensor in state_dict.items()})


def test_written_safetensors_hold_any_tensor(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    tensors = {
        "strided": base.t(),
        "shared": base,
        "view": base[1:],
        "half": base.half(),
        "odd": torch.arange(3, dtype=torch.uint8),
        "scalar": torch.tensor(5),
        "empty": torch.ones(0, 2),
        "parameter": nn.Parameter(torch.ones(2)),
        "small": torch.ones(3, dtype=torch.float8_e4m3fn),
        "flag": torch.tensor([True, False]),
    }
    write_safetensors(tmp_path / "x.safetensors", tensors, {"note": "ü"})
    for found in (load_file(tmp_path / "x.safetensors"), read_checkpoint(tmp_path / "x.safetensors")):
        assert found.keys() == tensors.keys()
        assert all(found[name].dtype == tensor.dtype for name, tensor in tensors.items())
        assert all(torch.equal(found[name].double(), tensor.double()) for name, tensor in tensors.items())
    write_safetensors(tmp_path / "y.safetensors", tensors, dtype=torch.bfloat16)
    assert load_file(tmp_path / "y.safetensors")["strided"].dtype == torch.bfloat16
    assert load_file(tmp_path / "y.safetensors")["scalar"].dtype == torch.int64


def test_written_pickle_holds_only_what_it_names(tmp_path: Path) -> None:
    large = torch.arange(100_000.0)
    write_pickle(tmp_path / "x.pt", {"view": large[5:8]})
    assert torch.equal(read_checkpoint(tmp_path / "x.pt")["view"], large[5:8])
    assert (tmp_path / "x.pt").stat().st_size < 10_000


@pytest.mark.parametrize("write", [write_safetensors, write_pickle])
def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, write: Callable[..., None]) -> None:
    path = tmp_path / "weights"
    write(path, {"a": torch.ones(3)})
    old = path.read_bytes()
    with file_size_limit(50_000), pytest.raises(InputError, match=r"weights: cannot write .File too large"):
        write(path, {"a": torch.ones(100_000)})
    assert [file.name for file in tmp_path.iterdir()] == ["weights"]
    assert path.read_bytes() == old
    with pytest.raises(InputError, match="cannot write"):
        write(path / "below" / "a_file", {"a": torch.ones(3)})
    with pytest.raises(InputError, match=r"below: cannot write \(.*weights is not a folder\)$"):
        write(path / "below", {"a": torch.ones(3)})


def test_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def write_half() -> None:
        with atomic_file(tmp_path / "x") as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert not list(tmp_path.iterdir())


def test_json_keeps_text_as_it_is(tmp_path: Path) -> None:
    content = {"prompt": "früh 狐狸 🦊", "broken": "\udcff"}
    write_json(tmp_path / "x.json", content)
    assert "früh 狐狸 🦊" in (tmp_path / "x.json").read_text(encoding="utf-8")
    assert read_json(tmp_path / "x.json") == content


@pytest.mark.parametrize("num_bytes", [1, 5000, 64 * 4096, 64 * 4096 + 1, 3_000_000])
def test_fingerprint_is_of_the_content(tmp_path: Path, num_bytes: int) -> None:
    content = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    path, copy = tmp_path / "x.pt", tmp_path / "copy.bin"
    path.write_bytes(content.numpy().tobytes())
    shutil.copy(path, copy)
    os.utime(copy, (1, 1))
    digest = fingerprint(path)
    assert digest == fingerprint(copy)
    assert len(digest) == 16
    # Of large files 64 blocks are sampled: a change of a fiftieth cannot fall between them. Training changes all.
    size = 1 if num_bytes <= 64 * 4096 else num_bytes // 50
    for start in (0, num_bytes // 2, num_bytes - size):
        changed = content.clone()
        changed[start : start + size] ^= 1
        copy.write_bytes(changed.numpy().tobytes())
        assert fingerprint(copy) != digest, start
    copy.write_bytes(path.read_bytes() + b"\0")
    assert fingerprint(copy) != digest


def test_fingerprint_covers_shards(tmp_path: Path, fake_module: ModuleType) -> None:
    fake_module.write_dit(fake_module.Fake(seed=3), MICRO, tmp_path / "a", 3, torch.float32)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    index = "diffusion_pytorch_model.safetensors.index.json"
    assert fingerprint(tmp_path / "a" / index) == fingerprint(tmp_path / "b" / index)
    shard = max((tmp_path / "b").glob("*.safetensors"))
    write_safetensors(shard, {name: tensor + 1 for name, tensor in load_file(shard).items()})
    assert fingerprint(tmp_path / "a" / index) != fingerprint(tmp_path / "b" / index)
    shard.unlink()
    with pytest.raises(InputError, match=r"00003-of-00003\.safetensors: cannot read"):
        fingerprint(tmp_path / "b" / index)


# --- LoRA -------------------------------------------------------------------------------------------------------------

RANK, ALPHA = 3, 6.0


def random_lora(model: WanDiT) -> dict[str, Tensor]:
    """PEFT's own state dict of `model` (which becomes wrapped) with random A and B."""
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith("blocks.")]
    wrapped = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules=linears))
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    state = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(wrapped).items()}
    wrapped.merge_and_unload()
    return state


def test_merged_lora_equals_pefts_merge(tmp_path: Path) -> None:
    base, oracle = tiny_dit(MICRO), tiny_dit(MICRO)
    torch.save({"generator_lora": random_lora(oracle), "critic_lora": {}, "step": 5}, tmp_path / "lora.pt")
    lora = read_lora(tmp_path / "lora.pt")
    assert len(lora) == 10 * MICRO.num_layers
    merged = merge_lora(base.state_dict(), lora, ALPHA, "lora.pt")
    assert merged.keys() == oracle.state_dict().keys()
    for name, tensor in oracle.state_dict().items():
        torch.testing.assert_close(merged[name], tensor, atol=1e-6, rtol=1e-6)
    assert not torch.equal(merged["blocks.1.ffn.2.weight"], base.state_dict()["blocks.1.ffn.2.weight"])
    half = {name: tensor.bfloat16() for name, tensor in base.state_dict().items()}
    a, b = lora["blocks.0.ffn.2"]
    expected = (half["blocks.0.ffn.2.weight"].float() + ALPHA / RANK * b @ a).bfloat16()
    assert torch.equal(merge_lora(half, lora, ALPHA, "lora.pt")["blocks.0.ffn.2.weight"], expected)
    narrow = merge_lora(base.state_dict(), lora, ALPHA, "lora.pt", torch.bfloat16)
    for name, tensor in narrow.items():
        is_merged = name.removesuffix(".weight") in lora
        assert torch.equal(tensor, merged[name].bfloat16() if is_merged else base.state_dict()[name])
        assert tensor.dtype == (torch.bfloat16 if is_merged else torch.float32)


def test_attached_lora_equals_merged_and_comes_back_out(tmp_path: Path) -> None:
    model, base = tiny_dit(MICRO), tiny_dit(MICRO)
    state = random_lora(tiny_dit(MICRO))
    lora = parse_lora(state, "lora.pt")
    load_into(base, merge_lora(base.state_dict(), lora, ALPHA, "lora.pt"), "lora.pt")
    attach_lora(model, RANK, ALPHA, lora, "lora.pt")
    torch.testing.assert_close(flow(model), flow(base), atol=1e-5, rtol=1e-5)
    attached = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" in name}
    assert same(peft_names(attached), state)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if ".lora_" in name
    }
    fresh = tiny_dit(MICRO)
    attach_lora(fresh, RANK, ALPHA)
    assert torch.equal(flow(fresh), flow(tiny_dit(MICRO)))


@pytest.mark.parametrize("prefix", ["", "model.", "base_model.model.model.", "base_model.model._fsdp_wrapped_module."])
@pytest.mark.parametrize("adapter", ["", ".default"])
def test_lora_name_variants(tmp_path: Path, prefix: str, adapter: str) -> None:
    a, b = torch.randn(2, 24), torch.randn(24, 2)
    module = f"{prefix}blocks.0.self_attn.q"
    state = {f"{module}.lora_A{adapter}.weight": a, f"{module}.lora_B{adapter}.weight": b}
    write_safetensors(tmp_path / "lora.safetensors", state)
    lora = read_lora(tmp_path / "lora.safetensors")
    assert lora.keys() == {"blocks.0.self_attn.q"}
    assert all(torch.equal(x, y) for x, y in zip(lora["blocks.0.self_attn.q"], (a, b), strict=True))


def test_bad_lora_is_refused() -> None:
    a, b = torch.randn(2, 24), torch.randn(24, 2)
    q, k = "blocks.0.self_attn.q", "blocks.0.self_attn.k"
    good = {f"{q}.lora_A.weight": a, f"{q}.lora_B.weight": b}
    weights = tiny_dit(MICRO).state_dict()

    def merge(changes: dict[str, Any]) -> None:
        merge_lora(weights, parse_lora(good | changes, "l.pt"), 1.0, "l.pt")

    merge({})
    with pytest.raises(InputError, match=r"l\.pt: has no generator_lora; it holds critic_lora"):
        parse_lora({"critic_lora": good}, "l.pt")
    with pytest.raises(InputError, match=r"l\.pt: blocks\.0\.self_attn\.q\.lora_magnitude_vector is not a LoRA weight"):
        merge({f"{q}.lora_magnitude_vector": a})
    with pytest.raises(InputError, match=r"l\.pt: lora_A or lora_B is missing for blocks\.0\.self_attn\.k"):
        merge({f"{k}.lora_A.weight": a})
    with pytest.raises(InputError, match=r"do not fit each other: blocks\.0\.self_attn\.q"):
        merge({f"{q}.lora_A.weight": torch.randn(5, 24)})
    with pytest.raises(InputError, match=r"ranks differ between modules: \[2, 5\]"):
        merge({f"{k}.lora_A.weight": torch.randn(5, 24), f"{k}.lora_B.weight": torch.randn(24, 5)})
    with pytest.raises(InputError, match=r"no such modules to apply LoRA to: blocks\.9\.ffn\.0"):
        merge({"blocks.9.ffn.0.lora_A.weight": a, "blocks.9.ffn.0.lora_B.weight": b})
    with pytest.raises(InputError, match=r"self_attn.q updates \[30, 24\], the weight is \[24, 24\]"):
        merge({f"{q}.lora_B.weight": torch.randn(30, 2)})
    with pytest.raises(InputError, match=r"LoRA of rank 2, not adapter\.rank=256"):
        attach_lora(tiny_dit(MICRO), 256, 256, parse_lora(good, "l.pt"), "l.pt")
    with pytest.raises(InputError, match="holds no tensors"):
        parse_lora({}, "l.pt")
    for alpha in (float("nan"), float("inf"), 0.0, -1.0):
        with pytest.raises(InputError, match=rf"^l\.pt: LoRA alpha is {alpha}, accepted is a positive number$"):
            merge_lora(weights, parse_lora(good, "l.pt"), alpha, "l.pt")


# --- conversion -------------------------------------------------------------------------------------------------------


def run_convert(*arguments: object) -> None:
    parser = argparse.ArgumentParser()
    conversion.add_arguments(parser)
    conversion.run(parser.parse_args([str(argument) for argument in arguments]))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A training checkpoint with averaged weights; a head of 128 so that no config is needed."""
    weights = tiny_dit(replace(MICRO, dim=128, num_heads=1)).state_dict()
    ema = {f"model._fsdp_wrapped_module.{name}": tensor * 2 for name, tensor in weights.items()}
    generator = {f"model.{name}": tensor for name, tensor in weights.items()}
    torch.save({"generator": generator, "generator_ema": ema, "step": 1}, tmp_path / "checkpoint.pt")
    return tmp_path / "checkpoint.pt"


def test_convert_merges_lora_chooses_ema_and_casts(tmp_path: Path, checkpoint: Path) -> None:
    wanted = replace(MICRO, dim=128, num_heads=1)
    model = tiny_dit(wanted)
    with pytest.raises(InputError, match="number of heads is not known"):
        run_convert(checkpoint, tmp_path / "out.safetensors")
    write_json(checkpoint.parent / "config.json", wan_dit_config(wanted))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.save({"generator_lora": random_lora(model)}, tmp_path / "lora.pt")
    lora = read_lora(tmp_path / "lora.pt")

    out = tmp_path / "out.safetensors"
    run_convert(checkpoint, out)
    config, found = read_dit(out)
    assert config == wanted
    assert same(found, weights)
    run_convert(checkpoint, out, "--lora", tmp_path / "lora.pt", "--alpha", ALPHA)
    assert same(read_dit(out)[1], merge_lora(weights, lora, ALPHA, ""))
    run_convert(checkpoint, out, "--lora", tmp_path / "lora.pt")
    assert same(read_dit(out)[1], merge_lora(weights, lora, RANK, ""))
    run_convert(checkpoint, tmp_path / "hub", "--to", "diffusers", "--ema", "--dtype", "bf16")
    assert same(read_dit(tmp_path / "hub")[1], {name: (tensor * 2).bfloat16() for name, tensor in weights.items()})
    WanTransformer3DModel.from_pretrained(tmp_path / "hub" / "transformer")


def test_convert_one_part(tmp_path: Path, wan: Path) -> None:
    run_convert(wan, tmp_path / "vae.safetensors", "--part", "vae")
    assert same(read_vae(tmp_path / "vae.safetensors")[1], read_vae(wan)[1])
    run_convert(tmp_path / "vae.safetensors", tmp_path / "hub", "--to", "diffusers")
    assert [folder.name for folder in (tmp_path / "hub").iterdir()] == ["vae"]
    AutoencoderKLWan.from_pretrained(tmp_path / "hub" / "vae")


def test_convert_refuses_and_writes_nothing(tmp_path: Path, wan: Path, checkpoint: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match="one file holds one part"):
        run_convert(wan, tmp_path / "all.safetensors")
    with pytest.raises(InputError, match="holds no vae weights"):
        run_convert(checkpoint, out, "--part", "vae")
    with pytest.raises(InputError, match="has no transformer to merge"):
        run_convert(wan, out, "--part", "vae", "--lora", checkpoint)
    with pytest.raises(InputError, match="holds no Wan weights"):
        run_convert(wan / "google", out)
    with pytest.raises(InputError, match=r"absent: cannot read .No such file"):
        run_convert(tmp_path / "absent", out)
    state_dict = tiny_dit(MICRO).state_dict() | {"blocks.1.norm3.bias": torch.zeros(5)}
    write_safetensors(tmp_path / "source" / "diffusion_pytorch_model.safetensors", state_dict)
    write_json(tmp_path / "source" / "config.json", wan_dit_config(MICRO))
    with pytest.raises(InputError, match=r"wrong shape: blocks\.1\.norm3\.bias is \[5\], expected \[24\]"):
        run_convert(tmp_path / "source", out)
    assert not out.exists()
    with file_size_limit(500_000), pytest.raises(InputError, match="cannot write"):
        run_convert(wan, out)
    assert not [path for path in out.rglob("*") if path.is_file()]


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
def test_convert_refuses_to_write_a_pickle(tmp_path: Path, checkpoint: Path, suffix: str) -> None:
    with pytest.raises(InputError, match=rf"o\{suffix}: a single file must end in \.safetensors"):
        run_convert(checkpoint, tmp_path / f"o{suffix}")
    assert not (tmp_path / f"o{suffix}").exists()


def test_convert_refuses_alpha_without_lora(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(InputError, match="alpha 8 is that of a LoRA, but none is given"):
        run_convert(checkpoint, tmp_path / "o.safetensors", "--alpha", 8)
    assert not (tmp_path / "o.safetensors").exists()


def test_convert_keeps_one_version_of_a_part_in_a_folder(tmp_path: Path, wan: Path) -> None:
    copy = shutil.copytree(wan, tmp_path / "wan")
    with pytest.raises(InputError, match="already has dit weights; choose another folder"):
        run_convert(copy, copy, "--to", "diffusers")
    run_convert(copy, copy, "--to", "wan", "--dtype", "bf16")  # the same files: replaced while they are mapped
    assert read_dit(copy)[1]["head.head.weight"].dtype == torch.bfloat16


def test_original_layout_refuses_a_vae_it_cannot_describe(tmp_path: Path) -> None:
    vae = WanVAE(VAEConfig(base_dim=4, latents_mean=(0.0,) * 16))
    metadata = {"part": "vae", "config": json.dumps({"latents_mean": [0.0] * 16})}
    write_safetensors(tmp_path / "vae.safetensors", vae.state_dict(), metadata)
    with pytest.raises(InputError, match="no place for the vae config"):
        run_convert(tmp_path / "vae.safetensors", tmp_path / "out", "--to", "wan")


# --- download script --------------------------------------------------------------------------------------------------


@pytest.fixture
def download(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a copy of the script in an empty checkout, from another folder, with only `bin/` on the path."""
    (tmp_path / "repo" / "scripts").mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    script = shutil.copy(ROOT / "scripts" / "download_weights.sh", tmp_path / "repo" / "scripts")
    for tool in ("bash", "dirname", "cat"):
        (tmp_path / "bin" / tool).symlink_to(str(shutil.which(tool)))

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(tmp_path / "bin" / "bash"), str(script), *arguments]
        environment = {"PATH": str(tmp_path / "bin")}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    return run


def test_download_script_fetches_into_the_repository(tmp_path: Path, download: Callable[..., Any]) -> None:
    hf = tmp_path / "bin" / "hf"
    hf.write_text('#!/usr/bin/env bash\necho "$PWD $*"\n'.replace("/usr/bin/env bash", str(tmp_path / "bin" / "bash")))
    hf.chmod(0o755)
    where = (tmp_path / "repo").resolve()
    expected = [
        f"{where} download Wan-AI/Wan2.1-T2V-1.3B --local-dir wan_models/Wan2.1-T2V-1.3B",
        f"{where} download Efficient-Large-Model/LongLive-1.3B --include models/* --local-dir longlive_models",
        f"{where} download Wan-AI/Wan2.1-T2V-14B --local-dir wan_models/Wan2.1-T2V-14B",
        f"{where} download gdhe17/Self-Forcing checkpoints/ode_init.pt --local-dir .",
        f"{where} download Efficient-Large-Model/LongLive-1.3B --include prompts/* --local-dir .",
    ]
    assert download().stdout.splitlines() == expected[:2]
    assert download("--teacher").stdout.splitlines() == expected


def test_download_script_explains_itself(download: Callable[..., Any]) -> None:
    assert "--teacher" in download("--help").stdout
    missing, unknown = download(), download("--tutor")
    assert (missing.returncode, unknown.returncode) == (2, 2)
    assert missing.stderr.startswith("error: the command hf is missing")
    assert unknown.stderr == "error: unknown argument --tutor; accepted are --teacher and --help\n"
