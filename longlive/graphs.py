"""Passes of small models replayed as CUDA graphs: what they compute takes less time than launching it kernel by kernel.

A graph reads and writes fixed memory: inputs are copied in, outputs copied out. It is captured at the first call with
tensors of its shapes, after a call that warms up. Layer 2.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from longlive.models.dit import TextKV, WanDiT
from longlive.models.kv_cache import CachePlan, KVCache


class GraphedModule:
    """The calls of a module on tensors alone, with their backward pass; equal to the module's own.

    A call must not come before the backward pass of the one before, where both are of the same shapes.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._calls: dict[tuple[object, ...], Callable[..., Any]] = {}

    def __call__(self, *args: Tensor) -> Any:
        key = (torch.is_grad_enabled(), *((arg.shape, arg.dtype, arg.requires_grad) for arg in args))
        if key not in self._calls:
            samples = tuple(arg.detach().clone().requires_grad_(arg.requires_grad) for arg in args)
            self._calls[key] = torch.cuda.make_graphed_callables(_Call(self.module), samples, allow_unused_input=True)
        return tree_map(torch.clone, self._calls[key](*args))


class _Call(nn.Module):
    """A module in which the graphed call takes the place of `forward`, which the inner one keeps."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.train(module.training)

    def forward(self, *args: Tensor) -> Any:
        return self.module(*args)


@dataclass(frozen=True)
class _Pass:
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    output: Tensor | None


class GraphedPasses:
    """A transformer's passes through a cache, without gradient; equal to its own.

    Graphs are of one cache, those of the last are dropped. Passes with gradient are the model's own.
    """

    def __init__(self, model: WanDiT) -> None:
        self.model = model
        self._cache: KVCache | None = None
        self._passes: dict[tuple[object, ...], _Pass] = {}

    @property
    def project_text(self) -> Callable[[Tensor], TextKV]:
        return self.model.project_text

    def __call__(self, latents: Tensor, timesteps: Tensor, text: TextKV, *, cache: KVCache, plan: CachePlan) -> Tensor:
        if plan.past is not None:
            return self.model(latents, timesteps, text, cache=cache, plan=plan)
        flow = self._replay(self.model, latents, timesteps, text, cache, plan)
        assert flow is not None
        return flow.clone()

    def remember(self, latents: Tensor, timesteps: Tensor, text: TextKV, *, cache: KVCache, plan: CachePlan) -> None:
        self._replay(self.model.remember, latents, timesteps, text, cache, plan)

    def _replay(
        self,
        function: Callable[..., Tensor | None],
        latents: Tensor,
        timesteps: Tensor,
        text: TextKV,
        cache: KVCache,
        plan: CachePlan,
    ) -> Tensor | None:
        if cache is not self._cache:
            self._cache, self._passes = cache, {}
        self.model.move_sink(cache, plan, *latents.shape[3:])
        visible = [plan.visible] if isinstance(plan.visible, Tensor) else []
        inputs = [latents, timesteps, plan.frames, plan.slots, *visible, *(value for pair in text for value in pair)]
        key = (
            *(function == self.model.remember, cache.layers[0].k.data_ptr(), plan.num_skipped, plan.num_sink_tokens),
            *(None if visible else plan.visible, *((value.shape, value.dtype) for value in inputs)),
        )
        if key not in self._passes:
            self._passes[key] = _capture(function, inputs, cache, plan)
        found = self._passes[key]
        for own, value in zip(found.inputs, inputs, strict=True):
            own.copy_(value)
        found.graph.replay()
        return found.output


@torch.no_grad()
def _capture(function: Callable[..., Tensor | None], inputs: list[Tensor], cache: KVCache, plan: CachePlan) -> _Pass:
    """The graph of a pass over these inputs; it is run to warm up, which leaves in the cache what it will anyway."""
    own = [value.clone() for value in inputs]
    latents, timesteps, frames, slots, *rest = own
    own_plan = replace(plan, frames=frames, slots=slots)
    if isinstance(plan.visible, Tensor):
        own_plan = replace(own_plan, visible=rest.pop(0))
    text = list(zip(rest[::2], rest[1::2], strict=True))

    def run() -> Tensor | None:
        return function(latents, timesteps, text, cache=cache, plan=own_plan)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        output = run()
    return _Pass(graph, own, output)
