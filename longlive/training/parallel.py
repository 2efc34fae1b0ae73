"""Processes and the weights they share out: process group, device mesh, FSDP2, loading, gathering.

Over several processes trained networks are sharded with `fully_shard`. Masters are float32; a forward pass gathers a
block's weights in the compute type and lets go of them afterwards. A single process keeps them as they are: the
gathering alone would cost a small network most of its time.
With hybrid sharding each group of `shard_size` processes (a node) holds one copy, and copies are kept equal.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from longlive.distributed import world_size
from longlive.errors import InputError
from longlive.models.dit import WanDiT
from longlive.quantize import FLOAT8

TIMEOUT = timedelta(minutes=30)  # the main process may be making videos, or a slow disk be written


@dataclass(frozen=True)
class Group:
    """All processes of a run. mesh: dimension "shard", with hybrid sharding ("replicate", "shard")."""

    device: torch.device
    mesh: DeviceMesh

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        return dist.get_world_size()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process."""
        flags = torch.tensor(float(flag))  # on the CPU: the device is not waited for
        if self.world_size > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes."""
        sums = values.to(self.device, copy=True)
        if self.world_size > 1:
            dist.all_reduce(sums, dist.ReduceOp.SUM)
        return sums / self.world_size

    def barrier(self) -> None:
        """Wait for all processes."""
        self.any(False)

    def by_sample(self, local: Tensor) -> DTensor:
        """The samples [B, ...] of all processes as one tensor, of which each process holds its own."""
        return DTensor.from_local(local, self.mesh, [Shard(0)] * self.mesh.ndim, run_check=False)


@contextmanager
def process_group(device: torch.device, shard_size: int | None = None) -> Iterator[Group]:
    """Join the other processes, whose addresses torchrun's variables tell; a single process needs none of them.

    shard_size: processes that share one copy of the weights, by default all.
    """
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    where: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if world_size() == 1 else {}
    bound = device if device.type == "cuda" else None
    dist.init_process_group(backend, timeout=TIMEOUT, device_id=bound, **where)
    try:
        yield Group(device, make_mesh(device, shard_size or dist.get_world_size()))
    except BaseException:
        if dist.get_world_size() == 1:  # else leaving would wait for others, which may not come any more
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def make_mesh(device: torch.device, shard_size: int) -> DeviceMesh:
    """One dimension where all processes share one copy of the weights, two where there are several copies."""
    replicas = dist.get_world_size() // shard_size
    if replicas == 1:
        return init_device_mesh(device.type, (shard_size,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (replicas, shard_size), mesh_dim_names=("replicate", "shard"))


def shard(model: nn.Module, group: Group, compute_dtype: torch.dtype | None) -> None:
    """Share out the parameters over several processes, block by block, in place.

    compute_dtype: of forward and backward, by default their own. Gradients are averaged over all processes in float32.
    """
    if group.world_size == 1:
        return
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    blocks = list(model.blocks) if isinstance(model, WanDiT) else []
    for module in [*blocks, model]:
        fully_shard(module, mesh=group.mesh, mp_policy=policy)


@torch.no_grad()
def fill(model: nn.Module, values: Iterable[tuple[str, Tensor]], device: torch.device, source: object) -> None:
    """Give memory to a model on the meta device, sharded or not, and its parameters their values.

    values: whole tensors by parameter name, such as views of a mapped file: each process reads its own rows alone, one
    tensor at a time. Raises InputError naming `source` for a value that is NaN or infinite.
    """
    model.to_empty(device=device)
    parameters = dict(model.named_parameters())
    for name, value in values:
        parameter = parameters.pop(name)
        part = local(parameter)
        part.copy_(own_rows(value, parameter))
        if part.dtype != FLOAT8 and not torch.isfinite(part).all():
            raise InputError(f"{source}: NaN or infinite values in {name}")
    assert not parameters, f"no values for {list(parameters)[:3]}"


def own_rows(value: Tensor, parameter: Tensor) -> Tensor:
    """The part of `value` that this process holds of a parameter of its shape."""
    if not isinstance(parameter, DTensor):
        return value
    dim = _sharded_dim(parameter)
    assert dim is not None
    pieces = value.chunk(
        parameter.device_mesh.size(dim)
    )  # as FSDP2 divides: the last ranks may have fewer rows or none
    index = parameter.device_mesh.get_local_rank(dim)
    return pieces[index] if index < len(pieces) else value[:0]


def _sharded_dim(tensor: DTensor) -> int | None:
    """The dimension of the mesh over which the rows of a tensor are shared out."""
    dims = [i for i, placement in enumerate(tensor.placements) if isinstance(placement, Shard)]
    assert len(dims) <= 1, tensor.placements
    return dims[0] if dims else None


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, part: Tensor) -> Tensor:
    """What this process holds, as a part of a tensor shared out as `tensor` is."""
    if not isinstance(tensor, DTensor):
        return part
    return DTensor.from_local(
        part, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered from all processes, which must all ask; no gradient flows through it."""
    if not isinstance(tensor, DTensor):
        return tensor
    dim = _sharded_dim(tensor)
    if dim is None:  # every process has all of it, or its part of a sum
        return tensor.full_tensor()
    # full_tensor would do the same by ALLGATHER_COALESCED. Gloo's two threads note the name of what they did last
    # without a lock (torch 2.13): names of more than 15 letters are on the heap, which broke so. ALLGATHER is shorter.
    rows = -(-tensor.shape[0] // tensor.device_mesh.size(dim))
    own = tensor.to_local().detach()
    part = torch.cat([own, own.new_zeros(rows - own.shape[0], *own.shape[1:])])
    gathered = part.new_empty(tensor.device_mesh.size(dim), *part.shape)
    dist.all_gather(list(gathered), part, group=tensor.device_mesh.get_group(dim))
    return gathered.flatten(0, 1)[: tensor.shape[0]]


@torch.no_grad()
def copy_weights(target: WanDiT, values: Mapping[str, Tensor], lora_scale: float) -> None:
    """Give a plain model the weights of a trained one: gathered, LoRA merged, in the target's type.

    values: parameters by the trained model's names, with LoRA as peft names them; lora_scale: alpha / rank.
    """
    for name, parameter in target.named_parameters():
        module = name.removesuffix(".weight")
        down = values.get(f"{module}.lora_A.default.weight") if name.endswith(".weight") else None
        value = values.get(name)
        if value is None:
            value = values[name.replace(f"{name.rpartition('.')[0]}.", f"{name.rpartition('.')[0]}.base_layer.")]
        merged = whole(value)
        if down is not None:
            up = whole(values[f"{module}.lora_B.default.weight"])
            merged = torch.addmm(merged.float(), up.float(), whole(down).float(), alpha=lora_scale)
        parameter.copy_(merged)
