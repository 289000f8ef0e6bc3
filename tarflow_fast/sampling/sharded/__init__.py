"""This package draws any number of images into a folder, shard by shard, by any number of processes."""

from .estimate import estimate
from .formats import FORMATS, Format
from .reading import read_shards, shard_files
from .run import SHARD_SIZE, Run, draw_shards

__all__ = ["FORMATS", "SHARD_SIZE", "Format", "Run", "draw_shards", "estimate", "read_shards", "shard_files"]
