"""FP8 linear layers for frozen networks: half the memory of bf16, and faster where the GPU multiplies FP8.

Every row of a weight and every token carries a scale of its own: value = float8 * scale, with scale = max |row| / 448,
so that a row fills the range of e4m3. Weights are quantised once, tokens in each pass.

Shapes: M tokens, K input and N output features of a layer.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longlive.errors import InputError

FLOAT8 = torch.float8_e4m3fn
_MAX = torch.finfo(FLOAT8).max
_SMALLEST_ROW = 1e-12  # rows of zeros keep a scale that can be divided by
_MULTIPLE = 16  # what the FP8 kernels ask of K and N

QuantizedMatmul = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, torch.dtype], Tensor]
"""x [M, K] float8, its scale [M, 1], weight [N, K] float8, its scale [N, 1], bias [N], type -> x weight^T + bias in
that type, float32 or bfloat16: [M, N]."""


def quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Float8 values [..., K] and float32 scales [..., 1] of rows [..., K]; each row depends on itself alone."""
    scale = rows.abs().amax(dim=-1, keepdim=True).float().clamp(min=_SMALLEST_ROW) / _MAX
    return (rows / scale).to(FLOAT8), scale  # divided in float32, whatever the type of the rows


def quantized_matmul(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """A `QuantizedMatmul` on the FP8 units of the GPU; the result is rounded to bfloat16."""
    bias = None if bias is None else bias.bfloat16()
    # The kernel reads the first matrix by rows and the second by columns, which are the rows of the weight.
    scales = {"scale_a": x_scale, "scale_b": weight_scale.t()}
    out = torch._scaled_mm(
        x.contiguous(), weight.t(), **scales, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
    )
    return out.to(dtype)


def quantized_matmul_plain(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """A `QuantizedMatmul` that runs everywhere: both types hold float8 values exactly, the scales follow in float32."""
    out = F.linear(x.to(dtype), weight.to(dtype)) * x_scale * weight_scale.t()
    return (out if bias is None else out + bias).to(dtype)


def select_matmul(device: torch.device) -> QuantizedMatmul:
    """The matmul for a device: `quantized_matmul` on GPUs with FP8 units (Ada, Hopper and newer), or its plain twin."""
    has_float8 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
    return quantized_matmul if has_float8 else quantized_matmul_plain


class Float8Linear(nn.Module):
    """A frozen linear layer in FP8. Its parameters all have the output features first, as sharding by rows needs.

    Casting the module casts the float8 weight as well: choose the type first, then quantise.
    """

    def __init__(self, linear: nn.Linear, matmul: QuantizedMatmul) -> None:
        """Quantise `linear`, which may be on the meta device: then the layer is too, to be loaded later."""
        super().__init__()
        self.matmul = matmul
        weight, scale = quantize_rows(linear.weight.detach())
        self.weight = nn.Parameter(weight, requires_grad=False)  # [N, K]
        self.weight_scale = nn.Parameter(scale, requires_grad=False)  # [N, 1]
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)  # [N]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in the type of x, without gradient."""
        assert self.weight.dtype == FLOAT8, f"the weight was cast to {self.weight.dtype}"
        assert not (x.requires_grad and torch.is_grad_enabled()), "FP8 layers pass no gradient"
        tokens, scale = quantize_rows(x.reshape(-1, x.shape[-1]))
        out = self.matmul(tokens, scale, self.weight, self.weight_scale, self.bias, x.dtype)
        return out.view(*x.shape[:-1], -1)


def use_float8(model: nn.Module, device: torch.device, prefix: str = "blocks.") -> None:
    """Replace every linear layer of `model` whose name begins with `prefix` by a `Float8Linear`, in place.

    device: where the model will run; it may still be on the meta device, or hold weights, which are quantised. Raises
    InputError when the sizes of a layer are no multiples of 16.
    """
    matmul = select_matmul(device)
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    for name, layer in layers:
        if not name.startswith(prefix):
            continue
        if layer.in_features % _MULTIPLE or layer.out_features % _MULTIPLE:
            size = f"{layer.in_features} to {layer.out_features} features"
            raise InputError(f"{name}: {size} cannot be computed in FP8; accepted are multiples of {_MULTIPLE}")
        model.set_submodule(name, Float8Linear(layer, matmul))


def quantize_weights(weights: Iterable[tuple[str, Tensor]], model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The names and tensors of `model`, after `use_float8`, from those of the model as it was before.

    Yields one at a time, quantised only then: who copies each into place never holds two copies of the weights.
    """
    float8 = {f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, Float8Linear)}
    for name, tensor in weights:
        if name in float8:
            weight, scale = quantize_rows(tensor)
            yield name, weight
            yield f"{name}_scale", scale
        else:
            yield name, tensor
