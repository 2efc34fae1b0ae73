"""FP8 linear layers: rows and their scales, the two matmuls, and a transformer with and without."""

from copy import deepcopy

import pytest
import torch
from tiny import TINY_DIT, tiny_dit
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from longlive.errors import InputError
from longlive.models.dit import WanDiT
from longlive.quantize import (
    FLOAT8,
    Float8Linear,
    quantize_rows,
    quantize_weights,
    quantized_matmul,
    quantized_matmul_plain,
    use_float8,
)

CPU = torch.device("cpu")


def error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact.double()).norm() / exact.double().norm()).item()


def dit_inputs(device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    latents = torch.randn(2, 3, TINY_DIT.in_channels, 6, 8)
    text = torch.randn(2, TINY_DIT.text_len, TINY_DIT.text_dim)
    return latents.to(device), torch.tensor([700.0, 300.0], device=device), text.to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_fill_the_range_and_come_back(dtype: torch.dtype) -> None:
    rows = (torch.randn(40, 64) * torch.logspace(-6, 6, 40)[:, None]).to(dtype)
    values, scale = quantize_rows(rows)
    assert (values.dtype, scale.dtype, scale.shape) == (FLOAT8, torch.float32, (40, 1))
    assert (values.float().abs().amax(dim=1) == 448).all()
    restored = values.double() * scale
    # Three bits of mantissa: half a step is 1/16 of a value; below 2^-6 of the range's unit, half of 2^-9 of it.
    bound = torch.maximum(rows.double().abs() / 16, scale.double() * 2**-10)
    assert ((restored - rows.double()).abs() <= bound * 1.001).all()


def test_row_of_zeros_stays_zero() -> None:
    values, scale = quantize_rows(torch.zeros(2, 16))
    assert (values.float() == 0).all()
    assert (scale > 0).all()


def test_nan_is_not_hidden() -> None:
    rows = torch.randn(3, 16)
    rows[1, 4] = torch.nan
    values, scale = quantize_rows(rows)
    assert (values.float() * scale).isnan().any(dim=1).tolist() == [False, True, False]


def test_slice_of_rows_is_quantised_as_in_the_whole() -> None:
    weight = torch.randn(48, 32).bfloat16()
    values, scale = quantize_rows(weight)
    for start, stop in ((0, 16), (16, 48), (47, 48)):
        part, part_scale = quantize_rows(weight[start:stop])
        assert torch.equal(part.view(torch.uint8), values[start:stop].view(torch.uint8))
        assert torch.equal(part_scale, scale[start:stop])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 3, 7, 64)])
def test_layer_is_the_product_of_what_was_quantised(shape: tuple[int, ...], bias: bool) -> None:
    linear, x = nn.Linear(64, 48, bias=bias), torch.randn(shape) * 3
    layer = Float8Linear(linear, quantized_matmul_plain)
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    values, scale = quantize_rows(x)
    exact = (values.double() * scale) @ (layer.weight.double() * layer.weight_scale).t()
    exact = exact + linear.bias.double() if bias else exact
    found = layer(x)
    assert (found.shape, found.dtype) == ((*shape[:-1], 48), torch.float32)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert error(found, linear(x)) < 0.05


def test_layer_in_bfloat16() -> None:
    linear, x = nn.Linear(256, 64).bfloat16(), torch.randn(9, 256).bfloat16()
    layer = Float8Linear(linear, quantized_matmul_plain)
    assert layer(x).dtype == torch.bfloat16
    assert error(layer(x), Float8Linear(linear.float(), quantized_matmul_plain)(x.float())) < 1e-2


def test_layer_refuses_gradient_and_casts() -> None:
    layer = Float8Linear(nn.Linear(16, 16), quantized_matmul_plain)
    with pytest.raises(AssertionError, match="gradient"):
        layer(torch.randn(2, 16, requires_grad=True))
    with pytest.raises(AssertionError, match="cast"):
        layer.bfloat16()(torch.randn(2, 16).bfloat16())


def test_fast_matmul_keeps_the_kernels_contract() -> None:
    """Layouts, types and sizes that the CUDA kernel accepts, checked by its shape function: no device is needed."""
    with FakeTensorMode():
        x, x_scale = quantize_rows(torch.empty(33, 64, device="cuda", dtype=torch.bfloat16))
        weight, weight_scale = quantize_rows(torch.empty(48, 64, device="cuda"))
        for bias in (None, torch.empty(48, device="cuda")):
            out = quantized_matmul(x, x_scale, weight, weight_scale, bias, torch.bfloat16)
            assert (out.shape, out.dtype) == ((33, 48), torch.bfloat16)


def test_transformer_in_float8_is_close() -> None:
    plain, quantized = tiny_dit(), tiny_dit()
    use_float8(quantized, CPU)
    kept = {name for name, module in quantized.named_modules() if isinstance(module, nn.Linear)}
    assert kept == {
        name
        for name, module in plain.named_modules()
        if isinstance(module, nn.Linear) and name.split(".")[0] != "blocks"
    }
    inputs = dit_inputs()
    flow, exact = quantized(*inputs), plain(*inputs)
    assert 1e-4 < error(flow, exact) < 0.1


def test_transformer_loads_from_the_meta_device_one_tensor_at_a_time() -> None:
    plain, expected = tiny_dit(), tiny_dit()
    use_float8(expected, CPU)
    with torch.device("meta"):
        model = WanDiT(TINY_DIT).requires_grad_(False)
    use_float8(model, CPU)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    model.to_empty(device="cpu")
    targets = model.state_dict()
    loaded = []
    for name, tensor in quantize_weights(plain.state_dict().items(), model):
        assert targets[name].dtype == tensor.dtype
        targets[name].copy_(tensor)
        loaded.append(name)
    assert sorted(loaded) == sorted(targets)
    inputs = dit_inputs()
    assert torch.equal(model(*inputs), expected(*inputs))


def test_blocks_compile_to_one_graph() -> None:
    torch.compiler.reset()
    model, compiled = tiny_dit(), tiny_dit()
    for dit in (model, compiled):
        use_float8(dit, CPU)
    for block in compiled.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    inputs = dit_inputs()
    assert torch.equal(compiled(*inputs), model(*inputs))


def test_sizes_that_fp8_cannot_have_are_named() -> None:
    model = nn.ModuleDict({"blocks": nn.Linear(24, 32)})
    with pytest.raises(InputError, match="blocks: 24 to 32 features cannot be computed in FP8"):
        use_float8(model, CPU, prefix="blocks")


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("tokens", "in_features", "out_features"), [(1, 64, 48), (777, 1536, 8960), (4096, 5120, 5120)]
)
def test_fast_matmul_agrees_with_its_twin(tokens: int, in_features: int, out_features: int, bias: bool) -> None:
    linear = nn.Linear(in_features, out_features, bias=bias, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(tokens, in_features, device="cuda", dtype=torch.bfloat16)
    fast, plain = (Float8Linear(linear, matmul)(x) for matmul in (quantized_matmul, quantized_matmul_plain))
    assert (fast.shape, fast.dtype) == ((tokens, out_features), torch.bfloat16)
    assert error(fast, plain) < 1e-2
    assert error(fast, linear(x)) < 0.05


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_transformer_in_float8_on_the_gpu(compiled: bool) -> None:
    torch.compiler.reset()
    device = torch.device("cuda")
    plain = tiny_dit().to(device, torch.bfloat16)
    quantized, twin = deepcopy(plain), deepcopy(plain)
    use_float8(quantized, device)
    use_float8(twin, CPU)  # the plain matmul, on the GPU
    if compiled:
        for block in quantized.blocks:
            block.compile(fullgraph=True)
    inputs = dit_inputs(device)
    with torch.no_grad():
        flow, same, exact = (model(*inputs) for model in (quantized, twin, plain))
    assert error(flow, exact) < 0.07
    assert error(flow, same) < 0.05  # roundings of bfloat16 that differ can fall on either side of a step of float8
