"""The order in which training meets its data: every epoch a permutation of its own, known without any state."""

import hashlib
from functools import lru_cache

import torch


class Order:
    """The endless stream of items: `order[n]` is the item of the n-th sample.

    Every epoch of `num_items` samples holds each item once. Its permutation is a pure function of seed and epoch, so
    processes agree without talking and a resumed run goes on from the number of the sample alone.
    """

    def __init__(self, num_items: int, seed: int) -> None:
        assert num_items > 0
        self.num_items = num_items
        self.seed = seed

    def __getitem__(self, n: int) -> int:
        assert n >= 0
        epoch, position = divmod(n, self.num_items)
        return _permutation(self.num_items, self.seed, epoch)[position]


@lru_cache(maxsize=8)  # clips and pictures are in different epochs
def _permutation(num_items: int, seed: int, epoch: int) -> list[int]:
    digest = hashlib.sha256(f"order {seed} {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    permutation: list[int] = torch.randperm(num_items, generator=generator).tolist()
    return permutation
