"""The plan of a run says which images are in which shard, and in what order a process looks for work."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class ShardPlan:
    """A `ShardPlan` divides the images numbered first … first+n−1 into shards.

    first: the number of the first image. n: the number of all images. size: how many images a shard has; the last one
    may have fewer.
    """

    first: int
    n: int
    size: int

    def __len__(self) -> int:
        return -(-self.n // self.size)

    def numbers(self, shard: int) -> range:
        """Returns the numbers of the images in this shard."""
        start = self.first + shard * self.size
        return range(start, min(start + self.size, self.first + self.n))

    def name(self, shard: int) -> str:
        """Returns the name of this shard; names are in the order of the shards."""
        return f"{shard:0{max(5, len(str(len(self) - 1)))}d}"

    def order(self, rank: int, world: int) -> Iterator[int]:
        """Yields all shards, in the order in which process number `rank` of `world` tries them.

        Each process begins with a part of its own, and goes on with the others' parts, so that processes seldom want
        the same shard, and whatever one of them leaves is found by all.
        """
        start = rank * len(self) // world
        yield from range(start, len(self))
        yield from range(start)
