"""WanDiT against diffusers' transformer, and its own promises: any size, batches, cached prompts, gradients."""

from dataclasses import replace

import pytest
import torch
from diffusers import WanTransformer3DModel
from tiny import TINY_DIT, randomize, tiny_dit
from torch import Tensor

from longlive.errors import InputError
from longlive.models.attention import BACKENDS, select_attention
from longlive.models.dit import NUM_PLACE_CHANNELS, PRESETS, DiTConfig, WanDiT, init_weights, place_channels
from longlive.models.kv_cache import CacheConfig
from longlive.weights.formats import DIT

TOLERANCE = {"atol": 2e-5, "rtol": 0.0}


def inputs(batch: int = 2, frames: int = 3, height: int = 6, width: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    config = TINY_DIT
    latents = torch.randn(batch, frames, config.in_channels, height, width)
    return latents, torch.tensor([937.5, 20.0])[:batch], torch.randn(batch, config.text_len, config.text_dim)


@pytest.mark.parametrize(("height", "width"), [(6, 8), (2, 14)])
def test_agrees_with_diffusers(height: int, width: int) -> None:
    config = TINY_DIT
    oracle = WanTransformer3DModel(
        patch_size=config.patch_size,
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
    ).eval()
    randomize(oracle)
    model = WanDiT(config).eval()
    model.load_state_dict(DIT.to_original(oracle.state_dict()))
    latents, timesteps, text = inputs(height=height, width=width)
    with torch.no_grad():
        ours = model(latents, timesteps, text)
        theirs = oracle(latents.transpose(1, 2), timesteps, text, return_dict=False)[0].transpose(1, 2)
    torch.testing.assert_close(ours, theirs, **TOLERANCE)


def test_presets_have_the_published_sizes() -> None:
    with torch.device("meta"):
        sizes = {name: sum(p.numel() for p in WanDiT(PRESETS[name]).parameters()) for name in ("1.3B", "14B")}
    assert sizes == {"1.3B": 1_418_996_800, "14B": 14_288_491_584}


def test_batch_equals_one_by_one() -> None:
    model, (latents, timesteps, text) = tiny_dit(), inputs()
    both = model(latents, timesteps, text)
    for i in range(2):
        alone = model(latents[i : i + 1], timesteps[i : i + 1], text[i : i + 1])
        torch.testing.assert_close(both[i : i + 1], alone, **TOLERANCE)


def test_projected_prompt_equals_embeddings() -> None:
    model, (latents, timesteps, text) = tiny_dit(), inputs()
    torch.testing.assert_close(model(latents, timesteps, model.project_text(text)), model(latents, timesteps, text))


def test_timesteps_per_frame() -> None:
    model, (latents, timesteps, text) = tiny_dit(), inputs()
    per_frame = timesteps[:, None].expand(-1, latents.shape[1])
    torch.testing.assert_close(model(latents, per_frame, text), model(latents, timesteps, text), **TOLERANCE)


def test_remember_leaves_what_a_whole_pass_leaves() -> None:
    model, (latents, _, text) = tiny_dit(), inputs()
    caches = [model.new_cache(CacheConfig(6, 1), 2, 6, 8) for _ in range(2)]
    zero = torch.zeros(2)
    model(latents, zero, text, cache=caches[0], plan=caches[0].plan(0, 3))
    model.remember(latents, zero, text, cache=caches[1], plan=caches[1].plan(0, 3))
    for a, b in zip(caches[0].layers, caches[1].layers, strict=True):
        assert torch.equal(a.k, b.k)
        assert torch.equal(a.v, b.v)


def test_every_parameter_gets_a_gradient() -> None:
    model = WanDiT(TINY_DIT)
    randomize(model)
    model(*inputs()).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert (parameter.grad != 0).any(), name


def test_fresh_weights_predict_no_flow() -> None:
    model = WanDiT(TINY_DIT)
    init_weights(model)
    assert (model(*inputs()) == 0).all()


def test_a_patch_knows_its_place_only_where_it_is_told() -> None:
    """Of latents that are the same everywhere, attention of relative positions makes the same everywhere."""
    latents = torch.randn(1, 1, TINY_DIT.in_channels, 1, 1).expand(-1, 3, -1, 6, 8)
    text, timesteps = torch.randn(1, TINY_DIT.text_len, TINY_DIT.text_dim), torch.tensor([900.0])
    for sees_place in (False, True):
        model = WanDiT(replace(TINY_DIT, sees_place=sees_place)).eval()
        randomize(model)
        corners = model(latents, timesteps, text)[0, 0, 0, ::4, ::6].flatten()
        differences = (corners[:, None] - corners).abs() + torch.eye(4)
        assert (differences > 1e-2).all() if sees_place else (differences - torch.eye(4) < 1e-5).all()


def test_places_are_mirrored_by_sines() -> None:
    place = place_channels(4, 6, torch.device("cpu"))
    assert place.shape == (NUM_PLACE_CHANNELS, 4, 6)
    assert place.abs().max() <= 1
    torch.testing.assert_close(place[0].flip(0), -place[0])  # of rows, from the top to the bottom
    torch.testing.assert_close(place[1].flip(1), -place[1])  # of columns
    assert (place[0].diff(dim=0) > 0).all()


def test_what_files_say_of_a_model() -> None:
    """Nothing of places for Wan's, so that what was written before there were any still fits."""
    assert "sees_place" not in TINY_DIT.told()
    assert DiTConfig(**replace(TINY_DIT, sees_place=True).told()) == replace(TINY_DIT, sees_place=True)


def test_impossible_sizes() -> None:
    with pytest.raises(ValueError, match="num_heads"):
        DiTConfig(dim=50, num_heads=4)
    with pytest.raises(ValueError, match="patch_size"):
        DiTConfig(patch_size=(2, 2, 2))


def test_attention_is_chosen_by_name() -> None:
    cpu = torch.device("cpu")
    assert select_attention("auto", cpu, torch.float32) is BACKENDS["sdpa"]
    with pytest.raises(InputError, match="unknown; accepted are auto, sdpa"):
        select_attention("falsh", cpu, torch.float32)
    with pytest.raises(InputError, match="not available here"):
        select_attention("cudnn", cpu, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cudnn", "flash2", "flash3", "auto"])
def test_kernels_agree(name: str) -> None:
    device = torch.device("cuda")
    try:
        attention = select_attention(name, device, torch.bfloat16)
    except InputError as error:
        pytest.skip(str(error))
    q, k, v = (torch.randn(1, 12, n, 128, device=device, dtype=torch.bfloat16) for n in (600, 900, 900))
    exact = BACKENDS["sdpa"](q.double(), k.double(), v.double())
    assert (attention(q, k, v).double() - exact).norm() / exact.norm() < 1e-2


def test_compiled_blocks_agree_with_plain_ones() -> None:
    """The graphs that `compile=true` captures, with the cache written in place, run by the reference backend."""
    torch.compiler.reset()
    plain, compiled = tiny_dit(), tiny_dit()
    for block in compiled.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    _, _, prompt = inputs(batch=1)
    for relative in (False, True):
        flows = []
        for model in (plain, compiled):
            cache, text = model.new_cache(CacheConfig(6, 2, relative), 1, 6, 8), model.project_text(prompt)
            torch.manual_seed(0)
            for start in range(0, 12, 2):
                plan, latents = cache.plan(start, 2), torch.randn(1, 2, TINY_DIT.in_channels, 6, 8)
                flows.append(model(latents, torch.tensor([500.0]), text, cache=cache, plan=plan))
                model.remember(latents, torch.zeros(1), text, cache=cache, plan=plan)
        torch.testing.assert_close(torch.cat(flows[:6]), torch.cat(flows[6:]), **TOLERANCE)
