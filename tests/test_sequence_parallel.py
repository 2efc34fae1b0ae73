"""Sequence parallelism against the plain forward, in real processes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny import TINY_DIT, tiny_dit
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from longlive.errors import InputError
from longlive.models.attention import sdpa
from longlive.quantize import use_float8
from longlive.training.sequence_parallel import SequenceParallel, share_frames

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
FRAME_TOKENS = 3 * 4  # of latents 6 x 8


def own_sample(rank: int, num_frames: int = 5, batch_size: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timesteps [B, F] and text that differ between ranks."""
    torch.manual_seed(100 + rank)
    latents = torch.randn(batch_size, num_frames, TINY_DIT.in_channels, 6, 8)
    timesteps = torch.rand(batch_size, num_frames) * 1000
    return latents, timesteps, torch.randn(batch_size, TINY_DIT.text_len, TINY_DIT.text_dim)


def check_plain_model(rank: int, num_ranks: int) -> None:
    """Uneven shares; every rank attends with its own frames only, to all."""
    model, seen = tiny_dit(), []

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append((q.shape[2], k.shape[2], v.shape[2]))
        return sdpa(q, k, v)

    inputs = own_sample(rank)
    torch.testing.assert_close(SequenceParallel(model, attention=attention)(*inputs), model(*inputs), **TOLERANCE)
    own = share_frames(5, num_ranks)[rank] * FRAME_TOKENS
    assert set(seen) == {(own, 5 * FRAME_TOKENS, 5 * FRAME_TOKENS)}


def check_one_timestep_a_sample(rank: int, num_ranks: int) -> None:
    model = tiny_dit()
    latents, timesteps, text = own_sample(rank, num_frames=6, batch_size=1)
    flow = SequenceParallel(model)(latents, timesteps[:, 0], text)
    torch.testing.assert_close(flow, model(latents, timesteps[:, 0], text), **TOLERANCE)


def check_groups(rank: int, num_ranks: int) -> None:
    """The last rank is alone, the others share."""
    model, inputs = tiny_dit(), own_sample(rank)
    groups = [dist.new_group(ranks) for ranks in (list(range(num_ranks - 1)), [num_ranks - 1])]
    flow = SequenceParallel(model, groups[rank == num_ranks - 1])(*inputs)
    torch.testing.assert_close(flow, model(*inputs), **TOLERANCE)


def check_sharded_model(rank: int, num_ranks: int) -> None:
    """FSDP2 inside, with FP8 layers and without: float8 weights, scales and biases are sharded by rows."""
    inputs = own_sample(rank)
    for float8 in (False, True):
        model, sharded = tiny_dit(), tiny_dit()
        if float8:
            use_float8(model, torch.device("cpu"))
            use_float8(sharded, torch.device("cpu"))
        mesh = init_device_mesh("cpu", (num_ranks,))
        for module in (*sharded.blocks, sharded):
            fully_shard(module, mesh=mesh)
        weight = sharded.blocks[0].ffn[2].weight
        assert weight.to_local().shape == (TINY_DIT.dim // num_ranks, TINY_DIT.ffn_dim)
        assert weight.to_local().dtype == (torch.float8_e4m3fn if float8 else torch.float32)
        torch.testing.assert_close(SequenceParallel(sharded)(*inputs), model(*inputs), **TOLERANCE)


def check_compiled_blocks(rank: int, num_ranks: int) -> None:
    model, compiled = tiny_dit(), tiny_dit()
    for block in compiled.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    parallel, inputs = SequenceParallel(compiled), own_sample(rank)
    torch.testing.assert_close(parallel(*inputs), model(*inputs), **TOLERANCE)
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(parallel(*inputs), model(*inputs), **TOLERANCE)


def check_refusals(rank: int, num_ranks: int) -> None:
    parallel = SequenceParallel(tiny_dit())
    with pytest.raises(InputError, match=f"{num_ranks} ranks: the clip has only {num_ranks - 1} latent frames"):
        parallel(*own_sample(rank, num_frames=num_ranks - 1))
    with torch.enable_grad(), pytest.raises(AssertionError, match="gradient"):
        parallel(*own_sample(rank))


Check = Callable[[int, int], None]
CHECKS = [check_plain_model, check_one_timestep_a_sample, check_groups, check_sharded_model, check_refusals]


def worker(rank: int, num_ranks: int, store: Path, checks: list[Check]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store.as_uri(), rank=rank, world_size=num_ranks)
    with torch.no_grad():
        for check in checks:
            check(rank, num_ranks)
    dist.destroy_process_group()


def test_every_rank_gets_the_flow_of_its_own_samples(tmp_path: Path) -> None:
    mp.spawn(worker, args=(3, tmp_path / "store", CHECKS), nprocs=3)


@pytest.mark.slow
def test_two_ranks_and_compiled_blocks(tmp_path: Path) -> None:
    mp.spawn(worker, args=(2, tmp_path / "store", [*CHECKS, check_compiled_blocks]), nprocs=2)


def test_frames_are_shared_out_evenly() -> None:
    assert share_frames(21, 4) == [6, 5, 5, 5]
    assert share_frames(21, 3) == [7, 7, 7]
    assert share_frames(3, 3) == [1, 1, 1]
    with pytest.raises(InputError, match="sequence parallelism over 8 ranks: the clip has only 7 latent frames"):
        share_frames(7, 8)
