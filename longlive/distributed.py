"""Which process this is, from the variables torchrun sets; a single process is rank 0 of 1.

Layer 0. Inference shares out whole videos, so its processes never talk to each other and no process group exists.
"""

import os
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def rank() -> int:
    """This process's number among all processes, from 0."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This process's number on its own machine, from 0: the index of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Number of processes on all machines together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def is_main() -> bool:
    """Whether this is the one process that speaks to the user and writes what is written once."""
    return rank() == 0


def shard(items: Sequence[T], rank: int, world_size: int) -> list[T]:
    """The items that process `rank` of `world_size` works on: every world_size-th, in order.

    The shards of all ranks together hold each item exactly once; with more processes than items some are empty.
    """
    assert 0 <= rank < world_size, f"rank {rank} of {world_size}"
    return list(items[rank::world_size])
